from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chestxray_covid import Sample, SyntheticChestXray
from chestxray_covid.dicom import dicom_header
from chestxray_covid.errors import ImageError, ResourceError
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


def write_dicom(path: Path, **elements: Any) -> Path:
    """Write an image of 3 rows and 5 columns; its pixels are cut off, for none is looked at."""
    pydicom = pytest.importorskip("pydicom", reason="needs the extra dicom")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = elements.pop("syntax", "1.2.840.10008.1.2.1")
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3.4"
    data.Rows, data.Columns, data.BitsStored = 3, 5, 12
    data.PhotometricInterpretation = "MONOCHROME2"
    for name, value in elements.items():
        setattr(data, name, value)
    data.add_new(0x7FE00010, "OW", bytes(1000))
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    path.write_bytes(path.read_bytes()[:-900])
    return path


def test_a_dicom_file_says_how_its_pixels_are_kept(tmp_path: Path) -> None:
    facts = file_facts(sample(write_dicom(tmp_path / "a")))
    assert facts is not None
    assert (facts.width_px, facts.height_px, facts.jpeg_quality) == (5, 3, None)
    assert facts.kind == "DICOM MONOCHROME2 12 1.2.840.10008.1.2.1"
    others: list[dict[str, Any]] = [
        {"syntax": "1.2.840.10008.1.2"},
        {"BitsStored": 10},
        {"PhotometricInterpretation": "MONOCHROME1"},
    ]
    for elements in others:
        other = file_facts(sample(write_dicom(tmp_path / "b", **elements)))
        assert other is not None
        assert as_numbers([facts, other])[:, 4:].tolist() in ([[0, 1], [1, 0]], [[1, 0], [0, 1]])


def test_dicom_without_pydicom_or_without_an_image_has_no_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert file_facts(sample(write_dicom(tmp_path / "a", Rows=None))) is None
    assert file_facts(sample(write_dicom(tmp_path / "a", Columns=0))) is None
    place = write_dicom(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"x" * 200)
    with pytest.raises(ImageError, match=r"^b is no DICOM file\. Pass one, see PS3\.10, 7\.1\.$"):
        dicom_header(tmp_path / "b")
    monkeypatch.setitem(sys.modules, "pydicom.errors", None)
    assert file_facts(sample(place)) is None


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
