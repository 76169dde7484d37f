"""A listening agent server with a real light model and a real uplink, for tests of the inference path."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import tritonclient.grpc.aio as triton

from edge.agent import describe_status
from edge.audit import Audit
from edge.breaker import Breaker
from edge.hedge import Hedge
from edge.lessons import Capture, Lessons
from edge.model import LiveModel, ServedModels, open_model
from edge.question import Limits
from edge.response_cache import ResponseCache
from edge.router import Router
from edge.runtimes import Worker
from edge.server import AgentServer, InferenceService, may_use_all
from edge.stragglers import Stragglers
from edge.uplink import Uplink, open_channel, watch_connection
from isthmus.bundle import Fusion
from isthmus.oip import read_parameters
from isthmus.tensors import Array
from tests.edge import bundles
from tests.edge.faulty_cloud import FaultyCloud, Identity, faulty_cloud, make_identity

MODEL = "triage"
FUSION_WEIGHT = 0.4


@dataclass
class Serving:
    address: str
    client: triton.InferenceServerClient
    models: ServedModels
    uplink: Uplink
    cloud: FaultyCloud
    service: InferenceService
    audit: Audit | None = None
    alarms: list[str] = field(default_factory=list)

    async def infer(self, x: Array, *, model: str = MODEL, **kwargs: Any) -> triton.InferResult:
        tensor = triton.InferInput("x", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x)
        return await self.client.infer(model, [tensor], **kwargs)


def explanation(result: triton.InferResult) -> dict[str, Any]:
    return read_parameters(result.get_response().parameters)


def open_variant(bundle: Path, variant: str = "onnxruntime-fp32") -> LiveModel:
    return open_model(bundle, variant)


def computed_by(live: LiveModel, worker: Worker) -> LiveModel:
    """The same version, computed by another worker."""
    return LiveModel(live.manifest, live.variant, live.calibration, worker, live._score, live.policy)


def fuse_answers(models: ServedModels, *, outputs: int = 1) -> None:
    """Let the record of the version that serves ask for fusion; leave the model its first outputs."""
    live = models.find(MODEL)
    point = live.operating_point.model_copy(update={"fusion": Fusion(light_weight=FUSION_WEIGHT, gain=0.01)})
    calibration = live.calibration.model_copy(update={"variants": {live.variant.id: point}})
    manifest = live.manifest.model_copy(update={"outputs": live.manifest.outputs[:outputs]})
    models._live[MODEL] = LiveModel(manifest, live.variant, calibration, live._worker, live._score, live.policy)


@asynccontextmanager
async def serving(
    folder: Path,
    *,
    breaker: Breaker | None = None,
    token: str | None = "token",
    capture: Capture | None = None,
    stragglers: Stragglers | None = None,
    default_deadline_s: float = 1.0,
    guard_s: float = 0.05,
    may_use: Callable[[str], bool] = may_use_all,
    listen: str = "127.0.0.1:0",
    hedge: Hedge | None = None,
    outside: tuple[str, Identity] | None = None,
    model_calls: int = 128,
    stream_requests: int = 32,
    allow_non_finite: bool = False,
    audit_share: float = 0.0,
    message_bytes: int = 64 << 20,
    unix_socket: Path | None = None,
    cache: ResponseCache | None = None,
) -> AsyncIterator[Serving]:
    """Serve version 1 from `folder`, with a cloud that answers right until it is told otherwise.

    `outside` is the address and identity of another cloud, which is used instead.
    """
    if not (folder / "bundle").exists():
        bundles.build_bundle(folder / "bundle")
    identity = outside[1] if outside else make_identity(folder)
    models = ServedModels((MODEL,))
    models.swap(MODEL, open_variant(folder / "bundle"))
    async with faulty_cloud(identity) as cloud:
        channel = open_channel(outside[0] if outside else cloud.address, identity.ca)
        uplink = Uplink(
            channel,
            lambda: token,
            breaker or Breaker(),
            Breaker(),
            guard_s=guard_s,
            longest_s=10.0,
            stragglers=stragglers,
        )
        alarms: list[str] = []
        audit = Audit(uplink, share=audit_share, alarm=lambda _, what: alarms.append(what)) if audit_share else None
        router = Router(
            models,
            uplink,
            limits=Limits(default_deadline_s, allow_non_finite),
            lessons=Lessons(models, capture),
            hedge=hedge,
            model_calls=model_calls,
            audit=audit,
            cache=cache,
        )
        connection = asyncio.ensure_future(watch_connection(channel, uplink.nudge))
        service = InferenceService(models, router, may_use=may_use, stream_requests=stream_requests)
        status = partial(describe_status, "device-1", models, {}, uplink)
        server = AgentServer(listen, service, status, message_bytes=message_bytes, unix_socket=unix_socket)
        address = await server.start()
        await server.set_ready(ready=True)
        client = triton.InferenceServerClient(address)
        try:
            yield Serving(address, client, models, uplink, cloud, service, audit, alarms)
        finally:
            await client.close()
            await server.stop(0)
            connection.cancel()
            await channel.close()
            models.swap(MODEL, None)
