"""A network in eight bits: what has to be known beside its weights. NumPy only.

A convolution is computed in eight-bit integers if its weights and its input are rounded, to 255 and
256 levels. All channels of an input share the levels, so that one whose values are small gets few
of them. Therefore every channel is scaled first, so that the largest value that it was seen to have
becomes 1: the layer that makes it is multiplied by the scale, and the weights that take it are
divided by it. In exact numbers that changes nothing, since a ReLU or an average lies between the
two at most (Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
ICCV 2019, section 4.1).

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
#: Smallest share of a result's largest value that is scaled up; a channel that was never seen to
#: have more is silent, and would be multiplied by any number.
_SMALLEST_SHARE = 1e-3
#: Largest value that is believed, and the smallest but for 0; those of trained networks stay below
#: 100. Others would make infinities of the weights.
_LARGEST, _SMALLEST = 1e6, 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class Int8:
    """Statistics with which a network is computed in eight bits.

    Attributes:
        largest: Name of a result that is rounded, see :func:`rounded_results` → the largest value
            of each of its channels, ``(C,)`` float32, not negative.
    """

    largest: Mapping[str, NDArray[np.float32]]

    def to_bytes(self) -> bytes:
        """Return the content of the attachment ``int8.safetensors``."""
        from safetensors.numpy import save

        return save({k: np.asarray(v, np.float32) for k, v in sorted(self.largest.items())})

    @classmethod
    def from_bytes(cls, data: bytes, name: str = INT8_NAME) -> Self:
        """Return the statistics that :meth:`to_bytes` wrote.

        Args:
            data: Content of the file.
            name: Names it in messages.

        Raises:
            CheckpointError: If it is damaged, or holds anything else.
        """
        tensors = read_tensors(data, Path(name))
        for key, tensor in tensors.items():
            if not _is_largest(tensor):
                raise CheckpointError(
                    f"{name}: {key[:100]!r} is no list of largest values, float32 from 0 to "
                    f"{_LARGEST:g}. Quantise the checkpoint again."
                )
        return cls(largest=tensors)

    @property
    def digest(self) -> str:
        """SHA-256 of all numbers, 64 hex digits."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def apply(self, network: Network) -> Network:
        """Return the network with convolutions in int8, but for the first.

        Their weights are rounded symmetrically by output channel: the largest weight of a channel
        becomes 127. Everything else stays in floating point.

        Raises:
            CheckpointError: If the statistics are those of another network.
        """
        expected, found = rounded_results(network), {k: len(v) for k, v in self.largest.items()}
        if found != expected:
            strange = sorted(k for k in found | expected if found.get(k) != expected.get(k))
            raise CheckpointError(
                f"{INT8_NAME} belongs to another network, or to an earlier version of this "
                f"library: it does not fit {first_of(strange)}. Quantise the checkpoint again."
            )
        levels = {k: _levels(v) for k, v in self.largest.items()}
        makers = {_maker(network, name): name for name in levels}
        return replace(
            network,
            steps=tuple(
                _rounded(s, levels, levels.get(makers.get(s.name, ""))) for s in network.steps
            ),
        )


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


def _is_largest(tensor: NDArray[Any]) -> bool:
    if tensor.dtype != np.float32 or tensor.ndim != 1 or not len(tensor):
        return False
    top = tensor.max()  # NaN if one is
    return bool(tensor.min() >= 0 and (top == 0 or _SMALLEST <= top <= _LARGEST))


def _maker(network: Network, name: str) -> str:
    """Return the step whose weights scale a result: an average is scaled before it is taken."""
    steps = {step.name: step for step in network.steps}
    return steps[name].inputs[0] if steps[name].op == "average_pool" else name


def _levels(largest: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return ``(C,)`` numbers by which channels are divided."""
    top = float(largest.max()) or 1.0
    return np.maximum(largest.astype(np.float64), _SMALLEST_SHARE * top)


def _rounded(
    step: Step, levels: Mapping[str, NDArray[np.float64]], own: NDArray[np.float64] | None
) -> Step:
    """Return a step in the scale of what it takes and makes; ``own`` is the scale that it makes."""
    changed: dict[str, Any] = {"range": (0.0, 1.0) if step.name in levels else None}
    weight = step.weight
    if weight is not None and own is not None:
        weight = weight / own.reshape(-1, *[1] * (weight.ndim - 1))
        if step.bias is not None:
            changed["bias"] = (step.bias / own.reshape(-1, *[1] * (step.bias.ndim - 1))).astype(
                np.float32
            )
    if weight is not None and step.op == "convolution" and step.inputs[0] in levels:
        weight = weight * levels[step.inputs[0]][:, np.newaxis, np.newaxis]
        top = np.abs(weight).max((1, 2, 3), keepdims=True)
        scale = np.where(top > 0, top / 127, 1.0)
        weight = np.rint(weight / scale).astype(np.int8)
        changed["scale"] = scale.astype(np.float32)
    elif weight is not None:
        weight = np.asarray(weight, np.float32)
    return replace(step, weight=weight, **changed)
