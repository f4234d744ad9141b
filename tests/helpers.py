"""The judges: as accurate as the reference, the same bits, no input written to."""

import functools
from collections.abc import Callable

import pytest
import torch
import triton
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map, tree_map_only

from benchmarks.lib.ptx import emulated_gpu

IS_INTERPRETED = not torch.cuda.is_available() and triton.knobs.runtime.interpret
needs_emulation = pytest.mark.skipif(
    torch.cuda.is_available() or IS_INTERPRETED, reason="needs kernels compiled for no GPU"
)
FEW = 2  # elements of an output whose largest error is a matter of chance


def as_dtype(values, dtype: torch.dtype):
    """`values` with all tensors of floats, and all dtypes among the options, turned to `dtype`."""

    def turn(leaf):
        if isinstance(leaf, Tensor):
            return leaf.detach().to(dtype) if leaf.is_floating_point() else leaf
        return dtype if isinstance(leaf, torch.dtype) else leaf

    return tree_map(turn, values)


def on_cpu(values):
    """`values` with every tensor on the CPU, where references are taken whatever is judged."""
    return tree_map_only(Tensor, Tensor.cpu, values)


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _errors(results, exact) -> list[float]:
    pairs = zip(tree_leaves(results), tree_leaves(exact), strict=True)
    return [_largest(result.double() - truth) for result, truth in pairs]


def _allowances(reference, inputs, options, plain, exact) -> list[float]:
    """For each output twice the error of the reference in the working dtype.

    Chance may have spared the reference where an output is one or two numbers: then both sides are
    granted one more step of the magnitudes that they sum. In float64 the reference is the truth
    itself and errs as float32 does, in smaller steps; what it sums is bounded there by the largest
    of all outputs, of the inputs and of their absolute values, because gates that these saturate
    hide what was summed. Twice of all that again, for two machines' orders of the sums.
    """
    dtype = inputs[0].dtype
    is_truth = dtype == torch.float64
    if is_truth:
        plain = reference(*as_dtype(inputs, torch.float32), **as_dtype(options, torch.float32))
    errors, outputs = _errors(plain, exact), tree_leaves(plain)
    if not is_truth and min(output.numel() for output in outputs) > FEW:
        return [2 * error for error in errors]
    inputs, options = tree_map_only(
        (Tensor, float), abs, as_dtype((inputs, options), torch.float64)
    )
    step = torch.finfo(dtype).eps
    sums = tree_leaves(reference(*inputs, **options))
    if is_truth:
        share = step / torch.finfo(torch.float32).eps
        largest = max(map(_largest, [*sums, *tree_leaves(exact)]))
        return [4 * (error * share + step * largest) for error in errors]
    return [
        2 * (error + (step * _largest(total) if total.numel() <= FEW else 0))
        for error, total in zip(errors, sums, strict=True)
    ]


def assert_as_accurate(ours, reference: Callable, *inputs, **options) -> None:
    """Assert that `ours` is as near to the float64 reference as the reference in the working dtype.

    Largest errors are compared, output by output: ours may be twice the reference's plus one
    rounding step of the output's dtype at the output's largest magnitude. Shapes and dtypes must
    agree, and ours must lie on the inputs' device.
    """
    devices = {leaf.device for leaf in tree_leaves((ours, inputs)) if isinstance(leaf, Tensor)}
    assert len(devices) == 1, f"inputs and results lie on {devices}"
    ours, inputs, options = on_cpu((ours, inputs, options))
    exact = reference(*as_dtype(inputs, torch.float64), **as_dtype(options, torch.float64))
    plain = reference(*inputs, **options)
    allowances = _allowances(reference, inputs, options, plain, exact)
    named, _ = tree_flatten_with_path(ours)
    outputs = zip(
        named, tree_leaves(plain), tree_leaves(exact), _errors(ours, exact), allowances, strict=True
    )
    for (path, our), wanted, truth, error, allowance in outputs:
        name = keystr(path)
        assert our.shape == wanted.shape, f"{name}: shape {our.shape}, expected {wanted.shape}"
        assert our.dtype == wanted.dtype, f"{name}: dtype {our.dtype}, expected {wanted.dtype}"
        allowed = allowance + torch.finfo(our.dtype).eps * _largest(truth)
        # A NaN error compares false, and an infinite allowance would forgive everything.
        assert error <= allowed < float("inf"), f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def same_bits(left, right) -> bool:
    """Whether all tensors agree bit for bit, signs of zeros and NaNs included."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}

    def bits(tensor):
        return tensor.detach().contiguous().view(integers[tensor.dtype.itemsize])

    pairs = list(zip(tree_leaves(left), tree_leaves(right), strict=True))
    assert pairs, "nothing to compare"
    return all(a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in pairs)


def on_lattice(x, lattice):
    """x rounded to the lattice; + 0 turns the negative zero, which no sum restores, into zero."""
    return x.copy_((x.double() / lattice).round() * lattice + 0.0)


def gradients(function: Callable, x, sources, grad_y, **options) -> dict:
    """The gradients of x and of all sources of `function(x, sources, **options)`."""
    x, *sources = (maps.detach().requires_grad_() for maps in (x, *sources))
    grad_x, *grad_sources = torch.autograd.grad(
        function(x, sources, **options), [x, *sources], grad_y
    )
    return {"grad_x": grad_x, "grad_sources": grad_sources}


def whole_storage(tensor: Tensor) -> Tensor:
    """All bytes that `tensor` is a part of."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def on_this_machine(launcher: Callable) -> Callable:
    """`launcher`; without a GPU its kernels, compiled for sm_90, run on CPU tensors.

    With TRITON_INTERPRET=1 they are interpreted instead, statement by statement, for a debugger.
    """
    if torch.cuda.is_available() or IS_INTERPRETED:
        return launcher

    @functools.wraps(launcher)
    def emulated(*args):
        with emulated_gpu():
            return launcher(*args)

    return emulated


def leaves_alone(function: Callable, outputs: int = 0) -> Callable:
    """`function`, which may not write to arguments after the first `outputs`, nor around them."""

    def guarded(*args):
        inputs = [leaf for leaf in tree_leaves(args[outputs:]) if isinstance(leaf, Tensor)]
        before = [whole_storage(tensor).clone() for tensor in inputs]
        result = function(*args)
        for k, (tensor, kept) in enumerate(zip(inputs, before, strict=True)):
            assert torch.equal(whole_storage(tensor), kept), f"input {k} was written to"
        return result

    return guarded
