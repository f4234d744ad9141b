"""One block's call as an autograd Function: its gradients are ready before the preceding block's.

y = block(x)        forward      saves nothing; the last block saves y
x = block⁻¹(y)      backward     and dL/dx, dL/dθ from dL/dy, by `backward_step`
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..compiler.trace import can_trace, trace_blocks
from ..ops.layout import in_format, is_channels_last
from .recompute import BlockTrace, is_traced, sharing_draws
from .step import Step
from .streams import Streams, enter, identity
from .tape import BlockCall, Tape, compute_of

# The tape of a chain's call and the block's index in it; without a tape it runs as a plain module.
TapeSlot = tuple[Tape | None, int]


class _Block(torch.autograd.Function):
    """One block in the graph. Parameters are inputs, so that autograd sees where they are used."""

    @staticmethod
    def forward(ctx, call: BlockCall, *tensors: Tensor):
        tape, trace = call.tape, call.trace
        xs = tensors[: call.input_count]
        tape.check_inputs(call.index, call.block, xs)
        versions = [x._version for x in xs]
        with trace.recording(xs[0]):
            ys = call.run(xs)
        if [x._version for x in xs] != versions:
            raise RuntimeError(
                f"{type(call.block).__name__}: forward changed an input in place; expected "
                "b = b + f(a), not b += f(a)"
            )
        if tape.check:
            call.check(xs, ys)
        tape.returned_identities = [identity(y) for y in ys]
        streams = call.streams_to_save(xs, ys)
        tape.previous = (call, streams) if call.block.keeps_inputs else None
        ctx.call = call
        ctx.channels_last = [y.dim() == 4 and is_channels_last(y) for y in ys]
        ctx.saved_streams = len(streams)
        # Parameters and buffers are saved so that autograd notices a change before the backward.
        buffers = trace.state.buffers_read(trace.updated_buffers())
        ctx.save_for_backward(*streams, *trace.state.unique_parameters, *buffers)
        ctx.set_materialize_grads(False)
        return ys

    @staticmethod
    def backward(ctx, *grad_ys: Tensor | None):
        call, trace = ctx.call, ctx.call.trace
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(call.block).__name__}: a gradient of gradients (create_graph=True) needs "
                "stored activations; set reversible=False"
            )
        saved = [y.detach() for y in ctx.saved_tensors[: ctx.saved_streams]]
        ys = call.streams_from(saved) if saved else call.tape.take(call.index, call.block)
        del saved
        grads = [
            grad if grad is None or grad.dim() != 4 else in_format(grad, channels_last)
            for grad, channels_last in zip(grad_ys, ctx.channels_last, strict=True)
        ]
        step = Step(trace, ctx.needs_input_grad[1 : 1 + call.input_count])
        # Tensors that the recompute uses instead of parameters, by the parameters' ids.
        trace.stand_ins = trace.state.stand_ins()
        with trace.state.restored() as replaced:
            xs, grad_xs = call.block.backward_step(ys, grads, step)
        if call.index > call.tape.first and call.previous is None:
            call.tape.outputs[call.index - 1] = list(xs)
        replaced = trace.stand_ins | replaced  # a tensor that the modules had comes first
        used = call.parameters
        if replaced:
            used = [replaced.get(id(p), p) for p in used]
        return None, *grad_xs, *[step.parameter_grads.get(id(p)) for p in used]


def run_by_engine(compute: Callable) -> Callable:
    """Wrap a subclass's `forward` so that calls go through the engine, inside of module hooks."""

    @functools.wraps(compute)
    def forward(self, *xs, slot: TapeSlot | None = None):
        if type(self).forward is not forward:  # called by a subclass through super()
            return compute(self, *xs)
        if slot is not None:
            return _call_block(self, slot, xs)
        xs = enter(self, xs, self.lattice)
        if not (self.reversible and wants_graph(self)):
            return _call_block(self, (None, 0), xs)
        if not torch.compiler.is_compiling():
            return _call_block(self, (Tape(1, self.check), 0), xs)
        if can_trace([self]):
            return trace_blocks([self], xs)
        return _call_block_untraced(self, (Tape(1, self.check), 0), xs)

    forward.compute = compute
    return forward


def wants_graph(chain: nn.Module) -> bool:
    """Whether to use the engine: grad enabled, not tracing, not in another block's transform."""
    is_replica = getattr(chain, "_is_replica", False)  # DataParallel's hide their parameters
    is_recorded = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return torch.is_grad_enabled() and not (is_replica or is_recorded or is_traced())


def _call_block(block: nn.Module, slot: TapeSlot, xs: Streams) -> Streams:
    if torch.compiler.is_compiling():  # there is no tape then
        return compute_of(block)(block, *xs)
    with sharing_draws(block):
        has_tape = slot[0] is not None
        return _call_with_tape(block, *slot, xs) if has_tape else compute_of(block)(block, *xs)


def _call_with_tape(block: nn.Module, tape: Tape, index: int, xs: Streams) -> Streams:
    trace = BlockTrace(block, tape.check)
    parameters = [p for p in trace.state.unique_parameters if p.requires_grad]
    if not parameters and not any(x.requires_grad for x in xs):
        tape.previous = tape.returned_identities = None
        with torch.no_grad():
            return compute_of(block)(block, *xs)
    if tape.first is None:
        tape.first = index
    previous = tape.previous[0] if block.reruns_before and tape.previous else None
    call = BlockCall(block, trace, tape, index, len(xs), parameters, previous)
    return _Block.apply(call, *xs, *parameters)


# Hides the engine from the compiler. torch.compiler.disable would import it here and now.
_call_block_untraced = torch._disable_dynamo(_call_block)
