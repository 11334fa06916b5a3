"""What the subcommands share: options, and how errors become messages."""

from __future__ import annotations

import codecs
import contextlib
import errno
import functools
import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from chestxray_covid._version import NOT_A_DEVICE as NOT_A_DEVICE
from chestxray_covid.datasets.report import brief, printable_lines
from chestxray_covid.errors import ChestXrayError, ConfigError, TrainingInterrupted
from chestxray_covid.files import (
    MAX_JSON_BYTES,
    check_replaceable,
    expanded,
    is_folder,
    parse_json,
    read_limited,
)

if TYPE_CHECKING:
    from chestxray_covid.datasets.base import ChestXrayDataset
    from chestxray_covid.training_config import TrainingConfig

Command = TypeVar("Command", bound=Callable[..., Any])

#: The split beside the checkpoint of a training run.
SPLIT_NAME = "split.json"
#: Ends of the names of tables, in small letters.
_TABLES = frozenset({".csv", ".tsv", ".jsonl", ".parquet", ".xls", ".xlsx"})


class HomePath(click.Path):
    """A path in which ``~`` is the home folder; of ``--output=~/run`` no shell makes that.

    One that will be written is refused at once, not after hours, where no folder can take it.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        try:
            path = super().convert(expanded(value) if value else value, param, ctx)  # "" is no path
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not self.exists:
            if not value:
                self.fail("An empty path names no place to write.", param, ctx)
            if os.fspath(value) in ("-", b"-"):
                kind = "file" if self.file_okay else "folder"
                self.fail(
                    f"- is no standard output here, but would be a {kind}. Name one, and copy it "
                    "there, or write ./- for that name.",
                    param,
                    ctx,
                )
            self._check_writable(Path(os.fsdecode(path)).absolute(), param, ctx)
        return path

    def fail(
        self,
        message: str,
        param: click.Parameter | None = None,
        ctx: click.Context | None = None,
    ) -> NoReturn:
        """Raise what is wrong with a path, of which no name is to steer a terminal."""
        super().fail(printable_lines(message), param, ctx)

    def _check_writable(
        self, path: Path, param: click.Parameter | None, ctx: click.Context | None
    ) -> None:
        try:
            check_replaceable(path)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        above = (p for p in path.parents if os.path.lexists(p))
        # Of a drive of Windows that is not there, nothing is.
        place = path if is_folder(path) else next(above, path.parent)
        if not self.file_okay and os.path.islink(path) and not is_folder(path):  # noqa: PTH114
            self.fail(f"{path} cannot be written: it is a link to nothing.", param, ctx)
        if not is_folder(place):
            self.fail(f"{path} cannot be written: {place} is no folder.", param, ctx)
        if not os.access(place, os.W_OK):
            self.fail(f"{path} cannot be written: {place} is not writable.", param, ctx)


DATA = click.option(
    "--data",
    "data",
    multiple=True,
    required=True,
    type=HomePath(exists=True, path_type=Path),
    help="Folder or CSV of a data set; may be given several times.",
)
MODEL = click.option(
    "--model",
    default=None,
    help="Folder, for example the output of train, bundled model or repository of the Hub, "
    "user/name; the bundled default if not given.",
)
REPORT = click.option(
    "--report",
    "page",
    type=HomePath(file_okay=False, path_type=Path),
    help="Folder for a page with figures, index.html, and the JSON beside it; evaluate and audit "
    "of the same model share a page there.",
)
DEVICE = click.option("--device", default=None, help="Torch device, for example cpu or cuda.")
ENGINE = click.option(
    "--engine",
    type=click.Choice(["auto", "openvino", "onnx", "torch"]),
    default="auto",
    show_default=True,
    help="Runtime; auto takes the fastest that is installed.",
)
PRECISION = click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "int8"]),
    default="auto",
    show_default=True,
    help="What it computes in; auto takes the fastest that keeps the model's probabilities.",
)
NEW_CHECKPOINT = click.option(
    "--output",
    required=True,
    type=HomePath(file_okay=False, path_type=Path),
    help="Folder of the new checkpoint.",
)
BATCH = click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Images computed at once.",
)


def is_first_process() -> bool:
    """Return whether this is the process that writes and speaks; others are silent from here on.

    torchrun and ``accelerate launch`` number the processes of a run in ``RANK``.
    """
    first = os.environ.get("RANK", "0") == "0"
    if not first:
        silent = contextlib.redirect_stdout(io.StringIO())
        click.get_current_context().with_resource(silent)
    return first


def translated(command: Command) -> Command:
    """Turn the library's errors into a message and an exit status.

    A name from data, in these or in those of the usage, is not to steer a terminal.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A name that its encoding lacks is no reason to stop; stderr does so by itself.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return command(*args, **kwargs)
        except TrainingInterrupted as stop:
            click.echo(str(stop), err=True)
            sys.exit(128 + stop.signal_number)
        except click.UsageError as error:
            raise click.UsageError(printable_lines(error.message), error.ctx) from error
        except (ChestXrayError, ValueError, OSError) as error:
            if getattr(error, "errno", None) == errno.EPIPE:
                raise  # of "| head": whoever reads has enough, and click ends without a word
            notes = [str(error), *getattr(error, "__notes__", ())]
            raise click.ClickException(printable_lines("\n".join(notes))) from error

    return run  # type: ignore[return-value]


def training_options(path: Path, base: TrainingConfig) -> TrainingConfig:
    """Return options with those in a file in their place.

    The file is a JSON object of them, or the ``config.json`` of a run, which holds one.

    Raises:
        ConfigError: If it is neither, with its name.
    """
    from chestxray_covid.training_config import TrainingConfig

    try:
        data = read_limited(path, MAX_JSON_BYTES)
        options = parse_json(data.removeprefix(codecs.BOM_UTF8))  # as some editors write by hand
        if isinstance(options, dict) and "format_version" in options:  # of a checkpoint
            provenance = options.get("provenance")
            options = provenance.get("training") if isinstance(provenance, dict) else None
            if options is None:
                raise ConfigError("This checkpoint does not say with which options it was trained")
        return TrainingConfig.from_dict(options, base=base)
    except ConfigError as error:
        said = brief(str(error)).rstrip(".")
        raise ConfigError(
            f"{path}: {said}. Expected a JSON object of TrainingConfig's options, for example "
            '{"epochs": 3}, or the config.json of a run.'
        ) from error


def place_of_split(model: str | None) -> Path | None:
    """Return where the split of a run lies, if it has one; ``None`` for what is no folder."""
    folder = expanded(model) if model else None
    return folder / SPLIT_NAME if folder and folder.is_dir() else None


def check_reports(
    written: Mapping[str, Path | None],
    page: Path | None,
    read: Iterable[Path | None],
    model: str | None,
    *,
    name: str,
) -> None:
    """Raise if a report would replace what it is made from or another one, or pass for a table.

    ``written`` maps options to the files that they name, ``read`` is what else the command reads,
    and ``name`` is what the one of ``--output`` is called beside the page.
    """
    from chestxray_covid.checkpoint import CONFIG_NAME, WEIGHTS_NAME
    from chestxray_covid.image import IMAGE_SUFFIXES

    saved = place_of_split(model)
    own = [saved.with_name(n) for n in (CONFIG_NAME, WEIGHTS_NAME, SPLIT_NAME)] if saved else []
    # realpath, for Path.resolve() of older Pythons raises where a link leads to itself.
    kept = {os.path.realpath(path) for path in (*read, *own) if path is not None}
    taken = set[str]()
    if page is not None:
        from chestxray_covid.report import AUDIT_NAME, EVALUATION_NAME, PAGE_NAME, check_page

        check_page(page)
        beside = (PAGE_NAME, EVALUATION_NAME, AUDIT_NAME)
        taken = {os.path.realpath(page / one) for one in beside}
        if os.path.realpath(page / EVALUATION_NAME) in kept:
            raise click.UsageError(
                f"--report {page} would replace {EVALUATION_NAME} in it, which this command reads. "
                "Give it another folder."
            )
    for option, path in written.items():
        if path is None:
            continue
        if path.suffix.lower() in {*IMAGE_SUFFIXES, *_TABLES}:
            raise click.UsageError(
                f"{option} {path} is named like a table or an image, and a report is neither. "
                "Expected a name that ends in .json, or in .md for Markdown."
            )
        if (place := os.path.realpath(path)) in kept:
            raise click.UsageError(
                f"{option} {path} would replace what the report is made from. Give it another name."
            )
        is_same = page and option == "--output" and place == os.path.realpath(page / name)
        if place in taken and not is_same:
            raise click.UsageError(
                f"{option} {path} is the place of another report, of this command or on its page. "
                "Give it another name."
            )
        taken.add(place)


def check_new_checkpoint(output: Path, model: Path) -> None:
    """Raise if a checkpoint made of a model would replace one of another network."""
    from chestxray_covid.calibration import check_replaced
    from chestxray_covid.checkpoint import load_checkpoint

    original = load_checkpoint(model)
    try:
        check_replaced(output, *original)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def carry_split(model: str | None, output: Path) -> None:
    """Put a run's split beside a checkpoint made of it, which tells who was trained on."""
    from chestxray_covid.files import write_files

    saved = place_of_split(model)
    if saved is not None and saved.is_file():
        write_files(output, {saved.name: saved.read_bytes()})


def warn_of_seen(
    saved: Path | None,
    dataset: ChestXrayDataset,
    cure: str,
    *,
    who: str = "the model",
    whose: str = "these",
) -> None:
    """Say if images to judge a model on are those that a run with this split was trained on."""
    from chestxray_covid.splits import saved_side

    if saved is None or not saved.is_file():
        return
    trained = saved_side(saved, "train")
    if seen := sum(s.content_hash() in trained for s in dataset.samples):
        click.echo(
            f"Caution: {who} was trained on {seen} of {whose} {len(dataset)} images; {cure}.",
            err=True,
        )


def open_data(data: tuple[Path, ...], classes: tuple[str, ...]) -> ChestXrayDataset:
    """Return the data sets as one, and tell what each of them holds."""
    from chestxray_covid.datasets.base import concatenate
    from chestxray_covid.datasets.folder import open_dataset

    parts = [open_dataset(path, classes=classes) for path in data]
    for part in parts:
        click.echo(str(part.report()))
    return parts[0] if len(parts) == 1 else concatenate(parts)
