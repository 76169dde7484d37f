"""OpenVINO on the device: an IR of two files, model.xml (the graph) and model.bin (the weights).

Rules:
* Always with a hint, inference_precision: left alone, OpenVINO computes in bfloat16 where the processor can, with
  relative errors up to 0.4. It is f32, and bf16 for the precisions that say so; the IR notes it down for `open`.
* Same model, same bytes: names that OpenVINO makes up from a counter of the process are replaced by ones that depend on
  the operator's place in the graph, and the paths and versions that it notes down are dropped.
* Weights stay in the precision that was verified: no silent fp16.

Precisions: fp16, int8w and int4w store weights in fewer bits and compute as fp32 does; int8 computes in 8 bits, in one
of the ways of compiler.quantize, and at last with operators taken back until the accuracy on labelled data is high
enough ("accuracy-control"). bf16 and int8-bf16 compute the rest in bfloat16, on processors that can: half the time of
fp32, where the model bears a mantissa of 8 bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from compiler.capture import CapturedModel
from compiler.grid import GridError, outcome
from compiler.targets import BuildOptions, Built, UnsupportedModelError
from isthmus.bundle import BFLOAT16, INT8, TensorSpec
from isthmus.errors import InputError
from isthmus.machine import computes_bfloat16
from isthmus.privacy import forbid_usage_reports
from isthmus.tensors import Array

forbid_usage_reports()
import openvino  # noqa: E402  # after usage reports are off
from openvino import properties  # noqa: E402

ENTRY: Final = "model.xml"
_INT8_SETTINGS: Final = ("default", "corrected", "ends-kept", "depthwise-kept", "accuracy-control")
_SETTINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "int8": _INT8_SETTINGS,
    "int8-bf16": _INT8_SETTINGS,
    "int4w": ("default", "half"),
}
_NAMED: Final = 3  # operators that an error names
_MADE_UP: Final = re.compile(r"(?P<stem>[A-Z][A-Za-z0-9]*)_\d+(?P<rest>/.*)?")
_HINT: Final = ["isthmus", "inference_precision"]  # where the IR notes it down
_NOTED: Final = ("conversion_parameters", "nncf", "Runtime_version")


class OpenVinoTarget:
    """The light model as OpenVINO IR."""

    role: ClassVar[Literal["light", "heavy"]] = "light"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16", "int8", "int8-bf16", "int8w", "int4w")
    platforms: ClassVar[tuple[str, ...]] = ("any",)
    tools: ClassVar[tuple[str, ...]] = ("openvino", "nncf")
    runs_here: ClassVar[bool] = True

    def settings(self, precision: str) -> tuple[str, ...]:
        """Return the ways of compiler.quantize for int8; for int4w, all weights in 4 bits and then half of them."""
        return _SETTINGS.get(precision, ("default",))

    def build(self, model: CapturedModel, folder: Path, options: BuildOptions) -> Built:
        """Convert the model, and quantize it for int8: on the grid of the version before where that works.

        Raises:
            InputError: int8 has no samples, "accuracy-control" no labelled ones, or the processor no bfloat16.
            UnsupportedModelError: OpenVINO cannot convert the model.
        """
        hint: Literal["f32", "bf16"] = "bf16" if options.precision in BFLOAT16 else "f32"
        if hint == "bf16" and not computes_bfloat16():
            raise InputError(
                "this processor does not compute in bfloat16, so the variant could not be verified",
                hint="compile on one with AVX512-BF16 or AMX, or leave the variant out",
            )
        graph = convert(model)
        if hint != "f32":
            graph.set_rt_info(hint, _HINT)
        setting = options.setting or self.settings(options.precision)[0]
        if options.precision in INT8:
            return replace(_build_int8(graph, model, folder / ENTRY, options, setting), inference_precision=hint)
        if options.precision in ("int8w", "int4w"):
            from compiler.quantize import pack_weights

            graph = pack_weights(graph, options.precision, ratio=0.5 if setting == "half" else 1.0)
            name_by_place(graph)
        save_ir(graph, folder / ENTRY, half=options.precision == "fp16")
        return Built(ENTRY, inference_precision=hint)

    def open(self, entry: Path, *, threads: int) -> OpenVinoRunner:
        """Load the IR."""
        return OpenVinoRunner(entry, threads=threads)


class OpenVinoRunner:
    """A compiled IR on the CPU."""

    def __init__(self, path: Path, *, threads: int) -> None:
        graph = read_ir(path)
        config = {
            properties.hint.inference_precision(): graph.get_rt_info(_HINT).value
            if graph.has_rt_info(_HINT)
            else "f32",
            properties.inference_num_threads(): threads,
            properties.num_streams(): 1,
        }
        inputs, outputs = ([port.get_any_name() for port in ports] for ports in (graph.inputs, graph.outputs))
        try:
            compiled = openvino.Core().compile_model(graph, "CPU", config)
        except RuntimeError as error:
            raise InputError(f"OpenVINO cannot load {path.name}: {str(error)[:300]}") from error
        self._request: Any = compiled.create_infer_request()
        # The names are those of the graph: what is compiled may have others besides.
        self._inputs = {
            name: (port.get_element_type().to_dtype(), port.get_partial_shape())
            for name, port in zip(inputs, compiled.inputs, strict=True)
        }
        self._names = outputs

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name.

        Raises:
            InputError: The model cannot take these inputs.
        """
        self._check(inputs)
        try:
            results = self._request.infer(dict(inputs))
        except RuntimeError as error:
            raise InputError(f"OpenVINO cannot run the model: {str(error)[:300]}") from error
        return {name: results[index].copy() for index, name in enumerate(self._names)}

    def _check(self, inputs: Mapping[str, Array]) -> None:
        """Refuse what OpenVINO takes: a wrong shape gets the answer before, a wrong dtype is cast."""
        for name, (dtype, shape) in self._inputs.items():
            array = inputs.get(name)
            if array is None:
                raise InputError(f"OpenVINO cannot run the model: input {name!r} is missing")
            if array.dtype != dtype or not shape.compatible(openvino.PartialShape(list(array.shape))):
                raise InputError(
                    f"OpenVINO cannot run the model: {name!r} must be {dtype}{shape}, "
                    f"got {array.dtype}{list(array.shape)}"
                )


def _build_int8(graph: Any, model: CapturedModel, entry: Path, options: BuildOptions, setting: str) -> Built:
    from compiler.openvino_grid import keep_grid
    from compiler.quantize import control, quantize, weighted_operators

    note = ""
    if options.previous is not None and setting == "default":
        try:
            tensors = tuple(keep_grid(options.previous, graph, entry))
            return Built(ENTRY, outcome(tensors), tensors=tensors)
        except GridError as error:
            note = str(error)
    if options.samples is None:
        raise InputError("int8 needs samples of typical inputs", hint="give data.quantization in the recipe")
    if setting != "accuracy-control":
        quantized = quantize(graph, model, options.samples, weighted=weighted_operators(graph), setting=setting)
    elif options.labelled is None or not options.labelled.output:
        raise InputError(
            "setting 'accuracy-control' needs labelled samples to measure the accuracy on",
            hint="add a tensor 'labels' to the samples for quantization, or leave the setting out",
        )
    else:
        quantized = control(graph, model, options.samples, options.labelled, max_drop=options.max_accuracy_drop)
    name_by_place(quantized)
    save_ir(quantized, entry)
    return Built(ENTRY, "new", note)


def convert(model: CapturedModel) -> Any:
    """Return the captured model as an OpenVINO graph with stable names.

    Raises:
        UnsupportedModelError: OpenVINO cannot convert it.
    """
    try:
        graph = openvino.convert_model(str(model.path))
    except Exception as error:  # conversion raises whatever its frontends raise
        raise UnsupportedModelError(
            f"OpenVINO cannot convert {_culprits(str(error), model.path)}",
            hint="use target onnxruntime, which takes every ONNX operator",
        ) from error
    for ports, specs in ((graph.inputs, model.inputs), (graph.outputs, model.outputs)):
        _name_ports(ports, specs)
    name_by_place(graph)
    return graph


def _culprits(message: str, path: Path) -> str:
    """Return the operators and nodes that the message of a failed conversion is about, or what it says."""
    import onnx

    nodes = list(onnx.load(path, load_external_data=False).graph.node)
    named = set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", message))
    types = sorted({node.op_type for node in nodes} & named)
    found = [f"{node.op_type} {node.name or node.output[0]!r}" for node in nodes if node.op_type in types]
    if not found:
        return f"the model: {' '.join(message.split())[:300]}"
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{', '.join(found[:_NAMED])}{more}"


def _name_ports(ports: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    """Leave each port the one name that the model declares: OpenVINO keeps aliases, in no certain order."""
    for spec in specs:
        found = [port for port in ports if spec.name in port.get_names()]
        if len(found) != 1:
            raise UnsupportedModelError(
                f"OpenVINO lost or merged tensor {spec.name!r} while it converted the model",
                hint="use target onnxruntime",
            )
        found[0].get_tensor().set_names({spec.name})


def name_by_place(graph: Any) -> None:
    """Replace names made from a counter of the process by names made from the place in the graph."""
    ops = graph.get_ordered_ops()
    kept = {op.get_friendly_name() for op in ops if not _MADE_UP.fullmatch(op.get_friendly_name())}
    place = 0
    for op in ops:
        made_up = _MADE_UP.fullmatch(op.get_friendly_name())
        if made_up is None or op.get_type_name() in {"Parameter", "Result"}:
            continue
        while (name := f"{made_up['stem']}.{place}") in kept:
            place += 1
        op.set_friendly_name(name)
        place += 1


def save_ir(graph: Any, path: Path, *, half: bool = False) -> None:
    """Write the graph as `path` and its weights beside it, in fp16 where `half`, without notes on who made it where."""
    for key in _NOTED:
        if graph.has_rt_info(key):
            del graph.rt_info[key]
    openvino.save_model(graph, str(path), compress_to_fp16=half)


def read_ir(path: Path) -> Any:
    """Return the graph in `path`.

    Raises:
        InputError: It is not an IR.
    """
    try:
        return openvino.Core().read_model(str(path))
    except RuntimeError as error:
        raise InputError(f"OpenVINO cannot read {path.name}: {str(error)[:300]}") from error
