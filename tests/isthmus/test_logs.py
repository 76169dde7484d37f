"""Logs: JSON lines for machines, text for people, and no local variables in either."""

from __future__ import annotations

import json
import re
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


HOSTILE = "cam\n2026-01-01 [info] all is well \x1b[2K\x1b[1A\x1b]0;x\x07\x9b31m\r\u2028\u202e" + "x" * 10_000


@pytest.mark.parametrize("as_json", [True, False])
def test_nothing_that_others_send_can_begin_a_line_or_speak_to_the_terminal(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(json=as_json)
    log = structlog.get_logger("test")
    log.info("device invited", device=HOSTILE, models=[HOSTILE, 1], more={HOSTILE: (HOSTILE,)}, by=None)
    with structlog.contextvars.bound_contextvars(request_id=HOSTILE):
        log.info("refused")
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == len(shown.split("\n")) - 1 == 2
    lines = re.sub(r"\x1b\[\d*m", "", shown).split("\n")  # the colours that the renderer itself writes
    assert all(line.isprintable() for line in lines)
    assert all(len(line) < 40_000 for line in lines)
    assert "cam" in shown
