"""The tables of who may do what, and of whose the stored blobs are; beside those in cloud.database."""

from __future__ import annotations

from sqlalchemy import BigInteger, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from cloud.database import Base


class RoleGrant(Base):
    """A role that a principal has in a tenant; `models` is a JSON list."""

    __tablename__ = "role_grants"
    tenant: Mapped[str] = mapped_column(primary_key=True)
    principal: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)
    models: Mapped[str]
    created_at: Mapped[float]
    created_by: Mapped[str]


class ApiKeyRow(Base):
    """An API key by its digest: a stolen database opens no door."""

    __tablename__ = "api_keys"
    prefix: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[bytes] = mapped_column(unique=True)
    tenant: Mapped[str]
    name: Mapped[str]
    created_at: Mapped[float]
    created_by: Mapped[str]
    expires_at: Mapped[float]
    last_used_at: Mapped[float | None]


class AccessState(Base):
    """One row: the number of the last change of grants and keys, which all clouds on this database look at."""

    __tablename__ = "access_state"
    id: Mapped[int] = mapped_column(primary_key=True, default=1)
    number: Mapped[int] = mapped_column(BigInteger)


class ModelBlob(Base):
    """A blob that belongs to a published version of a model."""

    __tablename__ = "model_blobs"
    sha256: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(ForeignKey("models.name"), primary_key=True)


class UploadedBlob(Base):
    """A blob whose bytes a tenant has sent, and so has."""

    __tablename__ = "uploaded_blobs"
    sha256: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(primary_key=True)
