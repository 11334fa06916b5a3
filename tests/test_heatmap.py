from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from chestxray_covid import Heatmap


def heatmap(grid: object, size: tuple[int, int] = (60, 40), grey: int = 100) -> Heatmap:
    return Heatmap(
        image=Image.new("L", size, grey),
        grid=np.asarray(grid, np.float32),
        target="covid19",
        probability=0.9,
        method="grad_cam",
        source="x.png",
    )


def test_values_are_the_grid_enlarged_to_the_image_with_1_at_the_hottest_place() -> None:
    values = heatmap([[0, 0, 0], [0, 0, 5]]).values
    assert values.shape == (40, 60)
    assert values.dtype == np.float32
    assert values.max() == 1
    assert values.min() == 0
    # Halfway between the centres of two cells, bilinear interpolation is their mean.
    assert values[-1, 40] == pytest.approx(0.5, abs=0.03)
    assert values[-1, 50:].min() == 1


def test_without_heat_all_values_are_0_and_the_overlay_is_the_radiograph() -> None:
    cold = heatmap(np.zeros((3, 3)))
    assert not cold.values.any()
    assert (np.asarray(cold.overlay()) == 100).all()
    assert np.isnan(cold.share_inside(np.ones((40, 60), bool)))


def test_the_overlay_colours_the_heat_and_leaves_the_rest() -> None:
    overlay = heatmap([[0, 0, 0], [0, 0, 5]]).overlay()
    assert overlay.mode == "RGB"
    assert overlay.size == (60, 40)
    pixels = np.asarray(overlay).astype(int)
    assert (pixels[0, 0] == 100).all()
    red, green, blue = pixels[-1, -1]
    assert red > 150 > blue
    assert red > green > 110  # the hottest colour is orange
    assert (np.asarray(heatmap([[1, 1]]).overlay(opacity=0)) == 100).all()


def test_brighter_means_hotter_for_readers_who_see_no_colour() -> None:
    ramp = np.asarray(heatmap([np.linspace(0, 1, 60)], grey=0).overlay(opacity=1).convert("L"))
    assert (np.diff(ramp[0].astype(int)) >= 0).all()


@pytest.mark.parametrize("grey", [0, 60, 120, 180, 230, 255])
def test_the_hottest_place_differs_most_from_the_radiograph_below(grey: int) -> None:
    ramp = np.asarray(heatmap([np.linspace(0, 1, 60)], grey=grey).overlay(), dtype=float)
    far = np.linalg.norm(ramp[0] - grey, axis=-1)
    assert far[-1] > 100
    assert far[-1] > far.max() - 2


def test_a_saved_heatmap_is_its_overlay(tmp_path: Path) -> None:
    one = heatmap([[0, 1], [2, 3]])
    path = one.save(tmp_path / "new" / "heat.png", opacity=0.3)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert np.array_equal(
            np.asarray(image), np.asarray(one.overlay(opacity=cast(float, Decimal("0.3"))))
        )
    assert [p.name for p in path.parent.iterdir()] == ["heat.png"]


def test_heatmaps_are_saved_as_png_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"saved as \.png, got 'heat\.jpg'"):
        heatmap([[1]]).save(tmp_path / "heat.jpg")


@pytest.mark.parametrize("opacity", [-0.1, 1.1, float("nan")])
def test_an_impossible_opacity_is_refused(opacity: float) -> None:
    with pytest.raises(ValueError, match=r"opacity must be in \[0, 1\]"):
        heatmap([[1]]).overlay(opacity=opacity)
    with pytest.raises(TypeError, match=r"opacity must be a number, got '0\.6'"):
        heatmap([[1]]).overlay(opacity=cast(float, "0.6"))


def test_the_share_inside_is_that_of_the_heat() -> None:
    left = np.zeros((40, 60), bool)
    left[:, :30] = True
    assert heatmap([[1, 1]]).share_inside(left) == pytest.approx(0.5)
    assert heatmap([[3, 1]]).share_inside(left) == pytest.approx(
        np.interp(np.arange(60) + 0.5, [15, 45], [3, 1])[:30].sum() / 120
    )
    assert heatmap([[1, 1]]).share_inside(~left & left) == 0


@pytest.mark.parametrize(
    "mask", [np.ones((60, 40), bool), np.ones((40, 60)), np.ones((1, 40, 60), bool), None]
)
def test_a_mask_of_another_image_or_none_is_refused(mask: Any) -> None:
    with pytest.raises(ValueError, match=r"mask must be \(40, 60\) bool"):
        heatmap([[1, 1]]).share_inside(mask)
