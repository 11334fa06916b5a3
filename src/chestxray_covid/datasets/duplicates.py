"""Which samples belong together: patients, duplicates, and images known in two collections."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chestxray_covid.datasets.base import ChestXrayDataset, Sample, kept_path
from chestxray_covid.datasets.loading import map_ahead
from chestxray_covid.datasets.report import identity, patient_key
from chestxray_covid.datasets.storage import resolver
from chestxray_covid.errors import check_dataset, check_positive, real_number
from chestxray_covid.progress import Bar

#: Correlation of thumbnails from which two radiographs count as copies; on 6,400 radiographs of
#: four public sources it gives 45 pairs and no chain longer than three.
DUPLICATE_CORRELATION = 0.98
_THUMBNAIL_PX = 64
#: Metadata with what :meth:`Sample.content_hash` gave; a table's own hash may be another one.
FILE_HASH = "content_hash()"


def patient_groups(
    dataset: ChestXrayDataset,
    *,
    find_copies: bool = True,
    workers: int = 2,
    progress: bool = False,
) -> list[int]:
    """Return the group of each sample, numbered from 0; samples of a group belong together.

    A group is a patient of a source, joined with every other that shares a file, a duplicate
    image (:func:`find_duplicates`), an image of the same ``content_hash`` in the metadata, or one
    known under the same id in two collections (``origin`` and ``image_id`` in the metadata).

    Raises:
        TypeError: If ``dataset`` is no data set.
        ValueError: If ``workers``, the threads that decode, is not positive.
        ImageError: If a file cannot be decoded.
    """
    check_dataset(dataset)
    check_positive("workers", workers)
    joined = _UnionFind(len(dataset))
    first: dict[tuple[str, ...], int] = {}
    resolved = resolver()
    for i, sample in enumerate(dataset.samples):
        for key in _identities(sample, resolved):
            joined.join(first.setdefault(key, i), i)
    if find_copies:
        thumbnails = _thumbnails(dataset, workers, progress)
        # Equal ones are joined at once: pairs of thousands of copies would be millions.
        equal: dict[bytes, int] = {}
        for i, pixels in enumerate(thumbnails):
            if pixels.any():  # blank ones are no copies
                joined.join(equal.setdefault(hashlib.blake2b(pixels).digest(), i), i)
        different = list(equal.values())
        for k, i in enumerate(different):
            thumbnails[k] = thumbnails[i]
        for a, b in _similar(thumbnails[: len(different)], DUPLICATE_CORRELATION):
            joined.join(different[a], different[b])
    number: dict[int, int] = {}
    return [number.setdefault(joined.root(i), len(number)) for i in range(len(dataset))]


def on_two_sides(*sides: Iterable[Sample]) -> Iterator[Sample]:
    """Yield the samples of whom, or of which, an earlier side holds more.

    What belongs together is what :func:`patient_groups` joins without a look at the images. Memory
    grows with all sides but the last.
    """
    side_of: dict[tuple[str, ...], int] = {}
    resolved = resolver()
    for number, side in enumerate(sides, 1):
        for sample in side:
            keys = tuple(_identities(sample, resolved))
            if any(side_of.get(key, number) != number for key in keys):
                yield sample
            elif number < len(sides):
                side_of.update(dict.fromkeys(keys, number))


def _identities(sample: Sample, resolved: Callable[[str | Path], str]) -> Iterable[tuple[str, ...]]:
    yield "patient", *patient_key(sample)
    if sample.is_file:
        yield "file", resolved(kept_path(sample))
    if image_id := sample.metadata.get("image_id"):
        origin = sample.metadata.get("origin") or sample.source
        yield "image", identity(origin), identity(image_id)
    for name in ("content_hash", FILE_HASH):
        if content := sample.metadata.get(name):
            yield name, content


def find_duplicates(
    dataset: ChestXrayDataset,
    *,
    correlation: float = DUPLICATE_CORRELATION,
    workers: int = 2,
    progress: bool = False,
) -> list[tuple[int, int]]:
    """Return pairs of positions, ``a < b``, that show the same radiograph.

    Two images are the same if thumbnails of 64×64 pixels correlate above ``correlation``
    (Pearson). Equal pixels always do, under whatever file name or format; so do a recompressed
    and a scaled copy, though not one that was cropped, padded, mirrored, inverted or equalised. A
    blank image correlates with nothing. Memory is 21 KiB per image; time grows with the square of
    their number (6,000 images: some seconds).

    Raises:
        TypeError: If ``dataset`` is no data set, or ``correlation`` no number.
        ValueError: If ``correlation`` is outside (0, 1), or ``workers`` not positive.
        ImageError: If a file cannot be decoded.
    """
    correlation = real_number("correlation", correlation)
    if not 0 < correlation < 1:
        raise ValueError(f"correlation must be in (0, 1), got {correlation}")
    check_dataset(dataset)
    check_positive("workers", workers)
    return list(_similar(_thumbnails(dataset, workers, progress), correlation))


def _thumbnails(dataset: ChestXrayDataset, workers: int, progress: bool) -> NDArray[np.float32]:
    """Return ``(N, 4096)`` float32 thumbnails, each as :func:`_thumbnail` makes it."""
    shrink = map_ahead(
        # Decoded at least twice as large: each format is reduced to a size of its own.
        lambda s: _thumbnail(s.read(s, (2 * _THUMBNAIL_PX, 2 * _THUMBNAIL_PX))),
        dataset.samples,
        workers=workers,
    )
    bar = Bar(shrink, "duplicates", len(dataset), unit="img", disable=not progress)
    thumbnails = np.empty((len(dataset), _THUMBNAIL_PX**2), np.float32)
    for i, pixels in enumerate(bar):
        thumbnails[i] = pixels
    return thumbnails


def _similar(thumbnails: NDArray[np.float32], correlation: float) -> Iterator[tuple[int, int]]:
    block = 1024
    for start in range(0, len(thumbnails), block):
        similar = thumbnails[start : start + block] @ thumbnails[start:].T > correlation
        for a, b in zip(*np.nonzero(np.triu(similar, 1)), strict=True):
            yield int(start + a), int(start + b)


def _thumbnail(image: Image.Image) -> NDArray[np.float32]:
    """Return ``(4096,)`` float32 pixels of mean 0 and length 1, or 0 for a blank image."""
    # Pillow's BOX takes whole pixels: where sizes do not divide, copies would differ in fine lines.
    size = (_THUMBNAIL_PX, _THUMBNAIL_PX)
    small = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)
    pixels = np.asarray(small, np.float32).ravel()
    pixels -= pixels.mean()
    return pixels / max(float(np.linalg.norm(pixels)), 1e-6)


class _UnionFind:
    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def root(self, item: int) -> int:
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def join(self, a: int, b: int) -> None:
        self._parent[self.root(b)] = self.root(a)
