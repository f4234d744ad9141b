"""What exact mode costs and gives: gradient errors, and accuracy of training on handwritten digits.

Gradients of the reversible part of RevBiFPN-S0 against float64, for stored activations, reversible
ones and several lattices; then `python -m revbifpn_kernels.train` in four modes of one seed.
"""

import argparse
import copy
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from revbifpn_kernels import ReversibleSequential, create_model

from .lib import record, tables
from .lib.record import Row

EXPONENTS = (10, 12, 14, 16, 18, 19, 20)
BATCH, SIDE = 2, 128
LATTICE_12 = ("--lattice", "2^-12")
TRAININGS = {  # mode → options of the command
    "reversible": (),
    "stored": ("--no-reversible",),
    "exact 2^-12": LATTICE_12,
    "exact 2^-12, stored": (*LATTICE_12, "--no-reversible"),
}
PARTS = ("gradients", "digits")
MODES = {"stored": (False, None), "reversible": (True, None)}  # reversible, lattice
MODES |= {f"exact 2^-{n}": (True, 2.0**-n) for n in EXPONENTS}


def gradient(chain: ReversibleSequential, mode, x: Tensor, cotangents, is_autocast: bool) -> Tensor:
    """Of a copy of the chain in that mode, all parameters in one float64 vector."""
    chain = copy.deepcopy(chain)
    chain.reversible, chain.lattice = mode
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        ys = chain(x)
    torch.autograd.backward(ys, [c.to(x.dtype) for c in cotangents])
    return torch.cat([p.grad.flatten().double() for p in chain.parameters()])


def gradient_rows(side: int) -> list[Row]:
    """Relative to float64 under plain autograd; and to the same lattice with stored activations."""
    torch.manual_seed(0)
    chain: nn.Module = create_model("revbifpn_s0", drop_path_rate=0.0).body
    x = torch.randn(BATCH, 48, side // 4, side // 4)
    with torch.no_grad():
        ys = chain(x)
    largest = max(y.abs().max().item() for y in ys)
    cotangents = [torch.randn_like(y) / y[0].numel() for y in ys]
    truth = gradient(chain.double(), (False, None), x.double(), cotangents, False)
    chain.float()
    rows = []
    for name, mode in MODES.items():
        row = {"op": "revbifpn_s0", "provider": name, "mode": "gradient", "dtype": "fp32"}
        row |= {"shape": f"{BATCH}x3x{side}x{side}", "largest_stream": f"{largest:.3g}"}
        row |= {"lattice": "" if mode[1] is None else f"{mode[1]:.9g}"}
        for column, is_autocast in (("fp32", False), ("bf16", True)):
            ours, stored = (
                gradient(chain, twin, x, cotangents, is_autocast)
                for twin in (mode, (False, mode[1]))
            )
            row[f"error_{column}"] = f"{((ours - truth).norm() / truth.norm()).item():.3g}"
            row[f"to_stored_{column}"] = f"{((ours - stored).norm() / stored.norm()).item():.3g}"
        rows.append(row)
    return rows


def train(mode: str, is_quick: bool) -> Row:
    """Run the command; its accuracy and time, and the processor seconds of its processes."""
    command = [sys.executable, "-m", "revbifpn_kernels.train", *TRAININGS[mode], "--no-progress"]
    command += ["--no-tensorboard", *(("--epochs", "1") if is_quick else ())]
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--out", out], cwd=record.ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{text}")
        steps = record.read_rows(Path(out) / "steps.csv")
        waited = [float(row["data_share"]) for row in steps]
        epochs = len(record.read_rows(Path(out) / "epochs.csv"))
    right, count = re.findall(r"(\d+) of (\d+) test images right", text)[-1]
    accuracy, seconds = re.findall(r"test accuracy ([\d.]+) % in ([\d.]+) s", text)[-1]
    row = {"op": "digits", "provider": mode, "mode": "training", "dtype": "fp32"}
    row |= {"epochs": str(epochs), "right": right, "images": count, "accuracy": accuracy}
    row |= {"seconds": seconds, "cpu_seconds": f"{usage.ru_utime + usage.ru_stime:.0f}"}
    return row | {"waiting_share": f"{sum(waited) / max(len(waited), 1):.4f}"}


def trainings(run: argparse.Namespace) -> list[Row]:
    """A run has one thread, so as many go at a time as there are cores."""
    chosen = list(TRAININGS)[: 2 if run.quick else None]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda mode: train(mode, run.quick), chosen))


def main(arguments: list[str]) -> int:
    parser = record.parser("bench_precision", __doc__, on_gpu=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    run = record.parse(parser, arguments)
    rows = record.recorder(run, "precision", "cpu")
    if "gradients" in run.parts:
        rows.add(gradient_rows(64 if run.quick else SIDE))
    if "digits" in run.parts:
        rows.add(trainings(run))
    return rows.finish(tables.precision_table(rows.rows) + "\n" + tables.digits_table(rows.rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
