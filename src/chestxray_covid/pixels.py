"""Arrays and pictures to 8-bit grey pixels, and the limits of what is decoded."""

from __future__ import annotations

import math
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from chestxray_covid.errors import ImageError, check_resources

#: Largest stream that is read, in bytes: an endless one must not fill the memory.
MAX_STREAM_BYTES = 1 << 30
#: Longest side, JPEG's own limit: Pillow spends 8 bytes on every row, however short.
MAX_SIDE = 65_535
#: Most scans of a JPEG; libjpeg's progressive encoder writes 10 in colour, 18 for CMYK. Each costs
#: work on the whole image: measured, 64 megapixels with 106 scans in 260 kB took 7.6 s.
MAX_JPEG_SCANS = 50
# What Pillow and pydicom may raise on damaged bytes: Pillow has `assert` in its parsers, and where
# the caller turns warnings into errors, theirs come as exceptions.
DECODE_ERRORS = (
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
# Baseline and extended sequential, Huffman and arithmetic.
_JPEG_ONE_SCAN = frozenset({0xC0, 0xC1, 0xC9})
_JPEG_LOSSLESS = frozenset({0xC3, 0xC7, 0xCB, 0xCF})
#: Difference of the channels, 0 to 255, from which a pixel is coloured. Of the public radiographs
#: those that JPEG, a scanner or a camera only tinted stay below, drawn arrows are at 100 and more.
COLOURED_CHANNELS = 40
# Colour is looked for on a grid of at most so many points a side: 16,384 show a share of 0.5 % to
# within 0.06 % (one standard error), whatever the size of the image.
_COLOUR_GRID = 128
# Chroma so near its middle makes channels differ by 38 at most: 1.402 and 1.772 times it.
_GREY_CHROMA = 12
# What has no colour.
_GREY_MODES = ("1", "L", "LA", "La", "I", "F")
#: So far beyond the end of a scale, relative to it, a value still counts as rounded.
_ROUNDING = 1e-3


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What an image was before it became grey and small.

    Attributes:
        width_px: Width of the upright image as it is stored, before any reduced decoding.
        height_px: Its height likewise.
        colour: Share of the pixels, in [0, 1], whose channels differ by more than 40 of 255;
            estimated on a grid, and 0 for whatever has a single channel.
    """

    width_px: int
    height_px: int
    colour: float = 0.0


def from_planes(planes: NDArray[Any], name: str, max_pixels: int) -> tuple[Image.Image, ImageFacts]:
    """Return ``(H, W, C)`` values, C 1, 3 or 4, as an 8-bit grey image, and its facts.

    Raises:
        ImageError: If there are too many of them, none, or one that is not finite.
    """
    height, width, channels = planes.shape
    check_size((width, height), name, max_pixels)
    if channels == 1:
        grey = np.ascontiguousarray(_to_uint8(planes, name))
        facts = ImageFacts(width_px=width, height_px=height)
        return Image.fromarray(grey[..., 0]).copy(), facts
    return to_grey(picture(planes, name), name)


def picture(planes: NDArray[Any], name: str) -> Image.Image:
    """Return ``(H, W, C)`` values as a picture of 8 bits: LA, RGB or RGBA for C 2, 3 or 4.

    Colour and opacity are scaled apart: 12 bits beside an opacity of 16 must not come out black.

    Raises:
        ImageError: If a value is not finite.
    """
    if planes.shape[-1] == 3 or planes.dtype in (np.uint8, np.bool_):
        return Image.fromarray(np.ascontiguousarray(_to_uint8(planes, name)))
    opacity = planes[..., -1:]
    _, high = value_range(opacity, name)
    # Whatever its depth, what nothing exceeds is opaque.
    opaque = 1 if opacity.dtype.kind == "f" and high <= 1 + _ROUNDING else max(high, 255)
    parts = [_to_uint8(planes[..., :-1], name), stretch(np.maximum(opacity, 0), 0, opaque)]
    return Image.fromarray(np.concatenate(parts, axis=-1))


def channels_last(array: NDArray[Any], name: str) -> NDArray[Any]:
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


def to_grey(
    image: Image.Image, name: str, size: tuple[int, int] | None = None
) -> tuple[Image.Image, ImageFacts]:
    """Return an upright copy in mode ``"L"`` without metadata, and its facts.

    Args:
        image: In any mode.
        name: Names the image in messages.
        size: ``(width, height)`` as stored, if the image is being decoded at a reduced size.
    """
    width, height = size or image.size
    if image.mode == "La":  # of which Pillow makes nothing but this
        image = image.convert("LA")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = _to_uint8(np.asarray(image), name)
        # TIFF 6.0, tag 262: 0 is WhiteIsZero, which Pillow inverts in shallow modes only.
        white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0
        grey = Image.fromarray(255 - values if white_is_zero else values).copy()
    elif _is_transparent(image):
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        grey, opacity = rgba.convert("L"), rgba.getchannel("A")
        if opacity.getextrema() != (255, 255):
            grey = ImageChops.multiply(grey, opacity)
    else:
        grey = image.convert("L")  # a copy if it is "L" already
    # Last, because Pillow turns TIFF itself while decoding, and then forgets the tag.
    turned = orientation(image)
    if turned in _UPRIGHT:
        grey = grey.transpose(_UPRIGHT[turned])
    grey.info = {}  # or the orientation would be applied again to the result
    if is_sideways(turned):
        width, height = height, width
    return grey, ImageFacts(width_px=width, height_px=height, colour=_coloured_share(image))


def _is_transparent(image: Image.Image) -> bool:
    # A later frame of a GIF may lack the palette that Pillow insists on.
    return (image.mode != "P" or image.palette is not None) and image.has_transparency_data


def _coloured_share(image: Image.Image) -> float:
    if image.mode in _GREY_MODES or image.mode.startswith("I;16"):
        return 0.0
    grid = (min(image.width, _COLOUR_GRID), min(image.height, _COLOUR_GRID))
    small = image.resize(grid, Image.Resampling.NEAREST)
    if image.mode == "YCbCr" and _is_nearly_grey(small):
        return 0.0
    mode = "RGBA" if _is_transparent(image) else "RGB"
    points = np.asarray(small.convert(mode))
    red, green, blue = points[..., 0], points[..., 1], points[..., 2]
    highest = np.maximum(np.maximum(red, green), blue)
    lowest = np.minimum(np.minimum(red, green), blue)
    seen = (highest - lowest) * (points[..., 3] / 255 if mode == "RGBA" else 1)
    return float(np.count_nonzero(seen > COLOURED_CHANNELS) / seen.size)


def _is_nearly_grey(image: Image.Image) -> bool:
    """Return whether chroma alone tells that no pixel is coloured, which most colour JPEGs are."""
    chroma = (image.getchannel(band).getextrema() for band in (1, 2))
    ends = np.array([*chroma], np.int64)
    return bool(np.abs(ends - 128).max() <= _GREY_CHROMA)


def _to_uint8(values: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Return pixels scaled to 8 bits by the rules in :func:`load_image`."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    low, high = value_range(values, name)
    is_float = values.dtype.kind == "f"
    if is_float and low >= -_ROUNDING and high <= 1 + _ROUNDING:
        return stretch(values, 0, 1)
    beyond = 255 * _ROUNDING
    if low >= -beyond and high <= 255 + beyond and (high >= 2 or not is_float):
        return stretch(values, 0, 255)
    return stretch(values, low, high)


def value_range(values: NDArray[Any], name: str) -> tuple[float, float]:
    """Return minimum and maximum.

    Raises:
        ImageError: If they are not finite.
    """
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(high - low):
        raise ImageError(
            f"{name} holds NaN, infinite or huge values (from {low} to {high}). "
            "Replace them first; a mask of NumPy is not looked at."
        )
    return low, high


def stretch(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Return pixels with ``low`` at 0 and ``high`` at 255, rounded; black if there is no range."""
    if not high > low:
        return np.zeros(values.shape, np.uint8)
    # Single precision holds 16-bit integers exactly and halves the memory.
    exact = np.float32 if values.dtype.kind != "f" and values.dtype.itemsize <= 2 else np.float64
    scaled: NDArray[Any] = np.subtract(values, low, dtype=exact)
    np.multiply(scaled, 255 / (high - low), out=scaled)
    result: NDArray[np.uint8] = np.rint(scaled, out=scaled).astype(np.uint8)
    return result


def square_pixels(image: Image.Image, ratio: float, name: str, max_pixels: int) -> Image.Image:
    """Return an image of square pixels, of one whose pixels are ``ratio`` times as high as wide.

    It is enlarged along the coarser axis; a ratio within a hundredth of 1 is not seen.

    Raises:
        ImageError: If it becomes too large.
    """
    if abs(ratio - 1) < 0.01:
        return image
    size = round(image.width / min(ratio, 1)), round(image.height * max(ratio, 1))
    check_size(size, f"{name} with square pixels", max_pixels)
    return image.resize(size, Image.Resampling.BILINEAR)


def check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    """Raise unless an image of this ``(width, height)`` may be decoded.

    Raises:
        ImageError: If it is empty or too large.
    """
    width, height = size
    if not min(size) > 0:
        raise ImageError(f"{name} is {width}x{height} pixels, expected at least 1x1.")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has or claims {width}x{height} pixels, more than the limit of {max_pixels}. "
            "If you trust it, pass load_image a larger max_pixels; to predict it, reduce what that "
            "returns."
        )
    if max(size) > MAX_SIDE:
        raise ImageError(
            f"{name} is {width}x{height} pixels, expected sides of at most {MAX_SIDE}. Crop it."
        )


def check_jpeg(data: bytes, name: str, max_pixels: int) -> bool:
    """Return whether a JPEG can be reduced while decoding: none that is lossless can be.

    Raises:
        ImageError: If it is of too many pixels or absurdly many scans (ITU-T T.81, B.1.1).
    """
    scans, position, needed, is_lossy = 0, 2, b"", True
    while match := _JPEG_SEGMENT.search(data, position):
        marker, position = data[match.end() - 1], match.end()
        if marker == 0xD9:  # end of image: what follows, such as a phone's video, is not decoded
            break
        if marker in _JPEG_FRAMES and len(data) >= position + 7:
            height, width = struct.unpack_from(">HH", data, position + 3)
            check_size((width, height), name, max_pixels)
            is_lossy = is_lossy and marker not in _JPEG_LOSSLESS
            # All components in a scan that is not progressive: there is no other.
            needed = data[position + 7 : position + 8] if marker in _JPEG_ONE_SCAN else b""
        if marker == 0xDA:
            if needed and data[position + 2 : position + 3] == needed:
                break
            scans += 1
        position += int.from_bytes(data[position : position + 2], "big")
    if scans > MAX_JPEG_SCANS:
        raise ImageError(
            f"{name} is a JPEG of {scans} scans, more than {MAX_JPEG_SCANS}; decoding it could "
            "take minutes. If you trust it, save it anew with another program."
        )
    return is_lossy


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) where EXIF is absent or broken."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except DECODE_ERRORS as error:
        check_resources(error, "The orientation of an image")
        return 1


def is_sideways(orientation: int) -> bool:
    """Return whether an EXIF orientation exchanges width and height."""
    return orientation in (5, 6, 7, 8)


def reason(error: BaseException, name: str) -> str:
    """Return why an image cannot be read as text for the end of a message.

    Raises:
        ResourceError: If that is for want of memory or open files, with its name.
    """
    check_resources(error, name)
    return f"{type(error).__name__}: {error}".removesuffix(": ")
