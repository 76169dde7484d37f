"""`isthmus quota` and the settings of quotas: what operators type, and what they are told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cloud.config import CloudSettings
from cloud.quotas import UNLIMITED
from isthmus.errors import ConfigError
from isthmus.settings import load_settings
from security.tokens import TokenIssuer
from tests.cloud.test_serve import Command, Refusal, command, refused
from tests.cloud.workspaces import make_workspace, serving

__all__ = ["command", "refused"]


@pytest.mark.slow
def test_an_admin_sets_shows_and_clears_quotas(
    tmp_path: Path, command: Command, refused: Callable[..., Refusal]
) -> None:
    workspace, token = make_workspace(tmp_path / "workspace"), tmp_path / "token"

    async def story() -> None:
        async with serving(workspace) as cloud:
            flags = ("--cloud", cloud.address, "--trust", workspace.trust, "--token-file", token)

            def as_role(role: str, tenant: str = "default") -> None:
                issuer = TokenIssuer.load(workspace.home)
                token.write_text(issuer.mint("me", role, models=("*",), ttl=timedelta(hours=1), tenant=tenant)[0])

            def ask(*arguments: object) -> Any:
                done = command(*arguments, *flags)
                assert done.returncode == 0, done.stderr
                return done

            def all_of_it() -> None:
                as_role("admin")
                place = ("--home", workspace.home, "--trust", workspace.trust)
                for name in ("acme", "other"):
                    added = json.loads(command("tenant", "add", name, tmp_path / name, *place, "--json").stdout)
                    assert added["tenant"] == name
                    assert (Path(added["operator"]) / "root.key").is_file()
                    assert Path(added["trust"]).is_dir()
                limits = ("--rate", "100/s", "--burst", 200, "--concurrency", 16, "--bytes-rate", "10MB/s")
                ask("quota", "set", "--tenant", "acme", *limits, "--bytes-burst", "50MiB")
                early = ("--tenant", "other", "--device", "*", "--model", "other.triage", "--rate", "5/min")
                assert (
                    "warning: no model of tenant other is called 'other.triage' yet"
                    in ask("quota", "set", *early).stderr
                )
                told = json.loads(ask("quota", "set", *early, "--json").stdout)
                assert (told["tenant"], told["rate"], len(told["warnings"])) == ("other", "5/min", 1)
                missing = refused("quota", "set", "--tenant", "acmee", "--rate", "5/min", *flags)
                assert (missing.code, missing.error, missing.hint) == (
                    2, "cannot set the quota: there is no tenant 'acmee'", "did you mean acme?",
                )  # fmt: skip
                assert json.loads(ask("quota", "set", "--tenant", "*", "--json").stdout)["warnings"] == []
                cleared = json.loads(ask("quota", "clear", "--tenant", "*", "--json").stdout)
                assert cleared == {"tenant": "*", "device": None, "model": None, "cleared": True}
                ask("quota", "set", "--tenant", "acme", "--device", "free")
                rows = json.loads(ask("quota", "show", "--json").stdout)
                assert rows == [
                    {
                        "tenant": "acme", "device": None, "model": None, "rate": "100/s", "burst": 200,
                        "bytes_rate": "10MB/s", "bytes_burst": 50 * 2**20, "concurrency": 16,
                    },
                    {
                        "tenant": "acme", "device": "free", "model": None, "rate": None, "burst": None,
                        "bytes_rate": None, "bytes_burst": None, "concurrency": None,
                    },
                    {
                        "tenant": "other", "device": "*", "model": "other.triage", "rate": "5/min", "burst": None,
                        "bytes_rate": None, "bytes_burst": None, "concurrency": None,
                    },
                ]  # fmt: skip
                assert "5/min" in ask("quota", "show", "--tenant", "other").stdout
                acting = {"ISTHMUS_TENANT": "acme"}
                shown = command("quota", "show", "--json", *flags, **acting)
                assert {row["tenant"] for row in json.loads(shown.stdout)} == {"acme"}
                assert "5/min" in command("quota", "show", "--tenant", "other", *flags, **acting).stdout
                again = command("quota", "set", "--tenant", "acme", *limits, "--bytes-burst", "50MiB", *flags, **acting)
                assert again.returncode == 0, again.stderr
                typo = refused("quota", "set", "--tenant", "acme", "--rate", "fast", *flags)
                assert (typo.code, "100/s" in typo.error) == (2, True)
                unknown = refused("quota", "clear", "--tenant", "acme", "--model", "triage", *flags)
                assert (unknown.code, "tenant acme, model triage" in unknown.error) == (2, True)
                assert "isthmus quota show" in unknown.hint
                ask("quota", "clear", "--tenant", "acme", "--device", "free")
                assert json.loads(ask("usage", "--triton", "--json").stdout) == []
                trail = ask("audit", "search", "--action", "ClearQuota", "--device", "free", "--json").stdout
                assert "allowed" in {record["decision"] for record in json.loads(trail)}
                as_role("admin", "acme")
                lifted = refused("quota", "set", "--tenant", "acme", "--rate", "100000/s", *flags)
                assert (lifted.code, "default tenant" in lifted.error) == (4, True)
                as_role("operator", "acme")
                assert [row["tenant"] for row in json.loads(ask("quota", "show", "--json").stdout)] == ["acme"]
                for forbidden in (("quota", "clear", "--tenant", "acme"), ("usage", "--triton")):
                    denied = refused(*forbidden, *flags)
                    assert (denied.code, "access:admin" in denied.error) == (4, True)
                other = refused("usage", "--tenant", "other", *flags)
                assert (other.code, "admins of the cloud" in other.error) == (4, True)

            await asyncio.to_thread(all_of_it)

    asyncio.run(story())


def test_defaults_come_from_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "cloud.toml"
    file.write_text('[quotas.tenant]\nrate = "100/s"\nconcurrency = 3\n[quotas.device]\nbytes_rate = "1MB/s"\n')
    defaults = load_settings(CloudSettings, file, {}).value.quotas.defaults
    assert defaults.tenant.requests is not None
    assert (defaults.tenant.requests.burst, defaults.tenant.concurrency) == (100, 3)
    assert defaults.device.bytes is not None
    assert defaults.device.bytes.burst == 1_000_000
    assert defaults.model == UNLIMITED


@pytest.mark.parametrize(
    "text", ['[quotas.tenant]\nrate = "fast"', "[quotas.tenant]\nburst = 3", '[quotas.nobody]\nrate = "1/s"']
)
def test_defaults_that_cannot_be_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "cloud.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="quotas"):
        load_settings(CloudSettings, file, {})


def test_the_address_of_redis_is_not_shown(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CLOUD_REDIS", "rediss://isthmus:hunter2@redis.example:6379/0")
    shown = command("config", "show", "cloud", "--json")
    assert shown.returncode == 0
    assert "hunter2" not in shown.stdout + shown.stderr
    (row,) = [row for row in json.loads(shown.stdout) if row["setting"] == "redis"]
    assert row["from"] == "environment ISTHMUS_CLOUD_REDIS"
