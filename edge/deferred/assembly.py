"""The parts of deferred inference, put together over one folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from edge.deferred.deferral import Deferral
from edge.deferred.disk import Disk
from edge.deferred.sealing import Sealer, load_key
from edge.deferred.sender import Sender
from edge.deferred.service import DeferredService
from edge.deferred.store import DeferredStore, Limits
from edge.lessons import Lessons
from edge.router import Escalator

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Deferred:
    """What an agent that defers has."""

    deferral: Deferral
    sender: Sender
    service: DeferredService


def open_deferred(
    folder: Path,
    key: Path,
    uplink: Escalator,
    *,
    limits: Limits,
    longest_ttl_s: int,
    concurrency: int,
    deadline_s: float,
    owner: Callable[[], str],
    lessons: Lessons,
) -> Deferred | None:
    """Open the folder; None when the disk refuses, since serving comes first. Call it inside the event loop.

    Args:
        folder: Holds the requests and results; made when it is missing.
        key: File with the key; made when it is missing.
        uplink: To the cloud.
        limits: Bounds of the folder.
        longest_ttl_s: Longest life of a request.
        concurrency: Requests on their way at a time.
        deadline_s: Of one request in the cloud.
        owner: Returns the subject of the caller of the current rpc.
        lessons: Learns from late answers.

    Raises:
        ConfigError: The key cannot be read or made.
    """
    sealer = Sealer(load_key(key))
    try:
        store = DeferredStore(Disk(folder), sealer, limits)
    except OSError as error:
        log.warning("requests cannot be deferred", folder=str(folder), error=str(error))
        return None
    if store.counters.found_pending or store.counters.found_results:
        log.info(
            "deferred requests found",
            waiting=store.counters.found_pending,
            results=store.counters.found_results,
        )
    deferral = Deferral(store, longest_ttl_s=longest_ttl_s, owner=owner)
    sender = Sender(deferral, uplink, concurrency=concurrency, deadline_s=deadline_s, lessons=lessons)
    return Deferred(deferral, sender, DeferredService(deferral))
