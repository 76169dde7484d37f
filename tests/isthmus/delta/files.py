"""Weight files whose tensors moved as fine-tuning moves them."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Tensors = Mapping[str, NDArray[np.generic]]


def tuned(
    rng: np.random.Generator, shape: tuple[int, int], *, rank: int, noise: float
) -> tuple[NDArray[np.float32], ...]:
    """Return weights before and after: a change of low rank and some noise."""
    old = rng.normal(size=shape) * 0.05
    change = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1])) * 1e-3
    return old.astype(np.float32), (old + change + rng.normal(size=shape) * noise).astype(np.float32)


def safetensors(tensors: Tensors) -> bytes:
    """Return a safetensors file."""
    names = {"int8": "I8", "uint8": "U8", "int16": "I16", "int32": "I32", "float16": "F16", "float32": "F32"}
    header: dict[str, object] = {}
    body = b""
    for name, tensor in tensors.items():
        data = tensor.tobytes()
        shape = list(tensor.shape)
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": names[tensor.dtype.name], "shape": shape, "data_offsets": offsets}
        body += data
    packed = json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed + body


def onnx_model(tensors: Tensors) -> bytes:
    """Return an ONNX model that holds the tensors, the first one as a constant of a node."""
    first, *others = tensors.items()
    constant = helper.make_node("Constant", [], [first[0]], value=numpy_helper.from_array(np.asarray(first[1])))
    initializers = [numpy_helper.from_array(np.asarray(tensor), name) for name, tensor in others]
    output = helper.make_tensor_value_info(first[0], onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph([constant], "graph", [], [output], initializers)
    return helper.make_model(graph).SerializeToString()
