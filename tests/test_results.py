"""Results beside a checkpoint; what publishing makes of them is in test_publish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chestxray_covid.checkpoint import ModelConfig
from chestxray_covid.errors import ReportError
from chestxray_covid.results import read_results

CONFIG = ModelConfig(classes=("normal", "covid19"), weights_sha256="a" * 64)


@pytest.mark.parametrize("classes", [5, None, "normal", {"normal": 0, "covid19": 1}])
def test_measurements_whose_classes_are_no_list_are_refused(tmp_path: Path, classes: Any) -> None:
    data = {"tables": [], "weights_sha256": CONFIG.weights_sha256, "classes": classes}
    (tmp_path / "measurements.json").write_text(json.dumps(data))
    with pytest.raises(ReportError, match=r"measurements\.json does not hold.*classes are no list"):
        read_results(tmp_path, CONFIG)
