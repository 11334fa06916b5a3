"""PNG, JPEG, BMP, TIFF, WebP and GIF: recognised by content, decoded within limits."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, cast

from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from chestxray_covid.errors import ImageError
from chestxray_covid.pixels import (
    DECODE_ERRORS,
    MAX_STREAM_BYTES,
    ImageFacts,
    check_jpeg,
    check_size,
    is_sideways,
    orientation,
    reason,
    to_grey,
)

# Plugins are called by class: `Image.open` would warn at Pillow's own limit before the size can be
# looked at, and hiding a warning (`warnings.catch_warnings`) is not thread-safe.
_PLUGINS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"BM", BmpImageFile),
    (b"GIF8", GifImageFile),
    (b"RIFF", WebPImageFile),
    (b"II*\0", TiffImageFile),
    (b"MM\0*", TiffImageFile),
    (b"II+\0", TiffImageFile),
    (b"MM\0+", TiffImageFile),
)
# What people pass by mistake, by its first bytes (in lower case, without leading white space).
_LOOKALIKES = (
    (b"<!doctype html", "is an HTML page, perhaps the error page of a download"),
    (b"<html", "is an HTML page, perhaps the error page of a download"),
    (b"<?xml", "is an XML document"),
    (b"<svg", "is an SVG drawing"),
    (b"{", "looks like JSON text"),
    (b"version https://git-lfs", "is a Git LFS pointer; fetch the file with git lfs pull"),
    (b"%pdf", "is a PDF document"),
    (b"pk\x03\x04", "is a zip archive; unpack it first"),
    (b"\x1f\x8b", "is gzip-compressed; unpack it first"),
    (b"\0\x05\x16\x07", "is a macOS resource fork (._ file), not the image itself"),
    (b"\0\0\0\x0cjp  ", "is a JPEG 2000 image"),
    (b"\xffo\xffq", "is a JPEG 2000 image"),
)


def decode_image(
    file: io.BufferedIOBase,
    head: bytes,
    name: str,
    min_size: tuple[int, int] | None,
    max_pixels: int,
) -> tuple[Image.Image, ImageFacts, bool]:
    """Return the first frame of an encoded image as 8-bit grey, its facts, and if there are more.

    Args:
        file: Seekable, at its start.
        head: Its first bytes, by which the format is recognised.
        name: Names the file in messages.
        min_size: ``(width, height)`` below which a JPEG must not be reduced; ``None``: decode all.
        max_pixels: Larger images are refused from their header.

    Raises:
        ImageError: If it is of no known format, damaged or too large.
    """
    plugin = next((kind for magic, kind in _PLUGINS if head.startswith(magic)), None)
    if plugin is None:
        raise ImageError(
            f"{name} {_looks_like(head, name)}. Expected PNG, JPEG, BMP, TIFF, WebP, GIF or DICOM."
        )
    try:
        image = plugin(cast(IO[bytes], file))
        size = image.size
        check_size(size, name, max_pixels)
        if isinstance(image, TiffImageFile):
            # TIFF 6.0, section 15: libtiff allocates whole tiles, which may exceed the image.
            tile = (int(image.tag_v2.get(322, 1)), int(image.tag_v2.get(323, 1)))
            check_size(tile, f"A tile of {name}", max_pixels)
        if isinstance(image, JpegImageFile):
            start = file.tell()
            length = file.seek(0, io.SEEK_END)  # reading more would reserve more
            file.seek(0)
            check_jpeg(file.read(min(length, MAX_STREAM_BYTES)), name, max_pixels)
            file.seek(start)
            sideways = is_sideways(orientation(image))
            # Either way luma as it is stored; "L" would lose what says whether it is coloured.
            mode = "YCbCr" if _holds_ycbcr(image) else "L"
            image.draft(mode, min_size[::-1] if min_size and sideways else min_size)
        grey, facts = to_grey(image, name, size)
    except ImageError:
        raise
    except DECODE_ERRORS as error:
        raise ImageError(
            f"{name} is damaged, or not a {plugin.format} that can be read: {reason(error)}"
        ) from error
    return grey, facts, _has_more_frames(image)


def open_header(path: Path) -> ImageFile | None:
    """Return an encoded image of which only the header was read, ``None`` if there is no such.

    Its ``format``, ``size``, ``mode`` and, of a JPEG, ``quantization`` are there without decoding.
    """
    try:
        data = io.BytesIO(path.read_bytes())
        plugin = next(kind for magic, kind in _PLUGINS if data.getvalue().startswith(magic))
        return plugin(cast(IO[bytes], data))
    except (StopIteration, *DECODE_ERRORS):
        return None


def _holds_ycbcr(image: JpegImageFile) -> bool:
    """Return whether three components are luma and chroma, by the rules of libjpeg's jdapimin.c."""
    if image.mode != "RGB" or "jfif" in image.info:
        return image.mode == "RGB"
    if "adobe" in image.info:
        return image.info.get("adobe_transform") == 1
    return [chr(part[0]) for part in image.layer] != ["R", "G", "B"]


def _looks_like(head: bytes, name: str) -> str:
    if not head:
        return "is empty"
    start = head.lstrip().lower()
    for magic, meaning in _LOOKALIKES:
        if start.startswith(magic):
            return meaning
    if head[4:8] == b"ftyp":
        return "is a HEIF, AVIF or video file"
    if name.lower().endswith((".dcm", ".dicom")):
        return 'is named like a DICOM file but has no "DICM" at byte 128'
    if not any(head):
        return "is all zeros, perhaps the rest of a broken copy"
    return f"is not an image of a known format (it begins with {head[:8]!r})"


def _has_more_frames(image: Image.Image) -> bool:
    # Not `n_frames`: counting walks through the whole file.
    try:
        return bool(getattr(image, "is_animated", False))
    except DECODE_ERRORS:
        return False
