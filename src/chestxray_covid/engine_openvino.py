"""The network in OpenVINO, built from its steps without torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from chestxray_covid.errors import require_extra
from chestxray_covid.graph import FEATURES, LOGITS, PIXELS, Network, Step


def openvino_model(network: Network, *, batch: int | None = None) -> Any:
    """Return the network as an ``openvino.Model``: ``pixels`` to ``logits`` and ``features``.

    Args:
        network: From :func:`graph.fold`.
        batch: Images per call; ``None`` leaves it open.

    Raises:
        MissingExtraError: If OpenVINO is not installed.
    """
    ov = require_extra("openvino", "openvino")
    ops = require_extra("openvino.opset13", "openvino")
    shape = [-1 if batch is None else batch, 1, network.size_px, network.size_px]
    pixels = ops.parameter(shape, np.uint8, name=PIXELS)
    made: dict[str, Any] = {PIXELS: ops.convert(pixels, np.float32)}
    for step in network.steps:
        made[step.name] = _rounded(
            ops, step, _node(ops, step, [made[name] for name in step.inputs])
        )
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


def _rounded(ops: Any, step: Step, made: Any) -> Any:
    """Return the result, rounded to 256 levels if the step has a range."""
    if step.range is None:
        return made
    ends = [ops.constant(np.float32(end)) for end in step.range] * 2
    return ops.fake_quantize(made, *ends, levels=256)


def _convolution(ops: Any, step: Step, value: Any, weight: Any) -> Any:
    pads = [step.padding, step.padding]
    if step.fill:  # the operation itself pads with 0 alone
        edges = np.array([0, 0, *pads])
        value = ops.pad(value, edges, edges, "constant", np.float32(step.fill))
        pads = [0, 0]
    stride = [step.stride, step.stride]
    name = f"{step.name}.sum"
    return ops.convolution(value, weight, stride, pads, pads, [1, 1], name=name)
