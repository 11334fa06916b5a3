"""Memory while training: the largest batch that fits, and gradients without what is in between."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torchvision
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torchvision.models.densenet import _DenseLayer

from chestxray_covid.errors import TrainingError, TrainingWarning
from chestxray_covid.processor import memory_limit

if TYPE_CHECKING:
    from chestxray_covid.training_config import TrainingConfig

#: Batch norm has no statistics of a single image.
SMALLEST_BATCH = 2
#: A run of fewer optimizer steps is warned of where its batch was found: the recommended recipe
#: takes 945 for a thousand images.
FEW_STEPS = 100
#: Share of a machine's memory that a batch may take on a CPU: decoding, the cache of files and
#: other programs need the rest, and too large a batch would end in swapping, not in an error.
_SHARE = 0.5
#: Peak memory of a step over what its backward pass keeps. Measured for 16 images in float32 and
#: bfloat16: 1.13 and 1.26, with gradient checkpointing 1.51 and 1.70, the most of three rounds
#: (benchmarks/results/training_memory.json).
_OVERHEAD = 1.8
#: Bytes that an image takes at once while it passes, per pixel of the input: in the first dense
#: block, which is the widest, some 1024 channels of a sixteenth of the pixels in single precision.
#: Measured with a frozen body at 224 px: 10.5 MiB, of the 12.3 that this says.
PASSING_BYTES = 1024 / 16 * 4

Forward = Callable[[nn.Module, Tensor], Tensor]


@contextlib.contextmanager
def gradient_checkpointing(model: torchvision.models.DenseNet) -> Iterator[None]:
    """Let dense layers be computed a second time for the gradient, while this is entered.

    torchvision's ``memory_efficient`` does it, but its batch norms then see each batch twice. A
    momentum of ``1 - sqrt(1 - m)`` gives the same statistics in two updates as ``m`` in one. Only
    ``num_batches_tracked``, which nothing reads, counts both.

    Args:
        model: Changed in place, and changed back.
    """
    flags: list[_DenseLayer] = []
    momenta: list[tuple[nn.BatchNorm2d, float]] = []
    trains = False  # whether a gradient reaches the input of the next module
    for module in model.features.modules():
        if isinstance(module, _DenseLayer) and not module.memory_efficient:
            flags.append(module)
            if trains and module.norm1.momentum is not None:
                momenta.append((module.norm1, module.norm1.momentum))
        trains = trains or any(p.requires_grad for p in module.parameters(recurse=False))
    try:
        for layer in flags:
            layer.memory_efficient = True
        for norm, momentum in momenta:
            norm.momentum = 1 - math.sqrt(1 - momentum)
        yield
    finally:
        for layer in flags:
            layer.memory_efficient = False
        for norm, momentum in momenta:
            norm.momentum = momentum


def largest_batch_size(
    model: nn.Module,
    forward: Forward,
    *,
    size_px: int,
    limit: int,
    passing_bytes: float = 0.0,
    memory_bytes: int | None = None,
) -> int:
    """Return the largest power of two of images that can be trained on at once, at least 2.

    On a GPU, sizes are tried until one does not fit beside a tenth of the memory, which stays
    free. On a CPU, where too much is no error but swapping, and on the GPU of a Mac, whose memory
    is the machine's, it is computed from what a small batch keeps for its backward pass, or takes
    while it passes, and from half of the machine's memory (or of the limit of a container or a
    cluster's job), so that the same machine always gives the same answer.

    Args:
        model: In training mode; a copy of it is tried.
        forward: From model and ``(N, 1, S, S)`` float32 pixels to logits.
        size_px: Side of the images.
        limit: Most images that are of use, at least 2.
        passing_bytes: Where it is computed, what an image takes at least per pixel of the input;
            for DenseNet-121 :data:`PASSING_BYTES`.
        memory_bytes: Where it is computed, what a step may take; see above if not given.

    Raises:
        TrainingError: If a batch of 2 does not fit, or the machine's memory is not known.
    """
    trial = copy.deepcopy(model)
    for module in trial.modules():
        if isinstance(module, nn.SyncBatchNorm):
            # Each process tries sizes of its own, in which the others take no part: one that asks
            # them would wait for ever. The two kinds hold the same.
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    device = next(trial.parameters()).device
    if device.type in ("cpu", "mps"):
        memory = _memory_bytes() if memory_bytes is None else memory_bytes
        small, large = (kept_bytes(trial, forward, _pixels(n, size_px, device)) for n in (2, 4))
        # What is frozen keeps nothing, and is computed all the same.
        each = max(_OVERHEAD * (large - small) / 2, passing_bytes * size_px**2)
        room = memory - _OVERHEAD * max(0.0, small - (large - small))

        def fits(count: int) -> bool:
            return count * each <= room

    else:  # pragma: no cover - needs a GPU
        ballast = torch.cuda.get_device_properties(device).total_memory // 10

        def fits(count: int) -> bool:
            return _can_step(trial, forward, _pixels(count, size_px, device), ballast)

    found = _largest(fits, limit)
    if not found:
        raise TrainingError(
            f"A batch of {SMALLEST_BATCH} images of {size_px} px does not fit into the memory of "
            f"{device}. Use smaller images, gradient_checkpointing=True, or another device."
        )
    return found


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest power of two that fits and is within the limit, or 0."""
    found, size = 0, SMALLEST_BATCH
    while size <= max(limit, SMALLEST_BATCH) and fits(size):
        found, size = size, 2 * size
    return found


def _pixels(count: int, size_px: int, device: torch.device) -> Tensor:
    return torch.zeros((count, 1, size_px, size_px), device=device)


def kept_bytes(model: nn.Module, forward: Forward, pixels: Tensor) -> int:
    """Return the size of what a forward pass keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # kept: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward(model, pixels)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _can_step(model: nn.Module, forward: Forward, pixels: Tensor, ballast: int) -> bool:
    """Return whether forward and backward pass fit beside so many bytes."""
    try:
        reserve = torch.empty(ballast, dtype=torch.uint8, device=pixels.device)
        torch.autograd.backward(forward(model, pixels).sum())
        del reserve
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)
    return True


def _memory_bytes() -> int:
    """Return what a process may take: half of the machine's memory, shared with its like.

    Raises:
        TrainingError: If the system does not say.
    """
    if not hasattr(os, "sysconf"):
        raise TrainingError(
            'batch_size="auto" needs to know the size of the memory, which this system does not '
            "say. Give a number."
        )
    memory = min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), memory_limit())
    return int(_SHARE * memory / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def warn_of_few_steps(batch: int, images: int, config: TrainingConfig, *, stacklevel: int) -> None:
    """Warn if a batch that was found leaves a run too few steps to learn.

    Args:
        batch: Images per batch, in all processes together.
        images: Images per epoch.
        config: Options of the run.
        stacklevel: As ``warnings.warn`` has it.

    Warns:
        TrainingWarning: If the run takes fewer than :data:`FEW_STEPS`.
    """
    steps = math.ceil(images / (batch * config.accumulate))
    if steps * config.epochs < FEW_STEPS:
        warnings.warn(
            f'batch_size="auto" found {batch} images: {steps} step(s) per epoch, '
            f"{steps * config.epochs} in the whole run, at a learning_rate of "
            f"{config.learning_rate:.3g}. Set batch_size, or raise learning_rate or epochs.",
            TrainingWarning,
            stacklevel=stacklevel + 1,
        )
