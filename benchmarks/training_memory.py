"""Peak memory and speed of training with and without gradient checkpointing, on this CPU.

    python benchmarks/training_memory.py

Each setting takes steps in a process of its own, as the trainer does but for the optimizer, round
after round. The growth of its peak memory (VmHWM) from before the first step, the most of all
rounds, is compared with what a forward pass keeps, from which ``largest_batch_size`` reckons; the
speed of a round is that of its median step, the first left out.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

SIZE_PX = 224
PRECISIONS = ("float32", "bfloat16")
BATCHES = (4, 16)
STEPS, ROUNDS = 6, 3


def peak_mib() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def measure(precision: str, batch: int, checkpointed: bool) -> None:
    from chestxray_covid import Preprocess, build_densenet121
    from chestxray_covid.models import normalise
    from chestxray_covid.training_memory import gradient_checkpointing, kept_bytes
    from chestxray_covid.training_speed import faster_on_cpu

    model = build_densenet121(pretrained=False).to(memory_format=torch.channels_last).train()

    def forward(net: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        images = normalise(pixels, Preprocess(size_px=SIZE_PX))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return net(images.contiguous(memory_format=torch.channels_last)).float()

    way = gradient_checkpointing(model) if checkpointed else contextlib.nullcontext()
    with way, faster_on_cpu(model):
        pixels = torch.rand(batch, 1, SIZE_PX, SIZE_PX) * 255
        before, times = peak_mib(), []
        for _ in range(STEPS):
            start = time.perf_counter()
            forward(model, pixels).sum().backward()
            model.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - start)
        step = peak_mib() - before  # before what follows adds to the peak
        two, four = (
            kept_bytes(model, forward, torch.zeros(n, 1, SIZE_PX, SIZE_PX)) for n in (2, 4)
        )
    row = {"precision": precision, "batch": batch, "checkpointed": checkpointed}
    kept = batch * (four - two) / 2 / 2**20
    speed = batch / statistics.median(times[1:])
    row |= {"step_mib": step, "kept_mib": kept, "images_per_s": speed}
    print(json.dumps(row))


def main() -> None:
    from common import write

    settings = list(itertools.product(PRECISIONS, BATCHES, (0, 1)))
    found: dict[tuple[str, int, int], list[dict[str, float]]] = {key: [] for key in settings}
    for key in tqdm(settings * ROUNDS, unit="process"):
        command = [sys.executable, __file__, *map(str, key)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[key].append(json.loads(done.stdout))
    rows = [
        {
            **rounds[0],
            "step_mib": max(row["step_mib"] for row in rounds),
            "images_per_s": [row["images_per_s"] for row in rounds],
        }
        for rounds in found.values()
    ]
    what = (
        "forward and backward pass; step_mib is the growth of the process's peak, "
        "kept_mib what the forward pass keeps, images_per_s by round"
    )
    write("training_memory", {"what": what, "size_px": SIZE_PX, "steps": STEPS, "runs": rows})


if __name__ == "__main__":
    if len(sys.argv) == 4:
        measure(sys.argv[1], int(sys.argv[2]), bool(int(sys.argv[3])))
    else:
        main()
