from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import textwrap
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import click
import numpy as np
import pytest
import yaml
from PIL import Image

import chestxray_covid
from chestxray_covid import (
    Confounding,
    EpochRecord,
    EvaluationReport,
    History,
)
from chestxray_covid.__main__ import KEPT
from chestxray_covid.cli import main
from chestxray_covid.evaluation import evaluate_probabilities

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
RUN = {
    "command": "chestxray-covid train --data a --data b --output runs/baseline",
    "wall_time_s": 2425.0,
    "machine": {"cpu": "two cores of a model", "memory": "16 GiB"},
    "versions": {"torch": "2.10.0", "chestxray-covid": "0.1.0"},
    "date": "2026-01-02",
}
CONFOUNDING = Confounding(
    table={"cohen": {"normal": 10, "covid19": 90}, "kermany": {"normal": 300, "covid19": 0}},
    cramers_v=0.87,
    determined=0.75,
)


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS))
    import generate

    return generate  # type: ignore[no-any-return]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Return a folder with the JSON files of a run that never took place."""
    history = History(records=tuple(epoch(number) for number in range(1, 5)))
    contents = {"history": history, "evaluation": judged(), "confounding": CONFOUNDING}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content.to_dict()), encoding="utf-8")
    (tmp_path / "run.json").write_text(json.dumps(RUN), encoding="utf-8")
    return tmp_path


def epoch(number: int) -> EpochRecord:
    return EpochRecord(
        epoch=number,
        learning_rate=0.001,
        train_loss=1 / number,
        val_loss=abs(number - 2.9) / 10,
        val_accuracy=0.75,
        val_kappa=0.5,
        val_auroc=None,
        images_per_s=12.34,
        seconds=60.0,
        data_seconds=1.0,
        is_best=number < 4,
    )


def judged() -> EvaluationReport:
    """Return a report of 60 images: 20 COVID-19 and 5 normal in one source, 35 in the other."""
    rng = np.random.default_rng(0)
    labels = ["covid19"] * 20 + ["normal"] * 40
    score = np.clip(0.3 + 0.4 * np.array([name == "covid19" for name in labels]), 0, 1)
    score = np.clip(score + rng.normal(0, 0.2, 60), 0.01, 0.99)
    return evaluate_probabilities(
        labels,
        np.stack([1 - score, score], axis=1),
        classes=("normal", "covid19"),
        patients=[str(i // 2) for i in range(60)],
        sources=["cohen"] * 25 + ["kermany"] * 35,
        views=["AP"] * 10 + ["PA"] * 50,
        n_resamples=200,
    )


def flowing(text: str) -> str:
    """Return a text as one line, since where it is wrapped depends on its numbers."""
    return " ".join(text.split())


# ---------------------------------------------------------------- generated text


def test_the_readme_block_holds_the_measured_numbers_and_that_they_prove_nothing(
    generate: ModuleType, results: Path
) -> None:
    block = flowing(generate.readme_block(generate.load(results)))
    report = judged()
    for part in (report.overall, *report.by_source.values()):
        found = part.per_class["covid19"]["sensitivity"]
        cell = f"{found.value:.3f} ({found.low:.3f}–{found.high:.3f})" if found.n else "–"
        assert f"| {part.n_images} | {part.n_patients} | {cell} |" in block
    assert "**The AUROC of 0." in block
    assert "proves nothing about COVID-19" in block
    assert "97.5% of the cases (Cramér's V: 0.87)" in block  # (90 + 300) / 400
    assert "on 20 and 5 images with and without covid19" in block
    assert block.count("alone, where the collection cannot help") == 1  # kermany: one class
    assert "40 minutes (two cores of a model, 16 GiB)" in block


def test_the_baseline_page_holds_the_whole_run(generate: ModuleType, results: Path) -> None:
    page = flowing(generate.baseline_page(generate.load(results)))
    assert RUN["command"] in page
    assert "| cohen | 10 | 90 |" in page
    assert "| **3** | 0.001 | 0.333 | 0.010 | 0.750 | 0.500 | – | 12.3 |" in page
    assert "weights of epoch 3 of 4" in page
    report = judged()
    counts = report.overall.confusion[1]
    assert f"| **covid19** | {counts[0]} | {counts[1]} |" in page
    for _, row in report.to_frame().query("group == 'overall'").iterrows():
        shown = row["metric"].replace("_", " ")
        assert f"| {row['class']} | {shown} | {row['value']:.3f} (" in page
    assert "no evidence" in page
    assert "Inside cohen alone" in page
    assert "0.56" in page


def test_the_figure_is_drawn_from_the_history_and_says_so(
    generate: ModuleType, results: Path
) -> None:
    path = generate.draw_history(results)
    with Image.open(path) as image:
        assert image.text[generate.SOURCE_KEY] == generate.digest(results / "history.json")
        assert image.size[0] >= 800


def test_missing_results_are_named(generate: ModuleType, results: Path) -> None:
    (results / "history.json").unlink()
    (results / "run.json").unlink()
    with pytest.raises(SystemExit, match=r"lacks history\.json, run\.json\. Train with"):
        generate.load(results)


def test_an_incomplete_run_is_refused(generate: ModuleType, results: Path) -> None:
    run = {key: value for key, value in RUN.items() if key != "machine"}
    (results / "run.json").write_text(json.dumps(run), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"run\.json lacks machine"):
        generate.load(results)


def test_only_what_is_between_the_markers_of_the_readme_changes(generate: ModuleType) -> None:
    readme = "before\n<!-- results:start -->\nold\n<!-- results:end -->\nafter\n"
    changed = generate.with_blocks(readme, {"results": "new"})
    assert changed == readme.replace("old", "new")
    with pytest.raises(SystemExit, match="needs the markers"):
        generate.with_blocks("no markers", {"results": "new"})


def test_readme_baseline_page_and_figure_are_those_of_the_committed_results(
    generate: ModuleType,
) -> None:
    results = generate.load(generate.RESULTS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert generate.with_blocks(readme, {"results": generate.readme_block(results)}) == readme
    page = (DOCS / "baseline.md").read_text(encoding="utf-8")
    assert generate.baseline_page(results) == page
    with Image.open(generate.RESULTS / "history.png") as image:
        source = image.text[generate.SOURCE_KEY]
    assert source == generate.digest(generate.RESULTS / "history.json")


def test_the_page_on_shortcuts_has_the_measured_aurocs_of_thumbnails(generate: ModuleType) -> None:
    page = (DOCS / "shortcuts.md").read_text(encoding="utf-8")
    block = generate.thumbnail_block()
    assert generate.with_blocks(page, {"thumbnails": block}) == page
    rows = json.loads(generate.THUMBNAILS.read_text(encoding="utf-8"))["rows"]
    for row, line in zip(rows, block.splitlines()[2:5], strict=True):
        assert ("90 %" in line, "inside" in line) == (row["hidden"] > 0, "inside" in row.values())
        assert line.endswith(f"| {row['n'][0]} against {row['n'][1]:,} | {row['auroc']:.3f} |")


def test_the_pages_about_audits_are_those_of_the_committed_results(generate: ModuleType) -> None:
    audits = importlib.import_module("generate_audits")
    for name in audits.MODELS:
        page = (DOCS / f"audit_{name}.md").read_text(encoding="utf-8")
        assert audits.audit_page(name) == page
        with Image.open(audits.RESULTS / name / "audit.png") as image:
            source = image.text[generate.SOURCE_KEY]
        assert source == generate.digest(audits.RESULTS / name / "audit.json")
    assert audits.why_page() == (DOCS / "why_99.md").read_text(encoding="utf-8")
    with Image.open(audits.RESULTS / "baseline" / "roc.png") as image:
        source = image.text[generate.SOURCE_KEY]
    assert source == generate.digest(audits.RESULTS / "baseline" / "evaluation.json")


def test_the_page_on_metrics_says_how_often_intervals_hold_the_truth(generate: ModuleType) -> None:
    import generate_metrics

    found = json.loads(generate_metrics.RESULT.read_text(encoding="utf-8"))
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    assert generate.with_blocks(page, generate_metrics.blocks(found)) == page
    assert all(row["by_image"] < row["by_patient"] for row in found["rows"])
    assert all(row["by_patient"] <= row["used"] and row["used"] > 0.9 for row in found["rows"])
    equal = [row for row in found["differences"] if len(set(row["aurocs"])) == 1]
    assert all(row["used"] > 0.94 for row in equal), "as the page says of equal models"


def test_the_page_on_audits_says_what_became_of_planted_shortcuts(generate: ModuleType) -> None:
    import generate_planted

    found = json.loads(generate_planted.RESULT.read_text(encoding="utf-8"))
    page = (DOCS / "audit.md").read_text(encoding="utf-8")
    assert generate.with_blocks(page, {"planted": generate_planted.planted_block(found)}) == page
    said = {row["planted"]: row["sets"] for row in found["rows"]}

    def verdicts(planted: str, item: str) -> set[str]:
        return {one["items"][item] for one in said[planted]}

    # What the prose around the table says.
    for row in found["rows"]:
        for one in row["sets"]:
            assert row["kind"] != "outside" or one["items"]["occlusion"] == "fail"
            if row["kind"] == "lungs":
                assert one["overall"] != "fail"
                unsure = (
                    row["planted"] == "the whole image is seen" and "occlusion" in one["reasons"]
                )
                assert one["items"]["occlusion"] == ("not_assessable" if unsure else "pass")
                assert not unsure or "tell (mirrored)" in one["reasons"]["occlusion"]
                spoke = {name for name, verdict in one["items"].items() if verdict == "warn"}
                assert spoke <= {"confounding", "without_lungs"}
                assert "without_lungs" not in spoke or "frame" in one["reasons"]["without_lungs"]
    told = [one["items"]["occlusion"] for one in said["the whole image is seen"]]
    assert sorted(told) == ["not_assessable", "not_assessable", "pass"]
    assert {one["overall"] for one in said["a square over the mediastinum"]} == {"pass"}
    for one_sided in ("a spot in one lung", "size of the heart"):
        assert {one["overall"] for one in said[one_sided]} == {"warn"}
        assert all(list(one["reasons"]) == ["occlusion"] for one in said[one_sided])
        assert all(one["reasons"]["occlusion"].startswith("Mirrored") for one in said[one_sided])
    sex = said["shadows of breasts, called female, 90%"]
    assert all(list(one["reasons"]) == ["confounding"] for one in sex)
    assert {one["overall"] for one in sex} == {"warn"}
    assert verdicts("noise", "without_lungs") == {"pass"}
    assert verdicts("blur, 70%", "occlusion") == {"warn"}
    weak = [row["sets"] for row in found["rows"] if row["kind"] == "weak" and row["right"] == 0.7]
    assert {"pass", "not_assessable"} < {one["overall"] for sets in weak for one in sets}


@pytest.mark.slow
def test_shortcuts_can_still_be_planted_and_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    planted = importlib.import_module("planted_shortcuts")
    monkeypatch.setattr(planted, "TRAIN", 40)
    found = planted.audited(replace(planted.CORNER, test=40), 0)
    assert found["auroc"]["value"] == found["lungs_hidden"]["value"] == 1
    assert found["items"]["occlusion"] == found["overall"] == "fail"


def test_the_classic_design_fails_and_the_page_says_so(generate: ModuleType) -> None:
    audits = importlib.import_module("generate_audits")
    report = audits.load("baseline")
    for name in ("confounding", "without_lungs", "occlusion"):
        assert report.item(name).verdict == "fail"
        assert report.item(name).reason in flowing(audits.why_page())


def test_what_is_said_of_growth_is_what_was_measured(generate: ModuleType) -> None:
    import generate_growth

    result = json.loads(generate_growth.RESULT.read_text(encoding="utf-8"))
    page = (DOCS / "batch.md").read_text(encoding="utf-8")
    blocks = {
        "cost": generate_growth.cost_block(result),
        "growth": generate_growth.growth_block(result),
    }
    assert generate.with_blocks(page, blocks) == page
    with Image.open(generate_growth.FIGURE) as image:
        assert image.text[generate.SOURCE_KEY] == generate.digest(generate_growth.RESULT)
    largest = {"count": 3600, "seconds": 36.0}  # 100 files per second on two cores
    cost = generate_growth.cost_block({**result, "predict": [largest]})
    cores = result["machine"]["cores"]
    assert f"{1e6 / 100 * cores / 3600:.1f} core-hours per million" in " ".join(cost.split())


def test_every_result_is_read_by_what_writes_the_pages() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("generate*.py"))
    results = [*(DOCS / "results").rglob("*.json"), *(ROOT / "benchmarks/results").glob("*.json")]
    folds = ("", "_warm_up", "_warm_up_of_3", "_mixup", "_224px", "_160px_224px")
    read_by_probes = {f"folds{more}_evaluation" for more in folds}
    names = {path.stem for path in results} - read_by_probes
    assert [name for name in sorted(names) if not re.search(rf'"{name}(\.json)?"', code)] == []


# ---------------------------------------------------------------- what is written by hand


def command_lines() -> list[tuple[str, list[str]]]:
    """Return page and arguments of every call of the command line in a shell block."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in re.split(r"\n|&&|\|\|", block):
                _, name, call = line.partition("chestxray-covid ")
                if name and not line.lstrip().startswith("#"):
                    found.append((page.name, shlex.split(call)))
    return found


def test_the_pages_show_the_command_line() -> None:
    assert {call[0] for _, call in command_lines()} >= {"download", "train", "evaluate", "predict"}


@pytest.mark.parametrize(("page", "call"), command_lines())
def test_every_command_line_has_only_options_that_exist(page: str, call: list[str]) -> None:
    command = main.commands[call[0]]
    options = {name for p in command.params for name in p.opts if isinstance(p, click.Option)}
    assert {word for word in call[1:] if word.startswith("--")} <= options, page


def trained_into(page: Path) -> list[str]:
    """Return the run folders that commands and snippets of a page train into."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"\$run\b", "".join(re.findall(r"^run=(\S+)", text, re.MULTILINE)), text)
    commands = re.findall(r"\btrain[\w.]* --.*?--output \"?([\w/]+)", text)
    return commands + re.findall(r"Trainer\([^`]*?\boutput=\"(.+?)\"", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_trains_into_a_folder_that_holds_a_run_by_then(page: Path) -> None:
    folders = trained_into(page)
    if page.parent == DOCS and page.name != "tutorial.md":
        folders += trained_into(DOCS / "tutorial.md")  # which comes first
    assert sorted(folders) == sorted(set(folders))


def test_the_pages_that_train_are_read() -> None:
    assert trained_into(DOCS / "tutorial.md") == ["runs/first", "runs/tutorial"]
    assert len(trained_into(DOCS / "cluster.md")) == 6
    assert len(trained_into(DOCS / "cohen_and_kermany.md")) == 4


def test_a_run_of_the_tutorial_is_asked_for_sides_of_the_data_that_it_was_trained_on() -> None:
    calls = [(page, call) for page, call in command_lines() if page != "README.md"]
    value = {page: call[call.index("--data") + 1] for page, call in calls if call[0] == "train"}
    asked = [call for _, call in calls if {"runs/first", "--split"} <= set(call)]
    assert asked
    for call in asked:
        assert call[call.index("--data") + 1] == value["tutorial.md"]


def test_the_tutorial_says_which_folders_of_the_readme_are_in_its_way() -> None:
    made: dict[str, set[str]] = {"README.md": set(), "tutorial.md": set()}
    for page, call in command_lines():
        if page in made and call[0] in ("download", "train"):
            at = call.index("--output") + 1 if call[0] == "train" else 2
            made[page].add(call[at])
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    removed = re.findall(r"`rm -r\s+(.+?)`", page)
    assert set(" ".join(removed).split()) == made["README.md"] & made["tutorial.md"]


def test_every_module_has_its_place_in_the_table_of_layers() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = text.partition("<!-- layers:start -->")[2].partition("<!-- layers:end -->")[0]
    cells = re.findall(r"^\| (`.+?) \|", rows, re.MULTILINE)
    named = re.findall("`(.+?)`", " ".join(cells))
    package = Path(chestxray_covid.__file__).parent
    modules = {
        ".".join(path.relative_to(package).with_suffix("").parts)
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert sorted(named) == sorted(modules)


def test_the_page_on_speed_says_under_which_settings_training_starts_again() -> None:
    assert f"`GLIBC_TUNABLES={KEPT}`" in (DOCS / "cluster.md").read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == chestxray_covid.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(.+?)\]", changelog, re.MULTILINE)[1] == chestxray_covid.__version__


def test_every_page_is_in_the_contents() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL)
    listed = [line for block in blocks for line in block.split() if not line.startswith(":")]
    assert {page.stem for page in DOCS.glob("*.md")} - set(listed) == {"index"}


def test_snippets_say_how_text_is_encoded() -> None:
    """Windows takes another encoding than UTF-8, in which the library reads and writes."""
    silent = []
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        plain = (textwrap.dedent(block) for block in blocks if ">>> " not in block)
        nodes = (node for block in plain for node in ast.walk(ast.parse(block)))
        for call in (node for node in nodes if isinstance(node, ast.Call)):
            is_text = ast.unparse(call.func).endswith((".read_text", ".write_text"))
            if is_text and "encoding" not in {keyword.arg for keyword in call.keywords}:
                silent.append(f"{page.name}: {ast.unparse(call)}")
    assert silent == []


@pytest.mark.real_data
@pytest.mark.slow
def test_on_the_real_collections_a_linear_classifier_gives_the_numbers_of_the_page_again(
    generate: ModuleType, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    committed = json.loads(generate.THUMBNAILS.read_text(encoding="utf-8"))["rows"]
    for now, then in zip(
        importlib.import_module("thumbnails").measured(real_data), committed, strict=True
    ):
        assert now == {**then, "auroc": pytest.approx(then["auroc"], abs=0.003)}
