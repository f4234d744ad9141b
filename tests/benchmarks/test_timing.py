"""Quantiles and the interval of a median; calls in turns."""

import math
import random

import pytest

from benchmarks.lib import clocks, timing
from benchmarks.lib.timing import Timing, median_interval


@pytest.mark.parametrize(("n", "k"), [(6, 1), (9, 2), (10, 2), (20, 6), (40, 14), (100, 40)])
def test_the_interval_is_between_order_statistics(n, k):
    """The ranks that tables of the sign test give for 95 %."""
    samples = random.Random(0).sample(range(1, n + 1), n)
    assert median_interval(samples) == (k, n + 1 - k)
    covered = sum(math.comb(n, i) for i in range(k, n - k + 1)) / 2**n
    assert covered >= 0.95


def test_few_samples_have_no_interval():
    assert median_interval([1.0] * 5) is None
    row = Timing.of([3.0, 1.0, 2.0]).columns()
    assert row == {"ms_p20": "1.4", "ms_p50": "2", "ms_p80": "2.6", "samples": "3"}


def test_columns_of_a_timing():
    found = Timing.of([6.0, 1.0, 2.0, 3.0, 4.0, 5.0], {"host_ms": "2"})
    row = found.columns(first_s=1.5)
    assert (row["ms_low"], row["ms_high"], row["host_ms"]) == ("1", "6", "2")
    assert float(row["compile_s"]) == pytest.approx(1.5 - 3.5e-3, abs=5e-3)
    assert "compile_s" not in found.columns() and found.loop_ms == 3.5


def test_calls_take_turns_and_get_the_same_time():
    now, log = [0.0], []

    def call_of(name, seconds):
        def call():
            now[0] += seconds
            log.append(name)

        return call

    calls = {"fast": call_of("fast", 0.01), "slow": call_of("slow", 0.05)}
    clock = clocks.CpuClock(lambda: now[0])
    times = timing.measure_interleaved(calls, clock, seconds=1, rounds=(2, 100))
    assert {name: found.samples for name, found in times.items()} == {"fast": 50, "slow": 10}
    middle = log[len(log) // 3 : 2 * len(log) // 3]
    assert middle.count("slow") in (3, 4)  # spread over all turns
