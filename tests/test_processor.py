from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace

import openvino
import pytest
import torch

from chestxray_covid import Classifier, engine_openvino, engine_torch, processor
from chestxray_covid.engine_torch import native_bfloat16
from chestxray_covid.processor import cores, memory_limit, quota, slow_bfloat16

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


# How much of it there is


def test_the_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "quota", lambda: None)
    if hasattr(os, "sched_getaffinity"):
        assert cores() == len(os.sched_getaffinity(0))
        monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1
    monkeypatch.setattr(processor, "quota", lambda: 3)
    assert cores() == 3


V1, V2 = "4:memory:/\n2:cpu,cpuacct:{}\n0::/elsewhere\n", "0::{}\n"
QUOTA, PERIOD = "cpu/{}cpu.cfs_quota_us", "cpu/{}cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2.format("/"), {"cpu.max": "200000 100000\n"}, 2),
        (V2.format("/"), {"cpu.max": "150000 100000\n"}, 2),
        (V2.format("/"), {"cpu.max": "5000 100000\n"}, 1),
        (V2.format("/"), {"cpu.max": "max 100000\n"}, None),
        (V2.format("/"), {"cpu.max": "6400000 100000\n"}, None),
        (V2.format("/"), {"cpu.max": "6350000 100000\n"}, None),
        (V2.format("/"), {}, None),
        # Of a service, and of the slice around it; a container that sees the machine's names.
        (V2.format("/a/b"), {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "30000 10000\n"}, 3),
        (V2.format("/a/b"), {"a/b/cpu.max": "20000 10000\n", "a/cpu.max": "30000 10000\n"}, 2),
        (V2.format("/pod/of/the/machine"), {"cpu.max": "300000 100000\n"}, 3),
        (V2.format("/../other"), {"cpu.max": "300000 100000\n"}, 3),
        (V1.format("/"), {QUOTA.format(""): "400000\n", PERIOD.format(""): "100000\n"}, 4),
        (V1.format("/pod/x"), {QUOTA.format(""): "400000\n", PERIOD.format(""): "100000\n"}, 4),
        (V1.format("/x"), {QUOTA.format("x/"): "50000\n", PERIOD.format("x/"): "50000\n"}, 1),
        (V1.format("/"), {QUOTA.format(""): "-1\n", PERIOD.format(""): "100000\n"}, None),
        ("", {"cpu.max": "200000 100000\n"}, None),
        # Names are bytes; and what no Linux has said so far.
        (V2.format("/M\udcfcnchen"), {"M\udcfcnchen/cpu.max": "200000 100000\n"}, 2),
        (V2.format("/") + "\n", {"cpu.max": "200000 100000\n"}, 2),
        ("none", {"cpu.max": "200000 100000\n"}, None),
        (V2.format("/"), {"cpu.max": "200000 0\n"}, None),
    ],
)
def test_a_quota_leaves_so_many_cores(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: str,
    files: dict[str, str],
    expected: int | None,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert quota(*mounted(tmp_path, groups, files)) == expected


def mounted(folder: Path, groups: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Write what Linux says of control groups, and return where it says so."""
    (folder / "cgroup").write_bytes(os.fsencode(groups))
    for name, text in files.items():
        place = folder / "mounted" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return folder / "cgroup", folder / "mounted"


JOB, OLD = "/system.slice/job_7/step_0", "memory/{}memory.limit_in_bytes"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2.format("/"), {"memory.max": "8000000000\n"}, 8e9),
        (V2.format("/"), {"memory.max": "max\n"}, math.inf),
        (V2.format("/"), {}, math.inf),
        # Of a job of Slurm's, and of its step; of the slice around a service; of a container.
        (V2.format(JOB), {f"{JOB[1:]}/memory.max": "5000\n"}, 5000),
        (V2.format(JOB), {"system.slice/job_7/memory.max": "6000\n"}, 6000),
        (
            V2.format(JOB),
            {f"{JOB[1:]}/memory.max": "7000\n", "system.slice/memory.max": "6000\n"},
            6000,
        ),
        (V2.format("/pod/of/the/machine"), {"memory.max": "9000\n"}, 9000),
        (V1.format("/"), {OLD.format(""): "9223372036854771712\n"}, 9223372036854771712),
        ("4:memory:/job_7\n", {OLD.format("job_7/"): "5000\n", OLD.format(""): "6000\n"}, 5000),
        ("4:memory:/pod/x\n", {OLD.format(""): "6000\n"}, 6000),
        ("4:cpu:/\n", {OLD.format(""): "6000\n"}, math.inf),
    ],
)
def test_control_groups_leave_so_much_memory(
    tmp_path: Path, groups: str, files: dict[str, str], expected: float
) -> None:
    assert memory_limit(*mounted(tmp_path, groups, files)) == expected


def test_without_control_groups_there_is_no_quota_and_no_limit(tmp_path: Path) -> None:
    assert quota(tmp_path / "cgroup", tmp_path) is None
    assert memory_limit(tmp_path / "cgroup", tmp_path) == math.inf


def test_openvino_computes_in_as_many_threads_as_a_quota_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_openvino, "quota", lambda: 1)
    found = Classifier.from_pretrained(engine="openvino").engine
    options = found._options(streams=1)  # type: ignore[attr-defined]
    core = engine_openvino.openvino_core()
    ops = openvino.opset13
    pixels = ops.parameter([1, 1, 8, 8], openvino.Type.f32)
    compiled = core.compile_model(openvino.Model([ops.relu(pixels)], [pixels], "m"), "CPU", options)
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
