"""The examples that a gate is fitted on and measured with: radiographs, and what is none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from collection import forbids_derivatives
from counter_examples import DRAWN, PHOTOGRAPHS, UNSEEN, crops, find, waves
from numpy.typing import NDArray
from PIL import Image

from chestxray_covid import (
    CohenCovidDataset,
    Preprocess,
    Split,
    SyntheticChestXray,
)
from chestxray_covid.datasets.base import LABELS
from chestxray_covid.datasets.cohen import read_metadata
from chestxray_covid.datasets.duplicates import patient_key
from chestxray_covid.image import read_image
from chestxray_covid.pixels import ImageFacts

#: What → options of the phantoms of that kind.
PHANTOMS: dict[str, dict[str, Any]] = {
    "phantom": {},
    "phantom with a site effect": {"sources": ("a", "b"), "site_effect": True},
}
#: What is drawn is at least as large as radiographs are.
DRAWN_PX = 320


@dataclass(frozen=True, kw_only=True)
class Example:
    """One picture.

    Attributes:
        pixels: ``(1, S, S)`` uint8, as the model gets them.
        facts: Of the picture before.
        kind: One of the gate's kinds; empty if it is only measured.
        what: What it is, in the words of the results.
        group: Pictures of one group are never on both sides.
        source: Collection that it comes from.
        held_out: Whether it is measured with; fitted on otherwise.
    """

    pixels: NDArray[np.uint8]
    facts: ImageFacts
    kind: str
    what: str
    group: str
    source: str
    held_out: bool


def frontals(
    split: Split, preprocess: Preprocess, *, limit: int | None, seed: int = 0
) -> Iterator[Example]:
    """Yield frontal radiographs of the training side and, held out, of the others.

    Args:
        split: Of all sources.
        preprocess: Of the checkpoint.
        limit: Most radiographs of each source and side; ``None`` takes all.
        seed: Of the choice.
    """
    rng = np.random.default_rng(seed)
    sides = {"train": split.indices["train"], "held": split.indices["val"] + split.indices["test"]}
    for side, indices in sides.items():
        taken: dict[str, int] = {}
        for index in rng.permutation(indices):
            sample = split.dataset.samples[index]
            taken[sample.source] = taken.get(sample.source, 0) + 1
            if limit is None or taken[sample.source] <= limit:
                pixels, facts = preprocess.read(sample.path)
                yield Example(
                    pixels=pixels,
                    facts=facts,
                    kind="frontal",
                    what="frontal",
                    group=f"group {split.groups[index]}",
                    source=sample.source,
                    held_out=side == "held",
                )


def cohen_others(data: Path, split: Split, preprocess: Preprocess) -> Iterator[Example]:
    """Yield Cohen's lateral radiographs and CT slices, mirrored ones too where they are fitted on.

    Patients who have frontal radiographs as well stay on the side of those, the others are dealt
    by turns. An image whose licence forbids derivatives is measured with only.
    """
    folder = data / "covid-chestxray-dataset"
    side_of = _sides(split)
    # Whatever the finding: to a gate it is all the same.
    findings = {row["finding"].strip(): "covid19" for row in read_metadata(folder / "metadata.csv")}
    choices: dict[str, dict[str, Any]] = {
        "lateral": {"views": ("L",)},
        "ct": {"views": None, "modalities": ("CT",)},
    }
    for kind, choice in choices.items():
        dataset = CohenCovidDataset(folder, classes=("covid19",), findings=findings, **choice)
        dealt: dict[tuple[str, str], bool] = {}
        for sample in dataset.samples:
            patient = patient_key(sample)
            turn = dealt.setdefault(patient, len(dealt) % 2 == 1)
            held_out = side_of.get(patient, turn) or forbids_derivatives(sample)
            pixels, facts = preprocess.read(sample.path)
            example = Example(
                pixels=pixels,
                facts=facts,
                kind=kind,
                what=kind,
                group=f"cohen {patient[1]}",
                source="cohen",
                held_out=held_out,
            )
            yield example
            if not held_out:
                yield replace(example, pixels=pixels[:, :, ::-1].copy())


def _sides(split: Split) -> dict[tuple[str, str], bool]:
    held = {*split.indices["val"], *split.indices["test"]}
    return {patient_key(s): i in held for i, s in enumerate(split.dataset.samples)}


def spoilt(examples: Iterable[Example], *, every: int = 2) -> Iterator[Example]:
    """Yield frontal radiographs inverted, turned and upside down, of every so many'th one.

    Held out there is, besides, what no gate is fitted on: turned and inverted at once.
    """
    for example in list(examples)[::every]:
        pixels = example.pixels
        ways = {
            "inverted": ("inverted", 255 - pixels),
            "turned by 90°": ("turned", np.rot90(pixels, 1, (1, 2))),
            "turned by 180°": ("turned", np.rot90(pixels, 2, (1, 2))),
            "turned by 270°": ("turned", np.rot90(pixels, 3, (1, 2))),
            "upside down": ("turned", pixels[:, ::-1]),
        }
        if example.held_out:
            ways["inverted and turned"] = ("", 255 - np.rot90(pixels, 1, (1, 2)))
        for what, (kind, changed) in ways.items():
            yield replace(example, pixels=changed.copy(), kind=kind, what=what)


def pieced(
    examples: Sequence[Example], preprocess: Preprocess, *, every: int = 4, seed: int = 0
) -> Iterator[Example]:
    """Yield parts of frontal radiographs, and several in one picture, of every so many'th one.

    What joins another radiograph is of the same source and side. Held out there is, besides, what
    no gate is fitted on: four in one.

    Args:
        examples: Frontal ones.
        preprocess: Of the checkpoint.
        every: Step through those of a source and side.
        seed: Of the places of quarters.
    """
    rng = np.random.default_rng(seed)
    alike: dict[tuple[str, bool], list[Example]] = {}
    for example in examples:
        alike.setdefault((example.source, example.held_out), []).append(example)
    for several in alike.values():
        for place in range(0, len(several), every):
            example = several[place]
            near = [several[(place + k) % len(several)].pixels[0] for k in range(4)]
            for what, pixels in _pieces(near, rng).items():
                kind = "" if what == "four in one" else "part"
                if kind or example.held_out:
                    yield replace(example, pixels=preprocess(pixels), kind=kind, what=what)


def _pieces(
    radiographs: Sequence[NDArray[np.uint8]], rng: np.random.Generator
) -> dict[str, NDArray[np.uint8]]:
    """Return what → ``(H, W)``, parts of the first and that together with the others."""
    one, other, *_ = radiographs
    half = len(one) // 2
    top, left = rng.integers(0, half, 2)
    return {
        "left half": one[:, :half],
        "right half": one[:, half:],
        "upper half": one[:half],
        "lower half": one[half:],
        "quarter": one[top : top + half, left : left + half],
        "side by side": np.hstack([one, other]),
        "one above the other": np.vstack([one, other]),
        "four in one": np.block([list(radiographs[:2]), list(radiographs[2:])]),
    }


def foreign(preprocess: Preprocess, *, count: int, seed: int = 0) -> Iterator[Example]:
    """Yield photographs and drawn pictures, and held out also kinds that no gate is fitted on.

    Args:
        preprocess: Of the checkpoint.
        count: Pictures of each drawn kind and side, and crops of each photograph.
        seed: Of all that is drawn and cropped.
    """
    rng = np.random.default_rng(seed)
    for number, (name, path) in enumerate(find(PHOTOGRAPHS).items()):
        image = Image.open(path).convert("RGB")
        for part in crops(image, count // 4, rng):
            yield _foreign(preprocess, part, "photograph", name, held_out=number % 3 == 2)
    for held_out in (False, True):
        for what, draw in DRAWN.items():
            for number in range(count):
                picture = draw(rng, DRAWN_PX)
                group = f"{what} {held_out} {number}"
                yield _foreign(preprocess, picture, what, group, held_out=held_out)
    for name, path in find(UNSEEN).items():
        for part in crops(Image.open(path).convert("RGB"), count // 10, rng):
            yield _unseen(preprocess, part, "picture of another kind", name)
    for number in range(count):
        yield _unseen(preprocess, waves(rng, DRAWN_PX), "waves", f"waves {number}")
    for what, looks in PHANTOMS.items():
        for held_out in (False, True):
            phantoms = SyntheticChestXray(count, classes=LABELS, seed=seed + held_out, **looks)
            for number, (phantom, _) in enumerate(phantoms):
                group = f"{what} {held_out} {number}"
                yield _foreign(preprocess, phantom, what, group, held_out=held_out)


def _foreign(
    preprocess: Preprocess, image: Image.Image, what: str, group: str, *, held_out: bool
) -> Example:
    size = preprocess.decode_size()
    facts = read_image(image)[1]
    pixels = preprocess(image.resize(size) if min(image.size) > 2 * max(size) else image)
    return Example(
        pixels=pixels,
        facts=facts,
        kind="foreign",
        what=what,
        group=group,
        source="foreign",
        held_out=held_out,
    )


def _unseen(preprocess: Preprocess, image: Image.Image, what: str, group: str) -> Example:
    return replace(_foreign(preprocess, image, what, group, held_out=True), kind="")
