"""The pages say what the rows say, and `--check` notices when they do not."""

import subprocess
import sys

import pytest

from benchmarks import results
from benchmarks.lib import markdown, record
from benchmarks.lib.record import Recorder, read_rows, write_rows

CONDITIONS = {
    "date": "2026-01-02", "commit": "abc1234", "device": "Some CPU AVX512 2 cores",
    "torch": "2.12.0", "command": "python -m benchmarks.bench_step", "threads": "2",
}  # fmt: skip
README = """# Title

<!-- begin step-table -->
old
<!-- end step-table -->

S0 takes <!-- begin s0-step-ratio -->9.99<!-- end s0-step-ratio --> times as long, and holds
<!-- begin s0-held -->?<!-- end s0-held --> MiB.
"""


def step(network, provider, ms, **columns):
    row = {"op": network, "provider": provider, "mode": "step", "dtype": "fp32", "ms_p50": ms}
    row |= {"shape": "4x3x224x224", "held_mib": "4", "peak_mib": "25", "images_per_s": "8"}
    return CONDITIONS | row | {"operators": "7", "note": ""} | columns


def counted(network, provider, mode, **columns):
    row = {"op": network, "provider": provider, "mode": mode, "dtype": "fp32"}
    row |= {"shape": "1x3x224x224", "held_mib": "0.917", "peak_mib": "100", "gmacs": "0.27"}
    row |= {"constant_mib": "24", "parameters": "3419196", "published_macs": "308039716"}
    return CONDITIONS | {"device": "counted"} | row | columns


@pytest.fixture
def root(tmp_path):
    """A checkout with rows, and a README whose marked parts are old."""
    folder = tmp_path / "benchmarks" / "results"
    write_rows(folder / "steps.csv", [
        step("revbifpn_s0", "reversible", "450"),
        step("revbifpn_s0", "stored", "300", peak_mib="250"),
        step("revbifpn_s0", "checkpoint", "", note="WRONG: gradients differ by 2"),
        step("efficientnet_b0", "stored", "350"),
    ])  # fmt: skip
    write_rows(folder / "memory.csv", [
        counted("revbifpn_s0", "reversible", "per image"),
        counted("revbifpn_s0", "stored", "per image"),
        counted("revbifpn_s6", "reversible", "per image"),
        counted("efficientnet_b7", "stored", "per image", peak_mib="4400"),
        *(counted("revbifpn_s0", provider, "depth", extra_silos=str(extra))
          for provider in ("reversible", "stored", "checkpoint") for extra in (2, 4)),
    ])  # fmt: skip
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def run(root, *options):
    return results.main(["--root", str(root), *options])


def test_pages_and_figures_are_written_from_the_rows(root):
    assert run(root) == 0
    readme = (root / "README.md").read_text()
    assert "S0 takes <!-- begin s0-step-ratio -->1.50<!-- end s0-step-ratio --> times" in readme
    assert "<!-- begin s0-held -->0.9<!-- end s0-held --> MiB" in readme and "\nold\n" not in readme
    table = [line.replace(" ", "") for line in readme.splitlines()]
    assert "|RevBiFPN-S0|reversible|450(1.50)|4.0|25.0|" in table
    assert "|EfficientNet-B0|storedactivations|350|4.0|25.0|" in table
    assert "Some CPU AVX512 2 cores; 2 threads; torch 2.12.0; 4×3×224×224; fp32" in readme
    page = (root / "docs" / "results.md").read_text()
    assert "WRONG: gradients differ by 2" in page and "no row here is from a GPU" in page
    assert "EfficientNet-B7 over RevBiFPN-S6, memory per image, fp32 | 44.0" in page
    figures = {path.name for path in (root / "benchmarks" / "figures").iterdir()}
    assert figures == {"depth.png", "memory-macs.png", "pareto.png", "round_trip.png"}
    assert run(root, "--check") == 0  # and again: the pages are a fixed point


@pytest.mark.skipif(
    not (record.ROOT / results.PAGE).exists(), reason="the docs do not lie beside these tests"
)
def test_the_pages_of_this_checkout_are_up_to_date(capsys):
    code = results.main(["--check", "--allow-dirty"])
    assert code == 0, f"{capsys.readouterr().err}after a benchmark: make report"


def test_check_names_a_page_with_a_stale_number_and_writes_nothing(root, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.lib.figures.draw", lambda *args: None)
    assert run(root) == 0
    readme = root / "README.md"
    stale = readme.read_text().replace("1.50", "1.40")
    readme.write_text(stale)
    capsys.readouterr()
    assert run(root, "--check") == 1
    told = capsys.readouterr()
    assert told.err == "README.md is out of date: run `python -m benchmarks.results`\n"
    assert "rows of commit abc1234, which is not in the history of HEAD" in told.out
    assert readme.read_text() == stale


def test_changed_rows_make_the_pages_stale(root, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.lib.figures.draw", lambda *args: None)
    run(root)
    path = root / "benchmarks" / "results" / "steps.csv"
    rows = read_rows(path)
    rows[0]["ms_p50"] = "600"
    write_rows(path, rows)
    assert run(root, "--check") == 1
    err = capsys.readouterr().err
    assert "README.md is out of date" in err and "docs/results.md is out of date" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- begin s0-hold -->1<!-- end s0-hold -->", "nothing writes the marker 's0-hold'"),
        ("<!-- begin s0-held -->1", "without its end"),
        ("<!-- begin s0-held -->1<!-- end s0-peak -->", "without its end"),
    ],
)
def test_a_bad_marker_is_an_error_that_names_the_file(root, capsys, text, message):
    (root / "docs" / "models.md").write_text(text)
    assert run(root, "--check") == 1
    error = capsys.readouterr().err
    assert message in error and "docs/models.md" in error


def test_rows_of_uncommitted_code_are_refused(root, capsys):
    path = root / "benchmarks" / "results" / "steps.csv"
    write_rows(path, [row | {"commit": "abc1234+dirty"} for row in read_rows(path)])
    assert run(root) == 1
    assert "steps.csv has rows of uncommitted code (abc1234+dirty)" in capsys.readouterr().err
    assert not (root / "docs" / "results.md").exists()


def test_what_was_not_measured_is_said(root):
    for path in (root / "benchmarks" / "results").iterdir():
        path.unlink()
    wanted = results.texts(root, results.load(root))
    text = wanted[results.Path("README.md")]
    assert "<!-- begin s0-held -->not measured yet: `make bench-all`<!-- end s0-held -->" in text


def test_every_marker_can_be_written(root):
    rows = results.load(root)
    for name, write in results.markers(root, rows).items():
        assert isinstance(write(), str), name


def test_a_hand_recorded_table_ends_with_its_conditions(root):
    path = root / "benchmarks" / "results" / "detect-runs.csv"
    path.write_text("options,AP50,conditions\ndefaults,0.85,seed 0\n")
    text = results.recorded_table(root, "detect-runs")
    assert "defaults | 0.85 |" in text and text.endswith("\n\n*seed 0*\n")


def test_a_row_takes_the_place_of_its_older_one(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("date,op,provider,mode,ms_p50\n2026-01-01,old,ours,fwd,1.5\n")
    rows = Recorder(path, {"date": "2026-01-02"})
    rows.add([{"op": "new", "provider": "ours", "mode": "fwd", "extra": "3"}])
    rows.add([{"op": "new", "provider": "ours", "mode": "fwd", "extra": "4"}])
    old, new = read_rows(path)
    assert (old["ms_p50"], old["extra"]) == ("1.5", "")
    assert (new["date"], new["extra"]) == ("2026-01-02", "4")
    rows.add([{"op": "bad", "provider": "ours", "note": "WRONG: off"}])
    assert rows.finish("") == 1


def test_the_commit_shows_uncommitted_code(monkeypatch):
    answers = {"rev-parse": "abc1234", "status": " M csrc/a.cpp"}
    monkeypatch.setattr(record, "git", lambda command, *_: answers[command])
    assert record.commit() == "abc1234+dirty"
    answers["status"] = ""
    assert record.commit() == "abc1234"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["kernels", "results", "bench_profile", "bench_precision"])
def test_each_command_explains_itself(module):
    command = [sys.executable, "-m", f"benchmarks.{module}", "--help"]
    finished = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True)
    assert finished.returncode == 0 and "--" in finished.stdout


def test_a_forced_instruction_set_does_not_stand_for_the_machine():
    whole, forced = {"device": "Xeon AVX512 2 cores"}, {"device": "Xeon AVX2 (avx2 forced) 2 cores"}
    assert markdown.latest_device([whole, forced]) == [whole]
    assert markdown.latest_device([forced]) == [forced]
