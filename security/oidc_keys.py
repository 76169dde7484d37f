"""The public keys of an external issuer: fetched over https in the background, kept until better ones are there.

Rules:
1. No request waits for a fetch. A key set is fetched at the start, every five minutes, and soon after a token came
   with a `kid` that is not in it; never more often than every ten seconds, whatever tokens come.
2. A fetch that fails changes nothing; the last good set is believed for a day after it was had, and not longer: a key
   that the issuer has taken back must not live on because the issuer cannot be reached.
3. A fetch is bounded in time and bytes, follows no redirect, and speaks TLS 1.3 with a verified certificate.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from isthmus.errors import ConfigError, IsthmusError, UnavailableError
from security.jws import refuse
from security.keyfiles import read_file

ALGORITHMS: Final = frozenset({"RS256", "ES256", "EdDSA"})
REFRESH_S: Final = 300.0
LEAST_S: Final = 10.0  # between two fetches
BELIEVED_S: Final = 86400.0
_TIMEOUT_S: Final = 5.0  # of one step of a fetch
_FETCH_S: Final = 15.0  # of the whole
_MAX_BYTES: Final = 256 << 10
_MAX_KEYS: Final = 64
_LEAST_RSA_BITS: Final = 2048

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where an issuer's keys are: an address or a file."""

    url: str
    file: Path | None
    ca_file: Path | None

    def read(self) -> bytes:
        """Return the key set as it is now; blocks.

        Raises:
            UnavailableError: It cannot be had.
            ConfigError: The file cannot be read.
        """
        if self.file is not None:
            return read_file(self.file)
        try:
            return self._fetch()
        except (OSError, ssl.SSLError, ValueError, urllib.error.URLError, http.client.HTTPException) as error:
            raise UnavailableError(f"cannot fetch {self.url}: {error}", reason="issuer-unavailable") from error

    def _fetch(self) -> bytes:
        context = ssl.create_default_context(cafile=None if self.ca_file is None else str(self.ca_file))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _NoRedirects)
        request = urllib.request.Request(self.url, headers={"Accept": "application/json"})  # noqa: S310 - https only
        until, data = time.monotonic() + _FETCH_S, b""
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            while chunk := answer.read1(16384):
                data += chunk
                if len(data) > _MAX_BYTES or time.monotonic() > until:
                    raise ValueError("the answer is too long, or too slow")
        return data


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_arguments: Any) -> None:
        """Follow none: the address is the one that the operator named."""
        return


class IssuerKeys:
    """The keys of one issuer; for one event loop, in which `run` keeps them current.

    Args:
        source: Where they are.
        name: Of the issuer, for logs.
        least_s: The shortest time between two fetches.
        clock: Returns Unix seconds.

    `heard_by` are called when `refresh` has found that the issuer took a key back.
    """

    def __init__(
        self, source: KeySource, name: str, *, least_s: float = LEAST_S, clock: Callable[[], float] = time.time
    ) -> None:
        self._source, self._name, self._least_s, self._clock = source, name, least_s, clock
        self._keys: dict[tuple[str, str], Any] = {}  # by kid and algorithm
        self._had_at: float | None = None
        self._wanted = asyncio.Event()
        self.heard_by: list[Callable[[], None]] = []

    def key(self, kid: Any, algorithm: str, now_s: float) -> Any:
        """Return the key with this id that goes with the algorithm.

        Raises:
            IdentityError: There is none; soon it will be looked for.
            UnavailableError: There are no keys at all, yet or any more.
        """
        if self._had_at is None or now_s - self._had_at > BELIEVED_S:
            self._wanted.set()
            raise UnavailableError("the issuer's keys are not here", reason="issuer-unavailable", hint="try again soon")
        key = self._keys.get((kid, algorithm)) if isinstance(kid, str) else None
        if key is None:
            self._wanted.set()
            raise refuse("the token is signed with a key that is not known", "unknown-key", hint="try again soon")
        return key

    async def run(self) -> None:
        """Fetch the keys now, in intervals and when they are wanted, until cancelled."""
        while True:
            self._wanted.clear()
            await self.refresh()
            await asyncio.sleep(self._least_s)
            try:
                await asyncio.wait_for(self._wanted.wait(), REFRESH_S - self._least_s)
            except TimeoutError:
                continue

    async def refresh(self) -> None:
        """Fetch the keys; keep the old ones when that fails."""
        before = self._keys
        await asyncio.to_thread(self.load)
        if any(self._keys.get(name) != key for name, key in before.items()):
            for hear in self.heard_by:
                hear()

    def load(self) -> None:
        """Fetch the keys; keep the old ones when that fails. Blocks; the new ones take the old ones' place at once."""
        try:
            keys = parse_keys(self._source.read())
        except IsthmusError as error:
            log.warning("keys of an issuer not fetched", issuer=self._name, reason=error.reason, error=error.message)
            return
        if keys.keys() != self._keys.keys():
            log.info("keys of an issuer", issuer=self._name, kids=sorted({kid for kid, _ in keys}))
        self._keys, self._had_at = keys, self._clock()


def parse_keys(data: bytes) -> dict[tuple[str, str], Any]:
    """Return the signing keys of a JSON Web Key Set by id and algorithm; what is of another kind is left out.

    Raises:
        ConfigError: It is no key set, or holds no key that could be used.
    """
    try:
        entries = json.loads(data)["keys"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError("expected a JSON Web Key Set with a list of keys", reason="bad-keys") from error
    if not isinstance(entries, list) or len(entries) > _MAX_KEYS:
        raise ConfigError(f"expected a JSON Web Key Set of at most {_MAX_KEYS} keys", reason="bad-keys")
    found = [parsed for entry in entries if (parsed := _parse(entry)) is not None]
    if not found:
        raise ConfigError("the key set has no key that could verify a token", reason="bad-keys")
    return dict(found)


def _parse(entry: Any) -> tuple[tuple[str, str], Any] | None:
    if not isinstance(entry, Mapping) or "d" in entry or entry.get("use", "sig") != "sig":
        return None
    kid = entry.get("kid")
    algorithm = {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}.get(str(entry.get("kty")))
    if not isinstance(kid, str) or not kid or algorithm is None or entry.get("alg", algorithm) != algorithm:
        return None
    try:
        key = jwt.PyJWK(dict(entry), algorithm=algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    return ((kid, algorithm), key) if _is_fit(key) else None


def _is_fit(key: Any) -> bool:
    match key:
        case rsa.RSAPublicKey():
            return key.key_size >= _LEAST_RSA_BITS
        case ec.EllipticCurvePublicKey():
            return isinstance(key.curve, ec.SECP256R1)
        case _:
            return isinstance(key, ed25519.Ed25519PublicKey)
