"""What the cloud tells Prometheus: the gateway's counters, read when somebody asks.

Nothing is counted here. A scrape reads the numbers that `isthmus traffic show` reports, in one go on the event loop:

    requests of a model  = sum of isthmus_gateway_requests_total; of those, answered = count of isthmus_gateway_seconds
    answers of Triton    = answered - isthmus_gateway_cache_hits_total
    copies               = agreed + disagreed + failed; dropped ones were never sent
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cloud.counters import LATENCY_BOUNDS_S, GatewayCounters
from cloud.replicas import Replicas
from cloud.response_cache import MemoryCache, ResponseCache
from isthmus import __version__

_BOUNDS: Final = (*(str(bound) for bound in LATENCY_BOUNDS_S), "+Inf")
_STATES: Final = ("serving", "away", "drained")


class GatewayCollector(Collector):
    """Reads the gateway's counters; used on the event loop only.

    Args:
        counters: What the gateway counts.
        replicas: The Tritons.
        cache: Where answers are kept.
    """

    def __init__(self, counters: GatewayCounters, replicas: Replicas, cache: ResponseCache) -> None:
        self._counters, self._replicas, self._cache = counters, replicas, cache

    def collect(self) -> Iterator[Metric]:
        """Return every metric with its values as of now."""
        info = _gauge("isthmus_cloud_info", "The program.", "version")
        info.add_metric((__version__,), 1)
        yield info
        yield from self._requests()
        yield from self._shadows()
        yield from self._kept()
        yield from self._tritons()

    def _requests(self) -> Iterator[Metric]:
        labels = ("model", "version", "assignment", "outcome")
        requests = _counter("isthmus_gateway_requests", "Requests for models that exist.", *labels)
        seconds = HistogramMetricFamily(
            "isthmus_gateway_seconds", "Time from an answered request to its answer.", labels=("model",)
        )
        for model, counted in self._counters.models.items():
            for (version, assignment, outcome), count in counted.outcomes.items():
                requests.add_metric((model, str(version), assignment or "released", outcome), count)
            buckets = list(zip(_BOUNDS, accumulate(counted.latency.buckets), strict=True))
            seconds.add_metric((model,), buckets, counted.latency.total_s)
        yield from (requests, seconds)

    def _shadows(self) -> Iterator[Metric]:
        copies = _counter("isthmus_gateway_shadow_requests", "Copies for a shadow version.", "model", "outcome")
        for model, counted in self._counters.models.items():
            shadow = counted.shadow
            for outcome in ("agreed", "disagreed", "failed", "dropped"):
                copies.add_metric((model, outcome), getattr(shadow, outcome))
        yield copies

    def _kept(self) -> Iterator[Metric]:
        hits = _counter("isthmus_gateway_cache_hits", "Requests that got a kept answer.", "model")
        misses = _counter("isthmus_gateway_cache_misses", "Requests for which none was kept.", "model")
        for model, counted in self._counters.models.items():
            hits.add_metric((model,), counted.cache_hits)
            misses.add_metric((model,), counted.cache_misses)
        yield from (hits, misses)
        if isinstance(self._cache, MemoryCache):
            size = _gauge("isthmus_gateway_cache_bytes", "Memory that kept answers take.")
            size.add_metric((), self._cache.bytes)
            yield size

    def _tritons(self) -> Iterator[Metric]:
        state = _gauge("isthmus_triton_state", "1 for the state that a Triton is in.", "triton", "state")
        under_way = _gauge("isthmus_triton_requests_under_way", "Requests that it has now.", "triton")
        requests = _counter("isthmus_triton_requests", "Requests that were sent to it.", "triton")
        retries = _counter("isthmus_triton_retries", "Requests that it did not take, asked elsewhere.", "triton")
        ejections = _counter("isthmus_triton_ejections", "How often it was taken out.", "triton")
        for replica in self._replicas:
            for name in _STATES:
                state.add_metric((replica.name, name), int(name == replica.state))
            under_way.add_metric((replica.name,), replica.under_way)
            requests.add_metric((replica.name,), replica.requests)
            retries.add_metric((replica.name,), replica.retries)
            ejections.add_metric((replica.name,), replica.ejections)
        yield from (state, under_way, requests, retries, ejections)


def cloud_registry(*collectors: Collector) -> CollectorRegistry:
    """Return a registry of these and of the process (CPU time, memory, file descriptors)."""
    registry = CollectorRegistry(auto_describe=False)
    for collector in collectors:
        registry.register(collector)
    ProcessCollector(registry=registry)
    return registry


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, labels=labels)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=labels)
