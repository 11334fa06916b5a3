"""The history of a training run."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Self, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.errors import TrainingError
from chestxray_covid.files import expanded, write_files

if TYPE_CHECKING:
    import pandas as pd

HISTORY_NAME = "history.json"


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """What one epoch gave.

    Attributes:
        epoch: Number, from 1.
        learning_rate: At the epoch's last step.
        train_loss: Mean over the epoch's images as they are drawn, varied and smoothed; not to be
            compared with ``val_loss`` where classes are drawn evenly or weighed, or with
            ``hide_centre``, ``mixup`` or ``within_sources``.
        val_loss: Mean cross-entropy over the validation images.
        val_accuracy: In [0, 1].
        val_kappa: Cohen's kappa, in [-1, 1]; ``None`` if undefined.
        val_auroc: Of the second class for two classes, else the mean of one against the rest;
            ``None`` if the validation data lack a class.
        images_per_s: Training images per second.
        seconds: Duration of training and validation.
        data_seconds: Time that training waited for pixels.
        is_best: Whether its weights are the run's so far.
    """

    epoch: int
    learning_rate: float
    train_loss: float
    val_loss: float
    val_accuracy: float
    val_kappa: float | None
    val_auroc: float | None
    images_per_s: float
    seconds: float
    data_seconds: float
    is_best: bool


@dataclass(frozen=True, kw_only=True)
class History:
    """The epochs of a run, in order.

    Attributes:
        records: One per epoch.
        finished: Whether the run came to its end; also false where a file does not say.
    """

    records: tuple[EpochRecord, ...] = ()
    finished: bool = False

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[EpochRecord]:
        return iter(self.records)

    @property
    def best(self) -> EpochRecord:
        """The epoch whose weights were kept.

        Raises:
            ValueError: If no epoch is finished, or none is marked as the best.
        """
        best = [r for r in self.records if r.is_best]
        if not best:
            raise ValueError(
                f"No epoch is finished: is_best is true in none of {len(self)} records."
            )
        return best[-1]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data."""
        return {"finished": self.finished, "epochs": [asdict(r) for r in self.records]}

    def to_frame(self) -> pd.DataFrame:
        """Return one row per epoch."""
        import pandas as pd

        return pd.DataFrame([asdict(r) for r in self.records])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``history.json`` and ``history.csv`` into a folder."""
        table = io.StringIO()
        writer = csv.DictWriter(table, [f.name for f in fields(EpochRecord)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(r) for r in self.records)
        data = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        contents = {HISTORY_NAME: data.encode(), "history.csv": table.getvalue().encode()}
        write_files(expanded(folder), contents)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Return the history that :meth:`to_dict` described.

        Raises:
            TrainingError: If it is damaged.
        """
        try:
            records = tuple(EpochRecord(**entry) for entry in data["epochs"])
            finished = data.get("finished", False)
            _check_types(records, finished)
        except (TypeError, KeyError) as error:
            raise TrainingError(
                f"This is no training history: {error!r}. Expected what History.to_dict returns."
            ) from error
        return cls(records=records, finished=finished)


def _check_types(records: Sequence[EpochRecord], finished: Any) -> None:
    if not isinstance(finished, bool):
        raise TypeError(f"finished must be true or false, got {finished!r}")
    for name, hint in get_type_hints(EpochRecord).items():
        kinds = get_args(hint) or (hint,)
        whole = (int,) if float in kinds else ()  # JSON of other programs writes 1.0 as 1
        for value in (getattr(record, name) for record in records):
            if type(value) not in (*kinds, *whole):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise TypeError(f"{name} must be {wanted}, got {value!r}")


def validation_numbers(
    targets: NDArray[np.int64], probabilities: NDArray[np.float64]
) -> dict[str, Any]:
    """Return accuracy, kappa and AUROC as :class:`EpochRecord` holds them.

    Args:
        targets: ``(N,)`` true classes.
        probabilities: ``(N, K)``, rows summing to 1.
    """
    from sklearn.metrics import cohen_kappa_score, roc_auc_score

    predicted = probabilities.argmax(1)
    classes = probabilities.shape[1]
    present = len(np.unique(targets))
    auroc = kappa = None
    if present == classes:
        scores = probabilities[:, 1] if classes == 2 else probabilities
        auroc = float(roc_auc_score(targets, scores, multi_class="ovr"))
    if present > 1:
        kappa = float(cohen_kappa_score(targets, predicted))
    return {
        "val_accuracy": float((predicted == targets).mean()),
        "val_kappa": kappa,
        "val_auroc": auroc,
    }
