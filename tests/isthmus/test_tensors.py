"""Tensors: arrays survive the wire, and nothing that does not match the declaration gets past the door."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isthmus.bundle import TensorSpec
from isthmus.errors import InputError
from isthmus.oip import service_pb2
from isthmus.tensors import DTYPES, decode_inputs, decode_outputs, encode_outputs, encode_request

SPECS = (
    TensorSpec(name="ids", datatype="INT64", shape=(-1, 4)),
    TensorSpec(name="mask", datatype="BOOL", shape=(-1, 2)),
)


def good(batch: int = 2) -> Any:
    ids = np.arange(batch * 4, dtype=np.int64).reshape(batch, 4)
    return encode_request("m", {"ids": ids, "mask": np.ones((batch, 2), bool)})


@given(data=st.data(), name=st.sampled_from(sorted(DTYPES)))
def test_every_datatype_survives_the_wire(data: st.DataObject, name: str) -> None:
    array = data.draw(hnp.arrays(DTYPES[name], st.tuples(st.integers(1, 5), st.integers(1, 4))))
    spec = TensorSpec(name="x", datatype=name, shape=(-1, array.shape[1]))
    request = service_pb2.ModelInferRequest.FromString(encode_request("m", {"x": array}).SerializeToString())
    decoded = decode_inputs(request, [spec], max_batch=5)["x"]
    assert decoded.dtype == array.dtype
    assert decoded.tobytes() == array.tobytes()
    response = service_pb2.ModelInferResponse()
    encode_outputs(response, {"y": array})
    assert decode_outputs(response)["y"].tobytes() == array.tobytes()


def test_typed_contents_are_read_too() -> None:
    request = service_pb2.ModelInferRequest(model_name="m")
    tensor = request.inputs.add(name="x", datatype="INT64", shape=[1, 3])
    tensor.contents.int64_contents.extend([1, -2, 3])
    spec = TensorSpec(name="x", datatype="INT64", shape=(-1, 3))
    assert decode_inputs(request, [spec], max_batch=1)["x"].tolist() == [[1, -2, 3]]


def test_typed_values_that_do_not_fit_are_refused() -> None:
    request = service_pb2.ModelInferRequest(model_name="m")
    tensor = request.inputs.add(name="x", datatype="INT8", shape=[1, 1])
    tensor.contents.int_contents.append(300)
    with pytest.raises(InputError, match="do not fit INT8"):
        decode_inputs(request, [TensorSpec(name="x", datatype="INT8", shape=(-1, 1))], max_batch=1)


def drop_input(request: Any) -> None:
    del request.inputs[1], request.raw_input_contents[1]


def rename_input(request: Any) -> None:
    request.inputs[0].name = "idz"


def repeat_input(request: Any) -> None:
    request.inputs[1].name = "ids"


def wrong_datatype(request: Any) -> None:
    request.inputs[0].datatype = "INT32"


def wrong_shape(request: Any) -> None:
    request.inputs[0].shape[1] = 5


def negative_shape(request: Any) -> None:
    request.inputs[0].shape[0] = -2


def huge_batch(request: Any) -> None:
    request.inputs[0].shape[0] = 1 << 40


def missing_axis(request: Any) -> None:
    del request.inputs[0].shape[1]


def short_bytes(request: Any) -> None:
    request.raw_input_contents[0] = request.raw_input_contents[0][:-1]


def surplus_raw(request: Any) -> None:
    request.raw_input_contents.append(b"")


def unequal_batches(request: Any) -> None:
    request.inputs[1].shape[0] = 1
    request.raw_input_contents[1] = b"\x01\x01"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (drop_input, "missing input mask"),
        (rename_input, "unknown input 'idz'; the model's inputs are ids, mask"),
        (repeat_input, "given twice"),
        (wrong_datatype, "expected datatype INT64, got 'INT32'"),
        (wrong_shape, r"expected shape \[-1, 4\], got \[2, 5\]"),
        (negative_shape, "expected shape"),
        (huge_batch, "larger than the limit of 8"),
        (missing_axis, "expected shape"),
        (short_bytes, "takes 64 bytes, got 63"),
        (surplus_raw, "expected 2 raw_input_contents"),
        (unequal_batches, "same batch size"),
    ],
)
def test_what_does_not_match_is_refused_with_both_sides(spoil: Any, says: str) -> None:
    request = good()
    spoil(request)
    with pytest.raises(InputError, match=says):
        decode_inputs(request, SPECS, max_batch=8)


def test_an_unknown_output_lists_those_there_are() -> None:
    with pytest.raises(InputError, match="the model's outputs are logits"):
        encode_outputs(service_pb2.ModelInferResponse(), {"logits": np.zeros((1, 2), np.float32)}, ["logit"])


def test_answers_with_wrong_byte_counts_are_refused() -> None:
    response = service_pb2.ModelInferResponse()
    encode_outputs(response, {"y": np.zeros((1, 2), np.float32)})
    response.raw_output_contents[0] = b"123"
    with pytest.raises(InputError, match="byte count"):
        decode_outputs(response)


def test_answers_with_more_axes_than_arrays_have_are_refused() -> None:
    response = service_pb2.ModelInferResponse()
    response.outputs.add(name="y", datatype="UINT8", shape=[1] * 100)
    response.raw_output_contents.append(b"x")
    with pytest.raises(InputError, match="unusable shape"):
        decode_outputs(response)
