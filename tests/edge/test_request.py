"""What a request may say, for datatypes and parameters that the light model of the other tests does not have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge.request import Options, check_form, check_values, read_options
from isthmus.bundle import TensorSpec
from isthmus.errors import InputError
from isthmus.oip import service_pb2
from isthmus.tensors import CONTENTS_OF, DTYPES, Array, decode_inputs


def request_with(datatype: str, field: str, values: list[Any]) -> Any:
    request = service_pb2.ModelInferRequest()
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[len(values)])
    getattr(tensor.contents, field).extend(values)
    return request


@pytest.mark.parametrize("datatype", CONTENTS_OF)
def test_typed_contents_are_read_from_the_field_of_their_datatype(datatype: str) -> None:
    spec = TensorSpec(name="x", datatype=datatype, shape=(-1,))
    request = request_with(datatype, CONTENTS_OF[datatype], [True, False])
    check_form(request, [spec], [])
    assert decode_inputs(request, [spec], max_batch=8)["x"].dtype == DTYPES[datatype]
    other = "bytes_contents"
    with pytest.raises(InputError, match=f"{datatype} is expected in {CONTENTS_OF[datatype]}, got {other}"):
        check_form(request_with(datatype, other, [b"1"]), [spec], [])


@pytest.mark.parametrize(
    ("datatype", "field", "value"),
    [
        ("UINT8", "uint_contents", 256),
        ("UINT16", "uint_contents", 1 << 16),
        ("INT8", "int_contents", 128),
        ("INT8", "int_contents", -129),
        ("INT16", "int_contents", 1 << 15),
    ],
)
def test_values_beyond_their_datatype_are_refused(datatype: str, field: str, value: int) -> None:
    spec = TensorSpec(name="x", datatype=datatype, shape=(-1,))
    request = request_with(datatype, field, [value])
    check_form(request, [spec], [])
    with pytest.raises(InputError, match=f"values do not fit {datatype}"):
        decode_inputs(request, [spec], max_batch=8)


def test_half_precision_comes_raw() -> None:
    spec = TensorSpec(name="x", datatype="FP16", shape=(-1,))
    request = request_with("FP16", "fp32_contents", [1.0])
    check_form(request, [spec], [])
    with pytest.raises(InputError, match="FP16 must be sent as raw_input_contents"):
        decode_inputs(request, [spec], max_batch=8)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
def test_numbers_are_finite(dtype: str) -> None:
    array = np.ones((2, 3), dtype)
    check_values({"x": array})
    for value in (np.nan, np.inf, -np.inf):
        array[1, 2] = value
        with pytest.raises(InputError, match="input 'x': expected finite numbers, got 1 of NaN or infinity"):
            check_values({"x": array})
        check_values({"x": array}, allow_non_finite=True)
    check_values({"x": np.full((2, 3), np.finfo(dtype).max, dtype)})


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_])
def test_other_datatypes_have_no_such_values(dtype: Any) -> None:
    check_values({"x": np.ones(4, dtype)})


def test_truth_is_0_or_1() -> None:
    array: Array = np.frombuffer(b"\x00\x01\x02", np.bool_)
    with pytest.raises(InputError, match="expected BOOL bytes of 0 and 1, got 2"):
        check_values({"x": array})


def test_options_of_parameters() -> None:
    request = service_pb2.ModelInferRequest()
    assert read_options(request) == Options()
    request.parameters["isthmus.route"].string_param = "cloud"
    request.parameters["timeout"].int64_param = 1_500_000
    request.parameters["priority"].uint64_param = 1
    request.parameters["sequence_id"].int64_param = 0
    request.parameters["sequence_start"].bool_param = False
    request.parameters["shop"].double_param = 0.5
    options = read_options(request)
    assert (options.route, options.hedge, options.timeout_s) == ("cloud", None, 1.5)
    assert options.values["shop"] == 0.5
