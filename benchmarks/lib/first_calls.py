"""First calls of providers: compiling is over after them, and wrong providers are not timed."""

import gc
from collections.abc import Callable, Sequence

from torch import Tensor

from .clocks import CpuClock
from .memory import is_out_of_memory
from .record import Row

# A CUDA graph of its own would copy the inputs at each call; the clock captures the call instead.
COMPILERS = {"compile": "default", "max-autotune": "max-autotune-no-cudagraphs"}
RIVAL_ERROR_FACTOR = 4.0  # a rival may err this many times as much as ours
Results = Sequence[Tensor]
# Of results and slack: what is off by more than slack times the usual, or ""; the largest error.
Compare = Callable[[Results, float], tuple[str, float]]


def compilers_of(device: str) -> dict[str, str]:
    """torch.compile's modes that are rivals there, by provider; tuning takes minutes on a CPU."""
    return COMPILERS if device == "cuda" else {"compile": COMPILERS["compile"]}


class FirstCalls:
    """Seconds, errors against float64 and notes, by provider; a note ends its race."""

    def __init__(self, clock: CpuClock, device: str) -> None:
        self.clock, self.device = clock, device
        self.seconds: dict[str, float] = {}  # of calls that compile
        self.errors: dict[str, float] = {}
        self.notes: dict[str, str] = {}

    def run(self, name: str, call: Callable[[], Results], compare: Compare) -> None:
        """Call a provider for the first time and compare its results."""
        is_ours, results = name == "ours", []
        try:
            seconds = self.clock.wall_s(lambda: results.extend(call()))
        except Exception as error:
            is_full = is_out_of_memory(error)
            if is_full and is_ours:
                raise
            failure = f"WRONG: raised {type(error).__name__}: {error}" if is_ours else (
                f"did not compile: {type(error).__name__}")  # fmt: skip
            self.notes[name] = "out of memory" if is_full else failure
            gc.collect()
            return
        fault, self.errors[name] = compare(results, 1.0 if is_ours else RIVAL_ERROR_FACTOR)
        if fault:
            self.notes[name] = f"{'WRONG' if is_ours else 'differs'}: {fault}"
        if not is_ours or self.device == "cuda":  # on CPUs ours is compiled already
            self.seconds[name] = seconds

    def columns(self, provider: str) -> Row:
        known = provider in self.errors
        return {"error": f"{self.errors[provider]:.3g}"} if known else {}
