"""Which version answers: pure decisions, their shares and their limits."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.balance import RetryBudget, least_loaded, next_probe_s
from cloud.traffic import NO_POLICY, Policy, changed, describe, key_of, policy_from, rolled_back, sticky_point
from isthmus.errors import InputError
from isthmus.v1 import traffic_pb2 as pb


def canary(*shares: tuple[int, float], sticky: bool = False) -> pb.SetTrafficRequest:
    kind = pb.ASSIGNMENT_STICKY if sticky else pb.ASSIGNMENT_RANDOM
    split = pb.Split(assignment=kind, shares=[pb.Share(version=v, share=s) for v, s in shares])
    return pb.SetTrafficRequest(model="triage", split=split)


def test_a_canary_gets_its_share_and_the_release_the_rest() -> None:
    policy = Policy(shares=((7, 0.05), (8, 0.2)))
    drawn = Counter(policy.assign(point / 1000) for point in range(1000))
    assert drawn == {(7, "canary"): 50, (8, "canary"): 200, (None, "released"): 750}
    assert NO_POLICY.assign(0.0) == (None, "released")
    assert Policy(shares=((7, 1.0),)).assign(1 - 2**-53) == (7, "canary")


def test_a_sticky_share_that_grows_keeps_who_had_it() -> None:
    keys = [f"device-{number}" for number in range(20_000)]
    had: set[str] = set()
    for share in (0.05, 0.5, 1.0):
        policy = Policy(sticky=True, shares=((7, share),))
        has = {key for key in keys if policy.assign(sticky_point("triage", key))[0] == 7}
        assert had <= has
        assert abs(len(has) - share * len(keys)) <= 4 * math.sqrt(len(keys) * share * (1 - share))
        had = has


def test_a_sticky_assignment_differs_between_models_and_goes_by_the_parameter_where_it_is_sent() -> None:
    assert sticky_point("triage", "a") != sticky_point("other", "a")
    policy = Policy(sticky=True, key_parameter="meter")
    assert key_of(policy, "me", {"meter": "m-1"}) == key_of(policy, "you", {"meter": "m-1"})
    assert key_of(policy, "me", {}) != key_of(policy, "you", {})
    assert key_of(policy, "m-1", {}) != key_of(policy, "you", {"meter": "m-1"})


def test_a_change_replaces_what_it_names_only() -> None:
    policy = changed(pb.TrafficPolicy(), canary((7, 0.05)))
    policy = changed(policy, pb.SetTrafficRequest(model="triage", shadow=pb.Shadow(version=8, share=1)))
    policy = changed(policy, pb.SetTrafficRequest(model="triage", cache_s=30))
    assert describe(policy) == "canary 7=0.05; shadow 8=1; cache 30 s"
    assert policy_from(policy).versions == {7, 8}
    policy = changed(policy, pb.SetTrafficRequest(model="triage", shadow=pb.Shadow()))
    assert describe(policy) == "canary 7=0.05; cache 30 s"
    back = rolled_back(policy)
    assert describe(back) == "cache 30 s"
    assert policy_from(back) == Policy(cache_s=30)


@pytest.mark.parametrize(
    "request_",
    [
        canary((7, 0.6), (8, 0.6)), canary((7, 0.1), (7, 0.1)), canary((7, -0.1)), canary((7, math.nan)),
        canary((0, 0.1)), canary((2**60, 0.1)), canary(*((n, 0.01) for n in range(1, 12))),
        pb.SetTrafficRequest(model="triage", split=pb.Split(shares=[pb.Share(version=7, share=0.1)])),
        pb.SetTrafficRequest(model="triage", shadow=pb.Shadow(version=7, share=2)),
        pb.SetTrafficRequest(model="triage", shadow=pb.Shadow(version=7, share=1, most_at_once=1000)),
        pb.SetTrafficRequest(model="triage", cache_s=10**7),
    ],
)  # fmt: skip
def test_what_is_no_policy_is_refused(request_: pb.SetTrafficRequest) -> None:
    with pytest.raises(InputError):
        changed(pb.TrafficPolicy(), request_)


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=6), turn=st.integers(0, 1000))
def test_the_least_loaded_answers_and_equals_take_turns(counts: list[int], turn: int) -> None:
    chosen = least_loaded(counts, turn)
    assert counts[chosen] == min(counts)
    equals = counts.count(min(counts))
    assert len({least_loaded(counts, turn + step) for step in range(equals)}) == equals


def test_retries_are_a_tenth_of_the_requests_at_most() -> None:
    budget = RetryBudget(most=10)
    assert sum(budget.take() for _ in range(100)) == 10
    taken = 0
    for _ in range(1000):
        budget.note_request()
        taken += budget.take()
    assert 90 <= taken <= 100


def test_a_replica_that_stays_away_is_looked_at_ever_more_seldom() -> None:
    waits = [next_probe_s(failures, first_s=0.1, most_s=5.0) for failures in range(1, 12)]
    assert waits == sorted(waits)
    assert waits[0] == 0.2
    assert waits[-1] == next_probe_s(10**6, first_s=0.1, most_s=5.0) == 5.0
