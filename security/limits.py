"""What a listener takes from whoever connects, as settings, and as the options by which gRPC's core enforces it.

What the core cannot do is done by `security.guard` for each call, or is left to the firewall (docs/deployment.md). This
module loads no gRPC: settings are read before it is known whether anything will listen.
"""

from __future__ import annotations

import resource
from typing import Final

import structlog
from pydantic import BaseModel, ConfigDict, Field

_RESERVED_FILES: Final = 128  # descriptors that connections never get: databases, models, logs, children
_FEWEST_CONNECTIONS: Final = 16
_MOST_WAITING: Final = 512

log = structlog.get_logger(__name__)


class ListenerLimits(BaseModel):
    """What one listener takes from whoever connects: the table `[listener]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    connections: int = Field(default=1024, ge=1, le=1 << 20, description="Open connections; more are closed at once.")
    streams: int = Field(default=256, ge=1, le=1 << 16, description="Calls in progress on one connection.")
    metadata_bytes: int = Field(
        default=16 << 10, ge=8 << 10, le=1 << 20, description="Largest metadata of one call, bytes."
    )
    handshake_s: float = Field(default=10.0, gt=0, le=600, description="Time for TLS and HTTP/2 to begin, seconds.")
    idle_s: float = Field(default=900.0, ge=1, le=604_800, description="Life of a connection without calls, seconds.")
    age_s: float = Field(
        default=3600.0, ge=0, le=604_800, description="Life of a connection, seconds; 0 for no end. Clients reconnect."
    )
    age_grace_s: float = Field(
        default=60.0, ge=1, le=3600, description="Time for the calls of a connection that is too old, seconds."
    )
    keepalive_s: float = Field(
        default=60.0, ge=1, le=7200, description="A connection that was silent for so long is asked for a sign of life."
    )
    keepalive_timeout_s: float = Field(default=20.0, ge=1, le=600, description="Time for that sign, seconds.")
    ping_interval_s: float = Field(
        default=10.0, ge=0, le=600, description="Shortest time between a client's pings; more are strikes, two end it."
    )
    request_s: float = Field(default=60.0, gt=0, le=3600, description="Time for one request to come, seconds.")
    stream_idle_s: float = Field(
        default=60.0, gt=0, le=86_400, description="Time for the next message of an upload to come, seconds."
    )
    caller_calls: int = Field(default=512, ge=1, le=1 << 16, description="Calls in progress of one token's subject.")
    peer_calls: int = Field(
        default=16, ge=1, le=1 << 16, description="Calls in progress of one address or device key, no token."
    )
    stranger_calls: int = Field(
        default=64, ge=1, le=1 << 16, description="Calls in progress without token and certificate, in all."
    )

    def options(self, message_bytes: int, calls: int) -> list[tuple[str, int]]:
        """Return the server's options for gRPC.

        Args:
            message_bytes: Largest message, either way.
            calls: Calls in progress.
        """
        waiting = min(calls, _MOST_WAITING)
        options = [
            ("grpc.so_reuseport", 0),  # a second server on the port must fail, not take half of the calls
            ("grpc.max_receive_message_length", message_bytes),
            ("grpc.max_send_message_length", message_bytes),
            # Without the second one, sizes between the two are refused at random.
            ("grpc.max_metadata_size", self.metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.metadata_bytes),
            ("grpc.max_allowed_incoming_connections", allowed_connections(self.connections)),
            ("grpc.max_concurrent_streams", self.streams),
            # Buffers that every connection has; they grow with what comes.
            ("grpc.tsi.max_frame_size", 4096),
            ("grpc.experimental.tcp_min_read_chunk_size", 1024),
            ("grpc.experimental.tcp_read_chunk_size", 1024),
            # Calls that nobody has looked at yet, each with its metadata in memory; from the first number on some are
            # refused, from the second on all.
            ("grpc.server.max_pending_requests", waiting),
            ("grpc.server.max_pending_requests_hard_limit", 2 * waiting),
            ("grpc.server_handshake_timeout_ms", _ms(self.handshake_s)),
            ("grpc.max_connection_idle_ms", _ms(self.idle_s)),
            ("grpc.keepalive_time_ms", _ms(self.keepalive_s)),
            ("grpc.keepalive_timeout_ms", _ms(self.keepalive_timeout_s)),
            ("grpc.http2.min_ping_interval_without_data_ms", _ms(self.ping_interval_s)),
            ("grpc.http2.max_ping_strikes", 2),
        ]
        if self.age_s:
            options.append(("grpc.max_connection_age_ms", _ms(self.age_s)))
            options.append(("grpc.max_connection_age_grace_ms", _ms(self.age_grace_s)))
        return options


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def allowed_connections(wanted: int) -> int:
    """Return how many connections this process can hold, at most `wanted`, and never so many that files run out.

    The limit of open files is raised as far as the system lets this process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _RESERVED_FILES
    if soft < needed and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard), hard))
        soft = min(needed, hard)
    if soft >= needed:
        return wanted
    allowed = max(_FEWEST_CONNECTIONS, soft - _RESERVED_FILES)
    if allowed < wanted:
        log.warning("fewer connections than configured: too few open files", allowed=allowed, wanted=wanted, files=soft)
    return min(wanted, allowed)
