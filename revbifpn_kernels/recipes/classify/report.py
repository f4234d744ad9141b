"""What a run tells: a progress bar, rows of CSV, TensorBoard's events, a picture, the last line.

Only the first rank tells. A full disk costs rows, not the run.
"""

import csv
import io
import resource
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..run.checkpoint import Keeper, write_atomically
from ..run.console import Console
from .data import Skipped
from .evaluate import Score
from .state import Run

STEP_COLUMNS = "step epoch loss gradient lr images_per_s data_share peak_mib".split()
EPOCH_COLUMNS = "step epoch train_loss val_loss val_accuracy seconds".split()
MIB = 2**20


def peak_mib(device: torch.device) -> float:
    """The most memory so far: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Table:
    """A CSV that lives on when a run is resumed."""

    def __init__(self, path: Path, columns: list[str]) -> None:
        self.path, self.columns = path, columns

    def begin(self, step: int) -> None:
        """Keep the rows up to a step: what came after the checkpoint comes again."""
        kept = [row for row in self.rows() if int(row["step"]) <= step]
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write_atomically(self.path, text.getvalue().encode())

    def rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]
        return [row for row in rows if row.get("step", "").isdigit()]

    def add(self, row: dict) -> None:
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)


class Report(Console):
    """Everything that a run says, on the first rank; silence elsewhere."""

    command = "train"

    def __init__(self, run: Run, out: Path) -> None:
        super().__init__(run, out, run.world.is_first)
        self.events = None
        if self.is_on:
            self.steps = Table(out / "steps.csv", STEP_COLUMNS)
            self.epochs = Table(out / "epochs.csv", EPOCH_COLUMNS)
            self.write(lambda: self.steps.begin(run.step))
            self.write(lambda: self.epochs.begin(run.step - len(run.losses)))
            if run.options.tensorboard:
                self.write(self._open_events)

    def _open_events(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(str(self.out), purge_step=self.run.step + 1)

    def key_of(self, entry: Skipped) -> str:
        return entry[0]

    def log(self, steps: int, loss: float, gradient: float, seconds: float, waited: float) -> None:
        """The mean of some steps, which took so many seconds, waiting for images among them."""
        run = self.run
        self.waited, self.stepped = self.waited + waited, self.stepped + seconds
        row = {
            "step": run.step,
            "epoch": f"{run.step / run.order.steps_per_epoch:.3f}",
            "loss": f"{loss:.9g}",
            "gradient": f"{gradient:.6g}",
            "lr": f"{run.optimizer.param_groups[0]['lr']:.6g}",
            "images_per_s": f"{steps * run.options.batch_size / seconds:.1f}",
            "data_share": f"{waited / seconds:.4f}",
            "peak_mib": f"{peak_mib(run.world.device):.0f}",
        }
        self.bar.update(steps)
        self.bar.set_postfix_str(
            f"{row['images_per_s']} images/s, loss {loss:.4f}, peak {row['peak_mib']} MiB"
        )
        if self.is_on:
            self.write(lambda: self.steps.add(row))
            self._scalars({name: row[name] for name in STEP_COLUMNS[2:]})

    def epoch(self, train_loss: float, score: Score) -> None:
        run = self.run
        row = {
            "step": run.step,
            "epoch": run.epoch,
            "train_loss": f"{train_loss:.9g}",
            "val_loss": f"{score.loss:.9g}",
            "val_accuracy": f"{score.accuracy:.6f}",
            "seconds": f"{run.seconds:.1f}",
        }
        self.say(
            f"epoch {run.epoch}/{run.options.epochs}: loss {train_loss:.4f}, val loss "
            f"{score.loss:.4f}, val accuracy {100 * score.accuracy:.2f} %, {run.seconds:.0f} s"
        )
        if self.is_on:
            self.write(lambda: self.epochs.add(row))
            self._scalars({name: row[name] for name in EPOCH_COLUMNS[2:5]})

    def finish(self, score: Score) -> None:
        """The picture, the skipped files, and the last line."""
        run = self.run
        self.bar.close()
        self._gather_skipped()
        if not self.is_on:
            return
        self.write(self._draw)
        if self.events is not None:
            self._scalars({"test_accuracy": score.accuracy})
            self.events.close()
        self.tell_skipped()
        self.tell_waiting()
        self.say(f"peak memory {peak_mib(run.world.device):.0f} MiB; all files in {self.out}")
        accuracy = 100 * score.accuracy
        right = round(score.accuracy * score.count) if score.count else 0
        self.say(f"{right} of {score.count} test images right, loss {score.loss:.4f}")
        self.say(f"test accuracy {accuracy:.1f} % in {run.seconds:.0f} s")

    def stopped(self, received: int | None, keeper: Keeper) -> int:
        self._gather_skipped()
        return super().stopped(received, keeper)

    def _gather_skipped(self) -> None:
        """The first rank writes what the others have found; all of them must call."""
        for found in self.run.world.gathered(list(self.skipped.values())):
            if self.is_on:
                self.skip(found)

    def _draw(self) -> None:
        rows = self.epochs.rows()
        if not rows:
            return
        epochs = [int(row["epoch"]) for row in rows]
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        loss, accuracy = figure.subplots(1, 2)
        for name, style in (("train_loss", "C0.-"), ("val_loss", "C1.--")):
            loss.plot(epochs, [float(row[name]) for row in rows], style, label=name.split("_")[0])
        accuracy.plot(epochs, [100 * float(row["val_accuracy"]) for row in rows], "C1.--")
        loss.set(xlabel="epoch", ylabel="loss (training: with augmentation)")
        accuracy.set(xlabel="epoch", ylabel="validation accuracy, %")
        accuracy.set_ylim(max(0, accuracy.get_ylim()[0]), min(101, accuracy.get_ylim()[1]))
        for axes in (loss, accuracy):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        loss.legend()
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        write_atomically(self.out / "curves.png", picture.getvalue())

    def _scalars(self, values: dict) -> None:
        if self.events is not None:
            for name, value in values.items():
                self.write(
                    lambda n=name, v=value: self.events.add_scalar(n, float(v), self.run.step)
                )
