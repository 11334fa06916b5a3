from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from chestxray_covid._version import NOT_A_DEVICE, __version__
from chestxray_covid.evaluation import evaluate_probabilities
from chestxray_covid.evaluation_report import EvaluationReport
from chestxray_covid.operating_points import OPTIMISTIC
from chestxray_covid.reporting import CAUTION

#: The numbers of the items in the 2024 papers.
CLAIM = [str(n) for n in range(1, 45)]
TRIPOD = [
    *("1", "2", "3a", "3b", "3c", "4", "5a", "5b", "6a", "6b", "6c", "7", "8a", "8b", "8c"),
    *("9a", "9b", "9c", "10", "11", "12a", "12b", "12c", "12d", "12e", "12f", "12g", "13", "14"),
    *("15", "16", "17", "18a", "18b", "18c", "18d", "18e", "18f", "19", "20a", "20b", "20c"),
    *("21", "22", "23a", "23b", "24", "25", "26", "27a", "27b", "27c"),
]
MODEL = {
    "architecture": "densenet121",
    "classes": ["normal", "covid19"],
    "preprocess": {"size_px": 192, "resize": "squash"},
    "weights_sha256": "ab" * 32,
    "chestxray_covid_version": "0.0.9",
    "provenance": {
        "sources": ["clinic"],
        "license": "cc-by-4.0",
        "recipe": "train.py",
        "known_failures": ["it does | not see children"],
    },
}


def judged(**changes: Any) -> EvaluationReport:
    n = 60
    rng = np.random.default_rng(0)
    truth = np.arange(n) % 2
    p = np.clip(0.5 + 0.2 * (2 * truth - 1) + 0.2 * rng.normal(size=n), 0, 1)
    columns: dict[str, Any] = {
        "classes": ("normal", "covid19"),
        "patients": [str(i // 2) for i in range(n)],
        "sources": [("clinic", "else_where")[i >= 40] for i in range(n)],
        "views": [("PA", "AP")[i % 4 == 0] for i in range(n)],
        "n_resamples": 40,
    }
    labels = [("normal", "covid19")[k] for k in truth]
    return evaluate_probabilities(labels, np.stack([1 - p, p], 1), **{**columns, **changes})


def items(text: str, title: str) -> dict[str, str]:
    """Return item → what is reported, from one of the two checklists."""
    section = text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    assert rows[:2] == [["Item", "Topic", "Reported"], ["---"] * 3]
    return {number: told for number, _, told in rows[2:]}


@pytest.fixture(scope="module")
def full() -> EvaluationReport:
    report = judged(sexes=["F", "M", "F", "M", "F", ""] * 10, ages=["30", "70"] * 30)
    return replace(
        report,
        model=MODEL,
        excluded={"view L": 4},
        operating_points=(report.operating_point(sensitivity=0.9, prevalence=0.02),),
    )


def test_every_item_of_both_checklists_is_there_and_answered(full: EvaluationReport) -> None:
    for report in (full, judged()):
        text = report.to_markdown()
        for title, numbers in (("CLAIM, 2024 update", CLAIM), ("TRIPOD+AI", TRIPOD)):
            found = items(text, title)
            assert list(found) == numbers
            assert all(found.values())


def test_what_an_evaluation_cannot_know_is_not_reported(full: EvaluationReport) -> None:
    claim = items(full.to_markdown(), "CLAIM, 2024 update")
    tripod = items(full.to_markdown(), "TRIPOD+AI")
    for number in ("2", "3", "5", "11", "14", "16", "18", "19", "20", "21", "34", "42", "44"):
        assert claim[number] == "not reported"
    for number in ("3a", "5b", "6a", "8b", "10", "17", "18a", "18d", "19", "24", "27c"):
        assert tripod[number] == "not reported"


def test_what_it_knows_is_filled_in(full: EvaluationReport) -> None:
    claim = items(full.to_markdown(), "CLAIM, 2024 update")
    assert claim["1"] == "Deep learning, densenet121."
    assert claim["7"] == r"Images by source: clinic 40, else\_where 20."
    assert claim["8"] == "Entries of the sources left out: view L 4."
    assert "192 by 192 pixels" in claim["9"]
    assert claim["13"] == "Views: AP 15, PA 45."
    assert "ab" * 32 in claim["22"]
    assert claim["23"] == f"chestxray-covid {__version__}; the weights are of 0.0.9."
    assert claim["25"] == "recipe: train.py"
    assert "auroc" in claim["28"]
    assert "by patient, never by image" in claim["29"]
    assert claim["30"] == "The same numbers by source, view, sex, age: see Subgroups."
    assert claim["35"] == "Included: 60 images of 30 patients. Left out: view L 4."
    assert "Sex: female 30, male 20, unknown 10." in claim["36"]
    assert "Age in years: 18-39 30, 60-79 30." in claim["36"]
    assert str(full.overall.per_class["covid19"]["auroc"]) in claim["37"]
    assert "at a prevalence of 0.02, ppv" in claim["38"]
    (_, false_positive), (false_negative, _) = full.overall.confusion
    assert f"normal called covid19 {false_positive}" in claim["39"]
    assert f"covid19 called normal {false_negative}" in claim["39"]
    assert OPTIMISTIC in claim["40"]
    assert r"it does \| not see children." in claim["40"]
    assert "Fewer than 20 images: view AP, sex unknown." in claim["40"]
    assert claim["41"] == NOT_A_DEVICE
    assert "cc-by-4.0" in claim["43"]


def test_data_are_internal_where_the_model_was_trained_and_external_elsewhere(
    full: EvaluationReport,
) -> None:
    claim = items(full.to_markdown(), "CLAIM, 2024 update")
    tripod = items(full.to_markdown(), "TRIPOD+AI")
    inside, outside = (
        full.by_source[n].per_class["covid19"]["auroc"] for n in ("clinic", "else_where")
    )
    assert claim["32"] == f"clinic: AUROC {inside}, 20 covid19"
    assert claim["33"] == rf"else\_where: AUROC {outside}, 10 covid19"
    assert tripod["16"] == r"Trained on clinic; judged on clinic, else\_where."
    taken_over = replace(full, origins={"else_where": ["clinic", "third"], "clinic": ["third"]})
    again = items(taken_over.to_markdown(), "CLAIM, 2024 update")
    assert "clinic" in again["32"]
    assert "else" in again["32"]
    assert again["33"] == "not reported"
    assert items(taken_over.to_markdown(), "TRIPOD+AI")["16"] == (
        r"Trained on clinic; judged on clinic (in part of third), else\_where (in part of clinic, "
        "third)."
    )
    both = {**MODEL, "provenance": {"sources": ["clinic", "else_where"]}}
    again = items(replace(full, model=both).to_markdown(), "CLAIM, 2024 update")
    assert "else" in again["32"]
    assert again["33"] == "not reported"
    # The name of the training's table says nothing of the sources in it.
    named = {**MODEL, "provenance": {"train": {"source": "train"}}}
    again = items(replace(full, model=named).to_markdown(), "CLAIM, 2024 update")
    assert again["32"] == again["33"] == "not reported"
    bare = items(judged().to_markdown(), "CLAIM, 2024 update")
    assert bare["32"] == bare["33"] == bare["1"] == bare["22"] == "not reported"


@pytest.mark.parametrize(
    "provenance",
    [
        {"sources": "clinic", "known_failures": "children", "train": 5},
        {"train": {"source": None}},
        {},
        None,
    ],
)
def test_whatever_people_wrote_into_a_checkpoint_is_no_obstacle(
    full: EvaluationReport, provenance: object
) -> None:
    claim = items(
        replace(full, model={**MODEL, "provenance": provenance}).to_markdown(),
        "CLAIM, 2024 update",
    )
    assert claim["1"] == "Deep learning, densenet121."
    assert claim["32"] == "not reported"


def test_the_two_checklists_agree_where_they_ask_for_the_same(full: EvaluationReport) -> None:
    claim = items(full.to_markdown(), "CLAIM, 2024 update")
    tripod = items(full.to_markdown(), "TRIPOD+AI")
    assert tripod["20a"] == claim["35"]
    assert tripod["23a"] == claim["37"]
    assert "female: AUROC" in tripod["14"]
    assert tripod["13"] == "Images by class: normal 30, covid19 30. No number is reweighted."
    assert "Thresholds: p(covid19)" in tripod["15"]


def test_answers_of_the_user_go_in_as_plain_text(full: EvaluationReport) -> None:
    text = full.to_markdown({"CLAIM 14": "RT-PCR | <b>", "TRIPOD+AI 8a": "Our own"})
    assert items(text, "CLAIM, 2024 update")["14"] == r"RT-PCR \| &lt;b&gt;"
    assert items(text, "TRIPOD+AI")["8a"] == "Our own"


@pytest.mark.parametrize("name", ["CLAIM 45", "14", "TRIPOD 1"])
def test_an_unknown_item_is_refused(full: EvaluationReport, name: str) -> None:
    with pytest.raises(ValueError, match=rf"\['{name}'\] are no items: expected names like"):
        full.to_markdown({name: "x"})


def test_the_numbers_come_before_the_checklists(full: EvaluationReport) -> None:
    text = full.to_markdown()
    assert text.startswith("# Evaluation: covid19 against all others\n")
    assert NOT_A_DEVICE in text.split("## ")[0]
    heads = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert heads == [
        *("Performance", "Thresholds", "Subgroups", "Reliability of p(covid19)"),
        *("Wrong decisions if the least sure are left to others", "CLAIM, 2024 update"),
        "TRIPOD+AI",
    ]
    own = full.overall.per_class["covid19"]["auroc"]
    assert f"| covid19 | auroc | {own.value:.3f} ({own.interval}) | 60 |" in text
    assert "| sex | unknown | " in text
    assert r"\* fewer than 20 images" in text
    curve = full.risk_coverage_curve()
    assert f"| 100.0% | {curve.y[-1]:.1%} |" in text
    assert f"(AURC): {curve.area}." in text
    assert f"{full.reliability('covid19').ece}" in text


def test_rows_of_a_table_have_as_many_cells_as_its_head(full: EvaluationReport) -> None:
    for block in re.findall(r"(?:^\|.*\n)+", full.to_markdown(), re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1


def test_without_predictions_the_rest_is_still_there(full: EvaluationReport) -> None:
    text = replace(full, predictions=None).to_markdown()
    assert "## Reliability" not in text
    assert "## Subgroups" in text
    assert items(text, "CLAIM, 2024 update")["37"] != "not reported"


def test_a_confounded_design_is_said_at_the_top_and_among_the_limitations() -> None:
    n = 60
    text = judged(sources=["ab"[i % 2] for i in range(n)]).to_markdown()
    assert f"**{CAUTION}**" in text
    assert items(text, "CLAIM, 2024 update")["40"].startswith(CAUTION)
