"""Does the source of a radiograph give its label away?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike

from chestxray_covid.datasets.base import LABELS, ChestXrayDataset
from chestxray_covid.datasets.report import printable_lines
from chestxray_covid.errors import check_dataset
from chestxray_covid.judged_images import whole_characters
from chestxray_covid.metrics import Value
from chestxray_covid.notebook import ShownAsText

if TYPE_CHECKING:
    import pandas as pd

#: Below it, labels that follow from their sources may do so by chance, where sources are many and
#: small: five pairs of images among single ones gave 0.29 at most.
CHANCE_V = 0.3
#: Cramér's V, corrected for its bias, from which the source counts as giving the label away: our
#: choice; on the classic design, which it must catch, it is 0.97.
CONFOUNDED_V = 0.8


class ConfoundingWarning(UserWarning):
    """The source of the training images all but gives their label."""


@dataclass(frozen=True, kw_only=True)
class Confounding(ShownAsText):
    """How far the source alone gives the label.

    Attributes:
        table: Source → label → number of images.
        cramers_v: Cramér's V of source and label in [0, 1]; 0 unrelated, 1 one gives the other;
            not a number if there is only one source or one label. Small sources raise it, also of
            labels dealt at random: see :attr:`corrected_v`.
        determined: Share of the images whose source holds one label only, in [0, 1].
    """

    table: Mapping[str, Mapping[str, int]]
    cramers_v: float
    determined: float

    @classmethod
    def of(cls, sources: Sequence[str], labels: Sequence[str]) -> Self:
        """Return the confounding of ``(N,)`` sources and ``(N,)`` labels, N at least 1."""
        sources, labels = whole_characters([*sources]), whole_characters([*labels])
        counts = Counter(zip(sources, labels, strict=True))
        names = sorted(
            set(labels), key=lambda n: (LABELS.index(n) if n in LABELS else len(LABELS), n)
        )
        table = {s: {name: counts[s, name] for name in names} for s in sorted(set(sources))}
        v = float(cramers_v(list(map(list(table).index, sources)), list(map(names.index, labels))))
        pure = sum(sum(row.values()) for row in table.values() if sum(map(bool, row.values())) == 1)
        return cls(table=table, cramers_v=v, determined=pure / len(labels))

    @property
    def corrected_v(self) -> float:
        """Cramér's V less what chance alone gives, see :func:`corrected_v`."""
        return corrected_v(self.table)

    @property
    def is_severe(self) -> bool:
        """Whether the source all but gives the label.

        A corrected V of 0.8 or more does, or of 0.3 where every label follows from its source.
        """
        v = self.corrected_v
        return v >= CONFOUNDED_V or (self.determined == 1 and v >= CHANCE_V)

    def to_frame(self) -> pd.DataFrame:
        """Return the table with sources as rows and labels as columns."""
        import pandas as pd

        return pd.DataFrame({s: dict(labels) for s, labels in self.table.items()}).T

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data; an undefined Cramér's V is ``None``."""
        v = None if np.isnan(self.cramers_v) else self.cramers_v
        table = {source: dict(labels) for source, labels in self.table.items()}
        return {"table": table, "cramers_v": v, "determined": self.determined}

    def __str__(self) -> str:
        v = f"{self.cramers_v:.2f} ({self.corrected_v:.2f} without what chance gives)"
        if np.isnan(self.cramers_v):
            v = "not defined, for there is one source or one label"
        return printable_lines(
            f"{self.to_frame().to_string()}\n"
            f"Cramér's V of source and label: {v}; "
            f"{self.determined:.0%} of the images have a label that follows from the source alone."
        )


def corrected_v(table: Mapping[str, Mapping[str, int]]) -> float:
    """Return Cramér's V of a table of counts in [0, 1], less what chance alone gives.

    Of labels dealt at random it is about 0, however small the sources. Bergsma, A bias-correction
    for Cramér's V and Tschuprow's T, Journal of the Korean Statistical Society 42 (2013) 323–328.

    Args:
        table: Row → column → number of images, 0 where a column is missing.

    >>> corrected_v({"ward": {"normal": 5, "covid19": 0}, "clinic": {"normal": 0, "covid19": 5}})
    1.0
    """
    columns = dict.fromkeys(column for row in table.values() for column in row)
    counts = np.array([[row.get(c, 0) for c in columns] for row in table.values()] or [[0]], float)
    counts = counts[counts.sum(1) > 0][:, counts.sum(0) > 0]
    n, sizes = counts.sum(), np.array(counts.shape) - 1
    if sizes.min() < 1:
        return float("nan")
    expected = np.outer(counts.sum(1), counts.sum(0)) / n
    square = ((counts - expected) ** 2 / expected).sum() / n - sizes.prod() / (n - 1)
    most = (sizes - sizes**2 / (n - 1)).min()
    # With as many sources as images, nothing can be told.
    return float(np.sqrt(max(0.0, square) / most)) if most > 0 else 0.0


def cramers_v(
    rows: ArrayLike, columns: ArrayLike, *, sample_weight: ArrayLike | None = None
) -> Value:
    """Return Cramér's V of two categories in [0, 1], ``nan`` if one of them has a single value.

    Without correction for its bias (:func:`corrected_v` has it): of two unrelated
    categories it is about sqrt(d / N), where d is the larger number of values less 1.

    Args:
        rows: ``(N,)`` whole numbers from 0.
        columns: ``(N,)`` whole numbers from 0.
        sample_weight: ``(N,)`` or ``(R, N)``, as the functions of :mod:`metrics` take it.

    >>> cramers_v([0, 0, 1, 1], [1, 1, 0, 0])
    1.0
    """
    first, second = np.asarray(rows, np.int64), np.asarray(columns, np.int64)
    weight = np.ones(len(first)) if sample_weight is None else np.asarray(sample_weight, float)
    shape = (int(first.max()) + 1, int(second.max()) + 1)
    cells = first * shape[1] + second
    order = np.argsort(cells, kind="stable")
    held, starts = np.unique(cells[order], return_index=True)
    counts = np.zeros((*weight.shape[:-1], shape[0] * shape[1]))
    # No table of images by cells, which thousands of sources would make larger than the memory.
    counts[..., held] = np.add.reduceat(np.take(weight, order, axis=-1), starts, axis=-1)
    counts = counts.reshape(*weight.shape[:-1], *shape)
    total = counts.sum((-2, -1))
    expected = counts.sum(-1, keepdims=True) * counts.sum(-2, keepdims=True)
    expected /= np.maximum(total, 1e-300)[..., None, None]
    terms = np.divide((counts - expected) ** 2, expected, np.zeros_like(counts), where=expected > 0)
    # Values that a resample happens to lack do not count as values.
    sizes = [(counts.sum(axis) > 0).sum(-1) - 1 for axis in (-2, -1)]
    degrees = np.minimum(*sizes)
    share = np.full(total.shape, np.nan)
    np.divide(terms.sum((-2, -1)), total * degrees, out=share, where=degrees > 0)
    found = np.sqrt(share)
    return found if found.ndim else float(found)


def confounding_of_question(
    sources: Sequence[str], labels: Sequence[str], positive: str
) -> Confounding:
    """Return the confounding of all labels, or that of the positive class where that is severe.

    It is asked against normal, and against all others: classes that several sources share would
    hide that the question itself is confounded.
    """
    found = Confounding.of(sources, labels)
    rows = list(zip(sources, labels, strict=True))
    others = f"not {positive}"
    for asked in (
        [row for row in rows if row[1] in (positive, "normal")],
        [(source, label if label == positive else others) for source, label in rows],
    ):
        if not found.is_severe and len({label for _, label in asked}) > 1:
            narrow = Confounding.of(*zip(*asked, strict=True))
            found = narrow if narrow.is_severe else found
    return found


def confounding(dataset: ChestXrayDataset) -> Confounding:
    """Return how far the source of a radiograph alone gives its label.

    Cramér's V: H. Cramér, Mathematical Methods of Statistics, 1946, section 21.9.

    Raises:
        TypeError: If it is no data set.
        ValueError: If the data set is empty.
    """
    check_dataset(dataset)
    if not len(dataset):
        raise ValueError("The data set is empty: nothing can be confounded.")
    return Confounding.of([s.source for s in dataset.samples], [s.label for s in dataset.samples])
