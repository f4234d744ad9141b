"""Markdown of rows: aligned tables, numbers, and the conditions that a table was measured under."""

import statistics
from collections.abc import Iterable, Sequence

from .record import Row

MIB, GB = 2**20, 1e9
DTYPE_NAMES = {"fp32": "fp32", "fp32+bf16": "bf16 autocast"}
FAMILIES = {"revbifpn": "RevBiFPN", "efficientnet": "EfficientNet", "hrnet": "HRNet"}
MODES = {
    "reversible": "reversible",
    "exact": "reversible, exact mode",
    "stored": "stored activations",
    "checkpoint": "`torch.utils.checkpoint` per block",
    "official reversible": "the authors' code, reversible",
    "official stored": "the authors' code, stored",
    "reversible+compile": "reversible, compiled transforms",
    "stored+compile": "stored, compiled",
    "compiler recomputes": "the compiler recomputes",
    "stored+max-autotune": "stored, compiled and tuned",
}
BOUNDS = ("ms_low", "ms_high")
CLOCKS = ("sm_mhz_before", "sm_mhz_after")
NUMBERS_OF_NO_DEVICE = {
    "counted": "counted on fake tensors, so it holds for every machine",
    "compiled": "read from the machine code, no GPU needed",
}


def table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table whose columns line up; "" without lines."""
    cells = [[str(cell) for cell in line] for line in lines]
    if not cells:
        return ""
    widths = [max(len(line[k]) for line in [header, *cells]) for k in range(len(header))]
    rows = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in [header, *cells]
    ]
    ruler = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {rows[0]} |", f"|{ruler}|", *(f"| {row} |" for row in rows[1:])]) + "\n"


def conditions(rows: Sequence[Row], *more: str) -> str:
    """A line in italics: device, versions, shape and dtype if they are one, date, command."""

    def values(column: str) -> list[str]:
        return list(dict.fromkeys(row[column] for row in rows if row.get(column)))

    def single(column: str, text: str = "{}") -> list[str]:
        found = values(column)
        return [text.format(found[0])] if len(found) == 1 else []

    if not rows:
        return ""
    shape = [text.replace("x", "×") for text in single("shape")]
    dtype = [DTYPE_NAMES.get(name, name) for name in single("dtype")]
    parts = [
        *(NUMBERS_OF_NO_DEVICE.get(device, device) for device in values("device")),
        *(f"{n} thread" + "s" * (n != "1") for n in single("threads")),
        *(f"torch {version}" for version in values("torch")),
        *(f"CUDA {version}" for version in values("cuda")),
        *shape, *dtype, *more, *_timed(rows),
        "commit " + ", ".join(values("commit")),
        ", ".join(values("date")),
        ", ".join(f"`{command}`" for command in values("command")),
    ]  # fmt: skip
    return f"*{'; '.join(part for part in parts if part)}.*\n"


def _timed(rows: Sequence[Row]) -> list[str]:
    """How sure the medians are, and what the GPU's clock was, as far as the rows say it."""
    parts = []
    wide = sorted(
        100 * max(abs(number(row, bound) / number(row, "ms_p50") - 1) for bound in BOUNDS)
        for row in rows if row.get("ms_low")
    )  # fmt: skip
    if wide:
        middle = statistics.median(wide)
        parts.append(f"95 % intervals of medians: ±{middle:.1f} %, ±{wide[-1]:.1f} % at most")
    clocks = [number(row, name) for row in rows for name in CLOCKS if row.get(name)]
    if clocks:
        parts.append(f"SM clock {min(clocks):.0f} to {max(clocks):.0f} MHz")
    held = dict.fromkeys(row["throttle"] for row in rows if row.get("throttle"))
    held.pop("none", None)
    return [*parts, f"clock held down by {', '.join(held)}"] if held else parts


def with_conditions(
    header: Sequence[str], lines: Iterable[Sequence[object]], rows: Sequence[Row], *more: str
) -> str:
    """The table of these lines, then the conditions of these rows; "" without lines."""
    text = table(header, lines)
    return f"{text}\n{conditions(rows, *more)}" if text else ""


def without_empty(
    header: Sequence[str], lines: Sequence[Sequence[object]], optional: Sequence[str]
) -> tuple[list[str], list[list[object]]]:
    """Header and lines without those of the optional columns that hold nothing."""
    kept = [k for k, name in enumerate(header)
            if name not in optional or any(line[k] for line in lines)]  # fmt: skip
    return [header[k] for k in kept], [[line[k] for k in kept] for line in lines]


def number(row: Row | None, column: str) -> float | None:
    return float(row[column]) if row and row.get(column) else None


def cell(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def network(name: str) -> str:
    """As people write it: RevBiFPN-S0, EfficientNet-B7."""
    family, _, size = name.partition("_")
    if family == "bifpn":
        return f"EfficientNet-{size.upper()} + BiFPN"
    return f"{FAMILIES[family]}-{size.upper()}" if family in FAMILIES else name


def mode(provider: str) -> str:
    name = provider.removesuffix("+graph")
    return MODES.get(name, name) + (", CUDA graph" if name != provider else "")


def shape(row: Row) -> str:
    """With the layout, unless it is PyTorch's own."""
    sides = row["shape"].replace("x", "×")
    return f"{sides} channels_last" if row.get("layout") == "channels_last" else sides


def side_of(row: Row) -> int:
    return int(row["shape"].rsplit("x", 1)[-1])


def of_mode(rows: Iterable[Row], *modes: str) -> list[Row]:
    return [row for row in rows if row.get("mode") in modes]


def by(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], Row]:
    """Rows by the values of these columns; a later row takes the place of an earlier one."""
    return {tuple(row.get(name, "") for name in columns): row for row in rows}


def by_device(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each device, the one measured last first; those that do all they can, if any."""
    whole = [row for row in rows if "forced" not in row["device"]] or rows
    devices = dict.fromkeys(row["device"] for row in reversed(whole))
    return {name: [row for row in whole if row["device"] == name] for name in devices}


def latest_device(rows: Sequence[Row]) -> list[Row]:
    """The rows of the device that was measured last."""
    return next(iter(by_device(rows).values()), [])
