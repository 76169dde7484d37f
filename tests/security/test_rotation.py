"""Keys follow one another by the clock: what signs, what verifies, what is left on the disk, what is printed."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from isthmus.errors import ConfigError, ConflictError, IdentityError
from security.authority import Authority, load_certificate, load_certificates, replace_issuing_ca
from security.cli import keys_app
from security.enrolment import IssuingCa, make_csr, new_device_key
from security.rotation import MAX_TTL, Schedule, rotate_token_keys
from security.signer import EDDSA, ES256
from security.tokens import TokenIssuer, create_token_issuer
from tests.security.conftest import NOW

HOUR = timedelta(hours=1)


class Clock:
    """The time that the issuer goes by."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now.timestamp()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=[EDDSA, ES256])
def cloud(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    create_token_issuer(tmp_path / "tokens", issuer="i", audience="a", algorithm=request.param)
    return tmp_path


def kids(issuer: TokenIssuer) -> list[str]:
    return [entry["kid"] for entry in json.loads(issuer.jwks)["keys"]]


def test_the_new_key_is_published_first_then_signs_and_the_old_one_verifies_as_long_as_a_token_lives(
    cloud: Path, clock: Clock
) -> None:
    issuer = TokenIssuer(cloud, clock=clock)
    old = issuer.kid
    longest, _ = issuer.mint("ann", "client", ttl=MAX_TTL, now=clock.now)
    rotate_token_keys(cloud / "tokens", clock.now, lead=HOUR)
    issuer.refresh()
    assert (issuer.kid, len(kids(issuer))) == (old, 2)
    clock.now += HOUR - timedelta(seconds=1)
    last, _ = issuer.mint("ann", "client", ttl=MAX_TTL, now=clock.now)  # the last one of the old key
    assert issuer.kid == old
    clock.now += timedelta(seconds=1)
    new = issuer.kid
    assert new != old
    assert TokenIssuer(cloud, clock=clock).kid == new  # as who starts now
    for token in (longest, last, issuer.mint("ann", "client", ttl=HOUR, now=clock.now)[0]):
        assert issuer.verifier(clock=clock).verify(token).subject == "ann"
    clock.now = NOW + HOUR + MAX_TTL - timedelta(seconds=1)
    assert issuer.verifier(clock=clock).verify(last).subject == "ann"
    clock.now += timedelta(seconds=10)
    assert kids(issuer) == [new]
    with pytest.raises(IdentityError) as refusal:
        issuer.verifier(clock=clock).verify(last)
    assert refusal.value.reason == "unknown-key"


def test_a_verifier_that_gets_new_keys_forgets_tokens_of_the_old_ones(cloud: Path, clock: Clock) -> None:
    issuer = TokenIssuer(cloud, clock=clock)
    verifier = issuer.verifier(clock=clock)
    token, _ = issuer.mint("ann", "client", ttl=HOUR, now=clock.now)
    assert verifier.verify(token).subject == "ann"
    rotate_token_keys(cloud / "tokens", clock.now, stolen=True)
    issuer.refresh()
    verifier.use_keys(issuer.jwks)
    with pytest.raises(IdentityError) as refusal:
        verifier.verify(token)
    assert refusal.value.reason == "unknown-key"
    fresh, _ = issuer.mint("ann", "client", ttl=HOUR, now=clock.now)
    assert verifier.verify(fresh).subject == "ann"


def test_keys_that_sign_no_more_leave_the_disk(cloud: Path, clock: Clock) -> None:
    tokens = cloud / "tokens"
    first = TokenIssuer(cloud, clock=clock).kid
    for _ in range(3):
        rotate_token_keys(tokens, clock.now, lead=HOUR)
        clock.now += 2 * HOUR
    schedule = Schedule.read(tokens / "issuer.json")
    left = {path.stem for path in tokens.glob("*.key")}
    assert first not in left
    assert schedule.signing(clock()).kid in left
    assert len(left) == 2  # the one that signed when the last rotation began, and its successor
    assert len(schedule.published(clock())) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in (*tokens.glob("*.key"), tokens / "issuer.json")} == {0o600}


def test_one_rotation_at_a_time_unless_the_key_was_stolen(cloud: Path, clock: Clock) -> None:
    rotate_token_keys(cloud / "tokens", clock.now, lead=HOUR)
    with pytest.raises(ConflictError, match="under way"):
        rotate_token_keys(cloud / "tokens", clock.now)
    after = rotate_token_keys(cloud / "tokens", clock.now, stolen=True)
    assert len(after.keys) == 1


def test_a_key_set_does_not_grow_beyond_what_can_be_read(cloud: Path, clock: Clock) -> None:
    for _ in range(31):
        rotate_token_keys(cloud / "tokens", clock.now, lead=timedelta(seconds=1))
        clock.now += timedelta(seconds=2)
    with pytest.raises(ConflictError, match="32"):
        rotate_token_keys(cloud / "tokens", clock.now)
    assert TokenIssuer(cloud, clock=clock).mint("ann", "client", ttl=HOUR, now=clock.now)


def _no_key(tokens: Path) -> None:
    for path in tokens.glob("*.key"):
        path.unlink()


def _no_set(tokens: Path) -> None:
    (tokens / "jwks.json").write_text('{"keys": []}')


def _no_issuer(tokens: Path) -> None:
    (tokens / "issuer.json").write_text("{")


def _another_key(tokens: Path) -> None:
    create_token_issuer(tokens.parent / "other" / "tokens", issuer="i", audience="a")
    other = next((tokens.parent / "other" / "tokens").glob("*.key"))
    for path in tokens.glob("*.key"):
        path.write_bytes(other.read_bytes())
    (tokens / "jwks.json").touch()


@pytest.mark.parametrize("damage", [_no_key, _no_set, _no_issuer, _another_key])
def test_files_that_do_not_fit_together_change_nothing_in_a_running_cloud(
    cloud: Path, clock: Clock, damage: Callable[[Path], None]
) -> None:
    issuer = TokenIssuer(cloud, clock=clock)
    before = issuer.jwks
    rotate_token_keys(cloud / "tokens", clock.now)
    damage(cloud / "tokens")
    issuer.refresh()
    assert issuer.jwks == before
    assert issuer.verifier(clock=clock).verify(issuer.mint("ann", "client", ttl=HOUR, now=clock.now)[0])
    with pytest.raises(ConfigError):
        TokenIssuer(cloud, clock=clock)


def test_a_new_issuing_authority_certifies_and_the_old_one_is_trusted_still(
    own_workspace: Path, tmp_path: Path
) -> None:
    cloud = own_workspace / "cloud"
    authority = IssuingCa.load(cloud)
    now = datetime.now(NOW.tzinfo)
    csr = make_csr(new_device_key(tmp_path / "device.key"), "", [])
    old = load_certificate(cloud / "issuing-ca.pem")
    replace_issuing_ca(Authority.load(own_workspace / "operator", "ca"), cloud, now)
    authority.refresh()
    (tmp_path / "chain.pem").write_bytes(authority.sign(csr, "camera-1", now))
    leaf, issuer = load_certificates(tmp_path / "chain.pem")
    new, kept = load_certificates(cloud / "issuing-ca.pem")
    assert (issuer, kept) == (new, old)
    leaf.verify_directly_issued_by(new)
    new.verify_directly_issued_by(load_certificate(own_workspace / "trust" / "ca.pem"))
    replace_issuing_ca(Authority.load(own_workspace / "operator", "ca"), cloud, old.not_valid_after_utc)
    assert old not in load_certificates(cloud / "issuing-ca.pem")  # it has expired


@pytest.mark.parametrize("command", ["rotate-server", "rotate-issuing", "rotate-tokens"])
def test_no_command_prints_a_private_key_or_leaves_one_readable(own_workspace: Path, command: str) -> None:
    cloud = own_workspace / "cloud"
    arguments = [
        command,
        str(cloud),
        *(("--dir", str(own_workspace / "operator")) if command != "rotate-tokens" else ()),
    ]
    before = {path: path.read_bytes() for path in cloud.rglob("*.key")}
    for form in ((), ("--json",)):
        shown = CliRunner().invoke(
            keys_app, [*arguments, *form, *(("--stolen",) if command == "rotate-tokens" else ())]
        )
        assert shown.exit_code == 0, shown.output
        secrets = ["".join(path.read_text().splitlines()[1:-1]) for path in cloud.rglob("*.key")]
        printed = shown.output.replace("\n", "")
        assert not [secret for secret in secrets if secret[-24:] in printed or secret[24:48] in printed]
    assert {path: path.read_bytes() for path in cloud.rglob("*.key")} != before
    assert {stat.S_IMODE(path.stat().st_mode) for path in own_workspace.rglob("*.key")} == {0o600}


def test_a_server_certificate_keeps_its_hosts(own_workspace: Path) -> None:
    cloud = own_workspace / "cloud"
    before = load_certificate(cloud / "server.pem")
    done = CliRunner().invoke(
        keys_app, ["rotate-server", str(cloud), "--dir", str(own_workspace / "operator"), "--json"]
    )
    after = load_certificate(cloud / "server.pem")
    assert json.loads(done.output)["serial"] == f"{after.serial_number:x}"
    names = [c.extensions.get_extension_for_class(x509.SubjectAlternativeName).value for c in (before, after)]
    assert names[0] == names[1]
    assert after.serial_number != before.serial_number
    assert Authority.load(cloud, "server")
