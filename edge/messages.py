"""Messages from and to bytes at the door of the listener: bytes that are no message are the caller's error."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError

from isthmus.errors import InputError


def parse_message(kind: Any, raw: bytes) -> Any:
    """Return the message of this kind in the bytes.

    Raises:
        InputError: There is none.
    """
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InputError(
            f"expected a serialized {kind.DESCRIPTOR.full_name}, got {len(raw)} bytes that are not one",
            reason="malformed-request",
        ) from error


def serialize_message(message: Any) -> bytes:
    """Return a message's bytes."""
    return bytes(message.SerializeToString())
