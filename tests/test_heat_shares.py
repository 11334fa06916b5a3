from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chestxray_covid import (
    ChestXrayDataset,
    Classifier,
    LungHeat,
    ModelConfig,
    Preprocess,
    Sample,
    SyntheticChestXray,
    grad_cam,
    lung_heat,
    segment,
)
from chestxray_covid.datasets.phantom import phantom_mask
from conftest import random_tensors

pytestmark = pytest.mark.usefixtures("drawn_once")


@pytest.fixture(scope="module")
def model() -> Classifier:
    config = ModelConfig(classes=("normal", "covid19"), preprocess=Preprocess(size_px=96))
    return Classifier(config, random_tensors(2))


@pytest.fixture(scope="module")
def phantoms() -> SyntheticChestXray:
    return SyntheticChestXray(8, image_size_px=96, patients=4)


@pytest.mark.slow
def test_the_shares_are_those_of_each_heatmap(
    model: Classifier, phantoms: SyntheticChestXray
) -> None:
    found = lung_heat(model, phantoms, "covid19", masks=phantom_mask, n_resamples=200)
    heatmaps = grad_cam(model, phantoms, "covid19")
    masks = [phantom_mask(sample) for sample in phantoms.samples]
    shares = [h.share_inside(m) for h, m in zip(heatmaps, masks, strict=True)]
    assert found.table["share"].tolist() == pytest.approx(shares)
    assert found.share.value == pytest.approx(np.mean(shares))
    assert found.area.value == pytest.approx(np.mean([m.mean() for m in masks]))
    assert found.excess.value == pytest.approx(found.share.value - found.area.value)
    assert found.share.method == "patient bootstrap"
    assert found.share.low < found.share.value < found.share.high
    assert (found.without_heat, found.without_lungs) == (0, 0)
    assert found.table["patient_id"].nunique() == 4
    assert set(found.table["target"]) == {"covid19"}


def test_heat_that_is_the_same_everywhere_has_no_excess(phantoms: SyntheticChestXray) -> None:
    tensors = random_tensors(2)
    # Maps without content: every place is the same, so heat covers the image evenly.
    tensors["features.norm5.weight"] = np.zeros_like(tensors["features.norm5.weight"])
    tensors["features.norm5.bias"] = np.ones_like(tensors["features.norm5.bias"])
    tensors["classifier.weight"] = np.ones_like(tensors["classifier.weight"])
    config = ModelConfig(classes=("normal", "covid19"), preprocess=Preprocess(size_px=96))
    found = lung_heat(Classifier(config, tensors), phantoms, masks=phantom_mask, n_resamples=50)
    assert found.excess.value == pytest.approx(0, abs=1e-6)
    assert found.share.value == pytest.approx(found.area.value)


@pytest.mark.slow
def test_images_without_heat_or_lungs_are_counted_and_left_out(
    model: Classifier, phantoms: SyntheticChestXray
) -> None:
    def some(sample: Sample) -> np.ndarray:
        mask = phantom_mask(sample)
        return mask & False if sample.label == "normal" else mask

    found = lung_heat(model, phantoms, "covid19", masks=some, n_resamples=50)
    assert (found.without_lungs, found.without_heat) == (4, 0)
    assert set(found.table["label"]) == {"covid19"}
    cold = dict(model._tensors)
    cold["classifier.weight"] = -np.abs(cold["classifier.weight"])
    found = lung_heat(Classifier(model.config, cold), phantoms, masks=some, n_resamples=50)
    assert (found.without_lungs, found.without_heat) == (4, 4)
    assert np.isnan(found.share.value)
    assert found.share.n == 0
    assert len(found.table) == 0


def test_annotated_lungs_are_taken_where_there_are_some_and_else_drawn(
    model: Classifier, phantoms: SyntheticChestXray, tmp_path: Path
) -> None:
    drawn = np.zeros((96, 96), np.uint8)
    drawn[:, :48] = 255
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    annotated = replace(
        phantoms.samples[0],
        metadata={**phantoms.samples[0].metadata, "lung_mask": str(tmp_path / "mask.png")},
    )
    dataset = ChestXrayDataset([annotated, phantoms.samples[1]], classes=phantoms.classes)
    found = lung_heat(model, dataset, n_resamples=50)
    assert found.table["area"].tolist() == [0.5, pytest.approx(segment(phantoms[1][0]).mean())]
    # A transform may move the lungs away from where they were annotated.
    dataset.transform = lambda image: image
    again = lung_heat(model, dataset, n_resamples=50)
    assert again.table["area"][0] == pytest.approx(segment(phantoms[0][0]).mean())


def test_a_mask_may_be_whatever_becomes_an_array(
    model: Classifier, phantoms: SyntheticChestXray
) -> None:
    known = lung_heat(model, phantoms, masks=phantom_mask, n_resamples=2)
    for convert in (Image.fromarray, np.ndarray.tolist):
        found = lung_heat(
            model,
            phantoms,
            masks=lambda sample, as_type=convert: as_type(phantom_mask(sample)),
            n_resamples=2,
        )
        assert found.table.equals(known.table)


def test_a_mask_of_another_size_is_refused(model: Classifier, phantoms: SyntheticChestXray) -> None:
    which = phantoms.samples[1]
    expected = rf"masks returned for {which.path}: mask must be \(96, 96\) bool like the image"
    with pytest.raises(ValueError, match=expected):
        lung_heat(model, phantoms, masks=lambda s: np.ones((10, 10), bool) if s is which else None)


def test_impossible_resampling_is_refused_before_anything_is_computed(
    model: Classifier, phantoms: SyntheticChestXray
) -> None:
    with pytest.raises(
        ValueError, match="n_resamples must be a whole number from 1 to 1,000,000, got 0"
    ):
        lung_heat(model, phantoms, n_resamples=0, device="no such device")


def test_a_folder_of_masks_is_no_function(model: Classifier, phantoms: SyntheticChestXray) -> None:
    with pytest.raises(TypeError, match="masks must be a function that returns the lungs"):
        lung_heat(model, phantoms, masks="masks/")  # type: ignore[arg-type]


def test_the_numbers_become_json(model: Classifier, phantoms: SyntheticChestXray) -> None:
    found = lung_heat(model, phantoms, masks=phantom_mask, n_resamples=50)
    assert isinstance(found, LungHeat)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["share"]["value"] == found.share.value
    assert set(data) == {"share", "area", "excess", "without_heat", "without_lungs"}


def test_one_patient_of_two_collections_gives_no_interval(
    model: Classifier, phantoms: SyntheticChestXray
) -> None:
    names = [{"origin": "z", "image_id": "1"}] * 2
    own = [
        replace(s, source=source, patient_id=source, metadata={**s.metadata, **known})
        for s, source, known in zip(phantoms.samples[:2], ("a", "b"), names, strict=True)
    ]
    dataset = ChestXrayDataset(own, classes=phantoms.classes)
    found = lung_heat(model, dataset, "covid19", masks=phantom_mask, n_resamples=50)
    assert np.isnan(found.share.low)


def test_names_that_are_not_utf_8_are_escaped(
    model: Classifier, phantoms: SyntheticChestXray
) -> None:
    strange = os.fsdecode(b"M\xfcnchen")
    samples = [replace(s, source=strange, patient_id=strange) for s in phantoms.samples[:2]]
    named = ChestXrayDataset(samples, classes=phantoms.classes)
    found = lung_heat(model, named, masks=phantom_mask, n_resamples=2)
    assert set(found.table["source"]) == set(found.table["patient_id"]) == {"M\\udcfcnchen"}
