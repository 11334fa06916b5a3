"""What of CLAIM and TRIPOD+AI an evaluation can fill in by itself.

The topics are named in short; what each item asks for is in the papers: Tejani et al., Checklist
for Artificial Intelligence in Medical Imaging (CLAIM): 2024 update, Radiology: Artificial
Intelligence 6 (2024) e240300; Collins et al., TRIPOD+AI statement, BMJ 385 (2024) e078378.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from chestxray_covid._version import NOT_A_DEVICE
from chestxray_covid.reporting import (
    CAUTION,
    markdown_results,
    markdown_table,
)
from chestxray_covid.subgroups import SMALL, Subgroup

if TYPE_CHECKING:
    from chestxray_covid.evaluation_report import EvaluationReport

NOT_REPORTED = "not reported"
#: Without these a report's model is not described.
_MODEL_FIELDS = {
    *("architecture", "classes", "preprocess", "weights_sha256", "chestxray_covid_version")
}

_CLAIM = {
    "1": "Identification as a study of AI",
    "2": "Abstract",
    "3": "Background",
    "4": "Aims and hypotheses",
    "5": "Prospective or retrospective",
    "6": "Study goal",
    "7": "Data sources",
    "8": "Inclusion and exclusion criteria",
    "9": "Preprocessing",
    "10": "Selection of data subsets",
    "11": "De-identification",
    "12": "Missing data",
    "13": "Image acquisition",
    "14": "Definition of the reference standard",
    "15": "Rationale of the reference standard",
    "16": "Source of the annotations",
    "17": "Annotation of the test set",
    "18": "Variability between and within raters",
    "19": "Assignment to partitions",
    "20": "Level at which partitions are disjoint",
    "21": "Intended sample size",
    "22": "Model",
    "23": "Software",
    "24": "Initialisation of the parameters",
    "25": "Training",
    "26": "Selection of the final model",
    "27": "Ensembling",
    "28": "Metrics",
    "29": "Significance and uncertainty",
    "30": "Robustness or sensitivity analysis",
    "31": "Explainability",
    "32": "Evaluation on internal data",
    "33": "Testing on external data",
    "34": "Trial registration",
    "35": "Patients and images included and excluded",
    "36": "Demographic and clinical characteristics",
    "37": "Performance and uncertainty",
    "38": "Diagnostic performance and its precision",
    "39": "Failure analysis",
    "40": "Limitations",
    "41": "Implications for practice",
    "42": "Study protocol",
    "43": "Availability of software, model and data",
    "44": "Funding",
}
_TRIPOD = {
    "1": "Title",
    "2": "Abstract",
    "3a": "Healthcare context",
    "3b": "Target population",
    "3c": "Known health inequalities",
    "4": "Objectives",
    "5a": "Data sources",
    "5b": "Dates of the data",
    "6a": "Setting",
    "6b": "Eligibility",
    "6c": "Treatments",
    "7": "Data preparation",
    "8a": "Outcome",
    "8b": "Outcome assessors",
    "8c": "Blinding of the outcome",
    "9a": "Choice of predictors",
    "9b": "Predictors",
    "9c": "Predictor assessors",
    "10": "Sample size",
    "11": "Missing data",
    "12a": "Use of the data",
    "12b": "Handling of predictors",
    "12c": "Model building",
    "12d": "Heterogeneity across clusters",
    "12e": "Performance measures",
    "12f": "Model updating",
    "12g": "How predictions are computed",
    "13": "Class imbalance",
    "14": "Fairness",
    "15": "Model output",
    "16": "Training against evaluation data",
    "17": "Ethical approval",
    "18a": "Funding",
    "18b": "Conflicts of interest",
    "18c": "Protocol",
    "18d": "Registration",
    "18e": "Data sharing",
    "18f": "Code sharing",
    "19": "Patient and public involvement",
    "20a": "Flow of participants",
    "20b": "Characteristics of participants",
    "20c": "Comparison with the development data",
    "21": "Participants and outcomes",
    "22": "Full model",
    "23a": "Performance, with subgroups",
    "23b": "Heterogeneity of the performance",
    "24": "Results of updating",
    "25": "Interpretation",
    "26": "Limitations",
    "27a": "Poor or missing input",
    "27b": "Required interaction and expertise",
    "27c": "Next steps",
}


def report_markdown(report: EvaluationReport, answers: Mapping[str, str]) -> str:
    """Return a report as Markdown: its numbers, then the two checklists.

    Args:
        report: The report.
        answers: Item, for example ``"CLAIM 14"`` → what to write there.

    Raises:
        ValueError: If there is no such item.
    """
    own = _filled_in(report)
    items = {f"CLAIM {n}": topic for n, topic in _CLAIM.items()}
    items |= {f"TRIPOD+AI {n}": topic for n, topic in _TRIPOD.items()}
    if strange := sorted(set(answers) - set(items)):
        raise ValueError(
            f"{strange} are no items: expected names like 'CLAIM 14' and 'TRIPOD+AI 8a', "
            "with the numbers of the 2024 checklists"
        )
    lines = [*markdown_results(report)]
    for title, prefix in (("CLAIM, 2024 update", "CLAIM "), ("TRIPOD+AI", "TRIPOD+AI ")):
        rows = [
            (name.removeprefix(prefix), topic, answers.get(name) or own.get(name) or NOT_REPORTED)
            for name, topic in items.items()
            if name.startswith(prefix)
        ]
        lines += ["", f"## {title}", "", *markdown_table(("Item", "Topic", "Reported"), rows)]
    return "\n".join(lines) + "\n"


def _filled_in(report: EvaluationReport) -> dict[str, str]:
    """Return item → what the report knows of it; empty where it knows nothing."""
    claim = {**_of_data(report), **_of_model(report), **_of_performance(report)}
    found = {f"CLAIM {number}": text for number, text in claim.items()}
    # What both ask for: TRIPOD+AI item → CLAIM item.
    same = {"5a": "7", "6b": "8", "7": "9", "11": "12", "12d": "30", "12e": "28", "18f": "43"}
    same |= {"20a": "35", "20b": "36", "22": "22", "23a": "37", "26": "40"}
    found |= {f"TRIPOD+AI {own}": claim.get(other, "") for own, other in same.items()}
    classes = _listed(f"{name} {count}" for name, count in report.overall.counts.items())
    others = _listed(name for name in report.classes if name != report.positive)
    outputs = f"A probability for each of {_listed(report.classes)}; the decision is the highest."
    thresholds = "; ".join(f"{p.score} >= {p.threshold!r}" for p in report.operating_points)
    found |= {
        "TRIPOD+AI 8a": f"The label {report.positive}, against {others}, as the sources give it.",
        "TRIPOD+AI 9b": "The pixels of one radiograph.",
        "TRIPOD+AI 12g": outputs,
        "TRIPOD+AI 13": f"Images by class: {classes}. No number is reweighted.",
        "TRIPOD+AI 14": _fairness(report),
        "TRIPOD+AI 15": f"{outputs} Thresholds: {thresholds}." if thresholds else outputs,
        "TRIPOD+AI 16": _training_sources(report),
        "TRIPOD+AI 20c": _training_sources(report),
        "TRIPOD+AI 21": f"Images by class: {classes}, of {report.n_patients} patients.",
        "TRIPOD+AI 23b": _by(report.by_source.values(), report.positive),
    }
    return found


def _of_data(report: EvaluationReport) -> dict[str, str]:
    images = {name: part.n_images for name, part in report.by_source.items()}
    left_out = _listed(f"{reason} {count}" for reason, count in report.excluded.items())
    included = f"Included: {report.n_images} images of {report.n_patients} patients."
    demography = [
        f"{title}: {_listed(f'{name} {part.n_images}' for name, part in parts.items())}."
        for title, parts in (("Sex", report.by_sex), ("Age in years", report.by_age))
        if parts
    ]
    classes = _listed(f"{name} {count}" for name, count in report.overall.counts.items())
    return {
        "7": f"Images by source: {_listed(f'{name} {n}' for name, n in images.items())}.",
        "8": f"Entries of the sources left out: {left_out}." if left_out else "",
        "12": "No value is imputed; an unknown view, sex or age is a subgroup of its own.",
        "13": f"Views: {_listed(f'{v} {part.n_images}' for v, part in report.by_view.items())}.",
        "35": f"{included} Left out: {left_out}." if left_out else included,
        "36": " ".join([f"Images by class: {classes}.", *demography]),
    }


def _of_model(report: EvaluationReport) -> dict[str, str]:
    model, version = report.model, report.chestxray_covid_version
    software = f"chestxray-covid {version}" if version else ""
    if not model.keys() >= _MODEL_FIELDS:
        return {"23": software}
    provenance = _provenance(report)
    size, classes = model["preprocess"]["size_px"], _listed(model["classes"])
    known = {key: provenance[key] for key in ("recipe", "seed", "training") if key in provenance}
    recipe = "; ".join(f"{key}: {_said(value)}" for key, value in known.items())
    trained = _trained_on(report)
    shared = {name: trained & {name, *report.origins.get(name, ())} for name in report.by_source}
    inside = [part for name, part in report.by_source.items() if shared[name]]
    outside = [part for name, part in report.by_source.items() if not shared[name]]
    return {
        "1": f"Deep learning, {model['architecture']}.",
        "9": f"Grey, to {size} by {size} pixels: {_said(model['preprocess'])}.",
        "22": f"{model['architecture']}; one radiograph of {size} by {size} pixels in, "
        f"probabilities of {classes} out. SHA-256 of the weights: {model['weights_sha256']}.",
        "23": f"{software}; the weights are of {model['chestxray_covid_version']}.",
        "25": recipe,
        "27": "None: one network.",
        "32": _by(inside, report.positive) if trained else "",
        "33": _by(outside, report.positive) if trained else "",
        "43": f"{software}; licence of the weights: {provenance.get('license', 'not stated')}.",
    }


def _of_performance(report: EvaluationReport) -> dict[str, str]:
    overall = report.overall
    wrong = [
        (count, f"{truth} called {called}")
        for truth, row in zip(report.classes, overall.confusion, strict=True)
        for called, count in zip(report.classes, row, strict=True)
        if truth != called and count
    ]
    errors = _listed(f"{name} {count}" for count, name in sorted(wrong, reverse=True))
    groups = _listed(dict.fromkeys(part.group for part in report.subgroups[1:]))
    small = _listed(f"{part.group} {part.name}" for part in report.subgroups if part.small)
    failures = _provenance(report).get("known_failures", ())
    if not isinstance(failures, list | tuple):
        failures = (failures,)
    limits = [
        *([CAUTION] if report.confounded else []),
        *([f"Fewer than {SMALL} images: {small}."] if small else []),
        *(point.caution for point in report.operating_points if point.caution),
        *(f"{failure}." for failure in failures),
    ]
    own = overall.per_class[report.positive]
    numbers = _listed(
        f"{name} {own[name]}" for name in ("sensitivity", "specificity", "auroc") if name in own
    )
    return {
        "28": f"{_listed([*overall.metrics, *own])}.".replace("_", " "),
        "29": f"Intervals at {100 * report.confidence:g} % by patient, never by image: Wilson's, "
        "DeLong's of AUROCs on the logit scale, or the bootstrap over patients "
        f"({report.n_resamples} resamples, seed {report.seed}).",
        "30": f"The same numbers by {groups}: see Subgroups.",
        "37": f"{report.positive} against all others: {numbers}. All of them: see Performance.",
        "38": "; ".join(_point(point) for point in report.operating_points),
        "39": f"Wrong decisions: {errors}." if errors else "No decision was wrong.",
        "40": " ".join(limits),
        "41": NOT_A_DEVICE,
    }


def _point(point: Any) -> str:
    return (
        f"{point.score} >= {point.threshold!r}: sensitivity {point.sensitivity}, specificity "
        f"{point.specificity}; at a prevalence of {point.prevalence:.3g}, ppv {point.ppv}, "
        f"npv {point.npv}"
    )


def _trained_on(report: EvaluationReport) -> set[str]:
    """Return the sources of the training, as far as the checkpoint tells; else nothing."""
    # Not "train": it names the data set, which may hold several sources, or bear another name.
    sources = _provenance(report).get("sources")
    return set(map(str, sources)) if isinstance(sources, list | tuple) else set()


def _provenance(report: EvaluationReport) -> Mapping[str, Any]:
    """Return what the checkpoint tells people of its training: any JSON, so nothing is sure."""
    provenance = report.model.get("provenance")
    return provenance if isinstance(provenance, Mapping) else {}


def _training_sources(report: EvaluationReport) -> str:
    trained = _trained_on(report)
    if not trained:
        return ""
    parts = {name: _listed(report.origins.get(name, ())) for name in report.by_source}
    judged = _listed(f"{name} (in part of {o})" if o else name for name, o in parts.items())
    return f"Trained on {_listed(sorted(trained))}; judged on {judged}."


def _fairness(report: EvaluationReport) -> str:
    parts = [*report.by_sex.values(), *report.by_age.values()]
    return _by(parts, report.positive)


def _by(parts: Iterable[Subgroup], positive: str) -> str:
    """Return AUROC and images of each part."""
    return "; ".join(
        f"{part.name}: AUROC {part.per_class[positive]['auroc']}, "
        f"{part.counts[positive]} {positive}"
        for part in parts
    )


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(item)}" for name, item in value.items())
    return str(value)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(str, names))
