"""What all tests share, done before anything imports grpc or OpenVINO, as the programs do."""

from collections.abc import Iterator

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
