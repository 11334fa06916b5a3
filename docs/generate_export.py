"""The blocks of ``export.md`` about the bundled model in eight bits.

Called by ``generate.py``; reads the report that ``recipes/quantise_default.py`` left in the bundled
checkpoint, and what ``benchmarks/int8.py`` measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from generate import DOCS, table, with_blocks, wrapped

from chestxray_covid import resolve

ROUNDING = DOCS.parent / "benchmarks" / "results" / "int8.json"
#: Names of the benchmark → those of the page.
NAMES = {"float32": "float32", "NNCF": "int8 by NNCF", "int8": "int8 by this library"}


def int8_block(report: Mapping[str, Any]) -> str:
    """Return what int8 moves, as a table."""
    rows = [
        ("probability, mean change", f"{report['mean_difference']:.4f}"),
        ("probability, 99th percentile", f"{report['p99_difference']:.4f}"),
        ("probability, largest change", f"{report['max_difference']:.4f}"),
        ("labels that are others", str(report["flipped_labels"])),
    ]
    for found in report["auroc"]:
        change = found["change"]
        interval = f"{change['low']:+.4f} to {change['high']:+.4f}"
        values = f"{found['before']:.4f} → {found['after']:.4f}"
        rows.append(
            (f"AUROC, {found['question']}", f"{values}, {change['value']:+.4f} ({interval})")
        )
    said = (
        f"It was calibrated on {report['calibration_images']} radiographs and compared on "
        f"{report['evaluation_images']}, of other patients. Many of both were among those that it "
        "was trained on, so that the AUROC says nothing about the model, and its change all about "
        "int8:"
    )
    return "\n\n".join([wrapped(said), table(("What moved", "By"), rows)])


def rounding_block(found: Mapping[str, Any]) -> str:
    """Return this library's rounding beside NNCF's, as a table."""
    machine, models = found["machine"], found["models"]
    said = (
        f"The same beside the post-training quantisation of NNCF {machine['versions']['nncf']} "
        "with its defaults, the first and the last layer left out as here: "
        f"{found['evaluation_images']} radiographs, calibrated on "
        f"{found['calibration_images']}, two images at a time on "
        f"{machine['cores']} cores ({machine['processor']}), in one run of `{found['command']}`:"
    )
    rows = [
        (
            NAMES[name],
            *(f"{row[key]:.4f}" for key in ("mean", "p99", "largest")),
            f"{row['images_per_s']:.0f}",
        )
        for name, row in models.items()
    ]
    moved = ("change of a probability, mean", "99th percentile", "largest")
    return "\n\n".join([wrapped(said), table(("Computed in", *moved, "images/s"), rows)])


def page(page: Path = DOCS / "export.md") -> str:
    """Return the page with its blocks as the bundled report and the benchmark have them."""
    report = json.loads((resolve() / "int8.json").read_text(encoding="utf-8"))
    found = json.loads(ROUNDING.read_text(encoding="utf-8"))
    blocks = {"int8": int8_block(report), "rounding": rounding_block(found)}
    return with_blocks(page.read_text(encoding="utf-8"), blocks)


def write_page() -> None:
    """Write the blocks."""
    (DOCS / "export.md").write_text(page(), encoding="utf-8")
