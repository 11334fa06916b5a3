"""Does the source of a radiograph give its label away?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from chestxray_covid.datasets.base import LABELS, ChestXrayDataset

if TYPE_CHECKING:
    import pandas as pd

#: Cramér's V from which the source counts as giving the label away: our choice; on the classic
#: design, which it must catch, it is 0.97.
CONFOUNDED_V = 0.8


@dataclass(frozen=True, kw_only=True)
class Confounding:
    """How far the source alone gives the label.

    Attributes:
        table: Source → label → number of images.
        cramers_v: Cramér's V of source and label in [0, 1]; 0 unrelated, 1 one gives the other;
            not a number if there is only one source or one label.
        determined: Share of the images whose source holds one label only, in [0, 1].
    """

    table: Mapping[str, Mapping[str, int]]
    cramers_v: float
    determined: float

    @classmethod
    def of(cls, sources: Sequence[str], labels: Sequence[str]) -> Self:
        """Return the confounding of ``(N,)`` sources and ``(N,)`` labels, N at least 1."""
        counts = Counter(zip(sources, labels, strict=True))
        names = sorted(
            set(labels), key=lambda n: (LABELS.index(n) if n in LABELS else len(LABELS), n)
        )
        table = {s: {name: counts[s, name] for name in names} for s in sorted(set(sources))}
        matrix = np.array([list(row.values()) for row in table.values()], float)
        expected = matrix.sum(1, keepdims=True) * matrix.sum(0, keepdims=True) / matrix.sum()
        chi2 = ((matrix - expected) ** 2 / expected).sum()
        degrees = min(matrix.shape) - 1
        v = float(np.sqrt(chi2 / (matrix.sum() * degrees))) if degrees else float("nan")
        pure = matrix[(matrix > 0).sum(1) == 1].sum()
        return cls(table=table, cramers_v=v, determined=float(pure / matrix.sum()))

    @property
    def is_severe(self) -> bool:
        """Whether the source all but gives the label: V of 0.8 or more, or one label per source."""
        return self.cramers_v >= CONFOUNDED_V or self.determined == 1

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
        return (
            f"{self.to_frame().to_string()}\n"
            f"Cramér's V of source and label: {self.cramers_v:.2f}; "
            f"{self.determined:.0%} of the images have a label that follows from the source alone."
        )


def confounding(dataset: ChestXrayDataset) -> Confounding:
    """Return how far the source of a radiograph alone gives its label.

    Cramér's V: H. Cramér, Mathematical Methods of Statistics, 1946, section 21.9.

    Raises:
        ValueError: If the data set is empty.
    """
    if not len(dataset):
        raise ValueError("The data set is empty: nothing can be confounded.")
    return Confounding.of([s.source for s in dataset.samples], [s.label for s in dataset.samples])
