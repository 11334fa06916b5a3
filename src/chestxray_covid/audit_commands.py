"""The subcommand that audits a model for shortcuts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from chestxray_covid.command import (
    BATCH,
    DATA,
    DEVICE,
    ENGINE,
    MODEL,
    PRECISION,
    REPORT,
    HomePath,
    check_reports,
    open_data,
    place_of_split,
    translated,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from chestxray_covid.audit_data import MaskFunction
    from chestxray_covid.datasets.base import ChestXrayDataset, Sample


@click.command()
@MODEL
@DATA
@click.option(
    "--train",
    "train",
    multiple=True,
    type=HomePath(exists=True, path_type=Path),
    help="Folder or CSV of the data that the model was trained on; may be given several times.",
)
@click.option(
    "--split",
    "side",
    type=click.Choice(["val", "test"]),
    help="Audit only this side of the split that the run was trained with; its training side is "
    "then known, too.",
)
@click.option("--positive", help="Class in question; covid19, or the model's last, if not given.")
@click.option("--negative", help="What it is told from; normal if there is any, else rest.")
@click.option(
    "--masks",
    type=HomePath(exists=True, file_okay=False, path_type=Path),
    help="Folder of lung masks, NAME.png or NAME_mask.png for an image NAME.*; where there is "
    "none, the lungs are found by the bundled network.",
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Audit a random sample of so many images, of each source and label its share.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the sample, the folds and the bootstrap.",
)
@click.option("--output", type=HomePath(dir_okay=False, path_type=Path), help="JSON report.")
@REPORT
@click.option("--strict", is_flag=True, help="Exit with status 1 unless the verdict is pass.")
@BATCH
@DEVICE
@ENGINE
@PRECISION
@translated
def audit(
    model: str | None,
    data: tuple[Path, ...],
    train: tuple[Path, ...],
    side: str | None,
    positive: str | None,
    negative: str | None,
    masks: Path | None,
    limit: int,
    seed: int,
    output: Path | None,
    page: Path | None,
    strict: bool,
    batch_size: int,
    device: str | None,
    engine: str,
    precision: str,
) -> None:
    """Ask whether a model, and the data that it is judged on, tell lungs from sources."""
    from chestxray_covid.audit import audit_shortcuts
    from chestxray_covid.classifier import Classifier

    check_reports({"--output": output}, page, (*data, *train), model, name="audit.json")
    classifier = Classifier.from_pretrained(
        model, device=device, engine=engine, precision=precision
    )
    dataset = open_data(data, classifier.classes)
    trained = open_data(train, classifier.classes) if train else None
    dataset, known = _sides(dataset, place_of_split(model), side, is_told=trained is not None)
    report = audit_shortcuts(
        classifier,
        dataset,
        trained or known,
        positive=positive,
        negative=negative,
        masks=None if masks is None else _from_folder(masks, dataset),
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        progress=True,
    )
    click.echo(str(report))  # before a file that cannot be written would take it along
    if output is not None:
        report.save(output)
    if page is not None:
        from chestxray_covid.report import extend_report

        click.echo(f"\nThe page is {extend_report(page, audit=report)}")
    if strict and report.verdict != "pass":
        sys.exit(1)


def _sides(
    dataset: ChestXrayDataset, saved: Path | None, side: str | None, *, is_told: bool
) -> tuple[ChestXrayDataset, ChestXrayDataset | None]:
    """Return what to audit, and what of the data set a run was trained on, by its saved split."""
    from chestxray_covid.splits import Split, saved_side

    if side is not None:
        if saved is None:
            raise click.UsageError("--split needs --model to be the folder of a training run.")
        split = Split.load(saved, dataset)
        return getattr(split, side), split.train
    if is_told or saved is None or not saved.is_file():
        return dataset, None
    hashes = saved_side(saved, "train")
    held = [sample.content_hash() for sample in dataset.samples]
    seen = dataset.subset([i for i, content in enumerate(held) if content in hashes])
    missing = hashes.difference(held)
    if missing and len(seen):  # whose sources nobody knows here
        raise click.UsageError(
            f"The model was trained on {len(seen)} of these {len(dataset)} images, and on "
            f"{len(missing)} others. Name all that it was trained on with --train, or give all the "
            "data that were split, with --split test."
        )
    return dataset, seen if len(seen) else None


def _from_folder(folder: Path, dataset: ChestXrayDataset) -> MaskFunction:
    """Return what finds the masks of a data set, each by the name of its image."""
    import numpy as np

    from chestxray_covid.errors import ImageError
    from chestxray_covid.image import load_image

    def find(stem: str) -> Path | None:
        places = (folder / f"{stem}.png", folder / f"{stem}_mask.png")
        return next((place for place in places if place.is_file()), None)

    images: dict[str, Path] = {}
    for sample in dataset.samples:
        first = images.setdefault(sample.path.stem, sample.path)
        if first != sample.path and (drawn := find(sample.path.stem)):
            raise click.UsageError(
                f"{drawn} could be the mask of {first} or of {sample.path}: give images and "
                "masks names of their own, or audit the folders one by one."
            )

    if not any(map(find, images)):
        raise click.UsageError(
            f"--masks {folder} holds no mask of these {len(dataset)} images: no "
            f"{min(images)}.png or {min(images)}_mask.png, for example. Name the folder in which "
            "the masks lie, or leave out --masks to have the lungs found."
        )

    def mask(sample: Sample) -> NDArray[np.bool_] | None:
        found = find(sample.path.stem)
        if found is None:
            return None
        drawn = np.asarray(load_image(found))
        white = int(drawn.max())  # some are drawn in 1, not in 255
        is_of_few = white < 128 and not np.isin(drawn, (0, white)).all()
        # A label covers much. Of soft edges no level does, and what is all but black is no label.
        drawn_in = np.bincount(drawn[drawn > white / 8], minlength=1)
        if is_of_few or 4 * drawn_in[: white // 2 + 1].max() > drawn_in.sum() > 0:
            raise ImageError(
                f"{found} has labels from 0 to {white}, of which half would be no lung. Save the "
                "lungs as 255, and all else as 0."
            )
        inside: NDArray[np.bool_] = drawn > white / 2
        return inside

    return mask
