"""Puts together what lets requests in and what counts them; `cloud.bootstrap` starts and stops it with the rest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloud.admission import Admission
from cloud.catalog import Catalog
from cloud.config import CloudSettings
from cloud.database import Database
from cloud.journal import Journal
from cloud.metering import Meter
from cloud.quota_follow import QuotaFollower
from cloud.quota_store import MemoryQuotas, QuotaStore
from cloud.quotas import QuotaBook
from cloud.redis_quotas import RedisQuotas, connect
from cloud.triton_usage import TritonUsage
from cloud.usage import UsageService
from cloud.usage_metrics import UsageCollector
from cloud.usage_rows import QuotaTable, UsageTable


@dataclass(frozen=True, slots=True)
class Limits:
    """What lets requests in, and what counts them."""

    admission: Admission
    store: QuotaStore
    meter: Meter
    service: UsageService
    works: Mapping[str, Callable[[], Coroutine[Any, Any, None]]]  # to be run in the background, by name

    def collector(self) -> UsageCollector:
        """Return what tells Prometheus of them."""
        return UsageCollector(self.meter, self.admission, self.store)


async def open_limits(
    settings: CloudSettings,
    database: Database,
    state: Path,
    tritons: Callable[[], Awaitable[Mapping[str, list[Any]]]],
    catalog: Catalog,
    tenants: Callable[[], Collection[str]],
    stack: AsyncExitStack,
) -> Limits:
    """Open everything; when `stack` ends, what was counted is in the database, so it must end before that does.

    Args:
        settings: What the cloud was told.
        database: Where quotas and usage are kept.
        state: Folder for the journal.
        tritons: See TritonUsage.
        catalog: The models that there are.
        tenants: Returns the tenants that there are.
        stack: Closes what was opened.

    Raises:
        ConfigError: The address of Redis cannot be used.
    """
    book, quotas, usage = QuotaBook(settings.quotas.defaults), QuotaTable(database), UsageTable(database)
    follower = QuotaFollower(quotas, book)
    await follower.refresh()
    store = _store(settings)
    stack.push_async_callback(store.close)
    flush_s, keep_days = settings.metering_flush_s, settings.usage_days
    meter = Meter(usage, Journal(state / "metering"), flush_s=flush_s, keep_days=keep_days)
    await meter.start()
    stack.push_async_callback(meter.close)
    compute = TritonUsage(database, tritons, every_s=flush_s)
    works: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
        "quotas": follower.run, "metering": meter.run, "compute": compute.run,
    }  # fmt: skip
    if isinstance(store, RedisQuotas):
        works["leases"] = store.renew
    admission = Admission(book, store, streams=settings.device_streams)
    service = UsageService(usage, quotas, meter, compute, follower, catalog, tenants=tenants)
    return Limits(admission, store, meter, service, works)


def _store(settings: CloudSettings) -> QuotaStore:
    address = settings.redis.get_secret_value()
    if not address:
        return MemoryQuotas()
    ca, plaintext = settings.redis_ca, settings.redis_plaintext
    return RedisQuotas(connect(address, ca=ca, plaintext=plaintext, timeout_s=settings.redis_timeout_s))
