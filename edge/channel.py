"""A channel whose connection can be replaced while others use it: gRPC reads a client's certificate once.

Calls that are running when the connection is replaced end on the old one, within a grace; all others use the new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final, Self

import grpc

GRACE_S: Final = 60.0  # longer than any escalation; a Watch or a fetch begins again on the new connection


class RenewableChannel(grpc.aio.Channel):
    """See the module; stubs made from it follow.

    Args:
        channel: What is used first.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._inner = channel
        self._replaced = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def inner(self) -> grpc.aio.Channel:
        """Return the channel that is used now."""
        return self._inner

    def replace(self, channel: grpc.aio.Channel) -> None:
        """Use another channel from now on; what runs on the one before may end."""
        before, self._inner = self._inner, channel
        self._replaced.set()
        self._replaced = asyncio.Event()
        task = asyncio.create_task(before.close(GRACE_S))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self, grace: float | None = None) -> None:
        """Close the channel, and those before it at once."""
        for task in tuple(self._closing):
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self._inner.close(grace)

    async def __aenter__(self) -> Self:
        """Return the channel."""
        return self

    async def __aexit__(self, *_error: object) -> None:
        """Close the channel."""
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Return the connection's state."""
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the state is another one; that of a new connection counts as another one."""
        waits = [
            asyncio.ensure_future(self._inner.wait_for_state_change(last_observed_state)),
            asyncio.ensure_future(self._replaced.wait()),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()

    async def channel_ready(self) -> None:
        """Wait until there is a connection."""
        await self._inner.channel_ready()

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        """Return the method; its calls use the channel of their time."""
        return _Method(self, "unary_unary", args, options)

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        """Return the method; its calls use the channel of their time."""
        return _Method(self, "unary_stream", args, options)

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        """Return the method; its calls use the channel of their time."""
        return _Method(self, "stream_unary", args, options)

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        """Return the method; its calls use the channel of their time."""
        return _Method(self, "stream_stream", args, options)


class _Method:
    def __init__(self, owner: RenewableChannel, kind: str, args: Sequence[Any], options: dict[str, Any]) -> None:
        self._owner, self._kind, self._args, self._options = owner, kind, args, options
        self._channel: grpc.aio.Channel | None = None
        self._call: Any = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self._channel is not self._owner.inner:
            self._channel = self._owner.inner
            self._call = getattr(self._channel, self._kind)(*self._args, **self._options)
        return self._call(*args, **options)
