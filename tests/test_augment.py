from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps
from scipy.stats import beta, kstest, norm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as F  # noqa: N812 - its usual name

from chestxray_covid import augment
from chestxray_covid.augment import (
    Augmentation,
    hide_centres,
    mix_up,
    swap_backgrounds,
    swap_frames,
)

#: Everything at once, stronger than the default.
STRONG = Augmentation(
    rotation_deg=20,
    horizontal_flip=0.5,
    crop_min=0.6,
    gamma=2,
    contrast=2,
    brightness=0.3,
    blur=0.5,
    noise=0.1,
    aspect=1.3,
    equalise=0.5,
    resample=0.3,
    hide_border=0.2,
)
#: Largest error of interpolated white noise: neighbours differ by up to 255, and float32 knows
#: coordinates to about 1e-5 of 100 pixels. That of torchvision's own float32 is half of it.
SAMPLED = 4e-3
#: What changes nothing, as arguments to change one of.
NOTHING = Augmentation.none().to_dict()


def only(**option: float) -> Augmentation:
    """Return an augmentation with one option."""
    return Augmentation(**{**NOTHING, **option})


def images(count: int = 4, side: int = 32, seed: int = 0) -> Tensor:
    """Return random pixels, ``(N, 1, S, S)`` uint8."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, 1, side, side), dtype=np.uint8))


def smooth(side: int = 64) -> Tensor:
    """Return a drawing without noise, ``(1, 1, S, S)`` uint8."""
    image = Image.new("L", (side, side), 60)
    draw = ImageDraw.Draw(image)
    draw.ellipse((side // 8, side // 6, side // 2, side - 4), fill=200)
    draw.rectangle((side // 2, side // 3, side - 9, side // 2), fill=130)
    return torch.from_numpy(np.array(image))[None, None]


class Operators(TorchDispatchMode):
    """Write down the operators that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


def vary(augmentation: Augmentation, pixels: Tensor, draws: list[int], **where: int) -> Tensor:
    return augmentation(pixels, **{"seed": 3, "epoch": 5, **where}, draws=draws)


# ---------------------------------------------------------------- what the numbers depend on


def test_a_sample_is_varied_alike_whatever_its_batch() -> None:
    pixels = images(8)
    draws = [11, 7, 300, 0, 4, 5, 6, 12345678901]
    together = vary(STRONG, pixels, draws)
    for i, draw in enumerate(draws):
        assert torch.equal(vary(STRONG, pixels[i : i + 1], [draw])[0], together[i])
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    turned = vary(STRONG, pixels[order], [draws[i] for i in order])
    assert torch.equal(turned, together[order])


@pytest.fixture(params=[3, 8])
def several_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let several threads share every operator on 32768 numbers or more.

    Where the part of one begins then depends on the batch, and so does what is left over from its
    vectors, which some operators compute otherwise.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("several_threads")
@pytest.mark.parametrize(
    "options",
    [
        *({name: value} for name, value in STRONG.to_dict().items() if name != "aspect"),
        {"crop_min": 0.6, "aspect": 1.3},
        {"crop_min": 0.6, "contrast": 2},
        STRONG.to_dict(),
    ],
    ids=str,
)
@pytest.mark.parametrize("side", [33, 150, 225])
def test_each_option_varies_a_sample_alike_whatever_its_batch(
    options: dict[str, float], side: int
) -> None:
    pixels, augmentation = images(9, side), only(**options)
    together = vary(augmentation, pixels, list(range(9)))
    for size in (1, 2, 5):
        for first in range(0, 9, size):
            part = slice(first, first + size)
            assert torch.equal(
                vary(augmentation, pixels[part], list(range(9))[part]), together[part]
            )


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_type_of_numbers_changes_nothing(kind: torch.dtype) -> None:
    expected = vary(STRONG, images(4, 150), [0, 1, 2, 3])
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        found = vary(STRONG, images(4, 150), [0, 1, 2, 3])
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, expected)


def test_neither_global_random_state_nor_earlier_calls_matter() -> None:
    pixels = images()
    torch.manual_seed(1)
    first = vary(STRONG, pixels, [0, 1, 2, 3])
    torch.manual_seed(2)
    vary(STRONG, pixels, [9, 9, 9, 9])
    assert torch.equal(vary(STRONG, pixels, [0, 1, 2, 3]), first)


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    vary(STRONG, images(), [0, 1, 2, 3])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("where", [{"seed": 4}, {"epoch": 6}])
def test_another_seed_or_epoch_varies_otherwise(where: dict[str, int]) -> None:
    pixels = images(1)
    assert not torch.equal(vary(STRONG, pixels, [0], **where), vary(STRONG, pixels, [0]))


def test_each_draw_of_one_image_varies_it_otherwise() -> None:
    varied = vary(STRONG, images(1).repeat(50, 1, 1, 1), list(range(50)))
    assert len({v.numpy().tobytes() for v in varied}) == 50


def test_one_option_leaves_the_numbers_of_the_others_alone() -> None:
    pixels = smooth()
    for draw in range(20):
        alone = vary(only(brightness=0.3), pixels, [draw])
        both = vary(only(brightness=0.3, rotation_deg=1e-6, noise=1e-9), pixels, [draw])
        torch.testing.assert_close(alone, both, atol=0.05, rtol=0)


# ---------------------------------------------------------------- what comes out


def test_no_augmentation_is_the_identity() -> None:
    pixels = images()
    found = vary(Augmentation.none(), pixels, [0, 1, 2, 3])
    assert found.dtype == torch.float32
    assert torch.equal(found, pixels.to(torch.float32))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(32, 65),
    st.sampled_from([STRONG, Augmentation(), only(gamma=10), only(contrast=10), only(noise=0.99)]),
    st.integers(0, 2**40),
)
def test_output_is_float_of_the_same_shape_within_the_grey_scale(
    count: int, side: int, augmentation: Augmentation, draw: int
) -> None:
    pixels = images(count, side)
    before = pixels.clone()
    found = vary(augmentation, pixels, list(range(draw, draw + count)))
    assert (found.shape, found.dtype) == ((count, 1, side, side), torch.float32)
    assert torch.isfinite(found).all()
    assert 0 <= found.min() <= found.max() <= 255
    assert torch.equal(pixels, before), "the caller's pixels stay as they were"


@pytest.mark.parametrize("side", [32, 33, 64, 150])
@pytest.mark.parametrize("angle", [0.1, 7, 20, 45])
def test_rotation_never_fills_corners_with_black(side: int, angle: float) -> None:
    white = torch.full((1, 1, side, side), 255, dtype=torch.uint8)
    found = vary(only(rotation_deg=angle), white.expand(10, -1, -1, -1), list(range(10)))
    assert found.min() > 254.9


def test_crops_of_a_white_image_are_white() -> None:
    white = torch.full((20, 1, 64, 64), 255, dtype=torch.uint8)
    found = vary(only(crop_min=0.3, rotation_deg=45), white, list(range(20)))
    assert found.min() > 254.9


# ---------------------------------------------------------------- each option against torchvision


def drawn(draw: int, *, seed: int = 3, epoch: int = 5) -> dict[str, float]:
    """Return the numbers of a draw; another order would change every run of a seed."""
    rng = np.random.default_rng([seed, epoch, 2, draw])
    numbers: dict[str, float] = {}
    numbers["flip"], numbers["blur"] = rng.random(), rng.random()
    numbers["sigma"], numbers["angle"] = rng.uniform(0.3, 1.2), rng.uniform(-1, 1)
    numbers["side"], numbers["across"], numbers["down"] = (rng.random() for _ in range(3))
    numbers["gamma"], numbers["contrast"], numbers["shift"] = rng.uniform(-1, 1, 3)
    numbers["noise"], numbers["aspect"] = rng.random(), rng.uniform(-1, 1)
    for name in ("equalise", "mixed", "reduced", "scale", "covered", "grey"):
        numbers[name] = rng.random()
    for name in ("left", "top", "right", "bottom"):
        numbers[name] = rng.random()
    return numbers


@pytest.mark.parametrize("draw", range(5))
def test_flips_are_torchvisions(draw: int) -> None:
    found = vary(only(horizontal_flip=0.5), images(1), [draw])[0]
    expected = images(1)[0].float()
    if drawn(draw)["flip"] < 0.5:
        expected = F.horizontal_flip(expected)
    assert torch.equal(found, expected)


def test_crops_of_the_whole_leave_an_image_as_it_is() -> None:
    found = vary(only(crop_min=0.99), images(8), list(range(8)))
    assert torch.equal(found, images(8).float())


@pytest.mark.parametrize("draw", range(8))
def test_a_rotation_and_a_crop_together_are_one_after_the_other(draw: int) -> None:
    pixels, numbers = F.gaussian_blur(smooth(96), [15, 15], [4.0, 4.0]), drawn(draw)
    found = vary(
        only(rotation_deg=20, crop_min=0.6, aspect=1.3, horizontal_flip=0.5), pixels, [draw]
    )[0]
    expected = pixels[0].double()
    if numbers["flip"] < 0.5:
        expected = expected.flip(-1)
    expected = F.rotate(
        F.pad(expected, [40], padding_mode="edge"),
        20 * numbers["angle"],
        interpolation=F.InterpolationMode.BILINEAR,
    )[:, 40:-40, 40:-40]
    side, stretch = 96 * (0.6 + 0.4 * numbers["side"]), 1.3 ** (numbers["aspect"] / 2)
    width, height = min(96, round(side * stretch)), min(96, round(side / stretch))
    top, left = round(numbers["down"] * (96 - height)), round(numbers["across"] * (96 - width))
    expected = F.resized_crop(expected, top, left, height, width, [96, 96], antialias=True)
    # Interpolating twice blurs; a pixel off moves edges by 10.
    torch.testing.assert_close(found.double(), expected, atol=1.5, rtol=0)


@pytest.mark.parametrize("draw", range(5))
def test_rotations_are_torchvisions_away_from_the_border(draw: int) -> None:
    pixels = smooth(65)
    found = vary(only(rotation_deg=30), pixels, [draw])[0]
    angle = 30 * drawn(draw)["angle"]
    expected = F.rotate(pixels[0].float(), angle, interpolation=F.InterpolationMode.BILINEAR)
    inner = slice(12, -12)
    difference = (found - expected)[:, inner, inner].abs()
    assert difference.max() < 1e-2


@pytest.mark.parametrize("draw", range(5))
def test_crops_are_torchvisions(draw: int) -> None:
    pixels, numbers = images(1, 100), drawn(draw)
    found = vary(only(crop_min=0.5), pixels, [draw])[0]
    width = round(100 * (0.5 + 0.5 * numbers["side"]))
    top, left = (round(numbers[n] * (100 - width)) for n in ("down", "across"))
    part = pixels[0, :, top : top + width, left : left + width].double()
    expected = F.resize(part, [100, 100], antialias=True)
    torch.testing.assert_close(found.double(), expected, atol=SAMPLED, rtol=0)


@pytest.mark.parametrize("draw", range(5))
def test_crops_change_their_aspect_by_at_most_the_factor(draw: int) -> None:
    pixels, numbers = images(1, 100), drawn(draw)
    found = vary(only(crop_min=0.5, aspect=1.5), pixels, [draw])[0]
    side, stretch = 100 * (0.5 + 0.5 * numbers["side"]), 1.5 ** (numbers["aspect"] / 2)
    width, height = min(100, round(side * stretch)), min(100, round(side / stretch))
    top, left = round(numbers["down"] * (100 - height)), round(numbers["across"] * (100 - width))
    part = pixels[0, :, top : top + height, left : left + width].double()
    expected = F.resize(part, [100, 100], antialias=True)
    torch.testing.assert_close(found.double(), expected, atol=SAMPLED, rtol=0)


@pytest.mark.parametrize("draw", range(8))
def test_equalisation_mixes_in_that_of_pillow(draw: int) -> None:
    pixels, numbers = smooth(), drawn(draw)
    found = vary(only(equalise=0.5), pixels, [draw])[0, 0].numpy()
    plain = pixels[0, 0].numpy()
    flat = np.asarray(ImageOps.equalize(Image.fromarray(plain)), np.float32)
    share = numbers["mixed"] if numbers["equalise"] < 0.5 else 0
    np.testing.assert_allclose(found, plain + share * (flat - plain), atol=1e-3)


@pytest.mark.parametrize("grey", [3, 100, 255])
def test_what_is_flat_stays_flat_when_it_is_turned_and_equalised(grey: int) -> None:
    flat = torch.full((20, 1, 65, 65), grey, dtype=torch.uint8)
    found = vary(only(rotation_deg=20, crop_min=0.6, equalise=1), flat, list(range(20)))
    torch.testing.assert_close(found, flat.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("draw", range(6))
def test_half_of_the_images_lose_resolution(draw: int) -> None:
    pixels, numbers = images(1, 64), drawn(draw)
    found = vary(only(resample=0.25), pixels, [draw])[0]
    expected = pixels[0].float()
    if numbers["reduced"] < 0.5:
        small = round(64 * (0.25 + 0.75 * numbers["scale"]))
        expected = F.resize(F.resize(expected, [small, small], antialias=True), [64, 64])
    torch.testing.assert_close(found, expected.clamp(0, 255), atol=1e-3, rtol=0)


@pytest.mark.parametrize("draw", range(6))
def test_borders_are_hidden_under_one_grey_level(draw: int) -> None:
    pixels, numbers = images(1, 100), drawn(draw)
    found = vary(only(hide_border=0.3), pixels, [draw])[0, 0].numpy()
    expected = pixels[0, 0].numpy().astype(np.float32)
    if numbers["covered"] < 0.5:
        grey = np.float32(255 * numbers["grey"])
        left, top, right, bottom = (
            round(30 * numbers[n]) for n in ("left", "top", "right", "bottom")
        )
        expected[:top], expected[100 - bottom :] = grey, grey
        expected[:, :left], expected[:, 100 - right :] = grey, grey
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("draw", range(5))
def test_gamma_is_torchvisions(draw: int) -> None:
    pixels = images(1)
    found = vary(only(gamma=2), pixels, [draw])[0]
    expected = 255 * F.adjust_gamma(pixels[0] / 255, 2 ** drawn(draw)["gamma"])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("draw", range(5))
def test_contrast_is_torchvisions(draw: int) -> None:
    pixels = images(1)
    found = vary(only(contrast=2), pixels, [draw])[0]
    expected = 255 * F.adjust_contrast(pixels[0] / 255, 2 ** drawn(draw)["contrast"])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("draw", range(5))
def test_brightness_shifts_the_grey_level(draw: int) -> None:
    pixels = images(1)
    found = vary(only(brightness=0.2), pixels, [draw])[0]
    expected = (pixels[0] + 255 * 0.2 * drawn(draw)["shift"]).clamp(0, 255)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("draw", range(5))
def test_blur_is_torchvisions(draw: int) -> None:
    pixels, numbers = images(1), drawn(draw)
    found = vary(only(blur=0.5), pixels, [draw])[0]
    expected = pixels[0].float()
    if numbers["blur"] < 0.5:
        expected = F.gaussian_blur(expected, [5, 5], [numbers["sigma"]] * 2)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_noise_is_gaussian_and_of_at_most_the_given_strength() -> None:
    grey = torch.full((200, 1, 64, 64), 128, dtype=torch.uint8)
    difference = (vary(only(noise=0.05), grey, list(range(200))) - 128).flatten(1).double()
    deviations = difference.std(dim=1)
    assert deviations.max() < 255 * 0.05 * 1.05
    # Uniform strengths: half the largest on average, and a kurtosis of 3 for each image.
    assert deviations.mean().item() == pytest.approx(255 * 0.05 / 2, rel=0.1)
    assert difference.mean().abs() < 0.1
    kurtosis = ((difference / deviations[:, None]) ** 4).mean(dim=1)
    assert kurtosis.median().item() == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("draw", range(3))
def test_noise_is_a_hash_of_pixel_and_seed(draw: int) -> None:
    grey = torch.full((1, 1, 40, 40), 128, dtype=torch.uint8)
    found = (vary(only(noise=0.05), grey, [draw]) - 128).flatten().numpy()
    rng = np.random.default_rng([3, 5, 2, draw])
    strength = 255 * 0.05 * rng.random(22)[10]
    seed = rng.integers(2**32, dtype=np.uint32)

    def lowbias32(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
        return x ^ (x >> 16)

    bits = lowbias32(lowbias32(np.arange(1600, dtype=np.uint32)) ^ seed)
    # Signed, as two's complement; the lowest of 25 bits is 1.
    fraction = (bits.view(np.int32) >> 7 | 1) / 2**24
    np.testing.assert_allclose(found, strength * norm.ppf((1 + fraction) / 2), atol=1e-4)


def test_noise_of_neighbours_and_of_samples_is_uncorrelated() -> None:
    grey = torch.full((60, 1, 64, 64), 128, dtype=torch.uint8)
    noise = (vary(only(noise=0.05), grey, list(range(60))) - 128)[:, 0].double()
    noise = (noise - noise.mean((1, 2), keepdim=True)) / noise.std((1, 2), keepdim=True)
    five_deviations = 5 / math.sqrt(noise.numel())
    for down, across in ((0, 1), (1, 0), (1, 1), (0, 2), (0, 32), (32, 0)):
        neighbour = noise.roll((down, across), (1, 2))
        assert (noise * neighbour).mean().abs() < five_deviations
        assert (noise.abs() * neighbour.abs()).mean().sub(2 / math.pi).abs() < five_deviations
    between = (noise.flatten(1) @ noise.flatten(1).T / 64**2).fill_diagonal_(0)
    assert between.abs().max() < 5 / 64
    assert between.std() == pytest.approx(1 / 64, rel=0.1)


@pytest.mark.parametrize("probability", [0, 0.4, 1])
def test_as_many_images_are_mirrored_as_asked(probability: float) -> None:
    ramp = torch.arange(32, dtype=torch.uint8).expand(1, 1, 32, 32)
    count = 2000
    found = vary(
        only(horizontal_flip=probability, brightness=1e-6),
        ramp.expand(count, -1, -1, -1),
        list(range(count)),
    )
    share = (found[:, 0, 0, 0] > found[:, 0, 0, -1]).double().mean().item()
    four_deviations = 4 * math.sqrt(probability * (1 - probability) / count)
    assert abs(share - probability) <= four_deviations


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("rotation_deg", v) for v in (-1, 45.1, math.nan, math.inf)),
        *(("horizontal_flip", v) for v in (-0.1, 1.1, math.nan)),
        *(("crop_min", v) for v in (0, 0.04, 1.01, math.nan)),
        *(("gamma", v) for v in (0.9, 11, math.nan)),
        *(("contrast", v) for v in (0.9, 11, math.nan)),
        *(("brightness", v) for v in (-0.1, 1, math.nan)),
        *(("blur", v) for v in (-0.1, 1.1, math.nan)),
        *(("noise", v) for v in (-0.1, 1, math.nan)),
        *(("aspect", v) for v in (0.9, 2.1, math.nan)),
        *(("equalise", v) for v in (-0.1, 1.1, math.nan)),
        *(("resample", v) for v in (0.05, 1.1, math.nan)),
        *(("hide_border", v) for v in (-0.1, 0.46, math.nan)),
    ],
)
def test_an_option_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be in \[.*\], got {value}"):
        Augmentation(**{name: value})


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("value", ["1", None, True, [1]])
def test_an_option_that_is_no_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a number, got"):
        Augmentation(**{name: value})


def test_numbers_of_numpy_become_pythons_own() -> None:
    options = Augmentation(blur=np.float32(0.25), gamma=np.int64(2))
    assert options == Augmentation(blur=0.25, gamma=2)
    assert [type(options.blur), type(options.gamma)] == [float, int]


def test_a_side_of_a_crop_is_as_short_as_the_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[float] = []
    place = augment.place

    def noted(images: Tensor, *where: Tensor) -> Tensor:
        sides.extend(torch.cat(where[-2:]).flatten().tolist())
        return place(images, *where)

    monkeypatch.setattr(augment, "place", noted)
    options = replace(Augmentation.none(), crop_min=0.8, aspect=2.0)
    options(torch.zeros((200, 1, 100, 100)), seed=0, epoch=0, draws=range(200))
    assert 100 * 0.8 / 2**0.5 - 0.5 <= min(sides) < 60


def test_options_become_data_and_come_back() -> None:
    assert Augmentation(**STRONG.to_dict()) == STRONG
    assert set(NOTHING) == set(STRONG.to_dict())


def test_as_many_draws_as_images_are_needed() -> None:
    with pytest.raises(ValueError, match="as many as the 3 images, got 2"):
        vary(STRONG, images(3), [0, 1])


# ---------------------------------------------------------------- work for the device

RUNS: dict[str, Callable[[Tensor, Tensor, dict[str, Any]], Any]] = {
    "strong": lambda varied, plain, stream: STRONG(plain, **stream),
    "default": lambda varied, plain, stream: Augmentation()(plain, **stream),
    "centres": lambda varied, plain, stream: hide_centres(varied, plain, 0.5, **stream),
    "frames": lambda varied, plain, stream: swap_frames(varied, 0.5, **stream),
    "blends": lambda varied, plain, stream: mix_up(varied, 0.4, **stream),
    "backgrounds": lambda varied, plain, stream: swap_backgrounds(
        varied, lungs_of(len(varied), 40), 0.5, **stream
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_larger_batch_takes_no_more_operators_and_none_waits_for_the_device(name: str) -> None:
    counts = []
    for size in (8, 16):
        plain = images(size, 40)
        varied, stream = plain.float(), {"seed": 3, "epoch": 5, "draws": range(size)}
        with Operators() as operators:
            RUNS[name](varied, plain, stream)
        counts.append(operators.names)
        # What would make the CPU wait for a number, or for the size of a result.
        waiting = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal"}
        assert not {n.removeprefix("aten::") for n in operators.names} & waiting
    assert counts[0] == counts[1]
    assert counts[0].total() < 300


def test_the_operators_that_are_counted_are_those_that_run() -> None:
    with Operators() as operators:
        pixels = images(2).float()
        float(pixels[pixels > 3].mean())
    assert {"aten::_local_scalar_dense", "aten::index"} <= set(operators.names)


# ---------------------------------------------------------------- hidden centres


def test_the_asked_share_of_centres_is_hidden_and_the_frame_stays() -> None:
    plain, varied = images(400, 40), images(400, 40, seed=1).float()
    before = varied.clone()
    found, hidden = hide_centres(varied, plain, 0.25, seed=1, epoch=2, draws=range(400))
    assert torch.equal(varied, before), "the caller's pixels stay as they were"
    deviation = math.sqrt(0.25 * 0.75 / 400)
    assert hidden.double().mean().item() == pytest.approx(0.25, abs=4 * deviation)
    assert torch.equal(found[~hidden], varied[~hidden])
    own_mean = from_plain = 0
    for shown, *both in zip(found[hidden], plain[hidden].float(), varied[hidden], strict=True):
        frames = [b for b in both if torch.equal(shown[0, 0], b[0, 0])]
        assert len(frames) == 1, "the frame is that of the image, before or after augmentation"
        from_plain += torch.equal(frames[0], both[0])
        changed = (shown != frames[0])[0]
        grey = shown[0, 20, 20].item()
        assert (shown[0][changed] == grey).all()
        rows = changed.any(1).nonzero()
        side = int(rows[-1] - rows[0]) + 1
        assert 0.5 * 40 - 2 <= side <= 0.95 * 40 + 2
        assert int(rows[0]) == 39 - int(rows[-1]), "in the middle"
        own_mean += abs(grey - frames[0].mean().item()) < 1e-3
    assert own_mean / int(hidden.sum()) == pytest.approx(1 / 2, abs=0.2)
    assert from_plain / int(hidden.sum()) == pytest.approx(2 / 3, abs=0.2)


@pytest.mark.usefixtures("several_threads")
@pytest.mark.parametrize("side", [33, 225])
def test_a_centre_is_hidden_alike_whatever_its_batch(side: int) -> None:
    plain, varied = images(30, side) / 3, images(30, side, seed=1) / 3
    found, hidden = hide_centres(varied, plain, 0.5, seed=1, epoch=2, draws=range(30))
    for i in range(30):
        own = slice(i, i + 1)
        alone, flag = hide_centres(varied[own], plain[own], 0.5, seed=1, epoch=2, draws=[i])
        assert torch.equal(alone[0], found[i])
        assert flag[0] == hidden[i]


def test_no_share_hides_nothing() -> None:
    pixels = images().float()
    found, hidden = hide_centres(pixels, pixels, 0, seed=1, epoch=2, draws=range(4))
    assert torch.equal(found, pixels)
    assert not hidden.any()


# ---------------------------------------------------------------- swapped frames


def test_the_asked_share_gets_the_frame_of_its_neighbour_and_keeps_its_centre() -> None:
    pixels = images(400, 40).float()
    before = pixels.clone()
    found = swap_frames(pixels, 0.5, seed=1, epoch=2, draws=range(400))
    assert torch.equal(pixels, before), "the caller's pixels stay as they were"
    swapped = 0
    for i in range(400):
        own, other = found[i] == pixels[i], found[i] == pixels[i - 1]
        assert (own | other).all()
        assert own[:, 8:-8, 8:-8].all(), "20 % of the side at most"
        if not own.all():
            swapped += 1
            assert other[:, 0].all()
            assert other[:, -1].all()
            assert other[..., 0].all()
            assert other[..., -1].all()
    assert swapped / 400 == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 400))


def test_frames_are_swapped_alike_each_time_and_not_at_all_without_a_share() -> None:
    pixels = images(30).float()
    found = swap_frames(pixels, 0.5, seed=1, epoch=2, draws=range(30))
    assert torch.equal(found, swap_frames(pixels, 0.5, seed=1, epoch=2, draws=range(30)))
    assert not torch.equal(found, swap_frames(pixels, 0.5, seed=1, epoch=3, draws=range(30)))
    assert torch.equal(pixels, swap_frames(pixels, 0, seed=1, epoch=2, draws=range(30)))


def test_images_are_blended_with_their_neighbour_in_shares_of_a_beta_distribution() -> None:
    pixels = images(400, 8).float()
    before = pixels.clone()
    found, own = mix_up(pixels, 0.4, seed=1, epoch=2, draws=range(400))
    assert torch.equal(pixels, before), "the caller's pixels stay as they were"
    assert own.dtype == torch.float32
    blended = own[:, None, None, None] * pixels + (1 - own[:, None, None, None]) * pixels.roll(1, 0)
    assert found.numpy() == pytest.approx(blended.numpy(), abs=1e-3)
    assert kstest(own.numpy(), beta(0.4, 0.4).cdf).pvalue > 0.01


def test_blends_are_alike_each_time_and_none_without_a_share() -> None:
    pixels = images(30).float()
    stream = {"seed": 1, "draws": range(30)}
    first, second, later = (mix_up(pixels, 0.4, epoch=n, **stream) for n in (2, 2, 3))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not torch.equal(first[1], later[1])
    whole, own = mix_up(pixels, 0, seed=1, epoch=2, draws=range(30))
    assert torch.equal(whole, pixels)
    assert (own == 1).all()


@pytest.mark.usefixtures("several_threads")
@pytest.mark.parametrize("side", [33, 225])
def test_frames_backgrounds_and_blends_depend_on_no_more_than_the_neighbour(side: int) -> None:
    pixels, lungs = images(12, side) / 3, lungs_of(12, side)
    stream = {"seed": 1, "epoch": 2}
    frames = swap_frames(pixels, 0.5, **stream, draws=range(12))
    backgrounds = swap_backgrounds(pixels, lungs, 0.8, **stream, draws=range(12))
    blends, own = mix_up(pixels, 0.4, **stream, draws=range(12))
    for i in range(1, 12):
        pair = slice(i - 1, i + 1)
        alone = swap_frames(pixels[pair], 0.5, **stream, draws=[i - 1, i])
        assert torch.equal(alone[1], frames[i])
        alone = swap_backgrounds(pixels[pair], lungs[pair], 0.8, **stream, draws=[i - 1, i])
        assert torch.equal(alone[1], backgrounds[i])
        alone, shares = mix_up(pixels[pair], 0.4, **stream, draws=[i - 1, i])
        assert torch.equal(alone[1], blends[i])
        assert shares[1] == own[i]


def lungs_of(count: int, side: int) -> Tensor:
    """Return masks with two lungs of 1, an edge of 0.5 and nothing around."""
    masks = torch.zeros(count, 1, side, side)
    for left in (side // 8, side * 5 // 8):
        masks[..., side // 4 : side * 3 // 4, left : left + side // 4] = 0.5
        masks[..., side // 4 + 1 : side * 3 // 4 - 1, left + 1 : left + side // 4 - 1] = 1
    return masks


def test_the_asked_share_of_lungs_is_shown_before_something_else() -> None:
    pixels, lungs = images(400, 40).float(), lungs_of(400, 40)
    before = pixels.clone()
    found = swap_backgrounds(pixels, lungs, 0.5, seed=1, epoch=2, draws=range(400))
    assert torch.equal(pixels, before), "the caller's pixels stay as they were"
    inside, around = lungs[0] == 1, lungs[0] == 0
    kinds: Counter[str] = Counter()
    for i in range(400):
        assert torch.equal(found[i][inside], pixels[i][inside])
        if torch.equal(found[i], pixels[i]):
            kinds["own"] += 1
            continue
        other = pixels[i - 1] if torch.equal(found[i][around], pixels[i - 1][around]) else None
        grey = found[i][around][0]
        if other is None:
            assert (found[i][around] == grey).all()
            assert 0 <= grey <= 255
            other = torch.full_like(pixels[i], float(grey))
            kinds["mean" if abs(grey - pixels[i].mean()) < 1e-3 else "grey"] += 1
        else:
            kinds["other"] += 1
        edge = lungs[i] == 0.5
        torch.testing.assert_close(found[i][edge], ((pixels[i] + other) / 2)[edge])
    for kind, expected in {"own": 1 / 2, "other": 1 / 4, "mean": 1 / 8, "grey": 1 / 8}.items():
        deviation = math.sqrt(expected * (1 - expected) / 400)
        assert kinds[kind] / 400 == pytest.approx(expected, abs=4 * deviation), kind


def test_backgrounds_are_the_same_each_time_and_stay_where_no_lung_was_found() -> None:
    pixels, lungs = images(30).float(), lungs_of(30, 32)
    found = swap_backgrounds(pixels, lungs, 0.5, seed=1, epoch=2, draws=range(30))
    again = swap_backgrounds(pixels, lungs, 0.5, seed=1, epoch=2, draws=range(30))
    other = swap_backgrounds(pixels, lungs, 0.5, seed=1, epoch=3, draws=range(30))
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    specks = torch.zeros_like(pixels)
    specks[..., :8, :8] = 1  # a sixteenth of the image
    kept = swap_backgrounds(pixels, specks, 0.99, seed=1, epoch=2, draws=range(30))
    assert torch.equal(kept, pixels)
