"""Pydantic AI's conversation store on PostgreSQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from uuid import UUID

from pydantic_ai.conversation_store import (
    ConversationConflict,
    ConversationEntry,
    ConversationRecord,
    ConversationStore,
)

from database.config import SessionLocal
from database.errors import AlreadyExistsError, NotFoundError
from database.integrations.pydantic_ai.history import are_ours, read_row, read_rows
from database.integrations.pydantic_ai.records import is_current, metadata_of, record_of
from database.integrations.pydantic_ai.rows import row_of
from database.integrations.worker_threads import in_worker_thread
from database.repositories.base import MAX_PAGE
from database.repositories.conversation import ConversationRepository
from database.repositories.message import MessageRepository
from database.units import transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pydantic_ai.messages import ModelMessage
    from sqlalchemy.orm import Session

    from database.integrations.worker_threads import Sessions
    from database.models.conversation import Conversation
    from database.models.message import Message
    from database.repositories.histories import Body
    from database.session import TenantSession

__all__ = ["PostgresConversationStore"]

T = TypeVar("T")


class PostgresConversationStore(ConversationStore):
    """A store of one tenant's conversations: a conversation_id is a thread_id, an entry a message.

    What it saves, `load_history` and the repositories read, and what those write it loads. To save
    a conversation whose history others have changed since it was loaded is a
    `ConversationConflict`; a new title is none.

    `delete` deletes the messages too, but for those that a fork still shows. No call holds a
    connection when it has returned, and a cancelled one waits for its outcome first.

    Args:
        tenant_id: As for `SessionLocal`.
        user_id: Whose the conversations are that it makes.
        strict: Whether a message that cannot be read is an `UnreadableMessageError`; else it is
            left out of histories, with a warning.
        sessions: Where sessions of the database come from.
    """

    def __init__(
        self,
        *,
        tenant_id: str | None = None,
        user_id: UUID | None = None,
        strict: bool = False,
        sessions: Sessions = SessionLocal,
    ) -> None:
        self.tenant_id = tenant_id
        self.user_id = user_id
        self.strict = strict
        self._sessions = sessions

    async def read_record(self, conversation_id: str) -> ConversationRecord | None:
        """Return the record of a conversation, or None.

        Raises:
            InvalidValueError: It was saved by a newer version.
        """

        def read(db: Session) -> ConversationRecord | None:
            row = ConversationRepository.get_by_thread_id(db, conversation_id)
            return None if row is None else _record(db, row)

        return await self._run(read)

    async def read_records(
        self, *, scope: str | None = None, limit: int | None = None
    ) -> Sequence[ConversationRecord]:
        """Return the records of a scope, or of the tenant, last changed first.

        Raises:
            InvalidValueError: One was saved by a newer version.
        """

        def read(db: Session) -> list[ConversationRecord]:
            rows = list(_listed(db, scope, limit))
            changed = [row for row in rows if not is_current(row)]
            heads = MessageRepository.last_ids(db, changed) if changed else {}
            return [record_of(row, heads.get(row.id)) for row in rows]

        return await self._run(read)

    async def write_record(
        self,
        record: ConversationRecord,
        *,
        new_entries: Sequence[ConversationEntry] = (),
        expected_revision: str | None,
    ) -> None:
        """Store a record and its new entries, all or nothing.

        Raises:
            ConversationConflict: Another revision is stored, or the history would go on from an
                entry that the conversation does not have.
            InvalidValueError: An entry's id is no UUID, or something has no JSON.
        """
        lines = _lines(new_entries)

        def write(db: Session) -> None:
            with transaction(db):
                self._write(db, record, lines, expected_revision)

        try:
            await self._run(write)
        except (NotFoundError, AlreadyExistsError) as error:
            raise ConversationConflict(record.conversation_id) from error

    async def delete_record(self, conversation_id: str, *, expected_revision: str) -> None:
        """Delete a conversation with its messages, but for those that a fork shows.

        Raises:
            ConversationConflict: Another revision is stored, or none.
        """

        def delete(db: Session) -> None:
            with transaction(db):
                row = _locked(db, conversation_id)
                if row is None or _record(db, row).revision != expected_revision:
                    raise ConversationConflict(conversation_id)
                ConversationRepository.delete(db, row.id)

        await self._run(delete)

    async def read_entry(self, entry_id: str) -> ConversationEntry:
        """Return an entry.

        Raises:
            LookupError: The tenant has no such message, or it is hidden.
            UnreadableMessageError: It cannot be read.
        """

        def read(db: Session) -> ConversationEntry:
            rows = _rows_to(db, entry_id, 2)
            parent = rows[-2].id if len(rows) > 1 else None
            return _entry(rows[-1].id, read_row(rows[-1]), parent)

        return await self._run(read)

    async def read_history(
        self, head_id: str | None, *, limit: int | None = None
    ) -> list[ConversationEntry]:
        """Return the entries up to `head_id`, or the last `limit` of them, by one query.

        Raises:
            LookupError: The tenant has no such message, or it is hidden.
            UnreadableMessageError: One cannot be read, and the store is strict.
        """
        if head_id is None or limit == 0:
            return []

        def read(db: Session) -> list[ConversationEntry]:
            # One more tells what the first of them follows.
            rows = _rows_to(db, head_id, None if limit is None else limit + 1)
            parents = dict(
                zip((row.id for row in rows[1:]), (row.id for row in rows), strict=False)
            )
            wanted = rows if limit is None else rows[-limit:]
            readable, _ = read_rows(wanted, strict=self.strict)
            return [_entry(id_, message, parents.get(id_)) for id_, message in readable]

        return await self._run(read)

    async def _run(self, work: Callable[[TenantSession], T]) -> T:
        return await in_worker_thread(work, tenant_id=self.tenant_id, sessions=self._sessions)

    def _write(
        self,
        db: Session,
        record: ConversationRecord,
        lines: list[_Line],
        expected_revision: str | None,
    ) -> None:
        row = _locked(db, record.conversation_id)
        stored = None if row is None else _record(db, row)
        if (None if stored is None else stored.revision) != expected_revision:
            raise ConversationConflict(record.conversation_id)
        if row is None or stored is None:
            head = lines[0].parent_id if lines else record.head_id
            row = self._begin(db, record, head)
        else:
            head = stored.head_id
        for line in lines:
            _go_on_from(db, row, head, line.parent_id)
            head = str(MessageRepository.append_many(db, row.id, line.rows)[-1].id)
        _go_on_from(db, row, head, record.head_id)
        # As the messages have left it.
        row = ConversationRepository.require(db, row.id)
        ConversationRepository.update(
            db,
            row.id,
            scope=record.scope,
            metadata=metadata_of(row, record),
            updated_at=record.updated_at,
        )

    def _begin(self, db: Session, record: ConversationRecord, head: str | None) -> Conversation:
        """Make a conversation whose history is the one that ends with an entry: a fork of its."""
        fields: dict[str, Any] = {"thread_id": record.conversation_id}
        if self.user_id is not None:
            fields["user_id"] = self.user_id
        if head is None:
            return ConversationRepository.create(db, **fields)
        source = MessageRepository.require(db, _id_of(head))
        return ConversationRepository.fork(db, source.conversation_id, at=source.id, **fields)


class _Line(NamedTuple):
    """New entries that follow one another, as rows, and what the first of them follows."""

    parent_id: str | None
    rows: list[dict[str, Any]]


def _lines(entries: Sequence[ConversationEntry]) -> list[_Line]:
    lines: list[_Line] = []
    last = None
    for number, entry in enumerate(entries):
        row = {"id": entry.id, **row_of(entry.message, f"new_entries.{number}")}
        if last is None or entry.parent_id != last:
            lines.append(_Line(entry.parent_id, []))
        lines[-1].rows.append(row)
        last = entry.id
    return lines


def _locked(db: Session, conversation_id: str) -> Conversation | None:
    row = ConversationRepository.lock(db, conversation_id)
    # It may be another conversation's id.
    return row if row is not None and row.thread_id == conversation_id else None


def _record(db: Session, row: Conversation) -> ConversationRecord:
    if is_current(row):
        return record_of(row, None)
    return record_of(row, MessageRepository.last_ids(db, [row]).get(row.id))


def _go_on_from(db: Session, row: Conversation, head: str | None, wanted: str | None) -> None:
    """Let the history end with the wanted entry, if it does not."""
    if head != wanted:
        ConversationRepository.branch(db, row.id, at=None if wanted is None else _id_of(wanted))


def _listed(db: Session, scope: str | None, limit: int | None) -> Iterator[Conversation]:
    cursor = None
    left = limit
    while left is None or left > 0:
        size = MAX_PAGE if left is None else min(left, MAX_PAGE)
        page = ConversationRepository.list(db, scope=scope, limit=size, cursor=cursor)
        yield from page
        cursor = page.next_cursor
        if cursor is None:
            return
        left = None if left is None else left - size


def _rows_to(db: Session, entry_id: str, limit: int | None) -> Sequence[Message | Body]:
    """Return the last messages that lead to an entry, itself among them."""
    try:
        wanted = _id_of(entry_id)
    except NotFoundError:
        raise LookupError(entry_id) from None
    rows: Sequence[Message | Body] = MessageRepository.bodies_to(db, wanted, limit=limit)
    if not are_ours(rows):
        rows = MessageRepository.history_to(db, wanted, limit=limit)
    if not rows or rows[-1].id != wanted:
        raise LookupError(entry_id)
    return rows


def _id_of(entry_id: str) -> UUID:
    try:
        return UUID(entry_id)
    except ValueError:
        msg = "an entry's id is a UUID"
        raise NotFoundError(msg) from None


def _entry(id_: UUID, message: ModelMessage, parent: UUID | None) -> ConversationEntry:
    parent_id = None if parent is None else str(parent)
    return ConversationEntry(id=str(id_), parent_id=parent_id, message=message)
