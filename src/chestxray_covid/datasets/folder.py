"""Class folders, the interchange CSV, the Hannover collection, and which of all is at a path."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from operator import itemgetter
from pathlib import Path
from sys import intern
from typing import Any

from PIL import Image

from chestxray_covid.datasets.base import (
    DEFAULT_CLASSES,
    LABELS,
    MANIFEST_COLUMNS,
    UNKNOWN_VIEW,
    ChestXrayDataset,
    Sample,
)
from chestxray_covid.datasets.cohen import CohenCovidDataset, canonical_view
from chestxray_covid.datasets.kermany import KermanyPneumoniaDataset, find_layout
from chestxray_covid.datasets.labels import label_of_name, promised_classes
from chestxray_covid.datasets.loading import entries, images_of, may_hold_images, why_no_image
from chestxray_covid.datasets.report import summarise
from chestxray_covid.datasets.storage import nothing_collected, read_csv, read_rows, resolver
from chestxray_covid.errors import (
    DatasetError,
    DatasetNotFoundError,
    check_classes,
    text_mapping,
)
from chestxray_covid.files import existing_folder, expanded, file_finder, is_folder, listed_path

#: Folders, in lower case, that divide a collection and hold class folders themselves.
_SPLITS = frozenset({"train", "val", "valid", "validation", "test"})


class FolderDataset(ChestXrayDataset):
    """Radiographs sorted into one folder per class: ``root/<class>/<image>``.

    Where all folders in ``root`` are called ``train``, ``val`` or ``test``, the class folders are
    those inside, and the parts are merged.

    Args:
        root: Folder of class folders. Files below a class folder count too, except in hidden
            folders, ``__MACOSX``, masks (``lung masks/``, ``1_mask.png``) and links to folders.
        labels: Folder name → label; ``None`` knows the names that public collections use
            (``No_findings``, ``COVID``, ``Viral Pneumonia``, …) and else takes the name itself.
        patient_id: Regular expression; its first group (or whole match) in the file name is the
            patient. A file that it does not match counts as a patient of its own, which
            ``report()`` notes. ``None``: every file is a patient.
        source: Name of the collection; the folder's name if not given, or that of the folder
            around ``train``, ``val`` or ``test``. Two data sets of one source share their patients.
        classes: Labels to keep, in order.
        transform: Applied to the PIL image.
        target_transform: Applied to the integer target.

    Raises:
        DatasetNotFoundError: If ``root`` is no folder or has no class folder.
        DatasetError: If a class folder that was asked for has no image, if none was asked for,
            if the name of another looks like a class without images, one cannot be listed, one
            that ``labels`` does not name holds a folder called as another class, or links to
            folders put a file under two labels.
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
        whole = _collection(place := folder.resolve())
        name, part = source or whole.name, place.relative_to(whole)
        pattern = _pattern(patient_id)
        dropped, notes = Counter[str](), Counter[str]()
        found = class_folders(folder, labels, classes, notes)
        if not found:
            raise DatasetNotFoundError(
                f"{folder} has no class folder. Expected {folder}/<class>/<image>"
                + (f" with a class of {sorted(labels)}." if labels else ".")
            )
        samples: list[Sample] = []
        looked_at = folder
        for child, path in images_of(found, dropped, notes):
            if looked_at != (looked_at := path.parent) and child.name not in (labels or ()):
                _refuse_other_class(child, looked_at, found[child], classes)
            if (label := found[child]) not in classes:
                dropped[f"folder outside the classes ({label})"] += 1
                continue
            patient = _patient(path.name, pattern)
            notes["names without a patient number"] += pattern is not None and not patient
            sample = Sample(
                path=path,
                label=label,
                finding=child.name,
                patient_id=patient or (part / path.relative_to(folder)).as_posix(),
                source=name,
            )
            samples.append(sample)
        super().__init__(
            samples,
            classes=classes,
            transform=transform,
            target_transform=target_transform,
            report=summarise(
                samples, classes, source=name, root=folder, dropped=dropped, notes=+notes
            ),
        )
        self._named_after = {} if source else {name: whole}
        self._promise(promised_classes(classes, found.values()))


class ManifestDataset(ChestXrayDataset):
    """Radiographs listed in a CSV, the interchange format of :meth:`ChestXrayDataset.to_manifest`.

    Columns ``path``, ``label`` and ``patient_id`` are required; ``source``, ``view`` and
    ``finding`` are optional; further columns go to ``sample.metadata``, where equal
    ``image_id`` (of equal ``origin``, else ``source``) or ``content_hash`` mark copies of one
    image. Relative paths start at the CSV's folder; blanks around other cells do not count. Rows
    without a file or label are dropped and counted, and so are those that list a file again.

    Args:
        path: The CSV, UTF-8 with a header; or a folder that holds ``manifest.csv``.
        labels: Label as the CSV writes it → label, before the names that :class:`FolderDataset`
            knows (``COVID-19``, ``No finding``, …), which are understood here, too.
        source: Name of the collection where a row names none; the CSV's name if not given, for
            ``manifest.csv`` that of its folder, for ``test`` and its like of the one around it.
        classes: Labels to keep, in order.
        transform: Applied to the PIL image.
        target_transform: Applied to the integer target.

    Raises:
        DatasetNotFoundError: If the CSV is missing.
        DatasetError: If it cannot be read, lacks a column, has no usable image of any class, or
            lists a file under two labels or patients.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        labels: Mapping[str, str] | None = None,
        source: str | None = None,
        *,
        classes: Sequence[str] = DEFAULT_CLASSES,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        classes, known = check_classes(classes), text_mapping("labels", labels)
        table = expanded(path)
        if is_folder(table):
            table = table / "manifest.csv"
        own = "" if table.name == "manifest.csv" else table.name
        place = _collection(table.parent.resolve() / own)
        name = source or (place.stem if place.name == own else place.name)
        listed: dict[str, Sample] = {}
        unused: list[tuple[str, tuple[str, str, str]]] = []  # what other rows say of a file
        resolved, is_there = resolver(), file_finder()
        dropped: Counter[str] = Counter()
        meant: dict[str, str] = {}
        unnamed = False
        folder = listed_path(os.path.join(table.parent, ""))  # noqa: PTH118 - ends in "/"
        columns = read_rows(table, required=("path", "label", "patient_id"))
        with nothing_collected(), closing(columns) as rows:
            names = next(rows)
            cells_of = itemgetter(*(names.index(c) if c in names else -1 for c in MANIFEST_COLUMNS))
            more = [(n, i) for i, n in enumerate(names) if n and n not in MANIFEST_COLUMNS]
            given: str
            for row in rows:
                given, said, finding, patient, site, view = cells_of(row)
                if (label := meant.get(said)) is None:
                    label = meant[said] = label_of_name(said, known, classes)
                file = given if os.path.isabs(given) else folder + given  # noqa: PTH117 - fast
                if label not in classes:
                    dropped[f"label outside the classes ({label or 'empty'})"] += 1
                elif not patient:
                    dropped["no patient_id"] += 1
                elif not given or not is_there(file):
                    is_of_windows = "\\" in given and os.sep == "/"
                    dropped["image file missing" + r" (its path has \ for /)" * is_of_windows] += 1
                else:
                    unnamed = unnamed or not site
                    sample = Sample(
                        path=file,  # type: ignore[arg-type] # made a Path when asked for
                        label=label,
                        finding=intern(finding or said),
                        patient_id=patient,
                        source=intern(site or name),
                        view=intern(canonical_view(view, view)),
                        metadata={n: row[i] for n, i in more},
                    )
                    _add(sample, listed, resolved(file), dropped, table)
                    continue
                if label and "\0" not in given:
                    unused.append((resolved(file), (label, patient, site or name)))
        for where, other in unused:
            if where in listed and listed[where].label != other[0]:
                _refuse_contradiction(table, listed[where], other)
        samples = tuple(listed.values())
        super().__init__(
            samples,
            classes=classes,
            transform=transform,
            target_transform=target_transform,
            report=summarise(samples, classes, source=name, root=table, dropped=dropped),
        )
        self._named_after = {name: place} if unnamed and not source else {}
        self._promise(promised_classes(classes, meant.values()))


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
        DatasetError: If it cannot be read, lists a file under two patients, or no image is found.
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
        listed, dropped = dict[str, Sample](), Counter[str]()
        for row in read_csv(table := folder / "data.csv", required=required):
            path = folder / "png" / f"{row['image_id']}.png"
            if "covid19" not in classes:
                dropped["finding outside the classes (covid19)"] += 1
            elif not row["patient_id"]:
                dropped["no patient_id"] += 1
            elif not os.path.isfile(path):  # noqa: PTH113
                dropped["image file missing"] += 1
            else:
                sample = Sample(
                    path=path,
                    label="covid19",
                    finding="COVID-19",
                    patient_id=row["patient_id"],
                    source="hannover",
                    view=row["projection"].upper() or UNKNOWN_VIEW,
                    metadata={**row, "license": "CC BY 3.0"},
                )
                _add(sample, listed, row["image_id"], dropped, table)
        samples = tuple(listed.values())
        super().__init__(
            samples,
            classes=classes,
            transform=transform,
            target_transform=target_transform,
            report=summarise(samples, classes, source="hannover", root=folder, dropped=dropped),
        )
        self._named_after = {"hannover": Path("HannoverCovidDataset")}
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
    place = expanded(path)
    holds = {entry.name for entry in entries(place)} if is_folder(place) else set()
    if place.suffix.lower() == ".csv" or "manifest.csv" in holds:
        return ManifestDataset(place, classes=classes)
    if "metadata.csv" in holds:
        return CohenCovidDataset(place, classes=classes)
    if {"data.csv", "png"} <= holds:
        return HannoverCovidDataset(place, classes=classes)
    if holds and find_layout(place) is not None:
        return KermanyPneumoniaDataset(place, classes=classes)
    if holds and class_folders(place, None):
        return FolderDataset(place, classes=classes)
    raise DatasetNotFoundError(
        f"{place} is no data set of a known layout. Expected one of: metadata.csv with images/ "
        "(Cohen), chest_xray/train/NORMAL (Kermany), data.csv with png/ (Hannover), a manifest "
        "CSV, or one folder per class."
    )


def class_folders(
    root: Path,
    labels: Mapping[str, str] | None,
    classes: Sequence[str] = (),
    notes: Counter[str] | None = None,
) -> dict[Path, str]:
    """Return class folder → label, in the order of their names; see :class:`FolderDataset`."""
    passed_over = Counter[str]() if notes is None else notes
    meant = text_mapping("labels", labels)
    inside = _folders(root, meant, passed_over)
    if inside and all(f.name.lower() in _SPLITS and f.name not in meant for f in inside):
        inside = [f for part in inside for f in _folders(part, meant, passed_over)]
    named = [f for f in inside if labels is None or f.name in labels]
    found = {f: label_of_name(f.name, meant, classes) for f in named}
    if found and (missing := sorted(set(meant) - {f.name for f in found})):
        raise DatasetNotFoundError(
            f"{root} has no folder {missing}, which labels= names; it has "
            f"{sorted({f.name for f in inside})}. Mend the names."
        )
    return found


def _refuse_other_class(child: Path, inside: Path, label: str, classes: Sequence[str]) -> None:
    """Raise if a folder on the way from a class folder to images is called as another class."""
    # A class of the user's own, such as abnormal, may hold any of the canonical ones.
    known = {*classes, *(LABELS if label in LABELS else ())}
    for name in inside.relative_to(child).parts if label in known else ():
        other = label_of_name(name, {}, classes)
        if other in known - {label}:
            raise DatasetError(
                f"{inside} is in {child}, which means {label!r}, but {name!r} means {other!r}. "
                "Pass the folder that holds the class folders, move it, or say with "
                f"labels={{{child.name!r}: {label!r}, …}} that all in there is {label!r}."
            )


def _folders(root: Path, labels: Mapping[str, str], notes: Counter[str]) -> list[Path]:
    found = entries(root)
    inside = [entry for entry in found if is_folder(entry.path)]
    notes["images in no class folder, not read"] += sum(not why_no_image(e) for e in found)
    return [Path(e.path) for e in inside if e.name in labels or may_hold_images(e.name, notes)]


def _collection(place: Path) -> Path:
    """Return what a source is named after: of a part such as ``test``, the folder around it."""
    is_part = place.name.lower().removesuffix(".csv") in _SPLITS and place.parent.name
    return place.parent if is_part else place


def _pattern(expression: str | None) -> re.Pattern[str] | None:
    try:
        return None if expression is None else re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"patient_id must be a regular expression, got {expression!r}: {error}"
        ) from error


def _patient(name: str, pattern: re.Pattern[str] | None) -> str | None:
    match = pattern.search(name) if pattern else None
    return (match[1] if match.re.groups else match[0]) if match else None


def _add(
    sample: Sample, listed: dict[str, Sample], place: str, dropped: Counter[str], table: Path
) -> None:
    """Take a sample, unless its file is listed already, which is counted."""
    first = listed.setdefault(place, sample)
    if first is not sample:
        _refuse_contradiction(table, first, (sample.label, sample.patient_id, sample.source))
        dropped["file listed twice"] += 1


def _refuse_contradiction(table: Path, first: Sample, other: tuple[str, str, str]) -> None:
    if (known := (first.label, first.patient_id, first.source)) != other:
        raise DatasetError(
            f"{table} lists {first.path} twice, with (label, patient_id, source) {known} and "
            f"{other}. Keep one row per file."
        )
