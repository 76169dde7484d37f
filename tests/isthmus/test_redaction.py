"""What looks like a secret does not leave the process in a log line."""

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


SECRETS = (
    "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJjYXJsIn0.c2lnbmF0dXJl",
    "isk_abcdefghij_Zm9vYmFyYmF6cXV4cXV1eGNvcmdlZ3JhdWx0",
    "k3Jx-0aQm_ZrT8yWvB1cD2eF3gH4iJ5k",  # an enrolment code
    "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA\n-----END PRIVATE KEY-----",
)


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("secret", SECRETS)
def test_what_looks_like_a_secret_is_not_logged(secret: str, as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=as_json)
    log = structlog.get_logger("test")
    log.info("event", given=secret, more=f"at {secret}", nested={"list": [secret]})
    try:
        raise ValueError(f"cannot read {secret}")
    except ValueError:
        log.exception("internal error")
    shown = capsys.readouterr().err
    assert max(secret.split("\n"), key=len) not in shown
    assert "eyJzdWIi" not in shown
    assert shown.count(logs.REDACTED) >= 3
    assert "cannot read" in shown


def test_fields_with_the_name_of_a_secret_are_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=True)
    structlog.get_logger("test").info("event", token="short", authorization="Bearer x", code="NOT_FOUND")
    told = json.loads(capsys.readouterr().err)
    assert (told["token"], told["authorization"], told["code"]) == (logs.REDACTED, logs.REDACTED, "NOT_FOUND")


def test_digests_ids_and_names_are_left_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=True)
    told = {
        "sha256": "ab" * 32,
        "request_id": "0123456789abcdef0123456789abcdef",
        "device": "press-1",
        "model": "a.b.c",
    }
    structlog.get_logger("test").info("event", **told)
    assert told.items() <= json.loads(capsys.readouterr().err).items()
