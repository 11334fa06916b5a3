"""Pixels on time: decoding in threads beside the model, and a cache of decoded pixels on disk."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import secrets
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.datasets.base import ChestXrayDataset
from chestxray_covid.datasets.storage import remove_stale, resolver
from chestxray_covid.errors import DatasetError, check_resources
from chestxray_covid.files import expanded, is_folder
from chestxray_covid.image import IMAGE_SUFFIXES, Preprocess
from chestxray_covid.processor import cores
from chestxray_covid.progress import Bar

Item = TypeVar("Item")
Decoded = TypeVar("Decoded")
Result = TypeVar("Result")
#: From the position of a sample to its ``(1, S, S)`` uint8 pixels.
Loader = Callable[[int], NDArray[np.uint8]]

#: Raised when decoding or resizing changes, so that no cache of the older kind is taken.
_CACHE_VERSION = 2
#: Where the ways of reading are that follow from what :meth:`Sample.content_hash` covers.
_OWN_READS = ("chestxray_covid.datasets.base", "chestxray_covid.datasets.phantom")
#: What a shard is called until it is complete.
_PARTIAL = re.compile(r"\.[0-9a-f]{24}\.\w+\.partial(\.json)?")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int = 2, ahead: int = 64
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` for every item, in order, computed in threads up to ``ahead`` early.

    Memory stays bounded by ``ahead`` results, however many items there are. Pillow releases the
    interpreter's lock while it decodes, so threads serve as well as processes and need no copies.
    In a thread that outlives the main one they are computed there, one by one.

    Raises:
        Exception: Whatever ``function`` or the source raises, after all results before it.
    """
    source = iter(items)
    pending: deque[Callable[[], Result]] = deque()
    result: list[Result] = []  # at most one, held back until the next item is under way
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode") as pool:
        try:
            while True:
                try:
                    for item in itertools.islice(source, max(1, ahead) - len(pending)):
                        pending.append(_begun(pool, function, item))
                except Exception:
                    yield from result
                    while pending:
                        yield pending.popleft()()
                    raise
                yield from result
                if not pending:
                    return
                result = [pending.popleft()()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begun(pool: Executor, function: Callable[[Item], Result], item: Item) -> Callable[[], Result]:
    """Return what waits for a result that is being computed, or computes it."""
    try:
        return pool.submit(function, item).result
    except RuntimeError as error:
        check_resources(error, "No thread to compute in")
        # Once the main thread has ended, no pool takes anything, while other threads work on. Not
        # so daemon threads: one that computes while the process ends aborts it.
        if "cannot schedule" not in str(error) or threading.current_thread().daemon:
            raise
    return partial(function, item)


def pipeline(
    items: Iterable[Item],
    decode: Callable[[Item], Decoded],
    compute: Callable[[Sequence[Decoded]], Iterable[Result]],
    *,
    batch_size: int,
    workers: int | None = None,
    calls: int = 1,
) -> Generator[Result, None, None]:
    """Yield what ``compute`` makes of batches of decoded items, in order.

    Some threads decode while others compute; both are ahead by a bounded number of items, whoever
    is slower: the source of the items, the decoding, the computing, or the caller.

    Args:
        items: Read from the caller's thread, as they are needed.
        decode: From an item to what a batch is made of.
        compute: From a batch to a result per item.
        batch_size: Items per batch.
        workers: Threads that decode; as many as there are cores if not given.
        calls: Threads that compute.

    Raises:
        Exception: Whatever the functions and the source of the items raise.
    """
    threads = cores() if workers is None else workers
    ahead = 2 * max(batch_size, threads)
    with closing(map_ahead(decode, items, workers=threads, ahead=ahead)) as decoded:
        batches = in_batches(decoded, batch_size)
        # One batch more than are computed, so that the next begins when one ends.
        with closing(map_ahead(compute, batches, workers=calls, ahead=calls + 1)) as computed:
            for batch in computed:
                yield from batch


def decoder(dataset: ChestXrayDataset, preprocess: Preprocess) -> Loader:
    """Return a loader that decodes and preprocesses a sample each time it is asked for."""
    size = preprocess.decode_size()

    def load(index: int) -> NDArray[np.uint8]:
        return preprocess(dataset.image(index, size))

    return load


def cached_decoder(
    dataset: ChestXrayDataset,
    preprocess: Preprocess,
    folder: str | os.PathLike[str],
    *,
    workers: int = 2,
    progress: bool = False,
) -> Loader:
    """Return a loader that reads preprocessed pixels from a memory-mapped cache.

    Radiographs that the cache lacks are decoded first, into one more shard. An entry is keyed by
    the content of the file and by the size, so a file that moved is still found and one that
    changed is decoded again. Shards appear complete or not at all; several processes may share
    the folder. What killed runs left of one is removed after a day. An image that is black all over
    is decoded whenever it is asked for.

    Args:
        dataset: The samples; must have no transform, whose result the key would not show. Nor does
            it show what a ``read`` of your own gives, unless ``metadata["read"]`` names what is
            read, and how.
        preprocess: Size and way of resizing.
        folder: Cache folder, made if missing.
        workers: Threads that decode.
        progress: Show a progress bar.

    Raises:
        ValueError: If the data set has a transform, or a ``read`` of your own that is not named.
        ImageError: If a file cannot be decoded; nothing is added to the cache then.
        DatasetError: If a file cannot be read.
        OSError: If the cache cannot be written; nothing is added to it then.
    """
    if dataset.transform is not None:
        raise ValueError(
            "Transformed images cannot be cached: the cache knows only a file's content. "
            "Leave out the cache or the transform."
        )
    for s in dataset.samples:
        if getattr(s.read, "__module__", "") not in _OWN_READS and "read" not in s.metadata:
            raise ValueError(
                f"{s.path} is read by a function of your own, which the cache cannot tell from "
                'others. Leave out the cache, or say in metadata["read"] what is read, and how.'
            )
    size = preprocess.size_px
    place = expanded(folder) / f"v{_CACHE_VERSION}-{preprocess.resize}-{size}px"
    place.mkdir(parents=True, exist_ok=True)
    keys = list(
        map_ahead(lambda s: s.content_hash(), dataset.samples, workers=workers, ahead=4 * workers)
    )
    rows = _read_shards(place, size)
    # Sorted, so that a shard's name says its bytes, whoever writes it and in whatever order.
    missing = dict(sorted((key, i) for i, key in enumerate(keys) if key not in rows))
    load = decoder(dataset, preprocess)
    if missing:
        _write_shard(place, size, missing, load, workers=workers, progress=progress)
        rows = _read_shards(place, size)

    def lookup(index: int) -> NDArray[np.uint8]:
        shard, row = rows[keys[index]]
        pixels: NDArray[np.uint8] = shard[row]
        # Black all over is what a lost block of a disk reads as, and no radiograph.
        return pixels if pixels.any() else load(index)

    return lookup


def _read_shards(place: Path, size: int) -> dict[str, tuple[NDArray[np.uint8], int]]:
    """Return content hash → (memory-mapped shard, row); shards that do not fit are passed over."""
    rows: dict[str, tuple[NDArray[np.uint8], int]] = {}
    for index in sorted(place.glob("*.json")):
        try:
            keys = json.loads(index.read_text(encoding="utf-8"))
            data = np.asarray(np.memmap(index.with_suffix(".npy"), np.uint8, mode="r"))
        except (OSError, ValueError, RecursionError):
            continue  # damaged or gone: its images are decoded again
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            continue
        # Compared, not parsed: NumPy's parser answers damage with errors of half a dozen kinds.
        header = _npy_header(len(keys), size)
        pixels = data[len(header) :]
        if data[: len(header)].tobytes() == header and pixels.size == len(keys) * size**2:
            shard = pixels.reshape(-1, 1, size, size)
            rows.update((key, (shard, row)) for row, key in enumerate(keys))
    return rows


def _npy_header(count: int, size: int) -> bytes:
    buffer = io.BytesIO()
    fields = {"descr": "|u1", "fortran_order": False, "shape": (count, 1, size, size)}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def _write_shard(
    place: Path, size: int, missing: dict[str, int], load: Loader, *, workers: int, progress: bool
) -> None:
    remove_stale(place, _PARTIAL)
    name = hashlib.blake2b("".join(missing).encode(), digest_size=12).hexdigest()
    partial = place / f".{name}.{secrets.token_hex(4)}.partial"
    index = Path(f"{partial}.json")
    try:
        # Not through a memory map: on a full disk that ends the process (SIGBUS).
        with partial.open("xb") as file:
            file.write(_npy_header(len(missing), size))
            decoded = map_ahead(load, missing.values(), workers=workers)
            for image in Bar(decoded, "decoding", len(missing), unit="img", disable=not progress):
                file.write(image.tobytes())
            file.flush()
            os.fsync(file.fileno())
        index.write_text(json.dumps(list(missing)), encoding="utf-8")
        try:
            # The index makes a shard valid, so it comes last.
            partial.replace(place / f"{name}.npy")
            index.replace(place / f"{name}.json")
        except PermissionError:
            # Windows replaces no file that is mapped: of a process that was first with this shard.
            if not missing.keys() <= _read_shards(place, size).keys():
                raise
    finally:
        partial.unlink(missing_ok=True)
        index.unlink(missing_ok=True)


def in_batches(items: Iterable[Item], size: int) -> Iterator[Sequence[Item]]:
    """Yield the items in lists of ``size``, the last one maybe shorter.

    Raises:
        Exception: Whatever the source raises, after the items before it.
    """
    iterator = iter(items)
    while True:
        batch: list[Item] = []
        try:
            batch.extend(itertools.islice(iterator, size))
        except Exception:
            if batch:
                yield batch
            raise
        if not batch:
            return
        yield batch


def image_files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder whose names are those of images, sorted within each folder.

    Folders that are linked to come after all others, each folder once. One that cannot be listed is
    yielded itself, last: decoding it is an error that names it.
    """
    unlisted: list[OSError] = []

    def note(error: OSError) -> None:
        check_resources(error, str(error.filename))
        unlisted.append(error)

    starts, seen = deque([folder]), set[str]()
    while starts:
        for here, folders, files in os.walk(starts.popleft(), onerror=note):
            if (real := os.path.realpath(here)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            inside = (Path(here, name) for name in folders)
            starts.extend(f for f in inside if os.path.islink(f))  # noqa: PTH114 - as is_folder
            for name in sorted(files):
                if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                    yield Path(here, name)
    yield from (Path(error.filename) for error in unlisted)


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what a folder holds, without what is hidden, by name.

    Raises:
        DatasetError: If it cannot be listed.
    """
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if e.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        check_resources(error, str(folder))
        raise DatasetError(
            f"{folder} cannot be listed: {error}. Mend its permissions, or move it away."
        ) from error


def why_no_image(entry: os.DirEntry[str]) -> str:
    """Return why an entry of a folder is no image by its name and kind, or an empty string."""
    stem, suffix = os.path.splitext(entry.name)  # noqa: PTH122 - fast
    if suffix.lower() not in IMAGE_SUFFIXES:
        return "not an image file name"
    if stem.casefold().endswith(("mask", "masks")):
        return "a mask, by its name"
    # A link to a file is one, too; what the listing says already costs no look at the disk.
    if entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path):  # noqa: PTH113
        return ""
    return "no regular file"


def images_of(
    labels: Mapping[Path, str], dropped: Counter[str], notes: Counter[str]
) -> Iterator[tuple[Path, Path]]:
    """Yield class folder and image for each file below class folders, in their order, once.

    Args:
        labels: Class folder → label. One may be a link to another, or to a part of it.
        dropped: As in :func:`images_below`; also counts what was yielded before.
        notes: As there.

    Raises:
        DatasetError: If a folder cannot be listed, or a file has two labels.
    """
    first: dict[str, Path] = {}
    resolved = resolver()
    for folder, label in labels.items():
        for path in images_below(folder, dropped, notes):
            known = first.setdefault(resolved(path), folder)
            if labels[known] != label:
                raise DatasetError(
                    f"{path} is in {known}, too, through a link, so that it would be both "
                    f"{labels[known]!r} and {label!r}. Remove one of the two."
                )
            if known is folder:
                yield folder, path
            else:
                dropped["file listed twice"] += 1


def images_below(folder: Path, dropped: Counter[str], notes: Counter[str]) -> Iterator[Path]:
    """Yield the image files below a folder, those of a folder before those of the ones inside.

    Hidden files and folders, ``__MACOSX`` and folders of masks are not read, nor are links to
    folders followed, whose images may count already.

    Args:
        folder: Where to look.
        dropped: Counts the files that are no images, by reason.
        notes: Counts the folders that are passed over.

    Raises:
        DatasetError: If a folder cannot be listed.
    """
    inside = []
    for entry in entries(folder):
        if entry.is_dir(follow_symlinks=False):
            inside.append(entry)
        elif entry.is_symlink() and is_folder(entry.path):
            notes["links to folders, not followed"] += 1
        elif reason := why_no_image(entry):
            dropped[reason] += 1
        else:
            yield Path(entry.path)
    for entry in inside:
        if may_hold_images(entry.name, notes):
            yield from images_below(Path(entry.path), dropped, notes)


def may_hold_images(name: str, notes: Counter[str]) -> bool:
    """Return whether a folder of this name may hold radiographs; one of masks is noted."""
    if name.casefold().endswith(("mask", "masks")):
        notes["folders of masks, not read"] += 1
        return False
    return name != "__MACOSX"
