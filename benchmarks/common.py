"""What the benchmarks share: where results go, and on what machine they were made."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from chestxray_covid.engine_torch import native_bfloat16

RESULTS = Path(__file__).parent / "results"
#: Whose versions matter, where they are installed.
PACKAGES = (
    *("torch", "torchvision", "numpy", "openvino", "onnxruntime", "nncf"),
    *("timm", "transformers", "monai", "torchxrayvision"),
)
#: What decides how fast a network is computed: not every processor of a name has each of them.
UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16")


def machine() -> dict[str, Any]:
    """Return processor, threads and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    known = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    return {
        "processor": known.get("model name", platform.processor()),
        "units": [name for name in UNITS if name in known.get("flags", "").split()],
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "native_bfloat16": native_bfloat16(torch.device("cpu")),
        "versions": {name: version(name) for name in PACKAGES if find_spec(name)}
        | {"pillow": version("pillow")},
    }


def named_by_processor(name: str) -> str:
    """Return the name of a result that depends on whether bfloat16 is fast, and how fast.

    The name alone is that of a processor with AMX.
    """
    found = machine()
    if not found["native_bfloat16"]:
        return f"{name}_float32"
    return name if "amx_bf16" in found["units"] else f"{name}_no_amx"


def write(name: str, result: dict[str, Any]) -> None:
    """Write one benchmark's numbers and the machine they are from, and show them."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**result, "machine": machine()}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)
