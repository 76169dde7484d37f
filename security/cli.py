"""`isthmus keys` and `isthmus token`: parse, call, print. No secret is printed, but a token that was asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from isthmus.errors import InputError
from isthmus.terminal import JsonOption, note, show_record, show_table
from security.ceremony_cli import app as ceremony_app
from security.rotation_cli import rotate_issuing, rotate_server, rotate_tokens
from security.sealing_cli import app as sealing_app

if TYPE_CHECKING:
    from security.workspace import Entry

keys_app = typer.Typer(no_args_is_help=True, help="Create and inspect the keys and certificates of a workspace.")
keys_app.add_typer(sealing_app, name="sealing")
token_app = typer.Typer(no_args_is_help=True, help="Mint and inspect access tokens.")

_PORT: Final = 8443
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
# How long before its end a file is worth a warning; what the cloud renews by itself is not.
_SOON_DAYS: Final = {"update root": 90, "update targets": 60, "cloud's TLS identity": 30, "certifies devices": 90}
_SOON_PUBLISHER_DAYS: Final = 60
_PUBLISHED: Final = "update publisher-"

_NEXT_STEPS: Final = """\
Made the workspace {root}:
  {root}/operator  keep offline: signs models and certificates. Back it up; nothing can replace it.
  {root}/cloud     copy to the machine that runs `isthmus cloud serve`.
  {root}/trust     public: copy to every device and operator.

Next:
  isthmus cloud serve --home {root}/cloud{listen}
  isthmus token mint --home {root}/cloud --role operator --subject YOU --ttl 12h --output operator.token
  isthmus device invite DEVICE --cloud {host}:{port} --trust {root}/trust --token-file operator.token"""


keys_app.add_typer(ceremony_app)
keys_app.command("rotate-server")(rotate_server)
keys_app.command("rotate-issuing")(rotate_issuing)
keys_app.command("rotate-tokens")(rotate_tokens)


@keys_app.callback()
def keys() -> None:
    """Keep `keys` a group."""


@keys_app.command("init")
def init(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make; must not exist or be empty.")],
    host: Annotated[
        list[str], typer.Option("--host", help="DNS name or IP address of the cloud; repeat for more.", metavar="NAME")
    ],
    name: Annotated[str, typer.Option("--name", help="Your organisation, for certificates and tokens.")] = "isthmus",
    root_keys: Annotated[int, typer.Option(help="Keys of the update root, one for each holder.")] = 1,
    root_threshold: Annotated[int, typer.Option(help="How many of them must sign.")] = 1,
    targets_keys: Annotated[int, typer.Option(help="Keys that sign manifests, one for each holder.")] = 1,
    targets_threshold: Annotated[int, typer.Option(help="How many of them must sign.")] = 1,
    signed: Annotated[
        str, typer.Option("--token-algorithm", help="What tokens are signed with: EdDSA or ES256.")
    ] = "EdDSA",
    as_json: JsonOption = False,
) -> None:
    """Make a workspace: authorities, certificates, token and update keys.

    Your own authority in place of the private one: docs/keys.md says which files to replace.
    """
    from security.workspace import Holders, init_workspace

    holders = Holders(root_keys, root_threshold, targets_keys, targets_threshold)
    init_workspace(root, host, name, datetime.now(UTC), holders=holders, token_algorithm=signed)
    if as_json:
        made = {part: str(root / part) for part in ("operator", "cloud", "trust")}
        show_record("workspace", {"workspace": str(root), **made, "hosts": host}, as_json=True)
        return
    local = all(name in _LOOPBACK for name in host)
    listen = "" if local else f" --listen 0.0.0.0:{_PORT}"  # the default is reachable from this machine only
    note(_NEXT_STEPS.format(root=root, host=host[0], port=_PORT, listen=listen))


@keys_app.command("show")
def show(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="The workspace, or the part of one that is here.")],
    as_json: JsonOption = False,
) -> None:
    """List every key, certificate and metadata file: role, algorithm and expiry, never a secret."""
    from security.workspace import describe_workspace

    now = datetime.now(UTC)
    entries = describe_workspace(root)
    rows = [_row(entry, now) for entry in entries]
    operator = root if (root / "tuf").is_dir() else root / "operator"
    roles = _roles(operator, entries) if (operator / "tuf").is_dir() else []
    told = warnings(root, now)
    if as_json:
        show_record(f"Workspace {root}", {"files": rows, "roles": roles, "warnings": told}, as_json=True)
    else:  # what fits a narrow terminal: the file's suffix says the kind, the day is enough
        show_table(f"Workspace {root}", [{**_without(row, "kind"), "expires": _day(row)} for row in rows])
        if roles:
            show_table("Who signs", [_role_row(role) for role in roles])
    for text in told:
        note(text)


def _roles(operator: Path, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return who signs for what, with the expiry of what was signed last: what the cloud serves, or what is here."""
    from security.ceremony import Ceremony

    served = {entry.role: entry.expires_at for entry in entries if entry.kind == "metadata"}
    roles = []
    for row in Ceremony(operator).roles():
        until = served.get(f"update {row.role}", row.expires_at)
        roles.append(
            {
                "role": row.role,
                "threshold": row.threshold,
                "keyids": list(row.keyids),
                "models": [path.removesuffix("/*/manifest.json") for path in row.paths],
                "expires": None if until is None else until.isoformat(),
            }
        )
    return roles


def _role_row(role: dict[str, Any]) -> dict[str, Any]:
    return {
        "role": role["role"],
        "must sign": f"{role['threshold']} of {len(role['keyids'])}",
        "key ids": ", ".join(keyid[:12] for keyid in role["keyids"]),
        "models": ", ".join(role["models"]) or None,
        "expires": _day(role),
    }


def warnings(root: Path, now: datetime) -> list[str]:
    """Return what the keeper of a workspace should do soon."""
    from security.workspace import describe_workspace

    texts = []
    for entry in describe_workspace(root):
        if entry.expires_at is None:
            continue
        left = (entry.expires_at - now).days
        if left < 0:
            texts.append(f"expired: {entry.file}")
        elif left < _SOON_DAYS.get(entry.role, _SOON_PUBLISHER_DAYS if entry.role.startswith(_PUBLISHED) else -1):
            texts.append(f"expires in {left} days: {entry.file}")
    return texts


def _row(entry: Entry, now: datetime) -> dict[str, Any]:
    until = entry.expires_at
    return {
        "file": entry.file,
        "role": entry.role,
        "kind": entry.kind,
        "algorithm": entry.algorithm,
        "expires": None if until is None else until.isoformat(),
        "days_left": None if until is None else (until - now).days,
    }


def _without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


def _day(row: dict[str, Any]) -> str | None:
    return None if row["expires"] is None else str(row["expires"])[:10]


@token_app.callback()
def token() -> None:
    """Keep `token` a group."""


@token_app.command("mint")
def mint(
    home: Annotated[Path, typer.Option("--home", help="The workspace's cloud folder.", metavar="DIR")],
    role: Annotated[
        str,
        typer.Option(
            "--role",
            help="admin, operator, auditor, client or device; granted: what isthmus role grant says, at each call.",
        ),
    ],
    subject: Annotated[str, typer.Option("--subject", help="Whom the token is for.", metavar="NAME")],
    model: Annotated[
        list[str] | None, typer.Option("--model", help="A model that it allows; repeat for more. Default: all.")
    ] = None,
    tenant: Annotated[str, typer.Option("--tenant", help="Whose models and devices it shows.")] = "default",
    ttl: Annotated[str, typer.Option("--ttl", help="How long it is valid: 15m, 12h, 30d.")] = "1h",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it here (0600), not to stdout.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Mint an access token."""
    from security.durations import parse_duration
    from security.keyfiles import PRIVATE_MODE, replace_file
    from security.tenancy import DEFAULT_TENANT
    from security.tenants import tenants_of
    from security.tokens import ALL_MODELS, TokenIssuer

    issuer = TokenIssuer.load(home)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise InputError(f"cannot write {output}", hint="--output needs a file in a folder that exists")
    text, expires_at = issuer.mint(subject, role, models=model or [ALL_MODELS], ttl=parse_duration(ttl), tenant=tenant)
    record: dict[str, Any] = {"subject": subject, "role": role, "tenant": tenant, "expires": expires_at.isoformat()}
    if output is not None:
        replace_file(output, text.encode() + b"\n", mode=PRIVATE_MODE)
        record["file"] = str(output)
    elif as_json:
        record["token"] = text
    else:
        typer.echo(text)
    if as_json:
        show_record("Token", record, as_json=True)
        return
    if tenant not in (DEFAULT_TENANT, *tenants_of(home)):
        note(f"there is no tenant {tenant} in {home} yet: isthmus tenant add {tenant} DIR --home {home} --trust DIR")
    where = "" if output is None else f" in {output}"
    note(f"token for {subject} ({role}){where}, valid until {expires_at.isoformat()}")


@token_app.command("inspect")
def inspect(
    text: Annotated[str, typer.Argument(metavar="TOKEN", help="The token, or - to read it from standard input.")],
    home: Annotated[
        Path | None, typer.Option("--home", help="The workspace's cloud folder, to verify it, too.", metavar="DIR")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a token says, without its signature; with --home also whether it is valid."""
    from security.apikeys import is_api_key, prefix_of
    from security.jws import MAX_TOKEN_BYTES
    from security.tokens import TokenIssuer, describe_token

    value = (sys.stdin.buffer.read(MAX_TOKEN_BYTES + 1).decode("ascii", "replace") if text == "-" else text).strip()
    if is_api_key(value):
        note("an API key says nothing about itself: isthmus apikey list knows whose it is")
        show_record("API key", {"prefix": prefix_of(value)}, as_json=as_json)
        return
    record = describe_token(value)
    if home is None:
        record["verified"] = "not checked"
        note("not verified: --home DIR/cloud checks the signature, too")
    else:
        TokenIssuer.load(home).verifier().verify(value)
        record["verified"] = "valid"
    show_record("Token", record, as_json=as_json)
