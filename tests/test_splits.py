from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats.contingency import association

from chestxray_covid import splits
from chestxray_covid.confounders import (
    Confounding,
    confounding,
    confounding_of_question,
    cramers_v,
)
from chestxray_covid.datasets.base import LABELS, ChestXrayDataset, Sample, concatenate
from chestxray_covid.datasets.cohen import CohenCovidDataset
from chestxray_covid.datasets.folder import FolderDataset, HannoverCovidDataset, ManifestDataset
from chestxray_covid.datasets.kermany import KermanyPneumoniaDataset
from chestxray_covid.datasets.synthetic import SyntheticChestXray
from chestxray_covid.errors import DatasetError, SplitError
from chestxray_covid.splits import (
    SIDES,
    Split,
    divide,
    folds_by_patient,
    saved_side,
    split_by_patient,
)
from sources import write_cohen, write_folder, write_hannover, write_image, write_kermany, write_nih


def listed(*entries: tuple[str, str, str]) -> ChestXrayDataset:
    """Return a data set of files that need not exist: (label, source, patient) each."""
    samples = [
        Sample(path=Path(f"{i}.png"), label=label, finding="", patient_id=patient, source=source)
        for i, (label, source, patient) in enumerate(entries)
    ]
    return ChestXrayDataset(samples, classes=LABELS)


def balanced(patients: int, images: int = 1, source: str = "site") -> list[tuple[str, str, str]]:
    """Return so many patients of normal and of COVID-19, with so many images each."""
    return [
        (label, source, f"{label}-{i}")
        for label in ("normal", "covid19")
        for i in range(patients)
        for _ in range(images)
    ]


def assert_sound(split: Split) -> None:
    """Check what every split promises."""
    positions = [i for side in SIDES for i in split.indices[side]]
    assert sorted(positions) == list(range(len(split.dataset)))
    sides: dict[tuple[str, str], set[str]] = {}
    for side in SIDES:
        assert list(split.indices[side]) == sorted(split.indices[side])
        for i in split.indices[side]:
            s = split.dataset.samples[i]
            sides.setdefault((s.source, s.patient_id), set()).add(side)
            sides.setdefault(("group", str(split.groups[i])), set()).add(side)
    assert all(len(found) == 1 for found in sides.values())


# Splits


def test_every_sample_is_on_one_side_and_no_patient_on_two(tmp_path: Path) -> None:
    cohen = CohenCovidDataset(write_cohen(tmp_path / "cohen", patients=12))
    kermany = KermanyPneumoniaDataset(write_kermany(tmp_path / "kermany"))
    hannover = HannoverCovidDataset(write_hannover(tmp_path / "hannover", patients=8))
    whole = concatenate([cohen, kermany, hannover])
    split = split_by_patient(whole, val=0.2, test=0.2)
    assert_sound(split)
    assert split.train.samples == tuple(whole.samples[i] for i in split.indices["train"])
    assert len(split.train) + len(split.val) + len(split.test) == len(whole)
    assert all(set(side.targets) == {0, 1} for side in (split.train, split.val, split.test))


def test_sides_have_the_wanted_sizes_and_the_mixture_of_the_whole() -> None:
    entries = [*balanced(100, source="a"), *balanced(50, images=2, source="b")]
    entries += [("normal", "c", str(i)) for i in range(50)]
    whole = listed(*entries)
    split = split_by_patient(whole, val=0.1, test=0.2, find_copies=False)
    assert_sound(split)
    total = Counter((s.label, s.source) for s in whole.samples)
    for side, share in {"train": 0.7, "val": 0.1, "test": 0.2}.items():
        assert len(split.indices[side]) == pytest.approx(share * len(whole), rel=0.15)
        here = Counter(
            (whole.samples[i].label, whole.samples[i].source) for i in split.indices[side]
        )
        for stratum, count in total.items():
            assert here[stratum] == pytest.approx(share * count, rel=0.25)


@pytest.mark.parametrize(("val", "test"), [(0.1, 0.1), (0.15, 0.15), (0.05, 0.25), (0.2, 0.2)])
@pytest.mark.parametrize("strays", [1, 2, 9])
def test_a_few_images_of_one_more_source_do_not_change_the_sizes(
    val: float, test: float, strays: int
) -> None:
    entries = [*balanced(150), *(("normal", "other", str(i)) for i in range(strays))]
    split = split_by_patient(listed(*entries), val=val, test=test, find_copies=False)
    assert_sound(split)
    assert len(split.test) == pytest.approx(test * len(entries), rel=0.1)
    assert len(split.val) == pytest.approx(val * len(entries), rel=0.15)


@pytest.mark.parametrize(
    ("val", "test", "sizes"),
    [
        (0.2, 0.0, (80, 20, 0)),
        (0.0, 0.25, (75, 0, 25)),
        (0.5, 0.0, (50, 50, 0)),
        (0.0, 0.5, (50, 0, 50)),
        (0.5, 0.25, (25, 50, 25)),
        (0.4, 0.5, (10, 40, 50)),
    ],
)
def test_a_side_may_be_empty_or_large(val: float, test: float, sizes: tuple[int, int, int]) -> None:
    split = split_by_patient(listed(*balanced(50)), val=val, test=test, find_copies=False)
    assert_sound(split)
    assert tuple(len(split.indices[side]) for side in SIDES) == sizes


def test_a_split_follows_from_its_seed() -> None:
    whole = listed(*balanced(30, images=2))
    first = split_by_patient(whole, seed=5, find_copies=False)
    assert split_by_patient(whole, seed=5, find_copies=False).indices == first.indices
    assert split_by_patient(whole, seed=6, find_copies=False).indices != first.indices
    assert first.seed == 5


@pytest.mark.slow
def test_a_split_is_the_same_in_every_process() -> None:
    program = """
from pathlib import Path
from chestxray_covid.datasets.base import ChestXrayDataset, Sample
from chestxray_covid.splits import split_by_patient
samples = [
    Sample(path=Path(str(i)), label=label, finding="", patient_id=str(i), source=source)
    for i, (label, source) in enumerate(
        [(l, s) for l in ("normal", "covid19") for s in "abcd" * 12 + "xyz"]
    )
]
dataset = ChestXrayDataset(samples, classes=("normal", "covid19"))
print(dict(split_by_patient(dataset, val=0.1, test=0.1, find_copies=False).indices))
"""
    path = os.pathsep.join(filter(None, sys.path))
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_duplicates_are_on_one_side_unless_not_looked_for(tmp_path: Path) -> None:
    for label, folder in (("normal", "Normal"), ("covid19", "COVID")):
        for i in range(12):
            write_image(tmp_path / folder / f"{i}-a.png", f"{label} {i}")
            write_image(tmp_path / folder / f"{i}-b.jpeg", f"{label} {i}", size=(96, 80))
    whole = FolderDataset(tmp_path)
    split = split_by_patient(whole, val=0.2, test=0.2)
    assert_sound(split)
    where = {
        whole.samples[i].path.stem: side
        for side in SIDES
        for i in split.indices[side]
        if whole.samples[i].label == "normal"
    }
    assert all(where[f"{i}-a"] == where[f"{i}-b"] for i in range(12))
    assert len(set(split.groups)) == 24
    blind = split_by_patient(whole, val=0.2, test=0.2, find_copies=False)
    assert len(set(blind.groups)) == 48


def attempt(whole: ChestXrayDataset, **options: Any) -> Split | str:
    """Return the split, or why it was refused."""
    try:
        return split_by_patient(whole, find_copies=False, **options)
    except SplitError as error:
        return str(error)


entries = st.lists(
    st.tuples(
        st.sampled_from(LABELS), st.sampled_from(["a", "b", "c"]), st.integers(0, 15).map(str)
    ),
    max_size=60,
)


@settings(max_examples=70, deadline=None, derandomize=True)
@given(
    entries,
    st.sampled_from([0, 0.1, 0.15, 0.3, 0.5]),
    st.sampled_from([0, 0.1, 0.2, 0.45]),
    st.integers(0, 5),
)
def test_whatever_is_split_is_sound_or_refused(
    rows: list[tuple[str, str, str]], val: float, test: float, seed: int
) -> None:
    whole = listed(*rows)
    if val == test == 0:
        return
    split = attempt(whole, val=val, test=test, seed=seed)
    if isinstance(split, str):
        assert "too few patients" in split or "), too few for" in split or "Only one class" in split
        return
    assert_sound(split)
    for side, wanted in {"train": True, "val": val > 0, "test": test > 0}.items():
        here = {whole.targets[i] for i in split.indices[side]}
        assert here == (set(whole.targets) if wanted else set())


def test_enough_patients_are_never_refused() -> None:
    for patients in (3, 4, 7, 20):
        for seed in range(5):
            whole = listed(*balanced(patients))
            assert_sound(split_by_patient(whole, seed=seed, find_copies=False))


@pytest.mark.parametrize("name", ["val", "test"])
@pytest.mark.parametrize("fraction", [-0.1, 0.51, 1, 15, float("nan"), float("inf")])
def test_a_fraction_is_at_most_half(name: str, fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a fraction in \[0, 0\.5\], got"):
        split_by_patient(listed(*balanced(9)), **{name: fraction})  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["0.2", None, [0.2, 0.3]])
def test_a_fraction_is_a_number(wrong: Any) -> None:
    for name in ("val", "test"):
        with pytest.raises(TypeError, match=rf"{name} must be a number, got \[?'?[0N]"):
            split_by_patient(listed(*balanced(9)), **{name: wrong})
    expected = split_by_patient(listed(*balanced(9)), val=0.25, find_copies=False)
    for quarter in (np.float32(0.25), Fraction(1, 4), Decimal("0.25"), torch.tensor(0.25)):
        found = split_by_patient(listed(*balanced(9)), val=cast(float, quarter), find_copies=False)
        assert found.indices == expected.indices


def test_a_seed_is_a_whole_number_that_scikit_learn_takes() -> None:
    for seed in (-1, 2**32 - 1, 2**32):
        with pytest.raises(ValueError, match=f"seed must be from 0 to 4294967294, got {seed}"):
            split_by_patient(listed(*balanced(9)), seed=seed, find_copies=False)
    for wrong in (1.5, None, "7"):
        with pytest.raises(TypeError, match=f"seed must be a whole number, got {wrong!r}"):
            split_by_patient(listed(*balanced(9)), seed=wrong, find_copies=False)  # type: ignore[arg-type]
    assert_sound(split_by_patient(listed(*balanced(9)), seed=2**32 - 2, find_copies=False))


@pytest.mark.parametrize("find_copies", [True, False])
def test_no_threads_are_refused(find_copies: bool) -> None:
    with pytest.raises(ValueError, match="workers must be positive, got 0"):
        split_by_patient(listed(*balanced(9)), find_copies=find_copies, workers=0)


def test_a_split_is_shown_without_its_positions() -> None:
    data = listed(*balanced(9))
    split = split_by_patient(data, find_copies=False)
    assert repr(split) == f"Split(dataset={data!r}, seed=0)"


def test_sides_are_made_once() -> None:
    split = split_by_patient(listed(*balanced(9)), find_copies=False)
    assert all(getattr(split, side) is getattr(split, side) for side in SIDES)


@pytest.mark.parametrize("fraction", [0, 0.5])
def test_something_must_be_held_out_and_something_left(fraction: float) -> None:
    with pytest.raises(ValueError, match="must add up to more than 0 and less than 1"):
        split_by_patient(listed(*balanced(9)), val=fraction, test=fraction)


@pytest.mark.parametrize("rows", [[], [("covid19", "a", str(i)) for i in range(30)]])
def test_one_class_alone_cannot_be_split(rows: list[tuple[str, str, str]]) -> None:
    with pytest.raises(SplitError, match=r"Only one class with samples: \[.*\]\. Add a data set"):
        split_by_patient(listed(*rows), find_copies=False)


def test_one_patient_alone_cannot_be_split() -> None:
    rows = [(label, "a", "1") for label in ("normal", "covid19") for _ in range(20)]
    with pytest.raises(SplitError, match=r"has 1 patient\(s\), too few for 3 sides"):
        split_by_patient(listed(*rows), find_copies=False)


def test_a_class_of_two_patients_cannot_be_on_three_sides() -> None:
    rows = [*balanced(20), ("pneumonia", "a", "1"), ("pneumonia", "a", "2")]
    with pytest.raises(SplitError, match=r"Class pneumonia has 2 patient\(s\), too few for 3"):
        split_by_patient(listed(*rows), find_copies=False)


def test_too_few_patients_are_refused_before_copies_are_looked_for() -> None:
    with pytest.raises(SplitError, match=r"has 1 patient\(s\), too few for 3 sides"):
        split_by_patient(listed(*balanced(1)))  # of files that are not there


def test_few_patients_with_two_classes_are_enough_for_three_sides() -> None:
    rows = [("normal", "a", p) for p in "124"] + [("covid19", "a", p) for p in "123"]
    for seed in range(20):
        split = split_by_patient(listed(*rows), val=0.3, test=0.15, seed=seed, find_copies=False)
        sides = (split.train, split.val, split.test)
        assert all(len(set(side.targets)) == 2 for side in sides)


def test_a_class_that_misses_a_side_is_refused() -> None:
    rows = [("normal", "a", p) for p in "1234"] + [("covid19", "a", p) for p in "123"]
    data = listed(*rows)

    def split_with_many_seeds() -> None:
        for seed in range(20):
            split = split_by_patient(data, val=0.2, test=0.2, seed=seed, find_copies=False)
            sides = (split.train, split.val, split.test)
            assert all(len(set(side.targets)) == 2 for side in sides)

    with pytest.raises(SplitError, match=r"No patient with \['\w+'\] fell into \w+: too few"):
        split_with_many_seeds()


def test_a_rare_class_is_on_every_side_and_leaves_the_others_their_sizes() -> None:
    rows = [("normal", "a", f"n{i}") for i in range(1000)]
    rows += [("covid19", "a", f"c{i}") for i in range(4)]
    split = split_by_patient(listed(*rows), val=0.15, test=0.15, find_copies=False)
    for side, share in ((split.val, 0.15), (split.test, 0.15), (split.train, 0.7)):
        counts = np.bincount(side.targets)
        assert counts[0] == pytest.approx(1000 * share, rel=0.06)
        assert counts[LABELS.index("covid19")] >= 1


def test_what_patients_of_a_rare_class_leave_of_a_common_one_stays_together() -> None:
    rows = [("normal", "a", str(i)) for i in range(7)] + [
        ("covid19", "a", str(i)) for i in range(6)
    ]
    rest, held = divide(listed(*rows), np.arange(13), np.array([*range(7), *range(6)]), 0.15, 0)
    assert sorted([*rest, *held]) == list(range(13))
    assert 6 in rest
    assert len(held) == 2


@pytest.mark.slow
@pytest.mark.parametrize("alone", [1, 2, 3])
@pytest.mark.parametrize("fraction", [0.1, 0.15])
def test_what_patients_of_a_rare_class_leave_of_another_changes_no_other_class(
    alone: int, fraction: float
) -> None:
    both = round(1 / fraction) - 1
    rows = [("normal", "a", f"n{i}") for i in range(1000)]
    rows += [(label, "a", f"b{i}") for label in ("pneumonia", "covid19") for i in range(both)]
    rows += [("covid19", "a", f"c{i}") for i in range(alone)]
    split = split_by_patient(listed(*rows), val=fraction, test=fraction, find_copies=False)
    assert_sound(split)
    for side in (split.val, split.test):
        assert len(side) == pytest.approx(len(rows) * fraction, rel=0.05)
        assert set(side.targets) == {0, 1, 2}


# Splits made by hand


def test_an_overlapping_split_is_refused() -> None:
    whole = listed(("normal", "a", "1"), ("covid19", "a", "1"), ("covid19", "b", "2"))
    sides = {"train": (0,), "val": (1,), "test": (2,)}
    with pytest.raises(
        SplitError, match=r"1\.png \(patient 1 of a, or a duplicate\) is in train and"
    ):
        Split(dataset=whole, indices=sides, groups=(0, 0, 1), seed=0)
    assert len(Split(dataset=whole, indices=sides, groups=(0, 1, 2), seed=0).val) == 1


@pytest.mark.parametrize(
    ("indices", "groups", "message"),
    [
        ({"train": (0, 1)}, (0, 1), "Expected the sides"),
        ({"train": (0,), "val": (1,), "test": (), "more": ()}, (0, 1), "Expected the sides"),
        ({"train": (0,), "valid": (1,), "test": ()}, (0, 1), "Expected the sides"),
        ({"train": (0,), "val": (1,), "test": ()}, (0,), "groups of 2 samples, .* 1 groups"),
        ({"train": (0,), "val": (2,), "test": ()}, (0, 1), "val holds position 2 of a data set"),
        ({"train": (0,), "val": (-1,), "test": ()}, (0, 1), "val holds position -1"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(
    indices: dict[str, tuple[int, ...]], groups: tuple[int, ...], message: str
) -> None:
    whole = listed(("normal", "a", "1"), ("covid19", "a", "2"))
    with pytest.raises(SplitError, match=message):
        Split(dataset=whole, indices=indices, groups=groups, seed=0)


# Saved splits


@pytest.fixture
def site(tmp_path: Path) -> FolderDataset:
    return FolderDataset(write_folder(tmp_path / "site", {"Normal": 8, "COVID": 8}))


def test_a_saved_split_comes_back_wherever_the_files_lie(
    tmp_path: Path, site: FolderDataset
) -> None:
    split = split_by_patient(site, val=0.25, test=0.25, seed=7)
    path = split.save(tmp_path / "runs" / "one" / "split.json")
    assert sorted(p.name for p in path.parent.iterdir()) == ["split.json"]
    back = Split.load(path, site)
    assert (back.indices, back.groups, back.seed) == (split.indices, split.groups, 7)
    (tmp_path / "site").rename(tmp_path / "moved")
    moved = FolderDataset(tmp_path / "moved")
    assert Split.load(path, moved).indices == split.indices
    order = np.random.default_rng(0).permutation(len(moved)).tolist()
    shuffled = Split.load(path, moved.subset(order))
    for side in SIDES:
        assert {order[i] for i in shuffled.indices[side]} == set(split.indices[side])


def test_numbers_of_numpy_are_saved_as_others(tmp_path: Path) -> None:
    whole = SyntheticChestXray(20, image_size_px=32)
    samples = [replace(s, patient_id=np.int64(s.patient_id)) for s in whole.samples]  # type: ignore[arg-type]
    dataset = ChestXrayDataset(samples, classes=whole.classes)
    split = split_by_patient(dataset, val=0.3, test=0.3, seed=np.int64(1), find_copies=False)  # type: ignore[arg-type]
    split = replace(split, groups=np.array(split.groups))  # type: ignore[arg-type]
    back = Split.load(split.save(tmp_path / "split.json"), dataset)
    assert (back.indices, back.seed) == (split.indices, 1)
    assert back.groups == tuple(split.groups)


def test_a_split_that_cannot_be_written_is_an_error(tmp_path: Path, site: FolderDataset) -> None:
    with pytest.raises(DatasetError, match=r"cannot be written: .*choose another folder"):
        split_by_patient(site, find_copies=False).save(tmp_path)


def test_phantoms_can_be_saved_too(tmp_path: Path) -> None:
    phantoms = SyntheticChestXray(24, image_size_px=32, patients=24)
    split = split_by_patient(phantoms)
    path = split.save(tmp_path / "split.json")
    same = SyntheticChestXray(24, image_size_px=32, patients=24)
    assert Split.load(path, same).indices == split.indices


def test_the_saved_sides_are_sets_of_content(tmp_path: Path, site: FolderDataset) -> None:
    split = split_by_patient(site, val=0.25, test=0.0)
    path = split.save(tmp_path / "split.json")
    for side in SIDES:
        expected = {site.samples[i].content_hash() for i in split.indices[side]}
        assert saved_side(path, side) == expected
    assert saved_side(path, "test") == frozenset()
    with pytest.raises(ValueError, match=r"Unknown value 'valid' for side\. Valid values are"):
        saved_side(path, "valid")


def test_equal_files_on_two_sides_come_back_on_two_sides(tmp_path: Path) -> None:
    for name in ("1_0.png", "2_0.png", "3_0.png"):
        write_image(tmp_path / "site" / "COVID" / name, "same")
        write_image(tmp_path / "site" / "Normal" / name, "same too")
    whole = FolderDataset(tmp_path / "site")
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        sides = {side: (i, i + 3) for side, i in zip(SIDES, order, strict=True)}
        split = Split(dataset=whole, indices=sides, groups=(0, 1, 2, 0, 1, 2), seed=0)
        back = Split.load(split.save(tmp_path / "split.json"), whole)
        assert (back.indices, back.groups) == (split.indices, split.groups)


def test_equal_files_are_known_by_what_is_left_of_name_source_and_patient(tmp_path: Path) -> None:
    file = write_image(tmp_path / "0.png")
    facts = [(f"{i}.png", f"source {i % 2}", f"patient {i}") for i in range(6)]

    def dataset_of(facts: Sequence[tuple[str, str, str]]) -> ChestXrayDataset:
        samples = [
            Sample(path=tmp_path / name, label="normal", finding="", source=s, patient_id=p)
            for name, s, p in facts
        ]
        for s in samples:
            if not s.path.exists():
                s.path.hardlink_to(file)
        return ChestXrayDataset(samples, classes=LABELS)

    sides = {"train": (0, 1), "val": (2, 3), "test": (4, 5)}
    split = Split(dataset=dataset_of(facts), indices=sides, groups=tuple(range(6)), seed=0)
    path = split.save(tmp_path / "split.json")
    for changed in (
        [(f"renamed {n}", s, p) for n, s, p in facts],
        [(n, "other", p) for n, s, p in facts],
        [(n, s, f"other {p}") for n, s, p in facts],
        [(n, "other", f"other {p}") for n, s, p in facts],
        [(f"renamed {n}", "other", p) for n, s, p in facts],
    ):
        assert Split.load(path, dataset_of(changed)).groups == split.groups
        back = Split.load(path, dataset_of(changed[::-1]))
        assert back.indices == {"train": (4, 5), "val": (2, 3), "test": (0, 1)}
    first = [facts[0], *((f"renamed {n}", "other", f"other {p}") for n, s, p in facts[1:])]
    assert Split.load(path, dataset_of(first[::-1])).groups[-1] == 0


def test_thousands_of_equal_files_are_matched_without_comparing_each_with_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Counter[str]()

    class Counting(str):
        def __eq__(self, other: object) -> bool:
            asked["comparisons"] += 1
            return str.__eq__(self, str(other))

        __hash__ = str.__hash__

    monkeypatch.setattr(Sample, "content_hash", lambda self: "0" * 32)
    plain = listed(*balanced(500))
    whole = ChestXrayDataset(
        (replace(s, patient_id=Counting(s.patient_id)) for s in plain.samples), classes=LABELS
    )
    split = split_by_patient(whole, find_copies=False)
    path = split.save(tmp_path / "split.json")
    asked.clear()
    assert Split.load(path, whole).indices == split.indices
    assert asked["comparisons"] < 20 * len(whole)


def test_a_hostile_file_name_is_no_obstacle(tmp_path: Path) -> None:
    write_folder(tmp_path / "site")
    for name in ("new\nline.png", "not utf-8 \udcff.png", '"quoted".png', "\u202egnp.png"):
        write_image(tmp_path / "site" / "COVID" / name)
    whole = FolderDataset(tmp_path / "site")
    split = split_by_patient(whole)
    assert Split.load(split.save(tmp_path / "split.json"), whole).indices == split.indices


def test_a_split_of_another_data_set_is_refused(tmp_path: Path, site: FolderDataset) -> None:
    path = split_by_patient(site).save(tmp_path / "split.json")
    with pytest.raises(SplitError, match="is not in the split"):
        Split.load(path, FolderDataset(write_nih(tmp_path / "nih"), classes=("normal",)))
    with pytest.raises(SplitError, match="holds 16 samples, the data set 15"):
        Split.load(path, site.subset(range(15)))
    few = site.limit(3)
    part = split_by_patient(few).save(tmp_path / "part.json")
    with pytest.raises(SplitError, match=r"\(with limit\(…\), where train had --limit\)"):
        Split.load(part, site)
    assert len(Split.load(part, few).dataset) == len(few)
    again = ChestXrayDataset([*site.samples, site.samples[0]], classes=site.classes)
    with pytest.raises(SplitError, match="is not in the split"):
        Split.load(path, again)
    write_image(site.samples[3].path, "changed")
    with pytest.raises(SplitError, match=r"COVID-3\.png is not in the split .*content changed"):
        Split.load(path, site)
    site.samples[3].path.unlink()
    with pytest.raises(DatasetError, match=r"COVID-3\.png cannot be read"):
        Split.load(path, site)


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    data = json.loads(path.read_text(encoding="utf-8"))
    changed = change(data)
    path.write_text(json.dumps(data if changed is None else changed), encoding="utf-8")
    return path


def move_one(data: dict[str, Any]) -> None:
    entry = next(e for e in data["samples"] if e["side"] == "train")
    data["samples"].append({**entry, "side": "test", "hash": "0" * 32})


def test_a_saved_split_with_overlap_is_refused(tmp_path: Path, site: FolderDataset) -> None:
    path = rewritten(split_by_patient(site).save(tmp_path / "split.json"), move_one)
    for read in (lambda: Split.load(path, site), lambda: saved_side(path, "train")):
        with pytest.raises(SplitError, match=r"puts patient .* of site on two sides"):
            read()


def test_a_patient_on_two_sides_is_noticed_whatever_the_groups_say(tmp_path: Path) -> None:
    for folder in ("COVID", "Normal"):
        for i in range(12):
            write_image(tmp_path / folder / f"{folder == 'COVID'}{i // 2}-{i}.png")
    each = FolderDataset(tmp_path, patient_id=None)
    path = split_by_patient(each, val=0.25, test=0.25).save(tmp_path / "split.json")
    assert Split.load(path, each).groups
    with pytest.raises(SplitError, match=r"puts patient \w+ of .* on two sides, as the data set"):
        Split.load(path, FolderDataset(tmp_path, patient_id=r"^(\w+)-"))


@pytest.mark.parametrize("column", ["image_id", "content_hash"])
def test_an_image_that_a_table_now_knows_twice_is_on_one_side(
    tmp_path: Path, site: FolderDataset, column: str
) -> None:
    table = site.to_manifest(tmp_path / "site.csv")
    path = split_by_patient(site).save(tmp_path / "split.json")
    frame = pd.read_csv(table, dtype=str)
    frame[column] = [f"known-{i}" for i in range(len(frame))]
    frame.to_csv(table, index=False)
    assert Split.load(path, ManifestDataset(table)).groups, "each is known once"
    frame[column] = ["known"] * len(frame)
    frame.to_csv(table, index=False)
    with pytest.raises(SplitError, match=r"or an image of them, on two sides"):
        Split.load(path, ManifestDataset(table))


def test_a_split_may_lie_in_the_home_folder(
    tmp_path: Path, site: FolderDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    split = split_by_patient(site)
    assert split.save("~/split.json") == tmp_path / "home" / "split.json"
    assert Split.load("~/split.json", site).indices == split.indices
    assert saved_side("~/split.json", "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: [], "is no saved split"),
        (lambda d: 5, "is no saved split"),
        (lambda d: d.pop("samples") and None, "is no saved split: KeyError"),
        (lambda d: d.pop("seed"), "is no saved split"),
        (lambda d: d.update(seed="x"), "is no saved split"),
        (lambda d: d.update(seed=float("inf")), "is no saved split"),
        (lambda d: d.update(seed=float("nan")), "is no saved split"),
        (lambda d: d.update(seed=None), "is no saved split"),
        (lambda d: d.update(samples={"a": 1}), "is no saved split"),
        (lambda d: d.update(samples=[[]]), "is no saved split"),
        (lambda d: d["samples"][0].pop("hash"), "is no saved split"),
        (lambda d: d["samples"][0].update(group=float("inf")), "is no saved split"),
        (lambda d: d["samples"][0].update(side="valid"), "has an entry without side or hash"),
        (lambda d: d["samples"][0].update(side=[]), "has an entry without side or hash"),
        (lambda d: d["samples"][0].update(hash=5), "has an entry without side or hash"),
        (lambda d: d.update(format_version=2), "format_version is 2, expected 1.*Split again"),
        (lambda d: d.update(format_version="1"), "format_version is '1', expected 1.*Split again"),
    ],
)
def test_a_damaged_split_is_refused(
    tmp_path: Path, site: FolderDataset, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = split_by_patient(site).save(tmp_path / "split.json")
    rewritten(path, lambda d: r if isinstance(r := change(d), list | int) else None)
    with pytest.raises(SplitError, match=message):
        Split.load(path, site)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"<html>", b"\xff\xfe\0", b"[" * 100_000, b"\0" * 100, b"null"]
)
def test_what_is_no_json_is_no_split(tmp_path: Path, site: FolderDataset, content: bytes) -> None:
    (tmp_path / "split.json").write_bytes(content)
    with pytest.raises(SplitError, match=r"split\.json is no saved split: .*\. Split again\.$"):
        Split.load(tmp_path / "split.json", site)
    with pytest.raises(SplitError, match=r"split\.json is no saved split"):
        saved_side(tmp_path / "split.json", "train")


def test_a_split_that_puts_a_patient_on_two_sides_by_naming_it_twice_is_refused(
    tmp_path: Path, site: FolderDataset
) -> None:
    path = split_by_patient(site).save(tmp_path / "split.json")
    path.write_text(path.read_text().replace('"side": "train"', '"side": "test", "side": "train"'))
    with pytest.raises(SplitError, match=r"names 'side' twice.*Split again"):
        Split.load(path, site)


def test_a_missing_split_is_refused(tmp_path: Path, site: FolderDataset) -> None:
    with pytest.raises(
        SplitError, match=r"is no saved split: FileNotFoundError.*Check path and permissions"
    ):
        Split.load(tmp_path / "nothing.json", site)
    with pytest.raises(
        SplitError, match=r"is no saved split: IsADirectoryError.*Check path and permissions"
    ):
        saved_side(tmp_path, "test")
    for place in ("s3://bucket/split.json", Path("s3://bucket/split.json")):
        with pytest.raises(ValueError, match=r"is an address, expected a path on this machine"):
            Split.load(place, site)


def test_saving_that_fails_leaves_the_split_before(tmp_path: Path, site: FolderDataset) -> None:
    split = split_by_patient(site)
    path = split.save(tmp_path / "split.json")
    before = path.read_bytes()
    site.samples[0].path.unlink()
    with pytest.raises(DatasetError, match="cannot be read"):
        split.save(path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["site", "split.json"]


# Folds


def test_folds_hold_out_every_sample_once_and_no_group_twice() -> None:
    rows = [*balanced(20, images=2), *(("normal", "rare", str(i)) for i in range(3))]
    whole = listed(*rows)
    groups = [int(g) for g in np.unique([r[1:] for r in rows], axis=0, return_inverse=True)[1]]
    folds = folds_by_patient(whole, groups, folds=5, seed=1)
    assert len(folds) == 5
    assert sorted(i for _, held_out in folds for i in held_out) == list(range(len(whole)))
    for rest, held_out in folds:
        assert not {groups[i] for i in rest} & {groups[i] for i in held_out}
        assert sorted([*rest, *held_out]) == list(range(len(whole)))
        assert {whole.targets[i] for i in held_out} == {0, 2}
    again = folds_by_patient(whole, groups, folds=5, seed=1)
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(folds, again, strict=True))


@pytest.mark.parametrize("folds", [1, 0, -3])
def test_there_are_two_folds_or_more(folds: int) -> None:
    with pytest.raises(ValueError, match="folds must be at least 2"):
        folds_by_patient(listed(*balanced(5)), range(10), folds=folds)


def test_folds_need_a_patient_of_each_class_each() -> None:
    with pytest.raises(SplitError, match=r"Class normal has 4 patient\(s\), too few for 5 sides"):
        folds_by_patient(listed(*balanced(4)), range(8))


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.5, 0.75, 0.9])
def test_divided_positions_are_those_that_were_given(fraction: float) -> None:
    whole = listed(*balanced(60))
    indices = np.arange(20, 120)
    rest, held_out = divide(whole, indices, np.arange(120), fraction, 0)
    assert sorted([*rest, *held_out]) == indices.tolist()
    assert len(held_out) == pytest.approx(fraction * 100, abs=2)


# Does the source give the label away?


def table_of(counts: Sequence[Sequence[int]]) -> ChestXrayDataset:
    return listed(
        *(
            (label, f"source {row}", "1")
            for row, line in enumerate(counts)
            for label, count in zip(LABELS, line, strict=False)
            for _ in range(count)
        )
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(2, 4).flatmap(
        lambda rows: st.lists(
            st.lists(st.integers(0, 12), min_size=3, max_size=3), min_size=rows, max_size=rows
        )
    )
)
def test_cramers_v_is_that_of_scipy(counts: list[list[int]]) -> None:
    table = np.array(counts)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    if not table.size:
        return
    result = confounding(table_of(counts))
    assert np.array_equal(result.to_frame().to_numpy(), table)
    if min(table.shape) < 2:
        assert np.isnan(result.cramers_v)
        assert result.to_dict()["cramers_v"] is None
    else:
        assert result.cramers_v == pytest.approx(association(table, method="cramer"), abs=1e-12)
    pure = sum(line.sum() for line in table if (line > 0).sum() == 1)
    assert result.determined == pytest.approx(pure / table.sum())


@pytest.mark.parametrize(
    ("counts", "v", "determined"),
    [
        ([[50, 0, 0], [0, 0, 20]], 1, 1),
        ([[30, 0, 10], [60, 0, 20]], 0, 0),
        ([[10, 0, 0], [5, 0, 5]], 0.57735, 0.5),
    ],
)
def test_the_extremes_of_confounding(counts: list[list[int]], v: float, determined: float) -> None:
    result = confounding(table_of(counts))
    assert result.cramers_v == pytest.approx(v, abs=1e-5)
    assert result.determined == pytest.approx(determined)


def test_the_basic_design_is_confounded_and_says_so(tmp_path: Path) -> None:
    cohen = CohenCovidDataset(write_cohen(tmp_path / "cohen"), classes=["covid19"])
    kermany = KermanyPneumoniaDataset(write_kermany(tmp_path / "kermany"))
    result = confounding(cohen + kermany)
    assert result.cramers_v == pytest.approx(1)
    text = str(result)
    assert "100% of the images have a label that follows from the source alone" in text
    assert "kermany" in text
    data = json.loads(json.dumps(result.to_dict()))
    assert data["table"] == {
        "cohen": {"normal": 0, "covid19": 16},
        "kermany": {"normal": 11, "covid19": 0},
    }


def test_nothing_is_not_confounded() -> None:
    with pytest.raises(ValueError, match="The data set is empty"):
        confounding(listed())


# Real radiographs


@pytest.mark.real_data
def test_the_real_basic_design_splits_without_leakage(real_data: Path) -> None:
    cohen = CohenCovidDataset(real_data / "covid-chestxray-dataset")
    kermany = KermanyPneumoniaDataset(real_data / "chest_xray")
    hannover = HannoverCovidDataset(real_data / "covid-19-image-repository")
    whole = concatenate([cohen, kermany, hannover])
    split = split_by_patient(whole, find_copies=False)
    assert_sound(split)
    assert len(split.test) == pytest.approx(0.15 * len(whole), rel=0.15)
    assert len(split.val) == pytest.approx(0.15 * len(whole), rel=0.15)
    sides: dict[str, set[str]] = {}
    for side in SIDES:
        for i in split.indices[side]:
            if image_id := whole.samples[i].metadata.get("image_id"):
                sides.setdefault(image_id, set()).add(side)
    assert all(len(found) == 1 for found in sides.values())
    table = confounding(cohen.filter(lambda s: s.label == "covid19") + kermany)
    assert table.cramers_v == pytest.approx(1)


def test_weights_are_repetitions_and_values_that_a_resample_lacks_do_not_count() -> None:
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(0, 3, 40), rng.integers(0, 2, 40)
    weights = rng.integers(0, 3, (5, 40)).astype(float)
    weights[0, rows == 2] = 0  # one value is gone
    weights[1, columns == 1] = 0  # V is not defined
    found = cramers_v(rows, columns, sample_weight=weights)
    for value, weight in zip(found, weights.astype(int), strict=True):
        drawn = np.repeat(np.arange(40), weight)
        table = np.zeros((3, 2), int)
        np.add.at(table, (rows[drawn], columns[drawn]), 1)
        table = table[table.sum(1) > 0][:, table.sum(0) > 0]
        expected = association(table, method="cramer") if min(table.shape) > 1 else np.nan
        assert value == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_a_third_class_does_not_hide_that_the_question_is_confounded() -> None:
    shared = SyntheticChestXray(60, classes=LABELS, image_size_px=32, sources=("a", "b"))
    pure = shared.filter(
        lambda s: s.label == "pneumonia" or (s.label == "normal") == (s.source == "a")
    )
    assert not confounding(pure).is_severe
    assert asked(pure).is_severe
    assert not asked(shared).is_severe
    assert "pneumonia" in asked(shared).table["a"]


def test_other_classes_do_not_hide_that_one_class_is_that_of_a_source() -> None:
    labels = ["healthy", "tumour"] * 100 + ["tb"] * 100
    sources = ["a", "a", "c", "c"] * 50 + ["b"] * 100
    assert not Confounding.of(sources, labels).is_severe
    found = confounding_of_question(sources, labels, "tb")
    assert found.is_severe
    assert found.table["b"] == {"not tb": 0, "tb": 100}
    assert not confounding_of_question(sources, labels, "tumour").is_severe


def asked(dataset: ChestXrayDataset) -> Confounding:
    columns = zip(*((s.source, s.label) for s in dataset.samples), strict=True)
    return confounding_of_question(*columns, "covid19")


def test_many_samples_are_split_as_evenly_without_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    entries = [
        entry
        for source, patients, images in (("a", 300, 1), ("b", 200, 3), ("c", 60, 2))
        for entry in balanced(patients, images, source)
    ]
    entries += [("pneumonia", "d", f"p{rng.integers(80)}") for _ in range(400)]
    dataset = listed(*(entries[i] for i in rng.permutation(len(entries))))
    searched = split_by_patient(dataset, find_copies=False)
    monkeypatch.setattr(splits, "_MANY", 1000)
    drawn = split_by_patient(dataset, find_copies=False)
    assert_sound(drawn)
    assert drawn.indices != searched.indices
    assert drawn.indices == split_by_patient(dataset, find_copies=False).indices
    assert drawn.indices != split_by_patient(dataset, find_copies=False, seed=1).indices
    whole = Counter((s.label, s.source) for s in dataset.samples)
    for side, wanted in (("val", 0.15), ("test", 0.15)):
        own = Counter((s.label, s.source) for s in getattr(drawn, side).samples)
        for stratum, count in whole.items():
            # A patient more or less, of at most a dozen images, in each kind of patient.
            assert abs(own[stratum] - wanted * count) < 12, (side, stratum)
        assert abs(sum(own.values()) / len(dataset) - wanted) < 0.02
