from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import DenseNet
from torchvision.transforms import v2

from chestxray_covid import TrainingConfig, models
from chestxray_covid.checkpoint import ModelConfig, save_checkpoint
from chestxray_covid.engine_torch import native_bfloat16
from chestxray_covid.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    WeightsUnavailableError,
)
from chestxray_covid.image import Preprocess
from chestxray_covid.models import (
    TRAINABLE,
    build_densenet121,
    check_answers,
    check_model,
    forward_features,
    from_tensors,
    load_tensors,
    make_network,
    normalise,
    set_trainable,
    set_training_mode,
    to_array,
    to_tensors,
)
from chestxray_covid.processor import slow_bfloat16
from conftest import random_tensors

IMAGENET = torchvision.models.DenseNet121_Weights.IMAGENET1K_V1
HEAD = {"classifier.weight", "classifier.bias"}
#: What trains, written down by hand: the children of torchvision's ``features`` in order.
STAGES = [
    ["conv0", "norm0", "relu0", "pool0"],
    ["denseblock1", "transition1"],
    ["denseblock2", "transition2"],
    ["denseblock3", "transition3"],
    ["denseblock4", "norm5"],
]


def trained_stages(trainable: str) -> list[str]:
    first = {"all": 0, "head": len(STAGES)}.get(trainable)
    first = int(trainable[-1]) if first is None else first
    return [f"features.{name}." for stage in STAGES[first:] for name in stage]


@pytest.fixture(scope="module")
def model() -> DenseNet:
    """Return a network with random weights; who changes it uses one of their own."""
    return from_tensors(random_tensors(2))


def images(count: int = 2, side: int = 32, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, 1, side, side), dtype=np.uint8))


# ---------------------------------------------------------------- what trains


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_training_begins_at_the_block_that_is_named(trainable: str) -> None:
    model = build_densenet121(pretrained=False, trainable=trainable)
    trains = tuple(trained_stages(trainable))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in HEAD or name.startswith(trains)), name


def test_thawing_takes_back_what_was_frozen(model: DenseNet) -> None:
    own = from_tensors(to_tensors(model))
    set_trainable(own, "head")
    set_trainable(own, "denseblock4")
    set_trainable(own, "all")
    assert all(p.requires_grad for p in own.parameters())


@pytest.mark.parametrize("given", [None, "densenet121-v1", models])
def test_what_is_no_network_cannot_train(given: Any) -> None:
    kind = type(given).__name__
    for use in (set_trainable, check_model):
        with pytest.raises(TypeError, match=rf"expected Module, as build.* gives it, got {kind}"):
            use(given, "all")


@pytest.mark.parametrize("trainable", ["", "heads", "denseblock5", "features", None, True])
def test_an_unknown_part_to_train_is_refused(trainable: Any) -> None:
    with pytest.raises(ValueError, match=r"trainable must be one of \('all', .*'head'\), got"):
        build_densenet121(pretrained=False, trainable=trainable)


@pytest.mark.parametrize("num_classes", [1, 0, -3, 2.5, "2"])
def test_fewer_than_two_classes_are_refused(num_classes: Any) -> None:
    expected = f"num_classes must be a whole number of at least 2, got {num_classes!r}"
    with pytest.raises(ValueError, match=expected):
        build_densenet121(pretrained=False, num_classes=num_classes)
    assert build_densenet121(False, num_classes=np.int64(3)).classifier.out_features == 3


@pytest.mark.parametrize("seed", [-1, 10**20, 1.5, "1"])
def test_a_seed_that_torch_cannot_take_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match=f"seed must be a whole number from 0 to .*, got {seed!r}"):
        build_densenet121(False, seed=seed)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_a_model_of_another_precision_is_not_trained(kind: torch.dtype) -> None:
    model = build_densenet121(False).to(kind)
    with pytest.raises(ValueError, match=rf"model is of {kind}.*call model\.float\(\)"):
        check_model(model, ("normal", "covid19"))


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_network_of_another_precision_becomes_a_checkpoint(kind: torch.dtype) -> None:
    model = build_densenet121(False).to(kind)
    again = from_tensors(to_tensors(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.float()), name


@pytest.mark.parametrize("around", [torch.compile, nn.DataParallel])
def test_the_tensors_of_a_wrapped_network_are_its_own(
    model: DenseNet, around: Callable[[nn.Module], nn.Module]
) -> None:
    expected, found = to_tensors(model), to_tensors(nn.DataParallel(around(model)))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(array, expected[name]) for name, array in found.items())


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_batch_norms_of_frozen_parts_stay_in_evaluation(model: DenseNet, trainable: str) -> None:
    own = from_tensors(to_tensors(model))
    set_trainable(own, trainable)
    set_training_mode(own)
    trains = tuple(trained_stages(trainable))
    norms = {n: m for n, m in own.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == 121
    for name, norm in norms.items():
        assert norm.training == f"{name}.".startswith(trains), name


def stepped(trainable: str, *, mode: str) -> tuple[dict[str, Tensor], dict[str, Tensor], DenseNet]:
    """Return the state before and after one real training step."""
    own = from_tensors(random_tensors(2))
    set_trainable(own, trainable)
    if mode == "ours":
        set_training_mode(own)
    else:
        own.train()
    before = {k: v.clone() for k, v in own.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in own.parameters() if p.requires_grad], lr=0.1)
    loss = nn.functional.cross_entropy(
        own(normalise(images(4), Preprocess())), torch.tensor([0, 1, 1, 0])
    )
    loss.backward()
    optimizer.step()
    return before, own.state_dict(), own


@pytest.mark.parametrize("trainable", ["all", "denseblock3", "head"])
def test_a_training_step_moves_what_trains_and_no_statistic_of_what_does_not(
    trainable: str,
) -> None:
    before, after, own = stepped(trainable, mode="ours")
    trains = tuple(trained_stages(trainable))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name in HEAD or name.startswith(trains) for name in moved)
    assert moved >= HEAD
    statistics = {n for n in before if "running" in n and n.startswith(trains)}
    assert moved >= statistics
    still = {n for n, p in own.named_parameters() if p.requires_grad} - moved
    assert len(still) < 5  # a gradient may be zero by chance


@pytest.mark.slow
def test_plain_training_mode_would_move_the_statistics_of_frozen_parts() -> None:
    before, after, _ = stepped("head", mode="plain")
    assert not torch.equal(
        before["features.norm0.running_mean"], after["features.norm0.running_mean"]
    )


# ---------------------------------------------------------------- where weights come from


@pytest.mark.parametrize("pretrained", [None, 1, 0])
def test_what_names_no_weights_is_refused(pretrained: Any) -> None:
    with pytest.raises(TypeError, match=rf"True \(ImageNet\), False .*, got {pretrained}"):
        build_densenet121(pretrained=pretrained)


def test_without_pretraining_it_is_torchvisions_network() -> None:
    ours = build_densenet121(pretrained=False, num_classes=5)
    assert type(ours) is DenseNet
    theirs = torchvision.models.densenet121(weights=None, num_classes=5)
    assert str(ours) == str(theirs)


@pytest.fixture(scope="module")
def half_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    tensors = {
        k: v.astype(np.float16) if v.dtype.kind == "f" else v for k, v in random_tensors(2).items()
    }
    save_checkpoint(folder, ModelConfig(classes=("normal", "covid19")), tensors)
    return folder


def test_a_checkpoint_gives_all_its_weights_where_the_classes_fit(checkpoint_folder: Path) -> None:
    model = build_densenet121(checkpoint_folder, "denseblock4", num_classes=3)
    expected = random_tensors(3)
    assert all(np.array_equal(array, expected[k]) for k, array in to_tensors(model).items())
    assert not model.features.conv0.weight.requires_grad


def test_a_checkpoint_of_other_classes_gives_its_features_and_a_random_head(
    checkpoint_folder: Path,
) -> None:
    model = build_densenet121(str(checkpoint_folder), num_classes=5)
    expected = random_tensors(3)
    found = to_tensors(model)
    assert all(np.array_equal(found[k], expected[k]) for k in expected if k not in HEAD)
    assert found["classifier.weight"].shape == (5, 1024)
    # torch's default for a linear layer: uniform within 1 / sqrt(inputs)
    assert 0.9 / 32 < np.abs(found["classifier.weight"]).max() <= 1 / 32


def test_half_precision_becomes_single(half_checkpoint: Path) -> None:
    model = build_densenet121(half_checkpoint)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = random_tensors(2)["features.conv0.weight"].astype(np.float16).astype(np.float32)
    assert np.array_equal(model.features.conv0.weight.detach().numpy(), expected)


@pytest.mark.parametrize("name", ["nothing", "x" * 300, "org/model"])
def test_a_checkpoint_that_is_no_folder_is_not_found(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is no checkpoint folder, no bundled"):
        build_densenet121(tmp_path / name)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, half_checkpoint: Path) -> None:
    for file in half_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:-1] + b" ")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        build_densenet121(tmp_path)


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where torchvision will look for the ImageNet weights: an empty folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    return place / Path(IMAGENET.url).name


@pytest.mark.parametrize("naming", ["today's", "published"])
def test_imagenet_weights_come_from_the_cache_and_get_a_new_head(
    torch_home: Path, naming: str
) -> None:
    state = {k: torch.from_numpy(v) for k, v in random_tensors(1000).items()}
    if naming == "published":  # names that torchvision renames, and no counters
        state = {
            k.replace("norm1", "norm.1")
            .replace("norm2", "norm.2")
            .replace("conv1", "conv.1")
            .replace("conv2", "conv.2"): v
            for k, v in state.items()
            if not k.endswith("num_batches_tracked")
        }
    torch.save(state, torch_home)
    model = build_densenet121(pretrained=True, num_classes=3)
    expected = random_tensors(1000)
    found = to_tensors(model)
    for name in expected:
        if name not in HEAD and not name.endswith("num_batches_tracked"):
            assert np.array_equal(found[name], expected[name]), name
    assert found["classifier.weight"].shape == (3, 1024)
    assert all(p.requires_grad for p in model.parameters())


def test_every_seed_of_a_training_gives_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_imagenet", lambda: torchvision.models.DenseNet(8, (1,), 16))
    heads = [
        make_network(None, 2, TrainingConfig(seed=seed).seed).classifier.weight
        for seed in (2**63 - 1, 2**63, 2**70 + 1)
    ]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])


def damaged() -> dict[str, bytes]:
    other = io.BytesIO()
    torch.save([torch.zeros(2)], other)
    return {
        "empty": b"",
        "zeros": bytes(1000),
        "cut": b"PK\x03\x04" + bytes(2000),
        "page of a proxy": b"<!DOCTYPE html><html>403 Forbidden</html>",
        "no state": other.getvalue(),
    }


@pytest.mark.parametrize("kind", damaged())
def test_damaged_imagenet_weights_are_named(torch_home: Path, kind: str) -> None:
    torch_home.write_bytes(damaged()[kind])
    with pytest.raises(WeightsUnavailableError, match="are not to be had") as caught:
        build_densenet121(pretrained=True)
    assert f"Put {IMAGENET.url} at {torch_home}" in str(caught.value)


def test_imagenet_weights_of_another_network_are_refused(torch_home: Path) -> None:
    torch.save({"fc.weight": torch.zeros(1000, 512)}, torch_home)
    with pytest.raises(WeightsUnavailableError, match=r"Missing key\(s\) in state_dict"):
        build_densenet121(pretrained=True)


@pytest.mark.usefixtures("torch_home")
def test_where_sockets_are_blocked_the_alternatives_are_named() -> None:
    with pytest.raises(WeightsUnavailableError, match="--no-pretrained") as caught:
        build_densenet121(pretrained=True)
    assert isinstance(caught.value, OSError)
    assert caught.value.__cause__ is not None
    for alternative in (IMAGENET.url, "pretrained=False", "pretrained=<checkpoint folder>"):
        assert alternative in str(caught.value)


OFFLINE = """
import socket
def refused(*arguments, **options):
    raise {error}
socket.getaddrinfo = refused
from chestxray_covid import WeightsUnavailableError, build_densenet121
try:
    build_densenet121(pretrained=True)
except WeightsUnavailableError as error:
    print(type(error.__cause__).__name__, error)
"""


@pytest.mark.slow
def test_without_a_route_the_alternatives_are_named(torch_home: Path) -> None:
    error = "socket.gaierror(-3, 'Temporary failure in name resolution')"
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE.format(error=error)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "URLError The ImageNet weights of DenseNet-121 are not to be had" in done.stdout
    assert "Temporary failure in name resolution" in done.stdout
    assert not list(torch_home.parent.iterdir())


# ---------------------------------------------------------------- from pixels to features


@pytest.mark.parametrize("preprocess", [Preprocess(), Preprocess(mean=0.1, std=0.9)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalising_is_what_torchvision_does_with_three_equal_channels(
    preprocess: Preprocess, dtype: torch.dtype
) -> None:
    pixels = images(3)
    pixels[0, 0, 0, :2] = torch.tensor([0, 255])
    pipeline = v2.Compose(
        [
            v2.RGB(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([preprocess.mean] * 3, [preprocess.std] * 3),
        ]
    )
    given = pixels.to(dtype)
    ours = normalise(given, preprocess)
    assert (ours.shape, ours.dtype) == ((3, 3, 32, 32), torch.float32)
    torch.testing.assert_close(ours, pipeline(pixels), atol=1e-6, rtol=0)
    assert torch.equal(given, pixels.to(dtype)), "the caller's pixels stay as they were"
    assert ours.stride(1) == 0, "the channels share their memory"


def test_features_and_classifier_are_the_whole_network(model: DenseNet) -> None:
    batch = normalise(images(3, 64), Preprocess())
    with torch.inference_mode():
        features = forward_features(model, batch)
        assert features.shape == (3, 1024)
        assert (features >= 0).all()
        torch.testing.assert_close(model.classifier(features), model(batch), atol=1e-6, rtol=0)


def test_features_have_gradients_and_change_no_input(model: DenseNet) -> None:
    batch = normalise(images(1), Preprocess()).contiguous().requires_grad_()
    before = batch.detach().clone()
    (gradient,) = torch.autograd.grad(forward_features(model, batch).sum(), batch)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
    assert torch.equal(batch.detach(), before)


# ---------------------------------------------------------------- tensors


def test_state_goes_to_arrays_and_back_bit_by_bit(model: DenseNet) -> None:
    other = from_tensors(to_tensors(model))
    assert not other.training
    ours, theirs = model.state_dict(), other.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_arrays_are_copies_in_row_major_order() -> None:
    tensor = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    array = to_array(tensor)
    assert array.flags.c_contiguous
    tensor.zero_()
    assert array.flat[23] == 23


@pytest.mark.parametrize("name", ["classifier.bias", "more"])
def test_tensors_that_do_not_fit_are_refused(name: str) -> None:
    tensors = random_tensors(2) | {name: np.zeros(7, np.float32)}
    model = torchvision.models.densenet121(weights=None, num_classes=2)
    with pytest.raises(RuntimeError, match=f'(size mismatch for |Unexpected key.*"){name}'):
        load_tensors(model, tensors)


def test_read_only_arrays_can_be_loaded(model: DenseNet) -> None:
    tensors = to_tensors(model)
    for array in tensors.values():
        array.flags.writeable = False
    own = from_tensors(tensors)
    with torch.no_grad():
        own.classifier.bias.add_(1)
    assert not tensors["classifier.bias"].any()


# ---------------------------------------------------------------- checks


def test_a_network_that_fits_its_classes_passes(model: DenseNet) -> None:
    check_model(model, ("normal", "covid19"))


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(3, 2),
        nn.Sequential(nn.Flatten()),
        torchvision.models.resnet18(weights=None, num_classes=2),
        torchvision.models.densenet169(weights=None, num_classes=2),
    ],
    ids=["linear", "nothing", "resnet18", "densenet169"],
)
def test_another_network_is_refused(other: nn.Module) -> None:
    with pytest.raises(
        ValueError,
        match=f"must be a DenseNet-121 from build_densenet121, got {type(other).__name__}",
    ):
        check_model(other, ("normal", "covid19"))


def test_a_network_of_other_classes_is_refused(model: DenseNet) -> None:
    with pytest.raises(
        ValueError, match=r"model has 2 logits, .* 3 classes .* Build it with num_classes=3"
    ):
        check_model(model, ("normal", "pneumonia", "covid19"))


def test_a_network_that_drops_at_random_is_refused() -> None:
    own = torchvision.models.densenet121(weights=None, num_classes=2, drop_rate=0.1)
    other = torchvision.models.densenet121(weights=None, num_classes=2)
    other.features.add_module("dropout", nn.Dropout2d(0.1))
    for model in (own, other):
        with pytest.raises(ValueError, match=r"drops features at random.*drop_rate=0"):
            check_model(model, ("normal", "covid19"))


def test_a_network_whose_weights_take_no_gradient_is_refused() -> None:
    with torch.inference_mode():
        model = torchvision.models.densenet121(weights=None, num_classes=2)
    with pytest.raises(ValueError, match=r"built under torch\.inference_mode.*build it outside"):
        check_model(model, ("normal", "covid19"))


class MaximumPooled(DenseNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = torch.relu(self.features(x))
        return self.classifier(nn.functional.adaptive_max_pool2d(maps, 1).flatten(1))


def test_a_network_that_answers_otherwise_than_its_weights_is_refused(model: DenseNet) -> None:
    others = [
        MaximumPooled(32, (6, 12, 24, 16), 64, num_classes=2),
        from_tensors(to_tensors(model)),
    ]
    others[1].features.relu0 = nn.SiLU()
    for other in others:
        check_model(other, ("normal", "covid19"))  # by its weights it is one
        other.train()
        with pytest.raises(
            ValueError, match=f"a {type(other).__name__}, has the weights of .* but"
        ):
            check_answers(other)
        assert all(module.training for module in other.modules())
    check_answers(model)
    torch.set_default_dtype(torch.float64)  # which is the caller's
    try:
        check_answers(model)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_weights_of_a_seed_are_the_same_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    expected = build_densenet121(False, seed=3).state_dict()
    torch.set_default_dtype(dtype)
    try:
        found = build_densenet121(False, seed=3).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_network_that_is_all_frozen_is_refused(model: DenseNet) -> None:
    own = from_tensors(to_tensors(model)).requires_grad_(False)
    with pytest.raises(ValueError, match="All parameters are frozen: nothing would train"):
        check_model(own, ("normal", "covid19"))


def test_bfloat16_is_native_where_the_processor_says_so() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.is_file():
        pytest.skip("needs /proc/cpuinfo")
    words = set(flags.read_text().split())
    has = "avx512_bf16" in words or "amx_tile" in words
    expected = has and not slow_bfloat16()
    assert native_bfloat16(torch.device("cpu")) is expected
    assert native_bfloat16(torch.device("meta")) is False


def test_a_model_lies_on_the_default_device_with_weights_that_the_cpu_has_drawn() -> None:
    before = torch.random.get_rng_state()
    with torch.random.fork_rng(), torch.device("meta"):  # stands for a GPU
        model = build_densenet121(pretrained=False)
        assert not torch.equal(torch.random.get_rng_state(), before)
    assert all(t.is_meta for t in model.state_dict().values())
    with pytest.raises(ValueError, match="model is on the device meta, where weights have no"):
        check_model(model, ("normal", "covid19"))


def test_a_seed_makes_random_weights_a_function_of_it() -> None:
    seeds = (1, np.int64(1))
    first, again = (build_densenet121(pretrained=False, seed=n).state_dict() for n in seeds)
    other = build_densenet121(pretrained=False, seed=2).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["features.conv0.weight"], other["features.conv0.weight"])
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    # He et al. 2015: deviation sqrt(2 / fan in); the network's own draws have it too.
    layer = "features.denseblock3.denselayer9.conv2.weight"
    assert float(first[layer].std()) == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.05)
