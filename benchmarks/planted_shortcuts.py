"""What an audit says of shortcuts that are known, because they were planted.

Plants one cue at a time in phantoms whose label says nothing else, trains a linear model that sees
that cue alone, and audits it on other phantoms; as controls, models whose only signal is the
opacities in the lungs; and counts how often the data items are warned of random numbers. Not asked
is where the heat lies: these models have none.
Run: python benchmarks/planted_shortcuts.py
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from common import write
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from chestxray_covid import ChestXrayDataset, Preprocess, SyntheticChestXray, audit_shortcuts
from chestxray_covid.audit_baselines import grouped_folds, held_out_scores
from chestxray_covid.audit_report import PASS, VERDICTS
from chestxray_covid.audit_verdicts import judge_auroc
from chestxray_covid.datasets.base import Sample
from chestxray_covid.datasets.phantom import phantom_mask
from chestxray_covid.delong import auroc_by_group
from chestxray_covid.intervals import Estimate

Floats = NDArray[np.float64]
#: Returns the pixels ``(S, S)`` with the cue, or without where the flag says so.
Cue = Callable[[Floats, bool, np.random.Generator], Floats]
#: Returns what a model sees, ``(N, D)``, of pixels ``(N, S, S)``.
Sight = Callable[[Floats], Floats]

SIZE_PX = 64
PREPROCESS = Preprocess(size_px=SIZE_PX)
SOURCES = ("a", "b")
SETS = 3  # of phantoms, in each of which every cue is planted
TRAIN, TEST, TEST_WEAK, TEST_SMALL = 200, 200, 300, 60
N_RESAMPLES = 200
#: Random numbers: as many an image as the brightness and the small thumbnail of the audit have.
DATA_SETS, IMAGES, NUMBERS = 100, (40, 100), (2, 64)


@dataclass(frozen=True)
class Case:
    """One cue and the model that sees it; outside the lungs, weak, inside their region, or none."""

    planted: str
    kind: str  # "outside" (or all over the image), "weak", "inside", "lungs"
    sight: Sight
    cue: Cue | None = None
    right: float = 1.0  # share of the images where the cue goes with the label
    test: int = TEST
    tied: float | None = None  # share where the source goes with the label; None deals it evenly
    heart: bool = False  # call the half with the larger hearts ill
    sex: bool = False  # call patients with the cue female, the others male
    first: int = 0  # seed of the first set of phantoms
    drawn: bool = False  # let the bundled network draw the lungs, instead of passing true masks


class Linear:
    """Has what an audit asks of a model: a logistic regression on what it sees."""

    def __init__(self, train: ChestXrayDataset, sight: Sight) -> None:
        self.classes, self.sight = train.classes, sight
        self.model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        self.model.fit(self.predict_features(train), train.targets)

    def predict_proba(self, images: ChestXrayDataset, /, **_: Any) -> Floats:
        """Return ``(N, K)`` probabilities of a data set's images."""
        return self.model.predict_proba(self.predict_features(images))

    def predict_features(self, images: ChestXrayDataset, /, **_: Any) -> Floats:
        """Return ``(N, D)`` numbers, what it sees of them."""
        pixels = np.stack([PREPROCESS(images.image(i))[0] for i in range(len(images))])
        return self.sight(pixels.astype(float))


def square(top: int, bottom: int, left: int, right: int) -> Cue:
    inside = np.zeros((SIZE_PX, SIZE_PX), bool)
    inside[top:bottom, left:right] = True
    return lambda pixels, on, _: np.where(inside & on, 250, pixels)


def borders(pixels: Floats, on: bool, _: Any) -> Floats:
    width = 4 if on else 2
    return np.pad(pixels[width:-width, width:-width], width)


def jpeg(pixels: Floats, on: bool, _: Any) -> Floats:
    file = io.BytesIO()
    as_image(pixels).save(file, "JPEG", quality=25 if on else 95)
    return np.asarray(Image.open(file), float)


def stretch(pixels: Floats, on: bool, _: Any) -> Floats:
    taller = as_image(pixels).resize((SIZE_PX, SIZE_PX + 12)).crop((0, 6, SIZE_PX, SIZE_PX + 6))
    return np.asarray(taller, float) if on else pixels


def breasts(pixels: Floats, on: bool, _: Any) -> Floats:
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX]
    shadows = sum(np.exp(-((y - 40) ** 2 + (x - middle) ** 2) / 60) for middle in (17, 47))
    return pixels + 14 * shadows * on


def patch(top: int, bottom: int, left: int, right: int) -> Sight:
    return lambda pixels: pixels[:, top:bottom, left:right].reshape(len(pixels), -1)


def thumbnail(pixels: Floats, side: int = 8) -> Floats:
    cells = pixels.reshape(len(pixels), side, SIZE_PX // side, side, SIZE_PX // side)
    return cells.mean((2, 4)).reshape(len(pixels), -1)


def sharpness(pixels: Floats) -> Floats:
    return np.log1p([np.abs(np.diff(pixels, axis=axis)).mean((1, 2)) for axis in (1, 2)]).T


def blocks(pixels: Floats) -> Floats:
    steps = np.abs(np.diff(pixels, axis=2))  # every eighth is one between two blocks
    at_edges = steps[:, :, 7::8].mean((1, 2)) / (steps.mean((1, 2)) + 0.1)
    return np.column_stack([at_edges, grain(pixels)[:, 1]])


def heart(pixels: Floats) -> Floats:
    return thumbnail(pixels, 16).reshape(-1, 16, 16)[:, 7:12, 5:13].reshape(len(pixels), -1)


def lung_shades(pixels: Floats) -> Floats:
    """Return how much brighter the lower, lateral part of each lung is than the upper."""
    low = [pixels[:, 30:44, left : left + 16].mean((1, 2)) for left in (8, 40)]
    high = [pixels[:, 16:26, left : left + 10].mean((1, 2)) for left in (14, 40)]
    return np.stack(low, axis=1) - np.stack(high, axis=1)


def both_sides(pixels: Floats) -> Floats:
    cells = thumbnail(pixels + pixels[:, :, ::-1]).reshape(-1, 8, 8)
    return cells[:, 2:6, 1:4].reshape(len(pixels), -1)


def grain(pixels: Floats) -> Floats:
    fine = np.abs(pixels - gaussian_filter(pixels, (0, 1, 1)))
    return np.log1p(np.stack([np.median(fine, axis=(1, 2)), fine.mean((1, 2))], axis=1))


CORNER = Case("a letter in a corner", "outside", patch(0, 9, 0, 9), square(2, 7, 2, 6))
EVERYWHERE = (
    Case("brightness", "outside", lambda p: p.mean((1, 2))[:, None], lambda p, on, _: p + 24 * on),
    Case("noise", "outside", grain, lambda p, on, rng: p + rng.normal(0, 8 if on else 2, p.shape)),
    Case("blur", "outside", sharpness, lambda p, on, _: gaussian_filter(p, 0.9) if on else p),
    Case("JPEG blocks", "outside", blocks, jpeg),
)
OUTSIDE = (
    CORNER,
    Case("a letter over a shoulder", "outside", patch(10, 16, 47, 56), square(11, 15, 48, 55)),
    Case("a spot below the lungs", "outside", patch(49, 55, 28, 36), square(50, 54, 29, 35)),
    Case("width of black borders", "outside", thumbnail, borders),
    *EVERYWHERE,
    Case("proportions", "outside", thumbnail, stretch, drawn=True),
)
WEAK = tuple(
    replace(case, planted=f"{case.planted}, {right:.0%}", kind="weak", right=right, test=TEST_WEAK)
    for case in (CORNER, *EVERYWHERE)
    for right in (0.70, 0.75)
)
INSIDE = (
    Case("a square over the mediastinum", "inside", patch(21, 27, 29, 35), square(22, 26, 30, 34)),
    Case("a spot in one lung", "inside", patch(24, 29, 15, 20), square(25, 28, 16, 19)),
    Case("size of the heart", "inside", heart, heart=True),
    Case("shadows of breasts, called female, 90%", "inside", both_sides, breasts, 0.9, sex=True),
)
LUNGS = (
    Case("the whole image is seen", "lungs", thumbnail, first=10),
    Case("the lungs are seen", "lungs", lung_shades, first=20),
    Case("the lungs, masks drawn by the network", "lungs", lung_shades, first=30, drawn=True),
    Case("the lungs, 60 images", "lungs", lung_shades, first=40, test=TEST_SMALL),
    Case("the lungs, source right in 65%", "lungs", lung_shades, first=50, tied=0.65),
    Case("the lungs, source right in 85%", "lungs", lung_shades, first=60, tied=0.85),
)


@lru_cache(maxsize=4)
def drawn(count: int, seed: int, signal: str) -> ChestXrayDataset:
    """Return phantoms that are drawn once, each of a patient of its own."""
    how: dict[str, Any] = {"image_size_px": SIZE_PX, "sources": SOURCES, "views": ("PA", "AP")}
    dataset = SyntheticChestXray(count, patients=count, seed=seed, signal=signal, **how)
    samples = [shown(sample, sample.read(sample, None)) for sample in dataset.samples]
    return ChestXrayDataset(samples, classes=dataset.classes)


def shown(sample: Sample, image: Image.Image, **changes: Any) -> Sample:
    return replace(sample, read=lambda *_: image, **changes)


def phantoms(case: Case, seed: int) -> ChestXrayDataset:
    """Return the phantoms of a case with its cue planted."""
    bare = drawn(TRAIN + case.test, seed, "lungs" if case.kind == "lungs" else "none")
    rng = np.random.default_rng((seed, 1))
    samples = [planted(case, sample, rng) for sample in bare.samples]
    if case.heart:
        ratios = heart_ratios(len(samples), seed)
        labels = np.where(ratios > np.median(ratios), "covid19", "normal").tolist()
        samples = [replace(s, label=label) for s, label in zip(samples, labels, strict=True)]
    return ChestXrayDataset(samples, classes=bare.classes)


def planted(case: Case, sample: Sample, rng: np.random.Generator) -> Sample:
    on = (sample.label == "covid19") == (rng.random() < case.right)
    image, changes = sample.read(sample, None), {}
    if case.cue:
        image = as_image(case.cue(np.array(image, float), on, rng))
    if case.tied is not None:
        changes["source"] = SOURCES[on == (rng.random() < case.tied)]
    if case.sex:
        changes["metadata"] = {**sample.metadata, "sex": "F" if on else "M"}
    return shown(sample, image, **changes)


def as_image(pixels: Floats) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def heart_ratios(count: int, seed: int) -> Floats:
    """Return how wide the hearts of phantoms are, shares of the width of the chest."""
    ratios = []
    larger = SyntheticChestXray(count, image_size_px=4 * SIZE_PX, patients=count, seed=seed)
    for mask in map(phantom_mask, larger.samples):
        middle, rows = mask.shape[1] // 2, np.flatnonzero(mask.any(1))
        level = mask[rows[len(rows) * 2 // 5 : len(rows) * 4 // 5]]  # above the domes
        gap = level[:, :middle][:, ::-1].argmax(1) + level[:, middle:].argmax(1)
        ratios.append(gap.max() / np.ptp(np.flatnonzero(mask.any(0))))
    return np.array(ratios)


def audited(case: Case, seed: int) -> dict[str, Any]:
    """Return what the audit says of the model that sees one cue."""
    both = phantoms(case, seed)
    train, test = both.subset(range(TRAIN)), both.subset(range(TRAIN, len(both)))
    masks = None if case.drawn else phantom_mask
    model = Linear(train, case.sight)
    how: dict[str, Any] = {"preprocess": PREPROCESS, "n_resamples": N_RESAMPLES}
    report = audit_shortcuts(model, test, train, masks=masks, **how)
    occlusion, data = report.item("occlusion"), report.item("without_lungs")
    left = occlusion.finding("lungs_hidden")
    return {
        "overall": report.verdict,
        "items": {item.name: item.verdict for item in report.items},
        "reasons": {item.name: item.reason for item in report.items if item.verdict != PASS},
        "auroc": plain(occlusion.finding("whole").estimate),
        "lungs_hidden": plain(left.estimate),
        "lungs_hidden_change": plain(left.change),
        "without_lungs": {f.name: plain(f.estimate)["value"] for f in data.findings},
    }


def plain(estimate: Estimate) -> dict[str, float | None]:
    """Return a number and its interval, undefined ones as ``None``."""
    found = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: None if v != v else round(float(v), 4) for name, v in found.items()}


def chance(images: int, numbers: int) -> dict[str, Any]:
    """Return how often a linear model is warned of where there is nothing but chance."""
    rng, truth, groups = np.random.default_rng(0), np.arange(images) % 2, np.arange(images)
    found = []
    for seed in range(DATA_SETS):
        folds = grouped_folds(truth, groups, seed=seed)
        assert folds is not None
        scores = held_out_scores(rng.normal(size=(images, numbers)), truth, folds)
        found.append(auroc_by_group(truth, scores[:, 1], groups.tolist()))
    judged = [judge_auroc(estimate) for estimate in found]
    below = sum(estimate.high < 0.5 for estimate in found)
    counts = {verdict: judged.count(verdict) for verdict in VERDICTS}
    return {"images": images, "numbers": numbers, **counts, "interval_below_half": below}


@threadpool_limits.wrap(limits=1)  # these matrices are so small that threads only wait
def main() -> None:
    rows = []
    for case in tqdm((*OUTSIDE, *WEAK, *INSIDE, *LUNGS), unit="cue"):
        about = {"planted": case.planted, "kind": case.kind, "right": case.right, "n": case.test}
        rows.append({**about, "sets": [audited(case, case.first + i) for i in range(SETS)]})
    designs = tqdm([(images, n) for images in IMAGES for n in NUMBERS], unit="design")
    by_chance = [chance(*design) for design in designs]
    how = {"size_px": SIZE_PX, "train": TRAIN, "n_resamples": N_RESAMPLES, "data_sets": DATA_SETS}
    write("planted_shortcuts", {**how, "rows": rows, "chance": by_chance})


if __name__ == "__main__":
    main()
