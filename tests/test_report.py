from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from chestxray_covid import (
    EvaluationReport,
    Heatmap,
    ReportError,
    SyntheticChestXray,
    plot_heatmaps,
    plot_reliability,
    plot_roc,
    plot_samples,
    write_report,
)
from chestxray_covid.audit_report import AuditFinding, AuditItem, AuditReport
from chestxray_covid.curves import Reliability
from chestxray_covid.evaluation import evaluate_probabilities
from chestxray_covid.intervals import Estimate
from chestxray_covid.page import escaped, picture
from chestxray_covid.report import extend_report

HOSTILE = "<script>alert('x')</script>\"&\u202e"
ESTIMATE = Estimate(value=0.81, low=0.72, high=0.9, n=60, method="patient bootstrap")
UNDEFINED = Estimate(value=float("nan"), n=0, method="patient bootstrap")


class Page(HTMLParser):
    """What a browser would find on the page; fails where elements are not closed in order."""

    EMPTY = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def judged(positive: str = "covid19", source: str = "cohen") -> EvaluationReport:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 60)
    score = np.clip(0.25 + 0.5 * truth + rng.normal(0, 0.25, 60), 0.01, 0.99)
    report = evaluate_probabilities(
        [("normal", positive)[k] for k in truth],
        np.stack([1 - score, score], axis=1),
        classes=("normal", positive),
        patients=[str(i // 2) for i in range(60)],
        sources=[source] * 12 + ["kermany"] * 48,
        views=["PA"] * 60,
        positive=positive,
        n_resamples=50,
    )
    return replace(report, operating_points=(report.operating_point(sensitivity=0.9),))


def audited(text: str = "a text") -> AuditReport:
    found = AuditFinding(
        name="lungs_hidden",
        what=f"hidden {text}",
        metric="auroc",
        estimate=ESTIMATE,
        change=replace(ESTIMATE, value=-0.1, low=-0.2, high=0.05),
        meaning=f"It means {text}.",
    )
    item = AuditItem(
        name="occlusion",
        question=f"What of {text}?",
        verdict="fail",
        reason=f"Because of {text}.",
        threshold=f"above {text}",
        threshold_source=f"from {text}",
        findings=(found, replace(found, name="other", estimate=UNDEFINED, change=None, meaning="")),
        tables={f"table {text}": {text: {text: 5}, "kermany": {"normal": 7}}},
    )
    return AuditReport(
        classes=("normal", "covid19"),
        positive="covid19",
        negative="normal",
        n_images=60,
        n_patients=30,
        sources=("cohen", text),
        confidence=0.95,
        n_resamples=50,
        seed=0,
        items=(item, replace(item, name="features", verdict="not_assessable", tables={})),
    )


def gallery(target: str = "covid19") -> Figure:
    return plot_heatmaps(
        [
            Heatmap(
                image=Image.new("L", (40, 40), 90),
                grid=np.eye(2, dtype=np.float32),
                target=target,
                probability=0.9,
                method="grad_cam",
                source="x.png",
            )
        ]
    )


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    return judged()


@pytest.fixture(scope="module")
def written(report: EvaluationReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of an evaluation and an audit with a gallery."""
    folder = tmp_path_factory.mktemp("report") / "new"
    figures = {"Where it looked.": gallery()}
    return write_report(folder, evaluation=report, audit=audited(), figures=figures)


@pytest.mark.slow
def test_the_page_needs_nothing_but_itself(written: Path) -> None:
    page = Page(written.read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base"})
    pictures = [attrs["src"] or "" for attrs in page.of("img")]
    assert len(pictures) == 7
    assert all(re.match(r"data:image/(png|svg\+xml);base64,", source) for source in pictures)
    assert [attrs["href"] for attrs in page.of("a")] == ["audit.json", "evaluation.json"]
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    source = written.read_text(encoding="utf-8")
    assert "url(" not in source
    assert "@import" not in source
    policy = page.of("meta")[1]["content"] or ""
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_pictures_are_whole_and_need_nothing_either(written: Path) -> None:
    sources = [attrs["src"] or "" for attrs in Page(written.read_text(encoding="utf-8")).of("img")]
    kinds = []
    for source in sources:
        head, data = source.split(",")
        content = base64.b64decode(data, validate=True)
        kinds.append(head)
        if "svg" in head:
            assert content.rstrip().endswith(b"</svg>")
            links = re.findall(rb'(?:href|url)[="(]+([^")]+)', content)
            assert all(link.startswith(b"#") for link in links)
            ids = re.findall(rb' id="([^"]+)"', content)
            assert {link[1:] for link in links} <= set(ids)
        else:
            assert content.startswith(b"\x89PNG")
    assert sum("png" in kind for kind in kinds) == 1  # the gallery


def test_the_json_beside_the_page_is_that_of_the_reports(
    written: Path, report: EvaluationReport
) -> None:
    assert {p.name for p in written.parent.iterdir()} == {
        "index.html",
        "evaluation.json",
        "audit.json",
    }
    folder = written.parent
    assert EvaluationReport.load(folder / "evaluation.json").to_json() == report.to_json()
    assert json.loads((folder / "audit.json").read_text()) == audited().to_dict()


def test_the_page_says_every_number_of_the_positive_class(
    written: Path, report: EvaluationReport
) -> None:
    text = Page(written.read_text(encoding="utf-8")).text
    overall = report.overall
    for estimate in [*overall.per_class["covid19"].values(), *overall.metrics.values()]:
        assert f"{estimate.value:.3f} {estimate.interval} {estimate.n}" in text
    point = report.operating_points[0]
    assert f"{point.sensitivity.value:.3f}" in text
    assert point.caution
    assert point.caution in text
    own = report.by_source["cohen"]
    assert f"source: cohen {own.n_patients} {own.counts['covid19']}*" in text
    assert "fewer than 20 images" in text
    assert "not a medical device" in text


def test_the_page_says_every_verdict_and_what_it_rests_on(written: Path) -> None:
    text = Page(written.read_text(encoding="utf-8")).text
    assert "✗ fail the data set or the model has a shortcut" in text
    assert "1. What of a text? ✗ fail" in text
    assert "2. What of a text? ? not assessable" in text
    assert "hidden a text AUROC 0.810 (0.720–0.900) −0.100 (−0.200 to +0.050)" in text
    assert "hidden a text AUROC undefined" in text
    steady = replace(audited().items[0].findings[0], change=None)
    item = replace(audited().items[0], findings=(steady,))
    alone = write_report(written.parent / "alone", audit=replace(audited(), items=(item,)))
    assert '<th scope="col">change</th>' not in alone.read_text(encoding="utf-8")
    assert "hidden a text: It means a text." in text
    assert "table a text a text normal a text 5 0 kermany 0 7" in text
    assert "Threshold: above a text (from a text)." in text


def test_names_from_data_stay_text(tmp_path: Path) -> None:
    path = write_report(
        tmp_path,
        evaluation=replace(judged(HOSTILE, HOSTILE), excluded={HOSTILE: 3}),
        audit=audited(HOSTILE),
        figures={HOSTILE: gallery(HOSTILE)},
        title=HOSTILE,
    )
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert not page.of("script")
    assert "\u202e" not in source, "direction marks would turn the text around"
    assert page.text.count("<script>alert('x')</script>\"&\\u202e") > 20
    alt = [attrs["alt"] or "" for attrs in page.of("img")]
    assert any("<script>" in text for text in alt), "an attribute may hold it, as text"
    for attrs in page.of("img"):
        content = base64.b64decode((attrs["src"] or "").split(",")[1])
        assert b"<script" not in content


@pytest.mark.slow
def test_the_same_arguments_give_the_same_bytes(
    written: Path, report: EvaluationReport, tmp_path: Path
) -> None:
    figures = {"Where it looked.": gallery()}
    again = write_report(tmp_path, evaluation=report, audit=audited(), figures=figures)
    assert again.read_bytes() == written.read_bytes()


@pytest.mark.slow
def test_an_audit_alone_and_an_evaluation_alone_are_pages_too(
    report: EvaluationReport, tmp_path: Path
) -> None:
    audit = Page(write_report(tmp_path / "a", audit=audited()).read_text(encoding="utf-8"))
    assert audit.text.count("How good is it?") == 0
    assert "Shortcut audit" in audit.text
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["audit.json", "index.html"]
    path = write_report(tmp_path / "e", evaluation=report, title="My model")
    assert "<h1>My model</h1>" in path.read_text(encoding="utf-8")
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == ["evaluation.json", "index.html"]


@pytest.mark.parametrize("first", ["evaluation", "audit"])
def test_a_page_keeps_what_it_holds_of_the_same_weights(
    report: EvaluationReport, tmp_path: Path, first: str
) -> None:
    same = "a" * 64
    both: dict[str, Any] = {
        "evaluation": replace(report, model={**report.model, "weights_sha256": same}),
        "audit": replace(audited(), weights_sha256=same),
    }
    extend_report(tmp_path, **{first: both.pop(first)})
    page = Page(extend_report(tmp_path, **both).read_text(encoding="utf-8"))
    assert "Evaluation and shortcut audit" in page.text
    other = replace(audited(), weights_sha256="b" * 64)
    page = Page(extend_report(tmp_path, audit=other).read_text(encoding="utf-8"))
    assert "How good is it?" not in page.text
    for name in ("evaluation.json", "audit.json"):
        (tmp_path / name).write_text("{")
    assert extend_report(tmp_path, audit=other).is_file()
    unknown = replace(report, model={})
    unknown.save(tmp_path / "evaluation.json")
    page = Page(extend_report(tmp_path, audit=audited()).read_text(encoding="utf-8"))
    assert "How good is it?" not in page.text, "nobody knows whose numbers those are"


def test_a_page_of_something_else_is_not_replaced(report: EvaluationReport, tmp_path: Path) -> None:
    own = tmp_path / "index.html"
    own.write_text("<p>my site", encoding="utf-8")
    with pytest.raises(ReportError, match=r"index\.html is a page of something else, and would be"):
        write_report(tmp_path, evaluation=report)
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]
    assert own.read_text(encoding="utf-8") == "<p>my site"


def test_what_is_no_result_is_refused_before_anything_is_written(
    report: EvaluationReport, tmp_path: Path
) -> None:
    for wrong, said in (
        ({"evaluation": "evaluation.json"}, r"EvaluationReport, as evaluate\(\) or .*, got str"),
        ({"evaluation": audited()}, r"EvaluationReport, as .*, got AuditReport"),
        ({"audit": "audit.json"}, r"AuditReport, as audit_shortcuts\(\) or .*, got str"),
        ({"evaluation": report, "figures": [gallery()]}, r"Mapping, as a dict of .*, got list"),
        ({"evaluation": report, "figures": {"a": "a.png"}}, r"Figure, as .*, got str"),
    ):
        with pytest.raises(TypeError, match=f"expected {said}"):
            write_report(tmp_path / "new", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_without_anything_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a report needs an evaluation or an audit"):
        write_report(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_confounded_design_and_missing_figures_are_said(
    report: EvaluationReport, tmp_path: Path
) -> None:
    bare = replace(report, predictions=None, confounded=True, operating_points=())
    page = Page(write_report(tmp_path, evaluation=bare).read_text(encoding="utf-8"))
    assert "these numbers cannot tell disease from source" in page.text
    assert len(page.of("img")) == 1, "the confusion matrix needs no predictions"
    assert page.text.count("Not drawn:") == 4
    assert "Decisions at a threshold" not in page.text


@pytest.mark.slow
def test_the_page_and_the_markdown_have_one_calibration_error(
    report: EvaluationReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[Reliability] = []

    def keep(diagram: Reliability) -> Figure:
        drawn.append(diagram)
        return plot_reliability(diagram)

    monkeypatch.setattr("chestxray_covid.plots.plot_reliability", keep)
    write_report(tmp_path, evaluation=report)
    assert f"Expected calibration error {drawn[0].ece}," in report.to_markdown()
    assert f"at best 0; slope {drawn[0].slope}, at best 1" in report.to_markdown()


@pytest.mark.slow
def test_wide_figures_take_the_whole_row(report: EvaluationReport, tmp_path: Path) -> None:
    figures = {"small": gallery(), "wide": plot_samples(SyntheticChestXray(2, image_size_px=32))}
    path = write_report(tmp_path, evaluation=report, figures=figures)
    page = Page(path.read_text(encoding="utf-8"))
    assert [attrs.get("class") for attrs in page.of("figure")] == [None] * 6 + ["wide"]
    assert page.of("meta")[2] == {
        "name": "viewport",
        "content": "width=device-width, initial-scale=1",
    }


def test_tables_scroll_in_themselves_and_are_reached_by_keyboard(written: Path) -> None:
    source = written.read_text(encoding="utf-8")
    assert source.count("<table>") == source.count('<div class="scroll" tabindex="0"><table>') > 5
    assert "prefers-color-scheme: dark" in source


def test_paper_does_not_scroll_and_gets_whole_tables(written: Path) -> None:
    """Printed, the columns of a wide table that a window scrolls to were missing."""
    style = written.read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    printed = style.partition("@media print {")[2]
    assert ".scroll { overflow: visible; }" in printed
    assert "th, td { white-space: normal;" in printed


def test_escaping_leaves_other_scripts_and_letters_alone() -> None:
    assert escaped("Zürich 肺 ≥ 0.5") == "Zürich 肺 ≥ 0.5"
    assert escaped("a\nb\x00") == "a\\nb\\x00"
    assert escaped(0.5) == "0.5"


def test_a_drawing_is_svg_and_a_radiograph_is_png(report: EvaluationReport) -> None:
    assert picture(plot_roc(report.roc_curve())).startswith("data:image/svg+xml")
    assert picture(gallery()).startswith("data:image/png")
