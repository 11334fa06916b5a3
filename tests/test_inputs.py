from __future__ import annotations

import array
import io
import socket
from collections import UserList, UserString
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pytest
import torch
from PIL import Image

from chestxray_covid.errors import ImageError
from chestxray_covid.image import Preprocess
from chestxray_covid.inputs import expand, expand_any, hold, read

PREPROCESS = Preprocess(size_px=32)
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 40, 50), dtype=np.uint8)


def arrays() -> Iterator[Any]:
    buffer = np.empty_like(FRAMES[0])
    for frame in FRAMES:
        buffer[:] = frame
        yield buffer


def batches_of_one() -> Iterator[Any]:
    return (buffer[np.newaxis, np.newaxis] for buffer in arrays())


def lists_of_one() -> Iterator[Any]:
    return ([buffer] for buffer in arrays())


def tensors() -> Iterator[Any]:
    buffer = torch.empty(FRAMES.shape[1:], dtype=torch.uint8)
    for frame in FRAMES:
        buffer.copy_(torch.from_numpy(frame))
        yield buffer


def pictures() -> Iterator[Any]:
    canvas = Image.new("L", FRAMES.shape[:0:-1])
    for frame in FRAMES:
        canvas.paste(Image.fromarray(frame))
        yield canvas


def encoded(kind: Callable[[bytearray], Any]) -> Iterator[Any]:
    buffer = bytearray(10_000)
    for frame in FRAMES:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "BMP")
        buffer[: len(file.getvalue())] = file.getvalue()
        yield kind(buffer)


@pytest.mark.parametrize(
    "images",
    [
        arrays,
        batches_of_one,
        lists_of_one,
        tensors,
        pictures,
        lambda: encoded(lambda buffer: buffer),
        lambda: encoded(memoryview),
    ],
)
@pytest.mark.parametrize("taken", [expand, expand_any])
def test_an_iterator_may_fill_one_buffer_again_and_again(
    images: Callable[[], Iterator[Any]], taken: Callable[[Any], Any]
) -> None:
    held = [hold(image, PREPROCESS) for image in taken(images())]  # read later, by other threads
    found = np.stack([read(one, PREPROCESS)[0] for one in held])
    assert np.array_equal(found, np.stack([PREPROCESS(frame) for frame in FRAMES]))


class PolarsSeries:
    """A column as polars has it: no ndim, and NumPy's arrays are made of it."""

    shape = (2,)

    def to_list(self) -> list[str]:
        return [*self]

    def __iter__(self) -> Iterator[str]:
        return iter(["a.png", "b.png"])

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return np.array([*self])


@pytest.mark.parametrize(
    "column", [PolarsSeries(), pyarrow.array(["a.png", "b.png"]), UserList(["a.png", "b.png"])]
)
@pytest.mark.parametrize("taken", [expand, expand_any])
def test_a_column_stands_for_what_is_in_it(column: Any, taken: Callable[[Any], Any]) -> None:
    assert [*taken(column)] == ["a.png", "b.png"]
    assert [*taken([column])] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    "one",
    [
        pyarrow.table({"path": ["a.png"]}),
        array.array("B", b"x"),
        range(3),
        UserString("a.png"),
        pd.DataFrame({"path": ["a.png"]}),
    ],
)
def test_a_table_and_numbers_stand_for_no_images(one: Any) -> None:
    assert [*expand(one)] == [one]
    with pytest.raises((TypeError, ImageError)):
        read(one, PREPROCESS)


def test_images_of_a_list_and_single_ones_are_not_copied() -> None:
    frames = [*FRAMES]
    assert all(taken is given for taken, given in zip(expand(frames), frames, strict=True))
    assert next(iter(expand(frames[0]))) is frames[0]


def test_a_socket_from_an_iterator_is_left_connected() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert [*expand(iter([ours]))] == [ours]
        assert ours.fileno() >= 0
