"""What the operator signs about a bundle version beside its manifest: the target's `custom` field.

    {"rollback_floor": N}        a device that has run this version may be told to go back, to version N or newer
    {"withdrawn": "reason"}      no device installs this version any more

Fields that are not known here are kept and mean nothing: a newer operator may say more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from isthmus.errors import InputError, TrustError
from security.metadata import TargetFile

MAX_VERSION: Final = 10**19 - 1  # what a target's path can say
MAX_REASON: Final = 500  # characters
_FLOOR: Final = "rollback_floor"
_WITHDRAWN: Final = "withdrawn"


@dataclass(frozen=True, slots=True)
class Terms:
    """What the operator says about a version.

    Args:
        rollback_floor: The oldest version to which a device that ran this one may go back; 0: it never goes back.
        withdrawn: Why no device may install it; empty: it may.
    """

    rollback_floor: int = 0
    withdrawn: str = ""


def terms_of(target: TargetFile) -> Terms:
    """Read the terms of a target; its signatures are NOT verified here.

    Raises:
        TrustError: A known field has another form than it should.
    """
    custom = {} if target.custom is None else target.custom
    if not isinstance(custom, dict):
        raise TrustError(f"{target.path}: expected an object as custom field", reason="malformed-metadata")
    floor, withdrawn = custom.get(_FLOOR, 0), custom.get(_WITHDRAWN, "")
    if not isinstance(floor, int) or isinstance(floor, bool) or not 0 <= floor <= MAX_VERSION:
        raise TrustError(f"{target.path}: rollback_floor is no version", reason="malformed-metadata")
    if not isinstance(withdrawn, str) or len(withdrawn) > MAX_REASON:
        raise TrustError(
            f"{target.path}: withdrawn is no text of at most {MAX_REASON} characters", reason="malformed-metadata"
        )
    if _WITHDRAWN in custom and not withdrawn:
        raise TrustError(f"{target.path}: withdrawn without a reason", reason="malformed-metadata")
    return Terms(floor, withdrawn)


def set_terms(target: TargetFile, terms: Terms) -> None:
    """Write terms into a target that is about to be signed; other custom fields stay.

    Raises:
        InputError: The floor or the reason is out of range.
    """
    if not 0 <= terms.rollback_floor <= MAX_VERSION:
        raise InputError(f"expected a rollback floor of 0 to {MAX_VERSION}, got {terms.rollback_floor}")
    if len(terms.withdrawn) > MAX_REASON:
        raise InputError(f"expected a reason of at most {MAX_REASON} characters, got {len(terms.withdrawn)}")
    custom: dict[str, Any] = {
        key: value for key, value in (target.custom or {}).items() if key not in {_FLOOR, _WITHDRAWN}
    }
    if terms.rollback_floor:
        custom[_FLOOR] = terms.rollback_floor
    if terms.withdrawn:
        custom[_WITHDRAWN] = terms.withdrawn
    if custom:
        target.unrecognized_fields["custom"] = custom
    else:
        target.unrecognized_fields.pop("custom", None)


def same_file(first: TargetFile | None, second: TargetFile | None) -> bool:
    """Return whether two targets stand for the same bytes, whatever the operator says about them."""
    if first is None or second is None:
        return first is second
    return first.length == second.length and first.hashes == second.hashes
