"""One self-contained page from an evaluation, an audit and figures, with the JSON beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from chestxray_covid import plots
from chestxray_covid._version import NOT_A_DEVICE, __version__
from chestxray_covid.audit_figure import plot_audit
from chestxray_covid.audit_report import AuditFinding, AuditItem, AuditReport
from chestxray_covid.errors import ReportError, check_kind
from chestxray_covid.evaluation_report import EvaluationReport
from chestxray_covid.files import expanded, write_files
from chestxray_covid.intervals import Estimate
from chestxray_covid.page import details, document, element, escaped, figures, listed, table
from chestxray_covid.reporting import CAUTION
from chestxray_covid.subgroups import SMALL, Subgroup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_NAME = "index.html"
EVALUATION_NAME, AUDIT_NAME = "evaluation.json", "audit.json"
#: In the last line of every page.
_MADE_BY = "Made by chestxray-covid"
#: Metric → what it is called on the page; others as they are.
_WORDS = {
    "cramers_v": "Cramér's V",
    "ppv": "positive predictive value",
    "npv": "negative predictive value",
    "auroc": "AUROC",
    "auroc_vs_normal": "AUROC against normal alone",
    "kappa": "Cohen's kappa",
    "brier": "Brier score",
    "ece": "calibration error (ECE)",
}
#: A verdict is told by a word and a sign, not by colour alone.
_SIGNS = {"pass": "✓", "warn": "!", "fail": "✗", "not_assessable": "?"}


def write_report(
    folder: str | os.PathLike[str],
    *,
    evaluation: EvaluationReport | None = None,
    audit: AuditReport | None = None,
    figures: Mapping[str, Figure] | None = None,
    title: str | None = None,
) -> Path:
    """Write ``index.html`` that needs nothing else, and the JSON beside it; return its path.

    Light or dark as the reader's system is, for wide and narrow windows, without scripts. The same
    arguments give the same bytes.

    Args:
        folder: Made if missing; other files in it stay.
        evaluation: Written to ``evaluation.json``, too.
        audit: Written to ``audit.json``, too.
        figures: Caption → further figure, for example of :func:`plot_heatmaps`; radiographs in it
            become part of the page.
        title: Heading of the page; made from what there is if not given.

    Raises:
        TypeError: If one is something else, for example the path of a saved report.
        ValueError: If there is neither an evaluation nor an audit.
        ReportError: If ``index.html`` is there and is a page of something else.
        OSError: If a file cannot be written; older ones are intact.
    """
    from matplotlib.figure import Figure

    if evaluation is not None:
        check_kind(evaluation, EvaluationReport, "evaluate() or EvaluationReport.load(…)")
    if audit is not None:
        check_kind(audit, AuditReport, "audit_shortcuts() or AuditReport.load(…)")
    if figures is not None:
        check_kind(figures, Mapping, "a dict of captions and figures")
        for figure in figures.values():
            check_kind(figure, Figure, "plot_heatmaps()")
    names = {"evaluation": evaluation, "shortcut audit": audit}
    present = [name for name, report in names.items() if report is not None]
    if not present:
        raise ValueError("a report needs an evaluation or an audit")
    check_page(folder)
    heading = title or " and ".join(present).capitalize()
    parts = [element("h1", heading), element("p", NOT_A_DEVICE, "note")]
    contents = {}
    if audit is not None:
        parts += _audit(audit)
        contents[AUDIT_NAME] = audit.to_json().encode()
    if evaluation is not None:
        parts += _evaluation(evaluation)
        contents[EVALUATION_NAME] = evaluation.to_json().encode()
    if figures:
        parts += [element("h2", "Figures"), _figures(figures)]
    parts += [element("h2", "Data"), _links(contents)]
    contents[PAGE_NAME] = document(heading, parts).encode()
    target = expanded(folder)
    target.mkdir(parents=True, exist_ok=True)
    write_files(target, contents)
    return target / PAGE_NAME


_figures = figures


def check_page(folder: str | os.PathLike[str]) -> None:
    """Raise if a page of something else is where the page is to be.

    Raises:
        ReportError: If there is one.
        OSError: If it cannot be read.
    """
    page = expanded(folder) / PAGE_NAME
    if page.is_file() and _MADE_BY.encode() not in page.read_bytes():
        raise ReportError(
            f"{page} is a page of something else, and would be replaced. Pass another folder, for "
            f"example {page.with_name('report')}."
        )


def extend_report(
    folder: str | os.PathLike[str],
    *,
    evaluation: EvaluationReport | None = None,
    audit: AuditReport | None = None,
) -> Path:
    """Write the page like :func:`write_report`, with the evaluation or audit that is there already.

    So ``evaluate --report X`` and ``audit --report X`` give one page of both, in either order. What
    is there of other weights is left out, and so are further figures.

    Args:
        folder: As there.
        evaluation: Replaces the one there.
        audit: Replaces the one there.

    Raises:
        ValueError: If neither is given.
        ReportError: As there.
        OSError: If a file cannot be written; older ones are intact.
    """
    known = {new.weights_sha256 for new in (evaluation, audit) if new is not None} - {""}
    if evaluation is None:
        with suppress(ReportError):
            judged = EvaluationReport.load(Path(folder, EVALUATION_NAME))
            evaluation = judged if judged.weights_sha256 in known else None
    if audit is None:
        with suppress(ReportError):
            audited = AuditReport.load(Path(folder, AUDIT_NAME))
            audit = audited if audited.weights_sha256 in known else None
    return write_report(folder, evaluation=evaluation, audit=audit)


def _links(contents: Mapping[str, bytes]) -> str:
    links = ", ".join(f'<a href="{name}">{name}</a>' for name in contents)
    return f"<p>All numbers: {links}. {_MADE_BY} {escaped(__version__)}.</p>"


# ---------------------------------------------------------------- evaluation


def _evaluation(report: EvaluationReport) -> Iterator[str]:
    yield element("h2", "How good is it?")
    yield element(
        "p",
        f"{report.n_images} images of {report.n_patients} patients. Positive class: "
        f"{report.positive}. Intervals at {100 * report.confidence:g}%, by patient.",
    )
    if report.confounded:
        yield element("p", CAUTION, "note")
    if report.excluded:
        left = "; ".join(f"{count} × {why}" for why, count in report.excluded.items())
        yield element("p", f"Left out: {left}.")
    yield _numbers(report.overall, report.positive)
    yield from _drawn(report)
    yield from _operating_points(report)
    yield from _subgroups(report)
    others = [name for name in report.classes if name != report.positive]
    yield details(
        "The other classes",
        *(part for name in others for part in _class_numbers(report.overall, name)),
    )


def _class_numbers(part: Subgroup, label: str) -> tuple[str, str]:
    return element("h3", label), _estimates(part.per_class[label])


def _numbers(part: Subgroup, label: str) -> str:
    return _estimates({**part.per_class[label], **part.metrics})


def _estimates(found: Mapping[str, Estimate]) -> str:
    rows = [
        (_spoken(name), _value(e), e.interval if e.n else "–", e.n, e.method)
        for name, e in found.items()
    ]
    return table(("", "value", "interval", "n", "interval from"), rows)


def _drawn(report: EvaluationReport) -> Iterator[str]:
    """Yield the figures that these predictions allow, and why others are missing."""
    positive = report.positive
    wanted: dict[str, Callable[[], Figure]] = {
        f"Sensitivity over 1 − specificity of {positive}, with its interval at each point.": (
            lambda: plots.plot_roc(report.roc_curve())
        ),
        "Precision over recall; the dotted line is the share of positives in these data.": (
            lambda: plots.plot_precision_recall(report.precision_recall_curve())
        ),
        f"How often images with a probability of {positive} were one; on the dotted line "
        "probabilities mean what they say.": (
            lambda: plots.plot_reliability(report.reliability(positive))
        ),
        "Wrong decisions if only the surest images are decided.": (
            lambda: plots.plot_risk_coverage(report.risk_coverage_curve())
        ),
        "True class (rows) and predicted class (columns), with the share of the row.": (
            lambda: plots.plot_confusion(report)
        ),
    }
    drawn, missing = {}, []
    for caption, draw in wanted.items():
        try:
            drawn[caption] = draw()
        except ValueError as error:  # one class alone, or a report without predictions
            missing.append(element("p", f"Not drawn: {caption} {error}", "soft"))
    yield figures(drawn)
    yield from missing


def _operating_points(report: EvaluationReport) -> Iterator[str]:
    if not report.operating_points:
        return
    yield element("h3", "Decisions at a threshold")
    heading = ("decision", "chosen by", "sensitivity", "specificity", "PPV", "NPV", "prevalence")
    yield table(
        heading,
        [
            (
                f"{point.title}: {point.score} ≥ {point.threshold!r}",
                f"{point.rule} ({point.chosen_on})",
                *(_short(e) for e in (point.sensitivity, point.specificity, point.ppv, point.npv)),
                f"{point.prevalence:.3g} ({'named' if point.named else 'of these data'})",
            )
            for point in report.operating_points
        ],
    )
    for caution in dict.fromkeys(p.caution for p in report.operating_points if p.caution):
        yield element("p", caution, "note")


def _subgroups(report: EvaluationReport) -> Iterator[str]:
    yield element("h3", f"{report.positive} against all others by subgroup")
    metrics = ("sensitivity", "specificity", "auroc")
    rows = []
    for part in report.subgroups[1:]:
        own = part.counts[report.positive]
        found = part.per_class[report.positive]
        counts = [f"{n}{'*' if n < SMALL else ''}" for n in (own, part.n_images - own)]
        rows.append(
            (
                f"{part.group}: {part.name}",
                part.n_patients,
                *counts,
                *(_short(found[name]) for name in metrics),
            )
        )
    yield table(("", "patients", "positive", "other", *map(_spoken, metrics)), rows)
    if any("*" in str(cell) for row in rows for cell in row[2:4]):
        text = f"* fewer than {SMALL} images: what rests on them says next to nothing."
        yield element("p", text, "soft")


# ---------------------------------------------------------------- audit


def _audit(report: AuditReport) -> Iterator[str]:
    yield element("h2", "Lungs, or data set?")
    yield f"<p>{_badge(report.verdict)} {escaped(report.summary)}.</p>"
    yield element(
        "p",
        f"{report.positive} against {report.negative}: {report.n_images} images of "
        f"{report.n_patients} patients from {', '.join(report.sources)}. Intervals at "
        f"{100 * report.confidence:g}%, by patient.",
    )
    for number, item in enumerate(report.items, 1):
        yield from _item(number, item)
    caption = "Every verdict, and every number with its interval."
    yield details("The audit on one page", figures({caption: plot_audit(report)}))


def _item(number: int, item: AuditItem) -> Iterator[str]:
    yield f"<h3>{number}. {escaped(item.question)} {_badge(item.verdict)}</h3>"
    yield element("p", item.reason)
    for title, rows in item.tables.items():
        columns = list(dict.fromkeys(name for cells in rows.values() for name in cells))
        counts = [(row, *(cells.get(c, 0) for c in columns)) for row, cells in rows.items()]
        yield table((title, *columns), counts)
    if item.findings:
        yield _findings(item.findings)
        yield listed((found.what, found.meaning) for found in item.findings if found.meaning)
    yield element("p", f"Threshold: {item.threshold} ({item.threshold_source}).", "soft")


def _findings(findings: Sequence[AuditFinding]) -> str:
    """Return the numbers, with a column for the change only where something changed."""
    heading = ["", "", "value", "change"]
    rows = [
        [found.what, _spoken(found.metric), _short(found.estimate), _short(found.change, sign="+")]
        for found in findings
    ]
    if not any(row[-1] for row in rows):
        heading, rows = heading[:-1], [row[:-1] for row in rows]
    return table(heading, rows)


def _badge(verdict: str) -> str:
    words = f"{_SIGNS.get(verdict, '?')} {verdict.replace('_', ' ')}"
    kind = verdict if verdict in ("pass", "warn", "fail") else ""
    return element("span", words, f"verdict {kind}".strip())


# ---------------------------------------------------------------- numbers as text


def _spoken(metric: str) -> str:
    return _WORDS.get(metric, metric.replace("_", " "))


def _value(estimate: Estimate, sign: str = "") -> str:
    return _signed(estimate.value, sign) if estimate.value == estimate.value else "undefined"


def _short(estimate: Estimate | None, sign: str = "") -> str:
    """Return the value and its interval in a cell of a table."""
    if estimate is None:
        return ""
    if estimate.value != estimate.value or estimate.low != estimate.low:
        return _value(estimate, sign)
    dash = " to " if sign else "–"
    ends = f"{_signed(estimate.low, sign)}{dash}{_signed(estimate.high, sign)}"
    return f"{_value(estimate, sign)} ({ends})"


def _signed(number: float, sign: str) -> str:
    return f"{number:{sign}.3f}".replace("-", "−")
