"""What an evaluation found: subgroups with their numbers, curves, decisions, and as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from chestxray_covid import curves
from chestxray_covid._version import __version__
from chestxray_covid.checklists import report_markdown
from chestxray_covid.comparison import Comparison, compare_scores
from chestxray_covid.datasets.report import printable_lines
from chestxray_covid.errors import ReportError, check_classes, check_kind
from chestxray_covid.files import plain_json
from chestxray_covid.intervals import check_resampling
from chestxray_covid.judged_images import (
    Question,
    aligned,
    ask,
    is_nameless,
    probabilities_of,
    read_predictions,
    same_images,
    share_patients,
)
from chestxray_covid.operating_points import (
    GIVEN,
    OPTIMISTIC,
    OTHER,
    SAME,
    SHARED,
    UNTOLD,
    OperatingPoint,
    choose_threshold,
    decide,
)
from chestxray_covid.reporting import SavedReport, report_text
from chestxray_covid.subgroups import Subgroup

if TYPE_CHECKING:
    import pandas as pd

_FORMAT = 2
_ORIGIN = "evaluate() or EvaluationReport.load(…)"
_GROUPS = ("by_source", "by_view", "by_sex", "by_age")
_COLUMNS = ("group", "subgroup", "class", "metric", "value", "low", "high", "n", "method")


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationReport(SavedReport):
    """How good a classifier is on one data set, and how sure that is.

    Attributes:
        classes: Labels in the order of the probabilities.
        positive: The class in question, usually ``"covid19"``.
        n_images: Number of images.
        n_patients: Number of patients; one counts once, also with images in two collections.
        confounded: Whether the source all but gives the label (see
            :attr:`Confounding.is_severe`), or the positive class against normal or all others, so
            that these numbers cannot tell disease from source.
        confidence: Level of all intervals.
        n_resamples: Resamples of the bootstrap.
        seed: Seed of the bootstrap.
        overall: The numbers on all images.
        by_source: Source → the numbers on its images.
        by_view: View → the numbers on its images.
        by_sex: Sex → the numbers on its images; empty if it is known of none.
        by_age: Band of years → the numbers on its images; empty if it is known of none.
        operating_points: Decisions at thresholds, see :meth:`operating_point`.
        model: Config of the classifier, see :class:`~chestxray_covid.ModelConfig`; empty if the
            probabilities came otherwise.
        excluded: Why images of the data set were left out → how many.
        origins: Source → other collections that images of it were taken over from, if from any.
        chestxray_covid_version: Version that computed the numbers; empty if that is not known.
        predictions: What they were computed from, a row per image in order: ``id``, ``label``,
            ``patient_id``, ``source``, ``view``, ``patient_group`` (the patient across sources),
            ``sex``, ``age_band``, and ``p_<class>`` per class; may be left out.
    """

    _KIND = "an evaluation report"

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
    by_sex: Mapping[str, Subgroup] = field(default_factory=dict)
    by_age: Mapping[str, Subgroup] = field(default_factory=dict)
    operating_points: tuple[OperatingPoint, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict, repr=False)
    excluded: Mapping[str, int] = field(default_factory=dict)
    origins: Mapping[str, Sequence[str]] = field(default_factory=dict)
    chestxray_covid_version: str = __version__
    predictions: pd.DataFrame | None = field(default=None, repr=False)

    @property
    def subgroups(self) -> tuple[Subgroup, ...]:
        """Overall, then by source, view, sex and age."""
        parts = (part for group in _GROUPS for part in getattr(self, group).values())
        return (self.overall, *parts)

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the judged weights; empty if the probabilities came otherwise."""
        return str(self.model.get("weights_sha256", ""))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data; undefined numbers are ``None``."""
        points = [point.to_dict() for point in self.operating_points]
        bare = replace(self, operating_points=(), predictions=None)
        table = None if self.predictions is None else self.predictions.to_dict(orient="list")
        changes = {"operating_points": points, "predictions": table}
        return {"format_version": _FORMAT, **plain_json(asdict(bare)), **changes}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the report that :meth:`to_dict` described.

        Raises:
            ReportError: If it is of another format, or a field is missing or impossible.
        """
        try:
            version = data["format_version"]
            if type(version) is not int or version != _FORMAT:
                raise ValueError(f"format {version!r}, this version reads {_FORMAT}")
            data = {"origins": {}, **data}  # reports of before have none
            own = {f.name: data[f.name] for f in fields(cls)}
            own["classes"] = check_classes(data["classes"])
            own["overall"] = Subgroup.from_dict(data["overall"])
            for group in _GROUPS:
                own[group] = {name: Subgroup.from_dict(part) for name, part in data[group].items()}
            for name in ("model", "excluded"):
                own[name] = dict(data[name])
            own["origins"] = {s: check_classes(names) for s, names in data["origins"].items()}
            points = map(OperatingPoint.from_dict, own["operating_points"])
            own["operating_points"] = tuple(points)
            table = data["predictions"]
            if table is not None:
                own["predictions"] = read_predictions(table, own["classes"])
            report = cls(**own)
            _check(report)
            return report
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReportError(
                f"This is no evaluation report: {error!r}. Evaluate the model again."
            ) from error

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

    def roc_curve(self, label: str | None = None, *, versus: str | None = None) -> curves.RocCurve:
        """Return sensitivity over 1 - specificity, with its band.

        Args:
            label: The class in question; :attr:`positive` if not given.
            versus: Another class: only images of the two count, and the score is
                p(label) / (p(label) + p(versus)), which with ``"normal"`` is
                ``Prediction.score``. If not given, all others, with the score p(label).

        Raises:
            ReportError: If the predictions were left out.
            ValueError: If there is no such class, or no image of one side.
        """
        q = self._ask(label, versus)
        return curves.roc_curve(q.truth, q.score, q.patients, title=q.title, **self._how)

    def precision_recall_curve(
        self, label: str | None = None, *, versus: str | None = None
    ) -> curves.PrecisionRecallCurve:
        """Return precision over recall, with its band; arguments as for :meth:`roc_curve`.

        Raises:
            ReportError, ValueError: As for :meth:`roc_curve`.
        """
        q = self._ask(label, versus)
        return curves.precision_recall_curve(
            q.truth, q.score, q.patients, title=q.title, **self._how
        )

    def reliability(self, label: str | None = None, *, n_bins: int = 15) -> curves.Reliability:
        """Return the reliability diagram of p(label), with the numbers of its calibration.

        Args:
            label: A class, for how often an image is one by its probability; if not given, how
                often the decision is right by its confidence, which is what ``ece`` sums up.
            n_bins: Bins over [0, 1].

        Raises:
            ReportError: If the predictions were left out.
            ValueError: If there is no such class, or ``n_bins`` is below 1.
        """
        options = {"n_bins": n_bins, **self._how}
        if label is not None:
            q = self._ask(label, None)
            return curves.reliability(q.truth, q.score, q.patients, title=label, **options)
        truth, p, patients = self._decided()
        right = p.argmax(1) == truth
        return curves.reliability(right, p.max(1), patients, title="the decision", **options)

    def risk_coverage_curve(self) -> curves.RiskCoverageCurve:
        """Return how many decisions are wrong if the least sure images are left to others.

        Raises:
            ReportError: If the predictions were left out.
        """
        truth, p, patients = self._decided()
        return curves.risk_coverage_curve(truth, p, patients, title="all classes", **self._how)

    def operating_point(
        self,
        *,
        threshold: float | None = None,
        sensitivity: float | None = None,
        specificity: float | None = None,
        prevalence: float | None = None,
        versus: str | None = None,
        chosen_on: EvaluationReport | None = None,
    ) -> OperatingPoint:
        """Return what decisions of the positive class at one threshold are worth.

        Exactly one of ``threshold``, ``sensitivity`` and ``specificity`` says which. A threshold
        that is chosen for a target belongs to the data that it was chosen on; on the same images
        the target is met by construction, and the result says so in ``caution``.

        Args:
            threshold: Take this one, in [0, 1].
            sensitivity: Take the highest that reaches this, in (0, 1].
            specificity: Take the lowest that reaches this, in (0, 1].
            prevalence: Share of positives where the model would be used, in (0, 1), for the
                predictive values; that of these data if not given, which is no clinic's.
            versus: As for :meth:`roc_curve`.
            chosen_on: Report of the same model on validation data, on which a threshold for a
                target is chosen; these data if not given.

        Raises:
            TypeError: If ``chosen_on`` is no report, for example the path of one, or what has to be
                a number is none.
            ReportError: If the predictions were left out.
            ValueError: If an argument is impossible, the target cannot be had, or ``chosen_on``
                is of a model with other weights or classes.
        """
        if chosen_on is not None:
            check_kind(chosen_on, EvaluationReport, _ORIGIN)
        if chosen_on is not None and not _same_model(self, chosen_on):
            raise ValueError("chosen_on is the report of another model: evaluate this one there")
        q = self._ask(None, versus)
        basis = q if chosen_on is None else chosen_on._ask(self.positive, versus)
        chosen, rule = choose_threshold(
            basis.truth,
            basis.score,
            threshold=threshold,
            sensitivity=sensitivity,
            specificity=specificity,
        )
        where, caution = (SAME, OPTIMISTIC) if chosen_on is None else (OTHER, "")
        if threshold is not None:
            where, caution = GIVEN, ""
        elif chosen_on:
            tables = self._predictions(), chosen_on._predictions()
            if same_images(*tables):
                where, caution = SAME, OPTIMISTIC
            elif share_patients(*tables):
                caution = SHARED
            elif any(map(is_nameless, tables)):
                caution = UNTOLD
        numbers = decide(
            q.truth, q.score, q.patients, threshold=chosen, prevalence=prevalence, **self._how
        )
        return OperatingPoint(
            title=q.title,
            score=q.score_name,
            rule=rule,
            chosen_on=where,
            caution=caution,
            **numbers,
        )

    def compare(self, other: EvaluationReport, *, versus: str | None = None) -> Comparison:
        """Return how another model does on the same images, with DeLong's test.

        Args:
            other: Report of the other model; images are recognised by id, source and patient.
            versus: As for :meth:`roc_curve`.

        Raises:
            TypeError: If ``other`` is no report, for example the path of one.
            ReportError: If predictions were left out.
            ValueError: If images or labels differ, or there are too few.
        """
        check_kind(other, EvaluationReport, _ORIGIN)
        one, table = self._ask(None, versus), aligned(self._predictions(), other._predictions())
        two = ask(table, other.classes, self.positive, versus)
        sides = ((one.score, one.called), (two.score, two.called))
        return compare_scores(one.truth, *sides, one.patients, title=one.title, **self._how)

    def to_markdown(self, answers: Mapping[str, str] | None = None) -> str:
        """Return the report as Markdown, with the items of CLAIM and TRIPOD+AI.

        Tejani et al., Checklist for Artificial Intelligence in Medical Imaging (CLAIM): 2024
        update, Radiology: Artificial Intelligence 6 (2024) e240300; Collins et al., TRIPOD+AI
        statement, BMJ 385 (2024) e078378. What an evaluation knows is filled in, for all else it
        says "not reported".

        Args:
            answers: Item, for example ``"CLAIM 14"`` or ``"TRIPOD+AI 8a"`` → what to write there.

        Raises:
            ValueError: If there is no such item.
        """
        return printable_lines(report_markdown(self, answers or {}))

    def __str__(self) -> str:
        return printable_lines("\n".join(report_text(self)))

    @property
    def _how(self) -> dict[str, Any]:
        names = ("n_resamples", "seed", "confidence")
        return {name: getattr(self, name) for name in names}

    def _predictions(self) -> pd.DataFrame:
        if self.predictions is None:
            raise ReportError(
                "This report was saved without its predictions, which curves, thresholds and "
                "comparisons are computed from. Evaluate the model again."
            )
        return self.predictions

    def _ask(self, label: str | None, versus: str | None) -> Question:
        question = ask(self._predictions(), self.classes, label or self.positive, versus)
        if not len(question.truth):
            raise ValueError(f"No image is {label or self.positive} or {versus}")
        return question

    def _decided(self) -> tuple[Any, Any, Any]:
        """Return ``(N,)`` class numbers, ``(N, K)`` probabilities and ``(N,)`` patients."""
        table = self._predictions()
        truth = np.array([self.classes.index(label) for label in table["label"]])
        return truth, probabilities_of(table, self.classes), table["patient_group"].to_numpy()


def _same_model(one: EvaluationReport, other: EvaluationReport) -> bool:
    """Return whether nothing says that the models of two reports differ.

    A part of the classes is another model: p(covid19) means something else among two than three.
    """
    known = {report.weights_sha256 for report in (one, other)} - {""}
    return len(known) < 2 and one.classes == other.classes


def _check(report: EvaluationReport) -> None:
    """Raise unless what a file says fits together, so that nothing stumbles over it later."""
    kinds = {"n_images": int, "n_patients": int, "confounded": bool, "n_resamples": int}
    for name, kind in {**kinds, "seed": int, "chestxray_covid_version": str}.items():
        if type(getattr(report, name)) is not kind:
            raise ValueError(f"{name} cannot be {getattr(report, name)!r}")
    check_resampling(**report._how)
    if report.positive not in report.classes:
        raise ValueError(f"positive {report.positive!r} is none of {list(report.classes)}")
    for part in report.subgroups:
        if tuple(part.per_class) != report.classes:
            raise ValueError(f"{part.group} {part.name} has the classes {list(part.per_class)}")
