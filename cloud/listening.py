"""The listeners of the cloud: for everybody, for devices, and for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client.registry import Collector

from cloud.config import CloudSettings
from cloud.metrics import cloud_registry
from cloud.replicas import Replicas
from isthmus.address import check_free
from isthmus.errors import ConfigError
from isthmus.metrics_server import MetricsServer
from isthmus.oip import SERVICE
from isthmus.status import MethodInterceptor, StatusInterceptor
from security.listener import Listener
from security.tls import server_credentials

_HEALTH_S: Final = 0.5
_SERVICES: Final = (
    SERVICE,
    "isthmus.v1.FleetService",
    "isthmus.v1.RegistryService",
    "isthmus.v1.RolloutService",
    "isthmus.v1.AccessService",
    "isthmus.v1.TrafficService",
    "isthmus.v1.UsageService",
    "isthmus.v1.AuditService",
    "isthmus.v1.SealingService",
)


def open_server(settings: CloudSettings, *interceptors: MethodInterceptor) -> tuple[grpc.aio.Server, str, str]:
    """Return a server that is bound to its two addresses, and these: for everybody, and for devices."""
    server = Listener(
        settings.listener,
        message_bytes=settings.max_message_bytes,
        calls=settings.concurrent_calls,
        interceptors=(StatusInterceptor(), *interceptors),
    )
    key, chain = settings.home / "server.key", settings.home / "server.pem"
    address = _bind(server, "listen", settings.listen, server_credentials(key, chain))
    asking = server_credentials(key, chain, settings.home / "issuing-ca.pem")
    return server, address, _bind(server, "device_listen", settings.device_listener, asking)


def _bind(server: grpc.aio.Server, setting: str, address: str, credentials: grpc.ServerCredentials) -> str:
    check_free(address, setting)
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise ConfigError(
            f"{setting}: cannot listen on {address}",
            hint=f"another program may have it, or it is not this machine's; {setting} takes another address",
            reason="address-in-use",
        )
    return f"{address.rpartition(':')[0]}:{port}"


async def listen(server: grpc.aio.Server, drain_s: float, stack: AsyncExitStack) -> health.aio.HealthServicer:
    """Start the server; it stops, with `drain_s` for what runs, when `stack` ends."""
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((*_SERVICES, reflection.SERVICE_NAME), server)
    for service in ("", *_SERVICES):
        await servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    stack.push_async_callback(server.stop, drain_s)
    stack.push_async_callback(servicer.enter_graceful_shutdown)
    return servicer


async def listen_for_metrics(
    settings: CloudSettings, collectors: Sequence[Collector], stack: AsyncExitStack
) -> str | None:
    """Listen for Prometheus, if anywhere; return the address."""
    if settings.metrics_listen is None:
        return None
    server = MetricsServer(settings.metrics_listen, cloud_registry(*collectors), public=settings.metrics_public)
    address = await server.start()
    stack.push_async_callback(server.stop)
    return address


async def report_health(servicer: health.aio.HealthServicer, replicas: Replicas) -> None:
    """Say NOT_SERVING of inference, and of inference only, while Triton is away: devices still get tokens and updates.

    The process as a whole ("") stays SERVING: restarting or bypassing it would not bring Triton back any sooner.
    """
    status = health_pb2.HealthCheckResponse
    while True:
        await servicer.set(SERVICE, status.SERVING if replicas.is_up else status.NOT_SERVING)
        await asyncio.sleep(_HEALTH_S)
