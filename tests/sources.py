"""Small synthetic copies of the public sources, in their true on-disk layouts.

Every writer fills ``root``, which may not exist yet, and returns it. Images are random, differ
from one name to the next, and are the same in every run.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

#: Header of Cohen's ``metadata.csv`` by generation, as published, blanks included.
COHEN_HEADERS: dict[str, tuple[str, ...]] = {
    "first": (
        *("Patientid", "offset", "sex", "age", "finding", "survival", "view", "modality", "date"),
        *("location", " filename", "doi", " url", "license", "notes"),
    ),
    "flat": (
        *("patientid", "offset", "sex", "age", "finding", "survival", "intubated"),
        *("intubation_present", "went_icu", "in_icu", "needed_supplemental_O2", "extubated"),
        *("temperature", "pO2_saturation", "leukocyte_count", "neutrophil_count"),
        *("lymphocyte_count", "view", "modality", "date", "location", "folder", "filename"),
        *("doi", "url", "license", "clinical notes", "other notes", ""),
    ),
    "hierarchical": (
        *("patientid", "offset", "sex", "age", "finding", "RT_PCR_positive", "survival"),
        *("intubated", "intubation_present", "went_icu", "in_icu", "needed_supplemental_O2"),
        *("extubated", "temperature", "pO2_saturation", "leukocyte_count", "neutrophil_count"),
        *("lymphocyte_count", "view", "modality", "date", "location", "folder", "filename"),
        *("doi", "url", "license", "clinical_notes", "other_notes", ""),
    ),
}
#: Flat finding → the same in the hierarchical taxonomy; what is missing was not renamed.
HIERARCHICAL = {
    "COVID-19": "Pneumonia/Viral/COVID-19",
    "COVID-19, ARDS": "Pneumonia/Viral/COVID-19",
    "SARS": "Pneumonia/Viral/SARS",
    "Streptococcus": "Pneumonia/Bacterial/Streptococcus",
    "Herpes": "Pneumonia/Viral/Herpes ",
    "Pneumocystis": "Pneumonia/Fungal/Pneumocystis",
    "Lipoid": "Pneumonia/Lipoid",
    "todo": "todo",
}
HANNOVER_URL = "https://github.com/ml-workgroup/covid-19-image-repository"
#: An image of the Hannover collection that Cohen's took over.
SHARED_IMAGE_ID = "fff13f3a"

Row = Mapping[str, str]


def draw(name: str, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Return a smooth random grey image, ``(width, height)``, that follows from ``name``."""
    rng = np.random.default_rng(zlib.crc32(name.encode("utf-8", "surrogateescape")))
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def write_image(
    path: Path,
    name: str | None = None,
    *,
    kind: str | None = None,
    size: tuple[int, int] = (48, 40),
    mode: str = "L",
) -> Path:
    """Write the image of ``name`` (else of the file's name) and return its path.

    Args:
        path: File to write; its folder is made.
        name: What the pixels follow from, see :func:`draw`.
        kind: Pillow's name of the format, if not the one of the suffix.
        size: Width and height in pixels.
        mode: Pillow's mode.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind is None:
        kind = {".png": "PNG", ".bmp": "BMP"}.get(path.suffix.lower(), "JPEG")
    with path.open("wb") as file:
        draw(path.name if name is None else name, size).convert(mode).save(file, kind)
    return path


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Path:
    """Write a CSV and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def cohen_row(patient: str, finding: str, filename: str, **columns: str) -> Row:
    """Return a row of a frontal radiograph; the finding is a flat one, other columns as given."""
    plain = {"view": "PA", "modality": "X-ray", "folder": "images", "license": "CC BY-NC-SA"}
    return {"patientid": patient, "finding": finding, "filename": filename, **plain, **columns}


def ordinary_cohen_rows(patients: int) -> list[Row]:
    """Return two COVID-19 rows and one normal one for each of so many patients per class."""
    rows = []
    for i in range(patients):
        rows += [cohen_row(f"{400 + i}", "COVID-19", f"covid-{i}-{k}.png") for k in (0, 1)]
        rows.append(cohen_row(f"{500 + i}", "No Finding", f"normal-{i}.jpeg"))
    return rows


def cohen_traps() -> list[Row]:
    """Return rows with everything that went wrong in the real metadata, once each."""
    volume = {"modality": "CT", "view": "Axial", "folder": "volumes"}
    hannover = {"url": HANNOVER_URL, "license": "CC BY 3.0", "view": "AP"}
    return [
        cohen_row("2", "COVID-19", "a-1.jpeg", view="AP Supine", RT_PCR_positive="Y", license=""),
        cohen_row("2", "No Finding", "a-2.jpeg", view="AP erect"),
        cohen_row("311a", "COVID-19, ARDS", "b.JPG", view="ap", RT_PCR_positive="Unclear"),
        cohen_row("311b", "COVID-19", "png-inside.jpg", view="AP SEMI ERECT"),
        cohen_row("3", "SARS", "sars.png", view="AP Erect"),
        cohen_row("4", "Herpes", "herpes.png"),
        cohen_row("5", "Lipoid", "lipoid.png", view="PA "),
        cohen_row("6", "Tuberculosis", "tuberculosis.png"),
        cohen_row("7", "ARDS", "ards.png"),
        cohen_row("8", "Suspected COVID-19", "suspected.png"),
        cohen_row("8", "todo", "todo.png"),
        cohen_row("8", "Unknown", "unknown.png"),
        cohen_row("8", "", "empty.png"),
        cohen_row("9", "COVID-19", "lateral.png", view="L"),
        cohen_row("9", "COVID-19", "unclear-view.png", view="?"),
        cohen_row("9", "COVID-19", "no-view.png", view=""),
        cohen_row("9", "COVID-19", "shifted-view.png", view="X-ray"),
        cohen_row("10", "COVID-19", "slice.png", modality="CT", view="Axial"),
        cohen_row("10", "COVID-19", "slice-2.png", modality="CT", view="Coronal"),
        cohen_row("10", "COVID-19", "coronacases_001.nii.gz", **volume),
        cohen_row("11", "COVID-19", "lost-upstream.jpg"),
        # a whole row shifted to the right: every value stands one column too far
        {"finding": "12", "view": "lymphocytes", "modality": "PA", "filename": "images"},
        cohen_row("285", "Streptococcus", "twice.jpg"),
        cohen_row("339", "Streptococcus", "twice.jpg"),
        cohen_row("339", "Pneumocystis", "another-of-339.jpg"),
        cohen_row("190", "COVID-19", f"{SHARED_IMAGE_ID}.png", **hannover),
    ]


def write_cohen(
    root: Path,
    generation: str = "hierarchical",
    *,
    rows: Sequence[Row] | None = None,
    patients: int = 6,
) -> Path:
    """Write Cohen's collection: ``metadata.csv``, ``images/``, ``annotations/lungVAE-masks/``.

    Args:
        root: Folder to fill.
        generation: Of the metadata, one of :data:`COHEN_HEADERS`.
        rows: Rows by column name, case ignored, findings flat; else :func:`cohen_traps` and
            :func:`ordinary_cohen_rows`.
        patients: Ordinary patients per class.
    """
    rows = [*cohen_traps(), *ordinary_cohen_rows(patients)] if rows is None else rows
    header = COHEN_HEADERS[generation]
    lines = []
    for row in rows:
        finding = row.get("finding", "")
        if generation == "hierarchical":
            finding = HIERARCHICAL.get(finding, finding)
        cells = {name.lower(): cell for name, cell in row.items()} | {"finding": finding}
        lines.append([cells.get(name.strip().lower(), "") for name in header])
        name = row.get("filename", "")
        in_images = row.get("folder") == "images" and not name.startswith("lost")
        if in_images and not (root / "images" / name).exists():
            kind, mode = ("PNG", "RGBA") if name == "png-inside.jpg" else (None, "L")
            write_image(root / "images" / name, kind=kind, mode=mode)
    write_csv(root / "metadata.csv", header, lines)
    write_image(root / "images" / "FAFA-A1BF-49A8-A1D3-66FAFA41B7345D.jpg")
    write_image(root / "images" / "no-row.png")
    mask = np.zeros((20, 24), np.uint8)
    mask[5:15, 3:10] = mask[5:15, 14:21] = 255
    (root / "annotations" / "lungVAE-masks").mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(root / "annotations" / "lungVAE-masks" / "a-1_mask.png")
    return root


#: Images by split and class folder in the Kaggle layouts of :func:`write_kermany`.
KERMANY_FILES: dict[str, tuple[str, ...]] = {
    "train/NORMAL": (
        *("IM-0115-0001.jpeg", "IM-0115-0002.jpeg", "IM-0117-0001.jpeg"),
        *("NORMAL2-IM-0115-0001.jpeg", "NORMAL2-IM-0927-0001-0002.jpeg"),
        *("NORMAL2-IM-0927-0001.jpeg", "IM-0119-0001.jpeg", "IM-0122-0001.jpeg"),
    ),
    "train/PNEUMONIA": (
        *("person1_bacteria_1.jpeg", "person1_bacteria_2.jpeg", "person1_virus_6.jpeg"),
        *("person447_virus_921_1.jpeg", "person447_virus_920.jpeg", "person2_bacteria_3.jpeg"),
    ),
    "val/NORMAL": ("NORMAL2-IM-1427-0001.jpeg",),
    "val/PNEUMONIA": ("person1946_bacteria_4874.jpeg",),
    "test/NORMAL": ("IM-0001-0001.jpeg", "NORMAL2-IM-0029-0001.jpeg"),
    "test/PNEUMONIA": ("person100_bacteria_475.jpeg", "person3_virus_15.jpeg"),
}
#: The same for the layout ``"mendeley-v3"``, which numbers and names anew and has no ``val``.
KERMANY_V3_FILES: dict[str, tuple[str, ...]] = {
    "train/NORMAL": ("NORMAL-28501-0001.jpeg", "NORMAL-28501-0002.jpeg", "NORMAL-32326-0001.jpeg"),
    "train/PNEUMONIA": (
        *("BACTERIA-7422-0001.jpeg", "BACTERIA-7422-0002.jpeg", "VIRUS-7422-0001.jpeg"),
    ),
    "test/NORMAL": ("NORMAL-4512-0001.jpeg",),
    "test/PNEUMONIA": ("VIRUS-1004-0001.jpeg",),
}


def write_kermany(root: Path, layout: str = "kaggle") -> Path:
    """Write Kermany's collection.

    Args:
        root: Folder to fill.
        layout: ``"kaggle"`` is the unpacked Kaggle archive with its nested copy and what macOS
            left in it; ``"kaggle-nested"`` holds the nested copy alone; ``"mendeley"`` is the
            first version (no ``val``); ``"mendeley-v3"`` has the later version's names.
    """
    files = KERMANY_V3_FILES if layout == "mendeley-v3" else KERMANY_FILES
    places = {
        "kaggle": ("chest_xray", "chest_xray/chest_xray"),
        "kaggle-nested": ("chest_xray/chest_xray",),
        "mendeley": ("ChestXRay2017/chest_xray",),
        "mendeley-v3": ("chest_xray",),
    }[layout]
    for place in places:
        for folder, names in files.items():
            if layout.startswith("mendeley") and folder.startswith("val"):
                continue
            for name in names:
                write_image(root / place / folder / name)
    if layout == "kaggle":
        for folder, names in files.items():
            fork = root / "chest_xray" / "__MACOSX" / "chest_xray" / folder
            for where in (fork, root / "chest_xray" / folder):
                where.mkdir(parents=True, exist_ok=True)
                (where / f"._{names[0]}").write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X")
                (where / ".DS_Store").write_bytes(b"\0\0\0\x01Bud1")
    return root


def write_hannover(root: Path, patients: int = 5) -> Path:
    """Write the Hannover collection: ``data.csv``, ``png/``; two images of each patient.

    The first image is the one that :func:`write_cohen` holds too, there with another margin.
    """
    header = ["patient_id", "image_id", "sex", "age", "modality", "projection", "po2_val"]
    lines = []
    for i in range(patients):
        for k in (0, 1):
            image_id = SHARED_IMAGE_ID if i == k == 0 else f"{i:04x}{k:04x}"
            write_image(root / "png" / f"{image_id}.png", f"hannover {image_id}")
            lines.append([f"{i:02x}4e7871", image_id, "f", "", "CR", "ap" if k else "pa", "30.0"])
    write_csv(root / "data.csv", header, lines)
    (root / "readme.md").write_text("# COVID-19 Image Repository\n", encoding="utf-8")
    return root


def write_nih(root: Path, patients: int = 6) -> Path:
    """Write a subset of NIH ChestX-ray14 in class folders; patient numbers start file names."""
    for folder, first in (("No_findings", 1200), ("Pneumonia", 5000)):
        for i in range(patients):
            for k in range(1 + i % 2):
                write_image(root / folder / f"{first + i:08d}_{k:03d}.jpg")
    return root


def write_folder(root: Path, counts: Mapping[str, int] | None = None) -> Path:
    """Write a folder per class with so many images each, ``root/<class>/<class>-<i>.png``."""
    for folder, count in (counts or {"Normal": 6, "COVID": 6}).items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            write_image(root / folder / f"{folder}-{i}.png")
    return root
