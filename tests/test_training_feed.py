from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from chestxray_covid.errors import ImageError
from chestxray_covid.training_feed import LateReader, feed
from chestxray_covid.transforms import send, to_device

CPU = torch.device("cpu")


def numbered(index: int) -> NDArray[np.uint8]:
    return np.full((1, 4, 4), index, np.uint8)


def test_batches_come_whole_and_in_order() -> None:
    batches = [[3, 1, 2], [5], [7, 7]]
    found = list(feed(numbered, batches, CPU, workers=2))
    assert [(b.shape, b.dtype) for b in found] == [((n, 1, 4, 4), torch.uint8) for n in (3, 1, 2)]
    assert [b[:, 0, 0, 0].tolist() for b in found] == batches


def test_only_a_few_batches_are_ahead_of_what_was_asked_for() -> None:
    loaded: list[int] = []

    def load(index: int) -> NDArray[np.uint8]:
        loaded.append(index)
        return numbered(index % 256)

    batches = [list(range(i, i + 10)) for i in range(0, 1000, 10)]
    pixels = feed(load, batches, CPU, workers=3)
    next(pixels)
    time.sleep(0.3)  # as long as it likes to go on
    assert len(loaded) <= 60, "one was given, one more is about to be, two wait, two are loaded"
    pixels.close()


def test_the_images_of_one_batch_are_loaded_in_as_many_threads_as_asked() -> None:
    both = threading.Barrier(2, timeout=30)

    def meet(index: int) -> NDArray[np.uint8]:
        both.wait()  # passes only if two threads come here at once
        return numbered(index)

    (batch,) = feed(meet, [[0, 1]], CPU, workers=2)
    assert batch[:, 0, 0, 0].tolist() == [0, 1]


def test_no_batch_and_no_image_are_nothing() -> None:
    assert list(feed(numbered, [], CPU, workers=2)) == []


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    pixels = feed(numbered, [[i] for i in range(100)], CPU, workers=2)
    next(pixels)
    assert threading.active_count() > before
    pixels.close()
    assert threading.active_count() == before


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


def test_a_late_reader_leaves_what_it_is_told_to() -> None:
    losses: LateReader[int] = LateReader(CPU, late=True)
    for step in range(4):
        losses.put(torch.tensor(step / 2), step)
    assert list(losses.ready(leave=3)) == [(0.0, 0)]
    assert list(losses.ready(leave=5)) == []
    assert list(losses.ready(leave=0)) == [(0.5, 1), (1.0, 2), (1.5, 3)]


def test_an_array_keeps_its_values_and_kind_on_the_device() -> None:
    found = to_device(np.array([2, 0, 1]), CPU)
    assert found.dtype == torch.int64
    assert found.tolist() == [2, 0, 1]


@pytest.mark.parametrize(("kind", "waits"), [("cpu", True), ("mps", True), ("cuda", False)])
def test_only_a_gpu_that_reads_by_itself_is_not_waited_for(kind: str, waits: bool) -> None:
    asked: list[dict[str, bool]] = []

    class Tensor:
        def to(self, device: torch.device, **how: bool) -> None:
            asked.append(how)

    send(Tensor(), torch.device(kind))  # type: ignore[arg-type]
    assert asked == [{"non_blocking": not waits}]


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
