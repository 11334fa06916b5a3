"""Order of the data, the state between two steps, and signals: what exact resuming needs."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.datasets.base import ChestXrayDataset
from chestxray_covid.datasets.duplicates import patient_key
from chestxray_covid.datasets.loading import Loader, cached_decoder, decoder
from chestxray_covid.errors import CheckpointError, TrainingError
from chestxray_covid.files import read_json, sync_folder, write_files
from chestxray_covid.tensors import read_tensors

if TYPE_CHECKING:  # it imports torch, which nothing here needs
    from chestxray_covid.training_config import TrainingConfig

STATE_FOLDER = "state"
#: Options that change how fast a run goes, not what it computes.
RUNTIME_OPTIONS = frozenset(
    {"workers", "cache_dir", "progress", "checkpoint_every", "gradient_checkpointing"}
)
#: Domain of the random numbers, see :mod:`chestxray_covid.augment`.
_STREAM = 1


def epoch_order(
    dataset: ChestXrayDataset,
    *,
    balance: str,
    count: int | None,
    seed: int,
    epoch: int,
    max_repeats: float | None = None,
) -> NDArray[np.int64]:
    """Return the positions that an epoch trains on, in order; a function of its arguments alone.

    Args:
        dataset: The training data.
        balance: See :class:`TrainingConfig`.
        count: Number of positions; ``None`` for as many as there are images.
        seed: Seed of the run.
        epoch: Epoch, from 0.
        max_repeats: See :class:`TrainingConfig`.

    Returns:
        ``(count,)`` int64. Each image once (and again once all were there) with
        ``balance="none"``; otherwise drawn with replacement.
    """
    rng = np.random.default_rng([seed, epoch, _STREAM])
    size = len(dataset)
    count = count or size
    if balance == "none":
        rounds = -(-count // size)
        return np.concatenate([rng.permutation(size) for _ in range(rounds)])[:count]
    keys = [(s.label, s.source if balance == "class_and_source" else "") for s in dataset.samples]
    images = Counter(keys)
    shares: dict[tuple[str, str], float] = {}
    labels = {label for label, _ in images}
    for label in labels:
        own = {key: n for key, n in images.items() if key[0] == label}
        limit = None if max_repeats is None else max_repeats * len(labels) / count
        shares |= _shares(own, limit)
    weights = np.array([shares[key] / images[key] for key in keys])
    return rng.choice(size, count, p=weights / weights.sum())


def _shares(images: Mapping[Any, int], limit: float | None) -> dict[Any, float]:
    """Return each source's share of its class: equal, but at most ``limit`` per image.

    What a small source may not take is left to the others; if all are small, shares are by size.
    """
    shares: dict[Any, float] = {}
    left, remaining = 1.0, sorted(images, key=lambda key: images[key])
    while remaining:
        key = remaining[0]
        fair = left / len(remaining)
        shares[key] = fair if limit is None else min(fair, limit * images[key])
        left -= shares[key]
        remaining = remaining[1:]
    if left > 1e-9:  # every image is at the limit
        return {key: n / sum(images.values()) for key, n in images.items()}
    return shares


def repetitions(order: NDArray[np.int64], size: int) -> list[int]:
    """Return a number for each draw that differs between draws of one image.

    The ``k``-th draw of image ``i`` (from 0) is ``i + k * size``: the images of an epoch are varied
    by what they are, not by where in the order they come.
    """
    seen: Counter[int] = Counter()
    draws = []
    for index in order.tolist():
        draws.append(index + seen[index] * size)
        seen[index] += 1
    return draws


class Batch(NamedTuple):
    """One process's part of the images that all processes compute together.

    Attributes:
        images: Position and draw of each.
        counted: The first so many count; those after them only fill the last batch of an epoch.
        together: Positions of all that count, in all processes.
    """

    images: list[tuple[int, int]]
    counted: int
    together: list[int]


def epoch_batches(
    dataset: ChestXrayDataset,
    config: TrainingConfig,
    *,
    batch_size: int,
    epoch: int,
    process: int,
    processes: int,
) -> list[Batch]:
    """Return one process's batches of an epoch.

    The images of all processes together depend on ``batch_size * processes`` alone. Where they are
    too few for the last batch, the epoch's first ones fill it up, without counting; a last batch of
    one image is left out, since batch norm has no statistics of it.

    Args:
        dataset: The training data.
        config: Options of the run.
        batch_size: Images per process.
        epoch: Epoch, from 0.
        process: Which one, from 0.
        processes: How many there are.
    """
    order = epoch_order(
        dataset,
        balance=config.balance,
        count=config.samples_per_epoch,
        seed=config.seed,
        epoch=epoch,
        max_repeats=config.max_repeats,
    )
    pairs = list(zip(order.tolist(), repetitions(order, len(dataset)), strict=True))
    together = batch_size * processes
    chunks = [pairs[i : i + together] for i in range(0, len(pairs), together)]
    if len(chunks) > 1 and len(chunks[-1]) == 1 < together:
        chunks.pop()
    batches = []
    for chunk in chunks:
        own = chunk[batch_size * process : batch_size * (process + 1)]
        missing = batch_size - len(own) if processes > 1 else 0
        filling = [pairs[i % len(pairs)] for i in range(missing)]
        batches.append(Batch([*own, *filling], len(own), [position for position, _ in chunk]))
    return batches


def pixel_loader(dataset: ChestXrayDataset, config: TrainingConfig, *, progress: bool) -> Loader:
    """Return what reads the pixels of a data set, from the run's cache if it has one.

    Raises:
        As :func:`cached_decoder`.
    """
    pre = config.preprocess
    if config.cache_dir is None:
        return decoder(dataset, pre)
    return cached_decoder(dataset, pre, config.cache_dir, workers=config.workers, progress=progress)


@dataclass
class Position:
    """Where a run is: everything of its state that is no tensor."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seen: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    epochs_since_best: int = 0
    best_score: float | None = None


def check_sides(train: ChestXrayDataset, val: ChestXrayDataset) -> None:
    """Raise unless these can train and validate a model.

    Raises:
        ValueError: If their classes differ.
        TrainingError: If validation data or a class are missing, or the two share a patient.
    """
    if train.classes != val.classes:
        raise ValueError(f"train has the classes {train.classes}, val {val.classes}")
    if not len(val):
        raise TrainingError("The validation data are empty. Split with val > 0.")
    shared = {patient_key(s) for s in train.samples} & {patient_key(s) for s in val.samples}
    if shared:
        raise TrainingError(
            f"{len(shared)} patient(s) have an image in the training and in the validation data, "
            f"for example {min(shared)}. Split with split_by_patient."
        )
    missing = sorted(set(train.classes) - {s.label for s in train.samples})
    if missing:
        raise TrainingError(
            f"No training image of {missing}: a classifier cannot learn a class that it never "
            "sees. Add a data set that has it, or ask for other classes=."
        )


def run_identity(
    config: TrainingConfig,
    train: ChestXrayDataset,
    val: ChestXrayDataset,
    trains: Sequence[str],
    batch: int,
) -> dict[str, Any]:
    """Return what must be equal for a run to be continued, as JSON-able data.

    Args:
        config: Its options; those that only change how fast it goes are left out.
        train: Its training data.
        val: Its validation data.
        trains: Names of the parameters that train.
        batch: Images per batch, in all processes together, however many these are.
    """
    options = {k: v for k, v in config.to_dict().items() if k not in RUNTIME_OPTIONS}
    rows = [
        [(s.path.name, s.label, s.source, s.patient_id) for s in d.samples] for d in (train, val)
    ]
    return {
        **options,
        "batch_size": batch,
        "data": _digest((train.classes, rows)),
        "trainable": _digest(tuple(trains)),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogateescape")).hexdigest()


def check_identity(mine: Mapping[str, Any], theirs: Mapping[str, Any], run: Path) -> None:
    """Raise unless a run is of these options and data.

    Raises:
        TrainingError: If something differs, with its name.
    """
    other = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
    if other:
        raise TrainingError(
            f"The run in {run} differs in {other} and cannot be continued like this. "
            "Use the options and data that it began with, or another folder."
        )


class StateStore:
    """The saved states of a run: one folder each, complete or not there, the newest kept.

    A state is written to a temporary folder, synced and renamed, and only then are older ones
    deleted, so that one can be read whenever the process may have died.

    Args:
        run: The run directory.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / STATE_FOLDER

    def steps(self) -> list[int]:
        """Return the steps that have a state, newest first."""
        names = [p.name for p in self._folder.glob("step-*")] if self._folder.is_dir() else []
        return sorted((int(n.removeprefix("step-")) for n in names), reverse=True)

    def save(
        self, step: int, tensors: Mapping[str, NDArray[Any]], values: Mapping[str, Any]
    ) -> None:
        """Write the state after a step and delete older ones.

        Raises:
            TrainingError: If it cannot be written; older states are as they were.
        """
        from safetensors.numpy import save

        partial = self._folder / f".partial-{step:09d}"
        final = self._folder / f"step-{step:09d}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            text = json.dumps(values, allow_nan=False)
            # safetensors takes the bytes as they lie in memory, whatever the order of the axes.
            ordered = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
            write_files(partial, {"state.safetensors": save(ordered), "state.json": text.encode()})
            if final.exists():  # the same step, computed again after a resume
                shutil.rmtree(final)
            partial.replace(final)
            sync_folder(self._folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise TrainingError(
                f"The state of step {step} cannot be saved in {self._folder}: {error}. "
                "Make room or mend the folder, then continue with resume=True."
            ) from error
        for older in self.steps()[1:]:
            shutil.rmtree(self._folder / f"step-{older:09d}", ignore_errors=True)

    def load(self) -> tuple[int, dict[str, NDArray[Any]], dict[str, Any]]:
        """Return step, tensors and values of the newest state that can be read.

        Raises:
            TrainingError: If there is none.
        """
        damaged = []
        for step in self.steps():
            place = self._folder / f"step-{step:09d}"
            path = place / "state.safetensors"
            try:
                return (
                    step,
                    read_tensors(path.read_bytes(), path),
                    dict(read_json(place / "state.json")),
                )
            except (OSError, CheckpointError) as error:
                damaged.append(str(error))
        raise TrainingError(
            f"There is no state to resume from in {self._folder}"
            + (f": {'; '.join(damaged)}" if damaged else ".")
            + " Train without resume, into a new folder."
        )

    def clear(self) -> None:
        """Delete all states, which a finished run needs no more."""
        shutil.rmtree(self._folder, ignore_errors=True)


class SignalWatch:
    """Notes SIGINT and SIGTERM while it is entered; a second signal acts as it did before.

    Outside the main thread, where Python allows no handlers, it notes nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
