"""Sealed inputs: they open for who they were made for, in their place, and nowhere else."""

from __future__ import annotations

import base64
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import x25519
from hypothesis import given
from hypothesis import strategies as st

from isthmus.envelopes import ContentKey, Opener
from isthmus.errors import InputError, TrustError
from isthmus.oip import service_pb2
from isthmus.sealed import (
    Binding,
    SealingKey,
    binding_of_token,
    is_sealed,
    open_request,
    parse_keys,
    seal_request,
)
from isthmus.tensors import encode_request
from security.sealing import load_gateway_keys, rotate_sealing_keys
from security.workspace import init_workspace

PRIVATE = x25519.X25519PrivateKey.generate()
KEY = SealingKey("00112233445566ff", PRIVATE.public_key())
KEYS = {KEY.id: PRIVATE}
READER = Binding("default", "reader-7")
SECRET = np.array([[3.5, 1.25, -7.0, 42.0]], np.float32)


def request(**more: str) -> service_pb2.ModelInferRequest:
    return encode_request("triage", {"x": SECRET, "hint": np.array([1], np.int64)}, request_id="q-1", **more)


def test_what_was_sealed_is_what_opens() -> None:
    for names in (["x"], ["x", "hint"], ["*"]):
        sealed = seal_request(request(), KEY, READER, names)
        assert is_sealed(sealed)
        assert SECRET.tobytes() not in sealed.SerializeToString()
        assert open_request(sealed, KEYS, READER) == request()


def test_an_input_that_is_not_named_stays_readable() -> None:
    sealed = seal_request(request(), KEY, READER, ["x"])
    assert sealed.inputs[1] == request().inputs[1]
    assert sealed.raw_input_contents[1] == request().raw_input_contents[1]


def test_typed_contents_and_texts_can_be_sealed() -> None:
    typed = service_pb2.ModelInferRequest(model_name="m", id="1")
    tensor = typed.inputs.add(name="x", datatype="FP32", shape=[2])
    tensor.contents.fp32_contents.extend([1.0, 2.0])
    text = typed.inputs.add(name="text", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(b"dear diary")
    sealed = seal_request(typed, KEY, READER)
    assert b"dear diary" not in sealed.SerializeToString()
    opened = open_request(sealed, KEYS, READER)
    assert opened.raw_input_contents[0] == np.array([1, 2], np.float32).tobytes()
    assert opened.raw_input_contents[1] == b"\x0a\x00\x00\x00dear diary"
    assert [(t.datatype, list(t.shape)) for t in opened.inputs] == [("FP32", [2]), ("BYTES", [1])]


def test_a_request_without_an_id_gets_one_and_no_two_seals_are_alike() -> None:
    bare = encode_request("triage", {"x": SECRET})
    one, two = (seal_request(bare, KEY, READER) for _ in range(2))
    assert one.id
    assert one.id != two.id
    assert seal_request(request(), KEY, READER) != seal_request(request(), KEY, READER)


@pytest.mark.parametrize(
    ("change", "who"),
    [
        ("id", READER), ("model_name", READER), ("tensor name", READER), ("datatype", READER), ("shape", READER),
        ("swap", READER), ("", Binding("acme", "reader-7")), ("", Binding("default", "reader-8")),
    ],
)  # fmt: skip
def test_moved_to_another_place_it_does_not_open(change: str, who: Binding) -> None:
    sealed = seal_request(request(), KEY, READER)
    match change:
        case "id":
            sealed.id = "q-2"
        case "model_name":
            sealed.model_name = "other"
        case "tensor name":
            sealed.inputs[0].name = "y"
        case "datatype":
            sealed.inputs[0].parameters["isthmus.datatype"].string_param = "INT32"
        case "shape":
            sealed.inputs[0].parameters["isthmus.shape"].string_param = "4,1"
        case "swap":
            one, two = sealed.raw_input_contents
            sealed.raw_input_contents[:] = [two, one]
    with pytest.raises(InputError) as raised:
        open_request(sealed, KEYS, who)
    assert raised.value.reason == "sealed-not-openable"


@given(st.data())
def test_no_byte_of_an_envelope_can_be_changed(data: st.DataObject) -> None:
    sealed = seal_request(request(), KEY, READER, ["x"])
    envelope = bytearray(sealed.raw_input_contents[0])
    place = data.draw(st.integers(0, len(envelope) - 1))
    envelope[place] ^= data.draw(st.integers(1, 255))
    sealed.raw_input_contents[0] = bytes(envelope)
    with pytest.raises(InputError) as raised:
        open_request(sealed, KEYS, READER)
    assert raised.value.reason in {"sealed-malformed", "sealed-unknown-key", "sealed-not-openable"}


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_words(envelope: bytes) -> None:
    sealed = seal_request(request(), KEY, READER, ["x"])
    sealed.raw_input_contents[0] = envelope
    with pytest.raises(InputError):
        open_request(sealed, KEYS, READER)


@pytest.mark.parametrize("shape", ["", "-1", "x", "1,", "1" * 20, ",".join("1" * 40), "١"])
def test_shapes_that_are_none_are_refused(shape: str) -> None:
    sealed = seal_request(request(), KEY, READER, ["x"])
    sealed.inputs[0].parameters["isthmus.shape"].string_param = shape
    with pytest.raises(InputError):
        open_request(sealed, KEYS, READER)


def test_another_key_says_so() -> None:
    other = SealingKey("ff00000000000000", KEY.public)
    with pytest.raises(InputError, match="ff00000000000000") as raised:
        open_request(seal_request(request(), other, READER), KEYS, READER)
    assert raised.value.reason == "sealed-unknown-key"
    impostor = {KEY.id: x25519.X25519PrivateKey.generate()}
    with pytest.raises(InputError) as raised:
        open_request(seal_request(request(), KEY, READER), impostor, READER)
    assert raised.value.reason == "sealed-not-openable"


def test_a_flag_without_envelopes_and_another_version_are_refused() -> None:
    for version, sealed in (("1", request()), ("2", seal_request(request(), KEY, READER))):
        sealed.parameters["isthmus.sealed"].string_param = version
        with pytest.raises(InputError):
            open_request(sealed, KEYS, READER)


def test_an_input_that_is_not_there_cannot_be_sealed() -> None:
    with pytest.raises(InputError, match="cannot seal 'txet': the inputs are x, hint"):
        seal_request(request(), KEY, READER, ["txet"])


def test_bytes_of_a_context_open_in_it_only() -> None:
    box = ContentKey(KEY).seal(b"captured", ("capture", "triage"))
    assert Opener(KEYS).open(box, ("capture", "triage")) == b"captured"
    for context in (("capture", "other"), ("captur", "etriage"), ()):
        with pytest.raises(InputError):
            Opener(KEYS).open(box, context)


def test_keys_are_the_authoritys_and_rotate_with_overlap(tmp_path: Path) -> None:
    root = tmp_path / "workspace"
    init_workspace(root, ["localhost"], "acme", datetime.now(UTC))
    ca = (root / "trust" / "ca.pem").read_bytes()
    first = parse_keys((root / "trust" / "sealing.json").read_bytes(), ca)
    sealed = seal_request(request(), first.current, READER)
    second = rotate_sealing_keys(root, datetime.now(UTC))
    assert (second.number, [key.id for key in second.keys][1:]) == (2, [first.current.id])
    both = load_gateway_keys(root / "cloud")
    assert both is not None
    assert open_request(sealed, both.private, READER) == request()
    rotate_sealing_keys(root, datetime.now(UTC), drop_older=True)
    newest = load_gateway_keys(root / "cloud")
    assert newest is not None
    assert len(newest.private) == 1
    with pytest.raises(InputError):
        open_request(sealed, newest.private, READER)


def test_a_rotation_where_the_clouds_folder_was_moved_away(tmp_path: Path) -> None:
    root, cloud = tmp_path / "workspace", tmp_path / "cloud"
    init_workspace(root, ["localhost"], "acme", datetime.now(UTC))
    (root / "cloud").rename(cloud)
    second = rotate_sealing_keys(root, datetime.now(UTC))
    assert (second.number, len(second.keys)) == (2, 2)
    shutil.copytree(root / "cloud" / "sealing", cloud / "sealing", dirs_exist_ok=True)
    both = load_gateway_keys(cloud)
    assert both is not None
    assert set(both.private) == {key.id for key in second.keys}
    shutil.rmtree(root / "cloud")
    third = rotate_sealing_keys(root, datetime.now(UTC), drop_older=True)
    shutil.copytree(root / "cloud" / "sealing", cloud / "sealing", dirs_exist_ok=True)
    newest = load_gateway_keys(cloud)
    assert newest is not None
    assert set(newest.private) == {third.current.id}  # the files of the older ones lie there still


def test_keys_that_somebody_else_offers_are_not_taken(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        init_workspace(tmp_path / name, ["localhost"], "acme", datetime.now(UTC))
    ca = (tmp_path / "ours" / "trust" / "ca.pem").read_bytes()
    ours = (tmp_path / "ours" / "trust" / "sealing.json").read_bytes()
    theirs = (tmp_path / "theirs" / "trust" / "sealing.json").read_bytes()
    told = json.loads(ours)
    swapped = told | {"keys": json.loads(theirs)["keys"]}
    number = told | {"number": 99}
    for document in (theirs, json.dumps(swapped).encode(), json.dumps(number).encode(), b"", b"[]", b"{}", b"null"):
        with pytest.raises(TrustError):
            parse_keys(document, ca)


def test_the_holder_of_a_token_reads_its_binding() -> None:
    payload = base64.urlsafe_b64encode(json.dumps({"sub": "carl", "tenant": "acme"}).encode()).rstrip(b"=").decode()
    assert binding_of_token(f"e30.{payload}.x") == Binding("acme", "carl")
    for text in ("", "isk_abc", "a.b.c", "e30.W10.x"):
        with pytest.raises(InputError):
            binding_of_token(text)
