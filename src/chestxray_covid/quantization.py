"""Quantise a model to eight bits, judge what that moves, and refuse it if it moves the answer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chestxray_covid import metrics as m
from chestxray_covid.calibration import check_replaced
from chestxray_covid.checkpoint import (
    WEIGHTS_NAME,
    load_attachment,
    load_checkpoint,
    save_checkpoint,
)
from chestxray_covid.datasets.base import ChestXrayDataset
from chestxray_covid.datasets.duplicates import patient_groups
from chestxray_covid.engine_openvino import import_openvino, largest_values
from chestxray_covid.engines import compute, open_engine, softmax, stacked
from chestxray_covid.errors import ExportError, check_dataset
from chestxray_covid.files import expanded
from chestxray_covid.graph import fold
from chestxray_covid.hub import resolve
from chestxray_covid.inputs import expand, read
from chestxray_covid.int8 import INT8_NAME, REPORT_NAME, Int8, rounded_results
from chestxray_covid.intervals import Estimate, bootstrap_by_group
from chestxray_covid.judged_images import default_positive
from chestxray_covid.notebook import ShownAsText

#: Largest change of an AUROC with which a quantised model is accepted.
MAX_AUROC_CHANGE = 0.005
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class AurocChange:
    """An AUROC before and after.

    Attributes:
        question: ``"covid19 against all others"``, or ``"covid19 against normal"``.
        before: In float32.
        after: In int8.
        change: After less before, with the interval over resampled patients, both on the same.
    """

    question: str
    before: float
    after: float
    change: Estimate


@dataclass(frozen=True, kw_only=True)
class QuantizationReport(ShownAsText):
    """What moved when a model was computed in eight bits.

    Attributes:
        calibration_images: Images that the largest values come from.
        evaluation_images: Labelled images on which both models were compared.
        mean_difference: Of the largest difference of a probability per image, the mean.
        p99_difference: Its 99th percentile.
        max_difference: Its maximum.
        flipped_labels: Images whose most probable class is another now.
        auroc: AUROC before and after, by question.
    """

    calibration_images: int
    evaluation_images: int
    mean_difference: float
    p99_difference: float
    max_difference: float
    flipped_labels: int
    auroc: tuple[AurocChange, ...]

    @property
    def is_accepted(self) -> bool:
        """Whether no AUROC moved by more than 0.005, up or down."""
        # Written so that an AUROC that is not defined is none that was kept.
        return all(abs(a.change.value) <= MAX_AUROC_CHANGE for a in self.auroc)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data."""
        data = asdict(self)
        for row, found in zip(data["auroc"], self.auroc, strict=True):
            row["change"] = found.change.to_dict()
        return {**data, "auroc": list(data["auroc"])}

    def __str__(self) -> str:
        lines = [
            f"{self.evaluation_images} images, calibrated on {self.calibration_images}: a "
            f"probability moves by {self.mean_difference:.4f} in the mean, "
            f"{self.p99_difference:.4f} at the 99th percentile, {self.max_difference:.4f} at most; "
            f"{self.flipped_labels} labels are others.",
            *(
                f"AUROC, {a.question}: {a.before:.4f} before, {a.after:.4f} after; "
                f"change {a.change.value:+.4f} ({_interval(a.change)})"
                for a in self.auroc
            ),
        ]
        return "\n".join(lines)


def quantize(
    checkpoint: str | os.PathLike[str] | None,
    calibration: Any,
    *,
    evaluation: ChestXrayDataset,
    output: str | os.PathLike[str],
    positive: str | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> QuantizationReport:
    """Write a checkpoint that can be computed in eight bits, and return what that moves.

    The largest value of every channel that a convolution takes is looked for on the calibration
    images: each is rounded to 256 levels up to there. These values become an attachment of the
    checkpoint, ``int8.safetensors``, with this report, ``int8.json``; weights and other
    attachments are those of the original. The first and the last layer stay in floating point.
    ``Classifier.from_pretrained(output, precision="int8")`` computes with it.

    Nothing is written if an AUROC on the labelled images moves by more than 0.005.

    Args:
        checkpoint: ``None`` for the bundled model, or whatever :func:`resolve` takes.
        calibration: Radiographs like those of later use, some 200 of all sources: a folder, a data
            set, or a list of images. Labels are not needed.
        evaluation: Labelled radiographs, other than those; a patient of two collections is one, see
            :func:`~chestxray_covid.patient_groups`.
        output: Folder of the new checkpoint, made if missing.
        positive: The class in question; ``"covid19"`` or the last class if not given.
        n_resamples: Resamples of the bootstrap over patients.
        seed: Of the bootstrap.

    Raises:
        ExportError: If an AUROC moves too far, with the report's text.
        CheckpointError: If the checkpoint is missing or damaged, or a layer's largest value is
            below 1e-6 or above 1e6.
        ImageError: If an image cannot be decoded.
        MissingExtraError: If OpenVINO is not installed.
        TypeError: If ``evaluation`` is no data set.
        ValueError: If there are no calibration images, a label is unknown to the model, the
            labelled images have one class only, or ``output`` holds a checkpoint of another model.
        OSError: If the folder cannot be written.
    """
    check_dataset(evaluation, "evaluation")
    import_openvino()
    folder = resolve(checkpoint)
    config, tensors = load_checkpoint(folder)
    check_replaced(expanded(output), config, tensors)
    chosen = positive or default_positive(config.classes)
    _check_labels(evaluation, config.classes, chosen)
    others = {*config.attachments} - {INT8_NAME, REPORT_NAME}  # these are made anew
    attachments = {name: load_attachment(folder, config, name) or b"" for name in others}
    weights = load_attachment(folder, config, WEIGHTS_NAME)  # as they are: results name their hash
    pixels = [read(image, config.preprocess)[0] for image in expand(calibration)]
    if not pixels:
        raise ValueError(
            f"calibration has no images; some 200 radiographs are needed, got {calibration}"
        )
    network = fold(tensors, config.preprocess)
    largest = largest_values(network, list(rounded_results(network)), np.stack(pixels))
    int8 = Int8(largest=largest)
    before, after = _probabilities(config, tensors, int8, evaluation)
    report = compare(
        [sample.label for sample in evaluation.samples],
        before,
        after,
        classes=config.classes,
        patients=patient_groups(evaluation, find_copies=False),
        positive=chosen,
        calibration_images=len(pixels),
        n_resamples=n_resamples,
        seed=seed,
    )
    if not report.is_accepted:
        raise ExportError(
            f"In int8 an AUROC moves by more than {MAX_AUROC_CHANGE}. {report}\nNothing was "
            "written. Calibrate with more images, of every source that the model will meet."
        )
    attachments[INT8_NAME] = int8.to_bytes()
    attachments[REPORT_NAME] = json.dumps(report.to_dict(), indent=1, allow_nan=False).encode()
    save_checkpoint(expanded(output), config, tensors, attachments, weights)
    return report


def compare(
    y_true: Sequence[str],
    before: ArrayLike,
    after: ArrayLike,
    *,
    classes: Sequence[str],
    patients: Sequence[Any],
    positive: str,
    calibration_images: int,
    n_resamples: int = 1000,
    seed: int = 0,
) -> QuantizationReport:
    """Return what moved between two sets of probabilities.

    Args:
        y_true: ``(N,)`` labels.
        before, after: ``(N, K)`` in [0, 1], rows summing to 1.
        classes: K labels, in the order of the columns.
        patients: ``(N,)``, anything hashable.
        positive: The class in question.
        calibration_images, n_resamples, seed: As in :func:`quantize`.

    Raises:
        ValueError: If shapes or probabilities are not as said.
    """
    one, other = m.check_probabilities(before), m.check_probabilities(after)
    moved = np.abs(one - other).max(1)
    labels = np.array(y_true)
    k = list(classes).index(positive)
    everyone = np.ones(len(labels), bool)
    questions = {f"{positive} against all others": (one[:, k], other[:, k], everyone)}
    if len(classes) > 2 and "normal" in set(y_true) and positive != "normal":
        rest = list(classes).index("normal")
        scores = [p[:, k] / np.maximum(p[:, k] + p[:, rest], 1e-300) for p in (one, other)]
        among = (labels == positive) | (labels == "normal")
        questions[f"{positive} against normal"] = (*scores, among)
    changes = []
    for question, (first, second, among) in questions.items():
        truth, groups = (
            labels[among] == positive,
            [p for p, a in zip(patients, among, strict=True) if a],
        )
        arrays = (truth, first[among], second[among])
        change = bootstrap_by_group(
            _auroc_change, groups, *arrays, n_resamples=n_resamples, seed=seed
        )
        values = [float(m.auroc(truth, score)) for score in arrays[1:]]
        changes.append(
            AurocChange(question=question, before=values[0], after=values[1], change=change)
        )
    return QuantizationReport(
        calibration_images=calibration_images,
        evaluation_images=len(labels),
        mean_difference=float(moved.mean()),
        p99_difference=float(np.quantile(moved, 0.99)),
        max_difference=float(moved.max()),
        flipped_labels=int((one.argmax(1) != other.argmax(1)).sum()),
        auroc=tuple(changes),
    )


def _interval(change: Estimate) -> str:
    nothing = math.isnan(change.low)
    return "no interval" if nothing else f"{change.low:+.4f} to {change.high:+.4f}"


def _auroc_change(
    y_true: NDArray[Any], before: NDArray[Any], after: NDArray[Any], *, sample_weight: m.Weights
) -> Any:
    one, other = (m.auroc(y_true, s, sample_weight=sample_weight) for s in (before, after))
    return other - one


def _check_labels(evaluation: ChestXrayDataset, classes: Sequence[str], positive: str) -> None:
    found = {sample.label for sample in evaluation.samples}
    if positive not in classes or not found <= {*classes}:
        raise ValueError(
            f"positive and all labels must be among the model's classes {list(classes)}, got "
            f"{positive!r} and {sorted(found)}"
        )
    if positive not in found or len(found) < 2:
        raise ValueError(
            f"evaluation must have images of {positive} and of another class, got {sorted(found)}"
        )


def _probabilities(
    config: Any, tensors: Mapping[str, NDArray[Any]], int8: Int8, evaluation: ChestXrayDataset
) -> list[NDArray[np.float64]]:
    """Return ``(N, K)`` probabilities in float32 and in int8; images are decoded once."""
    engines = [
        open_engine(config, tensors, engine="openvino", precision=precision, int8=int8)
        for precision in ("float32", "int8")
    ]
    items, parts = list(expand(evaluation)), []
    for start in range(0, len(items), _BATCH):
        pixels = stacked(
            [read(item, config.preprocess)[0] for item in items[start : start + _BATCH]]
        )
        parts.append([softmax(compute(engine, pixels)[0]) for engine in engines])
    return [np.concatenate(found) for found in zip(*parts, strict=True)]
