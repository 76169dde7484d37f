"""The table of methods against the descriptors of every service that a listener of ours offers."""

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from isthmus.oip import service_pb2
from isthmus.v1 import agent_pb2, fleet_pb2, registry_pb2, traffic_pb2, usage_pb2
from security.scopes import AUTHENTICATED, METHOD_SCOPES, PUBLIC, SCOPES, SCOPES_OF_ROLE

FILES = (service_pb2, agent_pb2, fleet_pb2, registry_pb2, traffic_pb2, usage_pb2, health_pb2, reflection_pb2)


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


def test_methods_ask_for_scopes_that_exist() -> None:
    assert set(METHOD_SCOPES.values()) <= SCOPES | {PUBLIC, AUTHENTICATED}


def test_every_scope_is_given_to_a_role_beside_admin() -> None:
    others = (scopes for role, scopes in SCOPES_OF_ROLE.items() if role != "admin")
    assert frozenset[str]().union(*others) == SCOPES - {"access:admin"}
    assert SCOPES_OF_ROLE["admin"] == SCOPES


def test_only_what_carries_its_own_proof_is_public() -> None:
    public = {name for name, scope in METHOD_SCOPES.items() if scope == PUBLIC}
    assert {name for name in public if "Health" not in name} == {
        "/isthmus.v1.FleetService/Enrol",
        "/isthmus.v1.FleetService/IssueToken",
    }


def test_devices_and_clients_change_nothing_of_the_fleet() -> None:
    for role in ("device", "client"):
        assert not SCOPES_OF_ROLE[role] & {"fleet:admin", "registry:publish"}
