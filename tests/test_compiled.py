from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from chestxray_covid import compiled
from chestxray_covid.compiled import MAX_FILES, cache_folder, keep_compiled, load_compiled

DATA = b"a compiled model" * 1000
KEY = ("openvino", "0" * 64, 224, ["2026.4"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cache"
    monkeypatch.setenv("CHESTXRAY_COVID_CACHE", str(place))
    return place


def test_what_is_kept_is_found_again_and_under_its_key_only(folder: Path) -> None:
    assert load_compiled(*KEY) is None
    keep_compiled(DATA, *KEY)
    assert load_compiled(*KEY) == DATA
    assert load_compiled(*KEY[:-1], ["2026.5"]) is None
    assert [path.suffix for path in folder.iterdir()] == [".compiled"]


@pytest.mark.parametrize(
    "damage", [b"", DATA[:100], b"\0" * 40, DATA], ids=["empty", "short", "zeros", "bare"]
)
def test_a_damaged_file_counts_as_none(folder: Path, damage: bytes) -> None:
    keep_compiled(DATA, *KEY)
    file = next(folder.iterdir())
    file.write_bytes(damage)
    assert load_compiled(*KEY) is None
    keep_compiled(DATA, *KEY)
    assert load_compiled(*KEY) == DATA


@pytest.mark.skipif(sys.platform == "win32", reason="modes say nothing there")
def test_a_file_that_another_user_may_write_counts_as_none(folder: Path) -> None:
    before = os.umask(0)
    try:
        keep_compiled(DATA, *KEY)
    finally:
        os.umask(before)
    file = next(folder.iterdir())
    assert file.stat().st_mode & 0o777 == 0o644  # as of an image of a container, made by root
    assert load_compiled(*KEY) == DATA
    for mode in (0o664, 0o602):
        file.chmod(mode)
        assert load_compiled(*KEY) is None, oct(mode)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="chown takes root")
def test_a_file_that_another_user_made_counts_as_none(folder: Path) -> None:
    keep_compiled(DATA, *KEY)
    os.chown(next(folder.iterdir()), 12345, 12345)
    assert load_compiled(*KEY) is None
    keep_compiled(DATA, *KEY)
    assert load_compiled(*KEY) == DATA


def test_only_the_latest_files_stay(folder: Path) -> None:
    for number in range(MAX_FILES + 3):
        keep_compiled(DATA, number)
        for path in folder.iterdir():  # a second passes
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 1))
    found = [number for number in range(MAX_FILES + 3) if load_compiled(number)]
    assert found == list(range(3, MAX_FILES + 3))


def test_what_a_killed_process_left_of_a_model_goes_after_a_day(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: set[Path] = set()
    with monkeypatch.context() as watched:
        watched.setattr(os, "fsync", lambda _: left.update(folder.glob(".*")))
        keep_compiled(DATA, "of a process that was killed")
    (old,) = left
    new, other = old.with_name(old.name.replace("-", "0-")), folder / ".other.partial"
    for path in (old, new, other):
        path.write_bytes(DATA)
        os.utime(path, (0, 0)) if path != new else None
    keep_compiled(DATA, *KEY)
    assert {p for p in folder.iterdir() if p.suffix == ".partial"} == {new, other}


def test_only_so_many_files_stay_on_a_disk_that_knows_no_modes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # as FAT does

    monkeypatch.setattr(Path, "chmod", refused)
    for number in range(MAX_FILES + 3):
        keep_compiled(DATA, number)
    assert len(list(folder.iterdir())) == MAX_FILES


def test_a_folder_that_cannot_be_written_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_text("a file where the folder should be")
    keep_compiled(DATA, *KEY)
    assert load_compiled(*KEY) is None
    assert folder.read_text() == "a file where the folder should be"


def test_an_address_in_place_of_the_folder_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHESTXRAY_COVID_CACHE", "s3://bucket/cache")
    keep_compiled(DATA, *KEY)
    assert load_compiled(*KEY) is None
    assert not list(tmp_path.iterdir())


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("CHESTXRAY_COVID_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compiled.Path, "home", no_home)
    keep_compiled(DATA, *KEY)
    assert load_compiled(*KEY) is None
    with pytest.raises(RuntimeError, match="home"):
        cache_folder()


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "home/.cache/chestxray_covid"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/chestxray_covid"),
        ("darwin", {"XDG_CACHE_HOME": "xdg"}, "home/Library/Caches/chestxray_covid"),
        ("win32", {}, "home/AppData/Local/chestxray_covid"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/chestxray_covid"),
        ("linux", {"CHESTXRAY_COVID_CACHE": "own", "XDG_CACHE_HOME": "xdg"}, "own"),
    ],
)
def test_the_folder_is_where_the_system_keeps_caches(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CHESTXRAY_COVID_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(compiled.Path, "home", lambda: Path("home"))
    assert cache_folder() == Path(expected)
