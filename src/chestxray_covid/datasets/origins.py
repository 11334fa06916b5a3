"""Rows that one collection took over from another: counted to that one, if it says the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from chestxray_covid.datasets.report import identity, patient_key

if TYPE_CHECKING:
    from chestxray_covid.datasets.base import Sample

#: Why a row that was taken over is dropped.
CONTRADICTS = "contradicts its origin"


def counted_to_origins(samples: Iterable[Sample]) -> list[Sample]:
    """Return the samples in order, what was taken over counted to its origin if that is there.

    Left out is what the origin contradicts: its own row of that image has another label; or it has
    none of that image, and its own rows of the patient, who is known by another image that was
    taken over, all have other labels.
    """
    samples = tuple(samples)
    present = {s.source for s in samples}
    counted = [_counted_to_origin(s, present) for s in samples]
    taken = [s for s in counted if _is_taken_over(s)]
    origins = {s.source for s in taken}
    of_image, of_patient, of_taken = (defaultdict[object, set[str]](set) for _ in range(3))
    patient_of: dict[object, object] = {}
    for s in counted:
        if s.source in origins and not _is_taken_over(s):
            of_patient[patient_key(s)].add(s.label)
            if s.metadata.get("image_id"):
                of_image[_image(s)].add(s.label)
                patient_of[_image(s)] = patient_key(s)
    for s in taken:
        of_taken[s.source, patient_key(s)] |= of_patient[patient_of.get(_image(s))]

    def is_contradicted(s: Sample) -> bool:
        said = of_image[_image(s)] or of_taken[s.source, patient_key(s)]
        return bool(said) and s.label not in said

    contradicted = {id(s) for s in taken if is_contradicted(s)}
    return [s for s in counted if id(s) not in contradicted]


def collections_of(samples: Iterable[Sample]) -> set[str]:
    """Return the sources of samples, and the origins of those that were taken over."""
    return {name for s in samples for name in (s.source, s.metadata.get("origin")) if name}


def origins_of(samples: Iterable[Sample]) -> dict[str, list[str]]:
    """Return source → other collections that samples of it were taken over from, if from any."""
    found = defaultdict[str, set[str]](set)
    for s in samples:
        if others := collections_of([s]) - {s.source}:
            found[s.source] |= others
    return {source: sorted(found[source]) for source in sorted(found)}


def _counted_to_origin(sample: Sample, present: set[str]) -> Sample:
    origin = sample.metadata.get("origin")
    if not origin or origin not in present or origin == sample.source:
        return sample
    numbered_by = sample.metadata.get("numbered_by") or sample.source
    return replace(sample, source=origin, metadata={**sample.metadata, "numbered_by": numbered_by})


def _is_taken_over(sample: Sample) -> bool:
    origin = sample.metadata.get("origin")
    return bool(origin) and sample.source == origin and patient_key(sample)[0] != identity(origin)


def _image(sample: Sample) -> tuple[str, str]:
    return sample.source, identity(sample.metadata.get("image_id", ""))
