"""What a lattice costs and gives: `python -m benchmarks.lattice`, rows in results/lattice.csv.

Gradient errors of the reversible part of RevBiFPN-S0 against float64, and training on handwritten
digits with the same seed, for stored activations, reversible ones and each lattice.
"""

import argparse
import copy
import csv
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from revbifpn_kernels import ReversibleSequential

from .lib import harness, stacks

PATH = Path(__file__).parent / "results" / "lattice.csv"
EXPONENTS = (10, 12, 14, 16, 18, 19, 20)
DIGIT_CHANNELS = (32, 48, 64)
SEEDS = (0, 1)
EPOCHS = 5


class DigitNet(nn.Module):
    """A convolution, the reversible stack, the means of its levels, a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, DIGIT_CHANNELS[0], 3, padding=1)
        self.stack = stacks.backbone(1, DIGIT_CHANNELS)
        self.head = nn.Linear(sum(DIGIT_CHANNELS), 10)

    def forward(self, images: Tensor) -> Tensor:
        ys = self.stack(self.stem(images))
        return self.head(torch.cat([y.mean((2, 3)) for y in ys], dim=1))


def modes() -> dict[str, tuple[bool, float | None]]:
    """Name → (reversible, lattice)."""
    exact = {f"exact 2^-{n}": (True, 2.0**-n) for n in EXPONENTS}
    return {"stored": (False, None), "reversible": (True, None), **exact}


def set_mode(chain: ReversibleSequential, is_reversible: bool, lattice: float | None) -> None:
    chain.reversible, chain.lattice = is_reversible, lattice


def gradient(chain, x: Tensor, cotangents, is_autocast: bool) -> Tensor:
    chain.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        ys = chain(x)
    torch.autograd.backward(ys, [c.to(x.dtype) for c in cotangents])
    return torch.cat([p.grad.flatten().double() for p in chain.parameters()])


def gradient_errors() -> dict[str, dict[str, str]]:
    """Relative to float64 under plain autograd; and to the same lattice with stored activations."""
    torch.manual_seed(0)
    chain = stacks.backbone(2)
    (x, *_) = stacks.streams(2, 128)
    with torch.no_grad():
        ys = chain(x)
    cotangents = [torch.randn_like(y) / y[0].numel() for y in ys]
    truth_chain = copy.deepcopy(chain).double()
    set_mode(truth_chain, False, None)
    truth = gradient(truth_chain, x.double(), cotangents, False)
    rows = {}
    for name, mode in modes().items():
        row = {"largest_stream": f"{max(y.abs().max().item() for y in ys):.3g}"}
        for column, is_autocast in (("fp32", False), ("bf16_autocast", True)):
            net, twin = copy.deepcopy(chain), copy.deepcopy(chain)
            set_mode(net, *mode)
            set_mode(twin, False, mode[1])
            ours, stored = (gradient(n, x, cotangents, is_autocast) for n in (net, twin))
            row[f"error_{column}"] = f"{((ours - truth).norm() / truth.norm()).item():.3g}"
            row[f"to_stored_{column}"] = f"{((ours - stored).norm() / stored.norm()).item():.3g}"
        rows[name] = row
        print(name, row, flush=True)
    return rows


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) and labels: 1,400 to train on, 397 to test."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return images[train], labels[train], images[test], labels[test]


def train(mode: tuple[bool, float | None], seed: int, data) -> tuple[float, float]:
    """The last epoch's mean loss and the test accuracy, in percent."""
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    net = DigitNet()
    set_mode(net.stack, *mode)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, EPOCHS * 22)
    for _ in range(EPOCHS):
        losses = []
        for batch in torch.randperm(len(images)).split(64)[:22]:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    net.eval()
    with torch.no_grad():
        right = (net(test_images).argmax(1) == test_labels).double().mean()
    return sum(losses) / len(losses), 100 * right.item()


def main(arguments: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.lattice", description=__doc__).parse_args(
        arguments
    )
    machine = harness.describe_machine("cpu")
    rows = gradient_errors()
    data = digits()
    for name, mode in modes().items():
        losses, rights = zip(*(train(mode, seed, data) for seed in SEEDS), strict=True)
        rows[name]["digits_loss"] = " ".join(f"{loss:.4f}" for loss in losses)
        rows[name]["digits_accuracy"] = " ".join(f"{right:.2f}" for right in rights)
        print(name, rows[name]["digits_loss"], rows[name]["digits_accuracy"], flush=True)
    with PATH.open("w", newline="") as file:
        table = [{**machine, "mode": name, **row} for name, row in rows.items()]
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print(f"rows: {PATH}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
