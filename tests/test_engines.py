from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray

from chestxray_covid.checkpoint import ModelConfig
from chestxray_covid.engines import ENGINES, Engine, open_engine
from chestxray_covid.errors import CheckpointError
from chestxray_covid.image import Preprocess
from conftest import random_tensors

CONFIG = ModelConfig(
    classes=("normal", "pneumonia", "covid19"), preprocess=Preprocess(size_px=64, mean=0.3, std=0.4)
)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine(CONFIG, random_tensors(3))


def pixels(count: int = 4, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 64, 64), dtype=np.uint8)


def plain_torchvision(batch: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return logits and features, computed in double precision with hooks on a fresh network."""
    model = torchvision.models.densenet121(weights=None, num_classes=3).eval().double()
    model.load_state_dict({k: torch.from_numpy(v) for k, v in random_tensors(3).items()})
    seen = []
    model.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    grey = (torch.from_numpy(batch).double() / 255 - 0.3) / 0.4
    with torch.inference_mode():
        logits = model(grey.repeat(1, 3, 1, 1))
    return logits.numpy(), seen[0].numpy()


@pytest.mark.parametrize("count", [1, 5])
def test_logits_and_features_are_those_of_torchvision(engine: Engine, count: int) -> None:
    logits, features = engine(pixels(count))
    assert (logits.shape, features.shape) == ((count, 3), (count, 1024))
    assert logits.dtype == features.dtype == np.float32
    expected_logits, expected_features = plain_torchvision(pixels(count))
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4)
    np.testing.assert_allclose(features, expected_features, atol=1e-4)


def test_half_precision_weights_are_computed_in_single_precision() -> None:
    half = {
        k: v.astype(np.float16) if v.dtype.kind == "f" else v for k, v in random_tensors(3).items()
    }
    single = {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in half.items()}
    one, other = (open_engine(CONFIG, t)(pixels())[0] for t in (half, single))
    assert np.array_equal(one, other)


def test_the_engine_keeps_its_own_weights_and_leaves_pixels_alone() -> None:
    tensors = random_tensors(3)
    engine, batch = open_engine(CONFIG, tensors), pixels()
    before = engine(batch)[0]
    tensors["classifier.weight"][:] = 0
    assert np.array_equal(engine(batch)[0], before)
    assert np.array_equal(batch, pixels())


def test_threads_get_what_one_thread_gets(engine: Engine) -> None:
    batches = [pixels(2, seed) for seed in range(16)]
    expected = [engine(batch)[0] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: engine(batch)[0], batches))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_best_engine_that_is_installed_is_torch(engine: Engine) -> None:
    named = open_engine(CONFIG, random_tensors(3), engine="torch", device="cpu")
    assert np.array_equal(named(pixels())[0], engine(pixels())[0])
    assert ENGINES == ("auto", "torch")


@pytest.mark.parametrize("engine", ["", "Torch", "openvino", "os.system", None])
def test_an_unknown_engine_is_refused(engine: Any) -> None:
    with pytest.raises(ValueError, match=r"engine must be one of \('auto', 'torch'\), got"):
        open_engine(CONFIG, random_tensors(3), engine=engine)


@pytest.mark.parametrize("device", ["nonsense", "cpu:x", "cuda:99", "cuda:-2", "xpu:7"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used: .* Use 'cpu'"):
        open_engine(CONFIG, random_tensors(3), device=device)


def test_weights_of_other_classes_than_the_config_names_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"classifier.weight has shape \(2, 1024\), expected"):
        open_engine(CONFIG, random_tensors(2))


def test_weights_that_lack_a_tensor_are_refused() -> None:
    tensors = random_tensors(3)
    del tensors["features.conv0.weight"]
    with pytest.raises(CheckpointError, match="tensors is no DenseNet-121 with 3 classes: missing"):
        open_engine(CONFIG, tensors)
