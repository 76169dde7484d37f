"""The database keeps its promises: durable settings, real foreign keys, one writer, no newer schema."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import IntegrityError

from cloud import access_tables
from cloud import database as db
from isthmus.digests import sha256_bytes
from isthmus.errors import ConfigError
from tests.cloud.postgresql import PostgreSql

SCHEMA_1 = Path(__file__).with_name("schema_1.sql")  # a dump of what the release before migrations wrote


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


def test_writers_take_turns(database: db.Database) -> None:
    with database.write() as session:
        session.add(db.Model(name="triage", released=0))

    def increment() -> list[int]:
        revisions = []
        for _ in range(20):
            with database.write() as session:
                model = session.get_one(db.Model, "triage")
                model.released = (model.released or 0) + 1
                revisions.append(db.next_revision(session))
        return revisions

    with ThreadPoolExecutor(4) as threads:
        seen = [threads.submit(increment) for _ in range(4)]
        revisions = sorted(number for future in seen for number in future.result())
    with database.read() as session:
        assert session.get_one(db.Model, "triage").released == 80
    assert revisions == list(range(revisions[0], revisions[0] + 80))
    assert database.revision() == revisions[-1]


def test_a_database_of_the_release_before_is_brought_up_to_date_and_loses_nothing(tmp_path: Path) -> None:
    file = tmp_path / "isthmus.db"
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with sqlite3.connect(file) as connection:
        connection.executescript(SCHEMA_1.read_text())
        connection.execute("UPDATE devices SET public_key_pem = ? WHERE id = 'camera-2'", (pem,))
    connection.close()
    for _ in range(2):  # the second time there is nothing left to do
        database = db.open_database(file)
        with database.read() as session:
            model = session.get_one(db.Model, "triage")
            assert (model.released, model.tenant) == (2, "default")
            assert len(session.scalars(select(db.Version)).all()) == 2
            device = session.get_one(db.Device, "camera-1")
            assert (device.public_key_pem, device.facts, device.revision) == (b"key 1", b"", 0)
            assert device.tenant == "default"
            assert device.key_sha256 == ""  # what is no key has no digest
            spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            assert session.get_one(db.Device, "camera-2").key_sha256 == sha256_bytes(spki)
            report = session.get_one(db.Report, ("camera-1", "triage"))
            assert (report.version, report.serving_version, report.reason) == (2, 1, "digest-mismatch")
            assert (report.evidence, report.number, report.serving_since) == (b"", 0, 1500.0)
            (entry,) = session.scalars(select(db.DeviceModel)).all()
            assert (entry.device_id, entry.watched, entry.pin, entry.attempt) == ("camera-1", True, None, 0)
            assert session.scalars(select(db.Invite)).one().device_id == "camera-3"
            assert session.scalars(select(db.Assertion)).one().jti == "j"
            assert session.scalars(select(db.Schema)).one().version == db.SCHEMA_VERSION  # older releases refuse it
        database.close()
    _check_tables(f"sqlite:///{file}")


def test_migrations_make_the_tables_that_the_code_uses(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    file = tmp_path / "isthmus.db"
    db.open_database(file).close()
    _check_tables(f"sqlite:///{file}")
    server: PostgreSql = request.getfixturevalue("postgresql")  # last: without one the test ends here, and says so
    url = server.new_database()
    with ThreadPoolExecutor(3) as threads:  # clouds that start together: one of them makes the tables
        for future in [threads.submit(db.Database, url) for _ in range(3)]:
            future.result().close()
    _check_tables(url)


def _check_tables(url: str) -> None:
    assert access_tables.RoleGrant.metadata is db.Base.metadata  # or half of the tables would not be looked at
    engine = create_engine(url)
    with engine.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection), db.Base.metadata)
    engine.dispose()
    assert found == []


@pytest.mark.parametrize("url", ["mysql://somewhere/isthmus", "no address", "postgresql://nobody@127.0.0.1:1/none"])
def test_addresses_that_cannot_be_are_refused(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        db.Database(url)
    assert "\n" not in refused.value.message


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
