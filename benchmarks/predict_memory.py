"""Peak memory of predict_stream over 10,000 files against 100, each in a process of its own.

Run: python benchmarks/predict_memory.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chestxray_covid import Classifier, ModelConfig, Preprocess, SyntheticChestXray

COUNTS = (100, 10_000)


def measure(model: str, folder: str) -> None:
    start = time.perf_counter()
    count = sum(1 for _ in Classifier.from_pretrained(model).predict_stream([folder]))
    seconds = time.perf_counter() - start
    # ru_maxrss would count the parent's peak too, which a child inherits.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    print(json.dumps({"files": count, "peak_mib": peak, "files_per_s": count / seconds}))


def main() -> None:
    # They import torch, which is none of the memory measured.
    from common import write

    from chestxray_covid import build_densenet121
    from chestxray_covid.checkpoint import save_checkpoint
    from chestxray_covid.models import to_tensors

    with tempfile.TemporaryDirectory() as folder:
        config = ModelConfig(classes=("normal", "covid19"), preprocess=Preprocess(size_px=64))
        save_checkpoint(f"{folder}/model", config, to_tensors(build_densenet121(pretrained=False)))
        phantoms = SyntheticChestXray(100, image_size_px=512)
        for count in COUNTS:
            Path(folder, str(count)).mkdir()
        for i in range(100):
            first = Path(folder, "100", f"{i}.jpg")
            phantoms.image(i).save(first, quality=90)
            for copy in range(COUNTS[1] // 100):
                os.link(first, Path(folder, str(COUNTS[1]), f"{i}-{copy}.jpg"))
        rows = []
        for count in COUNTS:
            command = [sys.executable, __file__, f"{folder}/model", f"{folder}/{count}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout))
    growth = rows[1]["peak_mib"] - rows[0]["peak_mib"]
    write("predict_memory", {"what": "predict_stream", "runs": rows, "growth_mib": growth})


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(*sys.argv[1:])
    else:
        main()
