"""Lungs, or sources? The audit of a classifier and of the data that it is judged on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.audit_data import (
    AuditData,
    MaskFunction,
    Question,
    as_nameless,
    find_lungs,
    read_data,
    run_classifier,
    stratified_sample,
)
from chestxray_covid.audit_generalisation import generalisation_item, with_hashes
from chestxray_covid.audit_items import (
    confounding_item,
    features_item,
    heat_item,
    without_lungs_item,
)
from chestxray_covid.audit_occlusion import occlusion_item
from chestxray_covid.audit_report import AuditItem, AuditReport
from chestxray_covid.classifier import Classifier
from chestxray_covid.datasets.base import ChestXrayDataset, told_apart
from chestxray_covid.errors import (
    check_classifier,
    check_dataset,
    check_function,
    check_kind,
    check_kinds,
    check_positive,
)
from chestxray_covid.evaluation import ProbabilisticClassifier
from chestxray_covid.generalisation import LeftOutSource, checked_probabilities
from chestxray_covid.heat_shares import lung_heat
from chestxray_covid.hiding import Region
from chestxray_covid.image import Preprocess
from chestxray_covid.intervals import check_resampling, check_seed
from chestxray_covid.metrics import check_numbers


def audit_shortcuts(
    classifier: ProbabilisticClassifier,
    dataset: ChestXrayDataset,
    train: ChestXrayDataset | None = None,
    *,
    positive: str | None = None,
    negative: str | None = None,
    masks: MaskFunction | None = None,
    left_out: Sequence[LeftOutSource] = (),
    preprocess: Preprocess | None = None,
    heat: bool = True,
    limit: int | None = None,
    batch_size: int = 32,
    workers: int = 2,
    n_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    progress: bool = False,
) -> AuditReport:
    """Return whether a classifier, and the data that it is judged on, tell lungs from sources.

    Six questions, each with a verdict: does the source or the view give the label away; can the
    label be predicted without lungs; does the model need the lungs and nothing else; do its
    features know the source; does it hold inside one source and in others; does its heat lie in
    the lungs. It takes seven passes of the model over the images, which are decoded once and held
    in memory: 50 kB each at 224 px.

    Args:
        classifier: What is audited. Any model with ``classes`` and ``predict_proba``, as
            :func:`evaluate` asks for them, will do; it is shown the pixels as a data set in which
            names, labels and patients are made up. One that is no :class:`Classifier`, or has
            another ``predict_proba``, is not asked for its heat, and for its features only if it
            has ``predict_features``, which takes what ``predict_proba`` takes and returns
            ``(N, D)`` numbers.
        dataset: Images that it was not trained on, of both sides of the question.
        train: What it was trained on, if known: its design is judged instead of the audited
            data's, and sources that are not in it are external. A patient of it who is audited, by
            number or by an equal file, is a failure; copies that were saved anew are not looked
            for.
        positive: The class in question, by default ``"covid19"``, or the last one.
        negative: What it is told from, by default ``"normal"`` if there are such images, else
            ``"rest"``, which is everything but the positive class, labels that the classifier
            does not know among it.
        masks: Returns the lungs of a sample, ``(H, W)`` bool, true inside, or ``None`` where they
            are not known; by default the annotated ones, see :func:`lung_mask`. Where they are not
            known, the bundled network draws them, see :func:`segment`. A mask whose hull is the
            whole image, as of one that is true outside, counts as one without lungs.
        left_out: What :func:`leave_one_source_out` returned of the same two sides, for the
            question of generalisation.
        preprocess: How images become the pixels that a model that is no :class:`Classifier` is
            shown, as grey images of 8 bits; 224 px if not given. A :class:`Classifier` has its own.
        heat: Ask where the heat lies, too.
        limit: Audit a random sample of about so many images, of each source and label its share.
        batch_size: Images computed at once.
        workers: Threads that decode.
        n_resamples: Resamples of the bootstrap over patients.
        seed: Seed of the sample, the folds and the bootstrap.
        confidence: Level of the intervals, in (0, 1).
        progress: Show progress bars.

    Raises:
        TypeError: If ``classifier`` is none, ``dataset`` or ``train`` no data set, ``masks`` no
            function, or what ``left_out`` holds something else.
        ValueError: If a side of the question has no image, a mask is no mask, an option is
            impossible, or what the model returns are no probabilities of its classes.
        ImageError: If a file cannot be decoded.
        DatasetError: If a file of ``train`` cannot be read, or ``train`` and ``dataset`` are of two
            folders that are called alike by default.
    """
    check_classifier(classifier)
    # One that answers otherwise, as of turned copies, too, is judged by its answers.
    own = getattr(classifier.predict_proba, "__func__", None) is Classifier.predict_proba
    network = classifier if isinstance(classifier, Classifier) and own else None
    if isinstance(classifier, Classifier):
        if preprocess is not None:
            raise ValueError("preprocess must be None: the classifier has its own, in its config")
        preprocess = classifier.config.preprocess
    size = preprocess or Preprocess()
    check_kind(size, Preprocess, "Preprocess(size_px=224)")
    check_dataset(dataset)
    check_dataset(dataset if train is None else train, "train")
    check_positive("batch_size", batch_size)
    check_positive("workers", workers)
    check_function("masks", masks, "the lungs of a sample")
    left_out = tuple(left_out) if isinstance(left_out, Iterable) else left_out
    check_kinds(left_out, LeftOutSource, "leave_one_source_out(…)")
    how = check_resampling(n_resamples=n_resamples, seed=seed, confidence=confidence)
    check_seed(seed)
    question = Question.of(classifier.classes, dataset, positive, negative)
    for row in left_out:
        if (row.positive, row.negative) != (question.positive, question.negative):
            raise ValueError(
                f"left_out tells {row.positive!r} from {row.negative!r}, the audit "
                f"{question.positive!r} from {question.negative!r}: give both the same positive= "
                "and negative="
            )
    if train is not None and not len(question.asked(train)):
        raise ValueError(
            f"train holds neither {question.positive!r} nor {question.negative!r}: it cannot be "
            "what this classifier was trained on"
        )
    chosen = question.asked(dataset)
    if limit is not None:
        chosen = stratified_sample(chosen, limit, seed=seed)
    if train is not None:  # read before the slow part
        told_apart([train, dataset], share=True)
        train = with_hashes(train)
    data = read_data(chosen, question, size, how=how, workers=workers, progress=progress)
    lungs = find_lungs(data, masks, batch_size=batch_size, progress=progress)

    def run(pixels: NDArray[np.uint8], name: str) -> tuple[NDArray[np.float64], Any]:
        if network is None:
            seen = as_nameless(pixels, question.classes)
            found, features = _ask(
                classifier, seen, batch_size, progress, features=pixels is data.pixels
            )
        else:
            found, features = run_classifier(
                network, pixels, name=name, batch_size=batch_size, progress=progress
            )
        return question.score(found), features

    whole, features = run(data.pixels, "whole image")
    designed = dataset if train is None else train
    design = confounding_item(designed, question, how, trained=train is not None)
    items = [
        design,
        without_lungs_item(data),
        occlusion_item(data, whole, lungs, lambda pixels, name: run(pixels, name)[0]),
        features_item(data, features, design),
        generalisation_item(data, whole, train, left_out),
    ]
    if heat and network is not None:
        items.append(_heat(network, data, lungs, batch_size=batch_size, progress=progress))
    return AuditReport(
        classes=question.classes,
        positive=question.positive,
        negative=question.negative,
        n_images=len(data.samples),
        n_patients=len(set(data.groups.tolist())),
        sources=data.dataset.sources,
        weights_sha256=str(getattr(classifier, "weights_sha256", None) or ""),
        items=tuple(items),
        **how,
    )


def _ask(
    classifier: ProbabilisticClassifier,
    images: ChestXrayDataset,
    batch_size: int,
    progress: bool,
    *,
    features: bool,
) -> tuple[NDArray[np.float64], NDArray[np.float32] | None]:
    """Return ``(N, K)`` probabilities and, if asked for and given, ``(N, D)`` features."""
    found = classifier.predict_proba(images, batch_size=batch_size, progress=progress)
    probabilities = checked_probabilities(found, len(images), images.classes)
    look = getattr(classifier, "predict_features", None) if features else None
    if look is None:
        return probabilities, None
    given = look(images, batch_size=batch_size, progress=progress)
    seen = check_numbers(given, "what predict_features returns", 2).astype(np.float32)
    check_numbers(seen, "what predict_features returns, in float32,", 2)
    if len(seen) != len(images):
        raise ValueError(
            f"what predict_features returns must have a row for each of {len(images)} images, "
            f"got shape {seen.shape}"
        )
    return probabilities, seen


def _heat(
    classifier: Classifier,
    data: AuditData,
    lungs: Sequence[Region | None],
    *,
    batch_size: int,
    progress: bool,
) -> AuditItem:
    """Return whether the heat of the positive images lies in the lungs' region."""
    chosen = np.flatnonzero(data.truth).tolist()
    shown = data.as_dataset(classifier.config.preprocess).subset(chosen)
    nothing = np.zeros((data.size_px, data.size_px), bool)
    drawn = [nothing if region is None else region for region in (lungs[i] for i in chosen)]
    regions = dict(zip(map(id, shown.samples), drawn, strict=True))
    heat = lung_heat(
        classifier,
        shown,
        data.question.positive,
        masks=lambda sample: regions[id(sample)],
        batch_size=batch_size,
        progress=progress,
        **data.how,
    )
    return heat_item(data, heat)
