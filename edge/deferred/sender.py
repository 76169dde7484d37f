"""Kept requests to the cloud: by priority, then age, when the cloud can be had again.

The rules:

1. Calls go through the agent's uplink, so its breaker counts them, and the sender is what probes a cloud that came back
   when no live request does.
2. After a failure that may pass, one request alone is tried, after a pause that grows; a new connection ends the pause.
   After its success several go at a time.
3. A failure that the cloud would give again (`edge.deferred.deferral.FINAL`) ends the request without an answer.
4. A late answer is checked as a live one: names, datatypes and shapes of the light answer, finite numbers; it is fused
   as a live one, and what it teaches is learnt once it is on the disk (edge.lessons).
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import numpy as np
import structlog

from edge.answers import check_cloud_answer
from edge.backoff import Backoff
from edge.deferred.deferral import FINAL, Deferral
from edge.deferred.index import Pending
from edge.deferred.store import Ending
from edge.deferred.wish import PROVISIONAL
from edge.lessons import Lessons
from edge.router import Escalator
from edge.uplink import Failure
from isthmus.oip import read_parameters, service_pb2, set_parameter
from isthmus.tensors import DTYPES, Array

_CLOUD_VERSION: Final = "isthmus.cloud_version"

log = structlog.get_logger(__name__)


class Sender:
    """Empties the store of requests.

    Args:
        deferral: Where they are.
        uplink: To the cloud.
        concurrency: Requests on their way at a time.
        deadline_s: Of one request.
        lessons: Learns from late answers, and knows how both models are fused.
    """

    def __init__(
        self, deferral: Deferral, uplink: Escalator, *, concurrency: int, deadline_s: float, lessons: Lessons
    ) -> None:
        self._deferral = deferral
        self._uplink = uplink
        self._concurrency = concurrency
        self._deadline_s = deadline_s
        self._lessons = lessons
        self._backoff = Backoff(first_s=1.0, longest_s=60.0)

    def connected(self) -> None:
        """Try now: there is a new connection to the cloud."""
        self._backoff.reset()
        self._backoff.wake()

    async def run(self) -> None:
        """Send what waits and will wait; runs until cancelled."""
        while True:
            await self._deferral.wait_for_work()
            if await self._send_next():
                self._backoff.reset()
                await self._send_many()
            else:
                await self._backoff.pause()

    async def _send_many(self) -> None:
        well = True

        async def send() -> None:
            nonlocal well
            while well and self._deferral.has_work():
                well = await self._send_next() and well

        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(send())

    async def _send_next(self) -> bool:
        """Send one request, if any; return whether it is worth to go on at once."""
        entry = self._deferral.take()
        if entry is None:
            return True
        try:
            return await self._send(entry)
        except OSError as error:
            log.warning("disk refuses a deferred request", error=str(error))
            return False
        finally:
            self._deferral.give_back(entry)

    async def _send(self, entry: Pending) -> bool:
        kept = await self._deferral.read_request(entry)
        if kept is None:
            return True
        template = service_pb2.ModelInferResponse.FromString(kept.template)
        expected, heavy = _expected(template), dict[str, Array]()

        def check(response: Any) -> None:
            heavy.update(check_cloud_answer(response, expected))

        self._deferral.counters.attempts += 1
        outcome = await self._uplink.escalate(kept.request, remaining_s=self._deadline_s, check=check)
        if not isinstance(outcome, Failure):
            answer = _late_answer(template, outcome.response)
            self._lessons.fuse_deferred(template, answer)
            await self._deferral.end(Ending(entry.number, answer=bytes(answer.SerializeToString())))
            self._lessons.learn_deferred(template, kept.request, heavy)
            return True
        if outcome.reason not in FINAL:
            return False
        log.warning("deferred request ended without an answer", request_id=entry.id, reason=outcome.reason)
        await self._deferral.end(
            Ending(entry.number, reason="refused", message=f"the cloud has no answer to this request: {outcome.reason}")
        )
        return True


def _expected(template: Any) -> dict[str, Array]:
    # Broadcast: shape and datatype of the light answer without memory for its values.
    return {
        output.name: np.broadcast_to(np.zeros((), DTYPES[output.datatype]), tuple(output.shape))
        for output in template.outputs
    }


def _late_answer(template: Any, response: Any) -> Any:
    cloud_version = read_parameters(response.parameters).get(_CLOUD_VERSION)
    response.ClearField("parameters")
    response.model_name, response.model_version, response.id = template.model_name, template.model_version, template.id
    for name, parameter in template.parameters.items():
        response.parameters[name].CopyFrom(parameter)
    set_parameter(response, PROVISIONAL, value=False)
    if cloud_version is not None:
        set_parameter(response, _CLOUD_VERSION, cloud_version)
    return response
