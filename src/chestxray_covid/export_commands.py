"""Subcommands that take models elsewhere."""

from __future__ import annotations

from pathlib import Path

import click

from chestxray_covid.command import (
    DATA,
    MODEL,
    NEW_CHECKPOINT,
    HomePath,
    carry_split,
    check_new_checkpoint,
    translated,
)


@click.command()
@click.argument("images", nargs=-1, type=HomePath(exists=True, path_type=Path))
@MODEL
@click.option(
    "--format",
    "kind",
    type=click.Choice(["onnx", "openvino", "torch"]),
    default="onnx",
    show_default=True,
    help="ONNX, OpenVINO's model.xml and model.bin, or torch.export's model.pt2.",
)
@click.option(
    "--output",
    required=True,
    type=HomePath(file_okay=False, path_type=Path),
    help="Folder for the file, its card and README.",
)
@translated
def export(images: tuple[Path, ...], model: str | None, kind: str, output: Path) -> None:
    """Write a model as one file for another runtime, with a card of what it expects.

    The file is compared with the model first, on IMAGES, files and folders, or on phantoms.
    """
    from chestxray_covid.export import export_model

    place = export_model(model, output, format=kind, images=[*map(str, images)] or None)
    click.echo((place / "README.md").read_text(encoding="utf-8"))
    click.echo(f"Everything is in {place}.")


@click.command()
@MODEL
@DATA
@click.option(
    "--calibration",
    multiple=True,
    required=True,
    type=HomePath(exists=True, path_type=Path),
    help="Radiographs, files or folders, some 200; may be given several times.",
)
@NEW_CHECKPOINT
@translated
def quantize(
    model: str | None, data: tuple[Path, ...], calibration: tuple[Path, ...], output: Path
) -> None:
    """Make a checkpoint for --precision int8, unless an AUROC on --data moves by over 0.005."""
    from chestxray_covid.checkpoint import load_config
    from chestxray_covid.datasets.base import concatenate
    from chestxray_covid.datasets.folder import open_dataset
    from chestxray_covid.hub import resolve
    from chestxray_covid.quantization import quantize as quantise

    folder = resolve(model)
    check_new_checkpoint(output, folder)
    classes = load_config(folder).classes
    parts = [open_dataset(path, classes=classes) for path in data]
    evaluation = parts[0] if len(parts) == 1 else concatenate(parts)
    report = quantise(model, [*map(str, calibration)], evaluation=evaluation, output=output)
    carry_split(model, output)
    click.echo(f"{report}\nThe checkpoint is in {output}.")
