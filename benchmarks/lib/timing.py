"""Measures time: interleaved samples of warm calls, and the host's share of a call."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

SHORTEST_CPU_SAMPLE_MS = 2.0  # below it the clock and the scheduler show
SLOW_MS = 200.0
FLUSH_BYTES = 2**28  # several times the L2 of any GPU so far

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Quantiles of one provider's times, in ms per call."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(samples), fifths[3])

    def columns(self) -> dict[str, str]:
        """As columns of a row."""
        return {f"ms_{name}": f"{getattr(self, name):.6g}" for name in ("p20", "p50", "p80")}


class CpuClock:
    """Wall time; short calls are repeated until a sample is long enough to be read."""

    def sample_ms(self, call: Call, estimate_ms: float) -> float:
        repeats = max(1, round(SHORTEST_CPU_SAMPLE_MS / max(estimate_ms, 1e-3)))
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1e3 / repeats


class CudaClock:
    """CUDA events around one call, behind a write that empties the L2 and hides the launch."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def sample_ms(self, call: Call, estimate_ms: float) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def clock_for(device: str) -> CpuClock | CudaClock:
    return CudaClock() if device == "cuda" else CpuClock()


def measure_interleaved(
    calls: Mapping[object, Call],
    clock: CpuClock | CudaClock,
    *,
    seconds: float,
    rounds: tuple[int, int],
) -> dict[object, Timing]:
    """Time warm calls in turns, so that a noisy moment hits all alike; all get the same time.

    `seconds` are wanted in all, `rounds` are the fewest and most samples of a call; slow calls
    exceed the seconds to reach the fewest rounds.
    """
    estimates = {
        name: max(clock.sample_ms(call, SHORTEST_CPU_SAMPLE_MS), 1e-3)
        for name, call in calls.items()
    }
    share_ms = seconds * 1e3 / max(len(calls), 1)
    counts = {
        name: min(max(int(share_ms / max(estimate, SHORTEST_CPU_SAMPLE_MS)), rounds[0]), rounds[1])
        for name, estimate in estimates.items()
    }
    most = max(counts.values(), default=0)
    samples: dict[object, list[float]] = {name: [] for name in calls}
    for name, estimate in estimates.items():
        if estimate >= SLOW_MS:  # long enough to be a sample already
            samples[name].append(estimate)
            counts[name] -= 1
    for turn in range(most):
        for name, call in calls.items():
            # A call with fewer samples is spread over all turns.
            if (turn + 1) * counts[name] // most > turn * counts[name] // most:
                samples[name].append(clock.sample_ms(call, estimates[name]))
    return {name: Timing.of(times) for name, times in samples.items()}


def host_ms(call: Call, device: str, *, repeats: int = 300) -> float:
    """Time until `call` returns to Python, the device's work not awaited; median of five."""
    samples = []
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        samples.append((time.perf_counter() - start) * 1e3 / repeats)
    return statistics.median(samples)
