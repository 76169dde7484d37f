"""Hostile text in every field of every request, against running servers, by a caller that may do everything.

The fields are found in the descriptors, so a field that is added tomorrow is attacked tomorrow. Whatever comes, the
answer is one of the caller's errors or none at all; no file appears but where the servers keep theirs; and no line of
a log holds a raw control character, or begins where an attacker wanted it to.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from isthmus import v1
from isthmus.oip import service_pb2
from security.scopes import DEVICE, METHOD_SCOPES
from security.tokens import TokenIssuer
from tests.attacks.stage import DEVICE as ENROLLED
from tests.attacks.stage import Stage, Target, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MARK: Final = "isthmus-canary"
FORGED: Final = '{"event": "forged", "level": "critical"}'
HOSTILE: Final = (
    f"../../../../../../tmp/{MARK}",
    f"/tmp/{MARK}",
    f"..\\..\\{MARK}",
    f"triage\x00{MARK}",
    f"triage\n{FORGED}\n",
    f"triage\r\n{FORGED}",
    "\x1b[2J\x1b[31mred\x1b]0;title\x07",
    "\u202etriage\u2066\u2028x\u0085y",
    "é" * 300,
    "\U0001f4a5" * 70_000,
    "x" * 100_000,
    "%s%n{0}${jndi:ldap://x}`id`$(id)';--",
    ".",
    "..",
    "",
    "\ufeff\ufffe\uffff",
)
CALLERS_FAULT: Final = {
    grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ABORTED,
    grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}  # fmt: skip
MODULES: Final = (
    service_pb2,
    *(
        importlib.import_module(f"isthmus.v1.{m.name}")
        for m in pkgutil.iter_modules(v1.__path__)
        if m.name.endswith("_pb2")
    ),
)
AGENT: Final = ("isthmus.v1.AgentService",)
OIP: Final = ("inference.GRPCInferenceService",)


def services() -> dict[str, Any]:
    """Return the descriptors of all services."""
    return {s.full_name: s for module in MODULES for s in module.DESCRIPTOR.services_by_name.values()}


def paths(kind: Any, depth: int = 0) -> Iterator[tuple[FieldDescriptor, ...]]:
    """Yield the way to each field of text or bytes, through messages, lists and maps."""
    for field in kind.fields:
        if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            yield (field,)
        elif field.message_type is not None and depth < 3:
            yield from ((field, *rest) for rest in paths(field.message_type, depth + 1))


def filled(message: Message, path: tuple[FieldDescriptor, ...], text: str) -> None:
    """Put a text where the path leads; a map gets an entry, a list an item."""
    field, *rest = path
    value: Any = text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    if not rest:
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)
        return
    kind: Any = field.message_type
    if kind.GetOptions().map_entry:
        held = getattr(message, field.name)
        key, of_value = kind.fields_by_name["key"], kind.fields_by_name["value"]
        chosen: Any = text if rest[0] is key and key.type == FieldDescriptor.TYPE_STRING else "key"
        if of_value.message_type is not None:
            inner = held[chosen]
            inner.SetInParent()
            if len(rest) > 1:
                filled(inner, tuple(rest[1:]), text)
        else:
            held[chosen] = text if of_value.type == FieldDescriptor.TYPE_STRING else of_value.default_value
        return
    held = getattr(message, field.name)
    filled(held.add() if field.is_repeated else held, tuple(rest), text)


def plausible(kind: Any) -> Message:
    """Return a request that is not refused for its empty fields."""
    message: Message = GetMessageClass(kind)()
    for name, value in {
        "model": "triage", "model_name": "triage", "name": "triage", "device_id": ENROLLED, "version": 1, "state": 1,
    }.items():  # fmt: skip
        field = kind.fields_by_name.get(name)
        if field is not None and not field.is_repeated and field.message_type is None:
            with contextlib.suppress(TypeError, ValueError):
                setattr(message, name, value if not isinstance(getattr(message, name), str) else str(value))
    return message


def requests(service: str) -> Iterator[tuple[str, Any, str, bytes]]:
    """Yield method, its descriptor, which field was attacked, and the request's bytes."""
    for method in services()[service].methods:
        for path in paths(method.input_type):
            for text in HOSTILE:
                for base in (GetMessageClass(method.input_type)(), plausible(method.input_type)):
                    filled(base, path, text)
                    where = ".".join(field.name for field in path)
                    yield f"/{service}/{method.name}", method, f"{where}={text[:40]!r}", base.SerializeToString()


def answer(channel: grpc.Channel, path: str, method: Any, raw: bytes, bearer: Any) -> tuple[grpc.StatusCode, str]:
    """Make one call; a stream of answers is left after the first."""
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    argument: Any = iter([raw]) if method.client_streaming else raw
    try:
        made = getattr(channel, kind)(path)(
            argument, metadata=bearer, timeout=5.0 if not method.server_streaming else 0.3
        )
        if method.server_streaming:
            next(made, None)
            made.cancel()
    except grpc.RpcError as error:
        return error.code(), str(error.details())
    return grpc.StatusCode.OK, ""


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.mark.parametrize("where", ["cloud", "agent"])
def test_hostile_text_in_any_field_is_the_callers_error_and_leaves_nothing(stage: Stage, where: str) -> None:
    target: Target = getattr(stage, where)
    issuer = TokenIssuer.load(stage.workspace.home)
    from datetime import timedelta

    device = issuer.mint(ENROLLED, "device", models=("*",), ttl=timedelta(minutes=30))[0]
    before, wrong, count = tree(stage.root), list[str](), 0
    cloud = [name for name in services() if name not in (*AGENT, *OIP)]
    with target.channel() as channel:
        for service in (*(cloud if where == "cloud" else AGENT), *OIP):
            for path, method, what, raw in requests(service):
                token = device if METHOD_SCOPES[path] == DEVICE else target.token
                code, details = answer(channel, path, method, raw, (("authorization", f"Bearer {token}"),))
                count += 1
                if code not in CALLERS_FAULT or len(details) > 2100:
                    wrong.append(f"{path} {what}: {code.name} {details[:200]}")
        assert not wrong, "\n".join(wrong[:30])
        assert count > 500
        assert target.ask(channel) is not None
    kept = ("workspace/cloud/state", "device", "cloud.log", "agent.log")
    assert {name for name in tree(stage.root) - before if not name.startswith(kept)} == set()
    assert not [name for name in tree(stage.root) if MARK in name]
    assert not Path(f"/tmp/{MARK}").exists()
    check_log(target.log)


def check_log(log: Path) -> None:
    """Check that each line is one that the program wrote."""
    for number, line in enumerate(log.read_bytes().split(b"\n"), 1):
        assert not [byte for byte in line if byte < 32 or byte == 127], f"{log.name}:{number}: {line[:300]!r}"
        if line.startswith(b"{"):
            assert json.loads(line)["event"] != "forged"


@pytest.mark.parametrize("value", [b"\xff\xfe", b"a\nb", b"\x1b[31m", b"\x00", b"x" * 12_000])
@pytest.mark.parametrize("header", [b"authorization", b"x-request-id", b"user-agent", b"x-any"])
def test_hostile_metadata_reaches_no_log(target: Target, header: bytes, value: bytes) -> None:
    from tests.attacks import wire

    with wire.Wire.open(target.address, target.ca) as connection:
        more = [(header, value)]
        if header != b"authorization":
            more.append((b"authorization", f"Bearer {target.token}".encode()))
        connection.call(target.method.encode(), *more, data=target.request)
        frames = connection.frames()
        end = next((f for f in frames if f.kind == wire.HEADERS and f.flags & wire.END_STREAM), None)
        if end is not None:
            assert b"grpc-status\x0213" not in end.payload  # INTERNAL
            assert b"grpc-status\x012" not in end.payload  # UNKNOWN
    wait_until(lambda: target.log.exists(), "there is a log")
    check_log(target.log)
