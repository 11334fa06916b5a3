"""A report as text, and as Markdown after the checklists of the field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from chestxray_covid.subgroups import SMALL, Subgroup

if TYPE_CHECKING:
    from chestxray_covid.evaluation_report import EvaluationReport

CAUTION = "The source all but gives the label here: these numbers cannot tell disease from source."


def report_text(report: EvaluationReport) -> Iterator[str]:
    """Yield a report's text for a terminal, piece by piece."""
    import pandas as pd

    yield (
        f"{report.n_images} images of {report.n_patients} patients, positive class "
        f"{report.positive}, intervals at {100 * report.confidence:g} %"
    )
    if report.confounded:
        yield CAUTION
    frame = report.to_frame()
    overall = frame[frame["group"] == "overall"].drop(columns=["group", "subgroup"])
    yield f"\n{overall.to_string(index=False, na_rep='–', float_format='{:.3f}'.format)}\n"
    names = list(report.classes)
    confusion = pd.DataFrame(report.overall.confusion, names, names)
    yield f"Predicted (columns) for the truth (rows):\n{confusion.to_string()}\n"
    for point in report.operating_points:
        yield f"{point}\n"
    rows = [_row(report, part) for part in report.subgroups[1:]]
    table = pd.DataFrame(rows).to_string(index=False)
    yield f"{report.positive} against all others by subgroup:\n{table}"
    if "*" in table:
        yield f"* fewer than {SMALL} images: what rests on them says next to nothing"


def _row(report: EvaluationReport, part: Subgroup) -> dict[str, str]:
    """Return a subgroup as a row of text."""
    own = part.counts[report.positive]
    shown = ("sensitivity", "specificity", "auroc")
    found = part.per_class[report.positive]
    return {
        "group": part.group,
        "subgroup": part.name,
        "patients": f"{part.n_patients}",
        "positive": _counted(own),
        "other": _counted(part.n_images - own),
        **{name: str(found[name]).replace(f", n = {found[name].n}", "") for name in shown},
    }


def _counted(count: int) -> str:
    return f"{count}{'*' if count < SMALL else ''}"
