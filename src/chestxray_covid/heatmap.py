"""How much each part of a radiograph speaks for a class."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chestxray_covid.errors import real_number
from chestxray_covid.files import expanded, write_files

#: Runs from black to orange by brightness alone, so that colour-blind readers see the same order.
#: Its pale end is left out: over white, where letters and markers are, it could not be seen.
_COLORMAP, _HOTTEST = "inferno", 0.8


@dataclass(frozen=True, kw_only=True, eq=False)
class Heatmap:
    """How much each part of a radiograph speaks for a class.

    Attributes:
        image: The upright radiograph, mode ``L``, ``(W, H)`` pixels.
        grid: ``(h, w)`` float32 of at least 0, over the whole image at the resolution of the
            method: for :func:`grad_cam` logits, whose sum is what speaks for the class; for
            :func:`occlusion_sensitivity` log-odds that are lost where it is hidden.
        target: The class that is explained.
        probability: What the model gives it, in [0, 1].
        method: ``"grad_cam"`` or ``"occlusion"``.
        source: Path of the image, or what it was.
    """

    image: Image.Image = field(repr=False)
    grid: NDArray[np.float32] = field(repr=False)
    target: str
    probability: float
    method: str
    source: str

    @property
    def values(self) -> NDArray[np.float32]:
        """``(H, W)`` float32 in [0, 1], pixel by pixel of ``image``; 1 is the hottest place.

        All 0 where nothing speaks for the class.
        """
        large = Image.fromarray(self.grid).resize(self.image.size, Image.Resampling.BILINEAR)
        heat = np.asarray(large, dtype=np.float32)
        hottest = float(heat.max())
        return heat / np.float32(hottest) if hottest > 0 else heat

    def overlay(self, *, opacity: float = 0.6) -> Image.Image:
        """Return the radiograph with the heat over it, mode ``RGB``, of the size of ``image``.

        Where there is no heat the radiograph stays as it is.

        Args:
            opacity: Of the hottest place, in [0, 1].

        Raises:
            TypeError: If ``opacity`` is no number.
            ValueError: If it is out of range.
        """
        opacity = real_number("opacity", opacity)
        if not 0 <= opacity <= 1:
            raise ValueError(f"opacity must be in [0, 1], got {opacity}")
        from matplotlib import colormaps

        heat = self.values
        colour = 255 * colormaps[_COLORMAP](_HOTTEST * heat)[..., :3]
        grey = np.asarray(self.image, dtype=np.float32)[..., np.newaxis]
        mixed = grey + opacity * heat[..., np.newaxis] * (colour - grey)
        return Image.fromarray(np.round(mixed).astype(np.uint8))

    def save(self, path: str | os.PathLike[str], *, opacity: float = 0.6) -> Path:
        """Write :meth:`overlay` as PNG, complete or not at all, and return its path.

        Raises:
            ValueError: If the name does not end in ``.png`` or ``opacity`` is out of range.
            OSError: If it cannot be written.
        """
        target, buffer = expanded(path), io.BytesIO()
        if target.suffix.lower() != ".png":
            raise ValueError(f"A heatmap is saved as .png, got {target.name!r}")
        self.overlay(opacity=opacity).save(buffer, "PNG")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_files(target.parent, {target.name: buffer.getvalue()})
        return target

    def share_inside(self, mask: NDArray[np.bool_]) -> float:
        """Return the share of the heat that lies inside a mask, in [0, 1].

        Heat that ignores the mask has about the share that the mask has of the image's area;
        compare the two. A coarse map spills over the edge of a mask, so 1 is not to be expected.

        Args:
            mask: ``(H, W)`` bool, of the size of ``image``, for example from :func:`segment`.

        Returns:
            ``nan`` if there is no heat at all.

        Raises:
            ValueError: If the mask is of another size or type.
        """
        heat, mask = self.values, np.asarray(mask)  # of None, too, where nobody drew lungs
        if mask.shape != heat.shape or mask.dtype != np.bool_:
            raise ValueError(
                f"mask must be {heat.shape} bool like the image, got {mask.shape} {mask.dtype}"
            )
        total = float(heat.sum(dtype=np.float64))
        return float(heat[mask].sum(dtype=np.float64)) / total if total else float("nan")
