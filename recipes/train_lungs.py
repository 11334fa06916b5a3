"""Train the lung segmenter on Cohen's annotated masks and measure it on held-out patients.

    python recipes/train_lungs.py --data ../shared/data --output runs/lungs

writes ``lungs.safetensors`` and ``lungs.json`` (with the measured agreement) and a sheet of
overlays from every source, to be looked at, into the output folder.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from collection import count_by_licence, forbids_derivatives, open_sources
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name
from tqdm import trange

from chestxray_covid import ChestXrayDataset, CohenCovidDataset, Preprocess, lung_mask
from chestxray_covid.datasets.base import LABELS
from chestxray_covid.engine_torch import native_bfloat16
from chestxray_covid.files import read_json
from chestxray_covid.intervals import bootstrap_by_group
from chestxray_covid.lung_maps import SIZE_PX
from chestxray_covid.lung_network import LungNetwork
from chestxray_covid.lungs import draw_masks, load_network, save_network
from chestxray_covid.splits import split_by_patient

STEPS, BATCH, RATE = 1600, 8, 3e-3


def annotated(data: Path) -> ChestXrayDataset:
    """Return Cohen's frontal radiographs that have a mask and whose licence allows derivatives."""
    cohen = CohenCovidDataset(data / "covid-chestxray-dataset", classes=(*LABELS, "other"))
    return cohen.filter(lambda s: "lung_mask" in s.metadata and not forbids_derivatives(s))


def load_pairs(dataset: ChestXrayDataset) -> tuple[Tensor, Tensor]:
    """Return ``(N, 1, S, S)`` images in [0, 1] and masks in [0, 1], squashed alike."""
    preprocess = Preprocess(size_px=SIZE_PX)
    images = np.stack([preprocess(dataset.image(i)) for i in range(len(dataset))])
    masks = [Image.fromarray(full_mask(dataset, i)).convert("L") for i in range(len(dataset))]
    size = (SIZE_PX, SIZE_PX)
    small = [np.asarray(m.resize(size, Image.Resampling.BILINEAR))[None] for m in masks]
    return torch.from_numpy(images).float() / 255, torch.from_numpy(np.stack(small)).float() / 255


def full_mask(dataset: ChestXrayDataset, index: int) -> np.ndarray:
    """Return the annotated mask of a sample, ``(H, W)`` bool."""
    mask = lung_mask(dataset.samples[index])
    assert mask is not None
    return mask


def vary(images: Tensor, masks: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Move, stretch, mirror and expose a batch anew; masks move along."""
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=rng) * (high - low) + low

    angle, scale = uniform(-15, 15) * math.pi / 180, uniform(-0.4, 0.45).exp()
    stretch, flip = uniform(-0.25, 0.25).exp(), torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [
        torch.stack([cos * stretch * flip, -sin, uniform(-0.25, 0.25)], 1),
        torch.stack([sin * flip, cos / stretch, uniform(-0.25, 0.25)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    # Half of the images end in black, as films and letterboxes do, half in their own border.
    black = (uniform(0, 1) < 0.5)[:, None, None, None]
    moved = torch.where(
        black,
        F.grid_sample(images, grid, align_corners=False),
        F.grid_sample(images, grid, padding_mode="border", align_corners=False),
    )
    moved_masks = F.grid_sample(masks, grid, align_corners=False)
    shape = (n, 1, 1, 1)
    x = moved.clamp(0, 1) ** uniform(-0.7, 0.7).exp().view(shape)
    x = (x - 0.5) * uniform(0.5, 1.6).view(shape) + 0.5 + uniform(-0.2, 0.2).view(shape)
    blurred = F.avg_pool2d(x, 3, 1, 1)
    x = torch.where((uniform(0, 1) < 0.3)[:, None, None, None], blurred, x)
    x = x + torch.randn(x.shape, generator=rng) * uniform(0, 0.06).view(shape)
    return x.clamp(0, 1), moved_masks


def train(images: Tensor, masks: Tensor, *, steps: int, seed: int = 0) -> LungNetwork:
    """Train a network and return it with the average of its late weights, in ``eval()`` mode."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    network = LungNetwork().to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99), use_buffers=True
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for step in (bar := trange(steps, desc="lungs")):
        chosen = torch.randint(len(images), (BATCH,), generator=rng)
        x, y = vary(images[chosen], masks[chosen], rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=native_bfloat16(torch.device("cpu"))):
            logits = network(x.contiguous(memory_format=torch.channels_last)).float()
        p = logits.sigmoid()
        overlap = 2 * (p * y).sum((1, 2, 3)) + 1
        dice = overlap / ((p + y).sum((1, 2, 3)) + 1)
        loss = F.binary_cross_entropy_with_logits(logits, y) + (1 - dice).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        average.update_parameters(network)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    kept: LungNetwork = average.module
    return kept.eval()


def dice_scores(network: LungNetwork, dataset: ChestXrayDataset) -> np.ndarray:
    """Return the Dice coefficient of each annotated image, at the image's own size."""
    scores = []
    masks = draw_masks(network, (dataset.image(i) for i in range(len(dataset))))
    for i, mask in enumerate(masks):
        truth = full_mask(dataset, i)
        scores.append(2 * (mask & truth).sum() / max(1, mask.sum() + truth.sum()))
    return np.array(scores)


def mean_score(scores: np.ndarray, *, sample_weight: np.ndarray) -> np.ndarray:
    """Return the weighted mean per resample, as the bootstrap wants it."""
    return (sample_weight * scores).sum(1) / sample_weight.sum(1)


def draw_sheet(network: LungNetwork, data: Path, path: Path, *, per_source: int = 12) -> None:
    """Draw outlines of the lungs over radiographs of every source, one source and label a row."""
    everything = open_sources(data)
    rng = np.random.default_rng(7)
    cells: dict[tuple[str, str], list[int]] = {}
    for i in rng.permutation(len(everything)).tolist():
        sample = everything.samples[i]
        row = cells.setdefault((sample.source, sample.label), [])
        if len(row) < per_source:
            row.append(i)
    rows = [_row(network, everything, indices) for _, indices in sorted(cells.items())]
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
    Image.fromarray(np.concatenate(padded)).save(path)


def _row(network: LungNetwork, dataset: ChestXrayDataset, indices: Sequence[int]) -> np.ndarray:
    show, tiles = Preprocess(size_px=160), []
    images = [dataset.image(i) for i in indices]
    for image, full in zip(images, draw_masks(network, images), strict=True):
        mask = np.asarray(Image.fromarray(full).resize((160, 160)))
        tile = np.repeat(show(image)[0][:, :, None], 3, 2)
        inner = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2]
        edge = mask.copy()
        edge[1:-1, 1:-1] &= ~(inner & mask[1:-1, 2:])
        tile[edge] = (255, 60, 60)
        tiles.append(tile)
    return np.concatenate(tiles, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/lungs"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--measure-only", action="store_true", help="Judge trained weights again.")
    options = parser.parse_args()
    dataset = annotated(options.data)
    split = split_by_patient(dataset, val=0, test=0.25, seed=0)
    path = options.output / "lungs.safetensors"
    if not options.measure_only:
        images, masks = load_pairs(split.train)
        network = train(images, masks, steps=options.steps)
        save_network(path, network, {"steps": options.steps})
    network = load_network(path)  # measured as it is shipped, in half precision
    scores = dice_scores(network, split.test)
    patients = [s.patient_id for s in split.test.samples]
    estimate = bootstrap_by_group(mean_score, patients, scores)
    about = {
        "dice": estimate.to_dict(),
        "dice_quantiles": np.quantile(scores, [0, 0.1, 0.25, 0.5]).round(4).tolist(),
        "train_images": len(split.train),
        "test_images": len(split.test),
        "test_patients": len(set(patients)),
        "train_licences": count_by_licence(split.train),
        "steps": read_json(path.with_suffix(".json"))["steps"],
    }
    save_network(path, network, about)
    draw_sheet(network, options.data, options.output / "overlays.png")
    print(f"Dice {estimate}; worst and quantiles {about['dice_quantiles']}")


if __name__ == "__main__":
    main()
