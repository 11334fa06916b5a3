"""Write the pages about audits: one per model, and what they say side by side.

Called by ``generate.py``; reads ``audit.json`` and ``evaluation.json`` of ``docs/results/baseline``
and ``docs/results/default``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from generate import DOCS, SOURCE_KEY, digest, shown, table, wrapped

from chestxray_covid import AuditReport, EvaluationReport, plot_audit, plot_roc
from chestxray_covid.audit_report import AuditFinding, AuditItem

RESULTS = DOCS / "results"
#: Folder of the results → what the model is called.
MODELS = {
    "baseline": "the classic design, two sources",
    "default": "the bundled model, four sources",
}
#: What a reader has to know of a model, and of its audit, to weigh the answers.
TRAINED = {
    "baseline": """
        It was audited by an earlier state of the audit, and its weights were not kept: its
        intervals are those of the patient bootstrap, not DeLong's, and its thresholds those that
        the table names, not all of which are today's.""",
    "default": """
        In training it was shown frames of other images, and images with the centre hidden, for
        which it was to say nothing (`swap_frame`, `hide_centre`), and what tells the sources'
        classes apart in the latter was projected out of its last layer. The lungs hidden is much
        like that, so that it says less of this model than of one that never saw such images.
        Cohen's copies of Hannover's radiographs count once here.""",
}
SPOKEN = {"pass": "pass", "warn": "warn", "fail": "**fail**", "not_assessable": "not assessable"}


def write_pages() -> None:
    """Write a page per audit, the page that compares them, and their figures."""
    for name in MODELS:
        (DOCS / f"audit_{name}.md").write_text(audit_page(name), encoding="utf-8")
        draw(name)
    (DOCS / "why_99.md").write_text(why_page(), encoding="utf-8")
    draw_roc()


def load(name: str) -> AuditReport:
    return AuditReport.load(RESULTS / name / "audit.json")


def draw(name: str) -> Path:
    """Draw an audit's page as a figure."""
    target, source = RESULTS / name / "audit.png", RESULTS / name / "audit.json"
    plot_audit(load(name)).savefig(target, dpi=110, metadata={SOURCE_KEY: digest(source)})
    return target


def draw_roc() -> Path:
    """Draw the baseline's ROC curve, which looks perfect."""
    folder = RESULTS / "baseline"
    curve = EvaluationReport.load(folder / "evaluation.json").roc_curve()
    target = folder / "roc.png"
    metadata = {SOURCE_KEY: digest(folder / "evaluation.json")}
    plot_roc(curve).savefig(target, dpi=110, metadata=metadata)
    return target


def subject(report: AuditReport) -> str:
    """Return in words what was audited."""
    return (
        f"{report.positive} against {report.negative} on {report.n_images} radiographs of "
        f"{report.n_patients} patients from {', '.join(report.sources)}"
    )


def audit_page(name: str) -> str:
    """Return the page of one audit."""
    report = load(name)
    head = f"""
        Verdict: {SPOKEN[report.verdict]} ({report.summary}). Audited: {subject(report)}, none of
        which the model was trained on, with intervals at {report.confidence:.0%} by patient.
        [Audit](audit.md) says what is asked, and how to ask it of your own model;
        [Why 99 % means nothing here](why_99.md) compares the two models.
        {TRAINED.get(name, "")}"""
    items = "\n\n".join(section(number, item) for number, item in enumerate(report.items, 1))
    return f"""\
<!-- Written by docs/generate.py from docs/results/{name}/audit.json: do not edit. -->

# Audit of {MODELS[name]}

{wrapped(head)}

![Verdicts and numbers of the audit](results/{name}/audit.png)

{items}
"""


def section(number: int, item: AuditItem) -> str:
    """Return what an audit says to one question."""
    return "\n\n".join(parts(number, item))


def parts(number: int, item: AuditItem) -> Iterator[str]:
    yield f"## {number}. {item.question} {SPOKEN[item.verdict].strip('*').capitalize()}"
    yield wrapped(item.reason)
    yield wrapped(f"Where verdicts begin: {item.threshold} ({item.threshold_source}).")
    if item.findings:
        rows = [(f.what, f.metric, shown(f.estimate), change(f), f.meaning) for f in item.findings]
        yield table(("What", "Number", "Value", "Change", "Meaning"), rows)
    for title, counts in item.tables.items():
        yield f"{title.capitalize()}:"
        columns = list(next(iter(counts.values())))
        yield table(("", *columns), [(row, *own.values()) for row, own in counts.items()])


def change(finding: AuditFinding) -> str:
    e = finding.change
    if e is None or e.value != e.value:
        return ""
    return f"{e.value:+.3f} ({e.low:+.3f} to {e.high:+.3f})"


def why_page() -> str:
    """Return the page that says what 99 % is worth, with both audits side by side."""
    reports = {name: load(name) for name in MODELS}
    judged = EvaluationReport.load(RESULTS / "baseline" / "evaluation.json")
    own = judged.overall.per_class[judged.positive]["auroc"]
    accuracy = judged.overall.metrics["accuracy"]
    first = f"""
        A DenseNet-121, trained on Cohen's COVID-19 radiographs and Kermany's normal ones, split by
        patient, judged on {judged.n_images} radiographs of {judged.n_patients} patients that it
        never saw: AUROC {shown(own)}, accuracy {shown(accuracy)}. It is the design, and the
        result, of many a paper. The audit of the same model on the same radiographs says what
        that is worth."""
    rows = [
        (
            f"{number}. {item.question}",
            *(SPOKEN[report.item(item.name).verdict] for report in reports.values()),
        )
        for number, item in enumerate(reports["baseline"].items, 1)
    ]
    verdicts = ("All together", *(SPOKEN[r.verdict] for r in reports.values()))
    reasons = "\n".join(
        f"- **{item.question}** {flowing(item.reason)}"
        for item in reports["baseline"].items
        if item.verdict == "fail"
    )
    links = " and ".join(f"[{what}](audit_{name}.md)" for name, what in MODELS.items())
    return f"""\
<!-- Written by docs/generate.py from docs/results/*/audit.json: do not edit. -->

# Why 99 % means nothing here

{wrapped(first)}

![ROC curve of the classic design on held-out patients](results/baseline/roc.png)

{table(("Question", *MODELS.values()), [*rows, verdicts])}

What the audit holds against the classic design:

{reasons}

The curve is not wrong. It answers another question: how well the two collections can be told apart.
Held-out patients come from the same two collections, so no split, however careful, shows the
difference. More sources, and training that hides centres and swaps frames, help with some of it, as
the audit of the bundled model shows.

A model that fails an item may still see the disease; these data cannot show it. What can is a
hospital that has both classes and was in no training source.

With all numbers and figures: {links}. [Shortcuts](shortcuts.md) tells the background.
"""


def flowing(text: str) -> str:
    return " ".join(text.split())
