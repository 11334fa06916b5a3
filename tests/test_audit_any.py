"""An audit of a model that is no :class:`Classifier`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audited import PREPROCESS, SIZE, Linear, pixels_of
from chestxray_covid import (
    ChestXrayDataset,
    Preprocess,
    SyntheticChestXray,
    audit_shortcuts,
    evaluate,
)
from chestxray_covid.datasets.base import Sample
from chestxray_covid.datasets.phantom import phantom_mask
from chestxray_covid.report import extend_report

pytestmark = pytest.mark.usefixtures("drawn_once")

HOW: dict[str, Any] = {"n_resamples": 50, "masks": phantom_mask}


class Other:
    """A model of anyone's: it sees images, and says what it thinks of them."""

    def __init__(self, model: Linear) -> None:
        self.model, self.classes = model, list(model.classes)
        self.shown: list[ChestXrayDataset] = []

    def predict_proba(
        self, images: ChestXrayDataset, /, *, batch_size: int, progress: bool
    ) -> np.ndarray:
        self.shown.append(images)
        return self.model._compute(pixels_of(images))[0]


class Featured(Other):
    def predict_features(
        self, images: ChestXrayDataset, /, *, batch_size: int, progress: bool
    ) -> np.ndarray:
        return self.model._compute(pixels_of(images))[1]


@pytest.fixture(scope="module")
def known() -> tuple[Linear, ChestXrayDataset]:
    options: dict[str, Any] = {"sources": ("a", "b"), "marker": "corner", "image_size_px": SIZE}
    train, test = (SyntheticChestXray(80, patients=80, seed=seed, **options) for seed in (1, 2))
    return Linear(train), test


def test_another_model_is_judged_as_the_same_network_is(
    known: tuple[Linear, ChestXrayDataset],
) -> None:
    model, test = known
    network = audit_shortcuts(model, test, heat=False, **HOW)
    for other in (Featured(model), Other(model)):
        found = audit_shortcuts(other, test, preprocess=PREPROCESS, **HOW)
        assert found.verdict == "fail"
        assert found.weights_sha256 == ""
        assert (found.classes, found.n_images) == (network.classes, 80)
        features = isinstance(other, Featured)
        same = [item for item in network.items if item.name != "features" or features]
        assert [item for item in found.items if item in same] == same
    unseen = found.item("features")
    assert (unseen.verdict, unseen.reason) == ("not_assessable", "The model gives no features.")
    assert not unseen.findings
    assert "heat" not in {item.name for item in found.items}
    assert "The model gives no features." in str(found)


def test_another_model_is_shown_pixels_and_no_names(
    known: tuple[Linear, ChestXrayDataset],
) -> None:
    model, test = known
    other = Other(model)
    audit_shortcuts(other, test, **HOW)
    whole, *changed = other.shown
    assert len(changed) == 5
    for images in other.shown:
        assert images.classes == test.classes
        assert {s.label for s in images.samples} == {test.classes[0]}
        assert not {s.path.name for s in images.samples} & {s.path.name for s in test.samples}
        assert {s.source for s in images.samples} == {"audit"}
        assert len({s.patient_id for s in images.samples}) == len(images)
        assert {images.image(i).size for i in range(len(images))} == {(224, 224)}
    expected = Preprocess()(test.image(3))[0]
    assert np.array_equal(np.asarray(whole.image(3)), expected)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # as the workers of a DataLoader
        assert np.array_equal(np.asarray(pool.submit(whole.image, 3).result()), expected)
    assert not np.array_equal(np.asarray(changed[0].image(3)), expected)


@pytest.mark.parametrize("key", [lambda s: s.path, lambda s: s.content_hash()])
def test_a_model_that_keeps_its_answers_is_not_asked_by_the_same_name(
    known: tuple[Linear, ChestXrayDataset], key: Callable[[Sample], Any]
) -> None:
    class Keeping(Other):
        def predict_proba(
            self, images: ChestXrayDataset, /, *, batch_size: int, progress: bool
        ) -> np.ndarray:
            names = [key(sample) for sample in images.samples]
            if not set(names) <= set(kept):
                found = super().predict_proba(images, batch_size=batch_size, progress=progress)
                kept.update(zip(names, found, strict=True))
            return np.stack([kept[name] for name in names])

    (model, test), kept = known, dict[Any, Any]()
    how = {"preprocess": PREPROCESS, **HOW}
    found, plain = (audit_shortcuts(kind(model), test, **how) for kind in (Keeping, Other))
    assert found == plain
    assert len(kept) == 6 * len(test)


@pytest.mark.parametrize("said", [None, ""])
def test_no_report_names_weights_that_a_model_does_not_know(
    known: tuple[Linear, ChestXrayDataset], said: str | None, tmp_path: Path
) -> None:
    model, test = known
    one, two = Other(model), Other(model)
    one.weights_sha256 = two.weights_sha256 = said
    audit = audit_shortcuts(one, test, preprocess=PREPROCESS, **HOW)
    evaluation = evaluate(two, test, n_resamples=2)
    assert (audit.weights_sha256, evaluation.weights_sha256, evaluation.model) == ("", "", {})
    extend_report(tmp_path, audit=audit)
    page = extend_report(tmp_path, evaluation=evaluation).read_text(encoding="utf-8")
    assert "shortcut" not in page, "one page of two models"


class Turned(Linear):
    """Says the opposite of its network, and keeps the sizes of what it is shown."""

    def predict_proba(self, images: Any, **options: Any) -> np.ndarray:
        self.sizes = {images.image(i).size for i in range(len(images))}
        return 1 - super().predict_proba(images, **options)


class Passing:
    """Says the opposite of a classifier; all else is that one's."""

    def __init__(self, model: Linear) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def predict_proba(self, images: Any, **options: Any) -> np.ndarray:
        return 1 - self.model.predict_proba(images, **options)


class Private(Other):
    def _compute(self, numbers: Any) -> Any:
        raise AssertionError("nobody but the model knows what this is")


@pytest.mark.parametrize("kind", [Turned, Passing, Private])
def test_a_model_is_judged_by_what_it_answers_not_by_a_network_in_it(
    known: tuple[Linear, ChestXrayDataset], kind: Callable[[Any], Any]
) -> None:
    model, test = known
    other = kind(model.trained_on if kind is Turned else model)
    preprocess = None if kind is Turned else PREPROCESS  # a Classifier has its own
    found = audit_shortcuts(other, test, preprocess=preprocess, **HOW)
    judged = evaluate(other, test, n_resamples=2).overall.per_class["covid19"]["auroc"]
    assert found.item("occlusion").finding("whole").estimate.value == judged.value
    assert (judged.value < 0.5) is (kind is not Private)


#: Of a network that was asked without ``inference_mode``, or in half precision.
GRAD = torch.full((80, 2), 0.5, requires_grad=True)
HALF = torch.full((80, 2), 0.5, dtype=torch.bfloat16)


class Odd(Other):
    def __init__(self, model: Linear, found: Any, features: Any = None) -> None:
        super().__init__(model)
        self.found = found
        if features is not None:
            self.predict_features = lambda images, **_: features

    def predict_proba(
        self, images: ChestXrayDataset, /, *, batch_size: int, progress: bool
    ) -> np.ndarray:
        return self.found


@pytest.mark.parametrize(
    ("found", "features", "reason"),
    [
        ([[2.0, -1.0]] * 80, None, "probabilities must be in"),
        ([[0.5, 0.5]] * 79, None, r"predict_proba must return a row per image .* got \(79, 2\)"),
        (GRAD, None, r"of a tensor .float\(\).numpy\(force=True\): .* requires grad"),
        (HALF, None, r"probabilities must be .* of a tensor .float\(\).* BFloat16"),
        ([[0.5, 0.5]] * 80, [1.0] * 80, r"predict_features returns must be a 2-d.* \(80,\)"),
        ([[0.5, 0.5]] * 80, [[1.0]] * 79, r"a row for each of 80 images, got shape \(79, 1\)"),
        ([[0.5, 0.5]] * 80, [[]] * 80, r"array of numbers that is not empty, got shape \(80, 0\)"),
        ([[0.5, 0.5]] * 80, [["a"]] * 80, "predict_features returns must be a 2-dimensional"),
        ([[0.5, 0.5]] * 80, [[np.nan]] * 80, r"predict_features returns must be finite, got nan"),
        pytest.param(
            *([[0.5, 0.5]] * 80, [[1e300]] * 80, r"in float32, must be finite, got inf"),
            marks=pytest.mark.filterwarnings("ignore:overflow"),
        ),
        ([[0.5, 0.5]] * 80, GRAD, "predict_features returns must be .* requires grad"),
    ],
)
def test_what_another_model_returns_is_checked(
    known: tuple[Linear, ChestXrayDataset], found: Any, features: Any, reason: str
) -> None:
    model, test = known
    with pytest.raises(ValueError, match=reason):
        audit_shortcuts(Odd(model, found, features), test, **HOW)


def test_a_classifier_has_its_own_preprocessing_and_a_path_is_no_model(
    known: tuple[Linear, ChestXrayDataset],
) -> None:
    model, test = known
    turned = Turned(model.trained_on)
    for one in (model, turned):
        with pytest.raises(ValueError, match="preprocess must be None: the classifier has its own"):
            audit_shortcuts(one, test, preprocess=PREPROCESS)
    audit_shortcuts(turned, test, **HOW)
    assert turned.sizes == {(SIZE, SIZE)}
    with pytest.raises(TypeError, match="with classes and predict_proba, got str"):
        audit_shortcuts("runs/first", test)  # type: ignore[arg-type]
