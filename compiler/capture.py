"""ONNX in: one file, checked, made self-contained, with its inputs and outputs as the bundle describes them.

The steps of `capture`:
 (1) the file is there and small enough to be one protocol-buffers message;
 (2) it parses; weights kept in other files lie inside the model's folder, and are read in;
 (3) onnx.checker accepts it;
 (4) every input and output is a tensor of a known datatype with a symbolic batch axis and no other symbolic one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from isthmus.bundle import TensorSpec
from isthmus.digests import sha256_bytes, sha256_file
from isthmus.errors import InputError
from isthmus.tensors import DATATYPE_OF

MAX_MODEL_BYTES: Final = (1 << 31) - (1 << 20)  # protocol buffers hold less than 2 GiB


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


def capture(source: Path, destination: Path) -> CapturedModel:
    """Check the ONNX model in `source` and write it, self-contained, to `destination`.

    Raises:
        InputError: It breaks one of the rules above; the message names the file and the tensor.
    """
    import onnx

    # (1)
    data = _read(source)
    # (2)
    model = _parse(data, source)
    outside = [tensor for tensor in _tensors(model.graph) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    files = _external_files(outside, source)
    if files:
        onnx.load_external_data_for_model(model, str(source.parent))
        data = model.SerializeToString(deterministic=True)
    # (3)
    try:
        onnx.checker.check_model(data)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise InputError(f"{source}: not a valid ONNX model: {str(error).strip().splitlines()[0][:300]}") from error
    # (4)
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(_spec(value, source) for value in model.graph.input if value.name not in initializers)
    outputs = tuple(_spec(value, source) for value in model.graph.output)
    if not inputs or not outputs:
        raise InputError(f"{source}: expected at least one input and one output")
    destination.write_bytes(data)
    digests = [sha256_file(source), *(sha256_file(file) for file in files)]
    sha256 = digests[0] if len(digests) == 1 else sha256_bytes("\n".join(digests).encode())
    return CapturedModel(destination, sha256, inputs, outputs, _has_attention(model.graph))


def check_same_interface(light: CapturedModel, heavy: CapturedModel) -> None:
    """Check that both models take and give the same tensors: an escalated request is forwarded as it came.

    Raises:
        InputError: They differ; the message names the first difference.
    """
    for what, ours, theirs in (("input", light.inputs, heavy.inputs), ("output", light.outputs, heavy.outputs)):
        first, second = ({spec.name: spec for spec in specs} for specs in (ours, theirs))
        for name in sorted(first.keys() | second.keys()):
            if first.get(name) != second.get(name):
                raise InputError(
                    f"light and heavy model must have the same {what}s; {name!r} is {_describe(first.get(name))} "
                    f"in the light model and {_describe(second.get(name))} in the heavy one"
                )


def _describe(spec: TensorSpec | None) -> str:
    return "absent" if spec is None else f"{spec.datatype}{list(spec.shape)}"


def _read(source: Path) -> bytes:
    try:
        size = source.stat().st_size
        if size > MAX_MODEL_BYTES:
            raise InputError(f"{source}: expected a model of at most {MAX_MODEL_BYTES} bytes, got {size}")
        return source.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {source}: {error.strerror}", hint="light.source and heavy.source name ONNX files"
        ) from error


def _parse(data: bytes, source: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise InputError(f"{source}: not an ONNX file", hint="torch.onnx.export writes one") from error
    if not model.graph.node:
        raise InputError(f"{source}: not an ONNX model, or one without a single operator")
    return model


def _tensors(graph: Any) -> Iterator[Any]:
    """Yield every tensor of the graph, those in operators' attributes and nested graphs too."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for nested in (attribute.g, *attribute.graphs):
                yield from _tensors(nested)


def _external_files(tensors: list[Any], source: Path) -> list[Path]:
    """Return the files that hold weights, after checking that they are plain files inside the model's folder."""
    folder = source.resolve().parent
    files: set[Path] = set()
    for tensor in tensors:
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        path = folder / location
        inside = bool(location) and path.resolve().is_relative_to(folder) and not Path(location).is_absolute()
        if not inside or path.is_symlink() or not path.is_file():
            raise InputError(
                f"{source}: weights of {tensor.name!r}: expected a file in the model's folder, got {location!r}"
            )
        files.add(path)
    total = source.stat().st_size + sum(path.stat().st_size for path in files)
    if total > MAX_MODEL_BYTES:
        raise InputError(f"{source}: expected a model of at most {MAX_MODEL_BYTES} bytes with its weights, got {total}")
    return sorted(files)


def _spec(value: Any, source: Path) -> TensorSpec:
    import onnx

    if not value.type.HasField("tensor_type"):
        raise InputError(f"{source}: {value.name!r}: expected a tensor")
    tensor = value.type.tensor_type
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).newbyteorder("<")
    except (KeyError, ValueError) as error:
        raise InputError(f"{source}: {value.name!r}: unknown datatype {tensor.elem_type}") from error
    datatype = DATATYPE_OF.get(dtype)
    if datatype is None:
        raise InputError(f"{source}: {value.name!r}: datatype {dtype} has no name in the Open Inference Protocol")
    dims = tensor.shape.dim
    fixed = [dim.dim_value for dim in dims[1:]]
    if not dims or dims[0].HasField("dim_value") or any(size < 1 for size in fixed):
        shape = [dim.dim_param or dim.dim_value or "?" for dim in dims]
        raise InputError(
            f"{source}: {value.name!r}: expected a symbolic batch axis first and fixed axes after it, got {shape}",
            hint="export the model with a dynamic first axis only",
        )
    return TensorSpec.model_validate({"name": value.name, "datatype": datatype, "shape": (-1, *fixed)})


def _has_attention(graph: Any) -> bool:
    products = {name for node in graph.node if node.op_type == "MatMul" for name in node.input}
    through = {name: node.output for node in graph.node if node.op_type in {"Cast", "Dropout"} for name in node.input}
    for node in graph.node:
        if node.op_type == "Attention":
            return True
        if node.op_type == "Softmax":
            reached = {*node.output, *(name for output in node.output for name in through.get(output, ()))}
            if reached & products:
                return True
    return False
