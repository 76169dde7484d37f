"""Tenants, models, roles and names, attacked on a running cloud: what is not the caller's is not there.

Hidden and unknown must look the same: status, message and trailing metadata, with the name that the caller sent itself
taken out. A method that is new must say here what it could give away, or that it could give away nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from cloud.bootstrap import Cloud
from cloud.client import Address, CloudClient, Progress
from isthmus.bundle import open_bundle
from isthmus.errors import IsthmusError, NotFoundError, PermissionDeniedError
from isthmus.oip import service_pb2
from isthmus.status import REASON_KEY
from isthmus.v1 import access_pb2, fleet_pb2, registry_pb2
from security.custom import Terms, set_terms
from security.metadata import TargetFile
from security.repository import OperatorRepository
from security.scopes import AUTHENTICATED, METHOD_SCOPES, PUBLIC, SCOPES_OF_ROLE
from security.tenants import add_tenant
from tests.cloud.tenants import DEVICES, METHODS, MODELS, Answer, Site, three_tenants
from tests.cloud.workspaces import make_bundle, make_workspace, serving, write_manifest

pytestmark = pytest.mark.slow

INFERENCE = "/inference.GRPCInferenceService/"
FLEET = "/isthmus.v1.FleetService/"
ROLLOUT = "/isthmus.v1.RolloutService/"
REGISTRY = "/isthmus.v1.RegistryService/"
ACCESS = "/isthmus.v1.AccessService/"
TRAFFIC = "/isthmus.v1.TrafficService/"
USAGE = "/isthmus.v1.UsageService/"
AUDIT = "/isthmus.v1.AuditService/"
UNKNOWN = {"model": "beta.secrex", "device": "beta.cax", "rollout": "beta.secret-9-9", "blob": "0" * 64}
STAGES = [fleet_pb2.RolloutStage(share=1.0, soak_s=1)]

# What a method can be asked about something that may be somebody else's: the kind of thing, and the request.
ASKING: dict[str, tuple[str, Callable[[str], dict[str, Any]]]] = {
    f"{INFERENCE}ModelReady": ("model", lambda name: {"name": name}),
    f"{INFERENCE}ModelMetadata": ("model", lambda name: {"name": name}),
    f"{INFERENCE}ModelStatistics": ("model", lambda name: {"name": name}),
    f"{INFERENCE}ModelInfer": ("model", lambda name: {"model_name": name}),
    f"{REGISTRY}FetchBlob": ("blob", lambda name: {"sha256": name}),
    f"{REGISTRY}FetchDelta": ("blob", lambda name: {"from_sha256": name, "to_sha256": "1" * 64}),
    f"{REGISTRY}FindMissing": ("blob", lambda name: {"sha256": [name]}),
    f"{REGISTRY}Publish": ("model", lambda name: {"model": name, "version": 1}),
    f"{REGISTRY}Release": ("model", lambda name: {"model": name, "version": 1}),
    f"{FLEET}Invite": ("device", lambda name: {"device_id": name}),
    f"{FLEET}GetDevice": ("device", lambda name: {"device_id": name}),
    f"{FLEET}SetLabels": ("device", lambda name: {"device_id": name, "set": {"a": "b"}}),
    f"{FLEET}Pin": ("device", lambda name: {"device_id": name, "model": "acme.triage", "version": 1}),
    f"{FLEET}Unpin": ("device", lambda name: {"device_id": name, "model": "acme.triage"}),
    f"{FLEET}RetryDevice": ("device", lambda name: {"device_id": name, "model": "acme.triage"}),
    f"{FLEET}RevokeDevice": ("device", lambda name: {"device_id": name}),
    f"{FLEET}Report": ("model", lambda name: {"model": name, "version": 1, "state": 1}),
    f"{ROLLOUT}StartRollout": ("model", lambda name: {"model": name, "version": 2, "stages": STAGES}),
    f"{ROLLOUT}PauseRollout": ("rollout", lambda name: {"id": name}),
    f"{ROLLOUT}ResumeRollout": ("rollout", lambda name: {"id": name}),
    f"{ROLLOUT}AbortRollout": ("rollout", lambda name: {"id": name}),
    f"{ROLLOUT}GetRollout": ("rollout", lambda name: {"id": name}),
    f"{ROLLOUT}ListRollouts": ("model", lambda name: {"model": name}),
    f"{TRAFFIC}SetTraffic": ("model", lambda name: {"model": name, "cache_s": 5}),
    f"{TRAFFIC}RollbackTraffic": ("model", lambda name: {"model": name}),
    f"{TRAFFIC}ListTraffic": ("model", lambda name: {"model": name}),
    f"{USAGE}GetUsage": ("model", lambda name: {"model": name, "by": ["device"]}),
}
# More ways to ask the same methods.
ASKING_ALSO: list[tuple[str, str, Callable[[str], dict[str, Any]]]] = [
    (f"{FLEET}Pin", "model", lambda name: {"device_id": "acme.cam", "model": name, "version": 1}),
    (f"{FLEET}Unpin", "model", lambda name: {"device_id": "acme.cam", "model": name}),
    (f"{FLEET}RetryDevice", "model", lambda name: {"device_id": "acme.cam", "model": name}),
    (f"{ROLLOUT}GetRollout", "model", lambda name: {"id": name}),
    (f"{ROLLOUT}PauseRollout", "model", lambda name: {"id": name}),
    (f"{INFERENCE}ModelInfer", "model", lambda name: {"model_name": name, "model_version": "1"}),
    (f"{INFERENCE}ModelMetadata", "model", lambda name: {"name": name, "version": "7"}),
    (f"{REGISTRY}FetchDelta", "blob", lambda name: {"from_sha256": "1" * 64, "to_sha256": name}),
    (f"{FLEET}Watch", "model", lambda name: {"models": [name, "acme.triage"]}),
]
# Answers that list things: none of them may hold anything of another tenant.
LISTING: dict[str, dict[str, Any]] = {
    f"{INFERENCE}ServerMetadata": {},
    f"{INFERENCE}ModelStatistics": {},
    f"{REGISTRY}ListVersions": {},
    f"{FLEET}ListDevices": {},
    f"{FLEET}WhoAmI": {},
    f"{ROLLOUT}ListRollouts": {},
    f"{ACCESS}ListRoles": {},
    f"{ACCESS}ListApiKeys": {},
    f"{TRAFFIC}ListTraffic": {},
    f"{USAGE}GetUsage": {"by": ["tenant", "device", "model"]},
    f"{USAGE}ListQuotas": {},
    "/isthmus.v1.SealingService/GetSealingKeys": {},
}
# What is every tenant's at once: for the tenant that the cloud itself is.
WHOLE_CLOUD: dict[str, dict[str, Any]] = {
    f"{TRAFFIC}ListReplicas": {},
    f"{TRAFFIC}DrainReplica": {"name": "x"},
    f"{TRAFFIC}ResumeReplica": {"name": "x"},
    f"{USAGE}GetCompute": {},
    f"{USAGE}SetQuota": {},
    f"{USAGE}ClearQuota": {},
}
NOTHING_TO_ASK = {
    f"{INFERENCE}ServerLive": "says that the process runs",
    f"{INFERENCE}ServerReady": "says that Triton runs",
    f"{FLEET}Enrol": "a code is one of 2^192, and is its own proof",
    f"{FLEET}IssueToken": "an assertion is its own proof",
    f"{FLEET}RenewCertificate": "an assertion is its own proof",
    f"{FLEET}Watch": "asked below: it ends only when the caller goes",
    f"{REGISTRY}FetchMetadata": "asked below, file by file",
    f"{AUDIT}SearchRecords": "asked below: a tenant's records hold what its own callers have tried",
    f"{AUDIT}ExportRecords": "asked below",
    f"{AUDIT}GetHeads": "digests, and how many records there are, as the numbers of one's own tell, too",
    f"{REGISTRY}UploadBlob": "stores what comes, the same whether it is there or not",
    f"{REGISTRY}SubmitMetadata": "checked against the caller's own metadata",
    f"{ACCESS}GrantRole": "is about the caller's tenant, whatever is asked",
    f"{ACCESS}RevokeRole": "is about the caller's tenant, whatever is asked",
    f"{ACCESS}CreateApiKey": "is about the caller's tenant, whatever is asked",
    f"{ACCESS}RotateApiKey": "is about the caller's tenant, whatever is asked",
    f"{ACCESS}RevokeApiKey": "is about the caller's tenant, whatever is asked",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with three_tenants(tmp_path_factory.mktemp("tenants")) as running:
        yield running


def _role(method: str) -> str:
    """Return a role that may call a method, so that it is not the scope that hides something."""
    needed = METHOD_SCOPES[method]
    return "device" if needed == "device" else "admin"


def _hidden(site: Site, kind: str, tenant: str) -> str:
    return {
        "model": MODELS[tenant],
        "device": DEVICES[tenant],
        "rollout": site.rollouts[tenant],
        "blob": site.blobs[tenant],
    }[kind]


def _both(
    site: Site, method: str, token: str, names: tuple[str, str], request: Callable[[str], dict[str, Any]]
) -> tuple[Answer, Answer]:
    hidden, unknown = (site.call(method, site.asked(method, **request(name)), token).without(name) for name in names)
    return hidden, unknown


def _cases() -> list[tuple[str, str, Callable[[str], dict[str, Any]]]]:
    return [(method, kind, request) for method, (kind, request) in ASKING.items()] + ASKING_ALSO


def test_every_method_of_the_cloud_is_asked_or_has_nothing_to_tell(site: Site) -> None:
    offered = {
        method
        for method in METHODS
        if site.call(method, site.asked(method), "").code is not grpc.StatusCode.UNIMPLEMENTED
    }
    assert offered - set(ASKING) - set(LISTING) - set(WHOLE_CLOUD) - set(NOTHING_TO_ASK) == set()


def _name(value: object) -> str | None:
    """Return a method's own name for a test's; functions would name themselves by their address."""
    return str(value).rpartition("/")[2] if isinstance(value, str) else None


@pytest.mark.parametrize(("method", "kind", "request_of"), _cases(), ids=_name)
def test_what_is_another_tenants_looks_like_what_is_not_there(
    site: Site, method: str, kind: str, request_of: Callable[[str], dict[str, Any]]
) -> None:
    token = site.workspace.token(_role(method), "acme.ghost", tenant="acme")
    for tenant in ("beta", "default"):
        unknown = UNKNOWN[kind] if tenant == "beta" else UNKNOWN[kind].removeprefix("beta.")
        hidden, absent = _both(site, method, token, (_hidden(site, kind, tenant), unknown), request_of)
        assert hidden == absent
        assert b"beta" not in hidden.body


@pytest.mark.parametrize(
    ("method", "kind", "request_of"),
    [case for case in _cases() if case[1] != "device" and not case[0].endswith(("FindMissing", "Watch"))],
    ids=_name,
)
def test_what_a_token_may_not_use_looks_like_what_is_not_there(
    site: Site, method: str, kind: str, request_of: Callable[[str], dict[str, Any]]
) -> None:
    token = site.workspace.token(_role(method), "acme.cam", models=("acme.other",), tenant="acme")
    unknown = {"model": "acme.triagx", "rollout": "acme.triage-9-9"}.get(kind, UNKNOWN[kind])
    hidden, absent = _both(site, method, token, (_hidden(site, kind, "acme"), unknown), request_of)
    assert hidden == absent
    assert hidden.code is not grpc.StatusCode.OK or method.endswith(
        ("ModelReady", "ListRollouts", "GetUsage", "SearchRecords")
    )


@pytest.mark.parametrize("method", LISTING, ids=_name)
def test_lists_hold_nothing_of_other_tenants(site: Site, method: str) -> None:
    request = site.asked(method, **LISTING[method])
    answer = site.call(method, request, site.workspace.token("admin", "ann", tenant="acme"))
    assert answer.code is grpc.StatusCode.OK
    for word in (b"beta", b"secret", site.blobs["beta"].encode(), site.blobs["default"].encode()):
        assert word not in answer.body
    if method.endswith(("ListVersions", "ListDevices", "ListRollouts")):
        assert b"acme." in answer.body
    token = site.workspace.token("admin", "ann", models=("acme.other",), tenant="acme")
    assert b"acme.triage" not in site.call(method, request, token).body


def test_an_auditor_reads_the_records_of_its_tenant_about_its_models(site: Site) -> None:
    site.call(f"{ROLLOUT}GetRollout", fleet_pb2.GetRolloutRequest(id="x"), site.workspace.token("admin", tenant="acme"))

    def lines(token: str) -> list[dict[str, Any]]:
        found = []
        for method in ("SearchRecords", "ExportRecords"):
            body = site.call(f"{AUDIT}{method}", site.asked(f"{AUDIT}{method}"), token).body
            found += [json.loads(text) for text in re.findall(rb'\{"action".*?\}(?=[^,"]|$)', body)]
        return found

    records = lines(site.workspace.token("auditor", "ann", tenant="acme"))
    assert records
    assert {record["tenant"] for record in records} == {"acme"}
    limited = lines(site.workspace.token("auditor", "ann", models=("acme.other",), tenant="acme"))
    assert {record.get("model", "") for record in limited} <= {"", "acme.other"}


@pytest.mark.parametrize("method", WHOLE_CLOUD, ids=_name)
def test_what_is_every_tenants_is_for_the_clouds_own(site: Site, method: str) -> None:
    request = site.asked(method, **WHOLE_CLOUD[method])
    refused = site.call(method, request, site.workspace.token("admin", "ann", tenant="acme"))
    assert (refused.code, dict(refused.trailing)[REASON_KEY]) == (grpc.StatusCode.PERMISSION_DENIED, "wrong-tenant")
    told = site.call(method, request, site.workspace.token("admin", "ann"))
    assert told.code is not grpc.StatusCode.PERMISSION_DENIED


def test_an_operator_of_the_cloud_sees_nothing_of_its_tenants(site: Site) -> None:
    """Only an admin does, who says so: --tenant."""
    token = site.workspace.token("operator", "ann")
    lists = [method for method in (*LISTING, f"{TRAFFIC}ListReplicas") if METHOD_SCOPES[method] != "access:admin"]
    for method in lists:
        body = site.call(method, site.asked(method, **(LISTING | WHOLE_CLOUD)[method]), token).body
        assert not [word for word in (b"acme.", b"beta.", b"secret") if word in body], method


def test_the_owner_does_see_and_use_its_own(site: Site) -> None:
    """Without this, everything above could be refused for another reason."""
    for tenant, model in MODELS.items():
        token = site.workspace.token("admin", "ann", tenant=tenant)
        ready = site.call(f"{INFERENCE}ModelReady", service_pb2.ModelReadyRequest(name=model), token)
        assert service_pb2.ModelReadyResponse.FromString(ready.body).ready
        for method, request in (
            (f"{REGISTRY}FetchBlob", registry_pb2.FetchBlobRequest(sha256=site.blobs[tenant])),
            (f"{FLEET}GetDevice", fleet_pb2.GetDeviceRequest(device_id=DEVICES[tenant])),
            (f"{ROLLOUT}GetRollout", fleet_pb2.GetRolloutRequest(id=site.rollouts[tenant])),
        ):
            assert site.call(method, request, token).code is grpc.StatusCode.OK


def test_signed_metadata_are_each_tenants_own(site: Site) -> None:
    names = ["timestamp.json", *(f"{n}.{role}.json" for n in range(1, 6) for role in ("root", "targets", "snapshot"))]
    found: dict[str, set[bytes]] = {}
    for tenant in MODELS:
        token = site.workspace.token("device", DEVICES[tenant], tenant=tenant)
        answers = [
            site.call(f"{REGISTRY}FetchMetadata", registry_pb2.FetchMetadataRequest(name=name), token) for name in names
        ]
        found[tenant] = {answer.body for answer in answers if answer.body}
        everything = b"".join(found[tenant])
        assert MODELS[tenant].encode() in everything
        assert not any(f'"{model}/'.encode() in everything for other, model in MODELS.items() if other != tenant)
    for one, other in itertools.combinations(found.values(), 2):
        assert not one & other


def test_a_blob_that_is_stored_for_another_tenant_is_missing_until_it_is_sent(site: Site, tmp_path: Path) -> None:
    """The digest alone is worth nothing: not to ask, not to publish with, not to fetch."""
    bundle = make_bundle(tmp_path / "stolen", 3, light=b"light model of beta 1", model="acme.triage")

    def missing(client: Any) -> list[str]:
        request = registry_pb2.FindMissingRequest(sha256=[site.blobs["beta"], site.blobs["acme"], "0" * 64])
        return list(client._registry.FindMissing(request, timeout=10).sha256)

    assert site.ask("acme", missing) == [site.blobs["beta"], "0" * 64]

    def publish_without_sending(client: Any) -> None:
        """Send everything but the stolen file, which is stored already."""
        whole, send = open_bundle(bundle), client._upload_missing
        rest = {path: entry for path, entry in whole.files.items() if entry.sha256 != site.blobs["beta"]}
        assert len(rest) == len(whole.files) - 1
        send(bundle, whole.model_copy(update={"files": rest}), Progress())
        client._upload_missing = lambda *_arguments: 0
        client.publish(bundle, site.operator_folder("acme"))

    with pytest.raises(NotFoundError) as refused:
        site.ask("acme", publish_without_sending)
    assert refused.value.reason == "missing-blobs"
    # Whoever has the bytes can send them: then they are the sender's, too, and the other one's stay what they were.
    site.ask("acme", lambda client: client.publish(bundle, site.operator_folder("acme"), release=False))
    for tenant in ("acme", "beta"):
        token = site.workspace.token("device", DEVICES[tenant], tenant=tenant)
        answer = site.call(f"{REGISTRY}FetchBlob", registry_pb2.FetchBlobRequest(sha256=site.blobs["beta"]), token)
        assert b"light model of beta 1" in answer.body


@pytest.mark.parametrize("role", ["operator", "admin"])
def test_an_operator_of_one_model_moves_no_device_between_rollouts_of_others(site: Site, role: str) -> None:
    """Rollouts of every model choose devices by label: whoever sets one says which versions of others they get."""
    labels = fleet_pb2.SetLabelsRequest(device_id=DEVICES["acme"], set={"group": "canary"})
    removal = fleet_pb2.SetLabelsRequest(device_id=DEVICES["acme"], remove=["group"])
    chosen = fleet_pb2.ListDevicesRequest(selector={"group": "canary"})  # as a rollout does
    everything = site.workspace.token("operator", "ann", tenant="acme")

    def matching() -> int:
        answer = site.call(f"{FLEET}ListDevices", chosen, everything)
        return len(fleet_pb2.ListDevicesResponse.FromString(answer.body).devices)

    some = site.workspace.token(role, "eve", models=("acme.other",), tenant="acme")
    refused = (grpc.StatusCode.PERMISSION_DENIED, "not-all-models")
    for labelled, request in ((0, labels), (1, removal)):
        assert matching() == labelled
        answers = [site.call(f"{FLEET}SetLabels", request, some) for request in (request, _of_nobody(request))]
        assert {(answer.code, dict(answer.trailing)[REASON_KEY]) for answer in answers} == {refused}
        assert matching() == labelled
        assert site.call(f"{FLEET}SetLabels", request, everything).code is grpc.StatusCode.OK
    assert matching() == 0


def _of_nobody(request: Any) -> Any:
    """Return a request for a device that there is not."""
    changed = type(request)()
    changed.CopyFrom(request)
    changed.device_id = "acme.nobody"
    return changed


@pytest.mark.parametrize("role", SCOPES_OF_ROLE)
def test_a_role_reaches_its_methods_and_no_others(site: Site, role: str) -> None:
    """An empty request is refused by every method that changes something; what counts is by whom."""
    token = site.workspace.token(role, "somebody")
    for method, needed in METHOD_SCOPES.items():
        if method not in METHODS or needed in (PUBLIC, AUTHENTICATED) or METHODS[method].client_streaming:
            continue
        allowed = needed in SCOPES_OF_ROLE[role]
        if allowed and method.endswith("Watch"):  # it would not end
            continue
        answer = site.call(method, site.asked(method), token)
        assert (dict(answer.trailing).get(REASON_KEY) == "missing-scope") is not allowed or (
            answer.code is grpc.StatusCode.UNIMPLEMENTED
        ), method


def test_only_an_admin_of_the_cloud_acts_in_another_tenant(site: Site) -> None:
    rows = site.ask("default", lambda client: client.list_versions(), role="admin", acting_in="beta")
    assert {row["model"] for row in rows} == {"beta.secret"}
    for tenant, role in (("default", "operator"), ("acme", "admin"), ("acme", "operator"), ("default", "auditor")):
        for other in ("beta", "nobody"):  # and whether there is such a tenant is not told
            with pytest.raises(PermissionDeniedError) as refused:
                site.ask(tenant, lambda client: client.list_versions(), role=role, acting_in=other)
            assert refused.value.reason == "wrong-tenant"
    assert site.ask("acme", lambda client: client.list_versions(), role="admin", acting_in="acme")


def test_an_admin_of_the_cloud_acts_under_no_name_of_the_tenant(site: Site) -> None:
    """In a tenant's records, counts and quotas, somebody of the cloud is nobody of the tenant's."""
    where = ("isthmus-tenant", "acme")
    outside, inside = (site.workspace.token("admin", "ann", tenant=tenant) for tenant in ("default", "acme"))
    ask = f"{FLEET}WhoAmI", fleet_pb2.WhoAmIRequest()
    told = [site.call(*ask, token, where).body for token in (outside, inside)]
    assert [fleet_pb2.WhoAmIResponse.FromString(body).subject for body in told] == ["cloud:ann", "ann"]
    site.call(
        f"{ACCESS}GrantRole", site.asked(f"{ACCESS}GrantRole", principal="subject:x", role="client"), outside, where
    )
    roles = site.call(f"{ACCESS}ListRoles", site.asked(f"{ACCESS}ListRoles"), inside).body
    (grant,) = access_pb2.ListRolesResponse.FromString(roles).grants
    assert (grant.principal, grant.created_by) == ("subject:x", "cloud:ann")
    search = site.asked(f"{AUDIT}SearchRecords", action="GrantRole", limit=2)
    records = site.call(f"{AUDIT}SearchRecords", search, inside).body
    assert b'"subject":"cloud:ann"' in records
    revoke = site.asked(f"{ACCESS}RevokeRole", principal="subject:x", role="client")
    assert site.call(f"{ACCESS}RevokeRole", revoke, inside).code is grpc.StatusCode.OK


@pytest.mark.parametrize(
    "name",
    [
        "BETA.secret", "beta.SECRET", "beta.secret ", " beta.secret", "beta\u2024secret", "\uff42eta.secret",
        "bet\u0430.secret", "beta.secret\u200b", "beta.secret@1", "acme.triage@1", "ACME.triage",
        "acme.triage/../beta.secret", "../beta.secret", "acme/triage", "beta/secret", "*", "acme.*", ".", "",
        "beta.secret\n", "default.triage", "acme.acme.triage",
    ],
)  # fmt: skip
def test_no_other_spelling_of_a_name_reaches_a_model(site: Site, name: str) -> None:
    token = site.workspace.token("client", "ann", tenant="acme")
    infer = site.call(f"{INFERENCE}ModelInfer", service_pb2.ModelInferRequest(model_name=name), token)
    assert infer.code is grpc.StatusCode.NOT_FOUND
    ready = site.call(f"{INFERENCE}ModelReady", service_pb2.ModelReadyRequest(name=name), token)
    assert not service_pb2.ModelReadyResponse.FromString(ready.body).ready


@pytest.mark.parametrize(
    ("tenant", "name"),
    [
        ("acme", "kiosk"), ("acme", "beta.secret"), ("acme", "beta.new"), ("acme", "Acme.new"), ("acme", "acme"),
        ("acme", "acme."), ("acme", "acme-x.new"), ("default", "acme.new"), ("default", "ACME.new"),
    ],
)  # fmt: skip
def test_nothing_can_be_published_or_invited_under_the_name_of_another_tenant(
    site: Site, tenant: str, name: str
) -> None:
    token = site.workspace.token("admin", "ann", tenant=tenant)
    publish = site.call(f"{REGISTRY}Publish", registry_pb2.PublishRequest(model=name, version=1), token)
    invite = site.call(f"{FLEET}Invite", fleet_pb2.InviteRequest(device_id=name), token)
    for answer in (publish, invite):
        assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
        assert dict(answer.trailing)[REASON_KEY] == "name-of-another"


PATHS = [
    "../tokens/issuer.json",
    "..",
    ".",
    "/etc/passwd",
    "1.root.json/../../server.key",
    "tenants/beta/tuf/timestamp.json",
    "../tenants/beta/tuf/timestamp.json",
    "timestamp.json\0",
    "%2e%2e/server.key",
    "..\\server.key",
    "a\nb",
    "~/x",
]


@pytest.mark.parametrize("path", PATHS)
def test_no_name_leaves_its_folder(site: Site, path: str) -> None:
    before = site.state_files()
    token = site.workspace.token("admin", "ann", tenant="acme")
    attempts: list[tuple[str, dict[str, Any]]] = [
        (f"{REGISTRY}FetchMetadata", {"name": path}),
        (f"{REGISTRY}FetchBlob", {"sha256": path}),
        (f"{REGISTRY}FetchDelta", {"from_sha256": path, "to_sha256": path}),
        (f"{REGISTRY}FindMissing", {"sha256": [path]}),
        (f"{REGISTRY}UploadBlob", {"sha256": path, "length": 1, "data": b"x"}),
        (f"{REGISTRY}Publish", {"model": path, "version": 1}),
        (f"{REGISTRY}Publish", {"model": f"acme.x/{path}", "version": 1}),
        (f"{REGISTRY}Publish", {"model": "acme.new", "version": 1, "role": path}),
        (f"{REGISTRY}Release", {"model": path, "version": 1}),
        (f"{REGISTRY}SubmitMetadata", {"files": [registry_pb2.SignedFile(name=path, data=b"x")]}),
        (f"{FLEET}Invite", {"device_id": path}),
        (f"{FLEET}Invite", {"device_id": f"acme.x/{path}"}),
        (f"{FLEET}GetDevice", {"device_id": path}),
        (f"{ROLLOUT}GetRollout", {"id": path}),
        (f"{INFERENCE}ModelMetadata", {"name": path}),
        (f"{INFERENCE}ModelMetadata", {"name": "acme.triage", "version": path}),
    ]
    for method, values in attempts:
        answer = site.call(method, site.asked(method, **values), token)
        assert answer.code in (
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.FAILED_PRECONDITION,
        ), (method, answer)
    assert site.state_files() == before


@pytest.mark.parametrize("tenant", ["../beta", "BETA", "beta/../default", "", "beta ", "*", "a" * 200])
def test_no_other_spelling_of_a_tenant_is_taken(site: Site, tenant: str) -> None:
    token = site.workspace.token("admin", "root")
    answer = site.call(f"{FLEET}WhoAmI", fleet_pb2.WhoAmIRequest(), token, ("isthmus-tenant", tenant))
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    twice = (("isthmus-tenant", "acme"), ("isthmus-tenant", "beta"))
    assert site.call(f"{FLEET}WhoAmI", fleet_pb2.WhoAmIRequest(), token, *twice).code is grpc.StatusCode.UNAUTHENTICATED


def test_two_tenants_who_are_quick_with_one_device_name_do_not_share_it(site: Site) -> None:
    """Names carry their tenant, so this needs a tenant whose name is a prefix of a name that was there before it."""
    with pytest.raises(IsthmusError):
        site.ask("acme", lambda client: client.invite("cam"))
    with pytest.raises(IsthmusError):
        site.ask("default", lambda client: client.invite("beta.cam"))


def test_signed_metadata_of_one_tenant_say_nothing_of_anothers_models(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """A tenant signs what it likes: a version of a foreign model, its withdrawal, its way back. Nobody believes it.

    The cloud that is started again is where this would hurt: it finishes publishes that were cut short.
    """
    folder = tmp_path_factory.mktemp("signed")
    workspace = make_workspace(folder / "workspace")
    add_tenant(workspace.home, "acme", folder / "acme", workspace.trust / "ca.pem", datetime.now(UTC))
    acme = folder / "acme" / "operator"

    def client(cloud: Cloud, tenant: str) -> CloudClient:
        file = folder / f"{tenant}.token"
        file.write_text(workspace.token("admin", "ann", tenant=tenant))
        return CloudClient(Address(cloud.address, workspace.trust, file), timeout_s=30.0)

    def publish(cloud: Cloud) -> None:
        with client(cloud, "default") as owner, client(cloud, "acme") as attacker:
            owner.publish(make_bundle(tmp_path / "kiosk", 1, model="kiosk"), workspace.operator)
            attacker.publish(make_bundle(tmp_path / "mine-1", 1, model="acme.x"), acme)
            forged = (make_bundle(tmp_path / "forged", 9, model="kiosk", light=b"evil") / "manifest.json").read_bytes()
            # The manifest of the foreign model is stored as well, as a file of a bundle of the attacker's own.
            mine = make_bundle(tmp_path / "mine-2", 2, model="acme.x")
            (mine / "report.json").write_bytes(forged)
            write_manifest(mine, "acme.x", 2)
            for name in ("forged", "mine-2"):
                attacker._upload_missing(tmp_path / name, open_bundle(tmp_path / name), Progress())
            operator = OperatorRepository(acme)
            metadata, delegator = operator._current(attacker.current_targets(), None)
            manifest = (mine / "manifest.json").read_bytes()
            for path, data in (("kiosk/9/manifest.json", forged), ("kiosk/1/manifest.json", forged)):
                target = TargetFile.from_data(path, data, ["sha256"])
                set_terms(target, Terms(0, "withdrawn by a stranger"))
                metadata.signed.targets[path] = target
            own = TargetFile.from_data("acme.x/2/manifest.json", manifest, ["sha256"])
            set_terms(own, Terms(0))
            metadata.signed.targets["acme.x/2/manifest.json"] = own
            signed = operator._sign_next(metadata, delegator)
            request = registry_pb2.PublishRequest(
                model="acme.x", version=2, manifest_json=manifest, targets_json=signed
            )
            attacker.call("publish", attacker._registry.Publish, request)

    def look(cloud: Cloud) -> None:
        with client(cloud, "default") as owner, client(cloud, "acme") as attacker:
            rows = owner.list_versions()
            assert [(row["model"], row["version"], row["withdrawn"]) for row in rows] == [("kiosk", 1, None)]
            assert {row["model"] for row in attacker.list_versions()} == {"acme.x"}
            owner.release("kiosk", 1)  # refused were it withdrawn

    async def story() -> None:
        async with serving(workspace) as cloud:
            await asyncio.to_thread(publish, cloud)
            await asyncio.to_thread(look, cloud)
        async with serving(workspace) as cloud:
            await asyncio.to_thread(look, cloud)

    asyncio.run(story())
