"""The command line's side: queues of a running agent as plain values."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from edge.status_client import TIMEOUT_S, AgentAddress
from isthmus.deferred import DeferredAnswers, LateAnswer
from isthmus.oip import read_parameters
from isthmus.tensors import decode_outputs
from isthmus.v1 import agent_pb2

_COUNTS: Final = ("queue", "pending", "results", "first_sequence", "last_sequence")


def fetch_queues(agent: AgentAddress) -> list[dict[str, Any]]:
    """Return what the caller's queues hold.

    Raises:
        IsthmusError: The agent cannot be reached, or refuses.
    """
    request = agent_pb2.ListDeferredRequest()
    answer = agent.call(lambda stub, metadata: stub.ListDeferred(request, timeout=TIMEOUT_S, metadata=metadata))
    return [{name: getattr(queue, name) for name in _COUNTS} for queue in answer.queues]


def purge_queue(agent: AgentAddress, queue: str) -> dict[str, Any]:
    """Forget all that a queue holds; return how much it was.

    Raises:
        IsthmusError: The agent cannot be reached, or refuses.
    """
    request = agent_pb2.PurgeDeferredRequest(queue=queue)
    answer = agent.call(lambda stub, metadata: stub.PurgeDeferred(request, timeout=TIMEOUT_S, metadata=metadata))
    return {"queue": queue, "pending": answer.pending, "results": answer.results}


async def watch(
    agent: AgentAddress, *, queue: str, cursor: Path | None, count: int | None
) -> AsyncIterator[dict[str, Any]]:
    """Yield the results of a queue as plain values, and acknowledge each; for ever when `count` is None.

    Raises:
        IsthmusError: The agent cannot be reached at first, or refuses.
    """
    fetch_queues(agent)  # a wrong address is said at once; an agent that goes away later is waited for
    left = count
    token = agent.token
    subscription = DeferredAnswers(
        agent.address,
        queue=queue,
        cursor=cursor,
        credentials=agent.credentials,
        token=None if token is None else lambda: token,
    )
    async with subscription as answers:
        async for answer in answers:
            yield _plain(answer)
            left = None if left is None else left - 1
            if left == 0:
                return


def _plain(answer: LateAnswer) -> dict[str, Any]:
    told: dict[str, Any] = {"sequence": answer.sequence, "request_id": answer.request_id}
    if answer.response is None:
        return told | {"reason": answer.reason, "message": answer.message}
    outputs = {name: array.tolist() for name, array in decode_outputs(answer.response).items()}
    return told | {"outputs": outputs, "parameters": read_parameters(answer.response.parameters)}
