from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import openvino
import pytest
import torch

from chestxray_covid import engine_openvino, engine_torch
from chestxray_covid.engine_torch import native_bfloat16
from chestxray_covid.processor import slow_bfloat16

INTEL, AMD = "vendor_id\t: GenuineIntel\n", "vendor_id\t: AuthenticAMD\n"


@pytest.mark.parametrize(
    ("description", "slow"),
    [
        (INTEL + "flags\t\t: fpu avx512f avx512_bf16 avx512_fp16\n", True),
        (INTEL + "flags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile\n", False),
        (INTEL + "flags\t\t: fpu avx512f\n", False),
        (AMD + "flags\t\t: fpu avx512f avx512_bf16\n", False),
        ("Features\t: fp asimd bf16\n", False),
        ("", False),
    ],
)
def test_bfloat16_without_the_unit_for_it_is_slow(
    tmp_path: Path, description: str, slow: bool
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\n" + description)
    assert slow_bfloat16(file) is slow


def test_without_a_description_nothing_is_known(tmp_path: Path) -> None:
    assert slow_bfloat16(tmp_path / "cpuinfo") is False


def test_a_slow_bfloat16_is_not_taken_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(engine_torch, "slow_bfloat16", lambda: False)
    assert native_bfloat16(cpu)
    monkeypatch.setattr(engine_torch, "slow_bfloat16", lambda: True)
    assert not native_bfloat16(cpu)


def test_openvino_is_not_asked_for_a_slow_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    core = SimpleNamespace(get_property=lambda *names: openvino.Type.bf16)
    monkeypatch.setattr(engine_openvino, "openvino_core", lambda: core)
    monkeypatch.setattr(engine_openvino, "slow_bfloat16", lambda: False)
    assert engine_openvino.native_precision() == "bfloat16"
    monkeypatch.setattr(engine_openvino, "slow_bfloat16", lambda: True)
    assert engine_openvino.native_precision() == "float32"
