"""Parts of a radiograph, and how they are hidden from a classifier.

Pixels are ``(S, S)`` or ``(1, S, S)`` uint8, the square that a model receives; a region is
``(S, S)`` bool, true inside. What is hidden gets the mean of what is left, which says nothing of
what was there; the mean of the whole image would.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Region = NDArray[np.bool_]
Pixels = NDArray[np.uint8]

#: A corner is a square of this share of the side: the letters on films lie there.
CORNER = 0.2
#: A border is a strip of this share of the side: frames, collimation, burnt-in text.
BORDER = 0.1
#: The lungs' region reaches this far beyond their outline, a share of the side: masks leave out
#: what a dense opacity hides, and a model sees edges.
_MARGIN = 0.03
#: Less of the image than this is no pair of lungs, as for :func:`lungs.lung_box`.
SMALLEST_LUNGS = 0.02


def hidden(pixels: Pixels, region: Region) -> Pixels:
    """Return the pixels with a region under the mean of what is left; black if nothing is.

    >>> hidden(np.array([[10, 20], [30, 200]], np.uint8), np.array([[0, 0], [0, 1]], bool)).tolist()
    [[10, 20], [30, 20]]
    """
    inside = np.broadcast_to(region, pixels.shape)
    left = pixels[~inside]
    changed = pixels.copy()
    changed[inside] = round(float(left.mean())) if left.size else 0
    return changed


def centre(size_px: int, share: float) -> Region:
    """Return the central square of this share of the side."""
    region = np.zeros((size_px, size_px), bool)
    edge = round(size_px * (1 - share) / 2)
    region[edge : size_px - edge, edge : size_px - edge] = True
    return region


def border(size_px: int) -> Region:
    """Return a strip along all four sides, a tenth of the side wide."""
    return ~centre(size_px, 1 - 2 * BORDER)


def corners(size_px: int) -> Region:
    """Return the four corners, squares of a fifth of the side."""
    far = np.zeros(size_px, bool)
    edge = round(size_px * CORNER)
    far[:edge] = far[-edge:] = True
    return far[:, None] & far


def lung_region(mask: Region, size_px: int) -> Region | None:
    """Return the part of the image that holds the lungs, or ``None`` where there are none.

    There are none in a part that is the whole image, either, as around a mask that was inverted:
    with all of it hidden, every model would seem to need the lungs.

    It is the convex hull of the mask with a margin, so that neither the outline that a mask leaves
    where a dense opacity hides the lung, nor the lungs' shape, tells anything of what is hidden.

    Args:
        mask: ``(H, W)`` bool, of an image of any size.
        size_px: Side of the region.
    """
    from scipy.ndimage import binary_dilation
    from scipy.spatial import ConvexHull, QhullError

    scaled = Image.fromarray(mask).convert("L").resize((size_px, size_px), Image.Resampling.BOX)
    inside = np.asarray(scaled) > 127
    if inside.mean() < SMALLEST_LUNGS:
        return None
    points = np.argwhere(inside)[:, ::-1]
    try:
        outline = points[ConvexHull(points).vertices]
    except QhullError:  # all on one line
        return None
    drawn = Image.new("1", (size_px, size_px))
    ImageDraw.Draw(drawn).polygon([(int(x), int(y)) for x, y in outline], fill=1)
    steps = max(1, round(_MARGIN * size_px))
    region: Region = binary_dilation(np.asarray(drawn) | inside, iterations=steps)
    return None if region.all() else region
