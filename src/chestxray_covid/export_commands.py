"""Subcommands that take models elsewhere."""

from __future__ import annotations

from pathlib import Path

import click

from chestxray_covid.command import MODEL, translated


@click.command()
@click.argument("images", nargs=-1, type=click.Path(exists=True, path_type=Path))
@MODEL
@click.option(
    "--format",
    "kind",
    type=click.Choice(["onnx", "openvino", "torch"]),
    default="onnx",
    show_default=True,
    help="ONNX, OpenVINO's model.xml and model.bin, or torch.export's model.pt2.",
)
@click.option("--output", required=True, type=click.Path(file_okay=False, path_type=Path))
@translated
def export(images: tuple[Path, ...], model: str | None, kind: str, output: Path) -> None:
    """Write a model as one file for another runtime, with a card of what it expects.

    The file is compared with the model first, on IMAGES, files and folders, or on phantoms.
    """
    from chestxray_covid.export import export_model

    place = export_model(model, output, format=kind, images=list(images) or None)
    click.echo((place / "README.md").read_text(encoding="utf-8"))
    click.echo(f"Everything is in {place}.")
