"""Settings of the cloud process and of the operator's client; only isthmus.settings reads files and environment."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from cloud.quotas import Defaults, Limits, parse_rate, parse_size
from isthmus.errors import InputError
from isthmus.settings import Settings
from security.limits import ListenerLimits
from security.oidc import OidcConfig


class QuotaSettings(BaseModel):
    """What one quota allows; what is left out has no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: str = Field(default="", description='Requests in a time, "100/s", "5/min" or "1000/h".')
    burst: int | None = Field(default=None, ge=0, description="Requests at once; left out: one second's worth.")
    bytes_rate: str = Field(default="", description='Bytes of requests in a time, "10MB/s".')
    bytes_burst: str = Field(default="", description='Bytes at once, "50MB"; left out: one second\'s worth.')
    concurrency: int | None = Field(default=None, ge=0, description="Requests in progress.")

    @property
    def limits(self) -> Limits:
        """Return what it allows.

        Raises:
            InputError: It cannot be.
        """
        return Limits(
            rate=parse_rate(self.rate) if self.rate else None,
            burst=self.burst,
            bytes_rate=parse_rate(self.bytes_rate, sizes=True) if self.bytes_rate else None,
            bytes_burst=parse_size(self.bytes_burst) if self.bytes_burst else None,
            concurrency=self.concurrency,
        )

    @model_validator(mode="after")
    def _can_be(self) -> QuotaSettings:
        try:
            _ = self.limits
        except InputError as error:
            raise ValueError(error.message) from error
        return self


class QuotasSettings(BaseModel):
    """Quotas of whom no operator has set any: the table `[quotas]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: QuotaSettings = Field(default=QuotaSettings(), description="Of each tenant.")
    device: QuotaSettings = Field(default=QuotaSettings(), description="Of each device, or other caller.")
    model: QuotaSettings = Field(default=QuotaSettings(), description="Of each model of a tenant.")

    @property
    def defaults(self) -> Defaults:
        """Return what they allow."""
        return Defaults(self.tenant.limits, self.device.limits, self.model.limits)


class CloudListener(ListenerLimits):
    """The limits of the gateway's listener: one connection for each device, and those of operators and clients."""

    connections: int = Field(default=4096, ge=1, le=1 << 20, description="Open connections; more are closed at once.")


class CloudSettings(Settings):
    """Everything that `isthmus cloud serve` can be told."""

    env_prefix: ClassVar[str] = "ISTHMUS_CLOUD_"

    home: Path = Field(default=Path("cloud"), description="The workspace's cloud folder, made by `isthmus keys init`")
    listen: str = Field(default="127.0.0.1:8443", description="HOST:PORT of the TLS listener; port 0 takes a free one")
    device_listen: str = Field(
        default="",
        description="HOST:PORT of the listener that asks for device certificates; empty: the port after `listen`",
    )
    device_address: str = Field(
        default="",
        description="HOST:PORT that devices are told for it; empty: the host that they enrolled at, and its port",
    )
    unbound_tokens: bool = Field(
        default=False, description="Give tokens to devices that show no certificate: agents of earlier releases"
    )
    blobs: str = Field(
        default="", description="Folder or fsspec address, such as s3://bucket/folder, for bundles; empty: in `home`"
    )
    triton: str = Field(
        default="", description="HOST:PORT of running Tritons, separated by commas; empty starts children"
    )
    triton_children: int = Field(default=1, ge=1, le=16, description="How many Tritons are started where none is named")
    triton_ca: Path | None = Field(
        default=None, description="CA of an external Triton; without it the link is plain text"
    )
    triton_plaintext: bool = Field(
        default=False, description="Allow plain text to a Triton that is not on this machine"
    )
    triton_start_s: float = Field(default=30.0, gt=0, description="Seconds that Triton may take to start")
    triton_load_s: float = Field(default=120.0, gt=0, description="Seconds that loading one heavy model may take")
    triton_stop_s: float = Field(
        default=5.0, gt=0, description="Seconds that Triton may take to stop before it is killed"
    )
    max_message_bytes: int = Field(default=64 << 20, ge=1 << 20, le=1 << 30, description="Largest inference message")
    concurrent_calls: int = Field(
        default=8192, ge=1, le=1 << 20, description="Calls in progress, one for each device among them"
    )
    listener: CloudListener = Field(default=CloudListener(), description="What the listener takes from callers")
    default_deadline_s: float = Field(default=30.0, gt=0, description="Deadline of requests that come without one")
    token_ttl_s: int = Field(default=900, ge=60, le=86400, description="Life of the access tokens that devices get")
    drain_s: float = Field(default=5.0, ge=0, description="Seconds that running requests get when the cloud stops")
    heavy_versions: int = Field(
        default=3, ge=1, le=16, description="Newest heavy models of each model that stay loaded"
    )
    delta_bases: int = Field(
        default=3, ge=0, le=16, description="Newest earlier versions that deltas are prepared from"
    )
    used_bases: int = Field(
        default=8, ge=0, le=64, description="Versions in use, by most devices first, that deltas are prepared from, too"
    )
    database: str = Field(
        default="", description="Address of a PostgreSQL database; empty keeps an SQLite file in the workspace"
    )
    cache_bytes: int = Field(
        default=64 << 20,
        ge=0,
        le=1 << 40,
        description="Memory for kept answers, where a traffic policy keeps any",
    )
    metrics_listen: str | None = Field(default=None, description="HOST:PORT for Prometheus; off when unset")
    metrics_public: bool = Field(
        default=False, description="Allow metrics_listen beyond loopback, without TLS or tokens"
    )
    rollout_poll_s: float = Field(
        default=1.0, gt=0, le=60, description="How often rollouts are decided on and other replicas are followed"
    )
    oidc: tuple[OidcConfig, ...] = Field(
        default=(), description="External OpenID Connect issuers whose tokens are believed; docs/access.md"
    )
    access_poll_s: float = Field(
        default=1.0, gt=0, le=4, description="How often roles and API keys of other replicas are followed"
    )
    quotas: QuotasSettings = Field(
        default=QuotasSettings(), description="Quotas where none is set: tables tenant, device and model"
    )
    device_streams: int = Field(default=2, ge=1, le=1000, description="Open Watch streams of one device")
    redis: SecretStr = Field(
        default=SecretStr(""),
        description="redis://, rediss:// or unix:// address of a Redis that several clouds share; empty: memory",
    )
    redis_ca: Path | None = Field(default=None, description="CA of a Redis at rediss://; without it the system's")
    redis_plaintext: bool = Field(default=False, description="Allow plain text to a Redis that is not on this machine")
    redis_timeout_s: float = Field(
        default=1.0, gt=0, le=60, description="How long Redis may take to answer before requests are counted here"
    )
    metering_flush_s: float = Field(
        default=10.0, ge=0.1, le=3600, description="How often counts of requests move to the database"
    )
    audit_folder: Path | None = Field(
        default=None, description="Folder of the audit log, which replicas may share; in `home` when unset"
    )
    audit_share: float = Field(
        default=0.01, ge=0, le=1, description="Share of answered inference requests that the audit log records"
    )
    audit_checkpoint_s: float = Field(
        default=60.0, gt=0, le=3600, description="Longest time between signed checkpoints of the audit log"
    )
    audit_min_free_mib: int = Field(
        default=64, ge=0, description="Disk space below which administrative calls are refused, as when it is full"
    )
    usage_days: int = Field(default=400, ge=1, le=36500, description="Days that usage is kept")
    ready_file: Path | None = Field(default=None, description="File that gets the address and process ids once serving")

    @field_validator("listen")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        host, colon, port = value.rpartition(":")
        if not colon or not host or not port.isdigit() or int(port) > 65535:
            raise ValueError("expected HOST:PORT, for example 127.0.0.1:8443")
        return value

    @field_validator("triton", "device_listen", "device_address")
    @classmethod
    def _empty_or_addresses(cls, value: str) -> str:
        addresses = [cls._host_and_port(address.strip()) for address in value.split(",")] if value else []
        if len(set(addresses)) < len(addresses):
            raise ValueError("expected each Triton once")
        return ",".join(addresses)

    @property
    def tritons(self) -> tuple[str, ...]:
        """Return the addresses of the running Tritons."""
        return tuple(self.triton.split(",")) if self.triton else ()

    @property
    def device_listener(self) -> str:
        """Return HOST:PORT of the listener for devices."""
        host, _, port = self.listen.rpartition(":")
        return self.device_listen or f"{host}:{int(port) + 1 if int(port) else 0}"


class OperatorSettings(Settings):
    """How the operator's commands reach a cloud."""

    env_prefix: ClassVar[str] = "ISTHMUS_"

    cloud: str = Field(default="127.0.0.1:8443", description="HOST:PORT of the cloud")
    trust: Path | None = Field(default=None, description="Folder with ca.pem, made by `isthmus keys init`")
    operator: Path | None = Field(
        default=None, description="The workspace's operator folder, which holds the signing key"
    )
    token_file: Path | None = Field(default=None, description="File with an operator's access token")
    tenant: str = Field(default="", description="Tenant that an admin of the cloud acts in; empty: the token's own")
    timeout_s: float = Field(default=30.0, gt=0, description="Seconds that one short call may take")
