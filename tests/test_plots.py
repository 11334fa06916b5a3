from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from chestxray_covid import (
    EpochRecord,
    EvaluationReport,
    Heatmap,
    History,
    SyntheticChestXray,
    concatenate,
    plot_confusion,
    plot_heatmaps,
    plot_history,
    plot_precision_recall,
    plot_reliability,
    plot_risk_coverage,
    plot_roc,
    plot_samples,
)
from chestxray_covid.evaluation import evaluate_probabilities
from chestxray_covid.plots import COLUMN, PAGE

#: A label that matplotlib would read as a formula, and that a page would read as a script.
HOSTILE = "<script>$\\frac$_^{\n"


def judged(positive: str = "covid19") -> EvaluationReport:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 60)
    score = np.clip(0.25 + 0.5 * truth + rng.normal(0, 0.25, 60), 0.01, 0.99)
    return evaluate_probabilities(
        [("normal", positive)[k] for k in truth],
        np.stack([1 - score, score], axis=1),
        classes=("normal", positive),
        patients=[str(i // 2) for i in range(60)],
        sources=["a"] * 60,
        views=["PA"] * 60,
        positive=positive,
        n_resamples=50,
    )


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    return judged()


def test_a_figure_of_one_result_refuses_another(report: EvaluationReport) -> None:
    roc, precision, risk = (
        report.roc_curve(),
        report.precision_recall_curve(),
        report.risk_coverage_curve(),
    )
    for plot, kind, wrong in (
        (plot_roc, "RocCurve", precision),
        (plot_precision_recall, "PrecisionRecallCurve", roc),
        (plot_risk_coverage, "RiskCoverageCurve", roc),
        (plot_reliability, "Reliability", report),
        (plot_confusion, "EvaluationReport", risk),
        (plot_history, "History", "runs/first"),
    ):
        came = type(wrong).__name__
        with pytest.raises(TypeError, match=f"expected {kind}, as .* gives it, got {came}$"):
            plot(wrong)  # type: ignore[operator]
    with pytest.raises(TypeError, match=r"as report\.roc_curve\(\) gives it, got Evaluation"):
        plot_roc(roc, report)  # type: ignore[arg-type]


def history(epochs: int = 5) -> History:
    return History(
        records=tuple(
            EpochRecord(
                epoch=number,
                learning_rate=0.001,
                train_loss=1 / number,
                val_loss=0.5 + abs(number - 3) / 10,
                val_accuracy=0.7 + number / 50,
                val_kappa=0.4 + number / 50,
                val_auroc=None if number == 1 else 0.8 + number / 50,
                images_per_s=10.0,
                seconds=1.0,
                data_seconds=0.1,
                is_best=number <= 3,
            )
            for number in range(1, epochs + 1)
        )
    )


def heatmap(size: tuple[int, int] = (60, 40), target: str = "covid19") -> Heatmap:
    return Heatmap(
        image=Image.new("L", size, 90),
        grid=np.eye(3, dtype=np.float32),
        target=target,
        probability=0.87,
        method="grad_cam",
        source="x.png",
    )


def lines(figure: Figure, axes: int = 0) -> list[np.ndarray]:
    """Return the points ``(P, 2)`` of every line, in the order in which they were drawn."""
    return [line.get_xydata() for line in figure.axes[axes].get_lines()]


def words(figure: Figure) -> str:
    """Return all text of a figure, after drawing it as a file would have it."""
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    texts = figure.findobj(Text)
    return "\n".join(text.get_text() for text in texts)


def pixels(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=60)
    return buffer.getvalue()


ALL: dict[str, Callable[[EvaluationReport], Figure]] = {
    "roc": lambda r: plot_roc(r.roc_curve()),
    "precision_recall": lambda r: plot_precision_recall(r.precision_recall_curve()),
    "reliability": lambda r: plot_reliability(r.reliability(r.positive, n_bins=5)),
    "risk_coverage": lambda r: plot_risk_coverage(r.risk_coverage_curve()),
    "confusion": plot_confusion,
    "history": lambda _: plot_history(history()),
    "heatmaps": lambda r: plot_heatmaps([heatmap(target=r.positive)] * 4),
    "samples": lambda r: plot_samples(
        SyntheticChestXray(4, image_size_px=32, patients=4, sources=("a", r.positive)), per_class=1
    ),
}


# ---------------------------------------------------------------- what holds for every figure


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_figure_is_returned_twice_the_same_and_as_wide_as_a_column_or_a_page(
    name: str, report: EvaluationReport
) -> None:
    figure = ALL[name](report)
    assert isinstance(figure, Figure)
    assert figure.get_figwidth() in (COLUMN, PAGE)
    assert pixels(figure) == pixels(ALL[name](report))


@pytest.mark.parametrize("name", ALL)
def test_letters_are_large_enough_to_be_read_in_print(name: str, report: EvaluationReport) -> None:
    figure = ALL[name](report)
    assert words(figure)
    texts = figure.findobj(Text)
    assert min(text.get_fontsize() for text in texts if text.get_text()) >= 7


@pytest.mark.parametrize("name", [n for n in ALL if n != "history"])
def test_names_from_data_are_text_and_never_a_formula(name: str) -> None:
    shown = words(ALL[name](judged(HOSTILE)))
    if name != "risk_coverage":  # of all classes, so it names none
        assert "<script>$\\\\frac$" in shown
    assert HOSTILE not in shown, "control characters are escaped"


def test_long_names_that_differ_in_their_end_are_told_apart() -> None:
    names = [f"interstitial pneumonia of unknown origin, group {k}" for k in "AB"]
    report = evaluate_probabilities(
        names * 4,
        np.eye(2)[[0, 1] * 4] * 0.8 + 0.1,
        classes=names,
        patients=range(8),
        sources=["a"] * 8,
        views=["PA"] * 8,
        n_resamples=20,
    )
    labels = [text.get_text() for text in plot_confusion(report).axes[0].get_xticklabels()]
    assert [label[-9:] for label in labels] == [", group A", ", group B"]
    shown = words(plot_roc(report.roc_curve(names[1], versus=names[0]), report.roc_curve(names[1])))
    assert "group A\n" in shown
    assert " against all others\n" in shown


def test_nothing_is_shown_and_no_global_state_is_touched() -> None:
    code = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy()\n"
        "import io, numpy as np\n"
        "from chestxray_covid import plot_samples, SyntheticChestXray\n"
        "f = plot_samples(SyntheticChestXray(2, image_size_px=32)); f.savefig(io.BytesIO())\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert matplotlib.rcParams.copy() == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- curves


@pytest.mark.parametrize(
    ("plot", "curve", "named"),
    [
        (plot_roc, "roc_curve", "AUROC"),
        (plot_precision_recall, "precision_recall_curve", "average precision"),
        (plot_risk_coverage, "risk_coverage_curve", "mean risk"),
    ],
)
def test_a_curve_is_drawn_with_its_band_and_its_area(
    report: EvaluationReport, plot: Callable[..., Figure], curve: str, named: str
) -> None:
    found = getattr(report, curve)()
    figure = plot(found)
    np.testing.assert_array_equal(lines(figure)[0], np.stack([found.x, found.y], 1))
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert {*np.round(found.low, 9), *np.round(found.high, 9)} <= set(np.round(band[:, 1], 9))
    area = f"{named} {found.area.value:.3f} (95% CI {found.area.low:.3f}–{found.area.high:.3f})"
    assert area in words(figure)
    assert found.title in words(figure)


def test_curves_are_told_apart_without_colour(report: EvaluationReport) -> None:
    one = report.roc_curve()
    figure = plot_roc(*(replace(one, title=f"model {i}") for i in range(4)))
    drawn = figure.axes[0].get_lines()[:4]
    assert len({str(line.get_linestyle()) + str(line._dash_pattern) for line in drawn}) == 4
    assert all(f"model {i}" in words(figure) for i in range(4))


@pytest.mark.parametrize("plot", [plot_roc, plot_precision_recall, plot_risk_coverage])
def test_a_figure_takes_one_to_four_curves(
    report: EvaluationReport, plot: Callable[..., Figure]
) -> None:
    curve = getattr(report, plot.__name__.removeprefix("plot_") + "_curve")()
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"a figure takes 1 to 4 curves, got {count}"):
            plot(*[curve] * count)


def test_a_curve_without_interval_is_drawn_and_says_so() -> None:
    perfect = evaluate_probabilities(
        ["normal", "covid19"],
        [[0.9, 0.1], [0.2, 0.8]],
        classes=("normal", "covid19"),
        patients=["1", "2"],
        sources=["a"] * 2,
        views=["PA"] * 2,
        n_resamples=20,
    )
    assert "AUROC 1.000 (no interval)" in words(plot_roc(perfect.roc_curve()))
    assert "no interval" in words(plot_risk_coverage(perfect.risk_coverage_curve()))
    assert words(plot_reliability(perfect.reliability("covid19")))


@pytest.mark.parametrize("sure", [[0.99] * 8, np.linspace(0.9, 0.99, 8)])
def test_a_risk_of_0_can_be_seen(sure: Any) -> None:
    perfect = evaluate_probabilities(
        ["covid19"] * 8,
        np.stack([1 - np.asarray(sure), sure], axis=1),
        classes=("normal", "covid19"),
        patients=range(8),
        sources=["a"] * 8,
        views=["PA"] * 8,
        n_resamples=20,
    )
    figure = plot_risk_coverage(perfect.risk_coverage_curve())
    cast("Any", figure.axes[0].get_legend()).remove()
    drawn = np.asarray(Image.open(io.BytesIO(pixels(figure))).convert("RGB"))
    assert (drawn == (0, 114, 178)).all(-1).any(), "in its own colour, not under the frame"


def test_the_reliability_diagram_shows_bins_intervals_and_counts(report: EvaluationReport) -> None:
    found = report.reliability("covid19", n_bins=5)
    figure = plot_reliability(found)
    observed = [e.value for e in found.observed]
    np.testing.assert_allclose(lines(figure)[1], np.stack([found.predicted, observed], 1))
    segments = figure.axes[0].collections[0].get_segments()
    assert [s[0][1] for s in segments] == [e.low for e in found.observed]
    assert [bar.get_height() for bar in figure.axes[1].patches] == found.counts.tolist()
    assert f"ECE {found.ece.value:.3f}" in words(figure)


# ---------------------------------------------------------------- counts, epochs, pictures


def test_the_confusion_matrix_shows_each_count_and_its_share_of_the_truth(
    report: EvaluationReport,
) -> None:
    figure = plot_confusion(report)
    shown = {t.get_position(): t.get_text() for t in figure.axes[0].texts}
    for row, counts in enumerate(report.overall.confusion):
        for column, count in enumerate(counts):
            assert shown[column, row] == f"{count}\n{count / sum(counts):.0%}"


@pytest.mark.parametrize("count", [2, 3, 12])
def test_long_names_of_classes_do_not_lie_on_each_other(
    report: EvaluationReport, count: int
) -> None:
    names = tuple(f"{i} a name that is rather long" for i in range(count))
    part = replace(report.overall, confusion=tuple((i,) * count for i in range(count)))
    figure = plot_confusion(replace(report, classes=names, overall=part))
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    rows, columns = (
        [text.get_window_extent() for text in texts]
        for texts in (axes.get_yticklabels(), axes.get_xticklabels())
    )
    boxes = [*reversed(rows), *columns]
    assert not any(one.overlaps(other) for one, other in pairwise(boxes))


def test_a_class_without_images_is_no_division_by_zero(report: EvaluationReport) -> None:
    empty = replace(report.overall, confusion=((5, 1), (0, 0)))
    assert "0\n0%" in words(plot_confusion(replace(report, overall=empty)))


def test_the_history_shows_every_epoch_and_the_one_that_was_kept() -> None:
    run = history()
    figure = plot_history(run)
    losses = lines(figure)
    assert losses[0].tolist() == [[r.epoch, r.train_loss] for r in run]
    assert losses[1].tolist() == [[r.epoch, r.val_loss] for r in run]
    auroc = lines(figure, 1)[0]
    assert np.isnan(auroc[0, 1]), "undefined in the first epoch"
    assert auroc[1:].tolist() == [[r.epoch, r.val_auroc] for r in run.records[1:]]
    assert "kept: epoch 3" in words(figure)
    assert plot_history(history(1)).axes[0].get_lines()[0].get_marker() == "."


def test_without_a_finished_epoch_there_is_no_history_to_draw() -> None:
    with pytest.raises(ValueError, match="No epoch is finished"):
        plot_history(History())


def test_the_sample_grid_shows_each_source_and_class_and_what_is_missing() -> None:
    both = SyntheticChestXray(6, image_size_px=32, sources=("mixed",))
    alone = SyntheticChestXray(2, classes=("normal",), image_size_px=32, sources=("alone",))
    dataset = concatenate([both, alone])
    figure = plot_samples(dataset, per_class=2)
    shown = words(figure)
    for label, source, count in (("normal", "mixed", 3), ("covid19", "alone", 0)):
        assert f"{label} · {source} · n = {count}" in shown
    assert shown.count("none") == 1
    drawn = [image.get_array() for axes in figure.axes for image in axes.get_images()]
    assert len(drawn) == 6
    pictures = {np.asarray(image).tobytes() for image, _ in dataset}
    assert {np.asarray(array).tobytes() for array in drawn} <= pictures
    assert pixels(plot_samples(dataset, per_class=2, seed=1)) != pixels(figure)


@pytest.mark.parametrize(("keep", "per_class"), [([0], 0), ([0], 7), ([], 3)])
def test_an_impossible_sample_grid_is_refused(keep: list[int], per_class: int) -> None:
    dataset = SyntheticChestXray(2, image_size_px=32).subset(keep)
    with pytest.raises(ValueError, match="needs radiographs and per_class in 1 to 6"):
        plot_samples(dataset, per_class=per_class)
    for plot in (
        partial(plot_samples, dataset, per_class=2.5),
        partial(plot_heatmaps, [heatmap()], columns="2"),
    ):
        with pytest.raises(TypeError, match=r"(per_class|columns) must be a whole number, got"):
            plot()


def test_the_gallery_shows_each_radiograph_above_its_heat() -> None:
    found = [heatmap(), heatmap((30, 50), "normal"), heatmap((50, 50))]
    mask = [np.zeros(h.image.size[::-1], bool) for h in found]
    mask[0][10:20, 20:40] = True
    figure = plot_heatmaps(found, masks=mask, columns=2)
    drawn = [[np.asarray(i.get_array()) for i in axes.get_images()] for axes in figure.axes]
    # Two rows of radiographs with a row of heat below each; the last place is empty.
    order = [0, 1, None, None, 2, None]
    for place, which in zip((0, 1, 4), (0, 1, 2), strict=True):
        assert order[place] == which
        assert np.array_equal(drawn[place][0], np.asarray(found[which].image))
        assert np.array_equal(drawn[place + 2][0], np.asarray(found[which].overlay()))
    assert not drawn[5]
    assert not drawn[7]
    assert "covid19 0.87" in words(figure)
    outline = figure.axes[2].collections[0].get_paths()[0].vertices
    assert outline.min(0).tolist() == pytest.approx([19.5, 9.5], abs=0.6)
    assert outline.max(0).tolist() == pytest.approx([39.5, 19.5], abs=0.6)


def test_large_radiographs_are_reduced_so_that_a_gallery_stays_small() -> None:
    figure = plot_heatmaps([heatmap((2000, 1000))])
    assert figure.axes[0].get_images()[0].get_array().shape == (160, 320)


def test_a_gallery_of_one_needs_no_list_and_takes_nothing_else() -> None:
    one = heatmap()
    assert words(plot_heatmaps(one)) == words(plot_heatmaps([one]))
    for other in ([one, one.image], None, "heat.png"):
        with pytest.raises(TypeError, match="expected Heatmap, as grad_cam"):
            plot_heatmaps(cast(Any, other))


def test_heatmaps_may_come_one_by_one() -> None:
    one = heatmap()
    assert words(plot_heatmaps(iter([one, one]))) == words(plot_heatmaps([one, one]))


@pytest.mark.parametrize(("count", "columns"), [(0, 4), (1, 0), (1, 9)])
def test_an_impossible_gallery_is_refused(count: int, columns: int) -> None:
    with pytest.raises(ValueError, match="needs heatmaps and columns in 1 to 8"):
        plot_heatmaps([heatmap()] * count, columns=columns)


def test_masks_that_do_not_fit_are_refused() -> None:
    for masks in ([], [np.ones((60, 40), bool)], cast(Any, [None]), cast(Any, 5)):
        with pytest.raises(ValueError, match="masks must have the shapes of the images"):
            plot_heatmaps([heatmap()], masks=masks)


def test_masks_may_be_pictures_lists_or_come_one_by_one() -> None:
    found, mask = heatmap(), np.zeros(heatmap().image.size[::-1], bool)
    mask[10:20, 20:40] = True
    drawn = []
    for masks in ([mask], [Image.fromarray(mask)], [mask.tolist()], iter([mask])):
        figure = plot_heatmaps([found], masks=cast(Any, masks))
        drawn.append([path.vertices for path in figure.axes[1].collections[0].get_paths()])
    for other in drawn[1:]:
        np.testing.assert_array_equal(other, drawn[0])


@pytest.mark.parametrize("size", [(60, 40), (60, 1), (1, 1)])
def test_lungs_that_the_border_cuts_off_are_outlined_there_too(size: tuple[int, int]) -> None:
    figure = plot_heatmaps([heatmap(size)], masks=[np.ones(size[::-1], bool)])
    outline = figure.axes[1].collections[0].get_paths()[0].vertices
    assert outline.min(0).tolist() == [-0.5, -0.5]
    assert outline.max(0).tolist() == [size[0] - 0.5, size[1] - 0.5]
    assert figure.axes[1].axis() == figure.axes[0].axis()
