"""CSV files that continue when a run is resumed, and the peak memory for them."""

import csv
import io
import resource
from pathlib import Path

import torch

from .checkpoint import write_atomically

MIB = 2**20


def peak_mib(device: torch.device) -> float:
    """The most memory so far: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Table:
    """A CSV file with a column `step`."""

    def __init__(self, path: Path, columns: list[str]) -> None:
        self.path, self.columns = path, columns

    def begin(self, step: int) -> None:
        """Drops the rows after a step, which the resumed run writes again."""
        rows = [row for row in self.rows() if int(row["step"]) <= step]
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue().encode())

    def rows(self) -> list[dict[str, str]]:
        """All whole rows; a kill may have cut off the last one."""
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
