"""Augmentation of whole batches on the device, each sample with random numbers of its own.

A sample's numbers are a function of (seed, epoch, sample) alone, and are drawn on the CPU. What is
done with them is done to all images at once, by as many operators whatever the size of the batch,
and nothing waits for the device. Operators are chosen that treat each image by itself, on a CPU to
the last bit: batch size, order, resuming and the number of processes change nothing.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chestxray_covid.transforms import (
    blur,
    equalise,
    gaussian,
    inside,
    mean,
    place,
    resample,
    to_device,
)

#: ``(N,)``, a number per sample.
_Floats = NDArray[np.float64]
#: Domain of the random numbers, so that order and augmentation never share a stream.
_STREAM = 2
#: The same, of :func:`hide_centres`.
_CENTRE_STREAM = 3
#: The same, of :func:`swap_frames`.
_FRAME_STREAM = 4
#: The same, of :func:`swap_backgrounds`.
_BACKGROUND_STREAM = 77  # any number of its own; published weights were trained with this one
#: The same, of :func:`mix_up`.
_MIX_STREAM = 5
_EDGES = ("left", "top", "right", "bottom")
#: What a sample draws, in this order and all of it: one option leaves the others' numbers alone.
_DRAWN = (
    *("flip", "blur", "sigma", "angle", "side", "across", "down", "gamma", "contrast", "shift"),
    *("noise", "aspect", "equalise", "mixed", "reduced", "scale", "covered", "grey"),
    *_EDGES,
)
#: What :func:`place` needs to know of an image.
_PLACE = ("cos", "sin", "left", "top", "width", "height")
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


def as_count(name: str, value: Any) -> int:
    """Return a count, from 1, or from 0 for a seed.

    Raises:
        ValueError: If it is none.
    """
    least = 0 if name == "seed" else 1
    try:
        count = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = -1
    if count < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return count


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

        Raises:
            ValueError: If there is not a draw for each image.
        """
        images = pixels.to(torch.float32)
        if self == Augmentation.none():
            return images
        generators = _generators(len(images), _STREAM, seed, epoch, draws)
        drawn = _uniform(generators, _DRAWN)
        seeds = np.array([g.integers(2**32, dtype=np.uint32) for g in generators], np.uint32)
        return self._vary(images, drawn, seeds.view(np.int32)).clamp(0, 255)

    def _vary(self, images: Tensor, u: dict[str, _Floats], seeds: NDArray[np.int32]) -> Tensor:
        """Return varied images, from ``(N,)`` numbers in [0, 1) and the seeds of their noise."""
        side, device = images.shape[-1], images.device
        signed = {name: 2 * u[name] - 1 for name in ("angle", "gamma", "contrast", "shift")}
        angle, crops = np.radians(self.rotation_deg * signed["angle"]), self._crops(side, u)
        equalised, blurred = u["equalise"] < self.equalise, u["blur"] < self.blur
        reduced = (u["reduced"] < 0.5) & (self.resample < 1)
        part = side * self.hide_border * (u["covered"] < 0.5)
        n = _columns(
            device,
            flip=u["flip"] < self.horizontal_flip,
            cos=np.cos(angle),
            sin=np.sin(angle),
            **crops,
            mixed=u["mixed"],
            gamma=self.gamma ** signed["gamma"],
            contrast=self.contrast ** signed["contrast"],
            shift=255 * self.brightness * signed["shift"],
            sigma=0.3 + (1.2 - 0.3) * u["sigma"],
            small=np.rint(side * (self.resample + u["scale"] * (1 - self.resample))).clip(1),
            noise=255 * self.noise * u["noise"],
            grey=255 * u["grey"],
            **{f"hidden_{edge}": np.rint(part * u[edge]) for edge in _EDGES},
        )
        if self.horizontal_flip:
            images = torch.where(n["flip"] > 0, images.flip(-1), images)
        moved = (angle != 0) | (np.minimum(crops["width"], crops["height"]) < side)
        images = _change(images, moved, place, *(n[name] for name in _PLACE))
        images = _change(images, equalised, equalise, n["mixed"])
        if self.gamma > 1:
            # Not pow, whose last bit on a CPU depends on where in the batch a pixel lies.
            images = (images / 255).log_().mul_(n["gamma"]).exp_().mul_(255)
        if self.contrast > 1:
            level = mean(images)
            images = (images - level).mul_(n["contrast"]).add_(level)
        images = images + n["shift"]
        images = _change(images, blurred, blur, n["sigma"])
        images = _change(images, reduced, resample, n["small"])
        if self.noise:
            images = images + gaussian(to_device(seeds, device), side).mul_(n["noise"])
        if self.hide_border:
            seen = inside(side, *(n[f"hidden_{edge}"] for edge in _EDGES))
            images = torch.where(seen, images, n["grey"])
        return images

    def _crops(self, side: int, u: dict[str, _Floats]) -> dict[str, _Floats]:
        """Return the crops' sides and where they begin, in whole pixels."""
        fraction = self.crop_min + u["side"] * (1 - self.crop_min)
        stretch = self.aspect ** (u["aspect"] - 0.5) if self.crop_min < 1 else 1.0
        width = np.rint(side * fraction * stretch).clip(1, side)
        height = np.rint(side * fraction / stretch).clip(1, side)
        left, top = np.rint(u["across"] * (side - width)), np.rint(u["down"] * (side - height))
        return {"width": width, "height": height, "left": left, "top": top}


def _generators(
    count: int, stream: int, seed: int, epoch: int, draws: Sequence[int]
) -> list[np.random.Generator]:
    """Return the generators of as many samples.

    Raises:
        ValueError: If there is not a draw for each.
    """
    if len(draws) != count:
        raise ValueError(f"draws must be as many as the {count} images, got {len(draws)}")
    return [np.random.default_rng([seed, epoch, stream, draw]) for draw in draws]


def _uniform(generators: Sequence[np.random.Generator], names: Sequence[str]) -> dict[str, _Floats]:
    """Return ``(N,)`` numbers in [0, 1) under each name, drawn in the order of the names."""
    drawn = np.array([g.random(len(names)) for g in generators]).reshape(-1, len(names))
    return dict(zip(names, drawn.T, strict=True))


def _columns(device: torch.device, **columns: NDArray[Any]) -> dict[str, Tensor]:
    """Return ``(N,)`` arrays as ``(N, 1, 1, 1)`` float32, in one transfer for all of them."""
    table = to_device(np.array(list(columns.values()), np.float32), device)
    return dict(zip(columns, table[..., None, None, None].unbind(), strict=True))


def _change(
    images: Tensor, chosen: NDArray[np.bool_], change: Callable[..., Tensor], *numbers: Tensor
) -> Tensor:
    """Return images of which the chosen ones are changed and the others not touched."""
    if not chosen.any():
        return images
    which = to_device(np.flatnonzero(chosen), images.device)
    changed = change(*(t.index_select(0, which) for t in (images, *numbers)))
    return images.index_copy(0, which, changed)


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
    if share == 0:
        return images, torch.zeros(len(images), dtype=torch.bool, device=images.device)
    names = ("chosen", "part", "own_mean", "grey", "whole")
    u = _uniform(_generators(len(images), _CENTRE_STREAM, seed, epoch, draws), names)
    side, hidden = images.shape[-1], u["chosen"] < share
    n = _columns(
        images.device,
        hidden=hidden,
        plain=u["whole"] < 2 / 3,
        margin=np.rint(side * (1 - (0.5 + 0.45 * u["part"])) / 2),
        own_mean=u["own_mean"] < 0.5,
        grey=255 * u["grey"],
    )
    frames = torch.where(n["plain"] > 0, plain.to(images.dtype), images)
    grey = torch.where(n["own_mean"] > 0, mean(frames), n["grey"])
    shown = torch.where(inside(side, *[n["margin"]] * 4), grey, frames)
    chosen = n["hidden"] > 0
    return torch.where(chosen, shown, images), chosen.flatten()


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
    names = ("chosen", *_EDGES)
    u = _uniform(_generators(len(images), _FRAME_STREAM, seed, epoch, draws), names)
    side, chosen = images.shape[-1], u["chosen"] < share
    margins = {e: np.rint(side * (0.02 + 0.18 * u[e])) * chosen for e in _EDGES}
    own = inside(side, *_columns(images.device, **margins).values())
    return torch.where(own, images, images.roll(1, 0))


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
    names = ("chosen", "kind", "grey")
    u = _uniform(_generators(len(images), _BACKGROUND_STREAM, seed, epoch, draws), names)
    n = _columns(images.device, chosen=u["chosen"] < share, kind=u["kind"], grey=255 * u["grey"])
    uniform = torch.where(n["kind"] < 0.75, mean(images), n["grey"])
    around = torch.where(n["kind"] < 0.5, images.roll(1, 0), uniform)
    swapped = images * lungs + around * (1 - lungs)
    return torch.where((n["chosen"] > 0) & (mean(lungs) > _LEAST_LUNG), swapped, images)


def mix_up(
    images: Tensor, alpha: float, *, seed: int, epoch: int, draws: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Blend each image with the one before it in the batch, and say how much of it is its own.

    Targets are to be blended alike (Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR
    2018). Which image is blended in depends on the batch; all else on (seed, epoch, sample).

    Args:
        images: ``(N, 1, S, S)`` float32; not changed.
        alpha: Each share is drawn from Beta(alpha, alpha), so that a small one leaves most images
            nearly as they are, or as the other one is; 0 blends nothing.
        seed, epoch, draws: As for :class:`Augmentation`.

    Returns:
        ``(N, 1, S, S)`` images, and ``(N,)`` float32 shares of their own, both on the images'
        device.
    """
    if alpha == 0:
        return images, torch.ones(len(images), device=images.device)
    generators = _generators(len(images), _MIX_STREAM, seed, epoch, draws)
    shares = np.array([g.beta(alpha, alpha) for g in generators], np.float32)
    own = _columns(images.device, own=shares)["own"]
    return images * own + images.roll(1, 0) * (1 - own), own.flatten()
