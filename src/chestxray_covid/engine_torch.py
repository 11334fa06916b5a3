"""The network in torch, built from its steps; torchvision is not needed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from chestxray_covid.graph import FEATURES, LOGITS, PIXELS, Network, Step


class FoldedNetwork(nn.Module):
    """The folded network as a module: ``(N, 1, S, S)`` uint8 to logits and features, float32.

    It is channels-last throughout, and for inference alone.

    Args:
        network: From :func:`graph.fold`.
        dtype: What it computes in.
    """

    def __init__(self, network: Network, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._dtype = dtype
        self._steps = network.steps
        self._last_use = {name: step.name for step in network.steps for name in step.inputs}
        for step in network.steps:
            for part in ("weight", "bias"):
                values = getattr(step, part)
                if values is not None:
                    tensor = torch.from_numpy(values.copy())
                    self.register_buffer(_key(step, part), _prepared(step, tensor, dtype))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(N, K)`` logits and ``(N, 1024)`` features."""
        batch = pixels.to(self._dtype).contiguous(memory_format=torch.channels_last)
        made = {PIXELS: batch}
        for step in self._steps:
            made[step.name] = self._compute(step, [made[name] for name in step.inputs])
            for name in step.inputs:
                if self._last_use[name] == step.name:
                    del made[name]  # its memory serves the next
            if step.name == FEATURES:
                features = made[FEATURES]
        return made[LOGITS].float(), features.float()

    def _compute(self, step: Step, inputs: list[Tensor]) -> Tensor:
        value = inputs[0]
        weight = None if step.weight is None else self.get_buffer(_key(step, "weight"))
        bias = None if step.bias is None else self.get_buffer(_key(step, "bias"))
        if step.op == "concat":
            value = torch.cat(inputs, 1)
        elif step.op == "max_pool":
            value = functional.max_pool2d(value, 3, stride=2, padding=1)
        elif step.op == "average_pool":
            value = functional.avg_pool2d(value, 2)
        elif step.op == "global_average":
            value = value.mean((2, 3))
        elif step.op == "affine" and weight is not None and bias is not None:
            # A batch norm of mean 0 and deviation 1: of all ways the fastest in bfloat16, and with
            # weights in single precision the most exact.
            mean, variance = torch.zeros_like(bias), torch.ones_like(bias)
            value = functional.batch_norm(value, mean, variance, weight, bias, eps=0.0)
        elif step.op == "linear" and weight is not None:
            value = functional.linear(value, weight, bias)
        elif weight is not None:
            padding = step.padding
            if step.fill:  # the convolution itself pads with 0 alone
                value, padding = functional.pad(value, [padding] * 4, value=step.fill), 0
            value = functional.conv2d(value, weight, bias, step.stride, padding)
        return value.relu_() if step.relu else value


def _prepared(step: Step, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if step.op == "affine":
        return tensor.reshape(-1)
    if step.op == "convolution" and tensor.ndim == 4:
        return tensor.to(dtype).contiguous(memory_format=torch.channels_last)
    return tensor.to(dtype)


def _key(step: Step, part: str) -> str:
    return f"{step.name.replace('.', '_')}_{part}"
