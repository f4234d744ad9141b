"""The benchmark of the resample ops: rows of right ones, no time for wrong ones."""

import dataclasses

import pytest
import torch

from benchmarks import bench_ops
from benchmarks.lib import first_calls, workloads
from benchmarks.lib.record import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs some ops on one small case without a compiler."""
    case = workloads.Case("small", (2, 4, 16, 16), "fp32", "nchw", 1)
    monkeypatch.setattr(workloads, "quick_cases", lambda threads: [case])
    monkeypatch.setattr(bench_ops.clocks.CpuClock, "host_ms", lambda *_, **__: 0.5)
    path = tmp_path / "rows.csv"
    options = ["--device", "cpu", "--quick", "--output", str(path)]

    def run(*ops):
        monkeypatch.setattr(bench_ops, "OPS", ops)
        status = bench_ops.main(options)
        return status, [row for row in read_rows(path) if row["mode"] != "host"]

    return run


def test_rows(bench):
    status, rows = bench(workloads.ADD_, workloads.UNDO)
    assert status == 0
    found = {(row["op"], row["provider"]): row for row in rows}
    assert {op for op, _ in found} == {"resample_add_", "resample_undo"}
    assert {provider for _, provider in found} == {"ours", "torch", "copy", "clone"}
    undo = found["resample_undo", "ours"]
    size, pyramid = 2 * 4 * 16 * 16 * 4, 2 * 4 * (64 + 16 + 4) * 4
    moved = (3 * size + 2 * pyramid) / float(undo["ms_p50"]) / 1e6
    assert float(undo["gbps"]) == pytest.approx(moved, rel=1e-3)
    copied = 2 * size / float(found["resample_undo", "copy"]["ms_p50"]) / 1e6
    assert float(undo["share_of_copy"]) == pytest.approx(moved / copied, rel=1e-2)
    assert 0 < float(undo["error"]) < 1e-5 and int(undo["samples"]) >= 2
    assert not found["resample_undo", "torch"]["error"] and "share_of_peak" not in undo


def test_a_device_of_known_bandwidth(bench, monkeypatch):
    monkeypatch.setattr(bench_ops.clocks.CpuClock, "peak_gbps", 2.0)
    _, rows = bench(workloads.ADD)
    for row in rows:
        assert float(row["share_of_peak"]) == pytest.approx(float(row["gbps"]) / 2, rel=1e-3)


@pytest.mark.parametrize(("factor", "is_right"), [(1.0, True), (1.01, False)])
def test_a_rival_that_is_wrong_gets_no_time(bench, monkeypatch, factor, is_right):
    """The compiler's result, here eager's times a factor."""
    case = workloads.Case("small", (2, 4, 16, 16), "fp32", "nchw", 1, compiles=True)
    monkeypatch.setattr(workloads, "quick_cases", lambda threads: [case])

    def compiled(x, grad, sources):
        return (x.copy_(factor * workloads.ADD.compiled(x, grad, sources)[0]),)

    monkeypatch.setattr(bench_ops.torch, "compile", lambda *_, **__: compiled)
    status, rows = bench(workloads.ADD_)
    (rival,) = (row for row in rows if row["provider"] == "compile")
    assert status == 0 and bool(rival["ms_p50"]) == bool(rival.get("compile_s")) == is_right
    assert rival["note"].startswith("small" if is_right else "differs: x is off by")


def test_tuning_is_a_rival_on_a_gpu_alone():
    assert list(first_calls.compilers_of("cuda")) == ["compile", "max-autotune"]
    assert list(first_calls.compilers_of("cpu")) == ["compile"]
    modes = first_calls.COMPILERS.values()
    assert all(mode in torch._inductor.list_mode_options() for mode in modes)


def test_a_rival_that_does_not_compile_is_a_row(bench, monkeypatch):
    case = workloads.Case("small", (2, 4, 16, 16), "fp32", "nchw", 1, compiles=True)
    monkeypatch.setattr(workloads, "quick_cases", lambda threads: [case])

    def refuse(*_):
        raise NotImplementedError

    monkeypatch.setattr(bench_ops.torch, "compile", lambda *_, **__: refuse)
    status, rows = bench(workloads.ADD)
    (rival,) = (row for row in rows if row["provider"] == "compile")
    assert (status, rival["note"]) == (0, "did not compile: NotImplementedError")


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_op_gets_no_time(bench, factor):
    wrong = dataclasses.replace(
        workloads.ADD, ours=lambda inputs: (workloads.ADD.eager(inputs)[0] * factor,)
    )
    status, rows = bench(wrong)
    assert status == 1 and len(rows) == 1
    assert rows[0]["note"].startswith("WRONG: y ") and not rows[0]["ms_p50"]


def test_bad_shapes_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_ops.parse(["--shapes", "16x64"])
    assert "'16x64' is no NxCxHxW" in capsys.readouterr().err
