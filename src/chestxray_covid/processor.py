"""How much of processor and memory there is, and what to know before a number format is chosen."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path, PurePosixPath

_DESCRIPTION = Path("/proc/cpuinfo")
_GROUPS, _MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cores() -> int:
    """Return how many cores this process may use, at least 1: see :func:`quota`."""
    return quota() or _cores_to_run_on()


def _cores_to_run_on() -> int:
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def quota(groups: Path = _GROUPS, mounted: Path = _MOUNTED) -> int | None:
    """Return how many cores a quota leaves, as of a container's ``--cpus``; ``None`` if all.

    With more threads than that, all of them stand still until the next period. Part of a core
    counts as one.

    Args:
        groups: As :func:`memory_limit`.
        mounted: As there.
    """
    old = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    found = min(
        (_share(*files) for files in _group_files("cpu", ("cpu.max",), old, groups, mounted)),
        default=math.inf,
    )
    return math.ceil(found) if found <= _cores_to_run_on() - 1 else None


def memory_limit(groups: Path = _GROUPS, mounted: Path = _MOUNTED) -> float:
    """Return how many bytes of memory are left to this process and its like; infinite if all.

    Args:
        groups: What Linux says of the control groups of this process. The limit of a group around
            them counts, too; in a container, where their names may be those of the machine, it is
            the only one that is seen.
        mounted: Where control groups are, of either version.
    """
    found = math.inf
    old = ("memory.limit_in_bytes",)
    for (file,) in _group_files("memory", ("memory.max",), old, groups, mounted):
        with suppress(OSError, ValueError):  # not there, or "max"
            found = min(found, int(file.read_text()))
    return found


def _group_files(
    kind: str, new: tuple[str, ...], old: tuple[str, ...], groups: Path, mounted: Path
) -> Iterator[list[Path]]:
    """Yield where each group of this process, and around it, says what it limits, if it does."""
    with suppress(OSError, ValueError):  # no Linux, or one that says it otherwise
        for line in os.fsdecode(groups.read_bytes()).splitlines():
            _, kinds, name = line.split(":", 2)
            own = PurePosixPath("/", name).relative_to("/")
            for group in (own, *own.parents):
                if not kinds:
                    yield [mounted / group / file for file in new]
                elif kind in kinds.split(","):
                    yield [mounted / kind / group / file for file in old]


def _share(*files: Path) -> float:
    """Return quota over period, in cores, from the files of a control group; infinite if none."""
    with suppress(OSError, ValueError, ZeroDivisionError):  # not there, or "max"
        limit, period = (int(n) for file in files for n in file.read_text().split())
        return limit / period if limit > 0 else math.inf  # -1 is none
    return math.inf


def slow_bfloat16(description: Path = _DESCRIPTION) -> bool:
    """Return whether the processor has bfloat16, but is no faster in it than in float32.

    So are Intel's with AVX512-BF16 and without AMX, as virtual machines show them that hide it.
    Measured on two cores of one (Xeon, family 6, model 207; OpenVINO 2026.4.1, torch 2.14.1): 43
    images/s of 192 px in bfloat16 and 66 in float32; a step of training at 224 px, 7.0 and 8.3.
    AMD's with AVX512-BF16 are faster in it: an EPYC by half and more, see ``docs/engines.md``.

    Args:
        description: Linux's description of the processor. Where there is none, nothing is known:
            ``False``.
    """
    try:
        with description.open(encoding="utf-8", errors="replace") as lines:  # the first core's
            words = set(" ".join(takewhile(str.strip, lines)).split())
    except OSError:
        return False
    return {"GenuineIntel", "avx512_bf16"} <= words and "amx_bf16" not in words
