"""Fixtures shared by all tests; no test reaches beyond this machine (pytest-socket)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chestxray_covid import tensors
from chestxray_covid.checkpoint import ModelConfig, save_checkpoint
from chestxray_covid.datasets import phantom, synthetic
from chestxray_covid.datasets.base import Sample
from chestxray_covid.image import Preprocess
from chestxray_covid.tensors import densenet121_shapes

#: Which NumPy itself, before version 2.3, took for an integer, and warned.
NUMPY_BOOL = () if hasattr(np.bool_, "__index__") else (np.bool_(True),)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real radiographs, or skip; for tests marked ``real_data``."""
    place = os.environ.get("CHESTXRAY_COVID_DATA", "")
    if not place or not Path(place).is_dir():
        pytest.skip("CHESTXRAY_COVID_DATA names no folder with the real radiographs")
    return Path(place).resolve()


def random_tensors(num_classes: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Return a DenseNet-121's tensors with random weights that keep signals of unit size."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in densenet121_shapes(num_classes).items():
        if name.endswith("num_batches_tracked"):
            found[name] = np.array(100, np.int64)
        elif len(shape) > 1:
            scale = np.sqrt(2 / np.prod(shape[1:]))
            found[name] = (rng.standard_normal(shape) * scale).astype(np.float32)
        elif name.endswith(("norm0.weight", "running_var")) or ".weight" in name:
            found[name] = np.ones(shape, np.float32)
        else:
            found[name] = np.zeros(shape, np.float32)
    return found


def random_checkpoint(folder: Path) -> Path:
    """Save three classes at 64 px with random weights."""
    config = ModelConfig(
        classes=("normal", "pneumonia", "covid19"), preprocess=Preprocess(size_px=64)
    )
    save_checkpoint(folder, config, random_tensors(3))
    return folder


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a valid checkpoint of three classes at 64 px with random weights; do not change it."""
    assert tensors.BLOCKS == (6, 12, 24, 16), "a module of shallow networks has its own"
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@contextmanager
def no_more_files() -> Iterator[None]:
    """Let this process open no further file, as where a program around it keeps too many open."""
    resource = pytest.importorskip("resource", reason="needs the limits of POSIX")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = os.open(os.devnull, os.O_RDONLY)  # the lowest number that was free
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        os.close(last)


@pytest.fixture(scope="module")
def shallow() -> Iterator[None]:
    """Let every DenseNet-121 of a module's tests have one layer per block."""
    from shallow import shallow_networks

    with shallow_networks():
        yield


@pytest.fixture
def real_depth() -> Iterator[None]:
    """Let every DenseNet-121 be one in a test of a module of shallow networks."""
    from shallow import real_networks

    with real_networks():
        yield


@pytest.fixture(scope="module")
def drawn_once() -> Iterator[None]:
    """Keep the phantoms of a module, whose tests draw the same ones again and again."""
    drawn: dict[phantom.Recipe, Image.Image] = {}
    draw = phantom.render_phantom

    @wraps(draw)  # so that it is pickled under that name
    def kept(sample: Sample, min_size: tuple[int, int] | None = None) -> Image.Image:
        recipe = phantom.Recipe.of(sample)
        if recipe not in drawn:
            drawn[recipe] = draw(sample, min_size)
        return drawn[recipe].copy()

    with pytest.MonkeyPatch.context() as patch:
        for module in (phantom, synthetic):
            patch.setattr(module, "render_phantom", kept)
        yield


class Elsewhere(os.PathLike[str]):
    """A path of another library: it is an address, and leads to a local copy that nobody sends."""

    def __init__(self, address: str, copy: Path) -> None:
        self.address, self.copy = address, copy

    def __str__(self) -> str:
        return self.address

    def __fspath__(self) -> str:
        return str(self.copy)
