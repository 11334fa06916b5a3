"""How long until a validation AUROC is reached: the recommended recipe against the plain one.

Kermany's children, normal against pneumonia, one source, so that there is something to learn that
is no shortcut; the same patients, size and random weights for both. The plain recipe is the classic
one of notebooks, in float32 and torch's own order, decoding every time.
Run: CHESTXRAY_COVID_DATA=DATA python benchmarks/time_to_auroc.py
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import write

from chestxray_covid import (
    Callback,
    EpochRecord,
    KermanyPneumoniaDataset,
    Preprocess,
    Split,
    Trainer,
    TrainingConfig,
    build_densenet121,
    split_by_patient,
)

TARGET = 0.95
SEEDS = (0, 1, 2, 3, 4)
SHARED = {
    "preprocess": Preprocess(size_px=160),
    "samples_per_epoch": 480,
    "epochs": 10,
    "patience": None,
    "device": "cpu",
}


class UntilTarget(Callback):
    """Ends a run at the target, and notes when that was."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.reached: float | None = None

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> bool:
        """Count the epoch."""
        self.seconds += record.seconds
        if record.val_auroc is not None and record.val_auroc >= TARGET:
            self.reached = self.seconds
        return self.reached is not None


def measure(split: Split, config: TrainingConfig, folder: Path) -> dict[str, Any]:
    """Return the seconds until the target, decoding included, and every epoch's AUROC."""
    until = UntilTarget()
    model = build_densenet121(pretrained=False, seed=config.seed)
    trainer = Trainer(model, split.train, split.val, config, output=folder, callbacks=[until])
    start = time.perf_counter()
    history = trainer.fit()
    return {
        "seconds": None if until.reached is None else time.perf_counter() - start,
        "val_auroc": [r.val_auroc for r in history],
    }


def main() -> None:
    data = KermanyPneumoniaDataset(
        Path(os.environ["CHESTXRAY_COVID_DATA"], "chest_xray"), classes=("normal", "pneumonia")
    )
    split = split_by_patient(data.limit(700, seed=0), val=0.2, test=0.05)
    runs: dict[str, list[dict[str, Any]]] = {"plain": [], "recommended": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            plain = TrainingConfig.baseline(
                **SHARED, precision="float32", channels_last=False, seed=seed
            )
            recommended = replace(
                TrainingConfig(**SHARED, seed=seed), cache_dir=f"{folder}/cache-{seed}"
            )
            for name, config in (("plain", plain), ("recommended", recommended)):
                runs[name].append(measure(split, config, Path(folder, f"{name}-{seed}")))
            show(split, runs)  # a run that is cut off leaves the seeds before


def show(split: Split, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Write what there is so far."""
    write(
        "time_to_auroc",
        {
            "what": "seconds of training, with decoding and validation, to a validation AUROC",
            "target": TARGET,
            "images": [len(split.train), len(split.val)],
            "size_px": 160,
            **runs,
        },
    )


if __name__ == "__main__":
    main()
