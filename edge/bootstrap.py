"""Names the concrete classes and wires them into an agent; the only module that knows all others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial

import grpc

from edge.agent import Agent, describe_status
from edge.bench import read_choice
from edge.breaker import Breaker
from edge.config import EdgeSettings
from edge.fetcher import RegistryFetcher, SignedManifests
from edge.fleet import Desired, FleetLink
from edge.identity import AccessToken, DeviceHome, Enrolment
from edge.model import ServedModels, open_model
from edge.plan import choose_variant
from edge.router import Router
from edge.runtimes import is_installed
from edge.server import AgentServer, InferenceService, is_local, may_use_all
from edge.spool import Spool
from edge.store import SlotStore
from edge.updater import Updater
from edge.uplink import Uplink, open_channel
from isthmus.bundle import Manifest, Variant, check_name
from isthmus.errors import ConfigError
from isthmus.machine import computes_bfloat16, machine
from isthmus.tensors import Array
from security.interceptors import AuthInterceptor, current_claims
from security.tls import server_credentials
from security.tokens import TokenVerifier


def build_agent(settings: EdgeSettings) -> Agent:
    """Return the agent of an enrolled device, ready to run; call it inside the event loop.

    Raises:
        ConfigError: The device is not enrolled, or the settings cannot work.
        ConflictError: Another agent runs in the device's folder.
    """
    home = DeviceHome(settings.home)
    enrolment = home.enrolment()
    names = _model_names(settings)
    lock = home.lock()  # two agents would remove each other's slots
    channel = open_channel(enrolment.cloud, home.ca, message_bytes=settings.message_mib << 20)
    token = AccessToken(home, enrolment, channel)
    uplink = _uplink(settings, channel, token)
    desired = Desired(names)
    fleet = FleetLink(channel, token.wait, names, desired, unauthenticated=token.renew_soon)
    models = ServedModels(names)
    updaters = _updaters(settings, home, channel, token, models, fleet)
    spools = {
        name: Spool(home.spool(name), limit_bytes=settings.capture_mib << 20) for name in names if settings.capture
    }
    spool_full = asyncio.Event()
    router = Router(
        models,
        uplink,
        default_deadline_s=settings.default_deadline_s,
        capture=partial(_capture, spools, spool_full) if settings.capture else None,
    )
    credentials, interceptors = _protection(settings, home, enrolment)
    may_use = may_use_all if is_local(settings.listen) else _caller_may_use
    server = AgentServer(
        settings.listen,
        InferenceService(models, router, may_use=may_use),
        lambda: describe_status(enrolment.device_id, models, updaters, uplink),
        credentials=credentials,
        interceptors=interceptors,
        concurrent_calls=settings.concurrent_calls,
        message_bytes=settings.message_mib << 20,
    )
    return Agent(
        lock=lock,
        channel=channel,
        server=server,
        models=models,
        token=token,
        uplink=uplink,
        fleet=fleet,
        desired=desired,
        updaters=updaters,
        spools=spools,
        spool_full=spool_full,
        flush_s=settings.capture_flush_s,
        shutdown_s=settings.shutdown_s,
        ready_file=settings.ready_file,
    )


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
    )


def _updaters(
    settings: EdgeSettings,
    home: DeviceHome,
    channel: grpc.aio.Channel,
    token: AccessToken,
    models: ServedModels,
    fleet: FleetLink,
) -> dict[str, Updater]:
    fetcher = RegistryFetcher(channel, token.wait)
    manifests = SignedManifests(home.path / "tuf", home.root.read_bytes(), fetcher, asyncio.get_running_loop())
    return {
        name: Updater(
            name,
            SlotStore(home.models(name)),
            models,
            manifests=manifests,
            fetcher=fetcher,
            choose=partial(_choose, settings, home),
            open_slot=partial(open_model, threads=settings.threads, queue=settings.queue),
            report=fleet.report,
        )
        for name, _ in models
    }


def _choose(settings: EdgeSettings, home: DeviceHome, manifest: Manifest) -> Variant:
    choice = read_choice(home.path, manifest.name) if settings.choose_by == "measure" else None
    return choose_variant(
        manifest,
        configured=settings.variant,
        machine=machine(),
        bfloat16=computes_bfloat16(),
        installed=is_installed,
        preferred=None if choice is None else choice.variant,
    )


def _protection(
    settings: EdgeSettings, home: DeviceHome, enrolment: Enrolment
) -> tuple[grpc.ServerCredentials | None, tuple[grpc.aio.ServerInterceptor, ...]]:
    if is_local(settings.listen):
        return None, ()
    verifier = TokenVerifier(home.jwks.read_bytes(), enrolment.token_issuer, enrolment.token_audience)
    return server_credentials(home.key, home.certificate), (AuthInterceptor(verifier),)


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
