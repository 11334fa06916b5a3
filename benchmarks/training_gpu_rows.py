"""The ways to train that ``training_gpu.py`` measures, each an epoch at a time."""

from __future__ import annotations

import itertools
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms

from chestxray_covid import (
    Callback,
    ChestXrayDataset,
    EpochRecord,
    Preprocess,
    Trainer,
    TrainingConfig,
    build_densenet121,
)
from chestxray_covid.datasets.loading import cached_decoder
from chestxray_covid.models import normalise

SIZE_PX = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESS = Preprocess(size_px=SIZE_PX)
#: Steps that are profiled, in the middle of an epoch.
PROFILED_STEPS = 15


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all rows share."""

    device: torch.device
    train: ChestXrayDataset
    val: ChestXrayDataset
    images: int
    rounds: int
    workers: int
    folder: Path

    def clock(self) -> float:
        """Return the time at which the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def files(self) -> list[tuple[Path, int]]:
        """Return an epoch's files and classes, some twice where there are too few."""
        pairs = [(s.path, y) for s, y in zip(self.train.samples, self.train.targets, strict=True)]
        return list(itertools.islice(itertools.cycle(pairs), self.images))


class Window:
    """How long the device computes within some steps in the middle of an epoch."""

    def __init__(self, setup: Setup, steps: int) -> None:
        self.setup = setup
        self.count = min(PROFILED_STEPS, max(1, steps // 2))
        self.first = (steps - self.count) // 2
        self.found: dict[str, float] | None = None

    def after(self, step: int) -> None:
        """Begin or end after a step, numbered from 1."""
        if step == self.first:
            activities = [torch.profiler.ProfilerActivity.CUDA]
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()
            self.start = self.setup.clock()
        elif step == self.first + self.count:
            seconds = self.setup.clock() - self.start
            self.profiler.stop()
            busy = covered(device_spans(self.profiler.events()))
            self.found = {"steps": self.count, "seconds": seconds, "busy_s": busy / 1e6}


def device_spans(events: Iterable[Any]) -> Iterator[tuple[float, float]]:
    """Yield start and end (µs) of every kernel, copy and fill; ranges that only name them not."""
    for event in events:
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device and not getattr(event, "is_user_annotation", False):
            yield event.time_range.start, event.time_range.end


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@dataclass(kw_only=True)
class Row:
    """One way to train, an epoch at a time."""

    setup: Setup
    batch: int
    benchmark: bool = False  # torch.backends.cudnn.benchmark, which holds for the whole process
    warm_up_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    window: Window | None = None

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.setup.images // self.batch

    def run(self) -> float:
        """Train for an epoch and return its seconds, under the settings that it left behind."""
        torch.backends.cudnn.benchmark = self.benchmark
        seconds = self.epoch()
        self.benchmark = torch.backends.cudnn.benchmark
        return seconds

    def epoch(self) -> float:
        """Train for an epoch and return its seconds."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what it holds."""


@dataclass(kw_only=True)
class Loop(Row):
    """A loop over batches: decoded by a loader, or prepared."""

    batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
    step: Callable[[torch.Tensor, torch.Tensor], None]

    def epoch(self) -> float:
        """See :class:`Row`."""
        start = self.setup.clock()
        for images, targets in self.batches:
            self.step(images, targets)
        return self.setup.clock() - start


class Files(Dataset[Any]):
    """Image files as both loaders take them; timm sets the transform itself."""

    def __init__(self, files: Sequence[tuple[Path, int]], transform: Any = None) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.files[index]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), target


def plain_step(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Return the step of a tutorial: float32, torch's own order, Adam, the loss read each time."""
    model = models.densenet121(weights=None, num_classes=2).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    criterion = torch.nn.CrossEntropyLoss()
    losses: list[float] = []

    def step(images: torch.Tensor, targets: torch.Tensor) -> None:
        images, targets = images.to(device), targets.to(device)
        optimizer.zero_grad()
        loss = criterion(model(images), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    return step


def plain(setup: Setup, batch: int) -> Loop:
    """Return a tutorial's loop: Pillow and torchvision in worker processes, float32."""
    steps = [
        *(transforms.Resize((SIZE_PX, SIZE_PX)), transforms.RandomHorizontalFlip()),
        *(transforms.RandomRotation(10), transforms.ToTensor()),
        transforms.Normalize(MEAN, DEVIATION),
    ]
    loader = DataLoader(
        Files(setup.files(), transforms.Compose(steps)),
        batch_size=batch,
        shuffle=True,
        num_workers=setup.workers,
        drop_last=True,
        persistent_workers=setup.workers > 0,  # few tutorials do; it spares each epoch the forks
    )
    return Loop(setup=setup, batch=batch, batches=loader, step=plain_step(setup.device))


def prepared(setup: Setup, batch: int) -> Loop:
    """Return the same step over an epoch that lies on the device, normalised."""
    load = cached_decoder(setup.train, PREPROCESS, cache(setup), workers=setup.workers)
    chosen = [i % len(setup.train) for i in range(setup.images)]
    pixels = torch.from_numpy(np.stack([load(i) for i in chosen])).to(setup.device)
    images = normalise(pixels, PREPROCESS).contiguous()
    targets = torch.tensor([setup.train.targets[i] for i in chosen], device=setup.device)
    batches = list(zip(images.split(batch), targets.split(batch), strict=True))
    return Loop(setup=setup, batch=batch, batches=batches, step=plain_step(setup.device))


def timm_loop(setup: Setup, batch: int, *, compiled: bool = False) -> Loop:
    """Return what timm's train.py does with --amp --amp-dtype bfloat16 --channels-last.

    All else is its default: RandomResizedCrop, flip and colour jitter in four workers, a prefetcher
    that normalises on the device, SGD with Nesterov at 0.1 per 256 images, label smoothing.
    """
    import timm
    from timm.data import create_loader
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2

    device = setup.device
    model = timm.create_model("densenet121", num_classes=2).to(device)
    model = model.to(memory_format=torch.channels_last).train()
    rate = 0.1 * batch / 256
    optimizer = create_optimizer_v2(model, opt="sgd", lr=rate, weight_decay=2e-5, momentum=0.9)
    net = torch.compile(model, backend="inductor") if compiled else model
    loader = create_loader(
        Files(setup.files()),
        input_size=(3, SIZE_PX, SIZE_PX),
        batch_size=batch,
        is_training=True,
        use_prefetcher=True,
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip=0.5,
        color_jitter=0.4,
        re_mode="pixel",
        interpolation="random",
        mean=MEAN,
        std=DEVIATION,
        num_workers=setup.workers,
        device=device,
    )
    criterion = LabelSmoothingCrossEntropy(smoothing=0.1).to(device)
    losses: list[float] = []

    def step(images: torch.Tensor, targets: torch.Tensor) -> None:
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            loss = criterion(net(images), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        optimizer.zero_grad()

    return Loop(setup=setup, batch=batch, batches=loader, step=step, benchmark=True)


def cache(setup: Setup) -> Path:
    """Return the folder of decoded pixels."""
    return setup.folder / "cache"


@dataclass(kw_only=True)
class TrainerRow(Row):
    """The trainer, which waits in its callback while others run."""

    compile_backend: str | None = None
    records: list[EpochRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._last = 0.0
        self._closing = False
        self._error: Exception | None = None

    def epoch(self) -> float:
        """See :class:`Row`."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self._last

    def close(self) -> None:
        """End the run."""
        self._closing = True
        self._go.release()
        if self._thread.ident is not None:
            self._thread.join()

    def pause(self, record: EpochRecord) -> bool:
        """Wait for the next epoch's turn; say whether there is none."""
        self.records.append(record)
        self._done.release()
        self._go.acquire()
        return self._closing

    def end(self, seconds: float) -> None:
        """Take over the duration of an epoch."""
        self._last = seconds

    def _fit(self) -> None:
        try:
            self._trainer().fit()
        except Exception as error:
            self._error = error
            self._done.release()

    def _trainer(self) -> Trainer:
        setup = self.setup
        config = TrainingConfig(
            preprocess=PREPROCESS,
            batch_size=self.batch,
            samples_per_epoch=self.steps * self.batch,
            epochs=setup.rounds + 3,  # more than are run
            patience=None,
            device="cpu" if setup.device.type == "cpu" else "auto",
            compile_backend=self.compile_backend,
            workers=setup.workers,
            cache_dir=cache(setup),
            allow_confounded_sources=True,
            progress=False,
        )
        folder = tempfile.mkdtemp(dir=setup.folder)
        model = build_densenet121(pretrained=False, seed=0)
        return Trainer(
            model, setup.train, setup.val, config, output=folder, callbacks=[Turns(self)]
        )


class Turns(Callback):
    """Times the epochs of a run, and lets others run between them."""

    def __init__(self, row: TrainerRow) -> None:
        self.row = row

    def on_train_begin(self, trainer: Trainer) -> None:
        """Begin the first epoch."""
        self.start = self.row.setup.clock()

    def on_step_end(self, trainer: Trainer, step: int, loss: float) -> None:
        """End an epoch's time with its last step, before what is saved after it."""
        number = (step - 1) % self.row.steps + 1
        if self.row.window is not None:
            self.row.window.after(number)
        if number == self.row.steps:
            self.row.end(self.row.setup.clock() - self.start)

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> bool:
        """Let the others run."""
        stop = self.row.pause(record)
        self.start = self.row.setup.clock()
        return stop
