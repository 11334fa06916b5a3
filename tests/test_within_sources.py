"""Training that compares classes within sources, so that no source need be learned."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from chestxray_covid import (
    Augmentation,
    ChestXrayDataset,
    Classifier,
    Preprocess,
    Sample,
    Trainer,
    TrainingConfig,
    TrainingError,
    build_densenet121,
    cross_validate,
    leave_one_source_out,
)
from chestxray_covid.training_loss import Varied
from chestxray_covid.training_network import TrainingNetwork
from chestxray_covid.training_order import ABSENT, draw_shares, epoch_order, told_by_sources

CLASSES = ("normal", "pneumonia", "covid19")
CONFIG = TrainingConfig(
    preprocess=Preprocess(size_px=64),
    augmentation=Augmentation.none(),
    epochs=6,
    batch_size=16,
    samples_per_epoch=240,
    learning_rate=5e-4,
    warmup_epochs=0,
    balance="none",
    precision="float32",
    device="cpu",
    monitor="last",
    patience=None,
    allow_confounded_sources=True,
    progress=False,
)


def draw(sample: Sample, size: tuple[int, int] | None) -> Image.Image:
    """Return noise, brighter above if of source ``b``, with a disc that is brighter if ill.

    Discs of the ill and of others overlap: their brightness differs by one standard deviation.
    """
    rng = np.random.default_rng(int(sample.patient_id))
    pixels = 110 + 8 * rng.standard_normal((64, 64))
    pixels[:16] += 40 * (sample.source == "b")
    y, x = np.mgrid[:64, :64] - 40
    pixels[x**2 + y**2 < 100] += 15 * (rng.standard_normal() + (sample.label == "covid19"))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def listed(
    counts: dict[tuple[str, str], int], classes: tuple[str, ...] = CLASSES, first: int = 0
) -> ChestXrayDataset:
    cells = [cell for cell, count in counts.items() for _ in range(count)]
    return ChestXrayDataset(
        (
            Sample(
                path=Path(f"{i}.png"),
                label=label,
                finding=label,
                patient_id=str(i),
                source=source,
                read=draw,
            )
            for i, (source, label) in enumerate(cells, first)
        ),
        classes=classes,
    )


UNEVEN = listed(
    {
        ("cohen", "covid19"): 30,
        ("cohen", "pneumonia"): 10,
        ("kermany", "pneumonia"): 40,
        ("kermany", "normal"): 20,
    }
)


#: Of one image each: COVID-19 and pneumonia of Cohen's, pneumonia and normal of Kermany's.
SHARES = {
    ("none", None): [0.01, 0.01, 0.01, 0.01],
    ("class", None): [1 / 90, 1 / 150, 1 / 150, 1 / 60],
    ("class_and_source", None): [1 / 90, 1 / 60, 1 / 240, 1 / 60],
    # Cohen's pneumonias may be 10 of 100 draws, and Kermany's take the rest of that class.
    ("class_and_source", 1): [1 / 90, 0.01, (1 / 3 - 0.1) / 40, 1 / 60],
}


@pytest.mark.parametrize(("balance", "max_repeats"), list(SHARES))
def test_shares_are_those_at_which_images_are_drawn(
    balance: str, max_repeats: float | None
) -> None:
    options = {"balance": balance, "max_repeats": max_repeats}
    shares = draw_shares(UNEVEN, count=None, **options)
    assert shares.sum() == pytest.approx(1)
    assert [shares[i] for i in (0, 30, 40, 80)] == pytest.approx(SHARES[balance, max_repeats])
    found: Counter[int] = Counter()
    for epoch in range(200):
        order = epoch_order(UNEVEN, count=None, seed=1, epoch=epoch, **options)
        found.update(order.tolist())
    drawn = np.array([found[i] for i in range(len(UNEVEN))]) / 20_000
    # The count of an image has a standard deviation of 18 at most, around 333 at most.
    assert drawn == pytest.approx(shares, abs=5 * 18 / 20_000)


def test_a_source_tells_its_share_of_each_class() -> None:
    told = told_by_sources(UNEVEN, replace(CONFIG, within_sources=True))
    assert told is not None
    assert told.shape == (100, 3)
    assert told.dtype == np.float32
    assert np.exp(told[:40]) == pytest.approx(np.array([[0, 0.25, 0.75]] * 40), abs=1e-6)
    assert np.exp(told[40:]) == pytest.approx(np.array([[1 / 3, 2 / 3, 0]] * 60), abs=1e-6)


def test_what_is_told_is_that_of_the_images_as_they_are_drawn() -> None:
    config = replace(CONFIG, within_sources=True, balance="class_and_source")
    told = told_by_sources(UNEVEN, config)
    assert told is not None
    # Cohen's: a third is COVID-19, a sixth half of the pneumonias; Kermany's in the same way.
    assert np.exp(told[0]) == pytest.approx([0, 1 / 3, 2 / 3], abs=1e-6)
    assert np.exp(told[-1]) == pytest.approx([2 / 3, 1 / 3, 0], abs=1e-6)


def test_nothing_is_told_unless_it_is_asked_for() -> None:
    assert told_by_sources(UNEVEN, CONFIG) is None


def test_what_no_source_compares_is_refused(tmp_path: Path) -> None:
    basic = listed({("cohen", "covid19"): 4, ("kermany", "normal"): 4}, ("normal", "covid19"))
    config = replace(CONFIG, within_sources=True)
    trainer = (build_densenet121(pretrained=False, num_classes=2), basic, basic_val(), config)
    with pytest.raises(TrainingError) as caught:
        Trainer(*trainer, output=tmp_path / "run")
    assert str(caught.value) == (
        "within_sources=True leaves nothing to tell normal from covid19: no source holds both. The "
        "sources are cohen (covid19); kermany (normal). Add a source with both, or use "
        "within_sources=False."
    )
    assert not (tmp_path / "run").exists()


def basic_val() -> ChestXrayDataset:
    counts = {("cohen", "covid19"): 2, ("kermany", "normal"): 2}
    return listed(counts, ("normal", "covid19"), first=100)


def test_a_fold_that_compares_too_little_is_refused_before_the_first_is_trained(
    tmp_path: Path,
) -> None:
    counts = {("cohen", "covid19"): 12, ("kermany", "pneumonia"): 12, ("kermany", "normal"): 12}
    data = listed({**counts, ("cohen", "pneumonia"): 1})  # in one of three folds held out
    config = replace(CONFIG, within_sources=True)
    with pytest.raises(TrainingError, match="nothing to tell normal, pneumonia from covid19: no"):
        cross_validate(data, config, model=small, folds=3, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_source_without_which_classes_are_not_compared_is_left_out_in_words(
    shallow: None,
) -> None:
    counts = {("cohen", "covid19"): 12, ("cohen", "pneumonia"): 12, ("hannover", "covid19"): 12}
    counts |= {("kermany", "pneumonia"): 12, ("kermany", "normal"): 12}
    config = replace(CONFIG, within_sources=True, epochs=1, samples_per_epoch=8, batch_size=8)
    rows = leave_one_source_out(listed(counts), config, model=small)
    notes = {row.source: row.note for row in rows}
    assert "within_sources" not in notes["hannover"]
    assert notes["cohen"].startswith(
        "Without cohen, within_sources=True leaves nothing to tell normal, pneumonia from covid19:"
    )


def small() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_densenet121(pretrained=False, num_classes=3)


def test_a_chain_of_sources_compares_its_ends() -> None:
    classes = ("a", "b", "c", "d")
    links = [("a", "b"), ("c", "d"), ("b", "c")]
    chain = {(str(i), label): 1 for i, link in enumerate(links) for label in link}
    config = replace(CONFIG, within_sources=True)
    assert told_by_sources(listed(chain, classes), config) is not None
    broken = {cell: 1 for cell in chain if cell[0] != "2"}
    with pytest.raises(TrainingError, match="nothing to tell a, b from c, d:"):
        told_by_sources(listed(broken, classes), config)


def test_class_weights_are_refused_with_it() -> None:
    with pytest.raises(ValueError, match="class_weights would move what within_sources adds"):
        TrainingConfig(within_sources=True, class_weights=True, balance="none")


def test_a_loss_compares_the_classes_of_the_source_or_all_where_the_centre_is_hidden() -> None:
    config = replace(CONFIG, hide_centre=0.3, within_sources=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_densenet121(pretrained=False, num_classes=3)
        pixels = torch.rand(5, 1, 64, 64) * 255
    net = TrainingNetwork(model, config, Accelerator(cpu=True), [0, 1, 2])
    hidden = torch.tensor([True, False, False, True, False])
    log = math.log
    told = np.array(
        [
            *([ABSENT, log(0.2), log(0.8)],) * 2,
            *([log(0.6), log(0.4), ABSENT],) * 2,
            [ABSENT, ABSENT, 0],
        ],
        np.float32,
    )
    targets = [2, 1, 0, 1, 2]
    with torch.inference_mode():
        shares = net.forward(model.train(), pixels).double().softmax(1).numpy()
    varied = Varied(pixels, hidden)
    found = net.backward(varied, targets, counted=5, share=1.0, last=True, told=told)
    losses = [
        -np.log(shares[0]).mean(),
        pair_loss(0.2 * shares[1, 1], 0.8 * shares[1, 2], 0.2),
        pair_loss(0.6 * shares[2, 0], 0.4 * shares[2, 1], 0.6),
        -np.log(shares[3]).mean(),
        0,  # of a source with one class
    ]
    assert float(found) == pytest.approx(sum(losses), rel=1e-4)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def pair_loss(right: float, wrong: float, share: float) -> float:
    """Return the cross-entropy of two unnormalised shares, with a smoothing of 0.05.

    Args:
        right: Of the image's own class.
        wrong: Of the other one.
        share: Of its own class in its source.
    """
    total, target = right + wrong, 0.95 + 0.05 * share
    return -target * math.log(right / total) - (1 - target) * math.log(wrong / total)


@pytest.mark.parametrize("smoothing", [0, 0.1])
@pytest.mark.parametrize("own", [[0, 1, 2, 30], [40, 41, 42, 43, 80, 81]])
def test_logits_that_are_all_the_same_have_nothing_to_gain_from_a_source(
    own: list[int], smoothing: float
) -> None:
    """The images are of one source, in its own shares, and look the same."""
    config = replace(CONFIG, within_sources=True, label_smoothing=smoothing)
    told = told_by_sources(UNEVEN, config)
    assert told is not None
    model = build_densenet121(pretrained=False, num_classes=3)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.zero_()
    net = TrainingNetwork(model, config, Accelerator(cpu=True), UNEVEN.targets)
    net.backward(
        Varied(torch.full((len(own), 1, 64, 64), 128.0), torch.zeros(len(own), dtype=torch.bool)),
        [UNEVEN.targets[i] for i in own],
        counted=len(own),
        share=1 / len(own),
        last=True,
        told=told[own],
    )
    gradient = model.classifier.bias.grad
    assert gradient is not None
    assert gradient.numpy() == pytest.approx(np.zeros(3), abs=1e-6)


def test_a_source_that_gives_the_label_away_is_not_learned(shallow: None, tmp_path: Path) -> None:
    """Nine of ten images of a source have its own label."""
    classes = ("normal", "covid19")
    counts = {("a", "covid19"): 108, ("a", "normal"): 12}
    counts |= {("b", "covid19"): 12, ("b", "normal"): 108}
    train = listed(counts, classes)
    even = {(source, label): 20 for source in "ab" for label in classes}
    val, held = listed(even, classes, 1000), listed(even, classes, 2000)
    moved = {}
    for within in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build_densenet121(pretrained=False, num_classes=2)
        config = replace(CONFIG, within_sources=within)
        Trainer(model, train, val, config, output=tmp_path / str(within)).fit()
        shares = Classifier.from_pretrained(tmp_path / str(within)).predict_proba(held)
        odds = np.log(shares[:, 1] / shares[:, 0]).reshape(2, 2, 20).mean(2)
        moved[within] = (odds[0] - odds[1]).mean()  # what the source alone moves an answer by
    # Two such runs, at rates of 5e-4 and 2e-3, gave 3.6 and 4.7 without it, 0.7 and 1.5 with it:
    # images of the training are told apart by their noise in the end, and the source less needed.
    assert moved[False] > 1.5
    assert abs(moved[True]) < 0.6 * moved[False]
