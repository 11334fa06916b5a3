"""Draw phantoms in the layouts of Cohen's and Kermany's collections, to try all without data.

    python examples/phantoms.py data

writes ``data/covid-chestxray-dataset`` and ``data/kermany``. As in the real collections, the
two look different (exposure and frame), only Cohen's holds COVID-19, and it has next to no normal
radiograph. Nothing that is measured on phantoms says anything about patients.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from chestxray_covid import Sample, SyntheticChestXray

LABELS = ("normal", "pneumonia", "covid19")
FINDINGS = {
    "normal": "No Finding",
    "pneumonia": "Pneumonia/Bacterial/Streptococcus",
    "covid19": "Pneumonia/Viral/COVID-19",
}
FOLDERS = {"normal": "NORMAL", "pneumonia": "PNEUMONIA"}
NAMES = {"normal": "IM-{:04d}-{:04d}.jpeg", "pneumonia": "person{}_bacteria_{}.jpeg"}


def draw(root: Path, *, count: int = 300, image_size_px: int = 128, seed: int = 0) -> None:
    """Write both collections below ``root``, about ``2 / 3 * count`` phantoms in all."""
    places = (root / "covid-chestxray-dataset", root / "kermany")
    if taken := [str(place) for place in places if place.exists()]:
        raise SystemExit(f"{' and '.join(taken)} is there already: name another folder.")
    phantoms = SyntheticChestXray(
        count,
        classes=LABELS,
        image_size_px=image_size_px,
        seed=seed,
        sources=("cohen", "kermany"),
        site_effect=True,
    )
    cohen = [s for s in phantoms.samples if s.source == "cohen"]
    few = sorted({s.patient_id for s in cohen if s.label == "normal"})[:3]
    cohen = [s for s in cohen if s.label != "normal" or s.patient_id in few]
    kermany = [s for s in phantoms.samples if s.source == "kermany" and s.label != "covid19"]
    write_cohen(places[0], cohen)
    write_kermany(places[1] / "chest_xray", kermany)


def write_cohen(root: Path, samples: Sequence[Sample]) -> None:
    """Write ``metadata.csv``, in the columns and words of the collection, and ``images/``."""
    (root / "images").mkdir(parents=True)
    columns = ("patientid", "finding", "view", "modality", "folder", "filename", "license")
    with (root / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for s in samples:
            row = (s.patient_id, FINDINGS[s.label], s.view, "X-ray", "images", s.path.name, "")
            table.writerow(row)
            s.read(s, None).save(root / "images" / s.path.name)


def write_kermany(root: Path, samples: Sequence[Sample]) -> None:
    """Write ``train/`` and ``test/`` with ``NORMAL/`` and ``PNEUMONIA/``; a fifth is for the test.

    The patient's number is in the file's name, as in the collection.
    """
    for i, s in enumerate(samples):
        patient = int(s.patient_id)
        folder = root / ("train" if patient % 5 else "test") / FOLDERS[s.label]
        folder.mkdir(parents=True, exist_ok=True)
        s.read(s, None).save(folder / NAMES[s.label].format(patient, i), quality=95)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("root", type=Path, help="folder to draw into")
    parser.add_argument("--count", type=int, default=300, help="number of phantoms to draw")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    draw(options.root, count=options.count, image_size_px=options.size, seed=options.seed)
    print(f"Drawn: {options.root}/covid-chestxray-dataset and {options.root}/kermany")


if __name__ == "__main__":
    main()
