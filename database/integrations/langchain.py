"""`DatabaseChatMessageHistory`: LangChain's chat histories in this library's conversations.

Needs the extra `langchain`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from langchain_core.chat_history import BaseChatMessageHistory

from database.config import SessionLocal
from database.errors import InvalidValueError
from database.integrations.known_threads import KnownThread
from database.integrations.langchain_messages import message_of, row_of
from database.integrations.worker_threads import in_worker_thread
from database.repositories.message import MessageRepository
from database.rules import check_number

if TYPE_CHECKING:
    from langchain_core.messages import BaseMessage

    from database.integrations.worker_threads import Sessions
    from database.repositories.histories import Body
    from database.session import TenantSession

__all__ = ["DatabaseChatMessageHistory"]

logger = logging.getLogger(__name__)


class DatabaseChatMessageHistory(BaseChatMessageHistory):
    """The messages of the conversation whose thread_id is the session's id.

    The first write makes the conversation, also when several do so at once; until then the history
    is empty. It may be one that the application made and wrote: its messages are read as messages
    of their role. No call holds a connection when it has returned; the async ones run in worker
    threads, no more than the pool has connections.

    Args:
        session_id: The thread_id, 1 to 255 characters.
        tenant_id: As for `SessionLocal`.
        user_id: Whose conversation it is, when it is made; another user's is then not found.
        limit: How many messages `messages` has at most, the latest; None is all. The first of them
            may be in the middle of a turn: LangChain's `trim_messages` knows what a model takes.
        strict: Whether what cannot be kept or read is an error. Otherwise it is left out, with a
            warning: messages in other formats, and artifacts that are neither JSON nor bytes nor
            documents.
        sessions: Where sessions of the database come from.
    """

    def __init__(
        self,
        session_id: str,
        *,
        tenant_id: str | None = None,
        user_id: UUID | str | None = None,
        limit: int | None = None,
        strict: bool = False,
        sessions: Sessions = SessionLocal,
    ) -> None:
        self._thread = KnownThread(session_id, user_id, "session_id")
        self.tenant_id = tenant_id
        self.limit = None if limit is None else check_number("limit", limit, 1, 2**31 - 1)
        self.strict = strict
        self._sessions = sessions

    @property
    def session_id(self) -> str:
        """The thread_id of the conversation."""
        return self._thread.thread_id

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]
        """The messages in order; with a limit the latest so many.

        Raises:
            InvalidValueError: If strict, a message cannot be read.
        """
        with self._sessions(tenant_id=self.tenant_id) as db:
            return self._read(db)

    async def aget_messages(self) -> list[BaseMessage]:
        """Return `messages`, without blocking the event loop."""
        return await in_worker_thread(self._read, tenant_id=self.tenant_id, sessions=self._sessions)

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Append messages, all or none, in one statement.

        Raises:
            InvalidValueError: One is no message of LangChain's, or not JSON.
        """
        if rows := self._rows(messages):
            with self._sessions(tenant_id=self.tenant_id) as db:
                self._append(db, rows)

    async def aadd_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Do as `add_messages`, without blocking the event loop."""
        if messages:
            await in_worker_thread(
                lambda db: self._append(db, self._rows(messages)),
                tenant_id=self.tenant_id,
                sessions=self._sessions,
            )

    def clear(self) -> None:
        """Delete all messages for good; the conversation stays."""
        with self._sessions(tenant_id=self.tenant_id) as db:
            self._clear(db)

    async def aclear(self) -> None:
        """Do as `clear`, without blocking the event loop."""
        await in_worker_thread(self._clear, tenant_id=self.tenant_id, sessions=self._sessions)

    def _read(self, db: TenantSession) -> list[BaseMessage]:
        found: list[Body] = self._thread.read(
            db, lambda known: MessageRepository.bodies(db, known, limit=self.limit), []
        )
        messages = []
        for row in found:
            try:
                messages.append(message_of(row))
            except InvalidValueError as error:
                if self.strict:
                    raise
                logger.warning("message %d is left out: %s", row.position, error)
        return messages

    def _append(self, db: TenantSession, rows: list[dict[str, Any]]) -> None:
        self._thread.write(db, lambda known: MessageRepository.extend(db, known, rows))

    def _clear(self, db: TenantSession) -> None:
        self._thread.read(db, lambda known: MessageRepository.clear(db, known), 0)

    def _rows(self, messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
        return [self._row(message) for message in messages]

    def _row(self, message: BaseMessage) -> dict[str, Any]:
        try:
            return row_of(message)
        except InvalidValueError as error:
            if self.strict or error.field != "artifact":
                raise
            logger.warning("an artifact is left out: it %s", error.rule)
            return row_of(message, without_artifact=True)
