"""The checkpoint directory: weights, configuration, integrity. Needs no torch.

A checkpoint is a folder with ``model.safetensors`` and ``config.json``; the latter names the
SHA-256 of the former, which is verified at every load.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from chestxray_covid._version import __version__
from chestxray_covid.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from chestxray_covid.image import Preprocess

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
FORMAT_VERSION = 1
ARCHITECTURE = "densenet121"

_MAX_CLASSES = 1000
#: A config of this library has about 1 kB; more is no config.
_MAX_CONFIG_BYTES = 1_000_000
_MAX_JSON_DEPTH = 20
#: No more is read; single precision and 1000 classes come to 32 MB, with a header of 90 kB.
_MAX_WEIGHTS_BYTES = 100_000_000
_MAX_HEADER_BYTES = 1_000_000
_DTYPES = frozenset({"float16", "float32", "int64"})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything beside the weights that a model needs to answer.

    Attributes:
        classes: Labels in the order of the logits.
        preprocess: From an image to the model's input.
        threshold: p(covid19) / (p(covid19) + p(normal)) from which a case counts as positive,
            in (0, 1).
        threshold_origin: Where the threshold comes from.
        architecture: Always ``"densenet121"``.
        weights_sha256: SHA-256 of ``model.safetensors``, 64 hex digits; empty before saving.
        provenance: What the model was trained on and how, as JSON-able data for people to read.
        chestxray_covid_version: Version that wrote the checkpoint.
        format_version: Version of this format.
    """

    classes: tuple[str, ...]
    preprocess: Preprocess = field(default_factory=Preprocess)
    threshold: float = 0.5
    threshold_origin: str = "default"
    architecture: str = ARCHITECTURE
    weights_sha256: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    chestxray_covid_version: str = __version__
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        texts = ("threshold_origin", "architecture", "weights_sha256", "chestxray_covid_version")
        for name in texts:
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be text, got {getattr(self, name)!r}")
        if type(self.format_version) is not int or self.format_version != FORMAT_VERSION:
            raise ConfigError(
                f"format_version is {self.format_version!r}, this version of chestxray-covid reads "
                f"{FORMAT_VERSION}. Upgrade chestxray-covid, or save the checkpoint again with it."
            )
        if self.architecture != ARCHITECTURE:
            raise ConfigError(f"architecture is {self.architecture!r}, expected {ARCHITECTURE!r}")
        _check_class_names(self.classes)
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise ConfigError(f"threshold must be a number, got {self.threshold!r}")
        if not 0 < self.threshold < 1:
            raise ConfigError(f"threshold must be inside (0, 1), got {self.threshold!r}")
        if not re.fullmatch(r"([0-9a-f]{64})?", self.weights_sha256):
            raise ConfigError(f"weights_sha256 must be 64 hex digits, got {self.weights_sha256!r}")
        if not isinstance(self.preprocess, Preprocess):
            raise ConfigError(f"preprocess must be a Preprocess, got {self.preprocess!r}")
        if not isinstance(self.provenance, Mapping):
            raise ConfigError(f"provenance must be an object, got {self.provenance!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data, the content of ``config.json``."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["classes"] = list(self.classes)
        data["preprocess"] = self.preprocess.to_dict()
        data["provenance"] = dict(self.provenance)
        return data

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Return the config that :meth:`to_dict` described.

        Raises:
            ConfigError: If a field is unknown, missing or impossible.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"Expected a JSON object, got {type(data).__name__}")
        if data.get("format_version") != FORMAT_VERSION:
            raise ConfigError(
                f"format_version is {data.get('format_version')!r}, expected {FORMAT_VERSION}: "
                "this is no checkpoint of this version of chestxray-covid. Train again with it, "
                "or install the version that wrote it."
            )
        names = {f.name for f in fields(cls)}
        unknown, missing = sorted(map(str, set(data) - names)), sorted(names - set(data))
        if unknown or missing:
            raise ConfigError(f"unknown fields: {_some(unknown)}; missing: {_some(missing)}")
        if not isinstance(data["classes"], list):
            raise ConfigError(f"classes must be a list, got {data['classes']!r}")
        own = {"classes": tuple(data["classes"]), "preprocess": data["preprocess"]}
        own["preprocess"] = Preprocess.from_dict(data["preprocess"])
        return cls(**{**data, **own})


def _check_class_names(classes: Any) -> None:
    good = (
        isinstance(classes, tuple)
        and 2 <= len(classes) <= _MAX_CLASSES
        and all(isinstance(c, str) and 0 < len(c) <= 100 and c.isprintable() for c in classes)
        and len(set(classes)) == len(classes)
    )
    if not good:
        shown = f"{str(classes)[:200]}"
        raise ConfigError(
            f"classes must be 2 to {_MAX_CLASSES} different printable names, got {shown}"
        )


def densenet121_shapes(num_classes: int) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of torchvision's DenseNet-121, in its order.

    Huang et al., Densely Connected Convolutional Networks, CVPR 2017, table 1: growth rate 32,
    blocks of 6, 12, 24 and 16 layers, bottleneck 4, compression 0.5, 64 initial features.
    """
    shapes: dict[str, tuple[int, ...]] = {"features.conv0.weight": (64, 3, 7, 7)}

    def norm(name: str, width: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    norm("features.norm0", 64)
    width = 64
    for block, layers in enumerate((6, 12, 24, 16), 1):
        for layer in range(1, layers + 1):
            place = f"features.denseblock{block}.denselayer{layer}"
            norm(f"{place}.norm1", width)
            shapes[f"{place}.conv1.weight"] = (128, width, 1, 1)
            norm(f"{place}.norm2", 128)
            shapes[f"{place}.conv2.weight"] = (32, 128, 3, 3)
            width += 32
        if block < 4:
            norm(f"features.transition{block}.norm", width)
            shapes[f"features.transition{block}.conv.weight"] = (width // 2, width, 1, 1)
            width //= 2
    norm("features.norm5", width)
    shapes["classifier.weight"] = (num_classes, width)
    shapes["classifier.bias"] = (num_classes,)
    return shapes


def save_checkpoint(
    folder: str | os.PathLike[str], config: ModelConfig, tensors: Mapping[str, NDArray[Any]]
) -> ModelConfig:
    """Write a checkpoint and return its config, now with the hash of the weights.

    Each file is written under a temporary name, synced and renamed, the weights first. Should the
    process die between the two, the hash in the older config does not fit and the checkpoint is
    refused; it is never read wrong.

    Args:
        folder: Made if missing; other files in it stay.
        config: ``weights_sha256`` is filled in.
        tensors: As :func:`densenet121_shapes` names and shapes them.

    Raises:
        CheckpointError: If a tensor is missing, extra, misshapen, not finite or neither half nor
            single precision; nothing is written.
        ConfigError: If ``provenance`` is no JSON, or too much of it; nothing is written.
        OSError: If the disk is full or the folder cannot be written; the older files are intact.
    """
    from safetensors.numpy import save

    target = Path(folder)
    check_tensors(tensors, len(config.classes), target)
    weights = save({name: np.asarray(t, order="C") for name, t in tensors.items()})
    final = replace(config, weights_sha256=hashlib.sha256(weights).hexdigest())
    try:
        text = json.dumps(final.to_dict(), indent=2, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"provenance must be data that JSON can hold: {error}") from error
    _parse_json(text)  # what cannot be read again is not written
    target.mkdir(parents=True, exist_ok=True)
    write_files(target, {WEIGHTS_NAME: weights, CONFIG_NAME: text})
    return final


def load_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Return the config of a checkpoint.

    Raises:
        CheckpointNotFoundError: If the folder or ``config.json`` is missing.
        ConfigError: If the config is damaged or of another kind.
    """
    path = Path(folder) / CONFIG_NAME
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises if the name is too long
        raise CheckpointNotFoundError(
            f"{path} is missing. A checkpoint is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, "
            "for example the output of chestxray-covid train."
        )
    try:
        return ModelConfig.from_dict(read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def load_checkpoint(
    folder: str | os.PathLike[str],
) -> tuple[ModelConfig, dict[str, NDArray[Any]]]:
    """Return config and weights of a checkpoint, both verified.

    Floating-point tensors come in the precision of the file, half or single.

    Raises:
        CheckpointNotFoundError: If a file is missing.
        ConfigError: If the config is damaged or of another kind.
        CheckpointError: If the weights cannot be read or do not fit their hash, or a tensor is
            missing, extra, misshapen, of another type or not finite.
    """
    config = load_config(folder)
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path} is missing beside {CONFIG_NAME}. Save it again.")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_WEIGHTS_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != config.weights_sha256:
        raise CheckpointError(
            f"{path} is not the file that {CONFIG_NAME} describes: its SHA-256 differs. "
            "It is damaged or was exchanged; fetch or save the checkpoint again."
        )
    tensors = read_tensors(data, path)
    check_tensors(tensors, len(config.classes), path)
    return config, tensors


def read_tensors(data: bytes, path: Path) -> dict[str, NDArray[Any]]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: If it is damaged or has a type other than half, single or int64.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    length = int.from_bytes(data[:8], "little")
    if length > _MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} is no safetensors file: its header claims {length} bytes.")
    try:
        tensors = dict(load(data))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file of half, single and int64 tensors: {error}."
        ) from error
    strange = {t.dtype.name for t in tensors.values()} - _DTYPES
    if strange:
        raise CheckpointError(f"{path} has tensors of type {sorted(strange)}.")
    return tensors


def check_tensors(tensors: Mapping[str, NDArray[Any]], num_classes: int, where: Path) -> None:
    """Raise unless the tensors are those of a DenseNet-121, with finite values.

    Raises:
        CheckpointError: If a tensor is missing, extra, misshapen, not finite or neither half nor
            single precision (int64 for a batch norm's counter).
    """
    shapes = densenet121_shapes(num_classes)
    missing = [name for name in shapes if name not in tensors]
    extra = [name for name in tensors if name not in shapes]
    if missing or extra:
        raise CheckpointError(
            f"{where} is no DenseNet-121 with {num_classes} classes: "
            f"missing {_some(missing)}, unexpected {_some(extra)}."
        )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tensors[name].shape}, expected {shape}."
            )
        expected = ("int64",) if name.endswith("num_batches_tracked") else ("float16", "float32")
        if tensors[name].dtype not in expected:
            raise CheckpointError(
                f"{where}: {name} has type {tensors[name].dtype}, expected {' or '.join(expected)}."
            )
        if not np.isfinite(tensors[name]).all():
            raise CheckpointError(f"{where}: {name} has values that are not finite.")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "none"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def read_json(path: Path) -> Any:
    """Return the content of a small JSON file.

    Raises:
        ConfigError: If it is too large, nested too deep, or no strict JSON.
    """
    try:
        with path.open("rb") as file:
            return _parse_json(file.read(_MAX_CONFIG_BYTES + 1))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error}") from error


def _parse_json(data: bytes) -> Any:
    if len(data) > _MAX_CONFIG_BYTES:
        raise ConfigError(f"more than {_MAX_CONFIG_BYTES} bytes, too large for a config")
    try:
        content = json.loads(data.decode(), parse_float=_finite, parse_constant=_finite)
        if _depth(content) > _MAX_JSON_DEPTH:
            raise RecursionError
    except RecursionError as error:
        raise ConfigError(f"nested deeper than {_MAX_JSON_DEPTH}") from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"cannot be read as JSON: {error}") from error
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ConfigError("holds NaN or an infinite number, which JSON has not")
    return number


def _depth(content: Any) -> int:
    depth, level = 0, [content]
    while level:
        nested = [part for part in level if isinstance(part, (dict, list))]
        level = [p for n in nested for p in (n.values() if isinstance(n, dict) else n)]
        depth += bool(nested)
    return depth


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a folder; ``Path.is_dir`` raises if the name is too long."""
    return os.path.isdir(path)  # noqa: PTH112


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into a folder, in order, each complete or not at all and synced to the disk.

    Raises:
        OSError: If one cannot be written, for want of room for example; all are as they were.
    """
    partials = {name: folder / f".{name}.{os.getpid()}.partial" for name in contents}
    try:
        for name, data in contents.items():
            with partials[name].open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        # Only now: a disk that is full at the last file leaves the first as it was, too.
        for name, partial in partials.items():
            partial.replace(folder / name)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
