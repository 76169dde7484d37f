"""The catalog resolves versions and knows which heavy models are wanted."""

from __future__ import annotations

import pytest

from cloud.catalog import Catalog
from cloud.heavy import HeavyId
from isthmus.errors import NotFoundError


def filled() -> Catalog:
    catalog = Catalog()
    for version, heavy in ((1, 1), (2, 1), (3, 3), (4, 4)):
        catalog.publish("triage", version, HeavyId("triage", heavy))
    return catalog


def test_resolves_the_released_or_the_named_version() -> None:
    catalog = filled()
    with pytest.raises(NotFoundError, match="no released version"):
        catalog.resolve("triage", "")
    catalog.release("triage", 2)
    assert catalog.resolve("triage", "") == (2, HeavyId("triage", 1))
    assert catalog.resolve("triage", "3") == (3, HeavyId("triage", 3))
    for version in ("5", "0", "x", "3.0", "³"):
        with pytest.raises(NotFoundError):
            catalog.resolve("triage", version)


def test_wants_the_newest_and_the_released_heavy_versions() -> None:
    catalog = filled()
    assert catalog.wanted("triage", 2) == {HeavyId("triage", 3), HeavyId("triage", 4)}
    catalog.release("triage", 1)
    assert catalog.wanted("triage", 1) == {HeavyId("triage", 1), HeavyId("triage", 4)}
    # What devices are told, too; a version that is not known is nobody's.
    assert catalog.wanted("triage", 1, {3, 99}) == {HeavyId("triage", number) for number in (1, 3, 4)}
