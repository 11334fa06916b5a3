"""Where the lungs are: masks that a collection has, and of any radiograph by a small network."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chestxray_covid.datasets.base import ChestXrayDataset, Sample
from chestxray_covid.datasets.loading import in_batches
from chestxray_covid.errors import ImageError, check_kinds, check_positive, real_number
from chestxray_covid.files import expanded, write_files
from chestxray_covid.image import Preprocess, load_image
from chestxray_covid.inputs import Item, expand_any, is_single
from chestxray_covid.lung_maps import SIZE_PX, WEIGHTS, read_weights

if TYPE_CHECKING:
    from torch import Tensor

    from chestxray_covid.lung_network import LungNetwork


def lung_mask(sample: Sample) -> NDArray[np.bool_] | None:
    """Return the annotated lungs of a sample, or ``None`` where nobody drew them.

    The mask is ``(H, W)`` bool, true inside the lungs, of the size of the image on disk.

    Raises:
        ImageError: If mask or image cannot be decoded, or the mask has labels, not black and white.
        TypeError: If it is no sample, for example a path.
    """
    check_kinds([sample], Sample, "dataset.samples[0]")
    if not (path := sample.metadata.get("lung_mask")):
        return None
    mask = load_image(path)
    if 0 < (highest := np.asarray(mask).max()) < 128:
        raise ImageError(f"{path} is at most {highest}; lungs must be white. Save them as 255.")
    return np.asarray(mask.resize(sample.read(sample, None).size, Image.Resampling.BILINEAR)) > 127


def segment(images: Any, *, batch_size: int = 16) -> Any:
    """Return where the lungs are.

    The network learned from masks of Cohen's collection, which another model (lungVAE) drew
    and nobody corrected: they leave out the heart and most of what a dense opacity hides. It is
    for cropping, hiding and auditing, not for measuring. It draws lungs on whatever it is shown:
    whether that is a radiograph, :attr:`Prediction.flags` say.

    Args:
        images: One image (whatever :func:`load_image` takes); or a list, an iterator, a folder, a
            data set or a batch of them, as for :meth:`Classifier.predict`.
        batch_size: Images computed at once.

    Returns:
        For one image ``(H, W)`` bool, true inside the lungs, of the size of the upright image, or
        of what a data set's own transform makes of it; for several a list of such masks. A mask
        may be empty: the network found no lung.

    Raises:
        ImageError: If an image cannot be decoded.
        CheckpointError: If the bundled weights are missing or damaged.
        TypeError, ValueError: If ``batch_size`` is no positive whole number.
        ForkedError: In a process that was forked after torch had computed here, unless torch
            computes in one thread.
    """
    found = list(segment_stream([images], batch_size=batch_size))
    return found[0] if is_single(images) else found


def segment_stream(
    images: Iterable[Any] | ChestXrayDataset, *, batch_size: int = 16
) -> Iterator[NDArray[np.bool_]]:
    """Yield a mask per image, in order, in constant memory; see :func:`segment`."""
    check_positive("batch_size", batch_size)
    return draw_masks(_bundled(WEIGHTS), map(_load, expand_any(images)), batch_size=batch_size)


def _load(image: Any) -> Image.Image:
    return load_image(image.dataset.image(image.position) if isinstance(image, Item) else image)


def draw_masks(
    network: LungNetwork, images: Iterable[Image.Image], *, batch_size: int = 16
) -> Iterator[NDArray[np.bool_]]:
    """Yield a network's mask of each image: its two largest parts, without specks."""
    preprocess = Preprocess(size_px=SIZE_PX)
    for batch in in_batches(images, batch_size):
        maps = probabilities(network, np.stack([preprocess(image) for image in batch]))
        for image, one in zip(batch, maps, strict=True):
            kept = np.where(_two_lungs(one[0] > 0.5), one[0], 0)
            yield np.asarray(Image.fromarray(kept).resize(image.size)) > 0.5


def _two_lungs(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the largest connected part and the next, if that is a fifth of it: no stomach gas."""
    from scipy.ndimage import label

    parts, count = label(mask)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    order = np.argsort(-sizes, kind="stable")[:2]
    kept = [i + 1 for i in order if sizes[i] >= 0.2 * sizes[order[0]]]
    found: NDArray[np.bool_] = np.isin(parts, kept)
    return found


def probabilities(network: LungNetwork, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return ``(N, 1, S, S)`` probabilities of being lung of ``(N, 1, S, S)`` uint8 pixels."""
    import torch

    from chestxray_covid.engine_torch import check_forked, first_process

    check_forked(first_process(), torch.device("cpu"))
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        logits = network(torch.from_numpy(pixels).float() / 255)
    found: NDArray[np.float32] = logits.sigmoid().numpy()
    return found


def near_lungs(network: LungNetwork, images: Tensor) -> Tensor:
    """Return what belongs to the lungs, with a soft edge, for augmentation on the device.

    Args:
        network: From :func:`load_network`, on the images' device.
        images: ``(N, 1, S, S)`` float32 in [0, 255].

    Returns:
        ``(N, 1, S, S)`` float32: 1 in the lungs and within about 2 % of the side of them, 0 from
        8 % on, along rows and columns.
    """
    import torch
    from torch.nn import functional

    small = functional.interpolate(images, (SIZE_PX, SIZE_PX), mode="bilinear", antialias=True)
    with torch.inference_mode():  # in parts, as its activations are larger than a small image's
        mask = torch.cat([network(part / 255) > 0 for part in torch.split(small, 16)]).float()
    wide = functional.max_pool2d(mask, 13, 1, 6)
    soft = functional.avg_pool2d(wide, 7, 1, 3, count_include_pad=False)
    return functional.interpolate(soft, images.shape[-2:], mode="bilinear").clone()


def lung_box(
    mask: NDArray[np.bool_], *, margin: float = 0.05
) -> tuple[float, float, float, float] | None:
    """Return ``(left, upper, right, lower)`` around the lungs, as :class:`Preprocess` takes it.

    Args:
        mask: ``(H, W)`` bool, from :func:`segment`.
        margin: Added on every side, a fraction of the image's side in [0, 0.5].

    Returns:
        Fractions of width and height in [0, 1]; ``None`` if the mask has no lung of at least a
        fiftieth of the image, which is too little to be one.

    Raises:
        TypeError: If ``margin`` is no number.
        ValueError: If the mask is not of two dimensions, empty, or ``margin`` is out of range.

    >>> box = lung_box(np.pad(np.ones((50, 60), bool), ((25, 25), (20, 20))), margin=0)
    >>> box
    (0.2, 0.25, 0.8, 0.75)
    """
    mask = np.asarray(mask)  # of None, which lung_mask returns where nobody drew lungs, too
    margin = real_number("margin", margin)
    if mask.ndim != 2 or not mask.size or not 0 <= margin <= 0.5:
        raise ValueError(
            f"mask must be (H, W) and margin in [0, 0.5], got shape {mask.shape} and {margin}"
        )
    if np.count_nonzero(mask) < 0.02 * mask.size:  # not its mean: white may be 255
        return None
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (
        max(0.0, float(columns[0] / width - margin)),
        max(0.0, float(rows[0] / height - margin)),
        min(1.0, float((columns[-1] + 1) / width + margin)),
        min(1.0, float((rows[-1] + 1) / height + margin)),
    )


def save_network(
    path: str | os.PathLike[str], network: LungNetwork, provenance: Mapping[str, Any]
) -> None:
    """Write a network in half precision, and ``<name>.json`` with its hash and provenance.

    Raises:
        OSError: If they cannot be written; older files are intact.
    """
    from safetensors.numpy import save

    from chestxray_covid.models import to_tensors

    half = {
        name: tensor.astype(np.float16) if tensor.dtype == np.float32 else tensor
        for name, tensor in to_tensors(network).items()
    }
    data, target = save(half), expanded(path)
    about = {"sha256": hashlib.sha256(data).hexdigest(), "size_px": SIZE_PX, **provenance}
    text = json.dumps(about, indent=1, sort_keys=True, allow_nan=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_files(target.parent, {target.name: data, f"{target.stem}.json": text.encode()})


def load_network(path: str | os.PathLike[str]) -> LungNetwork:
    """Return a network that :func:`save_network` wrote, verified, in ``eval()`` mode.

    Raises:
        CheckpointNotFoundError: If a file is missing.
        CheckpointError: If the weights do not fit their hash or the network.
        ForkedError: As :func:`segment`.
    """
    import torch

    from chestxray_covid.engine_torch import check_forked, first_process
    from chestxray_covid.lung_network import LungNetwork
    from chestxray_covid.models import load_tensors

    tensors = read_weights(expanded(path))
    check_forked(first_process(), torch.device("cpu"))
    with torch.device("meta"):  # where no random numbers are drawn for weights that nobody uses
        network = LungNetwork()
    load_tensors(network, tensors)
    return network.float().eval()


@lru_cache(maxsize=1)
def _bundled(path: Path) -> LungNetwork:
    return load_network(path)
