"""TensorRT engines, from either of its two libraries.

`tensorrt` builds on the machine whose GPU will run the engine, and times its kernels there. `tensorrt_rtx` builds ahead
of time on any machine, for the compute capabilities that it is told, and needs no GPU. They share one Python interface
(compiler/targets/tensorrt_worker.py knows where they differ), so that one builder serves both and is tested with the
one that needs no GPU.

What is decided here: the graph with its datatypes (compiler/targets/tensorrt_graph.py) and the optimization profile,
which is the range of every axis that may vary. The batch goes from 1 to `options.max_batch`, other axes as far as the
captured model says; inputs whose values decide shapes or branches take the values that the samples have.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from compiler.capture import CapturedModel
from compiler.data import BATCH_AXIS
from compiler.targets import BuildOptions, UnsupportedModelError
from compiler.targets.tensorrt_graph import nodes_of, typed_graph
from isthmus.bundle import TensorSpec
from isthmus.errors import InputError
from isthmus.tensors import Array

PRECISIONS: Final = ("fp32", "fp16", "int8")
WORKSPACE: Final = 1 << 30  # bytes that layers may use while they run
_WORKER: Final = Path(__file__).with_name("tensorrt_worker.py")
_ELSEWHERE: Final = "use target onnxruntime or openvino for this model"
_CONTROL_FLOW: Final = ("If", "Loop", "Scan")
_PROGRESS: Final = re.compile(r"(?P<node>.*) \[(?P<operator>\w+)\]")

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # the least, the usual and the largest shape


@dataclass(frozen=True, slots=True)
class Library:
    """One of TensorRT's libraries.

    Attributes:
        title: What people call it.
        modules: Names that its Python module may have: a package and its bindings can be installed under two.
        ahead: Whether it builds for GPUs that need not be here, and so times nothing.
        capabilities: Compute capabilities to build for, such as "SM86"; empty: the library's own choice.
    """

    title: str
    modules: tuple[str, ...]
    ahead: bool
    capabilities: tuple[str, ...] = ()

    def require(self) -> None:
        """Check that the library is installed.

        Raises:
            ImportError: It is not; its `name` is the first of the modules.
        """
        for name in self.modules[1:]:
            try:
                import_module(name)
            except ImportError:
                continue
            return
        import_module(self.modules[0])


TENSORRT: Final = Library("TensorRT", ("tensorrt", "tensorrt_bindings"), ahead=False)
TENSORRT_RTX: Final = Library("TensorRT-RTX", ("tensorrt_rtx", "tensorrt_rtx_bindings"), ahead=True)


@dataclass(frozen=True, slots=True)
class Plan:
    """A built engine."""

    layers: int  # of the network that it was made from
    version: str  # of the library
    not_reproducible: str  # why another build may differ in its bytes, or nothing
    profile: Mapping[str, Range]  # of the inputs that may vary


def build_plan(library: Library, model: CapturedModel, options: BuildOptions, path: Path) -> Plan:
    """Build an engine of the model and write it to `path`.

    Raises:
        InputError: int8 without samples, a compute capability that the library does not know, or an axis whose
            lengths nobody knows.
        UnsupportedModelError: TensorRT cannot take the model.
    """
    graph = typed_graph(model, options, library.title)
    profile = {spec.name: _shapes(model, spec, options) for spec in model.inputs if -1 in spec.shape}
    database = options.tuning.database
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tensorrt.") as name:
        folder = Path(name)
        (folder / "graph.onnx").write_bytes(graph.SerializeToString(deterministic=True))
        job = {
            "modules": library.modules,
            "capabilities": library.capabilities,
            "inputs": [(spec.name, spec.datatype, spec.shape) for spec in model.inputs],
            "outputs": [(spec.name, spec.datatype, spec.shape) for spec in model.outputs],
            "shapes": profile,
            "values": _values(model, options),
            "workspace": WORKSPACE,
            "timing_cache": "" if database is None or library.ahead else str(database / "tensorrt.timing"),
        }
        (folder / "job.json").write_text(json.dumps(job))
        done = subprocess.run(
            [sys.executable, "-I", str(_WORKER), name], stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        result = folder / "result.json"
        if done.returncode or not result.is_file():
            raise _crashed(library, graph, folder, done)
        fields = json.loads(result.read_text())
        if "failed" in fields:
            raise _failed(library, graph, fields)
        (folder / "plan").replace(path)
    why = _not_reproducible(library, options, fixed_addresses=fields["fixed_addresses"])
    return Plan(fields["layers"], fields["version"], why, profile)


def _not_reproducible(library: Library, options: BuildOptions, *, fixed_addresses: bool) -> str:
    if not library.ahead:
        return f"{library.title} times its kernels while it builds, and takes the fastest"
    if not fixed_addresses:
        return f"{library.title} names parts of the engine by addresses in memory, which this system chooses at random"
    if options.precision == "int8":
        return f"{library.title} names parts of an int8 engine in the order in which its threads come to them"
    return ""


def _shapes(model: CapturedModel, spec: TensorSpec, options: BuildOptions) -> Range:
    ranges = [_sizes(model, spec, axis, options) for axis in range(len(spec.shape))]
    least, usual, most = zip(*ranges, strict=True)
    return least, usual, most


def _sizes(model: CapturedModel, spec: TensorSpec, axis: int, options: BuildOptions) -> tuple[int, int, int]:
    """Return the least, the usual and the largest size of one axis."""
    size = spec.shape[axis]
    if size != -1:
        return size, size, size
    names = model.axes.get(spec.name, ())
    name = names[axis] if names else (BATCH_AXIS if axis == 0 else "")
    if name == BATCH_AXIS:
        most = min(options.max_batch, model.lengths.get(name, (1, options.max_batch))[1])
        return 1, min(max(options.serving.preferred_batch, default=1), most), most
    if name not in model.lengths:
        raise InputError(
            f"axis {axis} of input {spec.name!r} may have any length; TensorRT needs the shortest and the longest",
            hint="say in the recipe how long the axis may be, or export the model with a fixed one",
        )
    least, most = model.lengths[name]
    usual = most
    if options.samples is not None and options.samples[spec.name].ndim == len(spec.shape):
        usual = min(max(options.samples[spec.name].shape[axis], least), most)
    return least, usual, most


def _values(model: CapturedModel, options: BuildOptions) -> dict[str, list[list[int]]]:
    """Return the least, the usual and the largest values of small integer inputs, as the samples have them."""
    if options.samples is None:
        return {}
    found: dict[str, list[list[int]]] = {}
    for spec in model.inputs:
        if spec.datatype in ("INT32", "INT64") and len(spec.shape) < 2 and -1 not in spec.shape:
            values: Array = np.reshape(options.samples[spec.name], (len(options.samples[spec.name]), -1))
            middle = np.sort(values, axis=0)[len(values) // 2]
            found[spec.name] = [row.tolist() for row in (values.min(axis=0), middle, values.max(axis=0))]
    return found


def _failed(library: Library, graph: onnx.ModelProto, fields: Mapping[str, str]) -> InputError:
    """Return what the library refused, with the node where it says one."""
    step, message = fields["failed"], fields["message"][:300]
    if step == "capability":
        return InputError(f"{library.title} does not build for {message}", hint="mend `cpu` of this variant")
    if step == "values":
        return UnsupportedModelError(
            f"{library.title} must know which values input {message!r} can have, for they decide shapes or branches",
            hint="give samples of typical inputs, or use target onnxruntime",
        )
    operator, node = fields["operator"], fields["node"]
    if not operator:
        operator, node = _named(graph, fields["message"])
    what = "read" if step == "parse" else "take" if step == "interface" else "build"
    if operator:
        return UnsupportedModelError(
            f"{library.title} cannot {what} operator {operator} (node {node!r}): {message}", hint=_ELSEWHERE
        )
    return UnsupportedModelError(f"{library.title} cannot {what} the model: {message}", hint=_ELSEWHERE)


def _named(graph: onnx.ModelProto, message: str) -> tuple[str, str]:
    """Return operator and name of the node that a message speaks of, or of the first one with control flow."""
    nodes = {node.name: node.op_type for node in nodes_of(graph.graph) if node.name}
    found = [name for name in nodes if re.search(rf"(?<![\w./]){re.escape(name)}(?![\w./])", message)]
    if found:
        name = max(found, key=len)
        return nodes[name], name
    return next(
        ((node.op_type, node.name) for node in nodes_of(graph.graph) if node.op_type in _CONTROL_FLOW), ("", "")
    )


def _crashed(
    library: Library, graph: onnx.ModelProto, folder: Path, done: subprocess.CompletedProcess[Any]
) -> InputError:
    """Return how the library's process ended, and at which node."""
    if done.returncode > 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return InputError(f"{library.title} failed: {(lines or ['it gave no reason'])[-1][:300]}")
    notes = folder / "progress"
    last = notes.read_text(errors="replace").splitlines()[-1:] if notes.is_file() else []
    at = _PROGRESS.fullmatch(last[0]) if last else None
    operator, node = (at["operator"], at["node"]) if at else _named(graph, "")
    where = f" at operator {operator} (node {node!r})" if operator else ""
    name = signal.Signals(-done.returncode).name
    return UnsupportedModelError(
        f"{library.title} crashed ({name}) while it {'read' if at else 'built'} the model{where}", hint=_ELSEWHERE
    )
