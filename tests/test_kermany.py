from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from chestxray_covid.datasets.duplicates import patient_groups
from chestxray_covid.datasets.kermany import KermanyPneumoniaDataset, find_layout
from chestxray_covid.errors import DatasetError, DatasetNotFoundError, DownloadError
from sources import KERMANY_FILES, KERMANY_V3_FILES, write_image, write_kermany

BOTH = ("normal", "pneumonia")
LAYOUTS = ("kaggle", "kaggle-nested", "mendeley", "mendeley-v3")


def names_of(dataset: KermanyPneumoniaDataset) -> Counter[str]:
    return Counter(s.path.name for s in dataset.samples)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found_and_every_image_counted_once(tmp_path: Path, layout: str) -> None:
    dataset = KermanyPneumoniaDataset(write_kermany(tmp_path, layout), classes=BOTH)
    files = KERMANY_V3_FILES if layout == "mendeley-v3" else KERMANY_FILES
    has_val = not layout.startswith("mendeley")
    expected = [n for k, names in files.items() if has_val or k[:3] != "val" for n in names]
    assert names_of(dataset) == Counter(expected)
    assert dataset.report().found == dataset.report().kept == len(expected)
    assert dataset.report().notes == {}
    assert all(s.source == "kermany" and s.is_frontal for s in dataset.samples)
    assert dataset[0][0].size == (48, 40)


@pytest.mark.parametrize("inner", ["", "chest_xray", "chest_xray/chest_xray"])
def test_the_root_may_be_any_folder_around_the_splits(tmp_path: Path, inner: str) -> None:
    root = write_kermany(tmp_path)
    dataset = KermanyPneumoniaDataset(root / inner, classes=BOTH)
    assert len(dataset) == sum(map(len, KERMANY_FILES.values()))
    assert len({s.path.parent.parent.parent for s in dataset.samples}) == 1


def test_what_macos_leaves_behind_is_not_read(tmp_path: Path) -> None:
    root = write_kermany(tmp_path)
    assert len(list(root.rglob("*.jpeg"))) > 2 * sum(map(len, KERMANY_FILES.values()))
    dataset = KermanyPneumoniaDataset(root, classes=BOTH)
    assert not any(s.path.name.startswith(".") for s in dataset.samples)
    assert not any("__MACOSX" in s.path.parts for s in dataset.samples)
    for i in range(len(dataset)):
        assert dataset[i][0].mode == "L"


def test_labels_come_from_the_folder_and_findings_from_the_name(tmp_path: Path) -> None:
    for layout in ("kaggle", "mendeley-v3"):
        dataset = KermanyPneumoniaDataset(write_kermany(tmp_path / layout, layout), classes=BOTH)
        for s in dataset.samples:
            name = s.path.name.lower()
            kind = next((k for k in ("virus", "bacteria") if k in name), "")
            finding = {"virus": "viral pneumonia", "bacteria": "bacterial pneumonia", "": "normal"}
            assert s.finding == finding[kind]
            assert s.label == ("pneumonia" if kind else "normal")


def test_patients_are_numbered_per_aetiology_and_prefix(tmp_path: Path) -> None:
    dataset = KermanyPneumoniaDataset(write_kermany(tmp_path), classes=BOTH)
    patients = {s.path.name: s.patient_id for s in dataset.samples}
    assert patients["person1_bacteria_1.jpeg"] == patients["person1_bacteria_2.jpeg"]
    assert patients["person1_bacteria_1.jpeg"] != patients["person1_virus_6.jpeg"]
    assert patients["person447_virus_921_1.jpeg"] == patients["person447_virus_920.jpeg"]
    assert patients["IM-0115-0001.jpeg"] == patients["IM-0115-0002.jpeg"]
    assert patients["IM-0115-0001.jpeg"] != patients["NORMAL2-IM-0115-0001.jpeg"]
    third = "NORMAL2-IM-0927-0001-0002.jpeg"
    assert patients[third] == patients["NORMAL2-IM-0927-0001.jpeg"] == "NORMAL2-IM-0927"
    assert patients["person1_virus_6.jpeg"] == "virus-1"
    assert len(set(patients.values())) == len(set(patient_groups(dataset, find_copies=False))) == 16


def test_patients_of_the_later_version_are_numbered_per_group(tmp_path: Path) -> None:
    dataset = KermanyPneumoniaDataset(write_kermany(tmp_path, "mendeley-v3"), classes=BOTH)
    assert Counter(s.patient_id for s in dataset.samples) == {
        "NORMAL-28501": 2,
        "NORMAL-32326": 1,
        "NORMAL-4512": 1,
        "BACTERIA-7422": 2,
        "VIRUS-7422": 1,
        "VIRUS-1004": 1,
    }


def test_a_name_without_a_number_is_a_patient_of_its_own_and_noted(tmp_path: Path) -> None:
    root = write_kermany(tmp_path)
    write_image(root / "chest_xray" / "train" / "NORMAL" / "scan.JPG")
    dataset = KermanyPneumoniaDataset(root)
    assert [s.patient_id for s in dataset.samples if s.path.name == "scan.JPG"] == ["scan"]
    assert dataset.report().notes == {"names without a patient number": 1}


@pytest.mark.parametrize(
    ("split", "counts"), [("train", (8, 6)), ("val", (1, 1)), ("test", (2, 2))]
)
def test_a_shipped_split_can_be_asked_for(
    tmp_path: Path, split: str, counts: tuple[int, int]
) -> None:
    dataset = KermanyPneumoniaDataset(write_kermany(tmp_path), classes=BOTH, split=split)
    assert (dataset.targets.count(0), dataset.targets.count(1)) == counts
    assert {s.metadata["split"] for s in dataset.samples} == {split}


def test_a_split_that_is_a_link_to_another_counts_once(tmp_path: Path) -> None:
    layout = write_kermany(tmp_path) / "chest_xray"
    whole = len(KermanyPneumoniaDataset(tmp_path, classes=BOTH))
    shutil.rmtree(layout / "val")
    (layout / "val").symlink_to("test", target_is_directory=True)
    dataset = KermanyPneumoniaDataset(tmp_path, classes=BOTH)
    assert len(dataset) == whole - 2  # those of val itself
    assert dataset.report().dropped == {"file listed twice": 4}
    assert len(KermanyPneumoniaDataset(tmp_path, classes=BOTH, split="val")) == 4


def test_the_shipped_splits_are_merged_otherwise(tmp_path: Path) -> None:
    dataset = KermanyPneumoniaDataset(write_kermany(tmp_path), classes=BOTH)
    assert Counter(s.metadata["split"] for s in dataset.samples) == {
        "train": 14,
        "val": 2,
        "test": 4,
    }


def test_by_default_only_the_normal_ones_are_kept_and_only_they_promised(tmp_path: Path) -> None:
    dataset = KermanyPneumoniaDataset(write_kermany(tmp_path))
    assert dataset.classes == ("normal", "covid19")
    assert set(dataset.targets) == {0}
    report = dataset.report()
    assert (report.kept, report.dropped) == (11, {"finding outside the classes (pneumonia)": 9})
    assert report.images == {"normal": 11, "covid19": 0}


def test_other_files_in_a_class_folder_are_counted(tmp_path: Path) -> None:
    root = write_kermany(tmp_path)
    (root / "chest_xray" / "train" / "NORMAL" / "Thumbs.db").touch()
    (root / "chest_xray" / "train" / "NORMAL" / "more").mkdir()
    report = KermanyPneumoniaDataset(root, classes=BOTH).report()
    assert report.dropped == {"not an image file name": 2}
    assert report.found == report.kept + 2


def test_byte_identical_images_under_other_names_are_one_group(tmp_path: Path) -> None:
    root = write_kermany(tmp_path)
    train = root / "chest_xray" / "train" / "NORMAL"
    shutil.copyfile(train / "IM-0122-0001.jpeg", train / "IM-0999-0001.jpeg")
    dataset = KermanyPneumoniaDataset(root)
    groups = dict(zip((s.path.name for s in dataset.samples), patient_groups(dataset), strict=True))
    assert groups["IM-0122-0001.jpeg"] == groups["IM-0999-0001.jpeg"]
    assert len(set(groups.values())) == len({s.patient_id for s in dataset.samples}) - 1


def test_a_download_is_not_started_where_the_collection_is(tmp_path: Path) -> None:
    root = write_kermany(tmp_path)
    assert len(KermanyPneumoniaDataset(root, download=True)) == 11


def test_a_download_is_asked_for_where_the_collection_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="is needed, but HF_HUB_OFFLINE is set"):
        KermanyPneumoniaDataset(tmp_path / "new", download=True)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown value 'valid' for split\. Valid values are"):
        KermanyPneumoniaDataset(write_kermany(tmp_path), split="valid")


def test_a_split_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"No usable image of \['normal'\]"):
        KermanyPneumoniaDataset(write_kermany(tmp_path, "mendeley"), split="val")


def test_covid19_alone_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"normal and pneumonia, none of \['covid19'\]"):
        KermanyPneumoniaDataset(write_kermany(tmp_path), classes=["covid19"])


def test_a_promised_class_without_images_is_an_error(tmp_path: Path) -> None:
    root = write_kermany(tmp_path, "kaggle-nested")
    for split in ("train", "val", "test"):
        shutil.rmtree(root / "chest_xray" / "chest_xray" / split / "PNEUMONIA")
    assert len(KermanyPneumoniaDataset(root)) == 11
    with pytest.raises(DatasetError, match=r"No usable image of \['pneumonia'\]"):
        KermanyPneumoniaDataset(root, classes=BOTH)


@pytest.mark.parametrize("inner", ["chest_xray/train", "chest_xray/train/NORMAL"])
def test_a_wrong_root_is_not_found(tmp_path: Path, inner: str) -> None:
    root = write_kermany(tmp_path)
    assert find_layout(root / inner) is None
    with pytest.raises(DatasetNotFoundError, match=r"is not the Kermany download: no chest_xray/"):
        KermanyPneumoniaDataset(root / inner)


@pytest.mark.parametrize("other", ["COVID19", "CNV"])
def test_splits_with_other_classes_are_another_collection(tmp_path: Path, other: str) -> None:
    root = write_kermany(tmp_path, "mendeley-v3")
    write_image(root / "chest_xray" / "test" / other / "a.jpeg")
    assert find_layout(root) is None
    with pytest.raises(DatasetNotFoundError, match="NORMAL and PNEUMONIA alone"):
        KermanyPneumoniaDataset(root)


def test_the_folders_of_mendeleys_later_archive_are_known(tmp_path: Path) -> None:
    write_kermany(tmp_path / "CellData", "mendeley-v3")
    write_image(tmp_path / "CellData" / "OCT" / "train" / "CNV" / "CNV-1-1.jpeg")
    assert len(KermanyPneumoniaDataset(tmp_path, classes=BOTH)) == 8


def test_what_is_no_regular_file_is_dropped(tmp_path: Path) -> None:
    normal = write_kermany(tmp_path) / "chest_xray" / "train" / "NORMAL"
    (normal / "IM-0001-0009.jpeg").mkdir()
    (normal / "IM-0002-0009.jpeg").symlink_to(tmp_path / "gone")
    (normal / "IM-0003-0009.jpeg").symlink_to(normal / "IM-0115-0001.jpeg")
    report = KermanyPneumoniaDataset(tmp_path, classes=BOTH).report()
    assert report.dropped == {"no regular file": 2}
    assert report.kept == sum(map(len, KERMANY_FILES.values())) + 1


def test_a_patient_is_the_same_however_the_name_is_cased(tmp_path: Path) -> None:
    for name in ("person1_virus_9.jpeg", "PERSON1_VIRUS_10.JPEG", "virus-1-0001.jpeg"):
        write_image(tmp_path / "train" / "PNEUMONIA" / name)
    write_image(tmp_path / "train" / "NORMAL" / "normal2-im-0001-0001.jpeg")
    dataset = KermanyPneumoniaDataset(tmp_path, classes=BOTH)
    assert Counter(s.patient_id for s in dataset.samples) == {
        "virus-1": 2,
        "VIRUS-1": 1,
        "NORMAL2-IM-0001": 1,
    }
    assert {s.finding for s in dataset.samples} == {"normal", "viral pneumonia"}


def test_a_missing_root_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match="is no folder, expected the folder of the Ker"):
        KermanyPneumoniaDataset(tmp_path / "nowhere")


@pytest.mark.real_data
def test_the_real_collection_has_the_official_counts(real_data: Path) -> None:
    dataset = KermanyPneumoniaDataset(real_data, classes=BOTH)
    report = dataset.report()
    assert report.images == {"normal": 1341, "pneumonia": 3875}
    assert report.found == report.kept == 5216
    assert report.notes == {}
    parts = {split: set[str]() for split in ("train", "val", "test")}
    for s in dataset.samples:
        parts[s.metadata["split"]].add(s.patient_id)
    assert sum(map(len, parts.values())) == len(set.union(*parts.values()))
    odd = [s for s in dataset.samples if s.path.name == "person447_virus_921_1.jpeg"]
    assert [s.patient_id for s in odd] == ["virus-447"]
