"""What the agent tells Prometheus: the existing counters, read when somebody asks.

Nothing is counted here. A scrape reads the numbers that ModelStatistics and GetStatus report, in one go on the event
loop, so that whatever adds up there adds up in every scrape:

    requests answered  = sum of isthmus_requests_total, and for each route the count of isthmus_request_seconds
    requests not       = sum of isthmus_request_errors_total
    cloud answers      = isthmus_escalations_total succeeded + isthmus_cache_hits_total of the route cloud
                         - audits that agreed or disagreed - deferred requests that were answered
    escalations        attempted = succeeded + failed + cancelled + those in progress
    late answers       of those that failed
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Final, get_args

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from edge.audit import Audit
from edge.breaker import State
from edge.counters import LATENCY_BOUNDS_S, Counters
from edge.model import LiveModel, ServedModels
from edge.response_cache import ResponseCache
from edge.spool import Spool
from edge.state import Step
from edge.updater import Updater
from edge.uplink import Uplink
from isthmus import __version__

_BOUNDS: Final = (*(str(bound) for bound in LATENCY_BOUNDS_S), "+Inf")
_UNSERVED: Final = ""  # the model label of requests that name no model served here


class AgentCollector(Collector):
    """Reads the agent's counters; used on the event loop only.

    Args:
        device_id: Label of `isthmus_agent_info`.
        models: What is served.
        uplink: Where escalations are counted.
        spools: Captures by model.
        cache: Answers of before, where there is a cache.
        audit: Compares answers, where it does.
        updaters: Bring versions, by model.
    """

    def __init__(
        self,
        device_id: str,
        models: ServedModels,
        uplink: Uplink,
        spools: Mapping[str, Spool],
        cache: ResponseCache | None = None,
        audit: Audit | None = None,
        updaters: Mapping[str, Updater] | None = None,
    ) -> None:
        self._device_id = device_id
        self._models = models
        self._uplink = uplink
        self._spools = spools
        self._cache = cache
        self._audit = audit
        self._updaters = updaters or {}

    def collect(self) -> Iterator[Metric]:
        """Return every metric with its values as of now."""
        info = _gauge("isthmus_agent_info", "The program.", "version", "device")
        info.add_metric((__version__, self._device_id), 1)
        yield info
        yield from self._requests()
        yield from self._light()
        yield from self._versions()
        yield from self._escalations()
        if self._cache is not None:
            yield from self._cached(self._cache)
        if self._audit is not None:
            yield from self._audited(self._audit)
        yield from self._updates()

    def _counted(self) -> list[tuple[str, Counters]]:
        return [*self._models.counters.items(), (_UNSERVED, self._models.unserved)]

    def _requests(self) -> Iterator[Metric]:
        answers = _counter("isthmus_requests", "Requests that were answered.", "model", "route", "reason")
        rows = _counter("isthmus_request_rows", "Rows of those requests.", "model", "route")
        errors = _counter("isthmus_request_errors", "Requests that got no answer.", "model", "reason")
        seconds = HistogramMetricFamily(
            "isthmus_request_seconds", "Time from a request to its answer.", labels=("model", "route")
        )
        progress = _gauge("isthmus_requests_in_progress", "Requests that are being answered.", "model")
        for model, counters in self._counted():
            progress.add_metric((model,), counters.in_progress)
            for reason, count in counters.failures.items():
                errors.add_metric((model, reason), count)
            for route, counted in counters.routes.items() if model != _UNSERVED else ():
                for reason, count in counted.reasons.items():
                    answers.add_metric((model, route, reason), count)
                rows.add_metric((model, route), counted.rows)
                buckets = list(zip(_BOUNDS, accumulate(counted.buckets), strict=True))
                seconds.add_metric((model, route), buckets, counted.total_ns / 1e9)
        yield from (answers, rows, errors, seconds, progress)

    def _light(self) -> Iterator[Metric]:
        inferences = _counter("isthmus_light_inferences", "Requests that the light model computed.", "model")
        seconds = _counter("isthmus_light_seconds", "Time that they waited for it and it took.", "model")
        waiting = _gauge("isthmus_light_waiting", "Light inferences that wait or run.", "model")
        agreement = _counter(
            "isthmus_agreement_rows", "Escalated rows, by whether both models chose the same class.", "model", "agree"
        )
        for model, live in self._models:
            counters = self._models.counters[model]
            inferences.add_metric((model,), counters.light_inferences)
            seconds.add_metric((model,), counters.light_ns / 1e9)
            waiting.add_metric((model,), live.waiting if live is not None else 0)
            agreement.add_metric((model, "yes"), counters.agreed_rows)
            agreement.add_metric((model, "no"), counters.compared_rows - counters.agreed_rows)
        yield from (inferences, seconds, waiting, agreement)

    def _cached(self, cache: ResponseCache) -> Iterator[Metric]:
        hits = _counter("isthmus_cache_hits", "Answers that were given before.", "model", "route")
        misses = _counter("isthmus_cache_misses", "Requests that were not found in the cache.", "model")
        size = _gauge("isthmus_cache_bytes", "Memory that the kept answers take.")
        size.add_metric((), cache.bytes)
        for model, counters in self._models.counters.items():
            misses.add_metric((model,), counters.cache_misses)
            for route, counted in counters.routes.items():
                hits.add_metric((model, route), counted.cached)
        yield from (hits, misses, size)

    def _audited(self, audit: Audit) -> Iterator[Metric]:
        audits = _counter("isthmus_audits", "Confident answers compared with the cloud's.", "model", "outcome")
        bounds = _gauge("isthmus_audit_disagreement", "Rate of disagreement: 95 % interval.", "model", "bound")
        expected = _gauge("isthmus_audit_expected", "Rate of disagreement by the calibration record.", "model")
        risk = _gauge("isthmus_audit_risk", "Estimated share of errors among the edge's answers.", "model")
        alarm = _gauge("isthmus_audit_alarm", "1 when they disagree more often than they should.", "model")
        for model, live in self._models:
            if live is None:
                continue
            found = audit.report(live)
            outcomes = {"agreed": found.audited - found.disagreed, "disagreed": found.disagreed, "failed": found.failed}
            for outcome, count in outcomes.items():
                audits.add_metric((model, outcome), count)
            for bound, value in (("low", found.low), ("high", found.high)):
                bounds.add_metric((model, bound), value)
            expected.add_metric((model,), found.expected)
            alarm.add_metric((model,), float(found.alarm))
            if found.risk is not None:
                risk.add_metric((model,), found.risk)
        yield from (audits, bounds, expected, risk, alarm)

    def _updates(self) -> Iterator[Metric]:
        step = _gauge("isthmus_update_step", "1 for the step that an update is at.", "model", "step")
        outcomes = _counter("isthmus_update_outcomes", "What became of updates.", "model", "outcome", "reason")
        trial = _gauge("isthmus_trial_seconds", "How long the version that serves has been on trial.", "model")
        for model, updater in self._updaters.items():
            for name in Step:
                step.add_metric((model, name.value), float(name is updater.step))
            for (became, reason), count in updater.outcomes.items():
                outcomes.add_metric((model, became.value, reason), count)
            if updater.probation.trial is not None:
                trial.add_metric((model,), updater.probation.trial.seen.seconds)
        yield from (step, outcomes, trial)

    def _versions(self) -> Iterator[Metric]:
        version = _gauge("isthmus_model_version", "The version that serves, 0 for none.", "model")
        labels = ("model", "version", "variant", "runtime", "calibration")
        info = _gauge("isthmus_model_info", "What serves.", *labels)
        threshold = _gauge("isthmus_model_threshold", "Score below which requests escalate.", "model")
        dropped = _counter("isthmus_captures_dropped_rows", "Captured rows that were not kept.", "model")
        for model, live in self._models:
            version.add_metric((model,), self._models.version(model))
            if live is not None:
                info.add_metric(_what_serves(model, live), 1)
                if live.policy.threshold is not None:
                    threshold.add_metric((model,), live.policy.threshold)
            if model in self._spools:
                dropped.add_metric((model,), self._spools[model].dropped)
        yield from (version, info, threshold, dropped)

    def _escalations(self) -> Iterator[Metric]:
        counters = self._uplink.counters
        outcomes = {
            "attempted": counters.attempts,
            "succeeded": counters.successes,
            "failed": counters.failures,
            "cancelled": counters.cancelled,
            "skipped": counters.skipped,
        }
        escalations = _counter("isthmus_escalations", "Escalations; skipped ones were not attempted.", "outcome")
        for outcome, count in outcomes.items():
            escalations.add_metric((outcome,), count)
        late = _counter("isthmus_late_answers", "Failed escalations whose answer came after all, and was learnt from.")
        late.add_metric((), counters.late)
        bytes_up = _counter("isthmus_bytes_up", "Bytes of escalated requests.")
        bytes_up.add_metric((), counters.bytes_up)
        state = _gauge("isthmus_breaker_state", "1 for the state that a breaker is in.", "breaker", "state")
        breakers = {"normal": self._uplink.breaker.state, "hurried": self._uplink.hurried_breaker.state}
        for breaker, now in breakers.items():
            for name in get_args(State):
                state.add_metric((breaker, name), int(name == now))
        yield from (escalations, late, bytes_up, state)


def agent_registry(collector: AgentCollector) -> CollectorRegistry:
    """Return a registry of the agent and of its process (CPU time, memory, file descriptors)."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    ProcessCollector(registry=registry)
    return registry


def _what_serves(model: str, live: LiveModel) -> tuple[str, ...]:
    return model, str(live.manifest.version), live.variant.id, live.variant.runtime, live.calibration_id


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, labels=labels)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=labels)
