"""The benchmarks of norms and of depthwise convolutions: what is wrong gets no time."""

import csv

import pytest

from benchmarks import bench_depthwise, bench_norms

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def norms(monkeypatch, tmp_path):
    """Runs the benchmark on one small shape."""
    monkeypatch.setattr(bench_norms, "SHAPES", {"cpu": [(2, 8, 6, 6)]})
    path = tmp_path / "rows.csv"
    options = ["--device", "cpu", "--seconds", "0", "--no-compile", "--output", str(path)]
    return lambda: (bench_norms.main(options), rows_of(path))


def test_norms(norms):
    status, rows = norms()
    assert status == 0 and len(rows) == 2 * 2 * 2 * 6
    assert {row["provider"] for row in rows} == {"ours", "torch"}
    assert all(float(row["ms_p50"]) > 0 and float(row["share_of_copy"]) > 0 for row in rows)


def test_a_wrong_norm_gets_no_time(monkeypatch, norms):
    right = bench_norms.ours_backward
    monkeypatch.setattr(
        bench_norms, "ours_backward", lambda *args: tuple(1.1 * t for t in right(*args))
    )
    status, rows = norms()
    assert status == 1 and all(
        row["note"].startswith("WRONG") and not row["ms_p50"] for row in rows
    )


@pytest.mark.parametrize("is_wrong", [False, True])
def test_depthwise(monkeypatch, tmp_path, is_wrong):
    monkeypatch.setattr(bench_depthwise, "CASES", ((8, 6, 5, 2),))
    if is_wrong:
        monkeypatch.setattr(
            bench_depthwise,
            "depthwise_input_grad",
            lambda grad, weight, size, **_: grad.new_ones(4, 8, *size),
        )
    path = tmp_path / "rows.csv"
    assert bench_depthwise.main(["--seconds", "0", "--output", str(path)]) == int(is_wrong)
    wrong = [row for row in rows_of(path) if row["note"]]
    assert {row["op"] for row in wrong} == ({"depthwise_input_grad"} if is_wrong else set())
    assert all(not row["ms_p50"] for row in wrong)
