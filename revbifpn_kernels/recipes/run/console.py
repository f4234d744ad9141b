"""The terminal and the files of rows: progress bar, warnings once each, how a run stopped."""

import signal
import sys
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

from tqdm import tqdm

from .checkpoint import Keeper, write_atomically
from .samples import Skipped
from .state import RunState
from .tables import Table, peak_mib

SHOWN = 20  # skipped entries on the terminal; the file has all
SKIPPED = "skipped.txt"


class Console:
    """What a run prints and writes, on its first process; a full disk costs rows, not the run."""

    command: str
    step_columns: list[str]

    def __init__(self, run: RunState, out: Path) -> None:
        self.run, self.out, self.is_on = run, out, run.world.is_first
        self.skipped: dict[Hashable, Skipped] = {}
        self.waited = self.stepped = 0.0  # seconds, since this process began
        self.has_failed = False
        self.bar = tqdm(
            total=run.steps,
            initial=run.step,
            unit="step",
            disable=None if self.is_on and run.options.progress else True,
            dynamic_ncols=True,
        )
        self.steps = Table(out / "steps.csv", self.step_columns)
        if self.is_on:
            self.write(self._remember_skipped)
            self.write(self.steps.begin, run.step)

    def say(self, text: str) -> None:
        if self.is_on:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        tqdm.write(f"{self.command}: {text}", file=sys.stderr)

    def write(self, action: Callable[..., None], *arguments) -> None:
        """Calls `action`, which writes a file; warns if that fails, once per run."""
        try:
            action(*arguments)
        except OSError as error:
            if not self.has_failed:
                self.warn(f"a report could not be written, training goes on: {error}")
            self.has_failed = True

    def columns_of(self, means: dict[str, float]) -> dict[str, str]:
        """The command's own columns: losses and gradient norm."""
        raise NotImplementedError

    def log(
        self, steps: int, means: dict[str, float], lr: float, seconds: float, waited: float
    ) -> dict:
        """Writes the means of some steps and how long they took; returns the row."""
        run = self.run
        self.waited, self.stepped = self.waited + waited, self.stepped + seconds
        row = {
            "step": run.step,
            "epoch": f"{run.epoch:.3f}",
            "lr": f"{lr:.6g}",
            "images_per_s": f"{steps * run.options.batch_size / seconds:.1f}",
            "data_share": f"{waited / seconds:.4f}",
            "peak_mib": f"{peak_mib(run.world.device):.0f}",
        } | self.columns_of(means)
        self.bar.update(steps)
        self.bar.set_postfix_str(
            f"{row['images_per_s']} images/s, loss {float(row['loss']):.4f}, "
            f"peak {row['peak_mib']} MiB"
        )
        if self.is_on:
            self.write(self.steps.add, row)
        return row

    def key_of(self, entry: Skipped) -> Hashable:
        """Entries of the same key are named once."""
        return entry

    def message_of(self, entry: Skipped) -> str:
        return f"skipped {': '.join(entry)}"

    def skip(self, found: Iterable[Skipped]) -> None:
        """Names each entry that was left out or changed once, on the terminal and in the file."""
        new = {}
        for entry in map(_in_a_line, found):
            key = self.key_of(entry)
            if key in self.skipped:
                continue
            self.skipped[key] = new[key] = entry
            if len(self.skipped) <= SHOWN:
                self.warn(self.message_of(entry))
            elif len(self.skipped) == SHOWN + 1:
                self.warn(f"skipped more; {SKIPPED} names them")
        if new and self.is_on:
            self.write(self._note, new.values())

    def _note(self, entries: Iterable[Skipped]) -> None:
        with open(self.out / SKIPPED, "a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines("\t".join(entry) + "\n" for entry in entries)

    def _remember_skipped(self) -> None:
        """Reads what a resumed run has named, without a line that a kill cut off."""
        path = self.out / SKIPPED
        if not self.run.step:
            path.unlink(missing_ok=True)
        elif path.exists():
            whole, end, _ = path.read_bytes().rpartition(b"\n")
            write_atomically(path, whole + end)
            lines = whole.decode(errors="surrogateescape").split("\n") if end else []
            entries = (line.partition("\t")[::2] for line in lines)
            self.skipped |= {self.key_of(entry): entry for entry in entries}

    def gather_skipped(self) -> None:
        """Lets the first process write what the others have skipped; each process must call it."""
        for found in self.run.world.gathered(list(self.skipped.values())):
            if self.is_on:
                self.skip(found)

    def tell_skipped(self) -> None:
        if self.skipped:
            self.warn(f"{len(self.skipped)} skipped, see {SKIPPED}")

    def tell_end(self) -> None:
        """What was skipped, and the share of the time that steps waited for images."""
        self.tell_skipped()
        if self.stepped:
            share = 100 * self.waited / self.stepped
            self.say(f"waiting for images took {share:.1f} % of the steps")

    def stopped(self, received: int | None, keeper: Keeper) -> int:
        """Tells how to continue after a signal; returns the exit status."""
        self.gather_skipped()
        kind = signal.Signals(received or signal.SIGTERM)
        self.bar.close()
        self.say(
            f"stopped by {kind.name} after step {self.run.step} of {self.run.steps}; checkpoint: "
            f"{keeper.described()}; continue with --out {self.out} --resume auto"
        )
        return 128 + kind


def _in_a_line(entry: Skipped) -> Skipped:
    name, reason = (text.replace("\n", "\\n").replace("\t", "\\t") for text in entry)
    return name, reason
