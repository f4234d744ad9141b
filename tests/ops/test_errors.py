"""Bad input: every message names the op, the argument, what is expected and what came."""

import pytest
import torch
from fusions import X, assert_refused, maps, over_fusions

from revbifpn_kernels import resample_add, resample_adjoint, resample_undo

FP64, BF16, FP16 = torch.float64, torch.bfloat16, torch.float16

# name: (x, sources, exception, message); {x} stands for the name of the first argument.
BAD_MAPS = {
    "x-not-a-tensor": ([1.0], [maps(*X)], TypeError, "{x} must be a tensor, got list"),
    "x-rank-3": (
        maps(3, 8, 12),
        [maps(*X)],
        ValueError,
        r"{x} must have shape \(N, C, H, W\), got \(3, 8, 12\)",
    ),
    "x-integer": (
        maps(*X, dtype=torch.int32),
        [maps(*X)],
        TypeError,
        "{x} must be float64, float32, bfloat16 or float16, got torch.int32",
    ),
    "x-without-rows": (
        maps(2, 3, 0, 12),
        [maps(*X)],
        ValueError,
        r"{x} must have sides of at least 1, got \(2, 3, 0, 12\)",
    ),
    "no-sources": (maps(*X), [], ValueError, "sources must hold 1 to 8 entries, got 0"),
    "nine-sources": (maps(*X), [maps(*X)] * 9, ValueError, "sources must hold 1 to 8 .*got 9"),
    "sources-a-tensor": (
        maps(*X),
        maps(*X),
        TypeError,
        "sources must be a list or tuple of tensors, got Tensor",
    ),
    "source-not-a-tensor": (maps(*X), [2.0], TypeError, r"sources\[0\] must be a tensor, got"),
    "source-rank-5": (
        maps(*X),
        [maps(*X), maps(2, 3, 4, 6, 1)],
        ValueError,
        r"sources\[1\] must have shape \(N, C, H, W\), got \(2, 3, 4, 6, 1\)",
    ),
    "source-integer": (
        maps(*X),
        [maps(*X, dtype=torch.int64)],
        TypeError,
        r"sources\[0\] must be float64, .*got torch.int64",
    ),
    "source-without-columns": (
        maps(*X),
        [maps(2, 3, 4, 0)],
        ValueError,
        r"sources\[0\] must have sides of at least 1, got \(2, 3, 4, 0\)",
    ),
    "channels": (
        maps(*X),
        [maps(*X), maps(2, 4, 4, 6)],
        ValueError,
        r"sources\[1\] must share \(N, C\) = \(2, 3\) with {x}, got \(2, 4, 4, 6\)",
    ),
    "batch": (
        maps(*X),
        [maps(1, 3, 4, 6)],
        ValueError,
        r"sources\[0\] must share \(N, C\) = \(2, 3\) with {x}, got \(1, 3, 4, 6\)",
    ),
    "device": (
        maps(*X),
        [maps(2, 3, 4, 6, device="meta")],
        ValueError,
        r"sources\[0\] must be on {x}'s device cpu, got meta",
    ),
    "float64-beside-float32": (
        maps(*X),
        [maps(2, 3, 4, 6, dtype=FP64)],
        TypeError,
        r"sources\[0\] must be float32, bfloat16 or float16 beside a torch.float32 {x}, "
        "got torch.float64",
    ),
    "float32-beside-float64": (
        maps(*X, dtype=FP64),
        [maps(2, 3, 4, 6)],
        TypeError,
        r"sources\[0\] must be torch.float64 beside a torch.float64 {x}, got torch.float32",
    ),
    "float32-beside-bfloat16": (
        maps(*X, dtype=BF16),
        [maps(2, 3, 4, 6)],
        TypeError,
        r"sources\[0\] must be torch.bfloat16 .*got torch.float32",
    ),
    "float16-beside-bfloat16": (
        maps(*X, dtype=BF16),
        [maps(2, 3, 4, 6, dtype=FP16)],
        TypeError,
        r"sources\[0\] must be torch.bfloat16 .*got torch.float16",
    ),
    "area-not-whole": (
        maps(*X),
        [maps(2, 3, 12, 12)],
        ValueError,
        r"sources\[0\] must be no larger than \(8, 12\) or larger by whole factors .*\(12, 12\)",
    ),
    "larger-and-smaller": (
        maps(*X),
        [maps(2, 3, 16, 6)],
        ValueError,
        r"sources\[0\] must be no larger than \(8, 12\) or larger by whole factors .*\(16, 6\)",
    ),
}

# name: (options, exception, message)
BAD_OPTIONS = {
    "mode-unknown": (
        {"mode": "bicubic"},
        ValueError,
        "mode must be 'bilinear' or 'nearest', got 'bicubic'",
    ),
    "alpha-tensor": (
        {"alpha": torch.tensor(1.0)},
        TypeError,
        "alpha must be a Python number, got Tensor",
    ),
    "alpha-complex": ({"alpha": 1j}, TypeError, "alpha must be a Python number, got complex"),
}
BAD_LATTICES = [0, 0.0, -1, -0.5, 3, 0.75, float("nan"), float("inf"), -float("inf")]


@over_fusions
@pytest.mark.parametrize("bad", BAD_MAPS)
def test_bad_maps(op, bad):
    x, sources, exception, message = BAD_MAPS[bad]
    assert_refused(op, x, sources, {}, exception, message)


@over_fusions
@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_bad_options(op, bad):
    options, exception, message = BAD_OPTIONS[bad]
    assert_refused(op, maps(*X), [maps(2, 3, 4, 6)], options, exception, message)


@over_fusions
@pytest.mark.parametrize("lattice", BAD_LATTICES)
def test_bad_lattices(op, lattice):
    message = f"lattice must be a positive power of two or None, got {lattice}"
    assert_refused(op, maps(*X), [maps(2, 3, 4, 6)], {"lattice": lattice}, ValueError, message)


@over_fusions
def test_a_lattice_must_be_a_number(op):
    options = {"lattice": torch.tensor(0.5)}
    message = "lattice must be a Python number, got Tensor"
    assert_refused(op, maps(*X), [maps(2, 3, 4, 6)], options, TypeError, message)


# name: (sizes and options, exception, message)
BAD_ADJOINTS = {
    "no-sizes": ({"sizes": []}, ValueError, "sizes must hold 1 to 8 entries, got 0"),
    "nine-sizes": ({"sizes": [(4, 6)] * 9}, ValueError, "sizes must hold 1 to 8 entries, got 9"),
    "flat": ({"sizes": (4, 6)}, ValueError, r"sizes\[0\] must be \(h, w\), such as .*, got 4"),
    "no-list": ({"sizes": None}, TypeError, r"sizes must be a sequence of \(h, w\), got NoneType"),
    "triple": (
        {"sizes": [(4, 6, 1)]},
        ValueError,
        r"sizes\[0\] must be \(h, w\), such as .*, got \(4, 6, 1\)",
    ),
    "side-0": (
        {"sizes": [(4, 6), (0, 6)]},
        ValueError,
        r"sizes\[1\] must have sides of at least 1",
    ),
    "area-not-whole": (
        {"sizes": [(12, 12)]},
        ValueError,
        r"sizes\[0\] must be no larger than \(8, 12\) or larger by whole factors",
    ),
    "mode": ({"mode": "area"}, ValueError, "mode must be 'bilinear' or 'nearest', got 'area'"),
    "alpha": ({"alpha": maps(1)}, TypeError, "alpha must be a Python number, got Tensor"),
    "dtype-integer": (
        {"dtype": torch.int8},
        TypeError,
        "dtype must be a floating-point torch.dtype",
    ),
    "dtype-wider": (
        {"dtype": FP64},
        TypeError,
        "dtype must be float32, bfloat16 or float16 beside a torch.float32 grad, got torch.float64",
    ),
    "grad-rank": ({"grad": maps(8, 12)}, ValueError, r"grad must have shape \(N, C, H, W\), got"),
    "grad-integer": (
        {"grad": maps(*X, dtype=torch.int16)},
        TypeError,
        "grad must be float64, float32, bfloat16 or float16, got torch.int16",
    ),
}


@pytest.mark.parametrize("bad", BAD_ADJOINTS)
def test_bad_adjoints(bad):
    changes, exception, message = BAD_ADJOINTS[bad]
    with pytest.raises(exception, match="^resample_adjoint: " + message):
        resample_adjoint(**{"grad": maps(*X), "sizes": [(4, 6)]} | changes)


@pytest.mark.parametrize(
    "grad",
    [maps(2, 3, 8, 11), maps(*X, dtype=BF16), maps(*X, device="meta")],
    ids=["shape", "dtype", "device"],
)
def test_undo_wants_a_gradient_like_y(grad):
    with pytest.raises(ValueError, match="^resample_undo: grad must have y's shape, dtype and dev"):
        resample_undo(maps(*X), grad, [maps(2, 3, 4, 6)])


@pytest.mark.parametrize("lattice", [2.0**-130, 2.0**105])
def test_a_lattice_must_suit_the_sums(lattice):
    with pytest.raises(ValueError, match="^resample_add: lattice must lie in .* float32, got"):
        resample_add(maps(*X), [maps(2, 3, 4, 6)], lattice=lattice)


@pytest.mark.parametrize(
    "bad", ["channels", "batch", "area-not-whole", "no-sources", "nine-sources"]
)
def test_the_dispatcher_ops_protect_memory_by_themselves(bad):
    """`torch.ops` can be called past the Python checks."""
    x, sources, _, _ = BAD_MAPS[bad]
    ops = torch.ops.revbifpn
    for op in (ops.resample_add, ops.resample_add_):
        with pytest.raises(RuntimeError, match="resample_add"):
            op(x, sources, [], [], 1.0, "bilinear", None)
    with pytest.raises(RuntimeError, match="resample_undo"):
        ops.resample_undo(x, x, sources, [], [], 1.0, "bilinear", None)
