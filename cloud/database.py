"""What the cloud remembers: models, versions, devices, what they report, rollouts and what became of them.

SQLite in the workspace by default, or PostgreSQL, which several clouds may share. Times are Unix seconds. Rules:
1. Writers take the write lock at the start of their transaction, so that what they read stays true until they commit.
   SQLite has one; on PostgreSQL it is an advisory lock that all clouds take.
2. Foreign keys hold, and a commit is on the disk before it returns.
3. An older database is brought up to date (cloud.migrations); one from a newer release is refused, not guessed at.
4. A row with a `revision` carries the number of the last write that changed it. Numbers grow in the order of the
   commits, so whoever has seen revision N finds all that is new by asking for more than N.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    create_engine,
    event,
    inspect,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ArgumentError, DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from isthmus.errors import ConfigError, MissingExtraError
from security.tenancy import DEFAULT_TENANT

SCHEMA_VERSION: Final = 6
_WRITE_LOCK: Final = 0x69737468  # of PostgreSQL's advisory locks: any number that nobody else takes
_DATABASE_HINT: Final = "--database takes sqlite:///FILE or postgresql://USER@HOST/NAME"
_ROW_ID: Final = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by INTEGER only


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
    revision: Mapped[int] = mapped_column(BigInteger, default=0)
    tenant: Mapped[str] = mapped_column(default=DEFAULT_TENANT)


class Ledger(Base):
    """One row: the number of the last write."""

    __tablename__ = "ledger"
    id: Mapped[int] = mapped_column(primary_key=True, default=1)
    revision: Mapped[int] = mapped_column(BigInteger)


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
    key_sha256: Mapped[str] = mapped_column(default="", index=True)  # of the SubjectPublicKeyInfo, hexadecimal
    enrolled_at: Mapped[float]
    last_seen_at: Mapped[float]
    facts: Mapped[bytes] = mapped_column(default=b"")  # DeviceFacts, as the device sent them
    revision: Mapped[int] = mapped_column(BigInteger, default=0, index=True)
    tenant: Mapped[str] = mapped_column(default=DEFAULT_TENANT)


class DeviceModel(Base):
    """A model on a device: whether it runs there, and what an operator wants of it."""

    __tablename__ = "device_models"
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    watched: Mapped[bool]  # the device asked for it
    pin: Mapped[int | None] = mapped_column(BigInteger)
    attempt: Mapped[int]
    failed_rollout: Mapped[str] = mapped_column(default="")  # the last one that failed here, the attempt, and why
    failed_attempt: Mapped[int] = mapped_column(default=0)
    failed_reason: Mapped[str] = mapped_column(default="")
    revision: Mapped[int] = mapped_column(BigInteger, index=True)


class DeviceLabel(Base):
    """A label of a device; a change of it is a change of the device."""

    __tablename__ = "device_labels"
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class Invite(Base):
    """A one-time enrolment code, by its digest: a stolen database opens no door."""

    __tablename__ = "invites"
    code_sha256: Mapped[str] = mapped_column(primary_key=True)
    device_id: Mapped[str]
    expires_at: Mapped[float]
    used_at: Mapped[float | None]
    tenant: Mapped[str] = mapped_column(default=DEFAULT_TENANT)


class Revocation(Base):
    """A device, by its name, or a key, by its digest, that is refused until it is lifted; a key never is."""

    __tablename__ = "revocations"
    kind: Mapped[str] = mapped_column(primary_key=True)  # "device" or "key"
    value: Mapped[str] = mapped_column(primary_key=True)
    device_id: Mapped[str] = mapped_column(index=True)
    reason: Mapped[str]
    revoked_at: Mapped[float]
    revoked_by: Mapped[str]
    lifted_at: Mapped[float | None]
    revision: Mapped[int] = mapped_column(BigInteger, index=True)


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
    rollout: Mapped[str] = mapped_column(default="")
    attempt: Mapped[int] = mapped_column(default=0)
    number: Mapped[int] = mapped_column(BigInteger, default=0)
    step: Mapped[str] = mapped_column(default="")
    evidence: Mapped[bytes] = mapped_column(default=b"")  # Evidence, as the device sent it
    serving_since: Mapped[float] = mapped_column(default=0.0)  # when it was first heard
    revision: Mapped[int] = mapped_column(BigInteger, default=0, index=True)


class Rollout(Base):
    """A rollout and where it stands; `cloud.rollout` says what the columns mean."""

    __tablename__ = "rollouts"
    id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(ForeignKey("models.name"))
    version: Mapped[int] = mapped_column(BigInteger)
    from_version: Mapped[int] = mapped_column(BigInteger)
    attempt: Mapped[int]
    selector: Mapped[str]  # JSON object
    gates: Mapped[str]  # JSON object
    state: Mapped[int]
    stage: Mapped[int]
    reason: Mapped[str]
    detail: Mapped[str]
    created_at: Mapped[float]
    created_by: Mapped[str]
    revision: Mapped[int] = mapped_column(BigInteger, index=True)


class RolloutStage(Base):
    """A stage of a rollout; threshold and time are set when it begins."""

    __tablename__ = "rollout_stages"
    rollout: Mapped[str] = mapped_column(ForeignKey("rollouts.id"), primary_key=True)
    place: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    share: Mapped[float]
    count: Mapped[int]
    soak_s: Mapped[int]
    threshold: Mapped[int | None] = mapped_column(BigInteger)
    started_at: Mapped[float | None]


class Traffic(Base):
    """How the requests for a model are spread over its versions (cloud.traffic)."""

    __tablename__ = "traffic"
    model: Mapped[str] = mapped_column(ForeignKey("models.name"), primary_key=True)
    policy: Mapped[bytes]  # TrafficPolicy
    revision: Mapped[int] = mapped_column(BigInteger, index=True)


class Drain(Base):
    """Whether a Triton that several clouds may use gets requests."""

    __tablename__ = "drains"
    replica: Mapped[str] = mapped_column(primary_key=True)  # its address
    drained: Mapped[bool]
    revision: Mapped[int] = mapped_column(BigInteger)


class Event(Base):
    """Something that happened to a device or a rollout."""

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(_ROW_ID, primary_key=True)
    at: Mapped[float] = mapped_column(index=True)
    kind: Mapped[str]
    device_id: Mapped[str] = mapped_column(default="", index=True)
    rollout: Mapped[str] = mapped_column(default="", index=True)
    model: Mapped[str] = mapped_column(default="")
    version: Mapped[int] = mapped_column(BigInteger, default=0)
    reason: Mapped[str] = mapped_column(default="")
    detail: Mapped[str] = mapped_column(default="")


class Assertion(Base):
    """An assertion that was used; kept until it would have expired anyway."""

    __tablename__ = "assertions"
    device_id: Mapped[str] = mapped_column(primary_key=True)
    jti: Mapped[str] = mapped_column(primary_key=True)
    expires_at: Mapped[float]
    __table_args__ = (ForeignKeyConstraint(["device_id"], ["devices.id"]),)


class Quota(Base):
    """What an operator allows a tenant, perhaps one device or model of it; cloud.quotas says what the columns mean."""

    __tablename__ = "quotas"
    tenant: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    rate: Mapped[str]  # as it was written; "" for no limit
    burst: Mapped[int | None] = mapped_column(BigInteger)
    bytes_rate: Mapped[str]
    bytes_burst: Mapped[int | None] = mapped_column(BigInteger)
    concurrency: Mapped[int | None] = mapped_column(BigInteger)
    set_at: Mapped[float]
    set_by: Mapped[str]


class Usage(Base):
    """What was asked of the gateways in an hour; `cloud.metering` says what the columns mean."""

    __tablename__ = "usage"
    hour: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    tenant: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    answered: Mapped[int] = mapped_column(BigInteger)
    cached: Mapped[int] = mapped_column(BigInteger)
    refused: Mapped[int] = mapped_column(BigInteger)
    limited: Mapped[int] = mapped_column(BigInteger)
    failed: Mapped[int] = mapped_column(BigInteger)
    cancelled: Mapped[int] = mapped_column(BigInteger)
    bytes_in: Mapped[int] = mapped_column(BigInteger)
    bytes_out: Mapped[int] = mapped_column(BigInteger)
    calls: Mapped[int] = mapped_column(BigInteger)
    call_us: Mapped[int] = mapped_column(BigInteger)


class UsageRun(Base):
    """A run of a gateway, and the last segment of its journal whose counts are in the table of usage."""

    __tablename__ = "usage_runs"
    run: Mapped[str] = mapped_column(primary_key=True)
    segment: Mapped[int] = mapped_column(BigInteger)


class TritonUsage(Base):
    """What Tritons did for a heavy model in an hour; `cloud.triton_usage` says what the columns mean."""

    __tablename__ = "triton_usage"
    hour: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    model: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)  # of the heavy half
    answered: Mapped[int] = mapped_column(BigInteger)
    failed: Mapped[int] = mapped_column(BigInteger)
    inferences: Mapped[int] = mapped_column(BigInteger)
    executions: Mapped[int] = mapped_column(BigInteger)
    queue_ns: Mapped[int] = mapped_column(BigInteger)
    compute_ns: Mapped[int] = mapped_column(BigInteger)


class TritonMark(Base):
    """The sums of a model in a Triton when they were last looked at."""

    __tablename__ = "triton_marks"
    source: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    answered: Mapped[int] = mapped_column(BigInteger)
    failed: Mapped[int] = mapped_column(BigInteger)
    inferences: Mapped[int] = mapped_column(BigInteger)
    executions: Mapped[int] = mapped_column(BigInteger)
    queue_ns: Mapped[int] = mapped_column(BigInteger)
    compute_ns: Mapped[int] = mapped_column(BigInteger)
    last_ms: Mapped[int] = mapped_column(BigInteger)


class Database:
    """Sessions on one database.

    Args:
        url: SQLAlchemy's address of it.

    Raises:
        ConfigError: It cannot be opened, or a newer release wrote it.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self._writing = self._engine.execution_options(writing=True)
        try:
            self._upgrade()
        except DatabaseError as error:
            reason = str(error.orig).strip().partition("\n")[0]
            raise ConfigError(f"cannot open the database {self._engine.url}: {reason}") from error

    def _upgrade(self) -> None:
        """Bring the tables up to date, in one transaction and while no other cloud does."""
        from alembic import command
        from alembic.config import Config

        with self._writing.begin() as connection:
            tables = inspect(connection).get_table_names()
            if "schema" in tables:
                _check_schema(connection)
            config = Config()
            config.set_main_option("script_location", "cloud:migrations")
            config.attributes["connection"] = connection
            if "schema" in tables and "alembic_version" not in tables:  # from the release before migrations
                command.stamp(config, "0001")
            command.upgrade(config, "head")

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

    def revision(self) -> int:
        """Return the number of the last write of anything that has a revision."""
        with self._engine.connect() as connection:
            return connection.execute(select(Ledger.revision)).scalar_one()

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def open_database(file: Path) -> Database:
    """Return the SQLite database in `file`, made when it is not there.

    Raises:
        ConfigError: As Database.
    """
    return Database(f"sqlite:///{file}")


def next_revision(session: Session) -> int:
    """Return the number for the rows that this transaction changes."""
    statement = update(Ledger).values(revision=Ledger.revision + 1).returning(Ledger.revision)
    return session.execute(statement).scalar_one()


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        engine = create_engine(parsed, pool_pre_ping=parsed.get_backend_name() != "sqlite")
    except ModuleNotFoundError as error:
        raise MissingExtraError("the driver of PostgreSQL", "postgres") from error
    except ArgumentError as error:
        raise ConfigError(
            "expected the database's address, for example postgresql://isthmus@db.example/isthmus", hint=_DATABASE_HINT
        ) from error
    match engine.dialect.name:
        case "sqlite":
            _tame_sqlite(engine)
        case "postgresql":
            _tame_postgresql(engine)
        case other:
            raise ConfigError(f"expected sqlite or postgresql, got a database of {other!r}", hint=_DATABASE_HINT)
    return engine


def _check_schema(connection: Connection) -> None:
    version = connection.execute(select(Schema.version)).scalar()
    if version is not None and version > SCHEMA_VERSION:
        raise ConfigError(
            f"the database has schema {version}; this release knows schemas up to {SCHEMA_VERSION}",
            hint="run the newer release that wrote it, or restore a backup from before the upgrade",
        )


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


def _tame_postgresql(engine: Engine) -> None:
    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        if connection.get_execution_options().get("writing", False):
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _WRITE_LOCK})
