"""What every table has: its tenant, a UUIDv7, two timestamps, and names for its constraints."""

from __future__ import annotations

import base64
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, dataclass_transform
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Index,
    MetaData,
    String,
    Table,
    Text,
    inspect,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import ColumnProperty, DeclarativeBase, Mapped, MappedAsDataclass, mapped_column
from uuid_utils.compat import uuid7

from database.types import Timestamp, utcnow

if TYPE_CHECKING:
    from sqlalchemy.engine.default import DefaultExecutionContext
    from sqlalchemy.sql.schema import ColumnCollectionConstraint

__all__ = ["TENANT_PATTERN", "Base", "TenantModel", "owned_by", "refers_to", "rule", "uuid7"]

TENANT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.:@-]{0,63}$"

Str32 = Annotated[str, 32]
Str64 = Annotated[str, 64]
Str255 = Annotated[str, 255]
Str500 = Annotated[str, 500]
BigInt = Annotated[int, 64]
Json = Annotated[Any, "json"]
"""Any JSON value; None is SQL's NULL."""


def _columns_but_tenant(constraint: ColumnCollectionConstraint | Index, _: Table) -> str:
    # Every key starts with the tenant; without it names stay below PostgreSQL's 63 bytes, and leave
    # room for the shard suffix of Citus.
    return "_".join(c.name for c in constraint.columns if c.name != "tenant_id")


@dataclass_transform(kw_only_default=True, field_specifiers=(mapped_column,))
class Base(MappedAsDataclass, DeclarativeBase, kw_only=True):
    """The declarative base; `Base.metadata` mirrors what the migrations make."""

    metadata = MetaData(
        naming_convention={
            "columns": _columns_but_tenant,
            "pk": "pk_%(table_name)s",
            "uq": "uq_%(table_name)s_%(columns)s",
            "ix": "ix_%(table_name)s_%(columns)s",
            "fk": "fk_%(table_name)s_%(columns)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        str: Text(),
        Str32: String(32),
        Str64: String(64),
        Str255: String(255),
        Str500: String(500),
        BigInt: BigInteger(),
        Json: JSONB(none_as_null=True),
        dict[str, Any]: JSONB(none_as_null=True),
        datetime: Timestamp(),
    }


def _current_tenant(context: DefaultExecutionContext) -> str | None:
    tenant_id: str | None = context.root_connection.connection.driver_connection.tenant_id  # type: ignore[union-attr]
    return tenant_id


class TenantModel(Base):
    """A row of one tenant."""

    __abstract__ = True

    tenant_id: Mapped[str] = mapped_column(
        CheckConstraint(f"tenant_id ~ '{TENANT_PATTERN}'", name="tenant_id"),
        primary_key=True,
        init=False,
        repr=False,
        insert_default=_current_tenant,
        server_default=text("current_setting('app.tenant_id'::text, true)"),
        sort_order=-4,
    )
    id: Mapped[UUID] = mapped_column(
        primary_key=True,
        default_factory=uuid7,
        insert_default=uuid7,
        insert_sentinel=True,
        sort_order=-3,
    )
    created_at: Mapped[datetime] = mapped_column(
        default_factory=utcnow,
        insert_default=utcnow,
        server_default=text("now()"),
        repr=False,
        sort_order=-2,
    )
    updated_at: Mapped[datetime] = mapped_column(
        default_factory=utcnow,
        insert_default=utcnow,
        server_default=text("now()"),
        onupdate=utcnow,
        repr=False,
        sort_order=-1,
    )

    def to_dict(self) -> dict[str, Any]:
        """Return the loaded fields, ready for JSON.

        UUIDs and timestamps (ISO 8601) are text, bytes base64; fields that are loaded only on
        request (embeddings) are left out.
        """
        state = inspect(self)
        loaded = (a for a in state.mapper.column_attrs if a.key in state.dict)
        return {_public_name(a): _plain(state.dict[a.key]) for a in loaded}


def _public_name(attribute: ColumnProperty[Any]) -> str:
    """Return the column's name, for `metadata` cannot be an attribute's; else the attribute's."""
    column = attribute.columns[0]
    # A name that SQLAlchemy was given is of a subclass of str, which orjson refuses as a key.
    return str(column.name if isinstance(column, Column) else attribute.key)


def _plain(value: Any) -> Any:
    match value:
        case datetime():
            return value.isoformat()
        case UUID():
            return str(value)
        case Enum():
            return value.value
        case bytes():
            return base64.b64encode(value).decode()
        case _:
            return value


def rule(**constraints: Any) -> dict[str, Any]:
    """Return a column's `info` with what its values must fulfil besides their type.

    Args:
        constraints: As for `pydantic.Field`: ge, le, min_length, pattern.
    """
    return {"rule": constraints}


def owned_by(column: str, table: str) -> ForeignKeyConstraint:
    """Return the key of a row that goes when its owner goes."""
    return ForeignKeyConstraint(
        ["tenant_id", column], [f"{table}.tenant_id", f"{table}.id"], ondelete="CASCADE"
    )


def refers_to(column: str, table: str) -> ForeignKeyConstraint:
    """Return the key of a row that stays, without the reference, when the other goes."""
    return ForeignKeyConstraint(
        ["tenant_id", column],
        [f"{table}.tenant_id", f"{table}.id"],
        ondelete=f"SET NULL ({column})",
        # Conversations refer to a message and messages to their conversation: a cycle.
        use_alter=True,
    )
