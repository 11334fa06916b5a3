"""Files of a git repository or the Hub: verified, resumable, written whole or not at all."""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import requests

from chestxray_covid.datasets.storage import remove_stale, sync_file, writing_to
from chestxray_covid.datasets.web import Client, TransientError, without_password
from chestxray_covid.errors import DownloadError, IntegrityError
from chestxray_covid.progress import Bar

#: What a process that was killed leaves of a file that was fetched, or written.
_PART = re.compile(r"\.[0-9a-f]{16}(-[0-9a-f]{8}\.part|\.tmp)")
#: A part that nobody has written for so long has lost its process: longer than any pause.
_QUIET_S = 300


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a git repository, and where it belongs.

    Attributes:
        url: Where its bytes are.
        target: Where they belong.
        size: Their number.
        oid: Its hash, see :func:`has_oid`.
    """

    url: str
    target: Path
    size: int
    oid: str

    def is_at(self, path: Path) -> bool:
        """Return whether a path holds exactly these bytes."""
        return path.is_file() and path.stat().st_size == self.size and has_oid(path, self.oid)


def has_oid(path: Path, oid: str) -> bool:
    r"""Return whether a file has the hash that git, or its large file storage, names it by.

    Args:
        path: An existing file.
        oid: 64 hex digits: SHA-256 of the bytes. 40 hex digits, the name of a git blob: SHA-1 of
            ``b"blob <size>\0"`` and the bytes.
    """
    if len(oid) == 64:
        digest = hashlib.sha256()
    else:
        head = b"blob %d\0" % path.stat().st_size
        digest = hashlib.sha1(head, usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest() == oid


def fetch_all(client: Client, files: Sequence[RemoteFile], *, workers: int, progress: bool) -> int:
    """Bring files into place and return how many had to be fetched.

    The first failure stops the others; what has arrived is kept for the next run.

    Raises:
        DownloadError: As :func:`fetch`.
    """
    fetched = 0
    total = sum(file.size for file in files)
    with (
        ThreadPoolExecutor(workers) as pool,
        Bar(total=total, unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        futures = {pool.submit(fetch, client, file): file for file in files}
        try:
            for future in as_completed(futures):
                fetched += future.result()
                bar.update(futures[future].size)
        except BaseException:
            client.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return fetched


@without_password()
def fetch(client: Client, file: RemoteFile, *, alone: bool = False) -> bool:
    """Bring a file into place and return whether it had to be fetched.

    Bytes gather in a hidden ``.part`` file in the same folder, where the next run goes on after
    an interruption of any kind. Wrong bytes are fetched once more.

    Args:
        client: That asks for them.
        file: What is wanted.
        alone: Whether a lock keeps all others from this file, so that whatever they left is free.

    Raises:
        DownloadError: If the server fails for good or the file cannot be written.
        IntegrityError: If the bytes are wrong twice.
    """
    with writing_to(file.target):
        if file.is_at(file.target):
            return False
        if _bring(client, file, False, alone) or _bring(client, file, True, alone):
            return True
    raise IntegrityError(
        f"{file.url} gave other bytes than the published ones, twice: expected {file.size} bytes "
        f"with the hash {file.oid}. A proxy or a login page of the network may stand between; "
        "open the address in a browser, or try another network."
    )


def remove_stale_parts(folder: Path) -> None:
    """Remove the ``.part`` and ``.tmp`` files of a folder that nobody has touched for 24 hours."""
    remove_stale(folder, _PART)


def _bring(client: Client, file: RemoteFile, anew: bool, alone: bool) -> bool:
    """Return whether the right bytes arrived and are in place."""
    try:
        return _bring_once(client, file, anew, alone)
    except FileNotFoundError:
        # where locks do not work, another process may have finished, and tidied up
        return file.is_at(file.target) or _bring_once(client, file, anew, alone)


def _bring_once(client: Client, file: RemoteFile, anew: bool, alone: bool) -> bool:
    key = hashlib.sha256(f"{file.target.name}\0{file.oid}".encode()).hexdigest()[:16]
    folder = file.target.parent
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{key}-{secrets.token_hex(4)}.part"
    try:
        if not anew:
            _take_over(folder.glob(f".{key}-*.part"), part, alone)
        client.persist(file.url, lambda: _receive(client, file, part), lambda: _size(part))
        if not file.is_at(part):
            part.unlink()
            return False
        sync_file(part)
        part.replace(file.target)
    except (DownloadError, FileNotFoundError):
        raise
    except OSError:
        part.unlink(missing_ok=True)  # the disk may be full
        raise
    for left in folder.glob(f".{key}-*.part"):
        with suppress(OSError):  # Windows deletes none that another process has open
            left.unlink()
    return True


def _take_over(parts: Iterable[Path], part: Path, alone: bool) -> None:
    """Begin a part with what earlier runs left, without touching what may still be in use."""
    left = sorted(parts, key=_size)
    if left and alone:
        left.pop().replace(part)
    elif left:
        shutil.copyfile(left[-1], part)
    for path in left:
        if alone or _is_older(path, _QUIET_S):
            with suppress(OSError):  # as in _bring_once
                path.unlink()


def _receive(client: Client, file: RemoteFile, part: Path) -> None:
    """Add to a part what it lacks, or what the server says is all; never more than the size."""
    offset = _size(part)
    if offset > file.size:
        part.unlink()
        offset = 0
    if offset == file.size:
        part.touch()  # an empty file needs no request
        return
    with client.open(file.url, start=offset) as response:
        if offset and not _continues(response, offset, file.size):
            part.unlink()
            offset = 0
            if response.status_code != 200:
                raise TransientError("the server does not continue what it began")
        promised = response.headers.get("Content-Length", "")
        end = offset + int(promised) if re.fullmatch(r"\d{1,18}", promised) else file.size
        with part.open("ab") as output:
            for piece in client.pieces(response):
                output.write(piece[: file.size - offset])
                offset += len(piece)
                if offset >= file.size:
                    return
    if offset < end:
        raise TransientError(f"the answer ended after {offset} of {file.size} bytes")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _is_older(path: Path, seconds: float) -> bool:
    try:
        return path.lstat().st_mtime < time.time() - seconds
    except FileNotFoundError:
        return False


def _continues(response: requests.Response, offset: int, size: int) -> bool:
    """Return whether an answer is what follows after ``offset`` bytes."""
    given = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", given)
    return (
        response.status_code == 206
        and match is not None
        and int(match[1]) == offset
        and match[2] in {"*", str(size)}
    )
