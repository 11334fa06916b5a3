"""Measure what is left of the answers when radiographs were reduced before the model got them.

    python recipes/measure_reduction.py --data ../shared/data --run runs/default

Held-out radiographs with so many pixels that the shorter side is a share of the model's input: how
many get another label than whole, how well COVID-19 is told from normal, and how many are refused
for what they look like then, whatever ``low_resolution`` says of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from judge_default import estimate_auroc, judge_held_out, origin_of
from PIL import Image

from chestxray_covid import ChestXrayDataset, Classifier, Prediction, concatenate
from chestxray_covid.datasets.loading import in_batches

#: Shorter sides, relative to that of the model's input; 0 stands for the whole image.
SHARES = (0, 0.6, 0.4, 0.3, 0.2, 0.15, 0.1, 0.075, 0.05)


def reduced(image: Image.Image, side: int) -> Image.Image:
    """Return the image with a shorter side of so many pixels; 0 leaves it as it is."""
    share = side / min(image.size) if side else 1.0
    if share >= 1:
        return image
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    return image.resize(size, Image.Resampling.BOX)


def judge(
    classifier: Classifier, dataset: ChestXrayDataset, sides: Mapping[float, int]
) -> dict[float, list[Prediction]]:
    """Return share → the predictions of all images, reduced to its side."""
    found: dict[float, list[Prediction]] = {share: [] for share in sides}
    for batch in in_batches((dataset.image(i) for i in range(len(dataset))), 32):
        for share, side in sides.items():
            found[share] += classifier.predict([reduced(image, side) for image in batch])
    return found


def measure(classifier: Classifier, dataset: ChestXrayDataset, *, limit: int) -> dict[str, Any]:
    """Return the content of ``reduction.json``."""
    parts = [dataset.filter(lambda s, a=a: s.source == a).limit(limit) for a in dataset.sources]
    chosen = concatenate(parts)
    size = classifier.config.preprocess.size_px
    sides = {share: round(share * size) for share in SHARES}
    found = judge(classifier, chosen, sides)
    binary = [i for i, s in enumerate(chosen.samples) if s.label in ("covid19", "normal")]
    samples = [chosen.samples[i] for i in binary]
    truth = [s.label == "covid19" for s in samples]
    whole = np.array([p.label for p in found[0]])
    rows = []
    for share, shown in found.items():
        scores = np.array([shown[i].score for i in binary])
        refused = [any(f.abstains and f.name != "low_resolution" for f in p.flags) for p in shown]
        rows.append(
            {
                "share": share,
                "side_px": sides[share],
                "changed": float((np.array([p.label for p in shown]) != whole).mean()),
                "refused": float(np.mean(refused)),
                "auroc": estimate_auroc(samples, truth, scores).to_dict(),
            }
        )
        print(rows[-1], flush=True)
    counts = {"images": len(chosen), "n": [sum(truth), len(truth) - sum(truth)]}
    return {**origin_of(classifier), "size_px": size, **counts, "rows": rows}


def main() -> None:
    judge_held_out(__doc__, "reduction", measure)


if __name__ == "__main__":
    main()
