from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from scipy.special import softmax

from chestxray_covid import (
    Classifier,
    ExportError,
    ModelConfig,
    Preprocess,
    SyntheticChestXray,
    export,
    export_model,
    resolve,
)
from chestxray_covid.checkpoint import load_config, save_checkpoint
from chestxray_covid.cli import main
from chestxray_covid.engine_openvino import openvino_core
from chestxray_covid.errors import CheckpointError, ConfigError
from chestxray_covid.export_card import card_text
from conftest import random_checkpoint, random_tensors
from shallow import shallow_networks

pytestmark = pytest.mark.usefixtures("shallow")

EXAMPLE = Path(__file__).parents[1] / "examples" / "embed_onnx.py"
CLASSES = ("normal", "pneumonia", "covid19")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SyntheticChestXray(4, image_size_px=150).save(tmp_path_factory.mktemp("p") / "phantoms")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint that says all that a card can say."""
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(
        classes=CLASSES,
        preprocess=Preprocess(size_px=64, mean=0.4, std=0.3),
        threshold=0.25,
        threshold_origin="sensitivity 0.9",
        provenance={"temperature": 1.5, "license": "cc-by-4.0"},
    )
    save_checkpoint(folder, config, random_tensors(3, seed=5))
    return folder


@pytest.fixture(scope="module")
def exported(
    checkpoint: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exported")
    return {
        format: export_model(checkpoint, root / format, format=format, images=phantoms)
        for format in ("onnx", "openvino", "torch")
    }


def logits_of(format: str, folder: Path, pixels: np.ndarray) -> np.ndarray:
    if format == "onnx":
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        return np.asarray(session.run(["logits"], {"pixels": pixels})[0])
    if format == "openvino":
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        model = openvino_core().compile_model(folder / "model.xml", "CPU", exact)
        return np.asarray(model({"pixels": pixels})["logits"])
    with torch.inference_mode():
        logits, _ = torch.export.load(folder / "model.pt2").module()(torch.from_numpy(pixels))
    return logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino", "torch"])
def test_an_exported_file_answers_pixels_as_the_classifier_does(
    format: str, exported: dict[str, Path], checkpoint: Path, phantoms: Path
) -> None:
    classifier = Classifier.from_pretrained(checkpoint, engine="torch")
    paths = sorted(phantoms.rglob("*.png"))
    pixels = np.stack([classifier.config.preprocess(path) for path in paths])
    for count in (1, 3):
        logits = logits_of(format, exported[format], pixels[:count])
        expected = classifier.predict_proba(paths[:count])
        np.testing.assert_allclose(softmax(logits, axis=1), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("real_depth")
@pytest.mark.parametrize("format", ["openvino", "torch"])  # the documentation's page exports ONNX
def test_a_network_of_full_depth_is_exported(format: str, phantoms: Path, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "model")
    folder = export_model(checkpoint, tmp_path / "exported", format=format, images=phantoms)
    classifier = Classifier.from_pretrained(checkpoint, engine="torch")
    paths = sorted(phantoms.rglob("*.png"))
    logits = logits_of(format, folder, np.stack([classifier.config.preprocess(p) for p in paths]))
    expected = classifier.predict_proba(paths)
    assert expected.std(axis=0).min() > 1e-3, "or the images would not matter"
    np.testing.assert_allclose(softmax(logits, axis=1), expected, atol=1e-4)


@pytest.mark.real_data
@pytest.mark.usefixtures("real_depth")
@pytest.mark.parametrize("format", ["onnx", "openvino", "torch"])
def test_the_bundled_weights_answer_real_files_as_exported_ones(
    format: str, real_data: Path, tmp_path: Path
) -> None:
    names = (real_data / "originals.txt").read_text().split("\n")
    paths = [real_data / n for n in names if n and (real_data / n).is_file()][::12]
    folder = export_model(resolve(), tmp_path / "exported", format=format, images=paths)
    assert json.loads((folder / "card.json").read_text())["parity"]["images"] == len(paths)
    classifier = Classifier.from_pretrained(engine="torch", precision="float32")
    logits = logits_of(format, folder, np.stack([classifier.config.preprocess(p) for p in paths]))
    expected = classifier.predict_proba(paths)
    assert len(paths) > 10
    assert expected.std(axis=0).min() > 0.1
    np.testing.assert_allclose(softmax(logits, axis=1), expected, atol=1e-4)


@pytest.mark.slow
def test_what_is_exported_depends_on_no_setting_of_torch(phantoms: Path, tmp_path: Path) -> None:
    with shallow_networks():
        checkpoint, plain, other = random_checkpoint(tmp_path), tmp_path / "a", tmp_path / "b"
        export_model(checkpoint, plain, format="torch", images=phantoms)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                export_model(checkpoint, other, format="torch", images=phantoms)
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 1, 64, 64), dtype=np.uint8)
    found = logits_of("torch", other, pixels)
    np.testing.assert_array_equal(found, logits_of("torch", plain, pixels))


def test_the_card_says_what_the_file_expects_and_gives(
    exported: dict[str, Path], checkpoint: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    for format, folder in exported.items():
        card = json.loads((folder / "card.json").read_text())
        assert card["input"] == {"name": "pixels", "dtype": "uint8", "shape": ["N", 1, 64, 64]}
        assert card["outputs"]["logits"] == {"dtype": "float32", "shape": ["N", 3]}
        assert card["classes"] == list(CLASSES)
        assert (card["threshold"], card["temperature"], card["license"]) == (0.25, 1.5, "cc-by-4.0")
        assert card["weights_sha256"] == config["weights_sha256"]
        assert card["preprocess"].items() >= config["preprocess"].items()
        assert card["parity"]["images"] == 4
        assert 0 < card["parity"]["logits"] < 1e-5
        for name, digest in card["sha256"].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        assert {path.name for path in folder.iterdir()} == {
            *card["sha256"],
            "card.json",
            "README.md",
        }
        text = (folder / "README.md").read_text()
        said = ("64×64", "normal, pneumonia, covid19", "0.25 (sensitivity 0.9)", "1.5 is folded in")
        for words in (*said, "cc-by-4.0", "not a medical device", f"# {card['file']}"):
            assert words in text
        assert card["format"] == format


@pytest.mark.slow
def test_the_snippet_of_the_card_runs(
    exported: dict[str, Path], phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = Preprocess(size_px=64)(next(phantoms.rglob("*.png")))[np.newaxis]
    for folder in exported.values():
        monkeypatch.chdir(folder)
        text = Path("README.md").read_text()
        names: dict[str, Any] = {"pixels": pixels, "torch": torch}
        exec(text.partition("```python\n")[2].partition("```")[0], names)
        assert names["logits"].shape == (1, 3)


def test_the_torch_file_holds_no_pickle(exported: dict[str, Path]) -> None:
    with zipfile.ZipFile(exported["torch"] / "model.pt2") as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    assert len(contents) > 40
    # A pickle begins with its protocol; what torch.save writes is a zip archive.
    assert not [data[:9] for data in contents if data[:1] == b"\x80" and data[-1:] == b"."]
    assert not [data[:9] for data in contents if data[:2] == b"PK"]


@pytest.mark.parametrize("format", ["onnx", "openvino", "torch"])
def test_no_file_says_where_the_library_is_installed(
    exported: dict[str, Path], format: str
) -> None:
    place = str(Path(export.__file__).parent).encode()
    for path in exported[format].iterdir():
        contents = [path.read_bytes()]
        if path.suffix == ".pt2":
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        assert not [path for data in contents if place in data]


def test_the_onnx_file_passes_its_checker_and_needs_no_other_domain(
    exported: dict[str, Path],
) -> None:
    model = onnx.load(exported["onnx"] / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {imported.domain for imported in model.opset_import} == {""}


def test_a_file_that_answers_otherwise_is_refused_and_nothing_is_left(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = export.fold

    def folded_wrong(tensors: Any, preprocess: Preprocess) -> Any:
        return fold(tensors, replace(preprocess, mean=preprocess.mean + 0.01))

    monkeypatch.setattr(export, "fold", folded_wrong)
    with pytest.raises(
        ExportError, match=r"model\.onnx does not answer as the checkpoint does: ove"
    ):
        export_model(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


HOSTILE = "\x1b[31mMIT\n\n# Approved \ud800 <b>`"


@pytest.mark.parametrize(
    "temperature",
    [{}, "x", True, None, -1.0, 0, 10**400, HOSTILE, [1.5], float("inf")],
    ids=lambda value: str(value)[:5].encode("ascii", "replace").decode(),
)
def test_the_card_takes_nothing_unchecked_from_a_config(checkpoint: Path, temperature: Any) -> None:
    config = replace(
        load_config(checkpoint),
        provenance={"temperature": temperature, "license": HOSTILE + "x" * 9000},
        threshold_origin=HOSTILE,
    )
    parity = export.Parity(images=1, probability=0.0, logits=0.0, features=0.0)
    card = export._card("onnx", "model.onnx", {}, config, parity)
    assert card["temperature"] is None
    assert len(card["license"]) == 100
    json.dumps(card, allow_nan=False)
    text = card_text(card)
    assert "no calibration temperature is known" in text
    assert r"licence: \[31mMIT # Approved &lt;b&gt;\`xx" in text
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "\n# Approved" not in text
    config = replace(config, provenance={"license": [HOSTILE]})
    assert export._card("onnx", "model.onnx", {}, config, parity)["license"] is None


def test_a_text_of_a_config_has_its_limit(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="threshold_origin must have at most 2000 characters"):
        replace(load_config(checkpoint), threshold_origin="x" * 2001)


def test_a_file_longer_than_any_of_a_checkpoint_is_said_to_be(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "copied")
    os.truncate(folder / "model.safetensors", 100_000_001)
    with pytest.raises(CheckpointError, match="has 100000001 bytes, expected at most 100000000"):
        export_model(folder, tmp_path / "out")


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("format", ["onnx", "openvino", "torch"])
def test_a_full_disk_is_told_in_every_format(checkpoint: Path, tmp_path: Path, format: str) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ExportError, match=r"cannot be made in .*room for it; TMPDIR names"):
            export_model(checkpoint, tmp_path / "out", format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("format", ["onnx", "openvino", "torch"])
def test_no_file_is_mapped_when_it_is_deleted_which_windows_refuses(
    checkpoint: Path, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleanup, deleted = tempfile.TemporaryDirectory.cleanup, []

    def as_windows_does(place: tempfile.TemporaryDirectory[str]) -> None:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if mapped := [line for line in maps if place.name in line]:
            raise PermissionError(13, "Access is denied", mapped[0])
        deleted.append(place.name)
        cleanup(place)

    monkeypatch.setattr(tempfile.TemporaryDirectory, "cleanup", as_windows_does)
    export_model(checkpoint, tmp_path / "out", format=format)
    assert deleted


def test_the_card_of_a_checkpoint_is_not_replaced(checkpoint: Path) -> None:
    before = {p.name for p in checkpoint.iterdir()}
    with pytest.raises(ValueError, match="output must not be the folder of a checkpoint"):
        export_model(checkpoint, checkpoint)
    assert {p.name for p in checkpoint.iterdir()} == before


def test_a_readme_of_something_else_is_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My project", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds a README\.md that is of no export, and would be"):
        export_model(checkpoint, tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# My project"


def test_what_a_killed_process_left_of_an_export_goes_with_the_next_after_a_day(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: set[Path] = set()
    with monkeypatch.context() as watched:
        watched.setattr(os, "fsync", lambda _: left.update(tmp_path.glob(".*")))
        written = {p.name for p in export_model(checkpoint, tmp_path, format="openvino").iterdir()}
    assert len(left) == len(written) == 4
    for path in left:
        path.touch()
        os.utime(path, (0, 0))
    export_model(checkpoint, tmp_path, format="openvino")
    assert {p.name for p in tmp_path.iterdir()} == written


def test_wrong_arguments_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format must be one of"):
        export_model(checkpoint, tmp_path / "out", format="tflite")
    with pytest.raises(ValueError, match="images has none"):
        export_model(checkpoint, tmp_path / "out", images=[])


def test_the_example_embeds_the_file_where_this_library_is_not(
    exported: dict[str, Path], checkpoint: Path, phantoms: Path
) -> None:
    paths = sorted(phantoms.rglob("*.png"))
    forbidden = ("chestxray_covid", "torch", "onnx", "pandas", "sklearn")
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({forbidden!r}))\n"  # None: importing them fails
        f"sys.argv[0] = {str(EXAMPLE)!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, exported["onnx"], *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["source"] for row in rows] == list(map(str, paths))
    expected = Classifier.from_pretrained(checkpoint, engine="torch").predict_proba(paths)
    found = [[row["probabilities"][name] for name in CLASSES] for row in rows]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_example_refuses_what_it_would_decode_wrongly(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    deep = tmp_path / "deep.png"
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(deep)
    assert "mode I;16: make 8-bit grey" in refusal_of_the_example(exported["onnx"], deep)


@pytest.mark.parametrize("hidden", [False, True], ids=["deep", "transparent"])
def test_the_example_refuses_colour_that_pillow_shows_otherwise(
    hidden: bool, exported: dict[str, Path], tmp_path: Path
) -> None:
    image = tmp_path / "colour.png"
    if hidden:
        Image.new("RGB", (9, 9), "white").save(image, transparency=(255, 255, 255))
    else:
        rows = (b"\0" + b"\x0f\xff" * 27) * 9  # 12 bits of 16, as many detectors have
        header = struct.pack(">IIBBBBB", 9, 9, 16, 2, 0, 0, 0)
        chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
        parts = (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks.items()
        )
        image.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with Image.open(image) as opened:
        assert opened.mode == "RGB"
    assert "is 16-bit or transparent" in refusal_of_the_example(exported["onnx"], image)


def refusal_of_the_example(folder: Path, image: Path) -> str:
    command = [sys.executable, EXAMPLE, folder, image]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_the_command_line_exports_and_shows_the_card(
    checkpoint: Path, phantoms: Path, tmp_path: Path
) -> None:
    arguments = ["export", "--model", checkpoint, "--output", tmp_path / "out", phantoms]
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert "# model.onnx" in done.output
    (tmp_path / "none").mkdir()
    done = CliRunner().invoke(main, [*map(str, arguments[:-1]), str(tmp_path / "none")])
    assert f"images has none, got ['{tmp_path / 'none'}']; leave it out" in done.output
    assert json.loads((tmp_path / "out" / "card.json").read_text())["parity"]["images"] == 4


def test_the_page_says_what_int8_moves_in_the_bundled_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    docs = EXAMPLE.parents[1] / "docs"
    monkeypatch.syspath_prepend(str(docs))
    import generate_export

    page = (docs / "export.md").read_text(encoding="utf-8")
    assert generate_export.page() == page
    report = json.loads((resolve() / "int8.json").read_text())
    assert f"| {report['max_difference']:.4f} |" in page
    rounding = json.loads(generate_export.ROUNDING.read_text())
    for count in ("calibration_images", "evaluation_images"):
        assert rounding[count] == report[count], "the page says that both are of the same images"
    assert f"NNCF {rounding['machine']['versions']['nncf']}" in page
    for name, row in rounding["models"].items():
        moved = " | ".join(f"{row[key]:.4f}" for key in ("mean", "p99", "largest"))
        rate = f"{moved} | {row['images_per_s']:.0f} |"
        assert f"| {generate_export.NAMES[name]} | {rate}" in page
