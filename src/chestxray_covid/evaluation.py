"""Judge a classifier: numbers with intervals, overall, per source and per view."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chestxray_covid import metrics
from chestxray_covid.datasets.base import ChestXrayDataset, check_classes
from chestxray_covid.errors import ChestXrayError
from chestxray_covid.metrics import Estimate

if TYPE_CHECKING:
    import pandas as pd

#: Subgroups with fewer images are flagged: their numbers say next to nothing.
SMALL = 20
CAUTION = "Every source holds one class only: these numbers cannot tell disease from source."
_FORMAT = 1
_ALL = "all"
_COLUMNS = ("group", "subgroup", "class", "metric", "value", "low", "high", "n", "method")


class ReportError(ChestXrayError, ValueError):
    """A file is no saved report of this library."""


class ProbabilisticClassifier(Protocol):
    """What can be judged, for example :class:`~chestxray_covid.classifier.Classifier`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels in the order of the columns of :meth:`predict_proba`."""

    def predict_proba(
        self, images: ChestXrayDataset, /, *, batch_size: int, progress: bool
    ) -> NDArray[np.float64]:
        """Return ``(N, K)`` probabilities of the samples in order, rows summing to 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """What the numbers were computed from, one entry per image, in order.

    Attributes:
        ids: File names, or row numbers.
        sources: Collections.
        patients: Patients as their sources number them.
        views: Projections.
        targets: ``(N,)`` int64 positions in the report's classes.
        probabilities: ``(N, K)`` float64, rows summing to 1.
    """

    ids: tuple[str, ...]
    sources: tuple[str, ...]
    patients: tuple[str, ...]
    views: tuple[str, ...]
    targets: NDArray[np.int64]
    probabilities: NDArray[np.float64]

    def __post_init__(self) -> None:
        lengths = {f.name: len(getattr(self, f.name)) for f in fields(self)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"All columns must have the same length, got {lengths}")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data, a list per column."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v.tolist() if isinstance(v, np.ndarray) else list(v) for k, v in columns.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the predictions that :meth:`to_dict` described."""
        texts = {k: tuple(map(str, data[k])) for k in ("ids", "sources", "patients", "views")}
        return cls(
            **texts,
            targets=np.asarray(data["targets"], dtype=np.int64),
            probabilities=metrics.check_probabilities(data["probabilities"]),
        )


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
            ``average_precision``, that class against all others. The positive class also has
            ``auroc_vs_normal`` where there is a third class: of p / (p + p(normal)), over the
            images that are one of the two.
    """

    group: str
    name: str
    n_images: int
    n_patients: int
    small: bool
    confusion: tuple[tuple[int, ...], ...]
    metrics: Mapping[str, Estimate]
    per_class: Mapping[str, Mapping[str, Estimate]]

    def estimates(self) -> Iterator[tuple[str, str, Estimate]]:
        """Yield class (``"all"`` for all of them), metric and estimate."""
        for label, found in ((_ALL, self.metrics), *self.per_class.items()):
            yield from ((label, metric, estimate) for metric, estimate in found.items())

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["confusion"] = [list(row) for row in self.confusion]
        data["metrics"] = {metric: e.to_dict() for metric, e in self.metrics.items()}
        data["per_class"] = {
            label: {metric: e.to_dict() for metric, e in found.items()}
            for label, found in self.per_class.items()
        }
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the subgroup that :meth:`to_dict` described."""
        own = {f.name: data[f.name] for f in fields(cls)}
        own["confusion"] = tuple(tuple(map(int, row)) for row in data["confusion"])
        own["metrics"] = {m: Estimate.from_dict(e) for m, e in data["metrics"].items()}
        own["per_class"] = {
            label: {m: Estimate.from_dict(e) for m, e in found.items()}
            for label, found in data["per_class"].items()
        }
        return cls(**own)


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationReport:
    """How good a classifier is on one data set, and how sure that is.

    Attributes:
        classes: Labels in the order of the probabilities.
        positive: The class in question, usually ``"covid19"``.
        confounded: Whether every source holds one class only, so that these numbers cannot tell
            disease from source.
        confidence: Level of all intervals.
        n_resamples: Resamples of the bootstrap.
        seed: Seed of the bootstrap.
        overall: The numbers on all images.
        by_source: Source → the numbers on its images.
        by_view: View → the numbers on its images.
        predictions: What they were computed from; ``None`` if left out.
    """

    classes: tuple[str, ...]
    positive: str
    confounded: bool
    confidence: float
    n_resamples: int
    seed: int
    overall: Subgroup
    by_source: Mapping[str, Subgroup]
    by_view: Mapping[str, Subgroup]
    predictions: Predictions | None = None

    @property
    def n_images(self) -> int:
        """Number of images."""
        return self.overall.n_images

    @property
    def n_patients(self) -> int:
        """Number of patients."""
        return self.overall.n_patients

    @property
    def subgroups(self) -> tuple[Subgroup, ...]:
        """Overall, then sources, then views."""
        return (self.overall, *self.by_source.values(), *self.by_view.values())

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data; undefined numbers are ``None``."""
        data = {"format_version": _FORMAT, **{f.name: getattr(self, f.name) for f in fields(self)}}
        data["classes"] = list(self.classes)
        data["overall"] = self.overall.to_dict()
        for group in ("by_source", "by_view"):
            data[group] = {name: part.to_dict() for name, part in data[group].items()}
        data["predictions"] = None if self.predictions is None else self.predictions.to_dict()
        return data

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
                raise ValueError(f"format {data['format_version']}, expected {_FORMAT}")
            own = {f.name: data[f.name] for f in fields(cls)}
            own["classes"] = check_classes(data["classes"])
            own["overall"] = Subgroup.from_dict(data["overall"])
            for group in ("by_source", "by_view"):
                own[group] = {k: Subgroup.from_dict(part) for k, part in data[group].items()}
            if data["predictions"] is not None:
                own["predictions"] = Predictions.from_dict(data["predictions"])
            return cls(**own)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ReportError(
                f"This is no evaluation report: {error!r}. Evaluate the model again."
            ) from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as JSON, complete or not at all, and return its path.

        Raises:
            OSError: If it cannot be written; an older file is intact.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
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
        """Return one row per number: where, which class and metric, value, interval, n, method."""
        import pandas as pd

        rows = [
            (part.group, part.name, label, metric, e.value, e.low, e.high, e.n, e.method)
            for part in self.subgroups
            for label, metric, e in part.estimates()
        ]
        return pd.DataFrame(rows, columns=list(_COLUMNS))

    def __str__(self) -> str:
        return "\n".join(_text(self))


def _text(report: EvaluationReport) -> Iterator[str]:
    yield (
        f"{report.n_images} images of {report.n_patients} patients; "
        f"intervals at {report.confidence:.0%}; positive class: {report.positive}"
    )
    if report.confounded:
        yield CAUTION
    rows = [("class", "metric", "value", "interval", "n", "method")]
    for label, metric, e in report.overall.estimates():
        rows.append((label, metric, _number(e.value), e.interval, str(e.n), e.method))
    yield from ("", *_table(rows), "")
    head = ("truth \\ prediction", *report.classes)
    counts = zip(report.classes, report.overall.confusion, strict=True)
    yield from _table([head, *((label, *map(str, row)) for label, row in counts)])
    shown = ("sensitivity", "specificity", "auroc")
    for title, parts in (("source", report.by_source), ("view", report.by_view)):
        rows = [(title, "n", *(f"{m} of {report.positive}" for m in shown))]
