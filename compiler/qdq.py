"""INT8 for ONNX Runtime: QuantizeLinear and DequantizeLinear around the operators, ranges from samples.

Activations are unsigned and weights signed, per channel: with signed activations ONNX Runtime is two to three times
slower on x86-64. (Without VNNI it adds products of pairs up in 16 bits, which can saturate: the golden answers that a
device checks before it serves show it.)

The settings, from the fastest to the gentlest:
    default         ONNX Runtime's own quantizer, smallest and largest value seen. A network with attention has only its
                    convolutions and products quantized: softmax, norm and GELU in 8 bits ruin it (ViT-tiny: cosine 0.84
                    instead of 0.999; MiniLM: 24 % right instead of 72 %). Its embeddings are packed in 8 bits.
    corrected       NNCF's placement, biases corrected, histograms, smoothing for attention; 0-30 % slower
    ends-kept       and the first convolution (without one: the last product) in float32
    depthwise-kept  and the depthwise convolutions in float32
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from onnxruntime import quantization

from compiler.capture import CapturedModel
from compiler.grid import PreviousGrid, TensorGrid
from compiler.onnx_weights import pack_embeddings
from compiler.qdq_grid import keep_grid
from compiler.quantize import SETTINGS, Weighted, as_requests, quantize
from isthmus.errors import InputError
from isthmus.tensors import Array

__all__ = ["SETTINGS", "optimized", "quantized"]
_SAMPLES: Final = 128  # ONNX Runtime's own calibration changes little beyond
_OLDEST: Final = 13  # the opset that has scales per channel
_PRODUCTS: Final = ("Conv", "MatMul", "Gemm")
_ERRORS_ONLY: Final = 3  # ONNX Runtime's logging severity


def quantized(
    model: CapturedModel, samples: Mapping[str, Array], setting: str, previous: PreviousGrid | None = None
) -> tuple[Any, tuple[TensorGrid, ...]]:
    """Return the model in INT8 as an ONNX graph, and how its tensors came out on the grid of the version before.

    Args:
        model: The model; its free axes stay free.
        samples: Typical inputs, one sample per row.
        setting: One of `SETTINGS`.
        previous: The version before, whose grid is kept where it suits; for "default" only.

    Raises:
        InputError: It cannot be quantized, or the setting would be the same as the one before.
        GridError: The grid of the version before cannot be kept at all.
    """
    graph = _prepared(model)
    if setting == "default":
        weights = _constants(graph)
        result = _by_onnxruntime(graph, model, as_requests(model, samples, _SAMPLES))
        if model.attention:
            pack_embeddings(result.graph)
        return result, () if previous is None else tuple(keep_grid(result, weights, previous))
    result = quantize(
        graph, model, samples, weighted=_weighted_operators(graph.graph), setting=setting, per_tensor=True
    )
    _make_activations_unsigned(result.graph)
    return result, ()


def _constants(model: Any) -> dict[str, Array]:
    """Return the graph's constants in full precision, by name."""
    import onnx

    return {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }


def optimized(path: Path, level: Any) -> Any:
    """Return the ONNX graph as ONNX Runtime optimizes it at this level, which says what it may become.

    Raises:
        InputError: ONNX Runtime cannot load it.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.optimized_model_filepath = str(written)
        options.log_severity_level = _ERRORS_ONLY
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class
            raise InputError(f"ONNX Runtime cannot load the model: {' '.join(str(error).split())[:300]}") from error
        return onnx.load(written)


def _prepared(model: CapturedModel) -> Any:
    """Return the graph with constants folded, every node named, and shapes known as far as can be."""
    import onnx

    graph = optimized(model.path, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC)
    del graph.graph.value_info[:]  # shapes from before weights were turned around
    opset = next(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))
    try:
        if opset < _OLDEST:
            graph = onnx.version_converter.convert_version(graph, _OLDEST)
        graph = onnx.shape_inference.infer_shapes(graph)
    except RuntimeError as error:
        raise InputError(f"the model cannot be prepared for INT8: {' '.join(str(error).split())[:300]}") from error
    taken: set[str] = set()
    for place, node in enumerate(graph.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}.{place}"
        taken.add(node.name)
    quantization.quant_utils.add_pre_process_metadata(graph)
    return graph


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # its library has no types
    def __init__(self, requests: list[dict[str, Array]]) -> None:
        self._requests = iter(requests)

    def get_next(self) -> dict[str, Array] | None:  # None is how it ends
        return next(self._requests, None)


def _by_onnxruntime(graph: Any, model: CapturedModel, requests: list[dict[str, Array]]) -> Any:
    import onnx

    with tempfile.TemporaryDirectory() as folder, _quiet():
        written = Path(folder) / "quantized.onnx"
        quantization.quantize_static(
            graph,
            written,
            _Reader(requests),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(_PRODUCTS) if model.attention else None,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return onnx.load(written)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizer's hints out of the log, and make its errors ours: they share no base class."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"ONNX Runtime cannot quantize the model: {' '.join(str(error).split())[:300]}") from error
    finally:
        logging.disable(disabled)


def _weighted_operators(graph: Any) -> list[Weighted]:
    found = []
    for node in graph.node:
        if node.op_type == "Conv":
            groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
            found.append(Weighted(node.name, "depthwise" if groups > 1 else "convolution"))
        elif node.op_type in ("MatMul", "Gemm"):
            found.append(Weighted(node.name, "product"))
    return found


def _make_activations_unsigned(graph: Any) -> None:
    """Add 128 to signed activations and to their zero points: the same numbers, in the form that is fast."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or len(node.input) < 3 or node.input[0] in tensors:
            continue
        zero = numpy_helper.to_array(tensors[node.input[2]])
        if zero.dtype != np.int8 or any(reader.op_type != "DequantizeLinear" for reader in readers[node.output[0]]):
            continue
        unsigned = f"{node.input[2]}.unsigned"
        if unsigned not in tensors:
            tensor = numpy_helper.from_array((zero.astype(np.int16) + 128).astype(np.uint8), unsigned)
            tensors[unsigned] = tensor
            graph.initializer.append(tensor)
        for user in (node, *readers[node.output[0]]):
            user.input[2] = unsigned
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]  # it says that they are signed
