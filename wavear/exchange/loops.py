"""Assemble ONNX graphs: the traced step by itself, and the step inside a `Loop`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def pruned(model: Any, dropped: Sequence[str], defaults: Mapping[str, np.ndarray]) -> Any:
    """Return a copy of an ONNX model without some inputs and outputs, and what only they need.

    Parameters
    ----------
    model : onnx.ModelProto
    dropped : sequence of str
        Inputs and outputs; names that the model lacks are skipped.
    defaults : mapping of arrays by input
        Values of inputs that a caller may omit.
    """
    import onnx

    graph = model.graph
    outputs = [value for value in graph.output if value.name not in dropped]
    needed, nodes = {value.name for value in outputs}, []
    for node in reversed(graph.node):  # sorted: a node stands after those it needs
        if needed & set(node.output):
            needed |= set(node.input)
            nodes.insert(0, node)
    inputs = [value for value in graph.input if value.name not in dropped]
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    weights += _tensors({n: x for n, x in defaults.items() if n not in dropped})
    made = onnx.helper.make_graph(nodes, "step", inputs, outputs, weights)
    return _model_of(made, model)


def block_graph(model: Any, defaults: Mapping[str, np.ndarray], constant_cond: bool) -> Any:
    """Return an ONNX model that runs a step N times.

    Parameters
    ----------
    model : onnx.ModelProto
        Step and draw: inputs uniform (1,), temperature (1,), cond (1, C) if conditioned, and those
        carried; outputs parameters (1, P), codes (1,), audio (1,), and the next of those carried.
    defaults : mapping of arrays by name
        What is carried from sample to sample, with its values before the first sample.
    constant_cond : bool
        The conditioning is the same for every sample: (1, C, 1).

    Returns
    -------
    onnx.ModelProto
        Inputs uniforms (1, N), temperature (1,), cond (1, C, N or 1), carried; outputs audio and
        codes (1, N), and the next of those carried.
    """
    import onnx
    from onnx import TensorProto, helper

    step = model.graph
    inputs = {value.name: value for value in step.input}
    outputs = {value.name: value for value in step.output}
    carried = [name for name in inputs if name in defaults]
    index = helper.make_tensor_value_info("block.index", TensorProto.INT64, [])
    go = helper.make_tensor_value_info("block.go", TensorProto.BOOL, [])
    go_on = helper.make_tensor_value_info("block.go_on", TensorProto.BOOL, [])
    nodes = [
        helper.make_node("Identity", ["block.go"], ["block.go_on"]),
        helper.make_node("Gather", ["uniforms", "block.index"], ["uniform"], axis=1),
    ]
    outer = [helper.make_tensor_value_info("uniforms", TensorProto.DOUBLE, [1, "N"])]
    given = {"block.one": np.array([1]), "temperature": np.ones(1), **defaults}
    if constant_cond:
        given["block.zero"] = np.array(0)
    if "cond" in inputs:
        width = inputs["cond"].type.tensor_type.shape.dim[1].dim_value
        at, times = ("block.zero", 1) if constant_cond else ("block.index", "N")
        nodes.append(helper.make_node("Gather", ["cond", at], ["cond_now"], axis=2))
        outer.append(helper.make_tensor_value_info("cond", TensorProto.FLOAT, [1, width, times]))
    # The names of the graph around the body must not be defined in the body.
    results = [f"next_{name}" for name in carried]
    inside: dict[str, str] = {
        name: f"{name}_now" for name in ("cond", *carried, *results, "codes", "audio")
    }
    for node in step.node:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.input[:] = [inside.get(name) or name for name in node.input]
        copied.output[:] = [inside.get(name) or name for name in node.output]
        nodes.append(copied)
    body = helper.make_graph(
        nodes,
        "sample",
        [index, go, *(_renamed(inputs[name], inside[name]) for name in carried)],
        [go_on, *(_renamed(outputs[name], inside[name]) for name in (*results, "codes", "audio"))],
    )
    by_time = ["block.codes_by_time", "block.audio_by_time"]
    around = [
        helper.make_node("Shape", ["uniforms"], ["block.shape"]),
        helper.make_node("Gather", ["block.shape", "block.one"], ["block.count"], axis=0),
        helper.make_node("Loop", ["block.count", "", *carried], [*results, *by_time], body=body),
        helper.make_node("Transpose", ["block.codes_by_time"], ["codes"], perm=[1, 0]),
        helper.make_node("Transpose", ["block.audio_by_time"], ["audio"], perm=[1, 0]),
    ]
    made = helper.make_graph(
        around,
        "block",
        [*outer, inputs["temperature"], *(inputs[name] for name in carried)],
        [
            helper.make_tensor_value_info("audio", TensorProto.FLOAT, [1, "N"]),
            helper.make_tensor_value_info("codes", TensorProto.INT64, [1, "N"]),
            *(outputs[name] for name in results),
        ],
        [*step.initializer, *_tensors(given)],
    )
    return _model_of(made, model)


def _model_of(graph: Any, like: Any) -> Any:
    """Return a checked model of a graph, with the operators of another one."""
    import onnx

    model = onnx.helper.make_model(
        graph, opset_imports=like.opset_import, ir_version=like.ir_version, producer_name="wavear"
    )
    onnx.checker.check_model(model)
    return model


def _renamed(value: Any, name: str) -> Any:
    import onnx

    other = onnx.ValueInfoProto()
    other.CopyFrom(value)
    other.name = name
    return other


def _tensors(arrays: Mapping[str, np.ndarray]) -> list[Any]:
    from onnx import numpy_helper

    return [numpy_helper.from_array(np.asarray(x), name) for name, x in arrays.items()]
