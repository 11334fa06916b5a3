"""Write what README and documentation say of the bundled weights, from their measured results.

Called by ``generate.py``; reads ``docs/results/default/*.json``, which ``recipes/judge_default.py``
and ``recipes/publish_default.py`` leave, and the numbers beside the bundled weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from generate import (
    DOCS,
    fill,
    shown,
    source_table,
    table,
    wrapped,
)
from generate_gate import GATE_HEAD, draw_gate, gate_rows, reduction_block, save
from generate_relatives import (
    GATE_INTERVALS,
    RESULTS,
    about_relatives,
    estimate,
    frame_caveat,
    honest_rows,
    made,
    pair,
    read,
    unmeasured,
)

from chestxray_covid import EvaluationReport
from chestxray_covid.card import DECISIONS, decisions
from chestxray_covid.lung_maps import WEIGHTS


def write_pages() -> None:
    """Write the lungs' and the model's numbers into README and documentation."""
    fill(DOCS / "lungs.md", {"lungs": lungs_block()})
    fill(DOCS / "gate.md", {"reduction": reduction_block()})
    fill(DOCS.parent / "README.md", {"model": model_block()})
    (DOCS / "model.md").write_text(model_page(), encoding="utf-8")
    draw_reliability()
    draw_stages()
    draw_gate()


def frame_rows() -> list[tuple[Any, ...]]:
    """Return how well the weights tell sources apart with the centre hidden."""
    cells: dict[tuple[str, str], dict[float, Any]] = {}
    for row in read("frame")["rows"]:
        cells.setdefault((row["covid19"], row["normal"]), {})[row["hidden"]] = row
    return [
        (
            f"{one} COVID-19, {other} normal",
            pair(parts[0.0]["n"]),
            *(estimate(parts[part]["auroc"]) for part in (0.0, 0.7, 0.9)),
        )
        for (one, other), parts in cells.items()
    ]


def calibration_rows() -> list[list[str]]:
    """Return calibration on test patients before and after the temperature."""
    found = read("calibration")
    names = {
        "ece": "ECE",
        "ece_balanced": "ECE, every class counting alike",
        "brier": "Brier score",
        "brier_balanced": "Brier score, every class counting alike",
    }
    sides = (found["before"], found["after"])
    return [[title, *(estimate(side[k]) for side in sides)] for k, title in names.items()]


def model_block() -> str:
    """Return what README says of the bundled weights."""
    report = EvaluationReport.load(RESULTS / "evaluation.json")
    ours = table(("AUROC", "Images", "Value"), honest_rows())
    pooled = report.overall.per_class["covid19"]
    text = f"""
        The bundled weights (three classes, trained from random weights on four public sources:
        Cohen's radiographs from many places, Kermany's of children, Hannover's of COVID-19 alone
        and NIH's of adults) are for research. Internal numbers are no evidence: on held-out
        patients of the four sources, the AUROC of COVID-19 against normal is
        {shown(pooled["auroc_vs_normal"])}, and the sources all but give the label away. Where the
        source cannot help, or not as much, AUROCs are these (0.5 is chance):"""
    frame = f"""
        With the central 70 % or 90 % of the side hidden under the image's mean, the weights tell
        COVID-19 of one source from normals of another, on held-out patients, with an AUROC of
        {frame_range()}. {frame_caveat()} Under something else it still tells some sources apart
        ({other_fills()}).{unmeasured()} All numbers are in [The bundled model](docs/model.md)."""
    return paragraphs(wrapped(text), ours, wrapped(about_relatives()), wrapped(frame))


def paragraphs(*parts: str) -> str:
    """Return texts with a blank line between them, without those that are empty."""
    return "\n\n".join(part for part in parts if part)


def frame_range() -> str:
    values = [r["auroc"]["value"] for r in read("frame")["rows"] if r["hidden"] > 0]
    return f"{min(values):.2f} to {max(values):.2f}"


def other_fills() -> str:
    """Return the range of AUROCs where something else than the image's mean hides the centre."""
    rows = read("other_fills")["rows"]
    values = [row["auroc"]["value"] for row in rows if row["fill"] != "mean"]
    return f"{min(values):.2f} to {max(values):.2f}"


def fill_rows() -> list[list[str]]:
    """Return how well sources are told apart under each fill, a row per pairing and part."""
    found = read("other_fills")
    cells: dict[tuple[str, str, float], list[Any]] = {}
    for row in found["rows"]:
        cells.setdefault((row["covid19"], row["normal"], row["hidden"]), []).append(row)
    return [
        [
            f"{one} COVID-19, {other} normal, {part:.0%} hidden",
            pair(rows[0]["n"]),
            *(estimate(row["auroc"]) for row in rows),
        ]
        for (one, other, part), rows in cells.items()
    ]


def model_page() -> str:
    """Return the page ``docs/model.md``."""
    report = EvaluationReport.load(RESULTS / "evaluation.json")
    binary = EvaluationReport.load(RESULTS / "evaluation_binary.json")
    calibration = read("calibration")
    frame = f"""
        AUROC on held-out patients with nothing, the central 70 % and the central 90 % of the side
        hidden under the image's mean. {frame_caveat()} The [audit](audit.md) hides the lungs under
        the mean of what is left, which says nothing of their greys."""
    fills = read("other_fills")["fills"]
    met = "; ".join(f"{name}: {where}" for name, where in fills.items())
    fills_text = f"""
        The same under other fills; of a large source, other images were drawn. Where the weights
        met each of them: {met}."""
    threshold = calibration["threshold"]
    calibrated = table(("", "before", "after"), calibration_rows())
    gate = table(("Held-out images", *GATE_HEAD), gate_rows())
    fitted = f"""
        [The input gate](gate.md) says what each flag means. It was fitted on other images of the
        kinds that the table names, but for these, which it never met:
        {", ".join(read("gate")["never_fitted"])}. What it nearly flags it looks at again, with the
        lungs in sight; beside it stands a gate that does not. {GATE_INTERVALS}"""
    temperature = f"""
        The temperature {calibration["temperature"]:.3f} was fitted on validation patients and is
        folded into the last layer, so that every engine and every other library sees the same
        probabilities. The threshold {calibration["threshold"]:.3f} of p(covid19) / (p(covid19) +
        p(normal)) was chosen for {calibration["threshold_origin"]}."""
    decided = f"""
        What {threshold:.3f} of p(covid19) / (p(covid19) + p(normal)) decides on these patients, per
        source. It answers one question only, COVID-19 or normal; what it makes of other findings
        is in the last column."""
    inside = f"""
        Of patients that training never saw, with intervals at 95 % by patient; 0.5 is chance. Only
        rows that end in "held-out patients" are of the weights themselves, which have seen most of
        what the others ask for. Inside Cohen's collection the website that an image comes from
        gives much of the label away, and a network can learn that, too: compare the folds with the
        row that looks at no image, with the one that never learned, and with websites and countries
        that were left out of training.{unmeasured()}"""
    honest = paragraphs(
        wrapped(inside),
        table(("AUROC", "Images", "Value"), honest_rows()),
        wrapped(about_relatives()),
        wrapped(made()),
    )
    pooled = f"""
        {report.n_images} radiographs of {report.n_patients} patients that training never saw, of
        the same four sources. The source all but gives the label away here: these numbers cannot
        tell disease from source."""
    return f"""\
<!-- Written by docs/generate.py from docs/results/default/*.json: do not edit. -->

# The bundled model

```{{warning}}
It is not a medical device. The weights are for research only (CC BY-NC-SA 4.0), and nothing that
they say is a diagnosis.
```

DenseNet-121 with the classes `normal`, `pneumonia` (any other than COVID-19) and `covid19`, trained
from random weights on four public sources by `recipes/train_default.py`. What was tried on the way
is in `recipes/README.md`.

```python
from chestxray_covid import Classifier

classifier = Classifier.from_pretrained()
print(classifier.predict("data/phantoms/covid19/00002_000002.png"))
two = Classifier.from_pretrained(classes=("normal", "covid19"))  # the same network, renormalised
```

## Where the source cannot help, or not as much

{honest}

## Does it read the frame?

{wrapped(frame)}

{table(("Pairing", "Images", "whole", "70 % hidden", "90 % hidden"), frame_rows())}

{wrapped(fills_text)}

{table(("Pairing", "Images", *fills), fill_rows())}

## On held-out patients of the same sources

{wrapped(pooled)}

{source_table(report)}

Restricted to `normal` and `covid19`:

{source_table(binary)}

## At the stored threshold

{wrapped(decided)}

{table(DECISIONS, decisions(report, threshold))}

## Calibration

{wrapped(temperature)}

{calibrated}

![Share that is right against the probability of the label](results/default/reliability.png)

## The input gate

{wrapped(fitted)}

![Share of each kind of image that is refused](results/default/gate.png)

{gate}

## Training

![Validation AUROC and losses over the stages](results/default/history.png)
"""


def lungs_block() -> str:
    """Return how good the lung segmenter is."""
    about = json.loads(WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    worst, tenth, quarter, median = about["dice_quantiles"]
    return wrapped(
        f"""
        On {about["test_images"]} radiographs of {about["test_patients"]} patients of Cohen's that
        it was not trained on, the mean Dice coefficient with the annotated masks is
        {estimate(about["dice"])}; the worst is {worst:.2f}, a tenth lies below {tenth:.2f}, a
        quarter below {quarter:.2f}, half below {median:.2f}. The masks are drawings of another
        model (lungVAE), not of a reader. It was trained on {about["train_images"]} others of
        Cohen's. Of every source and label, children's (Kermany) and adults', up to a dozen outlines
        were looked at, not measured: nearly all follow the lungs; where an opacity hides a border
        they are ragged, or leave a part out."""
    )


def draw_reliability() -> Path:
    """Draw how often the label is right, by its probability."""
    from matplotlib.figure import Figure

    rows = read("calibration")["reliability"]
    panel = Figure(figsize=(4, 3.6), layout="constrained")
    axes = panel.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axes.plot([r["confidence"] for r in rows], [r["accuracy"] for r in rows], "o-")
    for r in rows:
        axes.annotate(
            f"n = {r['n']}",
            (r["confidence"], r["accuracy"]),
            textcoords="offset points",
            xytext=(6, -10),
            fontsize=7,
        )
    axes.set(
        xlabel="probability of the label", ylabel="share that is right", xlim=(0.3, 1), ylim=(0, 1)
    )
    axes.spines[["top", "right"]].set_visible(False)
    return save(panel, "reliability", "calibration")


def draw_stages() -> Path:
    """Draw losses and validation AUROC over all stages."""
    from matplotlib.figure import Figure

    panel = Figure(figsize=(8, 3), layout="constrained")
    left, right = panel.subplots(1, 2)
    start = 0
    for stage in read("history")["stages"]:
        epochs = stage["epochs"]
        x = [start + e["epoch"] for e in epochs]
        left.plot(x, [e["train_loss"] for e in epochs], "o-", color="C0", markersize=3)
        left.plot(x, [e["val_loss"] for e in epochs], "s--", color="C1", markersize=3)
        right.plot(x, [e["val_auroc"] for e in epochs], "s--", color="C1", markersize=3)
        for axes in (left, right):
            axes.axvline(start + 0.5, color="0.85", linewidth=1)
            axes.text(start + 0.7, 1.01, stage["stage"], transform=axes.get_xaxis_transform())
        start = x[-1]
    left.set(xlabel="epoch", ylabel="cross-entropy", ylim=(0, 2.1))
    left.legend(["training", "validation"], frameon=False)
    right.set(xlabel="epoch", ylabel="validation AUROC")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return save(panel, "history", "history")
