"""What can go wrong, and how to install what is missing.

Every error that the library raises on purpose about the world (a file, a folder, weights, a
missing package) is a :class:`ChestXrayError` and also the builtin that a caller would expect::

    ChestXrayError
    ├── ImageError (ValueError)
    │   └── ImageNotFoundError (FileNotFoundError)
    ├── DatasetError (ValueError)
    │   ├── DatasetNotFoundError (FileNotFoundError)
    │   └── SplitError
    ├── DownloadError (OSError)
    │   └── IntegrityError (ValueError)
    ├── ArchiveError (ValueError)
    ├── CheckpointError (ValueError)
    │   ├── CheckpointNotFoundError (FileNotFoundError)
    │   └── ConfigError
    ├── WeightsUnavailableError (OSError)
    ├── ExportError (ValueError)
    ├── ReportError (ValueError)
    ├── TrainingError (ValueError)
    ├── TrainingInterrupted
    ├── ForkedError (RuntimeError)
    ├── ResourceError (RuntimeError)
    └── MissingExtraError (ImportError)

A wrong argument is a plain ``ValueError`` or ``TypeError``.
"""

from __future__ import annotations

import errno
import importlib
import math
import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsFloat, SupportsIndex, cast

#: Too many open files, of the process and of the machine, and no memory.
_RAN_OUT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
#: The same, and no thread, in the errors of the loader, C++ and CUDA, which have no number.
_RAN_OUT_WORDS = (
    *("failed to map segment", "std::bad_alloc", "out of memory", "Cannot allocate memory"),
    *("Failed to allocate memory", "Resource temporarily unavailable", "Too many open files"),
    *("not enough memory", "bad allocation", "CUBLAS_STATUS_ALLOC_FAILED"),
)
#: What to do where a file of this package is not there: it is also left out of a program that was
#: frozen without its data, and cannot be read in a zip archive.
INSTALL_AGAIN = (
    "Install chestxray-covid from its wheel again, not into a zip archive; in a program that "
    "PyInstaller made, add --collect-data chestxray_covid"
)


class ChestXrayError(Exception):
    """Base of all errors that this library raises about files, data, weights and packages."""


class ImageError(ChestXrayError, ValueError):
    """An image cannot be decoded or is not usable; the message names the source and the reason."""


class ImageNotFoundError(ImageError, FileNotFoundError):
    """The image file does not exist or is not a regular file."""


class DatasetError(ChestXrayError, ValueError):
    """A data set is not what it promises: layout, columns, labels, counts."""


class DatasetNotFoundError(DatasetError, FileNotFoundError):
    """There is no data set of the wanted layout at the given place."""


class SplitError(DatasetError):
    """A split is impossible, overlaps, or does not belong to this data set."""


class DownloadError(ChestXrayError, OSError):
    """A download did not finish; what has arrived is kept where it can be resumed."""


class IntegrityError(DownloadError, ValueError):
    """Bytes arrived or lie on disk that are not the published ones."""


class ArchiveError(ChestXrayError, ValueError):
    """An archive is damaged or hostile; nothing of it was unpacked."""


class CheckpointError(ChestXrayError, ValueError):
    """A checkpoint is damaged, or is not one of this library."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint under that name or path."""


class ConfigError(CheckpointError):
    """A ``config.json`` has unknown, missing or impossible values."""


class WeightsUnavailableError(ChestXrayError, OSError):
    """Pretrained weights are neither cached nor to be fetched."""


class ExportError(ChestXrayError, ValueError):
    """An exported or quantised model does not answer as the original does; nothing was written."""


class ReportError(ChestXrayError, ValueError):
    """A saved report cannot be read, or is not one of this version of the library."""


class TrainingError(ChestXrayError, ValueError):
    """Training cannot go on; the last good checkpoint is kept."""


class TrainingWarning(UserWarning):
    """A run can be trained, but hardly as it was meant."""


class TrainingInterrupted(ChestXrayError):  # noqa: N818 - it is no error, like KeyboardInterrupt
    """A signal asked training to stop; the state was saved first.

    Attributes:
        signal_number: The signal that arrived, ``signal.SIGINT`` or ``signal.SIGTERM``.
        run: The run directory, to be continued with ``resume=True``.
    """

    def __init__(self, signal_number: int, run: Path) -> None:
        super().__init__(signal_number, run)
        self.signal_number = signal_number
        self.run = run

    def __str__(self) -> str:
        said = f"Training stopped by signal {self.signal_number}; "
        if not self.run.is_dir():
            return f"{said}its folder was temporary. Pass output=, and it can be continued."
        return (
            f"{said}the state is saved in {self.run}. "
            "Continue with resume=True (command line: --resume)."
        )


class ForkedError(ChestXrayError, RuntimeError):
    """A process was forked from one in which torch had computed, and could wait for ever."""


class ResourceError(ChestXrayError, RuntimeError):
    """Memory, threads or open files have run out; what was to be read may be whole."""


class MissingExtraError(ChestXrayError, ImportError):
    """A package is not installed; the message says how it is, or is taken into a program."""


def check_resources(error: BaseException, name: str, *, loading: bool = False) -> None:
    """Raise if an exception tells of the machine, and not of what was read or computed.

    Args:
        error: What came up.
        name: What could not be done or read, for the message.
        loading: Whether a library was loaded or computed, whose errors have words alone; not for
            what was read from a file, which may say the same words.

    Raises:
        ResourceError: If memory, threads or open files have run out.
    """
    if isinstance(error, ResourceError):
        raise error
    ran_out = isinstance(error, MemoryError) or getattr(error, "errno", None) in _RAN_OUT
    # Nothing but Python's words tells this one from others.
    threads = isinstance(error, RuntimeError) and "start new thread" in str(error)
    if ran_out or threads or (loading and any(words in str(error) for words in _RAN_OUT_WORDS)):
        said = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise ResourceError(
            f"{name}: the machine, or a limit of this process, allows no more memory, threads or "
            f"open files ({said}). Use fewer workers or smaller batches, close what is "
            "open, or raise the limit; then do it again."
        ) from error


def whole_number(name: str, value: SupportsIndex) -> int:
    """Return an argument as a whole number of Python's, also one of NumPy's.

    Raises:
        TypeError: If it is none.
    """
    try:
        return operator.index(_no_switch(value))
    except TypeError as error:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from error


def real_number(name: str, value: SupportsFloat) -> float:
    """Return an argument as a number of Python's, also one of NumPy's, but not text of one.

    A whole number beyond all floating-point ones is infinite.

    Raises:
        TypeError: If it is none.
    """
    try:
        return math.ldexp(_no_switch(value), 0)  # as it is; float() would read text, too
    except OverflowError:
        return math.inf if cast(int, value) > 0 else -math.inf
    except TypeError as error:
        raise TypeError(f"{name} must be a number, got {value!r}") from error


def _no_switch(value: Any) -> Any:
    """Return what is given, which Python would take for 0 or 1 if it were a truth value."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        raise TypeError
    return value


def check_positive(name: str, value: int | None, *, optional: bool = False) -> None:
    """Refuse an argument that counts nothing; if optional, ``None`` is one that was not given.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is not positive.
    """
    if value is None and optional:
        return
    if not whole_number(name, cast(int, value)) > 0:  # which says so of None
        raise ValueError(f"{name} must be positive, got {value}")


def check_function(name: str, given: object, gives: str) -> None:
    """Do nothing if this can be called, or was not given.

    Raises:
        TypeError: If it is something else, for example a folder.
    """
    if given is not None and not callable(given):
        raise TypeError(f"{name} must be a function that returns {gives}, got {given!r}")


def check_kind(given: object, kind: type, origin: str) -> None:
    """Do nothing if this is what a function of that name gives.

    Raises:
        TypeError: If it is something else, for example the path of a saved one.
    """
    if not isinstance(given, kind):
        came = type(given).__name__
        raise TypeError(f"expected {kind.__name__}, as {origin} gives it, got {came}")


def check_kinds(given: Iterable[object], kind: type, origin: str) -> None:
    """Do nothing if each of these is what a function of that name gives.

    Raises:
        TypeError: If one is something else, for example a row of a table, or there is no list.
    """
    if not isinstance(given, Iterable):
        came = type(given).__name__
        raise TypeError(f"expected a list of {kind.__name__}, as {origin} gives it, got {came}")
    for one in given:
        if not isinstance(one, kind):
            check_kind(one, kind, origin)


def text_mapping(name: str, given: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return an argument that maps text to text; nothing, if it was not given.

    Raises:
        TypeError: If it is something else, for example a list, or has numbers for keys.
    """
    if given is None:
        return {}
    texts = isinstance(given, Mapping) and all(
        isinstance(v, str) for kv in given.items() for v in kv
    )
    if not texts:
        raise TypeError(f"{name} must map text to text, such as {{'0': 'normal'}}, got {given!r}")
    return given


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Return ``classes`` as a tuple.

    Raises:
        TypeError: If it is one string, has no order, as a set, or maybe another, as a dict.
        ValueError: If it is empty or names a class twice.
    """
    if isinstance(classes, str | set | frozenset | Mapping) or not isinstance(classes, Iterable):
        kind = {str: "string", frozenset: "set"}.get(type(classes), type(classes).__name__)
        raise TypeError(f"classes must be a sequence of names, got the {kind} {classes!r}")
    if not (names := tuple(classes)) or len(set(names)) != len(names) or not all(names):
        raise ValueError(f"classes must be one or more different names, got {list(names)}")
    return names


def check_dataset(given: object, name: str = "dataset") -> None:
    """Do nothing if this is a data set, as far as its samples and classes tell.

    Raises:
        TypeError: If it is something else, for example a path or a whole split.
    """
    samples = getattr(given, "samples", None)
    first = samples[:1] if isinstance(samples, Sequence) else (None,)
    # A folder of torchvision's has tuples.
    if not (hasattr(given, "classes") and all(hasattr(s, "patient_id") for s in first)):
        raise TypeError(
            f"{name} must be a ChestXrayDataset, got {type(given).__name__}. Open a folder or CSV "
            "with open_dataset(…); of a Split, pass a side, for example split.test."
        )


def check_classifier(given: object) -> None:
    """Do nothing if this can be judged, as far as its classes and ``predict_proba`` tell.

    Raises:
        TypeError: If it is something else, for example the folder of a checkpoint.
    """
    is_one = hasattr(given, "classes") and callable(getattr(given, "predict_proba", None))
    if not is_one or isinstance(given, type):
        came = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        raise TypeError(
            f"classifier must be one, with classes and predict_proba, got {came}. "
            "Load a checkpoint with Classifier.from_pretrained(…)."
        )


def check_network(given: object) -> None:
    """Do nothing if this is a classifier that also shows its pixels and features.

    Raises:
        TypeError: If it is something else, for example one that can only be judged.
    """
    if not (hasattr(given, "config") and hasattr(given, "_compute")):
        check_classifier(given)
        raise TypeError(
            "classifier must be a Classifier, whose pixels and features are looked at, got "
            f"{type(given).__name__}. Load a checkpoint with Classifier.from_pretrained(…); any "
            "other model can be asked with evaluate(…) and audit_shortcuts(…)."
        )


def first_of(names: list[str]) -> str:
    """Return the first three names for a message, and how many more there are.

    >>> first_of(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    shown = ", ".join(names[:3]) or "none"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def require_extra(module: str, extra: str) -> ModuleType:
    """Return an optional module, imported now.

    Args:
        module: Dotted name to import, for example ``"pydicom"``.
        extra: The extra of this package that installs it, for example ``"dicom"``.

    Raises:
        MissingExtraError: If the module cannot be imported, with the pip command that installs it,
            or the option that takes it into a program that is frozen.
        ResourceError: If that is for want of memory.

    >>> require_extra("json", "dicom").__name__
    'json'
    """
    try:
        found = importlib.import_module(module)
        if hasattr(found, "__path__") and getattr(found, "__file__", None) is None:
            # Python imports any folder of the name, say of an exported model, as a package.
            raise ImportError(f"{[*found.__path__]} is a folder without it")
        return found
    except ImportError as error:
        raise missing_package(module, f'"chestxray-covid[{extra}]"', error) from error


def missing_package(module: str, requirement: str, error: ImportError) -> MissingExtraError:
    """Return the error for a module that cannot be imported, with what pip is asked for.

    Raises:
        ResourceError: If that is for want of memory.
    """
    check_resources(error, module, loading=True)
    how = f"Install it with: pip install {requirement}"
    if getattr(sys, "frozen", False):
        how = "Name it to what builds this program, for PyInstaller with --collect-all"
    return MissingExtraError(f"{module} cannot be imported ({error}). {how}")
