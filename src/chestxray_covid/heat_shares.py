"""How much of a classifier's heat lies in the lungs, over a whole data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.classifier import Classifier
from chestxray_covid.datasets.base import ChestXrayDataset, Sample
from chestxray_covid.datasets.duplicates import patient_groups
from chestxray_covid.errors import check_dataset, check_function
from chestxray_covid.explain import explained, grad_cam_stream
from chestxray_covid.intervals import Estimate, bootstrap_by_group, check_resampling
from chestxray_covid.judged_images import whole_characters
from chestxray_covid.lungs import lung_mask, segment
from chestxray_covid.metrics import mean_among
from chestxray_covid.progress import Bar

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, eq=False)
class LungHeat:
    """How much of a classifier's heat lies in the lungs, over a data set.

    Attributes:
        share: Mean share of the heat that is inside the lungs.
        area: Mean share of the image that the lungs take: about the share of heat that would
            ignore them.
        excess: Mean of share minus area, image by image: 0 if the lungs do not matter.
        without_heat: Images left out because nothing speaks for the class.
        without_lungs: Images left out because no lung was found.
        table: A row per image that was not left out: ``id``, ``label``, ``patient_id``,
            ``source``, ``view``, ``target``, ``share`` and ``area``.
    """

    share: Estimate
    area: Estimate
    excess: Estimate
    without_heat: int
    without_lungs: int
    table: pd.DataFrame = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON-able data, without the table."""
        estimates = {name: getattr(self, name).to_dict() for name in ("share", "area", "excess")}
        return {
            **estimates,
            "without_heat": self.without_heat,
            "without_lungs": self.without_lungs,
        }


def lung_heat(
    classifier: Classifier,
    dataset: ChestXrayDataset,
    target: str | Sequence[str] | None = None,
    *,
    masks: Callable[[Sample], NDArray[np.bool_] | None] | None = None,
    batch_size: int = 16,
    device: str = "cpu",
    n_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    progress: bool = False,
) -> LungHeat:
    """Return how much of the Grad-CAM heat lies in the lungs, over a data set.

    Args:
        classifier: As for :func:`grad_cam`.
        dataset: Radiographs.
        target: As for :func:`grad_cam`.
        masks: Returns the lungs of a sample, ``(H, W)`` bool of the size of its image, or ``None``
            where they are not known; by default the annotated ones, see :func:`lung_mask`. Where
            they are not known, the bundled network draws them, see :func:`segment`.
        batch_size: Images computed at once.
        device: Torch device.
        n_resamples, seed, confidence: Of the intervals, see :func:`bootstrap_by_group`.
        progress: Show a progress bar.

    Raises:
        ImageError: If an image cannot be decoded.
        TypeError: If ``dataset`` is no data set, ``classifier`` none, or ``masks`` no function.
        ValueError: If an option is impossible or a mask is not of its image's size.
    """
    import pandas as pd

    # Before the slow part.
    check_dataset(dataset)
    check_function("masks", masks, "the lungs of a sample")
    how = check_resampling(n_resamples=n_resamples, seed=seed, confidence=confidence)
    items, targets = explained(classifier, dataset, target)
    known = masks or (lung_mask if dataset.transform is None else lambda _: None)
    heatmaps = grad_cam_stream(classifier, items, targets, batch_size, device)
    rows, patients, without_heat, without_lungs = [], [], 0, 0
    groups = patient_groups(dataset, find_copies=False)
    shown = Bar(heatmaps, "heat", len(items), unit="img", disable=not progress)
    for sample, group, heatmap in zip(dataset.samples, groups, shown, strict=True):
        drawn = known(sample)
        mask = segment(heatmap.image) if drawn is None else np.asarray(drawn)
        try:
            share, area = heatmap.share_inside(mask), float(mask.mean())
        except ValueError as error:
            raise ValueError(f"masks returned for {sample.path}: {error}") from error
        without_lungs += not area
        without_heat += bool(area) and share != share
        if area and share == share:
            who = (sample.path.name, sample.label, sample.patient_id, sample.source, sample.view)
            rows.append((*whole_characters(who), heatmap.target, share, area))
            patients.append(group)
    columns = ["id", "label", "patient_id", "source", "view", "target", "share", "area"]
    table = pd.DataFrame(rows, columns=columns)

    def mean(values: pd.Series[float]) -> Estimate:
        numbers = values.to_numpy(np.float64)
        return bootstrap_by_group(mean_among, patients, numbers, **how)

    return LungHeat(
        share=mean(table["share"]),
        area=mean(table["area"]),
        excess=mean(table["share"] - table["area"]),
        without_heat=without_heat,
        without_lungs=without_lungs,
        table=table,
    )
