"""Smaller weights in an ONNX graph, with activations as they are: half precision, or blocks of 8 and 4 bits.

Half precision makes the file smaller and nothing faster: ONNX Runtime turns the weights into float32 when it loads the
model, and computes as before. Blocks of 8 or 4 bits stay packed in memory and are multiplied as they are, by ONNX
Runtime's MatMulNBits. Embeddings get 8 bits, with a scale for each column, and are unpacked row by row as they are
looked up.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, Final

import numpy as np

from compiler.targets import UnsupportedModelError

_LEAST_SIZE: Final = 256  # elements; smaller tensors hold epsilons and the like, and no size to speak of
_LARGEST_HALF: Final = 65504.0
_BLOCK: Final = {"int8w": 32, "int4w": 32, "int4w-fine": 16}  # weights that share a scale
_INTEGER_PRODUCTS: Final = 4  # the accuracy level that multiplies 8-bit integers


def halve(model: Any) -> None:
    """Store the graph's large float32 weights in half precision, each with a Cast back to float32.

    A tensor that half precision cannot hold stays as it is.
    """
    import onnx
    from onnx import helper, numpy_helper

    graph = model.graph
    outputs = {value.name for value in graph.output}
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or tensor.name in outputs:
            continue
        array = numpy_helper.to_array(tensor)
        if array.size < _LEAST_SIZE or not np.abs(array).max() <= _LARGEST_HALF:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], name=f"{name}.cast", to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def pack(model: Any, precision: str, *, fine: bool = False) -> Any:
    """Return the graph with the weights of matrix products and embeddings in blocks of 8 or 4 bits.

    Args:
        model: An ONNX model.
        precision: "int8w", or "int4w": 4 bits for products.
        fine: int4w: smaller blocks, each with a zero point.

    Raises:
        UnsupportedModelError: It has no product with constant weights.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    constants = {tensor.name for tensor in model.graph.initializer}
    if not any(node.op_type == "MatMul" and node.input[1] in constants for node in model.graph.node):
        first = model.graph.node[0]
        raise UnsupportedModelError(
            f"{precision} packs the weights of MatMul, and the model has none with constant weights "
            f"(its first operator is {first.op_type} {first.name!r})",
            hint="use int8, or target openvino, which packs the weights of convolutions too",
        )
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    config = DefaultWeightOnlyQuantConfig(
        block_size=_BLOCK[f"{precision}-fine" if fine else precision],
        is_symmetric=not fine,
        accuracy_level=_INTEGER_PRODUCTS,
        bits=8 if precision == "int8w" else 4,
        op_types_to_quantize=("MatMul",),
    )
    quantizer = MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    packed = quantizer.model.model
    pack_embeddings(packed.graph)
    return packed


def pack_embeddings(graph: Any) -> None:
    """Store tables of float32 rows that are looked up, and used for nothing else, in 8 bits."""
    import onnx
    from onnx import helper, numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    outputs = {value.name for value in graph.output}
    uses = Counter(name for node in graph.node for name in node.input)
    nodes = []
    for node in graph.node:
        nodes.append(node)
        table = tensors.get(node.input[0]) if node.op_type == "Gather" else None
        by_row = all(attribute.i == 0 for attribute in node.attribute if attribute.name == "axis")
        if table is None or not by_row or len(table.dims) != 2 or uses[table.name] > 1 or node.output[0] in outputs:
            continue
        array = numpy_helper.to_array(table)
        if array.size < _LEAST_SIZE or not np.isfinite(array).all():
            continue
        scale = np.maximum(np.abs(array).max(axis=0) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        name, looked_up = table.name, node.output[0]
        table.CopyFrom(numpy_helper.from_array(np.rint(array / scale).astype(np.int8), name))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
        node.output[0] = f"{looked_up}.packed"
        nodes.append(
            helper.make_node(
                "DequantizeLinear", [node.output[0], f"{name}.scale"], [looked_up], name=f"{name}.unpack", axis=-1
            )
        )
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]  # it says that what is looked up is float32
