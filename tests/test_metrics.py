from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from chestxray_covid import intervals as iv
from chestxray_covid import metrics as m

ESTIMATE = iv.Estimate(value=0.912, low=0.870, high=0.941, n=134, method=iv.WILSON)
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


# ---- estimates


def test_an_estimate_reads_as_value_interval_and_number() -> None:
    assert str(ESTIMATE) == "0.912 (0.870–0.941, n = 134)"
    assert str(replace(ESTIMATE, low=math.nan)) == "0.912 (no interval, n = 134)"
    assert str(iv.Estimate(value=math.nan, n=0, method=iv.WILSON)) == "undefined (n = 0)"


@pytest.mark.parametrize("estimate", [ESTIMATE, iv.Estimate(value=math.nan, n=0, method="wilson")])
def test_an_estimate_survives_strict_json(estimate: iv.Estimate) -> None:
    text = json.dumps(estimate.to_dict(), allow_nan=False)
    again = iv.Estimate.from_dict(json.loads(text))
    assert repr(again) == repr(estimate)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("value", "0.9"),
        ("value", math.inf),
        ("low", [0.8]),
        ("n", 3.0),
        ("n", None),
        ("skipped", True),
        ("method", None),
        ("confidence", None),
    ],
)
def test_an_estimate_refuses_a_field_of_another_type(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"cannot have the {name}"):
        iv.Estimate.from_dict({**ESTIMATE.to_dict(), name: value})


@pytest.mark.parametrize("data", [{}, {**ESTIMATE.to_dict(), "more": 1}, [], None])
def test_an_estimate_refuses_missing_and_unknown_fields(data: object) -> None:
    with pytest.raises(ValueError, match="An estimate has"):
        iv.Estimate.from_dict(data)  # type: ignore[arg-type]


# ---- intervals


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("total", [1, 2, 10, 134, 5216])
def test_wilson_agrees_with_scipy(total: int, confidence: float) -> None:
    for successes in {0, 1, total // 3, total - 1, total}:
        test = stats.binomtest(successes, total)
        expected = test.proportion_ci(confidence, method="wilson")
        found = iv.wilson_interval(successes, total, confidence)
        assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_ends_exactly_at_zero_and_one() -> None:
    assert iv.wilson_interval(0, 7)[0] == 0.0
    assert iv.wilson_interval(7, 7)[1] == 1.0


def test_wilson_of_nothing_is_nan() -> None:
    assert np.isnan(iv.wilson_interval(0, 0)).all()


@pytest.mark.parametrize("successes", [-1, 11, math.nan])
def test_wilson_refuses_impossible_counts(successes: int) -> None:
    with pytest.raises(ValueError, match="successes must be 0 to total"):
        iv.wilson_interval(successes, 10)


@pytest.mark.parametrize("confidence", [0, 1, -0.1, 95, math.nan])
def test_an_impossible_confidence_is_refused(confidence: float) -> None:
    for call in (
        lambda: iv.wilson_interval(1, 2, confidence),
        lambda: iv.proportion([1, 0], confidence=confidence),
        lambda: iv.bootstrap_by_group(m.accuracy, [1, 2], [0, 1], [0, 1], confidence=confidence),
    ):
        with pytest.raises(ValueError, match="confidence must be inside"):
            call()


@pytest.mark.parametrize("n_resamples", [0, -1, math.nan])
def test_an_impossible_number_of_resamples_is_refused(n_resamples: int) -> None:
    with pytest.raises(ValueError, match="n_resamples must be at least 1"):
        iv.bootstrap_by_group(m.accuracy, [1, 2], [0, 1], [0, 1], n_resamples=n_resamples)


def test_a_proportion_of_independent_images_has_wilsons_interval() -> None:
    found = iv.proportion([1, 1, 1, 0], groups=["a", "b", "c", "d"])
    assert (found.low, found.high) == iv.wilson_interval(3, 4)
    assert (found.value, found.n, found.method) == (0.75, 4, "wilson")
    assert iv.proportion([True, True, True, False]) == found


def test_a_proportion_with_several_images_of_a_patient_is_bootstrapped_by_patient() -> None:
    hits, groups = [1, 1, 0, 0, 1, 0, 1, 1], [0, 0, 1, 1, 2, 3, 4, 5]
    found = iv.proportion(hits, groups)
    assert found.method == "patient bootstrap"
    assert found.value == 5 / 8
    low, high = iv.wilson_interval(5, 8)
    assert found.low < found.value < found.high
    assert (found.low, found.high) != (low, high)


def test_a_perfect_proportion_counts_patients_instead_of_claiming_certainty() -> None:
    found = iv.proportion(np.ones(30), np.arange(30) // 5)
    assert (found.low, found.high) == iv.wilson_interval(6, 6)
    assert (found.n, found.method) == (30, "wilson by patient")
    none = iv.proportion(np.zeros(30), np.arange(30) // 5)
    assert (none.low, none.high) == iv.wilson_interval(0, 6)


def test_a_proportion_of_nothing_is_undefined() -> None:
    for found in (iv.proportion([]), iv.proportion([], groups=[])):
        assert math.isnan(found.value)
        assert math.isnan(found.low)
        assert found.n == 0


def test_a_proportion_refuses_other_lengths_and_labels() -> None:
    with pytest.raises(ValueError, match="same length, got hits 2, groups 3"):
        iv.proportion([1, 0], groups="abc")
    with pytest.raises(ValueError, match="hits must hold whole labels from 0 to 1, got 2"):
        iv.proportion([1, 2])
    with pytest.raises(ValueError, match="hits must be a 1-dimensional"):
        iv.proportion([], groups="abc")


def test_the_patient_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        patients = rng.beta(3, 1.5, 60)  # mean 2/3; images of a patient are alike
        groups = np.repeat(np.arange(60), rng.integers(1, 6, 60))
        hits = rng.random(len(groups)) < patients[groups]
        found = iv.proportion(hits, groups, n_resamples=200, seed=seed)
        covered += found.low <= 2 / 3 <= found.high
    assert 0.90 <= covered / 200 <= 0.985


def test_copies_of_an_image_do_not_narrow_the_interval() -> None:
    truth, score = scores(60, ties=False)
    once = iv.bootstrap_by_group(m.auroc, range(60), truth, score)
    copies = np.repeat(np.arange(60), 4)
    often = iv.bootstrap_by_group(m.auroc, copies, truth[copies], score[copies])
    assert (often.low, often.high) == pytest.approx((once.low, once.high), abs=1e-12)
    by_image = iv.bootstrap_by_group(m.auroc, range(240), truth[copies], score[copies])
    assert by_image.high - by_image.low < 0.6 * (once.high - once.low)


def test_the_bootstrap_agrees_with_a_plain_one_over_lists_of_images() -> None:
    truth, score = scores(150, ties=True)
    groups = np.random.default_rng(1).integers(0, 60, 150)
    images = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    rng = np.random.default_rng(2)
    plain = []
    for _ in range(800):
        rows = np.concatenate([images[i] for i in rng.integers(0, len(images), len(images))])
        plain.append(sk.roc_auc_score(truth[rows], score[rows]))
    found = iv.bootstrap_by_group(m.auroc, groups, truth, score, n_resamples=4000)
    assert found.value == pytest.approx(sk.roc_auc_score(truth, score), abs=1e-12)
    assert (found.low, found.high) == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.015)
    assert (found.n, found.skipped) == (150, 0)


def test_the_bootstrap_is_a_function_of_its_seed_and_leaves_the_global_one_alone() -> None:
    truth, score = scores(40, ties=False)
    groups = [("cohen", str(i // 2)) for i in range(40)]
    before = np.random.get_state()[1].copy()
    first, again, other = (
        iv.bootstrap_by_group(m.auroc, groups, truth, score, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)
    assert (np.random.get_state()[1] == before).all()


def test_blocks_of_resamples_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, score = scores(40, ties=False)
    groups = np.arange(40) // 3
    whole = iv.bootstrap_by_group(m.auroc, groups, truth, score, n_resamples=100)
    monkeypatch.setattr(iv, "_BLOCK", 40 * 7)
    assert iv.bootstrap_by_group(m.auroc, groups, truth, score, n_resamples=100) == whole


def test_a_wider_confidence_gives_a_wider_interval() -> None:
    truth, score = scores(80, ties=False)
    narrow, wide = (
        iv.bootstrap_by_group(m.auroc, range(80), truth, score, confidence=c) for c in (0.5, 0.99)
    )
    assert wide.low < narrow.low < narrow.high < wide.high
    assert wide.confidence == 0.99


def test_resamples_without_a_class_are_skipped_and_counted() -> None:
    truth, score = [1, 0, 0, 0], [0.6, 0.7, 0.2, 0.4]
    found = iv.bootstrap_by_group(m.auroc, "abcd", truth, score, n_resamples=4000)
    # The one positive patient is in no resample, or alone in it.
    expected = (3 / 4) ** 4 + (1 / 4) ** 4
    assert found.skipped / 4000 == pytest.approx(expected, abs=0.03)
    assert 0 <= found.low < found.high <= 1


def test_the_interval_is_undefined_if_most_resamples_are() -> None:
    def rarely(*, sample_weight: np.ndarray) -> np.ndarray:
        return np.where(sample_weight[:, 0] == 1, sample_weight[:, 1], np.nan)

    found = iv.bootstrap_by_group(rarely, range(40), n_resamples=300)
    assert found.value == 1.0
    assert found.skipped > 150
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_an_undefined_statistic_has_no_interval() -> None:
    found = iv.bootstrap_by_group(m.auroc, "abc", [0, 0, 0], [0.1, 0.2, 0.3])
    assert math.isnan(found.value)
    assert math.isnan(found.low)
    assert found.n == 3


def test_resamples_that_all_agree_give_no_interval() -> None:
    one_patient = iv.bootstrap_by_group(m.auroc, "aaaa", [0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4])
    perfect = iv.bootstrap_by_group(m.auroc, "abcd", [0, 1, 0, 1], [0.1, 0.9, 0.2, 0.8])
    assert one_patient.value == 0.75
    assert perfect.value == 1.0
    assert math.isnan(one_patient.low)
    assert math.isnan(perfect.high)


def test_the_bootstrap_of_nothing_is_undefined() -> None:
    found = iv.bootstrap_by_group(m.auroc, [], [], [])
    assert math.isnan(found.value)
    assert (found.n, found.method) == (0, "patient bootstrap")


def test_the_bootstrap_refuses_other_lengths_and_other_shapes() -> None:
    with pytest.raises(ValueError, match="same length, got groups 3, array 1 4, array 2 4"):
        iv.bootstrap_by_group(m.auroc, "abc", [0, 1, 0, 1], [1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"one value per resample, shape \(1,\)"):
        iv.bootstrap_by_group(lambda a, sample_weight: 0.5, "ab", [0, 1])


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


def test_a_weight_counts_an_image_that_often() -> None:
    truth, p = probabilities(30, 3)
    often = weights(30)[0].astype(int)
    rows = np.repeat(np.arange(30), often)
    for metric in (m.brier_score, m.expected_calibration_error):
        found = metric(truth, p, sample_weight=often)
        assert found == pytest.approx(metric(truth[rows], p[rows]))


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


def test_a_target_is_reached_exactly_where_multiplication_would_overshoot() -> None:
    truth, score = np.ones(100), np.arange(100) / 100
    assert 0.07 * 100 > 7
    found = m.threshold_at_sensitivity(truth, score, sensitivity=0.07)
    assert (score >= found).sum() == 7


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
