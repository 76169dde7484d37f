"""The database keeps its promises: durable settings, real foreign keys, one writer, no newer schema."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from cloud import database as db
from isthmus.errors import ConfigError


def test_sqlite_is_set_up_for_power_cuts_and_several_readers(tmp_path: Path) -> None:
    database = db.open_database(tmp_path / "isthmus.db")
    with database.read() as session:
        found = [session.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "foreign_keys", "synchronous")]
    database.close()
    assert found == ["wal", 1, 2]


def test_foreign_keys_hold_and_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    database = db.open_database(tmp_path / "isthmus.db")
    report = db.Report(
        device_id="nobody", model="triage", version=1, state=1, serving_version=1, reason="", detail="",
        bytes_fetched=0, variant="", reported_at=0.0,
    )  # fmt: skip

    def write_both() -> None:
        with database.write() as session:
            session.add(db.Model(name="triage"))
            session.flush()
            session.add(report)

    with pytest.raises(IntegrityError):
        write_both()
    with database.read() as session:
        assert session.scalars(select(db.Model)).all() == []
    database.close()


def test_writers_take_turns(tmp_path: Path) -> None:
    database = db.open_database(tmp_path / "isthmus.db")
    with database.write() as session:
        session.add(db.Model(name="triage", released=0))

    def increment() -> None:
        for _ in range(20):
            with database.write() as session:
                model = session.get_one(db.Model, "triage")
                model.released = (model.released or 0) + 1

    threads = [threading.Thread(target=increment) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert session.get_one(db.Model, "triage").released == 80
    database.close()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    db.open_database(tmp_path / "isthmus.db").close()
    with sqlite3.connect(tmp_path / "isthmus.db") as connection:
        connection.execute("UPDATE schema SET version = 99")
    connection.close()
    with pytest.raises(ConfigError, match="schema 99"):
        db.open_database(tmp_path / "isthmus.db")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "isthmus.db").write_bytes(b"something else entirely, and long enough to be looked at" * 40)
    with pytest.raises(ConfigError, match="cannot open the database"):
        db.open_database(tmp_path / "isthmus.db")
