"""Write what the documentation says of speed and precision of the engines, from measured results.

Called by ``generate.py``; reads what ``recipes/judge_engines.py`` leaves beside the bundled
weights, and what ``benchmarks/predict.py`` leaves in ``benchmarks/results``: ``predict.json`` of a
processor with AMX, ``predict_no_amx.json`` of one that is faster in bfloat16 without it,
``predict_no_amx_faster.json`` of another such, a copy, and ``predict_float32.json`` of one that is
not. ``benchmarks/start_up.py`` leaves ``start_up.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from generate import DOCS, SOURCE_KEY, digest, fill, table, wrapped

from chestxray_covid import bundled_models

JUDGED = DOCS.parent / "src" / "chestxray_covid" / "weights" / "engines.json"
SPEED = DOCS.parent / "benchmarks" / "results" / "predict.json"
NO_AMX = SPEED.with_name("predict_no_amx.json")
FASTER = SPEED.with_name("predict_no_amx_faster.json")
PLAIN = SPEED.with_name("predict_float32.json")
START = SPEED.with_name("start_up.json")
FIGURE = DOCS / "speed.png"
BARE = "bare engine"
INT8 = "OpenVINO, int8"
KINDS = {"originals": "untouched originals", "reduced": "reduced files"}


def write_pages() -> None:
    """Write the blocks of ``docs/engines.md``, and the figure if speed was measured."""
    fill(DOCS / "engines.md", blocks())
    if SPEED.is_file():
        draw(_read(SPEED), SPEED, FIGURE)


def blocks() -> dict[str, str]:
    """Return every block of the page, by its name."""
    return {
        "engines": precision_block(_read(JUDGED)),
        "start-up": start_block(_read(START)),
        "speed": speed_block(_read(SPEED), figure=True),
        "no-amx": speed_block(_read(NO_AMX)),
        "no-amx-faster": speed_block(_read(FASTER)),
        "plain": speed_block(_read(PLAIN)),
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def precision_block(judged: Mapping[str, Any]) -> str:
    """Return by how much the bundled default's probabilities differ from float32 torch."""
    rows = judged[next(iter(bundled_models().values())).weights_sha256]
    cells = (
        [
            name.replace("-", ", "),
            f"{row['p99']:.5f}",
            f"{row['largest']:.5f}",
            f"{row['auroc_change']:+.5f}",
        ]
        for name, row in sorted(rows.items(), key=lambda item: item[1]["p99"])
    )
    head = ["engine", "difference, 99th percentile", "largest", "change of AUROC"]
    return "\n" + table(head, cells) + "\n"


def start_block(result: Mapping[str, Any]) -> str:
    """Return how long processes take from nothing to one prediction, and in how much memory."""
    rounds, machine = result["rounds"], result["machine"]
    cells = (
        [
            name.replace("auto", f"`auto` ({result['auto']})"),
            _spread([run["seconds"] for run in runs], digits=2),
            f"{median(run['peak_mib'] for run in runs):.0f}",
        ]
        for name, runs in rounds.items()
    )
    count = len(next(iter(rounds.values())))
    intro = wrapped(
        "Whole processes of `chestxray-covid predict one.png`, a radiograph of Hannover's, by the "
        "bundled weights, first with no compiled model in the cache and then again; beside them a "
        "Python that imports torch, OpenVINO or nothing, or loads the weights: median (and range) "
        f"of {count} rounds of `{result['command']}` on {machine['cores']} cores "
        f"({machine['processor']}), everything in the system's file cache."
    )
    return "\n" + "\n\n".join([intro, table(["", "seconds", "peak memory, MiB"], cells)]) + "\n"


def speed_block(result: Mapping[str, Any] | None, *, figure: bool = False) -> str:
    """Return files per second and memory of all, and the ratios; or that nobody measured yet."""
    if result is None:
        return "\nNot measured yet: `python benchmarks/predict.py`.\n"
    summary, machine = result["summary"], result["machine"]
    names = list(summary["originals"]["files_per_s"])
    precision = summary["originals"]["fastest_engine"].partition(", ")[2]
    names.sort(key=lambda name: -summary["originals"]["files_per_s"][name])
    cells = (
        [
            f"{name}, {precision}" if name == BARE else name,
            *(
                _spread([run["files_per_s"] for run in result["rounds"][kind][name]])
                for kind in KINDS
            ),
            f"{summary['originals']['peak_mib'][name]:.0f}",
        ]
        for name in names
    )
    head = ["", *(f"files/s, {KINDS[kind]}" for kind in KINDS), "peak memory, MiB"]
    counts = " and ".join(f"{result['files'][kind]} {KINDS[kind]}" for kind in KINDS)
    intro = wrapped(
        f"From files to probabilities, DenseNet-121 at {result['size_px']} px, {counts}, on "
        f"{result['cores']} cores ({machine['processor']}): the median (and range) of "
        f"{len(result['rounds']['originals'][names[0]])} rounds of `{result['command']}`."
    )
    ratios = wrapped(
        " ".join(_ratios(kind, summary[kind], result["cores"]) for kind in KINDS)
        + " Decoding and the engine share the cores."
    )
    times = result["latency_ms"]
    single = wrapped(
        "A single image takes "
        + ", ".join(f"{value:.1f} ms ({name})" for name, value in times.items())
        + "."
    )
    shown = ["![Files per second of all engines and peers](speed.png)"] if figure else []
    return "\n" + "\n\n".join([intro, table(head, cells), *shown, ratios, single]) + "\n"


def _spread(values: Sequence[float], digits: int = 1) -> str:
    middle, low, high = (f"{f(values):.{digits}f}" for f in (median, min, max))
    return f"{middle} ({low}–{high})"


def _ratios(kind: str, found: Mapping[str, Any], cores: int) -> str:
    best, rates = found["fastest_engine"], found["files_per_s"]
    each, engine = (1000 * cores / rates[name] for name in (best, BARE))
    share, peak = found["peak_over_smallest_peer"], found["peak_mib"]
    smallest = peak[best] / share
    return (
        f"On {KINDS[kind]}, {best} is {found['times_the_fastest_peer']:.1f} times as fast as the "
        f"fastest peer, in {share:.2f} of the smallest peer's peak memory; int8 is "
        f"{found['int8_times_the_fastest_peer']:.1f} times as fast, in {peak[INT8] / smallest:.2f} "
        f"of it. {best} reaches "
        f"{found['share_of_the_bare_engine']:.2f} of the bare engine, which gets its pixels from "
        f"memory: {each:.1f} ms of a core per file, busy or idle, against {engine:.1f}."
    )


def draw(result: Mapping[str, Any], source: Path, target: Path) -> None:
    """Draw files per second of all, for both sets of files."""
    from matplotlib.figure import Figure

    panel = Figure(figsize=(8, 4), layout="constrained")
    for axes, kind in zip(panel.subplots(1, 2, sharey=True), KINDS, strict=True):
        rates = result["summary"][kind]["files_per_s"]
        ranked = sorted(result["summary"]["originals"]["files_per_s"].items(), key=lambda x: x[1])
        names = [name for name, _ in ranked]
        bars = axes.barh(names, [rates[name] for name in names], color="C0")
        axes.bar_label(bars, fmt="%.0f", padding=2)
        axes.set(xlabel="files per second", title=KINDS[kind])
        axes.spines[["top", "right"]].set_visible(False)
    panel.savefig(target, dpi=120, metadata={SOURCE_KEY: digest(source)})


if __name__ == "__main__":
    write_pages()
