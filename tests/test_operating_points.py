from __future__ import annotations

import json
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from chestxray_covid import operating_points as op
from chestxray_covid.intervals import wilson_interval

HOW = {"n_resamples": 60, "seed": 3, "confidence": 0.9}
N = 90


def case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    truth = np.arange(N) % 3 == 0
    score = 1 / (1 + np.exp(-(1.2 * truth - 0.5 + rng.normal(size=N))))
    return truth, score, rng.integers(0, 40, N)


def reweighted(truth: np.ndarray, prevalence: float) -> np.ndarray:
    """Return weights under which the share of positives is the prevalence."""
    return np.where(truth, prevalence / truth.mean(), (1 - prevalence) / (1 - truth.mean()))


def point(**changes: Any) -> op.OperatingPoint:
    numbers = op.decide(*case(), threshold=0.5, prevalence=0.02, **HOW)
    words = {"title": "a against b", "score": "p(a)", "rule": "r", "chosen_on": op.GIVEN}
    return op.OperatingPoint(**{**words, **numbers, **changes})


def test_decisions_agree_with_scikit_learn() -> None:
    truth, score, patients = case()
    found = op.decide(truth, score, patients, threshold=0.5, **HOW)
    called = score >= 0.5
    assert np.array_equal(found["confusion"], sk.confusion_matrix(truth, called))
    assert found["sensitivity"].value == pytest.approx(sk.recall_score(truth, called))
    assert found["specificity"].value == pytest.approx(sk.recall_score(~truth, ~called))
    assert found["ppv"].value == pytest.approx(sk.precision_score(truth, called))
    assert found["npv"].value == pytest.approx(sk.precision_score(~truth, ~called))
    assert (found["prevalence"], found["named"]) == (truth.mean(), False)
    named = op.decide(truth, score, patients, threshold=0.5, prevalence=np.float32(0.5), **HOW)
    assert type(named["prevalence"]) is float, "JSON knows no other"


@pytest.mark.parametrize("prevalence", [0.001, 0.02, 0.5, 0.9])
def test_predictive_values_at_a_prevalence_are_those_of_reweighted_images(
    prevalence: float,
) -> None:
    truth, score, patients = case()
    found = op.decide(truth, score, patients, threshold=0.5, prevalence=prevalence, **HOW)
    called, weight = score >= 0.5, reweighted(truth, prevalence)
    expected = sk.precision_score(truth, called, sample_weight=weight)
    assert found["ppv"].value == pytest.approx(expected)
    expected = sk.precision_score(~truth, ~called, sample_weight=weight)
    assert found["npv"].value == pytest.approx(expected)
    assert (found["prevalence"], found["named"]) == (prevalence, True)


def test_at_the_datas_own_prevalence_nothing_changes() -> None:
    truth, score, patients = case()
    own = op.decide(truth, score, patients, threshold=0.5, **HOW)
    named = op.decide(truth, score, patients, threshold=0.5, prevalence=truth.mean(), **HOW)
    assert named["ppv"].value == pytest.approx(own["ppv"].value)
    assert named["npv"].value == pytest.approx(own["npv"].value)


def test_the_interval_at_a_prevalence_is_resampled_by_patient() -> None:
    truth, score, patients = case()
    names = list(dict.fromkeys(patients.tolist()))
    rng, drawn = np.random.default_rng(3), []
    for _ in range(60):
        chosen = rng.integers(len(names), size=len(names))
        rows = np.concatenate([np.flatnonzero(patients == names[i]) for i in chosen])
        weight = reweighted(truth[rows], 0.02)
        drawn.append(sk.precision_score(truth[rows], score[rows] >= 0.5, sample_weight=weight))
    found = op.decide(truth, score, patients, threshold=0.5, prevalence=0.02, **HOW)["ppv"]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.05, 0.95])))
    assert (found.method, found.n) == ("patient bootstrap", N)


def test_without_a_false_positive_the_interval_still_does_not_claim_certainty() -> None:
    truth = np.arange(40) % 2 == 0
    score = np.where(truth, np.where(np.arange(40) < 10, 0.1, 0.9), 0.2)
    found = op.decide(truth, score, range(40), threshold=0.5, prevalence=0.02, **HOW)["ppv"]
    hit, spared = wilson_interval(15, 20, 0.95)[0], wilson_interval(20, 20, 0.95)[0]
    assert found.value == 1
    assert found.low == pytest.approx(hit * 0.02 / (hit * 0.02 + (1 - spared) * 0.98))
    assert found.low < 0.1
    assert (found.high, found.method) == (1, "combined intervals")
    assert (found.confidence, found.n) == (0.9, 40), "as asked for, of both ends together"


def test_with_one_kind_only_predictive_values_at_a_prevalence_are_undefined() -> None:
    found = op.decide([1, 1], [0.2, 0.9], [0, 1], threshold=0.5, prevalence=0.1, **HOW)
    assert found["sensitivity"].value == 0.5
    assert math.isnan(found["specificity"].value)
    assert math.isnan(found["ppv"].value)


def test_if_nothing_is_called_positive_ppv_is_undefined_and_npv_is_not() -> None:
    found = op.decide([1, 0], [0.2, 0.3], [0, 1], threshold=0.5, prevalence=0.1, **HOW)
    assert math.isnan(found["ppv"].value)
    assert found["npv"].value == pytest.approx(0.9)


def test_a_rule_gives_a_threshold_that_meets_it() -> None:
    truth, score, _ = case()
    threshold, rule = op.choose_threshold(truth, score, sensitivity=0.8)
    assert np.mean(score[truth] >= threshold) >= 0.8 > np.mean(score[truth] > threshold)
    assert rule == "sensitivity of at least 0.8"
    threshold, rule = op.choose_threshold(truth, score, specificity=0.8)
    assert np.mean(score[~truth] < threshold) >= 0.8
    assert rule == "specificity of at least 0.8"
    assert op.choose_threshold(truth, score, threshold=0.3) == (0.3, "threshold as given")


@pytest.mark.parametrize("rules", [{}, {"threshold": 0.5, "sensitivity": 0.9}])
def test_exactly_one_rule_is_needed(rules: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Exactly one of threshold, sensitivity and specificity"):
        op.choose_threshold([0, 1], [0.1, 0.9], **rules)


@pytest.mark.parametrize("name", ["threshold", "sensitivity", "specificity"])
def test_a_rule_is_a_number(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a number, got '0.9'"):
        op.choose_threshold([0, 1], [0.1, 0.9], **{name: "0.9"})  # type: ignore[arg-type]
    for half in (np.float32(0.5), Fraction(1, 2), Decimal("0.5"), torch.tensor(0.5)):
        rules: dict[str, Any] = {name: half}
        found = op.choose_threshold([0, 1], [0.1, 0.9], **rules)
        assert found == op.choose_threshold([0, 1], [0.1, 0.9], **{name: 0.5})


def test_a_prevalence_is_a_number() -> None:
    with pytest.raises(TypeError, match=r"prevalence must be a number, got '0\.02'"):
        op.decide([0, 1], [0.1, 0.9], "ab", threshold=0.5, prevalence="0.02")  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [math.nan, math.inf, 1.5, 90, -0.1])
def test_a_threshold_is_one_that_a_score_can_have(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], as scores are, got"):
        op.choose_threshold([0, 1], [0.1, 0.9], threshold=threshold)


@pytest.mark.parametrize("precision", [np.float16, np.float32, np.float64])
def test_a_threshold_that_a_specificity_gave_can_be_given(precision: type) -> None:
    chosen, _ = op.choose_threshold([0, 1], np.ones(2, precision), specificity=1)
    assert chosen > 1
    assert op.choose_threshold([0, 1], [0.1, 0.9], threshold=chosen)[0] == chosen


@pytest.mark.parametrize("prevalence", [0, 1, -0.1, 2, math.nan])
def test_an_impossible_prevalence_is_refused(prevalence: float) -> None:
    with pytest.raises(ValueError, match=r"prevalence must be inside \(0, 1\)"):
        op.decide(*case(), threshold=0.5, prevalence=prevalence, **HOW)


def test_an_operating_point_survives_strict_json() -> None:
    found = point()
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert op.OperatingPoint.from_dict(data) == found


def test_an_operating_point_refuses_missing_and_unknown_fields() -> None:
    data = point().to_dict()
    with pytest.raises(ValueError, match="An operating point has"):
        op.OperatingPoint.from_dict({**data, "more": 1})
    del data["ppv"]
    with pytest.raises(ValueError, match="An operating point has"):
        op.OperatingPoint.from_dict(data)


def test_the_text_says_where_the_threshold_and_the_prevalence_come_from() -> None:
    text = str(point(caution=op.OPTIMISTIC))
    assert "a against b, p(a) >= 0.5 (r)" in text
    assert "at a prevalence of 0.02 (named)" in text
    assert text.endswith(op.OPTIMISTIC)
    assert "(of these data)" in str(point(named=False))


def test_patients_may_be_anything_that_has_a_hash() -> None:
    truth, score, patients = case()
    pairs = [("clinic", int(p)) for p in patients]
    for prevalence in (None, 0.02):
        options = {"threshold": 0.5, "prevalence": prevalence, **HOW}
        assert op.decide(truth, score, pairs, **options) == op.decide(
            truth, score, patients, **options
        )


def test_scores_that_are_no_numbers_are_no_decisions() -> None:
    with pytest.raises(ValueError, match="y_score must be finite, got nan"):
        op.decide([0, 1], [0.5, math.nan], [0, 1], threshold=0.5)
    with pytest.raises(ValueError, match="same length, got y_true 2, patients 1"):
        op.decide([0, 1], [0.5, 0.6], [0], threshold=0.5)
