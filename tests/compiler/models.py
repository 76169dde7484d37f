"""Tiny real models and data that the compiler's tests share: an encoder with attention, a CNN, and labelled samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

Weights = dict[str, np.ndarray[Any, Any]]
TOKENS, WORDS, WIDTH, HEADS, CLASSES = 8, 40, 16, 2, 3


def encoder_weights(seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)

    def draw(*shape: int, scale: float = 0.3) -> np.ndarray[Any, Any]:
        return rng.normal(0, scale, shape).astype(np.float32)

    square = {name: draw(WIDTH, WIDTH) for name in ("query", "key", "value", "out")}
    square |= {name: square[name] * np.float32(0.3) for name in ("query", "key")}  # lest attention is all or nothing
    biases = {f"{name}_bias": draw(WIDTH, scale=0.1) for name in square}
    norm = {"norm_scale": 1 + draw(WIDTH, scale=0.1), "norm_bias": draw(WIDTH, scale=0.1)}
    head = {"head": draw(WIDTH, CLASSES, scale=1.0), "head_bias": draw(CLASSES, scale=0.1)}
    return {"words": draw(WORDS, WIDTH, scale=1.0), **square, **biases, **norm, **head}


def nudged(weights: Weights, amount: float, *, seed: int = 1, only: tuple[str, ...] = ()) -> Weights:
    """Return the weights after a little training, as it were; `only` names those that move."""
    rng = np.random.default_rng(seed)
    return {
        name: array + rng.normal(0, amount, array.shape).astype(np.float32) if not only or name in only else array
        for name, array in weights.items()
    }


def write_encoder(
    path: Path, weights: Weights, *, batch: str | int = "batch", output: str = "logits", mean: bool = False
) -> Path:
    node = helper.make_node
    nodes = [node("Gather", ["words", "tokens"], ["embedded"], name="embed")]
    for name, axes in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
        nodes += [
            node("MatMul", ["embedded", name], [f"{name}_product"], name=f"{name}_matmul"),
            node("Add", [f"{name}_product", f"{name}_bias"], [f"{name}s"], name=f"{name}_add"),
            node("Reshape", [f"{name}s", "by_head"], [f"{name}_heads"], name=f"{name}_reshape"),
            node("Transpose", [f"{name}_heads"], [f"{name}_turned"], name=f"{name}_turn", perm=axes),
        ]
    nodes += [
        node("MatMul", ["query_turned", "key_turned"], ["scores"], name="score"),
        node("Softmax", ["scores"], ["attention"], name="softmax", axis=-1),
        node("MatMul", ["attention", "value_turned"], ["mixed_heads"], name="mix"),
        node("Transpose", ["mixed_heads"], ["mixed_turned"], name="mixed_turn", perm=[0, 2, 1, 3]),
        node("Reshape", ["mixed_turned", "joined"], ["mixed"], name="mixed_reshape"),
        node("MatMul", ["mixed", "out"], ["out_product"], name="out_matmul"),
        node("Add", ["out_product", "out_bias"], ["outs"], name="out_add"),
        node("Add", ["embedded", "outs"], ["residual"], name="residual_add"),
        node("LayerNormalization", ["residual", "norm_scale", "norm_bias"], ["normed"], name="norm", axis=-1),
        # Not the mean by default: in INT8, OpenVINO 2026.4 fuses smoothing into it and gets rows but the first wrong.
        node("ReduceMean", ["normed"], ["pooled"], name="pool", axes=[1], keepdims=0)
        if mean
        else node("Gather", ["normed", "first"], ["pooled"], name="pool", axis=1),
        node("MatMul", ["pooled", "head"], ["head_product"], name="head_matmul"),
        node("Add", ["head_product", "head_bias"], [output], name="head_add"),
    ]
    inputs = [helper.make_tensor_value_info("tokens", TensorProto.INT64, [batch, TOKENS])]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, CLASSES])]
    shapes = {"by_head": np.array([0, TOKENS, HEADS, WIDTH // HEADS]), "joined": np.array([0, TOKENS, WIDTH])}
    shapes |= {"first": np.array(0)}
    return _write(path, nodes, inputs, outputs, weights | shapes)


def write_cnn(path: Path, seed: int = 0, *, scale: float = 0.4, outlier: float = 1.0) -> Path:
    """Write a small CNN; `outlier` makes one channel so much larger, without changing what the model computes."""
    rng = np.random.default_rng(seed)
    weights = {
        "kernel": rng.normal(0, scale, (4, 1, 3, 3)).astype(np.float32),
        "kernel_bias": rng.normal(0, 0.1, 4).astype(np.float32),
        "head": rng.normal(0, 0.5, (4 * 36, CLASSES)).astype(np.float32),
    }
    for name, part in (("kernel", slice(1)), ("kernel_bias", slice(1))):
        weights[name][part] *= np.float32(outlier)
    weights["head"][:36] /= np.float32(outlier)
    node = helper.make_node
    nodes = [
        node("Conv", ["image", "kernel", "kernel_bias"], ["features"], name="conv"),
        node("Relu", ["features"], ["active"], name="relu"),
        node("Flatten", ["active"], ["flat"], name="flatten"),
        node("MatMul", ["flat", "head"], ["logits"], name="head_matmul"),
    ]
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])]
    return _write(path, nodes, inputs, outputs, weights)


def _write(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: Weights) -> Path:
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def tokens(count: int, seed: int = 7) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, WORDS, (count, TOKENS), dtype=np.int64)


def write_samples(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]]) -> Path:
    save_file(dict(tensors), path)
    return path
