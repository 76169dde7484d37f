"""A TLS gateway that misbehaves on demand, and a link to it that does; they play the cloud for fault injection only.

`python -m tests.edge.faulty_cloud FOLDER PORT LOG` is a right one in a process of its own, to be killed: it takes its
certificate from FOLDER, prints its port, and appends the id of every request that it receives to LOG.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from isthmus.bundle import TensorSpec
from isthmus.oip import MODEL_INFER, service_pb2, set_parameter
from isthmus.tensors import Array, decode_inputs, encode_outputs
from tests.edge import bundles

Behaviour = Callable[[bytes, Any], Awaitable[bytes]]
NEVER = 3600.0


@dataclass(frozen=True)
class Identity:
    key: Path
    certificate: Path

    @property
    def ca(self) -> Path:
        return self.certificate


def make_identity(folder: Path) -> Identity:
    """Write a self-signed certificate for localhost."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "faulty cloud")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    identity = Identity(folder / "cloud.key", folder / "cloud.pem")
    identity.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    identity.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return identity


def heavy_response(raw: bytes, *, logits: Array | None = None) -> Any:
    """What a right cloud answers: logits that no light model gives (the input plus 100)."""
    request = service_pb2.ModelInferRequest.FromString(raw)
    specs = (TensorSpec(name="x", datatype="FP32", shape=(-1, bundles.CLASSES)),)
    x = decode_inputs(request, specs, max_batch=64)["x"]
    heavy = x + np.float32(100) if logits is None else logits
    outputs = {"logits": heavy, "label": heavy.argmax(axis=-1).astype(np.int64)}
    response = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1")
    encode_outputs(response, outputs, [output.name for output in request.outputs])
    set_parameter(response, "isthmus.cloud_version", "7")
    return response


async def right(raw: bytes, context: Any) -> bytes:
    return bytes(heavy_response(raw).SerializeToString())


async def black_hole(raw: bytes, context: Any) -> bytes:
    await asyncio.sleep(NEVER)
    return b""


async def stall_after_headers(raw: bytes, context: Any) -> bytes:
    await context.send_initial_metadata(())
    await asyncio.sleep(NEVER)
    return b""


async def garbage(raw: bytes, context: Any) -> bytes:
    return b"\xff\xff\xff\xff not protobuf"


async def empty(raw: bytes, context: Any) -> bytes:
    return b""


async def not_finite(raw: bytes, context: Any) -> bytes:
    return bytes(heavy_response(raw, logits=np.full((1, 3), np.nan, np.float32)).SerializeToString())


async def wrong_shape(raw: bytes, context: Any) -> bytes:
    return bytes(heavy_response(raw, logits=np.zeros((1, 4), np.float32)).SerializeToString())


async def wrong_dtype(raw: bytes, context: Any) -> bytes:
    return bytes(heavy_response(raw, logits=np.zeros((1, 3), np.float64)).SerializeToString())


async def short_bytes(raw: bytes, context: Any) -> bytes:
    response = heavy_response(raw)
    response.raw_output_contents[0] = response.raw_output_contents[0][:-1]
    return bytes(response.SerializeToString())


async def twice(raw: bytes, context: Any) -> bytes:
    response = heavy_response(raw)
    response.outputs.append(response.outputs[0])
    response.raw_output_contents.append(response.raw_output_contents[0])
    return bytes(response.SerializeToString())


def answering(logits: Array) -> Behaviour:
    async def answer(raw: bytes, context: Any) -> bytes:
        return bytes(heavy_response(raw, logits=logits).SerializeToString())

    return answer


def answering_logits(logits: Array) -> Behaviour:
    """A heavy model that has no output but its logits."""

    async def answer(raw: bytes, context: Any) -> bytes:
        response = heavy_response(raw, logits=logits)
        del response.outputs[1:], response.raw_output_contents[1:]
        return bytes(response.SerializeToString())

    return answer


def refusing(code: grpc.StatusCode, *hints: tuple[str, str]) -> Behaviour:
    async def refuse(raw: bytes, context: Any) -> bytes:
        await context.abort(code, "no", hints)
        return b""

    return refuse


@dataclass
class FaultyCloud:
    address: str
    behaviour: Behaviour = right
    requests: list[bytes] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)

    async def infer(self, raw: bytes, context: Any) -> bytes:
        self.requests.append(raw)
        self.metadata.append(dict(context.invocation_metadata()))
        return await self.behaviour(raw, context)


@asynccontextmanager
async def faulty_cloud(identity: Identity, *, port: int = 0) -> AsyncIterator[FaultyCloud]:
    """Run one on a free port, or again on the port of an earlier one."""
    server = grpc.aio.server()
    cloud = FaultyCloud("")
    service, _, method = MODEL_INFER[1:].partition("/")
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(cloud.infer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    pair = (identity.key.read_bytes(), identity.certificate.read_bytes())
    bound = server.add_secure_port(f"127.0.0.1:{port}", grpc.ssl_server_credentials([pair]))
    cloud.address = f"localhost:{bound}"
    await server.start()
    try:
        yield cloud
    finally:
        await server.stop(None)


class Link:
    """A TCP link to a cloud, for agents to connect to; it is right, refuses connections, or swallows what is sent."""

    def __init__(self, cloud: str) -> None:
        self._port = int(cloud.rpartition(":")[2])
        self._listener: asyncio.Server | None = None
        self._swallowing = False
        self._writers: set[asyncio.StreamWriter] = set()
        self.address = ""

    async def __aenter__(self) -> Self:
        await self.heal()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()

    async def heal(self) -> None:
        """Forward again; what a black hole has swallowed was cut off by then, as on a link that was really dead."""
        if self._swallowing:
            await self.refuse()
        self._swallowing = False
        if self._listener is None:
            port = int(self.address.rpartition(":")[2] or 0)
            self._listener = await asyncio.start_server(self._serve, "127.0.0.1", port)
            self.address = f"localhost:{self._listener.sockets[0].getsockname()[1]}"

    async def refuse(self) -> None:
        """Refuse connections and reset those that are open."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self.reset()

    def reset(self) -> None:
        """Reset the connections that are open."""
        for writer in [writer for writer in self._writers if not writer.is_closing()]:
            linger = b"\x01\0\0\0\0\0\0\0"  # on, for no time: closing sends RST
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        self._writers.clear()

    def black_hole(self) -> None:
        """Take connections and bytes, and never say anything."""
        self._swallowing = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:  # the cloud is down
            writer.close()
            return
        self._writers.add(back)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._forward(reader, back))
            group.create_task(self._forward(there, writer))
        self._writers -= {writer, back}

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if not self._swallowing:
                    writer.write(data)
                    await writer.drain()
        if not self._swallowing:
            writer.close()


async def _serve_until_killed(folder: Path, port: int, log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    async def noting(raw: bytes, context: Any) -> bytes:
        os.write(file, service_pb2.ModelInferRequest.FromString(raw).id.encode() + b"\n")
        await asyncio.sleep(0.005)  # long enough to be killed in the middle
        return await right(raw, context)

    async with faulty_cloud(Identity(folder / "cloud.key", folder / "cloud.pem"), port=port) as cloud:
        cloud.behaviour = noting
        sys.stdout.write(cloud.address + "\n")
        sys.stdout.flush()
        await asyncio.sleep(NEVER)


if __name__ == "__main__":
    asyncio.run(_serve_until_killed(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
