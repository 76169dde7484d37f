"""Small ONNX graphs, written as a test needs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str | None]


def value(name: str, shape: Shape, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Any:
    name = attributes.pop("name", f"{operator}_{outputs[0]}")
    return helper.make_node(operator, inputs, outputs, name=name, **attributes)


def graph(
    nodes: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    *,
    weights: dict[str, Any] | None = None,
    opset: int = 17,
    domains: Sequence[tuple[str, int]] = (),
    functions: Sequence[Any] = (),
) -> Any:
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()]
    body = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(*domain) for domain in domains)]
    return helper.make_model(body, opset_imports=opsets, ir_version=9, functions=list(functions))


def write(path: Path, model: Any) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def relu(path: Path, shape: Shape = ("batch", 4), *, opset: int = 17) -> Path:
    """Write y = max(x, 0)."""
    return write(path, graph([node("Relu", ["x"], ["y"])], [value("x", shape)], [value("y", shape)], opset=opset))
