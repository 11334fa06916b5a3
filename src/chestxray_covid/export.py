"""Take a model elsewhere: one file from grey pixels on, and a card of what it expects and gives."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chestxray_covid._version import __version__
from chestxray_covid.calibration import temperature_of
from chestxray_covid.checkpoint import CONFIG_NAME, ModelConfig, load_checkpoint
from chestxray_covid.datasets.storage import remove_stale
from chestxray_covid.datasets.synthetic import SyntheticChestXray
from chestxray_covid.engine_onnx import import_onnxruntime, onnx_model
from chestxray_covid.engine_openvino import import_openvino, openvino_core, openvino_model
from chestxray_covid.engines import softmax
from chestxray_covid.errors import ExportError, require_extra
from chestxray_covid.export_card import card_text
from chestxray_covid.files import PARTIAL, expanded, write_files
from chestxray_covid.graph import FEATURES, LOGITS, PIXELS, Network, fold
from chestxray_covid.hub import resolve
from chestxray_covid.inputs import expand, read
from chestxray_covid.tensors import FEATURE_COUNT

CARD_NAME, TEXT_NAME = "card.json", "README.md"
#: What a process that was killed leaves of an export; it goes with a later one, after a day.
_LEFT = re.compile(rf"\.(model\.\w+|card\.json|README\.md){PARTIAL}")
#: Largest difference to torchvision's float32 network that is rounding and nothing else: of a
#: probability, and of logits and features in parts of the largest of them. Seen are a tenth of it.
MAX_PROBABILITY_DIFFERENCE, MAX_RELATIVE_DIFFERENCE = 1e-4, 1e-4
#: Images that are compared at once, and phantoms where the caller has no images.
_BATCH, _PHANTOMS = 8, 8
#: An identifier of a licence has some 20 characters.
_MAX_LICENSE = 100

#: ``(N, K)`` logits and ``(N, 1024)`` features.
_Outputs = tuple[NDArray[np.float32], NDArray[np.float32]]
_Run = Callable[[NDArray[np.uint8]], _Outputs]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far an exported file is from the network that it was made of.

    Attributes:
        images: Images that both were given.
        probability: Largest difference of a probability.
        logits: Largest difference of a logit, in parts of the largest logit.
        features: Likewise of a feature.
    """

    images: int
    probability: float
    logits: float
    features: float

    @property
    def is_rounding(self) -> bool:
        """Whether the differences are those of another order of adding up."""
        relative = max(self.logits, self.features)
        near = self.probability <= MAX_PROBABILITY_DIFFERENCE
        return near and relative <= MAX_RELATIVE_DIFFERENCE


def export_model(
    checkpoint: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    format: str = "onnx",
    images: Any = None,
) -> Path:
    """Write a model as one file for another runtime, with a card, and return the folder.

    The file takes ``pixels``, ``(N, 1, S, S)`` uint8 grey with any N > 0, and gives ``logits``,
    ``(N, K)``, and ``features``, ``(N, 1024)``, float32. Normalisation and the calibration
    temperature are in it. It is read back, run, and compared with torchvision's network before
    anything is written: all of it or nothing.

    ``card.json`` says what the file expects and gives, ``README.md`` says it in words.

    Args:
        checkpoint: ``None`` for the bundled model, or whatever :func:`resolve` takes.
        output: Folder, made if missing; files of the same names are replaced.
        format: ``"onnx"``: ``model.onnx``, opset 17. ``"openvino"``: ``model.xml`` and
            ``model.bin``. ``"torch"``: ``model.pt2`` for ``torch.export.load``: the graph as JSON
            and the weights as bytes, where TorchScript and ``torch.save`` hold pickles.
        images: Radiographs to compare on: a folder, a data set, or a list of images, see
            :func:`load_image`; phantoms if not given.

    Raises:
        ExportError: If the file does not answer as the checkpoint does, or cannot be made.
        CheckpointError: If the checkpoint is missing or damaged.
        ImageError: If an image cannot be decoded.
        MissingExtraError: If a package for the format is not installed.
        ValueError: If the format is unknown, there are no images, or ``output`` is the folder of a
            checkpoint, which has a card of its own, or holds another ``README.md``.
        OSError: If the folder cannot be written; older files are intact.
        ForkedError: In a process that was forked after torch had computed here, unless torch
            computes in one thread.
    """
    if format not in _FORMATS:
        raise ValueError(f"format must be one of {tuple(_FORMATS)}, got {format!r}")
    target = expanded(output)
    if (target / CONFIG_NAME).exists():
        raise ValueError(
            f"output must not be the folder of a checkpoint, as {target} is: its {TEXT_NAME} would "
            f"be replaced. Pass another one, for example {target / format}."
        )
    if (target / TEXT_NAME).exists() and not (target / CARD_NAME).exists():
        raise ValueError(
            f"output {target} holds a {TEXT_NAME} that is of no export, and would be replaced. "
            f"Pass another folder, for example {target / format}."
        )
    config, tensors = load_checkpoint(resolve(checkpoint))
    pixels = _pixels(images, config)
    reference = _reference(config, tensors)
    with tempfile.TemporaryDirectory() as folder:
        network = fold(tensors, config.preprocess)
        try:
            name, run = _FORMATS[format](network, Path(folder))
        except (OSError, RuntimeError) as error:  # on a full disk OpenVINO raises the latter
            raise ExportError(
                f"The file cannot be made in {folder}: {error}. Look whether there is room for "
                "it; TMPDIR names another folder for temporary files."
            ) from error
        expected = _in_batches(reference, pixels)
        parity = _compare(_in_batches(run, pixels), expected)
        if not parity.is_rounding:
            raise ExportError(
                f"{name} does not answer as the checkpoint does: over {parity.images} images a "
                f"probability differs by up to {parity.probability:.2g} (allowed "
                f"{MAX_PROBABILITY_DIFFERENCE:g}), logits by {parity.logits:.2g} and features by "
                f"{parity.features:.2g} of the largest (allowed {MAX_RELATIVE_DIFFERENCE:g}). "
                "Nothing was written. Try another format, or report it with your versions."
            )
        contents = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    card = _card(format, name, contents, config, parity)
    contents[TEXT_NAME] = card_text(card).encode()
    contents[CARD_NAME] = json.dumps(card, indent=2, allow_nan=False).encode()
    target.mkdir(parents=True, exist_ok=True)
    remove_stale(target, _LEFT)
    write_files(target, contents)
    return target


def _card(
    format: str, name: str, contents: dict[str, bytes], config: ModelConfig, parity: Parity
) -> dict[str, Any]:
    side = config.preprocess.size_px
    license = config.provenance.get("license")  # whatever its author wrote there
    return {
        "format": format,
        "file": name,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        "input": {"name": PIXELS, "dtype": "uint8", "shape": ["N", 1, side, side]},
        "preprocess": {**config.preprocess.to_dict(), "interpolation": "bilinear, antialiased"},
        "outputs": {
            LOGITS: {"dtype": "float32", "shape": ["N", len(config.classes)]},
            FEATURES: {"dtype": "float32", "shape": ["N", FEATURE_COUNT]},
        },
        "classes": list(config.classes),
        "threshold": config.threshold,
        "threshold_origin": config.threshold_origin,
        "temperature": temperature_of(config),
        "weights_sha256": config.weights_sha256,
        "license": license[:_MAX_LICENSE] if isinstance(license, str) else None,
        "parity": asdict(parity),
        "chestxray_covid_version": __version__,
    }


def _pixels(images: Any, config: ModelConfig) -> NDArray[np.uint8]:
    if images is None:
        images = SyntheticChestXray(_PHANTOMS)
    found = [read(image, config.preprocess)[0] for image in expand(images)]
    if not found:
        raise ValueError(f"images has none, got {images}; leave it out to compare on phantoms")
    return np.stack(found)


def _in_batches(run: _Run, pixels: NDArray[np.uint8]) -> _Outputs:
    parts = [run(pixels[k : k + _BATCH]) for k in range(0, len(pixels), _BATCH)]
    logits, features = (np.concatenate(part) for part in zip(*parts, strict=True))
    return logits, features


def _compare(found: _Outputs, expected: _Outputs) -> Parity:
    def apart(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
        largest = float(np.abs(other).max()) or 1.0
        return float(np.abs(one - other).max()) / largest

    return Parity(
        images=len(expected[0]),
        probability=float(np.abs(softmax(found[0]) - softmax(expected[0])).max()),
        logits=apart(found[0], expected[0]),
        features=apart(found[1], expected[1]),
    )


def _reference(config: ModelConfig, tensors: Any) -> _Run:
    """Return torchvision's own network, which nothing was folded into."""
    import torch

    from chestxray_covid.engine_torch import check_forked, first_process
    from chestxray_covid.models import forward_features, from_tensors, normalise

    check_forked(first_process(), torch.device("cpu"))
    model = from_tensors(tensors)

    def run(pixels: NDArray[np.uint8]) -> _Outputs:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            batch = normalise(torch.from_numpy(pixels), config.preprocess)
            features = forward_features(model, batch)
            return model.classifier(features).numpy(), features.numpy()

    return run


# ------------------------------------------------ formats: write the file, read it back, run it


def _to_onnx(network: Network, folder: Path) -> tuple[str, _Run]:
    checker = require_extra("onnx.checker", "onnx")
    runtime = import_onnxruntime()
    model = onnx_model(network)
    checker.check_model(model, full_check=True)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(pixels: NDArray[np.uint8]) -> _Outputs:
        logits, features = session.run([LOGITS, FEATURES], {PIXELS: pixels})
        return logits, features

    return path.name, run


def _to_openvino(network: Network, folder: Path) -> tuple[str, _Run]:
    path = folder / "model.xml"
    import_openvino().save_model(openvino_model(network), path, compress_to_fp16=False)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    # From its bytes: by its path the weights stay mapped, and Windows deletes no such file.
    whole = openvino_core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes())
    compiled = openvino_core().compile_model(whole, "CPU", exact)

    def run(pixels: NDArray[np.uint8]) -> _Outputs:
        found = compiled({PIXELS: pixels})
        return found[LOGITS], found[FEATURES]

    return path.name, run


def _to_torch(network: Network, folder: Path) -> tuple[str, _Run]:
    import torch

    from chestxray_covid.engine_torch import FoldedNetwork

    # In the file weights lie in their plain order; the graph itself says channels-last.
    module = FoldedNetwork(network).eval().to(memory_format=torch.contiguous_format)
    shapes = {PIXELS: {0: torch.export.Dim("N")}}
    plain = partial(torch.autocast, "cpu", enabled=False)  # the caller's would be in the graph
    path = folder / "model.pt2"
    with plain(), torch.device("cpu"):  # not the caller's default, where the weights are not
        example = torch.zeros(2, 1, network.size_px, network.size_px, dtype=torch.uint8)
        program = torch.export.export(module, (example,), dynamic_shapes=shapes)
        program.example_inputs = None  # the one thing that would be pickled
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # names the folder that this is installed in
        buffer = io.BytesIO()  # where the disk is full, torch would end the process
        torch.export.save(program, buffer)
        path.write_bytes(buffer.getbuffer())
        loaded = torch.export.load(path).module()

    def run(pixels: NDArray[np.uint8]) -> _Outputs:
        with torch.inference_mode(), plain():
            logits, features = loaded(torch.from_numpy(pixels))
        return logits.numpy(), features.numpy()

    return path.name, run


_FORMATS: dict[str, Callable[[Network, Path], tuple[str, _Run]]] = {
    "onnx": _to_onnx,
    "openvino": _to_openvino,
    "torch": _to_torch,
}
