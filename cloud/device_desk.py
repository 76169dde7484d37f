"""What devices say and are told, and what operators say of devices: watches, reports, labels, pins, events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Mapping
from typing import Any, Final

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from cloud import database as db
from cloud.fleet_record import FleetRecord, Watcher
from cloud.records import check_version, keep_report, on_device
from cloud.roster import Device, Told
from isthmus.errors import IdentityError, NotFoundError
from security.tenancy import DEFAULT_TENANT

KEEP_EVENTS_S: Final = 90 * 86400.0
_CHUNK: Final = 500  # devices in one statement


class DeviceDesk(FleetRecord):
    """The devices' part of the fleet's record."""

    async def watch(
        self, device_id: str, models: Collection[str], facts: bytes, tenant: str = DEFAULT_TENANT
    ) -> AsyncGenerator[tuple[str, Told], None]:
        """Yield what the device is told about each model: now, and whenever it changes.

        Raises:
            IdentityError: A device of this name belongs to another tenant.
        """
        if await self._knows(device_id):
            self._check_tenant(device_id, tenant)
        await self._note_watch(device_id, models, facts)
        watcher = Watcher(device_id, frozenset(models))
        self._watchers.setdefault(device_id, set()).add(watcher)
        device = self._any_device(device_id, tenant)
        device.streams += 1
        told: dict[str, Told] = {}
        try:
            while not self._closed:
                watcher.changed.clear()
                for model in models:
                    news = self.roster.told(self._any_device(device_id, tenant), model)
                    if news.version and told.get(model) != news:
                        told[model] = news
                        yield model, news
                await watcher.changed.wait()
        finally:
            device.streams -= 1
            device.last_seen_at = self._clock()
            self._watchers[device_id].discard(watcher)
            if not self._watchers[device_id]:
                del self._watchers[device_id]

    async def _knows(self, device_id: str) -> bool:
        """Return whether a device is enrolled, perhaps a moment ago and at another replica."""
        if device_id not in self.roster.devices:
            await self.refresh()
        return device_id in self.roster.devices

    def _any_device(self, device_id: str, tenant: str) -> Device:
        """Return the device, or what stands for one whose enrolment this record does not have."""
        return self.roster.devices.get(device_id) or Device(device_id, 0.0, 0.0, tenant=tenant)

    def _check_tenant(self, device_id: str, tenant: str) -> None:
        if self.roster.devices[device_id].tenant != tenant:
            raise IdentityError("the device is not enrolled here", reason="unknown-device")

    async def _note_watch(self, device_id: str, models: Collection[str], facts: bytes) -> None:
        if not await self._knows(device_id):
            return
        device = self.roster.devices[device_id]
        device.last_seen_at = self._clock()
        watched = {model for model, entry in device.models.items() if entry.watched}
        if device.facts_bytes == facts and watched == set(models):
            return

        def note(session: Session, revision: int) -> None:
            row = session.get_one(db.Device, device_id)
            row.facts, row.last_seen_at, row.revision = facts, self._clock(), revision
            for model in set(models) | watched:
                entry = on_device(session, device_id, model)
                entry.watched, entry.revision = model in models, revision

        await self._together(note)

    async def report(self, device_id: str, report: Any, tenant: str = DEFAULT_TENANT) -> None:
        """Keep a device's report; it is durable when this returns. One that is older than what is known is dropped.

        Raises:
            IdentityError: The device is not enrolled here.
        """
        if not await self._knows(device_id):
            raise IdentityError("the device is not enrolled here", reason="unknown-device")
        self._check_tenant(device_id, tenant)
        await self._together(lambda session, revision: keep_report(session, device_id, report, self._clock(), revision))

    def _note_seen(self, session: Session) -> None:
        connected = [device.id for device in self.roster.devices.values() if device.streams]
        if not connected:
            return
        values = {"last_seen_at": self._clock(), "revision": db.next_revision(session)}
        for start in range(0, len(connected), _CHUNK):
            part = connected[start : start + _CHUNK]
            session.execute(update(db.Device).where(db.Device.id.in_(part)).values(values))

    def _forget_old_events(self, session: Session) -> None:
        session.execute(delete(db.Event).where(db.Event.at < self._clock() - KEEP_EVENTS_S))

    async def set_labels(self, device_id: str, labels: Mapping[str, str], remove: Collection[str], by: str) -> None:
        """Set and remove labels of a device.

        Raises:
            NotFoundError: There is no such device.
        """
        self.roster.device(device_id)

        def change(session: Session) -> None:
            session.get_one(db.Device, device_id).revision = db.next_revision(session)
            session.execute(
                delete(db.DeviceLabel).where(
                    db.DeviceLabel.device_id == device_id, db.DeviceLabel.key.in_([*remove, *labels])
                )
            )
            session.add_all(db.DeviceLabel(device_id=device_id, key=key, value=labels[key]) for key in labels)
            text = ", ".join(
                [*(f"{key}={value}" for key, value in sorted(labels.items())), *(f"-{key}" for key in remove)]
            )
            session.add(db.Event(at=self._clock(), kind="labelled", device_id=device_id, detail=f"{text} by {by}"))

        await self._write(change)

    async def pin(self, device_id: str, model: str, version: int | None, by: str) -> None:
        """Hold a device at a version of a model, or let it go (None).

        Raises:
            NotFoundError: There is no such device, or no such version.
        """
        self.roster.device(device_id)

        def change(session: Session) -> None:
            if version is not None:
                check_version(session, model, version)
            entry = on_device(session, device_id, model)
            entry.pin, entry.revision = version, db.next_revision(session)
            kind = "unpinned" if version is None else "pinned"
            session.add(
                db.Event(
                    at=self._clock(),
                    kind=kind,
                    device_id=device_id,
                    model=model,
                    version=version or 0,
                    detail=f"by {by}",
                )
            )

        await self._write(change)

    async def retry(self, device_id: str, model: str, by: str) -> int:
        """Ask a device to try again what failed on it; return the number of the attempt.

        Raises:
            NotFoundError: There is no such device, or it does not run the model.
        """
        if model not in self.roster.device(device_id).models:
            raise NotFoundError(f"device {device_id} does not run a model {model[:80]!r}", reason="unknown-model")

        def change(session: Session) -> int:
            entry = on_device(session, device_id, model)
            entry.attempt, entry.revision = entry.attempt + 1, db.next_revision(session)
            session.add(db.Event(at=self._clock(), kind="retry", device_id=device_id, model=model, detail=f"by {by}"))
            return entry.attempt

        return await self._write(change)

    async def events(self, *, device_id: str = "", rollout: str = "", limit: int = 100) -> list[db.Event]:
        """Return the newest events of a device or a rollout, newest first."""
        chosen = db.Event.device_id == device_id if device_id else db.Event.rollout == rollout

        def read() -> list[db.Event]:
            with self._database.read() as session:
                return [*session.scalars(select(db.Event).where(chosen).order_by(db.Event.id.desc()).limit(limit))]

        return await asyncio.to_thread(read)
