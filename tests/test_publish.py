"""Saving, publishing and the card; the Hub is a server on this machine."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from chestxray_covid import AuditItem, AuditReport, Classifier, SyntheticChestXray, evaluate
from chestxray_covid.card import model_card
from chestxray_covid.checkpoint import load_checkpoint, save_checkpoint
from chestxray_covid.errors import CheckpointError, ReportError
from chestxray_covid.publish import push
from chestxray_covid.reporting import markdown_text
from hub_server import HubServer, hub_environment, run_python

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
    AUDIT.save(folder / "audit.json")
    (folder / "notes.txt").write_text("private")
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copied")


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("name", ["evaluation.json", "audit.json"])
def test_what_was_not_judged_is_not_published(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(ReportError, match=rf"{name} is missing: .*allow_unjudged=True"):
        push(copied, "user/model")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("evaluation.json", "cannot be read as an evaluation report"),
        ("audit.json", "cannot be read as an audit report"),
    ],
)
def test_judgements_that_cannot_be_read_are_not_published(
    copied: Path, name: str, reason: str
) -> None:
    (copied / name).write_text("{")
    with pytest.raises(ReportError, match=reason):
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


def test_a_part_of_the_classes_is_saved_without_results_of_the_whole(
    run: Path, tmp_path: Path
) -> None:
    part = Classifier.from_pretrained(run, classes=("normal", "covid19"))
    part.save_pretrained(tmp_path)
    assert not (tmp_path / "evaluation.json").exists()
    assert "has not been evaluated" in (tmp_path / "README.md").read_text()
    with pytest.raises(ReportError, match=r"evaluation\.json is missing"):
        part.push_to_hub("user/part")


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


def test_a_card_without_results_says_so(checkpoint_folder: Path) -> None:
    text = model_card(checkpoint_folder, "x", license="mit")
    assert "license: mit" in text
    assert "has not been evaluated" in text
    assert "has not been audited" in text


TABLE = {"title": "Frame", "note": HOSTILE, "head": ["Pair", "AUROC"], "rows": [["a|b", "0.51"]]}


def test_further_measurements_become_tables_of_the_card(copied: Path) -> None:
    (copied / "measurements.json").write_text(json.dumps([TABLE, {**TABLE, "title": "Folds"}]))
    text = model_card(copied, "user/model")
    assert "## Frame" in text
    assert "## Folds" in text
    assert "| Pair | AUROC |\n| --- | --- |\n| a\\|b | 0.51 |" in text
    assert "<script>" not in text


@pytest.mark.parametrize(
    "content", [{"a": 1}, ["x"], [{**TABLE, "rows": [["a"]]}], [{"title": "x"}], 7, [None]]
)
def test_measurements_of_another_shape_are_refused(copied: Path, content: Any) -> None:
    (copied / "measurements.json").write_text(json.dumps(content))
    with pytest.raises(ReportError, match="no list of tables with title, note, head and rows"):
        model_card(copied, "user/model")


# ---------------------------------------------------------------- there and back

PUSH = """
import json, sys
from chestxray_covid.publish import push
from chestxray_covid.cli import main
print(push(sys.argv[1], "user/model", token="hf_x", commit_message="First"))
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


def test_a_model_goes_to_the_hub_and_comes_back_in_another_process(
    run: Path, server: HubServer, tmp_path: Path
) -> None:
    environment = hub_environment(server, tmp_path / "home", HF_TOKEN="hf_x")
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
