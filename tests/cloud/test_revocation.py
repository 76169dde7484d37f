"""`isthmus device revoke` as an administrator runs it, against a running fleet service."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from cloud import database as db
from cloud.access_store import AccessStore
from cloud.catalog import Catalog
from cloud.replicas import Replicas
from cloud.revocations import Revocations
from cloud.traffic_desk import TrafficDesk
from isthmus.v1 import fleet_pb2
from security.binding import Guard
from security.roles import AccessBook
from tests.attacks.doors import Door, open_door, refusal
from tests.cloud.test_serve import isthmus
from tests.cloud.workspaces import make_workspace

pytestmark = pytest.mark.slow


def test_an_administrator_revokes_and_the_record_says_so(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    database = db.Database(f"sqlite:///{tmp_path / 'isthmus.db'}")

    async def run(door: Door, role: str, *arguments: str) -> tuple[int, str, str]:
        token = tmp_path / f"{role}.token"
        token.write_text(door.mint(role, "root"))
        where = ("--cloud", door.address, "--trust", workspace.trust, "--token-file", token)
        done = await asyncio.to_thread(isthmus, "device", *arguments, *where)
        return done.returncode, done.stdout, done.stderr

    async def story() -> None:
        async with open_door(workspace.root, database) as door:
            camera = await door.enrol("camera-1", tmp_path / "device")
            token = await camera.token()
            code, _, error = await run(door, "operator", "revoke", "camera-1")
            assert code != 0
            assert "access:admin" in error
            code, shown, _ = await run(door, "admin", "revoke", "camera-1", "--reason", "stolen", "--json")
            assert code == 0
            told = json.loads(shown)
            assert told["device"] == "camera-1"
            assert (await refusal(camera.ask("WhoAmI", fleet_pb2.WhoAmIRequest(), token)))[1] == "revoked"
            record = json.loads((await run(door, "admin", "show", "camera-1", "--json"))[1])
            assert (record["revoked_reason"], record["key_sha256"]) == ("stolen", told["key_sha256"])
            assert record["revoked"] == told["revoked_at"]
            assert [event["what"] for event in record["history"]] == ["revoked"]
            assert json.loads((await run(door, "admin", "list", "--json"))[1])[0]["revoked"] is True
            assert (await run(door, "admin", "revoke"))[0] != 0
            assert (await run(door, "admin", "revoke", "--key", "not a digest"))[0] != 0

    asyncio.run(story())
    database.close()


def test_a_database_that_is_away_leaves_what_is_known_in_force(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    database = db.Database(f"sqlite:///{tmp_path / 'isthmus.db'}")

    async def story() -> None:
        async with open_door(workspace.root, database) as door:
            camera = await door.enrol("camera-1", tmp_path / "device")
            token = await camera.token()
            await door.revoke(device_id="camera-1")
            (tmp_path / "isthmus.db").rename(tmp_path / "away.db")
            database.close()  # the connections that are open would still see it
            replica = Revocations(database, Guard(), poll_s=0.01)
            following = asyncio.create_task(replica.run())
            await asyncio.sleep(0.1)
            assert not following.done()
            following.cancel()
            assert (await refusal(camera.ask("WhoAmI", fleet_pb2.WhoAmIRequest(), token)))[1] == "revoked"

    asyncio.run(story())


def test_a_record_that_has_no_connection_left_is_followed_again(tmp_path: Path) -> None:
    """The pool's own error is none of the database's; it must not end what follows the record."""
    database = db.Database(f"sqlite:///{tmp_path / 'isthmus.db'}")
    book = AccessBook()
    pool: Any = database._engine.pool
    pool._timeout = 0.01

    async def story() -> None:
        works = [
            Revocations(database, Guard(), poll_s=0.01).run(),
            AccessStore(database, book, poll_s=0.01).run(),
            TrafficDesk(database, Catalog(), Replicas([]), poll_s=0.01).follow(),
        ]
        taken = [database._engine.connect() for _ in range(pool.size() + pool._max_overflow)]
        following = [asyncio.create_task(work) for work in works]
        await asyncio.sleep(0.5)
        assert [task.done() for task in following] == [False] * len(works)
        for connection in taken:
            connection.close()
        async with asyncio.timeout(20):
            while not book.generation:
                await asyncio.sleep(0.01)
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)

    asyncio.run(story())
    database.close()
