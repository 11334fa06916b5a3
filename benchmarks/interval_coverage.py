"""How often a 95 % interval of an AUROC holds the true one, where images of a patient are alike.

Simulates patients with one to four images, whose scores are normal with a part that the images of
a patient share (half of the variance), so that the true AUROC is known (binormal model); looks
whether the interval that is used holds it, one by drawing patients, and one by drawing images. The
same for the difference of two models on the same images, whose scores share half of their noise.
Run: python benchmarks/interval_coverage.py
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
from common import write
from tqdm import tqdm

from chestxray_covid.comparison import delong_test
from chestxray_covid.delong import auroc_by_group
from chestxray_covid.intervals import Estimate, bootstrap_by_group
from chestxray_covid.metrics import auroc

#: Patients with and without the disease.
PATIENTS = ((100, 100), (40, 40), (10, 100))
AUROCS = (0.75, 0.95, 0.99)
#: Of two models on the same images.
PAIRS = ((0.75, 0.75), (0.95, 0.95), (0.95, 0.85), (0.99, 0.95))
IMAGES = (1, 1, 2, 4)
SHARED = 0.5
DATA_SETS = 400
N_RESAMPLES = 400


def draw(rng: np.random.Generator, patients: tuple[int, int]) -> tuple[Any, Any]:
    """Return patients and truth of the images of one data set."""
    ill, count = patients[0], sum(patients)
    owners = np.repeat(np.arange(count), rng.choice(IMAGES, count))
    return owners, (owners < ill).astype(int)


def noise(rng: np.random.Generator, owners: Any) -> Any:
    """Return a standard normal number for each image."""
    own = math.sqrt(1 - SHARED) * rng.standard_normal(len(owners))
    return own + math.sqrt(SHARED) * rng.standard_normal(owners.max() + 1)[owners]


def apart(true: float, truth: Any) -> Any:
    """Return what, added to such noise, gives scores of this AUROC."""
    return NormalDist().inv_cdf(true) * math.sqrt(2) * truth


def of_one(
    rng: np.random.Generator, patients: tuple[int, int], true: float, seed: int
) -> dict[str, Estimate]:
    """Return the intervals of the AUROC of one data set, by the way in which they are made."""
    owners, truth = draw(rng, patients)
    scores = noise(rng, owners) + apart(true, truth)
    groups = {"by_patient": owners, "by_image": np.arange(len(owners))}
    how = {"n_resamples": N_RESAMPLES, "seed": seed}
    found = {n: bootstrap_by_group(auroc, g, truth, scores, **how) for n, g in groups.items()}
    return {"used": auroc_by_group(truth, scores, owners), **found}


def of_two(
    rng: np.random.Generator, patients: tuple[int, int], true: tuple[float, float], seed: int
) -> dict[str, Estimate]:
    """Return likewise the intervals of the difference of two AUROCs."""
    owners, truth = draw(rng, patients)
    common = noise(rng, owners)
    scores = [(common + noise(rng, owners)) / math.sqrt(2) + apart(area, truth) for area in true]

    def gap(t: Any, a: Any, b: Any, *, sample_weight: Any) -> Any:
        return auroc(t, a, sample_weight=sample_weight) - auroc(t, b, sample_weight=sample_weight)

    how = {"n_resamples": N_RESAMPLES, "seed": seed}
    drawn = bootstrap_by_group(gap, owners, truth, *scores, **how)
    return {"used": delong_test(truth, *scores, owners).difference, "by_patient": drawn}


def coverage(intervals: Callable[..., dict[str, Estimate]], value: float) -> dict[str, Any]:
    """Return the shares of intervals that hold the true value, and how many there were not."""
    rng = np.random.default_rng(0)
    held: Counter[str] = Counter()
    undefined = 0
    for seed in range(DATA_SETS):
        found = intervals(rng, seed=seed)
        if math.isnan(found["used"].low):
            undefined += 1
            continue
        held.update({name: e.low <= value <= e.high for name, e in found.items()})
    counted = DATA_SETS - undefined
    return {"undefined": undefined, **{name: hits / counted for name, hits in held.items()}}


def main() -> None:
    rows, differences = [], []
    for patients in tqdm(PATIENTS, unit="design"):
        for true in AUROCS:
            shares = coverage(partial(of_one, patients=patients, true=true), true)
            rows.append({"patients": patients, "auroc": true, **shares})
        for pair in PAIRS:
            shares = coverage(partial(of_two, patients=patients, true=pair), pair[0] - pair[1])
            differences.append({"patients": patients, "aurocs": pair, **shares})
    how = {"data_sets": DATA_SETS, "n_resamples": N_RESAMPLES, "images": IMAGES, "shared": SHARED}
    write("interval_coverage", {**how, "rows": rows, "differences": differences})


if __name__ == "__main__":
    main()
