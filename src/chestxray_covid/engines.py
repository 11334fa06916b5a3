"""One callable, several runtimes: pixels in, logits and features out."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from chestxray_covid import engine_openvino
from chestxray_covid.checkpoint import ModelConfig, weights_digest
from chestxray_covid.engine_onnx import OnnxEngine
from chestxray_covid.errors import (
    INSTALL_AGAIN,
    CheckpointError,
    ConfigError,
    MissingExtraError,
    check_resources,
    missing_package,
)
from chestxray_covid.files import read_json
from chestxray_covid.int8 import INT8_NAME, Int8
from chestxray_covid.tensors import check_tensors

ENGINES = ("auto", "openvino", "onnx", "torch")
PRECISIONS = ("auto", "float32", "bfloat16", "float16", "int8")
#: What each engine computes in; in the order in which ``"auto"`` takes them on a CPU: the fastest
#: first, then what needs no torch to be imported, see ``docs/engines.md``.
_ENGINE_PRECISIONS = {
    "openvino": ("float32", "bfloat16", "int8"),
    "onnx": ("float32",),
    "torch": ("float32", "bfloat16", "float16"),
}
#: Weights' SHA-256 → engines and precisions whose probabilities were compared with float32 torch.
#: Written by ``recipes/judge_engines.py``.
_JUDGED = Path(str(importlib.resources.files("chestxray_covid"))) / "weights" / "engines.json"
#: Largest difference of a probability on real radiographs, at the 99th percentile and at most, and
#: largest change of the AUROC, with which ``"auto"`` takes a lower precision.
MAX_DIFFERENCE_P99, MAX_DIFFERENCE, MAX_AUROC_CHANGE = 0.01, 0.03, 0.002


class Engine(Protocol):
    """Computes a checkpoint's network; may be called from several threads.

    Attributes:
        name: One of :data:`ENGINES`.
        precision: One of :data:`PRECISIONS`.
        calls: How many calls at a time keep it busy.
    """

    name: str
    precision: str
    calls: int

    def __call__(
        self, pixels: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return ``(N, K)`` logits and ``(N, 1024)`` features of ``(N, 1, S, S)`` pixels."""
        ...  # pragma: no cover - a declaration


def open_engine(
    config: ModelConfig,
    tensors: Mapping[str, NDArray[Any]],
    *,
    engine: str = "auto",
    device: str | None = None,
    precision: str = "auto",
    int8: Int8 | None = None,
) -> Engine:
    """Return the runtime of a checkpoint.

    Args:
        config: Its config.
        tensors: Its weights.
        engine: ``"openvino"`` or ``"onnx"`` (extras, CPU only), ``"torch"``, or ``"auto"``: on a
            CPU the first of these that is installed, elsewhere torch.
        device: Torch device such as ``"cpu"``, ``"cuda"`` or ``"mps"``; the CPU if not given.
        precision: What it computes in: ``"float32"``, ``"bfloat16"``, on CUDA ``"float16"``; or
            ``"auto"``: the fastest that the processor has, if these weights were found to keep
            their probabilities with it (:data:`MAX_DIFFERENCE_P99`), else float32. ``"int8"`` is
            OpenVINO's alone, and never taken unasked.
        int8: What has to be known for ``precision="int8"``, see :func:`quantization.quantize`.

    Raises:
        ValueError: If engine or precision is unknown, they do not go together, or the device is
            not there.
        CheckpointError: If the weights are no DenseNet-121 of these classes, or ``"int8"`` is
            wanted of a checkpoint that was not quantised; or if this installation lacks files.
        MissingExtraError: If the engine that was asked for is not installed, or none is.
        ResourceError: If memory or threads have run out.
        ForkedError: Of torch, in a process that was forked after torch had begun to compute here,
            unless it computes on the CPU in one thread.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {ENGINES}, got {engine!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    check_tensors(tensors, len(config.classes), Path("tensors"))
    place = "cpu" if device is None else device  # 0 is a GPU, and "" a mistake
    names = [name for name in _candidates(engine, device) if _computes_in(name, precision)]
    if not names:
        how = f"in {precision} " if precision != "auto" else ""
        raise ValueError(
            f"engine {engine!r} does not compute {how}on device {place!r}. "
            "openvino and onnx use the CPU alone, onnx in float32; engine 'auto' finds what does."
        )
    missing: list[MissingExtraError] = []
    for name in names:
        try:
            if precision == "int8":
                return _open_int8(config, tensors, int8)
            return _open(name, config, tensors, place, precision)
        except MissingExtraError as error:
            missing.append(error)
        except Exception as error:  # ONNX Runtime's are of no narrower kind
            check_resources(error, f"Engine {name}", loading=True)
            raise
    raise MissingExtraError("; ".join(map(str, missing))) from missing[-1]


def stacked(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return N images, each ``(1, S, S)``, as a batch, ``(N, 1, S, S)``.

    Raises:
        ResourceError: If there is no memory for it.
    """
    try:
        return np.stack(images)
    except MemoryError as error:
        check_resources(error, f"A batch of {len(images)} images")
        raise


def compute(
    engine: Engine, pixels: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return what the engine returns.

    Raises:
        ResourceError: If memory or threads have run out, of which every runtime has its own words.
    """
    try:
        return engine(pixels)
    except Exception as error:
        check_resources(error, f"Engine {engine.name}", loading=True)
        raise


def _open_int8(
    config: ModelConfig, tensors: Mapping[str, NDArray[Any]], int8: Int8 | None
) -> Engine:
    if int8 is None:
        raise CheckpointError(
            f"The checkpoint has no {INT8_NAME}, so it cannot be computed in int8. Quantise it "
            "with chestxray-covid quantize, or take another precision."
        )
    return engine_openvino.OpenVinoEngine(tensors, config.preprocess, precision="int8", int8=int8)


def _candidates(engine: str, device: str | None) -> tuple[str, ...]:
    """Return the engines that may be meant, the fastest first."""
    on_cpu = device in (None, "cpu")
    possible = tuple(_ENGINE_PRECISIONS) if on_cpu else ("torch",)
    return possible if engine == "auto" else tuple(name for name in possible if name == engine)


def _computes_in(name: str, precision: str) -> bool:
    return precision == "auto" or precision in _ENGINE_PRECISIONS[name]


def _open(
    name: str,
    config: ModelConfig,
    tensors: Mapping[str, NDArray[Any]],
    device: str,
    precision: str,
) -> Engine:
    if name == "onnx":
        return OnnxEngine(tensors, config.preprocess)
    if name == "openvino":
        if precision == "auto":
            precision = _trusted(config, name, engine_openvino.native_precision())
        return engine_openvino.OpenVinoEngine(tensors, config.preprocess, precision=precision)
    try:
        import torch
    except ImportError as error:
        raise missing_package("torch", "chestxray-covid", error) from error

    from chestxray_covid import engine_torch

    # A GPU in a forked process is refused by torch itself, an impossible device by the engine.
    engine_torch.check_forked(engine_torch.first_process(), torch.device("cpu"))
    if precision == "auto":
        precision = _trusted(config, name, engine_torch.native_precision(device))
    return engine_torch.TorchEngine(tensors, config.preprocess, device=device, precision=precision)


def _trusted(config: ModelConfig, name: str, precision: str) -> str:
    """Return the precision if these weights keep their probabilities with it, else float32."""
    judged = _judged().get(config.weights_sha256, {}).get(f"{name}-{precision}")
    return precision if judged is not None and keeps_probabilities(**judged) else "float32"


def _judged() -> Any:
    try:
        return read_json(_JUDGED)
    except ConfigError as error:
        raise ConfigError(f"{_JUDGED} {error}. {INSTALL_AGAIN}.") from error


def known(config: ModelConfig, tensors: Mapping[str, NDArray[Any]]) -> ModelConfig:
    """Return the config; without its hash if that is of judged weights, and these are others."""
    judged = config.weights_sha256 in _judged()
    others = judged and weights_digest(tensors) != config.weights_sha256
    return replace(config, weights_sha256="") if others else config


def keeps_probabilities(*, p99: float, largest: float, auroc_change: float, **_: Any) -> bool:
    """Return whether an engine's probabilities are as good as those of float32 torch.

    Args:
        p99: 99th percentile over images of the largest difference of a probability.
        largest: The largest of these differences.
        auroc_change: Change of the AUROC, COVID-19 against normal.
    """
    close = p99 <= MAX_DIFFERENCE_P99 and largest <= MAX_DIFFERENCE
    return close and abs(auroc_change) <= MAX_AUROC_CHANGE


def restrict_classes(
    config: ModelConfig, tensors: Mapping[str, NDArray[Any]], classes: Sequence[str]
) -> tuple[ModelConfig, dict[str, NDArray[Any]]]:
    """Return the checkpoint with these classes only; softmax over them is the renormalisation.

    The config still names the whole checkpoint's weights: what is known of those, such as the
    precision that keeps their probabilities, holds for some of their classes, too.

    Raises:
        ValueError: If they are not at least two different ones of the checkpoint's, or a set, whose
            order is another in every process.
    """
    ordered = isinstance(classes, Iterable) and not isinstance(classes, str | set | frozenset)
    chosen = tuple(classes) if ordered else ()
    strange = [c for c in chosen if c not in config.classes]
    if strange or len(set(chosen)) != len(chosen) or len(chosen) < 2:
        raise ValueError(
            f"classes must be at least two different ones of {config.classes}, as a list or tuple, "
            f"got {classes!r}"
        )
    rows = [config.classes.index(c) for c in chosen]
    head = {k: tensors[k][rows] for k in ("classifier.weight", "classifier.bias")}
    return replace(config, classes=chosen), {**tensors, **head}


def softmax(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return ``(N, K)`` probabilities of ``(N, K)`` logits, rows summing to 1.

    Raises:
        CheckpointError: If a logit is not finite.
    """
    exact = logits.astype(np.float64)
    if not np.isfinite(exact).all():
        raise CheckpointError(
            "The model gave a value that is not finite: its weights overflow. "
            "Train it again with a lower learning rate."
        )
    powers = np.exp(exact - exact.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))
