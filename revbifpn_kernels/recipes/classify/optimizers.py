"""timm's optimizers, if they can continue from a checkpoint; the learning rate's schedule."""

import copy
import dataclasses

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.distributed.checkpoint import state_dict as states

from ..run.checkpoint import WHOLE
from ..run.errors import RunError
from .options import Options

PROBED_LR = 1e-3
PROBED_STEPS = 3, 8  # before and after a checkpoint: Lookahead's period of 6 begins before


def optimizer_of(options: Options, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer by name; raises RunError if timm has none."""
    try:
        return create_optimizer_v2(
            model, opt=options.opt, lr=options.lr, weight_decay=options.weight_decay
        )
    except (AssertionError, ValueError, RuntimeError, ImportError) as error:
        raise RunError(f"--opt must be an optimizer of timm's: {error}") from error


def refuse_forgetful(options: Options) -> None:
    """Raises for an optimizer whose state a checkpoint does not contain completely.

    Tried on a network of three layers, before processes join: its states belong to one process.
    """
    options = dataclasses.replace(options, lr=PROBED_LR)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 8))
        before, after = (torch.randn(steps, 4, 3, 3, 3) for steps in PROBED_STEPS)
    stopped = copy.deepcopy(model)
    whole = optimizer_of(options, model)
    first, again = (optimizer_of(options, stopped) for _ in range(2))
    try:
        _steps(model, whole, before, PROBED_LR)
        _steps(model, whole, after, PROBED_LR / 2)
        _steps(stopped, first, before, PROBED_LR)
        # Copied: reading the state changes it, where an optimizer keeps it elsewhere.
        state = copy.deepcopy(states.get_optimizer_state_dict(stopped, first, options=WHOLE))
        states.set_optimizer_state_dict(stopped, again, state, options=WHOLE)
        _steps(stopped, again, after, PROBED_LR / 2)
    except Exception as error:  # optimizers raise all kinds
        reason = f"{options.opt} fails: {type(error).__name__}: {error}"
    else:
        pairs = zip(model.parameters(), stopped.parameters(), strict=True)
        reason = "" if all(torch.equal(a, b) for a, b in pairs) else f"{options.opt} differs"
    if reason:
        raise RunError(
            "--opt must go on from a checkpoint as if it had not stopped, and on gradients alone; "
            f"{reason}"
        )


def _steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: torch.Tensor, lr: float
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    for batch in batches:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def schedule_of(options: Options, optimizer, steps_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up, then a cosine; the learning rate is a function of the step."""
    warmup = round(options.warmup_epochs * steps_per_epoch)
    # timm warns of a single step, and a run of none needs a schedule too.
    steps = max(2, options.epochs * steps_per_epoch - warmup)
    return CosineLRScheduler(
        optimizer,
        t_initial=steps,
        lr_min=min(options.min_lr, options.lr),
        warmup_t=warmup,
        warmup_lr_init=min(options.min_lr, options.lr),
        warmup_prefix=True,
        t_in_epochs=False,
    )
