"""The command line, as a process of its own where that matters."""

from __future__ import annotations

import csv
import errno
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from chestxray_covid import (
    CheckpointError,
    ChestXrayDataset,
    Classifier,
    EvaluationReport,
    Preprocess,
    Split,
    SyntheticChestXray,
    TrainingConfig,
    __version__,
    confounders,
    confounding,
    hub,
    load_image,
    open_dataset,
    split_by_patient,
)
from chestxray_covid.__main__ import KEPT
from chestxray_covid.__main__ import main as start
from chestxray_covid.calibration import fold_temperature
from chestxray_covid.checkpoint import (
    ModelConfig,
    load_checkpoint,
    load_config,
    save_checkpoint,
)
from chestxray_covid.cli import NOT_A_DEVICE, main
from chestxray_covid.command import HomePath, check_new_checkpoint, place_of_split
from chestxray_covid.confounders import Confounding
from chestxray_covid.datasets import duplicates
from chestxray_covid.training_state import StateStore
from conftest import random_checkpoint, random_tensors
from shallow import CODE

pytestmark = pytest.mark.usefixtures("shallow", "drawn_once")

#: What sets up the memory of a process that trains.
MEMORY = ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")
TRAIN = ["--no-pretrained", "--epochs", "1", "--size", "32", "--batch-size", "8", "--device", "cpu"]


def call(*arguments: object) -> Result:
    # What a command sets up for its process must not outlive it in the tests'.
    return CliRunner(env={name: os.environ.get(name) for name in MEMORY}).invoke(
        main, [str(a) for a in arguments]
    )


@pytest.fixture(scope="module")
def checkpoint_folder(shallow: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SyntheticChestXray(40, image_size_px=64).save(tmp_path_factory.mktemp("data") / "p")


@pytest.fixture(scope="module")
def run(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run that the command line trained on phantoms; do not change it."""
    output = tmp_path_factory.mktemp("runs") / "run"
    done = call("train", "--data", phantoms, "--output", output, *TRAIN)
    assert done.exit_code == 0, done.output
    assert NOT_A_DEVICE in done.output
    assert "Cramér's V" in done.output
    return output


def test_help_and_version_import_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from chestxray_covid.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'pandas', 'requests') if m in sys.modules])"
    )
    for argument in ("--help", "--version"):
        command = [sys.executable, "-c", code, argument]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert shown.endswith("[]\n")
    assert __version__ in shown


def test_help_names_the_commands_and_says_what_this_is_not() -> None:
    shown = call("--help").output
    for command in ("download", "evaluate", "info", "models", "predict", "push", "train"):
        assert f"\n  {command} " in shown
        assert call(command, "--help").exit_code == 0
    assert NOT_A_DEVICE in " ".join(shown.split())


def test_help_says_of_every_option_what_it_is_for() -> None:
    silent = [
        (name, option.name)
        for name, command in main.commands.items()
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    ]
    assert not silent


def test_a_run_holds_everything_that_judging_it_needs(run: Path) -> None:
    names = {p.name for p in run.iterdir()}
    assert names == {
        *("model.safetensors", "config.json", "history.json", "history.csv"),
        *("split.json", "confounding.json", "evaluation.json"),
    }
    assert json.loads((run / "confounding.json").read_text())["determined"] == 0
    report = EvaluationReport.load(run / "evaluation.json")
    split = json.loads((run / "split.json").read_text())["samples"]
    assert report.n_images == sum(entry["side"] == "test" for entry in split)


def test_the_sign_of_the_home_folder_is_understood_where_no_shell_has_replaced_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    done = call("train", "--data=~/run", "--output=~/run")
    assert f"{tmp_path / 'run'} already holds a run" in done.output
    assert place_of_split("~/run") == tmp_path / "run" / "split.json"
    done = call("train", "--data=", "--output=~/other")
    assert "Path '' does not exist" in done.output, "an empty variable is not the current folder"


@pytest.mark.parametrize("command", ["predict", "evaluate", "audit", "train"])
def test_a_dash_is_no_name_of_a_file(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(command, *(["."] if command == "predict" else ["--data", "."]), "--output", "-")
    assert done.exit_code == 2
    kind = "folder" if command == "train" else "file"
    assert f"- is no standard output here, but would be a {kind}." in " ".join(done.output.split())
    assert not Path("-").exists()


@pytest.mark.parametrize("command", ["train", "evaluate", "audit", "export"])
def test_where_nothing_can_be_written_is_said_before_the_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    given = () if command == "export" else ("--data", tmp_path)
    done = call(command, *given, "--output", Path("file", "new", "report"))
    assert done.exit_code == 2
    assert f"cannot be written: {tmp_path / 'file'} is no folder" in done.output
    done = call(command, *given, "--output", "")
    assert done.exit_code == 2
    assert "An empty path names no place to write" in done.output
    done = call(command, *given, "--output", "s3://bucket/report")
    assert done.exit_code == 2
    assert "s3://bucket/report is an address, expected a path on this machine" in done.output
    monkeypatch.setattr(os, "access", lambda *asked: asked != (tmp_path, os.W_OK))
    done = call(command, *given, "--output", Path("new", "report"))
    assert done.exit_code == 2
    assert f"{tmp_path} is not writable" in done.output
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    done = call(command, *given, "--output", "stdout")
    assert done.exit_code == 2
    folder = command in ("train", "export")
    assert ("is a file" if folder else f"{tmp_path / 'stdout'} is a device") in done.output
    (tmp_path / "drive").symlink_to(tmp_path / "taken out")
    if folder:
        done = call(command, *given, "--output", "drive")
        assert done.exit_code == 2
        assert f"{tmp_path / 'drive'} cannot be written: it is a link to nothing." in done.output
    (tmp_path / "own").mkdir()
    assert HomePath(path_type=Path).convert("own", None, None) == Path("own")


def test_predict_says_before_the_work_too_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    given = ("predict", tmp_path, "--model", "nowhere", "--output")
    done = call(*given, Path("file", "new.csv"))
    assert done.exit_code == 2
    assert f"cannot be written: {tmp_path / 'file'} is no folder" in done.output
    assert "An empty path names no place to write" in call(*given, "").output
    assert "nowhere" in call(*given, "s3://bucket/new.parquet").output, "the model comes next"
    monkeypatch.setattr(os, "access", lambda *asked: asked != (tmp_path, os.W_OK))
    for output in ("new.jsonl", "new.parquet"):
        assert f"{tmp_path} is not writable" in call(*given, output).output


def test_a_place_on_a_drive_that_is_not_there_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os.path, "lexists", lambda path: False)  # as of Z:\ and all below it
    done = call("evaluate", "--data", ".", "--output", "/gone/report.json")
    assert done.exit_code == 2
    assert "/gone/report.json cannot be written: /gone is no folder" in done.output


def test_no_patient_is_on_two_sides_of_a_runs_split(run: Path) -> None:
    sides: dict[str, set[str]] = {}
    for entry in json.loads((run / "split.json").read_text())["samples"]:
        sides.setdefault(entry["patient_id"], set()).add(entry["side"])
    assert all(len(s) == 1 for s in sides.values())
    assert set.union(*sides.values()) == {"train", "val", "test"}


def test_training_again_into_a_run_is_refused_and_resuming_it_changes_nothing(
    run: Path, phantoms: Path
) -> None:
    before = (run / "model.safetensors").read_bytes()
    again = call("train", "--data", phantoms, "--output", run, *TRAIN)
    assert again.exit_code == 2
    assert "already holds a run" in again.output
    resumed = call("train", "--data", phantoms, "--output", run, *TRAIN, "--resume", "--quiet")
    assert resumed.exit_code == 0, resumed.output
    assert (run / "model.safetensors").read_bytes() == before


def test_resuming_where_there_is_no_run_is_refused_and_leaves_nothing(
    phantoms: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    refused = call("train", "--data", phantoms, "--output", output, *TRAIN, "--resume")
    assert refused.exit_code == 2
    assert "holds no run to continue: leave out --resume" in refused.output
    assert not output.exists()


def test_the_split_of_a_run_that_never_was_is_made_again(
    run: Path, phantoms: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(run / "split.json", tmp_path / "run")
    options = [*TRAIN, "--seed", 1, "--quiet"]
    done = call("train", "--data", phantoms, "--output", tmp_path / "run", *options)
    assert done.exit_code == 0, done.output
    expected = split_by_patient(open_dataset(phantoms), seed=1).indices
    own, other = ((p / "split.json").read_text() for p in (tmp_path / "run", run))
    split = Split.load(tmp_path / "run" / "split.json", open_dataset(phantoms))
    assert split.indices == expected
    assert own != other


def test_a_run_that_is_refused_leaves_the_folder_to_the_one_at_work(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    with ExitStack() as first:

        def meanwhile(dataset: ChestXrayDataset) -> Confounding:
            first.enter_context(StateStore(output).claimed(resume=False, make=True))
            return confounding(dataset)

        monkeypatch.setattr(confounders, "confounding", meanwhile)
        refused = call("train", "--data", phantoms, "--output", output, *TRAIN, "--quiet")
    assert f"Another run is at work in {output}" in refused.output
    assert list(output.iterdir()) == []


def test_a_finished_run_gets_back_a_split_that_it_lost(
    run: Path, phantoms: Path, tmp_path: Path
) -> None:
    lost = Path(shutil.copytree(run, tmp_path / "run"))
    (lost / "split.json").unlink()
    again = ["train", "--data", phantoms, "--output", lost, *TRAIN, "--resume", "--quiet"]
    other = call(*again, "--seed", 1)
    assert "differs in ['data', 'seed']" in other.output
    assert not (lost / "split.json").exists()
    done = call(*again)
    assert done.exit_code == 0, done.output
    assert (lost / "split.json").read_bytes() == (run / "split.json").read_bytes()


def test_training_asks_for_huge_pages_unless_told_otherwise(
    run: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = ["train", "--data", str(phantoms), "--output", str(run), *TRAIN, "--resume", "--quiet"]
    for tunables, given, expected in ((None, None, "1"), (None, "0", "0"), ("", None, None)):
        for name, value in zip(MEMORY, (tunables, given), strict=True):
            monkeypatch.setenv(name, value or "")
            if value is None:
                monkeypatch.delenv(name)
        assert CliRunner().invoke(main, again).exit_code == 0
        assert os.environ.get("THP_MEM_ALLOC_ENABLE") == expected


STARTED = """
import os, sys
sys.argv = ["chestxray-covid", *sys.argv[1:]]
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), os.environ.get("THP_MEM_ALLOC_ENABLE"))
sys.stdout.flush()
from chestxray_covid.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("command", "given", "begins"),
    [
        ("train", {}, 2),
        ("train", {"THP_MEM_ALLOC_ENABLE": "1"}, 1),
        ("train", {"GLIBC_TUNABLES": ""}, 1),
        ("info", {}, 1),
    ],
)
def test_training_begins_anew_with_memory_that_glibc_keeps_unless_told_otherwise(
    command: str, given: dict[str, str], begins: int
) -> None:
    libc, version = platform.libc_ver()
    if libc != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
        pytest.skip("needs glibc 2.35 or newer")
    kept = {k: v for k, v in os.environ.items() if k not in MEMORY} | given
    options = [sys.executable, "-u", "-c", STARTED, command, "--help"]
    done = subprocess.run(options, capture_output=True, text=True, check=True, env=kept)
    lines = done.stdout.splitlines()
    starts = [line.split(" ") for line in lines[: lines.index("")] if line[:1].isdigit()]
    assert len(starts) == begins
    assert len({process for process, *_ in starts}) == 1
    assert starts[0][1:] == [given.get(name, "None") for name in MEMORY]
    assert f"Usage: chestxray-covid {command}" in done.stdout
    if begins > 1:
        assert starts[1][1:] == [KEPT, "0"]


@pytest.mark.parametrize(
    ("other", "begins"),
    [
        ({}, True),
        ({"libc": ("glibc", "2.35")}, True),
        ({"libc": ("glibc", "2.34")}, False),
        ({"libc": ("", "")}, False),
        ({"platform": "darwin"}, False),
        ({"executable": ""}, False),
        ({"frozen": True}, False),
        ({"argv": ["/lib/chestxray_covid/__main__.py", "train", "--help"]}, True),
        ({"argv": ["/bin/a_host", "train", "--help"]}, False),
        ({"argv": ["chestxray-covid", "train", "--quiet"]}, False),
        ({"argv": ["chestxray-covid", "info", "train"]}, False),
    ],
)
def test_only_a_process_of_its_own_begins_anew(
    monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], begins: bool
) -> None:
    for name in MEMORY:
        monkeypatch.delenv(name, raising=False)
    own = {"platform": "linux", "argv": ["/bin/chestxray-covid", "train", "--help"]}
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", *own["argv"]])
    monkeypatch.setattr(platform, "libc_ver", lambda: other.get("libc", ("glibc", "2.36")))
    for name, value in (own | other).items():
        if name != "libc":
            monkeypatch.setattr(sys, name, value, raising=False)
    started: list[Any] = []

    def execve(*process: Any) -> None:
        started.append(process)
        raise OSError(errno.ENOENT, "the interpreter is gone")

    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(SystemExit) as ended:  # of --help, or of a usage error: it goes on
        start()
    assert ended.value.code in (0, 2)
    assert len(started) == begins
    if begins:
        program, given, environment = started[0]
        assert (program, given[1:]) == (sys.executable, ["-X", "dev", *own["argv"]])
        assert [environment[name] for name in MEMORY] == [KEPT, "0"]


def test_the_baseline_recipe_limit_and_cache_are_passed_on(phantoms: Path, tmp_path: Path) -> None:
    options = ["--recipe", "baseline", "--limit", 12, "--cache", tmp_path / "cache", "--quiet"]
    done = call("train", "--data", phantoms, "--output", tmp_path / "run", *options, *TRAIN)
    assert done.exit_code == 0, done.output
    training = json.loads((tmp_path / "run" / "config.json").read_text())["provenance"]["training"]
    assert (training["optimizer"], training["balance"]) == ("adam", "none")
    assert (training["epochs"], training["preprocess"]["size_px"]) == (1, 32)
    assert list((tmp_path / "cache").rglob("*.npy"))
    assert len(json.loads((tmp_path / "run" / "split.json").read_text())["samples"]) == 24


def test_a_split_that_looks_for_no_copies_compares_no_images(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looks(*_: object) -> None:
        raise click.ClickException("images are compared")

    monkeypatch.setattr(duplicates, "_thumbnails", looks)
    command = ["train", "--data", phantoms, "--output", tmp_path / "run", *TRAIN, "--quiet"]
    assert "images are compared" in call(*command).output
    done = call(*command, "--no-copies")
    assert done.exit_code == 0, done.output
    assert "images are compared" not in done.output


@pytest.mark.slow
def test_a_signal_ends_with_its_status_and_resume_finishes(phantoms: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = [*TRAIN, "--quiet"]
    options[options.index("--epochs") + 1] = "40"
    base = ["train", "--data", str(phantoms), "--output", str(output), *options]
    command = [sys.executable, "-c", "from chestxray_covid.cli import main; main()", *base]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in range(600):
        if (output / "state").is_dir() and list((output / "state").glob("step-*")):
            break
        time.sleep(0.1)
    at_work = call(*base, "--resume")
    assert f"Another run is at work in {output}" in at_work.output
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert "--resume" in shown
    states = [p.name for p in (output / "state").iterdir()]
    assert len(states) == 1
    assert states[0].startswith("step-")
    refused = call(*base)
    assert "already holds a run" in refused.output


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Return a folder with two radiographs, two broken files and one that is no image."""
    folder = tmp_path / "mixed"
    (folder / "sub").mkdir(parents=True)
    images = SyntheticChestXray(2, image_size_px=64)
    images.image(0).save(folder / "a,1.png")
    images.image(1).save(folder / "sub" / "b\n2.jpg", quality=95)
    (folder / "page.png").write_text("<!DOCTYPE html><html></html>")
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_predict_writes_a_row_per_image_and_names_what_failed(
    mixed: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "predictions.csv"
    done = call("predict", mixed, "--model", checkpoint_folder, "--output", output)
    assert done.exit_code == 1
    assert "page.png" in done.output
    assert "HTML" in done.output
    assert "zero.jpg" in done.output
    with output.open(encoding="utf-8", newline="") as file:
        rows = {Path(row["path"]).name: row for row in csv.DictReader(file)}
    assert set(rows) == {"a,1.png", "b\n2.jpg", "page.png", "zero.jpg"}
    expected = Classifier.from_pretrained(checkpoint_folder).predict(mixed / "a,1.png")
    assert rows["a,1.png"]["label"] == expected.label
    assert float(rows["a,1.png"]["p_covid19"]) == pytest.approx(
        expected.probabilities["covid19"], abs=1e-6
    )
    assert rows["a,1.png"]["is_positive"] == str(expected.is_positive)
    assert rows["page.png"]["label"] == ""
    assert "empty" in rows["zero.jpg"]["error"]
    assert [p.name for p in output.parent.iterdir()] == ["predictions.csv"]


def test_predict_writes_json_lines(mixed: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "predictions.jsonl"
    done = call("predict", mixed, "--model", checkpoint_folder, "--output", output)
    assert done.exit_code == 1
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 4
    good = [row for row in rows if "error" not in row]
    assert len(good) == 2
    assert all(sum(row["probabilities"].values()) == pytest.approx(1) for row in good)


def test_a_folder_without_images_is_an_error_and_leaves_no_file(
    checkpoint_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    output = tmp_path / "out.csv"
    arguments = ["predict", tmp_path / "empty", "--model", checkpoint_folder]
    for extra in ([], ["--output", output]):
        done = call(*arguments, *extra)
        assert done.exit_code == 1
        assert "No image file in" in done.output
        assert ".dcm; list others" in " ".join(done.output.split())
    assert not output.exists()


def test_the_same_seed_trains_the_same_model(phantoms: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        options = [*TRAIN, "--seed", 3, "--limit", 12, "--quiet"]
        done = call("train", "--data", phantoms, "--output", tmp_path / name, *options)
        assert done.exit_code == 0, done.output
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("a", "b"))
    assert first == second


def test_predict_prints_a_table_and_succeeds_when_all_is_well(
    mixed: Path, checkpoint_folder: Path
) -> None:
    done = call("predict", mixed / "a,1.png", "--model", checkpoint_folder)
    assert done.exit_code == 0
    header, row = [line.split() for line in done.output.splitlines()[:2]]
    assert header == ["label", "normal", "pneumonia", "covid19", "path"]
    assert row[0] in header[1:4]
    assert sum(map(float, row[1:4])) == pytest.approx(1, abs=1e-3)
    assert row[4].endswith("a,1.png")
    assert NOT_A_DEVICE in done.output


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8")
def test_hostile_names_survive_csv_and_json(checkpoint_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "names"
    folder.mkdir()
    picture = SyntheticChestXray(1, classes=("normal",), image_size_px=32).image(0)
    names = [b"=cmd.png", b"a\rb.png", b'"q".png', b"\xff\xfe.png", "\u202egnp.png".encode()]
    names += [b"n" * 240 + b".png", b"- x;y\t.png", b"@SUM(1).png"]
    for name in names:
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:  # noqa: PTH123 - bytes
            picture.save(file, "PNG")
    for kind in ("csv", "jsonl"):
        output = tmp_path / f"out.{kind}"
        assert (
            call("predict", folder, "--model", checkpoint_folder, "--output", output).exit_code == 0
        )
        with output.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            found = (
                [row["path"] for row in csv.DictReader(file)]
                if kind == "csv"
                else [json.loads(line)["source"] for line in file]
            )
        assert {os.fsencode(Path(path).name) for path in found} == set(names)


def test_an_interrupted_prediction_leaves_no_file(
    mixed: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "full" / "out.csv"
    code = (
        f"{CODE}import resource, sys; from chestxray_covid.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY)); main()"
    )
    arguments = ["predict", mixed, "--model", checkpoint_folder, "--output", output]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    tests = Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tests)
    assert done.returncode == 1
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert list(output.parent.iterdir()) == []


def test_evaluate_judges_the_held_out_side_and_warns_about_the_rest(
    run: Path, phantoms: Path, tmp_path: Path
) -> None:
    output = tmp_path / "report.json"
    arguments = ["evaluate", "--model", run, "--data", phantoms]
    held_out = call(*arguments, "--split", "test", "--output", output)
    assert held_out.exit_code == 0, held_out.output
    assert "Caution" not in held_out.output
    report, first = EvaluationReport.load(output), EvaluationReport.load(run / "evaluation.json")
    assert report.overall.metrics["accuracy"] == first.overall.metrics["accuracy"]
    whole = call(*arguments)
    assert whole.exit_code == 0
    trained = json.loads((run / "split.json").read_text())["samples"]
    count = sum(entry["side"] == "train" for entry in trained)
    assert f"trained on {count} of these 40 images" in whole.output


@pytest.mark.parametrize("seed", [0, 1])
def test_training_on_says_which_images_of_the_test_side_the_checkpoint_has_seen(
    run: Path, phantoms: Path, tmp_path: Path, seed: int
) -> None:
    arguments = [argument for argument in TRAIN if argument != "--no-pretrained"]
    arguments += ["--pretrained", run, "--seed", seed, "--output", tmp_path / "on"]
    done = call("train", "--data", phantoms, *arguments)
    assert done.exit_code == 0, done.output
    before, after = (
        json.loads((folder / "split.json").read_text())["samples"]
        for folder in (run, tmp_path / "on")
    )
    trained = {entry["hash"] for entry in before if entry["side"] == "train"}
    judges = [entry["hash"] in trained for entry in after if entry["side"] == "test"]
    text = (
        f"--pretrained was trained on {sum(judges)} of the test side's {len(judges)} images; take"
    )
    assert (text in done.output) is (seed == 1)
    assert any(judges) is (seed == 1)


@pytest.mark.parametrize("size", [(), ("--size", 48)])
def test_training_on_begins_with_the_preprocessing_of_the_checkpoint(
    phantoms: Path, tmp_path: Path, size: tuple[object, ...]
) -> None:
    known = Preprocess(size_px=40, mean=0.3, std=0.2)
    config = ModelConfig(classes=("normal", "covid19"), preprocess=known)
    save_checkpoint(tmp_path / "known", config, random_tensors())
    options = ["--epochs", 1, "--device", "cpu", "--recipe", "baseline", *size]
    options += ["--pretrained", tmp_path / "known", "--output", tmp_path / "on"]
    done = call("train", "--data", phantoms, *options)
    assert done.exit_code == 0, done.output
    expected = replace(known, size_px=48) if size else known
    assert load_config(tmp_path / "on").preprocess == expected


def options_of(run: Path) -> dict[str, object]:
    return dict(load_config(run).provenance["training"])


def test_options_of_a_file_are_taken_where_the_command_line_has_none(
    phantoms: Path, tmp_path: Path
) -> None:
    written = {"epochs": 1, "seed": 3, "device": "cpu", "batch_size": 8, "learning_rate": 0.01}
    written |= {"preprocess": {"size_px": 32, "mean": 0.3}, "augmentation": {"blur": 0.1}}
    (tmp_path / "options.json").write_text(json.dumps(written), encoding="utf-8-sig")
    start = ["--data", phantoms, "--no-pretrained"]
    given = ["--learning-rate", 0.02, "--size", 40, "--workers", 1, "--recipe", "baseline"]
    for name, file, more in (
        ("first", "options.json", given),
        ("again", "first/config.json", []),
        ("other", "first/config.json", ["--seed", 0, "--device", "auto"]),
    ):
        place = ["--output", tmp_path / name, "--config", tmp_path / file]
        done = call("train", *start, *place, *more, *["--quiet"] * (name != "other"))
        assert done.exit_code == 0, done.output
    first, again, other = (options_of(tmp_path / name) for name in ("first", "again", "other"))
    assert first["preprocess"] == Preprocess(size_px=40, mean=0.3).to_dict()
    classic = TrainingConfig.baseline().augmentation
    assert first["augmentation"] == replace(classic, blur=0.1).to_dict()
    names = ("epochs", "seed", "device", "batch_size", "learning_rate", "workers", "optimizer")
    assert [first[name] for name in names] == [1, 3, "cpu", 8, 0.02, 1, "adam"]
    assert again == first
    assert other == first | {"seed": 0, "device": "auto", "progress": True}
    splits = [(tmp_path / name / "split.json").read_text() for name in ("first", "again", "other")]
    assert splits[0] == splits[1] != splits[2]
    assert equal_weights(tmp_path / "first", tmp_path / "again")


def equal_weights(one: Path, other: Path) -> bool:
    return load_config(one).weights_sha256 == load_config(other).weights_sha256


def test_options_of_a_file_go_before_the_preprocessing_of_a_checkpoint(
    run: Path, phantoms: Path, tmp_path: Path
) -> None:
    (tmp_path / "options.json").write_text('{"epochs": 1, "preprocess": {"size_px": 40}}')
    options = ["--config", tmp_path / "options.json", "--pretrained", run, "--device", "cpu"]
    done = call("train", "--data", phantoms, *options, "--output", tmp_path / "on", "--quiet")
    assert done.exit_code == 0, done.output
    assert load_config(tmp_path / "on").preprocess == Preprocess(size_px=40)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"[1]", "takes an object of names and values, got [1]"),
        (b"{", "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        (b"[" * 100_000, "nested deeper than"),
        (b" " * 600_000, "too large"),
        (b'{"epochs": NaN}', "NaN"),
        (b'{"epochs": 1, "epochs": 2}', "twice"),
        (b'{"\\u001b[2J": 1}', "has no option named \\x1b[2J"),
        (b'{"epochs": "many"}', "An option is impossible: epochs"),
        (b'{"mixup": 0.2, "within_sources": true}', "or within_sources=False. Expected"),
        (b'{"format_version": 2, "provenance": []}', "does not say with which options"),
        (b'{"format_version": 2, "provenance": {"training": 7}}', "got 7"),
    ],
)
def test_a_file_without_options_is_refused_by_name(
    phantoms: Path, tmp_path: Path, content: bytes, match: str
) -> None:
    (tmp_path / "options.json").write_bytes(content)
    options = ["--config", tmp_path / "options.json", "--output", tmp_path / "run"]
    done = call("train", "--data", phantoms, *options)
    assert done.exit_code == 1
    shown = done.stderr
    assert f"{tmp_path / 'options.json'}: " in shown
    assert match in shown
    assert "Expected a JSON object of TrainingConfig's options" in shown
    assert not (tmp_path / "run").exists()


def test_evaluate_decides_at_the_checkpoints_threshold_unless_told_otherwise(
    run: Path, phantoms: Path, tmp_path: Path
) -> None:
    output, markdown = tmp_path / "report.json", tmp_path / "deeper" / "report.md"
    arguments = ["evaluate", "--model", run, "--data", phantoms, "--split", "test"]
    done = call(*arguments, "--output", output, "--markdown", markdown, "--prevalence", "0.02")
    assert done.exit_code == 0, done.output
    report = EvaluationReport.load(output)
    (point,) = report.operating_points
    expected = report.operating_point(threshold=0.5, prevalence=0.02, versus="normal")
    assert point.to_dict() == expected.to_dict()
    assert str(point) in done.output
    text = markdown.read_text(encoding="utf-8")
    assert text == report.to_markdown()
    assert "densenet121" in text
    assert str(run) not in output.read_text(encoding="utf-8")
    assert report.model["provenance"]["train"]["source"] == "synthetic"


def test_what_evaluate_found_is_shown_even_if_no_file_can_be_written(
    run: Path, phantoms: Path, tmp_path: Path
) -> None:
    for option in ("--output", "--markdown"):
        path = tmp_path / ("r" * 300)  # longer than names may be, which only writing shows
        done = call("evaluate", "--model", run, "--data", phantoms, option, path)
        assert done.exit_code == 1
        assert "covid19 against all others by subgroup" in done.output


@pytest.mark.parametrize("command", ["evaluate", "audit"])
def test_a_report_replaces_nothing_that_it_is_made_from(
    command: str, run: Path, phantoms: Path, tmp_path: Path
) -> None:
    table = tmp_path / "data"  # without the end of a table's name
    shutil.copy(phantoms / "manifest.csv", table)
    common = [command, "--model", run, "--data", table]
    kept = [table, run / "config.json", run / "model.safetensors", run / "split.json"]
    for path in kept:
        before = path.read_bytes()
        done = call(*common, "--output", path)
        assert done.exit_code == 2
        assert "would replace what the report is made from. Give it another name." in done.output
        assert path.read_bytes() == before
    for name in ("results.csv", "results.XLSX", "1.png"):
        done = call(*common, "--output", tmp_path / name)
        assert done.exit_code == 2
        assert f"{name} is named like a table or an image, and a report is neither." in " ".join(
            done.output.split()
        )
    (tmp_path / "loop").symlink_to("loop")  # which would be replaced
    done = call(*common, "--output", tmp_path / "loop")
    assert isinstance(done.exception, SystemExit), "the table names no image from there"
    page = tmp_path / "page"
    for name in ("index.html", "audit.json" if command == "evaluate" else "evaluation.json"):
        done = call(*common, "--output", page / name, "--report", page)
        assert done.exit_code == 2
        assert "is the place of another report, of this command or on its page." in " ".join(
            done.output.split()
        )
    page.mkdir()
    (page / "index.html").write_text("<p>my site", encoding="utf-8")
    done = call(*common, "--report", page)
    assert done.exit_code == 1
    assert "index.html is a page of something else, and would be replaced." in done.output


@pytest.mark.parametrize("command", ["calibrate", "quantize"])
def test_a_new_checkpoint_does_not_replace_another_run(
    command: str, run: Path, checkpoint_folder: Path, phantoms: Path
) -> None:
    """Whose split and history would lie beside weights that are others."""
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    more = ["--calibration", phantoms] if command == "quantize" else []
    common = [command, "--model", checkpoint_folder, "--data", phantoms, *more]
    done = call(*common, "--output", run)
    assert done.exit_code == 2
    assert "already holds a checkpoint of another model, which would be replaced" in done.output
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_only_a_temperature_is_no_other_model(
    dtype: type, checkpoint_folder: Path, tmp_path: Path
) -> None:
    """Runs that train the head alone share their features with each other, too."""
    config, tensors = load_checkpoint(checkpoint_folder)
    tensors = {n: t.astype(dtype) if t.dtype == np.float32 else t for n, t in tensors.items()}
    own = tmp_path / "own"
    save_checkpoint(own, config, tensors)
    for temperature in (1.3, 19.0):
        made, folded = tmp_path / f"at {temperature}", fold_temperature(tensors, temperature)
        save_checkpoint(made, replace(config, provenance={"temperature": temperature}), folded)
        check_new_checkpoint(made, own)
        check_new_checkpoint(own, made)
        check_new_checkpoint(made, tmp_path / "at 1.3")
    for name in ("classifier.weight", "classifier.bias", "features.norm5.weight"):
        other = tmp_path / name
        save_checkpoint(other, config, {**tensors, name: tensors[name][::-1] + dtype(0.01)})
        with pytest.raises(click.UsageError, match="already holds a checkpoint of another model"):
            check_new_checkpoint(other, own)
    save_checkpoint(tmp_path / "turned", replace(config, classes=config.classes[::-1]), tensors)
    with pytest.raises(click.UsageError, match="already holds a checkpoint of another model"):
        check_new_checkpoint(tmp_path / "turned", own)
    (tmp_path / "turned" / "model.safetensors").write_bytes(b"half")  # as when a process dies
    with pytest.raises(click.UsageError, match="already holds a damaged checkpoint, or a config"):
        check_new_checkpoint(tmp_path / "turned", own)
    with pytest.raises(CheckpointError, match=r"turned.model\.safetensors is not the file"):
        check_new_checkpoint(own, tmp_path / "turned")


def test_one_report_of_an_evaluation_does_not_replace_another(
    run: Path, phantoms: Path, tmp_path: Path
) -> None:
    common = ["evaluate", "--model", run, "--data", phantoms]
    page = tmp_path / "page"
    same = tmp_path / "page" / ".." / "report"
    for output, markdown in (
        (tmp_path / "report", same),
        (page / "evaluation.json", page / "evaluation.json"),
        (page / "other.json", page / "audit.json"),
    ):
        done = call(*common, "--output", output, "--markdown", markdown, "--report", page)
        assert done.exit_code == 2
        assert "is the place of another report, of this command or on its page." in " ".join(
            done.output.split()
        )

    first = page / "evaluation.json"
    assert call(*common, "--split", "val", "--output", first, "--report", page).exit_code == 0
    before = first.read_bytes()
    rule = ["--target-sensitivity", "0.9", "--choose-on", first]
    for option, path in (("--report", page), ("--output", first)):
        done = call(*common, "--split", "test", *rule, option, path)
        assert done.exit_code == 2
        assert "would replace" in done.output
        assert first.read_bytes() == before


def test_evaluate_decides_at_every_rule_and_says_what_they_were_chosen_on(
    run: Path, phantoms: Path, tmp_path: Path
) -> None:
    validation, output = tmp_path / "val.json", tmp_path / "report.json"
    arguments = ["evaluate", "--model", run, "--data", phantoms]
    assert call(*arguments, "--split", "val", "--output", validation).exit_code == 0
    rules = ["--threshold", "0.4", "--target-sensitivity", "0.9", "--target-specificity", "0.8"]
    done = call(*arguments, "--split", "test", *rules, "--output", output)
    assert done.exit_code == 0, done.output
    points = EvaluationReport.load(output).operating_points
    assert [p.chosen_on for p in points] == ["given", "the same images", "the same images"]
    assert done.output.count("expect worse on others") == 2
    elsewhere = [*rules, "--choose-on", validation, "--versus", "normal"]
    done = call(*arguments, "--split", "test", *elsewhere, "--output", output)
    assert done.exit_code == 0, done.output
    report, chosen_on = EvaluationReport.load(output), EvaluationReport.load(validation)
    assert [p.chosen_on for p in report.operating_points] == ["given", *["other images"] * 2]
    assert "expect worse" not in done.output
    expected = report.operating_point(sensitivity=0.9, chosen_on=chosen_on, versus="normal")
    assert report.operating_points[1].to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-sensitivity", "90"), "is not in the range"),
        (("--prevalence", "1"), "is not in the range"),
        (("--versus", "normal"), "need --threshold, --target-sensitivity or"),
        (("--choose-on", __file__), "--choose-on is for --target-sensitivity or"),
        (("--threshold", "0.5", "--choose-on", __file__), "--choose-on is for --target-"),
        (("--threshold", "0.5", "--versus", "flu"), "--versus must be one of normal, covid19"),
        (("--threshold", "0.5", "--versus", "covid19"), "must be another class than covid19"),
    ],
)
def test_evaluate_refuses_impossible_rules_before_the_slow_part(
    run: Path, phantoms: Path, options: tuple[str, ...], message: str
) -> None:
    done = call("evaluate", "--model", run, "--data", phantoms, *options)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert "predict" not in done.output


def test_evaluate_refuses_rules_that_cannot_hold_before_the_slow_part(
    run: Path, phantoms: Path, tmp_path: Path
) -> None:
    arguments = ["evaluate", "--model", run, "--data", phantoms]
    for threshold in ("nan", "1.5"):
        done = call(*arguments, "--threshold", threshold)
        assert done.exit_code == 1
        assert f"threshold must be in [0, 1], as scores are, got {threshold}" in done.output
        assert "predict" not in done.output
    data = json.loads((run / "evaluation.json").read_text())
    data["model"]["weights_sha256"] = "0" * 64
    other = tmp_path / "other.json"
    other.write_text(json.dumps(data))
    done = call(*arguments, "--target-sensitivity", "0.9", "--choose-on", other)
    assert done.exit_code == 2
    assert "--choose-on is the report of another model" in " ".join(done.output.split())


def test_evaluate_finds_out_before_the_slow_part_that_the_data_give_no_threshold(
    run: Path, phantoms: Path, tmp_path: Path
) -> None:
    arguments = ["evaluate", "--model", run, "--data", tmp_path / "positive"]
    shutil.copytree(phantoms / "covid19", tmp_path / "positive" / "covid19")
    done = call(*arguments, "--target-specificity", "0.9")
    assert done.exit_code == 1
    assert "specificity needs a case with label 0" in done.output
    assert "predict" not in done.output
    report, output = EvaluationReport.load(run / "evaluation.json"), tmp_path / "report.json"
    replace(report, predictions=None).save(output)
    done = call(*arguments, "--target-specificity", "0.9", "--choose-on", output)
    assert done.exit_code == 1
    assert "predictions" in done.output
    assert "predict\n" not in done.output


@pytest.mark.parametrize(
    ("side", "reason"), [("train", "was trained on these"), ("val", "was chosen on these")]
)
def test_evaluate_warns_of_a_side_that_flatters(
    run: Path, phantoms: Path, side: str, reason: str
) -> None:
    done = call("evaluate", "--model", run, "--data", phantoms, "--split", side)
    assert done.exit_code == 0, done.output
    assert f"{reason} images; use --split test" in done.output


def test_info_describes_versions_and_a_checkpoint(checkpoint_folder: Path) -> None:
    shown = call("info", "--model", checkpoint_folder).output
    assert f"chestxray-covid {__version__}" in shown
    assert "torch 2." in shown
    assert "trains in bfloat16" in shown or "trains in float32" in shown
    assert '"architecture": "densenet121"' in shown


def test_info_names_the_gpu_of_a_mac_on_which_training_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mac = torch.device("mps")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: mac)
    assert "device mps, trains in float32," in call("info").output


def test_models_lists_what_is_bundled_and_predict_takes_the_default(
    checkpoint_folder: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "BUNDLED", tmp_path / "weights")
    assert "has no bundled model" in call("models").output
    refused = call("predict", mixed / "a,1.png")
    assert refused.exit_code == 1
    assert "no bundled model 'densenet121-v1'" in refused.output
    config, tensors = load_checkpoint(checkpoint_folder)
    about = {"license": "cc-by-nc-sa-4.0", "headline": {"AUROC elsewhere": "0.50 (0.40 to 0.60)"}}
    save_checkpoint(
        tmp_path / "weights" / hub.DEFAULT_MODEL, replace(config, provenance=about), tensors
    )
    shown = call("models").output
    assert "densenet121-v1 (default)" in shown
    size = (checkpoint_folder / "model.safetensors").stat().st_size
    assert f"normal, pneumonia, covid19; 64 px; {size / 1e6:.1f} MB" in shown
    assert "licence: cc-by-nc-sa-4.0" in shown
    assert "AUROC elsewhere: 0.50 (0.40 to 0.60)" in shown
    done = call("predict", mixed / "a,1.png")
    assert done.exit_code == 0, done.output
    expected = call("predict", mixed / "a,1.png", "--model", checkpoint_folder)
    assert done.output == expected.output


def test_a_bundled_model_has_no_sides_to_judge(
    phantoms: Path, checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoint_folder, tmp_path / hub.DEFAULT_MODEL)
    monkeypatch.setattr(hub, "BUNDLED", tmp_path)
    done = call("evaluate", "--data", phantoms, "--split", "test")
    assert done.exit_code == 2
    assert "--split needs --model to be the folder of a training run" in done.output


def test_push_refuses_a_run_that_was_not_judged(checkpoint_folder: Path) -> None:
    done = call("push", checkpoint_folder, "user/model")
    assert done.exit_code == 1
    assert "evaluation.json is missing" in done.output
    assert "--allow-unjudged" in done.output


def test_download_draws_phantoms_and_unpacks_an_archive(tmp_path: Path) -> None:
    done = call("download", "phantoms", tmp_path / "p", "--count", 6)
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "p").rglob("*.png"))) == 6
    import zipfile

    archive = tmp_path / "kermany.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for split in ("train", "test"):
            for name in ("NORMAL/IM-0001-0001.jpeg", "PNEUMONIA/person1_virus_1.jpeg"):
                file.write(next((tmp_path / "p").rglob("*.png")), f"chest_xray/{split}/{name}")
    done = call("download", "kermany", tmp_path / "k", "--archive", archive)
    assert done.exit_code == 0, done.output
    assert load_image(next((tmp_path / "k").rglob("*.jpeg"))).mode == "L"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["train", "--data", "nowhere", "--output", "o"], "does not exist"),
        (["predict"], "Missing argument"),
        (["frobnicate"], "No such command"),
        (["download", "phantoms", "p", "--count", "1"], "'--count': 1 is not in the range x>=3"),
        (["download", "phantoms", "p", "--ref=x", "--all-views"], "--ref and --all-views are for"),
        (["download", "cohen", "c", "--seed", "0"], "--seed is for phantoms alone, not cohen"),
        (["download", "kermany", "k", "--count", "9"], "--count is for phantoms"),
        (["predict", "a.png", "--ray"], "--ray needs --output"),
        (["predict", "a.png", "--num-gpus", "1"], "--num-cpus and --num-gpus are for --ray"),
        (["predict", "a", "--ray", "--output=o.parquet", "--workers=2"], "--workers is not for"),
    ],
)
def test_a_wrong_call_is_explained(arguments: list[str], match: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 2
    assert match in done.output


def test_training_needs_an_image_of_every_class(phantoms: Path, tmp_path: Path) -> None:
    arguments = ("--data", phantoms, "--output", tmp_path / "run", "--classes", "covid19,covid")
    done = call("train", *arguments)
    assert done.exit_code == 2
    assert "--data holds no image of covid, which --classes names" in done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.name != "posix", reason="pipes break like this on POSIX")
def test_a_reader_that_has_enough_ends_a_command_without_a_word() -> None:
    readable, writable = os.pipe()
    os.close(readable)  # as of "| head", when it is done
    command = [sys.executable, "-m", "chestxray_covid", "models"]
    done = subprocess.run(command, stdout=writable, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writable)
    assert (done.returncode, done.stderr) == (1, "")


def test_errors_of_the_library_become_messages(
    tmp_path: Path, phantoms: Path, checkpoint_folder: Path
) -> None:
    (tmp_path / "empty").mkdir()
    no_layout = call("train", "--data", tmp_path / "empty", "--output", tmp_path / "o", *TRAIN)
    assert no_layout.exit_code == 1
    assert "no data set of a known layout" in no_layout.output
    both = [*TRAIN, "--pretrained", checkpoint_folder]
    excluded = call("train", "--data", phantoms, "--output", tmp_path / "o", *both)
    assert "exclude each other" in excluded.output
    one = call(
        "train", "--data", phantoms, "--output", tmp_path / "o", *TRAIN, "--classes", "normal"
    )
    assert "at least two labels" in one.output
    typo = [*TRAIN, "--trainable", "tail"]
    wrong = call("train", "--data", phantoms, "--output", tmp_path / "o", *typo)
    assert "trainable must be one of" in wrong.output
    assert not (tmp_path / "o").exists()
    nowhere = call("predict", phantoms, "--model", "nowhere")
    assert nowhere.exit_code == 1
    assert "nowhere is no checkpoint folder, no bundled model" in nowhere.output
    no_model = call("predict", phantoms, "--model", tmp_path / "empty")
    assert no_model.exit_code == 1
    assert "config.json is missing" in no_model.output


def test_no_name_in_an_error_steers_the_terminal(tmp_path: Path) -> None:
    hostile = "\x1b]0;title\x07\x1b[2J"
    rows = [f"{hostile}.png,{label},7" for label in ("covid", "normal")]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["path,label,patient_id", *rows]))
    (tmp_path / f"{hostile}.png").write_bytes(b"")
    (tmp_path / f"{hostile}.csv").write_text("path,label,patient_id\n")
    for place, reason in (
        (table, "lists .* twice"),
        (tmp_path / f"{hostile}.csv", "has a header and no rows"),
    ):
        done = call("train", "--data", place, "--output", tmp_path / "o", *TRAIN)
        assert done.exit_code == 1
        assert re.search(reason, done.output)
        assert r"\x1b]0;title\x07\x1b[2J" in done.output
        assert all(c.isprintable() or c == "\n" for c in done.output)


def test_no_name_in_an_error_of_usage_steers_the_terminal(run: Path, tmp_path: Path) -> None:
    hostile = "\x1b]0;title\x07\x1b[2J"
    for label in ("covid", "normal"):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / f"{hostile}{label}.png").write_bytes(b"")
    (tmp_path / "masks").mkdir()
    (tmp_path / f"{hostile}.csv").write_bytes(b"")
    audit = ("audit", "--model", run, "--data", tmp_path / "data")
    for option, value, reason in (
        ("--masks", tmp_path / "masks", "holds no mask of these 2 images"),
        ("--output", tmp_path / f"{hostile}.csv", "is named like a table"),
        ("--output", tmp_path / f"{hostile}.csv" / "x", "is no folder"),
    ):
        done = call(*audit, option, value)
        assert done.exit_code == 2
        assert reason in done.output
        assert r"\x1b]0;title\x07\x1b[2J" in done.output
        assert all(c.isprintable() or c == "\n" for c in done.output)


@pytest.mark.real_data
def test_every_real_file_of_cohen_gets_a_row(
    real_data: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "predictions.csv"
    images = real_data / "covid-chestxray-dataset" / "images"
    done = call("predict", images, "--model", checkpoint_folder, "--output", output)
    assert done.exit_code == 0, done.output
    with output.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 646
    assert all(0 <= float(row["p_covid19"]) <= 1 and not row["error"] for row in rows)


def test_a_blank_and_a_tiny_image_still_get_probabilities(
    checkpoint_folder: Path, tmp_path: Path
) -> None:
    Image.fromarray(np.zeros((300, 200), np.uint8)).save(tmp_path / "blank.png")
    Image.fromarray(np.full((1, 1), 9, np.uint8)).save(tmp_path / "dot.png")
    done = call("predict", tmp_path, "--model", checkpoint_folder)
    assert done.exit_code == 0
    assert len(done.output.splitlines()) == 4  # header, two rows, what this is not


@pytest.mark.parametrize("command", [["evaluate"], ["audit", "--limit", "8"]])
def test_a_page_with_figures_is_written_beside_the_numbers(
    command: list[str], checkpoint_folder: Path, phantoms: Path, tmp_path: Path
) -> None:
    done = call(
        *(*command, "--model", checkpoint_folder, "--data", phantoms, "--report", tmp_path / "page")
    )
    assert done.exit_code == 0, done.output
    page = tmp_path / "page" / "index.html"
    assert f"The page is {page}" in done.output
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    name = {"evaluate": "evaluation.json", "audit": "audit.json"}[command[0]]
    assert sorted(p.name for p in page.parent.iterdir()) == sorted([name, "index.html"])
