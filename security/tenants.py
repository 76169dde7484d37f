"""The tenants of a cloud: a folder each beside the cloud's own files, with signed metadata of their own.

    cloud/                    the default tenant: snapshot.key timestamp.key tuf/ ...
    cloud/tenants/NAME/       another one: snapshot.key timestamp.key tuf/

A tenant has its own root of trust. Its devices start from its root, its operators hold its root and targets keys, and
what the metadata of one tenant say, nobody of another tenant can fetch: signed metadata name every model and version.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ed25519

from isthmus.errors import ConfigError, ConflictError, InputError, IsthmusError, NotFoundError
from security.keyfiles import make_private_folder, read_file, replace_file, save_private_key, sync_folder
from security.repository import CloudRepository, create_repository
from security.tenancy import DEFAULT_TENANT, check_tenant

FOLDER: Final = "tenants"


class TenantRepositories:
    """The signed metadata of all tenants of a cloud; safe to use from several threads.

    A tenant that is added while the cloud runs is found when it is first asked for.

    Args:
        home: The workspace's `cloud` folder.
        clock: The time.

    Raises:
        ConfigError: The default tenant's repository cannot be used.
    """

    def __init__(self, home: Path, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._home, self._clock = home, clock
        self._lock = threading.Lock()
        self._open = {DEFAULT_TENANT: CloudRepository(home, clock=clock)}

    def of(self, tenant: str) -> CloudRepository:
        """Return a tenant's repository.

        Raises:
            NotFoundError: There is no such tenant.
        """
        with self._lock:
            found = self._open.get(tenant)
            if found is None:
                folder = self._home / FOLDER / check_tenant(tenant)
                if not (folder / "tuf").is_dir():
                    raise NotFoundError(f"there is no tenant {tenant!r}", reason="unknown-tenant")
                found = self._open[tenant] = CloudRepository(folder, clock=self._clock)
            return found

    def refresh_if_due(self, now: datetime) -> None:
        """Sign anew what is about to expire, of every tenant; what is wrong with one does not keep it from the others.

        Raises:
            IsthmusError: The files of a tenant cannot be used.
            OSError: The disk does not take them.
        """
        failed: Exception | None = None
        for tenant in self.names():
            try:
                self.of(tenant).refresh_if_due(now)
            except (IsthmusError, OSError) as error:
                failed = error
        if failed is not None:
            raise failed

    def names(self) -> list[str]:
        """Return the names of all tenants, the default one first."""
        return [DEFAULT_TENANT, *tenants_of(self._home)]


def tenants_of(home: Path) -> list[str]:
    """Return the names of the tenants that were added to a cloud, in order."""
    return sorted(path.name for path in (home / FOLDER).glob("[a-z0-9]*") if (path / "tuf").is_dir())


def add_tenant(home: Path, name: str, folder: Path, ca: Path, now: datetime) -> None:
    """Add a tenant to a cloud and make the folder that its operators get.

    Args:
        home: The workspace's `cloud` folder; a cloud may be running on it.
        name: The tenant's name.
        folder: The folder to make: `operator` with the tenant's update keys, and `trust`.
        ca: The certificate of the workspace's authority.
        now: The time.

    Raises:
        InputError: The name is none, or "default".
        ConflictError: There is such a tenant, or something in the folder.
        ConfigError: `home` is not a cloud folder.
    """
    if check_tenant(name) == DEFAULT_TENANT:
        raise InputError("every cloud has the tenant default", reason="bad-tenant")
    if not (home / "tuf").is_dir():
        raise ConfigError(f"{home} is not the cloud folder of a workspace", hint="isthmus keys init makes one")
    place = home / FOLDER / name
    if place.exists():
        raise ConflictError(f"there is a tenant {name} already", reason="tenant-exists")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConflictError(f"{folder} exists already", hint="keys are never overwritten; choose another folder")
    authority = read_file(ca)
    folder.mkdir(parents=True, exist_ok=True)
    make_private_folder(folder / "operator")
    make_private_folder(place.parent)
    beside = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=place.parent))  # a running cloud sees it whole or not at all
    try:
        for path in (
            folder / "operator" / "root.key",
            folder / "operator" / "targets.key",
            beside / "snapshot.key",
            beside / "timestamp.key",
        ):
            save_private_key(path, ed25519.Ed25519PrivateKey.generate())
        root_json = create_repository(folder / "operator", beside, now)
        (folder / "trust").mkdir()
        replace_file(folder / "trust" / "root.json", root_json)
        replace_file(folder / "trust" / "ca.pem", authority)
        beside.replace(place)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync_folder(place.parent)
