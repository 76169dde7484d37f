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
from typing import Any, BinaryIO, Final

import grpc
import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from edge.backoff import Backoff
from edge.store import write_atomically
from edge.uplink import open_channel
from isthmus.address import split_address
from isthmus.errors import ConfigError, ConflictError, IdentityError, IsthmusError, UnavailableError
from isthmus.status import ADDRESS_KEY, TIME_KEY, from_rpc
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc
from security.assertions import make_assertion
from security.authority import load_certificate
from security.enrolment import hosts_of, make_csr, new_device_key
from security.keyfiles import load_ec_key
from security.tenancy import DEFAULT_TENANT

ENROL_TIMEOUT_S: Final = 30.0
TOKEN_TIMEOUT_S: Final = 10.0
_HINTS: Final = {
    UnavailableError: "is `isthmus cloud serve` running at --cloud, and does --trust come from its workspace?",
    IdentityError: "a code is good for one device and a short time; `isthmus device invite DEVICE` prints a new one",
}
_UNNAMED: Final = "device"  # in the signing request only: the invitation says who the device is
_YOUNG_S: Final = 5.0
_SKEW_S: Final = 2.0  # a difference of clocks below which ours is used as it is: the way there and back takes time, too
_RENEW_AT: Final = 0.6  # of a token's life; leaves several retries before it ends

log = structlog.get_logger(__name__)


class Enrolment(BaseModel):
    """What enrolment.json says."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    device_id: str
    cloud: str  # HOST:PORT
    token_issuer: str
    token_audience: str
    device_address: str = ""  # HOST:PORT where the cloud asks for the certificate; "" as long as it is not known
    tenant: str = DEFAULT_TENANT


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

    def keep_enrolment(self, enrolment: Enrolment) -> None:
        """Write what `enrolment` will return."""
        write_atomically(self.path / "enrolment.json", enrolment.model_dump_json(indent=2).encode() + b"\n")

    def connect(self, *, message_bytes: int = 64 << 20) -> grpc.aio.Channel:
        """Return a channel to the cloud that shows the device's certificate, where the cloud asks for it."""
        enrolment = self.enrolment()
        if not enrolment.device_address:
            return open_channel(enrolment.cloud, self.ca, message_bytes=message_bytes)
        identity = (self.key, self.certificate)
        return open_channel(enrolment.device_address, self.ca, identity, message_bytes=message_bytes)


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
        device_address=_complete(response.device_address, cloud),
        tenant=response.tenant or DEFAULT_TENANT,
    )
    home.keep_enrolment(enrolment)
    return enrolment


def _complete(device_address: str, cloud: str) -> str:
    """Return the address for devices, on the cloud's own host where it names none."""
    return f"{cloud.rpartition(':')[0]}{device_address}" if device_address.startswith(":") else device_address


async def renew_certificate(home: DeviceHome, token: AccessToken) -> None:
    """Get a new certificate for the device's key, on a connection that needs none; an expired one is no obstacle.

    Raises:
        AioRpcError: The cloud cannot be reached, or says no.
        ConfigError: The device's own files cannot be used.
    """
    enrolment = home.enrolment()
    hosts = hosts_of(load_certificate(home.certificate))
    csr = make_csr(load_ec_key(home.key), _UNNAMED, hosts)
    async with open_channel(enrolment.cloud, home.ca) as channel:
        stub = fleet_pb2_grpc.FleetServiceStub(channel)
        request = fleet_pb2.RenewCertificateRequest(assertion=token.assertion(), csr_pem=csr)
        response = await token.oriented(stub.RenewCertificate(request, timeout=ENROL_TIMEOUT_S))
    write_atomically(home.certificate, response.certificate_chain_pem)


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
        address = _complete(address, self._enrolment.cloud)
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


def described(error: Exception) -> str:
    """Return an error in one line, for a log."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
