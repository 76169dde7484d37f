"""Errors over a real connection: the right code, our message and reason, and nothing of anybody else's exceptions."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import grpc
import pytest

from isthmus import errors
from isthmus.status import STATUS_OF, StatusInterceptor, from_rpc

RAISED: dict[str, Exception] = {
    **{kind.__name__: kind("what came", reason="a-reason") for kind, _ in STATUS_OF},
    "Hinted": errors.ConfigError("what came", hint="run “isthmus keys init” & 100 % try again\nthen"),
    "Endless": errors.BundleError("x" * 100_000, hint="y" * 100_000),
    "Late": errors.UnavailableError("what came", reason="deadline-exceeded"),
    "ValueError": ValueError("/etc/secret"),
}


async def unary(request: bytes, context: Any) -> bytes:
    raise RAISED[request.decode()]


async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
    yield b"first"
    raise RAISED[request.decode()]


async def written_stream(request: bytes, context: Any) -> None:
    await context.write(b"first")
    raise RAISED[request.decode()]


async def call(name: str, *, streaming: str) -> grpc.aio.AioRpcError:
    server = grpc.aio.server(interceptors=[StatusInterceptor()])
    handlers: dict[str, Any] = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
        "WrittenStream": grpc.unary_stream_rpc_method_handler(written_stream),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Service", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            if streaming != "Unary":
                stub: Any = channel.unary_stream(f"/test.Service/{streaming}")
                async for _ in stub(name.encode()):
                    pass
            else:
                stub = channel.unary_unary("/test.Service/Unary")
                await stub(name.encode())
    except grpc.aio.AioRpcError as error:
        return error
    finally:
        await server.stop(None)
    raise AssertionError("the call must fail")


@pytest.mark.parametrize("streaming", ["Unary", "Stream", "WrittenStream"])
@pytest.mark.parametrize(("kind", "code"), STATUS_OF, ids=[kind.__name__ for kind, _ in STATUS_OF])
def test_our_errors_arrive_with_code_message_and_reason(
    kind: type[errors.IsthmusError], code: grpc.StatusCode, streaming: str
) -> None:
    caught = asyncio.run(call(kind.__name__, streaming=streaming))
    assert caught.code() is code
    assert caught.details() == "what came"
    translated = from_rpc(caught, "asking")
    assert type(translated) is kind
    assert translated.reason == "a-reason"
    assert "asking: what came" in translated.message


@pytest.mark.parametrize("streaming", ["Unary", "Stream", "WrittenStream"])
def test_other_exceptions_tell_the_caller_nothing(streaming: str) -> None:
    caught = asyncio.run(call("ValueError", streaming=streaming))
    assert caught.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught)


@pytest.mark.parametrize("streaming", ["Unary", "Stream"])
def test_hints_arrive_as_they_were(streaming: str) -> None:
    sent = RAISED["Hinted"]
    assert isinstance(sent, errors.ConfigError)
    assert from_rpc(asyncio.run(call("Hinted", streaming=streaming)), "asking").hint == sent.hint


def test_an_endless_message_is_cut_and_still_arrives() -> None:
    caught = asyncio.run(call("Endless", streaming="Unary"))
    assert caught.code() is grpc.StatusCode.FAILED_PRECONDITION
    translated = from_rpc(caught, "asking")
    assert isinstance(translated, errors.BundleError)
    assert translated.message.startswith("asking: xxxx")
    assert translated.hint == ""


def test_a_server_that_ran_out_of_time_says_what_the_callers_own_clock_would_say() -> None:
    caught = asyncio.run(call("Late", streaming="Unary"))
    assert caught.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert type(from_rpc(caught, "asking")) is errors.UnavailableError


@pytest.mark.parametrize("named", ["not-found", "nonsense", ""])
def test_a_class_that_does_not_go_with_the_code_is_not_believed(named: str) -> None:
    metadata = grpc.aio.Metadata(("isthmus-error", named))
    refused = grpc.aio.AioRpcError(grpc.StatusCode.FAILED_PRECONDITION, grpc.aio.Metadata(), metadata, details="no")
    assert type(from_rpc(refused, "asking")) is errors.TrustError


class Kept:
    """A request that is known to be alive or not."""

    alive: ClassVar[weakref.WeakSet[Kept]] = weakref.WeakSet()

    def __init__(self, serialized: bytes) -> None:
        self.alive.add(self)


def test_refused_request_is_let_go_without_the_garbage_collector() -> None:
    async def refuse(request: Kept, context: Any) -> bytes:
        raise errors.InputError("no")

    async def scenario() -> None:
        server = grpc.aio.server(interceptors=[StatusInterceptor()])
        handler: Any = grpc.unary_unary_rpc_method_handler(refuse, request_deserializer=Kept)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Service", {"Unary": handler})])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = channel.unary_unary("/test.Service/Unary")
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError):
                    await stub(b"")
        await server.stop(None)

    gc.disable()
    try:
        asyncio.run(scenario())
        assert not Kept.alive
    finally:
        gc.enable()


def test_every_error_class_has_a_status() -> None:
    def tree(kind: type[errors.IsthmusError]) -> set[type[errors.IsthmusError]]:
        return {kind}.union(*(tree(sub) for sub in kind.__subclasses__()))

    covered = tuple(kind for kind, _ in STATUS_OF)
    assert all(issubclass(kind, covered) for kind in tree(errors.IsthmusError) - {errors.IsthmusError})


def test_hint_of_the_peer_goes_before_the_callers_own() -> None:
    own = {errors.ConfigError: "own", errors.BundleError: "own"}
    plain = asyncio.run(call("ConfigError", streaming="Unary"))
    assert from_rpc(plain, "a call", hints=own).hint == "own"
    assert from_rpc(plain, "a call", hints={errors.BundleError: "other"}).hint == ""
    hinted = asyncio.run(call("Hinted", streaming="Unary"))
    assert "keys init" in from_rpc(hinted, "a call", hints=own).hint


def test_a_quota_says_when_to_come_back() -> None:
    for seconds, pushback, retry_after in (
        (0.0123, "13", "1"),
        (2.0, "2000", "2"),
        (0.0, "0", "0"),
        (None, None, None),
    ):
        RAISED["Quota"] = errors.QuotaError("what came", retry_after_s=seconds)
        error = asyncio.run(call("Quota", streaming="Unary"))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        told: Any = dict(error.trailing_metadata() or ())
        assert (told.get("grpc-retry-pushback-ms"), told.get("retry-after")) == (pushback, retry_after)
        back = from_rpc(error, "cannot ask")
        assert isinstance(back, errors.QuotaError)
        assert back.retry_after_s == (None if pushback is None else int(pushback) / 1000)
        assert back.reason == "quota-exceeded"
