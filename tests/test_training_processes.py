"""Several processes train as one does; started as a user starts them, by torchrun or accelerate."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from chestxray_covid import Classifier, SyntheticChestXray
from chestxray_covid.checkpoint import load_checkpoint
from chestxray_covid.training_state import StateStore
from training_worker import TRAIN, VAL, trainer

pytestmark = pytest.mark.slow

WORKER = str(Path(__file__).with_name("training_worker.py"))
LOCAL = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", *LOCAL, "--nproc-per-node"]
#: On CPUs as well: it starts as many processes, and the run's own device says where they compute.
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes"]


def launched(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
        check=False,
    )


def free_port() -> int:
    """Return a port that nobody has; older versions of Accelerate do not choose one themselves."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def compare_with_one_process(count: int, run: Path, notes_in: Path, checkpoint: Path) -> None:
    """Compare what processes did, and the weights in their run, with training in this process."""
    notes = [json.loads((notes_in / f"{rank}.json").read_text()) for rank in range(count)]
    read = Counter(name for note in notes for name in note["read"])
    assert len(read) == VAL
    assert set(read.values()) == {2}, "each once in each of two epochs"
    assert notes[0]["written"]
    assert [note["written"] for note in notes[1:]] == [[]] * (count - 1)
    assert [note["losses"] for note in notes[1:]] == [notes[0]["losses"]] * (count - 1)

    for rank, note in enumerate(notes):
        assert any("gloo" in name for name in note["threads"]), "the processes are connected"
        last = json.loads((notes_in / f"{rank} threads.json").read_text())
        assert not any("gloo" in name for name in last), "Python may abort where one is left"

    alone = trainer(checkpoint, notes_in / "alone", 16, [])
    history = alone.fit()
    losses = [(record.train_loss, record.val_loss) for record in history]
    assert np.allclose(notes[0]["losses"], losses, rtol=1e-6)
    expected = load_checkpoint(notes_in / "alone")[1]
    began = load_checkpoint(checkpoint)[1]
    moved = 0.0
    for name, tensor in load_checkpoint(run)[1].items():
        assert np.abs(tensor - expected[name]).max() <= 1e-6, name
        if "conv" in name:
            moved = max(moved, np.abs(tensor - began[name]).max())
    assert moved > 1e-4, "or nothing was trained"


def test_a_run_outlives_a_refusal_and_a_killed_process_and_goes_on_in_four_as_in_one(
    tmp_path: Path, checkpoint_folder: Path
) -> None:
    run = tmp_path / "run"
    done = launched(*TORCHRUN, 2, WORKER, checkpoint_folder, run, tmp_path, 8, 1, 2)
    assert "SIGKILL" in done.stderr, done.stderr
    for rank in range(2):
        refused = (tmp_path / f"{rank} refused.txt").read_text()
        assert refused.startswith("The processes have different run directories, this one")
        assert "Give all the same one, for example output= of cross_validate" in refused
    assert time.time() - (tmp_path / "killed").stat().st_mtime < 60
    step, tensors, values = StateStore(run).load()
    assert step == 1
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert values["identity"]["batch_size"] == 16
    assert values["at"]["seen"] == 16

    port = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    done = launched(*ACCELERATE, 4, *port, WORKER, checkpoint_folder, run, tmp_path, 4)
    assert done.returncode == 0, done.stderr
    compare_with_one_process(4, run, tmp_path, checkpoint_folder)


def test_two_processes_train_as_one_does(tmp_path: Path, checkpoint_folder: Path) -> None:
    run = tmp_path / "run"
    done = launched(*TORCHRUN, 2, WORKER, checkpoint_folder, run, tmp_path, 8)
    assert done.returncode == 0, done.stderr
    compare_with_one_process(2, run, tmp_path, checkpoint_folder)


def test_the_command_line_trains_in_two_processes_and_speaks_once(tmp_path: Path) -> None:
    phantoms = SyntheticChestXray(TRAIN + VAL, image_size_px=32).save(tmp_path / "phantoms")
    options = ["--no-pretrained", "--epochs", 1, "--size", 32, "--limit", 20]
    command = ["train", "--data", phantoms, "--output", tmp_path / "run", *options]
    done = launched(*TORCHRUN, 2, "-m", "chestxray_covid", *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Best epoch: 1 of 1") == 1
    assert done.stdout.count("Cramér's V") == 1
    names = {p.name for p in (tmp_path / "run").iterdir()}
    results = {"split.json", "confounding.json", "evaluation.json"}
    assert names == results | {"config.json", "model.safetensors", "history.json", "history.csv"}
    training = Classifier.from_pretrained(tmp_path / "run").config.provenance
    assert training["identity"]["batch_size"] == 32, "two times the recipe's sixteen"


@pytest.mark.parametrize("device", [[], ["--device", "cpu"]])
def test_processes_of_a_cluster_that_no_launcher_connects_train_on_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: list[str]
) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")  # as Slurm sets it for the tasks of a job step
    phantoms = SyntheticChestXray(TRAIN + VAL, image_size_px=32).save(tmp_path / "phantoms")
    options = ["--no-pretrained", "--epochs", 1, "--size", 32, "--limit", 20]
    command = ["train", "--data", phantoms, "--output", tmp_path / "run", *options, *device]
    done = launched(sys.executable, "-m", "chestxray_covid", *command)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "evaluation.json").is_file()


#: Says how many processes are connected where torch finds the GPU of a Mac.
ON_MAC = """
import sys
from pathlib import Path

import torch

torch.accelerator.current_accelerator = lambda **options: torch.device("mps")
torch.accelerator.is_available = lambda: True

from chestxray_covid import TrainingConfig
from chestxray_covid.training_processes import open_accelerator

accelerator = open_accelerator(TrainingConfig(), Path("run"))
sys.stdout.write(f"{accelerator.num_processes} processes, {accelerator.state._cpu}\\n")
"""


@pytest.mark.parametrize(("count", "on_cpu"), [(2, True), (1, False)])
def test_processes_on_a_mac_are_connected_on_its_cpu_and_one_alone_keeps_its_gpu(
    count: int, on_cpu: bool, tmp_path: Path
) -> None:
    script = tmp_path / "on_mac.py"
    script.write_text(ON_MAC, encoding="utf-8")
    done = launched(*TORCHRUN, count, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{count} processes, {on_cpu}"] * count


#: Says for how long processes wait for each other.
PATIENT = """
import sys
from pathlib import Path

import torch

connect = torch.distributed.init_process_group


def noting(*arguments, **options):
    sys.stdout.write(f"{options['timeout'].total_seconds()}\\n")
    connect(*arguments, **options)


torch.distributed.init_process_group = noting

from chestxray_covid import TrainingConfig
from chestxray_covid.training_processes import open_accelerator

open_accelerator(TrainingConfig(device="cpu"), Path("run"))
"""


def test_processes_wait_longer_than_a_cache_takes_to_fill(tmp_path: Path) -> None:
    script = tmp_path / "patient.py"
    script.write_text(PATIENT, encoding="utf-8")
    done = launched(*TORCHRUN, 2, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["86400.0"] * 2
