"""`python -m tests.edge.registry_process FOLDER PORT`: a registry with one blob, FOLDER/blob, to be killed.

It prints its port. Of the first call it sends half and then waits; FOLDER/log says how calls went.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from isthmus.v1 import registry_pb2, registry_pb2_grpc

CHUNK = 64 << 10


class Blob(registry_pb2_grpc.RegistryServiceServicer):
    def __init__(self, folder: Path) -> None:
        self._data = (folder / "blob").read_bytes()
        self._log = folder / "log"

    async def FetchBlob(  # noqa: N802
        self, request: registry_pb2.FetchBlobRequest, context: Any
    ) -> AsyncIterator[registry_pb2.FetchBlobResponse]:
        for start in range(request.offset, len(self._data), CHUNK):
            yield registry_pb2.FetchBlobResponse(data=self._data[start : start + CHUNK])
            if request.offset == 0 and start >= len(self._data) // 2:
                self._log.write_text("killed before its end\n")
                await asyncio.Event().wait()


async def serve(folder: Path, port: int) -> None:
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(Blob(folder), server)  # type: ignore[abstract]
    pair = ((folder / "cloud.key").read_bytes(), (folder / "cloud.pem").read_bytes())
    bound = server.add_secure_port(f"127.0.0.1:{port}", grpc.ssl_server_credentials([pair]))
    await server.start()
    sys.stdout.write(f"{bound}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
