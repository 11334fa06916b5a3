"""Options of a training run, and what can be hooked into it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self, get_args, get_type_hints

from chestxray_covid.augment import Augmentation, as_count, as_number
from chestxray_covid.datasets.report import brief
from chestxray_covid.errors import ConfigError, first_of
from chestxray_covid.files import expanded
from chestxray_covid.image import Preprocess

if TYPE_CHECKING:
    from chestxray_covid.training import Trainer
    from chestxray_covid.training_history import EpochRecord, History

_SWITCHES = (
    *("class_weights", "channels_last", "progress", "within_sources"),
    *("allow_confounded_sources", "gradient_checkpointing"),
)
_SHARES = ("label_smoothing", "ema_decay", "swap_background", "swap_frame", "hide_centre")
_NUMBERS = ("learning_rate", "weight_decay", "warmup_epochs", "step_factor", "mixup", *_SHARES)
_NESTED = ("preprocess", "augmentation")
_COUNTS = ("epochs", "accumulate", "step_epochs", "workers", "seed")
#: What these may be instead of a number.
_INSTEAD = {
    "batch_size": "auto",
    **dict.fromkeys(("max_repeats", "samples_per_epoch", "patience", "checkpoint_every")),
    "clip_norm": None,
}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Options of a training run; the defaults are the recommended recipe.

    Attributes:
        preprocess: From image to pixels; travels with the checkpoint.
        augmentation: How training images are varied.
        epochs: Number of passes, at least 1.
        batch_size: Images per process and step, or ``"auto"`` for the largest power of two that
            fits: into the GPU's memory, or into half of the machine's. That may be nearly an epoch;
            a :class:`TrainingWarning` says where few steps are left.
        accumulate: Batches per optimizer step.
        samples_per_epoch: Images drawn per epoch; ``None`` draws as many as there are.
        optimizer: ``"adamw"`` (Loshchilov & Hutter 2019), ``"adam"``, or ``"sgd"`` with a momentum
            of 0.9.
        learning_rate: Largest learning rate.
        weight_decay: Decoupled for ``adamw``, else added to the gradient.
        clip_norm: Largest norm of a step's gradient, over all weights that train: one that is
            longer is scaled down to it (Pascanu, Mikolov & Bengio, ICML 2013). ``None`` leaves it
            as it is.
        schedule: ``"cosine"`` falls to 0 over the run, ``"step"`` multiplies by ``step_factor``
            every ``step_epochs``.
        warmup_epochs: Epochs over which the rate rises linearly from 0; may be a fraction, and is
            at most a fifth of the run.
        step_epochs: See ``schedule``.
        step_factor: See ``schedule``.
        label_smoothing: Share of the target spread over all classes, in [0, 1); with
            ``within_sources`` over the source's, by what each has of the source.
        balance: How images are drawn. ``"class_and_source"``: every class as often as another, and
            within a class every source; ``"class"``: classes only; ``"none"``: each image once.
            The first two draw with replacement, as often on average: an epoch does not show every
            image, and others several times.
        max_repeats: How often an image may come in an epoch, on average, so that the sources of a
            class are balanced; a small one then gets less than an equal share. With
            ``balance="class_and_source"`` only. ``None``: as often as it takes. Classes stay
            balanced all the same: where all sources of one are too small for its share, its
            images come as often as that takes, each as often as another.
        swap_background: Share of the training images, in [0, 1), whose lungs are shown before
            something else, see :func:`augment.swap_backgrounds`; the bundled network finds them.
        swap_frame: Share of the training images, in [0, 1), that get the frame of another one of
            their batch, see :func:`augment.swap_frames`.
        hide_centre: Share of the training images, in [0, 1), whose centre is hidden and whose
            target becomes uniform, so that the frame alone is learned to say nothing; see
            :func:`augment.hide_centres`.
        mixup: Blend each training image and its target with another one of its batch, in shares
            from Beta(mixup, mixup), up to 100; 0.1 to 0.4 are usual, 0 blends nothing. See
            :func:`augment.mix_up`.
        within_sources: Let the loss compare only what the source of an image leaves open:
            log P(class | source), as images are drawn, is added to the logits, and a class that
            the source does not hold is left out, so that it is not trained on these images.
            Knowing how often a source shows a class gains nothing then. Validation and answers are
            without it, so that ``monitor="last"`` fits. It is the bias product of Clark et al.
            (EMNLP 2019) with the source for a bias, see :func:`training_order.told_by_sources`. A
            source of one class teaches nothing then, and every two classes need a source that
            holds both, or a chain of such.
        class_weights: Weigh the loss by inverse class frequency; with ``balance="none"`` only.
        ema_decay: Decay of the exponential moving average of the weights per step, in [0, 1);
            0 keeps none. With one, it is what is validated and saved. It reaches back over about
            1 / (1 - decay) steps, which should be far fewer than the run has: the weights of the
            first step keep a share of decay ** (steps - 1) in it.
        monitor: What chooses the epoch: the lowest ``"val_loss"``, the highest ``"val_auroc"`` (the
            lowest loss where validation data lack a class, which warns: there is no AUROC), or
            ``"last"``, the end of the schedule whatever the validation says.
        patience: Epochs without improvement after which training stops; ``None`` never stops, nor
            does ``monitor="last"``, for which every epoch is an improvement.
        precision: ``"bfloat16"`` (autocast), ``"float32"``, or ``"auto"``: bfloat16 where the
            processor or GPU is faster in it; a run stays with its own, wherever it goes on.
        device: ``"auto"`` takes a GPU where there is one, or ``"cpu"``.
        compile_backend: Backend of ``torch.compile``, such as ``"inductor"``, for the step of
            training; ``None``: nothing. Measure whether it pays: launching may take longer.
        gradient_checkpointing: Compute dense layers a second time for the gradient instead of
            keeping what is between their convolutions: less memory, more time, the same weights.
        channels_last: Keep images and weights in channels-last order, which is faster.
        workers: Threads that decode.
        cache_dir: Folder for decoded pixels, so that later epochs need not decode; ``None``: none.
        checkpoint_every: Steps between saved states, besides one per epoch; ``None``: only those.
        allow_confounded_sources: Do not warn where the source of the training images all but gives
            their label, because you know.
        seed: Of data order, augmentation and nothing global.
        progress: Show progress bars.

    Raises:
        ValueError: If a value is impossible.
        TypeError: If it is of the wrong type.
    """

    preprocess: Preprocess = field(default_factory=Preprocess)
    augmentation: Augmentation = field(default_factory=Augmentation)
    epochs: int = 15
    batch_size: int | Literal["auto"] = 16
    accumulate: int = 1
    samples_per_epoch: int | None = None
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    clip_norm: float | None = None
    schedule: Literal["cosine", "step"] = "cosine"
    warmup_epochs: float = 1.0
    step_epochs: int = 7
    step_factor: float = 0.1
    label_smoothing: float = 0.05
    balance: Literal["class_and_source", "class", "none"] = "class_and_source"
    max_repeats: float | None = None
    swap_background: float = 0.0
    swap_frame: float = 0.0
    hide_centre: float = 0.0
    mixup: float = 0.0
    within_sources: bool = False
    class_weights: bool = False
    ema_decay: float = 0.0
    monitor: Literal["val_loss", "val_auroc", "last"] = "val_loss"
    patience: int | None = 8
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu"] = "auto"
    compile_backend: str | None = None
    gradient_checkpointing: bool = False
    channels_last: bool = True
    workers: int = 2
    cache_dir: str | os.PathLike[str] | None = None
    checkpoint_every: int | None = None
    allow_confounded_sources: bool = False
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.cache_dir is not None:
            place = os.fspath(self.cache_dir)
            if not (isinstance(place, str) and place):
                raise TypeError(f"cache_dir must be a path of text or None, got {place!r}")
            expanded(self.cache_dir)  # which refuses an address
            object.__setattr__(self, "cache_dir", place)
        for name, kind in (("preprocess", Preprocess), ("augmentation", Augmentation)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be {kind.__name__}, got {getattr(self, name)!r}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in (*_NUMBERS, *_COUNTS, *_INSTEAD):
            value = getattr(self, name)
            if name not in _INSTEAD or value != _INSTEAD[name]:
                real = name in (*_NUMBERS, "max_repeats", "clip_norm")
                convert = as_number if real else as_count
                object.__setattr__(self, name, convert(name, value))
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm must be positive, or None, got {self.clip_norm}")
        if not 0 <= self.mixup <= 100:
            raise ValueError(f"mixup must be in [0, 100], got {self.mixup}")
        for name in ("weight_decay", "warmup_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in _SHARES:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.max_repeats is not None and not 1 <= self.max_repeats < math.inf:
            raise ValueError(
                f"max_repeats must be finite and at least 1, or None, got {self.max_repeats}"
            )
        if self.max_repeats is not None and self.balance != "class_and_source":
            raise ValueError(
                f"max_repeats limits how sources are balanced, which balance={self.balance!r} does "
                'not do. Leave it out, or use balance="class_and_source".'
            )
        if self.class_weights and self.balance != "none":
            raise ValueError(
                f"class_weights would correct a second time what balance={self.balance!r} does. "
                'Use class_weights=True with balance="none".'
            )
        if self.class_weights and self.hide_centre:
            raise ValueError(
                "class_weights cannot weigh images with a hidden centre, which are of no class. "
                "Use balance= with hide_centre."
            )
        if self.class_weights and self.within_sources:
            raise ValueError(
                "class_weights would move what within_sources adds of the classes as they are "
                "drawn. Use balance= with within_sources."
            )
        if self.mixup and (self.class_weights or self.within_sources):
            other = "class_weights" if self.class_weights else "within_sources"
            raise ValueError(
                f"mixup blends images whatever their class and source, which {other} weighs or "
                f"compares one by one. Use mixup=0, or {other}=False."
            )
        if not 0 < self.step_factor <= 1:
            raise ValueError(f"step_factor must be in (0, 1], got {self.step_factor}")
        if self.compile_backend is not None and self.compile_backend not in _backends():
            raise ValueError(
                "compile_backend must be a backend of torch.compile "
                f"({', '.join(_backends())}), or None, got {self.compile_backend!r}"
            )
        if self.compile_backend is not None and self.gradient_checkpointing:
            raise ValueError(
                "compile_backend and gradient_checkpointing cannot be used together: what is "
                "computed a second time would move batch norms otherwise. Use one of them."
            )
        hints = get_type_hints(type(self))
        for name in ("optimizer", "schedule", "balance", "monitor", "precision", "device"):
            allowed = get_args(hints[name])
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")

    @classmethod
    def baseline(cls, **changes: Any) -> Self:
        """Return the classic recipe of the notebooks that this field began with.

        150 px, batch 8, Adam 1e-3, the rate falling to a tenth every 7 epochs, cross-entropy,
        rotation ±10°, horizontal flip with probability 0.4, 10 epochs, the weights of the lowest
        validation loss.

        Args:
            **changes: Fields that shall differ.
        """
        augmentation = Augmentation(
            rotation_deg=10.0,
            horizontal_flip=0.4,
            crop_min=1,
            gamma=1,
            contrast=1,
            brightness=0,
            blur=0,
            noise=0,
        )
        classic: dict[str, Any] = {
            "preprocess": Preprocess(size_px=150),
            "augmentation": augmentation,
            "epochs": 10,
            "batch_size": 8,
            "optimizer": "adam",
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "schedule": "step",
            "warmup_epochs": 0.0,
            "label_smoothing": 0.0,
            "balance": "none",
            "patience": None,
        }
        return cls(**{**classic, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["preprocess"] = self.preprocess.to_dict()
        data["augmentation"] = self.augmentation.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: Any, *, base: Self | None = None) -> Self:
        """Return the options that :meth:`to_dict` described.

        Args:
            data: All of them, or some, also within ``preprocess`` and ``augmentation``.
            base: Has those that ``data`` leaves out; the recommended recipe if not given.

        Raises:
            ConfigError: If an option is unknown, of a wrong type or impossible.

        >>> TrainingConfig.from_dict({"epochs": 3, "augmentation": {"blur": 0}}).epochs
        3
        """
        base = cls() if base is None else base
        given = _known(data, base)
        inner = {n: _known(given[n], getattr(base, n)) for n in _NESTED if n in given}
        try:
            made: dict[str, Any] = {n: replace(getattr(base, n), **inner[n]) for n in inner}
            return replace(base, **{**given, **made})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"An option is impossible: {error}") from error

    def rate_at(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of an optimizer step, numbered from 0."""
        warmup = min(self.warmup_epochs, self.epochs / 5) * steps_per_epoch
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        if self.schedule == "step":
            fallen: float = self.step_factor ** (step // steps_per_epoch // self.step_epochs)
            return self.learning_rate * fallen
        total = self.epochs * steps_per_epoch
        share = (step - warmup) / max(1.0, total - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def _known(data: Any, options: Any) -> dict[str, Any]:
    """Return data that name fields of such options alone, as a dict of its own."""
    kind = type(options).__name__
    if not isinstance(data, Mapping):
        raise ConfigError(f"{kind} takes an object of names and values, got {brief(repr(data))}")
    if unknown := sorted(set(map(str, data)) - {f.name for f in fields(options)}):
        raise ConfigError(f"{kind} has no option named {first_of(unknown)}")
    return dict(data)


def _backends() -> list[str]:
    import torch

    return list(torch.compiler.list_backends(exclude_tags=()))


class Callback:
    """What a run calls while it trains; override what is of use.

    The network may be looked at; a part of it that is unfrozen would not train, and is a
    :class:`TrainingError`.
    """

    def on_train_begin(self, trainer: Trainer) -> None:
        """Run before the first step, also of a resumed run."""

    def on_step_end(self, trainer: Trainer, step: int, loss: float) -> None:
        """Run after each optimizer step, numbered from 1, with the epoch's mean loss so far.

        A GPU is still computing the step's own loss, which is not in it.
        """

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> bool | None:
        """Run after each validation; return ``True``, in any process, to stop training."""

    def on_train_end(self, trainer: Trainer, history: History) -> None:
        """Run after the last epoch."""
