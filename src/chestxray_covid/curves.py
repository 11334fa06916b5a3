"""Curves with intervals, ready to be drawn: nothing is left to compute for a figure.

Functions take ``y_true``, ``y_score`` or ``probabilities`` as :mod:`chestxray_covid.metrics` does,
and ``patients`` ``(N,)``, by which the bands are resampled. ``how`` are the options of
:func:`~chestxray_covid.intervals.bootstrap_by_group`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from chestxray_covid import metrics as m
from chestxray_covid.delong import auroc_by_group
from chestxray_covid.intervals import (
    Estimate,
    Groups,
    band_by_group,
    bootstrap_by_group,
    bootstrap_together,
    group_codes,
    proportion,
)
from chestxray_covid.metrics import Floats, Labels, Weights

if TYPE_CHECKING:
    import pandas as pd

#: Newton's steps; some eight are enough, unless there is no answer, or the way is nearly flat.
_STEPS = 60
#: They have ended where one moves less: each has twice the digits of the one before.
_ENDED = 1e-6
#: Least distance of a probability to 0 and 1, whose logits are infinite; as in the R package
#: CalibrationCurves of Van Calster's group.
_LEAST = 1e-8
#: Points of a band, evenly over [0, 1].
_GRID = np.linspace(0, 1, 101)


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """Points, a band, and the number that sums them up.

    Attributes:
        title: What is told from what, for example ``"covid19 against all others"``.
        x: ``(P,)`` abscissa; what it is, each kind of curve says.
        y: ``(P,)`` ordinate.
        thresholds: ``(P,)`` score from which on (``>=``) a case counts at each point; ``inf`` where
            none does.
        grid: ``(G,)`` abscissae of the band.
        low: ``(G,)`` lower end of the pointwise band, ``nan`` where there is none.
        high: ``(G,)`` upper end.
        area: The one number that sums the curve up.
    """

    title: str = ""
    x: Floats
    y: Floats
    thresholds: Floats
    grid: Floats
    low: Floats
    high: Floats
    area: Estimate

    def to_frame(self) -> pd.DataFrame:
        """Return the points: ``x``, ``y`` and ``threshold``."""
        import pandas as pd

        return pd.DataFrame({"x": self.x, "y": self.y, "threshold": self.thresholds})


class RocCurve(Curve):
    """Sensitivity (``y``) over 1 - specificity (``x``), both ascending; ``area`` is the AUROC.

    Straight between its points. The band is that of the sensitivity at a specificity (vertical
    averaging: Fawcett, An introduction to ROC analysis, Pattern Recognition Letters 27 (2006)
    861–874).
    """


@dataclass(frozen=True, kw_only=True, eq=False)
class PrecisionRecallCurve(Curve):
    """Precision (``y``) over recall (``x``, ascending); ``area`` is the average precision.

    Steps: a precision holds from the recall before it up to its own. Chance is a level line at
    ``prevalence``.

    Attributes:
        prevalence: Share of positive images in these data.
    """

    prevalence: float


class RiskCoverageCurve(Curve):
    """Risk (``y``) over coverage (``x``, ascending) of a model that may abstain.

    Coverage is the share of images with a confidence (largest probability) of at least the
    threshold, risk the share of wrong decisions among them; ``area`` is the mean risk over
    coverage, AURC: see :func:`~chestxray_covid.metrics.area_under_risk_coverage`. The band is that
    of the risk at the smallest coverage not below that of the grid.
    """


@dataclass(frozen=True, kw_only=True, eq=False)
class Reliability:
    """A reliability diagram: how often what was said with a probability came true.

    Bins have equal width over [0, 1] and contain their upper edge; empty ones are left out.

    Attributes:
        title: What the probability is of.
        low_edges: ``(B,)`` lower edges of the bins.
        high_edges: ``(B,)`` upper edges.
        predicted: ``(B,)`` mean probability in each bin.
        observed: B shares that came true, with intervals by patient.
        ece: Mean gap between the two, biased upwards where bins hold few images.
        brier: Mean squared distance of the probability to what happened, 0 the best.
        intercept: Logit by which the probabilities are too low on the whole, 0 the best; below 0
            they are too high.
        slope: Of a logistic regression on their logits, 1 the best; below 1 they are too extreme,
            above too timid. Both: Van Calster et al., Calibration: the Achilles heel of predictive
            analytics, BMC Medicine 17 (2019) 230, weak calibration; ``nan`` if only one thing
            happened, and the slope also if the probabilities separate what did from what did not,
            or are all the same.
    """

    title: str = ""
    low_edges: Floats
    high_edges: Floats
    predicted: Floats
    observed: tuple[Estimate, ...]
    ece: Estimate
    brier: Estimate
    intercept: Estimate
    slope: Estimate

    @property
    def counts(self) -> Labels:
        """``(B,)`` images in each bin."""
        return np.array([e.n for e in self.observed], dtype=np.int64)

    def to_frame(self) -> pd.DataFrame:
        """Return a row per bin: ``low_edge``, ``high_edge``, ``predicted``, ``observed``, …."""
        import pandas as pd

        columns = {
            "low_edge": self.low_edges,
            "high_edge": self.high_edges,
            "predicted": self.predicted,
            **{k: [getattr(e, k) for e in self.observed] for k in ("value", "low", "high", "n")},
        }
        return pd.DataFrame(columns).rename(columns={"value": "observed"})


def roc_curve(
    y_true: ArrayLike,
    y_score: ArrayLike,
    patients: Groups,
    *,
    title: str = "",
    **how: Any,
) -> RocCurve:
    """Return the receiver operating characteristic with its band.

    Raises:
        ValueError: If a class is missing, or an argument is not as said.
    """
    scores, positive, negative = m.by_score(y_true, y_score)
    _check_both(positive, negative)
    area = auroc_by_group(y_true, y_score, patients, confidence=how.get("confidence", 0.95))
    return RocCurve(
        title=title,
        x=_rise(negative),
        y=_rise(positive),
        thresholds=np.append(np.inf, scores[::-1]),
        **_band(_sensitivity_on_grid, area, patients, y_true, y_score, **how),
    )


def precision_recall_curve(
    y_true: ArrayLike,
    y_score: ArrayLike,
    patients: Groups,
    *,
    title: str = "",
    **how: Any,
) -> PrecisionRecallCurve:
    """Return precision over recall with its band.

    Raises:
        ValueError: If a class is missing, or an argument is not as said.
    """
    scores, positive, negative = m.by_score(y_true, y_score)
    _check_both(positive, negative)
    hits, called = np.cumsum(positive[::-1]), np.cumsum((positive + negative)[::-1])
    area = bootstrap_by_group(m.average_precision, patients, y_true, y_score, **how)
    return PrecisionRecallCurve(
        title=title,
        # At recall 0 nothing is called, and precision is 1 by convention, as in scikit-learn.
        x=np.append(0.0, hits / hits[-1]),
        y=np.append(1.0, hits / called),
        thresholds=np.append(np.inf, scores[::-1]),
        prevalence=float(positive.sum() / called[-1]),
        **_band(_precision_on_grid, area, patients, y_true, y_score, **how),
    )


def risk_coverage_curve(
    y_true: ArrayLike,
    probabilities: ArrayLike,
    patients: Groups,
    *,
    title: str = "",
    **how: Any,
) -> RiskCoverageCurve:
    """Return the risk over the coverage, for a model that abstains where it is least sure.

    Raises:
        ValueError: If an argument is not as said.
    """
    area = bootstrap_by_group(m.area_under_risk_coverage, patients, y_true, probabilities, **how)
    p = m.check_probabilities(probabilities)
    wrong, sure = p.argmax(1) != np.asarray(y_true), p.max(1)
    scores, errors, right = m.by_score(wrong, sure)
    kept = np.cumsum((errors + right)[::-1])
    return RiskCoverageCurve(
        title=title,
        x=kept / kept[-1],
        y=np.cumsum(errors[::-1]) / kept,
        thresholds=scores[::-1],
        **_band(_risk_on_grid, area, patients, wrong, sure, **how),
    )


def reliability(
    y_true: ArrayLike,
    y_prob: ArrayLike,
    patients: Groups,
    *,
    n_bins: int = 15,
    title: str = "",
    **how: Any,
) -> Reliability:
    """Return the reliability diagram of the probability ``y_prob`` ``(N,)`` of an event.

    Args:
        y_true: ``(N,)`` 1 where the event happened, else 0.
        y_prob: ``(N,)`` in [0, 1].
        patients: ``(N,)`` patients.
        n_bins: Bins over [0, 1].
        title: What the probability is of.
        **how: Options of the bootstrap.

    Raises:
        ValueError: If an argument is not as said.
    """

    def gap(truth: ArrayLike, p: ArrayLike, *, sample_weight: Weights) -> m.Value:
        return m.calibration_error(truth, p, n_bins=n_bins, sample_weight=sample_weight)

    def squared(truth: Floats, p: Floats, *, sample_weight: Weights) -> m.Value:
        return m.mean_among((p - truth) ** 2, sample_weight=sample_weight)

    truth, p = m.scored(y_true, y_prob)
    bins, owners = m.bin_of(p, n_bins), group_codes(patients)
    m.check_lengths(y_true=truth, patients=owners)
    used = np.unique(bins)
    edges = np.linspace(0, 1, n_bins + 1)
    return Reliability(
        title=title,
        low_edges=edges[used],
        high_edges=edges[used + 1],
        predicted=np.array([p[bins == b].mean() for b in used]),
        observed=tuple(proportion(truth[bins == b], owners[bins == b], **how) for b in used),
        **bootstrap_together(
            {
                "ece": (gap, truth, p),
                "brier": (squared, truth, p),
                "intercept": (_intercept, truth, p),
                "slope": (_slope, truth, p),
            },
            patients,
            **how,
        ),
    )


def _intercept(truth: Labels, p: Floats, *, sample_weight: Floats) -> Floats:
    """Return the ``(R,)`` intercepts of logistic regressions with the logit of ``p`` as offset.

    Each try bounds the answer, for the score only falls. Where probabilities are near 0 and 1 it
    is so flat in between that Newton's steps leave the bounds; then their middle is tried.
    """
    from scipy.special import expit, logit

    x = logit(np.clip(p, _LEAST, 1 - _LEAST))
    happened = logit(sample_weight @ truth / sample_weight.sum(1))  # infinite: always, or never
    low, high = happened - x.max(), happened - x.min()
    a = np.clip(0.0, low, high)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for _ in range(_STEPS):
            said = expit(a[:, None] + x)
            score = (sample_weight * (truth - said)).sum(1)
            low, high = np.where(score > 0, a, low), np.where(score < 0, a, high)
            step = a + score / (sample_weight * said * (1 - said)).sum(1)
            tried = np.where((low <= step) & (step <= high), step, (low + high) / 2)
            a, moved = tried, np.abs(tried - a)
            if not (moved > _ENDED).any():
                break
    return np.where(np.isfinite(happened) & (moved <= _ENDED), a, np.nan)


def _slope(truth: Labels, p: Floats, *, sample_weight: Floats) -> Floats:
    """Return the ``(R,)`` slopes of logistic regressions on the logit of ``p``.

    They are ``nan`` where what happened and what did not are separated, or the steps do not end.
    """
    from scipy.special import expit, logit

    x = logit(np.clip(p, _LEAST, 1 - _LEAST))
    # Newton's steps alone do not tell: far out, where there is no answer, rounding may end them.
    drawn = (sample_weight * truth > 0, sample_weight * (1 - truth) > 0)
    high, other_high = (np.where(side, x, -np.inf).max(1) for side in drawn)
    low, other_low = (np.where(side, x, np.inf).min(1) for side in drawn)
    overlap = (high > other_low) & (other_high > low)
    a, b, moved = (np.full(len(sample_weight), start) for start in (0.0, 0.0, np.inf))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for _ in range(_STEPS):
            said = expit(a[:, None] + b[:, None] * x)
            rest = sample_weight * (truth - said)
            spread = sample_weight * said * (1 - said)  # (R, N)
            score, curvature = rest.sum(1), spread.sum(1)
            along, across, square = rest @ x, spread @ x, spread @ (x * x)
            both = curvature * square - across**2
            in_a = (square * score - across * along) / both
            in_b = (curvature * along - across * score) / both
            a, b, moved = a + in_a, b + in_b, np.abs(in_a) + np.abs(in_b)
            if not (moved > _ENDED).any():
                break
    return np.where(overlap & (moved <= _ENDED), b, np.nan)


def _check_both(positive: Floats, negative: Floats) -> None:
    if not (positive.any() and negative.any()):
        raise ValueError(
            f"A curve needs images of both kinds, got {positive.sum():g} positive "
            f"and {negative.sum():g} negative"
        )


def _rise(weights: Floats) -> Floats:
    """Return the share at or above each score, from none to all."""
    return np.append(0.0, np.cumsum(weights[::-1]) / weights.sum())


def _band(curve: Any, area: Estimate, patients: Groups, *arrays: Any, **how: Any) -> dict[str, Any]:
    low, high = band_by_group(curve, patients, *arrays, **how)
    if np.isnan(area.low):  # without width, as of a perfect order
        low, high = np.full_like(low, np.nan), np.full_like(high, np.nan)
    return {"grid": _GRID, "low": low, "high": high, "area": area}


def _sensitivity_on_grid(y_true: Any, y_score: Any, *, sample_weight: Floats) -> Floats:
    _, positive, negative = m.by_score(y_true, y_score, sample_weight=sample_weight)
    rows = [
        np.interp(_GRID, _rise(n), _rise(p)) if p.any() and n.any() else np.full(len(_GRID), np.nan)
        for p, n in zip(positive, negative, strict=True)
    ]
    return np.stack(rows)


def _precision_on_grid(y_true: Any, y_score: Any, *, sample_weight: Floats) -> Floats:
    _, *weights = m.by_score(y_true, y_score, sample_weight=sample_weight)
    positive, negative = (w[:, ::-1] for w in weights)
    hits, called = np.cumsum(positive, -1), np.cumsum(positive + negative, -1)
    return _steps(hits, hits / np.where(called > 0, called, 1), positive.sum(-1) * negative.sum(-1))


def _risk_on_grid(wrong: Any, sure: Any, *, sample_weight: Floats) -> Floats:
    _, *weights = m.by_score(wrong, sure, sample_weight=sample_weight)
    errors, right = (w[:, ::-1] for w in weights)
    kept = np.cumsum(errors + right, -1)
    return _steps(kept, np.cumsum(errors, -1) / np.where(kept > 0, kept, 1), kept[:, -1])


def _steps(reached: Floats, value: Floats, defined: Floats) -> Floats:
    """Return ``(R, G)``: the value where ``reached``, as a share of its end, gets to the grid."""
    rows = np.full((len(value), len(_GRID)), np.nan)
    for row in np.flatnonzero(defined > 0):
        # Images that a resample did not draw repeat the point before; the first one that has
        # something is meant at 0, too.
        share = reached[row] / reached[row, -1]
        first = int(np.argmax(share > 0))
        at = np.searchsorted(share, _GRID - 1e-12, side="left")
        rows[row] = value[row, np.maximum(at, first)]
    return rows
