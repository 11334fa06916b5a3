"""Training on a GPU: the trainer against a plain loop and the settings of timm's training script.

Every row trains DenseNet-121 from random weights at 224 px on the same number of Kermany's
radiographs per epoch. An epoch is timed from before its first batch is asked for until the device
has done its last step; validation and saved states lie outside. The first epoch warms up; then
rounds of one epoch of each row alternate. The trainer's epochs are steered from its callback, in a
thread per run, so that they can alternate with the others.
Run: CHESTXRAY_COVID_DATA=DATA python benchmarks/training_gpu.py
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import torch
from torch.utils.flop_counter import FlopCounterMode
from training_gpu_rows import (
    PREPROCESS,
    SIZE_PX,
    Row,
    Setup,
    TrainerRow,
    Window,
    cache,
    plain,
    prepared,
    timm_loop,
)

from chestxray_covid import KermanyPneumoniaDataset, build_densenet121, split_by_patient
from chestxray_covid.datasets.loading import cached_decoder

#: Side of the square matrices whose product in bfloat16 is the peak that shares are taken of.
PEAK_SIZE = 8192

Maker = Callable[[Setup], Row]


def makers(batch: int, large: int) -> dict[str, Maker]:
    """Return how to make each row, the most wanted first."""

    def own(size: int, backend: str | None = None) -> Maker:
        return lambda setup: TrainerRow(setup=setup, batch=size, compile_backend=backend)

    return {
        "plain": lambda setup: plain(setup, batch),
        "plain, prepared": lambda setup: prepared(setup, batch),
        "timm": lambda setup: timm_loop(setup, batch),
        "trainer": own(batch),
        "trainer, compiled": own(batch, "inductor"),
        "timm, compiled": lambda setup: timm_loop(setup, batch, compiled=True),
        f"trainer, batch {large}": own(large),
        f"timm, batch {large}": lambda setup: timm_loop(setup, large),
        f"trainer, compiled, batch {large}": own(large, "inductor"),
    }


def say(text: str, begun: float) -> None:
    print(f"{time.perf_counter() - begun:6.1f} s  {text}", file=sys.stderr, flush=True)


def warmed(
    chosen: dict[str, Maker], setup: Setup, optional: set[str], skip_after_s: float
) -> tuple[dict[str, Row], dict[str, str]]:
    """Return the rows after an epoch each, and why others were left out."""
    rows: dict[str, Row] = {}
    left_out: dict[str, str] = {}
    begun = time.perf_counter()
    for name, make in chosen.items():
        if name in optional and time.perf_counter() - begun > skip_after_s:
            left_out[name] = f"warming up had taken {skip_after_s:.0f} s already"
            continue
        try:
            start = time.perf_counter()
            row = make(setup)
            row.run()
        except Exception as error:  # what failed is in the result, and the other rows are, too
            left_out[name] = f"{type(error).__name__}: {error}"[:500]
            say(f"{name} is left out: {left_out[name]}", begun)
            continue
        row.warm_up_s = time.perf_counter() - start
        rows[name] = row
        say(f"{name}: warm", begun)
    return rows, left_out


def idle(row: Row) -> dict[str, Any] | None:
    """Return how long the device had nothing to do, of a profiled window and of a whole epoch."""
    if row.setup.device.type != "cuda" or not isinstance(row, TrainerRow):
        return None
    row.window = Window(row.setup, row.steps)
    row.run()
    found, row.window = row.window.found, None
    if found is None:
        return None
    per_step = found["busy_s"] / found["steps"]
    return {
        **found,
        "profiled": 1 - found["busy_s"] / found["seconds"],
        "epoch": 1 - per_step * row.steps / statistics.median(row.seconds),
    }


def flops_per_image() -> float:
    """Return the floating-point operations of a step for one image, forward and backward."""
    model = build_densenet121(pretrained=False, seed=0)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, SIZE_PX, SIZE_PX)).sum().backward()
    return counter.get_total_flops() / 2


def peak_flops(device: torch.device) -> float | None:
    """Return the measured rate of a product of large bfloat16 matrices, per second."""
    if device.type != "cuda":
        return None
    a, b = (
        torch.randn(PEAK_SIZE, PEAK_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    times = []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return 2 * PEAK_SIZE**3 / statistics.median(times[3:])


def gpu(device: torch.device) -> dict[str, Any] | None:
    """Return what the card is and what drives it."""
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = shutil.which(command[0])
    driver = None
    if found:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        driver = run.stdout.split("\n")[0].strip() or None
    memory = torch.cuda.get_device_properties(device).total_memory
    return {
        "name": torch.cuda.get_device_name(device),
        "memory_gib": memory / 2**30,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def described(row: Row, flops: float, peak: float | None) -> dict[str, Any]:
    """Return a row's numbers."""
    rates = [row.steps * row.batch / seconds for seconds in row.seconds]
    middle = statistics.median(rates)
    found: dict[str, Any] = {
        "batch": row.batch,
        "steps": row.steps,
        "warm_up_s": row.warm_up_s,
        "images_per_s": rates,
        "median": middle,
        "range": [min(rates), max(rates)],
        "share_of_peak": None if peak is None else middle * flops / peak,
    }
    if isinstance(row, TrainerRow):
        found["data_s"] = [r.data_seconds for r in row.records[1 : len(rates) + 1]]
    return found


def large_batch(options: argparse.Namespace) -> int:
    """Return the larger batch, which is an epoch at most."""
    return int(min(options.large_batch_size, options.images))


def setup_from(options: argparse.Namespace, folder: Path) -> Setup:
    """Return the data, split by patient, and what else all rows share."""
    root = Path(os.environ["CHESTXRAY_COVID_DATA"], "chest_xray")
    data = KermanyPneumoniaDataset(root, classes=("normal", "pneumonia"))
    data = data.limit(math.ceil(0.6 * options.images), seed=0)
    split = split_by_patient(data, val=0.1, test=0.0, find_copies=False)
    together = math.lcm(options.batch_size, large_batch(options))
    return Setup(
        device=torch.device(options.device),
        train=split.train,
        val=split.val.limit(32),
        images=max(1, options.images // together) * together,
        rounds=options.rounds,
        workers=options.workers,
        folder=folder,
    )


def options_from(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows, such as 'timm' 'trainer'")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2560, help="of an epoch")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--large-batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=4, help="processes or threads that decode")
    parser.add_argument(
        "--skip-after-s",
        type=float,
        default=240.0,
        help="leave out rows of the large batch that are not warm by then",
    )
    parser.add_argument("--note", metavar="TEXT", help="what else to know, kept in the result")
    parser.add_argument("--output", type=Path, help="folder, instead of benchmarks/results")
    return parser.parse_args(arguments)


def main() -> None:
    options = options_from()
    if options.output is not None:
        common.RESULTS = options.output
    chosen = makers(options.batch_size, large_batch(options))
    optional = {name for name in chosen if "batch" in name}
    if unknown := set(options.only or ()) - set(chosen):
        raise SystemExit(f"No rows {sorted(unknown)}; there are {list(chosen)}.")
    left_out = {n: "not chosen" for n in chosen if options.only and n not in options.only}
    chosen = {n: make for n, make in chosen.items() if n not in left_out}
    about = {"note": options.note, "left_out": left_out}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        measure(setup_from(options, Path(folder)), chosen, optional, options.skip_after_s, about)


def measure(
    setup: Setup,
    chosen: dict[str, Maker],
    optional: set[str],
    skip_after_s: float,
    about: dict[str, Any],
) -> None:
    """Measure the rows and write the result, again once it is known how idle the device was.

    Args:
        setup: What all rows share.
        chosen: Name → how to make a row.
        optional: Names of rows that are left out where time runs short.
        skip_after_s: When that is.
        about: ``note``, and ``left_out`` with rows that were not chosen.
    """
    begun = time.perf_counter()
    cached_decoder(setup.train, PREPROCESS, cache(setup), workers=setup.workers)
    fill_s = time.perf_counter() - begun
    flops, peak = flops_per_image(), peak_flops(setup.device)
    say(f"{len(setup.train)} radiographs are cached", begun)
    rows, left_out = warmed(chosen, setup, optional, skip_after_s)
    for number in range(setup.rounds):
        for row in rows.values():
            row.seconds.append(row.run())
        say(f"round {number + 1} of {setup.rounds}", begun)
    result: dict[str, Any] = {
        "what": "images/s of whole training epochs, DenseNet-121 from random weights",
        "note": about["note"],
        "size_px": SIZE_PX,
        "images": setup.images,
        "radiographs": len(setup.train),
        "rounds": setup.rounds,
        "workers": setup.workers,
        "device": str(setup.device),
        "gpu": gpu(setup.device),
        "timm": common.version("timm") if find_spec("timm") else None,
        "cache_fill_s": fill_s,
        "flops_per_image": flops,
        "peak_flops": peak,
        "rows": {name: described(row, flops, peak) for name, row in rows.items()},
        "left_out": {**left_out, **about["left_out"]},
        "idle": None,
    }
    common.write("training_gpu", result)
    result["idle"] = {
        name: found for name, row in rows.items() if (found := idle(row)) is not None
    } or None
    for row in rows.values():
        row.close()
    result["seconds"] = time.perf_counter() - begun
    common.write("training_gpu", result)


if __name__ == "__main__":
    main()
