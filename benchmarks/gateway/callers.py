"""Callers: threads that send the same bytes again and again, each over a connection of its own.

`python -m benchmarks.gateway.callers` reads jobs from its standard input, one JSON object a line, and answers each with
the milliseconds of every call: {"address", "ca", "token", "request", "callers", "seconds"}; `request` is hexadecimal;
without a `ca` the connection is plain text.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from isthmus import tls13

tls13.enforce()  # before anything imports grpc

import grpc  # noqa: E402

from isthmus.oip import MODEL_INFER  # noqa: E402
from security.tls import channel_credentials  # noqa: E402

_TIMEOUT_S: Final = 20.0
_OWN: Final = (("grpc.use_local_subchannel_pool", 1),)  # callers are different programs


class Callers:
    """Runs jobs; connections are kept for the next job."""

    def __init__(self) -> None:
        self._channels: dict[str, list[Any]] = {}

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Return the milliseconds of every call of a job."""
        request, times = bytes.fromhex(job["request"]), [list[float]() for _ in range(job["callers"])]
        metadata = (("authorization", f"Bearer {job['token']}"),) if job["token"] else ()
        failures: list[str] = []
        until = time.perf_counter() + job["seconds"]

        def work(call: Callable[..., bytes], mine: list[float]) -> None:
            try:
                while (begun := time.perf_counter()) < until or len(mine) < 10:
                    call(request, metadata=metadata, timeout=_TIMEOUT_S)
                    mine.append((time.perf_counter() - begun) * 1e3)
            except grpc.RpcError as error:  # reported by the process that asked
                failures.append(repr(error)[:500])

        threads = [
            threading.Thread(target=work, args=(channel.unary_unary(MODEL_INFER), mine))
            for channel, mine in zip(self._connected(job, len(times)), times, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"ms": [value for mine in times for value in mine], "failures": failures}

    def _connected(self, job: Mapping[str, Any], count: int) -> list[Any]:
        channels = self._channels.setdefault(job["address"], [])
        while len(channels) < count:
            if job["ca"]:
                credentials = channel_credentials(Path(job["ca"]))
                channels.append(grpc.secure_channel(job["address"], credentials, options=_OWN))
            else:
                channels.append(grpc.insecure_channel(job["address"], options=_OWN))
        return channels[:count]


if __name__ == "__main__":
    callers = Callers()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(callers.run(json.loads(line))) + "\n")
        sys.stdout.flush()
