"""A tenant from its first command to its last, by the commands that people type, with an API key and an OIDC issuer."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from isthmus.cli import main
from tests.cloud.conftest import eventually
from tests.cloud.workspaces import Workspace, make_bundle, make_workspace
from tests.security.issuers import Issuer, oidc_issuer

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
Command = Callable[..., Any]


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with oidc_issuer(tmp_path_factory.mktemp("issuer")) as running:
        yield running


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("tenants") / "workspace")


@pytest.fixture(scope="module")
def cloud(workspace: Workspace, issuer: Issuer) -> Iterator[str]:
    """The address of `isthmus cloud serve`, which believes the issuer; its log is in cloud.log."""
    ready, config = workspace.root / "ready.json", workspace.root / "cloud.toml"
    config.write_text(
        f'triton_stop_s = 0.2\n[[oidc]]\nname = "corp"\nissuer = "{issuer.url}"\naudience = "isthmus"\n'
        f'jwks_url = "{issuer.url}/keys"\nca_file = "{issuer.ca}"\nalgorithms = ["RS256"]\n'
    )
    command = ["cloud", "serve", "--home", workspace.home, "--config", config, "--ready-file", ready]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'proto'}"}
    with (workspace.root / "cloud.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "isthmus", *map(str, command), "--listen", "127.0.0.1:0"],
            stderr=log, env=environment,
        )  # fmt: skip
        try:

            async def is_ready() -> bool:
                assert process.poll() is None
                return ready.exists()

            asyncio.run(eventually(is_ready, "the cloud is ready", within_s=60))
            yield json.loads(ready.read_text())["address"]
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture
def isthmus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Run a command as the program does, in this process; return what it printed, or (exit code, error)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Any:
        monkeypatch.setattr(sys, "argv", ["isthmus", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        if ended.value.code:
            return ended.value.code, shown.err
        return json.loads(shown.out) if "--json" in arguments else shown.out + shown.err

    yield run
    structlog.reset_defaults()


def test_a_tenant_is_added_published_to_and_used(
    workspace: Workspace, cloud: str, issuer: Issuer, isthmus: Command, tmp_path: Path
) -> None:
    home, trust, folder = workspace.home, workspace.trust, tmp_path / "acme"
    assert 'begin with "acme."' in isthmus("tenant", "add", "acme", folder, "--home", home, "--trust", trust)
    assert isthmus("tenant", "list", "--home", home, "--json") == [{"tenant": "default"}, {"tenant": "acme"}]
    assert isthmus("tenant", "add", "acme", tmp_path / "again", "--home", home, "--trust", trust)[0] == 3

    def to_cloud(token: Path, *arguments: object) -> Any:
        return isthmus(*arguments, "--cloud", cloud, "--trust", trust, "--token-file", token)

    tokens = {}
    for name, role, tenant in (("root", "admin", "default"), ("ann", "admin", "acme"), ("eve", "operator", "default")):
        tokens[name] = tmp_path / f"{name}.token"
        minted = isthmus(
            "token", "mint", "--home", home, "--role", role, "--subject", name, "--tenant", tenant,
            "-o", tokens[name], "--json",
        )  # fmt: skip
        assert minted["tenant"] == tenant
    bundle = make_bundle(tmp_path / "bundle", 1, model="acme.triage")
    assert to_cloud(tokens["ann"], "model", "publish", bundle, "--operator", folder / "operator", "--json")["released"]
    assert to_cloud(tokens["eve"], "model", "list", "--json") == []
    (row,) = to_cloud(tokens["root"], "model", "list", "--tenant", "acme", "--json")
    assert row["model"] == "acme.triage"
    assert to_cloud(tokens["eve"], "model", "list", "--tenant", "acme", "--json")[0] == 4
    invited = to_cloud(tokens["ann"], "device", "invite", "acme.cam", "--json")
    assert isthmus(
        "edge", "enrol", "--cloud", cloud, "--trust", folder / "trust", "--home", tmp_path / "cam",
        "--code", invited["code"],
    )  # fmt: skip
    assert json.loads((tmp_path / "cam" / "enrolment.json").read_text())["tenant"] == "acme"
    assert [row["device"] for row in to_cloud(tokens["ann"], "device", "list", "--json")] == ["acme.cam"]
    assert to_cloud(tokens["eve"], "device", "list", "--json") == []
    assert to_cloud(tokens["eve"], "device", "show", "acme.cam")[0] == 2

    # An API key of one model, and a person whom somebody else's issuer knows.
    key = tmp_path / "shop.key"
    made = to_cloud(tokens["ann"], "apikey", "create", "shop", "--role", "operator", "--model", "acme.triage",
                    "-o", key, "--json")  # fmt: skip
    assert "key" not in made
    assert key.stat().st_mode & 0o777 == 0o600
    assert [row["model"] for row in to_cloud(key, "model", "list", "--json")] == ["acme.triage"]
    person = tmp_path / "person.token"
    person.write_text(issuer.token())
    assert to_cloud(person, "model", "list")[0] == 4
    to_cloud(tokens["ann"], "role", "grant", "group:corp:vision", "auditor")
    assert [row["model"] for row in to_cloud(person, "model", "list", "--json")] == ["acme.triage"]
    assert to_cloud(person, "device", "list")[0] == 4
    listed = to_cloud(tokens["ann"], "role", "list", "--json")
    assert [row["principal"] for row in listed] == ["apikey:shop", "group:corp:vision"]
    assert to_cloud(tokens["eve"], "role", "list")[0] == 4

    second = to_cloud(tokens["ann"], "apikey", "rotate", "shop", "--overlap", "0s", "--json")["key"]
    assert to_cloud(key, "model", "list")[0] == 4
    key.write_text(second)
    assert to_cloud(key, "model", "list", "--json")
    assert "revoked 2 keys" in to_cloud(tokens["ann"], "apikey", "revoke", "shop")
    assert to_cloud(key, "model", "list")[0] == 4
    assert "took 1 role" in to_cloud(tokens["ann"], "role", "revoke", "group:corp:vision")
    assert to_cloud(person, "model", "list")[0] == 4

    log = (workspace.root / "cloud.log").read_text()
    assert "role granted" in log
    for secret in (second, second.rpartition("_")[2], person.read_text(), tokens["ann"].read_text().strip()):
        assert secret not in log


def test_a_token_of_grants_says_so_when_it_is_looked_at(workspace: Workspace, isthmus: Command) -> None:
    token = isthmus("token", "mint", "--home", workspace.home, "--role", "granted", "--subject", "ann").splitlines()[0]
    record = isthmus("token", "inspect", token, "--home", workspace.home, "--json")
    assert (record["scope"], record["tenant"], record["verified"]) == ("granted", "default", "valid")
