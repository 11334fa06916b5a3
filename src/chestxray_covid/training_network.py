"""The network while it trains: forward pass, optimizer, average, and all of it as tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torchvision
from accelerate import Accelerator
from accelerate.utils import broadcast
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from chestxray_covid.augment import hide_centres, mix_up, swap_backgrounds, swap_frames
from chestxray_covid.engine_torch import native_bfloat16
from chestxray_covid.errors import TrainingError
from chestxray_covid.lung_maps import WEIGHTS
from chestxray_covid.lung_network import LungNetwork
from chestxray_covid.lungs import load_network, near_lungs
from chestxray_covid.models import (
    check_moved,
    load_tensors,
    normalise,
    set_training_mode,
    to_array,
    to_tensors,
)
from chestxray_covid.training_config import TrainingConfig
from chestxray_covid.training_loss import TrainingLoss, Varied
from chestxray_covid.training_memory import (
    PASSING_BYTES,
    gradient_checkpointing,
    largest_batch_size,
    warn_of_few_steps,
)
from chestxray_covid.training_speed import faster_on_cpu
from chestxray_covid.transforms import to_device

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


def check_smallest_batch(model: torchvision.models.DenseNet, config: TrainingConfig) -> None:
    """Raise if batches of one image cannot do what the options ask for.

    They have no neighbour for swaps to take from; and where the last block's maps are of one pixel,
    below 61 px, batch norm would have to make statistics of one number.

    Raises:
        ValueError: If they cannot, with the option to change.
    """
    size = config.preprocess.size_px
    options = [n for n in ("batch_size", "samples_per_epoch") if getattr(config, n) == 1]
    swaps = [n for n in ("swap_frame", "swap_background", "mixup") if getattr(config, n)]
    if options and swaps:
        raise ValueError(
            f"{options[0]} must be at least 2 with {swaps[0]}, got 1: an image takes from another "
            f"one of its batch. Use larger batches, or {swaps[0]}=0."
        )
    last = [*model.features.denseblock4.modules(), model.features.norm5]
    norms = [module for module in last if isinstance(module, torch.nn.BatchNorm2d)]
    trains = any(p.requires_grad for norm in norms for p in norm.parameters())
    if options and trains and math.ceil(size / 4) // 8 == 1:
        raise ValueError(
            f"{options[0]} must be at least 2, got 1: batch norm has no statistics of a single "
            f"image of {size} px. Use more images, larger ones (from 61 px), or trainable='head'."
        )


class TrainingNetwork:
    """A network with its optimizer on the run's device, in the run's precision.

    Args:
        model: Trained in place.
        config: Options of the run.
        accelerator: Places, distributes and gathers.
        targets: ``(N,)`` classes of the training images, for class weights.
    """

    def __init__(
        self,
        model: torchvision.models.DenseNet,
        config: TrainingConfig,
        accelerator: Accelerator,
        targets: Sequence[int],
    ) -> None:
        self._model = model
        self._config = config
        self._accelerator = accelerator
        self.device: torch.device = accelerator.device
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        if accelerator.num_processes > 1 and self.device.type == "cuda":
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        # The optimizer stays plain: Accelerate's own skips steps whenever another loop of this
        # process stopped amid its accumulation, which the two would share.
        self._net = accelerator.prepare(model)
        self._optimizer = _OPTIMIZERS[config.optimizer](
            self._trained,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            # Its kernels trust that weight, gradient and state have one layout, which autograd sees
            # to. A CPU gains a little, a GPU more.
            fused=self.device.type in ("cpu", "cuda"),
        )
        # Validation stays as it is: its last batch is smaller, and would be compiled again.
        self._forward = (
            self._net
            if config.compile_backend is None
            else torch.compile(self._net, backend=config.compile_backend, dynamic=False)
        )
        self._average: AveragedModel | None = None
        if config.ema_decay:
            self._average = AveragedModel(model)
            self._means, self._mean_counts = _tensors(self._average.module)
            self._current, self._counts = _tensors(model)
        self._lungs: LungNetwork | None = (
            load_network(WEIGHTS).to(self.device) if config.swap_background else None
        )
        self._weights = self._balanced(targets) if config.class_weights else None
        self.class_weights = None if self._weights is None else self._weights.to(self.device)
        self._loss = TrainingLoss(config, self.class_weights)
        native = config.precision == "auto" and native_bfloat16(self.device)
        self.bfloat16 = native or config.precision == "bfloat16"

    def _balanced(self, targets: Sequence[int]) -> Tensor:
        """Return N / (K · n_k) for each class, as scikit-learn's ``class_weight="balanced"``."""
        counts = np.bincount(targets, minlength=self._model.classifier.out_features)
        weights = counts.sum() / (len(counts) * counts)
        return torch.tensor(weights, dtype=torch.float32, device="cpu")

    @property
    def best(self) -> torchvision.models.DenseNet:
        """What is validated and saved: the average if one is kept, else the network itself."""
        chosen: torchvision.models.DenseNet = (
            self._model if self._average is None else self._average.module
        )
        return chosen

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute as the run asks while this is entered, and with a GPU's fastest convolutions."""
        cudnn, config = torch.backends.cudnn, self._config
        before = cudnn.benchmark
        with torch.enable_grad(), ExitStack() as ways:
            if config.gradient_checkpointing:
                ways.enter_context(gradient_checkpointing(self._model))
            if config.compile_backend is None and self.device.type == "cpu":
                ways.enter_context(faster_on_cpu(self._model, self.best))
            try:
                cudnn.benchmark = before or not cudnn.deterministic
                yield
            except RuntimeError as error:
                backend = config.compile_backend
                kinds = (kind.__module__ for kind in type(error).__mro__)
                if backend is None or "torch._dynamo.exc" not in kinds:
                    raise
                raise TrainingError(
                    f"compile_backend={backend!r} does not work here: {error}. Use another or None."
                ) from error
            finally:
                cudnn.benchmark = before

    def close(self) -> None:
        """Let go of optimizer and average, and of what would keep processes connected."""
        if self._average is not None:
            self._average = None
            del self._means, self._mean_counts, self._current, self._counts
        del self._net, self._forward, self._optimizer

    def largest_batch(self, images: int) -> int:
        """Return the largest batch that fits in every process, for an epoch of so many images."""
        self.train()
        with self.computing():
            found = largest_batch_size(
                self._model,
                self.forward,
                size_px=self._config.preprocess.size_px,
                limit=images // self._accelerator.num_processes,
                passing_bytes=PASSING_BYTES,
            )
        size = int(self._accelerator.gather(torch.tensor([found], device=self.device)).min())
        if self._accelerator.is_main_process:
            together = size * self._accelerator.num_processes
            warn_of_few_steps(together, images, self._config, stacklevel=5)  # of who calls fit
        return size

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return each value's sum over the processes, exactly as it is where there is one."""
        if self._accelerator.num_processes == 1:
            return list(values)
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        total: list[float] = self._accelerator.reduce(own, "sum").tolist()
        return total

    def greatest(self, value: int) -> int:
        """Return the greatest of the processes' values, without asking where there is one."""
        if self._accelerator.num_processes == 1:
            return value
        own = torch.tensor([value], device=self.device)
        return int(self._accelerator.gather(own).max())

    def unite(self) -> None:
        """Give all processes the batch-norm statistics of the first, whose network is saved."""
        if self._accelerator.num_processes > 1:
            # Not the average's own count: it lies on the CPU, where GPUs do not communicate.
            nets = [self._model] if self._average is None else [self._model, self.best]
            for statistics in (b for net in nets for b in net.buffers()):
                broadcast(statistics)

    def train(self) -> None:
        """Put what trains in training mode, without a gradient that others left."""
        check_moved(self._model, self._optimizer)
        self._model.zero_grad()
        set_training_mode(self._model)

    def vary(self, images: Tensor, epoch: int, draws: Sequence[int]) -> Varied:
        """Return augmented pixels, with what their targets are made of.

        Args:
            images: ``(N, 1, S, S)`` uint8.
            epoch: Epoch, from 0.
            draws: ``(N,)`` numbers that identify each sample and its repetition.
        """
        stream: dict[str, Any] = {"seed": self._config.seed, "epoch": epoch, "draws": draws}
        varied = self._config.augmentation(images, **stream)
        if self._lungs is not None:
            lungs = near_lungs(self._lungs, varied)
            varied = swap_backgrounds(varied, lungs, self._config.swap_background, **stream)
        varied = swap_frames(varied, self._config.swap_frame, **stream)
        own = None
        if self._config.mixup:
            varied, own = mix_up(varied, self._config.mixup, **stream)
        return Varied(*hide_centres(varied, images, self._config.hide_centre, **stream), own)

    def weight_of(self, targets: Sequence[int]) -> float:
        """Return what images of these classes count for together; without weights, one each."""
        if self._weights is None:
            return len(targets)
        return float(self._weights[list(targets)].sum())

    def backward(
        self,
        varied: Varied,
        targets: Sequence[int],
        *,
        counted: int,
        share: float,
        last: bool,
        told: NDArray[np.float32] | None = None,
    ) -> Tensor:
        """Add the gradient of one batch and return the sum of its losses, ``()`` on the device.

        Args:
            varied: From :meth:`vary`.
            targets: ``(N,)`` classes.
            counted: How many images have a loss, the first ones.
            share: What the sum of losses is multiplied with.
            last: Whether it is the step's last, after which processes take their gradients' mean.
            told: ``(N, K)``, see :func:`told_by_sources`; ``None`` compares all classes.
        """
        classes = to_device(np.array(targets, np.int64), self.device)
        shares = None if told is None else to_device(told, self.device)
        with nullcontext() if last else self._accelerator.no_sync(self._net):
            logits = self.forward(self._forward, varied.pixels)
            losses = self._loss(logits, classes, varied, shares)
            loss = losses[:counted].sum()
            # Accelerate's own would divide by what the environment says of accumulation.
            torch.autograd.backward(loss * share)
        return loss.detach()

    def step(self, rate: float) -> None:
        """Move the weights with the gradient added so far, at this learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if self._config.clip_norm is not None:  # the gradient is that of all processes by now
            torch.nn.utils.clip_grad_norm_(self._trained, self._config.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._move_average(self._average)

    @torch.no_grad()
    def _move_average(self, average: AveragedModel) -> None:
        """Do as ``AveragedModel.update_parameters`` does, which waits for a GPU at every step."""
        # It begins with the weights of the first step.
        share = 1 - self._config.ema_decay if average.n_averaged else 1.0
        torch._foreach_lerp_(self._means, self._current, share)
        torch._foreach_copy_(self._mean_counts, self._counts)
        average.n_averaged += 1

    def forward(self, net: Any, pixels: Tensor) -> Tensor:
        """Return ``(N, K)`` float32 logits of ``(N, 1, S, S)`` pixels in [0, 255]."""
        images = normalise(pixels, self._config.preprocess)
        if self._config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits: Tensor = net(images)
        return logits.float()

    def predict(
        self,
        pixels: Iterator[Tensor],
        *,
        total: int,
        bar: Any,
        check: Callable[[], None],
    ) -> Tensor:
        """Return ``(total, K)`` float64 logits on the CPU, from what is validated, in order.

        Args:
            pixels: Batches of this process: every so-manieth image, as many as there are processes.
            total: Images of all processes.
            bar: Told how many are done.
            check: Called after each batch.
        """
        net, accelerator = self.best.eval(), self._accelerator
        logits = [torch.zeros((0, self._model.classifier.out_features), device=self.device)]
        with torch.inference_mode():
            for images in pixels:
                logits.append(self.forward(net, images))
                bar.update(len(images))
                check()
        # Processes hold rows in turn; the shortest one's missing last row is padding.
        padded = accelerator.pad_across_processes(torch.cat(logits))
        shares = accelerator.gather(padded).cpu().double().chunk(accelerator.num_processes)
        return torch.stack(shares, 1).flatten(0, 1)[:total]

    def state(self) -> dict[str, NDArray[Any]]:
        """Return weights, average and optimizer state."""
        tensors = {f"model.{k}": v for k, v in to_tensors(self._model).items()}
        if self._average is not None:
            tensors |= {f"average.{k}": v for k, v in to_tensors(self._average).items()}
        for i, values in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": to_array(v) for k, v in values.items()}
        return tensors

    def load_state(self, tensors: dict[str, NDArray[Any]]) -> None:
        """Take over what :meth:`state` returned; the next step is bit for bit the same."""
        load_tensors(self._model, _below(tensors, "model."))
        if self._average is not None:
            load_tensors(self._average, _below(tensors, "average."))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _below(tensors, "optimizer.").items():
            index, key = name.split(".", 1)
            own = torch.from_numpy(value.copy())
            # Fused kernels expect the layout of the weights that the values belong to.
            weight = self._trained[int(index)]
            state.setdefault(int(index), {})[key] = (
                torch.empty_like(weight).copy_(own) if own.shape == weight.shape else own
            )
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


def _tensors(module: torch.nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights and statistics, and counts: all that is no floating-point number."""
    tensors = [t.detach() for t in (*module.parameters(), *module.buffers())]
    floats = [t for t in tensors if t.is_floating_point()]
    return floats, [t for t in tensors if not t.is_floating_point()]


def _below(tensors: dict[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
