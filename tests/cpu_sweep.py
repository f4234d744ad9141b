"""Runs every CPU op on small and odd inputs, and prints one hash of all that it computes.

Three judges use it: test_isa.py compares the hashes of the instruction sets, `make test-arm` those
of x86-64 and Arm64, and `make test-asan` runs it in a build whose memory accesses and arithmetic
the compiler's sanitizers check.
"""

import hashlib
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import revbifpn_kernels  # noqa: F401, registers the ops

ops = torch.ops.revbifpn
DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
ACTS = "identity", "relu", "hardswish", "silu"


def channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def channel_slice(maps: Tensor) -> Tensor:
    return torch.cat([maps, maps], 1)[:, : maps.shape[1]]


LAYOUTS = (
    lambda maps: maps,
    channels_last,
    channel_slice,
    lambda maps: channel_slice(channels_last(maps)),
    lambda maps: maps.repeat_interleave(3, 3)[..., ::3],
    lambda maps: maps.mT.contiguous().mT,
    lambda maps: channels_last(maps.mT).mT,
)

# The shape of x and the sides of its sources: every kind of resampling, rows of one strip and of
# two, channels that fill no vector, and maps large enough for more than one thread.
RESAMPLED = (
    ((2, 3, 7, 9), ((3, 4), (5, 2))),
    ((2, 3, 1, 1), ((4, 6), (1, 1))),
    ((1, 2, 16, 64), ((8, 32), (4, 16), (2, 8))),
    ((2, 19, 8, 12), ((4, 6), (2, 3), (16, 24), (8, 12))),
    ((1, 3, 8, 16), ((8, 16), (4, 8), (2, 4), (1, 2), (16, 32), (3, 5), (8, 8), (1, 16))),
    ((1, 2, 40, 1100), ((20, 550), (5, 137))),
    ((1, 48, 40, 40), ((20, 20), (10, 10), (5, 5))),
    ((1, 64, 1, 241), ((1, 241),)),
    ((2, 5, 9, 130), ((9, 130), (9, 130))),
    ((1, 2, 8, 8), ((4, 1), (2, 1), (1, 1))),
    ((0, 3, 8, 12), ((4, 6),)),
)
NORMED = (
    (2, 17, 7, 9),
    (4, 64, 1, 1),
    (3, 20, 11, 1),
    (2, 2, 24, 50),
    (2, 48, 40, 40),
    (33, 16, 1, 2),
    (2, 1, 5, 7),
    (0, 3, 4, 5),
)
SQUEEZED = (1, 16, 4), (2, 17, 5), (7, 33, 100), (40, 64, 16), (3, 1, 1), (0, 8, 2)  # N, C, hidden
CONVOLVED = (2, 17, 9, 7), (1, 48, 30, 30), (3, 3, 5, 6), (0, 4, 5, 5)
KERNELS = (1, 1), (2, 1), (3, 1), (3, 2), (5, 1), (5, 2), (7, 3), (9, 2)  # side, stride


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random numbers that are the same on x86-64 and Arm64.

    Only the latter rounds float64 to float16 in one step.
    """
    return torch.randn(shape, dtype=torch.float64).to(sums_dtype(dtype)).to(dtype)


def resampled() -> Iterator:
    for i, ((shape, sizes), (j, dtype)) in enumerate(product(RESAMPLED, enumerate(DTYPES))):
        lay = LAYOUTS[(i + j) % len(LAYOUTS)]
        halves = (dtype, torch.bfloat16, torch.float16) if dtype == torch.float32 else (dtype,)
        sources = [
            lay(random(*shape[:2], *size, dtype=halves[k % len(halves)]))
            for k, size in enumerate(sizes)
        ]
        x, grad = (lay(random(*shape, dtype=dtype)) for _ in range(2))
        scales, shifts = (
            [random(*shape[:2], dtype=sums_dtype(dtype)) for _ in sources] for _ in range(2)
        )
        for mode, lattice in (("bilinear", None), ("nearest", 0.125)):
            yield ops.resample_add(x, sources, [], [], 0.7, mode, lattice)
            yield ops.resample_undo(x, grad, sources, scales, shifts, 0.7, mode, lattice)
            y, out = lay(x.clone()), torch.zeros_like(x)
            ops.resample_add_(y, sources, scales, shifts, -1.3, mode, lattice)
            ops.resample_add_out(x, sources, [], [], out, 1.0, mode, lattice)
            yield y, out
            sides = [side for size in sizes for side in size]
            yield ops.resample_adjoint(grad, sides, 0.7, mode, dtype)


def normed() -> Iterator:
    for i, (shape, (j, dtype)) in enumerate(product(NORMED, enumerate(DTYPES))):
        lay, act, sums = LAYOUTS[(i + j) % len(LAYOUTS)], ACTS[i % len(ACTS)], sums_dtype(dtype)
        x, grad = (lay(random(*shape, dtype=dtype)) for _ in range(2))
        running = [torch.ones(shape[1], dtype=sums) for _ in range(2)]
        statistics = ops.batch_statistics(x, 1e-3, *running, torch.tensor(0), 0.1)
        yield statistics, running
        factors = [random(shape[1], dtype=sums) for _ in range(2)]
        gate, grad_means = (random(*shape[:2], dtype=sums) for _ in range(2))
        yield ops.norm_factors(*statistics, *factors, random(shape[0], dtype=sums), shape[0])
        yield ops.batch_norm_factors(x, *factors, 1e-3, None, None, None, 0.1)
        for norm in ((x, *statistics, *factors), (x, *statistics, None, None)):
            yield ops.norm_act(*norm, gate, act)
            yield ops.norm_act_means(*norm, act)
            yield ops.norm_act_grad(grad, *norm, None, None, None, act, False)
            yield ops.norm_act_grad(grad, *norm, gate, grad_means, None, act, True)
            yield ops.norm_act_input_grad(grad, *norm, gate, grad_means, *statistics, act)
            network = gate, *network_of(shape[1], 5, sums)
            yield ops.norm_act_excite_grad(grad, *norm, gate, *network, act, "silu", True)
            yield ops.norm_act_gates(*norm, *network[1:], act, "silu")


def network_of(channels: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = (hidden, channels, 1, 1), (hidden,), (channels, hidden, 1, 1), (channels,)
    return [random(*shape, dtype=dtype) for shape in shapes]


def squeezed() -> Iterator:
    for (images, channels, hidden), dtype, act in product(SQUEEZED, DTYPES[:2], ACTS):
        means, grad = (random(images, channels, dtype=dtype) for _ in range(2))
        network = means, *network_of(channels, hidden, dtype), act
        yield ops.squeeze_excite_gates(*network)
        yield ops.squeeze_excite_gates_backward(grad, *network)


def convolved() -> Iterator:
    for (N, C, H, W), (side, stride), dtype in product(CONVOLVED, KERNELS, DTYPES):
        padding = side // 2
        sides = [(size + 2 * padding - side) // stride + 1 for size in (H, W)]
        x = channels_last(random(N, C, H, W, dtype=dtype))
        grad = channels_last(random(N, C, *sides, dtype=dtype))
        weight = random(C, 1, side, side, dtype=dtype)
        yield ops.depthwise_weight_grad(x, grad, side, stride, padding)
        yield ops.depthwise_input_grad(grad, weight, H, W, stride, padding)
        weight = random(9, C, 1, 1, dtype=dtype)
        # Only run: the products are PyTorch's, in bits that are its own affair.
        ops.pointwise_conv_backward(ops.pointwise_conv(x, weight), x, weight)


def main() -> None:
    digest = hashlib.sha256()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        for results in (resampled(), normed(), squeezed(), convolved()):
            for tensor in tree_leaves(list(results)):
                # The sign of 0 / 0, the mean of no values, is the processor's own affair.
                values = tensor.masked_fill(tensor.isnan(), torch.nan).contiguous().flatten()
                digest.update(values.view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest())


if __name__ == "__main__":
    main()
