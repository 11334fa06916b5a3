"""Write what in README and documentation comes from measured results, so that no number is typed.

    python docs/generate.py

reads ``docs/results/baseline/*.json``, which a training run leaves (``run.json`` beside it says
how it was run), and what ``benchmarks/thumbnails.py`` leaves, and writes the results block of
``README.md``, ``docs/baseline.md`` and its figure, a table of ``docs/shortcuts.md``, and the
contact sheet of phantoms. A test holds text and figure against the JSON files.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chestxray_covid import Confounding, EvaluationReport, History, SyntheticChestXray

if TYPE_CHECKING:
    from chestxray_covid.intervals import Estimate
    from chestxray_covid.subgroups import Subgroup

DOCS = Path(__file__).parent
RESULTS = DOCS / "results" / "baseline"
FILES = ("history.json", "evaluation.json", "confounding.json", "run.json")
THUMBNAILS = DOCS.parent / "benchmarks" / "results" / "thumbnails.json"
RUN_FIELDS = ("command", "wall_time_s", "machine", "versions", "date")
#: Key of the text chunk in a figure that names the file it was drawn from.
SOURCE_KEY = "Source"
#: What a table of sources tells of each.
SOURCE_HEAD = ("Tested on", "Images", "Patients", "Sensitivity", "Specificity", "AUROC")


@dataclass(frozen=True, kw_only=True)
class Results:
    """One training run, judged on patients that it never saw."""

    history: History
    report: EvaluationReport
    confounding: Confounding
    run: dict[str, Any]


def load(folder: Path) -> Results:
    """Return the results in a folder, or exit with what is missing."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise SystemExit(
            f"{folder} lacks {', '.join(missing)}. Train with chestxray-covid train, copy its "
            f"JSON files there, and add run.json with {', '.join(RUN_FIELDS)}."
        )
    data = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in FILES}
    run = data["run.json"]
    lacking = [name for name in RUN_FIELDS if name not in run]
    if lacking:
        raise SystemExit(f"{folder / 'run.json'} lacks {', '.join(lacking)}.")
    return Results(
        history=History.from_dict(data["history.json"]),
        report=EvaluationReport.from_dict(data["evaluation.json"]),
        confounding=Confounding(**data["confounding.json"]),
        run=run,
    )


def readme_block(results: Results) -> str:
    """Return what stands between the markers of the README."""
    report, run = results.report, results.run
    setting = f"""
        Measured: Cohen's COVID-19 radiographs against Kermany's normal ones, the classic design,
        trained in {minutes(run["wall_time_s"])} ({flat(run["machine"])}) and tested on
        {report.n_images} radiographs of {report.n_patients} patients that the model never saw,
        with intervals at {report.confidence:.0%}. A dash is a number that is not defined there,
        because only one class is present."""
    worth = f"""
        **The AUROC of {overall_auroc(report)} proves nothing about COVID-19.**
        {design_flaw(results.confounding)} {inside_sources(report)} Elsewhere it is no better: on
        radiographs of a hospital that was not in the training data, the AUROC of such a model was
        0.56, where 0.5 is chance, in an experiment before this library that its repository cannot
        repeat. See [Baseline](docs/baseline.md) for all numbers and [Shortcuts](docs/shortcuts.md)
        for why."""
    return f"{wrapped(setting)}\n\n{source_table(report)}\n\n{wrapped(worth)}"


def thumbnail_aurocs() -> dict[tuple[str, float], tuple[str, str]]:
    """Return what a linear classifier was judged on, and the part hidden → images and AUROC."""
    rows = json.loads(THUMBNAILS.read_text(encoding="utf-8"))["rows"]
    return {
        (row["judged_on"], row["hidden"]): (
            "{:,} against {:,}".format(*row["n"]),
            f"{row['auroc']:.3f}",
        )
        for row in rows
    }


def thumbnail_block() -> str:
    """Return the table of ``docs/shortcuts.md``; its last row is of before this library."""
    found = thumbnail_aurocs()
    linear = "linear, thumbnails of 64 × 64 pixels"
    hidden = "the same, central 90 % of every image (by side length) blacked out"
    inside = "inside Cohen's: COVID-19 against other findings"
    body = [
        (linear, "both collections", *found["both", 0.0]),
        (hidden, "both collections", *found["both", 0.9]),
        (linear, inside, *found["inside", 0.0]),
        ("DenseNet-121", "a hospital that was not in the training data", "–", "0.56"),
    ]
    return table(("Classifier", "Judged on", "Images", "AUROC"), body)


def baseline_page(results: Results) -> str:
    """Return the page ``docs/baseline.md``."""
    report, run = results.report, results.run
    linear = {of: auroc for of, (_, auroc) in thumbnail_aurocs().items()}
    differ = f"""
        The children of one collection and the adults of the other, their machines, exposures, crops
        and letters on the film differ, so a model need not look at a lung to tell them apart. On
        the same two collections, a linear classifier on thumbnails of 64 × 64 pixels reaches an
        AUROC of {linear["both", 0.0]} on patients that it never saw, and still
        {linear["both", 0.9]} with the central 90 % of every image (by side length) blacked out,
        where no lung is left. Inside Cohen's collection alone, COVID-19 against other findings, the
        same classifier reaches {linear["inside", 0.0]}. A DenseNet-121 trained on this design
        reached 0.56 on radiographs of a hospital that was not in the training data, where 0.5 is
        chance. [Shortcuts](shortcuts.md) says which of these numbers can be repeated, and shows how
        to see this in your own data."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    proof = f"""
        On patients that it never saw, the model reaches an AUROC of {overall_auroc(report)}.
        **That is no evidence that it detects COVID-19.** {design_flaw(results.confounding)}
        {inside_sources(report)}"""
    tested = f"""
        {report.n_images} radiographs of {report.n_patients} patients, none of them used for
        training or for choosing the epoch; intervals at {report.confidence:.0%}.
        [Metrics](metrics.md) says what each number is."""
    trained = f"""
        It took {minutes(run["wall_time_s"])} on {run["date"]} ({flat(run["machine"])};
        {versions}). The weights of epoch {results.history.best.epoch} of {len(results.history)}
        were kept, that of the lowest validation loss."""
    return f"""\
<!-- Written by docs/generate.py from docs/results/baseline/*.json: do not edit. -->

# Baseline: the classic design, and what it is worth

Cohen's COVID-19 radiographs against Kermany's normal ones, split by patient: the design of the
field's first notebooks and papers, trained with this library's `baseline` recipe.

```bash
{run["command"]}
```

## What it proves: nothing

{wrapped(proof)}

{confounding_table(results.confounding)}

{wrapped(differ)}

## On patients that it never saw

{wrapped(tested)}

{metric_table(report)}

Rows are the truth, columns the prediction:

{confusion_table(report)}

By source and by view, for {report.positive}. A dash is a number that is not defined there, because
only one class is present:

{source_table(report)}

{subgroup_table(report, "View", report.by_view)}

## Training

{wrapped(trained)}

![Losses and validation AUROC by epoch](results/baseline/history.png)

{history_table(results.history)}
"""


def design_flaw(found: Confounding) -> str:
    """Return in words how far the source gives the label away."""
    rows = [list(row.values()) for row in found.table.values()]
    guessed = sum(map(max, rows)) / sum(map(sum, rows))
    return f"""
        Whoever knows nothing but the collection that a radiograph is from guesses its label right
        in {guessed:.1%} of the cases (Cramér's V: {found.cramers_v:.2f}). A model that tells the
        two collections apart scores as high as one that sees a disease, and held-out patients of
        the same two collections cannot tell which of the two it is."""


def inside_sources(report: EvaluationReport) -> str:
    """Return in words how good the model is where the source cannot help it."""
    sentences = []
    for name, part in report.by_source.items():
        own = part.per_class[report.positive]
        if own["auroc"].value == own["auroc"].value:
            counts = f"{own['sensitivity'].n} and {own['specificity'].n} images"
            sentences.append(
                f"Inside {name} alone, where the collection cannot help, its AUROC is "
                f"{shown(own['auroc'])}, on {counts} with and without {report.positive}."
            )
    return " ".join(sentences)


def overall_auroc(report: EvaluationReport) -> str:
    return shown(report.overall.per_class[report.positive]["auroc"])


def source_table(report: EvaluationReport) -> str:
    return table(SOURCE_HEAD, source_rows(report))


def source_rows(report: EvaluationReport) -> list[list[str]]:
    """Return what is reached on all images and on each source's, under :data:`SOURCE_HEAD`."""
    return subgroup_rows(report, {"all": report.overall, **report.by_source})


def subgroup_table(report: EvaluationReport, title: str, parts: Mapping[str, Subgroup]) -> str:
    return table((title, *SOURCE_HEAD[1:]), subgroup_rows(report, parts))


def subgroup_rows(report: EvaluationReport, parts: Mapping[str, Subgroup]) -> list[list[str]]:
    rows = []
    for name, part in parts.items():
        own = part.per_class[report.positive]
        numbers = (shown(own[metric.lower()]) for metric in SOURCE_HEAD[3:])
        rows.append([name, str(part.n_images), str(part.n_patients), *numbers])
    return rows


def metric_table(report: EvaluationReport) -> str:
    per_class = report.overall.per_class.items()
    found = [("all", report.overall.metrics), *per_class]
    body = [
        (label, name.replace("_", " "), shown(e), e.n, e.method)
        for label, metrics in found
        for name, e in metrics.items()
    ]
    return table(("Class", "Metric", "Value", "n", "Interval from"), body)


def confusion_table(report: EvaluationReport) -> str:
    rows = zip(report.classes, report.overall.confusion, strict=True)
    return table(("", *report.classes), [(f"**{label}**", *counts) for label, counts in rows])


def confounding_table(found: Confounding) -> str:
    labels = list(next(iter(found.table.values())))
    body = [(source, *(row[name] for name in labels)) for source, row in found.table.items()]
    return table(("Source", *labels), body)


def history_table(history: History) -> str:
    head = ("Epoch", "Learning rate", "Training loss", "Validation loss", "Accuracy", "Kappa")
    body = [
        (
            f"**{r.epoch}**" if r is history.best else r.epoch,
            f"{r.learning_rate:.2g}",
            *(number(v) for v in (r.train_loss, r.val_loss, r.val_accuracy)),
            *(number(v) for v in (r.val_kappa, r.val_auroc)),
            f"{r.images_per_s:.1f}",
        )
        for r in history
    ]
    return table((*head, "AUROC", "Images/s"), body)


def table(head: Sequence[Any], body: Iterable[Sequence[Any]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.3f}"


def shown(e: Estimate) -> str:
    return "–" if e.value != e.value else f"{e.value:.3f} ({e.interval})"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"


def flat(value: Any) -> str:
    """Return text, or the values of an object one after the other."""
    return ", ".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 100, break_on_hyphens=False)


def fill(path: Path, blocks: Mapping[str, str]) -> None:
    """Replace the text between markers in a file, by the markers' name."""
    path.write_text(with_blocks(path.read_text(encoding="utf-8"), blocks), encoding="utf-8")


def with_blocks(page: str, blocks: Mapping[str, str]) -> str:
    """Return a page with the text between its markers replaced, by the markers' name."""
    for name, block in blocks.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        before, found_start, rest = page.partition(start)
        _, found_end, after = rest.partition(end)
        if not found_start or not found_end:
            raise SystemExit(f"The page needs the markers {start} and {end}, in this order.")
        page = f"{before}{start}\n{block}\n{end}{after}"
    return page


def digest(path: Path) -> str:
    """Return what a figure holds about the file that it was drawn from."""
    return f"{path.name} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def draw_history(folder: Path) -> Path:
    """Draw ``history.png`` from ``history.json``: losses and validation AUROC by epoch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    history = load(folder).history
    frame = history.to_frame().astype(float)
    panel = Figure(figsize=(8, 3), layout="constrained")
    left, right = panel.subplots(1, 2)
    left.plot(frame["epoch"], frame["train_loss"], "o-", label="training")
    left.plot(frame["epoch"], frame["val_loss"], "s--", label="validation")
    top = 1.1 * frame[["train_loss", "val_loss"]].to_numpy().max()
    left.set(xlabel="epoch", ylabel="cross-entropy", ylim=(0, top))
    right.plot(frame["epoch"], frame["val_auroc"], "s--", color="C1")
    right.set(xlabel="epoch", ylabel="validation AUROC")
    for axes in (left, right):
        axes.axvline(history.best.epoch, color="0.6", linewidth=1, label="weights kept")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    target = folder / "history.png"
    panel.savefig(target, dpi=120, metadata={SOURCE_KEY: digest(folder / "history.json")})
    return target


def draw_phantoms(target: Path) -> Path:
    """Draw a contact sheet: four phantoms of each class."""
    from matplotlib.figure import Figure

    phantoms = SyntheticChestXray(24, classes=("normal", "pneumonia", "covid19"))
    sheet = Figure(figsize=(8, 6.4), layout="constrained")
    grid = sheet.subplots(3, 4)
    for row, label in zip(grid, phantoms.classes, strict=True):
        # One image per patient: a patient's next one hardly differs on a small print.
        first = {s.patient_id: s for s in reversed(phantoms.samples) if s.label == label}
        for axes, patient in zip(row, sorted(first), strict=False):
            sample = first[patient]
            axes.imshow(sample.read(sample, None), cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[], title=label)
    sheet.savefig(target, dpi=80)
    return target


def main() -> None:
    draw_phantoms(DOCS / "phantoms.png")
    results = load(RESULTS)
    fill(DOCS.parent / "README.md", {"results": readme_block(results)})
    (DOCS / "baseline.md").write_text(baseline_page(results), encoding="utf-8")
    fill(DOCS / "shortcuts.md", {"thumbnails": thumbnail_block()})
    draw_history(RESULTS)
    import generate_audits
    import generate_engines
    import generate_export
    import generate_growth
    import generate_metrics
    import generate_model
    import generate_planted
    import generate_training
    import generate_tried

    generate_model.write_pages()
    generate_tried.write_blocks()
    generate_audits.write_pages()
    generate_engines.write_pages()
    generate_export.write_page()
    generate_growth.write_pages()
    generate_metrics.write_page()
    generate_planted.write_page()
    generate_training.write_page()


if __name__ == "__main__":
    main()
