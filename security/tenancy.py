"""Tenants: whose a model or a device is, and what it may therefore be called.

Names are unique over the whole cloud, and a name says whose it is: whatever belongs to a tenant begins with the
tenant's name and a dot (`acme.triage`), but for what belongs to the `default` tenant, which the cloud itself is. So
nobody can take, or find out about, a name of somebody else by trying to use it. `docs/adr/0020` says why.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from isthmus.errors import InputError

DEFAULT_TENANT: Final = "default"  # of tokens that name none, and of a cloud that serves one tenant only
TENANT_HEADER: Final = "isthmus-tenant"  # metadata: the tenant that an admin of the cloud acts in
_TENANT: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")


def check_tenant(name: str) -> str:
    """Return a tenant's name.

    Raises:
        InputError: It is none.
    """
    if not _TENANT.fullmatch(name):
        raise InputError(
            f"expected a tenant's name of 1 to 32 lower-case letters, digits and inner dashes, got {name[:80]!r}",
            reason="bad-tenant",
        )
    return name


def check_new_name(tenant: str, name: str, tenants: Collection[str]) -> None:
    """Check that something new of a tenant may have this name.

    The answer depends on the tenant and the name alone, never on what other tenants have.

    Args:
        tenant: Whose it shall be.
        name: A model's or a device's name, valid as such.
        tenants: The tenants of this cloud; looked at for the default tenant only.

    Raises:
        InputError: It may not.
    """
    if tenant != DEFAULT_TENANT:
        if not name.startswith(f"{tenant}.") or len(name) == len(tenant) + 1:
            raise InputError(
                f"what belongs to the tenant {tenant} has a name that begins with {tenant!r} and a dot, "
                f"got {name[:80]!r}",
                hint=f"call it {tenant}.{name[:40]}",
                reason="name-of-another",
            )
    elif (prefix := name.partition(".")[0].casefold()) != name.casefold() and prefix in tenants:
        raise InputError(
            f"names that begin with {prefix!r} and a dot belong to the tenant {prefix}, got {name[:80]!r}",
            reason="name-of-another",
        )
