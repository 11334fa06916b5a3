"""Kermany's paediatric chest radiographs, as Mendeley and as Kaggle publish them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from chestxray_covid.datasets.base import DEFAULT_CLASSES, ChestXrayDataset, Sample
from chestxray_covid.datasets.download import download_kermany
from chestxray_covid.datasets.loading import entries, why_no_image
from chestxray_covid.datasets.report import summarise
from chestxray_covid.datasets.storage import resolver
from chestxray_covid.errors import DatasetError, DatasetNotFoundError, check_classes
from chestxray_covid.files import existing_folder, expanded, is_folder

SPLITS = ("train", "val", "test")
_FOLDERS = {"NORMAL": "normal", "PNEUMONIA": "pneumonia"}
#: Where ``train/`` may lie: as is, as Kaggle and Mendeley unpack, and Kaggle's nested copy.
_NESTING = (
    *("", "chest_xray", "chest_xray/chest_xray"),
    *("ChestXRay2017/chest_xray", "CellData/chest_xray"),
)
#: Kaggle and Mendeley's first version number patients per aetiology; Mendeley's later version
#: writes ``BACTERIA-<patient>-<image>.jpeg``, and numbers anew.
_NAMES = (
    re.compile(r"person(?P<patient>\d+)_(?P<group>bacteria|virus)_\d+", re.IGNORECASE),
    re.compile(r"(?P<group>(?:NORMAL2-)?IM)-(?P<patient>\d+)-\d+", re.IGNORECASE),
    re.compile(r"(?P<group>NORMAL|BACTERIA|VIRUS)-(?P<patient>\d+)-\d+", re.IGNORECASE),
)
_FINDINGS = {"bacteria": "bacterial pneumonia", "virus": "viral pneumonia"}


class KermanyPneumoniaDataset(ChestXrayDataset):
    """Radiographs of children of one to five years, healthy or with pneumonia.

    The collection holds no COVID-19. Its shipped splits are merged unless one is asked for:
    they are of no use for validation (``val`` has 16 images). Patients are numbered per aetiology,
    so ``patient_id`` is, for example, ``"bacteria-12"``, ``"virus-12"`` or ``"NORMAL2-IM-0123"``.
    Nested copies, ``__MACOSX`` and hidden files are not read.

    Citation: D. S. Kermany, M. Goldbaum, W. Cai et al.: Identifying Medical Diagnoses and
    Treatable Diseases by Image-Based Deep Learning. Cell 172(5), 2018,
    doi:10.1016/j.cell.2018.02.010. Data: https://data.mendeley.com/datasets/rscbjbr9sj, CC BY 4.0;
    on Kaggle as paultimothymooney/chest-xray-pneumonia.

    Args:
        root: The folder that holds ``chest_xray``, or ``chest_xray`` itself, whose splits hold
            ``NORMAL`` and ``PNEUMONIA`` alone.
        classes: Labels to keep; only ``normal`` and ``pneumonia`` can be promised.
        split: ``"train"``, ``"val"`` or ``"test"`` as shipped; ``None`` merges them.
        transform: Applied to the PIL image.
        target_transform: Applied to the integer target.
        download: Fetch the collection through ``kagglehub`` if it is not in ``root``.

    Raises:
        DatasetNotFoundError: If the layout is not found below ``root``.
        DatasetError: If a promised class has no image, or a folder cannot be listed.
        ValueError: If ``split`` is unknown.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        classes: Sequence[str] = DEFAULT_CLASSES,
        split: str | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        download: bool = False,
    ) -> None:
        classes = check_classes(classes)
        if split is not None and split not in SPLITS:
            raise ValueError(f"Unknown value {split!r} for split. Valid values are {SPLITS}")
        promised = [name for name in classes if name in _FOLDERS.values()]
        if not promised:
            raise DatasetError(
                f"The Kermany collection holds normal and pneumonia, none of {list(classes)}. "
                "Add one of them to classes=."
            )
        folder = expanded(root)
        if download and find_layout(folder) is None:
            folder = download_kermany(folder)
        folder = existing_folder(folder, "the folder of the Kermany download")
        layout = find_layout(folder)
        if layout is None:
            raise DatasetNotFoundError(
                f"{folder} is not the Kermany download: no chest_xray/train below it that holds "
                "NORMAL and PNEUMONIA alone. Unpack the archive there, pass the folder that holds "
                "chest_xray, or read other classes with FolderDataset."
            )
        samples: list[Sample] = []
        dropped: Counter[str] = Counter()
        notes: Counter[str] = Counter()
        seen: set[str] = set()
        resolved = resolver()
        for part in SPLITS if split is None else (split,):
            for name, label in _FOLDERS.items():
                place = layout / part / name
                for entry in entries(place) if is_folder(place) else ():
                    if reason := why_no_image(entry) or _why_drop(label, classes):
                        dropped[reason] += 1
                        continue
                    path = Path(entry.path)
                    if (file := resolved(path)) in seen:  # where a split is a link to another
                        dropped["file listed twice"] += 1
                        continue
                    seen.add(file)
                    sample = _sample(path, label, part)
                    notes["names without a patient number"] += sample.patient_id == path.stem
                    samples.append(sample)
        super().__init__(
            samples,
            classes=classes,
            transform=transform,
            target_transform=target_transform,
            report=summarise(
                samples, classes, source="kermany", root=layout, dropped=dropped, notes=+notes
            ),
        )
        self._named_after = {"kermany": Path("KermanyPneumoniaDataset")}
        self._promise(promised)


def find_layout(root: Path) -> Path | None:
    """Return the folder at or below ``root`` that holds ``train/NORMAL``, if there is one.

    One that also holds other classes is another collection's.

    Raises:
        DatasetError: If a folder cannot be listed.
    """
    return next((p for nesting in _NESTING if _is_layout(p := root / nesting)), None)


def _is_layout(place: Path) -> bool:
    splits = [folder for name in SPLITS if is_folder(folder := place / name)]
    inner = {e.name for folder in splits for e in entries(folder) if is_folder(e.path)} - {
        "__MACOSX"
    }
    return "NORMAL" in inner and inner <= set(_FOLDERS)


def _why_drop(label: str, classes: Sequence[str]) -> str:
    return "" if label in classes else f"finding outside the classes ({label})"


def _sample(path: Path, label: str, part: str) -> Sample:
    match = next((m for pattern in _NAMES if (m := pattern.match(path.name))), None)
    group = match["group"].upper() if match else ""
    if match and match.re is _NAMES[0]:
        group = group.lower()
    return Sample(
        path=path,
        label=label,
        finding=_FINDINGS.get(group.lower(), label),
        patient_id=f"{group}-{match['patient']}" if match else path.stem,
        source="kermany",
        view="AP",
        metadata={"split": part},
    )
