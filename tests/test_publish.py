"""Saving, publishing and the card; the Hub is a server on this machine."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import yaml

from chestxray_covid import (
    AuditItem,
    AuditReport,
    Classifier,
    EvaluationReport,
    Preprocess,
    SyntheticChestXray,
    Trainer,
    TrainingConfig,
    build_densenet121,
    evaluate,
    publish,
    split_by_patient,
)
from chestxray_covid.card import compose, decisions, model_card
from chestxray_covid.card_metadata import POOLED, front_matter
from chestxray_covid.checkpoint import ModelConfig, load_checkpoint, load_config, save_checkpoint
from chestxray_covid.errors import CheckpointError, ConfigError, ReportError
from chestxray_covid.evaluation import evaluate_probabilities
from chestxray_covid.models import to_tensors
from chestxray_covid.publish import push
from chestxray_covid.reporting import markdown_text
from chestxray_covid.results import Results
from conftest import random_checkpoint
from hub_server import HubServer, hub_environment, run_python, with_other_hub

pytestmark = pytest.mark.usefixtures("shallow", "drawn_once")

ROOT = Path(__file__).parents[1]
LABELS = ("normal", "pneumonia", "covid19")
HOSTILE = "a|b\n# <script>alert(1)</script> [x](http://evil) `c`"

AUDIT = AuditReport(
    classes=LABELS,
    positive="covid19",
    negative="normal",
    n_images=7,
    n_patients=5,
    sources=(HOSTILE,),
    confidence=0.95,
    n_resamples=20,
    seed=0,
    items=(
        AuditItem(
            name="occlusion",
            question="Does it need the lungs?",
            verdict="fail",
            reason=HOSTILE,
            threshold="fail from 0.8",
            threshold_source="a book",
        ),
    ),
)


@pytest.fixture(scope="module")
def checkpoint_folder(shallow: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def run(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a judged run of three classes at 64 px with an attachment; do not change it."""
    folder = tmp_path_factory.mktemp("run")
    config, tensors = load_checkpoint(checkpoint_folder)
    provenance = {"license": "cc-by-nc-sa-4.0", "sources": {HOSTILE: {"images": 7}, "b": "x"}}
    provenance |= {"known_failures": ["children", HOSTILE], "headline": {"AUROC": "0.5"}}
    rng = np.random.default_rng(0)
    tensors = tensors | {"classifier.bias": rng.normal(size=3).astype(np.float32)}
    save_checkpoint(folder, replace(config, provenance=provenance), tensors, {"gate.json": b"{}"})
    dataset = SyntheticChestXray(24, classes=LABELS, image_size_px=64)
    evaluate(Classifier.from_pretrained(folder), dataset, n_resamples=20).save(
        folder / "evaluation.json"
    )
    weights = load_config(folder).weights_sha256
    replace(AUDIT, weights_sha256=weights).save(folder / "audit.json")
    (folder / "notes.txt").write_text("private")
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copied")


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def change(path: Path, **fields: Any) -> None:
    data = json.loads(path.read_text())
    if path.name == "evaluation.json" and "weights_sha256" in fields:
        fields = {"model": {**data["model"], **fields}}
    path.write_text(json.dumps({**data, **fields}))


# ---------------------------------------------------------------- the package itself


def test_the_source_distribution_holds_what_its_tests_read() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = [*project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"], "pyproject.toml"]
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    read = set(re.findall(r'ROOT / "([\w.-]+)"', code))
    assert {".ci", "README.md", "docs"} <= read
    assert [name for name in read if not any(fnmatch(name, part) for part in included)] == []


def test_the_citation_tells_the_licence_of_the_code_from_that_of_the_weights() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["license"] == "MIT"
    assert "CC BY-NC-SA 4.0" in cited["abstract"]
    weights = [r["license"] for r in cited["references"] if r["type"] == "data"]
    assert weights == ["CC-BY-NC-SA-4.0"]


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("name", ["evaluation.json", "audit.json"])
def test_what_was_not_judged_is_not_published(
    copied: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / name).unlink()
    monkeypatch.setenv("HOME", str(copied.parent))
    for folder in (copied, f"~/{copied.name}"):
        with pytest.raises(ReportError, match=rf"^{name} is missing beside .*allow_unjudged=True"):
            push(folder, "user/model")
    # A model in memory is written to a folder of the moment, where nobody could add anything.
    with pytest.raises(ReportError, match=rf"--output FOLDER/{name}") as refused:
        Classifier.from_pretrained(copied).push_to_hub("user/model")
    assert tempfile.gettempdir() not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("evaluation.json", r"evaluation\.json cannot be read as a report"),
        ("audit.json", r"audit\.json cannot be read as a report"),
    ],
)
def test_judgements_that_cannot_be_read_are_not_published(
    copied: Path, name: str, reason: str
) -> None:
    (copied / name).write_text("{")
    with pytest.raises(ReportError, match=reason):
        push(copied, "user/model")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("evaluation.json", "confidence", "1e400"),
        ("evaluation.json", "n_images", "1" + "0" * 400),
        ("evaluation.json", "positive", '"\\ud800"'),
        ("evaluation.json", "model", "[" * 5000),
        ("evaluation.json", "predictions", "PREDICTIONS"),
        ("audit.json", "n_images", "1e400"),
        ("audit.json", "n_patients", "-1" + "0" * 400),
        ("audit.json", "sources", '["\\udfff"]'),
        ("audit.json", "items", "[[[]]]"),
        (
            "measurements.json",
            "tables",
            '[{"title": "\\ud800", "note": "", "head": [], "rows": []}]',
        ),
        ("measurements.json", "classes", "1e400"),
        ("measurements.json", "weights_sha256", "1" + "0" * 400),
    ],
)
def test_damaged_results_have_an_error_of_their_own(
    copied: Path, name: str, field: str, value: str
) -> None:
    write_measurements(copied, [TABLE])
    data = json.loads((copied / name).read_text())
    if value == "PREDICTIONS":
        cells = data[field]["patient_group"]
        value = json.dumps({**data[field], "patient_group": [[[]], *cells[1:]]})
    text = json.dumps({**data, field: "HERE"}).replace('"HERE"', value)
    (copied / name).write_text(text)
    with pytest.raises(ReportError, match=rf"{name}"):
        model_card(copied, "user/model")


@pytest.mark.parametrize("name", ["history.json", "confounding.json"])
@pytest.mark.parametrize("text", ['{"epochs": [', "[]", "a note of mine"])
def test_a_history_that_is_none_is_not_published(copied: Path, name: str, text: str) -> None:
    (copied / name).write_text(text)
    with pytest.raises(ReportError, match=rf"{name}: .*Make it again, or take it away"):
        push(copied, "user/model")


def test_results_of_an_impossible_size_are_not_published(copied: Path) -> None:
    with (copied / "history.json").open("wb") as file:
        file.truncate(50_000_001)
    with pytest.raises(CheckpointError, match=r"history\.json has 50000001 bytes"):
        push(copied, "user/model")


def test_a_damaged_checkpoint_is_not_published(copied: Path) -> None:
    (copied / "gate.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"gate\.json is not the file"):
        push(copied, "user/model")


# ---------------------------------------------------------------- saved


def test_options_of_publishing_are_refused_where_nothing_is_published(
    run: Path, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="license: options of publishing; add push_to_hub=True"):
        Classifier.from_pretrained(run).save_pretrained(tmp_path / "saved", license="mit")
    assert not (tmp_path / "saved").exists()


def test_a_saved_classifier_is_the_same_and_its_card_stays(run: Path, tmp_path: Path) -> None:
    classifier = Classifier.from_pretrained(run)
    target = tmp_path / "a" / "saved"
    assert classifier.save_pretrained(target) is None
    names = {p.name for p in target.iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "gate.json", "evaluation.json", "audit.json"),
        *("README.md", "calibration.png"),
    }
    image = SyntheticChestXray(2, image_size_px=64).image(0)
    again = Classifier.from_pretrained(target)
    assert np.array_equal(again.predict_proba(image), classifier.predict_proba(image))
    (target / "README.md").write_text("mine")
    classifier.save_pretrained(target)
    assert (target / "README.md").read_text() == "mine"


def test_a_card_in_the_current_folder_has_its_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    Classifier.from_pretrained(run).save_pretrained(".")
    assert "\n# mine\n" in (tmp_path / "mine" / "README.md").read_text()


def test_a_classifier_of_a_relative_folder_is_saved_from_another_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    classifier = Classifier.from_pretrained(run.name)
    monkeypatch.chdir(tmp_path)
    classifier.save_pretrained("saved")
    assert (tmp_path / "saved" / "gate.json").read_bytes() == (run / "gate.json").read_bytes()
    assert (tmp_path / "saved" / "audit.json").exists()


def test_a_part_of_the_classes_is_saved_without_results_of_the_whole(
    run: Path, tmp_path: Path
) -> None:
    part = Classifier.from_pretrained(run, classes=("normal", "covid19"))
    part.save_pretrained(tmp_path)
    assert not (tmp_path / "evaluation.json").exists()
    assert "has not been evaluated" in (tmp_path / "README.md").read_text()
    with pytest.raises(ReportError, match=r"evaluation\.json is missing"):
        part.push_to_hub("user/part")


def test_what_eight_bits_moved_is_saved_with_the_classes_that_it_was_measured_on(
    run: Path, tmp_path: Path
) -> None:
    attachments = {"gate.json": b"{}", "int8.json": b"{}"}
    save_checkpoint(tmp_path / "whole", *load_checkpoint(run), attachments)
    for name, classes in (("same", None), ("part", ("normal", "covid19"))):
        whole = Classifier.from_pretrained(tmp_path / "whole", classes=classes)
        whole.save_pretrained(tmp_path / name)
    assert set(load_config(tmp_path / "same").attachments) == {"gate.json", "int8.json"}
    assert set(load_config(tmp_path / "part").attachments) == {"gate.json"}
    assert not (tmp_path / "part" / "int8.json").exists()


def test_a_card_that_cannot_be_made_leaves_nothing_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = Classifier.from_pretrained(run)
    monkeypatch.setattr(publish, "make_card", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        classifier.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_provenance_with_half_a_character_is_saved_whole(run: Path, tmp_path: Path) -> None:
    config, tensors = load_checkpoint(run)
    odd = Classifier(replace(config, provenance={"use": "\ud800", "license": "\ud800"}), tensors)
    odd.save_pretrained(tmp_path / "saved")
    assert "- use: \n" in (tmp_path / "saved" / "README.md").read_text()
    assert load_config(tmp_path / "saved").provenance["use"] == "\ud800"
    odd = Classifier(replace(config, provenance={"use": [[object()]]}), tensors)
    with pytest.raises(ConfigError, match="provenance must be data that JSON can hold"):
        odd.save_pretrained(tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


@pytest.fixture
def rewritten(copied: Path) -> Path:
    """Return a judged run whose weights another tool wrote, as its results say."""
    weights = safetensors.numpy.save(load_checkpoint(copied)[1], metadata={"format": "pt"})
    (copied / "model.safetensors").write_bytes(weights)
    for name in ("config.json", "evaluation.json", "audit.json"):
        change(copied / name, weights_sha256=hashlib.sha256(weights).hexdigest())
    return copied


def test_weights_that_another_tool_wrote_are_saved_as_they_are(
    rewritten: Path, tmp_path: Path
) -> None:
    classifier = Classifier.from_pretrained(rewritten)
    classifier.config = replace(classifier.config, threshold=0.25)
    classifier.save_pretrained(tmp_path / "saved")
    weights = (rewritten / "model.safetensors").read_bytes()
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == weights
    assert "has not been evaluated" not in model_card(tmp_path / "saved", "user/model")
    assert Classifier.from_pretrained(tmp_path / "saved").config == classifier.config
    part = Classifier.from_pretrained(rewritten, classes=("normal", "covid19"))
    part.save_pretrained(tmp_path / "part")
    again = Classifier.from_pretrained(tmp_path / "part")
    assert again.weights_sha256 == part.weights_sha256 != classifier.weights_sha256


def test_weights_that_were_exchanged_since_they_were_opened_are_not_saved(
    rewritten: Path, tmp_path: Path
) -> None:
    classifier = Classifier.from_pretrained(rewritten)
    shutil.copy(random_checkpoint(tmp_path / "other") / "model.safetensors", rewritten)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not the file that"):
        classifier.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# ---------------------------------------------------------------- the card


def test_the_card_is_in_the_format_of_the_hub_and_escapes_what_comes_from_data(run: Path) -> None:
    text = model_card(run, "user/model")
    _, front, body = text.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["license"] == "cc-by-nc-sa-4.0"
    assert data["library_name"] == "chestxray_covid"
    assert data["pipeline_tag"] == "image-classification"
    results = data["model-index"][0]["results"]
    report = json.loads((run / "evaluation.json").read_text())
    auroc = report["overall"]["per_class"]["covid19"]["auroc"]["value"]
    given = [m["value"] for r in results for m in r["metrics"] if m["type"] == "roc_auc"]
    assert math.isclose(given[0], auroc, abs_tol=1e-4)
    assert "**This is not a medical device.**" in body
    assert "<script>" not in text
    assert "[x](" not in body
    assert "\n# &lt;" not in body
    assert f"{auroc:.3f} (" in body
    assert "of 7 images of 5 patients: **fail**" in body
    assert "| Does it need the lungs? | fail | a\\|b # &lt;script" in body
    assert 'Classifier.from_pretrained("user/model")' in body
    assert 'timm.create_model("hf-hub:user/model"' in body


def test_the_hub_is_told_where_results_are_of_pooled_sources_of_training(run: Path) -> None:
    config, report = load_config(run), EvaluationReport.load(run / "evaluation.json")
    names = []
    for sources in ([*report.by_source], [*report.by_source][1:], None):
        known = replace(config, provenance={**config.provenance, "sources": sources})
        front = front_matter(known, report, "user/model", None).strip("-")
        results = yaml.safe_load(front)["model-index"][0]["results"]
        names.append([result["dataset"]["name"] for result in results])
    assert names[0][0] == POOLED
    assert names[1][0] == names[2][0] == "overall: all"
    assert names[0][1:] == names[1][1:] == names[2][1:] != []


@pytest.mark.parametrize("license", [None, "mit", "a\n# <b>"])
def test_the_card_says_both_licences_and_restricts_three_classes_to_two(
    license: str | None,
) -> None:
    config = ModelConfig(classes=("normal", "pneumonia", "covid19"))
    text = compose(config, Results(contents={}), "user/model", license=license)
    stated = {None: "not stated", "mit": "mit"}.get(license, "a # &lt;b&gt;")
    assert f"Of the weights: {stated}. Of chestxray-covid" in text
    assert "MIT." in text
    restricted = 'from_pretrained("user/model", classes=["normal", "covid19"])'
    assert restricted in text
    of_two = replace(config, classes=("normal", "covid19"))
    assert restricted not in compose(of_two, Results(contents={}), "user/model"), "it has no others"


def test_the_front_matter_keeps_sources_apart_whatever_they_are_called(copied: Path) -> None:
    report = EvaluationReport.load(copied / "evaluation.json")
    (part,) = report.by_source.values()
    names = ("上海", "北京", "all", "Site A", "site-a")
    aurocs = {}
    for n, name in enumerate(names):
        numbers = {**part.per_class["covid19"]}
        numbers["auroc"] = replace(numbers["auroc"], value=(n + 1) / 10)
        aurocs[f"source: {name}"] = (n + 1) / 10
        own = replace(part, name=name, per_class={**part.per_class, "covid19": numbers})
        report = replace(report, by_source={**report.by_source, name: own}, predictions=None)
    del report.by_source[part.name]  # type: ignore[attr-defined]
    report.save(copied / "evaluation.json")
    _, front, _ = model_card(copied, "user/model").split("---\n", 2)
    results = yaml.safe_load(front)["model-index"][0]["results"]
    found = {
        r["dataset"]["name"]: [m["value"] for m in r["metrics"] if m["type"] == "roc_auc"]
        for r in results
    }
    assert {name: [value] for name, value in aurocs.items()}.items() <= found.items()
    assert len({r["dataset"]["type"] for r in results}) == len(results) == 1 + len(names)


BLOCKS = ["# FDA", "#FDA", "---", "- - -", "===", "~~~", "1. FDA", "12) FDA", "- FDA", "+ FDA", "-"]


@pytest.mark.parametrize("text", BLOCKS)
def test_no_text_of_data_becomes_a_block_of_the_card(checkpoint_folder: Path, text: str) -> None:
    config = load_config(checkpoint_folder)
    for hostile in (text, [text], {text: text}, [[text]]):
        provenance = {"known_failures": hostile, "sources": hostile}
        changed = replace(config, provenance=provenance, classes=(text, "covid19"))
        lines = compose(changed, Results(contents={}), "user/model").partition("# user")[2]
        shown = re.sub(r"```.*?```", "", lines, flags=re.DOTALL)
        assert BLOCK.findall(shown.replace("\n## ", "\n")) == []


#: A line, or an item of ours, that begins with what Markdown takes for more than text.
BLOCK = re.compile(r"^ *(?:- )?(?:#|=|~|[-+](?: *$| [-F])|--|\d+[.)] ).*", re.MULTILINE)


def test_what_cannot_be_printed_is_not_in_the_card(checkpoint_folder: Path) -> None:
    hostile = "\x1b[31mred \ud800\u202eder"
    provenance = {"license": hostile, "use": hostile, "datasets": [hostile], "a\ud800": "b"}
    config = replace(
        load_config(checkpoint_folder), provenance=provenance, threshold_origin=hostile
    )
    text = compose(config, Results(contents={}), "a\udc80b\x1b")
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "from: \\[31mred der." in text
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "[31mred der"
    assert r'Classifier.from_pretrained("a\udc80b\u001b")' in text


def test_a_card_tells_no_paths_of_its_author_and_no_setting_twice(
    checkpoint_folder: Path,
) -> None:
    provenance = {
        "identity": {"epochs": 4321},
        "train": {"root": "/home/ann/ward", "kept": 60},
        "training": {"cache_dir": "/home/ann/cache", "epochs": 4321},
    }
    config = replace(load_config(checkpoint_folder), provenance=provenance)
    card = compose(config, Results(contents={}), "user/model")
    assert "/home/ann" not in card
    assert card.count("4321") == 1
    assert "kept: 60" in card


@pytest.mark.parametrize("name", ["my model (2)", 'a "b" \\', "überall"])
def test_the_snippets_name_the_folder_as_it_is_called(checkpoint_folder: Path, name: str) -> None:
    card = model_card(checkpoint_folder, name)
    calls = re.findall(r"((?:Classifier\.from_pretrained|resolve)\(.*?\))\)?$", card, re.MULTILINE)
    asked = [ast.literal_eval(ast.parse(call, mode="eval").body.args[0]) for call in calls]  # type: ignore[attr-defined]
    assert asked == [name, name, name]


def test_the_card_counts_the_images_of_each_side_and_claims_nothing_of_training(
    run: Path,
) -> None:
    text = model_card(run, "user/model")
    table = EvaluationReport.load(run / "evaluation.json").predictions
    assert table is not None
    own = int((table["label"] == "covid19").sum())
    others, patients = len(table) - own, table["patient_group"].nunique()
    assert own < 20
    assert others < 20
    assert f"| all | {own}\\* | {others}\\* | {patients} |" in text
    assert "a star marks fewer than 20 images" in text
    # Nothing in a report says what the weights were trained on.
    assert "not trained on" not in text


def test_the_card_says_what_the_threshold_decides_per_source(copied: Path) -> None:
    report = EvaluationReport.load(copied / "evaluation.json")
    table = report.predictions
    assert table is not None
    rng = np.random.default_rng(0)
    shares = rng.dirichlet([1, 1, 1], len(table))
    table[["p_normal", "p_pneumonia", "p_covid19"]] = shares
    table.loc[0, ["p_normal", "p_pneumonia", "p_covid19"]] = [0.0, 1.0, 0.0]
    table["source"] = np.where(np.arange(len(table)) % 4 < 2, "a", "b")
    report.save(copied / "evaluation.json")
    change(copied / "config.json", threshold=0.4)
    text = model_card(copied, "user/model")
    assert "Decisions at 0.4" in text
    total = table["p_covid19"] + table["p_normal"]
    called = (table["p_covid19"] / total).fillna(0.5) >= 0.4
    for source, part in {"all": table, **dict(list(table.groupby("source")))}.items():
        cells = [f"| {source} |"]
        for label, wanted in (("covid19", True), ("normal", False), ("pneumonia", True)):
            mine = part.index[part["label"] == label]
            cells.append(f"{(called[mine] == wanted).mean():.3f} (")
            cells.append(f"), n = {len(mine)} |")
        line = next(
            line
            for line in text.splitlines()
            if line.count(", n = ") == 3 and line.startswith(cells[0])
        )
        position = 0
        for cell in cells:
            position = line.index(cell, position)


def test_without_normals_there_is_no_threshold_to_judge(run: Path) -> None:
    report = EvaluationReport.load(run / "evaluation.json")
    assert len(decisions(report, 0.5)) == 2
    assert decisions(replace(report, predictions=None), 0.5) == []
    assert decisions(replace(report, classes=("a", "covid19")), 0.5) == []
    assert decisions(None, 0.5) == []


def test_a_card_without_results_says_so(checkpoint_folder: Path) -> None:
    text = model_card(checkpoint_folder, "x", license="mit")
    assert "license: mit" in text
    assert "has not been evaluated" in text
    assert "has not been audited" in text


TABLE = {"title": "Frame", "note": HOSTILE, "head": ["Pair", "AUROC"], "rows": [["a|b", "0.51"]]}


def write_measurements(folder: Path, tables: Any, **changes: Any) -> None:
    config = load_config(folder)
    origin = {"weights_sha256": config.weights_sha256, "classes": config.classes}
    text = json.dumps({**origin, "tables": tables, **changes})
    (folder / "measurements.json").write_text(text)


def test_further_measurements_become_tables_of_the_card(copied: Path) -> None:
    write_measurements(copied, [TABLE, {**TABLE, "title": "Folds"}])
    text = model_card(copied, "user/model")
    assert "## Frame" in text
    assert "## Folds" in text
    assert "| Pair | AUROC |\n| --- | --- |\n| a\\|b | 0.51 |" in text
    assert "<script>" not in text


@pytest.mark.parametrize(
    "tables",
    [
        {"a": 1},
        ["x"],
        [{**TABLE, "rows": [["a"]]}],
        [{**TABLE, "rows": [["a", 7]]}],
        [{"title": "x"}],
        7,
        [None],
    ],
)
def test_measurements_of_another_shape_are_refused(copied: Path, tables: Any) -> None:
    write_measurements(copied, tables)
    with pytest.raises(ReportError, match="does not hold weights_sha256, classes and tables"):
        model_card(copied, "user/model")


def test_measurements_that_do_not_say_of_what_are_refused(copied: Path) -> None:
    (copied / "measurements.json").write_text(json.dumps([TABLE]))
    with pytest.raises(ReportError, match="does not hold weights_sha256, classes and tables"):
        model_card(copied, "user/model")


# ---------------------------------------------------------------- results of other weights

OTHER = "0" * 64


@pytest.mark.parametrize("name", ["evaluation.json", "audit.json", "measurements.json"])
@pytest.mark.parametrize("weights", [OTHER, ""])
def test_results_of_other_weights_are_refused_everywhere(
    copied: Path, tmp_path: Path, name: str, weights: str
) -> None:
    write_measurements(copied, [TABLE])
    classifier = Classifier.from_pretrained(copied)
    change(copied / name, weights_sha256=weights)
    own = classifier.weights_sha256
    named = f"names the SHA-256 {OTHER}" if weights else "names no SHA-256"
    expected = rf"{name} was not measured on these weights: it {named}, .* has {own}"
    for refused in (
        lambda: push(copied, "user/model", allow_unjudged=True),
        lambda: classifier.save_pretrained(tmp_path / "saved"),
        lambda: classifier.push_to_hub("user/model", allow_unjudged=True),
        lambda: model_card(copied, "user/model"),
    ):
        with pytest.raises(ReportError, match=expected):
            refused()
    assert not (tmp_path / "saved").exists()


def test_weights_that_were_trained_on_lose_their_results(copied: Path) -> None:
    config, tensors = load_checkpoint(copied)
    moved = tensors | {"classifier.bias": tensors["classifier.bias"] + 1}
    save_checkpoint(copied, config, moved, {"gate.json": b"{}"})
    with pytest.raises(ReportError, match=r"evaluation\.json was not measured on these weights"):
        push(copied, "user/model")


@pytest.mark.parametrize("name", ["audit.json", "measurements.json"])
def test_results_of_other_classes_are_refused(copied: Path, name: str) -> None:
    write_measurements(copied, [TABLE])
    change(copied / name, classes=["covid19", "pneumonia", "normal"])
    with pytest.raises(ReportError, match=rf"{name} was measured with the classes \['covid19', "):
        push(copied, "user/model")


def test_weights_are_named_by_what_they_are_saved_as(run: Path, tmp_path: Path) -> None:
    config, tensors = load_checkpoint(run)
    whole = Classifier.from_pretrained(run)
    assert whole.weights_sha256 == config.weights_sha256
    moved = tensors | {"classifier.bias": tensors["classifier.bias"] + 1}
    for other in (
        Classifier(config, moved),  # whatever the config says
        Classifier.from_pretrained(run, classes=("normal", "covid19")),
    ):
        assert other.weights_sha256 != config.weights_sha256
        other.save_pretrained(tmp_path / "other")
        assert load_config(tmp_path / "other").weights_sha256 == other.weights_sha256


# ---------------------------------------------------------------- there and back

PUSH = """
import json, sys
from chestxray_covid.publish import push
from chestxray_covid.cli import main
print(push(sys.argv[1], "user/model", token="hf_x\\n", commit_message="First"))
try:
    main(["push", sys.argv[1], "user/other"], standalone_mode=False)
except SystemExit: pass
print(json.dumps("done"))
"""
LOAD = """
import json, sys
from chestxray_covid import Classifier, SyntheticChestXray
image = SyntheticChestXray(2, image_size_px=64).image(0)
found = [Classifier.from_pretrained(name).predict_proba(image).tolist() for name in sys.argv[1:]]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["installed", "other"])
def test_a_model_goes_to_the_hub_and_comes_back_in_another_process(
    run: Path, server: HubServer, tmp_path: Path, version: str
) -> None:
    environment = hub_environment(server, tmp_path / "home", HF_TOKEN="hf_x")
    if version == "other":
        environment["PYTHONPATH"] = with_other_hub(environment["PYTHONPATH"])
    server.forget()
    assert run_python(PUSH, environment, run) == "done"
    commit = server.commits["user/model", server.heads["user/model", "main"]]
    assert set(commit) == {
        *("config.json", "model.safetensors", "gate.json", "evaluation.json", "audit.json"),
        *("README.md", "calibration.png"),
    }
    assert b"# user/model" in commit["README.md"]
    messages = [r.body for r in server.requests if "/commit/" in r.path]
    assert b"First" in messages[0]
    found = run_python(LOAD, environment, "user/model", "user/other", run)
    assert found[0] == found[1] == found[2]
    assert not np.allclose(found[0], 1 / 3, atol=1e-3)


@pytest.mark.slow
def test_results_of_what_was_published_before_do_not_stay(
    copied: Path, server: HubServer, tmp_path: Path
) -> None:
    write_measurements(copied, [TABLE])
    server.publish({"paper.pdf": b"%PDF"}, "user/again")
    environment = hub_environment(server, tmp_path / "home", HF_TOKEN="hf_x")
    code = (
        "import json, sys\n"
        "from chestxray_covid.publish import push\n"
        "push(sys.argv[1], 'user/again', allow_unjudged=True)\n"
        "print(json.dumps('done'))\n"
    )
    assert run_python(code, environment, copied) == "done"
    judged = set(server.commits["user/again", server.heads["user/again", "main"]])
    results = {"evaluation.json", "audit.json", "measurements.json", "calibration.png"}
    assert judged >= {"paper.pdf", *results}
    for name in results - {"calibration.png"}:
        (copied / name).unlink()
    assert run_python(code, environment, copied) == "done"
    commit = server.commits["user/again", server.heads["user/again", "main"]]
    assert set(commit) == judged - results
    assert b"has not been evaluated" in commit["README.md"]


def test_a_hub_that_refuses_is_an_error_with_a_name(
    run: Path, server: HubServer, tmp_path: Path
) -> None:
    environment = hub_environment(server, tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9")
    guarded = (
        "import json, sys\nfrom chestxray_covid.errors import DownloadError\n"
        "from chestxray_covid.publish import push\n"
        "try: push(sys.argv[1], 'user/model', token='hf_x')\n"
        "except DownloadError as error: print(json.dumps(str(error)))\n"
    )
    found: Any = run_python(guarded, environment, run)
    assert "user/model cannot be published" in found
    assert "write access" in found
    assert "cache" not in found


def test_the_licence_is_text(run: Path) -> None:
    with pytest.raises(TypeError, match=r"license must be a string, .*, got \['mit'\]"):
        push(run, "user/model", license=["mit"])  # type: ignore[arg-type]


def test_the_name_of_a_repository_is_text(run: Path) -> None:
    with pytest.raises(TypeError, match='repo_id must be a string, "user/name", got None'):
        push(run, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "stored", "family"),
    [("hf_se\x01cret", "", "ValueError"), (None, "hf_se\x01cret", "DownloadError")],
)
def test_a_token_that_no_header_can_hold_is_refused_unseen(
    run: Path, server: HubServer, tmp_path: Path, given: str | None, stored: str, family: str
) -> None:
    environment = hub_environment(server, tmp_path / "home", HF_TOKEN=stored)
    guarded = (
        "import json, sys, traceback\nfrom chestxray_covid.publish import push\n"
        "try: push(sys.argv[1], 'user/model', token=json.loads(sys.argv[2]))\n"
        "except Exception as e: print(json.dumps([type(e).__name__, traceback.format_exc()]))\n"
    )
    server.forget()
    found, shown = run_python(guarded, environment, run, json.dumps(given))
    assert found == family
    assert "token must be printable ASCII" in shown
    assert "cret" not in shown
    assert server.asked() == []


def test_a_classifier_publishes_a_card_with_the_name_of_the_repository(
    server: HubServer, run: Path, tmp_path: Path
) -> None:
    code = (
        "import json, sys\n"
        "from chestxray_covid import Classifier\n"
        "model = Classifier.from_pretrained(sys.argv[1])\n"
        "model.save_pretrained(sys.argv[2])\n"
        'model.push_to_hub("user/own", token="hf_x", license="cc-by-4.0")\n'
        'print(json.dumps("done"))\n'
    )
    environment = hub_environment(server, tmp_path / "home")
    assert run_python(code, environment, run, tmp_path / "saved") == "done"
    card = server.commits["user/own", server.heads["user/own", "main"]]["README.md"].decode()
    assert "# user/own" in card
    assert "license: cc-by-4.0" in card
    assert 'Classifier.from_pretrained("user/own")' in card
    assert "# saved" in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")


def test_a_name_without_an_account_gets_the_one_of_the_token_on_the_card(
    server: HubServer, run: Path, tmp_path: Path
) -> None:
    code = (
        "import json, sys\n"
        "from chestxray_covid import Classifier\n"
        "model = Classifier.from_pretrained(sys.argv[1])\n"
        'model.save_pretrained(sys.argv[2], push_to_hub=True, token="hf_x")\n'
        'print(json.dumps("done"))\n'
    )
    environment = hub_environment(server, tmp_path / "home")
    assert run_python(code, environment, run, tmp_path / "alone") == "done"
    card = published(server, "user/alone")["README.md"].decode()
    assert "# user/alone" in card
    assert 'Classifier.from_pretrained("user/alone")' in card
    assert "hf-hub:user/alone" in card


OWN_CARD = """
import json, sys
from chestxray_covid import Classifier
model = Classifier.from_pretrained(sys.argv[1])
model.push_to_hub("user/pushed", token="hf_x")
model.save_pretrained(sys.argv[1], push_to_hub=True, repo_id="user/saved", token="hf_x")
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="user/moved", token="hf_x")
part = Classifier.from_pretrained(sys.argv[1], classes=["covid19", "normal"])
part.push_to_hub("user/some", token="hf_x", allow_unjudged=True)
print(json.dumps("done"))
"""


def test_a_classifier_publishes_the_card_that_somebody_wrote_for_it(
    server: HubServer, copied: Path, tmp_path: Path
) -> None:
    mine = b"---\nlicense: cc-by-nc-sa-4.0\n---\n# Mine\n![drawn by hand](calibration.png)\n"
    (copied / "README.md").write_bytes(mine)
    (copied / "calibration.png").write_bytes(b"my figure")
    environment, place = hub_environment(server, tmp_path / "home"), tmp_path / "elsewhere"
    assert run_python(OWN_CARD, environment, copied, place) == "done"
    for repo in ("user/pushed", "user/saved", "user/moved"):
        assert published(server, repo)["README.md"] == mine
        assert published(server, repo)["calibration.png"] == b"my figure"
        assert "notes.txt" not in published(server, repo)
    assert b"# user/some" in published(server, "user/some")["README.md"]
    (place / "README.md").write_bytes(other := mine.replace(b"Mine", b"Other"))
    Classifier.from_pretrained(copied).save_pretrained(place)
    assert (place / "README.md").read_bytes() == other, "a card that is there stays"
    with pytest.raises(ReportError, match=r"states the licence cc-by-nc-sa-4\.0, but mit is asked"):
        Classifier.from_pretrained(copied).push_to_hub("user/pushed", license="mit")


def test_a_classifier_publishes_weights_that_another_tool_wrote_as_they_are(
    server: HubServer, rewritten: Path, tmp_path: Path
) -> None:
    weights = (rewritten / "model.safetensors").read_bytes()
    environment, place = hub_environment(server, tmp_path / "home"), tmp_path / "elsewhere"
    assert run_python(OWN_CARD, environment, rewritten, place) == "done"
    for repo in ("user/pushed", "user/saved", "user/moved"):
        assert published(server, repo)["model.safetensors"] == weights


def published(server: HubServer, repo: str, branch: str = "main") -> dict[str, bytes]:
    return server.commits[repo, server.heads[repo, branch]]


OPTIONS = """
import json, sys
from chestxray_covid.publish import push
print(json.dumps([push(sys.argv[1], token="hf_x", **o) for o in json.loads(sys.argv[2])]))
"""


@pytest.mark.slow
def test_a_generated_card_is_made_again_with_the_licence_that_is_asked_for(
    server: HubServer, run: Path, tmp_path: Path
) -> None:
    Classifier.from_pretrained(run).save_pretrained(tmp_path / "saved")
    card = tmp_path / "saved" / "README.md"
    assert "license: cc-by-nc-sa-4.0" in card.read_text()
    environment = hub_environment(server, tmp_path / "home")
    wanted = [{"repo_id": "user/licensed", "license": "cc-by-4.0"}]
    run_python(OPTIONS, environment, tmp_path / "saved", json.dumps(wanted))
    text = published(server, "user/licensed")["README.md"].decode()
    assert "license: cc-by-4.0" in text
    assert "# user/licensed" in text

    mine = card.read_text().replace("# saved", "# Mine")
    card.write_text(mine)
    run_python(OPTIONS, environment, tmp_path / "saved", json.dumps([{"repo_id": "user/licensed"}]))
    assert published(server, "user/licensed")["README.md"].decode() == mine
    with pytest.raises(ReportError, match=r"states the licence cc-by-nc-sa-4\.0, but mit is asked"):
        push(tmp_path / "saved", "user/licensed", license="mit")


@pytest.mark.parametrize(
    ("front", "license", "refused"),
    [
        ("", None, ""),
        ("", "mit", "states the licence nowhere, but mit"),
        ("---\nlicense: MIT # x\n---\n", None, "states the licence MIT, but cc-by-nc-sa-4.0"),
        ("---\ntags: [a]\n---\n", "mit", "states the licence nowhere, but mit"),
        ("---\nlicense: 'CC-BY-NC-SA-4.0'\n---\n", "cc-by-nc-sa-4.0", ""),
    ],
)
def test_the_licence_of_ones_own_card_is_that_of_the_weights(
    copied: Path, server: HubServer, tmp_path: Path, front: str, license: str | None, refused: str
) -> None:
    (copied / "README.md").write_text(f"{front}# Mine\n\nlicense: in the text\n")
    if refused:
        with pytest.raises(ReportError, match=refused):
            push(copied, "user/mine", license=license)
        return
    wanted = [{"repo_id": "user/mine", "license": license}]
    run_python(OPTIONS, hub_environment(server, tmp_path / "home"), copied, json.dumps(wanted))
    assert published(server, "user/mine")["README.md"] == (copied / "README.md").read_bytes()


def test_a_saved_card_is_made_again_unless_it_was_changed(run: Path, tmp_path: Path) -> None:
    classifier = Classifier.from_pretrained(run)
    classifier.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_bytes()
    change(tmp_path / "config.json", provenance={"license": "mit"})
    Classifier.from_pretrained(tmp_path).save_pretrained(tmp_path)
    second = (tmp_path / "README.md").read_bytes()
    assert b"license: mit" in second
    (tmp_path / "README.md").write_bytes(first.replace(b"not a medical device", b"fine"))
    classifier.save_pretrained(tmp_path)
    assert b"**This is fine.**" in (tmp_path / "README.md").read_bytes()


MEANWHILE = """
import json, sys
from pathlib import Path
from chestxray_covid import publish
after_the_weights, after_the_results = publish.read_results, publish.make_card
def swap(*names):
    for name in names:
        Path(sys.argv[1], name).write_bytes(b"{}")
def read_results(*arguments):
    swap("config.json", "model.safetensors", "gate.json")
    return after_the_weights(*arguments)
def make_card(*arguments):
    swap("evaluation.json", "audit.json")
    return after_the_results(*arguments)
publish.read_results, publish.make_card = read_results, make_card
print(json.dumps(publish.push(sys.argv[1], "user/meanwhile", token="hf_x")))
"""


def test_the_bytes_that_were_verified_are_those_that_are_published(
    copied: Path, run: Path, server: HubServer, tmp_path: Path
) -> None:
    run_python(MEANWHILE, hub_environment(server, tmp_path / "home"), copied)
    assert (copied / "model.safetensors").read_bytes() == b"{}"
    found = published(server, "user/meanwhile")
    for name in ("config.json", "model.safetensors", "gate.json", "audit.json"):
        assert found[name] == (run / name).read_bytes(), name
    told, own = (
        json.loads(data)
        for data in (found["evaluation.json"], (run / "evaluation.json").read_bytes())
    )
    assert {**told, "predictions": None} == {**own, "predictions": None}
    assert told["predictions"]["p_covid19"] == own["predictions"]["p_covid19"]


PATIENTS = ["MRN-7001", "MRN-7001", "MRN-7002", "MRN-7003", "MRN-7001", "MRN-7004"]


def test_no_patient_is_named_in_what_is_published(
    copied: Path, server: HubServer, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    own = evaluate_probabilities(
        [LABELS[i % 3] for i in range(6)],
        rng.dirichlet((1, 1, 1), 6),
        classes=LABELS,
        patients=PATIENTS,
        sources=["clinic"] * 4 + ["practice"] * 2,
        views=["PA"] * 6,
        groups=PATIENTS,
        ids=[f"DOE_Jane_{i // 2 * 2}.dcm" for i in range(6)],
        n_resamples=20,
    )
    excluded = {"folder outside the classes (DOE_Jane)": 2, "label outside the classes (DOE)": 1}
    excluded |= {"folder outside the classes (ROE_Richard)": 3}
    excluded |= {"label outside the classes (pneumonia)": 5, "no patient_id": 1}
    weights = load_config(copied).weights_sha256
    report = replace(own, excluded=excluded, model={"weights_sha256": weights})
    report.save(copied / "evaluation.json")
    before = (copied / "evaluation.json").read_bytes()
    environment = hub_environment(server, tmp_path / "home")
    run_python(OPTIONS, environment, copied, json.dumps([{"repo_id": "user/nameless"}]))
    assert (copied / "evaluation.json").read_bytes() == before

    files = published(server, "user/nameless")
    for name, data in files.items():
        assert not re.search(rb"DOE|ROE|MRN|7001", data) or name == "model.safetensors", name
    (tmp_path / "evaluation.json").write_bytes(files["evaluation.json"])
    told = EvaluationReport.load(tmp_path / "evaluation.json")
    assert told.excluded == {
        "folder outside the classes": 5,
        "label outside the classes": 1,
        "label outside the classes (pneumonia)": 5,
        "no patient_id": 1,
    }
    assert own.predictions is not None
    assert told.predictions is not None
    kept = [c for c in own.predictions if c not in ("id", "patient_id", "patient_group")]
    assert told.predictions[kept].equals(own.predictions[kept])
    numbers = [text.rpartition("-")[2] for text in told.predictions["patient_id"]]
    assert numbers == ["0", "0", "1", "2", "3", "4"], "a number is of a patient of a source"
    assert list(told.predictions["patient_group"]) == ["0", "0", "1", "2", "0", "3"]
    images = [text.rpartition("-")[2] for text in told.predictions["id"]]
    assert images == ["0", "0", "1", "2", "3", "4"], "an image that is listed twice is one"
    assert told.roc_curve().area == own.roc_curve().area
    assert told.reliability().ece == own.reliability().ece


def test_a_branch_a_proposal_and_a_private_repository(
    run: Path, server: HubServer, tmp_path: Path
) -> None:
    repo = "user/branched"
    wanted: list[dict[str, Any]] = [
        {"repo_id": repo, "branch": "dev", "private": True},
        {"repo_id": repo, "branch": "dev", "license": "mit"},
        {"repo_id": repo, "create_pr": True},
        {"repo_id": "user/open"},
    ]
    environment = hub_environment(server, tmp_path / "home")
    addresses = run_python(OPTIONS, environment, run, json.dumps(wanted))
    assert published(server, repo) == {}, "main is as it was made"
    assert b"license: mit" in published(server, repo, "dev")["README.md"]
    assert "model.safetensors" in published(server, repo, "refs/pr/1")
    assert addresses[1].endswith(server.heads[repo, "dev"])
    assert addresses[2].endswith(server.heads[repo, "refs/pr/1"])
    assert repo in server.private
    assert "user/open" not in server.private


PRIVATE = """
import json, sys
from chestxray_covid import Classifier
from chestxray_covid.errors import DownloadError
from chestxray_covid.publish import push
found = []
for private in (None, True):
    for publish in (
        lambda: push(sys.argv[1], "user/seen", token="hf_x", private=private),
        lambda: Classifier.from_pretrained(sys.argv[1]).push_to_hub(
            "user/seen", token="hf_x", private=private, branch="dev", commit_message="Second"
        ),
    ):
        try:
            found.append(publish())
        except DownloadError as error:
            found.append(str(error))
print(json.dumps(found))
"""


def test_what_shall_be_private_is_not_published_where_all_can_see_it(
    run: Path, server: HubServer, tmp_path: Path
) -> None:
    found = run_python(PRIVATE, hub_environment(server, tmp_path / "home"), run)
    assert all("/commit/" in address for address in found[:2])
    for message in found[2:]:
        assert message.startswith("user/seen is public, expected a private repository; nothing was")
        assert "publish without private=True (command line: --private)" in message
    assert sum("user/seen/commit/" in r.path for r in server.requests) == 2


@pytest.mark.slow
def test_a_network_trained_on_phantoms_is_the_same_in_another_process(
    server: HubServer, tmp_path: Path
) -> None:
    phantoms = SyntheticChestXray(18, classes=LABELS, image_size_px=64)
    split = split_by_patient(phantoms, val=0.2, test=0.2, seed=0)
    config = TrainingConfig(
        preprocess=Preprocess(size_px=64),
        epochs=1,
        batch_size=4,
        samples_per_epoch=8,
        learning_rate=1e-3,
        progress=False,
    )
    model = build_densenet121(False, num_classes=3, seed=0)
    run = tmp_path / "run"
    Trainer(model, split.train, split.val, config, output=run).fit()
    trained = Classifier.from_pretrained(run)
    evaluate(trained, split.test, n_resamples=20).save(run / "evaluation.json")
    replace(AUDIT, weights_sha256=trained.weights_sha256).save(run / "audit.json")
    environment = hub_environment(server, tmp_path / "home")
    run_python(OPTIONS, environment, run, json.dumps([{"repo_id": "user/trained"}]))
    (found,) = run_python(LOAD, environment, "user/trained")
    here = trained.predict_proba(SyntheticChestXray(2, image_size_px=64).image(0))
    assert found == here.tolist()
    untrained = Classifier(trained.config, to_tensors(build_densenet121(False, num_classes=3)))
    assert not np.allclose(
        untrained.predict_proba(SyntheticChestXray(2, image_size_px=64).image(0)), found, atol=1e-3
    )


def test_a_damaged_evaluation_is_not_published_whatever_the_card_says(copied: Path) -> None:
    (copied / "README.md").write_text("# mine")
    (copied / "evaluation.json").write_text("[]")
    with pytest.raises(ReportError, match=r"evaluation\.json"):
        push(copied, "user/model")


def test_a_bundled_name_or_folder_is_opened_elsewhere_by_its_path(run: Path) -> None:
    card = model_card(run, "densenet121-v1")
    assert 'chestxray_covid.resolve("densenet121-v1")' in card
    assert "hf-hub:" not in card


def test_texts_do_not_become_links_on_their_own() -> None:
    found = markdown_text("see www.example.org or a@example.org")
    assert "www." not in found
    assert "@" not in found
