"""A network in eight bits: what has to be known beside its weights. NumPy only.

A convolution is computed in eight-bit integers if its weights and its input are rounded to 255 and
256 levels. The levels of weights follow from the weights; those of inputs come from radiographs
that the network has seen: a lowest and a highest value per result. Beside these ranges there are
biases, moved by what rounding adds on average. All of it is statistics, a few kilobytes that go
with a checkpoint as an attachment; nobody can see a radiograph in them.
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
_RANGE, _BIAS = ".range", ".bias"


@dataclass(frozen=True, kw_only=True, eq=False)
class Int8:
    """Statistics with which a network is computed in eight bits.

    Attributes:
        ranges: Name of a step → its lowest and highest value, rounded to 256 levels in between.
        biases: Name of a convolution → its ``(O,)`` bias instead of the folded one.
    """

    ranges: Mapping[str, tuple[float, float]]
    biases: Mapping[str, NDArray[np.float32]]

    def to_bytes(self) -> bytes:
        """Return the content of the attachment ``int8.safetensors``."""
        from safetensors.numpy import save

        tensors = {f"{k}{_RANGE}": np.array(v, np.float32) for k, v in self.ranges.items()}
        tensors |= {f"{k}{_BIAS}": np.asarray(v, np.float32) for k, v in self.biases.items()}
        return save(dict(sorted(tensors.items())))

    @classmethod
    def from_bytes(cls, data: bytes, name: str = INT8_NAME) -> Self:
        """Return the statistics that :meth:`to_bytes` wrote.

        Args:
            data: Content of the file.
            name: Names it in messages.

        Raises:
            CheckpointError: If it is damaged, or holds anything else.
        """
        ranges: dict[str, tuple[float, float]] = {}
        biases: dict[str, NDArray[np.float32]] = {}
        for key, tensor in read_tensors(data, Path(name)).items():
            step, dot, kind = key.rpartition(".")
            good = tensor.dtype == np.float32 and tensor.ndim == 1 and np.isfinite(tensor).all()
            if good and dot + kind == _RANGE and len(tensor) == 2 and tensor[0] < tensor[1]:
                ranges[step] = (float(tensor[0]), float(tensor[1]))
            elif good and dot + kind == _BIAS:
                biases[step] = tensor
            else:
                raise CheckpointError(
                    f"{name}: {key[:100]!r} is neither a range, two finite float32 of which the "
                    "first is lower, nor a bias. Quantise the checkpoint again."
                )
        return cls(ranges=ranges, biases=biases)

    @property
    def digest(self) -> str:
        """SHA-256 of all numbers, 64 hex digits."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def apply(self, network: Network) -> Network:
        """Return the network with weights in int8 and results in their ranges.

        Rounded are the weights of convolutions whose input is, symmetrically by output channel:
        the largest weight of a channel becomes 127. Everything else stays in floating point, the
        first and the last layer above all.

        Raises:
            CheckpointError: If the statistics are those of another network.
        """
        by_name = {step.name: step for step in network.steps}
        biased = [k for k, v in self.biases.items() if not _takes_bias(by_name.get(k), v)]
        strange = sorted({*self.ranges} - {*by_name} | {*biased})
        if strange:
            raise CheckpointError(
                f"{INT8_NAME} belongs to another network, this one has no such result or bias: "
                f"{first_of(strange)}. Quantise the checkpoint again."
            )
        return replace(network, steps=tuple(map(self._applied, network.steps)))

    def _applied(self, step: Step) -> Step:
        changed: dict[str, Any] = {"range": self.ranges.get(step.name)}
        if step.name in self.biases:
            changed["bias"] = self.biases[step.name]
        if step.op == "convolution" and step.weight is not None and step.inputs[0] in self.ranges:
            largest = np.abs(step.weight).max((1, 2, 3), keepdims=True)
            scale = np.where(largest > 0, largest / np.float32(127), np.float32(1))
            changed["weight"] = np.rint(step.weight / scale).astype(np.int8)
            changed["scale"] = scale.astype(np.float32)
        return replace(step, **changed)


def _takes_bias(step: Step | None, bias: NDArray[np.float32]) -> bool:
    if step is None or step.op != "convolution" or step.weight is None:
        return False
    return step.inputs[0] != PIXELS and len(bias) == len(step.weight)
