"""Where a classifier looked: Grad-CAM, and occlusion as a second opinion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from chestxray_covid.classifier import Classifier
from chestxray_covid.datasets.loading import in_batches, map_ahead
from chestxray_covid.engines import softmax, stacked
from chestxray_covid.errors import (
    ForkedError,
    check_network,
    check_positive,
    real_number,
    whole_number,
)
from chestxray_covid.heatmap import Heatmap
from chestxray_covid.image import load_image
from chestxray_covid.inputs import (
    Held,
    Item,
    expand,
    hold,
    is_single,
    name_of,
    read,
)


class _Loaded(NamedTuple):
    name: str
    image: Image.Image
    pixels: NDArray[np.uint8]  # (1, S, S)
    target: str | None


def grad_cam(
    classifier: Classifier,
    images: Any,
    target: str | Sequence[str] | None = None,
    *,
    batch_size: int = 16,
    device: str = "cpu",
) -> Any:
    """Return where the evidence for a class lies, by Grad-CAM on the last feature maps.

    Selvaraju et al., Grad-CAM: visual explanations from deep networks via gradient-based
    localization, ICCV 2017. In DenseNet-121 the last maps are averaged and go straight into a
    linear layer, so a logit's gradient is that layer's weights over the number of positions, and
    Grad-CAM is class activation mapping (Zhou et al., CVPR 2016): it is computed exactly, without
    a backward pass. There are no hooks and no state, so several threads may call it.

    The network is built anew in every call: pass many images at once.

    Args:
        classifier: Whatever its engine, its own weights are used, in torch and float32.
        images: One image; or a list, a folder, a data set or a batch of them, as for
            :meth:`Classifier.predict`.
        target: Class to explain, or one per image; by default the class that is predicted.
        batch_size: Images computed at once.
        device: Torch device.

    Returns:
        A :class:`Heatmap` for one image, a list of them for several.

    Raises:
        ImageError: If an image cannot be decoded.
        TypeError: If something is no image, or ``classifier`` none.
        ValueError: If ``target``, ``batch_size`` or ``device`` is impossible.
        ForkedError: In a process that was forked after torch had computed here, unless torch
            computes on the CPU in one thread.
    """
    items, targets = explained(classifier, images, target)
    found = list(grad_cam_stream(classifier, items, targets, batch_size, device))
    return found[0] if is_single(images) else found


def grad_cam_stream(
    classifier: Classifier,
    items: Sequence[Any],
    targets: Sequence[str | None],
    batch_size: int,
    device: str,
) -> Iterator[Heatmap]:
    """Yield the heatmaps of what :func:`explained` returned, in order, in constant memory."""
    import torch

    from chestxray_covid.engine_torch import check_forked, first_process
    from chestxray_covid.models import feature_maps, from_tensors, normalise

    check_positive("batch_size", batch_size)
    try:
        place = torch.device(device)
        check_forked(first_process(), place)
        model = from_tensors(classifier._tensors).to(place)
        model = model.to(memory_format=torch.channels_last)  # half again as fast on a CPU
    except ForkedError:
        raise
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {device!r} cannot be used: {error}. Use 'cpu'.") from error
    for batch in in_batches(_load_ahead(classifier, items, targets, batch_size), batch_size):
        pixels = torch.from_numpy(np.stack([one.pixels for one in batch])).to(device)
        with torch.inference_mode(), torch.autocast(place.type, enabled=False):
            maps = feature_maps(model, normalise(pixels, classifier.config.preprocess))
            # What each position adds to each logit; their sum and the bias is the logit.
            parts = torch.einsum("kc,nchw->nkhw", model.classifier.weight, maps)
            parts = (parts / maps[0, 0].numel()).cpu()
            logits = parts.sum((2, 3)) + model.classifier.bias.cpu()
        for one, heat, row in zip(batch, parts.numpy(), softmax(logits.numpy()), strict=True):
            k = _index(classifier, one.target, row)
            yield _heatmap(classifier, one, np.maximum(heat[k], 0), k, row, "grad_cam")


def occlusion_sensitivity(
    classifier: Classifier,
    images: Any,
    target: str | Sequence[str] | None = None,
    *,
    steps: int = 8,
    window: float = 0.25,
    batch_size: int = 16,
) -> Any:
    """Return which parts a classifier misses when they are hidden: a second, gradient-free opinion.

    Zeiler and Fergus, Visualizing and understanding convolutional networks, ECCV 2014. A square is
    moved over the image and filled with the image's mean grey; the heat is how far the log-odds of
    the class fall. It runs on the classifier's own engine, ``steps`` squared times per image.

    Args:
        classifier: A classifier with any engine.
        images: As for :func:`grad_cam`.
        target: As for :func:`grad_cam`.
        steps: Places of the square along a side, 2 to 32.
        window: Side of the square, a fraction of the image's side in (0, 1).
        batch_size: Images computed at once.

    Returns:
        A :class:`Heatmap` for one image, a list of them for several.

    Raises:
        ImageError: If an image cannot be decoded.
        TypeError: If something is no image, ``classifier`` none, or an option no number.
        ValueError: If ``target`` or another option is impossible.
    """
    steps, window = whole_number("steps", steps), real_number("window", window)
    if not 2 <= steps <= 32 or not 0 < window < 1:
        raise ValueError(
            f"steps must be in 2 to 32 and window inside (0, 1), got {steps} and {window}"
        )
    check_positive("batch_size", batch_size)
    items, targets = explained(classifier, images, target)
    found = []
    for one in _load_ahead(classifier, items, targets, batch_size=1):
        row = classifier._compute(one.pixels[np.newaxis])[0][0]
        k = _index(classifier, one.target, row)
        hidden = in_batches(_hidden(one.pixels, steps, window), batch_size)
        left = [_log_odds(classifier._compute(stacked(batch))[0], k) for batch in hidden]
        lost = _log_odds(row[np.newaxis], k) - np.concatenate(left)
        grid = np.maximum(lost, 0).reshape(steps, steps).astype(np.float32)
        found.append(_heatmap(classifier, one, grid, k, row, "occlusion"))
    return found[0] if is_single(images) else found


def _hidden(pixels: NDArray[np.uint8], steps: int, window: float) -> Iterator[NDArray[np.uint8]]:
    """Yield the pixels with the square at each place, row by row; it is cut off at the border."""
    size = pixels.shape[-1]
    centres = (np.arange(steps) + 0.5) * size / steps
    low = np.maximum(np.round(centres - window * size / 2), 0).astype(int)
    # Never nothing: a pixel at least, however small the window.
    high = np.maximum(np.round(centres + window * size / 2).astype(int), low + 1)
    for top, bottom in zip(low, high, strict=True):
        for left, right in zip(low, high, strict=True):
            changed = pixels.copy()
            changed[:, top:bottom, left:right] = round(float(pixels.mean()))
            yield changed


def _log_odds(probabilities: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Return ``log(p / (1 - p))`` of a class, exact near 1, where ``1 - p`` would be rounded."""
    smallest = np.finfo(np.float64).tiny
    rest = np.delete(probabilities, k, axis=1).sum(1)
    return np.asarray(
        np.log(np.maximum(probabilities[:, k], smallest)) - np.log(np.maximum(rest, smallest))
    )


# ---------------------------------------------------------------- what all share


def explained(
    classifier: Classifier, images: Any, target: str | Sequence[str] | None
) -> tuple[list[Any], list[str | None]]:
    """Return the single images, and the class to explain for each, ``None`` for the predicted."""
    check_network(classifier)
    # Read at once: of a file of several frames, the next one takes the place of the one before, and
    # the open files of an archive share one position.
    items = [
        load_image(one)
        if isinstance(one, ImageFile.ImageFile)
        else hold(one, classifier.config.preprocess)
        for one in expand(images)
    ]
    if isinstance(target, Iterable) and not isinstance(target, str):
        targets: list[Any] = [*target]
    else:
        targets = [target] * len(items)
    strange = sorted({repr(name) for name in targets if name not in (None, *classifier.classes)})
    if strange or len(targets) != len(items):
        raise ValueError(
            f"target must be one of {classifier.classes}, or one of them for each of "
            f"{len(items)} images, got {target!r}"
        )
    return items, targets


def _load_ahead(
    classifier: Classifier, items: Sequence[Any], targets: Sequence[str | None], batch_size: int
) -> Iterator[_Loaded]:
    def load(pair: tuple[Any, str | None]) -> _Loaded:
        item, target = pair
        name = name_of(item)
        whole: Any = item.found if isinstance(item, Held) else item
        if isinstance(item, Item):
            whole = item.dataset.image(item.position)
            if item.dataset.transform is not None:  # may be random: what is shown is explained
                item = whole
        # The very pixels of the prediction: a large JPEG may be decoded smaller for those.
        pixels = read(item, classifier.config.preprocess)[0]
        return _Loaded(name, load_image(whole), pixels, target)

    pairs = zip(items, targets, strict=True)
    return map_ahead(load, pairs, ahead=2 * batch_size)


def _index(classifier: Classifier, target: str | None, row: NDArray[np.float64]) -> int:
    return int(row.argmax()) if target is None else classifier.classes.index(target)


def _heatmap(
    classifier: Classifier,
    one: _Loaded,
    grid: NDArray[np.float32],
    k: int,
    row: NDArray[np.float64],
    method: str,
) -> Heatmap:
    return Heatmap(
        image=one.image,
        grid=grid,
        target=classifier.classes[k],
        probability=float(row[k]),
        method=method,
        source=one.name,
    )
