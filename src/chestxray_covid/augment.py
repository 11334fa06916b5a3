"""Augmentation of batches on the device, each sample with random numbers of its own.

Every transform is one of torchvision's v2 functionals, applied per sample, so that its numbers are
a function of (seed, epoch, sample) alone: batch size, order, resuming and the number of processes
change nothing.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F  # noqa: N812 - its usual name

#: Domain of the random numbers, so that order and augmentation never share a stream.
_STREAM = 2
#: The same, of :func:`hide_centres`.
_CENTRE_STREAM = 3
#: The same, of :func:`swap_frames`.
_FRAME_STREAM = 4
#: The same, of :func:`swap_backgrounds`.
_BACKGROUND_STREAM = 77  # any number of its own; the bundled weights were trained with this one
#: Share of an image that has to be lung, or near it, for :func:`swap_backgrounds`.
_LEAST_LUNG = 0.08


def as_number(name: str, value: Any) -> int | float:
    """Return an option that is a number as Python's own, where it is one of NumPy's for example.

    Raises:
        TypeError: If it is no number, with its name.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are varied; a value of 0 (or a range of width 0) leaves a thing alone.

    Attributes:
        rotation_deg: Largest rotation to either side, in degrees, in [0, 45]. Corners that turn in
            are filled with the image's own border: black ones ruin batch-norm statistics.
        horizontal_flip: Probability of a mirror image, in [0, 1]. The heart then lies right.
        crop_min: Smallest side of a random crop, as a fraction in [0.05, 1]; the crop is scaled
            back. With ``aspect``, which makes it longer and narrower, a side may be as short as
            ``crop_min / sqrt(aspect)``.
        aspect: Largest factor by which a crop's sides differ, in [1, 2]; needs ``crop_min`` < 1.
        gamma: Largest factor by which the exponent of the grey scale moves up or down, at least 1.
        contrast: Largest factor by which contrast moves up or down, at least 1.
        brightness: Largest shift of the grey level, as a fraction of white, in [0, 1).
        blur: Probability of a slight Gaussian blur, in [0, 1].
        noise: Largest deviation of added Gaussian noise, as a fraction of white, in [0, 1).
        equalise: Probability of moving towards the image's histogram equalisation, in [0, 1].
        resample: Smallest side, as a fraction in (0, 1], to which half of the images are reduced
            and enlarged again, so that the resolution of a source says less.
        hide_border: Largest part of the side, in [0, 0.45), that is hidden at each edge of half of
            the images, under one grey level drawn at random.
    """

    rotation_deg: float = 7.0
    horizontal_flip: float = 0.0
    crop_min: float = 0.8
    aspect: float = 1.0
    gamma: float = 1.3
    contrast: float = 1.3
    brightness: float = 0.1
    blur: float = 0.2
    noise: float = 0.02
    equalise: float = 0.0
    resample: float = 1.0
    hide_border: float = 0.0

    def __post_init__(self) -> None:
        bounds = {
            "rotation_deg": (0, 45),
            "horizontal_flip": (0, 1),
            "crop_min": (0.05, 1),
            "gamma": (1, 10),
            "contrast": (1, 10),
            "brightness": (0, 0.99),
            "blur": (0, 1),
            "noise": (0, 0.99),
            "aspect": (1, 2),
            "equalise": (0, 1),
            "resample": (0.1, 1),
            "hide_border": (0, 0.45),
        }
        for name, (low, high) in bounds.items():
            value = as_number(name, getattr(self, name))
            object.__setattr__(self, name, value)
            if not low <= value <= high:
                raise ValueError(f"{name} must be in [{low}, {high}], got {value}")

    @classmethod
    def none(cls) -> Augmentation:
        """Return an augmentation that changes nothing."""
        return cls(rotation_deg=0, crop_min=1, gamma=1, contrast=1, brightness=0, blur=0, noise=0)

    def to_dict(self) -> dict[str, float]:
        """Return JSON-able data."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __call__(self, pixels: Tensor, *, seed: int, epoch: int, draws: Sequence[int]) -> Tensor:
        """Return varied images.

        Args:
            pixels: ``(N, 1, S, S)`` uint8 on any device.
            seed: Seed of the training.
            epoch: Epoch, from 0.
            draws: ``(N,)`` numbers that identify each sample (and its repetition) in the epoch.

        Returns:
            ``(N, 1, S, S)`` float32 in [0, 255] on the same device.
        """
        images = pixels.to(torch.float32)
        if self == Augmentation.none():
            return images
        generators = [np.random.default_rng([seed, epoch, _STREAM, draw]) for draw in draws]
        varied = [self._vary(i, g) for i, g in zip(images, generators, strict=True)]
        return torch.stack(varied).clamp_(0, 255)

    def _vary(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        # Every number is drawn, used or not: one option leaves the numbers of the others alone.
        flip, blur, sigma = rng.random(), rng.random(), rng.uniform(0.3, 1.2)
        angle, side, across, down = rng.uniform(-1, 1), rng.random(), rng.random(), rng.random()
        log_gamma, log_contrast, shift = rng.uniform(-1, 1, 3)
        noise = rng.random() * self.noise
        log_aspect, equalise, mixed, reduced, scale = rng.uniform(-1, 1), *rng.random(4)
        covered, grey, *edges = rng.random(6)
        if flip < self.horizontal_flip:
            image = F.horizontal_flip(image)
        if self.rotation_deg:
            image = _rotate(image, angle * self.rotation_deg)
        if self.crop_min < 1:
            fraction = self.crop_min + side * (1 - self.crop_min)
            image = _crop(image, fraction, self.aspect ** (log_aspect / 2), across, down)
        if equalise < self.equalise:
            flat = F.equalize(image.clamp(0, 255).to(torch.uint8)).float()
            image = torch.lerp(image, flat, mixed)
        if self.gamma > 1:
            image = 255 * F.adjust_gamma(image / 255, self.gamma**log_gamma)
        if self.contrast > 1:
            mean = image.mean()
            image = (image - mean) * self.contrast**log_contrast + mean
        image = image + 255 * self.brightness * shift
        if blur < self.blur:
            image = F.gaussian_blur(image, [5, 5], [sigma, sigma])
        if self.resample < 1 and reduced < 0.5:
            image = _resample(image, self.resample + scale * (1 - self.resample))
        if self.noise:
            pattern = rng.standard_normal(image.shape, dtype=np.float32)
            image = image + torch.from_numpy(pattern).to(image.device) * (255 * noise)
        if self.hide_border and covered < 0.5:
            image = _hide_border(image, [self.hide_border * edge for edge in edges], 255 * grey)
        return image


def _rotate(image: Tensor, angle: float) -> Tensor:
    """Rotate by degrees about the centre; the border's own pixels fill the corners."""
    side = image.shape[-1]
    radians = math.radians(abs(angle))
    margin = math.ceil(side / 2 * (math.sin(radians) + math.cos(radians) - 1)) + 1
    padded = F.pad(image, [margin], padding_mode="edge")
    turned = F.rotate(padded, angle, interpolation=F.InterpolationMode.BILINEAR)
    centre: Tensor = F.center_crop(turned, [side, side])
    return centre


def _crop(image: Tensor, fraction: float, aspect: float, across: float, down: float) -> Tensor:
    side = image.shape[-1]
    width = min(side, max(1, round(side * fraction * aspect)))
    height = min(side, max(1, round(side * fraction / aspect)))
    top, left = round(down * (side - height)), round(across * (side - width))
    cropped: Tensor = F.resized_crop(image, top, left, height, width, [side, side], antialias=True)
    return cropped


def _resample(image: Tensor, fraction: float) -> Tensor:
    side = image.shape[-1]
    small = F.resize(image, [max(1, round(side * fraction))] * 2, antialias=True)
    enlarged: Tensor = F.resize(small, [side, side], antialias=True)
    return enlarged


def _hide_border(image: Tensor, parts: Sequence[float], grey: float) -> Tensor:
    side = image.shape[-1]
    left, top, right, bottom = (round(side * part) for part in parts)
    hidden = torch.full_like(image, grey)
    rows, columns = slice(top, side - bottom), slice(left, side - right)
    hidden[..., rows, columns] = image[..., rows, columns]
    return hidden


def hide_centres(
    images: Tensor,
    plain: Tensor,
    share: float,
    *,
    seed: int,
    epoch: int,
    draws: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Hide the centre of a share of the images, and say of which.

    A model that is taught a uniform target for them learns that the frame (markers, borders,
    the shape of the crop) says nothing. 50 to 95 % of the side are hidden, half of the time under
    the image's mean and half of the time under a random grey level. Two thirds of the frames are
    those of the image before augmentation, whose crops would leave out what a frame gives away.

    Args:
        images: ``(N, 1, S, S)`` float32 in [0, 255]; not changed.
        plain: ``(N, 1, S, S)`` the same before augmentation, uint8 or float32; not changed.
        share: Probability that an image is hidden, in [0, 1).
        seed, epoch, draws: As for :class:`Augmentation`.

    Returns:
        ``(N, 1, S, S)`` images and ``(N,)`` bool, true where the centre is hidden, both on the
        images' device.
    """
    hidden = torch.zeros(len(images), dtype=torch.bool)
    if share == 0:
        return images, hidden.to(images.device)
    shown, side = images.clone(), images.shape[-1]
    for i, draw in enumerate(draws):
        rng = np.random.default_rng([seed, epoch, _CENTRE_STREAM, draw])
        chosen, part, own_mean, grey, whole = rng.random(5)
        if chosen < share:
            hidden[i] = True
            margin = round(side * (1 - (0.5 + 0.45 * part)) / 2)
            inner = slice(margin, side - margin)
            frame = plain[i].to(images.dtype) if whole < 2 / 3 else images[i]
            shown[i] = frame
            shown[i, :, inner, inner] = frame.mean() if own_mean < 0.5 else 255 * grey
    return shown, hidden.to(images.device)


def swap_frames(
    images: Tensor, share: float, *, seed: int, epoch: int, draws: Sequence[int]
) -> Tensor:
    """Give a share of the images the frame of the image before them in the batch.

    Frame and label then have nothing to do with each other (after Yun et al., CutMix, ICCV 2019,
    but the label stays that of the centre). 2 to 20 % of the side at each edge are exchanged.
    Whose frame it is depends on the batch; all else on (seed, epoch, sample).

    Args:
        images: ``(N, 1, S, S)`` float32; not changed.
        share: Probability that an image gets another frame, in [0, 1).
        seed, epoch, draws: As for :class:`Augmentation`.

    Returns:
        ``(N, 1, S, S)`` on the same device.
    """
    if share == 0:
        return images
    swapped, side = images.roll(1, 0), images.shape[-1]
    for i, draw in enumerate(draws):
        rng = np.random.default_rng([seed, epoch, _FRAME_STREAM, draw])
        chosen, *edges = rng.random(5)
        margins = [round(side * (0.02 + 0.18 * edge)) if chosen < share else 0 for edge in edges]
        left, top, right, bottom = margins
        rows, columns = slice(top, side - bottom), slice(left, side - right)
        swapped[i, :, rows, columns] = images[i, :, rows, columns]
    return swapped


def swap_backgrounds(
    images: Tensor,
    lungs: Tensor,
    share: float,
    *,
    seed: int,
    epoch: int,
    draws: Sequence[int],
) -> Tensor:
    """Put the lungs of a share of the images before something else.

    What is around the lungs then has nothing to do with the label (after Teixeira et al., Impact
    of Lung Segmentation on the Diagnosis and Explanation of COVID-19 in Chest X-ray Images, 2021).
    Half of the time it becomes what the image before them in the batch shows at the same place, a
    quarter of the time the image's own mean, and a quarter of the time a random grey. Whose place
    that is depends on the batch; all else on (seed, epoch, sample). An image stays as it is where
    hardly any lung was found. The outline stays, and with it what a mask leaves out: a dense
    opacity may lie outside.

    Args:
        images: ``(N, 1, S, S)`` float32 in [0, 255]; not changed.
        lungs: ``(N, 1, S, S)`` float32 in [0, 1], what stays; see :func:`lungs.near_lungs`.
        share: Probability that an image is chosen, in [0, 1).
        seed, epoch, draws: As for :class:`Augmentation`.

    Returns:
        ``(N, 1, S, S)`` on the same device.
    """
    found, others = images.clone(), images.roll(1, 0)
    sizes = lungs.mean((1, 2, 3)).tolist()
    for i, (draw, size) in enumerate(zip(draws, sizes, strict=True)):
        rng = np.random.default_rng([seed, epoch, _BACKGROUND_STREAM, draw])
        chosen, kind, grey = rng.random(3)
        if chosen < share and size > _LEAST_LUNG:
            uniform = images[i].mean() if kind < 0.75 else 255 * grey
            around = others[i] if kind < 0.5 else torch.full_like(images[i], float(uniform))
            found[i] = images[i] * lungs[i] + around * (1 - lungs[i])
    return found
