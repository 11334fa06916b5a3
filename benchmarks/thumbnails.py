"""What a linear classifier of thumbnails makes of the classic design, by the page's own snippet.

Run: python benchmarks/thumbnails.py DATA, where DATA holds ``covid-chestxray-dataset`` and
``chest_xray``. Writes ``benchmarks/results/thumbnails.json``, which ``docs/generate.py`` reads.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import write

from chestxray_covid import ChestXrayDataset, CohenCovidDataset, KermanyPneumoniaDataset

PAGE = Path(__file__).parents[1] / "docs" / "shortcuts.md"


def classifier() -> Callable[..., float]:
    """Return ``thumbnail_auroc`` of the page on shortcuts."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(next(block for block in blocks if "def thumbnail_auroc" in block), names)
    found: Callable[..., float] = names["thumbnail_auroc"]
    return found


def measured(data: Path) -> list[dict[str, Any]]:
    """Return the AUROC on both collections, of the frame alone, and inside Cohen's."""
    cohen, auroc = data / "covid-chestxray-dataset", classifier()
    covid19 = CohenCovidDataset(cohen).filter(lambda s: s.label == "covid19")
    normal = KermanyPneumoniaDataset(data).filter(lambda s: s.label == "normal")
    inside = CohenCovidDataset(cohen, classes=("pneumonia", "covid19"))
    asked: tuple[tuple[str, ChestXrayDataset, float], ...] = (
        ("both", covid19 + normal, 0.0),
        ("both", covid19 + normal, 0.9),
        ("inside", inside, 0.0),
    )
    return [
        {
            "judged_on": name,
            "hidden": hidden,
            "n": [dataset.targets.count(k) for k in (1, 0)],
            "auroc": float(auroc(dataset, hidden=hidden)),
        }
        for name, dataset, hidden in asked
    ]


if __name__ == "__main__":
    write("thumbnails", {"rows": measured(Path(sys.argv[1]))})
