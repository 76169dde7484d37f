"""Several Tritons that serve the same heavy models, as one: chosen, watched, ejected, drained and taken back.

Each has its own connection and its own pool of models (cloud.heavy). Rules:
1. A heavy version is visible once every replica that serves has loaded it; one that is away gets it before it serves.
2. The least loaded replica answers (cloud.balance). A request goes to another one only when it has certainly not run:
   the connection was refused, or Triton said that it does not take it. One that may have run is never sent twice.
3. A replica whose connection fails gets no more requests at once, is looked at again after 0.1 s, then ever more
   seldom, and serves again when it answers and has all its models.
4. A drained replica gets no new requests and finishes those that it has.
5. Where no replica is known to be well, all that have the model are tried: the watch may be wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog

from cloud.balance import RetryBudget, least_loaded, next_probe_s
from cloud.heavy import HeavyId, HeavyPool
from cloud.supervisor import TritonServer
from cloud.triton import LOST, NotAcceptedError, TritonClient
from cloud.triton_statistics import merged
from isthmus.bundle import Manifest
from isthmus.errors import ConflictError, IsthmusError, NotFoundError, UnavailableError
from isthmus.tensors import Array

_WATCH_S: Final = 0.5
_FIRST_PROBE_S: Final = 0.1
_MOST_PROBE_S: Final = 5.0

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Replica:
    """One Triton and what is known of it."""

    name: str  # its address, or child-N
    client: TritonClient
    pool: HeavyPool
    server: TritonServer | None = None  # where it is our child
    serving: bool = False
    drained: bool = False
    under_way: int = 0
    requests: int = 0
    retries: int = 0  # requests that it did not take and that another one got
    ejections: int = 0
    _looked_at: asyncio.Event = field(default_factory=asyncio.Event)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def state(self) -> str:
        """Return "drained", "serving" or "away"."""
        return "drained" if self.drained else "serving" if self.serving else "away"

    def enter(self) -> None:
        """Count a request that goes to it."""
        self.under_way += 1
        self.requests += 1
        self._idle.clear()

    def leave(self) -> None:
        """Count a request that is over."""
        self.under_way -= 1
        if not self.under_way:
            self._idle.set()

    def eject(self, why: str) -> None:
        """Let it serve no more until it has been looked at; nothing happens when it does not serve."""
        if self.serving:
            self.serving = False
            self.ejections += 1
            self._looked_at.set()
            log.warning("a Triton gets no more requests", replica=self.name, why=why)

    async def until_idle(self, timeout_s: float) -> bool:
        """Return whether its last request ended in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.under_way:
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def pause(self, seconds: float) -> None:
        """Wait until it is to be looked at: for so long, or until it is ejected."""
        try:
            async with asyncio.timeout(seconds):
                await self._looked_at.wait()
        except TimeoutError:
            return
        self._looked_at.clear()
        await asyncio.sleep(_FIRST_PROBE_S)


class Replicas:
    """All Tritons of a cloud; see the module.

    Args:
        replicas: At least one; none serves before `start` or `admit`.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = tuple(replicas)
        self._budget = RetryBudget()
        self._turn = 0
        self._run = uuid.uuid4().hex
        self._changes = asyncio.Lock()  # loads, retirements, and who serves

    def __iter__(self) -> Any:
        return iter(self._replicas)

    def named(self, name: str) -> Replica:
        """Return a replica by its name.

        Raises:
            NotFoundError: There is none.
        """
        for replica in self._replicas:
            if replica.name == name:
                return replica
        known = ", ".join(replica.name for replica in self._replicas)
        raise NotFoundError(f"there is no Triton {name[:80]!r}", hint=f"there are {known}", reason="unknown-replica")

    # -- answering ------------------------------------------------------------------------------------------------

    async def infer(self, heavy: HeavyId, request: bytes, *, timeout_s: float) -> bytes:
        """Return the serialized answer of one heavy version to a serialized ModelInferRequest.

        Raises:
            UnavailableError: No replica can answer now.
            IsthmusError: As TritonClient.infer.
        """
        self._budget.note_request()
        chosen = self._choose(heavy)
        if chosen is None:
            raise NotAcceptedError("the heavy model is not available now", reason="heavy-not-loaded")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        try:
            return await self._ask(chosen, heavy, request, timeout_s)
        except NotAcceptedError:
            other = self._choose(heavy, besides=chosen)
            left_s = deadline - loop.time()
            if other is None or left_s <= 0 or not self._budget.take():
                raise
            chosen.retries += 1
            return await self._ask(other, heavy, request, left_s)

    async def _ask(self, replica: Replica, heavy: HeavyId, request: bytes, timeout_s: float) -> bytes:
        replica.enter()
        try:
            return await replica.pool.infer(heavy, request, timeout_s=timeout_s)
        except UnavailableError as error:
            if error.reason == LOST:
                replica.eject("its connection failed")
            raise
        finally:
            replica.leave()

    def _choose(self, heavy: HeavyId, besides: Replica | None = None) -> Replica | None:
        able = [r for r in self._replicas if r is not besides and not r.drained and r.pool.serves(heavy)]
        able = [r for r in able if r.serving] or ([] if besides is not None else able)
        if not able:
            return None
        if len(able) == 1:
            return able[0]
        self._turn += 1
        return able[least_loaded([r.under_way for r in able], self._turn)]

    def serves(self, heavy: HeavyId) -> bool:
        """Return whether a request for this heavy version would be sent to a replica now."""
        return self._choose(heavy) is not None

    # -- describing -----------------------------------------------------------------------------------------------

    @property
    def loaded(self) -> tuple[HeavyId, ...]:
        """Return what is loaded, in order."""
        return tuple(sorted({heavy for replica in self._replicas for heavy in replica.pool.loaded}))

    @property
    def is_up(self) -> bool:
        """Return whether a replica serves."""
        return any(replica.serving and not replica.drained for replica in self._replicas)

    async def is_ready(self, heavy: HeavyId) -> bool:
        """Return whether requests for this heavy version would be answered now."""
        chosen = self._choose(heavy)
        return chosen is not None and await chosen.pool.is_ready(heavy)

    async def metadata(self, heavy: HeavyId) -> Any:
        """Return the ModelMetadataResponse of a heavy version, under Triton's name of it.

        Raises:
            UnavailableError: No replica has it.
        """
        chosen = self._choose(heavy)
        if chosen is None:
            raise UnavailableError("the heavy model is not available now", reason="heavy-not-loaded")
        return await chosen.pool.metadata(heavy)

    async def server_version(self) -> str:
        """Return Triton's version: of the first replica that serves.

        Raises:
            UnavailableError: None answers.
        """
        first = next((replica for replica in self._replicas if replica.serving), self._replicas[0])
        return await first.client.server_version()

    async def statistics(self) -> list[Any]:
        """Return the ModelStatistics messages of all loaded models, the replicas' counters added up.

        Raises:
            UnavailableError: No replica answers.
        """
        serving = [replica for replica in self._replicas if replica.serving] or self._replicas
        found = await asyncio.gather(*(r.client.statistics() for r in serving), return_exceptions=True)
        answers = [answer for answer in found if not isinstance(answer, BaseException)]
        if not answers:
            raise UnavailableError("cannot read statistics: Triton does not answer", reason=LOST)
        return merged(answers)

    async def statistics_by_source(self) -> dict[str, list[Any]]:
        """Return the ModelStatistics messages of each Triton that answers, by a name that no other one ever had."""
        found: dict[str, list[Any]] = {}
        for replica in self._replicas:
            # A Triton of our own is another one each time; one that is shared keeps its name.
            source = replica.client.address if replica.server is None else f"{replica.client.address} of {self._run}"
            with contextlib.suppress(UnavailableError):
                found[source] = await replica.client.statistics()
        return found

    # -- models ---------------------------------------------------------------------------------------------------

    def folder(self, heavy: HeavyId) -> Path:
        """Return the Triton model folder of a heavy version."""
        return self._replicas[0].pool.folder(heavy)

    async def load(self, heavy: HeavyId) -> None:
        """Load a heavy version in all replicas that serve; the others get it when they come back.

        Raises:
            BundleError: A Triton cannot load it; then none keeps it.
            UnavailableError: No replica is there, or the load took too long in all.
        """
        async with self._changes:
            serving = [replica for replica in self._replicas if replica.serving]
            fresh = [replica for replica in self._replicas if heavy not in replica.pool.loaded]
            if not serving:
                raise UnavailableError("no Triton answers", reason=LOST)
            errors = await _each(replica.pool.load(heavy) for replica in serving)
            missing = [r for r, error in zip(serving, errors, strict=True) if isinstance(error, UnavailableError)]
            fatal = [error for error in errors if error is not None and not isinstance(error, UnavailableError)]
            if fatal or len(missing) == len(serving):
                await _each(replica.pool.retire(heavy) for replica in fresh)
                raise fatal[0] if fatal else errors[0]  # type: ignore[misc]  # there is one
            for replica in self._replicas:
                if replica in missing:
                    replica.eject("it did not load a model")
                replica.pool.expect(heavy)

    async def retire(self, heavy: HeavyId) -> None:
        """Unload a heavy version everywhere once its running requests are answered."""
        async with self._changes:
            await _each(replica.pool.retire(heavy) for replica in self._replicas)

    async def sweep(self) -> None:
        """Remove the folders of heavy versions that are not loaded; all replicas share them."""
        await self._replicas[0].pool.sweep()

    async def try_out(self, heavy: HeavyId, manifest: Manifest, inputs: Mapping[str, Array]) -> None:
        """Send inputs through a loaded heavy version, in every replica that serves, and check what comes back.

        Raises:
            BundleError: Outputs are not of the form that the manifest says.
            UnavailableError: A Triton went away.
        """
        serving = [replica for replica in self._replicas if replica.serving]
        for error in await _each(replica.pool.try_out(heavy, manifest, inputs) for replica in serving):
            if error is not None:
                raise error

    # -- coming and going -----------------------------------------------------------------------------------------

    async def admit(self, replica: Replica) -> None:
        """Give a replica that has just started its models, and then requests.

        Raises:
            ConfigError: Known tensors come back wrong, or models cannot run at all.
            UnavailableError: It went away again.
        """
        await replica.pool.restore()
        await self._serve(replica)

    async def _serve(self, replica: Replica) -> None:
        async with self._changes:  # what was loaded elsewhere in the meantime
            await replica.pool.load_expected()
            replica.serving = True
        log.info("a Triton serves", replica=replica.name, models=[heavy.name for heavy in replica.pool.loaded])

    async def watch(self) -> None:
        """Look after all replicas and their models, for ever."""
        async with asyncio.TaskGroup() as group:
            for replica in self._replicas:
                group.create_task(replica.pool.watch(), name=f"heavy-watch-{replica.name}")
                group.create_task(self._look_after(replica), name=f"watch-{replica.name}")

    async def _look_after(self, replica: Replica) -> None:
        failures, delay_s = 0, _WATCH_S
        while True:
            await replica.pause(delay_s)
            try:
                well = await self._look_at(replica)
            except IsthmusError as error:
                log.warning("a Triton that is back cannot serve", replica=replica.name, reason=error.reason)
                well = False
            failures = 0 if well else failures + 1
            delay_s = _WATCH_S if well else next_probe_s(failures, first_s=_FIRST_PROBE_S, most_s=_MOST_PROBE_S)

    async def _look_at(self, replica: Replica) -> bool:
        """Return whether it is well: eject it when it is not, and let it serve when it is and has its models."""
        if not await replica.client.is_live():
            replica.eject("it does not answer")
            return False
        if replica.serving:
            return True
        if await replica.pool.has_all():
            await self._serve(replica)
        elif replica.server is None:  # a child's supervisor admits it
            await self.admit(replica)
        return True

    async def drain(self, name: str, timeout_s: float) -> Replica:
        """Send a replica nothing more and wait for what it has; what is under way then tells whether it is done.

        Raises:
            NotFoundError: There is none of that name.
            ConflictError: No other replica serves.
        """
        replica = self.named(name)
        if not any(other.serving and not other.drained for other in self._replicas if other is not replica):
            raise ConflictError(
                f"{name} is the only Triton that serves",
                hint="add another one, or wait until one is back (isthmus traffic replicas)",
                reason="last-replica",
            )
        replica.drained = True
        log.info("a Triton is drained", replica=name, under_way=replica.under_way)
        await replica.until_idle(timeout_s)
        return replica

    def resume(self, name: str) -> Replica:
        """Let a drained replica serve again.

        Raises:
            NotFoundError: There is none of that name.
        """
        replica = self.named(name)
        replica.drained = False
        log.info("a Triton is no longer drained", replica=name, state=replica.state)
        return replica

    async def close(self) -> None:
        """End repairs that are under way."""
        await _each(replica.pool.close() for replica in self._replicas)


async def _each(work: Any) -> list[IsthmusError | None]:
    """Wait for all of it; return our own errors in place, raise any other."""
    found: list[IsthmusError | None] = []
    waiting: list[Awaitable[None]] = list(work)
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, IsthmusError):
            raise result
        found.append(result)
    return found
