from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chestxray_covid.datasets.base import LABELS, ChestXrayDataset
from chestxray_covid.datasets.cohen import CohenCovidDataset
from chestxray_covid.datasets.folder import (
    FolderDataset,
    HannoverCovidDataset,
    ManifestDataset,
    open_dataset,
)
from chestxray_covid.datasets.kermany import KermanyPneumoniaDataset
from chestxray_covid.datasets.synthetic import SyntheticChestXray
from chestxray_covid.errors import DatasetError, DatasetNotFoundError, ResourceError
from conftest import no_more_files
from sources import (
    SHARED_IMAGE_ID,
    cohen_row,
    write_cohen,
    write_csv,
    write_folder,
    write_hannover,
    write_image,
    write_kermany,
    write_nih,
)

HEADER = ["path", "label", "patient_id"]


def labels_of(dataset: ChestXrayDataset) -> dict[str, str]:
    return {s.finding: s.label for s in dataset.samples}


# Class folders


def test_folder_names_of_public_collections_are_known(tmp_path: Path) -> None:
    known = {
        "NORMAL": "normal",
        "No_findings": "normal",
        "No Finding": "normal",
        "Healthy": "normal",
        "PNEUMONIA": "pneumonia",
        "Viral Pneumonia": "pneumonia",
        "bacterial-pneumonia": "pneumonia",
        "COVID": "covid19",
        "COVID-19": "covid19",
        "covid19": "covid19",
        "Covid_19": "covid19",
    }
    write_folder(tmp_path, dict.fromkeys(known, 1))
    assert labels_of(FolderDataset(tmp_path, classes=LABELS)) == known


def test_other_folder_names_are_labels_themselves(tmp_path: Path) -> None:
    write_folder(tmp_path, {"Normal": 1, "Lung_Opacity": 2})
    dataset = FolderDataset(tmp_path, classes=("normal", "Lung_Opacity"))
    assert dataset.targets == [1, 1, 0]
    plain = FolderDataset(tmp_path)
    assert len(plain) == 1
    assert plain.report().dropped == {"folder outside the classes (Lung_Opacity)": 2}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("covid/NORMAL", r"covid, which means 'covid19', but 'NORMAL' means 'normal'"),
        ("Pneumonia/Viral/COVID-19", r"which means 'pneumonia', but 'COVID-19' means 'covid19'"),
    ],
)
def test_a_class_inside_another_is_not_taken_for_that(
    tmp_path: Path, name: str, message: str
) -> None:
    for place in (name, "normal", "covid/COVID", "Pneumonia/Bacterial/Pneumonia"):
        write_image(tmp_path / place / "1_a.png", place)
    for classes in (LABELS, ("normal", "covid19")):
        with pytest.raises(DatasetError, match=message):
            FolderDataset(tmp_path, classes=classes)
    outer = name.split("/")[0]
    meant = {"normal": "normal", outer: "covid19"}
    assert len(FolderDataset(tmp_path, meant)) == 3


def test_a_class_of_ones_own_may_hold_what_are_labels_elsewhere(tmp_path: Path) -> None:
    for place in ("normal", "abnormal/COVID", "abnormal/Pneumonia"):
        write_image(tmp_path / place / "1_a.png", place)
    found = FolderDataset(tmp_path, classes=["normal", "abnormal"])
    assert sorted(found.targets) == [0, 1, 1]
    write_image(tmp_path / "abnormal" / "normal" / "2_a.png", "2")
    with pytest.raises(DatasetError, match="which means 'abnormal', but 'normal' means 'normal'"):
        FolderDataset(tmp_path, classes=["normal", "abnormal"])


def test_labels_can_be_given_by_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, {"0": 1, "1": 2, "Normal": 3})
    dataset = FolderDataset(tmp_path, {"0": "normal", "1": "covid19"})
    assert labels_of(dataset) == {"0": "normal", "1": "covid19"}
    assert len(dataset) == 3


def test_files_below_a_class_folder_count_except_where_no_radiographs_are(tmp_path: Path) -> None:
    for place in ("images", "a/b", "masks", "__MACOSX", ".hidden", "."):
        write_image(tmp_path / "COVID" / place / f"{len(place)}.png")
    write_image(tmp_path / "COVID" / "._resource.png")
    write_image(tmp_path / ".git" / "x.png")
    write_image(tmp_path / "__MACOSX" / "x.png")
    write_image(tmp_path / "beside-the-classes.png")
    (tmp_path / "COVID" / "a" / "notes.txt").touch()
    (tmp_path / "COVID" / "Thumbs.db").touch()
    dataset = FolderDataset(tmp_path)
    found = {s.path.relative_to(tmp_path / "COVID").as_posix() for s in dataset.samples}
    assert found == {"images/6.png", "a/b/3.png", "1.png"}
    report = dataset.report()
    assert (report.found, report.dropped) == (5, {"not an image file name": 2})


def test_suffixes_are_compared_without_case(tmp_path: Path) -> None:
    for name in ("a.PNG", "b.JpEg", "c.bmp", "d.png.txt", "e"):
        write_image(tmp_path / "COVID" / name)
    assert {s.path.name for s in FolderDataset(tmp_path).samples} == {"a.PNG", "b.JpEg", "c.bmp"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_regular_file_is_dropped_and_links_to_files_are_not(tmp_path: Path) -> None:
    write_folder(tmp_path / "site", {"COVID": 1})
    inside = tmp_path / "site" / "COVID"
    (inside / "broken.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(inside / "pipe.png")
    (inside / "link.png").symlink_to(write_image(tmp_path / "elsewhere.png"))
    dataset = FolderDataset(tmp_path / "site")
    assert [s.path.name for s in dataset.samples] == ["COVID-0.png", "link.png"]
    assert dataset.report().dropped == {"no regular file": 2}


def test_links_to_folders_are_noted_and_not_followed(tmp_path: Path) -> None:
    write_folder(tmp_path, {"COVID": 1})
    (tmp_path / "COVID" / "loop").symlink_to(tmp_path, target_is_directory=True)
    dataset = FolderDataset(tmp_path)
    assert len(dataset) == 1
    assert dataset.report().notes["links to folders, not followed"] == 1


def test_class_folders_that_are_links_to_others_give_each_file_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"Normal": 2, "COVID": 1})
    write_folder(tmp_path / "test", {"Normal": 1, "COVID": 1})
    for name, target in [("val", "test"), ("train/healthy", "Normal"), ("train/Covid", "../gone")]:
        (tmp_path / name).symlink_to(target, target_is_directory=True)
    dataset = FolderDataset(tmp_path)
    assert [s.path.relative_to(tmp_path).as_posix() for s in dataset.samples] == [
        *("test/COVID/COVID-0.png", "test/Normal/Normal-0.png", "train/COVID/COVID-0.png"),
        *("train/Normal/Normal-0.png", "train/Normal/Normal-1.png"),
    ]
    assert dataset.report().dropped == {"file listed twice": 4}
    for label in ("COVID-19", "Effusion"):  # inside the classes and outside
        link = tmp_path / "train" / label
        link.symlink_to("Normal", target_is_directory=True)
        with pytest.raises(DatasetError, match=r"is in .*too, through a link.*'normal'"):
            FolderDataset(tmp_path)
        link.unlink()


@pytest.mark.parametrize("inside", ["Normal", "Normal/site", "."])
def test_a_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    write_image(write_folder(tmp_path) / "Normal" / "site" / "a.png")
    closed, scan = tmp_path / inside, os.scandir

    def refuse(path: Path) -> object:  # the superuser may list everything
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for read in (FolderDataset, open_dataset):
        with pytest.raises(DatasetError, match=r"cannot be listed: .*Mend its permissions"):
            read(tmp_path)


@pytest.mark.parametrize("names", [("train", "test"), ("Train", "Val", "Test")])
def test_class_folders_may_lie_in_splits_which_are_merged(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for part in names:
        for folder, count in (("COVID19", 2), ("NORMAL", 1), ("PNEUMONIA", 1)):
            for i in range(count):
                write_image(tmp_path / part / folder / f"{i}.png", f"{part}{folder}{i}")
    dataset = open_dataset(tmp_path, classes=LABELS)
    assert type(dataset) is FolderDataset
    images = {"normal": len(names), "pneumonia": len(names), "covid19": 2 * len(names)}
    assert dataset.report().images == images
    assert len({s.patient_id for s in dataset.samples}) == len(dataset)
    chosen = FolderDataset(tmp_path, {"COVID19": "covid19", "NORMAL": "normal"})
    assert len(chosen) == 3 * len(names)


def test_images_beside_class_folders_are_noted(tmp_path: Path) -> None:
    for name in ("train/COVID/1_a.png", "train/2_a.png", "test/3_a.png", "4_a.png", "test/a.txt"):
        write_image(tmp_path / name, name, kind="PNG")
    dataset = FolderDataset(tmp_path, classes=["covid19"])
    assert [s.patient_id for s in dataset.samples] == ["1"]
    assert dataset.report().notes == {"images in no class folder, not read": 3}


def test_labels_can_name_folders_that_look_like_splits_or_masks(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": 1, "test": 2, "masks": 3})
    plain = {"train": "normal", "test": "covid19", "masks": "masks"}
    assert len(FolderDataset(tmp_path, plain, classes=list(plain.values()))) == 6


def test_masks_beside_the_radiographs_are_dropped_and_counted(tmp_path: Path) -> None:
    for name in ("1_a.png", "1_a_mask.png", "2 Mask.PNG", "masked_3.png"):
        write_image(tmp_path / "COVID" / name, name)
    dataset = FolderDataset(tmp_path, classes=["covid19"])
    assert [s.path.name for s in dataset.samples] == ["1_a.png", "masked_3.png"]
    assert dataset.report().dropped == {"a mask, by its name": 2}


def test_masks_are_no_radiographs_whatever_their_folder_is_called(tmp_path: Path) -> None:
    for folder in ("COVID-19", "Normal"):
        for inside in ("images", "lung masks", "infection masks", "Masks", "mask"):
            write_image(tmp_path / folder / inside / "a.png")
    write_image(tmp_path / "Lung_Masks" / "a.png")
    dataset = FolderDataset(tmp_path)
    assert {s.path.parent.name for s in dataset.samples} == {"images"}
    assert dataset.report().notes["folders of masks, not read"] == 9


@pytest.mark.parametrize("name", ["Covid-positive", "positive covid", "COVID19_cases"])
def test_a_class_does_not_vanish_because_its_name_is_not_understood(
    tmp_path: Path, name: str
) -> None:
    write_folder(tmp_path / "site", {"Normal": 1, name: 1})
    with pytest.raises(DatasetError, match=r"No usable image of \['covid19'\](.|\n)*give labels="):
        FolderDataset(tmp_path / "site")
    rows = [["site/Normal/Normal-0.png", "normal", "1"], [f"site/{name}/{name}-0.png", name, "2"]]
    table = write_csv(tmp_path / "list.csv", HEADER, rows)
    with pytest.raises(DatasetError, match=r"No usable image of \['covid19'\](.|\n)*give labels="):
        ManifestDataset(table)
    assert len(FolderDataset(tmp_path / "site", classes=["normal"])) == 1
    assert len(FolderDataset(tmp_path / "site", {"Normal": "normal", name: "covid19"})) == 2
    assert len(ManifestDataset(table, {name: "covid19"})) == 2


@pytest.mark.parametrize("name", ["Lung_Opacity", "non-COVID", "covid negative", "abnormal"])
def test_other_classes_may_be_left_out(tmp_path: Path, name: str) -> None:
    assert len(FolderDataset(write_folder(tmp_path, {"Normal": 1, name: 2}))) == 1


def test_names_that_are_not_utf8_are_printed_escaped(tmp_path: Path) -> None:
    write_folder(tmp_path / "site \udce8", {"Normal": 1, "fi\udce8vre\x1b[31m": 1})
    dataset = FolderDataset(tmp_path / "site \udce8")
    assert repr(dataset).endswith("from site \\udce8>")
    text = str(dataset.report())
    assert "folder outside the classes (fi\\udce8vre\\x1b[31m)" in text
    assert text.startswith("site \\udce8: 1 of 2 kept")
    assert text.encode()


def test_patients_are_the_numbers_that_start_the_names(tmp_path: Path) -> None:
    dataset = FolderDataset(write_nih(tmp_path / "nih", patients=4), classes=LABELS)
    for s in dataset.samples:
        assert s.patient_id == s.path.name.split("_")[0]
    assert (len(dataset), len({s.patient_id for s in dataset.samples})) == (12, 8)
    assert dataset.sources == ("nih",)
    assert dataset.report().notes == {}


@pytest.mark.parametrize(
    ("pattern", "patients"),
    [
        (r"patient(\d+)", ["7", "7", "COVID/scan.png"]),
        (r"patient\d+", ["patient7", "patient7", "COVID/scan.png"]),
        (r"(?:patient(\d+))|scan", ["7", "7", "COVID/scan.png"]),
        (r"^(?:patient)?(\d*)", ["7", "7", "COVID/scan.png"]),
        (None, ["COVID/patient7-a.png", "COVID/patient7-b.png", "COVID/scan.png"]),
    ],
)
def test_patients_come_from_a_pattern_and_else_every_file_is_one(
    tmp_path: Path, pattern: str | None, patients: list[str]
) -> None:
    for name in ("patient7-a.png", "patient7-b.png", "scan.png"):
        write_image(tmp_path / "COVID" / name)
    dataset = FolderDataset(tmp_path, patient_id=pattern)
    assert [s.patient_id for s in dataset.samples] == patients
    expected = {} if pattern is None else {"names without a patient number": 1}
    assert dataset.report().notes == expected


def test_equal_names_in_two_folders_are_two_patients(tmp_path: Path) -> None:
    for folder in ("COVID", "Normal"):
        write_image(tmp_path / folder / "1.png", folder)
    assert len({s.patient_id for s in FolderDataset(tmp_path).samples}) == 2


def test_a_source_is_named_after_its_folder_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "hospital")
    assert FolderDataset(tmp_path / "hospital").sources == ("hospital",)
    assert FolderDataset(tmp_path / "hospital", source="site").sources == ("site",)
    monkeypatch.chdir(tmp_path / "hospital")
    assert FolderDataset(".").sources == ("hospital",)


def test_parts_of_a_collection_share_its_source_and_its_patients(tmp_path: Path) -> None:
    """Else a patient of ``train`` who is also in ``test`` would be two, and nobody would notice."""
    names = {"train": ("7_a.png", "x.png"), "test": ("7_b.png", "x.png")}
    for part, (numbered, plain) in names.items():
        write_image(tmp_path / "hospital" / part / "COVID" / numbered, numbered)
        write_image(tmp_path / "hospital" / part / "COVID" / plain, part)
    train, test = (FolderDataset(tmp_path / "hospital" / part) for part in names)
    assert train.sources == test.sources == ("hospital",)
    assert FolderDataset(tmp_path / "hospital" / "test", source="site").sources == ("site",)
    of = [{s.patient_id for s in part.samples} for part in (train, test)]
    assert of[0] & of[1] == {"7"}, "equal names without a number are two patients"
    both, whole = train + test, FolderDataset(tmp_path / "hospital")
    assert {(s.path, s.patient_id) for s in both.samples} == {
        (s.path, s.patient_id) for s in whole.samples
    }


@pytest.mark.parametrize("content", [[], ["a.png"], [".hidden/a.png"], ["__MACOSX/a.png"]])
def test_a_folder_without_class_folders_is_not_found(tmp_path: Path, content: list[str]) -> None:
    for name in content:
        write_image(tmp_path / name)
    with pytest.raises(DatasetNotFoundError, match=r"has no class folder\. Expected .*<class>/"):
        FolderDataset(tmp_path)


def test_class_folders_that_no_label_names_are_not_found(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"with a class of \['covid', 'healthy'\]"):
        FolderDataset(write_folder(tmp_path), {"healthy": "normal", "covid": "covid19"})


def test_an_empty_class_folder_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path, {"Normal": 2, "COVID": 0, "edema": 0})
    with pytest.raises(DatasetError, match=r"No usable image of \['covid19'\]"):
        FolderDataset(tmp_path)
    assert len(FolderDataset(tmp_path, classes=["normal"])) == 2


def test_classes_that_no_folder_holds_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"No usable image of \['normal', 'covid19'\]"):
        FolderDataset(write_folder(tmp_path, {"cats": 1, "dogs": 1}))


def test_a_pattern_that_is_none_is_a_wrong_argument(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"patient_id must be a regular expression, got '\(\\\\d'"):
        FolderDataset(write_folder(tmp_path), patient_id=r"(\d")


# Lists


def test_only_three_columns_are_required(tmp_path: Path) -> None:
    images = [write_image(tmp_path / "img" / name) for name in ("a.png", "b.png")]
    rows = [["img/a.png", "covid19", "007"], [str(images[1]), "normal", "1e3"]]
    dataset = ManifestDataset(write_csv(tmp_path / "clinic.csv", HEADER, rows))
    relative, absolute = dataset.samples
    assert [relative.path, absolute.path] == images
    assert (relative.patient_id, absolute.patient_id) == ("007", "1e3")
    assert (relative.source, relative.view, relative.finding) == ("clinic", "unknown", "covid19")
    assert relative.metadata == {}


def test_optional_columns_are_fields_and_further_ones_metadata(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    header = ["age", " label ", "view", "patient_id", "source", "finding", "path", "", "sex "]
    row = ["65", "covid19", "AP Supine", "1", "ward", "COVID-19", "a.png", "unnamed", "F"]
    sample = ManifestDataset(write_csv(tmp_path / "list.csv", header, [row])).samples[0]
    assert (sample.label, sample.view, sample.finding) == ("covid19", "AP Supine", "COVID-19")
    assert (sample.source, sample.metadata) == ("ward", {"age": "65", "sex": "F"})


def test_an_empty_optional_cell_is_as_no_column(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    header = [*HEADER, "source", "view", "finding"]
    table = write_csv(tmp_path / "list.csv", header, [["a.png", "normal", "1", "", "", ""]])
    sample = ManifestDataset(table).samples[0]
    assert (sample.source, sample.view, sample.finding) == ("list", "unknown", "normal")


def test_rows_that_cannot_be_used_are_dropped_and_counted(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png")
    write_image(tmp_path / "c.png")
    (tmp_path / "folder.png").mkdir()
    rows = [
        ["a.png", "normal", "1"],
        ["c.png", "edema", "1"],
        ["nul\0/a.png", "edema", "1"],
        ["a.png", "", "1"],
        ["a.png", "normal", ""],
        ["a.png", "normal"],
        ["gone.png", "normal", "1"],
        ["", "normal", "1"],
        ["folder.png", "normal", "1"],
        ["nul\0.png", "normal", "1"],
        ["n" * 300 + ".png", "normal", "1"],
        ["a.png/b.png", "normal", "1"],
        ["b.png", "normal", "2", "", " "],
    ]
    report = ManifestDataset(write_csv(tmp_path / "list.csv", HEADER, rows)).report()
    assert (report.found, report.kept) == (13, 2)
    assert report.dropped == {
        "image file missing": 6,
        "no patient_id": 2,
        "label outside the classes (edema)": 2,
        "label outside the classes (empty)": 1,
    }


def test_a_file_that_is_listed_again_counts_once(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png")
    rows = [["a.png", "Normal", "1"], ["b.png", "normal", "1"], ["a.png", "no finding", " 1"]]
    dataset = ManifestDataset(write_csv(tmp_path / "list.csv", HEADER, [*rows, rows[0]]))
    assert [s.path.name for s in dataset.samples] == ["a.png", "b.png"]
    assert (dataset.report().found, dataset.report().dropped) == (4, {"file listed twice": 2})


@pytest.mark.parametrize("place", ["a.png", "./a.png", "{}/a.png", "../{0.name}/a.png"])
@pytest.mark.parametrize(
    "other", [["covid19", "1", "x"], ["normal", "2", "x"], ["normal", "1", "y"]]
)
def test_a_file_that_is_listed_as_two_things_is_an_error(
    tmp_path: Path, place: str, other: list[str]
) -> None:
    write_image(tmp_path / "a.png")
    rows = [["a.png", "normal", "1", "x"], [place.format(tmp_path), *other]]
    table = write_csv(tmp_path / "list.csv", [*HEADER, "source"], rows)
    message = r"list.csv lists .*a.png twice, with .*'normal', '1', 'x'.* Keep one row per file"
    with pytest.raises(DatasetError, match=message):
        ManifestDataset(table)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("patient", ["1", ""])
def test_a_file_that_is_listed_inside_and_outside_the_classes_is_an_error(
    tmp_path: Path, order: int, patient: str
) -> None:
    write_image(tmp_path / "a.png")
    rows = [["a.png", "covid19", "1"], ["./a.png", "pneumonia", patient]]
    table = write_csv(tmp_path / "list.csv", HEADER, rows[::order])
    with pytest.raises(DatasetError, match=r"twice, with .*'covid19'.* and .*'pneumonia'.* Keep"):
        ManifestDataset(table)


@pytest.mark.parametrize("order", [1, -1])
def test_a_file_that_has_another_label_where_it_has_no_patient_is_an_error(
    tmp_path: Path, order: int
) -> None:
    write_image(tmp_path / "a.png")
    rows = [["a.png", "covid19", "1"], ["a.png", "normal", ""], ["a.png", "covid19", ""]]
    table = write_csv(tmp_path / "list.csv", HEADER, rows[::order])
    with pytest.raises(DatasetError, match=r"twice, with .*'covid19'.* and .*'normal'.* Keep"):
        ManifestDataset(table)


@pytest.mark.skipif(os.sep != "/", reason="Windows reads its own paths")
def test_a_path_as_windows_writes_it_is_told_to_be_the_reason(tmp_path: Path) -> None:
    write_image(tmp_path / "img" / "a.png")
    rows = [["img\\a.png", "normal", "1"], ["img/a.png", "normal", "1"]]
    dataset = ManifestDataset(write_csv(tmp_path / "list.csv", HEADER, rows))
    assert dataset.report().dropped == {r"image file missing (its path has \ for /)": 1}


def test_a_folder_per_patient_is_refused_in_a_few_lines(tmp_path: Path) -> None:
    for number in range(100):
        write_image(tmp_path / "train" / f"patient{number:05d}" / "view1_frontal.jpg")
    with pytest.raises(DatasetError, match=r"dropped +70  other reasons") as refused:
        open_dataset(tmp_path)
    assert len(str(refused.value).splitlines()) < 40


def test_blanks_around_cells_do_not_count_except_in_a_path(tmp_path: Path) -> None:
    write_image(tmp_path / " a.png")
    write_image(tmp_path / "b.png")
    rows = [[" a.png", "normal ", "7"], ["b.png", " normal", "7 "]]
    dataset = ManifestDataset(write_csv(tmp_path / "list.csv", HEADER, rows))
    assert [(s.path.name, s.patient_id) for s in dataset.samples] == [
        (" a.png", "7"),
        ("b.png", "7"),
    ]


@pytest.mark.parametrize("sign", ["-", " (-)", "−", "?", " - "])
def test_a_sign_that_doubts_or_denies_is_part_of_a_label(tmp_path: Path, sign: str) -> None:
    names = ["COVID+", "COVID" + sign, "Normal"]
    rows = [[write_image(tmp_path / f"{i}.png").name, name, str(i)] for i, name in enumerate(names)]
    dataset = ManifestDataset(write_csv(tmp_path / "list.csv", HEADER, rows))
    assert [s.label for s in dataset.samples] == ["covid19", "normal"]
    dropped = f"label outside the classes ({names[1].strip()})"
    assert dataset.report().dropped == {dropped: 1}


def test_lists_know_the_labels_and_views_that_folders_and_cohen_know(tmp_path: Path) -> None:
    names = ["Normal", "COVID-19", "No finding", "C19", "normal"]
    paths = [write_image(tmp_path / f"{i}.png") for i in range(len(names))]
    rows = [[p.name, name, p.stem, "ap supine"] for p, name in zip(paths, names, strict=True)]
    table = write_csv(tmp_path / "list.csv", [*HEADER, "view"], rows)
    dataset = ManifestDataset(table, {"C19": "covid19"})
    assert dataset.targets == [0, 1, 0, 1, 0]
    assert [s.finding for s in dataset.samples] == names
    assert {s.view for s in dataset.samples} == {"AP Supine"}
    as_they_are = ManifestDataset(table, classes=["Normal", "COVID-19"])
    assert [s.label for s in as_they_are.samples] == ["Normal", "COVID-19"]


def test_a_list_without_sources_is_named_after_itself_or_its_folder(tmp_path: Path) -> None:
    write_image(tmp_path / "clinic.v2" / "a.png")
    for name, source in (("list.csv", "list"), ("manifest.csv", "clinic.v2")):
        table = write_csv(tmp_path / "clinic.v2" / name, HEADER, [["a.png", "normal", "1"]])
        assert ManifestDataset(table).sources == (source,)
        assert ManifestDataset(table, source="site").sources == ("site",)


@pytest.mark.parametrize("name", ["{}.csv", "{}/manifest.csv"])
def test_lists_of_parts_share_the_source_of_the_folder_around(tmp_path: Path, name: str) -> None:
    place, parts = tmp_path / "hospital", []
    for part in ("train", "test"):
        image = write_image(place / "images" / f"{part}.png", part)
        table = write_csv(place / name.format(part), HEADER, [[str(image), "normal", "7"]])
        parts.append(ManifestDataset(table))
    assert [part.sources for part in parts] == [("hospital",)] * 2
    assert {(s.source, s.patient_id) for s in (parts[0] + parts[1]).samples} == {("hospital", "7")}


def test_a_folder_with_a_manifest_is_enough(tmp_path: Path) -> None:
    phantoms = SyntheticChestXray(4, image_size_px=32)
    phantoms.save(tmp_path / "phantoms")
    dataset = ManifestDataset(tmp_path / "phantoms")
    assert dataset.targets == phantoms.targets
    assert dataset[2][0].tobytes() == phantoms[2][0].tobytes()


def test_a_byte_order_mark_as_of_spreadsheets_is_skipped(tmp_path: Path) -> None:
    write_image(tmp_path / "ä.png")
    text = "path,label,patient_id\r\nä.png,normal,1\r\n"
    (tmp_path / "list.csv").write_bytes(text.encode("utf-8-sig"))
    assert len(ManifestDataset(tmp_path / "list.csv")) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"lacks the columns \['path', 'label', 'patient_id'\]; it has \[\]"),
        (b"\n", "lacks the columns"),
        (b"path,label\na.png,normal\n", r"lacks the columns \['patient_id'\]"),
        (b"path;label;patient_id\na.png;normal;1\n", "separated by ';': save it with commas"),
        (b"path,label,patient_id,label\na.png,normal,1,x\n", r"more than one column \['label'\]"),
        (b"path,label,patient_id\na,b.png,normal,1\n", "line 2: 4 cells, but the header has 3"),
        (b"path,label,patient_id\n", "has a header and no rows"),
        (b"path,label,patient_id\n\n\n", "has a header and no rows"),
        (b"<!DOCTYPE html><html>404</html>", "lacks the columns.* is an HTML or XML page"),
        (b"\n\n<!DOCTYPE html>\n<html></html>", "lacks the columns.* is an HTML or XML page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8, "lacks the columns"),
        (b"\0" * 1000, "lacks the columns"),
        ("path,label,patient_id\n".encode("utf-16"), "lacks the columns.*UTF-16: save it as UTF-8"),
        (
            b"PK\x03\x04\x14\0\6\0\x08\0[Content_Types].xml",
            "workbook or Parquet.*: save the table as CSV",
        ),
        (
            bytes.fromhex("d0cf11e0a1b11ae1") + bytes(504),
            "workbook or Parquet.*: save the table as CSV",
        ),
        (
            b"PAR1\x15\4\x15\xd0\2\x15\xa0\1L\x15\x18\0",
            "workbook or Parquet.*: save the table as CSV",
        ),
        (b'path,label,patient_id\n"' + b"x" * 200_000, "cannot be read as CSV"),
    ],
)
def test_a_damaged_list_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(DatasetError, match=message) as error:
        ManifestDataset(tmp_path / "list.csv")
    assert str(tmp_path / "list.csv") in str(error.value)


@pytest.mark.parametrize("name", ["nothing.csv", "folder"])
def test_a_missing_list_is_not_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DatasetNotFoundError, match=r"is missing; expected a CSV with columns"):
        ManifestDataset(tmp_path / name)


def test_a_listed_class_without_a_usable_image_is_an_error(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    rows = [["a.png", "normal", "1"], ["gone.png", "covid19", "2"]]
    table = write_csv(tmp_path / "list.csv", HEADER, rows)
    with pytest.raises(DatasetError, match=r"No usable image of \['covid19'\]"):
        ManifestDataset(table)
    assert len(ManifestDataset(table, classes=["normal"])) == 1
    with pytest.raises(DatasetError, match=r"No usable image of \['a', 'b'\]"):
        ManifestDataset(table, classes=["a", "b"])


# Hannover


def test_hannover_is_covid19_with_its_own_patients_and_views(tmp_path: Path) -> None:
    dataset = HannoverCovidDataset(write_hannover(tmp_path, patients=3))
    assert {s.label for s in dataset.samples} == {"covid19"}
    assert [s.view for s in dataset.samples] == ["PA", "AP"] * 3
    assert len({s.patient_id for s in dataset.samples}) == 3
    first = dataset.samples[0]
    assert (first.source, first.metadata["image_id"]) == ("hannover", SHARED_IMAGE_ID)
    assert first.metadata["license"] == "CC BY 3.0"
    assert dataset.report().images == {"normal": 0, "covid19": 6}
    assert dataset[0][0].size == (48, 40)


def test_hannover_rows_that_cannot_be_used_are_dropped_and_counted(tmp_path: Path) -> None:
    write_image(tmp_path / "png" / "a.png")
    rows = [["1", "a", ""], ["1", "gone", "ap"], ["", "a", "ap"], ["1", "n" * 300, "ap"]]
    write_csv(tmp_path / "data.csv", ["patient_id", "image_id", "projection"], rows)
    dataset = HannoverCovidDataset(tmp_path)
    assert [s.view for s in dataset.samples] == ["unknown"]
    assert dataset.report().dropped == {"image file missing": 2, "no patient_id": 1}


def test_a_hannover_row_that_comes_again_counts_once(tmp_path: Path) -> None:
    write_image(tmp_path / "png" / "a.png")
    header, rows = ["patient_id", "image_id", "projection"], [["1", "a", "ap"]] * 3
    dataset = HannoverCovidDataset(write_csv(tmp_path / "data.csv", header, rows).parent)
    assert len(dataset) == 1
    assert (dataset.report().found, dataset.report().dropped) == (3, {"file listed twice": 2})
    write_csv(tmp_path / "data.csv", header, [*rows, ["2", "a", "ap"]])
    with pytest.raises(DatasetError, match=r"data.csv lists .*a.png twice, with .*'1'.* and .*'2'"):
        HannoverCovidDataset(tmp_path)


def test_hannover_holds_covid19_only(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"No usable image of \['covid19'\]"):
        HannoverCovidDataset(write_hannover(tmp_path), classes=["normal"])


def test_hannover_without_its_table_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"data\.csv is missing"):
        HannoverCovidDataset(tmp_path)
    with pytest.raises(DatasetNotFoundError, match="is no folder, expected the folder of covid-19"):
        HannoverCovidDataset(tmp_path / "nowhere")
    write_csv(tmp_path / "data.csv", ["image_id"], [["a"]])
    with pytest.raises(DatasetError, match=r"lacks the columns \['patient_id', 'projection'\]"):
        HannoverCovidDataset(tmp_path)


# Whatever is there


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (write_cohen, CohenCovidDataset),
        (write_kermany, KermanyPneumoniaDataset),
        (write_hannover, HannoverCovidDataset),
        (write_nih, FolderDataset),
        (write_folder, FolderDataset),
    ],
)
def test_a_data_set_is_known_by_its_layout(
    tmp_path: Path, write: Callable[[Path], Path], kind: type[ChestXrayDataset]
) -> None:
    dataset = open_dataset(str(write(tmp_path / "data")))
    assert type(dataset) is kind
    assert len(dataset) > 0


@pytest.mark.parametrize("layout", ["kaggle", "kaggle-nested", "mendeley", "mendeley-v3"])
def test_every_kermany_layout_is_known(tmp_path: Path, layout: str) -> None:
    assert type(open_dataset(write_kermany(tmp_path, layout))) is KermanyPneumoniaDataset


def test_a_list_is_known_by_its_suffix_or_in_its_folder(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    rows = [["a.png", "pneumonia", "1"]]
    for name in ("list.CSV", "manifest.csv"):
        write_csv(tmp_path / name, HEADER, rows)
        dataset = open_dataset(tmp_path / name, classes=["pneumonia"])
        assert (type(dataset), len(dataset)) == (ManifestDataset, 1)
    assert type(open_dataset(tmp_path, classes=["pneumonia"])) is ManifestDataset


def test_classes_are_passed_on(tmp_path: Path) -> None:
    rows = [cohen_row("1", "SARS", "a.png"), cohen_row("2", "COVID-19", "b.png")]
    root = write_cohen(tmp_path, rows=rows)
    assert open_dataset(root, classes=["pneumonia", "covid19"]).targets == [0, 1]


def test_a_damaged_data_set_is_not_taken_for_another(tmp_path: Path) -> None:
    root = write_cohen(tmp_path)
    (root / "metadata.csv").write_text("<html>", encoding="utf-8")
    with pytest.raises(DatasetError, match="is an HTML or XML page"):
        open_dataset(root)


def test_the_table_of_a_known_collection_is_told_to_be_opened_by_its_folder(
    tmp_path: Path,
) -> None:
    with pytest.raises(DatasetError, match="belongs to a public collection, pass its folder"):
        open_dataset(write_cohen(tmp_path) / "metadata.csv")


@pytest.mark.parametrize("name", ["", "nothing", "file.txt", "nul\0", "n" * 300])
def test_what_is_no_data_set_is_not_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").touch()
    with pytest.raises(DatasetNotFoundError, match="no data set of a known layout"):
        open_dataset(tmp_path / name)


# Real radiographs


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("folder", "kind", "images"),
    [
        ("covid-chestxray-dataset", CohenCovidDataset, (19, 77, 427)),
        ("chest_xray", KermanyPneumoniaDataset, (1341, 3875, 0)),
        ("covid-19-image-repository", HannoverCovidDataset, (0, 0, 243)),
        ("nih-subset", FolderDataset, (202, 224, 0)),
    ],
)
def test_the_real_collections_are_known_and_complete(
    real_data: Path, folder: str, kind: type[ChestXrayDataset], images: tuple[int, int, int]
) -> None:
    dataset = open_dataset(real_data / folder, classes=LABELS)
    assert type(dataset) is kind
    assert tuple(dataset.report().images.values()) == images
    assert dataset.report().notes.get("names without a patient number", 0) == 0
    assert all(s.path.is_file() for s in dataset.samples)


@pytest.mark.real_data
def test_the_real_hannover_patients_are_71(real_data: Path) -> None:
    dataset = HannoverCovidDataset(real_data / "covid-19-image-repository")
    assert dataset.report().patients["covid19"] == 71
    assert dataset.report().found == 243
    assert {s.view for s in dataset.samples} == {"AP", "PA"}


def test_the_home_folder_of_no_user_is_an_error_of_ours() -> None:
    for missing in (FolderDataset, open_dataset):
        with pytest.raises(DatasetNotFoundError, match="~no-such-user/data"):
            missing("~no-such-user/data")


def test_a_folder_that_labels_names_must_exist(tmp_path: Path) -> None:
    write_folder(tmp_path, {"well": 2, "sick": 2})
    with pytest.raises(DatasetNotFoundError, match=r"no folder \['sik'\], which labels= names"):
        FolderDataset(tmp_path, {"well": "normal", "sik": "covid19"})


@pytest.mark.parametrize(
    "labels", [{0: "normal"}, {"0": 1}, ["normal", "covid19"], "normal", [("0", "normal")]]
)
def test_labels_that_do_not_map_text_to_text_are_refused(tmp_path: Path, labels: Any) -> None:
    write_folder(tmp_path, {"0": 1})
    table = write_csv(tmp_path / "table.csv", HEADER, [["0/x.png", "0", "1"]])
    cohen = write_cohen(tmp_path / "cohen")
    for open_, argument in (
        (lambda: FolderDataset(tmp_path, labels), "labels"),
        (lambda: ManifestDataset(table, labels), "labels"),
        (lambda: CohenCovidDataset(cohen, findings=labels), "findings"),
    ):
        with pytest.raises(TypeError, match=f"{argument} must map text to text, such as"):
            open_()


def test_a_folder_is_not_to_be_moved_away_for_want_of_open_files(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with no_more_files(), pytest.raises(ResourceError, match=r"the machine, .*open files"):
        FolderDataset(tmp_path)
    assert len(FolderDataset(tmp_path))
