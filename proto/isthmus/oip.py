"""The Open Inference Protocol (KServe v2) over gRPC: the one place that imports its stubs.

The stubs are tritonclient's: a second copy of the proto package `inference` in one process clashes in protobuf's
descriptor pool, so nothing in this project generates its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

__all__ = [
    "MODEL_INFER",
    "SERVICE",
    "model_config_pb2",
    "override_fields",
    "read_parameters",
    "service_pb2",
    "service_pb2_grpc",
    "set_parameter",
]

SERVICE: Final = "inference.GRPCInferenceService"
MODEL_INFER: Final = f"/{SERVICE}/ModelInfer"


def set_parameter(message: Any, name: str, value: str | bool | float) -> None:
    """Set one entry of an OIP message's `parameters` map, by the type of `value`."""
    parameter = message.parameters[name]
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value


def read_parameters(parameters: Mapping[str, Any]) -> dict[str, str | bool | int | float]:
    """Return an OIP `parameters` map as plain values."""
    return {
        name: getattr(parameter, kind)
        for name, parameter in parameters.items()
        if (kind := parameter.WhichOneof("parameter_choice")) is not None
    }


def override_fields(serialized: bytes, *, model_name: str = "", model_version: str = "", request_id: str = "") -> bytes:
    """Return a serialized ModelInferRequest with scalar fields replaced, its tensors untouched.

    Protocol buffers merge concatenated messages and the last value of a scalar field wins (Encoding, "Last One Wins"),
    so a few bytes at the end replace what a decode and encode of megabytes would.
    """
    if request_id:  # another one each time
        return serialized + _scalars(model_name, model_version, request_id)
    return serialized + _names(model_name, model_version)


def _scalars(model_name: str, model_version: str, request_id: str) -> bytes:
    extra = service_pb2.ModelInferRequest(model_name=model_name, model_version=model_version, id=request_id)
    return bytes(extra.SerializeToString())


@lru_cache(maxsize=256)
def _names(model_name: str, model_version: str) -> bytes:
    return _scalars(model_name, model_version, "")
