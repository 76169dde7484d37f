"""What all tests share, done before anything imports grpc or OpenVINO, as the programs do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Final

import pytest
import structlog

from isthmus import tls13
from isthmus.privacy import forbid_usage_reports

TOGETHER: Final = "tests/e2e/"  # for one worker: these files share a story that takes minutes

tls13.enforce()
forbid_usage_reports()
os.environ.pop("COLUMNS", None)  # how wide tables are is no matter of the terminal; workers are told 80


@pytest.fixture(autouse=True)
def _log_of_its_own() -> Iterator[None]:
    """Undo what a command that ran in this process set up: its log goes to a standard error that was captured."""
    yield
    structlog.reset_defaults()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Let each of several workers take a whole file at a time: what fixtures make for it is made once."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            return TOGETHER if nodeid.startswith(TOGETHER) else str(super()._split_scope(nodeid))

    config.option.loadscopereorder = False  # by the number of tests, which says little of the time
    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give workers the slow files first: a long one that begins last would keep all but one of them waiting."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (not item.nodeid.startswith(TOGETHER), item.path not in slow))
