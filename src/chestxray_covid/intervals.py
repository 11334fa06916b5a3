"""How sure a number is: intervals by patient, never by image."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import NormalDist
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chestxray_covid.errors import real_number, whole_number
from chestxray_covid.metrics import (
    Floats,
    Labels,
    Value,
    check_labels,
    check_lengths,
    mean_among,
)

WILSON = "wilson"
WILSON_BY_PATIENT = "wilson by patient"
PATIENT_BOOTSTRAP = "patient bootstrap"

#: Patient of each image, anything hashable.
Groups: TypeAlias = Sequence[Hashable] | NDArray[Any]

#: More resamples than anyone needs: a file that asks for more asks for all of the memory.
MAX_RESAMPLES = 1_000_000
#: Elements of one block of resamples: 16 MB, so that a large evaluation does not fill the memory.
_BLOCK = 2_000_000
#: Rounding may tell equal resamples apart by less than this.
_NO_WIDTH = 1e-12


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and how sure it is.

    Attributes:
        value: The estimate, ``nan`` where it is not defined.
        low: Lower end of the interval, ``nan`` where there is none.
        high: Upper end of the interval, ``nan`` where there is none.
        n: Images that the number rests on: the denominator of a proportion.
        method: Where the interval comes from: ``"wilson"``, ``"wilson by patient"``, ``"delong"``,
            ``"delong by patient"`` or ``"patient bootstrap"``.
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

    def __eq__(self, other: object) -> bool:
        # Two that are not defined are equal, or no report would be that was saved and read again.
        return self.to_dict() == other.to_dict() if isinstance(other, Estimate) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.to_dict().values()))

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
    confidence = check_resampling(n_resamples=1, confidence=confidence)["confidence"]
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
    options = check_resampling(n_resamples=n_resamples, confidence=confidence) | {"seed": seed}
    confidence, n = options["confidence"], np.size(hits)
    codes = np.arange(n) if groups is None else group_codes(groups)
    if n == len(codes) == 0:
        return Estimate(value=math.nan, n=0, method=WILSON, confidence=confidence)
    found = check_labels(hits, "hits", 2)
    check_lengths(hits=found, groups=codes)
    rate, patients = float(found.mean()), int(codes.max()) + 1
    if patients < n and 0 < rate < 1:
        return bootstrap_by_group(mean_among, codes, found, **options)
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
    defined are skipped and counted. The interval is ``nan`` if fewer than half are left, and if
    the rest agree, as with a single patient or an AUROC of exactly 1: an interval without width
    would claim a certainty that they cannot show. Near 0 and 1, and with few patients of a class,
    it is too narrow, so that an AUROC has an interval of its own
    (:func:`~chestxray_covid.delong.auroc_by_group`).

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
    how: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed, "confidence": confidence}
    return bootstrap_together({"": (statistic, *arrays)}, groups, **how)[""]


def bootstrap_together(
    statistics: Mapping[str, tuple[Any, ...]],
    groups: Iterable[Hashable],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Estimate]:
    """Return several statistics of the same images, each as :func:`bootstrap_by_group` does.

    The resamples are drawn once for all; drawing takes about as long as computing one of them.

    Args:
        statistics: Name → the statistic, and the arrays that it takes.
        groups, n_resamples, seed, confidence: As there.

    Raises:
        ValueError: As there.
    """
    confidence = check_resampling(n_resamples=n_resamples, confidence=confidence)["confidence"]
    codes = group_codes(groups)
    values: dict[str, float] = {}
    for name, (statistic, *arrays) in statistics.items():
        check_lengths(groups=codes, **{f"array {i}": array for i, array in enumerate(arrays, 1)})
        once = np.ones((1, len(codes)))
        values[name] = float(_values(statistic, arrays, once)[0]) if len(codes) else math.nan
    drawn: dict[str, list[Floats]] = {name: [] for name, v in values.items() if not math.isnan(v)}
    for weights in _resamples(codes, n_resamples, seed) if drawn else ():
        for name, blocks in drawn.items():
            statistic, *arrays = statistics[name]
            blocks.append(_values(statistic, arrays, weights))
    kept: dict[str, Any] = {"n_resamples": n_resamples, "confidence": confidence, "n": len(codes)}
    return {name: _estimate(value, drawn.get(name), **kept) for name, value in values.items()}


def _estimate(
    value: float, blocks: list[Floats] | None, *, n: int, n_resamples: int, confidence: float
) -> Estimate:
    """Return a value with the interval that its resamples give, if there are any."""
    low, high, skipped = math.nan, math.nan, 0
    if blocks:
        drawn = np.concatenate(blocks)
        defined = drawn[np.isfinite(drawn)]
        skipped = n_resamples - len(defined)
        if 2 * len(defined) >= n_resamples:
            tail = (1 - confidence) / 2
            low, high = (float(end) for end in np.quantile(defined, [tail, 1 - tail]))
        if not high - low > _NO_WIDTH:
            low = high = math.nan
    found: dict[str, Any] = {"value": value, "low": low, "high": high, "skipped": skipped}
    return Estimate(**found, n=n, method=PATIENT_BOOTSTRAP, confidence=confidence)


def band_by_group(
    curve: Callable[..., Floats],
    groups: Iterable[Hashable],
    *arrays: Any,
    n_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[Floats, Floats]:
    """Return the ends ``(G,)`` of the percentile interval at each of the G points of a curve.

    Pointwise: a whole curve leaves the band more often than a point. Resamples of patients are
    those of :func:`bootstrap_by_group` with the same seed; where fewer than half are defined the
    band is ``nan``.

    Args:
        curve: Called as ``curve(*arrays, sample_weight=w)`` with ``w`` ``(R, N)``; returns
            ``(R, G)``, ``nan`` where it is not defined.
        groups: ``(N,)`` patient of each image, N at least 1.
        *arrays: What the curve takes, each of length N.
        n_resamples, seed, confidence: As in :func:`bootstrap_by_group`.

    Raises:
        ValueError: If lengths differ or an option is impossible.
    """
    confidence = check_resampling(n_resamples=n_resamples, confidence=confidence)["confidence"]
    codes = group_codes(groups)
    check_lengths(groups=codes, **{f"array {i}": array for i, array in enumerate(arrays, 1)})
    blocks = _resamples(codes, n_resamples, seed)
    drawn = np.concatenate([curve(*arrays, sample_weight=weights) for weights in blocks])
    usable = 2 * np.isfinite(drawn).sum(0) >= n_resamples
    low, high = np.full((2, drawn.shape[1]), np.nan)
    tail = (1 - confidence) / 2
    if usable.any():
        low[usable], high[usable] = np.nanquantile(drawn[:, usable], [tail, 1 - tail], axis=0)
    return low, high


def _values(statistic: Callable[..., Value], arrays: Iterable[Any], weights: Floats) -> Floats:
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
        yield np.take(counts.astype(np.float64), codes, axis=1)


def check_resampling(*, n_resamples: int, confidence: float, seed: int = 0) -> dict[str, Any]:
    """Return options of an interval as plain numbers, which JSON knows.

    Raises:
        TypeError: If ``confidence`` is no number.
        ValueError: If ``n_resamples`` is no whole number from 1 to a million, ``seed`` none from
            0, or ``confidence`` is outside (0, 1).
    """
    for name, value, least, most in (
        ("n_resamples", n_resamples, 1, MAX_RESAMPLES),
        ("seed", seed, 0, math.inf),
    ):
        if not isinstance(value, int | np.integer) or not least <= value <= most:
            limit = f"from {least} to {most:,}" if most < math.inf else f"of at least {least}"
            raise ValueError(f"{name} must be a whole number {limit}, got {value!r}")
    if not 0 < real_number("confidence", confidence) < 1:
        raise ValueError(f"confidence must be inside (0, 1), for example 0.95, got {confidence}")
    return {"n_resamples": int(n_resamples), "seed": int(seed), "confidence": float(confidence)}


def check_seed(seed: int) -> None:
    """Raise unless scikit-learn, which deals out patients, takes a seed and the next one.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is out of range.
    """
    if not 0 <= whole_number("seed", seed) <= 2**32 - 2:
        raise ValueError(f"seed must be from 0 to {2**32 - 2}, got {seed}")


def group_codes(groups: Iterable[Hashable], name: str = "patient") -> Labels:
    """Return the groups as ``(N,)`` int64 numbers from 0, in order of appearance.

    Args:
        groups: ``(N,)`` of anything hashable.
        name: What they are, for the message.

    Raises:
        TypeError: If a group is a tensor, which equals none of the same number.
        ValueError: If a group is missing (``None`` or not a number), alone or inside a tuple.
    """
    known: dict[Hashable, int] = {}
    codes = np.array([known.setdefault(g, len(known)) for g in groups], dtype=np.int64)
    for group, code in known.items():
        if type(group) in (int, str):
            continue
        if _is_tensor(group):
            raise TypeError(f"{name}s must be text or numbers, got {group!r}. Pass its tolist()")
        if _is_missing(group):
            raise ValueError(
                f"Every image needs a {name}, got {group!r} at position "
                f"{int(np.argmax(codes == code))}. Give unknown {name}s names of their own"
            )
    return codes


def _is_tensor(group: Any) -> bool:
    """Return whether this is one, of torch for example, or a tuple with one."""
    if isinstance(group, tuple):
        return any(map(_is_tensor, group))
    return hasattr(group, "__array__") and not isinstance(group, np.generic)


def _is_missing(group: Any) -> bool:
    """Return whether this is ``None``, not a number or pandas' ``NA``, or a tuple with one."""
    if isinstance(group, tuple):
        return any(map(_is_missing, group))
    try:
        return group is None or bool(group != group)
    except TypeError:  # NA, which is neither
        return True
