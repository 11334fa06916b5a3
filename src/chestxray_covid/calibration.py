"""Probabilities that mean what they say, and a threshold that was chosen: after training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chestxray_covid.checkpoint import (
    CONFIG_NAME,
    ModelConfig,
    load_attachment,
    load_checkpoint,
    save_checkpoint,
)
from chestxray_covid.classifier import Classifier
from chestxray_covid.datasets.base import ChestXrayDataset
from chestxray_covid.datasets.duplicates import patient_groups
from chestxray_covid.datasets.loading import decoder, pipeline
from chestxray_covid.datasets.report import printable
from chestxray_covid.engines import compute, softmax, stacked
from chestxray_covid.errors import CheckpointError, real_number
from chestxray_covid.files import expanded
from chestxray_covid.hub import resolve
from chestxray_covid.int8 import INT8_NAME, REPORT_NAME
from chestxray_covid.metrics import (
    check_labels,
    check_lengths,
    expected_calibration_error,
    threshold_at_sensitivity,
)
from chestxray_covid.notebook import ShownAsText
from chestxray_covid.progress import Bar
from chestxray_covid.subgroups import SMALL

#: Temperatures outside say that the logits are no logits; several that were folded in one after
#: the other may be beyond.
_TEMPERATURES = (0.05, 20.0)
_MAX_TEMPERATURE = 1e6
#: What eight bits move was measured with the probabilities of before: :func:`quantize` again.
_OF_INT8 = (INT8_NAME, REPORT_NAME)
_SIDES = ("covid19", "normal")


@dataclass(frozen=True, kw_only=True)
class CalibrationReport(ShownAsText):
    """What :func:`calibrate` chose, and what it did to the images that it was chosen on.

    Attributes:
        temperature: What logits were divided by, here. Above 1 the model was too sure of itself.
        threshold: Of :attr:`Prediction.score`, from which a case counts as positive.
        threshold_origin: In words, where the threshold comes from.
        n_images: Images that both were chosen on.
        n_patients: Their patients.
        ece_before: Expected calibration error of the model as it was, in [0, 1].
        ece_after: Of the calibrated one, on the same images, and so a little too good.
        caution: What a reader has to know of the threshold, in words, or nothing.
    """

    temperature: float
    threshold: float
    threshold_origin: str
    n_images: int
    n_patients: int
    ece_before: float
    ece_after: float
    caution: str

    def __str__(self) -> str:
        lines = [
            f"Temperature {self.temperature:.4g}, chosen on {self.n_images} images of "
            f"{self.n_patients} patients: expected calibration error {self.ece_before:.3f} before, "
            f"{self.ece_after:.3f} after, on the same images.",
            f"Threshold {self.threshold!r}: {printable(self.threshold_origin)}.",
        ]
        return "\n".join([*lines, *([self.caution] if self.caution else [])])


def calibrate(
    checkpoint: str | os.PathLike[str] | None,
    validation: ChestXrayDataset,
    *,
    output: str | os.PathLike[str],
    sensitivity: float | None = 0.9,
    device: str | None = None,
    progress: bool = False,
) -> CalibrationReport:
    """Write a checkpoint whose probabilities and threshold were chosen on validation images.

    Logits are divided by one temperature (:func:`fit_temperature`), which becomes part of the last
    layer: labels and the order by ``score`` stay, and every engine and export answers so. The
    threshold of ``Prediction.is_positive`` becomes one that reaches a sensitivity for COVID-19
    against normal and calls no more images positive than that takes, halfway to the next score; its
    origin is told in words. All images count, abstained ones, too.

    The gate and other attachments come along, but for those of ``int8``. Reports of the model
    before are not of the new one: judge it again, on others.

    Args:
        checkpoint: ``None`` for the bundled model, or whatever :func:`resolve` takes.
        validation: Radiographs of patients that the model was not trained on, for example
            ``split.val``, with every class of the model. The test side stays for judging.
        output: Folder of the new checkpoint, made if missing; another one than ``checkpoint``.
        sensitivity: In (0, 1]; ``None`` moves the threshold as the scores move, so that the same
            images stay positive and its origin stays true.
        device: Torch device such as ``"cpu"`` (if not given) or ``"cuda"``.
        progress: Whether to show a progress bar.

    Raises:
        CheckpointError: If the checkpoint is missing or damaged.
        ImageError: If an image cannot be decoded.
        TypeError: If ``validation`` is no data set, or ``sensitivity`` no number.
        ValueError: If ``output`` is the checkpoint itself, a file, or a folder with a checkpoint of
            another model, ``sensitivity`` is outside (0, 1], the model lacks one of ``"covid19"``
            and ``"normal"``, the images lack a class of the model, no temperature or threshold can
            be told from them, or the device is not there.
        OSError: If the folder cannot be written.
    """
    folder, target = resolve(checkpoint), expanded(output)
    config, tensors = load_checkpoint(folder)
    if sensitivity is not None:
        sensitivity = real_number("sensitivity", sensitivity)
    _check(config, validation, folder, target, sensitivity)
    check_replaced(target, config, tensors)
    kept = {*config.attachments} - {*_OF_INT8}
    attachments = {name: load_attachment(folder, config, name) or b"" for name in kept}
    truth = np.array([config.classes.index(s.label) for s in validation.samples])
    model = Classifier(config, tensors, device=device, precision="float32")
    features = _features(model, validation, progress)
    before = _probabilities(tensors, features)
    temperature = fit_temperature(truth, np.log(np.maximum(before, np.finfo(np.float32).tiny)))
    _check_temperature(temperature, int((before.argmax(1) != truth).sum()), len(truth))
    tensors = fold_temperature(tensors, temperature)
    after, caution = _probabilities(tensors, features), ""  # with the last layer as it is rounded
    if sensitivity is None:
        config = replace(config, threshold=_tempered(config.threshold, temperature))
    else:
        config, caution = _with_threshold(config, truth, after, sensitivity)
    about = {k: v for k, v in config.provenance.items() if k != "headline"}  # of the old one
    about["temperature"] = temperature * (temperature_of(config) or 1.0)
    config = save_checkpoint(target, replace(config, provenance=about), tensors, attachments)
    return CalibrationReport(
        temperature=temperature,
        threshold=config.threshold,
        threshold_origin=config.threshold_origin,
        n_images=len(truth),
        n_patients=len(set(patient_groups(validation, find_copies=False))),
        ece_before=float(expected_calibration_error(truth, before)),
        ece_after=float(expected_calibration_error(truth, after)),
        caution=caution,
    )


def _check(
    config: ModelConfig,
    validation: ChestXrayDataset,
    folder: Path,
    output: Path,
    sensitivity: float | None,
) -> None:
    if not isinstance(validation, ChestXrayDataset):
        raise TypeError(
            f"validation must be a ChestXrayDataset, got {type(validation).__name__}. "
            "Of a Split, pass split.val."
        )
    if output.resolve() == folder.resolve() or (output.exists() and not output.is_dir()):
        raise ValueError(f"output must be a folder other than the checkpoint's, got {output}")
    if sensitivity is not None and not 0 < sensitivity <= 1:
        raise ValueError(f"sensitivity must be a fraction in (0, 1] or None, got {sensitivity}")
    if sensitivity is not None and not {*_SIDES} <= {*config.classes}:
        raise ValueError(
            f"The threshold is one of covid19 against normal, and the model tells "
            f"{', '.join(config.classes)} apart: pass sensitivity=None"
        )
    found = {s.label for s in validation.samples}
    if found != {*config.classes}:
        raise ValueError(
            f"validation must have images of every class of the model, {list(config.classes)}, "
            f"and of no other, got {sorted(found)}"
        )


def check_replaced(
    output: Path, original: ModelConfig, tensors: Mapping[str, NDArray[Any]]
) -> None:
    """Raise if a checkpoint made of a model would replace one of another network.

    What was made of this one before, whose last layer a temperature may have changed, is replaced.

    Raises:
        ValueError: If the folder holds another model, or what is not known to be this one.
    """
    if not (output / CONFIG_NAME).exists():
        return
    try:
        config, there = load_checkpoint(output)
    except CheckpointError as error:  # whose advice is for who wants to load it
        raise ValueError(
            f"{output} already holds a damaged checkpoint, or a {CONFIG_NAME} of something else, "
            "which would be replaced: use another folder, or remove it first."
        ) from error
    scale = (temperature_of(original) or 1.0) / (temperature_of(config) or 1.0)
    # Runs that trained the head alone share all below it. A hundredth: it may be in half precision.
    is_same = config.classes == original.classes and all(
        np.array_equal(there[name], mine)
        if name.startswith("features.")
        else np.allclose(there[name], mine.astype(np.float64) * scale, rtol=0.01, atol=1e-5)
        for name, mine in tensors.items()
    )
    if not is_same:
        raise ValueError(
            f"{output} already holds a checkpoint of another model, which would be replaced: use "
            "another folder, or remove it first."
        )


def _features(model: Classifier, images: ChestXrayDataset, progress: bool) -> NDArray[np.float64]:
    """Return the ``(N, 1024)`` features, which a temperature leaves as they are."""
    rows = pipeline(
        range(len(images)),
        decoder(images, model.config.preprocess),
        lambda batch: compute(model.engine, stacked(batch))[1],
        batch_size=16,
        calls=model.engine.calls,
    )
    found = Bar(rows, "calibrate", len(images), unit="img", disable=not progress)
    return np.stack([*found]).astype(np.float64)


def _probabilities(
    tensors: Mapping[str, NDArray[Any]], features: NDArray[np.float64]
) -> NDArray[np.float64]:
    weight, bias = tensors["classifier.weight"], tensors["classifier.bias"]
    return softmax(features @ weight.T.astype(np.float64) + bias)


def _check_temperature(temperature: float, mistakes: int, count: int) -> None:
    low, high = _TEMPERATURES
    if not mistakes:
        raise ValueError(
            f"The model is right on all of these {count} images. How sure it should be cannot be "
            "told without mistakes: give more images, of patients that it was not trained on."
        )
    why = f"The model is wrong on {mistakes} of these {count} images, and "
    if temperature < 1.01 * low:
        raise ValueError(f"{why}still too unsure at a temperature of {low}: look at its weights.")
    if temperature > high / 1.01:
        raise ValueError(
            f"{why}too sure of them even at a temperature of {high}: it knows next to nothing of "
            "their labels. Train it, or look whether the labels are those of the images."
        )


def _tempered(threshold: float, temperature: float) -> float:
    """Return the threshold that a temperature makes of one: its logit is divided, as a score's is.

    The score p(a) / (p(a) + p(b)) is the logistic function of the difference of two logits.
    """
    from scipy.special import expit, logit

    return float(expit(logit(threshold) / temperature))


def _with_threshold(
    config: ModelConfig, truth: NDArray[np.int64], found: NDArray[np.float64], sensitivity: float
) -> tuple[ModelConfig, str]:
    """Return the config with a threshold, and a caution."""
    covid, normal = (config.classes.index(name) for name in _SIDES)
    judged = (truth == covid) | (truth == normal)
    sums = np.maximum(found[judged, covid] + found[judged, normal], np.finfo(np.float64).tiny)
    score, positive = found[judged, covid] / sums, truth[judged] == covid
    reached = threshold_at_sensitivity(positive.astype(int), score, sensitivity=sensitivity)
    below = float(score[score < reached].max(initial=0.0))
    # Between two scores: on the score itself, another runtime's rounding would miss it.
    threshold = middle if (middle := (below + reached) / 2) > below else reached
    if not 0 < threshold < 1:
        raise ValueError(
            f"The scores are saturated, a threshold would be {threshold}: pass sensitivity=None"
        )
    counts = int(positive.sum()), int((~positive).sum())
    origin = (
        f"{100 * sensitivity:g}% sensitivity for covid19 against normal on {counts[0]} and "
        f"{counts[1]} radiographs for validation"
    )
    caution = "Caution: so few images say next to nothing." if min(counts) < SMALL else ""
    return replace(config, threshold=threshold, threshold_origin=origin), caution


def fit_temperature(
    y_true: ArrayLike, logits: ArrayLike, *, sample_weight: ArrayLike | None = None
) -> float:
    """Return the temperature T for which softmax(logits / T) has the lowest cross-entropy.

    Looked for from 0.05 to 20: a result at an end is the best of these and no optimum, and nor is
    any for logits that are right on every image, which have none.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017. Labels stay as they are,
    and so does the order of images by p(a) / (p(a) + p(b)) of any two classes. Above 1 the model
    was too sure of itself, below 1 not sure enough.

    Args:
        y_true: ``(N,)`` classes 0 to K - 1 of patients that the model was not trained on.
        logits: ``(N, K)``, finite.
        sample_weight: ``(N,)`` at least 0, for example to count every class alike.

    Raises:
        ValueError: If shapes, labels or weights are not as said, or N is 0.

    >>> logits = np.array([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
    >>> round(float(np.log(3) * fit_temperature([0, 0, 0, 1], logits)), 3)  # 3 / T = log 3
    3.0
    """
    from scipy.optimize import minimize_scalar

    table = np.asarray(logits, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] < 2 or not len(table) or not np.isfinite(table).all():
        raise ValueError(f"logits must be finite, (N, K) with K of at least 2, got {table.shape}")
    truth = check_labels(y_true, "y_true", table.shape[1])
    weights = np.ones(len(table)) if sample_weight is None else np.asarray(sample_weight, float)
    usable = weights.ndim == 1 and (np.isfinite(weights) & (weights >= 0)).all()
    if not usable or not weights.sum() > 0:
        raise ValueError("sample_weight must be (N,), finite, at least 0, and not all 0")
    check_lengths(y_true=truth, logits=table, sample_weight=weights)

    def cross_entropy(log_temperature: float) -> float:
        scaled = table / np.exp(log_temperature)
        shifted = scaled - scaled.max(1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        return -float(np.average(logs[np.arange(len(logs)), truth], weights=weights))

    bounds = tuple(np.log(_TEMPERATURES))
    found = minimize_scalar(cross_entropy, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def fold_temperature(
    tensors: Mapping[str, NDArray[Any]], temperature: float
) -> dict[str, NDArray[Any]]:
    """Return a checkpoint's weights whose logits are divided by the temperature.

    So every engine, and every other library that opens the checkpoint, sees the same probabilities.

    Args:
        tensors: As :func:`checkpoint.densenet121_shapes` names them.
        temperature: From :func:`fit_temperature`.

    Raises:
        ValueError: If the temperature is not positive and finite.
    """
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    head = {
        name: (tensors[name] / temperature).astype(tensors[name].dtype)
        for name in ("classifier.weight", "classifier.bias")
    }
    return {**tensors, **head}


def temperature_of(config: ModelConfig) -> float | None:
    """Return what the logits were divided by; ``None`` if the provenance holds no such number."""
    found = config.provenance.get("temperature")
    if isinstance(found, int | float) and not isinstance(found, bool):
        return found if 0 < found < _MAX_TEMPERATURE else None
    return None
