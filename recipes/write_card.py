"""Put the measured numbers beside the bundled weights: evaluation, tables, model card.

    python recipes/write_card.py

Reads ``docs/results/default`` and rewrites the folder of the bundled model; the weights stay byte
for byte what they are.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from chestxray_covid import EvaluationReport
from chestxray_covid.card import MEASUREMENTS_NAME, calibration_figure, model_card
from chestxray_covid.checkpoint import load_attachment, load_checkpoint, save_checkpoint
from chestxray_covid.files import write_files
from chestxray_covid.hub import BUNDLED, DEFAULT_MODEL
from chestxray_covid.publish import CARD_NAME, FIGURE_NAME

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

from generate_model import (  # noqa: E402 - it lies beside the documentation
    RESULTS,
    calibration_rows,
    estimate,
    frame_rows,
    gate_rows,
    honest_rows,
    other_fills,
    read,
    unmeasured,
)

FAILURES = (
    "it does not tell COVID-19 from other findings inside one collection, and the sources of "
    "training all but give the label away: what it learned may be the source alone, and nothing "
    "that was measured so far shows otherwise",
    "at its threshold, p(covid19) against p(normal) calls many other pneumonias positive: "
    "is_positive answers one question only, COVID-19 or normal",
    "with the centre hidden under black or a light grey instead of the image's mean, the frame "
    f"still tells some sources apart (AUROC {other_fills()})",
    "children were seen as normal or pneumonia only, never with COVID-19",
    "lateral radiographs, CT slices and turned images are flagged, not judged",
    "pictures that are drawn like radiographs, phantoms among them, may pass the gate",
)


def tables() -> list[dict[str, Any]]:
    """Return the further tables of the card."""
    return [
        {
            "title": "Where the source cannot help, or not as much",
            "note": "Of patients that training never saw; 0.5 is chance; intervals at 95% by "
            f"patient.{unmeasured().replace('`', '')}",
            "head": ["AUROC of COVID-19", "Images", "Value"],
            "rows": honest_rows(),
        },
        {
            "title": "Does it read the frame?",
            "note": "AUROC, on held-out patients, of COVID-19 of one source against normals of "
            "another, with nothing, the central 70% and the central 90% of the side hidden under "
            "the image's mean. With the centre hidden, 0.5 is what a model reaches that looks at "
            "lungs alone; the frame was unlearned in this very way.",
            "head": ["Pairing", "Images", "whole", "70% hidden", "90% hidden"],
            "rows": [list(row) for row in frame_rows()],
        },
        {
            "title": "Calibration",
            "note": "On test patients, before and after the temperature that is folded into the "
            "last layer.",
            "head": ["", "before", "after"],
            "rows": calibration_rows(),
        },
        {
            "title": "Input gate",
            "note": "Held-out images; refused means that the prediction abstains.",
            "head": ["Images", "N", "flagged", "refused"],
            "rows": [list(map(str, row)) for row in gate_rows()],
        },
    ]


def main() -> None:
    folder = BUNDLED / DEFAULT_MODEL
    config, tensors = load_checkpoint(folder)
    attachments = {
        name: load_attachment(folder, config, name) or b"" for name in config.attachments
    }
    report = EvaluationReport.load(RESULTS / "evaluation.json")
    headline = {
        "COVID-19 against other findings inside Cohen (AUROC, 0.5 is chance)": estimate(
            read("inside")["auroc"]
        ),
        "COVID-19 against normal, pooled sources (AUROC, no evidence)": estimate(
            report.overall.per_class["covid19"]["auroc_vs_normal"].to_dict()
        ),
    }
    provenance = {**config.provenance, "headline": headline, "known_failures": list(FAILURES)}
    save_checkpoint(folder, replace(config, provenance=provenance), tensors, attachments)
    contents = {
        "evaluation.json": (RESULTS / "evaluation.json").read_bytes(),
        "audit.json": (RESULTS / "audit.json").read_bytes(),
        MEASUREMENTS_NAME: (json.dumps(tables(), indent=1) + "\n").encode(),
    }
    write_files(folder, contents)
    figure = calibration_figure(folder)
    name = FIGURE_NAME if figure else None
    card = {CARD_NAME: model_card(folder, DEFAULT_MODEL, figure=name).encode()}
    write_files(folder, {**card, **({FIGURE_NAME: figure} if figure else {})})


if __name__ == "__main__":
    main()
