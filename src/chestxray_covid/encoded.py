"""PNG, JPEG, BMP, TIFF, WebP and GIF: recognised by content, decoded within limits."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from chestxray_covid.errors import ImageError, check_resources
from chestxray_covid.pixels import (
    DECODE_ERRORS,
    MAX_STREAM_BYTES,
    ImageFacts,
    check_jpeg,
    check_size,
    is_sideways,
    orientation,
    picture,
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


# Raw modes of several channels of 16 bits, of which Pillow keeps the high byte alone.
_DEEP_CHANNELS = re.compile("(LA|RGB|RGBA|RGBX);16([BLN])")
# Order of the bytes in them → the order in which Pillow takes the low byte for the high one.
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
# Raw modes of a PNG in which Pillow does not find the level that is transparent (tRNS), for it
# keeps that as the file has it → what a level is multiplied by as it is decoded.
_LEVELS = {"L;2": 85, "L;4": 17, "I;16B": 1, "RGB;16B": 1}
# Raw modes of a single channel, signed or float, in either order of the bytes.
_EITHER_ORDER = re.compile("([IF];(?:16|32))B?([SF])")
# Where streams come from, and what they raise that break, beside errors of Python's own.
_BREAKS = (
    *(("http.client", "HTTPException"), ("urllib3.exceptions", "HTTPError")),
    *(("lzma", "LZMAError"), ("tarfile", "TarError"), ("zipfile", "BadZipFile"), ("zlib", "error")),
)


class Stream(Protocol):
    """An open file, or whatever else gives bytes."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, at most so many."""
        ...  # pragma: no cover - a declaration


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
        data = b""
        if plugin is JpegImageFile:  # whose header is many small reads
            length = file.seek(0, io.SEEK_END)  # reading more would reserve more
            file.seek(0)
            data = file.read(min(length, MAX_STREAM_BYTES))
            file = io.BytesIO(data)
        image = plugin(cast(IO[bytes], file))
        size = image.size
        check_size(size, name, max_pixels)
        if isinstance(image, TiffImageFile):
            # TIFF 6.0, section 15: libtiff allocates whole tiles, which may exceed the image.
            tile = (int(image.tag_v2.get(322, 1)), int(image.tag_v2.get(323, 1)))
            check_size(tile, f"A tile of {name}", max_pixels)
        if isinstance(image, JpegImageFile) and check_jpeg(data, name, max_pixels):
            sideways = is_sideways(orientation(image))
            # As it is stored; "L" would lose what says whether it is coloured.
            mode = "YCbCr" if _holds_ycbcr(image) else image.mode
            image.draft(mode, min_size[::-1] if min_size and sideways else min_size)
        grey, facts = to_grey(_whole_depth(image, file, name), name, size)
    except ImageError:
        raise
    except DECODE_ERRORS as error:
        raise ImageError(
            f"{name} is damaged, or not a {plugin.format} that can be read: {reason(error, name)}. "
            "Fetch or save it again."
        ) from error
    return grey, facts, _has_more_frames(image)


def with_whole_depth(image: Image.Image, name: str) -> Image.Image:
    """Return what Pillow has opened but not loaded as its file has it, any other image as it is.

    Pillow keeps 8 bits of several channels of 16, and takes some numbers of a TIFF for others.

    Raises:
        ImageError: If bits would be lost.
    """
    if not isinstance(image, PngImageFile | TiffImageFile) or not image.tile:
        return image
    if isinstance(image, PngImageFile) and image.tell():  # drawn over the frames before it
        return image
    if (file := cast(io.BufferedIOBase | None, image.fp)) is None:
        return image
    own = _opened_again(image, file)
    found = _whole_depth(own, file, name)
    if own.tile == image.tile:  # nothing to mend
        return image
    found.load()
    image.load()  # as for any other, which closes its file
    return found


def _opened_again(image: ImageFile, file: io.BufferedIOBase) -> ImageFile:
    """Return an image that is still to be decoded, at the same page of its file."""
    file.seek(0)
    own = type(image)(cast(IO[bytes], file))
    own.seek(image.tell())
    return own


def _whole_depth(image: ImageFile, file: io.BufferedIOBase, name: str) -> Image.Image:
    """Return an image scaled to 8 bits if Pillow would lose depth or opacity, else as it is."""
    args = image.tile[0].args if image.tile else None
    rawmode = str(args[0] if isinstance(args, tuple) else args)
    deep = _DEEP_CHANNELS.fullmatch(rawmode)
    if isinstance(image, TiffImageFile) and len(image.getbands()) == 1:
        return _true_values(image, rawmode)
    if isinstance(image, TiffImageFile):
        depth = max(np.ravel(image.tag_v2.get(258, 1)))
        # TIFF 6.0, tag 284: 2 is a plane per channel. Of grey and opacity Pillow reads the first.
        planar = image.tag_v2.get(284) == 2 and (depth > 8 or image.mode in ("LA", "La"))
        if planar or (depth > 8 and deep is None):
            raise ImageError(
                f"{name} is a TIFF of {depth} bits a channel in a layout ({rawmode}) of which some "
                "bits would be lost. Save it as 16-bit grey."
            )
    hidden: Any = image.info.get("transparency") if isinstance(image, PngImageFile) else None
    is_hiding = hidden is not None and rawmode in _LEVELS
    if deep is None and not is_hiding:
        return image
    planes: NDArray[Any]
    if deep is None:
        planes = np.asarray(image)[..., np.newaxis]
    elif deep[1] == "LA":
        # Four bytes a pixel, as RGBA has them: both of the grey level, both of the opacity.
        planes = _decoded(image, "RGBA").view(">u2")
    else:
        low = _decoded(_opened_again(image, file), f"{deep[1]};16{_OTHER_ORDER[deep[2]]}")
        file.seek(0)
        planes = _decoded(image, rawmode).astype(np.uint16) << 8 | low
    if is_hiding:
        shown = (planes != np.multiply(hidden, _LEVELS[rawmode])).any(axis=-1, keepdims=True)
        opacity = shown * np.array(np.iinfo(planes.dtype).max, planes.dtype)
        planes = np.concatenate([planes, opacity], axis=-1)
    scaled = picture(planes, name)
    scaled.getexif()[0x0112] = orientation(image)
    return scaled


def _true_values(image: TiffImageFile, rawmode: str) -> Image.Image:
    """Return a TIFF of one channel, also where Pillow takes its numbers for others."""
    native = _EITHER_ORDER.fullmatch(rawmode)
    if native and image.tile[0].codec_name == "libtiff":  # which has put the bytes in order
        _unpack_as(image, f"{native[1]}N{native[2]}")
    if rawmode == "I;32N" and np.asarray(image).min() < 0:  # unsigned
        return Image.fromarray(np.asarray(image).view(np.uint32).astype(np.float32))
    if rawmode == "L" and image.tag_v2.get(339, (1,))[0] == 2:  # TIFF 6.0, tag 339: signed
        return Image.fromarray(np.asarray(image).view(np.int8).astype(np.int32))
    return image


def _decoded(image: ImageFile, rawmode: str) -> NDArray[np.uint8]:
    """Return ``(H, W, C)`` pixels, unpacked in another way than the header asks for."""
    _unpack_as(image, rawmode)
    return np.asarray(image)


def _unpack_as(image: ImageFile, rawmode: str) -> None:
    image.tile = [
        part._replace(args=(rawmode, *part.args[1:]) if isinstance(part.args, tuple) else rawmode)
        for part in image.tile
    ]


def open_header(path: Path) -> ImageFile | None:
    """Return an encoded image of which only the header was read, ``None`` if there is no such.

    Its ``format``, ``size``, ``mode`` and, of a JPEG, ``quantization`` are there without decoding.
    """
    try:
        data = io.BytesIO(path.read_bytes())
        plugin = next(kind for magic, kind in _PLUGINS if data.getvalue().startswith(magic))
        return plugin(cast(IO[bytes], data))
    except (StopIteration, *DECODE_ERRORS) as error:
        check_resources(error, str(path))
        return None


def read_stream(stream: Stream) -> bytes:
    """Return what a binary stream holds, a seekable one from its start.

    Raises:
        ImageError: If it cannot be read, or does not end.
        TypeError: If it is one of text.
    """
    parts: list[bytes] = []
    total = 0
    try:
        if _is_seekable(stream):
            cast(io.IOBase, stream).seek(0)
        while part := stream.read(1 << 20):
            if not isinstance(part, bytes | bytearray | memoryview):
                raise _not_binary(type(part).__name__)
            parts.append(bytes(part))
            total += len(part)
            if total > MAX_STREAM_BYTES:
                raise ImageError(
                    f"<stream> is longer than {MAX_STREAM_BYTES} bytes. Save it to a file first."
                )
    except ImageError:
        raise
    except UnicodeDecodeError as error:  # text is decoded as it is read
        raise _not_binary("text") from error
    except _stream_errors() as error:
        why = reason(error, "<stream>")
        raise ImageError(f"<stream> cannot be read: {why}") from error
    return b"".join(parts)


def _not_binary(kind: str) -> TypeError:
    return TypeError(
        f"expected a binary stream, got one of {kind}; open it with 'rb', or await what it reads "
        "and pass that"
    )


def _is_seekable(stream: Stream) -> bool:
    try:
        return bool(cast(io.IOBase, stream).seekable())
    except AttributeError:  # also of a member of a tar archive that is itself read as a stream
        return False


def _stream_errors() -> tuple[type[Exception], ...]:
    """Return what a file, a member of an archive or an answer of a server raises that breaks.

    Looked up, not imported: who has such a stream has its module.
    """
    found = (getattr(sys.modules.get(module), name, None) for module, name in _BREAKS)
    known = EOFError, OSError, RuntimeError, ValueError  # an encrypted member, a closed stream, ...
    return (*known, *filter(None, found))


def _holds_ycbcr(image: JpegImageFile) -> bool:
    """Return whether three components are luma and chroma, by the rules of libjpeg's jdapimin.c."""
    if image.mode != "RGB" or "jfif" in image.info:
        return image.mode == "RGB"
    if "adobe" in image.info:
        return image.info.get("adobe_transform") == 1
    return [chr(part[0]) for part in image.layer] != ["R", "G", "B"]


def _looks_like(head: bytes, name: str) -> str:
    if not head:
        return "is empty; fetch it again"
    start = head.lstrip().lower()
    for magic, meaning in _LOOKALIKES:
        if start.startswith(magic):
            return meaning
    if head[4:8] == b"ftyp":
        return "is a HEIF, AVIF or video file"
    if name.lower().endswith((".dcm", ".dicom")):
        return (
            'is named like a DICOM file but has no "DICM" at byte 128. If it lacks that alone, as '
            "old ones do, write it anew, for example with dcmtk: dcmconv in.dcm out.dcm"
        )
    if not any(head):
        return "is all zeros, perhaps the rest of a broken copy"
    return f"is not an image of a known format (it begins with {head[:8]!r})"


def _has_more_frames(image: Image.Image) -> bool:
    # Not `n_frames`: counting walks through the whole file.
    try:
        return bool(getattr(image, "is_animated", False))
    except DECODE_ERRORS:
        return False
