"""Predictions as rows: of a CSV, of JSON lines, of Parquet, or on a screen."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from chestxray_covid.errors import require_extra
from chestxray_covid.prediction import FailedPrediction, Prediction

Row: TypeAlias = Prediction | FailedPrediction

_LAST = ("score", "is_positive", "abstained", "flags", "error")


@dataclass(frozen=True)
class TableFormat:
    """How predictions become a file, and what became of the files that have its rows.

    Attributes:
        suffix: Of the file's name.
        head: From classes to what the file begins with.
        encode: From predictions and classes to their rows; rows behind a head are a file.
        reasons: From rows to path and reason of each, ``""`` where it did not fail; a
            ``ValueError`` where they are no such rows.
    """

    suffix: str
    head: Callable[[Sequence[str]], bytes]
    encode: Callable[[Sequence[Row], Sequence[str]], bytes]
    reasons: Callable[[bytes], list[tuple[str, str]]]


def format_of(name: str) -> TableFormat:
    r"""Return the format that the end of a file's name asks for.

    ``.jsonl`` means JSON lines of :meth:`Prediction.to_dict`, ``.parquet`` Parquet, and anything
    else CSV. CSV and Parquet have the columns ``path``, ``label``, ``p_<class>`` for each class,
    ``score``, ``is_positive``, ``abstained``, ``flags`` (names, a space between) and ``error``, of
    which a failed image has the first and the last. A file name that is not UTF-8 is written byte
    for byte in CSV, with its bytes as surrogate escapes in JSON, and as ``\xff`` in Parquet.
    """
    formats = {".jsonl": JSON_LINES, ".parquet": PARQUET}
    return next((f for end, f in formats.items() if name.lower().endswith(end)), CSV)


def _csv_head(classes: Sequence[str]) -> bytes:
    return _csv_bytes([["path", "label", *(f"p_{name}" for name in classes), *_LAST]])


def _csv_rows(results: Sequence[Row], classes: Sequence[str]) -> bytes:
    return _csv_bytes([_cells(result, classes) for result in results])


def _csv_bytes(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def _cells(result: Row, classes: Sequence[str]) -> list[Any]:
    if isinstance(result, FailedPrediction):
        return [result.source, "", *("" for _ in classes), *[""] * 4, str(result.error)]
    shares = [f"{result.probabilities[name]:.6f}" for name in classes]
    score = "" if result.score is None else f"{result.score:.6f}"
    flags = " ".join(flag.name for flag in result.flags)
    answer = [result.label, *shares, score, result.is_positive]
    return [result.source, *answer, result.abstained, flags, ""]


def _check_end(data: bytes, end: bytes) -> None:
    if data and not data.endswith(end):
        raise ValueError("its last row is cut off")


def _csv_reasons(data: bytes) -> list[tuple[str, str]]:
    _check_end(data, b"\r\n")
    text = io.StringIO(data.decode("utf-8", "surrogateescape"), newline="")
    return [(row[0], row[-1]) for row in csv.reader(text)]


def _json_reasons(data: bytes) -> list[tuple[str, str]]:
    _check_end(data, b"\n")
    rows = (json.loads(line) for line in data.splitlines())
    return [(row["source"], row.get("error", "")) for row in rows]


def _parquet(results: Sequence[Row], classes: Sequence[str]) -> bytes:
    pa = require_extra("pyarrow", "parquet")
    text, number, truth = pa.string(), pa.float64(), pa.bool_()
    kinds = {"path": text, "label": text, **{f"p_{name}": number for name in classes}}
    kinds |= dict(zip(_LAST, (number, truth, truth, text, text), strict=True))
    table = pa.Table.from_pylist([_record(r) for r in results], schema=pa.schema(kinds.items()))
    file = io.BytesIO()
    require_extra("pyarrow.parquet", "parquet").write_table(table, file)
    return file.getvalue()


def _record(result: Row) -> dict[str, Any]:
    path = _readable(result.source)
    if isinstance(result, FailedPrediction):
        return {"path": path, "error": _readable(str(result.error))}
    return {
        "path": path,
        "label": result.label,
        **{f"p_{name}": share for name, share in result.probabilities.items()},
        "score": result.score,
        "is_positive": result.is_positive,
        "abstained": result.abstained,
        "flags": " ".join(flag.name for flag in result.flags),
    }


def _readable(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _parquet_reasons(data: bytes) -> list[tuple[str, str]]:
    parquet = require_extra("pyarrow.parquet", "parquet")
    try:
        table = parquet.read_table(io.BytesIO(data), columns=["path", "error"])
    except OSError as error:  # of some damage; there is no file that could be out of reach
        raise ValueError(str(error)) from error
    pairs = zip(table["path"].to_pylist(), table["error"].to_pylist(), strict=True)
    return [(path, error or "") for path, error in pairs]


def _json_rows(results: Sequence[Row], classes: Sequence[str]) -> bytes:
    return "".join(f"{result.to_json()}\n" for result in results).encode()


CSV = TableFormat(".csv", _csv_head, _csv_rows, _csv_reasons)
JSON_LINES = TableFormat(".jsonl", lambda classes: b"", _json_rows, _json_reasons)
PARQUET = TableFormat(".parquet", lambda classes: b"", _parquet, _parquet_reasons)


def heading(classes: Sequence[str]) -> str:
    """Return the first line of a table of predictions on a screen."""
    width = _width(classes)
    return f"{'label':<{width}}{''.join(f'{name:>{width}}' for name in classes)}  path"


def line(result: Row) -> str:
    """Return a row of the table; a name that a terminal must not see raw is escaped."""
    name = result.source if result.source.isprintable() else ascii(result.source)
    if isinstance(result, FailedPrediction):
        return f"{'failed':<12}  {name}"
    width = _width(result.probabilities)
    shares = "".join(f"{share:>{width}.4f}" for share in result.probabilities.values())
    notes = [*(["abstained"] if result.abstained else []), *(flag.name for flag in result.flags)]
    noted = f"  [{', '.join(notes)}]" if notes else ""
    return f"{result.label:<{width}}{shares}  {name}{noted}"


def _width(classes: Iterable[str]) -> int:
    """Return the width of a column, with room between the longest names."""
    return max([12, *(len(name) + 2 for name in classes)])
