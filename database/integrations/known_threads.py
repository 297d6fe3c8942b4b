"""The conversation of a thread, found once and made by the first write."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

from database.errors import InvalidReferenceError, InvalidValueError, NotFoundError
from database.repositories.conversation import ConversationRepository
from database.types import check_text
from database.units import transaction

if TYPE_CHECKING:
    from database.models.conversation import Conversation
    from database.session import TenantSession

__all__ = ["KnownThread"]

T = TypeVar("T")


class KnownThread:
    """A thread of a framework, whose conversation's id is looked up once.

    Args:
        thread_id: The conversation's thread_id.
        user_id: Whose conversation it is, when it is made; another user's is then not found.
        field: What the caller calls the thread, for errors.
    """

    def __init__(self, thread_id: str, user_id: UUID | str | None, field: str) -> None:
        self.thread_id = check_text(field, thread_id)
        self.user_id = _uuid(user_id)
        self._field = field
        self._id: UUID | None = None

    def read(self, db: TenantSession, call: Callable[[UUID], T], nothing: T) -> T:
        """Return what a call finds in the conversation; `nothing` if there is none.

        A conversation that seems empty may have been deleted, and made again: only then is it
        looked up anew.
        """
        known = self._id
        found = nothing if known is None else call(known)
        if found:
            return found
        now = self._look_up(db)
        return found if now in (None, known) else call(now)

    def write(self, db: TenantSession, call: Callable[[UUID], object]) -> None:
        """Write by a call, into a new conversation if there is none."""
        known = self._id or self._look_up(db)
        if known is not None:
            try:
                call(known)
            except InvalidReferenceError:
                pass  # It was deleted meanwhile.
            else:
                return
        with transaction(db):
            made = ConversationRepository.get_or_create(db, self.thread_id, user_id=self.user_id)
            call(self._checked(made))
        self._id = made.id

    def _look_up(self, db: TenantSession) -> UUID | None:
        found = ConversationRepository.get_by_thread_id(db, self.thread_id)
        self._id = None if found is None else self._checked(found)
        return self._id

    def _checked(self, found: Conversation) -> UUID:
        if self.user_id is not None and found.user_id not in (None, self.user_id):
            msg = f"{self._field}: is the conversation of another user"
            raise NotFoundError(msg)
        return found.id


def _uuid(value: UUID | str | None) -> UUID | None:
    if value is None or isinstance(value, UUID):
        return value
    try:
        return UUID(value)
    except (ValueError, AttributeError, TypeError):
        raise InvalidValueError("user_id", "must be a UUID") from None
