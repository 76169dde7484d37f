"""Logs: JSON lines for machines, text for people, and no local variables in either."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import structlog

from isthmus import logs


@pytest.fixture(autouse=True)
def usual_logs() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def fail_with(secret: str) -> None:
    token = f"token-{secret}"
    raise ValueError(f"wrong length {len(token)}")


@pytest.mark.parametrize("as_json", [True, False])
def test_a_traceback_shows_no_local_variables(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=as_json)
    try:
        fail_with("".join(["s3", "cret"]))
    except ValueError:
        structlog.get_logger("test").exception("internal error")
    shown = capsys.readouterr().err
    assert "wrong length" in shown
    assert "s3cret" not in shown


def test_json_lines_carry_level_time_and_request_id(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="warning", json=True)
    log = structlog.get_logger("test")
    with structlog.contextvars.bound_contextvars(request_id="r-1"):
        log.info("not shown")
        log.warning("shown", model="m")
    (line,) = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert (told["event"], told["level"], told["request_id"], told["model"]) == ("shown", "warning", "r-1", "m")
    assert told["timestamp"].endswith("Z")


@pytest.mark.parametrize("as_json", [True, False])
def test_values_write_no_lines_and_no_control_characters(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=as_json)
    structlog.get_logger("test").warning("refused", model="a\n2030-01-01 [info] forged\x1b[2J\r\x00\u2028\u202e")
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    assert "forged" in shown
    assert not [part for part in ("\x1b[2J", "\r", "\x00", "\u202e") if part in shown]
