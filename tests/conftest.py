"""What all tests share, done before anything imports grpc or OpenVINO, as the programs do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from isthmus import tls13
from isthmus.privacy import forbid_usage_reports

tls13.enforce()
forbid_usage_reports()


@pytest.fixture(autouse=True)
def _log_of_its_own() -> Iterator[None]:
    """Undo what a command that ran in this process set up: its log goes to a standard error that was captured."""
    yield
    structlog.reset_defaults()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Let each of several workers take a whole file at a time: what a file's fixtures make is made once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # by the number of tests, which says little of the time
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give workers the slow files first: a long one that begins last would keep all but one of them waiting."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)
