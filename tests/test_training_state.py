"""Data order, saved states and signals."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from chestxray_covid import (
    Augmentation,
    EpochRecord,
    History,
    Trainer,
    TrainingConfig,
    build_densenet121,
)
from chestxray_covid.datasets.base import ChestXrayDataset, Sample
from chestxray_covid.datasets.phantom import render_phantom
from chestxray_covid.errors import ConfigError, TrainingError
from chestxray_covid.training_order import Batch, epoch_batches, epoch_order, repetitions
from chestxray_covid.training_state import SignalWatch, StateStore, check_identity, run_identity

TENSORS = {"model.a": np.arange(6, dtype=np.float32), "optimizer.0.step": np.array(3.0, np.float32)}


def listed(counts: dict[tuple[str, str], int]) -> ChestXrayDataset:
    samples = [
        Sample(
            path=Path(f"{source}-{label}-{i}.png"),
            label=label,
            finding=label,
            patient_id=str(i),
            source=source,
        )
        for (source, label), count in counts.items()
        for i in range(count)
    ]
    return ChestXrayDataset(samples, classes=("normal", "covid19"))


UNEVEN = listed({("a", "normal"): 80, ("b", "normal"): 10, ("a", "covid19"): 10})


@pytest.mark.parametrize("balance", ["none", "class", "class_and_source"])
def test_the_order_depends_on_seed_and_epoch_alone(balance: str) -> None:
    np.random.seed(1)
    first = epoch_order(UNEVEN, balance=balance, count=None, seed=3, epoch=2)
    np.random.seed(2)
    again = epoch_order(UNEVEN, balance=balance, count=None, seed=3, epoch=2)
    assert np.array_equal(first, again)
    for seed, epoch in ((4, 2), (3, 1)):
        other = epoch_order(UNEVEN, balance=balance, count=None, seed=seed, epoch=epoch)
        assert not np.array_equal(first, other)


def test_without_balance_each_image_comes_once_per_round() -> None:
    order = epoch_order(UNEVEN, balance="none", count=None, seed=0, epoch=0)
    assert sorted(order) == list(range(100))
    longer = epoch_order(UNEVEN, balance="none", count=250, seed=0, epoch=0)
    assert len(longer) == 250
    assert set(Counter(longer.tolist()).values()) <= {2, 3}
    assert len(set(epoch_order(UNEVEN, balance="none", count=30, seed=0, epoch=0))) == 30


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        ("class", {("a", "normal"): 4 / 9, ("b", "normal"): 0.5 / 9, ("a", "covid19"): 0.5}),
        ("class_and_source", {("a", "normal"): 0.25, ("b", "normal"): 0.25, ("a", "covid19"): 0.5}),
    ],
)
def test_balance_draws_classes_and_sources_evenly(
    balance: str, expected: dict[tuple[str, str], float]
) -> None:
    order = epoch_order(UNEVEN, balance=balance, count=20_000, seed=0, epoch=0)
    drawn = Counter((UNEVEN.samples[i].source, UNEVEN.samples[i].label) for i in order)
    for group, share in expected.items():
        assert drawn[group] / 20_000 == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        # 1,000 draws, 500 a class: 10 images at most 20 times are 200, the other source's 300.
        (20, {("a", "normal"): 0.3, ("b", "normal"): 0.2, ("a", "covid19"): 0.5}),
        (1000, {("a", "normal"): 0.25, ("b", "normal"): 0.25, ("a", "covid19"): 0.5}),
        # Not even 90 images at most once fill 500 draws: by size.
        (1, {("a", "normal"): 4 / 9, ("b", "normal"): 0.5 / 9, ("a", "covid19"): 0.5}),
    ],
)
def test_no_image_of_a_small_source_comes_too_often(
    limit: float, expected: dict[tuple[str, str], float]
) -> None:
    drawn: Counter[tuple[str, str]] = Counter()
    for epoch in range(20):
        order = epoch_order(
            UNEVEN,
            balance="class_and_source",
            count=1000,
            seed=0,
            epoch=epoch,
            max_repeats=limit,
        )
        drawn.update((UNEVEN.samples[i].source, UNEVEN.samples[i].label) for i in order)
    for group, share in expected.items():
        assert drawn[group] / 20_000 == pytest.approx(share, abs=0.015)


def test_every_draw_of_an_image_has_a_number_of_its_own() -> None:
    assert repetitions(np.array([2, 0, 2, 2, 1]), 5) == [2, 0, 7, 12, 1]


def batches_of(dataset: ChestXrayDataset, size: int, processes: int = 1) -> list[list[Batch]]:
    """Return the batches of each process."""
    config = TrainingConfig(balance="none")
    options = {"batch_size": size, "epoch": 1, "processes": processes}
    return [epoch_batches(dataset, config, process=p, **options) for p in range(processes)]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_batches_that_one_would_have(processes: int) -> None:
    (alone,) = batches_of(UNEVEN, 24)
    shares = batches_of(UNEVEN, 24 // processes, processes)
    assert [len(batch.images) for batch in alone] == [24, 24, 24, 24, 4]
    for number, batch in enumerate(alone):
        own = [share[number] for share in shares]
        counted = [pair for part in own for pair in part.images[: part.counted]]
        assert counted == batch.images
        assert all(part.together == [i for i, _ in batch.images] for part in own)
        if processes > 1:
            assert {len(part.images) for part in own} == {24 // processes}


def test_few_images_still_fill_the_batches_of_many_processes() -> None:
    few = listed({("a", "normal"): 4, ("a", "covid19"): 3})
    shares = [batch for (batch,) in batches_of(few, 4, processes=8)]
    assert [len(batch.images) for batch in shares] == [4] * 8
    assert [batch.counted for batch in shares] == [4, 3, 0, 0, 0, 0, 0, 0]


def test_batches_of_one_image_are_all_kept() -> None:
    assert len(batches_of(UNEVEN, 1)[0]) == 100


@pytest.mark.parametrize(("size", "processes"), [(9, 1), (3, 3)])
def test_a_last_batch_of_one_image_is_left_out(size: int, processes: int) -> None:
    for batches in batches_of(UNEVEN, size, processes):
        assert [len(batch.images) for batch in batches] == [size] * 11


def test_a_state_comes_back_bit_for_bit_and_older_ones_go(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.save(3, {"model.a": np.zeros(2, np.float32)}, {"at": {"loss": 0.1}})
    store.save(12, TENSORS, {"at": {"loss": 0.1 + 0.2}})
    assert store.steps() == [12]
    step, tensors, values = store.load()
    assert step == 12
    assert values == {"at": {"loss": 0.1 + 0.2}}
    assert all(
        np.array_equal(tensors[k], v) and tensors[k].shape == v.shape for k, v in TENSORS.items()
    )
    store.clear()
    assert list(tmp_path.iterdir()) == []


def test_tensors_in_any_memory_order_come_back_right(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    store.save(1, {"a": array}, {})
    assert np.array_equal(store.load()[1]["a"], array)


@pytest.mark.parametrize("damage", ["weights", "values", "missing"])
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    store = StateStore(tmp_path)
    store.save(1, TENSORS, {"n": 1})
    kept = tmp_path / "kept"
    (tmp_path / "state" / "step-000000001").rename(kept)
    store.save(2, TENSORS, {"n": 2})
    kept.rename(tmp_path / "state" / "step-000000001")
    newest = tmp_path / "state" / "step-000000002"
    if damage == "weights":
        (newest / "state.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    elif damage == "values":
        (newest / "state.json").write_text("{")
    else:
        (newest / "state.safetensors").unlink()
    assert store.load()[0] == 1


class Killed(BaseException):
    """Stands for a process that ends at once: nothing in the library catches it."""


@pytest.mark.parametrize("moment", range(13))
def test_a_kill_while_the_same_step_is_saved_again_leaves_one_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    store, moments = StateStore(tmp_path), iter(range(moment))

    def die_in_time() -> None:
        if next(moments, None) is None:
            raise Killed

    def mortal(change: Any) -> Any:
        def changed(*arguments: Any, **options: Any) -> Any:
            die_in_time()
            result = change(*arguments, **options)
            die_in_time()
            return result

        return changed

    store.save(3, TENSORS, {"n": 1})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", mortal(shutil.rmtree))
        patch.setattr(Path, "replace", mortal(Path.replace))
        with contextlib.suppress(Killed):
            store.save(3, TENSORS, {"n": 2})
    step, _, values = store.load()
    assert step == 3
    assert values["n"] in (1, 2)
    store.save(3, TENSORS, {"n": 3})
    assert store.load()[2] == {"n": 3}
    assert len(list((tmp_path / "state").iterdir())) == 1


def test_a_state_outlives_a_newer_one_that_is_damaged(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.save(9, TENSORS, {})
    (tmp_path / "state" / "step-000000009" / "state.json").write_text("{")
    store.save(4, TENSORS, {})
    assert store.load()[0] == 4


def test_folders_of_other_names_are_no_states_and_stay(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    other = tmp_path / "state" / "step-000000001 (copy)"
    other.mkdir(parents=True)
    assert store.steps() == []
    store.save(2, TENSORS, {})
    assert store.steps() == [2]
    assert other.is_dir()


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "cannot be read as JSON"), ("[1]", "holds a list, expected an obj")]
)
def test_a_damaged_state_is_an_error_that_names_the_file(
    tmp_path: Path, text: str, reason: str
) -> None:
    store = StateStore(tmp_path)
    store.save(1, TENSORS, {})
    (tmp_path / "state" / "step-000000001" / "state.json").write_text(text)
    with pytest.raises(TrainingError, match=rf"step-000000001.state\.json.*{reason}"):
        store.load()


def epochs(count: int, *, best: int) -> tuple[EpochRecord, ...]:
    numbers = {"val_accuracy": 0.5, "val_kappa": None, "val_auroc": None, "learning_rate": 0.1}
    times = {"images_per_s": 1.0, "seconds": 1.0, "data_seconds": 0.0}
    return tuple(
        EpochRecord(epoch=e, train_loss=1.0, val_loss=1.0, is_best=e == best, **numbers, **times)
        for e in range(1, count + 1)
    )


@pytest.mark.slow
def test_the_longest_runs_can_be_read_again(tmp_path: Path) -> None:
    history = History(records=epochs(5000, best=1), finished=True)
    history.save(tmp_path)
    assert (tmp_path / "history.json").stat().st_size > 1_000_000
    store = StateStore(tmp_path)
    assert store.finished(TrainingConfig()) == history
    store.save(1, {}, history.to_dict())
    assert History.from_dict(store.load()[2]) == history


@pytest.mark.parametrize(
    ("count", "best", "finished"), [(4, 4, True), (3, 1, True), (3, 2, False), (0, 0, False)]
)
def test_a_run_that_does_not_say_that_it_is_finished_is_where_no_epoch_would_follow(
    tmp_path: Path, count: int, best: int, finished: bool
) -> None:
    store, config = StateStore(tmp_path), TrainingConfig(epochs=4, patience=2)
    history = History(records=epochs(count, best=best))
    history.save(tmp_path)
    data = history.to_dict()
    del data["finished"]  # as runs were written at first
    (tmp_path / "history.json").write_text(json.dumps(data))
    assert store.finished(config) == (history if finished else None)
    store.save(7, TENSORS, {})
    assert store.finished(config) is None, "there is a state to go on from"


def test_a_damaged_history_hinders_only_where_there_is_no_state(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for text in ("{", "[]", "{}"):
        (tmp_path / "history.json").write_text(text)
        with pytest.raises((ConfigError, TrainingError)):
            store.finished(TrainingConfig())
    store.save(1, TENSORS, {})
    assert store.finished(TrainingConfig()) is None


def test_no_state_is_an_error_that_says_where(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no state to resume from in .*state"):
        StateStore(tmp_path).load()


@pytest.mark.parametrize("values", [{}, {"identity": []}])
def test_a_state_of_another_version_is_refused_in_words(tmp_path: Path, values: Any) -> None:
    config = TrainingConfig(device="cpu", progress=False, allow_confounded_sources=True)
    val = listed({("c", "normal"): 2, ("c", "covid19"): 2})
    StateStore(tmp_path).save(3, TENSORS, values)
    trainer = Trainer(build_densenet121(False, "head"), UNEVEN, val, config, output=tmp_path)
    with pytest.raises(TrainingError, match=r"state is none of this version: .*Error\("):
        trainer.fit(resume=True)
    assert StateStore(tmp_path).steps() == [3]


FORKS = """
import os, sys, time
from pathlib import Path
from chestxray_covid.training_state import StateStore
store = StateStore(Path(sys.argv[1]))
with store.claimed(resume=False, make=True):
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    if os.fork() == 0:
        raise SystemExit  # through the body, which is not the child's to leave
    os.wait()
    try:
        with store.claimed(resume=False, make=True):
            print("two at once")
    except Exception as error:
        print(error)
try:
    with store.claimed(resume=False, make=True):
        print("free")
finally:
    os.kill(child, 9)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_neither_keep_the_folder_of_a_run_nor_free_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", FORKS, run], capture_output=True, text=True, timeout=60, check=True
    )
    at_work, after = done.stdout.splitlines()
    assert at_work.startswith(f"Another run is at work in {run}")
    assert after == "free"


KILLED = """
import sys
import numpy as np
from pathlib import Path
from chestxray_covid.training_state import StateStore
store = StateStore(Path(sys.argv[1]))
start = store.load()[0] if store.steps() else 0
print("ready", flush=True)
for step in range(start + 1, 100_000):
    store.save(step, {"a": np.full(50_000, step, np.float32)}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_last_state_or_the_one_before(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(25):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        timer = threading.Timer(float(rng.uniform(0.002, 0.15)), process.kill)
        timer.start()
        reported = process.stdout.read().split()
        process.wait()
        timer.join()
        process.stdout.close()
        if not StateStore(tmp_path).steps():
            assert reported == []
            continue
        step, tensors, values = StateStore(tmp_path).load()
        assert values == {"step": step}
        assert np.array_equal(tensors["a"], np.full(50_000, step, np.float32))
        if reported:
            assert step - int(reported[-1]) in (0, 1)


KILLED_AMID_WEIGHTS = """
import os, signal, sys
from pathlib import Path
from chestxray_covid.files import write_files
names = ("model.safetensors", "config.json", "history.json", "history.csv", "evaluation.json")
sys.addaudithook(lambda event, _: event == "os.rename" and os.kill(os.getpid(), signal.SIGKILL))
write_files(Path(sys.argv[1]), dict.fromkeys(names, b"some"))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_what_a_killed_run_left_half_written_is_removed_by_the_next(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_AMID_WEIGHTS, str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 5
    store = StateStore(tmp_path)
    with store.claimed(resume=False, make=False):  # a process that writes nothing
        assert len(list(tmp_path.iterdir())) == 5
    with store.claimed(resume=False, make=True):
        assert [p.name[:17] for p in tmp_path.iterdir()] == [".evaluation.json."]  # not a run's


FULL_DISK = """
import resource, sys
import numpy as np
from pathlib import Path
from chestxray_covid.errors import TrainingError
from chestxray_covid.training_state import StateStore
store = StateStore(Path(sys.argv[1]))
store.save(1, {"a": np.ones(10, np.float32)}, {"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    store.save(2, {"a": np.ones(100_000, np.float32)}, {"step": 2})
except TrainingError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")
@pytest.mark.parametrize("limit", [0, 1, 1000, 4096, 100_000, 399_999])
def test_a_full_disk_is_a_typed_error_and_keeps_the_older_state(tmp_path: Path, limit: int) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "state of step 2 cannot be saved" in done.stdout
    assert "Make room or mend the folder, then continue with resume=True." in done.stdout
    assert StateStore(tmp_path).load()[0] == 1
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step-000000001"]


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")
def test_where_no_state_could_be_saved_yet_the_way_is_to_train_again(tmp_path: Path) -> None:
    first = "".join(line for line in FULL_DISK.splitlines(True) if "save(1" not in line)
    command = [sys.executable, "-c", first, str(tmp_path), "1000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "mend the folder, then train again: there is no state yet." in done.stdout
    with pytest.raises(TrainingError, match="There is no state to resume from"):
        StateStore(tmp_path).load()
    with StateStore(tmp_path).claimed(resume=False, make=True):  # nor does it hold a run
        StateStore(tmp_path).save(2, {"a": np.ones(10, np.float32)}, {"step": 2})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_once_and_the_handler_before_comes_back(number: int) -> None:
    before = signal.getsignal(number)
    with SignalWatch() as watch:
        assert watch.received == 0
        os.kill(os.getpid(), number)
        assert watch.received == number
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


def test_a_signal_of_the_program_around_python_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As where R embeds Python: None is what is said of its handler, and cannot be set.
    ask, change = signal.getsignal, signal.signal
    foreign = {signal.SIGINT: None}
    monkeypatch.setattr(signal, "getsignal", lambda number: foreign.get(number, ask(number)))
    monkeypatch.setattr(
        signal, "signal", lambda number, own: (change(number, own), foreign.pop(number, own))[1]
    )
    with SignalWatch() as watch:
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.received == signal.SIGTERM, "the other is noted"
    assert foreign, "it was not touched"


def test_outside_the_main_thread_no_handler_is_set() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter() -> None:
        with SignalWatch() as watch:
            seen.append((watch.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(0, before)]


def inverted(image: Image.Image) -> Image.Image:
    return ImageOps.invert(image)


def blank(sample: Sample, min_size: object, grey: int = 0) -> Image.Image:
    return Image.new("L", (64, 64), grey)


@dataclass
class Turned:
    degrees: float = 90.0

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.rotate(self.degrees)


def test_a_run_is_not_continued_on_pixels_that_other_code_makes() -> None:
    def identity(**options: Any) -> dict[str, Any]:
        train = ChestXrayDataset(UNEVEN.samples, classes=UNEVEN.classes, **options)
        return json.loads(json.dumps(run_identity(TrainingConfig(), train, UNEVEN, ["a"], 1)))

    def with_read(read: Any) -> dict[str, Any]:
        samples = [replace(s, read=read) for s in UNEVEN.samples]
        train = ChestXrayDataset(samples, classes=UNEVEN.classes)
        return run_identity(TrainingConfig(), train, UNEVEN, ["a"], 1)

    assert "pixels" not in identity(), "older runs name none"
    assert "pixels" not in with_read(render_phantom)
    plain, turned = identity(transform=inverted), identity(transform=Turned())
    assert plain["pixels"] == [[f"{__name__}.inverted"], []]
    assert turned["pixels"] == [[f"{__name__}.Turned"], []]
    assert with_read(partial(blank, grey=7))["pixels"] == [[f"{__name__}.blank"], []]
    check_identity(plain, identity(transform=inverted), Path("run"))
    for other in (identity(), turned, with_read(blank)):
        with pytest.raises(TrainingError, match=r"differs in \['pixels'\]"):
            check_identity(plain, other, Path("run"))


def test_an_option_that_a_run_does_not_know_counts_as_its_default() -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        return run_identity(TrainingConfig(**changes), UNEVEN, UNEVEN, ["a"], 1)

    older = identity()
    del older["hide_centre"], older["clip_norm"]
    older["augmentation"] = {k: v for k, v in older["augmentation"].items() if k != "hide_border"}
    check_identity(identity(), older, Path("run"))
    with pytest.raises(TrainingError, match=r"differs in \['hide_centre'\]"):
        check_identity(identity(hide_centre=0.1), older, Path("run"))
    with pytest.raises(TrainingError, match=r"differs in \['clip_norm'\]"):
        check_identity(identity(clip_norm=1.0), older, Path("run"))
    other = identity(augmentation=Augmentation(hide_border=0.1))
    with pytest.raises(TrainingError, match=r"differs in \['augmentation'\]"):
        check_identity(other, older, Path("run"))
    with pytest.raises(TrainingError, match="differs in"):
        check_identity(identity(), {}, Path("run"))
