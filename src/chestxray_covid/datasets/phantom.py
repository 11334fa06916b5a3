"""How a phantom is drawn: anatomy, tissue, bones, opacities, artefacts.

The drawing is a schematic of a frontal radiograph, not a simulation; its numbers were chosen by
eye, and nothing that is measured on phantoms says anything about patients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter

from chestxray_covid.datasets.base import Sample

Floats = NDArray[np.float32]
#: ``(..., M, 2)`` x and y in sides of the image: x from the midline, positive towards the image's
#: right, which is the patient's left; y from 0 (top) to 1 (bottom).
Points = NDArray[np.float64]

#: Random streams, apart so that one choice never shifts another.
VISITS, _ANATOMY, _VESSELS, _DISEASE, _POSE, _NOISE = range(6)
#: Multiplied with an outline: the same on the image's left and right.
_BOTH = np.array([[[-1.0, 1.0]], [[1.0, 1.0]]])


def render_phantom(sample: Sample, min_size: tuple[int, int] | None = None) -> Image.Image:
    """Return the image of a phantom, mode ``L``, square.

    Args:
        sample: A sample of :class:`SyntheticChestXray`.
        min_size: Ignored: a phantom is always drawn at its full size.

    Raises:
        ValueError: If the sample is no phantom.
    """
    recipe = Recipe.of(sample)
    anatomy = _Anatomy(recipe)
    lungs = _lungs(anatomy)
    image = _thorax(anatomy, lungs)
    # Nothing is added where the soft edge is below one half, which is outside the mask.
    image += np.clip(2 * lungs - 1, 0, 1) * _opacity(anatomy)
    image = (image - 0.5) * anatomy.contrast + 0.5 + anatomy.exposure
    image = np.clip(image, 0, 1) ** np.float32(anatomy.gamma)
    image += 0.014 * recipe.rng(_NOISE).standard_normal(image.shape, dtype=np.float32)
    _add_artefacts(image, recipe)
    return Image.fromarray((np.clip(image, 0, 1) * 255).astype(np.uint8))


def phantom_mask(sample: Sample) -> NDArray[np.bool_]:
    """Return where the lungs of a phantom are: ``(H, W)`` bool, without the part behind the heart.

    Args:
        sample: A sample of :class:`SyntheticChestXray`.

    Raises:
        ValueError: If the sample is no phantom.
    """
    mask: NDArray[np.bool_] = _lungs(_Anatomy(Recipe.of(sample))) > 0.5
    return mask


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that the pixels of a phantom depend on; as text, a sample's metadata."""

    seed: int
    index: int
    patient: int
    image_size_px: int
    opacity: str
    marker: str
    look: float  # of the source, -1 to 1; 0 without a site effect

    @classmethod
    def of(cls, sample: Sample) -> Recipe:
        """Return the recipe that a phantom's metadata hold."""
        text = sample.metadata
        try:
            whole = {k: int(text[k]) for k in ("seed", "index", "patient", "image_size_px")}
            words = {k: text[k] for k in ("opacity", "marker")}
            return cls(**whole, **words, look=float(text["look"]))  # type: ignore[arg-type]
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{sample.path} is no phantom: expected a sample of SyntheticChestXray, "
                f"got one with metadata {dict(text)}."
            ) from error

    def rng(self, stream: int) -> np.random.Generator:
        """Return the generator of one stream, fresh."""
        number = self.index if stream in (_POSE, _NOISE) else self.patient
        return np.random.default_rng((self.seed, stream, number))


class _Anatomy:
    """One patient on one day."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        patient, day = recipe.rng(_ANATOMY), recipe.rng(_POSE)

        def vary(by_patient: float, by_day: float = 0.0) -> float:
            return by_patient * patient.uniform(-1, 1) + by_day * day.uniform(-1, 1)

        turn = math.radians(vary(2, 1.5))
        cos, sin, zoom = math.cos(turn), math.sin(turn), 1 + vary(0, 0.03)
        zooms = np.array([[zoom + vary(0.09)], [zoom + vary(0.08)]])
        self.axes = np.array([[cos, sin], [-sin, cos]]) * zooms
        self.origin = 0.5 + np.array([vary(0.025, 0.015), vary(0.025, 0.015)])
        self.apex = 0.115 + vary(0.02)
        left = 0.675 + vary(0.03, 0.015)
        self.domes = {1: left, -1: left - 0.024 + vary(0.012)}  # the right one stands higher
        self.heart = 1 + vary(0.18, 0.02)
        self.knob = 1 + vary(0.2)
        self.wall = 0.427 + vary(0.03)
        self.arms = vary(0.06)
        self.clavicle = vary(0.02, 0.01)
        self.first_rib = 0.135 + vary(0.025)
        self.bubble = vary(0.02)
        self.gamma = 2 ** vary(0.25, 0.2) * 1.25**-recipe.look
        self.contrast = 1 + vary(0.1, 0.06)
        self.exposure = vary(0.03, 0.03)
        self.severity = 0.8 + vary(0, 0.2)

    def chest(self, y: Points) -> Points:
        """Return how far the inner chest wall is from the midline at a height."""
        heights = (0.10, 0.15, 0.21, 0.31, 0.45, 0.6, 0.8)
        return np.interp(y, heights, (0.10, 0.185, 0.25, 0.31, 0.352, 0.372, 0.378))

    def lung(self, side: int) -> Points:
        top = self.apex
        heights = np.array([top + 0.045, top + 0.1, 0.31, 0.42, 0.53, 0.63])
        wall = np.stack([self.chest(heights), heights], axis=1)
        base = [(0.371, 0.075), (0.366, 0.088), (0.35, 0.068), (0.29, 0.022), (0.21, 0)]
        base += [(0.13, 0.012), (0.05, 0.045)]
        medial = [(0.045, 0.5), (0.045, 0.3), (0.058, top + 0.06), (0.085, top + 0.012)]
        outline = [wall, np.add(base, (0, self.domes[side])), [*medial, (0.125, top)]]
        return _spline(np.concatenate(outline), closed=True) * (side, 1)

    def mediastinum(self) -> list[Points]:
        h, base = self.heart, self.domes[1]
        heart = [(0, 0.34), (0.062, 0.36), (0.078 * h, 0.42), (0.125 * h, 0.5), (0.188 * h, 0.585)]
        heart += [(0.215 * h, base), (0.19 * h, base + 0.055), (0.05, base + 0.08)]
        heart += [(-0.06, base + 0.05), (-0.098 * h, base - 0.02), (-0.108 * h, 0.57)]
        heart += [(-0.085 * h, 0.47), (-0.058, 0.38)]
        vessels = [(-0.062, 0.02), (-0.05, 0.14), (-0.06, 0.25), (-0.058, 0.4)]
        vessels += [(0.05, 0.4), (0.058, 0.22), (0.06, 0.14), (0.062, 0.02)]
        knob = _ellipse(0.046, 0.295, 0.036 * self.knob, 0.046 * self.knob)
        return [_spline(heart, closed=True), np.array(vessels), knob]

    def body(self) -> Points:
        w, a = self.wall, self.arms
        half = [(0.085, -0.1), (0.085, 0), (0.12, 0.055), (0.25, 0.085), (0.38, 0.105)]
        half += [(0.47, 0.16), (0.56 - a, 0.3), (0.66 - a, 0.55), (0.75, 0.8), (0.68 - a, 0.8)]
        half += [(0.56 - a, 0.57), (0.5 - a, 0.42), (0.445, 0.37), (w, 0.43), (w, 0.6)]
        half += [(w + 0.015, 0.8), (w + 0.02, 1.15)]
        return np.concatenate([_spline(half), _spline(half)[::-1] * (-1, 1)])

    def abdomen(self) -> Points:
        dome = [(0.05, 0.05), (0.13, 0.01), (0.21, -0.004), (0.29, 0.018), (0.36, 0.06)]
        right, left = (np.add(dome, (0, self.domes[s])) * (s, 1) for s in (-1, 1))
        return _spline([*right[::-1], *left, (0.41, 1.2), (-0.41, 1.2)], closed=True)

    def ribs(self) -> tuple[Points, Points]:
        """Return the centre lines of the posterior and of the anterior ribs."""
        start = self.first_rib + 0.0575 * np.arange(9)
        end = start + 0.045 + 0.012 * np.minimum(np.arange(9), 5)
        x, zero = self.chest(end) + 0.012, np.zeros(9)
        back = [(zero + 0.04, start), (0.22 * x, start - 0.014), (0.55 * x, start - 0.004)]
        back += [(0.84 * x, (start + end) / 2), (x, end)]
        front = [(x, end), (0.93 * x, end + 0.04), (0.7 * x, end + 0.085), (0.42 * x, end + 0.105)]
        front += [(zero + 0.1, end + 0.1)]
        posterior, anterior = (_spline(np.array(p).transpose(2, 0, 1)) for p in (back, front))
        return posterior, anterior[:7]


class _Layer:
    """Filled outlines on a canvas that is larger than the image, for smooth edges."""

    def __init__(self, anatomy: _Anatomy) -> None:
        self.size = anatomy.recipe.image_size_px
        self.factor = max(2, 256 // self.size)
        side = self.size * self.factor
        self.image = Image.new("L", (side, side))
        self.pen = ImageDraw.Draw(self.image)
        self.axes, self.origin = anatomy.axes * side, anatomy.origin * side

    def fill(self, outlines: Points, value: int) -> None:
        placed = (outlines - (0, 0.5)) @ self.axes + self.origin
        for outline in placed.reshape(-1, 2 * placed.shape[-2]).tolist():
            self.pen.polygon(outline, fill=value)

    def pixels(self, blur: float) -> Floats:
        """Return the layer, 0 to 1, blurred over a radius given in sides of the image."""
        image = self.image.reduce(self.factor).filter(ImageFilter.BoxBlur(blur * self.size))
        shades = np.array(image, dtype=np.float32)
        shades /= 255
        return shades


def _lungs(a: _Anatomy) -> Floats:
    layer = _Layer(a)
    for side in (-1, 1):
        layer.fill(a.lung(side), 255)
    for outline in a.mediastinum():
        layer.fill(outline, 0)
    return layer.pixels(0.008)


def _thorax(a: _Anatomy, lungs: Floats) -> Floats:
    """Return a healthy chest before exposure, from about 0 (air) to about 1."""
    y = np.linspace(0, 1, len(lungs), dtype=np.float32)[:, None]
    image = _soft_tissue(a)
    image *= 0.93 + 0.03 * y
    image += 0.05
    image -= lungs * (0.38 - 0.12 * np.clip(3 * y - 1.35, 0, 1))
    image += _bones(a) * (0.06 + 0.14 * lungs)
    image += _markings(a) * (0.02 + 0.13 * lungs)
    return image


def _soft_tissue(a: _Anatomy) -> Floats:
    layer = _Layer(a)
    layer.fill(a.body(), 150)
    for outline in a.mediastinum():
        layer.fill(outline, 195)
    layer.fill(a.abdomen(), 208)
    if a.bubble > -0.005:  # air in the stomach, in most patients
        layer.fill(_ellipse(0.18, a.domes[1] + 0.055, 0.06 + a.bubble, 0.02), 175)
    layer.fill(np.array([(-0.055, -0.1), (0.055, -0.1), (0.055, 1.1), (-0.055, 1.1)]), 212)
    airway = [(-0.016, -0.1), (-0.018, 0.33), (-0.06, 0.4), (-0.05, 0.415), (0, 0.372)]
    airway += [(0.06, 0.41), (0.065, 0.395), (0.02, 0.33), (0.014, -0.1)]
    layer.fill(np.array(airway), 172)
    return layer.pixels(0.018)


def _bones(a: _Anatomy) -> Floats:
    layer = _Layer(a)
    scapula = [(0.4, 0.2), (0.345, 0.25), (0.345, 0.36), (0.375, 0.5), (0.4, 0.42), (0.415, 0.3)]
    layer.fill(_spline(scapula, closed=True) * _BOTH, 70)
    layer.fill(_ellipse(0.455, 0.185, 0.04, 0.05) * _BOTH, 150)
    humerus = np.array([(0.46, 0.2), (0.56 - a.arms, 0.42), (0.66 - a.arms, 0.7)])
    layer.fill(_band(humerus, 0.055, 0.055) * _BOTH, 150)
    posterior = a.ribs()[0][:, None]
    layer.fill(_band(posterior, 0.021, 0.027) * _BOTH, 180)
    layer.fill(_band(posterior, 0.011, 0.016) * _BOTH, 115)
    top = np.stack([np.zeros(18), np.cumsum(np.linspace(0.05, 0.064, 18)) - 0.08], axis=1)
    vertebra = [(-0.038, 0), (0.038, 0), (0.035, 0.022), (0.038, 0.044), (-0.038, 0.044)]
    layer.fill(top[:, None] + np.array([*vertebra, (-0.035, 0.022)]), 110)
    pedicle = np.array([(0.024, 0.008), (0.031, 0.018), (0.024, 0.028), (0.017, 0.018)])
    layer.fill(top[:, None, None] + pedicle * _BOTH, 180)
    s = a.clavicle
    clavicle = [(0.035, 0.205), (0.09, 0.182), (0.16, 0.16 - s), (0.25, 0.138 - s)]
    clavicle += [(0.33, 0.118 - 1.5 * s), (0.385, 0.125 - 1.5 * s)]
    layer.fill(_band(_spline(clavicle), 0.036, 0.028) * _BOTH, 255)
    layer.fill(_band(_spline(clavicle), 0.022, 0.014) * _BOTH, 205)
    return layer.pixels(0.005)


def _markings(a: _Anatomy) -> Floats:
    """Return the anterior ribs and, brighter, the vessels that branch from the hila."""
    layer = _Layer(a)
    anterior = a.ribs()[1][:, None]
    layer.fill(_band(anterior, 0.026, 0.03) * _BOTH, 95)
    layer.fill(_band(anterior, 0.014, 0.018) * _BOTH, 65)
    rng, n = a.recipe.rng(_VESSELS), 18
    side = np.repeat([[[-1.0, 1.0]], [[1.0, 1.0]]], n // 2, axis=0)
    angle = np.tile(np.linspace(-1.2, 1.4, n // 2), 2) + rng.uniform(-0.2, 0.2, n)
    start = np.stack([rng.uniform(0.07, 0.1, n), 0.42 + 0.05 * np.sin(angle)], axis=1)
    length, width = rng.uniform(0.18, 0.27, n), 0.013
    for value in (235, 185):
        turns = np.cumsum(rng.uniform(-0.22, 0.22, (len(angle), 8)), axis=1) + angle[:, None]
        strides = np.stack([np.cos(turns), np.sin(turns)], axis=2) * length[:, None, None] / 8
        paths = np.cumsum(np.concatenate([start[:, None], strides], axis=1), axis=1)
        layer.fill(_band(paths, width, 0.3 * width) * side, value)
        fork = rng.choice([-1.0, 1.0], (len(angle), 1)) * rng.uniform(0.4, 0.8, (len(angle), 2))
        start = paths[:, (3, 5)].reshape(-1, 2)
        angle = (turns[:, (3, 5)] + fork * (1, -1)).ravel()
        side, length, width = side.repeat(2, axis=0), 0.55 * length.repeat(2), 0.6 * width
    return layer.pixels(0.004)


def _opacity(a: _Anatomy) -> Floats:
    """Return the density that the disease adds, everywhere."""
    size, rng = a.recipe.image_size_px, a.recipe.rng(_DISEASE)
    if a.recipe.opacity == "none":
        return np.zeros((size, size), dtype=np.float32)
    n = min(size, 32)  # enough: opacities are smooth
    centres = (np.stack(np.meshgrid(np.arange(n), np.arange(n)), axis=2) + 0.5) / n
    points = (centres - a.origin) @ np.linalg.inv(a.axes) + (0, 0.5)
    field = _lobe(points, rng) if a.recipe.opacity == "consolidation" else _patches(points, rng)
    small = Image.fromarray((a.severity * field).astype(np.float32))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def _lobe(points: Points, rng: np.random.Generator) -> Points:
    middle = np.array([0.2 * rng.choice([-1, 1]), rng.choice([0.28, 0.55])])
    middle += rng.uniform(-0.03, 0.03, 2)
    distance = np.linalg.norm((points - middle) / rng.uniform(0.1, 0.15, 2), axis=2)
    lobe: Points = rng.uniform(0.17, 0.32) / (1 + np.exp(8 * (distance - 1)))
    return lobe


def _patches(points: Points, rng: np.random.Generator) -> Points:
    n = len(points)
    clear = np.ones((n, n))
    for i in range(rng.integers(5, 10)):
        y = rng.uniform(0.44, 0.68)
        x = (-1) ** i * 0.37 * rng.uniform(0.5, 0.9)  # in the one lung, then in the other
        squares = ((points - (x, y)) / rng.uniform(0.035, 0.085, 2)) ** 2
        clear *= 1 - rng.uniform(0.4, 0.9) * np.exp(-squares.sum(axis=2) / 2)
    cloud = Image.fromarray(rng.standard_normal((n // 3, n // 3), dtype=np.float32))
    texture = 1 + 0.35 * np.asarray(cloud.resize((n, n), Image.Resampling.BICUBIC))
    patches: Points = rng.uniform(0.08, 0.2) * (1 - clear) * np.clip(texture, 0, 2)
    return patches


def _add_artefacts(image: Floats, recipe: Recipe) -> None:
    """Draw in place what lies on the film and not in the patient: frame and marker."""
    side = len(image)
    frame = round(0.04 * max(recipe.look, 0) * side)
    if frame:
        image[:frame] = image[-frame:] = image[:, :frame] = image[:, -frame:] = 0
    if recipe.marker == "corner":
        left, right, top, bottom = (round(share * side) for share in (0.86, 0.92, 0.06, 0.14))
        stroke = max(2, round(0.02 * side))
        image[top:bottom, left : left + stroke] = 1
        image[bottom - stroke : bottom, left:right] = 1


@lru_cache(maxsize=32)
def _spline_matrix(count: int, closed: bool) -> Points:
    """Return the matrix from control points to four points per span of their Catmull-Rom spline."""
    p = np.eye(count)
    ends = (p[-1:], p[:2]) if closed else (2 * p[:1] - p[1:2], 2 * p[-1:] - p[-2:-1])
    p = np.concatenate([ends[0], p, ends[1]])
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    t = np.linspace(0, 1, 4, endpoint=False)[:, None, None]
    curve = b + (c - a) * t / 2 + (a - 2.5 * b + 2 * c - d / 2) * t**2
    curve = (curve + (3 * (b - c) + d - a) * t**3 / 2).swapaxes(0, 1).reshape(-1, count)
    return curve if closed else np.concatenate([curve, p[-2:-1]])


def _spline(points: ArrayLike, *, closed: bool = False) -> Points:
    controls = np.asarray(points, dtype=np.float64)
    return _spline_matrix(controls.shape[-2], closed) @ controls


def _band(lines: Points, start: float, end: float) -> Points:
    """Return the outlines of strips along lines, from one width to another."""
    differences, widths = _along(lines.shape[-2], start, end)
    along = differences @ lines
    normal = along[..., ::-1] * (1, -1) / np.hypot(along[..., :1], along[..., 1:])
    offset = normal * widths
    return np.concatenate([lines + offset, (lines - offset)[..., ::-1, :]], axis=-2)


@lru_cache(maxsize=32)
def _along(count: int, start: float, end: float) -> tuple[Points, Points]:
    """Return the matrix of ``np.gradient`` along a line of points, and half the widths there."""
    differences: Points = np.gradient(np.eye(count), axis=0)  # type: ignore[assignment]
    return differences, np.linspace(start / 2, end / 2, count)[:, None]


def _ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], axis=1)
