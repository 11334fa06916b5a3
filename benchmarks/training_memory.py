"""Peak memory and speed of training with and without gradient checkpointing, on this CPU.

    python benchmarks/training_memory.py

Each setting trains in a process of its own; the growth of its peak memory (VmHWM) from before the
first step is compared with what a forward pass keeps, from which ``largest_batch_size`` reckons.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

SIZE_PX = 224
PRECISIONS = ("float32", "bfloat16")
BATCHES = (4, 16)
STEPS = 5


def peak_mib() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def measure(precision: str, batch: int, checkpointed: bool) -> None:
    from chestxray_covid import Preprocess, build_densenet121
    from chestxray_covid.models import normalise
    from chestxray_covid.training_memory import gradient_checkpointing, kept_bytes

    model = build_densenet121(pretrained=False).to(memory_format=torch.channels_last).train()

    def forward(net: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        images = normalise(pixels, Preprocess(size_px=SIZE_PX))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return net(images.contiguous(memory_format=torch.channels_last)).float()

    with gradient_checkpointing(model) if checkpointed else contextlib.nullcontext():
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
    row |= {"step_mib": step, "kept_mib": kept, "images_per_s": batch / min(times)}
    print(json.dumps(row))


def main() -> None:
    from common import write

    rows = []
    for precision, batch, checkpointed in itertools.product(PRECISIONS, BATCHES, (0, 1)):
        command = [sys.executable, __file__, precision, str(batch), str(checkpointed)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout))
    what = (
        "forward and backward pass; step_mib is the growth of the process's peak, "
        "kept_mib what the forward pass keeps"
    )
    write("training_memory", {"what": what, "size_px": SIZE_PX, "steps": STEPS, "runs": rows})


if __name__ == "__main__":
    if len(sys.argv) == 4:
        measure(sys.argv[1], int(sys.argv[2]), bool(int(sys.argv[3])))
    else:
        main()
