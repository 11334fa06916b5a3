"""Fit the input gate of a checkpoint, measure it, and put it beside the weights.

    python recipes/fit_gate.py --checkpoint src/chestxray_covid/weights/densenet121-v1 \
        --split runs/default/split.json --data ../shared/data --results gate.json

Needs, besides the data, the photographs inside scikit-image: ``pip install scikit-image``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from collection import open_sources
from gate_examples import Example, cohen_others, foreign, frontals, pieced, spoilt
from numpy.typing import NDArray

from chestxray_covid import Flag, Gate, Split, describe_lungs, fit_gate
from chestxray_covid.checkpoint import (
    ModelConfig,
    load_attachment,
    load_checkpoint,
    save_checkpoint,
)
from chestxray_covid.engines import Engine, open_engine
from chestxray_covid.files import write_files
from chestxray_covid.gate import GATE_NAME, describe
from chestxray_covid.intervals import wilson_interval
from chestxray_covid.progress import Bar

SOURCES = ("cohen", "hannover", "kermany", "nih")


def collect(data: Path, split: Split, preprocess: Any, *, limit: int, count: int) -> list[Example]:
    """Return all examples, to fit on and to measure with.

    Args:
        data: Folder of the collections.
        split: That the checkpoint was trained with.
        preprocess: Of the checkpoint.
        limit: Most frontal radiographs of each source and side.
        count: Pictures of each drawn kind.
    """
    radiographs = list(frontals(split, preprocess, limit=limit))
    return [
        *radiographs,
        *cohen_others(data, split, preprocess),
        *spoilt(radiographs, every=4),
        *pieced(radiographs, preprocess, every=4),
        *foreign(preprocess, count=count),
    ]


def features_of(engine: Engine, examples: Sequence[Example]) -> NDArray[np.float32]:
    """Return ``(N, 1024)`` features."""
    batches = (examples[i : i + 16] for i in range(0, len(examples), 16))
    return np.concatenate([engine(np.stack([e.pixels for e in batch]))[1] for batch in batches])


def lungs_of(examples: Sequence[Example]) -> NDArray[np.float32]:
    """Return ``(N, 70)``, what their lungs look like."""
    return np.stack([describe_lungs(e.pixels) for e in Bar(examples, "lungs", unit="img")])


def fit(
    examples: Sequence[Example],
    features: NDArray[np.float32],
    lungs: NDArray[np.float32] | None,
    *,
    without: str = "",
) -> Gate:
    """Return the gate of the examples that are not held out.

    Args:
        examples: All of them.
        features: Theirs.
        lungs: Theirs; ``None`` fits a gate that does not look at them.
        without: A source whose radiographs are left out, save laterals and slices.
    """
    chosen = [
        i
        for i, e in enumerate(examples)
        if not e.held_out and (e.source != without or e.kind in ("lateral", "ct"))
    ]
    taken = [examples[i] for i in chosen]
    return fit_gate(
        np.stack([e.pixels for e in taken]),
        features[chosen],
        kinds=[e.kind for e in taken],
        patients=[e.group for e in taken],
        sources=[e.source for e in taken],
        lungs=None if lungs is None else lungs[chosen],
    )


@dataclass(frozen=True)
class Checked:
    """What a gate made of an example."""

    flags: tuple[Flag, ...]
    looked_again: bool


def check(gate: Gate, example: Example, features: NDArray[np.float32]) -> Checked:
    """Return what a gate makes of an example, and whether it looked at its lungs for that."""
    looked_again = False
    if gate.lungs is not None:
        inputs = np.concatenate([features, describe(example.pixels)])[np.newaxis]
        looked_again = bool(gate.lungs.in_doubt(gate.excess(gate.log_odds(inputs)[0])))
    return Checked(gate.check(features, example.pixels, example.facts), looked_again)


def measure(
    gate: Gate, examples: Sequence[Example], features: NDArray[np.float32]
) -> dict[str, Any]:
    """Return how often held-out examples are flagged and refused, with Wilson intervals of 95 %."""
    every: dict[str, list[Checked]] = {}
    for example, row in zip(examples, features, strict=True):
        if example.held_out:
            found = check(gate, example, row)
            every.setdefault(example.what, []).append(found)
            if example.what == "frontal":
                every.setdefault(f"frontal, {example.source}", []).append(found)
    return {what: _summary(found) for what, found in sorted(every.items())}


def _summary(every: Sequence[Checked]) -> dict[str, Any]:
    flags = [found.flags for found in every]
    names = sorted({flag.name for found in flags for flag in found})
    counts = {
        "flagged": sum(bool(found) for found in flags),
        "abstained": sum(any(flag.abstains for flag in found) for found in flags),
        "looked_again": sum(found.looked_again for found in every),
        **{name: sum(any(f.name == name for f in found) for found in flags) for name in names},
    }
    return {"images": len(every), **{name: _rate(k, len(every)) for name, k in counts.items()}}


def _rate(count: int, total: int) -> dict[str, Any]:
    low, high = wilson_interval(count, total)
    return {"count": count, "rate": count / total, "low": low, "high": high}


def unseen_sources(
    examples: Sequence[Example],
    features: NDArray[np.float32],
    lungs: NDArray[np.float32] | None,
) -> dict[str, dict[str, Any]]:
    """Return, for each source, what a gate fitted without it makes of its frontal radiographs."""
    results = {}
    for source in SOURCES:
        gate = fit(examples, features, lungs, without=source)
        found = [
            check(gate, example, row)
            for example, row in zip(examples, features, strict=True)
            if example.what == "frontal" and example.source == source
        ]
        results[source] = _summary(found)
    return results


def never_fitted(examples: Sequence[Example]) -> list[str]:
    """Return what is only measured with, since no gate is fitted on any of it."""
    fitted = {e.what for e in examples if not e.held_out}
    return sorted({e.what for e in examples} - fitted)


def attach(folder: Path, gate: Gate) -> ModelConfig:
    """Put the gate beside the weights of a checkpoint, whose other attachments stay."""
    config, tensors = load_checkpoint(folder)
    others = {name: load_attachment(folder, config, name) for name in config.attachments}
    kept = {name: data for name, data in others.items() if data is not None}
    return save_checkpoint(folder, config, tensors, {**kept, GATE_NAME: gate.to_bytes()})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=600, help="frontal, per source and side")
    parser.add_argument("--count", type=int, default=120, help="of each drawn kind")
    options = parser.parse_args(argv)
    config, tensors = load_checkpoint(options.checkpoint)
    split = Split.load(options.split, open_sources(options.data))
    examples = collect(
        options.data, split, config.preprocess, limit=options.limit, count=options.count
    )
    print(f"{len(examples)} examples", flush=True)
    features = features_of(open_engine(config, tensors), examples)
    lungs = lungs_of(examples)
    gate = Gate.from_bytes(fit(examples, features, lungs).to_bytes())  # as it will be read
    looking_once = fit(examples, features, None)
    results = {
        "held_out": measure(gate, examples, features),
        "never_fitted": never_fitted(examples),
        "source_left_out": unseen_sources(examples, features, lungs),
        "without_lungs": {
            "held_out": measure(looking_once, examples, features),
            "source_left_out": unseen_sources(examples, features, None),
        },
        "weights_sha256": config.weights_sha256,
    }
    results["gate_sha256"] = attach(options.checkpoint, gate).attachments[GATE_NAME]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1).encode()
    write_files(options.results.parent, {options.results.name: text})
    for what, found in results["held_out"].items():
        print(f"{what:<26} {found['images']:>5}  flagged {found['flagged']['rate']:.3f}")


if __name__ == "__main__":
    main()
