"""The tree of errors, grouped by who must act.

IsthmusError
 ├── InputError              the caller: a request, flag or file that is not what was asked for
 │    └── NotFoundError      the caller: no such model, version, device or blob
 ├── ConflictError           the caller: it exists already, or somebody was faster
 ├── ConfigError             the operator: a configuration or workspace that cannot work
 ├── MissingExtraError       the operator: an optional package is not installed
 ├── IdentityError           the attacker or a stale client: no, wrong or expired proof of identity
 ├── PermissionDeniedError   the attacker or an operator: known, but not allowed
 ├── TrustError              the attacker or a broken disk: bytes that nobody signed for
 │    └── DigestMismatchError
 ├── BundleError             whoever built the bundle
 ├── DeltaError              whoever built or carried the delta
 ├── VerificationError       the compiler or a self-test: a model that got worse
 └── UnavailableError        nobody, or the operator: the other side is not there now
      └── OverloadedError    the caller: it is there, and has all the work that it can take
           └── QuotaError    the caller: more than its quota, or that of its tenant or model, allows

Every error carries a machine-readable `reason` (kebab case), a message that says what was expected and what came,
and may carry a `hint`: the next thing for a person to do. Errors know nothing of gRPC; isthmus.status does.
"""

from __future__ import annotations

from typing import ClassVar


class IsthmusError(Exception):
    """Root of everything that this project raises on purpose.

    Args:
        message: What was expected and what came, in one sentence.
        hint: What to do next, for a person at a terminal.
        reason: Overrides the class's machine-readable reason with a more precise one.
    """

    reason: str = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if reason:
            self.reason = reason


class InputError(IsthmusError):
    """A request, flag or file is not what was asked for."""

    reason = "invalid-input"
    exit_code = 2


class NotFoundError(InputError):
    """There is no such model, version, device or blob."""

    reason = "not-found"


class ConflictError(IsthmusError):
    """It exists already, or another writer was faster."""

    reason = "conflict"
    exit_code = 3


class ConfigError(IsthmusError):
    """A configuration or a workspace cannot work as it is."""

    reason = "bad-configuration"
    exit_code = 2


class MissingExtraError(ConfigError):
    """A package that an optional part needs is not installed."""

    reason = "missing-extra"

    def __init__(self, part: str, extra: str) -> None:
        super().__init__(f"{part} is not installed", hint=f"pip install 'isthmus[{extra}]'")


class IdentityError(IsthmusError):
    """No, a wrong or an expired proof of identity."""

    reason = "unauthenticated"
    exit_code = 4


class PermissionDeniedError(IsthmusError):
    """The caller is known but may not do this."""

    reason = "permission-denied"
    exit_code = 4


class TrustError(IsthmusError):
    """Bytes or metadata that no trusted key vouches for."""

    reason = "untrusted"
    exit_code = 5


class DigestMismatchError(TrustError):
    """A file's bytes are not those that were signed for."""

    reason = "digest-mismatch"


class BundleError(IsthmusError):
    """A bundle or its manifest breaks the format."""

    reason = "bad-bundle"
    exit_code = 5


class DeltaError(IsthmusError):
    """A delta is malformed, belongs to another file, or would exceed its bounds."""

    reason = "bad-delta"
    exit_code = 5


class VerificationError(IsthmusError):
    """A model's answers are not those that it was accepted with."""

    reason = "verification-failed"
    exit_code = 6


class UnavailableError(IsthmusError):
    """The other side cannot be reached or cannot answer now."""

    reason = "unavailable"
    exit_code = 7


class OverloadedError(UnavailableError):
    """All the work that may be in progress or wait is there already; less of it, or later, may do."""

    reason = "overloaded"


class QuotaError(OverloadedError):
    """A quota allows no more requests now.

    Args:
        message: Whose quota, and of what.
        hint: What to do next, for a person at a terminal.
        reason: Overrides the class's machine-readable reason with a more precise one.
        retry_after_s: When the same request could pass; None when that is not known, or never.
    """

    reason = "quota-exceeded"

    def __init__(self, message: str, *, hint: str = "", reason: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message, hint=hint, reason=reason)
        self.retry_after_s = retry_after_s
