from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import threadpoolctl
import torch
from PIL import Image
from scipy.ndimage import binary_dilation

from chestxray_covid import ChestXrayDataset, CohenCovidDataset, SyntheticChestXray, lung_mask
from chestxray_covid.datasets.base import read_file
from chestxray_covid.errors import CheckpointError, CheckpointNotFoundError, ImageError
from chestxray_covid.lung_maps import WEIGHTS, LungMaps, digest_of, read_weights
from chestxray_covid.lung_network import LungNetwork
from chestxray_covid.lungs import (
    load_network,
    lung_box,
    near_lungs,
    probabilities,
    save_network,
    segment,
    segment_stream,
)
from sources import write_cohen, write_image


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def image(width: int = 90, height: int = 70) -> Image.Image:
    phantom: Image.Image = SyntheticChestXray(2, image_size_px=128)[0][0]
    return phantom.resize((width, height))


def test_one_image_gives_a_mask_of_its_own_size() -> None:
    mask = segment(image(90, 70))
    assert (mask.shape, mask.dtype) == ((70, 90), np.bool_)


def test_several_images_of_several_kinds_give_a_list(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    image(64, 48).save(path)
    found = segment([path, path.read_bytes(), np.asarray(image(50, 60))], batch_size=2)
    assert [mask.shape for mask in found] == [(48, 64), (48, 64), (60, 50)]
    assert np.array_equal(found[0], found[1])
    assert segment([]) == []


def test_a_data_set_gives_a_mask_per_sample_whatever_the_batch() -> None:
    phantoms = SyntheticChestXray(5, image_size_px=96)
    together = segment(phantoms, batch_size=5)
    one_by_one = segment(phantoms, batch_size=1)
    assert len(together) == 5
    assert all(dice(a, b) > 0.999 for a, b in zip(together, one_by_one, strict=True))
    assert not any(np.array_equal(a, together[0]) for a in together[1:])


def test_a_folder_an_iterator_and_a_batch_stand_for_their_images(tmp_path: Path) -> None:
    pixels = np.stack([np.asarray(image(50, 40)), np.asarray(image(50, 40))[:, ::-1]])
    for number, one in enumerate(pixels):
        Image.fromarray(one).save(tmp_path / f"{number}.png")
    expected = [segment(one) for one in pixels]
    folder = tmp_path
    for several in (folder, str(folder), iter(pixels), pixels[:, np.newaxis], [[*pixels]]):
        found = segment(several)
        assert [mask.shape for mask in found] == [(40, 50)] * 2
        assert all(map(np.array_equal, found, expected))
    paths = [f"{tmp_path}/{number}.png" for number in range(2)]
    for several in (pd.Series(paths), np.array(paths), dict.fromkeys(paths).keys(), {*paths}):
        found = list(segment_stream(several))
        assert sorted(m.sum() for m in found) == sorted(m.sum() for m in expected)
    assert all(map(np.array_equal, segment(pd.Series(paths)), expected))
    sample = SyntheticChestXray(2, image_size_px=64).samples[0]
    assert segment(sample).shape == (64, 64)
    with (tmp_path / "0.png").open("rb") as file:
        assert np.array_equal(segment(file), expected[0])


def test_a_data_sets_own_transform_comes_first() -> None:
    plain = SyntheticChestXray(2, image_size_px=64)
    data = ChestXrayDataset(
        plain.samples,
        classes=plain.classes,
        transform=lambda shown: torch.tensor(np.asarray(shown)[:40] / 255.0),
    )
    assert [mask.shape for mask in segment(data)] == [(40, 64)] * 2


def test_exposure_says_little() -> None:
    plain = np.asarray(image(128, 128), np.float32)
    darker = segment((plain * 0.5).astype(np.uint8))
    brighter = segment((plain * 0.5 + 120).astype(np.uint8))
    assert dice(darker, brighter) > 0.97


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(ImageError, match=r"<bytes>"):
        segment(b"no image")
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        segment(image(), batch_size=0)
    for bad in (None, 1.5):
        with pytest.raises(TypeError, match=f"batch_size must be a whole number, got {bad}"):
            segment(image(), batch_size=cast(int, bad))


def test_a_stream_is_read_batch_by_batch() -> None:
    taken = []

    def images() -> object:
        for i in range(6):
            taken.append(i)
            yield image(40, 40)

    stream = segment_stream(images(), batch_size=2)
    assert taken == []
    next(stream)
    assert taken == [0, 1]
    assert len(list(stream)) == 5


# ---------------------------------------------------------------- annotated masks


def test_a_lung_mask_has_the_size_of_its_image(tmp_path: Path) -> None:
    cohen = CohenCovidDataset(write_cohen(tmp_path))
    annotated = [s for s in cohen.samples if "lung_mask" in s.metadata]
    assert [s.path.name for s in annotated] == ["a-1.jpeg"]
    mask = lung_mask(annotated[0])
    assert mask is not None
    assert (mask.shape, mask.dtype.name) == ((40, 48), "bool")
    assert mask[20, 12]
    assert mask[20, 34]
    assert not mask[20, 24]
    assert not mask[2].any()
    assert mask.mean() == pytest.approx(140 / 480, abs=0.05)


@pytest.mark.parametrize(("lung", "highest"), [(1, 1), (2, 2), (257, 255), (0, 0)])
def test_a_lung_mask_of_labels_is_refused(tmp_path: Path, lung: int, highest: int) -> None:
    pixels = np.zeros((20, 30), np.uint16 if lung > 255 else np.uint8)
    pixels[5:9, 5:9] = lung
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    place = write_image(tmp_path / "a.png")
    drawn = replace(
        SyntheticChestXray(2).samples[0],
        path=place,
        read=read_file,
        metadata={"lung_mask": str(tmp_path / "mask.png")},
    )
    if 0 < highest < 128:
        with pytest.raises(ImageError, match=rf"mask.png is at most {lung}; lungs must be white"):
            lung_mask(drawn)
    else:
        assert np.any(lung_mask(drawn)) == (highest > 0)


def test_most_samples_have_no_lung_mask() -> None:
    dataset = SyntheticChestXray(2)
    assert lung_mask(dataset.samples[0]) is None
    empty_cell = replace(dataset.samples[0], metadata={"lung_mask": ""})
    assert lung_mask(empty_cell) is None


def test_only_a_sample_has_a_lung_mask() -> None:
    dataset = SyntheticChestXray(2)
    for given in (dataset, dataset.samples[0].path, dataset[0]):  # nor is None said of the first
        with pytest.raises(TypeError, match=r"expected Sample, as dataset.samples\[0\] gives it"):
            lung_mask(given)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the box


def test_the_box_holds_the_lungs_and_a_margin() -> None:
    mask = np.zeros((100, 200), bool)
    mask[30:70, 40:160] = True
    assert lung_box(mask, margin=0) == (0.2, 0.3, 0.8, 0.7)
    assert lung_box(mask, margin=0.1) == pytest.approx((0.1, 0.2, 0.9, 0.8))
    assert lung_box(mask, margin=0.5) == (0, 0, 1, 1)


def test_too_little_lung_gives_no_box() -> None:
    mask = np.zeros((100, 100), bool)
    assert lung_box(mask) is None
    mask[:10, :19] = True
    assert lung_box(mask) is None
    assert lung_box(np.where(mask, 255, 0).astype(np.uint8)) is None  # as a mask's file has it
    mask[:10, :20] = True
    assert lung_box(mask) is not None


@pytest.mark.parametrize(
    ("shape", "margin"), [((4, 4, 1), 0.1), ((0, 4), 0.1), ((4, 4), -0.1), ((4, 4), np.nan)]
)
def test_an_impossible_box_is_refused(shape: tuple[int, ...], margin: float) -> None:
    with pytest.raises(ValueError, match=r"mask must be \(H, W\) and margin in \[0, 0.5\]"):
        lung_box(np.ones(shape, bool), margin=margin)
    with pytest.raises(TypeError, match=r"margin must be a number, got '0\.1'"):
        lung_box(np.ones((4, 4), bool), margin=cast(float, "0.1"))
    whole = lung_box(np.ones((4, 4), bool), margin=cast(float, Decimal("0.1")))
    assert whole == (0.0, 0.0, 1.0, 1.0)


def test_there_is_no_box_around_lungs_that_nobody_drew() -> None:
    with pytest.raises(ValueError, match=r"mask must be \(H, W\) and .*, got shape \(\)"):
        lung_box(lung_mask(SyntheticChestXray(2).samples[0]))  # type: ignore[arg-type]


# ---------------------------------------------------------------- the weights


def test_a_mask_depends_on_no_setting_of_torch_and_draws_no_number(written: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 1, 96, 96), dtype=np.uint8)
    expected = probabilities(load_network(written), pixels)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        network = load_network(written)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert np.array_equal(probabilities(network, pixels), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_network_gives_a_logit_per_pixel_that_exposure_does_not_change() -> None:
    torch.manual_seed(0)
    network = LungNetwork().eval()
    pixels = torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        found = network(pixels)
        assert found.shape == (2, 1, 64, 64)
        torch.testing.assert_close(network(pixels * 0.5 + 0.3), found, atol=0.1, rtol=0.1)


def test_near_the_lungs_is_what_a_little_growth_reaches() -> None:
    phantoms = SyntheticChestXray(6, image_size_px=128)
    pixels = np.stack([np.asarray(phantoms[i][0])[None] for i in range(6)])
    network = load_network(WEIGHTS)
    found = near_lungs(network, torch.from_numpy(pixels).float())
    masks = probabilities(network, pixels) > 0.5
    assert 0.05 < masks.mean() < 0.6
    for near, mask in zip(found[:, 0].numpy(), masks[:, 0], strict=True):
        little, more = (binary_dilation(mask, np.ones((2 * k + 1,) * 2)) for k in (3, 9))
        assert (near[little] == 1).all()
        assert (near[~more] == 0).all()
        assert ((near[more & ~little] > 0) & (near[more & ~little] <= 1)).all()
    large = near_lungs(network, torch.from_numpy(pixels).float().repeat(1, 1, 2, 2)[:, :, :192])
    assert large.shape == (6, 1, 192, 256)


def test_bundled_weights_are_small_and_measured() -> None:
    assert WEIGHTS.stat().st_size < 2_000_000
    about = json.loads(WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    assert about["dice"]["value"] > 0.93
    assert about["dice"]["low"] < about["dice"]["value"] < about["dice"]["high"]
    assert about["test_patients"] > 20


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "own.safetensors"
    save_network(path, LungNetwork(), {"note": "random"})
    return path


def test_weights_survive_the_disk_in_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = LungNetwork().eval()
    save_network(tmp_path / "own.safetensors", network, {})
    again = load_network(tmp_path / "own.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 1, 32, 32), dtype=np.uint8)
    expected = probabilities(network, pixels)
    np.testing.assert_allclose(probabilities(again, pixels), expected, atol=0.01)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own.json", "own.safetensors"]


@pytest.mark.parametrize("name", ["own.safetensors", "own.json"])
def test_missing_weights_are_named(
    written: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(written.parent))
    (written.parent / name).unlink()
    with pytest.raises(CheckpointNotFoundError, match=re.escape(str(written.with_name(name)))):
        load_network("~/own.safetensors")


def test_damaged_weights_are_refused(written: Path) -> None:
    data = bytearray(written.read_bytes())
    data[-5] ^= 1
    written.write_bytes(data)
    with pytest.raises(CheckpointError, match="its SHA-256 differs"):
        load_network(written)


@pytest.mark.parametrize("text", ["", "[]", "{}", "<html>"])
def test_a_damaged_description_is_refused(written: Path, text: str) -> None:
    written.with_suffix(".json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_network(written)


@pytest.mark.parametrize("defect", ["nan", "misshapen", "missing"])
def test_weights_of_another_kind_are_refused(written: Path, defect: str) -> None:
    network = LungNetwork()
    if defect == "nan":
        with torch.no_grad():
            network.head.bias.fill_(torch.nan)
    elif defect == "misshapen":
        network.head = torch.nn.Conv2d(16, 2, 1)
    else:
        network.head = torch.nn.Conv2d(16, 1, 1, bias=False)
    save_network(written, network, {})
    with pytest.raises(CheckpointError, match="finite weights of a lung network"):
        load_network(written)


@pytest.mark.parametrize("digest", ["abc", "zz" * 32, 7])
def test_a_description_without_a_hash_is_refused(written: Path, digest: object) -> None:
    written.with_suffix(".json").write_text(json.dumps({"sha256": digest}))
    with pytest.raises(CheckpointError, match=r"own\.json cannot be read"):
        digest_of(written)


# ---------------------------------------------------------------- without torch


@pytest.mark.parametrize("side", [128, 64, 192, 47])
def test_maps_without_torch_are_those_of_torch(side: int) -> None:
    phantoms = SyntheticChestXray(3, image_size_px=side)
    noise = np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)
    even = np.full((side, side), 9, np.uint8)
    images = [*(np.asarray(phantoms[i][0]) for i in range(3)), noise, even]
    maps, network = LungMaps(read_weights(WEIGHTS)), load_network(WEIGHTS)
    for pixels in images:
        picture = Image.fromarray(pixels).resize((128, 128), Image.Resampling.BILINEAR)
        expected = probabilities(network, np.array(picture)[np.newaxis, np.newaxis])[0, 0]
        found = maps(pixels[np.newaxis])
        assert (found.shape, found.dtype) == ((128, 128), np.float32)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_maps_are_drawn_in_one_thread_each_and_blas_is_left_as_it_was() -> None:
    maps = LungMaps(read_weights(WEIGHTS))
    images = np.random.default_rng(3).integers(0, 256, (6, 1, 96, 96), dtype=np.uint8)
    expected = [maps(image) for image in images]
    seen, inner = [], maps._probabilities

    def noted(grey: np.ndarray) -> np.ndarray:
        seen.append({pool["num_threads"] for pool in threadpool_info("blas")})
        return inner(grey)

    def threadpool_info(kind: str) -> list[dict[str, Any]]:
        return [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == kind]

    before = threadpool_info("blas")
    maps._probabilities = noted  # type: ignore[method-assign]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(maps, [*images, *images]))
    assert all(np.array_equal(*pair) for pair in zip(found, [*expected, *expected], strict=True))
    assert seen == [{1}] * 12
    assert threadpool_info("blas") == before


#: Many first looks at once, and a fork amid others; says what BLAS has before, after, in the child.
LOOKS = """
import os, sys, threading
import numpy as np
import threadpoolctl
from chestxray_covid import lung_maps

def blas():
    pools = threadpoolctl.threadpool_info()
    return [pool["num_threads"] for pool in pools if pool["user_api"] == "blas"]

image, barrier = np.zeros((1, 64, 64), np.uint8), threading.Barrier(6)

def look():
    barrier.wait()
    for _ in range(5):
        lung_maps.bundled()(image)

before = blas()
threads = [threading.Thread(target=look) for _ in range(6)]
for thread in threads:
    thread.start()
for _ in range(4):
    child = os.fork()
    if not child:
        lung_maps.bundled()(image)
        os._exit(blas() != before)
    assert os.waitpid(child, 0)[1] == 0, "the child"
for thread in threads:
    thread.join()
assert blas() == before, (before, blas())
sys.exit("torch" in sys.modules)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing to fork")
def test_many_first_looks_and_a_fork_leave_blas_as_it_was() -> None:
    command = [sys.executable, "-W", "ignore", "-c", LOOKS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr


def test_maps_of_random_weights_are_those_of_torch(written: Path) -> None:
    torch.manual_seed(1)
    network = LungNetwork().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[operator, union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    with torch.no_grad():
        network.head.weight.mul_(10)
    save_network(written, network, {})
    pixels = np.random.default_rng(2).integers(0, 256, (1, 128, 128), dtype=np.uint8)
    expected = probabilities(load_network(written), pixels[np.newaxis])[0, 0]
    assert expected.std() > 0.01
    np.testing.assert_allclose(LungMaps(read_weights(written))(pixels), expected, atol=1e-4)


# ---------------------------------------------------------------- real radiographs


@pytest.mark.real_data
def test_masks_agree_with_those_of_cohen(real_data: Path) -> None:
    cohen = CohenCovidDataset(real_data / "covid-chestxray-dataset")
    drawn = cohen.filter(lambda s: "lung_mask" in s.metadata)
    scores = [
        dice(mask, lung_mask(sample))  # type: ignore[arg-type]
        for mask, sample in zip(segment(drawn), drawn.samples, strict=True)
    ]
    assert len(scores) > 150
    assert np.mean(scores) > 0.93


@pytest.mark.real_data
@pytest.mark.parametrize("folder", ["chest_xray", "nih-subset", "covid-19-image-repository"])
def test_lungs_of_other_sources_lie_on_both_sides_of_the_middle(
    real_data: Path, folder: str
) -> None:
    from chestxray_covid import open_dataset

    whole = open_dataset(real_data / folder, classes=("normal", "pneumonia", "covid19"))
    some: ChestXrayDataset = whole.subset(range(0, len(whole), max(1, len(whole) // 25)))
    for mask in segment(some):
        middle = mask.shape[1] // 2
        assert 0.06 < mask.mean() < 0.7
        assert min(mask[:, :middle].sum(), mask[:, middle:].sum()) > 0.15 * mask.sum()
