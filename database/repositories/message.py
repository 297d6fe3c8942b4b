"""Messages: appended in one statement, read by position."""

from __future__ import annotations

import builtins
from contextlib import closing
from functools import cache
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import Engine, Text, Uuid, any_, bindparam, delete, select, update
from sqlalchemy.dialects.postgresql import ARRAY, JSONPATH

from database.errors import InvalidValueError
from database.models.base import uuid7
from database.models.message import Message
from database.repositories.appending import append_all, append_one
from database.repositories.base import Repository
from database.repositories.bookkeeping import lock, recount
from database.repositories.conditions import json_paths
from database.repositories.histories import (
    BODIES,
    MESSAGES,
    OF_CONVERSATION,
    Body,
    read_bodies,
    read_messages,
)
from database.repositories.searching import Search
from database.repositories.statements import OPTIONS
from database.repositories.threads import conversation_id_of
from database.session import TenantSession, tenant_of
from database.types import utcnow
from database.units import is_owned, one_write, transaction, translated

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy import Select
    from sqlalchemy.orm import Session

    from database.models.message import Role
    from database.pagination import SearchPage
    from database.repositories.queries import Mode

__all__ = ["MessageRepository"]

_MANAGED = ("conversation_id", "position", "parent_id", "is_active")

_ACTIVE = MESSAGES.select.where(*OF_CONVERSATION, Message.is_active)
_BODIES = BODIES.where(*OF_CONVERSATION, Message.is_active)
_WINDOW = _ACTIVE.where(Message.position.between(bindparam("start"), bindparam("end"))).order_by(
    Message.position
)
_ALL = (
    select(Message)
    .where(*OF_CONVERSATION, Message.is_active)
    .order_by(Message.position)
    .execution_options(**OPTIONS)
)
_CLEAR = (
    delete(Message)
    .where(*OF_CONVERSATION)
    .execution_options(synchronize_session=False, names_tenant=True)
)
_SEARCH = Search(
    Message,
    {"user": Uuid(), "conversation": Uuid(), "role": Text(), "extra_data": JSONPATH()},
    lambda message: message.content,
)


class MessageRepository(Repository[Message]):
    """The messages of a tenant's conversations.

    `conversation_id` is a UUID, or its text or the conversation's thread_id, which costs one query
    more. Reads leave out deactivated messages, and find nothing in an unknown conversation.
    """

    model = Message

    @classmethod
    def append(
        cls,
        db: Session,
        conversation_id: UUID | str,
        *,
        role: Role | str,
        content: str,
        thinking: str | None = None,
        extra_data: Any = None,
        data: bytes | None = None,
        data_format: str | None = None,
        run_id: str | None = None,
        tool_call_id: str | None = None,
        model: str | None = None,
        input_tokens: int | None = None,
        output_tokens: int | None = None,
        idempotency_key: str | None = None,
        id: UUID | None = None,  # noqa: A002
        created_at: datetime | None = None,
        updated_at: datetime | None = None,
    ) -> Message:
        """Append a message and count it in its conversation, in one statement.

        Locks the conversation's row until the transaction ends: concurrent appends wait, and get
        positions without gap or double.

        Args:
            db: The session.
            conversation_id: Where to.
            role: user, assistant, system or tool.
            content: The text; may be empty.
            thinking: What the model thought before it.
            extra_data: Any JSON value.
            data: A framework's own serialised form.
            data_format: What `data` is, for example "pydantic-ai/1".
            run_id: The agent run it belongs to.
            tool_call_id: The tool call it answers.
            model: Which model wrote it.
            input_tokens: What it cost, 0 or more.
            output_tokens: Likewise.
            idempotency_key: Unique in the conversation: a second append with the same key returns
                the first one's message and writes nothing.
            id: For imports.
            created_at: For imports.
            updated_at: For imports: of the message, not of its conversation.

        Returns:
            The message, with its position.

        Raises:
            InvalidReferenceError: There is no such conversation in the tenant.
            InvalidValueError: A field breaks its rule.
            AlreadyExistsError: There is a message with this id.
        """
        given = {
            "role": role,
            "content": content,
            "thinking": thinking,
            "extra_data": extra_data,
            "data": data,
            "data_format": data_format,
            "run_id": run_id,
            "tool_call_id": tool_call_id,
            "model": model,
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "idempotency_key": idempotency_key,
            "id": id,
            "created_at": created_at,
            "updated_at": updated_at,
        }
        now = utcnow()
        row = cls._row(db, given, now)
        conversation = cls._conversation(db, conversation_id)
        return append_one(db, conversation, row, now)

    @classmethod
    def append_many(
        cls,
        db: Session,
        conversation_id: UUID | str,
        messages: Iterable[Mapping[str, Any]],
    ) -> builtins.list[Message]:
        """Append messages in order, all or none, at consecutive positions.

        Args:
            db: The session.
            conversation_id: Where to.
            messages: Of each the arguments of `append`, by name. One whose idempotency key the
                conversation has already is not appended again.

        Returns:
            The messages in order; for a known idempotency key, the message that has it.

        Raises:
            As `append`. Nothing is written then.
        """
        now = utcnow()
        rows = [cls._row(db, message, now) for message in messages]
        conversation = cls._conversation(db, conversation_id)
        return append_all(db, conversation, rows, now)

    @classmethod
    def history(
        cls,
        db: Session,
        conversation_id: UUID | str,
        *,
        limit: int | None = None,
        before: int | None = None,
        after: int | None = None,
    ) -> builtins.list[Message]:
        """Return the newest messages, oldest of them first.

        Args:
            db: The session.
            conversation_id: Whose.
            limit: How many at most; None is all.
            before: Only messages at positions below this one.
            after: Only messages at positions above this one.

        Raises:
            InvalidValueError: An argument is negative.
        """
        given = _bounds(limit=limit, before=before, after=after)
        conversation = cls._conversation(db, conversation_id)
        found = read_messages(db, _history(frozenset(given)), conversation, given)
        if limit is not None:
            found.reverse()
        return found

    @classmethod
    def bodies(
        cls,
        db: Session,
        conversation_id: UUID | str,
        *,
        limit: int | None = None,
        before: int | None = None,
    ) -> builtins.list[Body]:
        """Return what a framework needs of the newest messages, oldest of them first.

        It is `history` without making entities, which takes longer than reading them.

        Args:
            db: The session.
            conversation_id: Whose.
            limit: As for `history`.
            before: Likewise.
        """
        given = _bounds(limit=limit, before=before)
        conversation = cls._conversation(db, conversation_id)
        found = read_bodies(db, _history(frozenset(given), bodies=True), conversation, given)
        if limit is not None:
            found.reverse()
        return found

    @classmethod
    def window(
        cls, db: Session, conversation_id: UUID | str, start: int, end: int
    ) -> builtins.list[Message]:
        """Return the messages at positions `start` to `end`, both included, in order."""
        from database.rules import check_number

        bounds = {
            "start": check_number("start", start, 0, 2**62),
            "end": check_number("end", end, 0, 2**62),
        }
        return read_messages(db, _WINDOW, cls._conversation(db, conversation_id), bounds)

    @classmethod
    def get_last(cls, db: Session, conversation_id: UUID | str) -> Message | None:
        """Return the newest message, or None."""
        return next(iter(cls.history(db, conversation_id, limit=1)), None)

    @classmethod
    def iterate(
        cls, db: Session, conversation_id: UUID | str, *, batch_size: int = 500
    ) -> Generator[Message, None, None]:
        """Yield all messages in order, through a server-side cursor: for histories of any length.

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
        statement = _ALL.execution_options(
            yield_per=check_number("batch_size", batch_size, 1, 100_000)
        )
        bind = db.get_bind()
        if is_owned(db) or not isinstance(bind, Engine):
            with translated(), closing(db.scalars(statement, parameters)) as messages:
                yield from messages
            return
        # Also beside a transaction that a read of the caller began: the next write ends that.
        with (
            translated(),
            TenantSession(bind, tenant_id=tenant_of(db)) as own,
            closing(own.scalars(statement, parameters)) as messages,
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

    @classmethod
    def pop_last(
        cls, db: Session, conversation_id: UUID | str, *, before: int | None = None
    ) -> Message | None:
        """Delete the newest message for good and return it; no two calls return the same one.

        Args:
            db: The session.
            conversation_id: Whose.
            before: Only a message at a position below this one.

        Returns:
            The message, no longer the session's; None if there is none.
        """
        conversation = cls._conversation(db, conversation_id)
        with transaction(db):
            lock(db, conversation)
            message = next(iter(cls.history(db, conversation, limit=1, before=before)), None)
            if message is None:
                return None
            super().delete(db, message.id)
            recount(db, conversation)
        db.expunge(message)
        return message

    @classmethod
    def clear(cls, db: Session, conversation_id: UUID | str) -> int:
        """Delete all messages of a conversation for good, hidden ones too; return how many.

        The conversation stays, with its metadata; positions are not given again.
        """
        conversation = cls._conversation(db, conversation_id)
        with transaction(db):
            lock(db, conversation)
            parameters = {"tenant": tenant_of(db), "conversation": conversation}
            deleted = db.connection().execute(_CLEAR, parameters).rowcount
            if deleted:
                recount(db, conversation)
            return deleted

    @classmethod
    def deactivate(
        cls,
        db: Session,
        conversation_id: UUID | str,
        ids: Sequence[UUID | str] | None = None,
    ) -> int:
        """Hide messages, all of a conversation or the given ones; return how many."""
        return cls._set_active(db, conversation_id, ids, active=False)

    @classmethod
    def restore(
        cls,
        db: Session,
        conversation_id: UUID | str,
        ids: Sequence[UUID | str] | None = None,
    ) -> int:
        """Show deactivated messages again, all or the given ones; return how many."""
        return cls._set_active(db, conversation_id, ids, active=True)

    @classmethod
    def purge(cls, db: Session, conversation_id: UUID | str) -> int:
        """Delete a conversation's deactivated messages for good; return how many."""
        conversation = cls._conversation(db, conversation_id)
        statement = (
            delete(Message)
            .where(*OF_CONVERSATION, Message.is_active.is_(False))
            .execution_options(synchronize_session=False, names_tenant=True)
        )
        parameters = {"tenant": tenant_of(db), "conversation": conversation}
        with one_write(db) as connection:
            return connection.execute(statement, parameters).rowcount

    @classmethod
    def create(cls, db: Session, *args: Any, **fields: Any) -> Message:
        """Append a message: `append` with `conversation_id` by name."""
        conversation_id = fields.pop("conversation_id", None)
        if args or conversation_id is None:
            raise InvalidValueError("conversation_id", "must be given by name")
        return cls.append_many(db, conversation_id, [fields])[0]

    @classmethod
    def create_many(cls, db: Session, items: Iterable[Mapping[str, Any]]) -> builtins.list[Message]:
        """Append messages to the conversations that they name, all or none."""
        with transaction(db):
            return [cls.create(db, **item) for item in items]

    @classmethod
    def update(cls, db: Session, id: UUID | str, /, *args: Any, **fields: Any) -> Message:  # noqa: A002
        """Change fields of a message in place; its conversation's preview follows.

        Raises:
            NotFoundError: There is no such message in the tenant.
            InvalidValueError: A field breaks its rule, or is not the caller's to set: position,
                conversation_id, is_active (`deactivate`, `restore`).
        """
        cls._refuse_managed(fields, *_MANAGED, "updated_at")
        if "content" not in fields:
            return super().update(db, id, *args, **fields)
        with transaction(db):
            # The conversation first, as everybody locks it: else two could wait for each other.
            lock(db, cls.require(db, id).conversation_id)
            message = super().update(db, id, *args, **fields)
            recount(db, message.conversation_id)
            return message

    @classmethod
    def delete(cls, db: Session, id: UUID | str, /) -> bool:  # noqa: A002
        """Delete a message for good, counting its conversation anew; tell whether there was one."""
        with transaction(db):
            message = cls.get(db, id)
            if message is None:
                return False
            lock(db, message.conversation_id)
            deleted = super().delete(db, id)
            recount(db, message.conversation_id)
            return deleted

    @classmethod
    def _row(cls, db: Session, given: Mapping[str, Any], now: datetime) -> dict[str, Any]:
        cls._refuse_managed(given, *_MANAGED)
        for required in ("role", "content"):
            if given.get(required) is None:
                raise InvalidValueError(required, "must be given")
        row = cls._check(db, {k: v for k, v in given.items() if v is not None}, partial=True)
        row.setdefault("id", uuid7())
        row.setdefault("created_at", now)
        return row

    @staticmethod
    def _refuse_managed(fields: Mapping[str, Any], *names: str) -> None:
        for name in names:
            if name in fields:
                raise InvalidValueError(name, "is set by the repository")

    @classmethod
    def _set_active(
        cls,
        db: Session,
        conversation_id: UUID | str,
        ids: Sequence[UUID | str] | None,
        *,
        active: bool,
    ) -> int:
        conversation = cls._conversation(db, conversation_id)
        statement = (
            update(Message)
            .where(*OF_CONVERSATION, Message.is_active.is_(not active))
            .values(is_active=active, updated_at=utcnow())
            .execution_options(synchronize_session=False, names_tenant=True)
        )
        if ids is not None:
            given = bindparam("ids", [cls._id(id_) for id_ in ids], type_=ARRAY(Uuid()))
            statement = statement.where(Message.id == any_(given))
        with transaction(db):
            lock(db, conversation)
            parameters = {"tenant": tenant_of(db), "conversation": conversation}
            changed = db.connection().execute(statement, parameters).rowcount
            if changed:
                recount(db, conversation)
            return changed

    _conversation = staticmethod(conversation_id_of)


def _bounds(**given: int | None) -> dict[str, int]:
    from database.rules import check_number

    return {
        name: check_number(name, value, 1 if name == "limit" else 0, 2**62)
        for name, value in given.items()
        if value is not None
    }


@cache
def _history(given: frozenset[str], *, bodies: bool = False) -> Select[Any]:
    statement = _BODIES if bodies else _ACTIVE
    if "before" in given:
        statement = statement.where(Message.position < bindparam("before"))
    if "after" in given:
        statement = statement.where(Message.position > bindparam("after"))
    if "limit" not in given:
        return statement.order_by(Message.position)
    return statement.order_by(Message.position.desc()).limit(bindparam("limit"))
