"""Splits without leakage: no patient on two sides, no duplicate across them."""

from __future__ import annotations

import json
import operator
import os
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.datasets.base import ChestXrayDataset, Sample
from chestxray_covid.datasets.duplicates import on_two_sides, patient_groups
from chestxray_covid.datasets.storage import write_file, writing_to
from chestxray_covid.errors import DatasetError, SplitError, real_number, whole_number
from chestxray_covid.files import expanded, parse_json
from chestxray_covid.intervals import check_seed

SIDES = ("train", "val", "test")
_FORMAT = 1
#: Samples from which scikit-learn's search, of some 70 s per million, gives way to a plain draw.
_MANY = 50_000
_MEND = "Open the data as they were split (with limit(…), where train had --limit), or split again."
_FACTS = ("name", "source", "patient_id")
#: Which facts of a sample and of a saved entry are equal, the best first.
_LIKENESS = tuple(("hash", *more) for n in (3, 2, 1, 0) for more in combinations(_FACTS, n))


@dataclass(frozen=True, kw_only=True)
class Split:
    """A data set divided by patient; ``train``, ``val`` and ``test`` are data sets.

    Attributes:
        dataset: What was divided.
        indices: Side → positions in ``dataset``, ascending; the sides share no group.
        groups: ``(N,)`` group of each sample; patients joined with duplicates.
        seed: Seed of the assignment.

    Raises:
        SplitError: If two sides share a group, or sides, positions and groups do not fit.
    """

    dataset: ChestXrayDataset
    indices: Mapping[str, tuple[int, ...]] = field(repr=False)
    groups: tuple[int, ...] = field(repr=False)
    seed: int

    def __post_init__(self) -> None:
        count = len(self.dataset)
        if sorted(self.indices) != sorted(SIDES) or len(self.groups) != count:
            raise SplitError(
                f"Expected the sides {SIDES} and the groups of {count} samples, got the sides "
                f"{tuple(self.indices)} and {len(self.groups)} groups."
            )
        taken: dict[int, str] = {}
        for side, indices in self.indices.items():
            for i in indices:
                if not 0 <= i < count:
                    raise SplitError(f"{side} holds position {i} of a data set of {count} samples.")
                if (other := taken.setdefault(self.groups[i], side)) != side:
                    sample = self.dataset.samples[i]
                    raise SplitError(
                        f"{sample.path} (patient {sample.patient_id} of {sample.source}, or a "
                        f"duplicate) is in {other} and in {side}. Split by patient again."
                    )

    @cached_property
    def train(self) -> ChestXrayDataset:
        """The samples to train on."""
        return self.dataset.subset(self.indices["train"])

    @cached_property
    def val(self) -> ChestXrayDataset:
        """The samples that choose the epoch."""
        return self.dataset.subset(self.indices["val"])

    @cached_property
    def test(self) -> ChestXrayDataset:
        """The samples that nothing was chosen on."""
        return self.dataset.subset(self.indices["test"])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the split as JSON, one entry per file with its hash, complete or not at all.

        Raises:
            DatasetError: If a file cannot be read, or the split not written.
            ValueError: If a device or a pipe is there.
        """
        entries = [
            {"side": side, **_facts(self.dataset.samples[i]), "group": int(self.groups[i])}
            for side, indices in self.indices.items()
            for i in indices
        ]
        data = {"format_version": _FORMAT, "seed": int(self.seed), "samples": entries}
        with writing_to(target := expanded(path), DatasetError):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file(target, json.dumps(data, indent=1).encode())
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str], dataset: ChestXrayDataset) -> Self:
        """Return the split that was saved, over the same files, wherever they lie now.

        Raises:
            SplitError: If the file cannot be read, if it puts a patient, or an image that the
                data set knows twice, on two sides, or if the data set has other files than it.
            DatasetError, ValueError: If a file of the data cannot be read; if path is an address.
        """
        seed, entries = _read_split(expanded(path))
        found = _entries_of(dataset, entries)
        if strange := [s for i, s in enumerate(dataset.samples) if i not in found]:
            raise SplitError(
                f"{strange[0].path} is not in the split {path} (or its content changed). {_MEND}"
            )
        if len(found) != len(entries):
            raise SplitError(
                f"{path} holds {len(entries)} samples, the data set {len(found)}. {_MEND}"
            )
        sides = {s: tuple(i for i in sorted(found) if found[i]["side"] == s) for s in SIDES}
        if shared := next(on_two_sides(*(dataset.subset(s).samples for s in sides.values())), None):
            raise SplitError(
                f"{path} puts patient {shared.patient_id} of {shared.source}, or an image of them, "
                "on two sides, as the data set now says. Open it as it was split, or split again."
            )
        groups = tuple(int(found[i]["group"]) for i in range(len(dataset)))
        return cls(dataset=dataset, indices=sides, groups=groups, seed=seed)


def saved_side(path: str | os.PathLike[str], side: str) -> frozenset[str]:
    """Return the content hashes of one side of a saved split.

    Raises:
        ValueError: If there is no such side, or ``path`` is an address.
        SplitError: If the file cannot be read.
    """
    if side not in SIDES:
        raise ValueError(f"Unknown value {side!r} for side. Valid values are {SIDES}")
    return frozenset(e["hash"] for e in _read_split(expanded(path))[1] if e["side"] == side)


def _entries_of(
    dataset: ChestXrayDataset, entries: Sequence[Mapping[str, Any]]
) -> dict[int, Mapping[str, Any]]:
    """Return position → saved entry of the same content, where there is one for it.

    Equal files that were not taken for copies may be on two sides, so that each gets the entry
    that is most like it.
    """
    wanted = {i: _facts(sample) for i, sample in enumerate(dataset.samples)}
    left = dict(enumerate(entries))
    found: dict[int, Mapping[str, Any]] = {}
    for equal in _LIKENESS:
        waiting: dict[tuple[str, ...], deque[int]] = defaultdict(deque)
        for n, entry in left.items():
            waiting[tuple(str(entry.get(name)) for name in equal)].append(n)
        for i, facts in list(wanted.items()):
            if alike := waiting.get(tuple(facts[name] for name in equal)):
                found[i] = left.pop(alike.popleft())
                del wanted[i]
    return found


def _facts(sample: Sample) -> dict[str, str]:
    own = {name: str(getattr(sample, name)) for name in _FACTS[1:]}
    return {"hash": sample.content_hash(), "name": sample.path.name, **own}


def _read_split(path: Path) -> tuple[int, list[dict[str, Any]]]:
    try:
        data = parse_json(text := path.read_bytes(), limit=len(text))
        if data["format_version"] != _FORMAT:
            raise ValueError(f"format_version is {data['format_version']!r}, expected {_FORMAT}")
        seed, entries, sides = int(data["seed"]), list(data["samples"]), dict[int, str]()
        for entry in entries:
            if entry["side"] not in SIDES or not isinstance(entry["hash"], str):
                raise SplitError(f"{path} has an entry without side or hash: {entry}. Split again.")
            if sides.setdefault(int(entry["group"]), entry["side"]) != entry["side"]:
                raise SplitError(
                    f"{path} puts patient {entry['patient_id']} of {entry['source']} on two "
                    "sides. Split by patient again."
                )
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        if isinstance(error, SplitError):
            raise
        advice = "Check path and permissions" if isinstance(error, OSError) else "Split again"
        raise SplitError(f"{path} is no saved split: {error!r}. {advice}.") from error
    return seed, entries


def split_by_patient(
    dataset: ChestXrayDataset,
    *,
    val: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
    find_copies: bool = True,
    workers: int = 2,
    progress: bool = False,
) -> Split:
    """Return a split in which no patient and no duplicate is on two sides.

    Samples are grouped by :func:`patient_groups`, and the groups assigned at random, stratified
    by label and source (scikit-learn's ``StratifiedGroupKFold``), so a side's size is as near to
    the wanted one as ``1 / round(1 / fraction)`` and whole patients allow. Of more than 50,000
    samples, every so-manieth of the groups that hold alike is taken instead.

    Args:
        dataset: What to divide.
        val: Fraction for validation, in [0, 0.5]; 0 leaves it empty.
        test: Fraction for the test, in [0, 0.5]; 0 leaves it empty. Below 1 with ``val``.
        seed: Seed of the assignment.
        find_copies: Decode all images and compare them: 20 GiB for a million. ``False`` joins by
            patient, file, ``image_id`` and ``content_hash`` alone.
        workers: Threads that decode.
        progress: Show a progress bar.

    Raises:
        TypeError: If a fraction is no number, the seed no whole one, or ``dataset`` no data set.
        ValueError: If a fraction, their sum, the seed or ``workers`` is out of range.
        SplitError: If a class has too few patients to be on every side.
        ImageError: If a file cannot be decoded.
    """
    val, test = real_number("val", val), real_number("test", test)
    for name, fraction in (("val", val), ("test", test)):
        if not 0 <= fraction <= 0.5:
            raise ValueError(f"{name} must be a fraction in [0, 0.5], got {fraction}")
    if not 0 < val + test < 1:
        raise ValueError(f"val and test must add up to more than 0 and less than 1: {val}, {test}")
    wanted: dict[str, int] = {"sides": 1 + (val > 0) + (test > 0), "seed": seed}
    groups = np.array(patient_groups(dataset, find_copies=False, workers=workers))
    check_divisible(dataset, groups, **wanted)
    if find_copies:  # which only makes groups fewer
        groups = np.array(patient_groups(dataset, workers=workers, progress=progress))
        check_divisible(dataset, groups, **wanted)
    rest, held_out = divide(dataset, np.arange(len(dataset)), groups, test, seed)
    train, validation = divide(dataset, rest, groups, val / (1 - test), seed + 1)
    sides = {"train": train, "val": validation, "test": held_out}
    for side, fraction in {"train": 1.0, "val": val, "test": test}.items():
        lacking = set(dataset.targets) - {dataset.targets[i] for i in sides[side]}
        if fraction and lacking:
            raise SplitError(
                f"No patient with {sorted(dataset.classes[c] for c in lacking)} fell into {side}: "
                "too few patients. Use larger fractions, more data, or another seed."
            )
    return Split(
        dataset=dataset,
        indices={side: tuple(int(i) for i in chosen) for side, chosen in sides.items()},
        groups=tuple(int(g) for g in groups),
        seed=seed,
    )


def folds_by_patient(
    dataset: ChestXrayDataset, groups: Sequence[int], *, folds: int = 5, seed: int = 0
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return ``folds`` pairs of positions (rest, held out), stratified by label and source.

    Raises:
        SplitError, TypeError, ValueError: As :func:`check_divisible`.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    check_divisible(dataset, groups, sides=folds, seed=seed)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    strata = _strata(dataset, range(len(dataset)), np.asarray(groups), folds)
    return list(splitter.split(strata, strata, groups))


def check_divisible(
    dataset: ChestXrayDataset, groups: Sequence[int] | NDArray[np.int64], *, sides: int, seed: int
) -> None:
    """Raise unless every class has enough groups for so many sides, or folds.

    Raises:
        SplitError: If a class has fewer groups, or there is one class only.
        TypeError, ValueError: If ``sides`` or ``seed`` is no whole number, or out of range.
    """
    check_seed(seed)
    if whole_number("folds", sides) < 2:
        raise ValueError(f"folds must be at least 2, got {sides}")
    pairs = dict.fromkeys(zip(dataset.targets, map(int, groups), strict=True))
    owned = Counter(target for target, _ in pairs)
    if len(owned) < 2:
        raise SplitError(
            f"Only one class with samples: {[dataset.classes[c] for c in owned]}. "
            "Add a data set that has the other, or ask for other classes=."
        )
    rarest, few = min(owned.items(), key=operator.itemgetter(1))
    if few < sides:
        raise SplitError(
            f"Class {dataset.classes[rarest]} has {few} patient(s), too few for {sides} sides "
            "without a patient on two of them. Add data or use fewer sides."
        )


def _strata(
    dataset: ChestXrayDataset, indices: Sequence[int], groups: NDArray[np.int64], folds: int
) -> list[str]:
    """Return label and source of each sample; sources too small for it join the label's largest."""
    names = [(dataset.samples[i].label, dataset.samples[i].source) for i in indices]
    # A dict, not a set, whose order changes from run to run.
    pairs = dict.fromkeys((n, int(groups[i])) for n, i in zip(names, indices, strict=True))
    owned = Counter(name for name, _ in pairs)
    largest = {label: source for (label, source), _ in reversed(owned.most_common())}
    return [
        "\0".join((label, source if owned[label, source] >= folds else largest[label]))
        for label, source in names
    ]


def divide(
    dataset: ChestXrayDataset,
    indices: NDArray[np.int64],
    groups: NDArray[np.int64],
    fraction: float,
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return positions divided in two, the second holding about ``fraction``, no group on both.

    Args:
        dataset: What they are positions of.
        indices: ``(N,)`` positions to divide.
        groups: Group of every sample of the data set.
        fraction: In [0, 1); above 0.5, the first side is the one that is held out.
        seed: Seed of the assignment.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if fraction == 0:
        return indices, indices[:0]
    if fraction > 0.5:
        return divide(dataset, indices, groups, 1 - fraction, seed)[::-1]
    folds, own = max(2, round(1 / fraction)), groups[indices]
    held, left = _divide_rare(dataset, indices, own, fraction, folds, seed)
    if left.any():
        strata = _strata(dataset, indices[left].tolist(), groups, folds)
        folds = min(folds, len(np.unique(own[left])))  # the patients of rare classes are gone
        if folds > 1 and len(indices) > _MANY:
            held[left] = _every_so_many(strata, own[left], fraction, seed)
        elif folds > 1:
            splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
            _, chosen = next(splitter.split(strata, strata, own[left]))
            held[np.flatnonzero(left)[chosen]] = True
    return indices[~held], indices[held]


def _every_so_many(
    strata: Sequence[str], groups: NDArray[np.int64], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Return which positions are held out: every so-manieth group of those that hold alike.

    Groups are ordered by how many samples they have of each stratum, those with equal numbers at
    random, and one is taken each time that another ``1 / fraction`` of them have passed.
    """
    _, kinds = np.unique(np.asarray(strata), return_inverse=True)
    _, numbers = np.unique(groups, return_inverse=True)
    counts = np.zeros((numbers.max() + 1, kinds.max() + 1), np.int32)
    np.add.at(counts, (numbers, kinds), 1)
    rng = np.random.default_rng(seed)
    order = np.lexsort([rng.random(len(counts)), *counts.T])
    passed = np.floor(rng.random() + fraction * np.arange(len(order) + 1))
    taken = np.zeros(len(order), bool)
    taken[order] = np.diff(passed) > 0
    return np.asarray(taken[numbers])


def _divide_rare(
    dataset: ChestXrayDataset,
    indices: NDArray[np.int64],
    own: NDArray[np.int64],
    fraction: float,
    folds: int,
    seed: int,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Deal out classes with fewer groups than folds, each by itself, and what they leave of others.

    Returns:
        Which positions are held out, and which belong to no such class, both ``(N,)`` bool.
    """
    rng = np.random.default_rng(seed)
    targets = np.array(dataset.targets)[indices]
    held, left = np.zeros(len(own), bool), np.ones(len(own), bool)
    rare = [t for t in np.unique(targets) if len(np.unique(own[targets == t])) < folds]
    for n, target in enumerate(rare):
        mine = np.unique(own[(targets == target) & left])
        least = not held[targets == target].any()
        count = min(max(least, round(fraction * len(mine))), len(mine))
        held |= np.isin(own, rng.permutation(mine)[:count])
        left &= ~np.isin(own, mine)
        if n + 1 == len(rare):  # too few samples left of a class would lower the folds of all
            counts = np.bincount(targets[left])
            rare += np.flatnonzero((counts > 0) & (counts < folds)).tolist()
    return held, left
