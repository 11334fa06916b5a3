"""Is this an image that the model may judge? NumPy and Pillow only.

A gate holds what the training radiographs were like, as arrays that travel with the weights. It
looks at what prediction has at hand anyway: the network's features, the pixels that it was given,
and the size and colour of the image before; and, where that leaves it in doubt, at the lungs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chestxray_covid.errors import CheckpointError
from chestxray_covid.gate_lungs import LungLook, describe_lungs
from chestxray_covid.gate_probe import GREY_BINS, KINDS, THUMBNAIL_PX, KindProbe, standardise
from chestxray_covid.pixels import ImageFacts
from chestxray_covid.tensors import FEATURE_COUNT, read_tensors

#: Name of the attachment of a checkpoint that holds its gate.
GATE_NAME = "gate.safetensors"
#: Kind → flag and reason.
_KIND_FLAGS = {
    "lateral": ("lateral_view", "looks like a lateral radiograph, the model knows frontal ones"),
    "ct": ("not_a_chest_radiograph", "looks like a CT slice"),
    "inverted": ("inverted", "bone looks dark and air bright, expected the contrary"),
    "turned": ("out_of_distribution", "looks turned or upside down, expected an upright patient"),
    "foreign": ("not_a_chest_radiograph", "looks like a photograph, a drawing, a text or noise"),
    "part": (
        "out_of_distribution",
        "looks like a part of a radiograph or several in one, expected one whole chest",
    ),
}
#: Flags that make an answer worthless: the model was never meant to judge such an image.
ABSTAINING = frozenset(
    {"not_a_chest_radiograph", "lateral_view", "blank", "inverted", "out_of_distribution"}
)
#: Shorter side of an image, relative to that of the model's input, below which it is flagged, and
#: below which the answer is worthless. Of the bundled model's held-out radiographs reduced to it
#: (``docs/results/default/reduction.json``), few get another label at the first; the second is the
#: least at which the AUROC keeps more than half of what it is above chance.
MIN_SIDE, LEAST_SIDE = 0.4, 0.15
#: Share of the pixels from which an image is coloured. Of the public radiographs 3 % of Cohen's
#: are (arrows, stamps, tinted photographs of a screen) and none of the other three sources.
MIN_COLOURED = 0.005
#: An image is blank if so large a share of its pixels is within so many grey levels of the median.
MIN_BLANK, BLANK_LEVELS = 0.99, 4
_MAX_COMPONENTS = 256
#: What the tensors of the second look are called in a file.
_LUNGS = "lungs."


@dataclass(frozen=True, kw_only=True)
class Flag:
    """Something about an image that a reader of its prediction must know.

    Attributes:
        name: ``not_a_chest_radiograph``, ``lateral_view``, ``low_resolution``, ``blank``,
            ``inverted``, ``colour`` or ``out_of_distribution``.
        reason: Why, in words.
        score: How plain it is, in [0, 1]; what it counts depends on the flag, see
            :func:`check_image` and :meth:`Gate.check`.
    """

    name: str
    reason: str
    score: float

    @property
    def abstains(self) -> bool:
        """Whether it makes the model's answer worthless; ``colour`` warns.

        So does ``low_resolution`` as long as the shorter side is at least 0.15 of the input's.
        """
        if self.name == "low_resolution":
            return self.score > 1 - LEAST_SIDE / MIN_SIDE
        return self.name in ABSTAINING

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data."""
        return {"name": self.name, "reason": self.reason, "score": self.score}


def check_image(pixels: NDArray[np.uint8], facts: ImageFacts) -> tuple[Flag, ...]:
    """Return what can be said of an image without a gate: blank, low resolution, colour.

    Args:
        pixels: ``(1, S, S)`` uint8, as the model gets them.
        facts: Size and colour before.

    Returns:
        Flags, with the score of ``blank`` the share of pixels of nearly one grey level, of
        ``low_resolution`` the share of the needed side that is missing, of ``colour`` the share
        of coloured pixels.
    """
    return _check_image(pixels, facts, _counts(Image.fromarray(pixels[0])))


def _check_image(
    pixels: NDArray[np.uint8], facts: ImageFacts, counts: NDArray[np.int64]
) -> tuple[Flag, ...]:
    flags = []
    even = _even_share(counts)
    if even >= MIN_BLANK:
        reason = f"{even:.1%} of the pixels have nearly the same grey level"
        flags.append(Flag(name="blank", reason=reason, score=even))
    side = min(facts.width_px, facts.height_px)
    needed = MIN_SIDE * pixels.shape[-1]
    if side < needed:
        reason = (
            f"is {facts.width_px}x{facts.height_px} pixels, "
            f"expected a shorter side of at least {math.ceil(needed)}"
        )
        flags.append(Flag(name="low_resolution", reason=reason, score=1 - side / needed))
    if facts.colour >= MIN_COLOURED:
        reason = f"{facts.colour:.1%} of the pixels are coloured, a radiograph is grey"
        flags.append(Flag(name="colour", reason=reason, score=facts.colour))
    return tuple(flags)


def _even_share(counts: NDArray[np.int64]) -> float:
    total = counts.sum()
    median = int(np.searchsorted(np.cumsum(counts), total / 2))
    near = counts[max(0, median - BLANK_LEVELS) : median + BLANK_LEVELS + 1]
    return float(near.sum() / total)


def _counts(image: Image.Image) -> NDArray[np.int64]:
    """Return ``(256,)`` how many pixels have each grey level."""
    return np.array(image.histogram(), np.int64)


def describe(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return ``(D,)`` float32 numbers that tell an image's layout without the network.

    A thumbnail of 16x16 of mean 0 and deviation 1, the square roots of the shares of 16 grey
    ranges, and the differences of neighbours down and across relative to the contrast, as
    logarithms.

    Args:
        pixels: ``(1, S, S)`` uint8, S at least 16.
    """
    image = Image.fromarray(pixels[0])
    return _describe(pixels, image, _counts(image))


def _describe(
    pixels: NDArray[np.uint8], image: Image.Image, counts: NDArray[np.int64]
) -> NDArray[np.float32]:
    side = (THUMBNAIL_PX, THUMBNAIL_PX)
    thumbnail = np.asarray(image.resize(side, Image.Resampling.BOX), np.float32).ravel()
    thumbnail -= thumbnail.mean()
    thumbnail /= max(float(np.sqrt(np.square(thumbnail).mean())), 1.0)  # `std` takes twice as long
    shares = counts.reshape(GREY_BINS, -1).sum(1) / pixels.size
    levels = np.arange(256)
    mean = counts @ levels / pixels.size
    contrast = max(float(np.sqrt(counts @ (levels - mean) ** 2 / pixels.size)), 1.0)
    grey = pixels[0]
    down, across = _mean_step(grey[1:], grey[:-1]), _mean_step(grey[:, 1:], grey[:, :-1])
    rest = np.concatenate([np.sqrt(shares), np.log1p(10 * np.array([down, across]) / contrast)])
    return np.concatenate([thumbnail, rest.astype(np.float32)])


def _mean_step(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Return the mean difference of pixels, in grey levels, without leaving 8 bits."""
    steps = np.maximum(one, other) - np.minimum(one, other)
    return float(steps.sum(dtype=np.uint32) / steps.size)  # fits: 2048 squared times 255


@dataclass(frozen=True, kw_only=True, eq=False)
class Gate(KindProbe):
    """What the training radiographs were like; made by :func:`fit_gate`, stateless.

    Attributes:
        mean, scale, probe, bias, min_log_odds: As of :class:`KindProbe`; the inputs are the
            network's features and a description (:func:`describe`).
        centre: ``(1024,)`` mean of the standardised features of frontal radiographs.
        basis: ``(1024, C)`` orthonormal directions in which those vary most.
        variances: ``(C,)`` in those directions, positive.
        noise: ``(1,)`` variance in each of all others, positive.
        max_distance: ``(1,)`` distance from the centre beyond which an image is flagged.
        lungs: A second look at images that are nearly flagged; ``None`` of a gate without.

    Raises:
        ValueError: If a shape does not fit, or a value is not finite or not positive that must be.
    """

    centre: NDArray[np.float32]
    basis: NDArray[np.float32]
    variances: NDArray[np.float32]
    noise: NDArray[np.float32]
    max_distance: NDArray[np.float32]
    lungs: LungLook | None = None

    def __post_init__(self) -> None:
        components = self.basis.shape[1] if self.basis.ndim == 2 else 0
        if not 1 <= components <= _MAX_COMPONENTS:
            raise ValueError(
                f"basis must be (1024, C) with C in 1 to {_MAX_COMPONENTS}, got {self.basis.shape}"
            )
        super().__post_init__()

    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        components = self.basis.shape[1]
        return {
            **super()._shapes(),
            "centre": (FEATURE_COUNT,),
            "basis": (FEATURE_COUNT, components),
            "variances": (components,),
            "noise": (1,),
            "max_distance": (1,),
        }

    def check(
        self, features: NDArray[np.float32], pixels: NDArray[np.uint8], facts: ImageFacts
    ) -> tuple[Flag, ...]:
        """Return all that is odd about an image.

        One flag at most says what kind of image it is, the first of: ``blank``; the kind whose
        odds against a frontal radiograph exceed their threshold most, or, where one nearly does,
        exceed it with the lungs in sight; and, where none does, ``out_of_distribution`` by
        distance. Their scores are the share of even pixels; the probability of the kind; and
        d² / (d² + t²) of the distance d and the threshold t, from 0.5 on.

        Args:
            features: ``(1024,)`` of the engine.
            pixels: ``(1, S, S)`` uint8, as the model got them.
            facts: Size and colour before.

        Raises:
            CheckpointError: If the weights of the lung network, which it needs for an image in
                doubt, are missing or damaged.
        """
        image = Image.fromarray(pixels[0])
        counts = _counts(image)
        flags = _check_image(pixels, facts, counts)
        if any(flag.name == "blank" for flag in flags):
            return flags
        inputs = np.concatenate([features, _describe(pixels, image, counts)])[np.newaxis]
        standard = standardise(inputs, self.mean, self.scale)
        log_odds = self._log_odds(standard)[0]
        kind = _most_likely(self, log_odds) or self._look_again(log_odds, inputs, pixels)
        return (*([kind] if kind else self._check_distance(standard)), *flags)

    def _look_again(
        self, log_odds: NDArray[np.float64], inputs: NDArray[Any], pixels: NDArray[np.uint8]
    ) -> Flag | None:
        look = self.lungs
        if look is None or not look.fits or not look.in_doubt(self.excess(log_odds)):
            return None
        seen = np.concatenate([inputs, describe_lungs(pixels)[np.newaxis]], axis=1)
        return _most_likely(look, look.log_odds(seen)[0])

    def _check_distance(self, standard: NDArray[np.float64]) -> list[Flag]:
        distance = float(self._distances(standard[:, :FEATURE_COUNT])[0])
        limit = float(self.max_distance[0])
        if not distance > limit:
            return []
        reason = f"is {distance / limit:.2f} times as far from the training images as it may be"
        score = distance**2 / (distance**2 + limit**2)
        return [Flag(name="out_of_distribution", reason=reason, score=score)]

    def distances(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Return ``(N,)`` Mahalanobis distances from the frontal radiographs.

        The covariance is basis · variances · basisᵀ in the directions of the basis and noise times
        the identity in all others, the maximum likelihood one of probabilistic principal
        component analysis (Tipping and Bishop, J. R. Stat. Soc. B 61, 1999). Lee et al. (NeurIPS
        2018) take such a distance of a network's features for what is out of distribution.

        Args:
            features: ``(N, 1024)``.
        """
        standard = standardise(features, self.mean[:FEATURE_COUNT], self.scale[:FEATURE_COUNT])
        return self._distances(standard)

    @cached_property
    def _wide_basis(self) -> NDArray[np.float64]:
        return self.basis.astype(np.float64)  # once: it takes longer than what is done with it

    def _distances(self, standard: NDArray[np.float64]) -> NDArray[np.float64]:
        away = standard - self.centre
        along = away @ self._wide_basis
        across = np.maximum((away**2).sum(1) - (along**2).sum(1), 0)
        return np.asarray(np.sqrt((along**2 / self.variances).sum(1) + across / self.noise))

    def to_bytes(self) -> bytes:
        """Return the gate as a safetensors file, the attachment of a checkpoint: some 190 kB."""
        from safetensors.numpy import save

        second = {} if self.lungs is None else self.lungs.tensors()
        named = {f"{_LUNGS}{name}": tensor for name, tensor in second.items()}
        return bytes(save({**self.tensors(), **named}))

    @classmethod
    def from_bytes(cls, data: bytes, name: str = GATE_NAME) -> Self:
        """Return the gate that :meth:`to_bytes` wrote.

        Args:
            data: Content of the file.
            name: Names it in messages.

        Raises:
            CheckpointError: If it is damaged, or a tensor is missing, extra, misshapen, of another
                type, not finite, or not positive that must be; or if the description of the lung
                network, which a second look needs, cannot be read.

        Warns:
            UserWarning: If its second look was fitted with another lung network than the bundled
                one. It is left out then, and the first one decides alone.
        """
        tensors = read_tensors(data, Path(name))
        own = {key: t for key, t in tensors.items() if not key.startswith(_LUNGS)}
        second = {key.removeprefix(_LUNGS): tensors[key] for key in tensors.keys() - own.keys()}
        expected = cls.names(), LungLook.names() if second else []
        if (sorted(own), sorted(second)) != tuple(map(sorted, expected)):
            every = [*expected[0], *(f"{_LUNGS}{key}" for key in expected[1])]
            raise CheckpointError(
                f"{name} is no gate: expected the tensors {sorted(every)}, got {sorted(tensors)}."
            )
        lungs = LungLook.from_tensors(second, f"{name}, {_LUNGS}*") if second else None
        if lungs is not None and not lungs.fits:
            warnings.warn(
                f"{name} was fitted with another lung network than this version has, so images in "
                "doubt get no second look. Fit it again with fit_gate.",
                stacklevel=2,
            )
        return cls.from_tensors(own, name, lungs=lungs)


def _most_likely(look: KindProbe, log_odds: NDArray[np.float64]) -> Flag | None:
    """Return the flag of the kind whose ``(K,)`` log-odds exceed their threshold most, if any."""
    excess = look.excess(log_odds)
    best = int(excess.argmax()) + 1
    if not excess[best - 1] > 0:
        return None
    name, reason = _KIND_FLAGS[KINDS[best]]
    odds = np.exp(log_odds - log_odds.max())
    # Two kinds share a flag: its probability is theirs together.
    known = KINDS[: len(odds)]
    alike = [k for k, kind in enumerate(known) if _KIND_FLAGS.get(kind, ("",))[0] == name]
    return Flag(name=name, reason=reason, score=float(odds[alike].sum() / odds.sum()))
