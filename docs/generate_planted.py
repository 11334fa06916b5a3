"""Write what the audit says of planted shortcuts.

Called by ``generate.py``; reads what ``benchmarks/planted_shortcuts.py`` leaves.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from generate import DOCS, fill, table, wrapped

RESULT = DOCS.parent / "benchmarks" / "results" / "planted_shortcuts.json"
KINDS = {
    "outside": "Outside the lungs, or all over the image",
    "weak": "The same, but it goes with the label in so many images only",
    "inside": "Inside the lungs' region",
    "lungs": "No shortcut: the only signal is in the lungs",
}
ENDS = {
    "fail": "failed",
    "warn": "warned",
    "not_assessable": "could not tell",
    "pass": "passed",
}


def write_page() -> None:
    """Write the block of ``docs/audit.md``."""
    fill(DOCS / "audit.md", {"planted": planted_block(json.loads(RESULT.read_text("utf-8")))})


def planted_block(found: Mapping[str, Any]) -> str:
    """Return what was planted and what the audit said of it, as text and table."""
    rows, sets = found["rows"], len(found["rows"][0]["sets"])
    tested = [str(n) for n in sorted({row["n"] for row in rows})]
    said = f"""
        `python benchmarks/planted_shortcuts.py` plants one cue at a time in {sets} sets of phantoms
        of {found["size_px"]} pixels whose label says nothing else, trains a linear model that sees
        that cue alone on {found["train"]} of them, and audits it on {", ".join(tested[:-1])} or
        {tested[-1]} others, without the heat; as controls, opacities in the lungs are the only
        signal. {counted(rows)} Numbers in the table are the lowest
        and the highest of the {sets} sets; a verdict without a count is that of all {sets}; an item
        speaks where it warns or fails."""
    head = ("Planted", "AUROC", "Lungs hidden", "`occlusion`", "Other items that spoke", "Overall")
    body: list[Sequence[str]] = []
    for kind, title in KINDS.items():
        body.append((f"**{title}**", *[""] * (len(head) - 1)))
        body += [cells(row) for row in rows if row["kind"] == kind]
    return f"{wrapped(said)}\n\n{table(head, body)}\n\n{wrapped(chance_text(found))}"


def overall(rows: Iterable[Mapping[str, Any]], kind: str) -> Counter[str]:
    """Return how often each verdict was that of a whole audit of a kind."""
    return Counter(one["overall"] for row in rows if row["kind"] == kind for one in row["sets"])


def counted(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return in words how many audits of each kind ended how."""
    outside, weak, inside, lungs = (ends(overall(rows, kind)) for kind in KINDS)
    return f"""
        With a shortcut outside the lungs or all over the image, {outside}; with one of these that
        was weak, {weak}; with one inside the lungs' region, {inside}; without a shortcut,
        {lungs}."""


def ends(counts: Counter[str]) -> str:
    """Return how many of some audits ended how, the worst first."""
    said = [f"{counts[verdict]} {word}" for verdict, word in ENDS.items() if counts[verdict]]
    if len(said) == 1:
        return f"all {counts.total()} audits {said[0].split(maxsplit=1)[1]}"
    return f"of {counts.total()} audits {', '.join(said[:-1])} and {said[-1]}"


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a row of the table."""
    sets = row["sets"]
    others = [name for name in sets[0]["items"] if name != "occlusion"]
    spoke = [
        f"`{name}` {verdicts}"
        for name in others
        if (verdicts := agreed([one["items"][name] for one in sets], only=("fail", "warn")))
    ]
    return (
        row["planted"],
        spread(one["auroc"]["value"] for one in sets),
        spread(one["lungs_hidden"]["value"] for one in sets),
        agreed([one["items"]["occlusion"] for one in sets]),
        ", ".join(spoke) or "–",
        agreed([one["overall"] for one in sets]),
    )


def agreed(
    verdicts: Sequence[str], only: Sequence[str] = ("fail", "warn", "not_assessable", "pass")
) -> str:
    """Return a verdict, or how often there was each, of those that count."""
    counts = Counter(verdicts)
    said = {v.replace("_", " "): counts[v] for v in only if counts[v]}
    if len(counts) == 1:
        return next(iter(said), "")
    return ", ".join(f"{verdict} ({count})" for verdict, count in said.items())


def spread(values: Iterable[float]) -> str:
    shown = sorted(f"{value:.2f}" for value in values)
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]}–{shown[-1]}"


def chance_text(found: Mapping[str, Any]) -> str:
    """Return in words how often the linear models of the data items are warned of for nothing."""
    few, many = (
        [row for row in found["chance"] if row["images"] == images]
        for images in sorted({row["images"] for row in found["chance"]})
    )
    total = found["data_sets"] * len(few)
    spoke = [sum(row["warn"] + row["fail"] for row in rows) for rows in (few, many)]
    below = max(row["interval_below_half"] for row in found["chance"]) / found["data_sets"]
    numbers = " or ".join(str(row["numbers"]) for row in few)
    return f"""
        Of {total} data sets of {few[0]["images"]} images with {numbers} random numbers each, a
        linear model on held-out patients, as `without_lungs` asks it, warned or failed in
        {spoke[0]}; of as many of {many[0]["images"]} images, in {spoke[1]}. Up to {below:.0%} of
        the intervals lay below 0.5 altogether."""
