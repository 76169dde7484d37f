"""A torch module or exported program becomes ONNX, and is shown to give the same answers there.

`torch.onnx.export` traces with one example, so a size may have been taken for a constant. The file is therefore run
with ONNX Runtime at other sizes than the example's and compared with torch before anybody else sees it.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from compiler.sources import SourceOptions
from compiler.sources.onnx_file import graphs_of
from isthmus.errors import InputError, VerificationError

if TYPE_CHECKING:
    import torch

MAX_DIFFERENCE: Final = 1e-3  # between torch and ONNX Runtime, as a share of the largest value of the output
_SPECIALIZED: Final = re.compile(r"static shape of (\d+) for dimension inputs\['(\w+)'\]\.shape\[(\d+)\]")
_NOISY: Final = ("torch.onnx", "torch.export", "torch._export", "torch._dynamo", "torch.fx")

Inputs = Mapping[str, "torch.Tensor"]
Axes = Mapping[str, Mapping[int, str]]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's exporters from printing: they warn of what they are written to do."""
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    with warnings.catch_warnings():
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def export_module(
    module: torch.nn.Module,
    example: Inputs,
    axes: Axes,
    *,
    options: SourceOptions,
    path: Path,
    what: str,
    other: Inputs | None = None,
) -> Path:
    """Write the module as ONNX to `path`.

    Args:
        module: Its forward takes the inputs by name; what it returns is named as `output_names` says.
        example: Inputs, sizes of axes that may vary at least 2 and all different.
        axes: The axes that may vary, input -> position -> name.
        options: The opset.
        path: Where to write.
        what: Names the source in messages.
        other: Inputs of other sizes, for the comparison; the example's again when there are none.

    Raises:
        InputError: torch cannot export it, or the export fixed an axis that should vary.
        VerificationError: The export gives other answers.
    """
    import torch

    module = module.eval()
    shapes = {name: dict(axes.get(name, {})) or None for name in example}
    with quiet(), torch.no_grad():
        try:
            names = output_names(module(**example))
            program = torch.onnx.export(
                module, (), kwargs=dict(example), dynamo=True, opset_version=options.opset, dynamic_shapes=shapes,
                verbose=False,
            )  # fmt: skip
        except Exception as error:  # whatever the exporter trips over, the source is what has to change
            raise _refused(what, axes, error) from error
    _save(program, names, path, what)
    _check_axes(path, axes, what)
    compare(lambda inputs: module(**inputs), path, other or example, what)
    return path


def export_program(
    program: torch.export.ExportedProgram, names: Sequence[str], *, options: SourceOptions, path: Path, what: str
) -> Path:
    """Write the exported program as ONNX to `path`, its outputs called by these names.

    Raises:
        InputError: torch cannot export it.
    """
    import torch

    with quiet():
        try:
            exported = torch.onnx.export(program, dynamo=True, opset_version=options.opset, verbose=False)
        except Exception as error:  # whatever the exporter trips over, the source is what has to change
            raise cannot_export(what, error) from error
    return _save(exported, names, path, what)


def cannot_export(what: str, error: BaseException) -> InputError:
    """Return the error for a model that torch cannot export, with the first lines of the reason."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    reason = " ".join(str(root).split())[:300]
    return InputError(
        f"{what}: torch cannot export it as ONNX: {type(root).__name__}: {reason}",
        hint="fix the axis that it trips over with lengths, or export it to ONNX yourself",
        reason="unsupported-model",
    )


def output_names(outputs: Any) -> list[str]:
    """Return the names of what a module returns: a mapping's keys, "output", or "output_0" and so on for a sequence."""
    if isinstance(outputs, Mapping):
        return [str(name) for name in outputs]
    if isinstance(outputs, list | tuple):
        return [f"output_{index}" for index in range(len(outputs))]
    return ["output"]


def compare(call: Callable[[Any], Any], path: Path, inputs: Inputs, what: str) -> None:
    """Check that ONNX Runtime gives what torch gives.

    Raises:
        VerificationError: The answers differ by more than `MAX_DIFFERENCE`.
        InputError: ONNX Runtime cannot run the file.
    """
    import onnxruntime
    import torch

    with quiet(), torch.no_grad():
        wanted = flatten(call(inputs))
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), session_options, providers=["CPUExecutionProvider"])
        taken = {value.name for value in session.get_inputs()}
        got = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items() if name in taken})
    except Exception as error:  # onnxruntime's classes have no common root but this
        raise InputError(f"{what}: ONNX Runtime cannot run the export: {' '.join(str(error).split())[:300]}") from error
    if len(wanted) != len(got):
        raise VerificationError(f"{what}: torch gives {len(wanted)} outputs, the export {len(got)}")
    for index, (one, other) in enumerate(zip(wanted, got, strict=True)):
        expected = one.float().numpy() if one.is_floating_point() else one.numpy()
        if expected.shape != other.shape:
            raise VerificationError(
                f"{what}: output {index}: torch gives the shape {list(expected.shape)}, the export {list(other.shape)}"
            )
        scale = max(float(np.abs(expected).max(initial=0.0)), 1e-6)
        difference = float(np.abs(expected.astype(np.float64) - other.astype(np.float64)).max(initial=0.0)) / scale
        if not difference <= MAX_DIFFERENCE:
            raise VerificationError(
                f"{what}: output {index}: the export differs from torch by {difference:.2g} of the largest value; "
                f"expected at most {MAX_DIFFERENCE:g}"
            )


def flatten(outputs: Any) -> Sequence[torch.Tensor]:
    """Return the tensors of what a module returned, in the order of `output_names`."""
    if isinstance(outputs, Mapping):
        return list(outputs.values())
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def _save(program: Any, names: Sequence[str], path: Path, what: str) -> Path:
    from compiler.sources.wire import MAX_MODEL_BYTES

    model = program.model_proto
    size = model.ByteSize()
    if size > MAX_MODEL_BYTES:
        raise InputError(f"{what}: expected a model of at most {MAX_MODEL_BYTES} bytes as ONNX, got {size}")
    if len(names) != len(model.graph.output):
        raise InputError(f"{what}: expected {len(names)} outputs after the export, got {len(model.graph.output)}")
    name_outputs(model, names)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def name_outputs(model: Any, names: Sequence[str]) -> None:
    """Give the outputs these names; values inside that have one of them make way."""
    graph = model.graph
    olds = [value.name for value in graph.output]
    used = {name for part in graphs_of(model) for node in part.node for name in (*node.input, *node.output)}
    fixed = {value.name for value in (*graph.input, *graph.initializer)}
    renamed: dict[str, str] = {}
    for name in names:
        unique = name
        while unique in used:
            unique += "_inner"
        if unique != name:
            renamed[name] = unique
    straight = len(set(olds)) == len(olds) and fixed.isdisjoint(olds)
    if straight:
        renamed |= dict(zip(olds, names, strict=True))
    _rename(model, renamed)
    for value, name, old in zip(graph.output, names, olds, strict=True):
        value.name = name
        if not straight:  # an input or a weight is returned, or one value twice
            graph.node.add(op_type="Identity", input=[renamed.get(old, old)], output=[name], name=f"output_{name}")


def _rename(model: Any, renamed: Mapping[str, str]) -> None:
    for part in graphs_of(model):
        for node in part.node:
            for field in (node.input, node.output):
                for index, name in enumerate(field):
                    if name in renamed:
                        field[index] = renamed[name]
        for value in (*part.initializer, *part.value_info):
            value.name = renamed.get(value.name, value.name)


def _check_axes(path: Path, axes: Axes, what: str) -> None:
    """Check that the axes that should vary still do: the exporter fixes what the model's code depends on."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        for index, name in axes.get(value.name, {}).items():
            if not dims[index].dim_param:
                raise _fixed(what, name, dims[index].dim_value)


def _fixed(what: str, axis: str, size: int) -> InputError:
    return InputError(
        f"{what}: the model works with {axis} = {size} alone, not with any",
        hint=f"fix it: lengths = {{ {axis} = {size} }}",
        reason="unsupported-model",
    )


def _refused(what: str, axes: Axes, error: BaseException) -> InputError:
    """Return the error for an export that failed; torch's own when it is not about an axis of ours."""
    specialized = _SPECIALIZED.search(str(error))
    if specialized is None:
        return cannot_export(what, error)
    size, name, index = specialized.groups()
    axis = axes.get(name, {}).get(int(index))
    return cannot_export(what, error) if axis is None else _fixed(what, axis, int(size))
