"""Tenants on the disk: their names, what they may call things, and repositories that do not touch each other."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import ConfigError, ConflictError, InputError, NotFoundError, PermissionDeniedError
from security.authenticator import Authenticator
from security.ceremony import Ceremony
from security.repository import CloudRepository, OperatorRepository
from security.tenancy import check_new_name, check_tenant
from security.tenants import TenantRepositories, add_tenant, tenants_of
from security.tokens import TokenIssuer
from tests.security.conftest import NOW

BAD_NAMES = ["", ".", "..", "a/b", "../x", "Acme", "a b", "-a", "a-", "a.b", "a\n", "\u0430cme", "a" * 33, "*", "~"]


@pytest.fixture
def site(own_workspace: Path) -> Path:
    for name in ("acme", "beta"):
        add_tenant(own_workspace / "cloud", name, own_workspace / name, own_workspace / "trust" / "ca.pem", _now())
    return own_workspace


def _now() -> datetime:
    return datetime.now(UTC)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_what_is_no_name_of_a_tenant_reaches_no_file(site: Path, name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        check_tenant(name)
    with pytest.raises(InputError):
        add_tenant(site / "cloud", name, tmp_path / "new", site / "trust" / "ca.pem", NOW)
    with pytest.raises(InputError):
        TenantRepositories(site / "cloud").of(name)


@pytest.mark.parametrize("name", ["a", "acme", "acme-2", "0", "a" * 32])
def test_names_of_tenants(name: str) -> None:
    assert check_tenant(name) == name


@pytest.mark.parametrize(
    ("tenant", "name", "allowed"),
    [
        ("acme", "acme.x", True), ("acme", "acme.x.y", True), ("acme", "acme.", False), ("acme", "acme", False),
        ("acme", "x", False), ("acme", "beta.x", False), ("acme", "acme2.x", False), ("acme", "Acme.x", False),
        ("default", "x", True), ("default", "line3.x", True), ("default", "acme", True), ("default", "acme.x", False),
        ("default", "ACME.x", False), ("default", "acme-x", True),
    ],
)  # fmt: skip
def test_a_name_says_whose_it_is(tenant: str, name: str, allowed: bool) -> None:
    if allowed:
        check_new_name(tenant, name, ["default", "acme", "beta"])
    else:
        with pytest.raises(InputError) as raised:
            check_new_name(tenant, name, ["default", "acme", "beta"])
        assert raised.value.reason == "name-of-another"
    if tenant == "acme" and not allowed:  # whatever tenants there are, the answer is the same
        with pytest.raises(InputError) as again:
            check_new_name(tenant, name, [])
        assert again.value.message == raised.value.message


def test_a_tenant_has_a_root_of_its_own_and_signs_for_itself_only(site: Path) -> None:
    repositories = TenantRepositories(site / "cloud")
    assert repositories.names() == ["default", "acme", "beta"]
    roots = {name: repositories.of(name).metadata("1.root.json") for name in repositories.names()}
    assert len(set(roots.values())) == 3
    assert roots["acme"] == (site / "acme" / "trust" / "root.json").read_bytes()
    operator = OperatorRepository(site / "acme" / "operator")
    signed = operator.sign_manifest("acme.x", 1, b"{}", repositories.of("acme").targets_json())
    with pytest.raises(Exception, match="sign"):
        repositories.of("beta").commit(signed)
    repositories.of("acme").commit(signed)
    assert list(repositories.of("acme").listed()) == ["acme.x/1/manifest.json"]
    assert list(repositories.of("beta").listed()) == list(repositories.of("default").listed()) == []


def test_keys_of_a_tenant_are_private_and_change_hands_as_usual(site: Path) -> None:
    for path in (*(site / "acme").rglob("*.key"), *(site / "cloud" / "tenants").rglob("*.key")):
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o077 == 0
    assert sorted(role.role for role in Ceremony(site / "acme" / "operator").roles()) == [
        "root", "snapshot", "targets", "timestamp",
    ]  # fmt: skip


def test_a_tenant_that_is_added_while_the_cloud_runs_is_found(own_workspace: Path) -> None:
    repositories = TenantRepositories(own_workspace / "cloud")
    with pytest.raises(NotFoundError) as raised:
        repositories.of("acme")
    assert raised.value.reason == "unknown-tenant"
    add_tenant(own_workspace / "cloud", "acme", own_workspace / "acme", own_workspace / "trust" / "ca.pem", _now())
    assert repositories.of("acme").metadata("1.root.json")
    assert repositories.names() == ["default", "acme"]


def test_what_is_there_is_not_overwritten(site: Path, tmp_path: Path) -> None:
    ca, cloud = site / "trust" / "ca.pem", site / "cloud"
    wrong: list[tuple[type[Exception], dict[str, Any]]] = [
        (ConflictError, {"name": "acme"}),
        (ConflictError, {"folder": site / "acme"}),
        (InputError, {"name": "default"}),
        (ConfigError, {"home": tmp_path}),
        (ConfigError, {"ca": tmp_path / "none.pem"}),
    ]
    for kind, change in wrong:
        given: dict[str, Any] = {"home": cloud, "name": "gamma", "folder": tmp_path / "gamma", "ca": ca} | change
        with pytest.raises(kind):
            add_tenant(given["home"], given["name"], given["folder"], given["ca"], NOW)
    assert tenants_of(cloud) == ["acme", "beta"]


def test_one_broken_tenant_does_not_keep_the_others_from_fresh_metadata(site: Path) -> None:
    soon = _now() + timedelta(hours=20)  # a timestamp lives for a day
    for key in (site / "cloud" / "tenants" / "acme").glob("*.key"):
        key.unlink()
    with pytest.raises(ConfigError):
        TenantRepositories(site / "cloud").refresh_if_due(soon)
    assert not CloudRepository(site / "cloud" / "tenants" / "beta").refresh_if_due(soon)  # it is done


def test_only_admins_of_the_cloud_hear_that_there_is_no_such_tenant(issuer: TokenIssuer) -> None:
    check = Authenticator(issuer.verifier(), tenants=lambda: ("default", "acme"))
    admin, other = (
        issuer.mint("a", "admin", models=["*"], ttl=timedelta(minutes=5), tenant=tenant)[0]
        for tenant in ("default", "acme")
    )
    assert check.verify(admin, "acme").tenant == "acme"
    with pytest.raises(NotFoundError) as missing:
        check.verify(admin, "acne")
    assert missing.value.reason == "unknown-tenant"
    for tenant in ("default", "acne"):
        with pytest.raises(PermissionDeniedError) as refused:
            check.verify(other, tenant)
        assert refused.value.reason == "wrong-tenant"
