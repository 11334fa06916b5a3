"""The radiographs that the bundled weights are trained on: four sources, counted by licence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
from PIL import Image

from chestxray_covid import (
    ChestXrayDataset,
    CohenCovidDataset,
    FolderDataset,
    HannoverCovidDataset,
    KermanyPneumoniaDataset,
    Preprocess,
    Sample,
    concatenate,
)
from chestxray_covid.datasets.base import LABELS
from chestxray_covid.datasets.storage import replacing
from chestxray_covid.lungs import lung_box, segment_stream

#: Licence of the collections that have one for all of their images.
LICENCES = {
    "kermany": "CC BY 4.0",
    "hannover": "CC BY 3.0",
    "nih": "NIH Clinical Center, no restriction on use",
}

#: What each source is, and under which licence.
COLLECTIONS = {
    "cohen": "Cohen et al., COVID-19 image data collection, github.com/ieee8023/"
    "covid-chestxray-dataset; a licence for each image",
    "hannover": "Winther et al., COVID-19 image repository, Hannover Medical School, "
    "github.com/ml-workgroup/covid-19-image-repository; CC BY 3.0",
    "kermany": "Kermany et al., chest X-ray images (pneumonia) of children, Guangzhou, "
    "doi.org/10.17632/rscbjbr9sj, as Mooney publishes them on Kaggle; CC BY 4.0",
    "nih": "Wang et al., ChestX-ray of the NIH Clinical Center, a part of it; no restriction on "
    "use",
}

#: Of a radiograph's lungs, for networks of up to 256 px.
CROP = Preprocess(size_px=256)

#: What :func:`aetiology` tells apart.
AETIOLOGIES = ("normal", "bacterial", "viral")


def licence(sample: Sample) -> str:
    """Return the licence of an image, ``"not given"`` where its source names none."""
    return sample.metadata.get("license") or LICENCES.get(sample.source, "not given")


def forbids_derivatives(sample: Sample) -> bool:
    """Return whether an image's licence has the part ND, so that no weights may come of it."""
    return "-ND" in licence(sample).upper()


def forbidden(data: Path) -> ChestXrayDataset:
    """Return Cohen's frontal radiographs in three classes that stay out for their licence."""
    return CohenCovidDataset(data / "covid-chestxray-dataset", classes=LABELS).filter(
        forbids_derivatives
    )


def open_cohen(data: Path) -> ChestXrayDataset:
    """Return Cohen's frontal radiographs in three classes, without those that must stay out.

    With Hannover's, :func:`concatenate` drops the eight that Hannover contradicts, too.
    """
    cohen = CohenCovidDataset(data / "covid-chestxray-dataset", classes=LABELS)
    return cohen.filter(lambda s: not forbids_derivatives(s))


def open_sources(data: Path) -> ChestXrayDataset:
    """Return all four sources in three classes, without images whose licence forbids it.

    Args:
        data: Folder with ``covid-chestxray-dataset``, ``chest_xray``,
            ``covid-19-image-repository`` and ``nih-subset``.
    """
    return concatenate(
        [
            open_cohen(data),
            KermanyPneumoniaDataset(data / "chest_xray", classes=("normal", "pneumonia")),
            HannoverCovidDataset(data / "covid-19-image-repository", classes=("covid19",)),
            FolderDataset(data / "nih-subset", source="nih", classes=("normal", "pneumonia")),
        ]
    )


def aetiology(dataset: ChestXrayDataset) -> ChestXrayDataset:
    """Return the radiographs that are known to be normal, of bacterial or of viral pneumonia.

    Kermany's files say which; NIH gives normal ones, of adults.
    """
    kinds = {"bacterial pneumonia": "bacterial", "viral pneumonia": "viral"}
    named = (replace(s, label=kinds.get(s.finding, s.label)) for s in dataset.samples)
    known = (s for s in named if s.source in ("kermany", "nih") and s.label in AETIOLOGIES)
    return ChestXrayDataset(known, classes=AETIOLOGIES)


def cropped_to_lungs(dataset: ChestXrayDataset, folder: Path) -> ChestXrayDataset:
    """Return the data set with every radiograph cropped to its lungs, 256 by 256 pixels.

    The lung segmenter finds them; where it finds none, the whole radiograph is taken.

    Args:
        dataset: Radiographs in files.
        folder: The crops are written there, as PNG under the hash of the original, but only once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = [folder / f"{s.content_hash()}.png" for s in dataset.samples]
    missing = [i for i, place in enumerate(places) if not place.exists()]
    for i, mask in zip(missing, segment_stream(dataset.subset(missing)), strict=True):
        pixels = CROP(dataset.samples[i], box=lung_box(mask, margin=0.03))
        with replacing(places[i]) as partial:
            Image.fromarray(pixels[0]).save(partial, format="PNG")
    pairs = zip(dataset.samples, places, strict=True)
    return ChestXrayDataset((replace(s, path=p) for s, p in pairs), classes=dataset.classes)


def once(dataset: ChestXrayDataset) -> ChestXrayDataset:
    """Return the data set without Cohen's copies of Hannover's radiographs.

    They are the same images under other patient numbers, and would count twice in an interval.
    """
    return dataset.filter(lambda s: s.metadata.get("numbered_by") != "cohen")


def count_by_licence(dataset: ChestXrayDataset) -> dict[str, int]:
    """Return licence → number of images, the most frequent first."""
    return dict(Counter(licence(s) for s in dataset.samples).most_common())


def is_cohens(sample: Sample) -> bool:
    """Return whether a sample is listed in Cohen's collection, also if it came from Hannover's."""
    return sample.source == "cohen" or sample.metadata.get("numbered_by") == "cohen"


def cohens(dataset: ChestXrayDataset) -> np.ndarray:
    """Return the positions of what is listed in Cohen's collection."""
    return np.array([i for i, s in enumerate(dataset.samples) if is_cohens(s)])


def country(sample: Sample) -> str:
    """Return where an image of Cohen's was taken: the last part of its place, empty if unknown."""
    return sample.metadata.get("location", "").rpartition(",")[2].strip()


def website(sample: Sample) -> str:
    """Return the host that an image of Cohen's comes from."""
    return urlparse(sample.metadata.get("url", "")).netloc


#: Result → name → which of Cohen's images are left out together; they have COVID-19 and others.
LEFT_OUT: dict[str, dict[str, Callable[[Sample], bool]]] = {
    "subsources": {
        "radiopaedia": lambda s: website(s) == "radiopaedia.org",
        "eurorad": lambda s: website(s) == "www.eurorad.org",
        "journals and others": lambda s: (
            website(s) not in {"radiopaedia.org", "www.eurorad.org", "www.sirm.org", "github.com"}
        ),
    },
    "locations": {
        "Italy": lambda s: country(s) == "Italy",
        "Spain": lambda s: country(s) == "Spain",
        "Australia and Canada": lambda s: country(s) in {"Australia", "Canada"},
    },
}
