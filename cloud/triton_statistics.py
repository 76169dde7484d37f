"""Adds up the counters that several Tritons report of the same models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from isthmus.oip import service_pb2

_DURATIONS: Final = tuple(field.name for field in service_pb2.InferStatistics.DESCRIPTOR.fields)
_BATCH_DURATIONS: Final = ("compute_input", "compute_infer", "compute_output")


def merged(answers: Iterable[Iterable[Any]]) -> list[Any]:
    """Return one ModelStatistics message for each model and version, in order; memory usage is left out."""
    found: dict[tuple[str, str], Any] = {}
    for answer in answers:
        for one in answer:
            total = found.setdefault(
                (one.name, one.version), service_pb2.ModelStatistics(name=one.name, version=one.version)
            )
            total.last_inference = max(total.last_inference, one.last_inference)
            total.inference_count += one.inference_count
            total.execution_count += one.execution_count
            _add(total.inference_stats, one.inference_stats, _DURATIONS)
            _add_batches(total, one)
    return [found[key] for key in sorted(found)]


def _add(total: Any, one: Any, durations: tuple[str, ...]) -> None:
    for name in durations:
        into, value = getattr(total, name), getattr(one, name)
        into.count += value.count
        into.ns += value.ns


def _add_batches(total: Any, one: Any) -> None:
    sizes = {batch.batch_size: batch for batch in total.batch_stats}
    for batch in one.batch_stats:
        into = sizes.get(batch.batch_size) or total.batch_stats.add(batch_size=batch.batch_size)
        _add(into, batch, _BATCH_DURATIONS)
