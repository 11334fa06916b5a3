"""Quantise a checkpoint on radiographs of all sources, and attach what comes out.

    python recipes/quantise_default.py --data ../shared/data --output quantised

The largest values come from some patients, what rounding moves is measured on others; as many
images of each source. With the checkpoint's own folder as ``--output`` it is changed in place.
Takes half a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from collection import once, open_sources

from chestxray_covid import ChestXrayDataset, quantize


def draw(dataset: ChestXrayDataset, counts: Sequence[int]) -> list[ChestXrayDataset]:
    """Return parts without a common patient, each with so many images of each source at most."""
    rng = np.random.default_rng(0)
    parts: list[list[int]] = [[] for _ in counts]
    for source in sorted({s.source for s in dataset.samples}):
        by_patient: dict[str, list[int]] = {}
        for position, sample in enumerate(dataset.samples):
            if sample.source == source:
                by_patient.setdefault(sample.patient_id, []).append(position)
        # One image per patient: the rest would add little.
        images = [int(rng.choice(positions)) for positions in by_patient.values()]
        rng.shuffle(images)
        for part, count in zip(parts, counts, strict=True):
            part += [images.pop() for _ in range(min(count, len(images)))]
    return [dataset.subset(part) for part in parts]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", help="folder, bundled model or repository of the Hub")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--calibration", type=int, default=50, help="images per source")
    parser.add_argument("--evaluation", type=int, default=125, help="images per source")
    options = parser.parse_args(arguments)
    dataset = once(open_sources(options.data))
    calibration, evaluation = draw(dataset, (options.calibration, options.evaluation))
    print(quantize(options.checkpoint, calibration, evaluation=evaluation, output=options.output))


if __name__ == "__main__":
    main()
