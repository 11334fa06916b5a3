"""From a file to probabilities without what is slow to import; a second start compiles nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chestxray_covid import engine_onnx, engine_openvino
from chestxray_covid.checkpoint import load_checkpoint
from chestxray_covid.classifier import Classifier
from chestxray_covid.engines import Engine, open_engine

SLOW = {"torch", "torchvision", "sklearn", "pandas", "matplotlib", "transformers", "accelerate"}
CODE = """
import json, sys
import chestxray_covid
from chestxray_covid.cli import main
main(sys.argv[1:], standalone_mode=False)
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def radiograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start") / "one.png"
    grey = np.random.default_rng(0).integers(0, 256, (90, 80), dtype=np.uint8)
    Image.fromarray(grey).save(path)
    return path


def predict(*arguments: str | Path, cache: Path) -> tuple[str, set[str]]:
    """Return what the command line prints in a new process, and what that imported."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, "predict", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CHESTXRAY_COVID_CACHE": str(cache)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("engine", ["auto", "onnx"])
def test_prediction_imports_nothing_that_is_slow_first_start_included(
    engine: str, radiograph: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    command = (radiograph, "--model", checkpoint_folder, "--engine", engine)
    first, imported = predict(*command, cache=tmp_path)
    assert ("openvino" if engine == "auto" else "onnxruntime") in imported
    assert not imported & SLOW
    found = Classifier.from_pretrained(checkpoint_folder, engine="torch").predict(radiograph)
    shares = [float(cell) for cell in first.splitlines()[-1].split()[1:4]]
    np.testing.assert_allclose(shares, list(found.probabilities.values()), atol=2e-4)


def test_with_torch_prediction_does_not_import_torchvision(
    radiograph: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    command = (radiograph, "--model", checkpoint_folder, "--engine", "torch")
    _, imported = predict(*command, cache=tmp_path)
    assert imported & SLOW == {"torch"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_a_second_start_builds_nothing_and_answers_the_same(
    name: str, checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHESTXRAY_COVID_CACHE", str(tmp_path))
    checkpoint = load_checkpoint(checkpoint_folder)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 1, 64, 64), dtype=np.uint8)

    def opened() -> Engine:
        return open_engine(*checkpoint, engine=name)

    expected = opened()(pixels)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network is built again")

    with monkeypatch.context() as patched:
        patched.setattr(engine_onnx if name == "onnx" else engine_openvino, "fold", refuse)
        for found, wanted in zip(opened()(pixels), expected, strict=True):
            assert np.array_equal(found, wanted)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    assert np.array_equal(opened()(pixels)[0], expected[0]), "damaged: built again"


def test_what_openvino_does_not_take_back_is_compiled_again(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHESTXRAY_COVID_CACHE", str(tmp_path))
    monkeypatch.setattr(engine_openvino, "load_compiled", lambda *_: b"of another build")
    engine = open_engine(*load_checkpoint(checkpoint_folder), engine="openvino")
    assert np.isfinite(engine(np.zeros((1, 1, 64, 64), np.uint8))[0]).all()
