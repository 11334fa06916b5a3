"""Zip archives unpacked with suspicion: all of it or nothing, and only where it belongs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from chestxray_covid.datasets.storage import (
    exclusive,
    is_current,
    path_problem,
    sync_file,
    write_file,
    writing_to,
)
from chestxray_covid.errors import ArchiveError, DatasetNotFoundError, DownloadError
from chestxray_covid.files import expanded, sync_folder
from chestxray_covid.progress import Bar

#: Written last into an unpacked folder; holds a hash of what was unpacked.
MARKER_NAME = ".complete"

_CHUNK_BYTES = 1 << 20
#: Smaller members cannot do harm, however well they compress.
_SMALL_BYTES = 1 << 20
#: A directory entry has 46 bytes and a name; this is more than honest ones have on average.
_MAX_ENTRY_BYTES = 600
_METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
#: What Python's zip reader raises about damaged archives, beside ``BadZipFile``.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OSError,
)


def unpack_zip(
    archive: str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    max_bytes: int = 8 << 30,
    max_files: int = 100_000,
    max_ratio: float = 100.0,
    keep: Callable[[str], bool] | None = None,
    progress: bool = True,
) -> Path:
    """Return ``root``, with the files of a zip archive in it.

    The whole archive is checked before the first byte is written, then unpacked beside ``root``
    and renamed, so that ``root`` is absent or complete, whatever happens. Only regular files are
    written; Mac leftovers (``__MACOSX``, ``.DS_Store``, ``._*``) are not. Unpacking the same
    archive again does nothing.

    Args:
        archive: The zip file.
        root: Folder to make; an empty one may exist.
        max_bytes: Most bytes to unpack (default 8 GiB; Kaggle's copy of Kermany has 2.5).
        max_files: Most members, the unwanted ones included.
        max_ratio: Most bytes that one byte of the archive may become. JPEG and PNG files stay
            below 2, text below 20; deflate reaches 1,032.
        keep: Says from its name whether a member is wanted; all are by default.
        progress: Show a progress bar.

    Raises:
        ArchiveError: If the archive cannot be read, is damaged or hostile, or holds nothing that
            is wanted.
        DatasetNotFoundError: If there is no such archive.
        DownloadError: If ``root`` holds other files, is the current folder or cannot be written.
        ValueError: If a limit is not positive.
    """
    if not max_bytes > 0 or not max_files > 0 or not max_ratio > 0:
        raise ValueError(
            f"Limits must be positive, got max_bytes={max_bytes}, max_files={max_files}, "
            f"max_ratio={max_ratio}"
        )
    source, folder = expanded(archive), expanded(root).resolve()
    with _opened(source, max_files) as zipped:
        members = _checked(zipped, source, max_bytes=max_bytes, max_ratio=max_ratio, keep=keep)
        with writing_to(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(folder.parent / f".{folder.name}.lock") as alone:
                if not _is_there(folder, members):
                    if is_current(folder):
                        raise DownloadError(
                            f"{folder} is the current folder and cannot be replaced. Pass a "
                            "folder inside it, which may not exist yet."
                        )
                    if alone:
                        _remove_leftovers(folder)
                    _unpack(zipped, source, members, folder, progress)
    return folder


def member_names(archive: str | os.PathLike[str], *, max_files: int = 100_000) -> list[str]:
    """Return the names in a zip archive, unchecked, in its order.

    Raises:
        ArchiveError: If it cannot be read, is no zip archive or has more members than that.
        DatasetNotFoundError: If there is no such file.
    """
    with _opened(expanded(archive), max_files) as zipped:
        return zipped.namelist()


@contextmanager
def _opened(source: Path, max_files: int) -> Iterator[zipfile.ZipFile]:
    if not os.path.isfile(source):  # noqa: PTH113 - Path.is_file raises if the name is too long
        raise DatasetNotFoundError(f"{source} does not exist or is no file, expected a zip file.")
    try:
        opened = source.open("rb")
    except OSError as error:
        raise ArchiveError(
            f"{source} cannot be read: {error}. Mend its permissions; nothing was unpacked."
        ) from error
    with opened as file:
        with _damage(source):
            _count_entries(file, source, max_files)
            zipped = zipfile.ZipFile(file)
        with zipped:
            if len(zipped.infolist()) > max_files:
                raise _too_many(source, max_files)
            yield zipped


@contextmanager
def _damage(source: Path, member: str = "") -> Iterator[None]:
    try:
        yield
    except ArchiveError:
        raise
    except _DAMAGE as error:
        where = f"member {member!r} of {source}" if member else str(source)
        raise ArchiveError(
            f"{where} is damaged or no zip ({type(error).__name__}: {error}). Nothing was "
            "unpacked; fetch the archive again."
        ) from error


def _too_many(source: Path, max_files: int) -> ArchiveError:
    return ArchiveError(
        f"{source} has more than {max_files} members; nothing was unpacked. If it is to be "
        "trusted, raise max_files=."
    )


def _count_entries(file: BinaryIO, source: Path, max_files: int) -> None:
    """Refuse too many entries before ``zipfile`` makes an object of each of them.

    Offsets are those of the end-of-directory records in PKWARE's APPNOTE.TXT, 4.3.14 to 4.3.16.
    """
    size = file.seek(0, 2)
    start = file.seek(max(0, size - 22 - 0xFFFF - 20 - 56))
    tail = file.read()
    end = tail.rfind(b"PK\5\6")
    if end < 0:
        raise zipfile.BadZipFile("no end of a zip directory")
    length = struct.unpack_from("<L", tail, end + 12)[0]
    if length == 0xFFFFFFFF:
        end -= 20 + 56
        length = struct.unpack_from("<Q", tail, end + 40)[0]
    if length > max_files * _MAX_ENTRY_BYTES:
        raise _too_many(source, max_files)
    file.seek(max(0, start + end - length))
    if file.read(length).count(b"PK\1\2") > max_files:
        raise _too_many(source, max_files)


def _checked(
    zipped: zipfile.ZipFile,
    source: Path,
    *,
    max_bytes: int,
    max_ratio: float,
    keep: Callable[[str], bool] | None,
) -> list[zipfile.ZipInfo]:
    """Return the members to unpack, after looking at all of them; nothing is written yet."""
    everything = zipped.infolist()
    for info in everything:
        if problem := _problem(info, max_ratio):
            raise _refused(source, info.orig_filename, problem)
    _refuse_clashes(everything, source)
    _refuse_overlaps(everything, source)
    wanted = [
        info
        for info in everything
        if not info.is_dir() and not _is_junk(info.filename) and (not keep or keep(info.filename))
    ]
    if not wanted:
        raise ArchiveError(f"{source} holds no wanted file; check that it is the right archive.")
    total = sum(info.file_size for info in wanted)
    if total > max_bytes or total > max_ratio * max(source.stat().st_size, _SMALL_BYTES):
        raise ArchiveError(
            f"{source} would become {total} bytes, more than {max_bytes} or more than {max_ratio:g}"
            " times its size; nothing was unpacked. If it is to be trusted, raise max_bytes= or "
            "max_ratio=."
        )
    for info in wanted:
        with _damage(source, info.filename):
            zipped.open(info).close()  # compares the two headers of a member
    return wanted


def _refused(source: Path, name: str, problem: str) -> ArchiveError:
    return ArchiveError(
        f"{source}: member {name[:300]!r} {problem}. Nothing was unpacked; fetch the archive from "
        "its publisher."
    )


def _problem(info: zipfile.ZipInfo, max_ratio: float) -> str:
    """Return what is wrong with a member, or an empty string."""
    kind = stat.S_IFMT(info.external_attr >> 16)
    # orig_filename: zipfile has cut filename at the first NUL
    # and newer versions take filename from an extra field
    if problem := path_problem(info.orig_filename) or path_problem(info.filename):
        return problem
    if kind not in {0, stat.S_IFDIR if info.is_dir() else stat.S_IFREG}:
        return "is no regular file or folder"
    if info.flag_bits & 0x41:
        return "is encrypted"
    if info.compress_type not in _METHODS:
        return f"is compressed with method {info.compress_type}, expected none or deflate"
    if info.file_size > max(max_ratio * info.compress_size, _SMALL_BYTES):
        return f"would grow from {info.compress_size} to {info.file_size} bytes"
    return ""


def _refuse_clashes(members: Iterable[zipfile.ZipInfo], source: Path) -> None:
    """Refuse two members that some system takes for one file."""
    files: set[str] = set()
    folders: set[str] = set()
    for info in members:
        name = unicodedata.normalize("NFC", info.filename).casefold()
        if name in files:
            raise _refused(source, info.filename, "occurs twice, or differs from another in case")
        if not info.is_dir():
            files.add(name)
        folders.update(name[: match.start()] for match in re.finditer("/", name))
    if both := files & folders:
        raise _refused(source, min(both), "is a file and a folder at once")


def _refuse_overlaps(members: Iterable[zipfile.ZipInfo], source: Path) -> None:
    """Refuse members that share bytes of the archive: how small archives become petabytes."""
    end = 0
    for info in sorted(members, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise _refused(source, info.filename, "overlaps another member")
        end = info.header_offset + 30 + len(info.filename) + info.compress_size


def _is_junk(name: str) -> bool:
    parts = name.split("/")
    return "__MACOSX" in parts or parts[-1] == ".DS_Store" or parts[-1].startswith("._")


def _manifest(members: Iterable[zipfile.ZipInfo]) -> bytes:
    """Return what the marker of a folder with these members says."""
    lines = sorted(f"{info.filename}\0{info.file_size}\0{info.CRC:08x}\n" for info in members)
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return json.dumps({"files": len(lines), "sha256_of_names_sizes_crcs": digest}).encode()


def _is_there(folder: Path, members: Sequence[zipfile.ZipInfo]) -> bool:
    """Return whether a folder holds these members; false if it is absent or empty."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    marker = folder / MARKER_NAME
    if marker.is_file() and marker.read_bytes() == _manifest(members):
        places = ((folder / info.filename, info.file_size) for info in members)
        if all(path.is_file() and path.stat().st_size == size for path, size in places):
            return True
    raise DownloadError(
        f"{folder} is there already and is not this archive, completely unpacked. Choose another "
        "folder, or remove that one first."
    )


def _unpack(
    zipped: zipfile.ZipFile,
    source: Path,
    members: Sequence[zipfile.ZipInfo],
    folder: Path,
    progress: bool,
) -> None:
    """Unpack beside a folder and rename."""
    total = sum(info.file_size for info in members)
    if (free := shutil.disk_usage(folder.parent).free) < total:
        raise OSError(f"{total} bytes are needed and {free} are free")
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        with Bar(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
            for info in members:
                _write(zipped, source, info, partial / info.filename, bar)
        write_file(partial / MARKER_NAME, _manifest(members))
        _sync(partial)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what dead processes left beside a folder."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.partial")
    for path in folder.parent.iterdir():
        if pattern.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _write(
    zipped: zipfile.ZipFile, source: Path, info: zipfile.ZipInfo, target: Path, bar: Bar
) -> None:
    """Write one member; zipfile gives no more than its declared size and checks the CRC."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _damage(source, info.filename):
        member = zipped.open(info)
    with member, target.open("xb") as file:
        while True:
            with _damage(source, info.filename):
                piece = member.read(_CHUNK_BYTES)
            if not piece:
                break
            file.write(piece)
            bar.update(len(piece))
    if target.stat().st_size != info.file_size:
        raise _refused(source, info.filename, f"has not its {info.file_size} bytes")


def _sync(folder: Path) -> None:
    """Bring everything to the disk: after all is written, when most of it is there already."""
    for here, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(here, name))
        sync_folder(Path(here))
