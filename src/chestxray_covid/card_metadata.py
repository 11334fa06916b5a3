"""What the Hub shows of a model: the front matter of its card."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import count
from typing import Any

from chestxray_covid.checkpoint import ModelConfig
from chestxray_covid.evaluation_report import EvaluationReport
from chestxray_covid.subgroups import Subgroup

#: What is said of every source.
METRICS = ("sensitivity", "specificity", "auroc")
#: What results on pooled sources are called if training saw all of them.
POOLED = "all sources of training, pooled, which is no evidence of reading lungs"


def front_matter(
    config: ModelConfig, report: EvaluationReport | None, name: str, license: str | None
) -> str:
    """Return the YAML that the Hub reads, with the results on every source."""
    from huggingface_hub import EvalResult, ModelCardData

    stated = stated_licence(config, license)
    datasets = config.provenance.get("datasets")
    results = []
    if report is not None:
        parts = (report.overall, *report.by_source.values())
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=identifier,
                dataset_name=_printable(_called(part, report, config)),
                metric_type="roc_auc" if metric == "auroc" else metric,
                metric_value=round(part.per_class[report.positive][metric].value, 4),
                metric_name=f"{report.positive} {metric}",
            )
            for part, identifier in zip(parts, _slugs(p.name for p in parts), strict=True)
            for metric in METRICS
            if _is_defined(part, report.positive, metric)
        ]
    data = ModelCardData(
        license=_printable(stated) or "other",
        library_name="chestxray_covid",
        pipeline_tag="image-classification",
        tags=["chest-x-ray", "covid-19", "densenet", "medical-imaging", "timm", "transformers"],
        datasets=[_printable(d) for d in datasets] if isinstance(datasets, list | tuple) else None,
        metrics=["roc_auc", "recall", "specificity"] if results else None,
        model_name=_printable(name),
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _called(part: Subgroup, report: EvaluationReport, config: ModelConfig) -> str:
    known = config.provenance.get("sources")
    seen = isinstance(known, list | tuple) and set(report.by_source) <= set(map(str, known))
    return POOLED if part is report.overall and seen else f"{part.group}: {part.name}"


def stated_licence(config: ModelConfig, license: str | None) -> str:
    """Return the identifier of the weights' licence, empty if there is none."""
    stated = license or config.provenance.get("license")
    return stated if isinstance(stated, str) else ""


def _is_defined(part: Subgroup, positive: str, metric: str) -> bool:
    estimate = part.per_class[positive].get(metric)
    return estimate is not None and estimate.value == estimate.value


def _printable(value: Any) -> str:
    """Return text for the front matter, without what YAML or UTF-8 cannot hold."""
    return "".join(c for c in str(value) if c.isprintable())[:200]


def _slugs(texts: Iterable[str]) -> list[str]:
    """Return identifiers in lower case, all different: huggingface_hub merges results of one."""
    found = list[str]()
    for text in texts:
        slug = re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")[:60] or "unknown"
        numbered = (slug if n == 1 else f"{slug}-{n}" for n in count(1))
        found.append(next(s for s in numbered if s not in found))
    return found
