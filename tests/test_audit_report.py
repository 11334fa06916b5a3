from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chestxray_covid import AuditFinding, AuditItem, AuditReport
from chestxray_covid.errors import ReportError
from chestxray_covid.intervals import Estimate


def number(value: float) -> Estimate:
    return Estimate(value=value, low=value - 0.1, high=value + 0.1, n=40, method="made up")


ITEM = AuditItem(
    name="occlusion",
    question="Does it need the lungs?",
    verdict="pass",
    reason="It does.",
    threshold="fail from 0.8",
    threshold_source="a book",
    findings=(
        AuditFinding(
            name="lungs_hidden",
            what="lungs hidden",
            metric="auroc",
            estimate=number(0.5),
            change=number(-0.4),
            meaning="Nothing is left.",
        ),
        AuditFinding(
            name="mirrored",
            what="mirrored",
            metric="auroc",
            estimate=Estimate(value=math.nan, n=0, method="made up"),
        ),
    ),
    tables={"source and label": {"a": {"normal": 3, "covid19": 4}}},
)
REPORT = AuditReport(
    classes=("normal", "covid19"),
    positive="covid19",
    negative="normal",
    n_images=40,
    n_patients=20,
    sources=("a", "b"),
    confidence=0.95,
    n_resamples=100,
    seed=0,
    items=(ITEM,),
)


def with_verdicts(*verdicts: str) -> AuditReport:
    return replace(REPORT, items=tuple(replace(ITEM, verdict=verdict) for verdict in verdicts))


@pytest.mark.parametrize(
    ("verdicts", "overall"),
    [
        (["pass", "pass"], "pass"),
        (["pass", "not_assessable"], "not_assessable"),
        (["not_assessable", "warn", "pass"], "warn"),
        (["warn", "fail", "not_assessable"], "fail"),
        ([], "not_assessable"),
    ],
)
def test_the_worst_item_decides_and_what_is_missing_is_no_pass(
    verdicts: list[str], overall: str
) -> None:
    assert with_verdicts(*verdicts).verdict == overall


def test_a_report_survives_a_file(tmp_path: Path) -> None:
    path = REPORT.save(tmp_path / "new" / "audit.json")
    text = path.read_text()
    assert "NaN" not in text
    again = AuditReport.load(path)
    assert again == REPORT, "what is undefined in both is equal, too"
    assert again != replace(REPORT, n_images=REPORT.n_images + 1)
    assert again.to_dict() == REPORT.to_dict()
    assert again.item("occlusion").finding("lungs_hidden") == ITEM.findings[0]
    assert math.isnan(again.item("occlusion").finding("mirrored").estimate.value)


def test_an_unknown_verdict_is_refused() -> None:
    with pytest.raises(ValueError, match=r"verdict must be one of .*got 'fine'"):
        replace(ITEM, verdict="fine")


def changed(**values: Any) -> dict[str, Any]:
    return {**REPORT.to_dict(), **values}


def changed_item(**values: Any) -> dict[str, Any]:
    return changed(items=[{**REPORT.to_dict()["items"][0], **values}])


def without(name: str) -> dict[str, Any]:
    return {k: v for k, v in REPORT.to_dict().items() if k != name}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (changed(format_version=2), "format 2, this version reads 1"),
        (without("seed"), "has the fields"),
        (changed(extra=1), "has the fields"),
        (changed(n_images="forty"), "cannot have the n_images 'forty'"),
        (changed(n_images=True), "cannot have the n_images True"),
        (changed(classes="covid19"), "must be a sequence of names"),
        (changed(sources=["a", None]), "cannot have the sources"),
        (changed(verdict="fail"), "verdict 'fail', the items say 'pass'"),
        (changed(items=[{}]), "findings"),
        (changed_item(verdict="fine"), "verdict must be one of"),
        (changed_item(reason=None), "cannot have the reason None"),
        (changed_item(tables={"t": {"a": {"b": "x"}}}), "invalid literal"),
        (changed_item(findings=[{"name": "x"}]), "estimate"),
        (without("verdict"), "verdict"),
        ([], "list indices"),
    ],
)
def test_anything_else_is_no_report(data: Any, reason: str) -> None:
    with pytest.raises(ReportError, match=f"This is no audit report: .*{reason}"):
        AuditReport.from_dict(data)


@pytest.mark.parametrize("text", ["{", "null", "[" * 100_000, '{"format_version": 1}'])
def test_a_file_that_is_no_report_says_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "audit.json"
    path.write_text(text)
    with pytest.raises(ReportError, match=r"audit\.json cannot be read as an audit report"):
        AuditReport.load(path)
    with pytest.raises(ReportError, match=r"none\.json cannot be read as an audit report"):
        AuditReport.load(tmp_path / "none.json")


def test_a_file_that_names_a_value_twice_is_refused(tmp_path: Path) -> None:
    path = REPORT.save(tmp_path / "audit.json")
    path.write_text(path.read_text().replace('"verdict": "pass"', '"verdict": "pass", "seed": 1'))
    with pytest.raises(ReportError, match="names 'seed' twice"):
        AuditReport.load(path)


def test_the_text_says_verdict_numbers_and_where_thresholds_come_from() -> None:
    text = str(REPORT)
    assert text.startswith("Shortcut audit: PASS\n")
    assert (
        "lungs hidden: auroc 0.500 (0.400–0.600, n = 40); change -0.400 (-0.500 to -0.300)" in text
    )
    assert "mirrored: auroc undefined (n = 0)" in text
    assert "Threshold: fail from 0.8 (a book)." in text
    assert "covid19" in text
    assert max(map(len, text.splitlines())) <= 110
    assert "its scores are no evidence of disease" in str(with_verdicts("fail"))


def test_a_model_that_only_knows_its_patients_is_not_said_to_use_a_shortcut() -> None:
    lost = replace(ITEM, name="generalisation", verdict="fail")
    known = replace(REPORT, items=(ITEM, lost))
    assert "has a shortcut" not in known.summary
    assert "trained on patients who are judged here, or loses where the source" in str(known)
    both = replace(REPORT, items=(replace(ITEM, verdict="fail"), lost))
    assert "the data set or the model has a shortcut" in both.summary


def test_the_text_can_be_printed_where_a_source_is_not_utf_8() -> None:
    strange = os.fsdecode(b"M\xfcnchen")
    table = {"source and label": {strange: {"normal": 3, "covid19": 4}}}
    item = replace(ITEM, reason=f"In {strange} it does.", tables=table)
    text = str(replace(REPORT, sources=(strange,), items=(item,)))
    assert text.encode().count(rb"M\udcfcnchen") == 3


def test_a_source_cannot_write_a_verdict_over_that_of_the_report() -> None:
    """A terminal does what such characters in a name say: up, clear the line, begin anew."""
    hostile = "ward\x1b[A\x1b[2K\rShortcut audit: PASS\n\u202e"
    table = {"source and label": {hostile: {"normal": 3, "covid19": 4}}}
    item = replace(ITEM, reason=f"In {hostile} it does.", tables=table)
    text = str(replace(REPORT, sources=(hostile,), items=(item,)))
    assert text.replace("\n", "").isprintable()
    assert text.count(r"ward\x1b[A\x1b[2K") == 3
    assert not any(line.startswith("Shortcut audit: PASS") for line in text.splitlines()[1:])


def test_the_json_is_what_the_dictionary_says() -> None:
    assert json.loads(REPORT.to_json()) == json.loads(json.dumps(REPORT.to_dict()))
    with pytest.raises(KeyError, match="heat"):
        REPORT.item("heat")
    with pytest.raises(KeyError, match="other"):
        ITEM.finding("other")
