"""Whether an AUROC holds inside one source, and in sources that were not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.audit_data import AuditData
from chestxray_covid.audit_report import FAIL, AuditFinding, AuditItem
from chestxray_covid.audit_verdicts import CHANGE_BANDS, CHANGES, judge_change, worst
from chestxray_covid.datasets.base import ChestXrayDataset, Sample
from chestxray_covid.datasets.duplicates import FILE_HASH, patient_groups
from chestxray_covid.datasets.origins import collections_of
from chestxray_covid.generalisation import (
    FEWEST_PATIENTS,
    NOT_RETRAINED,
    TOO_FEW,
    LeftOutSource,
    auroc_change,
    has_enough,
    within_less_pooled,
    within_sources,
)
from chestxray_covid.intervals import Estimate
from chestxray_covid.subgroups import SMALL


def generalisation_item(
    data: AuditData,
    scores: NDArray[np.float64],
    train: ChestXrayDataset | None,
    left_out: Sequence[LeftOutSource],
) -> AuditItem:
    """Return whether the AUROC holds inside one source and in sources that were not trained on.

    Args:
        data: The samples.
        scores: ``(N,)`` of the classifier.
        train: What the classifier was trained on, if known.
        left_out: What :func:`leave_one_source_out` returned, if it was called.
    """
    truth = data.truth.astype(int)
    findings = [
        _auroc("pooled", "all sources pooled", data.auroc(scores)),
        *_per_source(data, scores),
    ]
    verdicts, reasons = [], []
    seen = _seen(data, train)
    if seen.any():
        verdicts.append(FAIL)
        reasons.append(f"{seen.sum()} of these images are of patients that were trained on.")
    parts = {source: data.sources == source for source in np.unique(data.sources)}
    enough = [s for s, own in parts.items() if has_enough(truth[own], data.groups[own])]
    counted = np.isin(data.sources, enough)
    if enough and len(parts) > 1:
        inside = np.flatnonzero(counted)
        inner = data.estimate(within_sources, truth, scores, data.sources, among=inside)
        change = data.estimate(within_less_pooled, truth, scores, data.sources, counted)
        findings.append(_auroc("within_sources", "pairs inside one source", inner, change))
        verdicts.append(judge_change(change, both_ways=False))
        reasons.append(
            f"Inside one source the AUROC is {inner}, {change.value:+.3f} to the pooled."
        )
    external = _external(data, scores, train, seen)
    if external is not None:
        findings.append(external)
        if external.change is not None and not external.meaning:
            verdicts.append(judge_change(external.change, both_ways=False))
            reasons.append(f"In sources that were not trained on it is {external.estimate}.")
    for row in left_out:
        retrained = row.note != NOT_RETRAINED
        what = f"{row.source}, {'left out of the training' if retrained else 'against all others'}"
        findings.append(_auroc(f"without_{row.source}", what, row.external, row.change, row.note))
        if not row.note:
            verdicts.append(judge_change(row.change, both_ways=False))
            reasons.append(f"Trained without {row.source}, it is {row.external} there.")
    return AuditItem(
        name="generalisation",
        question="Does it hold where the source cannot help?",
        verdict=worst(verdicts),
        reason=" ".join(reasons) or _nothing_told(enough, data, train),
        threshold=f"loss of AUROC inside one source, or elsewhere: {CHANGE_BANDS}; any image of a "
        "patient that was trained on fails",
        threshold_source=CHANGES,
        findings=tuple(findings),
    )


def _nothing_told(enough: Sequence[str], data: AuditData, train: ChestXrayDataset | None) -> str:
    """Return why none of the numbers is compared with another."""
    if not enough:
        return (
            f"No source holds {SMALL} images of {FEWEST_PATIENTS} patients of both classes, so "
            "nothing here can tell."
        )
    known = train is not None and not collections_of(data.samples) & collections_of(train.samples)
    which = ", which was not trained on" if known else ""
    return (
        f"All images are of one source ({enough[0]}{which}): its AUROC is compared with none of "
        "another."
    )


def _auroc(
    name: str, what: str, estimate: Estimate, change: Estimate | None = None, meaning: str = ""
) -> AuditFinding:
    return AuditFinding(
        name=name, what=what, metric="auroc", estimate=estimate, change=change, meaning=meaning
    )


def _per_source(data: AuditData, scores: NDArray[np.float64]) -> list[AuditFinding]:
    found = []
    for source in np.unique(data.sources):
        own = np.flatnonzero(data.sources == source)
        counts = np.bincount(data.truth[own], minlength=2)
        estimate = data.auroc(scores, among=own)
        note = f"{counts[1]} of {data.question.positive}, {counts[0]} of {data.question.negative}"
        enough = has_enough(data.truth[own], data.groups[own]) or not counts.min()
        few = "" if enough else f"; under {SMALL} images or {FEWEST_PATIENTS} patients, not judged"
        only = "; one class only: no AUROC" if not counts.min() else ""
        found.append(_auroc(f"in_{source}", f"in {source}", estimate, None, f"{note}{few}{only}."))
    return found


def with_hashes(dataset: ChestXrayDataset) -> ChestXrayDataset:
    """Return the samples with their content hash, by which equal files are known.

    Raises:
        DatasetError: If a file cannot be read.
    """
    return ChestXrayDataset([*map(_hashed, dataset.samples)], classes=dataset.classes)


def _hashed(sample: Sample) -> Sample:
    if sample.metadata.get(FILE_HASH):
        return sample
    about = {**sample.metadata, FILE_HASH: sample.content_hash()}
    return replace(sample, metadata=about)


def _seen(data: AuditData, train: ChestXrayDataset | None) -> NDArray[np.bool_]:
    """Return ``(N,)`` whether an image is of a patient in the training data, also of one whom
    the training data know from another collection, or whose file they hold under another name.
    """
    if train is None:
        return np.zeros(len(data.samples), bool)
    samples = [*map(_hashed, (*train.samples, *data.samples))]
    both = ChestXrayDataset(samples, classes=sorted({s.label for s in samples}))
    trained, audited = np.split(patient_groups(both, find_copies=False), [len(train)])
    return np.isin(audited, trained)


def _external(
    data: AuditData,
    scores: NDArray[np.float64],
    train: ChestXrayDataset | None,
    seen: NDArray[np.bool_],
) -> AuditFinding | None:
    if train is None:
        return None
    trained = collections_of(train.samples)
    outside = np.array([trained.isdisjoint(collections_of([s])) for s in data.samples]) & ~seen
    if not outside.any() or outside.all():
        return None
    truth = data.truth.astype(int)
    estimate = data.auroc(scores, among=np.flatnonzero(outside))
    change = data.estimate(auroc_change, truth, scores, outside)
    few = not all(has_enough(truth[part], data.groups[part]) for part in (outside, ~outside))
    note = TOO_FEW if few else ""
    return _auroc("external", "sources that were not trained on", estimate, change, note)
