"""Predictions over any number of files, on one machine or on a Ray cluster; both can be resumed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, cast

from chestxray_covid.classifier import Classifier
from chestxray_covid.datasets.loading import map_ahead
from chestxray_covid.errors import (
    ChestXrayError,
    DatasetError,
    ImageError,
    ImageNotFoundError,
    check_network,
    check_resources,
    first_of,
    require_extra,
)
from chestxray_covid.files import is_folder, listed_path
from chestxray_covid.places import Places, is_address, no_image_file
from chestxray_covid.prediction import FailedPrediction
from chestxray_covid.prediction_table import Row
from chestxray_covid.shards import (
    Place,
    Shard,
    ShardedTable,
    check_apart,
    listed,
    name_of_output,
)

#: Objects that are fetched at once; waiting for object storage costs no processor.
_FETCHES = 16
#: How often a worker of Ray that died is replaced, and a shard that it died over is begun again;
#: of itself, Ray does both without end.
_RESTARTS = 8
#: Raised when what a shard holds changes, so that none of an older version is taken.
_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class PredictedFiles:
    """What became of a number of files.

    Attributes:
        output: The table of predictions: a file, or for Parquet a folder of shards.
        count: Its rows, one per file.
        failed: Path → reason of those that could not be judged.
    """

    output: str
    count: int
    failed: Mapping[str, str]


def predict_files(
    images: Place | Iterable[Place],
    output: Place,
    *,
    classifier: Classifier | None = None,
    shard_size: int = 1024,
    batch_size: int = 16,
    workers: int | None = None,
    progress: bool = False,
) -> PredictedFiles:
    """Judge files and write a table; called again after it was stopped, it does the rest.

    Whatever ended the call before, even ``kill -9``, at most the shard that was being computed is
    done again, and every file has one row in the end. If the list of files has changed since, it
    is computed again from the first shard that changed. A file is known by its name, and by the
    current folder where that is relative: where a file's content has changed, or one that failed is
    to be tried again, delete what is finished. Of a CSV or JSON lines that is whole nothing is kept
    apart: called again, it computes all anew. Memory does not grow with the number of files.

    Args:
        images: A file, a folder for the image files below it, or a CSV with a column ``path``,
            relative to its own folder; or several of these. Addresses in object storage, such as
            ``s3://bucket/folder``, too (extra ``parquet``).
        output: Ends in ``.parquet`` for a folder of Parquet shards (extra ``parquet``), which may
            be an address; in ``.jsonl`` for JSON lines; otherwise it is CSV. The latter two appear
            when all is done; until then, what is finished is in ``.<name>.parts`` beside them.
            The columns are those of :func:`prediction_table.format_of`.
        classifier: The bundled model if not given.
        shard_size: Files per shard; a multiple of the batch size, so that a run that went on gives
            the very numbers of one that was not stopped.
        batch_size: Images computed at once.
        workers: Threads that decode; as many as there are cores if not given.
        progress: Show a progress bar.

    Raises:
        DatasetNotFoundError: If there is no image file.
        DatasetError: If a CSV of paths cannot be read, another run writes the output, or a part of
            it is damaged.
        TypeError: If something is neither a path nor an address, or the classifier is none.
        ValueError: If a size is not positive, the output is a file where a folder is expected or
            the contrary, or it is one of the inputs, a device, an address that pathlib took a
            slash of, or named like an image or another kind of table.
        OSError: If the output cannot be written; what was finished is kept.
        ResourceError: If memory, threads or open files run out, of which no image is at fault; what
            was finished is kept.
        MissingExtraError: If Parquet or an address needs pyarrow, which is not installed.
    """
    from chestxray_covid.progress import Bar

    clf = classifier or Classifier.from_pretrained()
    table = _table(clf, output, shard_size)
    check_apart(images, table.output)
    judge = _Judge(clf, table, batch_size=batch_size, workers=workers)
    finished = table.finished()
    sizes: dict[str, int] = {}
    with Bar(desc="predict", unit="img", disable=not progress) as bar:

        def missing() -> Iterator[Shard]:
            for shard in table.shards(listed(images, table.places)):
                sizes[shard.name] = len(shard.files)
                if shard.name in finished:
                    bar.update(len(shard.files))
                else:
                    table.begin(finished)
                    yield shard

        for shard in judge.write_all(missing()):
            bar.update(len(shard.files))
    return _complete(table, sizes, images)


def ray_predict(
    images: Any,
    output: Place,
    *,
    classifier: Classifier | None = None,
    actors: int | None = None,
    num_cpus: float | None = None,
    num_gpus: float = 0,
    shard_size: int = 1024,
    batch_size: int = 16,
    progress: bool = False,
) -> PredictedFiles:
    """Judge files on a Ray cluster: :func:`predict_files` in as many workers as there is room for.

    Each worker holds one model, which travels to it from here, and writes whole shards. Ray is
    started on this machine unless it was before, or ``RAY_ADDRESS`` names a cluster. A worker that
    dies is replaced, eight times at most, and a call that was stopped is continued by the next one.

    Args:
        images: As for :func:`predict_files`, under names that hold on every machine; or a Ray data
            set with a column ``path``, whose order does not matter.
        output: Ends in ``.parquet``: a folder that every machine reaches, or an address.
        classifier: The bundled model if not given.
        actors: Largest number of workers; what the cluster has room for if not given.
        num_cpus: Cores per worker; if not given all of the smallest machine that lends any.
            The runtime of a model takes the cores that it finds, so workers that share a machine
            are for engines that keep to ``OMP_NUM_THREADS``, such as torch.
        num_gpus: GPUs per worker; the classifier's device says whether they are used.
        shard_size: Files per shard; a multiple of the batch size, so that a run that went on gives
            the very numbers of one that was not stopped.
        batch_size: Images computed at once.
        progress: Show a progress bar.

    Raises:
        DatasetNotFoundError: If there is no image file.
        DatasetError: If a CSV of paths cannot be read, another run writes the output, or a part of
            it is damaged.
        TypeError: As :func:`predict_files`.
        ValueError: If the output is no Parquet, or a file, or one of the inputs, a size is not
            positive, or the data set has no column ``path``.
        OSError: If the output cannot be listed, or a worker cannot write its shard.
        ResourceError: As :func:`predict_files`.
        ray.exceptions.RayError: If workers cannot start, or die again and again.
        MissingExtraError: If Ray is not installed.
    """
    from chestxray_covid.progress import Bar

    ray, data = require_extra("ray", "ray"), require_extra("ray.data", "ray")
    target = name_of_output(output)
    clf = classifier or Classifier.from_pretrained()
    # A worker has another current folder.
    place = target if is_address(target) else os.path.abspath(target)  # noqa: PTH100
    table = _table(clf, place, shard_size)
    if not table.is_parquet:
        raise ValueError(f"Ray writes Parquet: output must end in .parquet, got {target!r}")
    given = isinstance(images, data.Dataset)
    if not given:
        check_apart(images, table.output)
    shards = list(table.shards(_column(images) if given else listed(images, table.places)))
    finished = table.finished()
    missing = [shard._asdict() for shard in shards if shard.name not in finished]
    count = sum(len(shard.files) for shard in shards)
    if missing:
        table.begin(finished)
        if not ray.is_initialized():
            ray.init(**({} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False}))
        if num_cpus is None:
            num_cpus = _cores_of_smallest(ray.nodes())
        model = ray.put(clf)  # held until all is done: a worker that is replaced needs it again
        judged = data.from_items(missing, override_num_blocks=len(missing)).map(
            _Judge,
            fn_constructor_args=(model, table),
            fn_constructor_kwargs={
                "batch_size": batch_size,
                "workers": max(1, int(num_cpus)),
                "root": os.getcwd(),  # noqa: PTH109
            },
            compute=data.ActorPoolStrategy(min_size=1, max_size=actors),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
        )
        done = count - sum(len(shard["files"]) for shard in missing)
        with Bar(desc="predict", total=count, initial=done, disable=not progress) as bar:
            error = _first_error(judged.iter_rows(), bar)
        if error is not None:
            raise error
    return _complete(table, {shard.name: len(shard.files) for shard in shards}, images)


def _cores_of_smallest(nodes: Iterable[Mapping[str, Any]]) -> float:
    """Return the cores of the smallest machine that lends any; Ray does not list what is 0."""
    found = (n["Resources"].get("CPU", 0) for n in nodes if n["Alive"])
    return min(filter(None, found), default=1)


def _first_error(rows: Iterable[Mapping[str, Any]], bar: Any) -> Exception | None:
    """Return what ended a shard; the rest is let go with the rows, before the error is raised."""
    for row in rows:
        if row["error"] is not None:
            return cast(Exception, row["error"])
        bar.update(row["count"])
    return None


def _table(classifier: Classifier, output: Place, shard_size: int) -> ShardedTable:
    check_network(classifier)
    config, gate = classifier.config, classifier.gate
    flags = "" if gate is None else hashlib.sha256(gate.to_bytes()).hexdigest()
    precision = classifier.engine.precision
    if precision == "int8" and classifier.int8 is not None:
        precision = classifier.int8.digest
    # Of the weights that compute, whatever the config says of those that it was saved with.
    weights = classifier.weights_sha256
    model = [_VERSION, weights, flags, config.classes, config.threshold, precision]
    return ShardedTable(
        output,
        classes=config.classes,
        model=json.dumps([*model, config.preprocess.to_dict()]),
        shard_size=shard_size,
    )


def _complete(table: ShardedTable, sizes: Mapping[str, int], images: Any) -> PredictedFiles:
    if not sizes:
        shown = str(images)
        if isinstance(images, (list, tuple)):
            shown = first_of([*map(str, images)]) if images else "an empty list"
        elif isinstance(images, Iterator):
            shown = "what was given"
        raise no_image_file(shown)
    failed = table.complete(sizes)
    return PredictedFiles(output=table.output, count=sum(sizes.values()), failed=failed)


def _column(dataset: Any) -> list[str]:
    """Return the paths in a Ray data set, sorted: its own order may differ from run to run."""
    if "path" not in (dataset.columns() or ()):
        raise ValueError(f"The Ray data set needs a column path, it has {dataset.columns()}")
    rows = dataset.select_columns(["path"]).iter_rows()
    return sorted(str(row["path"]) for row in rows if row["path"])


class _Judge:
    """Computes shards; with Ray it is what each worker holds.

    Args:
        classifier: The model, or Ray's reference to it.
        table: Where the rows go.
        batch_size: Images computed at once.
        workers: Threads that decode, see :func:`predict_files`.
        root: What relative paths are relative to.
    """

    def __init__(
        self,
        classifier: Any,
        table: ShardedTable,
        *,
        batch_size: int,
        workers: int | None,
        root: str = "",
    ) -> None:
        own = isinstance(classifier, Classifier)
        self._classifier = classifier if own else require_extra("ray", "ray").get(classifier)
        self._table = table
        self._options: dict[str, Any] = {"batch_size": batch_size, "workers": workers}
        self._root = root

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Compute a shard, as Ray asks for it; an error goes back as it is, not as Ray's text."""
        files = [str(file) for file in row["files"]]
        try:
            deque(self.write_all([Shard(row["name"], files)]), maxlen=0)
        except (ChestXrayError, OSError) as error:
            return {"count": 0, "error": error}
        return {"count": len(files), "error": None}

    def write_all(self, shards: Iterable[Shard]) -> Iterator[Shard]:
        """Compute and write shards, in one stream, and yield each of them when it is written.

        Threads of their own for every shard would keep memory that the next ones do not use.
        """
        ahead, behind = itertools.tee(shards)
        files = (file for shard in ahead for file in shard.files)
        rows = judge_files(self._classifier, files, root=self._root, **self._options)
        with closing(rows):
            for shard in behind:
                own = list(itertools.islice(rows, len(shard.files)))
                if len(own) != len(shard.files):
                    raise _not_one_row_each(shard.files[len(own)])
                self._table.write(shard, own)
                yield shard
            next(rows, None)  # raises what ended the list of files, of which the copy knows nothing


def judge_files(
    classifier: Classifier,
    files: Iterable[str],
    *,
    batch_size: int,
    workers: int | None = None,
    root: str = "",
) -> Generator[Row, None, None]:
    """Yield a row per file, in order and in constant memory, named as it was given.

    Args:
        classifier: The model.
        files: Paths and addresses of images.
        batch_size: Images computed at once.
        workers: Threads that decode; as many as there are cores if not given.
        root: What relative paths are relative to.

    Raises:
        DatasetError: If a file becomes a folder meanwhile.
        Exception: Whatever the source of the files raises, after the rows before it.
    """
    asked: deque[tuple[str, str | bytes | ImageError]] = deque()
    sources = _sources(files, root, asked)
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers}
    found = classifier.predict_stream(sources, on_error="return", **options)
    with closing(cast(Generator[Row, None, None], found)) as rows:
        for row in rows:
            file, source = asked.popleft()
            if isinstance(source, ImageError):
                yield FailedPrediction(source=file, error=source)
            elif row.source != (source if isinstance(source, str) else "<bytes>"):
                raise _not_one_row_each(file)
            else:
                yield replace(row, source=file)
    if asked:
        raise _not_one_row_each(asked[0][0])


def _sources(
    files: Iterable[str], root: str, asked: deque[tuple[str, str | bytes | ImageError]]
) -> Iterator[str | bytes]:
    """Yield paths and the content of objects; note what was asked for, or why it is not there."""
    places = Places()

    def fetch(file: str) -> tuple[str, str | bytes | ImageError]:
        if is_address(file):
            try:
                return file, places.read(file)
            except (OSError, ValueError) as error:  # ValueError: a kind that pyarrow does not know
                check_resources(error, file)
                return file, ImageError(f"{file} cannot be fetched: {error}")
        # What was typed is expanded already.
        path = listed_path(os.path.join(root, file))  # noqa: PTH118 - a million of them
        if is_folder(path):  # which would stand for the images below it
            return file, ImageNotFoundError(f"{file} is a folder, expected a regular file.")
        return file, path

    fetched = map_ahead(fetch, files, workers=_FETCHES, ahead=2 * _FETCHES)
    with closing(fetched):
        for file, source in fetched:
            asked.append((file, b"" if isinstance(source, bytes) else source))
            yield b"" if isinstance(source, ImageError) else source  # keeps its place


def _not_one_row_each(file: str) -> DatasetError:
    return DatasetError(
        f"{file} did not give one row: files and folders have changed while they were judged. "
        "Run it again."
    )
