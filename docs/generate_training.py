"""Write what a training step costs in time and memory, from measured results.

Called by ``generate.py``; reads what ``benchmarks/training_step.py``, ``time_to_auroc.py`` and
``training_memory.py`` leave.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from generate import DOCS, table, with_blocks, wrapped

RESULTS = DOCS.parent / "benchmarks" / "results"


def write_page() -> None:
    """Write the block of ``docs/cluster.md``."""
    page = DOCS / "cluster.md"
    names = ("training_step", "time_to_auroc", "training_memory")
    block = training_block(*(load(name) for name in names))
    text = with_blocks(page.read_text(encoding="utf-8"), {"training": block})
    page.write_text(text, encoding="utf-8")


def load(name: str) -> Mapping[str, Any]:
    """Return a benchmark's result."""
    found: Mapping[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def training_block(
    step: Mapping[str, Any], auroc: Mapping[str, Any], memory: Mapping[str, Any]
) -> str:
    """Return speed against plain loops, time to an AUROC, and the cost of checkpointing."""
    speed = wrapped(
        f"On {step['machine']['cores']} cores ({step['machine']['processor']}), batches of "
        f"{step['batch_size']}, medians and ranges of pairs that alternate "
        "(`python benchmarks/training_step.py`): the recommended settings are "
        f"{_ratio(step['recommended_over_plain_pairs'])} times as fast as float32 in torch's own "
        f"order at {step['size_px']['recommended']} px, "
        f"{_ratio(step['without_huge_pages_over_plain_pairs'])} times without huge pages; the "
        f"trainer reaches {_ratio(step['trainer_over_bare_pairs'])} of a bare loop of the same "
        f"steps at {step['size_px']['trainer']} px."
    )
    cells = (
        [
            row["precision"],
            row["batch"],
            "yes" if row["checkpointed"] else "no",
            f"{row['step_mib']:.0f}",
            f"{row['step_mib'] / row['kept_mib']:.2f}",
            f"{row['images_per_s']:.1f}",
        ]
        for row in memory["runs"]
    )
    head = [
        *("precision", "batch", "gradient checkpointing", "memory of a step, MiB"),
        *("over what it keeps", "images/s"),
    ]
    intro = wrapped(
        f"Peak memory and best speed of {memory['steps']} steps at {memory['size_px']} px "
        "(`python benchmarks/training_memory.py`); `--batch-size auto` reckons with what a forward "
        "pass keeps:"
    )
    return "\n" + "\n\n".join([speed, wrapped(_time_to(auroc)), intro, table(head, cells)]) + "\n"


def _ratio(pairs: Sequence[float]) -> str:
    return f"{median(pairs):.2f} ({min(pairs):.2f}–{max(pairs):.2f})"


def _time_to(result: Mapping[str, Any]) -> str:
    words = []
    for name in ("plain", "recommended"):
        times = [run["seconds"] for run in result[name]]
        reached = [t for t in times if t is not None]
        late = len(times) - len(reached)
        shown = [", ".join(f"{t:.0f}" for t in reached) + " s"] if reached else []
        shown += [f"{late} not within the epochs"] if late else []
        words.append(f"{name} {' and '.join(shown)}")
    return (
        f"Until a validation AUROC of {result['target']} on one source, from random weights, at "
        f"{result['size_px']} px ({result['images'][0]} images to train on, one run per seed; "
        f"`python benchmarks/time_to_auroc.py`): {'; '.join(words)}."
    )


if __name__ == "__main__":
    write_page()
