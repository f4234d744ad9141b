"""README.md and the pages in docs/: their Python runs, and whatever they name exists."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import revbifpn_kernels

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
# Its Python needs a trained checkpoint, which tests/recipes/test_detect_page.py makes.
RUN_ELSEWHERE = {"detection.md"}
PACKAGES = {"models.md": ("timm", "torchvision")}
SNIPPET = re.compile(r"^```python( gpu)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"<!--(.*?)-->", re.DOTALL)
PATH = re.compile(r"(?:benchmarks|csrc|docs|revbifpn_kernels|tests)/[\w./*-]*")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def snippets(page: Path) -> Iterator[tuple[str, bool]]:
    """The Python of a page, and whether it needs a GPU; errors name the page's line."""
    text = page.read_text()
    for found in SNIPPET.finditer(text):
        lines_before = text.count("\n", 0, found.start(2))
        yield "\n" * lines_before + found[2], bool(found[1])


def pages_with_python() -> Iterator[pytest.param]:
    for page in PAGES:
        needs = [needs_gpu for _, needs_gpu in snippets(page)]
        if needs and page.name not in RUN_ELSEWHERE:
            yield pytest.param(page, id=page.stem, marks=[pytest.mark.gpu] * any(needs))


def prose(page: Path) -> str:
    """A page without its Python."""
    return SNIPPET.sub("", page.read_text())


def code_spans(page: Path) -> list[str]:
    """Indented and fenced lines without their comments, and what stands in backticks."""
    text = prose(page)
    fenced = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    lines = [re.sub(r"\s+#.*", "", line) for line in lines]
    return lines + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", list(pages_with_python()))
def test_python_runs(page, tmp_path, monkeypatch):
    """The snippets of a page run in their order, in one namespace, in an empty folder."""
    for package in PACKAGES.get(page.name, ()):
        pytest.importorskip(package, reason="an extra")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for code, needs_gpu in snippets(page):
        program = compile(code, str(page), "exec")
        if not needs_gpu or torch.cuda.is_available():
            exec(program, namespace)


def commands(page: Path, start: str) -> list[str]:
    return [span for span in code_spans(page) if re.match(start, span)]


@every_page
def test_make_targets_exist(page):
    targets = re.findall(r"^([a-z%-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    patterns = [target.replace("%", "[a-z]+") for target in targets]
    for command in commands(page, r"make [a-z]"):
        for word in (word for word in shlex.split(command)[1:] if "=" not in word):
            assert any(re.fullmatch(pattern, word) for pattern in patterns), command


@every_page
def test_modules_and_their_options_exist(page):
    for command in commands(page, r"(\S*python|torchrun) "):
        found = re.search(r"-m ([\w.]+)(.*)", command)
        assert found, command
        module, arguments = found.groups()
        spec = importlib.util.find_spec(module)
        assert spec is not None, command
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", arguments):
            assert has_option(Path(spec.origin), option), f"{command}: {option}"


def has_option(source: Path, option: str) -> bool:
    """Whether the command in a source file takes an option; the recipes' are dataclass fields."""
    if option == "--help":
        return True
    if source.name in ("train.py", "detect.py"):
        files = (ROOT / "revbifpn_kernels" / "recipes").rglob("options.py")
        field = option.removeprefix("--").removeprefix("no-").replace("-", "_")
        field = {"set": "settings"}.get(field, field)
        return any(re.search(rf"^    {field}: ", f.read_text(), re.MULTILINE) for f in files)
    sources = [source.with_name("__main__.py")] if source.name == "__init__.py" else [source]
    if source.parent == ROOT / "benchmarks":
        sources += (ROOT / "benchmarks" / "lib").glob("*.py")
    return any(f'"{option}"' in file.read_text() for file in sources)


@every_page
def test_extras_exist(page):
    project = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    extras = set(re.findall(r"^(\w+) = \[", project.partition("\n[")[0], re.MULTILINE))
    for listed in re.findall(r'"\.\[(.*?)\]"', prose(page)):
        assert set(listed.split(",")) <= extras


@every_page
def test_files_and_names_exist(page):
    for span in code_spans(page):
        for path in PATH.findall(span):
            pattern = re.sub("FAMILY|NAME", "*", path.rstrip("./"))  # what the reader fills in
            assert list(ROOT.glob(pattern)), f"{path} is not in the repository"
        for name in re.findall(r"\brevbifpn_kernels\.(\w+)", span):
            is_module = importlib.util.find_spec(f"revbifpn_kernels.{name}") is not None
            assert is_module or hasattr(revbifpn_kernels, name), f"revbifpn_kernels.{name}"


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target} has no such heading"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_generated_parts_are_marked(page):
    """`<!-- begin NAME -->…<!-- end NAME -->`, neither nested nor inside code."""
    opened = None
    for comment in MARKER.findall(prose(page)):
        found = re.fullmatch(r" (begin|end) ([a-z0-9-]+) ", comment)
        assert found, f"<!--{comment}--> is no marker"
        kind, name = found.groups()
        assert opened == (None if kind == "begin" else name), f"{kind} {name} within {opened}"
        opened = name if kind == "begin" else None
    assert opened is None
    assert not any("<!--" in code for code, _ in snippets(page))


def test_readme_is_one_page_and_links_every_other():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    listed = text.partition("## Documentation")[2].partition("\n## ")[0]
    linked = re.findall(r"\[(.*?)\]\(docs/(.*?)\)", listed)
    assert sorted(file for _, file in linked) == [page.name for page in DOCS]
    assert all(shown == file for shown, file in linked)


def test_the_glossary_is_short():
    text = (ROOT / "docs" / "design.md").read_text()
    glossary = text.partition("## Glossary\n")[2].partition("\n## ")[0]
    assert 0 < len(glossary.strip().splitlines()) <= 25
