"""What a request may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from edge.deferred.wish import NoDeferral, QueueName, Wish, read_wish
from isthmus.errors import InputError

DEFER = {"isthmus.defer": True}


def test_request_that_does_not_ask_is_not_deferred() -> None:
    assert read_wish({}, "") is None
    assert read_wish({"isthmus.defer": False, "isthmus.queue": "q"}, "") is None


def test_what_is_not_said_has_a_default() -> None:
    assert read_wish(DEFER, "r1", owner="app", longest_ttl_s=60) == Wish(
        queue=QueueName("app", "default"), id="r1", priority=5, ttl_s=60
    )
    asked = DEFER | {"isthmus.queue": "night", "isthmus.priority": 9, "isthmus.ttl_s": 30}
    assert read_wish(asked, "r1") == Wish(queue=QueueName("", "night"), id="r1", priority=9, ttl_s=30)


@pytest.mark.parametrize(
    ("parameters", "request_id", "message"),
    [
        ({"isthmus.defer": "yes"}, "r", "isthmus.defer: expected true or false, got 'yes'"),
        ({"isthmus.defer": 1}, "r", "isthmus.defer: expected true or false, got 1"),
        (DEFER, "", "expected a request id"),
        (DEFER, "r" * 257, "at most 256 bytes"),
        (DEFER | {"isthmus.queue": "a/b"}, "r", "isthmus.queue: expected a name"),
        (DEFER | {"isthmus.queue": 3}, "r", "isthmus.queue: expected the name of a queue, got 3"),
        (DEFER | {"isthmus.priority": 10}, "r", "isthmus.priority: expected a whole number from 0 to 9, got 10"),
        (DEFER | {"isthmus.priority": True}, "r", "isthmus.priority: expected a whole number"),
        (DEFER | {"isthmus.priority": "5"}, "r", "isthmus.priority: expected a whole number"),
        (DEFER | {"isthmus.ttl_s": 0}, "r", "isthmus.ttl_s: expected a whole number from 1 to 60, got 0"),
        (DEFER | {"isthmus.ttl_s": 61}, "r", "isthmus.ttl_s: expected a whole number from 1 to 60, got 61"),
        (DEFER | {"isthmus.ttl_s": 1.5}, "r", "isthmus.ttl_s: expected a whole number"),
    ],
)
def test_what_cannot_be_meant_is_refused(parameters: dict[str, Any], request_id: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_wish(parameters, request_id, longest_ttl_s=60)
    assert message in caught.value.message


async def _kept(keeper: NoDeferral, wish: Wish) -> str | None:
    return await keeper.keep(wish, request=b"", template=None, answer_bytes=0, failure="deadline", remaining_s=1)


def test_agent_that_does_not_defer_says_so() -> None:
    import asyncio

    keeper = NoDeferral()
    wish = keeper.read(DEFER, "r")
    assert wish is not None
    assert not keeper.knows(wish)
    assert asyncio.run(_kept(keeper, wish)) == "off"
