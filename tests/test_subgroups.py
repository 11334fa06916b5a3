from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from chestxray_covid import intervals
from chestxray_covid.datasets.base import ChestXrayDataset, Sample, concatenate
from chestxray_covid.errors import ReportError
from chestxray_covid.evaluation import evaluate, evaluate_probabilities
from chestxray_covid.subgroups import age_band, sex_of

LABELS = ("normal", "covid19")


@pytest.mark.parametrize(
    ("written", "sex"),
    [("F", "female"), (" male ", "male"), ("M", "male"), ("", "unknown"), ("nan", "unknown")],
)
def test_a_sex_is_read_as_sources_write_it(written: str, sex: str) -> None:
    assert sex_of(written) == sex


@pytest.mark.parametrize(
    ("written", "band"),
    [
        *(("0", "0-17"), ("17.9", "0-17"), ("18", "18-39"), ("39", "18-39"), ("40", "40-59")),
        *(("79", "60-79"), ("80", "80+"), ("120", "80+")),
        *(
            (bad, "unknown")
            for bad in ("", "nan", "inf", "-1", "999", "70s", "999Y", "18M", "067X")
        ),
        *(
            ("067Y", "60-79"),
            ("018M", "0-17"),
            ("216M", "18-39"),
            ("003W", "0-17"),
            ("999D", "0-17"),
        ),
    ],
)
def test_an_age_falls_into_its_band(written: str, band: str) -> None:
    assert age_band(written) == band


def judged(**changes: Any) -> Any:
    n = 48
    rng = np.random.default_rng(0)
    truth = np.arange(n) % 2
    p = np.clip(0.5 + 0.2 * (2 * truth - 1) + 0.3 * rng.normal(size=n), 0, 1)
    columns: dict[str, Any] = {
        "classes": LABELS,
        "patients": [str(i // 2) for i in range(n)],
        "sources": ["a"] * n,
        "views": ["PA"] * n,
        "n_resamples": 40,
    }
    labels = [LABELS[k] for k in truth]
    return evaluate_probabilities(labels, np.stack([1 - p, p], 1), **{**columns, **changes})


def test_a_view_that_is_missing_is_unknown() -> None:
    report = judged(views=["PA", None, math.nan, pd.NA] * 12)
    assert {name: part.n_images for name, part in report.by_view.items()} == {
        "PA": 12,
        "unknown": 36,
    }


def test_a_report_is_kept_where_the_home_folder_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    report = judged()
    assert report.save("~/run/evaluation.json") == tmp_path / "run" / "evaluation.json"
    assert type(report).load("~/run/evaluation.json").overall == report.overall
    with pytest.raises(ReportError, match=r"~no-such-user/report\.json cannot be read"):
        type(report).load("~no-such-user/report.json")


def test_sexes_and_age_bands_have_their_own_numbers() -> None:
    sexes = ["F", "M", "M", ""] * 12
    ages = ["30", "70", "70", "x"] * 12
    report = judged(sexes=sexes, ages=ages)
    assert list(report.by_sex) == ["female", "male", "unknown"]
    assert list(report.by_age) == ["18-39", "60-79", "unknown"]
    rows = report.predictions["sex"] == "male"
    table = report.predictions[rows]
    assert rows.sum() == report.by_sex["male"].n_images == 24
    expected = sk.roc_auc_score(table["label"] == "covid19", table["p_covid19"])
    assert report.by_sex["male"].per_class["covid19"]["auroc"].value == pytest.approx(expected)
    assert report.by_sex["male"].counts == {"normal": 12, "covid19": 12}
    assert [part.group for part in report.subgroups] == [
        *("overall", "source", "view", "sex", "sex", "sex", "age", "age", "age")
    ]


def test_all_numbers_of_a_subgroup_share_resamples_that_are_drawn_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = []
    resamples = intervals._resamples

    def count(*arguments: Any) -> Any:
        drawn.append(arguments)
        return resamples(*arguments)

    monkeypatch.setattr(intervals, "_resamples", count)
    report = judged(patients=[str(i) for i in range(48)])
    assert len(drawn) == len(report.subgroups) == 3


def test_what_is_known_of_nobody_is_no_subgroup() -> None:
    report = judged(sexes=["?"] * 48)
    assert (report.by_sex, report.by_age) == ({}, {})


def test_counts_below_twenty_are_flagged_by_class() -> None:
    assert judged().subgroups[0].small is False
    assert "*" not in str(judged())
    text = str(judged(sexes=["F"] * 10 + ["M"] * 38))
    row = next(line for line in text.splitlines() if "female" in line).split()
    # Group, name, patients, positive, other.
    assert row[:5] == ["sex", "female", "5", "5*", "5*"]
    assert text.endswith("* fewer than 20 images: what rests on them says next to nothing")


class Fair:
    """Says a half of everything, so that only the patients matter."""

    classes = LABELS

    def predict_proba(
        self, images: ChestXrayDataset, /, *, batch_size: int, progress: bool
    ) -> np.ndarray:
        return np.full((len(images), 2), 0.5)


def sample(name: str, patient: str, source: str, label: str, **metadata: str) -> Sample:
    return Sample(
        path=Path(name),
        label=label,
        finding="",
        patient_id=patient,
        source=source,
        metadata=metadata,
    )


def test_a_patient_of_two_collections_counts_once() -> None:
    # Patient 7 of the clinic is patient 311 of the collection that took an image over.
    clinic = [
        sample("x1", "7", "hannover", "covid19", image_id="x1", sex="F", age="50"),
        sample("x2", "7", "hannover", "covid19", image_id="x2"),
        sample("x3", "8", "hannover", "covid19", image_id="x3"),
    ]
    taken = [
        sample("y1", "311", "cohen", "covid19", origin="hannover", image_id="x1"),
        sample("y2", "311", "cohen", "normal"),
        sample("y3", "7", "cohen", "normal"),
    ]
    both = concatenate([ChestXrayDataset(part, classes=LABELS) for part in (clinic, taken)])
    report = evaluate(Fair(), both, n_resamples=10)
    # 7 = 311, 8, and the collection's own patient 7, who is somebody else.
    assert report.n_patients == report.overall.n_patients == 3
    assert report.predictions is not None
    assert report.predictions["patient_group"].tolist() == ["0", "0", "1", "0", "0", "2"]
    assert report.predictions["sex"].tolist() == ["female", *["unknown"] * 5]
    assert report.predictions["age_band"].tolist() == ["40-59", *["unknown"] * 5]


def test_intervals_are_by_the_joined_patients() -> None:
    n = 48
    joined = [str(i % 6) for i in range(n)]
    apart = judged(patients=[str(i) for i in range(n)])
    together = judged(patients=[str(i) for i in range(n)], groups=joined)
    same = judged(patients=joined)
    assert together.n_patients == 6
    assert together.overall.metrics == same.overall.metrics
    assert together.overall.per_class == same.overall.per_class
    assert apart.overall.metrics["accuracy"].method == "wilson"
    assert together.overall.metrics["accuracy"].method == "patient bootstrap"


def test_groups_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="'patient_group': 3"):
        judged(groups=["a", "b", "c"])
    with pytest.raises(ValueError, match="'sex': 1"):
        judged(sexes=["F"])


@pytest.mark.real_data
def test_hannovers_patients_inside_cohens_collection_count_once(real_data: Path) -> None:
    from chestxray_covid.datasets.cohen import CohenCovidDataset
    from chestxray_covid.datasets.folder import HannoverCovidDataset

    cohen = CohenCovidDataset(real_data / "covid-chestxray-dataset")
    hannover = HannoverCovidDataset(real_data / "covid-19-image-repository", classes=("covid19",))
    both = concatenate([hannover, cohen])
    report = evaluate(Fair(), both, n_resamples=10)
    pairs = {(s.source, s.patient_id) for s in both.samples}
    assert report.n_patients < len(pairs)
    assert set(report.by_sex) == {"female", "male", "unknown"}
    assert "60-79" in report.by_age
    assert not math.isnan(report.by_age["60-79"].metrics["accuracy"].value)
