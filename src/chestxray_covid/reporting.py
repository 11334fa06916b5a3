"""A report as a file, as text, and as Markdown after the checklists of the field."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from chestxray_covid._version import NOT_A_DEVICE
from chestxray_covid.errors import ReportError
from chestxray_covid.files import expanded, parse_json, write_files
from chestxray_covid.intervals import Estimate
from chestxray_covid.notebook import ShownAsText
from chestxray_covid.subgroups import SMALL, Subgroup

if TYPE_CHECKING:
    from chestxray_covid.evaluation_report import EvaluationReport

#: Shares of the images that a table of the risk shows.
_COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.5)
CAUTION = "The source all but gives the label here: these numbers cannot tell disease from source."
#: What makes a line of Markdown a heading, a fence, a rule, or an item of a list.
_BLOCK = re.compile(r"^(\d{1,9}(?=[.)](?: |$))|(?=[#=~]|[-+](?:[ -]|$)))")


class SavedReport(ShownAsText, ABC):
    """A report that can be kept as a file of strict JSON."""

    #: What it is, with its article, for messages.
    _KIND: ClassVar[str]

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data; undefined numbers are ``None``."""

    @classmethod
    @abstractmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the report that :meth:`to_dict` described."""

    def to_json(self) -> str:
        """Return the report as strict JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as JSON, complete or not at all, and return its path.

        Raises:
            OSError: If it cannot be written; an older file is intact.
        """
        target, text = expanded(path), self.to_json()
        target.parent.mkdir(parents=True, exist_ok=True)
        write_files(target.parent, {target.name: text.encode()})
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the report that :meth:`save` wrote.

        Raises:
            ReportError: If the file cannot be read, is no strict JSON, or is no report.
        """
        try:
            data = expanded(path).read_bytes()
            return cls.from_dict(parse_json(data, limit=len(data)))
        except (OSError, ValueError) as error:
            raise ReportError(f"{path} cannot be read as {cls._KIND}: {error}") from error


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
        "positive": counted(own),
        "other": counted(part.n_images - own),
        **{name: _short(found[name]) for name in shown},
    }


def counted(count: int) -> str:
    """Return a number of images, with a star if what rests on it says next to nothing."""
    return f"{count}{'*' if count < SMALL else ''}"


def markdown_results(report: EvaluationReport) -> Iterator[str]:
    """Yield the lines of a report's numbers as Markdown."""
    yield f"# Evaluation: {markdown_text(report.positive)} against all others"
    yield f"\n{NOT_A_DEVICE}"
    if report.confounded:
        yield f"\n**{CAUTION}**"
    yield (
        f"\n{report.n_images} images of {report.n_patients} patients; intervals at "
        f"{100 * report.confidence:g} %, by patient."
    )
    yield "\n## Performance\n"
    found = (("all", report.overall.metrics), *report.overall.per_class.items())
    yield from markdown_table(
        ("Class", "Metric", "Value", "Images", "Interval from"),
        [
            (label, name.replace("_", " "), _short(e), e.n, e.method)
            for label, metrics in found
            for name, e in metrics.items()
        ],
    )
    yield "\nDecisions (columns) for the truth (rows):\n"
    confusion = zip(report.classes, report.overall.confusion, strict=True)
    yield from markdown_table(("", *report.classes), [(name, *row) for name, row in confusion])
    if report.operating_points:
        yield "\n## Thresholds\n"
        yield from _markdown_points(report)
    yield "\n## Subgroups\n"
    rows = [_row(report, part) for part in report.subgroups]
    yield from markdown_table(tuple(name.capitalize() for name in rows[0]), map(dict.values, rows))
    yield f"\n\\* fewer than {SMALL} images: what rests on them says next to nothing."
    if report.predictions is not None:
        yield from _markdown_probabilities(report)


def _markdown_points(report: EvaluationReport) -> Iterator[str]:
    names = ("sensitivity", "specificity", "ppv", "npv")
    yield from markdown_table(
        ("Positive where", "Threshold from", "Chosen on", *names, "Prevalence"),
        [
            (
                f"{point.score} >= {point.threshold!r} ({point.title})",
                point.rule,
                point.chosen_on,
                *(_short(getattr(point, name)) for name in names),
                f"{point.prevalence:.3g} ({'named' if point.named else 'of these data'})",
            )
            for point in report.operating_points
        ],
    )
    for caution in dict.fromkeys(point.caution for point in report.operating_points):
        if caution:
            yield f"\n{markdown_text(caution)}"


def _markdown_probabilities(report: EvaluationReport) -> Iterator[str]:
    diagram, risk = report.reliability(report.positive), report.risk_coverage_curve()
    yield f"\n## Reliability of p({markdown_text(report.positive)})\n"
    edges = zip(diagram.low_edges, diagram.high_edges, strict=True)
    bins = zip(edges, diagram.predicted, diagram.observed, strict=True)
    yield from markdown_table(
        ("Probability", "Mean", "Came true", "Images"),
        [(f"{a:.2f}–{b:.2f}", f"{p:.3f}", _short(e), counted(e.n)) for (a, b), p, e in bins],
    )
    yield f"\nExpected calibration error {diagram.ece}, Brier score {diagram.brier}."
    yield f"Calibration intercept {diagram.intercept}, at best 0; slope {diagram.slope}, at best 1."
    yield "\n## Wrong decisions if the least sure are left to others\n"
    places = [int((risk.x < share - 1e-12).sum()) for share in _COVERAGES]
    yield from markdown_table(
        ("Images kept", "Wrong among them"),
        [(f"{risk.x[i]:.1%}", f"{risk.y[i]:.1%}") for i in places],
    )
    yield f"\nMean over all shares kept (AURC): {risk.area}."


def _short(estimate: Estimate) -> str:
    return str(estimate).replace(f", n = {estimate.n}", "")


def markdown_table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return the lines of a table, every cell as plain text."""
    lines = [[markdown_text(cell, 10_000) for cell in line] for line in (head, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return [f"| {' | '.join(line)} |" for line in lines]


def markdown_text(value: Any, max_chars: int = 1000) -> str:
    r"""Return text that Markdown shows as it is, on one line, cut where it is too long.

    >>> print(markdown_text("<b>|[x](http://y)"))
    &lt;b&gt;\|\[x\](http&#58;//y)
    """
    text = " ".join(str(value).split())[:max_chars].replace("&", "&amp;")
    text = text.replace("<", "&lt;").replace(">", "&gt;").replace("://", "&#58;//")
    text = text.replace("@", "&#64;").replace("www.", "www&#46;")  # would become links on their own
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)


def told_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a report tells of a checkpoint's provenance.

    Without places of the training machine, and without what only resuming reads.

    >>> told_of({"seed": 1, "identity": {}, "train": {"root": "/data", "kept": 5}})
    {'seed': 1, 'train': {'kept': 5}}
    """
    return {
        key: {k: v for k, v in value.items() if k not in ("root", "cache_dir")}
        if isinstance(value, Mapping)
        else value
        for key, value in provenance.items()
        if key != "identity"
    }


def short_name(name: str, limit: int = 24) -> str:
    """Return a name from data as a label: printable, and not longer than there is room.

    It is cut in the middle, for names that are alike often differ at their ends.

    >>> short_name("Pneumonia/Bacterial/Streptococcus")
    'Pneumonia/Ba…reptococcus'
    """
    text = name if name.isprintable() else ascii(name)[1:-1]
    tail = limit // 2 - 1
    return text if len(text) <= limit else f"{text[: limit - 1 - tail]}…{text[-tail:]}"


def foreign_text(value: Any, max_chars: int = 1000) -> str:
    r"""Return text that somebody else wrote so that Markdown, and a terminal, show it as it is.

    Characters that cannot be printed are left out: they could steer a terminal or turn the text
    around. It is one line, and no heading or list even where a line begins with it.

    Args:
        value: Text, or anything that becomes one.
        max_chars: It is cut after so many characters.

    >>> print(foreign_text("# Approved\n\x1b[31mby nobody"))
    \# Approved \[31mby nobody
    """
    line = "".join(c for c in " ".join(str(value).split()) if c.isprintable())
    return _BLOCK.sub(r"\1\\", markdown_text(line, max_chars))
