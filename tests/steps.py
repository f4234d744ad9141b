"""One training step of a chain, and how the results of two are compared."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def loss_of(ys: Sequence[Tensor]) -> Tensor:
    """Not symmetric, different for each output; its gradients have the outputs' memory format."""
    return sum((k + 1) * (y * (y.detach() + k).cos()).mean() for k, y in enumerate(ys))


def gradients_of(chain: nn.Module, xs: Sequence[Tensor], *, seed: int = 1) -> dict[str, Tensor]:
    """Outputs, gradients of inputs and parameters, and buffers after one training step."""
    torch.manual_seed(seed)
    xs = [x.detach().clone().requires_grad_() for x in xs]
    ys = chain(*xs)
    loss_of(ys).backward()
    results = {f"output {k}": y.detach() for k, y in enumerate(ys)}
    results |= {f"input {k}": x.grad for k, x in enumerate(xs)}
    results |= {name: p.grad for name, p in chain.named_parameters() if p.grad is not None}
    return results | {name: b.clone() for name, b in chain.named_buffers()}


def relative_error(results: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest of all results, each relative to the norm of its exact value."""
    assert results.keys() == exact.keys() and results
    worst = 0.0
    for name, value in results.items():
        if value.is_floating_point():
            truth = exact[name].double()
            error = ((value.double() - truth).norm() / truth.norm().clamp_min(1e-12)).item()
            assert error == error, f"{name} is NaN"
            worst = max(worst, error)
    return worst


def assert_same_bits(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert results.keys() == expected.keys() and results
    for name, value in results.items():
        assert torch.equal(value, expected[name]), f"{name} differs"


def named_gradients(chain) -> dict:
    return {name: p.grad.clone() for name, p in chain.named_parameters() if p.grad is not None}
