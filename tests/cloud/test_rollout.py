"""The decisions of rollouts: what must hold in every order of events, and the cases that people ask about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud import rollout as rules
from cloud.rollout import Action, Candidate, DeviceState, Evidence, Failure, Gates, Heard, Plan, Progress, Stage, State
from isthmus.errors import InputError

STAGES = (Stage(share=0.01), Stage(share=0.1), Stage(share=0.5), Stage(share=1.0))
QUICK = tuple(replace(stage, soak_s=0) for stage in STAGES)
PLAN = Plan("triage-2-1", "triage", 2, QUICK)


def names(count: int) -> list[str]:
    return [f"device-{number}" for number in range(count)]


def silent(count: int, *, online: bool = True) -> list[Candidate]:
    return [Candidate(name, online) for name in names(count)]


def good(device: Candidate, since: float = 0.0, **evidence: Any) -> Candidate:
    heard = Heard(2, DeviceState.ACTIVE, 2, rollout=PLAN.id, serving_since=since, evidence=Evidence(**evidence))
    return replace(device, heard=heard)


def bad(device: Candidate, reason: str = "self-test-failed") -> Candidate:
    heard = Heard(2, DeviceState.REFUSED, 1, reason=reason, rollout=PLAN.id)
    return replace(device, heard=heard, failure=Failure(PLAN.id, 0, reason))


def cohort_of(progress: Progress, devices: list[Candidate], plan: Plan = PLAN) -> list[str]:
    return [device.id for device in devices if rules.tells(plan, progress, device.id, device.heard)]


def in_order(devices: list[Candidate], plan: Plan = PLAN) -> list[Candidate]:
    return sorted(devices, key=lambda device: rules.position(plan.id, device.id))


def run(plan: Plan, devices: list[Candidate], outcome: Any, now: float = 0.0) -> list[tuple[Action, str, int]]:
    """Let every device that is told do as `outcome` says at once, until the rollout waits or is over."""
    progress, steps = rules.begin(plan, devices, now), []
    for _ in range(20):
        told = set(cohort_of(progress, devices, plan))
        devices = [outcome(device) if device.id in told else device for device in devices]
        decision = rules.decide(plan, progress, devices, now)
        steps.append((decision.action, decision.reason, len(told)))
        if decision.action is Action.WAIT:
            break
        progress = rules.advance(progress, decision, now)
    return steps


def test_stages_are_the_shares_that_were_asked_for_and_each_contains_the_one_before() -> None:
    steps = run(PLAN, silent(2000), good)
    assert [(action, size) for action, _, size in steps[:4]] == [
        (Action.PROMOTE, 20), (Action.PROMOTE, 200), (Action.PROMOTE, 1000), (Action.COMPLETE, 2000),
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_small_fleets_have_one_device_in_the_first_stage(count: int) -> None:
    steps = run(PLAN, silent(count), good)
    assert steps[0][2] == 1
    assert steps[3] == (Action.COMPLETE, "all-stages-done", count)


def test_one_crashed_device_of_two_thousand_stops_nothing() -> None:
    for crashed in in_order(silent(2000))[:3] + in_order(silent(2000))[-1:]:
        steps = run(PLAN, silent(2000), lambda d, c=crashed: bad(d) if d.id == c.id else good(d))
        assert steps[3][0] is Action.COMPLETE


def test_three_failures_among_the_first_five_stop_it_before_the_stage_ends() -> None:
    devices = in_order(silent(2000))
    progress = rules.begin(PLAN, devices, 0.0)
    devices[:5] = [bad(d) for d in devices[:3]] + [good(d) for d in devices[3:5]]
    decision = rules.decide(PLAN, progress, devices, 1.0)
    assert (decision.action, decision.reason) == (Action.ABORT, "gate-failures")
    assert "3 of 5 devices" in decision.detail
    assert "self-test-failed: 3" in decision.detail
    devices[1:3] = [good(replace(d, failure=None)) for d in devices[1:3]]
    assert rules.decide(PLAN, progress, devices, 1.0).action is Action.WAIT  # one of five may be the device


@pytest.mark.parametrize(
    ("failed", "tried", "stops"),
    [(1, 1, True), (1, 4, True), (1, 5, False), (1, 20, False), (2, 20, True), (2, 40, False)],
)
def test_a_stage_with_too_many_failures_does_not_end_well(failed: int, tried: int, stops: bool) -> None:
    plan = replace(PLAN, stages=(Stage(count=tried, soak_s=0), Stage(share=1.0, soak_s=0)))
    devices = in_order(silent(400))
    progress = rules.begin(plan, devices, 0.0)
    devices[:tried] = [bad(d) for d in devices[:failed]] + [good(d) for d in devices[failed:tried]]
    expected = Action.ABORT if stops else Action.PROMOTE
    assert rules.decide(plan, progress, devices, 1.0).action is expected


def test_a_number_of_failures_may_be_the_limit() -> None:
    plan = replace(PLAN, gates=Gates(max_failures=1))
    devices = in_order(silent(2000))
    progress = rules.begin(plan, devices, 0.0)
    devices[0] = bad(devices[0])
    assert rules.decide(plan, progress, devices, 1.0).action is Action.ABORT


def test_devices_that_are_away_hold_nothing_up() -> None:
    devices = in_order(silent(100))
    plan = replace(PLAN, stages=(Stage(count=20, soak_s=0), Stage(share=1.0, soak_s=0)))
    progress = rules.begin(plan, devices, 0.0)
    devices[:20] = [good(d) for d in devices[:12]] + [replace(d, online=False) for d in devices[12:20]]
    assert rules.decide(plan, progress, devices, 1.0).reason == "stage-done"
    devices[:12] = [good(devices[0]), *(Candidate(d.id, online=False) for d in devices[1:12])]
    waits = rules.decide(plan, progress, devices, 1.0)  # one device of twenty is no evidence, until the time is up
    assert (waits.action, waits.detail) == (Action.WAIT, "1 of 20 devices are past their soak; half of them must be")
    assert rules.decide(plan, progress, devices, 86400.0).reason == "time-up"


def test_a_stage_whose_time_is_up_without_any_evidence_pauses() -> None:
    devices = silent(10, online=False)
    decision = rules.decide(PLAN, rules.begin(PLAN, devices, 0.0), devices, 86400.0)
    assert (decision.action, decision.reason) == (Action.PAUSE, "no-evidence")


def test_a_device_is_done_when_it_has_soaked() -> None:
    plan = replace(PLAN, stages=tuple(replace(stage, soak_s=600) for stage in STAGES))
    device = Candidate("device-1", online=True)
    progress = rules.begin(plan, [device], 0.0)

    def outcome(candidate: Candidate, now: float) -> str:
        return str(rules.outcome_of(plan, progress, candidate, now)[0])

    assert outcome(device, 100.0) == "waiting"
    assert outcome(good(device, since=100.0), 699.0) == "soaking"
    assert outcome(good(device, since=100.0), 700.0) == "done"
    assert (
        outcome(good(device, since=699.0, seconds=600.0), 700.0) == "done"
    )  # it was away, and says how long it served


@pytest.mark.parametrize(
    ("evidence", "gates", "reason"),
    [
        ({"requests": 1000, "errors": 100}, Gates(), "error-rate"),
        ({"requests": 1000, "errors": 21}, Gates(), ""),  # may be chance
        ({"requests": 50, "errors": 50}, Gates(), ""),  # too few
        ({"audited": 500, "disagreed": 100}, Gates(min_agreement=0.9), "agreement"),
        ({"audited": 500, "disagreed": 100}, Gates(), ""),
    ],
)
def test_a_devices_own_figures_may_fail_it(evidence: dict[str, Any], gates: Gates, reason: str) -> None:
    plan = replace(PLAN, gates=gates)
    device = good(Candidate("device-1", online=True), **evidence)
    outcome, why = rules.outcome_of(plan, rules.begin(plan, [device], 0.0), device, 1.0)
    assert (str(outcome), why) == (("failed", reason) if reason else ("done", ""))


def test_a_harm_too_small_for_each_device_is_found_in_all_of_them() -> None:
    devices = in_order(silent(2000))
    progress = rules.begin(PLAN, devices, 0.0)
    devices[:20] = [good(d, requests=90, errors=8) for d in devices[:20]]
    decision = rules.decide(PLAN, progress, devices, 1.0)
    assert (decision.action, decision.reason) == (Action.ABORT, "gate-error-rate")


@pytest.mark.parametrize("state", [State.ACTIVE, State.PAUSED])
def test_a_version_that_is_taken_back_stops_its_rollout(state: State) -> None:
    devices = in_order(silent(10))
    progress = replace(rules.begin(PLAN, devices, 0.0), state=state)
    decision = rules.decide(PLAN, progress, devices, 1.0, "it leaks")
    assert (decision.action, decision.reason, decision.detail) == (Action.ABORT, "withdrawn", "it leaks")
    over = replace(progress, state=State.COMPLETED)
    assert rules.decide(PLAN, over, devices, 1.0, "it leaks").action is Action.WAIT


def test_trying_again_forgets_the_failure_and_another_report_does_not_hide_it() -> None:
    plan = replace(PLAN, stages=(Stage(count=1, soak_s=0), Stage(share=1.0, soak_s=0)))
    device = replace(bad(Candidate("device-1", online=True)), heard=Heard(1, DeviceState.ACTIVE, 1))
    progress = rules.begin(plan, [device], 0.0)
    assert str(rules.outcome_of(plan, progress, device, 1.0)[0]) == "failed"
    assert str(rules.outcome_of(plan, progress, replace(device, attempt=1), 1.0)[0]) == "waiting"
    assert rules.decide(plan, replace(progress, state=State.PAUSED), [device], 1.0).action is Action.WAIT


@pytest.mark.parametrize(
    ("stages", "gates"),
    [
        ((), Gates()),
        ((Stage(share=0.5),), Gates()),
        ((Stage(share=0.5), Stage(share=0.5), Stage(share=1.0)), Gates()),
        ((Stage(share=1.0), Stage(share=1.0)), Gates()),
        ((Stage(share=0.1, count=3), Stage(share=1.0)), Gates()),
        ((Stage(), Stage(share=1.0)), Gates()),
        ((Stage(share=float("nan")), Stage(share=1.0)), Gates()),
        ((Stage(share=1.0),), Gates(confidence=0.2)),
        ((Stage(share=1.0),), Gates(max_error_rate=float("nan"))),
        ((Stage(share=1.0, soak_s=7200),), Gates(stage_limit_s=3600)),
    ],
)
def test_plans_that_cannot_be_are_refused(stages: tuple[Stage, ...], gates: Gates) -> None:
    with pytest.raises(InputError):
        rules.check_plan(stages, gates)


def test_the_exact_bound_agrees_with_a_table() -> None:
    assert rules.binomial_tail(3, 5, 0.05) == pytest.approx(0.001158125)
    assert rules.binomial_tail(1, 2000, 0.05) == pytest.approx(1.0)
    assert rules.binomial_tail(0, 5, 0.05) == 1.0
    assert rules.binomial_tail(5, 5, 0.5) == pytest.approx(1 / 32)


# -- invariants under any order of events -------------------------------------------------------------------------

_EVENTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["good", "bad", "soaking", "leave", "join", "retry"]), st.integers(0, 30)),
        st.tuples(st.sampled_from(["wait"]), st.sampled_from([1, 600, 50_000, 90_000])),
        st.tuples(st.sampled_from(["pause", "resume", "abort", "new", "withdraw"]), st.just(0)),
    ),
    max_size=60,
)
_PLANS = st.builds(
    Plan,
    id=st.sampled_from(["triage-2-1", "triage-2-2", "other-9-1"]),
    model=st.just("triage"),
    version=st.just(2),
    stages=st.sampled_from([
        QUICK, STAGES, (Stage(share=1.0, soak_s=0),), (Stage(count=3, soak_s=0), Stage(share=0.6), Stage(share=1.0)),
    ]),
    gates=st.sampled_from([Gates(), Gates(max_failures=2), Gates(max_failure_rate=1.0), Gates(max_failure_rate=0.0)]),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(plan=_PLANS, size=st.integers(1, 40), events=_EVENTS)
def test_invariants_hold_in_every_order_of_events(  # noqa: C901 - a machine with a step for each event
    plan: Plan, size: int, events: list[tuple[str, int]]
) -> None:
    devices = {name: Candidate(name, online=True) for name in names(size)}
    now = 1000.0
    progress = rules.begin(plan, list(devices.values()), now)
    was_aborted, withdrawn = False, ""
    for kind, value in events:
        name = names(size)[value % size]
        device = devices[name]
        told = rules.tells(plan, progress, name, device.heard)
        match kind:
            case "good" | "soaking" if told:
                state = DeviceState.ACTIVE if kind == "good" else DeviceState.SOAKING
                heard = Heard(2, state, 2, rollout=plan.id, attempt=device.attempt, serving_since=now)
                devices[name] = replace(device, heard=heard, failure=None)
            case "bad" if told:
                devices[name] = replace(device, failure=Failure(plan.id, device.attempt, "self-test-failed"))
            case "leave" | "join":
                devices[name] = replace(device, online=kind == "join")
            case "retry":
                devices[name] = replace(device, attempt=device.attempt + 1)
            case "new":
                devices[f"new-{len(devices)}"] = Candidate(f"new-{len(devices)}", online=True)
            case "wait":
                now += value
            case "withdraw":
                withdrawn = "it leaks"
            case "pause" | "resume" | "abort" if progress.state.is_open:
                state_of = {"pause": State.PAUSED, "resume": State.ACTIVE, "abort": State.ABORTED}
                progress = replace(progress, state=state_of[kind])
        before = progress
        decision = rules.decide(plan, progress, list(devices.values()), now, withdrawn)
        # A restart, or a replica, that knows the same decides the same, in whatever order it lists the devices.
        again = rules.decide(plan, Progress(*_remembered(progress)), list(reversed(devices.values())), now, withdrawn)
        assert again == decision
        if withdrawn and before.state.is_open:
            assert (decision.action, decision.reason, decision.detail) == (Action.ABORT, "withdrawn", withdrawn)
        progress = rules.advance(progress, decision, now)

        assert progress.stage - before.stage in (0, 1)
        assert list(progress.thresholds) == sorted(progress.thresholds)
        assert progress.thresholds[: len(before.thresholds)] == before.thresholds
        assert len(progress.thresholds) == progress.stage + 1 <= len(plan.stages)
        if decision.action is Action.WAIT:
            assert progress == before
        if before.state is not State.ACTIVE:
            assert decision.action in (Action.WAIT, Action.ABORT)
        was_aborted = was_aborted or progress.state is State.ABORTED
        for other, candidate in devices.items():
            wants = rules.tells(plan, progress, other, candidate.heard)
            if was_aborted:
                assert not wants
            elif progress.state is State.ACTIVE:
                assert wants == (rules.position(plan.id, other) < progress.threshold)
                # Nobody falls out of a rollout that goes on.
                assert wants or not rules.tells(plan, before, other, candidate.heard)
            elif progress.state is State.PAUSED and candidate.heard is None:
                assert not wants
        if progress.state is State.COMPLETED:
            assert progress.stage == len(plan.stages) - 1
            assert all(rules.tells(plan, progress, other, None) for other in devices)
        if decision.action in (Action.PROMOTE, Action.COMPLETE):
            assert decision.tally.of(rules.Outcome.DONE) >= 1


def _remembered(progress: Progress) -> tuple[Any, ...]:
    """Return what the database keeps of a rollout, through its types and back."""
    return (
        State(int(progress.state)), int(progress.stage), tuple(int(t) for t in progress.thresholds),
        tuple(float(s) for s in progress.started),
    )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    one=st.dictionaries(st.sampled_from("ab"), st.sampled_from("xy")),
    other=st.dictionaries(st.sampled_from("ab"), st.sampled_from("xy")),
    labels=st.dictionaries(st.sampled_from("ab"), st.sampled_from("xy")),
)
def test_disjoint_selectors_never_mean_one_device(
    one: dict[str, str], other: dict[str, str], labels: dict[str, str]
) -> None:
    if rules.disjoint(one, other):
        assert not (rules.matches(one, labels) and rules.matches(other, labels))
    assert rules.disjoint(one, other) == rules.disjoint(other, one)
