"""Write what the documentation says of the bundled gate. Used by ``generate_model.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from generate import SOURCE_KEY, digest, table, wrapped
from generate_relatives import RESULTS, estimate, pair, read

#: Of :func:`gate_rows`.
GATE_HEAD = ("N", "flagged", "refused", "refused without lungs", "looked at again")


def gate_rows() -> list[tuple[Any, ...]]:
    """Return how often the gate flags and refuses held-out images of each kind."""
    found = read("gate")
    rows, once = (
        part["held_out"]
        | {
            f"frontal, {source}, by a gate that never saw the source (the network did)": row
            for source, row in part["source_left_out"].items()
        }
        for part in (found, found["without_lungs"])
    )
    return [
        (
            what,
            part["images"],
            *map(rate, (part["flagged"], part["abstained"], once[what]["abstained"])),
            f"{part['looked_again']['rate']:.1%}",
        )
        for what, part in rows.items()
    ]


def reduction_block() -> str:
    """Return what the gate's page says of radiographs that were reduced first."""
    found = read("reduction")
    text = f"""
        {found["images"]} held-out radiographs of the bundled model, whose input has a side of
        {found["size_px"]} px; the AUROC is that of COVID-19 against normal
        ({pair(found["n"])})."""
    head = ("Shorter side", "Another label than whole", "Refused for something else", "AUROC")
    rows = [
        (
            f"{row['side_px']} px ({row['share']:g})" if row["share"] else "whole",
            f"{row['changed']:.0%}",
            f"{row['refused']:.0%}",
            estimate(row["auroc"]),
        )
        for row in found["rows"]
    ]
    return f"{wrapped(text)}\n\n{table(head, rows)}"


def rate(found: Mapping[str, Any]) -> str:
    return f"{found['rate']:.1%} ({found['low']:.1%}–{found['high']:.1%})"


def draw_gate() -> Path:
    """Draw the share of held-out images of each kind that the gate refuses, with intervals."""
    from matplotlib.figure import Figure

    groups = gate_groups(read("gate"))
    looking_once = gate_groups(read("gate")["without_lungs"])
    once = {what: row for _, part in looking_once for what, row in part.items()}
    heights = [len(part) for _, part in groups]
    panel = Figure(figsize=(7.5, 0.21 * sum(heights) + 1.6), layout="constrained")
    every = panel.subplots(len(groups), 1, sharex=True, height_ratios=[h + 1 for h in heights])
    for k, (axes, (title, part)) in enumerate(zip(every, groups, strict=True)):
        names = sorted(part, key=lambda what: (part[what]["rate"], what), reverse=k > 0)
        for y, what in enumerate(names):
            found = part[what]
            axes.plot([found["low"], found["high"]], [y, y], color=f"C{k}", linewidth=1.5)
            white = {"markerfacecolor": "white", "markersize": 4}
            axes.plot(once[what]["rate"], y, "o", color=f"C{k}", **white)
            axes.plot(found["rate"], y, "o", color=f"C{k}", markersize=4)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.4, -0.6))
        axes.set_title(title, loc="left", fontsize=9)
        axes.grid(axis="x", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    label = "share that is refused, with 95 % intervals (Wilson)\nwhite: by a gate without lungs"
    every[-1].set_xlabel(label)
    return save(panel, "gate", "gate")


def gate_groups(found: Mapping[str, Any]) -> list[tuple[str, dict[str, Mapping[str, Any]]]]:
    """Return title → what → share refused, of what must pass and of what must not."""
    held_out = {what: part["abstained"] for what, part in found["held_out"].items()}
    unseen = found["source_left_out"].items()
    passing = {what: held_out.pop(what) for what in list(held_out) if what.startswith("frontal, ")}
    passing |= {f"frontal, {s}, unknown to the gate": part["abstained"] for s, part in unseen}
    del held_out["frontal"]
    new = {what: held_out.pop(what) for what in read("gate")["never_fitted"]}
    return [
        ("Frontal radiographs, which are to pass", passing),
        ("To be refused: kinds that the gate was fitted on", held_out),
        ("To be refused: kinds that it never met", new),
    ]


def save(panel: Any, name: str, source: str) -> Path:
    """Write a figure, which names the results that it was drawn from."""
    target = RESULTS / f"{name}.png"
    panel.savefig(target, dpi=120, metadata={SOURCE_KEY: digest(RESULTS / f"{source}.json")})
    return target
