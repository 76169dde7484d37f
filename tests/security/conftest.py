"""One workspace for all tests that only read it; tests that change one take a copy."""

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from security.tokens import TokenIssuer
from security.workspace import init_workspace

NOW = datetime(2030, 1, 1, 12, 0, 0, tzinfo=UTC)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace made at the wall clock's time, because TLS and tuf.ngclient read that."""
    root = tmp_path_factory.mktemp("security") / "workspace"
    init_workspace(root, ["localhost", "127.0.0.1", "cloud.example.org"], "acme", datetime.now(UTC))
    return root


@pytest.fixture
def own_workspace(workspace: Path, tmp_path: Path) -> Path:
    return shutil.copytree(workspace, tmp_path / "workspace")


@pytest.fixture(scope="session")
def issuer(workspace: Path) -> TokenIssuer:
    return TokenIssuer.load(workspace / "cloud")
