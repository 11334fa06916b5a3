"""A table in shards, each complete or not there, so that what is finished need not be done again.

A shard is named by what is in it: its number, and a hash of the model and of the files' names, with
the current folder where they are relative. One that is there is finished, whoever wrote it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeAlias, cast

from chestxray_covid.datasets.loading import in_batches
from chestxray_covid.datasets.storage import likely_cause, numbered_rows
from chestxray_covid.errors import DatasetError, check_positive
from chestxray_covid.files import check_replaceable, looks_like_address, sync_folder
from chestxray_covid.image import IMAGE_SUFFIXES
from chestxray_covid.places import Places, is_address
from chestxray_covid.prediction_table import PARQUET, Row, TableFormat, format_of

Place: TypeAlias = str | os.PathLike[str]

_DIGEST_BYTES = 8
_SHARD_NAME = re.compile(rf"\.?part-\d{{6,}}-[0-9a-f]{{{2 * _DIGEST_BYTES}}}\..*")
#: As Spark and Hadoop call the file that says that a folder of shards is whole.
_DONE = "_SUCCESS"
#: Ends of names of tables that whoever opens them does not expect to be CSV.
_OTHER_TABLES = frozenset(
    {".json", ".ndjson", ".tsv", ".xls", ".xlsx", ".ods", ".feather", ".arrow", ".orc", ".pq"}
    | {".db", ".sqlite", ".h5", ".html", ".gz", ".bz2", ".xz", ".zst", ".zip"}
)


class Shard(NamedTuple):
    """Some of the files, and the name of the file with their rows."""

    name: str
    files: Sequence[str]


class ShardedTable:
    """Rows of a table: a folder of Parquet shards, or a CSV or JSON lines made of its parts.

    Args:
        output: Ends as :func:`prediction_table.format_of` says; Parquet may be an address.
        classes: Labels in the order of the columns.
        model: Identifies what computes the rows.
        shard_size: Files per shard.

    Raises:
        ValueError: If ``shard_size`` is not positive, an address does not end in ``.parquet``, the
            name is that of an image or of another kind of table, a file is where a folder of
            Parquet is to be, or the contrary, or it is no file at all, see
            :func:`files.check_replaceable`.
    """

    def __init__(
        self, output: Place, *, classes: Sequence[str], model: str, shard_size: int
    ) -> None:
        check_positive("shard_size", shard_size)
        given = name_of_output(output)
        bare = given.rstrip(f"/{os.sep}")  # with which a shell ends the name of a folder
        self.output = bare if format_of(bare) is PARQUET else given
        self.places = Places()
        if is_address(self.output) and not self.is_parquet:
            raise ValueError(f"An address must end in .parquet to be written, got {self.output!r}")
        if Path(self.output).suffix.lower() in IMAGE_SUFFIXES:
            raise ValueError(
                f"output must not be named like an image, which it might replace, got {given!r}. "
                "Expected a name that ends in .csv, .jsonl or .parquet."
            )
        if Path(self.output).suffix.lower() in _OTHER_TABLES:
            raise ValueError(
                f"output would be CSV under a name that promises another kind of file, {given!r}. "
                "Expected a name that ends in .csv, .jsonl or .parquet; make others from these."
            )
        self._classes = tuple(classes)
        self._model = model
        self._shard_size = shard_size
        path = Path(self.output)
        check_replaceable(path)
        if path.exists() and path.is_dir() != self.is_parquet:
            raise ValueError(
                f"output must be a folder if it ends in .parquet, and a file if not, but {path} is "
                f"a {'folder' if path.is_dir() else 'file'}. Give another name."
            )
        hidden = path.with_name(f".{path.name}.parts")
        self._folder = self.output if self.is_parquet else str(hidden)

    @property
    def is_parquet(self) -> bool:
        """Whether the shards themselves are the table."""
        return self._format is PARQUET

    @property
    def _format(self) -> TableFormat:
        return format_of(self.output)

    def shards(self, files: Iterable[str]) -> Iterator[Shard]:
        """Yield the files in shards, in order."""
        for number, some in enumerate(in_batches(files, self._shard_size)):
            digest = hashlib.blake2b(self._model.encode(), digest_size=_DIGEST_BYTES)
            for file in some:
                digest.update(b"\0" + os.fsencode(_anywhere(file)))
            yield Shard(f"part-{number:06d}-{digest.hexdigest()}{self._format.suffix}", some)

    def finished(self) -> set[str]:
        """Return the names of the shards that are there, maybe among others."""
        return self.places.names(self._folder)

    def begin(self, finished: set[str]) -> None:
        """Take back that the table is whole, before a shard of it is written or removed.

        Args:
            finished: From :meth:`finished`; no longer says so either.

        Raises:
            OSError: If it cannot be taken back.
        """
        if self.is_parquet and _DONE in finished:
            self.places.remove(self._folder, _DONE)
            finished.discard(_DONE)

    def write(self, shard: Shard, rows: Sequence[Row]) -> None:
        """Write a shard; a folder of Parquet that does not have it yet is not whole.

        Raises:
            OSError: If it cannot be written; nothing is left behind.
        """
        try:
            # Another run may have declared the folder whole since this one began.
            if self.is_parquet and shard.name not in (there := self.finished()):
                self.begin(there)
            self.places.write(self._folder, shard.name, self._format.encode(rows, self._classes))
        except OSError:
            if not self.is_parquet:
                with suppress(OSError):  # it holds other shards, or could not be made
                    Path(self._folder).rmdir()
            raise

    def complete(self, sizes: Mapping[str, int]) -> dict[str, str]:
        """Make the shards the table, and return path → reason of the rows that failed.

        Args:
            sizes: Name of a shard → its number of files, in the order of the table.

        Raises:
            DatasetError: If another run has taken the shards away, or one is damaged.
            OSError: If a shard cannot be read or the table not be written.
        """
        try:
            return self._declared(sizes) if self.is_parquet else self._joined(sizes)
        except FileNotFoundError as error:
            raise DatasetError(
                f"{self.output} is being written by another run, which has taken files of this one "
                f"away: {error}. Wait until that has ended, and run this again."
            ) from error

    def _declared(self, sizes: Mapping[str, int]) -> dict[str, str]:
        failed: dict[str, str] = {}
        for name, count in sizes.items():
            place = f"{self._folder}/{name}"
            failed.update(self._failures(place, self.places.read(place), count))
        there = self.finished()
        for name in there - {*sizes}:
            if _SHARD_NAME.fullmatch(name):  # of an older list of files, or not finished
                self.begin(there)
                self.places.remove(self._folder, name)
        self.places.write(self._folder, _DONE, b"")
        return failed

    def _failures(self, place: str, rows: bytes, count: int) -> Iterator[tuple[str, str]]:
        try:
            reasons = self._format.reasons(rows)
            if len(reasons) != count:
                raise ValueError(f"it has {len(reasons)} rows, expected {count}")
        except (ValueError, LookupError, TypeError, csv.Error) as error:
            raise DatasetError(
                f"{place} is damaged: {error}. Delete it, and run this again: it is computed anew."
            ) from error
        return ((path, reason) for path, reason in reasons if reason)

    def _joined(self, sizes: Mapping[str, int]) -> dict[str, str]:
        failed: dict[str, str] = {}
        output = Path(self.output)
        # In the folder that goes in the end, so that nothing of it stays after a kill either. Not
        # named by the process alone: in containers, two that share the folder are both number 1.
        partial = Path(self._folder, f".{output.name}.{secrets.token_hex(4)}.partial")
        try:
            with partial.open("wb") as file:
                file.write(self._format.head(self._classes))
                for name, count in sizes.items():
                    part = Path(self._folder, name)
                    rows = part.read_bytes()
                    failed.update(self._failures(str(part), rows, count))
                    file.write(rows)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(output)
            sync_folder(output.parent)
        except OSError as error:  # of a full disk, the system does not say which file it was
            error.filename = error.filename or str(output)
            raise
        finally:
            partial.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        return failed


def check_apart(images: Place | Iterable[Place], output: str) -> None:
    """Refuse an output that is one of the inputs, which it would replace.

    An iterator is not looked at, for it can be read only once.

    Raises:
        ValueError: If it is one.
    """
    given = _each(images)
    own, suffix = _identity(output), os.path.splitext(output)[1]  # noqa: PTH122 - as below
    for one in () if isinstance(given, Iterator) else given:
        place = name_of_place(one)
        if place == output or (own and place.endswith(suffix) and _identity(place) == own):
            raise ValueError(f"output {output} is one of the inputs. Give it another name.")


def _each(images: Place | Iterable[Place]) -> Iterable[Place]:
    if isinstance(images, (str, os.PathLike)):
        return [images]
    # By iterating, a column of pyarrow gives scalars of its own; a table is refused below.
    if hasattr(images, "to_pylist") and not hasattr(images, "column_names"):
        return cast(Iterable[Place], images.to_pylist())
    return images if isinstance(images, Iterable) else [name_of_place(images)]  # which refuses it


def name_of_output(place: Place) -> str:
    """Return what :func:`name_of_place` does, of a place to write.

    Raises:
        TypeError: As there.
        ValueError: If it was an address before pathlib took one of its slashes.
    """
    name = name_of_place(place)
    if looks_like_address(name) and not is_address(name):
        raise ValueError(
            f"output {name} was an address; pathlib keeps one of its two slashes. Pass it as text."
        )
    return name


def name_of_place(place: Place) -> str:
    """Return a path, or an address as it is, with ``~`` at its start as the home folder.

    Raises:
        TypeError: If it is neither.
    """
    if not isinstance(place, (str, os.PathLike)):
        raise TypeError(
            f"expected the path or address of a file or folder, got {type(place).__name__}. "
            "Leave out the gaps of a table; pass another library's path as text; for images "
            "themselves there is Classifier.predict."
        )
    # A path of another library that is an address would lead to a copy of its own.
    name = str(place) if looks_like_address(place) else os.fsdecode(place)
    return os.path.expanduser(name)  # noqa: PTH111 - which would change an address


def _anywhere(file: str) -> str:
    """Return a name that means the same file from whatever folder is the current one."""
    known = is_address(file) or os.path.isabs(file)  # noqa: PTH117 - many, as below
    return file if known else os.path.join(os.getcwd(), file)  # noqa: PTH109, PTH118


def _identity(place: str) -> tuple[int, int] | None:
    try:
        found = os.stat(place)  # noqa: PTH116 - many
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def listed(images: Place | Iterable[Place], places: Places) -> Iterator[str]:
    """Yield the files that are meant by files, folders and CSVs with a column ``path``.

    Raises:
        DatasetError: If a CSV cannot be read, has no such column or two, or a quote that does not
            belong there swallows rows.
        OSError: If a folder in object storage cannot be listed.
        TypeError: If something is neither a path nor an address, or a table stands for its column.
    """
    if hasattr(images, "columns"):  # by iterating, a table gives their names
        raise TypeError(f"expected paths, got a {type(images).__name__}. Pass its column of paths.")
    for one in _each(images):
        place = name_of_place(one)
        if not place.lower().endswith(".csv"):
            yield from places.images(place)
            continue
        for name in _rows(place, places):
            # An object is not asked what it is: that would be a request each.
            yield from [name] if is_address(name) else places.images(name)


def _rows(table: str, places: Places) -> Iterator[str]:
    folder = table.rpartition("/")[0] if is_address(table) else os.path.dirname(table)  # noqa: PTH120
    try:
        whole = places.read(table) if is_address(table) else None
        data = Path(table).open("rb") if whole is None else io.BytesIO(whole)  # noqa: SIM115
        with io.TextIOWrapper(data, "utf-8-sig", "surrogateescape", newline="") as file:
            rows = numbered_rows(file)
            columns = next(rows, (1, []))[1]
            if (count := columns.count("path")) != 1:
                raise DatasetError(
                    f"{table} has {'more than one' if count else 'no'} column path; it has "
                    f"{columns}. Expected a CSV with a header that names it once."
                    f"{likely_cause(Path(table), columns)}"
                )
            place = columns.index("path")
            for _, row in rows:
                if len(row) > place and row[place]:
                    yield _below(folder, row[place])
    except (csv.Error, OSError) as error:
        raise DatasetError(f"{table} cannot be read as a CSV of paths: {error}.") from error


def _below(folder: str, name: str) -> str:
    if is_address(folder) and not is_address(name) and not name.startswith("/"):
        return f"{folder}/{name}"
    return name if is_address(name) else os.path.join(folder, name)  # noqa: PTH118 - many
