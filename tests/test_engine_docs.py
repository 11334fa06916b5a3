from __future__ import annotations

import hashlib
import json
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from chestxray_covid.processor import slow_bfloat16

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "engines.md"


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import generate_engines

    return generate_engines  # type: ignore[no-any-return]


def measured() -> dict[str, Any]:
    """Return the result of a run that never took place."""
    rates = {"MONAI": 10.0, "OpenVINO, bfloat16": 80.04, "bare engine": 100.0}
    rates["OpenVINO, int8"] = 91.1
    found = {
        "files_per_s": rates,
        "peak_mib": {name: 7 * rate for name, rate in rates.items()},
        "fastest_engine": "OpenVINO, bfloat16",
        "times_the_fastest_peer": 8.004,
        "int8_times_the_fastest_peer": 9.11,
        "share_of_the_bare_engine": 0.8004,
        "peak_over_smallest_peer": 0.35,
    }
    rounds = {
        name: [{"files_per_s": rate + shift} for shift in (-3, -1, 0, 1, 2)]
        for name, rate in rates.items()
    }
    return {
        "command": "python benchmarks/predict.py",
        "size_px": 224,
        "cores": 2,
        "files": {"originals": 147, "reduced": 400},
        "summary": {"originals": found, "reduced": found},
        "latency_ms": {"engine": 8.123},
        "rounds": dict.fromkeys(("originals", "reduced"), rounds),
        "machine": {"processor": "a processor"},
    }


def test_bfloat16_is_as_fast_as_is_said_of_each_processor(tmp_path: Path) -> None:
    results = ROOT / "benchmarks" / "results"
    for name in ("predict", "predict_no_amx", "predict_no_amx_faster", "predict_float32"):
        found = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        vendor = "AuthenticAMD" if "AMD" in found["machine"]["processor"] else "GenuineIntel"
        description = tmp_path / name
        units = " ".join(found["machine"]["units"])
        description.write_text(f"vendor_id : {vendor}\nflags : {units}\n", encoding="utf-8")
        assert slow_bfloat16(description) is not found["machine"]["native_bfloat16"]
        for kind in found["summary"].values():
            rates = kind["files_per_s"]
            if "OpenVINO, bfloat16" in rates:  # else nobody took it
                assert rates["OpenVINO, bfloat16"] > 1.5 * rates["OpenVINO, float32"], name
    said = PAGE.read_text(encoding="utf-8").partition("## Precision")[2].partition("<!--")[0]
    assert "AMD's was faster, [on the EPYC below]" in said


def test_the_page_holds_what_was_measured(generate: ModuleType) -> None:
    page = PAGE.read_text(encoding="utf-8")
    blocks = generate.blocks()
    assert list(blocks) == ["engines", "start-up", "speed", "no-amx", "no-amx-faster", "plain"]
    for block in blocks.values():
        assert block in page, "run python docs/generate.py"
    if generate.SPEED.is_file():
        digest = hashlib.sha256(generate.SPEED.read_bytes()).hexdigest()
        with Image.open(generate.FIGURE) as figure:
            assert digest in figure.info["Source"]


def test_speed_is_told_with_machine_rounds_and_ratios(generate: ModuleType) -> None:
    block = " ".join(generate.speed_block(measured()).split())
    assert "147 untouched originals and 400 reduced files, on 2 cores (a processor)" in block
    assert "the median (and range) of 5 rounds" in block
    assert "OpenVINO, bfloat16 is 8.0 times as fast as the fastest peer, in 0.35 of" in block
    assert "OpenVINO, bfloat16 reaches 0.80 of the bare engine" in block
    assert "int8 is 9.1 times as fast, in 0.40 of it" in block
    assert "25.0 ms of a core per file, busy or idle, against 20.0" in block
    assert "8.1 ms (engine)" in block
    rows = [line for line in generate.speed_block(measured()).splitlines() if "| 560" in line]
    assert rows == ["| OpenVINO, bfloat16 | 80.0 (77.0–82.0) | 80.0 (77.0–82.0) | 560 |"]


def test_a_start_is_told_with_machine_rounds_and_memory(generate: ModuleType) -> None:
    runs = [{"seconds": 1 + n / 8, "peak_mib": 99.6} for n in (2, 0, 1)]
    found = {"command": "a command", "auto": "openvino, bfloat16", "machine": {"cores": 2}}
    found["machine"]["processor"] = "a processor"  # type: ignore[index]
    block = generate.start_block({**found, "rounds": {"auto, first": runs, "torch, again": runs}})
    assert "median (and range) of 3 rounds of `a command` on 2 cores (a processor)" in (
        " ".join(block.split())
    )
    assert "| `auto` (openvino, bfloat16), first | 1.12 (1.00–1.25) | 100 |" in block
    assert "| torch, again | 1.12 (1.00–1.25) | 100 |" in block


def test_what_nobody_measured_has_no_numbers(generate: ModuleType) -> None:
    assert "Not measured yet" in generate.speed_block(None)


def test_the_figure_names_the_result_that_it_shows(generate: ModuleType, tmp_path: Path) -> None:
    source, target = tmp_path / "predict.json", tmp_path / "speed.png"
    source.write_text(json.dumps(measured()))
    generate.draw(measured(), source, target)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    with Image.open(target) as figure:
        assert figure.info["Source"] == f"predict.json sha256 {digest}"


def test_the_bundled_weights_were_loaded_within_a_second_of_their_engines_import() -> None:
    path = ROOT / "benchmarks" / "results" / "start_up.json"
    rounds = json.loads(path.read_text(encoding="utf-8"))["rounds"]
    took = {name: median(run["seconds"] for run in runs) for name, runs in rounds.items()}
    for when in ("first", "again"):
        assert took[f"from_pretrained() in OpenVINO, {when}"] - took["import openvino"] < 1
