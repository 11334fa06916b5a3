"""The recipes of the bundled weights, on phantoms in the layouts of the four collections."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

import sources
from chestxray_covid import Augmentation, Classifier, ModelConfig, Preprocess
from chestxray_covid.tensors import read_tensors

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def recipes() -> Iterator[dict[str, Any]]:
    """Import the recipes as they import each other: as scripts of one folder."""
    names = (
        *("collection", "frame", "train_default", "judge_default", "publish_default"),
        "judge_engines",
    )
    sys.path.insert(0, str(RECIPES))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(RECIPES))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    findings = ("COVID-19", "No Finding", "Streptococcus")
    rows = [
        sources.cohen_row(f"{f[:2]}{i}", f, f"{f[:2]}{i}.png", license="CC BY-NC-SA")
        for f in findings
        for i in range(12)
    ]
    rows.append(sources.cohen_row("nd", "COVID-19", "nd.png", license="CC BY-NC-ND 4.0"))
    url = "https://github.com/ml-workgroup/covid-19-image-repository/tree/master/png"
    rows.append(sources.cohen_row("han1", "COVID-19", "own1.png", url=url))
    rows.append(sources.cohen_row("han2", "No Finding", "own2.png", url=url))
    sources.write_cohen(root / "covid-chestxray-dataset", "flat", rows=rows)
    sources.write_kermany(root)
    sources.write_hannover(root / "covid-19-image-repository", patients=12)
    sources.write_nih(root / "nih-subset", patients=12)
    return root


def test_what_may_not_be_trained_on_stays_out(recipes: dict[str, Any], data: Path) -> None:
    collection = recipes["collection"]
    dataset = collection.open_sources(data)
    names = {s.path.name for s in dataset.samples}
    assert "own1.png" in names
    assert not {"nd.png", "own2.png"} & names
    assert dataset.sources == ("cohen", "hannover", "kermany", "nih")
    counts = collection.count_by_licence(dataset)
    assert sum(counts.values()) == len(dataset)
    assert counts["CC BY-NC-SA"] == 37, "own1.png among them"
    assert not any("ND" in name.split("-") for name in counts)


def test_a_hidden_centre_shows_the_mean(recipes: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (100, 60), dtype=np.uint8)
    found = np.asarray(recipes["frame"].hide(Image.fromarray(pixels), 0.7))
    assert (found[15:85, 9:51] == round(pixels.mean())).all()
    outside = np.ones((100, 60), bool)
    outside[15:85, 9:51] = False
    assert np.array_equal(found[outside], pixels[outside])


def test_what_tells_sources_apart_is_projected_out_of_the_last_layer(
    recipes: dict[str, Any],
) -> None:
    frame, rng = recipes["frame"], np.random.default_rng(0)
    sources = np.repeat(["a", "b", "c"], 40)
    centres = {name: rng.normal(0, 3, 1024) for name in "abc"}
    features = np.stack([centres[s] + rng.normal(0, 1, 1024) for s in sources])
    tensors = {
        "classifier.weight": rng.normal(size=(3, 1024)).astype(np.float32),
        "classifier.bias": rng.normal(size=3).astype(np.float32),
        "other": np.ones(2),
    }
    typical = features.mean(0)
    found = frame.project_out(tensors, frame.differences(features, sources), typical)
    assert found["other"] is tensors["other"]

    def logits(t: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        return np.asarray(x @ t["classifier.weight"].T + t["classifier.bias"])

    means = [features[sources == name].mean(0) for name in "abc"]
    np.testing.assert_allclose(logits(found, means[0]), logits(found, means[1]), atol=1e-3)
    np.testing.assert_allclose(logits(found, means[0]), logits(found, means[2]), atol=1e-3)
    assert np.abs(logits(tensors, means[0]) - logits(tensors, means[1])).max() > 1
    np.testing.assert_allclose(logits(found, typical), logits(tensors, typical), atol=1e-3)
    rows = np.linalg.matrix_rank(
        tensors["classifier.weight"] - found["classifier.weight"], tol=1e-4
    )
    assert rows == 2, "three means differ in two directions"


@pytest.mark.slow
def test_the_recipe_leads_from_data_to_a_calibrated_checkpoint(
    recipes: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, publish = recipes["train_default"], recipes["publish_default"]
    stages = tuple(
        replace(
            stage,
            config=replace(
                stage.config,
                preprocess=Preprocess(size_px=32),
                augmentation=Augmentation.none(),
                epochs=1,
                samples_per_epoch=48,
                learning_rate=1e-3,
                progress=False,
            ),
        )
        for stage in train.STAGES[:2]
    )
    monkeypatch.setattr(train, "STAGES", stages)
    monkeypatch.setattr(publish, "STAGES", stages)
    run = tmp_path / "run"
    split = train.open_split(data, run)
    last = train.train_stages(split, run, pretrained=None)
    assert last == run / stages[-1].name
    before = (last / "model.safetensors").read_bytes()
    assert train.train_stages(train.open_split(data, run), run, pretrained=None) == last
    assert (last / "model.safetensors").read_bytes() == before, "a finished run is read"

    output, results = tmp_path / "weights", tmp_path / "results"
    options = ["--data", data, "--run", run, "--output", output, "--results", results]
    monkeypatch.setattr(sys, "argv", ["publish", *map(str, options)])
    publish.main()
    weights = output / "model.safetensors"
    tensors = read_tensors(weights.read_bytes(), weights)
    assert {t.dtype.name for t in tensors.values()} == {"float16", "int64"}
    classifier = Classifier.from_pretrained(output)
    found = json.loads((results / "calibration.json").read_text())
    assert classifier.config.threshold == found["threshold"]
    assert "90% sensitivity" in classifier.config.threshold_origin

    covid = [i for i, s in enumerate(split.val.samples) if s.label == "covid19"]
    called = [classifier.predict(split.val.image(i)).is_positive for i in covid]
    assert np.mean(called) >= 0.9
    history = json.loads((results / "history.json").read_text())
    assert [len(stage["epochs"]) for stage in history["stages"]] == [1, 1]


def test_engines_are_compared_on_radiographs_of_every_source(
    recipes: dict[str, Any], data: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "engines.json"
    output.write_text('{"others": {}}')
    arguments = ["--data", str(data), "--checkpoint", str(checkpoint_folder)]
    recipes["judge_engines"].main([*arguments, "--count", "16", "--output", str(output)])
    found = json.loads(output.read_text())
    assert found.pop("others") == {}
    digest = json.loads((checkpoint_folder / "config.json").read_text())["weights_sha256"]
    rows = found[digest]
    assert {"openvino-float32", "openvino-bfloat16", "onnx-float32", "torch-bfloat16"} <= set(rows)
    for name, row in rows.items():
        assert row["images"] == 16
        assert 0 <= row["p99"] <= row["largest"] < (1e-5 if name.endswith("32") else 0.05)
    assert rows["openvino-bfloat16"]["largest"] > rows["openvino-float32"]["largest"]


def test_a_comparison_of_engines_counts_differences_and_the_change_of_the_auroc(
    recipes: dict[str, Any],
) -> None:
    config = ModelConfig(classes=("normal", "pneumonia", "covid19"))
    rng = np.random.default_rng(0)
    exact = rng.dirichlet((1, 1, 1), 200)
    found = np.roll(exact, 1, axis=0)
    labels = rng.choice(config.classes, 200)
    row = recipes["judge_engines"].compare(config, found, exact, labels)
    differences = [max(abs(a - b)) for a, b in zip(found, exact, strict=True)]
    assert row["largest"] == max(differences)
    assert row["p99"] == pytest.approx(np.percentile(differences, 99))
    chosen = labels != "pneumonia"
    areas = [
        roc_auc_score(labels[chosen] == "covid19", p[chosen, 2] / (p[chosen, 0] + p[chosen, 2]))
        for p in (found, exact)
    ]
    assert row["auroc_change"] == pytest.approx(areas[0] - areas[1])
