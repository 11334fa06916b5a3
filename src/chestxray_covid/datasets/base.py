"""Samples with provenance, and the data set that all sources share.

No torch here: ``__len__`` and ``__getitem__`` are all that its ``DataLoader`` asks of a data set.
"""

from __future__ import annotations

import hashlib
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

import numpy as np
from PIL import Image

from chestxray_covid.datasets.origins import CONTRADICTS, counted_to_origins
from chestxray_covid.datasets.report import DatasetReport, identity, printable, summarise_taken
from chestxray_covid.datasets.storage import cell_text, resolver, write_csv, writing_to
from chestxray_covid.errors import (
    DatasetError,
    check_classes,
    check_kinds,
    check_positive,
)
from chestxray_covid.files import expanded, expanded_copy, once_expanded
from chestxray_covid.image import load_image

if TYPE_CHECKING:  # to type checkers it is a data set of torch, which is not imported here
    import pandas as pd
    from torch.utils.data import Dataset

    _Base = Dataset[tuple[Any, Any]]
else:
    _Base = object

#: Canonical labels, in canonical order. ``pneumonia`` is any pneumonia other than COVID-19.
LABELS = ("normal", "pneumonia", "covid19")
#: What a data set keeps unless told otherwise: the binary question of the field.
DEFAULT_CLASSES = ("normal", "covid19")
#: Canonical names of frontal projections.
FRONTAL_VIEWS = ("PA", "AP", "AP Supine", "AP Erect", "AP Semi Erect")
#: Canonical view of a radiograph whose projection nobody wrote down.
UNKNOWN_VIEW = "unknown"
#: Columns of the interchange CSV that every data set writes and :class:`ManifestDataset` reads.
MANIFEST_COLUMNS = ("path", "label", "finding", "patient_id", "source", "view")
#: Metadata in the CSV, too: who or what is the same across collections, and of which subgroup.
KEPT_COLUMNS = ("origin", "image_id", "numbered_by", "content_hash", "sex", "age")
#: Text that begins so is not yet the path that is meant: it is empty, or in a home folder.
_NO_PATH = ("", "~")


def read_file(sample: Sample, min_size: tuple[int, int] | None = None) -> Image.Image:
    """Return the radiograph that a sample's path names, see :func:`image.load_image`."""
    return load_image(sample.path, min_size=min_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One radiograph with its label and where it comes from.

    Attributes:
        path: Image file (``~`` is the home folder); for a phantom, a name that identifies it.
        label: Canonical label, one of :data:`LABELS` or a label of the user's own.
        finding: What the source itself says, for example ``"Pneumonia/Viral/SARS"``.
        patient_id: Patient as the source numbers them, unique only within it; ``12.0`` is ``12``.
        source: Collection that the radiograph comes from, for example ``"cohen"``.
        view: Projection, ``"PA"``, ``"AP"``, ``"AP Supine"``, ``"L"``, …, or ``"unknown"``.
        metadata: Everything else the source says, as text; a gap of a table says nothing.
            ``origin`` and ``image_id`` identify the image in the collection that it was taken over
            from; ``content_hash`` its content, so that copies are known without reading them;
            ``numbered_by`` is the collection that ``patient_id`` is a number of, if not ``source``;
            ``sex`` and ``age`` (years, or as in DICOM) are the patient's.
        read: How the pixels come about; ``read_file`` unless the sample is a phantom.

    Raises:
        TypeError: If ``path`` is none, or ``patient_id`` or ``source`` no text (a whole number
            becomes it) or empty, as a gap.
    """

    path: Path
    label: str
    finding: str
    patient_id: str
    source: str
    view: str = UNKNOWN_VIEW
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    read: Callable[[Sample, tuple[int, int] | None], Image.Image] = field(
        default=read_file, repr=False
    )

    def __post_init__(self) -> None:
        given = kept_path(self)
        is_path = type(given) is str or isinstance(given, Path)
        if not is_path or str(given)[:1] in _NO_PATH:
            object.__setattr__(self, "path", expanded_copy(given))  # which refuses a gap
        for name, value in (("patient_id", self.patient_id), ("source", self.source)):
            if type(value) is not str or not value.strip():  # 12 and "12" are one patient
                if not (isinstance(value, str | int | np.integer) and str(value).strip()):
                    raise TypeError(f"{name} of {self.path} must be text, got {value!r}")
                object.__setattr__(self, name, str(value))
        if {type(self.view), type(self.finding), *map(type, self.metadata.values())} != {str}:
            for name in ("view", "finding"):
                object.__setattr__(self, name, cell_text(getattr(self, name)))
            about = {name: cell_text(value) for name, value in self.metadata.items()}
            object.__setattr__(self, "metadata", about)
        if not self.view:
            object.__setattr__(self, "view", UNKNOWN_VIEW)

    @property
    def is_file(self) -> bool:
        """Whether the pixels come from ``path`` on disk (a phantom's do not)."""
        return self.read is read_file

    @property
    def is_frontal(self) -> bool:
        """Whether the view is known to be frontal."""
        return self.view in FRONTAL_VIEWS

    def content_hash(self) -> str:
        """Return 32 hex digits (BLAKE2b-128) of the file's bytes, or of a phantom's recipe.

        Raises:
            DatasetError: If the file cannot be read.
        """
        content = repr((str(self.path), sorted(self.metadata.items()))).encode()
        try:
            if self.is_file:
                if not self.path.is_file():  # opening a named pipe would wait for a writer
                    raise FileNotFoundError("no regular file is there")
                content = self.path.read_bytes()
        except OSError as error:
            raise DatasetError(f"{self.path} cannot be read: {error}") from error
        return hashlib.blake2b(content, digest_size=16).hexdigest()


_slot: Any = Sample.__dict__["path"]
#: A sample's path, text as long as nobody asked for more.
kept_path: Callable[[Sample], str | Path] = _slot.__get__


def _path(sample: Sample) -> Path:
    """Image file; for a phantom, a name that identifies it."""
    path = kept_path(sample)
    if isinstance(path, str):
        _slot.__set__(sample, path := once_expanded(Path(path)))
    return path


# Kept as text until it is asked for: a million of them take seconds to make.
Sample.path = property(_path, _slot.__set__)  # type: ignore[assignment, misc]


class ChestXrayDataset(_Base):
    """Radiographs with labels and provenance; ``dataset[i]`` is ``(PIL image mode L, int)``.

    Parts and sums share the samples and copy no pixels; all of them can be sent to other processes.

    Args:
        samples: The samples, in order; ``dataset.samples[i]`` is the same item as ``dataset[i]``.
        classes: Labels in the order of their integer targets.
        transform: Applied to the PIL image, also to train and judge; no checkpoint knows of it.
        target_transform: Applied to the integer target.
        report: What was dropped on the way; made from the samples if not given.

    Raises:
        DatasetError, TypeError: If a label is not in ``classes``, or something is no ``Sample``.
    """

    def __init__(
        self,
        samples: Iterable[Sample],
        *,
        classes: Sequence[str],
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        report: DatasetReport | None = None,
    ) -> None:
        self.samples: tuple[Sample, ...] = tuple(samples)
        check_kinds(self.samples, Sample, "Sample(path=…, label=…, …) for each row of a table")
        self.classes = check_classes(classes)
        self.class_to_idx: dict[str, int] = {name: i for i, name in enumerate(self.classes)}
        self.transform = transform
        self.target_transform = target_transform
        self._report = report
        #: Reports of the data sets that the samples were taken from, if from any.
        self._wholes: tuple[DatasetReport, ...] = ()
        #: Sources that nobody named → the resolved folder or CSV, or class, they are named after.
        self._named_after: Mapping[str, Path] = {}
        if odd := {s.label for s in self.samples} - set(self.classes):
            raise DatasetError(
                f"Labels {sorted(odd, key=str)} are not among the classes {list(self.classes)}. "
                "Pass classes= with all labels, or map labels to canonical ones."
            )
        self.targets: list[int] = [self.class_to_idx[s.label] for s in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: SupportsIndex) -> tuple[Any, Any]:
        position, change = operator.index(index), self.target_transform
        target = self.targets[position]
        return self.image(position), target if change is None else change(target)

    if TYPE_CHECKING:  # Python iterates by position, which type checkers do not know

        def __iter__(self) -> Iterator[tuple[Any, Any]]: ...

    def __add__(self, other: ChestXrayDataset) -> ChestXrayDataset:  # type: ignore[override]
        return concatenate([self, other])

    def __repr__(self) -> str:
        counts = Counter(s.label for s in self.samples)
        parts = ", ".join(f"{name}: {counts[name]}" for name in self.classes)
        where = printable(", ".join(self.sources)) or "empty"
        return f"<{type(self).__name__} of {len(self)} radiographs ({parts}) from {where}>"

    def image(self, index: int, min_size: tuple[int, int] | None = None) -> Any:
        """Return one radiograph, transformed where a transform was given.

        Args:
            index: Position of the sample.
            min_size: ``(width, height)`` in pixels below which the image need not be decoded;
                ignored with a transform, which may depend on the full resolution.

        Raises:
            ImageError: If the file cannot be decoded.
        """
        sample, apply = self.samples[index], self.transform
        return sample.read(sample, min_size) if apply is None else apply(sample.read(sample, None))

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the collections in this data set, sorted."""
        return tuple(sorted({s.source for s in self.samples}))

    @cached_property
    def metadata(self) -> pd.DataFrame:
        """One row per sample, in order, with the sample's fields and its source's own columns."""
        import pandas as pd

        rows = [
            {**s.metadata, **{n: getattr(s, n) for n in MANIFEST_COLUMNS}, "path": str(s.path)}
            for s in self.samples
        ]
        # Objects: pandas' own text cannot hold a name that is not UTF-8.
        frame = pd.DataFrame(rows, columns=None if rows else list(MANIFEST_COLUMNS), dtype=object)
        return frame[[*MANIFEST_COLUMNS, *(c for c in frame if c not in MANIFEST_COLUMNS)]]

    def report(self) -> DatasetReport:
        """Return what was found, kept and dropped, and why; of a part, also what is not in it."""
        if self._report is None:
            self._report = summarise_taken(self.samples, self.classes, self._wholes)
        return self._report

    def subset(self, indices: Iterable[SupportsIndex]) -> ChestXrayDataset:
        """Return the samples at these positions, in that order.

        Raises:
            IndexError: If a position is outside the data set.
            TypeError: If a position is no whole number, as in a mask.
        """
        return self._with(self.samples[i] for i in _positions(indices))

    def filter(self, keep: Callable[[Sample], bool]) -> ChestXrayDataset:
        """Return the samples for which ``keep(sample)`` is true."""
        return self._with(s for s in self.samples if keep(s))

    def limit(self, per_class: int, *, seed: int = 0) -> ChestXrayDataset:
        """Return at most ``per_class`` random samples of each class, in their original order.

        Raises:
            TypeError, ValueError: If ``per_class`` is no positive whole number.
        """
        check_positive("per_class", per_class)
        order = np.random.default_rng(seed).permutation(len(self))
        dealt = np.array(self.targets)[order]
        kept = [i for t in range(len(self.classes)) for i in order[dealt == t][:per_class]]
        return self.subset(sorted(kept))

    def to_manifest(self, path: str | os.PathLike[str]) -> Path:
        """Write the data set as the interchange CSV and return its path.

        Paths of images below the CSV's folder are written relative to it, others absolute; of the
        metadata, who or what is the same, sex and age. It appears complete or not at all.

        Raises:
            DatasetError: If a sample is a phantom that lies in no file, or it cannot be written.
            ValueError: If a device or a pipe is there.
        """
        if phantoms := [s for s in self.samples if not s.is_file]:
            raise DatasetError(
                f"{phantoms[0].path} is a phantom without a file. "
                "Write the phantoms first: SyntheticChestXray.save(folder)."
            )
        with writing_to(target := expanded(path), DatasetError):
            self._write_manifest(target)
        return target

    def _write_manifest(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = target.parent.resolve()
        kept = [n for n in KEPT_COLUMNS if any(s.metadata.get(n) for s in self.samples)]
        resolved = resolver()

        def row(s: Sample) -> list[str]:
            full = Path(resolved(kept_path(s)))
            where = full.relative_to(folder) if full.is_relative_to(folder) else full
            known = [where.as_posix(), s.label, s.finding, s.patient_id, s.source, s.view]
            return [*known, *(s.metadata.get(n, "") for n in kept)]

        write_csv(target, [*MANIFEST_COLUMNS, *kept], map(row, self.samples))

    def _with(self, samples: Iterable[Sample], classes: Sequence[str] = ()) -> ChestXrayDataset:
        other = ChestXrayDataset(samples, classes=classes or self.classes, transform=self.transform)
        other.target_transform = self.target_transform
        other._named_after, other._wholes = self._named_after, self._wholes or (self.report(),)
        return other

    def _promise(self, promised: Iterable[str]) -> Self:
        """Return self, or raise if a class that this source can contain has no sample."""
        present = {s.label for s in self.samples}
        if missing := [name for name in promised if name not in present]:
            raise DatasetError(
                f"No usable image of {missing} where the data set promises it. "
                f"What was found:\n{self.report()}\n"
                "Check the folder, give labels=, or ask for other classes=, views= or modalities=."
            )
        return self


def concatenate(datasets: Iterable[ChestXrayDataset]) -> ChestXrayDataset:
    """Return one data set with the samples of all, at least one; no pixels are copied.

    Classes are in canonical order where not all have the same. A sample whose source took it over
    from a collection that is present too (``origin`` in its metadata) is counted to that one, and
    dropped, as ``report()`` counts, if that one gives the image another label, or has no such image
    and gives all of the patient's own another.

    Raises:
        TypeError: If one is something else, for example a path.
        ValueError: If there is nothing to concatenate or the transforms differ.
        DatasetError: If a file is in two of them, or two others are named alike by default.
    """
    if isinstance(datasets, Iterator):
        datasets = tuple(datasets)  # it can be gone through once
    check_kinds(datasets, ChestXrayDataset, "open_dataset(…)")
    if not (datasets := tuple(datasets)):
        raise ValueError("concatenate needs at least one data set")
    pairs = [(d.transform, d.target_transform) for d in datasets]
    if any(pair != pairs[0] for pair in pairs):
        raise ValueError(
            "Data sets with different transforms cannot be concatenated; "
            "give all of them the same transform objects."
        )
    names = dict.fromkeys(name for d in datasets for name in d.classes)
    classes = [*(name for name in LABELS if name in names), *(n for n in names if n not in LABELS)]
    samples = counted_to_origins(s for d in datasets for s in d.samples)
    whole = datasets[0]._with(samples, classes if len({d.classes for d in datasets}) > 1 else ())
    whole._named_after = told_apart(datasets)
    reports = [r for d in datasets for r in d._wholes or (d.report(),)]
    if less := sum(map(len, datasets)) - len(samples):  # which one of the parts has kept
        about: dict[str, Any] = {"source": reports[0].source, "root": "", "found": 0, "kept": -less}
        reports.append(DatasetReport(**about, dropped={CONTRADICTS: less}, images={}, patients={}))
    whole._wholes = tuple({id(r): r for r in reports}.values())  # parts of one data set share it
    return whole


def told_apart(datasets: Iterable[ChestXrayDataset], *, share: bool = False) -> dict[str, Path]:
    """Return what sources that nobody named are named after; raise if two are, or share a file."""
    named: dict[str, Path] = {}
    files: set[str] = set()
    resolved = resolver()
    for d in datasets:
        for name, root in d._named_after.items():
            if (other := named.setdefault(identity(name), root)) != root:
                raise DatasetError(
                    f"{printable(f'{other} and {root}')} are both called {name!r} by default, so "
                    "their patients would be taken for the same. Name them with source=, rename a "
                    "folder, or list the images in a CSV with a column source."
                )
        own = {resolved(kept_path(s)) for s in d.samples if s.is_file and not share}
        if again := files & own:
            raise DatasetError(f"{printable(min(again))} is in two data sets; add each only once.")
        files |= own
    return named


def _positions(indices: Iterable[SupportsIndex]) -> Iterator[int]:
    is_mask = "bool" in str(getattr(indices, "dtype", ""))
    for index in indices:
        if is_mask or isinstance(index, bool | np.bool_):  # which Python takes for 0 and 1
            raise TypeError("subset takes positions, got a bool; use np.flatnonzero(mask)")
        yield operator.index(index)
