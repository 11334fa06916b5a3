"""Trains in one of several processes; a test starts it with torchrun or accelerate launch.

    training_worker.py CHECKPOINT RUN NOTES BATCH_SIZE [KILLED_RANK STEP]

Batch norms are frozen, so that processes compute what one process does. What is read, and what a
process writes into the run, is noted in the folder NOTES. Processes of which one will be killed
try first what is refused: a run directory for each.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from chestxray_covid import (
    Callback,
    ChestXrayDataset,
    Preprocess,
    SyntheticChestXray,
    Trainer,
    TrainingConfig,
    TrainingError,
    build_densenet121,
    cross_validate,
)
from chestxray_covid.datasets.base import Sample

#: No multiple of two processes, nor of four; the last batch of an epoch is one of three.
TRAIN, VAL = 19, 101


def noting(sample: Sample, size: Any, *, read: Any, seen: list[str]) -> Any:
    seen.append(sample.path.name)
    return read(sample, size)


class KillAfter(Callback):
    def __init__(self, rank: str, step: int, notes: Path) -> None:
        self.rank, self.step, self.notes = rank, step, notes

    def on_step_end(self, trainer: Trainer, step: int, loss: float) -> None:
        if step == self.step and os.environ.get("RANK") == self.rank:
            (self.notes / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)


def trainer(
    checkpoint: Path, run: Path, batch_size: int, seen: list[str], *callbacks: Callback
) -> Trainer:
    """Return the same trainer in whatever process; validation images are noted when read."""
    phantoms = SyntheticChestXray(TRAIN + VAL, image_size_px=32)
    train = phantoms.subset(range(TRAIN))
    samples = [
        replace(s, patient_id=f"val {s.path}", read=partial(noting, read=s.read, seen=seen))
        for s in phantoms.samples[TRAIN:]
    ]
    val = ChestXrayDataset(samples, classes=phantoms.classes)
    config = TrainingConfig(
        preprocess=Preprocess(size_px=32),
        epochs=2,
        batch_size=batch_size,
        optimizer="sgd",
        learning_rate=3e-3,
        clip_norm=1.0,  # every step of these is clipped
        precision="float32",
        device="cpu",
        checkpoint_every=1,
        patience=None,
        monitor="last",
        progress=False,
    )
    model = build_densenet121(checkpoint, seed=0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.requires_grad_(False)
    return Trainer(model, train, val, config, output=run, callbacks=callbacks)


def threads() -> list[str]:
    """Return the names of this process's threads, also of those that Python does not know."""
    return [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]


def different_directories() -> str:
    """Return the error of processes whose run directories are temporary, each another one."""
    config = TrainingConfig(preprocess=Preprocess(size_px=32), device="cpu", progress=False)
    phantoms = SyntheticChestXray(60, image_size_px=32)
    try:
        cross_validate(phantoms, config, folds=2, model=lambda: build_densenet121(False, seed=0))
    except TrainingError as error:
        return str(error)
    return ""


def main() -> Trainer:
    checkpoint, run, notes = map(Path, sys.argv[1:4])
    rank = os.environ["RANK"]
    seen: list[str] = []
    written: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
        writes = event == "open" and any(c in str(arguments[1]) for c in "wax+")
        if (changes or writes) and str(arguments[0]).startswith(str(run)):
            written.append(f"{event} {arguments[0]}")

    kill = []
    if len(sys.argv) > 5:
        kill = [KillAfter(sys.argv[5], int(sys.argv[6]), notes)]
        (notes / f"{rank} refused.txt").write_text(different_directories())
    started = (run / "state").exists()
    sys.addaudithook(watch)
    # Called after what the library leaves to be done in the end.
    atexit.register(lambda: (notes / f"{rank} threads.json").write_text(json.dumps(threads())))
    made = trainer(checkpoint, run, int(sys.argv[4]), seen, *kill)
    history = made.fit(resume=started)
    losses = [(r.train_loss, r.val_loss) for r in history]
    found = {"read": seen, "written": written, "losses": losses, "threads": threads()}
    (notes / f"{rank}.json").write_text(json.dumps(found))
    return made


if __name__ == "__main__":
    kept = main()  # until Python ends, as in many a script
