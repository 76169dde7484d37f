"""Puts the cloud together: the one place that names concrete parts and the order in which they start and stop.

Start: lock the workspace, open the database and folders, start Triton and check it, load the heavy models, then listen.
Stop: say NOT_SERVING, let running requests end, then stop Triton. Nothing listens before everything works.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cloud.access_service import AccessService
from cloud.access_store import AccessStore
from cloud.blobs import Blobs, Deltas
from cloud.catalog import Catalog
from cloud.conductor import Conductor, Releases
from cloud.config import CloudSettings
from cloud.database import Database, open_database
from cloud.fleet import FleetService
from cloud.gateway import Gateway
from cloud.heavy import HeavyPool
from cloud.ownership import BlobOwners
from cloud.publish import Publisher
from cloud.registry import RegistryService
from cloud.revocations import Revocations
from cloud.rollout_service import RolloutService
from cloud.roster import Roster
from cloud.supervisor import TritonServer
from cloud.triton import TritonClient, check_link
from isthmus.address import check_free
from isthmus.errors import ConfigError, ConflictError, IsthmusError, UnavailableError
from isthmus.oip import SERVICE
from isthmus.status import StatusInterceptor
from isthmus.v1 import access_pb2_grpc, fleet_pb2_grpc, registry_pb2_grpc
from security.authenticator import Authenticator
from security.binding import Guard
from security.enrolment import IssuingCa
from security.interceptors import AuthInterceptor
from security.oidc import OidcIssuers
from security.roles import AccessBook
from security.tenants import TenantRepositories
from security.tls import server_credentials
from security.tokens import TokenIssuer, TokenVerifier

_WORKSPACE_FILES: Final = ("server.key", "server.pem", "issuing-ca.key", "tokens/issuer.json", "tuf/1.root.json")
_HEALTH_S: Final = 0.5
_REFRESH_AGAIN_S: Final = 60.0
_REFRESH_S: Final = 3600.0  # how often signed metadata is looked at for renewal; it lives for a day at least
_FOLLOW_S: Final = 1.0  # how often the files of keys are looked at
_SERVICES: Final = (
    SERVICE,
    "isthmus.v1.FleetService",
    "isthmus.v1.RegistryService",
    "isthmus.v1.RolloutService",
    "isthmus.v1.AccessService",
)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Cloud:
    """A running cloud."""

    address: str
    device_address: str  # where devices call, with their certificates
    pool: HeavyPool
    triton: TritonServer | None  # None where an external one is used
    _stack: AsyncExitStack

    async def stop(self) -> None:
        """Stop in order: requests first, Triton last."""
        await self._stack.aclose()


async def start_cloud(settings: CloudSettings) -> Cloud:
    """Start everything that `settings` ask for and return it once it serves.

    Raises:
        ConfigError: The workspace, the address or the machine cannot work as they are.
        ConflictError: Another cloud runs on this workspace.
        UnavailableError: Triton cannot be reached.
    """
    async with AsyncExitStack() as stack:
        state = _open_state(settings.home, stack)
        issuer, authority = TokenIssuer.load(settings.home), IssuingCa.load(settings.home)
        repositories = TenantRepositories(settings.home)
        database = Database(settings.database) if settings.database else open_database(state / "isthmus.db")
        stack.callback(database.close)
        place = settings.blobs.rstrip("/") or str(state)
        blobs, deltas, catalog = Blobs(f"{place}/blobs"), Deltas(f"{place}/deltas"), Catalog()

        triton, client = _triton(settings, state, stack)
        pool = HeavyPool(
            client,
            state / "triton",
            push=triton is None,
            load_s=settings.triton_load_s,
            drain_s=settings.default_deadline_s,
            count_stubs=triton.count_stubs if triton is not None else lambda: None,
        )
        stack.push_async_callback(pool.close)
        roster = Roster(database, lambda model, version: publisher.variants(model, version), time.time)
        owners, book = BlobOwners(database), AccessBook()
        publisher = Publisher(
            database, blobs, deltas, repositories, owners, catalog, pool, roster,
            heavy_versions=settings.heavy_versions, delta_bases=settings.delta_bases, used_bases=settings.used_bases,
        )  # fmt: skip
        conductor = Conductor(
            database,
            roster,
            Releases(publisher.terms_of, publisher.prepare, publisher.follow),
            poll_s=settings.rollout_poll_s,
        )
        access, issuers = AccessStore(database, book, poll_s=settings.access_poll_s), OidcIssuers(settings.oidc)
        guard, verifier = Guard(), issuer.verifier()
        revocations = Revocations(database, guard)
        await revocations.refresh()
        authenticator = Authenticator(verifier, book=book, issuers=issuers)
        server, address, device_address = _server(settings, AuthInterceptor(authenticator, guard=guard))
        server.add_generic_rpc_handlers(
            [Gateway(catalog, pool, client, default_deadline_s=settings.default_deadline_s).handler()]
        )
        fleet = FleetService(
            database, conductor, issuer, authority,
            revocations=revocations, device_address=settings.device_address or f":{device_address.rpartition(':')[2]}",
            unbound_tokens=settings.unbound_tokens, token_ttl_s=settings.token_ttl_s, tenants=repositories.names,
        )  # fmt: skip
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(fleet, server)
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(
            RegistryService(
                database, blobs, deltas, repositories, catalog, publisher, owners, changed=conductor.follow
            ),
            server,
        )
        access_pb2_grpc.add_AccessServiceServicer_to_server(AccessService(access), server)
        fleet_pb2_grpc.add_RolloutServiceServicer_to_server(RolloutService(conductor), server)

        ready_file = _ReadyFile(settings.ready_file, address, device_address, triton)
        ready_file.check()
        stack.callback(ready_file.remove)
        await _start_triton(triton, client, pool, ready_file)
        await publisher.restore()
        await conductor.refresh()
        await access.refresh()
        stack.push_async_callback(access.keep_used)
        await stack.enter_async_context(_background(access.run(), name="access"))
        for external in issuers.all:
            await stack.enter_async_context(_background(external.keys.run(), name=f"oidc-{external.config.name}"))
        await stack.enter_async_context(_background(conductor.run(), name="rollouts"))
        await stack.enter_async_context(_background(revocations.run(), name="revocations"))
        await stack.enter_async_context(_background(_follow_keys(issuer, verifier, authority), name="keys"))
        await stack.enter_async_context(_background(pool.watch(), name="heavy-watch"))
        await stack.enter_async_context(_background(_keep_fresh(repositories), name="metadata-refresh"))
        servicer = await _listen(server, settings.drain_s, stack)
        await stack.enter_async_context(_background(_report_health(servicer, pool), name="health"))
        stack.callback(conductor.close)
        ready_file.write()
        log.info("cloud serves", address=address, device_address=device_address, models=catalog.models)
        return Cloud(address, device_address, pool, triton, stack.pop_all())


def _open_state(home: Path, stack: AsyncExitStack) -> Path:
    """Return the state folder of a workspace that nobody else serves."""
    missing = [name for name in _WORKSPACE_FILES if not (home / name).is_file()]
    if missing:
        raise ConfigError(
            f"{home} is not the cloud folder of a workspace: it lacks {', '.join(missing)}",
            hint="isthmus keys init DIR --host localhost makes one; its cloud folder is DIR/cloud",
        )
    state = home / "state"
    try:
        state.mkdir(mode=0o700, exist_ok=True)
        (state / "triton").mkdir(exist_ok=True)
        lock = stack.enter_context((state / "lock").open("w"))
    except OSError as error:
        raise ConfigError(
            f"cannot write to {state}: {error.strerror}", hint="the cloud keeps its database and blobs there"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConflictError(
            f"another cloud runs on {home}",
            hint="stop it first; another workspace, made by isthmus keys init, can run beside it",
            reason="workspace-in-use",
        ) from error
    return state


def _triton(settings: CloudSettings, state: Path, stack: AsyncExitStack) -> tuple[TritonServer | None, TritonClient]:
    if settings.triton:
        check_link(settings.triton, ca=settings.triton_ca, plaintext=settings.triton_plaintext)
        server, client = None, TritonClient(settings.triton, ca=settings.triton_ca)
    else:
        server = TritonServer(
            state / "triton",
            log_file=state / "triton.log",
            start_s=settings.triton_start_s,
            stop_s=settings.triton_stop_s,
        )
        stack.push_async_callback(server.stop)
        client = TritonClient(server.address)
    stack.push_async_callback(client.close)
    return server, client


async def _start_triton(
    triton: TritonServer | None, client: TritonClient, pool: HeavyPool, ready_file: _ReadyFile
) -> None:
    if triton is None:
        if not await client.is_live():
            raise UnavailableError(
                f"no Triton answers at {client.address}",
                hint="start it there, or leave --triton out to have one started here",
                reason="triton-unavailable",
            )
        log.info("using an external Triton", address=client.address, version=await client.server_version())
        await pool.restore()
        return

    async def on_started() -> None:
        await pool.restore()
        ready_file.rewrite()

    await triton.start(on_started)


def _server(settings: CloudSettings, access: AuthInterceptor) -> tuple[grpc.aio.Server, str, str]:
    """Return a server that is bound to its two addresses, and these: for everybody, and for devices."""
    server = grpc.aio.server(
        interceptors=(StatusInterceptor(), access),
        options=(
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", settings.max_message_bytes),
            ("grpc.so_reuseport", 0),  # or a second cloud would silently share the port
            ("grpc.keepalive_time_ms", 60_000),  # finds watchers that went away without a word
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ),
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


async def _listen(server: grpc.aio.Server, drain_s: float, stack: AsyncExitStack) -> health.aio.HealthServicer:
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((*_SERVICES, reflection.SERVICE_NAME), server)
    for service in ("", *_SERVICES):
        await servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    stack.push_async_callback(server.stop, drain_s)
    stack.push_async_callback(servicer.enter_graceful_shutdown)
    return servicer


async def _report_health(servicer: health.aio.HealthServicer, pool: HeavyPool) -> None:
    """Say NOT_SERVING of inference, and of inference only, while Triton is away: devices still get tokens and updates.

    The process as a whole ("") stays SERVING: restarting or bypassing it would not bring Triton back any sooner.
    """
    status = health_pb2.HealthCheckResponse
    while True:
        await servicer.set(SERVICE, status.SERVING if await pool.is_up() else status.NOT_SERVING)
        await asyncio.sleep(_HEALTH_S)


@contextlib.asynccontextmanager
async def _background(work: Any, *, name: str) -> AsyncIterator[None]:
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_complain)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _complain(task: asyncio.Task[Any]) -> None:
    """Say so when work that never ends has ended."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("background work died; restart the cloud", work=task.get_name(), exc_info=error)


async def _keep_fresh(repositories: TenantRepositories) -> None:
    """Re-sign the metadata that is about to expire, now and every hour."""
    while True:
        try:
            await asyncio.to_thread(repositories.refresh_if_due, datetime.now(UTC))
        except (IsthmusError, OSError) as error:  # a disk may be full for a while
            log.exception("signed metadata not renewed", reason=getattr(error, "reason", "disk"))
            await asyncio.sleep(_REFRESH_AGAIN_S)
        else:
            await asyncio.sleep(_REFRESH_S)


async def _follow_keys(issuer: TokenIssuer, verifier: TokenVerifier, authority: IssuingCa) -> None:
    """Take up token keys and an issuing authority that were rotated, and let go keys whose time is over."""
    published = issuer.jwks
    while True:
        await asyncio.sleep(_FOLLOW_S)
        authority.refresh()
        issuer.refresh()
        if (jwks := issuer.jwks) != published:  # in one step with the line above: nothing is signed that is not known
            verifier.use_keys(jwks)
            published = jwks


class _ReadyFile:
    """Tells scripts where the cloud listens; exists while it serves."""

    def __init__(self, path: Path | None, address: str, device_address: str, triton: TritonServer | None) -> None:
        self._path, self._address, self._device_address, self._triton = path, address, device_address, triton
        self._written = False

    def check(self) -> None:
        """Check that the file can be written, before anything is started.

        Raises:
            ConfigError: It cannot.
        """
        if self._path is not None and (self._path.is_dir() or not os.access(self._path.parent, os.W_OK | os.X_OK)):
            raise ConfigError(
                f"cannot write the ready file {self._path}", hint="--ready-file needs a file in a folder that exists"
            )

    def write(self) -> None:
        """Write the file, whole or not at all."""
        if self._path is None:
            return
        record = {
            "address": self._address,
            "device_address": self._device_address,
            "pid": os.getpid(),
            "triton_pid": self._triton.pid if self._triton else 0,
        }
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(record) + "\n")
        temporary.replace(self._path)
        self._written = True

    def rewrite(self) -> None:
        """Write the file again when it was written: Triton has another process id."""
        if self._written:
            self.write()

    def remove(self) -> None:
        """Remove the file."""
        if self._written and self._path is not None:
            self._path.unlink(missing_ok=True)


async def serve_until_signal(settings: CloudSettings) -> None:
    """Run a cloud until SIGTERM or SIGINT, then stop it in order.

    Raises:
        IsthmusError: As start_cloud.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    starting = asyncio.create_task(start_cloud(settings))
    asked = asyncio.create_task(stopping.wait())
    await asyncio.wait((starting, asked), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():  # asked to stop while starting: take back what has been started
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return
    try:
        cloud = await starting
    finally:
        if starting.exception() is not None:
            asked.cancel()
    await asked
    log.info("cloud stops")
    await cloud.stop()
