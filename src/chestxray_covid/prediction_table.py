"""Predictions as a table on a screen, or as a file: CSV or JSON lines, complete or not there."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chestxray_covid.prediction import FailedPrediction, Prediction

_FLAGS = ("abstained", "flags")


@contextmanager
def prediction_writer(
    path: str | os.PathLike[str], classes: Sequence[str]
) -> Iterator[Callable[[Prediction | FailedPrediction], None]]:
    """Yield a function that takes predictions one by one and writes them to a file.

    The file appears when the block ends without an error. CSV has the columns ``path``, ``label``,
    ``p_<class>`` for each class, ``score``, ``is_positive``, ``abstained``, ``flags`` (names, a
    space between) and ``error``, of which a failed image has the first and the last; JSON lines
    hold :meth:`Prediction.to_dict`. A file name that is not UTF-8 is written byte for byte in CSV,
    and with its bytes as surrogate escapes in JSON.

    Args:
        path: Ends in ``.jsonl`` for JSON lines, anything else is CSV. Its folder is made.
        classes: Labels in the order of the columns.

    Raises:
        OSError: If it cannot be written; nothing is left behind.
    """
    output = Path(path)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            if output.suffix.lower() == ".jsonl":

                def write(result: Prediction | FailedPrediction) -> None:
                    file.write(result.to_json() + "\n")

                yield write
            else:
                table = csv.writer(file)
                names = (f"p_{name}" for name in classes)
                table.writerow(["path", "label", *names, "score", "is_positive", *_FLAGS, "error"])
                yield lambda result: table.writerow(_cells(result, classes))
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _cells(result: Prediction | FailedPrediction, classes: Sequence[str]) -> list[Any]:
    if isinstance(result, FailedPrediction):
        return [result.source, "", *("" for _ in classes), *[""] * 4, str(result.error)]
    shares = [f"{result.probabilities[name]:.6f}" for name in classes]
    score = "" if result.score is None else f"{result.score:.6f}"
    flags = " ".join(flag.name for flag in result.flags)
    answer = [result.label, *shares, score, result.is_positive]
    return [result.source, *answer, result.abstained, flags, ""]


def heading(classes: Sequence[str]) -> str:
    """Return the first line of a table of predictions on a screen."""
    return f"{'label':<12}{''.join(f'{name:>12}' for name in classes)}  path"


def line(result: Prediction | FailedPrediction) -> str:
    """Return a row of the table; a name that a terminal must not see raw is escaped."""
    name = result.source if result.source.isprintable() else ascii(result.source)
    if isinstance(result, FailedPrediction):
        return f"{'failed':<12}  {name}"
    shares = "".join(f"{share:>12.4f}" for share in result.probabilities.values())
    notes = [*(["abstained"] if result.abstained else []), *(flag.name for flag in result.flags)]
    noted = f"  [{', '.join(notes)}]" if notes else ""
    return f"{result.label:<12}{shares}  {name}{noted}"
