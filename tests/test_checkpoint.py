from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chestxray_covid.checkpoint import (
    CONFIG_NAME,
    FORMAT_VERSION,
    WEIGHTS_NAME,
    ModelConfig,
    load_attachment,
    load_checkpoint,
    load_config,
    save_checkpoint,
)
from chestxray_covid.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from chestxray_covid.files import is_folder, parse_json, read_json, write_files
from chestxray_covid.image import Preprocess
from chestxray_covid.tensors import densenet121_shapes, read_tensors
from conftest import random_tensors

Tensors = dict[str, NDArray[Any]]
CLASSES = ("normal", "covid19")
CONFIG = ModelConfig(classes=CLASSES)
COUNTER = "features.norm0.num_batches_tracked"
CONV = "features.conv0.weight"


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """Return weights of two classes; do not change them."""
    return random_tensors(2)


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory, tensors: Tensors) -> bytes:
    """Return the bytes of valid weights of two classes."""
    folder = tmp_path_factory.mktemp("good")
    save_checkpoint(folder, CONFIG, tensors)
    return (folder / WEIGHTS_NAME).read_bytes()


def half(tensors: Tensors) -> Tensors:
    return {k: v.astype(np.float16) if v.dtype.kind == "f" else v for k, v in tensors.items()}


def plant(folder: Path, weights: bytes) -> Path:
    """Write a checkpoint of these weights whose hash fits, as an attacker would."""
    data = CONFIG.to_dict() | {"weights_sha256": hashlib.sha256(weights).hexdigest()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(data))
    (folder / WEIGHTS_NAME).write_bytes(weights)
    return folder


# ---------------------------------------------------------------- round trip


def same(one: Tensors, other: Tensors) -> bool:
    return list(one) == list(other) and all(
        one[k].dtype == other[k].dtype and np.array_equal(one[k], other[k]) for k in one
    )


@pytest.mark.parametrize("precision", ["single", "half"])
def test_weights_come_back_bit_by_bit_in_their_precision(
    tmp_path: Path, tensors: Tensors, precision: str
) -> None:
    given = half(tensors) if precision == "half" else tensors
    saved = save_checkpoint(tmp_path / "new" / "run", CONFIG, given)
    config, found = load_checkpoint(tmp_path / "new" / "run")
    assert config == saved
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in given.items()}
    assert all(np.array_equal(found[k], given[k]) for k in given)
    assert sorted(p.name for p in (tmp_path / "new" / "run").iterdir()) == [
        CONFIG_NAME,
        WEIGHTS_NAME,
    ]


def test_views_that_are_not_contiguous_come_back_right(tmp_path: Path, tensors: Tensors) -> None:
    turned = tensors | {CONV: np.asfortranarray(tensors[CONV])}
    save_checkpoint(tmp_path, CONFIG, turned)
    assert np.array_equal(load_checkpoint(tmp_path)[1][CONV], tensors[CONV])


def test_the_hash_in_the_config_is_that_of_the_file(tmp_path: Path, tensors: Tensors) -> None:
    saved = save_checkpoint(tmp_path, CONFIG, tensors)
    digest = hashlib.sha256((tmp_path / WEIGHTS_NAME).read_bytes()).hexdigest()
    assert saved.weights_sha256 == digest == load_config(tmp_path).weights_sha256


def test_saving_again_replaces_the_checkpoint_and_nothing_else(
    tmp_path: Path, tensors: Tensors
) -> None:
    save_checkpoint(tmp_path, CONFIG, tensors)
    (tmp_path / "history.json").write_text("{}")
    three = ModelConfig(classes=("a", "b", "c"))
    save_checkpoint(tmp_path, three, random_tensors(3))
    config, found = load_checkpoint(tmp_path)
    assert config.classes == ("a", "b", "c")
    assert found["classifier.bias"].shape == (3,)
    assert (tmp_path / "history.json").read_text() == "{}"


@pytest.mark.parametrize("num_classes", [2, 3, 14])
def test_shapes_are_those_of_torchvision_in_its_order(num_classes: int) -> None:
    with torch.device("meta"):
        model = torchvision.models.densenet121(weights=None, num_classes=num_classes)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert list(densenet121_shapes(num_classes).items()) == list(expected.items())


# ---------------------------------------------------------------- attachments

ATTACHED = {"gate.safetensors": b"\x00\x01" * 1000, "lungs.json": b"{}"}


def test_attachments_come_back_and_the_config_names_their_hashes(
    tmp_path: Path, tensors: Tensors
) -> None:
    saved = save_checkpoint(tmp_path / "run", CONFIG, tensors, ATTACHED)
    config = load_config(tmp_path / "run")
    assert config == saved
    assert config.attachments == {k: hashlib.sha256(v).hexdigest() for k, v in ATTACHED.items()}
    assert {n: load_attachment(tmp_path / "run", config, n) for n in ATTACHED} == ATTACHED
    assert load_attachment(tmp_path / "run", config, "other.json") is None
    assert load_attachment(tmp_path / "run", config, "config.json") is None
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {CONFIG_NAME, WEIGHTS_NAME, *ATTACHED}


def test_saving_without_attachments_means_none(tmp_path: Path, tensors: Tensors) -> None:
    saved = save_checkpoint(tmp_path, CONFIG, tensors, ATTACHED)
    assert save_checkpoint(tmp_path, saved, tensors).attachments == {}
    assert load_attachment(tmp_path, load_config(tmp_path), "lungs.json") is None


def test_a_damaged_or_missing_attachment_is_refused(tmp_path: Path, tensors: Tensors) -> None:
    config = save_checkpoint(tmp_path, CONFIG, tensors, ATTACHED)
    path, good = tmp_path / "gate.safetensors", ATTACHED["gate.safetensors"]
    for bad in (good[:-1], good + b"x", b"", bytes([good[0] ^ 1]) + good[1:], good * 20_000):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"gate\.safetensors is not the file that"):
            load_attachment(tmp_path, config, path.name)
    path.unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"gate\.safetensors is missing beside"):
        load_attachment(tmp_path, config, path.name)
    path.mkdir()
    with pytest.raises(CheckpointNotFoundError, match=r"gate\.safetensors is missing beside"):
        load_attachment(tmp_path, config, path.name)


@pytest.mark.parametrize(
    ("attachments", "reason"),
    [
        ({"config.json": b"{}"}, "neither config.json nor model.safetensors"),
        ({"../gate.json": b"{}"}, "attachments must be named like"),
        ({"gate.json": bytes(20_000_001)}, "gate.json has 20000001 bytes, expected at most"),
    ],
)
def test_an_impossible_attachment_is_not_saved_and_nothing_is_written(
    tmp_path: Path, tensors: Tensors, attachments: dict[str, bytes], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        save_checkpoint(tmp_path / "new", CONFIG, tensors, attachments)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- config


def json_values() -> st.SearchStrategy[Any]:
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
    )
    return st.recursive(
        leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3)
    )


names = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=100)
fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
configs = st.builds(
    ModelConfig,
    classes=st.lists(names, min_size=2, max_size=20, unique=True).map(tuple),
    preprocess=st.builds(
        Preprocess, size_px=st.integers(32, 2048), mean=fractions, std=st.floats(0.001, 1)
    ),
    threshold=fractions,
    threshold_origin=st.text(),
    weights_sha256=digests | st.just(""),
    attachments=st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_]{0,40}\.(safetensors|json)", fullmatch=True).filter(
            lambda name: name not in (CONFIG_NAME, WEIGHTS_NAME)
        ),
        digests,
        max_size=3,
    ),
    provenance=st.dictionaries(st.text(), json_values(), max_size=4),
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(configs)
def test_any_config_survives_its_json(config: ModelConfig) -> None:
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert ModelConfig.from_dict(json.loads(text)) == config


def test_numbers_of_numpy_become_pythons() -> None:
    preprocess = Preprocess(size_px=np.int64(64), mean=np.float32(0.5), std=np.float64(0.25))
    config = ModelConfig(classes=("a", "b"), preprocess=preprocess, threshold=np.float32(0.25))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert {type(v) for v in (preprocess.size_px, preprocess.mean, config.threshold)} == {
        int,
        float,
    }
    switches = ({"size_px": True}, {"mean": True}, {"std": np.True_}, {"std": np.array(True)})
    for odd in (*switches, {"size_px": np.nan}):
        with pytest.raises(TypeError, match=f"{next(iter(odd))} must be a (whole )?number"):
            Preprocess(**odd)


def test_equal_configs_are_one_in_a_set() -> None:
    config = ModelConfig(classes=("a", "b"), provenance={"seed": 1})
    assert {config, ModelConfig.from_dict(config.to_dict())} == {config}
    assert len({config, ModelConfig(classes=("a", "b"), provenance={"seed": 2})}) == 2


def test_a_config_says_what_it_is() -> None:
    data = CONFIG.to_dict()
    assert data["format_version"] == FORMAT_VERSION == 2
    assert data["architecture"] == "densenet121"
    assert data["classes"] == ["normal", "covid19"]
    assert data["preprocess"] == {"size_px": 224, "mean": 0.449, "std": 0.226, "resize": "squash"}


def test_a_config_says_the_same_in_the_words_of_timm() -> None:
    preprocess = Preprocess(size_px=160, mean=0.5, std=0.25)
    data = ModelConfig(classes=("a", "b", "c"), preprocess=preprocess).to_dict()
    assert (data["num_classes"], data["num_features"]) == (3, 1024)
    assert data["label_names"] == ["a", "b", "c"]
    assert data["pretrained_cfg"]["input_size"] == [3, 160, 160]
    assert data["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    assert data["pretrained_cfg"]["std"] == [0.25, 0.25, 0.25]
    assert data["pretrained_cfg"]["crop_mode"] == "squash"
    assert data["pretrained_cfg"]["num_classes"] == 3
    assert "model_type" not in data


def valid() -> dict[str, Any]:
    return CONFIG.to_dict() | {"weights_sha256": "0" * 64}


HOSTILE_FIELDS: list[tuple[str, Any, str]] = [
    ("format_version", 1, "format_version is '1', expected 2: .*Train again"),
    ("format_version", 0, "format_version is '0', expected 2: .*Train again"),
    ("format_version", 3, "format_version is '3', expected 2: .*the version that wrote it"),
    ("format_version", "1", "format_version is '1'"),
    ("format_version", 2.0, "format_version is '2.0'"),
    ("format_version", True, "format_version is 'True'"),
    ("format_version", None, "format_version is 'None'"),
    ("format_version", [1], r"format_version is '\[1\]'"),
    ("architecture", "resnet50", "architecture is 'resnet50', expected 'densenet121'"),
    ("architecture", "os.system", "architecture is 'os.system'"),
    ("architecture", "../../models", "architecture is '../../models'"),
    ("architecture", None, "architecture must be text, got None"),
    ("classes", [], "classes must be 2 to 1000 different printable names"),
    ("classes", ["normal"], "classes must be 2 to 1000"),
    ("classes", ["normal", "normal"], "classes must be 2 to 1000"),
    ("classes", ["normal", ""], "classes must be 2 to 1000"),
    ("classes", ["normal", "a\nb"], "classes must be 2 to 1000"),
    ("classes", ["normal", "\x1b[2J"], "classes must be 2 to 1000"),
    ("classes", ["normal", "\u202egpj.exe"], "classes must be 2 to 1000"),
    ("classes", ["normal", "x" * 101], "classes must be 2 to 1000"),
    ("classes", ["normal", 1], "classes must be 2 to 1000"),
    ("classes", ["normal", None], "classes must be 2 to 1000"),
    ("classes", [["normal"], ["covid19"]], "classes must be 2 to 1000"),
    ("classes", [str(n) for n in range(1001)], "classes must be 2 to 1000"),
    ("classes", [str(n) for n in range(50_000)], "classes must be 2 to 1000"),
    ("classes", "normal", "classes must be a list, got 'normal'"),
    ("classes", {"normal": 0, "covid19": 1}, "classes must be a list"),
    ("classes", 1_000_000_000, "classes must be a list"),
    ("threshold", 0, r"threshold must be inside \(0, 1\), got 0"),
    ("threshold", 1.0, r"threshold must be inside \(0, 1\), got 1.0"),
    ("threshold", -0.5, r"threshold must be inside \(0, 1\)"),
    ("threshold", 10**4000, r"threshold must be inside \(0, 1\)"),
    ("threshold", "0.5", "threshold must be a number, got '0.5'"),
    ("threshold", True, "threshold must be a number, got True"),
    ("threshold", None, "threshold must be a number"),
    ("threshold_origin", 3, "threshold_origin must be text, got 3"),
    ("threshold_origin", ["x" * 400_000], "threshold_origin must be text, got "),
    ("threshold", "x" * 400_000, "threshold must be a number, got 'x"),
    ("provenance", "x" * 400_000, "provenance must be an object, got 'x"),
    ("\x1b[31m" + "x" * 400_000, 1, r"unknown fields: \\x1b\[31mx+….*again\.$"),
    ("weights_sha256", "0" * 63, "weights_sha256 must be 64 hex digits"),
    ("weights_sha256", "G" * 64, "weights_sha256 must be 64 hex digits"),
    ("weights_sha256", "A" * 64, "weights_sha256 must be 64 hex digits"),
    ("weights_sha256", "0" * 64 + "\n", "weights_sha256 must be 64 hex digits"),
    ("weights_sha256", 0, "weights_sha256 must be text, got 0"),
    ("attachments", [], "attachments must be an object of at most 16 files"),
    ("attachments", {f"a{n}.json": "0" * 64 for n in range(17)}, "attachments must be an object"),
    ("attachments", {"../a.json": "0" * 64}, "attachments must be named like gate.safetensors"),
    ("attachments", {"/etc/passwd": "0" * 64}, "attachments must be named like"),
    ("attachments", {"a/b.json": "0" * 64}, "attachments must be named like"),
    ("attachments", {"gate.pkl": "0" * 64}, "attachments must be named like"),
    ("attachments", {"Gate.json": "0" * 64}, "attachments must be named like"),
    ("attachments", {"gate.json\n": "0" * 64}, "attachments must be named like"),
    ("attachments", {"a" * 42 + ".json": "0" * 64}, "attachments must be named like"),
    ("attachments", {"config.json": "0" * 64}, "neither config.json nor model.safetensors"),
    ("attachments", {"model.safetensors": "0" * 64}, "neither config.json nor model.safetensors"),
    ("attachments", {"gate.json": "0" * 63}, "attachments: gate.json must have 64 hex digits"),
    ("attachments", {"gate.json": None}, "attachments: gate.json must have 64 hex digits"),
    ("num_classes", 1_000_000_000, "num_classes is '1000000000', but classes and preprocess make"),
    ("num_classes", -1, "num_classes is '-1', but .* make it 2"),
    ("num_classes", "2", "num_classes is '2', but .* make it 2"),
    ("num_classes", None, "num_classes is 'None'"),
    ("num_features", 10**9, "num_features is '1000000000', but .* make it 1024"),
    ("label_names", ["covid19", "normal"], "label_names is .* make it .'normal', 'covid19'"),
    ("label_names", [str(n) for n in range(50_000)], "label_names is"),
    ("dtype", "float16", "dtype is 'float16', but .* make it 'float32'"),
    ("dtype", {"$ref": "os.system"}, "dtype is"),
    ("pretrained_cfg", {}, "pretrained_cfg is '{}', but .*'crop_mode': 'squash'"),
    ("pretrained_cfg", {"url": "http://127.0.0.1/model.bin"}, "pretrained_cfg is"),
    ("chestxray_covid_version", {}, "chestxray_covid_version must be text"),
    ("provenance", [], r"provenance must be an object, got \[\]"),
    ("provenance", "x", "provenance must be an object, got 'x'"),
    ("preprocess", None, "preprocess must have exactly the fields"),
    ("preprocess", {"size_px": 224}, "preprocess must have exactly the fields"),
]
HOSTILE_PREPROCESS: list[tuple[str, Any, str]] = [
    ("size_px", 10**9, "preprocess is impossible: size_px must be in 32 to 2048"),
    ("size_px", -1, "size_px must be in 32 to 2048"),
    ("size_px", "224", "size_px must be a whole number"),
    ("size_px", 224.0, "size_px must be a whole number"),
    ("mean", [0.4, 0.4, 0.4], "mean must be a number"),
    ("mean", 2, r"mean must be a fraction of white in \[0, 1\]"),
    ("std", 0, r"std must be a fraction of white in \[0.001, 1\]"),
    ("std", [0.2], "std must be a number"),
    ("resize", "__import__", 'resize must be "squash"'),
    ("resize", ["squash"], 'resize must be "squash"'),
]


def written(folder: Path, data: Any) -> Path:
    (folder / CONFIG_NAME).write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(("name", "value", "reason"), HOSTILE_FIELDS)
def test_an_impossible_field_is_refused_by_name(
    tmp_path: Path, name: str, value: Any, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        load_config(written(tmp_path, valid() | {name: value}))
    assert str(tmp_path / CONFIG_NAME) in str(caught.value)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize(("name", "value", "reason"), HOSTILE_PREPROCESS)
def test_an_impossible_preprocessing_is_refused(
    tmp_path: Path, name: str, value: Any, reason: str
) -> None:
    data = valid()
    data["preprocess"][name] = value
    with pytest.raises(ConfigError, match=reason):
        load_config(written(tmp_path, data))


@pytest.mark.parametrize("name", sorted(set(valid()) - {"format_version"}))
def test_a_missing_field_is_named(tmp_path: Path, name: str) -> None:
    data = valid()
    del data[name]
    with pytest.raises(
        ConfigError,
        match=rf"unknown fields: none; missing: {name}\. Fetch or save the checkpoint again\.$",
    ):
        load_config(written(tmp_path, data))


def test_a_config_without_a_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format_version is 'None', expected 2"):
        load_config(written(tmp_path, {"architecture": "densenet121", "num_classes": 2}))


def test_unknown_fields_are_named_but_not_all_of_a_thousand(tmp_path: Path) -> None:
    extra = {f"x{n:04d}": 1 for n in range(1000)}
    with pytest.raises(ConfigError, match="x0000, x0001, x0002 and 997 more; missing: none"):
        load_config(written(tmp_path, valid() | extra))


def test_keys_that_are_no_text_are_unknown_fields() -> None:
    with pytest.raises(ConfigError, match="unknown fields: 1"):
        ModelConfig.from_dict({**valid(), 1: 2})


@pytest.mark.parametrize("data", [[], "x", 1, None, True])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, data: Any) -> None:
    with pytest.raises(ConfigError, match=f"Expected a JSON object, got {type(data).__name__}"):
        load_config(written(tmp_path, data))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"classes": ["normal", "covid19"]}, "classes must be 2 to 1000.*as a tuple, got"),
        ({"threshold": math.nan}, r"threshold must be inside \(0, 1\)"),
        ({"preprocess": {"size_px": 64}}, "preprocess must be a Preprocess"),
        ({"format_version": 1}, "format_version is 1, chestxray-covid here writes 2"),
        ({"attachments": None}, "attachments must be an object"),
        ({"provenance": None}, "provenance must be an object"),
    ],
)
def test_a_config_cannot_be_made_wrong(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ModelConfig(**{"classes": CLASSES, **changes})


NO_JSON = {
    "empty": (b"", "cannot be read as JSON"),
    "cut": (json.dumps(valid()).encode()[:-1], "cannot be read as JSON"),
    "two": (b"{}{}", "cannot be read as JSON"),
    "zeros": (bytes(1000), "cannot be read as JSON"),
    "HTML": (b"<html>404</html>", "cannot be read as JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", "cannot be read as JSON"),
    "UTF-16": ("{}".encode("utf-16"), "cannot be read as JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "cannot be read as JSON"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
    "NaN": (b'{"threshold": NaN}', "holds NaN or an infinite number"),
    "Infinity": (b'{"provenance": {"a": [1, Infinity]}}', "holds NaN or an infinite number"),
    "-Infinity": (b"[-Infinity]", "holds NaN or an infinite number"),
    "1e999": (b"[[1e999]]", "holds NaN or an infinite number"),
    "twice": (b'{"a": {"threshold": 0.1, "threshold": 0.1}}', "names 'threshold' twice"),
    "21 deep": (b"[" * 21 + b"]" * 21, "nested deeper than 20"),
    "mixed, 40 deep": (b'{"a": [' * 20 + b"]}" * 20, "nested deeper than 20"),
    "200,000 deep": (b"[" * 200_000 + b"]" * 200_000, "nested deeper than 20"),
    "200,000 open": (b"[" * 200_000, "nested deeper than 20"),
    "2 MB": (b'{"a": "' + b"x" * 2_000_000 + b'"}', "more than 500000 bytes, too large"),
    "one byte too long": (b" " * 500_001, "more than 500000 bytes, too large"),
    # Quadratic for a regular expression that looks for strings: this took hours once.
    "escaped quotes without end": (b'"' + b'\\"' * 240_000, "cannot be read as JSON"),
    "490,000 letters": (b'"' + b"x" * 490_000 + b'"', "Expected a JSON object, got str"),
    "150,000 lists": (b"[" + b"[]," * 150_000 + b"[]]", "Expected a JSON object, got list"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NO_JSON)
def test_a_config_that_is_no_strict_small_json_is_refused(tmp_path: Path, kind: str) -> None:
    content, reason = NO_JSON[kind]
    (tmp_path / CONFIG_NAME).write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_config(tmp_path)
    assert str(tmp_path / CONFIG_NAME) in str(caught.value)


def test_a_name_that_stands_twice_is_refused_and_elsewhere_again_is_not() -> None:
    assert parse_json(b'{"a": {"b": 1}, "b": [{"a": 2}, {"a": 3}]}')["b"] == [{"a": 2}, {"a": 3}]
    with pytest.raises(ConfigError, match="names 'b' twice"):
        parse_json(b'[{"a": {"b": 1, "c": 2, "b": 1}}]')


def test_brackets_within_text_are_no_nesting(tmp_path: Path) -> None:
    config = ModelConfig(classes=CLASSES, provenance={"note": "[{" * 500 + '"\\'})
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config.to_dict()))
    assert load_config(tmp_path) == config


def test_a_json_file_that_cannot_be_opened_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: .*Is a directory"):
        read_json(tmp_path)


# ---------------------------------------------------------------- what is not there


@pytest.mark.parametrize(
    "make", [lambda p: p / "nothing", lambda p: p, lambda p: p / ("x" * 300), lambda p: p / "a\0b"]
)
def test_a_missing_checkpoint_is_not_found(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json is missing. A checkpoint is"):
        load_checkpoint(make(tmp_path))


def test_missing_weights_are_not_found(tmp_path: Path) -> None:
    written(tmp_path, valid())
    with pytest.raises(CheckpointNotFoundError, match=r"model\.safetensors is missing beside"):
        load_checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path: Path, name: str) -> None:
    written(tmp_path, valid())
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointNotFoundError, match=f"{name} is missing"):
        load_checkpoint(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_weights_that_cannot_be_read_are_a_checkpoint_error(tmp_path: Path) -> None:
    written(tmp_path, valid())
    (tmp_path / WEIGHTS_NAME).symlink_to("/proc/self/mem")  # reading at 0 is an I/O error
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: .*Errno"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"), [("", True), ("file", False), ("none", False), ("x" * 300, False)]
)
def test_whether_something_is_a_folder_is_told_of_any_name(
    tmp_path: Path, name: str, expected: bool
) -> None:
    (tmp_path / "file").touch()
    assert is_folder(tmp_path / name) is expected


# ---------------------------------------------------------------- damaged and hostile weights


def test_one_flipped_byte_anywhere_is_noticed(tmp_path: Path, good_file: bytes) -> None:
    folder = plant(tmp_path, good_file)
    positions = [0, 7, 8, len(good_file) - 1]
    positions += np.random.default_rng(0).integers(len(good_file), size=16).tolist()
    noticed = 0
    for position in positions:
        damaged = bytearray(good_file)
        damaged[position] ^= 1 << (position % 8)
        (folder / WEIGHTS_NAME).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="its SHA-256 differs"):
            load_checkpoint(folder)
        noticed += 1
    assert noticed == 20


def test_a_checkpoint_whose_config_never_knew_its_weights_is_refused(
    tmp_path: Path, good_file: bytes
) -> None:
    folder = plant(tmp_path, good_file)
    written(folder, valid() | {"weights_sha256": ""})
    with pytest.raises(CheckpointError, match="its SHA-256 differs"):
        load_checkpoint(folder)


def changed(tensors: Tensors, name: str, value: Any) -> Tensors:
    array = tensors[name].copy()
    array.flat[-1] = value
    return tensors | {name: array}


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != CONV}, f"missing {CONV}, unexpected"),
    "none": (lambda t: {}, "missing features.conv0.weight, .* and 724 more, unexpected none"),
    "extra": (lambda t: t | {"more": t[CONV]}, "missing none, unexpected more"),
    "wrapped": (
        lambda t: {f"module.{name}": array for name, array in t.items()},
        r"unexpected module\.features.* Take 'module\.' off the names",
    ),
    "wrapped in part": (
        lambda t: {f"module.{n}" if n == CONV else n: array for n, array in t.items()},
        f"missing {CONV}, unexpected module.{CONV}. Take 'module.' off",
    ),
    "misshapen": (
        lambda t: t | {CONV: t[CONV][:, :1]},
        rf"{CONV} has shape \(64, 1, 7, 7\), expected \(64, 3, 7, 7\)",
    ),
    "scalar as vector": (
        lambda t: t | {COUNTER: t[COUNTER][None]},
        rf"{COUNTER} has shape \(1,\), expected \(\)",
    ),
    "three classes": (
        lambda t: t | {"classifier.bias": np.zeros(3, np.float32)},
        r"classifier.bias has shape \(3,\), expected \(2,\)",
    ),
    "NaN": (lambda t: changed(t, CONV, np.nan), f"{CONV} has values that are not finite"),
    "infinite": (lambda t: changed(t, CONV, np.inf), f"{CONV} has values that are not finite"),
    "infinite in half precision": (
        lambda t: changed(half(t), "classifier.weight", -np.inf),
        "classifier.weight has values that are not finite",
    ),
    "double": (
        lambda t: t | {CONV: t[CONV].astype(np.float64)},
        f"{CONV} has type float64, expected float16 or float32",
    ),
    "integers": (
        lambda t: t | {CONV: t[CONV].astype(np.int64)},
        f"{CONV} has type int64, expected float16 or float32",
    ),
    "counter as a float": (
        lambda t: t | {COUNTER: t[COUNTER].astype(np.float32)},
        f"{COUNTER} has type float32, expected int64",
    ),
    "big-endian": (lambda t: t | {CONV: t[CONV].astype(">f4")}, f"{CONV} has type >f4"),
    "objects": (lambda t: t | {CONV: t[CONV].astype(object)}, f"{CONV} has type object"),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_bad_tensors_are_not_saved_and_nothing_is_written(
    tmp_path: Path, tensors: Tensors, kind: str
) -> None:
    change, reason = BAD_TENSORS[kind]
    with pytest.raises(CheckpointError, match=reason):
        save_checkpoint(tmp_path / "new", CONFIG, change(tensors))
    assert not (tmp_path / "new").exists()


def test_what_is_no_array_is_not_saved_and_it_is_said_what_is_one(
    tmp_path: Path, tensors: Tensors
) -> None:
    others = {name: torch.from_numpy(array) for name, array in tensors.items()}
    with pytest.raises(
        TypeError, match=r"got Tensor as one\. Of a network, pass what .*to_tensors"
    ):
        save_checkpoint(tmp_path / "new", CONFIG, others)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", [k for k in BAD_TENSORS if k not in ("big-endian", "objects")])
def test_bad_tensors_are_not_loaded_even_if_their_hash_fits(
    tmp_path: Path, tensors: Tensors, kind: str
) -> None:
    from safetensors.numpy import save

    change, reason = BAD_TENSORS[kind]
    if kind == "double":
        reason = r"model.safetensors has tensors of type \['float64'\]"
    if "off" not in reason:
        reason += r".*\. Fetch or save it again, or train it anew\.$"
    bad = {k: np.asarray(v, order="C") for k, v in change(tensors).items()}
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(plant(tmp_path, save(bad)))


def raw(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE_FILES: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "header of 0": raw(b"", length=0),
    "header of 7": raw(b'{"a": 1', length=7),
    "header of 2^31": raw({}, length=2**31),
    "header of 2^63": raw({}, length=2**63),
    "header of 2^64 - 1": raw({}, length=2**64 - 1),
    "header longer than the file": raw({"a": entry()}, bytes(8), length=100_000),
    "header of 2 MB": raw(b" " * 2_000_000),
    "header is a list": raw([1, 2]),
    "header is no UTF-8": raw(b'{"\xff": 1}'),
    "header is nested": raw(b"[" * 900_000),
    "entries are numbers": raw({"a": 1}),
    "entry without type": raw({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "body cut": raw({"a": entry()}, bytes(4)),
    "body too long": raw({"a": entry()}, bytes(9)),
    "overlapping": raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "hole": raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "offsets backwards": raw({"a": entry(offsets=(8, 0))}, bytes(8)),
    "offsets negative": raw({"a": entry(offsets=(-8, 0))}, bytes(8)),
    "huge shape": raw({"a": entry(shape=(2**62, 4))}, bytes(8)),
    "names like a wrapper's": raw(
        {f"{n}classifier.bias": entry(offsets=(8 * n, 8 * n + 8)) for n in range(9000)},
        bytes(72_000),
    ),
    "a long name": raw({"x" * 900_000 + "classifier.bias": entry()}, bytes(8)),
    "shape that overflows": raw({"a": entry(shape=(2**32, 2**32))}, bytes(8)),
    "negative shape": raw({"a": entry(shape=(-2,))}, bytes(8)),
    "shape of text": raw({"a": entry(shape="2")}, bytes(8)),
    "double": raw({"a": entry("F64", (1,))}, bytes(8)),
    "bfloat16": raw({"a": entry("BF16", (4,))}, bytes(8)),
    "unknown type": raw({"a": entry("OBJECT")}, bytes(8)),
    "type is a list": raw({"a": entry(["F32"])}, bytes(8)),
    "two entries of one name": raw(
        b'{"a":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "metadata of numbers": raw({"__metadata__": {"a": 1}, "a": entry()}, bytes(8)),
    "nothing at all": raw({}),
    "pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
    "zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("kind", HOSTILE_FILES)
def test_hostile_safetensors_are_refused_even_if_their_hash_fits(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        load_checkpoint(plant(tmp_path, HOSTILE_FILES[kind]))
    assert len(str(caught.value)) < 1000


class Bomb:
    """Creates a file wherever it is unpickled."""

    def __init__(self, marker: Path, tool: Any) -> None:
        self._made = (tool, (f"touch {marker}",)) if tool is os.system else (tool, (marker, "x"))

    def __reduce__(self) -> Any:
        return self._made


def bombs(marker: Path) -> dict[str, bytes]:
    """Return files that create the marker when something unpickles them."""
    found = {f"os.system, protocol {n}": pickle.dumps(Bomb(marker, os.system), n) for n in range(6)}
    found["open"] = pickle.dumps(Bomb(marker, open))
    found["nested"] = pickle.dumps({"state_dict": [Bomb(marker, os.system)]})
    stream = io.BytesIO()
    torch.save({"weight": Bomb(marker, os.system)}, stream)
    found["torch zip"] = stream.getvalue()
    stream = io.BytesIO()
    torch.save({"a": Bomb(marker, os.system)}, stream, _use_new_zipfile_serialization=False)
    found["older torch file"] = stream.getvalue()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("inner.zip", found["torch zip"])
        archive.writestr("archive/data.pkl", found["open"])
    found["zip within a zip"] = stream.getvalue()
    found["behind a header"] = raw({"__metadata__": {"a": "b"}}, found["open"])
    return found


def test_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    payloads = bombs(marker)
    assert len(payloads) == 12
    pickle.loads(payloads["open"]).close()  # noqa: S301 - ours
    assert marker.exists(), "the bombs must be real"
    marker.unlink()
    for number, content in enumerate(payloads.values()):
        folder = plant(tmp_path / str(number), content)
        for name in ("pytorch_model.bin", "model.bin", "model.pt", "model.pkl"):
            (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="is no safetensors file"):
            load_checkpoint(folder)
        (folder / WEIGHTS_NAME).unlink()
        with pytest.raises(CheckpointNotFoundError, match="is missing beside"):
            load_checkpoint(folder)
        (folder / CONFIG_NAME).write_bytes(content)
        with pytest.raises(ConfigError, match=CONFIG_NAME):
            load_config(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("header of 2^63", f"its header claims {2**63} bytes"),
        (
            "body cut",
            "is no safetensors file of half, single and int64 tensors: "
            ".*(not fully covered|MetadataIncompleteBuffer)",
        ),
        ("bfloat16", "(half, single and int64 tensors: 'BF16')|(of type \\['uint16'\\])"),
        ("double", r"has tensors of type \['float64'\]"),
    ],
)
def test_what_is_wrong_with_a_tensor_file_is_told(kind: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_tensors(HOSTILE_FILES[kind], Path("state.safetensors"))


@pytest.mark.parametrize("shift", [1, 2, 8, 100, 10_000, 1_000_000])
def test_a_cut_file_is_refused_even_if_its_hash_fits(
    tmp_path: Path, good_file: bytes, shift: int
) -> None:
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        load_checkpoint(plant(tmp_path, good_file[:-shift]))


def in_new_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


MEASURE = """
import resource, sys
from pathlib import Path
from chestxray_covid import checkpoint, errors

read, refusal = (getattr(m, name) for m, name in zip((checkpoint, errors), sys.argv[3:]))

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def load(folder):
    try:
        read(folder)
    except refusal:
        return True

assert not load(sys.argv[1])
before = peak_mb()
assert all([load(folder) for folder in sorted(Path(sys.argv[2]).iterdir())])
print(peak_mb() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux only")
def test_no_hostile_checkpoint_takes_much_memory(tmp_path: Path, good_file: bytes) -> None:
    for kind, content in HOSTILE_FILES.items():
        plant(tmp_path / "hostile" / kind.replace("^", ""), content)
    for kind, (content, _) in NO_JSON.items():
        folder = plant(tmp_path / "hostile" / f"config {kind}", b"")
        (folder / CONFIG_NAME).write_bytes(content)
    endless = plant(tmp_path / "hostile" / "endless", b"") / WEIGHTS_NAME
    with endless.open("r+b") as file:
        file.truncate(20 << 30)  # sparse: 20 GB that take no room
    good, calls = plant(tmp_path / "good", good_file), ("load_checkpoint", "CheckpointError")
    done = in_new_process(MEASURE, good, tmp_path / "hostile", *calls)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 150


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux only")
def test_no_hostile_config_takes_much_memory(tmp_path: Path, good_file: bytes) -> None:
    texts = [content for content, _ in NO_JSON.values()]
    texts += [json.dumps(valid() | {name: value}).encode() for name, value, _ in HOSTILE_FIELDS]
    for name, value, _ in HOSTILE_PREPROCESS:
        data = valid()
        data["preprocess"][name] = value
        texts.append(json.dumps(data).encode())
    texts.append(json.dumps(valid() | {"classes": [f"{n}" for n in range(10**6)]}).encode())
    assert len(texts) >= 50
    for number, text in enumerate(texts):
        folder = tmp_path / "hostile" / f"{number}"
        folder.mkdir(parents=True)
        (folder / CONFIG_NAME).write_bytes(text)
    good, calls = plant(tmp_path / "good", good_file), ("load_config", "ConfigError")
    done = in_new_process(MEASURE, good, tmp_path / "hostile", *calls)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 50


# ---------------------------------------------------------------- nothing is half written


@pytest.mark.parametrize(
    ("provenance", "reason"),
    [
        ({"path": Path("x")}, "provenance must be data that JSON can hold: .*PosixPath"),
        ({"loss": math.nan}, "provenance must be data that JSON can hold"),
        ({"a": {1: 2, "b": 3}}, "provenance must be data that JSON can hold"),
        ({"text": "x" * 1_000_000}, "more than 500000 bytes, too large"),
    ],
)
def test_a_config_that_could_not_be_read_again_is_not_written(
    tmp_path: Path, tensors: Tensors, provenance: dict[str, Any], reason: str
) -> None:
    config = ModelConfig(classes=CLASSES, provenance=provenance)
    with pytest.raises(ConfigError, match=reason):
        save_checkpoint(tmp_path / "new", config, tensors)
    assert not (tmp_path / "new").exists()


def nested(depth: int) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for _ in range(depth - 1):
        data = {"a": data}
    return data


@pytest.mark.parametrize(("depth", "fits"), [(19, True), (20, False), (5000, False)])
def test_provenance_is_saved_as_deep_as_it_is_read(
    tmp_path: Path, tensors: Tensors, depth: int, fits: bool
) -> None:
    config = ModelConfig(classes=CLASSES, provenance=nested(depth))
    if fits:
        save_checkpoint(tmp_path, config, tensors)
        assert load_config(tmp_path).provenance == nested(depth)
    else:
        # Which of them, depends on how deep Python's own encoder goes.
        reasons = r"nested deeper than 20|provenance must be|too large for a config"
        with pytest.raises(ConfigError, match=reasons):
            save_checkpoint(tmp_path, config, tensors)
        assert not list(tmp_path.iterdir())


SAVE_LIMITED = """
import resource, sys
import numpy as np
from chestxray_covid.checkpoint import load_checkpoint, save_checkpoint
folder = sys.argv[1]
config, tensors = load_checkpoint(folder)
newer = tensors | {"classifier.bias": np.ones(2, np.float32)}
for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_checkpoint(folder, config, newer)
    except OSError as error:
        print(error.errno)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_leaves_the_older_checkpoint_as_it_was(
    tmp_path: Path, good_file: bytes
) -> None:
    folder = plant(tmp_path, good_file)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    limits = [0, 1, 100, 4096, 65_536, 10**6, 5 * 10**6, 10**7, 2 * 10**7, len(good_file) - 1]
    done = in_new_process(SAVE_LIMITED, folder, *limits)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["27"] * len(limits)  # EFBIG, each time
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    load_checkpoint(folder)


WRITE_LIMITED = """
import resource, sys
from pathlib import Path
from chestxray_covid.files import write_files
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    write_files(Path(sys.argv[1]), {"a": b"new", "b": b"new" * 1000, "c": b"new"})
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_disk_that_fills_up_at_the_second_file_is_told_and_leaves_the_first_as_it_was(
    tmp_path: Path,
) -> None:
    before = dict.fromkeys(("a", "b", "c"), b"old")
    write_files(tmp_path, before)
    told = in_new_process(WRITE_LIMITED, tmp_path).stdout
    assert told == f"[Errno 27] File too large: {str(tmp_path / 'b')!r}\n"
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


SAVE_AS_NOBODY = """
import os, sys
from chestxray_covid.checkpoint import load_checkpoint, save_checkpoint
os.chdir(sys.argv[1])  # the folders above may be closed to others
config, tensors = load_checkpoint(".")
if os.getuid() == 0:  # root may write everywhere
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    save_checkpoint(".", config, tensors)
except PermissionError as error:
    print("refused")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs users of POSIX")
def test_a_read_only_folder_keeps_its_checkpoint(tmp_path: Path, good_file: bytes) -> None:
    folder = plant(tmp_path / "run", good_file)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    folder.chmod(0o555)
    try:
        done = in_new_process(SAVE_AS_NOBODY, folder)
    finally:
        folder.chmod(0o755)
    assert done.stdout == "refused\n", done.stderr
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_an_error_of_the_system(
    tmp_path: Path, tensors: Tensors
) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(FileExistsError, match="run"):
        save_checkpoint(tmp_path / "run", CONFIG, tensors)
    assert (tmp_path / "run").read_text() == "a file"


def test_weights_without_their_config_are_never_read_wrong(
    tmp_path: Path, tensors: Tensors
) -> None:
    save_checkpoint(tmp_path, CONFIG, tensors)
    config_text = (tmp_path / CONFIG_NAME).read_bytes()
    (tmp_path / CONFIG_NAME).unlink()
    (tmp_path / CONFIG_NAME).mkdir()  # the second rename fails, as if the process died before it
    newer = tensors | {"classifier.bias": np.ones(2, np.float32)}
    with pytest.raises(OSError, match="Is a directory"):
        save_checkpoint(tmp_path, CONFIG, newer)
    (tmp_path / CONFIG_NAME).rmdir()
    (tmp_path / CONFIG_NAME).write_bytes(config_text)
    with pytest.raises(CheckpointError, match="its SHA-256 differs"):
        load_checkpoint(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]


SAVE_FOR_EVER = """
import sys
import numpy as np
from chestxray_covid.checkpoint import load_checkpoint, save_checkpoint
config, tensors = load_checkpoint(sys.argv[1])
print("ready", flush=True)
for n in range(10**6):
    save_checkpoint(sys.argv[1], config, tensors | {"classifier.bias": np.full(2, n, np.float32)})
"""


@pytest.fixture
def saver(tmp_path: Path, good_file: bytes) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Return a function that starts a process which saves for ever."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        folder = plant(tmp_path, good_file)
        command = [sys.executable, "-c", SAVE_FOR_EVER, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def bias_of(folder: Path) -> NDArray[Any] | str:
    """Return the bias of a checkpoint, or why it is refused."""
    try:
        return load_checkpoint(folder)[1]["classifier.bias"]
    except CheckpointError as error:
        return str(error)


@pytest.mark.slow
def test_a_killed_process_leaves_a_whole_checkpoint_or_one_that_is_refused(
    tmp_path: Path, saver: Callable[[], subprocess.Popen[str]]
) -> None:
    whole = 0
    for delay in np.random.default_rng(0).uniform(0, 0.3, 8):
        process = saver()
        time.sleep(delay)
        process.kill()
        process.communicate()
        bias = bias_of(tmp_path)
        if isinstance(bias, str):
            assert "its SHA-256 differs" in bias  # killed between the two renames
        else:
            assert bias[0] == bias[1]
            whole += 1
    assert whole >= 6
