from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chestxray_covid import training_memory

ROOT = Path(__file__).parents[1]
NAMES = ("training_step", "time_to_auroc", "training_memory")


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import generate_training

    return generate_training  # type: ignore[no-any-return]


def test_the_page_holds_what_was_measured(generate: ModuleType) -> None:
    block = generate.training_block(*map(generate.load, NAMES))
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert block in page, "run python docs/generate.py"


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
    auroc |= {"plain": [{"seconds": None}, {"seconds": 81.2}], "recommended": [{"seconds": 40.4}]}
    memory: dict[str, Any] = {"size_px": 224, "steps": 5, "runs": []}
    for checkpointed, mib in ((False, 999.6), (True, 300.2)):
        run = {"precision": "float32", "batch": 4, "checkpointed": checkpointed}
        run |= {"step_mib": mib, "kept_mib": 200.0, "images_per_s": 5.04}
        memory["runs"].append(run)
    block = generate.training_block(step, auroc, memory)
    text = " ".join(block.split())
    assert "are 2.50 (2.00–3.00) times as fast as float32" in text
    assert "1.10 (1.00–1.20) times without huge pages" in text
    assert "reaches 0.95 (0.90–1.00) of a bare loop" in text
    assert "of a bare loop of the same steps at 160 px." in text
    never = generate.training_block(step, auroc | {"recommended": [{"seconds": None}]}, memory)
    assert "recommended 1 not within the epochs." in " ".join(never.split())
    assert "plain 81 s and 1 not within the epochs; recommended 40 s." in text
    assert (
        "| float32 | 4 | no | 1000 | 5.00 | 5.0 |\n| float32 | 4 | yes | 300 | 1.50 | 5.0 |"
        in block
    )
