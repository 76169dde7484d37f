"""The commands of `isthmus keys` with which holders of keys make, change and sign the roles of update metadata."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.errors import InputError
from isthmus.terminal import JsonOption, note, show_record
from security.rotation_cli import DirOption

if TYPE_CHECKING:
    from security.ceremony import Progress

app = typer.Typer()

RoleArgument = Annotated[str, typer.Argument(metavar="ROLE", help="root, targets, snapshot or timestamp.")]
KeyOption = Annotated[
    list[Path] | None,
    typer.Option("--key", help="A key file that is elsewhere, to sign with; repeat for more.", metavar="FILE"),
]
ThresholdOption = Annotated[int | None, typer.Option(help="How many of the role's keys must sign from now on.")]


@app.command("new")
def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Gets the private key; FILE.pub the public one.")],
    as_json: JsonOption = False,
) -> None:
    """Make an Ed25519 key pair, for a holder of a role; only the public half leaves the machine."""
    from security.ceremony import new_key_pair

    public = new_key_pair(file)
    if as_json:
        show_record("key", {"private": str(file), "public": str(public)}, as_json=True)
        return
    note(f"made {file} (keep it) and {public} (hand it to whoever runs isthmus keys add, rotate or delegate)")


@app.command("publisher")
def publisher(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Operator folder to make.")],
    name: Annotated[str, typer.Option(help="What the publisher is called.")],
    trust: Annotated[Path, typer.Option(help="The workspace's trust folder, which holds root.json.")],
    as_json: JsonOption = False,
) -> None:
    """Make the operator folder of somebody who will publish some models only."""
    from security.ceremony import new_publisher
    from security.keyfiles import read_file

    public = new_publisher(folder, name, read_file(trust / "root.json"))
    if as_json:
        show_record("publisher", {"publisher": name, "folder": str(folder), "public": str(public)}, as_json=True)
        return
    note(f"made {folder}; hand {public} to the operator, who runs isthmus keys delegate MODEL --name {name}")


@app.command("add")
def add(
    role: RoleArgument,
    public: Annotated[Path, typer.Option("--public", help="The new key's public half.", metavar="FILE")],
    folder: DirOption,
    threshold: ThresholdOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let one more key sign for ROLE: starts a new root, or changes the one that waits for signatures."""
    from security.ceremony import Ceremony, load_public_key

    _tell(Ceremony(folder, keys=key or ()).add(role, load_public_key(public), threshold), as_json=as_json)


@app.command("revoke")
def revoke(
    role: RoleArgument,
    keyid: Annotated[str, typer.Argument(metavar="KEYID", help="From keys show; its first characters will do.")],
    folder: DirOption,
    threshold: ThresholdOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a key no longer sign for ROLE: starts a new root, or changes the one that waits for signatures."""
    from security.ceremony import Ceremony

    _tell(Ceremony(folder, keys=key or ()).revoke(role, keyid, threshold), as_json=as_json)


@app.command("rotate")
def rotate(
    role: RoleArgument,
    public: Annotated[Path, typer.Option("--public", help="The new key's public half.", metavar="FILE")],
    folder: DirOption,
    old: Annotated[str | None, typer.Option(help="Which key it replaces, where ROLE has several.")] = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replace a key of ROLE by another: starts a new root, or changes the one that waits for signatures."""
    from security.ceremony import Ceremony, load_public_key

    _tell(Ceremony(folder, keys=key or ()).rotate(role, load_public_key(public), old), as_json=as_json)


@app.command("sign")
def sign(
    candidate: Annotated[Path, typer.Argument(metavar="FILE", help="The root that waits: candidate.root.json.")],
    key: Annotated[Path, typer.Option("--key", help="Your root key.", metavar="FILE")],
    as_json: JsonOption = False,
) -> None:
    """Add your signature to a root that waits for signatures, on your own machine."""
    from security.ceremony import sign_file

    progress = sign_file(candidate, key)
    if as_json:
        show_record("root", _record(progress), as_json=True)
        return
    note(f"root {progress.version} in {candidate} has {progress.signed} signatures")


@app.command("finish")
def finish(folder: DirOption, key: KeyOption = None, as_json: JsonOption = False) -> None:
    """Put the root that waits into force, once enough holders have signed; signs with the root keys that are here."""
    from security.ceremony import Ceremony

    _tell(Ceremony(folder, keys=key or ()).finish(), as_json=as_json)


@app.command("renew")
def renew(
    folder: DirOption,
    role: Annotated[str, typer.Option(help="root or targets.")] = "root",
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sign metadata anew before it expires; targets also after a rotation of its keys."""
    from security.ceremony import Ceremony

    ceremony = Ceremony(folder, keys=key or ())
    if role == "root":
        _tell(ceremony.renew(), as_json=as_json)
    elif role == "targets":
        _hand_over(ceremony.renew_targets(), as_json=as_json)
    else:
        raise InputError(f"--role: expected root or targets, got {role[:40]!r}", hint="the cloud renews the others")


@app.command("delegate")
def delegate(
    models: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name; may hold * and ?.")],
    name: Annotated[str, typer.Option(help="What the publisher is called.")],
    public: Annotated[list[Path], typer.Option("--public", help="A key of the publisher; repeat.", metavar="FILE")],
    folder: DirOption,
    threshold: Annotated[int, typer.Option(help="How many of the keys must sign.")] = 1,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a publisher publish MODEL with keys of their own, and nothing else."""
    from security.ceremony import Ceremony, load_public_key

    keys = [load_public_key(path) for path in public]
    _hand_over(Ceremony(folder, keys=key or ()).delegate(models, name, keys, threshold), as_json=as_json)


@app.command("undelegate")
def undelegate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The publisher.")],
    folder: DirOption,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take all models from a publisher: devices refuse what it published from then on."""
    from security.ceremony import Ceremony

    _hand_over(Ceremony(folder, keys=key or ()).undelegate(name), as_json=as_json)


def _record(progress: Progress) -> dict[str, Any]:
    return {
        "file": str(progress.file), "complete": progress.complete, "version": progress.version,
        "signed": progress.signed, "missing": progress.missing,
    }  # fmt: skip


def _tell(progress: Progress, *, as_json: bool) -> None:
    if as_json:
        show_record("root", _record(progress), as_json=True)
    elif progress.complete:
        _hand_over(progress.file, as_json=False)
    else:
        note(
            f"root {progress.version} has {progress.signed} signatures, {progress.missing} more are needed:\n"
            f"  each holder: isthmus keys sign {progress.file} --key KEY\n"
            f"  then here:   isthmus keys finish --dir {progress.file.parent.parent}"
        )


def _hand_over(file: Path, *, as_json: bool) -> None:
    if as_json:
        show_record("signed", {"file": str(file)}, as_json=True)
        return
    note(f"signed {file}\nNext: isthmus cloud accept {file}")
