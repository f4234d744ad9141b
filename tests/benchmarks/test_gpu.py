"""The GPU's state by the driver's library, a rest between cases, the datasheet's bandwidth."""

import pytest

from benchmarks.lib import gpu


@pytest.mark.parametrize(
    ("device", "gbps"),
    [
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA H200", 4800),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA B200", 8000),
        ("AMD Instinct MI300X", 5300),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_bandwidth_by_the_name_of_a_device(device, gbps):
    assert gpu.peak_gbps(device) == gbps


class FakeLibrary:
    """What the driver's library answers; `bits` are the reasons."""

    def __init__(self, mhz=1755, bits=0b100101, status=0):
        self.mhz, self.bits, self.status = mhz, bits, status

    def nvmlInit_v2(self):  # noqa: N802  (the library's names)
        return self.status

    def nvmlDeviceGetHandleByUUID(self, name, handle):  # noqa: N802
        assert name == b"GPU-12-34"
        handle._obj.value = 7
        return 0

    def nvmlDeviceGetClockInfo(self, handle, kind, value):  # noqa: N802
        assert (handle.value, kind) == (7, gpu.SM_CLOCK)
        value._obj.value = self.mhz
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle, value):  # noqa: N802
        value._obj.value = self.bits
        return 0


@pytest.mark.parametrize("uuid", ["12-34", "GPU-12-34"])
def test_what_the_driver_tells(uuid):
    found = gpu.Nvml(FakeLibrary(), uuid)
    assert found.sm_mhz() == 1755
    assert found.throttle() == ["power cap", "heat"]  # idle holds nothing down
    assert gpu.Gpu(found.sm_mhz, found.throttle).columns(1980) == {
        "sm_mhz_before": "1980", "sm_mhz_after": "1755", "throttle": "power cap + heat",
    }  # fmt: skip


def test_a_free_clock_and_an_unknown_one():
    free = gpu.Nvml(FakeLibrary(bits=1), "12-34")
    assert gpu.Gpu(free.sm_mhz, free.throttle).columns(None)["throttle"] == "none"
    absent = gpu.Nvml(FakeLibrary(status=9), "12-34")
    assert gpu.Gpu(absent.sm_mhz, absent.throttle).columns(None) == {}
    assert gpu.Gpu().columns(None) == {}


@pytest.mark.parametrize(("hot", "rests"), [(0, 1), (4, 5), (10**6, gpu.MOST_RESTS)])
def test_a_rest_lasts_until_the_clock_is_free_but_not_for_ever(hot, rests):
    slept = []
    device = gpu.Gpu(throttle=lambda: ["heat"] if len(slept) <= hot else [], sleep=slept.append)
    device.rest()
    assert slept == [gpu.REST_S] * rests
