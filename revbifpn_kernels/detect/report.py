"""What a run tells: a progress bar, rows of CSV, warnings once each, the last line."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from ..train.checkpoint import write_atomically
from ..train.data import Skipped
from ..train.report import Table, peak_mib
from . import coco
from .evaluate import NAMES, Result
from .run import Run

LOSSES = (*("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"),)
STEP_COLUMNS = ["step", "epoch", "loss", *LOSSES, "lr", "images_per_s", "data_share", "peak_mib"]
MASK_NAMES = tuple("mask_" + name for name in NAMES)
AP_COLUMNS = ["step", "epoch", "seconds", "cpu_seconds", *NAMES, *MASK_NAMES]
SHOWN = 20  # skipped entries on the terminal; the file has all


def shown(value: float) -> str:
    return "–" if value != value else f"{value:.2f}"


class Report:
    """Everything that a run says. A full disk costs rows, not the run."""

    def __init__(self, run: Run, out: Path) -> None:
        self.run, self.out = run, out
        self.skipped: dict[Skipped, None] = {}
        self.waited = self.stepped = 0.0  # seconds, since this process began
        self.has_failed = False
        self.bar = tqdm(
            total=run.steps,
            initial=run.step,
            unit="step",
            disable=None if run.options.progress else True,
            dynamic_ncols=True,
        )
        self.steps = Table(out / "steps.csv", STEP_COLUMNS, run.step)
        self.precisions = Table(out / "precision.csv", AP_COLUMNS, run.step)

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def warn(self, text: str) -> None:
        tqdm.write(f"detect: {text}", file=sys.stderr)

    @property
    def _epoch(self) -> str:
        return f"{self.run.step / self.run.order.steps_per_epoch:.3f}"

    def log(
        self, steps: int, losses: dict[str, float], lr: float, seconds: float, waited: float
    ) -> None:
        """The mean of some steps, which took so many seconds, waiting for images among them."""
        self.waited, self.stepped = self.waited + waited, self.stepped + seconds
        row = {
            "step": self.run.step,
            "epoch": self._epoch,
            "loss": f"{sum(losses.values()):.6g}",
            "lr": f"{lr:.6g}",
            "images_per_s": f"{steps * self.run.options.batch_size / seconds:.1f}",
            "data_share": f"{waited / seconds:.4f}",
            "peak_mib": f"{peak_mib(self.run.device):.0f}",
        }
        row |= {name: f"{value:.6g}" for name, value in losses.items()}
        self.bar.update(steps)
        self.bar.set_postfix_str(
            f"{row['images_per_s']} images/s, loss {row['loss']}, peak {row['peak_mib']} MiB"
        )
        self.write(lambda: self.steps.add(row))

    def score(self, result: Result) -> None:
        run = self.run
        self.skip(result.skipped)
        times = {"seconds": f"{run.seconds:.1f}", "cpu_seconds": f"{run.cpu_seconds:.1f}"}
        row = {"step": run.step, "epoch": self._epoch} | times
        row |= {name: f"{value:.4f}" for name, value in result.precisions.items()}
        self.write(lambda: self.precisions.add(row))
        self.say(
            f"epoch {float(self._epoch):.1f}: "
            + ", ".join(f"{name} {shown(value)}" for name, value in result.precisions.items())
            + f", {run.seconds:.0f} s"
        )

    def skip(self, found: Iterable[Skipped]) -> None:
        """Name each entry that was left out or changed, once."""
        for entry in found:
            if entry in self.skipped:
                continue
            self.skipped[entry] = None
            if len(self.skipped) <= SHOWN:
                self.warn(f"skipped {': '.join(entry)}")
            elif len(self.skipped) == SHOWN + 1:
                self.warn("skipped more; skipped.txt will name them")

    def finish(self, result: Result) -> None:
        """The skipped entries, and the last line."""
        run, precision = self.run, result.precisions
        self.bar.close()
        if self.skipped:
            skipped = list(self.skipped)
            self.warn(f"{len(skipped)} skipped, see skipped.txt: {coco.summary(skipped)}")
            lines = "".join(f"{name}: {reason}\n" for name, reason in skipped)
            self.write(lambda: write_atomically(self.out / "skipped.txt", lines.encode()))
        if self.stepped:
            share = 100 * self.waited / self.stepped
            self.say(f"waiting for images took {share:.1f} % of the steps")
        self.say(
            f"{run.cpu_seconds:.0f} s of CPU time, peak memory {peak_mib(run.device):.0f} MiB; "
            f"all files in {self.out}"
        )
        masks = ""
        if "mask_AP" in precision:
            masks = (
                f", masks AP50 {shown(precision['mask_AP50'])}, AP {shown(precision['mask_AP'])}"
            )
        self.say(
            f"AP50 {shown(precision['AP50'])}, AP {shown(precision['AP'])}{masks} in "
            f"{run.seconds:.0f} s"
        )

    def write(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            if not self.has_failed:
                self.warn(f"a report could not be written, training goes on: {error}")
            self.has_failed = True
