"""The table of methods against the descriptors of every service that a listener of ours offers."""

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from isthmus.oip import service_pb2
from isthmus.v1 import (
    access_pb2,
    agent_pb2,
    audit_pb2,
    fleet_pb2,
    registry_pb2,
    sealing_pb2,
    traffic_pb2,
    usage_pb2,
)
from security.scopes import AUTHENTICATED, GRANTED, METHOD_SCOPES, PUBLIC, SCOPES, SCOPES_OF_ROLE, UPLOADS

FILES = (
    service_pb2, access_pb2, agent_pb2, audit_pb2, fleet_pb2, registry_pb2, sealing_pb2, traffic_pb2, usage_pb2,
    health_pb2, reflection_pb2,
)  # fmt: skip


def _methods() -> set[str]:
    return {
        f"/{service.full_name}/{method.name}"
        for file in FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


def test_every_method_is_in_the_table() -> None:
    assert _methods() - set(METHOD_SCOPES) == set()


def test_the_table_has_nothing_else() -> None:
    others = set(METHOD_SCOPES) - _methods()
    # Newer releases of these two libraries add methods; the table knows them already.
    assert all(name.startswith(("/grpc.reflection.v1.", "/grpc.health.v1.Health/List")) for name in others), others


def test_the_methods_that_take_uploads_are_known() -> None:
    streams = {
        f"/{service.full_name}/{method.name}"
        for file in FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if method.client_streaming and not method.server_streaming
    }
    assert streams == UPLOADS


def test_methods_ask_for_scopes_that_exist() -> None:
    assert set(METHOD_SCOPES.values()) <= SCOPES | {PUBLIC, AUTHENTICATED}


def test_every_scope_is_given_to_a_role_beside_admin() -> None:
    others = (scopes for role, scopes in SCOPES_OF_ROLE.items() if role != "admin")
    assert frozenset[str]().union(*others) == SCOPES - {"access:admin"}
    assert SCOPES_OF_ROLE["admin"] == SCOPES


def test_no_method_can_be_called_with_a_token_that_only_refers_to_grants() -> None:
    assert GRANTED not in SCOPES | set(METHOD_SCOPES.values())


def test_only_what_carries_its_own_proof_is_public() -> None:
    public = {name for name, scope in METHOD_SCOPES.items() if scope == PUBLIC}
    assert {name for name in public if "Health" not in name} == {
        "/isthmus.v1.FleetService/Enrol",
        "/isthmus.v1.FleetService/IssueToken",
        "/isthmus.v1.FleetService/RenewCertificate",
    }


def test_devices_clients_and_auditors_change_nothing() -> None:
    for role in ("device", "client", "auditor"):
        assert not SCOPES_OF_ROLE[role] & {"fleet:admin", "registry:publish", "access:admin", "traffic:admin"}


def test_only_admins_say_who_may_do_what() -> None:
    assert [role for role, scopes in SCOPES_OF_ROLE.items() if "access:admin" in scopes] == ["admin"]
