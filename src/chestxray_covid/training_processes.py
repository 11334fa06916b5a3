"""The processes of a run: how they are connected, and that they end cleanly."""

from __future__ import annotations

import atexit
import gc

import torch
from accelerate import Accelerator

from chestxray_covid.errors import TrainingError
from chestxray_covid.training_config import TrainingConfig


def open_accelerator(config: TrainingConfig) -> Accelerator:
    """Return what places, distributes and gathers; the precision is the config's alone.

    Raises:
        TrainingError: If it was set up for another device in this process.
    """
    try:
        accelerator = Accelerator(cpu=config.device == "cpu", mixed_precision="no")
    except ValueError as error:
        raise TrainingError(
            f"Accelerate is set up differently in this process already: {error} "
            "It can be set up once per process; start another for this run."
        ) from error
    if accelerator.num_processes > 1:
        atexit.unregister(_disconnect)  # once, however many runs there are
        atexit.register(_disconnect)
    return accelerator


def _disconnect() -> None:
    """End the threads that connect processes: Python aborts if one frees a tensor as it ends."""
    gc.collect()  # networks in cycles, which would keep them
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
