"""The three ops that take sources, and what it means that they refuse an argument."""

import pytest
import torch

from revbifpn_kernels import resample_add, resample_add_, resample_undo

X = (2, 3, 8, 12)


def maps(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


def _call_undo(y, sources, **options):
    return resample_undo(y, y, sources, **options)


# They share their checks; undo calls its first argument y.
FUSIONS = {
    "resample_add": resample_add,
    "resample_add_": resample_add_,
    "resample_undo": _call_undo,
}
over_fusions = pytest.mark.parametrize("op", FUSIONS)


def assert_refused(op, x, sources, options, exception, message):
    """Assert that `op` raises; {x} in the message stands for the name of its first argument."""
    name = "y" if op == "resample_undo" else "x"
    before = x.clone() if isinstance(x, torch.Tensor) else None
    with pytest.raises(exception, match=f"^{op}: " + message.replace("{x}", name)):
        FUSIONS[op](x, sources, **options)
    assert before is None or torch.equal(x, before), "x was written to"
