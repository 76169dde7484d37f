"""Roles that are granted and API keys, through the real door, on each kind of database, and on two clouds of one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from sqlalchemy import select

from cloud import database as db
from cloud.access_client import AccessClient
from cloud.access_tables import ApiKeyRow, RoleGrant
from cloud.client import Address, CloudClient
from isthmus.errors import ConflictError, InputError, NotFoundError, PermissionDeniedError
from isthmus.v1 import fleet_pb2
from tests.cloud.conftest import eventually
from tests.cloud.fleets import Clock, Fleet, fleet_on
from tests.cloud.workspaces import Workspace, make_workspace

DAY = 86400


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("access") / "workspace")


def run(
    database: db.Database, workspace: Workspace, folder: Path, story: Callable[[Fleet, Clock], Awaitable[None]]
) -> None:
    async def work() -> None:
        clock = Clock()
        async with fleet_on(database, workspace, folder, clock=clock) as fleet:
            await story(fleet, clock)

    asyncio.run(work())


async def as_admin(
    fleet: Fleet, question: Callable[[AccessClient], Any], *, tenant: str = "default", models: tuple[str, ...] = ("*",)
) -> Any:
    """Ask as an admin of a tenant."""
    token = fleet.folder / f"{tenant}.token"
    token.write_text(fleet.workspace.token("admin", "root", models, tenant))

    def work() -> Any:
        with CloudClient(Address(fleet.address, fleet.workspace.trust, token), timeout_s=30.0) as client:
            return question(AccessClient(client))

    return await asyncio.to_thread(work)


async def who(fleet: Fleet, credential: str) -> tuple[str, set[str], str]:
    """Return subject, scopes and tenant of a caller."""
    async with fleet.stubs() as (stub, _):
        metadata = (("authorization", f"Bearer {credential}"),)
        answer = await stub.WhoAmI(fleet_pb2.WhoAmIRequest(), metadata=metadata, timeout=20)
        return answer.subject, set(answer.scopes), answer.tenant


async def refused(fleet: Fleet, credential: str) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await who(fleet, credential)
    return raised.value.code(), dict(raised.value.trailing_metadata())["isthmus-reason"]


@asynccontextmanager
async def open_stream(fleet: Fleet, credential: str) -> AsyncIterator[Any]:
    """Yield a stream that the cloud has taken up, and that never ends by itself."""
    async with fleet.stubs() as (stub, _):
        metadata = (("authorization", f"Bearer {credential}"),)
        stream = stub.Watch(fleet_pb2.WatchRequest(), metadata=metadata, timeout=120)
        await fleet.until(lambda: bool(fleet.conductor._watchers), "the cloud has taken the stream up")
        yield stream


async def ending(stream: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in stream:
            pass
    return raised.value.code(), dict(raised.value.trailing_metadata())["isthmus-reason"]


UNKNOWN_KEY = (grpc.StatusCode.UNAUTHENTICATED, "unknown-api-key")


def test_a_granted_token_is_worth_what_was_granted_at_the_time_of_the_call(
    database: db.Database, workspace: Workspace, tmp_path: Path
) -> None:
    async def story(fleet: Fleet, _clock: Clock) -> None:
        token = workspace.token("granted", "ann")
        assert await refused(fleet, token) == (grpc.StatusCode.PERMISSION_DENIED, "no-grant")
        await as_admin(fleet, lambda access: access.grant("subject:ann", "auditor"))
        assert await who(fleet, token) == ("ann", {"audit:read", "usage:read", "registry:read"}, "default")
        await as_admin(fleet, lambda access: access.grant("subject:ann", "client", ["triage"]))
        assert "infer" in (await who(fleet, token))[1]
        listed = await as_admin(fleet, lambda access: access.grants())
        assert [(row["principal"], row["role"], row["models"], row["by"]) for row in listed] == [
            ("subject:ann", "auditor", ["*"], "root"),
            ("subject:ann", "client", ["triage"], "root"),
        ]
        assert await as_admin(fleet, lambda access: access.revoke("subject:ann", "auditor")) == 1
        assert (await who(fleet, token))[1] == {"infer"}
        assert await as_admin(fleet, lambda access: access.revoke("subject:ann")) == 1
        assert await refused(fleet, token) == (grpc.StatusCode.PERMISSION_DENIED, "no-grant")
        with pytest.raises(NotFoundError):
            await as_admin(fleet, lambda access: access.revoke("subject:ann"))
        # A token that says itself what it is good for gets no more by a grant.
        await as_admin(fleet, lambda access: access.grant("subject:eve", "admin"))
        assert (await who(fleet, workspace.token("client", "eve")))[1] == {"infer"}

    run(database, workspace, tmp_path, story)


def test_an_api_key_lives_from_its_making_to_its_end(
    database: db.Database, workspace: Workspace, tmp_path: Path
) -> None:
    async def story(fleet: Fleet, clock: Clock) -> None:
        key, record = await as_admin(fleet, lambda access: access.create_key("shop", "client", ["triage"], 90 * DAY))
        assert key.startswith(f"isk_{record['prefix']}_")
        assert await who(fleet, key) == ("apikey:shop", {"infer"}, "default")
        (row,) = await as_admin(fleet, lambda access: access.keys())
        assert row["last_used"] is not None
        assert key not in str(row)
        with database.read() as session:
            (stored,) = session.scalars(select(ApiKeyRow)).all()
        assert key.rpartition("_")[2].encode() not in stored.digest + stored.prefix.encode()
        with pytest.raises(ConflictError):
            await as_admin(fleet, lambda access: access.create_key("shop", "client", [], DAY))

        second, _ = await as_admin(fleet, lambda access: access.rotate_key("shop", 90 * DAY, 3600))
        for valid in (key, second):
            assert (await who(fleet, valid))[1] == {"infer"}
        with pytest.raises(ConflictError, match="two API keys"):
            await as_admin(fleet, lambda access: access.rotate_key("shop", DAY, 3600))
        clock.offset_s += 3601
        assert await refused(fleet, key) == UNKNOWN_KEY
        assert (await who(fleet, second))[1] == {"infer"}

        assert await as_admin(fleet, lambda access: access.revoke_key("shop")) == 2
        assert await refused(fleet, second) == UNKNOWN_KEY
        with database.read() as session:
            assert session.scalars(select(RoleGrant)).all() == []

        short, _ = await as_admin(fleet, lambda access: access.create_key("shop", "client", [], 60))
        clock.offset_s += 61
        assert await refused(fleet, short) == UNKNOWN_KEY

    run(database, workspace, tmp_path, story)


def test_a_revocation_at_one_cloud_holds_at_the_other_within_seconds(
    database: db.Database, workspace: Workspace, tmp_path: Path
) -> None:
    async def work() -> None:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        async with (
            fleet_on(database, workspace, tmp_path / "one") as one,
            fleet_on(database, workspace, tmp_path / "two") as two,
        ):
            key, _ = await as_admin(one, lambda access: access.create_key("shop", "device", [], DAY))

            async def is_let_in() -> bool:
                try:
                    return bool(await who(two, key))
                except grpc.aio.AioRpcError:
                    return False

            async def is_refused() -> bool:
                return not await is_let_in()

            await eventually(is_let_in, "the other cloud knows the key")
            async with open_stream(one, key) as here, open_stream(two, key) as there:
                await as_admin(one, lambda access: access.revoke_key("shop"))
                revoked = time.monotonic()
                assert await refused(one, key) == UNKNOWN_KEY  # at once where it was revoked
                await eventually(is_refused, "the other cloud refuses the key")
                assert [await ending(stream) for stream in (here, there)] == [UNKNOWN_KEY] * 2
            assert time.monotonic() - revoked < 5.0

    asyncio.run(work())


def test_tenants_do_not_meet(database: db.Database, workspace: Workspace, tmp_path: Path) -> None:
    async def story(fleet: Fleet, _clock: Clock) -> None:
        keys = {}
        for tenant in ("acme", "beta"):  # the same name is another key in another tenant
            create = lambda access: access.create_key("shop", "client", [], DAY)  # noqa: E731
            keys[tenant], _ = await as_admin(fleet, create, tenant=tenant)
            await as_admin(fleet, lambda access: access.grant("subject:ann", "operator"), tenant=tenant)
        for tenant, key in keys.items():
            assert (await who(fleet, key))[2] == tenant
            (row,) = await as_admin(fleet, lambda access: access.keys(), tenant=tenant)
            assert row["tenant"] == tenant
        assert await as_admin(fleet, lambda access: access.revoke("subject:ann"), tenant="acme") == 1
        assert len(await as_admin(fleet, lambda access: access.grants(), tenant="beta")) == 2
        other = (await as_admin(fleet, lambda access: access.keys(), tenant="beta"))[0]["prefix"]
        with pytest.raises(NotFoundError):
            await as_admin(fleet, lambda access: access.revoke_key("shop", other), tenant="acme")
        assert (await who(fleet, workspace.token("granted", "ann", tenant="beta")))[2] == "beta"
        assert (await refused(fleet, workspace.token("granted", "ann", tenant="acme")))[1] == "no-grant"

    run(database, workspace, tmp_path, story)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda access: access.grant("ann", "client"),
        lambda access: access.grant("subject:", "client"),
        lambda access: access.grant("subject:a\nb", "client"),
        lambda access: access.grant("oidc:only", "client"),
        lambda access: access.grant("role:x", "client"),
        lambda access: access.grant("subject:" + "x" * 400, "client"),
        lambda access: access.grant("subject:ann", "root"),
        lambda access: access.grant("subject:ann", "granted"),
        lambda access: access.grant("subject:ann", "client", ["a/b"]),
        lambda access: access.grant("subject:ann", "client", ["tri*"]),
        lambda access: access.create_key("a b", "client", [], DAY),
        lambda access: access.create_key("../x", "client", [], DAY),
        lambda access: access.create_key("x", "client", [], 400 * DAY),
        lambda access: access.rotate_key("x", DAY, 31 * DAY),
    ],
)
def test_what_no_grant_or_key_can_be_is_refused(
    workspace: Workspace, tmp_path: Path, wrong: Callable[[AccessClient], Any]
) -> None:
    database = db.open_database(tmp_path / "isthmus.db")

    async def story(fleet: Fleet, _clock: Clock) -> None:
        with pytest.raises(InputError) as raised:
            await as_admin(fleet, wrong)
        assert not isinstance(raised.value, NotFoundError)

    run(database, workspace, tmp_path, story)
    database.close()


def test_who_says_who_may_do_what(workspace: Workspace, tmp_path: Path) -> None:
    """An admin of some models could otherwise make itself one of all; a key needs to be there to be granted more."""
    database = db.open_database(tmp_path / "isthmus.db")

    async def story(fleet: Fleet, _clock: Clock) -> None:
        for question in (
            lambda access: access.grant("subject:me", "admin"),
            lambda access: access.create_key("mine", "admin", [], DAY),
            lambda access: access.keys(),
            lambda access: access.grants(),
        ):
            with pytest.raises(PermissionDeniedError) as raised:
                await as_admin(fleet, question, models=("triage",))
            assert raised.value.reason == "not-all-models"
        with pytest.raises(NotFoundError):
            await as_admin(fleet, lambda access: access.grant("apikey:nobody", "client"))
        key, _ = await as_admin(fleet, lambda access: access.create_key("ops", "operator", ["triage"], DAY))
        token = fleet.folder / "key"
        token.write_text(key)
        with CloudClient(Address(fleet.address, workspace.trust, token), timeout_s=30.0) as client:
            assert await asyncio.to_thread(client.list_devices) == []  # keys work for operators' commands, too
            with pytest.raises(PermissionDeniedError):
                await asyncio.to_thread(lambda: AccessClient(client).keys())

    run(database, workspace, tmp_path, story)
    database.close()


def test_guesses_of_keys_learn_nothing(workspace: Workspace, tmp_path: Path) -> None:
    database = db.open_database(tmp_path / "isthmus.db")

    async def story(fleet: Fleet, clock: Clock) -> None:
        key, record = await as_admin(fleet, lambda access: access.create_key("shop", "client", [], DAY))
        expired, _ = await as_admin(fleet, lambda access: access.create_key("old", "client", [], 1))
        clock.offset_s += 2
        guesses = [
            expired, key[:-1], f"{key}x", key.swapcase(), key.upper(), f"isk_{record['prefix']}_{'A' * 43}", "isk_",
            f"isk_{record['prefix']}", f"{key} {key}", "isk_" + "x" * 5000, key.replace("isk_", "isk_ "),
        ]  # fmt: skip
        for guess in guesses:
            code, reason = await refused(fleet, guess)
            assert code is grpc.StatusCode.UNAUTHENTICATED, guess
            assert reason in ("unknown-api-key", "malformed-token")
        assert {await refused(fleet, guess) for guess in guesses if guess.startswith("isk_")} == {UNKNOWN_KEY}

    run(database, workspace, tmp_path, story)
    database.close()
