"""Judge the recipe itself by a hospital that it never saw.

    python recipes/judge_recipe.py --data ../shared/data --run runs/default

All stages of ``train_default.py``, from random weights on, without Hannover's patients, wherever
they are listed; then the frame is projected out as ``publish_default.py`` does. Each stage is
judged by Hannover's COVID-19 against normals of NIH's held-out patients, whole and with the centre
hidden. Not a network but the recipe is judged: the bundled weights have seen Hannover. And of
Hannover there is COVID-19 alone, so that what tells it from NIH without looking at lungs counts,
too. It takes as long as the recipe.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from frame import unlearn_frame
from judge_default import count, estimate_auroc, predict_hidden, said, score, write
from relatives import Relatives
from train_default import STAGES, train_stages

from chestxray_covid import ChestXrayDataset, Classifier
from chestxray_covid.checkpoint import load_checkpoint

#: Central parts, by side length, that are hidden.
PARTS = (0.0, 0.7, 0.9)


def sides(relatives: Relatives) -> tuple[ChestXrayDataset, ChestXrayDataset, ChestXrayDataset]:
    """Return whom to train on, whom to watch, and by whom the recipe is judged, once each."""
    samples, split = relatives.dataset.samples, relatives.split
    hannover = np.array([i for i, s in enumerate(samples) if s.source == "hannover"])
    held_out = np.concatenate([hannover, relatives.held_out_nih()])
    others = relatives.without(held_out)
    train, val = (np.intersect1d(others, split.indices[side]) for side in ("train", "val"))
    judged = [
        i
        for i in held_out
        if samples[i].label != "pneumonia" and samples[i].metadata.get("numbered_by") != "cohen"
    ]
    first, second, third = (relatives.dataset.subset(part) for part in (train, val, judged))
    return first, second, third


def judge_parts(classifier: Classifier, judged: ChestXrayDataset) -> list[dict[str, Any]]:
    """Return, by the part that is hidden, the AUROC, and of which shares their class is first."""
    truth, rows = np.array([s.label == "covid19" for s in judged.samples]), []
    for part in PARTS:
        found = predict_hidden(classifier, judged, part)
        value = estimate_auroc(judged.samples, truth, score(found))
        right = found.argmax(1) == np.array(judged.targets)
        first = [float(right[side].mean()) for side in (truth, ~truth)]
        rows.append({"hidden": part, "auroc": value.to_dict(), "first": first})
        print(part, value, first, flush=True)
    return rows


def judge_recipe(relatives: Relatives, output: Path) -> None:
    """Train and judge the stages, each as it is and with the frame projected out."""
    train, val, judged = sides(relatives)
    place = relatives.folder / "recipe-without-hannover"
    rows = []
    for folder in train_stages(train, val, place, cache=relatives.cache):
        config, tensors = load_checkpoint(folder)
        for projected in (False, True):
            shown = unlearn_frame(config, tensors, train) if projected else tensors
            about = {"stage": folder.name, "projected": projected}
            rows += [{**about, **row} for row in judge_parts(Classifier(config, shown), judged)]
    truth = np.array([s.label == "covid19" for s in judged.samples])
    about = {**said(relatives.made), "stages": {s.name: s.config.to_dict() for s in STAGES}}
    images = {"trained_on": len(train), "n": count(truth)}
    write(output, "recipe_unseen", {**about, **images, "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/default"))
    parser.add_argument("--made", metavar="TEXT", help="machine, software and files, in words")
    options = parser.parse_args()
    judge_recipe(Relatives(options.data, options.run, options.made), options.output)


if __name__ == "__main__":
    main()
