"""Small networks with one property each that targets must cope with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
CLASSES = 3


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, list[str | int]]],
    weights: Mapping[str, Array],
    output: Sequence[str | int] = ("batch", CLASSES),
) -> Path:
    """Write a network that ends in "logits"."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, list(output))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def write_loud(path: Path) -> Path:
    """A CNN that hardly looks at its second channel, whose values are a thousand times the first one's."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(0, 0.4, (8, 2, 3, 3))
    kernel[:, 1] *= 1e-5
    depthwise = rng.normal(0, 0.4, (8, 1, 3, 3))
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["features"], name="first"),
        helper.make_node("Relu", ["features"], ["active"], name="relu"),
        helper.make_node("Conv", ["active", "depthwise"], ["channels"], name="depthwise", group=8),
        helper.make_node("Flatten", ["channels"], ["flat"], name="flatten"),
        helper.make_node("MatMul", ["flat", "head"], ["logits"], name="head"),
    ]
    weights = {"kernel": kernel, "depthwise": depthwise, "head": rng.normal(0, 0.5, (128, CLASSES))}
    return write(
        path,
        nodes,
        {"image": (TensorProto.FLOAT, ["batch", 2, 8, 8])},
        {name: array.astype(np.float32) for name, array in weights.items()},
    )


def write_wide(path: Path) -> Path:
    """Products that are wide enough for weights of four bits in groups."""
    rng = np.random.default_rng(0)
    nodes, last = [], "features"
    for layer in range(4):
        nodes += [
            helper.make_node("MatMul", [last, f"weights{layer}"], [f"product{layer}"], name=f"matmul{layer}"),
            helper.make_node("Relu", [f"product{layer}"], [f"active{layer}"], name=f"relu{layer}"),
        ]
        last = f"active{layer}"
    nodes.append(helper.make_node("MatMul", [last, "head"], ["logits"], name="head"))
    weights = {f"weights{layer}": rng.normal(0, 0.1, (128, 128)) for layer in range(4)}
    weights["head"] = rng.normal(0, 0.5, (128, CLASSES))
    return write(
        path,
        nodes,
        {"features": (TensorProto.FLOAT, ["batch", 128])},
        {name: array.astype(np.float32) for name, array in weights.items()},
    )


def loud_images(count: int, seed: int = 1) -> Array:
    images = np.random.default_rng(seed).normal(size=(count, 2, 8, 8))
    images[:, 1] *= 1000
    return images.astype(np.float32)


def write_scaled(path: Path) -> Path:
    """A sequence of any length and an int32 number that is the same for a whole request."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["sequence", "weights"], ["steps"], name="product"),
        helper.make_node("ReduceMean", ["steps"], ["pooled"], name="pool", axes=[1], keepdims=0),
        helper.make_node("Cast", ["scale"], ["factor"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pooled", "factor"], ["logits"], name="scale_mul"),
    ]
    inputs: dict[str, tuple[int, list[str | int]]] = {
        "sequence": (TensorProto.FLOAT, ["batch", "time", 16]),
        "scale": (TensorProto.INT32, []),
    }
    return write(path, nodes, inputs, {"weights": rng.normal(0, 0.5, (16, CLASSES)).astype(np.float32)})


def scaled_samples(count: int, length: int = 5) -> dict[str, Array]:
    rng = np.random.default_rng(2)
    return {
        "sequence": rng.normal(size=(count, length, 16)).astype(np.float32),
        "scale": rng.integers(1, 4, count, dtype=np.int32),
    }
