from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chestxray_covid import Sample, SyntheticChestXray
from chestxray_covid.errors import ResourceError
from chestxray_covid.file_facts import as_numbers, file_facts
from conftest import no_more_files


def sample(path: Path) -> Sample:
    return Sample(path=path, label="normal", finding="", patient_id="1", source="a")


@pytest.mark.parametrize("quality", [25, 35, 50, 75, 90, 98])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_quality_that_a_jpeg_was_saved_with_is_read_from_its_header(
    tmp_path: Path, quality: int, mode: str
) -> None:
    path = tmp_path / "a.png"  # the content counts, not the name
    Image.new(mode, (40, 30)).save(path, "JPEG", quality=quality)
    facts = file_facts(sample(path))
    assert facts is not None
    assert facts.jpeg_quality == pytest.approx(quality, abs=1)
    assert (facts.width_px, facts.height_px, facts.kind) == (40, 30, f"JPEG {mode}")


def test_depth_and_format_are_in_the_kind_and_become_columns(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 16), np.uint16)).save(tmp_path / "deep.png")
    Image.new("L", (16, 8)).save(tmp_path / "flat.png")
    Image.new("L", (16, 16)).save(tmp_path / "flat.jpg", quality=80)
    facts = [file_facts(sample(tmp_path / n)) for n in ("deep.png", "flat.png", "flat.jpg")]
    known = [one for one in facts if one is not None]
    assert [one.kind for one in known] == ["PNG I;16", "PNG L", "JPEG L"]
    numbers = as_numbers(known)
    sizes = [[16, 8, 2], [16, 8, 2], [16, 16, 1]]
    assert numbers[:, :3] == pytest.approx(np.log(sizes))
    assert numbers[:2, 3].tolist() == [0, 0]
    assert numbers[2, 3] == pytest.approx(80, abs=1)
    assert numbers[:, 4:].tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]  # JPEG L, PNG I;16, PNG L
    assert as_numbers([known[1], None])[:, 4:].tolist() == [[0, 1], [1, 0]]
    assert as_numbers([known[1], None])[1, :4].tolist() == [0, 0, 0, 0]


def test_what_has_no_header_has_no_facts(tmp_path: Path) -> None:
    assert file_facts(SyntheticChestXray(2, image_size_px=32).samples[0]) is None
    for name, content in (("a.dcm", bytes(128) + b"DICM"), ("b.jpg", b"\xff\xd8\xff"), ("c", b"")):
        (tmp_path / name).write_bytes(content)
        assert file_facts(sample(tmp_path / name)) is None
    assert file_facts(sample(tmp_path / "none.png")) is None


def test_the_facts_of_a_file_that_cannot_be_opened_now_are_not_those_of_none(
    tmp_path: Path,
) -> None:
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    with no_more_files(), pytest.raises(ResourceError, match=r"a\.png: the machine"):
        file_facts(sample(tmp_path / "a.png"))
