"""What the attacks share: a workspace, databases, and one running cloud and agent."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from security.workspace import init_workspace
from tests.attacks.stage import Stage, Target, running_stage
from tests.cloud.postgresql import PostgreSql, postgresql_server


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("attacks") / "workspace"
    init_workspace(root, ["localhost", "127.0.0.1"], "acme", datetime.now(UTC))
    return root


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSql]:
    with postgresql_server(tmp_path_factory.mktemp("postgresql")) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the address of an empty database of each kind that several clouds may share."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'isthmus.db'}"
    return str(request.getfixturevalue("postgresql").new_database())


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_stage(tmp_path_factory.mktemp("attacked")) as running:
        yield running


@pytest.fixture(params=["cloud", "agent"])
def target(request: pytest.FixtureRequest, stage: Stage) -> Target:
    found: Target = getattr(stage, request.param)
    return found
