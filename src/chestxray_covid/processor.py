"""What there is to know of the processor before a number format is chosen."""

from __future__ import annotations

from pathlib import Path

_DESCRIPTION = Path("/proc/cpuinfo")


def slow_bfloat16(description: Path = _DESCRIPTION) -> bool:
    """Return whether the processor has bfloat16, but is no faster in it than in float32.

    So are Intel's with AVX512-BF16 and without AMX, as virtual machines show them that hide it:
    they start one product of bfloat16 in the time of two of float32. Measured on one (Xeon, family
    6, model 207): OpenVINO 43 images/s for 66, a training step 0.85 of the speed.

    Args:
        description: Linux's description of the processor. Where there is none, nothing is known:
            ``False``.
    """
    try:
        words = set(description.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return False
    return {"GenuineIntel", "avx512_bf16"} <= words and "amx_bf16" not in words
