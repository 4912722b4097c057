"""Pictures of any kind as the RGB that a processor takes."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".ico", ".avif")
MAX_PIXELS = 178_956_970  # twice Pillow's own warning: where it speaks of a decompression bomb
_opening = threading.Lock()


class UnreadableError(ValueError):
    """A picture that cannot be had.

    Attributes:
        kind: ``missing``, ``empty``, ``not a picture``, ``broken`` or ``too large``.
    """

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(words)
        self.kind = kind


def _open(source: str | Path | bytes) -> Image:
    """Without Pillow's own limit, which holds for the whole process and would come before ``max_pixels``."""
    from PIL import Image

    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def read_picture(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> Image:
    """The first frame, upright by its EXIF orientation, in RGB.

    Palettes, CMYK, greyscale and transparency are converted as Pillow does; 16 bits a channel are scaled to 8 rather than clipped.

    Args:
        source: a file, or what stands in one.
        max_pixels: more than so many are refused before anything is decoded.

    Raises:
        UnreadableError: says of which kind.
    """
    from PIL import ImageOps, UnidentifiedImageError

    if not isinstance(source, bytes):
        file = Path(source)
        if not file.exists():
            raise UnreadableError("missing", "no such file")
        if not file.is_file():
            raise UnreadableError("not a picture", "not a file")
        if file.stat().st_size == 0:
            raise UnreadableError("empty", "the file is empty")
    elif not source:
        raise UnreadableError("empty", "there are no bytes")
    try:
        with _open(source) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise UnreadableError("too large", f"{width} x {height} pixels are more than {max_pixels}")
            if picture.mode == "F":
                raise UnreadableError("not a picture", "its pixels are floating point numbers, whose white is not known")
            if picture.mode.startswith("I"):  # 16 bits, which convert() would clip
                picture = picture.convert("I").point(lambda value: value / 256).convert("L")
            return ImageOps.exif_transpose(picture).convert("RGB")
    except UnreadableError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableError("not a picture", "not a picture that can be read (cannot identify its format)") from error
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise UnreadableError("broken", f"not a picture that can be read ({error})") from error
