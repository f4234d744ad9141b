"""What a run tells: a progress bar, rows of CSV, warnings once each, the last line."""

from pathlib import Path

from ..classify.data import Skipped
from ..classify.report import Table, peak_mib
from ..run.console import SKIPPED, Console
from . import coco
from .evaluate import NAMES, Result
from .run import Run

LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
STEP_COLUMNS = ["step", "epoch", "loss", *LOSSES, "lr", "images_per_s", "data_share", "peak_mib"]
MASK_NAMES = tuple("mask_" + name for name in NAMES)
AP_COLUMNS = ["step", "epoch", "seconds", "cpu_seconds", *NAMES, *MASK_NAMES]


def shown(value: float) -> str:
    return "–" if value != value else f"{value:.2f}"


class Report(Console):
    """Everything that a run says."""

    command = "detect"

    def __init__(self, run: Run, out: Path) -> None:
        super().__init__(run, out)
        self.steps = Table(out / "steps.csv", STEP_COLUMNS)
        self.precisions = Table(out / "precision.csv", AP_COLUMNS)
        for table in (self.steps, self.precisions):
            self.write(lambda table=table: table.begin(run.step))

    def told(self, entry: Skipped) -> str:
        is_used = coco.is_used(entry[1])
        return f"changed {': '.join(entry)}" if is_used else super().told(entry)

    @property
    def has_score(self) -> bool:
        """Whether this step has been measured already, perhaps before the run was resumed."""
        return any(int(row["step"]) == self.run.step for row in self.precisions.rows())

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
        self.write(lambda: self._set_score(row))
        self.say(
            f"epoch {float(self._epoch):.1f}: "
            + ", ".join(f"{name} {shown(value)}" for name, value in result.precisions.items())
            + f", {run.seconds:.0f} s"
        )

    def _set_score(self, row: dict) -> None:
        self.precisions.begin(self.run.step - 1)  # a step that is measured again has one row
        self.precisions.add(row)

    def tell_skipped(self) -> None:
        if self.skipped:
            entries = self.skipped.values()
            used = sum(coco.is_used(reason) for _, reason in entries)
            counts = [(len(entries) - used, "skipped"), (used, "changed")]
            shown = ", ".join(f"{count} {what}" for count, what in counts if count)
            self.warn(f"{shown}, see {SKIPPED}: {coco.summary(entries)}")

    def finish(self, result: Result) -> None:
        """The skipped entries, and the last line."""
        run, precision = self.run, result.precisions
        self.bar.close()
        self.tell_skipped()
        self.tell_waiting()
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
