"""From files to probabilities: this library's engines and five peers, in one run.

    CHESTXRAY_COVID_DATA=../shared/data python benchmarks/predict.py

needs ``pip install "chestxray-covid[bench]"`` and a quiet machine, and takes some 20 minutes on two
cores; ``--quick`` takes 16 files and one round, to see that everything runs. All compute a
DenseNet-121 at 224 px, the peers in float32 and with their documented transforms, each in a process
of its own.
Every round runs all of them once, so that a machine that slows down slows all; the figure is the
median over the rounds. Peers that load in worker processes are given one per core; the memory of
these workers is not counted. Times begin after the model is loaded and has seen 16 files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

SIZE_PX, BATCH, ROUNDS, REDUCED = 224, 16, 3, 400
FOLDERS = ("covid-chestxray-dataset", "chest_xray", "nih-subset", "covid-19-image-repository")
#: A function from paths to the number of them that were judged.
Judge = Callable[[Sequence[str]], int]


# ---------------------------------------------------------------- peers


def _eager(model: Any, batches: Iterable[Any]) -> int:
    import torch

    with torch.inference_mode():
        return sum(len(model(batch).softmax(1)) for batch in batches)


def _loaded(paths: Sequence[str], read: Callable[[str], Any], loader: Any) -> Any:
    """Return batches from worker processes, one per core."""

    class Files:
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> Any:
            return read(paths[index])

    return loader(Files(), batch_size=BATCH, num_workers=len(os.sched_getaffinity(0)))


def _rgb(path: str) -> Any:
    from PIL import Image

    return Image.open(path).convert("RGB")


def torchvision(_: str) -> Judge:
    import torchvision
    from torch.utils.data import DataLoader

    model = torchvision.models.densenet121(weights=None, num_classes=3).eval()
    transform = torchvision.models.DenseNet121_Weights.IMAGENET1K_V1.transforms()
    return lambda paths: _eager(model, _loaded(paths, lambda p: transform(_rgb(p)), DataLoader))


def torchvision_one_by_one(_: str) -> Judge:
    import torchvision

    model = torchvision.models.densenet121(weights=None, num_classes=3).eval()
    transform = torchvision.models.DenseNet121_Weights.IMAGENET1K_V1.transforms()
    return lambda paths: _eager(model, (transform(_rgb(path))[None] for path in paths))


def timm(_: str) -> Judge:
    import timm
    from torch.utils.data import DataLoader

    model = timm.create_model("densenet121", pretrained=False, num_classes=3).eval()
    data = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**data, is_training=False)
    return lambda paths: _eager(model, _loaded(paths, lambda p: transform(_rgb(p)), DataLoader))


def transformers(checkpoint: str) -> Judge:
    from transformers import pipeline

    judge = pipeline("image-classification", model=checkpoint)
    return lambda paths: len(judge(list(paths), batch_size=BATCH))


def monai(_: str) -> Judge:
    from monai.data import DataLoader, PILReader
    from monai.networks.nets import DenseNet121
    from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Resize, ScaleIntensity

    model = DenseNet121(spatial_dims=2, in_channels=1, out_channels=3).eval()
    reader = PILReader(converter=lambda image: image.convert("L"))
    size = (SIZE_PX, SIZE_PX)
    steps = [LoadImage(reader, image_only=True), EnsureChannelFirst(), ScaleIntensity()]
    transform = Compose([*steps, Resize(size)])
    return lambda paths: _eager(model, _loaded(paths, transform, DataLoader))


def torchxrayvision(_: str) -> Judge:
    import skimage.io
    import torch
    import torchxrayvision as xrv

    model = xrv.models.DenseNet(num_classes=3, in_channels=1).eval()
    steps = [xrv.datasets.XRayCenterCrop(), xrv.datasets.XRayResizer(SIZE_PX)]

    def read(path: str) -> Any:  # as its script process_image.py
        image = xrv.datasets.normalize(skimage.io.imread(path), 255)
        image = image[:, :, :3].mean(2) if image.ndim > 2 else image
        image = image[None]
        for step in steps:
            image = step(image)
        return torch.from_numpy(image)[None].float()

    return lambda paths: _eager(model, map(read, paths))


# ---------------------------------------------------------------- this library


def ours(engine: str, precision: str) -> Callable[[str], Judge]:
    def make(checkpoint: str) -> Judge:
        from chestxray_covid import Classifier

        classifier = Classifier.from_pretrained(checkpoint, engine=engine, precision=precision)
        return lambda paths: sum(1 for _ in classifier.predict_stream(paths, batch_size=BATCH))

    return make


def bare(checkpoint: str) -> Judge:
    """OpenVINO on pixels that are in memory already; of the paths it takes the number."""
    import numpy as np

    from chestxray_covid.checkpoint import load_checkpoint
    from chestxray_covid.datasets.loading import map_ahead
    from chestxray_covid.engine_openvino import native_precision
    from chestxray_covid.engines import open_engine

    config, tensors = load_checkpoint(checkpoint)
    engine = open_engine(config, tensors, engine="openvino", precision=native_precision())
    shape = (BATCH, 1, SIZE_PX, SIZE_PX)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def judge(paths: Sequence[str]) -> int:
        sizes = [len(paths[k : k + BATCH]) for k in range(0, len(paths), BATCH)]
        results = map_ahead(lambda n: engine(pixels[:n]), sizes, workers=2, ahead=3)
        return sum(len(logits) for logits, _ in results)

    return judge


PEERS: dict[str, Callable[[str], Judge]] = {
    "torchvision + DataLoader": torchvision,
    "torchvision, one by one": torchvision_one_by_one,
    "timm + DataLoader": timm,
    "Hugging Face pipeline": transformers,
    "MONAI": monai,
    "TorchXRayVision": torchxrayvision,
}
INT8 = "OpenVINO, int8"
OURS: dict[str, Callable[[str], Judge]] = {
    "OpenVINO, bfloat16": ours("openvino", "bfloat16"),
    INT8: ours("openvino", "int8"),
    "OpenVINO, float32": ours("openvino", "float32"),
    "ONNX Runtime, float32": ours("onnx", "float32"),
    "torch, bfloat16": ours("torch", "bfloat16"),
}
BARE = "bare engine"
ALL = {**PEERS, **OURS, BARE: bare}


def names() -> list[str]:
    """Return what is compared here: bfloat16 only where the processor computes in it."""
    from chestxray_covid.engine_openvino import native_precision

    native = native_precision() == "bfloat16"
    return [name for name in ALL if native or "bfloat16" not in name]


# ---------------------------------------------------------------- single images


def latency(checkpoint: str, path: str, count: int) -> dict[str, list[float]]:
    """Return milliseconds of single calls, alternating, so that all see the same machine."""
    import torch
    import torchvision

    from chestxray_covid import Classifier
    from chestxray_covid.engine_openvino import native_precision

    precision = native_precision()
    classifier = Classifier.from_pretrained(checkpoint, engine="openvino", precision=precision)
    pixels = classifier.config.preprocess(path)[None]
    classifier.engine(pixels.repeat(BATCH, 0))  # as a service may have had many images at once
    plain = torchvision.models.densenet121(weights=None, num_classes=3).eval()
    batch = torch.zeros(1, 3, SIZE_PX, SIZE_PX)
    one_by_one = torchvision_one_by_one("")

    def eager() -> None:
        with torch.inference_mode():
            plain(batch)

    calls: dict[str, Callable[[], Any]] = {
        "torchvision eager": eager,
        "engine": lambda: classifier.engine(pixels),
        "torchvision eager, from the file": lambda: one_by_one([path]),
        "Classifier.predict, from the file": lambda: classifier.predict(path),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(count + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_number >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


# ---------------------------------------------------------------- running all


def measure(name: str, checkpoint: str, paths: Sequence[str]) -> dict[str, Any]:
    """Return files per second, seconds to load, and peak memory of this process."""
    start = time.perf_counter()
    judge = ALL[name](checkpoint)
    loaded = time.perf_counter()
    judge(paths[:BATCH])
    begun = time.perf_counter()
    count = judge(paths)
    seconds = time.perf_counter() - begun
    if count != len(paths):
        raise SystemExit(f"{name} judged {count} of {len(paths)} files")
    # ru_maxrss would count the parent's peak too, which a child inherits.
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    return {"files_per_s": count / seconds, "load_s": loaded - start, "peak_mib": peak}


def in_new_process(*arguments: str) -> Any:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments[:2])} failed")
    return json.loads(done.stdout.splitlines()[-1])


def files(data: Path) -> dict[str, list[str]]:
    """Return the untouched originals, and files of all sources that were reduced."""
    names = [line for line in (data / "originals.txt").read_text().splitlines() if line]
    others = sorted(
        str(path)
        for folder in FOLDERS
        for path in (data / folder).rglob("*")
        if path.suffix.lower() in (".jpg", ".jpeg", ".png")
        and "annotations" not in path.parts
        and str(path.relative_to(data)) not in names
    )
    step = max(1, len(others) // REDUCED)
    return {
        "originals": [str(data / name) for name in names],
        "reduced": others[::step][:REDUCED],
    }


def make_checkpoint(folder: str) -> None:
    """Write the bundled weights as a checkpoint of the peers' size.

    The statistics of eight bits stay those of the bundled size: they change answers, not speed.
    """
    from chestxray_covid.checkpoint import load_attachment, load_checkpoint, save_checkpoint
    from chestxray_covid.gate import GATE_NAME
    from chestxray_covid.hub import resolve
    from chestxray_covid.int8 import INT8_NAME

    config, tensors = load_checkpoint(resolve())
    larger = replace(config, preprocess=replace(config.preprocess, size_px=SIZE_PX))
    found = {name: load_attachment(resolve(), config, name) for name in (GATE_NAME, INT8_NAME)}
    kept = {name: data for name, data in found.items() if data is not None}
    save_checkpoint(folder, larger, tensors, kept)


def summary(rows: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Return medians over the rounds, and the ratios that the goals are about."""
    found: dict[str, Any] = {}
    for kind, by_name in rows.items():
        rates = {
            name: statistics.median(run["files_per_s"] for run in runs)
            for name, runs in by_name.items()
        }
        peaks = {name: max(run["peak_mib"] for run in runs) for name, runs in by_name.items()}
        # The bare engine is OpenVINO's, so the share is that of the same engine.
        exact = [name for name in rates if name.startswith("OpenVINO") and name != INT8]
        best = max(exact, key=lambda name: rates[name])
        fastest_peer = max(rates[name] for name in PEERS)
        found[kind] = {
            "files_per_s": rates,
            "peak_mib": peaks,
            "fastest_engine": best,
            "times_the_fastest_peer": rates[best] / fastest_peer,
            "int8_times_the_fastest_peer": rates[INT8] / fastest_peer,
            "share_of_the_bare_engine": rates[best] / rates[BARE],
            "peak_over_smallest_peer": peaks[best] / min(peaks[name] for name in PEERS),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="16 files, one round, no result")
    options = parser.parse_args()
    data = Path(os.environ["CHESTXRAY_COVID_DATA"]).resolve()
    rounds, most = (1, BATCH) if options.quick else (options.rounds, None)
    sets = {kind: paths[:most] for kind, paths in files(data).items()}
    compared = names()
    rows: dict[str, dict[str, list[Any]]] = {k: {name: [] for name in compared} for k in sets}
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder)
        for kind, paths in sets.items():
            Path(folder, f"{kind}.json").write_text(json.dumps(paths), encoding="utf-8")
        for number in range(rounds):
            for kind in sets:
                for name in compared:
                    run = in_new_process("--run", name, folder, str(Path(folder, f"{kind}.json")))
                    rows[kind][name].append(run)
                    print(f"{number + 1} {kind} {name}: {run['files_per_s']:.1f}/s", flush=True)
        single = in_new_process("--latency", folder, sets["originals"][0], "5" if most else "30")
    result = {
        "command": "python benchmarks/predict.py",
        "size_px": SIZE_PX,
        "batch_size": BATCH,
        "cores": len(os.sched_getaffinity(0)),
        "files": {kind: len(paths) for kind, paths in sets.items()},
        "summary": summary(rows),
        "latency_ms": {name: statistics.median(times) for name, times in single.items()},
        "rounds": rows,
        "single_calls_ms": single,
    }
    if options.quick:
        print(json.dumps({**result["summary"], "latency_ms": result["latency_ms"]}, indent=1))
        return
    from common import named_by_processor, write

    write(named_by_processor("predict"), result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        _, _, wanted, model, listed = sys.argv
        print(json.dumps(measure(wanted, model, json.loads(Path(listed).read_text()))))
    elif sys.argv[1:2] == ["--latency"]:
        print(json.dumps(latency(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
    else:
        main()
