"""Decisions at a threshold, and what they are worth at the prevalence of a place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from chestxray_covid import metrics as m
from chestxray_covid.errors import real_number
from chestxray_covid.intervals import (
    Estimate,
    Groups,
    bootstrap_by_group,
    group_codes,
    proportion,
)
from chestxray_covid.metrics import Floats, Value, Weights
from chestxray_covid.notebook import ShownAsText

#: Ends of the intervals of sensitivity and specificity put together, where resamples agree.
COMBINED = "combined intervals"
GIVEN, SAME, OTHER = "given", "the same images", "other images"
OPTIMISTIC = "The threshold was chosen on the images that it is judged on: expect worse on others."
SHARED = "The threshold was chosen on images of patients who are judged here, too: expect worse."
UNTOLD = (
    "A report has no names: the threshold may have been chosen on patients who are judged here."
)
#: The coarsest next number above 1, of which no case is positive: what a specificity may give.
_ABOVE_ONE = float(np.nextafter(np.float16(1), np.float16(2)))
_ESTIMATES = ("sensitivity", "specificity", "ppv", "npv")


@dataclass(frozen=True, kw_only=True)
class OperatingPoint(ShownAsText):
    """Decisions of a model at one threshold.

    Attributes:
        title: What is told from what, for example ``"covid19 against all others"``.
        score: What the threshold is of, for example ``"p(covid19)"``; a case is called positive
            when ``score >= threshold``.
        threshold: The threshold.
        rule: How it came about, for example ``"sensitivity of at least 0.95"``.
        chosen_on: ``"given"``, ``"the same images"`` or ``"other images"``.
        caution: Why these numbers flatter the model, or may; empty if nothing says that they do.
        confusion: ``((TN, FP), (FN, TP))``; rows are the truth, columns the decision.
        sensitivity: Share of positive images called so.
        specificity: Share of other images not called so.
        ppv: Positive predictive value at ``prevalence``.
        npv: Negative predictive value at ``prevalence``.
        prevalence: Share of positives among those who are examined.
        named: Whether the user named the prevalence; else it is the share in these data, which
            says nothing about a clinic.
    """

    title: str
    score: str
    threshold: float
    rule: str
    chosen_on: str
    caution: str = ""
    confusion: tuple[tuple[int, int], tuple[int, int]]
    sensitivity: Estimate
    specificity: Estimate
    ppv: Estimate
    npv: Estimate
    prevalence: float
    named: bool

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data; ``nan`` becomes ``None``."""
        plain = {name: getattr(self, name).to_dict() for name in _ESTIMATES}
        return {**asdict(self), "confusion": [list(row) for row in self.confusion], **plain}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the operating point that :meth:`to_dict` described.

        Raises:
            ValueError: If a field is missing, unknown or impossible.
        """
        if set(data) != {f.name for f in fields(cls)}:
            raise ValueError(f"An operating point has {[f.name for f in fields(cls)]}, got {data}")
        (tn, fp), (fn, tp) = data["confusion"]
        own = {name: Estimate.from_dict(data[name]) for name in _ESTIMATES}
        counts = ((int(tn), int(fp)), (int(fn), int(tp)))
        numbers = {name: float(data[name]) for name in ("threshold", "prevalence")}
        return cls(**{**data, **own, **numbers, "confusion": counts})

    def __str__(self) -> str:
        (tn, fp), (fn, tp) = self.confusion
        whose = "named" if self.named else "of these data"
        where = "" if self.chosen_on == GIVEN else f", chosen on {self.chosen_on}"
        lines = [
            f"{self.title}, {self.score} >= {self.threshold!r} ({self.rule}{where})",
            f"  TP {tp}, FN {fn}, TN {tn}, FP {fp}",
            f"  sensitivity {self.sensitivity}, specificity {self.specificity}",
            f"  at a prevalence of {self.prevalence:.3g} ({whose}): ppv {self.ppv}, npv {self.npv}",
        ]
        return "\n".join([*lines, *([f"  {self.caution}"] if self.caution else [])])


def choose_threshold(
    y_true: ArrayLike,
    y_score: ArrayLike,
    *,
    threshold: float | None = None,
    sensitivity: float | None = None,
    specificity: float | None = None,
) -> tuple[float, str]:
    """Return the threshold that a rule gives on these data, and the rule in words.

    Args:
        y_true: ``(N,)`` 0 or 1.
        y_score: ``(N,)`` scores in [0, 1].
        threshold: Take this one, in [0, 1].
        sensitivity: Take the highest that reaches this, in (0, 1].
        specificity: Take the lowest that reaches this, in (0, 1].

    Raises:
        TypeError: If it is no number.
        ValueError: If not exactly one rule is given, or it is impossible on these data.
    """
    rules = {"threshold": threshold, "sensitivity": sensitivity, "specificity": specificity}
    given = {name: value for name, value in rules.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            "Exactly one of threshold, sensitivity and specificity must be given, "
            f"got {threshold}, {sensitivity} and {specificity}"
        )
    [(name, value)] = given.items()
    value = real_number(name, value)
    if name == "sensitivity":
        chosen = m.threshold_at_sensitivity(y_true, y_score, sensitivity=value)
        return chosen, f"sensitivity of at least {value:g}"
    if name == "specificity":
        chosen = m.threshold_at_specificity(y_true, y_score, specificity=value)
        return chosen, f"specificity of at least {value:g}"
    if not 0 <= value <= _ABOVE_ONE:
        raise ValueError(f"threshold must be in [0, 1], as scores are, got {value}")
    return value, "threshold as given"


def decide(
    y_true: ArrayLike,
    y_score: ArrayLike,
    patients: Groups,
    *,
    threshold: float,
    prevalence: float | None = None,
    **how: Any,
) -> dict[str, Any]:
    """Return the numbers of an :class:`OperatingPoint` as keyword arguments of it.

    Args:
        y_true: ``(N,)`` 0 or 1.
        y_score: ``(N,)`` scores.
        patients: ``(N,)`` patients.
        threshold: From which on a case is called positive.
        prevalence: For the predictive values, in (0, 1); that of the data if not given.
        **how: Options of the bootstrap.

    Raises:
        TypeError: If ``prevalence`` is no number.
        ValueError: If an argument is not as said.
    """
    if prevalence is not None:
        prevalence = real_number("prevalence", prevalence)
        if not 0 < prevalence < 1:
            raise ValueError(
                f"prevalence must be inside (0, 1), for example 0.02, got {prevalence}"
            )
    labels, scores = m.scored(y_true, y_score)
    owners = group_codes(patients)
    m.check_lengths(y_true=labels, patients=owners)
    truth, called = labels.astype(bool), scores >= threshold
    (tn, fp), (fn, tp) = m.confusion_matrix(truth, called, 2).tolist()
    found: dict[str, Any] = {
        "sensitivity": proportion(called[truth], owners[truth], **how),
        "specificity": proportion(~called[~truth], owners[~truth], **how),
    }
    if prevalence is None:
        found["ppv"] = proportion(truth[called], owners[called], **how)
        found["npv"] = proportion(~truth[~called], owners[~called], **how)
    else:
        for name in ("ppv", "npv"):
            found[name] = _at_prevalence(name, truth, called, owners, prevalence, **how)
    return {
        **found,
        "threshold": threshold,
        "confusion": ((tn, fp), (fn, tp)),
        "prevalence": float(truth.mean() if prevalence is None else prevalence),
        "named": prevalence is not None,
    }


def ppv_at(sensitivity: Any, specificity: Any, prevalence: float) -> Any:
    """Return the share of positive calls that are right at a prevalence (Bayes' theorem).

    >>> round(float(ppv_at(0.9, 0.9, 0.02)), 3)
    0.155
    """
    right = np.asarray(sensitivity) * prevalence
    calls = right + (1 - np.asarray(specificity)) * (1 - prevalence)
    return np.where(calls > 0, right / np.where(calls > 0, calls, 1), np.nan)[()]


def npv_at(sensitivity: Any, specificity: Any, prevalence: float) -> Any:
    """Return the share of negative calls that are right at a prevalence (Bayes' theorem).

    >>> round(float(npv_at(0.9, 0.9, 0.02)), 4)
    0.9977
    """
    return ppv_at(specificity, sensitivity, 1 - prevalence)


def _at_prevalence(
    name: str, truth: Any, called: Any, patients: Any, prevalence: float, **how: Any
) -> Estimate:
    """Return a predictive value, resampled; sensitivity and specificity are the data's.

    If one of them is 0 or 1, no resample says how sure that is. Then the ends of their intervals
    are put together, each at the level 1 - (1 - confidence) / 2, so that both hold at once with
    at least the wanted confidence (Bonferroni): predictive values grow with both.
    """
    formula = ppv_at if name == "ppv" else npv_at

    def statistic(truth: Floats, called: Floats, *, sample_weight: Weights) -> Value:
        hit = m.sensitivity(truth, called, sample_weight=sample_weight)
        spared = m.specificity(truth, called, sample_weight=sample_weight)
        return formula(hit, spared, prevalence)

    found = bootstrap_by_group(statistic, patients, truth, called, **how)
    rates = (called[truth].mean(), (~called[~truth]).mean()) if 0 < truth.mean() < 1 else (0.5,)
    if math.isnan(found.value) or all(0 < rate < 1 for rate in rates):
        return found
    level = 1 - (1 - found.confidence) / 2
    wide = {**how, "confidence": level}
    hit = proportion(called[truth], patients[truth], **wide)
    spared = proportion(~called[~truth], patients[~truth], **wide)
    return Estimate(
        value=found.value,
        low=float(formula(hit.low, spared.low, prevalence)),
        high=float(formula(hit.high, spared.high, prevalence)),
        n=found.n,
        method=COMBINED,
        confidence=found.confidence,
    )
