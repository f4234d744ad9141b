"""What every command tells on the terminal: a progress bar, warnings once each, how it stopped."""

import signal
import sys
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

from tqdm import tqdm

from ..classify.data import Skipped
from .checkpoint import Keeper, write_atomically

SHOWN = 20  # skipped entries on the terminal; the file has all
SKIPPED = "skipped.txt"


class Console:
    """A run's, of which `step` and `steps` are read. A full disk costs rows, not the run.

    Args:
        is_on: False tells nothing but warnings.
    """

    command: str

    def __init__(self, run, out: Path, is_on: bool = True) -> None:
        self.run, self.out, self.is_on = run, out, is_on
        self.skipped: dict[Hashable, Skipped] = {}
        self.waited = self.stepped = 0.0  # seconds, since this process began
        self.has_failed = False
        self.bar = tqdm(
            total=run.steps,
            initial=run.step,
            unit="step",
            disable=None if is_on and run.options.progress else True,
            dynamic_ncols=True,
        )
        if is_on:
            self.write(self._remember_skipped)

    def say(self, text: str) -> None:
        if self.is_on:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        tqdm.write(f"{self.command}: {text}", file=sys.stderr)

    def key_of(self, entry: Skipped) -> Hashable:
        """What tells entries apart that are named once each."""
        return entry

    def told(self, entry: Skipped) -> str:
        return f"skipped {': '.join(entry)}"

    def skip(self, found: Iterable[Skipped]) -> None:
        """Name each entry that was left out or changed, once, here and in the file."""
        new = {}
        for entry in map(_in_a_line, found):
            key = self.key_of(entry)
            if key in self.skipped:
                continue
            self.skipped[key] = new[key] = entry
            if len(self.skipped) <= SHOWN:
                self.warn(self.told(entry))
            elif len(self.skipped) == SHOWN + 1:
                self.warn(f"skipped more; {SKIPPED} names them")
        if new and self.is_on:
            self.write(lambda: self._note(new.values()))

    def _note(self, entries: Iterable[Skipped]) -> None:
        with open(self.out / SKIPPED, "a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines("\t".join(entry) + "\n" for entry in entries)

    def _remember_skipped(self) -> None:
        """What a run that goes on has found, without a line that a kill cut off."""
        path = self.out / SKIPPED
        if not self.run.step:
            path.unlink(missing_ok=True)
        elif path.exists():
            whole, end, _ = path.read_bytes().rpartition(b"\n")
            write_atomically(path, whole + end)
            lines = whole.decode(errors="surrogateescape").split("\n") if end else []
            for line in lines:
                name, _, reason = line.partition("\t")
                self.skipped[self.key_of((name, reason))] = (name, reason)

    def tell_skipped(self) -> None:
        if self.skipped:
            self.warn(f"{len(self.skipped)} skipped, see {SKIPPED}")

    def tell_waiting(self) -> None:
        if self.stepped:
            share = 100 * self.waited / self.stepped
            self.say(f"waiting for images took {share:.1f} % of the steps")

    def stopped(self, received: int | None, keeper: Keeper) -> int:
        """The exit status after a signal."""
        kind = signal.Signals(received or signal.SIGTERM)
        self.bar.close()
        self.say(
            f"stopped by {kind.name} after step {self.run.step} of {self.run.steps}; checkpoint: "
            f"{keeper.described()}; continue with --out {self.out} --resume auto"
        )
        return 128 + kind

    def write(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            if not self.has_failed:
                self.warn(f"a report could not be written, training goes on: {error}")
            self.has_failed = True


def _in_a_line(entry: Skipped) -> Skipped:
    name, reason = (text.replace("\n", "\\n").replace("\t", "\\t") for text in entry)
    return name, reason
