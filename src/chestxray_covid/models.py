"""Build the network, choose what trains, turn uint8 batches into its input."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn

from chestxray_covid.checkpoint import load_checkpoint
from chestxray_covid.errors import TrainingError, WeightsUnavailableError, check_kind
from chestxray_covid.hub import resolve
from chestxray_covid.image import Preprocess
from chestxray_covid.tensors import densenet121_shapes

#: Values of ``trainable``, from the whole network to the classifier alone.
TRAINABLE = ("all", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head")
#: Largest difference of the logits of one network, over their size: a GPU rounds to ten bits.
_SAME = 1e-2


def build_densenet121(
    pretrained: bool | str | os.PathLike[str] = True,
    trainable: str = "all",
    num_classes: int = 2,
    *,
    seed: int | None = None,
) -> torchvision.models.DenseNet:
    """Return torchvision's own DenseNet-121: ``(N, 3, S, S)`` normalised → ``(N, K)`` logits.

    It lies on torch's default device, in float32 whatever torch's default type is; the weights of a
    seed are the same on all devices.

    Args:
        pretrained: ``True`` for ImageNet weights, which torchvision downloads once and caches;
            ``False`` for random ones; or a checkpoint: a folder, the name of a bundled one or a
            repository of the Hub, see :func:`resolve`. One with another number of classes gives
            its features, and the classifier starts at random. Its preprocessing, which it should
            be trained on with, is ``load_config(folder).preprocess``.
        trainable: ``"all"``, ``"head"`` (the classifier alone), or the first block that trains,
            for example ``"denseblock4"``; see :func:`set_trainable`.
        num_classes: Number of logits, at least 2.
        seed: Makes the random weights a function of it, 0 to 2**63 - 1; ``None`` takes torch's own
            randomness.

    Raises:
        TypeError: If ``pretrained`` is neither true nor false nor a checkpoint.
        ValueError: If ``trainable`` is unknown, or ``num_classes`` or ``seed`` impossible.
        WeightsUnavailableError: If ImageNet weights are neither cached nor to be fetched.
        CheckpointError: If the checkpoint is missing or damaged.
        DownloadError: If it cannot be fetched; errors of the Hub as :func:`resolve` says.

    >>> model = build_densenet121(pretrained=False, trainable="head", num_classes=3)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['classifier.weight', 'classifier.bias']
    """
    if not isinstance(num_classes, int | np.integer) or num_classes < 2:
        raise ValueError(f"num_classes must be a whole number of at least 2, got {num_classes!r}")
    if seed is not None and not (isinstance(seed, int | np.integer) and 0 <= seed < 2**63):
        raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}")
    if not isinstance(pretrained, (bool, str, os.PathLike)):
        raise TypeError(
            "pretrained must be True (ImageNet), False (random weights) or a checkpoint (a folder, "
            f"a bundled name or a repository of the Hub), got {pretrained!r}"
        )
    with torch.device("cpu"):  # where a seed gives the same weights on every machine
        model = _built(pretrained, num_classes, seed)
    set_trainable(model, trainable)
    return model.to(torch.get_default_device())


def _built(
    pretrained: bool | str | os.PathLike[str], num_classes: int, seed: int | None
) -> torchvision.models.DenseNet:
    if pretrained is True:
        model = _imagenet()
        model.classifier = nn.Linear(model.classifier.in_features, num_classes)
    else:
        model = torchvision.models.densenet121(weights=None, num_classes=num_classes)
    model.float()  # before a seed draws: other types of numbers get others
    if seed is not None:
        _initialise(model, seed, features=pretrained is False)
    if not isinstance(pretrained, bool):
        _, tensors = load_checkpoint(resolve(pretrained))
        if len(tensors["classifier.bias"]) != num_classes:
            own = model.state_dict()
            tensors |= {k: own[k].numpy() for k in ("classifier.weight", "classifier.bias")}
        load_tensors(model, tensors)
    return model


def check_maker(model: Callable[[], torchvision.models.DenseNet] | None) -> None:
    """Raise unless this is ``None``, or a function that returns a fresh network at each call.

    Raises:
        TypeError: If it is anything else, for example a network, which would train on and on.
        ValueError: If it returns the same network twice, which would train on and on, too.
    """
    if model is not None and (isinstance(model, nn.Module) or not callable(model)):
        raise TypeError(
            "model must be a function that returns a fresh network, for example "
            f"lambda: build_densenet121(pretrained=False), got {type(model).__name__}"
        )
    if model is not None and model() is model():
        raise ValueError(
            "model must return a fresh network at each call, it returned the same twice. Build it "
            "inside the function, for example lambda: build_densenet121(pretrained=False)"
        )


def make_network(
    model: Callable[[], torchvision.models.DenseNet] | None, num_classes: int, seed: int
) -> torchvision.models.DenseNet:
    """Return the network that a function makes, or by default one from ImageNet weights."""
    if model is not None:
        return model()
    return build_densenet121(num_classes=num_classes, seed=seed % 2**63)  # of options: any number


def _initialise(model: torchvision.models.DenseNet, seed: int, *, features: bool) -> None:
    """Draw random weights as torchvision does, from a generator of their own."""
    generator = torch.Generator().manual_seed(int(seed))
    if features:
        for module in model.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, generator=generator)
    # torch's default for a linear layer; torchvision's bias is 0.
    nn.init.kaiming_uniform_(model.classifier.weight, a=math.sqrt(5), generator=generator)
    nn.init.zeros_(model.classifier.bias)


def _imagenet() -> torchvision.models.DenseNet:
    weights = torchvision.models.DenseNet121_Weights.IMAGENET1K_V1
    try:
        return torchvision.models.densenet121(weights=weights)
    except Exception as error:
        # Without a network an OSError. What is in the cache and no weights of this network makes
        # torch raise whatever it stumbles over, or warn from Python 3.12 on.
        if not isinstance(error, MemoryError):
            cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
            raise WeightsUnavailableError(
                f"The ImageNet weights of DenseNet-121 are not to be had: {error}. Put "
                f"{weights.url} at {cache}, or start without them: pretrained=False (random "
                "weights; command line: --no-pretrained) or pretrained=<checkpoint folder>."
            ) from error
        raise


def set_trainable(model: torchvision.models.DenseNet, trainable: str) -> None:
    """Let the network train from a block on, and freeze what comes before it.

    Args:
        model: Changed in place: ``requires_grad`` of its parameters.
        trainable: ``"all"``, ``"head"`` (the classifier alone), or the first block that trains:
            ``"denseblock1"`` to ``"denseblock4"``.

    Raises:
        TypeError: If ``model`` is no network, for example a :class:`Classifier`.
        ValueError: If ``trainable`` is unknown.
    """
    check_kind(model, nn.Module, "build_densenet121()")
    if trainable not in TRAINABLE:
        raise ValueError(f"trainable must be one of {TRAINABLE}, got {trainable!r}")
    trains = trainable == "all"
    for name, child in model.features.named_children():
        trains = trains or name == trainable
        child.requires_grad_(trains)
    model.classifier.requires_grad_(True)


def set_training_mode(model: nn.Module) -> None:
    """Put the model in training mode, except for frozen parts, which stay in ``eval()``.

    A frozen batch norm in training mode would still move its running statistics.
    """
    model.train()
    _hold_frozen(model)


def _hold_frozen(module: nn.Module) -> set[bool]:
    """Put what is frozen in ``eval()``, and return whether all, some or no parameters train."""
    trains = {p.requires_grad for p in module.parameters(recurse=False)}
    trains = trains.union(*map(_hold_frozen, module.children()))
    if trains == {False}:
        module.eval()
    return trains


def check_moved(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise unless an optimizer moves all parameters that train.

    Raises:
        TrainingError: If one was unfrozen since the optimizer was made.
    """
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in moved:
            raise TrainingError(
                f"{name} was unfrozen or replaced amid a run, which trains what it began with. End "
                "the run first, then train its model, unfrozen, in another one."
            )


def normalise(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Return the network's input from a batch of grey pixels, on the pixels' device.

    Args:
        pixels: ``(N, 1, S, S)``, uint8, or float32 with the same range [0, 255].
        preprocess: Holds mean and deviation of the grey channel on the scale [0, 1].

    Returns:
        ``(N, 3, S, S)`` float32, the grey channel three times, without copying it.
    """
    scaled = pixels.to(torch.float32).mul(1 / (255 * preprocess.std))
    return scaled.sub_(preprocess.mean / preprocess.std).expand(-1, 3, -1, -1)


def feature_maps(model: torchvision.models.DenseNet, batch: Tensor) -> Tensor:
    """Return the ``(N, 1024, S // 32, S // 32)`` maps that are pooled for the classifier.

    The steps of torchvision's ``DenseNet.forward`` taken apart: its in-place ReLU makes hooks
    unusable.
    """
    return torch.relu(model.features(batch))


def forward_features(model: torchvision.models.DenseNet, batch: Tensor) -> Tensor:
    """Return the ``(N, 1024)`` pooled features that the classifier sees."""
    maps = feature_maps(model, batch)
    return torch.nn.functional.adaptive_avg_pool2d(maps, (1, 1)).flatten(1)


def to_array(tensor: Tensor) -> NDArray[Any]:
    """Return a copy of a tensor, in row-major order whatever its memory format."""
    return tensor.detach().cpu().contiguous().numpy().copy()


def to_tensors(model: nn.Module) -> dict[str, NDArray[Any]]:
    """Return a copy of the model's state as NumPy arrays, as checkpoints hold it.

    Of a network that is compiled or parallel it is the inner one's; bfloat16 and double precision,
    which checkpoints do not hold, become single.
    """
    state = _inner(model).state_dict()
    kept = (torch.float16, torch.float32)
    others = {k for k, t in state.items() if t.is_floating_point() and t.dtype not in kept}
    return {k: to_array(t.float() if k in others else t) for k, t in state.items()}


def _inner(model: nn.Module) -> nn.Module:
    """Return the network that ``torch.compile`` or torch's ways to use several GPUs are around."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inner = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
    return _inner(inner) if isinstance(inner, nn.Module) else model


def load_tensors(model: nn.Module, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Put a checkpoint's tensors into a model; names and shapes must fit exactly.

    A model on the device ``meta``, which has no values to overwrite, takes them as its own.

    Raises:
        RuntimeError: If a name or shape differs.
    """
    state = {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}
    model.load_state_dict(state, assign=any(p.is_meta for p in model.parameters()))


def from_tensors(tensors: Mapping[str, NDArray[Any]]) -> torchvision.models.DenseNet:
    """Return the network that a checkpoint's tensors describe, in ``eval()`` mode, float32."""
    with torch.device("meta"):  # where no random numbers are drawn for weights that nobody uses
        model = torchvision.models.densenet121(
            weights=None, num_classes=len(tensors["classifier.bias"])
        )
    load_tensors(model, tensors)
    return model.float().eval()


def check_model(model: nn.Module, classes: Sequence[str]) -> None:
    """Raise unless a model is a DenseNet-121 with one logit per class, and can be trained here.

    Raises:
        TypeError: If it is no network, for example the path of one.
        ValueError: If it is another.
    """
    check_kind(model, nn.Module, "build_densenet121()")
    state = model.state_dict()
    logits = len(state.get("classifier.bias", ()))
    if {k: tuple(v.shape) for k, v in state.items()} != densenet121_shapes(logits):
        raise ValueError(
            f"model must be a DenseNet-121 from build_densenet121, got {type(model).__name__}"
        )
    if logits != len(classes):
        raise ValueError(
            f"model has {logits} logits, the training data {len(classes)} classes "
            f"{tuple(classes)}. Build it with num_classes={len(classes)}."
        )
    if other := {t.dtype for t in state.values() if t.is_floating_point()} - {torch.float32}:
        raise ValueError(
            f"model is of {other.pop()}, training needs weights of torch.float32: call "
            "model.float(). What is computed in is the precision of TrainingConfig."
        )
    if any(_drops(module) for module in model.modules()):
        raise ValueError(
            "model drops features at random (drop_rate), which no seed of a run determines: it "
            "could not be resumed exactly. Build it with drop_rate=0, as build_densenet121 does."
        )
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError(
            "model is on the device meta, where weights have no values: build it elsewhere, see "
            "torch.set_default_device."
        )
    if any(p.is_inference() for p in model.parameters()):
        raise ValueError(
            "model was built under torch.inference_mode, whose weights take no gradient: build it "
            "outside."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("All parameters are frozen: nothing would train.")


def _drops(module: nn.Module) -> bool:
    """Return whether a module drops features at random while it trains."""
    own = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else 0
    return bool(own or getattr(module, "drop_rate", 0))


def check_answers(model: nn.Module) -> None:
    """Raise unless a network answers as torchvision's DenseNet-121 of the same weights does.

    Raises:
        ValueError: If it does not.
    """
    device = next(model.parameters()).device
    # Large enough for the last maps to have several pixels, over which a network pools.
    waves = torch.arange(3 * 64 * 64, dtype=torch.float32, device=device).mul(0.1).sin()
    image = waves.view(1, 3, 64, 64)
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            expected = from_tensors(to_tensors(model)).to(device)(image)
            found = model.eval()(image)
    finally:
        for module, mode in modes:
            module.training = mode
    # Not the other way round: where weights are no numbers, the loss says so.
    if (found - expected).abs().max() > _SAME * expected.abs().max():
        raise ValueError(
            f"model, a {type(model).__name__}, has the weights of a DenseNet-121, but answers "
            "otherwise than torchvision's does with them: a layer or the forward pass is another. "
            "A checkpoint holds weights alone, so predictions would not be those of the network "
            "that was trained. Take one from build_densenet121."
        )
