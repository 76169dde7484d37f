"""Light devices: the fleet's real protocol over real TLS, with scripted updates instead of models.

Each enrols with a one-time code, gets tokens for assertions that it signs, watches, and reports numbered states, as
an agent does; what it is told to run it "installs" at once, unless its script says otherwise. One device is one TLS
channel.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import grpc

from isthmus.status import ADDRESS_KEY
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc
from security.enrolment import make_csr, new_device_key
from security.tls import channel_credentials
from security.tokens import make_assertion

CALL_S: Final = 30.0
PAUSE_S: Final = 0.2  # between attempts to reach the cloud
# Channels of one process share a connection when their arguments are equal; a device has its own.
_REFUSALS: Final = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND})  # again would not help
_OPTIONS: Final = (("grpc.use_local_subchannel_pool", 1),)


class Behaviour(StrEnum):
    """What a version does on a device."""

    GOOD = "good"
    REFUSED = "refused"  # its self-test fails
    ROLLED_BACK = "rolled-back"  # it fails while it serves
    STUCK = "stuck"  # it never ends


Script = Callable[[str, int], Behaviour]


def all_good(_device: str, _version: int) -> Behaviour:
    """Let every version work everywhere."""
    return Behaviour.GOOD


@dataclass(slots=True)
class LightDevice:
    """One device; `run` lives until it is cancelled and outlasts a cloud that is away.

    Args:
        name: Its identity.
        folder: Gets its key.
        model: The one model that it runs.
        facts: What it says of itself.
        script: What becomes of each version.
        soak: How long it waits of the seconds that the cloud asks it to soak.
    """

    name: str
    folder: Path
    model: str
    facts: Any = None
    script: Script = all_good
    soak: Callable[[int], float] = float
    serving: int = 0
    told: list[int] = field(default_factory=list)  # versions, as they came
    served: list[int] = field(default_factory=list)
    reports: int = 0
    lost_calls: Counter[str] = field(default_factory=Counter)  # reports that had to be sent again, by status
    watching: asyncio.Event = field(default_factory=asyncio.Event)
    _audience: str = ""
    _token: str = ""
    _number: int = 0
    _failed: tuple[int, int] = (0, -1)  # version and attempt

    @property
    def key(self) -> Path:
        """Return where the private key lies."""
        return self.folder / f"{self.name}.key"

    @property
    def certificate(self) -> Path:
        """Return where the certificate lies."""
        return self.folder / f"{self.name}.pem"

    async def enrol(self, channel: grpc.aio.Channel, code: str) -> None:
        """Exchange a one-time code for an identity."""
        stub: Any = fleet_pb2_grpc.FleetServiceStub(channel)
        csr = make_csr(new_device_key(self.key), self.name, ["localhost"])
        answer = await stub.Enrol(fleet_pb2.EnrolRequest(code=code, csr_pem=csr), timeout=CALL_S)
        self._audience = answer.token_audience
        self.certificate.write_bytes(answer.certificate_chain_pem)

    async def run(self, address: Callable[[], str], ca: Path) -> None:
        """Watch, and do what the script says, until cancelled.

        Args:
            address: Says where the cloud is; it says itself where it asks for certificates.
            ca: The authority of the cloud's certificate.
        """
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                where = address()
                device_port = await self._device_port(where, ca)
                identity = (self.key, self.certificate) if device_port else ()
                there = f"{where.rpartition(':')[0]}{device_port}" if device_port else where
                credentials = channel_credentials(ca, *identity)
                async with grpc.aio.secure_channel(there, credentials, options=_OPTIONS) as channel:
                    await self._session(fleet_pb2_grpc.FleetServiceStub(channel))
            self.watching.clear()
            await asyncio.sleep(PAUSE_S)

    async def _device_port(self, address: str, ca: Path) -> str:
        """Return :PORT where the cloud at an address asks for certificates; "" when it does not insist on them."""
        async with grpc.aio.secure_channel(address, channel_credentials(ca), options=_OPTIONS) as channel:
            try:
                await self._ask_for_token(fleet_pb2_grpc.FleetServiceStub(channel))
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                    raise
                return str(dict(error.initial_metadata() or ()).get(ADDRESS_KEY, ""))
        return ""

    async def _ask_for_token(self, stub: Any) -> str:
        assertion = make_assertion(self.key, self.name, self._audience, datetime.now(UTC))
        answer = await stub.IssueToken(fleet_pb2.IssueTokenRequest(assertion=assertion), timeout=CALL_S)
        return str(answer.access_token)

    async def _session(self, stub: Any) -> None:
        self._token = await self._ask_for_token(stub)
        request = fleet_pb2.WatchRequest(models=[self.model], facts=self.facts)
        updating: asyncio.Task[None] | None = None
        call = stub.Watch(request, metadata=self._metadata())
        try:
            await call.initial_metadata()
            self.watching.set()
            async for message in call:
                self.told.append(message.version)
                if updating is not None:
                    updating.cancel()
                    await asyncio.gather(updating, return_exceptions=True)
                updating = asyncio.create_task(self._update(stub, message))
        finally:
            call.cancel()
            if updating is not None:
                updating.cancel()
                await asyncio.gather(updating, return_exceptions=True)

    async def _update(self, stub: Any, told: Any) -> None:
        if told.version == self.serving:
            await self._report(stub, told, fleet_pb2.UPDATE_STATE_ACTIVE)
            return
        if self._failed == (told.version, told.attempt):
            return
        behaviour = self.script(self.name, told.version) if told.version > self.serving else Behaviour.GOOD
        await self._report(stub, told, fleet_pb2.UPDATE_STATE_UPDATING, step="fetch")
        if behaviour is Behaviour.STUCK:
            return
        if behaviour is Behaviour.REFUSED:
            self._failed = (told.version, told.attempt)
            await self._report(stub, told, fleet_pb2.UPDATE_STATE_REFUSED, reason="self-test-failed")
            return
        before, self.serving = self.serving, told.version
        self.served.append(told.version)
        if told.HasField("trial"):
            await self._report(stub, told, fleet_pb2.UPDATE_STATE_SOAKING)
            if behaviour is Behaviour.ROLLED_BACK:
                self._failed, self.serving = (told.version, told.attempt), before
                await self._report(stub, told, fleet_pb2.UPDATE_STATE_ROLLED_BACK, reason="trial-error-rate")
                return
            await asyncio.sleep(self.soak(told.trial.soak_s))
        await self._report(stub, told, fleet_pb2.UPDATE_STATE_ACTIVE)

    async def _report(self, stub: Any, told: Any, state: int, *, reason: str = "", step: str = "") -> None:
        self._number += 1
        report = fleet_pb2.ReportRequest(
            model=self.model, version=told.version, state=fleet_pb2.UpdateState.ValueType(state),
            serving_version=self.serving, reason=reason, rollout=told.rollout, attempt=told.attempt,
            number=self._number, step=step,
        )  # fmt: skip
        while True:  # a lost report is sent again
            try:
                await stub.Report(report, metadata=self._metadata(), timeout=CALL_S)
            except grpc.aio.AioRpcError as error:
                self.lost_calls[error.code().name] += 1
                if error.code() in _REFUSALS:
                    raise
                await asyncio.sleep(PAUSE_S)
            else:
                self.reports += 1
                return

    def _metadata(self) -> Any:
        return (("authorization", f"Bearer {self._token}"),)
