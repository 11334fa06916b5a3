"""Take out of a classifier's last layer what it knows of the frame.

With the centre of a radiograph hidden, features still tell the sources apart, and their classes.
The directions in which the mean features of each source's classes differ then are projected out of
the last layer's weights, so that no class can gain from them (the null-space projection of Ravfogel
et al., Null It Out: Guarding Protected Attributes by Iterative Nullspace Projection, ACL 2020, with
class means for a probe).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chestxray_covid import ChestXrayDataset, ModelConfig
from chestxray_covid.engines import open_engine

#: Central parts, by side length, that are hidden to find the directions.
PARTS = (0.7, 0.8, 0.9)
#: Training images per source and label.
PER_CELL = 90


def hide(image: Image.Image, part: float, grey: int | None = None) -> Image.Image:
    """Return the image with its central part, by side length, under a grey, or its own mean."""
    pixels = np.array(image)
    height, width = pixels.shape
    top, left = round(height * (1 - part) / 2), round(width * (1 - part) / 2)
    under = round(float(pixels.mean())) if grey is None else grey
    pixels[top : height - top, left : width - left] = under
    return Image.fromarray(pixels)


def choose(dataset: ChestXrayDataset, *, per_cell: int = PER_CELL, seed: int = 0) -> list[int]:
    """Return positions of at most so many random images of each source and label."""
    cells: dict[tuple[str, str], list[int]] = {}
    for i in np.random.default_rng(seed).permutation(len(dataset)).tolist():
        cell = cells.setdefault((dataset.samples[i].source, dataset.samples[i].label), [])
        if len(cell) < per_cell:
            cell.append(i)
    return sorted(i for cell in cells.values() for i in cell)


def features_of(
    config: ModelConfig,
    tensors: Mapping[str, NDArray[Any]],
    dataset: ChestXrayDataset,
    indices: Sequence[int],
    part: float,
) -> NDArray[np.float64]:
    """Return ``(N, 1024)`` features with the central part hidden; 0 hides nothing."""
    engine, rows = open_engine(config, tensors), []
    for start in range(0, len(indices), 32):
        images = [dataset.image(i) for i in indices[start : start + 32]]
        shown = [hide(image, part) if part else image for image in images]
        rows.append(engine(np.stack([config.preprocess(image) for image in shown]))[1])
    return np.concatenate(rows).astype(np.float64)


def differences(features: NDArray[np.float64], cells: Sequence[str]) -> NDArray[np.float64]:
    """Return ``(cells, D)``: the mean features of each cell, less the mean of those means."""
    names = np.array(cells)
    means = np.stack([features[names == name].mean(0) for name in np.unique(names)])
    found: NDArray[np.float64] = means - means.mean(0)
    return found


def project_out(
    tensors: Mapping[str, NDArray[Any]],
    directions: NDArray[np.float64],
    typical: NDArray[np.float64],
) -> dict[str, NDArray[Any]]:
    """Return weights whose last layer does not see the directions.

    Args:
        tensors: Of a checkpoint.
        directions: ``(M, D)``, dependent ones among them as may be.
        typical: ``(D,)`` features at which the logits shall stay what they are.
    """
    _, strength, basis = np.linalg.svd(directions, full_matrices=False)
    basis = basis[strength > 1e-6 * strength[0]]
    weight = tensors["classifier.weight"].astype(np.float64)
    kept = weight - (weight @ basis.T) @ basis
    bias = tensors["classifier.bias"] + (weight - kept) @ typical
    kind = tensors["classifier.weight"].dtype
    return {
        **tensors,
        "classifier.weight": kept.astype(kind),
        "classifier.bias": bias.astype(kind),
    }


def unlearn_frame(
    config: ModelConfig, tensors: Mapping[str, NDArray[Any]], train: ChestXrayDataset
) -> dict[str, NDArray[Any]]:
    """Return the weights without the frame, by training images alone."""
    indices = choose(train)
    cells = [f"{train.samples[i].source} {train.samples[i].label}" for i in indices]
    found = [
        differences(features_of(config, tensors, train, indices, part), cells) for part in PARTS
    ]
    typical = features_of(config, tensors, train, indices, 0.0).mean(0)
    return project_out(tensors, np.concatenate(found), typical)
