"""What people pass as images, one by one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chestxray_covid.datasets.base import ChestXrayDataset
from chestxray_covid.datasets.loading import image_files
from chestxray_covid.files import is_folder
from chestxray_covid.image import Preprocess
from chestxray_covid.pixels import ImageFacts

#: Pixels of an image, and what it was before.
ReadImage: TypeAlias = tuple[NDArray[np.uint8], ImageFacts]


class Item(NamedTuple):
    """An image of a data set, decoded when its turn comes."""

    dataset: ChestXrayDataset
    position: int


def is_single(images: Any) -> bool:
    """Return whether something is one image, as opposed to what holds images."""
    if isinstance(images, (str, os.PathLike)):
        return not is_folder(images)
    if hasattr(images, "read"):  # an open file, which is also an iterator of its lines
        return True
    several = isinstance(images, (list, tuple, ChestXrayDataset, Iterator))
    return not several and getattr(images, "ndim", None) != 4


def expand(images: Any) -> Iterable[Any]:
    """Return the single images of whatever holds images."""
    if is_single(images):
        return [images]
    if isinstance(images, ChestXrayDataset):
        return (Item(images, position) for position in range(len(images)))
    if isinstance(images, (str, os.PathLike)):
        return image_files(Path(images))
    return chain.from_iterable(map(expand, images))


def name_of(image: Any) -> str:
    """Return what a prediction calls an image: its path, or what it was given as."""
    if isinstance(image, Item):
        return str(image.dataset.samples[image.position].path)
    if isinstance(image, (str, os.PathLike)):
        return os.fsdecode(image)
    if isinstance(image, Image.Image):
        return "<PIL image>"
    if hasattr(image, "read"):
        return "<stream>"
    return "<bytes>" if isinstance(image, (bytes, bytearray, memoryview)) else "<array>"


def read(image: Any, preprocess: Preprocess) -> ReadImage:
    """Return ``(1, S, S)`` uint8 pixels of a single image, and its facts.

    Raises:
        ImageError: If it cannot be decoded.
        MissingExtraError: If it is DICOM and pydicom is not installed.
        TypeError: If it is no image.
    """
    if not isinstance(image, Item):
        return preprocess.read(image)
    sample = image.dataset.samples[image.position]
    if sample.is_file and image.dataset.transform is None:
        return preprocess.read(sample.path)
    return preprocess.read(image.dataset.image(image.position, preprocess.decode_size()))


def check_positive(name: str, value: int) -> None:
    """Refuse an argument that counts nothing.

    Raises:
        ValueError: If it is not positive.
    """
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
