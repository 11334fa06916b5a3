"""The network in ONNX, built from its steps without torch."""

from __future__ import annotations

import os
import sys
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

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
from chestxray_covid.processor import cores
from chestxray_covid.tensors import FEATURE_COUNT

#: Opset 17 came with ONNX 1.12 in 2022; every runtime of today reads it.
OPSET, _IR_VERSION = 17, 8
_PROVIDERS = ["CPUExecutionProvider"]


#: Read once, when ONNX Runtime is imported.
_SILENCE = "ORT_DISABLE_TELEMETRY"


def import_onnxruntime() -> Any:
    """Return the package ``onnxruntime``, imported so that it tells nobody.

    From 1.29 on, ONNX Runtime reports its use to its makers unless this variable is set, and leaves
    an identifier in the home folder; its thread makes the end of a forked process hang, too. Who
    has set the variable has decided; where it was imported before, the importer has.

    Raises:
        MissingExtraError: If onnxruntime is not installed.
    """
    if "onnxruntime" in sys.modules or _SILENCE in os.environ:
        return require_extra("onnxruntime", "onnx")
    os.environ[_SILENCE] = "1"
    try:
        return require_extra("onnxruntime", "onnx")
    finally:
        os.environ.pop(_SILENCE, None)


def onnx_model(network: Network, *, batch: int | None = None) -> Any:
    """Return the network as an ``onnx.ModelProto``: ``pixels`` to ``logits`` and ``features``.

    Args:
        network: From :func:`graph.fold`.
        batch: Images per call; ``None`` leaves it open.

    Raises:
        MissingExtraError: If onnx is not installed.
    """
    onnx = require_extra("onnx", "onnx")
    helper = require_extra("onnx.helper", "onnx")
    builder = _Builder(onnx, helper)
    count: int | str = "N" if batch is None else batch
    side, kind = network.size_px, onnx.TensorProto
    builder.node("Cast", [PIXELS], f"{PIXELS}.float", to=kind.FLOAT)
    for step in network.steps:
        builder.add(step)
    graph = helper.make_graph(
        builder.nodes,
        "densenet121",
        [helper.make_tensor_value_info(PIXELS, kind.UINT8, [count, 1, side, side])],
        [
            helper.make_tensor_value_info(name, kind.FLOAT, [count, width])
            for name, width in ((LOGITS, network.num_classes), (FEATURES, FEATURE_COUNT))
        ],
        builder.constants,
    )
    return helper.make_model(
        graph,
        producer_name="chestxray-covid",
        producer_version=__version__,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
    )


class _Builder:
    """Collects nodes and constants; the result of a step is named like it."""

    def __init__(self, onnx: Any, helper: Any) -> None:
        self._to_tensor = onnx.numpy_helper.from_array
        self._make_node = helper.make_node
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, step: Step) -> None:
        inputs = [f"{PIXELS}.float" if name == PIXELS else name for name in step.inputs]
        made = f"{step.name}.linear" if step.relu else step.name
        if step.op == "concat":
            self.node("Concat", inputs, made, axis=1)
        elif step.op == "max_pool":
            window = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
            self.node("MaxPool", inputs, made, **window)
        elif step.op == "average_pool":
            self.node("AveragePool", inputs, made, kernel_shape=[2, 2], strides=[2, 2])
        elif step.op == "global_average":
            self.node("ReduceMean", inputs, made, axes=[2, 3], keepdims=0)
        elif step.op == "affine":
            self.node("Mul", [*inputs, self._constant(step, "weight")], f"{made}.scaled")
            self.node("Add", [f"{made}.scaled", self._constant(step, "bias")], made)
        else:
            self._weighted(step, inputs, made)
        if step.relu:
            self.node("Relu", [made], step.name)

    def node(self, op: str, inputs: list[str], made: str, **attributes: Any) -> None:
        self.nodes.append(self._make_node(op, inputs, [made], name=made, **attributes))

    def _weighted(self, step: Step, inputs: list[str], made: str) -> None:
        bias = [] if step.bias is None else [self._constant(step, "bias")]
        operands = [*inputs, self._constant(step, "weight"), *bias]
        if step.op == "linear":
            self.node("Gemm", operands, made, transB=1)
            return
        edge = step.padding
        if step.fill:  # the operation itself pads with 0 alone
            pads = np.array([0, 0, edge, edge] * 2, np.int64)
            padding = [self._array(f"{made}.pads", pads)]
            padding.append(self._array(f"{made}.fill", np.array(step.fill, np.float32)))
            self.node("Pad", [*inputs, *padding], f"{made}.padded", mode="constant")
            operands[0], edge = f"{made}.padded", 0
        self.node("Conv", operands, made, strides=[step.stride] * 2, pads=[edge] * 4)

    def _constant(self, step: Step, part: str) -> str:
        return self._array(f"{step.name}.{part}", getattr(step, part))

    def _array(self, name: str, values: Any) -> str:
        self.constants.append(self._to_tensor(values, name))
        return name


#: Those of this process, and of the ones that it was forked from.
_SESSIONS: weakref.WeakSet[Any] = weakref.WeakSet()


def _keep_for_ever() -> None:
    """Spare a forked process the end of sessions, which waits for threads that are not there."""
    kept = np.empty(2, object)
    kept[0], kept[1] = list(_SESSIONS), kept  # a cycle that Python does not see


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_for_ever)


class OnnxEngine:
    """The network in ONNX Runtime on the CPU, in float32; an :class:`engines.Engine`.

    Images are computed one by one, each by all cores, which is as fast as in batches. A process
    that was forked opens a session of its own.

    Args:
        tensors: Weights of a checkpoint.
        preprocess: Its preprocessing.

    Raises:
        MissingExtraError: If onnxruntime is not installed, or onnx where the model must be built.
    """

    name = "onnx"
    precision = "float32"
    calls = 1

    def __init__(self, tensors: Mapping[str, NDArray[Any]], preprocess: Preprocess) -> None:
        self._runtime = import_onnxruntime()
        self._classes = len(tensors["classifier.bias"])
        self._made_of = tensors, preprocess
        self._open()

    def __call__(
        self, pixels: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return ``(N, K)`` logits and ``(N, 1024)`` features of ``(N, 1, S, S)`` pixels."""
        if self._process != os.getpid():
            self._open()
        logits = np.empty((len(pixels), self._classes), np.float32)
        features = np.empty((len(pixels), FEATURE_COUNT), np.float32)
        for row in range(len(pixels)):
            found = self._session.run([LOGITS, FEATURES], {PIXELS: pixels[row : row + 1]})
            logits[row], features[row] = found[0][0], found[1][0]
        return logits, features

    def _open(self) -> None:
        self._session = self._begun(*self._made_of)
        _SESSIONS.add(self._session)
        self._process = os.getpid()  # last: whoever sees it takes the session of this process

    def _begun(self, tensors: Mapping[str, NDArray[Any]], preprocess: Preprocess) -> Any:
        """Return a session of the optimised model, from the cache if it is there."""
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = cores()
        begin = partial(self._runtime.InferenceSession, sess_options=options, providers=_PROVIDERS)
        made_with = [__version__, self._runtime.__version__]
        key = ("onnx", digest(tensors, preprocess), preprocess.size_px, made_with)
        kept = load_compiled(*key)
        if kept is not None:
            # Its errors have no base of their own.
            with suppress(Exception):  # of a build that calls itself the same, but is another
                return begin(kept)
        return begin(_optimised(self._runtime, tensors, preprocess, key))


def _optimised(
    runtime: Any,
    tensors: Mapping[str, NDArray[Any]],
    preprocess: Preprocess,
    key: tuple[object, ...],
) -> bytes:
    """Return the model after what ONNX Runtime makes of it, and keep it under the key.

    Without the last level of its optimisation, which depends on the processor. As it was built,
    where nothing can be written: ONNX Runtime gives what it made as a file alone.
    """
    errors = runtime.capi.onnxruntime_pybind11_state
    model: bytes = onnx_model(fold(tensors, preprocess), batch=1).SerializeToString()
    try:
        with tempfile.TemporaryDirectory() as folder:
            options = runtime.SessionOptions()
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            options.optimized_model_filepath = str(Path(folder, "model.onnx"))
            runtime.InferenceSession(model, options, _PROVIDERS)
            made = Path(options.optimized_model_filepath).read_bytes()
    except (OSError, errors.Fail, errors.InvalidProtobuf):
        return model
    keep_compiled(made, *key)
    return made
