"""The largest batch, against what a step really keeps; gradient checkpointing."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chestxray_covid import build_densenet121, training_memory
from chestxray_covid.errors import TrainingError
from chestxray_covid.training_memory import (
    PASSING_BYTES,
    gradient_checkpointing,
    largest_batch_size,
)

SIZE = 32


class Plain(nn.Module):
    """Keeps of each image its own pixels and eight times as many."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(1, 8, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.sin(self.mix(pixels)).mean((2, 3))


#: float32: the pixels, for the gradient of the convolution, and its output, for that of the sine.
KEPT = 9 * SIZE * SIZE * 4


def forward(model: nn.Module, pixels: Tensor) -> Tensor:
    logits: Tensor = model(pixels)
    return logits


def largest(memory: float, limit: int = 1000) -> int:
    return largest_batch_size(Plain(), forward, size_px=SIZE, limit=limit, memory_bytes=int(memory))


@pytest.mark.parametrize(("images", "found"), [(2.1, 2), (3.9, 2), (4.1, 4), (64.5, 64)])
def test_the_largest_power_of_two_fits_beside_its_overhead(images: float, found: int) -> None:
    assert largest(1.8 * KEPT * images) == found


@pytest.mark.parametrize(("limit", "found"), [(1, 2), (2, 2), (31, 16), (32, 32)])
def test_it_is_no_larger_than_of_use(limit: int, found: int) -> None:
    assert largest(1e12, limit) == found


def test_what_does_not_fit_at_all_is_an_error_with_a_cure() -> None:
    with pytest.raises(
        TrainingError, match="2 images of 32 px does not fit into the memory of cpu"
    ):
        largest(1.8 * KEPT)


def test_the_machines_memory_is_shared_by_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_memory, "memory_limit", lambda: math.inf)
    whole = largest_batch_size(Plain(), forward, size_px=SIZE, limit=1 << 30)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert largest_batch_size(Plain(), forward, size_px=SIZE, limit=1 << 30) == whole / 4
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert whole <= physical / 2 / 1.8 / KEPT < 2 * whole


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_memory, "memory_limit", lambda: int(2 * 1.8 * KEPT * 9))
    assert largest_batch_size(Plain(), forward, size_px=SIZE, limit=1000) == 8


def test_a_system_that_does_not_say_its_memory_wants_a_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "sysconf")
    with pytest.raises(TrainingError, match=r"size of the memory.*Give a number"):
        largest_batch_size(Plain(), forward, size_px=SIZE, limit=8)


class OnMac(Tensor):
    """Says that it lies on the GPU of a Mac."""

    device = torch.device("mps")


class PlainOnMac(Plain):
    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        with torch.no_grad():
            return iter([p.as_subclass(OnMac) for p in super().parameters(recurse)])  # type: ignore[misc]


def test_on_a_mac_it_is_computed_from_the_memory_that_its_gpu_shares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    pixels = training_memory._pixels

    def on_this_machine(count: int, size_px: int, device: torch.device) -> Tensor:
        asked.append(device.type)
        return pixels(count, size_px, torch.device("cpu"))

    monkeypatch.setattr(training_memory, "_pixels", on_this_machine)
    options: dict[str, int] = {"size_px": SIZE, "limit": 1000, "memory_bytes": 10**6}
    expected = largest(10**6)
    assert largest_batch_size(PlainOnMac(), forward, **options) == expected == 8
    assert set(asked) == {"cpu", "mps"}


def test_looking_for_it_leaves_the_model_as_it_was() -> None:
    model = build_densenet121(pretrained=False).train()
    before = copy.deepcopy(model.state_dict())

    def three(net: nn.Module, pixels: Tensor) -> Tensor:
        return forward(net, pixels.expand(-1, 3, -1, -1))

    plain = largest_batch_size(model, three, size_px=SIZE, limit=4096, memory_bytes=10**9)
    with gradient_checkpointing(model):
        spared = largest_batch_size(model, three, size_px=SIZE, limit=4096, memory_bytes=10**9)
    assert spared > plain
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_size_is_tried_without_asking_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("a process waits for others, which may try another size")

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", asked)
    plain = nn.Sequential(nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8), nn.Flatten())
    united = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))  # type: ignore[no-untyped-call]
    options: dict[str, int] = {"size_px": SIZE, "limit": 1000, "memory_bytes": 10**6}
    expected = largest_batch_size(plain, forward, **options)
    assert largest_batch_size(united, forward, **options) == expected
    assert type(united[1]) is nn.SyncBatchNorm


def test_what_is_frozen_takes_memory_too() -> None:
    def three(net: nn.Module, pixels: Tensor) -> Tensor:
        return forward(net, pixels.expand(-1, 3, -1, -1))

    model = build_densenet121(pretrained=False, trainable="head").train()
    options: dict[str, Any] = {"size_px": SIZE, "limit": 10**6, "memory_bytes": 10**8}
    found = largest_batch_size(model, three, passing_bytes=PASSING_BYTES, **options)
    live = peak = 0
    pixels = torch.zeros(8, 1, SIZE, SIZE)
    with torch.profiler.profile(profile_memory=True) as profiler:
        three(model, pixels)
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert found / 2 < 10**8 / (peak / 8) / 1.1
    assert found * peak / 8 < 10**8


def test_a_size_that_runs_out_of_memory_does_not_fit() -> None:
    def full(model: nn.Module, pixels: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def broken(model: nn.Module, pixels: Tensor) -> Tensor:
        raise RuntimeError("shapes do not fit")

    pixels = torch.zeros(2, 1, SIZE, SIZE)
    assert training_memory._can_step(Plain(), forward, pixels, 1000)
    assert not training_memory._can_step(Plain(), full, pixels, 1000)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        training_memory._can_step(Plain(), broken, pixels, 1000)


def test_a_network_is_given_back_as_it_came() -> None:
    model = build_densenet121(pretrained=False)
    with contextlib.suppress(KeyError), gradient_checkpointing(model):
        assert model.features.denseblock1.denselayer1.memory_efficient
        raise KeyError
    assert not model.features.denseblock1.denselayer1.memory_efficient
    assert model.features.denseblock1.denselayer1.norm1.momentum == 0.1
