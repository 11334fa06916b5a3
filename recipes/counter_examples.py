"""What a gate must learn to refuse: photographs, drawings, text and noise, made or found here.

Photographs come inside Python packages: scikit-learn and matplotlib have a few, scikit-image more
(``pip install scikit-image``; its own loader is not needed). Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

#: Package → folder and files of it that are photographs of the world.
PHOTOGRAPHS = {
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "matplotlib": ("mpl-data/sample_data", ("grace_hopper.jpg",)),
    "skimage": (
        "data",
        (
            *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png"),
            *("coins.png", "grass.png", "gravel.png", "motorcycle_left.png", "rocket.jpg"),
        ),
    ),
}
#: Kinds of picture that no gate is fitted on, to measure what it makes of the unknown.
UNSEEN = {
    "skimage": (
        "data",
        (
            *("cell.png", "hubble_deep_field.jpg", "ihc.png", "microaneurysms.png", "moon.png"),
            *("page.png", "retina.jpg", "clock_motion.png", "horse.png", "phantom.png"),
        ),
    ),
}
WORDS = (
    *("the", "patient", "was", "admitted", "with", "fever", "cough", "normal", "saturation"),
    *("on", "room", "air", "no", "focal", "consolidation", "heart", "size", "within", "limits"),
)


def find(pictures: dict[str, tuple[str, tuple[str, ...]]]) -> dict[str, Path]:
    """Return name → file of pictures inside packages.

    Raises:
        SystemExit: If one is not there: a gate that was fitted without it would not show that.
    """
    found = {}
    for package, (folder, names) in pictures.items():
        spec = importlib.util.find_spec(package)
        place = Path(spec.origin).parent / folder if spec and spec.origin else None
        lacking = [name for name in names if place is None or not (place / name).is_file()]
        if place is None or lacking:
            raise SystemExit(
                f"{package} lacks {', '.join(lacking)}, which a gate is fitted on or measured "
                "with. Install what has them: pip install --upgrade scikit-image"
            )
        found.update({name: place / name for name in names})
    return found


def crops(image: Image.Image, count: int, rng: np.random.Generator) -> Iterator[Image.Image]:
    """Yield random parts of a picture, from a third of its sides to all, every other mirrored."""
    width, height = image.size
    for index in range(count):
        share = rng.uniform(0.35, 1, 2)
        left, upper = (1 - share) * rng.random(2)
        box = (left * width, upper * height, (left + share[0]) * width, (upper + share[1]) * height)
        part = image.crop(tuple(round(edge) for edge in box))
        yield part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if index % 2 else part


def noise(rng: np.random.Generator, size_px: int) -> Image.Image:
    """Return noise: fine or coarse, even or normal, over all grey levels or few."""
    side = int(rng.choice([size_px, size_px // 4, size_px // 16, 6]))
    centre, spread = rng.uniform(60, 200), rng.uniform(15, 90)
    values = (
        rng.normal(centre, spread, (side, side))
        if rng.random() < 0.7
        else rng.choice([0, 255], (side, side))
    )
    grain = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    return grain.resize((size_px, size_px), Image.Resampling.BICUBIC)


def clouds(rng: np.random.Generator, size_px: int) -> Image.Image:
    """Return smooth noise, whose amplitudes fall with a random power of the frequency."""
    down, across = np.fft.fftfreq(size_px), np.fft.rfftfreq(size_px)
    frequency = np.hypot(down[:, None], across)
    frequency[0, 0] = 1
    waves = rng.normal(size=(2, *frequency.shape)) / frequency ** rng.uniform(1, 3.5)
    field = np.fft.irfft2(waves[0] + 1j * waves[1], s=(size_px, size_px))
    values = rng.uniform(70, 180) + rng.uniform(20, 70) * (field - field.mean()) / field.std()
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def shapes(rng: np.random.Generator, size_px: int) -> Image.Image:
    """Return random ellipses, boxes and lines, sometimes blurred."""
    image = Image.new("L", (size_px, size_px), int(rng.integers(256)))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 25))):
        x0, x1 = np.sort(rng.uniform(-0.2, 1.2, 2) * size_px)
        y0, y1 = np.sort(rng.uniform(-0.2, 1.2, 2) * size_px)
        make = (draw.ellipse, draw.rectangle, draw.line)[int(rng.integers(3))]
        make((x0, y0, x1, y1), fill=int(rng.integers(256)))
    return image.filter(ImageFilter.GaussianBlur(float(rng.choice([0, 0, 2, 6]))))


def text(rng: np.random.Generator, size_px: int) -> Image.Image:
    """Return a page of text, dark on bright or bright on dark."""
    paper = int(rng.integers(200, 256))
    image = Image.new("L", (size_px, size_px), paper)
    draw = ImageDraw.Draw(image)
    height = float(rng.uniform(7, 24))
    font = ImageFont.load_default(height)
    margin = rng.uniform(0.02, 0.15) * size_px
    for y in np.arange(margin, size_px - margin, height * rng.uniform(1.1, 1.8)):
        if rng.random() < 0.9:
            line = " ".join(rng.choice(WORDS, int(rng.integers(2, 14))))
            draw.text((margin, y), line, fill=int(rng.integers(80)), font=font)
    return image.point(lambda grey: 255 - grey) if rng.random() < 0.3 else image


def waves(rng: np.random.Generator, size_px: int) -> Image.Image:
    """Return a gradient, stripes or rings; no gate is fitted on them."""
    y, x = np.mgrid[0 : 1 : size_px * 1j, 0 : 1 : size_px * 1j]
    turn = rng.uniform(0, 2 * np.pi)
    ramp = x * np.cos(turn) + y * np.sin(turn)
    rings = np.hypot(x - rng.random(), y - rng.random())
    phase = (ramp if rng.random() < 0.6 else rings) * rng.choice([1, 2, 6, 20])
    values = 127 + 120 * np.sin(2 * np.pi * phase)
    return Image.fromarray(values.astype(np.uint8))


#: What is drawn for fitting and, from other seeds, for measuring.
DRAWN: dict[str, Callable[[np.random.Generator, int], Image.Image]] = {
    "noise": noise,
    "clouds": clouds,
    "shapes": shapes,
    "text": text,
}
