"""Messages read: the history of a conversation, the way to a message, and search."""

from __future__ import annotations

import builtins
from contextlib import closing
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import Engine, Text, Uuid, select
from sqlalchemy.dialects.postgresql import JSONPATH

from database.errors import InvalidValueError
from database.models.message import Message
from database.repositories.base import Repository
from database.repositories.conditions import json_paths
from database.repositories.histories import (
    IS_LINEAR,
    OF_CONVERSATION,
    Body,
    count_roles,
    last_ids,
    messages_of,
    read_bodies,
    read_bodies_to,
    read_data,
    read_history,
    read_path,
)
from database.repositories.paths import HEAD
from database.repositories.searching import Search
from database.repositories.statements import OPTIONS
from database.repositories.threads import conversation_id_of
from database.repositories.turns import read_turns
from database.session import TenantSession, tenant_of
from database.units import is_owned, translated

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping
    from datetime import datetime

    from sqlalchemy.orm import Session

    from database.models.conversation import Conversation
    from database.models.message import Role
    from database.pagination import SearchPage
    from database.repositories.queries import Mode

__all__ = ["MessageReads"]

_LINEAR = (
    select(Message).where(*OF_CONVERSATION, IS_LINEAR, Message.is_active).order_by(Message.position)
)
_BRANCHED = messages_of(HEAD)
_SEARCH = Search(
    Message,
    {"user": Uuid(), "conversation": Uuid(), "role": Text(), "extra_data": JSONPATH()},
    lambda message: message.content,
)


class MessageReads(Repository[Message]):
    """What `MessageRepository` reads.

    Reads leave out deactivated messages, and find nothing in an unknown conversation.
    """

    model = Message

    @classmethod
    def history(
        cls,
        db: Session,
        conversation_id: UUID | str,
        *,
        limit: int | None = None,
        before: int | None = None,
        after: int | None = None,
        turns: int | None = None,
    ) -> builtins.list[Message]:
        """Return the newest messages of the history, oldest of them first.

        The history of a conversation that has branched is the way to its head.

        Args:
            db: The session.
            conversation_id: Whose.
            limit: How many at most; None is all.
            before: Only messages at positions below this one.
            after: Only messages at positions above this one.
            turns: In place of a limit, how many turns: it begins with what a user said, and holds
                the calls of all tool results in it, for which it can be longer.

        Raises:
            InvalidValueError: An argument is negative, or both limit and turns are given.
        """
        if limit is not None and turns is not None:
            raise InvalidValueError("turns", "must not be given together with limit")
        bounds = _bounds(limit=limit, before=before, after=after, turns=turns)
        conversation = cls._conversation(db, conversation_id)
        if turns is not None:
            return read_turns(db, conversation, bounds)
        return read_history(db, conversation, bounds)

    @classmethod
    def history_to(
        cls, db: Session, message_id: UUID | str, *, limit: int | None = None
    ) -> builtins.list[Message]:
        """Return the newest messages that lead to a message, itself the last: one query.

        In whatever branch it is; nothing for an unknown one.
        """
        return read_path(db, cls._id(message_id, "message_id"), _bounds(limit=limit))

    @classmethod
    def window(
        cls, db: Session, conversation_id: UUID | str, start: int, end: int
    ) -> builtins.list[Message]:
        """Return the history's messages at positions `start` to `end`, both included, in order."""
        bounds = _bounds(start=start, end=end)
        return read_history(db, cls._conversation(db, conversation_id), bounds)

    @classmethod
    def bodies(
        cls,
        db: Session,
        conversation_id: UUID | str,
        *,
        limit: int | None = None,
        before: int | None = None,
    ) -> builtins.list[Body]:
        """Return of `history` only what a framework needs, in less than half the time."""
        bounds = _bounds(limit=limit, before=before)
        return read_bodies(db, cls._conversation(db, conversation_id), bounds)

    @classmethod
    def data(
        cls,
        db: Session,
        conversation_id: UUID | str,
        data_format: str,
        *,
        limit: int | None = None,
    ) -> builtins.list[bytes | None]:
        """Return of `history` only the data, None where it has another format: the fastest read."""
        conversation = cls._conversation(db, conversation_id)
        return read_data(db, conversation, data_format, _bounds(limit=limit))

    @classmethod
    def bodies_to(
        cls, db: Session, message_id: UUID | str, *, limit: int | None = None
    ) -> builtins.list[Body]:
        """Return of `history_to` only what a framework needs."""
        return read_bodies_to(db, cls._id(message_id, "message_id"), _bounds(limit=limit))

    @classmethod
    def roles_to(cls, db: Session, message_id: UUID | str) -> dict[Role, int]:
        """Return how many messages of each role `history_to` returns."""
        return count_roles(db, cls._id(message_id, "message_id"))

    @classmethod
    def last_ids(cls, db: Session, conversations: Iterable[Conversation]) -> dict[UUID, UUID]:
        """Return the ids of the newest messages by conversation, for those that have any.

        One query, and one for each conversation that has branched.
        """
        known = list(conversations)
        found = last_ids(db, [one.id for one in known if not one.is_branched])
        for one in known:
            if one.is_branched and (last := cls.get_last(db, one.id)) is not None:
                found[one.id] = last.id
        return found

    @classmethod
    def get_last(cls, db: Session, conversation_id: UUID | str) -> Message | None:
        """Return the newest message, or None."""
        return next(iter(cls.history(db, conversation_id, limit=1)), None)

    @classmethod
    def iterate(
        cls, db: Session, conversation_id: UUID | str, *, batch_size: int = 500
    ) -> Generator[Message, None, None]:
        """Yield the history in order, through a server-side cursor: for histories of any length.

        Outside a unit it reads through a session of its own, which holds one connection until the
        iterator ends or is closed, and sees what was committed when it began.

        Args:
            db: The session.
            conversation_id: Whose.
            batch_size: How many messages are in memory at a time.
        """
        from database.rules import check_number

        parameters = {
            "conversation": cls._conversation(db, conversation_id),
            "tenant": tenant_of(db),
        }
        size = check_number("batch_size", batch_size, 1, 100_000)
        bind = db.get_bind()
        if is_owned(db) or not isinstance(bind, Engine):
            with translated(), closing(_streamed(db, parameters, size)) as messages:
                yield from messages
            return
        # Also beside a transaction that a read of the caller began: the next write ends that.
        with (
            translated(),
            TenantSession(bind, tenant_id=tenant_of(db)) as own,
            closing(_streamed(own, parameters, size)) as messages,
        ):
            for message in messages:
                own.expunge(message)
                yield message

    @classmethod
    def search(
        cls,
        db: Session,
        query: str | None,
        *,
        user_id: UUID | str | None = None,
        conversation_id: UUID | str | None = None,
        mode: Mode = "text",
        role: Role | str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        where: Mapping[str | tuple[str, ...], Any] | None = None,
        highlight: tuple[str, str] | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> SearchPage[Message]:
        """Return a page of the messages that a query finds, best first, then newest.

        Substrings have no index: mode "substring" reads all messages of the conversation, of the
        user or of the tenant.

        Args:
            db: The session.
            query: As for `ContextRepository.search`; so are mode, highlight, limit and cursor.
            user_id: Only in this user's conversations.
            conversation_id: Only in this one.
            mode: "text" or "substring".
            role: Only by this role.
            since: Only messages made at this time or later.
            until: Only messages made before this time.
            where: Conditions on extra_data.
            highlight: What to put before and after hits, for snippets.
            limit: How many at most, 1 to 1,000.
            cursor: `next_cursor` of the page before.

        Raises:
            InvalidValueError: An argument is not valid.
        """
        filters: dict[str, Any] = dict(json_paths({} if where is None else where, ("extra_data",)))
        if user_id is not None:
            filters["user"] = cls._id(user_id, "user_id")
        if conversation_id is not None:
            filters["conversation"] = cls._conversation(db, conversation_id)
        if role is not None:
            filters["role"] = cls._check(db, {"role": role}, partial=True)["role"]
        return _SEARCH.run(
            db,
            query,
            filters,
            mode=mode,
            since=since,
            until=until,
            highlight=highlight,
            limit=limit,
            cursor=cursor,
        )

    _conversation = staticmethod(conversation_id_of)


def _bounds(**given: int | None) -> dict[Any, int]:
    from database.rules import check_number

    return {
        name: check_number(name, value, 1 if name in ("limit", "turns") else 0, 2**62)
        for name, value in given.items()
        if value is not None
    }


def _streamed(
    db: Session, parameters: Mapping[str, Any], batch_size: int
) -> Generator[Message, None, None]:
    options = {**OPTIONS, "yield_per": batch_size}
    for statement in (_LINEAR, _BRANCHED):
        message = None
        with closing(db.scalars(statement, parameters, execution_options=options)) as messages:
            for message in messages:
                yield message
        if message is not None:
            return
