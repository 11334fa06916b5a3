"""One readable training loop on Accelerate, with exact resuming."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from chestxray_covid.checkpoint import ModelConfig, load_checkpoint, save_checkpoint
from chestxray_covid.datasets.base import ChestXrayDataset
from chestxray_covid.datasets.loading import Loader, in_batches
from chestxray_covid.errors import TrainingInterrupted
from chestxray_covid.files import expanded
from chestxray_covid.models import check_answers, check_model, load_tensors, to_tensors
from chestxray_covid.progress import Bar
from chestxray_covid.training_config import Callback, TrainingConfig
from chestxray_covid.training_feed import LateReader, feed
from chestxray_covid.training_history import EpochRecord, History, validation_numbers
from chestxray_covid.training_loss import diverged, diverged_validation
from chestxray_covid.training_network import TrainingNetwork, check_smallest_batch
from chestxray_covid.training_order import (
    Batch,
    about_data,
    check_options,
    check_sides,
    epoch_batches,
    pixel_loader,
    told_by_sources,
    warn_of_sides,
)
from chestxray_covid.training_processes import open_accelerator
from chestxray_covid.training_state import (
    Position,
    SignalWatch,
    StateStore,
    check_identity,
    run_identity,
    saving,
)


class Trainer:
    """Trains a DenseNet-121; every result lies in the run directory.

    It is a checkpoint of the best epoch so far (``model.safetensors``, ``config.json``) with
    ``history.json`` and ``history.csv``, and, until the run is finished, ``state/``, from which
    ``fit(resume=True)`` continues at the exact sample: on a CPU the weights equal those of an
    uninterrupted run bit for bit.

    Data order and augmentation depend on (seed, epoch, sample) only, but for what is swapped with
    neighbours in a batch. The caller's model is trained in place and ends with the best weights.

    Args:
        model: From :func:`build_densenet121`, with as many logits as ``train`` has classes.
        train: Training data; the order of its classes is that of the logits. What is learned is
            the class of each sample, whatever ``target_transform`` makes of it.
        val: Validation data with the same classes, no patient or image shared with ``train``.
        config: Options; the recommended recipe if not given.
        output: The run directory, made if missing.
        callbacks: Called while it trains.

    Raises:
        TypeError: If model, data, options or callbacks are of the wrong type.
        ValueError: If model, classes, data and options do not fit.
        ConfigError: If the names of the classes, or so many of sources, cannot be saved.
        TrainingError: If a class has no training image, or nothing tells it from others.

    Warns:
        ConfoundingWarning: If the source of the training images all but gives their label.
        TrainingWarning: If the validation data, which choose the epoch, lack a class; in
            :meth:`fit`, if a batch size that was found leaves the run few steps.
    """

    def __init__(
        self,
        model: torchvision.models.DenseNet,
        train: ChestXrayDataset,
        val: ChestXrayDataset,
        config: TrainingConfig | None = None,
        *,
        output: str | os.PathLike[str],
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.model = model
        self.train = train
        self.val = val
        self.config = TrainingConfig() if config is None else config
        self.output = expanded(output).absolute()  # whatever a callback makes the current folder
        check_options(self.config, callbacks)
        self.callbacks = tuple(callbacks)
        self.history = History()
        check_sides(train, val)
        self._about = about_data(train, val)
        check_model(model, train.classes)
        check_smallest_batch(model, self.config)
        warn_of_sides(train, val, self.config, stacklevel=2)
        self._told = told_by_sources(train, self.config)
        self._states = StateStore(self.output)
        self._at = Position()
        self._batch_size = 0 if self.config.batch_size == "auto" else self.config.batch_size
        self._precision: str = self.config.precision  # until it is found what "auto" is
        self._rate = 0.0

    @property
    def learning_rate(self) -> float:
        """The learning rate of the latest step; 0 before the first."""
        return self._rate

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one of the run that writes; known from :meth:`fit` on."""
        return bool(self._accelerator.is_main_process)

    @torch.inference_mode(mode=False)  # the caller's would leave no gradients
    def fit(self, *, resume: bool = False) -> History:
        """Train on from the model's weights; return the history, and leave the best in the run.

        Args:
            resume: Continue the run in ``output``, which must have the same options and data.
                Of a run that is finished, the history and the weights are read.

        Raises:
            TrainingError: If a run is there that is at work, not to be resumed, of other options or
                data, or one per process, or none to resume; if a loss is no number or saving fails.
            ValueError: If the model answers otherwise than a DenseNet-121 of its weights.
            CheckpointError: If a finished run is damaged.
            TrainingInterrupted: If SIGINT or SIGTERM arrived; the state was saved, or the run was
                finished, because a callback wanted to stop at the same time.
            ImageError: If a file cannot be decoded.
            ForkedError: In a process that was forked after torch had begun to compute here, unless
                it computes on the CPU in one thread.
        """
        self._accelerator = open_accelerator(self.config, self.output)
        self.device: torch.device = self._accelerator.device
        check_answers(self.model)
        if resume and (finished := self._states.finished(self.config)) is not None:
            return self._take_finished(finished)
        with self._states.claimed(resume=resume, make=self._accelerator.is_main_process):
            self._prepare(resume)
            with SignalWatch() as self._signals, closing(self._network) as net, net.computing():
                for callback in self.callbacks:
                    callback.on_train_begin(self)
                while self._at.epoch < self.config.epochs and not self._at.has_stalled(self.config):
                    self._train_epoch()
                    if self._finish_epoch():  # before a signal, after which it would be forgotten
                        break
                    self._stop_if_signalled()
            self._finish()
            self._stop_if_signalled()
        return self.history

    def _take_finished(self, history: History) -> History:
        """Take over a finished run, if it is one of these options and data."""
        config, tensors = load_checkpoint(self.output)
        self._take_over(config.provenance.get("identity", {}))
        load_tensors(self.model, tensors)
        self.model.eval()
        self.history = history
        if self._accelerator.is_main_process:
            self._states.clear()  # what is left of them where a process died meanwhile
        return history

    def _prepare(self, resume: bool) -> None:
        config = self.config
        self.history, self._at = History(), Position()
        self._losses: LateReader[tuple[int, float, Batch]] = LateReader(self.device)
        self._load_train = self._loader(self.train)
        self._load_val = self._loader(self.val)
        self._network = TrainingNetwork(self.model, config, self._accelerator, self.train.targets)
        self._precision = "bfloat16" if self._network.bfloat16 else "float32"
        if resume:
            self._restore()
        elif config.batch_size == "auto":
            images = config.samples_per_epoch or len(self.train)
            self._batch_size = self._network.largest_batch(images)

    def _loader(self, dataset: ChestXrayDataset) -> Loader:
        with self._accelerator.main_process_first():
            show = self.config.progress and self._accelerator.is_main_process
            return pixel_loader(dataset, self.config, progress=show)

    def _train_epoch(self) -> None:
        at, config = self._at, self.config
        batches = epoch_batches(
            self.train,
            config,
            batch_size=self._batch_size,
            epoch=at.epoch,
            process=self._accelerator.process_index,
            processes=self._accelerator.num_processes,
        )
        steps = math.ceil(len(batches) / config.accumulate)
        self._rate = config.rate_at(max(0, at.step - 1), steps)
        positions = [[index for index, _ in b.images] for b in batches[at.batch :]]
        pixels = feed(self._load_train, positions, self.device, workers=config.workers)
        self._network.train()
        sizes = [len(batch.together) for batch in batches]
        bar = self._bar(f"epoch {at.epoch + 1}/{config.epochs}", sum(sizes), sum(sizes[: at.batch]))
        with closing(pixels), bar:
            while at.batch < len(batches):
                group = batches[at.batch : at.batch + config.accumulate]
                self._rate = config.rate_at(at.step, steps)
                last = at.batch + len(group) == len(batches)
                every = config.checkpoint_every
                due = last or (every is not None and (at.step + 1) % every == 0)
                self._step(group, pixels, due=due)
                loss = at.loss_sum / max(1, at.seen)  # a process may have had none that counts
                bar.update(sum(len(batch.together) for batch in group))
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                for callback in self.callbacks:
                    callback.on_step_end(self, at.step, loss)
                if self.callbacks:  # which may have looked at predictions
                    self._network.train()
                self._save_or_stop(due=due)

    def _step(self, group: list[Batch], pixels: Iterator[Tensor], *, due: bool) -> None:
        """Take one optimizer step over a group of batches; if a state is due, read their losses."""
        at, network = self._at, self._network
        start = time.perf_counter()
        # Processes take the mean of their gradients, which shall be the mean over all images.
        weight = network.weight_of([self.train.targets[i] for b in group for i in b.together])
        for number, batch in enumerate(group, 1):
            waiting = time.perf_counter()
            images = next(pixels)
            at.data_seconds += time.perf_counter() - waiting
            own = [position for position, _ in batch.images]
            varied = network.vary(images, at.epoch, [draw for _, draw in batch.images])
            loss = network.backward(
                varied,
                [self.train.targets[i] for i in own],
                told=None if self._told is None else self._told[own],
                counted=batch.counted,
                share=self._accelerator.num_processes / weight,
                last=number == len(group),
            )
            self._losses.put(loss, (at.batch + number, self._rate, batch))
        self._count(leave=0 if due or not at.seen else len(group))
        network.step(self._rate)
        at.batch += len(group)
        at.step += 1
        at.seconds += time.perf_counter() - start

    def _count(self, *, leave: int) -> None:
        """Add the losses to the epoch's; on a GPU the last so many are left to be computed."""
        at = self._at
        for loss, (number, rate, batch) in self._losses.ready(leave=leave):
            if not math.isfinite(loss):
                paths = [self.train.samples[i].path for i, _ in batch.images]
                place = f"epoch {at.epoch + 1}, batch {number}"
                raise diverged(loss, place, paths, rate, self.output)
            at.loss_sum += loss
            at.seen += batch.counted

    def _save_or_stop(self, *, due: bool) -> None:
        """Save when a state is due; stop after that if a signal arrived in any process.

        After an epoch's last step one always is, so that validation can be interrupted.
        """
        signal_number = self._network.greatest(self._signals.received)
        if due or signal_number:
            self._count(leave=0)
            self._save_state()
        if signal_number:
            raise TrainingInterrupted(signal_number, self.output)

    def _stop_if_signalled(self) -> None:
        if signal_number := self._network.greatest(self._signals.received):
            raise TrainingInterrupted(signal_number, self.output)

    def _finish_epoch(self) -> bool:
        """Validate, record, keep the best weights, save; say whether a callback wants to stop."""
        at = self._at
        start = time.perf_counter()
        loss, probabilities = self._validate()
        seconds = at.seconds + time.perf_counter() - start
        numbers = validation_numbers(np.array(self.val.targets), probabilities)
        loss_sum, seen = self._network.sums([self._at.loss_sum, self._at.seen])
        auroc = numbers["val_auroc"] if self.config.monitor == "val_auroc" else None
        score = -loss if auroc is None else auroc
        is_best = self.config.monitor == "last" or at.best_score is None or score > at.best_score
        record = EpochRecord(
            epoch=at.epoch + 1,
            learning_rate=self._rate,
            train_loss=loss_sum / seen,
            val_loss=loss,
            **numbers,
            images_per_s=seen / at.seconds,
            seconds=seconds,
            data_seconds=at.data_seconds,
            is_best=is_best,
        )
        self.history = History(records=(*self.history.records, record))
        self._at = at.next_epoch(best=score if is_best else None)
        if is_best:
            self._save_best(record)
        self._save_state()
        wishes = [c.on_epoch_end(self, record) for c in self.callbacks]
        return self._network.greatest(int(any(wishes))) > 0  # of one process: it stops all

    def _validate(self) -> tuple[float, NDArray[np.float64]]:
        """Return the mean cross-entropy and the ``(N, K)`` probabilities of the validation data."""
        accelerator = self._accelerator

        def may_stop() -> None:
            if self._signals.received and accelerator.num_processes == 1:
                raise TrainingInterrupted(self._signals.received, self.output)

        self._network.unite()
        own = range(accelerator.process_index, len(self.val), accelerator.num_processes)
        batches = list(in_batches(own, self._batch_size))
        pixels = feed(self._load_val, batches, self.device, workers=self.config.workers)
        with closing(pixels), self._bar("validate", len(own)) as bar:
            logits = self._network.predict(pixels, total=len(self.val), bar=bar, check=may_stop)
        loss = float(F.cross_entropy(logits, torch.tensor(self.val.targets, device=logits.device)))
        if not math.isfinite(loss):
            raise diverged_validation(loss, self._at.epoch + 1, self.output)
        return loss, logits.softmax(1).numpy()

    def _bar(self, name: str, total: int, initial: int = 0) -> Any:
        show = self.config.progress and self._accelerator.is_main_process
        return Bar(desc=name, total=total, initial=initial, unit="img", disable=not show)

    def _save_best(self, record: EpochRecord) -> None:
        if not self._accelerator.is_main_process:
            return
        own = {"batch_size": self._batch_size, "precision": self._precision, "cache_dir": None}
        provenance = {
            "training": self.config.to_dict() | own,
            "epoch": record.epoch,
            "identity": self._identity(),
            **self._about,
        }
        classes, preprocess = self.train.classes, self.config.preprocess
        config = ModelConfig(classes=classes, preprocess=preprocess, provenance=provenance)
        with saving("weights", self.output):
            save_checkpoint(self.output, config, to_tensors(self._network.best))

    def _save_state(self) -> None:
        loss_sum, seen = self._network.sums([self._at.loss_sum, self._at.seen])
        if self._accelerator.is_main_process:
            at = asdict(replace(self._at, loss_sum=loss_sum, seen=int(seen)))
            values = {"at": at, "history": self.history.to_dict(), "identity": self._identity()}
            self._states.save(self._at.step, self._network.state(), values)
        self._save_history()
        self._accelerator.wait_for_everyone()

    def _save_history(self) -> None:
        if self._accelerator.is_main_process:
            with saving("history", self.output):
                self.history.save(self.output)

    def _identity(self) -> dict[str, Any]:
        trains = [name for name, p in self.model.named_parameters() if p.requires_grad]
        together = self._batch_size * self._accelerator.num_processes
        own = run_identity(self.config, self.train, self.val, trains, together)
        return own | {"precision": self._precision}

    def _take_over(self, identity: Mapping[str, Any]) -> None:
        """Check that a run is this one, whose batch and precision stay where both are free."""
        if self.config.batch_size == "auto":
            together = identity.get("batch_size", 0)
            self._batch_size = max(1, together // self._accelerator.num_processes)
        if self.config.precision == "auto":
            self._precision = identity.get("precision", "auto")
        check_identity(self._identity(), identity, self.output)

    def _restore(self) -> None:
        _, tensors, values = self._states.load()
        with self._states.understanding():
            self._take_over(values["identity"])
            self._at = Position(**values["at"])
        if self._precision != "auto":
            self._network.bfloat16 = self._precision == "bfloat16"
        self._network.load_state(tensors)
        if not self._accelerator.is_main_process:  # the sums are those of all processes
            self._at.loss_sum, self._at.seen = 0.0, 0
        self.history = History.from_dict(values["history"])

    def _finish(self) -> None:
        """Put the best weights into the caller's model; the state is needed no more."""
        self._accelerator.wait_for_everyone()
        load_tensors(self.model, load_checkpoint(self.output)[1])
        self.model.eval()
        self.history = replace(self.history, finished=True)
        self._save_history()  # before the states go: it says that none is needed
        if self._accelerator.is_main_process:
            self._states.clear()
        for callback in self.callbacks:
            callback.on_train_end(self, self.history)
