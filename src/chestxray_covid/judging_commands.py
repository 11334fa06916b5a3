"""Subcommands that judge a model, and choose its temperature and threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chestxray_covid.command import (
    BATCH,
    DATA,
    DEVICE,
    ENGINE,
    MODEL,
    NEW_CHECKPOINT,
    PRECISION,
    REPORT,
    HomePath,
    carry_split,
    check_new_checkpoint,
    check_reports,
    open_data,
    place_of_split,
    translated,
    warn_of_seen,
)

if TYPE_CHECKING:
    from chestxray_covid.datasets.base import ChestXrayDataset
    from chestxray_covid.evaluation_report import EvaluationReport

#: Side of a split → why numbers on it flatter the model.
_FLATTERED = {
    "train": "the model was trained on these images",
    "val": "the epoch, and perhaps the threshold, was chosen on these images",
}
_SHARE = click.FloatRange(0, 1, min_open=True)


@click.command()
@MODEL
@DATA
@click.option(
    "--split",
    "side",
    type=click.Choice(["train", "val", "test"]),
    help="Judge only this side of the split that the run was trained with.",
)
@click.option(
    "--threshold",
    "thresholds",
    multiple=True,
    type=float,
    help="Decide at this score; the checkpoint's threshold if neither this nor a target is given.",
)
@click.option(
    "--target-sensitivity",
    "sensitivities",
    multiple=True,
    type=_SHARE,
    help="Decide at the highest score that reaches it, a fraction. Chosen on --choose-on.",
)
@click.option(
    "--target-specificity",
    "specificities",
    multiple=True,
    type=_SHARE,
    help="Decide at the lowest score that reaches it, a fraction. Chosen on --choose-on.",
)
@click.option(
    "--choose-on",
    type=HomePath(exists=True, dir_okay=False, path_type=Path),
    help="JSON report of the model on validation data, for the targets; else the same images, "
    "and the report says so.",
)
@click.option(
    "--versus",
    help="Decide against this class alone, by p / (p + p(class)); against all others if not given.",
)
@click.option(
    "--prevalence",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of positives where the model would be used, for the predictive values.",
)
@click.option("--output", type=HomePath(dir_okay=False, path_type=Path), help="JSON report.")
@REPORT
@click.option(
    "--markdown",
    type=HomePath(dir_okay=False, path_type=Path),
    help="The report as Markdown, with the items of CLAIM and TRIPOD+AI.",
)
@BATCH
@DEVICE
@ENGINE
@PRECISION
@translated
def evaluate(
    model: str | None,
    data: tuple[Path, ...],
    side: str | None,
    thresholds: tuple[float, ...],
    sensitivities: tuple[float, ...],
    specificities: tuple[float, ...],
    choose_on: Path | None,
    versus: str | None,
    prevalence: float | None,
    output: Path | None,
    page: Path | None,
    markdown: Path | None,
    batch_size: int,
    device: str | None,
    engine: str,
    precision: str,
) -> None:
    """Judge a model on data sets, with intervals by patient, overall and per subgroup."""
    from chestxray_covid.classifier import Classifier
    from chestxray_covid.evaluation import evaluate as judge
    from chestxray_covid.evaluation_report import EvaluationReport
    from chestxray_covid.files import write_files
    from chestxray_covid.splits import Split

    written = {"--output": output, "--markdown": markdown}
    check_reports(written, page, (*data, choose_on), model, name="evaluation.json")
    classifier = Classifier.from_pretrained(
        model, device=device, engine=engine, precision=precision
    )
    rules = [
        *({"threshold": threshold} for threshold in thresholds),
        *({"sensitivity": target} for target in sensitivities),
        *({"specificity": target} for target in specificities),
    ]
    if choose_on is not None and not (sensitivities or specificities):
        raise click.UsageError("--choose-on is for --target-sensitivity or --target-specificity.")
    usual = not rules and versus is None and {"covid19", "normal"} <= set(classifier.classes)
    if usual:  # what Prediction.is_positive says
        rules, versus = [{"threshold": classifier.config.threshold}], "normal"
    if not rules and (versus, prevalence) != (None, None):
        raise click.UsageError(
            "--versus and --prevalence need --threshold, --target-sensitivity or "
            "--target-specificity."
        )
    if versus is not None and versus not in classifier.classes:
        raise click.UsageError(f"--versus must be one of {', '.join(classifier.classes)}.")
    chosen_on = EvaluationReport.load(choose_on) if choose_on is not None else None
    if chosen_on is not None and chosen_on.weights_sha256 not in ("", classifier.weights_sha256):
        raise click.UsageError("--choose-on is the report of another model: evaluate this one.")
    dataset = open_data(data, classifier.classes)
    saved = place_of_split(model)
    if side is not None and saved is None:
        raise click.UsageError("--split needs --model to be the folder of a training run.")
    if side is not None and saved is not None:
        dataset = getattr(Split.load(saved, dataset), side)
        if side in _FLATTERED:
            click.echo(f"Caution: {_FLATTERED[side]}; use --split test for a judgement.", err=True)
    else:
        warn_of_seen(saved, dataset, "use --split test for those that it never saw")
    if usual and not {s.label for s in dataset.samples} & {"covid19", "normal"}:
        rules = []
    _check_rules(rules, classifier.classes, dataset, chosen_on, versus)
    report = judge(classifier, dataset, batch_size=batch_size, progress=True)
    points = [
        report.operating_point(**rule, prevalence=prevalence, versus=versus, chosen_on=chosen_on)
        for rule in rules
    ]
    report = replace(report, operating_points=tuple(points))
    click.echo(str(report))  # before a file that cannot be written would take it along
    if output is not None:
        report.save(output)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        write_files(markdown.parent, {markdown.name: report.to_markdown().encode()})
    if page is not None:
        from chestxray_covid.report import extend_report

        click.echo(f"\nThe page is {extend_report(page, evaluation=report)}")


@click.command()
@MODEL
@DATA
@click.option(
    "--split",
    "side",
    type=click.Choice(["val", "all"]),
    help="val: the validation side of the split that the run was trained with, which is taken if "
    "there is one. all: every image of --data, which must be of other patients than trained on.",
)
@click.option(
    "--sensitivity",
    type=_SHARE,
    help="The threshold becomes one that reaches it for covid19 against normal; 0.9 if not given, "
    "where the model tells these apart.",
)
@NEW_CHECKPOINT
@DEVICE
@translated
def calibrate(
    model: str | None,
    data: tuple[Path, ...],
    side: str | None,
    sensitivity: float | None,
    output: Path,
    device: str | None,
) -> None:
    """Choose a model's temperature and threshold on validation data; write a new checkpoint."""
    from chestxray_covid.calibration import calibrate as choose
    from chestxray_covid.checkpoint import load_config
    from chestxray_covid.hub import resolve
    from chestxray_covid.splits import Split

    folder = resolve(model)
    check_new_checkpoint(output, folder)
    classes = load_config(folder).classes
    is_told = {"covid19", "normal"} <= set(classes)
    if sensitivity is not None and not is_told:
        raise click.UsageError(
            "--sensitivity is for covid19 against normal, and the model tells "
            f"{', '.join(classes)} apart: leave it out."
        )
    dataset = open_data(data, classes)
    saved = place_of_split(model)
    if side == "val" and saved is None:
        raise click.UsageError("--split val needs --model to be the folder of a training run.")
    if saved is not None and (side == "val" or (side is None and saved.is_file())):
        dataset = Split.load(saved, dataset).val
        click.echo("Chosen on the validation side of the run's split.")
    else:
        warn_of_seen(saved, dataset, "leave out --split for those of validation")
    if sensitivity is None and is_told:
        sensitivity = 0.9
    report = choose(
        model, dataset, output=output, sensitivity=sensitivity, device=device, progress=True
    )
    carry_split(model, output)
    click.echo(f"{report}\nThe checkpoint is in {output}. Judge it on other data.")


def _check_rules(
    rules: Sequence[Mapping[str, Any]],
    classes: tuple[str, ...],
    dataset: ChestXrayDataset,
    chosen_on: EvaluationReport | None,
    versus: str | None,
) -> None:
    """Raise now, not after an hour of predictions, unless every rule gives a threshold."""
    from chestxray_covid.judged_images import default_positive
    from chestxray_covid.operating_points import choose_threshold

    positive = default_positive(classes)
    if versus == positive:
        raise click.UsageError(f"--versus must be another class than {positive}, the positive one.")
    sides = {positive, versus} if versus else set(classes)
    truth = [s.label == positive for s in dataset.samples if s.label in sides]
    if rules and not truth:
        raise click.UsageError(f"The data hold no image of {' or '.join(sorted(sides))}.")
    if chosen_on is not None and chosen_on.classes != classes:
        raise click.UsageError(
            f"--choose-on tells {', '.join(chosen_on.classes)} apart, the model "
            f"{', '.join(classes)}: evaluate this one."
        )
    for rule in rules:
        if chosen_on is not None:
            chosen_on.operating_point(**rule, versus=versus)
        else:
            choose_threshold(truth, [0.0] * len(truth), **rule)
