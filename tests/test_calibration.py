from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from chestxray_covid import Classifier, ModelConfig, Preprocess, build_densenet121
from chestxray_covid.calibration import fit_temperature, fold_temperature
from chestxray_covid.models import to_tensors


def drawn(temperature: float, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Return labels drawn from softmax(logits / temperature), and those logits."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (count, 3))
    powers = np.exp(logits / temperature)
    shares = (powers / powers.sum(1, keepdims=True)).cumsum(1)
    return (rng.random((count, 1)) > shares[:, :-1]).sum(1), logits


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_labels_were_drawn_at_is_found(temperature: float) -> None:
    labels, logits = drawn(temperature)
    assert fit_temperature(labels, logits) == pytest.approx(temperature, rel=0.05)


def test_it_is_that_of_a_gradient_descent_in_torch() -> None:
    labels, logits = drawn(1.7, 500)
    weights = np.random.default_rng(1).uniform(0, 2, 500)
    log = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log], max_iter=100, tolerance_change=1e-12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        scaled = torch.from_numpy(logits) / log.exp()
        losses = torch.nn.functional.cross_entropy(
            scaled, torch.from_numpy(labels), reduction="none"
        )
        loss = (losses * torch.from_numpy(weights)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = fit_temperature(labels, logits, sample_weight=weights)
    assert found == pytest.approx(float(log.detach().exp()), rel=1e-4)


@pytest.mark.parametrize(
    ("y_true", "logits", "weights", "message"),
    [
        ([0, 1], [[1.0, 2.0]], None, "must have the same length|lengths"),
        ([0], [[1.0, np.nan]], None, "logits must be finite"),
        ([0], [1.0], None, r"\(N, K\)"),
        ([], np.zeros((0, 2)), None, r"\(N, K\)"),
        ([2], [[1.0, 2.0]], None, "y_true"),
        ([0], [[1.0, 2.0]], [0.0], "not all 0"),
        ([0, 1], [[1.0, 2.0], [0.0, 0.0]], [1.0, -1.0], "at least 0"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    y_true: Any, logits: Any, weights: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit_temperature(y_true, logits, sample_weight=weights)


def test_a_folded_temperature_divides_the_logits_of_every_engine() -> None:
    config = ModelConfig(classes=("normal", "covid19"), preprocess=Preprocess(size_px=32))
    tensors = to_tensors(build_densenet121(pretrained=False, seed=0))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    plain = Classifier(config, tensors).predict_proba(list(pixels))
    folded = Classifier(config, fold_temperature(tensors, 2.0)).predict_proba(list(pixels))
    odds = np.log(plain[:, 1] / plain[:, 0])
    np.testing.assert_allclose(np.log(folded[:, 1] / folded[:, 0]), odds / 2, atol=1e-5)


@pytest.mark.parametrize("temperature", [0, -1, np.nan, np.inf])
def test_an_impossible_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        fold_temperature({}, temperature)
