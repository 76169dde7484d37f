"""Which rpc leaves which kind of record. The rule is by scope, so that a new method is covered before anybody asks.

    ACTION    changes something: recorded before it runs, durably, or it does not run; and its outcome after it
    STRANGER  as ACTION, for anybody without a token: recorded when it has happened, before it is answered, and not run
              while that cannot be; attempts cost a stranger nothing, so those that fail are left to the refusals
    LOOK      reads what only administrators see, or sends a part of what an action will use: one record, after it
    SAMPLE    inference: a share of the answers
    REFUSALS  only when it is refused

A refusal (identity, scope, or a name that the caller may not know) is recorded of every rpc.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from security.scopes import AUTHENTICATED, DEVICE, INFER, METHOD_SCOPES, PUBLIC, REGISTRY_READ


class Coverage(StrEnum):
    """What is recorded of a method."""

    ACTION = "action"
    STRANGER = "stranger"
    LOOK = "look"
    SAMPLE = "sample"
    REFUSALS = "refusals"


# Scopes of devices and clients; whoever needs any other scope is an administrator of something.
_EVERYDAY: Final = frozenset({PUBLIC, AUTHENTICATED, INFER, REGISTRY_READ, DEVICE})
_OURS: Final = "/isthmus."
_READS: Final = ("Get", "List", "Find", "Search", "Export", "Read", "Show", "Upload")
_EXCEPTIONS: Final[Mapping[str, Coverage]] = MappingProxyType(
    {
        # Once in some minutes for each device; what comes of the token is recorded.
        "/isthmus.v1.FleetService/IssueToken": Coverage.REFUSALS,
        "/inference.GRPCInferenceService/ModelInfer": Coverage.SAMPLE,
        "/inference.GRPCInferenceService/ModelStreamInfer": Coverage.SAMPLE,
    }
)


def coverage_of(method: str, scopes: Mapping[str, str] = METHOD_SCOPES) -> Coverage:
    """Return what is recorded of a method, by its full path; of one that is in no table, only that it was refused."""
    if method in _EXCEPTIONS:
        return _EXCEPTIONS[method]
    scope = scopes.get(method)
    if scope == PUBLIC and method.startswith(_OURS):  # the request carries its own proof: a code, an assertion
        return Coverage.STRANGER
    if scope is None or scope in _EVERYDAY:
        return Coverage.REFUSALS
    return Coverage.LOOK if method.rpartition("/")[2].startswith(_READS) else Coverage.ACTION
