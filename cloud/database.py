"""What the cloud remembers: models, versions, devices, invitations, reports and used assertions.

SQLite in the workspace by default; the tables are plain enough for PostgreSQL. Times are Unix seconds. Rules:
1. Writers take the write lock at the start of their transaction, so that what they read stays true until they commit.
2. Foreign keys hold, and a commit is on the disk before it returns.
3. A database from a newer release is refused, not guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import BigInteger, ForeignKey, ForeignKeyConstraint, create_engine, event, select
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from isthmus.errors import ConfigError

SCHEMA_VERSION: Final = 1


class Base(DeclarativeBase):
    """Root of the tables."""


class Schema(Base):
    """One row: the version of the tables."""

    __tablename__ = "schema"
    id: Mapped[int] = mapped_column(primary_key=True, default=1)
    version: Mapped[int]


class Model(Base):
    """A model, and the version that devices should run."""

    __tablename__ = "models"
    name: Mapped[str] = mapped_column(primary_key=True)
    released: Mapped[int | None] = mapped_column(BigInteger)


class Version(Base):
    """A published bundle version; its manifest lies among the blobs."""

    __tablename__ = "versions"
    model: Mapped[str] = mapped_column(ForeignKey("models.name"), primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    manifest_sha256: Mapped[str]
    heavy_digest: Mapped[str]
    heavy_version: Mapped[int] = mapped_column(BigInteger)
    published_at: Mapped[float]


class Device(Base):
    """An enrolled device and the key that it signs assertions with."""

    __tablename__ = "devices"
    id: Mapped[str] = mapped_column(primary_key=True)
    public_key_pem: Mapped[bytes]
    enrolled_at: Mapped[float]
    last_seen_at: Mapped[float]


class Invite(Base):
    """A one-time enrolment code, by its digest: a stolen database opens no door."""

    __tablename__ = "invites"
    code_sha256: Mapped[str] = mapped_column(primary_key=True)
    device_id: Mapped[str]
    expires_at: Mapped[float]
    used_at: Mapped[float | None]


class Report(Base):
    """The last report of a device on a model."""

    __tablename__ = "reports"
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[int]
    serving_version: Mapped[int] = mapped_column(BigInteger)
    reason: Mapped[str]
    detail: Mapped[str]
    bytes_fetched: Mapped[int] = mapped_column(BigInteger)
    variant: Mapped[str]
    reported_at: Mapped[float]


class Assertion(Base):
    """An assertion that was used; kept until it would have expired anyway."""

    __tablename__ = "assertions"
    device_id: Mapped[str] = mapped_column(primary_key=True)
    jti: Mapped[str] = mapped_column(primary_key=True)
    expires_at: Mapped[float]
    __table_args__ = (ForeignKeyConstraint(["device_id"], ["devices.id"]),)


class Database:
    """Sessions on one database.

    Args:
        url: SQLAlchemy's address of it.

    Raises:
        ConfigError: It cannot be opened, or a newer release wrote it.
    """

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url)
        if self._engine.dialect.name == "sqlite":
            _tame_sqlite(self._engine)
        self._writing = self._engine.execution_options(writing=True)
        try:
            Base.metadata.create_all(self._engine)
            with self.write() as session:
                self._check_schema(session)
        except DatabaseError as error:
            raise ConfigError(f"cannot open the database {self._engine.url}: {error.orig}") from error

    def _check_schema(self, session: Session) -> None:
        row = session.scalar(select(Schema))
        if row is None:
            session.add(Schema(version=SCHEMA_VERSION))
        elif row.version > SCHEMA_VERSION:
            raise ConfigError(
                f"the database has schema {row.version}; this release knows schemas up to {SCHEMA_VERSION}",
                hint="run the newer release that wrote it, or restore a backup from before the upgrade",
            )

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Yield a session whose changes are committed at the end, or undone when an error leaves the block."""
        with Session(self._writing, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Yield a session that sees one consistent state."""
        with Session(self._engine, expire_on_commit=False) as session:
            yield session

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def open_database(file: Path) -> Database:
    """Return the SQLite database in `file`, made when it is not there.

    Raises:
        ConfigError: As Database.
    """
    return Database(f"sqlite:///{file}")


def _tame_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver must not begin transactions on its own
        for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL", "busy_timeout=10000"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get("writing", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
