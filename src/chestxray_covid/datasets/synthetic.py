"""Phantoms: drawn chest radiographs with labels, for tests, documentation and examples.

What ``torchvision.datasets.FakeData`` is to photographs: no download, no licence, no patient.
How they are drawn is in :mod:`chestxray_covid.datasets.phantom`.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from PIL import Image

from chestxray_covid.datasets.base import (
    DEFAULT_CLASSES,
    LABELS,
    ChestXrayDataset,
    Sample,
    read_file,
)
from chestxray_covid.datasets.phantom import VISITS, Recipe, render_phantom
from chestxray_covid.datasets.storage import is_current
from chestxray_covid.errors import DatasetError, check_classes, whole_number
from chestxray_covid.files import expanded
from chestxray_covid.progress import Bar

SIGNALS = ("lungs", "none")
MARKERS = ("corner",)
#: What a label looks like in the lungs.
_OPACITIES = {"normal": "none", "pneumonia": "consolidation", "covid19": "ground-glass"}


class SyntheticChestXray(ChestXrayDataset):
    """Phantoms of frontal radiographs: square, mode ``L``, bone bright, drawn when asked for.

    ``covid19`` shows ill-defined ground-glass opacities in both lungs, peripheral and low;
    ``pneumonia`` one consolidated lobe; ``normal`` neither. Opacities reach from subtle to plain.
    Anatomy varies by patient, pose and exposure by image. Classes alternate, a patient has one
    label, and image ``i`` depends on ``i`` and the other arguments, but not on ``size``. Pixels
    may differ between versions of NumPy and Pillow.

    ``signal``, ``marker``, and ``sources`` with ``site_effect`` plant shortcuts, each on its own,
    for whoever wants to see an audit find them.

    Args:
        size: Number of images, at least one per class.
        classes: Labels in order, from ``normal``, ``pneumonia`` and ``covid19``.
        image_size_px: Side of the images in pixels, 32 to 1024.
        seed: Not negative; another seed gives other patients, whose numbers begin with it.
        sources: Names of collections. A sequence is dealt to the patients of each class in turn,
            so that the source says nothing about the label; a mapping label → source gives the
            label away.
        views: Projections, dealt likewise. Names only; the drawing stays the same.
        patients: Number of patients, at least one per class and at most ``size``; ``None`` gives
            every patient one to three images.
        marker: ``"corner"`` puts a bright letter L into the upper right corner of every
            ``covid19`` image; ``None`` puts none anywhere.
        signal: ``"lungs"`` draws the opacities, which change no pixel outside
            :func:`phantom_mask`; ``"none"`` leaves them out, so that the label is chance.
        site_effect: Give every source its own look, from a dark exposure (first source) to a
            bright one with a black collimation frame (last source).
        transform: Applied to the PIL image.
        target_transform: Applied to the integer target.

    Raises:
        TypeError: If a number is not whole, or names are given as a single string.
        ValueError: If an argument is out of its range.

    >>> dataset = SyntheticChestXray(4, image_size_px=64)
    >>> dataset
    <SyntheticChestXray of 4 radiographs (normal: 2, covid19: 2) from synthetic>
    >>> image, target = dataset[1]
    >>> image.size, image.mode, dataset.classes[target]
    ((64, 64), 'L', 'covid19')
    """

    def __init__(
        self,
        size: int = 100,
        *,
        classes: Sequence[str] = DEFAULT_CLASSES,
        image_size_px: int = 256,
        seed: int = 0,
        sources: Sequence[str] | Mapping[str, str] = ("synthetic",),
        views: Sequence[str] = ("PA",),
        patients: int | None = None,
        marker: str | None = None,
        signal: str = "lungs",
        site_effect: bool = False,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        classes = check_classes(classes)
        if not set(classes) <= set(LABELS):
            raise ValueError(f"classes of phantoms are among {LABELS}, got {classes}")
        size = _whole("size", size, len(classes))
        if patients is not None:
            patients = _whole("patients", patients, len(classes), size)
        seed = _whole("seed", seed, 0)
        side = _whole("image_size_px", image_size_px, 32, 1024)
        if signal not in SIGNALS:
            raise ValueError(f"signal must be one of {SIGNALS}, got {signal!r}")
        if marker is not None and marker not in MARKERS:
            raise ValueError(f"marker must be None or one of {MARKERS}, got {marker!r}")
        if marker is not None and "covid19" not in classes:
            raise ValueError(f"marker marks covid19, which is not among the classes {classes}")
        deals = _deals(sources, classes, site_effect=site_effect)
        views = _names("views", views)
        ranks = [_ranks(seed, c, len(classes), size, patients) for c in range(len(classes))]

        def sample(index: int) -> Sample:
            turn, position = divmod(index, len(classes))
            label, rank = classes[position], ranks[position][turn]
            view, dealt = divmod(rank, len(deals[label]))
            source, look = deals[label][dealt]
            recipe = Recipe(
                seed=seed,
                index=index,
                patient=rank * len(classes) + position,
                image_size_px=side,
                opacity=_OPACITIES[label] if signal == "lungs" else "none",
                marker=marker if marker and label == "covid19" else "none",
                look=look,
            )
            return Sample(
                path=Path(f"phantom-{seed}-{index:06d}-{label}.png"),
                label=label,
                finding=recipe.opacity,
                patient_id=f"{seed or ''}{recipe.patient:05d}",
                source=source,
                view=views[view % len(views)],
                metadata={key: str(value) for key, value in asdict(recipe).items()},
                read=render_phantom,
            )

        super().__init__(
            (sample(index) for index in range(size)),
            classes=classes,
            transform=transform,
            target_transform=target_transform,
        )

    def save(self, root: str | os.PathLike[str], *, progress: bool = False) -> Path:
        """Write the phantoms as PNG files and return ``root``, which is complete or absent.

        The files are ``root/<label>/<patient>_<index>.png``, which ``FolderDataset`` reads with
        their patients, and ``root/manifest.csv`` for ``ManifestDataset``, which also knows
        sources and views. Transforms are not applied.

        Args:
            root: Folder to make; may exist if it is empty.
            progress: Show a progress bar.

        Raises:
            DatasetError: If ``root`` is a file, a folder with content or the current one, or
                cannot be written.
        """
        target = expanded(root).resolve()
        try:
            if target.exists() and not (target.is_dir() and not any(target.iterdir())):
                raise DatasetError(
                    f"{target} exists and is not an empty folder; nothing was written. "
                    "Pass another folder, or remove it first."
                )
            if is_current(target):
                raise DatasetError(
                    f"{target} is the current folder and cannot be replaced; nothing was written. "
                    "Pass a folder inside it, which may not exist yet."
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                prefix=f".{target.name[:100]}.", suffix=".partial", dir=target.parent
            ) as scratch:
                # One level down: the scratch folder is private to this user, the result is not.
                partial = Path(scratch) / "phantoms"
                self._write(partial, progress=progress)
                if target.exists():
                    target.rmdir()  # Windows renames onto nothing that exists
                partial.rename(target)
        except OSError as error:
            raise DatasetError(
                f"Phantoms cannot be written to {target}: {error}. Pass another folder."
            ) from error
        return expanded(root)

    def _write(self, folder: Path, *, progress: bool) -> None:
        for label in self.classes:
            (folder / label).mkdir(parents=True)
        written = []
        for s in Bar(self.samples, "drawing", unit="img", disable=not progress):
            path = folder / s.label / f"{s.patient_id}_{int(s.metadata['index']):06d}.png"
            s.read(s, None).save(path)
            written.append(replace(s, path=path, read=read_file))
        ChestXrayDataset(written, classes=self.classes)._write_manifest(folder / "manifest.csv")


def _ranks(seed: int, position: int, classes: int, size: int, patients: int | None) -> list[int]:
    """Return for each image of a class, in order, which of the class's patients it shows."""
    count = len(range(position, size, classes))
    if patients is not None:
        own = len(range(position, patients, classes))
        return [i % own for i in range(count)]
    visits = np.random.default_rng((seed, VISITS, position)).integers(1, 4, count)
    return [int(rank) for rank in np.repeat(np.arange(count), visits)[:count]]


def _deals(
    sources: Sequence[str] | Mapping[str, str], classes: Sequence[str], *, site_effect: bool
) -> dict[str, list[tuple[str, float]]]:
    """Return label → sources with their looks, which its patients are dealt in turn."""
    if isinstance(sources, Mapping):
        if set(sources) != set(classes):
            raise ValueError(f"sources must name each class of {classes} alone, got {sources}")
        names = _names("sources", [sources[c] for c in classes])
    else:
        names = _names("sources", sources)
    order = list(dict.fromkeys(names))
    if site_effect and len(order) < 2:
        raise ValueError(f"site_effect needs two or more sources, got {order}")
    looks = {n: 2 * i / (len(order) - 1) - 1 if site_effect else 0.0 for i, n in enumerate(order)}
    dealt = [(name, looks[name]) for name in names]
    if isinstance(sources, Mapping):
        return {c: [pair] for c, pair in zip(classes, dealt, strict=True)}
    return dict.fromkeys(classes, dealt)


def _names(what: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"{what} must be a sequence of names, got the string {names!r}")
    names = tuple(names)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{what} must be one or more names, got {list(names)}")
    return names


def _whole(what: str, value: SupportsIndex, low: int, high: float = math.inf) -> int:
    number = whole_number(what, value)
    if not low <= number <= high:
        raise ValueError(f"{what} must be from {low} to {high}, got {number}")
    return number
