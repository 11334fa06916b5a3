"""Does a classifier hold in a source that it has not seen?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chestxray_covid import metrics as m
from chestxray_covid.audit_data import Question
from chestxray_covid.classifier import Classifier
from chestxray_covid.datasets.base import ChestXrayDataset
from chestxray_covid.datasets.duplicates import patient_groups
from chestxray_covid.delong import DELONG_BY_PATIENT, auroc_by_group
from chestxray_covid.errors import TrainingError, check_classifier, check_dataset, real_number
from chestxray_covid.evaluation import ProbabilisticClassifier, check_columns
from chestxray_covid.intervals import (
    Estimate,
    bootstrap_by_group,
    check_resampling,
    check_seed,
)
from chestxray_covid.splits import divide
from chestxray_covid.subgroups import SMALL
from chestxray_covid.training_order import check_options, told_by_sources

if TYPE_CHECKING:  # they import torch
    import torchvision

    from chestxray_covid.training_config import TrainingConfig

#: Patients of a class below which nothing is judged: their intervals rest on too little.
FEWEST_PATIENTS = 5
TOO_FEW = f"Fewer than {SMALL} images or {FEWEST_PATIENTS} patients of a class: shown, not judged."
#: Of a classifier that came ready: it may have been trained on the source.
NOT_RETRAINED = "Not trained again without the source: shown, not judged."
#: Share of the training patients that choose the epoch, where options say how to train.
_CHOOSES = 0.15
#: Returns a classifier that was trained on these samples and no others.
Fit = Callable[[ChestXrayDataset], ProbabilisticClassifier]


@dataclass(frozen=True, kw_only=True)
class LeftOutSource:
    """How a classifier does in a source that was left out of its training.

    Attributes:
        source: Which one.
        positive: The class in question.
        negative: What it was told from: a class, or ``"rest"``.
        n_images: Its images that were asked about.
        internal: AUROC on held-out patients of the other sources.
        external: AUROC in the source; ``nan`` if it has one class only.
        change: External less internal AUROC, with the interval of the difference.
        note: Why a number is missing or not judged, or nothing.
    """

    source: str
    positive: str
    negative: str
    n_images: int
    internal: Estimate
    external: Estimate
    change: Estimate
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data; ``nan`` becomes ``None``."""
        numbers = {n: getattr(self, n).to_dict() for n in ("internal", "external", "change")}
        told = {n: getattr(self, n) for n in ("source", "positive", "negative", "n_images")}
        return {**told, **numbers, "note": self.note}


def leave_one_source_out(
    dataset: ChestXrayDataset,
    fit: Fit | TrainingConfig | ProbabilisticClassifier,
    *,
    positive: str | None = None,
    negative: str | None = None,
    test: float = 0.2,
    model: Callable[[], torchvision.models.DenseNet] | None = None,
    batch_size: int = 32,
    n_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    progress: bool = False,
) -> tuple[LeftOutSource, ...]:
    """Return, for each source in turn, how a classifier does there that did not train on it.

    Of the other sources, ``test`` of the patients are held out of the training, too: they give the
    internal AUROC that the external one is compared with. For training, copies of an image count as
    one patient (:func:`~chestxray_covid.patient_groups`), also where collections share them.

    Args:
        dataset: Two or more sources.
        fit: A function that trains on a data set and returns the classifier; or options, with
            which ``model`` is trained; or a classifier, which is not
            trained again but judged on the source and on all others; an audit shows its numbers
            and does not judge them.
        positive: The class in question, by default ``"covid19"`` or the last.
        negative: What it is told from, by default ``"normal"``, or ``"rest"``.
        test: Share of the other sources' patients that judge, in (0, 0.5].
        model: For options: returns a fresh network; by default DenseNet-121 from ImageNet weights.
        batch_size: Images computed at once.
        n_resamples, seed, confidence: Of the intervals, see :func:`bootstrap_by_group`; the seed
            is also that of the split.
        progress: Show progress bars.

    Raises:
        ValueError: If there is one source only, an option is impossible, ``model`` returns the
            same network twice, or what a classifier returns are no probabilities of its classes.
        TypeError: If ``dataset`` is none, ``fit`` is none of these, or returns no classifier, or
            ``model`` is a network instead of a function that returns one; or if ``test`` or
            ``confidence`` is no number.
        TrainingError: If a network cannot be trained.
        ImageError: If a file cannot be decoded.
    """
    check_dataset(dataset)
    test = real_number("test", test)
    if not 0 < test <= 0.5:
        raise ValueError(f"test must be a share in (0, 0.5], got {test}")
    if len(dataset.sources) < 2:
        raise ValueError(f"Leaving a source out needs two or more, got {list(dataset.sources)}")
    how = check_resampling(n_resamples=n_resamples, seed=seed, confidence=confidence)
    # A class is a function that returns its instances, whatever these can do.
    is_ready = hasattr(fit, "predict_proba") and not isinstance(fit, type)
    ready = cast(ProbabilisticClassifier, fit) if is_ready else None
    if ready is not None:
        check_classifier(ready)
    else:
        check_seed(seed)
    if ready is None and not callable(fit):
        from chestxray_covid.models import check_maker

        check_options(cast(Any, fit), ())
        check_maker(model)
    names = (dataset if ready is None else ready).classes
    question = Question.of(names, dataset, positive, negative)
    # A copy elsewhere of an image that is trained on would be judged from memory.
    groups = np.array(patient_groups(dataset, find_copies=ready is None, progress=progress))
    sources = np.array([sample.source for sample in dataset.samples])
    held = {sample.label for sample in dataset.samples}
    rows = []
    for source in dataset.sources:
        away = np.flatnonzero(sources == source)
        # A patient who is also in the source that is left out belongs to neither side.
        near = np.flatnonzero((sources != source) & ~np.isin(groups, groups[away]))
        rest, chooses, judged = near, near[:0], near
        if ready is None:
            rest, judged = divide(dataset, near, groups, test, seed)
        if ready is None and not callable(fit):
            rest, chooses = divide(dataset, rest, groups, _CHOOSES, seed)
        inside, outside = (question.asked(dataset.subset(part)) for part in (judged, away))
        lacking = held - {dataset.samples[i].label for i in rest}
        if lacking and ready is None:
            note = f"Without {source}, no image of {sorted(lacking)} is left to train on."
            rows.append(_missing(source, question, len(outside), confidence, note))
            continue
        train, val = dataset.subset(rest), dataset.subset(chooses)
        if ready is None and not callable(fit) and (why := _uncompared(train, cast(Any, fit))):
            note = f"Without {source}, {why}"
            rows.append(_missing(source, question, len(outside), confidence, note))
            continue
        classifier = _fitted(cast(Any, fit), train, val, model) if ready is None else ready
        both = _joined(inside, outside)
        # In its own order, and maybe with classes that the data lack.
        own = Question.of(classifier.classes, dataset, question.positive, question.negative)
        found = classifier.predict_proba(both, batch_size=batch_size, progress=progress)
        p = checked_probabilities(found, len(both), own.classes)
        row = _row(source, own, both, own.score(p), len(inside), how)
        rows.append(row if ready is None else replace(row, note=NOT_RETRAINED))
    return tuple(rows)


def _uncompared(train: ChestXrayDataset, config: TrainingConfig) -> str:
    """Return why training within sources would leave classes that none of them compares, or ""."""
    try:
        told_by_sources(train, config)
    except TrainingError as error:
        return str(error)
    return ""


def checked_probabilities(
    found: ArrayLike, images: int, classes: tuple[str, ...]
) -> NDArray[np.float64]:
    """Return the probabilities of a classifier of anyone's: of logits, any score would be wrong.

    Raises:
        ValueError: If they are none, or not ``(images, len(classes))``.
    """
    check_columns(found, classes)
    p, due = m.check_probabilities(found), (images, len(classes))
    if p.shape != due:
        raise ValueError(
            "predict_proba must return a row per image and a column for each of "
            f"{list(classes)}, {due}, got {p.shape}"
        )
    return p


def _joined(first: ChestXrayDataset, second: ChestXrayDataset) -> ChestXrayDataset:
    """Return the samples of both parts of one data set."""
    return ChestXrayDataset(
        (*first.samples, *second.samples), classes=first.classes, transform=first.transform
    )


def _fitted(
    fit: Fit | TrainingConfig,
    train: ChestXrayDataset,
    val: ChestXrayDataset,
    model: Callable[[], torchvision.models.DenseNet] | None,
) -> ProbabilisticClassifier:
    if not callable(fit):
        return _trained(train, val, fit, model)
    found = fit(train)
    if not (hasattr(found, "predict_proba") and hasattr(found, "classes")):
        raise TypeError(
            f"fit must return a classifier with classes and predict_proba, it returned {found!r}"
        )
    return found


def _trained(
    train: ChestXrayDataset,
    val: ChestXrayDataset,
    config: TrainingConfig,
    model: Callable[[], torchvision.models.DenseNet] | None,
) -> Classifier:
    from chestxray_covid.models import make_network
    from chestxray_covid.training import Trainer

    # What is left when a source is gone may well be confounded: that is what is being measured.
    known = replace(config, allow_confounded_sources=True)
    network = make_network(model, len(train.classes), config.seed)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        Trainer(network, train, val, known, output=run).fit()
        return Classifier.from_pretrained(run)


def _missing(
    source: str, question: Question, n: int, confidence: float, note: str
) -> LeftOutSource:
    none = Estimate(value=float("nan"), n=0, method=DELONG_BY_PATIENT, confidence=confidence)
    return LeftOutSource(
        source=source,
        positive=question.positive,
        negative=question.negative,
        n_images=n,
        internal=none,
        external=none,
        change=none,
        note=note,
    )


def _row(
    source: str,
    question: Question,
    dataset: ChestXrayDataset,
    scores: NDArray[np.float64],
    n_inside: int,
    how: Mapping[str, Any],
) -> LeftOutSource:
    """Return the numbers of one source, whose samples follow the others'."""
    truth = np.array([sample.label == question.positive for sample in dataset.samples], int)
    groups = np.array(patient_groups(dataset, find_copies=False))
    outside = np.arange(len(truth)) >= n_inside

    def auroc_of(part: NDArray[np.bool_]) -> Estimate:
        own = groups[part].tolist()
        return auroc_by_group(truth[part], scores[part], own, confidence=how["confidence"])

    few = not all(has_enough(truth[part], groups[part]) for part in (outside, ~outside))
    return LeftOutSource(
        source=source,
        positive=question.positive,
        negative=question.negative,
        n_images=int(outside.sum()),
        internal=auroc_of(~outside),
        external=auroc_of(outside),
        change=bootstrap_by_group(auroc_change, groups.tolist(), truth, scores, outside, **how),
        note=TOO_FEW if few else "",
    )


def auroc_change(
    y_true: NDArray[Any], y_score: NDArray[Any], outside: NDArray[Any], *, sample_weight: Any
) -> Any:
    """Return the AUROC among the cases outside less that among the others."""
    weight, is_out = np.asarray(sample_weight), np.asarray(outside, bool)
    return m.auroc(y_true, y_score, sample_weight=weight * is_out) - m.auroc(
        y_true, y_score, sample_weight=weight * ~is_out
    )


def within_sources(
    y_true: NDArray[Any], y_score: NDArray[Any], sources: NDArray[Any], *, sample_weight: Any
) -> Any:
    """Return the AUROC over the pairs of a positive and a negative case of one source.

    The sources' own AUROCs, weighed by the number of pairs in each, so that no difference between
    sources can add to it. ``nan`` if no source has both.
    """
    weight, truth = np.asarray(sample_weight, float), np.asarray(y_true, bool)
    total, pairs = np.zeros(weight.shape[:-1]), np.zeros(weight.shape[:-1])
    for source in np.unique(sources):
        own = weight * (sources == source)
        count = (own @ truth) * (own @ ~truth)
        found = m.auroc(truth.astype(int), y_score, sample_weight=own)
        total += np.where(count > 0, count * np.nan_to_num(found), 0)
        pairs += count
    return np.divide(total, pairs, np.full(pairs.shape, np.nan), where=pairs > 0)


def within_less_pooled(
    y_true: NDArray[Any],
    y_score: NDArray[Any],
    sources: NDArray[Any],
    counted: NDArray[Any],
    *,
    sample_weight: Any,
) -> Any:
    """Return the AUROC inside one source, of the cases that count, less that of all cases."""
    pooled = m.auroc(y_true, y_score, sample_weight=sample_weight)
    own = np.asarray(sample_weight) * counted
    return within_sources(y_true, y_score, sources, sample_weight=own) - pooled


def has_enough(truth: ArrayLike, groups: ArrayLike) -> bool:
    """Return whether there are 20 cases of five patients or more of both classes.

    With one case, or with many of one patient, no interval says anything.

    Args:
        truth: ``(N,)`` bool or 0 and 1.
        groups: ``(N,)`` patients.
    """
    positive, patients = np.asarray(truth, bool), np.asarray(groups)
    return all(
        own.sum() >= SMALL and len(np.unique(patients[own])) >= FEWEST_PATIENTS
        for own in (positive, ~positive)
    )
