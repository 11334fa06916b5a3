from __future__ import annotations

import errno
import fcntl
import os
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from chestxray_covid.datasets import storage
from chestxray_covid.datasets.base import ChestXrayDataset, Sample
from chestxray_covid.datasets.storage import (
    exclusive,
    path_problem,
    read_csv,
    resolver,
    sync_file,
    write_csv,
    write_file,
    writing_to,
)
from chestxray_covid.errors import DatasetError, DownloadError, IntegrityError
from chestxray_covid.files import sync_folder
from servers import forkserver


@pytest.mark.parametrize(
    "path",
    [
        "a.jpg",
        "images/a.jpg",
        "images/",
        "images/1-s2.0-S0140673620303706-fx1_lrg.jpg",
        "images/a (1), b & c=%20#.JPG",
        "annotations/.hidden",
        "images/größe.png",
        "a" * 255,
        "console/auxiliary.txt",
    ],
)
def test_ordinary_paths_have_no_problem(path: str) -> None:
    assert path_problem(path) == ""


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("", "empty"),
        ("/", "absolute"),
        ("/etc/passwd", "absolute"),
        ("//server/share", "absolute"),
        ("..", "'..'"),
        ("../a", "'..'"),
        ("a/../../b", "'..'"),
        ("a/..", "'..'"),
        ("./a", "'.'"),
        ("a//b", "empty"),
        ("a\\b", "backslash"),
        ("..\\a", "backslash"),
        ("C:/a", "colon"),
        ("C:a", "colon"),
        ("a.txt:stream", "colon"),
        ("a\0.jpg", "NUL"),
        ("a\nb", "another character"),
        ("a\x7f", "another character"),
        ("what?", "another character"),
        ("a./b", "Windows"),
        ("a ", "Windows"),
        ("nul", "Windows"),
        ("images/COM1.jpg", "Windows"),
        ("a" * 256, "255 bytes"),
        ("é" * 128, "255 bytes"),
        ("a/" * 513, "1024 bytes"),
        ("\ud800", "Unicode"),
    ],
)
def test_every_dangerous_path_has_a_problem(path: str, problem: str) -> None:
    assert problem in path_problem(path)


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"old")
    write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="a"):
        write_file(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["pipe", "stdout"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")  # as /dev/stdout is one
    sample = Sample(path="a.png", label="normal", finding="", patient_id="1", source="a")
    manifest = ChestXrayDataset([sample], classes=["normal"]).to_manifest
    for write in (manifest, partial(write_file, data=b"new")):
        with pytest.raises(ValueError, match=f"{name} is a device or a pipe, which a file"):
            write(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "stdout").is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"pipe", "stdout"}


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rows = [["a, b.png", "1"], ["not utf-8 \udcff.png", 'a "quoted" cell']]
    write_csv(tmp_path / "a.csv", ["path", "note"], rows)
    assert [list(r.values()) for r in read_csv(tmp_path / "a.csv", required=["path"])] == rows
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_a_table_that_cannot_be_finished_leaves_the_one_before(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ["path"], [["1"]])
    with pytest.raises(UnicodeEncodeError):
        write_csv(tmp_path / "a.csv", ["path"], [["a lone surrogate \ud800"]])
    assert [r["path"] for r in read_csv(tmp_path / "a.csv", required=["path"])] == ["1"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,note,note\n", r"more than one column \['note'\].*Remove or rename the others"),
        ("path\na,b\n", "line 2: 2 cells, but the header has 1"),
        ("path\n", "has a header and no rows"),
        ("name\tpath\n", r"separated by '\\t': save it with commas"),
        ('path,note\na,x\nb,"5 mm\nc,x\n', r"unexpected end of data, in the .* begins in line 3"),
        (
            'path,note\n\na,"not" b\n',
            r"line 3\. Where a cell holds a quote, put the cell in quotes",
        ),
        (
            'path,id,note\na,1,"5 mm\nb,2,\nc,3,no 5"\n',
            "holds 2 more rows, or .*, in .* line 2",
        ),
        ('path,id,note\na,"1,x\nb,2",x\n', "a cell holds 1 more rows, or .*, in .* line 2"),
    ],
)
def test_a_table_that_is_not_clear_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DatasetError, match=message):
        list(read_csv(tmp_path / "a.csv", required=["path"]))


def test_cells_may_have_several_lines(tmp_path: Path) -> None:
    notes = ["Left:\nopacity, base, 5 mm\n\nno effusion", "a,b\r\nc,d,e", "\n", 'a "b"\n,,\n']
    rows = [["a\nb.png", "1", note] for note in notes]
    # The last are one line each: with an end, or with what ends a line elsewhere.
    rows += [["c.png", "1", note] for note in ("no effusion\n", "\r\n", "a\u2028b,c,d\x0b\n")]
    write_csv(tmp_path / "a.csv", ["path", "id", "note"], rows)
    found = list(read_csv(tmp_path / "a.csv", required=["path"]))
    assert [r["note"] for r in found] == [note.strip() for _, _, note in rows]
    write_csv(tmp_path / "b.csv", ["path", "note"], [["a.png", "x\nb.png,y"]])
    assert len(list(read_csv(tmp_path / "b.csv", required=["path"]))) == 1


def test_files_and_folders_can_be_synced(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    sync_file(tmp_path / "a")
    sync_folder(tmp_path)
    assert (tmp_path / "a").read_bytes() == b"1"


def test_file_system_errors_become_download_errors_that_say_what_to_do(tmp_path: Path) -> None:
    with (
        pytest.raises(DownloadError, match=r"place cannot be written.*free space") as caught,
        writing_to(tmp_path / "place"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(caught.value.__cause__, OSError)


def test_errors_of_our_own_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="wrong bytes"), writing_to(tmp_path):
        raise IntegrityError("wrong bytes")


def _hold(lock: Path, held: Event, release: Event, log: Path) -> None:
    with exclusive(lock) as alone:
        assert alone
        held.set()
        release.wait(10)
        with log.open("a") as file:
            file.write("first ")


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    context = forkserver()
    held, release = context.Event(), context.Event()
    lock, log = tmp_path / "lock", tmp_path / "log"
    process = context.Process(target=_hold, args=(lock, held, release, log))
    process.start()
    assert held.wait(10)
    with lock.open("ab") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    release.set()
    with exclusive(lock), log.open("a") as file:
        file.write("second")
    process.join()
    assert log.read_text() == "first second"


def test_a_killed_process_gives_its_lock_back(tmp_path: Path) -> None:
    context = forkserver()
    held, release = context.Event(), context.Event()
    args = (tmp_path / "lock", held, release, tmp_path / "log")
    process = context.Process(target=_hold, args=args)
    process.start()
    assert held.wait(10)
    process.kill()
    process.join()
    with exclusive(tmp_path / "lock") as alone:
        assert alone
    assert not (tmp_path / "log").exists()


def test_without_a_lock_file_the_body_runs_and_knows_it(tmp_path: Path) -> None:
    with exclusive(tmp_path / "missing" / "lock") as alone:
        assert not alone


def test_without_working_locks_the_body_runs_and_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive(tmp_path / "lock") as alone:
        assert not alone


def test_a_lock_that_can_be_had_twice_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda handle, operation: None)
    with exclusive(tmp_path / "lock") as alone:
        assert not alone


@pytest.mark.parametrize("spelled", ["b.png/", "b.png/.", ".//b.png", "./b.png//"])
def test_text_is_resolved_as_the_path_that_it_means(tmp_path: Path, spelled: str) -> None:
    resolved = resolver()
    text = f"{tmp_path}/a/{spelled}"
    assert resolved(text) == resolved(Path(text)) == str(tmp_path / "a" / "b.png")


def test_a_file_is_one_whichever_of_two_separators_its_path_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.setattr(os, "altsep", "|")  # as "/" on Windows
    resolved = resolver()
    assert resolved(f"{tmp_path}/images|a.png") == resolved(tmp_path / "images" / "a.png")


class Counted(str):
    """A cell that counts how often any is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)

    def strip(self, *_: Any) -> Counted:
        return self


def test_no_column_of_a_header_is_looked_up_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = storage.numbered_rows
    monkeypatch.setattr(
        storage, "numbered_rows", lambda file: ((n, [*map(Counted, row)]) for n, row in real(file))
    )
    count = 2000
    columns = ",".join(f"c{i}" for i in range(count))  # of 100,000, that took minutes
    (tmp_path / "wide.csv").write_text(f"path,{columns}\na.png,\n")
    Counted.compared = 0
    (row,) = read_csv(tmp_path / "wide.csv", required=("path",))
    assert 0 < Counted.compared < 10 * count
    assert (row["path"], len(row)) == ("a.png", count + 1)
