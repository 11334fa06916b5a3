"""Maps of the lungs without torch: the bundled weights, and their network in NumPy."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chestxray_covid.errors import (
    INSTALL_AGAIN,
    CheckpointError,
    CheckpointNotFoundError,
)
from chestxray_covid.files import parse_json
from chestxray_covid.tensors import read_tensors

#: Side of the network's input in pixels; masks are drawn there and enlarged.
SIZE_PX = 128
#: The bundled weights; ``lungs.json`` beside them names their SHA-256 and how good they are.
WEIGHTS = Path(__file__).parent / "weights" / "lungs.safetensors"
#: Channels from the full resolution down to a sixteenth of it.
WIDTHS = (16, 32, 64, 96, 96)
#: What torch adds to a variance, and the network to a deviation.
_EPSILON, _LEAST_DEVIATION = 1e-5, 1e-3

_Array: TypeAlias = NDArray[np.float32]

#: Held while BLAS is limited, which the process has once: of two limits that overlap, the second
#: would keep for good what the first had set. A fork waits for it, or a child would keep the limit.
_LIMITING = threading.Lock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_LIMITING.acquire,
        after_in_parent=_LIMITING.release,
        after_in_child=_LIMITING.release,
    )


def digest_of(path: Path) -> str:
    """Return the SHA-256 that the JSON file beside weights names, 64 hex digits.

    Raises:
        CheckpointNotFoundError: If that file is missing.
        CheckpointError: If it cannot be read.
    """
    about = path.with_suffix(".json")
    try:
        digest: str = parse_json(about.read_bytes())["sha256"]
        if len(bytes.fromhex(digest)) != 32:
            raise ValueError(f"{digest!r} is no SHA-256")
    except FileNotFoundError as error:
        raise _missing(about) from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{about} cannot be read: {error!r}. {INSTALL_AGAIN}.") from error
    return digest


def read_weights(path: Path) -> dict[str, NDArray[Any]]:
    """Return the tensors of a lung network, verified to be those that the JSON file names.

    Raises:
        CheckpointNotFoundError: If a file is missing.
        CheckpointError: If the weights do not fit their hash, or are not finite or not those of
            this network.
    """
    expected = digest_of(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise _missing(path) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}. {INSTALL_AGAIN}.") from error
    if hashlib.sha256(data).hexdigest() != expected:
        raise CheckpointError(
            f"{path} is not the file that {path.stem}.json describes: its SHA-256 differs. "
            f"{INSTALL_AGAIN}."
        )
    tensors = read_tensors(data, path)
    if {name: t.shape for name, t in tensors.items()} != _shapes() or not all(
        np.isfinite(t).all() for t in tensors.values()
    ):
        raise CheckpointError(f"{path} does not hold the finite weights of a lung network.")
    return tensors


def _missing(path: Path) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(
        f"The weights of the lung network are missing: {path}. {INSTALL_AGAIN}; or train them with "
        "recipes/train_lungs.py."
    )


def _shapes() -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of :class:`lung_network.LungNetwork`."""
    shapes: dict[str, tuple[int, ...]] = {"head.weight": (1, WIDTHS[0], 1, 1), "head.bias": (1,)}
    sides = {
        "down": list(zip((1, *WIDTHS), WIDTHS, strict=False)),
        "up": [(low + high, high) for high, low in pairwise(WIDTHS)][::-1],
    }
    for side, blocks in sides.items():
        for number, (before, after) in enumerate(blocks):
            for place, width in ((0, before), (3, after)):
                shapes[f"{side}.{number}.{place}.weight"] = (after, width, 3, 3)
                norm = f"{side}.{number}.{place + 1}"
                for part in ("weight", "bias", "running_mean", "running_var"):
                    shapes[f"{norm}.{part}"] = (after,)
                shapes[f"{norm}.num_batches_tracked"] = ()
    return shapes


class LungMaps:
    """The network of :mod:`lung_network` in NumPy, for an image now and then.

    It needs no torch, whose import takes as long as dozens of its answers, and no runtime that
    would have to compile it. For many images torch is faster: :func:`lungs.segment`.

    Args:
        tensors: From :func:`read_weights`.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        from threadpoolctl import ThreadpoolController

        depth = len(WIDTHS)
        self._down = [_block(tensors, f"down.{k}") for k in range(depth)]
        self._up = [_block(tensors, f"up.{k}") for k in range(depth - 1)]
        self._head = tensors["head.weight"].astype(np.float32).reshape(-1)
        self._bias = float(tensors["head.bias"][0])
        self._blas = ThreadpoolController()

    def __call__(self, pixels: NDArray[np.uint8]) -> _Array:
        """Return ``(128, 128)`` float32 probabilities of being lung.

        Args:
            pixels: ``(1, S, S)`` uint8, brought to a side of 128.
        """
        side = (SIZE_PX, SIZE_PX)
        image = Image.fromarray(pixels[0])
        if image.size != side:
            image = image.resize(side, Image.Resampling.BILINEAR)  # wide enough not to alias
        grey = np.asarray(image, np.float32)[np.newaxis] / np.float32(255)
        with self._in_one_thread():
            return self._probabilities(grey)

    @contextmanager
    def _in_one_thread(self) -> Iterator[None]:
        """Let BLAS compute in one thread meanwhile: decoding and the engine have the other cores.

        Beside them its threads wait for each other by spinning, and take several times as long.
        What else the process asks of BLAS has one thread meanwhile, too.
        """
        with _LIMITING, self._blas.limit(limits=1, user_api="blas"):
            yield

    def _probabilities(self, grey: _Array) -> _Array:
        x: _Array = (grey - grey.mean()) / (grey.std(ddof=1) + _LEAST_DEVIATION)
        kept: list[_Array] = []
        for block in self._down:
            x = _convolved(_halved(x) if kept else x, block)
            kept.append(x)
        for block, skip in zip(self._up, kept[-2::-1], strict=True):
            x = _convolved(np.concatenate([_doubled(x), skip]), block)
        logits = np.tensordot(self._head, x, 1) + np.float32(self._bias)
        return np.asarray(1 / (1 + np.exp(-np.clip(logits, -30, 30))), np.float32)


#: Of each of the two convolutions of a block ``(3, O, 3 I)`` weights and ``(O, 1)`` biases.
_Block: TypeAlias = list[tuple[_Array, _Array]]


def _block(tensors: Mapping[str, NDArray[Any]], name: str) -> _Block:
    """Return the convolutions of a block with their batch norms folded in."""
    found = []
    for place in (0, 3):
        weight = tensors[f"{name}.{place}.weight"].astype(np.float64)
        scale, bias, mean, variance = (
            tensors[f"{name}.{place + 1}.{part}"].astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale /= np.sqrt(variance + _EPSILON)
        rows = (weight * scale.reshape(-1, 1, 1, 1)).transpose(2, 0, 3, 1)  # of the kernel
        found.append(
            (
                rows.reshape(3, len(weight), -1).astype(np.float32),
                (bias - mean * scale).astype(np.float32)[:, np.newaxis],
            )
        )
    return found


def _convolved(x: _Array, block: _Block) -> _Array:
    """Return ``(O, H, W)`` of ``(I, H, W)``, two 3x3 convolutions with a ReLU each.

    A convolution is a sum of products of matrices, one for each row of its kernel. In rows of
    pixels that are padded on both sides and follow each other without a gap, what one place of the
    kernel sees is one run of memory; what runs over the end of a row lands in its padding.
    """
    for kernel, bias in block:
        channels, height, width = x.shape
        wide, length = width + 2, height * (width + 2)
        padded = np.zeros((channels, (height + 2) * wide + 2), np.float32)
        inner = padded[:, :-2].reshape(channels, height + 2, wide)
        inner[:, 1:-1, 1:-1] = x
        columns = np.concatenate([padded[:, k : k - 2 or None] for k in range(3)])
        total = bias + kernel[0] @ columns[:, :length]
        for k in (1, 2):
            total += kernel[k] @ columns[:, k * wide : k * wide + length]
        x = np.maximum(total, 0, out=total).reshape(-1, height, wide)[:, :, :width]
    return x


def _halved(x: _Array) -> _Array:
    """Return ``(C, H / 2, W / 2)``, the largest of every 2x2."""
    rows = np.maximum(x[:, ::2], x[:, 1::2])
    return np.maximum(rows[:, :, ::2], rows[:, :, 1::2])


def _doubled(x: _Array) -> _Array:
    """Return ``(C, 2 S, 2 S)`` by linear interpolation; corners are not aligned."""
    near, other = 0.75 * np.eye(x.shape[1], dtype=np.float32), np.float32(0.25)
    sides = []
    for step in (-1, 1):  # the neighbour before, and the one after; at the end the pixel itself
        neighbour = np.clip(np.arange(len(near)) + step, 0, len(near) - 1)
        sides.append(near + other * np.eye(len(near), dtype=np.float32)[neighbour])
    enlarge = np.stack(sides, 1).reshape(-1, len(near))
    return np.asarray(enlarge @ x @ enlarge.T, np.float32)


@lru_cache(maxsize=1)
def bundled() -> LungMaps:
    """Return the network with the bundled weights.

    Raises:
        CheckpointNotFoundError, CheckpointError: As :func:`read_weights`.
    """
    return LungMaps(read_weights(WEIGHTS))
