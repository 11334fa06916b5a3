"""DICOM radiographs as a monitor shows them; needs the extra ``dicom``."""

from __future__ import annotations

import io
import math
import re
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chestxray_covid.errors import ImageError, require_extra
from chestxray_covid.pixels import (
    DECODE_ERRORS,
    ImageFacts,
    check_jpeg,
    check_size,
    from_planes,
    reason,
    square_pixels,
    stretch,
    value_range,
)

#: VOI functions whose window is as wide as it says; that of LINEAR is 1 narrower.
_EXACT = ("LINEAR_EXACT", "SIGMOID")
#: What functional groups may say of a frame; all else, such as its size, stands elsewhere.
_OF_FRAMES = frozenset(
    {"RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction"}
    | {"VOILUTSequence", "PixelSpacing"}
)
#: What says how high and wide pixels are, the ratio where nothing else does (PS3.3 C.7.6.3.1.7).
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
#: Transfer syntaxes of JPEG-LS, JPEG 2000 and HTJ2K that keep every bit, overlays beside the pixels
#: too. What loses some may exceed the bits stored by a little, and would wrap around.
_LOSSLESS = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (80, 90, 201, 202))


def decode_dicom(
    file: io.BufferedIOBase, name: str, max_pixels: int
) -> tuple[Image.Image, ImageFacts, bool]:
    """Return the first frame as 8-bit grey, bone bright, its facts, and if there are more frames.

    Args:
        file: Seekable, of a file in the format of PS3.10.
        name: Names the file in messages.
        max_pixels: Larger images are refused from their header.

    Raises:
        ImageError: If it cannot be decoded or is too large; no message quotes patient data.
        MissingExtraError: If pydicom is not installed.
    """
    with _reading(name):
        data, frame = _read_dicom(_Clipped(file), name, max_pixels)
        photometric = data.PhotometricInterpretation
        if photometric == "PALETTE COLOR":
            frame = require_extra("pydicom.pixels", "dicom").apply_color_lut(frame, data)
        planes = frame if frame.ndim == 3 else _display(frame, data, name)[..., np.newaxis]
        grey, facts = from_planes(
            255 - planes if photometric == "MONOCHROME1" else planes, name, max_pixels
        )
        grey = square_pixels(grey, _pixel_ratio(data), name, max_pixels)
        return grey, facts, int(data.get("NumberOfFrames") or 1) > 1


def dicom_header(path: Path) -> tuple[tuple[int, int], str]:
    """Return ``(width, height)``, and in words how pixels are kept, of which none is read.

    The words are photometric interpretation, bits stored and transfer syntax.

    Raises:
        ImageError: If it is no DICOM file of an image that can be decoded.
        MissingExtraError: If pydicom is not installed.
    """
    with _reading(path.name), path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            raise ImageError(f"{path.name} is no DICOM file. Pass one, see PS3.10, 7.1.")
        data, syntax, _ = _read_header(_Clipped(file), path.name, sys.maxsize)
        kept = (data.get("PhotometricInterpretation"), data.get("BitsStored"), syntax)
        return (int(data.Columns), int(data.Rows)), " ".join(map(str, kept))


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Translate what pydicom raises on damaged files."""
    errors = require_extra("pydicom.errors", "dicom")
    try:
        yield
    except ImageError:
        raise
    except (*DECODE_ERRORS, errors.BytesLengthException, errors.InvalidDicomError) as error:
        # pydicom's warnings and some errors quote the file: a patient's name must not get out.
        quotes_nothing = isinstance(error, AttributeError | RuntimeError | ValueError)
        why = reason(error, name)
        said = why if quotes_nothing else type(error).__name__
        raise ImageError(
            f"{name} is a DICOM file that cannot be read: {said}. Fetch or export it again."
        ) from error


class _Clipped:
    """Reads no more than there is.

    Python reserves what a file is asked for, 4 GiB where a length is damaged: if the machine has
    less, that would seem to be its fault.
    """

    def __init__(self, file: io.BufferedIOBase) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read
        self._end = file.seek(0, io.SEEK_END)

    def read(self, size: int | None = None) -> bytes:
        rest = max(0, self._end - self.tell())
        return self._read(rest if size is None else min(size, rest))


def _read_header(file: _Clipped, name: str, max_pixels: int) -> tuple[Any, Any, Any]:
    """Return the data set up to its pixels, its transfer syntax, and pydicom's decoder for that."""
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
    try:
        decoder = pixels.get_decoder(syntax)
    except NotImplementedError as error:
        raise ImageError(
            f"{name} is encoded as {syntax.name}, which no decoder reads. Export it otherwise, or "
            "convert it first, if it is JPEG for example with dcmtk: dcmdjpeg in.dcm out.dcm"
        ) from error
    order = (syntax.is_implicit_VR, syntax.is_little_endian)
    data = read(file, *order, stop_when=lambda tag, *_: tag >> 16 >= 0x7FE0)
    if data.get("Rows") is None or data.get("Columns") is None:
        raise ImageError(
            f"{name} is a DICOM file without an image (no Rows and Columns), such as a DICOMDIR or "
            "a report, or cut off before it. Pass one with an image, or fetch it again."
        )
    check_size((int(data.Columns), int(data.Rows)), name, max_pixels)
    return data, syntax, decoder


def _read_dicom(file: _Clipped, name: str, max_pixels: int) -> tuple[Any, NDArray[Any]]:
    """Return the data set and its first frame, decoded only after every limit was checked."""
    data, syntax, decoder = _read_header(file, name, max_pixels)
    read = require_extra("pydicom.filereader", "dicom").read_dataset
    pixels = require_extra("pydicom.pixels", "dicom")
    uid = require_extra("pydicom.uid", "dicom")
    order = (syntax.is_implicit_VR, syntax.is_little_endian)
    # Hundreds of frames may follow the first, which is all that is read where none is compressed.
    frames, length = int(data.get("NumberOfFrames") or 1), None
    if frames > 1 and not syntax.is_encapsulated:
        length = require_extra("pydicom.pixels.utils", "dicom").get_expected_length(data)
        length = math.ceil(length / frames / 2) * 2
    data.update(read(file, *order, stop_when=lambda tag, *_: tag > 0x7FE00010, defer_size=length))
    for tag in (0x7FE00008, 0x7FE00009, 0x7FE00010):
        raw = data.get_item(tag, keep_deferred=True) if tag in data else None
        if raw is not None and raw.value is None:  # longer than that
            file.seek(raw.value_tell)
            data[tag] = raw._replace(value=file.read(length))
    if not any(map(data.get, ("PixelData", "FloatPixelData", "DoubleFloatPixelData"))):
        raise ImageError(
            f"{name} is a DICOM file without pixel data, or cut off within them. Fetch it again."
        )
    # JPEG of 12 bits is beyond Pillow and GDCM, which say that they decode its transfer syntax.
    is_deep = syntax == uid.JPEGExtended12Bit and data.get("BitsStored") != 8
    if not decoder.is_available or (is_deep and "pylibjpeg" not in decoder.available_plugins):
        raise ImageError(
            f"{name} is compressed ({syntax.name}) and no decoder for that is installed. For JPEG "
            'and JPEG 2000: pip install "chestxray-covid[dicom]". For lossless JPEG and JPEG-LS: '
            "pip install python-gdcm. For JPEG of 12 bits: pip install pylibjpeg-libjpeg"
        )
    data.file_meta = require_extra("pydicom.dataset", "dicom").FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    _lift_groups(data)
    if syntax.is_encapsulated:
        _check_frame(data, name, max_pixels)
        frame = _first_frame(data, partial(pixels.pixel_array, data, index=0))
        return data, _without_overlay(frame, data) if syntax in _LOSSLESS else frame
    read_first = partial(pixels.pixel_array, data, index=0, number_of_frames=1)
    return data, _first_frame(data, read_first)


def _lift_groups(data: Any) -> None:
    """Put what is said of the first frame where other than enhanced DICOM says it."""
    # PS3.3 C.7.6.16: either group may hold a macro, not both.
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for groups in (data.get(keyword) or ())[:1]:
            for macro in ("PixelValueTransformation", "FrameVOILUT", "PixelMeasures"):
                for item in (groups.get(f"{macro}Sequence") or ())[:1]:
                    said = (e for e in item if e.keyword in _OF_FRAMES and not e.is_empty)
                    data.update({e.tag: e for e in said})


def _first_frame(data: Any, decode: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """Return the stored values, also those in the upper bits of what is allocated.

    Older editions of PS3.5 let HighBit be any; pydicom takes it for one less than BitsStored.
    """
    stored, high = data.get("BitsStored"), data.get("HighBit")
    if stored and high and stored <= high < data.BitsAllocated:
        data.BitsStored = high + 1
        whole = decode()
        data.BitsStored = stored
        # Where the upper bits are not used, it is HighBit that is wrong.
        if whole.max() >= 1 << stored or whole.min() < -1 << (stored - 1):
            return np.asarray(whole >> (high + 1 - stored))
    return decode()


def _without_overlay(frame: NDArray[Any], data: Any) -> NDArray[Any]:
    """Return stored values without the bits above them, which pydicom clears in raw pixels only."""
    unused = 8 * frame.itemsize - data.BitsStored
    if unused <= 0 or data.get("HighBit") != data.BitsStored - 1:
        return frame
    return np.asarray((frame << unused) >> unused)


def _check_frame(data: Any, name: str, max_pixels: int) -> None:
    """Refuse a compressed first frame that claims more pixels than the DICOM header does.

    Decoders believe the frame: a few hundred bytes of JPEG 2000 took 12 GB and 84 s, measured.
    """
    frame = require_extra("pydicom.encaps", "dicom").get_frame(
        data.PixelData, 0, number_of_frames=int(data.get("NumberOfFrames") or 1)
    )
    what = f"The first frame of {name}"
    # SOC and SIZ markers, then x1, y1, x0, y0 of the image area (ISO/IEC 15444-1, A.5.1). In the
    # boxes of a JP2 file they can be anywhere, and in what they begin they are data.
    sizes = re.finditer(rb"\xff\x4f\xff\x51.{4}(.{16})", frame, re.DOTALL)
    for match in islice(sizes, 1 if frame.startswith(b"\xff\x4f\xff\x51") else None):
        x1, y1, x0, y0 = struct.unpack(">4I", match[1])
        check_size((x1 - x0, y1 - y0), what, max_pixels)
    if frame.startswith(b"\xff\xd8"):
        check_jpeg(frame, what, max_pixels)


def _pixel_ratio(data: Any) -> float:
    """Return the height of pixels by their width, 1 where nothing says it that can be true."""
    for keyword in _SPACINGS:
        with suppress(ArithmeticError, TypeError, ValueError, Warning):  # no two numbers, or a 0
            high, wide = _numbers(data, keyword)
            if high > 0 and 0.1 <= high / wide <= 10:
                return high / wide
    return 1.0


def _display(frame: NDArray[Any], data: Any, name: str) -> NDArray[np.uint8]:
    """Return stored grey values as shown on a monitor (PS3.3 C.11.1 and C.11.2)."""
    values, is_signed = frame, frame.dtype.kind == "i"
    if data.get("ModalityLUTSequence"):
        values, _ = _lookup(values, data.ModalityLUTSequence[0], data, is_signed)
        is_signed = False
    else:
        slope, intercept = _first(data, "RescaleSlope"), _first(data, "RescaleIntercept")
        # A slope of 0, of which nothing would be left to see, is as good as none.
        if slope and intercept is not None and (slope, intercept) != (1, 0):
            values = values * slope + intercept
            is_signed = any(end * slope + intercept < 0 for end in _possible(data, is_signed))
    low, high = value_range(values, name)
    tables = (item for item in data.get("VOILUTSequence") or () if item.get("LUTData"))
    if table := next(tables, None):
        values, top = _lookup(values, table, data, is_signed)
        return stretch(values, 0, top)
    function = str(data.get("VOILUTFunction") or "LINEAR").upper()
    window = _first_window(data, function)
    if window is not None:
        return stretch(_window(values, *window, function), 0, 1)
    # Also 8 bits that are kept in 16, unless a lookup table has made them other values.
    is_grey = values is frame and values.dtype.kind == "u"
    if is_grey and data.BitsStored == 8 and high <= 255:
        return values.astype(np.uint8)
    inside = _inside(frame, data)
    if inside.any() and not inside.all():
        low, high = value_range(values[inside], name)
        values = np.clip(values, low, high)
    return stretch(values, low, high)


def _possible(data: Any, is_signed: bool) -> tuple[int, int]:
    """Return the least and the greatest stored value that there can be."""
    count = 1 << int(data.get("BitsStored") or data.BitsAllocated)
    return (-(count // 2), count // 2 - 1) if is_signed else (0, count - 1)


def _word(value: float, is_signed: bool) -> float:
    """Return what 16 bits stand for, whichever of US and SS they are said to be."""
    below = 0x8000 * is_signed
    return (value + below) % 0x10000 - below


def _inside(frame: NDArray[Any], data: Any) -> NDArray[np.bool_]:
    """Return which stored values are of the image, not padding around it (PS3.3 C.7.5.1.1.2)."""
    padding = _first(data, "PixelPaddingValue")
    if padding is None:
        return np.ones(1, np.bool_)
    limit = _first(data, "PixelPaddingRangeLimit")
    is_signed = frame.dtype.kind == "i"
    ends = sorted(_word(end, is_signed) for end in (padding, padding if limit is None else limit))
    return np.asarray((frame < ends[0]) | (frame > ends[1]))


def _numbers(data: Any, keyword: str) -> list[float]:
    """Return the values of a numeric element, none where it is absent or empty."""
    value = data.get(keyword)
    empty = value is None or str(value) == ""
    return [] if empty else np.ravel(np.asarray(value, dtype=np.float64)).tolist()


def _first(data: Any, keyword: str) -> float | None:
    """Return the first value of a numeric element, ``None`` where it is absent or empty."""
    number = next(iter(_numbers(data, keyword)), None)
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{keyword} is {number}")
    return number


def _first_window(data: Any, function: str) -> tuple[float, float] | None:
    """Return centre and width of the first window that is possible, ``None`` if there is none.

    The width is 1 or more for LINEAR, for others more than 0 (PS3.3 C.11.2.1.2 and C.11.2.1.3).
    """
    try:
        centers, widths = _numbers(data, "WindowCenter"), _numbers(data, "WindowWidth")
    except (TypeError, ValueError):  # no numbers
        return None
    narrowest = math.ulp(0.0) if function in _EXACT else 1
    for center, width in zip(centers, widths, strict=False):
        if math.isfinite(center) and narrowest <= width < math.inf:
            return center, width
    return None


def _window(
    values: NDArray[Any], center: float, width: float, function: str
) -> NDArray[np.float64]:
    """Return values in [0, 1] after a VOI window (PS3.3 C.11.2.1.2 and C.11.2.1.3).

    A function that the standard does not know is taken for LINEAR, its default.
    """
    if function not in _EXACT:
        center, width = center - 0.5, width - 1
    # A width of 0 is a threshold.
    position = (values.astype(np.float64) - center) / max(width, 1e-9)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * position, -60, 60)))
    return np.clip(position + 0.5, 0, 1)


def _lookup(
    values: NDArray[Any], item: Any, data: Any, is_signed: bool
) -> tuple[NDArray[Any], int]:
    """Return values through a lookup table, and its largest possible output (PS3.3 C.11.2.1.1).

    pydicom's own functions wrap around where a table of 8-bit outputs has more than 256 entries,
    and take the first value that is mapped for signed or not by what is stored, or by its VR. That
    of a VOI LUT depends on what the modality's rescale can make of it.

    Args:
        values: To be looked up.
        item: Of the sequence that holds the table.
        data: The data set.
        is_signed: Whether there can be negative values.
    """
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    first = int(_word(first, is_signed))
    entries = entries % (1 << 16) or 1 << 16  # with signed pixels some are read as negative
    table = item.LUTData
    if isinstance(table, bytes):
        wide = ("<" if data.file_meta.TransferSyntaxUID.is_little_endian else ">") + "u2"
        table = np.frombuffer(table, "u1" if len(table) in (entries, entries + 1) else wide)
    top = (1 << bits) - 1
    table = np.clip(np.ravel(np.asarray(table))[:entries], 0, top)
    if table.size < entries:
        raise ValueError(f"a lookup table of {entries} entries holds {table.size}")
    # In images 8 and 16 are allowed (C.11.2.1.1), so that 16 is said of entries of 12, as by Agfa.
    if bits == 16 and (highest := int(table.max())) < 1 << 12:
        top = (1 << highest.bit_length()) - 1
    index = np.clip(np.rint(values.astype(np.float64) - first), 0, entries - 1)
    return table[index.astype(np.int32)], top
