"""Puts the cloud together: the one place that names concrete parts and the order in which they start and stop.

Start: lock the workspace, open the database and folders, start Triton and check it, load the heavy models, then listen.
Stop: say NOT_SERVING, let running requests end, then stop Triton. Nothing listens before everything works.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import signal
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from cloud.access_service import AccessService
from cloud.access_store import AccessStore
from cloud.audit_service import AuditService
from cloud.background import background, follow_keys, keep_fresh, sum_up
from cloud.blobs import Blobs, Deltas
from cloud.catalog import Catalog
from cloud.conductor import Conductor, Releases
from cloud.config import CloudSettings
from cloud.counters import GatewayCounters
from cloud.database import Database, open_database
from cloud.fleet import FleetService
from cloud.gateway import Gateway, Inference
from cloud.limits import Limits, open_limits
from cloud.listening import listen, listen_for_metrics, open_server, report_health
from cloud.metrics import GatewayCollector
from cloud.ownership import BlobOwners
from cloud.publish import Publisher
from cloud.ready_file import ReadyFile
from cloud.recorder import Recorder
from cloud.redis_quotas import connect
from cloud.registry import RegistryService
from cloud.replicas import Replicas
from cloud.response_cache import MemoryCache, ResponseCache
from cloud.revocations import Revocations
from cloud.rollout_service import RolloutService
from cloud.roster import Roster
from cloud.shadow import Shadows
from cloud.supervisor import TritonServer
from cloud.traffic_desk import Serving, TrafficDesk
from cloud.traffic_service import TrafficService
from cloud.tritons import open_replicas, start_replicas
from cloud.unsealer import SealingService, Unsealer
from isthmus.errors import ConfigError, ConflictError
from isthmus.memory import limit_heaps
from isthmus.v1 import (
    access_pb2_grpc,
    audit_pb2_grpc,
    fleet_pb2_grpc,
    registry_pb2_grpc,
    sealing_pb2_grpc,
    traffic_pb2_grpc,
    usage_pb2_grpc,
)
from security.audit.budget import Budget
from security.audit.interceptors import ActionAudit, RefusalAudit
from security.audit.keys import PUBLIC, load_audit_key, load_public_keys
from security.audit.writer import AuditLog, Terms
from security.authenticator import Authenticator
from security.binding import Guard
from security.enrolment import IssuingCa
from security.guard import CallGuard
from security.interceptors import AuthInterceptor
from security.oidc import OidcIssuers
from security.roles import AccessBook
from security.tenants import TenantRepositories
from security.tokens import TokenIssuer

_ROOT: Final = "tuf/1.root.json"  # the same in all clouds that serve one fleet, and in no others
_WORKSPACE_FILES: Final = ("server.key", "server.pem", "issuing-ca.key", "tokens/issuer.json", _ROOT)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Cloud:
    """A running cloud."""

    address: str
    device_address: str  # where devices call, with their certificates
    pool: Replicas
    limits: Limits
    metrics: str | None  # where Prometheus reads, if anywhere
    _stack: AsyncExitStack

    @property
    def triton(self) -> TritonServer | None:
        """Return the first Triton that is our child; None where external ones are used."""
        return next((replica.server for replica in self.pool), None)

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
        trail, refusals = _audit_log(settings, state), Budget()
        stack.callback(trail.close)
        recorder = Recorder(trail, share=settings.audit_share)
        database = Database(settings.database) if settings.database else open_database(state / "isthmus.db")
        stack.callback(database.close)
        place = settings.blobs.rstrip("/") or str(state)
        blobs, deltas, catalog = Blobs(f"{place}/blobs"), Deltas(f"{place}/deltas"), Catalog()

        replicas = open_replicas(settings, state, stack)
        stack.push_async_callback(replicas.close)
        desk = TrafficDesk(database, catalog, replicas, poll_s=settings.rollout_poll_s)
        desk.read()
        roster = Roster(database, lambda model, version: publisher.variants(model, version), time.time)
        owners, book = BlobOwners(database), AccessBook()
        publisher = Publisher(
            database, blobs, deltas, repositories, owners, catalog, replicas, roster,
            heavy_versions=settings.heavy_versions, delta_bases=settings.delta_bases, used_bases=settings.used_bases,
            traffic=desk.versions,
        )  # fmt: skip
        desk.serve_with(Serving(publisher.check_not_withdrawn, lambda model: publisher.follow((model,))))
        conductor = Conductor(
            database,
            roster,
            Releases(publisher.terms_of, publisher.prepare, publisher.follow),
            poll_s=settings.rollout_poll_s,
            recorder=recorder,
        )
        access, issuers = AccessStore(database, book, poll_s=settings.access_poll_s), OidcIssuers(settings.oidc)
        guard, verifier = Guard(), issuer.verifier()
        revocations = Revocations(database, guard)
        await revocations.refresh()
        limits = await open_limits(
            settings, database, state, replicas.statistics_by_source, catalog, repositories.names, stack
        )
        for name, work in limits.works.items():
            await stack.enter_async_context(background(work(), name=name))
        authenticator = Authenticator(verifier, book=book, issuers=issuers, tenants=repositories.names)
        server, address, device_address = open_server(
            settings,
            RefusalAudit(trail, refusals),
            AuthInterceptor(authenticator, guard=guard),
            CallGuard(settings.listener),
            ActionAudit(trail),  # sees requests that were read and parsed
        )
        counters = GatewayCounters()
        shadows = Shadows(replicas, timeout_s=settings.default_deadline_s)
        stack.push_async_callback(shadows.close)
        cache = _cache(settings, stack)
        inference = Inference(desk, shadows, cache, counters, limits.admission, limits.meter)
        unsealer = Unsealer(settings.home)
        gateway = Gateway(
            catalog, replicas, inference,
            default_deadline_s=settings.default_deadline_s, recorder=recorder, unsealer=unsealer,
        )  # fmt: skip
        server.add_generic_rpc_handlers([gateway.handler()])
        traffic_pb2_grpc.add_TrafficServiceServicer_to_server(TrafficService(desk, catalog, replicas, counters), server)
        fleet = FleetService(
            database, conductor, issuer, authority, admission=limits.admission,
            revocations=revocations, device_address=settings.device_address or f":{device_address.rpartition(':')[2]}",
            unbound_tokens=settings.unbound_tokens, token_ttl_s=settings.token_ttl_s, tenants=repositories.names,
            recorder=recorder,
        )  # fmt: skip
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(fleet, server)
        registry = RegistryService(
            database, blobs, deltas, repositories, catalog, publisher, owners,
            changed=conductor.follow, recorder=recorder,
        )  # fmt: skip
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(registry, server)
        access_pb2_grpc.add_AccessServiceServicer_to_server(AccessService(access), server)
        sealing_pb2_grpc.add_SealingServiceServicer_to_server(SealingService(unsealer), server)
        audit_pb2_grpc.add_AuditServiceServicer_to_server(AuditService(trail.folder), server)
        fleet_pb2_grpc.add_RolloutServiceServicer_to_server(RolloutService(conductor), server)
        usage_pb2_grpc.add_UsageServiceServicer_to_server(limits.service, server)

        ready_file = ReadyFile(settings.ready_file, address, device_address, replicas)
        ready_file.check()
        stack.callback(ready_file.remove)
        await start_replicas(replicas, ready_file.rewrite)
        await publisher.restore()
        await conductor.refresh()
        await access.refresh()
        stack.push_async_callback(access.keep_used)
        await stack.enter_async_context(background(access.run(), name="access"))
        for external in issuers.all:
            await stack.enter_async_context(background(external.keys.run(), name=f"oidc-{external.config.name}"))
        await stack.enter_async_context(background(conductor.run(), name="rollouts"))
        await stack.enter_async_context(background(revocations.run(), name="revocations"))
        await stack.enter_async_context(background(follow_keys(issuer, verifier, authority), name="keys"))
        await stack.enter_async_context(background(replicas.watch(), name="replicas"))
        await stack.enter_async_context(background(desk.follow(), name="traffic"))
        await stack.enter_async_context(background(keep_fresh(repositories), name="metadata-refresh"))
        await stack.enter_async_context(background(sum_up(trail, refusals), name="audit-summaries"))
        metrics = await listen_for_metrics(
            settings, [GatewayCollector(counters, replicas, cache), limits.collector()], stack
        )
        ready_file.metrics = metrics
        servicer = await listen(server, settings.drain_s, stack)
        await stack.enter_async_context(background(report_health(servicer, replicas), name="health"))
        stack.callback(conductor.close)
        ready_file.write()
        log.info("cloud serves", address=address, device_address=device_address, metrics=metrics, models=catalog.models)
        return Cloud(address, device_address, replicas, limits, metrics, stack.pop_all())


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


def _audit_log(settings: CloudSettings, state: Path) -> AuditLog:
    """Return the log, and with it the key; whoever cannot keep a record must not serve."""
    key = load_audit_key(settings.home)
    return AuditLog(
        settings.audit_folder or state / "audit",
        key,
        keys=load_public_keys(settings.home / PUBLIC),
        terms=Terms(checkpoint_s=settings.audit_checkpoint_s, min_free_bytes=settings.audit_min_free_mib << 20),
    )


def _cache(settings: CloudSettings, stack: AsyncExitStack) -> ResponseCache:
    """Return where answers are kept: in the Redis that clouds share, where there is one."""
    address = settings.redis.get_secret_value()
    if not address:
        return MemoryCache(settings.cache_bytes)
    ca, plaintext = settings.redis_ca, settings.redis_plaintext
    client = connect(address, ca=ca, plaintext=plaintext, timeout_s=settings.redis_timeout_s)
    from cloud.redis_cache import RedisCache

    cache = RedisCache(client, of=(settings.home / _ROOT).read_bytes())
    stack.push_async_callback(cache.close)
    return cache


def open_runner() -> asyncio.Runner:
    """Return what runs the cloud: uvloop's event loop where it is installed, which takes less for a request."""
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.Runner()
    import uvloop

    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


async def serve_until_signal(settings: CloudSettings) -> None:
    """Run a cloud until SIGTERM or SIGINT, then stop it in order.

    Raises:
        IsthmusError: As start_cloud.
    """
    limit_heaps()
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
