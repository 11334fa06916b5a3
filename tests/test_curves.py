from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import expit, logit
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from chestxray_covid import curves
from chestxray_covid import metrics as m

HOW = {"n_resamples": 60, "seed": 3, "confidence": 0.9}
N = 90


def case(*, ties: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return truth, scores in (0, 1) and patients of one to several images."""
    rng = np.random.default_rng(7)
    truth = np.arange(N) % 3 == 0
    score = 1 / (1 + np.exp(-(1.2 * truth - 0.5 + rng.normal(size=N))))
    return truth, np.round(score, 1) if ties else score, rng.integers(0, 40, N)


def three_classes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(8)
    truth = np.arange(N) % 3
    logits = 1.5 * np.eye(3)[truth] + rng.normal(size=(N, 3))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return truth, p, rng.integers(0, 40, N)


def resampled(patients: np.ndarray) -> list[np.ndarray]:
    """Return the images of each resample, drawn patient by patient as lists."""
    names = list(dict.fromkeys(patients.tolist()))
    images = [np.flatnonzero(patients == name) for name in names]
    rng = np.random.default_rng(HOW["seed"])
    return [
        np.concatenate([images[i] for i in rng.integers(len(names), size=len(names))])
        for _ in range(int(HOW["n_resamples"]))
    ]


def ends(drawn: list[np.ndarray]) -> np.ndarray:
    return np.quantile(np.stack(drawn), [0.05, 0.95], axis=0)


@pytest.mark.parametrize("ties", [False, True])
def test_the_roc_curve_and_its_band_agree_with_scikit_learn(ties: bool) -> None:
    truth, score, patients = case(ties=ties)
    found = curves.roc_curve(truth, score, patients, **HOW)
    fpr, tpr, thresholds = sk.roc_curve(truth, score, drop_intermediate=False)
    assert np.allclose([found.x, found.y], [fpr, tpr])
    assert np.array_equal(found.thresholds, thresholds)
    assert found.area.value == pytest.approx(sk.auc(found.x, found.y))
    drawn = []
    for rows in resampled(patients):
        a, b, _ = sk.roc_curve(truth[rows], score[rows], drop_intermediate=False)
        drawn.append(np.interp(found.grid, a, b))
    assert np.allclose([found.low, found.high], ends(drawn))


@pytest.mark.parametrize("ties", [False, True])
def test_the_precision_recall_curve_agrees_with_scikit_learn(ties: bool) -> None:
    truth, score, patients = case(ties=ties)
    found = curves.precision_recall_curve(truth, score, patients, **HOW)
    precision, recall, thresholds = sk.precision_recall_curve(truth, score)
    assert np.allclose([found.x, found.y], [recall[::-1], precision[::-1]])
    assert np.array_equal(found.thresholds[1:], thresholds[::-1])
    assert found.prevalence == truth.mean()
    assert found.area.value == pytest.approx(sk.average_precision_score(truth, score))
    drawn = []
    for rows in resampled(patients):
        b, a, _ = (v[::-1] for v in sk.precision_recall_curve(truth[rows], score[rows]))
        # The precision with which each recall is first reached; 0 stands for the first above it.
        drawn.append(np.array([b[a >= max(g, 1e-6) - 1e-9][0] for g in found.grid]))
    assert np.allclose([found.low, found.high], ends(drawn))


def test_risk_over_coverage_agrees_with_counting() -> None:
    truth, p, patients = three_classes()
    found = curves.risk_coverage_curve(truth, p, patients, **HOW)
    wrong, sure = p.argmax(1) != truth, p.max(1)
    for x, y, threshold in zip(found.x, found.y, found.thresholds, strict=True):
        kept = sure >= threshold
        assert x == pytest.approx(kept.mean())
        assert y == pytest.approx(wrong[kept].mean())
    assert (found.x[-1], found.y[-1]) == (1, pytest.approx(wrong.mean()))
    assert found.area.value == pytest.approx(found.y.mean())
    drawn = []
    for rows in resampled(patients):
        order = rows[np.argsort(-sure[rows], kind="stable")]
        levels = np.unique(sure[order])[::-1]
        share = np.array([(sure[order] >= level).mean() for level in levels])
        risk = np.array([wrong[order][sure[order] >= level].mean() for level in levels])
        drawn.append(np.array([risk[share >= g - 1e-9][0] for g in found.grid]))
    assert np.allclose([found.low, found.high], ends(drawn))


@pytest.mark.parametrize("n_bins", [1, 5, 15])
def test_reliability_agrees_with_scikit_learn(n_bins: int) -> None:
    truth, score, patients = case()
    found = curves.reliability(truth, score, patients, n_bins=n_bins, **HOW)
    observed, predicted = calibration_curve(truth, score, n_bins=n_bins)
    assert np.allclose([e.value for e in found.observed], observed)
    assert np.allclose(found.predicted, predicted)
    assert found.counts.sum() == N
    inside = (found.low_edges < found.predicted) & (found.predicted <= found.high_edges)
    assert inside.all()
    expected = (np.abs(observed - predicted) * found.counts).sum() / N
    assert found.ece.value == pytest.approx(expected)
    assert found.brier.value == pytest.approx(sk.brier_score_loss(truth, score))


def test_intervals_of_reliability_are_resampled_by_patient() -> None:
    truth, score, patients = case()
    found = curves.reliability(truth, score, patients, **HOW)
    drawn = [sk.brier_score_loss(truth[rows], score[rows]) for rows in resampled(patients)]
    assert np.allclose([found.brier.low, found.brier.high], np.quantile(drawn, [0.05, 0.95]))
    errors = [float(m.calibration_error(truth[r], score[r])) for r in resampled(patients)]
    assert np.allclose([found.ece.low, found.ece.high], np.quantile(errors, [0.05, 0.95]))


def regressed(truth: np.ndarray, score: np.ndarray) -> tuple[float, float]:
    """Return intercept and slope of weak calibration, by scikit-learn and a search for the root."""
    x = logit(score)
    intercept = brentq(lambda a: (truth - expit(a + x)).sum(), -50, 50)
    model = LogisticRegression(C=np.inf, tol=1e-10, solver="newton-cholesky")
    return intercept, float(model.fit(x[:, None], truth).coef_[0, 0])


@pytest.mark.parametrize("extreme", [0.3, 1, 4])
def test_weak_calibration_agrees_with_scikit_learn(extreme: float) -> None:
    truth, score, patients = case()
    score = expit(extreme * logit(score) - 1)
    found = curves.reliability(truth, score, patients, **HOW)
    drawn = np.array([regressed(truth[rows], score[rows]) for rows in resampled(patients)])
    for k, estimate in enumerate((found.intercept, found.slope)):
        assert estimate.value == pytest.approx(regressed(truth, score)[k], abs=1e-6)
        expected = np.quantile(drawn[:, k], [0.05, 0.95])
        assert np.allclose([estimate.low, estimate.high], expected, atol=1e-6)


def test_probabilities_that_are_right_have_intercept_0_and_slope_1() -> None:
    score = np.repeat([0.2, 0.5, 0.8], 10)
    truth = np.concatenate([np.arange(10) < 10 * p for p in (0.2, 0.5, 0.8)])
    found = curves.reliability(truth, score, range(30), **HOW)
    assert found.intercept.value == pytest.approx(0, abs=1e-9)
    assert found.slope.value == pytest.approx(1)


@pytest.mark.parametrize("certain", [False, True])
def test_probabilities_near_0_and_1_have_an_intercept_in_every_resample(certain: bool) -> None:
    truth, score, patients = case()
    score = np.round(score) if certain else expit(12 * logit(score))
    found = curves.reliability(truth, score, patients, **HOW).intercept
    kept = np.clip(score, 1e-8, 1 - 1e-8)  # as the R package CalibrationCurves does

    def root(rows: np.ndarray) -> float:
        x = logit(kept[rows])
        return float(brentq(lambda a: (truth[rows] - expit(a + x)).sum(), -50, 50))

    drawn = [root(rows) for rows in resampled(patients)]
    assert found.skipped == 0
    assert found.value == pytest.approx(root(np.arange(N)), abs=1e-6)
    assert np.allclose([found.low, found.high], np.quantile(drawn, [0.05, 0.95]), atol=1e-6)


def test_what_is_separated_has_no_slope_and_what_never_happened_no_intercept() -> None:
    apart = curves.reliability([0, 0, 1, 1], [0.0, 0.2, 0.9, 1.0], range(4), **HOW)
    assert np.isnan(apart.slope.value)
    assert np.isfinite(apart.intercept.value)
    # Here rounding ends Newton's steps far out, at a slope of some 120.
    for truth in ([0, 0, 1, 1], [1, 1, 0, 0]):
        p = np.array([0.08, 0.18, 0.29, 0.75])
        assert np.isnan(curves.reliability(truth, p, range(4), **HOW).slope.value)
        assert np.isnan(curves.reliability(truth, p.round(), range(4), **HOW).slope.value)
    never = curves.reliability([0, 0, 0], [0.1, 0.2, 0.9], range(3), **HOW)
    assert np.isnan([never.slope.value, never.intercept.value]).all()
    same = curves.reliability([0, 1, 1], [0.7, 0.7, 0.7], range(3), **HOW)
    assert np.isnan(same.slope.value)
    assert same.intercept.value == pytest.approx(logit(2 / 3) - logit(0.7))


def test_frames_hold_what_is_drawn() -> None:
    truth, score, patients = case()
    roc = curves.roc_curve(truth, score, patients, title="t", **HOW)
    assert list(roc.to_frame().columns) == ["x", "y", "threshold"]
    assert len(roc.to_frame()) == len(roc.x)
    assert roc.title == "t"
    frame = curves.reliability(truth, score, patients, **HOW).to_frame()
    expected = ["low_edge", "high_edge", "predicted", "observed", "low", "high", "n"]
    assert list(frame.columns) == expected
    assert frame["n"].sum() == N


def test_a_perfect_curve_has_no_band_because_no_resample_disagrees() -> None:
    truth = np.arange(20) % 2
    found = curves.roc_curve(truth, truth * 1.0, list(range(20)), **HOW)
    assert found.area.value == 1
    assert np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize("curve", [curves.roc_curve, curves.precision_recall_curve])
def test_a_curve_needs_both_kinds(curve: Any) -> None:
    with pytest.raises(ValueError, match="images of both kinds, got 2 positive and 0 negative"):
        curve([1, 1], [0.2, 0.3], [0, 1], **HOW)


def test_resamples_of_one_kind_leave_the_band_where_enough_are_left() -> None:
    truth = np.array([1, 0, 0, 1, 0, 0])
    score = [0.9, 0.2, 0.8, 0.3, 0.1, 0.4]
    area = curves.precision_recall_curve(truth, score, list("aabbcc"), **HOW).area
    assert area.skipped > 0
    found = curves.roc_curve(truth, score, list("aabbcc"), **HOW)
    assert np.isfinite([found.low, found.high]).all()


def test_reliability_refuses_what_is_no_probability() -> None:
    with pytest.raises(ValueError, match=r"y_prob must be in \[0, 1\], got 0.5 to 1.5"):
        curves.reliability([0, 1], [0.5, 1.5], [0, 1], **HOW)
    with pytest.raises(ValueError, match="n_bins must be at least 1, got 0"):
        curves.reliability([0, 1], [0.5, 0.6], [0, 1], n_bins=0, **HOW)


def test_patients_may_be_anything_that_has_a_hash() -> None:
    truth, score, patients = case()
    pairs = [("clinic", int(p)) for p in patients]
    found, expected = (curves.reliability(truth, score, p, **HOW) for p in (pairs, patients))
    assert found.observed == expected.observed
    assert found.ece == expected.ece


def test_reliability_refuses_other_lengths_and_what_is_no_number() -> None:
    with pytest.raises(ValueError, match="same length, got y_true 2, y_score 1"):
        curves.reliability([0, 1], [0.5], [0, 1], **HOW)
    with pytest.raises(ValueError, match="same length, got y_true 2, patients 1"):
        curves.reliability([0, 1], [0.5, 0.6], [0], **HOW)
    with pytest.raises(ValueError, match="y_score must be finite, got nan"):
        curves.reliability([0, 1], [0.5, np.nan], [0, 1], **HOW)
