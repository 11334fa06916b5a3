"""The model card, in the Hub's format, made from a checkpoint's config and results.

Everything that comes from data (names of sources, texts in the provenance) is escaped: it can
neither end a table's row nor bring headings, lists, links, pictures or HTML into the page.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chestxray_covid.audit_report import AuditReport
from chestxray_covid.card_metadata import METRICS, front_matter, stated_licence
from chestxray_covid.checkpoint import ModelConfig, load_config
from chestxray_covid.evaluation_report import EvaluationReport
from chestxray_covid.intervals import Estimate, proportion
from chestxray_covid.reporting import CAUTION, counted, foreign_text, told_of
from chestxray_covid.results import Results, read_results
from chestxray_covid.subgroups import SMALL

_QUESTION = ("normal", "covid19")
_BINS = 10
#: Longest note to a table: what has to be known of its numbers must not be cut off.
_NOTE_CHARS = 10_000
#: What the columns of :func:`decisions` are.
DECISIONS = (
    "Tested on",
    "COVID-19 called positive (sensitivity)",
    "normal called negative (specificity)",
    "others called positive",
)
_MADE = "<!-- Made by chestxray-covid, which makes it again unless it was changed: {} -->\n"


def model_card(
    folder: Path, name: str, *, license: str | None = None, figure: str | None = None
) -> str:
    """Return the text of ``README.md`` for a checkpoint.

    Args:
        folder: Holds the checkpoint, and ``evaluation.json``, ``audit.json`` and
            ``measurements.json`` if there are any. The last holds further tables, each an object
            with ``title``, ``note``, ``head`` (texts) and ``rows`` (lists of texts).
        name: Repository or folder, for the title and the snippets.
        license: Identifier of a licence; if not given, ``license`` of the config's provenance.
        figure: File name of the calibration figure, if there is one.

    Raises:
        CheckpointError: If the config is missing or damaged.
        ReportError: If a result is damaged, or was measured on other weights.
    """
    config = load_config(folder)
    return compose(config, read_results(folder, config), name, license=license, figure=figure)


def compose(
    config: ModelConfig,
    results: Results,
    name: str,
    *,
    license: str | None = None,
    figure: str | None = None,
) -> str:
    """Return the text of :func:`model_card` for a config and results at hand."""
    parts = [
        front_matter(config, results.evaluation, name, license),
        _introduction(config, name),
        _licences(config, license),
        _data(config),
        *_measurements(results),
        "\n".join(_results(results.evaluation, figure)),
        _decisions(results.evaluation, config),
        _audit(results.audit),
        _facts("Known failures", config.provenance.get("known_failures")),
        _loading(config, name),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n\n"
    return text + _MADE.format(_digest(text))


def is_generated(card: str) -> bool:
    """Return whether a card is one that :func:`model_card` made and nobody changed."""
    text, mark, rest = card.replace("\r\n", "\n").rpartition(_MADE.partition("{")[0])
    return bool(mark) and mark + rest == _MADE.format(_digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def calibration_figure(report: EvaluationReport | None) -> bytes | None:
    """Return a PNG: how often a score came true; ``None`` without predictions to draw it from."""
    if report is None or report.predictions is None:
        return None
    from matplotlib.figure import Figure

    diagram = report.reliability(report.positive, n_bins=_BINS)
    drawing = Figure(figsize=(4, 4), layout="constrained")
    axes = drawing.add_subplot(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.plot([0, 1], [0, 1], ":", color="grey")
    axes.plot(diagram.predicted, [share.value for share in diagram.observed], "o-")
    axes.set_xlabel(f"predicted probability of {report.positive}")
    axes.set_ylabel("share that has it")
    axes.set_title(f"Calibration, {diagram.counts.sum()} images")
    stream = io.BytesIO()
    drawing.savefig(stream, format="png", dpi=100)
    return stream.getvalue()


def _introduction(config: ModelConfig, name: str) -> str:
    return f"""# {foreign_text(name)}

DenseNet-121 on chest radiographs, {config.preprocess.size_px} px, classes
{", ".join(map(foreign_text, config.classes))}.

**This is not a medical device.** It makes no diagnosis and must not be used for any decision about
a patient.

## Intended use

Research and teaching on frontal chest radiographs: to study how such models work, where they fail,
and whether they read lungs or the data set. Out of scope: diagnosis, triage, screening, other
modalities and views, and children where the training data have none.

The operating threshold on p(covid19) / (p(covid19) + p(normal)) is {config.threshold:.4g}; it comes
from: {foreign_text(config.threshold_origin)}."""


def _licences(config: ModelConfig, license: str | None) -> str:
    stated = foreign_text(stated_licence(config, license)) or "not stated"
    return f"""## Licences

Of the weights: {stated}. Of chestxray-covid, the code that made this card and loads them: MIT."""


def _data(config: ModelConfig) -> str:
    elsewhere = {"license", "headline", "known_failures"}
    rest = {k: v for k, v in told_of(config.provenance).items() if k not in elsewhere}
    return _facts("Data and training", rest)


def _facts(title: str, content: Any) -> str:
    """Return a section with JSON data as nested lists; nothing if there are none."""
    if not content:
        return ""
    return "\n".join([f"## {title}\n", *_items(content, 0)])


def _items(content: Any, depth: int) -> Iterator[str]:
    indent = "  " * depth
    if isinstance(content, Mapping):
        for key, value in content.items():
            label = foreign_text(str(key).replace("_", " "))
            if isinstance(value, Mapping | list | tuple) and value:
                yield f"{indent}- {label}:"
                yield from _items(value, depth + 1)
            else:
                yield f"{indent}- {label}: {foreign_text(value)}"
    elif isinstance(content, list | tuple):
        for value in content:
            if isinstance(value, Mapping | list | tuple):
                yield f"{indent}- {foreign_text(json.dumps(value))}"
            else:
                yield f"{indent}- {foreign_text(value)}"
    else:
        yield f"{indent}{foreign_text(content)}"


def _results(report: EvaluationReport | None, figure: str | None) -> Iterator[str]:
    yield "## Results\n"
    if report is None:
        yield "This model has not been evaluated."
        return
    yield (
        f"{report.n_images} images of {report.n_patients} patients; "
        f"{foreign_text(report.positive)} against the other classes, with intervals at "
        f"{100 * report.confidence:g}%, by patient. A dash is a number that is not defined there, "
        f"a star marks fewer than {SMALL} images: what rests on them says next to nothing.\n"
    )
    if report.confounded:
        yield f"**{CAUTION}**\n"
    positive = foreign_text(report.positive)
    yield f"| Tested on | {positive} | Others | Patients | {' | '.join(METRICS)} |"
    yield f"| --- | --- | --- | --- |{' --- |' * len(METRICS)}"
    for part in report.subgroups:
        numbers = [_number(part.per_class[report.positive].get(metric)) for metric in METRICS]
        where = "all" if part.group == "overall" else f"{part.group}: {part.name}"
        own = part.counts[report.positive]
        counts = [foreign_text(counted(n)) for n in (own, part.n_images - own)]
        cells = [foreign_text(where), *counts, str(part.n_patients), *numbers]
        yield f"| {' | '.join(cells)} |"
    yield ""
    for metric, estimate in report.overall.metrics.items():
        yield f"- {foreign_text(metric)}: {_number(estimate)}"
    if figure:
        yield f"\n![Predicted probability against the share that came true]({figure})"


def decisions(report: EvaluationReport | None, threshold: float) -> list[list[str]]:
    """Return what a threshold on p(covid19) / (p(covid19) + p(normal)) decides, per source.

    Args:
        report: With predictions; there are no rows without, or without the two classes.
        threshold: A case is called positive from here on.

    Returns:
        A row for all images and one per source: where, share of COVID-19 that is called positive,
        of normals that are not, and of images of any other class that are, each with its interval.
    """
    if report is None or report.predictions is None or not {*_QUESTION} <= {*report.classes}:
        return []
    import numpy as np

    table = report.predictions
    normal, covid = (table[f"p_{name}"].to_numpy(float) for name in _QUESTION)
    total = normal + covid
    # Where both are 0 the model has no opinion between the two, as in Prediction.score.
    called = np.where(total > 0, covid / np.where(total > 0, total, 1), 0.5) >= threshold
    label, source = table["label"].to_numpy(str), table["source"].to_numpy(str)
    patients = table["patient_group"].to_numpy(str)
    how = {"n_resamples": report.n_resamples, "seed": report.seed}

    def share(hits: Any, among: Any) -> str:
        found = proportion(hits[among], patients[among], confidence=report.confidence, **how)
        return f"{_number(found)}, n = {found.n}" if found.n else "–"

    rows = []
    for where in ("all", *sorted(set(source))):
        here = (source == where) | (where == "all")
        others = here & ~np.isin(label, _QUESTION)
        shares = (
            share(called, here & (label == "covid19")),
            share(~called, here & (label == "normal")),
            share(called, others),
        )
        rows.append([where, *shares])
    return rows


def _decisions(report: EvaluationReport | None, config: ModelConfig) -> str:
    rows = decisions(report, config.threshold)
    if not rows:
        return ""
    lines = [
        DECISIONS,
        ["---"] * len(DECISIONS),
        *([foreign_text(cell) for cell in row] for row in rows),
    ]
    drawn = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"## At the stored threshold\n\nDecisions at {config.threshold:.4g}, which answers one "
        "question only, COVID-19 or normal: what it makes of other findings is in the last column."
        f"\n\n{drawn}"
    )


def _measurements(results: Results) -> Iterator[str]:
    """Yield a section for each further table."""
    for table in results.tables:
        head = [foreign_text(cell) for cell in table["head"]]
        lines = [
            head,
            ["---"] * len(head),
            *([foreign_text(c) for c in row] for row in table["rows"]),
        ]
        drawn = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        note = foreign_text(table["note"], _NOTE_CHARS)
        yield f"## {foreign_text(table['title'])}\n\n{note}\n\n{drawn}"


def _audit(report: AuditReport | None) -> str:
    if report is None:
        return "## Audit\n\nThis model has not been audited for shortcuts."
    rows = [
        f"| {' | '.join(map(foreign_text, (item.question, item.verdict, item.reason)))} |"
        for item in report.items
    ]
    head = f"Shortcut audit of {report.n_images} images of {report.n_patients} patients"
    return "\n".join(
        [
            f"## Audit\n\n{head}: **{foreign_text(report.verdict)}**.\n",
            "| Question | Verdict | Why |\n| --- | --- | --- |",
            *rows,
        ]
    )


def _loading(config: ModelConfig, name: str) -> str:
    quoted = _quoted(name)
    others = f"""model = timm.create_model({_quoted(f"hf-hub:{name}")}, pretrained=True).eval()
classify = pipeline("image-classification", model={quoted})"""
    if "/" not in name:  # no repository: a bundled model or a folder, which they open by its path
        others = f"""folder = str(chestxray_covid.resolve({quoted}))
model = timm.create_model(f"local-dir:{{folder}}", pretrained=True).eval()
classify = pipeline("image-classification", model=folder)"""
    restricted = ""
    if {*_QUESTION} < {*config.classes}:
        restricted = f"""

# COVID-19 or healthy: the same network, its probabilities renormalised over two classes.
two = Classifier.from_pretrained({quoted}, classes={json.dumps(_QUESTION)})"""
    return f"""## How to load it

```python
from chestxray_covid import Classifier

classifier = Classifier.from_pretrained({quoted})
print(classifier.predict("radiograph.png")){restricted}
```

With timm, and with transformers (these apply neither the input checks nor the threshold):

```python
import chestxray_covid
import timm
from transformers import pipeline

{others}
```

Grey radiographs have to be given as three equal channels; {config.preprocess.size_px} px, squashed
to a square, mean {config.preprocess.mean:g} and deviation {config.preprocess.std:g}."""


def _number(estimate: Estimate | None) -> str:
    if estimate is None or estimate.value != estimate.value:
        return "–"
    return f"{estimate.value:.3f} ({estimate.interval})"


def _quoted(name: str) -> str:
    """Return a name as Python's source code says it."""
    return json.dumps(name, ensure_ascii=not name.isprintable())
