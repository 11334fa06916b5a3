"""A DenseNet with one layer per block, for tests of what does not depend on the depth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torchvision

from chestxray_covid import engine_onnx, engine_openvino, graph, tensors

BLOCKS = (1, 1, 1, 1)
FEATURE_COUNT = 68


def make_shallow(change: Callable[[object, str, object], None] = setattr) -> None:
    """Let every DenseNet-121 have that depth; a short training run takes a quarter of the time."""
    network = partial(torchvision.models.DenseNet, 32, BLOCKS, 64)
    change(torchvision.models, "densenet121", lambda weights=None, **options: network(**options))
    for module in (tensors, graph):
        change(module, "BLOCKS", BLOCKS)
    for module in (graph, engine_onnx, engine_openvino):
        change(module, "FEATURE_COUNT", FEATURE_COUNT)
