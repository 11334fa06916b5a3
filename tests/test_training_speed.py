"""What is faster on a CPU computes the very numbers of torchvision's network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
from accelerate import Accelerator
from torch import Tensor
from torchvision.models.densenet import _DenseLayer

from chestxray_covid import Preprocess, TrainingConfig, build_densenet121, training_speed
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
    loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1, 1])[: len(batch)])
    torch.autograd.backward(loss)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients, **dict(model.named_buffers())}


def test_the_gradient_is_torchs_for_every_number_of_16_bits() -> None:
    values = all_of_16_bits()
    gradient = values.flip(0).nan_to_num()
    found = []
    for relu in (torch.relu, lambda value: training_speed._relu(value.clone())):
        given = values.clone().requires_grad_()
        torch.autograd.backward(relu(given), gradient)
        assert given.grad is not None
        found.append(given.grad)
    expected, own = found
    negative_nan = values.isnan() & (values.view(torch.int16) < 0)
    assert torch.equal(own[~negative_nan], expected[~negative_nan])
    assert not own[negative_nan].any()
    assert expected[negative_nan].any()


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(
    ("trainable", "shape"),
    [
        ("all", (3, 3, 64, 64)),
        ("denseblock3", (3, 3, 64, 64)),
        ("head", (3, 3, 64, 64)),
        ("all", (3, 3, 32, 32)),  # the last maps are 1x1, in which the order of channels is moot
        ("all", (1, 3, 64, 64)),  # as is that of a single image
    ],
)
def test_logits_gradients_and_statistics_are_torchvisions(
    half: bool, last: bool, trainable: str, shape: tuple[int, ...]
) -> None:
    order = torch.channels_last if last else torch.contiguous_format
    model = build_densenet121(pretrained=False, trainable=trainable, seed=1)
    model.to(memory_format=order)
    set_training_mode(model)
    generator = torch.Generator().manual_seed(2)
    batch = torch.randn(shape, generator=generator).contiguous(memory_format=order)
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
            # What is validated has no gradient to compute again.
            assert replaced(net.best) == (ALL if expected else set())
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


def test_hooks_see_layers_take_a_list_and_make_what_they_made() -> None:
    model = build_densenet121(pretrained=False, seed=0).eval()
    batch = torch.ones(1, 3, 32, 32)
    seen: list[list[tuple[type, torch.Size]]] = [[], []]
    ways: list[AbstractContextManager[None]] = [nullcontext(), faster_on_cpu(model)]
    for found, way in zip(seen, ways, strict=True):
        with way:
            hooks = [
                m.register_forward_hook(
                    lambda _, given, made, own=found: own.append((type(given[0]), made.shape))
                )
                for m in model.features.modules()
            ]
            model(batch)
        for hook in hooks:
            hook.remove()
    assert seen[0] == seen[1]
    assert len(seen[0]) > 400


def test_a_layer_that_is_called_by_itself_takes_several_parts() -> None:
    layer = build_densenet121(pretrained=False, seed=0).eval().features.denseblock1.denselayer2
    parts = [torch.ones(1, 64, 8, 8), torch.ones(1, 32, 8, 8)]
    expected = layer(parts)
    assert torch.equal(training_speed._bottleneck(layer, parts), layer.bn_function(parts))
    assert torch.equal(layer(torch.cat(parts, 1)), expected)


class OwnReLU(torch.nn.ReLU):
    """A ReLU of somebody's own."""

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value)


class OwnLayer(_DenseLayer):
    """A layer that computes something else."""

    def bn_function(self, inputs: list[Tensor]) -> Tensor:
        return super().bn_function(inputs) * 0


def own_class(block: Any) -> None:
    block.denselayer1.__class__ = OwnLayer


def own_forward(block: Any) -> None:
    block.denselayer1.forward = block.denselayer1.forward


def own_bottleneck(block: Any) -> None:
    block.denselayer1.bn_function = block.denselayer1.bn_function


def own_block(block: Any) -> None:
    block.forward = block.forward


def own_norm(block: Any) -> None:
    block.denselayer1.norm1 = torch.nn.Identity()


def hooked(block: Any) -> None:
    block.denselayer1.norm1.register_forward_pre_hook(lambda _, given: given[0].mul_(2))


def checkpointed(block: Any) -> None:
    block.denselayer1.memory_efficient = True


OWN = (own_class, own_forward, own_bottleneck, own_block, own_norm, hooked, checkpointed)


@pytest.mark.parametrize("change", OWN)
def test_a_block_that_somebody_made_their_own_stays(change: Callable[[Any], None]) -> None:
    model = build_densenet121(pretrained=False, seed=0).eval()
    block = model.features.denseblock2
    change(block)
    before = {name: dict(vars(m)) for name, m in block.named_modules() if name.count(".") == 0}
    batch = torch.ones(1, 3, 64, 64)
    expected = model(batch)
    with faster_on_cpu(model):
        for name, own in before.items():
            assert vars(block.get_submodule(name)) == own
        assert "bn_function" in vars(model.features.denseblock3.denselayer1)
        assert torch.equal(model(batch), expected)


def test_other_relus_stay_and_what_is_set_meanwhile_too() -> None:
    model = build_densenet121(pretrained=False, seed=0)
    layer, block = model.features.denseblock1.denselayer1, model.features.denseblock3
    model.features.relu0 = OwnReLU(inplace=True)
    layer.relu1.inplace = False
    with faster_on_cpu(model):
        assert not any("forward" in vars(m) for m in (model.features.relu0, layer.relu1))
        assert "forward" in vars(layer.relu2)
        del layer.relu2.forward
        own = block.forward = lambda features: features
    assert block.forward is own
    del block.forward
    assert replaced(model) == set()
