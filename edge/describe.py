"""What the agent says about its models in the Open Inference Protocol's own terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edge.batching import takes_batches
from edge.counters import Counters, RouteCount
from edge.model import LiveModel, ServedModels
from isthmus.bundle import TensorSpec
from isthmus.oip import model_config_pb2, service_pb2


def metadata(live: LiveModel) -> Any:
    """Return a model's ModelMetadataResponse."""
    manifest = live.manifest
    response = service_pb2.ModelMetadataResponse(
        name=manifest.name, versions=[str(manifest.version)], platform=live.variant.runtime
    )
    for specs, tensors in ((manifest.inputs, response.inputs), (manifest.outputs, response.outputs)):
        for spec in specs:
            tensors.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
    return response


def config(live: LiveModel) -> Any:
    """Return a model's ModelConfigResponse; a symbolic first axis becomes Triton's batch."""
    manifest = live.manifest
    batched = takes_batches(manifest)
    model = model_config_pb2.ModelConfig(
        name=manifest.name, platform=live.variant.runtime, max_batch_size=manifest.max_batch if batched else 0
    )
    for spec in manifest.inputs:
        model.input.add(name=spec.name, data_type=_type(spec), dims=spec.shape[1:] if batched else spec.shape)
    for spec in manifest.outputs:
        model.output.add(name=spec.name, data_type=_type(spec), dims=spec.shape[1:] if batched else spec.shape)
    return service_pb2.ModelConfigResponse(config=model)


def _type(spec: TensorSpec) -> Any:
    return model_config_pb2.DataType.Value(f"TYPE_{spec.datatype}")


def statistics(models: ServedModels, may_use: Callable[[str], bool], name: str) -> Any:
    """Return the ModelStatisticsResponse of one model, or of all that the caller may use for an empty name."""
    response = service_pb2.ModelStatisticsResponse()
    for served, counters in models.counters.items():
        if name in ("", served) and may_use(served):
            _add_statistics(response.model_stats.add(), served, models.version(served), counters)
    return response


def _add_statistics(stats: Any, name: str, version: int, counters: Counters) -> None:
    total = RouteCount(
        answers=sum(count.answers for count in counters.routes.values()),
        rows=sum(count.rows for count in counters.routes.values()),
        total_ns=sum(count.total_ns for count in counters.routes.values()),
    )
    stats.name, stats.version = name, str(version)
    stats.last_inference = counters.last_ms
    stats.inference_count = total.rows
    stats.execution_count = counters.light_inferences
    _set_duration(stats.inference_stats.success, total.answers, total.total_ns)
    _set_duration(stats.inference_stats.fail, counters.errors, counters.error_ns)
    _set_duration(stats.inference_stats.compute_infer, counters.light_inferences, counters.light_ns)
    for route, count in counters.routes.items():
        _set_duration(stats.response_stats[route].success, count.answers, count.total_ns)


def _set_duration(duration: Any, count: int, ns: int) -> None:
    duration.count, duration.ns = count, ns


def index(models: ServedModels, may_use: Callable[[str], bool], *, ready_only: bool) -> Any:
    """Return the RepositoryIndexResponse."""
    response = service_pb2.RepositoryIndexResponse()
    for name, live in models:
        if not may_use(name):
            continue
        if live is not None:
            response.models.add(name=name, version=str(live.manifest.version), state="READY")
        elif not ready_only:
            response.models.add(name=name, state="UNAVAILABLE", reason="not installed yet")
    return response
