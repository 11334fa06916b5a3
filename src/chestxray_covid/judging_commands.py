"""Subcommands that judge a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from chestxray_covid.command import (
    BATCH,
    DATA,
    DEVICE,
    MODEL,
    REPORT,
    SPLIT_NAME,
    open_data,
    translated,
)

if TYPE_CHECKING:
    from chestxray_covid.datasets.base import ChestXrayDataset


@click.command()
@MODEL
@DATA
@click.option(
    "--split",
    "side",
    type=click.Choice(["train", "val", "test"]),
    help="Judge only this side of the split that the run was trained with.",
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON report.")
@REPORT
@BATCH
@DEVICE
@translated
def evaluate(
    model: str | None,
    data: tuple[Path, ...],
    side: str | None,
    output: Path | None,
    page: Path | None,
    batch_size: int,
    device: str | None,
) -> None:
    """Judge a model on data sets, with intervals by patient, per source and per view."""
    from chestxray_covid.classifier import Classifier
    from chestxray_covid.evaluation import evaluate as judge
    from chestxray_covid.splits import Split

    classifier = Classifier.from_pretrained(model, device=device)
    dataset = open_data(data, classifier.classes)
    saved = Path(model) / SPLIT_NAME if model and Path(model).is_dir() else None
    if side is not None and saved is None:
        raise click.UsageError("--split needs --model to be the folder of a training run.")
    if side is not None and saved is not None:
        dataset = getattr(Split.load(saved, dataset), side)
    elif saved is not None and saved.is_file():
        seen = _count_seen(saved, dataset)
        if seen:
            click.echo(
                f"Caution: the model was trained on {seen} of these {len(dataset)} images; "
                "use --split test for those that it never saw.",
                err=True,
            )
    report = judge(classifier, dataset, batch_size=batch_size, progress=True)
    if output is not None:
        report.save(output)
    click.echo(str(report))
    if page is not None:
        from chestxray_covid.report import write_report

        click.echo(f"\nThe page is {write_report(page, evaluation=report)}")


def _count_seen(saved: Path, dataset: ChestXrayDataset) -> int:
    from chestxray_covid.splits import saved_side

    trained = saved_side(saved, "train")
    return sum(s.content_hash() in trained for s in dataset.samples)
