"""Cross-validation by patient, with real training in every fold."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from chestxray_covid import (
    Classifier,
    EvaluationReport,
    Preprocess,
    SyntheticChestXray,
    Trainer,
    TrainingConfig,
    build_densenet121,
    cross_validate,
)
from chestxray_covid.datasets import duplicates
from chestxray_covid.datasets.duplicates import patient_groups
from chestxray_covid.errors import SplitError, TrainingError, TrainingInterrupted
from chestxray_covid.splits import folds_by_patient

pytestmark = pytest.mark.usefixtures("shallow", "drawn_once")
DATA = SyntheticChestXray(48, image_size_px=64, sources=("a", "b"))
CONFIG = TrainingConfig(
    preprocess=Preprocess(size_px=32),
    epochs=1,
    batch_size=8,
    samples_per_epoch=16,
    device="cpu",
    precision="float32",
    progress=False,
)


def network() -> torch.nn.Module:
    return build_densenet121(pretrained=False, trainable="head")


@pytest.fixture(scope="module")
def validated(
    shallow: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EvaluationReport, Path]:
    place = tmp_path_factory.mktemp("folds")
    return cross_validate(DATA, CONFIG, folds=3, model=network, output=place), place


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positive": "covid-19"}, "positive must be one of"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"val": 0.9}, r"val must be a share in \(0, 0.5\], got 0.9"),
        ({"val": float("nan")}, "val must be a share"),
        ({"seed": 2**32}, "seed must be from 0 to 4294967294, got 4294967296"),
        ({"n_resamples": 0}, "n_resamples"),
        ({"confidence": 1.0}, "confidence"),
        ({"folds": 40}, r"Class normal has 14 patient\(s\), too few for 40 sides"),
    ],
)
def test_wrong_arguments_are_refused_before_a_fold_is_trained(
    changes: dict[str, object], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "_thumbnails", None)  # no image is decoded
    options: dict[str, Any] = {"folds": 3, "model": network, "output": tmp_path}
    with pytest.raises(ValueError, match=reason):
        cross_validate(DATA, CONFIG, **{**options, **changes})
    with pytest.raises(TypeError, match=r"folds must be a whole number, got 2\.5"):
        cross_validate(DATA, CONFIG, **{**options, "folds": 2.5})
    with pytest.raises(TypeError, match=r"val must be a number, got '0\.2'"):
        cross_validate(DATA, CONFIG, **{**options, "val": "0.2"})
    with pytest.raises(TypeError, match=r"model must be a function .* got DenseNet"):
        cross_validate(DATA, CONFIG, **{**options, "model": network()})
    alone = network()
    with pytest.raises(ValueError, match="model must return a fresh network at each call"):
        cross_validate(DATA, CONFIG, **{**options, "model": lambda: alone})
    for config in ({"epochs": 1}, {}):
        with pytest.raises(TypeError, match="config must be a TrainingConfig, got dict"):
            cross_validate(DATA, config, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_image_is_judged_once_by_a_model_that_did_not_see_its_patient(
    validated: tuple[EvaluationReport, Path],
) -> None:
    report, place = validated
    groups = patient_groups(DATA)
    folds = folds_by_patient(DATA, groups, folds=3, seed=0)
    assert sorted(np.concatenate([held_out for _, held_out in folds])) == list(range(48))
    table = report.predictions
    assert table["id"].tolist() == [s.path.name for s in DATA.samples]
    for number, (rest, held_out) in enumerate(folds):
        assert {groups[i] for i in rest}.isdisjoint(groups[i] for i in held_out)
        classifier = Classifier.from_pretrained(place / f"fold-{number}")
        trained = classifier.config.provenance["train"]["kept"]
        chosen = classifier.config.provenance["val"]["kept"]
        assert trained + chosen == len(rest)
        assert chosen > 0
        expected = classifier.predict_proba(DATA.subset(held_out))
        found = table[["p_normal", "p_covid19"]].to_numpy()[held_out]
        assert found == pytest.approx(expected, abs=1e-6)


def test_the_pooled_report_counts_all_images_and_both_sources(
    validated: tuple[EvaluationReport, Path],
) -> None:
    report, _ = validated
    assert report.n_images == 48
    counts = {name: part.n_images for name, part in report.by_source.items()}
    assert counts == {name: sum(s.source == name for s in DATA.samples) for name in "ab"}
    assert report.positive == "covid19"
    assert not report.confounded


def test_finished_folds_are_read_not_trained_again(
    validated: tuple[EvaluationReport, Path],
) -> None:
    report, place = validated
    before = {p: p.stat().st_mtime_ns for p in place.rglob("model.safetensors")}
    val = cast(float, torch.tensor(0.15))  # the default
    again = cross_validate(DATA, CONFIG, folds=3, val=val, model=network, output=place)
    assert again.to_dict() == report.to_dict()
    how: dict[str, Any] = {"n_resamples": 20, "confidence": 0.8}
    other = cross_validate(DATA, CONFIG, folds=3, model=network, output=place, **how)
    wide, narrow = (r.overall.per_class["covid19"]["auroc"] for r in (report, other))
    assert (narrow.value, narrow.confidence) == (wide.value, 0.8)
    assert other.n_resamples == 20
    assert {p: p.stat().st_mtime_ns for p in place.rglob("model.safetensors")} == before


def test_too_few_patients_or_folds_are_refused() -> None:
    few = DATA.filter(lambda s: s.label == "normal" or s.patient_id == DATA.samples[-1].patient_id)
    with pytest.raises(SplitError, match="covid19 has 1 patient"):
        cross_validate(few, CONFIG, folds=2, model=network)
    with pytest.raises(ValueError, match="folds must be at least 2"):
        cross_validate(DATA, CONFIG, folds=1, model=network)


def test_a_fold_that_cannot_be_trained_is_refused_before_the_first_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Trainer, "fit", None)
    rare = list(dict.fromkeys(s.patient_id for s in DATA.samples if s.label == "covid19"))[:3]
    few = DATA.filter(lambda s: s.label == "normal" or s.patient_id in rare)
    with pytest.raises(TrainingError, match=r"No training image of \['covid19'\]"):
        cross_validate(few, CONFIG, folds=2, model=network)


def test_what_was_interrupted_in_a_temporary_folder_is_not_said_to_be_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    validate = Trainer._validate

    def interrupted(trainer: Trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(trainer)

    monkeypatch.setattr(Trainer, "_validate", interrupted)
    with pytest.raises(TrainingInterrupted) as stop:
        cross_validate(DATA, CONFIG, folds=3, model=network)
    assert str(stop.value).endswith(
        "its folder was temporary. Pass output=, and it can be continued."
    )
