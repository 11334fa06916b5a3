from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from numpy.typing import NDArray

from chestxray_covid.engine_onnx import onnx_model
from chestxray_covid.engine_openvino import openvino_core, openvino_model
from chestxray_covid.engine_torch import FoldedNetwork
from chestxray_covid.errors import CheckpointError
from chestxray_covid.graph import FEATURES, LOGITS, PIXELS, Network, digest, fold
from chestxray_covid.image import Preprocess
from conftest import random_tensors

PREPROCESS = Preprocess(size_px=64, mean=0.3, std=0.4)
Results: TypeAlias = tuple[NDArray[Any], NDArray[Any]]


def lively_tensors() -> dict[str, NDArray[Any]]:
    """Return random weights whose batch norms all do something, as after training."""
    rng = np.random.default_rng(1)
    tensors = random_tensors(3)
    for name, tensor in tensors.items():
        if name.endswith(("running_var", "weight")) and tensor.ndim == 1:
            tensors[name] = rng.uniform(0.7, 1.4, tensor.shape).astype(np.float32)
        elif name.endswith(("running_mean", "bias")):
            tensors[name] = rng.normal(0, 0.2, tensor.shape).astype(np.float32)
    return tensors


@pytest.fixture(scope="module")
def tensors() -> dict[str, NDArray[Any]]:
    return lively_tensors()


@pytest.fixture(scope="module")
def network(tensors: dict[str, NDArray[Any]]) -> Network:
    return fold(tensors, PREPROCESS)


def pixels(count: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 1, 64, 64), dtype=np.uint8)


def normalised(batch: NDArray[np.uint8]) -> torch.Tensor:
    """Return what torchvision's network takes, in double precision, three channels."""
    grey = (torch.from_numpy(batch).double() / 255 - 0.3) / 0.4
    return grey.repeat(1, 3, 1, 1)


@pytest.fixture(scope="module")
def plain(tensors: dict[str, NDArray[Any]]) -> torchvision.models.DenseNet:
    """Return torchvision's own network, in double precision."""
    model = torchvision.models.densenet121(weights=None, num_classes=3).double().eval()
    model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
    return model


@pytest.fixture(scope="module")
def expected(plain: torchvision.models.DenseNet) -> Results:
    """Return logits and features of torchvision's own forward."""
    seen = []
    plain.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        logits = plain(normalised(pixels()))
    return logits.numpy(), seen[0].numpy()


def in_torch(network: Network, batch: int | None) -> Callable[[NDArray[np.uint8]], Results]:
    module = FoldedNetwork(network).eval()

    def run(values: NDArray[np.uint8]) -> Results:
        with torch.inference_mode():
            logits, features = module(torch.from_numpy(values))
        return logits.numpy(), features.numpy()

    return run


def in_openvino(network: Network, batch: int | None) -> Callable[[NDArray[np.uint8]], Results]:
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino_core().compile_model(openvino_model(network, batch=batch), "CPU", exact)

    def run(values: NDArray[np.uint8]) -> Results:
        found = compiled({PIXELS: values})
        return found[LOGITS], found[FEATURES]

    return run


def in_onnx(network: Network, batch: int | None) -> Callable[[NDArray[np.uint8]], Results]:
    model = onnx_model(network, batch=batch)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())

    def run(values: NDArray[np.uint8]) -> Results:
        logits, features = session.run([LOGITS, FEATURES], {PIXELS: values})
        return logits, features

    return run


@pytest.mark.parametrize("runtime", [in_torch, in_openvino, in_onnx])
@pytest.mark.parametrize("batch", [None, 3])
def test_every_runtime_computes_what_torchvision_does(
    runtime: Any, batch: int | None, network: Network, expected: Results
) -> None:
    found = runtime(network, batch)(pixels())
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape) == (np.float32, other.shape)
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("batch", [None, 1])
def test_an_open_batch_takes_any_number_of_images(batch: int | None, network: Network) -> None:
    for runtime in (in_openvino, in_onnx):
        run = runtime(network, batch)
        one = run(pixels(1))
        assert one[0].shape == (1, 3)
        if batch is None:
            np.testing.assert_allclose(run(pixels())[0][:1], one[0], atol=1e-4)


def test_the_first_convolution_takes_grey_levels_borders_included(
    network: Network, plain: torchvision.models.DenseNet
) -> None:
    first = network.steps[0]
    assert first.weight is not None
    assert first.bias is not None
    assert first.weight.shape == (64, 1, 7, 7)
    with torch.inference_mode():
        wanted = torch.relu(plain.features.norm0(plain.features.conv0(normalised(pixels()))))

    def folded(fill: float) -> torch.Tensor:
        edges = ((0, 0), (0, 0), (3, 3), (3, 3))
        padded = np.pad(pixels().astype(np.float64), edges, constant_values=fill)
        weight, bias = (torch.from_numpy(a).double() for a in (first.weight, first.bias))
        return torch.relu(torch.nn.functional.conv2d(torch.from_numpy(padded), weight, bias, 2))

    assert float((folded(first.fill) - wanted).abs().max()) < 1e-5
    assert first.fill == pytest.approx(0.3 * 255)
    assert float((folded(0.0) - wanted).abs()[..., 0].max()) > 0.1, "the border must show here"


def test_half_precision_weights_are_folded_in_double(tensors: dict[str, NDArray[Any]]) -> None:
    half = {k: v.astype(np.float16) if v.dtype.kind == "f" else v for k, v in tensors.items()}
    single = {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in half.items()}
    one, other = fold(half, PREPROCESS), fold(single, PREPROCESS)
    for a, b in zip(one.steps, other.steps, strict=True):
        if a.weight is not None:
            assert a.weight.dtype == np.float32
            assert np.array_equal(a.weight, b.weight)
    assert one.digest != other.digest, "other bytes, another digest"


def test_steps_come_after_what_they_take_and_end_in_the_outputs(network: Network) -> None:
    known = {PIXELS}
    for step in network.steps:
        assert set(step.inputs) <= known
        assert step.name not in known
        known.add(step.name)
    assert [step.name for step in network.steps[-2:]] == [FEATURES, LOGITS]
    assert (network.size_px, network.num_classes) == (64, 3)


def test_the_digest_shows_every_change(tensors: dict[str, NDArray[Any]], network: Network) -> None:
    assert network.digest == digest(dict(reversed(tensors.items())), PREPROCESS)
    other = dict(tensors)
    other["features.norm5.bias"] = np.nextafter(other["features.norm5.bias"], np.float32(9))
    changed = [
        digest(other, PREPROCESS),
        *(digest(tensors, replace(PREPROCESS, **{n: v})) for n, v in CHANGES.items()),
    ]
    assert len({network.digest, *changed}) == 1 + len(changed)


CHANGES = {"size_px": 96, "mean": 0.31, "std": 0.41}


NORM = "features.denseblock2.denselayer3.norm1"


@pytest.mark.parametrize(
    ("name", "value", "layer"),
    [
        (f"{NORM}.weight", 3e38, NORM),
        (f"{NORM}.running_var", -1, NORM),
        (f"{NORM}.running_mean", 1e7, NORM),
        ("features.norm0.weight", 3e38, "features.norm0"),
        ("features.denseblock4.denselayer16.conv2.weight", -2e6, "denselayer16.conv2"),
    ],
)
def test_a_layer_that_overflows_is_named_whatever_a_relu_would_make_of_it(
    name: str, value: float, layer: str, tensors: dict[str, NDArray[Any]]
) -> None:
    broken = {**tensors, name: tensors[name].copy()}
    broken[name].flat[5] = value
    with pytest.raises(CheckpointError, match=rf"overflow: .*{layer} has a value of .*at most"):
        fold(broken, PREPROCESS)
    with pytest.raises(CheckpointError, match="overflow"):
        fold(broken, PREPROCESS, precision="bfloat16")
