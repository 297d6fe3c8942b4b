"""Deleting what has expired, beside everybody else's work."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from sqlalchemy import TextClause, bindparam, text

from database.models.base import TenantModel
from database.repositories.base import Repository
from database.session import ALL_TENANTS, binding_of
from database.types import Timestamp, utcnow
from database.units import one_read, one_write

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["ExpiringRepository"]

ModelT = TypeVar("ModelT", bound=TenantModel)


class ExpiringRepository(Repository[ModelT]):
    """A repository of rows with `expires_at`: from then on `purge_expired` deletes them."""

    kept: ClassVar[str | None] = None
    """A column that tells which rows cannot be deleted by the batch."""

    @classmethod
    def purge_expired(cls, db: Session, *, batch_size: int = 1000, dry_run: bool = False) -> int:
        """Delete the expired rows, and all that they own; return how many.

        Deletes batch after batch, the longest expired first, and passes over rows that others have
        locked. Outside a unit each batch is committed, so that what an interrupted run has done
        stays done. An `ALL_TENANTS` session purges all tenants.

        Args:
            db: The session.
            batch_size: How many rows one statement deletes, 1 to 100,000.
            dry_run: Only count them.
        """
        from database.rules import check_number

        size = check_number("batch_size", batch_size, 1, 100_000)
        tenant = binding_of(db)
        parameters: dict[str, Any] = {"now": utcnow()}
        if tenant is not ALL_TENANTS:
            parameters["tenant"] = tenant
        counting, deleting = _statements(
            cls.model.__tablename__, cls.kept, all_tenants=tenant is ALL_TENANTS
        )
        if dry_run:
            with one_read(db) as connection:
                return int(connection.scalar(counting, parameters) or 0)
        purged = 0
        while True:
            with one_write(db) as connection:
                count = connection.execute(deleting, {**parameters, "batch": size}).rowcount
            purged += count
            if count < size:
                return purged


@cache
def _statements(
    table: str, kept: str | None, *, all_tenants: bool
) -> tuple[TextClause, TextClause]:
    expired = f"FROM {table} WHERE expires_at <= :now"
    if not all_tenants:
        expired += " AND tenant_id = :tenant"
    counting = text(f"SELECT count(*) {expired}")
    if kept:
        expired += f" AND NOT {kept}"
    deleting = text(
        # Materialized: a LIMIT that is evaluated again would lock and delete other rows.
        f"WITH expired AS MATERIALIZED (SELECT tenant_id, id {expired} ORDER BY expires_at"
        " LIMIT :batch FOR UPDATE SKIP LOCKED)"
        f" DELETE FROM {table} USING expired"
        f" WHERE {table}.tenant_id = expired.tenant_id AND {table}.id = expired.id"
    )
    now = bindparam("now", type_=Timestamp())
    return counting.bindparams(now), deleting.bindparams(now)
