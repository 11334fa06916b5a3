"""What a data set found, kept and dropped, and why."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from chestxray_covid.notebook import ShownAsText

if TYPE_CHECKING:
    from chestxray_covid.datasets.base import Sample

#: Why what a data set kept is not in a part of it.
LEFT_OUT = "not in this part (subset, filter, limit or split)"
#: All reasons beyond the most frequent: labels can be as many as patients.
_OTHER = "other reasons"
_MOST_REASONS = 30


@dataclass(frozen=True, kw_only=True)
class DatasetReport(ShownAsText):
    """What a data set found, kept and dropped, and why.

    Attributes:
        source: Name of the data set.
        root: Where it was read from; empty for phantoms, samples from elsewhere, and a part.
        found: Entries considered (metadata rows, or image files), those of a part's whole too.
        kept: Samples in the data set.
        dropped: Reason → number of entries; ``found == kept + sum(dropped.values())``. Beyond the
            30 most frequent, reasons are counted together.
        images: Class → number of images.
        patients: Class → number of patients, as each collection numbers them: whom two know under
            numbers of their own counts twice, until ``patient_groups`` has joined the two.
        notes: Facts about what was found that are not drops, for example files without a
            metadata row.
    """

    source: str
    root: str
    found: int
    kept: int
    dropped: Mapping[str, int]
    images: Mapping[str, int]
    patients: Mapping[str, int]
    notes: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able data."""
        return asdict(self)

    def __str__(self) -> str:
        """Return lines of text; what cannot be printed, as of a strange file name, is escaped."""
        where = self.root or ("a part" if LEFT_OUT in self.dropped else "no folder")
        lines = [f"{self.source}: {self.kept} of {self.found} kept ({where})"]
        lines += [
            f"  class    {name:<12} {count:>6} images, {self.patients[name]} patients"
            for name, count in self.images.items()
        ]
        lines += [f"  dropped  {count:>6}  {reason}" for reason, count in self.dropped.items()]
        lines += [f"  note     {count:>6}  {note}" for note, count in self.notes.items()]
        return "\n".join(map(printable, lines))


def printable(text: str) -> str:
    r"""Return text in which what no terminal prints is escaped.

    >>> printable("naïve\udce8 \x1b")
    'naïve\\udce8 \\x1b'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def brief(text: str, most: int = 500) -> str:
    r"""Return the beginning of a text that a file holds, for a message, :func:`printable`.

    >>> brief("\x1b[31mred"), brief("abc", 2)
    ('\\x1b[31mred', 'ab…')
    """
    return printable(text[:most]) + "…" * (len(text) > most)


def printable_lines(text: str) -> str:
    """Return text of several lines, each :func:`printable`: no name in it steers a terminal."""
    return "\n".join(map(printable, text.split("\n")))


def identity(text: str) -> str:
    """Return the one spelling of who or what is meant, however a table or a system writes it.

    A column of whole numbers with a gap is one of floats for pandas, macOS decomposes accents, and
    sheets are full of blanks that nobody sees.

    >>> identity("12.0"), identity("12.5"), identity("012"), identity("Zoe\u0308 ")
    ('12', '12.5', '012', 'Zoë')
    """
    text = text.strip()
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return text[:-2] if text.endswith(".0") and text[:-2].isdecimal() else text


def patient_key(sample: Sample) -> tuple[str, str]:
    """Return what identifies a sample's patient among all data sets.

    A row that Cohen took over keeps Cohen's patient number, also when counted to its origin.
    """
    collection = sample.metadata.get("numbered_by") or sample.source
    return identity(collection), identity(sample.patient_id)


def summarise(
    samples: Sequence[Sample],
    classes: Sequence[str],
    *,
    source: str,
    root: str | os.PathLike[str],
    dropped: Mapping[str, int] | None = None,
    notes: Mapping[str, int] | None = None,
) -> DatasetReport:
    """Return the report of a data set that kept ``samples`` and dropped what ``dropped`` counts."""
    images = Counter(s.label for s in samples)
    # Label → collection → its patients' numbers.
    patients = {label: defaultdict[str, set[str]](set) for label in (*images, *classes)}
    for s in samples:
        collection, number = patient_key(s)
        patients[s.label][collection].add(number)
    gone = dict(sorted((dropped or {}).items(), key=lambda item: (item[0] != LEFT_OUT, -item[1])))
    for reason in list(gone)[_MOST_REASONS:]:
        gone[_OTHER] = gone.pop(reason) + gone.get(_OTHER, 0)
    return DatasetReport(
        source=source,
        root=os.fspath(root),
        found=len(samples) + sum(gone.values()),
        kept=len(samples),
        dropped=gone,
        images={c: images[c] for c in classes},
        patients={c: sum(map(len, patients[c].values())) for c in classes},
        notes=dict(notes or {}),
    )


def summarise_taken(
    samples: Sequence[Sample], classes: Sequence[str], reports: Sequence[DatasetReport]
) -> DatasetReport:
    """Return the report of samples that were taken from the data sets with these reports, if any.

    A part has no root: it is not what lies there.
    """
    distinct = len({id(s) for s in samples})
    left_out = max(0, sum(r.kept for r in reports) - distinct)
    dropped = sum((Counter(r.dropped) for r in reports), Counter[str]())
    notes = sum((Counter(r.notes) for r in reports), Counter[str]())
    sources: Iterable[str] = (r.source for r in reports)
    roots = [r.root for r in reports if r.root]
    if left_out or not reports:
        sources, roots = sorted({s.source for s in samples}), []
        dropped[LEFT_OUT] += left_out
    if len(samples) > distinct:
        notes["samples that occur again"] += len(samples) - distinct
    return summarise(
        samples,
        classes,
        source="+".join(dict.fromkeys(sources)),
        root=", ".join(roots),
        dropped=+dropped,  # without what is 0
        notes=notes,
    )
