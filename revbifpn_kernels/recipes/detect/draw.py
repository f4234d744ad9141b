"""A figure of predictions beside the truth."""

import io
import warnings

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from ..run.order import Key
from .data import Data, masks_of
from .evaluate import Found

NAME = "predictions.png"
COLUMNS = 4
LEAST_SCORE = 0.5  # of what is drawn
TRUTH, PREDICTED = "white", "#ffb347"
EDGE = [withStroke(linewidth=2.2, foreground="#000000b0")]  # visible on any photograph


def grid(data: Data, found: dict[int, Found], count: int) -> bytes:
    """A PNG of the first evaluated images: true boxes dashed white, predicted ones orange."""
    numbers = sorted(found)[:count]
    rows = max(1, -(-len(numbers) // COLUMNS))
    figure = Figure(figsize=(3 * COLUMNS, 3.2 * rows), layout="constrained")
    for axes in figure.subplots(rows, COLUMNS, squeeze=False).flat:
        axes.set_axis_off()
    for axes, number in zip(figure.axes, numbers, strict=False):
        _draw(axes, data, number, found[number])
    figure.suptitle(
        f"dashed white: truth; orange: predicted with a score of {LEAST_SCORE} or more"
        + ("" if any((found[k]["scores"] >= LEAST_SCORE).any() for k in numbers) else " (none)"),
        fontsize=10,
    )
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # in names of classes
        figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


def _draw(axes, data: Data, number: int, found: Found) -> None:
    image, annotated, _ = data.val.load(Key(0, number))
    extent = (0, annotated.width, annotated.height, 0)  # boxes count from a pixel's edge
    axes.imshow(image, extent=extent)
    shown = [k for k, score in enumerate(found["scores"]) if score >= LEAST_SCORE]
    if "outlines" in found:
        masks = masks_of([found["outlines"][k] for k in shown], image.size)
        shade = (masks.sum(0) > 0).float().numpy()
        axes.imshow(shade, cmap="autumn", alpha=0.5 * shade, extent=extent)
    for box, label in zip(annotated.boxes, annotated.labels, strict=True):
        _box(axes, box, TRUTH, "--")
        _name(axes, box[2], box[3], data.classes[label - 1], TRUTH, ha="right", va="top")
    for k in shown:
        box = found["boxes"][k].tolist()
        _box(axes, box, PREDICTED, "-")
        name = f"{data.classes[int(found['labels'][k]) - 1]} {float(found['scores'][k]):.2f}"
        _name(axes, *box[:2], name, PREDICTED, va="bottom")


def _name(axes, x: float, y: float, text: str, colour: str, **alignment) -> None:
    # $ would begin a formula.
    axes.text(
        x, y, text.replace("$", r"\$"), color=colour, fontsize=7, path_effects=EDGE, **alignment
    )


def _box(axes, box, colour: str, style: str) -> None:
    left, top, right, bottom = box
    place, sides = (left, top), (right - left, bottom - top)
    look = {"fill": False, "edgecolor": colour, "linestyle": style, "path_effects": EDGE}
    axes.add_patch(Rectangle(place, *sides, **look))
