"""Audit the bundled model for shortcuts on test patients of the pooled sources.

    python recipes/audit_default.py --data ../shared/data --run runs/default \
        --checkpoint src/chestxray_covid/weights/densenet121-v1

The design that is judged is that of the run's training patients. ``audit.json`` goes into the
results, from which ``write_card.py`` puts it beside the weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from collection import once
from train_default import STAGES, open_split

from chestxray_covid import AuditReport, Classifier, audit_shortcuts


def audit(data: Path, run: Path, checkpoint: Path, *, limit: int) -> AuditReport:
    """Return the audit of a checkpoint on the run's test patients."""
    split = open_split(data, run)
    return audit_shortcuts(
        Classifier.from_pretrained(checkpoint),
        once(split.test),
        once(split.train),
        limit=limit,
        progress=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/results/default"))
    parser.add_argument("--limit", type=int, default=1000)
    options = parser.parse_args()
    place = options.checkpoint or options.run / STAGES[-1].name
    report = audit(options.data, options.run, place, limit=options.limit)
    report.save(options.output / "audit.json")
    print(report)


if __name__ == "__main__":
    main()
