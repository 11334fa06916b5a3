from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from chestxray_covid.checkpoint import ModelConfig
from chestxray_covid.datasets.base import ChestXrayDataset, Sample
from chestxray_covid.errors import ChestXrayError, ReportError
from chestxray_covid.evaluation import evaluate, evaluate_probabilities
from chestxray_covid.evaluation_report import EvaluationReport
from chestxray_covid.intervals import wilson_interval
from chestxray_covid.judged_images import aligned
from chestxray_covid.reporting import CAUTION

CLASSES = ("normal", "pneumonia", "covid19")
FAST = {"n_resamples": 50}


class ThumbnailClassifier:
    """Logistic regression on 4 × 4 thumbnails."""

    def __init__(self, dataset: ChestXrayDataset) -> None:
        self.model = LogisticRegression(max_iter=500)
        self.model.fit(self.thumbnails(dataset), [s.label for s in dataset.samples])

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(str(name) for name in self.model.classes_)

    def predict_proba(
        self, images: ChestXrayDataset, /, *, batch_size: int, progress: bool
    ) -> np.ndarray:
        return self.model.predict_proba(self.thumbnails(images))

    @staticmethod
    def thumbnails(dataset: ChestXrayDataset) -> np.ndarray:
        small = [dataset.image(i).resize((4, 4)) for i in range(len(dataset))]
        return np.stack([np.asarray(image).ravel() / 20 - 5 for image in small])


def draw(folder: Path, plan: list[tuple[str, str, str, str]]) -> ChestXrayDataset:
    """Write a noisy image per (label, patient, source, view), places a little brighter by class."""
    rng = np.random.default_rng(0)
    samples = []
    for i, (label, patient, source, view) in enumerate(plan):
        pixels = rng.normal(100, 40, (16, 16))
        if label != "normal":
            pixels[8:, :8] += 12
        if label == "covid19":
            pixels[:, 8:] += 12
        path = folder / f"{i:03d}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
        samples.append(
            Sample(path=path, label=label, finding="", patient_id=patient, source=source, view=view)
        )
    return ChestXrayDataset(samples, classes=CLASSES)


def two_sources(patients: int, images: int) -> list[tuple[str, str, str, str]]:
    """Return a plan: clinic a has all classes, clinic b 12 normal images; patient names repeat."""
    plan = [
        (CLASSES[i % 3], str(i), "a", ("PA", "AP")[i % 2])
        for i in range(patients)
        for _ in "x" * images
    ]
    return plan + [("normal", str(i), "b", "unknown") for i in range(12)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> ThumbnailClassifier:
    return ThumbnailClassifier(draw(tmp_path_factory.mktemp("train"), two_sources(60, 1)))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ChestXrayDataset:
    return draw(tmp_path_factory.mktemp("test"), two_sources(60, 2))


@pytest.fixture(scope="module")
def report(classifier: ThumbnailClassifier, dataset: ChestXrayDataset) -> EvaluationReport:
    return evaluate(classifier, dataset, n_resamples=200)


def judge(labels: list[str], probabilities: Any, **changes: Any) -> EvaluationReport:
    """Evaluate binary probabilities of patients with one image each."""
    n = len(labels)
    columns: dict[str, Any] = {
        "classes": ("normal", "covid19"),
        "patients": [str(i) for i in range(n)],
        "sources": ["a"] * n,
        "views": ["PA"] * n,
    }
    return evaluate_probabilities(labels, probabilities, **{**columns, **FAST, **changes})


BINARY = ["normal", "covid19", "normal", "covid19"]
P = np.array([[0.9, 0.1], [0.3, 0.7], [0.4, 0.6], [0.6, 0.4]])


def test_a_view_that_nobody_wrote_down_is_unknown_however_a_table_says_so() -> None:
    assert list(judge(BINARY, P, views=["PA", None, np.nan, ""]).by_view) == ["PA", "unknown"]


@pytest.mark.parametrize("name", ["patients", "sources", "views"])
def test_what_is_no_list_is_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be a list with one for each"):
        judge(BINARY, P, **{name: None})
    assert judge(BINARY, P, **{name: iter("abab")}).n_images == 4


# ---- the numbers


def test_the_classifier_of_these_tests_is_neither_perfect_nor_blind(
    report: EvaluationReport,
) -> None:
    assert 0.6 < report.overall.per_class["covid19"]["auroc"].value < 0.99


def test_numbers_over_all_classes_agree_with_scikit_learn(
    report: EvaluationReport, classifier: ThumbnailClassifier, dataset: ChestXrayDataset
) -> None:
    p = classifier.predict_proba(dataset, batch_size=8, progress=False)
    truth = [s.label for s in dataset.samples]
    called = [classifier.classes[k] for k in p.argmax(1)]
    found = report.overall
    expected = sk.confusion_matrix(truth, called, labels=list(classifier.classes))
    assert np.array_equal(found.confusion, expected)
    assert found.metrics["accuracy"].value == pytest.approx(sk.accuracy_score(truth, called))
    assert found.metrics["kappa"].value == pytest.approx(sk.cohen_kappa_score(truth, called))
    one_hot = np.array(truth)[:, None] == np.array(classifier.classes)
    assert found.metrics["brier"].value == pytest.approx(((p - one_hot) ** 2).sum(1).mean() / 2)
    assert report.n_images == found.n_images == len(dataset)


@pytest.mark.parametrize("group", ["overall", "a", "PA"])
def test_numbers_per_class_agree_with_scikit_learn(report: EvaluationReport, group: str) -> None:
    part = {"overall": report.overall, **report.by_source, **report.by_view}[group]
    table = report.predictions
    assert table is not None
    table = table[(group == "overall") | (table["source"] == group) | (table["view"] == group)]
    p = table[[f"p_{name}" for name in report.classes]].to_numpy()
    called = np.array(report.classes)[p.argmax(1)]
    for k, name in enumerate(report.classes):
        is_it, said, found = table["label"] == name, called == name, part.per_class[name]
        assert found["sensitivity"].value == pytest.approx(sk.recall_score(is_it, said))
        assert found["specificity"].value == pytest.approx(sk.recall_score(~is_it, ~said))
        assert found["ppv"].value == pytest.approx(sk.precision_score(is_it, said))
        assert found["npv"].value == pytest.approx(sk.precision_score(~is_it, ~said))
        assert found["auroc"].value == pytest.approx(sk.roc_auc_score(is_it, p[:, k]))
        expected = sk.average_precision_score(is_it, p[:, k])
        assert found["average_precision"].value == pytest.approx(expected)
        assert found["sensitivity"].n == is_it.sum()
        assert found["ppv"].n == said.sum()


def test_the_positive_class_is_also_judged_against_normal_alone(report: EvaluationReport) -> None:
    table = report.predictions
    assert table is not None
    table = table[table["label"] != "pneumonia"]
    score = table["p_covid19"] / (table["p_covid19"] + table["p_normal"])
    found = report.overall.per_class["covid19"]["auroc_vs_normal"]
    assert found.value == pytest.approx(sk.roc_auc_score(table["label"] == "covid19", score))
    assert found.n == len(table)
    assert "auroc_vs_normal" not in report.overall.per_class["pneumonia"]


def test_two_classes_need_no_second_auroc() -> None:
    assert "auroc_vs_normal" not in judge(BINARY, P).overall.per_class["covid19"]


def test_no_opinion_between_positive_and_normal_is_a_tie() -> None:
    found = judge(
        ["normal", "covid19", "pneumonia"], np.eye(3)[[1, 1, 1]], classes=CLASSES
    ).overall.per_class["covid19"]["auroc_vs_normal"]
    assert (found.value, found.n) == (0.5, 2)


def test_the_order_of_the_data_sets_classes_does_not_matter(
    report: EvaluationReport, classifier: ThumbnailClassifier, dataset: ChestXrayDataset
) -> None:
    turned = ChestXrayDataset(dataset.samples, classes=CLASSES[::-1])
    again = evaluate(classifier, turned, n_resamples=200)
    assert again.to_json() == report.to_json()
    assert report.classes == classifier.classes != CLASSES


def test_a_patient_is_one_only_within_a_source(report: EvaluationReport) -> None:
    assert report.n_patients == 60 + 12
    assert report.by_source["b"].n_patients == 12


def test_several_images_of_a_patient_are_bootstrapped_together(report: EvaluationReport) -> None:
    assert report.by_source["a"].metrics["accuracy"].method == "patient bootstrap"
    assert report.by_source["b"].metrics["accuracy"].method == "wilson"


def test_a_class_may_be_called_as_a_metric_is() -> None:
    rng = np.random.default_rng(0)
    p, truth = rng.dirichlet(np.ones(3), 30), rng.integers(0, 3, 30)
    numbers = []
    for names in (("ece", "kappa", "brier"), ("x", "y", "z")):
        found = evaluate_probabilities(
            [names[k] for k in truth],
            p,
            classes=names,
            patients=range(30),
            sources=["a"] * 30,
            views=["PA"] * 30,
            positive=names[0],
        )
        numbers.append({name: e.value for name, e in found.overall.metrics.items()})
    assert numbers[0] == numbers[1]


def test_one_image_per_patient_has_wilsons_interval() -> None:
    found = judge(BINARY, P).overall.per_class["covid19"]
    assert found["sensitivity"].method == "wilson"
    assert (found["sensitivity"].low, found["sensitivity"].high) == wilson_interval(1, 2)
    assert found["auroc"].method == "delong"
    assert found["average_precision"].method == "patient bootstrap"


def test_images_of_a_patient_widen_the_interval(
    classifier: ThumbnailClassifier, dataset: ChestXrayDataset
) -> None:
    kept = dataset.filter(lambda s: s.source == "a")
    p = classifier.predict_proba(kept, batch_size=8, progress=False)
    labels = [s.label for s in kept.samples]
    # The same image four times is no more evidence than once.
    four = {"classes": classifier.classes, "n_resamples": 300}
    alone = judge(labels, p, **four).overall.per_class["covid19"]["auroc"]
    copied = judge(
        labels * 4, np.tile(p, (4, 1)), **four, patients=[str(i) for i in range(len(p))] * 4
    ).overall.per_class["covid19"]["auroc"]
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))


def test_a_metric_that_a_subgroup_cannot_define_says_so(report: EvaluationReport) -> None:
    part = report.by_source["b"]
    assert math.isnan(part.per_class["covid19"]["sensitivity"].value)
    assert part.per_class["covid19"]["sensitivity"].n == 0
    assert math.isnan(part.per_class["covid19"]["auroc"].value)
    assert part.per_class["covid19"]["auroc"].n == 12
    assert 0 <= part.per_class["covid19"]["specificity"].value <= 1


def test_small_subgroups_are_flagged(report: EvaluationReport) -> None:
    small = {part.name for part in report.subgroups if part.small}
    assert small == {"b", "unknown"}
    assert "12*" in str(report)
    assert "* fewer than 20 images" in str(report)
    assert "fewer than" not in str(judge(BINARY * 10, np.tile(P, (10, 1))))


def test_the_same_arguments_give_the_same_report() -> None:
    first, again, other = (judge(BINARY * 9, np.tile(P, (9, 1)), seed=s) for s in (1, 1, 2))
    assert first.to_json() == again.to_json()
    assert first.overall.metrics["brier"].low != other.overall.metrics["brier"].low
    assert (first.seed, first.n_resamples, first.confidence) == (1, 50, 0.95)


# ---- what was judged


def test_the_report_keeps_what_the_checkpoint_says_but_no_path(
    classifier: ThumbnailClassifier, dataset: ChestXrayDataset
) -> None:
    provenance = {
        "recipe": "r",
        "identity": {"files": ["secret"]},
        "train": {"root": "/secret/place", "source": "a", "kept": 5},
        "training": {"cache_dir": "/secret/cache", "epochs": 1},
    }
    judged = ThumbnailClassifier(dataset)
    judged.config = ModelConfig(classes=judged.classes, provenance=provenance)  # type: ignore[attr-defined]
    found = evaluate(judged, dataset, **FAST)
    assert found.model["architecture"] == "densenet121"
    assert found.model["classes"] == list(judged.classes)
    known = {"train": {"source": "a", "kept": 5}, "training": {"epochs": 1}}
    assert found.model["provenance"] == {"recipe": "r", **known}
    assert "secret" not in found.to_json()
    assert evaluate(classifier, dataset, **FAST).model == {}


def test_the_report_counts_what_the_data_set_left_out(
    classifier: ThumbnailClassifier, dataset: ChestXrayDataset
) -> None:
    left_out = replace(dataset.report(), dropped={"view L": 3})
    whole = ChestXrayDataset(dataset.samples, classes=CLASSES, report=left_out)
    assert evaluate(classifier, whole, **FAST).excluded == {"view L": 3}
    part = whole.subset(range(20))
    assert evaluate(classifier, part, **FAST).excluded == part.report().dropped


def test_the_report_names_what_a_source_took_over_from_others(
    classifier: ThumbnailClassifier, dataset: ChestXrayDataset
) -> None:
    assert evaluate(classifier, dataset, **FAST).origins == {}
    first, second, *rest = dataset.samples
    taken = [
        replace(first, metadata={"origin": "hannover"}),
        replace(second, metadata={"origin": second.source}),
        *rest,
    ]
    found = evaluate(classifier, ChestXrayDataset(taken, classes=CLASSES), **FAST)
    assert found.origins == {first.source: ["hannover"]}


# ---- which question


def test_the_positive_class_is_covid19_unless_told_otherwise() -> None:
    assert judge(BINARY, P).positive == "covid19"
    assert judge(BINARY, P, positive="normal").positive == "normal"


def test_without_covid19_the_positive_class_is_the_last_one() -> None:
    labels = ["normal", "pneumonia", "normal", "pneumonia"]
    assert judge(labels, P, classes=("normal", "pneumonia")).positive == "pneumonia"


def test_file_names_that_a_patient_has_twice_get_their_folders(tmp_path: Path) -> None:
    plan = [("normal", "1", "a", "PA"), ("covid19", "2", "a", "PA"), ("covid19", "2", "a", "PA")]
    dataset = draw(tmp_path, [*plan, *plan])
    names = ("p/s1/view1.png", "q/s1/view1.png", "q/s2/view1.png")
    samples = [
        replace(s, path=tmp_path / f"{i // 3}" / names[i % 3])
        for i, s in enumerate(dataset.samples)
    ]
    for sample, drawn in zip(samples, dataset.samples, strict=True):
        sample.path.parent.mkdir(parents=True)
        drawn.path.rename(sample.path)
    moved = ChestXrayDataset(samples, classes=CLASSES)
    classifier = ThumbnailClassifier(moved)
    report = evaluate(classifier, moved, positive="covid19", **FAST)
    assert report.predictions is not None
    ids = report.predictions["id"].tolist()
    assert ids[0] == "0/p/s1/view1.png"
    assert len(set(ids)) == 6
    assert aligned(report.predictions, report.predictions)["id"].tolist() == ids


def test_names_that_are_not_utf_8_are_escaped_and_the_report_can_be_written(tmp_path: Path) -> None:
    drawn = draw(tmp_path, [("normal", "1", "a", "PA"), ("covid19", "2", "a", "PA")] * 4)
    strange = os.fsdecode(b"M\xfcnchen")
    samples = [
        replace(s, source=strange, patient_id=strange + s.patient_id, view=strange)
        for s in drawn.samples
    ]
    report = evaluate(
        ThumbnailClassifier(drawn), ChestXrayDataset(samples, classes=CLASSES), **FAST
    )
    assert list(report.by_source) == list(report.by_view) == ["M\\udcfcnchen"]
    assert report.n_patients == 2
    assert EvaluationReport.load(report.save(tmp_path / "r.json")).to_dict() == report.to_dict()
    for text in (str(report), report.to_markdown()):
        assert b"udcfcnchen" in text.encode()


def test_a_name_does_not_steer_the_terminal_that_shows_a_report() -> None:
    names = ["ward\x1b[2K\r", "\u202eclinic"]
    report = evaluate_probabilities(
        ["normal", "covid19"],
        [[0.9, 0.1], [0.2, 0.8]],
        classes=("normal", "covid19"),
        patients=["1", "2"],
        sources=names,
        views=names,
        **FAST,
    )
    assert list(report.by_source) == names, "as data they stay what they are"
    for text in (str(report), report.to_markdown()):
        assert text.replace("\n", "").isprintable()
        assert r"x1b[2K" in text.replace("\\[", "[")


def test_what_a_checkpoint_and_a_data_set_say_is_escaped_too(tmp_path: Path) -> None:
    strange = os.fsdecode(b"M\xfcnchen")
    drawn = draw(tmp_path, [("normal", "1", strange, "PA"), ("covid19", "2", strange, "PA")] * 2)
    provenance = {"train": {"source": f"{strange}+b", "dropped": {strange: 1}}, "sources": None}
    classifier = ThumbnailClassifier(drawn)
    classifier.config = ModelConfig(classes=("normal", "covid19"), provenance=provenance)
    report = evaluate(classifier, drawn, **FAST)
    assert report.model["provenance"]["train"]["dropped"] == {"M\\udcfcnchen": 1}
    (line,) = [s for s in report.to_markdown().splitlines() if s.startswith("| 33 |")]
    assert line.endswith("| not reported |"), "it was trained on this source"
    report.to_markdown().encode()


def test_an_unknown_positive_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"positive must be one of \['normal', 'covid19'\]"):
        judge(BINARY, P, positive="covid")


# ---- confounding


def test_sources_with_one_class_each_are_called_confounded() -> None:
    sources = ["cohen" if label == "covid19" else "kermany" for label in BINARY]
    found = judge(BINARY, P, sources=sources)
    assert found.confounded
    assert CAUTION in str(found).splitlines()


def test_one_source_with_both_classes_is_enough_to_tell(report: EvaluationReport) -> None:
    assert not report.confounded
    assert CAUTION not in str(report)


def test_a_third_class_does_not_hide_that_the_question_is_confounded() -> None:
    labels = ["normal"] * 10 + ["covid19"] * 10 + ["pneumonia"] * 40
    sources = ["a"] * 10 + ["b"] * 10 + ["a", "b"] * 20
    shares = np.full((60, 3), 1 / 3)
    found = evaluate_probabilities(
        labels,
        shares,
        classes=("normal", "pneumonia", "covid19"),
        patients=list(map(str, range(60))),
        sources=sources,
        views=["PA"] * 60,
        n_resamples=10,
    )
    assert found.confounded


def test_a_class_that_is_all_of_one_source_is_confounded_whatever_the_others_are_called() -> None:
    labels = ["healthy", "tumour"] * 100 + ["tb"] * 100
    asked: dict[str, Any] = {
        "classes": ("healthy", "tumour", "tb"),
        "patients": range(300),
        "sources": ["a", "a", "c", "c"] * 50 + ["b"] * 100,
        "views": ["PA"] * 300,
        "n_resamples": 10,
    }
    shares = np.full((300, 3), 1 / 3)
    assert CAUTION in str(evaluate_probabilities(labels, shares, **asked))
    assert not evaluate_probabilities(labels, shares, **asked, positive="tumour").confounded


# ---- refusals


class NeverAsked(ThumbnailClassifier):
    def predict_proba(
        self, images: ChestXrayDataset, /, *, batch_size: int, progress: bool
    ) -> np.ndarray:
        raise AssertionError("asked in spite of wrong arguments")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"positive": "flu"}, "positive must be one of"),
        ({"n_resamples": 0}, "n_resamples must be a whole number from 1 to 1,000,000"),
        ({"n_resamples": 1_000_001}, "n_resamples must be a whole number from 1 to 1,000,000"),
        ({"n_resamples": 100.5}, "n_resamples must be a whole number"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"confidence": 95}, "confidence must be inside"),
    ],
)
def test_wrong_arguments_are_refused_before_the_slow_part(
    changes: dict[str, Any], match: str, dataset: ChestXrayDataset
) -> None:
    with pytest.raises(ValueError, match=match):
        evaluate(NeverAsked(dataset), dataset, **changes)


def test_numbers_of_numpy_are_options_like_others(tmp_path: Path) -> None:
    numbers = {"n_resamples": np.int64(20), "seed": np.int64(3), "confidence": np.float32(0.5)}
    found = judge(["normal", "covid19"] * 4, [[0.5, 0.5]] * 8, **numbers)
    found.save(tmp_path / "report.json")
    assert EvaluationReport.load(tmp_path / "report.json").seed == 3


def test_a_model_without_a_config_is_known_by_its_weights(
    classifier: ThumbnailClassifier, dataset: ChestXrayDataset
) -> None:
    reports = []
    for weights in ("a" * 64, "b" * 64):
        own = ThumbnailClassifier(dataset)
        own.weights_sha256 = weights
        reports.append(evaluate(own, dataset, **FAST))
    assert [r.weights_sha256 for r in reports] == ["a" * 64, "b" * 64]
    with pytest.raises(ValueError, match="report of another model"):
        reports[0].operating_point(sensitivity=0.9, chosen_on=reports[1])


def test_a_gap_among_the_labels_is_named() -> None:
    with pytest.raises(ValueError, match=r"Labels \[nan\] are not among the classes"):
        judge(["normal", float("nan"), "covid19"], [[0.5, 0.5]] * 3)
    with pytest.raises(ValueError, match=r"Labels \[nan, 'x'\] are not among the classes"):
        judge(["x", float("nan"), "covid19"], [[0.5, 0.5]] * 3)


def test_labels_that_the_classifier_does_not_know_are_refused(dataset: ChestXrayDataset) -> None:
    binary = NeverAsked(dataset.filter(lambda s: s.label != "pneumonia"))
    expected = r"\['pneumonia'\] are not among the classes \['covid19', 'normal'\]"
    with pytest.raises(ValueError, match=expected):
        evaluate(binary, dataset)


def test_an_empty_data_set_is_refused(
    classifier: ThumbnailClassifier, dataset: ChestXrayDataset
) -> None:
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(classifier, dataset.subset([]))


@pytest.mark.parametrize(
    ("probabilities", "changes", "match"),
    [
        (P[:3], {}, r"a row per image and 2 columns .* got shape \(3, 2\)"),
        (np.full((4, 3), 1 / 3), {}, r"got shape \(4, 3\)"),
        (pd.DataFrame(P, columns=["covid19", "normal"]), {}, "expected the order of the classes: "),
        (pd.DataFrame(P, columns=["p_covid19", "p_normal"]), {}, r"columns \['p_covid19', "),
        (P, {"patients": ["1", "2"]}, "'patient_id': 2"),
        (P, {"views": ["PA"] * 5}, "'view': 5"),
        (P, {"ids": ["x"]}, "'id': 1"),
        (P, {"sources": ["a", "b", np.nan, "a"]}, "needs a source, got nan at position 2"),
        (P, {"sources": [None, *"aba"], "groups": [0, 1, 2, 3]}, "needs a source, got None at"),
        (P * 2, {}, r"probabilities must be in \[0, 1\]"),
        (P / 2, {}, "must sum to 1"),
        (P * np.nan, {}, "probabilities must be finite"),
        (P, {"classes": ("normal", "normal")}, "different names"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    probabilities: np.ndarray, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        judge(BINARY, probabilities, **changes)


def test_a_table_with_other_names_is_taken_in_its_order() -> None:
    for names in (["normal", "covid19"], [0, 1]):
        found = judge(BINARY, pd.DataFrame(P, columns=names))
        assert found.to_dict() == judge(BINARY, P).to_dict()


# ---- the report


def test_a_report_survives_strict_json(report: EvaluationReport) -> None:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    data = json.loads(report.to_json(), parse_constant=refuse)
    again = EvaluationReport.from_dict(data)
    assert again.to_dict() == report.to_dict() == data
    assert str(again) == str(report)
    assert again.predictions is not None
    assert again.predictions.equals(report.predictions)


def test_a_report_is_saved_and_loaded(report: EvaluationReport, tmp_path: Path) -> None:
    path = report.save(tmp_path / "run" / "evaluation.json")
    assert EvaluationReport.load(path).to_json() == report.to_json()
    assert list(path.parent.iterdir()) == [path]


def test_predictions_may_be_left_out(report: EvaluationReport) -> None:
    bare = replace(report, predictions=None)
    again = EvaluationReport.from_dict(json.loads(bare.to_json()))
    assert again.predictions is None
    assert str(again) == str(report)


def test_predictions_are_the_images_in_order(
    report: EvaluationReport, dataset: ChestXrayDataset
) -> None:
    table = report.predictions
    assert table is not None
    assert list(table["id"]) == [s.path.name for s in dataset.samples]
    assert list(table["patient_id"]) == [s.patient_id for s in dataset.samples]
    assert list(judge(BINARY, P).predictions["id"]) == ["0", "1", "2", "3"]  # type: ignore[index]


def test_a_report_that_cannot_be_written_leaves_nothing_behind(
    report: EvaluationReport, tmp_path: Path
) -> None:
    (tmp_path / "evaluation.json").mkdir()
    with pytest.raises(OSError, match=r"evaluation\.json"):
        report.save(tmp_path / "evaluation.json")
    assert list(tmp_path.iterdir()) == [tmp_path / "evaluation.json"]


def break_format(data: dict[str, Any]) -> None:
    data["format_version"] = 99


def break_field(data: dict[str, Any]) -> None:
    del data["by_view"]


def break_classes(data: dict[str, Any]) -> None:
    data["classes"] = "covid19"


def break_estimate(data: dict[str, Any]) -> None:
    data["overall"]["metrics"]["kappa"]["value"] = "high"


def break_subgroup(data: dict[str, Any]) -> None:
    data["by_source"]["a"] = 5


def break_confusion(data: dict[str, Any]) -> None:
    data["overall"]["confusion"] = [["many"]]


def break_columns(data: dict[str, Any]) -> None:
    del data["predictions"]["p_covid19"]


def break_probabilities(data: dict[str, Any]) -> None:
    data["predictions"]["p_covid19"][0] = None


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (break_format, "format 99, this version reads 2"),
        (break_field, "by_view"),
        (break_classes, "single string|sequence of names"),
        (break_estimate, "cannot have the value 'high'"),
        (break_subgroup, "This is no evaluation report"),
        (break_confusion, "many"),
        (break_columns, "predictions have the columns"),
        (break_probabilities, "probabilities must be finite"),
    ],
)
def test_a_damaged_report_is_refused_by_name(
    damage: Any, match: str, report: EvaluationReport, tmp_path: Path
) -> None:
    data = json.loads(report.to_json())
    damage(data)
    with pytest.raises(ReportError, match=match):
        EvaluationReport.from_dict(data)
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ReportError, match=r"evaluation\.json cannot be read as an evaluation"):
        EvaluationReport.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_report_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(ReportError, match=r"other\.json cannot be read"):
        EvaluationReport.load(path)
    with pytest.raises(ChestXrayError, match=r"missing\.json cannot be read"):
        EvaluationReport.load(tmp_path / "missing.json")


def test_the_frame_is_tidy(report: EvaluationReport) -> None:
    frame = report.to_frame()
    expected = ["group", "subgroup", "class", "metric", "value", "low", "high", "n", "method"]
    assert list(frame.columns) == expected
    # Overall, two sources, three views; four numbers over all classes, six per class, one extra.
    assert len(frame) == 6 * (4 + 3 * 6 + 1)
    assert not frame.duplicated(["group", "subgroup", "class", "metric"]).any()
    row = frame.query("group == 'source' and subgroup == 'a' and metric == 'kappa'").iloc[0]
    assert row["value"] == report.by_source["a"].metrics["kappa"].value
    assert row["class"] == "all"


def test_the_text_shows_every_number_and_every_subgroup(report: EvaluationReport) -> None:
    text = str(report)
    assert text.startswith("132 images of 72 patients, positive class covid19, intervals at 95 %")
    for found in (report.overall.metrics, *report.overall.per_class.values()):
        for metric, estimate in found.items():
            assert metric in text
            assert f"{estimate.value:.3f}" in text
    for name in ("source        a", "source        b", "view"):
        assert name in text
    assert "undefined (n = 0)" in text
    assert max(map(len, text.splitlines())) <= 100


def test_importing_the_module_imports_neither_torch_nor_pandas() -> None:
    code = (
        "import sys, chestxray_covid.evaluation; "
        "print([n for n in ('sklearn', 'torch', 'pandas') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- real radiographs


@pytest.mark.real_data
def test_a_thumbnail_tells_the_real_sources_apart_and_the_report_warns() -> None:
    root = os.environ.get("CHESTXRAY_COVID_DATA")
    if not root:
        pytest.skip("CHESTXRAY_COVID_DATA does not name the folder with the radiographs")
    from chestxray_covid.datasets.cohen import CohenCovidDataset
    from chestxray_covid.datasets.kermany import KermanyPneumoniaDataset

    cohen = CohenCovidDataset(Path(root) / "covid-chestxray-dataset")
    kermany = KermanyPneumoniaDataset(Path(root) / "chest_xray")
    both = cohen.filter(lambda s: s.label == "covid19").limit(150) + kermany.limit(150)
    patients = sorted({(s.source, s.patient_id) for s in both.samples})
    even = set(patients[::2])
    train = both.filter(lambda s: (s.source, s.patient_id) in even)
    test = both.filter(lambda s: (s.source, s.patient_id) not in even)
    report = evaluate(ThumbnailClassifier(train), test, n_resamples=200)
    assert report.overall.per_class["covid19"]["auroc"].value > 0.95
    assert report.confounded
    assert CAUTION in str(report)
    assert all(math.isnan(p.per_class["covid19"]["auroc"].value) for p in report.by_source.values())
