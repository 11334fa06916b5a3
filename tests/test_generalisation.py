from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from audited import Linear, pixels_of
from chestxray_covid import (
    ChestXrayDataset,
    Preprocess,
    SyntheticChestXray,
    TrainingConfig,
    audit_shortcuts,
    build_densenet121,
    evaluate,
    leave_one_source_out,
    patient_groups,
)
from chestxray_covid.datasets import duplicates
from chestxray_covid.datasets.phantom import phantom_mask
from chestxray_covid.errors import TrainingError
from chestxray_covid.generalisation import (
    NOT_RETRAINED,
    auroc_change,
    has_enough,
    within_less_pooled,
    within_sources,
)
from chestxray_covid.intervals import Estimate

pytestmark = pytest.mark.usefixtures("shallow", "drawn_once")

FEW: dict[str, Any] = {"n_resamples": 50}


@cache
def phantoms(count: int = 240) -> ChestXrayDataset:
    """Return three sources that look alike, drawn once; one image per patient."""
    dataset = SyntheticChestXray(count, image_size_px=64, sources=("a", "b", "c"), patients=count)
    drawn = {s.path: s.read(s, None) for s in dataset.samples}
    samples = [replace(s, read=lambda own, size: drawn[own.path]) for s in dataset.samples]
    return ChestXrayDataset(samples, classes=dataset.classes)


@pytest.mark.slow
def test_each_source_is_judged_by_a_classifier_that_saw_neither_it_nor_the_held_out() -> None:
    dataset, trained = phantoms(), []
    # A few phantoms of different sources look so alike that they count as copies.
    paths = (s.path for s in dataset.samples)
    groups = dict(zip(paths, patient_groups(dataset), strict=True))

    def fit(train: ChestXrayDataset) -> Linear:
        trained.append(Linear(train))
        return trained[-1]

    rows = leave_one_source_out(dataset, fit, test=cast(float, torch.tensor(0.25)), **FEW)
    assert [row.source for row in rows] == ["a", "b", "c"]
    for row, model in zip(rows, trained, strict=True):
        train = model.trained_on
        assert row.source not in train.sources
        own = dataset.filter(lambda s, name=row.source: s.source == name)
        scores = model._compute(pixels_of(own))[0][:, 1]
        assert row.external.value == pytest.approx(roc_auc_score(own.targets, scores))
        assert row.n_images == row.external.n == len(own) == 80
        seen = {s.path for s in train.samples}
        away = {groups[s.path] for s in own.samples}
        held = dataset.filter(
            lambda s, seen=seen, away=away: s.path not in seen and groups[s.path] not in away
        )
        scores = model._compute(pixels_of(held))[0][:, 1]
        assert row.internal.value == pytest.approx(roc_auc_score(held.targets, scores))
        assert len(held) == pytest.approx(40, abs=2)
        assert row.change.value == pytest.approx(row.external.value - row.internal.value)
        assert row.change.low < 0 < row.change.high
    assert trained[0].model is not trained[1].model


def test_no_copy_of_a_source_that_is_left_out_is_trained_on() -> None:
    dataset = phantoms()
    first = [s for s in dataset.samples if s.source == "a"]
    copies = [
        replace(s, path=s.path.with_stem(f"copy{i}"), source="d", patient_id=f"copy{i}")
        for i, s in enumerate(first)
    ]
    drawn = {copy.path: s.read(s, None) for copy, s in zip(copies, first, strict=True)}
    copies = [replace(s, read=lambda own, size: drawn[own.path]) for s in copies]
    both = ChestXrayDataset((*dataset.samples, *copies), classes=dataset.classes)
    trained: list[Linear] = []

    def fit(train: ChestXrayDataset) -> Linear:
        trained.append(Linear(train))
        return trained[-1]

    rows = leave_one_source_out(both, fit, **FEW)
    assert [row.source for row in rows] == ["a", "b", "c", "d"]
    assert trained[0].trained_on.sources == trained[3].trained_on.sources == ("b", "c")
    assert trained[1].trained_on.sources == ("a", "c", "d")


def test_a_ready_classifier_is_judged_and_not_trained_again() -> None:
    dataset = phantoms()
    model = Linear(dataset.subset(range(100)))
    rows = leave_one_source_out(model=None, dataset=dataset, fit=model, **FEW)
    scores = model._compute(pixels_of(dataset))[0][:, 1]
    truth, sources = np.array(dataset.targets), np.array([s.source for s in dataset.samples])
    for row in rows:
        own = sources == row.source
        assert row.external.value == pytest.approx(roc_auc_score(truth[own], scores[own]))
        assert row.internal.value == pytest.approx(roc_auc_score(truth[~own], scores[~own]))
        assert row.note == "Not trained again without the source: shown, not judged."
    how: dict[str, Any] = {"heat": False, "masks": phantom_mask, **FEW}
    one = dataset.filter(lambda s: (s.source == "a") == (s.label == "normal"))
    item = audit_shortcuts(model, one, left_out=rows, **how).item("generalisation")
    assert item.verdict == "not_assessable", "it may have been trained on these sources"
    assert item.finding("without_a").what == "a, against all others"
    assert item.finding("without_a").meaning == rows[0].note
    loss = replace(rows[0].change, value=-0.3, low=-0.4, high=-0.2)
    retrained = replace(rows[0], note="", change=loss)
    item = audit_shortcuts(model, one, left_out=[retrained], **how).item("generalisation")
    assert item.verdict == "fail"
    assert "Trained without a, it is" in item.reason
    with pytest.raises(ValueError, match="left_out tells 'covid19' from 'normal', the audit 'cov"):
        audit_shortcuts(model, one, left_out=rows, negative="rest", **how)


def test_a_ready_classifier_is_not_said_to_be_trained_again_where_images_are_few() -> None:
    rows = leave_one_source_out(phantoms().subset(range(30)), Oracle(("normal", "covid19")), **FEW)
    assert {row.note for row in rows} == {NOT_RETRAINED}


def test_a_source_of_one_class_has_no_auroc_and_says_so() -> None:
    dataset = phantoms().filter(lambda s: s.source != "a" or s.label == "normal")
    rows = leave_one_source_out(dataset, Linear, **FEW)
    assert math.isnan(rows[0].external.value)
    assert math.isnan(rows[0].change.value)
    assert rows[0].internal.value > 0.5
    assert "Fewer than 20 images or 5 patients of a class" in rows[0].note


def test_where_nothing_of_a_class_is_left_nothing_is_trained() -> None:
    dataset = phantoms().filter(lambda s: (s.source == "a") == (s.label == "normal"))
    rows = leave_one_source_out(dataset, Linear, **FEW)
    assert rows[0].note == "Without a, no image of ['normal'] is left to train on."
    assert math.isnan(rows[0].internal.value)


def test_a_class_that_the_data_lack_with_the_source_too_hinders_nothing() -> None:
    classes = ("normal", "pneumonia", "covid19")
    dataset = ChestXrayDataset(phantoms().samples[:60], classes=classes)
    rows = leave_one_source_out(dataset, lambda _: Oracle(classes), **FEW)
    assert [(row.internal.value, row.external.value) for row in rows] == [(1, 1)] * 3
    with pytest.raises(TrainingError, match=r"No training image of \['pneumonia'\]"):
        leave_one_source_out(dataset, TrainingConfig(), model=lambda: build_densenet121(False))


def test_options_train_the_network_without_the_source() -> None:
    dataset = phantoms(48).filter(lambda s: s.source != "c")
    config = TrainingConfig(
        preprocess=Preprocess(size_px=32),
        epochs=1,
        samples_per_epoch=8,
        batch_size=8,
        device="cpu",
        progress=False,
    )

    def network() -> torch.nn.Module:
        with torch.random.fork_rng():
            return build_densenet121(pretrained=False)

    rows = leave_one_source_out(dataset, config, test=0.4, model=network, **FEW)
    assert [row.source for row in rows] == ["a", "b"]
    assert all(0 <= row.external.value <= 1 for row in rows)
    assert all("Fewer than 20" in row.note for row in rows)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"test": 0}, r"test must be a share in \(0, 0.5\]"),
        ({"n_resamples": 0}, "n_resamples must be a whole number from 1 to 1,000,000"),
        ({"positive": "flu"}, "positive must be one of"),
        ({"seed": 2**32}, "seed must be from 0 to 4294967294, got 4294967296"),
    ],
)
def test_impossible_options_are_refused(
    options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "_thumbnails", None)  # no image is decoded
    with pytest.raises(ValueError, match=reason):
        leave_one_source_out(phantoms(), Linear, **{**FEW, **options})
    with pytest.raises(TypeError, match=r"test must be a number, got '0\.2'"):
        leave_one_source_out(phantoms(), Linear, test="0.2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a function .* got Linear"):
        leave_one_source_out(phantoms(), TrainingConfig(), model=torch.nn.Linear(1, 1))


@dataclass
class Oracle:
    """Knows every label, in its own order of the classes."""

    classes: tuple[str, ...]

    def predict_proba(self, images: Any, /, *, batch_size: int, progress: bool) -> np.ndarray:
        known = np.array([[s.label == name for name in self.classes] for s in images.samples])
        return (known + 0.1) / (known + 0.1).sum(1, keepdims=True)


@pytest.mark.parametrize(
    "classes", [("normal", "covid19"), ("covid19", "normal"), ("pneumonia", "covid19", "normal")]
)
def test_a_classifier_may_have_its_classes_in_any_order(classes: tuple[str, ...]) -> None:
    rows = leave_one_source_out(phantoms(), lambda _: Oracle(classes), **FEW)
    assert [(row.internal.value, row.external.value) for row in rows] == [(1, 1)] * len(rows)


def test_what_is_no_way_to_train_is_refused() -> None:
    with pytest.raises(TypeError, match=r"fit must return a classifier .* it returned None"):
        leave_one_source_out(phantoms(), lambda _: None, **FEW)
    for fit in ({"epochs": 1}, None):
        with pytest.raises(TypeError, match="config must be a TrainingConfig, got"):
            leave_one_source_out(phantoms(), fit, **FEW)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (lambda p: np.log(p), r"probabilities must be in \[0, 1\]"),
        (lambda p: 0.9 * p, "Each row of probabilities must sum to 1"),
        (lambda p: p[:, 0], "must be a 2-dimensional array"),
        (lambda p: p[1:], r"a row per image and a column for each of \['normal', 'covid19'\]"),
        (lambda p: np.pad(p, ((0, 0), (0, 1))), r"\(240, 2\), got \(240, 3\)"),
        (lambda p: pd.DataFrame(p, columns=["covid19", "normal"]), "expected the order of the cl"),
    ],
)
def test_what_are_no_probabilities_of_the_classes_gives_no_numbers(
    said: Callable[[np.ndarray], Any], message: str
) -> None:
    class Strange(Oracle):
        def predict_proba(self, images: Any, /, **options: Any) -> Any:
            return said(super().predict_proba(images, **options))

    model = Strange(("normal", "covid19"))
    with pytest.raises(ValueError, match=message):
        leave_one_source_out(phantoms(), model, **FEW)
    assert leave_one_source_out(phantoms(), Oracle(model.classes), **FEW)[0].external.value == 1


def test_a_model_without_length_is_one_all_the_same() -> None:
    class Sequence(torch.nn.Sequential):  # that keeps its layers elsewhere, and is false
        classes = ("normal", "covid19")
        predict_proba = Oracle.predict_proba

    rows = leave_one_source_out(phantoms(), Sequence(), **FEW)
    assert {(row.external.value, row.note) for row in rows} == {(1.0, NOT_RETRAINED)}


def test_an_estimator_that_does_not_say_its_classes_is_refused() -> None:
    estimator = LogisticRegression().fit([[0], [1]], ["normal", "covid19"])
    with pytest.raises(TypeError, match="classifier must be one, with classes and predict_proba"):
        leave_one_source_out(phantoms(), estimator, **FEW)
    with pytest.raises(TypeError, match="fit must return a classifier with classes and predict_"):
        leave_one_source_out(phantoms(), lambda _: estimator, **FEW)


@pytest.mark.parametrize("classes", [{"covid19", "normal"}, {"normal": 1, "covid19": 0}, None])
@pytest.mark.parametrize("judge", [audit_shortcuts, evaluate, leave_one_source_out])
def test_classes_without_an_order_are_refused(judge: Callable[..., Any], classes: Any) -> None:
    model = Oracle(("normal", "covid19"))
    model.classes = classes
    given = (phantoms(), model) if judge is leave_one_source_out else (model, phantoms())
    with pytest.raises(TypeError, match="classes must be a sequence of names, got the"):
        judge(*given)


def test_one_source_cannot_be_left_out() -> None:
    with pytest.raises(ValueError, match="needs two or more, got"):
        leave_one_source_out(phantoms().filter(lambda s: s.source == "a"), Linear)


def test_pairs_inside_one_source_are_counted_one_by_one() -> None:
    rng = np.random.default_rng(0)
    truth, sources = rng.integers(0, 2, 60), rng.integers(0, 3, 60)
    scores = np.round(rng.random(60) + 0.5 * sources + 0.2 * truth, 1)
    weights = rng.integers(0, 3, (4, 60)).astype(float)
    counted = sources < 2

    def by_hand(weight: np.ndarray, among: np.ndarray) -> float:
        won = pairs = 0.0
        for i in np.flatnonzero(truth & among):
            for j in np.flatnonzero(~truth.astype(bool) & among & (sources == sources[i])):
                pairs += weight[i] * weight[j]
                won += (
                    weight[i] * weight[j] * ((scores[i] > scores[j]) + (scores[i] == scores[j]) / 2)
                )
        return won / pairs

    every = np.ones(60, bool)
    expected = [by_hand(weight, every) for weight in weights]
    assert within_sources(truth, scores, sources, sample_weight=weights) == pytest.approx(expected)
    pooled = [roc_auc_score(truth, scores, sample_weight=weight) for weight in weights]
    expected = [by_hand(w, counted) - p for w, p in zip(weights, pooled, strict=True)]
    found = within_less_pooled(truth, scores, sources, counted, sample_weight=weights)
    assert found == pytest.approx(expected)
    outside = sources == 2
    expected = [
        roc_auc_score(truth[outside], scores[outside], sample_weight=w[outside])
        - roc_auc_score(truth[~outside], scores[~outside], sample_weight=w[~outside])
        for w in weights
    ]
    found = auroc_change(truth, scores, outside, sample_weight=weights)
    assert found == pytest.approx(expected)
    alone = np.where(truth, 0, 1)
    assert np.isnan(within_sources(truth, scores, alone, sample_weight=weights)).all()


def test_twenty_cases_of_five_patients_of_both_classes_are_enough() -> None:
    truth = np.repeat([True, False], 20)
    groups = np.arange(40) % 10
    assert has_enough(truth, groups)
    assert not has_enough(truth[1:], groups[1:])
    assert not has_enough(truth[:20], groups[:20])
    assert not has_enough(truth, np.where(truth, groups % 4, groups))
    assert not has_enough(np.zeros(0, bool), np.zeros(0, int))


def test_a_class_whose_last_patients_choose_the_epoch_is_a_row_without_numbers() -> None:
    dataset = phantoms()
    rare = [s for s in dataset.samples if s.source == "a" and s.label == "covid19"][:1]
    samples = [s for s in dataset.samples if s.source != "a" or s.label == "normal"] + rare
    kept = ChestXrayDataset(samples, classes=dataset.classes)
    two = kept.filter(lambda s: s.source != "c")
    config = TrainingConfig(
        epochs=1, preprocess=Preprocess(size_px=32), device="cpu", progress=False, batch_size=16
    )
    rows = leave_one_source_out(
        two, config, model=lambda: build_densenet121(False, num_classes=2, seed=0), **FEW
    )
    by_source = {row.source: row for row in rows}
    assert "no image of ['covid19'] is left to train on" in by_source["b"].note
    assert by_source["a"].external.value == by_source["a"].external.value
    plain = json.loads(json.dumps(by_source["b"].to_dict(), allow_nan=False))
    assert plain["note"] == by_source["b"].note
    assert (plain["positive"], plain["negative"]) == ("covid19", "normal")
    assert plain["external"]["value"] is None
    assert Estimate.from_dict(by_source["a"].to_dict()["change"]) == by_source["a"].change
