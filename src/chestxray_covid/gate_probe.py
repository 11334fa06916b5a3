"""What tells kinds of image apart: a logistic regression, as arrays. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.errors import CheckpointError
from chestxray_covid.tensors import FEATURE_COUNT

#: Kinds of image that a gate is taught, in the order of its rows; the first is what it lets pass.
#: A gate that was fitted before the last kinds were added has no rows for them.
KINDS = ("frontal", "lateral", "ct", "inverted", "turned", "foreign", "part")
THUMBNAIL_PX = 16
GREY_BINS = 16
#: Length of what :func:`gate.describe` returns.
DESCRIPTORS = THUMBNAIL_PX**2 + GREY_BINS + 2
#: Standardised inputs are cut off here, so that no single one decides about an unheard-of image.
_MAX_DEVIATION = 4.0
#: Tensors in other types than float32: large ones of the order of 1 or below, and a digest.
_TYPES = {"probe": "float16", "basis": "float16", "network": "int64"}
_POSITIVE = frozenset({"scale", "variances", "noise", "max_distance", "doubt"})


@dataclass(frozen=True, kw_only=True, eq=False)
class KindProbe:
    """A multinomial logistic regression of the kinds of image, stateless.

    Attributes:
        mean: ``(P,)`` mean of the inputs over the images that it was fitted on.
        scale: Their deviation; none is 0.
        probe: ``(K, P)`` weights on the standardised input, a row for each of the first K of
            :data:`KINDS`; K is at least 2.
        bias: ``(K,)``.
        min_log_odds: ``(K - 1,)``; the logarithm of how many times more probable than a frontal
            radiograph each other kind must be to be flagged.

    Raises:
        ValueError: If a shape does not fit, or a value is not finite or not positive that must be.
    """

    #: Inputs that follow the features: what :func:`gate.describe` returns.
    DESCRIBED: ClassVar[int] = DESCRIPTORS

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    probe: NDArray[np.float32]
    bias: NDArray[np.float32]
    min_log_odds: NDArray[np.float32]

    def __post_init__(self) -> None:
        if not 2 <= self.bias.size <= len(KINDS):
            raise ValueError(
                f"bias must be (K,) with K in 2 to {len(KINDS)}, got {self.bias.shape}"
            )
        for name, shape in self._shapes().items():
            values = getattr(self, name)
            if values.shape != shape:
                raise ValueError(f"{name} must be of shape {shape}, got {values.shape}")
            if not np.isfinite(values).all():
                raise ValueError(f"{name} has values that are not finite")
            if name in _POSITIVE and not (values > 0).all():
                raise ValueError(f"{name} must be positive")

    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        inputs, kinds = FEATURE_COUNT + self.DESCRIBED, self.bias.size
        return {
            "mean": (inputs,),
            "scale": (inputs,),
            "probe": (kinds, inputs),
            "bias": (kinds,),
            "min_log_odds": (kinds - 1,),
        }

    def log_odds(self, inputs: NDArray[Any]) -> NDArray[np.float64]:
        """Return ``(N, K)`` logarithms of the odds of each kind against the first of them.

        Args:
            inputs: ``(N, P)``.
        """
        return self._log_odds(standardise(inputs, self.mean, self.scale))

    def _log_odds(self, standard: NDArray[np.float64]) -> NDArray[np.float64]:
        logits = standard @ self.probe.T.astype(np.float64) + self.bias
        return np.asarray(logits - logits[:, :1], np.float64)

    def excess(self, log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return ``(..., K - 1)``, by how much ``(..., K)`` log-odds exceed their thresholds."""
        return np.asarray(log_odds[..., 1:] - self.min_log_odds, np.float64)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name, as they are stored."""
        return {
            # In C order: safetensors writes the memory of an array as it lies.
            name: np.asarray(getattr(self, name), _TYPES.get(name, "float32"), order="C")
            for name in self.names()
        }

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the arrays."""
        return [f.name for f in fields(cls) if f.name != "lungs"]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]], where: str, **parts: Any) -> Self:
        """Return what :meth:`tensors` gave.

        Args:
            tensors: Name → array; all of :meth:`names`.
            where: Name of the file, for messages.
            parts: Other attributes.

        Raises:
            CheckpointError: If one has another type, or as for a ``ValueError`` of the class.
        """
        for name, tensor in tensors.items():
            expected = _TYPES.get(name, "float32")
            if tensor.dtype != expected:
                raise CheckpointError(
                    f"{where}: {name} has type {tensor.dtype}, expected {expected}."
                )
        wide = {
            name: tensor if tensor.dtype == np.int64 else tensor.astype(np.float32)
            for name, tensor in tensors.items()
        }
        try:
            return cls(**wide, **parts)
        except ValueError as error:
            raise CheckpointError(f"{where} is no gate: {error}.") from error


def standardise(
    inputs: NDArray[Any], mean: NDArray[Any], scale: NDArray[Any]
) -> NDArray[np.float64]:
    """Return ``(N, P)`` inputs less their mean, over their deviation, cut off at ±4.

    Args:
        inputs: ``(N, P)``.
        mean: ``(P,)``.
        scale: ``(P,)``, positive.
    """
    standard = (inputs.astype(np.float64) - mean) / scale
    return np.asarray(np.clip(standard, -_MAX_DEVIATION, _MAX_DEVIATION), np.float64)
