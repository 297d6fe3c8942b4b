"""What follows what: links between messages, kept whole when one of them is deleted."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import Uuid, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY

from database.repositories.bookkeeping import locked_forks, recount
from database.repositories.histories import read_path
from database.session import tenant_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from uuid import UUID

    from sqlalchemy import TextClause, TextualSelect
    from sqlalchemy.orm import Session

__all__ = ["PURGE", "before", "detaching_forks", "is_followed", "unlink", "unlink_deactivated"]


def _statement(sql: str) -> TextClause:
    types: dict[str, Any] = dict.fromkeys(("id", "before", "conversation"), Uuid())
    types["users"] = ARRAY(Uuid())
    given = ((name, kind) for name, kind in types.items() if re.search(rf":{name}\b", sql))
    return text(sql).bindparams(*(bindparam(name, type_=kind) for name, kind in given))


_BEFORE = _statement("""
SELECT CASE WHEN parent_id IS NOT NULL THEN nullif(parent_id, id) ELSE (
    SELECT earlier.id FROM messages AS earlier
    WHERE earlier.tenant_id = :tenant AND earlier.conversation_id = item.conversation_id
        AND earlier.position < item.position
    ORDER BY earlier.position DESC LIMIT 1
) END
FROM messages AS item WHERE item.tenant_id = :tenant AND item.id = :id""")

_NEXT = """
    SELECT later.id, later.parent_id FROM messages AS later, messages AS item
    WHERE item.tenant_id = :tenant AND item.id = :id
        AND later.tenant_id = :tenant AND later.conversation_id = item.conversation_id
        AND later.position > item.position {condition}
    ORDER BY later.position LIMIT 1"""
_IS_FOLLOWED = _statement(f"""
SELECT EXISTS (SELECT FROM ({_NEXT.format(condition="")}) AS next WHERE parent_id IS NULL)
    OR EXISTS (
        SELECT FROM messages WHERE tenant_id = :tenant AND parent_id = :id AND id <> :id)""")


def _unlinking(condition: str) -> TextualSelect:
    """What follows a message by position or by a link, follows the one before it by a link."""
    return _statement(f"""
WITH next AS ({_NEXT.format(condition=condition)}),
follower AS (
    UPDATE messages AS item SET parent_id = coalesce(:before, item.id)
    FROM messages AS gone, next
    WHERE gone.tenant_id = :tenant AND gone.id = :id AND gone.parent_id IS NOT NULL
        AND item.tenant_id = :tenant AND item.id = next.id AND next.parent_id IS NULL
),
children AS (
    UPDATE messages SET parent_id = coalesce(:before, id)
    WHERE tenant_id = :tenant AND parent_id = :id AND id <> :id
)
UPDATE conversations
SET head_id = CASE head_id WHEN :id THEN :before ELSE head_id END,
    forked_at_id = CASE forked_at_id WHEN :id THEN :before ELSE forked_at_id END
WHERE tenant_id = :tenant AND (head_id = :id OR forked_at_id = :id)
RETURNING id""").columns(id=Uuid())


_UNLINK = _unlinking("")
# All that is deactivated goes with it.
_UNLINK_DEACTIVATED = _unlinking("AND (later.is_active OR later.parent_id IS NOT NULL)")

PURGE = _statement("""
WITH place AS (
    SELECT is_branched OR is_shared AS is_linked FROM conversations
    WHERE tenant_id = :tenant AND id = :conversation FOR UPDATE
),
purged AS (
    DELETE FROM messages
    WHERE tenant_id = :tenant AND conversation_id = :conversation AND NOT is_active
        AND (SELECT is_linked FROM place) = :linked
    RETURNING 1
)
SELECT (SELECT is_linked FROM place), (SELECT count(*) FROM purged)""")
"""Deletes the deactivated messages of a conversation that is `linked` to others, or is not.

Returns whether it is, and how many messages are gone.
"""
_LINKED = _statement("""
SELECT id FROM messages AS item
WHERE tenant_id = :tenant AND conversation_id = :conversation AND NOT is_active
    AND (parent_id IS NOT NULL
        OR EXISTS (SELECT FROM messages WHERE tenant_id = :tenant AND parent_id = item.id)
        OR EXISTS (SELECT FROM conversations WHERE tenant_id = :tenant AND head_id = item.id)
        OR EXISTS (SELECT FROM conversations WHERE tenant_id = :tenant AND forked_at_id = item.id))
ORDER BY position DESC""")

# Materialized: the condition would go into a subquery, and only what fulfils it be locked.
_LOCK_THEIRS = _statement("""
WITH locked AS MATERIALIZED (SELECT id, is_shared FROM conversations
    WHERE tenant_id = :tenant AND user_id = ANY(:users) ORDER BY id FOR UPDATE)
SELECT id FROM locked WHERE is_shared""").columns(id=Uuid())
_LOCK_USERS = _statement("""
SELECT id FROM users
WHERE tenant_id = :tenant AND id = ANY(:users) AND (:admins OR NOT is_admin)
ORDER BY id FOR UPDATE""").columns(id=Uuid())
_DETACH = _statement("""
UPDATE messages AS item SET parent_id = item.id
FROM messages AS gone, conversations AS theirs, conversations AS ours
WHERE theirs.tenant_id = :tenant AND theirs.user_id = ANY(:users) AND theirs.is_shared
    AND gone.tenant_id = :tenant AND gone.conversation_id = theirs.id
    AND item.tenant_id = :tenant AND item.parent_id = gone.id
    AND ours.tenant_id = :tenant AND ours.id = item.conversation_id
    AND (ours.user_id = ANY(:users)) IS NOT TRUE""")


def before(db: Session, message: UUID) -> UUID | None:
    """Return the id of the message that a message follows, or None."""
    parameters = {"tenant": tenant_of(db), "id": message}
    found: UUID | None = db.scalar(_BEFORE.columns(id=Uuid()), parameters)
    return found


def is_followed(db: Session, message: UUID) -> bool:
    """Tell whether another message follows a message, in its conversation or in a fork."""
    return bool(db.scalar(_IS_FOLLOWED, {"tenant": tenant_of(db), "id": message}))


def unlink(db: Session, message: UUID) -> list[UUID]:
    """Let what refers to a message refer to the one before it, so that it can be deleted.

    Call it behind a lock on its conversation.

    Returns:
        The conversations that ended or began with it.
    """
    parameters = {"tenant": tenant_of(db), "id": message, "before": before(db, message)}
    return list(db.scalars(_UNLINK, parameters))


def unlink_deactivated(db: Session, conversation: UUID) -> None:
    """Let what refers to deactivated messages of a locked conversation refer to active ones."""
    tenant = tenant_of(db)
    found = db.scalars(_LINKED.columns(id=Uuid()), {"tenant": tenant, "conversation": conversation})
    for message in found.all():
        active = next(iter(read_path(db, message, {"limit": 1})), None)
        parameters = {"id": message, "before": active.id if active else None}
        db.execute(_UNLINK_DEACTIVATED, {"tenant": tenant, **parameters})


@contextmanager
def detaching_forks(
    db: Session, users: Sequence[UUID], *, admins: bool = True
) -> Iterator[Sequence[UUID]]:
    """Delete users inside, or not the administrators: others' forks then begin with their own.

    Locks the users' conversations, the forks of these, and the users; gives the users to delete.
    """
    parameters = {"tenant": tenant_of(db), "users": users}
    # The users last: who has locked a conversation may yet write a row that refers to its user. And
    # the conversations again, for behind that lock nobody gets another one.
    _lock_theirs(db, parameters)
    found = db.scalars(_LOCK_USERS, {**parameters, "admins": admins}).all()
    parameters["users"] = found
    forks = _lock_theirs(db, parameters)
    if forks:
        db.execute(_DETACH, parameters)
    yield found
    for fork in forks:
        recount(db, fork, forks=False)


def _lock_theirs(db: Session, parameters: Mapping[str, Any]) -> list[UUID]:
    """Lock conversations of users, and their forks; return those forks that are others'."""
    shared = db.scalars(_LOCK_THEIRS, parameters).all()
    forks = locked_forks(db, shared) if shared else ()
    return [fork.id for fork in forks if fork.user_id not in parameters["users"]]
