"""The access token that the device shows to the cloud, and what the cloud tells it along with one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import grpc
import structlog

from edge.backoff import Backoff
from edge.identity import DeviceHome, Enrolment, complete_address
from edge.store import write_atomically
from edge.uplink import open_channel
from isthmus.errors import IsthmusError
from isthmus.status import ADDRESS_KEY, REASON_KEY, TIME_KEY
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc
from security.assertions import make_assertion

TOKEN_TIMEOUT_S: Final = 10.0
_YOUNG_S: Final = 5.0
_SKEW_S: Final = 2.0  # a difference of clocks below which ours is used as it is: the way there and back takes time, too
_FINAL: Final = frozenset({"revoked", "unknown-device"})
_REFUSED_S: Final = 300.0  # between tries of a device that is not wanted
_RENEW_AT: Final = 0.6  # of a token's life; leaves several retries before it ends

log = structlog.get_logger(__name__)


class AccessToken:
    """The device's current access token, renewed in the background well before it ends.

    A device whose clock is wrong reckons with the cloud's, which comes with every answer to it: for tokens only.

    Args:
        home: The device's folder.
        enrolment: What enrolment left.
        channel: To the cloud.
        clock: Seconds since the epoch.
        new_keys: Called with the cloud's public token keys when they have changed.
        moved: Called when the cloud's address for devices is another one, which enrolment.json has then.
    """

    def __init__(
        self,
        home: DeviceHome,
        enrolment: Enrolment,
        channel: grpc.aio.Channel,
        *,
        clock: Callable[[], float] = time.time,
        new_keys: Callable[[bytes], None] = lambda _jwks: None,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self._home = home
        self._enrolment = enrolment
        self._stub: Any = fleet_pb2_grpc.FleetServiceStub(channel)
        self._local_clock = clock
        self._ahead_s = 0.0  # of our clock, the cloud's
        self._new_keys, self._moved = new_keys, moved
        self._token = ""
        self._expires_at = self._obtained_at = 0.0
        self._first = asyncio.Event()
        self._backoff = Backoff(longest_s=10.0)

    def current(self) -> str | None:
        """Return the token, None when there is none that is still valid."""
        return self._token if self.now() < self._expires_at else None

    async def wait(self) -> str:
        """Return the token, as soon as there is a first one."""
        await self._first.wait()
        return self._token

    def renew_soon(self) -> None:
        """Renew now rather than when due, because the cloud does not accept the token."""
        if self.now() - self._obtained_at > _YOUNG_S:  # a new one would not be accepted either
            self._backoff.wake()

    def connected(self) -> None:
        """Try again at once when there is no valid token; the connection has just come up."""
        if self.current() is None:
            self._backoff.wake()

    async def keep(self) -> None:
        """Obtain and renew until cancelled."""
        while True:
            try:
                self._take(await self._ask(self._stub))
            except (grpc.aio.AioRpcError, IsthmusError) as error:
                log.warning("no access token", error=described(error))
                if _is_final(error):
                    await self._backoff.sleep(_REFUSED_S)
                else:
                    await self._backoff.pause()
                continue
            self._backoff.reset()
            await self._backoff.sleep(max(1.0, (self._expires_at - self.now()) * _RENEW_AT))

    async def change_over(self, channel: grpc.aio.Channel, replace: Callable[[], None]) -> None:
        """Get a token for a new connection, which is the only one that it is good on, and use both from then on.

        Args:
            channel: The new connection.
            replace: Puts it in the place of the one before.

        Raises:
            AioRpcError: There is no token to be had.
        """
        response = await self._ask(fleet_pb2_grpc.FleetServiceStub(channel))
        replace()
        self._take(response)

    def assertion(self) -> str:
        """Return a new proof of who this device is.

        Raises:
            ConfigError: The device's key cannot be used.
        """
        now = datetime.fromtimestamp(self.now(), UTC)
        return make_assertion(self._home.key, self._enrolment.device_id, self._enrolment.token_audience, now)

    async def ask_where(self) -> None:
        """Ask at the address of enrolment where devices are to call; the answer may be a refusal that says so.

        Raises:
            AioRpcError: The cloud cannot be reached.
        """
        async with open_channel(self._enrolment.cloud, self._home.ca) as channel:
            try:
                await self._ask(fleet_pb2_grpc.FleetServiceStub(channel))
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                    raise

    async def oriented(self, call: Any) -> Any:
        """Return what a call returns; learn from it, or from its refusal, the cloud's time and address for devices.

        Raises:
            AioRpcError: As the call.
        """
        try:
            response = await call
            self._orient(await call.initial_metadata())
        except grpc.aio.AioRpcError as error:
            self._orient(error.initial_metadata())
            raise
        return response

    def now(self) -> float:
        """Return what time it is, for the cloud as far as that is known; seconds since the epoch."""
        return self._local_clock() + self._ahead_s

    def _orient(self, metadata: Any) -> None:
        told = dict(metadata or ())
        time_ms, address = told.get(TIME_KEY, ""), told.get(ADDRESS_KEY, "")
        if time_ms.isascii() and time_ms.isdecimal():
            ahead_s = int(time_ms) / 1000 - self._local_clock()
            self._ahead_s = ahead_s if abs(ahead_s) > _SKEW_S else 0.0
        address = complete_address(address, self._enrolment.cloud)
        if address and address != self._enrolment.device_address:
            log.info("the cloud's address for devices", address=address)
            self._enrolment = self._enrolment.model_copy(update={"device_address": address})
            self._home.keep_enrolment(self._enrolment)
            self._moved()

    async def _ask(self, stub: Any) -> Any:
        request = fleet_pb2.IssueTokenRequest(assertion=self.assertion())
        return await self.oriented(stub.IssueToken(request, timeout=TOKEN_TIMEOUT_S))

    def _take(self, response: Any) -> None:
        self._token, self._obtained_at = response.access_token, self.now()
        self._expires_at = response.expires_at.ToMicroseconds() / 1e6
        self._first.set()
        if response.jwks_json and response.jwks_json != self._home.jwks.read_bytes():
            write_atomically(self._home.jwks, response.jwks_json)
            self._new_keys(response.jwks_json)


def _is_final(error: Exception) -> bool:
    """Return whether the cloud has said that this device gets no token, until an operator does something."""
    told = dict(error.trailing_metadata() or ()) if isinstance(error, grpc.aio.AioRpcError) else {}
    return told.get(REASON_KEY) in _FINAL


def described(error: Exception) -> str:
    """Return an error in one line, for a log."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
