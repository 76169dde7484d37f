"""Which versions exist, which is released, and where each one's heavy half is served: the gateway's view, in memory.

The database is the record; this is filled from it at the start and follows it after every commit. It lives in one event
loop and is never touched from another thread.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from cloud.heavy import HeavyId
from isthmus.errors import NotFoundError
from security.tenancy import DEFAULT_TENANT
from security.tokens import Claims


@dataclass(slots=True)
class _Entry:
    heavy: dict[int, HeavyId] = field(default_factory=dict)  # by bundle version
    released: int | None = None
    tenant: str = DEFAULT_TENANT


class Catalog:
    """Published models."""

    def __init__(self) -> None:
        self._models: dict[str, _Entry] = {}

    @property
    def models(self) -> tuple[str, ...]:
        """Return the names of all models, in order."""
        return tuple(sorted(self._models))

    def publish(self, model: str, version: int, heavy: HeavyId, tenant: str = DEFAULT_TENANT) -> None:
        """Make a bundle version of a tenant's model known."""
        self._models.setdefault(model, _Entry(tenant=tenant)).heavy[version] = heavy

    def tenant(self, model: str) -> str | None:
        """Return whose a model is, or None where there is no such model."""
        entry = self._models.get(model)
        return None if entry is None else entry.tenant

    def may_see(self, claims: Claims, model: str) -> bool:
        """Return whether there is such a model for a caller: one of its tenant, and one that it may use."""
        entry = self._models.get(model)
        return entry is not None and entry.tenant == claims.tenant and claims.may_use(model)

    def check_may_see(self, claims: Claims, model: str) -> None:
        """Check that there is such a model for a caller.

        Raises:
            NotFoundError: There is none; of one that is hidden, exactly the same is said.
        """
        if not self.may_see(claims, model):
            raise unknown_model(model)

    def release(self, model: str, version: int) -> None:
        """Make a known version the one that is released."""
        self._models[model].released = version

    def released(self, model: str) -> int | None:
        """Return the version that devices should run, or None."""
        entry = self._models.get(model)
        return None if entry is None else entry.released

    def versions(self, model: str) -> list[int]:
        """Return the versions of a model, oldest first; none when it is unknown."""
        return sorted(self._models[model].heavy) if model in self._models else []

    def heavy(self, model: str, version: int) -> HeavyId:
        """Return the heavy version that belongs to a known bundle version."""
        return self._models[model].heavy[version]

    def wanted(self, model: str, newest: int, also: Collection[int] = ()) -> set[HeavyId]:
        """Return the heavy versions that should be loaded: those of the released, the `newest`, and `also` these."""
        entry = self._models[model]
        keep = {*sorted(entry.heavy)[-newest:], *(version for version in also if version in entry.heavy)}
        if entry.released is not None:
            keep.add(entry.released)
        return {entry.heavy[version] for version in keep}

    def resolve(self, model: str, version: str) -> tuple[int, HeavyId]:
        """Return the bundle version that a request means (none named: the released one) and its heavy version.

        Raises:
            NotFoundError: There is no such model or version.
        """
        entry = self._models.get(model)
        if entry is None:
            raise unknown_model(model)
        number = (
            entry.released if version == "" else int(version) if version.isdecimal() and version.isascii() else None
        )
        if number is None or number not in entry.heavy:
            what = f"has no version {version[:20]!r}" if version else "has no released version"
            raise NotFoundError(f"model {model!r} {what}", reason="unknown-version")
        return number, entry.heavy[number]


def unknown_model(model: str) -> NotFoundError:
    """Return the error for a model that does not exist, or that the caller must not know of: they look the same."""
    return NotFoundError(f"there is no model {model[:80]!r}", reason="unknown-model")
