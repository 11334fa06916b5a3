from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from chestxray_covid import metrics as m

SIZES = (2, 3, 17, 400)


def labels(n: int, n_classes: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return truth and prediction that agree better than chance, every class in the truth."""
    rng = np.random.default_rng((n, n_classes, seed))
    truth = np.arange(n) % n_classes
    return truth, np.where(rng.random(n) < 0.6, truth, rng.integers(0, n_classes, n))


def scores(n: int, *, ties: bool, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((n, seed))
    truth = np.arange(n) % 2
    score = 0.3 * truth + rng.random(n)
    return truth, np.round(score, 1) if ties else score


def probabilities(n: int, n_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((n, n_classes, seed))
    return np.arange(n) % n_classes, rng.dirichlet(np.ones(n_classes), n)


def weights(n: int, rows: int = 5) -> np.ndarray:
    """Return counts like those of resamples; each row keeps two first images of both classes."""
    counts = np.random.default_rng(n).integers(0, 4, (rows, n)).astype(float)
    counts[:, :2] += 1
    return counts


# ---- metrics against independent implementations


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_confusion_accuracy_and_kappa_agree_with_scikit_learn(n: int, n_classes: int) -> None:
    truth, predicted = labels(n, n_classes)
    names = list(range(n_classes))
    expected = sk.confusion_matrix(truth, predicted, labels=names)
    assert (m.confusion_matrix(truth, predicted, n_classes) == expected).all()
    for ours, theirs in (
        (m.accuracy, sk.accuracy_score),
        (m.cohen_kappa, sk.cohen_kappa_score),
    ):
        found = ours(truth, predicted, sample_weight=weights(n))
        expected = [theirs(truth, predicted, sample_weight=w) for w in weights(n)]
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", SIZES)
def test_shares_of_decisions_agree_with_scikit_learn(n: int) -> None:
    truth, predicted = labels(n)
    for w in (*weights(n), np.ones(n)):
        given = {"sample_weight": w, "zero_division": np.nan}
        for ours, theirs, positive in (
            (m.sensitivity, sk.recall_score, 1),
            (m.specificity, sk.recall_score, 0),
            (m.ppv, sk.precision_score, 1),
            (m.npv, sk.precision_score, 0),
        ):
            expected = theirs(truth, predicted, pos_label=positive, **given)
            found = ours(truth, predicted, sample_weight=w)
            assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_auroc_and_average_precision_agree_with_scikit_learn(n: int, ties: bool) -> None:
    truth, score = scores(n, ties=ties)
    for ours, theirs in (
        (m.auroc, sk.roc_auc_score),
        (m.average_precision, sk.average_precision_score),
    ):
        assert ours(truth, score) == pytest.approx(theirs(truth, score), abs=1e-12)
        found = ours(truth, score, sample_weight=weights(n))
        expected = [theirs(truth, score, sample_weight=w) for w in weights(n)]
        assert found == pytest.approx(expected, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-2, 2)), min_size=2, max_size=12))
def test_auroc_is_the_share_of_pairs_in_the_right_order(cases: list[tuple[bool, int]]) -> None:
    positive = [s for is_it, s in cases if is_it]
    negative = [s for is_it, s in cases if not is_it]
    pairs = [(p > q) + (p == q) / 2 for p in positive for q in negative]
    expected = sum(pairs) / len(pairs) if pairs else math.nan
    found = m.auroc([is_it for is_it, _ in cases], [s for _, s in cases])
    assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("n", SIZES)
def test_brier_agrees_with_scikit_learn(n: int, n_classes: int) -> None:
    truth, p = probabilities(n, n_classes)
    found = m.brier_score(truth, p, sample_weight=weights(n))
    for w, value in zip(weights(n), found, strict=True):
        each = [sk.brier_score_loss(truth == k, p[:, k], sample_weight=w) for k in range(n_classes)]
        assert value == pytest.approx(sum(each) / 2)


@pytest.mark.parametrize("n_bins", [1, 10, 15])
@pytest.mark.parametrize("n", SIZES)
def test_calibration_error_agrees_with_scikit_learns_curve(n: int, n_bins: int) -> None:
    truth, p = probabilities(n, 3)
    confidence, right = p.max(1), p.argmax(1) == truth
    share, mean = calibration_curve(right, confidence, n_bins=n_bins)
    edges = np.linspace(0, 1, n_bins + 1)[1:-1]
    counts = np.unique(np.searchsorted(edges, confidence), return_counts=True)[1]
    expected = (counts * np.abs(share - mean)).sum() / n
    assert m.expected_calibration_error(truth, p, n_bins=n_bins) == pytest.approx(expected)


def test_scores_that_tie_are_one_with_the_sum_of_their_weights() -> None:
    rng = np.random.default_rng(0)
    truth, weight = rng.integers(0, 2, 60), rng.random((5, 60))
    for score in (rng.random(60), rng.integers(0, 40, 60) / 40, np.zeros(60)):
        values, *sums = m.by_score(truth, score, sample_weight=weight)
        assert values.tolist() == sorted(set(score.tolist()))
        for found, label in zip(sums, (1, 0), strict=True):
            own = [weight[:, (score == value) & (truth == label)].sum(1) for value in values]
            assert found == pytest.approx(np.stack(own, axis=1), abs=1e-12)


def test_a_weight_counts_an_image_that_often() -> None:
    truth, p = probabilities(30, 3)
    often = weights(30)[0].astype(int)
    rows = np.repeat(np.arange(30), often)
    for metric in (m.brier_score, m.expected_calibration_error):
        found = metric(truth, p, sample_weight=often)
        assert found == pytest.approx(metric(truth[rows], p[rows]))


def test_the_calibration_error_of_one_event_agrees_with_scikit_learns_curve() -> None:
    truth, p = probabilities(400, 2)
    share, mean = calibration_curve(truth, p[:, 1], n_bins=10)
    counts = np.unique(np.searchsorted(np.arange(1, 10) / 10, p[:, 1]), return_counts=True)[1]
    expected = (counts * np.abs(share - mean)).sum() / 400
    assert m.calibration_error(truth, p[:, 1], n_bins=10) == pytest.approx(expected)


@pytest.mark.parametrize("ties", [False, True])
def test_the_area_under_risk_and_coverage_agrees_with_counting(ties: bool) -> None:
    truth, p = probabilities(60, 3)
    p = np.eye(3)[p.argmax(1)] * 0.3 + 0.7 * p
    if ties:
        p = np.array([[0.5, 0.3, 0.2], [0.8, 0.1, 0.1]])[np.arange(60) % 2]
    often = weights(60)[0].astype(int)
    for rows in (np.arange(60), np.repeat(np.arange(60), often)):
        wrong, sure = p[rows].argmax(1) != truth[rows], p[rows].max(1)
        expected = np.mean([wrong[sure >= level].mean() for level in sure])
        found = m.area_under_risk_coverage(truth[rows], p[rows])
        assert found == pytest.approx(expected)
    weighted = m.area_under_risk_coverage(truth, p, sample_weight=np.stack([often, often]))
    assert weighted == pytest.approx([expected] * 2)


def test_a_confidence_that_says_nothing_has_the_risk_of_all_decisions() -> None:
    truth, p = np.arange(9) % 3, np.tile([0.5, 0.3, 0.2], (9, 1))
    assert m.area_under_risk_coverage(truth, p) == pytest.approx(2 / 3)


def test_the_edge_of_a_calibration_bin_belongs_to_the_bin_below() -> None:
    # Two bins: confidence 0.5 in (0, 0.5], 0.6 in (0.5, 1]; together they would cancel to 0.05.
    p = [[0.5, 0.5], [0.6, 0.4]]
    assert m.expected_calibration_error([0, 1], p, n_bins=2) == pytest.approx((0.5 + 0.6) / 2)


@pytest.mark.parametrize(
    ("metric", "truth", "judged"),
    [
        (m.sensitivity, [0, 0], [0, 1]),
        (m.specificity, [1, 1], [0, 1]),
        (m.ppv, [0, 1], [0, 0]),
        (m.npv, [0, 1], [1, 1]),
        (m.cohen_kappa, [2, 2], [2, 2]),
        (m.auroc, [1, 1], [0.1, 0.2]),
        (m.auroc, [0, 0], [0.1, 0.2]),
        (m.average_precision, [1, 1], [0.1, 0.2]),
        (m.average_precision, [0, 0], [0.1, 0.2]),
    ],
)
def test_a_metric_without_cases_is_nan_and_does_not_warn(
    metric: object, truth: list[int], judged: list[float]
) -> None:
    assert math.isnan(metric(truth, judged))  # type: ignore[operator]
    rows = metric(truth, judged, sample_weight=np.zeros((2, 2)))  # type: ignore[operator]
    assert np.isnan(rows).all()
    assert rows.shape == (2,)


def test_metrics_are_plain_floats() -> None:
    assert type(m.auroc([0, 1], [0.2, 0.3])) is float
    assert type(m.sensitivity([True, False], [True, True])) is float


# ---- thresholds


@pytest.mark.parametrize("target", [0.01, 0.07, 0.29, 0.5, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("n", [2, 3, 40, 200])
def test_thresholds_agree_with_a_search_over_all_decisions(n: int, target: float) -> None:
    truth, score = scores(n, ties=True)
    # Every decision that a threshold can make is made by one of these.
    tried = np.concatenate([score, np.nextafter(score, np.inf)])
    good = [t for t in tried if m.sensitivity(truth, score >= t) >= target]
    assert m.threshold_at_sensitivity(truth, score, sensitivity=target) == max(
        t for t in good if t in score
    )
    lowest = m.threshold_at_specificity(truth, score, specificity=target)
    assert lowest == min(t for t in tried if m.specificity(truth, score >= t) >= target)
    assert m.specificity(truth, score >= lowest) >= target
    assert m.specificity(truth, score >= np.nextafter(lowest, -np.inf)) < target


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_a_specificity_is_reached_in_the_precision_of_the_scores(kind: Any) -> None:
    truth, score = scores(200, ties=False)
    own = score.astype(kind)
    found = m.threshold_at_specificity(truth, own, specificity=0.9)
    assert type(found) is float
    for judged in (own, own.astype(np.float64)):
        assert m.specificity(truth, judged >= found) >= 0.9
    assert m.specificity(truth, own >= np.nextafter(kind(found), kind(0))) < 0.9
    assert m.threshold_at_specificity([0, 1], np.array([1, 1], kind), specificity=1) > 1


def test_a_target_is_reached_exactly_where_multiplication_would_overshoot() -> None:
    truth, score = np.ones(100), np.arange(100) / 100
    assert 0.07 * 100 > 7
    found = m.threshold_at_sensitivity(truth, score, sensitivity=0.07)
    assert (score >= found).sum() == 7


@pytest.mark.parametrize("name", ["sensitivity", "specificity"])
def test_a_target_is_any_number_and_no_text(name: str) -> None:
    ask: Any = getattr(m, f"threshold_at_{name}")
    expected = ask([0, 1], [0.1, 0.2], **{name: 0.5})
    assert ask([0, 1], [0.1, 0.2], **{name: torch.tensor(0.5)}) == expected
    with pytest.raises(TypeError, match=f"{name} must be a number, got '0.5'"):
        ask([0, 1], [0.1, 0.2], **{name: "0.5"})


@pytest.mark.parametrize("target", [0, 1.01, -0.5, math.nan])
def test_thresholds_refuse_an_impossible_target(target: float) -> None:
    with pytest.raises(ValueError, match="sensitivity must be a fraction"):
        m.threshold_at_sensitivity([0, 1], [0.1, 0.2], sensitivity=target)
    with pytest.raises(ValueError, match="specificity must be a fraction"):
        m.threshold_at_specificity([0, 1], [0.1, 0.2], specificity=target)


def test_thresholds_need_a_case_of_their_class() -> None:
    with pytest.raises(ValueError, match="sensitivity needs a case with label 1"):
        m.threshold_at_sensitivity([0, 0], [0.1, 0.2], sensitivity=0.9)
    with pytest.raises(ValueError, match="specificity needs a case with label 0"):
        m.threshold_at_specificity([1, 1], [0.1, 0.2], specificity=0.9)


# ---- validation

DECISIONS = (m.sensitivity, m.specificity, m.ppv, m.npv, m.accuracy, m.cohen_kappa)
SCORED = (m.auroc, m.average_precision)
CALIBRATED = (m.brier_score, m.expected_calibration_error)
P = [[0.2, 0.8], [0.5, 0.5]]


@pytest.mark.parametrize("metric", [*DECISIONS, *SCORED])
@pytest.mark.parametrize(
    ("truth", "match"),
    [
        ([], "y_true must be a 1-dimensional array of numbers that is not empty"),
        ([[0, 1]], r"y_true must be a 1-dimensional.* got shape \(1, 2\)"),
        ([0, math.nan], r"y_true must be finite, got nan at \[1\]"),
        ([0, -1], "y_true must hold whole labels from 0 to .*, got -1 at position 1"),
        ([0, 1000], "y_true must hold whole labels from 0 to .*, got 1000 at position 1"),
        ([0.5, 1], "y_true must hold whole labels from 0 to .*, got 0.5 at position 0"),
        (["covid19", "normal"], "y_true must be a 1-dimensional array of numbers"),
        ([0, None], "y_true must be a 1-dimensional array of numbers"),
        ([0, [1]], "y_true must be a rectangular array of numbers"),
        ([0, 1, 1], "same length, got y_true 3, y_(pred|score) 2"),
    ],
)
def test_a_bad_truth_is_refused(metric: object, truth: list[object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        metric(truth, [0, 1])  # type: ignore[operator]


@pytest.mark.parametrize("metric", DECISIONS[:4])
def test_binary_decisions_refuse_a_third_label(metric: object) -> None:
    with pytest.raises(ValueError, match="y_pred must hold whole labels from 0 to 1, got 2"):
        metric([0, 1], [0, 2])  # type: ignore[operator]


def test_the_confusion_matrix_refuses_a_label_outside() -> None:
    with pytest.raises(ValueError, match="y_pred must hold whole labels from 0 to 2, got 3"):
        m.confusion_matrix([0, 1], [0, 3], 3)


@pytest.mark.parametrize("metric", SCORED)
def test_scores_must_be_finite(metric: object) -> None:
    with pytest.raises(ValueError, match=r"y_score must be finite, got inf at \[0\]"):
        metric([0, 1], [math.inf, 0])  # type: ignore[operator]


@pytest.mark.parametrize("metric", CALIBRATED)
@pytest.mark.parametrize(
    ("p", "match"),
    [
        ([0.2, 0.8], "probabilities must be a 2-dimensional"),
        ([[0.2, 0.8], [0.5, math.nan]], r"probabilities must be finite, got nan at \[1, 1\]"),
        ([[1.2, -0.2], [0.5, 0.5]], r"probabilities must be in \[0, 1\], got -0.2 to 1.2"),
        ([[1.0000001, 0], [0.5, 0.5]], r"must be in \[0, 1\], got 0.0 to 1.0000001$"),
        ([[0.2, 0.8], [0.5, 0.4]], "row 1 to 0.9"),
        ([*P, [0.1, 0.9]], "same length, got y_true 2, probabilities 3"),
        ([[1.0], [1.0]], "y_true must hold whole labels from 0 to 0"),
    ],
)
def test_bad_probabilities_are_refused(metric: object, p: list[object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        metric([0, 1], p)  # type: ignore[operator]


def test_half_precision_probabilities_are_accepted() -> None:
    truth, p = probabilities(200, 3)
    half = m.brier_score(truth, p.astype(np.float16))
    assert half == pytest.approx(m.brier_score(truth, p), abs=1e-3)


@pytest.mark.parametrize("n_bins", [0, -3])
def test_calibration_needs_a_bin(n_bins: int) -> None:
    with pytest.raises(ValueError, match="n_bins must be at least 1"):
        m.expected_calibration_error([0, 1], P, n_bins=n_bins)


@pytest.mark.parametrize("n_bins", [2.5, "15", None])
def test_bins_are_whole(n_bins: Any) -> None:
    with pytest.raises(TypeError, match=f"n_bins must be a whole number, got {n_bins!r}"):
        m.expected_calibration_error([0, 1], P, n_bins=n_bins)


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        ([1, -1], "minimum -1"),
        ([1, 1, 1], r"sample_weight must be \(2,\) or \(R, 2\)"),
        (np.ones((3, 4)), r"got shape \(3, 4\)"),
        (np.ones((1, 1, 2)), "sample_weight must be a 1-dimensional"),
        ([1, math.nan], "sample_weight must be finite"),
        (np.ones((0, 2)), "that is not empty"),
    ],
)
def test_bad_weights_are_refused(weight: object, match: str) -> None:
    for metric in (*DECISIONS, *SCORED):
        with pytest.raises(ValueError, match=match):
            metric([0, 1], [0, 1], sample_weight=weight)
    for metric in CALIBRATED:
        with pytest.raises(ValueError, match=match):
            metric([0, 1], P, sample_weight=weight)


def test_importing_the_module_imports_neither_scikit_learn_nor_torch() -> None:
    code = (
        "import sys, chestxray_covid.metrics; "
        "print([n for n in ('sklearn', 'scipy', 'torch', 'pandas') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_kappa_of_one_class_is_not_defined_whatever_the_weights() -> None:
    rng = np.random.default_rng(0)
    found = [m.cohen_kappa([1] * n, [1] * n, sample_weight=rng.random(n)) for n in range(2, 200)]
    assert np.isnan(found).all()
