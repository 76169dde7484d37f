"""`isthmus audit` as people run it on a folder: verify, search, export, heads, another key."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isthmus.cli import main
from security.audit.keys import load_audit_key, load_public_keys
from security.audit.writer import AuditLog
from tests.security.audit.logs import fill

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A cloud's folder with a log."""
    home = tmp_path / "cloud"
    (home / "state").mkdir(parents=True)
    record(home, 12)
    return home


def record(home: Path, count: int, first: int = 0) -> None:
    key = load_audit_key(home)
    log = AuditLog(home / "state" / "audit", key, keys=load_public_keys(home / "audit.pub"))
    fill(log, count, first)
    log.close()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["isthmus", "audit", *map(str, words)])
        with pytest.raises(SystemExit) as raised:
            main()
        printed = capsys.readouterr()
        code = raised.value.code
        return (code if isinstance(code, int) else 0), printed.out, printed.err

    return call


def test_a_sound_log_is_said_to_be(home: Path, run: Run) -> None:
    code, out, _ = run("verify", "--home", home)
    assert code == 0
    assert "yes" in out
    told: dict[str, Any] = json.loads(run("verify", "--home", home, "--json")[1])
    assert told["sound"] is True
    assert told["chains"][0]["records"] == 15


def test_what_is_wrong_is_named_and_the_exit_code_says_so(home: Path, run: Run) -> None:
    (file,) = (home / "state" / "audit").glob("*.jsonl")
    file.write_bytes(file.read_bytes().replace(b"press-5", b"press-6", 1))
    code, out, err = run("verify", "--home", home)
    assert code == 5
    assert "no" in out
    assert "was edited at record 6" in err
    assert f"({file.name}, line 7)" in err
    code, out, _ = run("verify", "--home", home, "--json")
    problem = json.loads(out)["chains"][0]["problem"]
    assert (code, problem["kind"], problem["seq"]) == (5, "edited", 6)


def test_a_copy_is_verified_with_keys_from_elsewhere_and_a_head_that_was_kept(
    home: Path, tmp_path: Path, run: Run
) -> None:
    kept = tmp_path / "head.json"
    assert run("head", "--home", home, "--output", kept)[0] == 0
    record(home, 3, first=20)
    log, keys = home / "state" / "audit", home / "audit.pub"
    assert run("verify", "--folder", log, "--keys", keys, "--head", kept)[0] == 0
    (file,) = log.glob("*.jsonl")
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:5]))
    assert run("verify", "--folder", log, "--keys", keys, "--head", kept)[0] == 5
    assert run("verify", "--folder", log)[0] == 2  # no keys
    assert run("verify")[0] == 2
    assert run("verify", "--folder", tmp_path / "nowhere", "--keys", keys)[0] == 2


def test_search_finds_by_every_field(home: Path, run: Run) -> None:
    def found(*words: object) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(run("search", "--home", home, "--json", *words)[1])
        return rows

    assert [row["device"] for row in found("--device", "press-3")] == ["press-3"]
    assert {row["subject"] for row in found("--subject", "operator-1")} == {"operator-1"}
    assert len(found("--action", "pin", "--since", "1h")) == 12
    assert len(found("--action", "pin", "--limit", 2)) == 2
    assert found("--action", "pin", "--until", "2020-01-01") == []
    assert found("--model", "other") == []
    assert "press-3" in run("search", "--home", home)[1]
    assert run("search", "--home", home, "--since", "yesterday")[0] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--decision", "refuse"), "--decision: expected one of allowed, done, failed, refused"),
        (("--since", "yesterday"), "--since: expected a time such as 15m"),
    ],
)
def test_what_nothing_can_match_is_refused(home: Path, run: Run, words: tuple[str, ...], said: str) -> None:
    code, _, complaint = run("search", "--home", home, *words)
    assert code == 2
    assert said in complaint


def test_export_writes_the_lines_of_the_log(home: Path, tmp_path: Path, run: Run) -> None:
    output = tmp_path / "out.jsonl"
    assert run("export", "--home", home, "--output", output)[0] == 0
    (file,) = (home / "state" / "audit").glob("*.jsonl")
    assert output.read_bytes() == file.read_bytes()
    assert output.stat().st_mode & 0o777 == 0o600


def test_another_key_signs_and_both_are_trusted(home: Path, run: Run) -> None:
    key = json.loads(run("rotate-key", "--home", home, "--json")[1])["key"]
    record(home, 2, first=30)
    assert run("verify", "--home", home)[0] == 0
    assert key in (home / "state" / "audit" / next((home / "state" / "audit").glob("*.head")).name).read_text()
