"""Compiled models kept on disk, so that a second start need not compile again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path

from chestxray_covid.datasets.storage import remove_stale
from chestxray_covid.files import PARTIAL, expanded, write_files

#: Names the folder of compiled models, instead of the user's cache folder.
CACHE_VARIABLE = "CHESTXRAY_COVID_CACHE"
#: Most files that are kept, the latest: one has some 30 MB.
MAX_FILES = 8
_DIGEST_BYTES = 32
#: What a process that was killed leaves of a model.
_LEFT = re.compile(rf"\.[0-9a-f]{{64}}\.compiled{PARTIAL}")
#: Group and others may write.
_WRITABLE = 0o022


def cache_folder() -> Path:
    """Return where compiled models are kept: ``CHESTXRAY_COVID_CACHE``, or the user's cache folder.

    That is ``$XDG_CACHE_HOME`` or ``~/.cache`` (XDG Base Directory Specification 0.8), on macOS
    ``~/Library/Caches``, on Windows ``%LOCALAPPDATA%``, and in it ``chestxray_covid``.

    Raises:
        RuntimeError: If the user has no home folder.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return expanded(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "chestxray_covid"


def load_compiled(*key: object) -> bytes | None:
    """Return what was kept under a key; ``None`` if nothing was, or it cannot be read.

    A damaged file counts as none: every file begins with the SHA-256 of what follows. So does one
    that another user made or may write, since a compiled model is run like a program.
    """
    try:
        with (cache_folder() / _name(key)).open("rb") as file:
            if not _is_own(os.fstat(file.fileno())):
                return None
            digest, data = file.read(_DIGEST_BYTES), file.read()
    except (OSError, RuntimeError, ValueError):
        return None
    return data if hashlib.sha256(data).digest() == digest else None


def keep_compiled(data: bytes, *key: object) -> None:
    """Keep a compiled model for the next start, complete or not at all; it is never an error.

    Where the folder cannot be written, the next start compiles again. Of all models the latest
    :data:`MAX_FILES` stay; what killed processes left of one goes after a day.
    """
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_files(folder, {_name(key): hashlib.sha256(data).digest() + data})
        remove_stale(folder, _LEFT)
        kept = sorted(folder.glob("*.compiled"), key=lambda path: path.stat().st_mtime)
        for path in kept[:-MAX_FILES]:
            path.unlink(missing_ok=True)
        # Whatever the umask lets others do; last, since a disk without modes refuses it.
        place = folder / _name(key)
        place.chmod(place.stat().st_mode & ~_WRITABLE)
    except (OSError, RuntimeError, ValueError):
        return


def _is_own(found: os.stat_result) -> bool:
    """Return whether a file is this user's, or the system's, and no other user may write it."""
    if sys.platform == "win32":
        return True  # its modes say nothing of others
    return found.st_uid in (os.geteuid(), 0) and not found.st_mode & _WRITABLE


def _name(key: tuple[object, ...]) -> str:
    return f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.compiled"
