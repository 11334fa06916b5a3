"""The trainer's step against the same step in a bare loop, and the recipe against a plain one.

Both pairs alternate epoch by epoch inside one process, so that a machine that slows down slows
both; the ratio is the median over the pairs. Run: python benchmarks/training_step.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import write

from chestxray_covid import (
    Augmentation,
    Callback,
    ChestXrayDataset,
    EpochRecord,
    Preprocess,
    SyntheticChestXray,
    Trainer,
    TrainingConfig,
    build_densenet121,
    split_by_patient,
)
from chestxray_covid.engine_torch import native_bfloat16
from chestxray_covid.models import normalise, set_training_mode

PAIRS = 5
STEPS = 8
#: The recommended settings are compared where they are meant to be used, at 224 px.
FULL_SIZE_PX = 224
CONFIG = TrainingConfig(
    preprocess=Preprocess(size_px=160),
    epochs=PAIRS + 1,
    batch_size=16,
    samples_per_epoch=16 * STEPS,
    patience=None,
    device="cpu",
)


class BareLoop:
    """The same arithmetic as a trainer's step over pixels that are in memory, and nothing else."""

    def __init__(self, data: ChestXrayDataset, config: TrainingConfig) -> None:
        self.config = config
        self.pixels = np.stack([config.preprocess(data.image(i)) for i in range(len(data))])
        self.targets = torch.tensor(data.targets)
        model = build_densenet121(pretrained=False)
        self.model = model.to(
            memory_format=torch.channels_last if config.channels_last else torch.contiguous_format
        )
        set_training_mode(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.05)
        native = config.precision == "auto" and native_bfloat16(torch.device("cpu"))
        self.half = native or config.precision == "bfloat16"

    def step_seconds(self) -> float:
        """Return the median duration of a step over one epoch."""
        times = []
        for step in range(STEPS):
            start = time.perf_counter()
            chosen = [(16 * step + i) % len(self.pixels) for i in range(16)]
            images = torch.from_numpy(self.pixels[chosen])
            varied = self.config.augmentation(images, seed=0, epoch=0, draws=chosen)
            batch = normalise(varied, self.config.preprocess)
            if self.config.channels_last:
                batch = batch.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                logits = self.model(batch)
            loss = torch.nn.functional.cross_entropy(
                logits.float(), self.targets[chosen], label_smoothing=self.config.label_smoothing
            )
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - start)
        return statistics.median(times)


class Alternate(Callback):
    """Times the trainer's steps, wall clock from step to step, and runs the bare loop between."""

    def __init__(self, bare: BareLoop) -> None:
        self.bare = bare
        self.ends: list[float] = []
        self.pairs: list[tuple[float, float]] = []

    def on_step_end(self, trainer: Trainer, step: int, loss: float) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """Pair this epoch with one of the bare loop."""
        steps = np.diff(self.ends)
        self.ends.clear()
        self.pairs.append((statistics.median(steps), self.bare.step_seconds()))


def main() -> None:
    split = split_by_patient(SyntheticChestXray(160), val=0.1, test=0.1)
    alternate = Alternate(BareLoop(split.train, CONFIG))
    with tempfile.TemporaryDirectory() as folder:
        config = replace(CONFIG, cache_dir=f"{folder}/cache")
        model = build_densenet121(pretrained=False)
        output = Path(folder, "run")
        trainer = Trainer(
            model, split.train, split.val, config, output=output, callbacks=[alternate]
        )
        trainer.fit()
    pairs = alternate.pairs[1:]  # the first warms up
    ratios = [bare / own for own, bare in pairs]
    bare = replace(
        CONFIG, augmentation=Augmentation.none(), preprocess=Preprocess(size_px=FULL_SIZE_PX)
    )
    fast = BareLoop(split.train, bare)
    plain = BareLoop(split.train, replace(bare, precision="float32", channels_last=False))
    fast.step_seconds(), plain.step_seconds()
    gains = [plain.step_seconds() / fast.step_seconds() for _ in range(PAIRS)]
    write(
        "training_step",
        {
            "what": "images/s: trainer / bare loop; recommended settings / float32 NCHW",
            "size_px": {"trainer": CONFIG.preprocess.size_px, "recommended": FULL_SIZE_PX},
            "batch_size": 16,
            "trainer_images_per_s": 16 / statistics.median(own for own, _ in pairs),
            "bare_images_per_s": 16 / statistics.median(bare for _, bare in pairs),
            "trainer_over_bare": statistics.median(ratios),
            "trainer_over_bare_pairs": ratios,
            "recommended_over_plain": statistics.median(gains),
            "recommended_over_plain_pairs": gains,
        },
    )


if __name__ == "__main__":
    main()
