"""Files that appear whole or not at all, and only where they belong; and tables among them."""

from __future__ import annotations

import csv
import gc
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain, pairwise, zip_longest
from pathlib import Path

from chestxray_covid.errors import (
    ChestXrayError,
    DatasetError,
    DatasetNotFoundError,
    DownloadError,
)
from chestxray_covid.files import check_replaceable

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

#: Longest name of a file on ext4, NTFS and APFS, in bytes.
_MAX_NAME_BYTES = 255
#: Shortest of the systems' limits for a whole path (macOS, PATH_MAX), in bytes.
_MAX_PATH_BYTES = 1024
_STRANGE = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\]')
#: Names that Windows gives to devices, whatever their suffix.
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
#: What nobody has touched for so long, nobody is writing.
_STALE_S = 24 * 3600


def path_problem(path: str) -> str:
    """Return why a path from outside must not be created, or an empty string.

    Accepted is what every common system creates under the same name, below the current folder:
    relative, ``/`` between the parts, no ``..``, no drive, no control character.

    Args:
        path: Path as an archive or a server names it; ``/`` at the end marks a folder.

    >>> path_problem("images/a (1).jpg")
    ''
    >>> path_problem("../a.jpg")
    "has a part that is empty, '.' or '..'"
    """
    try:
        length = len(path.encode())
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if length > _MAX_PATH_BYTES:
        return f"has more than {_MAX_PATH_BYTES} bytes"
    if _STRANGE.search(path):
        return "holds a backslash, colon, NUL or another character that not every system allows"
    if path.startswith("/"):
        return "is absolute"
    for part in path.removesuffix("/").split("/"):
        if part in {"", ".", ".."}:
            return "has a part that is empty, '.' or '..'"
        if len(part.encode()) > _MAX_NAME_BYTES:
            return f"has a part of more than {_MAX_NAME_BYTES} bytes"
        if part[-1] in ". " or _DEVICE.fullmatch(part):
            return "has a part that Windows takes for another name"
    return ""


@contextmanager
def writing_to(place: Path, kind: type[ChestXrayError] = DownloadError) -> Iterator[None]:
    """Turn errors of the file system into our own.

    Raises:
        ChestXrayError: Of this kind, if the body raises an ``OSError`` that is not one of ours.
    """
    try:
        yield
    except ChestXrayError:
        raise
    except OSError as error:
        raise kind(
            f"{place} cannot be written: {error}. Check the free space and the permissions there, "
            "or choose another folder; then run the same again."
        ) from error


@contextmanager
def exclusive(lock: Path) -> Iterator[bool]:
    """Let one process at a time run the body, and yield whether that could be arranged.

    Where it could not (read-only or some network file systems), the body runs all the same: the
    lock saves double work, correctness must not rest on it. A lock that can be had twice is none,
    whatever the system says. The system frees it when a process dies, however it dies; the empty
    file stays.
    """
    try:
        file = lock.open("ab")
    except OSError:
        yield False
        return
    with file:
        yield _take(file.fileno(), wait=True) and not _is_free(lock)


def _is_free(lock: Path) -> bool:
    """Return whether a lock can be taken that is taken, which tells that locks do not work."""
    try:
        with lock.open("ab") as second:
            return _take(second.fileno(), wait=False)
    except OSError:
        return True


def _take(handle: int, *, wait: bool) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(handle, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Yield whether nobody else runs such a body on a folder, which is locked meanwhile.

    The folder itself is locked, which leaves no file; the system frees it when a process dies,
    and those that it forked meanwhile. Where folders cannot be locked (Windows, some network file
    systems), all are alone.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield True
        return
    owner = os.getpid()
    try:
        yield _is_free_folder(handle)
    finally:
        if sys.platform != "win32" and os.getpid() == owner:
            with suppress(OSError):  # closing it is not enough: forked processes have it open, too
                fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _is_free_folder(handle: int) -> bool:
    try:
        if sys.platform != "win32":
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside another; the file there takes its place if the body succeeds.

    Raises:
        OSError: If it cannot be replaced; what was there before is untouched.
        ValueError: As :func:`files.check_replaceable`.
    """
    check_replaceable(path)
    partial = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a file, complete or not at all, and synced to the disk.

    Raises:
        OSError: If it cannot be written; what was there before is untouched.
    """
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def resolver() -> Callable[[str | Path], str]:
    """Return a function from a file's path to its one full spelling, however it was spelled.

    Links to folders are followed, each folder once; a link to a file keeps its own name, which may
    say more than its target's.
    """

    @cache
    def real(folder: str) -> str:
        return os.path.join(os.path.realpath(folder), "")  # noqa: PTH118 - ends in "/"

    def resolve(path: str | Path) -> str:
        text = os.fspath(path).replace(os.altsep or os.sep, os.sep)  # Windows has two
        if text.endswith((os.sep, ".")):  # an end that a path may forget
            text = str(Path(text))
        folder, separator, name = text.rpartition(os.sep)
        whole = real((folder := folder + separator) or ".")
        return text if whole == folder else whole + name  # the same text, kept once

    return resolve


def is_current(folder: Path) -> bool:
    """Return whether a folder is the current one, which cannot be replaced under its user."""
    return folder.exists() and folder.samefile(".")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV, complete or not at all; names of files in it need not be UTF-8.

    Raises:
        OSError: If it cannot be written; what was there before is untouched.
    """
    with (
        replacing(path) as partial,
        partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        csv.writer(file).writerows(chain([header], rows))


def numbered_rows(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of an open CSV, its header too, and the number of the line each begins in.

    Empty lines are passed over, also before the header, where GitHub's web pages have some.
    A quote that nobody doubled makes a cell of all that follows, up to the next quote.

    Raises:
        csv.Error: If quotes do not match, or a cell of several lines swallowed what reads as rows.
    """
    reader = csv.reader(file, strict=True)
    line, width = 1, 0
    try:
        for row in reader:
            if reader.line_num > line and _holds_rows(row, width):
                raise csv.Error(f"a cell holds {reader.line_num - line} more rows, or seems to")
            if row:
                yield line, row
            line, width = reader.line_num + 1, width or len(row)
    except csv.Error as error:
        raise csv.Error(
            f"{error}, in the row that begins in line {line}. Where a cell holds a quote, put the "
            "cell in quotes and double that one"
        ) from error


def _holds_rows(row: Sequence[str], width: int) -> bool:
    """Return whether each of a row's lines would be a whole row, as no line of a note would be."""
    lines = re.split(r"\r\n|\r|\n", ",".join(row).rstrip("\r\n"))
    whole = all(n.count(",") == width - 1 and ", " not in n for n in lines)
    return width > 2 and len(lines) > 1 and whole


def read_csv(table: Path, *, required: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield rows as name → cell, without columns that have no name; see :func:`read_rows`."""
    rows = read_rows(table, required=required)
    names = next(rows)
    for row in rows:
        yield {name: cell for name, cell in zip(names, row, strict=False) if name}


def read_rows(table: Path, *, required: Sequence[str]) -> Generator[list[str], None, None]:
    """Yield the names of a CSV's columns, then its rows one by one: a million would be a gigabyte.

    Names are stripped, and cells, except those of ``path``. A row has one cell more than there are
    names, an empty one, for columns that are not there.

    Raises:
        DatasetNotFoundError: If there is no such file.
        DatasetError: If it is no CSV, has no rows, lacks a column or has it twice, if a row is
            longer than the header, or a quote that does not belong there swallows rows.
    """
    if not os.path.isfile(table):  # noqa: PTH113 - Path.is_file raises if the name is too long
        raise DatasetNotFoundError(f"{table} is missing; expected a CSV with columns {required}.")
    row: list[str] = []
    try:
        # surrogateescape: file names need not be UTF-8
        with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = numbered_rows(file)
            names = [name.strip() for name in next(rows, (1, []))[1]]
            if missing := [name for name in required if name not in names]:
                raise DatasetError(
                    f"{table} lacks the columns {missing}; it has {names}. Expected a CSV with a "
                    f"header that names {list(required)}.{likely_cause(table, names)}"
                )
            refuse_repeated(table, names)
            width, path = len(names), names.index("path") if "path" in names else None
            yield names
            for line, row in rows:
                if len(row) > width and any(map(str.strip, row[width:])):
                    raise DatasetError(
                        f"{table}, line {line}: {len(row)} cells, but the header has "
                        f"{width}. Put cells that hold a comma in quotes."
                    )
                if len(row) < width:
                    row += [""] * (width - len(row))
                cells = [*map(str.strip, row)]
                if path is not None:
                    cells[path] = row[path]
                cells[width:] = [""]
                yield cells
    except (csv.Error, OSError) as error:
        raise DatasetError(f"{table} cannot be read as CSV: {error}.") from error
    if not row:
        raise DatasetError(f"{table} has a header and no rows.")


def cell_text(value: object) -> str:
    """Return what a cell of a table says; a gap (``None``, NaN, NA, NaT) says nothing.

    >>> cell_text(45), cell_text(float("nan"))
    ('45', '')
    """
    # A gap equals nothing, not even itself, and NA does not even say so.
    return str(value) if value is not None and str(value == value) == "True" else ""


def read_loose_csv(table: Path) -> list[dict[str, str]]:
    """Return the rows of a ``metadata.csv`` by normalised column name: names changed over time.

    Raises:
        DownloadError: If it is no CSV.
    """
    try:
        with table.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = numbered_rows(file)
            names = [re.sub(r"\s+", "_", n.strip().lower()) for n in next(rows, (1, []))[1]]
            padded = (zip_longest(names, row[: len(names)], fillvalue="") for _, row in rows)
            return [{name: cell.strip() for name, cell in row if name} for row in padded]
    except csv.Error as error:
        raise DownloadError(f"{table} cannot be read as CSV: {error}.") from error


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Keep Python from searching a million new samples for garbage, which is half of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def refuse_repeated(table: Path, names: Sequence[str]) -> None:
    """Do nothing where a CSV has every column once.

    Raises:
        DatasetError: If it has not.
    """
    if again := sorted({a for a, b in pairwise(sorted(names)) if a and a == b}):
        raise DatasetError(
            f"{table} has more than one column {again}, and nothing says which is right. Remove "
            "or rename the others."
        )


def likely_cause(table: Path, names: Sequence[str]) -> str:
    """Return why a table may lack a column, as the end of a message; nothing if nobody knows."""
    head = "".join(names)
    if head.startswith(("PK\3\4", "\udcd0\udccf\x11", "PAR1")):  # the second of Excel until 2003
        return " It is a workbook or Parquet, which is no text: save the table as CSV."
    if head.lstrip().startswith("<"):
        return " It is an HTML or XML page: download the raw file, not its web page."
    if "\0" in head:
        return " It seems to be UTF-16: save it as UTF-8."
    if len(names) == 1 and (mark := next((m for m in ";\t" if m in head), "")):
        return f" Its cells are separated by {mark!r}: save it with commas."
    if table.name in {"metadata.csv", "data.csv"}:
        return " If it belongs to a public collection, pass its folder."
    return ""


def remove_stale(folder: Path, name: re.Pattern[str]) -> None:
    """Remove the files in a folder that have such a name and that nobody touched for 24 hours."""
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if name.fullmatch(entry.name):
            with suppress(OSError):  # a folder may be read-only, a file already gone
                if entry.stat(follow_symlinks=False).st_mtime < time.time() - _STALE_S:
                    Path(entry.path).unlink()


def sync_file(path: Path) -> None:
    """Make a file's bytes last through a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
