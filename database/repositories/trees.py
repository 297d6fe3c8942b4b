"""Messages of several branches, appended at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Uuid, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm.attributes import set_committed_value

from database.errors import InvalidReferenceError, InvalidValueError
from database.repositories.appending import append_all
from database.repositories.bookkeeping import lock, move_head, recount
from database.repositories.links import before
from database.session import tenant_of
from database.units import transaction

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.orm import Session

    from database.models.message import Message

__all__ = ["append_tree"]

_LINK = text("""
UPDATE messages AS item SET parent_id = link.parent_id
FROM unnest(:ids, :parents) AS link (id, parent_id)
WHERE item.tenant_id = :tenant AND item.id = link.id
""").bindparams(bindparam("ids", type_=ARRAY(Uuid())), bindparam("parents", type_=ARRAY(Uuid())))


def append_tree(
    db: Session,
    conversation: UUID,
    rows: Sequence[Mapping[str, Any]],
    follows: Sequence[int | None],
    now: datetime,
) -> list[Message]:
    """Append checked messages, and link those that do not follow the one in front of them."""
    _check(rows, follows)
    firsts = [n for n, parent in enumerate(follows) if n > 0 and parent != n - 1]
    if not firsts:
        return append_all(db, conversation, rows, now)
    with transaction(db):
        if lock(db, conversation) is None:
            raise InvalidReferenceError("conversation_id")
        messages = append_all(db, conversation, rows, now)
        root = before(db, messages[0].id)
        for n in firsts:
            parent = follows[n]
            link = root if parent is None else messages[parent].id
            set_committed_value(messages[n], "parent_id", link or messages[n].id)
        linked = {
            "ids": [messages[n].id for n in firsts],
            "parents": [messages[n].parent_id for n in firsts],
        }
        db.execute(_LINK, {"tenant": tenant_of(db), **linked})
        move_head(db, conversation, messages[-1].id)
        recount(db, conversation, forks=False)
        return messages


def _check(rows: Sequence[Mapping[str, Any]], follows: Sequence[int | None]) -> None:
    if not isinstance(follows, Sequence) or len(follows) != len(rows):
        raise InvalidValueError("follows", "must be a sequence with an entry for each message")
    for n, parent in enumerate(follows):
        if parent is not None and (type(parent) is not int or not 0 <= parent < n):
            raise InvalidValueError("follows", "must be numbers of earlier messages, or None")
    if any(row.get("idempotency_key") is not None for row in rows):
        # The message that has a key already stands in another place.
        raise InvalidValueError("idempotency_key", "must be None in a tree")
