"""Files of a git repository: verified, resumable, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import requests
from tqdm import tqdm

from chestxray_covid.datasets.storage import sync_file, writing_to
from chestxray_covid.datasets.web import Client, TransientError
from chestxray_covid.errors import DownloadError, IntegrityError

_PART = re.compile(r"\.[0-9a-f]{16}-[0-9a-f]{8}\.part")
_STALE_S = 24 * 3600


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    r"""A file of a git repository, and where it belongs.

    Attributes:
        url: Where its bytes are.
        target: Where they belong.
        size: Their number.
        sha1: Name of the git blob: SHA-1 of ``b"blob <size>\0"`` and the bytes, 40 hex digits.
    """

    url: str
    target: Path
    size: int
    sha1: str

    def is_at(self, path: Path) -> bool:
        """Return whether a path holds exactly these bytes."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: digest).hexdigest() == self.sha1


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
        tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar,
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


def fetch(client: Client, file: RemoteFile) -> bool:
    """Bring a file into place and return whether it had to be fetched.

    Bytes gather in a hidden ``.part`` file in the same folder, where the next run goes on after
    an interruption of any kind. Wrong bytes are fetched once more.

    Raises:
        DownloadError: If the server fails for good or the file cannot be written.
        IntegrityError: If the bytes are wrong twice.
    """
    with writing_to(file.target):
        if file.is_at(file.target):
            return False
        if _bring(client, file) or _bring(client, file):
            return True
    raise IntegrityError(
        f"{file.url} gave other bytes than the published ones, twice: expected {file.size} bytes "
        f"of git blob {file.sha1}. A proxy or a login page of the network may stand between; "
        "open the address in a browser, or try another network."
    )


def remove_stale_parts(folder: Path) -> None:
    """Remove the ``.part`` files in a folder that nobody has touched for 24 hours."""
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if _PART.fullmatch(entry.name):
            with suppress(OSError):
                if entry.stat(follow_symlinks=False).st_mtime < time.time() - _STALE_S:
                    Path(entry.path).unlink()


def _bring(client: Client, file: RemoteFile) -> bool:
    """Return whether the right bytes arrived and are in place."""
    part = _own_part(file)
    try:
        client.persist(file.url, lambda: _receive(client, file, part), lambda: _size(part))
        if not file.is_at(part):
            part.unlink()
            return False
        sync_file(part)
        part.replace(file.target)
    except FileNotFoundError:
        # where locks do not work, another process can have taken the part over
        return file.is_at(file.target)
    except DownloadError:
        raise
    except OSError:
        part.unlink(missing_ok=True)  # the disk may be full
        raise
    return True


def _own_part(file: RemoteFile) -> Path:
    """Return a name of our own for the arriving bytes, with what an earlier run left of them."""
    folder = file.target.parent
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{file.target.name}\0{file.sha1}".encode()).hexdigest()[:16]
    part = folder / f".{key}-{secrets.token_hex(4)}.part"
    for left in folder.glob(f".{key}-*.part"):
        with suppress(FileNotFoundError):
            left.replace(part)
            break
    return part


def _receive(client: Client, file: RemoteFile, part: Path) -> None:
    """Add to a part what it lacks; it never gets larger than the file."""
    offset = _size(part)
    if offset > file.size:
        part.unlink()
        offset = 0
    part.touch()
    if offset == file.size:
        return
    with client.open(file.url, start=offset) as response:
        if offset and not _continues(response, offset, file.size):
            # a new file, not a truncated one, in case that another process has it open
            part.unlink()
            if response.status_code != 200:
                raise TransientError(f"the server does not go on from byte {offset}")
            part.touch()
            offset = 0
        with part.open("rb+") as output:
            output.seek(offset)
            for piece in client.pieces(response):
                output.write(piece[: file.size - offset])
                offset += len(piece)
                if offset >= file.size:
                    return
    raise TransientError(f"the answer ended after {offset} of {file.size} bytes")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


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
