from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from chestxray_covid.cli import main
from chestxray_covid.evaluation_report import EvaluationReport

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SET_UP = "python -m venv .venv && .venv/bin/pip install -q "


def set_up_commands() -> list[str]:
    """Return the commands that start from a fresh clone, as lines to paste."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [block.rstrip("\n") for block in blocks if ".venv/" in block]


def steps(command: str) -> list[list[str]]:
    return [shlex.split(step) for step in command.split(" && ")]


def test_the_first_screen_says_what_it_is_and_that_it_is_no_diagnostic_device() -> None:
    screen = "\n".join(README.splitlines()[:40])
    order = [
        screen.index("DenseNet-121"),
        screen.index("**It is not a diagnostic device.**"),
        screen.index(SET_UP),
        screen.index("Classifier.from_pretrained"),
        screen.index("build_densenet121"),
    ]
    assert order == sorted(order)


def test_prediction_takes_three_lines() -> None:
    first = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[0]
    assert len([line for line in first.splitlines() if line]) == 3


def test_two_commands_of_one_line_start_from_a_fresh_clone() -> None:
    job, tests = set_up_commands()
    assert "\n" not in job + tests
    assert job.startswith(f"{SET_UP}. && ")
    assert tests == f'{SET_UP}-e ".[dev]" && .venv/bin/pytest'


def test_the_commands_install_from_the_clone_and_name_no_registry() -> None:
    for command in set_up_commands():
        assert "://" not in command
        assert not re.search(r"--(extra-)?index-url|--find-links|(^| )-[if] ", command)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    known = extras["project"]["optional-dependencies"]
    named = re.findall(r"\.\[([\w,]+)\]", README)
    assert named
    assert {extra for group in named for extra in group.split(",")} <= set(known)


@pytest.mark.slow
def test_what_follows_the_installation_judges_every_phantom_with_the_bundled_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = [step for step in steps(set_up_commands()[0]) if "chestxray-covid" in step[0]]
    assert [step[1] for step in job] == ["download", "predict"]
    for step in job:
        result = CliRunner().invoke(main, step[1:], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert result.stdout.count("data/phantoms/") == 12


def test_training_your_own_leaves_a_model_its_numbers_and_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # after the first command of the page, as its reader is
    first = next(step for step in steps(set_up_commands()[0]) if "download" in step)
    assert CliRunner().invoke(main, first[1:], catch_exceptions=False).exit_code == 0
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    job = next(block for block in blocks if "--no-pretrained" in block).splitlines()
    assert [line.split()[1] for line in job] == ["download", "train", "predict"]
    for line in job:
        result = CliRunner().invoke(main, shlex.split(line)[1:], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    run = tmp_path / "runs" / "first"
    assert {"config.json", "history.json", "model.safetensors"} <= {p.name for p in run.iterdir()}
    assert EvaluationReport.load(run / "evaluation.json").n_images > 0
    images = list((tmp_path / "data" / "phantoms" / "covid19").iterdir())
    assert result.stdout.count("data/phantoms/covid19/") == len(images) > 0


def test_every_link_within_the_project_leads_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
        missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
        assert missing == [], page.name


def test_the_continuous_integration_runs_the_test_command_of_this_page() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -E '(.+)' README\.md", script)
    assert pattern
    found = [line for line in README.splitlines() if re.search(pattern[1], line)]
    assert found == [set_up_commands()[1]]
