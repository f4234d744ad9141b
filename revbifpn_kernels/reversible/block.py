"""The contract of a reversible block."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .function import run_by_engine
from .recompute import TrackedModule, is_traced
from .recompute.checks import tuple_of_streams
from .step import Step
from .streams import Streams
from .tape import compute_of


class Reversible(nn.Module):
    """A block whose inputs can be computed from its outputs. Subclass it, define two methods.

    `forward(*xs)` is plain differentiable computation that returns a tuple of streams; `inverse`
    returns `xs` from them, calling submodules in the opposite order. In a `ReversibleSequential` or
    alone, the block then trains without storing activations: alone it saves its outputs, in a
    sequence not even those. Submodules may contain batch norms, dropout, anything: their recompute
    repeats what they did in the forward.

    Attributes:
        reversible: False trains under plain autograd, which stores activations.
        lattice: Exact mode: a power of two of which all streams are multiples, or None. A block of
            your own must add by `resample_add(b, [f(a)], lattice=self.lattice)` to keep them so.
        check: True runs every transform twice more in each forward, again and in `inverse`, and
            raises if results differ, or if a stream leaves the lattice's range. Switch it on once
            after writing a block: it is slow and synchronises with the GPU.
        is_additive: True for a block that changes its streams by `resample_add` of transforms
            alone, called by `run_transform`: a compiled step then finds the inverse. A subclass
            with a `forward` of its own does not inherit it.
        keeps_inputs: True for a block without an inverse, see `Recomputed`.
        reruns_before: True for a block that saves no inputs if the preceding block keeps its own:
            the backward runs that block again to compute them.
    """

    reversible: bool = True
    keeps_inputs: bool = False
    is_additive: bool = False
    reruns_before: bool = False
    lattice: float | None = None
    check: bool = False

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls.forward, "compute"):
            cls.forward = run_by_engine(cls.forward)
            cls.is_additive = cls.__dict__.get("is_additive", False)

    def __getattr__(self, name: str):
        value = super().__getattr__(name)
        if isinstance(value, nn.Module) and self.calls_transforms and is_traced(self):
            return TrackedModule(self, name, value)
        return value

    @property
    def calls_transforms(self) -> bool:
        """Whether `forward` calls submodules itself, and `backward_step` is the general one."""
        return type(self).backward_step is Reversible.backward_step

    def forward(self, *xs: Tensor) -> Streams:
        """Return the outputs; plain computation, differentiable by autograd."""
        raise NotImplementedError(f"{type(self).__name__}: forward must be defined")

    def inverse(self, *ys: Tensor) -> Streams:
        """Return the inputs of `forward` from its outputs."""
        raise NotImplementedError(f"{type(self).__name__}: inverse must be defined")

    def __prepare_scriptable__(self):
        """Raise: `torch.jit.script` calls this first, and could not compile `forward`."""
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script cannot compile it; use torch.compile, or "
            "torch.export.export of a model in evaluation"
        )

    def members(self) -> Sequence["Reversible"]:
        """Return the inner blocks, whose `forward` and `backward_step` this block's own call."""
        return ()

    def backward_step(
        self, ys: list[Tensor], grad_ys: list[Tensor | None], step: Step
    ) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """Return the inputs and their gradients; parameters' gradients go to `step`.

        This one works for every block: `inverse`, then autograd through the whole of `forward`.
        Override it to restore and differentiate together, one transform at a time, by `step.rerun`.

        Args:
            ys: The outputs of `forward`, or the inputs if the block keeps its inputs; you may
                change the list, but not its tensors.
            grad_ys: Their gradients, None where nothing depends on an output.
            step: Runs transforms again; collects gradients.
        """
        xs: Sequence[Tensor] = ys
        if not self.keeps_inputs:
            with step.recomputing(is_reversed=True):
                xs = tuple_of_streams(self, self.inverse(*ys), "inverse", len(step.needs_grad))
        leaves = [x.detach().requires_grad_(n) for x, n in zip(xs, step.needs_grad, strict=True)]
        with step.recomputing(), torch.enable_grad():
            outputs = compute_of(self)(self, *leaves)
        return xs, step.differentiate(self, outputs, leaves, grad_ys)


Reversible.forward = run_by_engine(Reversible.forward)
