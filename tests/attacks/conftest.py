"""One cloud and one agent for all attacks on running servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attacks.stage import Stage, Target, running_stage


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_stage(tmp_path_factory.mktemp("attacked")) as running:
        yield running


@pytest.fixture(params=["cloud", "agent"])
def target(request: pytest.FixtureRequest, stage: Stage) -> Target:
    found: Target = getattr(stage, request.param)
    return found
