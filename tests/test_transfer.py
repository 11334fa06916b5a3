from __future__ import annotations

import gzip
import hashlib
import os
import random
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from chestxray_covid.datasets.transfer import (
    RemoteFile,
    fetch,
    fetch_all,
    has_oid,
    remove_stale_parts,
)
from chestxray_covid.datasets.web import Client
from chestxray_covid.errors import DownloadError, IntegrityError
from servers import LocalServer, Reply, Request, forkserver, git_blob_sha1

DATA = random.Random(0).randbytes(300_000)


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(timeout_s=5, retries=3, backoff_s=0.001) as client:
        yield client


def remote(
    server: LocalServer, folder: Path, data: bytes = DATA, name: str = "a.png"
) -> RemoteFile:
    sha1 = git_blob_sha1(data)
    return RemoteFile(
        url=f"{server.url}/{name}", target=folder / "images" / name, size=len(data), oid=sha1
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "images").iterdir())


def always(reply: Reply) -> Callable[[Request], Reply]:
    return lambda request: reply


def cut_once_then_500(cut_after: int) -> Callable[[Request], Reply]:
    first, later = Reply(body=DATA, cut_after=cut_after), Reply(status=500)
    return lambda request: first if request.number == 1 else later


def test_a_file_arrives_whole_and_alone(client: Client, tmp_path: Path) -> None:
    with LocalServer(always(Reply(body=DATA))) as server:
        assert fetch(client, remote(server, tmp_path))
    assert (tmp_path / "images" / "a.png").read_bytes() == DATA
    assert names(tmp_path) == ["a.png"]


def test_hashes_are_those_of_git(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(DATA)
    try:
        run = subprocess.run(["git", "hash-object", path], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    sha1 = run.stdout.decode().strip()
    assert RemoteFile(url="", target=path, size=len(DATA), oid=sha1).is_at(path)
    assert sha1 == git_blob_sha1(DATA)


def test_a_hash_of_sixty_four_digits_is_that_of_large_file_storage(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(DATA)
    assert has_oid(path, hashlib.sha256(DATA).hexdigest())
    assert not has_oid(path, hashlib.sha256(DATA[1:]).hexdigest())


def test_a_right_file_is_not_fetched_again(client: Client, tmp_path: Path) -> None:
    with LocalServer(always(Reply(body=DATA))) as server:
        fetch(client, remote(server, tmp_path))
        assert not fetch(client, remote(server, tmp_path))
        assert len(server.requests) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "extend", "remove"])
def test_a_damaged_file_is_replaced(client: Client, tmp_path: Path, damage: str) -> None:
    target = tmp_path / "images" / "a.png"
    with LocalServer(always(Reply(body=DATA))) as server:
        fetch(client, remote(server, tmp_path))
        if damage == "remove":
            target.unlink()
        else:
            damaged = {
                "flip": DATA[:99] + bytes([DATA[99] ^ 1]) + DATA[100:],
                "truncate": DATA[:-1],
                "zero": bytes(len(DATA)),
                "extend": DATA + b"x",
            }
            target.write_bytes(damaged[damage])
        assert fetch(client, remote(server, tmp_path))
    assert target.read_bytes() == DATA


def test_an_empty_file_needs_no_request(client: Client, tmp_path: Path) -> None:
    with LocalServer(always(Reply())) as server:
        assert fetch(client, remote(server, tmp_path, b""))
        assert server.requests == []
    assert (tmp_path / "images" / "a.png").read_bytes() == b""


def test_something_else_at_the_place_of_a_file_does_not_block(
    client: Client, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    os.mkfifo(tmp_path / "images" / "a.png")
    with LocalServer(always(Reply(body=DATA))) as server:
        assert fetch(client, remote(server, tmp_path))
    assert (tmp_path / "images" / "a.png").read_bytes() == DATA


@pytest.mark.parametrize(
    ("every", "size"),
    [(64_000, 6_000_000), (65_537, 6_000_000), (1_000_000, 30_000_000), (9_000_000, 30_000_000)],
)
def test_cut_connections_cost_hardly_any_byte(
    client: Client, tmp_path: Path, every: int, size: int
) -> None:
    data = random.Random(1).randbytes(size)
    with LocalServer(always(Reply(body=data, cut_after=every))) as server:
        assert fetch(client, remote(server, tmp_path, data))
        assert server.sent["/a.png"] <= 1.1 * size
        assert len(server.requests) >= size // every
    assert (tmp_path / "images" / "a.png").read_bytes() == data


def test_a_cut_where_ranges_are_ignored_starts_again(client: Client, tmp_path: Path) -> None:
    def answer(request: Request) -> Reply:
        cut = 200_000 if request.number < 3 else None
        return Reply(body=DATA, ranges=False, cut_after=cut)

    with LocalServer(answer) as server:
        assert fetch(client, remote(server, tmp_path))
    assert (tmp_path / "images" / "a.png").read_bytes() == DATA
    assert "Range" in server.requests[1].headers


def test_a_server_that_always_cuts_and_ignores_ranges_is_given_up(
    client: Client, tmp_path: Path
) -> None:
    with LocalServer(always(Reply(body=DATA, ranges=False, cut_after=200_000))) as server:
        with pytest.raises(DownloadError, match=r"4 times in a row.*What has arrived is kept"):
            fetch(client, remote(server, tmp_path))
        assert len(server.requests) <= 6


@pytest.mark.parametrize("wrong", ["bytes 0-9/10", "bytes 5-9/300000", "nonsense", ""])
def test_a_wrong_continuation_is_not_appended(client: Client, tmp_path: Path, wrong: str) -> None:
    def answer(request: Request) -> Reply:
        if request.number == 1:
            return Reply(body=DATA, cut_after=100_000)
        if request.number == 2:
            return Reply(status=206, body=b"x" * 10, headers={"Content-Range": wrong})
        # had it been appended, these would be wrong bytes for the second time
        return Reply(body=DATA if request.number > 3 else bytes(len(DATA)))

    with LocalServer(answer) as server:
        assert fetch(client, remote(server, tmp_path))
        assert "Range" not in server.requests[2].headers
    assert (tmp_path / "images" / "a.png").read_bytes() == DATA


def test_a_refused_range_starts_again(client: Client, tmp_path: Path) -> None:
    def answer(request: Request) -> Reply:
        if request.number == 2:
            return Reply(status=416)
        return Reply(body=DATA, cut_after=100_000 if request.number == 1 else None)

    with LocalServer(answer) as server:
        assert fetch(client, remote(server, tmp_path))
    assert (tmp_path / "images" / "a.png").read_bytes() == DATA


@pytest.mark.parametrize("seed", range(20))
def test_one_wrong_bit_is_noticed_and_healed(client: Client, tmp_path: Path, seed: int) -> None:
    position = random.Random(seed).randrange(len(DATA))
    flipped = DATA[:position] + bytes([DATA[position] ^ 1 << seed % 8]) + DATA[position + 1 :]
    with LocalServer(lambda r: Reply(body=flipped if r.number == 1 else DATA)) as server:
        assert fetch(client, remote(server, tmp_path))
        assert len(server.requests) == 2
    assert (tmp_path / "images" / "a.png").read_bytes() == DATA


def test_wrong_bytes_twice_are_an_error_and_are_not_kept(client: Client, tmp_path: Path) -> None:
    with LocalServer(always(Reply(body=bytes(len(DATA))))) as server:
        with pytest.raises(IntegrityError, match=r"a.png gave other bytes.*twice"):
            fetch(client, remote(server, tmp_path))
        assert len(server.requests) == 2
    assert names(tmp_path) == []


WRONG = "other bytes than the published ones, twice"
HTML = b"<!DOCTYPE html><html><body>Please log in</body></html>"


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(body=HTML), WRONG),
        (Reply(body=HTML * 10_000), WRONG),
        (Reply(status=404, body=HTML), "status 404"),
        (Reply(status=403, body=HTML), "status 403"),
        (Reply(status=429, body=HTML, headers={"Retry-After": "0"}), "status 429"),
        (Reply(status=500, body=HTML), "status 500"),
        (Reply(body=b""), WRONG),
        (Reply(body=DATA, headers={"Content-Length": "10"}, ranges=False), WRONG),
        (Reply(body=DATA[:9], headers={"Content-Length": "300000"}), "cannot be fetched"),
        (Reply(body=DATA[:-1], chunked=True), "299999 of 300000 bytes"),
        (Reply(body=b"no gzip" * 50_000, headers={"Content-Encoding": "gzip"}), "fetched"),
    ],
)
def test_what_is_not_the_file_never_takes_its_place(
    client: Client, tmp_path: Path, reply: Reply, error: str
) -> None:
    with (
        LocalServer(always(reply)) as server,
        pytest.raises(DownloadError, match=error) as caught,
    ):
        fetch(client, remote(server, tmp_path))
    assert f"{server.url}/a.png" in str(caught.value)
    assert not (tmp_path / "images" / "a.png").exists()


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=DATA, chunked=True),
        Reply(body=DATA + b"more than expected"),
        Reply(body=gzip.compress(DATA), headers={"Content-Encoding": "gzip"}),
        Reply(body=DATA, headers={"Content-Type": "text/html"}),
        Reply(body=DATA, headers={"Content-Length": "9" * 5000}),
    ],
)
def test_odd_answers_with_the_right_bytes_are_taken(
    client: Client, tmp_path: Path, reply: Reply
) -> None:
    with LocalServer(always(reply)) as server:
        assert fetch(client, remote(server, tmp_path))
    assert (tmp_path / "images" / "a.png").read_bytes() == DATA


def _bombed(url: str, folder: Path, pipe: Connection) -> None:
    file = RemoteFile(url=url, target=folder / "a.png", size=1000, oid="0" * 40)
    with Client() as client:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            fetch(client, file)
        except IntegrityError:
            pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_a_gzip_bomb_is_read_no_further_than_the_expected_size(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(200_000_000), compresslevel=1)
    reply = Reply(body=bomb, headers={"Content-Encoding": "gzip"})
    ours, theirs = forkserver().Pipe()
    with LocalServer(always(reply)) as server:
        args = (f"{server.url}/a.png", tmp_path, theirs)
        process = forkserver().Process(target=_bombed, args=args)
        process.start()
        assert ours.poll(20)
        assert ours.recv() < 50_000  # KiB
        process.join()
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_run_is_continued(client: Client, tmp_path: Path) -> None:
    with LocalServer(cut_once_then_500(100_000)) as server:
        with Client(retries=0) as impatient, pytest.raises(DownloadError, match="status 500"):
            fetch(impatient, remote(server, tmp_path))
        (part,) = (tmp_path / "images").iterdir()
        assert part.name.endswith(".part")
        assert 95_000 <= part.stat().st_size <= 100_000
        server.answer = always(Reply(body=DATA))
        size = part.stat().st_size
        assert fetch(client, remote(server, tmp_path))
        assert server.requests[-1].headers["Range"] == f"bytes={size}-"
    assert names(tmp_path) == ["a.png"]


@pytest.mark.parametrize("left", [DATA[:5] + b"x", DATA + b"x", b"x" * len(DATA), DATA])
def test_whatever_an_earlier_run_left_the_file_gets_right(
    client: Client, tmp_path: Path, left: bytes
) -> None:
    with LocalServer(lambda r: Reply(body=DATA, cut_after=0 if r.number == 1 else None)) as server:
        file = remote(server, tmp_path)
        with Client(retries=0) as impatient, pytest.raises(DownloadError, match="fetched"):
            fetch(impatient, file)
        (part,) = (tmp_path / "images").iterdir()
        part.write_bytes(left)
        assert fetch(client, file)
        assert len(server.requests) == 1 + (left != DATA) + (left[:6] == DATA[:5] + b"x")
    assert (tmp_path / "images" / "a.png").read_bytes() == DATA
    assert names(tmp_path) == ["a.png"]


def test_a_part_of_another_version_is_not_continued(client: Client, tmp_path: Path) -> None:
    with LocalServer(cut_once_then_500(99_999)) as server:
        with Client(retries=0) as impatient, pytest.raises(DownloadError, match="status 500"):
            fetch(impatient, remote(server, tmp_path))
        new = bytes(1000)
        server.answer = always(Reply(body=new))
        assert fetch(client, remote(server, tmp_path, new))
        assert "Range" not in server.requests[-1].headers


def test_equal_files_under_two_names_do_not_disturb_each_other(tmp_path: Path) -> None:
    with LocalServer(always(Reply(body=DATA, pause_s=0.001))) as server, Client() as client:
        files = [remote(server, tmp_path, name=f"{i}.png") for i in range(8)]
        assert fetch_all(client, files, workers=8, progress=False) == 8
    assert all(file.target.read_bytes() == DATA for file in files)
    assert len(server.requests) == 8


def test_the_first_failure_stops_the_others_and_keeps_what_arrived(tmp_path: Path) -> None:
    def answer(request: Request) -> Reply:
        if request.path == "/bad":
            time.sleep(0.1)
            return Reply(status=404)
        return Reply(body=DATA, pause_s=0.2 if request.path == "/slow" else 0)

    with LocalServer(answer) as server, Client() as client:
        files = [remote(server, tmp_path, name=name) for name in ("slow", "good", "bad")]
        files += [remote(server, tmp_path, name=f"later-{i}") for i in range(20)]
        with pytest.raises(DownloadError, match="bad cannot be fetched"):
            fetch_all(client, files, workers=2, progress=False)
        assert len(server.requests) < len(files)
    assert (tmp_path / "images" / "good").read_bytes() == DATA
    assert not (tmp_path / "images" / "slow").exists()
    assert any(name.endswith(".part") for name in names(tmp_path))


def test_progress_is_shown_only_when_wanted(
    client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LocalServer(always(Reply(body=DATA))) as server:
        fetch_all(client, [remote(server, tmp_path)], workers=1, progress=False)
        assert capsys.readouterr() == ("", "")
        fetch_all(client, [remote(server, tmp_path)], workers=1, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "300k/300k" in shown.err


def test_only_our_own_old_parts_are_removed(tmp_path: Path) -> None:
    old, new = ".0123456789abcdef-01234567.part", ".fedcba9876543210-01234567.part"
    for name in (old, new, ".0123456789abcdef.tmp", "x.part", ".hidden", "a.png"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - 25 * 3600,) * 2)
    os.utime(tmp_path / new, (time.time() - 23 * 3600,) * 2)
    remove_stale_parts(tmp_path)
    remove_stale_parts(tmp_path / "missing")
    assert {path.name for path in tmp_path.iterdir()} == {new, "x.part", ".hidden", "a.png"}


def _limited(limit: int, url: str, folder: Path, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    file = RemoteFile(url=url, target=folder / "a.png", size=len(DATA), oid=git_blob_sha1(DATA))
    try:
        with Client() as client:
            fetch(client, file)
    except DownloadError as error:
        pipe.send(str(error))


@pytest.mark.parametrize(
    "limit", [0, 1, 4095, 4096, 8192, 65_536, 100_000, 200_000, 250_000, 299_999]
)
def test_a_full_disk_is_told_and_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, limit: int
) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    ours, theirs = forkserver().Pipe()
    with LocalServer(always(Reply(body=DATA))) as server:
        args = (limit, f"{server.url}/a.png", tmp_path, theirs)
        process = forkserver().Process(target=_limited, args=args)
        process.start()
        assert ours.poll(20)
        assert "cannot be written" in ours.recv()
        process.join()
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_place_that_cannot_be_written_is_told(client: Client, tmp_path: Path) -> None:
    (tmp_path / "images").write_bytes(b"a file where a folder should be")
    with (
        LocalServer(always(Reply(body=DATA))) as server,
        pytest.raises(DownloadError, match=r"a.png cannot be written"),
    ):
        fetch(client, remote(server, tmp_path))


def wait_for_part(folder: Path) -> Path:
    while not (parts := list((folder / "images").glob("*.part"))):
        time.sleep(0.001)
    return parts[0]


def test_a_part_is_no_longer_needed_when_another_process_finished(
    client: Client, tmp_path: Path
) -> None:
    def answer(request: Request) -> Reply:
        threading.Thread(target=finish).start()
        return Reply(body=DATA, pause_s=0.01)

    def finish() -> None:
        part = wait_for_part(tmp_path)
        (tmp_path / "images" / "a.png").write_bytes(DATA)
        part.unlink()

    with LocalServer(answer) as server:
        assert fetch(client, remote(server, tmp_path))
        assert len(server.requests) == 1
    assert (tmp_path / "images" / "a.png").read_bytes() == DATA


@pytest.mark.parametrize("age_s", [0, 3600], ids=["at work", "quiet"])
def test_a_part_that_another_process_has_open_is_left_to_it(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age_s: int
) -> None:
    with LocalServer(lambda r: Reply(body=DATA, cut_after=0 if r.number == 1 else None)) as server:
        file = remote(server, tmp_path)
        with Client(retries=0) as impatient, pytest.raises(DownloadError, match="fetched"):
            fetch(impatient, file)
        (part,) = file.target.parent.iterdir()
        unlink = Path.unlink

        def as_windows_does(path: Path, missing_ok: bool = False) -> None:
            if path == part:
                raise PermissionError(13, "in use by another process", str(path))
            unlink(path, missing_ok)

        monkeypatch.setattr(Path, "unlink", as_windows_does)
        os.utime(part, (time.time() - age_s,) * 2)
        assert fetch(client, file)
    assert file.target.read_bytes() == DATA
    assert names(tmp_path) == [part.name, "a.png"]


def test_a_part_that_vanishes_is_begun_again(client: Client, tmp_path: Path) -> None:
    def answer(request: Request) -> Reply:
        if request.number > 1:
            return Reply(body=DATA)
        threading.Thread(target=lambda: wait_for_part(tmp_path).unlink()).start()
        return Reply(body=DATA, pause_s=0.01)

    with LocalServer(answer) as server:
        assert fetch(client, remote(server, tmp_path))
        assert len(server.requests) == 2
    assert (tmp_path / "images" / "a.png").read_bytes() == DATA


def test_of_several_parts_the_largest_is_continued_and_quiet_ones_are_removed(
    client: Client, tmp_path: Path
) -> None:
    with LocalServer(cut_once_then_500(20_000)) as server:
        file = remote(server, tmp_path)
        with Client(retries=0) as impatient, pytest.raises(DownloadError, match="status 500"):
            fetch(impatient, file)
        (part,) = file.target.parent.iterdir()
        key = part.name[:17]
        for name, size, age_s in [("-00000001", 9, 400), ("-00000002", 50_000, 200)]:
            path = part.with_name(f"{key}{name}.part")
            path.write_bytes(DATA[:size])
            os.utime(path, (time.time() - age_s,) * 2)
        with Client(retries=0) as impatient, pytest.raises(DownloadError, match="status 500"):
            fetch(impatient, file)
        assert server.requests[-1].headers["Range"] == "bytes=50000-"
        assert f"{key}-00000001.part" not in names(tmp_path)
        assert f"{key}-00000002.part" in names(tmp_path)
        server.answer = always(Reply(body=DATA))
        assert fetch(client, file)
    assert names(tmp_path) == ["a.png"]
