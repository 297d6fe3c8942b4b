"""`DatabaseSession`: sessions of the OpenAI Agents SDK in this library's conversations.

Needs the extra `openai-agents`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from agents.memory import SessionSettings
from agents.memory.session_settings import coerce_session_settings, resolve_session_limit

from database.config import SessionLocal
from database.errors import InvalidReferenceError, InvalidValueError, NotFoundError
from database.integrations import openai_turns
from database.integrations.openai_items import item_of, items_of, row_of
from database.integrations.worker_threads import in_worker_thread
from database.pagination import SearchPage
from database.repositories.conversation import ConversationRepository
from database.repositories.message import MessageRepository
from database.rules import check_number
from database.types import check_text
from database.units import transaction

if TYPE_CHECKING:
    from agents import RunResultBase, TResponseInputItem

    from database.integrations.openai_turns import Turn
    from database.integrations.worker_threads import Sessions
    from database.models.conversation import Conversation
    from database.models.message import Message
    from database.pagination import Page
    from database.repositories.histories import Body
    from database.session import TenantSession

__all__ = ["DatabaseSession"]

T = TypeVar("T")

logger = logging.getLogger(__name__)


class DatabaseSession:
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
        self.session_id = check_text("session_id", session_id)
        self.tenant_id = tenant_id
        self.user_id = _uuid("user_id", user_id)
        self.session_settings = coerce_session_settings(session_settings or SessionSettings())
        self.strict = strict
        self._sessions = sessions
        self._known: UUID | None = None

    async def get_items(self, limit: int | None = None) -> list[TResponseInputItem]:
        """Return the items in order; with a limit the latest so many.

        Raises:
            InvalidValueError: The limit is negative, or, if strict, a message cannot be read.
        """
        most = resolve_session_limit(limit, self.session_settings)
        if most is not None and check_number("limit", most, 0, 2**62) == 0:
            return []
        return await self._read(lambda db, known: self._items(db, known, most), [])

    async def add_items(self, items: Sequence[TResponseInputItem]) -> None:
        """Append items, all or none, in one statement.

        Raises:
            InvalidValueError: An item is not a dict, or not JSON.
        """
        if items:
            await self._run(lambda db: self._append(db, [row_of(item) for item in items]))

    async def pop_item(self) -> TResponseInputItem | None:
        """Delete the latest item for good and return it; no two calls return the same one.

        What cannot be read stays where it is.
        """
        return await self._read(self._pop, None)

    async def clear_session(self) -> None:
        """Delete all messages for good, and what they tell of usage; the conversation stays."""
        await self._read(MessageRepository.clear, 0)

    async def store_run_usage(self, result: RunResultBase, *, model: str | None = None) -> None:
        """Keep what a run has used, on the newest turn; again for the same turn, in its place.

        Args:
            result: What the run returned.
            model: Its name; None is that of the last agent's model, if it has one.

        Raises:
            NotFoundError: The session holds nothing of a run.
        """
        counts = openai_turns.counts_of(result.context_wrapper.usage)
        name = model or openai_turns.model_of(result.last_agent)
        if not await self._read(
            lambda db, known: openai_turns.store_usage(db, known, counts, name), False
        ):
            msg = "the session holds nothing of a run"
            raise NotFoundError(msg)

    async def get_session_usage(self) -> dict[str, int] | None:
        """Return requests, tokens and turns of all stored runs; None if there are none."""
        return await self._read(openai_turns.session_usage, {}) or None

    async def get_turn_usage(
        self, user_turn_number: int | None = None
    ) -> list[dict[str, Any]] | dict[str, Any]:
        """Return what each turn has used; of one turn its dict, empty if nothing is known."""
        found = openai_turns.turn_usage(await self._turns())
        if user_turn_number is None:
            return found
        by_number = {one.pop("user_turn_number"): one for one in found}
        return by_number.get(user_turn_number, {})

    async def get_conversation_turns(self) -> list[dict[str, Any]]:
        """Return the turns: number, the user's content, when, and the message's id."""
        return [turn.described() for turn in await self._turns() if turn.number]

    async def find_turns_by_content(self, search_term: str) -> list[dict[str, Any]]:
        """Return the turns whose user's text has a part like this, in any case."""
        wanted = check_text("search_term", search_term).casefold()
        return [
            turn.described()
            for turn in await self._turns()
            if turn.number and wanted in turn.messages[0].content.casefold()
        ]

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
        """Return the conversation's metadata."""

        def read(db: TenantSession, known: UUID) -> dict[str, Any]:
            found = ConversationRepository.get(db, known)
            return {} if found is None else found.metadata_

        return await self._read(read, {})

    async def set_metadata(self, metadata: dict[str, Any]) -> None:
        """Replace the conversation's metadata, any JSON object."""

        def write(db: TenantSession) -> None:
            with transaction(db):
                made = self._made(db)
                ConversationRepository.update(db, made, metadata=metadata)

        await self._run(write)

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

    async def _run(self, work: Callable[[TenantSession], T]) -> T:
        return await in_worker_thread(work, tenant_id=self.tenant_id, sessions=self._sessions)

    async def _read(self, call: Callable[[TenantSession, UUID], T], nothing: T) -> T:
        """Return what a call finds in the conversation; `nothing` if there is none.

        A conversation that is known but seems empty may have been deleted, and made again: only
        then is it looked up anew.
        """

        def work(db: TenantSession) -> T:
            known, found = self._known, nothing
            if known is not None:
                found = call(db, known)
                if found:
                    return found
            now = self._look_up(db)
            return found if now in (None, known) else call(db, now)

        return await self._run(work)

    async def _turns(self) -> list[Turn]:
        return [*openai_turns.turns_of(await self._read(MessageRepository.history, []))]

    def _look_up(self, db: TenantSession) -> UUID | None:
        found = ConversationRepository.get_by_thread_id(db, self.session_id)
        self._known = None if found is None else self._checked(found)
        return self._known

    def _made(self, db: TenantSession) -> UUID:
        made = ConversationRepository.get_or_create(db, self.session_id, user_id=self.user_id)
        return self._checked(made)

    def _checked(self, found: Conversation) -> UUID:
        if self.user_id is not None and found.user_id not in (None, self.user_id):
            msg = "session_id: is the conversation of another user"
            raise NotFoundError(msg)
        return found.id

    def _append(self, db: TenantSession, rows: list[dict[str, Any]]) -> None:
        if known := self._known or self._look_up(db):
            try:
                _write(db, known, rows)
            except InvalidReferenceError:
                pass  # It was deleted meanwhile.
            else:
                return
        with transaction(db):
            made = self._made(db)
            _write(db, made, rows)
        self._known = made

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
                    message = MessageRepository.pop_last(db, known, before=before)
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


def _write(db: TenantSession, conversation: UUID, rows: list[dict[str, Any]]) -> None:
    if len(rows) == 1:
        MessageRepository.append(db, conversation, **rows[0])
    else:
        MessageRepository.append_many(db, conversation, rows)


def _uuid(field: str, value: UUID | str | None) -> UUID | None:
    if value is None or isinstance(value, UUID):
        return value
    try:
        return UUID(value)
    except (ValueError, AttributeError, TypeError):
        raise InvalidValueError(field, "must be a UUID") from None
