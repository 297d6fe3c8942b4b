"""The way to a message: through branches and forks, in ranges of positions.

Positions rise along every way, for what follows a message is written later: so a way is read by a
few range scans, one for each branch that it goes through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from sqlalchemy import Uuid, bindparam, func, literal, select, true

from database.models.conversation import Conversation
from database.models.message import Message
from database.repositories.loading import fetch
from database.session import tenant_of

if TYPE_CHECKING:
    from sqlalchemy import CTE, ColumnElement, FromClause, Select
    from sqlalchemy.orm import Session

__all__ = ["HEAD", "Range", "along", "path_to", "ranges_to", "shared_ranges"]

_TENANT: Any = bindparam("tenant")

HEAD = (
    select(Conversation.head_id)
    .where(Conversation.tenant_id == _TENANT, Conversation.id == bindparam("conversation"))
    .scalar_subquery()
)
"""The head of the conversation that a statement has as a parameter."""


class Range(NamedTuple):
    """Messages of one conversation that follow one another.

    Attributes:
        conversation_id: Whose they are.
        start: The position of the first.
        end: The position of the last.
        last_id: The id of the last.
    """

    conversation_id: UUID
    start: int
    end: int
    last_id: UUID

    def holds(self, message: Message) -> bool:
        """Tell whether a message is one of them."""
        return (
            message.conversation_id == self.conversation_id
            and self.start <= message.position <= self.end
        )


def path_to(head: ColumnElement[Any]) -> CTE:
    """Return the ranges that lead to a message, the newest first, as columns like `Range`'s.

    Args:
        head: The message's id, of a statement that has the parameter `tenant`.
    """

    def step(name: str) -> tuple[Any, Any, Any]:
        last = Message.__table__.alias(f"{name}_last")
        other = Message.__table__.alias(f"{name}_first")
        first = (
            select(other.c.position, func.nullif(other.c.parent_id, other.c.id).label("before"))
            .where(
                other.c.tenant_id == _TENANT,
                other.c.conversation_id == last.c.conversation_id,
                other.c.position <= last.c.position,
                other.c.parent_id.is_not(None),
            )
            .order_by(other.c.position.desc())
            .limit(1)
            .lateral(f"{name}_start")
        )
        columns = select(
            last.c.conversation_id,
            func.coalesce(first.c.position, literal(1)).label("start"),
            last.c.position.label("end"),
            last.c.id.label("last_id"),
            first.c.before,
        )
        return columns, last, first

    columns, last, first = step("head")
    path = (
        columns.select_from(last.outerjoin(first, true()))
        .where(last.c.tenant_id == _TENANT, last.c.id == head)
        .cte("path", recursive=True)
    )
    columns, last, first = step("earlier")
    whole: CTE = path.union_all(
        columns.select_from(
            path.join(last, (last.c.tenant_id == _TENANT) & (last.c.id == path.c.before)).outerjoin(
                first, true()
            )
        )
    )
    return whole


def along(path: CTE, statement: Any, message: Any = Message) -> tuple[FromClause, Any]:
    """Return what to select from, and its columns, for a statement made of a path's messages.

    Range by range, by their index: the offset keeps the planner from joining, for which it would
    read whole tables as long as its statistics are behind.
    """
    part = (
        statement.where(
            message.tenant_id == _TENANT,
            message.conversation_id == path.c.conversation_id,
            message.position.between(path.c.start, path.c.end),
        )
        .offset(0)
        .lateral()
    )
    return path.join(part, true()), part


_SHARED_END = (
    select(Conversation.forked_at_id)
    .where(Conversation.tenant_id == _TENANT, Conversation.id == bindparam("conversation"))
    .scalar_subquery()
)


def _ranges(head: ColumnElement[Any]) -> Select[Any]:
    path = path_to(head)
    return select(*(path.c[name] for name in Range._fields))


_RANGES = _ranges(bindparam("head", type_=Uuid()))
_SHARED_RANGES = _ranges(_SHARED_END)


def ranges_to(db: Session, head: UUID | None) -> list[Range]:
    """Return the ranges that lead to a message, the newest first; none to None."""
    if head is None:
        return []
    return [Range(*row) for row in fetch(db, _RANGES, {"tenant": tenant_of(db), "head": head})]


def shared_ranges(db: Session, conversation: UUID) -> list[Range]:
    """Return the ranges that a conversation shares as a fork, the newest first."""
    parameters = {"tenant": tenant_of(db), "conversation": conversation}
    return [Range(*row) for row in fetch(db, _SHARED_RANGES, parameters)]
