"""Who this device is: its key and certificate, and enrolment.

device.key device.pem        key (never leaves the device) and certificate chain
trust/ca.pem trust/root.json what the device believes in from the start: the cloud's CA and the update root
jwks.json                    public keys that verify tokens of callers, for listeners beyond loopback
enrolment.json               the rest; written last, so a folder that has it is complete
"""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import grpc
from pydantic import BaseModel, ConfigDict, ValidationError

from edge.store import write_atomically
from edge.uplink import open_channel
from isthmus.address import split_address
from isthmus.errors import ConfigError, ConflictError, IdentityError, UnavailableError
from isthmus.status import from_rpc
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc
from security.enrolment import make_csr, new_device_key
from security.tenancy import DEFAULT_TENANT

ENROL_TIMEOUT_S: Final = 30.0
_HINTS: Final = {
    UnavailableError: "is `isthmus cloud serve` running at --cloud, and does --trust come from its workspace?",
    IdentityError: "a code is good for one device and a short time; `isthmus device invite DEVICE` prints a new one",
}
UNNAMED: Final = "device"  # in the signing request only: the invitation says who the device is


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
    response = await _exchange(home, cloud, code, make_csr(key, UNNAMED, hosts))
    write_atomically(home.certificate, response.certificate_chain_pem)
    write_atomically(home.jwks, response.jwks_json)
    enrolment = Enrolment(
        device_id=response.device_id,
        cloud=cloud,
        token_issuer=response.token_issuer,
        token_audience=response.token_audience,
        device_address=complete_address(response.device_address, cloud),
        tenant=response.tenant or DEFAULT_TENANT,
    )
    home.keep_enrolment(enrolment)
    return enrolment


def complete_address(device_address: str, cloud: str) -> str:
    """Return the address for devices, on the cloud's own host where it names none."""
    return f"{cloud.rpartition(':')[0]}{device_address}" if device_address.startswith(":") else device_address


async def _exchange(home: DeviceHome, cloud: str, code: str, csr: bytes) -> fleet_pb2.EnrolResponse:
    async with open_channel(cloud, home.ca) as channel:
        stub = fleet_pb2_grpc.FleetServiceStub(channel)
        try:
            request = fleet_pb2.EnrolRequest(code=code, csr_pem=csr)
            response: fleet_pb2.EnrolResponse = await stub.Enrol(request, timeout=ENROL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, f"enrolment at {cloud}", hints=_HINTS) from error
    return response
