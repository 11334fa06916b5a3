"""The audit on one page."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from chestxray_covid.audit_report import FAIL, NOT_ASSESSABLE, PASS, WARN, AuditFinding, AuditReport
from chestxray_covid.audit_verdicts import NOTABLE, STRONG
from chestxray_covid.errors import check_kind
from chestxray_covid.reporting import short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours that stay apart for the colour-blind: Okabe and Ito, Color universal design, 2008.
_COLOURS = {FAIL: "#d55e00", WARN: "#e69f00", NOT_ASSESSABLE: "#777777", PASS: "#009e73"}
_SPOKEN = {FAIL: "fail", WARN: "warn", NOT_ASSESSABLE: "not assessable", PASS: "pass"}
#: A4 in inches.
_PAGE = (8.27, 11.69)
#: Share of the page that the numbers take, and how many of them it holds.
_BODY, _FIT_A_PAGE = 0.58, 45


def plot_audit(report: AuditReport) -> Figure:
    """Return a page with the verdicts and every number, each with its interval.

    With very many sources it is longer than A4. Numbers without a value are left out, tables too.
    The figure is not shown, and pyplot knows nothing of it: ``figure.savefig("audit.pdf")`` writes
    it.

    Raises:
        TypeError: If it is something else, for example the path of a saved one.
    """
    from matplotlib.figure import Figure

    check_kind(report, AuditReport, "audit_shortcuts() or AuditReport.load(…)")
    numbers = sum(len(_defined(item.findings)) for item in report.items)
    more = max(0, numbers - _FIT_A_PAGE) * _PAGE[1] * _BODY / _FIT_A_PAGE
    figure = Figure(figsize=(_PAGE[0], _PAGE[1] + more), layout="constrained")
    # Two parts, so that the text has the width of the page and not that of the axes below.
    heights = (_PAGE[1] * (1 - _BODY), _PAGE[1] * _BODY + more)
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    head, body = parts
    _write_verdicts(head.subplots(), report)
    _draw_numbers(body.subplots(), report)
    return figure


def _write_verdicts(axes: Axes, report: AuditReport) -> None:
    axes.set_axis_off()
    axes.set_title(
        f"Shortcut audit: {_SPOKEN[report.verdict]}",
        loc="left",
        fontsize=14,
        fontweight="bold",
        color=_COLOURS[report.verdict],
    )
    what = (
        f"{report.positive} against {report.negative}; {report.n_images} images of "
        f"{report.n_patients} patients from {', '.join(map(short_name, report.sources))}"
    )
    what = textwrap.shorten(what, 400, placeholder=" …")
    lines = [(text, "black", "normal") for text in textwrap.wrap(what, 100)]
    for number, item in enumerate(report.items, 1):
        lines.append(
            (
                f"{number}. {item.question} {_SPOKEN[item.verdict].upper()}",
                _COLOURS[item.verdict],
                "bold",
            )
        )
        reason = textwrap.shorten(item.reason, 290, placeholder=" …")
        lines += [(f"    {text}", "black", "normal") for text in textwrap.wrap(reason, 104)]
    step = 1 / max(len(lines), 1)
    for row, (text, colour, weight) in enumerate(lines):
        how: dict[str, Any] = {"color": colour, "fontweight": weight, "fontsize": 8, "va": "top"}
        axes.text(0, 1 - row * step, text, parse_math=False, **how)


def _draw_numbers(axes: Axes, report: AuditReport) -> None:
    rows: list[tuple[AuditFinding, str]] = [
        (found, item.verdict) for item in report.items for found in _defined(item.findings)
    ]
    for row, (found, verdict) in enumerate(rows):
        estimate = found.estimate
        if estimate.low == estimate.low:
            axes.plot([estimate.low, estimate.high], [row, row], color=_COLOURS[verdict], lw=1.5)
        axes.plot([estimate.value], [row], "o", color=_COLOURS[verdict], ms=4)
    names = [short_name(found.what, 48) for found, _ in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7, parse_math=False)
    for place, style in ((0.5, "-"), (NOTABLE, ":"), (STRONG, "--")):
        axes.axvline(place, color="#bbbbbb", linestyle=style, linewidth=0.8, zorder=0)
    edge = -0.5
    for item in report.items:
        edge += len(_defined(item.findings))
        axes.axhline(edge, color="#dddddd", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.set_xlabel(
        f"AUROC, unless said otherwise; bars: {100 * report.confidence:g} % by patient; "
        f"lines: chance, {NOTABLE} and {STRONG}",
        fontsize=8,
    )
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _defined(findings: tuple[AuditFinding, ...]) -> list[AuditFinding]:
    return [found for found in findings if found.estimate.value == found.estimate.value]
