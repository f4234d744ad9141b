"""The GPU: SM clock, what holds it down, a rest between cases, its bandwidth by the datasheet."""

import ctypes
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

PEAK_GBPS = {  # by the end of the device's name, so that a slice of a GPU (MIG, VF) has none
    r"H100 80GB HBM3": 3350.0,
    r"H100 PCIe": 2000.0,
    r"H200": 4800.0,
    r"A100-SXM4-80GB": 2039.0,
    r"A100-(SXM4|PCIE)-40GB": 1555.0,
    r"B200": 8000.0,
    r"MI300X( OAM)?": 5300.0,
}
SM_CLOCK = 1  # NVML_CLOCK_SM
IDLE = "idle"
REASONS = (  # bits of nvmlDeviceGetCurrentClocksThrottleReasons, from the lowest
    IDLE, "application clocks", "power cap", "hardware slowdown", "sync boost", "heat",
    "heat (hardware)", "power brake", "display clocks",
)  # fmt: skip
PASSING = {"power cap", "hardware slowdown", "heat", "heat (hardware)", "power brake"}
REST_S, MOST_RESTS = 0.1, 30


def peak_gbps(device: str) -> float | None:
    """The datasheet's bandwidth of a device of this name; None where it is not known."""
    for pattern, gbps in PEAK_GBPS.items():
        if re.search(rf"\b(?:{pattern})$", device):
            return gbps
    return None


class Nvml:
    """Reads one GPU's state from the driver's library; None for what it does not tell."""

    def __init__(self, library, uuid: str) -> None:
        self.library, self.handle = library, ctypes.c_void_p()
        name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        status = library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(
            name.encode(), ctypes.byref(self.handle)
        )
        self.is_found = status == 0

    def _read(self, function: str, value, *arguments: int) -> int | None:
        read = getattr(self.library, function, None)
        if not self.is_found or read is None:
            return None
        status = read(self.handle, *arguments, ctypes.byref(value))
        return value.value if status == 0 else None

    def sm_mhz(self) -> int | None:
        return self._read("nvmlDeviceGetClockInfo", ctypes.c_uint(), SM_CLOCK)

    def throttle(self) -> list[str] | None:
        """What holds the clock down; an idle GPU is not held down."""
        bits = self._read("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong())
        if bits is None:
            return None
        return [name for k, name in enumerate(REASONS) if bits >> k & 1 and name != IDLE]


@dataclass
class Gpu:
    """What a clock asks of the GPU between cases."""

    sm_mhz: Callable[[], int | None] = lambda: None
    throttle: Callable[[], list[str] | None] = lambda: None
    sleep: Callable[[float], object] = time.sleep

    @classmethod
    def current(cls) -> "Gpu":
        """PyTorch's current GPU; without NVIDIA's library one that tells nothing."""
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return cls()
        nvml = Nvml(library, str(torch.cuda.get_device_properties().uuid))
        return cls(nvml.sm_mhz, nvml.throttle)

    def rest(self) -> None:
        """Wait a moment, and on until neither heat nor power holds the clock down; 3 s at most."""
        for _ in range(MOST_RESTS):
            self.sleep(REST_S)
            if not PASSING.intersection(self.throttle() or ()):
                return

    def columns(self, mhz_before: int | None) -> dict[str, str]:
        """The clock before and after a case, and what holds it down; none where nothing is told."""
        mhz, reasons = self.sm_mhz(), self.throttle()
        clocks = {"sm_mhz_before": mhz_before, "sm_mhz_after": mhz}
        found = {name: str(value) for name, value in clocks.items() if value is not None}
        return found if reasons is None else found | {"throttle": " + ".join(reasons) or "none"}
