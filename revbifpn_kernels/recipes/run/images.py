"""Opens an image file of any kind as RGB or grey pixels, or says why it cannot be used."""

import stat
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# JPEG files of more pixels are decoded at 1/2, 1/4 or 1/8 of their sides.
DRAFT_PIXELS = 16_000_000


class BadImage(Exception):
    """A file that cannot be trained on; the message says why."""


def open_image(
    path: str | Path,
    mode: str = "RGB",
    side: int = 224,
    is_turned: Callable[[Image.Image], bool] = lambda stored: True,
) -> Image.Image:
    """Returns the first frame of a file, upright, as "RGB" or "L".

    Deep greys (16 bits, floats) are scaled to eight bits, colour spaces and palettes converted.
    JPEGs of many pixels are reduced while they are decoded, to no less than four times `side`.
    An image for which `is_turned` is false is returned as it is stored, not upright.

    Raises:
        BadImage: Damaged, truncated, not an image, not a regular file, or of more than 179 million
            pixels, which Pillow refuses to decode.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # opening a pipe would wait for ever
            raise BadImage("not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, and large images below the limit
            with Image.open(path) as image:
                return _decoded(image, mode, side, is_turned)
    except BadImage:
        raise
    except Exception as error:  # Pillow's readers raise all kinds, down to struct.error
        text = getattr(error, "strerror", None) or str(error).replace(str(path), "it")
        raise BadImage(f"{type(error).__name__}: {text.partition(chr(10))[0]}") from error


def _decoded(image: Image.Image, mode: str, side: int, is_turned) -> Image.Image:
    if image.width * image.height > DRAFT_PIXELS:
        image.draft(None, (4 * side, 4 * side))
    image.load()
    upright = ImageOps.exif_transpose(image) if is_turned(image) else image
    if upright.mode.startswith(("I", "F")):
        upright = _eight_bits(upright)
    elif upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    return upright.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep greys as "L": integers beyond 255 are 16-bit, floats up to 1 are shares of white."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise BadImage("values that are not finite")
    if image.mode.startswith("I"):
        is_deep = image.mode != "I" or values.max() > 255
        values = values * (255 / 65535) if is_deep else values
    elif values.max() <= 1:
        values = values * 255
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
