"""The small U-Net that finds the lungs."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from chestxray_covid.lung_maps import WIDTHS


class LungNetwork(nn.Module):
    """U-Net of 0.8 million weights: ``(N, 1, S, S)`` in [0, 1] → ``(N, 1, S, S)`` logits.

    Ronneberger et al., U-Net: Convolutional Networks for Biomedical Image Segmentation, MICCAI
    2015, with padding, batch norm and bilinear enlargement. ``S`` must be a multiple of 16. Each
    image is brought to mean 0 and deviation 1 first, so that exposure says little.
    """

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            _block(before, width) for before, width in zip((1, *WIDTHS), WIDTHS, strict=False)
        )
        pairs = list(pairwise(WIDTHS))[::-1]
        self.up = nn.ModuleList(_block(low + high, high) for high, low in pairs)
        self.head = nn.Conv2d(WIDTHS[0], 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of each pixel being lung."""
        mean = images.mean((2, 3), keepdim=True)
        x = (images - mean) / (images.std((2, 3), keepdim=True) + 1e-3)
        kept: list[Tensor] = []
        for block in self.down:
            x = block(x if not kept else nn.functional.max_pool2d(x, 2))
            kept.append(x)
        for block, skip in zip(self.up, kept[-2::-1], strict=True):
            x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], 1))
        logits: Tensor = self.head(x)
        return logits


def _block(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (before, after):
        layers += [
            nn.Conv2d(width, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
