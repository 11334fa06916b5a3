"""The network in OpenVINO, built from its steps without torch."""

from __future__ import annotations

import io
import os
import queue
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from chestxray_covid._version import __version__
from chestxray_covid.compiled import keep_compiled, load_compiled
from chestxray_covid.errors import require_extra
from chestxray_covid.graph import (
    FEATURES,
    LOGITS,
    PIXELS,
    Network,
    Step,
    digest,
    fold,
)
from chestxray_covid.image import Preprocess
from chestxray_covid.int8 import Int8
from chestxray_covid.processor import cores, quota, slow_bfloat16
from chestxray_covid.tensors import FEATURE_COUNT

#: Our names of precisions → OpenVINO's.
_HINTS = {"float32": "f32", "bfloat16": "bf16"}
#: What is not in int8 stays in float32: it is little, and changing between the two costs more.
_INT8_HINT = "f32"
#: From so many images in one call on a second copy of the model pays, which takes 0.3 s to make.
_MANY = 8
#: Each stream has its own activations, some 20 MB.
_MAX_STREAMS = 16
_CORE_LOCK = threading.Lock()


def import_openvino() -> Any:
    """Return the package ``openvino``, imported so that it tells nobody.

    OpenVINO reports every import to its makers, unless the user has run ``opt_in_out --opt_out``,
    and leaves an identifier in the home folder. It does neither if the package that does it cannot
    be imported, which OpenVINO does not insist on. Where it was imported before, that is the
    importer's affair.

    Raises:
        MissingExtraError: If OpenVINO is not installed.
    """
    reporter = "openvino_telemetry"
    if "openvino" in sys.modules or reporter in sys.modules:
        return require_extra("openvino", "openvino")
    sys.modules[reporter] = cast(ModuleType, None)  # importing it fails
    try:
        return require_extra("openvino", "openvino")
    finally:
        del sys.modules[reporter]


def openvino_model(network: Network, *, batch: int | None = None) -> Any:
    """Return the network as an ``openvino.Model``: ``pixels`` to ``logits`` and ``features``.

    Args:
        network: From :func:`graph.fold`.
        batch: Images per call; ``None`` leaves it open.

    Raises:
        MissingExtraError: If OpenVINO is not installed.
    """
    ov = import_openvino()
    ops = require_extra("openvino.opset13", "openvino")
    shape = [-1 if batch is None else batch, 1, network.size_px, network.size_px]
    pixels = ops.parameter(shape, np.uint8, name=PIXELS)
    made: dict[str, Any] = {PIXELS: ops.convert(pixels, np.float32)}
    for step in network.steps:
        result = _node(ops, step, [made[name] for name in step.inputs])
        made[step.name] = _rounded(ops, result) if step.rounded else result
    results = []
    for name in (LOGITS, FEATURES):
        made[name].output(0).get_tensor().set_names({name})
        results.append(ops.result(made[name]))
    pixels.output(0).get_tensor().set_names({PIXELS})
    return ov.Model(results, [pixels], "densenet121")


def _node(ops: Any, step: Step, inputs: list[Any]) -> Any:
    """Return a step's result as a node, named like the step."""
    if step.op == "concat":
        return ops.concat(inputs, axis=1, name=step.name)
    if step.op == "max_pool":
        made = ops.max_pool(inputs[0], [2, 2], [1, 1], [1, 1], [1, 1], [3, 3], name=step.name)
        return made.output(0)
    if step.op == "average_pool":
        none = [0, 0]
        return ops.avg_pool(inputs[0], [2, 2], none, none, [2, 2], False, name=step.name)
    if step.op == "global_average":
        return ops.reduce_mean(inputs[0], np.array([2, 3]), keep_dims=False, name=step.name)
    weight = ops.constant(step.weight, name=f"{step.name}.weight")
    if step.scale is not None:
        weight = ops.multiply(ops.convert(weight, np.float32), ops.constant(step.scale))
    if step.op == "affine":
        made = ops.multiply(inputs[0], weight)
    elif step.op == "linear":
        made = ops.matmul(inputs[0], weight, False, True)
    else:
        made = _convolution(ops, step, inputs[0], weight)
    if step.bias is not None:
        shape = (1, -1, 1, 1) if step.op == "convolution" else step.bias.shape
        made = ops.add(made, ops.constant(step.bias.reshape(shape)))
    made = ops.relu(made) if step.relu else made
    made.set_friendly_name(step.name)
    return made


def _rounded(ops: Any, result: Any) -> Any:
    """Return the result, rounded to 256 levels from 0 to 1."""
    ends = [ops.constant(np.float32(end)) for end in (0, 1)] * 2
    return ops.fake_quantize(result, *ends, levels=256)


def _convolution(ops: Any, step: Step, value: Any, weight: Any) -> Any:
    pads = [step.padding, step.padding]
    if step.fill:  # the operation itself pads with 0 alone
        edges = np.array([0, 0, *pads])
        value = ops.pad(value, edges, edges, "constant", np.float32(step.fill))
        pads = [0, 0]
    stride = [step.stride, step.stride]
    name = f"{step.name}.sum"
    return ops.convolution(value, weight, stride, pads, pads, [1, 1], name=name)


class OpenVinoEngine:
    """The network in OpenVINO on the CPU; an :class:`engines.Engine`.

    Every image is a request of its own, so that an answer does not depend on the batch that it is
    asked in. A few images are computed one after the other, each by all cores; for many there is a
    second copy of the compiled model, in which every stream of images has cores for itself. A
    process that was forked compiles its own.

    Args:
        tensors: Weights of a checkpoint.
        preprocess: Its preprocessing.
        precision: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
        int8: For ``"int8"``, its statistics.

    Raises:
        MissingExtraError: If OpenVINO is not installed.
        CheckpointError: If the statistics are those of another network.
    """

    name = "openvino"
    calls = 2

    def __init__(
        self,
        tensors: Mapping[str, NDArray[Any]],
        preprocess: Preprocess,
        *,
        precision: str,
        int8: Int8 | None = None,
    ) -> None:
        self.precision = precision
        self._classes = len(tensors["classifier.bias"])
        self._core = openvino_core()
        self._made_of = tensors, preprocess, int8 or precision
        #: What a forked process has of its parent's: without its threads, so that its end may hang.
        self._of_parents: list[Any] = []
        #: By process: that of a parent may be held by a thread that is not here.
        self._locks: dict[int, threading.Lock] = {}
        self._open()

    def _open(self) -> None:
        compiled, self._model = _compiled(self._core, *self._made_of, self._options(streams=1))
        self._one: _Lanes | None = _Lanes(compiled, requests=1, lanes=cores())
        self._many: _Lanes | None = None
        self._process = os.getpid()  # last: whoever sees it needs no lock

    def __call__(
        self, pixels: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return ``(N, K)`` logits and ``(N, 1024)`` features of ``(N, 1, S, S)`` pixels."""
        if self._process != os.getpid():
            self._open_again()
        pixels = np.ascontiguousarray(pixels)
        logits = np.empty((len(pixels), self._classes), np.float32)
        features = np.empty((len(pixels), FEATURE_COUNT), np.float32)
        with self._lanes(len(pixels)).take() as requests:
            ahead = len(requests)
            for row in range(len(pixels) + ahead):
                request = requests[row % ahead]
                if row - ahead >= 0:
                    request.wait()
                    logits[row - ahead] = request.get_output_tensor(0).data[0]
                    features[row - ahead] = request.get_output_tensor(1).data[0]
                if row < len(pixels):
                    request.start_async({0: pixels[row : row + 1]})
        return logits, features

    def _open_again(self) -> None:
        """Open in a process that was forked, once, whoever asks there at the same time."""
        with self._lock:
            if self._process != os.getpid():
                self._of_parents.append((self._one, self._many))
                self._open()

    @property
    def _lock(self) -> threading.Lock:
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def _lanes(self, count: int) -> _Lanes:
        """Return the copy of the model for so many images, whatever was computed before.

        In int8 the copy for many takes the place of the other: each takes some 0.4 GB.
        """
        one, streams = self._one, min(cores(), _MAX_STREAMS)
        if one is not None and (count < _MANY or streams == 1):
            return one
        if self._many is not None:
            return self._many
        del one  # or it would outlast the one that takes its place
        with self._lock:
            if self._many is None:
                if self.precision == "int8":
                    self._one = None  # before the other comes
                options = self._options(streams=streams)
                copy = self._core.import_model(self._model, "CPU", options)
                self._model = b""
                # Twice as many as are computed, so that no stream ever waits for Python.
                self._many = _Lanes(copy, requests=streams, lanes=self.calls)
        return self._many

    def _options(self, *, streams: int) -> dict[str, Any]:
        limit = quota()  # of which OpenVINO knows nothing
        return {
            **({} if limit is None else {"INFERENCE_NUM_THREADS": limit}),
            "INFERENCE_PRECISION_HINT": _HINTS.get(self.precision, _INT8_HINT),
            "NUM_STREAMS": streams,
            "ENABLE_CPU_PINNING": False,  # the cores are shared with threads that decode
        }


class _Lanes:
    """Requests of a compiled model; every call has a lane of them for itself."""

    def __init__(self, compiled: Any, *, requests: int, lanes: int) -> None:
        self._free: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        for _ in range(lanes):
            self._free.put([compiled.create_infer_request() for _ in range(requests)])

    @contextmanager
    def take(self) -> Iterator[list[Any]]:
        requests = self._free.get()
        try:
            for request in requests:
                with suppress(RuntimeError):  # of the call that it failed
                    request.wait()  # if Ctrl-C ended a call, its request runs on
            yield requests
        finally:
            self._free.put(requests)


def native_precision() -> str:
    """Return the fastest precision that OpenVINO computes in on this processor.

    Raises:
        MissingExtraError: If OpenVINO is not installed.
    """
    hint = openvino_core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
    own = {hint: name for name, hint in _HINTS.items()}.get(hint, "float32")
    return "float32" if own == "bfloat16" and slow_bfloat16() else own


def openvino_core() -> Any:
    """Return the one ``openvino.Core`` of this process, which lasts as long as the process.

    A core gives its thread a stack for signals, and gives the one before back when it goes. Of two
    cores the first to come may be the first to go: the second then gives back a stack that is gone,
    and the next signal, say Ctrl-C, ends the interpreter.

    Raises:
        MissingExtraError: If OpenVINO is not installed.
    """
    with _CORE_LOCK:
        return _core()


@lru_cache(maxsize=1)
def _core() -> Any:
    ov = import_openvino()
    # Two threads that ask for the first data of all wait for each other without end.
    _ = ov.Tensor(ov.Type.u8, ov.Shape([1])).data
    core = ov.Core()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=partial(_keep_for_ever, core))
    return core


def _keep_for_ever(core: Any) -> None:
    """Spare a forked process the end of the core, which waits for threads that are not there."""
    kept = np.empty(2, object)
    kept[0], kept[1] = core, kept  # a cycle that Python does not see: arrays are not collected


def largest_values(
    network: Network, names: Sequence[str], pixels: NDArray[np.uint8]
) -> dict[str, NDArray[np.float32]]:
    """Return the largest value of each channel of some results, over all pixels and images.

    Args:
        network: From :func:`graph.fold`.
        names: Of steps with results ``(1, C, H, W)``.
        pixels: ``(N, 1, S, S)``, at least one image.

    Returns:
        Name → ``(C,)`` float32.

    Raises:
        MissingExtraError: If OpenVINO is not installed.
    """
    model = openvino_model(network, batch=1)
    ops = require_extra("openvino.opset13", "openvino")
    nodes = {node.get_friendly_name(): node for node in model.get_ops()}
    places = np.array([0, 2, 3])
    model.add_results([ops.result(ops.reduce_max(nodes[n], places, False)) for n in names])
    options = {"INFERENCE_PRECISION_HINT": _HINTS["float32"]}
    compiled = openvino_core().compile_model(model, "CPU", options)
    found: list[NDArray[np.float32]] = []
    for image in pixels[:, np.newaxis]:
        own = list(compiled({PIXELS: image}).values())[-len(names) :]
        found = [np.maximum(*pair) for pair in zip(found, own, strict=True)] if found else own
    return dict(zip(names, found, strict=True))


def _compiled(
    core: Any,
    tensors: Mapping[str, NDArray[Any]],
    preprocess: Preprocess,
    precision: str | Int8,
    options: dict[str, Any],
) -> tuple[Any, bytes]:
    """Return the compiled model, from the cache if it is there, and what it can be made of again.

    A copy that was imported cannot be exported.
    """
    version = import_openvino().get_version()
    processor = core.get_property("CPU", "FULL_DEVICE_NAME")
    abilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    made_with = [__version__, version, processor, *abilities]
    kind = precision.digest if isinstance(precision, Int8) else precision
    key = ("openvino", digest(tensors, preprocess), preprocess.size_px, kind, made_with)
    kept = load_compiled(*key)
    if kept is not None:
        try:
            return core.import_model(kept, "CPU", options), kept
        except (RuntimeError, ValueError):
            pass  # of a build that calls itself the same, but is another
    if isinstance(precision, Int8):
        network = precision.apply(fold(tensors, preprocess))
    else:
        network = fold(tensors, preprocess, precision=precision)
    model = openvino_model(network, batch=1)
    compiled = core.compile_model(model, "CPU", options)
    stream = io.BytesIO()
    compiled.export_model(stream)
    keep_compiled(stream.getvalue(), *key)
    return compiled, stream.getvalue()
