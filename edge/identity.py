"""Who this device is: its key and certificate, enrolment, and the access token that it shows to the cloud.

device.key device.pem        key (never leaves the device) and certificate chain
trust/ca.pem trust/root.json what the device believes in from the start: the cloud's CA and the update root
jwks.json                    public keys that verify tokens of callers, for listeners beyond loopback
enrolment.json               the rest; written last, so a folder that has it is complete
"""

from __future__ import annotations

import asyncio
import fcntl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final

import grpc
import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from edge.backoff import Backoff
from edge.store import write_atomically
from edge.uplink import open_channel
from isthmus.address import split_address
from isthmus.errors import ConfigError, ConflictError, IdentityError, IsthmusError, UnavailableError
from isthmus.status import from_rpc
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc
from security.assertions import make_assertion
from security.enrolment import make_csr, new_device_key

ENROL_TIMEOUT_S: Final = 30.0
TOKEN_TIMEOUT_S: Final = 10.0
_HINTS: Final = {
    UnavailableError: "is `isthmus cloud serve` running at --cloud, and does --trust come from its workspace?",
    IdentityError: "a code is good for one device and a short time; `isthmus device invite DEVICE` prints a new one",
}
_UNNAMED: Final = "device"  # in the signing request only: the invitation says who the device is
_YOUNG_S: Final = 5.0
_RENEW_AT: Final = 0.6  # of a token's life; leaves several retries before it ends

log = structlog.get_logger(__name__)


class Enrolment(BaseModel):
    """What enrolment.json says."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    device_id: str
    cloud: str  # HOST:PORT
    token_issuer: str
    token_audience: str


@dataclass(frozen=True, slots=True)
class DeviceHome:
    """The device's folder."""

    path: Path

    @property
    def key(self) -> Path:
        """Return the device's private key."""
        return self.path / "device.key"

    @property
    def certificate(self) -> Path:
        """Return the device's certificate chain."""
        return self.path / "device.pem"

    @property
    def ca(self) -> Path:
        """Return the CA that the cloud's certificate must come from."""
        return self.path / "trust" / "ca.pem"

    @property
    def root(self) -> Path:
        """Return the first root metadata of the update framework."""
        return self.path / "trust" / "root.json"

    @property
    def jwks(self) -> Path:
        """Return the public keys that verify tokens."""
        return self.path / "jwks.json"

    def lock(self) -> BinaryIO:
        """Keep other agents out of the folder until the returned file is closed, or this process ends.

        Raises:
            ConflictError: Another agent runs in it.
        """
        file = (self.path / "agent.lock").open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ConflictError(
                f"another agent runs in {self.path}", hint="stop it, or enrol another device with another --home"
            ) from error
        return file

    def models(self, model: str) -> Path:
        """Return the folder of a model's slots."""
        return self.path / "models" / model

    @property
    def reports(self) -> Path:
        """Return the file with reports that the cloud has not taken yet."""
        return self.path / "reports.json"

    @property
    def sealing(self) -> Path:
        """Return the file with the gateway's public keys for sealed inputs."""
        return self.path / "sealing.json"

    def spool(self, model: str) -> Path:
        """Return the folder of a model's captures."""
        return self.path / "spool" / model

    @property
    def deferred(self) -> Path:
        """Return the folder of deferred requests and their results."""
        return self.path / "deferred"

    @property
    def deferred_key(self) -> Path:
        """Return the key that they are sealed with."""
        return self.path / "deferred.key"

    def enrolment(self) -> Enrolment:
        """Return what enrolment left.

        Raises:
            ConfigError: The device is not enrolled.
        """
        try:
            return Enrolment.model_validate_json((self.path / "enrolment.json").read_bytes())
        except (OSError, ValidationError) as error:
            raise ConfigError(
                f"{self.path} is not the folder of an enrolled device",
                hint="isthmus edge enrol --cloud HOST:PORT --code CODE --trust DIR --home DIR",
                reason="not-enrolled",
            ) from error


async def enrol(home: DeviceHome, *, cloud: str, code: str, trust: Path, hosts: Sequence[str] = ()) -> Enrolment:
    """Make a key, exchange the code for a certificate, and fill the device's folder.

    Args:
        home: The device's folder; made when it is missing.
        cloud: HOST:PORT of the cloud.
        code: The one-time code that an operator's `isthmus device invite` printed.
        trust: Folder with ca.pem and root.json.
        hosts: Names and addresses under which other machines will call this device.

    Raises:
        ConfigError: `cloud` is no address, or `trust` lacks a file.
        ConflictError: The device is enrolled already.
        IdentityError: The cloud does not accept the code.
        UnavailableError: The cloud cannot be reached.
    """
    split_address(cloud, "--cloud")
    if (home.path / "enrolment.json").exists():
        raise ConflictError(f"{home.path} is enrolled already", hint="use another --home for another device")
    missing = [name for name in ("ca.pem", "root.json") if not (trust / name).is_file()]
    if missing:
        raise ConfigError(
            f"--trust {trust}: expected ca.pem and root.json, missing {' and '.join(missing)}",
            hint="copy the folder trust/ of the workspace that `isthmus keys init` made",
        )
    (home.path / "trust").mkdir(parents=True, exist_ok=True)
    for name in ("ca.pem", "root.json"):
        write_atomically(home.path / "trust" / name, (trust / name).read_bytes())
    home.key.unlink(missing_ok=True)  # of an enrolment that did not get through
    key = new_device_key(home.key)
    response = await _exchange(home, cloud, code, make_csr(key, _UNNAMED, hosts))
    write_atomically(home.certificate, response.certificate_chain_pem)
    write_atomically(home.jwks, response.jwks_json)
    enrolment = Enrolment(
        device_id=response.device_id,
        cloud=cloud,
        token_issuer=response.token_issuer,
        token_audience=response.token_audience,
    )
    write_atomically(home.path / "enrolment.json", enrolment.model_dump_json(indent=2).encode() + b"\n")
    return enrolment


async def _exchange(home: DeviceHome, cloud: str, code: str, csr: bytes) -> fleet_pb2.EnrolResponse:
    async with open_channel(cloud, home.ca) as channel:
        stub = fleet_pb2_grpc.FleetServiceStub(channel)
        try:
            request = fleet_pb2.EnrolRequest(code=code, csr_pem=csr)
            response: fleet_pb2.EnrolResponse = await stub.Enrol(request, timeout=ENROL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, f"enrolment at {cloud}", hints=_HINTS) from error
    return response


class AccessToken:
    """The device's current access token, renewed in the background well before it ends.

    Args:
        home: The device's folder.
        enrolment: What enrolment left.
        channel: To the cloud.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        home: DeviceHome,
        enrolment: Enrolment,
        channel: grpc.aio.Channel,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._home = home
        self._enrolment = enrolment
        self._stub = fleet_pb2_grpc.FleetServiceStub(channel)
        self._clock = clock
        self._token = ""
        self._expires_at = self._obtained_at = 0.0
        self._first = asyncio.Event()
        self._backoff = Backoff(longest_s=10.0)

    def current(self) -> str | None:
        """Return the token, None when there is none that is still valid."""
        return self._token if self._clock() < self._expires_at else None

    async def wait(self) -> str:
        """Return the token, as soon as there is a first one."""
        await self._first.wait()
        return self._token

    def renew_soon(self) -> None:
        """Renew now rather than when due, because the cloud does not accept the token."""
        if self._clock() - self._obtained_at > _YOUNG_S:  # a new one would not be accepted either
            self._backoff.wake()

    def connected(self) -> None:
        """Try again at once when there is no valid token; the connection has just come up."""
        if self.current() is None:
            self._backoff.wake()

    async def keep(self) -> None:
        """Obtain and renew until cancelled."""
        while True:
            try:
                await self._renew()
            except (grpc.aio.AioRpcError, IsthmusError) as error:
                log.warning("no access token", error=_describe(error))
                await self._backoff.pause()
                continue
            self._backoff.reset()
            await self._backoff.sleep(max(1.0, (self._expires_at - self._clock()) * _RENEW_AT))

    async def _renew(self) -> None:
        now = self._clock()
        assertion = make_assertion(
            self._home.key,
            self._enrolment.device_id,
            self._enrolment.token_audience,
            datetime.fromtimestamp(now, UTC),
        )
        response = await self._stub.IssueToken(
            fleet_pb2.IssueTokenRequest(assertion=assertion), timeout=TOKEN_TIMEOUT_S
        )
        self._token, self._obtained_at = response.access_token, now
        self._expires_at = response.expires_at.ToMicroseconds() / 1e6
        self._first.set()


def _describe(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
