"""The instructions that are not one NumPy call, beside exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from benchmarks.lib.ptx.arithmetic import meaning, to_bf16

WORDS = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)


def run(opcode, *operands):
    function, kinds = meaning(opcode.split("."))
    given = (np.array(o).astype(kind) for o, kind in zip(operands, kinds, strict=True))
    with np.errstate(all="ignore"):
        return function(*given)


def rounded(exact: Fraction) -> np.float32:
    """The float32 nearest to a fraction, of two the even one."""
    guess = np.float32(float(exact))
    near = {
        guess,
        np.nextafter(guess, np.float32(-np.inf)),
        np.nextafter(guess, np.float32(np.inf)),
    }
    odd = {value: int(value.view(np.uint32)) & 1 for value in near}
    return min(near, key=lambda value: (abs(Fraction(float(value)) - exact), odd[value]))


def test_fma_rounds_once():
    """Also where float64 cuts off what decides between two float32 values."""
    a, b, c = np.random.default_rng(0).standard_normal((3, 2000)).astype(np.float32)
    # c + 2⁻²⁴·(1 − 2⁻⁴⁶): in float64 a tie between two float32 values, and c is the odd one.
    last = 2.0**-23
    odd = [1 + last, 1 + 3 * last, -1 - last, 2 - last]
    a = np.append(a, np.float32([1 + last, 1 + last, -1 - last, 2 + 2 * last]))
    b = np.append(b, np.float32([(1 - last) * last / 2] * 4))
    c = np.append(c, np.float32(odd))
    terms = (map(Fraction, each.astype(float)) for each in (a, b, c))
    exact = [x * y + z for x, y, z in zip(*terms, strict=True)]
    found = run("fma.rn.f32", a, b, c)
    assert [float(value) for value in found] == [float(rounded(each)) for each in exact]


def test_bf16_as_pytorch_rounds():
    values = WORDS.view(np.float32)
    expected = torch.from_numpy(values).bfloat16()
    found = torch.from_numpy(to_bf16(values).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[~found.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize(
    "name, of_nan", [("lt", False), ("ltu", True), ("ne", False), ("neu", True)]
)
def test_comparisons_with_nan(name, of_nan):
    values = np.float32([1.0, np.nan, np.nan])
    found = run(f"setp.{name}.f32", values, np.float32([2.0, 1.0, np.nan]))
    assert found.tolist() == [True, of_nan, of_nan]


@pytest.mark.parametrize("by", [0, 1, 31, 32, 40])
def test_shifts(by):
    words, count = WORDS[:64], np.full(64, by)
    signed = words.view(np.int32).astype(int)
    assert run("shl.b32", words, count).tolist() == [int(w) << by & 2**32 - 1 for w in words]
    assert run("shr.u32", words, count).tolist() == [int(w) >> by for w in words]
    assert run("shr.s32", words, count).view(np.int32).tolist() == [int(w) >> by for w in signed]


def test_bytes_permuted():
    a, b, selector = WORDS[:64], WORDS[64:128], WORDS[128:192] & 0x7777
    both = np.stack([a, b], 1).view(np.uint8)
    picked = [
        [row[s >> 4 * k & 7] for k in range(4)] for row, s in zip(both, selector, strict=True)
    ]
    expected = np.array(picked, np.uint8).view(np.uint32).ravel()
    assert run("prmt.b32", a, b, selector).tolist() == expected.tolist()


@pytest.mark.parametrize("start", [0, 3, 31])
@pytest.mark.parametrize("length", [0, 1, 8])
def test_fields_of_bits(start, length):
    a, b = WORDS[:64], WORDS[64:128]
    field = (2**length - 1) << start & 2**32 - 1
    extracted = [int(w) >> start & 2**length - 1 for w in a]
    assert run("bfe.u32", a, np.full(64, start), np.full(64, length)).tolist() == extracted
    inserted = [int(y) & ~field | int(x) << start & field for x, y in zip(a, b, strict=True)]
    assert run("bfi.b32", a, b, np.full(64, start), np.full(64, length)).tolist() == inserted


@pytest.mark.parametrize("mode", ["l.wrap", "r.clamp"])
@pytest.mark.parametrize("by", [0, 5, 32, 33])
def test_funnel_shifts(mode, by):
    a, b = WORDS[:64], WORDS[64:128]
    count = by % 32 if "wrap" in mode else min(by, 32)
    both = [int(y) << 32 | int(x) for x, y in zip(a, b, strict=True)]
    left = [value << count >> 32 & 2**32 - 1 for value in both]
    right = [value >> count & 2**32 - 1 for value in both]
    found = run(f"shf.{mode}.b32", a, b, np.full(64, by)).tolist()
    assert found == (left if mode[0] == "l" else right)


def test_division_truncates():
    a, b = np.int32([7, -7, 7, -7]), np.int32([2, 2, -2, -2])
    assert run("div.s32", a, b).tolist() == [3, -3, -3, 3]
    assert run("rem.s32", a, b).tolist() == [1, -1, 1, -1]


def test_what_is_not_known_is_refused():
    with pytest.raises(NotImplementedError, match="add.sat.f32"):
        meaning("add.sat.f32".split("."))
