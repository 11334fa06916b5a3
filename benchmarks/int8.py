"""The bundled model in eight bits: this library's rounding against NNCF's, in one run.

    CHESTXRAY_COVID_DATA=../shared/data python benchmarks/int8.py

needs ``pip install "chestxray-covid[bench]"`` and takes two minutes. NNCF is given the same network
and calibration radiographs, its defaults, and the first and the last layer left out, as here. Both
are compared with float32 on radiographs of other patients, and timed in turn, two images at a time.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
from common import write
from numpy.typing import NDArray

from chestxray_covid import resolve
from chestxray_covid.checkpoint import load_checkpoint
from chestxray_covid.engine_openvino import largest_values, openvino_core, openvino_model
from chestxray_covid.engines import softmax
from chestxray_covid.graph import LOGITS, PIXELS, fold
from chestxray_covid.int8 import Int8, rounded_results

CALIBRATION, EVALUATION = 50, 125  # images per source
ROUNDS, TIMED = 5, 100


def nncf_model(model: Any, pixels: NDArray[np.uint8]) -> Any:
    """Return the model as NNCF's post-training quantisation leaves it."""
    # It would report its use to its makers, and leave an identifier in the home folder.
    sys.modules["openvino_telemetry"] = cast(ModuleType, None)
    import nncf

    return nncf.quantize(
        model,
        nncf.Dataset(list(pixels[:, np.newaxis]), lambda image: {PIXELS: image}),
        subset_size=len(pixels),
        ignored_scope=nncf.IgnoredScope(names=["features.conv0.sum"], types=["MatMul"]),
    )


def compile_model(model: Any) -> Any:
    options = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 2, "ENABLE_CPU_PINNING": False}
    return openvino_core().compile_model(model, "CPU", options)


def logits(compiled: Any, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return ``(N, K)`` logits; two images are computed at a time."""
    requests = [compiled.create_infer_request() for _ in range(2)]
    rows = []
    for row in range(len(pixels) + 2):
        request = requests[row % 2]
        if row >= 2:
            request.wait()
            rows.append(request.get_tensor(LOGITS).data[0].copy())
        if row < len(pixels):
            request.start_async({PIXELS: pixels[row : row + 1]})
    return np.stack(rows)


def rates(models: Mapping[str, Any], pixels: NDArray[np.uint8]) -> dict[str, list[float]]:
    """Return images per second, round by round."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, compiled in models.items():
            start = time.perf_counter()
            logits(compiled, pixels)
            found[name].append(len(pixels) / (time.perf_counter() - start))
    return found


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
    from collection import once, open_sources
    from quantise_default import draw

    dataset = once(open_sources(Path(os.environ["CHESTXRAY_COVID_DATA"])))
    config, tensors = load_checkpoint(resolve())
    parts = draw(dataset, (CALIBRATION, EVALUATION))
    calibration, evaluation = (
        np.stack([config.preprocess(part.image(i)) for i in range(len(part))]) for part in parts
    )
    network = fold(tensors, config.preprocess)
    own = Int8(largest=largest_values(network, list(rounded_results(network)), calibration))
    models = {
        "float32": compile_model(openvino_model(network, batch=1)),
        "NNCF": compile_model(nncf_model(openvino_model(network, batch=1), calibration)),
        "int8": compile_model(openvino_model(own.apply(network), batch=1)),
    }
    probabilities = {name: softmax(logits(found, evaluation)) for name, found in models.items()}
    speed = rates(models, evaluation[:TIMED])
    rows = {}
    for name, found in probabilities.items():
        moved = np.abs(found - probabilities["float32"]).max(1)
        rows[name] = {
            "mean": float(moved.mean()),
            "p99": float(np.quantile(moved, 0.99)),
            "largest": float(moved.max()),
            "images_per_s": statistics.median(speed[name]),
            "images_per_s_rounds": speed[name],
        }
    counts = {"calibration_images": len(calibration), "evaluation_images": len(evaluation)}
    write("int8", {"command": "python benchmarks/int8.py", **counts, "models": rows})


if __name__ == "__main__":
    main()
