"""Autocast: forward and recompute of a transform cast alike, and streams stay float32."""

import contextlib

import pytest
import torch
from chains import blocks, exact_pair, growing, plain, silos, streams
from steps import assert_same_bits, loss_of, named_gradients


@pytest.mark.parametrize("kind", [silos, growing, blocks])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_with_grad_scaler(kind, dtype):
    results = []
    for net in exact_pair(kind):
        torch.manual_seed(3)
        xs = [x.requires_grad_() for x in streams(kind)]
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(2):
            torch.manual_seed(step)
            with torch.autocast("cpu", dtype=dtype):
                ys = net(*xs)
                loss = loss_of(ys)
            assert all(y.dtype == torch.float32 for y in ys)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        grads = {f"grad {name}": grad for name, grad in named_gradients(net).items()}
        results.append(grads | dict(net.named_parameters()))
    assert_same_bits(results[0], results[1])


def test_backward_inside_autocast_after_a_step():
    """The cache of casts must not outlive the weights it was made from, as PyTorch's own does."""
    results = []
    for net, outer in zip(exact_pair(silos, make=plain), (True, False), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        torch.manual_seed(3)
        xs = streams(silos)
        region = torch.autocast("cpu", dtype=torch.bfloat16) if outer else contextlib.nullcontext()
        with region:
            for _ in range(3):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = loss_of(net(*xs))
                loss.backward()
                optimizer.step()
        results.append(named_gradients(net))
    assert_same_bits(*results)


def test_half_precision_streams_under_autocast_become_float32():
    chain = silos(1, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = chain(*streams(silos, dtype=torch.bfloat16))
    assert {y.dtype for y in ys} == {torch.float32}
