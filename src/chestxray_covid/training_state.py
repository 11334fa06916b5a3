"""The state between two steps, and signals: what exact resuming needs."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.datasets.base import ChestXrayDataset
from chestxray_covid.errors import CheckpointError, TrainingError
from chestxray_covid.files import read_json, sync_folder, write_files
from chestxray_covid.tensors import read_tensors

if TYPE_CHECKING:  # it imports torch, which nothing here needs
    from chestxray_covid.training_config import TrainingConfig

STATE_FOLDER = "state"
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

    An option that a run does not name did not exist when it began, and counts as its default.

    Raises:
        TrainingError: If something differs, with its name.
    """
    from chestxray_covid.training_config import TrainingConfig

    theirs = _completed(theirs, TrainingConfig().to_dict())
    other = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
    if other:
        raise TrainingError(
            f"The run in {run} differs in {other} and cannot be continued like this. "
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

    A state is written to a temporary folder, synced and renamed, and only then are older ones
    deleted, so that one can be read whenever the process may have died.

    Args:
        run: The run directory.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / STATE_FOLDER

    def claim(self, *, resume: bool, make: bool) -> None:
        """Make the run directory if it is to be made here.

        Raises:
            TrainingError: If it cannot be made, or holds a run that is not to be resumed.
        """
        run = self._folder.parent
        try:
            if make:
                run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                f"{run} cannot become a run directory: {error}. Choose another."
            ) from error
        if ((run / "config.json").exists() or self.steps()) and not resume:
            raise TrainingError(
                f"{run} already holds a run. Continue it with resume=True (command line: "
                "--resume), or choose another folder."
            )

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
