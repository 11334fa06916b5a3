"""What people pass as images, one by one."""

from __future__ import annotations

import array
import io
import os
from collections import UserString
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile

from chestxray_covid.datasets.base import ChestXrayDataset, Sample
from chestxray_covid.datasets.loading import image_files
from chestxray_covid.encoded import read_stream
from chestxray_covid.errors import ChestXrayError, ImageError, MissingExtraError
from chestxray_covid.files import expanded, is_folder, listed_path, looks_like_address
from chestxray_covid.image import Preprocess
from chestxray_covid.pixels import ImageFacts

#: Pixels of an image, and what it was before.
ReadImage: TypeAlias = tuple[NDArray[np.uint8], ImageFacts]
#: Lists within lists: from so many on, one of them is thought to contain itself.
_MAX_DEPTH = 32
#: Sequences that hold no images: an encoded image, numbers, characters.
_SINGLE = (bytes, bytearray, memoryview, array.array, range, UserString)


class Item(NamedTuple):
    """An image of a data set, decoded when its turn comes."""

    dataset: ChestXrayDataset
    position: int


class Held(NamedTuple):
    """An image that was read, wholly or from its stream, where it was given, or why it cannot."""

    name: str
    found: ReadImage | io.BytesIO | ChestXrayError


def is_single(images: Any) -> bool:
    """Return whether something is one image, as opposed to what holds images."""
    if isinstance(images, (str, os.PathLike)):
        # Of a folder elsewhere, a copy would hold what happens to have been fetched.
        return images == "" or looks_like_address(images) or not is_folder(expanded(images))
    if hasattr(images, "read"):  # a sample, or an open file, also an iterator of its lines
        return True
    dimensions = getattr(images, "ndim", None)
    several = isinstance(images, (Sequence, ChestXrayDataset, Iterator)) or _is_column(images)
    # Of one dimension: paths or other objects, as pandas and NumPy keep them.
    kept = dimensions == 1 and getattr(getattr(images, "dtype", None), "kind", "") in (
        "O",
        "U",
        "T",
    )
    return isinstance(images, _SINGLE) or not (several or kept or dimensions == 4)


def expand(images: Any, depth: int = 0, *, lasting: bool = True) -> Iterable[Any]:
    """Return the single images of whatever holds images.

    Those of an iterator are copies where they can change: it may fill one array again and again.

    Args:
        images: What :meth:`Classifier.predict` takes.
        depth: Lists around it.
        lasting: Whether it stays as it is once the next one is taken.

    Raises:
        ValueError: While they are taken, if lists are nested too deeply.
    """
    if is_single(images):
        return [images if lasting else _copy(images)]
    if isinstance(images, ChestXrayDataset):
        return (Item(images, position) for position in range(len(images)))
    if isinstance(images, (str, os.PathLike)):
        return map(listed_path, image_files(expanded(images)))
    if depth == _MAX_DEPTH:
        raise ValueError(
            f"images are nested more than {_MAX_DEPTH} lists deep; does a list contain itself?"
        )
    lasting = lasting and not isinstance(images, Iterator)
    if hasattr(images, "to_pylist"):  # by iterating, pyarrow gives scalars of its own
        images = (scalar.as_py() for scalar in images)
    return chain.from_iterable(expand(one, depth + 1, lasting=lasting) for one in images)


def _is_column(images: Any) -> bool:
    """Return whether it is a column of polars or pyarrow, not a whole table."""
    if hasattr(images, "column_names"):
        return False
    is_flat = len(getattr(images, "shape", ())) == 1
    return hasattr(images, "to_pylist") or (hasattr(images, "to_list") and is_flat)


def _copy(image: Any) -> Any:
    if isinstance(image, (np.ndarray, Image.Image)) and not isinstance(image, ImageFile):
        return image.copy()
    if isinstance(image, (bytearray, memoryview)):
        return bytes(image)
    # A buffered stream and a socket can be detached, too, and then read no more.
    is_tensor = hasattr(image, "detach") and hasattr(image, "clone")
    return image.detach().clone() if is_tensor else image


def expand_any(images: Any) -> Iterable[Any]:
    """Return what :func:`expand` does, and of any other iterable what it iterates over."""
    one = isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image))
    one = one or any(hasattr(images, name) for name in ("read", "__array__", "detach"))
    iterable = hasattr(images, "__iter__") or hasattr(images, "__getitem__")
    return expand(images if one or not iterable or not is_single(images) else iter(images))


def hold(image: Any, preprocess: Preprocess) -> Any:
    """Return a single image so that another thread may read it, whatever happens to it meanwhile.

    A stream is read here, and a file that Pillow has opened, of which the next frame may be next.
    What cannot be read is an error once :func:`read` is asked for it.

    Raises:
        TypeError: If it is a stream of text.
    """
    try:
        if isinstance(image, ImageFile):
            return Held(name_of(image), read(image, preprocess))
        if hasattr(image, "read") and not isinstance(image, (Sample, os.PathLike)):
            return Held(name_of(image), io.BytesIO(read_stream(image)))
    except (ImageError, MissingExtraError) as error:
        return Held(name_of(image), error)
    return image


def name_of(image: Any) -> str:
    """Return what a prediction calls an image: its path, or what it was given as."""
    if isinstance(image, Held):
        return image.name
    if isinstance(image, Sample):
        return str(image.path)
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
    if isinstance(image, Held):
        if isinstance(image.found, ChestXrayError):
            raise image.found
        return image.found if isinstance(image.found, tuple) else preprocess.read(image.found)
    if not isinstance(image, Item):
        return preprocess.read(image)
    if image.dataset.transform is None:
        return preprocess.read(image.dataset.samples[image.position])
    return preprocess.read(image.dataset.image(image.position, preprocess.decode_size()))
