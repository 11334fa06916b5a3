"""Temperatures and thresholds, found on drawn labels and on phantoms."""

from __future__ import annotations

import shutil
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from chestxray_covid import (
    ChestXrayDataset,
    Classifier,
    ModelConfig,
    Preprocess,
    Sample,
    SyntheticChestXray,
    build_densenet121,
    calibrate,
    open_dataset,
    split_by_patient,
)
from chestxray_covid.calibration import fit_temperature, fold_temperature
from chestxray_covid.checkpoint import load_attachment, load_checkpoint, save_checkpoint
from chestxray_covid.cli import main
from chestxray_covid.models import to_tensors
from conftest import random_checkpoint

pytestmark = pytest.mark.usefixtures("shallow", "drawn_once")

LABELS = ("normal", "pneumonia", "covid19")


def drawn(temperature: float, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Return labels drawn from softmax(logits / temperature), and those logits."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (count, 3))
    powers = np.exp(logits / temperature)
    shares = (powers / powers.sum(1, keepdims=True)).cumsum(1)
    return (rng.random((count, 1)) > shares[:, :-1]).sum(1), logits


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_labels_were_drawn_at_is_found(temperature: float) -> None:
    labels, logits = drawn(temperature)
    assert fit_temperature(labels, logits) == pytest.approx(temperature, rel=0.05)


def test_it_is_that_of_a_gradient_descent_in_torch() -> None:
    labels, logits = drawn(1.7, 500)
    weights = np.random.default_rng(1).uniform(0, 2, 500)
    log = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log], max_iter=100, tolerance_change=1e-12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        scaled = torch.from_numpy(logits) / log.exp()
        losses = torch.nn.functional.cross_entropy(
            scaled, torch.from_numpy(labels), reduction="none"
        )
        loss = (losses * torch.from_numpy(weights)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = fit_temperature(labels, logits, sample_weight=weights)
    assert found == pytest.approx(float(log.detach().exp()), rel=1e-4)


@pytest.mark.parametrize(("temperature", "end"), [(0.01, 0.05), (60.0, 20.0)])
def test_a_temperature_beyond_what_is_looked_for_becomes_the_end(
    temperature: float, end: float
) -> None:
    labels, logits = drawn(1.0)
    assert fit_temperature(labels, temperature * logits) == pytest.approx(end, rel=1e-4)
    assert str(end).removesuffix(".0") in str(fit_temperature.__doc__)


@pytest.mark.parametrize(
    ("y_true", "logits", "weights", "message"),
    [
        ([0, 1], [[1.0, 2.0]], None, "must have the same length|lengths"),
        ([0], [[1.0, np.nan]], None, "logits must be finite"),
        ([0], [1.0], None, r"\(N, K\)"),
        ([], np.zeros((0, 2)), None, r"\(N, K\)"),
        ([2], [[1.0, 2.0]], None, "y_true"),
        ([0], [[1.0, 2.0]], [0.0], "not all 0"),
        ([0, 1], [[1.0, 2.0], [0.0, 0.0]], [1.0, -1.0], "at least 0"),
        ([0, 1], [[1.0, 2.0], [0.0, 0.0]], [[1.0], [1.0]], r"sample_weight must be \(N,\)"),
        ([0, 1], [[1.0, 2.0], [0.0, 0.0]], 1.0, r"sample_weight must be \(N,\)"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    y_true: Any, logits: Any, weights: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit_temperature(y_true, logits, sample_weight=weights)


@pytest.mark.slow
def test_a_folded_temperature_divides_the_logits_of_every_engine() -> None:
    config = ModelConfig(classes=("normal", "covid19"), preprocess=Preprocess(size_px=32))
    tensors = to_tensors(build_densenet121(pretrained=False, seed=0))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    plain = Classifier(config, tensors).predict_proba(list(pixels))
    folded = Classifier(config, fold_temperature(tensors, 2.0)).predict_proba(list(pixels))
    odds = np.log(plain[:, 1] / plain[:, 0])
    np.testing.assert_allclose(np.log(folded[:, 1] / folded[:, 0]), odds / 2, atol=1e-5)


@pytest.mark.parametrize("temperature", [0, -1, np.nan, np.inf])
def test_an_impossible_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        fold_temperature({}, temperature)


@pytest.fixture(scope="module")
def phantoms() -> ChestXrayDataset:
    """Return phantoms that are drawn once."""
    drawn = SyntheticChestXray(60, classes=LABELS, image_size_px=64)
    images = {s.path: s.read(s, None) for s in drawn.samples}
    samples = [replace(s, read=lambda own, size: images[own.path]) for s in drawn.samples]
    return ChestXrayDataset(samples, classes=LABELS)


@pytest.fixture(scope="module")
def model(
    shallow: None, phantoms: ChestXrayDataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a model whose logits have a deviation of 3, a note, and what int8 needs."""
    folder = random_checkpoint(tmp_path_factory.mktemp("model"))
    config, tensors = load_checkpoint(folder)
    pixels = np.stack([config.preprocess(phantoms.image(i)) for i in range(len(phantoms))])
    _, features = Classifier(config, tensors).engine(pixels)
    middle, scale = features.mean(0), features.std(0) + 1e-6
    weight = np.random.default_rng(0).normal(size=(3, len(scale)))
    weight *= 3 / ((features - middle) / scale @ weight.T).std()
    tensors["classifier.weight"] = (weight / scale).astype(np.float32)
    tensors["classifier.bias"] = -(weight / scale @ middle).astype(np.float32)
    attachments = {"note.json": b"{}", "int8.safetensors": b"x", "int8.json": b"{}"}
    config = replace(config, provenance={"author": "me", "headline": {"AUROC": "0.99"}})
    save_checkpoint(folder, config, tensors, attachments)
    return folder


@pytest.fixture(scope="module")
def validation(model: Path, phantoms: ChestXrayDataset) -> ChestXrayDataset:
    """Return phantoms with labels that are drawn as if the model were twice too sure of them."""
    powers = np.sqrt(Classifier.from_pretrained(model).predict_proba(phantoms))
    rng, shares = np.random.default_rng(0), powers / powers.sum(1, keepdims=True)
    samples = [
        replace(s, label=str(rng.choice(LABELS, p=share)))
        for s, share in zip(phantoms.samples, shares, strict=True)
    ]
    return ChestXrayDataset(samples, classes=LABELS)


@pytest.mark.slow
def test_a_checkpoint_gets_the_temperature_and_the_threshold_of_the_validation_images(
    model: Path, validation: ChestXrayDataset, tmp_path: Path
) -> None:
    wanted = cast(float, Decimal("0.8"))
    report = calibrate(model, validation, output=tmp_path / "new", sensitivity=wanted)
    before, after = (Classifier.from_pretrained(place) for place in (model, tmp_path / "new"))
    assert 1.3 < report.temperature < 3, "about 2"
    logits = np.log(before.predict_proba(validation))
    shares = np.exp(logits / report.temperature)
    expected = shares / shares.sum(1, keepdims=True)
    np.testing.assert_allclose(after.predict_proba(validation), expected, atol=1e-5)
    truth = np.array([LABELS.index(s.label) for s in validation.samples])
    assert report.temperature == pytest.approx(fit_temperature(truth, logits), rel=1e-3)

    cases = [p for p in after.predict(validation) if p.label is not None]
    covid = [p for p, s in zip(cases, validation.samples, strict=True) if s.label == "covid19"]
    reached = sum(bool(p.is_positive) for p in covid)
    assert reached == -(-8 * len(covid) // 10), "and no more than it takes"
    judged = [
        p.score for p, s in zip(cases, validation.samples, strict=True) if s.label != "pneumonia"
    ]
    reaching = min(p.score for p in covid if p.is_positive)
    below = max(score for score in judged if score < reaching)
    assert report.threshold == pytest.approx((reaching + below) / 2), "of no image"
    for engine in ("torch", "onnx", "openvino"):
        other = Classifier.from_pretrained(tmp_path / "new", engine=engine)
        again = [p.is_positive for p in other.predict(validation)]
        assert again == [p.is_positive for p in cases]
    counts = {label: sum(s.label == label for s in validation.samples) for label in LABELS}
    assert after.config.threshold_origin == report.threshold_origin
    assert f"80% sensitivity for covid19 against normal on {counts['covid19']} and" in (
        report.threshold_origin
    )
    patients = {s.patient_id for s in validation.samples}
    assert (report.n_images, report.n_patients) == (60, len(patients))
    assert f"Temperature {report.temperature:.4g}" in str(report)
    foreign = replace(report, threshold_origin="a card\x1b[2J")  # of a checkpoint of somebody else
    assert r"a card\x1b[2J." in str(foreign)


def test_images_are_decoded_once(model: Path, validation: ChestXrayDataset, tmp_path: Path) -> None:
    decoded: list[Path] = []

    def read(sample: Sample, size: tuple[int, int] | None) -> Image.Image:
        decoded.append(sample.path)
        return known[sample.path].read(sample, size)

    known = {s.path: s for s in validation.samples}
    samples = [replace(s, read=read) for s in validation.samples]
    calibrate(model, ChestXrayDataset(samples, classes=LABELS), output=tmp_path)
    assert sorted(decoded) == sorted(known)


def test_the_device_is_the_one_that_was_asked_for(
    model: Path, validation: ChestXrayDataset, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="cuda:99"):
        calibrate(model, validation, output=tmp_path, device="cuda:99")


def test_calibrating_takes_back_what_made_a_model_surer(
    model: Path, validation: ChestXrayDataset, tmp_path: Path
) -> None:
    config, tensors = load_checkpoint(model)
    save_checkpoint(tmp_path / "sure", config, fold_temperature(tensors, 0.5))
    plain = calibrate(model, validation, output=tmp_path / "a")
    sure = calibrate(tmp_path / "sure", validation, output=tmp_path / "b")
    assert sure.temperature == pytest.approx(2 * plain.temperature, rel=1e-2)
    assert sure.threshold == pytest.approx(plain.threshold, abs=1e-3)
    assert sure.ece_before > sure.ece_after
    again = calibrate(tmp_path / "b", validation, output=tmp_path / "c")
    assert again.temperature == pytest.approx(1, abs=1e-2)
    config = load_checkpoint(tmp_path / "c")[0]
    whole = sure.temperature * again.temperature
    assert config.provenance["temperature"] == pytest.approx(whole), "of all that was folded in"


def test_attachments_come_along_but_for_those_of_int8(
    model: Path, validation: ChestXrayDataset, tmp_path: Path
) -> None:
    calibrate(model, validation, output=tmp_path, sensitivity=None)
    old, new = load_checkpoint(model)[0], load_checkpoint(tmp_path)[0]
    assert set(new.attachments) == {"note.json"}
    assert load_attachment(tmp_path, new, "note.json") == b"{}"
    assert set(new.provenance) == {"author", "temperature"}, "no number of the model before"
    assert (new.threshold, new.threshold_origin) == (old.threshold, old.threshold_origin)
    assert new.weights_sha256 != old.weights_sha256


def test_a_threshold_that_few_images_chose_says_so(
    model: Path, validation: ChestXrayDataset, tmp_path: Path
) -> None:
    by_label = {label: validation.filter(lambda s: s.label == label) for label in LABELS}  # noqa: B023
    few = by_label["normal"].subset(range(5)) + by_label["pneumonia"] + by_label["covid19"]
    assert len(by_label["covid19"]) >= 20
    report = calibrate(model, few, output=tmp_path)
    assert str(report).endswith("\nCaution: so few images say next to nothing.")
    assert not calibrate(model, few, output=tmp_path, sensitivity=None).caution


@pytest.mark.parametrize("shared", [0.25, 0.75])
def test_without_a_sensitivity_the_same_images_stay_positive(
    model: Path, validation: ChestXrayDataset, tmp_path: Path, shared: float
) -> None:
    config, tensors = load_checkpoint(model)
    scores = [p.score for p in Classifier.from_pretrained(model).predict(validation)]
    config = replace(config, threshold=float(np.quantile(scores, shared)) + 1e-4)
    save_checkpoint(tmp_path / "old", config, tensors)
    report = calibrate(tmp_path / "old", validation, output=tmp_path / "new", sensitivity=None)
    assert abs(report.threshold - config.threshold) > 1e-3
    before, after = (
        [p.is_positive for p in Classifier.from_pretrained(tmp_path / name).predict(validation)]
        for name in ("old", "new")
    )
    assert before == after
    assert {*before} == {False, True}


def test_what_cannot_calibrate_is_refused_and_nothing_is_written(
    model: Path, validation: ChestXrayDataset, tmp_path: Path
) -> None:
    def refused(match: str, data: ChestXrayDataset = validation, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            calibrate(model, data, **{"output": tmp_path / "new", **options})

    refused("output must be a folder other than", output=model)
    (tmp_path / "file").write_text("")
    refused("output must be a folder other than", output=tmp_path / "file")
    with pytest.raises(TypeError, match=r"sensitivity must be a number, got '0\.9'"):
        calibrate(model, validation, output=tmp_path / "new", sensitivity=cast(float, "0.9"))
    with pytest.raises(TypeError, match=r"got list. Of a Split, pass split.val"):
        calibrate(model, [], output=tmp_path / "new")
    refused(r"sensitivity must be a fraction in \(0, 1\] or None, got 1.5", sensitivity=1.5)
    some = validation.filter(lambda s: s.label != "pneumonia")
    refused(r"must have images of every class .* got \['covid19', 'normal'\]", some)
    labels = [p.label for p in Classifier.from_pretrained(model).predict(validation)]
    for match, turn in (
        ("right on all of these 60", 0),
        ("too sure of them even at .* 20", 1),
    ):
        samples = [
            replace(s, label=LABELS[LABELS.index(label) - turn])
            for s, label in zip(validation.samples, labels, strict=True)
        ]
        assert {s.label for s in samples} == {*LABELS}
        refused(match, ChestXrayDataset(samples, classes=LABELS))
    config, tensors = load_checkpoint(model)
    save_checkpoint(tmp_path / "unsure", config, fold_temperature(tensors, 100.0))
    with pytest.raises(ValueError, match=r"still too unsure at a temperature of 0\.05"):
        calibrate(tmp_path / "unsure", validation, output=tmp_path / "new")
    save_checkpoint(tmp_path / "saturated", config, fold_temperature(tensors, 1e-4))
    labels[labels.index("normal")] = "covid19"  # of which it says exactly 0
    samples = [replace(s, label=str(n)) for s, n in zip(validation.samples, labels, strict=True)]
    data = ChestXrayDataset(samples, classes=LABELS)
    with pytest.raises(ValueError, match=r"scores are saturated, a threshold would be 0\.0"):
        calibrate(tmp_path / "saturated", data, output=tmp_path / "new", sensitivity=1)
    other = replace(config, classes=("healthy", "pneumonia", "covid19"))
    save_checkpoint(tmp_path / "other", other, tensors)
    with pytest.raises(ValueError, match="tells healthy, pneumonia, covid19 apart: pass sens"):
        calibrate(tmp_path / "other", validation, output=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    refused("already holds a checkpoint of another model", output=tmp_path / "other")
    assert load_checkpoint(tmp_path / "other")[0].classes[0] == "healthy"


def test_the_command_line_says_in_its_own_words_where_a_sensitivity_means_nothing(
    model: Path, tmp_path: Path
) -> None:
    config, tensors = load_checkpoint(model)
    other = replace(config, classes=("healthy", "pneumonia", "covid19"))
    save_checkpoint(tmp_path / "other", other, tensors)
    given = ["--model", str(tmp_path / "other"), "--data", str(tmp_path), "--sensitivity", "0.8"]
    done = CliRunner().invoke(main, ["calibrate", *given, "--output", str(tmp_path / "new")])
    assert done.exit_code == 2
    assert "tells healthy, pneumonia, covid19 apart: leave it out." in done.output
    assert not (tmp_path / "new").exists()


def test_the_command_line_takes_the_validation_side_of_a_run(
    model: Path, validation: ChestXrayDataset, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    for number, sample in enumerate(validation.samples):
        (data / sample.label).mkdir(parents=True, exist_ok=True)
        sample.read(sample, None).save(data / sample.label / f"{number:02}_0.png")
    arguments = ["--data", str(data), "--sensitivity", "0.8", "--output"]

    def call(place: Path, output: str, *more: str) -> Result:
        given = ["calibrate", "--model", str(place), *arguments, str(tmp_path / output), *more]
        return CliRunner().invoke(main, given)

    for _ in range(2):  # again, in place of its own earlier output
        done = call(model, "all", "--device", "cpu")
        assert done.exit_code == 0, done.output
    assert "chosen on 60 images of 60 patients" in done.output
    assert "80% sensitivity for covid19 against normal" in done.output
    assert Classifier.from_pretrained(tmp_path / "all").config.threshold != 0.5

    run = shutil.copytree(model, tmp_path / "run")
    split = split_by_patient(open_dataset(data, classes=LABELS), val=0.4, test=0.3)
    split.save(run / "split.json")
    done = call(run, "val")
    assert done.exit_code == 0, done.output
    assert "Chosen on the validation side of the run's split." in done.output
    assert f"chosen on {len(split.val)} images" in done.output
    assert (tmp_path / "val" / "split.json").read_bytes() == (run / "split.json").read_bytes()
    assert "Caution" not in done.output.replace("Caution: so few images", "")
    done = call(run, "whole", "--split", "all")
    assert "chosen on 60 images" in done.output
    assert f"Caution: the model was trained on {len(split.train)} of these 60" in done.output

    arguments = ["--model", str(tmp_path / "val"), "--data", str(data), "--split", "test"]
    judged = CliRunner().invoke(main, ["evaluate", *arguments])
    assert judged.exit_code == 0, judged.output
    assert "(threshold as given)" in judged.output
