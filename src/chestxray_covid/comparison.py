"""Two models on the same images: is the difference more than chance?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from chestxray_covid import metrics as m
from chestxray_covid.delong import (
    DELONG,
    DELONG_BY_PATIENT,
    NO_VARIANCE,
    auroc_by_group,
    auroc_covariance,
    degrees_of_freedom,
)
from chestxray_covid.intervals import (
    Estimate,
    Groups,
    bootstrap_by_group,
    check_resampling,
    group_codes,
    proportion,
)
from chestxray_covid.metrics import Floats, Labels, Value
from chestxray_covid.notebook import ShownAsText


@dataclass(frozen=True, kw_only=True)
class DeLongTest:
    """The test of two AUROCs on the same images.

    Attributes:
        difference: First minus second AUROC, with the interval of Student's t.
        z: The difference over its standard error, ``nan`` if that is 0.
        p_value: Two-sided, by Student's t, of the hypothesis that the AUROCs are equal; ``nan``
            with ``z``.
    """

    difference: Estimate
    z: float
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data; ``nan`` becomes ``None``."""
        numbers = {"z": self.z, "p_value": self.p_value}
        plain = {name: None if math.isnan(value) else value for name, value in numbers.items()}
        return {"difference": self.difference.to_dict(), **plain}


@dataclass(frozen=True, kw_only=True)
class Comparison(ShownAsText):
    """Two models on the same images.

    Attributes:
        title: What is told from what, for example ``"covid19 against all others"``.
        n_images: Images.
        n_patients: Patients.
        first: Metric → the first model's number; ``auroc``, ``average_precision``, ``brier`` (of
            the score), ``sensitivity`` and ``specificity`` (of the class of the highest
            probability, whatever threshold the model has).
        second: The same of the second model.
        differences: Metric → first minus second, of the AUROCs as in ``delong``, of the others
            resampled by patient, both models on the same resample. No difference is shown where
            the interval holds 0.
        delong: The test of the AUROCs.
    """

    title: str
    n_images: int
    n_patients: int
    first: Mapping[str, Estimate]
    second: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    delong: DeLongTest

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data; ``nan`` becomes ``None``."""
        numbers = {
            name: {metric: estimate.to_dict() for metric, estimate in getattr(self, name).items()}
            for name in ("first", "second", "differences")
        }
        counts = {"n_images": self.n_images, "n_patients": self.n_patients}
        return {"title": self.title, **counts, **numbers, "delong": self.delong.to_dict()}

    def __str__(self) -> str:
        rows = [
            f"  {name}: {self.first[name].value:.3f} - {self.second[name].value:.3f} = {difference}"
            for name, difference in self.differences.items()
        ]
        test = self.delong
        return "\n".join(
            [
                f"{self.title}, {self.n_images} images of {self.n_patients} patients, "
                "first - second:",
                *rows,
                f"  DeLong's test of the AUROCs: z = {test.z:.3f}, p = {test.p_value:.3g}",
            ]
        )


def delong_test(
    y_true: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    patients: Groups,
    *,
    confidence: float = 0.95,
) -> DeLongTest:
    """Return whether two AUROCs on the same images differ.

    With the covariance of :func:`~chestxray_covid.delong.auroc_covariance`, DeLong's, and
    Obuchowski's where a patient has several images; and, our choice, with Student's t as in
    :func:`~chestxray_covid.delong.auroc_by_group` in place of the normal distribution, whose
    interval is narrower with few patients. ``benchmarks/interval_coverage.py`` says how often the
    interval holds the true difference.

    Args:
        y_true: ``(N,)`` 0 or 1.
        first: ``(N,)`` scores of the first model.
        second: ``(N,)`` scores of the second.
        patients: ``(N,)`` patients.
        confidence: Level of the interval, in (0, 1).

    Raises:
        ValueError: If an argument is not as said, or fewer than two patients have a positive or a
            negative image.
    """
    from scipy.special import stdtr, stdtrit

    confidence = check_resampling(n_resamples=1, confidence=confidence)["confidence"]
    truth = m.check_labels(y_true, "y_true", 2).astype(bool)
    given = m.check_numbers(first, "first", 1), m.check_numbers(second, "second", 1)
    codes = group_codes(patients)
    m.check_lengths(y_true=truth, first=given[0], second=given[1], patients=codes)
    scores = np.stack(given)
    for name, rows in (("positive", truth), ("negative", ~truth)):
        if len(np.unique(codes[rows])) < 2:
            raise ValueError(f"DeLong's test needs two patients with a {name} image")
    areas = np.array([m.auroc(truth, score) for score in scores])
    contrast = np.array([1.0, -1.0])
    variance = float(contrast @ auroc_covariance(truth, scores, areas, codes) @ contrast)
    difference = float(contrast @ areas)
    error = math.sqrt(variance) if variance > NO_VARIANCE else math.nan
    freedom = degrees_of_freedom(truth, codes)
    z = difference / error
    half = float(stdtrit(freedom, (1 + confidence) / 2)) * error
    estimate = Estimate(
        value=difference,
        low=difference - half,
        high=difference + half,
        n=len(truth),
        method=DELONG if codes.max() + 1 == len(truth) else DELONG_BY_PATIENT,
        confidence=confidence,
    )
    return DeLongTest(difference=estimate, z=z, p_value=2 * float(stdtr(freedom, -abs(z))))


def compare_scores(
    y_true: ArrayLike,
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    patients: Groups,
    *,
    title: str = "",
    **how: Any,
) -> Comparison:
    """Return how two models differ on the same images.

    Args:
        y_true: ``(N,)`` 0 or 1.
        first: Of the first model, ``(N,)`` scores in [0, 1] and ``(N,)`` decisions 0 or 1.
        second: Of the second.
        patients: ``(N,)`` patients.
        title: What is told from what.
        **how: Options of the bootstrap.

    Raises:
        ValueError: As in :func:`delong_test`, or if an option is impossible.
    """

    def brier(truth: Floats, p: Floats, *, sample_weight: Any) -> Value:
        return m.mean_among((p - truth) ** 2, sample_weight=sample_weight)

    metrics: dict[str, tuple[Any, int]] = {
        "average_precision": (m.average_precision, 0),
        "brier": (brier, 0),
        "sensitivity": (m.sensitivity, 1),
        "specificity": (m.specificity, 1),
    }
    truth = m.check_labels(y_true, "y_true", 2)
    sides = [tuple(np.asarray(a, np.float64) for a in side) for side in (first, second)]
    confidence = how.get("confidence", 0.95)
    delong = delong_test(truth, sides[0][0], sides[1][0], patients, confidence=confidence)
    levels = [
        {"auroc": auroc_by_group(truth, scores, patients, confidence=confidence)}
        for scores, _ in sides
    ]
    differences = {"auroc": delong.difference}
    for name, (metric, which) in metrics.items():

        def gap(t: Floats, a: Floats, b: Floats, *, sample_weight: Any, of: Any = metric) -> Value:
            return of(t, a, sample_weight=sample_weight) - of(t, b, sample_weight=sample_weight)

        both = [side[which] for side in sides]
        for level, given in zip(levels, both, strict=True):
            level[name] = _alone(name, metric, truth, given, patients, how)
        differences[name] = bootstrap_by_group(gap, patients, truth, *both, **how)
    return Comparison(
        title=title,
        n_images=len(truth),
        n_patients=int(group_codes(patients).max()) + 1,
        first=levels[0],
        second=levels[1],
        differences=differences,
        delong=delong,
    )


def _alone(
    name: str, metric: Any, truth: Labels, given: Floats, patients: Groups, how: dict[str, Any]
) -> Estimate:
    """Return a number of one model, with the interval that its own report gives it."""
    sides = {"sensitivity": 1, "specificity": 0}
    if name not in sides:
        return bootstrap_by_group(metric, patients, truth, given, **how)
    among = truth == sides[name]
    hits = (given[among] == sides[name]).astype(int)
    return proportion(hits, group_codes(patients)[among], **how)
