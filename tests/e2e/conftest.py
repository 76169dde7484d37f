"""One site for the whole folder: real gateway, registry, Triton and agent, serving two tiny bundles."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from examples.quickstart.report import build_report
from examples.quickstart.steps import Run, run_story
from tests.e2e.tiny import TinyStory


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The whole story, run once: compile, trust, cloud, device, requests, update, outage."""
    build = tmp_path_factory.mktemp("story")
    run = Run(TinyStory(), build, Console(quiet=True), quiet_s=1.0, outage_s=1.5)
    run.facts["story"] = {"name": "tiny", "title": run.story.title, "licence": run.story.licence}
    run_story(run)
    return run


@pytest.fixture(scope="session")
def report(story: Run) -> dict[str, object]:
    """The report, computed from the raw rows of the story."""
    return build_report(story.folder)


@pytest.fixture(scope="session")
def bundles(story: Run) -> tuple[Path, Path]:
    """The two bundles that the story compiled."""
    return story.folder / "bundle-1", story.folder / "bundle-2"


@pytest.fixture
def free_of_servers(story: Run) -> Run:
    """The story after its end: all its servers must be gone."""
    for server in (story.site.cloud, story.site.agent):
        assert server is not None
        assert not server.alive()
    return story
