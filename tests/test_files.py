from __future__ import annotations

import os
from pathlib import Path

import pytest

from chestxray_covid import files
from chestxray_covid.files import file_finder


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the paths that the system was asked for one by one."""
    asked: list[str] = []
    is_file = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: (asked.append(path), is_file(path))[1])
    return asked


def fill(folder: Path, count: int) -> list[str]:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.png").touch()
    return [str(folder / f"{number}.png") for number in range(count)]


def test_a_folder_of_which_many_files_are_asked_for_is_listed(
    tmp_path: Path, questions: list[str]
) -> None:
    many, few = fill(tmp_path / "many", 200), fill(tmp_path / "few", 9)
    is_there = file_finder()
    assert all(map(is_there, [*many, *few, *few]))
    assert questions == [*many[:64], *few, *few]


@pytest.mark.parametrize("each", [0, 1])
def test_a_folder_is_listed_as_far_as_was_asked(
    tmp_path: Path, questions: list[str], monkeypatch: pytest.MonkeyPatch, each: int
) -> None:
    monkeypatch.setattr(files, "_PER_QUESTION", each)
    many = fill(tmp_path / "many", 600)
    assert all(map(file_finder(), many))
    # With one entry per question: 64 are known after 64 questions, 512 after as many.
    assert 600 - 512 * each <= len(questions) <= 600


def test_a_path_with_the_other_separator_of_windows_is_found_in_its_own_folder(
    tmp_path: Path, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "altsep", "|")
    many = fill(tmp_path / "many", 200)
    assert all(map(file_finder(), [*many, *(file.replace("/many/", "/many|") for file in many)]))
    assert questions == many[:64]


def test_what_is_no_file_is_not_there_whether_its_folder_was_listed_or_not(
    tmp_path: Path, questions: list[str]
) -> None:
    folder = tmp_path / "many"
    many = fill(folder, 70)
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to(folder / "0.png")
    (folder / "to folder.png").symlink_to(folder / "folder.png")
    (folder / "to nothing.png").symlink_to(folder / "nothing")
    (folder / "round.png").symlink_to(folder / "round.png")
    is_there = file_finder()
    names = ("missing", "folder", "to folder", "to nothing", "round", "nul\0")
    others = [str(folder / f"{name}.png") for name in names]
    for _ in range(2):
        assert not any(map(is_there, [*others, str(tmp_path / "elsewhere" / "0.png")]))
        assert is_there(str(folder / "link.png"))
        assert all(map(is_there, many))
    assert len(questions) < 64 + 6 * len(others), "the folder was not listed"
    (folder / "later.png").touch()
    assert is_there(str(folder / "later.png"))


def test_a_folder_that_cannot_be_listed_is_asked_for_each_file(tmp_path: Path) -> None:
    is_there = file_finder()
    missing = [str(tmp_path / "gone" / f"{i}.png") for i in range(200)]
    strange = [f"nul\0/{i}.png" for i in range(200)]
    assert not any(map(is_there, [*missing, *strange]))


def test_files_of_the_current_and_of_the_first_folder_are_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "many", 100)
    monkeypatch.chdir(tmp_path / "many")
    is_there = file_finder()
    assert all(is_there(f"{i}.png") for i in range(100))
    assert not any(is_there(f"{os.sep}{i}.png") for i in range(100))
