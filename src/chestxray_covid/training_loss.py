"""What training makes small: cross-entropy, by the way in which a batch was varied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from chestxray_covid.errors import TrainingError
from chestxray_covid.training_config import TrainingConfig


class Varied(NamedTuple):
    """What a step sees of a batch, and of what its targets are made.

    Attributes:
        pixels: ``(N, 1, S, S)`` float32 in [0, 255].
        hidden: ``(N,)`` bool, where the centre is hidden and the target is uniform instead.
        own: ``(N,)`` float32 shares of an image's own target, the rest being that of the image
            before it; ``None`` where nothing is blended.
    """

    pixels: Tensor
    hidden: Tensor
    own: Tensor | None = None


class TrainingLoss:
    """Cross-entropy of a batch, image by image.

    Args:
        config: Options of the run.
        weights: ``(K,)`` weights of the classes, or ``None``.
    """

    def __init__(self, config: TrainingConfig, weights: Tensor | None = None) -> None:
        self._config = config
        self._weights = weights

    def __call__(
        self, logits: Tensor, targets: Tensor, varied: Varied, told: Tensor | None = None
    ) -> Tensor:
        """Return ``(N,)`` losses.

        Args:
            logits: ``(N, K)`` float32.
            targets: ``(N,)`` classes.
            varied: What the logits are of.
            told: ``(N, K)``, see :func:`told_by_sources`; ``None`` compares all classes.
        """
        if told is not None:
            return self._within_sources(logits, targets, varied.hidden, told)
        losses = self._all_classes(logits, targets, varied.hidden)
        if varied.own is None:
            return losses
        other = self._all_classes(logits, targets.roll(1), varied.hidden)
        return other.lerp(losses, varied.own)

    def _all_classes(self, logits: Tensor, targets: Tensor, hidden: Tensor) -> Tensor:
        return F.cross_entropy(
            logits,
            _soften(targets, hidden, logits.shape[1]) if self._config.hide_centre else targets,
            weight=self._weights,
            label_smoothing=self._config.label_smoothing,
            reduction="none",
        )

    def _within_sources(
        self, logits: Tensor, targets: Tensor, hidden: Tensor, told: Tensor
    ) -> Tensor:
        """Return ``(N,)`` losses over the classes of each image's source, or all where hidden.

        Targets are smoothed towards the source's own shares, not evenly: the mean target of a
        source is its shares then, which logits that are all the same give.
        """
        told = torch.where(hidden[:, None], 0, told)
        share = self._config.label_smoothing
        exact = _soften(targets, hidden, logits.shape[1])
        smoothed = (1 - share) * exact + share * told.softmax(1)
        return F.cross_entropy(logits + told, smoothed, reduction="none")


def _soften(targets: Tensor, hidden: Tensor, classes: int) -> Tensor:
    """Return ``(N, K)`` targets that are uniform where ``hidden`` is true."""
    return torch.where(hidden[:, None], 1 / classes, F.one_hot(targets, classes).float())


def diverged(
    loss: float, place: str, paths: Sequence[object], rate: float, output: Path
) -> TrainingError:
    """Return the error that says of which images the loss is not a number, and what to do."""
    return TrainingError(
        f"The loss is {loss} in {place}. Lower learning_rate ({rate:.3g}), use "
        "precision='float32', or look at the images of the batch: "
        f"{', '.join(map(str, paths))}. {_elsewhere(output)}"
    )


def diverged_validation(loss: float, epoch: int, output: Path) -> TrainingError:
    """Return the error that says after which epoch, from 1, the loss is not a number."""
    return TrainingError(
        f"The validation loss is {loss} after epoch {epoch}: the weights have diverged. Lower "
        f"learning_rate. {_elsewhere(output)}"
    )


def _elsewhere(output: Path) -> str:
    return (
        "Other options take another folder; build_densenet121 of this one, "
        f"{output}, begins with the weights of its best epoch, if one is finished."
    )
