"""The network of a checkpoint as a few kinds of steps, from uint8 grey pixels on. NumPy only.

Every runtime builds its own network from the same steps: torch, OpenVINO, ONNX. What can be
computed ahead is folded into the weights:

* Normalisation and the repetition to three channels into the first convolution, which then takes
  the grey channel as it is. It pads with the grey level that normalisation makes 0, so that the
  borders come out the same.
* Every batch norm that follows a convolution into it; those that come before one become a
  multiplication and an addition per channel.
* Averaging before the 1x1 convolution of a transition instead of after it: both are linear, and it
  leaves a quarter of the pixels to convolve.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.errors import CheckpointError
from chestxray_covid.image import Preprocess
from chestxray_covid.tensors import BLOCKS

#: ``convolution`` (weight ``(O, I, k, k)``), ``affine`` (weight ``(C, 1, 1)``, times and plus),
#: ``linear`` (weight ``(O, I)``), ``concat`` of channels, ``max_pool`` 3x3 with stride 2 and
#: padding 1, ``average_pool`` 2x2 with stride 2, ``global_average`` to ``(N, C)``.
Op: TypeAlias = Literal[
    "convolution", "affine", "linear", "concat", "max_pool", "average_pool", "global_average"
]

#: Names of the input and the outputs, in every runtime.
PIXELS, LOGITS, FEATURES = "pixels", "logits", "features"
#: What torch adds to a variance.
_EPSILON = 1e-5
#: Largest number of a folded layer; those of trained networks stay below 10. Larger ones make
#: infinities and NaN, which OpenVINO's ReLU turns into 0, and so into a confident answer.
_LARGEST = 1e6


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One operation of the network.

    Attributes:
        name: Names its result; where the step has weights, the name of their layer in a checkpoint.
        op: What it does.
        inputs: Names of what it takes: earlier steps, or ``"pixels"``.
        weight: float32, or int8 with ``scale``, shaped as :data:`Op` says.
        bias: float32, one number per output channel, ``(O,)``, or ``(C, 1, 1)`` of ``affine``.
        stride: Of a convolution.
        padding: Of a convolution, on all four sides.
        fill: What a convolution pads with.
        relu: Whether a ReLU follows.
        scale: ``(O, 1, 1, 1)``, times which the weight counts, if that is int8, see :mod:`int8`.
        rounded: Whether the result is rounded to 256 levels from 0 to 1, see :mod:`int8`.
    """

    name: str
    op: Op
    inputs: tuple[str, ...]
    weight: NDArray[Any] | None = None
    bias: NDArray[np.float32] | None = None
    stride: int = 1
    padding: int = 0
    fill: float = 0.0
    relu: bool = False
    scale: NDArray[np.float32] | None = None
    rounded: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A DenseNet-121: ``pixels``, ``(N, 1, S, S)`` uint8, to ``logits`` and ``features``.

    Attributes:
        steps: In an order in which they can be computed; the last two are ``features``,
            ``(N, 1024)``, and ``logits``, ``(N, K)``.
        size_px: Side S of the pixels.
        num_classes: Number K of the logits.
        digest: SHA-256 of everything that the results depend on, 64 hex digits.
    """

    steps: tuple[Step, ...]
    size_px: int
    num_classes: int
    digest: str


def fold(
    tensors: Mapping[str, NDArray[Any]], preprocess: Preprocess, *, precision: str = "float32"
) -> Network:
    """Return the network of a checkpoint, with preprocessing and batch norms folded in.

    Computed in double precision and rounded once, to single.

    Args:
        tensors: As :func:`tensors.densenet121_shapes` names and shapes them.
        preprocess: Its size, mean and deviation become part of the network.
        precision: What a runtime will compute in: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
            The first convolution then gets weights that the precision holds, and a bias that makes
            up for it. Grey levels are far from 0, so the rounding of its weights would shift all
            that follows: the 99th percentile of the differences of a probability is 0.016 without
            it and 0.003 with it, bfloat16, 500 radiographs.

    Raises:
        CheckpointError: If a layer before the classifier overflows.
    """
    folding = _Folding(tensors, precision)
    with np.errstate(all="ignore"):  # what comes of an overflow is found, and named
        folding.network(preprocess)
    return Network(
        steps=tuple(folding.steps),
        size_px=preprocess.size_px,
        num_classes=len(tensors["classifier.bias"]),
        digest=digest(tensors, preprocess),
    )


def digest(tensors: Mapping[str, NDArray[Any]], preprocess: Preprocess) -> str:
    """Return the SHA-256 of weights and preprocessing, 64 hex digits, without folding them."""
    found = hashlib.sha256(repr(sorted(preprocess.to_dict().items())).encode())
    for name in sorted(tensors):
        tensor = np.asarray(tensors[name], order="C")
        found.update(f"{name}{tensor.dtype.str}{tensor.shape}".encode())
        found.update(tensor.tobytes())
    return found.hexdigest()


def to_bfloat16(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return numbers rounded to what bfloat16 holds, half to even, as float32.

    >>> to_bfloat16(np.array([1.0, 1.00390625, 1.01171875, 257.0])).tolist()
    [1.0, 1.0, 1.015625, 256.0]
    """
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


#: Precision → rounds numbers to what it holds.
_ROUNDINGS: Mapping[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "float32": lambda values: values.astype(np.float32),
    "bfloat16": to_bfloat16,
    "float16": lambda values: values.astype(np.float16),
}


class _Folding:
    """Collects the steps; every method returns the name of its result."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]], precision: str) -> None:
        self.steps: list[Step] = []
        self._tensors = tensors
        self._round = _ROUNDINGS[precision]

    def network(self, preprocess: Preprocess) -> None:
        current = self.first(preprocess)
        for block, layers in enumerate(BLOCKS, 1):
            parts = [current]
            for layer in range(1, layers + 1):
                parts.append(self.dense(f"features.denseblock{block}.denselayer{layer}", parts))
            current = self.concat(f"features.denseblock{block}", parts)
            if block < len(BLOCKS):
                current = self.transition(f"features.transition{block}", current)
        self.head(current)

    def first(self, preprocess: Preprocess) -> str:
        weight, bias = self._with_norm("features.conv0", "features.norm0")
        # One channel three times is one channel under the sum of three kernels.
        grey = self._round(weight.sum(1, keepdims=True) / (255 * preprocess.std))
        level = 255 * preprocess.mean
        self._add(
            *("features.conv0", "convolution", PIXELS),
            weight=grey,
            bias=bias - level * grey.sum((1, 2, 3), dtype=np.float64),
            stride=2,
            padding=3,
            fill=level,
        )
        return self._add("features.pool0", "max_pool", "features.conv0", relu=False)

    def dense(self, name: str, parts: list[str]) -> str:
        joined = self.concat(f"{name}.inputs", parts)
        self._affine(f"{name}.norm1", joined)
        weight, bias = self._with_norm(f"{name}.conv1", f"{name}.norm2")
        self._add(f"{name}.conv1", "convolution", f"{name}.norm1", weight=weight, bias=bias)
        weight = self._double(f"{name}.conv2.weight")
        made = f"{name}.conv2"
        self._add(made, "convolution", f"{name}.conv1", weight=weight, padding=1, relu=False)
        return made

    def concat(self, name: str, parts: list[str]) -> str:
        return parts[0] if len(parts) == 1 else self._add(name, "concat", *parts, relu=False)

    def transition(self, name: str, current: str) -> str:
        self._affine(f"{name}.norm", current)
        self._add(f"{name}.pool", "average_pool", f"{name}.norm", relu=False)
        weight = self._double(f"{name}.conv.weight")
        made = f"{name}.conv"
        return self._add(made, "convolution", f"{name}.pool", weight=weight, relu=False)

    def head(self, current: str) -> None:
        self._affine("features.norm5", current)
        self._add(FEATURES, "global_average", "features.norm5", relu=False)
        weight, bias = (self._double(f"classifier.{part}") for part in ("weight", "bias"))
        self._add(LOGITS, "linear", FEATURES, weight=weight, bias=bias, relu=False)

    def _affine(self, name: str, current: str) -> None:
        scale, shift = (part.reshape(-1, 1, 1) for part in self._norm(name))
        self._add(name, "affine", current, weight=scale, bias=shift)

    def _with_norm(self, convolution: str, norm: str) -> tuple[NDArray[Any], NDArray[Any]]:
        scale, shift = self._norm(norm)
        return self._double(f"{convolution}.weight") * scale.reshape(-1, 1, 1, 1), shift

    def _norm(self, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        weight, bias, mean, variance = (
            self._double(f"{name}.{part}")
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / np.sqrt(variance + _EPSILON)
        shift = bias - mean * scale
        _check(name, scale, shift)
        return scale, shift

    def _double(self, name: str) -> NDArray[Any]:
        return np.asarray(self._tensors[name], np.float64)

    def _add(
        self,
        name: str,
        op: Op,
        *inputs: str,
        weight: NDArray[Any] | None = None,
        bias: NDArray[Any] | None = None,
        relu: bool = True,
        **options: Any,
    ) -> str:
        if op != "linear":  # no ReLU follows that one: an overflow shows in the logits
            _check(name, *(a for a in (weight, bias) if a is not None))
        single = [
            None if a is None else np.asarray(a, np.float32, order="C") for a in (weight, bias)
        ]
        self.steps.append(
            Step(
                name=name,
                op=op,
                inputs=inputs,
                weight=single[0],
                bias=single[1],
                relu=relu,
                **options,
            )
        )
        return name


def _check(name: str, *folded: NDArray[Any]) -> None:
    """Raise if a number of a layer is larger than any network needs, or NaN."""
    largest = np.max([np.abs(numbers).max() for numbers in folded], initial=0)
    if not largest <= _LARGEST:
        raise CheckpointError(
            f"The weights overflow: {name} has a value of {largest:.3g} with its batch norm folded "
            f"in, expected at most {_LARGEST:g}. The checkpoint is damaged, or its training "
            "diverged: fetch it again, or train it again with a lower learning rate."
        )
