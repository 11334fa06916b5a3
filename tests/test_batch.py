"""Tables of predictions: what is in them, and that a call goes on where another was ended."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow.fs
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from PIL import Image

from chestxray_covid import (
    Classifier,
    Sample,
    SyntheticChestXray,
    batch,
    open_dataset,
    predict_files,
    ray_predict,
    resolve,
    shards,
)
from chestxray_covid.batch import judge_files
from chestxray_covid.checkpoint import load_checkpoint
from chestxray_covid.cli import main
from chestxray_covid.errors import DatasetError, DatasetNotFoundError, ResourceError
from chestxray_covid.files import write_files
from chestxray_covid.graph import fold
from chestxray_covid.int8 import Int8, rounded_results
from chestxray_covid.places import Places
from chestxray_covid.prediction import FailedPrediction, Prediction
from chestxray_covid.prediction_table import heading, line
from chestxray_covid.shards import Shard, ShardedTable
from conftest import Elsewhere, no_more_files, random_checkpoint
from shallow import CODE, shallow_networks

FILES = 12


@pytest.fixture(scope="module")
def clf(checkpoint_folder: Path) -> Classifier:
    return Classifier.from_pretrained(checkpoint_folder, device="cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with twelve radiographs, one of them broken; do not change it."""
    folder = tmp_path_factory.mktemp("images")
    phantoms = SyntheticChestXray(FILES, image_size_px=64)
    for number in range(FILES):
        phantoms.image(number).save(folder / f"{number:02d}.png")
    (folder / "05.png").write_bytes(b"no image")
    return folder


def rows_of(output: Path) -> list[dict[str, object]]:
    """Return the rows of a table, read with other software than wrote it."""
    if output.suffix == ".parquet":
        return list(pyarrow.parquet.read_table(output).to_pylist())
    with output.open(encoding="utf-8", newline="") as file:
        if output.suffix == ".csv":
            return list(csv.DictReader(file))
        rows = [json.loads(line) for line in file]
    flat = [{f"p_{name}": p for name, p in r.get("probabilities", {}).items()} for r in rows]
    return [{**r, **p, "path": r["source"]} for r, p in zip(rows, flat, strict=True)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_holds_what_the_classifier_says_of_every_file(
    clf: Classifier, images: Path, tmp_path: Path, suffix: str
) -> None:
    output = tmp_path / f"out{suffix}"
    done = predict_files(images, output, classifier=clf, shard_size=5)
    assert (done.output, done.count) == (str(output), FILES)
    assert [*done.failed] == [str(images / "05.png")]
    rows = rows_of(output)
    assert [row["path"] for row in rows] == sorted(map(str, images.iterdir()))
    for row in rows:
        if row["path"] in done.failed:
            assert row["error"] == done.failed[str(row["path"])]
            assert not row.get("label")
            continue
        expected = clf.predict(str(row["path"]))
        assert row["label"] == expected.label
        assert str(row["is_positive"]) == str(expected.is_positive)
        assert not row.get("error")
        for name, share in expected.probabilities.items():
            assert float(str(row[f"p_{name}"])) == pytest.approx(share, abs=2e-6)
    whole = {"out.parquet"} if suffix == ".parquet" else {output.name}
    assert {p.name for p in tmp_path.iterdir()} == whole


def test_a_column_of_pyarrow_is_a_list_of_paths(
    clf: Classifier, images: Path, tmp_path: Path
) -> None:
    paths = sorted(map(str, images.iterdir()))[:3]
    for name, given in (("one.csv", paths), ("two.csv", pyarrow.array(paths))):
        predict_files(given, tmp_path / name, classifier=clf)
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    with pytest.raises(TypeError, match="got Table"):
        predict_files(pyarrow.table({"path": paths}), tmp_path / "three.csv", classifier=clf)


def test_a_csv_of_paths_and_addresses_are_read_too(
    clf: Classifier, images: Path, tmp_path: Path
) -> None:
    names = ["00.png", str(images / "03.png"), (images / "01.png").as_uri(), "", "gone.png"]
    manifest = images.parent / "list.csv"
    manifest.write_text("label,path\n" + "".join(f"x,{images.name}/{n}\n" for n in names[:1]))
    with manifest.open("a") as file:
        file.writelines(f"x,{name}\n" for name in names[1:])
    output = tmp_path / "out"
    done = predict_files(manifest, f"{output.as_uri()}/p.parquet", classifier=clf, shard_size=3)
    rows = rows_of(output / "p.parquet")
    expected = [*(str(images / n) for n in names[:2]), names[2], str(images.parent / "gone.png")]
    assert [row["path"] for row in rows] == expected
    assert [*done.failed] == [expected[3]]
    local = clf.predict(images / "01.png").probabilities
    assert {name: rows[2][f"p_{name}"] for name in clf.classes} == pytest.approx(local)
    copied = predict_files(manifest.as_uri(), tmp_path / "again.csv", classifier=clf)
    assert copied.count == 4
    missing = [(images / "99.png").as_uri(), (images / "02.png").as_uri()]
    done = predict_files(missing, tmp_path / "missing.csv", classifier=clf)
    assert "99.png cannot be fetched" in done.failed[missing[0]]
    shown = rows_of(tmp_path / "missing.csv")
    assert shown[1]["label"] == clf.predict(images / "02.png").label


def test_a_folder_by_its_address_stands_for_its_images(
    clf: Classifier, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "a" / "b c").mkdir(parents=True)
    for place in ("a/b c/x%20.png", "a/y.PNG", "a/notes.txt"):
        (tmp_path / place).write_bytes((images / "00.png").read_bytes())
    address = (tmp_path / "a").as_uri()
    done = predict_files(address + "/", tmp_path / "out.csv", classifier=clf)
    assert not done.failed
    names = [row["path"] for row in rows_of(tmp_path / "out.csv")]
    assert names == [f"{address}/b c/x%20.png", f"{address}/y.PNG"]


def test_hidden_files_are_no_images_by_path_or_by_address(tmp_path: Path) -> None:
    (tmp_path / ".trash" / "b").mkdir(parents=True)
    (tmp_path / "b.c").mkdir()
    for name in ("a.png", "._a.png", "b.c/d.png", "b.c/.d.png", ".trash/b/e.png", ".trash/f.png"):
        (tmp_path / name).touch()
    for folder in (str(tmp_path), tmp_path.as_uri()):
        assert [*Places().images(folder)] == [f"{folder}/a.png", f"{folder}/b.c/d.png"]


def test_a_folder_among_the_files_is_a_row_and_moves_no_other(
    images: Path, tmp_path: Path, clf: Classifier
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("01.png", "02.png"):
        (tmp_path / "full" / name).write_bytes((images / name).read_bytes())
    files = [str(tmp_path / "full"), str(images / "00.png"), str(tmp_path / "empty")]
    files += [str(images / "03.png"), str(images / "04.png")]
    rows = list(judge_files(clf, files, batch_size=2))
    assert [row.source for row in rows] == files
    folders = [row for row in rows if isinstance(row, FailedPrediction)]
    assert [row.source for row in folders] == [files[0], files[2]]
    assert all("is a folder, expected a regular file" in str(row) for row in folders)
    good = [row for row in rows if isinstance(row, Prediction)]
    assert good == clf.predict([files[1], files[3], files[4]])


@pytest.mark.parametrize("becomes", [("01.png", "02.png"), ()])
def test_a_file_that_becomes_a_folder_is_an_error_not_another_files_row(
    images: Path, tmp_path: Path, clf: Classifier, monkeypatch: pytest.MonkeyPatch, becomes: tuple
) -> None:
    (tmp_path / "f.png").mkdir()
    for name in becomes:
        (tmp_path / "f.png" / name).write_bytes((images / name).read_bytes())
    monkeypatch.setattr("chestxray_covid.batch.is_folder", lambda path: False)
    for files in ([tmp_path / "f.png", images / "00.png"], [images / "00.png", tmp_path / "f.png"]):
        with pytest.raises(DatasetError, match=r"did not give one row: .* Run it again"):
            list(judge_files(clf, map(str, files), batch_size=4))


def test_a_slash_behind_a_folder_of_parquet_means_that_folder(
    clf: Classifier, images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.parquet"
    for place in (f"{output}/", f"{output.as_uri()}//", output):
        done = predict_files(images / "00.png", place, classifier=clf)
        assert done.count == 1
        assert {p.suffix for p in output.iterdir()} == {".parquet", ""}
    assert len(rows_of(output)) == 1
    predict_files(images / "00.png", f"{tmp_path}/out.csv/", classifier=clf)
    assert len(rows_of(tmp_path / "out.csv")) == 1


def test_columns_on_a_screen_stay_apart_whatever_the_classes_are_called() -> None:
    for classes in (("normal", "covid19"), ("normal", "lung_opacity", "viral_pneumonia")):
        shares = dict.fromkeys(classes, 1 / len(classes))
        row = Prediction(label=classes[-1], probabilities=shares, threshold=0.5, source="a.png")
        head, shown = heading(classes), line(row)
        assert head.split() == ["label", *classes, "path"]
        assert shown.split() == [classes[-1], *[f"{p:.4f}" for p in shares.values()], "a.png"]
        assert head.index("path") == shown.index("a.png")


def test_another_precision_is_computed_again(
    images: Path, tmp_path: Path, checkpoint_folder: Path
) -> None:
    """A finished table stays what it is, whatever computes the next."""
    output = tmp_path / "out.parquet"
    made = []
    for precision in ("float32", "bfloat16", "float32"):
        clf = Classifier.from_pretrained(checkpoint_folder, engine="torch", precision=precision)
        predict_files([images / "00.png", images / "01.png"], output, classifier=clf)
        (name,) = (path.name for path in output.glob("part-*"))
        made.append(name)
        expected = [p.probabilities["covid19"] for p in clf.predict([images / "00.png"])]
        assert rows_of(output)[0]["p_covid19"] == pytest.approx(expected[0], abs=1e-6)
    assert made[0] == made[2] != made[1]


def test_other_statistics_of_eight_bits_are_computed_again(
    images: Path, tmp_path: Path, checkpoint_folder: Path
) -> None:
    output = tmp_path / "out.parquet"
    config, tensors = load_checkpoint(checkpoint_folder)
    channels = rounded_results(fold(tensors, config.preprocess))
    made = []
    for largest in (1, 2, 1):
        values = {name: np.full(count, largest, np.float32) for name, count in channels.items()}
        clf = Classifier(config, tensors, int8=Int8(largest=values), precision="int8")
        predict_files([images / "00.png"], output, classifier=clf)
        (name,) = (path.name for path in output.glob("part-*"))
        made.append(name)
    assert made[0] == made[2] != made[1]


def test_a_table_that_is_being_changed_does_not_say_that_it_is_whole(
    images: Path, tmp_path: Path, clf: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.parquet"
    files = sorted(images.glob("*.png"))
    predict_files(files[:4], output, classifier=clf, shard_size=2)
    written = ShardedTable.write

    def write(self: ShardedTable, shard: Shard, rows: list) -> None:
        assert not (output / "_SUCCESS").exists()
        if (output / shard.name).name.startswith("part-000001"):
            raise OSError("the disk is full")
        written(self, shard, rows)

    with monkeypatch.context() as patch:
        patch.setattr(ShardedTable, "write", write)
        with pytest.raises(OSError, match="the disk is full"):
            predict_files(files[::-1], output, classifier=clf, shard_size=2)
    assert not (output / "_SUCCESS").exists()
    predict_files(files[:4], output, classifier=clf, shard_size=2)
    assert (output / "_SUCCESS").exists()
    assert len(rows_of(output)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("saved", [True, False])
def test_other_weights_with_the_same_config_are_computed_again(
    checkpoint_folder: Path, images: Path, tmp_path: Path, saved: bool
) -> None:
    config, tensors = load_checkpoint(checkpoint_folder)
    if not saved:
        config = replace(config, weights_sha256="")
    other = {**tensors, "classifier.bias": np.array([5, 0, 0], np.float32)}
    for weights in (tensors, other):
        own = Classifier(config, weights)
        predict_files(images, tmp_path / "o.parquet", classifier=own, shard_size=5)
        found = rows_of(tmp_path / "o.parquet")[0]["p_normal"]
        assert found == pytest.approx(own.predict_proba(images / "00.png")[0, 0], abs=1e-5)


def test_a_row_of_an_address_that_nobody_knows_is_a_row_with_the_reason(
    clf: Classifier, images: Path, tmp_path: Path
) -> None:
    place = tmp_path / "list.csv"
    place.write_text(f"path\n{images}/00.png\nhttps://example.org/a.png\n{images}/01.png\n")
    done = predict_files(place, tmp_path / "o.csv", classifier=clf, shard_size=2)
    assert done.count == 3
    assert [*done.failed] == ["https://example.org/a.png"]
    assert "cannot be fetched: Unrecognized" in done.failed["https://example.org/a.png"]


@pytest.mark.parametrize(
    ("name", "is_address"), [("o.csv", False), ("o.parquet", False), ("o.parquet", True)]
)
def test_a_run_whose_parts_another_has_taken_says_so(
    clf: Classifier,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    is_address: bool,
) -> None:
    complete, output = ShardedTable.complete, tmp_path / name
    place = output.as_uri() if is_address else output

    def overtaken(self: ShardedTable, sizes: dict[str, int]) -> Any:
        monkeypatch.undo()
        predict_files(images, place, classifier=clf, shard_size=4)  # the other run
        return complete(self, sizes)

    monkeypatch.setattr(ShardedTable, "complete", overtaken)
    with pytest.raises(DatasetError, match=rf"{name} is being written by another run"):
        predict_files(images, place, classifier=clf, shard_size=5)
    assert len(rows_of(output)) == FILES
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("kept", [0, 50, -1, "half the rows"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_shard_that_is_damaged_is_named_and_computed_again_when_it_is_deleted(
    clf: Classifier, images: Path, tmp_path: Path, suffix: str, kept: int | str
) -> None:
    output = tmp_path / f"o{suffix}"
    files, table = [*map(str, sorted(images.iterdir()))], batch._table(clf, output, 4)
    _, own, _ = table.shards(files)
    table.write(own, [*judge_files(clf, own.files, batch_size=4)])
    folder = output if suffix == ".parquet" else tmp_path / f".o{suffix}.parts"
    (part,) = folder.iterdir()
    if isinstance(kept, int):
        part.write_bytes(part.read_bytes()[:kept])
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(part).slice(0, 2), part)
    else:
        part.write_bytes(b"".join(part.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(DatasetError, match=rf"{part.name} is damaged: .*Delete it, and run"):
        predict_files(files, output, classifier=clf, shard_size=4)
    assert suffix == ".parquet" or not output.exists()
    assert not (folder / "_SUCCESS").exists()
    part.unlink()
    done = predict_files(files, output, classifier=clf, shard_size=4)
    assert (done.count, [*done.failed]) == (FILES, [files[5]])
    assert [row["path"] for row in rows_of(output)] == files


@pytest.mark.parametrize("is_address", [False, True])
def test_shards_of_two_runs_in_one_folder_do_not_say_that_they_are_one_table(
    clf: Classifier, images: Path, tmp_path: Path, is_address: bool
) -> None:
    output, files = tmp_path / "o.parquet", [*map(str, sorted(images.iterdir()))]
    place = output.as_uri() if is_address else output
    options: dict[str, Any] = {"classes": clf.classes, "model": "", "shard_size": 2}
    slow = ShardedTable(place, **options)
    first, second = slow.shards(files[:4])
    rows = [*judge_files(clf, files[:4], batch_size=2)]
    slow.write(first, rows[:2])
    predict_files(files[4:], place, classifier=clf, shard_size=4)  # the other run
    assert (output / "_SUCCESS").exists()
    slow.write(second, rows[2:])
    assert not (output / "_SUCCESS").exists()
    with pytest.raises(DatasetError, match=r"o\.parquet is being written by another run"):
        slow.complete({first.name: 2, second.name: 2})
    assert not (output / "_SUCCESS").exists()
    predict_files(files[4:], place, classifier=clf, shard_size=4)
    assert [row["path"] for row in rows_of(output)] == files[4:]
    ShardedTable(place, **options).places.remove(str(place), "not there")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_runs_of_one_process_number_do_not_write_into_each_others_table(tmp_path: Path) -> None:
    """As two containers that share a folder have it: in each the run is process 1."""
    folder, output = tmp_path / ".o.csv.parts", tmp_path / "o.csv"
    folder.mkdir()
    options: dict[str, Any] = {"classes": ("a", "b"), "shard_size": 1}
    one, other = (ShardedTable(output, model=model, **options) for model in ("one", "other"))
    (folder / "head").write_bytes(b"of one\r\n")
    os.mkfifo(folder / "slow")  # a part that its storage is slow to give
    (folder / "whole").write_bytes(b"of the other\r\n")
    with ThreadPoolExecutor() as pool:
        found = pool.submit(one.complete, {"head": 1, "slow": 100})
        with (folder / "slow").open("wb") as slow:  # waits until it is read
            other.complete({"whole": 1})
            slow.write(b"of one, late\r\n" * 100)
        with pytest.raises(DatasetError, match=r"o\.csv is being written by another run"):
            found.result(timeout=60)
    assert output.read_text().splitlines()[1:] == ["of the other"]
    assert [*tmp_path.iterdir()] == [output]


@pytest.mark.parametrize("is_full", [False, True])
def test_two_writers_of_one_shard_by_its_address_do_not_meet(tmp_path: Path, is_full: bool) -> None:
    address = tmp_path.as_uri()

    class Overtaken(pyarrow.fs.LocalFileSystem):
        def move(self, old: str, new: str) -> None:
            Places().write(address, "part", b"of the other writer")
            if is_full:
                raise OSError("the disk is full")
            super().move(old, new)

    places = Places()
    places._systems["file:///"] = (Overtaken(), "/")
    with pytest.raises(OSError, match="the disk is full") if is_full else nullcontext():
        places.write(address, "part", b"whole")
    kept = b"of the other writer" if is_full else b"whole"
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("part", kept)]


@pytest.mark.slow
def test_a_kill_while_the_table_is_put_together_leaves_nothing_for_ever(
    checkpoint_folder: Path, images: Path, tmp_path: Path
) -> None:
    code = """
import os, sys
from pathlib import Path
from chestxray_covid import Classifier, predict_files
Path.replace = lambda self, target: os._exit(9) if self.name.startswith(".o.csv") else (
    os.replace(self, target))
clf = Classifier.from_pretrained(sys.argv[1], device="cpu")
predict_files(sys.argv[2], sys.argv[3], classifier=clf)
"""
    command = [sys.executable, "-c", code, checkpoint_folder, images, tmp_path / "o.csv"]
    assert subprocess.run([*map(str, command)], check=False).returncode == 9
    clf = Classifier.from_pretrained(checkpoint_folder, device="cpu")
    predict_files(images, tmp_path / "o.csv", classifier=clf)
    assert [p.name for p in tmp_path.iterdir()] == ["o.csv"]


def test_a_name_that_the_terminal_cannot_show_stops_nothing(
    checkpoint_folder: Path, images: Path, tmp_path: Path
) -> None:
    for number, name in enumerate(["a.png", "Łódź_снимок.png", "z.png"]):
        shutil.copy(images / f"{number:02d}.png", tmp_path / name)
    command = [sys.executable, "-m", "chestxray_covid", "predict", tmp_path]
    command += ["--model", checkpoint_folder, "--engine", "openvino"]
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert rb"\u0141\xf3d\u017a_" in done.stdout.replace("ó".encode("cp1252"), rb"\xf3")
    assert b"z.png" in done.stdout


def test_an_error_late_in_the_list_keeps_what_was_judged_and_is_raised(
    images: Path, tmp_path: Path, clf: Classifier
) -> None:
    listed = [f"{images}/{number:02d}.png" for number in range(4)]
    (tmp_path / "list.csv").write_text("\n".join(["path", *listed, '"' + "x" * 200_000 + '"']))
    for shard_size in (2, 3, 100):
        output = tmp_path / f"out{shard_size}.csv"
        with pytest.raises(DatasetError, match="cannot be read as a CSV of paths"):
            predict_files(tmp_path / "list.csv", output, classifier=clf, shard_size=shard_size)
        parts = sorted((tmp_path / f".{output.name}.parts").iterdir())
        assert sum(len(part.read_text().splitlines()) for part in parts) == 4
        assert not output.exists()


def test_a_quote_that_nobody_closed_swallows_no_images(
    images: Path, tmp_path: Path, clf: Classifier
) -> None:
    place = tmp_path / "list.csv"
    listed = [f"{images}/{number:02d}.png" for number in range(3)]
    place.write_text(f'path,note\n{listed[0]},"two\nlines"\n{listed[1]},5" tube\n')
    assert predict_files(place, tmp_path / "o.csv", classifier=clf).count == 2
    place.write_text(f'path,note\n{listed[0]},"open\n{listed[1]},x\n{listed[2]},x\n')
    with pytest.raises(DatasetError, match=r"CSV of paths.* begins in line 2"):
        predict_files(place, tmp_path / "p.csv", classifier=clf)


def test_a_folder_that_cannot_be_written_is_named_with_the_reason(
    images: Path, tmp_path: Path, clf: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: .*\.o\.csv\.parts"):
        predict_files(images, tmp_path / "o.csv", classifier=clf)


@pytest.mark.parametrize("name", ["folder", "file.parquet"])
def test_an_output_of_the_wrong_kind_is_refused_first(
    images: Path, tmp_path: Path, clf: Classifier, name: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.parquet").write_text("mine")
    with pytest.raises(ValueError, match=r"output must be a folder .* Give another name"):
        predict_files(images, tmp_path / name, classifier=clf)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file.parquet"}


def test_an_output_that_is_an_input_is_refused_and_stays(
    images: Path, tmp_path: Path, clf: Classifier
) -> None:
    table = tmp_path / "list.csv"
    table.write_text(f"path\n{images}/00.png\n")
    (tmp_path / "link.csv").symlink_to(table)
    for given in (table, [images, str(table)], tmp_path / "link.csv"):
        with pytest.raises(ValueError, match=r"is one of the inputs\. Give it another name"):
            predict_files(given, table, classifier=clf)
    assert table.read_text() == f"path\n{images}/00.png\n"


def test_files_tables_and_folders_lie_in_the_home_folder(
    images: Path, tmp_path: Path, clf: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "two").mkdir()
    for number in range(2):
        shutil.copy(images / f"{number:02d}.png", tmp_path / "two")
    (tmp_path / "list.csv").write_text("path\ntwo/00.png\n")
    given = ["~/two", "~/two/01.png", "~/list.csv"]
    predict_files(given, "~/out.csv", classifier=clf)
    names = [row["path"] for row in rows_of(tmp_path / "out.csv")]
    assert names == [f"{tmp_path}/two/0{number}.png" for number in (0, 1, 1, 0)]
    with pytest.raises(ValueError, match="is one of the inputs"):
        predict_files(given, "~/list.csv", classifier=clf)


@pytest.mark.parametrize("given", [".", "list.csv"])
def test_a_listed_name_that_begins_with_a_tilde_is_not_of_the_home_folder(
    given: str, images: Path, tmp_path: Path, clf: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "~").mkdir(parents=True)
    shutil.copy(images / "00.png", tmp_path / "here" / "~" / "x.png")
    shutil.copy(images / "01.png", tmp_path / "x.png")
    (tmp_path / "here" / "list.csv").write_text("path\n~/x.png\n~/gone.png\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path / "here")
    done = predict_files(given, "out.csv", classifier=clf)
    row = rows_of(Path("out.csv"))[0]
    assert row["path"] == "~/x.png"
    expected = clf.predict(images / "00.png").score
    assert float(str(row["score"])) == pytest.approx(expected, abs=2e-6)
    if given == "list.csv":
        assert done.failed == {"~/gone.png": "~/gone.png does not exist. Check the path."}
    else:
        (found,) = clf.predict(given)
        assert found.score == expected
        assert clf.predict(found.source) == found


def test_an_address_that_pathlib_took_a_slash_of_becomes_no_folder_here(
    tmp_path: Path, clf: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (64, 64), 90).save("one.png")
    with pytest.raises(ValueError, match=r"one of its two slashes\. Pass it as text"):
        predict_files("one.png", Path("s3://bucket/out.csv"), classifier=clf)
    with pytest.raises(ValueError, match=r"one of its two slashes\. Pass it as text"):
        ray_predict("one.png", Path("s3://bucket/out.parquet"), classifier=clf)
    assert [p.name for p in Path().iterdir()] == ["one.png"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"workers": 0}, ValueError, "workers must be positive, got 0"),
        ({"workers": -3}, ValueError, "workers must be positive, got -3"),
        ({"batch_size": 2.5}, TypeError, r"batch_size must be a whole number, got 2\.5"),
        ({"shard_size": 1.5}, TypeError, r"shard_size must be a whole number, got 1\.5"),
        ({"batch_size": None}, TypeError, "batch_size must be a whole number, got None"),
        ({"shard_size": None}, TypeError, "shard_size must be a whole number, got None"),
        ({"shard_size": 0}, ValueError, "shard_size must be positive, got 0"),
    ],
)
def test_impossible_sizes_are_refused(
    images: Path, tmp_path: Path, clf: Classifier, options: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        predict_files(images, tmp_path / "out.csv", classifier=clf, **options)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "an empty list"), (iter(()), "what was given"), (["e"] * 5, "e, e, e and 2 more")],
)
def test_nothing_to_judge_is_said_in_words(
    tmp_path: Path, clf: Classifier, monkeypatch: pytest.MonkeyPatch, given: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e").mkdir()
    with pytest.raises(DatasetNotFoundError, match=f"No image file in {message}"):
        predict_files(given, tmp_path / "out.csv", classifier=clf)


@pytest.mark.parametrize("gap", [math.nan, None, b"00.png", np.zeros((4, 4))])
def test_what_is_no_path_is_refused_in_words(gap: Any, tmp_path: Path, clf: Classifier) -> None:
    with pytest.raises(TypeError, match=r"expected the path or address .* Leave out the gaps"):
        predict_files(["00.png", gap], tmp_path / "out.csv", classifier=clf)
    with pytest.raises(TypeError, match=r"expected the path or address"):
        predict_files(gap, tmp_path / "out.csv", classifier=clf)
    assert not [*tmp_path.iterdir()]


def test_a_table_in_place_of_its_column_is_refused_in_words(
    tmp_path: Path, clf: Classifier
) -> None:
    table = pd.DataFrame({"path": ["00.png"], "label": ["normal"]})
    with pytest.raises(TypeError, match=r"got a DataFrame\. Pass its column of paths"):
        predict_files(table, tmp_path / "out.csv", classifier=clf)
    assert not [*tmp_path.iterdir()]


def test_a_relative_name_of_another_current_folder_is_another_file(
    images: Path, tmp_path: Path, clf: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = []
    for day, number in (("monday", "00"), ("tuesday", "01")):
        (tmp_path / day).mkdir()
        shutil.copy(images / f"{number}.png", tmp_path / day / "one.png")
        monkeypatch.chdir(tmp_path / day)
        predict_files("one.png", tmp_path / "out.parquet", classifier=clf)
        scores += [row["score"] for row in rows_of(tmp_path / "out.parquet")]
    assert scores == [clf.predict(images / f"{number}.png").score for number in ("00", "01")]


def test_the_command_line_reads_addresses_and_shows_no_control_characters(
    images: Path, tmp_path: Path, checkpoint_folder: Path
) -> None:
    hostile = tmp_path / "a\x1b[31m.png"
    hostile.write_bytes(b"no image")
    address = f"file://{images}/00.png"
    command = ["predict", address, str(hostile), "--model", str(checkpoint_folder)]
    done = CliRunner().invoke(main, [*command, "--engine", "torch"])
    assert done.exit_code == 1
    assert "\x1b" not in done.output
    assert address in done.output
    assert done.output.count("failed") == 2  # in the table and below it
    assert r"a\x1b[31m.png" in done.output


def test_a_path_that_is_an_address_is_taken_for_that_not_for_its_local_copy(
    clf: Classifier, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (batch, shards):
        monkeypatch.setattr(module, "Places", partial(Buckets, tmp_path))
    shutil.copytree(images, tmp_path / "bucket" / "images")
    copies = tmp_path / "copies"
    copies.mkdir()
    shutil.copy(images / "00.png", copies)  # what happens to have been fetched
    place = Elsewhere("s3://bucket/images", copies)
    output = Elsewhere("s3://bucket/there.parquet", copies / "here.parquet")
    done = predict_files(place, output, classifier=clf)
    assert (done.count, done.output) == (FILES, str(output))
    assert [row["path"] for row in rows_of(tmp_path / "bucket" / "there.parquet")] == [
        f"s3://bucket/images/{number:02}.png" for number in range(FILES)
    ]
    assert [path.name for path in copies.iterdir()] == ["00.png"]
    with pytest.raises(ValueError, match=r"An address must end in \.parquet"):
        predict_files(place, Elsewhere("s3://bucket/a.csv", copies / "a.csv"), classifier=clf)


def test_a_path_of_another_library_that_is_on_this_machine_is_taken_for_that(
    clf: Classifier, tmp_path: Path
) -> None:
    folder = SyntheticChestXray(4, image_size_px=64).save(tmp_path / "phantoms")
    output = tmp_path / "out.csv"
    # As universal_pathlib has it.
    place, table = (Elsewhere(f"file://{path}", path) for path in (folder, output))
    assert predict_files(place, table, classifier=clf).output == str(output)
    assert len(rows_of(output)) == len(clf.predict(place)) == len(open_dataset(place)) == 4


def test_entries_of_a_folder_that_was_scanned_by_bytes_are_paths(
    clf: Classifier, checkpoint_folder: Path, tmp_path: Path
) -> None:
    phantoms = SyntheticChestXray(2, image_size_px=64)
    folder = phantoms.save(tmp_path / "phantoms")
    shutil.copytree(checkpoint_folder, tmp_path / "model")
    entries = {os.fsdecode(e.name): e for e in os.scandir(os.fsencode(tmp_path))}
    images, model = cast(Any, entries["phantoms"]), cast(Any, entries["model"])
    assert len(clf.predict(images)) == len(open_dataset(images)) == 2
    assert predict_files(images, tmp_path / "out.csv", classifier=clf).count == 2
    assert resolve(model) == tmp_path / "model"
    file = next(folder.rglob("*.png"))
    (one,) = (e for e in os.scandir(os.fsencode(file.parent)) if os.fsdecode(e.name) == file.name)
    about = {"label": "normal", "finding": "", "patient_id": "1", "source": "a"}
    assert Sample(path=cast(Any, one), **about).path == file


class Buckets(Places):
    """Has a folder of this machine as its object storage."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        local = pyarrow.fs.LocalFileSystem()
        bucket = pyarrow.fs.SubTreeFileSystem(str(root), local), "bucket"
        self._systems |= {"s3://bucket": bucket, "hdfs://host:1": (local, f"{root}/")}


@pytest.mark.parametrize("root", ["s3://bucket", "hdfs://host:1/bucket"])
def test_a_folder_lists_addresses_that_can_be_read(tmp_path: Path, root: str) -> None:
    places = Buckets(tmp_path)
    (tmp_path / "bucket" / "a?b").mkdir(parents=True)
    for name in ("x.png", "a?b/y.png"):
        (tmp_path / "bucket" / name).write_text(name)
    for end in ("", "/"):
        found = list(places.images(root + end))
        assert found == [f"{root}/a?b/y.png", f"{root}/x.png"]
        assert [places.read(address) for address in found] == [b"a?b/y.png", b"x.png"]
        assert list(places.images(f"{root}/a?b{end}")) == found[:1]
    assert list(places.images("hdfs://host:1")) == [
        f"hdfs://host:1/bucket/{name}" for name in ("a?b/y.png", "x.png")
    ]
    places.write(f"{root}/", "done", b"1")
    assert places.names(root) == {"a?b", "x.png", "done"}
    places.remove(root, "done")
    assert places.names(root) == {"a?b", "x.png"}


@pytest.mark.parametrize("place", ["?region=eu-west-1", "/folder?endpoint_override=a:9000&x=1"])
def test_options_of_an_address_are_refused_not_lost(tmp_path: Path, place: str) -> None:
    places = Buckets(tmp_path)
    for ask in (lambda a: list(places.images(a)), places.read, places.names):
        with pytest.raises(ValueError, match=r"no options, got .* s3://b.*AWS_ENDPOINT_URL"):
            ask(f"s3://bucket{place}")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_what_is_finished_is_not_computed_again(
    clf: Classifier,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
) -> None:
    output, is_parquet = tmp_path / f"out{suffix}", suffix == ".parquet"
    place = output if is_parquet else tmp_path / f".out{suffix}.parts"
    run = partial(predict_files, images, output, classifier=clf, shard_size=4)
    real, written = ShardedTable.write, []

    def write(table: ShardedTable, shard: Shard, rows: Any) -> None:
        written.append(shard.name)
        real(table, shard, rows)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardedTable, "write", write)
    with monkeypatch.context() as stopped:
        stopped.setattr(ShardedTable, "complete", stop)
        with pytest.raises(KeyboardInterrupt):
            run()
    shards = sorted(path.name for path in place.glob("part-*"))
    assert written == shards
    assert len(shards) == 3
    (place / shards[1]).unlink()
    assert run().count == FILES
    assert written[3:] == [shards[1]]
    run()
    assert written[4:] == ([] if is_parquet else shards), "of a whole CSV no part is kept"


def test_another_list_or_model_leaves_nothing_of_the_old_table(
    clf: Classifier, images: Path, tmp_path: Path, checkpoint_folder: Path
) -> None:
    output = tmp_path / "out.parquet"
    predict_files(images, output, classifier=clf, shard_size=4)
    (output / "notes.txt").write_text("mine")
    (output / ".part-000007-0123456789abcdef.parquet.1-2.partial").write_text("half")
    some = sorted(images.iterdir())[1:8]
    predict_files(some, output, classifier=clf, shard_size=4)
    assert [row["path"] for row in rows_of_parts(output)] == [*map(str, some)]
    fewer = Classifier.from_pretrained(checkpoint_folder, classes=["covid19", "normal"])
    predict_files(some, output, classifier=fewer, shard_size=4)
    rows = rows_of_parts(output)
    assert [row["path"] for row in rows] == [*map(str, some)]
    assert all("p_pneumonia" not in row for row in rows)
    rest = {p.name for p in output.iterdir() if not p.name.startswith("part-")}
    assert rest == {"_SUCCESS", "notes.txt"}


def rows_of_parts(output: Path) -> list[dict[str, object]]:
    return [row for part in sorted(output.glob("part-*")) for row in rows_of(part)]


KILLED = f"""{CODE}
import os, signal, sys, time
from chestxray_covid import Classifier, predict_files
checkpoint, images, whole, killed = sys.argv[1:]
clf = Classifier.from_pretrained(checkpoint, engine="torch")  # others do not survive a fork
options = {{"classifier": clf, "shard_size": 1, "batch_size": 1}}
start = time.perf_counter()
predict_files([images] * 12, whole, **options)
shard = (time.perf_counter() - start) / 144

def count_shards():
    hidden = os.path.join(os.path.dirname(killed), f".{{os.path.basename(killed)}}.parts")
    place = killed if os.path.isdir(killed) else hidden
    names = os.listdir(place) if os.path.isdir(place) else []
    return sum(name.startswith("part-") for name in names)

for number in range(20):
    wanted = count_shards() + number % 4
    child = os.fork()
    if not child:
        predict_files([images] * 12, killed, **options)
        os._exit(0)
    while count_shards() < wanted:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "ended before it was killed"
        time.sleep(0.001)
    time.sleep(shard * number / 20)  # any moment of the work on a shard
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(count_shards())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_after_twenty_kills_nothing_is_lost_and_nothing_twice(
    images: Path, tmp_path: Path, suffix: str
) -> None:
    (tmp_path / "tables").mkdir()
    whole, killed = (tmp_path / "tables" / f"{name}{suffix}" for name in ("whole", "killed"))
    with shallow_networks():
        checkpoint = random_checkpoint(tmp_path / "model")
        same = Classifier.from_pretrained(checkpoint, engine="torch")
    command = [sys.executable, "-c", KILLED, checkpoint, images, whole, killed]
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    stages = [int(line) for line in done.stdout.split()]
    assert len(stages) == 20
    assert stages == sorted(stages), "what was finished stays"
    assert len(set(stages)) > 3, "the kills came too early or too late to show anything"
    table = predict_files([images] * 12, killed, classifier=same, shard_size=1, batch_size=1)
    assert table.count == 12 * FILES
    rows = rows_of(killed)
    assert rows == rows_of(whole)
    assert set(Counter(row["path"] for row in rows).values()) == {12}
    assert {p.name for p in killed.parent.iterdir()} == {killed.name, whole.name}


@pytest.mark.slow
def test_a_disk_that_is_full_keeps_what_was_finished(
    images: Path, tmp_path: Path, checkpoint_folder: Path
) -> None:
    code = (
        "import resource, sys; from chestxray_covid import *\n"
        "clf = Classifier.from_pretrained(sys.argv[1], device='cpu')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))\n"
        "predict_files([sys.argv[2]] * 3, sys.argv[3], classifier=clf, shard_size=16)"
    )
    output = tmp_path / "out.jsonl"
    # Enough for each of three parts, not for the whole.
    command = [sys.executable, "-c", code, checkpoint_folder, images, output, "7200"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert f"File too large: '{output}'" in done.stderr
    left = sorted(p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*") if p.is_file())
    assert left == [".out.jsonl.parts"] * 3


class TestRefused:
    def test_a_shard_of_nothing(self, clf: Classifier, images: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="shard_size must be positive, got 0"):
            predict_files(images, tmp_path / "o.csv", classifier=clf, shard_size=0)

    @pytest.mark.parametrize("name", ["07.png", "new.JPG"])
    def test_an_output_named_like_an_image(
        self, clf: Classifier, images: Path, tmp_path: Path, name: str
    ) -> None:
        output = images / name if name == "07.png" else tmp_path / name
        with pytest.raises(ValueError, match="output must not be named like an image"):
            predict_files(images, output, classifier=clf)
        with Image.open(images / "07.png") as image:
            assert image.size == (64, 64)

    @pytest.mark.parametrize("name", ["a.xlsx", "a.JSON", "a.csv.gz"])
    def test_an_output_named_like_another_table(
        self, clf: Classifier, images: Path, tmp_path: Path, name: str
    ) -> None:
        with pytest.raises(ValueError, match=r"promises another kind .*Expected a name that ends"):
            predict_files(images, tmp_path / name, classifier=clf)
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    @pytest.mark.parametrize("name", ["pipe", "stdout"])
    def test_an_output_that_is_no_file(
        self, clf: Classifier, images: Path, tmp_path: Path, name: str
    ) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "stdout").symlink_to("/proc/self/fd/1")  # as /dev/stdout is one
        for write in (
            lambda: predict_files(images, tmp_path / name, classifier=clf),
            lambda: write_files(tmp_path, {"a": b"a", name: b"b"}),
        ):
            with pytest.raises(ValueError, match=f"{name} is a device or a pipe, which a file"):
                write()
        assert {p.name for p in tmp_path.iterdir()} == {"pipe", "stdout"}
        assert (tmp_path / "pipe").is_fifo()
        assert (tmp_path / "stdout").is_symlink()

    def test_an_address_that_is_no_parquet(
        self, clf: Classifier, images: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=r"must end in \.parquet to be written"):
            predict_files(images, f"{tmp_path.as_uri()}/o.csv", classifier=clf)

    @pytest.mark.parametrize("kind", ["a list", "a folder"])
    def test_no_image(self, clf: Classifier, tmp_path: Path, kind: str) -> None:
        (tmp_path / "empty").mkdir()
        given = [tmp_path / "empty"] if kind == "a list" else tmp_path / "empty"
        with pytest.raises(DatasetNotFoundError, match=r"No image file in .*empty\. Check .*\.dcm"):
            predict_files(given, tmp_path / "o.csv", classifier=clf)
        assert [p.name for p in tmp_path.iterdir()] == ["empty"]

    def test_a_csv_without_paths(self, clf: Classifier, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text("file,label\na.png,normal\n")
        with pytest.raises(DatasetError, match="has no column path"):
            predict_files(tmp_path / "t.csv", tmp_path / "o.csv", classifier=clf)

    @pytest.mark.parametrize(
        ("table", "cause"),
        [
            (
                "path;label\na.png;normal\n".encode("utf-8-sig"),
                "separated by ';': save it with commas",
            ),
            ("path\tlabel\na.png\tnormal\n".encode("utf-16"), "UTF-16: save it as UTF-8"),
        ],
    )
    def test_a_csv_as_excel_saves_it(
        self, clf: Classifier, tmp_path: Path, table: bytes, cause: str
    ) -> None:
        (tmp_path / "t.csv").write_bytes(table)
        with pytest.raises(DatasetError, match=f"has no column path.*{cause}"):
            predict_files(tmp_path / "t.csv", tmp_path / "o.csv", classifier=clf)

    def test_a_csv_with_two_columns_of_paths(self, clf: Classifier, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text("path,label,path\na.png,normal,b.png\n")
        with pytest.raises(DatasetError, match="has more than one column path"):
            predict_files(tmp_path / "t.csv", tmp_path / "o.csv", classifier=clf)

    def test_a_csv_that_is_not_there(self, clf: Classifier, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="cannot be read as a CSV of paths"):
            predict_files(tmp_path / "t.csv", tmp_path / "o.csv", classifier=clf)

    def test_an_address_of_an_unknown_kind(self, clf: Classifier, tmp_path: Path) -> None:
        for place in ("gopher://host/x", "https://host/list.csv"):
            with pytest.raises(
                ValueError, match=r"Unrecognized filesystem type.*begins with s3://"
            ):
                predict_files(place, tmp_path / "o.csv", classifier=clf)

    def test_ray_with_another_table_than_parquet(
        self, clf: Classifier, images: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=r"output must end in \.parquet, got '.*o\.csv'"):
            ray_predict(images, tmp_path / "o.csv", classifier=clf)


def test_a_head_node_that_lends_no_cores_does_not_make_workers_small() -> None:
    nodes = [
        {"Alive": True, "Resources": {"memory": 1e9, "node:__internal_head__": 1.0}},
        {"Alive": True, "Resources": {"CPU": 16.0, "memory": 1e9}},
        {"Alive": True, "Resources": {"CPU": 32.0, "memory": 1e9}},
        {"Alive": False, "Resources": {"CPU": 4.0}},
    ]
    assert batch._cores_of_smallest(nodes) == 16
    assert batch._cores_of_smallest(nodes[:1]) == 1, "machines may come later"


RAY = """
import os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray.data
from chestxray_covid import Classifier, ray_predict
ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100_000_000)
clf = Classifier.from_pretrained(sys.argv[1], device="cpu")
print("ready", flush=True)
options = {"classifier": clf, "shard_size": 2, "batch_size": 2, "actors": 1}
print(ray_predict([sys.argv[2]] * int(sys.argv[4]), sys.argv[3], **options))
try:
    ray_predict(ray.data.from_items([{"name": "x"}]), sys.argv[5], **options)
except ValueError as error:
    print(error)
try:
    ray_predict([sys.argv[2]], sys.argv[2] + "/00.png/o.parquet", **options)
except NotADirectoryError as error:
    # In one piece: a thread of Ray's prints what its actors say meanwhile.
    print(f"of a worker: {error}")
table = ray.data.from_items([{"path": p} for p in [*reversed(sys.argv[6:]), None]])
print(ray_predict(table, sys.argv[5], **options))
"""


def on_ray(*arguments: object) -> subprocess.Popen[str]:
    """Start a process that predicts on Ray; the tests' own process may not open its sockets."""
    command = [sys.executable, "-c", RAY, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


#: Each kill of Ray takes some ten seconds; CONTRIBUTING says how to run more.
RAY_KILLS = int(os.environ.get("CHESTXRAY_COVID_RAY_KILLS", "1"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_ray_finishes_after_kills_agrees_with_one_process_and_takes_a_data_set_with_paths(
    clf: Classifier, images: Path, tmp_path: Path, checkpoint_folder: Path
) -> None:
    output, other = tmp_path / "ray.parquet", tmp_path / "other.parquet"
    repeats, moments = 8 * RAY_KILLS, random.Random(3)
    some = sorted(images.iterdir())[:6]
    everything = (checkpoint_folder, images, output, repeats, other, *some)
    began: dict[str, int] = {}
    for _ in range(RAY_KILLS):
        least = len(began) + moments.randint(1, 4)
        with on_ray(*everything) as process:
            deadline = time.monotonic() + 240
            while len([*output.glob("part-*")]) < least and time.monotonic() < deadline:
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.02)
            time.sleep(moments.uniform(0, 0.2))
            process.kill()
        now = {p.name: p.stat().st_mtime_ns for p in output.glob("part-*")}
        assert began.items() <= now.items()
        assert least <= len(now) < repeats * FILES / 2
        assert not (output / "_SUCCESS").exists()
        began = now
    with on_ray(*everything) as process:
        shown, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    assert f"count={repeats * FILES}" in shown
    assert (output / "_SUCCESS").exists()
    after = {p.name: p.stat().st_mtime_ns for p in output.glob("part-*")}
    assert began.items() <= after.items()
    alone = tmp_path / "alone.parquet"
    predict_files([images] * repeats, alone, classifier=clf, shard_size=2, batch_size=2)
    assert rows_of_parts(output) == rows_of_parts(alone)
    assert "The Ray data set needs a column path, it has ['name']" in shown
    assert "of a worker: [Errno 20] Not a directory: " in shown
    assert [row["path"] for row in rows_of_parts(other)] == [*map(str, some)]


RAY_DEATHS = """
import os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from chestxray_covid import Classifier, ray_predict
from chestxray_covid.cli import main
class Mortal(Classifier):
    def __setstate__(self, state):
        os.kill(os.getpid(), 9)
ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100_000_000)
Classifier.from_pretrained = Mortal.from_pretrained
try:
    ray_predict(sys.argv[2], sys.argv[3], classifier=Mortal.from_pretrained(sys.argv[1]), actors=1)
except ray.exceptions.RayError as error:
    print("ended:", type(error).__name__)
main(["predict", "--model", sys.argv[1], sys.argv[2], "--ray", "--output", sys.argv[3]])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_workers_of_ray_that_die_again_and_again_end_the_call(
    images: Path, tmp_path: Path, checkpoint_folder: Path
) -> None:
    output = tmp_path / "ray.parquet"
    command = [sys.executable, "-c", RAY_DEATHS, *map(str, (checkpoint_folder, images, output))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert "ended: ActorDiedError" in done.stdout, done.stderr
    assert done.returncode == 1
    # Ray logs a traceback of its own before.
    assert "Error: Ray gave up, and what was finished is kept: The actor died" in done.stderr


@pytest.mark.parametrize("address", [False, True])
def test_what_cannot_be_opened_for_want_of_room_has_no_row(
    clf: Classifier, images: Path, address: bool
) -> None:
    names = [images / f"{number:02d}.png" for number in range(5)]
    files = [name.as_uri() if address else str(name) for name in names]
    assert len(list(judge_files(clf, files, batch_size=4))) == 5  # all is loaded
    with no_more_files(), pytest.raises(ResourceError, match=r"0\.png: the machine, .*open files"):
        list(judge_files(clf, files, batch_size=4))
