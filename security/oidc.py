"""Tokens of external OpenID Connect issuers, for people and services: who the issuer says that a caller is.

What such a caller may do is never taken from its token; that is granted here (security.roles). The rules:

1. The issuer is one that is configured, and its name in the token is exactly the configured one.
2. The algorithm is one of those that are configured for it, never one that only the token asks for; the key is of the
   kind that goes with it, and comes from the issuer's key set (security.oidc_keys), by its `kid`. Nothing in a token
   names a place to fetch a key from.
3. `aud` holds our audience; `exp`, `iat` and `sub` are there; `exp`, `iat` and `nbf` hold now, by our clock.

Verifying never waits for the network: a `kid` that is not known is refused, and the key set is asked for soon after.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jwt
from jwt.utils import base64url_decode

from isthmus.errors import ConfigError, IdentityError
from security.jws import MAX_TOKEN_BYTES, check_times, refuse, text_claim, whole_seconds
from security.oidc_keys import ALGORITHMS, IssuerKeys, KeySource

_REFUSED_HEADERS: Final = frozenset({"crit", "b64", "zip", "jku", "jwk", "x5u"})
_MAX_GROUPS: Final = 200
_NAME_CHARACTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")


@dataclass(frozen=True, slots=True, kw_only=True)
class OidcConfig:
    """One external issuer.

    Attributes:
        name: How grants call it (`oidc:NAME:SUBJECT`).
        issuer: Its `iss`, exactly.
        audience: What its tokens for this cloud have in `aud`.
        jwks_url: Where it publishes its keys; https only.
        jwks_file: A file with its keys instead.
        ca_file: The CA of `jwks_url` where the system does not know it.
        algorithms: Which of RS256, ES256 and EdDSA it signs with.
        groups_claim: The claim that lists the caller's groups.
    """

    name: str
    issuer: str
    audience: str
    jwks_url: str = ""
    jwks_file: Path | None = None
    ca_file: Path | None = None
    algorithms: tuple[str, ...] = ("RS256",)
    groups_claim: str = "groups"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who an issuer says that a caller is; `principals` are the names that grants go by, the caller's own first."""

    principals: tuple[str, ...]
    expires_at: int
    token_id: str


class OidcIssuer:
    """One external issuer.

    Raises:
        ConfigError: The configuration cannot be.
    """

    def __init__(self, config: OidcConfig) -> None:
        _check(config)
        self.config = config
        self.keys = IssuerKeys(KeySource(config.jwks_url, config.jwks_file, config.ca_file), config.name)

    def verify(self, token: str, now_s: float) -> Identity:
        """Return who a token is of.

        Raises:
            IdentityError: The token is not a valid one of this issuer.
            UnavailableError: The issuer's keys have not been had yet.
        """
        header = _header(token)
        algorithm = header.get("alg")
        if algorithm not in self.config.algorithms:
            raise refuse(f"the token must be signed with {' or '.join(self.config.algorithms)}", "wrong-algorithm")
        if refused := _REFUSED_HEADERS & set(header):
            raise refuse(f"the token's header must not have {min(refused)}", "malformed-token")
        claims = self._claims(token, self.keys.key(header.get("kid"), algorithm, now_s), algorithm)
        check_times({"nbf": claims["iat"], **claims}, now_s)
        subject = text_claim(claims, "sub")
        name = self.config.name
        groups = sorted(_groups(claims.get(self.config.groups_claim, ())))
        return Identity(
            principals=(f"oidc:{name}:{subject}", *(f"group:{name}:{group}" for group in groups)),
            expires_at=whole_seconds(claims, "exp"),
            token_id=text_claim(claims, "jti") if "jti" in claims else "",
        )

    def _claims(self, token: str, key: Any, algorithm: str) -> Mapping[str, Any]:
        try:
            return jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                issuer=self.config.issuer,
                audience=self.config.audience,
                options={
                    "require": ["iss", "aud", "sub", "exp", "iat"],
                    "verify_exp": False,  # check_times uses the clock that was handed in
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
        except jwt.InvalidSignatureError as error:
            raise refuse("the token's signature is wrong", "wrong-signature") from error
        except jwt.MissingRequiredClaimError as error:
            raise refuse(f"the token lacks the claim {error.claim}", "missing-claim") from error
        except jwt.InvalidIssuerError as error:
            raise refuse("the token is from another issuer", "wrong-issuer") from error
        except jwt.InvalidAudienceError as error:
            raise refuse("the token is for another audience", "wrong-audience") from error
        except jwt.PyJWTError as error:
            raise refuse("the token is malformed", "malformed-token") from error


class OidcIssuers:
    """All external issuers that a cloud believes.

    Raises:
        ConfigError: A configuration cannot be, or two are of the same issuer or name.
    """

    def __init__(self, configs: Iterable[OidcConfig]) -> None:
        issuers = [OidcIssuer(config) for config in configs]
        self._by_issuer = {issuer.config.issuer: issuer for issuer in issuers}
        if len(self._by_issuer) < len(issuers) or len({issuer.config.name for issuer in issuers}) < len(issuers):
            raise ConfigError("oidc: expected each issuer and each name once")

    def of(self, token: str) -> OidcIssuer | None:
        """Return the issuer that a token says it is from, by what is not verified yet; None for none of these."""
        if len(token) > MAX_TOKEN_BYTES:
            return None
        try:
            issuer = json.loads(base64url_decode(token.split(".", 2)[1])).get("iss")
        except (ValueError, IndexError, AttributeError, RecursionError):
            return None
        return self._by_issuer.get(issuer) if isinstance(issuer, str) else None

    @property
    def all(self) -> list[OidcIssuer]:
        """Return the issuers."""
        return list(self._by_issuer.values())


def _header(token: str) -> Mapping[str, Any]:
    if len(token) > MAX_TOKEN_BYTES or not token.isascii():
        raise refuse(f"expected a token of at most {MAX_TOKEN_BYTES} ASCII characters", "malformed-token")
    try:
        return jwt.get_unverified_header(token)
    except jwt.PyJWTError as error:
        raise refuse("the token is not a signed JWT", "malformed-token") from error


def _groups(value: Any) -> set[str]:
    """Return the groups that can be named in a grant; the others give nothing."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or len(names) > _MAX_GROUPS:
        raise IdentityError(f"the token's groups must be a list of at most {_MAX_GROUPS}", reason="malformed-token")
    return {name for name in names if isinstance(name, str) and 0 < len(name) <= 256 and name.isprintable()}


def _check(config: OidcConfig) -> None:
    what = f"oidc {config.name[:40]!r}"
    if not config.name or not set(config.name) <= _NAME_CHARACTERS:
        raise ConfigError(f"{what}: expected a name of lower-case letters, digits and dashes")
    if not config.issuer or not config.audience:
        raise ConfigError(f"{what}: expected issuer and audience")
    if bool(config.jwks_url) == (config.jwks_file is not None):
        raise ConfigError(f"{what}: expected either jwks_url or jwks_file")
    if config.jwks_url and not config.jwks_url.startswith("https://"):
        raise ConfigError(f"{what}: expected a jwks_url that begins with https://, got {config.jwks_url[:120]!r}")
    if not config.algorithms or not set(config.algorithms) <= ALGORITHMS:
        raise ConfigError(f"{what}: expected algorithms of {', '.join(sorted(ALGORITHMS))}")
