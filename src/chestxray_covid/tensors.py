"""The tensors of a DenseNet-121 in a checkpoint: names, shapes, types. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.datasets.report import brief
from chestxray_covid.errors import CheckpointError, first_of

#: No more is read; single precision and 1000 classes come to 32 MB, with a header of 90 kB.
MAX_WEIGHTS_BYTES = 100_000_000
_MAX_HEADER_BYTES = 1_000_000
#: Layers of each dense block: Huang et al., CVPR 2017, table 1.
BLOCKS = (6, 12, 24, 16)
#: Length of the pooled features that the classifier sees.
FEATURE_COUNT = 1024
_DTYPES = frozenset({"float16", "float32", "int64"})
_AGAIN = "Fetch or save it again, or train it anew."


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
    for block, layers in enumerate(BLOCKS, 1):
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


def read_tensors(data: bytes, path: Path) -> dict[str, NDArray[Any]]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: If it is damaged or has a type other than half, single or int64.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    length = int.from_bytes(data[:8], "little")
    if length > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is no safetensors file: its header claims {length} bytes. {_AGAIN}"
        )
    try:
        tensors = dict(load(data))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file of half, single and int64 tensors: {error}. {_AGAIN}"
        ) from error
    strange = {t.dtype.name for t in tensors.values()} - _DTYPES
    if strange:
        raise CheckpointError(
            f"{path} has tensors of type {sorted(strange)}, expected {sorted(_DTYPES)}. {_AGAIN}"
        )
    return tensors


def check_arrays(tensors: Mapping[str, NDArray[Any]]) -> None:
    """Raise unless these are arrays by name.

    Raises:
        TypeError: If they are none, for example a network or torch's tensors of one.
    """
    is_named = isinstance(tensors, Mapping)
    for array in tensors.values() if is_named else [tensors]:
        if not is_named or not isinstance(array, np.ndarray):
            raise TypeError(
                f"tensors must map names to NumPy arrays, got {type(array).__name__}"
                f"{' as one' * is_named}. Of a network, pass what "
                "chestxray_covid.models.to_tensors(network) gives."
            )


def own_copy(tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return copies of arrays by name, since a network's own may train on.

    Raises:
        TypeError: If these are none.
    """
    check_arrays(tensors)
    return {name: array.copy() for name, array in tensors.items()}


def check_tensors(tensors: Mapping[str, NDArray[Any]], num_classes: int, where: Path) -> None:
    """Raise unless the tensors are those of a DenseNet-121, with finite values.

    Raises:
        CheckpointError: If a tensor is missing, extra, misshapen, not finite or neither half nor
            single precision (int64 for a batch norm's counter), or a variance is negative.
        TypeError: If these are no arrays by name.
    """
    check_arrays(tensors)
    shapes = densenet121_shapes(num_classes)
    missing = [name for name in shapes if name not in tensors]
    extra = [name for name in tensors if name not in shapes]
    if missing or extra:
        raise CheckpointError(
            f"{where} is no DenseNet-121 with {num_classes} classes: "
            f"missing {first_of(missing)}, unexpected {first_of([brief(n, 100) for n in extra])}. "
            f"{_prefix_advice(missing, extra) or _AGAIN}"
        )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tensors[name].shape}, expected {shape}. {_AGAIN}"
            )
        expected = ("int64",) if name.endswith("num_batches_tracked") else ("float16", "float32")
        if tensors[name].dtype not in expected:
            raise CheckpointError(
                f"{where}: {name} has type {tensors[name].dtype}, expected "
                f"{' or '.join(expected)}. {_AGAIN}"
            )
        if not np.isfinite(tensors[name]).all():
            raise CheckpointError(f"{where}: {name} has values that are not finite. {_AGAIN}")
        if name.endswith("running_var") and (tensors[name] < 0).any():
            raise CheckpointError(f"{where}: {name} has a negative variance. {_AGAIN}")


def _prefix_advice(missing: list[str], extra: list[str]) -> str:
    """Return what to do about names that a wrapper has put something before, or ``""``."""
    last, names = missing[-1] if missing else "", set(extra)
    for prefix in (name.removesuffix(last) for name in extra if last and name.endswith(last)):
        if all(prefix + name in names for name in missing):
            return f"Take {brief(prefix)!r} off the names, which a wrapper has put before them."
    return ""
