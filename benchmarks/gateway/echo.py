"""The floor: one TLS gRPC hop that answers with the bytes that it gets, on the gateway's own gRPC stack.

`python -m benchmarks.gateway.echo KEY CERTIFICATE` prints where it listens and serves until it is killed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from isthmus import tls13

tls13.enforce()  # before anything imports grpc

import grpc  # noqa: E402

from cloud.bootstrap import open_runner  # noqa: E402
from isthmus.oip import SERVICE  # noqa: E402
from security.tls import server_credentials  # noqa: E402


async def _echo(raw: bytes, _context: Any) -> bytes:
    return raw


async def serve(key: Path, certificate: Path) -> None:
    """Serve for ever."""
    server = grpc.aio.server()
    handlers: Any = {"ModelInfer": grpc.unary_unary_rpc_method_handler(_echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(key, certificate))
    await server.start()
    sys.stdout.write(json.dumps({"address": f"127.0.0.1:{port}"}) + "\n")
    sys.stdout.flush()
    await server.wait_for_termination()


if __name__ == "__main__":
    with open_runner() as runner:
        runner.run(serve(Path(sys.argv[1]), Path(sys.argv[2])))
