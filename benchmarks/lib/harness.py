"""Measures time and memory, describes the machine, keeps the record."""

import csv
import ctypes
import datetime
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

MIB = 2**20
COLUMNS = (
    "date commit device torch triton cuda op provider mode dtype shape ms_p20 ms_p50 ms_p80 gbps "
    "peak_mib saved_mib note layout threads share_of_copy share_of_clone images_per_s operators "
    "parameters_mib gradients_mib optimizer_mib gflop traffic_mib share_of_roof largest"
).split()
KEY = ("op", "provider", "mode", "dtype", "shape", "layout", "threads")
SHORTEST_CPU_SAMPLE_MS = 2.0  # below it the clock and the scheduler show
SLOW_MS = 200.0
FLUSH_BYTES = 256 * MIB  # several times the L2 of any GPU so far

Call = Callable[[], object]
Row = dict[str, str]


@dataclass(frozen=True)
class Timing:
    """Quantiles of one provider's times, in ms a call."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(samples), fifths[3])


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


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
    calls: Mapping[str, Call],
    clock: CpuClock | CudaClock,
    *,
    seconds: float,
    rounds: tuple[int, int],
) -> dict[str, Timing]:
    """Time warm calls in turns, so that a noisy moment hits all alike; all get the same time.

    Args:
        seconds: Wanted in all; slow calls exceed it to reach the fewest rounds.
        rounds: Fewest and most samples of a call.
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
    samples: dict[str, list[float]] = {name: [] for name in calls}
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
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        samples.append((time.perf_counter() - start) * 1e3 / repeats)
    synchronize(device)
    return statistics.median(samples)


def _resident_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) / 1024


def peak_mib(call: Call, device: str) -> float | None:
    """The most memory that `call` takes on top of what was there; None where it cannot be known."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps for reuse would hide an allocation
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak VmHWM back to VmRSS
        before = _resident_mib("VmRSS")
        call()
        return max(_resident_mib("VmHWM") - before, 0.0)
    except (OSError, AttributeError):
        return None


def saved_mib(call: Call) -> float:
    """What autograd keeps for backward while `call` runs."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(sizes) / MIB


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("allocate memory" in text or "out of memory" in text)
    )


def _cpu_name() -> str:
    """With the instruction set: processors of one name may differ by a factor of two in it."""
    match = None
    if Path("/proc/cpuinfo").exists():
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    name = match.group(1) if match else platform.processor() or platform.machine()
    name = re.sub(r"\((R|TM)\)|\bProcessor\b|\bCPU\b|@.*", " ", name, flags=re.IGNORECASE)
    words = [*name.split(), torch.backends.cpu.get_cpu_capability()]
    return f"{' '.join(words)} {len(os.sched_getaffinity(0))} cores"


def _commit() -> str:
    """Short hash of the checkout, with + for uncommitted changes to tracked files."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("diff", "HEAD", "--name-only") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "none"


def describe_machine(device: str) -> Row:
    """The conditions of every row: date, commit, device and versions."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": (torch.version.cuda or "") if device == "cuda" else "",
    }


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def result_path(output: Path, machine: Row) -> Path:
    """`output` itself if it names a CSV, else <device>-torch<version>.csv in that folder."""
    if output.suffix == ".csv":
        return output
    version = machine["torch"].split("+")[0]
    return output / f"{slug(machine['device'])}-torch{version}.csv"


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def record(path: Path, rows: Sequence[Row]) -> None:
    """Write `rows` into the CSV; a row with the key of an old one takes its place."""
    kept = read_rows(path) if path.exists() else []
    merged = {tuple(row.get(name, "") for name in KEY): row for row in [*kept, *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, COLUMNS, restval="", lineterminator="\n", extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(merged.values())
    partial.replace(path)
