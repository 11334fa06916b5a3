"""A DenseNet with one layer per block, for tests of what does not depend on the depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from chestxray_covid import (
    checkpoint,
    engine_onnx,
    engine_openvino,
    export,
    gate,
    gate_fit,
    gate_probe,
    graph,
    tensors,
)

BLOCKS = (1, 1, 1, 1)
FEATURE_COUNT = 68
#: A DenseNet-121's own: only this module changes them.
REAL = tensors.BLOCKS, tensors.FEATURE_COUNT
#: For processes that neither build nor train a network.
CODE = "from shallow import make_shallow; make_shallow(builds=False)\n"


def _set_depth(
    change: Callable[[object, str, object], None], blocks: tuple[int, ...], features: int
) -> None:
    for module in (tensors, graph):
        change(module, "BLOCKS", blocks)
    gates = gate, gate_fit, gate_probe
    for module in (checkpoint, engine_onnx, engine_openvino, export, *gates, tensors):
        change(module, "FEATURE_COUNT", features)


def make_shallow(
    change: Callable[[object, str, object], None] = setattr, *, builds: bool = True
) -> None:
    """Let every DenseNet-121 have that depth; a short training run takes a quarter of the time."""
    _set_depth(change, BLOCKS, FEATURE_COUNT)
    if builds:
        import torchvision

        network = partial(torchvision.models.DenseNet, 32, BLOCKS, 64)
        change(
            torchvision.models, "densenet121", lambda weights=None, **options: network(**options)
        )


@contextmanager
def shallow_networks() -> Iterator[None]:
    """Let every DenseNet-121 have one layer per block meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        make_shallow(patch.setattr)
        yield


@contextmanager
def real_networks() -> Iterator[None]:
    """Let every DenseNet-121 be one meanwhile, amid tests with shallow networks."""
    import torchvision

    with pytest.MonkeyPatch.context() as patch:
        _set_depth(patch.setattr, *REAL)
        patch.setattr(torchvision.models, "densenet121", torchvision.models.densenet.densenet121)
        yield
