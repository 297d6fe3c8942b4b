"""Conversations that share the history of others, and what stays of those when they are deleted."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import Uuid, bindparam, text

from database.errors import ConflictError
from database.repositories.bookkeeping import lock, lock_forks, recount
from database.repositories.branching import message_in, newest_shown
from database.repositories.paths import ranges_to
from database.session import ALL_TENANTS, TenantSession, binding_of, enter_tenant, tenant_of
from database.types import Timestamp, utcnow
from database.units import is_owned, one_read, one_write, transaction

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import TextClause
    from sqlalchemy.orm import Session

    from database.models.conversation import Conversation
    from database.models.message import Message

__all__ = ["begin_fork", "clear_conversation", "delete_conversation", "purge_shared", "shared"]


def _statement(sql: str) -> TextClause:
    types: dict[str, Any] = {
        "id": Uuid(),
        "heir": Uuid(),
        "conversation": Uuid(),
        "now": Timestamp(),
    }
    given = ((name, kind) for name, kind in types.items() if re.search(rf":{name}\b", sql))
    return text(sql).bindparams(*(bindparam(name, type_=kind) for name, kind in given))


# Whoever deletes the conversation at the same time finds this out when it has the lock.
_SHARE = _statement("""
UPDATE conversations SET is_shared = true
WHERE tenant_id = :tenant AND id = :conversation
RETURNING id""")
_BEGIN_FORK = _statement("""
UPDATE conversations
SET forked_at_id = :id, head_id = :id, last_position = :position, is_branched = true
WHERE tenant_id = :tenant AND id = :conversation""")
_CLEAR = _statement(
    "DELETE FROM messages WHERE tenant_id = :tenant AND conversation_id = :conversation"
)
_BEGIN_ANEW = _statement("""
UPDATE conversations SET is_branched = false, head_id = NULL, forked_at_id = NULL
WHERE tenant_id = :tenant AND id = :conversation""")
_CONDITIONS = {"id": "id = :id", "thread_id": "thread_id = :thread_id"}
_DELETE_UNSHARED = {
    key: _statement(
        f"DELETE FROM conversations WHERE tenant_id = :tenant AND {condition} AND NOT is_shared"
        " RETURNING id"
    )
    for key, condition in _CONDITIONS.items()
}
_FIND = {
    key: _statement(f"SELECT id FROM conversations WHERE tenant_id = :tenant AND {condition}")
    for key, condition in _CONDITIONS.items()
}
_DELETE_SHARED = _statement("DELETE FROM conversations WHERE tenant_id = :tenant AND id = :id")
_FORKS = _statement("""
SELECT fork.id, shared.id AS forked_at_id FROM conversations AS fork
JOIN messages AS shared ON shared.tenant_id = :tenant AND shared.id = fork.forked_at_id
WHERE fork.tenant_id = :tenant AND fork.id <> :conversation
    AND shared.conversation_id = :conversation
ORDER BY shared.position DESC, fork.id""").columns(id=Uuid(), forked_at_id=Uuid())
# The heir may have given the same key itself.
_MOVE = _statement("""
UPDATE messages SET conversation_id = :heir, idempotency_key = NULL
WHERE tenant_id = :tenant AND conversation_id = :conversation
    AND position BETWEEN :start AND :end""")
# What follows by position what moves away, follows it by a link from now on.
_LINK = _statement("""
UPDATE messages SET parent_id = :id
WHERE tenant_id = :tenant AND parent_id IS NULL AND id = (
    SELECT later.id FROM messages AS later
    WHERE later.tenant_id = :tenant AND later.conversation_id = :conversation
        AND later.position > :end
    ORDER BY later.position LIMIT 1)""")
_INHERIT = _statement("""
UPDATE conversations SET forked_at_id = :id, is_shared = true
WHERE tenant_id = :tenant AND id = :heir""")


_SHARED_AND_EXPIRED = "FROM conversations WHERE expires_at <= :now AND is_shared"
_EXPIRED = _statement(
    f"SELECT id {_SHARED_AND_EXPIRED} AND tenant_id = :tenant ORDER BY expires_at"
).columns(id=Uuid())
_TENANTS = _statement(f"SELECT DISTINCT tenant_id {_SHARED_AND_EXPIRED}")


def shared(
    db: Session, conversation: Conversation, at: Message | UUID | str | int | None
) -> Message | None:
    """Return the last message that a fork shows, behind the lock of the conversation it is of.

    Raises:
        NotFoundError: The forked conversation has no such message.
        ConflictError: The forked conversation is deleted by somebody else just now.
    """
    while True:
        # Undone where it has moved, which drops the lock: the next one may come before it in order.
        with suppress(_MovedError), transaction(db):
            return _shared(db, conversation, at)


class _MovedError(Exception):
    """The last message that a fork shows is not where it was."""


def _shared(
    db: Session, conversation: Conversation, at: Message | UUID | str | int | None
) -> Message | None:
    last = _last(db, conversation, at)
    if last is not None:
        place = (last.id, last.conversation_id)
        parameters = {"tenant": tenant_of(db), "conversation": last.conversation_id}
        if db.scalar(_SHARE, parameters) is not None:
            # While this waited for the lock, it may have been deleted, or become another fork's.
            last = _last(db, conversation, at)
            if last is not None and place == (last.id, last.conversation_id):
                return last
    if db.scalar(_FIND["id"], {"tenant": tenant_of(db), "id": conversation.id}) is None:
        msg = "conversation: was deleted meanwhile"
        raise ConflictError(msg)
    if last is None:
        return None
    raise _MovedError


def _last(
    db: Session, conversation: Conversation, at: Message | UUID | str | int | None
) -> Message | None:
    return newest_shown(db, conversation.id) if at is None else message_in(db, conversation, at)


def begin_fork(db: Session, fork: UUID, last: Message) -> None:
    """Let the history of a new conversation be the one that ends with a message."""
    parameters = {"tenant": tenant_of(db), "conversation": fork, "position": last.position}
    db.execute(_BEGIN_FORK, {**parameters, "id": last.id})
    recount(db, fork, forks=False)


def delete_conversation(db: Session, key: Literal["id", "thread_id"], value: UUID | str) -> bool:
    """Delete a conversation but for the messages that forks show, which become theirs."""
    parameters = {"tenant": tenant_of(db), key: value}
    with one_write(db) as connection:
        if connection.scalar(_DELETE_UNSHARED[key], parameters) is not None:
            return True
    with transaction(db):
        found = db.scalar(_FIND[key].columns(id=Uuid()), parameters)
        if found is None or lock(db, found) is None:
            return False
        _delete_locked(db, found)
        return True


def _delete_expired(db: Session, conversation: UUID, now: datetime) -> bool:
    with transaction(db):
        found = lock(db, conversation)
        # While this waited for the lock, it may have been given more time.
        if found is None or found.expires_at is None or found.expires_at > now:
            return False
        _delete_locked(db, conversation)
        return True


def _delete_locked(db: Session, conversation: UUID) -> None:
    _bequeath(db, conversation)
    db.execute(_DELETE_SHARED, {"tenant": tenant_of(db), "id": conversation})


def clear_conversation(db: Session, conversation: UUID) -> int:
    """Delete all messages of a conversation but for those that forks show; return how many."""
    parameters = {"tenant": tenant_of(db), "conversation": conversation}
    with transaction(db):
        found = lock(db, conversation)
        if found is None:
            return 0
        if found.is_shared:
            _bequeath(db, conversation)
        deleted = db.connection().execute(_CLEAR, parameters).rowcount
        if deleted or found.is_branched:
            db.execute(_BEGIN_ANEW, parameters)
            recount(db, conversation)
        return deleted


def purge_shared(db: Session) -> int:
    """Delete the expired conversations whose messages forks show; return how many."""
    tenant, now = binding_of(db), utcnow()
    if tenant is not ALL_TENANTS:
        with one_read(db) as connection:
            found = connection.scalars(_EXPIRED, {"now": now, "tenant": tenant}).all()
        return sum(_delete_expired(db, conversation, now) for conversation in found)
    with one_read(db) as connection:
        tenants = connection.scalars(_TENANTS, {"now": now}).all()
    if is_owned(db):
        return _purge_within(db, tenants)
    purged = 0
    for name in tenants:
        with TenantSession(db.get_bind(), tenant_id=name) as own:
            purged += purge_shared(own)
    return purged


def _purge_within(db: Session, tenants: Sequence[str]) -> int:
    """Delete them in the unit of a session of all tenants, which works in each in turn."""
    purged = 0
    with transaction(db):
        connection = db.connection()
        for name in tenants:
            with TenantSession(connection, tenant_id=name) as own:
                purged += purge_shared(own)
        enter_tenant(db, connection)
    return purged


def _bequeath(db: Session, conversation: UUID) -> None:
    """Give each fork what it shows of a conversation, the one that shows the most first.

    There is room for it: a fork's own messages are numbered from behind what it shows.
    """
    parameters = {"tenant": tenant_of(db), "conversation": conversation}
    # All of them before one gets anything: else one that is deleted or cleared just now could.
    lock_forks(db, conversation)
    for heir, forked_at in db.execute(_FORKS, parameters).all():
        _leave_to(db, parameters, conversation, heir, forked_at)


def _leave_to(
    db: Session, parameters: Mapping[str, Any], conversation: UUID, heir: UUID, forked_at: UUID
) -> None:
    beyond = None
    for part in ranges_to(db, forked_at):
        if part.conversation_id != conversation:
            beyond = part.last_id
            break
        db.execute(_LINK, {**parameters, "end": part.end, "id": part.last_id})
        bounds = {"start": part.start, "end": part.end}
        db.execute(_MOVE, {**parameters, **bounds, "heir": heir})
    db.execute(_INHERIT, {**parameters, "heir": heir, "id": beyond})
