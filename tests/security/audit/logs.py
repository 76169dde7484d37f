"""Audit logs for tests: written by the real writer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ed25519

from security.audit.keys import PUBLIC, load_audit_key, load_public_keys
from security.audit.records import Event, Who
from security.audit.writer import AuditLog, Terms


def open_log(home: Path, **terms: Any) -> AuditLog:
    """Open the log of a folder, as a process that starts does."""
    home.mkdir(exist_ok=True)
    key = load_audit_key(home)
    return AuditLog(home / "log", key, keys=keys_of(home), terms=Terms(**terms))


def keys_of(home: Path) -> Mapping[str, ed25519.Ed25519PublicKey]:
    return load_public_keys(home / PUBLIC)


def fill(log: AuditLog, count: int, first: int = 0) -> None:
    """Record some actions, each durable before the next."""

    async def story() -> None:
        for number in range(first, first + count):
            who = Who(f"operator-{number % 3}", "default", f"token-{number}", "", "ipv4:127.0.0.1:50000")
            await log.write(Event("/isthmus.v1.FleetService/Pin", "allowed", who, device=f"press-{number}", version=3))

    asyncio.run(story())
