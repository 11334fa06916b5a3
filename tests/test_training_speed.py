"""What is faster on a CPU computes the very numbers of torchvision's network."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
from accelerate import Accelerator
from torch import Tensor

from chestxray_covid import Preprocess, TrainingConfig, build_densenet121
from chestxray_covid.engine_torch import relu_
from chestxray_covid.models import set_training_mode
from chestxray_covid.training_network import TrainingNetwork
from chestxray_covid.training_speed import faster_on_cpu

CONFIG = TrainingConfig(preprocess=Preprocess(size_px=32), ema_decay=0.9, precision="bfloat16")


def all_of_16_bits() -> Tensor:
    """Return every value of bfloat16, NaN of all kinds among them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def same(found: Tensor, expected: Tensor) -> bool:
    """Return whether all numbers are the same, and NaN where there is NaN."""
    nan = expected.isnan()
    return torch.equal(found.isnan(), nan) and torch.equal(found[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_relu_is_torchs_for_every_number_of_16_bits(dtype: torch.dtype) -> None:
    values = all_of_16_bits().to(dtype)
    expected = torch.relu(values)
    given = values.clone()
    assert relu_(given) is given
    assert same(given, expected)
    strided = values.reshape(256, 256).t().clone(memory_format=torch.preserve_format)
    assert same(relu_(strided), expected.reshape(256, 256).t())
    assert not strided.is_contiguous()


def numbers_of(
    model: torchvision.models.DenseNet, batch: Tensor, *, half: bool
) -> dict[str, Tensor]:
    """Return logits, gradients and statistics of one forward and backward pass."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = model(batch)
    loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1, 1]))
    torch.autograd.backward(loss)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("trainable", ["all", "denseblock3", "head"])
def test_logits_gradients_and_statistics_are_torchvisions(
    half: bool, last: bool, trainable: str
) -> None:
    order = torch.channels_last if last else torch.contiguous_format
    model = build_densenet121(pretrained=False, trainable=trainable, seed=1)
    model.to(memory_format=order)
    set_training_mode(model)
    generator = torch.Generator().manual_seed(2)
    batch = torch.randn(3, 3, 64, 64, generator=generator).contiguous(memory_format=order)
    found = []
    for way in (lambda _: nullcontext(), faster_on_cpu):
        own = copy.deepcopy(model)
        with way(own):
            found.append(numbers_of(own, batch, half=half))
    expected, faster = found
    assert faster.keys() == expected.keys()
    assert [n for n in expected if not torch.equal(faster[n], expected[n])] == []


def replaced(model: torchvision.models.DenseNet) -> set[tuple[str, str]]:
    """Return the kinds of modules that have functions of their own, and which."""
    names = ("forward", "bn_function")
    found = ((type(m).__name__, n) for m in model.modules() for n in names if n in vars(m))
    return set(found)


ALL = {("ReLU", "forward"), ("_DenseBlock", "forward"), ("_DenseLayer", "bn_function")}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ALL),
        ({"gradient_checkpointing": True}, {("ReLU", "forward")}),
        ({"compile_backend": "eager"}, set()),
    ],
)
def test_a_run_is_faster_and_leaves_the_network_as_it_was(
    change: dict[str, Any], expected: set[tuple[str, str]]
) -> None:
    model = build_densenet121(pretrained=False, seed=0)
    net = TrainingNetwork(model, replace(CONFIG, **change), Accelerator(cpu=True), [0, 1])

    def compute() -> None:
        with net.computing():
            assert replaced(model) == expected
            raise KeyError

    with pytest.raises(KeyError):
        compute()
    assert replaced(model) == replaced(net.best) == set()


def test_what_is_validated_is_faster_without_an_average_too() -> None:
    model = build_densenet121(pretrained=False, seed=0)
    config = replace(CONFIG, ema_decay=0.0)
    net = TrainingNetwork(model, config, Accelerator(cpu=True), [0, 1])
    with net.computing():
        assert net.best is model
        assert replaced(model) == ALL
    assert replaced(model) == set()


def test_hooks_of_layers_still_see_what_they_saw() -> None:
    model = build_densenet121(pretrained=False, seed=0).eval()
    batch = torch.ones(1, 3, 32, 32)
    seen: list[list[torch.Size]] = [[], []]
    ways: list[AbstractContextManager[None]] = [nullcontext(), faster_on_cpu(model)]
    for shapes, way in zip(seen, ways, strict=True):
        hooks = [
            m.register_forward_hook(lambda _, __, made, own=shapes: own.append(made.shape))
            for m in model.features.modules()
        ]
        with way:
            model(batch)
        for hook in hooks:
            hook.remove()
    assert seen[0] == seen[1]
    assert len(seen[0]) > 400


class OwnReLU(torch.nn.ReLU):
    """A ReLU of somebody's own."""

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value)


def test_what_somebody_made_their_own_stays() -> None:
    model = build_densenet121(pretrained=False, seed=0)
    blocks = model.features
    blocks.relu0 = OwnReLU(inplace=True)
    layer = blocks.denseblock1.denselayer1
    layer.relu1, layer.relu2.inplace = OwnReLU(inplace=True), False
    blocks.denseblock1.forward = own = blocks.denseblock1.forward
    with faster_on_cpu(model):
        assert blocks.denseblock1.forward is own
        assert "bn_function" not in vars(layer)
        assert not any("forward" in vars(m) for m in (blocks.relu0, layer.relu1, layer.relu2))
        assert "forward" in vars(blocks.denseblock1.denselayer2.relu1)
        assert "bn_function" in vars(blocks.denseblock2.denselayer1)
        del blocks.denseblock3.forward
    assert blocks.denseblock1.forward is own
    del blocks.denseblock1.forward
    assert replaced(model) == set()
