"""The emulated GPU notices what it is there for: faults planted in a kernel or in its PTX."""

import re

import pytest
import torch
import triton
import triton.language as tl
from helpers import needs_emulation

from benchmarks.lib.ptx import Fault, emulated_gpu
from revbifpn_kernels.ops.norm_act.statistics import batch_statistics_cuda
from revbifpn_kernels.ops.resample.add import _resample_add_cuda

pytestmark = needs_emulation


@triton.jit
def copy_kernel(y_ptr, x_ptr, count, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = x[i + SHIFT]"""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i + SHIFT, mask=i < count), mask=i < count)


@triton.jit
def halve_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    """Two lanes write each y."""
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i // 2, tl.load(x_ptr + i))


@triton.jit
def sum_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))


@triton.jit
def last_kernel(y_ptr, count, BLOCK: tl.constexpr):
    """y[i] += 1; lanes past the end read the last element, and lose it."""
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(y_ptr + tl.minimum(i, count - 1)) + 1.0, mask=i < count)


def run_copy(y, x, count=200, shift=0, **options):
    with emulated_gpu(**options) as gpu:
        copy_kernel[(triton.cdiv(count, 128),)](y, x, count, shift, 128)
    return gpu


def test_a_kernel_without_faults():
    x = torch.randn(200)
    y = torch.full_like(x, torch.nan)
    gpu = run_copy(y, x)
    assert torch.equal(x, y)
    assert [launched.name for launched in gpu.launches] == ["copy_kernel"]


def test_read_past_the_end():
    with pytest.raises(Fault, match=r"out of bounds: 4 bytes at x_ptr \+800 of.*\n.*gpu_faults.py"):
        run_copy(torch.empty(200), torch.randn(200), shift=8)


def test_write_past_the_end():
    with pytest.raises(Fault, match="out of bounds: .* at y_ptr"):
        run_copy(torch.empty(192), torch.randn(200))


def test_read_beside_a_slice():
    """Inside the storage, where a memory checker on a GPU sees nothing."""
    x = torch.randn(2, 200)
    with pytest.raises(Fault, match="outside the tensor's elements"):
        run_copy(torch.empty(200), x[0], shift=8)


def test_read_of_what_nobody_wrote():
    x = torch.randn(200)
    with pytest.raises(Fault, match="unwritten memory is read: x_ptr"), emulated_gpu():
        copy_kernel[(2,)](torch.empty(200), torch.empty_like(x), 200, 0, 128)
    with emulated_gpu():
        written = torch.empty_like(x)
        copy_kernel[(2,)](written, x, 200, 0, 128)
        copy_kernel[(2,)](torch.empty_like(x), written, 200, 0, 128)
        copy_kernel[(2,)](torch.empty_like(x), torch.empty_like(x).copy_(x), 200, 0, 128)


def test_read_of_what_an_earlier_kernel_left_out():
    with pytest.raises(Fault, match="unwritten memory is read: x_ptr"), emulated_gpu() as gpu:
        half, x = torch.empty(200), torch.randn(200)
        copy_kernel[(1,)](half, x, 100, 0, 128)
        assert gpu.written(half).sum() == 100
        copy_kernel[(2,)](torch.empty(200), half, 200, 0, 128)


def test_two_threads_write_an_element():
    with pytest.raises(Fault, match="an element of y_ptr is written twice"):
        with emulated_gpu():
            halve_kernel[(1,)](torch.empty(64), torch.randn(128), 128)


def test_two_blocks_write_an_element():
    with pytest.raises(Fault, match="an element of y_ptr is written twice"):
        with emulated_gpu():
            last_kernel[(2,)](torch.randn(100), 100, 128)


@pytest.mark.parametrize("shift", [1, -1])
def test_threads_read_what_others_write(shift):
    """Whichever comes first in the emulation: nothing orders them on a GPU."""
    whole = torch.randn(202)
    with pytest.raises(Fault, match=r"is read by one thread and written by another\n.*ld\.global"):
        run_copy(whole[1:201], whole, shift=1 + shift)


def test_reads_that_are_not_used_are_no_fault():
    y = torch.randn(100)
    expected = y + 1
    with emulated_gpu():
        last_kernel[(1,)](y, 100, 128)
    assert torch.equal(y, expected)


def edited(pattern, text, count=1):
    """An edit of PTX that must find something."""

    def edit(ptx):
        result, found = re.subn(pattern, text, ptx, count=count)
        assert found, f"no {pattern} in the PTX"
        return result

    return edit


def test_misaligned():
    off = edited(r"(ld\.global\.v4\.b32.*\[ %rd\d+ \+) 0", r"\1 4")
    x = torch.randn(512)
    with pytest.raises(Fault, match="misaligned: 16-byte access"), emulated_gpu(edit=off):
        copy_kernel[(1,)](torch.empty(512), x, 512, 0, 512)


def statistics(x):
    return batch_statistics_cuda(x, 1e-5, None, None, None, 0.1)


def without_barrier(k):
    """The k-th of the kernel that sums a part of a channel."""

    def edit(ptx):
        if "entry _batch_statistics_kernel" not in ptx:
            return ptx
        place = list(re.finditer(r"bar\.sync\s+0;", ptx))[k]
        return ptx[: place.start()] + ptx[place.end() :]

    return edit


@pytest.mark.parametrize("k", range(3))
def test_a_missing_barrier(k):
    x = torch.randn(2, 16, 24, 24)
    with pytest.raises(Fault, match="race: shared memory"), emulated_gpu(edit=without_barrier(k)):
        statistics(x)


def test_a_barrier_that_some_threads_miss():
    diverging = edited(r"(?s)(@%p\d+)( st\.global.*?)bar\.sync\s+0;", r"\1\2\1 bar.sync 0;")
    with pytest.raises(Fault, match="bar.sync that not all threads"), emulated_gpu(edit=diverging):
        statistics(torch.randn(2, 16, 24, 24))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ((r"31, -1;", "31, 65535;"), Fault, "shfl.sync that not all the lanes it names reach"),
        ((r"bar\.sync\s+0;", "bar.sync 0, 64;"), NotImplementedError, "a barrier of some threads"),
        ((r"add\.f32", "add.bf16"), NotImplementedError, r"add.bf16\n  at sum_kernel"),
    ],
)
def test_what_is_wrong_or_not_known_in_a_sum(change, error, message):
    with pytest.raises(error, match=message), emulated_gpu(edit=edited(*change)):
        sum_kernel[(1,)](torch.empty(1), torch.randn(512), 512)


def test_a_kernel_that_does_not_end():
    with pytest.raises(Fault, match="copy_kernel does not end"):
        run_copy(torch.empty(200), torch.randn(200), most_steps=10)


def test_traffic_of_a_copy():
    """7 warps, whose 128 bytes fill 4 sectors and one line; the last has a fourth of them."""
    gpu = run_copy(torch.empty(200), torch.randn(200), counts_traffic=True)
    traffic = gpu.launches[0].traffic
    for requests in (*traffic.loads.values(), *traffic.stores.values()):
        assert (requests.requests, requests.sectors, requests.fewest_sectors) == (7, 25, 25)
        assert requests.wavefronts == 7
    assert traffic.l2_bytes() == traffic.dram_bytes(2**20) == 1600
    # 16 bytes on, each warp touches a sector and a line more.
    gpu = run_copy(torch.empty(200), torch.randn(204), shift=4, counts_traffic=True)
    (loads,) = gpu.launches[0].traffic.loads.values()
    assert (loads.sectors, loads.fewest_sectors, loads.wavefronts) == (32, 25, 13)


ADD_FAULTS = {
    "lanes past the end are not clamped": edited(
        r"min\.s32\s+(%r\d+), (%r\d+), (%r\d+);", r"mov.b32 \1, \2;"
    ),
    "stores are not masked": edited(r"@%p\d+ st\.global", "st.global", 0),
    "a source row too low": edited(r"(ld\.global.*\[ %rd\d+ \+) 0", r"\1 1048576"),
}


@pytest.mark.parametrize("name", ADD_FAULTS)
def test_faults_in_the_library_s_own_code(name):
    x, source = torch.randn(1, 3, 24, 24), torch.randn(1, 3, 12, 12)
    with emulated_gpu(edit=ADD_FAULTS[name]), pytest.raises(Fault):
        _resample_add_cuda(x, [source], [], [], 1.0, "bilinear", None)
