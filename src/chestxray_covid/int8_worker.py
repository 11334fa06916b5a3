"""Quantises a model with NNCF, in a process of its own.

When it is imported, NNCF changes the class of all loggers; it prints progress; and it sends usage
to its makers. None of that may happen in the caller's process, and the last nowhere.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.engine_openvino import import_openvino, openvino_core
from chestxray_covid.errors import ExportError, MissingExtraError, require_extra
from chestxray_covid.graph import PIXELS
from chestxray_covid.int8 import INT8_NAME, Int8

_MODEL, _PIXELS = "model.xml", "pixels.npy"


def statistics_of(model: Any, pixels: NDArray[np.uint8]) -> Int8:
    """Return the statistics that NNCF finds with calibration images.

    Args:
        model: From :func:`engine_openvino.openvino_model`, for one image at a time.
        pixels: ``(N, 1, S, S)`` of the calibration images.

    Raises:
        ExportError: If NNCF fails.
        MissingExtraError: If NNCF or OpenVINO is not installed.
    """
    openvino = import_openvino()
    if importlib.util.find_spec("nncf") is None:
        raise MissingExtraError(
            'nncf is not installed. Install it with: pip install "chestxray-covid[int8]"'
        )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        openvino.save_model(model, place / _MODEL, compress_to_fp16=False)
        np.save(place / _PIXELS, pixels)
        source = str(Path(__file__).parents[1])
        paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "chestxray_covid.int8_worker", folder],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
            raise ExportError(f"NNCF could not quantise the model; its last words: {said[-1]}")
        return Int8.from_bytes((place / INT8_NAME).read_bytes())


def main(folder: Path) -> None:
    """Write the statistics of the model in a folder beside it."""
    pixels = np.load(folder / _PIXELS, allow_pickle=False)
    model = openvino_core().read_model(folder / _MODEL)
    # As there. NNCF's variable NNCF_CI would keep it from sending, too, but not from leaving an
    # identifier in the home folder.
    sys.modules["openvino_telemetry"] = cast(ModuleType, None)
    nncf = require_extra("nncf", "int8")
    found = nncf.quantize(
        model,
        nncf.Dataset(list(pixels[:, np.newaxis]), lambda image: {PIXELS: image}),
        subset_size=len(pixels),
        # The first layer loses most. The last costs nothing, and a model that is restricted to some
        # classes has some of its rows only.
        ignored_scope=nncf.IgnoredScope(names=["features.conv0.sum"], types=["MatMul"]),
    )
    (folder / INT8_NAME).write_bytes(read_statistics(found).to_bytes())


def read_statistics(model: Any) -> Int8:
    """Return the statistics in a model that NNCF has quantised."""
    ranges, biases = {}, {}
    for node in model.get_ordered_ops():
        kind, name = node.get_type_name(), node.get_friendly_name()
        if not node.get_input_size():
            continue
        source = node.input_value(0).get_node()
        if kind == "FakeQuantize" and source.get_type_name() != "Convert":
            low, high = (float(node.input_value(k).get_node().data.ravel()[0]) for k in (1, 2))
            ranges[source.get_friendly_name()] = (low, high)
        elif kind == "Add" and _is_rounded(source):
            for relu in (target.get_node() for target in node.output(0).get_target_inputs()):
                if relu.get_type_name() == "Relu":
                    name = relu.get_friendly_name()
            biases[name] = node.input_value(1).get_node().data.ravel().astype(np.float32)
    return Int8(ranges=ranges, biases=biases)


def _is_rounded(node: Any) -> bool:
    """Return whether a node is a convolution whose weights are no longer plain numbers."""
    weight = node.input_value(1).get_node() if node.get_type_name() == "Convolution" else node
    return weight is not node and weight.get_type_name() != "Constant"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
