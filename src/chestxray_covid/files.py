"""Paths; files that appear complete or not at all; strict JSON from files that are not trusted."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from chestxray_covid.errors import ConfigError, DatasetNotFoundError, check_resources

#: A config of this library has about 1 kB; more is no config.
MAX_JSON_BYTES = 500_000
#: What :func:`write_files` adds to the hidden name of a file until it is complete, as a pattern.
PARTIAL = r"\.\d+-[0-9a-f]{8}\.partial"
_MAX_JSON_DEPTH = 20
#: After so many questions for files of one folder, it is listed: up to so many entries for each.
_LISTED_AFTER, _PER_QUESTION = (64, 512, 4096, 32_768), 16
#: Of the two slashes of an address pathlib keeps one, on Windows as a backslash; a drive there has
#: one letter.
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:[/\\]", re.IGNORECASE)


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES) -> Any:
    """Return the content of a JSON file of at most so many bytes.

    Raises:
        ConfigError: If it is too large, nested too deep, or no strict JSON.
    """
    return parse_json(read_limited(path, limit), limit=limit)


def read_limited(path: Path, limit: int) -> bytes:
    """Return the content of a file, or its first ``limit + 1`` bytes if it is longer.

    Raises:
        ConfigError: If it cannot be read.
        ResourceError: If that is for want of open files.
    """
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        check_resources(error, str(path))
        raise ConfigError(f"cannot be read: {error}") from error


def parse_json(data: bytes, *, limit: int = MAX_JSON_BYTES) -> Any:
    """Return the content of small, strict JSON: UTF-8, finite numbers, names once, not too deep.

    Raises:
        ConfigError: If it is anything else.
    """
    if len(data) > limit:
        raise ConfigError(f"more than {limit} bytes, too large for a config")
    try:
        strict: dict[str, Any] = {"parse_float": _finite, "parse_constant": _finite}
        content = json.loads(data.decode(), object_pairs_hook=_distinct, **strict)
        if _depth(content) > _MAX_JSON_DEPTH:
            raise RecursionError
    except RecursionError as error:
        raise ConfigError(f"nested deeper than {_MAX_JSON_DEPTH}") from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"cannot be read as JSON: {error}") from error
    return content


def plain_json(value: Any) -> Any:
    """Return dicts, lists, text, numbers, and ``None`` for ``nan``, which strict JSON has not."""
    if isinstance(value, dict):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain_json(item) for item in value]
    return None if value != value else value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ConfigError("holds NaN or an infinite number, which JSON has not")
    return number


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict[str, Any]()
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"names {name[:100]!r} twice, of which readers take one or the other")
        found[name] = value
    return found


def _depth(content: Any) -> int:
    depth, level = 0, [content]
    while level:
        nested = [part for part in level if isinstance(part, (dict, list))]
        level = [p for n in nested for p in (n.values() if isinstance(n, dict) else n)]
        depth += bool(nested)
    return depth


def looks_like_address(path: str | os.PathLike[str]) -> bool:
    """Return whether something names what is not on this machine, as ``s3://bucket/folder`` does.

    Also a path of another library that shows itself as such, and leads to a local copy of its own;
    not one that shows itself as ``file://``, and leads to the file.
    """
    text = str(path)
    return _ADDRESS.match(os.fsdecode(path) if text.startswith("file://") else text) is not None


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` at its start as the home folder; ``~name`` of no user as it is.

    Raises:
        TypeError: If it is no path, for example a table or what was made of one.
        ValueError: If it is empty, as an unset variable is; Python takes that for ``"."``. Or if it
            is an address, of which Python would make a folder ``s3:``.
    """
    if isinstance(path, str | os.PathLike) and looks_like_address(path):
        raise ValueError(
            f"{path} is an address, expected a path on this machine. Fetch what is to be read "
            "first; write to a folder here, and copy that there."
        )
    return once_expanded(expanded_copy(path))


def once_expanded(path: Path) -> Path:
    """Return a path that expanding again leaves as it is: of ``./~`` pathlib makes ``~``."""
    return path.absolute() if os.path.expanduser(path) != str(path) else path  # noqa: PTH111


def expanded_copy(path: str | os.PathLike[str]) -> Path:
    """Return what :func:`expanded` does, and of an address the path where its copy would be.

    Raises:
        TypeError, ValueError: As :func:`expanded`.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"expected a path, as text or a Path, got {type(path).__name__}. A table is written to "
            "a CSV first."
        )
    if path == "":
        raise ValueError('A path is empty. Pass "." if the current folder is meant.')
    # Where it is no user's, pathlib's raises; os.scandir gives entries of bytes for bytes.
    return Path(os.path.expanduser(os.fsdecode(path)))  # noqa: PTH111


def listed_path(path: str | os.PathLike[str]) -> str:
    """Return a path that a folder or a table names, in which ``~`` is no home folder.

    As text: pathlib would drop what says so.
    """
    text = os.fspath(path)
    return f".{os.sep}{text}" if text.startswith("~") else text


def file_finder() -> Callable[[str], bool]:
    """Return what says of a path, as ``os.path.isfile`` does, whether a file is there.

    A folder of which many are asked for is listed, as far as that takes no longer: on a network,
    one question may take as long. Links, and what is not listed, are asked for one by one.
    """
    asked: Counter[str] = Counter()
    listed: dict[str, set[str]] = {}

    def is_there(file: str) -> bool:
        text = file.replace(os.altsep or os.sep, os.sep)  # Windows has two
        folder, separator, name = text.rpartition(os.sep)
        folder += separator
        if name in listed.get(folder, ()):
            return True
        asked[folder] += 1
        if asked[folder] in _LISTED_AFTER:
            with suppress(OSError, ValueError), os.scandir(folder or ".") as entries:
                few = itertools.islice(entries, _PER_QUESTION * asked[folder])
                listed[folder] = {e.name for e in few if e.is_file(follow_symlinks=False)}
        return os.path.isfile(file)  # noqa: PTH113 - keeps no copy

    return is_there


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a folder; ``Path.is_dir`` raises if the name is too long."""
    return os.path.isdir(path)  # noqa: PTH112


def existing_folder(root: str | os.PathLike[str], what: str) -> Path:
    """Return ``root`` with ``~`` expanded.

    Raises:
        DatasetNotFoundError: If it is no folder.
    """
    folder = expanded(root)
    if not is_folder(folder):
        raise DatasetNotFoundError(
            f"{folder} is no folder, expected {what}. Check the path, or use download=True "
            "where the data set offers it."
        )
    return folder


def check_replaceable(path: Path) -> None:
    """Raise where a file that is written complete or not at all would replace what is no file.

    Raises:
        ValueError: If it is a device, a pipe or a socket, or leads to what a process has open, as
            ``/dev/stdout`` does.
    """
    # Not with methods of Path, as in is_folder.
    special = os.path.exists(path) and not (os.path.isfile(path) or is_folder(path))  # noqa: PTH110, PTH113
    if special or (os.path.islink(path) and str(path.readlink()).startswith("/proc/")):  # noqa: PTH114
        raise ValueError(
            f"{path} is a device or a pipe, which a file would replace. Write to a file, and copy "
            "it there."
        )


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into a folder, in order, each complete or not at all and synced to the disk.

    Raises:
        OSError: If one cannot be written, for want of room for example; all are as they were.
        ValueError: As :func:`check_replaceable`.
    """
    for name in contents:
        check_replaceable(folder / name)
    own = f"{os.getpid()}-{secrets.token_hex(4)}"  # of this call, not only of this process
    partials = {name: folder / f".{name}.{own}.partial" for name in contents}
    try:
        for name, data in contents.items():
            try:
                with partials[name].open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:  # of a full disk, the system does not say which file it was
                error.filename = str(folder / name)
                raise
        # Only now: a disk that is full at the last file leaves the first as it was, too.
        for name, partial in partials.items():
            partial.replace(folder / name)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
