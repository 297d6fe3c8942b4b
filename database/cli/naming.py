"""Rows, as people name them on a command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from database.cli.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.orm import Session

    from database.models import Conversation, User
    from database.pagination import Page

__all__ = ["PAGE", "every", "find_conversation", "find_user", "pages"]

PAGE = 200


def find_user(db: Session, name: str) -> User:
    """Return the user of an id, an address or provider:subject.

    Raises:
        CommandError: There is none; or the name is one user's address and another's identity.
    """
    from database.repositories.user import UserRepository

    if (id_ := _uuid(name)) is not None:
        found = [UserRepository.get(db, id_)]
    else:
        found = []
        provider, colon, subject = name.partition(":")
        if colon:
            found.append(UserRepository.get_by_identity(db, provider, subject))
        if "@" in name:
            found.append(UserRepository.get_by_email(db, name))
        if not found:
            msg = "a user is named by id, e-mail address or provider:subject"
            raise CommandError(f"{name!r}: {msg}")
    users = {user.id: user for user in found if user is not None}
    if len(users) > 1:
        raise CommandError(f"{name!r}: names two users, one by address, one by identity: use an id")
    if not users:
        raise CommandError(f"{name!r}: no such user in this tenant")
    return users.popitem()[1]


def find_conversation(db: Session, name: str) -> Conversation:
    """Return the conversation of a thread_id or an id.

    Raises:
        CommandError: There is none.
    """
    from database.repositories.conversation import ConversationRepository

    found = ConversationRepository.get_by_thread_id(db, name)
    if found is None and (id_ := _uuid(name)) is not None:
        found = ConversationRepository.get(db, id_)
    if found is None:
        raise CommandError(f"{name!r}: no such conversation in this tenant")
    return found


def pages(
    list_: Callable[..., Page[Any]], db: Session, *, limit: int | None = None, **filters: Any
) -> Iterator[list[Any]]:
    """Yield the pages of a repository's list, `limit` rows at most in all."""
    cursor = None
    while limit is None or limit > 0:
        size = PAGE if limit is None else min(limit, PAGE)
        page = list_(db, limit=size, cursor=cursor, **filters)
        if page.items:
            yield page.items
        if limit is not None:
            limit -= len(page.items)
        cursor = page.next_cursor
        if cursor is None:
            return


def every(
    list_: Callable[..., Page[Any]], db: Session, *, limit: int | None = None, **filters: Any
) -> Iterator[Any]:
    """Yield the rows of a repository's list, page by page."""
    for page in pages(list_, db, limit=limit, **filters):
        yield from page


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
