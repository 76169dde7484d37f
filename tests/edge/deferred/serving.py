"""A listening agent server that defers: a real light model, uplink and store; a cloud that misbehaves on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tritonclient.grpc.aio as triton

from edge.breaker import Breaker
from edge.deferred.assembly import Deferred, open_deferred
from edge.deferred.store import Limits
from edge.lessons import Capture, Lessons
from edge.model import ServedModels
from edge.router import Router
from edge.server import AgentServer, InferenceService
from edge.uplink import Uplink, open_channel
from isthmus.deferred import DeferredAnswers, LateAnswer
from isthmus.tensors import Array
from isthmus.v1 import agent_pb2
from tests.edge import bundles
from tests.edge.faulty_cloud import FaultyCloud, faulty_cloud, make_identity
from tests.edge.serving import MODEL, explanation, open_variant

DEFER = {"isthmus.defer": True}
PATIENCE_S = 20


@dataclass
class Deferring:
    address: str
    client: triton.InferenceServerClient
    cloud: FaultyCloud
    uplink: Uplink
    deferred: Deferred
    models: ServedModels

    async def infer(self, request_id: str, x: Array = bundles.HARD, **parameters: Any) -> dict[str, Any]:
        tensor = triton.InferInput("x", list(x.shape), "FP32").set_data_from_numpy(x)
        given = DEFER | {f"isthmus.{name}": value for name, value in parameters.items()}
        result = await self.client.infer(MODEL, [tensor], request_id=request_id, parameters=given)
        return explanation(result)

    async def receive(self, count: int, **options: Any) -> list[LateAnswer]:
        """Return the next results, acknowledged."""
        received: list[LateAnswer] = []
        async with asyncio.timeout(PATIENCE_S), DeferredAnswers(self.address, **options) as answers:
            async for answer in answers:
                received.append(answer)
                if len(received) == count:
                    break
        return received

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.01)


@asynccontextmanager
async def deferring(
    folder: Path,
    *,
    sending: bool = True,
    limits: Limits | None = None,
    listen: str = "127.0.0.1:0",
    longest_ttl_s: int = 3600,
    capture: Capture | None = None,
) -> AsyncIterator[Deferring]:
    """Serve version 1 from `folder`; the sender runs when `sending`."""
    if not (folder / "bundle").exists():
        bundles.build_bundle(folder / "bundle")
    identity = make_identity(folder)
    models = ServedModels((MODEL,))
    models.swap(MODEL, open_variant(folder / "bundle"))
    async with faulty_cloud(identity) as cloud, open_channel(cloud.address, identity.ca) as channel:
        breaker = Breaker(failures=1000)  # faults are the cloud's here, not the breaker's
        uplink = Uplink(channel, lambda: "token", breaker, breaker, guard_s=0.05, longest_s=10.0)
        lessons = Lessons(models, capture)
        deferred = open_deferred(
            folder / "deferred",
            folder / "deferred.key",
            uplink,
            limits=limits or Limits(bytes=1 << 20, entries=100),
            longest_ttl_s=longest_ttl_s,
            concurrency=2,
            deadline_s=5.0,
            owner=lambda: "",
            lessons=lessons,
        )
        assert deferred is not None
        router = Router(models, uplink, deferral=deferred.deferral, lessons=lessons)
        server = AgentServer(
            listen,
            InferenceService(models, router),
            agent_pb2.GetStatusResponse,
            deferred=deferred.service.handlers(),
        )
        address = await server.start()
        client = triton.InferenceServerClient(address)
        loops = [asyncio.create_task(deferred.deferral.tidy())]
        loops += [asyncio.create_task(deferred.sender.run())] if sending else []
        try:
            yield Deferring(address, client, cloud, uplink, deferred, models)
        finally:
            await client.close()
            deferred.service.stop()
            await server.stop(1)
            for task in loops:
                task.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            deferred.deferral.close()
            models.swap(MODEL, None)
