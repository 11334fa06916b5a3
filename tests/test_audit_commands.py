from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from chestxray_covid import (
    AuditReport,
    ChestXrayDataset,
    Sample,
    SyntheticChestXray,
    open_dataset,
    split_by_patient,
)
from chestxray_covid.audit_commands import _from_folder, _sides
from chestxray_covid.cli import main
from chestxray_covid.errors import ImageError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("phantoms") / "data"
    return SyntheticChestXray(24, image_size_px=64, sources=("a", "b")).save(place)


@pytest.fixture(scope="module")
def run_folder(
    data: Path, checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a run folder: a checkpoint with the split that it was trained with."""
    folder = shutil.copytree(checkpoint_folder, tmp_path_factory.mktemp("runs") / "run")
    dataset = open_dataset(data / "manifest.csv")
    split_by_patient(dataset, val=0.25, test=0.25, find_copies=False).save(folder / "split.json")
    return folder


def audit(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["audit", *map(str, arguments)])


def test_an_audit_is_printed_and_written_and_does_not_fail_the_command(
    data: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    manifest, output = data / "manifest.csv", tmp_path / "new" / "audit.json"
    common = ("--model", checkpoint_folder, "--data", manifest, "--train", manifest)
    done = audit(*common, "--output", output, "--limit", 8, "--seed", 1)
    assert done.exit_code == 0, done.output
    report = AuditReport.load(output)
    assert str(report) in done.output
    assert (report.verdict, report.seed) == ("fail", 1)  # it was audited on its training data
    assert 4 <= report.n_images <= 12
    assert f"{report.n_images} of these images are of patients that were trained on" in str(report)
    strict = audit(*common, "--limit", 8, "--strict")
    assert strict.exit_code == 1
    assert "Shortcut audit: FAIL" in strict.output


def test_what_an_audit_found_is_shown_even_if_no_file_can_be_written(
    data: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / ("a" * 300)  # longer than names may be, which only writing shows
    manifest = data / "manifest.csv"
    done = audit("--model", checkpoint_folder, "--data", manifest, "--limit", 8, "--output", output)
    assert done.exit_code == 1
    assert "Does it need the lungs, and nothing else?" in done.output


def test_a_run_knows_what_it_was_trained_on(data: Path, run_folder: Path, tmp_path: Path) -> None:
    manifest, output = data / "manifest.csv", tmp_path / "audit.json"
    common = ("--model", run_folder, "--data", manifest, "--output", output)
    assert audit(*common, "--split", "test").exit_code == 0
    held_out = AuditReport.load(output)
    assert held_out.n_images < 12
    assert held_out.item("confounding").reason.startswith("In the training data")
    assert "trained on" not in held_out.item("generalisation").reason
    assert audit(*common).exit_code == 0
    everything = AuditReport.load(output)
    assert everything.n_images == 24
    assert "were trained on" in everything.item("generalisation").reason


def test_every_file_is_read_once_to_know_what_was_trained_on(
    data: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be many, and on a slow disk."""
    read: list[Path] = []
    content_hash = Sample.content_hash

    def counted(sample: Sample) -> str:
        read.append(sample.path)
        return content_hash(sample)

    monkeypatch.setattr(Sample, "content_hash", counted)
    dataset = open_dataset(data / "manifest.csv")
    audited, known = _sides(dataset, run_folder / "split.json", None, is_told=False)
    assert audited is dataset
    assert known is not None
    assert 0 < len(known) < len(dataset)
    assert sorted(read) == sorted(sample.path for sample in dataset.samples)


def test_a_part_of_what_a_run_was_trained_on_is_not_taken_for_all_of_it(
    data: Path, run_folder: Path, tmp_path: Path
) -> None:
    """Else the design of the few images that are here would be judged as that of the training."""
    lines = (data / "manifest.csv").read_text().splitlines()
    part = data / "part.csv"
    part.write_text("\n".join(lines[:9]) + "\n")
    common = ("--model", run_folder, "--data", part, "--output", tmp_path / "audit.json")
    done = audit(*common)
    assert done.exit_code == 2
    assert "of these 8 images, and on" in done.output
    assert "--train" in done.output
    told = audit(*common, "--train", data / "manifest.csv")
    assert told.exit_code == 0, told.output
    report = AuditReport.load(tmp_path / "audit.json")
    assert "8 of these images are of patients that were trained on" in str(report)


@pytest.mark.slow
def test_a_folder_of_masks_is_used(data: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    masks, output = tmp_path / "masks", tmp_path / "audit.json"
    masks.mkdir()
    drawn = np.zeros((64, 64), bool)
    drawn[:4] = True  # three parts of a hundred at 64 px: where no phantom has its lungs
    for i, path in enumerate(sorted(data.rglob("*.png"))):
        name = path.stem if i % 2 else f"{path.stem}_mask"
        Image.fromarray(drawn).save(masks / f"{name}.png")
    manifest = data / "manifest.csv"
    done = audit(
        *("--model", checkpoint_folder, "--data", manifest, "--output", output, "--masks", masks)
    )
    assert done.exit_code == 0, done.output
    heat = AuditReport.load(output).item("heat").finding("share_in_lungs")
    assert "area: 0.1" in heat.meaning or "area: 0.0" in heat.meaning


@pytest.mark.parametrize("white", [1, 255])
def test_masks_are_read_whatever_their_white_is(tmp_path: Path, white: int) -> None:
    drawn = np.zeros((8, 6), np.uint8)
    drawn[2:5] = white
    Image.fromarray(drawn).save(tmp_path / "x_mask.png")
    Image.fromarray(0 * drawn).save(tmp_path / "empty.png")
    one = SyntheticChestXray(2, image_size_px=32).samples[0]
    samples = [replace(one, path=Path(n)) for n in ("x.jpg", "empty.jpg", "y.jpg")]
    find = _from_folder(tmp_path, ChestXrayDataset(samples, classes=("normal", "covid19")))
    masks = [find(sample) for sample in samples[:2]]
    assert masks[0] is not None
    assert masks[1] is not None
    assert masks[0].dtype == bool
    assert (masks[0] == (drawn > 0)).all()
    assert not masks[1].any()
    assert find(samples[2]) is None


@pytest.mark.parametrize(("one", "other"), [(1, 2), (127, 255), (200, 100)])
def test_a_mask_that_tells_one_lung_from_the_other_is_refused(
    tmp_path: Path, one: int, other: int
) -> None:
    """Only that of the higher number was one."""
    drawn = np.zeros((8, 6), np.uint8)
    drawn[2:5, :2], drawn[2:5, 4:] = one, other
    Image.fromarray(drawn).save(tmp_path / "x.png")
    sample = replace(SyntheticChestXray(2, image_size_px=32).samples[0], path=Path("x.jpg"))
    find = _from_folder(tmp_path, ChestXrayDataset([sample], classes=("normal", "covid19")))
    with pytest.raises(ImageError, match=rf"x\.png has labels from 0 to {max(one, other)}, .* 255"):
        find(sample)
    soft = Image.fromarray(255 * (drawn > 0).astype(np.uint8)).resize((60, 80))
    soft = soft.point(lambda level: max(level, 2))  # as where a JPEG was in between
    soft.save(tmp_path / "x.png")
    assert np.array_equal(find(sample), np.asarray(soft) > 127)


def test_masks_of_other_images_or_of_two_are_refused(
    data: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    """As of normal/1.png and covid19/1.png: each would get the lungs of one of them."""
    for label in ("normal", "covid19"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i, path in enumerate(sorted((data / label).iterdir())[:2]):
            shutil.copy(path, tmp_path / "data" / label / f"{i}.png")
    masks = tmp_path / "drawn"
    masks.mkdir()
    common = ("--model", checkpoint_folder, "--data", tmp_path / "data", "--masks", masks)
    Image.new("L", (64, 64), 255).save(masks / "other_mask.png")
    done = audit(*common)  # as of a wrong folder, for which the lungs were found without a word
    assert done.exit_code == 2
    assert (
        "drawn holds no mask of these 4 images: no 0.png or 0_mask.png, for example."
        in " ".join(done.output.split())
    )
    Image.new("L", (64, 64), 255).save(masks / "1_mask.png")
    done = audit(*common)
    assert done.exit_code == 2
    assert "1_mask.png could be the mask of" in done.output


def test_a_split_needs_a_run_and_a_question_its_classes(
    data: Path, checkpoint_folder: Path
) -> None:
    manifest = data / "manifest.csv"
    done = audit("--data", manifest, "--split", "test")
    assert done.exit_code == 2
    assert "--split needs --model to be the folder of a training run." in done.output
    wrong = audit("--model", checkpoint_folder, "--data", manifest, "--positive", "flu")
    assert wrong.exit_code == 1
    assert "positive must be one of" in wrong.output
