from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from chestxray_covid import (
    Classifier,
    CohenCovidDataset,
    EvaluationReport,
    KermanyPneumoniaDataset,
    SyntheticChestXray,
    TrainingError,
    confounding,
)

EXAMPLES = Path(__file__).parents[1] / "examples"
LABELS = ("normal", "pneumonia", "covid19")


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.fixture(scope="module")
def collections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("collections")
    example("phantoms")["main"]([str(root), "--count", "150", "--size", "64"])
    return root


def test_every_example_is_tried_here() -> None:
    # What embeds an exported file runs without this library, in test_export.
    tried = Path(__file__).read_text(encoding="utf-8") + 'example("embed_onnx")'
    for path in EXAMPLES.glob("*.py"):
        assert f'example("{path.stem}")' in tried


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_explains_itself(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(path), run_name="__main__")
    assert "usage:" in capsys.readouterr().out


def test_phantom_collections_open_as_the_real_ones_do(collections: Path) -> None:
    cohen = CohenCovidDataset(collections / "covid-chestxray-dataset", classes=LABELS)
    kermany = KermanyPneumoniaDataset(collections / "kermany", classes=LABELS)
    drawn = SyntheticChestXray(150, classes=LABELS, sources=("cohen", "kermany"))
    for label in ("pneumonia", "covid19"):
        wanted = {s.patient_id for s in drawn.samples if s.source == "cohen" and s.label == label}
        assert {s.patient_id for s in cohen.samples if s.label == label} == wanted
    assert cohen.report().patients["normal"] == 3
    normals = [s for s in drawn.samples if s.source == "kermany" and s.label == "normal"]
    assert kermany.report().images["normal"] == len(normals)
    assert kermany.report().patients["normal"] == len({s.patient_id for s in normals})
    assert {s.metadata["split"] for s in kermany.samples} == {"train", "test"}
    with pytest.raises(SystemExit, match=r"kermany is there already: name another folder"):
        example("phantoms")["main"]([str(collections)])


def test_in_the_phantom_collections_the_source_gives_the_label_away(collections: Path) -> None:
    cohen = CohenCovidDataset(collections / "covid-chestxray-dataset")
    assert confounding(cohen + KermanyPneumoniaDataset(collections / "kermany")).cramers_v > 0.6


@pytest.mark.slow
def test_the_training_example_leaves_a_judged_model_and_its_resuming_changes_nothing(
    collections: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["--cohen", str(collections / "covid-chestxray-dataset")]
    arguments += [
        "--kermany",
        str(collections / "kermany"),
        "--output",
        str(run),
        "--no-pretrained",
    ]
    arguments += ["--epochs", "1", "--size", "32"]
    train = example("train_on_cohen_and_kermany")["main"]
    train(arguments)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("Cramér's V", "val_loss", "sensitivity"))
    report = EvaluationReport.load(run / "evaluation.json")
    assert Classifier.from_pretrained(run).classes == report.classes == ("normal", "covid19")
    assert len(json.loads((run / "split.json").read_text())["samples"]) > report.n_images
    train([*arguments, "--resume"])
    assert EvaluationReport.load(run / "evaluation.json").to_dict() == report.to_dict()
    own = (run / "split.json").read_bytes()
    for more in ([], ["--resume"]):  # the split of other patients must not replace the run's own
        with pytest.raises(TrainingError, match=r"already holds a run|differs in"):
            train([*arguments, "--seed", "1", *more])
        assert (run / "split.json").read_bytes() == own


@pytest.mark.slow
def test_the_prediction_example_gives_a_line_for_every_file_and_says_when_one_failed(
    checkpoint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict = example("predict")["main"]
    folder = SyntheticChestXray(4, image_size_px=64).save(tmp_path / "phantoms")
    assert predict([str(checkpoint_folder), str(folder)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = Classifier.from_pretrained(checkpoint_folder).predict(folder)
    assert lines == [prediction.to_dict() for prediction in expected]
    (folder / "broken.png").write_bytes(b"<html>")
    assert predict([str(checkpoint_folder), str(folder)]) == 1
    failed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["source"] for row in failed if "error" in row] == [str(folder / "broken.png")]
