"""`isthmus keys rotate-…`: new keys for a running cloud. No secret is printed."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.terminal import JsonOption, note, show_record, show_table

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

DirOption = Annotated[Path, typer.Option("--dir", help="The workspace's operator folder.", metavar="DIR")]


def rotate_server(
    home: Annotated[Path, typer.Argument(metavar="CLOUD", help="The workspace's cloud folder, or a copy of it.")],
    folder: DirOption,
    host: Annotated[
        list[str] | None, typer.Option("--host", help="DNS name or IP address; repeat. Default: as before.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Give the cloud a new TLS key and certificate; a running cloud takes them up and drops no connection."""
    from security.authority import Authority, replace_server_certificate

    certificate = replace_server_certificate(Authority.load(folder, "ca"), home, host or [], datetime.now(UTC))
    _show_certificate(home / "server.pem", certificate, as_json=as_json)


def rotate_issuing(
    home: Annotated[Path, typer.Argument(metavar="CLOUD", help="The workspace's cloud folder, or a copy of it.")],
    folder: DirOption,
    as_json: JsonOption = False,
) -> None:
    """Let a new authority certify devices; what the one before has certified stays good until it expires."""
    from security.authority import Authority, replace_issuing_ca

    certificate = replace_issuing_ca(Authority.load(folder, "ca"), home, datetime.now(UTC))
    _show_certificate(home / "issuing-ca.pem", certificate, as_json=as_json)


def rotate_tokens(
    home: Annotated[Path, typer.Argument(metavar="CLOUD", help="The workspace's cloud folder.")],
    lead: Annotated[
        str, typer.Option(help="How long verifiers have to learn the new key; longer than a device's token lives.")
    ] = "1h",
    stolen: Annotated[
        bool, typer.Option("--stolen", help="The keys so far, and all their tokens, count for nothing at once.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Let a new key sign tokens; both are published until the last token of the old one has expired."""
    from security.durations import parse_duration
    from security.rotation import rotate_token_keys

    schedule = rotate_token_keys(home / "tokens", datetime.now(UTC), lead=parse_duration(lead), stolen=stolen)
    rows = [
        {"key": term.kid, "signs_from": _instant(term.signs_from), "verifies_until": _instant(term.verifies_until)}
        for term in schedule.keys
    ]
    show_table("Token keys", rows, as_json=as_json)
    if stolen:
        note("devices get new tokens by themselves; everybody else needs one: isthmus token mint")


def _show_certificate(file: Path, certificate: Certificate, *, as_json: bool) -> None:
    record = {
        "file": str(file),
        "serial": f"{certificate.serial_number:x}",
        "expires": certificate.not_valid_after_utc.isoformat(),
    }
    show_record("Certificate", record, as_json=as_json)


def _instant(seconds: int | None) -> str | None:
    return datetime.fromtimestamp(seconds, UTC).isoformat() if seconds else None
