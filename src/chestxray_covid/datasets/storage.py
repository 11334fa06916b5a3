"""Files that appear whole or not at all, and only where they belong."""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chestxray_covid.errors import ChestXrayError, DownloadError

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
def writing_to(place: Path) -> Iterator[None]:
    """Turn errors of the file system into our own.

    Raises:
        DownloadError: If the body raises an ``OSError`` that is not already one of ours.
    """
    try:
        yield
    except ChestXrayError:
        raise
    except OSError as error:
        raise DownloadError(
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


def write_file(path: Path, data: bytes) -> None:
    """Write a file, complete or not at all, and synced to the disk.

    Raises:
        OSError: If it cannot be written; what was there before is untouched.
    """
    partial = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Make a file's bytes last through a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
