"""Figures from results, as a paper would take them; nothing is computed here.

Every function returns a :class:`matplotlib.figure.Figure` that belongs to no window and no global
list of figures: save it with ``figure.savefig("roc.pdf")``. Lines differ by dash as well as by
colour, and the colours are those of Okabe and Ito, which colour-blind readers can tell apart
(Wong, Points of view: color blindness, Nature Methods 8 (2011) 441).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.curves import (
    Curve,
    PrecisionRecallCurve,
    Reliability,
    RiskCoverageCurve,
    RocCurve,
)
from chestxray_covid.errors import check_dataset, check_kinds, whole_number
from chestxray_covid.evaluation_report import EvaluationReport
from chestxray_covid.heatmap import Heatmap
from chestxray_covid.reporting import short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from chestxray_covid.datasets.base import ChestXrayDataset
    from chestxray_covid.intervals import Estimate
    from chestxray_covid.training_history import History

#: Widths of one and two columns of a page in inches (89 and 183 mm, as Nature asks for).
COLUMN, PAGE = 3.5, 7.2
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
GREY = "#6E6E6E"
#: Points; text that is printed at these widths stays readable.
_TEXT, _SMALL = 8, 7
#: Longest side of a picture in a grid, in pixels.
_PICTURE_PX = 320


def plot_roc(*curves: RocCurve) -> Figure:
    """Return receiver operating characteristics with the bands of their intervals.

    Args:
        *curves: One to four, for example :meth:`EvaluationReport.roc_curve`; ``title`` names each.

    Raises:
        TypeError: If one is something else.
        ValueError: If there are none or too many.
    """
    check_kinds(curves, RocCurve, "report.roc_curve()")
    axes = _curves(curves, "AUROC", step=None)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel("1 − specificity", fontsize=_TEXT)
    axes.set_ylabel("sensitivity", fontsize=_TEXT)
    return _finish(axes, "lower right")


def plot_precision_recall(*curves: PrecisionRecallCurve) -> Figure:
    """Return precision over recall with the bands of their intervals, and chance as a dotted line.

    Args:
        *curves: One to four, for example :meth:`EvaluationReport.precision_recall_curve`.

    Raises:
        TypeError: If one is something else.
        ValueError: If there are none or too many.
    """
    check_kinds(curves, PrecisionRecallCurve, "report.precision_recall_curve()")
    axes = _curves(curves, "average precision", step="pre")
    for prevalence in sorted({curve.prevalence for curve in curves}):
        axes.axhline(prevalence, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel("recall (sensitivity)", fontsize=_TEXT)
    axes.set_ylabel("precision (PPV)", fontsize=_TEXT)
    return _finish(axes, "lower left")


def plot_risk_coverage(*curves: RiskCoverageCurve) -> Figure:
    """Return the share of wrong decisions over the share of images that are decided.

    Args:
        *curves: One to four, for example :meth:`EvaluationReport.risk_coverage_curve`.

    Raises:
        TypeError: If one is something else.
        ValueError: If there are none or too many.
    """
    check_kinds(curves, RiskCoverageCurve, "report.risk_coverage_curve()")
    axes = _curves(curves, "mean risk", step="pre")
    highest = max(float(np.nanmax([*curve.y, *curve.high])) for curve in curves)
    top = min(1.0, max(0.1, 1.4 * highest))
    axes.set_ylim(-0.01 * top, 1.01 * top)  # a risk of 0 would lie under the frame
    axes.set_aspect("auto")
    axes.set_xlabel("coverage (share of images decided)", fontsize=_TEXT)
    axes.set_ylabel("risk (share of those wrong)", fontsize=_TEXT)
    return _finish(axes, "upper left")


def plot_reliability(diagram: Reliability) -> Figure:
    """Return how often what was said with a probability came true, above the number of images.

    Args:
        diagram: For example :meth:`EvaluationReport.reliability`.

    Raises:
        TypeError: If it is something else.
    """
    check_kinds([diagram], Reliability, "report.reliability()")
    figure = _figure(COLUMN, 1.25 * COLUMN)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    value, low, high = (
        np.array([getattr(e, key) for e in diagram.observed]) for key in ("value", "low", "high")
    )
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    axes.vlines(diagram.predicted, low, high, color=BLUE, linewidth=1.2)
    axes.plot(diagram.predicted, value, color=BLUE, marker="o", markersize=4)
    widths = diagram.high_edges - diagram.low_edges
    below.bar(
        diagram.low_edges, diagram.counts, widths, align="edge",
        color=BLUE, edgecolor="white", linewidth=0.6,
    )  # fmt: skip
    sums = f"ECE {_number(diagram.ece)}\nBrier score {_number(diagram.brier)}"
    _title(axes, f"probability of {short_name(diagram.title)}\n{sums}")
    axes.set_ylabel("share that came true", fontsize=_TEXT)
    below.set_ylabel("images", fontsize=_TEXT)
    below.set_xlabel("predicted probability", fontsize=_TEXT)
    _plain_axes(axes)
    _plain_axes(below)
    return figure


def plot_confusion(report: EvaluationReport) -> Figure:
    """Return the confusion matrix: counts, shaded by their share of the true class.

    Raises:
        TypeError: If ``report`` is something else.
    """
    check_kinds([report], EvaluationReport, "evaluate()")
    counts = np.asarray(report.overall.confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = COLUMN if len(counts) < 4 else PAGE
    figure = _figure(side, 0.9 * side)
    axes = figure.add_subplot()
    edges = np.arange(len(counts) + 1) - 0.5
    axes.pcolormesh(edges, edges, shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        text = f"{count}\n{share:.0%}"
        colour = "white" if share > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=_TEXT + 1)
    names = [short_name(name) for name in report.classes]
    places = range(len(names))
    # Along the side of a cell while all fit there (a letter is about 0.6 of its height wide),
    # else across it.
    fits = max(map(len, names)) * 0.6 * _TEXT / 72 < 0.8 * side / len(names)
    axes.set_xticks(places, names, parse_math=False, rotation=0 if fits else 90)
    axes.set_yticks(places, names, parse_math=False, rotation=90 if fits else 0, va="center")
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
        TypeError: If it is something else.
        ValueError: If no epoch is finished.
    """
    from matplotlib.ticker import MaxNLocator

    from chestxray_covid.training_history import History

    check_kinds([history], History, "Trainer.fit()")
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
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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
        TypeError: If it is no data set, or ``per_class`` no whole number.
        ValueError: If the data set is empty or ``per_class`` is out of range.
        ImageError: If a file cannot be decoded.
    """
    check_dataset(dataset)
    if not 1 <= whole_number("per_class", per_class) <= 6 or not len(dataset):
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
    figure = _figure(PAGE, len(rows) * (cell + 0.2), padding=0.01)
    grid = figure.add_gridspec(len(rows), len(classes), wspace=0.04)
    for row, source in enumerate(rows):
        for column, label in enumerate(classes):
            found = places[source, label]
            strip = figure.add_subfigure(grid[row, column])
            words = f"{short_name(label)} · {short_name(source)} · n = {len(found)}"
            strip.suptitle(words, fontsize=_SMALL, parse_math=False)
            for k, axes in enumerate(strip.subplots(1, per_class, squeeze=False)[0]):
                picture = _picture(dataset.image(found[k])) if k < len(found) else None
                _show(axes, picture)
            if not found:
                strip.text(0.5, 0.4, "none", ha="center", fontsize=_TEXT, color=GREY)
    return figure


def plot_heatmaps(
    heatmaps: Heatmap | Iterable[Heatmap],
    *,
    masks: Iterable[NDArray[np.bool_]] | None = None,
    columns: int = 4,
) -> Figure:
    """Return radiographs, and below each the same with its heat.

    Args:
        heatmaps: One, or a list or another iterable of at least one.
        masks: Lungs to outline, a list of ``(H, W)`` bool of the size of each image.
        columns: Most radiographs side by side, 1 to 8; up to four keep one size.

    Raises:
        TypeError, ValueError: If one is no heatmap, there is none, or columns or masks do not fit.
    """
    heatmaps = [*heatmaps] if isinstance(heatmaps, Iterable) else [heatmaps]
    check_kinds(heatmaps, Heatmap, "grad_cam()")
    shapes = [heatmap.image.size[::-1] for heatmap in heatmaps]
    if not heatmaps or not 1 <= whole_number("columns", columns) <= 8:
        raise ValueError(
            f"a gallery needs heatmaps and columns in 1 to 8, got {len(heatmaps)} and {columns}"
        )
    if masks is not None:  # whatever is no list of them has none of the shapes
        masks = [np.asarray(mask) for mask in (masks if isinstance(masks, Iterable) else [masks])]
    if masks is not None and [mask.shape for mask in masks] != shapes:
        raise ValueError(f"masks must have the shapes of the images {shapes}, one for each")
    columns = min(columns, len(heatmaps))
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
        words = f"{short_name(heatmap.target)} {heatmap.probability:.2f}"
        above.set_title(words, fontsize=_TEXT, parse_math=False)
    return figure


# ---------------------------------------------------------------- what all share

_STYLES: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "linestyle": "-", "linewidth": 1.5},
    {"color": ORANGE, "linestyle": "--", "linewidth": 1.5},
    {"color": GREEN, "linestyle": "-.", "linewidth": 1.5},
    {"color": PURPLE, "linestyle": (0, (1, 1)), "linewidth": 1.5},
)


def _curves(curves: Sequence[Curve], area: str, *, step: Any) -> Axes:
    """Return square axes with curves and their bands; ``step`` as ``fill_between`` takes it."""
    if not 1 <= len(curves) <= len(_STYLES):
        raise ValueError(f"a figure takes 1 to {len(_STYLES)} curves, got {len(curves)}")
    axes = _figure(COLUMN, COLUMN).add_subplot()
    for curve, style in zip(curves, _STYLES, strict=False):
        colour, shape = style["color"], "default" if step is None else f"steps-{step}"
        label = f"{short_name(curve.title, 40)}\n{area} {_number(curve.area)}"
        axes.fill_between(
            curve.grid, curve.low, curve.high, step=step, color=colour, alpha=0.18, linewidth=0
        )
        # A single point, as of images that are all as sure, is no line.
        marker = "." if len(curve.x) == 1 else ""
        axes.plot(curve.x, curve.y, label=label, drawstyle=shape, marker=marker, **style)
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    axes.set_aspect("equal")
    return axes


def _finish(axes: Axes, place: Any) -> Figure:
    """Return the figure of axes that got their last touches."""
    _plain_axes(axes)
    legend = axes.legend(loc=place, fontsize=_SMALL, framealpha=0.85, edgecolor="none")
    for text in legend.get_texts():
        text.set_parse_math(False)
    return cast("Figure", axes.figure)


def _number(estimate: Estimate) -> str:
    level = "" if np.isnan(estimate.low) else f"{100 * estimate.confidence:g}% CI "
    return f"{estimate.value:.3f} ({level}{estimate.interval})"


def _figure(width: float, height: float, *, padding: float = 0.04) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=padding, h_pad=padding, hspace=0, wspace=0)
    return Figure(figsize=(width, height), dpi=200, layout=engine)


def _plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_SMALL, width=0.8)
    axes.grid(color="#E4E4E4", linewidth=0.6)
    axes.set_axisbelow(True)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=_TEXT, loc="left", parse_math=False)


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
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    x = left + (np.arange(-1, width + 1) + 0.5) / width * (right - left)
    y = top + (np.arange(-1, height + 1) + 0.5) / height * (bottom - top)
    # Within a frame of none, so that the outline is closed where lungs are cut off by the border.
    axes.contour(x, y, np.pad(mask, 1), levels=[0.5], colors="white", linewidths=0.8)
    axes.set(xlim=(left, right), ylim=(bottom, top))
