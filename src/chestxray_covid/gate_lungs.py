"""A gate's second look, at the lungs of images that the first one leaves in doubt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.gate_probe import KindProbe
from chestxray_covid.lung_maps import WEIGHTS, bundled, digest_of

#: Fields in which a map of the lungs is averaged, on each side.
_FIELDS = 8
#: Length of what :func:`describe_lungs` returns.
LUNG_DESCRIPTORS = _FIELDS**2 + 6
#: What is little lung, as a share of the image, so that the doubt about none is no infinite one.
_LITTLE = 0.02


def describe_lungs(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return ``(70,)`` float32 numbers, what the lungs of an image look like to a gate.

    Of the map that the bundled network draws: its mean in 8x8 fields, in all, the share of it that
    is neither lung nor not, relative to what is lung, and its mean along the upper, lower, left
    and right border, where the lungs of a whole chest do not end.

    Args:
        pixels: ``(1, S, S)`` uint8, as the model gets them.

    Raises:
        ValueError: If they have another shape or type.
        CheckpointError: If the bundled weights of the lung network are missing or damaged.
    """
    pixels = np.asarray(pixels)
    side = pixels.shape[-1] if pixels.ndim else 0
    if pixels.dtype != np.uint8 or pixels.shape != (1, side, side) or not side:
        raise ValueError(f"pixels must be (1, S, S) uint8, got {pixels.shape} {pixels.dtype}")
    lungs = bundled()(pixels)
    side = len(lungs) // _FIELDS
    grid = lungs.reshape(_FIELDS, side, _FIELDS, side).mean((1, 3)).ravel()
    area = float(lungs.mean())
    unsure = 4 * float((lungs * (1 - lungs)).mean()) / (area + _LITTLE)
    borders = [edge.mean() for edge in (lungs[0], lungs[-1], lungs[:, 0], lungs[:, -1])]
    return np.array([*grid, area, unsure, *borders], np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class LungLook(KindProbe):
    """What radiographs and other images are like with their lungs in sight.

    Attributes:
        doubt: ``(1,)`` positive; an image is looked at whose log-odds of the first look are short
            of a threshold by less than this.
        network: ``(4,)`` int64, the SHA-256 of the weights that drew the lungs.
    """

    DESCRIBED: ClassVar[int] = KindProbe.DESCRIBED + LUNG_DESCRIPTORS

    doubt: NDArray[np.float32]
    network: NDArray[np.int64]

    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {**super()._shapes(), "doubt": (1,), "network": (4,)}

    def in_doubt(self, excess: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return ``(...,)`` whether images get this look.

        Args:
            excess: ``(..., K - 1)``, :meth:`KindProbe.excess` of the first look.
        """
        most = excess.max(-1)
        return np.asarray((most <= 0) & (most > -self.doubt[0]))

    @cached_property
    def fits(self) -> bool:
        """Whether the bundled network is the one that it was fitted with."""
        return bool((self.network == bundled_network()).all())


def bundled_network() -> NDArray[np.int64]:
    """Return ``(4,)`` int64, the SHA-256 of the bundled lung network's weights."""
    return np.frombuffer(bytes.fromhex(digest_of(WEIGHTS)), ">i8").astype(np.int64)
