"""Times on a GPU are of the device, whatever the host takes; seen on a fake GPU."""

import pytest
import torch
from fake_cuda import CYCLES_PER_MS, FakeCuda

from benchmarks.lib import clocks, gpu, timing

KERNELS, HOST_MS, DEVICE_MS = 20, 0.02, 0.003  # bound by launches


def clock_of(cuda, device=None, **options):
    device = device or gpu.Gpu(sleep=lambda seconds: None)
    return clocks.CudaClock(cuda=cuda, now=cuda.now, flush=cuda.flush, device=device, **options)


def kernels_of(cuda, count=KERNELS):
    def call():
        for _ in range(count):
            cuda.launch(HOST_MS, DEVICE_MS)

    return call


@pytest.mark.parametrize(("captures", "timed"), [(True, "graph"), (False, "spin")])
def test_the_host_does_not_show(captures, timed):
    cuda = FakeCuda()
    found = timing.measure_interleaved(
        {"call": kernels_of(cuda)}, clock_of(cuda, captures=captures), seconds=0.1, rounds=(6, 20)
    )["call"]
    assert found.p20 == found.p80 == pytest.approx(KERNELS * DEVICE_MS)
    row = found.columns()
    assert row["timed"] == timed and row["samples"] == "20"
    assert cuda.replays > 20 if captures else cuda.replays == 0
    assert float(row["host_ms"]) == pytest.approx(KERNELS * HOST_MS)
    assert found.loop_ms == pytest.approx(KERNELS * HOST_MS)  # a loop waits for the host


def test_a_call_that_cannot_be_captured_is_queued_behind_a_spin():
    cuda = FakeCuda()
    work = kernels_of(cuda)

    def call():
        if cuda.captured is not None:
            raise RuntimeError("draws random numbers")
        work()

    home = cuda.current_stream()
    sampler = clock_of(cuda).sampler(call)
    assert sampler.timed == "spin"
    assert sampler.sample_ms() == pytest.approx(KERNELS * DEVICE_MS)
    with pytest.raises(clocks.NotCaptured, match="not captured: RuntimeError: draws random"):
        clocks.capture(call, cuda)
    assert cuda.captured is None and cuda.current_stream() is home


def test_a_sample_that_the_host_delayed_is_taken_again():
    cuda, delays = FakeCuda(), []
    work = kernels_of(cuda)

    def call():
        work()
        cuda.host += delays.pop() if delays else 0.0
        cuda.launch(HOST_MS, DEVICE_MS)

    sampler = clock_of(cuda, captures=False).sampler(call)
    spin_ms = sampler.spin_ms
    delays.append(5.0)
    assert sampler.sample_ms() == pytest.approx((KERNELS + 1) * DEVICE_MS)
    assert (sampler.timed, sampler.spin_ms) == ("spin", 2 * spin_ms)


@pytest.mark.parametrize("reason", ["waits", "more kernels than the queue holds"])
def test_a_call_that_cannot_be_queued_as_a_whole_is_marked(reason):
    cuda = FakeCuda(queue=16 if reason != "waits" else 1024)
    work = kernels_of(cuda)

    def call():
        work()
        if reason == "waits":
            cuda.synchronize()
            work()

    sampler = clock_of(cuda, captures=False).sampler(call)
    assert sampler.columns["timed"] == "launch" and sampler.spin_ms == 0
    assert sampler.sample_ms() > KERNELS * DEVICE_MS


def test_the_spin_is_measured_and_the_cache_emptied_before_each_sample():
    cuda = FakeCuda()
    clock = clock_of(cuda)
    assert clock.cycles_per_ms == pytest.approx(CYCLES_PER_MS)
    sampler, before = clock.sampler(kernels_of(cuda)), cuda.flushes
    sampler.sample_ms()
    sampler.sample_ms()
    assert cuda.flushes == before + 2


def test_a_case_begins_with_a_rest_and_ends_with_the_state_of_the_gpu():
    log = []
    device = gpu.Gpu(
        lambda: 1755 if "call" in log else 1980,
        lambda: ["power cap"] if "call" in log else [],
        log.append,
    )
    cuda = FakeCuda()

    def call():
        log.append("call")
        cuda.launch(HOST_MS, DEVICE_MS)

    times = timing.measure_interleaved(
        {"call": call}, clock_of(cuda, device), seconds=0, rounds=(1, 1)
    )
    assert log[0] == gpu.REST_S and log[1] == "call"
    row = times["call"].columns()
    assert (row["sm_mhz_before"], row["sm_mhz_after"]) == ("1980", "1755")
    assert row["throttle"] == "power cap"


def test_short_calls_of_a_cpu_are_repeated_until_they_can_be_read():
    cuda = FakeCuda()
    clock = clocks.CpuClock(cuda.now)

    def call():
        cuda.host += 0.01

    sampler = clock.sampler(call)
    assert sampler.repeats == 200 and sampler.sample_ms() == pytest.approx(0.01)
    row = timing.measure_interleaved({"call": call}, clock, seconds=0.01, rounds=(2, 5))
    assert {"host_ms", "timed", "sm_mhz_after"}.isdisjoint(row["call"].columns())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_real_gpu_is_captured_spun_and_usable_after_a_capture_that_failed():
    x, home = torch.zeros(2**20, device="cuda"), torch.cuda.current_stream()

    def waits():
        x.add_(1)
        x[0].item()

    queued = clocks.clock_for("cuda", captures=False).sampler(lambda: x.add_(1))
    assert queued.timed == "spin" and queued.sample_ms() > 0
    clock = clocks.clock_for("cuda")
    for call, timed in ((waits, "launch"), (lambda: x.add_(1), "graph")):
        sampler = clock.sampler(call)
        assert sampler.timed == timed and sampler.sample_ms() > 0
        assert torch.cuda.current_stream() == home
