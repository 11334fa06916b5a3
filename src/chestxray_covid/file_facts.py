"""What a file says of itself, without a look at its pixels: size, format, depth, JPEG quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.datasets.base import Sample
from chestxray_covid.dicom import dicom_header
from chestxray_covid.encoded import open_header
from chestxray_covid.errors import ImageError, MissingExtraError

#: Sum of the luminance table of ITU-T T.81, Annex K.1, which libjpeg scales by the quality.
_LUMINANCE_SUM = 3688


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What a file's header says.

    Attributes:
        width_px: Width as stored.
        height_px: Height as stored.
        kind: Format, and mode, which says depth and colour: ``"JPEG L"``, ``"PNG I;16"``; of DICOM
            see :func:`dicom_header`.
        jpeg_quality: 1 to 100 as libjpeg counts, estimated; ``None`` for other formats.
    """

    width_px: int
    height_px: int
    kind: str
    jpeg_quality: float | None


def file_facts(sample: Sample) -> FileFacts | None:
    """Return what a sample's file says; ``None`` for phantoms, and what has no header to read."""
    if not sample.is_file:
        return None
    image = open_header(sample.path)
    if image is None:
        return _dicom_facts(sample.path)
    tables = getattr(image, "quantization", None)
    return FileFacts(
        width_px=image.size[0],
        height_px=image.size[1],
        kind=f"{image.format} {image.mode}",
        jpeg_quality=_quality(next(iter(tables.values()))) if tables else None,
    )


def _dicom_facts(path: Path) -> FileFacts | None:
    try:
        (width, height), kept = dicom_header(path)
    except (ImageError, MissingExtraError):
        return None
    return FileFacts(width_px=width, height_px=height, kind=f"DICOM {kept}", jpeg_quality=None)


def _quality(table: Sequence[int]) -> float:
    """Return the quality whose scaling of the standard table has this sum (libjpeg, jcparam.c).

    Too high below about 25, where entries are cut off at 255.
    """
    scale = 100 * sum(table) / _LUMINANCE_SUM
    quality = 5000 / scale if scale > 100 else (200 - scale) / 2
    return float(min(max(quality, 1.0), 100.0))


def as_numbers(facts: Sequence[FileFacts | None]) -> NDArray[np.float64]:
    """Return ``(N, D)``: logarithms of width, height and aspect ratio, quality, a column per kind.

    The quality of what is no JPEG is 0. What has no header is a kind of its own, all else 0:
    whether there is one can give a label away, too.
    """
    kinds = sorted({_kind(one) for one in facts})
    return np.array(
        [[*_sizes(one), *(float(_kind(one) == kind) for kind in kinds)] for one in facts]
    )


def _kind(one: FileFacts | None) -> str:
    return "" if one is None else one.kind


def _sizes(one: FileFacts | None) -> tuple[float, float, float, float]:
    if one is None:
        return 0.0, 0.0, 0.0, 0.0
    width, height = math.log(one.width_px), math.log(one.height_px)
    return width, height, width - height, one.jpeg_quality or 0.0
