from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from chestxray_covid import operating_points as op
from chestxray_covid._version import __version__
from chestxray_covid.comparison import compare_scores
from chestxray_covid.errors import ReportError
from chestxray_covid.evaluation import evaluate_probabilities
from chestxray_covid.evaluation_report import EvaluationReport
from chestxray_covid.intervals import proportion
from chestxray_covid.judged_images import without_names

CLASSES = ("normal", "pneumonia", "covid19")
RESULTS = Path(__file__).parents[1] / "docs" / "results"
N = 60


def judged(seed: int = 0, *, first: int = 0, n: int = N, **changes: Any) -> EvaluationReport:
    """Return a report on three classes; images and patients are numbered from ``first``."""
    rng = np.random.default_rng(seed)
    numbers = range(first, first + n)
    truth = np.array(numbers) % 3
    logits = 1.2 * np.eye(3)[truth] + rng.normal(size=(n, 3))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    columns: dict[str, Any] = {
        "classes": CLASSES,
        "patients": [str(i // 2) for i in numbers],
        "sources": [("a", "b")[i // 4 % 2] for i in numbers],
        "views": ["PA"] * n,
        "sexes": [("F", "M", "")[i // 6 % 3] for i in numbers],
        "ages": [str(i) for i in numbers],
        "ids": [f"{i}.png" for i in numbers],
        "n_resamples": 40,
    }
    labels = [CLASSES[k] for k in truth]
    return evaluate_probabilities(labels, p, **{**columns, **changes})


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    found = judged()
    points = (found.operating_point(sensitivity=0.9, prevalence=0.02, versus="normal"),)
    model = {"architecture": "densenet121", "provenance": {"sources": ["a"]}}
    return replace(
        found,
        operating_points=points,
        model=model,
        excluded={"no view": 3},
        origins={"a": ["hannover"]},
    )


def test_a_report_of_before_says_nothing_of_origins(report: EvaluationReport) -> None:
    data = {name: value for name, value in report.to_dict().items() if name != "origins"}
    assert EvaluationReport.from_dict(data).origins == {}


def table(report: EvaluationReport) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, probabilities and patients."""
    frame = report.predictions
    assert frame is not None
    p = frame[[f"p_{name}" for name in CLASSES]].to_numpy()
    return frame["label"].to_numpy(), p, frame["patient_group"].to_numpy()


# ---- curves


def test_curves_are_of_the_positive_class_against_all_others(report: EvaluationReport) -> None:
    labels, p, _ = table(report)
    roc, pr = report.roc_curve(), report.precision_recall_curve()
    assert roc.area == report.overall.per_class["covid19"]["auroc"]
    assert pr.area == report.overall.per_class["covid19"]["average_precision"]
    fpr, tpr, _ = sk.roc_curve(labels == "covid19", p[:, 2], drop_intermediate=False)
    assert np.allclose([roc.x, roc.y], [fpr, tpr])
    assert roc.title == pr.title == "covid19 against all others"


def test_curves_may_be_of_another_class(report: EvaluationReport) -> None:
    assert report.roc_curve("normal").area == report.overall.per_class["normal"]["auroc"]


def test_curves_against_one_class_leave_the_others_out(report: EvaluationReport) -> None:
    labels, p, _ = table(report)
    rows = labels != "pneumonia"
    score = p[rows, 2] / (p[rows, 2] + p[rows, 0])
    roc = report.roc_curve(versus="normal")
    assert roc.area == report.overall.per_class["covid19"]["auroc_vs_normal"]
    fpr, tpr, _ = sk.roc_curve(labels[rows] == "covid19", score, drop_intermediate=False)
    assert np.allclose([roc.x, roc.y], [fpr, tpr])
    precision = report.precision_recall_curve(versus="normal")
    expected = sk.average_precision_score(labels[rows] == "covid19", score)
    assert precision.area.value == pytest.approx(expected)
    assert roc.title == precision.title == "covid19 against normal"


def test_reliability_is_of_a_class_or_of_the_decision(report: EvaluationReport) -> None:
    labels, p, _ = table(report)
    decision, own = report.reliability(), report.reliability("covid19", n_bins=5)
    assert decision.ece == report.overall.metrics["ece"]
    expected = sk.brier_score_loss(labels == "covid19", p[:, 2])
    assert own.brier.value == pytest.approx(expected)
    assert own.counts.sum() == decision.counts.sum() == N
    assert (decision.title, own.title) == ("the decision", "covid19")


def test_risk_at_full_coverage_is_that_of_all_decisions(report: EvaluationReport) -> None:
    curve = report.risk_coverage_curve()
    assert curve.y[-1] == pytest.approx(1 - report.overall.metrics["accuracy"].value)
    assert curve.area.value < curve.y[-1]


@pytest.mark.parametrize(("label", "versus"), [("flu", None), (None, "flu"), (None, "covid19")])
def test_a_question_of_unknown_classes_is_refused(
    report: EvaluationReport, label: str | None, versus: str | None
) -> None:
    with pytest.raises(ValueError, match=r"label and versus must be two of \['normal'"):
        report.roc_curve(label, versus=versus)


def test_a_question_without_images_is_refused(report: EvaluationReport) -> None:
    assert report.predictions is not None
    rows = report.predictions["label"] == "normal"
    few = replace(report, predictions=report.predictions[rows].reset_index(drop=True))
    with pytest.raises(ValueError, match="No image is covid19 or pneumonia"):
        few.operating_point(threshold=0.5, versus="pneumonia")


@pytest.mark.parametrize(
    "ask",
    [
        lambda r: r.roc_curve(),
        lambda r: r.precision_recall_curve(),
        lambda r: r.reliability(),
        lambda r: r.risk_coverage_curve(),
        lambda r: r.operating_point(threshold=0.5),
        lambda r: r.compare(r),
        lambda r: judged().compare(r),
        lambda r: judged().operating_point(sensitivity=0.9, chosen_on=r),
    ],
)
def test_without_predictions_nothing_more_can_be_computed(
    report: EvaluationReport, ask: Any
) -> None:
    with pytest.raises(ReportError, match="saved without its predictions"):
        ask(replace(report, predictions=None))


# ---- thresholds


def test_a_target_on_the_same_images_is_met_and_flagged(report: EvaluationReport) -> None:
    labels, p, _ = table(report)
    found = report.operating_point(sensitivity=0.9)
    assert found.sensitivity.value >= 0.9
    assert (found.chosen_on, found.caution) == ("the same images", op.OPTIMISTIC)
    assert found.threshold in p[labels == "covid19", 2]
    assert (found.title, found.score) == ("covid19 against all others", "p(covid19)")
    found = report.operating_point(specificity=0.9)
    assert found.specificity.value >= 0.9
    assert found.caution == op.OPTIMISTIC


def test_a_target_is_chosen_on_other_images_if_they_are_given(report: EvaluationReport) -> None:
    validation = judged(1, first=1000)
    found = report.operating_point(sensitivity=0.9, chosen_on=validation)
    assert found.threshold == validation.operating_point(sensitivity=0.9).threshold
    assert found.threshold != report.operating_point(sensitivity=0.9).threshold
    assert (found.chosen_on, found.caution) == ("other images", "")


def test_other_images_of_the_same_patients_are_flagged(report: EvaluationReport) -> None:
    found = report.operating_point(specificity=0.9, chosen_on=judged(1, first=10))
    assert (found.chosen_on, found.caution) == ("other images", op.SHARED)


def test_patients_without_names_may_be_the_same(report: EvaluationReport) -> None:
    def published(own: EvaluationReport) -> EvaluationReport:
        assert own.predictions is not None
        return replace(own, predictions=without_names(own.predictions))

    others, told = judged(1, first=1000), published(report)
    with pytest.raises(ValueError, match=r"0 are the same\. One has no names, as all of the Hub"):
        report.compare(told)
    for one, two in ((report, told), (told, report), (report, published(others))):
        found = one.operating_point(sensitivity=0.9, chosen_on=two)
        assert (found.chosen_on, found.caution) == ("other images", op.UNTOLD)
    found = told.operating_point(sensitivity=0.9, chosen_on=told)
    assert (found.chosen_on, found.caution) == ("the same images", op.OPTIMISTIC)


def test_the_path_of_a_report_is_no_report(report: EvaluationReport) -> None:
    said = r"expected EvaluationReport, as evaluate\(\) or EvaluationReport.load\(…\) gives it, got"
    with pytest.raises(TypeError, match=said):
        report.compare("other.json")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=said):
        report.operating_point(sensitivity=0.9, chosen_on="val.json")  # type: ignore[arg-type]


def test_a_threshold_of_another_model_is_refused(report: EvaluationReport) -> None:
    one, other = (replace(judged(1, first=1000), model={"weights_sha256": w}) for w in "ab")
    own = replace(report, model={"weights_sha256": "a"})
    assert own.operating_point(sensitivity=0.9, chosen_on=one).caution == ""
    with pytest.raises(ValueError, match="chosen_on is the report of another model"):
        own.operating_point(sensitivity=0.9, chosen_on=other)


def test_a_threshold_of_other_classes_is_refused(report: EvaluationReport) -> None:
    # p(covid19) of a network restricted to two classes is another score.
    with pytest.raises(ValueError, match="chosen_on is the report of another model"):
        report.operating_point(sensitivity=0.9, chosen_on=replace(judged(), classes=CLASSES[::2]))


def test_the_same_images_are_the_same_whatever_report_holds_them(report: EvaluationReport) -> None:
    found = report.operating_point(sensitivity=0.9, chosen_on=judged())
    assert (found.chosen_on, found.caution) == ("the same images", op.OPTIMISTIC)


def test_a_given_threshold_is_not_chosen_anywhere(report: EvaluationReport) -> None:
    found = report.operating_point(threshold=0.5, versus="normal")
    assert (found.chosen_on, found.caution, found.rule) == ("given", "", "threshold as given")
    assert found.score == "p(covid19) / (p(covid19) + p(normal))"
    (tn, fp), (fn, tp) = found.confusion
    assert tn + fp + fn + tp == (table(report)[0] != "pneumonia").sum()


# ---- two models


def test_models_are_compared_image_by_image_in_whatever_order(report: EvaluationReport) -> None:
    other = judged(5)
    labels, p, patients = table(report)
    _, q, _ = table(other)
    sides = [(a[:, 2], a.argmax(1) == 2) for a in (p, q)]
    expected = compare_scores(labels == "covid19", *sides, patients, n_resamples=40)
    assert other.predictions is not None
    turned = replace(other, predictions=other.predictions.iloc[::-1].reset_index(drop=True))
    for second in (other, turned):
        found = report.compare(second)
        assert found.differences == expected.differences
        assert found.delong == expected.delong
    assert found.n_patients == report.n_patients
    assert report.compare(other, versus="normal").n_images == (labels != "pneumonia").sum()


def test_models_on_other_images_or_labels_do_not_compare(report: EvaluationReport) -> None:
    with pytest.raises(ValueError, match=r"60 and 60 images, of which 50 are the same$"):
        report.compare(judged(5, first=10))
    other = report.predictions
    assert other is not None
    relabelled = other.assign(label=["normal", *other["label"][1:-1], "normal"])
    with pytest.raises(ValueError, match="each once and with the same label"):
        report.compare(replace(report, predictions=relabelled))
    twice = replace(report, predictions=other.assign(id="x.png", patient_id="1", source="a"))
    with pytest.raises(ValueError, match="each once"):
        twice.compare(twice)


# ---- files


def test_all_that_is_new_survives_strict_json(report: EvaluationReport) -> None:
    again = EvaluationReport.from_dict(json.loads(report.to_json()))
    assert again.to_dict() == report.to_dict()
    assert again.chestxray_covid_version == report.chestxray_covid_version == __version__
    assert again.operating_points == report.operating_points
    assert again.by_sex.keys() == {"female", "male", "unknown"}
    assert (again.model, again.excluded) == (report.model, report.excluded)
    assert again.origins == {"a": ("hannover",)}
    assert str(again) == str(report)
    assert str(report.operating_points[0]) in str(again)


def test_the_committed_reports_are_read() -> None:
    for path in sorted(RESULTS.glob("*/evaluation*.json")):
        found = EvaluationReport.load(path)
        own = found.overall.per_class[found.positive]
        curve = found.roc_curve()
        assert curve.area.value == pytest.approx(own["auroc"].value)
        assert (curve.area.low, curve.area.high) == pytest.approx(
            (own["auroc"].low, own["auroc"].high)
        )


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("operating_points", [{"threshold": 0.5}], "An operating point has"),
        ("model", 5, "This is no evaluation report"),
        ("excluded", [1], "This is no evaluation report"),
        ("origins", {"a": 5}, "This is no evaluation report"),
        ("origins", {"a": "b"}, "This is no evaluation report"),
        ("by_sex", None, "This is no evaluation report"),
        ("by_age", {"0-17": 5}, "This is no evaluation report"),
        ("positive", "flu", "positive 'flu' is none of"),
        ("n_images", "<b>", "n_images cannot be '<b>'"),
        ("confounded", "no", "confounded cannot be 'no'"),
        ("seed", None, "seed cannot be None"),
        ("confidence", 95, "confidence must be inside"),
        ("n_resamples", 10**9, "n_resamples must be a whole number from 1 to 1,000,000"),
        ("format_version", True, "format True, this version reads 2"),
    ],
)
def test_damage_to_what_is_new_is_refused(
    report: EvaluationReport, field: str, value: Any, match: str
) -> None:
    with pytest.raises(ReportError, match=match):
        EvaluationReport.from_dict({**report.to_dict(), field: value})


NUMBERS = dict.fromkeys(("sensitivity", "specificity", "auroc"), proportion([1, 0]).to_dict())


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("per_class", {}, "all has no confusion matrix of its 0 classes"),
        ("per_class", {name: {} for name in CLASSES}, r"all does not have .* of every class"),
        ("per_class", dict.fromkeys("abc", NUMBERS), r"overall all has the classes \['a', "),
        ("confusion", [[1, 2], [3, 4]], "all has no confusion matrix of its 3 classes"),
        ("n_images", "<b>", "A subgroup cannot have the n_images '<b>'"),
    ],
)
def test_subgroups_that_do_not_fit_the_classes_are_refused(
    report: EvaluationReport, part: str, value: Any, match: str
) -> None:
    data = report.to_dict()
    data["overall"] = {**data["overall"], part: value}
    with pytest.raises(ReportError, match=match):
        EvaluationReport.from_dict(data)


def test_predictions_of_unknown_labels_are_refused(report: EvaluationReport) -> None:
    data = report.to_dict()
    data["predictions"]["label"][0] = "flu"
    with pytest.raises(ReportError, match=r"predictions have the labels \{'flu'\}"):
        EvaluationReport.from_dict(data)


def test_predictions_with_gaps_are_refused(report: EvaluationReport) -> None:
    data = report.to_dict()
    data["predictions"]["view"][0] = None
    with pytest.raises(ReportError, match=r"predictions have gaps in \['view'\]"):
        EvaluationReport.from_dict(data)
