"""The questions of an audit that need no changed image, and their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chestxray_covid import metrics as m
from chestxray_covid.audit_baselines import (
    FOLDS,
    baselines,
    grouped_folds,
    held_out_scores,
    undefined,
)
from chestxray_covid.audit_data import AuditData, Question
from chestxray_covid.audit_report import FAIL, NOT_ASSESSABLE, PASS, WARN, AuditFinding, AuditItem
from chestxray_covid.audit_verdicts import (
    ASSOCIATION,
    DISCRIMINATION,
    MEDIUM_EFFECT,
    MEDIUM_V,
    NOTABLE,
    STRONG,
    capped,
    judge_auroc,
    worst,
)
from chestxray_covid.confounders import CHANCE_V, CONFOUNDED_V, Confounding, corrected_v, cramers_v
from chestxray_covid.datasets.base import UNKNOWN_VIEW, ChestXrayDataset, Sample
from chestxray_covid.datasets.duplicates import patient_groups
from chestxray_covid.delong import auroc_by_group
from chestxray_covid.heat_shares import LungHeat
from chestxray_covid.intervals import bootstrap_by_group
from chestxray_covid.subgroups import SMALL, age_band, sex_of, years_of

#: Pixels of the input per cell of DenseNet-121's last maps, along a side.
STRIDE = 32
#: With fewer cells a side, a heatmap cannot tell lungs from what is around them.
_FEWEST_CELLS = 4
_SEXES = {"female": "F", "male": "M"}
_OF_PEOPLE = ("sex", "age")
#: Whether what the features tell goes with the label → what the reason says of it.
_SAID_OF_LABEL = {
    False: "which here says little of the label",
    None: "and whether that goes with the label is not known",
}
_BANDS = f"AUROC without lungs: warn from {NOTABLE}, fail from {STRONG}, its interval above 0.5"


# ---------------------------------------------------------------- 1. the design


def confounding_item(
    dataset: ChestXrayDataset, question: Question, how: Mapping[str, Any], *, trained: bool
) -> AuditItem:
    """Return whether source or view give the label away, or sex or age go with it.

    Args:
        dataset: The training data if known, else what is audited.
        question: Which labels count.
        how: Options of the intervals.
        trained: Whether it is the training data.
    """
    asked = question.asked(dataset)
    labels = [side(sample, question) for sample in asked.samples]
    groups = patient_groups(asked, find_copies=False)
    findings, tables, verdicts, reasons = [], {}, [], []
    for name, values in _design_of(asked.samples).items():
        known = [i for i, value in enumerate(values) if value != UNKNOWN_VIEW]
        own, theirs = [values[i] for i in known], [labels[i] for i in known]
        rare = [label for label in set(labels) if 2 * theirs.count(label) < labels.count(label)]
        if name in _OF_PEOPLE and (rare or min(map(theirs.count, set(labels))) < SMALL):
            continue  # few collections tell, and that alone is no doubt
        if rare:
            whose = f" of {rare[0]}" if len(rare) < len(set(labels)) else ""
            reasons.append(f"The {name} of most images{whose} is not known.")
            verdicts.append(NOT_ASSESSABLE)
            continue
        found = Confounding.of(own, theirs)
        tables[f"{name} and label"] = found.table
        findings.append(_association(name, found, own, theirs, [groups[i] for i in known], how))
        verdict = _judge_column(name, found)
        verdicts.append(verdict)
        if verdict != PASS or name not in _OF_PEOPLE:
            reasons.append(_design_reason(name, found))
    what = "training data" if trained else "audited data (no training data were given)"
    return AuditItem(
        name="confounding",
        question="Does the source, or the view, give the label away?",
        verdict=worst(verdicts),
        reason=f"In the {what}: {' '.join(reasons)}",
        threshold=(
            f"Cramér's V, corrected for its bias: warn from {MEDIUM_V}, fail from {CONFOUNDED_V}, "
            f"or from {CHANCE_V} where every label follows; sex and age, where they are known of "
            f"most images of either label, and of {SMALL}, only warn"
        ),
        threshold_source=ASSOCIATION,
        findings=tuple(findings),
        tables=tables,
    )


def _association(
    name: str,
    found: Confounding,
    values: Sequence[str],
    labels: Sequence[str],
    groups: Sequence[int],
    how: Mapping[str, Any],
) -> AuditFinding:
    """Return how far a column of the data goes with the label."""
    codes = [np.unique(column, return_inverse=True)[1] for column in (values, labels)]
    estimate = bootstrap_by_group(cramers_v, groups, *codes, **how)
    if not estimate.low <= estimate.value <= estimate.high:
        # Many small sources: images drawn twice look like an association.
        estimate = replace(estimate, low=np.nan, high=np.nan)
    follows = f"{found.determined:.0%} of the images have a label that follows from it alone."
    return AuditFinding(
        name=f"{name}_v",
        # Not what the verdict looks at: many small sources raise it.
        what=f"Cramér's V of {name} and label, uncorrected",
        metric="cramers_v",
        estimate=estimate,
        meaning=follows if len(set(labels)) > 1 else "",
    )


def _design_of(samples: Sequence[Sample]) -> dict[str, list[str]]:
    """Return what may go with the label → its value for each sample."""
    return {
        "source": [s.source for s in samples],
        "view": [s.view for s in samples],
        "sex": [sex_of(s.metadata.get("sex", "")) for s in samples],
        "age": [age_band(s.metadata.get("age", "")) for s in samples],
    }


def side(sample: Sample, question: Question) -> str:
    """Return the side of the question that a sample is on."""
    return sample.label if sample.label == question.positive else question.negative


def _judge_column(name: str, found: Confounding) -> str:
    # One view gives nothing away. One source may: what was merged in it cannot be seen.
    if name != "source" and len(found.table) < 2:
        return PASS
    # A disease may prefer a sex or an age; but a model can take them for it.
    verdict = _judge_design(found)
    return capped(verdict) if name in _OF_PEOPLE else verdict


def _judge_design(found: Confounding) -> str:
    if len(found.table) < 2 or found.corrected_v != found.corrected_v:
        return NOT_ASSESSABLE
    if found.is_severe:
        return FAIL
    return WARN if found.corrected_v >= MEDIUM_V else PASS


def _design_reason(name: str, found: Confounding) -> str:
    if len(found.table) < 2:
        only = next(iter(found.table))
        return f"All images are of one {name} ({only})."
    held = {label for row in found.table.values() for label, count in row.items() if count}
    if len(held) < 2:
        return f"All images are {held.pop()}: whether the {name} gives the label away is open."
    said = {FAIL: f"the {name} all but gives the label", WARN: f"the {name} goes with the label"}
    verdict = said.get(_judge_design(found), f"the {name} says little of the label")
    return f"{verdict[0].upper()}{verdict[1:]} (V = {found.corrected_v:.2f})."


# ---------------------------------------------------------------- 2. without lungs


def without_lungs_item(data: AuditData) -> AuditItem:
    """Return whether the label can be predicted from what holds no lungs."""
    findings = baselines(data)
    by_name = {found.name: found for found in findings}
    judged = [by_name[name] for name in ("file_facts", "frame_70", "frame_90")]
    verdicts = [judge_auroc(found.estimate) for found in judged if found.estimate.n]
    # Opacities change the brightness, too: alone it is no proof.
    verdicts.append(capped(judge_auroc(by_name["brightness"].estimate)) if verdicts else PASS)
    verdict = worst(verdicts) if any(found.estimate.n for found in judged) else NOT_ASSESSABLE
    best = most_telling(judged, verdict)
    reason = {
        FAIL: f"AUROC {best.estimate} from this alone: {best.what}.",
        WARN: f"AUROC {best.estimate} from this alone: {best.what}; from the brightness alone, "
        f"{by_name['brightness'].estimate}.",
        PASS: "A linear model finds no label where no lungs are.",
        NOT_ASSESSABLE: "Too few images or patients to tell.",
    }[verdict]
    return AuditItem(
        name="without_lungs",
        question="Can the label be predicted without lungs?",
        verdict=verdict,
        reason=f"Linear models on held-out patients: {reason}",
        threshold=f"{_BANDS}; the brightness, which lungs are part of, only warns",
        threshold_source=DISCRIMINATION,
        findings=findings,
    )


def most_telling(findings: Sequence[AuditFinding], verdict: str) -> AuditFinding:
    """Return the finding of the highest AUROC, of those with such a verdict if there are any."""
    of_it = [found for found in findings if judge_auroc(found.estimate) == verdict]
    return max(of_it or findings, key=lambda one: np.nan_to_num(one.estimate.value, nan=-1))


# ---------------------------------------------------------------- 4. what the features know


def features_item(
    data: AuditData, features: NDArray[np.float32] | None, design: AuditItem
) -> AuditItem:
    """Return how well source, view, age and sex can be read from the features inside one label.

    Args:
        data: The samples.
        features: ``(N, D)`` penultimate features; ``None`` if the model gives none.
        design: The answer to the first question: what goes with the label can be a shortcut.
    """
    findings: list[AuditFinding] = []
    for label in (data.question.positive, data.question.negative):
        if features is None:
            break
        inside = np.array([side(s, data.question) == label for s in data.samples])
        findings += [
            _knowledge(data, features, inside, label, name, values)
            for name, values in _attributes(data.samples).items()
            if any(values)
        ]
    verdicts, doubts = [], []
    for found in findings:
        name = found.name.split("_in_")[0]
        if name in ("source", "view") and found.estimate.n:
            known = judge_auroc(found.estimate, notable=STRONG)
            goes = _goes_with_label(design, name)
            if known == FAIL and not goes:
                known = capped(known)
                doubts.append(f"The features tell the {name}, {_SAID_OF_LABEL[goes]}.")
            verdicts.append(known)
    sources = any(f.name.startswith("source_in_") and f.estimate.n for f in findings)
    if not sources:
        verdicts.append(NOT_ASSESSABLE)
    verdict = worst(verdicts)
    reason = {
        FAIL: "The features tell what goes with the label in the data: a shortcut is there to use.",
        WARN: " ".join(dict.fromkeys(doubts)),
        PASS: "Inside one label, the features hardly tell source or view apart.",
        NOT_ASSESSABLE: "The model gives no features."
        if features is None
        else "Too few images or patients to tell how well source or view can be read."
        if sources
        else "No label has two sources with enough images to tell.",
    }[verdict]
    return AuditItem(
        name="features",
        question="Do the features know source or view?",
        verdict=verdict,
        reason=reason,
        threshold=(
            "AUROC of a linear model inside one label, of several sources or views for the one "
            f"that it tells best: warn from {STRONG}, fail if what it tells goes with the label, "
            f"too (corrected V from {MEDIUM_V}); age and sex, which are anatomy, are shown only"
        ),
        threshold_source=f"{DISCRIMINATION}; for V, {MEDIUM_EFFECT}",
        findings=tuple(findings),
    )


def _goes_with_label(design: AuditItem, name: str) -> bool | None:
    """Return whether source or view go with the label; ``None`` if nobody knows."""
    v = corrected_v(design.tables.get(f"{name} and label", {}))
    return None if v != v else v >= MEDIUM_V


def _attributes(samples: Sequence[Sample]) -> dict[str, list[str | None]]:
    """Return attribute → value of each sample, ``None`` where it is not known."""
    ages = [years_of(sample.metadata.get("age", "")) for sample in samples]
    known = [age for age in ages if age is not None]
    middle = float(np.median(known)) if known else 0.0
    return {
        "source": [sample.source for sample in samples],
        "view": [s.view if s.view != UNKNOWN_VIEW else None for s in samples],
        "sex": [_SEXES.get(sex_of(s.metadata.get("sex", ""))) for s in samples],
        "age": [None if age is None else f"{age >= middle}" for age in ages],
    }


def _knowledge(
    data: AuditData,
    features: NDArray[np.float32],
    inside: NDArray[np.bool_],
    label: str,
    name: str,
    values: list[str | None],
) -> AuditFinding:
    what = {"age": "age above the median"}.get(name, name)
    base: dict[str, Any] = {"name": f"{name}_in_{label}", "what": f"{what}, among {label}"}
    texts = np.array([value or "" for value in values])
    sizes = {v: int((inside & (texts == v)).sum()) for v in np.unique(texts[inside]) if v}
    patients = {v: len(set(data.groups[inside & (texts == v)])) for v in sizes}
    kept = [v for v in sizes if sizes[v] >= SMALL and patients[v] >= FOLDS]
    among = np.flatnonzero(inside & np.isin(texts, kept))
    folds = None
    if len(kept) > 1:
        folds = grouped_folds(texts[among], data.groups[among], seed=data.how["seed"])
    if folds is None:
        why = f"Fewer than two values with {SMALL} images of {FOLDS} patients."
        return AuditFinding(**base, metric="auroc", estimate=undefined(data), meaning=why)
    scores = held_out_scores(features[among], texts[among], folds)
    is_it = (texts[among, np.newaxis] == np.array(kept)).astype(int)
    # One source of many may stand out, and give the label away: a mean would hide it.
    best = int(np.argmax([m.auroc(is_it[:, k], scores[:, k]) for k in range(len(kept))]))
    own, confidence = data.groups[among].tolist(), data.how["confidence"]
    if len(kept) > 2:  # the best of several is chosen: Bonferroni's level
        confidence = 1 - (1 - confidence) / len(kept)
    estimate = auroc_by_group(is_it[:, best], scores[:, best], own, confidence=confidence)
    meaning = ", ".join(kept)
    if len(kept) > 2:
        meaning = f"{kept[best]}, told best of {meaning}; the interval allows for the choice"
    return AuditFinding(**base, metric="auroc", estimate=estimate, meaning=meaning)


# ---------------------------------------------------------------- 6. the heat


def heat_item(data: AuditData, heat: LungHeat) -> AuditItem:
    """Return whether the heat of the positive class lies in the lungs more than by chance."""
    excess, cells = heat.excess, data.size_px // STRIDE
    # There is no interval where nothing has heat, all is of one patient, or all is alike.
    unsure = excess.low != excess.low or excess.n < SMALL or cells < _FEWEST_CELLS
    above = excess.low > 0
    verdict = NOT_ASSESSABLE if unsure else PASS if above else WARN
    reason = {
        PASS: "More of the heat lies in the lungs' region than its area explains.",
        WARN: "No more of the heat lies in the lungs' region than its area explains.",
        NOT_ASSESSABLE: f"It takes {SMALL} images with heat and lungs, and a heatmap of "
        f"{_FEWEST_CELLS} × {_FEWEST_CELLS} cells or more; this one has {cells} × {cells}.",
    }[verdict]
    left = f"{heat.without_heat} without heat and {heat.without_lungs} without lungs were left out."
    return AuditItem(
        name="heat",
        question=f"Does the heat for {data.question.positive} lie in the lungs?",
        verdict=verdict,
        reason=f"{reason} {left}",
        threshold="share of the heat in the lungs' region less its share of the area: warn unless "
        "the interval is above 0; never fail, because a heatmap proves nothing by itself",
        threshold_source="the energy-based pointing game of Wang et al., Score-CAM, CVPR workshops "
        "2020, against heat that ignores the lungs; Adebayo et al., NeurIPS 2018",
        findings=(
            AuditFinding(
                name="share_in_lungs",
                what="share of the heat in the lungs' region",
                metric="share",
                estimate=heat.share,
                change=excess,
                meaning=f"The region's share of the image's area: {heat.area}.",
            ),
        ),
    )
