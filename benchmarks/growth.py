"""How time and memory grow with the number of files: predictions, a manifest, a split.

    python benchmarks/growth.py tables                        # manifest and split, 1,000,000 rows
    python benchmarks/growth.py predict --data FOLDER         # 1,000, 10,000 and 100,000 files
    python benchmarks/growth.py predict --data FOLDER --counts 1000,10000

Each number comes from a process of its own: wall-clock time, processor time, and the peak of its
memory (VmHWM). ``predict`` links real files into a folder per count and judges them with the
bundled model through ``predict_files``. What the other command measured stays in the result, if it
was on the same processor.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COUNTS = (1_000, 10_000, 100_000)
ROWS = (10_000, 100_000, 1_000_000)
NAME = "growth"


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """Return time and peak memory of this process, of which ``work`` is the last thing."""
    start, used = time.perf_counter(), time.process_time()
    work()
    seconds, busy = time.perf_counter() - start, time.process_time() - used
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    return {"seconds": seconds, "processor_seconds": busy, "peak_mib": peak}


def in_process(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write_manifest(folder: Path, rows: int) -> Path:
    """Write a manifest of files that exist, two per patient, with hashes; some are copies."""
    for name in range(rows // 1000):
        (folder / f"{name}").mkdir()
        (folder / f"{name}" / "0.png").touch()
        for number in range(1, 1000):
            os.link(folder / f"{name}" / "0.png", folder / f"{name}" / f"{number}.png")
    table = folder / "manifest.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "patient_id", "source", "view", "content_hash"])
        for i in range(rows):
            label = "covid19" if i // 2 % 5 == 0 else "normal"
            content = hashlib.blake2b(str(max(0, i - (i % 1000 == 0))).encode(), digest_size=16)
            place = f"{i // 1000}/{i % 1000}.png"
            source = f"hospital{i // 2 % 7}"
            writer.writerow([place, label, f"p{i // 2}", source, "PA", content.hexdigest()])
    return table


def open_manifest(table: str) -> None:
    from chestxray_covid import ManifestDataset

    print(json.dumps(measured(lambda: ManifestDataset(table))))


def split_manifest(table: str) -> None:
    from chestxray_covid import ManifestDataset, split_by_patient

    dataset = ManifestDataset(table)
    print(json.dumps(measured(lambda: split_by_patient(dataset, find_copies=False))))


def predict(folder: str, output: str) -> None:
    from chestxray_covid import Classifier, predict_files

    def work() -> None:
        predict_files(folder, output, classifier=Classifier.from_pretrained())

    print(json.dumps(measured(work)))


def tables() -> dict[str, Any]:
    found: dict[str, Any] = {"manifest": [], "split": []}
    for rows in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            table = write_manifest(Path(folder), rows)
            found["manifest"].append({"count": rows, **in_process("open", table)})
            found["split"].append({"count": rows, **in_process("split", table)})
    return found


def predictions(data: Path, counts: list[int]) -> dict[str, Any]:
    files = sorted(p for p in data.rglob("*") if p.suffix in (".png", ".jpg", ".jpeg"))
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            for i in range(count):
                place = Path(folder, "images", f"{i // 1000}", f"{i}{files[i % len(files)].suffix}")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(files[i % len(files)].resolve())
            images, output = Path(folder, "images"), Path(folder, "out.csv")
            rows.append({"count": count, **in_process("judge", images, output)})
            print(rows[-1])
    return {"predict": rows, "predict_files": len(files)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["tables", "predict"])
    parser.add_argument("--data", type=Path, help="folder of real radiographs")
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)))
    options = parser.parse_args()
    if options.what == "predict" and options.data is None:
        parser.error("predict needs --data")
    if options.what == "tables":
        found = tables()
    else:
        found = predictions(options.data, [int(n) for n in options.counts.split(",")])
    # It imports torch, which is none of the memory measured.
    from common import RESULTS, machine, write

    place = RESULTS / f"{NAME}.json"
    before = json.loads(place.read_text()) if place.is_file() else {}
    measured_on, here = before.pop("machine", {}), machine()
    # One machine is named for all of it, so that what another one measured cannot stay.
    same = all(measured_on.get(key) == here[key] for key in ("processor", "units", "cores"))
    write(NAME, {**(before if same else {}), **found})


if __name__ == "__main__":
    single = {"open": open_manifest, "split": split_manifest, "judge": predict}
    if len(sys.argv) > 2 and sys.argv[1] in single:
        single[sys.argv[1]](*sys.argv[2:])
    else:
        main()
