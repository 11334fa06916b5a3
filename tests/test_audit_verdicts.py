from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import numpy as np
import pytest

from chestxray_covid import audit_items
from chestxray_covid.audit_data import AuditData
from chestxray_covid.audit_report import AuditFinding
from chestxray_covid.audit_verdicts import capped, judge_auroc, judge_change, worst
from chestxray_covid.delong import auroc_by_group
from chestxray_covid.intervals import Estimate


def number(value: float, low: float = math.nan, high: float = math.nan) -> Estimate:
    return Estimate(value=value, low=low, high=high, n=100, method="made up")


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict", "both_ways"),
    [
        (0.52, 0.45, 0.60, "pass", "pass"),
        (0.72, 0.60, 0.79, "warn", "warn"),
        (0.85, 0.80, 0.90, "fail", "fail"),
        (0.80, 0.70, 0.90, "fail", "fail"),
        (0.70, 0.60, 0.79, "warn", "warn"),
        (0.60, 0.45, 0.80, "not_assessable", "not_assessable"),
        (0.75, 0.48, 0.95, "not_assessable", "not_assessable"),  # chance is not excluded
        (0.75, 0.48, 0.79, "pass", "pass"),
        (0.60, 0.40, 0.81, "not_assessable", "not_assessable"),  # failure is not excluded
        (1.00, math.nan, math.nan, "fail", "fail"),
        (0.00, math.nan, math.nan, "pass", "fail"),
        (0.10, 0.05, 0.20, "pass", "fail"),
        (0.28, 0.21, 0.40, "pass", "warn"),
        (0.40, 0.15, 0.65, "pass", "not_assessable"),
        (0.52, 0.15, 0.75, "pass", "not_assessable"),  # nor is it from the other side
        (math.nan, math.nan, math.nan, "not_assessable", "not_assessable"),
    ],
)
def test_an_auroc_without_lungs_is_judged_with_its_interval(
    value: float, low: float, high: float, verdict: str, both_ways: str
) -> None:
    assert judge_auroc(number(value, low, high)) == verdict
    assert judge_auroc(number(value, low, high), both_ways=True) == both_ways


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (-0.01, -0.03, 0.02, "pass"),
        (-0.05, -0.09, -0.01, "warn"),
        (-0.04, -0.09, -0.01, "pass"),
        (-0.10, -0.19, -0.05, "fail"),
        (-0.20, -0.30, -0.10, "fail"),
        (-0.08, -0.20, 0.05, "not_assessable"),
        (-0.08, -0.09, 0.01, "pass"),
        (0.00, math.nan, math.nan, "pass"),
        (-0.50, math.nan, math.nan, "fail"),
        (math.nan, math.nan, math.nan, "not_assessable"),
    ],
)
def test_a_change_is_judged_with_its_interval_and_a_gain_like_a_loss_where_asked(
    value: float, low: float, high: float, verdict: str
) -> None:
    assert judge_change(number(value, low, high)) == verdict
    assert judge_change(number(-value, -high, -low)) == verdict
    assert judge_change(number(value, low, high), both_ways=False) == verdict
    if value < 0:
        assert judge_change(number(-value, -high, -low), both_ways=False) == "pass"


def test_a_gain_whose_interval_reaches_a_failing_loss_is_no_pass() -> None:
    for both_ways in (True, False):
        assert judge_change(number(0.01, -0.3, 0.05), both_ways=both_ways) == "not_assessable"
        assert judge_change(number(0.01, -0.03, 0.05), both_ways=both_ways) == "pass"
    assert judge_change(number(0.02, -0.05, 0.4), both_ways=False) == "pass"
    assert judge_change(number(-0.02, -0.05, 0.4)) == "not_assessable"


def test_the_worst_verdict_counts_and_a_cap_lowers_only_what_is_worse() -> None:
    assert worst(["pass", "warn", "not_assessable"]) == "warn"
    assert worst(iter(())) == "not_assessable"
    assert [capped(v) for v in ("fail", "warn", "not_assessable", "pass")] == [
        *("warn", "warn", "not_assessable", "pass")
    ]


def test_a_perfect_shortcut_fails_also_with_few_patients() -> None:
    truth = np.repeat([1, 0], [25, 300])
    patients = [*(f"p{i // 5}" for i in range(25)), *(f"n{i}" for i in range(300))]
    perfect = auroc_by_group(truth, truth.astype(float), patients)
    assert math.isnan(perfect.low)
    assert judge_auroc(perfect) == "fail"
    assert judge_change(replace(number(-0.5), skipped=5)) == "fail"
    almost = auroc_by_group(truth, np.r_[-1.0, truth[1:]], patients)
    assert judge_auroc(almost) == "fail"


def test_a_verdict_is_told_with_the_number_that_it_rests_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {"file_facts": (0.90, 0.45, 0.99), "frame_70": (0.82, 0.74, 0.90)}
    values |= dict.fromkeys(("frame_90", "brightness"), (0.52, 0.45, 0.60))
    found = tuple(
        AuditFinding(name=name, what=name, metric="auroc", estimate=number(*ends))
        for name, ends in values.items()
    )
    monkeypatch.setattr(audit_items, "baselines", lambda data: found)
    item = audit_items.without_lungs_item(cast(AuditData, None))
    assert item.verdict == "fail"
    assert f"AUROC {found[1].estimate} from this alone: frame_70" in item.reason
    assert audit_items.most_telling(found, "warn") is found[0]  # where the brightness warns
