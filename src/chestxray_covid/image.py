"""From any source to the pixels of a model's size: decode, convert, resize.

NumPy and Pillow only; DICOM needs the extra ``dicom``. Nothing here changes global state: no
Pillow limit, no warning filter. Files are untrusted: only six formats are recognised, by content
and never by name, and sizes are checked in the header, before any pixel is decoded.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, Protocol, Self, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from chestxray_covid.errors import ConfigError, ImageError, ImageNotFoundError, require_extra

#: Largest image that is decoded unless told otherwise, in pixels. The largest in the public sources
#: has 18 million; Pillow itself only warns at 89 and refuses at 179.
MAX_PIXELS = 64_000_000
#: Longest side, JPEG's own limit: Pillow spends 8 bytes on every row, however short.
MAX_SIDE = 65_535
#: Largest stream that is read, in bytes: an endless one must not fill the memory.
MAX_STREAM_BYTES = 1 << 30
#: Most scans of a JPEG; libjpeg's progressive encoder writes 10 in colour, 18 for CMYK. Each costs
#: work on the whole image: measured, 64 megapixels with 106 scans in 260 kB took 7.6 s.
MAX_JPEG_SCANS = 50

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
# What Pillow and pydicom may raise on damaged bytes: Pillow has `assert` in its parsers, and where
# the caller turns warnings into errors, theirs come as exceptions.
_DECODE_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError),
    *(MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError, Warning),
    *(Image.DecompressionBombError, struct.error, zlib.error),
)
# EXIF 2.32, tag 0x0112: value → how the stored image becomes upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Start of a JPEG segment: FF00 and FFD0 to FFD7 belong to a scan, FF01 and FFFF have no length.
_JPEG_SEGMENT = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
# Markers whose segment holds height and width: SOF0 to SOF15, and JPEG-LS's SOF55 (ITU-T T.87).
_JPEG_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Tensor(Protocol):  # torch's, on any device; torch itself is not imported
    def detach(self) -> Any: ...


_PathOrBytes: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview
#: What :func:`load_image` takes: path, encoded bytes, binary stream, PIL image, array, tensor.
ImageSource: TypeAlias = _PathOrBytes | _Stream | Image.Image | NDArray[Any] | _Tensor


class ImageWarning(UserWarning):
    """An image holds more than what is used of it, for example several frames."""


def load_image(
    source: ImageSource,
    *,
    min_size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    r"""Return a radiograph as an 8-bit grey image (mode ``"L"``), upright, bone bright.

    Colour becomes luma (ITU-R 601-2), transparency is composited on black, EXIF orientation is
    applied, colour profiles are ignored. Pixels deeper than 8 bits are scaled, never clipped:

    * ``bool`` and 1-bit: 0 and 255.
    * Integers: 0 to 255 are taken as they are; where any pixel is outside, the image's own range
      [min, max] becomes 0 to 255, so that 12 bits stored in 16 do not come out black.
    * Floats: [0, 1] becomes 0 to 255; [0, 255] with a maximum of 2 or more is taken as it is;
      everything else is scaled by its own range.
    * A constant image without any of these scales becomes black.
    * DICOM: modality LUT or rescale first; then the VOI LUT or window if there is one, else 8-bit
      pixels as they are and deeper ones by their own range. MONOCHROME1 is inverted.

    The result is a copy without metadata.

    Args:
        source: Path, encoded bytes, binary stream (a seekable one is read from its start), PIL
            image, array, or torch tensor. Arrays are ``(H, W)``, ``(1, H, W)``, ``(H, W, 1)``,
            or have 3 (RGB) or 4 (RGBA) channels first or last. Encoded: PNG, JPEG, BMP, TIFF,
            WebP, GIF or DICOM. Of several frames the first is used.
        min_size: ``(width, height)`` in pixels that the caller needs. A larger JPEG may be decoded
            at 1/2, 1/4 or 1/8 as long as neither side falls below; others come in full.
        max_pixels: Larger images are refused from their header.

    Raises:
        ImageNotFoundError: If the path does not exist or is no regular file.
        ImageError: If the source cannot be decoded, is too large, has an impossible shape, or
            holds NaN or infinite values; the message names the source and the reason.
        MissingExtraError: If the source is DICOM and pydicom is not installed.
        TypeError: If the source is none of the above.
        ValueError: If ``min_size`` or ``max_pixels`` is not positive.

    Warns:
        ImageWarning: If the file holds more than one frame.

    >>> load_image(np.array([[0, 4095]], np.uint16)).tobytes()
    b'\x00\xff'
    """
    if not max_pixels > 0 or (min_size is not None and not min(min_size) > 0):
        raise ValueError(
            f"max_pixels and min_size must be positive, got {max_pixels} and {min_size}"
        )
    if isinstance(source, Image.Image):
        return _from_pil(source, max_pixels)
    if isinstance(source, str | os.PathLike):
        return _from_path(Path(os.fsdecode(source)), min_size, max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(bytes(source)), "<bytes>", min_size, max_pixels)
    if hasattr(source, "read"):
        data = _read_all(cast(_Stream, source))
        return _decode(io.BytesIO(data), "<stream>", min_size, max_pixels)
    return _from_array(_as_array(source), "<array>", max_pixels)


# ---------------------------------------------------------------- sources


def _from_pil(source: Image.Image, max_pixels: int) -> Image.Image:
    name = "<PIL image>"
    try:
        _check_size(source.size, name, max_pixels)
        return _to_grey(source, name)
    except ImageError:
        raise
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name} cannot be converted to grey: {_reason(error)}") from error


def _from_path(path: Path, min_size: tuple[int, int] | None, max_pixels: int) -> Image.Image:
    text = str(path)
    # Newlines, control characters, direction marks and bytes that are not UTF-8 are escaped.
    name = text if text.isprintable() else ascii(text)
    try:
        # Before opening: opening a FIFO waits for a writer, reading a device may never end.
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
            raise ImageNotFoundError(f"{name} is {what}, expected a regular file.")
        with path.open("rb") as file:
            return _decode(file, name, min_size, max_pixels)
    except ImageError:
        raise
    except FileNotFoundError as error:
        what = "is a link to nothing" if path.is_symlink() else "does not exist"
        raise ImageNotFoundError(f"{name} {what}. Check the path.") from error
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise ImageError(f"{name} cannot be opened: {_reason(error)}") from error


def _read_all(stream: _Stream) -> bytes:
    """Return what a binary stream holds, a seekable one from its start."""
    parts: list[bytes] = []
    total = 0
    try:
        if getattr(stream, "seekable", bool)():
            cast(io.IOBase, stream).seek(0)
        while part := stream.read(1 << 20):
            if not isinstance(part, bytes | bytearray | memoryview):
                raise TypeError(
                    f"expected a binary stream, got one of {type(part).__name__}; open it with 'rb'"
                )
            parts.append(bytes(part))
            total += len(part)
            if total > MAX_STREAM_BYTES:
                raise ImageError(
                    f"<stream> is longer than {MAX_STREAM_BYTES} bytes. Save it to a file first."
                )
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: closed
        raise ImageError(f"<stream> cannot be read: {_reason(error)}") from error
    return b"".join(parts)


def _as_array(source: object) -> NDArray[Any]:
    try:
        if hasattr(source, "detach"):
            tensor = source.detach().cpu()
            # NumPy has no bfloat16; every value of it is a float32.
            return np.asarray(tensor.float() if "bfloat16" in str(tensor.dtype) else tensor)
        if hasattr(source, "__array__"):
            return np.asarray(source)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ImageError(f"<array> cannot become a NumPy array: {_reason(error)}") from error
    raise TypeError(
        "expected a path, bytes, a binary stream, a PIL image, an array or a tensor, "
        f"got {type(source).__name__}"
    )


def _from_array(array: NDArray[Any], name: str, max_pixels: int) -> Image.Image:
    if array.dtype.kind not in "buif":
        raise ImageError(
            f"{name} has dtype {array.dtype}, expected bool, an integer or a float type."
        )
    return _from_planes(_channels_last(array, name), name, max_pixels)


def _from_planes(planes: NDArray[Any], name: str, max_pixels: int) -> Image.Image:
    height, width, channels = planes.shape
    _check_size((width, height), name, max_pixels)
    grey = np.ascontiguousarray(_to_uint8(planes, name))
    if channels == 1:
        return Image.fromarray(grey[..., 0]).copy()
    return _to_grey(Image.fromarray(grey), name)


def _channels_last(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Return an array as ``(H, W, C)`` with C 1, 3 or 4."""
    if array.ndim == 2:
        return array[..., np.newaxis]
    first, last = (array.ndim == 3 and array.shape[axis] in (1, 3, 4) for axis in (0, -1))
    if first == last:
        doubt = "which of the two ends holds the channels is ambiguous; " if first else ""
        raise ImageError(
            f"{name} has shape {array.shape}: {doubt}expected one image, (H, W), or with 1, 3 or 4 "
            "channels first or last. Pass a batch image by image, and tiny images as (H, W)."
        )
    return np.moveaxis(array, 0, -1) if first else array


# ---------------------------------------------------------------- encoded images


def _decode(
    file: io.BufferedIOBase, name: str, min_size: tuple[int, int] | None, max_pixels: int
) -> Image.Image:
    head = file.read(132)
    file.seek(0)
    if head[128:] == b"DICM":  # PS3.10 7.1: 128 bytes of preamble, then this prefix
        grey, has_more_frames = _decode_dicom(file, name, max_pixels)
    else:
        plugin = next((kind for magic, kind in _PLUGINS if head.startswith(magic)), None)
        if plugin is None:
            raise ImageError(
                f"{name} {_looks_like(head, name)}. "
                "Expected PNG, JPEG, BMP, TIFF, WebP, GIF or DICOM."
            )
        grey, has_more_frames = _decode_image(plugin, file, name, min_size, max_pixels)
    if has_more_frames:
        warnings.warn(
            f"{name} holds more than one frame; only the first is used.",
            ImageWarning,
            stacklevel=4,  # the caller of load_image
        )
    return grey


def _decode_image(
    plugin: type[ImageFile],
    file: io.BufferedIOBase,
    name: str,
    min_size: tuple[int, int] | None,
    max_pixels: int,
) -> tuple[Image.Image, bool]:
    try:
        image = plugin(cast(IO[bytes], file))
        _check_size(image.size, name, max_pixels)
        if isinstance(image, TiffImageFile):
            # TIFF 6.0, section 15: libtiff allocates whole tiles, which may exceed the image.
            tile = (int(image.tag_v2.get(322, 1)), int(image.tag_v2.get(323, 1)))
            _check_size(tile, f"A tile of {name}", max_pixels)
        if isinstance(image, JpegImageFile):
            start = file.tell()
            file.seek(0)
            _check_jpeg(file.read(MAX_STREAM_BYTES), name, max_pixels)
            file.seek(start)
            sideways = _orientation(image) in (5, 6, 7, 8)
            image.draft("L", min_size[::-1] if min_size and sideways else min_size)
        grey = _to_grey(image, name)
    except ImageError:
        raise
    except _DECODE_ERRORS as error:
        raise ImageError(
            f"{name} is damaged, or not a {plugin.format} that can be read: {_reason(error)}"
        ) from error
    return grey, _has_more_frames(image)


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


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if not min(size) > 0:
        raise ImageError(f"{name} is {width}x{height} pixels, expected at least 1x1.")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has or claims {width}x{height} pixels, more than the limit of {max_pixels}. "
            "If you trust it, pass a larger max_pixels."
        )
    if max(size) > MAX_SIDE:
        raise ImageError(
            f"{name} is {width}x{height} pixels, expected sides of at most {MAX_SIDE}. Crop it."
        )


def _check_jpeg(data: bytes, name: str, max_pixels: int) -> None:
    """Refuse a JPEG of too many pixels or absurdly many scans (ITU-T T.81, B.1.1)."""
    scans, position = 0, 2
    while match := _JPEG_SEGMENT.search(data, position):
        marker, position = data[match.end() - 1], match.end()
        if marker == 0xD9:  # end of image: what follows, such as a phone's video, is not decoded
            break
        if marker in _JPEG_FRAMES and len(data) >= position + 7:
            height, width = struct.unpack_from(">HH", data, position + 3)
            _check_size((width, height), name, max_pixels)
        scans += marker == 0xDA
        position += int.from_bytes(data[position : position + 2], "big")
    if scans > MAX_JPEG_SCANS:
        raise ImageError(
            f"{name} is a JPEG of {scans} scans, more than {MAX_JPEG_SCANS}; decoding it could "
            "take minutes. If you trust it, save it anew with another program."
        )


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) where EXIF is absent or broken."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except _DECODE_ERRORS:
        return 1


def _has_more_frames(image: Image.Image) -> bool:
    # Not `n_frames`: counting walks through the whole file.
    try:
        return bool(getattr(image, "is_animated", False))
    except _DECODE_ERRORS:
        return False


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


# ---------------------------------------------------------------- pixels


def _to_grey(image: Image.Image, name: str) -> Image.Image:
    """Return an upright copy in mode ``"L"`` without metadata."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = _to_uint8(np.asarray(image), name)
        # TIFF 6.0, tag 262: 0 is WhiteIsZero, which Pillow inverts in shallow modes only.
        white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0
        grey = Image.fromarray(255 - values if white_is_zero else values).copy()
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        grey = ImageChops.multiply(rgba.convert("L"), rgba.getchannel("A"))
    else:
        grey = image.convert("L")  # a copy if it is "L" already
    # Last, because Pillow turns TIFF itself while decoding, and then forgets the tag.
    turn = _UPRIGHT.get(_orientation(image))
    if turn is not None:
        grey = grey.transpose(turn)
    grey.info = {}  # or the orientation would be applied again to the result
    return grey


def _to_uint8(values: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Return pixels scaled to 8 bits by the rules in :func:`load_image`."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    low, high = _range(values, name)
    is_float = values.dtype.kind == "f"
    if is_float and low >= 0 and high <= 1:
        return _stretch(values, 0, 1)
    if low >= 0 and high <= 255 and (high >= 2 or not is_float):
        return _stretch(values, 0, 255)
    return _stretch(values, low, high)


def _range(values: NDArray[Any], name: str) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(high - low):
        raise ImageError(
            f"{name} holds NaN, infinite or huge values (from {low} to {high}). "
            "Mask or replace them first."
        )
    return low, high


def _stretch(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Return pixels with ``low`` at 0 and ``high`` at 255, rounded; black if there is no range."""
    if not high > low:
        return np.zeros(values.shape, np.uint8)
    # Single precision holds 16-bit integers exactly and halves the memory.
    exact = np.float32 if values.dtype.kind != "f" and values.dtype.itemsize <= 2 else np.float64
    scaled: NDArray[Any] = np.subtract(values, low, dtype=exact)
    np.multiply(scaled, 255 / (high - low), out=scaled)
    result: NDArray[np.uint8] = np.rint(scaled, out=scaled).astype(np.uint8)
    return result


# ---------------------------------------------------------------- DICOM


def _decode_dicom(file: io.BufferedIOBase, name: str, max_pixels: int) -> tuple[Image.Image, bool]:
    errors = require_extra("pydicom.errors", "dicom")
    try:
        data, frame = _read_dicom(file, name, max_pixels)
        photometric = data.PhotometricInterpretation
        if photometric == "PALETTE COLOR":
            frame = require_extra("pydicom.pixels", "dicom").apply_color_lut(frame, data)
        planes = frame if frame.ndim == 3 else _display(frame, data, name)[..., np.newaxis]
        grey = _from_planes(
            255 - planes if photometric == "MONOCHROME1" else planes, name, max_pixels
        )
        return grey, int(data.get("NumberOfFrames") or 1) > 1
    except ImageError:
        raise
    except (*_DECODE_ERRORS, errors.BytesLengthException, errors.InvalidDicomError) as error:
        # pydicom's warnings and some errors quote the file: a patient's name must not get out.
        quotes_nothing = isinstance(error, AttributeError | RuntimeError | ValueError)
        reason = _reason(error) if quotes_nothing else type(error).__name__
        raise ImageError(f"{name} is a DICOM file that cannot be read: {reason}") from error


def _read_dicom(file: io.BufferedIOBase, name: str, max_pixels: int) -> tuple[Any, NDArray[Any]]:
    """Return the data set and its first frame, decoded only after every limit was checked."""
    # Not `dcmread`: it inflates a deflated data set before anything can be looked at.
    read = require_extra("pydicom.filereader", "dicom").read_dataset
    pixels = require_extra("pydicom.pixels", "dicom")
    uid = require_extra("pydicom.uid", "dicom")
    file.seek(132)
    meta = read(file, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
    # The raw value: pydicom would quote an odd one in a warning, patient's name behind it and all.
    text = bytes(meta.get_item(0x00020010).value) if 0x00020010 in meta else b""
    match = re.fullmatch(rb"([0-9.]{1,64})[\0 ]*", text)
    if match is None:
        raise ImageError(f"{name} names no transfer syntax (0002,0010). Export the DICOM anew.")
    syntax = uid.UID(match[1].decode())
    if syntax.is_deflated:
        raise ImageError(
            f"{name} is a deflated DICOM file, which can expand a thousandfold. "
            "Convert it first, for example with dcmtk: dcmconv +te in.dcm out.dcm"
        )
    decoder = pixels.get_decoder(syntax)
    order = (syntax.is_implicit_VR, syntax.is_little_endian)
    data = read(file, *order, stop_when=lambda tag, *_: tag >> 16 >= 0x7FE0)
    if data.get("Rows") is None or data.get("Columns") is None:
        raise ImageError(f"{name} is a DICOM file without an image (no Rows and Columns).")
    _check_size((int(data.Columns), int(data.Rows)), name, max_pixels)
    data.update(read(file, *order, stop_when=lambda tag, *_: tag > 0x7FE00010))
    if not any(key in data for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ImageError(f"{name} is a DICOM file without pixel data.")
    if not decoder.is_available:
        raise ImageError(
            f"{name} is compressed ({syntax.name}) and no decoder for that is installed. For JPEG "
            'and JPEG 2000: pip install "chestxray-covid[dicom]". For lossless JPEG and JPEG-LS: '
            "pip install python-gdcm"
        )
    data.file_meta = require_extra("pydicom.dataset", "dicom").FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    if syntax.is_encapsulated:
        _check_frame(data, name, max_pixels)
    return data, pixels.pixel_array(data, index=0)


def _check_frame(data: Any, name: str, max_pixels: int) -> None:
    """Refuse a compressed first frame that claims more pixels than the DICOM header does.

    Decoders believe the frame: a few hundred bytes of JPEG 2000 took 12 GB and 84 s, measured.
    """
    frame = require_extra("pydicom.encaps", "dicom").get_frame(
        data.PixelData, 0, number_of_frames=int(data.get("NumberOfFrames") or 1)
    )
    what = f"The first frame of {name}"
    # SOC and SIZ markers, then x1, y1, x0, y0 of the image area (ISO/IEC 15444-1, A.5.1).
    for match in re.finditer(rb"\xff\x4f\xff\x51.{4}(.{16})", frame, re.DOTALL):
        x1, y1, x0, y0 = struct.unpack(">4I", match[1])
        _check_size((x1 - x0, y1 - y0), what, max_pixels)
    if frame.startswith(b"\xff\xd8"):
        _check_jpeg(frame, what, max_pixels)


def _display(frame: NDArray[Any], data: Any, name: str) -> NDArray[np.uint8]:
    """Return stored grey values as shown on a monitor (PS3.3 C.11.1 and C.11.2)."""
    values = frame
    if data.get("ModalityLUTSequence"):
        values, _ = _lookup(values, data.ModalityLUTSequence[0], data)
    else:
        slope, intercept = _first(data, "RescaleSlope"), _first(data, "RescaleIntercept")
        if slope is not None and intercept is not None and (slope, intercept) != (1, 0):
            values = values * slope + intercept
    low, high = _range(values, name)
    if data.get("VOILUTSequence"):
        values, top = _lookup(values, data.VOILUTSequence[0], data)
        return _stretch(values, 0, top)
    center, width = _first(data, "WindowCenter"), _first(data, "WindowWidth")
    if center is not None and width is not None:
        function = str(data.get("VOILUTFunction") or "LINEAR").upper()
        return _stretch(_window(values, center, width, function), 0, 1)
    if values.dtype == np.uint8 and data.BitsStored == 8:
        return values
    return _stretch(values, low, high)


def _first(data: Any, keyword: str) -> float | None:
    """Return the first value of a numeric element, ``None`` where it is absent or empty."""
    value = data.get(keyword)
    if value is None or str(value) == "":
        return None
    number = float(np.ravel(np.asarray(value, dtype=np.float64))[0])
    if not math.isfinite(number):
        raise ValueError(f"{keyword} is {number}")
    return number


def _window(
    values: NDArray[Any], center: float, width: float, function: str
) -> NDArray[np.float64]:
    """Return values in [0, 1] after a VOI window (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if function == "LINEAR" and width >= 1:
        center, width = center - 0.5, width - 1
    elif function not in ("LINEAR_EXACT", "SIGMOID") or not width > 0:
        raise ValueError(f"window width {width} is impossible for the VOI function {function}")
    # A width of 0 is a threshold.
    position = (values.astype(np.float64) - center) / max(width, 1e-9)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * position, -60, 60)))
    return np.clip(position + 0.5, 0, 1)


def _lookup(values: NDArray[Any], item: Any, data: Any) -> tuple[NDArray[Any], int]:
    """Return values through a lookup table, and its largest possible output (PS3.3 C.11.2.1.1).

    pydicom's own functions wrap around where a table of 8-bit outputs has more than 256 entries.
    """
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    entries = entries or 1 << 16
    table = item.LUTData
    if isinstance(table, bytes):
        wide = ("<" if data.file_meta.TransferSyntaxUID.is_little_endian else ">") + "u2"
        table = np.frombuffer(table, "u1" if len(table) in (entries, entries + 1) else wide)
    top = (1 << bits) - 1
    table = np.clip(np.ravel(np.asarray(table))[:entries], 0, top)
    if table.size < entries:
        raise ValueError(f"a lookup table of {entries} entries holds {table.size}")
    index = np.clip(np.rint(values.astype(np.float64) - first), 0, entries - 1)
    return table[index.astype(np.int32)], top


# ---------------------------------------------------------------- to the model's size


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """From any source to a model's pixels; a checkpoint's ``config.json`` holds these numbers.

    The whole image is squashed to a square, whatever its aspect ratio (timm's ``crop_mode``
    ``"squash"``), because lungs near the border must not be cut off. Mean and deviation are not
    applied here: pixels stay 8-bit until :func:`models.normalise` or an exported graph turns them
    into ``(pixels / 255 - mean) / std``.

    Args:
        size_px: Side of the square in pixels, 32 to 2048.
        mean: Grey level that becomes 0, a fraction of white. The default is the average of
            ImageNet's three channel means.
        std: Deviation that becomes 1, a fraction of white; the default likewise.
        resize: How the image becomes square; only ``"squash"``.

    Raises:
        ValueError: If a value is impossible.
        TypeError: If a value is of the wrong type.

    >>> Preprocess(size_px=64)(np.zeros((300, 200), np.uint8)).shape
    (1, 64, 64)
    """

    size_px: int = 224
    mean: float = 0.449
    std: float = 0.226
    resize: str = "squash"

    def __post_init__(self) -> None:
        if type(self.size_px) is not int:
            raise TypeError(f"size_px must be an int, got {self.size_px!r}")
        if not 32 <= self.size_px <= 2048:
            raise ValueError(f"size_px must be in 32 to 2048, got {self.size_px}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0 <= self.mean <= 1:
            raise ValueError(f"mean must be a fraction of white in [0, 1], got {self.mean}")
        if not 0 < self.std <= 1:
            raise ValueError(f"std must be a fraction of white in (0, 1], got {self.std}")
        if self.resize != "squash":
            raise ValueError(f'resize must be "squash", got {self.resize!r}')

    def __call__(
        self,
        source: ImageSource,
        *,
        box: tuple[float, float, float, float] | None = None,
    ) -> NDArray[np.uint8]:
        """Return the pixels of a radiograph, ``(1, size_px, size_px)`` uint8, bone bright.

        Args:
            source: Whatever :func:`load_image` takes.
            box: ``(left, upper, right, lower)`` of the part to use, for example the lungs, as
                fractions of the upright image's width and height; all of it if not given.

        Raises:
            ImageError: If the source cannot be decoded.
            ValueError: If the box is outside the image or narrower than a hundredth of it.
        """
        left, upper, right, lower = _check_box(box)
        image = load_image(source, min_size=self.decode_size(box))
        width, height = image.size
        small = image.resize(
            (self.size_px, self.size_px),
            Image.Resampling.BILINEAR,
            box=(left * width, upper * height, right * width, lower * height),
            reducing_gap=2.0,
        )
        return np.array(small)[np.newaxis]

    def decode_size(self, box: tuple[float, float, float, float] | None = None) -> tuple[int, int]:
        """Return the ``(width, height)`` below which an image should not be decoded.

        Twice the size that is needed, as in Pillow's ``thumbnail``: JPEG's own reduction then
        stays within 0.3 grey levels, on average, of decoding in full. Whoever decodes ahead of
        the call passes this to :func:`load_image`, to get the very same pixels.

        Args:
            box: As in the call.

        Raises:
            ValueError: If the box is impossible.
        """
        left, upper, right, lower = _check_box(box)
        return (
            math.ceil(2 * self.size_px / (right - left)),
            math.ceil(2 * self.size_px / (lower - upper)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the preprocessing that :meth:`to_dict` wrote.

        Raises:
            ConfigError: If a field is unknown, missing, of a wrong type or impossible.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(data, Mapping) or set(data) != set(names):
            got = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise ConfigError(f"preprocess must have exactly the fields {names}, got {got}")
        try:
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"preprocess is impossible: {error}") from error


def _check_box(
    box: tuple[float, float, float, float] | None,
) -> tuple[float, float, float, float]:
    if box is None:
        return 0.0, 0.0, 1.0, 1.0
    try:
        left, upper, right, lower = (float(edge) for edge in box)
    except (TypeError, ValueError) as error:
        raise ValueError(f"box must be (left, upper, right, lower), got {box!r}") from error
    ordered = 0 <= left < right <= 1 and 0 <= upper < lower <= 1
    if not (ordered and min(right - left, lower - upper) >= 0.01):
        raise ValueError(
            "box must be (left, upper, right, lower) in fractions of the image, 0 to 1, "
            f"at least 0.01 wide and high, got {box!r}"
        )
    return left, upper, right, lower
