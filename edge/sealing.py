"""Inputs that leave this device sealed for the gateway, as `seal_inputs` names them: escalations, audits, what waits
for the cloud on the disk, and captures.

Fail closed: what is to be sealed and cannot be (no key was ever obtained, or the model has no input of that name) does
not leave the device, and is not kept; the light answer is returned. Keys are kept in sealing.json beside the device's
own, are signed by the authority in ca.pem, and never go back to an older set.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import grpc
import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from edge.backoff import Backoff
from edge.store import write_atomically
from isthmus.envelopes import ContentKey
from isthmus.errors import InputError, IsthmusError, TrustError, UnavailableError
from isthmus.oip import service_pb2
from isthmus.sealed import Binding, SealingKeys, parse_keys, seal_request
from isthmus.v1 import sealing_pb2, sealing_pb2_grpc

CAPTURE: Final = "capture"  # the context of captures
NO_KEY: Final = "no-sealing-key"
_REFRESH_S: Final = 300.0
_TIMEOUT_S: Final = 10.0

log = structlog.get_logger(__name__)


class _Kept(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    document: str
    tenant: str
    subject: str


class InputSealer:
    """Seals what `names` name.

    Args:
        names: Inputs: "text", "triage/text" for one model only, "*" for all.
        file: Keeps the gateway's public keys.
        ca: The authority's certificate.
        channel: To the cloud.
        token: Returns the access token, as soon as there is one.
    """

    def __init__(
        self,
        names: Sequence[str],
        file: Path,
        ca: Path,
        channel: grpc.aio.Channel,
        token: Callable[[], Awaitable[str]],
    ) -> None:
        self._names, self._file, self._ca = tuple(names), file, ca.read_bytes()
        self._stub: Any = sealing_pb2_grpc.SealingServiceStub(channel)
        self._token = token
        self._backoff = Backoff(longest_s=30.0)
        self._keys: SealingKeys | None = None
        self._binding = Binding("", "")
        self._complained: set[str] = set()
        self._load()

    def seal(self, model: str, raw: bytes) -> bytes:
        """Return a serialized ModelInferRequest with its inputs sealed, as far as they are to be.

        Raises:
            UnavailableError: They cannot be sealed, so the request must not leave.
        """
        names = self._wanted(model)
        if not names:
            return raw
        keys = self._current()
        try:
            request = service_pb2.ModelInferRequest.FromString(raw)
            return bytes(seal_request(request, keys.current, self._binding, names).SerializeToString())
        except InputError as error:
            if model not in self._complained:
                self._complained.add(model)
                log.exception("requests stay on the device: their inputs cannot be sealed", model=model)
            raise UnavailableError(error.message, reason=NO_KEY) from error

    def seal_capture(self, model: str, data: bytes) -> bytes:
        """Return a file of captures, sealed.

        Raises:
            UnavailableError: There is no key.
        """
        return ContentKey(self._current().current).seal(data, (CAPTURE, model))

    def concerns(self, model: str) -> bool:
        """Return whether inputs of this model are to be sealed."""
        return bool(self._wanted(model))

    async def keep(self) -> None:
        """Obtain the keys, and again now and then; runs until cancelled."""
        while True:
            try:
                await self._fetch()
            except (grpc.aio.AioRpcError, IsthmusError, OSError) as error:
                log.warning("no sealing keys from the cloud", error=_describe(error))
                await self._backoff.pause()
                continue
            self._backoff.reset()
            await self._backoff.sleep(_REFRESH_S)

    def connected(self) -> None:
        """Ask for the keys now: the connection has just come up."""
        self._backoff.wake()

    def _wanted(self, model: str) -> set[str]:
        parts = [entry.rpartition("/") for entry in self._names]
        return {name for of_model, _, name in parts if of_model in ("", model)}

    def _current(self) -> SealingKeys:
        if self._keys is None:
            raise UnavailableError("there is no sealing key yet", reason=NO_KEY)
        return self._keys

    async def _fetch(self) -> None:
        metadata = (("authorization", f"Bearer {await self._token()}"),)
        answer = await self._stub.GetSealingKeys(
            sealing_pb2.GetSealingKeysRequest(), metadata=metadata, timeout=_TIMEOUT_S
        )
        kept = _Kept(document=answer.keys_json.decode("utf-8", "replace"), tenant=answer.tenant, subject=answer.subject)
        keys = parse_keys(kept.document.encode(), self._ca)
        if self._keys is not None and keys.number < self._keys.number:
            raise TrustError(f"the cloud offers sealing keys {keys.number}, older than {self._keys.number}")
        binding = Binding(kept.tenant, kept.subject)
        news = self._keys is None or keys.number > self._keys.number or self._binding != binding
        self._keys, self._binding = keys, binding  # good for now, whatever the disk says
        if news:
            log.info("sealing keys taken in", number=keys.number, key=keys.current.id)
            await asyncio.to_thread(write_atomically, self._file, kept.model_dump_json().encode() + b"\n")

    def _load(self) -> None:
        if not self._file.exists():
            return
        try:
            kept = _Kept.model_validate_json(self._file.read_bytes())
            self._keys, self._binding = parse_keys(kept.document.encode(), self._ca), Binding(kept.tenant, kept.subject)
        except (OSError, ValidationError, TrustError) as error:  # the cloud has them, too
            log.warning("kept sealing keys not used", file=str(self._file), error=str(error))


def _describe(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
