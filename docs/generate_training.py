"""Write what a training step costs in time and memory, from measured results.

Called by ``generate.py``; reads what ``benchmarks/training_step.py``, ``time_to_auroc.py``,
``training_memory.py`` and ``cache.py`` leave, and ``training_gpu.py`` where there was a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from generate import DOCS, SOURCE_KEY, digest, fill, table, wrapped

RESULTS = DOCS.parent / "benchmarks" / "results"
GPU = RESULTS / "training_gpu.json"
FIGURE = DOCS / "training_gpu.png"
#: What the others are compared with.
PLAIN = "plain"


def write_page() -> None:
    """Write the blocks of ``docs/cluster.md``, and the figure if a GPU was measured."""
    fill(DOCS / "cluster.md", blocks())
    if GPU.is_file():
        draw(load(GPU.stem), GPU, FIGURE)


def blocks() -> dict[str, str]:
    """Return every block of the page, by its name."""
    return {
        "training": "\n" + step_paragraph(load("training_step")) + "\n",
        "cost": cost_block(load("time_to_auroc"), load("training_memory")),
        "cache": "\n" + cache_paragraph(load("cache")) + "\n",
        "no-amx-training": no_amx_block(
            load("training_step_no_amx"), load("training_step_no_amx_faster")
        ),
        "plain-training": "\n" + step_paragraph(load("training_step_float32")) + "\n",
        "gpu": gpu_block(load(GPU.stem) if GPU.is_file() else None),
    }


def load(name: str) -> Mapping[str, Any]:
    """Return a benchmark's result."""
    found: Mapping[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def cost_block(auroc: Mapping[str, Any], memory: Mapping[str, Any]) -> str:
    """Return the time to an AUROC, and what a step takes with and without checkpointing."""
    cells = (
        [
            row["precision"],
            row["batch"],
            "yes" if row["checkpointed"] else "no",
            f"{row['step_mib']:.0f}",
            f"{row['step_mib'] / row['kept_mib']:.2f}",
            _middle(row["images_per_s"]),
        ]
        for row in memory["runs"]
    )
    head = [
        *("precision", "batch", "gradient checkpointing", "memory of a step, MiB"),
        *("over what it keeps", "images/s"),
    ]
    intro = wrapped(
        f"Peak memory and speed of {memory['steps']} steps at {memory['size_px']} px, on "
        f"{memory['machine']['cores']} cores ({memory['machine']['processor']}), median and range "
        f"of {len(memory['runs'][0]['images_per_s'])} rounds (`python "
        "benchmarks/training_memory.py`); `--batch-size auto` reckons with what a forward pass "
        "keeps:"
    )
    return "\n" + "\n\n".join([wrapped(_time_to(auroc)), intro, table(head, cells)]) + "\n"


def cache_paragraph(found: Mapping[str, Any]) -> str:
    """Return how long training waits for pixels, with and without the cache."""
    return wrapped(
        f"On {found['machine']['cores']} cores ({found['machine']['processor']}), training on "
        f"large phantoms waits for pixels in {found['decoding']:.2%} of the second epoch when it "
        f"decodes, in {found['cached']:.2%} with the cache (`python benchmarks/cache.py`)."
    )


def step_paragraph(step: Mapping[str, Any]) -> str:
    """Return how fast a step is, against plain loops."""
    kept = compiled = ""
    if "memory_kept_over_plain_pairs" in step:  # asked since 2026-11-29
        kept = f", {_ratio(step['memory_kept_over_plain_pairs'])} times with memory kept"
    if "compiled_over_plain_pairs" in step:  # asked since 2026-11-28
        begun = step["seconds_to_begin"]
        more = begun["recommended, compiled"] - begun["recommended"]
        compiled = (
            f", {_ratio(step['compiled_over_plain_pairs'])} times compiled "
            f'(`compile_backend="inductor"`), which took {more:.0f} s before the first steps'
        )
    return wrapped(
        f"On {step['machine']['cores']} cores ({step['machine']['processor']}), batches of "
        f"{step['batch_size']}, medians and ranges of pairs that alternate "
        "(`python benchmarks/training_step.py`): the recommended settings are "
        f"{_ratio(step['recommended_over_plain_pairs'])} times as fast as a plain loop, of "
        "float32 in torch's own order with an optimizer that is not fused, at "
        f"{step['size_px']['recommended']} px, "
        f"{_ratio(step['without_huge_pages_over_plain_pairs'])} times without huge pages"
        f"{kept}{compiled}; the trainer reaches {_ratio(step['trainer_over_bare_pairs'])} of a "
        f"bare loop of the same steps at {step['size_px']['trainer']} px."
    )


def no_amx_block(step: Mapping[str, Any], faster: Mapping[str, Any]) -> str:
    """Return the same of two processors, of the second, ``faster`` one in few words."""
    plain, more = (each["full_size_images_per_s"]["plain"] for each in (step, faster))
    ways = ("recommended", "without_huge_pages", "memory_kept", "compiled")
    told = [_ratio(faster[f"{way}_over_plain_pairs"]) for way in ways]
    other = wrapped(
        f"And on a faster one ({faster['machine']['processor']}), where the plain loop does "
        f"{more:.1f} images/s in place of {plain:.1f}: {told[0]} times, {told[1]} without huge "
        f"pages, {told[2]} with memory kept, {told[3]} compiled; the trainer reaches "
        f"{_ratio(faster['trainer_over_bare_pairs'])} of a bare loop."
    )
    return f"\n{step_paragraph(step)}\n\n{other}\n"


def gpu_block(result: Mapping[str, Any] | None) -> str:
    """Return images per second of every row on a GPU; or that nobody measured yet."""
    if result is None or result["gpu"] is None:
        return "\nNot measured yet: `python benchmarks/training_gpu.py`.\n"
    rows, card, machine = result["rows"], result["gpu"], result["machine"]
    note = f" ({result['note']})" if result["note"] else ""
    intro = wrapped(
        f"DenseNet-121 from random weights at {result['size_px']} px on one {card['name']} and "
        f"{machine['torch_threads']} of {machine['cores']} cores ({machine['processor']}; torch "
        f"{machine['versions']['torch']}, CUDA {card['cuda']}), {result['images']} radiographs of "
        f"Kermany's collection per epoch{note}, {result['workers']} threads or processes that "
        f"decode: the median (and range) of {result['rounds']} epochs each, which alternate "
        "(`python benchmarks/training_gpu.py`). An epoch is timed from before its first batch "
        "until the GPU has done its last step."
    )
    plain, idle = rows.get(PLAIN), result["idle"] or {}
    cells = (
        [
            name,
            row["batch"],
            f"{row['median']:.0f} ({row['range'][0]:.0f}–{row['range'][1]:.0f})",
            _times(row, plain),
            _idle(idle.get(name)),
            f"{row['share_of_peak']:.1%}",
        ]
        for name, row in rows.items()
    )
    head = [*("", "batch", "images/s", "times plain"), *("GPU idle", "share of the matrix product")]
    peers = "" if result["timm"] is None else f" of timm {result['timm']}"
    legend = wrapped(
        "*plain* is a tutorial's loop: Pillow and torchvision in worker processes, float32, Adam, "
        "the loss read after each step; *plain, prepared* is the same step on normalised images "
        "that lie on the GPU. *timm* is what the training script" + peers + " does with `--amp "
        "--amp-dtype bfloat16 --channels-last`, *compiled* with `--torchcompile inductor`, all "
        "else at its default. *trainer* is `TrainingConfig` with a cache that is filled, "
        '*compiled* with `compile_backend="inductor"`. Each varies images in its own way. The last '
        f"column is images per second times {result['flops_per_image'] / 1e9:.1f} GFLOP per image "
        "(forward and backward, as `FlopCounterMode` counts), over the "
        f"{result['peak_flops'] / 1e12:.0f} TFLOP/s that a product of large bfloat16 matrices "
        "reached in the same run."
    )
    shown = ["![Images per second of every row on a GPU](training_gpu.png)"]
    told = [_about_batches(rows), _about_idle(idle), _left_out(result["left_out"])]
    parts = [intro, table(head, cells), *shown, legend, *(wrapped(text) for text in told if text)]
    return "\n" + "\n\n".join(parts) + "\n"


def _times(row: Mapping[str, Any], plain: Mapping[str, Any] | None) -> str:
    if plain is None or row["batch"] != plain["batch"]:
        return "–"
    return f"{row['median'] / plain['median']:.2f}"


def _idle(found: Mapping[str, float] | None) -> str:
    return "–" if found is None else f"{found['epoch']:.1%} ({found['profiled']:.1%})"


def _about_batches(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return which batches were given to the trainer alone: no row compares with them."""
    batches = {name: row["batch"] for name, row in rows.items()}
    others = {batch for name, batch in batches.items() if not name.startswith("trainer")}
    alone = sorted(set(batches.values()) - others)
    if not alone or not others:
        return ""
    listed = " and ".join(map(str, alone))
    return f"Batches of {listed} were given to the trainer alone, and compare with no other row."


def _about_idle(found: Mapping[str, Mapping[str, float]]) -> str:
    if not found:
        return ""
    return (
        "*GPU idle* is the share of an epoch in which no kernel and no copy ran, by the profiler's "
        f"records of {_steps(found)} steps, set against the median epoch without the profiler; in "
        "brackets, against the same steps with it, which makes launching slower. It was asked of "
        "the trainer alone."
    )


def _steps(found: Mapping[str, Mapping[str, float]]) -> str:
    counts = sorted({int(row["steps"]) for row in found.values()})
    return " or ".join(map(str, counts))


def _left_out(reasons: Mapping[str, str]) -> str:
    return f"Not measured: {', '.join(f'*{name}*' for name in reasons)}." if reasons else ""


def draw(result: Mapping[str, Any], source: Path, target: Path) -> None:
    """Draw images per second of every row, with the range of the rounds."""
    from matplotlib.figure import Figure

    ranked = sorted(result["rows"].items(), key=lambda item: item[1]["median"])
    middle = [row["median"] for _, row in ranked]
    spread = [
        [row["median"] - row["range"][0] for _, row in ranked],
        [row["range"][1] - row["median"] for _, row in ranked],
    ]
    common = min(row["batch"] for _, row in ranked)
    colours = [
        "C0" if row["batch"] == common else "0.7" for _, row in ranked
    ]  # grey: another batch
    panel = Figure(figsize=(8, 1 + 0.35 * len(ranked)), layout="constrained")
    axes = panel.subplots()
    bars = axes.barh([name for name, _ in ranked], middle, xerr=spread, color=colours, ecolor="0.3")
    axes.bar_label(bars, fmt="%.0f", padding=4)
    title = f"one {result['gpu']['name']}, batches of {common} where none is named"
    axes.set(xlabel="images per second", title=title)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    panel.savefig(target, dpi=120, metadata={SOURCE_KEY: digest(source)})


def _ratio(pairs: Sequence[float]) -> str:
    return _middle(pairs, digits=2)


def _middle(values: Sequence[float], digits: int = 1) -> str:
    middle, low, high = (f"{f(values):.{digits}f}" for f in (median, min, max))
    return f"{middle} ({low}–{high})"


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
        f"{result['size_px']} px ({result['images'][0]} images to train on, one run per seed, on "
        f"{result['machine']['cores']} cores, {result['machine']['processor']}; `python "
        f"benchmarks/time_to_auroc.py`): {'; '.join(words)}."
    )


if __name__ == "__main__":
    write_page()
