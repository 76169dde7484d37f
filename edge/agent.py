"""The running agent: one listener, and the loops that keep it current. Structured concurrency throughout.

Serving depends on nothing else: the listener starts before any model is open and before the cloud is reached, and a
loop that fails is logged and started again. SIGTERM or SIGINT stops taking calls, lets those in progress finish
within `shutdown_s`, then ends the loops.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import grpc
import structlog

from edge.access import AccessToken
from edge.audit import Audit
from edge.backoff import Backoff
from edge.bench import Choice
from edge.certificate import CertificateKeeper
from edge.conditions import PostponedError
from edge.deferred.assembly import Deferred
from edge.fleet import Desired, FleetLink
from edge.model import ServedModels
from edge.offline import Imports
from edge.sealing import InputSealer
from edge.server import AgentServer
from edge.spool import Spool
from edge.state import Order
from edge.store import write_atomically
from edge.updater import Updater
from edge.uplink import Uplink, watch_connection
from isthmus.errors import ConfigError, UnavailableError
from isthmus.v1 import agent_pb2

_RESTART_S: Final = 60.0  # longest pause before a loop that failed starts again
_LONGEST_WAIT_S: Final = 3600.0  # of a postponed update: clocks are set, disks are emptied

log = structlog.get_logger(__name__)


class MetricsListener(Protocol):
    """Where metrics are read (isthmus.metrics_server); loaded only by an agent that has one."""

    async def start(self) -> str:
        """Listen; return the address."""
        ...

    async def stop(self) -> None:
        """Take no more scrapes."""
        ...


@dataclass(slots=True)
class Agent:
    """All parts of an agent, wired by edge.bootstrap."""

    lock: BinaryIO
    channel: grpc.aio.Channel
    server: AgentServer
    models: ServedModels
    token: AccessToken
    certificate: CertificateKeeper
    uplink: Uplink
    fleet: FleetLink
    desired: Desired
    updaters: Mapping[str, Updater]
    spools: Mapping[str, Spool]
    spool_full: asyncio.Event
    flush_s: float
    shutdown_s: float
    ready_file: Path | None = None
    deferred: Deferred | None = None
    metrics: MetricsListener | None = None
    audit: Audit | None = None
    imports: Imports | None = None
    sealer: InputSealer | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set.

        Raises:
            ConfigError: The address cannot be bound, or the ready file cannot be written.
        """
        try:
            address = await self.server.start()
            metrics = None if self.metrics is None else await self.metrics.start()
            log.info("listening", address=address, metrics=metrics)
            self._tell_ready(address, metrics)
            async with asyncio.TaskGroup() as group:
                loops = [group.create_task(_outlasting(name, loop)) for name, loop in self._loops().items()]
                await stop.wait()
                log.info("stopping")
                if self.deferred is not None:
                    self.deferred.service.stop()
                await self.server.stop(self.shutdown_s)
                for task in loops:
                    task.cancel()
        finally:
            await self._close()

    def _tell_ready(self, address: str, metrics: str | None) -> None:
        if self.ready_file is None:
            return
        told = {"address": address, "pid": os.getpid()} | ({} if metrics is None else {"metrics": metrics})
        try:
            write_atomically(self.ready_file, json.dumps(told).encode() + b"\n")
        except OSError as error:
            raise ConfigError(
                f"ready_file: cannot write {self.ready_file}: {error.strerror}", hint="expected a folder that exists"
            ) from error

    def _loops(self) -> dict[str, Callable[[], Awaitable[None]]]:
        loops: dict[str, Callable[[], Awaitable[None]]] = {
            "connection": lambda: watch_connection(self.channel, self._connected),
            "token": self.token.keep,
            "certificate": self.certificate.keep,
            "cloud's address": self.certificate.follow,
            "watch": self.fleet.watch,
            "reports": self.fleet.send_reports,
        }
        for model, updater in self.updaters.items():
            loops[f"update {model}"] = partial(self._keep_current, model, updater)
            loops[f"trial {model}"] = updater.probation.watch
        if self.sealer is not None:
            loops["sealing keys"] = self.sealer.keep
        if self.spools:
            loops["captures"] = self._keep_captures
        if self.deferred is not None:
            loops["deferred requests"] = self.deferred.sender.run
            loops["life of deferred requests"] = self.deferred.deferral.tidy
        return loops

    def _connected(self) -> None:
        log.info("connected to the cloud")
        self.uplink.nudge()
        self.token.connected()
        self.certificate.connected()
        self.fleet.connected()
        if self.sealer is not None:
            self.sealer.connected()
        if self.deferred is not None:
            self.deferred.sender.connected()

    async def _keep_current(self, model: str, updater: Updater) -> None:
        backoff = Backoff(first_s=1.0, longest_s=60.0)
        await self._serve_installed(model, updater, backoff)
        if updater.order is not None and not self.desired.version(model):
            self.desired.set(model, updater.order)  # what was under way goes on, with or without the cloud's word
        if not self.models.version(model) and not self.desired.version(model):
            log.info("waiting for a first version", model=model, hint=f"isthmus model release {model}@VERSION")
        settled: Order | None = None  # what was activated or refused last
        while True:
            await self.server.set_ready(ready=self.models.ready)
            order = self.desired.order(model)
            if updater.probation.trial is not None:
                updater.probation.take_back(order)
                await _first_of(updater.probation.settled(), self.desired.change(model))
                continue
            if order.version == self.models.version(model) and order.rollout and order != settled:
                self.fleet.report(updater.already(order))  # a rollout waits for every device's word
                settled = order
            if order.version in (0, self.models.version(model)) or order == settled:
                if order != settled:
                    settled = None  # the order has changed: one that was refused may come again
                await self.desired.change(model)
                continue
            failed = updater.gave_up(order)
            if failed is not None:
                log.info("not tried again", model=model, version=order.version, reason=failed.reason)
                self.fleet.report(failed)
                settled = order
                continue
            try:
                outcome = await updater.update(order)
            except UnavailableError as error:
                log.info("update postponed", model=model, version=order.version, error=error.message)
                if self.imports is not None:
                    self.imports.postponed(model, order, error)
                wait_s = error.retry_s if isinstance(error, PostponedError) else None
                await _first_of(_wait(backoff, wait_s), self.desired.change(model))
                continue
            if not outcome.final:
                await backoff.pause()
                continue
            settled = order
            backoff.reset()

    async def _serve_installed(self, model: str, updater: Updater, backoff: Backoff) -> None:
        while not self.models.version(model):
            try:
                await updater.start()
            except UnavailableError as error:
                log.warning("installed version cannot be read", model=model, error=error.message)
                await backoff.pause()
            except ConfigError as error:  # a version with another variant may come
                log.warning(
                    "installed version cannot be opened here", model=model, error=error.message, hint=error.hint
                )
                return
            else:
                return

    async def _keep_captures(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self.flush_s):
                    await self.spool_full.wait()
            except TimeoutError:
                pass
            self.spool_full.clear()
            for spool in self.spools.values():
                await spool.flush()

    async def _close(self) -> None:
        await self.server.stop(0)  # a no-op after an orderly stop
        if self.audit is not None:
            await self.audit.stop()
        await self.uplink.stragglers.stop()
        if self.metrics is not None:
            await self.metrics.stop()
        for spool in self.spools.values():
            await spool.flush()
        for updater in self.updaters.values():
            await updater.probation.stop()
        for name, _ in self.models:
            self.models.swap(name, None)
        if self.deferred is not None:
            self.deferred.deferral.close()
        await self.channel.close()
        self.lock.close()


async def _wait(backoff: Backoff, wait_s: float | None) -> None:
    if wait_s is None:
        await backoff.pause()
    else:
        await asyncio.sleep(min(wait_s, _LONGEST_WAIT_S))


async def _first_of(*waits: Coroutine[Any, Any, None]) -> None:
    """Wait for one of them; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


async def _outlasting(name: str, loop: Callable[[], Awaitable[None]]) -> None:
    backoff = Backoff(first_s=1.0, longest_s=_RESTART_S)
    while True:
        try:
            await loop()
        except Exception:  # a defect in one loop must not end the serving of the others
            log.exception("loop failed", loop=name)
        await backoff.pause()


def open_runner() -> asyncio.Runner:
    """Return what runs the agent: uvloop's event loop where it is installed, which takes less for a request."""
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.Runner()
    import uvloop

    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


async def run_until_signal(agent: Agent) -> None:
    """Run the agent until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await agent.run(stop)


def describe_status(
    device_id: str,
    models: ServedModels,
    updaters: Mapping[str, Updater],
    uplink: Uplink,
    deferred: Deferred | None = None,
    audit: Audit | None = None,
    choice: Callable[[str], Choice | None] = lambda _: None,
) -> agent_pb2.GetStatusResponse:
    """Return the agent's counters and versions.

    Args:
        device_id: The device's name.
        models: What is served.
        updaters: Bring versions, by model.
        uplink: Where escalations are counted.
        deferred: Late answers, where there are any.
        audit: Compares answers, where it does.
        choice: Returns which variant of a model was measured to be the fastest here.
    """
    counters = uplink.counters
    status = agent_pb2.GetStatusResponse(
        device_id=device_id,
        uplink=agent_pb2.UplinkStatus(
            breaker=uplink.breaker.state,
            attempts=counters.attempts,
            successes=counters.successes,
            failures=counters.failures,
            skipped=counters.skipped,
            bytes_up=counters.bytes_up,
            cancelled=counters.cancelled,
            retries=counters.retries,
            lost=counters.lost,
            hedged=counters.hedged,
            late=counters.late,
        ),
    )
    if deferred is not None:
        pending, results, taken = deferred.deferral.totals()
        status.deferred.CopyFrom(
            agent_pb2.DeferredStatus(
                pending=pending, results=results, bytes=taken, **deferred.deferral.counters.as_fields()
            )
        )
    for name, live in models:
        counted = models.counters[name]
        model = status.models.add(model=name, version=models.version(name), errors=counted.errors)
        model.answers.update({route: count.answers for route, count in counted.routes.items()})
        if live is not None:
            model.variant, model.calibration = live.variant.id, live.calibration_id
            model.threshold = live.operating_point.threshold if live.policy.threshold is None else live.policy.threshold
            if audit is not None:
                model.audit.CopyFrom(agent_pb2.AuditStatus(**asdict(audit.report(live))))
        measured = choice(name)
        if measured is not None:
            model.measured.CopyFrom(
                agent_pb2.MeasuredVariant(**measured.model_dump(include={"variant", "latency_ms", "version"}))
            )
        if name in updaters:
            _add_update(model, updaters[name])
    return status


def _add_update(model: agent_pb2.ModelStatus, updater: Updater) -> None:
    model.step = updater.step.value
    trial = updater.probation.trial
    if trial is not None:
        seen, terms = trial.seen, trial.terms
        model.trial.CopyFrom(
            agent_pb2.TrialStatus(
                seconds=seen.seconds,
                soak_s=terms.soak_s,
                requests=seen.requests,
                min_requests=terms.min_requests,
                errors=seen.errors,
                escalated=seen.escalated,
                audited=seen.audited,
                disagreed=seen.disagreed,
                latency_p50_ms=seen.quantile_ms(0.5),
                latency_p50_ms_before=trial.before.quantile_ms(0.5),
            )
        )
    last = updater.last
    if last is None:
        return
    model.last_update.CopyFrom(
        agent_pb2.UpdateStatus(
            from_version=last.from_version,
            to_version=last.to_version,
            outcome=last.became.value,
            reason=last.reason,
            detail=last.detail,
            bytes_fetched=last.bytes_fetched,
            bytes_full=last.bytes_full,
            files=[
                agent_pb2.FileUpdate(
                    path=file.path, method=file.method, bytes_fetched=file.bytes_fetched, bytes_full=file.bytes_full
                )
                for file in last.files
            ],
        )
    )
