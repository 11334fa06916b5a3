"""The block of ``export.md`` about the bundled model in eight bits.

Called by ``generate.py``; reads the report that ``recipes/quantise_default.py`` left in the bundled
checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from generate import DOCS, with_block

from chestxray_covid import resolve

START, END = "<!-- int8:start -->", "<!-- int8:end -->"


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
    return "\n".join(
        [
            f"It was calibrated on {report['calibration_images']} radiographs and compared on "
            f"{report['evaluation_images']},",
            "of other patients. Many of both were among those that it was trained on, so that the "
            "AUROC",
            "says nothing about the model, and its change all about int8:",
            "",
            "| What moved | By |",
            "| --- | --- |",
            *(f"| {name} | {value} |" for name, value in rows),
        ]
    )


def page(page: Path = DOCS / "export.md") -> str:
    """Return the page with its block as the bundled report has it."""
    report = json.loads((resolve() / "int8.json").read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    return with_block(text, int8_block(report), start=START, end=END)


def write_page() -> None:
    """Write the block."""
    (DOCS / "export.md").write_text(page(), encoding="utf-8")
