"""How often a 95 % interval of an AUROC holds the true one, where images of a patient are alike.

Simulates patients with one to four images, whose scores are normal with a part that the images of
a patient share (half of the variance), so that the true AUROC is known (binormal model); looks
whether the interval that is used holds it, one by drawing patients, and one by drawing images.
Run: python benchmarks/interval_coverage.py
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
from common import write
from tqdm import tqdm

from chestxray_covid.delong import auroc_by_group
from chestxray_covid.intervals import bootstrap_by_group
from chestxray_covid.metrics import auroc

#: Patients with and without the disease.
PATIENTS = ((100, 100), (40, 40), (10, 100))
AUROCS = (0.75, 0.95, 0.99)
IMAGES = (1, 1, 2, 4)
SHARED = 0.5
DATA_SETS = 400
N_RESAMPLES = 400


def draw(rng: np.random.Generator, patients: tuple[int, int], true: float) -> tuple[Any, Any, Any]:
    """Return patients, truth and scores of the images of one data set."""
    ill, count = patients[0], sum(patients)
    owners = np.repeat(np.arange(count), rng.choice(IMAGES, count))
    truth = (owners < ill).astype(int)
    own = math.sqrt(1 - SHARED) * rng.standard_normal(len(owners))
    shared = math.sqrt(SHARED) * rng.standard_normal(count)[owners]
    return owners, truth, own + shared + NormalDist().inv_cdf(true) * math.sqrt(2) * truth


def coverage(patients: tuple[int, int], true: float) -> dict[str, Any]:
    """Return the shares of intervals that hold the true AUROC, and how many there were."""
    rng = np.random.default_rng(0)
    held, undefined = dict.fromkeys(("used", "by_patient", "by_image"), 0), 0
    for seed in range(DATA_SETS):
        owners, truth, scores = draw(rng, patients, true)
        groups = {"by_patient": owners, "by_image": np.arange(len(owners))}
        found = {
            name: bootstrap_by_group(
                auroc, g.tolist(), truth, scores, n_resamples=N_RESAMPLES, seed=seed
            )
            for name, g in groups.items()
        }
        found["used"] = auroc_by_group(truth, scores, owners.tolist())
        if math.isnan(found["used"].low):
            undefined += 1
            continue
        for name, estimate in found.items():
            held[name] += estimate.low <= true <= estimate.high
    counted = DATA_SETS - undefined
    shares = {name: hits / counted for name, hits in held.items()}
    return {"patients": patients, "auroc": true, "undefined": undefined, **shares}


def main() -> None:
    designs = [(patients, true) for patients in PATIENTS for true in AUROCS]
    rows = [coverage(*design) for design in tqdm(designs, unit="design")]
    how = {"data_sets": DATA_SETS, "n_resamples": N_RESAMPLES, "images": IMAGES, "shared": SHARED}
    write("interval_coverage", {**how, "rows": rows})


if __name__ == "__main__":
    main()
