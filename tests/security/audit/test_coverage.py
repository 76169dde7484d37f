"""The table of methods against what is recorded of them, and what a record holds of a request."""

from __future__ import annotations

import pytest

from isthmus.v1 import fleet_pb2, registry_pb2
from security.audit.budget import SUMMARY_S, Budget
from security.audit.coverage import Coverage, coverage_of
from security.audit.interceptors import fields_of
from security.audit.records import Event
from security.scopes import METHOD_SCOPES, PUBLIC, SCOPES, SCOPES_OF_ROLE

# What is recorded of each method; a new method must be put here by whoever adds it, after a look.
ACTIONS = {
    "FleetService": {"Invite", "SetLabels", "Pin", "Unpin", "RetryDevice"},
    "RolloutService": {"StartRollout", "PauseRollout", "ResumeRollout", "AbortRollout"},
    "RegistryService": {"Publish", "Release", "SubmitMetadata"},
    "AgentService": {"ImportVersion"},
}
EVERYDAY = SCOPES_OF_ROLE["device"] | SCOPES_OF_ROLE["client"]


def test_every_method_that_needs_an_administrators_scope_is_recorded_when_it_is_called() -> None:
    administrative = {method for method, scope in METHOD_SCOPES.items() if scope in SCOPES - EVERYDAY}
    covered = {method for method in METHOD_SCOPES if coverage_of(method) in (Coverage.ACTION, Coverage.LOOK)}
    assert administrative - covered == set()
    assert covered == administrative


def test_what_a_stranger_gets_with_a_proof_of_its_own_is_recorded_but_tokens_are_not() -> None:
    public = {method for method, scope in METHOD_SCOPES.items() if scope == PUBLIC and method.startswith("/isthmus.")}
    strangers = {method for method in METHOD_SCOPES if coverage_of(method) is Coverage.STRANGER}
    assert strangers == public - {"/isthmus.v1.FleetService/IssueToken"}
    assert "/isthmus.v1.FleetService/Enrol" in strangers


def test_what_changes_something_is_recorded_before_it_runs() -> None:
    for service, methods in ACTIONS.items():
        for method in methods:
            assert coverage_of(f"/isthmus.v1.{service}/{method}") is Coverage.ACTION, method


def test_what_is_only_looked_at_changes_nothing() -> None:
    looks = {method.rpartition("/")[2] for method in METHOD_SCOPES if coverage_of(method) is Coverage.LOOK}
    assert looks >= {"ListDevices", "GetDevice", "GetRollout", "ListRollouts", "FindMissing", "UploadBlob"}
    verbs = ("Get", "List", "Find", "Upload", "Search", "Export", "Show", "Read")
    assert all(name.startswith(verbs) for name in looks), looks


def test_a_new_method_of_a_new_scope_is_an_action() -> None:
    assert coverage_of("/isthmus.v1.NewService/Frobnicate", {"/isthmus.v1.NewService/Frobnicate": "new:admin"}) == (
        Coverage.ACTION
    )


def test_inference_is_sampled_and_the_rest_leaves_refusals() -> None:
    assert coverage_of("/inference.GRPCInferenceService/ModelInfer") is Coverage.SAMPLE
    for method in ("/isthmus.v1.FleetService/IssueToken", "/isthmus.v1.FleetService/Report", "/nowhere/Nothing"):
        assert coverage_of(method) is Coverage.REFUSALS


@pytest.mark.parametrize(
    ("request_message", "expected"),
    [
        (fleet_pb2.PinRequest(device_id="a", model="m", version=3), {"device": "a", "model": "m", "version": 3}),
        (fleet_pb2.AbortRolloutRequest(id="m-3", reason="why"), {"rollout": "m-3"}),
        (
            fleet_pb2.SetLabelsRequest(device_id="a", set={"x": "y"}, remove=["z"]),
            {"device": "a", "detail": {"set": "x=y", "remove": "z"}},
        ),
        (fleet_pb2.EnrolRequest(code="secret", csr_pem=b"request"), {}),
        (fleet_pb2.IssueTokenRequest(assertion="secret"), {}),
        (
            registry_pb2.PublishRequest(model="m", version=1, targets_json=b"signed", release=True),
            {"model": "m", "version": 1, "detail": {"release": 1}},
        ),
    ],
)
def test_a_record_holds_names_and_never_payloads(request_message: object, expected: dict[str, object]) -> None:
    assert fields_of(request_message) == expected


def test_refusals_are_bounded_for_each_source_and_for_all_and_the_rest_is_counted() -> None:
    now = [0.0]
    budget = Budget(per_s=1.0, burst=10, total=3, clock=lambda: now[0])
    refused = Event("x", "refused", reason="missing-token")
    assert sum(budget.admits("one", refused) for _ in range(1000)) == 10
    assert sum(budget.admits("two", refused) for _ in range(5)) == 5  # a noisy one does not hide the others
    assert sum(budget.admits(f"source-{number}", refused) for number in range(1000)) == 15
    assert budget.summary() == []
    now[0] = SUMMARY_S
    (summary,) = budget.summary()
    assert summary.detail == {"counted": 990 + 985, "seconds": 10}
    assert budget.summary() == []
    assert budget.admits("one", refused)


def test_kinds_of_counted_refusals_are_bounded() -> None:
    budget = Budget(per_s=0.0, burst=0, clock=lambda: 0.0)
    for number in range(10_000):
        budget.admits("one", Event(f"x{number}", "refused"))
    summary = budget.summary(at_once=True)
    assert len(summary) == 65
    assert sum(int(event.detail["counted"]) for event in summary) == 10_000
