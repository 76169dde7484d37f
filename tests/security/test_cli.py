"""`isthmus keys` and `isthmus token`, as a person or a script uses them."""

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from isthmus.errors import ConfigError, ConflictError, IdentityError, InputError
from security.ceremony import load_public_key
from security.cli import keys_app, token_app
from security.durations import format_duration, parse_duration
from security.tokens import TokenIssuer
from security.workspace import init_workspace


def _run(app: Any, *arguments: object, stdin: str = "") -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def _succeed(app: Any, *arguments: object, stdin: str = "") -> Result:
    result = _run(app, *arguments, stdin=stdin)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def test_init_makes_a_workspace_and_says_what_next(tmp_path: Path) -> None:
    result = _succeed(keys_app, "init", tmp_path / "w", "--host", "cloud.example.org", "--name", "acme")
    assert result.stdout == ""
    assert "keep offline" in result.stderr
    assert f"isthmus cloud serve --home {tmp_path / 'w'}/cloud --listen 0.0.0.0:8443" in result.stderr
    assert "--cloud cloud.example.org:8443" in result.stderr
    assert TokenIssuer.load(tmp_path / "w" / "cloud").audience == "isthmus://acme/cloud"
    with pytest.raises(ConflictError):
        raise _run(keys_app, "init", tmp_path / "w", "--host", "localhost").exception or AssertionError


def test_init_needs_a_host(tmp_path: Path) -> None:
    assert _run(keys_app, "init", tmp_path / "w").exit_code == 2
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("place", ["file/below", "/proc/nowhere/w"])
def test_init_where_no_folder_can_be_made_is_an_error_with_a_hint(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    error = _run(keys_app, "init", tmp_path / place, "--host", "localhost").exception
    assert isinstance(error, ConfigError)
    assert error.hint


def test_mint_says_where_it_cannot_write_before_it_mints(workspace: Path, tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "no" / "folder"):
        error = _run(
            token_app, "mint", "--home", workspace / "cloud", "--role", "client", "--subject", "a", "-o", output
        ).exception
        assert isinstance(error, InputError)
        assert "--output" in error.hint


def test_a_misspelt_role_gets_the_right_one(workspace: Path) -> None:
    error = _run(token_app, "mint", "--home", workspace / "cloud", "--role", "oprator", "--subject", "a").exception
    assert isinstance(error, InputError)
    assert error.hint == "did you mean operator?"


@pytest.mark.parametrize("text", ["nonsense", "\udcff\udcfe", "a" * 10_000])
def test_inspect_refuses_what_is_no_token(text: str) -> None:
    assert isinstance(_run(token_app, "inspect", text).exception, IdentityError)


def test_inspect_refuses_bytes_that_are_no_text() -> None:
    result = CliRunner().invoke(token_app, ["inspect", "-"], input=b"\xff\xfe\x00" * 9)
    assert isinstance(result.exception, IdentityError)
    assert "standard input" in result.exception.hint


def test_show_lists_keys_without_secrets(workspace: Path) -> None:
    record = json.loads(_succeed(keys_app, "show", workspace, "--json").stdout)
    rows = record["files"]
    assert [(role["role"], role["threshold"], len(role["keyids"])) for role in record["roles"]] == [
        ("root", 1, 1), ("targets", 1, 1), ("snapshot", 1, 1), ("timestamp", 1, 1),
    ]  # fmt: skip
    assert all(len(role["keyids"][0]) == 64 and role["expires"] > "20" for role in record["roles"])
    assert record["warnings"] == []
    by_file = {row["file"]: row for row in rows}
    assert by_file["cloud/server.pem"]["days_left"] == 396
    assert by_file["operator/root.key"]["algorithm"] == "Ed25519"
    table = _succeed(keys_app, "show", workspace).stdout
    secrets = [
        line
        for path in workspace.rglob("*.key")
        for line in path.read_text().splitlines()
        if not line.startswith("-----")
    ]
    assert secrets
    assert not any(secret in table or secret in json.dumps(record) for secret in secrets)


def test_a_minted_token_is_valid_and_inspected_without_its_signature(workspace: Path, issuer: TokenIssuer) -> None:
    minted = _succeed(
        token_app, "mint", "--home", workspace / "cloud", "--role", "client", "--subject", "ann",
        "--model", "triage", "--ttl", "15m",
    )  # fmt: skip
    token = minted.stdout.strip()
    claims = issuer.verifier().verify(token)
    assert claims.subject == "ann"
    assert claims.models == {"triage"}
    assert claims.scopes == {"infer"}
    shown = _succeed(token_app, "inspect", "-", "--home", workspace / "cloud", "--json", stdin=token + "\n")
    record = json.loads(shown.stdout)
    assert (record["sub"], record["models"], record["verified"]) == ("ann", ["triage"], "valid")
    assert token.split(".")[2] not in shown.output
    unverified = json.loads(_succeed(token_app, "inspect", token, "--json").stdout)
    assert unverified["verified"] == "not checked"


def test_a_token_file_is_private_and_can_be_renewed(workspace: Path, tmp_path: Path, issuer: TokenIssuer) -> None:
    path = tmp_path / "operator.token"
    command = ("mint", "--home", workspace / "cloud", "--role", "operator", "--subject", "ann", "--output", path)
    seen = set()
    for _ in range(2):
        result = _succeed(token_app, *command)
        token = path.read_text().strip()
        assert token not in result.output
        assert issuer.verifier().verify(token).subject == "ann"
        assert path.stat().st_mode & 0o777 == 0o600
        seen.add(token)
    assert len(seen) == 2


def test_json_of_mint_can_be_read_by_a_script(workspace: Path, issuer: TokenIssuer) -> None:
    result = _succeed(
        token_app, "mint", "--home", workspace / "cloud", "--role", "device", "--subject", "cam-1", "--json"
    )
    assert issuer.verifier().verify(json.loads(result.stdout)["token"]).subject == "cam-1"


def test_inspect_with_home_refuses_a_forged_token(workspace: Path, issuer: TokenIssuer) -> None:
    token, _ = issuer.mint("ann", "client", ttl=timedelta(minutes=1))
    forged = token[:-4] + ("AAAA" if token[-4:] != "AAAA" else "BAAA")
    with pytest.raises(IdentityError):
        raise _run(token_app, "inspect", forged, "--home", workspace / "cloud").exception or AssertionError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", timedelta(seconds=90)),
        ("15m", timedelta(minutes=15)),
        ("12h", timedelta(hours=12)),
        (" 30d ", timedelta(days=30)),
    ],
)
def test_durations(text: str, expected: timedelta) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["1s", "90s", "15m", "36h", "366d"])
def test_durations_are_written_as_they_are_read(text: str) -> None:
    assert format_duration(parse_duration(text)) == text


def test_a_token_that_lives_too_long_is_refused_in_the_words_of_the_option(workspace: Path) -> None:
    words = ("--home", workspace / "cloud", "--role", "client", "--subject", "a", "--ttl", "90d")
    assert "between 1s and 30d, got 90d" in str(_run(token_app, "mint", *words).exception)


def test_the_workspace_is_not_its_cloud_folder(workspace: Path) -> None:
    error = _run(token_app, "mint", "--home", workspace, "--role", "client", "--subject", "a").exception
    assert isinstance(error, ConfigError)
    assert error.hint == f"did you mean {workspace / 'cloud'}?"


@pytest.mark.parametrize("text", ["", "15", "m", "0h", "-1h", "1.5h", "1w", "1h30m", "1H", "9999999d", "١h"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match="15m, 12h or 30d"):
        parse_duration(text)


@pytest.mark.slow
def test_errors_reach_a_person_as_one_line_and_a_hint(workspace: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "isthmus", "token", "mint",
            "--home", str(workspace / "cloud"), "--role", "operator", "--subject", "ann", "--ttl", "1w",
        ],
        env={"PYTHONPATH": ".:proto", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == InputError.exit_code
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: expected a duration such as 90s, 15m, 12h or 30d, got '1w'",
        "hint: a whole number, then s, m, h or d",
    ]


def test_the_ceremony_by_hand(tmp_path: Path) -> None:
    """As docs/keys.md tells it: two of three root holders, and a publisher."""
    operator = tmp_path / "w" / "operator"
    _succeed(keys_app, "init", tmp_path / "w", "--host", "localhost", "--root-keys", 3, "--root-threshold", 2)
    (tmp_path / "stick").mkdir()
    for name in ("root-2.key", "root-3.key"):
        (operator / name).rename(tmp_path / "stick" / name)
    _succeed(keys_app, "new", tmp_path / "w" / "cloud" / "snapshot-2.key")
    public = tmp_path / "w" / "cloud" / "snapshot-2.pub"
    told = _succeed(keys_app, "rotate", "snapshot", "--public", public, "--dir", operator).stderr
    assert "1 more are needed" in told
    candidate = operator / "tuf" / "candidate.root.json"
    _succeed(keys_app, "sign", candidate, "--key", tmp_path / "stick" / "root-3.key")
    told = _succeed(keys_app, "finish", "--dir", operator).stderr
    assert f"isthmus cloud accept {operator / 'tuf' / '2.root.json'}" in told
    two = ("--key", tmp_path / "stick" / "root-2.key")
    _succeed(keys_app, "renew", "--dir", operator, *two)
    _succeed(keys_app, "add", "targets", "--public", public, "--dir", operator, *two)
    keyid = load_public_key(public).keyid
    _succeed(keys_app, "revoke", "targets", keyid[:12], "--dir", operator, *two)
    assert (operator / "tuf" / "5.root.json").exists()
    _succeed(keys_app, "renew", "--role", "targets", "--dir", operator)
    assert isinstance(_run(keys_app, "renew", "--role", "snapshot", "--dir", operator).exception, InputError)

    _succeed(keys_app, "publisher", tmp_path / "alice", "--name", "alice", "--trust", tmp_path / "w" / "trust")
    alice = tmp_path / "alice" / "publisher-alice.pub"
    _succeed(keys_app, "delegate", "line-*", "--name", "alice", "--public", alice, "--dir", operator)
    shown = _succeed(keys_app, "show", tmp_path / "w").stdout
    assert "publisher-alice" in shown
    assert "2 of 3" in shown
    shutil.copytree(operator, tmp_path / "offline" / "operator")  # a machine without the cloud's folder
    told = json.loads(_succeed(keys_app, "show", tmp_path / "offline", "--json").stdout)["roles"]
    assert {"alice"} == {role["role"].removeprefix("publisher-") for role in told if role["models"] == ["line-*"]}
    expiries = {role["role"]: role["expires"] for role in told}
    assert expiries["root"]
    assert expiries["targets"]
    assert expiries["timestamp"] is None
    _succeed(keys_app, "undelegate", "alice", "--dir", operator)
    assert "publisher-alice" not in _succeed(keys_app, "show", tmp_path / "w").stdout


def test_the_ceremony_by_a_script(tmp_path: Path) -> None:
    """Each step says what it made, so that the next one needs no parsing of what is said to people."""

    def told(*arguments: object) -> dict[str, Any]:
        result = _succeed(keys_app, *arguments, "--json")
        assert result.stderr == ""
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer

    made = told("init", tmp_path / "w", "--host", "localhost", "--root-keys", 2, "--root-threshold", 2)
    operator = Path(made["operator"])
    stick = tmp_path / "root-2.key"
    (operator / "root-2.key").rename(stick)
    key = told("new", tmp_path / "targets-2.key")
    begun = told("add", "targets", "--public", key["public"], "--dir", operator)
    assert (begun["complete"], begun["version"], begun["signed"], begun["missing"]) == (False, 2, 1, 1)
    signed = told("sign", begun["file"], "--key", stick)
    assert signed["signed"] == 2
    done = told("finish", "--dir", operator)
    assert (done["complete"], Path(done["file"]).name) == (True, "2.root.json")
    both = ("--dir", operator, "--key", stick)
    assert told("rotate", "targets", "--public", told("new", tmp_path / "3.key")["public"], "--old",
                load_public_key(Path(key["public"])).keyid, *both)["complete"]  # fmt: skip
    gone = load_public_key(tmp_path / "3.pub").keyid
    assert told("revoke", "targets", gone, *both)["version"] == 4
    assert told("renew", *both)["version"] == 5
    assert Path(told("renew", "--role", "targets", "--dir", operator)["file"]).name == "targets.json"
    publisher = told("publisher", tmp_path / "alice", "--name", "alice", "--trust", made["trust"])
    delegated = told("delegate", "line-*", "--name", "alice", "--public", publisher["public"], "--dir", operator)
    assert Path(delegated["file"]).is_file()
    assert told("undelegate", "alice", "--dir", operator) == delegated


def test_show_warns_of_what_ends_soon(tmp_path: Path) -> None:
    init_workspace(tmp_path / "w", ["localhost"], "acme", datetime.now(UTC) - timedelta(days=330))
    told = _succeed(keys_app, "show", tmp_path / "w").stderr
    assert "targets.json" in told
    assert "expires in" in told
