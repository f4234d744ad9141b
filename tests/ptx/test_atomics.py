"""The emulated GPU knows what an atomic orders between blocks, and what it does not."""

import re

import pytest
import torch
import triton
import triton.language as tl
from helpers import needs_emulation

from benchmarks.lib.ptx import Fault, emulated_gpu

pytestmark = needs_emulation


@triton.jit
def total_kernel(y_ptr, parts_ptr, counter_ptr, x_ptr, BLOCK: tl.constexpr, RESETS: tl.constexpr):
    """y = Σ x: the last block adds up the parts of all."""
    i = tl.arange(0, BLOCK)
    block = tl.program_id(0)
    tl.store(parts_ptr + block * BLOCK + i, tl.load(x_ptr + block * BLOCK + i))
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if before == tl.num_programs(0) - 1:
        if RESETS:
            tl.store(counter_ptr, 0)
        sums = tl.zeros([BLOCK], tl.float32)
        for part in range(tl.num_programs(0)):
            sums += tl.load(parts_ptr + part * BLOCK + i, cache_modifier=".cg")
        tl.store(y_ptr, tl.sum(sums))


@triton.jit
def hasty_kernel(y_ptr, parts_ptr, x_ptr, BLOCK: tl.constexpr):
    """The block with the highest number adds up the parts, as if it ran last."""
    i = tl.arange(0, BLOCK)
    block = tl.program_id(0)
    tl.store(parts_ptr + block * BLOCK + i, tl.load(x_ptr + block * BLOCK + i))
    if block == tl.num_programs(0) - 1:
        sums = tl.zeros([BLOCK], tl.float32)
        for part in range(tl.num_programs(0)):
            sums += tl.load(parts_ptr + part * BLOCK + i, cache_modifier=".cg")
        tl.store(y_ptr, tl.sum(sums))


@triton.jit
def turn_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr, WAITS: tl.constexpr):
    """Reverses x by way of y."""
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))
    if WAITS:
        tl.debug_barrier()
    tl.store(x_ptr + i, tl.load(y_ptr + BLOCK - 1 - i))


BLOCKS, BLOCK = 70, 128  # more than the emulator runs together


def total(counter, resets=True, **options):
    x, y = torch.arange(BLOCKS * BLOCK) % 7, torch.full((1,), torch.nan)
    with emulated_gpu(**options):
        parts = torch.empty(BLOCKS * BLOCK)
        total_kernel[(BLOCKS,)](y, parts, counter, x.float(), BLOCK, resets)
    return y.item() == x.sum().item()


def edited(pattern, text):
    """An edit of the PTX after the first store, that of the parts, which must find something."""

    def edit(ptx):
        head, store, tail = ptx.partition("st.global")
        changed, found = re.subn(pattern, text, tail, count=1)
        assert found, f"no {pattern} in the PTX"
        return head + store + changed

    return edit


@pytest.mark.parametrize("blocks", [None, lambda count: range(count)[::-1]])
def test_the_last_block_may_read_what_all_have_written(blocks):
    counter = torch.zeros(1, dtype=torch.int32)
    for _ in range(2):
        assert total(counter, blocks=blocks)
    assert counter.item() == 0


def test_a_counter_that_is_not_reset():
    counter = torch.zeros(1, dtype=torch.int32)
    assert total(counter, resets=False)
    assert not total(counter, resets=False)


RACE = "is read by one thread and written by another"
FAULTS = {
    "an atomic that orders nothing": (r"acq_rel", "relaxed", RACE),
    "no barrier before the atomic": (r"bar\.sync\s+0;", "", RACE),
    "a block that takes itself for the last": (
        r"(setp\.ne\.\w+\s+%p\d+, %r\d+), %r\d+;", r"\1, 9;",
        "an atomic on counter_ptr and a store in no order",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_the_order(name):
    pattern, text, message = FAULTS[name]
    with pytest.raises(Fault, match=message):
        total(torch.zeros(1, dtype=torch.int32), edit=edited(pattern, text))


def test_no_atomic():
    x = torch.randn(BLOCKS * BLOCK)
    with pytest.raises(Fault, match=RACE), emulated_gpu():
        hasty_kernel[(BLOCKS,)](torch.empty(1), torch.empty_like(x), x, BLOCK)


def test_a_barrier_orders_the_accesses_of_its_block():
    x, y = torch.randn(BLOCK), torch.empty(BLOCK)
    expected = x.flip(0)
    with emulated_gpu():
        turn_kernel[(1,)](y, x, BLOCK, True)
    assert torch.equal(x, expected)
    with pytest.raises(Fault, match=RACE), emulated_gpu():
        turn_kernel[(1,)](y, x, BLOCK, False)
