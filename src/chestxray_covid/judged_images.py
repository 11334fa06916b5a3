"""The predictions that a report is computed from: a row per image, and questions to them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chestxray_covid import metrics as m
from chestxray_covid.intervals import group_codes

if TYPE_CHECKING:
    import pandas as pd

#: Where a source says nothing.
UNKNOWN = "unknown"
#: Columns before the probabilities.
IDENTITY = ("id", "label", "patient_id", "source", "view", "patient_group", "sex", "age_band")
#: By which an image is recognised in another report.
_IMAGE = ["source", "patient_id", "id", "label"]
#: What stands for a name where there is none.
_NUMBERED = re.compile(r"[0-9a-f]{8}-\d+")


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """What is told from what on n of the images.

    Attributes:
        title: For example ``"covid19 against all others"``.
        score_name: What the score is, for example ``"p(covid19)"``.
        truth: ``(n,)`` bool, whether an image is of the positive class.
        score: ``(n,)`` float64 in [0, 1].
        called: ``(n,)`` bool, whether the class of the highest probability is the positive one.
        patients: ``(n,)`` patients across sources.
        rows: ``(N,)`` bool, which images count, n of them.
    """

    title: str
    score_name: str
    truth: NDArray[np.bool_]
    score: NDArray[np.float64]
    called: NDArray[np.bool_]
    patients: NDArray[Any]
    rows: NDArray[np.bool_]


def probabilities_of(table: pd.DataFrame, classes: tuple[str, ...]) -> NDArray[np.float64]:
    """Return the ``(N, K)`` probabilities."""
    return table[[f"p_{name}" for name in classes]].to_numpy(dtype=np.float64)


def ask(
    table: pd.DataFrame, classes: tuple[str, ...], label: str, versus: str | None = None
) -> Question:
    """Return a question of two sides.

    Args:
        table: Predictions, N rows.
        classes: All classes.
        label: The positive class.
        versus: The other class, with the score p(label) / (p(label) + p(versus)) on the images
            that are one of the two; ``None`` for all others, with the score p(label).

    Raises:
        ValueError: If a class is unknown, or both are the same.
    """
    if {label, versus} - {*classes, None} or versus == label:
        raise ValueError(
            f"label and versus must be two of {list(classes)}, got {label!r} and {versus!r}"
        )
    truth, p = table["label"].to_numpy(), probabilities_of(table, classes)
    own, name = p[:, classes.index(label)], f"p({label})"
    rows, score = np.ones(len(truth), dtype=bool), own
    if versus is not None:
        rows = (truth == label) | (truth == versus)
        total = own + p[:, classes.index(versus)]
        # Where both are 0 the model has no opinion between the two.
        score = np.where(total > 0, own / np.where(total > 0, total, 1), 0.5)
    return Question(
        title=f"{label} against {versus or 'all others'}",
        score_name=name if versus is None else f"{name} / ({name} + p({versus}))",
        truth=(truth == label)[rows],
        score=score[rows],
        called=(p.argmax(1) == classes.index(label))[rows],
        patients=table["patient_group"].to_numpy()[rows],
        rows=rows,
    )


def whole_characters(value: Any) -> Any:
    r"""Return text, or dicts and lists of it, with half characters escaped.

    A file name that is not UTF-8 has some; neither pandas' columns nor files of text hold them.

    >>> whole_characters(["M\udcfcnchen", 1])
    ['M\\udcfcnchen', 1]
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {whole_characters(key): whole_characters(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [whole_characters(item) for item in value]
    return value


def lists_of(**columns: Iterable[Any]) -> list[list[Any]]:
    """Return columns as lists.

    Raises:
        TypeError: If one is none, for example ``None``.
    """
    for name, values in columns.items():
        if not isinstance(values, Iterable):
            raise TypeError(f"{name} must be a list with one for each image, got {values!r}")
    return [list(values) for values in columns.values()]


def default_positive(classes: Sequence[str]) -> str:
    """Return the class in question where nobody names one: ``"covid19"``, or else the last.

    >>> default_positive(("normal", "covid19", "other")), default_positive(("normal", "tb"))
    ('covid19', 'tb')
    """
    return "covid19" if "covid19" in classes else classes[-1]


def aligned(own: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Return other predictions of the same images, in the order of one's own.

    Raises:
        ValueError: If an image is not in both, once and with the same label.
    """
    one, two = own.set_index(_IMAGE), other.set_index(_IMAGE)
    if not (one.index.is_unique and two.index.is_unique and set(one.index) == set(two.index)):
        shared = len(one.index.intersection(two.index))
        bare = ". One has no names, as all of the Hub: compare those that they were published from"
        raise ValueError(
            "Only reports on the same images, each once and with the same label, compare: got "
            f"{len(one)} and {len(two)} images, of which {shared} are the same"
            f"{bare * any(map(is_nameless, (own, other)))}"
        )
    return two.loc[one.index].reset_index()


def same_images(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Return whether two tables are of the same images."""
    return set(one.set_index(_IMAGE).index) == set(other.set_index(_IMAGE).index)


def share_patients(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Return whether a patient of a source is in both."""
    pairs = [set(zip(t["source"], t["patient_id"], strict=True)) for t in (one, other)]
    return not pairs[0].isdisjoint(pairs[1])


def without_names(table: pd.DataFrame) -> pd.DataFrame:
    """Return predictions in which images and patients are numbered, in order, and have no names.

    Rows of one image, or one patient, stay rows of one. Before a number stands a digest of labels
    and probabilities, so that images of different reports are not taken for the same.
    """
    told = table.drop(columns=[name for name in IDENTITY if name != "label"]).to_csv(index=False)
    mark, changed = hashlib.sha256(told.encode()).hexdigest()[:8], table.copy()
    for name, of in (("patient_id", _IMAGE[:2]), ("id", _IMAGE[:3])):
        codes = group_codes(table[of].itertuples(index=False, name=None))
        changed[name] = [f"{mark}-{code}" for code in codes]
    changed["patient_group"] = [str(code) for code in group_codes(table["patient_group"])]
    return changed


def is_nameless(table: pd.DataFrame) -> bool:
    """Return whether patients are numbered as by :func:`without_names`: they may be anyone."""
    return all(_NUMBERED.fullmatch(str(patient)) for patient in table["patient_id"])


def read_predictions(data: Mapping[str, Any], classes: tuple[str, ...]) -> pd.DataFrame:
    """Return the predictions in a report.

    Raises:
        ValueError: If columns or probabilities are not as they should be.
    """
    import pandas as pd

    table = pd.DataFrame(data)
    scores = [f"p_{name}" for name in classes]
    expected = [*IDENTITY, *scores]
    if list(table.columns) != expected:
        raise ValueError(f"predictions have the columns {list(table.columns)}, expected {expected}")
    m.check_probabilities(table[scores])
    if strange := set(table["label"]) - set(classes):
        raise ValueError(f"predictions have the labels {strange}, expected {list(classes)}")
    if gaps := [name for name in IDENTITY if table[name].isna().any()]:
        raise ValueError(f"predictions have gaps in {gaps}, expected text")
    return table
