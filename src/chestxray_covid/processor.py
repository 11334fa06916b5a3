"""What there is to know of the processor before a number format is chosen."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

_DESCRIPTION = Path("/proc/cpuinfo")


def slow_bfloat16(description: Path = _DESCRIPTION) -> bool:
    """Return whether the processor has bfloat16, but is no faster in it than in float32.

    So are Intel's with AVX512-BF16 and without AMX, as virtual machines show them that hide it.
    Measured on two cores of one (Xeon, family 6, model 207; OpenVINO 2026.4.1, torch 2.14.1): 43
    images/s of 192 px in bfloat16 and 66 in float32; a step of training at 224 px, 7.0 and 8.3.

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
