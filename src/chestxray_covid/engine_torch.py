"""The network in torch, built from its steps; torchvision is not needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from chestxray_covid.errors import ForkedError
from chestxray_covid.graph import FEATURES, LOGITS, PIXELS, Network, Step, fold
from chestxray_covid.image import Preprocess
from chestxray_covid.processor import slow_bfloat16

#: Most images at once on a CPU: more do not fit its caches.
_CPU_BATCH = 8
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: The bits of bfloat16 for it, as a whole number.
_MINUS_INFINITY = -128
#: The variances hold their epsilon already; not 0, which torch 2.10 and 2.11 refuse.
_NO_MORE = 1e-12


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
        made = {PIXELS: pixels.to(self._dtype)}
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
        # On a Mac's GPU a batch norm of two precisions ends the process (pytorch issue 154887).
        apart = value.device.type == "mps" and self._dtype != torch.float32
        if step.op == "concat":
            value = torch.cat(inputs, 1)
        elif step.op == "max_pool":
            value = functional.max_pool2d(value, 3, stride=2, padding=1)
        elif step.op == "average_pool":
            value = functional.avg_pool2d(value, 2)
        elif step.op == "global_average":
            value = value.mean((2, 3))
        elif step.op == "affine" and weight is not None and bias is not None and apart:
            value = (value * weight[:, None, None] + bias[:, None, None]).to(self._dtype)
        elif step.op == "affine" and weight is not None and bias is not None:
            # A batch norm of mean 0 and deviation 1: of all ways the fastest in bfloat16, and with
            # weights in single precision the most exact.
            mean, variance = torch.zeros_like(bias), torch.ones_like(bias)
            value = functional.batch_norm(value, mean, variance, weight, bias, eps=_NO_MORE)
        elif step.op == "linear" and weight is not None:
            value = functional.linear(value, weight, bias)
        elif weight is not None:
            padding = step.padding
            if step.fill:  # the convolution itself pads with 0 alone
                value, padding = functional.pad(value, [padding] * 4, value=step.fill), 0
            value = functional.conv2d(value, weight, bias, step.stride, padding)
            # One channel is first and last at once: that of grey would come out channels-first.
            value = value.contiguous(memory_format=torch.channels_last)
        return relu_(value) if step.relu else value


def relu_(value: Tensor) -> Tensor:
    """Do as ``value.relu_()`` does, but for -0, which becomes 0.

    In bfloat16 on a CPU torch turns every number into single precision and back, which takes
    longer. As whole numbers of 16 bits, those that become 0 are at most that of minus infinity;
    above it are negative NaN, which stay NaN, and all from 0 on.

    Args:
        value: Changed in place.
    """
    if value.dtype != torch.bfloat16 or value.device.type != "cpu":
        return value.relu_()
    torch.threshold_(value.view(torch.int16), _MINUS_INFINITY, 0)
    return value


def _prepared(step: Step, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if step.op == "affine":
        return tensor.reshape(-1)
    if step.op == "convolution" and tensor.ndim == 4:
        return tensor.to(dtype).contiguous(memory_format=torch.channels_last)
    return tensor.to(dtype)


def _key(step: Step, part: str) -> str:
    return f"{step.name.replace('.', '_')}_{part}"


class TorchEngine:
    """The network in torch: inference mode, channels-last; an :class:`engines.Engine`.

    Args:
        tensors: Weights of a checkpoint.
        preprocess: Its preprocessing.
        device: A torch device, for example ``"cpu"``, ``"cuda"`` or ``"mps"``.
        precision: ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Raises:
        ValueError: If the device is not there.
    """

    name = "torch"
    calls = 1

    def __init__(
        self,
        tensors: Mapping[str, NDArray[Any]],
        preprocess: Preprocess,
        *,
        device: str,
        precision: str,
    ) -> None:
        self.precision = precision
        self._process = os.getpid()
        with _device_errors(device):
            self._device: torch.device = torch.device(device)
            if self._device.type == "meta":
                raise RuntimeError("it holds no values")
            folded = fold(tensors, preprocess, precision=precision)
            network = FoldedNetwork(folded, _DTYPES[precision])
            self._network = network.to(self._device).eval()
        # "cuda" alone is another GPU in another thread, once torch.cuda.set_device was called.
        self._device = next(self._network.buffers()).device

    def __call__(
        self, pixels: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return ``(N, K)`` logits and ``(N, 1024)`` features of ``(N, 1, S, S)`` pixels.

        Raises:
            ForkedError: In a process that was forked after the engine was opened, unless torch
                computes on the CPU in one thread.
        """
        check_forked(self._process, self._device)
        batch = torch.from_numpy(pixels)
        size = _CPU_BATCH if self._device.type == "cpu" else max(1, len(batch))
        starts = range(0, max(1, len(batch)), size)
        # An answer does not depend on the caller's autocast, which other threads do not see.
        plain = torch.autocast(self._device.type, enabled=False)
        with torch.inference_mode(), plain:
            parts = [self._network(batch[k : k + size].to(self._device)) for k in starts]
        logits, features = (torch.cat(found).cpu().numpy() for found in zip(*parts, strict=True))
        return logits, features


def check_forked(began: int, device: torch.device) -> None:
    """Raise where torch would wait for threads that a fork has left behind.

    Args:
        began: The process in which torch began to compute, see :func:`first_process`.
        device: Where it is to compute now.

    Raises:
        ForkedError: In another process, unless torch computes on the CPU in one thread.
    """
    if began == os.getpid():
        return
    # Neither the threads of OpenMP nor what CUDA knows of the device are in the new process.
    if device.type != "cpu" or torch.get_num_threads() > 1:
        raise ForkedError(
            "This process was forked from the one in which torch began to compute, where its "
            'threads have stayed. Start processes with multiprocessing.get_context("spawn"), '
            "or, on the CPU, call torch.set_num_threads(1) in each of them first."
        )


@lru_cache(maxsize=1)
def first_process() -> int:
    """Return the process that asked first, of this one and those it was forked from."""
    return os.getpid()


def native_precision(device: str) -> str:
    """Return the fastest precision that torch computes in natively on a device.

    Raises:
        ValueError: If there is no such kind of device.
    """
    with _device_errors(device):
        kind = torch.device(device)
    if kind.type == "cuda":
        return "float16"
    return "bfloat16" if native_bfloat16(kind) else "float32"


@contextmanager
def _device_errors(device: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {device!r} cannot be used: {error}. Use 'cpu', or a device that "
            "torch finds on this machine."
        ) from error


def accelerator_type() -> str:
    """Return the type of the GPU that torch finds here, ``"cpu"`` if it finds none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def native_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16 natively and faster, so that autocast pays."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return bool(has) and not slow_bfloat16()
    return False
