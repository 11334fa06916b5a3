"""One callable, several runtimes: pixels in, logits and features out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.checkpoint import ModelConfig
from chestxray_covid.errors import CheckpointError
from chestxray_covid.tensors import check_tensors

if TYPE_CHECKING:
    import torch

ENGINES = ("auto", "torch")


class Engine(Protocol):
    """Computes a checkpoint's network; may be called from several threads."""

    def __call__(
        self, pixels: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return ``(N, K)`` logits and ``(N, 1024)`` features of ``(N, 1, S, S)`` pixels."""
        ...  # pragma: no cover - a declaration


def open_engine(
    config: ModelConfig,
    tensors: Mapping[str, NDArray[Any]],
    *,
    engine: str = "auto",
    device: str | None = None,
) -> Engine:
    """Return the runtime of a checkpoint.

    Args:
        config: Its config.
        tensors: Its weights.
        engine: ``"torch"``, or ``"auto"`` for the best that is installed.
        device: Torch device such as ``"cpu"``, ``"cuda"`` or ``"mps"``; the CPU if not given.

    Raises:
        ValueError: If the engine is unknown or the device is not there.
        CheckpointError: If the weights are not those that the config describes.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {ENGINES}, got {engine!r}")
    check_tensors(tensors, len(config.classes), Path("tensors"))
    return TorchEngine(config, tensors, device=device or "cpu")


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return ``(N, K)`` probabilities of ``(N, K)`` logits, rows summing to 1.

    Raises:
        CheckpointError: If a logit is not finite.
    """
    exact = logits.astype(np.float64)
    if not np.isfinite(exact).all():
        raise CheckpointError(
            "The model gave a value that is not finite: its weights overflow. "
            "Train it again with a lower learning rate."
        )
    powers = np.exp(exact - exact.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


class TorchEngine:
    """The network in torch: inference mode, channels-last, float32."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, NDArray[Any]], *, device: str
    ) -> None:
        import torch

        from chestxray_covid.models import from_tensors

        self._preprocess = config.preprocess
        try:
            self._device: torch.device = torch.device(device)
            model = from_tensors(tensors).to(self._device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device {device!r} cannot be used: {error}. Use 'cpu', or a device that "
                "torch finds on this machine."
            ) from error
        self._model = model.to(memory_format=torch.channels_last)

    def __call__(
        self, pixels: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return ``(N, K)`` logits and ``(N, 1024)`` features of ``(N, 1, S, S)`` pixels."""
        import torch

        from chestxray_covid.models import forward_features, normalise

        with torch.inference_mode():
            batch = normalise(torch.from_numpy(pixels).to(self._device), self._preprocess)
            batch = batch.contiguous(memory_format=torch.channels_last)
            features = forward_features(self._model, batch)
            logits = self._model.classifier(features)
        return logits.cpu().numpy(), features.cpu().numpy()
