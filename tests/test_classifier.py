from __future__ import annotations

import gc
import gzip
import http.client
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import threading
import zipfile
from collections import UserList
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageSequence

from chestxray_covid.checkpoint import ModelConfig, load_checkpoint, save_checkpoint
from chestxray_covid.classifier import Classifier
from chestxray_covid.datasets.base import ChestXrayDataset, Sample
from chestxray_covid.datasets.folder import FolderDataset
from chestxray_covid.datasets.loading import image_files
from chestxray_covid.datasets.synthetic import SyntheticChestXray
from chestxray_covid.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ImageError,
    ImageNotFoundError,
    ResourceError,
)
from chestxray_covid.explain import grad_cam
from chestxray_covid.export import export_model
from chestxray_covid.image import Preprocess, load_image
from chestxray_covid.models import to_tensors
from chestxray_covid.prediction import FailedPrediction, Prediction
from conftest import no_more_files, random_checkpoint, random_tensors

pytestmark = pytest.mark.usefixtures("shallow")

CLASSES = ("normal", "pneumonia", "covid19")


@pytest.fixture(scope="module")
def checkpoint_folder(shallow: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def clf(checkpoint_folder: Path) -> Classifier:
    return Classifier.from_pretrained(checkpoint_folder)


@pytest.fixture(scope="module")
def small() -> Classifier:
    """Return a classifier of 32 px, for tests of many images."""
    return Classifier(
        ModelConfig(classes=CLASSES, preprocess=Preprocess(size_px=32)), random_tensors(3)
    )


def phantom(seed: int, size: tuple[int, int] = (90, 80)) -> Image.Image:
    """Return a drawing of two dark lungs in a bright body, mode ``L``."""
    rng = np.random.default_rng(seed)
    width, height = size
    image = Image.fromarray(rng.integers(120, 200, (height, width), dtype=np.uint8))
    draw = ImageDraw.Draw(image)
    for left in (0.12, 0.55):
        x, y = rng.uniform(-0.05, 0.05, 2)
        box = (left + x, 0.15 + y, left + 0.33 + x, 0.85 + y)
        corners = tuple(round(f * (width, height)[i % 2]) for i, f in enumerate(box))
        draw.ellipse(corners, fill=int(rng.integers(10, 90)))
    return image


def noise(count: int, side: int = 64, seed: int = 0) -> NDArray[np.uint8]:
    """Return arrays ``(N, 1, S, S)``: at the model's own size nothing is resized."""
    return np.random.default_rng(seed).integers(0, 256, (count, 1, side, side), dtype=np.uint8)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of six radiographs, two of them one level down, and other files."""
    place = tmp_path_factory.mktemp("radiographs")
    (place / "ward").mkdir()
    for seed, name in enumerate(["a.png", "b.PNG", "c.jpg", "d.bmp", "ward/e.png", "ward/f.tif"]):
        phantom(seed).save(place / name)
    (place / "notes.txt").write_text("no image")
    (place / "._a.png").write_bytes(b"\0\5\x16\7")
    (place / ".hidden").mkdir()
    phantom(9).save(place / ".hidden" / "g.png")
    return place


def in_order(folder: Path) -> list[Path]:
    names = ["a.png", "b.PNG", "c.jpg", "d.bmp", "ward/e.png", "ward/f.tif"]
    return [folder / name for name in names]


def plain_torchvision(folder: Path, batch: NDArray[np.uint8]) -> NDArray[Any]:
    """Return the probabilities of ``(N, 1, S, S)`` pixels by torchvision's own forward."""
    config, tensors = load_checkpoint(folder)
    model = torchvision.models.densenet121(weights=None, num_classes=len(config.classes)).eval()
    model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
    grey = torch.from_numpy(batch).float() / 255
    mean, std = config.preprocess.mean, config.preprocess.std
    normalise = torchvision.transforms.Normalize([mean] * 3, [std] * 3)
    with torch.inference_mode():
        logits = torch.cat([model(normalise(g.repeat(1, 3, 1, 1))) for g in grey.split(10)])
    return torch.softmax(logits.double(), 1).numpy()


def rows(predictions: list[Prediction]) -> NDArray[np.float64]:
    return np.array([list(p.probabilities.values()) for p in predictions])


# ---------------------------------------------------------------- probabilities


def test_its_repr_says_classes_and_what_computes(clf: Classifier) -> None:
    computing = f"{clf.engine.name}, {clf.engine.precision}"
    assert repr(clf) == f"Classifier(normal, pneumonia, covid19; {computing})"


@pytest.mark.slow
@pytest.mark.usefixtures("real_depth")
def test_probabilities_are_those_of_torchvision(tmp_path: Path) -> None:
    batch = noise(20)
    expected = plain_torchvision(random_checkpoint(tmp_path), batch)
    clf = Classifier.from_pretrained(tmp_path)
    assert expected.std(axis=0).min() > 1e-3, "a network that ignores its input proves nothing"
    np.testing.assert_allclose(clf.predict_proba(batch), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a state", "a network", "a list", "an array"])
def test_weights_that_are_no_arrays_are_refused_with_what_to_pass(
    clf: Classifier, kind: str
) -> None:
    network = torchvision.models.densenet121(weights=None, num_classes=3)
    others = {"a list": [1.0], "an array": np.ones(2)}
    given: Any = {"a state": network.state_dict(), "a network": network, **others}[kind]
    with pytest.raises(TypeError, match=r"names to NumPy arrays, got .*to_tensors\(network\)"):
        Classifier(clf.config, given)
    assert Classifier(clf.config, to_tensors(network), engine="torch").classes == clf.classes


def test_three_ways_of_asking_agree_on_two_hundred_images(small: Classifier) -> None:
    batch = noise(200, 32)
    table = small.predict_proba(batch)
    assert table.shape == (200, 3)
    assert table.dtype == np.float64
    np.testing.assert_allclose(table.sum(axis=1), 1, atol=1e-12)
    predictions = small.predict(batch)
    np.testing.assert_allclose(rows(predictions), table, atol=1e-6)
    assert [p.label for p in predictions] == [CLASSES[k] for k in rows(predictions).argmax(1)]
    assert all(tuple(p.probabilities) == CLASSES for p in predictions)
    for row, ranked in zip(table, small(batch), strict=True):
        scores = {entry["label"]: entry["score"] for entry in ranked}
        assert list(scores.values()) == sorted(row, reverse=True)
        np.testing.assert_allclose([scores[name] for name in CLASSES], row, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_batch_size_and_order_change_nothing(small: Classifier, batch_size: int) -> None:
    batch = noise(20, 32, seed=1)
    expected = small.predict_proba(batch, batch_size=16)
    order = np.random.default_rng(2).permutation(20)
    for workers in (1, 4):
        found = small.predict_proba(batch[order], batch_size=batch_size, workers=workers)
        np.testing.assert_allclose(found, expected[order], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([np.uint8, np.uint16, np.int16, np.float32, np.float64, np.bool_]),
    st.integers(0, 2**32),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_any_finite_image_has_finite_probabilities(
    small: Classifier, dtype: Any, seed: int, height: int, width: int
) -> None:
    rng = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.floating):
        image = (rng.standard_normal((height, width)) * 10.0 ** rng.integers(-30, 30)).astype(dtype)
    else:
        image = rng.integers(0, 2 if dtype is np.bool_ else 2**15, (height, width)).astype(dtype)
    prediction = small.predict(image)
    values = np.array(list(prediction.probabilities.values()))
    assert np.isfinite(values).all()
    assert abs(values.sum() - 1) < 1e-12
    assert prediction.label == max(
        prediction.probabilities, key=prediction.probabilities.__getitem__
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_image_with_values_that_are_not_finite_is_refused(clf: Classifier, value: float) -> None:
    image = np.zeros((50, 50), np.float32)
    image[7, 7] = value
    with pytest.raises(ImageError, match="<array>"):
        clf.predict(image)
    with pytest.raises(ImageError, match="<array>"):
        clf.predict(torch.from_numpy(image))


@pytest.mark.parametrize("ask", ["predict", "predict_proba", "__call__"])
def test_a_model_that_overflows_raises_and_never_answers(ask: str) -> None:
    tensors = random_tensors(2)
    tensors["classifier.weight"] = np.full_like(tensors["classifier.weight"], 3e38)
    config = ModelConfig(classes=("normal", "covid19"), preprocess=Preprocess(size_px=32))
    overflowing = Classifier(config, tensors)
    with pytest.raises(CheckpointError, match=r"not finite: its weights overflow\. Train it"):
        getattr(overflowing, ask)(noise(1, 32)[0])


def test_logits_that_differ_much_give_zero_and_one() -> None:
    tensors = random_tensors(2)
    tensors["classifier.bias"] = np.array([-3000, 3000], np.float32)
    config = ModelConfig(classes=("normal", "covid19"), preprocess=Preprocess(size_px=32))
    prediction = Classifier(config, tensors).predict(noise(1, 32)[0])
    assert prediction.probabilities == {"normal": 0.0, "covid19": 1.0}
    assert (prediction.score, prediction.is_positive) == (1.0, True)


# ---------------------------------------------------------------- kinds of images


def sample(path: Path) -> Sample:
    return Sample(path=path, label="normal", finding="", patient_id="1", source="drawn")


KINDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "path": (lambda p: p, "{path}"),
    "text": (str, "{path}"),
    "bytes": (lambda p: p.read_bytes(), "<bytes>"),
    "bytearray": (lambda p: bytearray(p.read_bytes()), "<bytes>"),
    "stream": (lambda p: io.BytesIO(p.read_bytes()), "<stream>"),
    "PIL image": (lambda p: Image.open(p), "<PIL image>"),
    "array": (lambda p: np.asarray(Image.open(p)), "<array>"),
    "float array": (lambda p: np.asarray(Image.open(p)) / 255, "<array>"),
    "colour array": (lambda p: np.asarray(Image.open(p).convert("RGB")), "<array>"),
    "tensor": (lambda p: torch.from_numpy(np.array(Image.open(p))), "<array>"),
    "sample": (sample, "{path}"),
    "tensor of a channel": (lambda p: torch.from_numpy(np.array(Image.open(p)))[None], "<array>"),
}


def test_the_home_folder_is_found_by_its_sign(
    clf: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    clf.save_pretrained("~/models/mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]
    again = Classifier.from_pretrained("~/models/mine", engine="torch")
    assert again.config.weights_sha256 == clf.config.weights_sha256
    with pytest.raises(CheckpointNotFoundError, match="~nobody/mine is no checkpoint folder"):
        Classifier.from_pretrained("~nobody/mine")


def test_images_and_folders_of_them_are_found_in_the_home_folder(
    clf: Classifier, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    expected = clf.predict(folder / "a.png")
    assert clf.predict("~/a.png") == replace(expected, source="~/a.png")
    assert [p.source for p in clf.predict(Path("~/ward"))] == [
        str(folder / "ward" / name) for name in ("e.png", "f.tif")
    ]
    phantom(0).save(folder / "ward" / "~a.png")  # of no user
    monkeypatch.chdir(folder / "ward")
    assert clf.predict("~a.png").probabilities == expected.probabilities
    (folder / "ward" / "~a.png").unlink()


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_of_any_kind_gives_one_prediction(
    clf: Classifier, folder: Path, kind: str
) -> None:
    make, source = KINDS[kind]
    path = folder / "a.png"
    expected = clf.predict_proba([path])
    prediction = clf.predict(make(path))
    assert prediction.source == source.format(path=path)
    np.testing.assert_allclose(rows([prediction]), expected, atol=1e-6)
    np.testing.assert_allclose(clf.predict_proba(make(path)), expected, atol=1e-6)
    ranked = clf(make(path))
    assert ranked[0]["label"] == prediction.label
    assert len(ranked) == 3


def test_an_open_file_is_one_image(clf: Classifier, folder: Path) -> None:
    # A file is an iterator, too: of its lines.
    with (folder / "c.jpg").open("rb") as file:
        prediction = clf.predict(file)
    assert prediction.probabilities == clf.predict(folder / "c.jpg").probabilities


def test_a_mixed_list_gives_a_list_in_its_order(clf: Classifier, folder: Path) -> None:
    paths = in_order(folder)
    image = Image.open(paths[1])
    mixed = [
        paths[0],
        image,
        np.asarray(Image.open(paths[2])),
        paths[3].read_bytes(),
        folder / "ward",
        noise(2),
    ]
    found = clf.predict(mixed)
    names = [str(paths[0]), "<PIL image>", "<array>", "<bytes>", str(paths[4]), str(paths[5])]
    assert [p.source for p in found] == [*names, "<array>", "<array>"]
    expected = np.concatenate([clf.predict_proba(paths), clf.predict_proba(noise(2))])
    np.testing.assert_allclose(rows(found), expected, atol=1e-6)
    np.testing.assert_allclose(clf.predict_proba(tuple(mixed)), expected, atol=1e-6)


def test_one_image_of_any_kind_is_one_in_a_stream_too(clf: Classifier, folder: Path) -> None:
    path = folder / "c.jpg"
    opened = io.BytesIO(path.read_bytes())
    for image in (opened, np.zeros((30, 40, 3), np.uint8), path.read_bytes(), sample(path)):
        assert len(list(clf.predict_stream(image))) == 1
    assert len(list(clf.predict_stream(torch.zeros(2, 1, 40, 40)))) == 2


def test_samples_give_what_their_files_give(clf: Classifier, folder: Path) -> None:
    paths = in_order(folder)
    samples = tuple(map(sample, paths))
    phantoms = SyntheticChestXray(2, image_size_px=64)
    assert clf.predict(samples) == clf.predict(paths)
    assert list(clf.predict_stream(samples)) == clf.predict(paths)
    assert clf.predict(phantoms.samples[0]) == clf.predict(phantoms)[0]
    assert load_image(samples[0]).tobytes() == load_image(paths[0]).tobytes()


@pytest.mark.parametrize(
    "make",
    [
        np.array,
        pd.Series,
        lambda paths: np.array(paths, object),
        pyarrow.array,
        lambda paths: pyarrow.chunked_array([paths[:2], paths[2:]]),
        UserList,  # any other sequence, as the columns of Hugging Face's data sets
    ],
)
def test_columns_of_paths_stand_for_their_images(
    clf: Classifier, folder: Path, make: Callable[[list[str]], Any]
) -> None:
    paths = [str(path) for path in in_order(folder)]
    assert clf.predict(make(paths)) == clf.predict(paths)
    assert list(clf.predict_stream(make(paths))) == clf.predict(paths)
    assert clf.predict_proba(make(paths)).shape == (6, 3)


@pytest.mark.parametrize("ask", ["predict", "predict_proba"])
def test_one_opened_file_may_be_given_several_times(
    clf: Classifier, tmp_path: Path, ask: str
) -> None:
    path = tmp_path / "large.png"
    phantom(3, (900, 800)).save(path)
    expected = clf.predict_proba([path]).repeat(8, 0)
    with path.open("rb") as stream, Image.open(path) as image:
        for given in (stream, image):
            found = getattr(clf, ask)([given] * 8)
            found = rows(found) if ask == "predict" else found
            np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("ask", ["predict", "predict_proba"])
def test_every_frame_of_an_open_file_is_an_image_of_its_own(
    clf: Classifier, tmp_path: Path, ask: str
) -> None:
    frames = [phantom(k) for k in range(6)]
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "pages.tif") as pages:
        found = getattr(clf, ask)(ImageSequence.Iterator(pages))
    found = rows(found) if ask == "predict" else found
    np.testing.assert_allclose(found, clf.predict_proba(frames), atol=1e-6)


@pytest.mark.parametrize("ask", ["predict", "predict_proba", "predict_stream", "__call__"])
def test_open_files_may_come_one_by_one(clf: Classifier, folder: Path, ask: str) -> None:
    paths = in_order(folder)
    expected = clf.predict_proba(paths)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in paths:
            archive.write(path, path.name)
    with zipfile.ZipFile(packed) as archive, ExitStack() as opened:
        files = [opened.enter_context(path.open("rb")) for path in paths]
        members = [opened.enter_context(archive.open(path.name)) for path in paths]
        for streams in map(iter, (files, members, [io.BytesIO(p.read_bytes()) for p in paths])):
            found = getattr(clf, ask)(streams)
            if ask == "__call__":
                assert len(found) == len(paths)
            else:
                found = found if ask == "predict_proba" else rows(list(found))
                np.testing.assert_allclose(found, expected, atol=1e-6)
    kept = io.BytesIO(paths[0].read_bytes())
    clf.predict(stream for stream in [kept])
    assert not kept.closed


def test_a_stream_that_breaks_is_a_failure_in_its_place_whatever_it_raises(
    clf: Classifier, folder: Path
) -> None:
    class Cut(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise http.client.IncompleteRead(b"")

    data = in_order(folder)[0].read_bytes()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.png", data)
    broken = packed.getvalue().replace(data, data[:-9] + b"X" + data[-8:])
    with zipfile.ZipFile(io.BytesIO(broken)) as archive:
        short = gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(data)[:-20]))
        images = [archive.open("a.png"), short, Cut(), io.BytesIO(data)]
        found = list(clf.predict_stream(images, on_error="return"))
    assert [isinstance(f, FailedPrediction) for f in found] == [True, True, True, False]
    assert all("<stream> cannot be read" in str(f) for f in found[:3])


def test_an_open_file_that_is_damaged_is_a_failure_in_its_place(clf: Classifier) -> None:
    cut = png(phantom(1))[:200]
    closed = io.BytesIO()
    closed.close()
    images = [phantom(1), Image.open(io.BytesIO(cut)), io.BytesIO(cut), closed, phantom(1)]
    found = list(clf.predict_stream(images, on_error="return"))
    names = ["<PIL image>", "<PIL image>", "<stream>", "<stream>", "<PIL image>"]
    assert [f.source for f in found] == names
    assert [isinstance(f, FailedPrediction) for f in found] == [False, True, True, True, False]
    assert "<stream> cannot be read" in str(found[3])


@pytest.mark.parametrize("ask", ["predict", "predict_proba", "predict_stream"])
def test_a_list_that_contains_itself_is_refused(clf: Classifier, ask: str) -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="more than 32 lists deep; does a list contain itself"):
        list(getattr(clf, ask)(endless))


@pytest.mark.parametrize("make", [Path, str])
def test_a_folder_stands_for_the_image_files_below_it(
    clf: Classifier, folder: Path, make: Callable[[Path], Any]
) -> None:
    assert [p.source for p in clf.predict(make(folder))] == [str(p) for p in in_order(folder)]
    streamed = clf.predict_stream(make(folder))
    assert [p.source for p in streamed] == [str(p) for p in in_order(folder)]
    assert clf.predict_proba(make(folder)).shape == (6, 3)
    assert len(clf(make(folder))) == 6


def test_a_batch_gives_what_its_images_give(clf: Classifier) -> None:
    batch = noise(3)
    expected = np.concatenate([clf.predict_proba(image) for image in batch])
    for several in (
        batch,
        torch.from_numpy(batch),
        batch.transpose(0, 2, 3, 1),
        batch.repeat(3, axis=1),
        iter(batch),
        list(batch),
    ):
        found = clf.predict_proba(several)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("nothing", [[], (), iter(()), np.zeros((0, 1, 64, 64), np.uint8)])
def test_no_images_give_no_predictions(clf: Classifier, nothing: Any) -> None:
    assert clf.predict(nothing) == []
    assert clf(nothing) == []
    assert clf.predict_proba(nothing).shape == (0, 3)
    assert list(clf.predict_stream(nothing)) == []


def test_an_empty_folder_has_no_predictions(clf: Classifier, tmp_path: Path) -> None:
    assert clf.predict(tmp_path) == []


def test_a_data_set_is_judged_from_its_files(clf: Classifier, folder: Path) -> None:
    dataset = ChestXrayDataset(
        [
            Sample(path=p, label="normal", finding="", patient_id=str(i), source="test")
            for i, p in enumerate(in_order(folder))
        ],
        classes=("normal",),
    )
    expected = clf.predict_proba(in_order(folder))
    np.testing.assert_allclose(clf.predict_proba(dataset), expected, atol=1e-6)
    for found in (clf.predict(dataset), list(clf.predict_stream(dataset)), clf.predict([dataset])):
        assert [p.source for p in found] == [str(p) for p in in_order(folder)]
        np.testing.assert_allclose(rows(found), expected, atol=1e-6)


def test_a_data_sets_own_transform_comes_first(clf: Classifier, tmp_path: Path) -> None:
    (tmp_path / "normal").mkdir()
    (tmp_path / "covid19").mkdir()
    phantom(1).save(tmp_path / "normal" / "a.png")
    phantom(2).save(tmp_path / "covid19" / "b.png")
    plain = FolderDataset(tmp_path)
    mirrored = FolderDataset(
        tmp_path, transform=lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    )
    by_hand = [plain[i][0].transpose(Image.Transpose.FLIP_LEFT_RIGHT) for i in range(2)]
    found = clf.predict_proba(mirrored)
    np.testing.assert_allclose(found, clf.predict_proba(by_hand), atol=1e-6)
    assert np.abs(found - clf.predict_proba(plain)).max() > 1e-4


def test_progress_is_shown_where_it_is_asked_for(
    clf: Classifier, capsys: pytest.CaptureFixture[str]
) -> None:
    clf.predict_proba(noise(3))
    assert capsys.readouterr() == ("", "")
    clf.predict_proba(noise(3), progress=True)
    assert "3/3" in capsys.readouterr().err


# ---------------------------------------------------------------- what is no image


@pytest.mark.parametrize("thing", [None, 3, 2.5, {"a.png": 1}, {"a.png"}, range(3), object()])
@pytest.mark.parametrize("ask", ["predict", "predict_proba", "__call__"])
def test_what_is_no_image_is_a_type_error(clf: Classifier, ask: str, thing: Any) -> None:
    for given_thing in (thing, [thing]):
        with pytest.raises(TypeError, match=f"expected a path, .* got {type(thing).__name__}"):
            getattr(clf, ask)(given_thing)


@pytest.mark.parametrize("name", ["none.png", "x" * 300 + ".png", "a\0b.png"])
def test_an_image_that_is_not_there_is_named(clf: Classifier, tmp_path: Path, name: str) -> None:
    for ask in (clf.predict, clf.predict_proba, clf, lambda p: list(clf.predict_stream([p]))):
        with pytest.raises(ImageError, match=r"(does not exist|cannot be opened)") as caught:
            ask(tmp_path / name)
        assert tmp_path.name in str(caught.value)


def test_an_empty_path_is_not_the_current_folder(clf: Classifier) -> None:
    for ask in (clf.predict, clf.predict_proba, clf, lambda p: list(clf.predict_stream([p]))):
        with pytest.raises(ImageNotFoundError, match="The path of an image is empty"):
            ask("")


@pytest.mark.parametrize("bad", [0, -1, -16])
def test_sizes_that_are_not_positive_are_refused(clf: Classifier, bad: int) -> None:
    for ask in (clf.predict, clf.predict_proba, clf, clf.predict_stream):
        with pytest.raises(ValueError, match=f"batch_size must be positive, got {bad}"):
            ask(noise(1), batch_size=bad)
    with pytest.raises(ValueError, match=f"top_k must be positive, got {bad}"):
        clf(noise(1), top_k=bad)
    for ask in (clf.predict_proba, clf.predict_stream):
        with pytest.raises(ValueError, match=f"workers must be positive, got {bad}"):
            ask(noise(1), workers=bad)


def test_sizes_that_are_no_whole_numbers_are_refused(clf: Classifier) -> None:
    with pytest.raises(TypeError, match=r"batch_size must be a whole number, got 2\.5"):
        clf.predict(noise(2), batch_size=2.5)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="batch_size must be a whole number, got None"):
        clf.predict([noise(2)], batch_size=None)  # type: ignore[call-overload]


@pytest.mark.parametrize(("top_k", "count"), [(1, 1), (2, 2), (3, 3), (99, 3)])
def test_the_best_labels_are_as_many_as_asked(clf: Classifier, top_k: int, count: int) -> None:
    (ranked,) = clf(noise(1), top_k=top_k)
    assert ranked == clf(noise(1)[0])[:count]


def test_equal_scores_keep_the_order_of_the_classes() -> None:
    tensors = random_tensors(50)
    tensors["classifier.weight"][:] = 0
    classes = tuple(f"finding {n:02d}" for n in range(50))
    undecided = Classifier(ModelConfig(classes=classes, preprocess=Preprocess(size_px=32)), tensors)
    ranked = undecided(noise(1, 32)[0], top_k=50)
    assert [entry["label"] for entry in ranked] == list(classes)
    assert undecided.predict(noise(1, 32)[0]).label == classes[0]


# ---------------------------------------------------------------- streams


def test_a_stream_keeps_its_order_whatever_takes_long(clf: Classifier) -> None:
    # Large and small images in turn: threads finish them in another order.
    sizes = [(900, 700) if i % 3 == 0 else (70, 70) for i in range(30)]
    images = [png(phantom(i, size)) for i, size in enumerate(sizes)]
    found = list(clf.predict_stream(images, batch_size=4, workers=4))
    np.testing.assert_allclose(rows(found), clf.predict_proba(images, workers=1), atol=1e-6)


def test_a_stream_reads_only_so_far_ahead_and_stops_when_it_is_left(clf: Classifier) -> None:
    taken, others = 0, set(threading.enumerate())

    def endless() -> Iterator[NDArray[np.uint8]]:
        nonlocal taken
        while taken < 10_000:
            taken += 1
            yield noise(1, seed=taken)[0]

    stream = clf.predict_stream(endless(), batch_size=4)
    assert taken == 0, "nothing is read before the first prediction is asked for"
    for count in range(1, 41):
        assert isinstance(next(stream), Prediction)
        assert taken <= count + 6 * 4
    before = taken
    stream.close()  # type: ignore[attr-defined]
    assert taken == before
    own = set(threading.enumerate()) - others
    assert not [t for t in own if t.name.startswith("decode")]


@pytest.fixture
def mixed(tmp_path: Path) -> list[Any]:
    """Return seven images of which three cannot be judged."""
    phantom(1).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes(png(phantom(1))[:200])
    good = tmp_path / "good.png"
    flat = np.zeros(5, np.uint8)
    return [good, tmp_path / "cut.png", good, tmp_path / "none.png", good, flat, good]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_images_that_cannot_be_judged_come_in_their_place(
    clf: Classifier, mixed: list[Any], batch_size: int
) -> None:
    found = list(clf.predict_stream(mixed, batch_size, "return"))
    failed = [isinstance(f, FailedPrediction) for f in found]
    assert failed == [False, True, False, True, False, True, False]
    assert [f.source for f in found] == [m if isinstance(m, str) else str(m) for m in mixed[:5]] + [
        "<array>",
        str(mixed[6]),
    ]
    good = [f for f in found if isinstance(f, Prediction)]
    np.testing.assert_allclose(rows(good), clf.predict_proba([mixed[0]]).repeat(4, 0), atol=1e-6)


def test_a_failure_names_the_file_and_the_reason(clf: Classifier, mixed: list[Any]) -> None:
    cut, none = (
        f
        for f in clf.predict_stream([mixed[1], mixed[3]], on_error="return")
        if isinstance(f, FailedPrediction)
    )
    assert isinstance(none.error, ImageNotFoundError)
    for failure, path in ((cut, mixed[1]), (none, mixed[3])):
        assert json.loads(failure.to_json()) == {"source": str(path), "error": str(failure.error)}
        assert str(path) in str(failure.error)
        assert str(failure) == str(failure.error)


def test_a_stream_raises_at_the_image_that_fails_and_not_before(
    clf: Classifier, mixed: list[Any]
) -> None:
    stream = clf.predict_stream(mixed, batch_size=1)
    assert next(stream).source == str(mixed[0])
    with pytest.raises(ImageError, match=r"cut\.png"):
        next(stream)


def test_one_image_starts_no_thread(
    clf: Classifier, mixed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise AssertionError(f"{thread.name} was started")

    expected = clf.predict([mixed[0]])[0].probabilities
    monkeypatch.setattr(threading.Thread, "start", start)
    assert clf.predict(mixed[0]).probabilities == expected
    assert list(clf.predict_proba(mixed[0])[0]) == list(expected.values())
    assert clf(mixed[0])
    with pytest.raises(AssertionError, match="was started"):
        clf.predict([mixed[0]])


@pytest.mark.parametrize("ask", ["predict", "predict_stream"])
def test_an_error_leaves_no_thread_behind(clf: Classifier, ask: str) -> None:
    images = [noise(1)[0], b"broken", *noise(20)]
    others = set(threading.enumerate())
    gc.disable()
    try:
        with pytest.raises(ImageError) as kept:
            list(getattr(clf, ask)(images))
        own = set(threading.enumerate()) - others
        assert not [t for t in own if t.name.startswith("decode")]
    finally:
        gc.enable()
    del kept


def test_an_error_that_nothing_expects_loses_no_earlier_prediction(clf: Classifier) -> None:
    found = []
    with pytest.raises(TypeError, match="got int"):
        found.extend(clf.predict_stream([*noise(5), 3, *noise(2)], batch_size=4))
    assert len(found) == 5


def test_an_error_of_the_source_itself_comes_through(clf: Classifier) -> None:
    def broken() -> Iterator[NDArray[np.uint8]]:
        yield noise(1)[0]
        raise KeyError("the caller's own")

    found: list[Any] = []
    with pytest.raises(KeyError, match="the caller's own"):
        found.extend(clf.predict_stream(broken(), on_error="return"))
    assert len(found) == 1


@pytest.mark.parametrize("on_error", ["skip", "", None, True])
def test_an_unknown_way_with_errors_is_refused_at_once(clf: Classifier, on_error: Any) -> None:
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'return', got"):
        clf.predict_stream([], on_error=on_error)


def test_a_stream_takes_anything_that_can_be_iterated(clf: Classifier, folder: Path) -> None:
    named = dict.fromkeys(in_order(folder))
    assert [p.source for p in clf.predict_stream(named)] == [str(p) for p in named]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_strange_things_in_a_folder_are_failures_and_do_not_hang(
    clf: Classifier, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    (tmp_path / "c.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "d").symlink_to(tmp_path)
    phantom(1).save(tmp_path / "e\n=cmd.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(png(phantom(1)))
    found = list(clf.predict_stream([tmp_path], on_error="return"))
    assert [Path(f.source).name for f in found] == ["a.png", "c.png", "e\n=cmd.png", "\udcff.png"]
    assert [isinstance(f, FailedPrediction) for f in found] == [True, True, False, False]
    assert json.loads(found[3].to_json())["source"] == found[3].source


def test_linked_folders_are_read_once_and_after_the_others(tmp_path: Path) -> None:
    for name in ("elsewhere/deep", "data/b"):
        (tmp_path / name).mkdir(parents=True)
        phantom(1).save(tmp_path / name / "x.png")
    data = tmp_path / "data"
    for link, target in (("a", "b"), ("c", "../elsewhere"), ("d", "."), (".e", "../elsewhere")):
        (data / link).symlink_to(target, target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(data, target_is_directory=True)
    assert [*image_files(data)] == [data / "b" / "x.png", data / "c" / "deep" / "x.png"]
    (tmp_path / "whole").symlink_to("data", target_is_directory=True)
    assert len([*image_files(tmp_path / "whole")]) == 2


def test_a_checkpoint_is_not_to_be_fetched_again_for_want_of_room(checkpoint_folder: Path) -> None:
    with no_more_files(), pytest.raises(ResourceError, match=r"config\.json: the machine"):
        Classifier.from_pretrained(checkpoint_folder)


def test_every_file_of_a_checkpoint_is_verified(tmp_path: Path, checkpoint_folder: Path) -> None:
    config, tensors = load_checkpoint(checkpoint_folder)
    save_checkpoint(tmp_path, config, tensors, {"notes.json": b"{}"})
    assert Classifier.from_pretrained(tmp_path).classes == config.classes
    (tmp_path / "notes.json").write_bytes(b"[]")
    with pytest.raises(
        CheckpointError, match=r"notes\.json is not the file that config\.json desc"
    ):
        Classifier.from_pretrained(tmp_path)


def test_all_classes_in_their_order_leave_the_weights_what_they_are(
    checkpoint_folder: Path,
) -> None:
    whole = Classifier.from_pretrained(checkpoint_folder)
    same = Classifier.from_pretrained(checkpoint_folder, classes=whole.classes)
    assert same._digest == whole._digest != ""
    turned = Classifier.from_pretrained(checkpoint_folder, classes=whole.classes[::-1])
    assert turned._digest != whole._digest


def test_a_folder_that_is_not_listed_for_want_of_room_is_not_left_out(tmp_path: Path) -> None:
    phantom(1).save(tmp_path / "a.png")
    with no_more_files(), pytest.raises(ResourceError, match=re.escape(f"{tmp_path}: the mach")):
        list(image_files(tmp_path))
    assert [*image_files(tmp_path)] == [tmp_path / "a.png"]


@pytest.mark.skipif(os.name != "posix", reason="needs directory descriptors")
def test_a_folder_that_cannot_be_listed_is_a_failure(clf: Classifier, tmp_path: Path) -> None:
    phantom(1).save(tmp_path / "a.png")
    handle = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):  # deeper than the 4096 bytes that a path may have
        os.mkdir("x" * 250, dir_fd=handle)
        inner = os.open("x" * 250, os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(handle)
    good, failed = clf.predict_stream([tmp_path], on_error="return")
    assert good.source == str(tmp_path / "a.png")
    assert isinstance(failed, FailedPrediction)
    assert failed.source.startswith(str(tmp_path / "xxx"))
    assert "File name too long" in str(failed.error)
    assert next(image_files(tmp_path)) == tmp_path / "a.png"


# ---------------------------------------------------------------- classes, threshold, results


def test_fewer_classes_renormalise_in_the_order_asked_for(
    clf: Classifier, checkpoint_folder: Path
) -> None:
    batch = noise(10)
    whole = clf.predict_proba(batch)
    part = Classifier.from_pretrained(checkpoint_folder, classes=["covid19", "normal"])
    assert part.classes == ("covid19", "normal")
    chosen = whole[:, [2, 0]]
    expected = chosen / chosen.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(part.predict_proba(batch), expected, atol=1e-6)
    scores = [p.score for p in part.predict(batch)]
    np.testing.assert_allclose(scores, [p.score for p in clf.predict(batch)], atol=1e-6)


@pytest.mark.parametrize(
    "classes",
    [
        *("normal", [], ["normal"], ["normal", "normal"], ["normal", "tuberculosis"]),
        *(["normal", None], {"normal", "covid19"}, frozenset({"normal", "covid19"}), 2),
    ],
)
def test_classes_that_do_not_fit_are_refused(checkpoint_folder: Path, classes: Any) -> None:
    with pytest.raises(ValueError, match=r"classes must be at least two different ones of \('norm"):
        Classifier.from_pretrained(checkpoint_folder, classes=classes)


def prediction(threshold: float = 0.5, **probabilities: float) -> Prediction:
    return Prediction(
        label=max(probabilities, key=probabilities.__getitem__),
        probabilities=probabilities,
        threshold=threshold,
        source="a.png",
    )


def test_the_score_weighs_covid19_against_normal_and_the_label_does_not() -> None:
    found = prediction(normal=0.1, pneumonia=0.7, covid19=0.2)
    assert found.label == "pneumonia"
    assert found.score == pytest.approx(2 / 3)
    assert found.is_positive is True
    assert prediction(0.7, normal=0.1, pneumonia=0.7, covid19=0.2).is_positive is False


def test_a_case_at_the_threshold_is_positive() -> None:
    assert prediction(0.25, normal=0.75, covid19=0.25).is_positive is True


def test_without_covid19_or_normal_there_is_no_score() -> None:
    for found in (prediction(a=0.4, covid19=0.6), prediction(normal=0.4, b=0.6)):
        assert found.score is None
        assert found.is_positive is None
        assert json.loads(found.to_json())["score"] is None


def test_where_both_probabilities_vanish_the_score_is_undecided() -> None:
    assert prediction(normal=0.0, pneumonia=1.0, covid19=0.0).score == 0.5


def test_the_threshold_of_the_checkpoint_is_applied(tmp_path: Path, clf: Classifier) -> None:
    config = ModelConfig(classes=CLASSES, preprocess=Preprocess(size_px=64), threshold=0.123)
    save_checkpoint(tmp_path, config, random_tensors(3))
    other = Classifier.from_pretrained(str(tmp_path))
    batch = noise(10)
    for found, plain in zip(other.predict(batch), clf.predict(batch), strict=True):
        assert found.threshold == 0.123
        assert found.probabilities == plain.probabilities
        assert found.score is not None
        assert found.is_positive == (found.score >= 0.123)


def test_a_prediction_becomes_data_json_and_text() -> None:
    found = prediction(0.3, normal=0.75, covid19=0.25)
    data = {
        "source": "a.png",
        "label": "normal",
        "probabilities": {"normal": 0.75, "covid19": 0.25},
        "score": 0.25,
        "threshold": 0.3,
        "is_positive": False,
        "abstained": False,
        "flags": [],
    }
    assert found.to_dict() == data
    assert json.loads(found.to_json()) == data
    assert "\n" not in found.to_json()
    assert str(found) == "a.png: normal 0.750, covid19 0.250"


def test_equal_predictions_are_one_in_a_set() -> None:
    one, other = prediction(normal=0.4, covid19=0.6), prediction(normal=0.4, covid19=0.6)
    assert {one, other} == {one}
    assert len({one, prediction(normal=0.3, covid19=0.7)}) == 2


def test_a_real_prediction_is_plain_json(clf: Classifier) -> None:
    data = json.loads(clf.predict(noise(1)[0]).to_json())
    assert sum(data["probabilities"].values()) == pytest.approx(1)
    assert list(data["probabilities"]) == list(clf.classes) == list(CLASSES)


# ---------------------------------------------------------------- opening


@pytest.mark.parametrize("use", [Classifier.from_pretrained, lambda c: export_model(c, "out")])
def test_a_classifier_is_no_name_of_one(
    clf: Classifier, use: Callable[[Any], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=r"got Classifier. Write .* with save_pretrained\(folder\)"):
        use(clf)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["no/such/model", "x" * 300, "a\0b"])
def test_what_is_no_checkpoint_folder_is_not_found(name: Any) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is no checkpoint folder, no bundled model"):
        Classifier.from_pretrained(name)


def test_a_folder_without_a_checkpoint_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json is missing"):
        Classifier.from_pretrained(tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, checkpoint_folder: Path) -> None:
    for file in checkpoint_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "model.safetensors").open("r+b") as weights:
        weights.seek(1_000_000)
        weights.write(b"\xff")
    with pytest.raises(CheckpointError, match="its SHA-256 differs"):
        Classifier.from_pretrained(tmp_path)


def test_unknown_engines_and_devices_are_refused(checkpoint_folder: Path) -> None:
    with pytest.raises(ValueError, match="engine must be one of"):
        Classifier.from_pretrained(checkpoint_folder, engine="tensorflow")
    with pytest.raises(ValueError, match="device 'tpu' cannot be used"):
        Classifier.from_pretrained(checkpoint_folder, device="tpu")


def test_weights_that_do_not_fit_their_config_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"classifier\.weight has shape"):
        Classifier(ModelConfig(classes=CLASSES), random_tensors(2))


def test_weights_that_train_on_are_not_those_of_a_classifier() -> None:
    tensors = random_tensors(3)
    own = Classifier(ModelConfig(classes=CLASSES), tensors, engine="torch")
    before = own.weights_sha256
    tensors["classifier.bias"] += np.array([9, 0, 0], np.float32)
    assert own.weights_sha256 == before
    assert grad_cam(own, noise(1)[0]).target == own.predict(noise(1)[0]).label


# ---------------------------------------------------------------- threads and processes


def test_eight_threads_get_what_one_gets(small: Classifier) -> None:
    images = noise(25, 32)
    expected = [small.predict(image) for image in images]

    def judge(first: int) -> list[Prediction]:
        return [small.predict(image) for image in np.roll(images, first, axis=0)]

    with ThreadPoolExecutor(8) as pool:
        for first, found in enumerate(pool.map(judge, range(8))):
            assert found == expected[-first:] + expected[:-first]


def test_a_pickled_classifier_answers_the_same(clf: Classifier) -> None:
    other = pickle.loads(pickle.dumps(clf))  # noqa: S301 - our own bytes
    assert other.config == clf.config
    assert np.array_equal(other.predict_proba(noise(4)), clf.predict_proba(noise(4)))


@pytest.mark.usefixtures("real_depth")  # that of the new process
def test_a_classifier_can_be_sent_to_a_new_process(folder: Path, tmp_path: Path) -> None:
    clf = Classifier.from_pretrained(random_checkpoint(tmp_path))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(clf.predict, folder).result()
    assert [p.source for p in found] == [str(p) for p in in_order(folder)]
    np.testing.assert_allclose(rows(found), clf.predict_proba(folder), atol=1e-6)


# ---------------------------------------------------------------- real radiographs


@pytest.mark.real_data
@pytest.mark.usefixtures("real_depth")
def test_real_files_are_judged_as_a_plain_torchvision_pipeline_judges_them(
    real_data: Path, tmp_path: Path
) -> None:
    side = 128  # a small side, that the large originals are decoded at a reduced size
    config = ModelConfig(classes=CLASSES, preprocess=Preprocess(size_px=side))
    save_checkpoint(tmp_path, config, random_tensors(3))
    names = (real_data / "originals.txt").read_text().split("\n")
    originals = [real_data / n for n in names if n and (real_data / n).is_file()][::6][:25]
    reduced = sorted((real_data / "nih-subset").rglob("*.jpg"))[::17][:25]
    paths = [*originals, *reduced]
    assert len(paths) == 50
    squash = (side, side)
    pixels = [
        np.asarray(load_image(p).resize(squash, Image.Resampling.BILINEAR))[None] for p in paths
    ]
    expected = plain_torchvision(tmp_path, np.stack(pixels))
    found = Classifier.from_pretrained(tmp_path).predict_proba(paths)
    assert expected.std(axis=0).min() > 1e-3
    np.testing.assert_allclose(found, expected, atol=0.02)
