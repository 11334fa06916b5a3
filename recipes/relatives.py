"""Relatives of the bundled weights: trained without those by whom they are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from collection import aetiology, cropped_to_lungs
from train_default import COMMON, MILD, STRONG, open_split

from chestxray_covid import (
    ChestXrayDataset,
    Classifier,
    Preprocess,
    Trainer,
    build_densenet121,
    patient_groups,
)
from chestxray_covid.splits import divide
from chestxray_covid.training_state import StateStore

SHORT = replace(
    COMMON,
    preprocess=Preprocess(size_px=160),
    augmentation=STRONG,
    epochs=3,
    samples_per_epoch=1200,
    learning_rate=5e-4,
    hide_centre=0.1,
    swap_frame=0.3,
    ema_decay=0.98,
    max_repeats=8,
)
#: On Cohen's rows alone, where the source gives nothing away, though the website may.
INSIDE = replace(
    COMMON,
    preprocess=Preprocess(size_px=160),
    augmentation=MILD,
    epochs=4,
    batch_size=32,
    samples_per_epoch=3600,
    learning_rate=5e-4,
    balance="class",
    max_repeats=None,
    ema_decay=0.99,
)
#: The same of crops to the lungs, which fill 128 px as they do a larger whole radiograph.
INSIDE_LUNGS = replace(INSIDE, preprocess=Preprocess(size_px=128))
#: Before them, on Kermany and NIH alone, which hold no COVID-19.
BASE = replace(
    COMMON,
    preprocess=Preprocess(size_px=160),
    augmentation=MILD,
    batch_size=32,
    epochs=12,
    learning_rate=1.5e-3,
    warmup_epochs=1.8,
)


def train_network(
    train: ChestXrayDataset, val: ChestXrayDataset, start: Path | None, folder: Path, config: Any
) -> None:
    """Train from a checkpoint, or from random weights; a finished run is left as it is."""
    model = build_densenet121(
        str(start) if start else False, num_classes=len(train.classes), seed=config.seed
    )
    trainer = Trainer(model, train, val, config, output=folder)
    trainer.fit(resume=StateStore(folder).holds_run())


def train_relative(
    train: ChestXrayDataset, groups: Sequence[int], start: Path | None, folder: Path, config: Any
) -> Classifier:
    """Train a network on these patients, a tenth of them for validation, and return it."""
    rest, held = divide(train, np.arange(len(train)), np.asarray(groups), 0.1, 0)
    train_network(train.subset(rest), train.subset(held), start, folder, config)
    return Classifier.from_pretrained(folder)


#: Fewest images of a class that a relative learns of.
FEWEST = 3


class Relatives:
    """Data with groups of patients, and the network that all relatives start from.

    ``start`` is a checkpoint to take for that network; one is trained if it is not given.
    """

    def __init__(
        self,
        data: Path,
        run: Path,
        made: str | None = None,
        seed: int = 0,
        start: Path | None = None,
    ) -> None:
        self.made, self.seed, self.start = made, seed, start
        self.split = open_split(data, run)
        self.dataset = self.split.dataset
        self.groups = np.array(patient_groups(self.dataset, progress=True))
        self.folder = run / (f"relatives-{seed}" if seed else "relatives")
        self.cache = run / "cache"

    def without(self, held_out: np.ndarray) -> np.ndarray:
        """Return the positions of all samples that share no group with these positions."""
        return np.flatnonzero(~np.isin(self.groups, self.groups[held_out]))

    def predict_without(
        self,
        held_out: np.ndarray,
        name: str,
        config: Any,
        among: np.ndarray | None = None,
        *,
        lungs: bool = False,
    ) -> np.ndarray:
        """Train on everyone else and return ``(N, 3)`` probabilities of the held-out samples.

        Of a class of which fewer than three images or two patients are left it learns nothing, and
        says 0.

        Args:
            held_out: Their positions.
            name: Of the relative's run folder.
            config: Options of its training.
            among: Positions that it trains on at most; all if not given.
            lungs: Show it crops to the lungs alone, also in the training that it starts from.
        """
        base = self.start or self.train_base(lungs=lungs)
        chosen = self.without(held_out)
        if among is not None:
            chosen = np.intersect1d(chosen, among)
        chosen, known = self._known_classes(chosen)
        shown, judged = (self.dataset.subset(part) for part in (chosen, held_out))
        shown = ChestXrayDataset(shown.samples, classes=[shown.classes[k] for k in known])
        if lungs:
            shown, judged = (cropped_to_lungs(d, self.folder / "crops") for d in (shown, judged))
        classifier = train_relative(
            shown,
            self.groups[chosen].tolist(),
            base,
            self.folder / name,
            replace(config, cache_dir=self.cache, seed=self.seed),
        )
        found = np.zeros((len(judged), len(judged.classes)))
        found[:, known] = classifier.predict_proba(judged, progress=True)
        return found

    def _known_classes(self, chosen: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Return positions of classes that there is enough of to learn them, and these classes."""
        targets = np.array(self.dataset.targets)
        known = []
        for k in range(len(self.dataset.classes)):
            own = chosen[targets[chosen] == k]
            if len(own) >= FEWEST and len(np.unique(self.groups[own])) > 1:
                known.append(k)
        return chosen[np.isin(targets[chosen], known)], known

    def train_base(self, *, lungs: bool = False) -> Path:
        """Train on Kermany's and NIH's training patients: normal, bacterial or viral.

        Args:
            lungs: On crops to the lungs, and in a folder of its own.
        """
        sources = np.array([s.source for s in self.dataset.samples])
        judged = np.flatnonzero(np.isin(sources, ["cohen", "hannover"]))
        allowed = set(self.without(judged).tolist())
        train, val = (
            aetiology(self.dataset.subset([i for i in self.split.indices[side] if i in allowed]))
            for side in ("train", "val")
        )
        folder = self.folder / "base"
        if lungs:
            train, val = (cropped_to_lungs(d, self.folder / "crops") for d in (train, val))
            folder = self.folder / "base-lungs"
        config = replace(BASE, cache_dir=self.cache, seed=self.seed)
        train_network(train, val, None, folder, config)
        return folder

    def held_out_nih(self) -> np.ndarray:
        """Return NIH's patients of validation and test, whom the base never sees, nor any relative
        where Hannover is judged.
        """
        held = (*self.split.indices["val"], *self.split.indices["test"])
        return np.array([i for i in held if self.dataset.samples[i].source == "nih"])
