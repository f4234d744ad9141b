"""Bad scales and shifts: every message names the op, the argument, what is expected and came."""

import pytest
import torch
from fusions import FUSIONS, X, assert_refused, maps, over_fusions

from revbifpn_kernels.ops.resample.add import resample_add_out

PLANES = (2, 3)
GOOD = [maps(*PLANES), maps(*PLANES)]
SOURCES = [maps(2, 3, 4, 6), maps(*X)]

# name: (scales, shifts, exception, message); {x} stands for the name of the first argument.
BAD_FACTORS = {
    "no-shifts": (
        GOOD,
        None,
        ValueError,
        "scales and shifts must be given together, got scales without shifts",
    ),
    "no-scales": (
        None,
        GOOD,
        ValueError,
        "scales and shifts must be given together, got shifts without scales",
    ),
    "scales-a-tensor": (
        maps(2, *PLANES),
        GOOD,
        TypeError,
        "scales must be a list or tuple of tensors, got Tensor",
    ),
    "too-few": (
        GOOD,
        GOOD[:1],
        ValueError,
        "shifts must hold one entry for each of 2 sources, got 1",
    ),
    "none": ([], [], ValueError, "scales must hold one entry for each of 2 sources, got 0"),
    "not-a-tensor": (
        [maps(*PLANES), 1.0],
        GOOD,
        TypeError,
        r"scales\[1\] must be a tensor, got float",
    ),
    "one-a-channel": (
        [maps(3), maps(*PLANES)],
        GOOD,
        ValueError,
        r"scales\[0\] must have {x}'s \(N, C\) = \(2, 3\) as its shape, got \(3,\)",
    ),
    "batch": (
        GOOD,
        [maps(*PLANES), maps(1, 3)],
        ValueError,
        r"shifts\[1\] must have {x}'s \(N, C\) = \(2, 3\) as its shape, got \(1, 3\)",
    ),
    "transposed": (
        [maps(*PLANES), maps(3, 2)],
        GOOD,
        ValueError,
        r"scales\[1\] must have {x}'s \(N, C\) = \(2, 3\) as its shape, got \(3, 2\)",
    ),
    "half-precision": (
        [maps(*PLANES, dtype=torch.bfloat16), maps(*PLANES)],
        GOOD,
        TypeError,
        r"scales\[0\] must be float32, or float64 beside a float64 {x}, "
        "got torch.bfloat16 beside torch.float32",
    ),
    "device": (
        GOOD,
        [maps(*PLANES, device="meta")] * 2,
        ValueError,
        r"shifts\[0\] must be on {x}'s device cpu, got meta",
    ),
    "apart": (
        [maps(*PLANES), maps(2, 6)[:, ::2]],
        GOOD,
        ValueError,
        r"scales\[1\] must be contiguous, or expanded from one row, got strides \(6, 2\)",
    ),
    "expanded-along-channels": (
        [maps(*PLANES), maps(2, 1).expand(*PLANES)],
        GOOD,
        ValueError,
        r"scales\[1\] must be contiguous, or expanded from one row, got strides \(1, 0\)",
    ),
}


@over_fusions
@pytest.mark.parametrize("bad", BAD_FACTORS)
def test_bad_factors(op, bad):
    scales, shifts, exception, message = BAD_FACTORS[bad]
    assert_refused(op, maps(*X), SOURCES, {"scales": scales, "shifts": shifts}, exception, message)


def test_out_has_the_checks_of_add():
    out = maps(*X)
    with pytest.raises(ValueError, match="^resample_add_out: scales and shifts must be given toge"):
        resample_add_out(maps(*X), SOURCES, out, scales=GOOD)
    assert torch.equal(out, maps(*X))


@over_fusions
def test_a_float64_x_wants_float64_factors(op):
    x, sources = maps(*X, dtype=torch.float64), [source.double() for source in SOURCES]
    message = r"scales\[0\] must be float32, or float64 .*, got torch.float32 beside torch.float64"
    assert_refused(op, x, sources, {"scales": GOOD, "shifts": GOOD}, TypeError, message)


@pytest.mark.parametrize("op", ["resample_add_", "resample_add_out"])
def test_factors_must_not_share_the_memory_that_is_written(op):
    x = maps(*X)
    options = {"scales": GOOD, "shifts": [GOOD[0], x.view(-1)[6:12].view(2, 3)]}
    message = rf"^{op}: shifts\[1\] must not share memory with x, .* offsets 6 and 0"
    with pytest.raises(ValueError, match=message):
        if op == "resample_add_":
            FUSIONS[op](x, SOURCES, **options)
        else:
            resample_add_out(x.clone(), SOURCES, x, **options)
    assert torch.equal(x, maps(*X))


@pytest.mark.parametrize(
    "bad", ["no-shifts", "too-few", "batch", "transposed", "half-precision", "apart"]
)
def test_the_dispatcher_ops_protect_memory_by_themselves(bad):
    """`torch.ops` can be called past the Python checks."""
    scales, shifts, _, _ = BAD_FACTORS[bad]
    x, ops, arguments = maps(*X), torch.ops.revbifpn, (SOURCES, scales, shifts or [])
    options = 1.0, "bilinear", None
    with pytest.raises(RuntimeError, match="resample_add: .*(scale|shift)"):
        ops.resample_add(x, *arguments, *options)
    with pytest.raises(RuntimeError, match="resample_add_out: .*(scale|shift)"):
        ops.resample_add_out(x, *arguments, x.clone(), *options)
    with pytest.raises(RuntimeError, match="resample_undo: .*(scale|shift)"):
        ops.resample_undo(x, x, *arguments, *options)
