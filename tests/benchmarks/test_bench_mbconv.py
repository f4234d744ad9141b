"""The benchmark of MBConv, whole and in parts: what is wrong gets no time."""

import pytest
import torch

from benchmarks import bench_mbconv
from benchmarks.lib.record import read_rows
from revbifpn_kernels import MBConv

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the benchmark on one small stage, convolution and block of each kind."""
    monkeypatch.setattr(bench_mbconv, "SHAPES", {"cpu": [(2, 8, 6, 6)]})
    monkeypatch.setattr(bench_mbconv, "LAYOUTS", {"channels_last": torch.channels_last})
    monkeypatch.setattr(bench_mbconv, "DEPTHWISE", ((8, 6, 5, 2),))
    monkeypatch.setattr(bench_mbconv, "POINTWISE", ((8, 6, 4),))
    monkeypatch.setattr(
        bench_mbconv, "blocks_of", lambda name: iter([(MBConv(8, 8), (2, 8, 6, 6), name)])
    )
    path = tmp_path / "rows.csv"
    options = ["--device", "cpu", "--seconds", "0", "--no-compile", "--output", str(path)]
    return lambda: (bench_mbconv.main(options), read_rows(path))


def test_rows(bench):
    status, rows = bench()
    assert status == 0 and len(rows) == 2 * 2 * 2 + 2 * 2 * 2 * 2 + 7 * 2
    assert {row["provider"] for row in rows} == {"ours", "torch"}
    assert all(float(row["ms_p50"]) > 0 for row in rows)
    assert all(float(row["share_of_copy"]) > 0 for row in rows if row["op"] != "MBConv")
    errors = [float(row["error"]) for row in rows if row["error"]]
    assert len(errors) == 4 and max(errors[:2]) < 1e-5  # of our stages; the first two in float32


def test_a_wrong_stage_gets_no_time(monkeypatch, bench):
    right = bench_mbconv.ours_backward
    monkeypatch.setattr(
        bench_mbconv, "ours_backward", lambda *args: tuple(1.1 * t for t in right(*args))
    )
    status, rows = bench()
    wrong = [row for row in rows if row["op"].startswith("norm_act")]
    assert status == 1 and len(wrong) == 4
    assert all(row["note"].startswith("WRONG") and not row["ms_p50"] for row in wrong)


def test_a_wrong_convolution_gets_no_time(monkeypatch, bench):
    monkeypatch.setattr(
        bench_mbconv,
        "depthwise_input_grad",
        lambda grad, weight, size, **_: grad.new_ones(4, 8, *size),
    )
    status, rows = bench()
    wrong = [row for row in rows if row["note"]]
    assert status == 1 and {row["op"] for row in wrong} == {"depthwise_input_grad"}
    assert all(not row["ms_p50"] for row in wrong)
