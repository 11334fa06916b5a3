"""What a classifier's answers are worth, as pure functions over arrays.

Metrics take ``y_true`` ``(N,)`` whole labels, then what is judged, in the same order: ``y_pred``
``(N,)`` labels, ``y_score`` ``(N,)`` finite scores, higher for positive, or ``probabilities``
``(N, K)`` in [0, 1] with rows summing to 1. N is at least 1. Binary labels are 1 for COVID-19 and
0 for everything else. All else is a ``ValueError`` or ``TypeError`` that says what was expected.

``sample_weight`` is ``(N,)`` or ``(R, N)``, not negative; with the latter a metric returns the
``(R,)`` values of R weightings at once. A bootstrap resample is such a weighting (how often each
image was drawn), so a thousand of them cost little more than one.

A metric that is not defined, for example a sensitivity without a positive case, is ``nan``.
Only NumPy is needed; the tests compare every number with scikit-learn or SciPy.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chestxray_covid.errors import real_number, whole_number

Floats: TypeAlias = NDArray[np.float64]
Labels: TypeAlias = NDArray[np.int64]
Weights: TypeAlias = ArrayLike | None
#: ``float``, or ``(R,)`` float64 for ``(R, N)`` weights; NumPy types its own reductions so.
Value: TypeAlias = Any

_MAX_CLASSES = 1000
#: Rows of probabilities from half precision sum to 1 within this.
_SUM_TOLERANCE = 1e-3


def confusion_matrix(y_true: ArrayLike, y_pred: ArrayLike, n_classes: int) -> Labels:
    """Return ``(K, K)`` counts; rows are the truth, columns the prediction.

    >>> confusion_matrix([0, 0, 1], [0, 1, 1], n_classes=2).tolist()
    [[1, 1], [0, 1]]
    """
    truth, predicted = _label_pair(y_true, y_pred, n_classes)
    return np.bincount(truth * n_classes + predicted, minlength=n_classes**2).reshape(n_classes, -1)


def sensitivity(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: Weights = None) -> Value:
    """Return the share of positive cases that were called positive, ``nan`` without any.

    >>> sensitivity([1, 1, 0, 0], [1, 0, 0, 0])
    0.5
    """
    truth, predicted = _label_pair(y_true, y_pred, 2)
    return mean_among(predicted == 1, truth == 1, sample_weight=sample_weight)


def specificity(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: Weights = None) -> Value:
    """Return the share of negative cases that were called negative, ``nan`` without any."""
    truth, predicted = _label_pair(y_true, y_pred, 2)
    return mean_among(predicted == 0, truth == 0, sample_weight=sample_weight)


def ppv(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: Weights = None) -> Value:
    """Return the share of positive calls that are right, at this data's prevalence, or ``nan``."""
    truth, predicted = _label_pair(y_true, y_pred, 2)
    return mean_among(truth == 1, predicted == 1, sample_weight=sample_weight)


def npv(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: Weights = None) -> Value:
    """Return the share of negative calls that are right, at this data's prevalence, or ``nan``."""
    truth, predicted = _label_pair(y_true, y_pred, 2)
    return mean_among(truth == 0, predicted == 0, sample_weight=sample_weight)


def accuracy(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: Weights = None) -> Value:
    """Return the share of right decisions; labels are 0 to 999."""
    truth, predicted = _label_pair(y_true, y_pred, _MAX_CLASSES)
    return mean_among(truth == predicted, sample_weight=sample_weight)


def cohen_kappa(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: Weights = None) -> Value:
    """Return Cohen's unweighted kappa, the agreement beyond chance; labels are 0 to 999.

    1 is perfect, 0 what independent decisions of the same frequencies reach, below 0 worse than
    that; ``nan`` if truth and decisions are all one and the same class. Cohen, A coefficient of
    agreement for nominal scales, Educational and Psychological Measurement 20 (1960) 37–46.

    >>> cohen_kappa([0, 0, 1, 1], [0, 1, 0, 1])
    0.0
    """
    truth, predicted = _label_pair(y_true, y_pred, _MAX_CLASSES)
    weight = _weights(sample_weight, len(truth))
    one_hot = np.eye(max(truth.max(), predicted.max()) + 1)
    chance = ((weight @ one_hot[truth]) * (weight @ one_hot[predicted])).sum(-1)
    total = weight.sum(-1)
    rest = total * total - chance
    # Fractional weights leave a rounding where there is nothing: all of one and the same class.
    rest = np.where(rest > 1e-12 * total * total, rest, 0.0)
    return _ratio(total * (weight @ (truth == predicted)) - chance, rest)


def auroc(y_true: ArrayLike, y_score: ArrayLike, *, sample_weight: Weights = None) -> Value:
    """Return the area under the receiver operating characteristic, ``nan`` if a class is missing.

    It is the probability that a random positive case scores higher than a random negative one,
    ties counting half: 1 separates perfectly, 0.5 is chance, 0 is perfectly reversed.

    >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.75
    """
    _, positive, negative = by_score(y_true, y_score, sample_weight=sample_weight)
    beaten = np.cumsum(negative, axis=-1) - negative / 2
    return _ratio((positive * beaten).sum(-1), positive.sum(-1) * negative.sum(-1))


def average_precision(
    y_true: ArrayLike, y_score: ArrayLike, *, sample_weight: Weights = None
) -> Value:
    """Return the area under the precision-recall steps: Σ (Rₙ − Rₙ₋₁) Pₙ, not interpolated.

    Chance reaches the prevalence, so values from data of different prevalence do not compare.
    ``nan`` if a class is missing: without negative cases it would be 1 whatever the scores.

    >>> round(average_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 3)
    0.833
    """
    _, *weights = by_score(y_true, y_score, sample_weight=sample_weight)
    positive, negative = (w[..., ::-1] for w in weights)
    called = np.cumsum(positive + negative, axis=-1)
    precision = np.cumsum(positive, axis=-1) / np.where(called > 0, called, 1)
    return _ratio((positive * precision).sum(-1), positive.sum(-1) * (negative.sum(-1) > 0))


def brier_score(
    y_true: ArrayLike, probabilities: ArrayLike, *, sample_weight: Weights = None
) -> Value:
    """Return half the mean squared distance of the probabilities to the truth: 0 best, 1 worst.

    For two classes it is the usual mean of (p − y)²; Brier's own definition (Monthly Weather
    Review 78 (1950) 1–3) is twice this.

    >>> round(brier_score([0, 1], [[0.9, 0.1], [0.4, 0.6]]), 3)
    0.085
    """
    truth, p = _label_probabilities(y_true, probabilities)
    losses = ((p - np.eye(p.shape[1])[truth]) ** 2).sum(1) / 2
    return mean_among(losses, sample_weight=sample_weight)


def expected_calibration_error(
    y_true: ArrayLike,
    probabilities: ArrayLike,
    *,
    n_bins: int = 15,
    sample_weight: Weights = None,
) -> Value:
    """Return the mean gap between confidence and accuracy: 0 is calibrated, 1 the worst.

    The confidence is the largest probability. Bins have equal width and contain their upper edge,
    (0, 1/B], …, ((B − 1)/B, 1]; B = 15 as in Guo et al., On calibration of modern neural networks,
    ICML 2017. The estimate is biased upwards when bins hold few cases, and that of bootstrap
    resamples more so: the interval of a well calibrated model may lie above its value.
    """
    truth, p = _label_probabilities(y_true, probabilities)
    right = p.argmax(1) == truth
    return calibration_error(right, p.max(1), n_bins=n_bins, sample_weight=sample_weight)


def calibration_error(
    y_true: ArrayLike, y_prob: ArrayLike, *, n_bins: int = 15, sample_weight: Weights = None
) -> Value:
    """Return the mean gap between a probability and the frequency of what it is of.

    :func:`expected_calibration_error` for the probability of one event, ``y_prob`` ``(N,)`` in
    [0, 1], for example of COVID-19.
    """
    truth, p = scored(y_true, y_prob)
    weight = _weights(sample_weight, len(truth))
    bins = bin_of(p, n_bins)
    by_bin = weight @ (np.eye(n_bins)[bins] * (truth - p)[:, None])  # (..., B)
    return _ratio(np.abs(by_bin).sum(-1), weight.sum(-1))


def bin_of(y_prob: Floats, n_bins: int) -> Labels:
    """Return the bin, 0 to ``n_bins - 1``, of each probability; a bin contains its upper edge.

    Raises:
        TypeError, ValueError: If ``n_bins`` is not whole or below 1, or one is outside [0, 1].
    """
    if whole_number("n_bins", n_bins) < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")
    if y_prob.min() < 0 or y_prob.max() > 1:
        raise ValueError(f"y_prob must be in [0, 1], got {y_prob.min()} to {y_prob.max()}")
    return np.searchsorted(np.linspace(0, 1, n_bins + 1)[1:-1], y_prob, side="left")


def area_under_risk_coverage(
    y_true: ArrayLike, probabilities: ArrayLike, *, sample_weight: Weights = None
) -> Value:
    """Return the mean risk over all coverages of a model that may abstain: 0 best, 1 worst.

    The images are kept in the order of confidence, the largest probability; the risk is the share
    of wrong decisions among those kept. Images of equal confidence are kept or left together. A
    confidence that says nothing gives 1 - accuracy. Geifman, Uziel and El-Yaniv, Bias-reduced
    uncertainty estimation for deep neural classifiers, ICLR 2019.

    >>> area_under_risk_coverage([0, 1], [[0.9, 0.1], [0.6, 0.4]])
    0.25
    """
    truth, p = _label_probabilities(y_true, probabilities)
    _, *weights = by_score(p.argmax(1) != truth, p.max(1), sample_weight=sample_weight)
    errors, right = (w[..., ::-1] for w in weights)
    kept = np.cumsum(errors + right, axis=-1)
    risk = np.cumsum(errors, axis=-1) / np.where(kept > 0, kept, 1)
    return _ratio(((errors + right) * risk).sum(-1), kept[..., -1])


def threshold_at_sensitivity(y_true: ArrayLike, y_score: ArrayLike, *, sensitivity: float) -> float:
    """Return the highest threshold that still reaches a target sensitivity, in (0, 1].

    A case is called positive when ``y_score >= threshold``.

    Raises:
        TypeError, ValueError: If ``sensitivity`` is no number in (0, 1], or no case is positive.

    >>> threshold_at_sensitivity([0, 1, 1, 1], [0.2, 0.3, 0.6, 0.9], sensitivity=0.6)
    0.6
    """
    return _at_rate(y_true, y_score, 1, "sensitivity", sensitivity)


def threshold_at_specificity(y_true: ArrayLike, y_score: ArrayLike, *, specificity: float) -> float:
    """Return the lowest threshold that still reaches a target specificity, in (0, 1].

    A case is called positive when ``y_score >= threshold``; so this is the next number above the
    score of a negative case, in the precision of the scores, and above 1 if that score is 1.

    Raises:
        TypeError, ValueError: If ``specificity`` is no number in (0, 1], or no case is negative.
    """
    highest = _at_rate(y_true, y_score, 0, "specificity", specificity)
    kind = np.asarray(y_score).dtype  # in which NumPy compares: a smaller step would be none
    own = kind if kind in (np.float16, np.float32) else np.float64
    return float(np.nextafter(highest, np.inf, dtype=own))


def _at_rate(y_true: ArrayLike, y_score: ArrayLike, label: int, name: str, rate: float) -> float:
    """Return the score of the case of a class with which its share reaches a rate."""
    truth, score = scored(y_true, y_score)
    if not 0 < (rate := real_number(name, rate)) <= 1:
        raise ValueError(f"{name} must be a fraction in (0, 1], got {rate}")
    cases = np.sort(score[truth == label])
    if not len(cases):
        raise ValueError(f"{name} needs a case with label {label}, got none among {len(truth)}")
    # Counted, not multiplied: 0.07 * 100 is above 7 in floating point.
    enough = int(np.argmax(np.arange(1, len(cases) + 1) / len(cases) >= rate))
    return float(cases[::-1][enough] if label else cases[enough])


def by_score(
    y_true: ArrayLike, y_score: ArrayLike, *, sample_weight: Weights = None
) -> tuple[Floats, Floats, Floats]:
    """Return U different scores, ascending, and the positives and negatives of each, ``(…, U)``."""
    truth, score = scored(y_true, y_score)
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf))
    # Indexed with [..., order], each row would lie scattered in memory: five times slower.
    weight = np.take(_weights(sample_weight, len(truth)), order, axis=-1)
    positive = weight * truth[order]
    ones, zeros = (_sums_of_runs(w, starts) for w in (positive, weight - positive))
    return score[order][starts], ones, zeros


def _sums_of_runs(values: Floats, starts: Labels) -> Floats:
    """Return the sums of the runs of columns that begin at ``starts``; most are of one column."""
    lengths = np.diff(starts, append=values.shape[-1])
    tied, sums = lengths > 1, np.take(values, starts, axis=-1)
    if tied.any():
        runs = np.compress(np.repeat(tied, lengths), values, axis=-1)
        firsts = np.cumsum(lengths[tied]) - lengths[tied]
        sums[..., tied] = np.add.reduceat(runs, firsts, axis=-1)
    return sums


def mean_among(
    values: ArrayLike, among: ArrayLike = True, *, sample_weight: Weights = None
) -> Value:
    """Return the weighted mean of the values where ``among`` is true."""
    numbers = np.asarray(values, dtype=np.float64)
    counted = np.broadcast_to(among, numbers.shape)
    weight = _weights(sample_weight, len(numbers))
    return _ratio(weight @ (numbers * counted), weight @ counted)


def _ratio(numerator: Any, denominator: Any) -> Value:
    """Return the quotient, ``nan`` where the denominator is 0."""
    out = np.full(np.shape(denominator), np.nan)
    np.divide(numerator, denominator, out=out, where=np.asarray(denominator) > 0)
    return out if out.ndim else float(out)


def check_probabilities(probabilities: ArrayLike) -> Floats:
    """Return probabilities as ``(N, K)`` float64.

    Raises:
        ValueError: If they are not two-dimensional, not finite, outside [0, 1], or a row does not
            sum to 1 within 0.001.
    """
    p = check_numbers(probabilities, "probabilities", 2)
    if p.min() < 0 or p.max() > 1:  # with all digits: 1.0000001 is not 1
        raise ValueError(f"probabilities must be in [0, 1], got {p.min()} to {p.max()}")
    sums = p.sum(1)
    row = int(np.argmax(np.abs(sums - 1)))
    if abs(sums[row] - 1) > _SUM_TOLERANCE:
        raise ValueError(f"Each row of probabilities must sum to 1, row {row} to {sums[row]:g}")
    return p


def check_numbers(values: ArrayLike, name: str, ndim: int) -> Floats:
    """Return an array as float64; raise ``ValueError`` unless it has so many axes, and numbers."""
    try:
        array = np.asarray(values)
    except (RuntimeError, TypeError, ValueError) as error:  # the first two of torch
        way = "" if isinstance(error, ValueError) else ", of a tensor .float().numpy(force=True)"
        raise ValueError(f"{name} must be a rectangular array of numbers{way}: {error}") from error
    if array.ndim != ndim or array.dtype.kind not in "biuf" or not array.size:
        raise ValueError(
            f"{name} must be a {ndim}-dimensional array of numbers that is not empty, "
            f"got shape {array.shape} of {array.dtype}"
        )
    numbers = array.astype(np.float64, copy=False)
    if not np.isfinite(numbers).all():
        place = np.argwhere(~np.isfinite(numbers))[0].tolist()
        raise ValueError(f"{name} must be finite, got {numbers[tuple(place)]} at {place}")
    return numbers


def check_labels(values: ArrayLike, name: str, n_classes: int) -> Labels:
    """Return labels as ``(N,)`` int64.

    Raises:
        ValueError: If they are not whole numbers from 0 to ``n_classes - 1``.
    """
    numbers = check_numbers(values, name, 1)
    if (strange := (numbers < 0) | (numbers >= n_classes) | (numbers % 1 != 0)).any():
        place = int(np.argmax(strange))
        raise ValueError(
            f"{name} must hold whole labels from 0 to {n_classes - 1}, "
            f"got {numbers[place]:g} at position {place}"
        )
    return numbers.astype(np.int64)


def _label_pair(y_true: ArrayLike, y_pred: ArrayLike, n_classes: int) -> tuple[Labels, Labels]:
    truth = check_labels(y_true, "y_true", n_classes)
    predicted = check_labels(y_pred, "y_pred", n_classes)
    check_lengths(y_true=truth, y_pred=predicted)
    return truth, predicted


def scored(y_true: ArrayLike, y_score: ArrayLike) -> tuple[Labels, Floats]:
    """Return ``(N,)`` binary labels and finite scores of the same length.

    Raises:
        ValueError: If they are anything else.
    """
    truth, score = check_labels(y_true, "y_true", 2), check_numbers(y_score, "y_score", 1)
    check_lengths(y_true=truth, y_score=score)
    return truth, score


def _label_probabilities(y_true: ArrayLike, probabilities: ArrayLike) -> tuple[Labels, Floats]:
    p = check_probabilities(probabilities)
    truth = check_labels(y_true, "y_true", p.shape[1])
    check_lengths(y_true=truth, probabilities=p)
    return truth, p


def _weights(sample_weight: Weights, n: int) -> Floats:
    if sample_weight is None:
        return np.ones(n)
    weight = check_numbers(sample_weight, "sample_weight", 2 if np.ndim(sample_weight) == 2 else 1)
    if weight.shape[-1] != n or weight.min() < 0:
        raise ValueError(
            f"sample_weight must be ({n},) or (R, {n}) without negative values, "
            f"got shape {weight.shape} and minimum {weight.min():g}"
        )
    return weight


def check_lengths(**arrays: Sized) -> None:
    """Raise unless the named arrays are of one length.

    Raises:
        ValueError: If they are not.
    """
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"Arrays must have the same length, got {shown}")
