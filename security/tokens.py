"""Access tokens: short-lived JWTs (RFC 7519, RFC 9068) that the cloud signs and every listener verifies offline.

The rules that `TokenVerifier` follows, after RFC 8725:

1. A token is at most 8 KiB; its header has `alg`, `kid` and `typ` and nothing else: no key, and no place to fetch one
   from, is ever taken from a token.
2. The algorithm, EdDSA or ES256, is the one of our own key set, which is configuration; the header must agree.
3. The key is the one in our own key set with the token's `kid`.
4. `iss aud sub exp nbf iat jti scope models` are all required, with the right types; issuer and audience match exactly.
5. Time comes from the clock that was handed in; small leeways cover clocks that disagree.
6. A token that passed is remembered until it expires, in a bounded table, so a request costs one look-up.

Devices prove who they are with assertions (`security.assertions`), which never pass for access tokens.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import jwt
import structlog

from isthmus.errors import ConfigError, InputError
from security.assertions import Assertion, make_assertion, read_assertion_subject, verify_assertion
from security.durations import format_duration
from security.jws import (
    EXPIRY_LEEWAY_S,
    LAST_TIME,
    MAX_TOKEN_BYTES,
    assemble,
    check_times,
    instant,
    read_header,
    refuse,
    text_claim,
    verified_claims,
    whole_seconds,
)
from security.keyfiles import read_file
from security.keyset import KeySet
from security.rotation import MAX_TTL, Schedule, create_token_keys, load_signers
from security.scopes import ACCESS_ADMIN, GRANTED, SCOPES_OF_ROLE
from security.signer import EDDSA
from security.tenancy import DEFAULT_TENANT, check_tenant

__all__ = [
    "Assertion",
    "Claims",
    "TokenIssuer",
    "TokenVerifier",
    "create_token_issuer",
    "describe_token",
    "make_assertion",
    "read_assertion_subject",
    "verify_assertion",
]

TYPE: Final = "at+jwt"  # RFC 9068 section 2.1
ALL_MODELS: Final = "*"
_FROM_FILE: Final = "a token in a file is read from standard input: isthmus token inspect - < FILE"
_THUMBPRINT_LENGTH: Final = 43  # 32 bytes as base64url without padding
_REQUIRED: Final = ("iss", "aud", "sub", "exp", "nbf", "iat", "jti", "scope", "models")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Claims:
    """What a verified access token says.

    `tenant` is whose models and devices the caller sees; `token_id` the token's `jti`; `thumbprint` the SHA-256
    (base64url, no padding) of the certificate that the token is bound to (RFC 8705 section 3.1), "" when to none.
    `models_by_scope` is set where scopes come from several grants, each for models of its own.
    """

    subject: str
    scopes: frozenset[str]
    models: frozenset[str]
    expires_at: datetime
    tenant: str = DEFAULT_TENANT
    token_id: str = ""
    thumbprint: str = ""
    models_by_scope: Mapping[str, frozenset[str]] | None = None

    def narrowed_to(self, scope: str) -> Claims:
        """Return the claims for a method that asks for `scope`: with the models that come with this scope only."""
        return self if self.models_by_scope is None else replace(self, models=self.models_by_scope[scope])

    @property
    def is_cloud_admin(self) -> bool:
        """Return whether it is of an admin of the cloud: of the default tenant, for all models."""
        by_scope = self.models_by_scope
        models = self.models if by_scope is None else by_scope.get(ACCESS_ADMIN, frozenset())
        return self.tenant == DEFAULT_TENANT and ACCESS_ADMIN in self.scopes and ALL_MODELS in models

    def may_use(self, model: str) -> bool:
        """Return whether the token allows this model."""
        return ALL_MODELS in self.models or model in self.models


class TokenVerifier:
    """Verifies access tokens with the issuer's public keys; for one event loop, not for threads.

    Args:
        jwks: The issuer's public keys (JSON Web Key Set).
        issuer: Whom tokens must be from.
        audience: Whom tokens must be for.
        clock: Seconds since the epoch.
        remembered: How many verified tokens are kept; the one unused for longest is forgotten first.

    `heard_by` are called after every change of keys.

    Raises:
        ConfigError: The key set cannot be used.
    """

    def __init__(
        self, jwks: bytes, issuer: str, audience: str, *, clock: Callable[[], float] = time.time, remembered: int = 4096
    ) -> None:
        self._keys = KeySet(jwks)
        self._issuer = issuer
        self._audience = audience
        self._clock = clock
        self._remembered = remembered
        self._verified: OrderedDict[str, tuple[float, Claims]] = OrderedDict()
        self.heard_by: list[Callable[[], None]] = []

    def use_keys(self, jwks: bytes) -> None:
        """Verify with these keys from now on; what was verified with one that is gone is forgotten.

        Raises:
            ConfigError: The key set cannot be used; the one before is kept.
        """
        self._keys = KeySet(jwks)
        self._verified.clear()
        for hear in self.heard_by:
            hear()

    def verify(self, token: str, at_s: float | None = None) -> Claims:
        """Return the claims of a valid token.

        Args:
            token: The token.
            at_s: When it has to be within its time; now when None.

        Raises:
            IdentityError: The token is missing, malformed, expired, or not signed for us by a known key; `reason` says
                which.
        """
        now_s = self._clock() if at_s is None else at_s
        known = self._verified.get(token)
        if known is not None and now_s < known[0]:
            self._verified.move_to_end(token)
            return known[1]
        self._verified.pop(token, None)
        claims = self._verify(token, now_s)
        self._verified[token] = (claims.expires_at.timestamp() + EXPIRY_LEEWAY_S, claims)
        if len(self._verified) > self._remembered:
            self._verified.popitem(last=False)
        return claims

    def _verify(self, token: str, now_s: float) -> Claims:
        algorithm = self._keys.algorithm
        header = read_header(token, algorithm=algorithm, kind=TYPE, names=("alg", "kid", "typ"))
        claims = verified_claims(
            token,
            self._keys.key(header["kid"]),
            algorithm=algorithm,
            issuer=self._issuer,
            audience=self._audience,
            required=_REQUIRED,
        )
        check_times(claims, now_s)
        return Claims(
            subject=text_claim(claims, "sub"),
            scopes=frozenset(text_claim(claims, "scope", longest=1024).split()),
            models=_model_names(claims["models"]),
            expires_at=instant(whole_seconds(claims, "exp")),
            tenant=text_claim(claims, "tenant") if "tenant" in claims else DEFAULT_TENANT,
            token_id=text_claim(claims, "jti"),
            thumbprint=_thumbprint(claims.get("cnf")),
        )


def _thumbprint(confirmation: Any) -> str:
    if confirmation is None:
        return ""
    value = confirmation.get("x5t#S256") if isinstance(confirmation, dict) and len(confirmation) == 1 else None
    if not isinstance(value, str) or len(value) != _THUMBPRINT_LENGTH:
        raise refuse("the token's cnf must hold an x5t#S256 and nothing else", "malformed-token")
    return value


def _model_names(value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise refuse("the token's models must be a list of names", "malformed-token")
    return frozenset(value)


class TokenIssuer:
    """Signs access tokens with the key that it is the time of (security.rotation); follows the files.

    Args:
        cloud_dir: The workspace's `cloud` folder.
        clock: Seconds since the epoch.

    Raises:
        ConfigError: Its files are missing or do not fit together.
    """

    def __init__(self, cloud_dir: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._clock = cloud_dir / "tokens", clock
        self._read()

    @classmethod
    def load(cls, cloud_dir: Path) -> TokenIssuer:
        """Read the issuer of a workspace.

        Raises:
            ConfigError: Its files are missing or do not fit together.
        """
        return cls(cloud_dir)

    @property
    def issuer(self) -> str:
        """Return whom its tokens are from."""
        return self._schedule.issuer

    @property
    def audience(self) -> str:
        """Return whom its tokens are for."""
        return self._schedule.audience

    @property
    def kid(self) -> str:
        """Return the id of the key that signs now."""
        return self._schedule.signing(self._clock()).kid

    @property
    def jwks(self) -> bytes:
        """Return the public keys that verify its tokens now, and tokens that it will sign."""
        entries = [self._entries[term.kid] for term in self._schedule.published(self._clock())]
        return json.dumps({"keys": entries}, indent=2).encode() + b"\n"

    def refresh(self) -> None:
        """Take in keys that were rotated since; files that do not fit together change nothing, and are looked at again.

        Reads a few small files when one of them was replaced.
        """
        stamp = self._stamp()
        if stamp == self._seen:
            return
        try:
            self._read()
        except ConfigError as error:
            log.warning("token keys not replaced", reason=error.message)
            return
        log.info("token keys replaced", kids=[term.kid for term in self._schedule.keys])

    def _read(self) -> None:
        stamp = self._stamp()
        schedule = Schedule.read(self._folder / "issuer.json")
        jwks = read_file(self._folder / "jwks.json")
        keys = KeySet(jwks)
        entries = {entry["kid"]: entry for entry in json.loads(jwks)["keys"]}
        if keys.algorithm != schedule.algorithm or not all(term.kid in entries for term in schedule.keys):
            raise ConfigError(f"{self._folder}: jwks.json does not hold the keys of issuer.json")
        signers = load_signers(self._folder, schedule, self._clock())
        self._schedule, self._entries, self._signers, self._seen = schedule, entries, signers, stamp

    def _stamp(self) -> tuple[object, ...]:
        try:
            stats = [(self._folder / name).stat() for name in ("issuer.json", "jwks.json")]
        except OSError as error:
            return (str(error),)
        return tuple((s.st_mtime_ns, s.st_size, s.st_ino) for s in stats)

    def verifier(self, *, clock: Callable[[], float] = time.time) -> TokenVerifier:
        """Return a verifier for this issuer's tokens."""
        return TokenVerifier(self.jwks, self.issuer, self.audience, clock=clock)

    def mint(
        self,
        subject: str,
        role: str,
        *,
        models: Sequence[str] = (ALL_MODELS,),
        ttl: timedelta,
        now: datetime | None = None,
        tenant: str = DEFAULT_TENANT,
        thumbprint: str = "",
    ) -> tuple[str, datetime]:
        """Return a token with the role's scopes, and when it expires.

        Args:
            subject: Whom the token is for.
            role: One of `SCOPES_OF_ROLE`, or "granted": what the subject has been granted at the time of each call.
            models: The models that it allows; "*" for all.
            ttl: How long it is valid, at most 30 days.
            now: The time; the wall clock's when None.
            tenant: Whose models and devices the bearer sees.
            thumbprint: SHA-256 (base64url) of the certificate that the token shall be bound to; "" for none.

        Raises:
            InputError: The role is unknown, the subject unusable, or the time to live out of range.
        """
        scopes = {GRANTED} if role == GRANTED else check_role(role)
        check_tenant(tenant)
        if not 0 < len(subject) <= 128 or not subject.isprintable():
            raise InputError("expected a subject of 1 to 128 printable characters")
        if not timedelta(seconds=1) <= ttl <= MAX_TTL:
            raise InputError(
                f"expected a time to live between 1s and {format_duration(MAX_TTL)}, got {format_duration(ttl)}",
                hint="tokens are short-lived on purpose: mint a new one when it is needed",
            )
        if not models or not all(0 < len(name) <= 128 for name in models):
            raise InputError("expected at least one model name, or * for all")
        issued = int((now or datetime.now(UTC)).timestamp())
        expires = issued + int(ttl.total_seconds())
        claims = {
            "iss": self.issuer,
            "aud": self.audience,
            "sub": subject,
            "iat": issued,
            "nbf": issued,
            "exp": expires,
            "jti": uuid.uuid4().hex,
            "scope": " ".join(sorted(scopes)),
            "models": sorted(set(models)),
            "tenant": tenant,
        }
        if thumbprint:
            claims["cnf"] = {"x5t#S256": thumbprint}
        signer = self._signers[kid := self.kid]
        return assemble({"alg": signer.algorithm, "kid": kid, "typ": TYPE}, claims, signer.sign), instant(expires)


def check_role(role: str) -> frozenset[str]:
    """Return the scopes of a role.

    Raises:
        InputError: There is no such role.
    """
    if role not in SCOPES_OF_ROLE:
        close = get_close_matches(role, SCOPES_OF_ROLE, n=1)
        raise InputError(
            f"expected a role of {', '.join(SCOPES_OF_ROLE)}, got {role[:80]!r}",
            hint=f"did you mean {close[0]}?" if close else "people are operators, applications clients",
        )
    return SCOPES_OF_ROLE[role]


def describe_token(token: str) -> dict[str, Any]:
    """Return what a token says about itself, NOT verified and without its signature, for a person to read.

    Raises:
        IdentityError: It is no JWT.
    """
    if len(token) > MAX_TOKEN_BYTES or not token.isascii():
        raise refuse(
            f"expected a token of at most {MAX_TOKEN_BYTES} ASCII characters", "malformed-token", hint=_FROM_FILE
        )
    try:
        decoded = jwt.decode_complete(token, options={"verify_signature": False})
    except jwt.PyJWTError as error:
        raise refuse(
            "expected a token, got something else",
            "malformed-token",
            hint=_FROM_FILE,
        ) from error
    header = {name: decoded["header"].get(name) for name in ("alg", "kid", "typ")}
    return {**header, **{name: _readable(name, value) for name, value in decoded["payload"].items()}}


def _readable(name: str, value: Any) -> Any:
    if name in {"exp", "nbf", "iat"} and type(value) is int and 0 <= value <= LAST_TIME:
        return instant(value).isoformat()
    return value if isinstance(value, str | int | float | list) else json.dumps(value)


def create_token_issuer(folder: Path, *, issuer: str, audience: str, algorithm: str = EDDSA) -> None:
    """Create a token key, its key set and the issuer's settings in a new folder.

    Raises:
        ConflictError: The folder holds an issuer already.
    """
    create_token_keys(folder, issuer=issuer, audience=audience, algorithm=algorithm)
