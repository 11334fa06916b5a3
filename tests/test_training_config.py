"""Options, learning rate and history."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch._inductor.exc import InductorError

from chestxray_covid import (
    Callback,
    EpochRecord,
    History,
    Preprocess,
    SyntheticChestXray,
    Trainer,
    TrainingConfig,
    build_densenet121,
    set_trainable,
    split_by_patient,
)
from chestxray_covid.errors import ConfigError, TrainingError
from chestxray_covid.models import to_tensors
from chestxray_covid.training_history import validation_numbers
from chestxray_covid.training_network import TrainingNetwork
from conftest import NUMPY_BOOL, Elsewhere


def record(epoch: int, *, is_best: bool = False) -> EpochRecord:
    return EpochRecord(
        epoch=epoch,
        learning_rate=0.1 / 3,
        train_loss=0.7,
        val_loss=1 / 3,
        val_accuracy=0.5,
        val_kappa=None,
        val_auroc=0.25,
        images_per_s=10.0,
        seconds=2.0,
        data_seconds=0.1,
        is_best=is_best,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (n, v)
            for n in ("epochs", "batch_size", "accumulate", "workers")
            for v in (0, 1.5, True)
        ],
        ("batch_size", "most"),
        ("step_epochs", 0),
        ("samples_per_epoch", 0),
        ("patience", 0),
        ("checkpoint_every", -1),
        ("seed", -1),
        ("seed", 1.0),
        *[("learning_rate", v) for v in (0, -1, math.nan, math.inf)],
        *[("weight_decay", v) for v in (-1, math.nan, math.inf)],
        *[("mixup", v) for v in (-1, math.nan, 101)],
        ("warmup_epochs", math.nan),
        *[
            (n, v)
            for n in (
                "label_smoothing",
                "ema_decay",
                "swap_background",
                "swap_frame",
                "hide_centre",
            )
            for v in (-0.1, 1, math.nan)
        ],
        *[("max_repeats", v) for v in (0.5, math.nan, math.inf)],
        *[("clip_norm", v) for v in (0, -1, math.nan, math.inf)],
        ("epochs", ""),
        ("epochs", None),
        ("patience", np.int64(0)),
        *[("seed", v) for v in NUMPY_BOOL],
        *[("step_factor", v) for v in (0, 1.1, math.nan)],
        *[(n, "x") for n in ("optimizer", "schedule", "balance", "monitor", "precision", "device")],
        ("compile_backend", "turbo"),
    ],
)
def test_an_impossible_option_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        TrainingConfig(**{field: value})


def test_what_would_move_batch_norms_otherwise_is_refused() -> None:
    with pytest.raises(ValueError, match="compile_backend and gradient_checkpointing cannot be"):
        TrainingConfig(compile_backend="aot_eager", gradient_checkpointing=True)


@pytest.mark.parametrize("place", [b"/tmp/x", 5, ""])
def test_a_cache_is_a_path_of_text(place: object) -> None:
    with pytest.raises(TypeError):
        TrainingConfig(cache_dir=place)


def test_a_cache_is_no_address_nor_its_local_copy(tmp_path: Path) -> None:
    for place in ("s3://bucket/cache", Elsewhere("s3://bucket/cache", tmp_path)):
        with pytest.raises(ValueError, match="s3://bucket/cache is an address"):
            TrainingConfig(cache_dir=place)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("preprocess", 224),
        ("augmentation", None),
        ("channels_last", "no"),
        ("within_sources", 1),
        ("allow_confounded_sources", 1),
        ("gradient_checkpointing", 1),
        ("progress", 1),
        ("learning_rate", "0.1"),
        ("ema_decay", True),
        ("ema_decay", None),
        *[(n, v) for n in ("max_repeats", "clip_norm") for v in ("4", True)],
    ],
)
def test_an_option_of_the_wrong_type_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=field):
        TrainingConfig(**{field: value})


def test_numbers_of_other_kinds_become_pythons_own() -> None:
    config = TrainingConfig(
        learning_rate=np.float32(0.5),
        weight_decay=Fraction(1, 4),
        max_repeats=np.int64(3),
        epochs=np.int64(3),
        batch_size=np.uint8(4),
        patience=np.int32(2),
        seed=np.int64(7),
    )
    assert config == TrainingConfig(
        learning_rate=0.5,
        weight_decay=0.25,
        max_repeats=3,
        epochs=3,
        batch_size=4,
        patience=2,
        seed=7,
    )
    data = config.to_dict()
    assert json.loads(json.dumps(data)) == data


def test_options_are_read_as_they_were_written() -> None:
    made = TrainingConfig.baseline(epochs=3, monitor="last", cache_dir="cache", mixup=0.2)
    written = json.loads(json.dumps(made.to_dict()))
    assert TrainingConfig.from_dict(written) == made
    assert TrainingConfig.from_dict({}) == TrainingConfig()


def test_what_options_leave_out_is_taken_from_the_base() -> None:
    base = TrainingConfig.baseline(preprocess=Preprocess(size_px=64, mean=0.3))
    data = {"epochs": 3, "augmentation": {"blur": 0.1}, "preprocess": {"size_px": 96}}
    assert TrainingConfig.from_dict(data, base=base) == replace(
        base,
        epochs=3,
        augmentation=replace(base.augmentation, blur=0.1),
        preprocess=Preprocess(size_px=96, mean=0.3),
    )


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (["epochs"], "TrainingConfig takes an object of names and values, got .'epochs'"),
        ({"epoch": 3}, "TrainingConfig has no option named epoch$"),
        ({"augmentation": {"blurr": 0}}, "Augmentation has no option named blurr$"),
        ({"augmentation": None}, "Augmentation takes an object .* got None"),
        ({"preprocess": {"side": 64}}, "Preprocess has no option named side$"),
        ({"preprocess": {"size_px": "64"}}, "An option is impossible: size_px"),
        ({"augmentation": {"blur": 2}}, "An option is impossible: blur"),
        ({"epochs": None}, "An option is impossible: epochs"),
        ({"mixup": 0.2, "within_sources": True}, "An option is impossible: mixup blends"),
    ],
)
def test_options_that_cannot_be_read_are_refused_by_name(data: object, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        TrainingConfig.from_dict(data)


@pytest.mark.parametrize("balance", ["class", "none"])
def test_a_limit_of_repeats_is_refused_where_no_sources_are_balanced(balance: str) -> None:
    with pytest.raises(ValueError, match=f"max_repeats limits .* balance='{balance}' does not"):
        TrainingConfig(max_repeats=3, balance=balance)


def test_class_weights_on_top_of_balanced_drawing_are_refused() -> None:
    with pytest.raises(ValueError, match="correct a second time"):
        TrainingConfig(class_weights=True)


def test_class_weights_with_hidden_centres_are_refused() -> None:
    with pytest.raises(ValueError, match="which are of no class"):
        TrainingConfig(class_weights=True, balance="none", hide_centre=0.1)


@pytest.mark.parametrize(
    "other", [{"class_weights": True, "balance": "none"}, {"within_sources": True}]
)
def test_blends_are_refused_where_images_are_weighed_one_by_one(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"mixup blends .* Use mixup=0, or {next(iter(other))}="):
        TrainingConfig(mixup=0.2, **other)


def test_a_cache_folder_may_be_a_path(tmp_path) -> None:
    assert TrainingConfig(cache_dir=tmp_path).cache_dir == str(tmp_path)


def test_warming_up_never_takes_more_than_a_fifth_of_the_run() -> None:
    config = TrainingConfig(epochs=1, learning_rate=1.0)
    rates = [config.rate_at(step, 10) for step in range(10)]
    assert max(rates) == rates[2]
    assert rates[-1] < 0.1


def test_the_baseline_is_the_classic_recipe() -> None:
    config = TrainingConfig.baseline()
    assert (config.preprocess.size_px, config.batch_size, config.epochs) == (150, 8, 10)
    assert (config.optimizer, config.learning_rate, config.weight_decay) == ("adam", 1e-3, 0)
    assert (config.augmentation.rotation_deg, config.augmentation.horizontal_flip) == (10, 0.4)
    assert config.augmentation.gamma == config.augmentation.contrast == 1
    assert (config.label_smoothing, config.balance, config.monitor) == (0, "none", "val_loss")
    assert TrainingConfig.baseline(epochs=3).epochs == 3


def test_the_baselines_rate_equals_torchs_step_schedule() -> None:
    config = TrainingConfig.baseline(epochs=20)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.1)
    for epoch in range(20):
        for step in range(5):
            expected = optimizer.param_groups[0]["lr"]
            assert config.rate_at(5 * epoch + step, 5) == pytest.approx(expected)
        optimizer.step()
        schedule.step()


def test_the_recommended_rate_warms_up_and_falls_like_torchs_cosine() -> None:
    config = TrainingConfig(epochs=5, warmup_epochs=1, learning_rate=1.0)
    rates = [config.rate_at(step, 10) for step in range(50)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    for rate in rates[10:]:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


def test_options_become_json() -> None:
    config = TrainingConfig(preprocess=Preprocess(size_px=96))
    data = json.loads(json.dumps(config.to_dict()))
    assert data["preprocess"]["size_px"] == 96
    assert data["augmentation"]["rotation_deg"] == 7.0


def test_a_history_survives_json_and_csv_exactly(tmp_path) -> None:
    history = History(records=(record(1, is_best=True), record(2)))
    history.save(tmp_path)
    assert History.from_dict(json.loads((tmp_path / "history.json").read_text())) == history
    table = pd.read_csv(tmp_path / "history.csv")
    assert table["val_loss"].tolist() == [1 / 3, 1 / 3]
    assert table["val_kappa"].isna().all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["history.csv", "history.json"]
    assert len(history.to_frame()) == len(history) == len(list(history)) == 2


def test_the_best_epoch_is_the_last_that_was_best() -> None:
    records = (record(1, is_best=True), record(2, is_best=True), record(3))
    assert History(records=records).best.epoch == 2
    for without in ((), (record(1),)):
        with pytest.raises(ValueError, match=f"No epoch is finished: .* of {len(without)} rec"):
            _ = History(records=without).best


def test_a_history_that_does_not_say_so_is_not_finished(tmp_path) -> None:
    data = History(records=(record(1),), finished=True).to_dict()
    assert History.from_dict(data).finished
    del data["finished"]
    assert History.from_dict(data) == History(records=(record(1),))


def test_the_home_folder_is_found_by_its_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    History(records=(record(1),)).save("~")
    assert (tmp_path / "history.json").is_file()


WHOLE = History(records=(record(1),)).to_dict()["epochs"][0]


def test_numbers_that_another_program_wrote_without_a_point_are_taken() -> None:
    (read,) = History.from_dict({"epochs": [{**WHOLE, "val_accuracy": 1}]})
    assert read.val_accuracy == 1


@pytest.mark.parametrize(
    "data",
    [
        *(None, {}, [], {"epochs": [{"epoch": 1}]}, {"epochs": [3]}, {"epochs": "abc"}),
        {"epochs": [], "finished": "yes"},
        *[
            {"epochs": [{**WHOLE, **wrong}]}
            for wrong in ({"epoch": "1"}, {"epoch": 1.5}, {"is_best": 1}, {"val_loss": None})
        ],
    ],
)
def test_what_is_no_history_is_refused(data: object) -> None:
    with pytest.raises(TrainingError, match=r"no training history.*Expected what History\.to_dict"):
        History.from_dict(data)


def test_validation_numbers_agree_with_hand_counts() -> None:
    targets = np.array([0, 0, 1, 1])
    shares = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]])
    numbers = validation_numbers(targets, shares)
    # accuracy 3/4; kappa (0.75 - 0.5) / (1 - 0.5); every positive above every negative
    assert numbers == {"val_accuracy": 0.75, "val_kappa": 0.5, "val_auroc": 1.0}


def test_the_auroc_of_three_classes_is_the_mean_of_one_against_the_rest() -> None:
    rng = np.random.default_rng(0)
    targets = np.arange(60) % 3
    shares = rng.dirichlet([1, 1, 1], 60)
    expected = np.mean([roc_auc_score(targets == k, shares[:, k]) for k in range(3)])
    assert validation_numbers(targets, shares)["val_auroc"] == pytest.approx(expected)


def test_numbers_that_one_class_cannot_give_are_absent() -> None:
    numbers = validation_numbers(np.zeros(3, int), np.array([[0.9, 0.1]] * 3))
    assert numbers == {"val_accuracy": 1.0, "val_kappa": None, "val_auroc": None}


class _SeenError(Exception):
    """What is to be seen was seen."""


class _Look(Callback):
    """Looks at predictions as many notebooks do, and ends the run at the second step."""

    def on_step_end(self, trainer: Trainer, step: int, loss: float) -> None:
        if step == 2:
            raise _SeenError
        trainer.model.eval()
        trainer.model.train()


class _Unfreeze(Callback):
    """Unfreezes what the run's optimizer does not know."""

    def on_step_end(self, trainer: Trainer, step: int, loss: float) -> None:
        set_trainable(trainer.model, "denseblock4")


def watched(output: Path, callback: Callback) -> Trainer:
    """Return the training of a head, with pixels enough for three steps, that is watched."""
    split = split_by_patient(
        SyntheticChestXray(20, image_size_px=64, sources=("a",)), test=0, find_copies=False
    )
    config = TrainingConfig(
        batch_size=2,
        samples_per_epoch=6,
        preprocess=Preprocess(size_px=32),
        precision="float32",
        device="cpu",
        progress=False,
    )
    model = build_densenet121(False, "head")
    return Trainer(model, split.train, split.val, config, output=output, callbacks=[callback])


def test_a_callback_that_looks_at_predictions_moves_nothing_that_is_frozen(tmp_path: Path) -> None:
    trainer = watched(tmp_path / "run", _Look())
    before = to_tensors(trainer.model.features)
    with pytest.raises(_SeenError):
        trainer.fit()
    after = to_tensors(trainer.model.features)
    assert [name for name in before if not np.array_equal(before[name], after[name])] == []


def test_a_callback_cannot_unfreeze_what_would_not_train(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"denseblock4\..* was unfrozen or replaced amid a run"):
        watched(tmp_path / "run", _Unfreeze()).fit()


def test_whatever_fails_inside_a_backend_is_told_as_such() -> None:
    options = TrainingConfig(compile_backend="inductor")
    network: Any = SimpleNamespace(_model=None, _config=options)
    failed = InductorError(OSError("No working C++ compiler found"), None)
    with (
        pytest.raises(TrainingError, match=r"'inductor' does not work here: .*No working C\+\+"),
        TrainingNetwork.computing(network),
    ):
        raise failed
    with pytest.raises(RuntimeError, match=r"^size mismatch$"), TrainingNetwork.computing(network):
        raise RuntimeError("size mismatch")
