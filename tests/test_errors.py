from __future__ import annotations

import errno
import inspect
import multiprocessing
import pickle
import re
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from chestxray_covid import (
    Classifier,
    SyntheticChestXray,
    audit_shortcuts,
    confounding,
    cross_validate,
    errors,
    evaluate,
    find_duplicates,
    grad_cam,
    leave_one_source_out,
    lung_heat,
    occlusion_sensitivity,
    patient_groups,
    plot_samples,
    predict_files,
    quantize,
    split_by_patient,
)
from chestxray_covid.errors import (
    ChestXrayError,
    MissingExtraError,
    ResourceError,
    TrainingInterrupted,
)

FAMILY = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, ChestXrayError)
]
PLAIN = [kind for kind in FAMILY if kind is not TrainingInterrupted]
BUILTINS = (ValueError, OSError, FileNotFoundError, ImportError, RuntimeError)


def pickled(error: Exception) -> Any:
    """Return an error as another process gets it."""
    return pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes


def drawn_tree() -> dict[str, tuple[str | None, set[str]]]:
    """Return name → (parent, builtins) as the module's docstring draws them."""
    above: dict[int, str] = {}
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        found = re.fullmatch(r"    ([│ ├└─]*)(\w+)(?: \((.+)\))?", line)
        if found:
            depth, name = len(found[1]) // 4, found[2]
            above[depth] = name
            drawn[name] = (above.get(depth - 1), set((found[3] or "").split(", ")) - {""})
    return drawn


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    drawn = drawn_tree()
    assert set(drawn) == {kind.__name__ for kind in FAMILY}
    for kind in FAMILY:
        parent, builtins = drawn[kind.__name__]
        if parent is None:
            assert kind is ChestXrayError
            continue
        assert parent == next(b.__name__ for b in kind.__bases__ if b in FAMILY)
        own = {b.__name__ for b in kind.__bases__ if b not in FAMILY}
        assert own == builtins


@pytest.mark.parametrize("kind", FAMILY)
def test_every_error_is_caught_by_the_base_and_has_a_docstring(kind: type[Exception]) -> None:
    assert issubclass(kind, ChestXrayError)
    assert kind.__doc__
    if kind not in (ChestXrayError, TrainingInterrupted):
        assert issubclass(kind, BUILTINS)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_message_arrives_as_it_was_written_and_survives_pickling(kind: type[Exception]) -> None:
    error = pickled(kind("3 files are damaged: a.png, …"))
    assert type(error) is kind
    assert str(error) == "3 files are damaged: a.png, …"


def test_want_of_resources_is_told_from_other_errors() -> None:
    others = (OSError(errno.EIO, "input"), RuntimeError("cannot schedule"), ValueError("x"))
    for other in others:
        errors.check_resources(other, "a.png")
    words = "libopenvino.so: failed to map segment from shared object"
    lacking = (MemoryError(), OSError(errno.ENFILE, "full"), RuntimeError("can't start new thread"))
    for error in (ImportError(words), RuntimeError("Resource temporarily unavailable")):
        with pytest.raises(ResourceError, match=r"An engine: the machine, .*again"):
            errors.check_resources(error, "An engine", loading=True)
        errors.check_resources(error, "a.dcm")  # a file may say so
    for error in lacking:
        with pytest.raises(ResourceError, match=r"a\.png: the machine, .*again") as found:
            errors.check_resources(error, "a.png")
        with pytest.raises(ResourceError) as same:  # on its way through what reads an image
            errors.check_resources(found.value, "b.png")
        assert same.value is found.value


def test_an_interruption_names_signal_and_run_and_how_to_go_on(tmp_path: Path) -> None:
    error = pickled(TrainingInterrupted(signal.SIGTERM, tmp_path))
    assert (error.signal_number, error.run) == (signal.SIGTERM, tmp_path)
    with pytest.raises(TrainingInterrupted, match=r"signal 15; the state .*resume=True .*--resume"):
        raise error
    assert str(tmp_path) in str(error)


def interrupt(run: Path) -> None:
    raise TrainingInterrupted(signal.SIGINT, run)


def test_an_interruption_crosses_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, mp_context=context) as pool,
        pytest.raises(
            TrainingInterrupted, match=re.escape(f"signal 2; the state is saved in {tmp_path}")
        ),
    ):
        pool.submit(interrupt, tmp_path).result()


def test_an_extra_that_is_installed_is_returned() -> None:
    assert errors.require_extra("xml.dom", "dicom").__name__ == "xml.dom"


@pytest.mark.parametrize("module", ["no_such_package_here", "json.no_such_module"])
def test_an_extra_that_is_missing_names_the_pip_command(module: str) -> None:
    with pytest.raises(
        MissingExtraError, match=r'pip install "chestxray-covid\[dicom\]"'
    ) as caught:
        errors.require_extra(module, "dicom")
    assert module in str(caught.value)
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_an_extra_that_is_broken_tells_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_extra.py").write_text("from json import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match="cannot import name 'nothing_of_that_name'"):
        errors.require_extra("broken_extra", "kaggle")


def test_a_mistake_inside_an_extra_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faulty_extra.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        errors.require_extra("faulty_extra", "kaggle")


def test_a_folder_of_the_name_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "exported_onnx").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        MissingExtraError, match=r"exported_onnx.* is a folder without it.*\[onnx\]"
    ):
        errors.require_extra("exported_onnx", "onnx")


def test_what_is_no_data_set_is_refused_in_words(tmp_path: Path) -> None:
    classifier, phantoms = Classifier.from_pretrained(), SyntheticChestXray(12, image_size_px=32)
    split = split_by_patient(phantoms, val=0, test=0.5)
    (tmp_path / "normal").mkdir()
    (tmp_path / "normal" / "1.png").touch()
    folder = ImageFolder(str(tmp_path))  # whose samples are no such ones
    asked: list[Callable[[Any], Any]] = [
        confounding,
        cross_validate,
        find_duplicates,
        patient_groups,
        plot_samples,
        split_by_patient,
        lambda given: audit_shortcuts(classifier, given),
        lambda given: evaluate(classifier, given),
        lambda given: leave_one_source_out(given, classifier),
        lambda given: lung_heat(classifier, given),
        lambda given: quantize("runs/first", [], evaluation=given, output="int8"),
    ]
    for ask in asked:
        kinds = (("data/phantoms", "str"), (split, "Split"), ([], "list"), (folder, "ImageFolder"))
        for wrong, name in kinds:
            said = rf"must be a ChestXrayDataset, got {name}\. Open a folder .*pass a side"
            with pytest.raises(TypeError, match=said):
                ask(wrong)
    with pytest.raises(TypeError, match="train must be a ChestXrayDataset, got str"):
        audit_shortcuts(classifier, phantoms, "data/phantoms")  # type: ignore[arg-type]


def predict_to_table(classifier: Any, _: Any) -> Any:
    return predict_files("images", "predictions.csv", classifier=classifier)


@pytest.mark.parametrize(
    "ask",
    [evaluate, audit_shortcuts, grad_cam, occlusion_sensitivity, lung_heat, predict_to_table],
)
def test_what_is_no_classifier_is_refused_in_words(ask: Any) -> None:
    phantoms = SyntheticChestXray(6, image_size_px=32)
    for wrong, name in (("runs/first", "str"), (phantoms, "SyntheticChestXray")):
        said = rf"and predict_proba, got {name}\. Load a checkpoint with Classifier"
        with pytest.raises(TypeError, match=said):
            ask(wrong, phantoms)


class Judged:
    """Can be asked for probabilities, and for nothing else, as any model that somebody has."""

    classes = ("normal", "covid19")

    def predict_proba(self, images: Any, /, **_: Any) -> Any:
        return np.full((len(images), 2), 0.5)


@pytest.mark.parametrize("ask", [grad_cam, occlusion_sensitivity, lung_heat, predict_to_table])
def test_a_model_that_shows_no_features_is_refused_where_they_are_asked_for(ask: Any) -> None:
    phantoms = SyntheticChestXray(6, image_size_px=32)
    for judge in (evaluate, audit_shortcuts):
        assert judge(Judged(), phantoms, n_resamples=10).n_images == 6
    said = r"must be a Classifier, whose pixels and .* got Judged\..* evaluate\(…\) and audit_"
    with pytest.raises(TypeError, match=said):
        ask(Judged(), phantoms)


class Uncalled(Judged):
    predict_proba = np.zeros((6, 2))  # type: ignore[assignment]


@pytest.mark.parametrize("judge", [evaluate, audit_shortcuts])
@pytest.mark.parametrize(
    ("given", "came"),
    [(Judged, "the class Judged"), (Classifier, "the class Classifier"), (Uncalled(), "Uncalled")],
)
def test_the_class_of_a_model_is_none(judge: Any, given: Any, came: str) -> None:
    with pytest.raises(TypeError, match=f"with classes and predict_proba, got {came}. Load"):
        judge(given, SyntheticChestXray(6, image_size_px=32))


@pytest.mark.parametrize("rows", [None, object()])
def test_sources_left_out_are_a_list(rows: Any) -> None:
    with pytest.raises(TypeError, match="expected a list of LeftOutSource, as leave_one_source_"):
        audit_shortcuts(Judged(), SyntheticChestXray(6, image_size_px=32), left_out=rows)
