"""What a detector's run reports: precision.csv, skipped and changed objects, the last line."""

from pathlib import Path

from ..run.console import SKIPPED, Console
from ..run.samples import Skipped
from ..run.tables import Table, peak_mib
from . import coco
from .evaluate import NAMES, Result
from .state import DetectorState

LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
MASK_NAMES = tuple("mask_" + name for name in NAMES)
AP_COLUMNS = ["step", "epoch", "seconds", "cpu_seconds", *NAMES, *MASK_NAMES]


def shown(value: float) -> str:
    return "–" if value != value else f"{value:.2f}"


class Report(Console):
    """The report of a detector's run."""

    command = "detect"
    step_columns = ["step", "epoch", "loss", *LOSSES, "lr", "images_per_s", "data_share"]
    step_columns += ["peak_mib"]

    def __init__(self, run: DetectorState, out: Path) -> None:
        super().__init__(run, out)
        self.precisions = Table(out / "precision.csv", AP_COLUMNS)
        self.write(self.precisions.begin, run.step)

    def message_of(self, entry: Skipped) -> str:
        is_used = coco.is_used(entry[1])
        return f"changed {': '.join(entry)}" if is_used else super().message_of(entry)

    @property
    def has_score(self) -> bool:
        """Whether this step has been measured already, perhaps before the run was resumed."""
        return any(int(row["step"]) == self.run.step for row in self.precisions.rows())

    def columns_of(self, means: dict[str, float]) -> dict[str, str]:
        losses = {name: value for name, value in means.items() if name != "gradient"}
        texts = {name: f"{value:.6g}" for name, value in losses.items()}
        return {"loss": f"{sum(losses.values()):.6g}"} | texts

    def score(self, result: Result) -> None:
        run = self.run
        self.skip(result.skipped)
        times = {"seconds": f"{run.seconds:.1f}", "cpu_seconds": f"{run.cpu_seconds:.1f}"}
        row = {"step": run.step, "epoch": f"{run.epoch:.3f}"} | times
        row |= {name: f"{value:.4f}" for name, value in result.precisions.items()}
        self.write(self._set_score, row)
        self.say(
            f"epoch {run.epoch:.1f}: "
            + ", ".join(f"{name} {shown(value)}" for name, value in result.precisions.items())
            + f", {run.seconds:.0f} s"
        )

    def _set_score(self, row: dict) -> None:
        self.precisions.begin(self.run.step - 1)  # a step that is measured again has one row
        self.precisions.add(row)

    def tell_skipped(self) -> None:
        if self.skipped:
            used = sum(coco.is_used(reason) for _, reason in self.skipped.values())
            counts = [(len(self.skipped) - used, "skipped"), (used, "changed")]
            listed = ", ".join(f"{count} {what}" for count, what in counts if count)
            self.warn(f"{listed}, see {SKIPPED}: {coco.summary(self.skipped.values())}")

    def finish(self, result: Result) -> None:
        """The skipped entries, and the last line."""
        run = self.run
        self.bar.close()
        self.tell_end()
        self.say(
            f"{run.cpu_seconds:.0f} s of CPU time, peak memory {peak_mib(run.world.device):.0f} "
            f"MiB; all files in {self.out}"
        )
        texts = {name: shown(value) for name, value in result.precisions.items()}
        masks = ""
        if "mask_AP" in texts:
            masks = f", masks AP50 {texts['mask_AP50']}, AP {texts['mask_AP']}"
        self.say(f"AP50 {texts['AP50']}, AP {texts['AP']}{masks} in {run.seconds:.0f} s")
