"""The numbers on one part of the images: all of them, a source, a view, a sex, an age band."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from chestxray_covid import metrics as m
from chestxray_covid.delong import auroc_by_group
from chestxray_covid.intervals import Estimate, bootstrap_together, proportion
from chestxray_covid.judged_images import UNKNOWN, ask, probabilities_of

if TYPE_CHECKING:
    import pandas as pd

#: Numbers that rest on fewer images are flagged: they say next to nothing.
SMALL = 20
#: Lower ends of the age bands in years: children, then twenty years or so each. Our choice.
_BANDS = (0, 18, 40, 60, 80)
#: No age of a person; some collections write 999 for what they do not know.
_MAX_AGE = 120
#: Units of an age in DICOM → how many make a year.
_PER_YEAR = {"Y": 1.0, "M": 12.0, "W": 365.25 / 7, "D": 365.25}
_SEXES = {"f": "female", "female": "female", "m": "male", "male": "male"}
#: Numbers that every class has and that texts show.
_SHOWN = {"sensitivity", "specificity", "auroc"}
#: Group → column of the predictions that says it.
GROUPS = {"source": "source", "view": "view", "sex": "sex", "age": "age_band"}


@dataclass(frozen=True, kw_only=True)
class Subgroup:
    """The numbers on one part of the images.

    Attributes:
        group: ``"overall"``, ``"source"``, ``"view"``, ``"sex"`` or ``"age"``.
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

    @property
    def counts(self) -> dict[str, int]:
        """Class → images of it."""
        return dict(zip(self.per_class, map(sum, self.confusion), strict=True))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the subgroup that a report's JSON describes.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: If a field is missing or impossible.
        """
        own = {f.name: data[f.name] for f in fields(cls)}
        own["confusion"] = tuple(tuple(int(count) for count in row) for row in data["confusion"])
        parts = {"": data["metrics"], **data["per_class"]}
        read = {k: {n: Estimate.from_dict(e) for n, e in part.items()} for k, part in parts.items()}
        own["metrics"] = read.pop("")
        for key, kind in {"group": str, "name": str, "n_images": int, "n_patients": int}.items():
            if type(own[key]) is not kind:
                raise ValueError(f"A subgroup cannot have the {key} {own[key]!r}")
        if {len(own["confusion"]), *map(len, own["confusion"])} != {len(read)}:
            raise ValueError(f"{own['name']} has no confusion matrix of its {len(read)} classes")
        if not all(found.keys() >= _SHOWN for found in read.values()):
            raise ValueError(f"{own['name']} does not have {sorted(_SHOWN)} of every class")
        return cls(**{**own, "per_class": read})


def sex_of(text: str) -> str:
    """Return ``"female"``, ``"male"`` or ``"unknown"`` for what a source wrote.

    >>> sex_of("F"), sex_of("male "), sex_of("?")
    ('female', 'male', 'unknown')
    """
    return _SEXES.get(text.strip().lower(), UNKNOWN)


def years_of(text: str) -> float | None:
    """Return an age in years, or ``None`` for what is no age of a person.

    An age of DICOM, such as ``"018M"``, names its unit (PS3.5, table 6.2-1, AS).

    >>> years_of("45.5"), years_of("067Y"), years_of("018M"), years_of("999"), years_of("")
    (45.5, 67.0, 1.5, None, None)
    """
    of_dicom = re.fullmatch(r"([0-9]{3})([YMWD])", text.strip())
    try:
        years = float(of_dicom[1]) / _PER_YEAR[of_dicom[2]] if of_dicom else float(text)
    except ValueError:
        return None
    return years if 0 <= years <= _MAX_AGE else None


def age_band(text: str) -> str:
    """Return the band of an age in years, or ``"unknown"``.

    >>> age_band("17"), age_band("45.5"), age_band("80"), age_band("")
    ('0-17', '40-59', '80+', 'unknown')
    """
    years = years_of(text)
    if years is None:
        return UNKNOWN
    place = int(np.searchsorted(_BANDS, years, side="right")) - 1
    last = place == len(_BANDS) - 1
    return f"{_BANDS[place]}{'+' if last else f'-{_BANDS[place + 1] - 1}'}"


def parts_of(table: pd.DataFrame, group: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the names and rows of the subgroups; none if a group is unknown for all images."""
    column = GROUPS[group]
    if group in ("sex", "age") and set(table[column]) <= {UNKNOWN}:
        return
    for name, part in table.groupby(column):
        yield str(name), part


def judge(
    group: str,
    name: str,
    table: pd.DataFrame,
    classes: tuple[str, ...],
    positive: str,
    how: Mapping[str, Any],
) -> Subgroup:
    """Return the numbers on these predictions; ``how`` are the options of the intervals."""
    truth = np.array([classes.index(label) for label in table["label"]])
    p = probabilities_of(table, classes)
    patients = table["patient_group"].to_numpy()
    called = p.argmax(1)

    def share(hits: NDArray[np.bool_], among: NDArray[np.bool_]) -> Estimate:
        return proportion(hits[among], patients[among], **how)

    asked_of_all: dict[str, tuple[Any, ...]] = {
        "kappa": (m.cohen_kappa, truth, called),
        "brier": (m.brier_score, truth, p),
        "ece": (m.expected_calibration_error, truth, p),
    }
    for k, label in enumerate(classes):
        # A class may be called as a metric is, though not with this before its name.
        asked_of_all[f"average precision of {label}"] = (m.average_precision, truth == k, p[:, k])
    resampled = bootstrap_together(asked_of_all, patients, **how)
    per_class = {}
    for k, label in enumerate(classes):
        is_it, said = truth == k, called == k
        per_class[label] = {
            "sensitivity": share(said, is_it),
            "specificity": share(~said, ~is_it),
            "ppv": share(is_it, said),
            "npv": share(~is_it, ~said),
            "auroc": auroc_by_group(is_it, p[:, k], patients, confidence=how["confidence"]),
            "average_precision": resampled[f"average precision of {label}"],
        }
    if len(classes) > 2 and "normal" in classes and positive != "normal":
        asked = ask(table, classes, positive, "normal")
        per_class[positive]["auroc_vs_normal"] = auroc_by_group(
            asked.truth, asked.score, asked.patients, confidence=how["confidence"]
        )
    return Subgroup(
        group=group,
        name=name,
        n_images=len(table),
        n_patients=len(np.unique(patients)),
        small=len(table) < SMALL,
        confusion=tuple(map(tuple, m.confusion_matrix(truth, called, len(classes)).tolist())),
        metrics={
            "accuracy": proportion(truth == called, patients, **how),
            **{name: resampled[name] for name in ("kappa", "brier", "ece")},
        },
        per_class=per_class,
    )
