"""Python snippets of README and documentation are run as tests, each document in its own folder.

There they find what their reader would have: phantoms in the layouts of the public collections
below ``data/``, and a small checkpoint in ``runs/first``.
"""

from __future__ import annotations

import atexit
import gc
import os
import runpy
import tempfile
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser

ROOT = Path(__file__).parent

# Most tests gain nothing from threads, and two runs on one machine would wait for each other in
# every operation. Read when torch is imported, also by processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The tests import onnxruntime themselves, too; it would report that to its makers.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Compiled models go where they vanish, also those of processes that tests start.
_COMPILED = tempfile.TemporaryDirectory()
atexit.register(_COMPILED.cleanup)
os.environ["CHESTXRAY_COVID_CACHE"] = _COMPILED.name

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["README.md", "docs/*.md"],
    excludes=["weights/*/README.md"],  # the card: its snippets name the reader's own file
    fixtures=["_reader"],
).pytest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the coverage watch neither examples nor what is slow or depends on the real radiographs.

    Python runs at half its speed while it watches, and quick tests on phantoms run what they run.
    """
    for item in items:
        unwatched = any(map(item.get_closest_marker, ("slow", "real_data")))
        if unwatched or item.path.suffix == ".md":
            item.add_marker("no_cover")


def pytest_collection_finish() -> None:
    """Let Python's collector pass over what was imported and collected, which stays to the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def reader_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ``data/`` and ``runs/first`` as a reader of the README has them."""
    from chestxray_covid import ModelConfig, Preprocess, SyntheticChestXray, build_densenet121
    from chestxray_covid.checkpoint import save_checkpoint
    from chestxray_covid.models import to_tensors

    folder = tmp_path_factory.mktemp("reader")
    labels = ("normal", "pneumonia", "covid19")
    SyntheticChestXray(48, classes=labels, image_size_px=64).save(folder / "data" / "phantoms")
    (folder / "data" / "training").symlink_to("phantoms")
    examples = runpy.run_path(str(ROOT / "examples" / "phantoms.py"))
    examples["draw"](folder / "data", count=150, image_size_px=64)
    config = ModelConfig(classes=("normal", "covid19"), preprocess=Preprocess(size_px=64))
    model = build_densenet121(pretrained=False)
    save_checkpoint(folder / "runs" / "first", config, to_tensors(model))
    return folder


@pytest.fixture
def _reader(
    request: pytest.FixtureRequest, reader_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work in a folder of the document's own, with links to the reader's files."""
    own = reader_files / Path(request.node.path).stem
    for link in (p for parent in ("data", "runs") for p in (reader_files / parent).iterdir()):
        place = own / link.parent.name / link.name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(link)
    monkeypatch.chdir(own)
