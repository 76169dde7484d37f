"""Several Tritons that are not the cloud's children: one that is late, one that comes back empty."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from cloud.config import CloudSettings
from cloud.replicas import Replica
from isthmus.oip import service_pb2_grpc
from isthmus.tensors import decode_outputs, encode_request
from tests.cloud.conftest import eventually
from tests.cloud.tritons import external_triton, free_port
from tests.cloud.workspaces import make_bundle, make_workspace, serving

pytestmark = pytest.mark.slow

X = np.array([[1, 2, 3, 4]], dtype=np.float32)


def test_each_triton_is_named_once() -> None:
    assert CloudSettings(triton="a:1, b:2").tritons == ("a:1", "b:2")
    assert CloudSettings().tritons == ()
    for wrong in ("a:1,a:1", "a:1,", "a", "a:1,b:x"):
        with pytest.raises(ValueError, match="expected"):
            CloudSettings(triton=wrong)


def test_a_triton_that_comes_late_or_back_gets_its_models_before_requests(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    ports = free_port(), free_port()

    async def story() -> None:
        metadata = (("authorization", f"Bearer {workspace.token('client')}"),)
        with ExitStack() as tritons:
            tritons.enter_context(external_triton(tmp_path / "one", ports[0]))
            address = ",".join(f"127.0.0.1:{port}" for port in ports)
            await eventually(lambda: listens(ports[0]), "the first Triton listens")
            async with serving(workspace, triton=address) as cloud, workspace.channel(cloud) as channel:
                first, late = cloud.pool
                assert (first.state, late.state) == ("serving", "away")
                with workspace.client(cloud) as client:
                    await asyncio.to_thread(client.publish, make_bundle(tmp_path / "v1", 1), workspace.operator)
                inference: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                failed = list[grpc.StatusCode]()

                async def asked_of(replica: Replica, count: int) -> bool:
                    """Ask once; return whether the replica has answered so many."""
                    try:
                        answer = await inference.ModelInfer(
                            encode_request("triage", {"x": X}), metadata=metadata, timeout=30
                        )
                    except grpc.aio.AioRpcError as error:
                        failed.append(error.code())
                    else:
                        assert decode_outputs(answer)["logits"][0, 0] == 10.0
                    return replica.requests >= count

                await eventually(lambda: asked_of(first, 20), "the first Triton answers")
                assert late.requests == 0
                with external_triton(tmp_path / "two", ports[1]):
                    await eventually(lambda: asked_of(late, 20), "the late Triton answers, too", within_s=60)
                alone, before = first.requests, late.requests
                await eventually(lambda: asked_of(first, alone + 20), "the first goes on")
                with external_triton(tmp_path / "three", ports[1]):  # it knows no model
                    await eventually(lambda: asked_of(late, before + 20), "it is back with its models", within_s=60)
                # One request at a time: none was running when the Triton was killed, and those that it could not take
                # went to the other.
                assert not failed

    asyncio.run(story())


async def listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True
