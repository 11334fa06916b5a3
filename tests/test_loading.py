from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from chestxray_covid.datasets.base import ChestXrayDataset, Sample
from chestxray_covid.datasets.folder import FolderDataset
from chestxray_covid.datasets.loading import (
    cached_decoder,
    decoder,
    in_batches,
    map_ahead,
    pipeline,
)
from chestxray_covid.datasets.synthetic import SyntheticChestXray
from chestxray_covid.errors import DatasetError, ImageError
from chestxray_covid.image import Preprocess, load_image
from sources import draw, write_folder, write_image

SMALL = Preprocess(size_px=32)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Recorder:
    """Pixels of samples without a file, and how often each was asked for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def read(self, sample: Sample, min_size: tuple[int, int] | None) -> Image.Image:
        self.names.append(sample.path.name)
        if sample.finding == "damaged":
            raise ImageError(f"{sample.path} is damaged")
        if sample.finding == "interrupted":
            raise KeyboardInterrupt
        return draw(sample.path.name)

    def dataset(self, *names: str, findings: dict[str, str] | None = None) -> ChestXrayDataset:
        samples = [
            Sample(
                path=Path(name),
                label="normal",
                finding=(findings or {}).get(name, "none"),
                patient_id=name,
                source="drawn",
                metadata={"read": "drawn"},
                read=self.read,
            )
            for name in names
        ]
        return ChestXrayDataset(samples, classes=["normal"])

    def assert_right(self, dataset: ChestXrayDataset, folder: Path) -> list[str]:
        """Check the cache's pixels and return the names of the images that were decoded."""
        self.names.clear()
        load = cached_decoder(dataset, SMALL, folder)
        decoded = sorted(self.names)
        for i, s in enumerate(dataset.samples):
            assert np.array_equal(load(i), SMALL(draw(s.path.name)))
        return decoded


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def decoding_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("decode")]


# Ahead, in threads


@pytest.mark.parametrize("workers", [0, 1, 2, 7])
@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
def test_results_come_in_the_order_of_the_items(workers: int, ahead: int) -> None:
    rng = random.Random(workers)

    def slow(item: int) -> int:
        time.sleep(rng.random() / 1000)
        return item**2

    results = list(map_ahead(slow, range(30), workers=workers, ahead=ahead))
    assert results == [i**2 for i in range(30)]
    assert not decoding_threads()


OUTLIVING = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from chestxray_covid.datasets.loading import pipeline

def wait_for_the_end():
    while True:
        try:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(time.sleep, 0.01)
        except RuntimeError:
            return

def items():
    for number in range(40):
        if number == 8:
            wait_for_the_end()
        yield number

def work(where):
    rows = pipeline(items(), str, lambda batch: batch, batch_size=4, workers=2, calls=2)
    sys.stdout.write(f"{where} {' '.join(rows)}\\n")

threading.Thread(target=work, args=["thread"]).start()
left = ThreadPoolExecutor(1)
left.submit(work, "pool")
atexit.register(work, "exit")
"""


def test_threads_that_outlive_the_main_one_compute_all_in_order() -> None:
    command = [sys.executable, "-c", OUTLIVING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    rows = " ".join(map(str, range(40)))
    assert sorted(done.stdout.splitlines()) == [f"{w} {rows}" for w in ("exit", "pool", "thread")]
    assert done.stderr == ""


def test_nothing_in_gives_nothing_out() -> None:
    assert list(map_ahead(str, [])) == []


@pytest.mark.parametrize("ahead", [1, 5])
def test_no_more_than_the_look_ahead_is_taken_early(ahead: int) -> None:
    taken = []

    def items() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    results = map_ahead(str, items(), workers=3, ahead=ahead)
    assert taken == []
    for yielded, result in enumerate(results, start=1):
        assert result == str(yielded - 1)
        assert len(taken) <= yielded + ahead
    assert len(taken) == 100


def test_an_endless_source_can_be_read_as_far_as_wanted() -> None:
    results = map_ahead(abs, iter(int, 1), workers=2, ahead=4)
    assert [next(results) for _ in range(10)] == [0] * 10
    results.close()


def test_several_threads_work_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=60)
    assert len(list(map_ahead(lambda _: together.wait(), range(6), workers=3, ahead=3))) == 6


def test_an_error_comes_at_its_item_and_ends_the_threads() -> None:
    def fail_at_five(item: int) -> int:
        if item == 5:
            raise ImageError("item 5 is damaged")
        return item

    results = map_ahead(fail_at_five, range(100), workers=4, ahead=20)
    received: list[int] = []
    with pytest.raises(ImageError, match="item 5 is damaged"):
        received.extend(results)
    assert received == [0, 1, 2, 3, 4]
    assert not decoding_threads()


def failing_source(count: int) -> Iterator[int]:
    yield from range(count)
    raise DatasetError("the list is damaged")


@pytest.mark.parametrize("count", [0, 1, 3, 30])
@pytest.mark.parametrize("ahead", [1, 8])
def test_an_error_of_the_source_comes_after_all_results_before_it(count: int, ahead: int) -> None:
    received: list[int] = []
    with pytest.raises(DatasetError, match="the list is damaged"):
        received.extend(map_ahead(abs, failing_source(count), ahead=ahead))
    assert received == list(range(count))
    batches: list[Sequence[int]] = []
    with pytest.raises(DatasetError, match="the list is damaged"):
        batches.extend(in_batches(failing_source(count), 4))
    assert [item for batch in batches for item in batch] == list(range(count))
    found: list[int] = []
    with pytest.raises(DatasetError, match="the list is damaged"):
        found.extend(pipeline(failing_source(count), abs, squares, batch_size=4))
    assert found == squares(range(count))
    assert not decoding_threads()


def test_an_error_of_decoding_comes_after_all_results_before_it() -> None:
    def fail_at_six(item: int) -> int:
        if item == 6:
            raise ZeroDivisionError("item 6")
        return item

    found: list[int] = []
    with pytest.raises(ZeroDivisionError, match="item 6"):
        found.extend(pipeline(range(20), fail_at_six, squares, batch_size=4))
    assert found == squares(range(6))


def test_closing_early_cancels_what_has_not_begun() -> None:
    begun = []
    go_on = threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item:
            go_on.wait(60)
        return item

    results = map_ahead(work, range(1000), workers=2, ahead=50)
    assert next(results) == 0
    threading.Timer(1.0, go_on.set).start()
    results.close()
    assert len(begun) <= 4
    assert not decoding_threads()


@pytest.mark.parametrize(
    ("count", "lengths"), [(0, []), (1, [1]), (4, [4]), (5, [4, 1]), (12, [4, 4, 4])]
)
def test_batches_hold_every_item_once(count: int, lengths: list[int]) -> None:
    batches = list(in_batches(iter(range(count)), 4))
    assert [len(batch) for batch in batches] == lengths
    assert [item for batch in batches for item in batch] == list(range(count))


# ---------------------------------------------------------------- decoding beside computing


def squares(batch: Sequence[int]) -> list[int]:
    return [item**2 for item in batch]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("calls", [1, 3])
def test_a_pipeline_keeps_the_order(batch_size: int, calls: int) -> None:
    rng = random.Random(calls)

    def slow(batch: Sequence[int]) -> list[int]:
        time.sleep(rng.random() / 500)
        return squares(batch)

    found = pipeline(range(50), abs, slow, batch_size=batch_size, calls=calls)
    assert list(found) == [i**2 for i in range(50)]
    assert not decoding_threads()


def test_a_pipeline_decodes_while_it_computes() -> None:
    """Both wait for each other: one after the other, they would wait for ever."""
    met = threading.Barrier(2, timeout=60)

    def decode(item: int) -> int:
        if item == 2:  # of the second batch
            met.wait()
        return item

    def compute(batch: Sequence[int]) -> list[int]:
        if 0 in batch:
            met.wait()
        return list(batch)

    assert list(pipeline(range(4), decode, compute, batch_size=2, workers=1)) == [0, 1, 2, 3]


def test_a_pipeline_computes_several_batches_at_once() -> None:
    together = threading.Barrier(3, timeout=60)

    def compute(batch: Sequence[int]) -> list[int]:
        together.wait()
        return list(batch)

    found = pipeline(range(6), abs, compute, batch_size=1, workers=2, calls=3)
    assert list(found) == list(range(6))


@pytest.mark.parametrize(("batch_size", "calls"), [(1, 1), (4, 1), (4, 3)])
def test_a_pipeline_waits_for_whoever_takes_its_results(batch_size: int, calls: int) -> None:
    taken = []

    def items() -> Iterator[int]:
        for i in range(400):
            taken.append(i)
            yield i

    found = pipeline(items(), abs, squares, batch_size=batch_size, workers=2, calls=calls)
    assert taken == []
    most = 2 * max(batch_size, 2) + (calls + 2) * batch_size
    for yielded, _ in enumerate(found, start=1):
        assert len(taken) <= yielded + most
    assert len(taken) == 400


def test_a_pipeline_that_is_left_ends_its_threads() -> None:
    found = pipeline(iter(int, 1), abs, squares, batch_size=2, workers=2, calls=2)
    assert next(found) == 0
    found.close()
    assert not decoding_threads()


@pytest.mark.parametrize("fails", ["decode", "compute"])
def test_an_error_inside_a_pipeline_comes_out_and_ends_its_threads(fails: str) -> None:
    def refuse(_: Any) -> Any:
        raise ValueError("impossible")

    steps = {"decode": abs, "compute": squares, fails: refuse}
    found = pipeline(range(9), steps["decode"], steps["compute"], batch_size=2)
    with pytest.raises(ValueError, match="impossible"):
        list(found)
    assert not decoding_threads()


# Without a cache


def test_a_decoder_gives_what_the_preprocessing_gives_of_the_file(tmp_path: Path) -> None:
    for i, suffix in enumerate(("png", "jpeg", "bmp")):
        write_image(tmp_path / "COVID" / f"{i}.{suffix}", size=(500 + i, 400))
    dataset = FolderDataset(tmp_path)
    load = decoder(dataset, SMALL)
    for i, sample in enumerate(dataset.samples):
        pixels = load(i)
        assert (pixels.shape, pixels.dtype.name) == ((1, 32, 32), "uint8")
        assert np.array_equal(pixels, SMALL(sample.path))


# The cache


def test_the_cache_gives_the_same_pixels_as_the_decoder(tmp_path: Path) -> None:
    dataset = FolderDataset(write_folder(tmp_path / "site", {"COVID": 5, "Normal": 4}))
    plain = decoder(dataset, SMALL)
    for _ in range(2):
        cached = cached_decoder(dataset, SMALL, tmp_path / "cache")
        for i in (8, 0, 3, 0):
            pixels = cached(i)
            assert (pixels.shape, pixels.dtype.name) == ((1, 32, 32), "uint8")
            assert np.array_equal(pixels, plain(i))


def test_a_second_pass_decodes_nothing(tmp_path: Path, recorder: Recorder) -> None:
    dataset = recorder.dataset("a", "b", "c")
    assert recorder.assert_right(dataset, tmp_path) == ["a", "b", "c"]
    before = contents(tmp_path)
    assert recorder.assert_right(dataset, tmp_path) == []
    assert recorder.assert_right(dataset.subset([2, 0]), tmp_path) == []
    assert contents(tmp_path) == before


def test_a_loader_needs_the_files_no_more(tmp_path: Path) -> None:
    dataset = FolderDataset(write_folder(tmp_path / "site", {"COVID": 3}))
    expected = [decoder(dataset, SMALL)(i) for i in range(3)]
    load = cached_decoder(dataset, SMALL, tmp_path / "cache")
    for sample in dataset.samples:
        sample.path.unlink()
    assert all(np.array_equal(load(i), expected[i]) for i in range(3))
    with pytest.raises(DatasetError, match=r"COVID-0\.png cannot be read"):
        cached_decoder(dataset, SMALL, tmp_path / "cache")


def test_a_file_that_moved_is_found_by_its_content(tmp_path: Path) -> None:
    dataset = FolderDataset(write_folder(tmp_path / "site", {"COVID": 3}))
    expected = [decoder(dataset, SMALL)(i) for i in range(3)]
    cached_decoder(dataset, SMALL, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    (tmp_path / "site").rename(tmp_path / "elsewhere")
    moved = FolderDataset(tmp_path / "elsewhere")
    load = cached_decoder(moved, SMALL, tmp_path / "cache")
    assert all(np.array_equal(load(i), expected[i]) for i in range(3))
    assert contents(tmp_path / "cache") == before


def test_a_file_whose_content_changed_is_decoded_again(tmp_path: Path) -> None:
    dataset = FolderDataset(write_folder(tmp_path / "site", {"COVID": 3}))
    cached_decoder(dataset, SMALL, tmp_path / "cache")
    write_image(dataset.samples[1].path, "another image")
    load = cached_decoder(dataset, SMALL, tmp_path / "cache")
    assert np.array_equal(load(1), SMALL(draw("another image")))
    assert np.array_equal(load(2), SMALL(dataset.samples[2].path))


def test_images_that_are_added_make_one_more_shard(tmp_path: Path, recorder: Recorder) -> None:
    assert recorder.assert_right(recorder.dataset("a", "b"), tmp_path) == ["a", "b"]
    before = contents(tmp_path)
    assert recorder.assert_right(recorder.dataset("c", "b", "a", "d"), tmp_path) == ["c", "d"]
    after = contents(tmp_path)
    assert len(after) == len(before) + 2
    assert before.items() <= after.items()


def test_equal_content_is_kept_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / "site" / "COVID" / name, "same" if name != "b.png" else "other")
    load = cached_decoder(FolderDataset(tmp_path / "site"), SMALL, tmp_path / "cache")
    assert np.array_equal(load(0), load(2))
    assert not np.array_equal(load(0), load(1))
    sizes = [len(data) for name, data in contents(tmp_path / "cache").items() if "json" not in name]
    assert [size // 32**2 for size in sizes] == [2]


def test_two_sizes_do_not_mix(tmp_path: Path, recorder: Recorder) -> None:
    dataset = recorder.dataset("a", "b")
    for size in (32, 64, 32, 64):
        preprocess = Preprocess(size_px=size)
        load = cached_decoder(dataset, preprocess, tmp_path)
        assert np.array_equal(load(1), preprocess(draw("b")))
    assert recorder.names == ["a", "b"] * 2 or sorted(recorder.names) == ["a", "a", "b", "b"]


def test_a_shard_of_another_size_in_the_folder_is_passed_over(
    tmp_path: Path, recorder: Recorder
) -> None:
    dataset = recorder.dataset("a", "b")
    cached_decoder(dataset, Preprocess(size_px=64), tmp_path)
    (large,) = tmp_path.iterdir()
    recorder.assert_right(dataset, tmp_path)
    (small,) = (p for p in tmp_path.iterdir() if p != large)
    for path in large.iterdir():
        path.replace(small / path.name)
    assert recorder.assert_right(dataset, tmp_path) == ["a", "b"]


@pytest.mark.parametrize("kind", ["index", "pixels"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"\x01" + data[1:],
        lambda data: data[:20] + b"\xff" + data[21:],
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: None,
    ],
    ids=["other start", "a strange byte", "emptied", "halved", "shortened", "lengthened", "lost"],
)
def test_a_damaged_shard_is_decoded_again(
    tmp_path: Path, recorder: Recorder, kind: str, damage: Callable[[bytes], bytes | None]
) -> None:
    dataset = recorder.dataset("a", "b", "c")
    recorder.assert_right(dataset, tmp_path)
    sound = contents(tmp_path)
    (name,) = (n for n in sound if n.endswith(".json") == (kind == "index"))
    damaged = damage(sound[name])
    if damaged is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(damaged)
    assert recorder.assert_right(dataset, tmp_path) == ["a", "b", "c"]
    assert contents(tmp_path) == sound
    assert recorder.assert_right(dataset, tmp_path) == []


def test_rows_of_a_shard_that_are_lost_to_zeros_are_decoded(
    tmp_path: Path, recorder: Recorder
) -> None:
    dataset = recorder.dataset("a", "b", "c")
    recorder.assert_right(dataset, tmp_path)
    (shard,) = tmp_path.rglob("*.npy")
    lost = np.load(shard)
    lost[1:] = 0
    np.save(shard, lost)
    assert recorder.assert_right(dataset, tmp_path) == []  # when the cache is opened
    assert len(recorder.names) == 2


@pytest.mark.parametrize(
    "text",
    [
        "5",
        "null",
        '{"a": 1}',
        '"abc"',
        "[[1], [2], [3]]",
        "[1, 2, 3]",
        "[" * 10**5,
        "\ud800",
        "NaN",
    ],
)
def test_an_index_that_is_none_is_passed_over(
    tmp_path: Path, recorder: Recorder, text: str
) -> None:
    dataset = recorder.dataset("a", "b", "c")
    recorder.assert_right(dataset, tmp_path)
    (index,) = tmp_path.rglob("*.json")
    index.write_text(text, encoding="utf-8", errors="surrogatepass")
    assert recorder.assert_right(dataset, tmp_path) == ["a", "b", "c"]


def test_whoever_writes_a_shard_writes_the_same_bytes(tmp_path: Path, recorder: Recorder) -> None:
    # Or else one process's index could meet the other's pixels.
    for folder, names in (("one", "abcd"), ("other", "dbca")):
        recorder.assert_right(recorder.dataset(*names), tmp_path / folder)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_threads_and_processes_may_fill_the_same_cache(tmp_path: Path) -> None:
    dataset = FolderDataset(write_folder(tmp_path / "site", {"COVID": 12}))
    plain = decoder(dataset, SMALL)
    orders = [random.Random(i).sample(range(12), 12) for i in range(8)]

    def fill(order: list[int]) -> bool:
        load = cached_decoder(dataset.subset(order), SMALL, tmp_path / "cache")
        return all(np.array_equal(load(k), plain(i)) for k, i in enumerate(order))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fill, orders))
    assert len(contents(tmp_path / "cache")) == 2


@pytest.mark.parametrize(
    ("finding", "kind"), [("damaged", ImageError), ("interrupted", KeyboardInterrupt)]
)
def test_interrupted_writing_leaves_no_shard(
    tmp_path: Path, recorder: Recorder, finding: str, kind: type[BaseException]
) -> None:
    dataset = recorder.dataset("a", "b", "c", findings={"b": finding})
    with pytest.raises(kind):
        cached_decoder(dataset, SMALL, tmp_path)
    assert contents(tmp_path) == {}
    assert not decoding_threads()
    assert recorder.assert_right(recorder.dataset("a", "b", "c"), tmp_path) == ["a", "b", "c"]


def run_and_fill(code: str, root: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code before the cache of ``root/site`` is filled in a process of its own."""
    program = textwrap.dedent(code) + textwrap.dedent("""
        import sys
        from chestxray_covid.datasets.folder import FolderDataset
        from chestxray_covid.datasets.loading import cached_decoder
        from chestxray_covid.image import Preprocess
        root = sys.argv[1]
        cached_decoder(FolderDataset(root + "/site"), Preprocess(size_px=32), root + "/cache")
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-c", program, str(root)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the list of mapped files")
def test_a_shard_that_another_process_wrote_first_and_reads_is_taken_as_it_is(
    tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_file = Path.replace

    def as_windows_does(path: Path, target: Path) -> Path:
        if str(target) in Path("/proc/self/maps").read_text(encoding="utf-8"):
            raise PermissionError(13, "Access is denied", str(target))
        return replace_file(path, target)

    monkeypatch.setattr(Path, "replace", as_windows_does)
    others, read = [], recorder.read

    def read_late(sample: Sample, size: tuple[int, int] | None) -> Image.Image:
        others.append(cached_decoder(Recorder().dataset("a"), SMALL, tmp_path))
        return read(sample, size)

    monkeypatch.setattr(recorder, "read", read_late)
    assert recorder.assert_right(recorder.dataset("a"), tmp_path) == ["a"]
    (other,) = others
    assert np.array_equal(other(0), SMALL(draw("a")))
    assert len(contents(tmp_path)) == 2

    monkeypatch.setattr(recorder, "read", read)
    (index,) = tmp_path.rglob("*.json")
    index.unlink()  # and where there is none that is complete, it stays an error
    with pytest.raises(PermissionError):
        cached_decoder(recorder.dataset("a"), SMALL, tmp_path)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_process_that_is_killed_while_writing_leaves_nothing_that_counts(tmp_path: Path) -> None:
    dataset = FolderDataset(write_folder(tmp_path / "site", {"COVID": 5}))
    code = """
        import os, signal
        from pathlib import Path
        os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_and_fill(code, tmp_path).returncode == -signal.SIGKILL
    left = contents(tmp_path / "cache")
    assert [Path(name).suffix for name in left] == [".partial"]
    load = cached_decoder(dataset, SMALL, tmp_path / "cache")
    assert all(np.array_equal(load(i), decoder(dataset, SMALL)(i)) for i in range(5))


def test_what_killed_runs_left_is_removed_after_a_day(tmp_path: Path) -> None:
    dataset = FolderDataset(write_folder(tmp_path / "site", {"COVID": 2}))
    cached_decoder(dataset.subset([0]), SMALL, tmp_path / "cache")
    place = next((tmp_path / "cache").iterdir())
    ours = [f".{'0a' * 12}.{end}" for end in ("0123abcd.partial", "x_9.partial.json")]
    for name in (*ours, ".mine.partial"):
        (place / name).touch()
        os.utime(place / name, (time.time() - 25 * 3600,) * 2)
    (young := place / f".{'0a' * 12}.young.partial").touch()
    cached_decoder(dataset, SMALL, tmp_path / "cache")
    left = {p.name for p in place.iterdir() if p.name.startswith(".")}
    assert left == {".mine.partial", young.name}


def test_a_cache_can_be_shared_by_whoever_the_umask_lets(tmp_path: Path) -> None:
    dataset = FolderDataset(write_folder(tmp_path / "site", {"COVID": 2}))
    (tmp_path / "usual").touch()
    cached_decoder(dataset, SMALL, tmp_path / "cache")
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert len(files) == 2
    assert {p.stat().st_mode for p in files} == {(tmp_path / "usual").stat().st_mode}


def test_a_cache_may_lie_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    dataset = FolderDataset(write_folder(tmp_path / "site", {"COVID": 1}))
    cached_decoder(dataset, SMALL, "~/cache")
    assert contents(tmp_path / "home" / "cache")


def test_a_full_disk_is_an_error_that_leaves_no_shard(tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="this system cannot limit the size of files")
    write_folder(tmp_path / "site", {"COVID": 5})
    code = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    """
    done = run_and_fill(code, tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("OSError: [Errno 27] File too large")
    assert contents(tmp_path / "cache") == {}


def test_transformed_images_are_not_cached(tmp_path: Path) -> None:
    dataset = FolderDataset(write_folder(tmp_path / "site"), transform=np.array)
    with pytest.raises(ValueError, match="Transformed images cannot be cached"):
        cached_decoder(dataset, SMALL, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_pixels_of_an_own_function_are_cached_only_under_a_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", {"Normal": 1, "COVID": 1})
    files = FolderDataset(tmp_path / "images")

    def read_as(levels: Callable[[Image.Image], Image.Image], **name: str) -> ChestXrayDataset:
        def read(sample: Sample, min_size: tuple[int, int] | None) -> Image.Image:
            return levels(load_image(sample.path))

        samples = [replace(s, read=read, metadata={**s.metadata, **name}) for s in files.samples]
        return ChestXrayDataset(samples, classes=files.classes)

    for levels in (ImageOps.invert, ImageOps.mirror):
        with pytest.raises(ValueError, match=r'a function of your own.*metadata\["read"\] what is'):
            cached_decoder(read_as(levels), SMALL, tmp_path / "cache")
        dataset = read_as(levels, read=levels.__name__)
        load = cached_decoder(dataset, SMALL, tmp_path / "cache")
        assert all(np.array_equal(load(i), decoder(dataset, SMALL)(i)) for i in range(2))
    phantoms = SyntheticChestXray(2, image_size_px=32)
    load = cached_decoder(phantoms, SMALL, tmp_path / "cache")
    assert np.array_equal(load(1), decoder(phantoms, SMALL)(1))


def test_progress_is_shown_only_if_asked_for(
    tmp_path: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    cached_decoder(recorder.dataset("a"), SMALL, tmp_path)
    assert capsys.readouterr() == ("", "")
    cached_decoder(recorder.dataset("b"), SMALL, tmp_path, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "decoding: 100%" in err


def test_a_shard_is_a_numpy_file_and_a_list_of_the_content_of_its_rows(
    tmp_path: Path, recorder: Recorder
) -> None:
    dataset = recorder.dataset("a", "b", "c")
    cached_decoder(dataset, SMALL, tmp_path)
    (index,) = tmp_path.rglob("*.json")
    keys = json.loads(index.read_text(encoding="utf-8"))
    assert keys == sorted(s.content_hash() for s in dataset.samples)
    pixels = np.load(index.with_suffix(".npy"), allow_pickle=False)
    rows = {s.content_hash(): SMALL(draw(s.path.name)) for s in dataset.samples}
    assert np.array_equal(pixels, np.stack([rows[key] for key in keys]))


def test_an_empty_data_set_needs_no_cache(tmp_path: Path) -> None:
    cached_decoder(ChestXrayDataset([], classes=["normal"]), SMALL, tmp_path)
    assert contents(tmp_path) == {}
