"""Compare every engine and precision with float32 torch on real radiographs.

    python recipes/judge_engines.py --data ../shared/data

What keeps the probabilities is what ``engine="auto"`` may choose for these weights. float16 is
meant for CUDA; its rounding is the same on a CPU, where it is compared here. An engine that is not
installed, or a precision that torch lacks here, is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from collection import once, open_sources
from numpy.typing import NDArray

from chestxray_covid import ChestXrayDataset, MissingExtraError, resolve
from chestxray_covid.checkpoint import ModelConfig, load_checkpoint
from chestxray_covid.datasets.loading import decoder, map_ahead
from chestxray_covid.engines import Engine, keeps_probabilities, open_engine, softmax
from chestxray_covid.files import write_files
from chestxray_covid.metrics import auroc

OUTPUT = Path(__file__).parents[1] / "src" / "chestxray_covid" / "weights" / "engines.json"
JUDGED = (
    *(("openvino", "float32"), ("openvino", "bfloat16"), ("onnx", "float32")),
    *(("torch", "bfloat16"), ("torch", "float16")),
)


def choose(dataset: ChestXrayDataset, count: int) -> list[int]:
    """Return positions of as many radiographs of each source, drawn at random."""
    rng = np.random.default_rng(0)
    sources = np.array([s.source for s in dataset.samples])
    names = np.unique(sources)
    shares = [min(count // len(names), int((sources == name).sum())) for name in names]
    drawn = (
        rng.choice(np.flatnonzero(sources == name), share, replace=False)
        for name, share in zip(names, shares, strict=True)
    )
    return [int(position) for part in drawn for position in part]


def probabilities(engine: Engine, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    return np.concatenate(
        [softmax(engine(pixels[i : i + 16])[0]) for i in range(0, len(pixels), 16)]
    )


def compare(
    config: ModelConfig,
    found: NDArray[np.float64],
    exact: NDArray[np.float64],
    labels: Sequence[str],
) -> dict[str, Any]:
    """Return by how much probabilities differ, and the AUROC of COVID-19 against normal."""
    differences = np.abs(found - exact).max(1)
    covid19, normal = (config.classes.index(name) for name in ("covid19", "normal"))
    rows = np.isin(labels, ("covid19", "normal"))
    truth = np.asarray(labels)[rows] == "covid19"
    areas = [auroc(truth.astype(int), _score(p[rows], covid19, normal)) for p in (found, exact)]
    return {
        "images": len(found),
        "p99": float(np.quantile(differences, 0.99)),
        "largest": float(differences.max()),
        "auroc_change": areas[0] - areas[1],
    }


def _score(rows: NDArray[np.float64], covid19: int, normal: int) -> NDArray[np.float64]:
    return rows[:, covid19] / (rows[:, covid19] + rows[:, normal])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", help="folder, bundled model or repository of the Hub")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    config, tensors = load_checkpoint(resolve(options.checkpoint))
    dataset = once(open_sources(options.data))
    positions = choose(dataset, options.count)
    pixels = np.stack(list(map_ahead(decoder(dataset, config.preprocess), positions)))
    labels = [dataset.samples[position].label for position in positions]
    exact = probabilities(open_engine(config, tensors, engine="torch", precision="float32"), pixels)
    rows = {}
    for name, precision in JUDGED:
        try:
            engine = open_engine(config, tensors, engine=name, precision=precision)
            row = compare(config, probabilities(engine, pixels), exact, labels)
        except (MissingExtraError, RuntimeError) as error:
            print(f"{name}-{precision} is left out: {error}")
            continue
        rows[f"{name}-{precision}"] = row
        print(name, precision, row, "kept" if keeps_probabilities(**row) else "NOT kept")
    known = json.loads(options.output.read_text()) if options.output.is_file() else {}
    text = json.dumps({**known, config.weights_sha256: rows}, indent=1, sort_keys=True)
    write_files(options.output.parent, {options.output.name: f"{text}\n".encode()})


if __name__ == "__main__":
    main()
