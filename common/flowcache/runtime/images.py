"""Read pictures as they are seen: upright, as RGB with 8 bits, transparency over white.

Pillow is imported where a file is read: what reads none runs without it.
"""

from __future__ import annotations

import logging
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowcache.errors import UserError, one_line
from flowcache.runtime.files import check_file

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

BACKGROUND = (255, 255, 255)
"""White, as in viewers and browsers; what shows through a transparent pixel."""
LEVELS = (1, 255, 65535)
"""White in images of float or whole numbers: the first of these that no value is above."""


def read_image(path: Path) -> Image.Image:
    """Read an image as RGB as it is seen; of an animated one the first frame.

    It is turned upright as its EXIF data say. Transparency is put over `BACKGROUND`. Grey values
    of 16 bits are scaled; those of float or 32 bits are taken as 0..1, 0..255 or 0..65535, the
    smallest of these ranges that holds all of them (whole numbers: not 0..1).
    """
    from PIL import Image, ImageOps

    check_file(path)
    try:
        with Image.open(path) as image:
            return _as_rgb(ImageOps.exif_transpose(image), path)
    except UserError:
        raise
    except _broken() as error:
        raise _unreadable(path, error) from None


def image_size(path: Path) -> tuple[int, int]:
    """Return height and width of an image as it is seen."""
    from PIL import Image, ImageOps

    check_file(path)
    try:
        with Image.open(path) as image:
            width, height = ImageOps.exif_transpose(image).size
            return height, width
    except _broken() as error:
        raise _unreadable(path, error) from None


def over_background(image: Image.Image) -> Image.Image:
    """Return an RGBA image over `BACKGROUND`, as RGB."""
    from PIL import Image

    whole = Image.new("RGBA", image.size, (*BACKGROUND, 255))
    return Image.alpha_composite(whole, image).convert("RGB")


def _broken() -> tuple[type[BaseException], ...]:
    """Return what Pillow raises for damaged files: a broken PNG is a SyntaxError."""
    from PIL import Image

    return (
        *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError),
        *(AttributeError, NotImplementedError, struct.error, Image.DecompressionBombError),
    )


def _as_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _scaled(image, path)
    if image.mode == "LAB":
        from PIL import ImageCms

        profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None, "nothing is converted in place"
        return converted
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    if seen.getchannel("A").getextrema() != (255, 255):
        logger.info("%s: its transparent pixels are shown over white", path)
    return over_background(seen)


def _scaled(image: Image.Image, path: Path) -> Image.Image:
    """Turn grey values of more than 8 bits into RGB."""
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"{path}: holds values that are not finite: repair or replace the image")
    low, high = float(values.min()), float(values.max())
    white = [level for level in LEVELS if high <= level]
    if not (low >= 0 and white):
        raise UserError(
            f"{path}: its grey values are {low:g} to {high:g}, but must be in 0..1, 0..255 or "
            "0..65535: scale them"
        )
    if image.mode.startswith("I;16"):
        white = [LEVELS[-1]]
    elif image.mode == "I":
        white = [level for level in white if level != 1]
    grey = np.rint(values * (255 / white[0])).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _unreadable(path: Path, error: BaseException) -> UserError:
    reason = "" if "cannot identify" in str(error) else f" ({one_line(error)})"
    return UserError(f"{path}: not an image that can be read{reason}")
