"""The recipes of the bundled weights, on phantoms in the layouts of the four collections."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import dice
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score
from torch.nn import functional

import sources
from chestxray_covid import (
    Augmentation,
    ChestXrayDataset,
    Classifier,
    EvaluationReport,
    FolderDataset,
    History,
    ModelConfig,
    Preprocess,
    Sample,
    SyntheticChestXray,
    fit_gate,
    lung_box,
    patient_groups,
    segment,
)
from chestxray_covid.card import model_card
from chestxray_covid.checkpoint import load_checkpoint, load_config, save_checkpoint
from chestxray_covid.datasets.base import LABELS
from chestxray_covid.errors import ReportError
from chestxray_covid.hub import DEFAULT_MODEL
from chestxray_covid.models import normalise
from chestxray_covid.tensors import read_tensors
from chestxray_covid.training_history import EpochRecord
from conftest import random_checkpoint, random_tensors

pytestmark = pytest.mark.usefixtures("shallow", "drawn_once")

COVID_SOURCES = ("cohen", "hannover")
RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def recipes(shallow: None) -> Iterator[dict[str, Any]]:
    """Import the recipes as they import each other: as scripts of one folder."""
    names = [path.stem for path in RECIPES.glob("*.py")]
    before = list(sys.path)
    sys.path.insert(0, str(RECIPES))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path[:] = before
        for name in [*sys.modules]:
            if name in names or name.partition("_")[0] == "generate":
                del sys.modules[name]


@pytest.fixture(scope="module")
def checkpoint_folder(shallow: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    findings = ("COVID-19", "No Finding", "Streptococcus")
    hosts = ("https://radiopaedia.org/cases/1", "https://www.eurorad.org/case/1", "")
    places = ("Turin, Italy", "Barcelona, Spain ", "Toronto, Ontario, Canada", "")
    rows = [
        sources.cohen_row(
            *(f"{f[:2]}{i}", f, f"{f[:2]}{i}.png"),
            license="CC BY-NC-SA",
            url=hosts[i % 3],
            location=places[i % 4],
        )
        for f in findings
        for i in range(12)
    ]
    for i in range(12):  # what the gate learns to refuse
        rows.append(sources.cohen_row(f"lat{i}", "COVID-19", f"lat{i}.png", view="L"))
        slice_of = {"modality": "CT", "view": "Axial"}
        rows.append(sources.cohen_row(f"ct{i}", "COVID-19", f"ct{i}.png", **slice_of))
    rows.append(sources.cohen_row("tb", "Tuberculosis", "tb.png"))
    rows.append(sources.cohen_row("nd", "COVID-19", "nd.png", license="CC BY-NC-ND 4.0"))
    url = "https://github.com/ml-workgroup/covid-19-image-repository/tree/master/png"
    rows.append(sources.cohen_row("han1", "COVID-19", "own1.png", url=url))
    rows += [sources.cohen_row(f"own{i}", "COVID-19", f"copy{i}.png", url=url) for i in range(8)]
    contradicts = f"{sources.SHARED_IMAGE_ID}.jpeg"
    rows.append(sources.cohen_row("han2", "No Finding", contradicts, url=url))
    sources.write_cohen(root / "covid-chestxray-dataset", "flat", rows=rows)
    sources.write_kermany(root)
    sources.write_hannover(root / "covid-19-image-repository", patients=12)
    sources.write_nih(root / "nih-subset", patients=12)
    mask = np.zeros((40, 48), np.uint8)
    mask[10:30, 6:20] = mask[10:30, 28:42] = 255
    for path in (root / "covid-chestxray-dataset" / "images").glob("[CN][Oo][0-9]*.png"):
        place = root / "covid-chestxray-dataset" / "annotations" / "lungVAE-masks"
        Image.fromarray(mask).save(place / f"{path.stem}_mask.png")
    return root


def run_main(module: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]) -> None:
    """Run a recipe as from the command line."""
    lists = ((n, v if isinstance(v, list) else [v]) for n, v in options.items())
    words = [word for name, values in lists for word in (f"--{name}", *map(str, values))]
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    module.main()


def test_the_table_of_recipes_has_all_that_is_run_in_the_order_of_running() -> None:
    table = (RECIPES / "README.md").read_text(encoding="utf-8").partition("## The recipe")[0]
    listed = re.findall(r"^\| `(\w+\.py)`", table, re.MULTILINE)
    run = re.findall(r"recipes/(\w+\.py)", (RECIPES / "run.sh").read_text(encoding="utf-8"))
    assert [name for name in listed if name in run] == list(dict.fromkeys(run))


def test_what_may_not_be_trained_on_stays_out(recipes: dict[str, Any], data: Path) -> None:
    collection = recipes["collection"]
    dataset = collection.open_sources(data)
    names = {s.path.name for s in dataset.samples}
    assert "own1.png" in names
    assert not {"nd.png", f"{sources.SHARED_IMAGE_ID}.jpeg"} & names
    assert dataset.sources == ("cohen", "hannover", "kermany", "nih")
    counts = collection.count_by_licence(dataset)
    assert sum(counts.values()) == len(dataset)
    assert counts["CC BY-NC-SA"] == 45, "own1.png and its like among them"
    assert not any("ND" in name.split("-") for name in counts)


def test_radiographs_are_cropped_to_their_lungs_once(
    recipes: dict[str, Any], tmp_path: Path
) -> None:
    collection = recipes["collection"]
    phantoms = SyntheticChestXray(4, image_size_px=200).save(tmp_path / "phantoms")
    dataset = FolderDataset(phantoms, patient_id=None)
    found = collection.cropped_to_lungs(dataset, tmp_path / "crops")
    assert [(s.label, s.patient_id, s.source) for s in found.samples] == [
        (s.label, s.patient_id, s.source) for s in dataset.samples
    ]
    for i, mask in enumerate(segment(dataset)):
        expected = Preprocess(size_px=256)(dataset.image(i), box=lung_box(mask, margin=0.03))[0]
        assert np.array_equal(np.asarray(found.image(i)), expected)
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "crops").iterdir()}
    collection.cropped_to_lungs(dataset, tmp_path / "crops")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "crops").iterdir()} == written
    assert len(written) == 4


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


def test_what_tells_the_classes_of_sources_apart_by_the_frame_is_projected_out(
    recipes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    frame, rng = recipes["frame"], np.random.default_rng(0)
    cells = [(source, label) for source in ("a", "b") for label in ("normal", "covid19")]
    samples = [
        Sample(
            path=Path(f"{source}{label}{i}.png"),
            label=label,
            finding=label,
            patient_id=f"{label}{i}",
            view="PA",
            source=source,
        )
        for source, label in cells
        for i in range(5)
    ]
    train = ChestXrayDataset(samples, classes=("normal", "covid19"))
    centres = {cell: rng.normal(0, 3, 1024) for cell in cells}

    def features_of(config: Any, tensors: Any, data: Any, indices: Any, part: float) -> Any:
        own = (data.samples[i] for i in indices)
        return np.stack([(part > 0) * centres[s.source, s.label] + 1 for s in own])

    monkeypatch.setattr(frame, "features_of", features_of)
    weight = rng.normal(size=(2, 1024)).astype(np.float32)
    tensors = {"classifier.weight": weight, "classifier.bias": np.zeros(2, np.float32)}
    found = frame.unlearn_frame(ModelConfig(classes=("normal", "covid19")), tensors, train)
    shown = np.stack(list(centres.values()))
    assert np.ptp(shown @ weight.T, axis=0).min() > 1
    np.testing.assert_allclose(np.ptp(shown @ found["classifier.weight"].T, axis=0), 0, atol=1e-3)
    whole = np.ones(1024) @ found["classifier.weight"].T + found["classifier.bias"]
    np.testing.assert_allclose(whole, np.ones(1024) @ weight.T, atol=1e-3)


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
    sides, cache = (split.train, split.val), run / "cache"
    *_, last = train.train_stages(*sides, run, cache=cache)
    assert last == run / stages[-1].name
    before = (last / "model.safetensors").read_bytes()
    again = train.open_split(data, run)
    assert train.train_stages(again.train, again.val, run, cache=cache)[-1] == last
    assert (last / "model.safetensors").read_bytes() == before, "a finished run is read"

    output, results = tmp_path / "weights", tmp_path / "results"
    options = {"data": data, "run": run, "output": output, "results": results}
    run_main(publish, monkeypatch, options)
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


@pytest.mark.parametrize(
    ("given", "start"), [(None, False), ("imagenet", True), ("runs/other", "runs/other")]
)
def test_the_recipe_starts_where_it_is_told_to(
    recipes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any, start: Any
) -> None:
    class AskedError(Exception):
        pass

    def build(pretrained: Any, **options: Any) -> Any:
        raise AskedError(pretrained, options["num_classes"])

    train = recipes["train_default"]
    monkeypatch.setattr(train, "build_densenet121", build)
    phantoms = SyntheticChestXray(6, classes=LABELS, image_size_px=32)
    with pytest.raises(AskedError) as asked:
        train.train_stages(phantoms, phantoms, tmp_path, cache=tmp_path / "cache", pretrained=given)
    assert asked.value.args == (start, 3)


# ---------------------------------------------------------------- what is measured and published


class Published:
    """Where the published weights of an untrained network lie, with all that was measured."""

    def __init__(self, root: Path) -> None:
        self.run, self.weights = root / "run", root / "weights"
        self.results = root / "results"

    def read(self, name: str) -> Any:
        return json.loads((self.results / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def published(
    recipes: dict[str, Any], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Published:
    """Run everything after training, in the order of ``run.sh``."""
    place = Published(tmp_path_factory.mktemp("published"))
    train = recipes["train_default"]
    stage = train.STAGES[0]
    folder = place.run / stage.name
    config = ModelConfig(
        classes=LABELS,
        preprocess=Preprocess(size_px=32),
        provenance={"training": stage.config.to_dict()},
    )
    save_checkpoint(folder, config, random_tensors(3))
    numbers = {"val_loss": 1.0, "val_accuracy": 0.6, "val_kappa": None, "val_auroc": 0.7}
    times = {"images_per_s": 1.0, "seconds": 1.0, "data_seconds": 0.0}
    record = EpochRecord(
        epoch=1, learning_rate=1e-3, train_loss=1.0, is_best=True, **numbers, **times
    )
    History(records=(record,)).save(folder)
    split = train.open_split(data, place.run)
    samples, indices = split.dataset.samples, dict(split.indices)
    copies = [i for i in indices["train"] if samples[i].metadata.get("numbered_by") == "cohen"][:3]
    indices["train"] = tuple(i for i in indices["train"] if i not in copies)
    indices["val"] = tuple(sorted((*indices["val"], *copies)))
    replace(split, indices=indices).save(place.run / "split.json")
    with pytest.MonkeyPatch.context() as patch:
        run = {"data": data, "run": place.run}
        judged = {**run, "output": place.results, "checkpoint": place.weights}
        options = {"output": place.weights, "results": place.results, "checkpoint": folder}
        run_main(recipes["publish_default"], patch, {**run, **options})
        patch.setattr(recipes["judge_default"], "MOST_PER_CLASS", 12)
        patch.setattr(recipes["judge_default"], "LEAST_OF_PAIR", 1)
        run_main(recipes["judge_default"], patch, {**judged, "what": "checkpoint"})
        run_main(recipes["measure_fills"], patch, {**judged, "limit": 6})
        run_main(recipes["measure_reduction"], patch, {**judged, "limit": 6})
        run_main(recipes["list_tried"], patch, {**judged, "limit": 6})
        gate = {"checkpoint": place.weights, "split": place.run / "split.json", "data": data}
        patch.setattr(recipes["fit_gate"], "fit_gate", partial(fit_gate, components=4))
        photographs = dict(recipes["gate_examples"].PHOTOGRAPHS)
        del photographs["skimage"]  # which only the recipe needs
        patch.setattr(recipes["gate_examples"], "PHOTOGRAPHS", photographs)
        patch.setattr(recipes["gate_examples"], "UNSEEN", {})
        words = {**gate, "results": place.results / "gate.json", "limit": 20, "count": 4}
        recipes["fit_gate"].main([str(w) for k, v in words.items() for w in (f"--{k}", v)])
    return place


@pytest.mark.slow
def test_the_threshold_is_fitted_without_copies_of_other_collections(
    recipes: dict[str, Any], data: Path, published: Published
) -> None:
    val = recipes["train_default"].open_split(data, published.run).val
    copies = [s for s in val.samples if s.metadata.get("numbered_by") == "cohen"]
    assert copies, "or nothing is shown here"
    counts = {label: sum(s.label == label for s in val.samples) for label in LABELS}
    expected = f"on {counts['covid19'] - len(copies)} and {counts['normal']} radiographs"
    assert expected in load_config(published.weights).threshold_origin
    assert all(s.label == "covid19" for s in copies)


def test_a_gate_is_fitted_measured_and_put_beside_the_weights(published: Published) -> None:
    classifier = Classifier.from_pretrained(published.weights)
    assert classifier.gate is not None
    found = published.read("gate")
    assert found["weights_sha256"] == classifier.weights_sha256
    assert found["gate_sha256"] == classifier.config.attachments["gate.safetensors"]
    whole = {"frontal", "lateral", "ct", "noise", "clouds", "inverted"}
    assert whole | {"left half", "side by side", "four in one"} <= set(found["held_out"])
    assert set(found["never_fitted"]) >= {"waves", "four in one", "inverted and turned"}
    for part in found["held_out"].values():
        flagged = part["flagged"]
        assert flagged["rate"] == flagged["count"] / part["images"]
        exact = binomtest(flagged["count"], part["images"]).proportion_ci(method="wilson")
        assert (flagged["low"], flagged["high"]) == pytest.approx(tuple(exact), abs=1e-9)
    assert set(found["source_left_out"]) == {"cohen", "hannover", "kermany", "nih"}


def test_a_gate_is_not_fitted_without_some_of_its_photographs(recipes: dict[str, Any]) -> None:
    pictures = recipes["counter_examples"]
    folder, names = pictures.PHOTOGRAPHS["sklearn"]
    assert [*pictures.find({"sklearn": (folder, names)})] == [*names]
    with pytest.raises(SystemExit, match=r"sklearn lacks none\.jpg, which .*scikit-image"):
        pictures.find({"sklearn": (folder, (*names, "none.jpg"))})
    with pytest.raises(SystemExit, match=r"no_package lacks a\.png, b\.png, which"):
        pictures.find({"no_package": ("data", ("a.png", "b.png"))})


def test_pieces_are_parts_of_the_first_radiograph_and_all_of_the_others(
    recipes: dict[str, Any],
) -> None:
    four = [np.full((6, 6), grey, np.uint8) for grey in (10, 20, 30, 40)]
    four[0][:3] = 11  # its upper half
    pieces = recipes["gate_examples"]._pieces(four, np.random.default_rng(0))
    assert pieces["upper half"].tolist() == [[11] * 6] * 3
    assert pieces["lower half"].tolist() == [[10] * 6] * 3
    assert pieces["quarter"].shape == (3, 3)
    assert np.hstack([pieces["left half"], pieces["right half"]]).tolist() == four[0].tolist()
    assert np.hsplit(pieces["side by side"], 2)[1].tolist() == four[1].tolist()
    assert np.vsplit(pieces["one above the other"], 2)[0].tolist() == four[0].tolist()
    assert [pieces["four in one"][y, x] for y in (5, 11) for x in (5, 11)] == [10, 20, 30, 40]


def test_a_covered_centre_has_the_same_place_whatever_covers_it(recipes: dict[str, Any]) -> None:
    fills, frame = recipes["measure_fills"], recipes["frame"]
    pixels = np.random.default_rng(0).integers(60, 190, (100, 61), dtype=np.uint8)
    image = Image.fromarray(pixels)
    place = np.asarray(frame.hide(Image.fromarray(np.full_like(pixels, 7)), 0.7)) == 7
    assert place.all()
    for part in fills.PARTS:
        mean = np.asarray(fills.cover(image, part, "mean"))
        assert np.array_equal(mean, np.asarray(frame.hide(image, part)))
        inside = np.asarray(fills.cover(image, part, "black")) == 0
        assert inside.mean() == pytest.approx(part**2, abs=0.02)
        assert (mean[inside] == round(pixels.mean())).all()
        assert np.array_equal(mean[~inside], pixels[~inside])
        grey = np.asarray(fills.cover(image, part, "light grey"))
        assert (grey[inside] == 200).all()
        noise = np.asarray(fills.cover(image, part, "noise"))
        assert noise[inside].std() > 60
        for other in (grey, noise):
            assert np.array_equal(other[~inside], pixels[~inside])


def test_the_frame_is_measured_under_every_fill(
    recipes: dict[str, Any], data: Path, published: Published
) -> None:
    found = published.read("other_fills")
    assert found["weights_sha256"] == load_config(published.weights).weights_sha256
    assert found["fills"]["noise"] == "never"
    keys = [(r["covid19"], r["normal"], r["fill"], r["hidden"]) for r in found["rows"]]
    assert len(set(keys)) == len(keys) == 4 * len(found["fills"]) * 2
    # one of the numbers again, by another way
    judge = recipes["judge_default"]
    held = recipes["collection"].once(
        judge.held_out(recipes["train_default"].open_split(data, published.run))
    )
    classifier = Classifier.from_pretrained(published.weights)
    scores, truth = [], []
    for source, label in (("hannover", "covid19"), ("nih", "normal")):
        part = held.filter(lambda s, a=source, b=label: (s.source, s.label) == (a, b)).limit(6)
        for i in range(len(part)):
            shown = recipes["measure_fills"].cover(part.image(i), 0.9, "black")
            p = dict(zip(LABELS, classifier.predict_proba(shown)[0], strict=True))
            scores.append(p["covid19"] / (p["covid19"] + p["normal"]))
            truth.append(label == "covid19")
    row = found["rows"][keys.index(("hannover", "nih", "black", 0.9))]
    assert row["auroc"]["value"] == pytest.approx(roc_auc_score(truth, scores))
    assert row["n"] == [sum(truth), len(truth) - sum(truth)]


def test_two_classes_of_one_source_are_told_apart_by_them_alone(
    recipes: dict[str, Any], data: Path, published: Published
) -> None:
    judge = recipes["judge_default"]
    split = recipes["train_default"].open_split(data, published.run)
    held = recipes["collection"].once(judge.held_out(split))
    classifier = Classifier.from_pretrained(published.weights)
    rows = published.read("inside")["pairs"]
    cells = Counter((s.source, s.label) for s in held.samples)
    expected = [
        (source, *pair)
        for source in held.sources
        for pair in (("pneumonia", "normal"), ("covid19", "normal"), ("covid19", "pneumonia"))
        if all(cells[source, label] for label in pair)
    ]
    assert [(r["source"], r["of"], r["against"]) for r in rows] == expected
    assert ("cohen", "covid19", "pneumonia") in expected
    for row in rows:
        pair = (row["of"], row["against"])
        chosen = held.filter(lambda s, a=row["source"], b=pair: s.source == a and s.label in b)
        found = dict(zip(LABELS, classifier.predict_proba(chosen).T, strict=True))
        share = found[pair[0]] / (found[pair[0]] + found[pair[1]])
        truth = [s.label == pair[0] for s in chosen.samples]
        assert row["n"] == [sum(truth), len(truth) - sum(truth)]
        assert row["auroc"]["value"] == pytest.approx(roc_auc_score(truth, share))
    found = classifier.predict_proba(held)
    assert judge.judge_pair(held, found, *expected[0]) is None, "of fewer than 15 nothing is said"


def test_what_was_tried_is_listed_out_of_the_runs(
    recipes: dict[str, Any], published: Published
) -> None:
    found = published.read("tried")
    first, last = found["rows"]
    assert [len(row) for row in found["rows"]] == [len(found["columns"])] * 2
    assert first[0] == "160px: 160 px, 9 epochs, rate 0.0015"
    assert first[1] == "0.700, 0.600"
    assert last[:2] == [
        "weights: frame projected out, calibrated, published",
        "not measured",
    ]
    numbers = [float(part) for cell in first[2:] for part in cell.split(", ")]
    assert len(numbers) == 12
    assert all(0 <= number <= 1 for number in numbers)
    pairs = {(r["source"], r["of"], r["against"]): r for r in published.read("inside")["pairs"]}
    told = ("cohen", "covid19", "pneumonia"), ("nih", "pneumonia", "normal")
    for cell, pair in zip(last[-2:], told, strict=True):
        assert max(pairs[pair]["n"]) <= 6, "so that the table has all of them, too"
        assert cell == f"{pairs[pair]['auroc']['value']:.3f}"
    describe = recipes["list_tried"].describe
    stages = recipes["train_default"].STAGES
    assert "0.25 of centres hidden, 0.5 of frames swapped" in describe(stages[-1].config.to_dict())
    further = recipes["judge_recipe"].LUNGS
    assert "rate 0.0005 to the end" in describe(further.config.to_dict())


@pytest.mark.parametrize("other", ["", "note", "columns"])
def test_rows_of_further_runs_stay_if_they_were_measured_on_the_same(
    recipes: dict[str, Any], tmp_path: Path, other: str
) -> None:
    kept, place = recipes["list_tried"].kept, tmp_path / "tried.json"
    new = {"note": "80", "columns": ["a"], "rows": [["160px: now"], ["short: now"], ["v1: now"]]}
    assert kept(place, new) == []
    names = ("160px", "swap", "short", "long", "v1")
    earlier = {**new, "rows": [*([f"{name}: then"] for name in names), ["v0: made, published"]]}
    place.write_text(json.dumps({**earlier, other: "else"} if other else earlier))
    assert kept(place, new) == ([] if other else [["swap: then"], ["long: then"], ["v0: made"]])
    rows = [["long: then"], ["swap: then"], ["also: then"], ["160px: now"]]
    stages_first = [rows[3], rows[1], rows[0], rows[2]]
    assert recipes["list_tried"].in_order(rows) == stages_first, "in the order of training"


def test_a_table_without_further_runs_leaves_theirs_in_it(
    recipes: dict[str, Any], data: Path, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = published.read("tried")
    further = ["long: a run of its own", *before["rows"][0][1:]]
    more = {**before, "rows": [before["rows"][0], further, before["rows"][1]]}
    place = published.results / "tried.json"
    try:
        place.write_text(json.dumps(more))
        options = {"data": data, "run": published.run, "output": published.results, "limit": 6}
        run_main(recipes["list_tried"], monkeypatch, {**options, "checkpoint": published.weights})
        assert published.read("tried") == more
    finally:
        place.write_text(json.dumps(before))


def test_what_is_left_of_reduced_radiographs_is_measured(
    recipes: dict[str, Any], data: Path, published: Published
) -> None:
    found = published.read("reduction")
    module = recipes["measure_reduction"]
    assert found["weights_sha256"] == load_config(published.weights).weights_sha256
    assert [row["side_px"] for row in found["rows"]] == [round(32 * s) for s in module.SHARES]
    assert found["rows"][0]["changed"] == 0
    assert found["images"] >= sum(found["n"]) > 0
    image = Image.new("L", (300, 200))
    sides = (0, 20, 200, 400)
    sizes = [module.reduced(image, side).size for side in sides]
    assert sizes == [(300, 200), (30, 20), (300, 200), (300, 200)]


@pytest.fixture
def write_card(
    recipes: dict[str, Any], published: Published, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[], Path]:
    """Return a function that writes the card of a copy and returns the copy."""
    module = recipes["write_card"]
    results = shutil.copytree(published.results, tmp_path / "results")
    weights = shutil.copytree(published.weights, tmp_path / "weights")
    for pages in (module.pages, module.results):
        monkeypatch.setattr(pages, "RESULTS", results)

    def write() -> Path:
        run_main(module, monkeypatch, {"checkpoint": weights})
        return weights

    return write


def test_the_card_holds_what_was_measured_and_leaves_the_weights(
    published: Published, write_card: Callable[[], Path], recipes: dict[str, Any]
) -> None:
    folder = write_card()
    same = ("model.safetensors", "gate.safetensors")
    for name in same:
        assert (folder / name).read_bytes() == (published.weights / name).read_bytes()
    assert Classifier.from_pretrained(folder).config.provenance["known_failures"]
    card = (folder / "README.md").read_text()
    assert card == model_card(folder, DEFAULT_MODEL, figure="calibration.png")
    for title in ("Does it read the frame?", "Calibration", "Input gate", "At the stored"):
        assert f"## {title}" in card
    page = recipes["write_card"].pages.model_page()
    assert "## At the stored threshold" in page
    assert "noise: never" in " ".join(page.split())


@pytest.mark.parametrize(
    "name", ["evaluation", "evaluation_binary", "frame", "other_fills", "reduction"]
)
def test_a_card_is_not_written_with_numbers_of_other_weights(
    write_card: Callable[[], Path], recipes: dict[str, Any], name: str
) -> None:
    path = recipes["write_card"].results.RESULTS / f"{name}.json"
    content = json.loads(path.read_text())
    origin = content.get("model", content)
    assert len(origin["weights_sha256"]) == 64
    origin["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    match = rf"{name}\.json was not measured on these weights: it names the SHA-256 0{{64}}"
    with pytest.raises(ReportError, match=match):
        write_card()


def test_a_card_is_not_written_with_numbers_of_another_gate(
    write_card: Callable[[], Path], recipes: dict[str, Any]
) -> None:
    path = recipes["write_card"].results.RESULTS / "gate.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gate_sha256": "0" * 64}))
    with pytest.raises(ReportError, match=r"gate\.json is of another gate\. Fit it again"):
        write_card()


@pytest.mark.slow
def test_lungs_are_trained_measured_on_others_and_drawn(
    recipes: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lungs = recipes["train_lungs"]
    monkeypatch.setattr(lungs, "BATCH", 2)
    monkeypatch.setattr(lungs, "draw_sheet", partial(lungs.draw_sheet, per_source=1))
    run_main(lungs, monkeypatch, {"data": data, "output": tmp_path, "steps": 2})
    about = json.loads((tmp_path / "lungs.json").read_text())
    assert about["train_images"] + about["test_images"] == 24
    assert about["test_images"] == about["test_patients"] > 0
    assert about["steps"] == 2
    network = lungs.load_network(tmp_path / "lungs.safetensors")
    split = lungs.split_by_patient(lungs.annotated(data), val=0, test=0.25, seed=0)
    scores = []
    for i in range(len(split.test)):
        (drawn,) = lungs.draw_masks(network, [split.test.image(i)])
        truth = lungs.full_mask(split.test, i)
        scores.append(1 - dice(drawn.ravel(), truth.ravel()) if drawn.any() else 0.0)
    assert about["dice"]["value"] == pytest.approx(np.mean(scores))
    with Image.open(tmp_path / "overlays.png") as sheet:
        assert sheet.size == (160, 160 * 8), "a row per source and label"
    run_main(lungs, monkeypatch, {"data": data, "output": tmp_path, "measure-only": []})
    assert json.loads((tmp_path / "lungs.json").read_text()) == about, "also how long it trained"


# ---------------------------------------------------------------- relatives


@pytest.fixture
def relatives(recipes: dict[str, Any], data: Path, tmp_path: Path) -> Any:
    """Return the relatives of a collection in which some patients are one across its sources."""
    root = shutil.copytree(data, tmp_path / "data")
    nih = root / "nih-subset" / "No_findings"
    # Two patients of NIH's are one, and one of them is one of Cohen's, who is in no base.
    shutil.copy(nih / "00001200_000.jpg", nih / "00001202_007.jpg")
    cohen = root / "covid-chestxray-dataset" / "images" / "No0.png"
    Image.open(cohen).save(nih / "00001204_007.png")
    return recipes["relatives"].Relatives(root, tmp_path / "run")


def test_patients_are_left_out_by_group(relatives: Any) -> None:
    samples, groups = relatives.dataset.samples, relatives.groups

    def position(name: str) -> int:
        return next(i for i, s in enumerate(samples) if s.path.name == name)

    one, other = position("00001200_000.jpg"), position("00001202_000.jpg")
    shared, own = position("00001204_000.jpg"), position("No0.png")
    assert groups[one] == groups[other]
    assert groups[shared] == groups[own]
    assert samples[one].patient_id != samples[other].patient_id
    held = relatives.held_out_nih()
    assert not set(groups[held]) & set(groups[relatives.without(held)])
    nih = [i for i, s in enumerate(samples) if s.source == "nih"]
    rest = sorted(set(nih) - set(held.tolist()))
    assert not set(groups[held]) & set(groups[rest]), "a patient of two numbers is on one side"
    assert 0.1 < len(held) / len(nih) < 0.6
    assert shared not in relatives.without(np.array([own]))


def test_a_class_of_which_too_little_is_left_is_not_learned(
    relatives: Any, monkeypatch: pytest.MonkeyPatch, recipes: dict[str, Any], tmp_path: Path
) -> None:
    targets = np.array(relatives.dataset.targets)
    cohen = recipes["collection"].cohens(relatives.dataset)
    normal = cohen[targets[cohen] == 0]
    others = cohen[targets[cohen] > 0]
    assert len(normal) > 5
    with monkeypatch.context() as patch:
        groups = relatives.groups.copy()
        groups[normal[:3]] = 0  # of one patient
        patch.setattr(relatives, "groups", groups)
        for few in (normal[:2], normal[:3]):
            assert relatives._known_classes(np.concatenate([others, few]))[1] == [1, 2]
    chosen, known = relatives._known_classes(np.concatenate([others, normal[:3]]))
    assert (len(chosen), known) == (len(others) + 3, [0, 1, 2])

    class Two:
        def predict_proba(self, dataset: Any, *, progress: bool) -> np.ndarray:
            return np.tile([0.3, 0.7], (len(dataset), 1))

    shown = []
    own = sys.modules[type(relatives).__module__]
    monkeypatch.setattr(own, "train_relative", lambda train, *_: (shown.append(train), Two())[1])
    monkeypatch.setattr(relatives, "train_base", lambda *, lungs: tmp_path)
    config = own.INSIDE
    found = relatives.predict_without(
        others[:4], "two", config, np.concatenate([others, normal[:2]])
    )
    assert found.tolist() == [[0, 0.3, 0.7]] * 4
    assert shown[0].classes == ("pneumonia", "covid19")
    assert {s.label for s in shown[0].samples} == {"pneumonia", "covid19"}


@pytest.mark.slow
def test_no_relative_trains_on_whom_it_is_judged_by(
    recipes: dict[str, Any],
    relatives: Any,
    published: Published,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge = recipes["judge_default"]
    trained: dict[str, tuple[Any, list[int]]] = {}

    def train_relative(
        train: Any, groups: list[int], start: Any, folder: Path, config: Any
    ) -> Classifier:
        trained[folder.name] = (train, groups)
        return Classifier.from_pretrained(published.weights)

    predicted: dict[str, np.ndarray] = {}
    predict = relatives.predict_without

    def predict_without(held_out: np.ndarray, name: str, *how: Any, **more: Any) -> np.ndarray:
        predicted[name] = held_out
        found: np.ndarray = predict(held_out, name, *how, **more)
        return found

    bases: list[Any] = []

    def train_network(train: Any, val: Any, start: Any, folder: Path, config: Any) -> None:
        assert (start, folder.name) == (None, "base")
        bases.extend((train, val))

    monkeypatch.setattr(recipes["relatives"], "train_relative", train_relative)
    monkeypatch.setattr(recipes["relatives"], "train_network", train_network)
    monkeypatch.setattr(relatives, "predict_without", predict_without)
    relatives.made = "a machine"
    judge.judge_folds(relatives, tmp_path, folds=2)
    for result in judge.LEFT_OUT:
        judge.judge_left_out(relatives, tmp_path, result)
    judge.judge_hannover(relatives, tmp_path)
    left_out = ("radiopaedia", "eurorad", "journals", "Italy", "Spain", "Australia", "hannover")
    assert set(predicted) == {"fold-0", "fold-1", *(f"without-{name}" for name in left_out)}
    for name, held_out in predicted.items():
        train, groups = trained[name]
        assert not set(groups) & set(relatives.groups[held_out]), name
        allowed = set(relatives.without(held_out).tolist())
        if name != "without-hannover":  # trained on what Cohen's collection lists, alone
            allowed &= set(judge.cohens(relatives.dataset).tolist())
        assert len(groups) == len(allowed)
        paths = [s.path for s in train.samples]
        assert sorted(paths) == sorted(relatives.dataset.samples[i].path for i in allowed)
    of = dict(zip((s.path for s in relatives.dataset.samples), relatives.groups, strict=True))
    train, val = ({of[s.path] for s in side.samples} for side in bases[:2])
    assert train
    assert val
    assert bases[0].classes == ("normal", "bacterial", "viral")
    assert {s.source for s in bases[0].samples} == {"kermany", "nih"}
    assert not train & (val | set(relatives.groups[relatives.held_out_nih()]))
    judged = [i for i, s in enumerate(relatives.dataset.samples) if s.source in COVID_SOURCES]
    assert not (train | val) & set(relatives.groups[judged])
    folds = json.loads((tmp_path / "folds.json").read_text())
    assert sum(folds["all"]["n"]) == 45
    rows = json.loads((tmp_path / "subsources.json").read_text())["rows"]
    assert [row["n"] for row in rows] == [[4, 8]] * 3
    rows = json.loads((tmp_path / "locations.json").read_text())["rows"]
    assert [(row["left_out"], row["n"]) for row in rows] == [
        *(("Italy", [3, 6]), ("Spain", [3, 6]), ("Australia and Canada", [3, 6]))
    ]
    hannover = json.loads((tmp_path / "hannover.json").read_text())
    assert hannover["n"][0] == 24, "Cohen's copies are not counted again"
    for name in ("folds", *judge.LEFT_OUT, "hannover"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["made"] == "a machine"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"), [("hannover", None), ("nih", None), ("nih", "within")]
)
def test_the_recipe_is_judged_by_a_hospital_that_it_never_saw(
    name: str,
    variant: str | None,
    recipes: dict[str, Any],
    relatives: Any,
    published: Published,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge, trained = recipes["judge_recipe"], []
    hospital, until = judge.HOSPITALS[name], variant and f"192px-{variant}"
    first = published.run / recipes["train_default"].STAGES[0].name
    other = tmp_path / str(until)
    shutil.copytree(first, other)

    def train_stages(train: Any, val: Any, output: Path, *, cache: Path, stages: Any) -> list[Path]:
        assert output.name == f"recipe-without-{name}"
        assert stages == judge.stages_of(variant, until)
        trained.extend((train, val))
        return [first] if variant is None else [tmp_path / first.name, other]

    monkeypatch.setattr(judge, "train_stages", train_stages)
    judge.judge_recipe(relatives, hospital, tmp_path, variant, until)
    samples, groups = relatives.dataset.samples, relatives.groups
    of = dict(zip((s.path for s in samples), groups, strict=True))
    train, val = ({of[s.path] for s in side.samples} for side in trained)
    assert {s.source for s in trained[0].samples} | {name} == set(relatives.dataset.sources)
    assert name not in {s.source for s in trained[0].samples}
    assert not train & val
    unseen = {g for s, g in zip(samples, groups, strict=True) if s.source == name}
    assert not (train | val) & (unseen | set(groups[relatives.held_out_nih()]))

    result = hospital.result if variant is None else f"{hospital.result}_{variant}"
    found = json.loads((tmp_path / f"{result}.json").read_text())
    assert list(found["stages"]) == [stage.name for stage in judge.stages_of(variant, until)]
    parts = (0, 0.7, 0.9)
    asked = [(row["projected"], row["hidden"]) for row in found["rows"]]
    assert asked == [(projected, part) for projected in (False, True) for part in parts]
    assert found["trained_on"] == len(trained[0])
    judged = judge.sides(relatives, hospital)[2]
    own = [s for s in samples if s.source == name and s.metadata.get("numbered_by") != "cohen"]
    assert found["n"][0] == sum(s.label == hospital.label for s in own), "no copy counts again"
    assert {s.source for s in judged.samples if s.label == "normal"} == {"nih"}
    classifier = Classifier.from_pretrained(published.run / "160px")
    shares = classifier.predict_proba(judged)
    k = judged.classes.index(hospital.label)
    truth = np.array(judged.targets) == k
    auroc = roc_auc_score(truth, shares[:, k] / (shares[:, k] + shares[:, 0]))
    whole = found["rows"][0]
    assert whole["auroc"]["value"] == pytest.approx(auroc, abs=1e-6)
    for called, side in zip(whole["called"], (truth, ~truth), strict=True):
        assert called == pytest.approx([(shares[side].argmax(1) == k).mean() for k in range(3)])
    assert whole["auroc"] != found["rows"][3]["auroc"]


def test_a_variant_begins_as_the_recipe_and_differs_in_what_it_says(
    recipes: dict[str, Any],
) -> None:
    judge, default = recipes["judge_recipe"], recipes["train_default"]
    assert judge.stages_of(None) == default.STAGES
    assert judge.stages_of(None, "160px") == default.STAGES[:1]
    assert judge.stages_of("lungs") == (*default.STAGES, judge.LUNGS)
    options = {"strong": {"augmentation": default.STRONG}, "within": {"within_sources": True}}
    for variant, change in options.items():
        first, *others = stages = judge.stages_of(variant)
        assert first == default.STAGES[0]
        for stage, own in zip(others, (*default.STAGES[1:], judge.LUNGS), strict=False):
            assert stage.name == f"{own.name}-{variant}"
            assert stage.config == replace(own.config, **change) != own.config
        assert judge.stages_of(variant, others[0].name) == stages[:2]
    assert [len(judge.stages_of(name)) for name in ("strong", "within")] == [5, 4]
    assert {stage.config.augmentation for stage in default.STAGES} == {default.MILD}


def host(sample: Sample) -> str:
    return "".join(sample.metadata.get("url", "").split("/")[2:3])


def test_folds_are_judged_inside_a_website_and_by_its_name(
    recipes: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    judge, collection = recipes["judge_default"], recipes["collection"]
    dataset = collection.open_sources(data)
    inside = dataset.subset(collection.cohens(dataset))
    rng = np.random.default_rng(0)
    order, found = rng.permutation(len(inside)), rng.dirichlet((1, 1, 1), len(inside))
    folds = [order[::2], order[1::2]]
    judge.write_folds(inside, [folds, folds[::-1]], found, tmp_path)
    result = json.loads((tmp_path / "folds.json").read_text())
    assert "made" not in result

    samples = inside.samples
    covid = [s.label == "covid19" for s in samples]
    share: dict[int, float] = {}
    for rest, held_out in (folds, folds[::-1]):
        average = sum(covid[i] for i in rest) / len(rest)
        for i in held_out:
            own = [covid[j] for j in rest if host(samples[j]) == host(samples[i])]
            share[i] = (sum(own) + 2 * average) / (len(own) + 2)
    everyone = list(range(len(samples)))
    cohen = [i for i in everyone if samples[i].source == "cohen"]
    assert 0 < len(cohen) < len(everyone)
    for name, chosen in {"all": everyone, "without Hannover's": cohen}.items():
        part, truth = result[name], [covid[i] for i in chosen]
        assert part["n"] == [sum(truth), len(truth) - sum(truth)]
        alone = roc_auc_score(truth, [share[i] for i in chosen])
        assert part["website_alone"]["value"] == pytest.approx(alone)
        pairs = [
            (i, j)
            for i in chosen
            for j in chosen
            if covid[i] and not covid[j] and host(samples[i]) == host(samples[j])
        ]
        wins = [(found[i, 2] > found[j, 2]) + 0.5 * (found[i, 2] == found[j, 2]) for i, j in pairs]
        assert part["same_website"]["value"] == pytest.approx(np.mean(wins))
        counted = [len({i for i, _ in pairs}), len({j for _, j in pairs})]
        assert part["same_website_n"] == counted
        if name == "all":
            assert counted[0] < part["n"][0], "of Hannover's website there is COVID-19 alone"


def test_what_was_tried_inside_cohen_and_what_is_published_are_the_same_runs(
    recipes: dict[str, Any],
) -> None:
    pages = recipes["write_card"].results
    tried, folds = pages.read("tried_inside"), pages.read("folds")
    (now,) = (row for row in tried["rows"] if row["relatives"].endswith("(what the folds are now)"))
    assert now["all"] == folds["all"]["auroc"]
    assert now["without Hannover's"] == folds["without Hannover's"]["auroc"]
    assert now["same_website"] == folds["all"]["same_website"]
    assert tried["made"] == folds["made"]
    assert (
        "| "
        + " | ".join(
            pages.estimate(e)
            for e in (
                folds["all"]["auroc"],
                folds["without Hannover's"]["auroc"],
                folds["all"]["same_website"],
            )
        )
        + " |"
        in importlib.import_module("generate_tried").inside_block()
    )
    hannover = pages.read("hannover")
    assert (hannover["auroc"], hannover["made"]) in [
        (run["auroc"], run["made"]) for run in tried["hannover"]
    ]
    left_out = [row["left_out"] for row in pages.read("subsources")["rows"]]
    assert [row["left_out"] for row in tried["before"]["left_out"]] == left_out


def test_rows_of_relatives_are_not_shown_as_if_of_the_weights(recipes: dict[str, Any]) -> None:
    pages, results = recipes["write_card"].pages, recipes["write_card"].results
    titles = [row[0] for row in results.honest_rows()]
    own = ("held-out patients", "pairs of one website", "no image looked at", "random weights")
    own += ("held-out ones too", "settled to be judged first")
    pairs = results.read("inside")["pairs"]
    assert pairs
    assert sum(title.endswith(results.OF_TWO) for title in titles) == len(pairs)
    marks = (results.ALONE, results.UNSEEN, results.UNSEEN_NIH, "varied strongly)")
    assert all(title.endswith((*own, *marks)) for title in titles)
    assert sum(title.endswith(marks) for title in titles) == 13
    about = results.about_relatives()
    for row in results.read("tried_inside")["rows"][:3]:
        assert results.estimate(row["all"]) in about
    for page in (pages.model_block(), pages.model_page()):
        assert about in " ".join(page.split())
    assert recipes["write_card"].tables()[0]["note"].endswith(about)


@pytest.mark.parametrize(
    ("option", "what"),
    [
        (["--seed", "2"], []),
        (["--seed", "2"], ["--what", "folds-lungs"]),
        (["--start", "warm-up"], ["--what", "hannover"]),
        (["--seed", "2", "--start", "warm-up"], ["--what", "folds"]),
        (["--mixup", "0.4"], ["--what", "folds"]),
        (["--sizes", "224"], ["--what", "folds"]),
    ],
)
def test_another_seed_or_start_is_of_other_folds_alone(
    recipes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: list[str],
    what: list[str],
) -> None:
    given = ["--data", str(tmp_path), "--output", str(tmp_path / "out"), *option, *what]
    monkeypatch.setattr("sys.argv", ["judge_default.py", *given])
    with pytest.raises(SystemExit, match="2"):
        recipes["judge_default"].main()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_relative_is_trained_and_read_again(
    recipes: dict[str, Any], relatives: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, judge = recipes["relatives"], recipes["judge_default"]
    for name in ("INSIDE", "INSIDE_LUNGS", "SHORT", "BASE"):
        config = replace(
            getattr(own, name),
            preprocess=Preprocess(size_px=32),
            augmentation=Augmentation.none(),
            epochs=1,
            samples_per_epoch=16,
            progress=False,
        )
        monkeypatch.setattr(own, name, config)
    held_out = relatives.held_out_nih()
    first = relatives.predict_without(held_out, "nih", own.SHORT)
    assert first.shape == (len(held_out), 3)
    weights = relatives.folder / "nih" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert np.array_equal(relatives.predict_without(held_out, "nih", own.SHORT), first)
    assert weights.stat().st_mtime_ns == before
    cohen = recipes["collection"].cohens(relatives.dataset)
    inside = relatives.predict_without(cohen[:8], "inside", own.INSIDE, cohen)
    assert inside.shape == (8, 3)
    ran = load_config(relatives.folder / "inside").provenance
    assert ran["training"]["balance"] == "class"
    samples, allowed = relatives.dataset.samples, relatives.without(cohen[:8])
    trained = Counter(samples[i].label for i in np.intersect1d(allowed, cohen))
    assert trained != Counter(samples[i].label for i in allowed)
    assert sum((Counter(ran[side]["images"]) for side in ("train", "val")), Counter()) == trained
    assert {"kermany", "nih"}.isdisjoint(ran["train"]["source"].split("+"))
    base = load_config(relatives.folder / "base").provenance
    assert base["training"]["balance"] == own.BASE.balance
    assert set(base["train"]["images"]) == {"normal", "bacterial", "viral"}
    cropped = relatives.train_base(lungs=True)
    assert cropped == relatives.folder / "base-lungs"
    assert load_config(cropped).provenance["train"]["images"] == base["train"]["images"]
    assert {p.suffix for p in (relatives.folder / "crops").iterdir()} == {".png"}
    assert load_config(cropped).provenance["identity"]["data"] != base["identity"]["data"]
    monkeypatch.setattr(judge, "INSIDE_LUNGS", own.INSIDE_LUNGS)
    judge.judge_lung_folds(relatives, tmp_path, folds=2)
    found = json.loads((tmp_path / "folds_lungs.json").read_text())
    assert sum(found["all"]["n"]) == len(cohen)
    assert found["training"] == own.INSIDE_LUNGS.to_dict()
    monkeypatch.setattr(judge, "INSIDE", own.INSIDE)
    again = own.Relatives(tmp_path / "data", relatives.folder.parent, seed=2)
    judge.judge_folds(again, tmp_path, folds=2)
    assert not (tmp_path / "folds.json").exists()
    second = json.loads((tmp_path / "folds_again.json").read_text())
    assert second["training"] == replace(own.INSIDE, seed=2).to_dict()
    before = (tmp_path / "folds_again.json").read_bytes()
    starts = [r.folder / "base" for r in (again, relatives)]
    run = relatives.folder.parent
    warm = [own.Relatives(tmp_path / "data", run, seed=k, start=s) for k, s in enumerate(starts)]
    began, train_network = [], own.train_network

    def noted(train: Any, val: Any, start: Path | None, folder: Path, config: Any) -> None:
        began.append((start, folder.exists()))
        train_network(train, val, start, folder, config)

    monkeypatch.setattr(own, "train_network", noted)
    judge.judge_warm_folds(warm, tmp_path, folds=2)
    assert began == [(s, False) for s in starts for _ in range(2)], "of others, nothing is taken"
    warm_result = tmp_path / "folds_warm_up.json"
    begun = json.loads(warm_result.read_text())
    averaged = EvaluationReport.load(tmp_path / "folds_warm_up_evaluation.json").predictions
    alone = []
    for r in warm:
        judge.judge_warm_folds([r], tmp_path, folds=2)
        alone.append(EvaluationReport.load(tmp_path / "folds_warm_up_evaluation.json").predictions)
        assert [run["seed"] for run in json.loads(warm_result.read_text())["runs"]] == [r.seed]
    average = (alone[0]["p_covid19"] + alone[1]["p_covid19"]) / 2
    assert np.allclose(averaged["p_covid19"], average)
    assert not np.allclose(alone[0]["p_covid19"], alone[1]["p_covid19"])
    assert not (tmp_path / "folds.json").exists()
    assert (tmp_path / "folds_again.json").read_bytes() == before
    assert begun["training"] == own.INSIDE.to_dict()
    assert [run["seed"] for run in begun["runs"]] == [0, 1]
    assert begun["runs"][0]["all"] != begun["runs"][1]["all"]
    judge.judge_warm_folds(warm[:1], tmp_path, folds=2, mixup=0.4)
    mixed = json.loads((tmp_path / "folds_mixup.json").read_text())
    assert mixed["training"] == replace(own.INSIDE, mixup=0.4).to_dict()
    assert mixed["all"] != begun["runs"][0]["all"]
    judge.judge_warm_folds(warm[:1], tmp_path, folds=2, sizes_px=[48])
    larger = json.loads((tmp_path / "folds_48px.json").read_text())
    assert larger["training"] == replace(own.INSIDE, preprocess=Preprocess(size_px=48)).to_dict()
    assert larger["all"] != begun["runs"][0]["all"]
    judge.judge_warm_folds(warm[:1], tmp_path, folds=2, sizes_px=[32, 48])
    both = json.loads((tmp_path / "folds_32px_48px.json").read_text())
    assert both["runs"] == [begun["runs"][0], larger["runs"][0]], "none is trained again"
    assert [run["size_px"] for run in both["runs"]] == [32, 48]
    kept = (tmp_path / "folds_warm_up.json").read_bytes()
    judge.judge_warm_folds([*warm, warm[0]], tmp_path, folds=2)
    more = json.loads((tmp_path / "folds_warm_up_of_3.json").read_text())
    assert more["runs"] == [*begun["runs"], begun["runs"][0]]
    assert (tmp_path / "folds_warm_up.json").read_bytes() == kept
    weights = [(s / "model.safetensors").read_bytes() for s in starts]
    assert weights[0] != weights[1]
    rest, _ = judge.folds_inside(relatives, cohen, 2)[1][0]
    seen = load_config(relatives.folder / "lungs-0").provenance
    sides = (Counter(seen[side]["images"]) for side in ("train", "val"))
    assert sum(sides, Counter()) == Counter(samples[i].label for i in cohen[rest])


def test_a_website_alone_gives_the_share_of_the_others_images_from_there(
    recipes: dict[str, Any],
) -> None:
    judge = recipes["judge_default"]
    hosts = ["a", "a", "a", "b", "b", "b", "c"]
    samples = [
        Sample(
            path=Path(f"{i}.png"),
            label="covid19",
            finding="COVID-19",
            patient_id=str(i),
            view="PA",
            source="cohen",
            metadata={"url": f"https://{host}.org/{i}"},
        )
        for i, host in enumerate(hosts)
    ]
    truth = np.array([True, True, False, False, False, True, True])
    rest, held_out = np.array([0, 1, 3, 4, 5]), np.array([2, 6])
    found = judge.share_by_website(samples, truth, [(rest, held_out)])
    average = 3 / 5
    assert found[2] == pytest.approx((2 + 2 * average) / (2 + 2))
    assert found[6] == pytest.approx(average), "of c nothing is known"


def test_the_audit_judges_the_design_of_training_on_test_patients(
    recipes: dict[str, Any], data: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    report = recipes["audit_default"].audit(data, tmp_path, checkpoint_folder, limit=30)
    assert report.item("confounding").reason.startswith("In the training data")
    assert "trained on" not in report.item("generalisation").reason
    assert (report.positive, report.negative) == ("covid19", "normal")


def test_images_that_calibrate_and_those_that_judge_them_have_no_patient_in_common(
    recipes: dict[str, Any], data: Path
) -> None:
    dataset = recipes["collection"].open_sources(data)
    parts = recipes["quantise_default"].draw(dataset, (3, 2))
    patients = [[(s.source, s.patient_id) for s in part.samples] for part in parts]
    assert len({*patients[0], *patients[1]}) == len(patients[0]) + len(patients[1])
    for found, count in zip(patients, (3, 2), strict=True):
        of_each = [
            sum(s == source for s, _ in found) for source in {s.source for s in dataset.samples}
        ]
        assert max(of_each) == count


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


# ---------------------------------------------------------------- a warm-up without labels


def test_only_other_patients_of_the_same_source_repel(recipes: dict[str, Any]) -> None:
    warm_up = recipes["warm_up"]
    rng = np.random.default_rng(0)
    views = functional.normalize(torch.from_numpy(rng.standard_normal((12, 5))))
    sources, groups = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([7, 7, 8, 9, 10, 11])
    losses = []
    for i in range(12):
        likeness = [float(views[i] @ other) / warm_up.TEMPERATURE for other in views]
        repelling = [
            likeness[j]
            for j in range(12)
            if sources[i % 6] == sources[j % 6] and groups[i % 6] != groups[j % 6]
        ]
        losses.append(np.log(np.sum(np.exp(repelling))) - likeness[(i + 6) % 12])
    found = warm_up.contrast(views, sources, groups)
    assert float(found) == pytest.approx(np.mean(losses))


def test_a_warm_up_sees_every_radiograph_in_turn_and_no_held_out_label(
    recipes: dict[str, Any], relatives: Any
) -> None:
    warm_up, samples = recipes["warm_up"], relatives.dataset.samples
    shown = warm_up.pools(relatives)
    for name, kept in shown.items():
        is_cohens = [recipes["collection"].is_cohens(samples[i]) for i in kept]
        assert all(is_cohens) if name == "cohen" else not any(is_cohens)
        sides = {side for side, found in relatives.split.indices.items() if {*kept} & {*found}}
        assert sides == ({"train"} if name in ("kermany", "nih") else {"train", "val", "test"})
    shared = next(i for i, s in enumerate(samples) if s.path.name == "00001204_000.jpg")
    assert shared not in shown["nih"], "one of Cohen's patients"
    drawn = warm_up.batches(shown, np.random.default_rng(0))
    many = np.concatenate([next(drawn) for _ in range(40)])
    for name, kept in shown.items():
        counts = np.bincount(many, minlength=len(samples))[kept]
        assert counts.sum() == 40 * warm_up.SHARES[name]
        assert counts.max() - counts.min() <= 1, "all in turn"
    classes = warm_up.known_aetiologies(relatives.dataset, shown["kermany"])
    assert {samples[i].source for i in np.flatnonzero(classes >= 0)} == {"kermany"}
    for i in shown["kermany"]:
        label = samples[i].finding.partition(" ")[0] if samples[i].label != "normal" else "normal"
        assert recipes["collection"].AETIOLOGIES[classes[i]] == label


@pytest.mark.slow
def test_a_warm_up_becomes_a_start(
    recipes: dict[str, Any],
    data: Path,
    published: Published,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warm_up = recipes["warm_up"]
    monkeypatch.setattr(warm_up, "PREPROCESS", Preprocess(size_px=64))
    monkeypatch.setattr(warm_up, "SIDE_PX", 48)
    monkeypatch.setattr(warm_up, "SHARES", dict.fromkeys(warm_up.SHARES, 3))
    options = {"data": data, "run": published.run, "start": published.weights, "steps": 3}
    options["seed"] = 2
    for name in ("one", "two"):
        run_main(warm_up, monkeypatch, {**options, "output": tmp_path / name})
    one, two = (load_checkpoint(tmp_path / name)[1] for name in ("one", "two"))
    assert all(np.array_equal(one[name], two[name]) for name in one), "seeded"
    before = load_checkpoint(published.weights)[1]
    moved = [not np.array_equal(one[name], before[name].astype(one[name].dtype)) for name in one]
    assert all(moved)
    assert load_config(tmp_path / "one").classes == load_config(published.weights).classes
    seed_of = recipes["judge_default"].seed_of
    assert (seed_of(tmp_path / "one"), seed_of(published.weights)) == (2, 0)


# ---------------------------------------------------------------- networks that learned nothing


def test_a_readout_answers_for_whom_it_did_not_learn_from(recipes: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(60) % 3 > 0
    features = rng.standard_normal((2, 60, 5))
    features[:, :, 0] += 3 * truth
    features[:, :, 0] *= 1e-4  # scales are no matter
    order = rng.permutation(60)
    pairs = [(order[20:], order[:20]), (order[:20], order[20:])]
    read_out = recipes["probe_inside"].read_out
    found = read_out(features, truth, pairs)
    assert roc_auc_score(truth, found) > 0.9
    changed = truth.copy()
    changed[order[:20]] = ~truth[order[:20]]
    assert np.array_equal(read_out(features, changed, pairs)[order[:20]], found[order[:20]])
    blind = features.copy()
    blind[0] = rng.standard_normal((60, 5)) * blind[0].std(0)
    assert roc_auc_score(truth, read_out(blind, truth, pairs)) > 0.8, "all views are learned from"
    features[1, order[0], 0] += 1e-3
    assert read_out(features, truth, pairs)[order[0]] > found[order[0]], "all views answer"


def test_random_weights_are_settled_on_what_they_are_shown(
    recipes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = recipes["probe_inside"]
    monkeypatch.setattr(probe, "VIEWS", 3)
    monkeypatch.setattr(probe, "BATCH", 16)
    dataset = SyntheticChestXray(2 * probe.BATCH, image_size_px=64)
    small = Preprocess(size_px=64)
    pixels = torch.from_numpy(np.stack([small(dataset.image(i)) for i in range(len(dataset))]))
    network = probe.random_network(pixels)
    assert not network.training
    first = network.features.conv0(normalise(pixels, small)).double()
    norm = network.features.norm0
    assert torch.allclose(norm.running_mean.double(), first.mean((0, 2, 3)), atol=1e-4)
    found = probe.features_of(network, pixels)
    features = network.features
    transitions = [features.transition1, features.transition2, features.transition3]
    last = features.norm5.num_features
    widths = {f"transition{n}": t.conv.out_channels for n, t in enumerate(transitions, 1)}
    widths["norm5"] = last
    assert {k: v.shape for k, v in found.items()} == {
        name: (probe.VIEWS, len(pixels), 3 * width) for name, width in widths.items()
    }
    with torch.inference_mode():
        maps = torch.relu(network.features(normalise(pixels, small)))
    shown = found["norm5"][0]
    assert np.allclose(shown[:, :last], maps.mean((2, 3)), atol=1e-3)
    assert np.allclose(shown[:, last : 2 * last], maps.amax((2, 3)), atol=1e-3)
    assert np.allclose(shown[:, 2 * last :], maps.std((2, 3)), atol=1e-3)
    assert not np.allclose(found["norm5"][2], shown, atol=1e-2), "the third view is another"
    mirrored = probe.features_of(network, pixels.flip(-1))["norm5"]
    assert np.allclose(mirrored[0], found["norm5"][1], atol=1e-3)


@pytest.mark.slow
def test_the_frame_is_what_a_hidden_centre_leaves(
    recipes: dict[str, Any], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = recipes["probe_inside"]
    monkeypatch.setattr(probe, "PREPROCESS", Preprocess(size_px=64))
    few = recipes["collection"].open_cohen(data).subset(range(4))
    whole, framed = probe.images_of(few), probe.images_of(few, 0.5)
    assert whole.shape == framed.shape == (4, 1, 64, 64)
    assert torch.equal(framed[:, :, :12], whole[:, :, :12]), "above the centre"
    assert torch.equal(framed[..., 52:], whole[..., 52:]), "beside it"
    centre = framed[:, 0, 20:44, 20:44]
    assert torch.equal(centre, torch.full_like(centre, probe.GREY)), "the same in all"
    assert not torch.equal(whole[:, 0, 20:44, 20:44], centre)


@pytest.mark.slow
def test_networks_that_learned_little_are_judged_in_the_folds_of_the_relatives(
    recipes: dict[str, Any],
    data: Path,
    published: Published,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probe = recipes["probe_inside"]
    relatives = probe.Relatives(data, published.run, None)
    inside, folds = probe.folds_inside(relatives, probe.cohens(relatives.dataset))
    truth = np.array([s.label == "covid19" for s in inside.samples])
    sure = np.random.default_rng(0).dirichlet((1, 1, 1), len(inside))
    sure[:, 2] = np.where(truth, 1, 0)  # some logits are infinite
    recipes["judge_default"].write_folds(inside, folds, sure / sure.sum(1, keepdims=True), tmp_path)
    assert probe.answers_of_folds(tmp_path / "nothing", inside) is None
    with pytest.raises(SystemExit, match="is of other images"):
        probe.answers_of_folds(tmp_path, inside.subset(range(1, len(inside))))
    monkeypatch.setattr(probe, "PREPROCESS", Preprocess(size_px=64))
    monkeypatch.setattr(probe, "VIEWS", 2)
    monkeypatch.setattr(probe, "BATCH", 8)
    options = {"data": data, "run": published.run, "output": tmp_path}
    asked, read_out = [], probe.read_out

    def noted(features: np.ndarray, truth: np.ndarray, pairs: list[Any]) -> np.ndarray:
        asked.append((truth, pairs))
        return read_out(features, truth, pairs)

    monkeypatch.setattr(probe, "read_out", noted)
    bases = [published.weights, published.weights]
    run_main(probe, monkeypatch, {**options, "base": bases, "made": "a machine"})
    found = json.loads((tmp_path / "probes.json").read_text())
    groups = np.array(patient_groups(inside, find_copies=False))
    for asked_truth, pairs in asked:
        assert np.array_equal(asked_truth, truth)
        for (rest, held_out), expected in zip(pairs, folds, strict=True):
            assert np.array_equal(held_out, expected[1])
            assert set(groups[rest]).isdisjoint(groups[held_out])
    run_main(probe, monkeypatch, {**options, "base": bases[:1], "lungs": []})
    cropped = json.loads((tmp_path / "probes_lungs.json").read_text())
    assert [r["layer"] for r in cropped["rows"]] == [*probe.LAYERS, probe.TOGETHER] * 2
    assert cropped["rows"][0]["all"] != found["rows"][0]["all"]
    run_main(probe, monkeypatch, {**options, "base": bases[:1], "frame": []})
    framed = json.loads((tmp_path / "probes_frame.json").read_text())["rows"]
    layers = (*probe.LAYERS, probe.TOGETHER)
    assert [(r["hidden"], r["weights"], r["layer"]) for r in framed] == [
        (part, w, la) for part in (0, 0.7, 0.9) for w in ("random", "base") for la in layers
    ]
    single = [r for r in found["rows"] if r["networks"] == 1]
    assert [r["all"] for r in framed[:10]] == [r["all"] for r in single], "nothing hidden"
    assert framed[0]["all"] != framed[10]["all"] != framed[20]["all"] != framed[0]["all"]
    assert not any("with_folds" in r for r in framed)
    options = {**options, "warm-up": []}
    with pytest.raises(SystemExit):
        run_main(probe, monkeypatch, options)
    others = np.random.default_rng(1).dirichlet((1, 1, 1), len(inside))
    recipes["judge_default"].write_folds(inside, folds, others, tmp_path, name="folds_warm_up")
    run_main(probe, monkeypatch, {**options, "base": bases[:1]})
    warm = json.loads((tmp_path / "probes_warm_up.json").read_text())["rows"]
    assert {r["weights"] for r in warm} == {"warm-up"}
    assert [r["all"] for r in warm] == [r["all"] for r in single[5:]], "the same networks"
    assert [r["with_folds"] for r in warm] != [r["with_folds"] for r in single[5:]]
    recipes["judge_default"].write_folds(inside, folds, others[::-1], tmp_path, name="folds_mixup")
    (tmp_path / "probes_warm_up.json").unlink()
    both = ["folds_mixup", "folds_warm_up"]
    run_main(probe, monkeypatch, {**options, "base": bases[:1], "folds": both})
    assert json.loads((tmp_path / "probes_warm_up.json").read_text())["rows"] == warm
    mixed = json.loads((tmp_path / "probes_mixup.json").read_text())["rows"]
    assert [r["all"] for r in mixed] == [r["all"] for r in warm]
    assert [r["with_folds"] for r in mixed] != [r["with_folds"] for r in warm]
    with pytest.raises(SystemExit):
        run_main(probe, monkeypatch, {"data": data, "base": bases, "sizes": [64, 96]})
    run_main(probe, monkeypatch, {**options, "base": bases, "sizes": [64, 96]})
    sized = json.loads((tmp_path / "probes_warm_up_sizes.json").read_text())
    assert sized["size_px"] == [64, 96]
    of = {(*r["size_px"], r["networks"], r["layer"]): r["all"]["auroc"] for r in sized["rows"]}
    every = [(64, n, la) for n in (1, 2) for la in layers]
    every += [(96, *of_one[1:]) for of_one in every]
    assert [*of] == [*every, (64, 96, 1, probe.TOGETHER), (64, 96, 2, probe.TOGETHER)]
    assert [of[64, 1, la] for la in layers] == [r["all"]["auroc"] for r in warm]
    assert of[64, 96, 2, probe.TOGETHER] == of[64, 96, 1, probe.TOGETHER], "one network twice"
    sizes = [of[(*px, 1, probe.TOGETHER)]["value"] for px in ((64,), (96,), (64, 96))]
    assert len(set(sizes)) == 3
    by = {(r["weights"], r["networks"], r["layer"]): r["all"] for r in found["rows"]}
    for layer in layers:
        assert by["base", 2, layer] == by["base", 1, layer], "one network twice"
        assert by["random", 2, layer] != by["random", 1, layer] != by["base", 1, layer]
    assert (found["made"], found["folds"]) == ("a machine", 5)
    assert (found["size_px"], found["views"]) == (64, 2)
    assert [*by] == [(w, n, la) for w in ("random", "base") for n in (1, 2) for la in layers]
    for row in found["rows"]:
        assert sum(row["all"]["n"]) == 45
        assert row["all"]["auroc"]["value"] < row["with_folds"]["all"]["value"] <= 1
        assert 0 <= row["all"]["auroc"]["value"] <= 1
