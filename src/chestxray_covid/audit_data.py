"""What an audit looks at: a question, its samples, their pixels and lungs, decoded once."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from chestxray_covid.classifier import Classifier
from chestxray_covid.datasets.base import ChestXrayDataset, Sample
from chestxray_covid.datasets.duplicates import FILE_HASH, patient_groups
from chestxray_covid.datasets.loading import decoder, in_batches, map_ahead
from chestxray_covid.delong import auroc_by_group
from chestxray_covid.errors import check_classes, check_positive
from chestxray_covid.hiding import Region, lung_region
from chestxray_covid.image import Preprocess
from chestxray_covid.intervals import Estimate, bootstrap_by_group
from chestxray_covid.judged_images import default_positive
from chestxray_covid.lungs import lung_mask, segment
from chestxray_covid.progress import Bar

#: Everything but the positive class, whatever the classifier knows.
REST = "rest"
#: Returns the lungs of a sample, or ``None`` where they are not known.
MaskFunction = Callable[[Sample], NDArray[np.bool_] | None]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Which class is told from what.

    Attributes:
        classes: Labels of the classifier, in the order of its probabilities.
        positive: The class in question.
        negative: What it is told from: a class, or ``"rest"``, which is every other label, also
            one that the classifier does not know.
    """

    classes: tuple[str, ...]
    positive: str
    negative: str

    @classmethod
    def of(
        cls,
        classes: Sequence[str],
        dataset: ChestXrayDataset,
        positive: str | None = None,
        negative: str | None = None,
    ) -> Question:
        """Return the question, by default COVID-19 (or the last class) against normal, if it can.

        Raises:
            TypeError: If the classes have no order.
            ValueError: If a class is unknown, or the data set lacks one of the two sides.
        """
        names = check_classes(classes)
        chosen = positive or default_positive(names)
        held = {sample.label for sample in dataset.samples}
        normal = "normal" in names and "normal" in held and chosen != "normal"
        against = negative or ("normal" if normal else REST)
        if chosen not in names or against not in (*names, REST) or chosen == against:
            raise ValueError(
                f"positive must be one of {list(names)} and negative another of them or {REST!r}, "
                f"got {chosen!r} and {against!r}"
            )
        question = cls(classes=names, positive=chosen, negative=against)
        left = {s.label for s in question.asked(dataset).samples}
        if len(left) < 2 or chosen not in left:
            raise ValueError(
                f"An audit of {chosen!r} against {against!r} needs images of both, got the labels "
                f"{sorted(held)} for a classifier of {list(names)}"
            )
        return question

    def asked(self, dataset: ChestXrayDataset) -> ChestXrayDataset:
        """Return the samples that the question is about."""
        if self.negative == REST:
            return dataset
        wanted = {self.positive, self.negative}
        return dataset.filter(lambda sample: sample.label in wanted)

    def score(self, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return ``(N,)`` p(positive), among the two where it is against one class.

        Args:
            probabilities: ``(N, K)`` in the order of ``classes``.
        """
        p = probabilities[:, self.classes.index(self.positive)]
        if self.negative == REST:
            return p
        total = p + probabilities[:, self.classes.index(self.negative)]
        # Where both are 0 the model has no opinion between the two.
        return np.where(total > 0, p / np.where(total > 0, total, 1), 0.5)


def stratified_sample(dataset: ChestXrayDataset, limit: int, *, seed: int = 0) -> ChestXrayDataset:
    """Return about ``limit`` random samples, of each source and label its share, at least one.

    Raises:
        TypeError, ValueError: If ``limit`` is no positive whole number.
    """
    check_positive("limit", limit)
    if len(dataset) <= limit:
        return dataset
    cells: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i in np.random.default_rng(seed).permutation(len(dataset)).tolist():
        cells[dataset.samples[i].source, dataset.samples[i].label].append(i)
    shares = {cell: max(1, round(limit * len(own) / len(dataset))) for cell, own in cells.items()}
    return dataset.subset(sorted(i for cell, own in cells.items() for i in own[: shares[cell]]))


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditData:
    """The samples of a question, decoded once at the model's size.

    Attributes:
        dataset: The samples, in order.
        question: What is asked of them.
        truth: ``(N,)`` bool, whether a sample is of the positive class.
        groups: ``(N,)`` patient of each sample, numbered from 0; one that is known in two
            collections is one, and so are those of equal pixels.
        pixels: ``(N, 1, S, S)`` uint8.
        how: ``n_resamples``, ``seed`` and ``confidence`` of the intervals.
    """

    dataset: ChestXrayDataset
    question: Question
    truth: NDArray[np.bool_]
    groups: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    how: dict[str, Any]

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The samples, in order."""
        return self.dataset.samples

    @property
    def size_px(self) -> int:
        """Side of the pixels."""
        return int(self.pixels.shape[-1])

    @cached_property
    def sources(self) -> NDArray[np.str_]:
        """``(N,)`` sources."""
        return np.array([sample.source for sample in self.samples])

    def estimate(self, statistic: Any, *arrays: Any, among: Any = slice(None)) -> Estimate:
        """Return a statistic of ``(N,)`` arrays with its interval by patient.

        Args:
            statistic: As :func:`intervals.bootstrap_by_group` takes it.
            arrays: What it takes.
            among: Which samples, an index of ``(N,)`` arrays; all by default.
        """
        chosen = [np.asarray(array)[among] for array in arrays]
        return bootstrap_by_group(statistic, self.groups[among].tolist(), *chosen, **self.how)

    def auroc(self, scores: ArrayLike, *, among: Any = slice(None)) -> Estimate:
        """Return the AUROC of ``(N,)`` scores with its interval by patient."""
        truth, own = self.truth[among].astype(int), self.groups[among].tolist()
        confidence = self.how["confidence"]
        return auroc_by_group(truth, np.asarray(scores)[among], own, confidence=confidence)

    def as_dataset(self, preprocess: Preprocess) -> ChestXrayDataset:
        """Return the samples with the decoded pixels for their images, so that none is read again.

        Args:
            preprocess: The model's own, of the same size.
        """
        if preprocess.size_px != self.size_px:
            raise ValueError(f"the pixels are of {self.size_px} px, not {preprocess.size_px}")
        samples = [
            replace(s, read=partial(_image_of, pixels))
            for s, pixels in zip(self.samples, self.pixels, strict=True)
        ]
        whole = ChestXrayDataset(samples, classes=self.dataset.classes)
        return _known_by_pixels(whole, self.pixels)


def read_data(
    dataset: ChestXrayDataset,
    question: Question,
    preprocess: Preprocess,
    *,
    how: dict[str, Any],
    workers: int,
    progress: bool,
) -> AuditData:
    """Return the samples that a question is about, decoded.

    Raises:
        ImageError: If a file cannot be decoded.
    """
    asked = question.asked(dataset)
    loaded = map_ahead(decoder(asked, preprocess), range(len(asked)), workers=workers)
    pixels = np.stack(list(Bar(loaded, "decode", len(asked), unit="img", disable=not progress)))
    return AuditData(
        dataset=asked,
        question=question,
        truth=np.array([sample.label == question.positive for sample in asked.samples]),
        groups=np.array(patient_groups(_known_by_pixels(asked, pixels), find_copies=False)),
        pixels=pixels,
        how=how,
    )


def _known_by_pixels(dataset: ChestXrayDataset, pixels: NDArray[np.uint8]) -> ChestXrayDataset:
    """Return the samples with a hash of their pixels, by which copies are known of each other.

    A linear model would learn one by heart and judge the other. Blank images are no copies.
    """
    digests = [hashlib.sha256(p).hexdigest() if np.ptp(p) else "" for p in pixels]
    samples = [
        replace(sample, metadata={**sample.metadata, FILE_HASH: digest})
        for sample, digest in zip(dataset.samples, digests, strict=True)
    ]
    return ChestXrayDataset(samples, classes=dataset.classes)


def find_lungs(
    data: AuditData, masks: MaskFunction | None, *, batch_size: int, progress: bool
) -> list[Region | None]:
    """Return the region of the lungs of each sample, ``None`` where no lung was found.

    Args:
        data: The samples.
        masks: Returns the lungs of a sample; by default the annotated ones. Where they are not
            known, the bundled network draws them.
        batch_size: Images computed at once.
        progress: Show a progress bar.

    Raises:
        ValueError: If a mask is not ``(H, W)`` bool.
    """
    known = masks or (lung_mask if data.dataset.transform is None else lambda _: None)
    found: list[Region | None] = []
    with Bar(desc="lungs", total=len(data.samples), unit="img", disable=not progress) as bar:
        for batch in in_batches(range(len(data.samples)), batch_size):
            drawn = {}
            for i in batch:
                if (mask := known(data.samples[i])) is None:
                    continue
                mask = np.asarray(mask)  # a picture or lists, too
                if mask.ndim != 2 or mask.dtype != np.bool_:
                    raise ValueError(
                        f"masks must return (H, W) bool or None, got {mask.shape} {mask.dtype} for "
                        f"{data.samples[i].path}"
                    )
                drawn[i] = mask
            unknown = [i for i in batch if i not in drawn]
            images = [Image.fromarray(data.pixels[i, 0]) for i in unknown]
            drawn.update(zip(unknown, segment(images, batch_size=batch_size), strict=True))
            found += [lung_region(drawn[i], data.size_px) for i in batch]
            bar.update(len(batch))
    return found


def as_nameless(pixels: NDArray[np.uint8], classes: Sequence[str]) -> ChestXrayDataset:
    """Return ``(N, 1, S, S)`` pixels as a data set of which only the images say anything.

    Names, labels and patients are made up: no model can know by them what it is shown. With
    something hidden an image has another name, for a model that keeps what it said of a name.
    """
    samples = [
        Sample(
            path=Path(f"audited-{i}-{hashlib.sha256(one).hexdigest()[:16]}"),
            label=classes[0],
            finding="",
            patient_id=str(i),
            source="audit",
            read=partial(_image_of, one),
        )
        for i, one in enumerate(pixels)
    ]
    return ChestXrayDataset(samples, classes=classes)


def _image_of(pixels: NDArray[np.uint8], *_: object) -> Image.Image:
    """Return ``(1, S, S)`` pixels, for the ``read`` of a sample that may go to other processes."""
    return Image.fromarray(pixels[0])


def run_classifier(
    classifier: Classifier,
    pixels: NDArray[np.uint8],
    *,
    name: str,
    batch_size: int,
    progress: bool,
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Return ``(N, K)`` probabilities and ``(N, D)`` features of ``(N, 1, S, S)`` pixels."""
    rows = []
    with Bar(desc=name, total=len(pixels), unit="img", disable=not progress) as bar:
        for start in range(0, len(pixels), batch_size):
            batch = pixels[start : start + batch_size]
            rows.append(classifier._compute(batch))
            bar.update(len(batch))
    return np.concatenate([p for p, _ in rows]), np.concatenate([f for _, f in rows])
