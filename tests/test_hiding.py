from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import Delaunay

from chestxray_covid import SyntheticChestXray
from chestxray_covid.datasets.phantom import phantom_mask
from chestxray_covid.hiding import border, centre, corners, hidden, lung_region


def test_what_is_hidden_gets_the_mean_of_what_is_left_and_says_nothing() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 20, 20)).astype(np.uint8)
    region = centre(20, 0.5)
    found = hidden(pixels, region)
    assert found.shape == pixels.shape
    assert np.array_equal(found[:, ~region], pixels[:, ~region])
    assert set(found[:, region].ravel()) == {round(pixels[:, ~region].mean())}
    other = pixels.copy()
    other[:, region] = 255 - other[:, region]
    assert np.array_equal(hidden(other, region), found)
    assert not hidden(pixels, np.ones((20, 20), bool)).any()


@pytest.mark.parametrize("size", [32, 65, 224])
def test_centre_border_and_corners_have_the_size_that_they_say(size: int) -> None:
    for share in (0.7, 0.9):
        region = centre(size, share)
        assert np.sqrt(region.mean()) == pytest.approx(share, abs=1.5 / size)
        assert np.array_equal(region, region[::-1, ::-1])
    strip = border(size)
    assert strip[0].all()
    assert strip[:, -1].all()
    assert np.sqrt(1 - strip.mean()) == pytest.approx(0.8, abs=1.5 / size)
    squares = corners(size)
    assert squares.mean() == pytest.approx(4 * 0.2**2, abs=3 / size)
    assert squares[[0, 0, -1, -1], [0, -1, 0, -1]].all()
    assert not squares[size // 2].any()


def test_the_region_of_the_lungs_is_their_convex_hull_and_a_margin() -> None:
    sample = SyntheticChestXray(2, image_size_px=128).samples[1]
    mask = phantom_mask(sample)
    region = lung_region(mask, 64)
    assert region is not None
    small = mask.reshape(64, 2, 64, 2).mean((1, 3)) > 0.5
    assert region[small].all()
    hull = Delaunay(np.argwhere(small))
    inside = hull.find_simplex(np.argwhere(np.ones((64, 64), bool))).reshape(64, 64) >= 0
    assert region[inside].mean() > 0.99
    grown = np.zeros_like(inside)  # by the margin of 2 pixels and one of rounding
    for dy in range(-3, 4):
        for dx in range(-3, 4):
            grown |= np.roll(inside, (dy, dx), (0, 1))
    assert not region[~grown].any()


def test_where_no_lung_is_there_is_no_region() -> None:
    empty = np.zeros((50, 40), bool)
    assert lung_region(empty, 64) is None
    speck = empty.copy()
    speck[20:23, 20:23] = True
    assert lung_region(speck, 64) is None
    line = np.zeros((200, 200), bool)
    line[100:104] = True  # wide enough, but without a second dimension at 64 px
    assert lung_region(line, 50) is None


def test_where_nothing_is_outside_there_is_no_region() -> None:
    mask = phantom_mask(SyntheticChestXray(2, image_size_px=128).samples[1])
    assert lung_region(mask, 64) is not None
    assert lung_region(~mask, 64) is None
    assert lung_region(np.ones((50, 40), bool), 64) is None
