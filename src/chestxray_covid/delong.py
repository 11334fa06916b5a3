"""AUROCs, and how sure they are where images of one patient are alike."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from chestxray_covid.intervals import Estimate, Groups, check_resampling, group_codes
from chestxray_covid.metrics import Floats, auroc, check_lengths, scored

DELONG = "delong"
DELONG_BY_PATIENT = "delong by patient"
#: Rounding may leave a variance of 0 as much as this.
NO_VARIANCE = 1e-24


def auroc_by_group(
    y_true: ArrayLike, y_score: ArrayLike, groups: Groups, *, confidence: float = 0.95
) -> Estimate:
    """Return an AUROC with an interval that knows patients.

    With the variance of :func:`auroc_covariance`, on the logit scale, so that the interval stays
    within 0 and 1 (Qin and Hotilovac, Comparison of non-parametric confidence intervals for the
    area under the ROC curve of a continuous-scale diagnostic test, Statistical Methods in Medical
    Research 17 (2008) 207–221); and, our choice, with Student's t of one degree of freedom less
    than the rarer class has patients, from which most of the variance comes. Bootstrapping patients
    gives intervals that are too narrow near 1, and where a class has few:
    ``benchmarks/interval_coverage.py`` compares them.

    The interval is ``nan`` where it would have no width, as at exactly 1, where a class has fewer
    than two patients, and where the estimated variance is not positive, which happens with few
    patients who have images of both classes.

    Args:
        y_true: ``(N,)`` 0 or 1; N may be 0, and a class be missing, which gives ``nan``.
        y_score: ``(N,)`` finite scores.
        groups: ``(N,)`` patient of each image, anything hashable.
        confidence: Level of the interval, in (0, 1).

    Raises:
        ValueError: If lengths differ, or an argument is not as said.

    >>> print(auroc_by_group([0, 0, 0, 1, 1, 1], [0.1, 0.4, 0.5, 0.3, 0.8, 0.9], "abcdef"))
    0.778 (0.007–0.999, n = 6)
    """
    confidence = check_resampling(n_resamples=1, confidence=confidence)["confidence"]
    codes, n = group_codes(groups), np.size(y_true)
    nothing = Estimate(value=math.nan, n=n, method=DELONG_BY_PATIENT, confidence=confidence)
    if n == np.size(y_score) == len(codes) == 0:
        return nothing
    labels, score = scored(y_true, y_score)
    check_lengths(y_true=labels, groups=codes)
    truth, value = labels.astype(bool), float(auroc(labels, score))
    method = DELONG if codes.max() + 1 == n else DELONG_BY_PATIENT
    found = replace(nothing, value=value, method=method)
    freedom = degrees_of_freedom(truth, codes)
    if not 0 < value < 1 or freedom < 1:
        return found
    covariance = auroc_covariance(truth, score[np.newaxis], np.array([value]), codes)
    low, high = _logit_interval(value, float(covariance[0, 0]), freedom, confidence)
    return replace(found, low=low, high=high)


def degrees_of_freedom(truth: Any, codes: Any) -> int:
    """Return those of Student's t: one less than the rarer class has patients.

    Args:
        truth: ``(N,)`` bool.
        codes: ``(N,)`` patients as numbers from 0.
    """
    return min(len(np.unique(codes[side])) for side in (truth, ~truth)) - 1


def auroc_covariance(truth: Any, scores: Floats, areas: Floats, codes: Any) -> Floats:
    """Return the covariance of the AUROCs of several scores of the same images.

    Obuchowski, Nonparametric analysis of clustered ROC curve data, Biometrics 53 (1997) 567–578;
    where each patient has one image, it is that of DeLong, DeLong and Clarke-Pearson, Comparing the
    areas under two or more correlated receiver operating characteristic curves, Biometrics 44
    (1988) 837–845.

    Args:
        truth: ``(N,)`` bool, with two patients or more on either side.
        scores: ``(K, N)``.
        areas: ``(K,)`` their AUROCs.
        codes: ``(N,)`` patients as numbers from 0.

    Returns:
        ``(K, K)``.
    """
    patients = int(codes.max()) + 1
    sums, factors = [], [patients / (patients - 1)]
    for kind, sign in ((truth, 1), (~truth, -1)):
        # How each image fares against all of the other kind, and how far that is off the mean.
        placed = np.stack([_placed(sign * s[kind], sign * s[~kind]) for s in scores])  # (K, n)
        off = (placed - areas[:, None]) / kind.sum()
        sums.append(np.stack([np.bincount(codes[kind], row, patients) for row in off]))  # (K, P)
        owners = len(np.unique(codes[kind]))
        factors.append(owners / (owners - 1))
    positive, negative = sums
    cross = factors[0] * positive @ negative.T
    within = factors[1] * positive @ positive.T + factors[2] * negative @ negative.T
    return np.asarray(within + cross + cross.T)


def _placed(own: Floats, other: Floats) -> Floats:
    """Return for each number the share of the others that are below it, ties counting half."""
    ranked = np.sort(other)
    below = np.searchsorted(ranked, own, "left") + np.searchsorted(ranked, own, "right")
    return below / (2 * len(other))


def _logit_interval(
    value: float, variance: float, freedom: int, confidence: float
) -> tuple[float, float]:
    from scipy.special import expit, logit, stdtrit

    if not variance > NO_VARIANCE:
        return math.nan, math.nan
    error = math.sqrt(variance) / (value * (1 - value))  # by the delta method
    half = float(stdtrit(freedom, (1 + confidence) / 2)) * error
    low, high = (float(expit(logit(value) + sign * half)) for sign in (-1, 1))
    return low, high
