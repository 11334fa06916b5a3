"""Turn a trained run into the bundled checkpoint: unlearn the frame, calibrate, halve, write.

    python recipes/publish_default.py --data ../shared/data --run runs/default

Temperature and threshold are fitted on the validation patients, whom training never saw and who
chose no epoch (the schedule's last weights are kept), without Cohen's copies of Hannover's
radiographs; the gate is fitted by ``fit_gate.py`` after.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from collection import COLLECTIONS, count_by_licence, forbidden, once
from frame import unlearn_frame
from judge_default import origin_of, score, write
from train_default import STAGES, open_split

from chestxray_covid import ChestXrayDataset, Classifier, History
from chestxray_covid.calibration import fit_temperature, fold_temperature
from chestxray_covid.checkpoint import load_checkpoint, save_checkpoint
from chestxray_covid.hub import DEFAULT_MODEL
from chestxray_covid.intervals import bootstrap_by_group
from chestxray_covid.metrics import (
    brier_score,
    expected_calibration_error,
    threshold_at_sensitivity,
)

BUNDLED = Path(__file__).parents[1] / "src" / "chestxray_covid" / "weights" / DEFAULT_MODEL
SENSITIVITY = 0.9


def class_weights(dataset: ChestXrayDataset) -> np.ndarray:
    """Return weights ``(N,)`` under which every class counts alike, as in training."""
    counts = np.bincount(dataset.targets)
    return 1 / counts[np.array(dataset.targets)]


def calibration_numbers(dataset: ChestXrayDataset, found: np.ndarray) -> dict[str, Any]:
    """Return ECE and Brier score by patient, plain and with every class counting alike."""
    targets, patients = (
        np.array(dataset.targets),
        [(s.source, s.patient_id) for s in dataset.samples],
    )
    balance = class_weights(dataset) * len(dataset) / len(dataset.classes)

    def weighted(statistic: Any) -> Any:
        return lambda truth, p, *, sample_weight: statistic(
            truth, p, sample_weight=sample_weight * balance
        )

    numbers = {}
    for name, statistic in (("ece", expected_calibration_error), ("brier", brier_score)):
        numbers[name] = bootstrap_by_group(statistic, patients, targets, found).to_dict()
        balanced = bootstrap_by_group(weighted(statistic), patients, targets, found)
        numbers[f"{name}_balanced"] = balanced.to_dict()
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--output", type=Path, default=BUNDLED)
    parser.add_argument("--results", type=Path, default=Path("docs/results/default"))
    options = parser.parse_args()
    split = open_split(options.data, options.run)
    val = once(split.val)
    place = options.checkpoint or options.run / STAGES[-1].name
    config, tensors = load_checkpoint(place)
    half = {k: t.astype(np.float16) if t.dtype == np.float32 else t for k, t in tensors.items()}
    half = unlearn_frame(config, half, split.train)
    plain = Classifier(config, half)
    on_val = plain.predict_proba(val, progress=True)
    temperature = fit_temperature(
        val.targets, np.log(on_val + 1e-12), sample_weight=class_weights(val)
    )
    calibrated = Classifier(config, fold_temperature(half, temperature))
    on_val = calibrated.predict_proba(val, progress=True)
    judged = np.array(val.targets) != val.class_to_idx["pneumonia"]
    covid = np.array(val.targets) == val.class_to_idx["covid19"]
    threshold = threshold_at_sensitivity(
        covid[judged].astype(int), score(on_val[judged]), sensitivity=SENSITIVITY
    )
    origin = (
        f"{SENSITIVITY:.0%} sensitivity for covid19 against normal on {int(covid.sum())} and "
        f"{int((judged & ~covid).sum())} radiographs of held-out patients of the same sources"
    )
    history = [
        {"stage": stage.name, "epochs": read_history(options.run / stage.name)}
        for stage in STAGES
        if (options.run / stage.name / "history.json").is_file()
    ]
    provenance = {
        "license": "cc-by-nc-sa-4.0",
        "use": "research and teaching only",
        "sources": list(split.train.sources),
        "collections": {source: COLLECTIONS[source] for source in split.train.sources},
        "train_images": len(split.train),
        "train_patients": len({(s.source, s.patient_id) for s in split.train.samples}),
        "train_licences": count_by_licence(split.train),
        "left_out_for_licence": count_by_licence(forbidden(options.data)),
        "train_counts": {
            f"{source} {label}": sum(
                s.source == source and s.label == label for s in split.train.samples
            )
            for source in split.train.sources
            for label in split.train.classes
        },
        "recipe": "recipes/train_default.py, then the frame projected out (recipes/frame.py)",
        "temperature": temperature,
        "seed": 0,
    }
    final = replace(config, threshold=threshold, threshold_origin=origin, provenance=provenance)
    save_checkpoint(options.output, final, fold_temperature(half, temperature))
    shipped = Classifier.from_pretrained(options.output)
    test = once(split.test)
    before, after = plain.predict_proba(test), shipped.predict_proba(test)
    result = {
        **origin_of(shipped),
        "temperature": temperature,
        "threshold": threshold,
        "threshold_origin": origin,
        "before": calibration_numbers(test, before),
        "after": calibration_numbers(test, after),
        "reliability": reliability(np.array(test.targets), after),
    }
    write(options.results, "calibration", result)
    write(options.results, "history", {"stages": history})
    print(json.dumps({k: v for k, v in result.items() if k != "reliability"}, indent=1))


def reliability(targets: np.ndarray, found: np.ndarray, *, bins: int = 10) -> list[dict[str, Any]]:
    """Return, per bin of the highest probability, its mean, the share that is right, and N."""
    confidence, right = found.max(1), found.argmax(1) == targets
    rows = []
    for low in np.arange(bins) / bins:
        inside = (confidence > low) & (confidence <= low + 1 / bins)
        if inside.any():
            mean, share = float(confidence[inside].mean()), float(right[inside].mean())
            rows.append({"confidence": mean, "accuracy": share, "n": int(inside.sum())})
    return rows


def read_history(folder: Path) -> list[dict[str, Any]]:
    data = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    epochs: list[dict[str, Any]] = History.from_dict(data).to_dict()["epochs"]
    return epochs


if __name__ == "__main__":
    main()
