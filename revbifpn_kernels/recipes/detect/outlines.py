"""Outlines of COCO's three forms as run lengths, checked: pycocotools checks nothing.

Polygons that are not finite or far away crash it; if counts do not add up to the image's pixels, it
reads memory beyond the mask.
"""

import math
from typing import Any

from pycocotools import mask as rle

FAR = 4  # how far a polygon may reach beyond an edge, in sides of the image
FEWEST = 6  # numbers of a polygon with an area


class Unfit(Exception):
    """An annotation that is left out; the message is "kind of fault: case"."""


def run_lengths(given: Any, width: int, height: int) -> dict[str, Any]:
    """Run lengths of polygons, of a list of counts, or of counts packed in a string.

    Raises `Unfit` if the outline is malformed, of another image size, or without area.
    """
    size = [height, width]
    if isinstance(given, list):
        polygons = _polygons(given, width, height)
        outline = rle.merge(rle.frPyObjects(polygons, *size)) if polygons else None
    else:
        outline = rle.frPyObjects({"size": size, "counts": _counts(given, size)}, *size)
    if outline is None or not rle.area(outline):
        raise Unfit("outline is empty")
    return outline


def _polygons(given: list, width: int, height: int) -> list[list[float]]:
    limits = [(-FAR * side, (1 + FAR) * side) for side in (width, height)]
    for polygon in given:
        if not isinstance(polygon, list) or not all(map(is_number, polygon)):
            raise Unfit(f"outline is unusable: polygons must be lists of numbers, got {polygon!r}")
        for k, value in enumerate(polygon):
            least, most = limits[k % 2]
            if not least <= value <= most:
                raise Unfit(f"outline is unusable: {value} is far outside of the image")
    return [polygon for polygon in given if len(polygon) >= FEWEST]


def _counts(given: Any, size: list[int]) -> list[int]:
    """Numbers of pixels outside and inside the object in turn, column by column."""
    if not isinstance(given, dict) or not {"size", "counts"} <= given.keys():
        raise Unfit(f"outline is unusable: expected polygons or run lengths, got {given!r:.80}")
    height, width = size
    if given["size"] != size:
        raise Unfit(f"outline is of another size: {given['size']} of {size} rows and columns")
    counts = given["counts"]
    if isinstance(counts, str | bytes):
        counts = _unpacked(counts)
    is_list = isinstance(counts, list)
    if not is_list or not all(is_number(n) and n >= 0 and n == int(n) for n in counts):
        raise Unfit("outline is unusable: counts must be whole numbers from 0 on")
    if sum(counts) != height * width:
        raise Unfit(f"outline is unusable: counts of {sum(counts)} pixels of {height * width}")
    return list(map(int, counts))


def _unpacked(text: str | bytes) -> list[int]:
    """Decodes pycocotools' strings: a character minus "0" has five bits and whether more follow.

    Low bits come first. From the fourth on, numbers are differences to the last but one.
    """
    counts: list[int] = []
    value = shift = 0
    for code in text.encode(errors="surrogatepass") if isinstance(text, str) else text:
        bits = code - ord("0")
        if not 0 <= bits < 64:
            raise Unfit(f"outline is unusable: counts of characters such as {chr(code)!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise Unfit("outline is unusable: its counts end within a number")
    return counts


def is_number(value: Any) -> bool:
    """Whether `value` is a real number that is finite as a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
