"""Put the measured numbers beside the bundled weights: evaluation, tables, model card.

    python recipes/write_card.py

Reads ``docs/results/default`` and rewrites the folder of the bundled model; the weights stay byte
for byte what they are. Results that were measured on other weights are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from train_default import STAGES

from chestxray_covid import Classifier, EvaluationReport
from chestxray_covid.checkpoint import (
    load_attachment,
    load_checkpoint,
    load_config,
    save_checkpoint,
)
from chestxray_covid.errors import ReportError
from chestxray_covid.files import write_files
from chestxray_covid.gate import GATE_NAME
from chestxray_covid.hub import BUNDLED, DEFAULT_MODEL
from chestxray_covid.publish import make_card
from chestxray_covid.results import JUDGED, MEASUREMENTS_NAME, check_origin, read_results

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import generate_gate as gate  # noqa: E402 - it lies beside the documentation
import generate_model as pages  # noqa: E402 - likewise
import generate_relatives as results  # noqa: E402 - likewise
from generate import SOURCE_HEAD, source_rows  # noqa: E402 - likewise

#: Results of the weights themselves; the others are of relatives.
OWN = (
    *("evaluation", "evaluation_binary", "inside", "frame", "other_fills", "calibration"),
    *("gate", "reduction"),
)


def failures() -> list[str]:
    """Return what the card warns of."""
    return [
        "it does not tell COVID-19 from other findings inside one collection, and the sources of "
        "training all but give the label away: what it learned of COVID-19 may be the source "
        "alone, and nothing that was measured so far shows otherwise",
        "at its threshold, p(covid19) against p(normal) calls many other pneumonias positive: "
        "is_positive answers one question only, COVID-19 or normal",
        *unseen_normals(),
        "with the centre hidden under something else than the image's mean, the frame still tells "
        f"some sources apart (AUROC {pages.other_fills()})",
        "children were seen as normal or pneumonia only, never with COVID-19, as far as ages are "
        "known",
        *unseen_by_gate(),
        "lateral radiographs, CT slices and turned images are flagged, not judged",
        "pictures that are drawn like radiographs, phantoms among them, may pass the gate",
    ]


def unseen_normals() -> list[str]:
    """Return what the recipe calls normals of a hospital that it never saw, if that was asked."""
    return [
        "normal radiographs of a hospital that training did not see may be called COVID-19: the "
        f"recipe without NIH did so with {row['called'][1][-1]:.0%} of NIH's"
        for row in results.published_rows("recipe_unseen_nih")[:1]
    ]


def unseen_by_gate() -> list[str]:
    """Return what the gate may do with radiographs of a source that it never saw."""
    found = results.read("gate")["source_left_out"]["kermany"]
    refused, lateral = (found.get(k, {"rate": 0.0})["rate"] for k in ("abstained", "lateral_view"))
    return [
        "the gate's few false alarms are those of sources that it knows: by one that never saw "
        f"Kermany's, who are children, {refused:.0%} of their frontal radiographs are refused, "
        f"{lateral:.0%} as lateral views"
    ]


def stages() -> list[str]:
    """Return in words how each stage of training went that the table of what was tried has."""
    told = (row[0] for row in results.read("tried")["rows"])
    lines = dict(line.split(": ", 1) for line in told)
    return [lines[stage.name] for stage in STAGES if stage.name in lines]


def check_results(folder: Path) -> None:
    """Raise ``ReportError`` unless all results were measured on the weights in a folder."""
    classifier = Classifier.from_pretrained(folder)
    config = classifier.config
    for name in (*OWN, *(["audit"] if results.exists("audit") else [])):
        path, found = results.RESULTS / f"{name}.json", results.read(name)
        classes = tuple(found.get("classes", config.classes))
        if name == "evaluation_binary":  # of a part of the classes, which has its own hash
            part = Classifier.from_pretrained(folder, classes=classes)
            config = replace(part.config, weights_sha256=part.weights_sha256)
        weights = found.get("model", found).get("weights_sha256", "")
        check_origin(path, config, weights, classes)
        config = classifier.config
    if results.read("gate")["gate_sha256"] != config.attachments[GATE_NAME]:
        raise ReportError(f"{results.RESULTS / 'gate.json'} is of another gate. Fit it again.")


def tables() -> list[dict[str, Any]]:
    """Return the further tables of the card."""
    return [
        {
            "title": "Where the source cannot help, or not as much",
            "note": "Of patients that training never saw; 0.5 is chance; intervals at 95% by "
            f"patient.{results.unmeasured().replace('`', '')} {results.about_relatives()}".rstrip(),
            "head": ["AUROC", "Images", "Value"],
            "rows": results.honest_rows(),
        },
        {
            "title": "Two classes, normal and COVID-19",
            "note": "The same network restricted to these, on held-out patients of the sources of "
            "training, the label being the more probable of the two. The source all but gives it "
            "away here: no evidence that it tells disease from source.",
            "head": list(SOURCE_HEAD),
            "rows": source_rows(EvaluationReport.load(results.RESULTS / "evaluation_binary.json")),
        },
        {
            "title": "Does it read the frame?",
            "note": "AUROC, on held-out patients, of COVID-19 of one source against normals of "
            "another, with nothing, the central 70% and the central 90% of the side hidden under "
            f"the image's mean. {results.frame_caveat()}",
            "head": ["Pairing", "Images", "whole", "70% hidden", "90% hidden"],
            "rows": [list(row) for row in pages.frame_rows()],
        },
        {
            "title": "Calibration",
            "note": "On test patients, before and after the temperature that is folded into the "
            "last layer.",
            "head": ["", "before", "after"],
            "rows": pages.calibration_rows(),
        },
        {
            "title": "Input gate",
            "note": "Held-out images; refused means that the prediction abstains. What is nearly "
            "flagged is looked at again, with the lungs in sight. No gate was "
            f"fitted on any of these: {', '.join(results.read('gate')['never_fitted'])}. "
            f"{results.GATE_INTERVALS}",
            "head": ["Images", *gate.GATE_HEAD],
            "rows": [list(map(str, row)) for row in gate.gate_rows()],
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED / DEFAULT_MODEL)
    folder: Path = parser.parse_args().checkpoint
    check_results(folder)
    config, tensors = load_checkpoint(folder)
    attachments = {
        name: load_attachment(folder, config, name) or b"" for name in config.attachments
    }
    report = EvaluationReport.load(results.RESULTS / "evaluation.json")
    headline = {
        "COVID-19 against other findings inside Cohen (AUROC, 0.5 is chance)": results.estimate(
            results.read("inside")["auroc"]
        ),
        "COVID-19 against normal, pooled sources (AUROC, no evidence)": results.estimate(
            report.overall.per_class["covid19"]["auroc_vs_normal"].to_dict()
        ),
    }
    made = {"headline": headline, "known_failures": failures(), "stages": stages()}
    provenance = {**config.provenance, **made}
    save_checkpoint(folder, replace(config, provenance=provenance), tensors, attachments)
    saved = load_config(folder)  # in the order in which it will be read
    origin = {"weights_sha256": saved.weights_sha256, "classes": list(saved.classes)}
    measurements = json.dumps({**origin, "tables": tables()}, indent=1)
    contents = {
        name: (results.RESULTS / name).read_bytes()
        for name in JUDGED
        if (results.RESULTS / name).is_file()
    }
    contents[MEASUREMENTS_NAME] = f"{measurements}\n".encode()
    write_files(folder, contents)
    write_files(folder, make_card(saved, read_results(folder, saved), DEFAULT_MODEL, None))


if __name__ == "__main__":
    main()
