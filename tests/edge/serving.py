"""A listening agent server with a real light model and a real uplink, for tests of the inference path."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tritonclient.grpc.aio as triton

from edge.agent import describe_status
from edge.breaker import Breaker
from edge.model import LiveModel, ServedModels, open_model
from edge.response_cache import ResponseCache
from edge.router import Capture, Router
from edge.server import AgentServer, InferenceService, may_use_all
from edge.uplink import Uplink, open_channel
from isthmus.oip import read_parameters
from isthmus.tensors import Array
from tests.edge import bundles
from tests.edge.faulty_cloud import FaultyCloud, faulty_cloud, make_identity

MODEL = "triage"


@dataclass
class Serving:
    address: str
    client: triton.InferenceServerClient
    models: ServedModels
    uplink: Uplink
    cloud: FaultyCloud
    service: InferenceService

    async def infer(self, x: Array, *, model: str = MODEL, **kwargs: Any) -> triton.InferResult:
        tensor = triton.InferInput("x", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x)
        return await self.client.infer(model, [tensor], **kwargs)


def explanation(result: triton.InferResult) -> dict[str, Any]:
    return read_parameters(result.get_response().parameters)


def open_variant(bundle: Path, variant: str = "onnxruntime-fp32") -> LiveModel:
    return open_model(bundle, variant)


@asynccontextmanager
async def serving(
    folder: Path,
    *,
    breaker: Breaker | None = None,
    token: str | None = "token",
    capture: Capture | None = None,
    default_deadline_s: float = 1.0,
    guard_s: float = 0.05,
    may_use: Callable[[str], bool] = may_use_all,
    listen: str = "127.0.0.1:0",
    model_calls: int = 128,
    stream_requests: int = 32,
    allow_non_finite: bool = False,
    message_bytes: int = 64 << 20,
    unix_socket: Path | None = None,
    cache: ResponseCache | None = None,
) -> AsyncIterator[Serving]:
    """Serve version 1 from `folder`, with a cloud that answers right until it is told otherwise."""
    if not (folder / "bundle").exists():
        bundles.build_bundle(folder / "bundle")
    identity = make_identity(folder)
    models = ServedModels((MODEL,))
    models.swap(MODEL, open_variant(folder / "bundle"))
    async with faulty_cloud(identity) as cloud, open_channel(cloud.address, identity.ca) as channel:
        uplink = Uplink(channel, lambda: token, breaker or Breaker(), Breaker(), guard_s=guard_s, longest_s=10.0)
        router = Router(
            models,
            uplink,
            default_deadline_s=default_deadline_s,
            capture=capture,
            model_calls=model_calls,
            allow_non_finite=allow_non_finite,
            cache=cache,
        )
        service = InferenceService(models, router, may_use=may_use, stream_requests=stream_requests)
        status = partial(describe_status, "device-1", models, {}, uplink)
        server = AgentServer(listen, service, status, message_bytes=message_bytes, unix_socket=unix_socket)
        address = await server.start()
        await server.set_ready(ready=True)
        client = triton.InferenceServerClient(address)
        try:
            yield Serving(address, client, models, uplink, cloud, service)
        finally:
            await client.close()
            await server.stop(0)
            models.swap(MODEL, None)
