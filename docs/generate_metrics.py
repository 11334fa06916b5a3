"""Write how often the intervals of AUROCs hold the truth.

Called by ``generate.py``; reads what ``benchmarks/interval_coverage.py`` leaves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from generate import DOCS, fill, table, wrapped

RESULT = DOCS.parent / "benchmarks" / "results" / "interval_coverage.json"


def write_page() -> None:
    """Write the block of ``docs/metrics.md``."""
    fill(DOCS / "metrics.md", {"coverage": coverage_block(json.loads(RESULT.read_text("utf-8")))})


def coverage_block(found: Mapping[str, Any]) -> str:
    """Return what share of the intervals hold the true AUROC, as text and table."""
    sizes = found["images"]
    said = f"""
        Of {found["data_sets"]} simulated data sets each, with {min(sizes)} to {max(sizes)}
        images a patient that share {found["shared"]:.0%} of the variance, so many had the true
        AUROC in their 95 % interval (`python benchmarks/interval_coverage.py`); with drawn patients
        fewer would, where an AUROC is near 1 or few patients have the disease, and with drawn
        images still fewer ({found["n_resamples"]} times each). Data sets with an AUROC of exactly
        1, which has no interval, are not counted: {max(r["undefined"] for r in found["rows"])} at
        most."""
    head = ("Patients with and without", "True AUROC", "As here", "Patients drawn", "Images drawn")
    cells = [
        (
            f"{row['patients'][0]} and {row['patients'][1]}",
            f"{row['auroc']:.2f}",
            f"{row['used']:.0%}",
            f"{row['by_patient']:.0%}",
            f"{row['by_image']:.0%}",
        )
        for row in found["rows"]
    ]
    return f"{wrapped(said)}\n\n{table(head, cells)}"
