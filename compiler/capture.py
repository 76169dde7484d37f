"""A source in, one ONNX graph out: checked, self-contained, its inputs, outputs and axes as the bundle describes them.

The steps of `capture`:
 (1) the source becomes ONNX (`compiler.sources`: it may be that already);
 (2) the file is read within limits, weights kept beside it too (`sources.onnx_file`);
 (3) ONNX Runtime knows its opset and operators; functions become part of the graph (`sources.operators`);
 (4) nothing but the graph is left: no metadata, no weights among the inputs, only the outputs that were asked for
     (`sources.normal_form`);
 (5) axes that may vary get their names, fixed ones their sizes (`sources.axes`); constants are folded;
 (6) onnx.checker accepts it, and no value is larger than a computer (`sources.loading`);
 (7) ONNX Runtime loads it in bounded time and memory; where an output's axes are still open, it is run to see them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from compiler import sources
from compiler.sources import SourceOptions, axes, loading, normal_form, onnx_file, operators
from isthmus.bundle import TensorSpec
from isthmus.errors import InputError
from isthmus.tensors import DATATYPE_OF


@dataclass(frozen=True, slots=True)
class CapturedModel:
    """A checked model: `path` holds all of it, `sha256` is the digest of the source file or files.

    Axes that may vary are -1 in the specs and have names in `axes`: "batch" is the one that samples are counted along
    (first where a model can be batched by Triton and the agent), any other is a length, for example "sequence".
    """

    path: Path
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attention: bool  # a softmax feeds a matrix product: quantization treats the graph as a transformer
    axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # tensor -> name of each axis, "" for fixed ones
    lengths: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # axis -> shortest and longest, batch too


def capture(source: str | Path, destination: Path, options: SourceOptions | None = None) -> CapturedModel:
    """Read the model in `source` and write it to `destination`, as one self-contained ONNX file.

    The same source and options give the same bytes.

    Raises:
        InputError: It breaks one of the rules above; the message names the source and the tensor or node.
        MissingExtraError: A library that this kind of source needs is not installed.
    """
    options = SourceOptions() if options is None else options
    what = str(source)
    sha256 = sources.digest(source, options)
    with TemporaryDirectory(prefix="capture-", dir=destination.parent) as name:
        folder = Path(name)
        # (1)
        exported = sources.to_onnx(source, options, folder)
        # (2)
        model = onnx_file.load(exported.path)
        # (3)
        operators.check_operators(model, what)
        model = operators.inline_functions(model, what)
        # (4)
        normal_form.strip(model)
        normal_form.drop_weight_inputs(model)
        if not model.graph.input or not model.graph.output:
            raise InputError(f"{what}: expected at least one input and one output")
        if options.outputs:
            normal_form.keep_outputs(model, options.outputs, what)
        # (5)
        own = axes.rename_axes(model, axes.name_input_axes(model, what))
        axes.fix_lengths(model, {name: at for name, at in options.lengths.items() if name not in exported.used}, what)
        constants = {name: value for name, value in options.constants.items() if name not in exported.used}
        normal_form.bake_constants(model, constants, what)
        if constants:  # branches that depend on one are decided now: most targets have no branches
            model = loading.fold(model, folder, what)
            normal_form.strip(model)
            operators.check_operators(model, what)
    # (6)
    slim = loading.skeleton(model)
    loading.check(slim, what)
    axes.take_inferred(model, loading.infer(slim, {value.name for value in model.graph.input}, what))
    ends = (*model.graph.input, *model.graph.output)
    datatypes = {value.name: _datatype(value, what) for value in ends}
    # (7)
    lengths = _settle(model, axes.ranges(model, options.lengths, exported.lengths), own, destination, what)
    specs = {value.name: _spec(value, datatypes[value.name], what) for value in ends}
    return CapturedModel(
        destination,
        sha256,
        tuple(specs[value.name] for value in model.graph.input),
        tuple(specs[value.name] for value in model.graph.output),
        _has_attention(model.graph),
        {value.name: tuple(dim.dim_param for dim in value.type.tensor_type.shape.dim) for value in ends},
        lengths,
    )


def check_same_interface(light: CapturedModel, heavy: CapturedModel, *, features: str = "") -> None:
    """Check that both models take and give the same tensors: an escalated request is forwarded as it came.

    Args:
        light: The light model.
        heavy: The heavy model.
        features: A further output of the light model, which no client sees.

    Raises:
        InputError: They differ; the message names the first difference.
    """
    answers = tuple(spec for spec in light.outputs if spec.name != features)
    for what, ours, theirs in (("input", light.inputs, heavy.inputs), ("output", answers, heavy.outputs)):
        first, second = ({spec.name: spec for spec in specs} for specs in (ours, theirs))
        for name in sorted(first.keys() | second.keys()):
            if first.get(name) != second.get(name):
                raise InputError(
                    f"light and heavy model must have the same {what}s; {name!r} is {_describe(first.get(name))} "
                    f"in the light model and {_describe(second.get(name))} in the heavy one"
                )


def _describe(spec: TensorSpec | None) -> str:
    return "absent" if spec is None else f"{spec.datatype}{list(spec.shape)}"


def _settle(
    model: Any,
    ranges: Mapping[str, tuple[int, int]],
    own: Mapping[tuple[str, int], str],
    destination: Path,
    what: str,
) -> dict[str, tuple[int, int]]:
    """Write the model, load it, and name what is still open of its outputs; return the ranges of the axes it has."""
    _write(model, destination, what)
    is_open = axes.open_axes(model) or bool(loading.loose_axes(model.graph.input))
    observed = loading.load(destination, model.graph.input, observe=is_open, ranges=ranges, what=what)
    if not is_open:
        return dict(ranges)
    axes.merge_batch(model, observed.batch)
    axes.name_output_axes(model, observed.shapes, own)
    _write(model, destination, what)
    return {name: length for name, length in ranges.items() if name not in observed.batch}


def _write(model: Any, destination: Path, what: str) -> None:
    try:
        destination.write_bytes(model.SerializeToString(deterministic=True))
    except OSError as error:
        raise InputError(f"{what}: cannot write {destination}: {error.strerror}", hint="free some space") from error


def _datatype(value: Any, what: str) -> str:
    import onnx

    number = value.type.tensor_type.elem_type
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(number).newbyteorder("<")
    except (KeyError, ValueError) as error:
        raise InputError(f"{what}: {value.name!r}: unknown datatype {number}") from error
    datatype = DATATYPE_OF.get(dtype)
    if datatype is None:
        raise InputError(f"{what}: {value.name!r}: datatype {dtype} has no name in the Open Inference Protocol")
    return datatype


def _spec(value: Any, datatype: str, what: str) -> TensorSpec:
    shape = tuple(-1 if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim)
    try:
        return TensorSpec.model_validate({"name": value.name, "datatype": datatype, "shape": shape})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]["msg"]
        raise InputError(f"{what}: {value.name[:200]!r} with the shape {list(shape)[:20]}: {first[:200]}") from error


def _has_attention(graph: Any) -> bool:
    products = {name for node in graph.node if node.op_type == "MatMul" for name in node.input}
    through = {
        name: node.output for node in graph.node if node.op_type in {"Cast", "Dropout", "Where"} for name in node.input
    }
    for node in graph.node:
        if node.op_type == "Attention":
            return True
        if node.op_type == "Softmax":
            reached = {*node.output, *(name for output in node.output for name in through.get(output, ()))}
            if reached & products:
                return True
    return False
