"""Judge the recipe itself by a hospital that it never saw.

    python recipes/judge_recipe.py --data ../shared/data --run runs/default --without nih

All stages of ``train_default.py``, from random weights on, without one hospital's patients,
wherever they are listed; then the frame is projected out as ``publish_default.py`` does. Each stage
is judged, whole and with the centre hidden, by that hospital: Hannover's COVID-19 against normals
of NIH's held-out patients, or NIH's pneumonias against NIH's normals. Not a network but the recipe
is judged: the bundled weights have seen both. Of Hannover there is COVID-19 alone, so that what
tells it from NIH without looking at lungs counts, too; NIH has both classes, but no COVID-19. It
takes as long as the recipe. ``--variant`` takes other stages, and ``--until`` ends at one.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from frame import unlearn_frame
from judge_default import count, estimate_auroc, predict_hidden, said, score, write
from relatives import Relatives
from train_default import STAGES, STRONG, Stage, train_stages

from chestxray_covid import ChestXrayDataset, Classifier
from chestxray_covid.checkpoint import load_checkpoint

#: Central parts, by side length, that are hidden.
PARTS = (0.0, 0.7, 0.9)


@dataclass(frozen=True)
class Hospital:
    """One that the recipe never sees; its class is told from normals.

    Attributes:
        source: Name of its collection.
        label: Class that is told from normals.
        result: Name of what is written.
    """

    source: str
    label: str
    result: str

    def held_out(self, relatives: Relatives) -> np.ndarray:
        """Return the positions of all whom the recipe does not see."""
        own = [i for i, s in enumerate(relatives.dataset.samples) if s.source == self.source]
        return np.union1d(own, relatives.held_out_nih())


HOSPITALS = {
    "hannover": Hospital("hannover", "covid19", "recipe_unseen"),
    "nih": Hospital("nih", "pneumonia", "recipe_unseen_nih"),
}


def sides(
    relatives: Relatives, hospital: Hospital
) -> tuple[ChestXrayDataset, ChestXrayDataset, ChestXrayDataset]:
    """Return whom to train on, whom to watch, and by whom the recipe is judged, once each."""
    samples, split = relatives.dataset.samples, relatives.split
    held_out = hospital.held_out(relatives)
    others = relatives.without(held_out)
    train, val = (np.intersect1d(others, split.indices[side]) for side in ("train", "val"))
    judged = [
        i
        for i in held_out
        if samples[i].label in (hospital.label, "normal")
        and samples[i].metadata.get("numbered_by") != "cohen"
    ]
    first, second, third = (relatives.dataset.subset(part) for part in (train, val, judged))
    return first, second, third


def judge_parts(
    classifier: Classifier, judged: ChestXrayDataset, label: str
) -> list[dict[str, Any]]:
    """Return, by the part that is hidden, the AUROC, and what is called what.

    ``called`` are the shares of the class, then of the normals, for which each class comes first.
    """
    truth, rows = np.array([s.label == label for s in judged.samples]), []
    for part in PARTS:
        found = predict_hidden(classifier, judged, part)
        value = estimate_auroc(judged.samples, truth, score(found, label))
        firsts = np.eye(found.shape[1])[found.argmax(1)]
        called = [firsts[side].mean(0).tolist() for side in (truth, ~truth)]
        rows.append({"hidden": part, "auroc": value.to_dict(), "called": called})
        print(part, value, called, flush=True)
    return rows


def changed(stage: Stage, variant: str, **how: Any) -> Stage:
    """Return the stage with other options, called after the variant."""
    return Stage(f"{stage.name}-{variant}", replace(stage.config, **how))


#: A further stage: lungs before other backgrounds; the rate stays where it is, and the average of
#: weights is long (Cha et al., SWAD: Domain Generalization by Seeking Flat Minima, NeurIPS 2021).
LUNGS = Stage(
    "lungs",
    replace(
        STAGES[-1].config,
        epochs=6,
        learning_rate=5e-4,
        schedule="step",
        step_epochs=6,
        swap_background=0.6,
        swap_frame=0.3,
        ema_decay=0.997,
        seed=4,
    ),
)
#: What was tried in place of the recipe's stages, name → stages. ``strong`` made the weights that
#: were published before, ``within`` compares classes within sources.
VARIANTS: dict[str, tuple[Stage, ...]] = {
    "strong": (
        STAGES[0],
        *(changed(stage, "strong", augmentation=STRONG) for stage in (*STAGES[1:], LUNGS)),
    ),
    "within": (
        STAGES[0],
        *(changed(stage, "within", within_sources=True) for stage in STAGES[1:]),
    ),
    "lungs": (*STAGES, LUNGS),
}


def stages_of(variant: str | None, until: str | None = None) -> tuple[Stage, ...]:
    """Return the recipe's stages, or a variant's, up to the one that is named, if one is."""
    stages = STAGES if variant is None else VARIANTS[variant]
    names = [stage.name for stage in stages]
    return stages if until is None else stages[: names.index(until) + 1]


def judge_recipe(
    relatives: Relatives,
    hospital: Hospital,
    output: Path,
    variant: str | None = None,
    until: str | None = None,
) -> None:
    """Train the stages and judge them, each as it is and with the frame projected out.

    Of a variant only the stages that are its own are judged.
    """
    train, val, judged = sides(relatives, hospital)
    place = relatives.folder / f"recipe-without-{hospital.source}"
    stages = stages_of(variant, until)
    folders = train_stages(train, val, place, cache=relatives.cache, stages=stages)
    rows = []
    own = [stage.name for stage in stages if variant is None or stage not in STAGES]
    for folder in (folder for folder in folders if folder.name in own):
        config, tensors = load_checkpoint(folder)
        for projected in (False, True):
            shown = unlearn_frame(config, tensors, train) if projected else tensors
            about = {"stage": folder.name, "projected": projected}
            parts = judge_parts(Classifier(config, shown), judged, hospital.label)
            rows += [{**about, **row} for row in parts]
    truth = np.array([s.label == hospital.label for s in judged.samples])
    about = {**said(relatives.made), "stages": {s.name: s.config.to_dict() for s in stages}}
    images = {"trained_on": len(train), "n": count(truth)}
    name = hospital.result if variant is None else f"{hospital.result}_{variant}"
    write(output, name, {**about, **images, "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/default"))
    parser.add_argument("--without", choices=list(HOSPITALS), default="hannover")
    parser.add_argument("--variant", choices=list(VARIANTS))
    parser.add_argument("--until", metavar="STAGE", help="its last stage, 192px-within for example")
    parser.add_argument("--made", metavar="TEXT", help="machine, software and files, in words")
    options = parser.parse_args()
    own = [stage.name for stage in stages_of(options.variant) if stage not in STAGES]
    if options.until not in (None, *own):
        names = ", ".join(own) or "none without --variant"
        parser.error(f"--until is a variant's own stage ({names}), not {options.until}.")
    relatives = Relatives(options.data, options.run, options.made)
    hospital = HOSPITALS[options.without]
    judge_recipe(relatives, hospital, options.output, options.variant, options.until)


if __name__ == "__main__":
    main()
