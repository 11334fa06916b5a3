"""Thin subcommands over the public API; what is heavy is imported when a command runs."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chestxray_covid._version import __version__
from chestxray_covid.audit_commands import audit
from chestxray_covid.batch_commands import predict
from chestxray_covid.command import (
    DATA,
    NOT_A_DEVICE,
    SPLIT_NAME,
    HomePath,
    is_first_process,
    open_data,
    place_of_split,
    training_options,
    translated,
    warn_of_seen,
)
from chestxray_covid.export_commands import export, quantize
from chestxray_covid.hub_commands import models, push
from chestxray_covid.judging_commands import calibrate, evaluate

if TYPE_CHECKING:
    from chestxray_covid.confounders import Confounding
    from chestxray_covid.datasets.base import ChestXrayDataset
    from chestxray_covid.splits import Split
    from chestxray_covid.training import Trainer
    from chestxray_covid.training_config import Callback


#: Subcommands in the order of use, which is that of the help.
_ORDER = ("predict", "models", "download", "train", "calibrate", "evaluate", "audit", "export")


class _InOrder(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        last = sorted(self.commands.keys() - {*_ORDER})
        return [*_ORDER, *last]


@click.group(cls=_InOrder, epilog=NOT_A_DEVICE, context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="chestxray-covid")
def main() -> None:
    """COVID-19 classification of chest radiographs with DenseNet-121."""


for subcommand in (audit, calibrate, evaluate, predict, models, push, export, quantize):
    main.add_command(subcommand)


@main.command()
@click.argument("source", type=click.Choice(["cohen", "kermany", "phantoms"]))
@click.argument("folder", type=HomePath(path_type=Path))
@click.option("--ref", help="Cohen: branch, tag or commit; master if not given.")
@click.option("--all-views", is_flag=True, help="Cohen: also lateral views and CT slices.")
@click.option(
    "--archive",
    type=HomePath(exists=True, dir_okay=False, path_type=Path),
    help="Kermany: a zip that you have already, unpacked into FOLDER. Else kagglehub fetches the "
    "collection into its own cache; use the folder that the command names.",
)
@click.option("--count", type=click.IntRange(3), help="Phantoms: number; 200 if not given.")
@click.option("--seed", type=click.IntRange(0), help="Phantoms: other numbers, other patients.")
@translated
def download(
    source: str,
    folder: Path,
    ref: str | None,
    all_views: bool,
    archive: Path | None,
    count: int | None,
    seed: int | None,
) -> None:
    """Fetch a public data set into FOLDER, or draw phantoms there."""
    given: dict[str, dict[str, object]] = {
        "cohen": {"--ref": ref, "--all-views": all_views or None},
        "kermany": {"--archive": archive},
        "phantoms": {"--count": count, "--seed": seed},
    }
    for other in given.keys() - {source}:
        if wrong := [name for name, value in given[other].items() if value is not None]:
            verb = "are" if len(wrong) > 1 else "is"
            raise click.UsageError(f"{' and '.join(wrong)} {verb} for {other} alone, not {source}.")
    if source == "cohen":
        from chestxray_covid.datasets.cohen import is_frontal_radiograph
        from chestxray_covid.datasets.download import download_cohen

        include = None if all_views else is_frontal_radiograph
        place = download_cohen(folder, ref=ref or "master", include=include)
    elif source == "kermany":
        from chestxray_covid.datasets.download import download_kermany

        place = download_kermany(folder, archive=archive)
    else:
        from chestxray_covid.datasets.base import LABELS
        from chestxray_covid.datasets.synthetic import SyntheticChestXray

        place = SyntheticChestXray(count or 200, classes=LABELS, seed=seed or 0).save(folder)
    click.echo(f"{source} is in {place}")


@main.command()
@DATA
@click.option(
    "--output", required=True, type=HomePath(file_okay=False, path_type=Path), help="Run folder."
)
@click.option(
    "--recipe",
    type=click.Choice(["recommended", "baseline"]),
    default="recommended",
    show_default=True,
    help="The recommended recipe, or the classic one of the field's first notebooks.",
)
@click.option(
    "--config",
    "file",
    type=HomePath(exists=True, dir_okay=False, path_type=Path),
    help="Options of TrainingConfig instead of the recipe's: a JSON file, or config.json of a run. "
    "What is given here overrides it.",
)
@click.option(
    "--no-pretrained", is_flag=True, help="Start from random weights instead of ImageNet's."
)
@click.option(
    "--pretrained",
    "checkpoint",
    help="Start from a checkpoint, a folder, bundled model or user/name, instead of ImageNet's: "
    "from its weights and its preprocessing.",
)
@click.option(
    "--trainable",
    default="all",
    show_default=True,
    help="all, head, or the first block that trains, for example denseblock4.",
)
@click.option(
    "--classes",
    default="normal,covid19",
    show_default=True,
    help="Labels to learn, separated by commas; also known: pneumonia.",
)
@click.option("--epochs", type=click.IntRange(1), help="Instead of the recipe's number.")
@click.option("--batch-size", help="Instead of the recipe's; auto for the largest that fits.")
@click.option("--learning-rate", type=float, help="Instead of the recipe's.")
@click.option(
    "--size",
    type=click.IntRange(32),
    help="Side of the input in pixels, instead of the recipe's or of that of --pretrained.",
)
@click.option("--limit", type=click.IntRange(1), help="Images per class, for a trial run.")
@click.option(
    "--no-copies",
    is_flag=True,
    help="Do not look for duplicates before the split: that takes 21 KiB of memory an image, and "
    "time by the square of their number. Patients stay on one side all the same.",
)
@click.option(
    "--cache",
    type=HomePath(file_okay=False, path_type=Path),
    help="Folder for decoded pixels, so that later epochs and runs need not decode.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu"]),
    help="auto takes a GPU if there is one, as do runs that name none.",
)
@click.option("--workers", type=click.IntRange(1), help="Threads that decode, instead of 2.")
@click.option(
    "--seed",
    type=click.IntRange(0),
    help="Of split, order, variation and random weights, instead of 0.",
)
@click.option("--resume", is_flag=True, help="Continue an interrupted run, with its split.")
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory, more time.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
@translated
def train(
    data: tuple[Path, ...],
    output: Path,
    recipe: str,
    file: Path | None,
    no_pretrained: bool,
    checkpoint: str | None,
    trainable: str,
    classes: str,
    epochs: int | None,
    batch_size: str | None,
    learning_rate: float | None,
    size: int | None,
    limit: int | None,
    no_copies: bool,
    cache: Path | None,
    device: str | None,
    workers: int | None,
    seed: int | None,
    resume: bool,
    gradient_checkpointing: bool,
    quiet: bool,
) -> None:
    """Train on data sets, split by patient, and judge the model on patients it never saw."""
    if no_pretrained and checkpoint is not None:
        raise click.UsageError("--no-pretrained and --pretrained exclude each other.")
    _check_run_folder(output, resume=resume)
    labels = _labels(classes)
    first = is_first_process()
    dataset = open_data(data, labels)
    if absent := [label for label in labels if label not in {s.label for s in dataset.samples}]:
        raise click.UsageError(
            f"--data holds no image of {' and '.join(absent)}, which --classes names. "
            "What is above says which labels it holds."
        )

    # Where glibc was not told to keep memory (see __main__.py): torch reads this once, at its first
    # allocation, and Linux then gives memory in huge pages. This process is ours to set up.
    if "GLIBC_TUNABLES" not in os.environ:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

    from chestxray_covid.checkpoint import load_config
    from chestxray_covid.classifier import Classifier
    from chestxray_covid.confounders import confounding
    from chestxray_covid.evaluation import evaluate as judge
    from chestxray_covid.hub import resolve
    from chestxray_covid.models import build_densenet121
    from chestxray_covid.training import Trainer
    from chestxray_covid.training_config import TrainingConfig

    config = TrainingConfig.baseline() if recipe == "baseline" else TrainingConfig()
    start = None if checkpoint is None else resolve(checkpoint)
    if start is not None:
        config = replace(config, preprocess=load_config(start).preprocess)
    if file is not None:
        config = training_options(file, config)
    wanted: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": _batch_size(batch_size),
        "learning_rate": learning_rate,
        "preprocess": None if size is None else replace(config.preprocess, size_px=size),
        "cache_dir": None if cache is None else str(cache),
        "gradient_checkpointing": gradient_checkpointing or None,
        "device": device,
        "workers": workers,
        "seed": seed,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    # The command says itself how far the source gives the label away.
    given |= {"allow_confounded_sources": True, "progress": first and not quiet}
    config = replace(config, **given)
    seed = config.seed
    if limit is not None:
        dataset = dataset.limit(limit, seed=seed)
    model = build_densenet121(
        not no_pretrained if start is None else start,
        trainable=trainable,
        num_classes=len(labels),
        seed=seed,
    )
    options = {"seed": seed, "find_copies": not no_copies, "progress": config.progress}
    split = _split(dataset, output, resume=resume, **options)
    found = confounding(dataset)
    if first and checkpoint is not None:
        cure = "take the --data and --seed of its run, for the same sides, or judge on others"
        began = {"who": "--pretrained", "whose": "the test side's"}
        warn_of_seen(place_of_split(checkpoint), split.test, cure, **began)
    click.echo(f"\n{found}\n")
    keep = [_keeping(split, found, output, resume=resume)] if first else []
    trainer = Trainer(model, split.train, split.val, config, output=output, callbacks=keep)
    history = trainer.fit(resume=resume)
    if not first:
        return
    if not (output / SPLIT_NAME).is_file():  # of a run that was finished already, of this split
        split.save(output / SPLIT_NAME)
    best = history.best
    click.echo(f"\nBest epoch: {best.epoch} of {len(history)}, val loss {best.val_loss:.4f}")
    classifier = Classifier.from_pretrained(output)
    report = judge(classifier, split.test, progress=not quiet)
    report.save(output / "evaluation.json")
    click.echo(f"\n{report}\n\nEverything is in {output}. {NOT_A_DEVICE}")


@main.command()
@click.option("--model", help="Also describe this checkpoint, as for predict.")
@translated
def info(model: str | None) -> None:
    """Show versions, devices and optional packages, and what a checkpoint is."""
    import importlib.metadata as metadata
    import platform

    import torch

    from chestxray_covid.engine_torch import accelerator_type, native_bfloat16

    click.echo(f"chestxray-covid {__version__}, Python {platform.python_version()}")
    for name in (
        "torch",
        "torchvision",
        "numpy",
        "pillow",
        "huggingface-hub",
        "openvino",
        "onnxruntime",
        "pydicom",
    ):
        try:
            click.echo(f"  {name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            click.echo(f"  {name} not installed")
    kind = accelerator_type()
    precision = "bfloat16" if native_bfloat16(torch.device(kind)) else "float32"
    click.echo(f"  device {kind}, trains in {precision}, {torch.get_num_threads()} threads")
    if model is not None:
        from chestxray_covid.checkpoint import load_checkpoint
        from chestxray_covid.hub import resolve

        config, _ = load_checkpoint(resolve(model))
        click.echo(json.dumps(config.to_dict(), indent=2))
    click.echo(NOT_A_DEVICE)


def _batch_size(given: str | None) -> int | str | None:
    if given in (None, "auto"):
        return given
    try:
        return int(str(given))
    except ValueError:
        raise click.UsageError(f"--batch-size must be a number or auto, got {given!r}.") from None


def _labels(classes: str) -> tuple[str, ...]:
    labels = tuple(name.strip() for name in classes.split(",") if name.strip())
    if len(labels) < 2:
        raise click.UsageError(f"--classes needs at least two labels, got {classes!r}.")
    return labels


def _check_run_folder(output: Path, *, resume: bool) -> None:
    """Raise if a run would be overwritten, or there is none to resume."""
    from chestxray_covid.training_state import StateStore

    holds_run = StateStore(output).holds_run()
    if holds_run and not resume:
        raise click.UsageError(f"{output} already holds a run: use --resume or another folder.")
    if resume and not holds_run:
        raise click.UsageError(f"{output} holds no run to continue: leave out --resume.")


def _split(dataset: ChestXrayDataset, output: Path, *, resume: bool, **options: Any) -> Split:
    """Return the run's split: that of a run that is resumed, else a new one."""
    from chestxray_covid.splits import Split, split_by_patient

    saved = output / SPLIT_NAME
    if resume and saved.is_file():  # one that is left of a run that never came to a state is not
        return Split.load(saved, dataset)
    return split_by_patient(dataset, **options)


def _keeping(split: Split, found: Confounding, output: Path, *, resume: bool) -> Callback:
    """Return what writes down how a run began, as soon as no other run can have its folder."""
    from chestxray_covid.training_config import Callback

    class Keeping(Callback):
        def on_train_begin(self, trainer: Trainer) -> None:
            if not (resume and (output / SPLIT_NAME).is_file()):
                split.save(output / SPLIT_NAME)
            _write_json(output / "confounding.json", found.to_dict())

    return Keeping()


def _write_json(path: Path, data: Any) -> None:
    from chestxray_covid.files import write_files

    write_files(path.parent, {path.name: json.dumps(data, indent=1).encode()})
