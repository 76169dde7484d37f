"""What Prometheus reads, over HTTP, against what the agent, its callers and the cloud have counted."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from edge.agreement import count_agreement
from edge.breaker import Breaker
from edge.metrics import AgentCollector, agent_registry
from edge.spool import Spool
from edge.status_client import fetch_status
from isthmus.errors import ConfigError
from isthmus.metrics_server import MetricsServer
from isthmus.oip import SERVICE
from tests.edge import bundles, faulty_cloud
from tests.edge.serving import MODEL, Serving, serving

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


@asynccontextmanager
async def measured(agent: Serving, spools: Mapping[str, Spool] | None = None) -> AsyncIterator[str]:
    """Serve the metrics of `agent`; yield their address."""
    collector = AgentCollector("device-1", agent.models, agent.uplink, spools or {})
    server = MetricsServer("127.0.0.1:0", agent_registry(collector))
    try:
        yield await server.start()
    finally:
        await server.stop()


async def fetch(address: str, accept: str = "", path: str = "/metrics") -> tuple[str, str]:
    def get() -> tuple[str, str]:
        request = urllib.request.Request(f"http://{address}{path}", headers={"Accept": accept} if accept else {})
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.read().decode(), response.headers["Content-Type"]

    return await asyncio.to_thread(get)


async def scrape(address: str) -> Samples:
    text, _ = await fetch(address)
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    """Return the sum of all samples of this name that have these labels."""
    return sum(v for (n, had), v in samples.items() if n == name and labels.items() <= dict(had).items())


async def mixed_load(agent: Serving) -> dict[str, int]:
    """Send requests of every kind; return how many there were of each."""
    for x in (bundles.SURE, bundles.SURE, bundles.HARD, np.concatenate([bundles.HARD, bundles.SURE])):
        await agent.infer(x)
    await agent.infer(bundles.SURE, parameters={"isthmus.route": "cloud"})
    agent.cloud.behaviour = faulty_cloud.garbage
    for _ in range(2):
        await agent.infer(bundles.HARD)
    agent.cloud.behaviour = faulty_cloud.refusing(grpc.StatusCode.INVALID_ARGUMENT)
    await agent.infer(bundles.HARD)
    await agent.infer(bundles.HARD, client_timeout=0.04)  # less than the guard: nothing is tried
    for x, model in ((np.zeros((1, 4), np.float32), MODEL), (bundles.SURE, "nothere")):
        with pytest.raises(InferenceServerException):
            await agent.infer(x, model=model)
    async with grpc.aio.insecure_channel(agent.address) as channel:
        call: Any = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        with pytest.raises(grpc.aio.AioRpcError):
            await call(b"\x0a\xff\xff\xff")
    return {"edge": 2, "cloud": 3, "fallback": 4, "failed": 1, "unserved": 2}


def test_metrics_reconcile_to_the_request(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent, measured(agent) as address:
            sent = await mixed_load(agent)
            samples = await scrape(address)
            status = await asyncio.to_thread(fetch_status, agent.address)
            stats = (await agent.client.get_inference_statistics(MODEL)).model_stats[0]
        for route in ("edge", "cloud", "fallback"):
            counted = value(samples, "isthmus_requests_total", model=MODEL, route=route)
            assert counted == sent[route]
            assert counted == value(samples, "isthmus_request_seconds_count", model=MODEL, route=route)
            assert counted == value(samples, "isthmus_request_seconds_bucket", model=MODEL, route=route, le="+Inf")
            assert counted == status["models"][0]["answers"][route] == stats.response_stats[route].success.count
            seconds = value(samples, "isthmus_request_seconds_sum", model=MODEL, route=route)
            assert seconds == pytest.approx(stats.response_stats[route].success.ns / 1e9)
        assert value(samples, "isthmus_request_rows_total", model=MODEL) == stats.inference_count == 10
        assert value(samples, "isthmus_request_errors_total", model=MODEL) == sent["failed"]
        assert sent["failed"] == status["models"][0]["errors"] == stats.inference_stats.fail.count
        assert value(samples, "isthmus_request_errors_total", model="") == sent["unserved"]
        assert value(samples, "isthmus_requests_in_progress") == 0
        assert value(samples, "isthmus_light_inferences_total") == stats.execution_count == 9
        uplink = status["uplink"]
        for outcome, name in (
            ("attempted", "attempts"), ("succeeded", "successes"), ("failed", "failures"), ("skipped", "skipped"),
        ):  # fmt: skip
            assert value(samples, "isthmus_escalations_total", outcome=outcome) == uplink[name]
        assert uplink["attempts"] == len(agent.cloud.requests) == 6
        assert uplink["successes"] == sent["cloud"]
        assert uplink["failures"] + uplink["skipped"] == sent["fallback"]
        assert value(samples, "isthmus_bytes_up_total") == sum(len(raw) for raw in agent.cloud.requests)

    asyncio.run(scenario())


def test_reasons_are_those_that_the_answers_carried(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent, measured(agent) as address:
            await mixed_load(agent)
            samples = await scrape(address)
        found = {
            (dict(labels)["route"], dict(labels)["reason"]): count
            for (name, labels), count in samples.items()
            if name == "isthmus_requests_total"
        }
        assert found == {
            ("edge", "confident"): 2,
            ("cloud", "uncertain"): 2,
            ("cloud", "requested"): 1,
            ("fallback", "bad-response"): 2,
            ("fallback", "refused"): 1,
            ("fallback", "deadline"): 1,
        }
        assert value(samples, "isthmus_request_errors_total", model=MODEL, reason="invalid-input") == 1
        assert value(samples, "isthmus_request_errors_total", model="", reason="unknown-model") == 1
        assert value(samples, "isthmus_request_errors_total", model="", reason="malformed-request") == 1

    asyncio.run(scenario())


def test_buckets_grow_and_end_with_all(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent, measured(agent) as address:
            for _ in range(5):
                await agent.infer(bundles.SURE)
            samples = await scrape(address)
        buckets = sorted(
            (float(dict(labels)["le"]), count)
            for (name, labels), count in samples.items()
            if name == "isthmus_request_seconds_bucket" and ("route", "edge") in labels
        )
        counts = [count for _, count in buckets]
        assert counts == sorted(counts)
        assert buckets[-1] == (float("inf"), 5)

    asyncio.run(scenario())


def test_agreement_of_edge_and_cloud(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent, measured(agent) as address:
            await agent.infer(np.concatenate([bundles.HARD, bundles.HARD[:, ::-1]]))  # the cloud adds 100 to each logit
            samples = await scrape(address)
            assert value(samples, "isthmus_agreement_rows_total", model=MODEL, agree="yes") == 2
            agent.cloud.behaviour = faulty_cloud.answering(np.array([[0.0, 0.0, 1.0]], np.float32))
            await agent.infer(bundles.HARD)
            samples = await scrape(address)
            assert value(samples, "isthmus_agreement_rows_total", model=MODEL, agree="yes") == 2
            assert value(samples, "isthmus_agreement_rows_total", model=MODEL, agree="no") == 1

    asyncio.run(scenario())


def test_rows_agree_when_every_choice_does() -> None:
    light = np.array([[1.0, 2.0], [3.0, 0.0], [np.nan, 0.0]])
    assert count_agreement(light, np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])) == (1, 3)
    sequence = np.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    other = sequence.copy()
    other[1, 1] = [1.0, 0.0]
    assert count_agreement(sequence, other) == (1, 2)
    assert count_agreement(np.array([1.0, 0.0]), np.array([2.0, 0.0])) == (1, 1)
    assert count_agreement(np.array(1.0), np.array(2.0)) == (0, 0)


def test_states_of_breaker_and_model(tmp_path: Path) -> None:
    async def scenario() -> None:
        spool = Spool(tmp_path / "spool")
        spool.dropped = 3
        breaker = Breaker(failures=1, first_wait_s=3600.0)
        async with serving(tmp_path, breaker=breaker) as agent, measured(agent, {MODEL: spool}) as address:
            samples = await scrape(address)
            assert value(samples, "isthmus_breaker_state", breaker="normal", state="closed") == 1
            assert value(samples, "isthmus_model_info", model=MODEL, version="1", variant="onnxruntime-fp32") == 1
            assert value(samples, "isthmus_model_threshold", model=MODEL) == bundles.THRESHOLD
            assert value(samples, "isthmus_captures_dropped_rows_total", model=MODEL) == 3
            assert value(samples, "process_resident_memory_bytes") > 1 << 20
            agent.cloud.behaviour = faulty_cloud.garbage
            await agent.infer(bundles.HARD)
            agent.models.swap(MODEL, None)
            samples = await scrape(address)
            assert value(samples, "isthmus_breaker_state", breaker="normal") == 1
            assert value(samples, "isthmus_breaker_state", breaker="normal", state="open") == 1
            assert value(samples, "isthmus_model_version", model=MODEL) == 0
            assert value(samples, "isthmus_model_info", model=MODEL) == 0

    asyncio.run(scenario())


def test_openmetrics_for_those_that_ask(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent, measured(agent) as address:
            await agent.infer(bundles.SURE)
            text, kind = await fetch(address, "application/openmetrics-text; version=1.0.0,text/plain;q=0.5")
            assert kind.startswith("application/openmetrics-text; version=1.0.0")
            parse: Any = openmetrics.text_string_to_metric_families
            names = {family.name for family in parse(text)}
            assert {"isthmus_requests", "isthmus_request_seconds", "isthmus_breaker_state"} <= names
            for accept in ("", "text/plain", "*/*", "application/openmetrics-text; version=nonsense"):
                text, kind = await fetch(address, accept)
                assert kind.startswith("text/plain")
                assert "isthmus_requests_total{" in text

    asyncio.run(scenario())


async def converse(address: str, sent: bytes) -> bytes:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /metrics/../etc/passwd HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"405"),
        (b"GET /metrics HTTP/1.1\r\nx: " + b"y" * (20 << 10) + b"\r\n\r\n", b"431"),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"405"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", b"200"),
        (b"GET /metrics?x=1 HTTP/1.0\r\nno colon\r\n\r\n", b"200"),
    ],
)
def test_what_is_no_scrape_is_refused(tmp_path: Path, sent: bytes, status: bytes) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent, measured(agent) as address:
            answer = await converse(address, sent)
            assert answer.startswith(b"HTTP/1.1 " + status)
            assert (await fetch(address))[0]

    asyncio.run(scenario())


def test_idle_connections_are_bounded(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent, measured(agent) as address:
            host, _, port = address.rpartition(":")
            idle = [await asyncio.open_connection(host, int(port)) for _ in range(16)]
            assert await converse(address, b"") == b""  # one more is closed at once
            for _, writer in idle:
                writer.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("address", ["0.0.0.0:9000", "192.168.1.7:9000", "[::]:9000"])
def test_metrics_stay_on_this_machine_unless_allowed(address: str) -> None:
    registry = agent_registry(AgentCollector("device-1", None, None, {}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="can be reached from other machines") as caught:
        MetricsServer(address, registry)
    assert "metrics_public" in caught.value.hint
    MetricsServer(address, registry, public=True)


def test_taken_port_is_a_configuration_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            server = MetricsServer(
                agent.address, agent_registry(AgentCollector("device-1", agent.models, agent.uplink, {}))
            )
            with pytest.raises(ConfigError, match="metrics_listen: cannot listen on"):
                await server.start()
            await server.stop()

    asyncio.run(scenario())
