"""What PTX's arithmetic instructions compute, a lane per array element."""

from collections.abc import Callable

import numpy as np

from .program import bits_of

U = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
S = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
F = {16: np.float16, 32: np.float32, 64: np.float64}
f32, f64, u32, u64 = np.float32, np.float64, np.uint32, np.uint64

# How an instruction computes: a function of its operands, and the types that it takes them as.
Meaning = tuple[Callable, list[type]]


def type_of(kind: str) -> type:
    """The NumPy type of a PTX type; bits without a meaning are unsigned."""
    return {"f": F, "s": S}.get(kind[0], U)[bits_of(kind)]


def fma(a, b, c):
    """a·b + c rounded once: exact in float64 but for sums that lie between two float32 values."""
    product, addend = a.astype(f64) * b.astype(f64), c.astype(f64)
    total = product + addend
    result = total.astype(f32)
    is_doubtful = (total.view(u64) & u64(0x1FFFFFFF) == u64(0x10000000)) | (np.abs(total) < 1.2e-38)
    if is_doubtful.any():
        at = np.nonzero(is_doubtful)[0]
        p, q, t = (np.broadcast_to(x, total.shape)[at] for x in (product, addend, total))
        high = t - p
        rest = (p - (t - high)) + (q - high)
        # Rounded to odd, so that rounding once more to float32 takes the right side.
        bits = t.view(np.int64)
        is_lost = (rest != 0) & np.isfinite(t) & (bits & 1 == 0)
        result = result.copy()
        odd = bits + np.where(is_lost, np.where((rest > 0) == (t > 0), 1, -1), 0)
        result[at] = odd.view(f64).astype(f32)
    return result


def to_bf16(x):
    bits = x.view(u32)
    rounded = (bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)
    return np.where(np.isnan(x), u32(0x7FFF), rounded).astype(np.uint16)


def from_bf16(x):
    return (x.astype(u32) << u32(16)).view(f32)


def to_half(x):
    return x.astype(np.float16).view(np.uint16)


def quotient(a, b):
    """Truncated; lanes that are not active may divide by zero."""
    b = np.where(b == 0, b.dtype.type(1), b)
    if b.dtype.kind == "u":
        return a // b
    size = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return np.where((a < 0) != (b < 0), -size, size).astype(a.dtype)


def shift(a, by, bits: int, is_left: bool):
    """Shifts by all bits or more leave nothing, or copies of the sign."""
    inside = np.minimum(by, bits - 1).astype(a.dtype)
    moved = a << inside if is_left else a >> inside
    over = moved if not is_left and a.dtype.kind == "i" else 0
    return np.where(by >= bits, over, moved).astype(a.dtype)


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def compare(name: str, a, b):
    """PTX's comparisons: a plain one is false where an operand is NaN, one with `u` is true."""
    if a.dtype.kind != "f":
        return _COMPARE[name](a, b)
    is_nan = np.isnan(a) | np.isnan(b)
    if name in ("nan", "num"):
        return is_nan if name == "nan" else ~is_nan
    if name in _COMPARE:
        return _COMPARE[name](a, b) & ~is_nan
    return _COMPARE[name[:-1]](a, b) | is_nan


def permute_bytes(a, b, selector):
    both = a.astype(u64) | (b.astype(u64) << u64(32))
    out = np.zeros(np.broadcast(a, b, selector).shape, u32)
    for k in range(4):
        nibble = (selector >> u32(4 * k)) & u32(15)
        byte = (both >> ((nibble & u32(7)).astype(u64) * u64(8))) & u64(255)
        sign = np.where(byte & u64(128), u64(255), u64(0))
        out |= np.where(nibble & u32(8), sign, byte).astype(u32) << u32(8 * k)
    return out


def funnel(a, b, by, is_left: bool, is_wrapped: bool):
    """Bits of b:a, shifted."""
    by = (by & u32(31) if is_wrapped else np.minimum(by, 32)).astype(u64)
    both = a.astype(u64) | (b.astype(u64) << u64(32))
    return ((both << by) >> u64(32) if is_left else both >> by).astype(u32)


def extract_bits(a, start, length, bits: int, word: type):
    """A field that may reach past the top; `word` says whether its sign is spread."""
    start, length = ((x & u32(255)).astype(int) for x in (start, length))
    up = bits - np.minimum(start + length, bits)
    down = np.minimum(up + start, bits - 1)
    value = (a.view(U[bits]) << up.astype(U[bits])).view(word) >> down.astype(word)
    is_empty = (length == 0) | ((start >= bits) & (np.dtype(word).kind == "u"))
    return np.where(is_empty, word(0), value)


def insert_bits(a, b, start, length, bits: int):
    ones = (u64(1) << (length & u32(255)).astype(u64)) - u64(1)
    field = (ones << (start & u32(255)).astype(u64)).astype(U[bits])
    return (b & ~field) | ((a << start.astype(U[bits])) & field)


def _approximate(base: str, is_flushed: bool) -> Callable:
    """Special functions, more exactly than a GPU: no result may depend on their last bits."""
    functions = {"sqrt": np.sqrt, "ex2": np.exp2}

    def approximate(x):
        value = x.astype(f64)
        if is_flushed:
            value = np.where(np.abs(value) < 2.0**-126, 0.0, value)
        return functions[base](value).astype(x.dtype)

    return approximate


_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _multiplication(base: str, parts: list[str]) -> Meaning | None:
    bits, kind = bits_of(parts[-1]), type_of(parts[-1])
    if kind in F.values() and base == "mul":
        return np.multiply, [kind, kind]
    wide = (S if parts[-1][0] == "s" else U).get(2 * bits)
    if base == "mad" and "hi" in parts:
        return None
    if base == "mad":
        if "wide" in parts:
            return lambda a, b, c: a.astype(wide) * b.astype(wide) + c, [kind, kind, wide]
        return lambda a, b, c: a * b + c, [U[bits]] * 3
    if "wide" in parts:
        return lambda a, b: a.astype(wide) * b.astype(wide), [kind, kind]
    if "hi" in parts and wide is not None:
        return lambda a, b: (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(kind), [
            kind,
            kind,
        ]
    return (np.multiply, [U[bits]] * 2) if "lo" in parts else None


def _of_bits(base: str, parts: list[str]) -> Meaning | None:
    """Shifts, permutations, and fields of bits."""
    bits, kind = bits_of(parts[-1]), type_of(parts[-1])
    if base in ("shl", "shr"):
        return lambda a, by: shift(a, by, bits, base == "shl"), [kind, u32]
    if base == "prmt":
        return permute_bytes, [u32] * 3
    if base == "shf":
        is_left, is_wrapped = parts[1] == "l", "wrap" in parts
        return lambda a, b, by: funnel(a, b, by, is_left, is_wrapped), [u32] * 3
    if base == "bfe":
        return lambda a, s, n: extract_bits(a, s, n, bits, kind), [kind, u32, u32]
    if base == "bfi":
        return lambda a, b, s, n: insert_bits(a, b, s, n, bits), [kind, kind, u32, u32]
    return None


def meaning(parts: list[str]) -> Meaning:
    """What an instruction with these parts of its opcode computes."""
    if parts[-1].startswith("bf16") or parts[-1] == "f16x2":  # Triton computes in float32
        raise NotImplementedError(".".join(parts))
    base, bits, kind = parts[0], bits_of(parts[-1]), type_of(parts[-1])
    is_float = kind in F.values()
    plain = kind if is_float else U[bits]
    found = None
    if "sat" in parts or ("ftz" in parts and base != "ex2"):
        pass  # none of our kernels needs them
    elif base in ("add", "sub"):
        found = {"add": np.add, "sub": np.subtract}[base], [plain] * 2
    elif base in ("mul", "mad"):
        found = _multiplication(base, parts)
    elif base == "fma" and kind is f32:
        found = fma, [f32] * 3
    elif base in ("div", "rem"):
        divide = np.divide if is_float else quotient
        rest = lambda a, b: a - quotient(a, b) * b  # noqa: E731
        found = (divide if base == "div" else rest), [kind] * 2
    elif base in ("min", "max"):
        names = {"min": (np.minimum, np.fmin), "max": (np.maximum, np.fmax)}[base]
        found = names[is_float and "NaN" not in parts], [kind] * 2
    elif base in ("neg", "abs"):
        found = {"neg": np.negative, "abs": np.abs}[base], [kind if is_float else S[bits]]
    elif base in ("sqrt", "ex2"):
        found = _approximate(base, "ftz" in parts), [kind]
    elif base in _LOGIC:
        found = _LOGIC[base], [plain] * 2
    elif base == "not":
        found = np.invert, [plain]
    elif base == "selp":
        found = lambda a, b, p: np.where(p, a, b), [plain, plain, np.bool_]
    elif base == "setp":
        found = _comparison(parts, kind)
    else:
        found = _of_bits(base, parts)
    if found is None:
        raise NotImplementedError(".".join(parts))
    return found


def _comparison(parts: list[str], kind: type) -> Meaning:
    if parts[2] in _LOGIC:
        combine = _LOGIC[parts[2]]
        return lambda a, b, p: combine(compare(parts[1], a, b), p), [kind, kind, np.bool_]
    return lambda a, b: compare(parts[1], a, b), [kind, kind]
