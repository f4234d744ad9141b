"""What a block's `backward_step` asks the engine for: transforms run again, and gradients."""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops.resample.folded_norm import Source, maps_of
from .recompute import BlockTrace, run_transform
from .recompute.module_state import parameters_of


class Pullback(NamedTuple):
    """A recomputed transform's output without a graph, and how to go back through it.

    `backward(grad)` is called once at most. It returns the gradient of the input, in its dtype, and
    those of `parameters`; None, or no list, where none is needed.
    """

    output: Source
    parameters: Sequence[Tensor | None]
    backward: Callable[[Tensor], tuple[Tensor | None, Sequence[Tensor | None]]]


class Rerun:
    """A recomputed transform: its output, and the gradients through it."""

    def __init__(
        self, step: "Step", module: nn.Module, x: Tensor, result: Source | Pullback
    ) -> None:
        self._step, self._module, self._x, self._result = step, module, x, result
        self.output = result.output if isinstance(result, Pullback) else result.detach()

    def backward(self, grad: Tensor | None) -> Tensor | None:
        """Return the gradient of the input and collect those of parameters; frees the graph."""
        result, self._result = self._result, None
        if isinstance(result, Pullback):
            return None if grad is None else self._step.pull_back(result, grad)
        output = maps_of(result)
        (grad_x,) = self._step.differentiate(self._module, [output], [self._x], [grad])
        return grad_x


class Step:
    """One backward of a block.

    Attributes:
        trace: What the block's forward recorded.
        needs_grad: Whether each input of the block needs a gradient.
        parameter_grads: Gradients of parameters so far, by the parameters' ids.
    """

    def __init__(self, trace: BlockTrace, needs_grad: Sequence[bool]) -> None:
        self.trace = trace
        self.block = trace.block
        self.needs_grad = tuple(needs_grad)
        self.parameter_grads: dict[int, Tensor] = {}

    def recomputing(self, *, is_reversed: bool = False) -> contextlib.AbstractContextManager:
        """Inside, transforms reuse what the forward recorded; `is_reversed`: in reverse order."""
        return self.trace.recomputing(is_reversed=is_reversed)

    def rerun(
        self,
        name: str,
        module: nn.Module,
        x: Tensor,
        *,
        needs_grad: bool = True,
        folds_norm: bool = False,
    ) -> Rerun:
        """Run a transform as the forward did under the same name, with a graph."""
        leaf = x.detach().requires_grad_(needs_grad)
        with torch.enable_grad():
            output = run_transform(
                self.block, name, module, leaf, folds_norm=folds_norm, is_rerun=True
            )
        return Rerun(self, module, leaf, output)

    def of_member(self, block: nn.Module, needs_grad: Sequence[bool]) -> "Step":
        """Return a Step for an inner block, with the same trace and `parameter_grads`."""
        step = Step(self.trace, needs_grad)
        step.block, step.parameter_grads = block, self.parameter_grads
        return step

    def differentiate(
        self,
        module: nn.Module,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """Return the gradients of `inputs`, None where not needed; collect those of parameters."""
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if grad is not None and output.requires_grad
        ]
        wanted = [x for x in inputs if x.requires_grad]
        stand_ins = self.trace.stand_ins
        parameters = [stand_ins.get(id(p), p) for p in parameters_of(module) if p.requires_grad]
        if not pairs or not (wanted or parameters):
            return [None] * len(inputs)
        outputs, grads = zip(*pairs, strict=True)
        results = torch.autograd.grad(outputs, [*wanted, *parameters], grads, allow_unused=True)
        self._collect(parameters, results[len(wanted) :])
        found = iter(results)
        return [next(found) if x.requires_grad else None for x in inputs]

    def pull_back(self, result: Pullback, grad: Tensor) -> Tensor | None:
        """Return the gradient of the input; collect those of parameters."""
        grad_x, grads = result.backward(grad)
        self._collect(result.parameters, grads)
        return grad_x

    def _collect(self, parameters: Sequence[Tensor | None], grads) -> None:
        for parameter, grad in zip(parameters, grads, strict=False):
            if grad is not None:
                known = self.parameter_grads.get(id(parameter))
                self.parameter_grads[id(parameter)] = grad if known is None else known + grad
