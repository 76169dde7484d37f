"""Which version of a heavy model answers a request that names none: pure decisions on a policy.

Rules:
1. A request that names a version gets that version.
2. Shares are of all requests that name none; what is left goes to the released version.
3. A sticky assignment depends on the model, the key and the shares before it only: when one version's share grows,
   whoever had it keeps it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from isthmus.errors import InputError
from isthmus.v1 import traffic_pb2

RELEASED: Final = "released"
CANARY: Final = "canary"
AB: Final = "ab"
NAMED: Final = "named"
_MOST_SHARES: Final = 8
_MOST_COPIES: Final = 64
_USUAL_COPIES: Final = 4
_MOST_CACHE_S: Final = 86400
_MOST_VERSION: Final = 2**53


@dataclass(frozen=True, slots=True)
class Shadow:
    """A version that gets copies of requests."""

    version: int
    share: float
    most_at_once: int


@dataclass(frozen=True, slots=True)
class Policy:
    """How the requests for one model are spread."""

    sticky: bool = False
    shares: tuple[tuple[int, float], ...] = ()
    key_parameter: str = ""
    shadow: Shadow | None = None
    cache_s: int = 0

    @property
    def versions(self) -> frozenset[int]:
        """Return the versions that must be loaded for it."""
        shadow = () if self.shadow is None else (self.shadow.version,)
        return frozenset((*(version for version, _ in self.shares), *shadow))

    def assign(self, point: float) -> tuple[int | None, str]:
        """Return the version (None: the released one) at a point of [0, 1), and why."""
        for version, share in self.shares:
            if point < share:
                return version, AB if self.sticky else CANARY
            point -= share
        return None, RELEASED


NO_POLICY: Final = Policy()


def sticky_point(model: str, key: str) -> float:
    """Return where in [0, 1) a key lies: evenly spread, the same in every process and for every share."""
    digest = hashlib.sha256(f"{model}\0{key}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56


def key_of(policy: Policy, subject: str, parameters: Mapping[str, str | bool | int | float]) -> str:
    """Return what a sticky assignment goes by: the parameter where it is sent, the caller where it is not."""
    if policy.key_parameter and policy.key_parameter in parameters:
        return f"parameter:{parameters[policy.key_parameter]}"
    return f"subject:{subject}"


def changed(old: Any, request: Any) -> Any:
    """Return a TrafficPolicy with the parts of a SetTrafficRequest replaced.

    Raises:
        InputError: It is no policy.
    """
    new = traffic_pb2.TrafficPolicy()
    new.CopyFrom(old)
    new.model = request.model
    for part in ("split", "shadow"):
        if request.HasField(part):
            new.ClearField(part)
            getattr(new, part).CopyFrom(getattr(request, part))
    if request.HasField("cache_s"):
        new.cache_s = request.cache_s
    policy_from(new)
    return new


def rolled_back(old: Any) -> Any:
    """Return a TrafficPolicy without split and shadow."""
    new = traffic_pb2.TrafficPolicy()
    new.CopyFrom(old)
    new.ClearField("split")
    new.ClearField("shadow")
    return new


def policy_from(message: Any) -> Policy:
    """Return a checked policy.

    Raises:
        InputError: Shares are none, versions appear twice, or a limit is out of range.
    """
    split = message.split
    shares = tuple((int(share.version), float(share.share)) for share in split.shares)
    if shares and split.assignment not in (traffic_pb2.ASSIGNMENT_RANDOM, traffic_pb2.ASSIGNMENT_STICKY):
        raise InputError("expected a canary or an A/B test", hint="isthmus traffic set MODEL --canary 7=5%")
    versions = [version for version, _ in shares]
    if len(shares) > _MOST_SHARES or len(set(versions)) < len(versions):
        raise InputError(f"expected at most {_MOST_SHARES} versions, each once")
    for version, share in shares:
        _check_share(version, share)
    if math.fsum(share for _, share in shares) > 1 + 1e-9:
        raise InputError("the shares of a split are more than 100 % together")
    if message.cache_s > _MOST_CACHE_S:
        raise InputError(f"answers can be kept for {_MOST_CACHE_S} s at most, got {message.cache_s}")
    return Policy(
        sticky=split.assignment == traffic_pb2.ASSIGNMENT_STICKY,
        shares=tuple((version, share) for version, share in shares if share > 0),
        key_parameter=split.key_parameter,
        shadow=_shadow(message.shadow),
        cache_s=int(message.cache_s),
    )


def describe(message: Any) -> str:
    """Return a TrafficPolicy in a few words, for people and logs."""
    parts = []
    if message.split.shares:
        kind = AB if message.split.assignment == traffic_pb2.ASSIGNMENT_STICKY else CANARY
        parts.append(f"{kind} " + ", ".join(f"{share.version}={share.share:.4g}" for share in message.split.shares))
    if message.shadow.version:
        parts.append(f"shadow {message.shadow.version}={message.shadow.share:.4g}")
    if message.cache_s:
        parts.append(f"cache {message.cache_s} s")
    return "; ".join(parts) or "released version only"


def _shadow(message: Any) -> Shadow | None:
    if not message.version:
        return None
    _check_share(message.version, message.share)
    if message.most_at_once > _MOST_COPIES:
        raise InputError(f"at most {_MOST_COPIES} copies can be under way at once, got {message.most_at_once}")
    return Shadow(int(message.version), float(message.share), int(message.most_at_once) or _USUAL_COPIES)


def _check_share(version: int, share: float) -> None:
    if not 0 < version <= _MOST_VERSION:
        raise InputError("expected a version of 1 or more", hint="isthmus model list shows the versions")
    if not 0 <= share <= 1:  # refuses NaN, too
        raise InputError(f"expected a share between 0 and 100 %, got {share * 100:g} %")
