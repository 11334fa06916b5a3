from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from chestxray_covid.datasets.base import LABELS, Sample, concatenate
from chestxray_covid.datasets.duplicates import patient_groups
from chestxray_covid.datasets.folder import FolderDataset, ManifestDataset
from chestxray_covid.datasets.phantom import phantom_mask, render_phantom
from chestxray_covid.datasets.synthetic import SyntheticChestXray
from chestxray_covid.errors import DatasetError

Pixels = NDArray[np.int16]


def pixels(sample: Sample) -> Pixels:
    return np.asarray(render_phantom(sample), dtype=np.int16)


def auroc_from_lungs(**arguments: Any) -> float:
    """Train on the first two thirds of the patients, return the AUROC on the others."""
    dataset = SyntheticChestXray(450, image_size_px=64, patients=450, **arguments)
    shown = [pixels(s) * phantom_mask(s) for s in dataset.samples]
    thumbnails = np.array([p.reshape(16, 4, 16, 4).mean(axis=(1, 3)).ravel() for p in shown])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    model.fit(thumbnails[:300], dataset.targets[:300])
    scores = model.predict_proba(thumbnails[300:])[:, 1]
    return float(roc_auc_score(dataset.targets[300:], scores))


# What is in the data set


def test_classes_are_balanced_and_the_report_counts_them() -> None:
    dataset = SyntheticChestXray(31, classes=LABELS, image_size_px=32)
    assert len(dataset) == 31
    assert Counter(dataset.targets) == {0: 11, 1: 10, 2: 10}
    report = dataset.report()
    assert (report.found, report.kept, report.dropped) == (31, 31, {})
    assert report.images == {"normal": 11, "pneumonia": 10, "covid19": 10}
    for label in LABELS:
        patients = {s.patient_id for s in dataset.samples if s.label == label}
        assert report.patients[label] == len(patients)


def test_items_are_grey_square_images_with_their_target() -> None:
    image, target = SyntheticChestXray(2, image_size_px=100)[1]
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size, target) == ("L", (100, 100), 1)


def test_every_patient_has_one_label_and_one_to_three_images() -> None:
    dataset = SyntheticChestXray(200, classes=LABELS)
    labels: dict[str, set[str]] = {}
    for s in dataset.samples:
        labels.setdefault(s.patient_id, set()).add(s.label)
    assert all(len(names) == 1 for names in labels.values())
    assert set(Counter(s.patient_id for s in dataset.samples).values()) == {1, 2, 3}


@pytest.mark.parametrize("patients", [2, 3, 7, 20])
def test_the_number_of_patients_can_be_given(patients: int) -> None:
    dataset = SyntheticChestXray(20, patients=patients)
    labels = {s.patient_id: s.label for s in dataset.samples}
    assert len(labels) == patients
    assert all(s.label == labels[s.patient_id] for s in dataset.samples)


@pytest.mark.parametrize("patients", [None, 5])
def test_an_image_does_not_depend_on_the_size_of_the_data_set(patients: int | None) -> None:
    small = SyntheticChestXray(6, classes=LABELS, image_size_px=32, patients=patients)
    large = SyntheticChestXray(40, classes=LABELS, image_size_px=32, patients=patients)
    assert small.samples == large.samples[:6]
    assert small[5][0].tobytes() == large[5][0].tobytes()


def test_a_sequence_of_sources_says_nothing_about_the_label() -> None:
    dataset = SyntheticChestXray(120, patients=60, sources=("a", "b"), views=("PA", "AP", "L"))
    cells = Counter((s.label, s.source, s.view) for s in dataset.samples)
    assert len(cells) == 2 * 2 * 3
    assert set(cells.values()) == {10}
    by_patient = {(s.patient_id, s.source, s.view) for s in dataset.samples}
    assert len(by_patient) == 60


def test_names_may_come_one_by_one() -> None:
    once: Any = {"sources": iter(["a", "b"]), "views": iter(["PA", "AP"])}
    expected = SyntheticChestXray(8, sources=["a", "b"], views=["PA", "AP"])
    assert SyntheticChestXray(8, **once).samples == expected.samples


def test_a_mapping_of_sources_gives_the_label_away() -> None:
    sources = {"covid19": "site-b", "normal": "site-a"}
    dataset = SyntheticChestXray(30, sources=sources, views=("PA", "AP"))
    assert all(s.source == sources[s.label] for s in dataset.samples)
    assert {(s.label, s.view) for s in dataset.samples} == {
        (label, view) for label in sources for view in ("PA", "AP")
    }


# Reproducibility


def test_other_processes_draw_the_same_pixels() -> None:
    samples = SyntheticChestXray(4, image_size_px=64, seed=7).samples
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        there = list(pool.map(render_phantom, samples))
    assert [i.tobytes() for i in there] == [render_phantom(s).tobytes() for s in samples]


def test_another_seed_or_index_gives_another_image() -> None:
    samples = [s for seed in (0, 1) for s in SyntheticChestXray(8, seed=seed).samples]
    assert len({render_phantom(s).tobytes() for s in samples}) == 16
    assert len({s.content_hash() for s in samples}) == 16


def test_another_seed_gives_other_patients(tmp_path: Path) -> None:
    first, second = (SyntheticChestXray(8, image_size_px=32, seed=seed) for seed in (0, 1))
    groups = patient_groups(first + second, find_copies=False)
    assert set(groups[:8]).isdisjoint(groups[8:])
    saved = FolderDataset(second.save(tmp_path / "saved"))
    assert {s.patient_id for s in saved.samples} == {s.patient_id for s in second.samples}


def test_images_of_a_patient_are_more_alike_than_those_of_others() -> None:
    samples = SyntheticChestXray(24, image_size_px=64, patients=8, signal="none").samples
    alike = np.corrcoef([pixels(s).ravel() for s in samples])
    same = np.array([[a.patient_id == b.patient_id for b in samples] for a in samples])
    assert alike[same & (alike < 0.999)].mean() > alike[~same].mean() + 0.05


def test_a_phantom_is_drawn_in_full_whatever_size_is_needed() -> None:
    dataset = SyntheticChestXray(2, image_size_px=128)
    assert dataset.image(0, (32, 32)).tobytes() == dataset[0][0].tobytes()


def test_subsets_and_transforms_work_as_with_files() -> None:
    dataset = SyntheticChestXray(
        6, image_size_px=32, transform=lambda image: image.size, target_transform=str
    )
    assert dataset[1] == ((32, 32), "1")
    joined = concatenate([dataset.subset([0]), dataset.filter(lambda s: s.label == "covid19")])
    assert [joined[i][1] for i in range(len(joined))] == ["0", "1", "1", "1"]


# What a physician sees


@pytest.mark.parametrize("size", [32, 100, 256])
def test_the_mask_lies_inside_the_image_and_covers_a_plausible_share(size: int) -> None:
    for s in SyntheticChestXray(30, image_size_px=size).samples:
        mask = phantom_mask(s)
        assert (mask.shape, mask.dtype) == ((size, size), np.dtype(bool))
        border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert not border.any()
        assert 0.15 < mask.mean() < 0.5


def test_lungs_are_darker_than_the_heart_and_brighter_than_the_air_around_the_neck() -> None:
    for s in SyntheticChestXray(20, image_size_px=128, signal="none", seed=2).samples:
        image, mask = pixels(s), phantom_mask(s)
        lungs, heart, air = image[mask].mean(), image[70:78, 60:68].mean(), image[:4, :4].mean()
        assert air + 20 < lungs < heart - 50


def test_heart_points_to_the_right_of_the_image_and_the_dome_on_the_left_is_higher() -> None:
    masks = [phantom_mask(s) for s in SyntheticChestXray(40, signal="none", seed=3).samples]
    share = np.mean(masks, axis=0)
    assert share[:, :128].sum() > 1.05 * share[:, 128:].sum()  # the heart takes from the left lung
    left, right = share[:, 54] > 0.5, share[:, -54] > 0.5  # lateral of the heart
    assert np.flatnonzero(left).max() + 3 < np.flatnonzero(right).max()


# The signal


def twins(label: str, count: int) -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Yield what the disease adds to the pixels, and the lungs' mask."""
    arguments: dict[str, Any] = {"classes": LABELS, "image_size_px": 128, "patients": 3 * count}
    ill = SyntheticChestXray(3 * count, **arguments)
    well = SyntheticChestXray(3 * count, signal="none", **arguments)
    for a, b in zip(ill.samples, well.samples, strict=True):
        if a.label == label:
            yield (pixels(a) - pixels(b)).astype(float), phantom_mask(a)


@pytest.mark.parametrize("label", LABELS)
def test_the_label_changes_no_pixel_outside_the_lungs(label: str) -> None:
    for added, mask in twins(label, 12):
        assert not added[~mask].any()
        assert added[mask].any() == (label != "normal")


@pytest.mark.slow
def test_covid19_is_bilateral_peripheral_and_low() -> None:
    for added, _ in twins("covid19", 12):
        assert added[:, :64].sum() > 0
        assert added[:, 64:].sum() > 0
    total = np.sum([added for added, _ in twins("covid19", 40)], axis=0)
    lungs = np.sum([mask for _, mask in twins("covid19", 40)], axis=0)
    rows, columns = np.indices((128, 128))
    for place in (rows, np.abs(columns - 63.5)):
        assert np.average(place, weights=total) > np.average(place, weights=lungs) + 5


def test_pneumonia_is_in_one_lung() -> None:
    sides = []
    for added, _ in twins("pneumonia", 20):
        left, right = added[:, :64].sum(), added[:, 64:].sum()
        assert min(left, right) < 0.02 * max(left, right)
        sides.append(left > right)
    assert len(set(sides)) == 2


@pytest.mark.slow
def test_labels_can_be_learned_from_the_lungs() -> None:
    assert 0.8 < auroc_from_lungs() < 0.999


@pytest.mark.slow
def test_labels_are_chance_without_the_signal() -> None:
    assert 0.35 < auroc_from_lungs(signal="none") < 0.65


# Planted shortcuts


def test_the_marker_lies_in_the_corner_of_covid19_images_alone() -> None:
    arguments: dict[str, Any] = {"classes": LABELS, "image_size_px": 64}
    for a, b in zip(
        SyntheticChestXray(12, marker="corner", **arguments).samples,
        SyntheticChestXray(12, **arguments).samples,
        strict=True,
    ):
        changed = pixels(a) != pixels(b)
        assert changed.any() == (a.label == "covid19")
        changed[:13, -13:] = False
        assert not changed.any()
        assert (pixels(a)[:13, -13:].max() == 255) == (a.label == "covid19")


def test_marker_and_missing_signal_combine() -> None:
    for s in SyntheticChestXray(8, marker="corner", signal="none").samples:
        assert s.metadata["opacity"] == "none"
        assert (pixels(s)[:40, -40:].max() == 255) == (s.label == "covid19")


def test_a_site_effect_gives_each_source_its_look_and_moves_nothing() -> None:
    sources = ("dark", "middle", "bright")
    plain = SyntheticChestXray(12, patients=6, sources=sources).samples
    sites = SyntheticChestXray(12, patients=6, sources=sources, site_effect=True).samples
    for before, after in zip(plain, sites, strict=True):
        mask = phantom_mask(before)
        assert np.array_equal(mask, phantom_mask(after))
        change = np.sign((pixels(after) - pixels(before))[mask].mean())
        assert change == sources.index(after.source) - 1
        edge = pixels(after)[:5].max()
        assert (edge == 0) == (after.source == "bright")


def test_sources_are_names_only_without_a_site_effect() -> None:
    one, two = SyntheticChestXray(4), SyntheticChestXray(4, sources=("a", "b"))
    assert [pixels(s).tolist() for s in one.samples] == [pixels(s).tolist() for s in two.samples]


# Saving


def test_saved_phantoms_come_back_as_a_folder_and_as_a_manifest(tmp_path: Path) -> None:
    dataset = SyntheticChestXray(
        12, classes=LABELS, image_size_px=32, sources=("a", "b"), views=("PA", "AP")
    )
    root = dataset.save(tmp_path / "new" / "phantoms")
    assert root == tmp_path / "new" / "phantoms"
    assert [p.name for p in root.parent.iterdir()] == ["phantoms"]
    assert sorted(p.name for p in root.iterdir()) == [
        "covid19",
        "manifest.csv",
        "normal",
        "pneumonia",
    ]

    def facts(samples: tuple[Sample, ...]) -> list[tuple[str, ...]]:
        return sorted((s.patient_id, s.label, s.read(s, None).tobytes().hex()) for s in samples)

    folder = FolderDataset(root, classes=LABELS)
    assert folder.report().notes == {}
    assert facts(folder.samples) == facts(dataset.samples)
    listed = ManifestDataset(root, classes=LABELS)
    assert facts(listed.samples) == facts(dataset.samples)
    assert [(s.source, s.view, s.finding) for s in listed.samples] == [
        (s.source, s.view, s.finding) for s in dataset.samples
    ]


def test_saving_takes_an_empty_folder_and_the_usual_permissions(tmp_path: Path) -> None:
    usual, root = tmp_path / "usual", tmp_path / "phantoms"
    usual.mkdir()
    root.mkdir()
    SyntheticChestXray(2, image_size_px=32).save(root)
    assert root.stat().st_mode == usual.stat().st_mode
    assert len(FolderDataset(root)) == 2


def test_saving_does_not_replace_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = SyntheticChestXray(2, image_size_px=32)
    for current in (".", tmp_path):
        with pytest.raises(DatasetError, match=r"is the current folder.*Pass a folder inside it"):
            dataset.save(current)
    assert list(Path.cwd().iterdir()) == []
    assert len(FolderDataset(dataset.save("phantoms"))) == 2


def test_saving_ignores_transforms(tmp_path: Path) -> None:
    dataset = SyntheticChestXray(2, image_size_px=32, transform=lambda image: None)
    assert FolderDataset(dataset.save(tmp_path / "phantoms"))[0][0].size == (32, 32)


def test_saving_refuses_a_folder_with_content(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DatasetError, match="not an empty folder; nothing was written"):
        SyntheticChestXray(2, image_size_px=32).save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_saving_refuses_a_place_that_is_a_file_or_below_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(DatasetError, match="not an empty folder"):
        SyntheticChestXray(2, image_size_px=32).save(file)
    with pytest.raises(DatasetError, match="cannot be written"):
        SyntheticChestXray(2, image_size_px=32).save(file / "below")
    assert file.read_text() == "mine"


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    resource = pytest.importorskip("resource", reason="file size limits are a POSIX feature")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# PNG files of 32 pixels have about 900 bytes and the manifest about 3000: the last limit hits it.
@pytest.mark.parametrize("limit", [0, 500, 2000])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, limit: int) -> None:
    dataset = SyntheticChestXray(60, image_size_px=32)
    with (
        file_size_limit(limit),
        pytest.raises(DatasetError, match=r"cannot be written to .*phantoms"),
    ):
        dataset.save(tmp_path / "phantoms")
    assert list(tmp_path.iterdir()) == []


def test_progress_is_shown_only_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = SyntheticChestXray(2, image_size_px=32)
    dataset.save(tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    dataset.save(tmp_path / "loud", progress=True)
    assert "drawing" in capsys.readouterr().err


# Bad input


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"size": 1}, "size must be from 2 to inf, got 1"),
        ({"size": -3}, "size must be from 2"),
        ({"classes": ("normal", "flu")}, "classes of phantoms are among"),
        ({"classes": ()}, "classes must be one or more"),
        ({"image_size_px": 31}, "image_size_px must be from 32 to 1024, got 31"),
        ({"image_size_px": 1025}, "image_size_px must be from 32 to 1024, got 1025"),
        ({"seed": -1}, "seed must be from 0"),
        ({"patients": 1}, "patients must be from 2 to 10, got 1"),
        ({"patients": 11}, "patients must be from 2 to 10, got 11"),
        ({"signal": "heart"}, "signal must be one of .*, got 'heart'"),
        ({"marker": "centre"}, "marker must be None or one of .*, got 'centre'"),
        ({"marker": "corner", "classes": ("normal",)}, "marker marks covid19, which is not"),
        ({"sources": ()}, "sources must be one or more names"),
        ({"sources": ("a", "")}, "sources must be one or more names"),
        ({"sources": {"normal": "a"}}, "sources must name each class"),
        ({"sources": {"normal": "a", "covid19": ""}}, "sources must be one or more names"),
        ({"views": []}, "views must be one or more names"),
        ({"site_effect": True}, "site_effect needs two or more sources"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SyntheticChestXray(**{"size": 10, **arguments})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"size": 10.0}, r"size must be a whole number, got 10\.0"),
        ({"seed": "1"}, "seed must be a whole number, got '1'"),
        ({"classes": "normal"}, "classes must be a sequence of names"),
        ({"sources": "site-a"}, "sources must be a sequence of names, got the string 'site-a'"),
        ({"views": "PA"}, "views must be a sequence of names, got the string 'PA'"),
    ],
)
def test_values_of_the_wrong_type_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        SyntheticChestXray(**{"size": 10, **arguments})


@pytest.mark.parametrize("function", [phantom_mask, render_phantom])
@pytest.mark.parametrize("metadata", [{}, {"seed": "0", "index": "first"}])
def test_only_phantoms_have_a_drawing(
    function: Callable[[Sample], object], metadata: dict[str, str]
) -> None:
    sample = Sample(
        path=Path("real.png"),
        label="normal",
        finding="",
        patient_id="1",
        source="x",
        metadata=metadata,
    )
    with pytest.raises(ValueError, match=r"real\.png is no phantom: expected a sample of"):
        function(sample)
