"""Write how time and memory grow with the number of files, and what a million of them cost.

Called by ``generate.py``; reads what ``benchmarks/growth.py`` and ``predict_memory.py`` leave.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from generate import DOCS, SOURCE_KEY, digest, fill, table, wrapped

RESULT = DOCS.parent / "benchmarks" / "results" / "growth.json"
#: Speeds of originals and of reduced files, by the processor's kind.
SPEEDS = [
    RESULT.with_name(f"{name}.json") for name in ("predict", "predict_no_amx", "predict_float32")
]
STREAM = RESULT.with_name("predict_memory.json")
FIGURE = DOCS / "growth.png"
WHAT = {
    "predict": "predictions, from files to a CSV",
    "manifest": "opening a manifest",
    "split": "splitting it by patient, hashes given, `find_copies=False`",
}
CORES = (2, 16, 256)


def write_pages() -> None:
    """Write both blocks of ``docs/batch.md`` and the figure."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    blocks = {"cost": cost_block(result), "growth": growth_block(result)}
    fill(DOCS / "batch.md", blocks)
    draw(result, RESULT, FIGURE)


def cost_block(result: Mapping[str, Any]) -> str:
    """Return the time of a million radiographs on so many cores, from the largest measured run."""
    if "predict" not in result:
        return "\nNot measured yet: `python benchmarks/growth.py predict --data FOLDER`.\n"
    largest, machine = result["predict"][-1], result["machine"]
    rate = largest["count"] / largest["seconds"]
    each = 1e6 / rate * machine["cores"] / 3600
    cells = ([str(n), f"{60 * each / n:.1f}"] for n in CORES)
    intro = wrapped(
        f"{largest['count']:,} files took {largest['seconds']:.0f} s on {machine['cores']} cores "
        f"({machine['processor']}): {rate:.1f} files per second, {each:.1f} core-hours per "
        f"million. They were links to {result['predict_files']:,} files, most of them reduced in "
        f"size{_originals(machine)}. "
        "Files need nothing of each other, so the time below supposes that more cores do "
        "proportionally more, and that the storage keeps up."
    )
    head = ["cores", "minutes for a million"]
    return "\n" + "\n\n".join([intro, table(head, cells)]) + "\n"


def _originals(machine: Mapping[str, Any]) -> str:
    """Return in words how much longer untouched originals take, if it is known of the processor."""
    for path in SPEEDS:
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(found["machine"].get(key) == machine.get(key) for key in ("processor", "units")):
            original, reduced = (
                kind["files_per_s"][kind["fastest_engine"]]
                for kind in (found["summary"]["originals"], found["summary"]["reduced"])
            )
            return (
                f"; untouched originals take {reduced / original:.1f} times as long as reduced "
                "files there at 224 px, see [engines](engines.md#measured)"
            )
    return ""


def growth_block(result: Mapping[str, Any]) -> str:
    """Return time and peak memory by number of files."""
    cells = (
        [
            what,
            f"{row['count']:,}",
            f"{row['seconds']:.1f}",
            f"{row['processor_seconds']:.1f}",
            f"{row['peak_mib']:.0f}",
        ]
        for key, what in WHAT.items()
        for row in result.get(key, ())
    )
    head = ["", "files or rows", "seconds", "of the processor", "peak memory, MiB"]
    intro = wrapped(
        f"Each in a process of its own ({result['machine']['processor']}), by "
        "`python benchmarks/growth.py`. Where the seconds exceed those of the processor on one "
        "core, others used the machine. The split's memory includes the data set itself; "
        "it looks at no image. To find copies, as `split_by_patient` and `train` do unless told "
        "`find_copies=False` or `--no-copies`, every image is decoded and compared with every "
        "other: 21 KiB of memory for each, which is 20 GiB for a million, and time by the square "
        "of their number."
    )
    figure = "![Seconds and memory by number of files](growth.png)"
    return "\n" + "\n\n".join([intro, table(head, cells), figure, wrapped(_stream())]) + "\n"


def _stream() -> str:
    """Return in words how much memory a stream of predictions takes, of few files and of many."""
    found = json.loads(STREAM.read_text(encoding="utf-8"))
    said = " and ".join(f"{run['peak_mib']:.0f} MiB for {run['files']:,}" for run in found["runs"])
    return (
        f"`{found['what']}` took, with random weights at 64 px, {said} files "
        "(`python benchmarks/predict_memory.py`)."
    )


def draw(result: Mapping[str, Any], source: Path, target: Path) -> None:
    """Draw processor time and peak memory by number of files, both axes logarithmic."""
    from matplotlib.figure import Figure

    panel = Figure(figsize=(8, 3.5), layout="constrained")
    units = {"processor_seconds": "seconds of the processor", "peak_mib": "peak memory, MiB"}
    for axes, (field, unit) in zip(panel.subplots(1, 2), units.items(), strict=True):
        for key in (k for k in WHAT if k in result):
            rows = result[key]
            axes.loglog([r["count"] for r in rows], [r[field] for r in rows], "o-", label=key)
        axes.set(xlabel="files or rows", ylabel=unit)
        axes.spines[["top", "right"]].set_visible(False)
    panel.axes[0].legend(frameon=False)
    panel.savefig(target, dpi=120, metadata={SOURCE_KEY: digest(source)})


if __name__ == "__main__":
    write_pages()
