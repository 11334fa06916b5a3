"""What a run trains on, in which order, and whether it may."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.checkpoint import ModelConfig, config_text
from chestxray_covid.confounders import ConfoundingWarning, confounding_of_question
from chestxray_covid.datasets.base import ChestXrayDataset
from chestxray_covid.datasets.duplicates import on_two_sides
from chestxray_covid.datasets.labels import nameless
from chestxray_covid.datasets.loading import Loader, cached_decoder, decoder
from chestxray_covid.datasets.origins import collections_of
from chestxray_covid.datasets.report import patient_key
from chestxray_covid.errors import ChestXrayError, ConfigError, TrainingError, TrainingWarning
from chestxray_covid.judged_images import default_positive

if TYPE_CHECKING:  # it imports torch, which nothing here needs
    from chestxray_covid.training_config import Callback, TrainingConfig

#: Domain of the random numbers, see :mod:`chestxray_covid.augment`.
_STREAM = 1
#: In place of log 0, which would make 0 · log 0 of the loss: exp of it is 0 in any precision.
ABSENT = -1e4
#: How many sources an error lists.
_NAMED = 6


def epoch_order(
    dataset: ChestXrayDataset,
    *,
    balance: str,
    count: int | None,
    seed: int,
    epoch: int,
    max_repeats: float | None = None,
) -> NDArray[np.int64]:
    """Return the positions that an epoch trains on, in order; a function of its arguments alone.

    Args:
        dataset: The training data.
        balance: See :class:`TrainingConfig`.
        count: Number of positions; ``None`` for as many as there are images.
        seed: Seed of the run.
        epoch: Epoch, from 0.
        max_repeats: See :class:`TrainingConfig`.

    Returns:
        ``(count,)`` int64. Each image once (and again once all were there) with
        ``balance="none"``; otherwise drawn with replacement.
    """
    rng = np.random.default_rng([seed, epoch, _STREAM])
    size = len(dataset)
    count = count or size
    if balance == "none":
        rounds = -(-count // size)
        return np.concatenate([rng.permutation(size) for _ in range(rounds)])[:count]
    shares = draw_shares(dataset, balance=balance, count=count, max_repeats=max_repeats)
    return rng.choice(size, count, p=shares)


def draw_shares(
    dataset: ChestXrayDataset,
    *,
    balance: str,
    count: int | None,
    max_repeats: float | None = None,
) -> NDArray[np.float64]:
    """Return ``(N,)`` shares of an epoch that each image has, on average; their sum is 1.

    Args:
        dataset: As :func:`epoch_order` has it, like all others.
        balance: As there.
        count: As there.
        max_repeats: As there.
    """
    size = len(dataset)
    if balance == "none":
        return np.full(size, 1 / size)
    keys = [(s.label, s.source if balance == "class_and_source" else "") for s in dataset.samples]
    images = Counter(keys)
    shares: dict[tuple[str, str], float] = {}
    labels = {label for label, _ in images}
    for label in labels:
        own = {key: n for key, n in images.items() if key[0] == label}
        limit = None if max_repeats is None else max_repeats * len(labels) / (count or size)
        shares |= _shares(own, limit)
    weights = np.array([shares[key] / images[key] for key in keys], np.float64)
    drawn: NDArray[np.float64] = weights / weights.sum()
    return drawn


def _shares(images: Mapping[Any, int], limit: float | None) -> dict[Any, float]:
    """Return each source's share of its class: equal, but at most ``limit`` per image.

    What a small source may not take is left to the others; if all are small, shares are by size.
    """
    shares: dict[Any, float] = {}
    left, remaining = 1.0, sorted(images, key=lambda key: images[key])
    while remaining:
        key = remaining[0]
        fair = left / len(remaining)
        shares[key] = fair if limit is None else min(fair, limit * images[key])
        left -= shares[key]
        remaining = remaining[1:]
    if left > 1e-9:  # every image is at the limit
        return {key: n / sum(images.values()) for key, n in images.items()}
    return shares


def told_by_sources(
    dataset: ChestXrayDataset, config: TrainingConfig
) -> NDArray[np.float32] | None:
    """Return what the source of each image says of its class, to be added to its logits.

    It is log P(class | source) with the shares at which images are drawn, and :data:`ABSENT` for a
    class that the source does not hold.

    Returns:
        ``(N, K)``, or ``None`` without ``config.within_sources``.

    Raises:
        TrainingError: If classes are left that no source, nor a chain of them, compares.
    """
    if not config.within_sources:
        return None
    count, repeats = config.samples_per_epoch, config.max_repeats
    shares = draw_shares(dataset, balance=config.balance, count=count, max_repeats=repeats)
    names, at = np.unique([s.source for s in dataset.samples], return_inverse=True)
    labels = np.array([s.label for s in dataset.samples])
    columns = [np.bincount(at, shares * (labels == name), len(names)) for name in dataset.classes]
    table = np.stack(columns, 1)
    _check_compared(table > 0, names, dataset.classes)
    told = np.full(table.shape, ABSENT, np.float32)
    np.log(table / table.sum(1, keepdims=True), out=told, where=table > 0)
    return told[at]


def _check_compared(holds: NDArray[np.bool_], sources: Any, classes: Sequence[str]) -> None:
    """Raise unless sources lead from the first class to every other, a pair at a time."""
    reached = np.arange(len(classes)) == 0
    for _ in classes:
        reached |= holds[holds[:, reached].any(1)].any(0)
    if reached.all():
        return
    lists = [
        f"{source} ({', '.join(c for c, held in zip(classes, row, strict=True) if held)})"
        for source, row in zip(sources[:_NAMED], holds, strict=False)
    ]
    lists += ["…"] * (len(sources) > _NAMED)
    one, other = (", ".join(np.array(classes)[side]) for side in (reached, ~reached))
    raise TrainingError(
        f"within_sources=True leaves nothing to tell {one} from {other}: no source holds both. The "
        f"sources are {'; '.join(lists)}. Add a source with both, or use within_sources=False."
    )


def repetitions(order: NDArray[np.int64], size: int) -> list[int]:
    """Return a number for each draw that differs between draws of one image.

    The ``k``-th draw of image ``i`` (from 0) is ``i + k * size``: the images of an epoch are varied
    by what they are, not by where in the order they come.
    """
    seen: Counter[int] = Counter()
    draws = []
    for index in order.tolist():
        draws.append(index + seen[index] * size)
        seen[index] += 1
    return draws


class Batch(NamedTuple):
    """One process's part of the images that all processes compute together.

    Attributes:
        images: Position and draw of each.
        counted: The first so many count; those after them only fill the last batch of an epoch.
        together: Positions of all that count, in all processes.
    """

    images: list[tuple[int, int]]
    counted: int
    together: list[int]


def epoch_batches(
    dataset: ChestXrayDataset,
    config: TrainingConfig,
    *,
    batch_size: int,
    epoch: int,
    process: int,
    processes: int,
) -> list[Batch]:
    """Return one process's batches of an epoch.

    The images of all processes together depend on ``batch_size * processes`` alone. Where they are
    too few for the last batch, the epoch's first ones fill it up, without counting; a last batch of
    one image is left out, since batch norm has no statistics of it.

    Args:
        dataset: The training data.
        config: Options of the run.
        batch_size: Images per process.
        epoch: Epoch, from 0.
        process: Which one, from 0.
        processes: How many there are.
    """
    order = epoch_order(
        dataset,
        balance=config.balance,
        count=config.samples_per_epoch,
        seed=config.seed,
        epoch=epoch,
        max_repeats=config.max_repeats,
    )
    pairs = list(zip(order.tolist(), repetitions(order, len(dataset)), strict=True))
    together = batch_size * processes
    chunks = [pairs[i : i + together] for i in range(0, len(pairs), together)]
    if len(chunks) > 1 and len(chunks[-1]) == 1 < together:
        chunks.pop()
    batches = []
    for chunk in chunks:
        own = chunk[batch_size * process : batch_size * (process + 1)]
        missing = batch_size - len(own) if processes > 1 else 0
        filling = [pairs[i % len(pairs)] for i in range(missing)]
        batches.append(Batch([*own, *filling], len(own), [position for position, _ in chunk]))
    return batches


def pixel_loader(dataset: ChestXrayDataset, config: TrainingConfig, *, progress: bool) -> Loader:
    """Return what reads the pixels of a data set, from the run's cache if it has one.

    Raises:
        TrainingError: If the cache cannot be written.
        Others as :func:`cached_decoder`.
    """
    pre = config.preprocess
    if config.cache_dir is None:
        return decoder(dataset, pre)
    options: dict[str, Any] = {"workers": config.workers, "progress": progress}
    try:
        return cached_decoder(dataset, pre, config.cache_dir, **options)
    except ChestXrayError:
        raise
    except OSError as error:
        raise TrainingError(
            f"cache_dir {config.cache_dir} cannot be written: {error}. Choose another folder, make "
            "room, or leave it out."
        ) from error


def check_sides(train: ChestXrayDataset, val: ChestXrayDataset) -> None:
    """Raise unless these can train and validate a model.

    Raises:
        TypeError: If one is no data set.
        ValueError: If their classes differ.
        ConfigError: If the classes cannot be saved in a checkpoint.
        TrainingError: If validation data or a class are missing, or the two share a patient, also
            one whom an image that both know tells (:func:`on_two_sides`).
    """
    for name, data in (("train", train), ("val", val)):
        if not isinstance(data, ChestXrayDataset):
            raise TypeError(
                f"{name} must be a ChestXrayDataset, got {type(data).__name__}. Of a Split, pass "
                "split.train and split.val."
            )
    ModelConfig(classes=train.classes)
    if train.classes != val.classes:
        raise ValueError(f"train has the classes {train.classes}, val {val.classes}")
    if not len(val):
        raise TrainingError("The validation data are empty. Split with val > 0.")
    # The larger side last, which takes no memory.
    if shared := {patient_key(s) for s in on_two_sides(val.samples, train.samples)}:
        raise TrainingError(
            f"{len(shared)} patient(s) have an image in the training and in the validation data, "
            f"known by number, file, image_id or content_hash, for example {min(shared)}. Split "
            "with split_by_patient."
        )
    missing = sorted(set(train.classes) - {s.label for s in train.samples})
    if missing:
        raise TrainingError(
            f"No training image of {missing}: a classifier cannot learn a class that it never "
            "sees. Add a data set that has it, or ask for other classes=."
        )


def about_data(train: ChestXrayDataset, val: ChestXrayDataset) -> dict[str, Any]:
    """Return what a checkpoint says of the data of its training, without paths and names of these.

    Raises:
        ConfigError: If the names of classes and sources are more than a checkpoint can hold.
    """
    data = ("train", train.report()), ("val", val.report())
    sources = sorted(collections_of(train.samples))
    about: dict[str, Any] = {
        "sources": sources,
        **{k: replace(r, root="", dropped=nameless(r.dropped)).to_dict() for k, r in data},
    }
    try:
        config_text(ModelConfig(classes=train.classes, provenance=about))
    except ConfigError as error:
        raise ConfigError(
            f"{len(train.classes)} classes and {len(sources)} sources have more names than the "
            f"config of a checkpoint can hold: {error}. A source is a collection or a hospital, "
            "not a patient or an image; give those of one the same name."
        ) from error
    return about


def check_options(config: TrainingConfig, callbacks: Sequence[Callback]) -> None:
    """Raise unless these can configure and watch a run.

    Raises:
        TypeError: If they are of the wrong type.
    """
    from chestxray_covid.training_config import Callback, TrainingConfig

    if not isinstance(config, TrainingConfig):
        raise TypeError(
            f"config must be a TrainingConfig, got {type(config).__name__}. Name options as in "
            "TrainingConfig(epochs=3)."
        )
    if not isinstance(callbacks, Sequence):
        raise TypeError(f"callbacks must be a list of Callback, got {callbacks!r}")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(
                f"callbacks must be instances of Callback or of a subclass, got {callback!r}"
            )


def warn_of_sides(
    train: ChestXrayDataset, val: ChestXrayDataset, config: TrainingConfig, *, stacklevel: int
) -> None:
    """Warn of what the two may not be good for.

    Warns:
        ConfoundingWarning, TrainingWarning: As the functions below.
    """
    if not config.allow_confounded_sources:
        warn_if_confounded(train, stacklevel=stacklevel + 1)
    warn_of_absent(val, config, stacklevel=stacklevel + 1)


def warn_of_absent(val: ChestXrayDataset, config: TrainingConfig, *, stacklevel: int) -> None:
    """Warn if validation data that choose the epoch lack a class.

    Warns:
        TrainingWarning: If they do.
    """
    absent = sorted(set(val.classes) - {s.label for s in val.samples})
    if not absent or config.monitor == "last":
        return
    instead = " instead of the AUROC" if config.monitor == "val_auroc" else ""
    warnings.warn(
        f"No validation image of {absent}: the loss on other classes chooses the epoch{instead}. "
        'Split with more patients in val, or use monitor="last".',
        TrainingWarning,
        stacklevel=stacklevel + 1,
    )


def warn_if_confounded(train: ChestXrayDataset, *, stacklevel: int) -> None:
    """Warn, with the table, if the source of the training images all but gives their label.

    Warns:
        ConfoundingWarning: If it does.
    """
    sources, labels = [s.source for s in train.samples], [s.label for s in train.samples]
    found = confounding_of_question(sources, labels, default_positive(train.classes))
    if found.is_severe:
        warnings.warn(
            f"The source all but gives the label in the training data:\n{found}\n"
            "A model can learn the sources instead of the disease, and no patient held out of "
            "these sources can tell. Add sources with both labels, compare classes within sources "
            "(within_sources=True), or say TrainingConfig(allow_confounded_sources=True).",
            ConfoundingWarning,
            stacklevel=stacklevel + 1,
        )
