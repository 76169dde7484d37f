"""The part of a signed token that access tokens and assertions share: header, signature, and claims that must be there.

Every refusal is an IdentityError whose message says what is wrong and repeats nothing from the token; the reasons are
listed in `REASONS`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from isthmus.errors import IdentityError

MAX_TOKEN_BYTES: Final = 8 * 1024
NOT_BEFORE_LEEWAY_S: Final = 30  # a signer's clock may be this much ahead of ours
EXPIRY_LEEWAY_S: Final = 5  # and ours this much ahead of the signer's
LAST_TIME: Final = 253402300799  # 9999-12-31T23:59:59Z, the last second that datetime can name

REASONS: Final = frozenset(
    {
        "missing-token",
        "malformed-token",
        "wrong-algorithm",
        "unknown-key",
        "wrong-signature",
        "missing-claim",
        "wrong-issuer",
        "wrong-audience",
        "expired-token",
        "not-yet-valid-token",
    }
)

_EXPIRED_HINT: Final = "isthmus token mint makes a new one; on a device, look at the clock"

# What a public key can be here; `security.signer` has the private halves.
PublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey


def refuse(message: str, reason: str, *, hint: str = "") -> IdentityError:
    """Return the error for a token that is not accepted."""
    return IdentityError(message, reason=reason, hint=hint)


def assemble(header: Mapping[str, Any], claims: Mapping[str, Any], sign: Callable[[bytes], bytes]) -> str:
    """Return a signed token (RFC 7515 section 3.1).

    Args:
        header: Its header, with the algorithm that `sign` uses.
        claims: What it says.
        sign: Returns the signature of its argument.
    """
    text = b".".join(_b64(json.dumps(part, separators=(",", ":")).encode()) for part in (header, claims))
    return b".".join((text, _b64(sign(text)))).decode()


def _b64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def read_header(token: str, *, algorithm: str, kind: str, names: Collection[str]) -> Mapping[str, Any]:
    """Return the token's header after checking that it is one that we would have written.

    Args:
        token: The token, not verified.
        algorithm: The only algorithm that is accepted.
        kind: The only `typ` that is accepted, so that no sort of token passes for another.
        names: The header's names; one more (`jku`, `jwk`, `x5u`, `crit`, ...) or one less is refused.

    Raises:
        IdentityError: Anything about the header is different.
    """
    if not token:
        raise refuse("a token is needed and none was given", "missing-token")
    if len(token) > MAX_TOKEN_BYTES or not token.isascii():
        raise refuse(f"expected a token of at most {MAX_TOKEN_BYTES} ASCII characters", "malformed-token")
    try:
        header = jwt.get_unverified_header(token)
    except jwt.PyJWTError as error:
        raise refuse("the token is not a signed JWT", "malformed-token") from error
    if header.get("alg") != algorithm:
        raise refuse(f"the token must be signed with {algorithm}", "wrong-algorithm")
    if set(header) != set(names):
        raise refuse(f"the token's header must have exactly {', '.join(sorted(names))}", "malformed-token")
    if header.get("typ") != kind:
        raise refuse(f"the token must be of type {kind}", "malformed-token")
    return header


def verified_claims(
    token: str, key: PublicKey, *, algorithm: str, issuer: str, audience: str, required: Collection[str]
) -> Mapping[str, Any]:
    """Return the claims of a token that `key` signed; their times are for `check_times`.

    Raises:
        IdentityError: The signature, issuer or audience is wrong, or a required claim is not there.
    """
    try:
        return jwt.decode(
            token,
            key,
            algorithms=[algorithm],
            issuer=issuer,
            audience=audience,
            options={
                "require": sorted(required),
                "strict_aud": True,
                # The library reads the wall clock; `check_times` uses the one that was handed in.
                "verify_exp": False,
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


def check_times(claims: Mapping[str, Any], now_s: float) -> None:
    """Check `exp`, `nbf` and `iat` against the given time.

    Raises:
        IdentityError: The token expired, is not valid yet, or a time is no whole number of seconds.
    """
    expires, not_before, issued = (whole_seconds(claims, name) for name in ("exp", "nbf", "iat"))
    if now_s >= expires + EXPIRY_LEEWAY_S:
        raise refuse("the token expired", "expired-token", hint=_EXPIRED_HINT)
    if max(not_before, issued) > now_s + NOT_BEFORE_LEEWAY_S:
        raise refuse("the token is not valid yet", "not-yet-valid-token")


def whole_seconds(claims: Mapping[str, Any], name: str) -> int:
    """Return a time claim.

    Raises:
        IdentityError: It is no whole number of seconds that a calendar can name.
    """
    value = claims[name]
    if type(value) is not int or not 0 <= value <= LAST_TIME:
        raise refuse(f"the token's {name} must be a whole number of seconds", "malformed-token")
    return value


def text_claim(claims: Mapping[str, Any], name: str, *, longest: int = 256) -> str:
    """Return a claim that is text.

    Raises:
        IdentityError: It is empty, too long, or something else (half a surrogate pair, which no database takes).
    """
    value = claims[name]
    if not isinstance(value, str) or not 0 < len(value) <= longest or not value.isprintable():
        raise refuse(f"the token's {name} must be 1 to {longest} printable characters", "malformed-token")
    return value


def instant(seconds: int) -> datetime:
    """Return a time claim's value as a time with its zone."""
    return datetime.fromtimestamp(seconds, UTC)
