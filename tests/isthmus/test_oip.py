"""OIP helpers: parameters of every type, and fields replaced without touching the tensors."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from isthmus.oip import override_fields, read_parameters, service_pb2, set_parameter
from isthmus.tensors import encode_request


def test_parameters_keep_their_types() -> None:
    response = service_pb2.ModelInferResponse()
    values: dict[str, str | bool | float] = {"flag": True, "count": 3, "score": 0.5, "route": "edge"}
    for name, value in values.items():
        set_parameter(response, name, value)
    read = read_parameters(response.parameters)
    assert read == values
    assert [type(read[name]) for name in values] == [bool, int, float, str]


@given(name=st.text(max_size=20), version=st.text(max_size=20), request_id=st.text(max_size=20))
def test_overriding_replaces_what_is_given_and_keeps_the_rest(name: str, version: str, request_id: str) -> None:
    original = encode_request("before", {"x": np.ones((1, 3), np.float32)}, version="1", request_id="id")
    raw = original.SerializeToString()
    merged = service_pb2.ModelInferRequest.FromString(
        override_fields(raw, model_name=name, model_version=version, request_id=request_id)
    )
    assert merged.model_name == (name or "before")
    assert merged.model_version == (version or "1")
    assert merged.id == (request_id or "id")
    assert merged.inputs == original.inputs
    assert merged.raw_input_contents == original.raw_input_contents
