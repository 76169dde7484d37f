"""The head of a request, read from the wire, against the real parser."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isthmus.errors import InputError
from isthmus.oip import override_fields, read_parameters, service_pb2, set_parameter
from isthmus.oip_head import RequestHead, read_head
from isthmus.tensors import encode_request


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out) + bytes([number])


def tag(number: int, kind: int) -> bytes:
    return varint(number << 3 | kind)


def text(number: int, value: bytes) -> bytes:
    return tag(number, 2) + varint(len(value)) + value


numbers = st.integers(0, 9) | st.integers(0, 2**29)
values = st.one_of(
    st.tuples(numbers, st.integers(0, 2**64 - 1)).map(lambda v: tag(v[0], 0) + varint(v[1])),
    st.tuples(numbers, st.binary(min_size=8, max_size=8)).map(lambda v: tag(v[0], 1) + v[1]),
    st.tuples(numbers, st.binary(min_size=4, max_size=4)).map(lambda v: tag(v[0], 5) + v[1]),
    st.tuples(numbers, st.binary(max_size=12)).map(lambda v: text(*v)),
    st.tuples(st.integers(1, 3), st.text(max_size=6)).map(lambda v: text(v[0], v[1].encode())),
    st.tuples(numbers, st.binary(max_size=8)).map(lambda v: tag(v[0], 3) + v[1] + tag(v[0], 4)),
    st.binary(max_size=6),
    # Lengths and tags that are longer than they need be, or negative.
    st.tuples(st.sampled_from((0x0A, 0x12, 0x1A, 0x3A)), st.integers(0, 9)).map(
        lambda v: bytes([v[0]]) + b"\x80" * v[1] + b"\x00"
    ),
    st.just(b"\x0a" + b"\xff" * 9 + b"\x01"),
    st.just(b"\x8a\x80\x80\x80\x00\x01n"),
    st.just(encode_request("triage", {"x": np.ones((1, 3), np.float32)}, request_id="r").SerializeToString()),
)
messages = st.lists(values, max_size=8).map(b"".join) | st.binary(max_size=40)


def head_of(raw: bytes) -> RequestHead | None:
    try:
        return read_head(raw)
    except InputError:
        return None


@settings(max_examples=1000, deadline=None)
@given(raw=messages)
@example(b"\x0a\x01a\x0a\x01b")
@example(b"\x0a\x01\xff\x0a\x01b")
@example(b"\x0b")
@example(b"\x0b\x0c")
@example(b"\x08\x01\x0a\x01n")
@example(b"\x0a\x7fshort")
def test_it_reads_what_the_real_parser_reads(raw: bytes) -> None:
    compare(raw)


def compare(raw: bytes) -> None:
    head = head_of(raw)
    try:
        real = service_pb2.ModelInferRequest.FromString(raw)
    except DecodeError:
        if head is not None:  # tensors are not looked at; but what is appended must still be what counts
            for end in (b"", text(7, b"data")):
                follow = read_head(override_fields(raw + end, model_name="m", model_version="1"))
                assert (follow.model_name, follow.model_version, follow.id) == ("m", "1", head.id)
        return
    assert head is not None
    assert (head.model_name, head.model_version, head.id) == (real.model_name, real.model_version, real.id)
    assert head.parameters() == read_parameters(real.parameters)
    rest = service_pb2.ModelInferRequest.FromString(b"".join(head.content()))
    for name in ("model_name", "model_version", "id", "parameters"):
        real.ClearField(name)
    for message in (rest, real):  # a parameter with something unknown in it is an unknown field, which is kept
        message.parameters.clear()
        message.DiscardUnknownFields()
    assert rest == real


@settings(max_examples=500, deadline=None)
@given(cut=st.integers(0, 200), position=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_damaged_request_is_read_as_the_real_parser_reads_it_or_refused(cut: int, position: int, byte: int) -> None:
    request = encode_request("triage", {"x": np.ones((1, 3), np.float32)}, version="7", request_id="r-1")
    set_parameter(request, "isthmus.key", "k")
    raw = bytearray(request.SerializeToString())
    raw[position % len(raw)] = byte
    compare(bytes(raw[: cut or None]))


def test_the_names_and_parameters_of_a_usual_request() -> None:
    request = encode_request("triage", {"x": np.ones((64, 300), np.float32)}, version="7", request_id="r-1")
    set_parameter(request, "isthmus.key", "meter-9")
    head = read_head(request.SerializeToString())
    assert (head.model_name, head.model_version, head.id) == ("triage", "7", "r-1")
    assert head.parameters() == {"isthmus.key": "meter-9"}


def test_requests_that_differ_in_names_only_have_the_same_tensors() -> None:
    one = encode_request("triage", {"x": np.ones((1, 3), np.float32)}, request_id="a")
    two = encode_request("triage", {"x": np.ones((1, 3), np.float32)}, version="2", request_id="b")
    three = encode_request("triage", {"x": np.zeros((1, 3), np.float32)}, request_id="a")
    first, second, third = (b"".join(read_head(r.SerializeToString()).content()) for r in (one, two, three))
    assert first == second != third


@pytest.mark.parametrize("raw", [b"\x00\x00", b"\x0c", b"\x0f", b"\x0a" + b"\xff" * 11, b"\x3a\xff\xff\xff\xff\x0f"])
def test_what_is_no_message_is_refused(raw: bytes) -> None:
    with pytest.raises(InputError, match="not a ModelInferRequest"):
        read_head(raw)


def test_parameters_that_do_not_matter_are_left_out_of_the_content() -> None:
    requests = []
    for values in ({}, {"timeout": 5}, {"timeout": 7}, {"mode": "fast"}, {"mode": "fast", "timeout": 1}):
        request = encode_request("triage", {"x": np.ones((1, 3), np.float32)})
        for name, value in values.items():
            set_parameter(request, name, value)  # type: ignore[arg-type]
        requests.append(b"".join(read_head(request.SerializeToString()).content(lambda name: name == "timeout")))
    assert requests[0] == requests[1] == requests[2] != requests[3] == requests[4]
