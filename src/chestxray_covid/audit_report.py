"""What a shortcut audit found: items with verdicts, as JSON and as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self, TypeVar

from chestxray_covid.datasets.report import printable, printable_lines
from chestxray_covid.errors import ReportError, check_classes
from chestxray_covid.files import plain_json
from chestxray_covid.intervals import Estimate
from chestxray_covid.judged_images import whole_characters
from chestxray_covid.reporting import SavedReport

FAIL, WARN, NOT_ASSESSABLE, PASS = "fail", "warn", "not_assessable", "pass"
#: The worst first.
VERDICTS = (FAIL, WARN, NOT_ASSESSABLE, PASS)
_SPOKEN = {
    FAIL: "the data set or the model has a shortcut: its scores are no evidence of disease",
    WARN: "there are signs of a shortcut: read the items before trusting a score",
    NOT_ASSESSABLE: "nothing was found where one could look, but not everything could be looked at",
    PASS: "no shortcut was found; one that these items do not look for may still be there",
}
#: Of a model that fails in nothing else: one that knows its patients need not use a shortcut.
_LOST = (
    "the model was trained on patients who are judged here, or loses where the source cannot help: "
    "its scores are no evidence of disease"
)
_FORMAT = 1
_WIDTH = 100
_Part = TypeVar("_Part")


@dataclass(frozen=True, kw_only=True)
class AuditFinding:
    """One measured number.

    Attributes:
        name: Which one, for code: ``"lungs_hidden"``.
        what: Which one, in words: ``"lungs hidden"``.
        metric: What the number is: ``"auroc"``, ``"cramers_v"`` or ``"share"``.
        estimate: The number with its interval by patient; its value is ``nan`` if undefined.
        change: What it is compared with subtracted from it, with the interval of the difference;
            ``None`` if it is compared with nothing.
        meaning: A sentence that says what it means, or why it is undefined.
    """

    name: str
    what: str
    metric: str
    estimate: Estimate
    change: Estimate | None = None
    meaning: str = ""


@dataclass(frozen=True, kw_only=True)
class AuditItem:
    """One question of the audit and its answer.

    Attributes:
        name: ``"confounding"``, ``"without_lungs"``, ``"occlusion"``, ``"features"``,
            ``"generalisation"`` or ``"heat"``.
        question: What is asked.
        verdict: ``"pass"``, ``"warn"``, ``"fail"``, or ``"not_assessable"`` where data are missing.
        reason: What the verdict rests on.
        threshold: Where the verdicts begin, in words.
        threshold_source: Where the thresholds come from.
        findings: The numbers.
        tables: Title → row → column → number of images.

    Raises:
        ValueError: If the verdict is none of the four.
    """

    name: str
    question: str
    verdict: str
    reason: str
    threshold: str
    threshold_source: str
    findings: tuple[AuditFinding, ...] = ()
    tables: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {VERDICTS}, got {self.verdict!r}")

    def finding(self, name: str) -> AuditFinding:
        """Return the number of a name.

        Raises:
            KeyError: If there is none.
        """
        return {found.name: found for found in self.findings}[name]


@dataclass(frozen=True, kw_only=True)
class AuditReport(SavedReport):
    """Whether a classifier, and the data that it is judged on, tell lungs from sources.

    Attributes:
        classes: Labels of the classifier, in its order.
        positive: The class in question, usually ``"covid19"``.
        negative: What it was told from: a class, or ``"rest"`` for all others.
        n_images: Images of the two that were audited.
        n_patients: Their patients; one who is known in two collections is one.
        sources: Their sources.
        confidence: Level of all intervals.
        n_resamples: Resamples of the bootstrap over patients.
        seed: Seed of bootstrap and folds.
        items: The questions, in order.
        weights_sha256: SHA-256 of the audited weights, as :attr:`Classifier.weights_sha256`; empty
            if nobody said.
    """

    _KIND = "an audit report"

    classes: tuple[str, ...]
    positive: str
    negative: str
    n_images: int
    n_patients: int
    sources: tuple[str, ...]
    confidence: float
    n_resamples: int
    seed: int
    items: tuple[AuditItem, ...]
    weights_sha256: str = ""

    @property
    def verdict(self) -> str:
        """The first of ``"fail"``, ``"warn"``, ``"not_assessable"`` and ``"pass"`` of any item.

        So a pass means that every item was assessed and passed.
        """
        found = {item.verdict for item in self.items}
        return next((verdict for verdict in VERDICTS if verdict in found), NOT_ASSESSABLE)

    @property
    def summary(self) -> str:
        """What the verdict means, as a sentence without its full stop."""
        failed = {item.name for item in self.items if item.verdict == FAIL}
        return _LOST if failed == {"generalisation"} else _SPOKEN[self.verdict]

    def item(self, name: str) -> AuditItem:
        """Return the item of a name.

        Raises:
            KeyError: If there is none.
        """
        return {item.name: item for item in self.items}[name]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data; undefined numbers are ``None``."""
        return {"format_version": _FORMAT, "verdict": self.verdict, **plain_json(asdict(self))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the report that :meth:`to_dict` described.

        Raises:
            ReportError: If it is of another format, or a field is missing, unknown or impossible.
        """
        try:
            if data["format_version"] != _FORMAT:
                raise ValueError(f"format {data['format_version']!r}, this version reads {_FORMAT}")
            own: dict[str, Any] = {"weights_sha256": ""}
            own |= {k: v for k, v in data.items() if k not in ("format_version", "verdict")}
            own["classes"] = check_classes(own["classes"])
            own["sources"] = tuple(own["sources"])
            if not all(isinstance(source, str) for source in own["sources"]):
                raise ValueError(f"{cls.__name__} cannot have the sources {own['sources']!r}")
            own["items"] = tuple(_item_from(item) for item in own["items"])
            report = _made(cls, own)
            if report.verdict != data["verdict"]:
                raise ValueError(f"verdict {data['verdict']!r}, the items say {report.verdict!r}")
            return report
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReportError(f"This is no audit report: {error!r}. Audit the model again.") from (
                error
            )

    def __str__(self) -> str:
        return printable_lines("\n".join(_text(self)))


_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "Estimate": Estimate,
    "Estimate | None": (Estimate, type(None)),
}


def _made(kind: type[_Part], own: Mapping[str, Any]) -> _Part:
    """Return a dataclass of exactly these fields, each of its type."""
    names = {f.name: str(f.type) for f in fields(kind)}  # type: ignore[arg-type]
    if set(own) != set(names):
        raise ValueError(f"{kind.__name__} has the fields {sorted(names)}, got {sorted(own)}")
    for name, expected in names.items():
        wanted = _KINDS.get(expected, object)
        if not isinstance(own[name], wanted) or isinstance(own[name], bool):
            raise ValueError(f"{kind.__name__} cannot have the {name} {own[name]!r}")
    return kind(**own)


def _item_from(data: Mapping[str, Any]) -> AuditItem:
    own = dict(data)
    own["findings"] = tuple(_finding_from(finding) for finding in own["findings"])
    own["tables"] = {
        title: {row: {c: int(n) for c, n in cells.items()} for row, cells in rows.items()}
        for title, rows in own["tables"].items()
    }
    return _made(AuditItem, own)


def _finding_from(data: Mapping[str, Any]) -> AuditFinding:
    own = dict(data)
    own["estimate"] = Estimate.from_dict(own["estimate"])
    own["change"] = None if own["change"] is None else Estimate.from_dict(own["change"])
    return _made(AuditFinding, own)


def _text(report: AuditReport) -> Iterator[str]:
    yield f"Shortcut audit: {report.verdict.upper()}"
    yield f"{report.positive} against {report.negative}: {report.summary}."
    yield (
        f"{report.n_images} images of {report.n_patients} patients from "
        f"{printable(', '.join(report.sources))}; intervals by patient at "
        f"{100 * report.confidence:g} %."
    )
    for number, item in enumerate(report.items, 1):
        yield f"\n{number}. {item.question} {item.verdict.upper()}"
        yield from _wrapped(item.reason)
        for title, table in item.tables.items():
            yield textwrap.indent(f"{title}:\n{_table(table)}", "   ")
        for found in item.findings:
            change = f"; change {_signed(found.change)}" if found.change else ""
            yield f"   {found.what}: {found.metric} {found.estimate}{change}"
            yield from _wrapped(found.meaning, "      ")
        yield from _wrapped(f"Threshold: {item.threshold} ({item.threshold_source}).")


def _wrapped(text: str, indent: str = "   ") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)


def _signed(change: Estimate) -> str:
    if change.value != change.value:
        return "undefined"
    ends = "no interval" if change.low != change.low else f"{change.low:+.3f} to {change.high:+.3f}"
    return f"{change.value:+.3f} ({ends})"


def _table(rows: Mapping[str, Mapping[str, int]]) -> str:
    import pandas as pd

    return str(pd.DataFrame(whole_characters(rows)).T.to_string())
