"""Measure what a linear readout reaches inside Cohen's collection, of networks that learned little.

    python recipes/probe_inside.py --data ../shared/data --run runs/default

COVID-19 against other findings, in the folds of ``judge_default.py --what folds``. The network is
that which the relatives start from, which saw no COVID-19, or one with random weights, which saw no
label at all. It stays as it is: a logistic regression reads the mean, the maximum and the standard
deviation of every channel of a layer. What that reaches needs no training of the network, so no
network shows by reaching it that it reads lungs. ``--base`` takes other networks to start from; of
several, and of as many with random weights, the average of their readouts is judged as well. Where
the output folder has what the folds' own networks answered, each readout is also judged together
with them. ``--lungs`` shows all networks crops to the lungs, also in the training that they
start from. ``--frame`` hides the centre of all images, so that the frame alone is read.
``--warm-up`` is for networks that ``warm_up.py`` made, and folds that began with one of them, of
which ``--folds`` names others, and ``--sizes`` shows them the images in several sizes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from collection import cohens, cropped_to_lungs
from frame import hide
from judge_default import folds_inside, judge_parts, said, write
from relatives import Relatives
from scipy.special import logit
from scipy.stats import zscore
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from train_default import MILD

from chestxray_covid import ChestXrayDataset, EvaluationReport, Preprocess, build_densenet121
from chestxray_covid.models import normalise

PREPROCESS = Preprocess(size_px=160)
LAYERS = ("transition1", "transition2", "transition3", "norm5")
#: What the average of a network's readouts is called.
TOGETHER = "all four"
#: Central parts, by side length, that ``--frame`` hides: nothing, for comparison, to nearly all.
PARTS = (0.0, 0.7, 0.9)
#: What it hides them under: the same in all images, since a mean tells of what it hides.
GREY = 128
#: Of each image: as it is, mirrored, and varied mildly, for the regression and for its answers.
VIEWS = 8
BATCH = 32
#: Inverse strength of the regression's penalty, chosen among five with such results in sight.
INVERSE_PENALTY = 0.03


def view(pixels: Tensor, number: int) -> Tensor:
    """Return ``(N, 1, S, S)`` float32 in [0, 255], one of the views of uint8 images."""
    if number == 0:
        return pixels.float()
    if number == 1:
        return pixels.float().flip(-1)
    return MILD(pixels, seed=0, epoch=number, draws=range(len(pixels)))


def summaries(network: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """Return layer → ``(N, 3 C)``: mean, maximum and deviation of each channel after a ReLU."""
    found, x = {}, normalise(batch, PREPROCESS).contiguous(memory_format=torch.channels_last)
    for name, part in network.features.named_children():
        x = part(x)
        if name in LAYERS:
            shown = torch.relu(x)
            pooled = shown.mean((2, 3)), shown.amax((2, 3)), shown.std((2, 3))
            found[name] = torch.cat(pooled, dim=1)
    return found


def settle(network: nn.Module, pixels: Tensor) -> None:
    """Give random weights the batch norm statistics of these images; no label is looked at."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average over the batches
            module.reset_running_stats()
    network.train()
    for part in pixels.split(BATCH):
        if len(part) == BATCH:
            summaries(network, part.float())
    network.eval()


@torch.inference_mode()
def features_of(network: nn.Module, pixels: Tensor) -> dict[str, np.ndarray]:
    """Return layer → ``(VIEWS, N, 3 C)`` of ``(N, 1, S, S)`` uint8 images."""
    network.eval().to(memory_format=torch.channels_last)
    views = []
    for number in range(VIEWS):
        parts = [summaries(network, batch) for batch in view(pixels, number).split(BATCH)]
        views.append({name: torch.cat([p[name] for p in parts]).numpy() for name in LAYERS})
        print("view", number + 1, "of", VIEWS, flush=True)
    return {name: np.stack([v[name] for v in views]) for name in LAYERS}


def read_out(
    features: np.ndarray, truth: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Return ``(N,)`` out-of-fold decisions, the average over an image's views."""
    found = np.zeros(len(truth))
    for rest, held_out in pairs:
        model = make_pipeline(
            StandardScaler(),
            LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=1000),
        )
        model.fit(np.concatenate(features[:, rest]), np.tile(truth[rest], len(features)))
        found[held_out] = np.mean([model.decision_function(v[held_out]) for v in features], axis=0)
    return found


def answers_of_folds(
    place: Path, dataset: ChestXrayDataset, name: str = "folds"
) -> np.ndarray | None:
    """Return ``(N,)`` logits of the networks that ``judge_default.py`` trained in these folds.

    Args:
        place: Folder of its results; None is returned if they are not there.
        dataset: Cohen's samples, in the same order.
    """
    path = place / f"{name}_evaluation.json"
    if not path.is_file():
        return None
    found = EvaluationReport.load(path).predictions
    asked = [(s.patient_id, s.label) for s in dataset.samples]
    if list(zip(found["patient_id"], found["label"], strict=True)) != asked:
        raise SystemExit(f"{path} is of other images. Run judge_default.py --what folds again.")
    limits = np.finfo(np.float32).eps, 1 - np.finfo(np.float32).eps
    logits: np.ndarray = logit(np.clip(found["p_covid19"], *limits))
    return logits


def judged(
    dataset: ChestXrayDataset,
    pairs: list[tuple[np.ndarray, np.ndarray]],
    found: np.ndarray,
    trained: np.ndarray | None,
) -> dict[str, Any]:
    """Return AUROCs of a readout, and of its average with the answers of the folds' networks."""
    row = judge_parts(dataset, pairs, found)
    if trained is not None:
        both = judge_parts(dataset, pairs, zscore(found) + zscore(trained))
        row["with_folds"] = {name: part["auroc"] for name, part in both.items()}
    return row


def images_of(
    dataset: ChestXrayDataset, part: float = 0.0, preprocess: Preprocess | None = None
) -> Tensor:
    """Return all images, ``(N, 1, S, S)`` uint8, with that central part under a grey."""
    preprocess = preprocess or PREPROCESS
    if not part:
        return torch.from_numpy(np.stack([preprocess(s) for s in dataset.samples]))
    images = (hide(dataset.image(i), part, GREY) for i in range(len(dataset)))
    return torch.from_numpy(np.stack([preprocess(image) for image in images]))


def random_network(pixels: Tensor, seed: int = 0) -> nn.Module:
    network = build_densenet121(pretrained=False, seed=seed)
    with torch.inference_mode():
        settle(network, pixels)
    return network


def networks_of(bases: Sequence[Path], pixels: Tensor) -> dict[str, list[Callable[[], nn.Module]]]:
    """Return networks that relatives start from, and as many that are drawn at random."""
    return {
        "random": [partial(random_network, pixels, seed) for seed in range(len(bases))],
        "base": [partial(build_densenet121, base, num_classes=3) for base in bases],
    }


#: Weights → layer → what is read out of each network, ``(N,)`` with a deviation of 1.
Answers = dict[str, dict[str, list[np.ndarray]]]


def answers_of(
    networks: Mapping[str, Sequence[Callable[[], nn.Module]]],
    pixels: Tensor,
    inside: ChestXrayDataset,
    pairs: list[tuple[np.ndarray, np.ndarray]],
) -> Answers:
    """Return what is read out of each layer of each network, and the average over its layers.

    Args:
        networks: What weights are called → how each of these networks is built.
        pixels: ``(N, 1, S, S)`` uint8, what the networks are shown.
        inside: Cohen's samples.
        pairs: Positions of the rest and of the held out, a pair per fold.
    """
    truth = np.array([s.label == "covid19" for s in inside.samples])
    every: Answers = {}
    for weights, draws in networks.items():
        answers = every[weights] = {layer: [] for layer in (*LAYERS, TOGETHER)}
        for build in draws:
            for layer, features in features_of(build(), pixels).items():
                print(weights, layer)
                answers[layer].append(zscore(read_out(features, truth, pairs)))
            average = np.mean([answers[layer][-1] for layer in LAYERS], axis=0)
            answers[TOGETHER].append(zscore(average))
    return every


def together(every: Sequence[Answers]) -> Answers:
    """Return, of each network, the average over the sizes in which it was shown the images."""
    return {
        weights: {
            TOGETHER: [
                zscore(np.mean(sizes, axis=0))
                for sizes in zip(*(answers[weights][TOGETHER] for answers in every), strict=True)
            ]
        }
        for weights in every[0]
    }


def judge_answers(
    every: Answers,
    inside: ChestXrayDataset,
    pairs: list[tuple[np.ndarray, np.ndarray]],
    trained: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Return what each layer gives away, of one network and of the average of all.

    Args:
        every: What was read out.
        inside: Cohen's samples.
        pairs: Positions of the rest and of the held out, a pair per fold.
        trained: ``(N,)`` answers of the folds' own networks.
    """
    rows = []
    for weights, answers in every.items():
        for several in sorted({1, *map(len, answers.values())}):
            for layer, found in answers.items():
                row = judged(inside, pairs, np.mean(found[:several], axis=0), trained)
                rows.append({"weights": weights, "networks": several, "layer": layer, **row})
    return rows


def answers_of_sizes(
    networks: Mapping[str, Sequence[Callable[[], nn.Module]]],
    sizes_px: Sequence[int],
    inside: ChestXrayDataset,
    pairs: list[tuple[np.ndarray, np.ndarray]],
) -> list[tuple[list[int], Answers]]:
    """Return what is read out of images in each of these sizes, and in all of them."""
    every = [
        answers_of(networks, images_of(inside, preprocess=Preprocess(size_px=px)), inside, pairs)
        for px in sizes_px
    ]
    shown = [*([px] for px in sizes_px), list(sizes_px)]
    return list(zip(shown, [*every, together(every)], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/default"))
    parser.add_argument(
        "--base", type=Path, nargs="+", help="networks that saw no label of Cohen's or Hannover's"
    )
    parser.add_argument(
        "--made", metavar="TEXT", help="machine, software, files and base, in words"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--lungs", action="store_true", help="crops to the lungs alone")
    shown.add_argument("--frame", action="store_true", help="the frame alone, centres hidden")
    shown.add_argument("--warm-up", action="store_true", help="networks of warm_up.py, --base")
    parser.add_argument(
        "--folds",
        nargs="+",
        default=["folds_warm_up"],
        help="with --warm-up, results of folds, such as folds_mixup; each gives one of readouts",
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", metavar="PX", help="with --warm-up, sides of the images"
    )
    options = parser.parse_args()
    if options.sizes and not options.warm_up:
        parser.error("--sizes is of networks of warm_up.py: give --warm-up, too.")
    if options.folds != parser.get_default("folds") and not options.warm_up:
        parser.error("--folds is of networks of warm_up.py: give --warm-up, too.")
    if options.warm_up and not options.base:
        parser.error("--warm-up is of networks that --base names: give both.")
    relatives = Relatives(options.data, options.run, options.made)
    inside, pairs = folds_inside(relatives, cohens(relatives.dataset))
    bases = options.base or [relatives.train_base(lungs=options.lungs)]
    about = {
        "folds": len(pairs),
        **said(options.made),
        "size_px": options.sizes or PREPROCESS.size_px,
        "views": VIEWS,
    }
    if options.frame:
        rows = [
            {"hidden": part, **row}
            for part in PARTS
            for pixels in [images_of(inside, part)]
            for found in [answers_of(networks_of(bases, pixels), pixels, inside, pairs)]
            for row in judge_answers(found, inside, pairs)
        ]
        write(options.output, "probes_frame", {**about, "rows": rows})
        return
    seen = cropped_to_lungs(inside, relatives.folder / "crops") if options.lungs else inside
    pixels = images_of(seen)
    networks, named = networks_of(bases, pixels), {"folds": "_lungs" if options.lungs else ""}
    if options.warm_up:
        networks = {"warm-up": networks["base"]}
        named = {folds: folds.removeprefix("folds") for folds in options.folds}
    if options.sizes:
        every = answers_of_sizes(networks, options.sizes, inside, pairs)
        named = {folds: f"{suffix}_sizes" for folds, suffix in named.items()}
    else:
        every = [([], answers_of(networks, pixels, inside, pairs))]
    for folds, suffix in named.items():
        trained = answers_of_folds(options.output, inside, folds)
        rows = [
            {**({"size_px": sizes} if sizes else {}), **row}
            for sizes, found in every
            for row in judge_answers(found, inside, pairs, trained)
        ]
        write(options.output, f"probes{suffix}", {**about, "rows": rows})


if __name__ == "__main__":
    main()
