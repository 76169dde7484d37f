"""Settings of the cloud process and of the operator's client; only isthmus.settings reads files and environment."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from isthmus.settings import Settings
from security.limits import ListenerLimits


class CloudListener(ListenerLimits):
    """The limits of the gateway's listener: one connection for each device, and those of operators and clients."""

    connections: int = Field(default=4096, ge=1, le=1 << 20, description="Open connections; more are closed at once.")


class CloudSettings(Settings):
    """Everything that `isthmus cloud serve` can be told."""

    env_prefix: ClassVar[str] = "ISTHMUS_CLOUD_"

    home: Path = Field(default=Path("cloud"), description="The workspace's cloud folder, made by `isthmus keys init`")
    listen: str = Field(default="127.0.0.1:8443", description="HOST:PORT of the TLS listener; port 0 takes a free one")
    blobs: str = Field(
        default="", description="Folder or fsspec address, such as s3://bucket/folder, for bundles; empty: in `home`"
    )
    triton: str = Field(default="", description="HOST:PORT of a running Triton; empty starts one as a child")
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
    rollout_poll_s: float = Field(
        default=1.0, gt=0, le=60, description="How often rollouts are decided on and other replicas are followed"
    )
    ready_file: Path | None = Field(default=None, description="File that gets the address and process ids once serving")

    @field_validator("listen")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        host, colon, port = value.rpartition(":")
        if not colon or not host or not port.isdigit() or int(port) > 65535:
            raise ValueError("expected HOST:PORT, for example 127.0.0.1:8443")
        return value

    @field_validator("triton")
    @classmethod
    def _empty_or_address(cls, value: str) -> str:
        return cls._host_and_port(value) if value else value


class OperatorSettings(Settings):
    """How the operator's commands reach a cloud."""

    env_prefix: ClassVar[str] = "ISTHMUS_"

    cloud: str = Field(default="127.0.0.1:8443", description="HOST:PORT of the cloud")
    trust: Path | None = Field(default=None, description="Folder with ca.pem, made by `isthmus keys init`")
    operator: Path | None = Field(
        default=None, description="The workspace's operator folder, which holds the signing key"
    )
    token_file: Path | None = Field(default=None, description="File with an operator's access token")
    timeout_s: float = Field(default=30.0, gt=0, description="Seconds that one short call may take")
