"""A whole training step as one CUDA graph, which the host launches by one call.

Launching the kernels of a step one by one takes the host longer than a fast GPU takes to run them.
The replay of a graph also spares the Python of a step.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_map

from .reversible import Reversible
from .reversible.recompute import group_of

WARM_UPS = 3  # steps before the capture: they compile kernels and allocate what libraries keep
# Optimizers whose update can be in a graph: it needs nothing from the host (with `capturable`, if
# they have that setting), and their state starts as zeros, so that a warm-up can be undone.
CAPTURABLE = (
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax),
    *(torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Adadelta),
)


class TrainingStep:
    """One step of training, as a CUDA graph if that is possible: see `capture_step`.

    Attributes:
        obstacle: Why the step runs without a graph; None if it is a graph.
        updates_in_graph: Whether the graph contains the optimizer's update; if not, the update
            follows each launch of the graph.
        grad_norm: The norm of all gradients of the last step before clipping; None without
            `max_norm`.
    """

    def __init__(self, model, loss, optimizer, example, autocast, max_norm, scaler) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.autocast, self.max_norm, self.scaler = autocast, max_norm, scaler
        self.grad_norm: Tensor | None = None
        self.updates_in_graph = scaler is None and _is_capturable(optimizer)
        self.obstacle = obstacle_of(model)
        if self.obstacle is None:
            self._capture(example)
        if self.obstacle is not None:
            self.updates_in_graph = False
            warnings.warn(
                f"capture_step: {self.obstacle}; the step runs without a CUDA graph", stacklevel=3
            )

    def __call__(self, *batch: Tensor) -> Tensor:
        """Make one step on (inputs, *targets); return the loss, a detached scalar.

        A batch whose shapes or dtypes differ from the example's runs without the graph.

        Raises:
            RuntimeError: Model or optimizer has changed since the capture: see `capture_step`.
        """
        if self.obstacle is not None or not self._fits(batch):
            loss = self._compute_gradients(batch)
            self._update()
            return loss
        self._check()
        for parameter, grad in self._grads:
            parameter.grad = grad  # a step without the graph leaves others
        if self.updates_in_graph:
            self._follow_learning_rate()
        torch._foreach_copy_(self._tensors, tree_flatten(batch)[0], non_blocking=True)
        self._replay()
        if not self.updates_in_graph:
            self._update()
        if self.scaler is None and self.max_norm is not None:
            self.grad_norm = self._norm.clone()
        return self._loss.clone()  # the next replay overwrites it, as it does the norm

    def _fits(self, batch: tuple) -> bool:
        tensors, structure = tree_flatten(batch)
        return structure == self._structure and all(
            given.shape == captured.shape and given.dtype == captured.dtype
            for given, captured in zip(tensors, self._tensors, strict=True)
        )

    def _compute_gradients(self, batch: tuple) -> Tensor:
        """Forward and backward; return the loss. Clips, unless gradients are scaled."""
        self.optimizer.zero_grad(set_to_none=True)
        device = next(self.model.parameters()).device
        inputs, *targets = tree_map(lambda t: t.to(device, non_blocking=True), batch)
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            loss = self.loss(self.model(inputs), *targets)
        if self.scaler is None:
            loss.backward()
            self._clip()
        else:
            self.scaler.scale(loss).backward()
        return loss.detach()

    def _clip(self) -> None:
        if self.max_norm is not None:
            trained = [p for p in self.model.parameters() if p.grad is not None]
            self.grad_norm = torch.nn.utils.clip_grad_norm_(trained, self.max_norm)

    def _update(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
            return
        self.scaler.unscale_(self.optimizer)
        self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _capture(self, example: tuple) -> None:
        device = next(self.model.parameters()).device
        batch = tree_map(lambda t: t.to(device, copy=True), example)
        self._tensors, self._structure = tree_flatten(batch)

        def step() -> None:
            self._loss = self._compute_gradients(batch)
            self._norm = self.grad_norm
            if self.updates_in_graph:
                self.optimizer.step()

        with contextlib.ExitStack() as unless_captured:
            unless_captured.callback(_undo_of(self.optimizer))
            if self.updates_in_graph:
                _make_capturable(self.optimizer)
            with _put_back(self.model, self.optimizer), _on_side_stream(device):
                self._compute_gradients(batch)  # outside of `try`: raises what model or loss raise
                try:
                    self._replay = captured(step)
                    unless_captured.pop_all()
                except RuntimeError as error:  # the host waits for the device, or draws randomly
                    self.obstacle = f"the step cannot be captured: {error}"
        self._grads = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        self._parameters = [*self.model.parameters()]
        self._identities = _identities_of(self._parameters)
        self._state = _state_of(self.optimizer)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._settings = [_settings_of(group) for group in self.optimizer.param_groups]

    def _check(self) -> None:
        """Raise an error if the graph has tensors or settings that are no longer in use."""
        changed = set()
        if _identities_of(self._parameters) != self._identities:
            changed.add("the model's parameters")
        if self.updates_in_graph:
            if [*map(id, _state_of(self.optimizer))] != [*map(id, self._state)]:
                changed.add("the optimizer's state")
            settings = [_settings_of(group) for group in self.optimizer.param_groups]
            if len(settings) != len(self._settings):
                changed.add("param_groups")
            for now, then in zip(settings, self._settings, strict=False):
                changed |= {k for k in now.keys() | then if now.get(k) != then.get(k)}
        if changed:
            raise RuntimeError(
                "capture_step: expected model and optimizer as they were captured, except for lr, "
                f"got changes of {', '.join(sorted(changed))}: capture again"
            )

    def _follow_learning_rate(self) -> None:
        """Write learning rates that a scheduler has set to where the graph reads them."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate


def capture_step(
    model: nn.Module,
    loss: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    example: tuple,
    *,
    autocast: torch.dtype | None = None,
    max_norm: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> TrainingStep:
    """Return a training step, captured as a CUDA graph, to be called with each batch.

        step = capture_step(model, F.cross_entropy, optimizer, (images, labels))
        for images, labels in loader:
            loss = step(images, labels)

    A step is forward, backward, clipping and the optimizer's update. A few steps are made on the
    example to warm up; weights, buffers and the optimizer's state are as before afterwards. Each
    call copies its batch to where the graph reads it. The update is part of the graph for SGD,
    Adam, AdamW, Adamax, RAdam, RMSprop and Adadelta of torch.optim, and follows it, launched as
    usual, for other optimizers and with a `scaler`.

    A scheduler may change learning rates: they are tensors on the GPU, and so are they in the
    optimizer's `state_dict`. A call raises RuntimeError after any other change: if parameters were
    moved, frozen or unfrozen, or, where the update is in the graph, if the optimizer's settings or
    groups have changed or a state was loaded into it. Then capture again.

    Where the step cannot be a graph, one warning says why, and calls run it as usual: without a
    GPU, under DDP, FSDP or DataParallel, with synchronised batch norm over several processes, with
    a dropout layer of torch.nn inside a reversible block, or if anything waits for the GPU. The
    optimizer is then unchanged. Errors that the step would also raise without a graph are raised.

    Args:
        model: Called with the inputs. The graph keeps the train or eval mode that it has now.
        loss: Called with the model's outputs and the targets; returns a scalar.
        optimizer: Of the model's parameters.
        example: (inputs, *targets), tensors or nested tuples, lists and dicts of them, of the
            shapes and dtypes of all batches.
        autocast: The dtype of autocast for model and loss; None without it.
        max_norm: Gradients are clipped to this norm; with infinity it is only measured.
        scaler: For float16.

    Raises:
        TypeError, ValueError: `example` or `max_norm` is not as described.
    """
    if not isinstance(example, (tuple, list)) or not example:
        raise TypeError(
            f"capture_step: example must be (inputs, *targets), got {type(example).__name__}"
        )
    for leaf in tree_flatten(example)[0]:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"capture_step: example must contain tensors only, got {type(leaf).__name__}"
            )
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"capture_step: max_norm must be positive, got {max_norm}")
    return TrainingStep(model, loss, optimizer, tuple(example), autocast, max_norm, scaler)


def obstacle_of(model: nn.Module) -> str | None:
    """Why a training step of `model` cannot be a CUDA graph; None if no reason is known."""
    devices = {p.device.type for p in model.parameters()}
    if devices != {"cuda"}:
        found = ", ".join(sorted(devices)) or "no device"
        return f"the model must be on a GPU, got parameters on {found}"
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it takes a second
    from_host = DistributedDataParallel, DataParallel, *([fsdp.FSDPModule] if fsdp else ())
    for name, module in model.named_modules():
        where = f" ({name})" if name else ""
        if isinstance(module, from_host) or group_of(module) is not None:
            return f"{type(module).__name__}{where} communicates from the host"
        if isinstance(module, Reversible):
            for inner, layer in module.named_modules():
                if isinstance(layer, _DropoutNd) and layer.training and layer.p > 0:
                    path = ".".join(filter(None, (name, inner)))
                    return (
                        f"{type(layer).__name__} ({path}) is inside a reversible block, whose "
                        "recompute needs the state of the random generator"
                    )
    return None


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Warm up, capture `step` as a CUDA graph, on the current stream; return what replays it."""
    for _ in range(WARM_UPS):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()
    return graph.replay


@contextlib.contextmanager
def _on_side_stream(device: torch.device) -> Iterator[None]:
    """Run the `with` on a stream of its own, because the default one cannot be captured.

    Random generators are put back.
    """
    home, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(home)
    try:
        with torch.random.fork_rng(devices=[device.index]), torch.cuda.stream(side):
            yield
    finally:
        home.wait_stream(side)


def _is_capturable(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer) in CAPTURABLE and not any(
        group.get("dampening") or group.get("differentiable") for group in optimizer.param_groups
    )


def _make_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Move what the host would read or change at each update to the device."""
    for group in optimizer.param_groups:
        # The only ways in which no optimizer reads the learning rate on the host.
        if "capturable" in group:
            group["capturable"] = group["foreach"] = True
            group["fused"] = False
        else:
            group["fused"], group["foreach"] = True, False
        device = group["params"][0].device
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(device, copy=True)
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(parameter.device)


def _undo_of(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return a function that restores an optimizer's settings and state, and clears gradients."""
    groups = [dict(group) for group in optimizer.param_groups]
    state = {parameter: dict(entries) for parameter, entries in optimizer.state.items()}

    def undo() -> None:
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)
        optimizer.state.clear()
        optimizer.state.update(state)
        optimizer.zero_grad(set_to_none=True)

    return undo


def _identities_of(parameters: list[nn.Parameter]) -> list[tuple[int, bool]]:
    """Each parameter's address and whether it is trained, which the graph depends on."""
    return [(p.data_ptr(), p.requires_grad) for p in parameters]


def _settings_of(group: dict) -> dict:
    """A group's settings that the graph contains as constants."""
    settings = {k: v for k, v in group.items() if k not in ("lr", "initial_lr")}
    return settings | {"params": [*map(id, group["params"])]}


@contextlib.contextmanager
def _put_back(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Afterwards give weights, buffers and the optimizer's state their values; new state is 0."""
    tensors = [*model.parameters(), *model.buffers(), *_state_of(optimizer)]
    before = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        known = set(map(id, tensors))
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
            for tensor in _state_of(optimizer):
                if id(tensor) not in known:
                    tensor.zero_()


def _state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    entries = (entry for state in optimizer.state.values() for entry in state.values())
    return [entry for entry in entries if isinstance(entry, Tensor)]
