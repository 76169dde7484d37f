"""Small ONNX graphs, run by ONNX Runtime and as loops that `lower` scheduled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from compiler.schedules import LoweringReport, lower_with_report
from isthmus.tensors import Array

TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}


def graph(
    nodes: Sequence[Any], inputs: Mapping[str, tuple[str, Sequence[int | str]]], weights: Mapping[str, Array]
) -> Any:
    """A model of opset 18 whose output is that of the last node, "y"."""
    values = [helper.make_tensor_value_info(name, TYPES[dtype], shape) for name, (dtype, shape) in inputs.items()]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    body = helper.make_graph(list(nodes), "small", values, [result], initializers)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


def node(operator: str, inputs: Sequence[str], output: str = "y", **attributes: Any) -> Any:
    return helper.make_node(operator, list(inputs), [output], **attributes)


def target(cpu: str = "x86-64-v3", *, cores: int = 1, **attributes: str) -> Any:
    import tvm

    return tvm.target.Target({"kind": "llvm", "mcpu": cpu, "num-cores": cores, **attributes})


def lowered(model: Any, for_target: Any) -> tuple[Any, LoweringReport]:
    from tvm.relax.frontend.onnx import from_onnx

    return lower_with_report(from_onnx(model), for_target)


def expected(model: Any, inputs: Mapping[str, Array]) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Array = session.run(None, dict(inputs))[0]
    return result


def check(
    model: Any, inputs: Mapping[str, Array], *, cpu: str = "x86-64-v3", tolerance: float = 1e-5
) -> LoweringReport:
    """Assert that both agree to `tolerance` of the output's range; return which rules were used."""
    import tvm
    from tvm import relax

    on = target(cpu)
    module, report = lowered(model, on)
    machine = relax.VirtualMachine(relax.build(module, on), tvm.cpu())
    result = machine["main"](*(tvm.runtime.tensor(value) for value in inputs.values()))
    ours = (result if hasattr(result, "numpy") else result[0]).numpy()
    theirs = expected(model, inputs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * max(float(np.ptp(theirs)), 1e-3)
    assert report.reasons == {}
    assert report.unscheduled == ()
    return report


def random(*shape: int, seed: int = 0) -> Array:
    values: Array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return values
