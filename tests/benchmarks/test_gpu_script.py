"""Every command of benchmarks/gpu.sh has options that exist; its limits sum to nine minutes."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys

import pytest

from benchmarks.lib.record import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.sh"
TEXT = SCRIPT.read_text()
# name, seconds expected, seconds allowed, command
STEPS = re.findall(r"^step ([\w-]+) (\d+) (\d+) (.*)$", TEXT, re.MULTILINE)
# Also those inside the script's functions.
COMMANDS = [" ".join(line.split()) for line in re.findall(r"^.*?(python3 -m .*)$", TEXT, re.M)]


class Parsed(Exception):
    """The command line was understood."""


def words_of(command: str) -> list[str]:
    """With the script's variables as on a GPU; of those that only the machine knows the names."""
    values = dict(re.findall(r'^(\w+)="(.*)"$', TEXT, re.MULTILINE))
    return shlex.split(re.sub(r"\$(\w+)", lambda v: values.get(v[1], v[1]), command))


def test_the_script_is_bash():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_the_limits_sum_to_less_than_nine_minutes():
    assert len(STEPS) == len(re.findall(r"^step ", TEXT, re.MULTILINE)) >= 12
    assert sum(int(allowed) for _, _, allowed, _ in STEPS) < 9 * 60
    assert all(int(expected) < int(allowed) for _, expected, allowed, _ in STEPS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "benchmarks." in c])
def test_options_of_benchmarks(command, monkeypatch, capsys):
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, *arguments):
        parse(parser, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    _, _, module, *arguments = words_of(command)
    try:
        importlib.import_module(module).main(arguments)
    except Parsed:
        return
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    pytest.fail(f"{module} does not parse its options")


@pytest.mark.parametrize("command", [c for c in COMMANDS if "pytest" in c])
def test_options_of_pytest(command, pytestconfig):
    pytest.importorskip("xdist", reason="an extra")
    _, _, _, *arguments = words_of(command)
    chosen = pytestconfig._parser.parse(arguments)  # raises where an option is unknown
    paths = chosen.file_or_dir
    assert paths and all((ROOT / path).exists() for path in paths)
    known = {line.partition(":")[0] for line in pytestconfig.getini("markers")}
    assert set(re.findall(r"\w+", chosen.markexpr)) - {"and", "not", "or"} <= known


def test_options_of_the_build():
    (command,) = (command for *_, command in STEPS if "setup.py" in command)
    program = [sys.executable, *words_of(command)[1:], "--help"]
    finished = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
