"""Cohen's COVID-19 image data collection, in all generations of its metadata."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from chestxray_covid.datasets.base import (
    DEFAULT_CLASSES,
    FRONTAL_VIEWS,
    UNKNOWN_VIEW,
    ChestXrayDataset,
    Sample,
)
from chestxray_covid.datasets.download import download_cohen, recorded_commit
from chestxray_covid.datasets.loading import entries
from chestxray_covid.datasets.report import summarise
from chestxray_covid.datasets.storage import numbered_rows, refuse_repeated
from chestxray_covid.errors import (
    DatasetError,
    DatasetNotFoundError,
    check_classes,
    text_mapping,
)
from chestxray_covid.files import existing_folder, expanded, is_folder

#: Views as the metadata spells them (lower case) → canonical view.
_VIEWS = {
    "pa": "PA",
    "ap": "AP",
    "aps": "AP Supine",
    "ap supine": "AP Supine",
    "ap erect": "AP Erect",
    "ap semi erect": "AP Semi Erect",
    "l": "L",
    "axial": "Axial",
    "coronal": "Coronal",
}
_CANONICAL = {*_VIEWS.values(), UNKNOWN_VIEW}
#: Leaves of the flat, older taxonomy that are pneumonias; the newer one says ``Pneumonia/…``.
_PNEUMONIAS = frozenset(
    {
        *("pneumonia", "bacterial", "viral", "fungal", "lipoid", "aspiration"),
        *("streptococcus", "staphylococcus", "mrsa", "klebsiella", "legionella", "e.coli"),
        *("mycoplasma", "mycoplasma bacterial pneumonia", "chlamydophila", "nocardia"),
        *("sars", "mers", "mers-cov", "influenza", "h1n1", "varicella", "herpes"),
        *("pneumocystis", "aspergillosis"),
    }
)
#: Findings that say nobody knows (yet).
_UNCERTAIN = frozenset({"", "todo", "unknown", "?"})
_REQUIRED = ("patientid", "finding", "view", "modality", "filename")
_HANNOVER_URL = "covid-19-image-repository"


class CohenCovidDataset(ChestXrayDataset):
    """Radiographs of the COVID-19 image data collection of Cohen et al.

    Rows come from ``metadata.csv``, never from the folder, which also holds CT slices, lateral
    views and files that belong to no row. Rows that name one file twice under two patient
    numbers become one sample, and the two numbers one patient; a file whose rows have findings of
    two labels is left out. ``sample.metadata`` holds the
    row (``license``, ``sex``, ``age``, ``offset``, ``location``, …), ``lung_mask`` where a mask is
    annotated (see :func:`lung_mask`), and, for radiographs that were taken over from the Hannover
    collection, ``origin`` and ``image_id``.

    Citation: J. P. Cohen, P. Morrison, L. Dao, K. Roth, T. Q. Duong, M. Ghassemi: COVID-19 Image
    Data Collection: Prospective Predictions Are the Future. arXiv:2006.11988, 2020.
    https://github.com/ieee8023/covid-chestxray-dataset. Licences differ by image.

    Args:
        root: The repository's folder, which holds ``metadata.csv`` and ``images/``.
        classes: Labels to keep, of ``normal``, ``pneumonia`` and ``covid19``.
        views: Canonical views to keep; ``None`` keeps all.
        modalities: Modalities to keep, ``"X-ray"`` or ``"CT"``; ``None`` keeps all.
        findings: Findings, as the source writes them → label, before the built-in taxonomy.
        transform: Applied to the PIL image.
        target_transform: Applied to the integer target.
        download: Fetch what is missing from GitHub first, see :func:`download_cohen`.

    Raises:
        DatasetNotFoundError: If the folder or ``metadata.csv`` is missing.
        DatasetError: If the metadata cannot be read, a folder cannot be listed, or a class has no
            usable image.
        TypeError: If ``views`` or ``modalities`` is a single string.
        ValueError: If a view is unknown.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        classes: Sequence[str] = DEFAULT_CLASSES,
        views: Sequence[str] | None = FRONTAL_VIEWS,
        modalities: Sequence[str] | None = ("X-ray",),
        findings: Mapping[str, str] | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        download: bool = False,
    ) -> None:
        for name, wanted in (("views", views), ("modalities", modalities)):
            if isinstance(wanted, str):
                raise TypeError(f"{name} must be a sequence of names, got the string {wanted!r}")
        views, modalities = (None if w is None else tuple(w) for w in (views, modalities))
        if views is not None and (strange := sorted(set(views) - _CANONICAL)):
            raise ValueError(f"Unknown views {strange}. Valid are {sorted(_CANONICAL)}")
        if download:
            _download(expanded(root), views, modalities)
        classes = check_classes(classes)
        folder = existing_folder(root, "the folder of covid-chestxray-dataset")
        rows = read_metadata(folder / "metadata.csv")
        images = entries(_images(folder))
        files = {e.name for e in images if os.path.isfile(e.path)}  # noqa: PTH113 - links may loop
        masks = _mask_names(folder)
        patients = _patient_aliases(rows)
        own = text_mapping("findings", findings)
        own_labels = {key.strip().lower(): value for key, value in own.items()}
        labels = [_label(row, own_labels) for row in rows]
        doubtful = _contradicted(rows, labels)
        samples: list[Sample] = []
        dropped: Counter[str] = Counter()
        seen: set[str] = set()
        for row, label in zip(rows, labels, strict=True):
            reason = _why_drop(row, files, seen, views, modalities)
            if label is None or reason:
                dropped[reason or "finding uncertain or not given"] += 1
            elif row["filename"] in doubtful:
                dropped["findings of one file contradict each other"] += 1
            elif label not in classes:
                dropped[f"finding outside the classes ({label})"] += 1
            else:
                seen.add(row["filename"])
                samples.append(_sample(folder, row, label, patients, masks))
        super().__init__(
            samples,
            classes=classes,
            transform=transform,
            target_transform=target_transform,
            report=summarise(
                samples,
                classes,
                source="cohen",
                root=folder,
                dropped=dropped,
                notes={"files without a metadata row": len(files - {r["filename"] for r in rows})},
            ),
        )
        self._named_after = {"cohen": Path("CohenCovidDataset")}
        self._promise(classes)


def _download(root: Path, views: Sequence[str] | None, modalities: Sequence[str] | None) -> None:
    """Fetch the images that are asked for, of the commit that is there already if one is."""

    def include(row: Mapping[str, str]) -> bool:
        wanted = views is None or canonical_view(row.get("view", "")) in views
        return wanted and (modalities is None or row.get("modality", "").strip() in modalities)

    download_cohen(root, ref=recorded_commit(root) or "master", include=include)


def label_of_finding(finding: str) -> str | None:
    """Return the canonical label of a finding, ``"other"``, or ``None`` if it is uncertain.

    The flat findings of the earlier metadata and the hierarchical ones of the later are both
    understood. The whole last part is compared, so that a suspicion is not taken for COVID-19.

    >>> label_of_finding("COVID-19, ARDS"), label_of_finding("Pneumonia/Viral/COVID-19")
    ('covid19', 'covid19')
    >>> label_of_finding("SARS"), label_of_finding("Pneumonia/Viral/Herpes ")
    ('pneumonia', 'pneumonia')
    >>> label_of_finding("No Finding"), label_of_finding("ARDS")
    ('normal', 'other')
    >>> label_of_finding("Suspected COVID-19") is None
    True
    """
    levels = [level.strip().lower() for level in finding.split("/")]
    leaf = {part.strip() for part in levels[-1].split(",")}
    if levels[-1] in _UNCERTAIN or levels[-1].startswith("suspected"):
        return None
    if "covid-19" in leaf:
        return "covid19"
    if levels[-1] == "no finding":
        return "normal"
    if levels[0] == "pneumonia" or not leaf.isdisjoint(_PNEUMONIAS):
        return "pneumonia"
    return "other"


def read_metadata(path: Path) -> list[dict[str, str]]:
    """Return the rows of a ``metadata.csv``, keyed by normalised column name.

    Names are stripped, in lower case, with ``_`` for spaces: ``" filename"`` → ``"filename"``,
    ``"Patientid"`` → ``"patientid"``. Values are stripped; columns without a name are left out.

    Raises:
        DatasetNotFoundError: If the file is missing.
        DatasetError: If it is empty, no CSV, lacks a column, or lies in a closed folder.
    """
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises if the folder is closed
        if is_folder(path.parent):
            entries(path.parent)
        raise DatasetNotFoundError(
            f"{path} is missing. Pass the folder that holds metadata.csv and images/, or use "
            "download=True (command line: chestxray-covid download cohen)."
        )
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = list(_records((row for _, row in numbered_rows(file)), path))
    except (csv.Error, OSError) as error:
        raise DatasetError(f"{path} cannot be read as CSV: {error}. Download it again.") from error
    if not rows:
        raise DatasetError(f"{path} has a header and no rows. Download it again.")
    return rows


def is_frontal_radiograph(row: Mapping[str, str]) -> bool:
    """Return whether a row of the metadata is a frontal radiograph (and no CT slice or lateral).

    Raises:
        DatasetError: If the metadata do not say so.
    """
    if missing := [name for name in ("modality", "view") if name not in row]:
        raise DatasetError(
            f"A row of the metadata lacks {missing}; it has {sorted(row)}. Take a metadata.csv "
            "that has these columns, or all views."
        )
    return row["modality"] == "X-ray" and canonical_view(row["view"]) in FRONTAL_VIEWS


@lru_cache(1000)
def canonical_view(text: str, unknown: str = UNKNOWN_VIEW) -> str:
    """Return the canonical name of a projection, however it is spelled, or else ``unknown``.

    >>> canonical_view("ap supine"), canonical_view("?")
    ('AP Supine', 'unknown')
    """
    return _VIEWS.get(text.strip().lower(), unknown)


def _records(lines: Iterator[list[str]], path: Path) -> Iterator[dict[str, str]]:
    header = next(lines, None)
    if header is None:
        raise DatasetError(f"{path} is empty. Download it again.")
    if header and header[0].lstrip().startswith("<"):
        raise DatasetError(
            f"{path} is an HTML or XML page, not CSV. Download the raw file, not its web page."
        )
    names = [re.sub(r"\s+", "_", name.strip().lower()) for name in header]
    missing = [name for name in _REQUIRED if name not in names]
    if missing:
        raise DatasetError(
            f"{path} lacks the columns {missing}; it has {[n for n in names if n]}. "
            "Expected the metadata.csv of covid-chestxray-dataset."
        )
    refuse_repeated(path, names)
    for line in lines:
        if any(cell.strip() for cell in line):
            cells = line + [""] * (len(names) - len(line))
            yield {n: c.strip() for n, c in zip(names, cells, strict=False) if n}


def _images(folder: Path) -> Path:
    images = folder / "images"
    if not is_folder(images):
        raise DatasetNotFoundError(
            f"{images} is missing beside metadata.csv. Fetch the images with download=True "
            "(command line: chestxray-covid download cohen)."
        )
    return images


def _mask_names(folder: Path) -> frozenset[str]:
    masks = folder / "annotations" / "lungVAE-masks"
    return frozenset(e.name for e in entries(masks)) if is_folder(masks) else frozenset()


def _patient_aliases(rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return patient → the one patient for all that share a file, directly or through others."""
    alias: dict[str, str] = {}
    owner: dict[str, str] = {}

    def resolve(patient: str) -> str:
        while alias.setdefault(patient, patient) != patient:
            patient = alias[patient]
        return patient

    for row in rows:
        if not row["patientid"]:
            continue
        patient = resolve(row["patientid"])
        if row["filename"]:
            alias[patient] = resolve(owner.setdefault(row["filename"], patient))
    return {patient: resolve(patient) for patient in alias}


def _label(row: Mapping[str, str], own_labels: Mapping[str, str]) -> str | None:
    finding = row["finding"]
    return own_labels.get(finding.strip().lower()) or label_of_finding(finding)


def _contradicted(rows: Sequence[Mapping[str, str]], labels: Sequence[str | None]) -> set[str]:
    """Return the files of which one row says one label, and another row another."""
    said: dict[str, set[str]] = {}
    for row, label in zip(rows, labels, strict=True):
        if label is not None:
            said.setdefault(row["filename"], set()).add(label)
    return {name for name, different in said.items() if len(different) > 1}


def _why_drop(
    row: Mapping[str, str],
    files: set[str],
    seen: set[str],
    views: Sequence[str] | None,
    modalities: Sequence[str] | None,
) -> str:
    """Return why a row is dropped, whatever its finding is; an empty text if it is not."""
    name = row["filename"]
    if name not in files:
        in_volumes = row.get("folder", "images") == "volumes"
        return "CT volume, not in the repository" if in_volumes else "image file missing"
    if name in seen:
        return "file listed twice"
    if not row["patientid"]:
        return "patient not given"
    if modalities is not None and row["modality"] not in modalities:
        return f"modality {row['modality'] or 'not given'}"
    view = canonical_view(row["view"])
    return "" if views is None or view in views else f"view {view}"


def _sample(
    folder: Path,
    row: Mapping[str, str],
    label: str,
    patients: Mapping[str, str],
    masks: frozenset[str],
) -> Sample:
    name = row["filename"]
    metadata = {k: v for k, v in row.items() if k not in {"finding", "view"}}
    mask = f"{Path(name).stem}_mask.png"
    if mask in masks:
        metadata["lung_mask"] = str(folder / "annotations" / "lungVAE-masks" / mask)
    if _HANNOVER_URL in row.get("url", ""):
        metadata |= {"origin": "hannover", "image_id": Path(name).stem}
    return Sample(
        path=folder / "images" / name,
        label=label,
        finding=row["finding"],
        patient_id=patients[row["patientid"]],
        source="cohen",
        view=canonical_view(row["view"]),
        metadata=metadata,
    )
