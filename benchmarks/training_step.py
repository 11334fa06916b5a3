"""The trainer's step against the same step in a bare loop, and the recipe against a plain one.

What is compared alternates epoch by epoch, so that a machine that slows down slows both; the ratio
is the median over the pairs. Settings that hold for a whole process (huge pages, memory that is
kept) have a process each, which waits while the others run. Run: python benchmarks/training_step.py
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import named_by_processor, write

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
from chestxray_covid.__main__ import KEPT
from chestxray_covid.engine_torch import native_bfloat16
from chestxray_covid.models import normalise, set_training_mode
from chestxray_covid.training_speed import faster_on_cpu

PAIRS = 5
#: Times as many of the trainer's, which are shorter and scatter as much as they differ.
TRAINER = 3
STEPS = 8
#: The recommended settings are compared where they are meant to be used, at 224 px.
FULL_SIZE_PX = 224
#: What a script can set before torch allocates, and what has to be set before Python starts,
#: for which ``chestxray-covid train`` starts itself again.
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
MEMORY_KEPT = {"GLIBC_TUNABLES": KEPT, "THP_MEM_ALLOC_ENABLE": "0"}
CONFIG = TrainingConfig(
    preprocess=Preprocess(size_px=160),
    batch_size=16,
    samples_per_epoch=16 * STEPS,
    patience=None,
    device="cpu",
)


class BareLoop:
    """The same arithmetic as a trainer's step over pixels that are in memory, and nothing else."""

    def __init__(
        self,
        data: ChestXrayDataset,
        config: TrainingConfig,
        *,
        faster: bool = True,
        compiled: bool = False,
    ) -> None:
        self.config = config
        self.pixels = np.stack([config.preprocess(data.image(i)) for i in range(len(data))])
        self.targets = torch.tensor(data.targets)
        model = build_densenet121(pretrained=False)
        self.model = model.to(
            memory_format=torch.channels_last if config.channels_last else torch.contiguous_format
        )
        set_training_mode(self.model)
        self.network = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.faster = faster and not compiled
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-6, weight_decay=0.05, fused=faster
        )
        native = config.precision == "auto" and native_bfloat16(torch.device("cpu"))
        self.half = native or config.precision == "bfloat16"

    def step_seconds(self) -> float:
        """Return the median duration of a step over one epoch."""
        with faster_on_cpu(self.model) if self.faster else nullcontext():
            return self._step_seconds()

    def _step_seconds(self) -> float:
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
                logits = self.network(batch)
            loss = torch.nn.functional.cross_entropy(
                logits.float(), self.targets[chosen], label_smoothing=self.config.label_smoothing
            )
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def full_size_loop(plain: bool, compiled: bool) -> BareLoop:
    """Return the loop at full size: float32 in torch's own order, or as the trainer does it."""
    config = replace(
        CONFIG, augmentation=Augmentation.none(), preprocess=Preprocess(size_px=FULL_SIZE_PX)
    )
    if plain:
        config = replace(config, precision="float32", channels_last=False)
    data = SyntheticChestXray(16 * STEPS)
    return BareLoop(data, config, faster=not plain, compiled=compiled)


_loop: BareLoop | None = None


def step_in_own_process(plain: bool, compiled: bool) -> float:
    """Return the median duration of a step; the loop is built at the first call."""
    global _loop
    if _loop is None:
        _loop = full_size_loop(plain, compiled)
        _loop.step_seconds()
    return _loop.step_seconds()


def compare_settings(pairs: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds per step of five settings, a round of all of them at a time.

    And the seconds that the first steps took, with what is compiled.
    """
    settings: dict[str, tuple[bool, bool, dict[str, str]]] = {  # plain, compiled, environment
        "plain": (True, False, {}),
        "recommended, without huge pages": (False, False, {}),
        "recommended": (False, False, HUGE_PAGES),
        "recommended, memory kept": (False, False, MEMORY_KEPT),
        "recommended, compiled": (False, True, HUGE_PAGES),
    }
    begun = {}
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # what is compiled is so here and now
    context = multiprocessing.get_context("spawn")
    pools = {}
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for name, (*how, environment) in settings.items():
        for variable in list(os.environ):
            if variable in MEMORY_KEPT or variable.startswith("MALLOC_"):
                del os.environ[variable]
        os.environ.update(environment)  # a process takes over what holds as it starts
        pools[name] = ProcessPoolExecutor(1, mp_context=context)
        start = time.perf_counter()
        pools[name].submit(step_in_own_process, *how).result()
        begun[name] = time.perf_counter() - start
    for _ in range(pairs):
        for name, (*how, _) in settings.items():
            seconds[name].append(pools[name].submit(step_in_own_process, *how).result())
    for pool in pools.values():
        pool.shutdown()
    return seconds, begun


def over(seconds: list[float], own: list[float]) -> list[float]:
    """Return the ratios of speed, pair by pair."""
    return [other / mine for other, mine in zip(seconds, own, strict=True)]


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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=PAIRS, help="rounds that are compared")
    options = parser.parse_args()
    split = split_by_patient(SyntheticChestXray(160), val=0.1, test=0.1)
    alternate = Alternate(BareLoop(split.train, CONFIG))
    with tempfile.TemporaryDirectory() as folder:
        config = replace(CONFIG, cache_dir=f"{folder}/cache", epochs=TRAINER * options.pairs + 1)
        model = build_densenet121(pretrained=False)
        output = Path(folder, "run")
        trainer = Trainer(
            model, split.train, split.val, config, output=output, callbacks=[alternate]
        )
        trainer.fit()
    pairs = alternate.pairs[1:]  # the first warms up
    ratios = [bare / own for own, bare in pairs]
    found, begun = compare_settings(options.pairs)
    gains = over(found["plain"], found["recommended"])
    small_gains = over(found["plain"], found["recommended, without huge pages"])
    kept_gains = over(found["plain"], found["recommended, memory kept"])
    compiled_gains = over(found["plain"], found["recommended, compiled"])
    write(
        named_by_processor("training_step"),
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
            "without_huge_pages_over_plain": statistics.median(small_gains),
            "without_huge_pages_over_plain_pairs": small_gains,
            "memory_kept_over_plain": statistics.median(kept_gains),
            "memory_kept_over_plain_pairs": kept_gains,
            "compiled_over_plain": statistics.median(compiled_gains),
            "compiled_over_plain_pairs": compiled_gains,
            "seconds_to_begin": begun,
            "full_size_images_per_s": {
                name: 16 / statistics.median(own) for name, own in found.items()
            },
        },
    )


if __name__ == "__main__":
    main()
