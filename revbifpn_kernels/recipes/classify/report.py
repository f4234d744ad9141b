"""What a classifier's run reports: epochs.csv, TensorBoard events, a figure, the last line."""

import io
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..run.checkpoint import write_atomically
from ..run.console import Console
from ..run.samples import Skipped
from ..run.tables import Table, peak_mib
from .evaluate import Score
from .state import ClassifierState

EPOCH_COLUMNS = "step epoch train_loss val_loss val_accuracy seconds".split()


class Report(Console):
    """The report of a classifier's run; only the first process prints and writes."""

    command = "train"
    step_columns = "step epoch loss gradient lr images_per_s data_share peak_mib".split()

    def __init__(self, run: ClassifierState, out: Path) -> None:
        super().__init__(run, out)
        self.epochs = Table(out / "epochs.csv", EPOCH_COLUMNS)
        self.events = None
        if self.is_on:
            self.write(self.epochs.begin, run.step - len(run.losses))
            if run.options.tensorboard:
                self.write(self._open_events)

    def _open_events(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(str(self.out), purge_step=self.run.step + 1)

    def key_of(self, entry: Skipped) -> str:
        return entry[0]  # a file may fail for one reason here and for another there

    def columns_of(self, means: dict[str, float]) -> dict[str, str]:
        return {"loss": f"{means['loss']:.9g}", "gradient": f"{means['gradient']:.6g}"}

    def log(self, *values) -> dict:
        row = super().log(*values)
        self._scalars({name: row[name] for name in self.step_columns[2:]})
        return row

    def epoch(self, train_loss: float, score: Score) -> None:
        run, epoch = self.run, int(self.run.epoch)
        row = {
            "step": run.step,
            "epoch": epoch,
            "train_loss": f"{train_loss:.9g}",
            "val_loss": f"{score.loss:.9g}",
            "val_accuracy": f"{score.accuracy:.6f}",
            "seconds": f"{run.seconds:.1f}",
        }
        self.say(
            f"epoch {epoch}/{run.options.epochs}: loss {train_loss:.4f}, val loss "
            f"{score.loss:.4f}, val accuracy {100 * score.accuracy:.2f} %, {run.seconds:.0f} s"
        )
        if self.is_on:
            self.write(self.epochs.add, row)
        self._scalars({name: row[name] for name in EPOCH_COLUMNS[2:5]})

    def finish(self, score: Score) -> None:
        """Writes the figure, prints the skipped files and the last line."""
        run = self.run
        self.bar.close()
        self.gather_skipped()
        if not self.is_on:
            return
        self.write(self._draw)
        if self.events is not None:
            self._scalars({"test_accuracy": score.accuracy})
            self.events.close()
        self.tell_end()
        self.say(f"peak memory {peak_mib(run.world.device):.0f} MiB; all files in {self.out}")
        right = round(score.accuracy * score.count) if score.count else 0
        self.say(f"{right} of {score.count} test images right, loss {score.loss:.4f}")
        self.say(f"test accuracy {100 * score.accuracy:.1f} % in {run.seconds:.0f} s")

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
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=120)
        write_atomically(self.out / "curves.png", content.getvalue())

    def _scalars(self, values: dict) -> None:
        if self.events is not None:
            for name, value in values.items():
                self.write(self.events.add_scalar, name, float(value), self.run.step)
