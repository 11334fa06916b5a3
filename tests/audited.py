"""A small classifier that is really trained, in milliseconds: linear, on thumbnails."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from chestxray_covid import ChestXrayDataset, Classifier, Preprocess

SIZE = 64
PREPROCESS = Preprocess(size_px=SIZE)


def thumbnail(pixels: np.ndarray, side: int = 8) -> np.ndarray:
    """Return ``(N, side * side)`` of ``(N, 1, S, S)`` pixels."""
    size, how = (side, side), Image.Resampling.BOX
    small = [np.asarray(Image.fromarray(p[0]).resize(size, how)) for p in pixels]
    return np.stack(small).reshape(len(pixels), -1) / 255.0


class Linear(Classifier):
    """A classifier without a network; ``features`` says what it sees of the pixels."""

    def __init__(
        self,
        train: ChestXrayDataset,
        features: Callable[[np.ndarray], np.ndarray] = thumbnail,
        strength: float = 0.05,
    ) -> None:
        self.config = cast(Any, SimpleNamespace(classes=train.classes, preprocess=PREPROCESS))
        self.engine = cast(Any, SimpleNamespace(calls=1))
        self._digest = "0" * 64
        self.features = features
        self.trained_on = train
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        self.model = model.fit(features(pixels_of(train)), train.targets)

    def _compute(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = self.features(pixels)
        return self.model.predict_proba(found), found.astype(np.float32)


def pixels_of(dataset: ChestXrayDataset) -> np.ndarray:
    """Return ``(N, 1, S, S)`` uint8."""
    return np.stack([PREPROCESS(dataset.image(i)) for i in range(len(dataset))])
