"""What it costs a request to be let in and counted.

`python -m benchmarks.limits [--quick] [--json FILE]`. One request after another passes admission and metering, as in
the gateway, with nothing in between: without quotas, with a rate for tenant, device and model, with rates of bytes and
limits of concurrency as well; in memory, and with a Redis on a Unix socket where redis-server is installed. Metering
writes its journal to the disk. The goal is for memory, with all three rates: at most 20 microseconds of the processor.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from benchmarks.result import Goal, publish
from cloud.admission import Admission
from cloud.database import open_database
from cloud.journal import Journal
from cloud.metering import Meter
from cloud.quota_store import MemoryQuotas, QuotaStore
from cloud.quotas import Limits, QuotaBook, Scope, parse_rate
from cloud.usage_rows import UsageTable
from security.tokens import Claims

MOST_US: Final = 20.0
_ROUNDS: Final = 7
_DEVICES: Final = 100
_RATE: Final = parse_rate("1000000/s")
_BYTES: Final = parse_rate("100GB/s", sizes=True)


def _book(quotas: str) -> QuotaBook:
    limits = {
        "none": Limits(),
        "rates": Limits(rate=_RATE),
        "all": Limits(rate=_RATE, bytes_rate=_BYTES, concurrency=1000),
    }[quotas]
    book = QuotaBook()
    book.replace(dict.fromkeys((Scope("*"), Scope("*", "*"), Scope("*", "", "*")), limits))
    return book


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    socket = folder / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            while not socket.exists():
                time.sleep(0.01)
            yield f"unix://{socket}"
        finally:
            process.terminate()


@asynccontextmanager
async def _store(kind: str, folder: Path) -> AsyncIterator[QuotaStore]:
    if kind == "memory":
        yield MemoryQuotas()
        return
    from cloud.redis_quotas import RedisQuotas, connect

    with _redis(folder) as address:
        store = RedisQuotas(connect(address))
        yield store
        await store.close()
        if store.failures:
            raise RuntimeError("Redis did not answer all the time")


async def measure(store: QuotaStore, quotas: str, folder: Path, requests: int) -> list[tuple[float, float]]:
    """Return the microseconds of processor time and of time of one request, for each round."""
    database = open_database(folder / f"{quotas}.db")
    meter = Meter(UsageTable(database), Journal(folder / f"{quotas}.journal"))
    await meter.start()
    admission = Admission(_book(quotas), store)
    callers = [Claims(f"device-{number}", frozenset(), frozenset("*"), datetime.now(UTC)) for number in range(_DEVICES)]
    took = []
    for _ in range(_ROUNDS):
        began, began_cpu = time.perf_counter(), time.process_time()
        for number in range(requests):
            claims = callers[number % _DEVICES]
            with meter.call(claims, 4096) as call:
                call.resolved("triage", 3)
                async with admission.admit(claims, "triage", 4096):
                    call.sent()
                call.answered(512)
        cpu, wall = time.process_time() - began_cpu, time.perf_counter() - began
        took.append((cpu / requests * 1e6, wall / requests * 1e6))
        await meter.flush()
    await meter.close()
    database.close()
    return took


async def _rows(requests: int) -> list[dict[str, Any]]:
    rows = []
    for kind in ("memory", *(("redis",) if shutil.which("redis-server") else ())):
        for quotas in ("none", "rates", "all"):
            with tempfile.TemporaryDirectory() as name:
                async with _store(kind, Path(name)) as store:
                    took = await measure(store, quotas, Path(name), requests if kind == "memory" else requests // 10)
            rows.append(
                {
                    "store": kind,
                    "quotas": quotas,
                    "cpu_us": round(statistics.median(cpu for cpu, _ in took), 2),
                    "least_cpu_us": round(min(cpu for cpu, _ in took), 2),
                    "us": round(statistics.median(wall for _, wall in took), 2),
                    "least_us": round(min(wall for _, wall in took), 2),
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    parser.add_argument("--json", type=Path, help="write the result here")
    chosen = parser.parse_args(arguments)
    rows = asyncio.run(_rows(2_000 if chosen.quick else 20_000))
    goal = next(row["cpu_us"] for row in rows if (row["store"], row["quotas"]) == ("memory", "rates"))
    publish("limits", rows, [Goal("CPU us a request, three rates in memory", goal, MOST_US)], chosen.json)


if __name__ == "__main__":
    main()
