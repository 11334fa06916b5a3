from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from chestxray_covid import training_memory

ROOT = Path(__file__).parents[1]


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import generate_training

    return generate_training  # type: ignore[no-any-return]


def test_the_page_holds_what_was_measured(generate: ModuleType) -> None:
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    for block in generate.blocks().values():
        assert block in page, "run python docs/generate.py"
    if generate.GPU.is_file():
        digest = hashlib.sha256(generate.GPU.read_bytes()).hexdigest()
        with Image.open(generate.FIGURE) as figure:
            assert digest in figure.info["Source"]


def test_no_step_of_a_full_batch_takes_more_than_is_reckoned_with(generate: ModuleType) -> None:
    runs = generate.load("training_memory")["runs"]
    over = [run["step_mib"] / run["kept_mib"] for run in runs if run["batch"] == 16]
    assert len(over) == 4
    assert max(over) <= training_memory._OVERHEAD


def test_medians_come_with_ranges_and_missed_targets_are_told(generate: ModuleType) -> None:
    step: dict[str, Any] = {
        "machine": {"cores": 2, "processor": "a processor"},
        "batch_size": 16,
        "size_px": {"trainer": 160, "recommended": 224},
        "recommended_over_plain_pairs": [2.0, 3.0, 2.5],
        "without_huge_pages_over_plain_pairs": [1.0, 1.1, 1.2],
        "trainer_over_bare_pairs": [0.9, 0.95, 1.0],
    }
    auroc: dict[str, Any] = {"target": 0.9, "size_px": 160, "images": [500, 100]}
    auroc["machine"] = step["machine"]
    auroc |= {"plain": [{"seconds": None}, {"seconds": 81.2}], "recommended": [{"seconds": 40.4}]}
    memory: dict[str, Any] = {"size_px": 224, "steps": 5, "runs": [], "machine": step["machine"]}
    for checkpointed, mib in ((False, 999.6), (True, 300.2)):
        run = {"precision": "float32", "batch": 4, "checkpointed": checkpointed}
        run |= {"step_mib": mib, "kept_mib": 200.0, "images_per_s": [6, 5.04, 4.2]}
        memory["runs"].append(run)
    block = generate.cost_block(auroc, memory)
    text = " ".join(f"{generate.step_paragraph(step)} {block}".split())
    assert "are 2.50 (2.00–3.00) times as fast as a plain loop, of float32" in text
    assert "memory kept" not in text
    assert "1.10 (1.00–1.20) times without huge pages" in text
    assert "reaches 0.95 (0.90–1.00) of a bare loop" in text
    assert "of a bare loop of the same steps at 160 px." in text
    kept = {"memory_kept_over_plain_pairs": [2.0, 4.0, 3.0]}
    asked = " ".join(generate.step_paragraph(step | kept).split())
    assert "huge pages, 3.00 (2.00–4.00) times with memory kept; the trainer" in asked
    never = generate.cost_block(auroc | {"recommended": [{"seconds": None}]}, memory)
    assert "recommended 1 not within the epochs." in " ".join(never.split())
    assert "plain 81 s and 1 not within the epochs; recommended 40 s." in text
    assert (
        "| float32 | 4 | no | 1000 | 5.00 | 5.0 (4.2–6.0) |\n"
        "| float32 | 4 | yes | 300 | 1.50 | 5.0 (4.2–6.0) |" in block
    )


def on_a_gpu() -> dict[str, Any]:
    """Return what the benchmark leaves, with numbers that can be followed in the head."""
    rates = {"plain": [400, 410, 390], "timm": [800, 810, 805], "trainer": [1600, 1500, 1700]}
    rows = {
        name: {
            "batch": 64,
            "median": sorted(found)[1],
            "range": [min(found), max(found)],
            "share_of_peak": sorted(found)[1] * 16e9 / 640e12,
        }
        for name, found in rates.items()
    }
    return {
        "size_px": 224,
        "images": 2560,
        "rounds": 3,
        "workers": 4,
        "gpu": {"name": "a card", "cuda": "13.0"},
        "timm": "1.0.31",
        "flops_per_image": 16e9,
        "peak_flops": 640e12,
        "rows": rows,
        "note": None,
        "left_out": {},
        "idle": {"trainer": {"epoch": 0.042, "profiled": 0.081, "steps": 15}},
        "machine": {
            "cores": 16,
            "torch_threads": 12,
            "processor": "a processor",
            "versions": {"torch": "2.11.0"},
        },
    }


def test_rates_on_a_gpu_come_with_ranges_ratios_and_idle_time(generate: ModuleType) -> None:
    block = generate.gpu_block(on_a_gpu())
    text = " ".join(block.split())
    assert (
        "at 224 px on one a card and 12 of 16 cores (a processor; torch 2.11.0, CUDA 13.0)" in text
    )
    assert "2560 radiographs of Kermany's collection per epoch, 4 threads" in text
    assert "| plain | 64 | 400 (390–410) | 1.00 | – | 1.0% |" in block
    assert "| timm | 64 | 805 (800–810) | 2.01 | – | 2.0% |" in block
    assert "| trainer | 64 | 1600 (1500–1700) | 4.00 | 4.2% (8.1%) | 4.0% |" in block
    assert "16.0 GFLOP per image" in text
    assert "the 640 TFLOP/s" in text
    assert "records of 15 steps" in text
    assert "Not measured" not in text
    assert "given to the trainer alone" not in text
    noted = generate.gpu_block(on_a_gpu() | {"note": "small copies"})
    assert "per epoch (small copies), 4 threads" in " ".join(noted.split())


def test_no_ratio_is_told_between_batches_of_different_size(generate: ModuleType) -> None:
    result = on_a_gpu()
    result["rows"]["trainer, batch 256"] = result["rows"]["trainer"] | {"batch": 256}
    block = generate.gpu_block(result)
    assert "| trainer, batch 256 | 256 | 1600 (1500–1700) | – | – | 4.0% |" in block
    assert "Batches of 256 were given to the trainer alone" in block
    result["rows"]["timm, batch 256"] = result["rows"]["timm"] | {"batch": 256}
    assert "given to the trainer alone" not in generate.gpu_block(result)


def test_what_was_not_measured_on_a_gpu_is_told(generate: ModuleType) -> None:
    result = on_a_gpu()
    assert "Not measured yet" in generate.gpu_block(None)
    assert "Not measured yet" in generate.gpu_block(result | {"gpu": None})
    rows = {"trainer": result["rows"]["trainer"]}
    left_out = {"timm, compiled": "not chosen", "plain": "no time"}
    block = generate.gpu_block(
        result | {"rows": rows, "left_out": left_out, "idle": None, "timm": None}
    )
    assert "| trainer | 64 | 1600 (1500–1700) | – | – | 4.0% |" in block
    assert "Not measured: *timm, compiled*, *plain*." in block
    assert "*GPU idle*" not in block


def test_the_figure_of_a_gpu_names_the_result_that_it_shows(
    generate: ModuleType, tmp_path: Path
) -> None:
    source, target = tmp_path / "training_gpu.json", tmp_path / "training_gpu.png"
    source.write_text(json.dumps(on_a_gpu()))
    generate.draw(on_a_gpu(), source, target)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    with Image.open(target) as figure:
        assert figure.info["Source"] == f"training_gpu.json sha256 {digest}"
