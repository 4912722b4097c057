"""Pictures of any kind as the RGB that a processor takes: the one reader of all commands."""

from __future__ import annotations

import base64
import binascii
import contextlib
import importlib
import io
import math
import struct
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".ico", ".avif")
MAX_PIXELS = 178_956_970  # twice Pillow's own warning: where it speaks of a decompression bomb
_KEYS = ("bytes", "data", "image", "base64", "b64_json", "path", "file_name", "filename", "url", "src")  # of objects that hold a picture


class UnreadableError(ValueError):
    """A picture that cannot be had.

    Attributes:
        kind: ``missing``, ``empty``, ``not a picture``, ``broken`` or ``too large``.
    """

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(words)
        self.kind = kind


class _Setting:
    """A setting of Pillow, which holds for the whole process, held at a value for as long as any thread is inside."""

    def __init__(self, module: str, name: str, value: Any) -> None:
        self.module, self.name, self.value = module, name, value
        self.lock, self.inside, self.before = threading.Lock(), 0, None

    def __enter__(self) -> None:
        module = importlib.import_module(self.module)
        with self.lock:
            if not self.inside:
                self.before = getattr(module, self.name)
                setattr(module, self.name, self.value)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                setattr(importlib.import_module(self.module), self.name, self.before)


whole_pictures = _Setting("PIL.ImageFile", "LOAD_TRUNCATED_IMAGES", False)
"""Within it a truncated picture is an error, though other packages (lmms-eval) have Pillow fill it up in grey."""
_any_size = _Setting("PIL.Image", "MAX_IMAGE_PIXELS", None)  # Pillow's own limit would come before ``max_pixels``


def read_picture(source: str | Path | bytes | Image, max_pixels: int = MAX_PIXELS) -> Image:
    """The first frame, upright by its EXIF orientation, in RGB.

    Palettes, CMYK, greyscale and transparency are converted as Pillow does; 16 bits a channel are scaled to 8 rather than clipped. Metadata
    that are damaged in a PNG, WebP or JPEG file whose picture is whole are left out.

    Args:
        source: a file, what stands in one, or a picture of Pillow, which is not changed.
        max_pixels: more than so many are refused before anything is decoded.

    Raises:
        UnreadableError: says of which kind.
    """
    if not isinstance(source, str | Path | bytes):
        with _named_errors():
            return _rgb(source)
    if not isinstance(source, bytes):
        _check_file(Path(source))
    elif not source:
        raise UnreadableError("empty", "there are no bytes")
    try:
        return _decode(source, max_pixels)
    except UnreadableError as error:
        if error.kind == "too large":
            raise
        with contextlib.suppress(OSError, UnreadableError):
            content = _without_metadata(source if isinstance(source, bytes) else Path(source).read_bytes())
            if content is not None:
                return _decode(content, max_pixels)
        raise


def find_picture(value: Any, folder: Path) -> Path | bytes | Image:
    """Returns the part that ``read_picture`` takes of what a cell of a table or an entry of a file holds.

    Args:
        value: bytes; a file's path, a data URL or base64 as text; a picture of Pillow; numbers 0..255: a file's bytes, or pixels
            ``[H, W]`` or ``[H, W, 1 | 3 | 4]``; Hugging Face's ``{"bytes", "path"}`` and objects like it; a list of any of them, of
            which the first is meant.
        folder: that paths are relative to.

    Raises:
        UnreadableError: it is none of them; says what it is.
    """
    try:
        return _find(value, folder)
    except RecursionError:
        raise UnreadableError("not a picture", "lists or objects that are nested too deeply") from None


def _find(value: Any, folder: Path) -> Path | bytes | Image:
    if value is None:
        raise UnreadableError("empty", "there is no picture, but null")
    if isinstance(value, bytes | bytearray | memoryview):
        return _binary(bytes(value))
    if isinstance(value, str):
        return _text(value, folder)
    if isinstance(value, Path):
        return folder / value
    if isinstance(value, dict):
        inside = next((value[key] for key in _KEYS if value.get(key) is not None and not _is_empty(value[key])), None)
        if inside is not None:
            return _find(inside, folder)
        if any(key in value for key in _KEYS):
            raise UnreadableError("empty", "there are neither bytes nor a path")
        raise UnreadableError("not a picture", f"an object with the keys {', '.join(map(str, value))[:80] or 'none'}: no bytes, no path")
    if hasattr(value, "tolist") and not hasattr(value, "getexif"):  # of numpy or torch
        value = value.tolist()
    if isinstance(value, list | tuple):
        return _first(list(value), folder)
    if hasattr(value, "getexif"):
        return value
    raise UnreadableError("not a picture", f"neither bytes nor a path: {str(value)[:60]} ({type(value).__name__})")


def _is_empty(value: Any) -> bool:
    return isinstance(value, str | bytes | list) and not value


def _first(values: list[Any], folder: Path) -> Path | bytes | Image:
    """Of a list: the picture that its numbers are, or the first of its pictures."""
    if values and all(isinstance(each, tuple) and len(each) == 2 and isinstance(each[0], str) for each in values):
        return _find(dict(values), folder)  # a map of Parquet
    if is_numbers(values):
        return _of_numbers(values)
    if all(each is None for each in values):
        raise UnreadableError("empty", "there is no picture, but an empty list")
    return _find(next(each for each in values if each is not None), folder)


def is_numbers(value: Any) -> bool:
    """Returns whether a list is one of whole numbers, or of lists of them: one picture, not several."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, int) and not isinstance(value, bool)


def _of_numbers(values: list[Any]) -> bytes | Image:
    import numpy as np
    from PIL import Image

    try:
        array = np.asarray(values)
        fits = array.dtype.kind in "ui" and 0 <= array.min() and array.max() <= 255
    except (ValueError, TypeError):
        fits = False
    if not fits:
        raise UnreadableError("not a picture", f"numbers that are no bytes: {str(values)[:60]}")
    if array.ndim == 1:
        return bytes(values)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)):
        return Image.fromarray(array.astype(np.uint8))
    raise UnreadableError("not a picture", f"pixels must be [H, W] or [H, W, 1 | 3 | 4], got {list(array.shape)}")


def _text(text: str, folder: Path) -> Path | bytes:
    if not text.strip():
        raise UnreadableError("empty", "there is no picture, but an empty text")
    scheme, mark, rest = text.partition(":")
    if mark and scheme.lower() == "data":
        header, _, body = rest.partition(",")
        content = urllib.parse.unquote_to_bytes(body)
        content = (_of_base64(content) or b"") if header.lower().endswith(";base64") else content
        if not content:
            raise UnreadableError("not a picture", f"a data URL without a picture in base64: {text[:40]}")
        return content
    if mark and scheme.lower() == "file" and rest.startswith("//"):
        text = urllib.parse.unquote(urllib.parse.urlsplit(text).path)
    elif mark and rest.startswith("//"):
        raise UnreadableError("not a picture", f"an address, and nothing is downloaded: {text[:120]}")
    path = folder / text
    try:
        if path.exists():
            return path
    except (OSError, ValueError):
        pass  # too long for a name
    decoded = _of_base64(text.encode("utf-8", "replace"))
    if decoded is not None and _is_known(decoded):
        return decoded
    if len(text) > 255:
        raise UnreadableError("not a picture", f"a text of {len(text)} characters that names no file and is no picture in base64")
    raise UnreadableError("missing", f"no such file: {path}")


def _binary(content: bytes) -> bytes:
    """The bytes, or what stands in them as base64."""
    if content.isascii() and not _is_known(content):
        text = content[5:].partition(b",")[2] if content[:5].lower() == b"data:" else content
        inside = _of_base64(text)
        if inside is not None and _is_known(inside):
            return inside
    return content


def _of_base64(text: bytes) -> bytes | None:
    """Returns the bytes of a text in base64, whose last two letters may be those of URLs and whose padding may be missing; else None."""
    letters = b"".join(text.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except binascii.Error:
        return None


def _is_known(content: bytes) -> bool:
    """Returns whether a picture's file begins so."""
    from PIL import Image

    try:
        with _any_size, Image.open(io.BytesIO(content)):
            return True
    except Exception:  # Pillow raises many kinds
        return _without_metadata(content) is not None


def _check_file(file: Path) -> None:
    try:
        if not file.exists():
            raise UnreadableError("missing", "no such file")
        if not file.is_file():
            raise UnreadableError("not a picture", "not a file")
        if file.stat().st_size == 0:
            raise UnreadableError("empty", "the file is empty")
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UnreadableError("missing", f"the file cannot be looked at ({error.strerror})") from error


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    """UnreadableError instead of the many kinds that Pillow raises."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except UnreadableError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableError("not a picture", "not a picture that can be read (cannot identify its format)") from error
    except Exception as error:
        raise UnreadableError("broken", f"not a picture that can be read ({error})") from error


def _decode(source: str | Path | bytes, max_pixels: int) -> Image:
    from PIL import Image

    with _named_errors():
        with _any_size:
            opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        with opened as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise UnreadableError("too large", f"{width} x {height} pixels are more than {max_pixels}")
            return _rgb(picture)


def _rgb(picture: Image) -> Image:
    from PIL.Image import Transpose

    with whole_pictures:
        picture.load()
    turns = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
             6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}  # fmt: skip
    turn = turns.get(_orientation(picture))
    if picture.mode == "F":
        raise UnreadableError("not a picture", "its pixels are floating point numbers, whose white is not known")
    if picture.mode.startswith("I"):  # 16 bits, which convert() would clip
        deep = picture.convert("I")
        low, high = deep.getextrema()
        assert not isinstance(low, tuple) and not isinstance(high, tuple)  # of one band
        if low < 0 or high > 65535:
            raise UnreadableError("not a picture", f"its pixels are numbers of 32 bits ({low} to {high}), whose white is not known")
        picture = deep.point(lambda value: value / 256).convert("L")
    elif picture.mode == "P":  # straight to RGB, Pillow warns of transparent colours
        picture = picture.convert("RGBA")
    picture = picture.convert("RGB")
    return picture if turn is None else picture.transpose(turn)


def _orientation(picture: Image) -> int:
    """EXIF's, 1 to 8; 1 where there is none, or it cannot be read."""
    try:
        value = picture.getexif().get(0x0112, 1)
        return int(value) if math.isfinite(value) else 1
    except Exception:  # damaged EXIF raises many kinds, and the picture is whole
        return 1


def _without_metadata(content: bytes) -> bytes | None:
    """A PNG, WebP or JPEG file without what its pixels do not need; None: of another format, or nothing could be left out."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        parts = [content[:8], *_png_chunks(content)]
    elif content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        body = b"".join(_webp_chunks(content))
        parts = [b"RIFF", struct.pack("<I", 4 + len(body)), b"WEBP", body]
    elif content.startswith(b"\xff\xd8\xff"):
        parts = [content[:2], *_jpeg_segments(content)]
    else:
        return None
    plain = b"".join(parts)
    return plain if plain != content else None


def _png_chunks(content: bytes) -> Iterator[bytes]:
    """Those that a decoder must know, and transparency; up to the end of the picture."""
    offset = 8
    while offset + 8 <= len(content):
        (length,) = struct.unpack(">I", content[offset : offset + 4])
        kind, chunk = content[offset + 4 : offset + 8], content[offset : offset + 12 + length]
        if kind[:1].isupper() or kind == b"tRNS":
            yield chunk
        if kind == b"IEND":
            return
        offset += 12 + length


def _webp_chunks(content: bytes) -> Iterator[bytes]:
    offset = 12
    while offset + 8 <= len(content):
        kind, (length,) = content[offset : offset + 4], struct.unpack("<I", content[offset + 4 : offset + 8])
        chunk = content[offset : offset + 8 + length + length % 2]
        if kind == b"VP8X":  # its flags say which of the others are there
            yield chunk[:8] + bytes([chunk[8] & ~0b0010_1100]) + chunk[9:]
        elif kind not in (b"EXIF", b"XMP ", b"ICCP"):
            yield chunk
        offset += 8 + length + length % 2


def _jpeg_segments(content: bytes) -> Iterator[bytes]:
    """All but comments and APP1 to APP13 and APP15: what is left of these says how colours are meant."""
    offset = 2
    while offset + 4 <= len(content) and content[offset] == 0xFF and content[offset + 1] != 0xDA:
        (length,) = struct.unpack(">H", content[offset + 2 : offset + 4])
        if content[offset + 1] not in (*range(0xE1, 0xEE), 0xEF, 0xFE):
            yield content[offset : offset + 2 + length]
        offset += 2 + length
    yield content[offset:]
