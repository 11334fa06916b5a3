from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import save
from sklearn.metrics import roc_auc_score

from chestxray_covid import (
    CheckpointError,
    Classifier,
    ExportError,
    FolderDataset,
    MissingExtraError,
    ModelConfig,
    Preprocess,
    QuantizationReport,
    quantization,
    quantize,
    split_by_patient,
)
from chestxray_covid.checkpoint import load_checkpoint, save_checkpoint
from chestxray_covid.cli import main
from chestxray_covid.datasets.base import ChestXrayDataset, Sample
from chestxray_covid.graph import Network
from chestxray_covid.int8 import Int8, rounded_results
from chestxray_covid.quantization import compare
from chestxray_covid.tensors import densenet121_shapes
from conftest import random_tensors
from shallow import BLOCKS, FEATURE_COUNT

pytestmark = pytest.mark.usefixtures("shallow")

CLASSES = ("normal", "covid19")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of two kinds of image that any network tells apart."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label, low, high in (("normal", 0, 90), ("covid19", 0, 256)):
        (root / label).mkdir()
        for number in range(6):
            noise = rng.integers(low, high, (64, 64)).astype(np.uint8)
            Image.fromarray(noise).save(root / label / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose last layer looks at what differs between the two kinds."""
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(classes=CLASSES, preprocess=Preprocess(size_px=64))
    tensors = random_tensors(2)
    classifier = Classifier(config, tensors, engine="openvino", precision="float32")
    means = [
        classifier.engine(np.stack([config.preprocess(p) for p in (images / c).iterdir()]))[1].mean(
            0
        )
        for c in CLASSES
    ]
    direction = (means[1] - means[0]) / np.square(means[1] - means[0]).sum()
    tensors["classifier.weight"] = np.stack([-2 * direction, 2 * direction]).astype(np.float32)
    shift = 2 * float(direction @ (means[0] + means[1]) / 2)
    tensors["classifier.bias"] = np.array([shift, -shift], np.float32)
    save_checkpoint(folder, config, tensors, {"note.json": b"{}"})
    return folder


@pytest.fixture(scope="module")
def quantised(
    checkpoint: Path, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, QuantizationReport]:
    folder = tmp_path_factory.mktemp("quantised") / "model"
    arguments = ["quantize", "--model", checkpoint, "--data", images, "--output", folder]
    arguments += ["--calibration", images]
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert "12 images, calibrated on 12: a probability moves by" in done.output
    return folder, json.loads((folder / "int8.json").read_text())


def test_a_quantised_checkpoint_predicts_in_int8_and_nearly_the_same(
    quantised: Any, checkpoint: Path, images: Path
) -> None:
    folder, report = quantised
    before = Classifier.from_pretrained(checkpoint, engine="openvino", precision="float32")
    after = Classifier.from_pretrained(folder, precision="int8")
    assert after.engine.precision == "int8"
    moved = np.abs(before.predict_proba(images) - after.predict_proba(images)).max(1)
    assert 0 < moved.max() < 0.05
    assert report["max_difference"] == pytest.approx(moved.max(), abs=1e-6)
    assert report["mean_difference"] == pytest.approx(moved.mean(), abs=1e-6)
    assert report["calibration_images"] == report["evaluation_images"] == 12
    assert report["auroc"][0]["before"] == report["auroc"][0]["after"] == 1


def test_weights_and_other_attachments_are_those_of_the_original(
    quantised: Any, checkpoint: Path
) -> None:
    config, tensors = load_checkpoint(quantised[0])
    original, expected = load_checkpoint(checkpoint)
    assert config.weights_sha256 == original.weights_sha256
    assert tensors.keys() == expected.keys()
    assert set(config.attachments) == {"note.json", "int8.safetensors", "int8.json"}


def test_the_split_of_a_run_comes_along_so_that_training_images_are_told(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(checkpoint, tmp_path / "run")
    split = split_by_patient(FolderDataset(images, classes=CLASSES), val=0.2, test=0.4)
    split.save(run / "split.json")
    arguments = ["--model", run, "--data", images, "--calibration", images]
    arguments += ["--output", tmp_path / "int8"]
    done = CliRunner().invoke(main, ["quantize", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    judge = ["evaluate", "--model", str(tmp_path / "int8"), "--data", str(images)]
    whole, held_out = (CliRunner().invoke(main, [*judge, *m]) for m in ([], ["--split", "test"]))
    assert f"Caution: the model was trained on {len(split.train)} of these 12" in whole.output
    assert f"{len(split.test)} images of" in held_out.output
    assert "Caution" not in held_out.output


def test_what_is_kept_is_a_number_per_channel_and_no_image(quantised: Any) -> None:
    data = (quantised[0] / "int8.safetensors").read_bytes()
    found = Int8.from_bytes(data)
    shapes = densenet121_shapes(len(CLASSES))
    convolutions = [name for name, shape in shapes.items() if len(shape) == 4]
    assert len(found.largest) == len(convolutions) - 1, "every convolution's input but the first"
    last = f"features.denseblock4.denselayer{BLOCKS[3]}.norm1"
    assert len(found.largest[last]) == FEATURE_COUNT - 32
    assert len(data) < 4 * sum(map(len, found.largest.values())) + 20_000


def test_a_model_that_is_restricted_to_some_classes_keeps_its_int8(
    quantised: Any, images: Path
) -> None:
    turned = Classifier.from_pretrained(quantised[0], precision="int8", classes=CLASSES[::-1])
    straight = Classifier.from_pretrained(quantised[0], precision="int8")
    found = turned.predict_proba(images)[:, ::-1]
    np.testing.assert_allclose(found, straight.predict_proba(images), atol=1e-6)


def test_a_model_of_an_earlier_version_serves_in_every_other_precision(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    config, tensors = load_checkpoint(checkpoint)
    earlier = save({"features.norm5.range": np.array([0, 1], np.float32)})
    save_checkpoint(tmp_path / "old", config, tensors, {"int8.safetensors": earlier})
    exact = Classifier.from_pretrained(tmp_path / "old", precision="float32")
    assert exact.predict_proba(images).shape == (12, 2)
    with pytest.raises(CheckpointError, match=r"old.int8\.safetensors was made by an earlier"):
        Classifier.from_pretrained(tmp_path / "old", precision="int8")
    # Its weights, which another tool wrote, stay as they are: results name their hash.
    other = save(tensors, metadata={"format": "pt"})
    save_checkpoint(tmp_path / "old", config, tensors, {"int8.safetensors": earlier}, other)
    quantize(tmp_path / "old", images, evaluation=FolderDataset(images), output=tmp_path / "old")
    assert Classifier.from_pretrained(tmp_path / "old", precision="int8").engine.name == "openvino"
    assert (tmp_path / "old" / "model.safetensors").read_bytes() == other


def test_values_that_no_network_has_are_refused_and_nothing_is_written(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    config, tensors = load_checkpoint(checkpoint)
    name = "features.denseblock1.denselayer1.norm1"
    wild = dict(tensors)
    for part in ("weight", "bias"):
        wild[f"{name}.{part}"] = tensors[f"{name}.{part}"] * 3e5
    save_checkpoint(tmp_path / "wild", config, wild)
    with pytest.raises(CheckpointError, match=f"largest values of '{name}' must be .* are damaged"):
        quantize(tmp_path / "wild", images, evaluation=FolderDataset(images), output=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_statistics_that_were_given_are_saved(quantised: Any, tmp_path: Path) -> None:
    config, tensors = load_checkpoint(quantised[0])
    int8 = Int8.from_bytes((quantised[0] / "int8.safetensors").read_bytes())
    plain = replace(config, attachments={})
    Classifier(plain, tensors, int8=int8, precision="int8").save_pretrained(tmp_path / "out")
    again = Classifier.from_pretrained(tmp_path / "out", precision="int8")
    assert again.int8 is not None
    assert again.int8.digest == int8.digest
    exact = Classifier.from_pretrained(quantised[0], precision="float32")
    assert exact.int8 is None
    exact.save_pretrained(tmp_path / "exact")
    for name in ("int8.safetensors", "int8.json"):
        original = (quantised[0] / name).read_bytes()
        assert (tmp_path / "exact" / name).read_bytes() == original


def test_a_damaged_attachment_is_found_in_every_precision_and_mended_by_quantising(
    quantised: Any, images: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(quantised[0], tmp_path / "damaged")
    data = bytearray((folder / "int8.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "int8.safetensors").write_bytes(data)
    for precision in ("float32", "int8"):
        with pytest.raises(CheckpointError, match=r"int8\.safetensors"):
            Classifier.from_pretrained(folder, precision=precision)
    quantize(folder, images, evaluation=FolderDataset(images), output=folder)
    assert Classifier.from_pretrained(folder, precision="int8").int8 is not None


def test_calibration_images_that_show_nothing_are_named(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    config, tensors = load_checkpoint(checkpoint)
    name = "features.denseblock1.denselayer1.norm1"
    dead = {**tensors, f"{name}.bias": np.full(64, -1e3, np.float32)}
    save_checkpoint(tmp_path / "dead", config, dead)
    with pytest.raises(CheckpointError, match=r"from 0 to 0\..* images show nothing: quantise aga"):
        quantize(tmp_path / "dead", images, evaluation=FolderDataset(images), output=tmp_path / "o")


def test_openvino_that_is_missing_is_named_first(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"chestxray-covid\[openvino\]"):
        quantize(tmp_path, images, evaluation=FolderDataset(images), output=tmp_path)


def test_a_checkpoint_of_another_model_is_not_replaced(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    config, tensors = load_checkpoint(checkpoint)
    save_checkpoint(own, config, tensors)
    save_checkpoint(other, config, {**tensors, "classifier.bias": tensors["classifier.bias"] + 1})
    before = (other / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a checkpoint of another model"):
        quantize(own, images, evaluation=FolderDataset(images), output=other)
    assert (other / "model.safetensors").read_bytes() == before


def test_a_model_that_answers_otherwise_is_refused_and_nothing_is_written(
    checkpoint: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(network: Network, names: list[str], pixels: object) -> dict[str, np.ndarray]:
        """Return values so large that all that is seen is rounded to 0."""
        return {k: np.full(n, 1e5, np.float32) for k, n in rounded_results(network).items()}

    monkeypatch.setattr(quantization, "largest_values", blind)
    with pytest.raises(ExportError, match=r"AUROC moves by more than 0\.005.*\n.*0\.5000 after"):
        quantize(checkpoint, images, evaluation=FolderDataset(images), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_patient_of_two_collections_is_one(
    checkpoint: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(source: str) -> list[Sample]:
        return [
            replace(sample, source=source, metadata={"content_hash": str(number)})
            for number, sample in enumerate(FolderDataset(images).samples)
        ]

    seen: list[Any] = []

    def compare(*_: Any, patients: Any, **__: Any) -> None:
        seen.extend(patients)
        raise ExportError("enough")

    monkeypatch.setattr(quantization, "compare", compare)
    monkeypatch.setattr(quantization, "largest_values", lambda *_: {})
    monkeypatch.setattr(quantization, "_probabilities", lambda *_: ((), ()))
    evaluation = ChestXrayDataset([*copied("a"), *copied("b")], classes=CLASSES)
    with pytest.raises(ExportError, match="enough"):
        quantize(checkpoint, images, evaluation=evaluation, output=tmp_path / "o")
    assert seen[:12] == seen[12:]
    assert len(set(seen)) == 12


def test_wrong_arguments_are_named_before_anything_is_computed(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    dataset, out = FolderDataset(images), tmp_path / "out"
    with pytest.raises(ValueError, match=r"calibration has no images; some 200 .* got \[\]"):
        quantize(checkpoint, [], evaluation=dataset, output=out)
    (empty := tmp_path / "empty").mkdir()
    arguments = ["--model", checkpoint, "--data", images, "--calibration", empty, "--output", out]
    done = CliRunner().invoke(main, ["quantize", *map(str, arguments)])
    assert f"some 200 radiographs are needed, got ['{empty}']" in done.output
    with pytest.raises(ValueError, match="positive and all labels must be among"):
        quantize(checkpoint, images, evaluation=dataset, output=out, positive="flu")
    one = dataset.filter(lambda sample: sample.label == "normal")
    with pytest.raises(ValueError, match="must have images of covid19 and of another class"):
        quantize(checkpoint, images, evaluation=one, output=out)


# ---------------------------------------------------------------- what moved


def moved(noise: float) -> tuple[list[str], np.ndarray, np.ndarray, list[int]]:
    rng = np.random.default_rng(2)
    labels = ["normal", "pneumonia", "covid19"] * 40
    logits = rng.normal(0, 1, (120, 3)) + 1.5 * np.eye(3)[[0, 1, 2] * 40]
    before, after = (
        np.exp(x) / np.exp(x).sum(1, keepdims=True)
        for x in (logits, logits + rng.normal(0, noise, logits.shape))
    )
    return labels, before, after, [i // 2 for i in range(120)]


def judged(noise: float, **options: Any) -> QuantizationReport:
    labels, before, after, patients = moved(noise)
    return compare(
        labels,
        before,
        after,
        classes=("normal", "pneumonia", "covid19"),
        patients=patients,
        positive="covid19",
        calibration_images=5,
        **options,
    )


def test_the_report_counts_what_moved() -> None:
    labels, before, after, _ = moved(0.5)
    report, apart = judged(0.5), np.abs(before - after).max(1)
    assert (report.max_difference, report.mean_difference) == (apart.max(), apart.mean())
    assert report.p99_difference == pytest.approx(np.percentile(apart, 99))
    assert report.flipped_labels == np.sum(before.argmax(1) != after.argmax(1)) > 0
    truth = np.array([label == "covid19" for label in labels])
    among = np.array([label != "pneumonia" for label in labels])
    for row, p in ((0, before), (1, after)):
        score = p[:, 2] / (p[:, 2] + p[:, 0])
        expected = (roc_auc_score(truth, p[:, 2]), roc_auc_score(truth[among], score[among]))
        found = [(a.before, a.after)[row] for a in report.auroc]
        assert found == pytest.approx(expected)
    for one in report.auroc:
        assert one.change.value == pytest.approx(one.after - one.before)
        assert one.change.low < one.change.value < one.change.high
    assert not report.is_accepted
    assert f"{report.flipped_labels} labels are others" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["auroc"][1]["question"].endswith("normal")


def test_the_interval_of_a_change_is_paired() -> None:
    change = judged(0.02).auroc[0].change
    assert change.high - change.low < 0.02, "that of either AUROC alone is ten times as wide"
    assert judged(0.02).is_accepted


def test_an_undefined_auroc_is_none_that_was_kept() -> None:
    labels, before, after, patients = moved(0.0)
    report = compare(
        ["covid19"] * len(labels),
        before,
        after,
        classes=("normal", "pneumonia", "covid19"),
        patients=patients,
        positive="covid19",
        calibration_images=5,
    )
    assert not report.is_accepted
    assert "no interval" in str(report)
