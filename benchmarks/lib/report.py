"""Prints rows as tables for a person: ours beside the rivals, and what became slower."""

from collections.abc import Sequence

from .harness import KEY, Row

STEADY = 1.25  # the slowest fifth over the fastest
SLOWER = 1.10  # a copy's own time differs by less between two runs on a quiet machine


def _case(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY if name != "provider")


def _by_case(rows: Sequence[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """The rows of each case by provider."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(_case(row), {})[row["provider"]] = row
    return cases


def _ms(row: Row | None) -> float | None:
    return float(row["ms_p50"]) if row and row.get("ms_p50") else None


def _percent(row: Row, name: str) -> str:
    return f"{100 * float(row[name]):.0f} %" if row.get(name) else ""


def _times(rival: Row | None, ours: Row) -> str:
    """How many times our time the rival takes, or why there is no such number."""
    if rival is None:
        return ""
    if _ms(rival) is None or _ms(ours) is None:
        return rival["note"]
    return f"{_ms(rival) / _ms(ours):.2f}"


def _print_aligned(header: Sequence[str], lines: Sequence[Sequence[str]], texts: int) -> None:
    """The first `texts` columns to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    for line in [header, *lines]:
        cells = (
            cell.ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def _line(providers: dict[str, Row]) -> list[str]:
    ours = providers["ours"]
    time = f"{_ms(ours):.3f}" if _ms(ours) is not None else ours["note"].split(":")[0]
    if _relative(providers) is not None and not _is_steady(providers):
        time = "~" + time
    gbps = f"{float(ours['gbps']):.1f}" if ours.get("gbps") else ""
    peaks = [
        f"{float(row['peak_mib']):.0f}" if row and row.get("peak_mib") else ""
        for row in (ours, providers.get("torch"))
    ]
    where = [ours[name] for name in ("op", "mode", "dtype", "layout", "shape", "threads")]
    shares = [_percent(ours, "share_of_copy"), _percent(ours, "share_of_clone")]
    rivals = [_times(providers.get(name), ours) for name in ("torch", "compile")]
    return [*where, time, gbps, *shares, *rivals, *peaks]


def print_table(rows: Sequence[Row]) -> None:
    """Ours: time, GB/s, shares of the copies' GB/s, times faster than the rivals, peak memory."""
    header = (
        "op,mode,dtype,layout,shape,threads,ms,GB/s,of copy,of clone,x torch,x compile,MiB,"
        "MiB torch"
    ).split(",")
    timed = [row for row in rows if row["mode"] != "host"]
    _print_aligned(header, [_line(p) for p in _by_case(timed).values() if "ours" in p], 5)
    print(
        "of copy, of clone: our GB/s over theirs; x torch, x compile: how many times faster than "
        "they; MiB: peak;\n~ marks times that varied within the run: a busy machine, or a tiny case"
    )
    host = _by_case([row for row in rows if row["mode"] == "host"])
    for providers in host.values():
        for name, row in providers.items():
            print(f"host time of a call: {row['op']} {name} {1e3 * _ms(row):.1f} µs")


def _yardstick(providers: dict[str, Row]) -> Row | None:
    """The copy timed in our turns: `clone` where we allocate a new stream, else `copy`."""
    return providers.get("clone") or providers.get("copy")


def _relative(providers: dict[str, Row]) -> float | None:
    """Our time over the copy's, each at its fastest fifth, which other work disturbs least."""
    rows = (providers.get("ours"), _yardstick(providers))
    if not all(row and row.get("ms_p20") for row in rows):
        return None
    ours, copy = (float(row["ms_p20"]) for row in rows)
    return ours / copy


def _is_steady(providers: dict[str, Row]) -> bool:
    """Whether times within the run differed so little that two runs can be compared."""
    rows = (providers["ours"], _yardstick(providers))
    return all(float(row["ms_p80"]) < STEADY * float(row["ms_p20"]) for row in rows)


def print_comparison(old: Sequence[Row], new: Sequence[Row]) -> None:
    """List the ops that take more of a copy's time than before."""
    before, after = _by_case(old), _by_case(new)
    both = {
        case: (_relative(before[case]), _relative(providers))
        for case, providers in after.items()
        if case in before
    }
    known = {case: pair for case, pair in both.items() if all(pair)}
    steady = {
        case: now / then
        for case, (then, now) in known.items()
        if _is_steady(before[case]) and _is_steady(after[case])
    }
    slower = {case: ratio for case, ratio in steady.items() if ratio > SLOWER}
    print(
        f"\n{len(steady)} cases compared, {len(slower)} slower by more than {SLOWER - 1:.0%}; "
        f"{len(known) - len(steady)} more varied too much within a run to tell"
    )
    for case, ratio in sorted(slower.items(), key=lambda item: -item[1]):
        then, now = known[case]
        print(f"  x{ratio:.2f}  {' '.join(case)}: {then:.2f} copies, now {now:.2f}")
