"""What is fuzzed: each target takes bytes, and either accepts them or refuses them as the caller's error.

Anything else that is raised is a defect, and so is an answer that breaks what a target asserts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError

from cloud.fleet_messages import check_labels, checked_report
from cloud.request_names import check_names
from edge.messages import parse_message
from edge.request import check_form, check_values, read_options
from isthmus.bundle import TensorSpec
from isthmus.errors import IdentityError, InputError, PermissionDeniedError
from isthmus.oip import override_fields, service_pb2
from isthmus.tensors import decode_inputs, encode_request
from isthmus.v1 import fleet_pb2
from security.assertions import make_assertion, read_assertion_subject, verify_assertion
from security.enrolment import IssuingCa, make_csr, new_device_key, public_key_of
from security.interceptors import AuthInterceptor, current_claims
from security.tokens import TokenIssuer, describe_token
from security.workspace import init_workspace

REFUSALS: Final = (InputError, IdentityError, PermissionDeniedError)
CORPUS: Final = Path(__file__).parent / "corpus"
_SPECS: Final = (
    TensorSpec(name="x", datatype="FP32", shape=(-1, 3)),
    TensorSpec(name="flags", datatype="BOOL", shape=(-1, 1)),
    TensorSpec(name="ids", datatype="INT64", shape=(-1, -1)),
)
_OUTPUTS: Final = (TensorSpec(name="logits", datatype="FP32", shape=(-1, 3)),)


@dataclass(frozen=True, slots=True)
class Target:
    """One parser."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]

    def check(self, data: bytes) -> bool:
        """Feed it; return whether the bytes were accepted.

        Raises:
            Exception: A defect was found.
        """
        try:
            self.run(data)
        except REFUSALS:
            return False
        return True


@cache
def _workspace() -> Path:
    """Return a workspace that lives as long as this process."""
    root = Path(tempfile.mkdtemp(prefix="isthmus-fuzz-")) / "workspace"
    init_workspace(root, ["cloud.example.org", "127.0.0.1"], "fuzz", datetime.now(UTC))
    return root


@cache
def _issuer() -> TokenIssuer:
    return TokenIssuer.load(_workspace() / "cloud")


@cache
def _authority() -> IssuingCa:
    return IssuingCa.load(_workspace() / "cloud")


@cache
def _device_key() -> Any:
    return new_device_key(_workspace() / "device.key")


def agent_request(data: bytes) -> None:
    """Read an inference request as the agent does."""
    request = parse_message(service_pb2.ModelInferRequest, data)
    read_options(request)
    check_form(request, _SPECS, _OUTPUTS)
    inputs = decode_inputs(request, _SPECS, max_batch=8, max_length=64)
    check_values(inputs)
    rows = {array.shape[0] for array in inputs.values()}
    assert len(rows) == 1
    assert set(inputs) == {spec.name for spec in _SPECS}
    assert np.isfinite(inputs["x"]).all()


def gateway_request(data: bytes) -> None:
    """Read an inference request as the gateway does, and name another model in it."""
    try:
        request = service_pb2.ModelInferRequest.FromString(data)
    except DecodeError as error:
        raise InputError("not a request") from error
    check_names(request)
    sent = service_pb2.ModelInferRequest.FromString(override_fields(data, model_name="m@1", model_version="1"))
    assert (sent.model_name, sent.model_version) == ("m@1", "1")
    assert len(sent.inputs) == len(request.inputs)
    assert list(sent.raw_input_contents) == list(request.raw_input_contents)


def token(data: bytes) -> None:
    """Let a token in, as metadata brings it."""
    text = data.decode("latin-1")
    describe_token(text)
    _verify(text)


def authorization(data: bytes) -> None:
    """Let a call in with any header."""
    _verify(data.decode("latin-1"), scheme="")


@cache
def _interceptor() -> AuthInterceptor:
    return AuthInterceptor(_issuer().verifier())


def _verify(text: str, scheme: str = "Bearer ") -> None:
    metadata = (("authorization", scheme + text),)
    # In a context of its own, as each call has one: who was let in must not be the caller of what runs next.
    context = copy_context()
    context.run(_interceptor()._admit, "/isthmus.v1.FleetService/WhoAmI", metadata)
    claims = context.run(current_claims)
    assert claims.subject == "fuzzed"


def assertion(data: bytes) -> None:
    """Read a device's assertion."""
    text = data.decode("latin-1")
    read_assertion_subject(text)
    verified = verify_assertion(text, _public_key(), _issuer().audience, datetime.now(UTC))
    assert verified.jti


def _public_key() -> bytes:
    return public_key_of(make_csr_of_device())


@cache
def make_csr_of_device() -> bytes:
    """Return the signing request of the device that assertions are made by."""
    return make_csr(_device_key(), "kiosk-1", ["kiosk-1.local"])


def signing_request(data: bytes) -> None:
    """Certify a device's key."""
    chain = _authority().sign(data, "kiosk-1", datetime.now(UTC))
    assert chain.count(b"BEGIN CERTIFICATE") == 2
    public_key_of(data)


def report(data: bytes) -> None:
    """Take a device's report."""
    message = parse_message(fleet_pb2.ReportRequest, data)
    kept = checked_report(message)
    assert all(getattr(kept, name).isprintable() for name in ("reason", "detail", "variant", "rollout", "step"))


def labels(data: bytes) -> None:
    """Take an operator's labels."""
    message = parse_message(fleet_pb2.SetLabelsRequest, data)
    assert all(key.isprintable() and value.isprintable() for key, value in check_labels(message.set).items())


def _committed(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]


def _tokens() -> list[bytes]:
    made = _issuer().mint("fuzzed", "client", models=("triage", "*"), ttl=timedelta(hours=1))[0]
    return [made.encode(), f"Bearer {made}".encode(), b"eyJhbGciOiJub25lIn0.e30.", *_committed("token")]


def _assertions() -> list[bytes]:
    key = _workspace() / "device.key"
    make_csr_of_device()
    return [make_assertion(key, "kiosk-1", _issuer().audience, datetime.now(UTC)).encode(), *_committed("token")]


def golden_requests() -> dict[str, bytes]:
    """Return the requests that the committed corpus is made of."""
    rng = np.random.default_rng(0)
    x, ids = rng.normal(size=(2, 3)).astype(np.float32), rng.integers(0, 9, (2, 4))
    flags = np.array([[True], [False]])
    whole = encode_request("triage", {"x": x, "flags": flags, "ids": ids}, version="1", request_id="r-1")
    typed = service_pb2.ModelInferRequest(model_name="triage")
    tensor = typed.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    tensor.contents.fp32_contents.extend([1.0, 2.0, 3.0])
    asked = service_pb2.ModelInferRequest()
    asked.CopyFrom(whole)
    asked.outputs.add(name="logits")
    asked.parameters["isthmus.route"].string_param = "edge"
    asked.parameters["timeout"].int64_param = 500_000
    asked.parameters["isthmus.defer"].bool_param = True
    return {
        "whole": bytes(whole.SerializeToString(deterministic=True)),
        "typed": bytes(typed.SerializeToString(deterministic=True)),
        "parameters": bytes(asked.SerializeToString(deterministic=True)),
        "empty": b"",
    }


def _reports() -> list[bytes]:
    sent = fleet_pb2.ReportRequest(
        model="triage",
        version=2,
        state=fleet_pb2.UPDATE_STATE_ACTIVE,
        serving_version=1,
        reason="digest-mismatch",
        detail="model.bin",
        step="fetch",
    )
    sent.evidence.requests = 10
    return [bytes(sent.SerializeToString(deterministic=True))]


def _labels() -> list[bytes]:
    return [
        bytes(
            fleet_pb2.SetLabelsRequest(device_id="kiosk-1", set={"group": "line-3"}).SerializeToString(
                deterministic=True
            )
        )
    ]


TARGETS: Final = {
    "agent": Target(agent_request, lambda: _committed("request")),
    "gateway": Target(gateway_request, lambda: _committed("request")),
    "token": Target(token, _tokens),
    "authorization": Target(authorization, _tokens),
    "assertion": Target(assertion, _assertions),
    "csr": Target(signing_request, lambda: [make_csr_of_device(), *_committed("csr")]),
    "report": Target(report, _reports),
    "labels": Target(labels, _labels),
}
