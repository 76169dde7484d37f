"""Reads the head of a serialized ModelInferRequest: names and parameters, while the tensors stay the bytes they are.

A walk over the top-level fields of the wire format (Protocol Buffers, "Encoding"): what is not wanted is stepped over
by its length. Rules:
1. What the real parser accepts, this one reads in the same way: the last value of a field wins, unknown fields and
   groups are skipped, and a known field with another wire type is an unknown one.
2. What does not end where its lengths say is refused. Bytes that are appended afterwards (isthmus.oip.override_fields)
   then always are fields of their own and can never be swallowed by an unfinished one.
3. The insides of tensors are not looked at; whoever decodes them, does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from isthmus.errors import InputError
from isthmus.oip import read_parameters, service_pb2

_NAME: Final = 1
_VERSION: Final = 2
_ID: Final = 3
_PARAMETERS: Final = 4
_VARINT, _FIXED64, _BYTES, _START, _END, _FIXED32 = range(6)
_MOST_LENGTH: Final = 2**31 - 1
_MOST_TAG: Final = 2**32 - 1
_MOST_NESTED: Final = 100

Span = tuple[int, int, int, int]  # field number, start of its tag, start of its value, end


@dataclass(slots=True, eq=False)
class RequestHead:
    """What a request says beside its tensors."""

    model_name: str
    model_version: str
    id: str
    _raw: bytes
    _parameters: tuple[Span, ...]
    _left_out: tuple[Span, ...]  # name, version, id and parameters, in the order of the bytes

    def parameters(self) -> dict[str, str | bool | int | float]:
        """Return the request's parameters.

        Raises:
            InputError: They cannot be decoded.
        """
        if not self._parameters:
            return {}
        raw = b"".join(self._raw[start:end] for _, start, _, end in self._parameters)
        try:
            return read_parameters(service_pb2.ModelInferRequest.FromString(raw).parameters)
        except DecodeError as error:
            raise _not_a_request() from error

    def content(self, is_idle: Callable[[str], bool] = lambda _name: True) -> Iterator[memoryview]:
        """Yield the bytes without name, version and id, and without the parameters for which `is_idle` says so."""
        view, place = memoryview(self._raw), 0
        for number, start, _, end in self._left_out:
            if number == _PARAMETERS and not self._leaves_out(start, end, is_idle):
                continue
            if place < start:
                yield view[place:start]
            place = end
        yield view[place:]

    def _leaves_out(self, start: int, end: int, is_idle: Callable[[str], bool]) -> bool:
        try:
            names = service_pb2.ModelInferRequest.FromString(self._raw[start:end]).parameters
        except DecodeError:
            return False
        return len(names) == 1 and all(is_idle(name) for name in names)


def read_head(raw: bytes) -> RequestHead:
    """Return the head of a serialized ModelInferRequest.

    Raises:
        InputError: It is none.
    """
    texts = ["", "", "", ""]  # by field number
    parameters: list[Span] = []
    left_out: list[Span] = []
    place, size = 0, len(raw)
    while place < size:
        start = place
        tag = raw[place]
        if tag < 0x80:
            place += 1
        else:
            tag, place = _tag(raw, place)
        number, kind = tag >> 3, tag & 7
        if kind != _BYTES:
            place = _skip(raw, place, number, kind)
            continue
        if number == 0:
            raise _not_a_request()
        value, place = _length_delimited(raw, place)
        if number <= _PARAMETERS:
            span = (number, start, value, place)
            left_out.append(span)
            if number == _PARAMETERS:
                parameters.append(span)
            else:
                try:
                    texts[number] = str(raw[value:place], "utf-8")
                except UnicodeDecodeError as error:
                    raise _not_a_request() from error
    return RequestHead(texts[_NAME], texts[_VERSION], texts[_ID], raw, tuple(parameters), tuple(left_out))


def _length_delimited(raw: bytes, place: int) -> tuple[int, int]:
    """Return where the value that begins with its length at `place` starts and ends."""
    length, value = _varint(raw, place)
    end = value + length
    if length > _MOST_LENGTH or end > len(raw):
        raise _not_a_request()
    return value, end


def _tag(raw: bytes, place: int) -> tuple[int, int]:
    tag, end = _varint(raw, place)
    if tag > _MOST_TAG or end - place > 5:
        raise _not_a_request()
    return tag, end


def _varint(raw: bytes, place: int) -> tuple[int, int]:
    """Return the number at `place` and where it ends; negative ones take ten bytes, and none takes more."""
    number = shift = 0
    for byte in raw[place : place + 10]:
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & 0xFFFF_FFFF_FFFF_FFFF, place
        shift += 7
    raise _not_a_request()


def _skip(raw: bytes, place: int, number: int, kind: int) -> int:
    """Return where the value of an unknown field ends: groups may nest, and must be closed."""
    open_groups: list[int] = []
    while True:
        if number == 0:
            raise _not_a_request()
        match kind:
            case 0:
                _, place = _varint(raw, place)
            case 1:
                place += 8
            case 2:
                _, place = _length_delimited(raw, place)
            case 3 if len(open_groups) < _MOST_NESTED:
                open_groups.append(number)
            case 4 if open_groups and open_groups[-1] == number:
                open_groups.pop()
            case 5:
                place += 4
            case _:
                raise _not_a_request()
        if place > len(raw):
            raise _not_a_request()
        if not open_groups:
            return place
        tag, place = _tag(raw, place)
        number, kind = tag >> 3, tag & 7


def _not_a_request() -> InputError:
    return InputError("the message is not a ModelInferRequest")
