"""Tiny real bundles: a light model that returns what it is given as logits, for every runtime of the table.

The tests choose the logits, so they choose the score. Versions differ by one weight.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import openvino
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from isthmus.bundle import (
    Calibration,
    CalibrationData,
    Ceilings,
    CurvePoint,
    Heavy,
    Manifest,
    OperatingPoint,
    Provenance,
    TensorSpec,
    Variant,
    VariantCalibration,
    index_files,
)
from isthmus.digests import tree_digest
from isthmus.tensors import Array

CLASSES = 3
THRESHOLD = 0.8
SURE = np.array([[9.0, 0.0, 0.0]], dtype=np.float32)  # score 0.9998
HARD = np.array([[0.2, 0.1, 0.0]], dtype=np.float32)  # score 0.37
VARIANTS = {"onnxruntime-fp32": "onnxruntime", "openvino-fp32": "openvino"}


def weights(version: int) -> Array:
    matrix = np.eye(CLASSES, dtype=np.float32)
    matrix[0, 1] = version * 1e-3
    return matrix


def light_onnx(version: int = 1) -> onnx.ModelProto:
    """logits = x @ weights(version), label = argmax(logits)."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["logits"]),
            helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0),
        ],
        "light",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", CLASSES])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", CLASSES]),
            helper.make_tensor_value_info("label", TensorProto.INT64, ["n"]),
        ],
        [numpy_helper.from_array(weights(version), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def save_variant(runtime: str, folder: Path, version: int = 1) -> str:
    """Write the light model in the runtime's own form; return the entry file's name."""
    folder.mkdir(parents=True, exist_ok=True)
    if runtime == "tvm":
        for name, content in _tvm_files(version).items():
            (folder / name).write_bytes(content)
        return "model.json"
    if runtime == "openvino":
        source = folder.parent / "source.onnx"
        onnx.save(light_onnx(version), source)
        openvino.save_model(openvino.convert_model(source), folder / "model.xml", compress_to_fp16=False)
        source.unlink()
        return "model.xml"
    onnx.save(light_onnx(version), folder / "model.onnx")
    return "model.onnx"


@cache
def _tvm_files(version: int) -> dict[str, bytes]:
    """Return the files of the light model as the compiler makes them; a library takes seconds to build."""
    from compiler.capture import capture
    from compiler.targets import BuildOptions, load_target

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "artefact"
        folder.mkdir()
        onnx.save(light_onnx(version), Path(scratch) / "light.onnx")
        model = capture(Path(scratch) / "light.onnx", Path(scratch) / "captured.onnx")
        load_target("tvm", role="light").build(model, folder, BuildOptions())
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def spoilt_onnx(fault: str, version: int = 1) -> onnx.ModelProto:
    """Return the light model with a fault that no golden output shows.

    "nan", "wrong" (another class) and "hard" (hardly sure) show where an input is above 5; "slow" takes some hundred
    times as long, "large" 32 MB.
    """
    model = light_onnx(version)
    weights_of: dict[str, Array] = {"five": np.array(5.0), "zero": np.array(0.0)}
    identity = np.eye(CLASSES)
    if fault == "nan":
        nodes = [("Sub", ["five", "x"], "room"), ("Sqrt", ["room"], "root"), ("Mul", ["root", "zero"], "change")]
    elif fault in ("wrong", "hard"):
        weights_of["w2"] = 100 * np.roll(identity, 1, axis=1) if fault == "wrong" else -2.2 * identity
        nodes = [("Sub", ["x", "five"], "above"), ("Relu", ["above"], "excess"), ("MatMul", ["excess", "w2"], "change")]
    elif fault == "slow":
        weights_of |= {"w2": np.zeros((CLASSES, 1200)), "w3": np.zeros((1200, 1200)), "w4": np.zeros((1200, CLASSES))}
        nodes = [("MatMul", ["x", "w2"], "h0"), *[("MatMul", [f"h{i}", "w3"], f"h{i + 1}") for i in range(8)]]
        nodes.append(("MatMul", ["h8", "w4"], "change"))
    else:
        weights_of |= {"w2": np.full((CLASSES, 2 << 20), 0.5), "w3": np.full((2 << 20, 1), 0.5)}
        nodes = [
            ("MatMul", ["x", "w2"], "wide"),
            ("MatMul", ["wide", "w3"], "thin"),
            ("Mul", ["thin", "zero"], "change"),
        ]
    matmul, argmax = model.graph.node
    matmul.output[0] = "right"
    added = [helper.make_node(kind, inputs, [output]) for kind, inputs, output in nodes]
    sum_of = helper.make_node("Add", ["right", "change"], ["logits"])
    model.graph.initializer.extend(
        numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights_of.items()
    )
    whole = [matmul, *added, sum_of, argmax]
    del model.graph.node[:]
    model.graph.node.extend(whole)
    return model


def golden_tensors(version: int) -> dict[str, Array]:
    x = np.random.default_rng(7).normal(size=(4, CLASSES)).astype(np.float32)
    logits = x @ weights(version)
    tensors = {"input.x": x}
    for variant in VARIANTS:
        tensors[f"output.{variant}.logits"] = logits
        tensors[f"output.{variant}.label"] = logits.argmax(axis=1).astype(np.int64)
    return tensors


def calibration(version: int, *, threshold: float = THRESHOLD, model: str = "triage") -> Calibration:
    point = VariantCalibration(
        temperature=1.0,
        threshold=threshold,
        escalation_rate=0.2,
        accuracy=0.9,
        edge_accuracy=0.8,
        agreement=0.9,
        ece_before=0.1,
        ece_after=0.05,
        curve=(CurvePoint(threshold=threshold, escalation_rate=0.2, accuracy=0.9),),
    )
    return Calibration(
        model=model,
        version=version,
        operating_point=OperatingPoint(value=0.3, delta=0.1),
        data=CalibrationData(sha256="0" * 64, samples=100),
        heavy_accuracy=0.95,
        variants=dict.fromkeys(VARIANTS, point),
    )


def build_bundle(
    folder: Path,
    version: int = 1,
    *,
    golden: dict[str, Array] | None = None,
    record: Calibration | None = None,
    weights_of: int | None = None,
    fault: str = "",
    ceilings: Ceilings | None = None,
) -> Manifest:
    """Write a whole bundle.

    `golden` and `record` replace the right ones for tests of refusals; `weights_of` takes another version's model;
    `fault` is one of `spoilt_onnx`, in the ONNX Runtime variant.
    """
    made_of = weights_of or version
    entries = {name: save_variant(runtime, folder / "variants" / name, made_of) for name, runtime in VARIANTS.items()}
    if fault:
        onnx.save(spoilt_onnx(fault, made_of), folder / "variants" / "onnxruntime-fp32" / "model.onnx")
    (folder / "heavy" / "1").mkdir(parents=True)
    (folder / "heavy" / "config.pbtxt").write_text('backend: "python"\n')
    (folder / "heavy" / "1" / "model.onnx").write_bytes(b"not looked at by the edge")
    (folder / "calibration.json").write_bytes((record or calibration(version)).to_json())
    save_file(golden or golden_tensors(made_of), folder / "golden.safetensors")
    files = index_files(folder)
    heavy = {path: entry.sha256 for path, entry in files.items() if path.startswith("heavy/")}
    manifest = Manifest(
        name="triage",
        version=version,
        labels=("a", "b", "c"),
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, CLASSES)),),
        outputs=(
            TensorSpec(name="logits", datatype="FP32", shape=(-1, CLASSES)),
            TensorSpec(name="label", datatype="INT64", shape=(-1,)),
        ),
        max_batch=8,
        variants=tuple(
            Variant(
                id=name,
                runtime=runtime,
                precision="fp32",
                entry=f"variants/{name}/{entries[name]}",
                tolerance=1e-3,
                ceilings=ceilings,
            )
            for name, runtime in VARIANTS.items()
        ),
        heavy=Heavy(platform="python", digest=tree_digest(heavy)),
        provenance=Provenance(sources={}, recipe="0" * 64, tools={}),
        files=files,
    )
    (folder / "manifest.json").write_bytes(manifest.to_json())
    return manifest
