"""Tables of times and precision, from the rows of the other CSVs."""

import re
import statistics
from collections import defaultdict
from collections.abc import Sequence

from . import markdown as md
from .first_calls import COMPILERS
from .record import Row

DTYPES_OF_OPS = {"fp32": "fp32", "bf16": "bf16", "fp32+bf16": "fp32, bf16 sources"}
MODES_OF_OPS = {"inverse": " (inverse)"}
# Traffic up to so many times the least is as good as the least.
SPARE = 1.2
NORM_RIVALS = {"": "best rival", "torch": "eager", "compile": "compiled", "max-autotune": "tuned"}
RUN = ("commit", "date", "command")
CASE = ("op", "mode", "dtype", "layout", "shape", "threads")
Providers = dict[str, Row]


def by_case(rows: Sequence[Row], *columns: str) -> dict[tuple[str, ...], Providers]:
    """The rows of each case by provider."""
    cases: dict[tuple[str, ...], Providers] = {}
    for row in rows:
        key = tuple(row.get(name, "") for name in columns)
        cases.setdefault(key, {})[row["provider"]] = row
    return cases


def ms(row: Row | None) -> float | None:
    return md.number(row, "ms_p50")


def times_faster(rival: Row | None, ours: Row) -> str:
    """How many times our time the rival takes, or why there is no such number."""
    if rival is None:
        return ""
    known = md.ratio(ms(rival), ms(ours))
    return rival.get("note", "") if known is None else f"{known:.1f}"


def is_rival(provider: str) -> bool:
    return not provider.startswith(("ours", "copy", "clone", "reversible", "exact"))


def best_rival(found: Providers, ours: Row) -> Row | None:
    """The fastest rival that was timed in the run of ours; who was wrong has no time."""
    rivals = [row for provider, row in found.items() if is_rival(provider) and ms(row)
              and all(row.get(name) == ours.get(name) for name in RUN)]  # fmt: skip
    return min(rivals, key=ms, default=None)


# Ops


def ops_table(rows: Sequence[Row], only: str = "") -> str:
    """Ours beside copies and rivals; `only` the cases of that name."""
    rows = [r for r in rows if r["mode"] != "host"]
    cases = by_case(rows, *CASE)
    lines, used = [], []
    for (op, kind, dtype, layout, shape, threads), found in cases.items():
        ours = found.get("ours")
        if ours is None or not ours.get("note", "").startswith(only):
            continue
        used.append(ours)
        name = f"`{op}`{MODES_OF_OPS.get(kind, '')}"
        where = (name, DTYPES_OF_OPS[dtype], layout, *(() if only else (shape, threads)))
        if ms(ours) is None:
            lines.append((*where, ours["note"], *[""] * 8))
            continue
        shares = (md.percent(md.number(ours, f"share_of_{of}")) for of in ("copy", "clone", "peak"))
        rivals = [times_faster(found.get(name), ours) for name in ("torch", *COMPILERS)]
        peaks = [md.cell(md.number(found.get(name), "peak_mib"), 0) for name in ("ours", "torch")]
        lines.append(
            (
                *where,
                times_faster(best_rival(found, ours), ours),
                md.cell(md.number(ours, "gbps"), 1),
                *shares,
                *rivals,
                " / ".join(filter(None, peaks)),
            )
        )
    header = ("op", "dtype", "layout", *(() if only else ("shape", "threads")), "× best rival",
              "GB/s", "of copy", "of clone", "of peak", "× eager", "× compile", "× max-autotune",
              "peak MiB, ours / eager")  # fmt: skip
    header, lines = md.without_empty(header, lines, ("of peak", "× max-autotune"))
    order = list(dict.fromkeys(line[0] for line in lines))
    lines.sort(key=lambda line: order.index(line[0]))
    return md.with_conditions(header, lines, used, "sources at 1/2, 1/4 and 1/8 of the side")


def host_table(rows: Sequence[Row]) -> str:
    rows = md.of_mode(rows, "host")
    lines = [(f"`{r['op']}`", r["provider"], f"{1e3 * ms(r):.1f}") for r in rows]
    return md.with_conditions(("op", "provider", "host time per call, µs"), lines, rows)


# What the host pays: bench_host


def launches_table(rows: Sequence[Row]) -> str:
    """µs per call, and per launch beyond what Triton's launcher takes for the same launches."""
    rows = md.of_mode(rows, "launch")
    lines = []
    for (op,), found in by_case(rows, "op").items():
        call = found.get("ours") or found["Triton"]
        launches, beyond = int(call["launches"]), ""
        if "launcher" in found:
            beyond = f"{1e3 * (ms(call) - ms(found['launcher'])) / launches:.1f}"
        lines.append((f"`{op}`", launches, f"{1e3 * ms(call):.1f}", beyond))
    header = ("op", "launches", "µs per call", "µs per launch beyond Triton's launcher")
    return md.with_conditions(header, lines, rows, "a driver that does nothing")


def stubbed_steps_table(rows: Sequence[Row]) -> str:
    rows = md.of_mode(rows, "step")
    lines = []
    for (step,), found in by_case(rows, "op").items():
        fused, modules = found["fused"], found["modules"]
        times = (md.cell(ms(row), 1) for row in (fused, modules))
        quotient = md.cell(md.ratio(ms(fused), ms(modules)))
        lines.append((step, *times, quotient, fused["operators"], modules["operators"]))
    header = ("step without convolutions", "fused, ms", "modules, ms", "fused / modules",
              "operators, fused", "operators, modules")  # fmt: skip
    return md.with_conditions(header, lines, rows, "a driver that does nothing")


def step_counts_table(rows: Sequence[Row]) -> str:
    rows = md.of_mode(rows, "count")
    lines = [(r["op"], md.MODES[r["provider"]], r["launches"], r["operators"]) for r in rows]
    header = ("training step", "mode", "launches of our kernels", "calls of our ops")
    return md.with_conditions(header, lines, rows)


def small_maps_table(rows: Sequence[Row]) -> str:
    rows = md.of_mode(rows, "cpu")
    lines = [
        (shape.replace("x", "×"), *(f"{1e3 * ms(found[name]):.1f}" for name in ("ours", "torch")),
         md.cell(md.ratio(ms(found["ours"]), ms(found["torch"]))))
        for (shape,), found in by_case(rows, "shape").items()
    ]  # fmt: skip
    header = ("maps of S0", "`resample_add`, µs", "eager, µs", "ours / eager")
    return md.with_conditions(header, lines, rows, "on a CPU, from all coarser streams")


def host_page(rows: Sequence[Row]) -> str:
    parts = launches_table, stubbed_steps_table, step_counts_table, small_maps_table
    return "\n".join(filter(None, (part(rows) for part in parts)))


# MBConv and its parts


def norms_table(rows: Sequence[Row]) -> str:
    """How many times as fast as PyTorch, at each shape, forward and backward together."""
    rows = [r for r in rows if r["op"].startswith("norm_act")]
    cases = by_case(md.of_mode(rows, "fwd+bwd"), "op", "dtype", "layout", "shape")
    shapes = list(dict.fromkeys(shape for *_, shape in cases))
    columns = list(dict.fromkeys((dtype, layout) for _, dtype, layout, _ in cases))
    lines = []
    for op in dict.fromkeys(op for op, *_ in cases):
        for provider, name in NORM_RIVALS.items():
            cells = [
                " / ".join(_norm_cell(cases.get((op, *column, shape), {}), provider)
                           for shape in shapes)
                for column in columns
            ]  # fmt: skip
            if any(text.strip(" /") for text in cells):
                ops = " and ".join(f"`{part}`" for part in op.split(", "))
                lines.append((f"{ops}: × {name}", *cells))
    header = (" / ".join(shapes).replace("x", "×"), *(", ".join(column) for column in columns))
    return md.with_conditions(header, lines, rows)


def _norm_cell(found: Providers, provider: str) -> str:
    """How many times our time a rival takes; "" names the best one."""
    if "ours" not in found:
        return ""
    ours = found["ours"]
    rival = found.get(provider) if provider else best_rival(found, ours)
    return ours.get("note") or times_faster(rival, ours)


def convolutions_table(rows: Sequence[Row]) -> str:
    """Our ops for convolutions and PyTorch's, in copies' times."""
    rows = [r for r in rows if r["op"].startswith(("depthwise", "pointwise"))]
    lines = []
    for key, found in by_case(rows, "op", "kernel", "shape", "dtype").items():
        op, kernel, shape, dtype = key
        ours = found.get("ours", {})
        floors = [md.cell(md.ratio(1, md.number(found.get(name), "share_of_copy")), 1)
                  for name in ("ours", "torch")]  # fmt: skip
        faster = times_faster(found.get("torch"), ours) or ours.get("note", "")
        lines.append((f"`{op}`", kernel, shape.replace("x", "×"), dtype, *floors, faster))
    header = ("op", "kernel", "shape", "dtype", "ours, times of a copy", "PyTorch", "× PyTorch")
    return md.with_conditions(header, lines, rows, "channels_last")


def blocks_table(rows: Sequence[Row]) -> str:
    """How many times as fast as its modules a fused MBConv trains: the spread over each network."""
    rows = [r for r in rows if r["op"] == "MBConv"]
    ratios = defaultdict(list)
    for key, found in by_case(rows, "network", "layout", "kernel", "shape").items():
        if {"ours", "torch"} <= found.keys():
            ratio = md.ratio(ms(found["torch"]), ms(found["ours"]))
            ratios[key[:2]].append((ratio, f"{key[2]} at {key[3]}".replace("x", "×")))
    lines = []
    for (network, layout), found in ratios.items():
        slower = [text for ratio, text in found if ratio < 0.97]
        values = sorted(ratio for ratio, _ in found)
        spread = [md.cell(value) for value in (values[0], statistics.median(values), values[-1])]
        lines.append(
            (md.network(network), layout, len(found), *spread, "; ".join(slower) or "none")
        )
    header = ("network", "layout", "distinct blocks", "modules' time over fused: least", "median",
              "most", "slower by more than 3 %")  # fmt: skip
    note = "80-160-80: channels of the input, of the depthwise convolution, of the result"
    return md.with_conditions(header, lines, rows, note)


# GPU kernels


def kernels_table(rows: Sequence[Row], only: str = "") -> str:
    """Instructions beside the budget, registers; bold where arithmetic is the limit."""
    chosen = [r for r in rows if r["target"] == "sm_90" and r["instructions_per_element"]]
    chosen = [r for r in chosen if only in r["scales"]]
    found = md.by(chosen, "kernel", "layout", "scales", "dtype")
    dtypes = [dtype for dtype in DTYPES_OF_OPS if any(key[3] == dtype for key in found)]
    lines = []
    for kernel, layout, scales in dict.fromkeys(key[:3] for key in found):
        cells = []
        for dtype in dtypes:
            row = found.get((kernel, layout, scales, dtype))
            taken, budget = md.number(row, "instructions_per_element"), md.number(row, "budget")
            text = f"{taken} ({budget}); {row['registers']}" if row else ""
            cells.append(f"**{text}**" if row and taken > budget else text)
        lines.append((f"`{_kernel(kernel)}`", layout, *cells))
    spilling = sum(int(row["spill_bytes"]) > 0 for row in rows)
    header = ("sm_90: instructions per element of x (budget); registers", "layout",
              *(DTYPES_OF_OPS[dtype] for dtype in dtypes))  # fmt: skip
    note = f"{spilling or 'none'} of {len(rows)} compiled kernels spills registers"
    triton = "".join(dict.fromkeys(f"Triton {row['triton']}" for row in rows))
    return md.with_conditions(header, lines, rows, triton, note)


def traffic_table(rows: Sequence[Row]) -> str:
    """What the accesses of the largest fusions and maps cost beside the least; bold above it."""
    chosen = [r for r in rows if r.get("sectors_per_request") and r["scales"] in ("2+4+8", "56x56")]
    small = ("totals", "+scales")
    chosen = [r for r in chosen if not any(part in r["kernel"] for part in small)]
    lines = []
    for row in chosen:
        l1 = md.number(row, "l1_over_dram")
        lines.append((f"`{_kernel(row['kernel'])}`", row["layout"], DTYPES_OF_OPS[row["dtype"]],
                      _beside(row, "sectors_per_request", "fewest_sectors"), row["l2_bytes"],
                      _beside(row, "dram_bytes", "compulsory_bytes"),
                      f"**{l1}**" if l1 > 1 else str(l1),
                      _beside(row, "shared_wavefronts", "fewest_shared_wavefronts")))  # fmt: skip
    header = (
        "kernel",
        "layout",
        "dtype",
        "sectors per request",
        "L1–L2 bytes per element",
        "DRAM bytes per element",
        "L1 time over DRAM time",
        "shared wavefronts per element",
    )
    note = (
        "the least in parentheses; DRAM behind an L2 of 1 MiB, a fiftieth of an H200's, that "
        "serves one block after the other"
    )
    return md.with_conditions(header, lines, chosen, note)  # fmt: skip


def _beside(row: Row, name: str, least: str) -> str:
    value, fewest = (md.number(row, column) for column in (name, least))
    text = f"{value:.3g} ({fewest:.3g})"
    return f"**{text}**" if value > SPARE * fewest else text


def _kernel(name: str) -> str:
    return name.strip("_").removesuffix("_kernel").replace("_kernel+", " with ")


# Training steps


def step_table(rows: Sequence[Row]) -> str:
    """A training step of each network, of the first of ours in all modes, on every device.

    The time over that of our stored activations stands in parentheses.
    """
    devices = {name: by_case(md.of_mode(own, "step"), "op", "shape", "layout")
               for name, own in md.by_device(rows).items()}  # fmt: skip
    lines, used, first = [], [], ""
    every = {case: found for cases in reversed(devices.values()) for case, found in cases.items()}
    for case, found in every.items():
        first = first or case[0]
        for provider, row in found.items():
            if case[0] != first and provider in ("exact", "checkpoint"):
                continue
            cells = []
            for cases in devices.values():
                providers = cases.get(case, {})
                own = providers.get("stored") if case[0].startswith("revbifpn") else None
                there = providers.get(provider)
                used += [there] if there else []
                ratio = md.cell(md.ratio(ms(there), ms(own)))
                time = md.cell(ms(there), 0) or (there or {}).get("note", "")
                cells.append(f"{time} ({ratio})" if ratio else time)
            sizes = (md.cell(md.number(row, column), 1) for column in ("held_mib", "peak_mib"))
            name = md.network(case[0]) if row is next(iter(found.values())) else ""
            if name and sum(op == case[0] for op, *_ in every) > 1:
                name += f" at {md.shape(row)}"
            lines.append((name, md.mode(provider), *cells, *sizes))
    times = [f"step ms (× ours stored): {device}" for device in devices]
    header = ("network", "activations", *times, "held MiB", "peak MiB")
    return md.with_conditions(header, lines, used)


def all_steps_table(rows: Sequence[Row]) -> str:
    """All that was measured of a step."""
    columns = ("op", "shape", "layout", "dtype")
    evaluations = md.by(md.of_mode(rows, "eval"), *columns, "provider")
    steps, lines = md.of_mode(rows, "step"), []
    for case, found in by_case(steps, *columns).items():
        for provider, row in found.items():
            names = (md.network(row["op"]), md.shape(row), md.DTYPE_NAMES[row["dtype"]],
                     md.mode(provider))  # fmt: skip
            if ms(row) is None:
                lines.append((*names, row["note"], *[""] * 7))
                continue
            held, peak = md.number(row, "held_mib"), md.number(row, "peak_mib")
            transient = None if held is None else peak - held
            best = None if is_rival(provider) else best_rival(found, row)
            lines.append((
                *names, md.cell(ms(row), 0), md.cell(md.ratio(ms(best), ms(row))),
                md.cell(ms(evaluations.get((*case, provider))), 0),
                md.cell(md.number(row, "host_ms"), 0), md.cell(md.number(row, "images_per_s"), 1),
                md.cell(held, 1), md.cell(transient, 1), row.get("operators", ""),
            ))  # fmt: skip
    header = (
        "network,shape,dtype,mode,step ms,× best rival,eval ms,host ms,images/s,held MiB,"
        "transient,launches"
    ).split(",")
    return md.with_conditions(*md.without_empty(header, lines, ("host ms",)), steps)


def losses_table(rows: Sequence[Row]) -> str:
    """Where ours is slower than an alternative that was timed in the same turns."""
    steps, lines = [r for r in md.of_mode(rows, "step") if ms(r)], []
    for found in by_case(steps, "op", "shape", "layout", "dtype").values():
        for provider, rival in found.items():
            # A CUDA graph is compared with a CUDA graph.
            ours = found.get("reversible+graph" if provider.endswith("+graph") else "reversible")
            if ours is None or ms(rival) >= ms(ours):
                continue
            times = md.ratio(ms(ours), ms(rival))
            memory = md.cell(md.ratio(md.number(rival, "peak_mib"), md.number(ours, "peak_mib")), 1)
            lines.append((md.network(ours["op"]), md.shape(ours), md.mode(provider),
                          f"{times:.2f}×", memory and f"{memory}×"))  # fmt: skip
    header = ("network", "shape", "faster than reversible", "our time over its",
              "its peak memory over ours")  # fmt: skip
    return md.with_conditions(header, lines, steps)


def profile_table(rows: Sequence[Row]) -> str:
    """Milliseconds (share of the step; calls) of each kind of operator."""
    texts = []
    for name in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == name]
        found = md.by(mine, "mode", "provider")
        providers = list(dict.fromkeys(row["provider"] for row in mine))
        lines = []
        for part in dict.fromkeys(row["mode"] for row in mine):
            cells = []
            for provider in providers:
                row, whole = found.get((part, provider)), found["all", provider]
                share = md.percent(md.ratio(ms(row), ms(whole)))
                cells.append(f"{ms(row):.0f} ({share}; {row['operators']})" if row else "")
            lines.append((part, *cells))
        header = (md.network(name), *(md.mode(provider) for provider in providers))
        note = "without the update; Python and engine: what the operators, timed one by one, leave"
        texts.append(md.with_conditions(header, lines, mine, note))
    return "\n".join(texts)


# Precision


def _exact(name: str) -> str:
    """`exact 2^-12` as people write it."""
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return re.sub(r"\^(-\d+)", lambda power: power[1].translate(raised), md.mode(name))


def precision_table(rows: Sequence[Row]) -> str:
    gradients = md.of_mode(rows, "gradient")
    accuracy = {r["provider"]: r["accuracy"] for r in md.of_mode(rows, "training")}
    lines = []
    for row in gradients:
        lattice = md.number(row, "lattice")
        reach = "" if lattice is None else f"{2**24 * lattice:.0f}"
        if lattice and 2**24 * lattice < md.number(row, "largest_stream"):
            reach += " (streams go beyond)"
        errors = [f"{md.number(row, f'error_{dtype}'):.1e}" for dtype in ("fp32", "bf16")]
        differences = [row[f"to_stored_{dtype}"] for dtype in ("fp32", "bf16")]
        same = "; ".join(differences) if any(float(d) for d in differences) else "0"
        reached = accuracy.get(row["provider"])
        lines.append((_exact(row["provider"]), reach, *errors,
                      "" if row["provider"] == "stored" else same,
                      f"{reached} %" if reached else ""))  # fmt: skip
    header = ("mode", "range", "gradient error, fp32", "gradient error, bf16 autocast",
              "difference from the same mode with stored activations (fp32; bf16)",
              "test accuracy on digits")  # fmt: skip
    largest = "".join(dict.fromkeys(f"streams up to {r['largest_stream']}" for r in gradients))
    return md.with_conditions(header, lines, gradients, largest)


def digits_table(rows: Sequence[Row]) -> str:
    rows = md.of_mode(rows, "training")
    lines = [
        (_exact(r["provider"]), f"{r['right']} of {r['images']}", f"{r['accuracy']} %",
         f"{r['seconds']} s", f"{r['cpu_seconds']} s", f"{100 * float(r['waiting_share']):.1f} %")
        for r in rows
    ]  # fmt: skip
    header = ("activations", "correct test images", "test accuracy", "training time",
              "CPU time of the command", "waiting for images")  # fmt: skip
    epochs = "".join(dict.fromkeys(f"epochs: {r['epochs']}; one thread per run" for r in rows))
    return md.with_conditions(header, lines, rows, epochs)
