"""What was measured on a checkpoint and lies beside it, and whether it was this checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from chestxray_covid.audit_report import AuditReport
from chestxray_covid.checkpoint import WEIGHTS_NAME, ModelConfig
from chestxray_covid.errors import CheckpointError, ConfigError, ReportError
from chestxray_covid.evaluation_report import EvaluationReport
from chestxray_covid.files import parse_json, read_limited

#: Further tables of a card, beside a checkpoint.
MEASUREMENTS_NAME = "measurements.json"
#: What a model must have been through before it is published.
JUDGED = ("evaluation.json", "audit.json")
#: Results that belong to a checkpoint and go with it.
RESULTS = (*JUDGED, MEASUREMENTS_NAME, "history.json", "confounding.json")
#: The predictions of a large evaluation come to some MB.
_MAX_BYTES = 50_000_000
_LARGEST = 2**63 - 1
Report = TypeVar("Report", EvaluationReport, AuditReport)


@dataclass(frozen=True, kw_only=True)
class Results:
    """The results beside a checkpoint, all of its weights.

    Attributes:
        contents: File name → content, the very bytes that all else was read from.
        evaluation: Of ``evaluation.json``.
        audit: Of ``audit.json``.
        tables: Of ``measurements.json``, each with ``title``, ``note``, ``head`` and ``rows``.
    """

    contents: Mapping[str, bytes]
    evaluation: EvaluationReport | None = None
    audit: AuditReport | None = None
    tables: tuple[Mapping[str, Any], ...] = ()


def read_results(folder: Path, config: ModelConfig) -> Results:
    """Return the results in a folder.

    Args:
        folder: Of the checkpoint.
        config: Of the checkpoint.

    Raises:
        CheckpointError: If a file is too large.
        ReportError: If one is damaged, or was measured on other weights or classes, or does not
            say on which.
    """
    contents = {name: read_file(folder / name) for name in RESULTS if (folder / name).is_file()}
    evaluation = _report(EvaluationReport, contents, folder / "evaluation.json", config)
    audit = _report(AuditReport, contents, folder / "audit.json", config)
    tables = _measurements(contents, folder / MEASUREMENTS_NAME, config)
    for name in contents.keys() - {*JUDGED, MEASUREMENTS_NAME}:  # no weights are named in these
        try:
            if not isinstance(parse_json(contents[name], limit=_MAX_BYTES), dict):
                raise ConfigError("no object")
        except ConfigError as error:
            raise ReportError(
                f"{folder / name}: {error}. Make it again, or take it away."
            ) from error
    return Results(contents=contents, evaluation=evaluation, audit=audit, tables=tables)


def read_file(path: Path) -> bytes:
    """Return the content of a file that goes with a checkpoint.

    Raises:
        CheckpointError: If it is too large or cannot be read.
    """
    try:
        data = read_limited(path, _MAX_BYTES)
    except ConfigError as error:
        raise CheckpointError(f"{path} {error}") from error
    if len(data) > _MAX_BYTES:
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, expected at most {_MAX_BYTES}."
        )
    return data


def check_origin(path: Path, config: ModelConfig, weights: Any, classes: Sequence[str]) -> None:
    """Raise unless a result was measured on the weights and classes of a checkpoint.

    Args:
        path: Of the result, for messages.
        config: Of the checkpoint.
        weights: SHA-256 that the result names; empty if it names none.
        classes: Those of the result.

    Raises:
        ReportError: If it was not.
    """
    if weights != config.weights_sha256:
        named = f"names the SHA-256 {str(weights)[:100]}" if weights else "names no SHA-256"
        raise ReportError(
            f"{path} was not measured on these weights: it {named}, {WEIGHTS_NAME} has "
            f"{config.weights_sha256}. Measure these weights, or take the file away."
        )
    if tuple(classes) != config.classes:
        raise ReportError(
            f"{path} was measured with the classes {str(list(classes))[:200]}, the checkpoint has "
            f"{list(config.classes)}. Measure it with these classes, or take the file away."
        )


def _report(
    kind: type[Report], contents: Mapping[str, bytes], path: Path, config: ModelConfig
) -> Report | None:
    if path.name not in contents:
        return None
    try:
        content = parse_json(contents[path.name], limit=_MAX_BYTES)
        _check_values(content)
        report = kind.from_dict(content)
        table = getattr(report, "predictions", None)
        if table is not None and any(isinstance(c, list | dict) for c in table.to_numpy().flat):
            raise ValueError("a cell of the predictions is neither text nor number")
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ReportError(f"{path} cannot be read as a report: {error}. Make it again.") from error
    check_origin(path, config, report.weights_sha256, report.classes)
    return report


def _check_values(content: Any) -> None:
    """Raise ``ValueError`` if JSON holds half a character, or an integer that NumPy has not."""
    if isinstance(content, dict):
        _check_values([*content, *content.values()])
    elif isinstance(content, list):
        for value in content:
            _check_values(value)
    elif isinstance(content, str):
        content.encode()
    elif isinstance(content, int) and abs(content) > _LARGEST:
        raise ValueError(f"an integer is larger than {_LARGEST}")


def _measurements(
    contents: Mapping[str, bytes], path: Path, config: ModelConfig
) -> tuple[Mapping[str, Any], ...]:
    if path.name not in contents:
        return ()
    try:
        content = parse_json(contents[path.name])
        _check_values(content)
        tables, weights, classes = (content[k] for k in ("tables", "weights_sha256", "classes"))
        if not isinstance(classes, list):
            raise ValueError("classes are no list")
        for table in tables:
            lines = [table["head"], *table["rows"], [table["title"], table["note"]]]
            if not all(isinstance(cell, str) for line in lines for cell in line):
                raise ValueError("a cell is no text")
            if any(len(line) != len(table["head"]) for line in table["rows"]):
                raise ValueError("a row is longer or shorter than the head")
    except (ConfigError, LookupError, TypeError, ValueError) as error:
        raise ReportError(
            f"{path} does not hold weights_sha256, classes and tables, each with title, note, head "
            f"and rows: {error!r}. Make it again."
        ) from error
    check_origin(path, config, weights, classes)
    return tuple(tables)
