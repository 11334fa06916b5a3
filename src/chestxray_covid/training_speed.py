"""torchvision's network made faster on a CPU, its numbers the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.models.densenet import _DenseBlock, _DenseLayer

from chestxray_covid.engine_torch import relu_


class _ReLU(torch.autograd.Function):
    """:func:`engine_torch.relu_` of bfloat16 on a CPU, with a gradient in the same manner."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.mark_dirty(value)
        ctx.save_for_backward(value)
        return relu_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        # What is above 0 is so as a whole number, too, and a gradient is taken over or is 0. Only
        # NaN of negative sign, to which torch passes it on, get 0.
        bits = gradient.view(torch.int16), value.view(torch.int16)
        kept: Tensor = torch.ops.aten.threshold_backward(*bits, 0)
        return kept.view(torch.bfloat16)


def _relu(value: Tensor) -> Tensor:
    """Do as ``nn.ReLU(inplace=True)`` does."""
    made: Tensor = _ReLU.apply(value) if value.dtype == torch.bfloat16 else value.relu_()
    return made


def _grow(block: _DenseBlock, features: Tensor) -> Tensor:
    """Do as the block does, which for each layer joins all parts again, one by one."""
    for layer in block.values():
        features = torch.cat([features, layer([features])], 1)
    return features


def _bottleneck(layer: _DenseLayer, inputs: Sequence[Tensor]) -> Tensor:
    """Do as the layer's ``bn_function`` does, which copies what is in one piece already."""
    features = inputs[0] if len(inputs) == 1 else torch.cat(list(inputs), 1)
    made: Tensor = layer.conv1(layer.relu1(layer.norm1(features)))
    return made


def _computes_as(module: nn.Module, kind: type[nn.Module], *names: str) -> bool:
    """Return whether a module's functions are those of its kind, and nobody's own."""
    return all(
        getattr(type(module), name, None) is getattr(kind, name) and name not in vars(module)
        for name in ("forward", *names)
    )


def _is_torchvisions(block: _DenseBlock) -> bool:
    """Return whether block and layers compute as torchvision made them, and keep what they made.

    A layer's first norm gets what the next layers get, too, not a copy: nobody may change it.
    """
    return _computes_as(block, _DenseBlock) and all(
        _computes_as(layer, _DenseLayer, "bn_function")
        and _computes_as(layer.norm1, nn.BatchNorm2d)
        and not any(m._forward_pre_hooks or m._forward_hooks for m in (layer, layer.norm1))
        and not layer.memory_efficient
        for layer in block.values()
    )


@contextlib.contextmanager
def faster_on_cpu(*models: torchvision.models.DenseNet) -> Iterator[None]:
    """Let networks compute the same logits and gradients in less time, while this is entered.

    Measured against torchvision's own steps in ``benchmarks/training_step.py``. Blocks with
    gradient checkpointing stay as they are: what they join would be kept.

    Args:
        models: On the CPU. Functions of their modules are replaced, and given back at the end;
            copies that are made meanwhile keep them.
    """
    replaced: list[tuple[nn.Module, str, Callable[..., Tensor]]] = []

    def replace(module: nn.Module, name: str, function: Callable[..., Tensor]) -> None:
        replaced.append((module, name, function))
        setattr(module, name, function)

    try:
        for module in {module for model in models for module in model.features.modules()}:
            if isinstance(module, nn.ReLU) and module.inplace and _computes_as(module, nn.ReLU):
                replace(module, "forward", _relu)
            elif isinstance(module, _DenseBlock) and _is_torchvisions(module):
                replace(module, "forward", partial(_grow, module))
                for layer in module.values():
                    replace(layer, "bn_function", partial(_bottleneck, layer))
        yield
    finally:
        for module, name, function in replaced:
            if vars(module).get(name) is function:
                delattr(module, name)
