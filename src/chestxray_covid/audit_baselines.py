"""What little is enough to predict a label: linear models on held-out patients."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from chestxray_covid.audit_data import AuditData
from chestxray_covid.audit_report import AuditFinding
from chestxray_covid.delong import DELONG_BY_PATIENT
from chestxray_covid.file_facts import as_numbers, file_facts
from chestxray_covid.hiding import centre
from chestxray_covid.intervals import Estimate
from chestxray_covid.subgroups import SMALL

FOLDS = 5
#: Sides of the thumbnails, in pixels. With 64 a linear model tells the two sources of the classic
#: design apart almost without error, also by the frame alone (``benchmarks/thumbnails.py``).
SMALL_THUMBNAIL_PX, THUMBNAIL_PX = 8, 64
#: Strengths of the ridge, in numbers of features, among which each fold chooses.
_STRENGTHS = (0.01, 0.1, 1.0, 10.0)
#: Rows to learn from and rows to judge, per fold.
Folds: TypeAlias = tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]


def grouped_folds(labels: ArrayLike, groups: NDArray[np.int64], *, seed: int) -> Folds | None:
    """Return the rows to learn from and those to judge, patients apart and labels alike.

    Args:
        labels: ``(N,)``, of at least two values.
        groups: ``(N,)`` patient of each image.
        seed: Seed of the folds.

    Returns:
        As many pairs as folds; ``None`` if a label has fewer patients than there are folds, or
        fewer than 20 images.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    names, codes = np.unique(np.asarray(labels), return_inverse=True)
    counts = [(np.sum(codes == k), len(set(groups[codes == k]))) for k in range(len(names))]
    if len(names) < 2 or any(n < SMALL or patients < FOLDS for n, patients in counts):
        return None
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    return tuple(splitter.split(codes, codes, groups))


def held_out_scores(features: NDArray[Any], labels: ArrayLike, folds: Folds) -> NDArray[np.float64]:
    """Return how much a ridge classifier takes each image for each label, its patient held out.

    Args:
        features: ``(N, D)``.
        labels: ``(N,)``, as :func:`grouped_folds` got them.
        folds: What that returned.

    Returns:
        ``(N, K)`` decision values, columns in sorted order of the labels.
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names, codes = np.unique(np.asarray(labels), return_inverse=True)
    scores = np.zeros((len(codes), len(names)))
    alphas = [strength * features.shape[1] for strength in _STRENGTHS]
    for train, test in folds:
        model = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=alphas))
        decision = model.fit(features[train], codes[train]).decision_function(features[test])
        scores[test] = decision if decision.ndim > 1 else np.stack([-decision, decision], axis=1)
    return scores


def baselines(data: AuditData) -> tuple[AuditFinding, ...]:
    """Return the AUROC that file facts, brightness, thumbnails and the frame alone reach."""
    shown = thumbnails(data.pixels, THUMBNAIL_PX)
    grey = data.pixels.reshape(len(data.pixels), -1)
    small = thumbnails(data.pixels, SMALL_THUMBNAIL_PX).reshape(len(shown), -1)
    facts = [file_facts(sample) for sample in data.samples]
    headers = as_numbers(facts) if any(facts) else None
    brightness = np.stack([grey.mean(1), grey.std(1)], axis=1)
    folds = grouped_folds(data.truth, data.groups, seed=data.how["seed"])
    return (
        _baseline(data, folds, "file_facts", "file facts only", headers),
        _baseline(data, folds, "brightness", "mean and deviation of the grey", brightness),
        _baseline(data, folds, "thumbnail_8", "a thumbnail of 8 × 8 pixels", small),
        _baseline(data, folds, "frame_70", "the frame, central 70 % hidden", _frame(shown, 0.7)),
        _baseline(data, folds, "frame_90", "the frame, central 90 % hidden", _frame(shown, 0.9)),
        _baseline(data, folds, "image", "the whole image, 64 × 64", shown.reshape(len(shown), -1)),
    )


def _baseline(
    data: AuditData, folds: Folds | None, name: str, what: str, features: NDArray[np.float64] | None
) -> AuditFinding:
    if features is None:
        why = "No image is a file with a header that can be read."
        return AuditFinding(
            name=name, what=what, metric="auroc", estimate=undefined(data), meaning=why
        )
    if folds is None:
        why = f"Each class needs {SMALL} images of {FOLDS} patients."
        return AuditFinding(
            name=name, what=what, metric="auroc", estimate=undefined(data), meaning=why
        )
    estimate = data.auroc(held_out_scores(features, data.truth, folds)[:, 1])
    return AuditFinding(name=name, what=what, metric="auroc", estimate=estimate)


def undefined(data: AuditData, n: int = 0) -> Estimate:
    """Return what stands for a number that cannot be had."""
    return Estimate(
        value=float("nan"), n=n, method=DELONG_BY_PATIENT, confidence=data.how["confidence"]
    )


def thumbnails(pixels: NDArray[np.uint8], side: int) -> NDArray[np.float64]:
    """Return ``(N, side, side)`` float64 in [0, 1] of ``(N, 1, S, S)`` uint8."""
    size, how = (side, side), Image.Resampling.BOX
    small = [np.asarray(Image.fromarray(one[0]).resize(size, how)) for one in pixels]
    return np.stack(small) / 255


def _frame(shown: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Return the pixels around the central part, ``(N, D)``."""
    outside: NDArray[np.float64] = shown[:, ~centre(shown.shape[1], share)]
    return outside
