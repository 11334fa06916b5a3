from __future__ import annotations

import os
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chestxray_covid.datasets import duplicates
from chestxray_covid.datasets.base import LABELS, ChestXrayDataset, Sample, concatenate
from chestxray_covid.datasets.cohen import CohenCovidDataset
from chestxray_covid.datasets.duplicates import find_duplicates, patient_groups
from chestxray_covid.datasets.folder import FolderDataset, HannoverCovidDataset, open_dataset
from chestxray_covid.datasets.synthetic import SyntheticChestXray
from chestxray_covid.errors import ImageError
from sources import draw, write_cohen, write_hannover, write_image, write_nih


def sample(path: Path | str, patient: str = "1", **fields: Any) -> Sample:
    plain = {"label": "normal", "finding": "none", "source": "site"}
    return Sample(path=Path(path), patient_id=patient, **{**plain, **fields})


def dataset_of(samples: Sequence[Sample]) -> ChestXrayDataset:
    return ChestXrayDataset(samples, classes=["normal"])


def pairs_of(folder: Path) -> set[frozenset[str]]:
    """Return the pairs of names of the duplicates among the files of a folder."""
    samples = [sample(path) for path in sorted(folder.iterdir())]
    pairs = find_duplicates(dataset_of(samples))
    assert all(a < b for a, b in pairs)
    assert len(pairs) == len(set(pairs))
    return {frozenset((samples[a].path.name, samples[b].path.name)) for a, b in pairs}


# Copies


@pytest.mark.parametrize("quality", [95, 60, 30])
def test_a_recompressed_copy_is_found(tmp_path: Path, quality: int) -> None:
    image = draw("radiograph", (400, 320))
    image.save(tmp_path / "original.png")
    image.save(tmp_path / "copy.jpeg", quality=quality)
    write_image(tmp_path / "another.jpeg", size=(400, 320))
    assert pairs_of(tmp_path) == {frozenset(("original.png", "copy.jpeg"))}


@pytest.mark.parametrize("size", [(1600, 1280), (200, 160), (100, 80), (224, 224), (64, 64)])
def test_a_rescaled_copy_is_found(tmp_path: Path, size: tuple[int, int]) -> None:
    image = draw("radiograph", (400, 320))
    image.save(tmp_path / "original.jpeg")
    image.resize(size, Image.Resampling.BICUBIC).save(tmp_path / "copy.png")
    write_image(tmp_path / "another.png", size=size)
    assert pairs_of(tmp_path) == {frozenset(("original.jpeg", "copy.png"))}


def test_equal_pixels_are_found_in_whatever_format(tmp_path: Path) -> None:
    names = ("a.png", "b.bmp", "c.tiff", "d.gif", "e.webp")
    for name in names:
        draw("radiograph").save(tmp_path / name, lossless=True)
    draw("radiograph").convert("RGB").save(tmp_path / "f.png")
    everything = [*names, "f.png"]
    assert pairs_of(tmp_path) == {
        frozenset((a, b)) for a in everything for b in everything if a != b
    }


@pytest.mark.parametrize("size", [(322, 320), (338, 320), (430, 320)])
def test_a_copy_is_found_whatever_its_decoder_can_leave_out(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    # Of a JPEG file, only a half or a quarter of the lines is decoded; of a PNG file, all are.
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (size[1] // 2, size[0] // 2), np.uint8)
    fine = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    fine.save(tmp_path / "a.jpeg", quality=90)
    Image.open(tmp_path / "a.jpeg").save(tmp_path / "b.png")
    Image.fromarray(coarse[::-1]).resize(size, Image.Resampling.BICUBIC).save(tmp_path / "c.jpeg")
    assert pairs_of(tmp_path) == {frozenset(("a.jpeg", "b.png"))}


def test_a_brighter_copy_is_found(tmp_path: Path) -> None:
    image = draw("radiograph")
    image.save(tmp_path / "original.png")
    image.point(lambda value: 40 + value * 0.7).save(tmp_path / "brighter.png")
    assert len(pairs_of(tmp_path)) == 1


def test_different_images_are_not_taken_for_copies(tmp_path: Path) -> None:
    for i in range(60):
        write_image(tmp_path / f"{i}.jpeg", size=(90 + i, 80))
    draw("mirrored").save(tmp_path / "mirror-a.png")
    mirrored = draw("mirrored").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(tmp_path / "mirror-b.png")
    draw("inverted").save(tmp_path / "inverted-a.png")
    draw("inverted").point(lambda value: 255 - value).save(tmp_path / "inverted-b.png")
    assert pairs_of(tmp_path) == set()


def test_images_without_a_file_are_compared_too() -> None:
    phantoms = SyntheticChestXray(4, image_size_px=64)
    assert find_duplicates(phantoms) == []
    assert find_duplicates(concatenate([phantoms, phantoms.subset([2])])) == [(2, 4)]


@pytest.mark.parametrize("level", [0, 100, 255])
def test_blank_images_are_copies_of_nothing(tmp_path: Path, level: int) -> None:
    for i in range(3):
        Image.new("L", (50 + i, 40), level).save(tmp_path / f"{i}.png")
    write_image(tmp_path / "radiograph.png")
    assert pairs_of(tmp_path) == set()


def test_images_of_any_shape_can_be_compared(tmp_path: Path) -> None:
    for size in ((1, 1), (1, 500), (500, 1), (3, 2)):
        write_image(tmp_path / f"{size}.png", size=size)
    assert all(len(pair) == 2 for pair in pairs_of(tmp_path))


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_has_no_copies(tmp_path: Path, count: int) -> None:
    write_image(tmp_path / "a.png")
    dataset = dataset_of([sample(tmp_path / "a.png")] * count)
    assert find_duplicates(dataset) == []
    assert patient_groups(dataset) == [0] * count


def test_copies_are_found_across_the_blocks_that_are_compared_at_once() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2300, 8, 8), np.uint8)
    copies = [(0, 1023), (0, 2299), (1023, 1024), (1024, 2048), (5, 6), (1500, 2200)]
    for a, b in copies:
        pixels[b] = pixels[a]

    def read(s: Sample, min_size: tuple[int, int] | None) -> Image.Image:
        return Image.fromarray(pixels[int(s.path.name)])

    dataset = dataset_of([sample(str(i), read=read) for i in range(len(pixels))])
    same = Counter(p.tobytes() for p in pixels)
    found = find_duplicates(dataset)
    assert len(found) == sum(n * (n - 1) // 2 for n in same.values()) > len(copies)
    assert all(np.array_equal(pixels[a], pixels[b]) for a, b in found)
    assert set(copies) <= set(found)


def test_the_threshold_is_a_correlation(tmp_path: Path) -> None:
    base = np.asarray(draw("base", (64, 64)), float)
    noise = np.asarray(draw("noise", (64, 64)), float)
    mixed = base + 0.4 * noise
    Image.fromarray(np.rint(mixed * 255 / mixed.max()).astype(np.uint8)).save(tmp_path / "b.png")
    Image.fromarray(base.astype(np.uint8)).save(tmp_path / "a.png")
    dataset = dataset_of([sample(tmp_path / "a.png"), sample(tmp_path / "b.png")])
    pixels = [np.asarray(dataset.image(i), float).ravel() for i in (0, 1)]
    expected = float(np.corrcoef(pixels)[0, 1])
    assert 0.5 < expected < 0.98
    assert find_duplicates(dataset, correlation=expected - 0.001) == [(0, 1)]
    assert find_duplicates(dataset, correlation=cast(float, torch.tensor(0.5))) == [(0, 1)]
    assert find_duplicates(dataset, correlation=expected + 0.001) == []


@pytest.mark.parametrize("correlation", [0.0, 1.0, -1.0, 98.0, float("nan")])
def test_a_threshold_that_is_no_correlation_is_refused(correlation: float) -> None:
    with pytest.raises(TypeError, match=r"correlation must be a number, got '0\.9'"):
        find_duplicates(dataset_of([]), correlation=cast(float, "0.9"))
    with pytest.raises(ValueError, match=r"correlation must be in \(0, 1\), got"):
        find_duplicates(dataset_of([]), correlation=correlation)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ImageError, match=r"b\.png is damaged"):
        pairs_of(tmp_path)


def test_progress_is_shown_only_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    dataset = SyntheticChestXray(2, image_size_px=32)
    patient_groups(dataset)
    assert capsys.readouterr() == ("", "")
    patient_groups(dataset, progress=True)
    assert "duplicates: 100%" in capsys.readouterr().err


# Groups


def test_a_group_is_a_patient_of_a_source() -> None:
    samples = [
        sample("0", "1", source="a"),
        sample("1", "1", source="b"),
        sample("2", "2", source="a"),
        sample("3", "1", source="a"),
    ]
    assert patient_groups(dataset_of(samples), find_copies=False) == [0, 1, 2, 0]


def test_patients_that_share_an_image_are_one_group_through_chains(tmp_path: Path) -> None:
    images = {"0": "x", "1": "own", "2": "y", "3": "x", "4": "y", "5": "other", "6": "z"}
    patients = {"0": "A", "1": "A", "2": "B", "3": "C", "4": "C", "5": "B", "6": "D"}
    for name, image in images.items():
        write_image(tmp_path / f"{name}.png", image)
    samples = [sample(tmp_path / f"{name}.png", patient) for name, patient in patients.items()]
    assert patient_groups(dataset_of(samples)) == [0, 0, 0, 0, 0, 0, 1]
    assert patient_groups(dataset_of(samples), find_copies=False) == [0, 0, 1, 2, 2, 1, 3]


def test_an_image_known_in_two_collections_joins_their_patients(tmp_path: Path) -> None:
    cohen = CohenCovidDataset(write_cohen(tmp_path / "cohen"))
    hannover = HannoverCovidDataset(write_hannover(tmp_path / "hannover"))
    for both in (cohen + hannover, hannover + cohen):
        groups = patient_groups(both, find_copies=False)
        sizes: dict[int, set[str]] = {}
        for group, s in zip(groups, both.samples, strict=True):
            sizes.setdefault(group, set()).add(f"{s.metadata.get('numbered_by')} {s.patient_id}")
        joined = [patients for patients in sizes.values() if len(patients) > 1]
        assert joined == [{"cohen 190", "None 004e7871"}]


@pytest.mark.parametrize("others", [(), ("hannover",)])
def test_a_patient_with_own_and_taken_over_images_is_one_group(others: tuple[str, ...]) -> None:
    taken = {"origin": "hannover", "image_id": "x"}
    cohen = dataset_of(
        [sample("0", "7", source="cohen"), sample("1", "7", source="cohen", metadata=taken)]
    )
    rest = [sample("2", "7", source=name, metadata={"image_id": "y"}) for name in others]
    whole = concatenate([concatenate([cohen, dataset_of(rest)]), dataset_of([])])
    groups = patient_groups(whole, find_copies=False)
    assert groups == [0, 0, *range(1, 1 + len(others))]


identities = st.builds(
    sample,
    st.integers(0, 30).map(str),
    st.sampled_from("12345"),
    source=st.sampled_from(["cohen", "hannover", "site"]),
    metadata=st.sampled_from(
        [
            {},
            {"image_id": "x"},
            {"image_id": "y"},
            {"image_id": ""},
            {"origin": "hannover", "image_id": "x"},
            {"origin": "hannover", "image_id": "y"},
            {"origin": "", "image_id": "y"},
        ]
    ),
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(identities, max_size=12))
def test_groups_are_the_connected_components_of_shared_identities(samples: list[Sample]) -> None:
    def keys(s: Sample) -> set[tuple[str, ...]]:
        image_id = s.metadata.get("image_id")
        image = {("image", s.metadata.get("origin") or s.source, image_id)} if image_id else set()
        return {("patient", s.source, s.patient_id), ("file", str(s.path)), *image}

    expected = [{i} for i in range(len(samples))]
    for _ in samples:
        for i, a in enumerate(samples):
            for k, b in enumerate(samples):
                if keys(a) & keys(b):
                    expected[i] |= expected[k]
    groups = patient_groups(dataset_of(samples), find_copies=False)
    for i in range(len(samples)):
        assert {k for k, group in enumerate(groups) if group == groups[i]} == expected[i]
    assert list(dict.fromkeys(groups)) == list(range(len(set(groups))))


def test_the_order_of_the_samples_does_not_change_who_belongs_together(tmp_path: Path) -> None:
    dataset = FolderDataset(write_nih(tmp_path), classes=LABELS)
    write_image(tmp_path / "Pneumonia" / "99999999_000.jpg", "00001201_000.jpg")
    dataset = FolderDataset(tmp_path, classes=LABELS)
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    straight, shuffled = patient_groups(dataset), patient_groups(dataset.subset(order))
    for i in range(len(order)):
        for k in range(len(order)):
            same = straight[order[i]] == straight[order[k]]
            assert (shuffled[i] == shuffled[k]) is same
    assert len(set(straight)) == len({s.patient_id for s in dataset.samples}) - 1


def test_workers_do_not_change_the_result(tmp_path: Path) -> None:
    for i in range(12):
        write_image(tmp_path / f"{i}.jpeg", str(i % 5))
    dataset = dataset_of([sample(p, p.stem) for p in sorted(tmp_path.iterdir())])
    results = [find_duplicates(dataset, workers=workers) for workers in (1, 2, 8)]
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 3 + 3 + 1 + 1 + 1


def test_some_worker_must_decode() -> None:
    for find in (find_duplicates, patient_groups):
        with pytest.raises(ValueError, match="workers must be positive, got 0"):
            find(dataset_of([]), workers=0)
        with pytest.raises(TypeError, match="workers must be a whole number, got None"):
            find(dataset_of([]), workers=cast(int, None))


@pytest.mark.slow
@pytest.mark.real_data
def test_real_duplicates_are_few_and_their_chains_short(real_data: Path) -> None:
    folders = ("covid-chestxray-dataset", "chest_xray", "covid-19-image-repository", "nih-subset")
    whole = concatenate([open_dataset(real_data / f, classes=LABELS) for f in folders])
    page = Path(__file__).parents[1] / "docs" / "data.md"
    said = f"On {len(whole):,} radiographs of four collections"
    assert said in " ".join(page.read_text(encoding="utf-8").split())
    pairs = find_duplicates(whole, workers=os.cpu_count() or 1)
    assert 35 <= len(pairs) <= 60
    linked = Counter(_components(len(whole), pairs))
    assert max(linked.values()) <= 5


def _components(count: int, pairs: list[tuple[int, int]]) -> list[int]:
    component = list(range(count))
    for _ in range(10):
        for a, b in pairs:
            component[a] = component[b] = min(component[a], component[b])
    return component


def test_a_file_is_one_patients_whatever_its_path_is_spelled_like() -> None:
    paths = ("data/a.png", "data/./a.png", "data/x/../a.png", "data/b.png")
    samples = [sample(path, str(i)) for i, path in enumerate(paths)]
    assert patient_groups(dataset_of(samples), find_copies=False) == [0, 0, 0, 1]
    phantoms = SyntheticChestXray(4, image_size_px=32, patients=4)
    groups = patient_groups(phantoms + phantoms, find_copies=False)
    assert groups == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_file_is_one_patients_by_its_relative_path_its_full_one_and_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    paths = ("site/a.png", tmp_path / "site" / "a.png", "link/a.png", "site/b.png")
    samples = [sample(path, str(i)) for i, path in enumerate(paths)]
    assert patient_groups(dataset_of(samples), find_copies=False) == [0, 0, 0, 1]


class Drawn:
    """Images of samples without a file: noise that follows from the number in the path."""

    def __init__(self, different: int, blank: int = 0) -> None:
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (different, 64, 64), np.uint8)
        self.pixels[:blank] = 7

    def __call__(self, s: Sample, min_size: tuple[int, int] | None) -> Image.Image:
        return Image.fromarray(self.pixels[int(s.path.name) % len(self.pixels)])

    def dataset(self, size: int) -> ChestXrayDataset:
        return dataset_of([sample(str(i), str(i), read=self) for i in range(size)])


def test_many_equal_images_are_one_group_without_a_pair_of_each_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[int] = []
    similar = duplicates._similar

    def counted(thumbnails: Any, correlation: float) -> Iterator[tuple[int, int]]:
        compared.append(len(thumbnails))
        return similar(thumbnails, correlation)

    monkeypatch.setattr(duplicates, "_similar", counted)
    assert patient_groups(Drawn(3).dataset(300)) == [0, 1, 2] * 100
    assert compared == [3]
    blanks = patient_groups(Drawn(3, blank=2).dataset(6))
    assert blanks == [0, 1, 2, 3, 4, 2]


def test_the_memory_is_that_of_the_thumbnails() -> None:
    dataset = Drawn(10).dataset(2000)
    tracemalloc.start()
    patient_groups(dataset)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.3 * 2000 * 16 * 1024


def test_an_equal_hash_in_the_metadata_joins_patients_without_reading(tmp_path: Path) -> None:
    hashes = ["a", "b", "a", "", ""]
    samples = [
        sample(f"{i}.png", str(i), metadata={"content_hash": h}) for i, h in enumerate(hashes)
    ]
    assert patient_groups(dataset_of(samples), find_copies=False) == [0, 1, 0, 2, 3]
