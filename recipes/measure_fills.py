"""Measure how far the frame tells sources apart, whatever it is that hides the centre.

    python recipes/measure_fills.py --data ../shared/data --run runs/default

The frame was unlearned with centres hidden in the ways that ``FILLS`` names; what it says under
others tells whether the frame was unlearned or only that way of hiding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from frame import hide
from judge_default import estimate_auroc, judge_held_out, origin_of, score
from PIL import Image

from chestxray_covid import ChestXrayDataset, Classifier, Sample
from chestxray_covid.datasets.loading import in_batches

PARTS = (0.7, 0.9)
#: What hides the centre, and where the weights have met it.
FILLS = {
    "mean": "half of the hidden centres in training, and the projection",
    "black": "training, among random greys",
    "light grey": "training, among random greys",
    "noise": "never",
}
PAIRINGS = tuple((one, other) for one in ("cohen", "hannover") for other in ("kermany", "nih"))
Change = Callable[[Image.Image], Image.Image]


def cover(image: Image.Image, part: float, fill: str) -> Image.Image:
    """Return the image with its central part, by side length, hidden.

    Args:
        image: 8-bit grey.
        part: Share of the side, in (0, 1).
        fill: One of ``FILLS``: the image's mean, 0, 200, or uniform noise of every grey.
    """
    if fill == "mean":
        return hide(image, part)
    pixels = np.array(image)
    height, width = pixels.shape
    top, left = round(height * (1 - part) / 2), round(width * (1 - part) / 2)
    inner = pixels[top : height - top, left : width - left]
    if fill == "noise":
        inner[:] = np.random.default_rng(0).integers(0, 256, inner.shape, np.uint8)
    else:
        inner[:] = {"black": 0, "light grey": 200}[fill]
    return Image.fromarray(pixels)


def covers(fill: str) -> dict[tuple[str, float], Change]:
    """Return (fill, part) → change for both parts."""
    return {(fill, part): lambda image, p=part: cover(image, p, fill) for part in PARTS}


def score_variants(
    classifier: Classifier, dataset: ChestXrayDataset, changes: Mapping[Any, Change]
) -> dict[Any, np.ndarray]:
    """Return name → ``(N, K)`` probabilities of all images, changed in this way."""
    found: dict[Any, list[np.ndarray]] = {name: [] for name in changes}
    for batch in in_batches((dataset.image(i) for i in range(len(dataset))), 32):
        for name, change in changes.items():
            shown = [change(image) for image in batch]
            found[name].append(classifier.predict_proba(shown, batch_size=32))
    return {name: np.concatenate(rows) for name, rows in found.items()}


class Cells:
    """Held-out images of one source and label, and their probabilities under each change.

    Args:
        classifier: Judges them.
        dataset: Held-out patients of all sources.
        changes: Name → what is done to an image.
        limit: Most images per cell.
    """

    def __init__(
        self,
        classifier: Classifier,
        dataset: ChestXrayDataset,
        changes: Mapping[Any, Change],
        *,
        limit: int,
    ) -> None:
        self.samples: dict[tuple[str, str], list[Sample]] = {}
        self.found: dict[tuple[str, str], dict[Any, np.ndarray]] = {}
        wanted = {("cohen", "others"), ("cohen", "pneumonia"), ("nih", "pneumonia")}
        for one, other in PAIRINGS:
            wanted |= {(one, "covid19"), (other, "normal")}
        for source, label in sorted(wanted):
            cell = dataset.filter(
                lambda s, a=source, b=label: (
                    s.source == a and (s.label == b or (b == "others" and s.label != "covid19"))
                )
            ).limit(limit)
            self.samples[source, label] = list(cell.samples)
            self.found[source, label] = score_variants(classifier, cell, changes)
            print(source, label, len(cell), flush=True)

    def auroc(self, one: tuple[str, str], other: tuple[str, str], change: Any) -> dict[str, Any]:
        """Return counts and AUROC of the first cell's class against the second's.

        Against others it is that of p(covid19); against one class, of these two alone.
        """
        samples = [*self.samples[one], *self.samples[other]]
        found = np.concatenate([self.found[one][change], self.found[other][change]])
        truth = [s.label == one[1] for s in samples]
        scores = found[:, 2] if other[1] == "others" else score(found, one[1], other[1])
        value = estimate_auroc(samples, truth, scores)
        return {"n": [sum(truth), len(truth) - sum(truth)], "auroc": value.to_dict()}


def measure(classifier: Classifier, dataset: ChestXrayDataset, *, limit: int) -> dict[str, Any]:
    """Return the content of ``other_fills.json``."""
    changes: dict[tuple[str, float], Change] = {}
    for fill in FILLS:
        changes |= covers(fill)
    cells = Cells(classifier, dataset, changes, limit=limit)
    rows = [
        {
            "covid19": one,
            "normal": other,
            "fill": fill,
            "hidden": part,
            **cells.auroc((one, "covid19"), (other, "normal"), (fill, part)),
        }
        for one, other in PAIRINGS
        for fill, part in changes
    ]
    return {**origin_of(classifier), "fills": FILLS, "rows": rows}


def main() -> None:
    judge_held_out(__doc__, "other_fills", measure)


if __name__ == "__main__":
    main()
