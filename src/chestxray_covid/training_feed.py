"""Pixels on the run's device before they are needed, and losses without waiting for it.

A GPU computes on its own while Python prepares what comes next, unless Python asks it for a number:
then it has nothing to do until more is prepared. So batches are assembled in threads and copied
from memory that the GPU reads itself, and a loss is read one step late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chestxray_covid.datasets.loading import Loader, map_ahead

Item = TypeVar("Item")


def feed(
    load: Loader, batches: Iterable[Sequence[int]], device: torch.device, *, workers: int
) -> Generator[Tensor, None, None]:
    """Yield the pixels of each batch on a device, assembled in threads ahead of time.

    Args:
        load: From position to ``(1, S, S)`` uint8 pixels.
        batches: Positions of each batch.
        device: Where the pixels go.
        workers: Threads that load and assemble, a batch each.

    Yields:
        ``(N, 1, S, S)`` uint8.

    Raises:
        ImageError: If a file cannot be decoded, after the batches before it.
    """

    def assemble(batch: Sequence[int]) -> Tensor:
        return on_host(np.stack([load(i) for i in batch]), device)

    with closing(map_ahead(assemble, batches, workers=workers, ahead=workers + 2)) as assembled:
        for pixels in assembled:
            yield pixels.to(device, non_blocking=True)


def on_host(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on the CPU, from which the device can copy by itself."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on the device, without waiting for it."""
    return on_host(array, device).to(device, non_blocking=True)


class LateReader(Generic[Item]):
    """Numbers that a device computes, read in order and without stopping it.

    On a GPU :meth:`ready` leaves those of the last call of :meth:`put`, which it may still be
    computing; elsewhere it leaves none.

    Args:
        device: Computes the numbers.
    """

    def __init__(self, device: torch.device) -> None:
        self._late = device.type == "cuda"
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None, Item]] = deque()

    def put(self, number: Tensor, item: Item) -> None:
        """Ask for a number of a single element, which belongs to something."""
        event = None
        number = number.detach()
        if self._late:  # pragma: no cover - needs a GPU
            number = number.to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._waiting.append((number, event, item))

    def ready(self, *, leave: int) -> Iterator[tuple[float, Item]]:
        """Yield the numbers, oldest first; on a GPU the last so many are left for later."""
        while len(self._waiting) > (leave if self._late else 0):
            number, event, item = self._waiting.popleft()
            if event is not None:  # pragma: no cover - needs a GPU
                event.synchronize()
            yield float(number), item
