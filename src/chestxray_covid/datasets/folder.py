"""Class folders, the interchange CSV, the Hannover collection, and which of all is at a path."""

from __future__ import annotations

import contextlib
import csv
import gc
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from chestxray_covid.datasets.base import (
    DEFAULT_CLASSES,
    IMAGE_SUFFIXES,
    MANIFEST_COLUMNS,
    UNKNOWN_VIEW,
    ChestXrayDataset,
    Sample,
    check_classes,
    existing_folder,
)
from chestxray_covid.datasets.cohen import CohenCovidDataset
from chestxray_covid.datasets.kermany import KermanyPneumoniaDataset, find_layout
from chestxray_covid.datasets.report import summarise
from chestxray_covid.errors import DatasetError, DatasetNotFoundError

#: Folder names of public collections (lower case, letters and digits only) → canonical label.
_FOLDER_LABELS = {
    "normal": "normal",
    "nofinding": "normal",
    "nofindings": "normal",
    "healthy": "normal",
    "pneumonia": "pneumonia",
    "viralpneumonia": "pneumonia",
    "bacterialpneumonia": "pneumonia",
    "covid": "covid19",
    "covid19": "covid19",
}
#: Folders inside a class folder that hold no radiographs.
_NOT_IMAGES = frozenset({"__MACOSX", "masks"})


class FolderDataset(ChestXrayDataset):
    """Radiographs sorted into one folder per class: ``root/<class>/<image>``.

    Args:
        root: Folder of class folders. Files below a class folder count too, except in hidden
            folders, ``__MACOSX`` and ``masks``.
        labels: Folder name → label; ``None`` knows the names that public collections use
            (``No_findings``, ``COVID``, ``Viral Pneumonia``, …) and else takes the name itself.
        patient_id: Regular expression; its first group (or whole match) in the file name is the
            patient. A file that it does not match counts as a patient of its own, which
            ``report()`` notes. ``None``: every file is a patient.
        source: Name of the collection; the folder's name if not given.
        classes: Labels to keep, in order.
        transform: Applied to the PIL image.
        target_transform: Applied to the integer target.

    Raises:
        DatasetNotFoundError: If ``root`` is no folder or has no class folder.
        DatasetError: If a class folder that was asked for has no image, or none was asked for.
        ValueError: If ``patient_id`` is no regular expression.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        labels: Mapping[str, str] | None = None,
        patient_id: str | None = r"^(\d+)_",
        source: str | None = None,
        *,
        classes: Sequence[str] = DEFAULT_CLASSES,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        classes = check_classes(classes)
        folder = existing_folder(root, "a folder with one folder per class")
        source = source or folder.resolve().name
        pattern = _pattern(patient_id)
        found = class_folders(folder, labels)
        if not found:
            raise DatasetNotFoundError(
                f"{folder} has no class folder. Expected {folder}/<class>/<image>"
                + (f" with a class of {sorted(labels)}." if labels else ".")
            )
        samples: list[Sample] = []
        dropped: Counter[str] = Counter()
        notes: Counter[str] = Counter()
        for child, label in found.items():
            for path in _walk(child):
                if path.suffix.lower() not in IMAGE_SUFFIXES:
                    dropped["not an image file name"] += 1
                elif label not in classes:
                    dropped[f"folder outside the classes ({label})"] += 1
                else:
                    patient = _patient(path, folder, pattern)
                    if patient is None:
                        notes["names without a patient number"] += 1
                    samples.append(
                        Sample(
                            path=path,
                            label=label,
                            finding=child.name,
                            patient_id=patient or path.relative_to(folder).as_posix(),
                            source=source,
                        )
                    )
        super().__init__(
            samples,
            classes=classes,
            transform=transform,
            target_transform=target_transform,
            report=summarise(
                samples, classes, source=source, root=folder, dropped=dropped, notes=notes
            ),
        )
        self._promise([c for c in classes if c in found.values()] or classes)


#: Columns of a manifest that are fields of a sample.
_KNOWN = frozenset(MANIFEST_COLUMNS)


class ManifestDataset(ChestXrayDataset):
    """Radiographs listed in a CSV, the interchange format of :meth:`ChestXrayDataset.to_manifest`.

    Columns ``path``, ``label`` and ``patient_id`` are required; ``source`` (else the CSV's name),
    ``view`` and ``finding`` are optional; further columns go to ``sample.metadata``, where equal
    ``image_id`` (of equal ``origin``, else ``source``) or ``content_hash`` mark copies of one
    image. Relative paths
    start at the CSV's folder. Rows without a file or label are dropped and counted.

    Args:
        path: The CSV, UTF-8 with a header; or a folder that holds ``manifest.csv``.
        classes: Labels to keep, in order.
        transform: Applied to the PIL image.
        target_transform: Applied to the integer target.

    Raises:
        DatasetNotFoundError: If the CSV is missing.
        DatasetError: If it cannot be read, lacks a column, or has no usable image of any class.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        classes: Sequence[str] = DEFAULT_CLASSES,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        classes = check_classes(classes)
        table = Path(path).expanduser()
        if table.is_dir():
            table = table / "manifest.csv"
        samples: list[Sample] = []
        dropped: Counter[str] = Counter()
        promised: set[str] = set()
        more: list[str] = []  # columns that go to the metadata, the same in all rows
        folder, name = os.path.join(table.parent, ""), table.stem  # noqa: PTH118 - ends in "/"
        with _nothing_collected():
            for row in _rows(table, required=("path", "label", "patient_id")):
                promised.add(row["label"])
                given = row["path"]
                file = given if os.path.isabs(given) else folder + given  # noqa: PTH117 - fast
                if row["label"] not in classes:
                    dropped[f"label outside the classes ({row['label'] or 'empty'})"] += 1
                elif not row["patient_id"]:
                    dropped["no patient_id"] += 1
                elif not given or not os.path.isfile(file):  # noqa: PTH113 - keeps no copy
                    dropped["image file missing"] += 1
                else:
                    more = more or [k for k in row if k not in _KNOWN]
                    samples.append(_listed(file, row, name, more))
        super().__init__(
            samples,
            classes=classes,
            transform=transform,
            target_transform=target_transform,
            report=summarise(samples, classes, source=table.stem, root=table, dropped=dropped),
        )
        self._promise([c for c in classes if c in promised] or classes)


class HannoverCovidDataset(ChestXrayDataset):
    """Radiographs of the COVID-19 Image Repository of the Hannover Medical School.

    Every patient has COVID-19, so the collection promises ``covid19`` alone.

    Citation: H. B. Winther, H. Laser, S. Gerbel et al.: COVID-19 Image Repository.
    doi:10.25835/0090041, 2020, CC BY 3.0. https://github.com/ml-workgroup/covid-19-image-repository

    Args:
        root: The repository's folder, which holds ``data.csv`` and ``png/``.
        classes: Labels to keep; must hold ``covid19``.
        transform: Applied to the PIL image.
        target_transform: Applied to the integer target.

    Raises:
        DatasetNotFoundError: If ``data.csv`` is missing.
        DatasetError: If it cannot be read or no image is found.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        classes: Sequence[str] = DEFAULT_CLASSES,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        classes = check_classes(classes)
        folder = existing_folder(root, "the folder of covid-19-image-repository")
        required = ("patient_id", "image_id", "projection")
        samples: list[Sample] = []
        dropped: Counter[str] = Counter()
        for row in _rows(folder / "data.csv", required=required):
            path = folder / "png" / f"{row['image_id']}.png"
            if "covid19" not in classes:
                dropped["finding outside the classes (covid19)"] += 1
            elif not row["patient_id"]:
                dropped["no patient_id"] += 1
            elif not os.path.isfile(path):  # noqa: PTH113
                dropped["image file missing"] += 1
            else:
                samples.append(
                    Sample(
                        path=path,
                        label="covid19",
                        finding="COVID-19",
                        patient_id=row["patient_id"],
                        source="hannover",
                        view=row["projection"].upper() or UNKNOWN_VIEW,
                        metadata={**row, "license": "CC BY 3.0"},
                    )
                )
        super().__init__(
            samples,
            classes=classes,
            transform=transform,
            target_transform=target_transform,
            report=summarise(samples, classes, source="hannover", root=folder, dropped=dropped),
        )
        self._promise(["covid19"])


def open_dataset(
    path: str | os.PathLike[str], *, classes: Sequence[str] = DEFAULT_CLASSES
) -> ChestXrayDataset:
    """Return the data set at a path, recognised by its layout.

    Known are the folders of Cohen, Kermany and Hannover, a CSV (or a folder with
    ``manifest.csv``), and class folders, in this order.

    Args:
        path: Folder or CSV.
        classes: Labels to keep, in order.

    Raises:
        DatasetNotFoundError: If nothing known is there.
        DatasetError: If the data set is damaged or lacks a class that it promises.
    """
    place = Path(path).expanduser()
    if place.suffix.lower() == ".csv" or (place / "manifest.csv").is_file():
        return ManifestDataset(place, classes=classes)
    if (place / "metadata.csv").is_file():
        return CohenCovidDataset(place, classes=classes)
    if (place / "data.csv").is_file() and (place / "png").is_dir():
        return HannoverCovidDataset(place, classes=classes)
    if find_layout(place) is not None:
        return KermanyPneumoniaDataset(place, classes=classes)
    if place.is_dir() and class_folders(place, None):
        return FolderDataset(place, classes=classes)
    raise DatasetNotFoundError(
        f"{place} is no data set of a known layout. Expected one of: metadata.csv with images/ "
        "(Cohen), chest_xray/train/NORMAL (Kermany), data.csv with png/ (Hannover), a manifest "
        "CSV, or one folder per class."
    )


def class_folders(root: Path, labels: Mapping[str, str] | None) -> dict[Path, str]:
    """Return class folder → label, in the order of their names; see :class:`FolderDataset`."""
    found = {}
    for child in sorted(p for p in root.iterdir() if p.is_dir()):
        if child.name.startswith(".") or child.name in _NOT_IMAGES:
            continue
        if labels is None:
            key = re.sub(r"[^a-z0-9]", "", child.name.lower())
            found[child] = _FOLDER_LABELS.get(key, child.name)
        elif child.name in labels:
            found[child] = labels[child.name]
    missing = sorted(set(labels or ()) - {child.name for child in found})
    if found and missing:
        raise DatasetNotFoundError(
            f"{root} has no folder {missing}, which labels= names; it has "
            f"{sorted(p.name for p in root.iterdir() if p.is_dir())}. Mend the names."
        )
    return found


def _walk(folder: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in _NOT_IMAGES)
        yield from (Path(here, name) for name in sorted(files) if not name.startswith("."))


def _pattern(expression: str | None) -> re.Pattern[str] | None:
    try:
        return None if expression is None else re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"patient_id must be a regular expression, got {expression!r}: {error}"
        ) from error


def _patient(path: Path, root: Path, pattern: re.Pattern[str] | None) -> str | None:
    if pattern is None:
        return path.relative_to(root).as_posix()
    match = pattern.search(path.name)
    return (match[1] if pattern.groups else match[0]) if match else None


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Keep Python from searching a million new samples for garbage, which is half of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _rows(table: Path, *, required: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV one by one: a million of them would be a gigabyte."""
    if not table.is_file():
        raise DatasetNotFoundError(f"{table} is missing; expected a CSV with columns {required}.")
    row: list[str] = []
    try:
        # surrogateescape: file names need not be UTF-8
        with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file)
            names = [name.strip() for name in next(reader, [])]
            missing = [name for name in required if name not in names]
            if missing:
                raise DatasetError(
                    f"{table} lacks the columns {missing}; it has {names}. "
                    f"Expected a CSV with a header that names {list(required)}."
                )
            for row in filter(None, reader):
                row += [""] * (len(names) - len(row))
                known = dict(zip(names, row, strict=False))
                known.pop("", None)
                yield known
    except (csv.Error, OSError) as error:
        raise DatasetError(f"{table} cannot be read as CSV: {error}.") from error
    if not row:
        raise DatasetError(f"{table} has a header and no rows.")


def _listed(file: str, row: dict[str, str], name: str, more: Iterable[str]) -> Sample:
    """Return a row's sample; text that many rows share is kept once."""
    return Sample(
        path=Path(file),
        label=sys.intern(row["label"]),
        finding=sys.intern(row.get("finding") or row["label"]),
        patient_id=row["patient_id"],
        source=sys.intern(row.get("source") or name),
        view=sys.intern(row.get("view") or UNKNOWN_VIEW),
        metadata={k: row[k] for k in more},
    )
