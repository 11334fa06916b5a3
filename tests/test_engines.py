from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image

from chestxray_covid import Classifier, classifier, engine_onnx, engine_openvino, engines
from chestxray_covid.checkpoint import ModelConfig, load_checkpoint, save_checkpoint
from chestxray_covid.cli import main
from chestxray_covid.engines import (
    ENGINES,
    PRECISIONS,
    Engine,
    keeps_probabilities,
    open_engine,
    softmax,
)
from chestxray_covid.errors import (
    CheckpointError,
    ConfigError,
    MissingExtraError,
    ResourceError,
    require_extra,
)
from chestxray_covid.hub import bundled_models, resolve
from chestxray_covid.image import Preprocess
from chestxray_covid.int8 import Int8
from chestxray_covid.pixels import ImageFacts
from conftest import random_tensors

CONFIG = ModelConfig(
    classes=("normal", "pneumonia", "covid19"), preprocess=Preprocess(size_px=64, mean=0.3, std=0.4)
)
NAMES = [name for name in ENGINES if name != "auto"]
KEPT = {"p99": 0.01, "largest": 0.03, "auroc_change": -0.002, "images": 500}


@pytest.fixture(scope="module")
def opened() -> dict[str, Engine]:
    """Return every engine in single precision."""
    tensors = random_tensors(3)
    return {n: open_engine(CONFIG, tensors, engine=n, precision="float32") for n in NAMES}


@pytest.fixture(params=NAMES)
def engine(request: pytest.FixtureRequest, opened: dict[str, Engine]) -> Engine:
    return opened[request.param]


def pixels(count: int = 4, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 64, 64), dtype=np.uint8)


def plain_torchvision(batch: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return logits and features, computed in double precision with hooks on a fresh network."""
    model = torchvision.models.densenet121(weights=None, num_classes=3).eval().double()
    model.load_state_dict({k: torch.from_numpy(v) for k, v in random_tensors(3).items()})
    seen = []
    model.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    grey = (torch.from_numpy(batch).double() / 255 - 0.3) / 0.4
    with torch.inference_mode():
        logits = model(grey.repeat(1, 3, 1, 1))
    return logits.numpy(), seen[0].numpy()


# ---------------------------------------------------------------- answers


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 5])
def test_logits_and_features_are_those_of_torchvision(engine: Engine, count: int) -> None:
    logits, features = engine(pixels(count))
    assert (logits.shape, features.shape) == ((count, 3), (count, 1024))
    assert logits.dtype == features.dtype == np.float32
    expected_logits, expected_features = plain_torchvision(pixels(count))
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4)
    np.testing.assert_allclose(features, expected_features, atol=1e-4)


def test_no_images_have_no_answers(engine: Engine) -> None:
    logits, features = engine(pixels(0))
    assert (logits.shape, features.shape) == ((0, 3), (0, 1024))


def test_an_engine_says_what_it_is(opened: dict[str, Engine]) -> None:
    for name, engine in opened.items():
        assert (engine.name, engine.precision) == (name, "float32")
        assert engine.calls >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openvino", "torch"])
def test_bfloat16_is_close_to_single_precision(name: str, opened: dict[str, Engine]) -> None:
    batch = pixels(8)
    lower = open_engine(CONFIG, random_tensors(3), engine=name, precision="bfloat16")
    assert lower.precision == "bfloat16"
    exact = softmax(opened[name](batch)[0])
    found = softmax(lower(batch)[0])
    assert 0 < np.abs(found - exact).max() < 0.01


def test_half_precision_weights_are_computed_in_single_precision() -> None:
    half = {
        k: v.astype(np.float16) if v.dtype.kind == "f" else v for k, v in random_tensors(3).items()
    }
    single = {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in half.items()}
    one, other = (open_engine(CONFIG, t, engine="torch")(pixels())[0] for t in (half, single))
    assert np.array_equal(one, other)


def test_the_engine_keeps_its_own_weights_and_leaves_pixels_alone(engine: Engine) -> None:
    tensors = random_tensors(3)
    own, batch = open_engine(CONFIG, tensors, engine=engine.name), pixels()
    before = own(batch)[0]
    tensors["classifier.weight"][:] = 0
    assert np.array_equal(own(batch)[0], before)
    assert np.array_equal(batch, pixels())


def test_threads_get_what_one_thread_gets(engine: Engine) -> None:
    batches = [pixels(2, seed) for seed in range(8)]
    expected = [engine(batch)[0] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: engine(batch)[0], batches))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def in_new_process(code: str, *arguments: object) -> int:
    """Return the exit status of a Python process, which has a minute."""
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=where, timeout=60).returncode


def test_signals_arrive_after_several_engines_have_gone() -> None:
    # A segmentation fault cannot be caught, so all of it happens in another process.
    code = (
        "import signal\n"
        "from chestxray_covid import Classifier\n"
        "for _ in range(3):\n"  # each is made before the one before it goes
        "    classifier = Classifier.from_pretrained(engine='openvino')\n"
        "del classifier\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may ignore it
        "try:\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    raise SystemExit(7)\n"
    )
    assert in_new_process(code) == 7


@pytest.mark.slow
def test_threads_that_are_the_first_to_ask_do_not_wait_for_each_other() -> None:
    # Where they do, it is in two of five processes.
    code = (
        "import threading\n"
        "import numpy as np\n"
        "from chestxray_covid import Classifier\n"
        "classifier = Classifier.from_pretrained(engine='openvino')\n"
        "pixels = np.zeros((16, 1, *[classifier.config.preprocess.size_px] * 2), np.uint8)\n"
        "together = threading.Barrier(2)\n"
        "def ask():\n"
        "    together.wait()\n"
        "    classifier.engine(pixels)\n"
        "threads = [threading.Thread(target=ask) for _ in range(2)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
    )
    for _ in range(5):
        assert in_new_process(code) == 0


FORKED = """
import os, sys
import numpy as np
from chestxray_covid import ChestXrayError, Classifier
folder, engine, one_thread = sys.argv[1:]
if engine == "torch":
    import torch
    torch.set_num_threads(2)
classifier = Classifier.from_pretrained(folder, engine=engine)
images = list(np.random.default_rng(0).integers(0, 256, (12, 64, 64), dtype=np.uint8))
expected = [classifier.predict_proba(images[0]), classifier.predict_proba(images)]
child = os.fork()
if not child:
    if one_thread == "True":
        torch.set_num_threads(1)
    try:
        found = [classifier.predict_proba(images[0]), classifier.predict_proba(images)]
    except ChestXrayError as error:
        os._exit(5 if isinstance(error, RuntimeError) and "spawn" in str(error) else 6)
    os._exit(3 if all(map(np.allclose, found, expected)) else 4)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("name", "one_thread", "expected"),
    [("openvino", False, 3), ("onnx", False, 3), ("torch", True, 3), ("torch", False, 5)],
)
def test_a_forked_process_gets_what_its_parent_gets_or_an_error(
    checkpoint_folder: Path, name: str, one_thread: bool, expected: int
) -> None:
    assert in_new_process(FORKED, checkpoint_folder, name, one_thread) == expected


EXPLAINED_IN_A_FORK = """
import os, sys
import numpy as np
import torch
from chestxray_covid import ChestXrayError, Classifier, export_model, grad_cam, segment
torch.set_num_threads(2)
folder, output, first, *children = sys.argv[1:]
classifier = Classifier.from_pretrained(folder, engine="onnx")
image = np.random.default_rng(0).integers(0, 256, (96, 96), dtype=np.uint8)
ask = {
    "segment": lambda: segment(image),
    "grad_cam": lambda: grad_cam(classifier, image),
    "predict": lambda: Classifier.from_pretrained(folder, engine="torch").predict(image),
    "export": lambda: export_model(folder, output),
}
ask[first]()
for then in children:
    child = os.fork()
    if not child:
        then, alone, _ = then.partition(" in one thread")
        if alone:
            torch.set_num_threads(1)
        try:
            ask[then]()
        except ChestXrayError as error:
            os._exit(5 if isinstance(error, RuntimeError) and "spawn" in str(error) else 6)
        os._exit(3)
    expected = 3 if "one thread" in then else 5
    found = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert found == expected, f"{then} after {first}: {found}"
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("first", "children"),
    [
        ("segment", ("segment in one thread", "segment")),
        ("grad_cam", ("segment", "export")),
        ("predict", ("grad_cam", "predict")),
    ],
)
def test_what_torch_computes_in_a_forked_process_is_there_or_an_error(
    checkpoint_folder: Path, tmp_path: Path, first: str, children: tuple[str, ...]
) -> None:
    asked = (checkpoint_folder, tmp_path, first, *children)
    assert in_new_process(EXPLAINED_IN_A_FORK, *asked) == 0


THREADS_OF_A_FORK = """
import os, sys, threading
import numpy as np
from chestxray_covid import Classifier, engine_openvino
classifier = Classifier.from_pretrained(sys.argv[1], engine="openvino")
pixels = np.random.default_rng(0).integers(0, 256, (9, 1, 64, 64), dtype=np.uint8)
expected = classifier.engine(pixels)[0]
child = os.fork()
if not child:
    real, opened, right = engine_openvino._compiled, [], []
    def compiled(*given):
        opened.append(1)
        return real(*given)
    engine_openvino._compiled = compiled
    together = threading.Barrier(4)
    def ask():
        together.wait()
        right.append(np.allclose(classifier.engine(pixels)[0], expected, atol=1e-5))
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    os._exit(10 * sum(right) + len(opened))
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_threads_of_a_forked_process_get_one_copy_of_the_model(checkpoint_folder: Path) -> None:
    # Of several, one could take back what another had just made: the next call then failed.
    assert in_new_process(THREADS_OF_A_FORK, checkpoint_folder) == 41


END_OF_A_FORK = """
import os, signal, sys
import numpy as np
from chestxray_covid import Classifier
classifier = Classifier.from_pretrained(sys.argv[1], engine=sys.argv[2])
images = list(np.zeros((12, 64, 64), np.uint8))
if sys.argv[3] != "in the child":
    classifier.predict(images)
child = os.fork()
if not child:
    if sys.argv[3] != "in the parent":
        classifier.predict(images)
    raise SystemExit(3)
signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
signal.alarm(40)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", ["openvino", "onnx"])
@pytest.mark.parametrize("computes", ["in the parent", "in both", "in the child"])
def test_a_forked_process_ends_as_any_other_does(
    checkpoint_folder: Path, name: str, computes: str
) -> None:
    assert in_new_process(END_OF_A_FORK, checkpoint_folder, name, computes) == 3


def test_the_autocast_of_the_caller_changes_no_answer(opened: dict[str, Engine]) -> None:
    batch = pixels(3)
    expected = opened["torch"](batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = opened["torch"](batch)
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(own, other)


class OnMac(torch.Tensor):
    """Says that it lies on the GPU of a Mac, and so does all that is computed of it."""

    device = torch.device("mps")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_on_a_mac_no_batch_norm_has_two_precisions(
    precision: str, opened: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_norm = torch.nn.functional.batch_norm

    def as_a_mac_does(value: torch.Tensor, mean: torch.Tensor, *rest: Any, **options: Any) -> Any:
        assert value.dtype == mean.dtype, "which ends the process there"
        return batch_norm(value, mean, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "batch_norm", as_a_mac_does)
    lower = open_engine(CONFIG, random_tensors(3), engine="torch", precision=precision)
    with torch.inference_mode():
        there = torch.from_numpy(pixels()).as_subclass(OnMac)
        logits, _ = lower._network(there)  # type: ignore[attr-defined]
    expected = softmax(opened["torch"](pixels())[0])
    assert np.abs(softmax(logits.as_subclass(torch.Tensor).numpy()) - expected).max() < 0.02


def test_torch_takes_pixels_to_where_its_weights_are() -> None:
    # As "cuda" is another device in every thread, "cpu:0" is another than that of its tensors.
    own = open_engine(CONFIG, random_tensors(3), engine="torch", device="cpu:0")
    weights = own._network.buffers()  # type: ignore[attr-defined]
    assert {own._device} == {tensor.device for tensor in weights}  # type: ignore[attr-defined]


@pytest.mark.parametrize("lacks", ["folder", "room"])
def test_onnx_runtime_opens_where_nothing_can_be_written(
    opened: dict[str, Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    monkeypatch.setenv("CHESTXRAY_COVID_CACHE", str(tmp_path / "cache"))
    if lacks == "folder":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        own = open_engine(CONFIG, random_tensors(3), engine="onnx")
    else:
        resource = pytest.importorskip("resource")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            own = open_engine(CONFIG, random_tensors(3), engine="onnx")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "cache").glob("*"))
    np.testing.assert_allclose(own(pixels())[0], opened["onnx"](pixels())[0], atol=1e-5)


SILENT = """
import os, sys
from chestxray_covid import Classifier
Classifier.from_pretrained(sys.argv[1], engine="onnx")
assert "onnxruntime" in sys.modules
print(os.environ.get("ORT_DISABLE_TELEMETRY"))
"""


@pytest.mark.parametrize("said", [None, "1"])
def test_onnx_runtime_tells_its_makers_nothing(
    checkpoint_folder: Path, tmp_path: Path, said: str | None
) -> None:
    # Nothing else of the environment: ONNX Runtime is silent by itself where it knows a CI.
    home = {"HOME": str(tmp_path), "CHESTXRAY_COVID_CACHE": os.devnull}
    own = {} if said is None else {"ORT_DISABLE_TELEMETRY": said}
    paths = {n: os.environ[n] for n in ("PATH", "PYTHONPATH", "SYSTEMROOT") if n in os.environ}
    command = [sys.executable, "-c", SILENT, str(checkpoint_folder)]
    done = subprocess.run(command, env=home | own | paths, check=True, capture_output=True)
    assert done.stdout.decode().strip() == str(said), "the caller's environment is as it was"
    assert not list(tmp_path.rglob("*")), "where it keeps who and what it counts"


@pytest.mark.parametrize("name", ["onnx", "openvino"])
@pytest.mark.parametrize("kept", [b"", b"no model", "half"])
def test_a_compiled_model_that_the_runtime_refuses_is_made_again(
    opened: dict[str, Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kept: bytes | str,
) -> None:
    monkeypatch.setenv("CHESTXRAY_COVID_CACHE", str(tmp_path))
    open_engine(CONFIG, random_tensors(3), engine=name, precision="float32")
    (file,) = tmp_path.glob("*.compiled")
    whole = file.read_bytes()
    data = whole[32 : len(whole) // 2] if isinstance(kept, str) else kept
    file.write_bytes(hashlib.sha256(data).digest() + data)
    own = open_engine(CONFIG, random_tensors(3), engine=name, precision="float32")
    np.testing.assert_allclose(own(pixels())[0], opened[name](pixels())[0], atol=1e-5)
    assert file.stat().st_size > 0.9 * len(whole)


def test_a_call_that_was_interrupted_leaves_an_engine_that_answers() -> None:
    own = open_engine(CONFIG, random_tensors(3), engine="openvino", precision="float32")
    expected = own(pixels(1))[0]
    for _ in range(engine_openvino.cores()):
        with suppress(KeyboardInterrupt), own._one.take() as requests:  # type: ignore[attr-defined]
            requests[0].start_async({0: pixels(1, seed=1)})
            raise KeyboardInterrupt
    for _ in range(engine_openvino.cores()):
        np.testing.assert_array_equal(own(pixels(1))[0], expected)
    for _ in range(engine_openvino.cores()):  # whose requests say once more that they failed
        with own._one.take() as requests:  # type: ignore[attr-defined]
            requests[0].start_async({0: pixels(1, seed=1)})
            requests[0].cancel()
    for _ in range(2 * engine_openvino.cores()):
        np.testing.assert_array_equal(own(pixels(1))[0], expected)


@pytest.mark.slow
def test_several_streams_answer_as_one_does(
    opened: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine of one core there is one stream only, here are three."""
    monkeypatch.setattr(engine_openvino, "cores", lambda: 3)
    own = open_engine(CONFIG, random_tensors(3), engine="openvino", precision="float32")
    batch = pixels(20)
    expected = opened["openvino"](batch)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(own, [batch] * 4):
            np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
            np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


def test_one_image_has_all_cores_also_after_many_had_one_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_openvino, "cores", lambda: 2)
    own: Any = open_engine(CONFIG, random_tensors(3), engine="openvino", precision="float32")
    before = own(pixels(1))
    own(pixels(8))
    monkeypatch.setattr(own._many, "take", lambda: pytest.fail("computed by one core"))
    for found, expected in zip(own(pixels(1)), before, strict=True):
        np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------- the choice


def test_the_fastest_engine_that_is_installed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_engine(CONFIG, random_tensors(3)).name == "openvino"
    missing = {"openvino"}
    real = engine_openvino.require_extra

    def require(module: str, extra: str) -> Any:
        if module in missing:
            raise MissingExtraError(module)
        return real(module, extra)

    for name in ("engine_openvino", "engine_onnx"):
        monkeypatch.setattr(f"chestxray_covid.{name}.require_extra", require)
    assert open_engine(CONFIG, random_tensors(3)).name == "onnx"
    missing.add("onnxruntime")
    assert open_engine(CONFIG, random_tensors(3)).name == "torch"
    with pytest.raises(MissingExtraError, match="openvino"):
        open_engine(CONFIG, random_tensors(3), engine="openvino")
    monkeypatch.setitem(sys.modules, "torch", None)  # as in a program that was frozen without it
    with pytest.raises(MissingExtraError, match="openvino; onnxruntime; torch cannot be imported"):
        open_engine(CONFIG, random_tensors(3))


@pytest.mark.parametrize(
    "said",
    [
        MemoryError(),
        RuntimeError("thread: Resource temporarily unavailable"),
        Exception("std::bad_alloc"),  # ONNX Runtime's are of no narrower kind
    ],
)
@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_memory_that_an_engine_does_not_get_is_told_from_a_missing_one(
    monkeypatch: pytest.MonkeyPatch, said: Exception, precision: str
) -> None:
    def lacking(*_: Any, **__: Any) -> Any:
        raise said

    monkeypatch.setattr(engine_openvino, "OpenVinoEngine", lacking)
    with pytest.raises(ResourceError, match=r"Engine openvino: the machine, or a limit .*again"):
        open_engine(CONFIG, random_tensors(3), precision=precision, int8=Int8(largest={}))


class Lacking:
    """An engine that fails with what it is given."""

    name, precision, calls = "openvino", "float32", 1

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, pixels: Any) -> Any:
        raise self.error


@pytest.mark.parametrize(
    "said",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: Error code 12 (Cannot allocate memory)"),
        RuntimeError("Exception from core.cpp:217: Resource temporarily unavailable"),
        Exception("Failed to allocate memory for requested buffer of size 802816"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    ],
)
def test_memory_that_runs_out_while_an_engine_computes_is_said_to_have(
    tmp_path: Path, said: Exception
) -> None:
    own = Classifier(CONFIG, random_tensors(3), engine="torch")
    own.engine = Lacking(said)
    Image.new("L", (64, 64), 90).save(tmp_path / "a.png")
    for ask in (own.predict, own.predict_proba, lambda one: list(own.predict_stream([one] * 3))):
        with pytest.raises(ResourceError, match=r"Engine openvino: the machine, or .*again"):
            ask(tmp_path / "a.png")
    own.engine = Lacking(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        own.predict(tmp_path / "a.png")


@pytest.mark.parametrize("method", ["predict_proba", "predict_stream"])
def test_memory_that_a_batch_does_not_get_is_said_to_have_run_out(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    own = Classifier(CONFIG, random_tensors(3), engine="torch")
    pixels = np.broadcast_to(np.uint8(0), (1, 1 << 30, 1 << 30))  # four are half of all addresses
    found = pixels, ImageFacts(width_px=1 << 30, height_px=1 << 30)
    monkeypatch.setattr(classifier, "read", lambda *_: found)
    with pytest.raises(ResourceError, match=r"A batch of 4 images: the machine, .*smaller batches"):
        list(getattr(own, method)([Image.new("L", (64, 64))] * 4, batch_size=4))


def test_a_frozen_program_is_told_to_take_a_package_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(MissingExtraError, match=r"missing_one cannot .*with --collect"):
        require_extra("missing_one", "dicom")


def test_a_device_other_than_the_cpu_means_torch() -> None:
    assert open_engine(CONFIG, random_tensors(3), device="cpu:0").name == "torch"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="where 0 is a device")
@pytest.mark.parametrize("device", [0, ""])
def test_what_is_no_device_does_not_mean_the_cpu(device: Any) -> None:
    with pytest.raises(ValueError, match=f"device {device!r} cannot be used: .* Use 'cpu'"):
        open_engine(CONFIG, random_tensors(3), device=device)


@pytest.mark.slow
def test_lower_precision_is_taken_only_for_weights_that_keep_their_probabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = tmp_path / "engines.json"
    monkeypatch.setattr(engines, "_JUDGED", judged)
    monkeypatch.setattr(engine_openvino, "native_precision", lambda: "bfloat16")
    digest = "0" * 64
    config = ModelConfig(
        classes=CONFIG.classes, preprocess=CONFIG.preprocess, weights_sha256=digest
    )

    def chosen(rows: dict[str, Any]) -> str:
        judged.write_text(json.dumps({digest: rows}))
        return open_engine(config, random_tensors(3)).precision

    assert chosen({}) == "float32"
    assert chosen({"openvino-bfloat16": KEPT}) == "bfloat16"
    assert chosen({"openvino-bfloat16": KEPT | {"p99": 0.0101}}) == "float32"
    assert chosen({"torch-bfloat16": KEPT}) == "float32"
    monkeypatch.setattr(engine_openvino, "native_precision", lambda: "float32")
    assert chosen({"openvino-bfloat16": KEPT}) == "float32", "not native"


@pytest.mark.slow
@pytest.mark.parametrize(("own", "other"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_copy_computes_in_the_same_precision_where_another_is_faster(
    own: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_openvino, "native_precision", lambda: own)
    clf = Classifier.from_pretrained(engine="openvino")
    monkeypatch.setattr(engine_openvino, "native_precision", lambda: other)
    copy = pickle.loads(pickle.dumps(clf))  # noqa: S301 - our own bytes
    assert [clf.engine.precision, copy.engine.precision] == [own, own]


@pytest.mark.slow
def test_what_is_known_of_the_bundled_weights_is_not_taken_for_known_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_openvino, "native_precision", lambda: "bfloat16")
    config, tensors = load_checkpoint(resolve(None))
    other = {**tensors, "classifier.bias": tensors["classifier.bias"] + np.float32(1)}
    options = {"engine": "openvino"}
    assert Classifier(config, tensors, **options).engine.precision == "bfloat16"
    some = Classifier(config, tensors, classes=config.classes[:2], **options)
    assert some.engine.precision == "bfloat16"
    assert Classifier(config, other, **options).engine.precision == "float32"
    some = Classifier(config, other, classes=config.classes[:2], **options)
    assert some.engine.precision == "float32"


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({"p99": 0.011}, False),
        ({"largest": 0.031}, False),
        ({"auroc_change": 0.0021}, False),
        ({"auroc_change": -0.0021}, False),
        ({"p99": float("nan")}, False),
    ],
)
def test_probabilities_are_kept_within_the_limits_of_the_docs(
    change: dict[str, float], kept: bool
) -> None:
    assert keeps_probabilities(**(KEPT | change)) is kept


def test_the_bundled_models_were_compared_on_five_hundred_radiographs() -> None:
    """If this fails after new weights: python recipes/judge_engines.py --data DATA."""
    place = importlib.resources.files("chestxray_covid") / "weights" / "engines.json"
    judged = json.loads(place.read_text())
    for config in bundled_models().values():
        rows = judged[config.weights_sha256]
        assert {row["images"] for row in rows.values()} == {500}
        assert keeps_probabilities(**rows["openvino-bfloat16"])


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_the_command_line_offers_every_engine_and_precision(command: str) -> None:
    offered = {p.name: p.type for p in main.commands[command].params}
    for name, known in (("engine", ENGINES), ("precision", PRECISIONS)):
        kind = offered[name]
        assert isinstance(kind, click.Choice)
        assert tuple(kind.choices) == known


# ---------------------------------------------------------------- what is refused


@pytest.mark.slow
def test_files_that_cannot_be_read_in_a_zip_archive_say_so(tmp_path: Path) -> None:
    package = Path(str(importlib.resources.files("chestxray_covid")))
    archive = tmp_path / "package.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in package.rglob("*.py"):
            packed.write(path, path.relative_to(package.parent))
    code = """
import sys

sys.path.insert(0, sys.argv[1])
import chestxray_covid as c

assert c.__file__.startswith(sys.argv[1]), c.__file__
for opened in (
    c.Classifier.from_pretrained,
    lambda: c.Classifier.from_pretrained(sys.argv[2]),  # whose gate looks at lungs
    lambda: c.Classifier.from_pretrained(sys.argv[3], engine="openvino"),
    lambda: c.segment(sys.argv[4]),
):
    try:
        opened()
    except c.CheckpointError as error:
        print(error)

from chestxray_covid.cli import main

main(["models"])
"""
    image = tmp_path / "image.png"
    Image.fromarray(pixels()[0, 0]).save(image)
    save_checkpoint(tmp_path / "own", CONFIG, random_tensors(3))
    given = archive, resolve(), tmp_path / "own", image
    command = [sys.executable, "-c", code, *map(str, given)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = ("densenet121-v1", "lungs.json", "engines.json", "lungs.", "no bundled model")
    for line, name in zip(found, names, strict=True):
        assert name in line
        assert "not into a zip archive; in a program that PyInstaller made" in line


@pytest.mark.parametrize("engine", ["", "Torch", "tensorrt", "os.system", None])
def test_an_unknown_engine_is_refused(engine: Any) -> None:
    with pytest.raises(ValueError, match=r"engine must be one of \('auto', 'openvino', 'onnx', "):
        open_engine(CONFIG, random_tensors(3), engine=engine)


@pytest.mark.parametrize("precision", ["", "int4", "half", None])
def test_an_unknown_precision_is_refused(precision: Any) -> None:
    with pytest.raises(ValueError, match=r"precision must be one of \('auto', 'float32', "):
        open_engine(CONFIG, random_tensors(3), precision=precision)


@pytest.mark.parametrize(
    "options",
    [
        {"engine": "openvino", "device": "cuda"},
        {"engine": "onnx", "precision": "bfloat16"},
        {"engine": "openvino", "precision": "float16"},
    ],
)
def test_what_an_engine_does_not_do_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"does not compute .*on device .* use the CPU alone"):
        open_engine(CONFIG, random_tensors(3), **options)


@pytest.mark.parametrize("device", ["nonsense", "cpu:x", "cuda:99", "cuda:-2", "xpu:7", "meta"])
@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_device_that_is_not_there_is_refused(device: str, precision: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used: .* Use 'cpu'"):
        open_engine(CONFIG, random_tensors(3), device=device, precision=precision)


def test_weights_of_other_classes_than_the_config_names_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"classifier.weight has shape \(2, 1024\), expected"):
        open_engine(CONFIG, random_tensors(2))


@pytest.mark.parametrize("engine", ["openvino", "onnx", "torch"])
def test_a_variance_below_zero_is_refused_by_every_engine(engine: str) -> None:
    tensors = random_tensors(3)
    name = "features.denseblock2.denselayer3.norm1.running_var"
    tensors[name][5] = -1
    with pytest.raises(CheckpointError, match=f"{name} has a negative variance"):
        open_engine(CONFIG, tensors, engine=engine)
    tensors[name][5], tensors[name.replace("running_var", "weight")][7] = 1, 3e38
    with pytest.raises(CheckpointError, match=r"overflow: .*denselayer3\.norm1"):
        open_engine(CONFIG, tensors, engine=engine)


@pytest.mark.parametrize("std", [1e-310, 1e-4, 0.0, float("nan")])
def test_a_deviation_that_pixels_cannot_be_divided_by_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match=r"std must be a fraction of white in \[0\.001, 1\]"):
        Preprocess(std=std)
    with pytest.raises(ConfigError, match="preprocess is impossible: std must be"):
        Preprocess.from_dict(Preprocess().to_dict() | {"std": std})


def test_weights_that_lack_a_tensor_are_refused() -> None:
    tensors = random_tensors(3)
    del tensors["features.conv0.weight"]
    with pytest.raises(CheckpointError, match="tensors is no DenseNet-121 with 3 classes: missing"):
        open_engine(CONFIG, tensors)


def test_onnx_opens_a_session_of_its_own_in_another_process(opened: dict[str, Engine]) -> None:
    engine: Any = opened["onnx"]
    before, session = engine(pixels())[0], engine._session
    engine._process = -1  # as a child finds it, whose number is another
    assert np.array_equal(engine(pixels())[0], before)
    assert engine._session is not session
    assert engine._process == os.getpid()


def test_importing_onnx_runtime_leaves_the_environment_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = engine_onnx.import_onnxruntime()
    silence = "ORT_DISABLE_TELEMETRY"
    monkeypatch.setenv(silence, "0")  # of somebody who wants it
    assert engine_onnx.import_onnxruntime() is known
    assert os.environ[silence] == "0"
    monkeypatch.delenv(silence)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    assert engine_onnx.import_onnxruntime().__version__ == known.__version__
    assert silence not in os.environ
