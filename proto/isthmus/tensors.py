"""Tensors on the wire: OIP requests and responses to numpy arrays and back, checked once at the door.

Rules: shapes and datatypes are checked against the model's declared ones before any byte is interpreted; the number of
bytes must be exactly what shape and datatype say; axes declared -1 may vary within limits, all others may not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.bundle import TensorSpec
from isthmus.errors import InputError
from isthmus.oip import service_pb2

Array = NDArray[Any]

DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
DATATYPE_OF: Final[Mapping[np.dtype[Any], str]] = {dtype: name for name, dtype in DTYPES.items()}

# The field of InferTensorContents that holds a datatype's values; a datatype that has none comes raw.
CONTENTS_OF: Final[Mapping[str, str]] = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
    "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents",
}  # fmt: skip


def decode_inputs(
    request: Any, specs: Sequence[TensorSpec], *, max_batch: int, max_length: int = 65_536
) -> dict[str, Array]:
    """Return the request's input tensors by name.

    Args:
        request: A ModelInferRequest with raw or typed contents.
        specs: The model's declared inputs; a first axis of -1 is the batch, any other of -1 a length.
        max_batch: Largest batch that is accepted.
        max_length: Largest length that is accepted.

    Raises:
        InputError: A tensor is missing, unknown, given twice, or its datatype, shape or byte count is wrong.
    """
    by_name = {spec.name: spec for spec in specs}
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InputError(f"expected {len(request.inputs)} raw_input_contents, one for each input, got {len(raw)}")
    arrays: dict[str, Array] = {}
    for index, tensor in enumerate(request.inputs):
        spec = by_name.get(tensor.name)
        if spec is None:
            raise InputError(f"unknown input {tensor.name[:80]!r}; the model's inputs are {', '.join(by_name)}")
        if tensor.name in arrays:
            raise InputError(f"input {tensor.name!r} is given twice")
        shape = _check_declared(tensor, spec, max_batch, max_length)
        arrays[spec.name] = _from_raw(raw[index], shape, spec) if raw else _from_typed(tensor, spec)
    if len(arrays) < len(by_name):
        missing = [name for name in by_name if name not in arrays]
        raise InputError(f"missing input {', '.join(missing)}; the model's inputs are {', '.join(by_name)}")
    if len(arrays) > 1:
        _check_batches(arrays, by_name)
    return arrays


def _check_batches(arrays: Mapping[str, Array], by_name: Mapping[str, TensorSpec]) -> None:
    batches = {len(array) for name, array in arrays.items() if by_name[name].shape[:1] == (-1,)}
    if len(batches) > 1:
        raise InputError(f"all inputs must have the same batch size, got {sorted(batches)}")


def _check_declared(tensor: Any, spec: TensorSpec, max_batch: int, max_length: int) -> tuple[int, ...]:
    """Return the tensor's shape."""
    if tensor.datatype != spec.datatype:
        raise InputError(f"input {spec.name!r}: expected datatype {spec.datatype}, got {tensor.datatype[:16]!r}")
    shape = tuple(tensor.shape)
    too_large = ""
    fits = len(shape) == len(spec.shape)
    for axis, (want, got) in enumerate(zip(spec.shape, shape, strict=False)):
        if want != -1:
            fits = fits and want == got
        elif got < 1:
            fits = False
        elif got > (max_length if axis else max_batch):
            too_large = f"{'length' if axis else 'batch'} of {got} is larger than the limit of "
            too_large += str(max_length if axis else max_batch)
    if not fits:
        raise InputError(f"input {spec.name!r}: expected shape {list(spec.shape)}, got {list(shape)[:8]}")
    if too_large:
        raise InputError(f"input {spec.name!r}: {too_large}")
    return shape


def _from_raw(data: bytes, shape: tuple[int, ...], spec: TensorSpec) -> Array:
    dtype = DTYPES[spec.datatype]
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise InputError(
            f"input {spec.name!r}: shape {list(shape)} {spec.datatype} takes {expected} bytes, got {len(data)}"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def _from_typed(tensor: Any, spec: TensorSpec) -> Array:
    field = CONTENTS_OF.get(spec.datatype)
    if field is None:
        raise InputError(f"input {spec.name!r}: datatype {spec.datatype} must be sent as raw_input_contents")
    values = getattr(tensor.contents, field)
    expected = math.prod(tensor.shape)
    if len(values) != expected:
        raise InputError(f"input {spec.name!r}: shape {list(tensor.shape)} takes {expected} values, got {len(values)}")
    try:
        wide = np.asarray(values)
        array = wide.astype(DTYPES[spec.datatype])
    except (OverflowError, ValueError) as error:
        raise InputError(f"input {spec.name!r}: values do not fit {spec.datatype}") from error
    if array.dtype.kind in "iu" and not np.array_equal(array, wide):
        raise InputError(f"input {spec.name!r}: values do not fit {spec.datatype}")
    return array.reshape(tuple(tensor.shape))


def encode_request(model: str, inputs: Mapping[str, Array], *, version: str = "", request_id: str = "") -> Any:
    """Return a ModelInferRequest with the arrays as raw contents."""
    request = service_pb2.ModelInferRequest(model_name=model, model_version=version, id=request_id)
    for name, array in inputs.items():
        tensor = request.inputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        request.raw_input_contents.append(np.ascontiguousarray(array, dtype=DTYPES[tensor.datatype]).tobytes())
    return request


def encode_outputs(response: Any, outputs: Mapping[str, Array], wanted: Sequence[str] = ()) -> None:
    """Append the arrays to a ModelInferResponse as raw contents; `wanted` names a subset, empty means all.

    Raises:
        InputError: A wanted output does not exist.
    """
    for name in wanted:
        if name not in outputs:
            raise InputError(f"unknown output {name[:80]!r}; the model's outputs are {', '.join(outputs)}")
    for name, array in outputs.items():
        if wanted and name not in wanted:
            continue
        response.outputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        response.raw_output_contents.append(array.tobytes())  # row by row, however it lies in memory


def decode_outputs(response: Any) -> dict[str, Array]:
    """Return a ModelInferResponse's raw outputs by name.

    Raises:
        InputError: A tensor's byte count does not match its shape and datatype, or one of the two is unusable.
    """
    if len(response.raw_output_contents) != len(response.outputs):
        raise InputError(
            f"expected {len(response.outputs)} raw outputs in the answer, got {len(response.raw_output_contents)}"
        )
    arrays: dict[str, Array] = {}
    for tensor, data in zip(response.outputs, response.raw_output_contents, strict=True):
        dtype = DTYPES.get(tensor.datatype)
        if dtype is None or any(axis < 0 for axis in tensor.shape):
            raise InputError(f"output {tensor.name[:80]!r}: unknown datatype {tensor.datatype!r} or negative shape")
        if math.prod(tensor.shape) * dtype.itemsize != len(data):
            raise InputError(f"output {tensor.name[:80]!r}: byte count does not match shape and datatype")
        try:
            arrays[tensor.name] = np.frombuffer(data, dtype=dtype).reshape(tuple(tensor.shape))
        except ValueError as error:  # more axes, or longer ones, than an array can have
            raise InputError(f"output {tensor.name[:80]!r}: unusable shape {list(tensor.shape)[:8]}") from error
    return arrays


def datatype_of(array: Array) -> str:
    """Return the OIP name of the array's dtype.

    Raises:
        InputError: OIP has no such datatype.
    """
    name = DATATYPE_OF.get(array.dtype) or DATATYPE_OF.get(array.dtype.newbyteorder("<"))
    if name is None:
        raise InputError(f"no OIP datatype for numpy dtype {array.dtype}")
    return name
