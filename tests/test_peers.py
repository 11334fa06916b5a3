"""timm and transformers open our checkpoints and say the same."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from chestxray_covid import Classifier, ModelConfig, Preprocess, SyntheticChestXray
from chestxray_covid.checkpoint import load_checkpoint, save_checkpoint
from chestxray_covid.hub import BUNDLED, DEFAULT_MODEL
from chestxray_covid.models import from_tensors, normalise
from conftest import random_tensors
from hub_server import REPO, HubServer, hub_environment

timm = pytest.importorskip("timm")

CLASSES = ("normal", "pneumonia", "covid19")
SOURCES = ("covid-chestxray-dataset", "chest_xray", "covid-19-image-repository", "nih-subset")
KINDS = ["single", "half", *sorted(path.name for path in BUNDLED.glob("*") if path.is_dir())]


def lively_tensors() -> dict[str, NDArray[Any]]:
    """Return weights whose answers differ from image to image: batch norms do something."""
    rng = np.random.default_rng(0)
    tensors = random_tensors(3)
    for name, tensor in tensors.items():
        if name.endswith(("running_var", "norm1.weight", "norm2.weight")):
            tensors[name] = (tensor * rng.uniform(0.7, 1.4, tensor.shape)).astype(np.float32)
        elif name.endswith(("running_mean", "norm1.bias", "norm2.bias")):
            tensors[name] = rng.normal(0, 0.1, tensor.shape).astype(np.float32)
    tensors["classifier.weight"] *= 4
    return tensors


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint; the bundled ones are among them where there are any."""
    if request.param not in ("single", "half"):
        return BUNDLED / str(request.param)
    tensors = lively_tensors()
    if request.param == "half":
        tensors = {
            k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in tensors.items()
        }
    place = tmp_path_factory.mktemp(request.param)
    config = ModelConfig(classes=CLASSES, preprocess=Preprocess(size_px=96, mean=0.5, std=0.25))
    save_checkpoint(place, config, tensors)
    return place


def probabilities(model: Any, batch: torch.Tensor) -> NDArray[np.float64]:
    with torch.inference_mode():
        logits = model(batch)
    logits = getattr(logits, "logits", logits)
    return np.asarray(logits.double().softmax(1))


@pytest.mark.slow
def test_the_same_tensor_gives_the_same_probabilities_everywhere(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config, tensors = load_checkpoint(folder)
    pixels = np.stack([config.preprocess(image) for image in _drawings(4)])
    batch = normalise(torch.from_numpy(pixels), config.preprocess).contiguous()
    ours = probabilities(from_tensors(tensors), batch)
    assert np.ptp(ours, axis=0).max() > 1e-3, "the weights must not answer everything alike"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().float()
        third = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert np.abs(probabilities(other, batch) - ours).max() < 1e-4
    assert next(third.parameters()).dtype == torch.float32
    assert np.abs(probabilities(third, batch) - ours).max() < 1e-4
    assert list(third.config.id2label.values()) == list(config.classes)
    assert list(other.pretrained_cfg["label_names"]) == list(config.classes)


def compare(folder: Path, paths: list[Path]) -> None:
    """Compare with what the others make of files, which they open themselves."""
    transformers = pytest.importorskip("transformers")
    classifier = Classifier.from_pretrained(folder)
    assert len(paths) == 20
    ours = classifier.predict_proba(paths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = transformers.pipeline("image-classification", model=str(folder))
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().float()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        answers = [{a["label"]: a["score"] for a in one} for one in pipeline([*map(str, paths)])]
    theirs = np.array([[answer[name] for name in classifier.classes] for answer in answers])
    assert np.abs(theirs - ours).max() < 0.02
    batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    assert np.abs(probabilities(model, batch) - ours).max() < 0.02


@pytest.mark.slow
def test_twenty_phantoms_give_nearly_the_same_probabilities_everywhere(
    folder: Path, tmp_path: Path
) -> None:
    SyntheticChestXray(20, classes=CLASSES, image_size_px=300).save(tmp_path)
    compare(folder, sorted(tmp_path.rglob("*.png")))


@pytest.mark.slow
@pytest.mark.real_data
def test_twenty_radiographs_give_nearly_the_same_probabilities_everywhere(
    folder: Path, real_data: Path
) -> None:
    paths = []
    for source in (
        "covid-chestxray-dataset",
        "chest_xray",
        "covid-19-image-repository",
        "nih-subset",
    ):
        found = sorted(
            path
            for path in (real_data / source).rglob("*")
            if path.suffix in (".jpg", ".jpeg", ".png") and "annotations" not in path.parts
        )
        paths += found[:: len(found) // 5][:5]
    compare(folder, paths)


BY_NAME = """
import json, sys, warnings
warnings.simplefilter("ignore")
import timm, torch, transformers
from PIL import Image
from chestxray_covid import Classifier
name, file = sys.argv[1:]
ours = Classifier.from_pretrained(name)
image = Image.open(file).convert("RGB")
model = timm.create_model(f"hf-hub:{name}", pretrained=True).eval().float()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    one = model(transform(image)[None]).softmax(1)[0].tolist()
pipeline = transformers.pipeline("image-classification", model=name)
answers = {a["label"]: a["score"] for a in pipeline(image)}
probabilities = ours.predict_proba(file)[0].tolist()
print(json.dumps([probabilities, one, [answers[c] for c in ours.classes]]))
"""


@pytest.mark.slow
def test_a_repository_is_opened_by_its_name_everywhere(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    SyntheticChestXray(2, image_size_px=300).save(tmp_path / "phantoms")
    file = sorted((tmp_path / "phantoms").rglob("*.png"))[0]
    with HubServer() as server:
        server.publish_folder(BUNDLED / DEFAULT_MODEL)
        command = [sys.executable, "-c", BY_NAME, REPO, str(file)]
        environment = hub_environment(server, tmp_path / "home")
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, *theirs = json.loads(done.stdout.splitlines()[-1])
    assert len(ours) == 3
    assert np.abs(np.array(theirs) - ours).max() < 0.02


def test_a_config_of_ours_has_no_type_that_transformers_would_look_for(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    assert not {"model_type", "auto_map", "architectures"} & set(data)


def _drawings(count: int) -> list[Image.Image]:
    images = SyntheticChestXray(count, classes=CLASSES, image_size_px=128)
    return [images.image(position) for position in range(count)]
