"""Where the verdicts of an audit begin, and why there."""

from __future__ import annotations

from collections.abc import Iterable

from chestxray_covid.audit_report import FAIL, NOT_ASSESSABLE, PASS, VERDICTS, WARN
from chestxray_covid.intervals import Estimate

#: AUROC without lungs from which it is a warning and a failure: what the textbook calls acceptable
#: and excellent discrimination.
NOTABLE, STRONG = 0.7, 0.8
DISCRIMINATION = "Hosmer, Lemeshow and Sturdivant, Applied logistic regression, 2013, section 5.2.4"
#: Change of an AUROC that is a warning and a failure.
SMALL_CHANGE, LARGE_CHANGE = 0.05, 0.1
CHANGE_BANDS = f"warn from {SMALL_CHANGE}, fail from {LARGE_CHANGE}, its interval away from 0"
CHANGES = "our choice: a tenth and a fifth of the way from perfect to chance"
#: Cramér's V that is a warning: a medium effect. What fails is :attr:`Confounding.is_severe`.
MEDIUM_V = 0.3
MEDIUM_EFFECT = "Cohen, Statistical power analysis, 1988, section 7.2"
ASSOCIATION = (
    f"{MEDIUM_EFFECT}, for the warning; our choice for the failure, which the classic design with "
    "V = 0.97 must reach"
)


def worst(verdicts: Iterable[str]) -> str:
    """Return the worst verdict; ``"not_assessable"`` of none."""
    found = set(verdicts)
    return next((verdict for verdict in VERDICTS if verdict in found), NOT_ASSESSABLE)


def capped(verdict: str) -> str:
    """Return the verdict, or a warning where it is worse than that."""
    return WARN if VERDICTS.index(verdict) < VERDICTS.index(WARN) else verdict


def judge_auroc(estimate: Estimate, *, both_ways: bool = False, notable: float = NOTABLE) -> str:
    """Return the verdict on an AUROC that ought to be at chance.

    An AUROC whose interval holds 0.5 does not fail; one whose interval reaches the failing values
    does not pass either, because there is too little to tell. What has no interval counts as sure,
    as an AUROC of exactly 1 does: whoever asks looks for enough patients first.

    Args:
        estimate: The AUROC.
        both_ways: Whether far below 0.5 is as bad as far above; of a model that was trained on
            such numbers it is not.
        notable: What is a warning.
    """
    value, (low, high) = estimate.value, ends_of(estimate)
    if both_ways and value < 0.5:
        value, low, high = 1 - value, 1 - high, 1 - low
    furthest = max(high, 1 - low) if both_ways else high
    return _graded(value, low > 0.5, furthest, notable, STRONG)


def judge_change(
    change: Estimate,
    *,
    both_ways: bool = True,
    notable: float = SMALL_CHANGE,
    strong: float = LARGE_CHANGE,
) -> str:
    """Return the verdict on a change of an AUROC that ought to be none.

    A change whose interval holds 0 does not fail; one whose interval reaches the failing values
    does not pass either. What has no interval counts as sure, as in :func:`judge_auroc`.

    Args:
        change: Negative for a loss.
        both_ways: Whether a gain is as bad as a loss.
        notable: What is a warning.
        strong: What is a failure.
    """
    sign = 1.0 if change.value > 0 and both_ways else -1.0
    value, (low, high) = sign * change.value, sorted(sign * end for end in ends_of(change))
    furthest = max(high, -low) if both_ways else high
    return _graded(value, low > 0, furthest, notable, strong)


def ends_of(estimate: Estimate) -> tuple[float, float]:
    """Return the interval, both ends the value where it has no width, as at exactly 1."""
    is_sure = estimate.low != estimate.low
    return (estimate.value, estimate.value) if is_sure else (estimate.low, estimate.high)


def _graded(value: float, certain: bool, furthest: float, notable: float, strong: float) -> str:
    if value != value:
        return NOT_ASSESSABLE
    if certain and value >= notable:
        return FAIL if value >= strong else WARN
    return NOT_ASSESSABLE if furthest >= strong else PASS
