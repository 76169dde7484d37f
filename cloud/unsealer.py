"""Sealed inputs at the gateway: opened just before Triton, for the caller that they were sealed by; and the door at
which devices and clients get the public keys.

Keys are taken in again when the workspace's folder changes; what cannot be read then changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import structlog

from isthmus.envelopes import KEYS_FILE
from isthmus.errors import IsthmusError, NotFoundError
from isthmus.sealed import Binding, open_request
from isthmus.v1 import sealing_pb2, sealing_pb2_grpc
from security.interceptors import current_claims
from security.sealing import FOLDER, GatewayKeys, load_gateway_keys
from security.tokens import Claims

_LOOK_S: Final = 5.0  # between looks for changed keys

log = structlog.get_logger(__name__)


class Unsealer:
    """The gateway's sealing keys.

    Args:
        home: The workspace's cloud folder.
        clock: Monotonic seconds.
    """

    def __init__(self, home: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._home, self._clock = home, clock
        self._keys = load_gateway_keys(home)
        self._stamp, self._looked_at = self._state(), clock()

    def open(self, request: Any, claims: Claims) -> bytes:
        """Return a ModelInferRequest with sealed inputs as one without.

        Raises:
            InputError: An envelope does not open for this request of this caller.
        """
        keys = self._current()
        private = {} if keys is None else keys.private
        opened = open_request(request, private, Binding(claims.tenant, claims.subject))
        return bytes(opened.SerializeToString())

    def document(self) -> bytes:
        """Return the signed public keys.

        Raises:
            NotFoundError: The workspace has none.
        """
        keys = self._current()
        if keys is None:
            raise NotFoundError(
                "this cloud has no sealing keys", hint="isthmus keys sealing rotate DIR", reason="no-sealing-keys"
            )
        return keys.document

    def _current(self) -> GatewayKeys | None:
        if self._clock() - self._looked_at < _LOOK_S:
            return self._keys
        self._looked_at, stamp = self._clock(), self._state()
        if stamp != self._stamp:
            try:
                self._keys = load_gateway_keys(self._home)
            except IsthmusError as error:
                log.warning("sealing keys not taken in", error=error.message)
            else:
                self._stamp = stamp
                log.info("sealing keys taken in", keys=0 if self._keys is None else len(self._keys.private))
        return self._keys

    def _state(self) -> tuple[int, ...]:
        folder = self._home / FOLDER
        try:
            return folder.stat().st_mtime_ns, (folder / KEYS_FILE).stat().st_mtime_ns
        except OSError:
            return ()


class SealingService(sealing_pb2_grpc.SealingServiceServicer):
    """Hands out the public keys, and tells callers what their inputs are bound to."""

    def __init__(self, unsealer: Unsealer) -> None:
        self._unsealer = unsealer

    async def GetSealingKeys(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return the signed keys.

        Raises:
            NotFoundError: There are none.
        """
        del request, context
        claims = current_claims()
        return sealing_pb2.GetSealingKeysResponse(
            keys_json=self._unsealer.document(), tenant=claims.tenant, subject=claims.subject
        )
