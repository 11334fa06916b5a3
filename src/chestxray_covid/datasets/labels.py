"""What the name of a folder, or a cell of a table, means as a label."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from chestxray_covid.datasets.base import LABELS

#: Names in public collections (lower case, letters and digits only) → canonical label.
_KNOWN_LABELS = {
    **dict.fromkeys(("normal", "nofinding", "nofindings", "healthy"), "normal"),
    **dict.fromkeys(("pneumonia", "viralpneumonia", "bacterialpneumonia"), "pneumonia"),
    **dict.fromkeys(("covid", "covid19"), "covid19"),
}
#: Words that turn a name into its opposite.
_NEGATIONS = frozenset({"no", "non", "not", "negative"})
#: Signs that doubt or deny the word they are at: ``COVID?``, ``COVID (-)``.
_DOUBTS = re.compile(r"[?!~¬]|[-−–—]\W*$")

#: Why images were left out, with their label: whatever a folder, or a cell of a table, calls them.
_OUTSIDE = re.compile(r"(\w+ outside the classes) \((.*)\)", re.DOTALL)


def label_of_name(name: str, labels: Mapping[str, str], classes: Sequence[str]) -> str:
    """Return the label that a folder or a CSV means by a name."""
    if name in labels or name in classes:
        return labels.get(name, name)
    plain = "" if _DOUBTS.search(name) else re.sub(r"[^a-z0-9]", "", name.lower())
    return _KNOWN_LABELS.get(plain, name)


def promised_classes(classes: Sequence[str], labels: Collection[str]) -> Sequence[str]:
    """Return the classes that labels name, or seem to (``Covid-positive``); all, if none does."""
    words = [set(re.findall("[a-z]+", name.lower())) for name in labels if name not in LABELS]
    likely = set[str]().union(*(w for w in words if w.isdisjoint(_NEGATIONS)))
    return [c for c in classes if c in labels or c.rstrip("0123456789") in likely] or classes


def nameless(reasons: Mapping[str, int]) -> dict[str, int]:
    """Return counts of why images were left out, without labels of other names than ours.

    Such a label may be a free text, or a patient's folder: none is told where a model travels.

    >>> nameless({"folder outside the classes (DOE_Jane)": 2, "no patient_id": 1})
    {'folder outside the classes': 2, 'no patient_id': 1}
    """
    counts = dict[str, int]()
    for reason, count in reasons.items():
        found = _OUTSIDE.fullmatch(reason)
        told = found[1] if found and found[2] not in (*LABELS, "empty") else reason
        counts[told] = counts.get(told, 0) + count
    return counts
