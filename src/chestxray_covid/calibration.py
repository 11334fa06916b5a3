"""Probabilities that mean what they say: temperature scaling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chestxray_covid.metrics import check_labels, check_lengths

#: Temperatures outside say that the logits are no logits.
_TEMPERATURES = (0.05, 20.0)


def fit_temperature(
    y_true: ArrayLike, logits: ArrayLike, *, sample_weight: ArrayLike | None = None
) -> float:
    """Return the temperature T for which softmax(logits / T) has the lowest cross-entropy.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017. Labels stay as they are,
    and so does the order of images by p(a) / (p(a) + p(b)) of any two classes. Above 1 the model
    was too sure of itself, below 1 not sure enough.

    Args:
        y_true: ``(N,)`` classes 0 to K - 1 of patients that the model was not trained on.
        logits: ``(N, K)``, finite.
        sample_weight: ``(N,)`` at least 0, for example to count every class alike.

    Raises:
        ValueError: If shapes, labels or weights are not as said, or N is 0.

    >>> logits = np.array([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
    >>> round(float(np.log(3) * fit_temperature([0, 0, 0, 1], logits)), 3)  # 3 / T = log 3
    3.0
    """
    from scipy.optimize import minimize_scalar

    table = np.asarray(logits, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] < 2 or not len(table) or not np.isfinite(table).all():
        raise ValueError(f"logits must be finite, (N, K) with K of at least 2, got {table.shape}")
    truth = check_labels(y_true, "y_true", table.shape[1])
    weights = np.ones(len(table)) if sample_weight is None else np.asarray(sample_weight, float)
    check_lengths(y_true=truth, logits=table, sample_weight=weights)
    if not (np.isfinite(weights) & (weights >= 0)).all() or not weights.sum() > 0:
        raise ValueError("sample_weight must be finite, at least 0, and not all 0")

    def cross_entropy(log_temperature: float) -> float:
        scaled = table / np.exp(log_temperature)
        shifted = scaled - scaled.max(1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        return -float(np.average(logs[np.arange(len(logs)), truth], weights=weights))

    bounds = tuple(np.log(_TEMPERATURES))
    found = minimize_scalar(cross_entropy, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def fold_temperature(
    tensors: Mapping[str, NDArray[Any]], temperature: float
) -> dict[str, NDArray[Any]]:
    """Return a checkpoint's weights whose logits are divided by the temperature.

    So every engine, and every other library that opens the checkpoint, sees the same probabilities.

    Args:
        tensors: As :func:`checkpoint.densenet121_shapes` names them.
        temperature: From :func:`fit_temperature`.

    Raises:
        ValueError: If the temperature is not positive and finite.
    """
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    head = {
        name: (tensors[name] / temperature).astype(tensors[name].dtype)
        for name in ("classifier.weight", "classifier.bias")
    }
    return {**tensors, **head}
