"""Measures time: samples of warm calls in turns, their quantiles, the interval of the median."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .clocks import Call, CpuClock

SLOW_MS = 200.0
CONFIDENCE = 0.95
FEWEST = 6  # samples that give an interval of this confidence


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of the median: the k-th smallest and the k-th largest sample.

    Each sample is below the median with probability 1/2, so k is the largest number for which
    P(Binomial(n, 1/2) < k) is at most 2.5 %. It holds for any distribution, if samples are
    independent. None of fewer than six.
    """
    n, k, tail = len(samples), 0, 0.0
    while (tail := tail + math.comb(n, k) / 2**n) <= (1 - CONFIDENCE) / 2:
        k += 1
    ordered = sorted(samples)
    return (ordered[k - 1], ordered[n - k]) if k else None


@dataclass(frozen=True)
class Timing:
    """Quantiles of one provider's times, in ms per call; `more` are other columns of its row."""

    p20: float
    p50: float
    p80: float
    samples: int
    interval: tuple[float, float] | None  # of the median
    more: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, samples: Sequence[float], more: Mapping[str, str] | None = None) -> "Timing":
        fifths = [samples[0]] * 4
        if len(samples) > 1:
            fifths = statistics.quantiles(samples, n=5, method="inclusive")
        median, interval = statistics.median(samples), median_interval(samples)
        return cls(fifths[0], median, fifths[3], len(samples), interval, more or {})

    def columns(self, first_s: float | None = None) -> dict[str, str]:
        """As columns of a row; `first_s` are the seconds of a first call, which compiled."""
        low, high = self.interval or (None, None)
        times = {"p20": self.p20, "p50": self.p50, "p80": self.p80, "low": low, "high": high}
        row = {f"ms_{name}": f"{ms:.6g}" for name, ms in times.items() if ms is not None}
        row["samples"] = str(self.samples)
        if first_s is not None:
            row["compile_s"] = f"{max(first_s - self.p50 / 1e3, 0.0):.3g}"
        return row | self.more

    @property
    def loop_ms(self) -> float:
        """Time per call in a loop: the larger of device and host time."""
        return max(self.p50, float(self.more.get("host_ms", 0)))


def measure_interleaved(
    calls: Mapping[object, Call],
    clock: CpuClock,
    *,
    seconds: float,
    rounds: tuple[int, int],
) -> dict[object, Timing]:
    """Time warm calls in turns, so that a noisy moment hits all alike; all get the same time.

    `seconds` are wanted in all, `rounds` are the fewest and most samples of a call; slow calls
    exceed the seconds to reach the fewest rounds.
    """
    with clock.case() as conditions:
        samplers = {name: clock.sampler(call) for name, call in calls.items()}
        share_ms = seconds * 1e3 / max(len(calls), 1)
        counts = {
            name: min(max(int(share_ms / sampler.cost_ms), rounds[0]), rounds[1])
            for name, sampler in samplers.items()
        }
        most = max(counts.values(), default=0)
        samples: dict[object, list[float]] = {name: [] for name in calls}
        for name, sampler in samplers.items():
            if sampler.estimate_ms >= SLOW_MS:  # long enough to be a sample already
                samples[name].append(sampler.estimate_ms)
                counts[name] -= 1
        for turn in range(most):
            for name, sampler in samplers.items():
                # A call with fewer samples is spread over all turns.
                if (turn + 1) * counts[name] // most > turn * counts[name] // most:
                    samples[name].append(sampler.sample_ms())
    return {
        name: Timing.of(times, samplers[name].columns | conditions)
        for name, times in samples.items()
    }
