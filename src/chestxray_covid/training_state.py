"""The state between two steps, and signals: what exact resuming needs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.datasets.base import ChestXrayDataset
from chestxray_covid.datasets.storage import alone
from chestxray_covid.errors import CheckpointError, ConfigError, TrainingError
from chestxray_covid.files import PARTIAL, read_json, sync_folder, write_files
from chestxray_covid.tensors import read_tensors
from chestxray_covid.training_history import HISTORY_NAME, History

if TYPE_CHECKING:  # it imports torch, which nothing here needs
    from chestxray_covid.training_config import TrainingConfig

STATE_FOLDER = "state"
#: Of history and state: an epoch is some 400 bytes of each.
_MAX_JSON_BYTES = 50_000_000
#: Step, and the number of the save where there were several after it.
_STATE_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")
#: What a process that was killed leaves of a file of a run, see :func:`write_files`.
_LEFT = re.compile(rf"\.(model\.safetensors|config\.json|history\.\w+){PARTIAL}")
#: What of a run's identity is no option.
_NO_OPTIONS = ("data", "pixels", "trainable")
#: Options that change how fast a run goes, not what it computes.
RUNTIME_OPTIONS = frozenset(
    {
        *("workers", "cache_dir", "progress", "checkpoint_every"),
        *("allow_confounded_sources", "gradient_checkpointing"),
    }
)


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

    def has_stalled(self, config: TrainingConfig) -> bool:
        """Return whether the patience of these options is at its end."""
        return config.patience is not None and self.epochs_since_best >= config.patience

    def next_epoch(self, *, best: float | None) -> Position:
        """Return the beginning of the next epoch; ``best`` is the score of this one, if it is."""
        return Position(
            epoch=self.epoch + 1,
            step=self.step,
            epochs_since_best=self.epochs_since_best + 1 if best is None else 0,
            best_score=self.best_score if best is None else best,
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
    foreign = [_foreign_code(d) for d in (train, val)]
    return {
        **options,
        **({"pixels": foreign} if any(foreign) else {}),  # older runs named none
        "batch_size": batch,
        "data": _digest((train.classes, rows)),
        "trainable": _digest(tuple(trains)),
    }


def _foreign_code(dataset: ChestXrayDataset) -> list[str]:
    """Return the names of what makes pixels and is not this library's."""
    every = [*(sample.read for sample in dataset.samples), dataset.transform]
    calls = {id(call): call for call in every if call is not None}.values()
    inner = [call.func if isinstance(call, partial) else call for call in calls]
    named = [call if hasattr(call, "__qualname__") else type(call) for call in inner]
    names = {f"{getattr(call, '__module__', None)}.{call.__qualname__}" for call in named}
    return sorted(name for name in names if not name.startswith("chestxray_covid."))


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogateescape")).hexdigest()


def check_identity(mine: Mapping[str, Any], theirs: Mapping[str, Any], run: Path) -> None:
    """Raise unless a run is of these options and data.

    An option that a run does not name did not exist when it began, and counts as its default.

    Raises:
        TrainingError: If something differs, with its name, and its values if they are short.
    """
    from chestxray_covid.training_config import TrainingConfig

    theirs = _completed(theirs, TrainingConfig().to_dict())
    other = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
    if other:
        short = (k for k in other if not isinstance(mine.get(k), Mapping) and k not in _NO_OPTIONS)
        said = "".join(f"; {k} was {theirs.get(k)!r}, now {mine.get(k)!r}" for k in short)
        raise TrainingError(
            f"The run in {run} differs in {other} and cannot be continued like this{said}. "
            "Use the options and data that it began with, or another folder."
        )


def _completed(saved: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved options with the defaults of those that are missing, nested ones too."""
    whole = {k: v for k, v in defaults.items() if k not in RUNTIME_OPTIONS} | dict(saved)
    for name, inner in defaults.items():
        if isinstance(inner, Mapping) and isinstance(saved.get(name), Mapping):
            whole[name] = {**inner, **saved[name]}
    return whole


class StateStore:
    """The saved states of a run: one folder each, complete or not there, the newest kept.

    A state is written to a temporary folder, synced and renamed to a name that no other has, and
    only then are the others deleted, so that one can be read whenever the process may have died.

    Args:
        run: The run directory.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / STATE_FOLDER

    @contextlib.contextmanager
    def claimed(self, *, resume: bool, make: bool) -> Iterator[None]:
        """Keep the run directory for a run, if it is to be made here, until the body is left.

        Raises:
            TrainingError: If it cannot be made, holds a run that is not to be resumed, or none
                that can be; or if another run has it.
        """
        self._begin(resume=resume, make=make)
        run = self._folder.parent
        with alone(run) if make else contextlib.nullcontext(True) as is_alone:
            if not is_alone:
                raise TrainingError(
                    f"Another run is at work in {run}. Wait until it has ended, or choose another "
                    "folder."
                )
            for left in run.glob(".*.partial") if make else ():
                if _LEFT.fullmatch(left.name):
                    with contextlib.suppress(OSError):  # it is in nobody's way
                        left.unlink()
            yield

    def _begin(self, *, resume: bool, make: bool) -> None:
        run = self._folder.parent
        try:
            if resume and not self.steps():
                raise self._nothing(", and no finished run beside it")
            if not resume and self.holds_run():
                raise TrainingError(
                    f"{run} already holds a run. Continue it with resume=True (command line: "
                    "--resume), or choose another folder."
                )
            if make:
                run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                f"{run} cannot become a run directory: {error}. Choose another."
            ) from error

    def holds_run(self) -> bool:
        """Return whether there is a run, finished or not."""
        return (self._folder.parent / "config.json").exists() or bool(self.steps())

    def finished(self, config: TrainingConfig) -> History | None:
        """Return the history of a run of these options that came to its end, else ``None``.

        Raises:
            ConfigError: If the history cannot be read, and there is no state to go on from.
            TrainingError: If it is none, and there is no state to go on from.
        """
        path = self._folder.parent / HISTORY_NAME
        if not path.exists():
            return None
        try:
            history = History.from_dict(_read_object(path))
        except (CheckpointError, TrainingError):
            if self.steps():  # with which it is written anew
                return None
            raise
        # Runs once did not say that they were finished, but deleted their states then.
        finished = history.finished or (not self.steps() and _is_complete(history, config))
        return history if finished else None

    def steps(self) -> list[int]:
        """Return the steps that have a state, newest first."""
        return [step for step, _, _ in self._saved()]

    def _saved(self) -> list[tuple[int, int, Path]]:
        """Return step, number of the save and folder of each state, newest first."""
        matches = [(_STATE_NAME.fullmatch(p.name), p) for p in self._folder.glob("step-*")]
        saved = [(int(m[1]), int(m[2] or 0), path) for m, path in matches if m]
        return sorted(saved, reverse=True)

    def save(
        self, step: int, tensors: Mapping[str, NDArray[Any]], values: Mapping[str, Any]
    ) -> None:
        """Write the state after a step and then delete the others.

        Raises:
            TrainingError: If it cannot be written; older states are as they were.
        """
        numbers = [number for saved, number, _ in self._saved() if saved == step]
        name = f"step-{step:09d}" + (f"-{numbers[0] + 1}" if numbers else "")
        partial, final = self._folder / ".partial", self._folder / name
        text = json.dumps(values, allow_nan=False)
        # safetensors takes the bytes as they lie in memory, whatever the order of the axes.
        ordered = {key: np.asarray(tensor, order="C") for key, tensor in tensors.items()}
        with saving(f"state of step {step}", self._folder, is_first=not self.steps()):
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir(parents=True)
                _write_tensors(partial / "state.safetensors", ordered)
                write_files(partial, {"state.json": text.encode()})
                partial.replace(final)
            finally:  # there is one only if it was not renamed
                shutil.rmtree(partial, ignore_errors=True)
            sync_folder(self._folder)
        for _, _, other in self._saved():
            if other != final:
                shutil.rmtree(other, ignore_errors=True)

    def load(self) -> tuple[int, dict[str, NDArray[Any]], dict[str, Any]]:
        """Return step, tensors and values of the newest state that can be read.

        Raises:
            TrainingError: If there is none.
        """
        damaged = []
        for step, _, place in self._saved():
            path = place / "state.safetensors"
            try:
                tensors = read_tensors(path.read_bytes(), path)
                return step, tensors, _read_object(place / "state.json")
            except (OSError, CheckpointError) as error:
                damaged.append(str(error))
        raise self._nothing(f": {'; '.join(damaged)}" if damaged else "")

    @contextlib.contextmanager
    def understanding(self) -> Iterator[None]:
        """Turn what a state lacks, or has too much, into a :class:`TrainingError`."""
        try:
            yield
        except (AttributeError, KeyError, TypeError) as error:
            raise TrainingError(
                f"The state in {self._folder} is none of this version: {error!r}. Continue with "
                "the one that wrote it, or train without resume, into a new folder."
            ) from error

    def _nothing(self, why: str) -> TrainingError:
        return TrainingError(
            f"There is no state to resume from in {self._folder}{why}. "
            "Train without resume, into a new folder."
        )

    def clear(self) -> None:
        """Delete all states, which a finished run needs no more."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _write_tensors(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    """Write tensors to the disk from where they lie in memory, without another copy of them all.

    Raises:
        OSError: If they cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _is_complete(history: History, config: TrainingConfig) -> bool:
    """Return whether these are all epochs that a run of these options has."""
    since_best = len(history) - max((r.epoch for r in history if r.is_best), default=0)
    stalled = config.patience is not None and since_best >= config.patience
    return stalled or len(history) >= config.epochs


def _read_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Raises:
        ConfigError: If it cannot be read, or holds something else.
    """
    try:
        content = read_json(path, limit=_MAX_JSON_BYTES)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


@contextlib.contextmanager
def saving(what: str, folder: Path, *, is_first: bool = False) -> Iterator[None]:
    """Turn what the system says of a file that cannot be written into a :class:`TrainingError`.

    Args:
        what: What is written.
        folder: Where to.
        is_first: Whether there is nothing yet that a run could go on from.
    """
    try:
        yield
    except OSError as error:
        then = "train again: there is no state yet" if is_first else "continue with resume=True"
        raise TrainingError(
            f"The {what} cannot be saved in {folder}: {error}. Make room or mend the folder, then "
            f"{then}."
        ) from error


class SignalWatch:
    """Notes SIGINT and SIGTERM while it is entered; a second signal acts as it did before.

    Outside the main thread, where Python allows no handlers, it notes nothing; nor does it take a
    signal from a program that Python is embedded in, to which Python could not give it back.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if (before := signal.getsignal(number)) is not None:
                    self._before[number] = before
                    signal.signal(number, self._note)
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
