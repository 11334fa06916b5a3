from __future__ import annotations

import fcntl
import itertools
import os
import random
import resource
import shutil
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from chestxray_covid.datasets.archives import MARKER_NAME, member_names, unpack_zip
from chestxray_covid.errors import ArchiveError, DatasetNotFoundError, DownloadError
from servers import forkserver

FILES = {
    "chest_xray/train/NORMAL/IM-0115-0001.jpeg": random.Random(0).randbytes(5000),
    "chest_xray/train/NORMAL/größe (1).jpeg": b"umlaut",
    "chest_xray/train/PNEUMONIA/empty.jpeg": b"",
    "chest_xray/README": b"text " * 1000,
}


def make_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MARKER_NAME
    }


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def member(
    name: str | bytes,
    data: bytes = b"data",
    *,
    mode: int = 0,
    flags: int = 0,
    method: int = 0,
    size: int | None = None,
    local_name: bytes | None = None,
    packed: bytes | None = None,
) -> tuple[bytes, bytes]:
    """Return a member's header with data, and its entry in the directory; both may lie."""
    raw = name if isinstance(name, bytes) else name.encode()
    flags |= 0x800 if not raw.isascii() else 0
    packed = data if packed is None else packed
    size = len(data) if size is None else size
    common = struct.pack(
        "<HHHHLLLH", flags, method, 0, 0x21, zlib.crc32(data), len(packed), size, len(raw)
    )
    local_name = raw if local_name is None else local_name
    local = b"PK\3\4" + struct.pack("<H", 20) + common[:-2]
    local += struct.pack("<HH", len(local_name), 0) + local_name + packed
    head = struct.pack("<4sHH", b"PK\1\2", 3 << 8 | 20, 20) + common
    # lengths of extra field and comment, disk, internal and external attributes
    entry = head + struct.pack("<HHHHL", 0, 0, 0, 0, mode << 16) + b"OFFS" + raw
    return local, entry


def assemble(
    path: Path, members: list[tuple[bytes, bytes]], offsets: list[int] | None = None
) -> Path:
    if offsets is None:
        offsets = list(itertools.accumulate((len(local) for local, _ in members), initial=0))
    body = b"".join(local for local, _ in members)
    directory = b"".join(
        entry.replace(b"OFFS", struct.pack("<L", offset), 1)
        for (_, entry), offset in zip(members, offsets, strict=False)
    )
    count = min(len(members), 0xFFFF)
    end = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0)
    path.write_bytes(body + directory + end)
    return path


def test_files_come_out_as_they_went_in(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", FILES)
    root = unpack_zip(archive, tmp_path / "data", progress=False)
    assert root == tmp_path / "data"
    assert contents(root) == FILES
    assert (root / MARKER_NAME).is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "data", ".data.lock"}


def test_a_hand_made_archive_is_read_like_any_other(tmp_path: Path) -> None:
    archive = assemble(tmp_path / "a.zip", [member("a/b.txt", b"1"), member("ü.txt", b"2")])
    assert contents(unpack_zip(archive, tmp_path / "data", progress=False)) == {
        "a/b.txt": b"1",
        "ü.txt": b"2",
    }


def test_mac_leftovers_and_unwanted_members_are_left_out(tmp_path: Path) -> None:
    junk = ["__MACOSX/a.jpeg", "chest_xray/__MACOSX/._b", "chest_xray/.DS_Store", "c/._d.jpeg"]
    archive = make_zip(tmp_path / "a.zip", {**FILES, **dict.fromkeys(junk, b"junk")})
    assert contents(unpack_zip(archive, tmp_path / "all", progress=False)) == FILES
    some = unpack_zip(
        archive, tmp_path / "some", keep=lambda name: name.endswith(".jpeg"), progress=False
    )
    assert set(contents(some)) == {name for name in FILES if name.endswith(".jpeg")}


def test_an_archive_with_a_prefix_and_a_comment_is_read(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", FILES)
    with zipfile.ZipFile(archive, "a") as edited:
        edited.comment = b"PK comment"
    archive.write_bytes(b"#!/bin/sh\n" + archive.read_bytes())
    assert contents(unpack_zip(archive, tmp_path / "data", progress=False)) == FILES


def test_a_zip64_archive_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the writer then makes 64-bit records for everything larger than this
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    archive = make_zip(tmp_path / "a.zip", FILES)
    monkeypatch.undo()
    data = archive.read_bytes()
    assert b"PK\6\6" in data
    # size and place of the directory too are then to be read from the 64-bit record
    archive.write_bytes(data[:-10] + b"\xff" * 8 + data[-2:])
    assert contents(unpack_zip(archive, tmp_path / "data", progress=False)) == FILES
    with pytest.raises(ArchiveError, match="more than 3 members"):
        unpack_zip(archive, tmp_path / "few", max_files=3, progress=False)


def test_unpacking_again_does_nothing(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", FILES)
    root = unpack_zip(archive, tmp_path / "data", progress=False)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert unpack_zip(archive, tmp_path / "data", progress=False) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    archive = make_zip(tmp_path / "a.zip", FILES)
    assert contents(unpack_zip(archive, tmp_path / "data", progress=False)) == FILES


def test_the_current_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_zip(tmp_path / "a.zip", FILES)
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    with pytest.raises(DownloadError, match=r"is the current folder.*Pass a folder inside it"):
        unpack_zip(archive, ".", progress=False)
    assert list(Path.cwd().iterdir()) == []
    root = unpack_zip(archive, "here", progress=False)
    monkeypatch.chdir(root)
    assert contents(unpack_zip(archive, ".", progress=False)) == FILES


def _file(root: Path) -> None:
    root.write_text("a file")


def _foreign(root: Path) -> None:
    root.mkdir()
    (root / "thesis.txt").write_text("precious")


def _other_archive(root: Path) -> None:
    unpack_zip(make_zip(root.with_name("b.zip"), {"b": b"b"}), root, progress=False)


def _damaged(root: Path) -> None:
    unpack_zip(root.with_name("a.zip"), root, progress=False)
    next(path for path in root.rglob("*.jpeg") if path.stat().st_size).unlink()


@pytest.mark.parametrize("prepare", [_file, _foreign, _other_archive, _damaged])
def test_a_folder_with_anything_else_is_left_alone(
    tmp_path: Path, prepare: Callable[[Path], None]
) -> None:
    archive = make_zip(tmp_path / "a.zip", FILES)
    prepare(tmp_path / "data")
    before = everything(tmp_path) | {".data.lock"}
    with pytest.raises(DownloadError, match="data is there already and is not this archive"):
        unpack_zip(archive, tmp_path / "data", progress=False)
    assert everything(tmp_path) | {".data.lock"} == before


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".data.0123abcd.partial" / "x").mkdir(parents=True)
    (tmp_path / ".data.b.0123abcd.partial").mkdir()
    (tmp_path / ".data.partial").mkdir()
    unpack_zip(make_zip(tmp_path / "a.zip", FILES), tmp_path / "data", progress=False)
    assert not (tmp_path / ".data.0123abcd.partial").exists()
    assert (tmp_path / ".data.b.0123abcd.partial").exists()
    assert (tmp_path / ".data.partial").exists()


def test_leftovers_stay_where_locks_do_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".data.0123abcd.partial").mkdir()  # may be another process at work
    unpack_zip(make_zip(tmp_path / "a.zip", FILES), tmp_path / "data", progress=False)
    assert (tmp_path / ".data.0123abcd.partial").exists()


def test_progress_is_shown_only_when_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = make_zip(tmp_path / "a.zip", FILES)
    unpack_zip(archive, tmp_path / "quiet", progress=False)
    assert capsys.readouterr() == ("", "")
    unpack_zip(archive, tmp_path / "shown", progress=True)
    assert "10.0k/10.0k" in capsys.readouterr().err


LINK, PIPE, DEVICE, SOCKET = stat.S_IFLNK, stat.S_IFIFO, stat.S_IFBLK, stat.S_IFSOCK
OK = member("chest_xray/ok.jpeg")
HOSTILE = {
    "parent": ([member("../evil")], "'..'"),
    "parent inside": ([member("a/../../evil")], "'..'"),
    "parent at end": ([member("a/..")], "'..'"),
    "parent folder": ([member("../evil/")], "'..'"),
    "deep parent": ([member("a/b/../../../../../../../../tmp/evil")], "'..'"),
    "absolute": ([member("/tmp/evil")], "absolute"),
    "double slash": ([member("//tmp/evil")], "absolute"),
    "backslash": ([member("..\\evil")], "backslash"),
    "absolute backslash": ([member("\\tmp\\evil")], "backslash"),
    "drive": ([member("C:\\evil")], "backslash"),
    "drive slash": ([member("C:/evil")], "colon"),
    "drive relative": ([member("C:evil")], "colon"),
    "unc": ([member("\\\\server\\share\\evil")], "backslash"),
    "unc slash": ([member("//server/share/evil")], "absolute"),
    "stream": ([member("ok.jpeg:evil")], "colon"),
    "device name": ([member("a/NUL")], "Windows"),
    "device name with suffix": ([member("com1.jpeg")], "Windows"),
    "nul": ([member("ok.jpeg\0../evil")], "NUL"),
    "nul hides a parent": ([member("a\0/../../evil")], "NUL"),
    "newline": ([member("a\nb")], "another character"),
    "escape sequence": ([member("a\x1b[2Jb")], "another character"),
    "trailing dot": ([member("evil.")], "Windows"),
    "trailing space": ([member("evil /a")], "Windows"),
    "dot": ([member("./evil")], "'.'"),
    "empty part": ([member("a//evil")], "empty"),
    "empty name": ([member("")], "empty"),
    "long part": ([member("x" * 300)], "255"),
    "long path": ([member("x/" * 600 + "y")], "1024"),
    "symlink": ([member("link", b"/etc/passwd", mode=LINK | 0o777)], "no regular"),
    "symlink then file": (
        [member("a", b"/tmp", mode=LINK | 0o777), member("a/evil")],
        "no regular",
    ),
    "fifo": ([member("pipe", b"", mode=PIPE | 0o644)], "no regular"),
    "block device": ([member("sda", b"", mode=DEVICE | 0o644)], "no regular"),
    "character device": ([member("tty", b"", mode=stat.S_IFCHR | 0o644)], "no regular"),
    "socket": ([member("socket", b"", mode=SOCKET | 0o644)], "no regular"),
    "file that says folder": ([member("a", mode=stat.S_IFDIR | 0o755)], "no regular"),
    "duplicate": ([member("a"), member("b"), member("a")], "occurs twice"),
    "case": ([member("a/IM.jpeg"), member("A/im.JPEG")], "occurs twice"),
    "normal form": ([member("\u00e4"), member("a\u0308")], "occurs twice"),
    "file and folder": ([member("a"), member("a/b")], "file and a folder"),
    "file and folder in another case": ([member("a/b"), member("A")], "file and a folder"),
    "encrypted": ([member("a", flags=1)], "encrypted"),
    "strongly encrypted": ([member("a", flags=0x41)], "encrypted"),
    "bzip2": ([member("a", method=12)], "method 12"),
    "lzma": ([member("a", method=14)], "method 14"),
    "two names": ([member("a", local_name=b"b")], "damaged"),
    "bad utf-8": ([member(b"\xff\xfe", flags=0x800)], "damaged"),
    "hidden in junk": ([member("__MACOSX/../../evil")], "'..'"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_refused_before_the_first_byte(tmp_path: Path, kind: str) -> None:
    (tmp_path / "here").mkdir()
    members, reason = HOSTILE[kind]
    archive = assemble(tmp_path / "a.zip", [OK, *members, member("z")])
    with pytest.raises(ArchiveError, match=r"a\.zip.*Nothing was\s+unpacked") as caught:
        unpack_zip(archive, tmp_path / "here" / "data", progress=False)
    assert reason in str(caught.value)
    assert everything(tmp_path) == {"a.zip", "here"}


def test_a_refusal_names_the_member(tmp_path: Path) -> None:
    archive = assemble(tmp_path / "a.zip", [OK, member("x/../evil")])
    with pytest.raises(ArchiveError, match=r"member 'x/../evil' has a part"):
        unpack_zip(archive, tmp_path / "data", progress=False)


def test_a_member_shorter_than_it_says_leaves_nothing(tmp_path: Path) -> None:
    archive = assemble(tmp_path / "a.zip", [OK, member("a", b"x", size=5)])
    with pytest.raises(ArchiveError, match="'a' has not its 5 bytes"):
        unpack_zip(archive, tmp_path / "data", progress=False)
    assert everything(tmp_path) == {"a.zip", ".data.lock"}


def test_a_directory_too_large_for_its_members_is_not_read(tmp_path: Path) -> None:
    archive = assemble(tmp_path / "a.zip", [member("x" * 700)])
    with pytest.raises(ArchiveError, match="more than 1 members"):
        member_names(archive, max_files=1)


def _ratio(path: Path) -> Path:
    """Two members of 5 MB that say that they become 4 GB each."""
    zeros = zlib.compressobj(wbits=-15)
    packed = (zeros.compress(bytes(1 << 20)) + zeros.flush()).ljust(5_000_000, b"\0")
    lies = [member(name, b"", method=8, size=0xFFFF_0000, packed=packed) for name in "ab"]
    return assemble(path, lies)


def _total(path: Path) -> Path:
    """Members that each stay below the ratio and together exceed the total."""
    packed = bytes(100_000)
    many = [member(str(i), b"", method=8, size=9_900_000, packed=packed) for i in range(900)]
    return assemble(path, many)


def _entries(path: Path) -> Path:
    """A million entries, of which the end record admits one."""
    local, entry = member("a", b"")
    directory = entry.replace(b"OFFS", bytes(4)) * 1_000_000
    end = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 1, 1, len(directory), len(local), 0)
    path.write_bytes(local + directory + end)
    return path


def _many_entries(path: Path) -> Path:
    """Somewhat more than the allowed entries."""
    local, entry = member("a", b"")
    directory = entry.replace(b"OFFS", bytes(4)) * 100_001
    end = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 1, 1, len(directory), len(local), 0)
    path.write_bytes(local + directory + end)
    return path


def _overlap(path: Path) -> Path:
    """Many entries that share the bytes of one member."""
    local, entry = member("0000", bytes(900_000))
    entries = [(b"", entry.replace(b"0000", b"%04d" % i)) for i in range(5000)]
    return assemble(path, [(local, entry), *entries[1:]], [0] * 5000)


def _quoted(path: Path) -> Path:
    """Members whose data begin with the headers of the next ones, as in Fifield's zip bomb."""
    kernel, last = member("2", bytes(1 << 20))
    quoted, entry = member("1", kernel)
    outer, first = member("0", quoted)
    offsets = [0, len(outer) - len(quoted), len(outer) - len(kernel)]
    return assemble(path, [(outer, first), (b"", entry), (b"", last)], offsets)


def _lie(path: Path) -> Path:
    """100 MB of zeros that say that they are 1000 bytes."""
    zeros = zlib.compressobj(wbits=-15)
    packed = zeros.compress(bytes(100_000_000)) + zeros.flush()
    return assemble(path, [member("a", b"x" * 1000, method=8, packed=packed)])


def _bombed(archive: Path, root: Path, pipe: Connection) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF)
    try:
        unpack_zip(archive, root, progress=False)
    except ArchiveError as error:
        used = resource.getrusage(resource.RUSAGE_SELF)
        written = (used.ru_oublock - before.ru_oublock) * 512
        pipe.send((str(error), written))


@pytest.mark.parametrize(
    ("bomb", "message"),
    [
        (_ratio, "would grow from 5000000 to 4294901760 bytes"),
        (_total, "would become 8910000000 bytes"),
        (_entries, "more than 100000 members"),
        (_many_entries, "more than 100000 members"),
        (_overlap, "overlaps another member"),
        (_quoted, "overlaps another member"),
        (_lie, "Bad CRC-32"),
    ],
)
def test_a_bomb_is_refused_at_once(
    tmp_path: Path, bomb: Callable[[Path], Path], message: str
) -> None:
    archive = bomb(tmp_path / "a.zip")
    ours, theirs = forkserver().Pipe()
    args = (archive, tmp_path / "data", theirs)
    process = forkserver().Process(target=_bombed, args=args)
    process.start()
    assert ours.poll(30)
    error, written = ours.recv()
    process.join()
    assert message in error
    assert written < 50_000_000
    assert everything(tmp_path) - {".data.lock"} == {"a.zip"}


def test_an_archive_in_an_archive_stays_packed(tmp_path: Path) -> None:
    inner = make_zip(tmp_path / "inner.zip", {"zeros": bytes(50_000_000)}).read_bytes()
    archive = make_zip(tmp_path / "a.zip", {"inner.zip": inner})
    assert contents(unpack_zip(archive, tmp_path / "data", progress=False)) == {"inner.zip": inner}


def test_a_trusted_archive_can_have_other_limits(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"zeros": bytes(2_000_000)})
    with pytest.raises(ArchiveError, match="'zeros' would grow from"):
        unpack_zip(archive, tmp_path / "data", progress=False)
    with pytest.raises(ArchiveError, match="would become 2000000 bytes, more than 1999999"):
        unpack_zip(archive, tmp_path / "data", max_bytes=1_999_999, max_ratio=2e3, progress=False)
    unpack_zip(archive, tmp_path / "data", max_ratio=2000, progress=False)


@pytest.mark.parametrize("limit", ["max_bytes", "max_files", "max_ratio"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_impossible_limits_are_refused(tmp_path: Path, limit: str, value: float) -> None:
    archive = make_zip(tmp_path / "a.zip", FILES)
    with pytest.raises(ValueError, match="Limits must be positive"):
        unpack_zip(archive, tmp_path / "data", **{limit: value})


def test_a_missing_archive_is_told(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"a\.zip does not exist"):
        unpack_zip(tmp_path / "a.zip", tmp_path / "data")
    with pytest.raises(DatasetNotFoundError, match="is no file"):
        member_names(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "loop.zip"])
def test_a_name_that_leads_nowhere_is_a_missing_archive(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop.zip").symlink_to("loop.zip")
    with pytest.raises(DatasetNotFoundError, match="does not exist or is no file"):
        unpack_zip(tmp_path / name, tmp_path / "data")


def test_an_archive_that_may_not_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_zip(tmp_path / "a.zip", FILES).chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # nobody may not enter what is above
    own = os.geteuid()
    try:
        if own == 0:  # whom no mode stops
            os.seteuid(65534)
        with pytest.raises(ArchiveError, match=r"a\.zip cannot be read: .*Mend its permissions"):
            unpack_zip("a.zip", "data")
    finally:
        os.seteuid(own)


def test_an_archive_without_a_wanted_file_is_told(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"__MACOSX/a": b"1", "b/": b""})
    with pytest.raises(ArchiveError, match="holds no wanted file"):
        unpack_zip(archive, tmp_path / "data")


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_archive_is_refused_and_leaves_nothing(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    whole = make_zip(tmp_path / "a.zip", FILES).read_bytes()
    data = bytearray(whole)
    if seed % 2:
        del data[rng.randrange(len(data)) :]
    else:
        start = rng.randrange(len(data) - 100)
        data[start : start + 100] = rng.randbytes(100)
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(ArchiveError, match=r"a\.zip"):
        unpack_zip(tmp_path / "a.zip", tmp_path / "data", progress=False)
    assert everything(tmp_path) - {".data.lock"} == {"a.zip"}


@pytest.mark.parametrize("data", [b"", b"no zip", b"<html></html>", b"PK\5\6", b"PK\5\6" * 20])
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(ArchiveError, match="damaged or no zip"):
        unpack_zip(tmp_path / "a.zip", tmp_path / "data")


def test_names_are_listed_unchecked(tmp_path: Path) -> None:
    archive = assemble(tmp_path / "a.zip", [member("../a"), member("b/")])
    assert member_names(archive) == ["../a", "b/"]
    with pytest.raises(ArchiveError, match="more than 1 members"):
        member_names(archive, max_files=1)


def _limited(limit: int, archive: Path, root: Path, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        unpack_zip(archive, root, progress=False)
    except DownloadError as error:
        pipe.send(str(error))


@pytest.mark.parametrize("limit", [0, 1, 10, 100, 1000, 2000, 4000, 4095, 4096, 4999])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    archive = make_zip(tmp_path / "a.zip", FILES)
    ours, theirs = forkserver().Pipe()
    process = forkserver().Process(
        target=_limited, args=(limit, archive, tmp_path / "data", theirs)
    )
    process.start()
    assert ours.poll(20)
    assert "data cannot be written" in ours.recv()
    process.join()
    assert everything(tmp_path) == {"a.zip", ".data.lock"}


def test_too_small_a_disk_is_told_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10_005}))
    archive = make_zip(tmp_path / "a.zip", FILES)
    with pytest.raises(DownloadError, match="10006 bytes are needed and 10005 are free"):
        unpack_zip(archive, tmp_path / "data", progress=False)


def unpacking(archive: Path, root: Path) -> BaseProcess:
    # the library's function itself: what a process must import costs time
    return forkserver().Process(target=unpack_zip, args=(archive, root), kwargs={"progress": False})


def count_unpacked(folder: Path) -> int:
    """Return the number of files in folders that are not yet renamed."""
    return sum(len(names) for here, _, names in os.walk(folder) if "/.data." in here)


@pytest.mark.slow
def test_a_killed_run_leaves_the_folder_absent_or_complete(tmp_path: Path) -> None:
    rng = random.Random(0)
    files = {f"chest_xray/train/NORMAL/{i}.jpeg": rng.randbytes(3000) for i in range(50)}
    archive = make_zip(tmp_path / "a.zip", files)
    killed = 0
    root = tmp_path / "data"
    for _ in range(50):
        process = unpacking(archive, root)
        process.start()
        until = rng.randrange(80)  # beyond the number of files: during the syncing, or later
        while process.is_alive() and count_unpacked(tmp_path) < min(until, 50):
            time.sleep(0.0005)
        time.sleep(max(0, until - 50) / 1000)
        process.kill()
        process.join()
        killed += process.exitcode != 0
        if root.exists():
            assert contents(root) == files
            shutil.rmtree(root)
    assert killed >= 20
    assert contents(unpack_zip(archive, root, progress=False)) == files
    assert not list(tmp_path.glob("*.partial"))


def test_two_processes_unpack_once(tmp_path: Path) -> None:
    files = {f"{i}.jpeg": random.Random(i).randbytes(3000) for i in range(100)}
    archive = make_zip(tmp_path / "a.zip", files)
    processes = [unpacking(archive, tmp_path / "data") for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert contents(tmp_path / "data") == files
    assert everything(tmp_path) - everything(tmp_path / "data") >= {"a.zip", "data", ".data.lock"}
    assert not list(tmp_path.glob(".*.partial"))
