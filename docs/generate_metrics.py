"""Write how often the intervals of AUROCs, and of their differences, hold the truth.

Called by ``generate.py``; reads what ``benchmarks/interval_coverage.py`` leaves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from generate import DOCS, fill, table, wrapped

RESULT = DOCS.parent / "benchmarks" / "results" / "interval_coverage.json"


def write_page() -> None:
    """Write the blocks of ``docs/metrics.md``."""
    fill(DOCS / "metrics.md", blocks(json.loads(RESULT.read_text("utf-8"))))


def blocks(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the blocks by name."""
    return {"coverage": coverage_block(found), "differences": difference_block(found)}


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
            _patients(row),
            f"{row['auroc']:.2f}",
            f"{row['used']:.0%}",
            f"{row['by_patient']:.0%}",
            f"{row['by_image']:.0%}",
        )
        for row in found["rows"]
    ]
    return f"{wrapped(said)}\n\n{table(head, cells)}"


def difference_block(found: Mapping[str, Any]) -> str:
    """Return what share of the intervals hold the true difference, as text and table."""
    said = f"""
        In {found["data_sets"]} data sets each like those above, judged by two models whose scores
        share half of their noise, so many had the true difference in their 95 % interval; drawing
        patients {found["n_resamples"]} times is shown beside it."""
    head = ("Patients with and without", "True AUROCs", "As here", "Patients drawn")
    cells = [
        (
            _patients(row),
            "{:.2f} and {:.2f}".format(*row["aurocs"]),
            f"{row['used']:.0%}",
            f"{row['by_patient']:.0%}",
        )
        for row in found["differences"]
    ]
    return f"{wrapped(said)}\n\n{table(head, cells)}"


def _patients(row: Mapping[str, Any]) -> str:
    return "{} and {}".format(*row["patients"])
