"""What an evaluation found: subgroups with their numbers, as JSON, table and text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from chestxray_covid import metrics as m
from chestxray_covid.datasets.base import check_classes
from chestxray_covid.errors import ReportError
from chestxray_covid.files import write_files
from chestxray_covid.intervals import Estimate

if TYPE_CHECKING:
    import pandas as pd

#: Subgroups with fewer images are flagged: their numbers say next to nothing.
SMALL = 20
CAUTION = "The source all but gives the label here: these numbers cannot tell disease from source."
_FORMAT = 1
IDENTITY = ("id", "label", "patient_id", "source", "view")
_COLUMNS = ("group", "subgroup", "class", "metric", "value", "low", "high", "n", "method")


@dataclass(frozen=True, kw_only=True)
class Subgroup:
    """The numbers on one part of the images.

    Attributes:
        group: ``"overall"``, ``"source"`` or ``"view"``.
        name: Which one; ``"all"`` overall.
        n_images: Images in it.
        n_patients: Patients in it.
        small: Whether it has fewer than 20 images.
        confusion: K rows of K counts; rows are the truth, columns the prediction.
        metrics: ``accuracy``, ``kappa``, ``brier`` and ``ece``, over all classes.
        per_class: Class → ``sensitivity``, ``specificity``, ``ppv``, ``npv``, ``auroc`` and
            ``average_precision`` of that class against all others; the decision is the class of
            the highest probability. With more than two classes, the positive one also has
            ``auroc_vs_normal``: of p / (p + p(normal)), over the images that are one of the two.
    """

    group: str
    name: str
    n_images: int
    n_patients: int
    small: bool
    confusion: tuple[tuple[int, ...], ...]
    metrics: Mapping[str, Estimate]
    per_class: Mapping[str, Mapping[str, Estimate]]


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationReport:
    """How good a classifier is on one data set, and how sure that is.

    Attributes:
        classes: Labels in the order of the probabilities.
        positive: The class in question, usually ``"covid19"``.
        n_images: Number of images.
        n_patients: Number of patients, (source, patient) pairs.
        confounded: Whether every source holds one class only, so that these numbers cannot tell
            disease from source.
        confidence: Level of all intervals.
        n_resamples: Resamples of the bootstrap.
        seed: Seed of the bootstrap.
        overall: The numbers on all images.
        by_source: Source → the numbers on its images.
        by_view: View → the numbers on its images.
        weights_sha256: SHA-256 of the judged weights, as :attr:`Classifier.weights_sha256`; empty
            if the probabilities came otherwise.
        predictions: What they were computed from, a row per image in order: ``id``, ``label``,
            ``patient_id``, ``source``, ``view``, and ``p_<class>`` per class; may be left out.
    """

    classes: tuple[str, ...]
    positive: str
    n_images: int
    n_patients: int
    confounded: bool
    confidence: float
    n_resamples: int
    seed: int
    overall: Subgroup
    by_source: Mapping[str, Subgroup]
    by_view: Mapping[str, Subgroup]
    weights_sha256: str = ""
    predictions: pd.DataFrame | None = field(default=None, repr=False)

    @property
    def subgroups(self) -> tuple[Subgroup, ...]:
        """Overall, then the sources, then the views."""
        return (self.overall, *self.by_source.values(), *self.by_view.values())

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data; undefined numbers are ``None``."""
        return {"format_version": _FORMAT, **_plain(asdict(self))}

    def to_json(self) -> str:
        """Return the report as strict JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the report that :meth:`to_dict` described.

        Raises:
            ReportError: If it is of another format, or a field is missing or impossible.
        """
        try:
            if data["format_version"] != _FORMAT:
                raise ValueError(f"format {data['format_version']!r}, this version reads {_FORMAT}")
            data = {"weights_sha256": "", **data}  # reports of older versions have none
            own = {f.name: data[f.name] for f in fields(cls)}
            own["classes"] = check_classes(data["classes"])
            own["overall"] = _subgroup_from(data["overall"])
            for group in ("by_source", "by_view"):
                own[group] = {name: _subgroup_from(part) for name, part in data[group].items()}
            own["predictions"] = _predictions_from(data["predictions"], own["classes"])
            return cls(**own)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReportError(
                f"This is no evaluation report: {error!r}. Evaluate the model again."
            ) from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as JSON, complete or not at all, and return its path.

        Raises:
            OSError: If it cannot be written; an older file is intact.
        """
        target, text = Path(path), self.to_json()
        target.parent.mkdir(parents=True, exist_ok=True)
        write_files(target.parent, {target.name: text.encode()})
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the report that :meth:`save` wrote.

        Raises:
            ReportError: If the file cannot be read or is no report.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise ReportError(f"{path} cannot be read as an evaluation report: {error}") from error

    def to_frame(self) -> pd.DataFrame:
        """Return one row per number: where, class, metric, value, interval, n and method."""
        import pandas as pd

        rows = [
            (part.group, part.name, label, metric, e.value, e.low, e.high, e.n, e.method)
            for part in self.subgroups
            for label, found in (("all", part.metrics), *part.per_class.items())
            for metric, e in found.items()
        ]
        return pd.DataFrame(rows, columns=list(_COLUMNS))

    def __str__(self) -> str:
        return "\n".join(_text(self))


def _plain(value: Any) -> Any:
    """Return dicts, lists, text, numbers, and ``None`` for ``nan``."""
    if hasattr(value, "columns"):  # the predictions
        return value.to_dict(orient="list")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if value != value else value


def _subgroup_from(data: Mapping[str, Any]) -> Subgroup:
    own = {f.name: data[f.name] for f in fields(Subgroup)}
    own["confusion"] = tuple(tuple(int(count) for count in row) for row in data["confusion"])
    parts = {"": data["metrics"], **data["per_class"]}
    read = {k: {n: Estimate.from_dict(e) for n, e in part.items()} for k, part in parts.items()}
    own["metrics"] = read.pop("")
    return Subgroup(**{**own, "per_class": read})


def _predictions_from(data: Any, classes: tuple[str, ...]) -> pd.DataFrame | None:
    import pandas as pd

    if data is None:
        return None
    table = pd.DataFrame(data)
    columns = [*IDENTITY, *(f"p_{name}" for name in classes)]
    if list(table.columns) != columns:
        raise ValueError(f"predictions have the columns {list(table.columns)}, expected {columns}")
    m.check_probabilities(table[columns[len(IDENTITY) :]])
    return table


def _text(report: EvaluationReport) -> Iterator[str]:
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
    rows = [
        {
            "group": part.group,
            "subgroup": part.name,
            "n": f"{part.n_images}{'*' if part.small else ''}",
            **{
                metric: str(e).replace(f", n = {e.n}", "")
                for metric, e in part.per_class[report.positive].items()
                if metric in ("sensitivity", "specificity", "auroc")
            },
        }
        for part in report.subgroups[1:]
    ]
    yield f"{report.positive} by subgroup:\n{pd.DataFrame(rows).to_string(index=False)}"
    if any(part.small for part in report.subgroups):
        yield f"* fewer than {SMALL} images"
