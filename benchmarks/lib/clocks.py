"""How one sample of a call's time is taken, on a CPU and on a GPU.

On a GPU it is the device's time: the call is captured in a CUDA graph, or launched as it is, while
the device spins, so that all of its work is queued before any of it starts. Each sample is checked
for that; the host's time per call is a number of its own.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from . import gpu
from .memory import is_out_of_memory

SHORTEST_CPU_SAMPLE_MS = 2.0  # below it the clock and the scheduler show
FLUSH_BYTES = 2**28  # several times the L2 of any GPU so far
CALIBRATION_CYCLES = 10_000_000  # several ms
SPIN_MARGIN_MS, MOST_SPIN_MS = 0.05, 500.0
TRIES = 3  # of hiding the launches behind spins of twice the length each
WARM_UPS = 3

Call = Callable[[], object]


class CpuClock:
    """Wall time."""

    peak_gbps: float | None = None

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def synchronize(self) -> None:
        """Wait for the device."""

    def sampler(self, call: Call) -> "CpuSampler":
        return CpuSampler(call, self)

    @contextlib.contextmanager
    def case(self) -> Iterator[dict[str, str]]:
        """Around the samples of a case: yields columns, which are complete after it."""
        yield {}

    def wall_s(self, call: Call) -> float:
        """Seconds until the work of a call is done."""
        self.synchronize()
        start = self.now()
        call()
        self.synchronize()
        return self.now() - start

    def host_ms(self, call: Call, repeats: int = 1, samples_wanted: int = 3) -> float:
        """Time until `call` returns to Python, the device's work not awaited; a median."""
        samples = []
        for _ in range(samples_wanted):
            self.synchronize()
            start = self.now()
            for _ in range(repeats):
                call()
            samples.append((self.now() - start) * 1e3 / repeats)
        return statistics.median(samples)


class CpuSampler:
    """Short calls are repeated until a sample is long enough to be read."""

    columns: dict[str, str] = {}

    def __init__(self, call: Call, clock: CpuClock) -> None:
        self.call, self.now, self.repeats = call, clock.now, 1
        self.estimate_ms = max(self.sample_ms(), 1e-3)
        self.repeats = max(1, round(SHORTEST_CPU_SAMPLE_MS / self.estimate_ms))
        self.cost_ms = self.estimate_ms * self.repeats

    def sample_ms(self) -> float:
        start = self.now()
        for _ in range(self.repeats):
            self.call()
        return (self.now() - start) * 1e3 / self.repeats


class NotCaptured(RuntimeError):
    """A call that cannot be in a CUDA graph."""


def capture(call: Call, cuda=torch.cuda, pool=None):
    """The CUDA graph of a call; `pool` is that of another graph, with which it shares memory."""
    home, side, graph = cuda.current_stream(), cuda.Stream(), cuda.CUDAGraph()
    try:
        with cuda.stream(home):  # torch.cuda.graph leaves its own where a capture fails
            side.wait_stream(home)
            with cuda.stream(side):
                for _ in range(WARM_UPS):
                    call()
            home.wait_stream(side)
            with cuda.graph(graph, pool=pool):
                call()
        graph.replay()
        cuda.synchronize()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise NotCaptured(f"not captured: {type(error).__name__}: {error}") from error
    return graph


class CudaClock(CpuClock):
    """Time between two CUDA events, which the device reaches without waiting for the host.

    Before the first of them it spins and empties the L2. `captures`: whether calls are captured.
    `cuda`, `now`, `device`, `flush` are there for tests.
    """

    def __init__(self, *, captures=True, cuda=torch.cuda, now=time.perf_counter, device=None,
                 flush: Call | None = None) -> None:  # fmt: skip
        super().__init__(now)
        self.captures, self.cuda = captures, cuda
        self.synchronize = cuda.synchronize
        self.gpu = device or gpu.Gpu.current()
        self.peak_gbps = gpu.peak_gbps(cuda.get_device_name())
        self.flush = flush or torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_
        cuda._sleep(1)  # the first loads the kernel
        spun_ms, _ = self.sample(lambda: cuda._sleep(CALIBRATION_CYCLES), 0.0)
        self.cycles_per_ms = CALIBRATION_CYCLES / spun_ms

    def sampler(self, call: Call) -> "CudaSampler":
        return CudaSampler(call, self)

    @contextlib.contextmanager
    def case(self) -> Iterator[dict[str, str]]:
        self.gpu.rest()
        columns: dict[str, str] = {}
        mhz = self.gpu.sm_mhz()
        yield columns
        columns |= self.gpu.columns(mhz)

    def sample(self, launch: Call, spin_ms: float) -> tuple[float, bool]:
        """The device's ms, and whether all was queued before the device began with it."""
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        if spin_ms:
            self.cuda._sleep(round(spin_ms * self.cycles_per_ms))
        self.flush()
        start.record()
        launch()
        end.record()
        is_hidden = not start.query()
        end.synchronize()
        return start.elapsed_time(end), is_hidden


class CudaSampler:
    """Samples of one call; `timed` says what they are.

    graph: the replay of its CUDA graph. spin: its launches, queued while the device spins.
    launch: the device may have waited for the host, as a call that waits for the device, or one of
    more kernels than the queue holds, cannot be queued as a whole.
    """

    def __init__(self, call: Call, clock: CudaClock) -> None:
        self.clock, self.launch, self.timed = clock, call, "spin"
        self.host_ms = launch_ms = clock.host_ms(call)
        if clock.captures:
            with contextlib.suppress(Exception):  # NotCaptured, or no memory for the graph
                self.launch, self.timed = capture(call, clock.cuda).replay, "graph"
        if self.timed == "graph":
            launch_ms = clock.host_ms(self.launch)
        self.spin_ms = min(2 * launch_ms + SPIN_MARGIN_MS, MOST_SPIN_MS)
        self.estimate_ms = self.sample_ms()
        self.cost_ms = self.estimate_ms + self.spin_ms + SPIN_MARGIN_MS

    @property
    def columns(self) -> dict[str, str]:
        return {"host_ms": f"{self.host_ms:.6g}", "timed": self.timed}

    def sample_ms(self) -> float:
        """A sample whose launches showed is taken again, behind a longer spin."""
        for _ in range(TRIES if self.spin_ms else 0):
            ms, is_hidden = self.clock.sample(self.launch, self.spin_ms)
            if is_hidden:
                return ms
            self.spin_ms = min(2 * self.spin_ms, MOST_SPIN_MS)
        self.timed, self.spin_ms = "launch", 0.0
        return self.clock.sample(self.launch, 0.0)[0]


def clock_for(device: str, *, captures: bool = True) -> CpuClock:
    return CudaClock(captures=captures) if device == "cuda" else CpuClock()
