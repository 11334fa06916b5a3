"""Write what was tried, ``docs/results/default/tried.json``, out of run directories.

    python recipes/list_tried.py --data ../shared/data --run runs/default

A row for each finished stage of the run, for further runs that ``--also`` names, and for the
published weights, all on the same held-out patients. What a row was trained with comes from its own
config; what a directory does not hold (an idea that left no weights) cannot be listed. Rows of
further runs and stages that an earlier table has stay if it was measured on the same, as its note
and columns say: the run is not asked for again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from collection import once
from judge_default import MOST_PER_CLASS, held_out, write
from measure_fills import PAIRINGS, PARTS, Cells, Change, covers
from train_default import STAGES, open_split

from chestxray_covid import ChestXrayDataset, Classifier, History
from chestxray_covid.checkpoint import CONFIG_NAME
from chestxray_covid.files import read_json
from chestxray_covid.hub import BUNDLED, DEFAULT_MODEL

NAMES = {"cohen": "Cohen", "hannover": "Hannover", "kermany": "Kermany", "nih": "NIH"}
COLUMNS = (
    "Weights",
    "Validation AUROC, accuracy",
    *(f"Frame: {NAMES[one]} against {NAMES[other]}" for one, other in PAIRINGS),
    "Cohen against NIH, whole",
    "Inside Cohen",
    "Inside Cohen, against pneumonia alone",
    "Inside NIH, pneumonia against normal",
)
CHANGES: dict[Any, Change] = {"whole": lambda image: image, **covers("mean")}
#: What the name of the published weights' row ends in.
PUBLISHED = ", published"
#: Options that say what was tried, where they are not 0.
TOLD = {
    "hide_centre": "of centres hidden",
    "swap_frame": "of frames swapped",
    "swap_background": "of backgrounds swapped",
    "mixup": "mixup",
    "ema_decay": "EMA",
}


def describe(training: Mapping[str, Any]) -> str:
    """Return the options of a run in words.

    >>> describe({"preprocess": {"size_px": 160}, "epochs": 9, "learning_rate": 0.0015})
    '160 px, 9 epochs, rate 0.0015'
    """
    constant = training.get("schedule") == "step" and training["step_epochs"] >= training["epochs"]
    parts = [
        f"{training['preprocess']['size_px']} px",
        f"{training['epochs']} epochs",
        f"rate {training['learning_rate']:g}{' to the end' if constant else ''}",
    ]
    parts += [f"{training[name]:g} {what}" for name, what in TOLD.items() if training.get(name)]
    if training.get("within_sources"):
        parts.append("within sources")
    return ", ".join(parts)


def validation(folder: Path) -> str:
    """Return AUROC and accuracy of the epoch that was kept."""
    path = folder / "history.json"
    if not path.is_file():
        return "not measured"
    best = History.from_dict(read_json(path)).best
    auroc = "not defined" if best.val_auroc is None else f"{best.val_auroc:.3f}"
    return f"{auroc}, {best.val_accuracy:.3f}"


def row(folder: Path, held: ChestXrayDataset, *, limit: int) -> list[str]:
    """Return the numbers of one checkpoint as a row of the table."""
    classifier = Classifier.from_pretrained(folder)
    training = classifier.config.provenance.get("training")
    what = describe(training) if training else "frame projected out, calibrated"
    cells = Cells(classifier, held, CHANGES, limit=limit)

    def auroc(one: tuple[str, str], other: tuple[str, str], change: Any) -> str:
        value = cells.auroc(one, other, change)["auroc"]["value"]
        return "not defined" if value is None else f"{value:.3f}"

    frames = [
        ", ".join(auroc((one, "covid19"), (other, "normal"), ("mean", part)) for part in PARTS)
        for one, other in PAIRINGS
    ]
    return [
        f"{folder.name}: {what}",
        validation(folder),
        *frames,
        auroc(("cohen", "covid19"), ("nih", "normal"), "whole"),
        auroc(("cohen", "covid19"), ("cohen", "others"), "whole"),
        auroc(("cohen", "covid19"), ("cohen", "pneumonia"), "whole"),
        auroc(("nih", "pneumonia"), ("nih", "normal"), "whole"),
    ]


def note(held: ChestXrayDataset, limit: int) -> str:
    def number(source: str, *labels: str) -> int:
        return sum(s.source == source and s.label in labels for s in held.samples)

    covid, other = number("cohen", "covid19"), number("cohen", "pneumonia")
    nih = f"{number('nih', 'pneumonia')} against {number('nih', 'normal')}"
    return (
        "AUROC of p(covid19) / (p(covid19) + p(normal)), inside Cohen of p(covid19), against "
        "pneumonia alone of p(covid19) / (p(covid19) + p(pneumonia)), inside NIH of p(pneumonia) / "
        "(p(pneumonia) + p(normal)), on patients of validation "
        "and test. The frame: COVID-19 of one source against normals of another "
        "with the central 70 % and 90 % of the side hidden under the image's mean, at most "
        f"{limit} images of a source and label. Inside Cohen: {covid} COVID-19 against "
        f"{other + number('cohen', 'normal')} others, {other} of them pneumonia. Inside NIH: {nih}."
    )


def finished(run: Path, also: Sequence[Path]) -> list[Path]:
    """Return the folders with weights, in order."""
    places = [*(run / stage.name for stage in STAGES), *also]
    return [place for place in places if (place / CONFIG_NAME).is_file()]


def kept(earlier: Path, table: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of runs that an earlier table has and a new one has not.

    Args:
        earlier: Its file, which need not be there.
        table: The new one; a table of other images or columns keeps no row.
    """
    found = read_json(earlier) if earlier.is_file() else {}
    if any(found.get(key) != table[key] for key in ("note", "columns")):
        return []
    own = {name_of(row) for row in table["rows"]}
    rows = (row for row in found["rows"] if name_of(row) not in own)
    return [[row[0].removesuffix(PUBLISHED), *row[1:]] for row in rows]


def name_of(row: Sequence[str]) -> str:
    return row[0].partition(":")[0]


def in_order(rows: Sequence[list[str]]) -> list[list[str]]:
    """Return the rows of stages first, in the order of the recipe."""
    places = {stage.name: place for place, stage in enumerate(STAGES)}
    return sorted(rows, key=lambda row: places.get(name_of(row), len(places)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    parser.add_argument("--also", type=Path, action="append", default=[])
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED / DEFAULT_MODEL)
    parser.add_argument("--output", type=Path, default=Path("docs/results/default"))
    parser.add_argument("--limit", type=int, default=MOST_PER_CLASS, help="per source and label")
    options = parser.parse_args()
    held = once(held_out(open_split(options.data, options.run)))
    places = [*finished(options.run, options.also), options.checkpoint]
    rows = [row(place, held, limit=options.limit) for place in places]
    rows[-1][0] += PUBLISHED
    content = {"note": note(held, options.limit), "columns": list(COLUMNS), "rows": rows}
    earlier = kept(options.output / "tried.json", content)
    content["rows"] = [*in_order([*earlier, *rows[:-1]]), rows[-1]]
    write(options.output, "tried", content)


if __name__ == "__main__":
    main()
