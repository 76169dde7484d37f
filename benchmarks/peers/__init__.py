"""What people do by hand, tool by tool: each peer builds from the captured ONNX file and opens what it built.

Every peer gets the very graph that our targets get, with fixed axes and constants already in it, and the same samples.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors.numpy import load_file

from benchmarks.peers import optimum
from benchmarks.zoo import ZooModel
from benchmarks.zoo.model import Array
from isthmus.privacy import forbid_usage_reports

Infer = Callable[[Mapping[str, Array]], Mapping[str, Array]]


@dataclass(frozen=True, slots=True)
class Peer:
    """One way by hand.

    `build(model, source, folder)` writes into the folder: `source` holds model.onnx and calibration.safetensors.
    """

    precision: str  # which guard it is held to: fp32, or int8 and bf16
    build: Callable[[ZooModel, Path, Path], None]
    open: Callable[[Path], Infer]
    takes: Callable[[ZooModel], bool] = lambda _: True


def _copy(model: ZooModel, source: Path, folder: Path) -> None:
    del model
    shutil.copyfile(source / "model.onnx", folder / "model.onnx")


def _rows(source: Path) -> list[dict[str, Array]]:
    from compiler.data import request
    from compiler.worker import read_captured

    captured, samples = read_captured(source), load_file(source / "calibration.safetensors")
    return [request(captured, samples, row, row + 1) for row in range(len(next(iter(samples.values()))))]


def open_onnxruntime(folder: Path) -> Infer:
    """Open model.onnx in ONNX Runtime as it is out of the box, on one thread."""
    return _session(folder / "model.onnx")


def _session(path: Path) -> Infer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, dict(inputs)), strict=True))


def _open_openvino(folder: Path, hints: Mapping[str, Any]) -> Infer:
    forbid_usage_reports()
    import openvino

    path = folder / "model.xml"
    graph = openvino.Core().read_model(str(path)) if path.exists() else openvino.convert_model(folder / "model.onnx")
    compiled = openvino.compile_model(graph, "CPU", {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, **hints})
    run = compiled.create_infer_request()
    names = [output.get_any_name() for output in compiled.outputs]

    def infer(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        results = run.infer(dict(inputs))
        return {name: results[place] for place, name in enumerate(names)}

    return infer


def open_openvino_default(folder: Path) -> Infer:
    """Open in OpenVINO with its own defaults: bfloat16 where the processor has it."""
    return _open_openvino(folder, {})


def open_openvino_f32(folder: Path) -> Infer:
    """Open in OpenVINO, told to compute in single precision."""
    return _open_openvino(folder, {"INFERENCE_PRECISION_HINT": "f32"})


def build_nncf(model: ZooModel, source: Path, folder: Path) -> None:
    """Convert and quantize as NNCF's first example does."""
    del model
    forbid_usage_reports()
    import nncf
    import openvino

    graph = openvino.convert_model(source / "model.onnx")
    openvino.save_model(nncf.quantize(graph, nncf.Dataset(_rows(source))), folder / "model.xml")


def build_static(model: ZooModel, source: Path, folder: Path) -> None:
    """Quantize with ONNX Runtime: QDQ, activations u8, weights s8 per channel, the fastest on this processor."""
    del model
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    rows = iter(_rows(source))

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the library has no types
        def get_next(self) -> dict[str, Array] | None:
            return next(rows, None)

    prepared = folder / "prepared.onnx"
    quant_pre_process(str(source / "model.onnx"), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(folder / "model.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    prepared.unlink()


def build_dynamic(model: ZooModel, source: Path, folder: Path) -> None:
    """Quantize with ONNX Runtime dynamically, for transformers: convolutions become several times slower."""
    del model
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(source / "model.onnx"), str(folder / "model.onnx"), weight_type=QuantType.QInt8)


def try_by_hand(target: str, model: ZooModel) -> None:
    """Load the model as it came with the tool alone and run one sample; whatever the tool raises comes through."""
    inputs = model.feed(model.samples(1))
    if target == "onnxruntime":
        _session(model.onnx())(inputs)
    elif target == "openvino":
        forbid_usage_reports()
        import openvino

        openvino.compile_model(openvino.convert_model(model.onnx()), "CPU").create_infer_request().infer(inputs)
    else:
        raise ValueError(f"{target} is not tried by hand")


PEERS: Final[Mapping[str, Peer]] = {
    "ort-fp32": Peer("fp32", _copy, open_onnxruntime),
    "openvino-f32": Peer("fp32", _copy, open_openvino_f32),
    "openvino-default": Peer("bf16", _copy, open_openvino_default),
    "nncf-openvino": Peer("int8", build_nncf, open_openvino_default),
    "ort-static-qdq": Peer("int8", build_static, open_onnxruntime),
    "ort-dynamic": Peer("int8", build_dynamic, open_onnxruntime, lambda model: model.transformers),
    "optimum-openvino": Peer("bf16", optimum.build_fp32, optimum.open_export, optimum.takes),
    "optimum-openvino-int8": Peer("int8", optimum.build_int8, optimum.open_export, optimum.takes),
}
