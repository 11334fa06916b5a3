"""Figures from results, as a paper would take them; nothing is computed here.

Every function returns a :class:`matplotlib.figure.Figure` that belongs to no window and no global
list of figures: save it with ``figure.savefig("roc.pdf")``. Lines differ by dash as well as by
colour, and the colours are those of Okabe and Ito, which colour-blind readers can tell apart
(Wong, Points of view: color blindness, Nature Methods 8 (2011) 441).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from chestxray_covid.datasets.base import ChestXrayDataset
    from chestxray_covid.evaluation_report import EvaluationReport
    from chestxray_covid.heatmap import Heatmap
    from chestxray_covid.training_config import History

#: Widths of one and two columns of a page in inches (89 and 183 mm, as Nature asks for).
COLUMN, PAGE = 3.5, 7.2
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
#: Points; text that is printed at these widths stays readable.
_TEXT, _SMALL = 8, 7
#: Longest side of a picture in a grid, in pixels.
_PICTURE_PX = 320


def plot_confusion(report: EvaluationReport) -> Figure:
    """Return the confusion matrix: counts, shaded by their share of the true class."""
    counts = np.asarray(report.overall.confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = COLUMN if len(counts) < 4 else PAGE
    figure = _figure(side, 0.9 * side)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        text = f"{count}\n{share:.0%}"
        colour = "white" if share > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=_TEXT + 1)
    names = [_short(name) for name in report.classes]
    places = range(len(names))
    axes.set_xticks(places, names, parse_math=False)
    axes.set_yticks(places, names, parse_math=False, rotation=90, va="center")
    axes.tick_params(length=0, labelsize=_TEXT)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("predicted", fontsize=_TEXT)
    axes.set_ylabel("true", fontsize=_TEXT)
    _title(axes, f"{report.n_images} images of {report.n_patients} patients")
    return figure


def plot_history(history: History) -> Figure:
    """Return loss and validation metrics by epoch, with the epoch whose weights were kept.

    Raises:
        ValueError: If no epoch is finished.
    """
    best = history.best.epoch
    epochs = [record.epoch for record in history]
    figure = _figure(PAGE, 2.7)
    panels = (
        ("loss", {"training": "train_loss", "validation": "val_loss"}),
        (
            "on validation images",
            {"AUROC": "val_auroc", "accuracy": "val_accuracy", "kappa": "val_kappa"},
        ),
    )
    for place, (name, lines) in enumerate(panels, 1):
        axes = figure.add_subplot(1, 2, place)
        for style, (label, key) in zip(_STYLES, lines.items(), strict=False):
            values = [getattr(record, key) for record in history]
            numbers = np.array([np.nan if v is None else v for v in values], dtype=float)
            if np.isfinite(numbers).any():
                # A single epoch is a point, which a line would not show.
                axes.plot(epochs, numbers, label=label, marker=".", markersize=3, **style)
        axes.axvline(best, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_title(name, fontsize=_TEXT, loc="left")
        axes.set_xlabel("epoch", fontsize=_TEXT)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _plain_axes(axes)
        axes.legend(fontsize=_SMALL, frameon=False)
    axes.text(
        best, 1.0, f"kept: epoch {best}", transform=axes.get_xaxis_transform(),
        fontsize=_SMALL, color=GREY, va="bottom", ha="center",
    )  # fmt: skip
    return figure


def plot_samples(dataset: ChestXrayDataset, *, per_class: int = 3, seed: int = 0) -> Figure:
    """Return random radiographs, a row per source and a group of columns per class.

    A source that lacks a class leaves a gap, so that a design which cannot tell disease from
    source shows as one.

    Args:
        dataset: Radiographs, of at least one sample.
        per_class: Radiographs of each class from each source, 1 to 6.
        seed: Chooses them.

    Raises:
        ValueError: If the data set is empty or ``per_class`` is out of range.
        ImageError: If a file cannot be decoded.
    """
    if not 1 <= per_class <= 6 or not len(dataset):
        raise ValueError(
            "a sample grid needs radiographs and per_class in 1 to 6, "
            f"got {len(dataset)} and {per_class}"
        )
    places: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index in np.random.default_rng(seed).permutation(len(dataset)):
        sample = dataset.samples[index]
        places[sample.source, sample.label].append(int(index))
    rows, classes = dataset.sources, dataset.classes
    cell = PAGE / (len(classes) * per_class)
    figure = _figure(PAGE, len(rows) * (cell + 0.2))
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, hspace=0.0)
    grid = figure.add_gridspec(len(rows), len(classes), wspace=0.04)
    for row, source in enumerate(rows):
        for column, label in enumerate(classes):
            found = places[source, label]
            strip = figure.add_subfigure(grid[row, column])
            words = f"{_short(label)} · {_short(source)} · n = {len(found)}"
            strip.suptitle(words, fontsize=_SMALL, parse_math=False)
            for k, axes in enumerate(strip.subplots(1, per_class, squeeze=False)[0]):
                picture = _picture(dataset.image(found[k])) if k < len(found) else None
                _show(axes, picture)
            if not found:
                strip.text(0.5, 0.4, "none", ha="center", fontsize=_TEXT, color=GREY)
    return figure


def plot_heatmaps(
    heatmaps: Sequence[Heatmap],
    *,
    masks: Sequence[NDArray[np.bool_]] | None = None,
    columns: int = 4,
) -> Figure:
    """Return radiographs, and below each the same with its heat.

    Args:
        heatmaps: At least one.
        masks: Lungs to outline, ``(H, W)`` bool of the size of each image.
        columns: Radiographs side by side, 1 to 8.

    Raises:
        ValueError: If there is no heatmap, ``columns`` is out of range, or masks do not fit.
    """
    shapes = [heatmap.image.size[::-1] for heatmap in heatmaps]
    if not heatmaps or not 1 <= columns <= 8:
        raise ValueError(
            f"a gallery needs heatmaps and columns in 1 to 8, got {len(heatmaps)} and {columns}"
        )
    if masks is not None and [mask.shape for mask in masks] != shapes:
        raise ValueError(f"masks must have the shapes of the images {shapes}, one for each")
    rows = -(-len(heatmaps) // columns)
    width = PAGE * min(1.0, columns / 4)
    figure = _figure(width, rows * (2 * width / columns + 0.25))
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        above, below = axes[2 * row, column], axes[2 * row + 1, column]
        if place >= len(heatmaps):
            _show(above, None)
            _show(below, None)
            continue
        heatmap = heatmaps[place]
        _show(above, _picture(heatmap.image))
        _show(below, _picture(heatmap.overlay()))
        if masks is not None:
            _outline(below, masks[place])
        words = f"{_short(heatmap.target)} {heatmap.probability:.2f}"
        above.set_title(words, fontsize=_TEXT, parse_math=False)
    return figure


# ---------------------------------------------------------------- what all share

_STYLES: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "linestyle": "-", "linewidth": 1.5},
    {"color": ORANGE, "linestyle": "--", "linewidth": 1.5},
    {"color": GREEN, "linestyle": "-.", "linewidth": 1.5},
)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=200, layout="constrained")


def _plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_SMALL, width=0.8)
    axes.grid(color="#E4E4E4", linewidth=0.6)
    axes.set_axisbelow(True)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=_TEXT, loc="left", parse_math=False)


def _short(name: str, limit: int = 24) -> str:
    """Return a name from data as a label: printable, and not longer than there is room."""
    text = name if name.isprintable() else ascii(name)[1:-1]
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _picture(image: Any) -> Any:
    """Return a radiograph, small enough for a figure that holds many."""
    from PIL import Image

    from chestxray_covid.image import load_image

    picture = image if isinstance(image, Image.Image) else load_image(image)
    picture = picture.copy()
    picture.thumbnail((_PICTURE_PX, _PICTURE_PX))
    return picture


def _show(axes: Axes, picture: Any) -> None:
    axes.set_axis_off()
    if picture is not None:
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="antialiased")


def _outline(axes: Axes, mask: NDArray[np.bool_]) -> None:
    height, width = mask.shape
    right, left = axes.get_xlim()[1], axes.get_xlim()[0]
    bottom, top = axes.get_ylim()
    x = left + (np.arange(width) + 0.5) / width * (right - left)
    y = top + (np.arange(height) + 0.5) / height * (bottom - top)
    axes.contour(x, y, mask, levels=[0.5], colors="white", linewidths=0.8)
