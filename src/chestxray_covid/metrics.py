"""Numbers with intervals, as pure functions over arrays.

Metrics take ``y_true`` ``(N,)`` whole labels, then what is judged, in the same order: ``y_pred``
``(N,)`` labels, ``y_score`` ``(N,)`` finite scores, higher for positive, or ``probabilities``
``(N, K)`` in [0, 1] with rows summing to 1. N is at least 1. Binary labels are 1 for COVID-19 and
0 for everything else. Anything else is a ``ValueError`` that says what was expected and what came.

``sample_weight`` is ``(N,)`` or ``(R, N)``, not negative; with the latter a metric returns the
``(R,)`` values of R weightings at once. A bootstrap resample is such a weighting (how often each
image was drawn), so a thousand of them cost little more than one.

A metric that is not defined, for example a sensitivity without a positive case, is ``nan``.
Only NumPy is needed; the tests compare every number with scikit-learn or SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sized
from dataclasses import asdict, dataclass, fields
from statistics import NormalDist
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]
Labels: TypeAlias = NDArray[np.int64]
Weights: TypeAlias = ArrayLike | None
#: ``float``, or ``(R,)`` float64 for ``(R, N)`` weights; NumPy types its own reductions so.
Value: TypeAlias = Any

WILSON = "wilson"
WILSON_BY_PATIENT = "wilson by patient"
PATIENT_BOOTSTRAP = "patient bootstrap"

_MAX_CLASSES = 1000
#: Elements of one block of resamples: 16 MB, so that a large evaluation does not fill the memory.
_BLOCK = 2_000_000
#: Rows of probabilities from half precision sum to 1 within this.
_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and how sure it is.

    Attributes:
        value: The estimate, ``nan`` where it is not defined.
        low: Lower end of the interval, ``nan`` where there is none.
        high: Upper end of the interval, ``nan`` where there is none.
        n: Images that the number rests on: the denominator of a proportion.
        method: Where the interval comes from: ``"wilson"``, ``"wilson by patient"`` or
            ``"patient bootstrap"``.
        confidence: Level of the interval, in (0, 1).
        skipped: Resamples on which the number was not defined.

    >>> print(Estimate(value=0.912, low=0.870, high=0.941, n=134, method="wilson"))
    0.912 (0.870–0.941, n = 134)
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int
    method: str
    confidence: float = 0.95
    skipped: int = 0

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"undefined (n = {self.n})"
        return f"{self.value:.3f} ({self.interval}, n = {self.n})"

    @property
    def interval(self) -> str:
        """The interval as text, ``"0.870–0.941"`` or ``"no interval"``."""
        return "no interval" if math.isnan(self.low) else f"{self.low:.3f}–{self.high:.3f}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data; ``nan`` becomes ``None``."""
        return {name: None if value != value else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the estimate that :meth:`to_dict` described.

        Raises:
            ValueError: If a field is missing, unknown or of another type.
        """
        if not isinstance(data, Mapping) or set(data) != {f.name for f in fields(cls)}:
            raise ValueError(f"An estimate has {[f.name for f in fields(cls)]}, got {data!r}")
        types = {"n": (int,), "skipped": (int,), "method": (str,), "confidence": (float,)}
        for name, value in data.items():
            allowed = types.get(name, (float, int, type(None)))
            if type(value) not in allowed or value in (math.inf, -math.inf):
                raise ValueError(f"An estimate cannot have the {name} {value!r}")
        numbers: dict[str, Any] = {k: math.nan if v is None else v for k, v in data.items()}
        return cls(**numbers)


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval ``(low, high)`` of a proportion, ``nan`` if ``total`` is 0.

    Wilson, Probable inference, the law of succession, and statistical inference, Journal of the
    American Statistical Association 22 (1927) 209–212; without continuity correction.

    Args:
        successes: Hits, 0 to ``total``.
        total: Independent trials.
        confidence: Level of the interval, in (0, 1).

    Raises:
        ValueError: If ``successes`` is outside [0, ``total``] or ``confidence`` outside (0, 1).

    >>> "%.3f %.3f" % wilson_interval(9, 10)
    '0.596 0.982'
    """
    check_resampling(n_resamples=1, confidence=confidence)
    if not 0 <= successes <= total:
        raise ValueError(f"successes must be 0 to total, got {successes} of {total}")
    if total == 0:
        return math.nan, math.nan
    rate, z = successes / total, NormalDist().inv_cdf((1 + confidence) / 2)
    shrink = 1 + z * z / total
    centre = (rate + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / total + (z / (2 * total)) ** 2)
    # Exact at the ends, where rounding would leave 1e-17 instead of 0.
    low = centre - half if successes else 0.0
    return low, centre + half if successes < total else 1.0


def proportion(
    hits: ArrayLike,
    groups: Iterable[Hashable] | None = None,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Return the share of hits, with an interval that knows patients.

    With one image per patient it is Wilson's. Images of one patient are not independent, so with
    more it is the patient bootstrap; except where all images agree, for then every resample does
    too and the bootstrap would claim certainty: there it is Wilson's over the number of patients.

    Args:
        hits: ``(N,)`` 0 or 1; N may be 0, which gives ``nan`` with ``n=0``.
        groups: ``(N,)`` patient of each image; ``None`` means one image per patient.
        n_resamples, seed, confidence: As in :func:`bootstrap_by_group`.

    Raises:
        ValueError: If shapes, labels or options are not as said.

    >>> print(proportion([1, 1, 1, 0], groups="abcd"))
    0.750 (0.301–0.954, n = 4)
    """
    options: dict[str, Any] = {"n_resamples": n_resamples, "confidence": confidence}
    check_resampling(**options)
    n = np.size(hits)
    codes = np.arange(n) if groups is None else _codes(groups)
    if n == len(codes) == 0:
        return Estimate(value=math.nan, n=0, method=WILSON, confidence=confidence)
    found = _labels(hits, "hits", 2)
    _check_lengths(hits=found, groups=codes)
    rate, patients = float(found.mean()), int(codes.max()) + 1
    if patients < n and 0 < rate < 1:
        return bootstrap_by_group(_mean, codes, found, seed=seed, **options)
    low, high = wilson_interval(round(rate * patients), patients, confidence)
    method = WILSON if patients == n else WILSON_BY_PATIENT
    return Estimate(value=rate, low=low, high=high, n=n, method=method, confidence=confidence)


def bootstrap_by_group(
    statistic: Callable[..., Value],
    groups: Iterable[Hashable],
    *arrays: Any,
    n_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Return a statistic with the percentile interval over resampled patients.

    Patients are drawn with replacement, each with all of its images (Field and Welsh,
    Bootstrapping clustered data, Journal of the Royal Statistical Society B 69 (2007) 369–390);
    drawing images would make the interval too narrow. Resamples on which the statistic is not
    defined are skipped and counted. The interval is ``nan`` if fewer than half are left, or if
    there is only one patient.

    An interval without width, such as that of an AUROC of exactly 1, says that all resamples
    agree, not that the number is certain.

    Args:
        statistic: Called as ``statistic(*arrays, sample_weight=w)`` with ``w`` ``(R, N)`` float64,
            how often each image was drawn; returns ``(R,)``. All metrics of this module do.
        groups: ``(N,)`` patient of each image, anything hashable; N may be 0.
        *arrays: What the statistic takes, each of length N.
        n_resamples: Resamples, at least 1.
        seed: Seed of a generator of its own; the result is a function of the arguments.
        confidence: Level of the interval, in (0, 1).

    Raises:
        ValueError: If lengths differ, an option is impossible, or the statistic does not return
            one value per resample.
    """
    check_resampling(n_resamples=n_resamples, confidence=confidence)
    codes = _codes(groups)
    _check_lengths(groups=codes, **{f"array {i}": array for i, array in enumerate(arrays, 1)})
    n, value, low, high, skipped = len(codes), math.nan, math.nan, math.nan, 0
    if n:
        value = float(_values(statistic, arrays, np.ones((1, n)))[0])
    if not math.isnan(value) and codes.any():
        blocks = _resamples(codes, n_resamples, seed)
        drawn = np.concatenate([_values(statistic, arrays, weights) for weights in blocks])
        defined = drawn[np.isfinite(drawn)]
        skipped = n_resamples - len(defined)
        if 2 * len(defined) >= n_resamples:
            tail = (1 - confidence) / 2
            low, high = (float(end) for end in np.quantile(defined, [tail, 1 - tail]))
    found: dict[str, Any] = {"value": value, "low": low, "high": high, "skipped": skipped}
    return Estimate(**found, n=n, method=PATIENT_BOOTSTRAP, confidence=confidence)


def _values(statistic: Callable[..., Value], arrays: tuple[Any, ...], weights: Floats) -> Floats:
    values = np.asarray(statistic(*arrays, sample_weight=weights), dtype=np.float64)
    if values.shape != weights.shape[:1]:
        raise ValueError(
            f"The statistic must return one value per resample, shape {weights.shape[:1]} for "
            f"weights of shape {weights.shape}, got shape {values.shape}"
        )
    return values


def _resamples(codes: Labels, n_resamples: int, seed: int) -> Iterator[Floats]:
    """Yield blocks ``(R, N)``: how often each image is in each resample of the patients."""
    rng = np.random.default_rng(seed)
    patients = int(codes.max()) + 1
    rows = max(1, _BLOCK // len(codes))
    for start in range(0, n_resamples, rows):
        size = (min(rows, n_resamples - start), patients)
        drawn = rng.integers(patients, size=size) + patients * np.arange(size[0])[:, None]
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(size)
        yield counts[:, codes].astype(np.float64)


def confusion_matrix(y_true: ArrayLike, y_pred: ArrayLike, n_classes: int) -> Labels:
    """Return ``(K, K)`` counts; rows are the truth, columns the prediction.

    >>> confusion_matrix([0, 0, 1], [0, 1, 1], n_classes=2).tolist()
    [[1, 1], [0, 1]]
    """
    truth, predicted = _label_pair(y_true, y_pred, n_classes)
    counts = np.bincount(truth * n_classes + predicted, minlength=n_classes**2)
    return counts.reshape(n_classes, n_classes)


def sensitivity(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: Weights = None) -> Value:
    """Return the share of positive cases that were called positive, ``nan`` without any.

    >>> sensitivity([1, 1, 0, 0], [1, 0, 0, 0])
    0.5
    """
    truth, predicted = _label_pair(y_true, y_pred, 2)
    return _mean(predicted == 1, truth == 1, sample_weight=sample_weight)


def specificity(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: Weights = None) -> Value:
    """Return the share of negative cases that were called negative, ``nan`` without any."""
    truth, predicted = _label_pair(y_true, y_pred, 2)
    return _mean(predicted == 0, truth == 0, sample_weight=sample_weight)


def ppv(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: Weights = None) -> Value:
    """Return the share of positive calls that are right, at this data's prevalence, or ``nan``."""
    truth, predicted = _label_pair(y_true, y_pred, 2)
    return _mean(truth == 1, predicted == 1, sample_weight=sample_weight)


def npv(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: Weights = None) -> Value:
    """Return the share of negative calls that are right, at this data's prevalence, or ``nan``."""
    truth, predicted = _label_pair(y_true, y_pred, 2)
    return _mean(truth == 0, predicted == 0, sample_weight=sample_weight)


def accuracy(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: Weights = None) -> Value:
    """Return the share of right decisions; labels are 0 to 999."""
    truth, predicted = _label_pair(y_true, y_pred, _MAX_CLASSES)
    return _mean(truth == predicted, sample_weight=sample_weight)


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
    return _ratio(total * (weight @ (truth == predicted)) - chance, total * total - chance)


def auroc(y_true: ArrayLike, y_score: ArrayLike, *, sample_weight: Weights = None) -> Value:
    """Return the area under the receiver operating characteristic, ``nan`` if a class is missing.

    It is the probability that a random positive case scores higher than a random negative one,
    ties counting half: 1 separates perfectly, 0.5 is chance, 0 is perfectly reversed.

    >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.75
    """
    positive, negative = _by_score(y_true, y_score, sample_weight)
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
    positive, negative = (w[..., ::-1] for w in _by_score(y_true, y_score, sample_weight))
    called = np.cumsum(positive + negative, axis=-1)
    precision = np.cumsum(positive, axis=-1) / np.where(called > 0, called, 1)
    has_negative = negative.sum(-1) > 0
    return _ratio((positive * precision).sum(-1), positive.sum(-1) * has_negative)


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
    return _mean(losses, sample_weight=sample_weight)


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
    if not n_bins >= 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")
    truth, p = _label_probabilities(y_true, probabilities)
    weight = _weights(sample_weight, len(truth))
    confidence = p.max(1)
    gap = (p.argmax(1) == truth) - confidence
    bins = np.searchsorted(np.linspace(0, 1, n_bins + 1)[1:-1], confidence, side="left")
    by_bin = weight @ (np.eye(n_bins)[bins] * gap[:, None])  # (..., B)
    return _ratio(np.abs(by_bin).sum(-1), weight.sum(-1))


def threshold_at_sensitivity(y_true: ArrayLike, y_score: ArrayLike, *, sensitivity: float) -> float:
    """Return the highest threshold that still reaches a target sensitivity.

    A case is called positive when ``y_score >= threshold``.

    Args:
        y_true: ``(N,)`` labels, 1 for COVID-19 and 0 for everything else.
        y_score: ``(N,)`` probabilities in [0, 1], in the order of ``y_true``.
        sensitivity: Wanted true-positive rate, a fraction in (0, 1].

    Raises:
        ValueError: If ``sensitivity`` is outside (0, 1] or no case is positive.

    >>> threshold_at_sensitivity([0, 1, 1, 1], [0.2, 0.3, 0.6, 0.9], sensitivity=0.6)
    0.6
    """
    return _score_at_rate(y_true, y_score, 1, "sensitivity", sensitivity)


def threshold_at_specificity(y_true: ArrayLike, y_score: ArrayLike, *, specificity: float) -> float:
    """Return the lowest threshold that still reaches a target specificity.

    A case is called positive when ``y_score >= threshold``; so this is the next number above the
    score of a negative case, and above 1 if that score is 1. See :func:`threshold_at_sensitivity`.

    Raises:
        ValueError: If ``specificity`` is outside (0, 1] or no case is negative.
    """
    return math.nextafter(_score_at_rate(y_true, y_score, 0, "specificity", specificity), math.inf)


def _score_at_rate(
    y_true: ArrayLike, y_score: ArrayLike, label: int, name: str, rate: float
) -> float:
    """Return the score of the case of a class with which its share reaches a rate."""
    truth, score = _scored(y_true, y_score)
    if not 0 < rate <= 1:
        raise ValueError(f"{name} must be a fraction in (0, 1], got {rate}")
    cases = np.sort(score[truth == label])
    if not len(cases):
        raise ValueError(f"{name} needs a case with label {label}, got none among {len(truth)}")
    # Counted, not multiplied: 0.07 * 100 is above 7 in floating point.
    enough = int(np.argmax(np.arange(1, len(cases) + 1) / len(cases) >= rate))
    return float(cases[::-1][enough] if label else cases[enough])


def _by_score(y_true: ArrayLike, y_score: ArrayLike, weights: Weights) -> tuple[Floats, Floats]:
    """Return the weights ``(..., U)`` of positives and negatives at each score, ascending."""
    truth, score = _scored(y_true, y_score)
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf))
    weight = _weights(weights, len(truth))[..., order]
    positive = weight * truth[order]
    negative = weight - positive
    return np.add.reduceat(positive, starts, axis=-1), np.add.reduceat(negative, starts, axis=-1)


def _mean(values: ArrayLike, among: ArrayLike = True, *, sample_weight: Weights = None) -> Value:
    numbers = np.asarray(values, dtype=np.float64)
    counted = np.broadcast_to(among, numbers.shape)
    weight = _weights(sample_weight, len(numbers))
    return _ratio(weight @ (numbers * counted), weight @ counted)


def _ratio(numerator: Any, denominator: Any) -> Value:
    """Return the quotient, ``nan`` where the denominator is 0."""
    out = np.full(np.shape(denominator), np.nan)
    np.divide(numerator, denominator, out=out, where=np.asarray(denominator) > 0)
    return out if out.ndim else float(out)


def check_resampling(*, n_resamples: int, confidence: float) -> None:
    """Raise unless these are options of an interval.

    Raises:
        ValueError: If ``n_resamples`` is below 1 or ``confidence`` outside (0, 1).
    """
    if not n_resamples >= 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be inside (0, 1), for example 0.95, got {confidence}")


def check_probabilities(probabilities: ArrayLike) -> Floats:
    """Return probabilities as ``(N, K)`` float64.

    Raises:
        ValueError: If they are not two-dimensional, not finite, outside [0, 1], or a row does not
            sum to 1 within 0.001.
    """
    p = _numbers(probabilities, "probabilities", 2)
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"probabilities must be in [0, 1], got {p.min():g} to {p.max():g}")
    sums = p.sum(1)
    row = int(np.argmax(np.abs(sums - 1)))
    if abs(sums[row] - 1) > _SUM_TOLERANCE:
        raise ValueError(f"Each row of probabilities must sum to 1, row {row} to {sums[row]:g}")
    return p


def _numbers(values: ArrayLike, name: str, ndim: int) -> Floats:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} must be a rectangular array of numbers: {error}") from error
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


def _labels(values: ArrayLike, name: str, n_classes: int) -> Labels:
    numbers = _numbers(values, name, 1)
    strange = (numbers < 0) | (numbers >= n_classes) | (numbers % 1 != 0)
    if strange.any():
        place = int(np.argmax(strange))
        raise ValueError(
            f"{name} must hold whole labels from 0 to {n_classes - 1}, "
            f"got {numbers[place]:g} at position {place}"
        )
    return numbers.astype(np.int64)


def _label_pair(y_true: ArrayLike, y_pred: ArrayLike, n_classes: int) -> tuple[Labels, Labels]:
    truth, predicted = _labels(y_true, "y_true", n_classes), _labels(y_pred, "y_pred", n_classes)
    _check_lengths(y_true=truth, y_pred=predicted)
    return truth, predicted


def _scored(y_true: ArrayLike, y_score: ArrayLike) -> tuple[Labels, Floats]:
    truth, score = _labels(y_true, "y_true", 2), _numbers(y_score, "y_score", 1)
    _check_lengths(y_true=truth, y_score=score)
    return truth, score


def _label_probabilities(y_true: ArrayLike, probabilities: ArrayLike) -> tuple[Labels, Floats]:
    p = check_probabilities(probabilities)
    truth = _labels(y_true, "y_true", p.shape[1])
    _check_lengths(y_true=truth, probabilities=p)
    return truth, p


def _weights(sample_weight: Weights, n: int) -> Floats:
    if sample_weight is None:
        return np.ones(n)
    weight = _numbers(sample_weight, "sample_weight", 2 if np.ndim(sample_weight) == 2 else 1)
    if weight.shape[-1] != n or weight.min() < 0:
        raise ValueError(
            f"sample_weight must be ({n},) or (R, {n}) without negative values, "
            f"got shape {weight.shape} and minimum {weight.min():g}"
        )
    return weight


def _codes(groups: Iterable[Hashable]) -> Labels:
    """Return the groups as numbers from 0, in order of appearance."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(g, len(known)) for g in groups], dtype=np.int64)


def _check_lengths(**arrays: Sized) -> None:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"Arrays must have the same length, got {shown}")
