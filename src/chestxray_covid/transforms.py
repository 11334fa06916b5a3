"""Transforms of batches, each image with parameters of its own, without waiting for the device.

Images are ``(N, 1, S, S)`` float32, and parameters ``(N, 1, 1, 1)`` float32 on the same device. On
a CPU an image comes out the same, to the last bit, whatever else is in its batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample, pad
from torchvision.transforms.v2.functional import equalize


def on_host(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on the CPU, from which a GPU can copy by itself."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return what :func:`on_host` made on the device; a GPU copies it while Python goes on.

    Others are waited for: what is not pinned could be gone before it is copied.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on the device."""
    return send(on_host(array, device), device)


def mean(images: Tensor) -> Tensor:
    """Return the mean of each image, ``(N, 1, 1, 1)``."""
    # Row by row: threads share the sum of an image that is alone, and its order is another.
    return images.mean(-1, keepdim=True).mean(-2, keepdim=True)


def inside(side: int, left: Tensor, top: Tensor, right: Tensor, bottom: Tensor) -> Tensor:
    """Return ``(N, 1, S, S)`` bool, false within so many pixels of each edge."""
    columns = torch.arange(side, device=left.device)
    rows = columns[:, None]
    across = (columns >= left) & (columns < side - right)
    return across & (rows >= top) & (rows < side - bottom)


def place(
    images: Tensor,
    cos: Tensor,
    sin: Tensor,
    left: Tensor,
    top: Tensor,
    width: Tensor,
    height: Tensor,
) -> Tensor:
    """Rotate anticlockwise, and enlarge a crop of that to the whole side, interpolating once.

    Args:
        images: What is rotated about its centre; its border continues it.
        cos, sin: Of the angle.
        left, top, width, height: The crop, in pixels of the rotated image.
    """
    side = images.shape[-1]
    # Distances from the centre of the image, whose border is at 1.
    pixels = torch.arange(side, dtype=torch.float32, device=images.device)
    along = (pixels - (side - 1) / 2) * (2 / side**2)
    # What lies beyond a crop is not seen: its outermost pixels continue it, as in a resized image.
    x, y = (
        torch.clamp(along * size, (1 - size) / side, (size - 1) / side)
        + (2 * start + size - side) / side
        for start, size in ((left, width), (top, height))
    )
    y = y.mT
    grid = torch.cat((x * cos - y * sin, x * sin + y * cos), 1).permute(0, 2, 3, 1)
    # As the padding mode "border", which not every device has.
    inner = grid.contiguous().clamp_(1 / side - 1, 1 - 1 / side)
    return grid_sample(images, inner, align_corners=False)


def equalise(images: Tensor, share: Tensor) -> Tensor:
    """Move images in [0, 255] by so much towards their histogram equalisation."""
    # Rounded: what interpolation makes of one grey level would else be two, and torn apart.
    flat: Tensor = equalize(images.round().to(torch.uint8))
    return images + (flat - images).mul_(share)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Weigh the five pixels around each with a Gaussian, along columns and then along rows."""
    near, far = (torch.exp(-(distance**2) / (2 * sigma**2)) for distance in (1, 2))
    total = 1 + 2 * (near + far)
    for axis, edges in ((-2, (0, 0, 2, 2)), (-1, (2, 2, 0, 0))):
        padded, size = pad(images, edges, mode="reflect"), images.shape[axis]
        a, b, c, d, e = (padded.narrow(axis, i, size) for i in range(5))
        images = (b + d).mul_(near / total).add_((a + e).mul_(far / total)).add_(c / total)
    return images


def resample(images: Tensor, small: Tensor) -> Tensor:
    """Reduce to so many pixels a side and enlarge again, both along rows and columns."""
    side = images.shape[-1]
    whole = torch.full_like(small, side)
    # In matrices of whole vectors; how others are multiplied depends on how many there are.
    edges = (0, -side % 32, 0, -side % 32)
    reduce = pad(_weights(whole, small, side), edges)
    both = pad(_weights(small, whole, side), edges) @ reduce
    return (both @ pad(images, edges) @ both.mT)[..., :side, :side]


def _weights(before: Tensor, after: Tensor, side: int) -> Tensor:
    """Return the matrices that resize so many pixels to so many others, as torchvision does it.

    Triangles as wide as a pixel of the coarser of the two, about the centres of the new pixels
    (bilinear with antialias). ``(N, 1, S, S)``; rows from ``after`` on mean nothing.
    """
    old = torch.arange(side, dtype=torch.float32, device=before.device)  # (S,)
    scale = before / after
    new = (old[:, None] + 0.5) * scale - 0.5
    new = torch.minimum(new.clamp_min(0), before - 1)
    weights = (1 - (new - old).abs() / scale.clamp_min(1)).clamp_min(0)
    return weights / weights.sum(-1, keepdim=True)


def gaussian(seeds: Tensor, side: int) -> Tensor:
    """Return ``(N, 1, S, S)`` standard normal noise, each pixel's from its index and a seed."""
    pixels = _scrambled(torch.arange(side**2, dtype=torch.int32, device=seeds.device))
    bits = _scrambled(pixels ^ seeds[:, None]).view(-1, 1, side, side)
    # Odd numbers of 24 bits and a sign: float32 holds each, and neither -1 nor 1 is among them.
    uniform = (bits >> 7).bitwise_or_(1).to(torch.float32).mul_(2.0**-24)
    return uniform.erfinv_().mul_(math.sqrt(2))


def _scrambled(bits: Tensor) -> Tensor:
    """Return 32 bits each of which depends on all others (Wellons' lowbias32), one to one."""
    # The masks make the shifts logical.
    bits = (bits >> 16).bitwise_and_(0xFFFF).bitwise_xor_(bits).mul_(0x7FEB352D)
    bits = (bits >> 15).bitwise_and_(0x1FFFF).bitwise_xor_(bits).mul_(0x846CA68B - 2**32)
    return (bits >> 16).bitwise_and_(0xFFFF).bitwise_xor_(bits)
