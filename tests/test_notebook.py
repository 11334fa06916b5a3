from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from IPython.lib.pretty import pretty

from chestxray_covid import SyntheticChestXray, confounding
from chestxray_covid.evaluation import evaluate_probabilities
from chestxray_covid.notebook import ShownAsText
from chestxray_covid.reporting import SavedReport


def report() -> Any:
    truth = ["normal", "covid19"] * 8
    p = np.linspace(0.1, 0.9, len(truth))
    whose = [str(i) for i in range(len(truth))]
    return evaluate_probabilities(
        truth,
        np.stack([1 - p, p], axis=1),
        classes=("normal", "covid19"),
        patients=whose,
        sources=["one"] * len(truth),
        views=["PA"] * len(truth),
    )


@pytest.mark.parametrize(
    "make",
    [
        report,
        lambda: report().operating_point(threshold=0.5),
        lambda: report().compare(report()),
        lambda: SyntheticChestXray(4).report(),
        lambda: confounding(SyntheticChestXray(4)),
    ],
    ids=["evaluation", "operating point", "comparison", "data set", "confounding"],
)
def test_a_notebook_shows_what_print_shows(make: Callable[[], Any]) -> None:
    shown = make()
    assert pretty(shown) == str(shown) != repr(shown)  # type: ignore[no-untyped-call]


def test_every_report_that_is_saved_is_shown_so() -> None:
    assert issubclass(SavedReport, ShownAsText)
