"""A stream of requests: answers in the order of the requests, a bounded number in progress, errors in their places.

The rules:

1. At most `in_progress` requests are read and not yet answered; the next ones wait unread, so that flow control slows
   the caller down.
2. They are computed side by side, and their answers written in the order in which the requests came.
3. What is wrong with one request is the answer to that request; the stream goes on.
4. When the caller goes away, all of its requests are cancelled. When the agent stops, those that were read are answered
   and the stream ends with UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from isthmus.errors import UnavailableError

Answers = asyncio.Queue["asyncio.Task[Any] | None"]


async def answer_stream(
    requests: AsyncIterator[bytes],
    answer: Callable[[bytes], Awaitable[Any]],
    write: Callable[[Any], Awaitable[None]],
    *,
    in_progress: int,
    stopping: asyncio.Event,
) -> None:
    """Answer every request of a stream.

    Args:
        requests: As they come.
        answer: Answers one; says in its answer what went wrong.
        write: Sends one answer.
        in_progress: Requests that may be read and not yet answered.
        stopping: Set when the agent stops.

    Raises:
        UnavailableError: The agent stops before the caller has ended the stream.
    """
    slots = asyncio.Semaphore(in_progress)
    answers: Answers = asyncio.Queue()
    async with asyncio.TaskGroup() as group:

        async def read() -> None:
            try:
                await slots.acquire()
                async for request in requests:
                    answers.put_nowait(group.create_task(_await(answer(request))))
                    await slots.acquire()
            finally:
                answers.put_nowait(None)

        reader = group.create_task(read())
        watcher = group.create_task(_cancel_when(stopping, reader))
        while (task := await answers.get()) is not None:
            await write(await task)
            slots.release()
        watcher.cancel()
    if reader.cancelled():
        raise UnavailableError("the agent stops", reason="stopping")


async def _await(answer: Awaitable[Any]) -> Any:
    return await answer


async def _cancel_when(event: asyncio.Event, task: asyncio.Task[None]) -> None:
    await event.wait()
    task.cancel()
