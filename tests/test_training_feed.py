from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from chestxray_covid.errors import ImageError
from chestxray_covid.training_feed import LateReader, feed, to_device

CPU = torch.device("cpu")


def numbered(index: int) -> NDArray[np.uint8]:
    return np.full((1, 4, 4), index, np.uint8)


def test_batches_come_whole_and_in_order() -> None:
    batches = [[3, 1, 2], [5], [7, 7]]
    found = list(feed(numbered, batches, CPU, workers=2))
    assert [(b.shape, b.dtype) for b in found] == [((n, 1, 4, 4), torch.uint8) for n in (3, 1, 2)]
    assert [b[:, 0, 0, 0].tolist() for b in found] == batches


def test_only_a_few_batches_are_ahead_of_what_was_asked_for() -> None:
    asked: list[int] = []

    def batches() -> Iterator[list[int]]:
        for i in range(100):
            asked.append(i)
            yield [i]

    pixels = feed(numbered, batches(), CPU, workers=3)
    next(pixels)
    assert len(asked) <= 7
    pixels.close()


def test_batches_are_assembled_in_as_many_threads_as_asked() -> None:
    both = threading.Barrier(2, timeout=30)

    def meet(index: int) -> NDArray[np.uint8]:
        both.wait()  # passes only if two threads come here at once
        return numbered(index)

    assert len(list(feed(meet, [[0], [1]], CPU, workers=2))) == 2


def test_an_image_that_cannot_be_read_is_an_error_after_the_batches_before_it() -> None:
    def load(index: int) -> NDArray[np.uint8]:
        if index == 3:
            raise ImageError("three.png is not an image")
        return numbered(index)

    pixels = feed(load, [[0, 1], [2, 3], [4]], CPU, workers=2)
    assert next(pixels).shape[0] == 2
    with pytest.raises(ImageError, match=r"three\.png"):
        next(pixels)


def test_numbers_of_a_cpu_are_read_at_once_and_in_order() -> None:
    losses: LateReader[str] = LateReader(CPU)
    weight = torch.tensor(2.0, requires_grad=True)
    losses.put(weight * 3, "first")
    losses.put(weight * 4, "second")
    assert list(losses.ready(leave=1)) == [(6.0, "first"), (8.0, "second")]
    assert list(losses.ready(leave=0)) == []


def test_an_array_keeps_its_values_and_kind_on_the_device() -> None:
    found = to_device(np.array([2, 0, 1]), CPU)
    assert found.dtype == torch.int64
    assert found.tolist() == [2, 0, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_read_one_step_late() -> None:  # pragma: no cover
    device = torch.device("cuda")
    losses: LateReader[int] = LateReader(device)
    for step in range(3):
        losses.put(torch.full((), step + 0.5, device=device), step)
        assert list(losses.ready(leave=1)) == ([(step - 0.5, step - 1)] if step else [])
    assert list(losses.ready(leave=0)) == [(2.5, 2)]
    pixels = next(feed(numbered, [[1, 2]], device, workers=1))
    assert pixels.device.type == "cuda"
    assert pixels[:, 0, 0, 0].tolist() == [1, 2]
