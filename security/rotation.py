"""When each token key signs and how long it verifies, and the change from one to the next.

    rotate          signs_from of the new key            verifies_until of the old key
      │ both are published; the old one signs │ both are published; the new one signs │ the new one only

The first stretch is for verifiers to learn the new key; the second one is as long as the longest token lives. All of it
is in `issuer.json`, so programs that read it at different times agree, and a change takes effect by the clock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from isthmus.errors import ConfigError, ConflictError
from security.jws import EXPIRY_LEEWAY_S
from security.keyfiles import PRIVATE_MODE, make_private_folder, read_file, replace_file, save_private_key
from security.keyset import MAX_KEYS, public_jwk
from security.signer import ALGORITHMS, FileSigner, new_key

LEAD: Final = timedelta(hours=1)  # devices learn new keys with each token, which is every few minutes
MAX_TTL: Final = timedelta(days=30)  # of a token


@dataclass(frozen=True, slots=True)
class KeyTerm:
    """A token key's time, in Unix seconds; `verifies_until` is None while no other key is to follow it."""

    kid: str
    signs_from: int = 0
    verifies_until: int | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """What issuer.json says: who issues tokens for whom, with which algorithm, and its keys, oldest first."""

    issuer: str
    audience: str
    algorithm: str
    keys: tuple[KeyTerm, ...]

    @classmethod
    def read(cls, path: Path) -> Schedule:
        """Read issuer.json.

        Raises:
            ConfigError: It does not say what it should.
        """
        try:
            settings = json.loads(read_file(path, hint=_folder_hint(path.parent.parent)))
            texts = {name: settings[name] for name in ("issuer", "audience", "algorithm")}
            # Files of the release before rotation name one key.
            keys = tuple(_term(entry) for entry in settings.get("keys") or [{"kid": settings["kid"]}])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path}: expected issuer, audience, algorithm and keys") from error
        if not all(isinstance(value, str) for value in texts.values()):
            raise ConfigError(f"{path}: expected issuer, audience and algorithm to be text")
        if texts["algorithm"] not in ALGORITHMS:
            raise ConfigError(f"{path}: tokens are signed with {' or '.join(ALGORITHMS)}")
        if not 0 < len(keys) <= MAX_KEYS:
            raise ConfigError(f"{path}: expected 1 to {MAX_KEYS} keys")
        return cls(texts["issuer"], texts["audience"], texts["algorithm"], keys)

    def write(self, path: Path) -> None:
        """Write issuer.json, whole or not at all."""
        settings = {
            "issuer": self.issuer,
            "audience": self.audience,
            "algorithm": self.algorithm,
            "keys": [asdict(term) for term in self.keys],
        }
        replace_file(path, json.dumps(settings, indent=2).encode() + b"\n", mode=PRIVATE_MODE)

    def signing(self, now_s: float) -> KeyTerm:
        """Return the key that signs at a time."""
        begun = [term for term in self.keys if term.signs_from <= now_s]
        return max(begun or self.keys[:1], key=lambda term: term.signs_from)

    def published(self, now_s: float) -> tuple[KeyTerm, ...]:
        """Return the keys that verify at a time."""
        return tuple(term for term in self.keys if term.verifies_until is None or now_s < term.verifies_until)


def _folder_hint(home: Path) -> str:
    """Return what to say where a folder is no cloud folder: most often it is the workspace around one."""
    if (home / "cloud" / "tokens").is_dir():
        return f"did you mean {home / 'cloud'}?"
    return "it is in the cloud folder of a workspace: `isthmus keys init DIR --host NAME` makes DIR/cloud"


def _term(entry: Mapping[str, Any]) -> KeyTerm:
    term = KeyTerm(entry["kid"], entry.get("signs_from", 0), entry.get("verifies_until"))
    numbers = [value for value in (term.signs_from, term.verifies_until) if value is not None]
    if not isinstance(term.kid, str) or not all(type(value) is int for value in numbers):
        raise TypeError("expected a kid and whole seconds")
    if not term.kid.isalnum():  # it names a file
        raise ValueError("expected a kid of letters and digits")
    return term


def create_token_keys(folder: Path, *, issuer: str, audience: str, algorithm: str) -> None:
    """Create a new issuer with its first key.

    Raises:
        ConflictError: The folder holds an issuer already.
    """
    make_private_folder(folder)
    if (folder / "issuer.json").exists():
        raise ConflictError(f"{folder} holds a token issuer already", hint="isthmus keys rotate-tokens makes a new key")
    kid = _add_key(folder, algorithm, [])
    Schedule(issuer, audience, algorithm, (KeyTerm(kid),)).write(folder / "issuer.json")


def rotate_token_keys(folder: Path, now: datetime, *, lead: timedelta = LEAD, stolen: bool = False) -> Schedule:
    """Let a new key follow the one that signs, and return what is so from now on.

    Args:
        folder: The folder `tokens` of a workspace's cloud.
        now: The time.
        lead: How long verifiers have to learn the new key before it signs.
        stolen: Whether the keys so far may be in other hands: they count for nothing from now on, nor do their tokens.

    Raises:
        ConfigError: The folder holds no issuer.
        ConflictError: A rotation is under way already, or too many keys verify still.
    """
    path, now_s = folder / "issuer.json", int(now.timestamp())
    before = Schedule.read(path)
    if not stolen and (last := before.keys[-1]).signs_from > now_s:
        raise ConflictError(
            f"a rotation is under way already: {last.kid} signs in {last.signs_from - now_s} s",
            hint="--stolen replaces all keys at once",
        )
    signs_from = now_s if stolen else now_s + int(lead.total_seconds())
    until = signs_from + int(MAX_TTL.total_seconds()) + EXPIRY_LEEWAY_S
    kept: tuple[KeyTerm, ...] = ()
    if not stolen:
        signing = before.signing(now_s)
        kept = tuple(
            KeyTerm(term.kid, term.signs_from, until if term == signing else term.verifies_until)
            for term in before.published(now_s)
        )
    if len(kept) >= MAX_KEYS:
        raise ConflictError(
            f"{len(kept)} earlier keys verify still, and {MAX_KEYS} is the most that a key set holds",
            hint="an earlier key is left out 30 days after it signed last",
        )
    kid = _add_key(folder, before.algorithm, [term.kid for term in kept])
    after = Schedule(before.issuer, before.audience, before.algorithm, (*kept, KeyTerm(kid, signs_from)))
    after.write(path)
    signers = {kid, after.signing(now_s).kid}
    for file in folder.glob("*.key"):  # what only verifies needs no private key any more
        if file.stem not in signers:
            file.unlink()
    return after


def _add_key(folder: Path, algorithm: str, kept: Sequence[str]) -> str:
    """Make a key and publish it beside those that are kept; return its id."""
    key = new_key(algorithm)
    entry = public_jwk(key.public_key())
    save_private_key(folder / f"{entry['kid']}.key", key)
    published = folder / "jwks.json"
    old = json.loads(read_file(published))["keys"] if published.exists() else []
    entries = [*(known for known in old if known["kid"] in kept), entry]
    replace_file(published, json.dumps({"keys": entries}, indent=2).encode() + b"\n")
    return entry["kid"]


def load_signers(folder: Path, schedule: Schedule, now_s: float) -> dict[str, FileSigner]:
    """Return the keys that sign now or will, by their ids.

    Raises:
        ConfigError: A file is missing, or does not hold the key that its name promises.
    """
    current = schedule.signing(now_s)
    signers = {}
    for term in schedule.keys:
        if term.signs_from < current.signs_from:
            continue
        signer = FileSigner(folder / f"{term.kid}.key")
        if public_jwk(signer.public_key)["kid"] != term.kid or signer.algorithm != schedule.algorithm:
            raise ConfigError(f"{folder}: the key {term.kid} is not the one that its name promises")
        signers[term.kid] = signer
    return signers
