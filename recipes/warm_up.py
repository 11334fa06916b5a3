"""Warm a network up without labels: tell a radiograph from others of its source.

    python recipes/warm_up.py --data ../shared/data --run runs/default --output runs/default/warm-up

Two views of a radiograph are to be alike, and unlike those of other patients' (Chen et al., SimCLR,
ICML 2020; without the pair itself among what repels it, for small batches: Yeh et al., Decoupled
Contrastive Learning, ECCV 2022). What repels is of the same collection alone, so that telling
collections apart helps nothing; telling websites within Cohen's apart may. Beside it, Kermany's and
NIH's training images go on being told apart as normal, bacterial and viral, with which the network
begins. Of Cohen's and Hannover's, all images are shown, but no label is looked at.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from collection import aetiology, is_cohens
from relatives import Relatives
from torch import Tensor, nn
from torch.nn import functional
from train_default import MILD

from chestxray_covid import ChestXrayDataset, Preprocess, build_densenet121
from chestxray_covid.checkpoint import load_config, save_checkpoint
from chestxray_covid.models import forward_features, normalise, to_tensors
from chestxray_covid.progress import Bar
from chestxray_covid.training_speed import faster_on_cpu

PREPROCESS = Preprocess(size_px=128)
#: Side of what the network sees, of the varied image.
SIDE_PX = 112
#: Radiographs of each source in a batch.
SHARES = {"cohen": 28, "kermany": 20, "nih": 9, "hannover": 7}
RATE = 1e-3
#: Steps in which the rate rises; then it falls like a cosine.
RISE = 60
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
TEMPERATURE = 0.2
#: Added to the seed for the views; the results on file were made with it.
VIEWS_SEED = 5


def contrast(views: Tensor, sources: Tensor, groups: Tensor) -> Tensor:
    """Return the mean loss of ``(2 N, D)`` projections, first views before second ones.

    Args:
        views: Of length 1.
        sources: ``(N,)`` numbers; only what is of the same source repels.
        groups: ``(N,)`` numbers of patients; a patient's own radiographs do not repel each other.
            Of each source there are at least two.
    """
    likeness = views @ views.T / TEMPERATURE
    source, group = sources.repeat(2), groups.repeat(2)
    repels = (source[:, None] == source) & (group[:, None] != group)
    others = likeness.masked_fill(~repels, -1e9).logsumexp(1)
    return (others - likeness.diagonal(len(sources)).repeat(2)).mean()


def pools(relatives: Relatives) -> dict[str, np.ndarray]:
    """Return source → positions of what is shown: of Kermany and NIH, training patients alone.

    What Cohen's lists of Hannover's counts as Cohen's.
    """
    samples = relatives.dataset.samples
    sources = np.array(["cohen" if is_cohens(s) else s.source for s in samples])
    judged = np.flatnonzero(np.isin([s.source for s in samples], ["cohen", "hannover"]))
    shown = np.intersect1d(relatives.without(judged), relatives.split.indices["train"])
    whole = np.isin(sources, ["cohen", "hannover"])
    kept = whole | np.isin(np.arange(len(samples)), shown)
    return {name: np.flatnonzero((sources == name) & kept) for name in SHARES}


def batches(pools: Mapping[str, np.ndarray], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield positions without end, of each source as many as :data:`SHARES` says, all in turn."""
    queues: dict[str, list[int]] = {name: [] for name in pools}
    while True:
        batch: list[int] = []
        for name, share in SHARES.items():
            while len(queues[name]) < share:
                queues[name] += rng.permutation(pools[name]).tolist()
            batch += queues[name][:share]
            del queues[name][:share]
        yield np.array(batch)


def known_aetiologies(dataset: ChestXrayDataset, positions: np.ndarray) -> np.ndarray:
    """Return ``(N,)`` classes of :data:`collection.AETIOLOGIES`, -1 where none may be looked at."""
    known = aetiology(dataset.subset(positions))
    found = {s.path: known.classes.index(s.label) for s in known.samples}
    return np.array([found.get(s.path, -1) for s in dataset.samples])


def views_of(pixels: Tensor, step: int, seed: int) -> Tensor:
    """Return ``(2 N, 1, S, S)`` float32 in [0, 255], two views of uint8 images."""
    draws = range(len(pixels))
    varied = torch.cat([MILD(pixels, seed=seed, epoch=2 * step + k, draws=draws) for k in (0, 1)])
    return functional.interpolate(varied, size=(SIDE_PX, SIDE_PX), mode="bilinear", antialias=True)


def warm_up(relatives: Relatives, start: Path, steps: int, seed: int = 0) -> nn.Module:
    """Return the network of a checkpoint after as many steps."""
    torch.manual_seed(seed)
    shown = pools(relatives)
    samples = relatives.dataset.samples
    pixels = torch.from_numpy(np.stack([PREPROCESS(s) for s in samples]))
    sources = torch.zeros(len(samples), dtype=torch.int64)
    for number, positions in enumerate(shown.values()):
        sources[positions] = number
    groups = torch.from_numpy(relatives.groups)
    labelled = np.concatenate([shown["kermany"], shown["nih"]])
    targets = torch.from_numpy(known_aetiologies(relatives.dataset, labelled))
    model = build_densenet121(str(start), num_classes=3).to(memory_format=torch.channels_last)
    width = model.classifier.in_features
    projection = nn.Sequential(
        nn.Linear(width, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128)
    )
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *projection.parameters()], lr=RATE, weight_decay=WEIGHT_DECAY
    )
    model.train()
    drawn = batches(shown, np.random.default_rng(seed))
    with faster_on_cpu(model), Bar(desc="warm up", total=steps) as bar:
        for step, batch in zip(range(steps), drawn, strict=False):
            rate = RATE * min(1, (step + 1) / RISE) * (1 + math.cos(math.pi * step / steps)) / 2
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate
            images = normalise(views_of(pixels[batch], step, VIEWS_SEED + seed), PREPROCESS)
            with torch.autocast("cpu", torch.bfloat16):
                images = images.contiguous(memory_format=torch.channels_last)
                features = forward_features(model, images)
                logits, projected = model.classifier(features), projection(features)
            target = targets[batch].repeat(2)
            loss = contrast(functional.normalize(projected.float()), sources[batch], groups[batch])
            loss = loss + functional.cross_entropy(
                logits.float(), target, ignore_index=-1, label_smoothing=LABEL_SMOOTHING
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            bar.update(1)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    parser.add_argument("--output", type=Path, default=Path("runs/default/warm-up"))
    parser.add_argument("--start", type=Path, help="checkpoint; what relatives start from if not")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0, help="of a start that is not given, too")
    options = parser.parse_args()
    relatives = Relatives(options.data, options.run, seed=options.seed)
    start = options.start or relatives.train_base()
    model = warm_up(relatives, start, options.steps, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    config = load_config(start)
    about = {"start": config.weights_sha256, "steps": options.steps, "seed": options.seed}
    about |= {"seen": "all images of Cohen's and Hannover's, without labels, and what start saw"}
    config = replace(config, provenance={"warm_up": about})
    save_checkpoint(options.output, config, to_tensors(model))


if __name__ == "__main__":
    main()
