"""The floor: the gRPC stack of the agent, a servicer on tritonclient's stubs, and nothing else.

`python -m benchmarks.servers.floor [--infer] NAME=MODEL.onnx...` decodes the tensors of a request and answers with
arrays of the shapes that the model gives. With --infer the handler also calls the runtime itself, then and there.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np

from benchmarks.servers.load import open_session
from isthmus.oip import service_pb2, service_pb2_grpc

_DTYPES: Final = {"FP32": np.dtype(np.float32)}


class Floor(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # tritonclient has no types
    """Answers ModelInfer."""

    def __init__(self, models: dict[str, Path], *, infer: bool) -> None:
        self._sessions = {name: open_session(path) for name, path in models.items()}
        self._infer = infer
        self._constant: dict[str, list[Any]] = {}

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 - the method's name in the protocol
        """Decode, compute where that is asked for, encode."""
        del context
        pairs = zip(request.inputs, request.raw_input_contents, strict=True)
        inputs = {
            tensor.name: np.frombuffer(data, _DTYPES[tensor.datatype]).reshape(tuple(tensor.shape))
            for tensor, data in pairs
        }
        name = request.model_name
        if self._infer or name not in self._constant:
            outputs = self._constant[name] = self._sessions[name].run(None, inputs)
        else:
            outputs = self._constant[name]
        response = service_pb2.ModelInferResponse(model_name=name, id=request.id)
        for port, array in zip(self._sessions[name].get_outputs(), outputs, strict=True):
            response.outputs.add(name=port.name, datatype="FP32", shape=array.shape)
            response.raw_output_contents.append(array.tobytes())
        return response


async def serve(models: dict[str, Path], *, infer: bool) -> None:
    """Serve until SIGTERM."""
    server = grpc.aio.server(options=(("grpc.max_receive_message_length", 64 << 20),))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Floor(models, infer=infer), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    sys.stdout.write(json.dumps({"address": f"127.0.0.1:{port}"}) + "\n")
    sys.stdout.flush()
    await stop.wait()
    await server.stop(0)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--infer"]
    asyncio.run(serve({n: Path(p) for n, _, p in (w.partition("=") for w in words)}, infer="--infer" in sys.argv))
