"""From any source to the pixels of a model's size: decode, convert, resize.

NumPy and Pillow only; DICOM needs the extra ``dicom``. Nothing here changes global state: no
Pillow limit, no warning filter. Files are untrusted: only six formats are recognised, by content
and never by name, and sizes are checked in the header, before any pixel is decoded.
"""

from __future__ import annotations

import io
import math
import os
import stat
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chestxray_covid.dicom import decode_dicom
from chestxray_covid.encoded import Stream, decode_image, read_stream, with_whole_depth
from chestxray_covid.errors import (
    ConfigError,
    ImageError,
    ImageNotFoundError,
    real_number,
    whole_number,
)
from chestxray_covid.files import expanded_copy, looks_like_address
from chestxray_covid.pixels import (
    DECODE_ERRORS,
    ImageFacts,
    channels_last,
    check_size,
    from_planes,
    reason,
    to_grey,
)

#: Largest image that is decoded unless told otherwise, in pixels. The largest in the public sources
#: has 18 million; Pillow itself only warns at 89 and refuses at 179.
MAX_PIXELS = 64_000_000
#: Ends of the names of image files, in lower case, where a folder is searched for them.
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".gif"),
    *(".dcm", ".dicom"),
)
#: Smallest deviation, a quarter of a grey level: far smaller ones overflow as they are divided by.
_MIN_STD = 1e-3


class _Sample(Protocol):  # of a data set, which is above this module
    @property
    def path(self) -> Path: ...
    @property
    def is_file(self) -> bool: ...
    @property
    def read(self) -> Callable[..., Image.Image]: ...


class _Tensor(Protocol):  # torch's, on any device; torch itself is not imported
    def detach(self) -> Any: ...


_PathOrBytes: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview
#: What :func:`load_image` takes: path, encoded bytes, binary stream, PIL image, array, tensor,
#: sample of a data set.
ImageSource: TypeAlias = _PathOrBytes | Stream | Image.Image | NDArray[Any] | _Tensor | _Sample


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
    * Floats: [0, 1] becomes 0 to 255; [0, 255] with a maximum of 2 or more is taken as it is, both
      with a thousandth beyond the ends for rounding; everything else is scaled by its own range.
    * Opacity by itself: 1 of floats that do not exceed it, else 255, or what is greater than that
      and greatest, is opaque.
    * A constant image without any of these scales becomes black.
    * DICOM: modality LUT or rescale, then VOI LUT or window, else 8 bits that nothing changed as
      they are, others by their own range. MONOCHROME1 is inverted, oblong pixels become square.

    The result is a copy without metadata.

    Args:
        source: Path (``~`` is the home folder), encoded bytes, binary stream (a seekable one is
            read from its start), PIL image, array, torch tensor, or :class:`Sample` of a data set.
            Arrays are ``(H, W)``, ``(1, H, W)``, ``(H, W, 1)``, or have 3 (RGB) or 4 (RGBA)
            channels first or last; MONAI's have columns before rows: pass those transposed.
            Encoded: PNG, JPEG, BMP, TIFF, WebP, GIF or DICOM. Of several
            frames the first is used, of a PIL image the one that it was turned to. Pass colour of
            16 bits a channel before Pillow loads it, which keeps 8 of them.
        min_size: ``(width, height)`` in pixels that the caller needs. A larger JPEG may be decoded
            at 1/2, 1/4 or 1/8 as long as neither side falls below; others come in full.
        max_pixels: Larger images are refused from their header.

    Raises:
        ImageNotFoundError: If the path is empty, does not exist or is no regular file.
        ImageError: If the source cannot be decoded, is too large, has an impossible shape, or
            holds NaN or infinite values; the message names the source and the reason.
        ResourceError: If there is no memory for it, or too many files are open.
        MissingExtraError: If the source is DICOM and pydicom is not installed.
        TypeError: If the source is none of the above.
        ValueError: If ``min_size`` or ``max_pixels`` is not positive.

    Warns:
        ImageWarning: If the file holds more than one frame.

    >>> load_image(np.array([[0, 4095]], np.uint16)).tobytes()
    b'\x00\xff'
    """
    return read_image(source, min_size=min_size, max_pixels=max_pixels)[0]


def read_image(
    source: ImageSource,
    *,
    min_size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Image.Image, ImageFacts]:
    """Return what :func:`load_image` returns, and what the image was before: size and colour.

    Arguments, errors and warnings are those of :func:`load_image`. It is decoded once.

    >>> read_image(np.zeros((2, 3), np.uint8))[1]
    ImageFacts(width_px=3, height_px=2, colour=0.0)
    """
    sides = (real_number("min_size", side) for side in min_size or ())
    sizes = (real_number("max_pixels", max_pixels), *sides)
    if not min(sizes) > 0:
        raise ValueError(
            f"max_pixels and min_size must be positive, got {max_pixels} and {min_size}"
        )
    if isinstance(source, Image.Image):
        return _from_pil(source, max_pixels)
    if isinstance(source, str) and not source:  # pathlib takes it for the current folder
        raise ImageNotFoundError("The path of an image is empty. Is a variable unset?")
    if isinstance(source, str | os.PathLike):
        return _from_path(source, min_size, max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(bytes(source)), "<bytes>", min_size, max_pixels)
    if hasattr(source, "patient_id") and hasattr(source, "is_file"):  # a table has the first, too
        sample = cast(_Sample, source)
        pixels = sample.path if sample.is_file else sample.read(sample, min_size)
        return read_image(pixels, min_size=min_size, max_pixels=max_pixels)
    if hasattr(source, "read"):
        data = read_stream(cast(Stream, source))
        return _decode(io.BytesIO(data), "<stream>", min_size, max_pixels)
    return _from_array(_as_array(source), "<array>", max_pixels)


# ---------------------------------------------------------------- sources


def _from_pil(source: Image.Image, max_pixels: int) -> tuple[Image.Image, ImageFacts]:
    name = "<PIL image>"
    try:
        check_size(source.size, name, max_pixels)
        return to_grey(with_whole_depth(source, name), name)
    except ImageError:
        raise
    except DECODE_ERRORS as error:
        if getattr(source, "tile", None) and getattr(source, "fp", None) is None:
            way = "Call its load() before its file is closed, or pass the path."
            raise ImageError(f"{name} was closed before it was loaded. {way}") from error
        raise ImageError(f"{name} cannot be converted to grey: {reason(error, name)}") from error


def _from_path(
    source: str | os.PathLike[str], min_size: tuple[int, int] | None, max_pixels: int
) -> tuple[Image.Image, ImageFacts]:
    path, is_address = expanded_copy(source), looks_like_address(source)
    text = str(source if is_address else path)
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
        if is_address:
            way = "looks like an address. Download it first, or pass its bytes."
            raise ImageNotFoundError(f"{name} does not exist; it {way}") from error
        what = "is a link to nothing" if path.is_symlink() else "does not exist"
        raise ImageNotFoundError(f"{name} {what}. Check the path.") from error
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise ImageError(f"{name} cannot be opened: {reason(error, name)}") from error


def _as_array(source: object) -> NDArray[Any]:
    try:
        if hasattr(source, "detach") and hasattr(source, "cpu"):  # a socket has the first
            tensor = source.detach().cpu()
            # NumPy has no bfloat16; every value of it is a float32.
            return np.asarray(tensor.float() if "bfloat16" in str(tensor.dtype) else tensor)
        if hasattr(source, "__array__"):
            array = np.asarray(source)
            if array.dtype != object or isinstance(source, np.ndarray):
                return array
    except DECODE_ERRORS as error:  # what lies in a file is read only now
        why = reason(error, "<array>")
        raise ImageError(f"<array> cannot become a NumPy array: {why}") from error
    raise TypeError(
        "expected a path, bytes, a binary stream, a PIL image, an array or a tensor, "
        f"got {type(source).__name__}. Of a table, pass the column of paths; of a pydicom data "
        "set, the file; of what lies elsewhere or in an archive, what its read_bytes() gives."
    )


def _from_array(array: NDArray[Any], name: str, max_pixels: int) -> tuple[Image.Image, ImageFacts]:
    if array.dtype.kind not in "buif":
        raise ImageError(
            f"{name} has dtype {array.dtype}, expected bool, an integer or a float type. Pass a "
            "column of paths as a list."
        )
    return from_planes(channels_last(array, name), name, max_pixels)


# ---------------------------------------------------------------- encoded images


def _decode(
    file: io.BufferedIOBase, name: str, min_size: tuple[int, int] | None, max_pixels: int
) -> tuple[Image.Image, ImageFacts]:
    head = file.read(132)
    file.seek(0)
    if head[128:] == b"DICM":  # PS3.10 7.1: 128 bytes of preamble, then this prefix
        grey, facts, has_more_frames = decode_dicom(file, name, max_pixels)
    else:
        grey, facts, has_more_frames = decode_image(file, head, name, min_size, max_pixels)
    if has_more_frames:
        warnings.warn(
            f"{name} holds more than one frame; only the first is used.",
            ImageWarning,
            stacklevel=5,  # the caller of load_image
        )
    return grey, facts


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
        std: Deviation that becomes 1, a fraction of white, at least a quarter of a grey level,
            0.001; the default likewise.
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
        object.__setattr__(self, "size_px", whole_number("size_px", self.size_px))
        if not 32 <= self.size_px <= 2048:
            raise ValueError(f"size_px must be in 32 to 2048, got {self.size_px}")
        for name in ("mean", "std"):
            object.__setattr__(self, name, real_number(name, getattr(self, name)))
        if not 0 <= self.mean <= 1:
            raise ValueError(f"mean must be a fraction of white in [0, 1], got {self.mean}")
        if not _MIN_STD <= self.std <= 1:
            raise ValueError(f"std must be a fraction of white in [{_MIN_STD}, 1], got {self.std}")
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
        return self.read(source, box=box)[0]

    def read(
        self,
        source: ImageSource,
        *,
        box: tuple[float, float, float, float] | None = None,
    ) -> tuple[NDArray[np.uint8], ImageFacts]:
        """Return what the call returns, and the facts of the image, see :func:`read_image`."""
        left, upper, right, lower = _check_box(box)
        image, facts = read_image(source, min_size=self.decode_size(box))
        width, height = image.size
        small = image.resize(
            (self.size_px, self.size_px),
            Image.Resampling.BILINEAR,
            box=(left * width, upper * height, right * width, lower * height),
            reducing_gap=2.0,
        )
        return np.array(small)[np.newaxis], facts

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
        width, height = (2 * self.size_px / part for part in (right - left, lower - upper))
        return math.ceil(width), math.ceil(height)

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
