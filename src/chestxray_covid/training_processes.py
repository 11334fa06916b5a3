"""The processes of a run: how they are connected, and that they end cleanly."""

from __future__ import annotations

import atexit
import gc
import os
import zlib
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from chestxray_covid.engine_torch import accelerator_type, check_forked, first_process
from chestxray_covid.errors import TrainingError
from chestxray_covid.training_config import TrainingConfig

#: How long processes wait for one of them, which may fill a cache or validate meanwhile: longer
#: than torch's ten minutes on GPUs, thirty on CPUs. Where one dies, its launcher ends the others.
_PATIENCE = timedelta(days=1)


def open_accelerator(config: TrainingConfig, output: Path) -> Accelerator:
    """Return what places, distributes and gathers; the precision is the config's alone.

    Raises:
        TrainingError: If it was set up for another device in this process, or if the processes
            would write into different run directories.
        ForkedError: If torch would wait for threads that a fork has left behind.
    """
    connected = _is_connected()
    # Accelerate connects processes on CPUs only where it is told that they are on CPUs; and then
    # also those of MPI or Slurm, which nobody asked it to, for want of a launcher's variable.
    # Where there is nothing else, it takes the CPU untold.
    launched, kind = "LOCAL_RANK" in os.environ, accelerator_type()
    # Nothing connects processes on the GPU of a Mac: each would take itself for the only one.
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    apart = ("cpu", "mps") if several else ("cpu",)
    on_cpu = (config.device == "cpu" and kind != "cpu") or (launched and kind in apart)
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        )
    except ValueError as error:
        raise TrainingError(
            f"Accelerate is set up differently in this process already: {error} "
            "It can be set up once per process; start another for this run."
        ) from error
    check_forked(first_process(), accelerator.device)
    if _is_connected() and not connected:  # else it is of an earlier run, or the caller's own
        atexit.register(_disconnect, os.getpid())
    name = torch.tensor([zlib.crc32(os.fsencode(output))], device=accelerator.device)
    if len(accelerator.gather(name).unique()) > 1:
        raise TrainingError(
            f"The processes have different run directories, this one {output}; the first writes "
            "what all of them read. Give all the same one, for example output= of cross_validate; "
            "leave_one_source_out with a TrainingConfig needs a single process."
        )
    return accelerator


def _is_connected() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _disconnect(process: int) -> None:
    """End Gloo's threads: Python aborts if one frees a tensor as it ends.

    NCCL has no such threads, and to end it may take for ever where a process failed.
    """
    if os.getpid() != process or not _is_connected():  # a forked process has not these threads
        return
    if torch.distributed.get_backend() == "gloo":
        gc.collect()  # networks in cycles, which would keep them
        torch.distributed.destroy_process_group()
