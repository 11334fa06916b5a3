from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from chestxray_covid.checkpoint import ModelConfig
from chestxray_covid.engine_openvino import openvino_core, openvino_model
from chestxray_covid.engines import open_engine
from chestxray_covid.errors import CheckpointError
from chestxray_covid.graph import FEATURES, LOGITS, PIXELS, Network, fold
from chestxray_covid.image import Preprocess
from chestxray_covid.int8 import Int8
from conftest import random_tensors

FIRST = "features.denseblock1.denselayer1"
CONFIG = ModelConfig(classes=("normal", "covid19"), preprocess=Preprocess(size_px=64))


@pytest.fixture(scope="module")
def tensors() -> dict[str, NDArray[Any]]:
    return random_tensors(2)


@pytest.fixture(scope="module")
def network(tensors: dict[str, NDArray[Any]]) -> Network:
    return fold(tensors, CONFIG.preprocess)


def pixels(count: int = 2) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 1, 64, 64), dtype=np.uint8)


def results(network: Network, extra: str) -> tuple[NDArray[np.float32], ...]:
    """Return features, logits and the result of a step, computed in OpenVINO."""
    model = openvino_model(network, batch=2)
    node = next(n for n in model.get_ops() if n.get_friendly_name() == extra)
    model.add_outputs(node.output(0))
    compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({PIXELS: pixels()})
    return found[FEATURES], found[LOGITS], found[2]


@pytest.fixture(scope="module")
def int8(network: Network) -> Int8:
    """Return the ranges that two random images have, for every convolution's input but two."""
    model = openvino_model(network, batch=2)
    names = {s.inputs[0] for s in network.steps if s.op == "convolution"} - {PIXELS}
    nodes = [n for n in model.get_ordered_ops() if n.get_friendly_name() in names]
    model.add_outputs([node.output(0) for node in nodes])
    compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = list(compiled({PIXELS: pixels()}).values())[2:]
    ranges = {
        node.get_friendly_name(): (0.0, float(values.max()))
        for node, values in zip(nodes, found, strict=True)
    }
    return Int8(ranges=ranges, biases={f"{FIRST}.conv1": np.full(128, 0.25, np.float32)})


def test_what_is_saved_is_what_is_read(int8: Int8) -> None:
    read = Int8.from_bytes(int8.to_bytes())
    assert read.ranges.keys() == int8.ranges.keys()
    for name, (low, high) in read.ranges.items():
        assert (low, high) == (0.0, np.float32(int8.ranges[name][1]))
    np.testing.assert_array_equal(read.biases[f"{FIRST}.conv1"], np.full(128, 0.25))
    assert read.digest == int8.digest
    other = Int8(ranges={**int8.ranges, f"{FIRST}.norm1": (0.0, 9.0)}, biases=int8.biases)
    assert other.digest != int8.digest


def test_weights_are_rounded_to_127_levels_of_the_largest_in_a_channel(
    network: Network, int8: Int8
) -> None:
    steps = {step.name: step for step in int8.apply(network).steps}
    for step in network.steps:
        changed = steps[step.name]
        if step.op != "convolution" or step.inputs[0] == PIXELS:
            assert changed.weight is step.weight
            assert changed.scale is None
            continue
        assert changed.weight is not None
        assert changed.scale is not None
        assert changed.weight.dtype == np.int8
        assert (np.abs(changed.weight.astype(int)).max((1, 2, 3)) == 127).all()
        error = np.abs(changed.weight * changed.scale - step.weight)
        assert (error <= 0.5001 * changed.scale).all()
    np.testing.assert_array_equal(steps[f"{FIRST}.conv1"].bias, np.full(128, 0.25))


def test_a_network_in_eight_bits_answers_nearly_as_before(network: Network, int8: Int8) -> None:
    ranges = Int8(ranges=int8.ranges, biases={})
    before, after = (results(n, f"{FIRST}.conv2") for n in (network, ranges.apply(network)))
    for one, other in zip(before, after, strict=True):
        apart = np.abs(one - other).max() / np.abs(one).max()
        assert 0 < apart < 0.05
    # Two roundings, by hand: of the input to 256 levels, and of the weights.
    _, _, inputs = results(ranges.apply(network), f"{FIRST}.conv1")
    high = int8.ranges[f"{FIRST}.conv1"][1]
    levels = np.rint(np.clip(inputs, 0, high) / high * 255)
    assert levels.max() > 200
    step = next(s for s in ranges.apply(network).steps if s.name == f"{FIRST}.conv2")
    assert step.weight is not None
    assert step.scale is not None
    padded = np.pad(levels, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    whole = np.einsum("nchwij,ocij->nohw", windows, step.weight.astype(float), optimize=True)
    expected = whole * (high / 255) * step.scale.reshape(1, -1, 1, 1)
    np.testing.assert_allclose(after[2], expected, atol=0.02 * np.abs(expected).max())


def test_the_engine_computes_in_int8_what_was_quantised(
    tensors: dict[str, NDArray[Any]], network: Network, int8: Int8
) -> None:
    engine = open_engine(CONFIG, tensors, precision="int8", int8=int8)
    assert (engine.name, engine.precision) == ("openvino", "int8")
    features, logits, _ = results(int8.apply(network), f"{FIRST}.conv2")
    for one, other in zip(engine(pixels()), (logits, features), strict=True):
        np.testing.assert_allclose(one, other, atol=0.02 * np.abs(other).max())
    exact = open_engine(CONFIG, tensors, engine="openvino", precision="float32", int8=int8)
    assert np.abs(engine(pixels())[1] - exact(pixels())[1]).max() > 1e-4


def test_int8_is_refused_where_it_cannot_be(tensors: dict[str, NDArray[Any]], int8: Int8) -> None:
    with pytest.raises(CheckpointError, match=r"has no int8\.safetensors, so it cannot"):
        open_engine(CONFIG, tensors, precision="int8")
    with pytest.raises(ValueError, match="engine 'torch' does not compute in int8"):
        open_engine(CONFIG, tensors, engine="torch", precision="int8", int8=int8)


@pytest.mark.parametrize(
    "wrong",
    [
        Int8(ranges={"features.conv9": (0.0, 1.0)}, biases={}),
        Int8(ranges={}, biases={"features.conv0": np.zeros(64, np.float32)}),
        Int8(ranges={}, biases={f"{FIRST}.conv1": np.zeros(64, np.float32)}),
        Int8(ranges={}, biases={f"{FIRST}.norm1": np.zeros(64, np.float32)}),
        Int8(ranges={}, biases={"nothing": np.zeros(64, np.float32)}),
    ],
)
def test_statistics_of_another_network_are_refused(wrong: Int8, network: Network) -> None:
    with pytest.raises(CheckpointError, match="belongs to another network, this one has no such"):
        wrong.apply(network)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a.range", np.array([1, 0], np.float32)),
        ("a.range", np.array([0, np.inf], np.float32)),
        ("a.range", np.array([0, 1, 2], np.float32)),
        ("a.range", np.array([0, 1], np.float16)),
        ("a.bias", np.array([[1]], np.float32)),
        ("a.bias", np.array([np.nan], np.float32)),
        ("a.weight", np.array([1], np.float32)),
    ],
)
def test_an_attachment_that_holds_anything_else_is_refused(name: str, values: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{name[:8]}.* is neither a range, two finite"):
        Int8.from_bytes(save({name: values}))


def test_a_damaged_attachment_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"int8\.safetensors is no safetensors file"):
        Int8.from_bytes(b"damaged")


def test_openvino_tells_its_makers_nothing(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from chestxray_covid.engine_openvino import openvino_core\n"
        "openvino_core()\n"
        "assert 'openvino_telemetry' not in sys.modules\n"
    )
    home = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=home, check=True)
    assert not list(tmp_path.iterdir()), "where openvino_telemetry keeps who and what it counts"
