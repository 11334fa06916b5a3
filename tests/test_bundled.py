"""The bundled weights, their card, and what README and documentation say of them."""

from __future__ import annotations

import importlib
import json
from operator import itemgetter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from chestxray_covid import Classifier, SyntheticChestXray, bundled_models
from chestxray_covid.card import model_card
from chestxray_covid.checkpoint import load_checkpoint
from chestxray_covid.gate import GATE_NAME
from chestxray_covid.hub import BUNDLED, DEFAULT_MODEL
from chestxray_covid.int8 import INT8_NAME
from chestxray_covid.reporting import foreign_text

ROOT = Path(__file__).parents[1]
FOLDER = BUNDLED / DEFAULT_MODEL
LABELS = ("normal", "pneumonia", "covid19")


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier.from_pretrained()


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("generate_model")


def test_one_line_gives_a_calibrated_model_of_three_classes(classifier: Classifier) -> None:
    assert classifier.classes == LABELS
    assert "90% sensitivity" in classifier.config.threshold_origin
    found = classifier.predict_proba(SyntheticChestXray(4, classes=LABELS, image_size_px=128))
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-9)
    assert next(iter(bundled_models())) == DEFAULT_MODEL


def test_two_classes_are_the_same_network_renormalised(classifier: Classifier) -> None:
    phantoms = SyntheticChestXray(4, classes=LABELS, image_size_px=128)
    three = classifier.predict_proba(phantoms)
    two = Classifier.from_pretrained(classes=("normal", "covid19")).predict_proba(phantoms)
    expected = three[:, [0, 2]] / three[:, [0, 2]].sum(1, keepdims=True)
    np.testing.assert_allclose(two, expected, atol=1e-5)


def test_the_weights_are_small_halved_and_gated() -> None:
    config, tensors = load_checkpoint(FOLDER)
    assert (FOLDER / "model.safetensors").stat().st_size < 15_000_000
    assert {t.dtype.name for t in tensors.values()} == {"float16", "int64"}
    assert set(config.attachments) == {GATE_NAME, INT8_NAME, "int8.json"}
    assert config.provenance["license"] == "cc-by-nc-sa-4.0"
    assert not any("-ND" in name for name in config.provenance["train_licences"])
    assert all("-ND" in name for name in config.provenance["left_out_for_licence"])


def test_what_is_no_radiograph_is_not_judged(classifier: Classifier) -> None:
    blank = classifier.predict(Image.new("L", (300, 300), 90))
    assert [flag.name for flag in blank.flags] == ["blank"]
    noise = np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8)
    assert blank.abstained
    assert classifier.predict(noise).abstained


@pytest.mark.slow
def test_a_gate_that_was_passed_is_saved_with_the_weights(
    classifier: Classifier, tmp_path: Path
) -> None:
    own = Classifier(*load_checkpoint(FOLDER), gate=classifier.gate)
    own.save_pretrained(tmp_path / "saved")
    again = Classifier.from_pretrained(tmp_path / "saved")
    noise = np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8)
    assert again.predict(noise).abstained
    assert again.predict(noise).flags == classifier.predict(noise).flags


def test_the_card_is_that_of_its_results() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert card == model_card(FOLDER, DEFAULT_MODEL, figure="calibration.png")
    assert "license: cc-by-nc-sa-4.0" in card
    assert "**This is not a medical device.**" in card
    for table in json.loads((FOLDER / "measurements.json").read_text(encoding="utf-8"))["tables"]:
        assert f"## {table['title']}" in card


def test_the_tables_of_the_card_are_those_that_its_recipe_makes_of_the_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    recipe = importlib.import_module("write_card")
    measured = json.loads((FOLDER / "measurements.json").read_text(encoding="utf-8"))
    assert measured["tables"] == json.loads(json.dumps(recipe.tables()))
    told = bundled_models()[DEFAULT_MODEL].provenance
    assert told["known_failures"] == recipe.failures()
    assert told["stages"] == recipe.stages()


@pytest.mark.parametrize(
    ("caveat", "names"),
    [
        ("its grey says something of what is hidden", ("README.md", "docs/model.md", "card")),
        ("which weights to publish was chosen", ("README.md", "docs/model.md", "card")),
        ("every image counts as if it were alone", ("docs/model.md", "card")),
    ],
)
def test_what_weakens_a_number_stands_beside_it(caveat: str, names: tuple[str, ...]) -> None:
    for name in names:
        path = FOLDER / "README.md" if name == "card" else ROOT / name
        assert caveat in " ".join(path.read_text(encoding="utf-8").split()), name


def test_the_numbers_beside_the_weights_are_those_in_the_documentation() -> None:
    ours = (FOLDER / "evaluation.json").read_bytes()
    assert ours == (ROOT / "docs" / "results" / "default" / "evaluation.json").read_bytes()


def test_notes_of_the_card_are_whole() -> None:
    tables = json.loads((FOLDER / "measurements.json").read_text(encoding="utf-8"))["tables"]
    notes = [table["note"] for table in tables]
    assert max(map(len, notes)) > 1000
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for note in notes:
        assert foreign_text(note, len(note) + 1)[-100:] in card, "cut off"


@pytest.mark.parametrize(
    "name", ["inside", "frame", "other_fills", "calibration", "gate", "reduction"]
)
def test_what_was_measured_was_measured_on_these_weights(name: str) -> None:
    path = ROOT / "docs" / "results" / "default" / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["weights_sha256"] == load_checkpoint(FOLDER)[0].weights_sha256


def test_the_gate_that_was_measured_is_the_bundled_one_and_lets_radiographs_pass() -> None:
    path = ROOT / "docs" / "results" / "default" / "gate.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["gate_sha256"] == load_checkpoint(FOLDER)[0].attachments["gate.safetensors"]
    assert found["held_out"]["frontal"]["images"] >= 500
    assert found["held_out"]["frontal"]["flagged"]["rate"] <= 0.05


@pytest.mark.parametrize(
    ("what", "flag", "least"),
    [
        ("lateral", "lateral_view", 0.9),
        ("ct", "not_a_chest_radiograph", 0.9),
        ("photograph", "not_a_chest_radiograph", 0.8),
        ("noise", "not_a_chest_radiograph", 0.8),
        ("text", "not_a_chest_radiograph", 0.9),
        ("inverted", "inverted", 0.95),
        ("turned by 90°", "out_of_distribution", 0.95),
        ("turned by 180°", "out_of_distribution", 0.95),
        ("turned by 270°", "out_of_distribution", 0.95),
        ("upside down", "out_of_distribution", 0.95),
        ("phantom", "not_a_chest_radiograph", 0.8),
    ],
)
def test_what_is_no_upright_frontal_radiograph_was_refused_by_its_name(
    what: str, flag: str, least: float
) -> None:
    path = ROOT / "docs" / "results" / "default" / "gate.json"
    found = json.loads(path.read_text(encoding="utf-8"))["held_out"][what]
    assert found["images"] >= 11
    assert found["abstained"]["rate"] >= 0.9
    assert found[flag]["rate"] >= least


def test_the_bundled_gate_looks_again_at_lungs_and_refuses_more_parts_for_it() -> None:
    gate = Classifier.from_pretrained().gate
    assert gate is not None
    assert gate.lungs is not None
    assert gate.lungs.fits
    path = ROOT / "docs" / "results" / "default" / "gate.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    once = found["without_lungs"]["held_out"]
    for what in ("upper half", "lower half", "one above the other", "phantom"):
        refused = found["held_out"][what]["abstained"]["rate"]
        assert refused > once[what]["abstained"]["rate"], what
    assert found["held_out"]["frontal"]["looked_again"]["rate"] < 0.05


def test_the_frame_says_little_with_the_centre_hidden() -> None:
    path = ROOT / "docs" / "results" / "default" / "frame.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert {row["hidden"] for row in rows} == {0.0, 0.7, 0.9}
    for row in rows:
        if row["hidden"]:
            assert min(row["n"]) >= 50
            assert abs(row["auroc"]["value"] - 0.5) <= 0.15, row


def test_pages_hold_what_was_measured(pages: ModuleType) -> None:
    assert (ROOT / "docs" / "model.md").read_text(encoding="utf-8") == pages.model_page()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = f"<!-- model:start -->\n{pages.model_block()}\n<!-- model:end -->"
    assert block in readme
    assert pages.lungs_block() in (ROOT / "docs" / "lungs.md").read_text(encoding="utf-8")
    gate = (ROOT / "docs" / "gate.md").read_text(encoding="utf-8")
    assert f"<!-- reduction:start -->\n{pages.reduction_block()}\n<!-- reduction:end -->" in gate
    tried = importlib.import_module("generate_tried")
    recipe = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    for block in (tried.tried_block(), tried.unseen_block(), tried.inside_block()):
        assert block in recipe


def test_the_recipe_that_was_judged_is_the_one_that_trained(
    pages: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    stages = importlib.import_module("train_default").STAGES
    for name in ("recipe_unseen", "recipe_unseen_nih"):
        judged = pages.read(name)["stages"]
        assert [*judged] == [stage.name for stage in stages]
        for stage in stages:
            assert judged[stage.name] == stage.config.to_dict()


def test_other_stages_are_judged_as_the_recipe_is(pages: ModuleType) -> None:
    hospitals = importlib.import_module("generate_tried").HOSPITALS
    differ = {"strong": {"augmentation"}, "within": {"within_sources"}, "lungs": set()}
    of = itemgetter("stage")
    for result, (*_, tried) in hospitals.items():
        recipe = pages.read(result)
        stages = [stage["stage"] for stage in pages.read("history")["stages"]]
        assert list(recipe["stages"]) == stages == list(dict.fromkeys(map(of, recipe["rows"])))
        first, *others = recipe["stages"].values()
        for name in tried:
            found, kind = pages.read(name), name.rpartition("_")[2]
            assert all(found[key] == recipe[key] for key in ("n", "trained_on", "made")), name
            same, *changed = found["stages"].values()
            assert same == first
            assert changed
            for own, new in zip(others, changed, strict=False):
                assert {key for key in own if own[key] != new[key]} == differ[kind]
            assert all(further["swap_background"] for further in changed[len(others) :])
            assert set(map(of, found["rows"])) == set(found["stages"]) - set(stages)


@pytest.mark.parametrize(
    ("name", "source"), [("reliability", "calibration"), ("history",) * 2, ("gate",) * 2]
)
def test_figures_are_drawn_from_the_committed_results(
    pages: ModuleType, name: str, source: str
) -> None:
    with Image.open(pages.RESULTS / f"{name}.png") as figure:
        generate = importlib.import_module("generate")
        made_of = generate.digest(pages.RESULTS / f"{source}.json")
        assert figure.info[generate.SOURCE_KEY] == made_of


def test_the_figure_of_the_gate_shows_every_kind_once(pages: ModuleType) -> None:
    found = pages.read("gate")
    groups = importlib.import_module("generate_gate").gate_groups(found)
    shown = [what for _, part in groups for what in part]
    sources = [f"frontal, {source}, unknown to the gate" for source in found["source_left_out"]]
    assert sorted(shown) == sorted({*found["held_out"], *sources} - {"frontal"})
    passing, known, new = (part for _, part in groups)
    assert set(new) == set(found["never_fitted"])
    assert "lateral" in known
    assert all(what.startswith("frontal") for what in passing)
