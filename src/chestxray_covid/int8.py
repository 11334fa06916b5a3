"""A network in eight bits: what has to be known beside its weights. NumPy only.

A convolution is computed in eight-bit integers if its weights and its input are rounded, to 255
and 256 levels. All channels of an input share the levels, so that one whose values are small gets
few of them. Therefore every channel is divided by the largest value that it was seen to have: the
layer that makes it is divided by it, and the weights that take it are multiplied. In exact numbers
that changes nothing, since a ReLU or an average lies between the two at most (the identity is that
of Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019,
section 4.1, who choose the divisors by the weights alone).

What has to be known is one number per channel, its largest value on radiographs. These go with a
checkpoint as an attachment; nobody can see a radiograph in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.errors import CheckpointError, first_of
from chestxray_covid.graph import PIXELS, Network, Step
from chestxray_covid.tensors import read_tensors

INT8_NAME = "int8.safetensors"
#: What it moved when a model was computed in eight bits, see :mod:`quantization`.
REPORT_NAME = "int8.json"
#: Largest whole number of a weight.
_LARGEST_WEIGHT = 127
#: Smallest share of a layer's largest value by which a channel is divided: a channel that was
#: hardly ever seen to have one would otherwise be cut off at next to nothing.
_SMALLEST_SHARE = 1e-3
#: The largest value of a layer that is believed is between these; in trained networks it is some
#: 10. Others would make infinities of the weights.
_LOWEST, _HIGHEST = 1e-6, 1e6
#: Changes with what :meth:`Int8.apply` makes of the same statistics.
_RULE = b"by channel, 127"
#: How the tensors of an earlier version's attachment are called.
_EARLIER = (".range", ".bias")


@dataclass(frozen=True, kw_only=True, eq=False)
class Int8:
    """Statistics with which a network is computed in eight bits.

    Attributes:
        largest: Name of a result that is rounded, see :func:`rounded_results` → the largest value
            of each of its channels, ``(C,)`` float32, none negative, the highest from 1e-6 to 1e6.

    Raises:
        CheckpointError: If they are something else.
    """

    largest: Mapping[str, NDArray[np.float32]]

    def __post_init__(self) -> None:
        for key, values in self.largest.items():
            good = values.dtype == np.float32 and values.ndim == 1 and len(values) > 0
            # Written so that NaN is in no range.
            if not (good and values.min() >= 0 and _LOWEST <= values.max() <= _HIGHEST):
                raise CheckpointError(
                    f"The largest values of {key[:100]!r} must be float32, none negative, the "
                    f"highest from {_LOWEST:g} to {_HIGHEST:g}, got {values.dtype}"
                    f"{_ends(values)}. The weights or {INT8_NAME} are damaged, or the calibration "
                    "images show nothing: quantise again, with radiographs."
                )

    def to_bytes(self) -> bytes:
        """Return the content of the attachment ``int8.safetensors``."""
        from safetensors.numpy import save

        return save(dict(sorted(self.largest.items())))

    @classmethod
    def from_bytes(cls, data: bytes, name: str = INT8_NAME) -> Self:
        """Return the statistics that :meth:`to_bytes` wrote.

        Args:
            data: Content of the file.
            name: Names it in messages.

        Raises:
            CheckpointError: If it is damaged, holds anything else, or is of an earlier version.
        """
        tensors = read_tensors(data, Path(name))
        if any(key.endswith(_EARLIER) for key in tensors):
            raise CheckpointError(
                f"{name} was made by an earlier version of this library, which rounded "
                "otherwise. Quantise the checkpoint again, or take another precision."
            )
        return cls(largest=tensors)

    @property
    def digest(self) -> str:
        """SHA-256 of all numbers and of the way of rounding, 64 hex digits."""
        return hashlib.sha256(_RULE + self.to_bytes()).hexdigest()

    def apply(self, network: Network) -> Network:
        """Return the network with convolutions in int8, but for the first.

        Their weights are rounded symmetrically by output channel: the largest weight of a channel
        becomes 127. Everything else stays in floating point.

        Args:
            network: From :func:`graph.fold`, in float32.

        Raises:
            CheckpointError: If the statistics are those of another network.
        """
        expected, found = rounded_results(network), {k: len(v) for k, v in self.largest.items()}
        if found != expected:
            strange = sorted(k for k in found | expected if found.get(k) != expected.get(k))
            raise CheckpointError(
                f"{INT8_NAME} belongs to another network, it does not fit "
                f"{first_of([repr(key[:100]) for key in strange])}. Quantise the checkpoint again."
            )
        divisors = {k: _divisors(v) for k, v in self.largest.items()}
        steps = {step.name: step for step in network.steps}
        # An average is divided before it is taken.
        makers = {
            steps[name].inputs[0] if steps[name].op == "average_pool" else name: numbers
            for name, numbers in divisors.items()
        }
        changed = (
            replace(
                _scaled(step, divisors.get(step.inputs[0]), makers.get(step.name)),
                rounded=step.name in divisors,
            )
            for step in network.steps
        )
        return replace(network, steps=tuple(changed))


def rounded_results(network: Network) -> dict[str, int]:
    """Return the results that are rounded to 256 levels, and the number of their channels.

    They are what convolutions take, but for the first: grey levels are far from 0, so that rounding
    its weights would shift all that follows. The last layer takes too little time to count.
    """
    return {
        step.inputs[0]: step.weight.shape[1]
        for step in network.steps
        if step.op == "convolution" and step.weight is not None and step.inputs[0] != PIXELS
    }


def _divisors(largest: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return ``(C,)`` positive numbers by which channels are divided."""
    exact = largest.astype(np.float64)
    return np.asarray(np.maximum(exact, _SMALLEST_SHARE * exact.max()))


def _scaled(
    step: Step, taken: NDArray[np.float64] | None, made: NDArray[np.float64] | None
) -> Step:
    """Return a step whose input and result are divided by channel; its weights are rounded, too."""
    weight, bias, scale = step.weight, step.bias, step.scale
    if made is not None:
        weight, bias = _over(weight, made), _over(bias, made)
    if taken is not None and weight is not None and step.op == "convolution":
        exact = weight * taken[:, np.newaxis, np.newaxis]
        top = np.abs(exact).max((1, 2, 3), keepdims=True)
        unit = np.where(top > 0, top / _LARGEST_WEIGHT, 1.0)
        weight, scale = np.rint(exact / unit).astype(np.int8), unit.astype(np.float32)
    return replace(step, weight=weight, bias=bias, scale=scale)


def _over(numbers: NDArray[Any] | None, made: NDArray[np.float64]) -> NDArray[np.float32] | None:
    """Return a weight or a bias of a layer whose results are divided by channel."""
    if numbers is None:
        return None
    return (numbers / made.reshape(-1, *[1] * (numbers.ndim - 1))).astype(np.float32)


def _ends(values: NDArray[Any]) -> str:
    if values.ndim != 1 or not len(values):
        return f" of shape {values.shape}"
    return f" from {values.min():g} to {values.max():g}"
