from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from chestxray_covid.checkpoint import ModelConfig
from chestxray_covid.engine_openvino import (
    OpenVinoEngine,
    largest_values,
    openvino_core,
    openvino_model,
)
from chestxray_covid.engines import open_engine
from chestxray_covid.errors import CheckpointError
from chestxray_covid.graph import FEATURES, LOGITS, PIXELS, Network, Step, fold
from chestxray_covid.image import Preprocess
from chestxray_covid.int8 import Int8, rounded_results
from chestxray_covid.processor import cores
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
    """Return the largest values that two random images have."""
    names = list(rounded_results(network))
    assert len(names) == 119, "every convolution's input but the first"
    found = Int8(largest=largest_values(network, names, pixels()))
    assert len(found.largest["features.denseblock4.denselayer16.norm1"]) == 992
    return found


@pytest.mark.slow
def test_largest_values_are_those_of_every_pixel_of_every_image(
    network: Network, int8: Int8
) -> None:
    assert len(int8.largest) == 119, "what 120 convolutions take, but the first"
    for name in (f"{FIRST}.norm1", f"{FIRST}.conv1", "features.transition2.pool"):
        *_, found = results(network, name)
        np.testing.assert_allclose(int8.largest[name], found.max((0, 2, 3)), rtol=1e-4)


def test_what_is_saved_is_what_is_read(int8: Int8) -> None:
    read = Int8.from_bytes(int8.to_bytes())
    assert read.largest.keys() == int8.largest.keys()
    for name, values in read.largest.items():
        np.testing.assert_array_equal(values, int8.largest[name])
    assert read.digest == int8.digest
    other = Int8(largest={**int8.largest, f"{FIRST}.norm1": np.ones(64, np.float32)})
    assert other.digest != int8.digest


@pytest.mark.slow
def test_scaling_every_channel_changes_nothing_in_exact_numbers(
    network: Network, int8: Int8
) -> None:
    steps = tuple(
        replace(s, rounded=False)
        if s.scale is None
        else replace(s, weight=exact_weight(network, int8, s), scale=None, rounded=False)
        for s in int8.apply(network).steps
    )
    names = (f"{FIRST}.conv2", "features.transition1.conv")
    for name in names:
        before, after = (results(n, name) for n in (network, replace(network, steps=steps)))
        for one, other in zip(before, after, strict=True):
            assert np.abs(one - other).max() < 1e-4 * np.abs(one).max()
    for name in (f"{FIRST}.norm1", f"{FIRST}.conv1", "features.transition1.pool"):
        *_, scaled = results(replace(network, steps=steps), name)
        seen = int8.largest[name] > 1e-3 * int8.largest[name].max()
        assert seen.mean() > 0.5
        np.testing.assert_allclose(scaled.max((0, 2, 3))[seen], 1, rtol=1e-4)


def exact_weight(network: Network, int8: Int8, step: Step) -> NDArray[np.float32]:
    """Return the weight of a scaled convolution before it is rounded, by the definition."""
    weight = next(s.weight for s in network.steps if s.name == step.name)
    assert weight is not None
    taken, made = int8.largest[step.inputs[0]], int8.largest.get(step.name)
    weight = weight * np.maximum(taken, 1e-3 * taken.max()).reshape(1, -1, 1, 1)
    if made is not None:
        weight = weight / np.maximum(made, 1e-3 * made.max()).reshape(-1, 1, 1, 1)
    return weight.astype(np.float32)


def test_weights_are_rounded_to_127_levels_of_the_largest_in_a_channel(
    network: Network, int8: Int8
) -> None:
    for step in int8.apply(network).steps:
        if step.op != "convolution" or step.inputs[0] == PIXELS:
            assert step.scale is None
            assert step.weight is None or step.weight.dtype == np.float32
            continue
        assert step.weight is not None
        assert step.scale is not None
        assert step.weight.dtype == np.int8
        assert (np.abs(step.weight.astype(int)).max((1, 2, 3)) == 127).all()
        error = np.abs(step.weight * step.scale - exact_weight(network, int8, step))
        assert (error <= 0.5001 * step.scale).all()


@pytest.mark.slow
def test_a_network_in_eight_bits_answers_nearly_as_before(
    network: Network, tensors: dict[str, NDArray[Any]], int8: Int8
) -> None:
    rounded = int8.apply(network)
    before, after = (results(n, f"{FIRST}.conv2") for n in (network, rounded))
    for one, other in zip(before[::2], after[::2], strict=True):
        apart = np.abs(one - other).max() / np.abs(one).max()
        assert 0 < apart < 0.05
    # Logits of random weights are small beside what they are sums of: those of the own features.
    features, logits, _ = after
    weight, bias = (tensors[f"classifier.{part}"] for part in ("weight", "bias"))
    np.testing.assert_allclose(logits, features @ weight.T + bias, atol=1e-4)
    # Two roundings, by hand: of the input to 256 levels, and of the weights.
    _, _, inputs = results(rounded, f"{FIRST}.conv1")
    levels = np.rint(np.clip(inputs, 0, 1) * 255)
    assert levels.max() == 255
    step = next(s for s in rounded.steps if s.name == f"{FIRST}.conv2")
    assert step.weight is not None
    assert step.scale is not None
    padded = np.pad(levels, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    whole = np.einsum("nchwij,ocij->nohw", windows, step.weight.astype(float), optimize=True)
    expected = whole / 255 * step.scale.reshape(1, -1, 1, 1)
    apart = np.abs(after[2] - expected) / np.abs(expected).max()
    # Without VNNI, a processor adds two products in 16 bits, where some pairs are too large.
    assert np.median(apart) < 1e-6
    assert apart.max() < 0.05


@pytest.mark.slow
def test_a_channel_of_small_values_is_rounded_as_finely_as_one_of_large_values(
    tensors: dict[str, NDArray[Any]],
) -> None:
    uneven = dict(tensors)
    small = np.array([1e-2] * 32 + [1] * 32, np.float32)
    for part in ("weight", "bias"):
        uneven[f"{FIRST}.norm1.{part}"] = tensors[f"{FIRST}.norm1.{part}"] * small
    weight = tensors[f"{FIRST}.conv1.weight"]
    uneven[f"{FIRST}.conv1.weight"] = weight / small.reshape(1, -1, 1, 1)
    found = []
    for given in (tensors, uneven):
        network = fold(given, CONFIG.preprocess)
        names = list(rounded_results(network))
        own = Int8(largest=largest_values(network, names, pixels())).apply(network)
        found.append(results(own, f"{FIRST}.conv2")[2])
    np.testing.assert_allclose(found[0], found[1], atol=0.01 * np.abs(found[0]).max())


def test_a_channel_that_is_never_seen_is_not_blown_up(network: Network, int8: Int8) -> None:
    name = f"{FIRST}.norm1"
    few = int8.largest[name].copy()
    quiet = int(few.argmin())
    few[quiet] = 0
    steps = Int8(largest={**int8.largest, name: few}).apply(network).steps
    before, after = (
        next(s.weight for s in found if s.name == name) for found in (network.steps, steps)
    )
    assert before is not None
    assert after is not None
    expected = before[quiet] / (1e-3 * few.max())
    np.testing.assert_allclose(after[quiet], expected, rtol=1e-5)


@pytest.mark.slow
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


def test_statistics_of_another_network_are_refused(network: Network, int8: Int8) -> None:
    for name, values in (
        ("features.conv9", np.ones(64, np.float32)),
        (f"{FIRST}.norm1", np.ones(63, np.float32)),
    ):
        strange = Int8(largest={**int8.largest, name: values})
        with pytest.raises(CheckpointError, match=f"another network.* does not fit '{name}'"):
            strange.apply(network)
    fewer = Int8(largest={k: v for k, v in int8.largest.items() if k != f"{FIRST}.conv1"})
    with pytest.raises(CheckpointError, match=r"does not fit .*conv1'\. Quantise the checkpoint"):
        fewer.apply(network)


@pytest.mark.parametrize(
    "values",
    [
        np.array([-1, 0], np.float32),
        np.array([0, np.inf], np.float32),
        np.array([0, 2e6], np.float32),
        np.array([0, 1e-30], np.float32),
        np.array([1, np.nan], np.float32),
        np.array([], np.float32),
        np.array([0, 1], np.float16),
        np.array([[1]], np.float32),
        np.array([0, 0], np.float32),
    ],
)
def test_an_attachment_that_holds_anything_else_is_refused(values: Any) -> None:
    with pytest.raises(CheckpointError, match=r"values of 'a\.norm1' must be float32, none neg"):
        Int8.from_bytes(save({"a.norm1": values}))


def test_an_attachment_of_an_earlier_version_is_named() -> None:
    earlier = {"features.norm5.range": np.array([-1, 1], np.float32)}
    with pytest.raises(
        CheckpointError, match=r"here was made by an earlier version .* or take anot"
    ):
        Int8.from_bytes(save(earlier), "here")


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


@pytest.mark.slow
@pytest.mark.skipif(cores() < 2, reason="with one core there is one copy")
def test_the_copy_for_many_images_takes_the_place_of_the_other_also_amid_calls(
    tensors: dict[str, NDArray[Any]], int8: Int8
) -> None:
    engine = OpenVinoEngine(tensors, CONFIG.preprocess, precision="int8", int8=int8)
    images = pixels(16)
    alone = np.concatenate([engine(image[np.newaxis])[0] for image in images])
    assert engine._one is not None
    with ThreadPoolExecutor(6) as pool:  # some for few images, some for many, at the same time
        parts = [images[k : k + 1] for k in range(16)] + [images] * 4
        found = list(pool.map(lambda part: engine(part)[0], parts[::-1] + parts))
    for part, logits in zip(parts[::-1] + parts, found, strict=True):
        first = int(np.flatnonzero((images == part[0]).all((1, 2, 3)))[0])
        np.testing.assert_allclose(logits, alone[first : first + len(part)], atol=1e-6)
    assert engine._one is None
    assert engine._many is not None
    exact = OpenVinoEngine(tensors, CONFIG.preprocess, precision="float32")
    exact(images)
    assert exact._one is not None
