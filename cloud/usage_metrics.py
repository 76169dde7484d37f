"""What the cloud tells Prometheus of requests and quotas: the counters that there are, read when somebody asks.

There is no label for devices: one series for each would be too many. `isthmus usage --by device` tells of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cloud.admission import Admission
from cloud.journal import OUTCOMES
from cloud.metering import Meter
from cloud.quota_store import QuotaStore
from cloud.redis_quotas import RedisQuotas


class UsageCollector(Collector):
    """Reads the counters; used on the event loop only.

    Args:
        meter: Counts requests.
        admission: Refuses some of them.
        store: Counts them against quotas.
    """

    def __init__(self, meter: Meter, admission: Admission, store: QuotaStore) -> None:
        self._meter, self._admission, self._store = meter, admission, store

    def collect(self) -> Iterator[Metric]:
        """Return every metric with its values as of now."""
        labels = ("tenant", "model", "version")
        requests = CounterMetricFamily(
            "isthmus_usage_requests", "Requests, by what became of them.", labels=(*labels, "outcome")
        )
        received = CounterMetricFamily("isthmus_usage_request_bytes", "Bytes of requests.", labels=labels)
        sent = CounterMetricFamily("isthmus_usage_answer_bytes", "Bytes of answers.", labels=labels)
        calls = CounterMetricFamily("isthmus_usage_calls", "Requests that went on to Triton.", labels=labels)
        seconds = CounterMetricFamily(
            "isthmus_usage_call_seconds", "Time until Triton's answers were there.", labels=labels
        )
        for (tenant, model, version), counts in sorted(self._meter.totals().items()):
            values = (tenant, model, str(version))
            for outcome in OUTCOMES:
                requests.add_metric((*values, outcome), getattr(counts, outcome))
            received.add_metric(values, counts.bytes_in)
            sent.add_metric(values, counts.bytes_out)
            calls.add_metric(values, counts.calls)
            seconds.add_metric(values, counts.call_us / 1e6)
        yield from (requests, received, sent, calls, seconds)
        yield from self._quotas()

    def _quotas(self) -> Iterator[Metric]:
        refusals = CounterMetricFamily(
            "isthmus_quota_refusals", "Requests and streams that a quota refused.", labels=("tenant", "reason")
        )
        for values, number in sorted(self._admission.refusals.items()):
            refusals.add_metric(values, number)
        yield refusals
        yield CounterMetricFamily(
            "isthmus_usage_journal_errors", "Counts that are in memory only: the disk did not take them.",
            value=self._meter.journal_errors,
        )  # fmt: skip
        if isinstance(self._store, RedisQuotas):
            yield GaugeMetricFamily("isthmus_quota_redis_up", "Whether Redis counts.", value=self._store.up)
            yield CounterMetricFamily(
                "isthmus_quota_redis_failures", "Times that Redis did not answer.", value=self._store.failures
            )
            yield CounterMetricFamily(
                "isthmus_quota_local_requests", "Requests counted in this process instead of in Redis.",
                value=self._store.local_requests,
            )  # fmt: skip
