"""The benchmark of the gateway: its callers and its floor do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gateway.__main__ import _answer, _ask, _process, _processor_time, _verify_us
from tests.cloud.workspaces import make_workspace

pytestmark = pytest.mark.slow


def test_callers_ask_the_echo_over_tls(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    key, certificate = str(workspace.home / "server.key"), str(workspace.home / "server.pem")
    with _process("echo", key, certificate) as echo, _process("callers") as callers:
        job = {
            "address": _answer(echo)["address"], "ca": str(workspace.trust / "ca.pem"), "token": "token",
            "request": "0a0141", "callers": 2, "seconds": 0.1,
        }  # fmt: skip
        ms = _ask(callers, job)
        assert len(ms) >= 20  # ten each at least
        assert all(0 < value < 10_000 for value in ms)
        echo.kill()
        echo.wait()
        with pytest.raises(SystemExit, match="failed"):
            _ask(callers, job)


def test_a_token_that_was_seen_is_looked_up(tmp_path: Path) -> None:
    assert 0 < _verify_us(make_workspace(tmp_path / "workspace")) < 100
    total, idle = _processor_time()
    assert 0 < idle < total
