from __future__ import annotations

import copy
import csv
import json
import multiprocessing
import operator
import os
import re
import threading
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import FrozenInstanceError, replace
from pathlib import Path, PureWindowsPath
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from chestxray_covid.classifier import Classifier
from chestxray_covid.datasets import base
from chestxray_covid.datasets.base import (
    LABELS,
    MANIFEST_COLUMNS,
    ChestXrayDataset,
    Sample,
    concatenate,
)
from chestxray_covid.datasets.cohen import CohenCovidDataset
from chestxray_covid.datasets.duplicates import patient_groups
from chestxray_covid.datasets.folder import (
    FolderDataset,
    HannoverCovidDataset,
    ManifestDataset,
    open_dataset,
)
from chestxray_covid.datasets.kermany import KermanyPneumoniaDataset
from chestxray_covid.datasets.report import DatasetReport, patient_key, summarise
from chestxray_covid.datasets.synthetic import SyntheticChestXray
from chestxray_covid.errors import (
    DatasetError,
    DatasetNotFoundError,
    ImageNotFoundError,
    check_classes,
)
from chestxray_covid.files import existing_folder, expanded
from chestxray_covid.image import load_image
from chestxray_covid.models import build_densenet121
from chestxray_covid.training import Trainer
from chestxray_covid.training_config import TrainingConfig
from conftest import NUMPY_BOOL, Elsewhere
from sources import (
    HANNOVER_URL,
    SHARED_IMAGE_ID,
    cohen_row,
    draw,
    write_cohen,
    write_csv,
    write_folder,
    write_hannover,
    write_image,
    write_kermany,
)

#: Names that break naive CSV, shells, terminals and encodings.
HOSTILE_NAMES = (
    "new\nline.png",
    "carriage\rreturn.png",
    "comma, and; semicolon.png",
    "\"quotes\" and 'others'.png",
    "=cmd|'calc'!A0.png",
    "+1+1.png",
    "@SUM(A1).png",
    " leading and trailing .png",
    "\ttab.png",
    "#comment.png",
    "%s%n{0}.png",
    "-rf.png",
    "null.png",
    "NaN.png",
    "007.png",
    "back\\slash.png",
    "bell\a and escape \x1b[31m.png",
    "not utf-8 \udcff\udcfe\udc80.png",
    "n" * 196 + ".png",
    "\u05e2\u05d1\u05e8\u05d9\u05ea \u0627\u0644\u0639\u0631\u0628\u064a\u0629.png",
    "\u202egnp.exe.png",
    "\ufeffmark.png",
    "e\u0301 decomposed.png",
    "\U0001fac1 lungs.png",
    "line\u2028separator.png",
)


@pytest.fixture
def dataset(tmp_path: Path) -> FolderDataset:
    return FolderDataset(write_folder(tmp_path / "site", {"Normal": 3, "COVID": 2}))


def sample(path: str = "a.png", label: str = "normal", **fields: Any) -> Sample:
    plain = {"finding": label, "patient_id": "1", "source": "site"}
    return Sample(path=Path(path), label=label, **{**plain, **fields})


def size_of(image: Image.Image) -> tuple[int, int]:
    return image.size


# Items


def test_an_item_is_a_grey_image_with_the_integer_of_its_class(dataset: FolderDataset) -> None:
    image, target = dataset[4]
    assert isinstance(image, Image.Image)
    assert (image.mode, target) == ("L", 0)
    assert dataset.classes == ("normal", "covid19")
    assert dataset.class_to_idx == {"normal": 0, "covid19": 1}
    assert dataset.targets == [1, 1, 0, 0, 0]
    assert image.tobytes() == draw("Normal-2.png").tobytes()


def test_a_negative_index_counts_from_the_end(dataset: FolderDataset) -> None:
    assert dataset[-1][0].tobytes() == dataset[4][0].tobytes()
    assert dataset[-5][1] == dataset[0][1] == 1


@pytest.mark.parametrize("index", [5, -6, 10**9])
def test_an_index_outside_raises_so_that_iteration_ends(dataset: FolderDataset, index: int) -> None:
    with pytest.raises(IndexError, match="out of range"):
        dataset[index]
    items: Iterator[tuple[Any, Any]] = iter(dataset)
    assert [target for _, target in items] == dataset.targets


@pytest.mark.parametrize("index", [np.int64(1), np.uint8(1), np.array(1), torch.tensor(1)])
def test_integers_of_numpy_and_torch_are_indices(dataset: FolderDataset, index: Any) -> None:
    assert dataset[index][0].tobytes() == dataset[1][0].tobytes()


@pytest.mark.parametrize("index", [1.0, "1", None, slice(2), *NUMPY_BOOL])
def test_what_is_no_integer_is_no_index(dataset: FolderDataset, index: Any) -> None:
    with pytest.raises(TypeError, match="integer"):
        dataset[index]


def test_transforms_see_the_image_and_the_integer_target(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "site", {"Normal": 1, "COVID": 1})
    dataset = FolderDataset(root, transform=size_of, target_transform=str)
    assert [dataset[i] for i in (0, 1)] == [((48, 40), "1"), ((48, 40), "0")]
    assert dataset.targets == [1, 0]


def test_a_reduced_image_is_decoded_only_where_no_transform_asks_for_all(tmp_path: Path) -> None:
    path = write_image(tmp_path / "COVID" / "large.jpeg", size=(800, 640))
    plain = FolderDataset(tmp_path)
    assert plain.image(0, (100, 80)).size == (100, 80)
    assert plain.image(0).size == plain[0][0].size == (800, 640)
    assert FolderDataset(tmp_path, transform=size_of).image(0, (100, 80)) == (800, 640)
    path.unlink()
    with pytest.raises(ImageNotFoundError, match=r"large\.jpeg does not exist"):
        plain[0]


def test_torch_loads_batches_of_it(dataset: FolderDataset) -> None:
    chosen = FolderDataset(Path(dataset.report().root), transform=np.array)
    loader: DataLoader[Any] = DataLoader(chosen, batch_size=2, num_workers=0)
    batches = list(loader)
    assert [tuple(pixels.shape) for pixels, _ in batches] == [(2, 40, 48)] * 2 + [(1, 40, 48)]
    assert [int(t) for _, targets in batches for t in targets] == dataset.targets


def test_it_can_be_sent_to_another_process(tmp_path: Path) -> None:
    cohen = CohenCovidDataset(write_cohen(tmp_path), transform=operator.attrgetter("size"))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        there = list(pool.map(cohen.__getitem__, [0, -1]))
        subset = pool.submit(cohen.subset, [2, 0]).result()
    assert there == [cohen[0], cohen[-1]]
    assert subset.samples == (cohen.samples[2], cohen.samples[0])
    assert all(s.is_file for s in subset.samples)
    assert subset.metadata.equals(cohen.subset([2, 0]).metadata)


def test_it_says_what_it_holds(dataset: FolderDataset) -> None:
    assert repr(dataset) == "<FolderDataset of 5 radiographs (normal: 3, covid19: 2) from site>"
    assert repr(dataset.subset([])) == (
        "<ChestXrayDataset of 0 radiographs (normal: 0, covid19: 0) from empty>"
    )


def test_a_label_that_is_no_class_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"Labels \['covid19', 'x'\] are not among the classes"):
        ChestXrayDataset([sample(), sample(label="x"), sample(label="covid19")], classes=["normal"])


@pytest.mark.parametrize("classes", [(), ("normal", "normal"), ("normal", "")])
def test_classes_must_be_different_names(classes: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="one or more different names"):
        check_classes(classes)


def test_classes_must_not_be_one_string() -> None:
    with pytest.raises(TypeError, match="got the string 'normal'"):
        check_classes("normal")


def test_rows_of_a_table_are_no_samples() -> None:
    table = pd.DataFrame({"path": ["a.png"], "label": ["normal"]})
    for given in (table, table.itertuples(), table.to_dict("records"), ["a.png"]):
        with pytest.raises(TypeError, match=r"expected Sample, as Sample\(path=…, label=…"):
            ChestXrayDataset(given, classes=["normal"])  # type: ignore[arg-type]


def test_metadata_holds_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    strange = os.fsdecode(b"M\xfcnchen.png")
    row = sample(str(tmp_path / strange), metadata={"scanner": strange})
    table = ChestXrayDataset([row], classes=["normal"]).metadata
    assert list(table.loc[0, ["path", "scanner"]]) == [str(tmp_path / strange), strange]


@pytest.mark.parametrize("kind", [set, frozenset])
def test_classes_must_not_be_a_set_whose_order_changes_from_run_to_run(kind: type) -> None:
    with pytest.raises(TypeError, match=r"sequence of names, got the set .*\{'normal'\}"):
        SyntheticChestXray(4, classes=kind({"normal"}))
    numbers = {"normal": 0, "covid19": 1}  # its keys have an order
    assert check_classes(numbers.keys()) == ("normal", "covid19")  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"covid19": 1, "normal": 0}, {0: "normal"}, None, len])
def test_classes_must_not_be_a_dict_or_nothing(given: Any) -> None:
    kind = type(given).__name__
    with pytest.raises(TypeError, match=f"must be a sequence of names, got the {kind} "):
        check_classes(given)


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    assert existing_folder("~/data", "data") == tmp_path / "data"


def test_an_empty_path_is_not_the_current_folder(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    phantoms, network = SyntheticChestXray(4, image_size_px=64), build_densenet121(False)
    phantoms.save("all")
    before = sorted(tmp_path.iterdir())
    for use in (
        lambda: phantoms.save(""),
        lambda: open_dataset(""),
        lambda: open_dataset("all").to_manifest(""),
        lambda: Classifier.from_pretrained(checkpoint_folder, engine="torch").save_pretrained(""),
        lambda: Trainer(network, phantoms, phantoms, TrainingConfig(), output=""),
    ):
        with pytest.raises(ValueError, match="A path is empty"):
            use()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["text", "Path", "another library's"])
def test_an_address_becomes_no_folder_of_that_name(
    kind: str, checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    phantoms, network = SyntheticChestXray(4, image_size_px=64), build_densenet121(False)
    phantoms.save("copy")
    before = sorted(tmp_path.rglob("*"))
    text = "s3://bucket/all"
    other = Elsewhere(text, tmp_path / "copy")
    address: Any = {"text": text, "Path": Path(text)}.get(kind, other)
    classifier = Classifier.from_pretrained(checkpoint_folder, engine="torch")
    for use in (
        phantoms.save,
        open_dataset,
        open_dataset("copy").to_manifest,
        classifier.save_pretrained,
        lambda place: Trainer(network, phantoms, phantoms, TrainingConfig(), output=place),
    ):
        with pytest.raises(ValueError, match=r"s3://?bucket/all is an address, expected a path"):
            use(address)
    for images in (address, [address]):  # of the copy's images, none may speak for the folder
        with pytest.raises(ImageNotFoundError, match=r"is a folder|looks like an address"):
            classifier.predict(images)
    assert sorted(tmp_path.rglob("*")) == before
    # One image is read from its copy, which the other library fetches.
    assert replace(open_dataset("copy").samples[0], path=other).path == tmp_path / "copy"


def test_an_address_is_one_however_pathlib_and_windows_spell_it() -> None:
    for address in (Path("s3://bucket/a"), PureWindowsPath("s3://bucket/a"), "S3://bucket/a"):
        with pytest.raises(ValueError, match="is an address, expected a path"):
            expanded(address)
    for path in ("C:/a", "C:\\a", "//server/share", "s3:a"):
        assert expanded(path) == Path(path)


@pytest.mark.parametrize("use", [ManifestDataset, FolderDataset, open_dataset])
@pytest.mark.parametrize("given", [pd.DataFrame({"path": ["a.png"]}), None, b"folder"])
def test_a_table_in_place_of_its_path_is_refused_in_words(
    use: Callable[[Any], Any], given: Any
) -> None:
    with pytest.raises(TypeError, match=f"expected a path, .*, got {type(given).__name__}"):
        use(given)


@pytest.mark.parametrize("name", ["nothing", "file.txt", "nul\0"])
def test_what_is_no_folder_is_not_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").touch()
    with pytest.raises(DatasetNotFoundError, match="is no folder, expected the radiographs"):
        existing_folder(tmp_path / name, "the radiographs")


@pytest.mark.parametrize(
    ("view", "is_frontal"),
    [("PA", True), ("AP Semi Erect", True), ("L", False), ("Axial", False), ("unknown", False)],
)
def test_a_sample_is_frontal_only_if_its_view_is_known_to_be(view: str, is_frontal: bool) -> None:
    assert sample(view=view).is_frontal is is_frontal


# Parts of it and sums


def test_a_subset_has_the_samples_in_the_order_asked_for(dataset: FolderDataset) -> None:
    part = dataset.subset(np.array([4, 0, -2]))
    assert part.samples == tuple(dataset.samples[i] for i in (4, 0, 3))
    assert part.targets == [0, 1, 0]
    with pytest.raises(IndexError, match="out of range"):
        dataset.subset([5])


def test_a_mask_is_no_list_of_positions(dataset: FolderDataset) -> None:
    mask = dataset.metadata["label"] == "covid19"
    masks: list[Any] = [mask, mask.to_numpy(), list(mask), torch.tensor(mask.to_numpy())]
    for wrong in (*masks, np.zeros(0, bool), [0, True], [np.True_]):
        if len(wrong):
            with pytest.raises(TypeError, match=r"got a bool; use np\.flatnonzero\(mask\)"):
                dataset.subset(wrong)
    assert dataset.subset(np.flatnonzero(mask)).targets == [1, 1]


def test_a_filter_keeps_classes_and_transforms(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "site", {"Normal": 3, "COVID": 2})
    whole = FolderDataset(root, transform=size_of, target_transform=str)
    covid = whole.filter(lambda s: s.label == "covid19")
    assert (len(covid), covid.classes, covid[0]) == (2, whole.classes, ((48, 40), "1"))
    assert (covid.report().kept, covid.report().found) == (2, 5)


def test_a_limit_takes_some_of_each_class_in_their_order(dataset: FolderDataset) -> None:
    whole = SyntheticChestXray(90, classes=LABELS)
    part = whole.limit(7, seed=3)
    positions = [whole.samples.index(s) for s in part.samples]
    assert positions == sorted(positions)
    assert [part.targets.count(c) for c in range(3)] == [7, 7, 7]
    assert whole.limit(7, seed=3).samples == part.samples
    assert whole.limit(7, seed=4).samples != part.samples
    assert dataset.limit(100).samples == dataset.samples


@pytest.mark.parametrize("count", [0, -1])
def test_a_limit_is_positive(dataset: FolderDataset, count: int) -> None:
    with pytest.raises(ValueError, match="per_class must be positive"):
        dataset.limit(count)


@pytest.mark.parametrize("count", [0.5, 2.5, float("nan"), "2"])
def test_a_limit_is_a_number_of_samples_and_no_fraction(dataset: FolderDataset, count: Any) -> None:
    with pytest.raises(TypeError, match=f"per_class must be a whole number, got {count!r}"):
        dataset.limit(count)


def test_a_sum_has_the_classes_of_all_in_canonical_order(tmp_path: Path) -> None:
    covid = FolderDataset(write_folder(tmp_path / "a", {"COVID": 2}), classes=["covid19"])
    counts = {"edema": 1, "Normal": 1}
    other = FolderDataset(write_folder(tmp_path / "b", counts), classes=["edema", "normal"])
    both = covid + other
    assert both.classes == ("normal", "covid19", "edema")
    assert both.samples == covid.samples + other.samples
    assert both.targets == [1, 1, 0, 2]
    assert both.sources == ("a", "b")


def test_a_row_that_was_taken_over_counts_to_its_origin_where_that_is_loaded(
    tmp_path: Path,
) -> None:
    cohen = CohenCovidDataset(write_cohen(tmp_path / "cohen"))
    hannover = HannoverCovidDataset(write_hannover(tmp_path / "hannover"))
    folder = FolderDataset(write_folder(tmp_path / "site"))
    taken = [i for i, s in enumerate(cohen.samples) if s.metadata.get("origin") == "hannover"]
    assert [(cohen + folder).samples[i].source for i in taken] == ["cohen"]
    both = cohen + hannover
    assert [both.samples[i].source for i in taken] == ["hannover"]
    assert sum(s.source == "cohen" for s in both.samples) == len(cohen) - 1
    groups = patient_groups(both, find_copies=False)
    image_id = cohen.samples[taken[0]].metadata["image_id"]
    twin = [i for i, s in enumerate(hannover.samples) if s.metadata["image_id"] == image_id]
    assert groups[taken[0]] == groups[len(cohen) + twin[0]]
    assert len(set(groups)) == len({(s.source, s.patient_id) for s in both.samples}) - 1


def test_what_its_origin_contradicts_is_dropped_and_counted(tmp_path: Path) -> None:
    taken = {"url": HANNOVER_URL}
    rows = [
        cohen_row("190", "COVID-19", f"{SHARED_IMAGE_ID}.png", **taken),
        cohen_row("190", "No Finding", "not-in-hannover.png", **taken),
        cohen_row("191", "No Finding", "00010000.png", **taken),  # an image of another patient
        cohen_row("192", "No Finding", "of-nobody-who-is-known.png", **taken),
        cohen_row("193", "No Finding", "own.png"),
    ]
    cohen = CohenCovidDataset(write_cohen(tmp_path / "cohen", rows=rows))
    hannover = HannoverCovidDataset(write_hannover(tmp_path / "hannover"))
    kept = {f"{SHARED_IMAGE_ID}.png", "of-nobody-who-is-known.png", "own.png"}
    for whole in (cohen + hannover, hannover + cohen):
        own = [s for s in whole.samples if s.path.is_relative_to(tmp_path / "cohen")]
        assert {s.path.name for s in own} == kept
    assert concatenate([cohen]).samples == cohen.samples
    whole = cohen + hannover
    assert {s.label for s in whole.samples if s.source == "hannover"} == {"normal", "covid19"}
    report = whole.report()
    assert report.dropped == {"contradicts its origin": 2}
    assert (report.found, report.kept) == (len(cohen) + len(hannover), len(whole))
    assert (report.source, report.images["normal"]) == ("cohen+hannover", 2)
    assert report.root == f"{tmp_path / 'cohen'}, {tmp_path / 'hannover'}"
    for again in (
        whole.subset(range(4)),
        concatenate([whole.subset([0, 1]), whole.subset([2, 3])]),
    ):
        assert again.report().found == report.found
        left_out = "not in this part (subset, filter, limit or split)"
        assert again.report().dropped == {left_out: len(whole) - 4, "contradicts its origin": 2}


def test_an_origin_of_several_labels_contradicts_none_of_them_but_of_the_same_image() -> None:
    def taken(image_id: str, label: str) -> Sample:
        about = {"origin": "site", "image_id": image_id}
        return sample(f"{image_id}.png", label, source="cohen", patient_id="7", metadata=about)

    def own(image_id: str, label: str) -> Sample:
        known = {"image_id": image_id}
        return sample(f"{image_id}-own.png", label, source="site", patient_id="z", metadata=known)

    rows = [taken("1", "normal"), taken("2.0", "normal"), taken("3", "normal"), taken("4", "edema")]
    classes = ["normal", "covid19", "edema"]
    cohen = ChestXrayDataset(rows, classes=classes)
    site = ChestXrayDataset([own("1", "normal"), own("2", "covid19")], classes=classes)
    unnumbered = ChestXrayDataset(
        [sample("n.png", "edema", source="site", patient_id="other")], classes=classes
    )
    whole = concatenate([cohen, site, unnumbered])
    assert [s.path.name for s in whole.samples][:2] == ["1.png", "3.png"]
    assert len(whole) == 5
    assert whole.report().dropped["contradicts its origin"] == 2


def test_two_sources_that_nobody_named_are_not_taken_for_one(tmp_path: Path) -> None:
    for site, folder in (("a", "COVID"), ("b", "Normal")):
        write_folder(tmp_path / site / "data", {folder: 2})
        rows = [[f"data/{folder}/{folder}-0.png", folder, "1"]]
        for name in ("list.csv", "data.csv"):
            write_csv(tmp_path / site / name, ["path", "label", "patient_id"], rows)
    one, other = (FolderDataset(tmp_path / site / "data") for site in "ab")
    message = r"a.data and .*b.data are both called 'data' by default.*Name them with source="
    for part in (one, one.subset([0]), one.filter(bool), one.limit(1), concatenate([one])):
        with pytest.raises(DatasetError, match=message):
            part + other
    named = FolderDataset(tmp_path / "b" / "data", source="b")
    assert (one + named).sources == ("b", "data")
    for name, kind in (("list.csv", "list"), ("data.csv", "data")):
        lists = [ManifestDataset(tmp_path / site / name) for site in "ab"]
        with pytest.raises(DatasetError, match=f"{name} are both called '{kind}' by default"):
            concatenate(lists)
    with pytest.raises(DatasetError, match="are both called 'data' by default"):
        one + ManifestDataset(tmp_path / "b" / "data.csv")
    covid = FolderDataset(tmp_path / "a" / "data", classes=["covid19"])
    (tmp_path / "link").symlink_to(tmp_path / "a" / "data")
    assert len(covid.subset([0]) + FolderDataset(tmp_path / "link" / ".").subset([1])) == 2


def test_a_sum_keeps_the_order_of_classes_that_all_have() -> None:
    turned = ("covid19", "normal")
    one, other = (SyntheticChestXray(4, seed=seed, classes=turned) for seed in (0, 1))
    assert (one + other).classes == concatenate([one]).classes == turned
    assert (one + other).targets == one.targets + other.targets
    other = SyntheticChestXray(4, seed=1, classes=("covid19", "pneumonia"))
    assert (one + other).classes == LABELS


def test_a_folder_that_is_called_as_a_collection_is_not_taken_for_it(tmp_path: Path) -> None:
    collections = {
        "cohen": CohenCovidDataset(write_cohen(tmp_path / "1")),
        "hannover": HannoverCovidDataset(write_hannover(tmp_path / "2")),
        "kermany": KermanyPneumoniaDataset(write_kermany(tmp_path / "3")),
    }
    for name, collection in collections.items():
        folder = write_folder(tmp_path / name, {"Normal": 1, "COVID": 1})
        message = f"{type(collection).__name__} and .*{name} are both called '{name}' by default"
        with pytest.raises(DatasetError, match=message):
            collection.subset([0]) + FolderDataset(folder)
        assert (collection + FolderDataset(folder, source=name)).sources == (name,)
        assert len(collection.subset([0]) + collection.subset([1])) == 2


def test_a_file_is_not_added_twice(tmp_path: Path, dataset: FolderDataset) -> None:
    listed = ManifestDataset(dataset.subset([0]).to_manifest(tmp_path / "list.csv"))
    for again in (dataset, dataset.subset([4]), listed):
        with pytest.raises(DatasetError, match=r"-\d\.png is in two data sets; add each only once"):
            dataset + again


def test_a_file_is_not_added_twice_under_a_relative_and_a_full_path(
    tmp_path: Path, dataset: FolderDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    listed = ManifestDataset(dataset.to_manifest(tmp_path / "lists" / "list.csv"), source="other")
    for again in (FolderDataset("site"), listed):
        with pytest.raises(DatasetError, match=r"-\d\.png is in two data sets; add each only once"):
            dataset.subset([0]) + again


def test_numbers_of_a_collection_stay_its_own_when_a_row_is_counted_to_its_origin() -> None:
    known = {"origin": "hannover", "image_id": "7", "numbered_by": "cohen"}
    mixed = ChestXrayDataset(
        [sample("m.png", source="kaggle", patient_id="5", metadata=known)], classes=["normal"]
    )
    others = [sample("c.png", source="cohen", patient_id="5"), sample("h.png", source="hannover")]
    whole = mixed + ChestXrayDataset(others, classes=["normal"])
    assert whole.samples[0].source == "hannover"
    assert patient_groups(whole, find_copies=False) == [0, 0, 1]


def test_patients_are_counted_by_whose_number_they_have() -> None:
    taken = sample(source="cohen", metadata={"origin": "hannover", "image_id": "7"})
    own = sample("h.png", source="hannover")
    whole = concatenate([ChestXrayDataset([s], classes=["normal"]) for s in (taken, own)])
    assert [(s.source, s.patient_id) for s in whole.samples] == [("hannover", "1")] * 2
    assert whole.report().patients == {"normal": 2}


def test_a_sum_reports_what_its_parts_dropped(tmp_path: Path) -> None:
    one = FolderDataset(write_folder(tmp_path / "a", {"COVID": 2, "edema": 3}))
    (tmp_path / "b" / "COVID").mkdir(parents=True)
    (tmp_path / "b" / "COVID" / "readme.txt").touch()
    other = FolderDataset(write_folder(tmp_path / "b", {"COVID": 1, "edema": 1}))
    report = (one + other).report()
    assert (report.source, report.found, report.kept) == ("a+b", 8, 3)
    assert report.root == f"{tmp_path / 'a'}, {tmp_path / 'b'}"
    dropped = {"folder outside the classes (edema)": 4, "not an image file name": 1}
    assert report.dropped == dropped
    assert report.notes == {"names without a patient number": 3}
    assert report.patients["covid19"] == 3


@pytest.mark.parametrize(
    "take",
    [
        lambda whole: whole.subset([0, 3]),
        lambda whole: whole.filter(lambda s: s.path.stem.endswith("-0")),
        lambda whole: whole.limit(1),
        lambda whole: whole.limit(2).subset([0, 2]),
        lambda whole: concatenate([whole.subset([3]), whole.subset([0])]),
        lambda whole: concatenate([whole.subset([0]), whole.subset([3, 4]).subset([0])]),
    ],
)
def test_a_part_reports_what_it_has_not_of_the_whole(
    tmp_path: Path, take: Callable[[ChestXrayDataset], ChestXrayDataset]
) -> None:
    whole = FolderDataset(write_folder(tmp_path / "a", {"Normal": 2, "COVID": 3, "edema": 4}))
    report = take(whole).report()
    assert (report.source, report.root, report.found, report.kept) == ("a", "", 9, 2)
    left_out = "not in this part (subset, filter, limit or split)"
    assert report.dropped == {left_out: 3, "folder outside the classes (edema)": 4}
    assert report.notes == {"names without a patient number": 5}
    assert str(report).startswith("a: 2 of 9 kept (a part)\n")


def test_parts_that_are_all_report_as_the_whole_does(tmp_path: Path) -> None:
    whole = FolderDataset(write_folder(tmp_path / "a", {"Normal": 2, "COVID": 3, "edema": 4}))
    assert whole.filter(lambda s: True).report() == whole.report()
    assert (whole.subset([4, 0]) + whole.subset([1, 2, 3])).report() == whole.report()


def test_samples_that_were_taken_again_are_noted(dataset: FolderDataset) -> None:
    report = dataset.subset([0, 0, 0, 1, 2, 3]).report()
    assert (report.found, report.kept, sum(report.dropped.values())) == (7, 6, 1)
    assert report.notes["samples that occur again"] == 2


@pytest.mark.parametrize("join", [lambda d: concatenate([d, "folder"]), lambda d: d + "folder"])
def test_a_path_is_no_data_set_to_add(join: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match="expected ChestXrayDataset, as open_dataset"):
        join(SyntheticChestXray(4, image_size_px=64))


def test_what_a_generator_gives_can_be_concatenated() -> None:
    parts = [SyntheticChestXray(4, seed=seed) for seed in range(2)]
    assert concatenate(d for d in parts).samples == concatenate(parts).samples


def test_equal_samples_are_one_in_a_set() -> None:
    first, second = SyntheticChestXray(4).samples, SyntheticChestXray(4).samples
    assert first == second
    assert set(first) == set(second)
    assert len({*first, *second}) == 4


def test_nothing_cannot_be_concatenated() -> None:
    with pytest.raises(ValueError, match="at least one"):
        concatenate([])


@pytest.mark.parametrize("option", ["transform", "target_transform"])
def test_sums_of_different_transforms_are_refused(tmp_path: Path, option: str) -> None:
    root = write_folder(tmp_path / "site")
    plain, changed = FolderDataset(root), FolderDataset(root, **{option: str})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="different transforms"):
        concatenate([plain, changed])
    halves = [changed.subset(range(6)), changed.subset(range(6, 12))]
    assert getattr(concatenate(halves), option) is str


# The table


def test_the_table_has_a_row_per_sample_in_order(tmp_path: Path) -> None:
    cohen = CohenCovidDataset(write_cohen(tmp_path))
    table = cohen.metadata
    assert list(table.columns[:6]) == list(MANIFEST_COLUMNS)
    assert list(table.index) == list(range(len(cohen)))
    for name in ("label", "finding", "patient_id", "source", "view"):
        assert list(table[name]) == [getattr(s, name) for s in cohen.samples]
    assert list(table["path"]) == [str(s.path) for s in cohen.samples]
    assert list(table["license"]) == [s.metadata["license"] for s in cohen.samples]
    part = cohen.subset([3, 1])
    assert list(part.metadata["path"]) == [str(s.path) for s in part.samples]


def test_the_table_of_nothing_has_the_columns() -> None:
    empty = ChestXrayDataset([], classes=["normal"])
    assert list(empty.metadata.columns) == list(MANIFEST_COLUMNS)
    assert len(empty.metadata) == len(empty) == 0


def test_own_columns_of_a_source_do_not_replace_the_fields() -> None:
    whole = ChestXrayDataset([sample(metadata={"label": "x", "age": "5"})], classes=["normal"])
    assert list(whole.metadata.loc[0, ["label", "age"]]) == ["normal", "5"]


# The interchange CSV


def test_a_manifest_brings_back_the_data_set(tmp_path: Path) -> None:
    cohen = CohenCovidDataset(write_cohen(tmp_path / "cohen"), classes=LABELS)
    folder = FolderDataset(write_folder(tmp_path / "out" / "site"))
    whole = cohen + folder
    manifest = whole.to_manifest(tmp_path / "out" / "deeper" / ".." / "list.csv")
    back = ManifestDataset(manifest, classes=LABELS)
    fields = ("label", "finding", "patient_id", "source", "view")
    assert [[getattr(s, f) for f in fields] for s in back.samples] == [
        [getattr(s, f) for f in fields] for s in whole.samples
    ]
    assert [s.path.resolve() for s in back.samples] == [s.path.resolve() for s in whole.samples]
    assert back.targets == whole.targets
    with manifest.open(encoding="utf-8", newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    below = [Path(p) for p in paths if not Path(p).is_absolute()]
    assert below == [Path("site", s.path.parent.name, s.path.name) for s in folder.samples]
    assert sorted(p.name for p in manifest.parent.iterdir()) == ["deeper", "list.csv", "site"]


def test_a_manifest_still_knows_images_of_two_collections_to_be_one(tmp_path: Path) -> None:
    cohen = CohenCovidDataset(write_cohen(tmp_path / "cohen"))
    hannover = HannoverCovidDataset(write_hannover(tmp_path / "hannover"))
    for whole in (cohen + hannover, cohen, hannover):
        back = ManifestDataset(whole.to_manifest(tmp_path / "list.csv"))
        assert patient_groups(back, find_copies=False) == patient_groups(whole, find_copies=False)
    later = concatenate(
        [ManifestDataset(d.to_manifest(tmp_path / "part.csv")) for d in (cohen, hannover)]
    )
    assert later.sources == ("cohen", "hannover")
    assert patient_groups(later, find_copies=False) == patient_groups(
        cohen + hannover, find_copies=False
    )


def test_a_manifest_of_windows_is_read_on_other_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phantoms = SyntheticChestXray(2, image_size_px=32).save(tmp_path / "phantoms")
    dataset = open_dataset(phantoms)
    places = [s.path for s in dataset.samples]
    with monkeypatch.context() as windows:
        windows.setattr(base, "Path", PureWindowsPath)
        dataset.to_manifest(tmp_path / "list.csv")
    back = ManifestDataset(tmp_path / "list.csv")
    assert [s.path for s in back.samples] == places


def test_a_manifest_keeps_sex_and_age(tmp_path: Path) -> None:
    file = write_image(tmp_path / "a.png")
    about = {"sex": "F", "age": "70", "clinical_notes": "long"}
    one = Sample(path=file, label="normal", finding="", patient_id="1", source="s", metadata=about)
    whole = ChestXrayDataset([one], classes=["normal"])
    back = ManifestDataset(whole.to_manifest(tmp_path / "list.csv"), classes=["normal"])
    assert back.samples[0].metadata == {"sex": "F", "age": "70"}


def test_hostile_file_names_survive_a_manifest(tmp_path: Path) -> None:
    for name in HOSTILE_NAMES:
        write_image(tmp_path / "COVID" / name)
    whole = FolderDataset(tmp_path)
    assert {s.path.name for s in whole.samples} == set(HOSTILE_NAMES)
    back = ManifestDataset(whole.to_manifest(tmp_path / "list.csv"))
    assert [s.path for s in back.samples] == [s.path for s in whole.samples]
    assert [s.patient_id for s in back.samples] == [s.patient_id for s in whole.samples]
    for original, listed in zip(whole, back, strict=True):  # type: ignore[call-overload]
        assert original[0].tobytes() == listed[0].tobytes()


@pytest.mark.parametrize("text", [name.strip() for name in HOSTILE_NAMES])
def test_hostile_text_survives_a_manifest(tmp_path: Path, text: str) -> None:
    file = write_image(tmp_path / "a.png")
    one = sample(str(file), text, finding=text + "x", patient_id=text, source=text, view=text)
    manifest = ChestXrayDataset([one], classes=[text]).to_manifest(tmp_path / "list.csv")
    back = ManifestDataset(manifest, classes=[text]).samples[0]
    assert (back.label, back.finding, back.patient_id) == (text, text + "x", text)
    assert (back.source, back.view) == (text, text)


def test_a_manifest_lists_links_under_their_own_names(tmp_path: Path) -> None:
    target = write_image(tmp_path / "store" / "9f3c0")
    link = tmp_path / "library" / "COVID" / "12_a.png"
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    whole = FolderDataset(tmp_path / "library")
    back = ManifestDataset(whole.to_manifest(tmp_path / "library" / "list.csv"))
    assert [s.path for s in back.samples] == [link]


def test_a_manifest_may_lie_in_the_home_folder(
    tmp_path: Path, dataset: FolderDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert dataset.to_manifest("~/list.csv") == tmp_path / "home" / "list.csv"
    assert len(ManifestDataset("~/list.csv")) == 5


def test_threads_may_write_the_same_manifest(tmp_path: Path, dataset: FolderDataset) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(dataset.to_manifest, [tmp_path / "list.csv"] * 64))
    assert len(ManifestDataset(tmp_path / "list.csv")) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["list.csv", "site"]


def test_a_manifest_replaces_the_one_before(tmp_path: Path, dataset: FolderDataset) -> None:
    dataset.to_manifest(tmp_path / "list.csv")
    manifest = dataset.subset([0]).to_manifest(tmp_path / "list.csv")
    assert len(ManifestDataset(manifest)) == 1


def test_a_manifest_that_cannot_be_finished_leaves_the_one_before(
    tmp_path: Path, dataset: FolderDataset
) -> None:
    manifest = dataset.to_manifest(tmp_path / "list.csv")
    before = manifest.read_bytes()
    broken = sample("a.png", finding="a lone surrogate \ud800")
    with pytest.raises(UnicodeEncodeError):
        ChestXrayDataset([broken], classes=["normal"]).to_manifest(manifest)
    assert manifest.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["list.csv", "site"]


def test_a_manifest_where_none_can_be_is_an_error_that_names_it(
    tmp_path: Path, dataset: FolderDataset
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    for name in ("file/a.csv", "loop/a.csv", "folder", "x" * 300):
        with pytest.raises(DatasetError, match=rf"{name} cannot be written: .*another folder"):
            dataset.to_manifest(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "loop", "site"]


def test_phantoms_have_no_file_to_list(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is a phantom without a file"):
        SyntheticChestXray(2).to_manifest(tmp_path / "list.csv")
    assert list(tmp_path.iterdir()) == []


# Content


def of_text(path: Any) -> Sample:
    return Sample(path=path, label="normal", finding="", patient_id="1", source="s")


def test_a_path_may_be_text(tmp_path: Path) -> None:
    file = write_image(tmp_path / "a.png")
    other = replace(of_text("b.png"), path=file)
    assert base.kept_path(of_text(str(file))) == str(file), "made before it was asked for"
    assert of_text(str(file)) == other
    assert hash(of_text(str(file))) == hash(other)
    assert repr(of_text(str(file))) == repr(other)
    one = of_text(str(file))
    assert one.path is one.path
    for made in (copy.deepcopy, copy.copy, lambda s: replace(s, view="PA")):
        assert made(of_text(str(file))).path == file
    with pytest.raises(FrozenInstanceError):
        one.path = file  # type: ignore[misc]
    assert ChestXrayDataset([one], classes=["normal"])[0][0].size == (48, 40)


def test_text_that_is_no_path_yet_is_made_one_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for text in ("~/a.png", np.str_("~/a.png")):
        assert of_text(text).path == tmp_path / "a.png"
    with pytest.raises(ValueError, match="A path is empty"):
        of_text("")


@pytest.mark.parametrize("name", ["~", "~root"])
def test_a_folder_that_is_called_as_a_home_is_not_taken_for_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    write_image(tmp_path / "home" / "normal" / "a.png", "of the home folder")
    here = write_image(tmp_path / name / "normal" / "a.png", "here")
    columns = ["path", "label", "patient_id"]
    write_csv(tmp_path / "list.csv", columns, [[f"{name}/normal/a.png", "normal", "1"]])
    write_csv(tmp_path / name / "list.csv", columns, [["normal/a.png", "normal", "1"]])
    monkeypatch.chdir(tmp_path)
    for given in ("list.csv", f"./{name}/list.csv", f"./{name}"):
        dataset = open_dataset(given, classes=("normal",))
        (listed,) = dataset.samples
        assert listed.path == here
        assert replace(listed, view="PA").content_hash() == sample(str(here)).content_hash()
        assert np.array_equal(dataset[0][0], load_image(here))


def test_the_hash_of_a_path_in_the_home_folder_is_that_of_its_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    home = write_image(tmp_path / "home" / "a.png", "of the home folder")
    write_image(tmp_path / "~" / "a.png", "here")
    monkeypatch.chdir(tmp_path)
    given = replace(of_text("a.png"), path=Path("~/a.png"))
    assert given.content_hash() == sample(str(home)).content_hash()
    assert np.array_equal(load_image(given), load_image(home))


def test_a_manifest_makes_no_path_until_one_is_asked_for(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png")
    rows = [["a.png", "normal", "1"]]
    table = write_csv(tmp_path / "list.csv", ["path", "label", "patient_id"], rows)
    (listed,) = ManifestDataset(table, classes=("normal",)).samples
    assert base.kept_path(listed) == str(image)
    assert listed.path == image


def test_the_hash_follows_the_content_and_not_the_name(tmp_path: Path) -> None:
    one = write_image(tmp_path / "one.png", "same")
    other = write_image(tmp_path / "other.png", "same")
    digest = sample(str(one)).content_hash()
    assert len(bytes.fromhex(digest)) == 16
    assert sample(str(other)).content_hash() == digest
    write_image(other, "changed")
    assert sample(str(other)).content_hash() != digest


@pytest.mark.parametrize("name", ["missing.png", "folder.png", "nul\0.png", "n" * 300])
def test_a_file_that_cannot_be_read_has_no_hash(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DatasetError, match="cannot be read"):
        sample(str(tmp_path / name)).content_hash()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    errors: list[Exception] = []

    def read() -> None:
        try:
            sample(str(tmp_path / "pipe.png")).content_hash()
        except DatasetError as error:
            errors.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout=30)
    assert len(errors) == 1


# Reports


def test_a_report_adds_up() -> None:
    samples = [
        sample(patient_id="1"),
        sample(patient_id="1"),
        sample(patient_id="1", source="other"),
        sample(patient_id="2", label="covid19"),
    ]
    dropped = {"rare": 1, "frequent": 5, "between": 2}
    report = summarise(
        samples, ("normal", "covid19", "pneumonia"), source="s", root=Path("r"), dropped=dropped
    )
    assert (report.found, report.kept) == (12, 4)
    assert report.found == report.kept + sum(report.dropped.values())
    assert list(report.dropped) == ["frequent", "between", "rare"]
    assert report.images == {"normal": 3, "covid19": 1, "pneumonia": 0}
    assert report.patients == {"normal": 2, "covid19": 1, "pneumonia": 0}


@pytest.mark.parametrize(
    "make",
    [
        lambda root: CohenCovidDataset(write_cohen(root)),
        lambda root: HannoverCovidDataset(write_hannover(root)),
        lambda root: FolderDataset(write_folder(root, {"Normal": 2, "COVID": 1, "other": 3})),
        lambda root: SyntheticChestXray(5),
        lambda root: SyntheticChestXray(5).subset([1, 2]),
        lambda root: CohenCovidDataset(write_cohen(root)).subset([1, 1, 0]),
        lambda root: SyntheticChestXray(5) + SyntheticChestXray(4).limit(1),
    ],
)
def test_every_report_adds_up_and_becomes_json(
    tmp_path: Path, make: Callable[[Path], ChestXrayDataset]
) -> None:
    dataset = make(tmp_path)
    report = dataset.report()
    assert report.kept == len(dataset) == sum(report.images.values())
    assert report.found == report.kept + sum(report.dropped.values())
    assert DatasetReport(**json.loads(json.dumps(report.to_dict()))) == report


def test_a_report_counts_reasons_beyond_the_most_frequent_together() -> None:
    labels = {f"label outside the classes ({i})": 100 - i for i in range(40)}
    report = summarise([], ["normal"], source="s", root="r", dropped=labels)
    assert list(report.dropped)[:30] == list(labels)[:30]
    assert dict(list(report.dropped.items())[30:]) == {"other reasons": sum(range(61, 71))}
    again = summarise([], ["normal"], source="s", root="r", dropped={**report.dropped, "rare": 1})
    assert again.dropped["other reasons"] == sum(range(61, 72)) + 1
    assert again.found == report.found + 1


def test_a_report_reads_as_text(tmp_path: Path) -> None:
    write_folder(tmp_path / "site", {"Normal": 2, "COVID": 1, "edema": 3})
    (tmp_path / "site" / "COVID" / "readme.txt").touch()
    lines = str(FolderDataset(tmp_path / "site").report()).splitlines()
    assert lines[0] == f"site: 3 of 7 kept ({tmp_path / 'site'})"
    assert [line.split(maxsplit=2) for line in lines[1:]] == [
        ["class", "normal", "2 images, 2 patients"],
        ["class", "covid19", "1 images, 1 patients"],
        ["dropped", "3", "folder outside the classes (edema)"],
        ["dropped", "1", "not an image file name"],
        ["note", "3", "names without a patient number"],
    ]
    assert str(SyntheticChestXray(2).report()).startswith("synthetic: 2 of 2 kept (no folder)")


def test_two_images_under_an_empty_identity_are_not_joined(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name)
    header = ["path", "label", "patient_id", "origin", "image_id"]
    rows = [["a.png", "normal", "1", "", ""], ["b.png", "normal", "2", "", ""]]
    manifest = ManifestDataset(write_csv(tmp_path / "list.csv", header, rows))
    assert patient_groups(manifest, find_copies=False) == [0, 1]


@pytest.mark.parametrize("gap", [float("nan"), None, "", " ", np.str_("")])
@pytest.mark.parametrize("name", ["patient_id", "source"])
def test_a_gap_of_a_table_is_neither_a_patient_nor_a_source(name: str, gap: Any) -> None:
    known = {"label": "normal", "finding": "", "patient_id": "1", "source": "site"}
    with pytest.raises(TypeError, match=re.escape(f"{name} of a.png must be text, got {gap!r}")):
        Sample(path=Path("a.png"), **{**known, name: gap})


@pytest.mark.parametrize("given", [None, np.nan, pd.NA, b"a.png", 5])
def test_a_gap_of_a_table_is_no_path(given: Any) -> None:
    with pytest.raises(TypeError, match=f"expected a path, .*, got {type(given).__name__}"):
        Sample(path=given, label="normal", finding="", patient_id="1", source="site")


def test_what_stands_for_a_path_becomes_one(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    (entry,) = os.scandir(tmp_path)
    known: dict[str, Any] = {"label": "normal", "finding": "", "patient_id": "1", "source": "site"}
    made = Sample(path=cast(Path, entry), **known)
    assert made == Sample(path=tmp_path / "a.png", **known)
    assert made.content_hash() == sample(str(tmp_path / "a.png")).content_hash()


@pytest.mark.parametrize("gap", [None, np.nan, pd.NA, pd.NaT, ""])
def test_a_gap_of_a_table_says_nothing_of_an_image(tmp_path: Path, gap: Any) -> None:
    about = {"sex": gap, "age": gap, "image_id": gap, "content_hash": gap}
    samples = [
        sample(
            str(write_image(tmp_path / f"{i}.png")),
            patient_id=str(i),
            finding=gap,
            view=gap,
            metadata=about,
        )
        for i in range(2)
    ]
    dataset = ChestXrayDataset(samples, classes=["normal"])
    assert patient_groups(dataset, find_copies=False) == [0, 1]
    assert {s.view for s in samples} == {"unknown"}
    assert {s.finding for s in samples} == {""}
    assert {text for s in samples for text in s.metadata.values()} == {""}
    back = ManifestDataset(dataset.to_manifest(tmp_path / "list.csv"), classes=["normal"])
    assert {s.view for s in back.samples} == {"unknown"}
    assert not back.samples[0].metadata


def test_what_a_table_says_in_numbers_is_text() -> None:
    one = sample(finding=7, metadata={"age": np.float64(45.0), "sex": "F"})
    assert (one.finding, one.view) == ("7", "unknown")
    assert one.metadata == {"age": "45.0", "sex": "F"}


def test_a_number_and_its_text_are_one_patient_and_one_source() -> None:
    samples = [
        Sample(path=Path(f"{i}.png"), label="normal", finding="", patient_id=number, source=source)
        for i, (number, source) in enumerate([("12", "5"), (12, 5), (np.int64(12), "5")])
    ]
    dataset = ChestXrayDataset(samples, classes=("normal", "covid19"))
    assert patient_groups(dataset, find_copies=False) == [0, 0, 0]
    assert dataset.sources == ("5",)
    assert "from 5" in repr(dataset)


def test_a_number_that_pandas_wrote_beside_a_gap_is_the_same_patient(tmp_path: Path) -> None:
    names = ("whole", "gap")
    for name in names:
        rows = [(write_image(tmp_path / f"{name}{i}.png", f"{name}{i}"), i) for i in range(2)]
        frame = pd.DataFrame({"path": [p for p, _ in rows], "patient_id": [n for _, n in rows]})
        if name == "gap":
            frame.loc[len(frame)] = {"path": "x.png"}
        frame.assign(label="normal").to_csv(tmp_path / f"{name}.csv", index=False)
    assert ",1.0," in (tmp_path / "gap.csv").read_text(encoding="utf-8")
    both = concatenate([ManifestDataset(tmp_path / f"{n}.csv", source="clinic") for n in names])
    assert [s.patient_id for s in both.samples] == ["0", "1", "0.0", "1.0"]
    assert patient_groups(both, find_copies=False) == [0, 1, 0, 1]
    assert both.report().patients["normal"] == 2
    others = [replace(both.samples[0], patient_id=name) for name in ("0", "00", "1.5", ".0")]
    assert len({patient_key(s) for s in others}) == 4


def test_blanks_around_a_patient_do_not_count_in_memory_as_in_a_table(tmp_path: Path) -> None:
    frame = pd.DataFrame({"path": ["a.png", "b.png"], "patient_id": ["P1 ", "P1"]})
    frame["path"] = [str(write_image(tmp_path / name)) for name in frame["path"]]
    frame.assign(label="normal").to_csv(tmp_path / "list.csv", index=False)
    more = {"label": "normal", "finding": "", "source": "list"}
    rows = frame.to_dict("records")
    own = ChestXrayDataset([Sample(**row, **more) for row in rows], classes=("normal",))
    for dataset in (own, ManifestDataset(tmp_path / "list.csv")):
        assert patient_groups(dataset, find_copies=False) == [0, 0]
        assert dataset.report().patients["normal"] == 1


def test_accents_as_macos_writes_them_are_the_same_patient_and_source(tmp_path: Path) -> None:
    roots = []
    for form in ("NFC", "NFD"):
        roots.append(tmp_path / form / unicodedata.normalize(form, "Köln"))
        write_image(roots[-1] / "normal" / unicodedata.normalize(form, "Zoë_1.png"), form)
    parts = [FolderDataset(root, None, r"^([^_]+)_", source=root.name) for root in roots]
    both = concatenate(parts)
    assert len({s.patient_id for s in both.samples}) == 2
    assert patient_groups(both, find_copies=False) == [0, 0]
    assert both.report().patients["normal"] == 1
    with pytest.raises(DatasetError, match=r"are both called .*ln. by default"):
        concatenate([FolderDataset(r) for r in roots])


def test_labels_that_are_gaps_are_refused_beside_others() -> None:
    labels = (float("nan"), "flu")
    samples = [
        Sample(path=Path("a.png"), label=name, finding="", patient_id="1", source="site")
        for name in labels
    ]
    with pytest.raises(DatasetError, match=r"Labels \['flu', nan\] are not among"):
        ChestXrayDataset(samples, classes=("normal", "covid19"))
