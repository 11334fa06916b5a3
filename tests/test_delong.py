"""AUROCs with intervals by patient, against formulas written out and against simulated truths."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit

from chestxray_covid.delong import auroc_by_group, auroc_covariance
from chestxray_covid.metrics import auroc

N = 60


def case(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return truth and scores of N images."""
    rng = np.random.default_rng(seed)
    truth = np.arange(N) % 3 == 0
    return truth.astype(int), rng.standard_normal(N) + truth


def draw(
    rng: np.random.Generator, ill: int, healthy: int, true: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return patients, truth and scores; images of a patient share half of the variance."""
    owners = np.repeat(np.arange(ill + healthy), rng.choice([1, 1, 2, 4], ill + healthy))
    truth = (owners < ill).astype(int)
    noise = rng.standard_normal(len(owners)) + rng.standard_normal(ill + healthy)[owners]
    return owners, truth, noise / math.sqrt(2) + NormalDist().inv_cdf(true) * math.sqrt(2) * truth


def test_the_interval_is_delongs_on_the_logit_scale() -> None:
    truth, score = case()
    ill, healthy = score[truth == 1], score[truth == 0]
    beaten = ill[:, None] > healthy
    variance = np.var(beaten.mean(1), ddof=1) / len(ill) + np.var(beaten.mean(0), ddof=1) / len(
        healthy
    )
    value = beaten.mean()
    half = stats.t.ppf(0.95, len(ill) - 1) * math.sqrt(variance) / (value * (1 - value))
    found = auroc_by_group(truth, score, range(N), confidence=0.9)
    assert found.value == pytest.approx(value)
    assert (found.low, found.high) == pytest.approx(expit(logit(value) + np.array([-half, half])))
    assert (found.method, found.n, found.confidence) == ("delong", N, 0.9)


def test_copies_of_images_are_no_more_evidence() -> None:
    truth, score = case()
    once = auroc_by_group(truth, score, range(N))
    often = auroc_by_group(np.tile(truth, 5), np.tile(score, 5), list(range(N)) * 5)
    assert (often.value, often.low, often.high) == pytest.approx((once.value, once.low, once.high))
    assert often.method == "delong by patient"


def test_of_reversed_scores_the_interval_is_mirrored() -> None:
    truth, score = case()
    patients = (np.arange(N) // 2).tolist()
    found = auroc_by_group(truth, score, patients)
    mirrored = auroc_by_group(truth, -score, patients)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high))


@pytest.mark.parametrize("true", [0.5, 0.75, 0.95, 0.99])
@pytest.mark.parametrize("patients", [(40, 40), (10, 100)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(
    patients: tuple[int, int], true: float
) -> None:
    rng, held = np.random.default_rng(1), []
    for _ in range(400):
        owners, truth, score = draw(rng, *patients, true)
        found = auroc_by_group(truth, score, owners.tolist())
        if not math.isnan(found.low):
            held.append(found.low <= true <= found.high)
    assert len(held) > 380
    assert 0.905 <= np.mean(held) <= 0.98


def test_the_covariance_is_that_of_scores_drawn_again_and_again() -> None:
    rng, areas, told = np.random.default_rng(2), [], []
    for _ in range(400):
        owners, truth, one = draw(rng, 30, 40, 0.8)
        two = one + rng.standard_normal(len(one))
        both = np.stack([one, two])
        areas.append([auroc(truth, s) for s in both])
        told.append(auroc_covariance(truth.astype(bool), both, np.array(areas[-1]), owners))
    assert np.mean(told, axis=0) == pytest.approx(np.cov(np.transpose(areas)), rel=0.2)


@pytest.mark.parametrize(
    ("truth", "score", "patients", "value"),
    [
        ([], [], [], math.nan),
        ([1, 1], [0.1, 0.2], "ab", math.nan),
        ([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], "abcd", 1.0),
        ([0, 0, 1, 1], [0.3, 0.4, 0.1, 0.2], "abcd", 0.0),
        ([0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5], "abcd", 0.5),
        ([0, 0, 1, 1], [0.1, 0.3, 0.2, 0.4], "abcc", 0.75),
    ],
)
def test_what_has_no_interval_has_none(
    truth: list[int], score: list[float], patients: str, value: float
) -> None:
    found = auroc_by_group(truth, score, patients)
    assert found.value == pytest.approx(value, nan_ok=True)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.n == len(truth)


@pytest.mark.parametrize(
    ("truth", "score", "patients", "how", "match"),
    [
        ([0, 1], [0.1], "ab", {}, "y_true"),
        ([0, 1], [0.1, 0.2], "a", {}, "groups"),
        ([0, 2], [0.1, 0.2], "ab", {}, "y_true"),
        ([0, 1], [0.1, math.nan], "ab", {}, "y_score"),
        ([0, 1], [0.1, 0.2], ["a", None], {}, "needs a patient"),
        ([0, 1], [0.1, 0.2], "ab", {"confidence": 1.0}, "confidence must be inside"),
    ],
)
def test_bad_input_is_refused(
    truth: list[int], score: list[float], patients: list[str], how: dict[str, float], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        auroc_by_group(truth, score, patients, **how)
