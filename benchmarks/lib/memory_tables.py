"""Tables of training memory, from the rows of memory.csv and of published.csv."""

from collections.abc import Sequence

from . import markdown as md
from .record import Row

SLOPE = "slope between batches of 2 and 4"
BUDGETS_GIB = (24, 80)
Images = dict[tuple[str, ...], Row]


def images_of(rows: Sequence[Row]) -> Images:
    """What was counted per image, by network, provider and dtype."""
    return md.by(md.of_mode(rows, "per image"), "op", "provider", "dtype")


def gigabytes(row: Row | None) -> float | None:
    mib = md.number(row, "peak_mib")
    return None if mib is None else mib * md.MIB / md.GB


def rival_ratio(rows: Sequence[Row], dtype: str = "fp32") -> float | None:
    """Memory per image of EfficientNet-B7 over that of RevBiFPN-S6, each at its own side."""
    images = images_of(rows)
    rival = images.get(("efficientnet_b7", "stored", dtype))
    return md.ratio(gigabytes(rival), gigabytes(images.get(("revbifpn_s6", "reversible", dtype))))


def published_value(published: Sequence[Row], op: str, quantity: str) -> str:
    return next((r["value"] for r in published if (r["op"], r["quantity"]) == (op, quantity)), "")


def claims_table(rows: Sequence[Row], published: Sequence[Row]) -> str:
    """The paper's claims beside what was counted."""
    images, lines = images_of(rows), []
    for dtype, name in md.DTYPE_NAMES.items():
        ours = images.get(("revbifpn_s6", "reversible", dtype))
        if ours is None or rival_ratio(rows, dtype) is None:
            continue
        times = published_value(published, "revbifpn_s6", f"ratio to efficientnet_b7, {dtype}")
        size = published_value(published, "revbifpn_s6", f"GB per image, {dtype}")
        rival = f"EfficientNet-B7 over RevBiFPN-S6, memory per image, {name}"
        lines.append((rival, f"{rival_ratio(rows, dtype):.1f}", times))
        lines.append((f"RevBiFPN-S6, GB per image, {name}", f"{gigabytes(ours):.3f}", size))
    depth = md.by(md.of_mode(rows, "depth"), "provider", "extra_silos")
    silos = sorted(int(extra) for provider, extra in depth if provider == "reversible")
    if len(silos) > 1:
        few, many = (md.number(depth["reversible", str(silos[k])], "held_mib") for k in (0, -1))
        per_silo = f"{(many - few) * md.MIB / (silos[-1] - silos[0]):.0f}"
        lines.append(("RevBiFPN-S0, bytes held per image and added silo", per_silo, "0"))
    used = md.of_mode(rows, "per image", "depth")
    header = ("", "counted", "the paper (arXiv 2206.14098)")
    return md.with_conditions(header, lines, used)


def image_table(rows: Sequence[Row]) -> str:
    images = images_of(rows)
    lines = []
    for name in sorted({op for op, _, _ in images}):
        first = images.get((name, "stored", "fp32"))
        sizes = [
            md.cell(gigabytes(images.get((name, provider, dtype))), 3)
            for dtype in md.DTYPE_NAMES
            for provider in ("reversible", "stored")
        ]
        if first:
            lines.append(
                (md.network(name), md.side_of(first), md.cell(md.number(first, "gmacs")), *sizes)
            )
    header = "network,side,GMACs,reversible,stored,reversible bf16,stored bf16".split(",")
    return md.with_conditions(header, lines, list(images.values()), SLOPE, "GB at the peak")


def models_table(rows: Sequence[Row], published: Sequence[Row]) -> str:
    images, lines = images_of(rows), []
    for name in sorted({op for op, _, _ in images if op.startswith("revbifpn")}):
        found = [images.get((name, "reversible", dtype)) for dtype in md.DTYPE_NAMES]
        stored = images.get((name, "stored", "fp32"))
        if not (all(found) and stored):
            continue
        pairs = [" / ".join(md.cell(md.number(row, f"{k}_mib"), 1) for k in ("held", "peak"))
                 for row in (*found, stored)]  # fmt: skip
        counts = [f"{int(found[0][column]):,}" for column in ("parameters", "published_macs")]
        top1 = published_value(published, name, "top-1 accuracy, %")
        lines.append((name.split("_")[1].upper(), *counts, md.side_of(stored), *pairs, top1))
    header = ("", "parameters", "MACs, as published", "side", "held / peak MiB per image, fp32",
              "bf16 autocast", "stored activations, fp32", "top-1 (the paper's)")  # fmt: skip
    used = [row for (op, *_), row in images.items() if op.startswith("revbifpn")]
    return md.with_conditions(header, lines, used, SLOPE)


def depth_table(rows: Sequence[Row]) -> str:
    rows = md.of_mode(rows, "depth")
    found = md.by(rows, "extra_silos", "provider")
    lines = []
    for extra in sorted({int(silos) for silos, _ in found}):
        cells = [
            md.cell(md.number(found.get((str(extra), provider)), column), 2)
            for provider in ("reversible", "checkpoint", "stored")
            for column in ("held_mib", "peak_mib")
        ]
        lines.append((extra, *cells))
    header = ("extra silos", "reversible: held MiB per image", "peak", "checkpoint: held", "peak",
              "stored: held", "peak")  # fmt: skip
    return md.with_conditions(header, lines, rows, "slope between batches of 128 and 256")


def depth_caption(rows: Sequence[Row]) -> str:
    """The conditions of the figure of memory against depth."""
    rows = md.of_mode(rows, "depth")
    if not rows:
        return ""
    side = md.side_of(rows[0])
    return (
        f"RevBiFPN-S0 at {side}×{side} pixels, float32; peak per image on top of parameters, their "
        "gradients and momentum, counted on fake tensors, so it holds for every machine; "
        f"torch {rows[-1]['torch']}, {rows[-1]['date']}, `{rows[-1]['command']}`."
    )


def side_table(rows: Sequence[Row]) -> str:
    rows = md.of_mode(rows, "side")
    sides = sorted({md.side_of(row) for row in rows})
    found = {(row["op"], row["provider"], md.side_of(row)): gigabytes(row) for row in rows}
    lines = [
        (
            md.network(op),
            md.mode(provider),
            *(md.cell(found.get((op, provider, s)), 3) for s in sides),
        )
        for op, provider in sorted({key[:2] for key in found})
    ]
    header = ("network", "mode", *(f"{side} px" for side in sides))
    return md.with_conditions(header, lines, rows, "GB per image")


def largest_table(rows: Sequence[Row]) -> str:
    """How many images train in a budget, parameters and optimizer in it."""
    lines = []
    for (op, provider, dtype), row in sorted(images_of(rows).items()):
        if op not in ("revbifpn_s6", "efficientnet_b7", "hrnet_w48"):
            continue
        constant, peak = md.number(row, "constant_mib"), md.number(row, "peak_mib")
        fits = [max(0, int((1024 * gib - constant) / peak)) for gib in BUDGETS_GIB]
        lines.append(
            (md.network(op), md.mode(provider), md.side_of(row), md.DTYPE_NAMES[dtype], *fits)
        )
    header = ("network", "mode", "side", "dtype", *(f"images in {gib} GiB" for gib in BUDGETS_GIB))
    return md.with_conditions(header, lines, md.of_mode(rows, "per image"))


def detection_table(rows: Sequence[Row]) -> str:
    rows, lines = md.of_mode(rows, "detection"), []
    for row in rows:
        name, comma, rest = row["op"].partition(",")
        sizes = f"{int(row['parameters']):,}", row["held_mib"], row["peak_mib"]
        lines.append((md.network(name) + comma + rest, *sizes))
    header = ("backbone", "parameters", "held MiB per image", "peak MiB per image")
    return md.with_conditions(header, lines, rows, SLOPE)


def check_table(rows: Sequence[Row]) -> str:
    """Real steps beside the counts of the same."""
    counted, real, lines = images_of(rows), md.of_mode(rows, "real"), []
    for row in real:
        count = counted.get((row["op"], row["provider"], row["dtype"]))
        sizes = [md.cell(md.number(r, c)) for c in ("held_mib", "peak_mib") for r in (count, row)]
        names = md.network(row["op"]), md.mode(row["provider"]), md.DTYPE_NAMES[row["dtype"]]
        lines.append((*names, row["device"], *sizes, row.get("note", "")))
    header = ("network,mode,dtype,device,held MiB per image: counted,real,peak: counted,real,"
              "").split(",")  # fmt: skip
    return md.with_conditions(header, lines, real)


def all_tables(rows: Sequence[Row]) -> str:
    """All of a run, for the terminal."""
    parts = (image_table, depth_table, side_table, detection_table, check_table)
    return "\n".join(text for text in (part(rows) for part in parts) if text)
