"""Judge a classifier: numbers with intervals, overall and per subgroup."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chestxray_covid import metrics as m
from chestxray_covid.checkpoint import ModelConfig
from chestxray_covid.confounders import confounding_of_question
from chestxray_covid.datasets.base import ChestXrayDataset
from chestxray_covid.datasets.duplicates import patient_groups
from chestxray_covid.datasets.origins import origins_of
from chestxray_covid.datasets.storage import cell_text
from chestxray_covid.errors import check_classes, check_classifier, check_dataset, real_number
from chestxray_covid.evaluation_report import EvaluationReport
from chestxray_covid.files import expanded
from chestxray_covid.intervals import check_resampling, group_codes
from chestxray_covid.judged_images import (
    IDENTITY,
    UNKNOWN,
    default_positive,
    lists_of,
    whole_characters,
)
from chestxray_covid.reporting import told_of
from chestxray_covid.splits import check_divisible, divide, folds_by_patient
from chestxray_covid.subgroups import GROUPS, age_band, judge, parts_of, sex_of

if TYPE_CHECKING:
    import torchvision

    from chestxray_covid.training_config import TrainingConfig


#: Fields of a model's config that a report keeps.
_OF_MODEL = (
    *("architecture", "classes", "preprocess", "threshold", "threshold_origin"),
    *("weights_sha256", "chestxray_covid_version"),
)


class ProbabilisticClassifier(Protocol):
    """What can be judged, for example :class:`~chestxray_covid.classifier.Classifier`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels in the order of the columns of :meth:`predict_proba`."""

    def predict_proba(
        self, images: ChestXrayDataset, /, *, batch_size: int, progress: bool
    ) -> NDArray[np.float64]:
        """Return ``(N, K)`` probabilities of the samples in order, rows summing to 1."""


def evaluate(
    classifier: ProbabilisticClassifier,
    dataset: ChestXrayDataset,
    *,
    positive: str | None = None,
    batch_size: int = 32,
    n_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    progress: bool = False,
) -> EvaluationReport:
    """Return how good a classifier is on a data set that it was not trained on.

    A patient counts once, also where two collections hold images of theirs
    (:func:`~chestxray_covid.patient_groups`, by what the collections say; copies that nothing says
    are copies are not looked for). Every image counts, also one of which the classifier abstains.
    Sex and age come from the metadata ``sex`` and ``age``.

    Args:
        classifier: Has ``classes`` and ``predict_proba``; the report names its ``weights_sha256``
            if it has one.
        dataset: Its labels must be among the classifier's classes, in any order.
        positive: The class in question; by default ``"covid19"``, or the classifier's last class
            if it has none of that name.
        batch_size: Images computed at once.
        n_resamples: Resamples of the bootstrap over patients.
        seed: Seed of the bootstrap.
        confidence: Level of the intervals, in (0, 1).
        progress: Show a progress bar.

    Raises:
        TypeError: If one is no classifier, or its classes have no order, or the other no data set.
        ValueError: If the data set is empty or has a label that the classifier does not know, or
            an option is impossible.
        ImageError: If a file cannot be decoded.
    """
    check_classifier(classifier)
    check_dataset(dataset)
    labels = [sample.label for sample in dataset.samples]
    # Before the slow part, so that a wrong argument is not found out an hour later.
    classes = check_classes(classifier.classes)
    chosen = _positive(labels, classes, positive)
    how = check_resampling(n_resamples=n_resamples, seed=seed, confidence=confidence)
    report = evaluate_probabilities(
        labels,
        classifier.predict_proba(dataset, batch_size=batch_size, progress=progress),
        classes=classes,
        **_provenance(dataset, patient_groups(dataset, find_copies=False)),
        ids=_names(dataset),
        positive=chosen,
        **how,
    )
    dropped = whole_characters(dataset.report().dropped)
    origins = whole_characters(origins_of(dataset.samples))
    return replace(report, model=_model_of(classifier), excluded=dropped, origins=origins)


def _model_of(classifier: ProbabilisticClassifier) -> dict[str, Any]:
    """Return what a classifier with a config says of itself, without the paths of its training."""
    config = getattr(classifier, "config", None)
    # Of the weights that were judged: a config may be that of others.
    weights = {"weights_sha256": str(getattr(classifier, "weights_sha256", None) or "")}
    if not isinstance(config, ModelConfig):
        return weights if weights["weights_sha256"] else {}
    told, data = told_of(config.provenance), config.to_dict() | weights
    return {name: data[name] for name in _OF_MODEL} | {"provenance": whole_characters(told)}


def _names(dataset: ChestXrayDataset) -> list[str]:
    """Return the images' file names, with parent folders where a patient has one of them twice."""
    names = [sample.path.name for sample in dataset.samples]
    depth = max((len(sample.path.parts) for sample in dataset.samples), default=0)
    for last in range(2, depth + 1):
        known = {
            (s.source, s.patient_id, s.path): n for s, n in zip(dataset.samples, names, strict=True)
        }
        counts = Counter((*key[:2], name) for key, name in known.items())
        for i, s in enumerate(dataset.samples):
            if counts[s.source, s.patient_id, names[i]] > 1:
                names[i] = "/".join(s.path.parts[-last:])
        if counts.total() == len(counts):
            break
    return names


def _provenance(dataset: ChestXrayDataset, groups: Sequence[int]) -> dict[str, Any]:
    """Return what :func:`evaluate_probabilities` wants to know of the samples."""
    samples = dataset.samples
    return {
        "patients": [s.patient_id for s in samples],
        "sources": [s.source for s in samples],
        "views": [s.view for s in samples],
        "groups": groups,
        "sexes": [s.metadata.get("sex", "") for s in samples],
        "ages": [s.metadata.get("age", "") for s in samples],
    }


def evaluate_probabilities(
    y_true: Sequence[str],
    probabilities: ArrayLike,
    *,
    classes: Sequence[str],
    patients: Sequence[Hashable],
    sources: Sequence[str],
    views: Sequence[str | float | None],
    groups: Sequence[Hashable] | None = None,
    sexes: Sequence[str] | None = None,
    ages: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    positive: str | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> EvaluationReport:
    """Return how good probabilities are, however they came about.

    Proportions have Wilson's interval where no patient has several images, AUROCs DeLong's on the
    logit scale, all else the bootstrap over patients; every number says which in ``method``.

    Args:
        y_true: ``(N,)`` labels, each one of ``classes``.
        probabilities: ``(N, K)`` in [0, 1], rows summing to 1, columns in the order of ``classes``,
            also where they have names.
        classes: K labels.
        patients: ``(N,)`` patients, unique only within their source.
        sources: ``(N,)`` collections.
        views: ``(N,)`` projections; missing values, as pandas has them, are ``"unknown"``.
        groups: ``(N,)`` patients across sources, by which intervals are resampled; the pairs of
            source and patient if not given.
        sexes: ``(N,)``, ``"F"``, ``"M"`` or anything else for unknown.
        ages: ``(N,)`` years as text, an age of DICOM (``"018M"``), or anything else for unknown;
            only the band is kept.
        ids: ``(N,)`` names of the images; row numbers if not given.
        positive, n_resamples, seed, confidence: As in :func:`evaluate`.

    Raises:
        TypeError: If labels, patients, sources or views are no list.
        ValueError: If shapes, labels, probabilities or options are not as said, or a source is
            missing.
    """
    import pandas as pd

    how = check_resampling(n_resamples=n_resamples, seed=seed, confidence=confidence)
    names, p = check_classes(classes), m.check_probabilities(probabilities)
    y_true, patients, sources, views = lists_of(
        y_true=y_true, patients=patients, sources=sources, views=views
    )
    check_columns(probabilities, names)
    chosen = _positive(y_true, names, positive)
    unknown = [UNKNOWN] * len(p)
    columns: dict[str, Sequence[Any]] = {
        "id": range(len(p)) if ids is None else ids,
        "label": y_true,
        "patient_id": patients,
        "source": sources,
        "view": [cell_text(view) or UNKNOWN for view in views],
        "patient_group": list(zip(sources, patients, strict=False)) if groups is None else groups,
        "sex": unknown if sexes is None else [sex_of(str(sex)) for sex in sexes],
        "age_band": unknown if ages is None else [age_band(str(age)) for age in ages],
    }
    group_codes(sources, "source")  # or it would be the patient that is said to be missing
    lengths = {name: len(column) for name, column in columns.items()}
    if p.shape[1] != len(names) or set(lengths.values()) != {len(p)}:
        raise ValueError(
            f"probabilities must have a row per image and {len(names)} columns for "
            f"{list(names)}, got shape {p.shape} for {lengths}"
        )
    columns["patient_group"] = group_codes(columns["patient_group"]).tolist()
    texts = {name: [whole_characters(str(text)) for text in columns[name]] for name in IDENTITY}
    table = pd.DataFrame(texts)
    table[[f"p_{name}" for name in names]] = p
    told = confounding_of_question(texts["source"], texts["label"], chosen)
    overall = judge("overall", "all", table, names, chosen, how)
    by: dict[str, Any] = {
        f"by_{group}": {
            name: judge(group, name, part, names, chosen, how)
            for name, part in parts_of(table, group)
        }
        for group in GROUPS
    }
    return EvaluationReport(
        classes=names,
        positive=chosen,
        n_images=overall.n_images,
        n_patients=overall.n_patients,
        confounded=told.is_severe,
        **how,
        overall=overall,
        **by,
        predictions=table,
    )


def check_columns(probabilities: Any, classes: tuple[str, ...]) -> None:
    """Raise if columns are named after the classes, as a ``DataFrame``'s, in another order.

    A table of predictions names them ``p_covid19`` and so on; columns of other tables are no names.
    """
    named = list(getattr(probabilities, "columns", classes))
    own = tuple(n.removeprefix("p_") for n in named if isinstance(n, str))
    if own != classes and sorted(own) == sorted(classes):
        raise ValueError(
            f"probabilities have the columns {list(named)}, expected the order of the classes: "
            f"{list(classes)}"
        )


def _positive(labels: Sequence[str], classes: Sequence[str], positive: str | None) -> str:
    """Return the class in question, if the labels fit the classes."""
    if not len(labels):
        raise ValueError("There is nothing to evaluate: no samples")
    strange = sorted(set(labels) - set(classes), key=str)  # a table's gaps are numbers
    if strange:
        raise ValueError(
            f"Labels {strange} are not among the classes {list(classes)} of the classifier. "
            "Filter the data set, or take a classifier that knows them."
        )
    chosen = positive or default_positive(classes)
    if chosen not in classes:
        raise ValueError(f"positive must be one of {list(classes)}, got {chosen!r}")
    return chosen


def cross_validate(
    dataset: ChestXrayDataset,
    config: TrainingConfig | None = None,
    *,
    folds: int = 5,
    val: float = 0.15,
    model: Callable[[], torchvision.models.DenseNet] | None = None,
    output: str | os.PathLike[str] | None = None,
    positive: str | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> EvaluationReport:
    """Return how good a recipe is on patients that it did not see, over the whole data set.

    Patients (joined with duplicates) are dealt into folds, stratified by label and source. For
    each fold a network is trained on the others, of which a part chooses the epoch, and predicts
    the fold; the predictions of all folds are pooled. The fold itself chooses nothing.

    Args:
        dataset: Radiographs of at least two classes.
        config: Options of the training; the recommended recipe if not given.
        folds: Number of folds, at least 2.
        val: Share of the other folds that chooses the epoch, in (0, 0.5].
        model: Returns a fresh network for a fold; by default DenseNet-121 from ImageNet weights.
            A fold that ``output`` holds goes on with its own, whatever this would return.
        output: Folder for the runs, ``fold-0``, ``fold-1``, …, kept and, where finished or
            interrupted, continued; a temporary one if not given.
        positive, n_resamples, confidence: As in :func:`evaluate`.
        seed: Seed of folds, splits and resamples.

    Raises:
        TypeError: If ``dataset`` or ``config`` is none, ``model`` a network instead of a function
            that returns one, ``folds`` no whole number, or ``val`` none at all.
        ValueError: If ``folds``, ``val``, ``positive``, ``n_resamples``, ``seed`` or
            ``confidence`` is impossible, or ``model`` returns the same network twice.
        SplitError: If a class has too few patients.
        TrainingError: If a fold cannot be trained.
        WeightsUnavailableError: If ImageNet weights are wanted and not to be had.
    """
    from chestxray_covid.models import check_maker
    from chestxray_covid.training_config import TrainingConfig
    from chestxray_covid.training_order import check_options, check_sides, told_by_sources

    check_dataset(dataset)
    config = TrainingConfig() if config is None else config
    check_options(config, ())
    check_maker(model)
    val = real_number("val", val)
    if not 0 < val <= 0.5:
        raise ValueError(f"val must be a share in (0, 0.5], got {val}")
    labels = [sample.label for sample in dataset.samples]
    chosen = _positive(labels, dataset.classes, positive)
    how = check_resampling(n_resamples=n_resamples, seed=seed, confidence=confidence)
    # Before copies are looked for, which only make patients fewer.
    check_divisible(dataset, patient_groups(dataset, find_copies=False), sides=folds, seed=seed)
    groups = patient_groups(dataset, workers=config.workers, progress=config.progress)
    parts = [
        (*divide(dataset, rest, np.asarray(groups), val, seed), held_out)
        for rest, held_out in folds_by_patient(dataset, groups, folds=folds, seed=seed)
    ]
    for train, chooses, _ in parts:  # all of them, before the first takes hours
        check_sides(dataset.subset(train), dataset.subset(chooses))
        told_by_sources(dataset.subset(train), config)
    probabilities = np.zeros((len(dataset), len(dataset.classes)))
    with tempfile.TemporaryDirectory() as temporary:
        place = expanded(temporary if output is None else output)
        for number, part in enumerate(parts):
            probabilities[part[-1]] = _predict_fold(
                [dataset.subset(positions) for positions in part],
                replace(config, seed=config.seed + number),
                model=model,
                output=place / f"fold-{number}",
            )
    return evaluate_probabilities(
        labels,
        probabilities,
        classes=dataset.classes,
        **_provenance(dataset, groups),
        ids=_names(dataset),
        positive=chosen,
        **how,
    )


def _predict_fold(
    parts: Sequence[ChestXrayDataset],
    config: TrainingConfig,
    *,
    model: Callable[[], torchvision.models.DenseNet] | None,
    output: Path,
) -> NDArray[np.float64]:
    """Train on the first part, choose the epoch on the second, and return ``(N, K)`` of the last.

    ``(N, K)`` are the probabilities of its samples.
    """
    from chestxray_covid.classifier import Classifier
    from chestxray_covid.models import make_network
    from chestxray_covid.training import Trainer
    from chestxray_covid.training_state import StateStore

    train, chooses, held_out = parts
    network = make_network(model, len(train.classes), config.seed)
    trainer = Trainer(network, train, chooses, config, output=output)
    trainer.fit(resume=StateStore(output).holds_run())
    classifier = Classifier.from_pretrained(output)
    return classifier.predict_proba(held_out, workers=config.workers)
