"""The checkpoint directory: weights, configuration, integrity. Needs no torch.

A checkpoint is a folder with ``model.safetensors``, ``config.json`` and maybe attachments: further
files that a model needs beside its weights. The config names the SHA-256 of all of them, which
is verified at every load. It is at the same time a config as timm writes it, so that timm and
transformers open the folder as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from chestxray_covid._version import __version__
from chestxray_covid.datasets.report import brief
from chestxray_covid.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    check_resources,
    first_of,
    real_number,
)
from chestxray_covid.files import MAX_JSON_BYTES, parse_json, read_limited, write_files
from chestxray_covid.image import Preprocess
from chestxray_covid.tensors import FEATURE_COUNT, MAX_WEIGHTS_BYTES, check_tensors, read_tensors

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
FORMAT_VERSION = 2
ARCHITECTURE = "densenet121"

_MAX_CLASSES = 1000
_MAX_TEXT = 2000
_MAX_ATTACHMENTS = 16
#: A segmenter has 2 MB; the statistics of 1024 features with their covariances 4.
_MAX_ATTACHMENT_BYTES = 20_000_000
_ATTACHMENT_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}\.(safetensors|json)")


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
        attachments: Name of a file beside the weights → its SHA-256, for example
            ``gate.safetensors``; filled in when saving.
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
    attachments: Mapping[str, str] = field(default_factory=dict, hash=False)
    provenance: Mapping[str, Any] = field(default_factory=dict, hash=False)
    chestxray_covid_version: str = __version__
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        texts = ("threshold_origin", "architecture", "weights_sha256", "chestxray_covid_version")
        for name in texts:
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be text, got {getattr(self, name)!r}")
            if (length := len(getattr(self, name))) > _MAX_TEXT:
                raise ConfigError(f"{name} must have at most {_MAX_TEXT} characters, got {length}")
        if type(self.format_version) is not int or self.format_version != FORMAT_VERSION:
            raise ConfigError(
                f"format_version is {self.format_version!r}, chestxray-covid here writes "
                f"{FORMAT_VERSION}. Leave it out."
            )
        if self.architecture != ARCHITECTURE:
            raise ConfigError(f"architecture is {self.architecture!r}, expected {ARCHITECTURE!r}")
        _check_class_names(self.classes)
        try:
            object.__setattr__(self, "threshold", real_number("threshold", self.threshold))
        except TypeError as error:
            raise ConfigError(str(error)) from error
        if not 0 < self.threshold < 1:
            raise ConfigError(f"threshold must be inside (0, 1), got {self.threshold!r}")
        if not re.fullmatch(r"([0-9a-f]{64})?", self.weights_sha256):
            raise ConfigError(f"weights_sha256 must be 64 hex digits, got {self.weights_sha256!r}")
        _check_attachments(self.attachments)
        if not isinstance(self.preprocess, Preprocess):
            raise ConfigError(f"preprocess must be a Preprocess, got {self.preprocess!r}")
        if not isinstance(self.provenance, Mapping):
            raise ConfigError(f"provenance must be an object, got {self.provenance!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data, the content of ``config.json``."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data |= {"classes": list(self.classes), "preprocess": self.preprocess.to_dict()}
        data |= {"attachments": dict(self.attachments), "provenance": dict(self.provenance)}
        return data | timm_fields(self.classes, self.preprocess)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Return the config that :meth:`to_dict` described, of this version of the format.

        Raises:
            ConfigError: If a field is unknown, missing or impossible, or a field of timm's says
                something else than ours.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"Expected a JSON object, got {type(data).__name__}")
        version = data.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise ConfigError(
                f"format_version is {str(version)[:100]!r}, expected {FORMAT_VERSION}: "
                "this is no checkpoint of this version of chestxray-covid. Train again with it, "
                "or install the version that wrote it."
            )
        names = {f.name for f in fields(cls)}
        expected = names | set(timm_fields((), Preprocess()))
        unknown, missing = sorted(map(str, set(data) - expected)), sorted(expected - set(data))
        if unknown or missing:
            raise ConfigError(f"unknown fields: {first_of(unknown)}; missing: {first_of(missing)}")
        if not isinstance(data["classes"], list):
            raise ConfigError(f"classes must be a list, got {str(data['classes'])[:200]!r}")
        own = {name: data[name] for name in names}
        own |= {"classes": tuple(data["classes"])}
        config = cls(**{**own, "preprocess": Preprocess.from_dict(data["preprocess"])})
        for name, value in timm_fields(config.classes, config.preprocess).items():
            if data[name] != value:
                raise ConfigError(
                    f"{name} is {str(data[name])[:200]!r}, but classes and preprocess make it "
                    f"{value!r}. Save the checkpoint again with chestxray-covid."
                )
        return config


def timm_fields(classes: Sequence[str], preprocess: Preprocess) -> dict[str, Any]:
    """Return what timm and transformers read in a ``config.json``; all of it follows from ours.

    timm takes ``architecture`` (a field of ours as well), ``num_classes``, ``num_features``,
    ``label_names`` and ``pretrained_cfg``; transformers, which opens timm's models, also ``dtype``,
    without which it would compute in the precision of the file.

    Args:
        classes: Labels in the order of the logits.
        preprocess: Squashed to a square, no crop, one mean and deviation for three channels.
    """
    side = preprocess.size_px
    return {
        "num_classes": len(classes),
        "num_features": FEATURE_COUNT,
        "label_names": list(classes),
        "dtype": "float32",
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": [preprocess.mean] * 3,
            "std": [preprocess.std] * 3,
            "num_classes": len(classes),
            "pool_size": [side // 32, side // 32],
            "first_conv": "features.conv0",
            "classifier": "classifier",
        },
    }


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
            f"classes must be 2 to {_MAX_CLASSES} different printable names of up to 100 "
            f"characters, as a tuple, got {shown}"
        )


def _check_attachments(attachments: Any) -> None:
    if not isinstance(attachments, Mapping) or len(attachments) > _MAX_ATTACHMENTS:
        raise ConfigError(
            f"attachments must be an object of at most {_MAX_ATTACHMENTS} files, "
            f"got {str(attachments)[:200]}"
        )
    for name, digest in attachments.items():
        if (
            not isinstance(name, str)
            or not _ATTACHMENT_NAME.fullmatch(name)
            or name in (CONFIG_NAME, WEIGHTS_NAME)
        ):
            raise ConfigError(
                "attachments must be named like gate.safetensors or gate.json, in lower case, and "
                f"neither {CONFIG_NAME} nor {WEIGHTS_NAME}; got {str(name)[:200]!r}"
            )
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ConfigError(
                f"attachments: {name} must have 64 hex digits, got {str(digest)[:200]!r}"
            )


def save_checkpoint(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Mapping[str, NDArray[Any]],
    attachments: Mapping[str, bytes] | None = None,
    weights: bytes | None = None,
) -> ModelConfig:
    """Write a checkpoint and return its config, now with the hashes of all files.

    Each file is written under a temporary name, synced and renamed, the config last. Should the
    process die before that, a hash in the older config does not fit and the checkpoint is refused;
    it is never read wrong.

    Args:
        folder: Made if missing; other files in it stay.
        config: ``weights_sha256`` and ``attachments`` are filled in.
        tensors: As :func:`tensors.densenet121_shapes` names and shapes them.
        attachments: File name → content, at most 20 MB each. Without it the checkpoint has none,
            whatever ``config`` says.
        weights: The file that the tensors were read from, to be written as it is.

    Raises:
        CheckpointError: If a tensor is missing, extra, misshapen, not finite or neither half nor
            single precision, or an attachment is too large; nothing is written.
        ConfigError: If ``provenance`` is no JSON, or too much of it, or an attachment has an
            impossible name; nothing is written.
        OSError: If the disk is full or the folder cannot be written; the older files are intact.
        TypeError: If the tensors are no arrays by name, for example torch's; nothing is written.
    """
    target, further = Path(folder), dict(attachments or {})
    check_tensors(tensors, len(config.classes), target)
    for name, data in further.items():
        if len(data) > _MAX_ATTACHMENT_BYTES:
            raise CheckpointError(
                f"{name} has {len(data)} bytes, expected at most {_MAX_ATTACHMENT_BYTES}."
            )
    weights = weights or _weights_bytes(tensors)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in further.items()}
    digest = hashlib.sha256(weights).hexdigest()
    final = replace(config, weights_sha256=digest, attachments=digests)
    text = config_text(final)
    target.mkdir(parents=True, exist_ok=True)
    write_files(target, {WEIGHTS_NAME: weights, **further, CONFIG_NAME: text})
    return final


def _weights_bytes(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    from safetensors.numpy import save

    return save({name: np.asarray(t, order="C") for name, t in tensors.items()})


def weights_digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 that ``model.safetensors`` would have, 64 hex digits."""
    return hashlib.sha256(_weights_bytes(tensors)).hexdigest()


def size_limit(name: str) -> int:
    """Return how many bytes a file of a checkpoint has at most."""
    limits = {CONFIG_NAME: MAX_JSON_BYTES, WEIGHTS_NAME: MAX_WEIGHTS_BYTES}
    return limits.get(name, _MAX_ATTACHMENT_BYTES)


def config_text(config: ModelConfig) -> bytes:
    """Return the content of ``config.json``, which can be read again.

    Raises:
        ConfigError: If ``provenance`` is no JSON, or too much of it.
    """
    try:
        text = json.dumps(config.to_dict(), indent=2, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"provenance must be data that JSON can hold: {error}") from error
    parse_json(text)
    return text


def load_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Return the config of a checkpoint.

    Raises:
        CheckpointNotFoundError: If the folder or ``config.json`` is missing.
        ConfigError: If the config is damaged or of another kind.
    """
    return _read_config(folder)[0]


def _read_config(folder: str | os.PathLike[str]) -> tuple[ModelConfig, bytes]:
    path = Path(folder) / CONFIG_NAME
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises if the name is too long
        raise CheckpointNotFoundError(
            f"{path} is missing. A checkpoint is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, "
            "for example the output of chestxray-covid train."
        )
    try:
        data = read_limited(path, MAX_JSON_BYTES)
        return ModelConfig.from_dict(parse_json(data)), data
    except ConfigError as error:
        said = brief(str(error))  # a file may say anything
        advice = "" if said.endswith(".") else ". Fetch or save the checkpoint again."
        raise ConfigError(f"{path}: {said}{advice}") from None


def load_checkpoint(folder: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, NDArray[Any]]]:
    """Return config and weights of a checkpoint, both verified.

    Floating-point tensors come in the precision of the file, half or single.

    Raises:
        CheckpointNotFoundError: If a file is missing.
        ConfigError: If the config is damaged or of another kind.
        CheckpointError: If a file cannot be read or does not fit its hash, or a tensor is missing,
            extra, misshapen, of another type or not finite.
    """
    config = load_config(folder)
    return config, _read_weights(folder, config)[0]


def _read_weights(
    folder: str | os.PathLike[str], config: ModelConfig
) -> tuple[dict[str, NDArray[Any]], bytes]:
    path = Path(folder) / WEIGHTS_NAME
    data = _read_verified(path, config.weights_sha256, MAX_WEIGHTS_BYTES)
    tensors = read_tensors(data, path)
    check_tensors(tensors, len(config.classes), path)
    return tensors, data


def read_checkpoint(folder: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, bytes]]:
    """Return the config of a checkpoint and name → content of its files, all verified.

    The contents are the very bytes that were verified; attachments are among them.

    Raises:
        CheckpointError: As :func:`load_checkpoint` and :func:`load_attachment`.
    """
    config, text = _read_config(folder)
    attached = {n: load_attachment(folder, config, n) or b"" for n in config.attachments}
    return config, {CONFIG_NAME: text, WEIGHTS_NAME: _read_weights(folder, config)[1], **attached}


def load_attachment(folder: str | os.PathLike[str], config: ModelConfig, name: str) -> bytes | None:
    """Return the content of a file that belongs to a checkpoint, verified; ``None`` if none does.

    Args:
        folder: The checkpoint's.
        config: Its config, from :func:`load_config`.
        name: For example ``"gate.safetensors"``, or that of the weights.

    Raises:
        CheckpointNotFoundError: If the config names the file, but it is missing.
        CheckpointError: If it cannot be read or does not fit its hash.
    """
    digests = {**config.attachments, WEIGHTS_NAME: config.weights_sha256}
    if name not in digests:
        return None
    return _read_verified(Path(folder) / name, digests[name], size_limit(name))


def _read_verified(path: Path, digest: str, limit: int) -> bytes:
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path} is missing beside {CONFIG_NAME}. Save it again.")
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        check_resources(error, str(path))
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if len(data) > limit:
        raise CheckpointError(
            f"{path} is not the file that {CONFIG_NAME} describes: it has {path.stat().st_size} "
            f"bytes, expected at most {limit}. Fetch or save the checkpoint again."
        )
    if hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(
            f"{path} is not the file that {CONFIG_NAME} describes: its SHA-256 differs. "
            "It is damaged or was exchanged; fetch or save the checkpoint again."
        )
    return data
