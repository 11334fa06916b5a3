"""The subcommand that judges files: on a screen, into a file, or on a Ray cluster."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from chestxray_covid.command import (
    BATCH,
    DEVICE,
    ENGINE,
    MODEL,
    NOT_A_DEVICE,
    PRECISION,
    HomePath,
    translated,
)
from chestxray_covid.datasets.report import printable, printable_lines
from chestxray_covid.files import looks_like_address

if TYPE_CHECKING:
    from chestxray_covid.batch import PredictedFiles


def _checked(ctx: click.Context, param: click.Parameter, output: str | None) -> str | None:
    if output is not None and not looks_like_address(output):  # which may go elsewhere
        HomePath().convert(output, param, ctx)
    return output


@click.command()
@click.argument("paths", nargs=-1, required=True)
@MODEL
@click.option(
    "--output",
    callback=_checked,
    help="Instead of a table: CSV, JSON lines where the name ends in .jsonl, a folder of Parquet "
    "where it ends in .parquet. Run again after it was stopped, it does the rest.",
)
@BATCH
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Threads that decode; as many as there are cores if not given.",
)
@click.option(
    "--shard-size",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Files that are finished, or done again, together.",
)
@DEVICE
@ENGINE
@PRECISION
@click.option("--ray", "on_ray", is_flag=True, help="On a Ray cluster: RAY_ADDRESS, or this one.")
@click.option("--num-cpus", type=float, help="Ray: per worker; all of a machine if not given.")
@click.option("--num-gpus", type=float, default=0, show_default=True, help="Ray: per worker.")
@translated
def predict(
    paths: tuple[str, ...],
    model: str | None,
    output: str | None,
    batch_size: int,
    workers: int | None,
    shard_size: int,
    device: str | None,
    engine: str,
    precision: str,
    on_ray: bool,
    num_cpus: float | None,
    num_gpus: float,
) -> None:
    """Judge radiographs: files, folders with all image files below them, CSVs with a column path.

    Exits with status 1 if a file could not be judged, and names it.
    """
    from chestxray_covid.classifier import Classifier

    if on_ray and output is None:
        raise click.UsageError("--ray needs --output, a folder whose name ends in .parquet.")
    if on_ray and workers is not None:
        raise click.UsageError("--workers is not for --ray, where --num-cpus threads decode.")
    if not on_ray and (num_cpus is not None or num_gpus):
        raise click.UsageError("--num-cpus and --num-gpus are for --ray; see --device otherwise.")
    classifier = Classifier.from_pretrained(
        model, device=device, engine=engine, precision=precision
    )
    options: dict[str, Any] = {
        "classifier": classifier,
        "batch_size": batch_size,
        "shard_size": shard_size,
        "progress": True,
    }
    if output is None:
        failed = _show(classifier, paths, batch_size=batch_size, workers=workers)
    elif on_ray:
        found = _on_ray(paths, output, num_cpus=num_cpus, num_gpus=num_gpus, **options)
        failed = dict(found.failed)
    else:
        from chestxray_covid.batch import predict_files

        failed = dict(predict_files(paths, output, workers=workers, **options).failed)
    for path, reason in failed.items():
        named = path in reason or ascii(path) in reason
        click.echo(printable(f"failed: {reason if named else f'{path}: {reason}'}"), err=True)
    click.echo(NOT_A_DEVICE, err=True)
    if failed:
        sys.exit(1)


def _show(
    classifier: Any, paths: tuple[str, ...], *, batch_size: int, workers: int | None
) -> dict[str, str]:
    """Print a table, and return path → reason of the files that failed."""
    from chestxray_covid.batch import judge_files
    from chestxray_covid.places import Places, no_image_file
    from chestxray_covid.prediction import FailedPrediction
    from chestxray_covid.prediction_table import heading, line
    from chestxray_covid.shards import listed

    failed = {}
    files = listed(paths, Places())
    empty = True
    for result in judge_files(classifier, files, batch_size=batch_size, workers=workers):
        if empty:
            click.echo(heading(classifier.classes))
        empty = False
        click.echo(line(result))
        if isinstance(result, FailedPrediction):
            failed[result.source] = str(result.error)
    if empty:
        raise no_image_file(", ".join(paths))
    return failed


def _on_ray(paths: tuple[str, ...], output: str, **options: Any) -> PredictedFiles:
    from chestxray_covid.batch import ray_predict
    from chestxray_covid.errors import require_extra

    # Ray reports its use to its makers unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = require_extra("ray", "ray")
    try:
        return ray_predict(paths, output, **options)
    except ray.exceptions.RayError as error:
        raise click.ClickException(
            f"Ray gave up, and what was finished is kept: {printable_lines(str(error))}"
        ) from error
    finally:
        ray.shutdown()
