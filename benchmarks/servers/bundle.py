"""A bundle around one ONNX file, without a compiler: one variant in ONNX Runtime, and the same file as the heavy model.

The calibration record says nothing of accuracy: `threshold` alone decides what escalates.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from google.protobuf import text_format
from safetensors.numpy import load_file, save_file

import compiler.targets
from benchmarks.servers import ServedModel
from benchmarks.servers.load import open_session
from isthmus.bundle import (
    CALIBRATION,
    GOLDEN,
    MANIFEST,
    Calibration,
    CalibrationData,
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
from isthmus.digests import sha256_file, tree_digest
from isthmus.oip import model_config_pb2
from isthmus.tensors import Array

VARIANT: Final = "onnxruntime-fp32"
MAX_BATCH: Final = 8
_PROGRAM: Final = Path(compiler.targets.__file__).with_name("triton_python_model.py")
_MODEL: Final = "model.onnx"


def write_bundle(folder: Path, model: ServedModel, *, threshold: float = 0.0) -> None:
    """Write version 1 of a bundle; requests whose score is below `threshold` escalate, by default none."""
    session = open_session(model.onnx)
    inputs = {name: array[:MAX_BATCH] for name, array in load_file(model.inputs).items()}
    entry = folder / "variants" / VARIANT / _MODEL
    entry.parent.mkdir(parents=True)
    shutil.copyfile(model.onnx, entry)
    write_triton_model(folder / "heavy", model)
    (folder / CALIBRATION).write_bytes(_calibration(model.name, threshold).to_json())
    save_file(_golden(session, inputs), folder / GOLDEN)
    files = index_files(folder)
    heavy = {path: file.sha256 for path, file in files.items() if path.startswith("heavy/")}
    manifest = Manifest(
        name=model.name,
        version=1,
        inputs=_specs(session.get_inputs()),
        outputs=_specs(session.get_outputs()),
        max_batch=MAX_BATCH,
        variants=(
            Variant(
                id=VARIANT,
                runtime="onnxruntime",
                precision="fp32",
                entry=entry.relative_to(folder).as_posix(),
                tolerance=1e-3,
            ),
        ),
        heavy=Heavy(platform="python", digest=tree_digest(heavy)),
        provenance=Provenance(sources={"light": sha256_file(model.onnx)}, recipe="0" * 64, tools={}),
        files=files,
    )
    (folder / MANIFEST).write_bytes(manifest.to_json())


def write_triton_model(folder: Path, model: ServedModel) -> None:
    """Write the model folder for Triton's Python backend: one instance, ONNX Runtime on one thread, no waiting."""
    version = folder / "1"
    version.mkdir(parents=True)
    shutil.copyfile(model.onnx, version / _MODEL)
    shutil.copyfile(_PROGRAM, version / "model.py")
    session = open_session(model.onnx)
    config = model_config_pb2.ModelConfig(name=model.name, backend="python", max_batch_size=MAX_BATCH)
    for ports, tensors in ((session.get_inputs(), config.input), (session.get_outputs(), config.output)):
        for port in ports:
            tensors.add(name=port.name, data_type=model_config_pb2.DataType.TYPE_FP32, dims=port.shape[1:])
    config.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_CPU, count=1)
    for key, value in (("model", _MODEL), ("runtime", "onnxruntime"), ("threads", "1")):
        config.parameters[key].string_value = value
    (folder / "config.pbtxt").write_text(text_format.MessageToString(config))


def _specs(ports: list[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=port.name, datatype="FP32", shape=(-1, *port.shape[1:])) for port in ports)


def _golden(session: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    names = [port.name for port in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, dict(inputs)), strict=True))
    tensors = {f"input.{name}": np.ascontiguousarray(array) for name, array in inputs.items()}
    return tensors | {f"output.{VARIANT}.{name}": array for name, array in outputs.items()}


def _calibration(name: str, threshold: float) -> Calibration:
    point = VariantCalibration(
        temperature=1.0,
        threshold=threshold,
        escalation_rate=0.0,
        accuracy=1.0,
        edge_accuracy=1.0,
        agreement=1.0,
        ece_before=0.0,
        ece_after=0.0,
        curve=(CurvePoint(threshold=threshold, escalation_rate=0.0, accuracy=1.0),),
    )
    return Calibration(
        model=name,
        version=1,
        operating_point=OperatingPoint(value=0.0, delta=0.1),
        data=CalibrationData(sha256="0" * 64, samples=1),
        heavy_accuracy=1.0,
        variants={VARIANT: point},
    )
