"""The commands that the pages show: each is understood, and runs on a small network."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from trainings import NUMBERS, ROOT, TINY, ended, pair, write_images

from revbifpn_kernels import create_model, to_official
from revbifpn_kernels.recipes.classify.options import FIELDS, parse
from revbifpn_kernels.recipes.run.options import switch
from revbifpn_kernels.train import main

PAGES = [ROOT / "docs" / f"{name}.md" for name in ("training", "scaling", "finetuning")]
MODULE = "-m revbifpn_kernels.train"
SMALL = [argument for argument in TINY if not argument.startswith("--augment")]


def commands(page: Path) -> list[str]:
    lines = re.findall(r"^\s*((?:python|torchrun)\s.*)$", page.read_text(), re.MULTILINE)
    return [line for line in lines if MODULE in line]


def arguments_of(command: str) -> list[str]:
    return shlex.split(command.partition(MODULE)[2], comments=True)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder as the reader has it: images, and the authors' weights."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "pictures", each=20)
    (tmp_path / "images").symlink_to("pictures")  # by whichever name the pages call them
    model = create_model("revbifpn_s0", 7, **NUMBERS | {"in_chans": 3})
    torch.save(to_official(model), tmp_path / "revbifpn_s0.pth.tar")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_understood(page):
    found = commands(page)
    assert len(found) >= 4
    for command in found:
        parse(arguments_of(command))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands(page, place):
    for command in commands(page):
        arguments = arguments_of(command)
        small = [*SMALL, "--epochs=0" if "--epochs 0" in command else "--epochs=1"]
        if "--data" in arguments:
            small += ["--batch-size=8", "--set=in_chans=3"]
        if command.startswith("torchrun"):
            assert ended(*pair(*arguments, *small)) == [0, 0], command
        else:
            assert main([*arguments, *small]) == 0, command


def test_pages_name_options_that_exist():
    known = {switch(name) for name in FIELDS} | {"--no-reversible", "--help"}
    for page in PAGES:
        text = re.sub(r"^\s*torchrun.*?-m ", "", page.read_text(), flags=re.MULTILINE)
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
        torchruns = {"--max-restarts", "--no-build-isolation", "--logdir"}
        assert named - known - torchruns == set(), page.name
