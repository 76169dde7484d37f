"""Names the concrete classes and wires them into an agent; the only module that knows all others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial

import grpc

from edge.access import AccessToken
from edge.agent import Agent, MetricsListener, describe_status
from edge.audit import ALARM, Audit
from edge.audition import Audition
from edge.bench import Choice, measure_variants, read_choice
from edge.breaker import Breaker
from edge.certificate import CertificateKeeper
from edge.channel import RenewableChannel
from edge.conditions import Conditions
from edge.config import EdgeSettings, UpdateSettings
from edge.deferred.assembly import Deferred, open_deferred
from edge.deferred.service import absent_handlers
from edge.deferred.store import Limits
from edge.fetcher import Pace, RegistryFetcher, SignedManifests
from edge.fleet import Desired, FleetLink
from edge.hedge import Hedge
from edge.identity import DeviceHome, Enrolment
from edge.lessons import Lessons
from edge.model import LiveModel, ServedModels, open_model
from edge.offline import Imports, StickFetcher, StickManifests
from edge.outbox import Outbox
from edge.outcome import Outcome
from edge.plan import choose_variant
from edge.question import Limits as QuestionLimits
from edge.response_cache import ResponseCache
from edge.retry import QuotaPause, RetryBudget
from edge.router import Router
from edge.runtimes import RUNTIMES, is_installed
from edge.sealing import InputSealer
from edge.server import AgentServer, InferenceService, may_use_all
from edge.shadow import Shadow
from edge.spool import Spool
from edge.state import Order
from edge.store import SlotStore
from edge.stragglers import Stragglers
from edge.updater import Updater
from edge.uplink import Uplink
from isthmus import __version__
from isthmus.address import is_local
from isthmus.bundle import Manifest, Variant, check_name
from isthmus.errors import ConfigError
from isthmus.machine import computes_bfloat16, machine
from isthmus.policies import check_serving
from isthmus.status import MethodInterceptor, StatusInterceptor
from isthmus.stick import Stick
from isthmus.tensors import Array
from isthmus.v1 import fleet_pb2
from security.guard import CallGuard
from security.interceptors import AuthInterceptor, current_claims
from security.limits import ListenerLimits
from security.tls import server_credentials
from security.tokens import TokenVerifier


def build_agent(settings: EdgeSettings) -> Agent:
    """Return the agent of an enrolled device, ready to run; call it inside the event loop.

    Raises:
        ConfigError: The device is not enrolled, or the settings cannot work.
        ConflictError: Another agent runs in the device's folder.
    """
    check_serving(settings.policy)
    home = DeviceHome(settings.home)
    enrolment = home.enrolment()
    names = _model_names(settings)
    lock = home.lock()  # two agents would remove each other's slots
    connect = partial(home.connect, message_bytes=settings.message_mib << 20)
    channel = RenewableChannel(connect())
    verifier = TokenVerifier(home.jwks.read_bytes(), enrolment.token_issuer, enrolment.token_audience)
    token = AccessToken(home, enrolment, channel, new_keys=verifier.use_keys, moved=lambda: channel.replace(connect()))
    uplink = _uplink(settings, channel, token)
    desired = Desired(names)
    fleet = FleetLink(
        channel,
        token.wait,
        names,
        desired,
        facts=_facts(),
        outbox=Outbox(home.reports),
        unauthenticated=token.renew_soon,
    )
    models = ServedModels(names)
    updaters: dict[str, Updater] = {}
    audit, shadow = _audit(settings, uplink, updaters), Shadow()
    imports = _imports(settings, home, channel, token, desired, models)
    updaters |= _updaters(settings, home, enrolment, imports, models, fleet, audit, shadow)
    sealer = _sealer(settings, home, channel, token)
    spools = {
        name: Spool(
            home.spool(name),
            limit_bytes=settings.capture_mib << 20,
            seal=partial(sealer.seal_capture, name) if sealer is not None and sealer.concerns(name) else None,
        )
        for name in names
        if settings.capture
    }
    spool_full = asyncio.Event()
    lessons = Lessons(models, partial(_capture, spools, spool_full) if settings.capture else None)
    deferred = _deferred(settings, home, uplink, lessons)
    cache = ResponseCache(settings.response_cache_mib << 20) if settings.response_cache_mib else None
    router = Router(
        models,
        uplink,
        limits=QuestionLimits(settings.default_deadline_s, settings.allow_non_finite),
        model_calls=settings.model_calls,
        lessons=lessons,
        hedge=Hedge(above=settings.hedge_above) if settings.hedge else None,
        deferral=None if deferred is None else deferred.deferral,
        cache=cache,
        audit=audit,
        shadow=shadow,
        sealer=sealer,
    )
    credentials, interceptors = _protection(settings, home, verifier, enrolment.tenant)
    may_use = may_use_all if is_local(settings.listen) else _caller_may_use
    server = AgentServer(
        settings.listen,
        InferenceService(models, router, may_use=may_use, stream_requests=settings.stream_requests),
        lambda: describe_status(
            enrolment.device_id, models, updaters, uplink, deferred, audit, partial(_choice, settings, home)
        ),
        imports=imports,
        unix_socket=settings.unix_socket,
        credentials=credentials,
        deferred=absent_handlers() if deferred is None else deferred.service.handlers(),
        interceptors=interceptors,
        concurrent_calls=settings.concurrent_calls,
        message_bytes=settings.message_mib << 20,
        limits=_limits(settings),
    )
    return Agent(
        lock=lock,
        channel=channel,
        server=server,
        models=models,
        token=token,
        certificate=CertificateKeeper(home, channel, token, connect),
        uplink=uplink,
        fleet=fleet,
        desired=desired,
        updaters=updaters,
        spools=spools,
        spool_full=spool_full,
        flush_s=settings.capture_flush_s,
        shutdown_s=settings.shutdown_s,
        ready_file=settings.ready_file,
        deferred=deferred,
        audit=audit,
        imports=imports,
        sealer=sealer,
        metrics=_metrics(settings, enrolment.device_id, models, uplink, spools, cache, audit, updaters),
    )


def _sealer(
    settings: EdgeSettings, home: DeviceHome, channel: grpc.aio.Channel, token: AccessToken
) -> InputSealer | None:
    if not settings.seal_inputs:
        return None
    return InputSealer(settings.seal_inputs, home.sealing, home.ca, channel, token.wait)


def _audit(settings: EdgeSettings, uplink: Uplink, updaters: Mapping[str, Updater]) -> Audit | None:
    if not settings.audit_share:
        return None

    def alarm(live: LiveModel, what: str) -> None:
        updaters[live.manifest.name].warn(live.manifest.version, ALARM, what)

    return Audit(uplink, share=settings.audit_share, alarm=alarm)


def _model_names(settings: EdgeSettings) -> tuple[str, ...]:
    if not settings.models:
        raise ConfigError("there is no model to serve", hint="isthmus edge run --model NAME")
    try:
        return tuple(dict.fromkeys(check_name(name) for name in settings.models))
    except ValueError as error:
        raise ConfigError(f"models: {error}", hint="`isthmus model list` shows the names") from error


def _uplink(settings: EdgeSettings, channel: grpc.aio.Channel, token: AccessToken) -> Uplink:
    new_breaker = partial(
        Breaker,
        failures=settings.breaker_failures,
        first_wait_s=settings.breaker_first_wait_s,
        longest_wait_s=settings.breaker_longest_wait_s,
    )
    return Uplink(
        channel,
        token.current,
        new_breaker(),
        new_breaker(),
        guard_s=settings.guard_s,
        longest_s=settings.longest_escalation_s,
        unauthenticated=token.renew_soon,
        retries=RetryBudget(ratio=settings.retry_ratio, burst=settings.retry_burst),
        quota=QuotaPause(first_s=settings.breaker_first_wait_s, longest_s=settings.breaker_longest_wait_s),
        stragglers=Stragglers(settings.capture_late_s if settings.capture else 0.0),
    )


def _updaters(
    settings: EdgeSettings,
    home: DeviceHome,
    enrolment: Enrolment,
    imports: Imports,
    models: ServedModels,
    fleet: FleetLink,
    audit: Audit | None,
    shadow: Shadow,
) -> dict[str, Updater]:
    def report(outcome: Outcome) -> None:
        fleet.report(outcome)
        imports.hear(outcome)

    return {
        name: Updater(
            name,
            SlotStore(home.models(name)),
            models,
            manifests=imports,
            fetcher=imports,
            choose=partial(_choose, settings, home),
            open_slot=partial(
                open_model,
                threads=settings.threads,
                queue=settings.queue,
                batch_delay_s=settings.batch_delay_us / 1e6,
                policy=settings.policy,
                batch_rows=settings.batch_rows,
            ),
            report=report,
            conditions=Conditions(settings.updates, enrolment.device_id, name),
            audit=audit,
            shadow=shadow,
            audition=_audition(settings, home, name),
        )
        for name, _ in models
    }


def _imports(
    settings: EdgeSettings,
    home: DeviceHome,
    channel: grpc.aio.Channel,
    token: AccessToken,
    desired: Desired,
    models: ServedModels,
) -> Imports:
    rate = settings.updates.max_bytes_per_s
    fetcher = RegistryFetcher(channel, token.wait, pace=Pace(rate) if rate else None)
    folder, root = home.path / "tuf", home.root.read_bytes()
    manifests = SignedManifests(folder, root, fetcher, asyncio.get_running_loop())
    return Imports(folder, root, manifests, fetcher, desired, models)


async def install_stick(settings: EdgeSettings, stick: Stick, *, accept_stale: bool = False) -> Outcome:
    """Install the version of a stick, with no agent running; call it inside the event loop.

    Conditions that spare a network (turns, metering, windows) do not apply to what somebody carried here.

    Args:
        settings: As the agent's.
        stick: What was carried here.
        accept_stale: Whether an expired timestamp is good enough.

    Raises:
        ConfigError: The device is not enrolled, or the settings cannot work.
        ConflictError: An agent runs in the device's folder.
        UnavailableError: The stick or the disk cannot be used now.
    """
    home, model = DeviceHome(settings.home), stick.index.model
    enrolment = home.enrolment()
    lock = home.lock()
    try:
        models = ServedModels((model,))
        updater = Updater(
            model,
            SlotStore(home.models(model)),
            models,
            manifests=StickManifests(home.path / "tuf", home.root.read_bytes(), stick, accept_stale=accept_stale),
            fetcher=StickFetcher(stick),
            choose=partial(_choose, settings, home),
            open_slot=partial(open_model, threads=settings.threads, policy=settings.policy),
            report=lambda _: None,
            conditions=Conditions(UpdateSettings(crashes=settings.updates.crashes), enrolment.device_id, model),
            audition=_audition(settings, home, model),
        )
        outcome = await updater.update(Order(version=stick.index.version))
        models.swap(model, None)
        return outcome
    finally:
        lock.close()


def _facts() -> fleet_pb2.DeviceFacts:
    runtimes = [name for name in RUNTIMES if is_installed(name)]
    return fleet_pb2.DeviceFacts(
        platform=machine(), runtimes=runtimes, bfloat16=computes_bfloat16(), agent_version=__version__
    )


def _choice(settings: EdgeSettings, home: DeviceHome, model: str) -> Choice | None:
    """Return what was measured for a model, where it counts."""
    ignored = settings.choose_by == "order" or settings.variant is not None
    return None if ignored else read_choice(home.path, model)


def _audition(settings: EdgeSettings, home: DeviceHome, model: str) -> Audition | None:
    if settings.choose_by != "install" or settings.variant is not None:
        return None
    return Audition(home.path, model, measure=partial(measure_variants, threads=settings.threads))


def _choose(settings: EdgeSettings, home: DeviceHome, manifest: Manifest) -> Variant:
    choice = _choice(settings, home, manifest.name)
    return choose_variant(
        manifest,
        configured=settings.variant,
        machine=machine(),
        bfloat16=computes_bfloat16(),
        installed=is_installed,
        preferred=None if choice is None else choice.variant,
    )


def _protection(
    settings: EdgeSettings, home: DeviceHome, verifier: TokenVerifier, tenant: str
) -> tuple[grpc.ServerCredentials | None, tuple[MethodInterceptor, ...]]:
    if is_local(settings.listen):
        return None, ()
    guards = (StatusInterceptor(), AuthInterceptor(verifier, tenant=tenant), CallGuard(settings.listener))
    return server_credentials(home.key, home.certificate), guards


def _limits(settings: EdgeSettings) -> ListenerLimits:
    """Return the listener's limits; streams of this machine's own programs may last as long as they like."""
    return settings.listener.model_copy(update={"age_s": 0.0}) if is_local(settings.listen) else settings.listener


def _deferred(settings: EdgeSettings, home: DeviceHome, uplink: Uplink, lessons: Lessons) -> Deferred | None:
    if not settings.defer:
        return None
    return open_deferred(
        home.deferred,
        settings.defer_key or home.deferred_key,
        uplink,
        limits=Limits(bytes=settings.defer_mib << 20, entries=settings.defer_requests),
        longest_ttl_s=settings.defer_ttl_s,
        concurrency=settings.defer_concurrency,
        deadline_s=settings.defer_deadline_s,
        owner=(lambda: "") if is_local(settings.listen) else _caller,
        lessons=lessons,
    )


def _caller() -> str:
    return current_claims().subject


def _metrics(
    settings: EdgeSettings,
    device_id: str,
    models: ServedModels,
    uplink: Uplink,
    spools: Mapping[str, Spool],
    cache: ResponseCache | None,
    audit: Audit | None,
    updaters: Mapping[str, Updater],
) -> MetricsListener | None:
    if settings.metrics_listen is None:
        return None
    from edge.metrics import AgentCollector, agent_registry
    from isthmus.metrics_server import MetricsServer

    registry = agent_registry(AgentCollector(device_id, models, uplink, spools, cache, audit, updaters))
    return MetricsServer(settings.metrics_listen, registry, public=settings.metrics_public)


def _caller_may_use(model: str) -> bool:
    return current_claims().may_use(model)


def _capture(
    spools: Mapping[str, Spool],
    full: asyncio.Event,
    model: str,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array],
) -> None:
    if spools[model].offer(inputs, outputs):
        full.set()
