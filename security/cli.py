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
from security.rotation_cli import DirOption, rotate_issuing, rotate_server, rotate_tokens
from security.sealing_cli import app as sealing_app

if TYPE_CHECKING:
    from security.ceremony import Progress
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

RoleArgument = Annotated[str, typer.Argument(metavar="ROLE", help="root, targets, snapshot or timestamp.")]
KeyOption = Annotated[
    list[Path] | None,
    typer.Option("--key", help="A key file that is elsewhere, to sign with; repeat for more.", metavar="FILE"),
]
ThresholdOption = Annotated[int | None, typer.Option(help="How many of the role's keys must sign from now on.")]
_NEXT_STEPS: Final = """\
Made the workspace {root}:
  {root}/operator  keep offline: signs models and certificates. Back it up; nothing can replace it.
  {root}/cloud     copy to the machine that runs `isthmus cloud serve`.
  {root}/trust     public: copy to every device and operator.

Next:
  isthmus cloud serve --home {root}/cloud{listen}
  isthmus token mint --home {root}/cloud --role operator --subject YOU --ttl 12h --output operator.token
  isthmus device invite DEVICE --cloud {host}:{port} --trust {root}/trust --token-file operator.token"""


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
) -> None:
    """Make a workspace: authorities, certificates, token and update keys.

    Your own authority in place of the private one: docs/keys.md says which files to replace.
    """
    from security.workspace import Holders, init_workspace

    holders = Holders(root_keys, root_threshold, targets_keys, targets_threshold)
    init_workspace(root, host, name, datetime.now(UTC), holders=holders, token_algorithm=signed)
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


@keys_app.command("new")
def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Gets the private key; FILE.pub the public one.")],
) -> None:
    """Make an Ed25519 key pair, for a holder of a role; only the public half leaves the machine."""
    from security.ceremony import new_key_pair

    public = new_key_pair(file)
    note(f"made {file} (keep it) and {public} (hand it to whoever runs isthmus keys add, rotate or delegate)")


@keys_app.command("publisher")
def publisher(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Operator folder to make.")],
    name: Annotated[str, typer.Option(help="What the publisher is called.")],
    trust: Annotated[Path, typer.Option(help="The workspace's trust folder, which holds root.json.")],
) -> None:
    """Make the operator folder of somebody who will publish some models only."""
    from security.ceremony import new_publisher
    from security.keyfiles import read_file

    public = new_publisher(folder, name, read_file(trust / "root.json"))
    note(f"made {folder}; hand {public} to the operator, who runs isthmus keys delegate MODEL --name {name}")


@keys_app.command("add")
def add(
    role: RoleArgument,
    public: Annotated[Path, typer.Option("--public", help="The new key's public half.", metavar="FILE")],
    folder: DirOption,
    threshold: ThresholdOption = None,
    key: KeyOption = None,
) -> None:
    """Let one more key sign for ROLE: starts a new root, or changes the one that waits for signatures."""
    from security.ceremony import Ceremony, load_public_key

    _tell(Ceremony(folder, keys=key or ()).add(role, load_public_key(public), threshold))


@keys_app.command("revoke")
def revoke(
    role: RoleArgument,
    keyid: Annotated[str, typer.Argument(metavar="KEYID", help="From keys show; its first characters will do.")],
    folder: DirOption,
    threshold: ThresholdOption = None,
    key: KeyOption = None,
) -> None:
    """Let a key no longer sign for ROLE: starts a new root, or changes the one that waits for signatures."""
    from security.ceremony import Ceremony

    _tell(Ceremony(folder, keys=key or ()).revoke(role, keyid, threshold))


@keys_app.command("rotate")
def rotate(
    role: RoleArgument,
    public: Annotated[Path, typer.Option("--public", help="The new key's public half.", metavar="FILE")],
    folder: DirOption,
    old: Annotated[str | None, typer.Option(help="Which key it replaces, where ROLE has several.")] = None,
    key: KeyOption = None,
) -> None:
    """Replace a key of ROLE by another: starts a new root, or changes the one that waits for signatures."""
    from security.ceremony import Ceremony, load_public_key

    _tell(Ceremony(folder, keys=key or ()).rotate(role, load_public_key(public), old))


@keys_app.command("sign")
def sign(
    candidate: Annotated[Path, typer.Argument(metavar="FILE", help="The root that waits: candidate.root.json.")],
    key: Annotated[Path, typer.Option("--key", help="Your root key.", metavar="FILE")],
) -> None:
    """Add your signature to a root that waits for signatures, on your own machine."""
    from security.ceremony import sign_file

    progress = sign_file(candidate, key)
    note(f"root {progress.version} in {candidate} has {progress.signed} signatures")


@keys_app.command("finish")
def finish(folder: DirOption, key: KeyOption = None) -> None:
    """Put the root that waits into force, once enough holders have signed; signs with the root keys that are here."""
    from security.ceremony import Ceremony

    _tell(Ceremony(folder, keys=key or ()).finish())


@keys_app.command("renew")
def renew(
    folder: DirOption,
    role: Annotated[str, typer.Option(help="root or targets.")] = "root",
    key: KeyOption = None,
) -> None:
    """Sign metadata anew before it expires; targets also after a rotation of its keys."""
    from security.ceremony import Ceremony

    ceremony = Ceremony(folder, keys=key or ())
    if role == "root":
        _tell(ceremony.renew())
    elif role == "targets":
        _hand_over(ceremony.renew_targets())
    else:
        raise InputError(f"--role: expected root or targets, got {role[:40]!r}", hint="the cloud renews the others")


@keys_app.command("delegate")
def delegate(
    models: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name; may hold * and ?.")],
    name: Annotated[str, typer.Option(help="What the publisher is called.")],
    public: Annotated[list[Path], typer.Option("--public", help="A key of the publisher; repeat.", metavar="FILE")],
    folder: DirOption,
    threshold: Annotated[int, typer.Option(help="How many of the keys must sign.")] = 1,
    key: KeyOption = None,
) -> None:
    """Let a publisher publish MODEL with keys of their own, and nothing else."""
    from security.ceremony import Ceremony, load_public_key

    keys = [load_public_key(path) for path in public]
    _hand_over(Ceremony(folder, keys=key or ()).delegate(models, name, keys, threshold))


@keys_app.command("undelegate")
def undelegate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The publisher.")],
    folder: DirOption,
    key: KeyOption = None,
) -> None:
    """Take all models from a publisher: devices refuse what it published from then on."""
    from security.ceremony import Ceremony

    _hand_over(Ceremony(folder, keys=key or ()).undelegate(name))


def _tell(progress: Progress) -> None:
    if progress.complete:
        _hand_over(progress.file)
    else:
        note(
            f"root {progress.version} has {progress.signed} signatures, {progress.missing} more are needed:\n"
            f"  each holder: isthmus keys sign {progress.file} --key KEY\n"
            f"  then here:   isthmus keys finish --dir {progress.file.parent.parent}"
        )


def _hand_over(file: Path) -> None:
    note(f"signed {file}\nNext: isthmus cloud accept {file}")


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
