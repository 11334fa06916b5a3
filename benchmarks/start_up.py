"""How long a process takes from nothing to one prediction, and in how much memory.

    CHESTXRAY_COVID_DATA=../shared/data python benchmarks/start_up.py

needs ``pip install "chestxray-covid[bench]"`` and takes two minutes. Whole processes are timed, as
a shell sees them: ``chestxray-covid predict one.png``, a radiograph of Hannover's, with every
engine, with no compiled model in the cache and with one, and beside them a Python that imports
torch or OpenVINO alone, or nothing, or loads the bundled weights. All are run in turn, so that what
slows the machine slows all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROUNDS = 7
BARE = {
    "Python alone": "pass",
    "import torch": "import torch",
    "import openvino": "import openvino",
}
#: What loads the bundled weights, and judges nothing.
LOADED = "from chestxray_covid import Classifier; Classifier.from_pretrained(engine='openvino')"
#: What a row is called → options of the command.
ENGINES = {
    "auto": [],
    "OpenVINO, int8": ["--engine", "openvino", "--precision", "int8"],
    "ONNX Runtime": ["--engine", "onnx"],
    "torch": ["--engine", "torch"],
}


def run(command: list[str], cache: str) -> dict[str, float]:
    """Return wall-clock seconds and peak memory of a process that is waited for."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**os.environ, "CHESTXRAY_COVID_CACHE": cache},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)  # it is gone: nobody has to wait again
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {process.returncode}.")
    # A peak counts what this process had when it started the other: no torch is imported yet.
    return {"seconds": seconds, "peak_mib": used.ru_maxrss / 1024}


def measure(radiograph: Path) -> dict[str, list[dict[str, float]]]:
    """Return what every process took, round by round."""
    found: dict[str, list[dict[str, float]]] = {}
    predict = [str(Path(sys.executable).with_name("chestxray-covid")), "predict", str(radiograph)]
    for _ in tqdm(range(ROUNDS), unit="round"):
        with tempfile.TemporaryDirectory() as cache:
            for name, code in BARE.items():
                found.setdefault(name, []).append(run([sys.executable, "-c", code], cache))
            for when in ("first", "again"):
                row = run([sys.executable, "-c", LOADED], f"{cache}/loaded")
                found.setdefault(f"from_pretrained() in OpenVINO, {when}", []).append(row)
            for name, options in ENGINES.items():
                for when in ("first", "again"):
                    row = run([*predict, *options], cache)
                    found.setdefault(f"{name}, {when}", []).append(row)
    return found


def main() -> None:
    data = Path(os.environ["CHESTXRAY_COVID_DATA"])
    radiograph = min((data / "covid-19-image-repository").rglob("*.png"))
    rounds = measure(radiograph)
    from chestxray_covid import Classifier

    engine = Classifier.from_pretrained().engine
    from common import write  # which imports torch

    auto = f"{engine.name}, {engine.precision}"
    write("start_up", {"command": "python benchmarks/start_up.py", "auto": auto, "rounds": rounds})


if __name__ == "__main__":
    main()
