"""Peak memory and speed of training with and without gradient checkpointing, on this CPU.

    python benchmarks/training_memory.py

Each setting trains in a process of its own; its peak memory (VmHWM) is compared with that of the
same process before the first step, and with what ``largest_batch_size`` expects.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

SIZE_PX = 224
BATCHES = (4, 16)
STEPS = 3


def peak_mib() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def measure(batch: int, checkpointed: bool) -> None:
    import contextlib

    from chestxray_covid import Preprocess, build_densenet121
    from chestxray_covid.models import normalise
    from chestxray_covid.training_memory import gradient_checkpointing, largest_batch_size

    model = build_densenet121(pretrained=False).to(memory_format=torch.channels_last).train()

    def forward(net: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        images = normalise(pixels, Preprocess(size_px=SIZE_PX))
        return net(images.contiguous(memory_format=torch.channels_last))

    with gradient_checkpointing(model) if checkpointed else contextlib.nullcontext():
        options = {"size_px": SIZE_PX, "limit": 1 << 20, "memory_bytes": 1 << 33}
        fits = largest_batch_size(model, forward, **options)
        pixels = torch.rand(batch, 1, SIZE_PX, SIZE_PX) * 255
        before, times = peak_mib(), []
        for _ in range(STEPS):
            start = time.perf_counter()
            forward(model, pixels).sum().backward()
            model.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - start)
    row = {"batch": batch, "checkpointed": checkpointed, "step_mib": peak_mib() - before}
    print(json.dumps({**row, "images_per_s": batch / min(times), "fits_in_8_gib": fits}))


def main() -> None:
    from common import write

    rows = []
    for batch in BATCHES:
        for checkpointed in (False, True):
            command = [sys.executable, __file__, str(batch), str(int(checkpointed))]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout))
    what = "float32, forward and backward pass; step_mib is the growth of the process's peak"
    write("training_memory", {"what": what, "size_px": SIZE_PX, "steps": STEPS, "runs": rows})


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(int(sys.argv[1]), bool(int(sys.argv[2])))
    else:
        main()
