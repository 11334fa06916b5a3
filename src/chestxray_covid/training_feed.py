"""Pixels on the run's device before they are needed, and losses without waiting for it.

A GPU computes on its own while Python prepares what comes next, unless Python asks it for a number:
then it has nothing to do until more is prepared. So batches are assembled in threads and copied
from memory that the GPU reads itself, and a loss is read one step late.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from chestxray_covid.datasets.loading import Loader, map_ahead
from chestxray_covid.transforms import on_host, send

Item = TypeVar("Item")
#: Most images that a thread loads at a time, so that a cache costs little beside its pixels.
_TOGETHER = 16


def feed(
    load: Loader, batches: Sequence[Sequence[int]], device: torch.device, *, workers: int
) -> Generator[Tensor, None, None]:
    """Yield the pixels of each batch on a device, loaded and assembled ahead of time.

    At most two batches are loaded and two assembled before they are asked for.

    Args:
        load: From position to ``(1, S, S)`` uint8 pixels.
        batches: Positions of each batch.
        device: Where the pixels go.
        workers: Threads that load, a few images at a time; one more assembles.

    Yields:
        ``(N, 1, S, S)`` uint8.

    Raises:
        ImageError: If a file cannot be decoded, after the batches before it.
    """
    largest = max(map(len, batches), default=1)
    size = max(1, min(_TOGETHER, largest // workers))
    parts = [[b[i : i + size] for i in range(0, len(b), size)] for b in batches]
    loaded = map_ahead(
        lambda part: [load(i) for i in part],
        itertools.chain.from_iterable(parts),
        workers=workers,
        ahead=math.ceil(2 * largest / size),
    )

    def assemble(count: int) -> Tensor:
        images = [image for part in itertools.islice(loaded, count) for image in part]
        return on_host(np.stack(images), device)

    # In one thread, which is the only one that asks for what is loaded.
    assembled = map_ahead(assemble, map(len, parts), workers=1, ahead=2)
    with closing(loaded), closing(assembled):
        for pixels in assembled:
            yield send(pixels, device)


class LateReader(Generic[Item]):
    """Numbers that a device computes, read in order and without stopping it.

    Args:
        device: Computes the numbers.
        late: Whether :meth:`ready` leaves some, which may still be computed; on a GPU if not given.
    """

    def __init__(self, device: torch.device, *, late: bool | None = None) -> None:
        self._on_gpu = device.type == "cuda"
        self._late = self._on_gpu if late is None else late
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None, Item]] = deque()

    def put(self, number: Tensor, item: Item) -> None:
        """Ask for a number of a single element, which belongs to something."""
        event = None
        number = number.detach()
        if self._on_gpu:  # pragma: no cover - needs a GPU
            number = number.to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._waiting.append((number, event, item))

    def ready(self, *, leave: int) -> Iterator[tuple[float, Item]]:
        """Yield the numbers, oldest first; a late reader leaves the last so many for later."""
        while len(self._waiting) > (leave if self._late else 0):
            number, event, item = self._waiting.popleft()
            if event is not None:  # pragma: no cover - needs a GPU
                event.synchronize()
            yield float(number), item
