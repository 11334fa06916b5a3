from __future__ import annotations

import json
import math
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk

from chestxray_covid import intervals as iv
from chestxray_covid import metrics as m
from chestxray_covid.comparison import delong_test
from chestxray_covid.delong import auroc_by_group

ESTIMATE = iv.Estimate(value=0.912, low=0.870, high=0.941, n=134, method=iv.WILSON)


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


@pytest.mark.parametrize("half", [Decimal("0.5"), Fraction(1, 2), torch.tensor(0.5)])
def test_a_confidence_may_be_any_number(half: Any) -> None:
    truth, score, patients = [0, 0, 0, 1, 1, 1], [0.1, 0.4, 0.5, 0.3, 0.8, 0.9], "aabbcd"
    for ask in (
        lambda c: iv.wilson_interval(9, 10, c),
        lambda c: iv.proportion(truth, confidence=c),
        lambda c: iv.proportion(truth, patients, confidence=c),
        lambda c: iv.bootstrap_by_group(m.auroc, patients, truth, score, confidence=c),
        lambda c: auroc_by_group(truth, score, patients, confidence=c),
        lambda c: delong_test(truth, score, score[::-1], "abcdef", confidence=c).difference,
    ):
        assert repr(ask(half)) == repr(ask(0.5)), "with plain numbers, which JSON knows"
    band = iv.band_by_group(
        lambda score, sample_weight: sample_weight * score, "abcdef", score, confidence=half
    )
    assert np.shape(band) == (2, 6)


@pytest.mark.parametrize("confidence", [0, 1, -0.1, 95, math.nan])
def test_an_impossible_confidence_is_refused(confidence: float) -> None:
    for call in (
        lambda: iv.wilson_interval(1, 2, confidence),
        lambda: iv.proportion([1, 0], confidence=confidence),
        lambda: iv.bootstrap_by_group(m.accuracy, [1, 2], [0, 1], [0, 1], confidence=confidence),
    ):
        with pytest.raises(ValueError, match="confidence must be inside"):
            call()
    with pytest.raises(TypeError, match=r"confidence must be a number, got '0\.95'"):
        iv.wilson_interval(1, 2, "0.95")  # type: ignore[arg-type]


@pytest.mark.parametrize("n_resamples", [0, -1, math.nan])
def test_an_impossible_number_of_resamples_is_refused(n_resamples: int) -> None:
    with pytest.raises(ValueError, match="n_resamples must be a whole number from 1 to 1,000,000"):
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


@pytest.mark.slow
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


def test_statistics_that_are_bootstrapped_together_are_those_of_each_alone() -> None:
    truth, score = scores(40, ties=True)
    asked = {
        "auroc": (m.auroc, truth, score),
        "accuracy": (m.accuracy, truth, score > 0.6),
        "undefined": (m.auroc, np.ones(40), score),
        "perfect": (m.auroc, truth, truth),
    }
    groups = [i // 3 for i in range(40)]
    found = iv.bootstrap_together(asked, groups, n_resamples=100, seed=3, confidence=0.9)
    assert list(found) == list(asked)
    for name, (statistic, *arrays) in asked.items():
        how: dict[str, Any] = {"n_resamples": 100, "seed": 3, "confidence": 0.9}
        alone = iv.bootstrap_by_group(statistic, groups, *arrays, **how)
        assert repr(found[name]) == repr(alone)
    with pytest.raises(ValueError, match="same length, got groups 40, array 1 40, array 2 39"):
        iv.bootstrap_together({**asked, "short": (m.auroc, truth, score[:-1])}, groups)


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


def test_estimates_of_the_same_are_equal_whether_they_are_defined_or_not() -> None:
    one, other = (iv.proportion([]) for _ in range(2))
    computed = replace(one, value=float("inf") - float("inf"))
    assert one == other == computed
    assert len({one, other, computed}) == 1
    assert one != replace(one, value=0.5)
    assert one != one.to_dict()


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


def test_the_band_at_a_point_is_the_interval_of_that_number() -> None:
    truth, score = scores(60, ties=True)
    groups = np.arange(60) // 2

    def curve(t: np.ndarray, s: np.ndarray, *, sample_weight: np.ndarray) -> np.ndarray:
        areas = m.auroc(t, s, sample_weight=sample_weight)
        rarely = np.where(sample_weight[:, 0] == 1, areas, np.nan)  # in two of five resamples
        return np.stack([areas, rarely], axis=1)

    low, high = iv.band_by_group(curve, groups, truth, score, n_resamples=50, seed=4)
    expected = iv.bootstrap_by_group(m.auroc, groups, truth, score, n_resamples=50, seed=4)
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high))
    assert np.isnan([low[1], high[1]]).all()


def test_a_band_refuses_other_lengths_and_options() -> None:
    with pytest.raises(ValueError, match="same length"):
        iv.band_by_group(m.auroc, "ab", [0, 1, 1], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="n_resamples must be a whole number from 1 to 1,000,000"):
        iv.band_by_group(m.auroc, "ab", [0, 1], [0.1, 0.2], n_resamples=0)


@pytest.mark.parametrize("missing", [None, math.nan, pd.NA, ("a", None), ("a", pd.NA)])
def test_an_image_without_a_patient_is_refused_by_its_position(missing: Any) -> None:
    with pytest.raises(ValueError, match=r"needs a patient, got .* at position 2"):
        iv.group_codes(["a", "b", missing, missing])


def test_patients_that_are_tensors_are_refused_as_each_would_count_as_another() -> None:
    numbers = torch.tensor([0, 0, 1])
    for groups in (numbers, list(numbers), [("clinic", number) for number in numbers]):
        with pytest.raises(TypeError, match=r"patients must be text or numbers, got .*tensor\(0\)"):
            iv.group_codes(groups)
    for given in (numbers.tolist(), numbers.numpy(), list(numbers.numpy())):
        assert iv.group_codes(given).tolist() == [0, 0, 1]
