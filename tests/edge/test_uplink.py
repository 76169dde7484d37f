"""Escalation against a cloud that fails in every way: the light answer comes in time, with the right reason."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from edge.access import AccessToken
from edge.breaker import Breaker
from edge.identity import DeviceHome, Enrolment
from edge.retry import QuotaPause, RetryBudget
from edge.uplink import Failure, Uplink, UplinkCounters, open_channel, watch_connection
from security.enrolment import new_device_key
from tests.edge import bundles, faulty_cloud
from tests.edge.faulty_cloud import Link
from tests.edge.serving import Serving, explanation, serving

DEADLINE_S = 0.6
OVERHEAD_S = 0.3  # two shared cores


def cause(told: dict[str, Any]) -> str:
    assert told["isthmus.route"] == "fallback"
    return "/".join(told[name] for name in ("isthmus.reason", "isthmus.detail") if name in told)


def patient_breaker() -> Breaker:
    return Breaker(failures=1000)


async def timed_infer(
    agent: Serving, deadline_s: float | None = DEADLINE_S, *, light: bool = True
) -> tuple[dict[str, Any], float]:
    started = time.monotonic()
    result = await agent.infer(bundles.HARD, client_timeout=deadline_s)
    elapsed = time.monotonic() - started
    if light:
        np.testing.assert_allclose(result.as_numpy("logits"), bundles.HARD @ bundles.weights(1), atol=1e-5)
    return explanation(result), elapsed


BAD, UNAVAILABLE = "bad-response", "unavailable"
STATUS = grpc.StatusCode
FAULTS: dict[str, tuple[Callable[..., Any], str, str | None]] = {
    "garbage": (faulty_cloud.garbage, BAD, "unparsable"),
    "empty": (faulty_cloud.empty, BAD, None),
    "not finite": (faulty_cloud.not_finite, BAD, None),
    "wrong shape": (faulty_cloud.wrong_shape, BAD, None),
    "wrong dtype": (faulty_cloud.wrong_dtype, BAD, None),
    "short bytes": (faulty_cloud.short_bytes, BAD, None),
    "an output twice": (faulty_cloud.twice, BAD, None),
    "unavailable": (faulty_cloud.refusing(STATUS.UNAVAILABLE), UNAVAILABLE, None),
    "internal": (faulty_cloud.refusing(STATUS.INTERNAL), UNAVAILABLE, "internal"),
    "unknown": (faulty_cloud.refusing(STATUS.UNKNOWN), UNAVAILABLE, "unknown"),
    "data loss": (faulty_cloud.refusing(STATUS.DATA_LOSS), UNAVAILABLE, "data-loss"),
    "aborted": (faulty_cloud.refusing(STATUS.ABORTED), UNAVAILABLE, "aborted"),
    "cancelled": (faulty_cloud.refusing(STATUS.CANCELLED), UNAVAILABLE, "cancelled"),
    "overloaded": (faulty_cloud.refusing(STATUS.RESOURCE_EXHAUSTED), "quota", None),
    "unauthenticated": (faulty_cloud.refusing(STATUS.UNAUTHENTICATED), "unauthenticated", None),
    "invalid": (faulty_cloud.refusing(STATUS.INVALID_ARGUMENT), "refused", "invalid-argument"),
    "not found": (faulty_cloud.refusing(STATUS.NOT_FOUND), "refused", "not-found"),
    "forbidden": (faulty_cloud.refusing(STATUS.PERMISSION_DENIED), "refused", "permission-denied"),
    "precondition": (faulty_cloud.refusing(STATUS.FAILED_PRECONDITION), "refused", "failed-precondition"),
    "out of range": (faulty_cloud.refusing(STATUS.OUT_OF_RANGE), "refused", "out-of-range"),
    "unimplemented": (faulty_cloud.refusing(STATUS.UNIMPLEMENTED), "refused", "unimplemented"),
    "says too late": (faulty_cloud.refusing(STATUS.DEADLINE_EXCEEDED), "deadline", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_gives_the_light_answer_and_its_reason(tmp_path: Path, fault: str) -> None:
    behaviour, reason, detail = FAULTS[fault]

    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            agent.cloud.behaviour = behaviour
            told, elapsed = await timed_infer(agent)
            assert (told["isthmus.route"], told["isthmus.reason"]) == ("fallback", reason)
            assert told.get("isthmus.detail") == detail
            assert elapsed < DEADLINE_S
            assert "isthmus.cloud_version" not in told

    asyncio.run(scenario())


@asynccontextmanager
async def linked(folder: Path, **changes: Any) -> AsyncIterator[tuple[Serving, faulty_cloud.FaultyCloud, Link]]:
    """An agent whose cloud is behind a link; both can be spoilt."""
    identity = faulty_cloud.make_identity(folder)
    async with (
        faulty_cloud.faulty_cloud(identity) as cloud,
        Link(cloud.address) as link,
        serving(folder, outside=(link.address, identity), **changes) as agent,
    ):
        await timed_warm_up(agent)
        yield agent, cloud, link


async def flap(link: Link) -> None:
    while True:
        await link.refuse()
        await asyncio.sleep(0.05)
        await link.heal()
        await asyncio.sleep(0.05)


SIX: dict[str, tuple[set[str], str]] = {  # reasons until the breaker opens, and its state after the fault
    "refuses": ({"unavailable"}, "open"),
    "black hole": ({"deadline"}, "open"),
    "stalls after headers": ({"deadline"}, "open"),
    "garbage": ({"bad-response"}, "open"),
    "errors": ({"unavailable"}, "open"),
    "flaps": ({"unavailable", "uncertain"}, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", SIX)
def test_cloud_that_fails_costs_no_answer_and_is_found_again(tmp_path: Path, fault: str) -> None:
    reasons, state = SIX[fault]

    async def scenario() -> None:
        breaker = Breaker(first_wait_s=60.0)  # nothing but a new connection, or the test, ends the wait
        async with linked(tmp_path, breaker=breaker, guard_s=0.25) as (agent, cloud, link):
            flapping = await spoil(fault, cloud, link)
            told = [await timed_infer(agent, DEADLINE_S, light=fault != "flaps") for _ in range(12)]
            assert all(elapsed < DEADLINE_S for _, elapsed in told)
            early = {answer["isthmus.reason"] for answer, _ in told[:3]}
            assert early <= reasons, early
            assert {answer["isthmus.reason"] for answer, _ in told[3:]} <= {"unavailable"} | reasons
            if state:
                assert agent.uplink.breaker.state == state
                assert sum(elapsed for _, elapsed in told[3:]) < 2 * DEADLINE_S, "then a dead cloud costs nothing"
            flapping.cancel()
            cloud.behaviour = faulty_cloud.right
            await link.heal()
            link.reset()  # the cloud restarts: a new connection is the evidence that it is back
            async with asyncio.timeout(5):
                while explanation(await agent.infer(bundles.HARD))["isthmus.route"] != "cloud":
                    await asyncio.sleep(0.01)
            assert agent.uplink.breaker.state == "closed"
            check_counters(agent)

    asyncio.run(scenario())


async def spoil(fault: str, cloud: faulty_cloud.FaultyCloud, link: Link) -> asyncio.Future[None]:
    if fault == "refuses":
        await link.refuse()
    elif fault == "black hole":
        link.black_hole()
    elif fault == "flaps":
        return asyncio.ensure_future(flap(link))
    else:
        cloud.behaviour = {
            "stalls after headers": faulty_cloud.stall_after_headers,
            "garbage": faulty_cloud.garbage,
            "errors": faulty_cloud.refusing(STATUS.INTERNAL),
        }[fault]
    return asyncio.ensure_future(asyncio.sleep(0))


def check_counters(agent: Serving) -> None:
    """Every request is counted once, here as an escalation and there as an answer."""
    counters, routes = agent.uplink.counters, agent.models.counters["triage"].routes
    assert counters.attempts == counters.successes + counters.failures + counters.cancelled
    assert counters.successes == routes["cloud"].answers
    assert counters.failures + counters.skipped == routes["fallback"].answers


@pytest.mark.slow
@pytest.mark.parametrize("deadline_s", [0.2, 0.6, None])
def test_black_hole_costs_the_deadline_less_the_guard(tmp_path: Path, deadline_s: float | None) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, breaker=patient_breaker()) as agent:
            await timed_warm_up(agent)
            agent.cloud.behaviour = faulty_cloud.black_hole
            told, elapsed = await timed_infer(agent, deadline_s)
            assert (told["isthmus.route"], told["isthmus.reason"]) == ("fallback", "deadline")
            limit_s = 1.0 if deadline_s is None else deadline_s
            assert limit_s - 0.1 < elapsed < limit_s + (OVERHEAD_S if deadline_s is None else 0)

    asyncio.run(scenario())


async def timed_warm_up(agent: Serving) -> None:
    assert explanation(await agent.infer(bundles.HARD))["isthmus.route"] == "cloud"


@pytest.mark.slow
def test_many_callers_of_a_black_hole_all_keep_their_deadlines(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, breaker=patient_breaker(), guard_s=0.15) as agent:
            await timed_warm_up(agent)
            agent.cloud.behaviour = faulty_cloud.black_hole
            answers = await asyncio.gather(*(timed_infer(agent, 0.5) for _ in range(30)))
            assert {told["isthmus.reason"] for told, _ in answers} == {"deadline"}

    asyncio.run(scenario())


@pytest.mark.slow
def test_after_three_failures_a_dead_cloud_costs_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            await timed_warm_up(agent)
            agent.cloud.behaviour = faulty_cloud.black_hole
            for _ in range(3):
                told, _ = await timed_infer(agent, 0.2)
                assert told["isthmus.reason"] == "deadline"
            tried = len(agent.cloud.requests)
            elapsed = []
            for _ in range(20):
                told, seconds = await timed_infer(agent)
                assert cause(told) == "unavailable/breaker-open"
                elapsed.append(seconds)
            assert sorted(elapsed)[10] < 0.05
            assert len(agent.cloud.requests) == tried
            assert agent.uplink.counters.skipped == 20

    asyncio.run(scenario())


def test_too_little_time_is_not_tried(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, guard_s=5.0) as agent:
            told, _ = await timed_infer(agent, 2.0)
            assert cause(told) == "deadline/no-time-left"
            assert agent.cloud.requests == []

    asyncio.run(scenario())


def test_without_a_token_nothing_is_sent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, token=None) as agent:
            told, _ = await timed_infer(agent)
            assert cause(told) == "unauthenticated/no-token"
            assert agent.cloud.requests == []

    asyncio.run(scenario())


def test_cloud_that_was_asked_for_and_is_not_there_is_an_honest_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            asked: dict[str, Any] = {"parameters": {"isthmus.route": "cloud"}, "client_timeout": DEADLINE_S}
            assert explanation(await agent.infer(bundles.SURE, **asked))["isthmus.route"] == "cloud"
            for behaviour, why in (
                (faulty_cloud.garbage, "bad-response (unparsable)"),
                (faulty_cloud.black_hole, "deadline"),
                (faulty_cloud.refusing(STATUS.UNAVAILABLE), "unavailable"),
                (faulty_cloud.right, "unavailable (breaker-open)"),
            ):
                agent.cloud.behaviour = behaviour
                started = time.monotonic()
                with pytest.raises(InferenceServerException) as caught:
                    await agent.infer(bundles.SURE, **asked)
                assert time.monotonic() - started < DEADLINE_S
                assert caught.value.status() == "StatusCode.UNAVAILABLE"
                wanted = "isthmus.route='cloud' was asked for, and there is no cloud answer: "
                assert caught.value.message() == wanted + why
            counted = agent.models.counters["triage"]
            assert (counted.errors, counted.routes["cloud"].answers, counted.routes["fallback"].answers) == (4, 1, 0)
            assert cause(explanation(await agent.infer(bundles.HARD))) == "unavailable/breaker-open"

    asyncio.run(scenario())


def test_refusals_do_not_open_the_breaker(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            agent.cloud.behaviour = faulty_cloud.refusing(grpc.StatusCode.INVALID_ARGUMENT)
            for _ in range(5):
                assert (await timed_infer(agent))[0]["isthmus.reason"] == "refused"
            assert agent.uplink.breaker.state == "closed"

    asyncio.run(scenario())


@pytest.mark.slow
def test_caller_that_goes_away_is_counted_and_frees_the_probe(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, breaker=Breaker(failures=1, first_wait_s=0.01)) as agent:
            agent.cloud.behaviour = faulty_cloud.garbage
            await timed_infer(agent)
            agent.cloud.behaviour = faulty_cloud.black_hole
            await asyncio.to_thread(wait_until, lambda: agent.uplink.breaker.state == "half-open")
            call = asyncio.ensure_future(agent.infer(bundles.HARD, client_timeout=30))
            while len(agent.cloud.requests) < 2:
                await asyncio.sleep(0.01)
            call.cancel()
            agent.cloud.behaviour = faulty_cloud.right
            for _ in range(200):
                told = explanation(await agent.infer(bundles.HARD))
                if told["isthmus.route"] == "cloud":
                    break
                await asyncio.sleep(0.01)
            assert told["isthmus.route"] == "cloud"
            check_counters(agent)
            assert agent.uplink.counters.cancelled == 1
            assert agent.models.counters["triage"].errors == 1

    asyncio.run(scenario())


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


async def ask(uplink: Uplink, remaining_s: float = 0.5) -> str:
    outcome = await uplink.escalate(b"", remaining_s=remaining_s, check=lambda response: None)
    if isinstance(outcome, Failure):
        return f"{outcome.reason}/{outcome.detail}" if outcome.detail else outcome.reason
    return "answered"


def make_uplink(channel: grpc.aio.Channel, breaker: Breaker | None = None) -> Uplink:
    return Uplink(channel, lambda: "token", breaker or patient_breaker(), Breaker(), guard_s=0.05, longest_s=10)


def test_refused_connection_is_known_and_costs_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
            address = f"localhost:{unused.getsockname()[1]}"
            async with open_channel(address, faulty_cloud.make_identity(tmp_path).ca) as channel:
                uplink = make_uplink(channel, Breaker())
                started = time.monotonic()
                assert [await ask(uplink, 30.0) for _ in range(5)] == ["unavailable/no-connection"] * 5
                assert time.monotonic() - started < 10  # of the 30 s that each may take
                assert uplink.breaker.state == "open"
                counters = uplink.counters
                assert (counters.attempts, counters.failures, counters.skipped, counters.retries) == (1, 1, 4, 0)

    asyncio.run(scenario())


@pytest.mark.slow
def test_peer_that_accepts_and_says_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"localhost:{silent.getsockname()[1]}"
            async with open_channel(address, faulty_cloud.make_identity(tmp_path).ca) as channel:
                started = time.monotonic()
                assert await ask(make_uplink(channel)) == "deadline"
                assert time.monotonic() - started < 5

    asyncio.run(scenario())


def test_hurried_callers_do_not_open_the_breaker_of_others(tmp_path: Path) -> None:
    async def slow(raw: bytes, context: Any) -> bytes:
        await asyncio.sleep(0.15)
        return b""

    async def scenario() -> None:
        identity = faulty_cloud.make_identity(tmp_path)
        async with faulty_cloud.faulty_cloud(identity) as cloud, open_channel(cloud.address, identity.ca) as channel:
            uplink = make_uplink(channel, Breaker())
            cloud.behaviour = slow
            told = [await ask(uplink, 0.1) for _ in range(5)]
            assert told == ["deadline"] * 3 + ["deadline/hurried"] * 2  # they do spare themselves
            assert await ask(uplink, 5.0) == "answered"
            assert (uplink.breaker.state, uplink.hurried_breaker.state) == ("closed", "open")

    asyncio.run(scenario())


def test_hurry_is_measured_by_the_pace_of_the_cloud(tmp_path: Path) -> None:
    now = [0.0]

    async def behaviour(raw: bytes, context: Any) -> bytes:
        now[0] += 3.0  # by the uplink's own clock, an answer takes three seconds
        return b""

    async def scenario() -> None:
        identity = faulty_cloud.make_identity(tmp_path)
        async with faulty_cloud.faulty_cloud(identity) as cloud, open_channel(cloud.address, identity.ca) as channel:
            uplink = Uplink(
                channel, lambda: "token", Breaker(), Breaker(), guard_s=0.05, longest_s=10, clock=lambda: now[0]
            )
            cloud.behaviour = behaviour
            assert await ask(uplink, 9.0) == "answered"
            cloud.behaviour = faulty_cloud.garbage
            for _ in range(3):
                assert await ask(uplink, 5.0) == "bad-response/unparsable"
            assert (uplink.breaker.state, uplink.hurried_breaker.state) == ("closed", "open")
            for _ in range(3):
                assert await ask(uplink, 9.0) == "bad-response/unparsable"
            assert uplink.breaker.state == "open"

    asyncio.run(scenario())


def test_connection_ends_the_wait_of_both_breakers(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_channel("localhost:1", faulty_cloud.make_identity(tmp_path).ca) as channel:
            uplink = Uplink(
                channel, lambda: "token", Breaker(failures=1), Breaker(failures=1), guard_s=0.05, longest_s=10
            )
            for breaker in (uplink.breaker, uplink.hurried_breaker):
                ticket = breaker.admit()
                assert ticket is not None
                breaker.fail(ticket)
                assert breaker.state == "open"
            uplink.nudge()
            assert (uplink.breaker.state, uplink.hurried_breaker.state) == ("half-open", "half-open")

    asyncio.run(scenario())


def test_nothing_on_the_way_up_takes_the_light_answer_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        identity = faulty_cloud.make_identity(tmp_path)
        async with faulty_cloud.faulty_cloud(identity) as cloud, open_channel(cloud.address, identity.ca) as channel:
            cloud.behaviour = faulty_cloud.empty
            uplink = make_uplink(channel)

            def check(response: Any) -> None:
                raise ValueError("a defect of ours")

            outcome = await uplink.escalate(b"", remaining_s=5.0, check=check)
            assert outcome == Failure("unavailable", "agent-error")
            unprintable = Uplink(channel, lambda: "to\nken", Breaker(), Breaker(), guard_s=0.05, longest_s=10)
            assert await ask(unprintable) == "unavailable/agent-error"
            assert uplink.counters.attempts == uplink.counters.failures == 1

    asyncio.run(scenario())


def test_peer_that_resets_connections(tmp_path: Path) -> None:
    async def scenario() -> None:
        async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            raw = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            writer.transport.abort()

        server = await asyncio.start_server(reset, "127.0.0.1", 0)
        async with server:
            address = f"localhost:{server.sockets[0].getsockname()[1]}"
            async with open_channel(address, faulty_cloud.make_identity(tmp_path).ca) as channel:
                assert await ask(make_uplink(channel)) == "unavailable/no-connection"

    asyncio.run(scenario())


def test_cloud_with_another_authority_is_not_talked_to(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "other").mkdir()
        ours, other = faulty_cloud.make_identity(tmp_path), faulty_cloud.make_identity(tmp_path / "other")
        async with faulty_cloud.faulty_cloud(other) as cloud, open_channel(cloud.address, ours.ca) as channel:
            assert await ask(make_uplink(channel)) == "unavailable/no-connection"
            assert cloud.requests == []

    asyncio.run(scenario())


def test_token_that_is_not_accepted_is_renewed(tmp_path: Path) -> None:
    async def scenario() -> None:
        identity = faulty_cloud.make_identity(tmp_path)
        renewals = []
        async with faulty_cloud.faulty_cloud(identity) as cloud, open_channel(cloud.address, identity.ca) as channel:
            cloud.behaviour = faulty_cloud.refusing(grpc.StatusCode.UNAUTHENTICATED)
            uplink = Uplink(
                channel,
                lambda: "token",
                patient_breaker(),
                Breaker(),
                guard_s=0.05,
                longest_s=10,
                unauthenticated=lambda: renewals.append(1),
            )
            assert await ask(uplink, 5.0) == "unauthenticated"
            assert renewals == [1]

    asyncio.run(scenario())


@pytest.mark.slow
def test_cloud_that_comes_back_is_used_within_two_seconds(tmp_path: Path) -> None:
    async def scenario() -> None:
        identity = faulty_cloud.make_identity(tmp_path)
        async with faulty_cloud.faulty_cloud(identity) as cloud:
            port = int(cloud.address.rpartition(":")[2])
        breaker = Breaker(first_wait_s=30.0)  # only the nudge of the connection can be that quick
        async with open_channel(cloud.address, identity.ca) as channel:
            uplink = make_uplink(channel, breaker)
            watching = asyncio.ensure_future(watch_connection(channel, breaker.nudge))
            while breaker.state == "closed":
                await ask(uplink)
            assert await ask(uplink) == "unavailable/no-connection"
            async with faulty_cloud.faulty_cloud(identity, port=port) as back:
                started = time.monotonic()
                while breaker.state == "open":
                    await asyncio.sleep(0.01)
                back.behaviour = faulty_cloud.empty
                assert await ask(uplink) == "answered"
                assert time.monotonic() - started < 10
            watching.cancel()

    asyncio.run(scenario())


def test_deadline_that_the_light_model_alone_misses_is_the_callers(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            with pytest.raises(InferenceServerException) as caught:
                await agent.infer(bundles.HARD, client_timeout=1e-6)
            assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("hints", "waited_s"),
    [
        ((), 1.0),
        ((("grpc-retry-pushback-ms", "7000"),), 7.0),
        ((("retry-after", "5"),), 5.0),
        ((("retry-after", "x"),), 1.0),
    ],
)
def test_used_up_quota_is_left_alone_as_long_as_the_cloud_asks(
    tmp_path: Path, hints: tuple[tuple[str, str], ...], waited_s: float
) -> None:
    now = [0.0]

    async def scenario() -> None:
        identity = faulty_cloud.make_identity(tmp_path)
        async with faulty_cloud.faulty_cloud(identity) as cloud, open_channel(cloud.address, identity.ca) as channel:
            quota = QuotaPause(first_s=1.0, clock=lambda: now[0], jitter=lambda: 0.0)
            uplink = Uplink(
                channel, lambda: "token", Breaker(failures=1), Breaker(), guard_s=0.05, longest_s=10, quota=quota
            )
            cloud.behaviour = faulty_cloud.refusing(STATUS.RESOURCE_EXHAUSTED, *hints)
            assert [await ask(uplink, 5.0) for _ in range(3)] == ["quota", "quota/backing-off", "quota/backing-off"]
            uplink.nudge()  # a new connection is no new quota
            now[0] += waited_s - 0.01
            assert await ask(uplink, 5.0) == "quota/backing-off"
            now[0] += 0.02
            cloud.behaviour = faulty_cloud.empty
            assert await ask(uplink, 5.0) == "answered"
            assert (len(cloud.requests), uplink.breaker.state) == (2, "closed")
            counters = uplink.counters
            assert (counters.attempts, counters.successes, counters.failures, counters.skipped) == (2, 1, 1, 3)

    asyncio.run(scenario())


def test_request_that_is_too_large_for_the_cloud_is_no_matter_of_quota(tmp_path: Path) -> None:
    async def scenario() -> None:
        identity = faulty_cloud.make_identity(tmp_path)
        async with (
            faulty_cloud.faulty_cloud(identity) as cloud,
            open_channel(cloud.address, identity.ca, message_bytes=8 << 20) as channel,
        ):
            uplink = make_uplink(channel)
            for mebibytes in (6, 9):  # above the limit of the cloud; of both
                outcome = await uplink.escalate(bytes(mebibytes << 20), remaining_s=5.0, check=lambda response: None)
                assert outcome == Failure("refused", "too-large")
            cloud.behaviour = faulty_cloud.empty
            assert await ask(uplink, 5.0) == "answered"

    asyncio.run(scenario())


def test_call_whose_connection_breaks_is_sent_once_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        identity = faulty_cloud.make_identity(tmp_path)
        async with (
            faulty_cloud.faulty_cloud(identity) as cloud,
            Link(cloud.address) as link,
            open_channel(link.address, identity.ca) as channel,
        ):

            async def broken(raw: bytes, context: Any) -> bytes:
                if len(cloud.requests) <= breaks[0]:
                    link.reset()
                    await asyncio.sleep(faulty_cloud.NEVER)
                return b""

            breaks = [1]
            cloud.behaviour = broken
            budget = RetryBudget(ratio=0.0, burst=2.0)
            uplink = Uplink(
                channel, lambda: "token", patient_breaker(), Breaker(), guard_s=0.05, longest_s=10, retries=budget
            )
            assert await ask(uplink, 5.0) == "answered"
            breaks[0] = 100
            assert [await ask(uplink, 5.0) for _ in range(2)] == ["unavailable/connection-lost"] * 2
            counters = uplink.counters
            assert (counters.attempts, counters.retries) == (3, 2), "one retry a call, and none beyond the budget"
            assert (counters.successes, counters.failures, counters.lost) == (1, 2, 4)
            assert len(cloud.requests) <= counters.attempts + counters.retries

    asyncio.run(scenario())


@pytest.mark.parametrize("code", [STATUS.UNAVAILABLE, STATUS.INTERNAL, STATUS.RESOURCE_EXHAUSTED, STATUS.NOT_FOUND])
def test_what_the_cloud_says_is_never_asked_twice(tmp_path: Path, code: grpc.StatusCode) -> None:
    async def scenario() -> None:
        identity = faulty_cloud.make_identity(tmp_path)
        async with faulty_cloud.faulty_cloud(identity) as cloud, open_channel(cloud.address, identity.ca) as channel:
            uplink = make_uplink(channel)
            cloud.behaviour = faulty_cloud.refusing(code)
            await ask(uplink, 5.0)
            assert (len(cloud.requests), uplink.counters.retries) == (1, 0)

    asyncio.run(scenario())


def test_closed_channel_is_only_one_more_way_to_fail(tmp_path: Path) -> None:
    async def scenario() -> None:
        channel = open_channel("localhost:1", faulty_cloud.make_identity(tmp_path).ca)
        await channel.close()
        assert await ask(make_uplink(channel)) == "unavailable/agent-error"

    asyncio.run(scenario())


def test_no_request_waits_for_a_token(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:  # tokens never come
            address = f"localhost:{silent.getsockname()[1]}"
            home = DeviceHome(tmp_path)
            new_device_key(home.key)
            enrolment = Enrolment(device_id="kiosk-1", cloud=address, token_issuer="cloud", token_audience="isthmus")
            identity = faulty_cloud.make_identity(tmp_path)
            async with (
                faulty_cloud.faulty_cloud(identity) as cloud,
                open_channel(address, identity.ca) as no_tokens,
                open_channel(cloud.address, identity.ca) as channel,
            ):
                cloud.behaviour = faulty_cloud.empty
                token = AccessToken(home, enrolment, no_tokens)
                renewing = asyncio.ensure_future(token.keep())
                uplink = Uplink(channel, token.current, Breaker(), Breaker(), guard_s=0.05, longest_s=10)
                started = time.monotonic()
                assert [await ask(uplink, 30.0) for _ in range(20)] == ["unauthenticated/no-token"] * 20
                assert time.monotonic() - started < 10  # of the 30 s that each may take
                assert not renewing.done()
                assert (cloud.requests, uplink.breaker.state) == ([], "closed")
                renewing.cancel()

    asyncio.run(scenario())


@pytest.mark.slow
def test_killed_gateway_is_found_again_and_all_counts_reconcile(tmp_path: Path) -> None:
    identity, log = faulty_cloud.make_identity(tmp_path), tmp_path / "received.log"

    async def gateway(port: int) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.edge.faulty_cloud", str(tmp_path), str(port), str(log), stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        ports.append(int((await process.stdout.readline()).rpartition(b":")[2]))
        return process

    async def worker(agent: Serving, number: int) -> None:
        while not stop.is_set():
            request = f"{number}-{len(told)}"
            told[request] = explanation(await agent.infer(bundles.HARD, request_id=request, client_timeout=2.0))

    async def answered_by_the_cloud() -> None:
        before = list(told)
        async with asyncio.timeout(20):
            while not any(told[request]["isthmus.route"] == "cloud" for request in list(told)[len(before) :]):
                await asyncio.sleep(0.01)

    ports: list[int] = []
    told: dict[str, dict[str, Any]] = {}
    stop = asyncio.Event()

    async def scenario() -> None:
        process = await gateway(0)
        async with serving(tmp_path, outside=(f"localhost:{ports[0]}", identity)) as agent:
            workers = [asyncio.ensure_future(worker(agent, number)) for number in range(4)]
            for _ in range(2):
                await answered_by_the_cloud()
                process.kill()
                await process.wait()
                async with asyncio.timeout(20):
                    while agent.uplink.breaker.state == "closed":
                        await asyncio.sleep(0.01)
                process = await gateway(ports[0])
                await answered_by_the_cloud()
            stop.set()
            await asyncio.gather(*workers)
            process.kill()
            await process.wait()
            check_counters(agent)
            reconcile(agent.uplink.counters)

    def reconcile(counters: UplinkCounters) -> None:
        received = Counter(log.read_text().split())
        by_cloud = {request for request, how in told.items() if how["isthmus.route"] == "cloud"}
        reasons = {how["isthmus.reason"] for request, how in told.items() if request not in by_cloud}
        assert reasons == {"unavailable"}
        assert by_cloud <= received.keys() <= told.keys(), "no answer without a request, no request that nobody made"
        assert max(received.values()) <= 2
        # Each call was answered or lost; the gateway has received those answered, and of those lost what its log says.
        assert counters.attempts + counters.retries == counters.successes + counters.lost
        assert 0 <= received.total() - counters.successes <= counters.lost

    asyncio.run(scenario())
