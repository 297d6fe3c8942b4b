"""`DatabaseSession`: sessions of the OpenAI Agents SDK in this library's conversations.

Needs the extra `openai-agents`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from agents.memory import SessionSettings
from agents.memory.session_settings import coerce_session_settings, resolve_session_limit

from database.config import SessionLocal
from database.errors import InvalidReferenceError, InvalidValueError
from database.integrations import openai_branches
from database.integrations.openai_advanced import AdvancedSession
from database.integrations.openai_items import item_of, items_of, row_of
from database.integrations.worker_threads import in_worker_thread
from database.pagination import SearchPage
from database.repositories.conversation import ConversationRepository
from database.repositories.message import MessageRepository
from database.rules import check_number
from database.units import transaction

if TYPE_CHECKING:
    from agents import TResponseInputItem

    from database.integrations.worker_threads import Sessions
    from database.models.conversation import Conversation
    from database.models.message import Message
    from database.pagination import Page
    from database.repositories.histories import Body
    from database.session import TenantSession

__all__ = ["DatabaseSession"]

T = TypeVar("T")

logger = logging.getLogger(__name__)


class DatabaseSession(AdvancedSession):
    """A session of the SDK: the history of the conversation whose thread_id is the session's id.

    The first write makes the conversation, also when several do so at once; until then the session
    is empty. It may be one that the application made and wrote: plain messages of users, assistants
    and the system are items too. No call holds a connection when it has returned, and a cancelled
    one waits for its outcome first.

    Args:
        session_id: The thread_id, 1 to 255 characters.
        tenant_id: As for `SessionLocal`.
        user_id: Whose conversation it is, when it is made; another user's is then not found.
        session_settings: The SDK's; `limit` is that of `get_items`.
        strict: Whether messages in other formats are errors; else they are left out, with a
            warning.
        sessions: Where sessions of the database come from.
    """

    session_id: str
    session_settings: SessionSettings | None

    def __init__(
        self,
        session_id: str,
        *,
        tenant_id: str | None = None,
        user_id: UUID | str | None = None,
        session_settings: SessionSettings | dict[str, Any] | None = None,
        strict: bool = False,
        sessions: Sessions = SessionLocal,
    ) -> None:
        super().__init__(session_id, tenant_id, user_id, sessions)
        self.session_settings = coerce_session_settings(session_settings or SessionSettings())
        self.strict = strict

    async def get_items(
        self, limit: int | None = None, branch_id: str | None = None
    ) -> list[TResponseInputItem]:
        """Return the items in order; with a limit the latest so many.

        Args:
            limit: How many at most; None is the settings'.
            branch_id: Of which branch, here and in the other reads; None is the current one. An
                unknown one has none.

        Raises:
            InvalidValueError: The limit is negative, or, if strict, a message cannot be read.
        """
        most = resolve_session_limit(limit, self.session_settings)
        if most is not None and check_number("limit", most, 0, 2**62) == 0:
            return []

        def read(db: TenantSession, known: UUID) -> list[Any]:
            if branch_id is None:
                return self._items(db, known, most)
            return self._items_of_branch(db, known, branch_id, most)

        return await self._read(read, [])

    async def add_items(self, items: Sequence[TResponseInputItem]) -> None:
        """Append items, all or none, in one statement.

        Raises:
            InvalidValueError: An item is not a dict, or not JSON.
        """

        def add(db: TenantSession) -> None:
            rows = [row_of(item) for item in items]
            self._thread.write(db, lambda known: MessageRepository.extend(db, known, rows))

        if items:
            await self._run(add)

    async def pop_item(self) -> TResponseInputItem | None:
        """Take the latest item off and return it; no two calls return the same one.

        It is deleted for good unless another branch has it. What cannot be read stays.
        """
        return await self._read(self._pop, None)

    async def clear_session(self) -> None:
        """Delete all messages for good, what they tell of usage, and all branches but "main".

        The conversation stays.
        """
        await self._read(openai_branches.clear, 0)

    async def search(self, query: str | None, **options: Any) -> SearchPage[Message]:
        """Return a page of the session's messages that a query finds.

        Args:
            query: As for `MessageRepository.search`.
            options: Its other arguments.
        """

        def find(db: TenantSession, known: UUID) -> SearchPage[Message]:
            return MessageRepository.search(db, query, conversation_id=known, **options)

        return await self._read(find, SearchPage([]))

    async def get_metadata(self) -> dict[str, Any]:
        """Return the conversation's metadata, without what they tell of branches."""

        def read(db: TenantSession, known: UUID) -> dict[str, Any]:
            found = ConversationRepository.get(db, known)
            return {} if found is None else openai_branches.without_branches(found.metadata_)

        return await self._read(read, {})

    async def set_metadata(self, metadata: dict[str, Any]) -> None:
        """Replace the conversation's metadata, any JSON object; branches stay."""

        def write(db: TenantSession, known: UUID) -> None:
            with transaction(db):
                found = ConversationRepository.lock(db, known)
                if found is None:
                    raise InvalidReferenceError("session_id")
                kept = openai_branches.with_branches(found, metadata)
                ConversationRepository.update(db, known, metadata=kept)

        await self._write(write)

    @staticmethod
    async def list_sessions(
        *,
        tenant_id: str | None = None,
        user_id: UUID | str | None = None,
        limit: int = 50,
        cursor: str | None = None,
        sessions: Sessions = SessionLocal,
    ) -> Page[Conversation]:
        """Return a page of the tenant's or a user's conversations, newest activity first."""
        return await in_worker_thread(
            lambda db: ConversationRepository.list(db, user_id=user_id, limit=limit, cursor=cursor),
            tenant_id=tenant_id,
            sessions=sessions,
        )

    def _items(self, db: TenantSession, known: UUID, most: int | None) -> list[Any]:
        items: list[Any] = []
        before = None
        while True:
            wanted = None if most is None else most - len(items)
            page = MessageRepository.bodies(db, known, limit=wanted, before=before)
            read = items_of(page)
            items[:0] = self._readable(page) if read is None else read
            if wanted is None or len(page) < wanted or len(items) == most:
                return items
            before = page[0].position

    def _items_of_branch(
        self, db: TenantSession, known: UUID, name: str, most: int | None
    ) -> list[Any]:
        with transaction(db):
            tip = openai_branches.tip_of(db, known, name)
            if tip is None:
                return []
            page = MessageRepository.bodies_to(db, tip, limit=most)
            read = items_of(page)
            if read is None:
                read = self._readable(MessageRepository.bodies_to(db, tip))
            return read if most is None else read[-most:]

    def _readable(self, page: list[Body]) -> list[Any]:
        items = []
        for message in page:
            try:
                items.append(item_of(message))
            except InvalidValueError as error:
                self._leave_out(message, error)
        return items

    def _pop(self, db: TenantSession, known: UUID) -> Any:
        before = None
        while True:
            message = None
            try:
                with transaction(db):
                    message = openai_branches.pop(db, known, before)
                    return None if message is None else item_of(message)
            except InvalidValueError as error:
                if message is None:
                    raise
                self._leave_out(message, error)
                before = message.position

    def _leave_out(self, message: Message | Body, error: InvalidValueError) -> None:
        if self.strict:
            raise error
        logger.warning(
            "session %r: the message at position %d is left out: %s",
            self.session_id,
            message.position,
            error,
        )
