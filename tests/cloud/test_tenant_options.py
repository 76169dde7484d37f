"""Every command that asks the cloud says in which tenant, or is for the whole cloud, whatever ISTHMUS_TENANT says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer.main

from cloud import access_cli, audit_cli, cli, connection, operator_cli, rollout_cli, traffic_cli, usage_cli
from isthmus.errors import ConfigError

APPS = {
    "role": access_cli.role_app,
    "apikey": access_cli.apikey_app,
    "audit": audit_cli.app,
    "cloud": cli.app,
    "model": operator_cli.model_app,
    "device": operator_cli.device_app,
    "rollout": rollout_cli.app,
    "traffic": traffic_cli.app,
    "quota": usage_cli.quota_app,
    "usage": usage_cli.usage_app,
}
WHOLE_CLOUD = ("traffic replicas", "traffic drain", "traffic resume", "audit head")


def commands() -> dict[str, Any]:
    """Return the commands that connect to the cloud, by how they are called."""
    found: dict[str, Any] = {}
    for name, app in APPS.items():
        made: Any = typer.main.get_command(app)
        found |= {f"{name} {sub}": command for sub, command in getattr(made, "commands", {"": made}).items()}
    return {
        name.strip(): command
        for name, command in found.items()
        if {"cloud", "token_file"} <= {parameter.name for parameter in command.params}
    }


def test_every_command_that_asks_the_cloud_takes_a_tenant() -> None:
    asking = commands()
    assert len(asking) > 30
    without = {name for name, command in asking.items() if "tenant" not in {p.name for p in command.params}}
    assert without == set(WHOLE_CLOUD)


@pytest.mark.parametrize("name", WHOLE_CLOUD)
def test_what_is_for_the_whole_cloud_is_asked_in_no_tenant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def loaded(_kind: Any, _file: Path | None, flags: dict[str, Any]) -> Any:
        seen.append(flags)
        raise ConfigError("seen")

    monkeypatch.setattr(connection, "load_settings", loaded)
    arguments = ["triton-1"] if name in ("traffic drain", "traffic resume") else []
    with pytest.raises(ConfigError, match="seen"):
        commands()[name].main(arguments, standalone_mode=False)
    assert seen[0]["tenant"] == ""
