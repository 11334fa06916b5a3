"""The audit as a whole: two controls, and a defect for each of its items."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from audited import PREPROCESS, SIZE, Linear, pixels_of, thumbnail
from chestxray_covid import (
    AuditReport,
    ChestXrayDataset,
    Classifier,
    FolderDataset,
    Sample,
    SyntheticChestXray,
    audit_shortcuts,
    confounding,
    plot_audit,
    resolve,
)
from chestxray_covid.audit_data import (
    AuditData,
    Question,
    find_lungs,
    read_data,
    stratified_sample,
)
from chestxray_covid.audit_generalisation import generalisation_item
from chestxray_covid.audit_items import confounding_item, features_item, heat_item
from chestxray_covid.audit_occlusion import _judge, occlusion_item
from chestxray_covid.audit_report import AuditFinding, AuditItem
from chestxray_covid.checkpoint import load_checkpoint
from chestxray_covid.datasets.phantom import phantom_mask, render_phantom
from chestxray_covid.errors import DatasetError
from chestxray_covid.evaluation import evaluate_probabilities
from chestxray_covid.heat_shares import LungHeat
from chestxray_covid.intervals import Estimate
from chestxray_covid.lungs import segment

pytestmark = pytest.mark.usefixtures("drawn_once")

HOW: dict[str, Any] = {"n_resamples": 100, "masks": phantom_mask, "heat": False}


@cache
def halves(count: int, **options: Any) -> tuple[ChestXrayDataset, ChestXrayDataset]:
    """Return phantoms to train on and others to audit, one image per patient, each drawn once."""
    given = {"image_size_px": SIZE, "sources": ("a", "b"), "views": ("PA", "AP"), "seed": 3}
    phantoms = SyntheticChestXray(2 * count, patients=2 * count, **{**given, **options})
    drawn = {s.path: s.read(s, None) for s in phantoms.samples}
    samples = [replace(s, read=lambda own, size: drawn[own.path]) for s in phantoms.samples]
    both = ChestXrayDataset(samples, classes=phantoms.classes)
    return both.subset(range(count)), both.subset(range(count, 2 * count))


@pytest.fixture(scope="module")
def in_lungs() -> tuple[Linear, ChestXrayDataset]:
    train, test = halves(200)
    return Linear(train), test


@pytest.fixture(scope="module")
def passed(in_lungs: tuple[Linear, ChestXrayDataset]) -> AuditReport:
    model, test = in_lungs
    return audit_shortcuts(model, test, model.trained_on, **HOW)


# ---------------------------------------------------------------- the two controls


@pytest.mark.slow
def test_a_signal_in_the_lungs_alone_passes(passed: AuditReport) -> None:
    assert {item.name: item.verdict for item in passed.items} == dict.fromkeys(
        ("confounding", "without_lungs", "occlusion", "features", "generalisation"), "pass"
    )
    assert passed.verdict == "pass"
    needs = passed.item("occlusion")
    assert needs.finding("whole").estimate.value > 0.9
    assert needs.finding("lungs_hidden").estimate.low < 0.5
    assert needs.finding("lungs_hidden").estimate.high < 0.7
    assert "little is left" in needs.finding("lungs_hidden").meaning
    assert (passed.n_images, passed.n_patients, passed.sources) == (200, 200, ("a", "b"))


@pytest.mark.slow
def test_a_marker_in_the_corner_fails_with_the_network_itself() -> None:
    train, test = halves(44, image_size_px=96, signal="none", marker="corner")
    network = with_new_head(train)
    report = audit_shortcuts(network, test, train, **{**HOW, "heat": True})
    assert report.weights_sha256 == network.weights_sha256
    assert report.verdict == "fail"
    assert report.item("without_lungs").verdict == "fail"
    assert report.item("without_lungs").finding("frame_70").estimate.low > 0.5
    needs = report.item("occlusion")
    assert needs.verdict == "fail"
    assert needs.finding("corners_hidden").change is not None
    assert needs.finding("corners_hidden").change.high < -0.1
    assert "With the corners hidden it loses" in needs.reason
    assert report.item("confounding").verdict == "pass"
    heat = report.item("heat")
    assert heat.verdict == "not_assessable", "3 × 3 cells show nothing"
    assert heat.finding("share_in_lungs").estimate.n > 0


def with_new_head(train: ChestXrayDataset) -> Classifier:
    """Return the bundled network at 96 px with a last layer that was trained on phantoms."""
    config, tensors = load_checkpoint(resolve())
    preprocess = replace(config.preprocess, size_px=96)
    config = replace(config, classes=train.classes, preprocess=preprocess)
    tensors = {**tensors, "classifier.weight": np.zeros((2, 1024), np.float32)}
    tensors["classifier.bias"] = np.zeros(2, np.float32)
    pixels = np.stack([preprocess(train.image(i)) for i in range(len(train))])
    features = Classifier(config, tensors)._compute(pixels)[1]
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    head = LogisticRegression(C=0.01).fit((features - mean) / deviation, train.targets)
    weight = (head.coef_[0] / deviation).astype(np.float32)
    bias = np.float32(head.intercept_[0] - mean @ weight)
    tensors["classifier.weight"] = np.stack([-weight / 2, weight / 2])
    tensors["classifier.bias"] = np.array([-bias / 2, bias / 2], np.float32)
    return Classifier(config, tensors)


# ---------------------------------------------------------------- each item and its defect


def test_what_the_model_loses_is_what_scikit_learn_says(
    passed: AuditReport, in_lungs: tuple[Linear, ChestXrayDataset]
) -> None:
    model, test = in_lungs
    pixels, truth = pixels_of(test), np.array(test.targets)
    whole = roc_auc_score(truth, model._compute(pixels)[0][:, 1])
    mirrored = roc_auc_score(truth, model._compute(pixels[..., ::-1])[0][:, 1])
    found = passed.item("occlusion").finding("mirrored")
    assert found.change is not None
    assert found.estimate.value == pytest.approx(mirrored, abs=1e-9)
    assert found.change.value == pytest.approx(mirrored - whole, abs=1e-9)
    # The change is of the same images: its interval is narrower than one of two samples would be.
    spread = found.estimate.high - found.estimate.low
    assert found.change.high - found.change.low < 1.2 * spread
    assert passed.item("occlusion").finding("whole").estimate.value == pytest.approx(whole)


def weighted(dataset: ChestXrayDataset, keep: Callable[[int, Sample], bool]) -> ChestXrayDataset:
    """Return the samples that are kept, by their number among those of their source and label."""
    counts: dict[tuple[str, str], int] = {}
    chosen = []
    for i, sample in enumerate(dataset.samples):
        cell = (sample.source, sample.label)
        counts[cell] = counts.get(cell, -1) + 1
        if keep(counts[cell], sample):
            chosen.append(i)
    return dataset.subset(chosen)


def mostly_by_source(number: int, sample: Sample) -> bool:
    """Three in four images of a source are of one label."""
    return (sample.label == "normal") == (sample.source == "a") or number % 3 == 0


@pytest.mark.slow
def test_sources_that_give_the_label_fail_the_design_the_features_and_elsewhere() -> None:
    both = halves(300, site_effect=True, signal="none")
    train, test = (weighted(part, mostly_by_source) for part in both)
    report = audit_shortcuts(Linear(train), test, train, **HOW)
    design = report.item("confounding")
    assert design.verdict == "warn"
    assert design.finding("source_v").estimate.value == pytest.approx(confounding(train).cramers_v)
    assert design.tables["source and label"] == confounding(train).table
    assert "training data" in design.reason
    knows = report.item("features")
    assert knows.verdict == "fail"
    assert knows.finding("source_in_normal").estimate.value > 0.95
    holds = report.item("generalisation")
    assert holds.verdict == "fail"
    change = holds.finding("within_sources").change
    assert change is not None
    assert change.high < -0.1
    assert report.item("without_lungs").verdict in ("warn", "fail")
    alone = {"a": "normal", "b": "covid19"}
    pure = test.filter(lambda s: alone[s.source] == s.label)
    pure_report = audit_shortcuts(Linear(train), pure, **HOW)
    assert pure_report.item("confounding").verdict == "fail"
    assert "no training data were given" in pure_report.item("confounding").reason
    assert pure_report.item("generalisation").verdict == "not_assessable"
    assert pure_report.item("features").verdict == "not_assessable"
    assert math.isnan(pure_report.item("features").finding("source_in_normal").estimate.value)


@pytest.mark.slow
def test_features_that_know_a_source_that_says_nothing_only_warn() -> None:
    train, test = halves(120, site_effect=True)
    report = audit_shortcuts(Linear(train), test, train, **HOW)
    assert report.item("confounding").verdict == "pass"
    assert report.item("features").verdict == "warn"
    assert report.item("features").finding("source_in_covid19").meaning == "a, b"


def data_of(dataset: ChestXrayDataset) -> AuditData:
    """Return what an audit reads of these images."""
    question = Question.of(dataset.classes, dataset)
    how = {"n_resamples": 100, "seed": 0, "confidence": 0.95}
    return read_data(dataset, question, PREPROCESS, how=how, workers=1, progress=False)


def told(dataset: ChestXrayDataset, name: str, value: Callable[[int, Sample], str]) -> Any:
    """Return what an audit says first of these images with a sex or age of each."""
    samples = [
        replace(s, metadata={**s.metadata, name: value(i, s)})
        for i, s in enumerate(dataset.samples)
    ]
    told_so = ChestXrayDataset(samples, classes=dataset.classes)
    question = Question.of(told_so.classes, told_so)
    how = {"n_resamples": 50, "seed": 0, "confidence": 0.95}
    return confounding_item(told_so, question, how, trained=False)


def test_a_sex_or_an_age_that_goes_with_the_label_is_warned_of() -> None:
    test = halves(200)[1]
    others = {"sex": ("M", "F"), "age": ("30", "70")}
    for name, (one, other) in others.items():
        tied = told(test, name, lambda i, s, o=one, p=other: o if s.label == "normal" else p)
        assert tied.verdict == "warn", name
        assert f"The {name} all but gives the label (V = 1.00)." in tied.reason
        assert tied.finding(f"{name}_v").estimate.value == pytest.approx(1)
        mixed = told(test, name, lambda i, s, o=one, p=other: o if i % 3 else p)
        assert mixed.verdict == "pass", name
        assert name not in mixed.reason.lower()
        assert mixed.finding(f"{name}_v").estimate.value < 0.3
        half = told(test, name, lambda i, s, o=one: o if s.label == "normal" else "")
        assert half.verdict == "pass", "what is not known of most is not judged"
        assert f"{name}_v" not in {found.name for found in half.findings}
    few = test.limit(15)
    tied = told(few, "sex", lambda i, s: "M" if s.label == "normal" else "F")
    assert "sex_v" not in {found.name for found in tied.findings}


@pytest.mark.slow
def test_a_view_that_goes_with_the_label_is_seen() -> None:
    train, test = halves(200)
    by_view = test.filter(lambda s: (s.label == "normal") == (s.view == "PA"))
    report = audit_shortcuts(Linear(train), by_view, **HOW)
    assert report.item("confounding").verdict == "fail"
    assert report.item("confounding").finding("view_v").estimate.value == pytest.approx(1)
    assert "the view all but gives the label" in report.item("confounding").reason.lower()
    unknown = ChestXrayDataset(
        (replace(s, view="unknown") for s in test.samples), classes=test.classes
    )
    item = audit_shortcuts(Linear(train), unknown, **HOW).item("confounding")
    assert item.verdict == "not_assessable"
    assert "The view of most images is not known." in item.reason
    of_one = ChestXrayDataset(
        (replace(s, view="unknown") if s.label == "normal" else s for s in test.samples),
        classes=test.classes,
    )
    item = audit_shortcuts(Linear(train), of_one, **HOW).item("confounding")
    assert item.verdict == "not_assessable", "views of one class alone are compared with nothing"
    assert "The view of most images of normal is not known." in item.reason


def columns(start: float, end: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return features that see only the mean of some columns, in shares of the width."""

    def features(pixels: np.ndarray) -> np.ndarray:
        low, high = round(start * SIZE), round(end * SIZE)
        return pixels[:, 0, :, low:high].mean((1, 2))[:, None] / 255

    return features


def marked(count: int, where: tuple[slice, slice]) -> ChestXrayDataset:
    """Return phantoms of nothing, of which those with COVID-19 are brighter somewhere."""
    phantoms = SyntheticChestXray(count, image_size_px=SIZE, patients=count, signal="none")

    def read(sample: Sample, size: tuple[int, int] | None) -> Image.Image:
        pixels = np.array(render_phantom(sample))
        pixels[where] = pixels[where] // 2 + (120 if sample.label == "covid19" else 0)
        return Image.fromarray(pixels)

    samples = [replace(s, read=read) for s in phantoms.samples]
    return ChestXrayDataset(samples, classes=phantoms.classes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seen", "where", "name", "said"),
    [
        ((0, 0.06), (slice(None), slice(0, 4)), "borders_hidden", "borders hidden it loses"),
        ((0.4, 0.6), (slice(0, 5), slice(26, 38)), "lungs_hidden", "still tells the classes apart"),
    ],
)
def test_a_model_that_reads_elsewhere_fails_what_it_needs(
    seen: tuple[float, float], where: tuple[slice, slice], name: str, said: str
) -> None:
    dataset = marked(120, where)
    model = Linear(dataset.subset(range(40)), columns(*seen), strength=1e4)
    report = audit_shortcuts(model, dataset.subset(range(40, 120)), **HOW)
    needs = report.item("occlusion")
    assert needs.verdict == "fail"
    assert said in needs.finding(name).meaning
    assert said in needs.reason


@pytest.mark.slow
def test_an_order_that_turns_round_without_lungs_is_no_pass() -> None:
    """Lungs darker, frame brighter: hidden lungs leave a model that counts the frame against."""

    class Against(Linear):
        def _compute(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            found, features = super()._compute(pixels)
            top = pixels[:, 0, :5, 26:38].mean((1, 2)) / 255
            mixed = np.clip(found[:, 1] * 0.9 + 0.05 - 0.1 * top, 0, 1)
            return np.stack([1 - mixed, mixed], 1), features

    train, test = halves(200)
    bright = ChestXrayDataset(
        [replace(s, read=_brighter_top(s.read)) for s in test.samples], classes=test.classes
    )
    model = Against(train, lambda p: thumbnail(p)[:, 16:], strength=0.5)
    found = audit_shortcuts(model, bright, **HOW).item("occlusion").finding("lungs_hidden")
    assert found.estimate.high < 0.5
    assert "the order turns round" in found.meaning


def _brighter_top(read: Callable[..., Image.Image]) -> Callable[..., Image.Image]:
    def changed(sample: Sample, size: tuple[int, int] | None) -> Image.Image:
        pixels = np.array(read(sample, size))
        pixels[:5, 26:38] = 255 if sample.label == "covid19" else 0
        return Image.fromarray(pixels)

    return changed


def test_patients_that_were_trained_on_are_seen(
    in_lungs: tuple[Linear, ChestXrayDataset],
) -> None:
    model, test = in_lungs
    known = audit_shortcuts(model, test, test.subset(range(30)), **HOW).item("generalisation")
    assert known.verdict == "fail"
    assert known.reason.startswith("30 of these images are of patients that were trained on.")
    # The same images in another collection, known by what the collections call them.
    copies = [
        replace(s, source="c", patient_id=f"c{i}", metadata={"origin": "z", "image_id": f"{i}"})
        for i, s in enumerate(test.samples[:40])
    ]
    named = [
        replace(s, metadata={**s.metadata, "origin": "z", "image_id": f"{i}"})
        for i, s in enumerate(test.samples)
    ]
    elsewhere = audit_shortcuts(
        model,
        ChestXrayDataset(named, classes=test.classes),
        ChestXrayDataset(copies, classes=test.classes),
        **HOW,
    ).item("generalisation")
    assert elsewhere.verdict == "fail"
    assert elsewhere.reason.startswith("40 of these images are of patients that were trained on.")


def test_a_file_that_was_trained_on_is_known_under_another_name_patient_and_source(
    in_lungs: tuple[Linear, ChestXrayDataset], tmp_path: Path
) -> None:
    model, test = in_lungs
    for side, count in (("train", 10), ("test", len(test))):
        for i in range(count):
            image, target = test[i]
            place = tmp_path / side / test.classes[target] / f"{side}{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            image.save(place)
    train, found_anew = (FolderDataset(tmp_path / s, source=s) for s in ("train", "test"))
    # As a hospital's own table may name the content, in a hash of its own.
    named = [
        replace(s, metadata={"content_hash": f"md5-{i}"}) for i, s in enumerate(found_anew.samples)
    ]
    copies = ChestXrayDataset(named, classes=found_anew.classes)
    how: dict[str, Any] = {**HOW, "masks": None}
    found = audit_shortcuts(model, copies, train, **how).item("generalisation")
    assert found.verdict == "fail"
    assert found.reason.startswith("10 of these images are of patients that were trained on.")
    train.samples[0].path.unlink()
    with pytest.raises(DatasetError, match=r"train.* cannot be read"):  # before a pass of the model
        audit_shortcuts(model, copies, train, **how)


def test_patients_of_two_folders_that_are_called_alike_are_not_taken_for_the_same(
    in_lungs: tuple[Linear, ChestXrayDataset], tmp_path: Path
) -> None:
    """Else the audit would fail a model for having seen patients who only have the same numbers."""
    model, test = in_lungs
    for place in ("a", "b"):
        for i in range(10):
            image, target = test[i + 10 * (place == "b")]
            file = tmp_path / place / "images" / test.classes[target] / f"{i}_.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    train, other = (FolderDataset(tmp_path / place / "images") for place in ("a", "b"))
    how: dict[str, Any] = {**HOW, "masks": None}
    with pytest.raises(DatasetError, match=r"both called 'images' by default.*Name them"):
        audit_shortcuts(model, other, train.subset(range(8)), **how)
    other = FolderDataset(tmp_path / "b" / "images", source="b")
    found = audit_shortcuts(model, other, train, **how).item("generalisation")
    assert "trained on" not in found.reason


def test_sources_that_were_not_trained_on_are_external(
    in_lungs: tuple[Linear, ChestXrayDataset],
) -> None:
    model, test = in_lungs
    only_a = model.trained_on.filter(lambda s: s.source == "a")
    noisy = ChestXrayDataset(
        [replace(s, read=_noise) if s.source == "b" else s for s in test.samples],
        classes=test.classes,
    )
    elsewhere = audit_shortcuts(Linear(only_a), noisy, only_a, **HOW).item("generalisation")
    assert elsewhere.verdict == "fail"
    external = elsewhere.finding("external")
    assert external.change is not None
    assert external.change.high < -0.2
    assert external.estimate.low < 0.5 < external.estimate.high


def test_what_was_trained_on_as_taken_over_is_not_external() -> None:
    """As where Cohen's collection alone is trained on, which holds images of Hannover's."""
    train, test = halves(60)
    only_a, only_b = (train.filter(lambda s, name=name: s.source == name) for name in "ab")

    def taken_from_b(whole: ChestXrayDataset) -> ChestXrayDataset:
        samples = [
            replace(s, metadata={**s.metadata, "origin": "b"}) if s.source == "a" else s
            for s in whole.samples
        ]
        return ChestXrayDataset(samples, classes=whole.classes)

    def names(train: ChestXrayDataset, audited: ChestXrayDataset) -> set[str]:
        data, scores = data_of(audited), np.random.default_rng(0).random(len(audited))
        return {found.name for found in generalisation_item(data, scores, train, []).findings}

    assert "external" in names(only_a, test)
    assert "external" not in names(taken_from_b(only_a), test)
    assert "external" in names(only_b, test)
    assert "external" not in names(only_b, taken_from_b(test))


def scored(
    whole: np.ndarray, changed: dict[str, np.ndarray], *, patients: int = 80
) -> tuple[AuditItem, dict[str, AuditFinding]]:
    """Return what is found of 80 phantoms, 40 of each class, with these scores."""
    phantoms = SyntheticChestXray(80, image_size_px=32, patients=80)
    samples = [
        replace(s, patient_id=str(i % patients), label=("normal", "covid19")[i % 2])
        for i, s in enumerate(phantoms.samples)
    ]
    dataset = ChestXrayDataset(samples, classes=phantoms.classes)
    question = Question.of(dataset.classes, dataset)
    how = {"n_resamples": 100, "seed": 0, "confidence": 0.95}
    size = replace(PREPROCESS, size_px=32)
    data = read_data(dataset, question, size, how=how, workers=1, progress=False)
    lungs = [np.eye(32, dtype=bool)] * 80
    item = occlusion_item(data, whole, lungs, lambda _, name: changed.get(name, whole))
    return item, {found.name: found for found in item.findings}


def test_a_model_without_skill_on_lungs_alone_warns_even_where_all_resamples_agree() -> None:
    perfect = np.arange(80) % 2.0
    lost = np.full(80, 0.5)
    item, found = scored(perfect, {"lungs hidden": lost, "all but the lungs hidden": lost})
    only = found["only_lungs"]
    assert only.change is not None
    assert (only.change.value, math.isnan(only.change.low)) == (-0.5, True)
    assert "With nothing but the lungs left it loses 0.50" in only.meaning
    assert (item.verdict, item.reason) == ("warn", only.meaning)


def test_many_images_of_few_patients_are_not_assessable() -> None:
    """Of two patients every resample with both is the same: it would look like certainty."""
    perfect, lost = np.arange(80) % 2.0, np.full(80, 0.5)
    hidden = {"lungs hidden": lost}
    assert scored(perfect, hidden, patients=10)[0].verdict == "pass"
    item, found = scored(perfect, hidden, patients=2)
    assert item.verdict == "not_assessable"
    assert found["lungs_hidden"].meaning == "Each class needs 20 images of 5 patients."


def test_an_auroc_of_one_patient_a_class_is_not_called_chance() -> None:
    order = np.arange(80) % 2.0
    order[0], order[1] = order[1], order[0]
    item, found = scored(order, {}, patients=2)
    assert str(found["whole"].estimate) == "0.975 (no interval, n = 80)"
    assert item.verdict == "not_assessable"
    assert item.reason.startswith("Too few images or patients to tell (lungs hidden, ")


def test_of_two_patients_it_is_not_said_that_a_model_takes_their_classes_for_each_other() -> None:
    """In the wrong order they have no interval, which is no certainty."""
    item, found = scored(1 - np.arange(80) % 2.0, {}, patients=2)
    assert str(found["whole"].estimate) == "0.000 (no interval, n = 80)"
    assert item.verdict == "not_assessable"
    assert item.reason.startswith("Too few images or patients to tell (lungs hidden, ")


def test_an_order_that_is_reversed_or_chance_does_not_hide_what_is_read() -> None:
    perfect = np.arange(80) % 2.0
    item, found = scored(1 - perfect + weak(0.1), {"corners hidden": perfect})
    assert found["corners_hidden"].change is not None
    assert found["corners_hidden"].change.low > 0.1
    assert item.verdict == "fail"
    assert item.reason.startswith("It takes the classes for each other here (AUROC 0.")
    assert "With the corners hidden it gains 0." in item.reason
    item, _ = scored(weak(0), {"corners hidden": perfect})
    assert item.verdict == "fail"
    assert item.reason.startswith(
        "It does not tell the classes apart here, so it has no skill to lose."
    )


def _estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high, n=200, method="made up")


def test_a_larger_loss_when_mirrored_is_no_better() -> None:
    changes = [
        (-0.02, -0.08, 0.04),
        (-0.04, -0.13, 0.02),
        (-0.06, -0.18, -0.01),
        (-0.2, -0.3, -0.1),
    ]
    one = AuditFinding(
        name="mirrored", what="mirrored", metric="auroc", estimate=_estimate(0.8, 0.7, 0.9)
    )
    found = [_judge(replace(one, change=_estimate(*change))) for change in changes]
    assert found == ["pass", "not_assessable", "not_assessable", "warn"]


def test_a_loss_on_lungs_alone_is_a_warning_from_a_fifth_on_and_a_gain_none() -> None:
    one = AuditFinding(
        name="only_lungs", what="only lungs", metric="auroc", estimate=_estimate(0.7, 0.6, 0.8)
    )
    changes = [(-0.19, -0.199, -0.1), (-0.2, -0.25, -0.1), (-0.19, -0.3, -0.1), (0.2, 0.1, 0.3)]
    found = [_judge(replace(one, change=_estimate(*change))) for change in changes]
    assert found == ["pass", "warn", "not_assessable", "pass"]


def test_a_gain_when_mirrored_is_called_a_gain() -> None:
    perfect = np.arange(80) % 2.0
    half = np.where(np.arange(80) % 4 < 2, perfect, 0.5)
    assert scored(half, {"mirrored": perfect})[1]["mirrored"].meaning.startswith(
        "Mirrored it gains 0."
    )
    assert scored(perfect, {"mirrored": half})[1]["mirrored"].meaning.startswith(
        "Mirrored it loses 0."
    )


def weak(shift: float, seed: int = 1) -> np.ndarray:
    """Return scores of the 80 phantoms of ``scored`` that hardly tell the classes apart."""
    return np.random.default_rng(seed).normal(size=80) + shift * (np.arange(80) % 2)


def test_a_weak_model_that_loses_nothing_without_lungs_is_no_pass() -> None:
    """An AUROC of 0.65 that stays 0.65 is below the bands, but none of it is in the lungs."""
    item, found = scored(weak(0.6), {})
    left = found["lungs_hidden"]
    assert left.estimate.low > 0.5
    assert left.estimate.value < 0.7
    assert item.verdict == "warn"
    assert item.reason.startswith("With the lungs hidden it keeps more than it loses (AUROC 0.")
    # With the lungs hidden chance alone is left: that is a loss.
    item, found = scored(weak(0.9), {"lungs hidden": np.arange(80) // 2 % 2.0})
    assert item.verdict == "pass"
    assert "little is left" in found["lungs_hidden"].meaning


def test_a_loss_without_lungs_that_may_be_chance_is_not_assessable() -> None:
    item, found = scored(weak(0.6), {"lungs hidden": weak(0.3, seed=7)})
    left = found["lungs_hidden"]
    assert left.change is not None
    assert left.estimate.low < 0.5
    assert left.estimate.high < 0.8
    assert left.change.low < 0 < left.change.high
    assert item.verdict == "not_assessable"
    assert "too few images or patients to tell" in left.meaning
    assert "Too few images or patients to tell (lungs hidden)" in item.reason


def test_what_cannot_be_told_is_not_called_hardly_any_change() -> None:
    whole, other = weak(1.2), weak(0.9, seed=8)
    found = scored(whole, {"corners hidden": other, "lungs hidden": other})[1]
    corners = found["corners_hidden"]
    assert corners.change is not None
    assert corners.change.low < -0.1 < 0 < corners.change.high
    assert corners.meaning.startswith("With the corners hidden it loses 0.")
    assert "too few images or patients to tell" in corners.meaning
    hidden = found["lungs_hidden"]
    assert "still tells the classes apart" in hidden.meaning


@pytest.mark.slow
def test_one_source_of_both_classes_is_not_said_to_be_too_small(
    in_lungs: tuple[Linear, ChestXrayDataset],
) -> None:
    model, test = in_lungs
    one = test.filter(lambda s: s.source == "a")
    item = audit_shortcuts(model, one, **HOW).item("generalisation")
    assert item.verdict == "not_assessable"
    assert item.reason.startswith("All images are of one source (a): its AUROC is compared with")
    other = test.filter(lambda s: s.source == "b")
    item = audit_shortcuts(model, one, other, **HOW).item("generalisation")
    assert item.verdict == "not_assessable"
    assert "All images are of one source (a, which was not trained on)" in item.reason


def test_one_source_of_many_that_the_features_know_is_not_averaged_away(
    in_lungs: tuple[Linear, ChestXrayDataset],
) -> None:
    """Of five sources that look alike but for one, a mean AUROC would say 0.64."""
    model, test = in_lungs
    samples = [replace(s, source="abcde"[i // 2 % 5]) for i, s in enumerate(test.samples)]
    dataset = ChestXrayDataset(samples, classes=test.classes)
    data = data_of(dataset)
    features = np.random.default_rng(0).normal(size=(len(samples), 8)).astype(np.float32)
    features[data.sources == "c"] += 3
    design = audit_shortcuts(model, dataset, **HOW).item("confounding")
    item = features_item(data, features, design)
    found = item.finding("source_in_normal")
    assert found.estimate.value > 0.95
    assert found.meaning.startswith("c, told best of a, b, c, d, e; the interval allows for")
    assert found.estimate.confidence == pytest.approx(0.99)
    assert item.verdict == "warn"


def test_whether_a_view_that_few_images_name_goes_with_the_label_is_not_said() -> None:
    _, test = halves(200)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(len(test), 4)).astype(np.float32)
    features[[s.view == "PA" for s in test.samples], 0] += 4
    question, how = (
        Question.of(test.classes, test),
        {"n_resamples": 50, "seed": 0, "confidence": 0.95},
    )

    def reason_of(dataset: ChestXrayDataset) -> str:
        data = data_of(dataset)
        item = features_item(
            data, features, confounding_item(dataset, question, how, trained=False)
        )
        assert item.verdict == "warn"
        return item.reason

    assert reason_of(test) == "The features tell the view, which here says little of the label."
    samples = [replace(s, view="unknown") if s.label == "normal" else s for s in test.samples]
    unnamed = ChestXrayDataset(samples, classes=test.classes)
    assert reason_of(unnamed) == (
        "The features tell the view, and whether that goes with the label is not known."
    )


@pytest.mark.slow
def test_features_that_know_more_of_the_source_are_judged_no_better(
    in_lungs: tuple[Linear, ChestXrayDataset],
) -> None:
    model, test = in_lungs
    data = data_of(test)
    design = audit_shortcuts(model, test, **HOW).item("confounding")
    noise = np.random.default_rng(0).normal(size=(len(data.samples), 4)).astype(np.float32)
    worst_first = ["fail", "warn", "not_assessable", "pass"]
    found = []
    for strength in (0, 0.5, 0.8, 1, 1.2, 1.5, 3):
        features = noise.copy()
        features[data.sources == "b", 0] += strength
        item = features_item(data, features, design)
        found.append((worst_first.index(item.verdict), item.reason))
    assert [verdict for verdict, _ in found] == sorted((v for v, _ in found), reverse=True)
    assert found[-1][0] == 1
    unsure = [reason for verdict, reason in found if verdict == 2]
    assert unsure
    assert set(unsure) == {
        "Too few images or patients to tell how well source or view can be read."
    }


@pytest.mark.slow
def test_copies_of_an_image_are_not_learned_by_heart_and_taken_for_a_shortcut() -> None:
    """Collections hold equal files under other names, which are no patients to hold out."""
    train, test = halves(80, signal="none")
    copies = [replace(s, patient_id=f"copy of {s.patient_id}") for s in test.samples]
    twice = ChestXrayDataset((*test.samples, *copies), classes=test.classes)
    report = audit_shortcuts(Linear(train), twice, **HOW)
    assert (report.n_images, report.n_patients) == (160, 80)
    assert report.item("without_lungs").verdict != "fail", report.item("without_lungs").reason
    for name in ("frame_70", "image"):
        found = report.item("without_lungs").finding(name).estimate
        assert found.low < 0.5, found
    blank = [replace(s, read=lambda own, size: Image.new("L", (64, 64))) for s in test.samples]
    black = ChestXrayDataset(blank, classes=test.classes)
    question = Question.of(black.classes, black)
    data = read_data(black, question, PREPROCESS, how={}, workers=1, progress=False)
    assert len(set(data.groups)) == 80, "blank images are no copies of each other"


def test_training_data_of_one_label_say_nothing_of_the_design() -> None:
    train, test = halves(60)
    question = Question.of(test.classes, test)
    how = {"n_resamples": 50, "seed": 0, "confidence": 0.95}
    item = confounding_item(
        train.filter(lambda s: s.label == "covid19"), question, how, trained=True
    )
    assert item.verdict == "not_assessable"
    assert "All images are covid19: whether the source gives the label away is open." in item.reason
    assert "nan" not in item.reason
    assert item.finding("source_v").meaning == ""


@pytest.mark.slow
def test_a_sex_that_nobody_knows_is_no_sex(in_lungs: tuple[Linear, ChestXrayDataset]) -> None:
    model, test = in_lungs

    def named(*names: str) -> AuditItem:
        samples = [
            replace(s, metadata={**s.metadata, "sex": names[i // 2 % len(names)]})
            for i, s in enumerate(test.samples)
        ]
        dataset = ChestXrayDataset(samples, classes=test.classes)
        return audit_shortcuts(model, dataset, **HOW).item("features")

    assert named("Female", "m").finding("sex_in_normal").meaning == "F, M"
    assert math.isnan(named("Female", "unknown").finding("sex_in_normal").estimate.value)


def _noise(sample: Sample, size: tuple[int, int] | None) -> Image.Image:
    rng = np.random.default_rng(int(sample.metadata["index"]))
    return Image.fromarray(rng.integers(0, 256, (SIZE, SIZE)).astype(np.uint8))


def failed_by_headers(train: ChestXrayDataset, samples: list[Sample]) -> AuditItem:
    """Audit files, and return the item that their headers alone make fail."""
    data = ChestXrayDataset(samples, classes=train.classes)
    item = audit_shortcuts(Linear(train), data, **{**HOW, "masks": None}).item("without_lungs")
    assert item.verdict == "fail"
    assert item.finding("file_facts").estimate.value == 1
    return item


@pytest.mark.slow
def test_files_that_give_the_label_by_their_header_fail(tmp_path: Path) -> None:
    train, test = halves(60, signal="none")
    samples = []
    for i, s in enumerate(test.samples):
        path = tmp_path / f"{i}.jpg"
        s.read(s, None).save(path, quality=95 if s.label == "covid19" else 85)
        samples.append(replace(s, path=path, read=Sample.__dataclass_fields__["read"].default))
    assert "file facts only" in failed_by_headers(train, samples).reason


@pytest.mark.slow
def test_dicom_files_that_give_the_label_by_their_header_fail(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom", reason="needs the extra dicom")
    train, test = halves(60, signal="none")
    samples = []
    for i, s in enumerate(test.samples):
        data, pixels = pydicom.Dataset(), np.asarray(s.read(s, None))
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
        data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", f"1.2.{i}"
        data.Rows, data.Columns, data.SamplesPerPixel = *pixels.shape, 1
        data.BitsAllocated = data.BitsStored = 8
        data.HighBit, data.PixelRepresentation = 7, 0
        inverted = s.label == "covid19"
        data.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
        data.add_new(0x7FE00010, "OB", (255 - pixels if inverted else pixels).tobytes())
        path = tmp_path / f"{i}.dcm"
        pydicom.dcmwrite(path, data, enforce_file_format=True)
        samples.append(replace(s, path=path, read=Sample.__dataclass_fields__["read"].default))
    failed_by_headers(train, samples)


@pytest.mark.slow
def test_a_class_without_headers_among_files_with_them_fails(tmp_path: Path) -> None:
    """As where the healthy come as PNG and the sick as what no header can be read of."""
    train, test = halves(60, signal="none")
    samples = list(test.samples)
    for i, s in enumerate(samples):
        if s.label == "normal":
            path = tmp_path / f"{i}.png"
            s.read(s, None).save(path)
            samples[i] = replace(s, path=path, read=Sample.__dataclass_fields__["read"].default)
    mixed = ChestXrayDataset(samples, classes=test.classes)
    item = audit_shortcuts(Linear(train), mixed, **{**HOW, "masks": None}).item("without_lungs")
    assert item.finding("file_facts").estimate.value == 1
    assert item.verdict == "fail"


# ---------------------------------------------------------------- what cannot be told


def test_too_few_images_are_not_assessable_and_never_a_pass(
    in_lungs: tuple[Linear, ChestXrayDataset],
) -> None:
    model, test = in_lungs
    report = audit_shortcuts(model, test.subset(range(20)), **HOW)
    assert report.verdict == "not_assessable"
    for name in ("without_lungs", "occlusion", "features", "generalisation"):
        assert report.item(name).verdict == "not_assessable", name
    one = test.filter(lambda s: s.source == "a")
    assert audit_shortcuts(model, one, **HOW).item("confounding").verdict == "not_assessable"


@pytest.mark.slow
def test_without_lungs_found_and_without_skill_there_is_nothing_to_lose(
    in_lungs: tuple[Linear, ChestXrayDataset],
) -> None:
    model, test = in_lungs
    nowhere = {**HOW, "masks": lambda s: np.zeros((SIZE, SIZE), bool)}
    item = audit_shortcuts(model, test.subset(range(80)), **nowhere).item("occlusion")
    assert item.verdict == "not_assessable"
    assert item.finding("lungs_hidden").meaning == "Lungs were found in 0 of 80 images only."
    assert math.isnan(item.finding("only_lungs").estimate.value)
    train, without = halves(60, signal="none")
    chance = Linear(train)
    item = audit_shortcuts(chance, without, **HOW).item("occlusion")
    assert item.verdict == "not_assessable"
    assert "does not tell the classes apart" in item.reason


@pytest.mark.parametrize(
    ("low", "high", "n", "size", "verdict"),
    [
        (0.01, 0.05, 20, 224, "pass"),
        (-0.01, 0.05, 20, 224, "warn"),
        (0.01, 0.05, 19, 224, "not_assessable"),
        (0.01, 0.05, 20, 96, "not_assessable"),
        (math.nan, math.nan, 20, 224, "not_assessable"),
    ],
)
def test_heat_in_the_lungs_is_judged_by_the_interval_of_what_is_beyond_their_area(
    low: float, high: float, n: int, size: int, verdict: str
) -> None:
    one = Estimate(value=0.02, low=low, high=high, n=n, method="made up")
    heat = LungHeat(
        share=one, area=one, excess=one, without_heat=0, without_lungs=0, table=pd.DataFrame()
    )
    data: Any = SimpleNamespace(size_px=size, question=SimpleNamespace(positive="covid19"))
    assert heat_item(data, heat).verdict == verdict


# ---------------------------------------------------------------- what is looked at


def test_the_question_is_covid_against_normal_with_the_score_of_the_evaluation() -> None:
    labels = ("normal", "pneumonia", "covid19")
    dataset = SyntheticChestXray(30, classes=labels, image_size_px=32)
    question = Question.of(labels, dataset)
    assert (question.positive, question.negative) == ("covid19", "normal")
    assert {s.label for s in question.asked(dataset).samples} == {"normal", "covid19"}
    p = np.random.default_rng(0).dirichlet((1, 1, 1), 30)
    p[0] = (0, 1, 0)
    report = evaluate_probabilities(
        [s.label for s in dataset.samples],
        p,
        classes=labels,
        patients=range(30),
        sources=["a"] * 30,
        views=["PA"] * 30,
        n_resamples=10,
    )
    asked = [s.label != "pneumonia" for s in dataset.samples]
    truth = [s.label == "covid19" for s in dataset.samples]
    expected = report.overall.per_class["covid19"]["auroc_vs_normal"].value
    found = roc_auc_score(np.array(truth)[asked], question.score(p)[asked])
    assert found == pytest.approx(expected)
    rest = Question.of(labels, dataset, negative="rest")
    assert len(rest.asked(dataset)) == 30
    binary = Question.of(("normal", "covid19"), dataset, negative="rest")
    assert len(binary.asked(dataset)) == 30, "what it does not know is the rest, too"
    assert rest.score(p) == pytest.approx(p[:, 2])
    assert Question.of(labels, dataset.filter(lambda s: s.label != "normal")).negative == "rest"
    assert Question.of(("a", "b"), _named("a", "b")).positive == "b"


def _named(*labels: str) -> ChestXrayDataset:
    samples = SyntheticChestXray(len(labels) * 2, image_size_px=32).samples
    named = [replace(s, label=labels[i % len(labels)]) for i, s in enumerate(samples)]
    return ChestXrayDataset(named, classes=labels)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"positive": "flu"}, "positive must be one of"),
        ({"negative": "flu"}, "positive must be one of"),
        ({"positive": "normal", "negative": "normal"}, "positive must be one of"),
        ({"limit": 0}, "limit must be positive"),
        ({"limit": "5"}, "limit must be a whole number, got '5'"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"workers": 0}, "workers must be positive"),
        ({"workers": None}, "workers must be a whole number, got None"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"seed": 2**32}, "seed must be from 0 to 4294967294, got 4294967296"),
        ({"n_resamples": 0}, "n_resamples must be a whole number from 1 to 1,000,000"),
        ({"masks": lambda s: np.zeros((4, 4))}, r"masks must return \(H, W\) bool"),
        ({"masks": lambda s: "m.png"}, r"masks must return \(H, W\) bool or None, got \(\) <U5"),
        (
            {"masks": "masks/"},
            "masks must be a function that returns the lungs of a sample, got 'm",
        ),
        ({"left_out": [{"source": "a"}]}, "expected LeftOutSource, as leave_one_source_out"),
        ({"train": _named("flu", "cold")}, "train holds neither 'covid19' nor 'normal'"),
    ],
)
def test_impossible_arguments_are_refused(
    in_lungs: tuple[Linear, ChestXrayDataset], options: dict[str, Any], reason: str
) -> None:
    model, test = in_lungs
    with pytest.raises((TypeError, ValueError), match=reason):
        audit_shortcuts(model, test.subset(range(8)), **{**HOW, **options})


def test_an_audit_needs_images_of_both_sides(in_lungs: tuple[Linear, ChestXrayDataset]) -> None:
    model, test = in_lungs
    normal = test.filter(lambda s: s.label == "normal")
    with pytest.raises(ValueError, match="needs images of both, got the labels"):
        audit_shortcuts(model, normal, **HOW)


def test_a_limit_takes_of_each_source_and_label_its_share() -> None:
    dataset = weighted(SyntheticChestXray(300, sources=("a", "b")), mostly_by_source)
    sample = stratified_sample(dataset, 60, seed=1)
    assert abs(len(sample) - 60) <= 3
    for source in "ab":
        for label in dataset.classes:
            full, taken = (
                sum((s.source, s.label) == (source, label) for s in part.samples)
                for part in (dataset, sample)
            )
            assert abs(taken - 60 * full / len(dataset)) <= 1
    again = stratified_sample(dataset, 60, seed=1)
    assert [s.path for s in sample.samples] == [s.path for s in again.samples]
    assert [s.path for s in sample.samples] != [
        s.path for s in stratified_sample(dataset, 60, seed=2).samples
    ]
    assert stratified_sample(dataset, 10_000) is dataset


def test_masks_are_the_users_then_the_annotated_ones_then_the_networks(tmp_path: Path) -> None:
    dataset = SyntheticChestXray(4, image_size_px=SIZE)
    drawn = np.zeros((SIZE, SIZE), bool)
    drawn[20:40, 20:40] = True
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    first, *others = dataset.samples
    metadata = {**first.metadata, "lung_mask": str(tmp_path / "mask.png")}
    annotated = ChestXrayDataset(
        [replace(first, metadata=metadata), *others], classes=dataset.classes
    )
    data = data_of(annotated)
    found = find_lungs(data, None, batch_size=3, progress=False)
    assert found[0] is not None
    assert found[0][20:40, 20:40].all()
    assert found[0].sum() < 27 * 27
    for i in range(1, 4):
        network = segment(Image.fromarray(data.pixels[i, 0]))
        assert found[i] is not None
        assert found[i][network].all()
    wide = np.pad(np.ones((56, 58), bool), ((4, 4), (3, 3)))
    own = find_lungs(data, lambda s: wide, batch_size=3, progress=False)
    assert all(region is not None and region.mean() > 0.9 for region in own)
    for convert in (Image.fromarray, np.ndarray.tolist):
        same = find_lungs(data, lambda s, c=convert: c(wide), batch_size=3, progress=False)
        assert np.array_equal(same, own)
    with pytest.raises(ValueError, match="the pixels are of 64 px, not 224"):
        data.as_dataset(replace(PREPROCESS, size_px=224))


@pytest.mark.slow
def test_masks_that_are_true_outside_the_lungs_do_not_let_a_model_pass(
    in_lungs: tuple[Linear, ChestXrayDataset],
) -> None:
    """With the whole image hidden, any model needs the lungs."""
    model, test = in_lungs
    how = {**HOW, "masks": lambda sample: ~phantom_mask(sample)}
    item = audit_shortcuts(model, test, **how).item("occlusion")
    assert item.verdict == "not_assessable"
    assert "lungs were found in 0 of 200 images" in item.reason


def test_the_page_shows_every_verdict_and_every_number(passed: AuditReport) -> None:
    figure = plot_audit(passed)
    head, body = (axes for part in figure.subfigs for axes in part.axes)
    text = " ".join(t.get_text() for t in head.texts) + head.get_title(loc="left")
    assert "Shortcut audit: pass" in text
    assert all(item.question in text for item in passed.items)
    labels = [t.get_text() for t in body.get_yticklabels()]
    defined = [f.what for i in passed.items for f in i.findings if not math.isnan(f.estimate.value)]
    assert labels == defined
    figure.canvas.draw()


def test_the_path_of_an_audit_is_no_audit() -> None:
    with pytest.raises(TypeError, match=r"expected AuditReport, as .*load\(…\) gives it, got str"):
        plot_audit("audit.json")  # type: ignore[arg-type]


def test_a_number_that_the_verdict_on_the_design_does_not_look_at_says_so() -> None:
    """Of sources with one image each the association is perfect, and the verdict a pass."""
    phantoms = SyntheticChestXray(40, image_size_px=64)
    samples = [replace(s, source=f"site {i}") for i, s in enumerate(phantoms.samples)]
    single = ChestXrayDataset(samples, classes=phantoms.classes)
    question = Question.of(single.classes, single)
    how = {"n_resamples": 50, "seed": 0, "confidence": 0.95}
    item = confounding_item(single, question, how, trained=False)
    found = item.finding("source_v")
    assert (item.verdict, found.estimate.value) == ("pass", 1.0)
    assert "V = 0.00" in item.reason
    assert found.what == "Cramér's V of source and label, uncorrected"


@pytest.mark.slow
def test_an_audit_of_many_sites_passes_their_design_without_an_interval_that_misses_it() -> None:
    train, test = halves(200, sources=tuple(f"site {i}" for i in range(60)), views=("PA",))
    design = audit_shortcuts(Linear(train), test, **HOW).item("confounding")
    assert design.verdict == "pass", design
    estimate = design.finding("source_v").estimate
    assert np.isnan(estimate.low) or estimate.low <= estimate.value <= estimate.high
