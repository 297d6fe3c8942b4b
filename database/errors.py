"""The errors this library raises.

Messages name fields, rules and constraints; they never hold a row's values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy.exc import DontWrapMixin

if TYPE_CHECKING:
    from uuid import UUID

__all__ = [
    "AlreadyExistsError",
    "AuthenticationError",
    "ConfigurationError",
    "ConflictError",
    "DatabaseError",
    "InvalidReferenceError",
    "InvalidValueError",
    "NotFoundError",
    "SchemaOutdatedError",
    "TransientError",
    "UnreadableMessageError",
]


class DatabaseError(DontWrapMixin, Exception):
    """Base of every error this library raises."""


class NotFoundError(DatabaseError):
    """The row does not exist, or belongs to another tenant.

    Attributes:
        names: Where rows were asked for by name, those that there are not.
    """

    names: tuple[str, ...] = ()


class InvalidReferenceError(NotFoundError):
    """A field refers to a row that does not exist in the session's tenant.

    Attributes:
        field: The referring field.
    """

    def __init__(self, field: str) -> None:
        super().__init__(f"{field}: refers to a row that does not exist in this tenant")
        self.field = field


class AlreadyExistsError(DatabaseError):
    """A row with the same key exists.

    Attributes:
        key: The fields that must be unique together, for example ``"email"``.
    """

    def __init__(self, key: str) -> None:
        super().__init__(f"{key}: already exists")
        self.key = key


class InvalidValueError(DatabaseError, ValueError):
    """A value breaks a rule of its field.

    Attributes:
        field: The field's name.
        rule: What the field requires.
    """

    def __init__(self, field: str, rule: str) -> None:
        super().__init__(f"{field}: {rule}")
        self.field = field
        self.rule = rule


class ConflictError(DatabaseError):
    """The row has changed since it was read, or is in use by a concurrent writer."""


class TransientError(DatabaseError):
    """The same call may succeed when repeated: lost connection, deadlock, timeout."""


class AuthenticationError(DatabaseError):
    """A key is unknown, expired, revoked or malformed; which of these is not told."""


class ConfigurationError(DatabaseError):
    """The settings, the server or the session's binding do not allow what was asked."""


class UnreadableMessageError(DatabaseError):
    """A framework's own form of a message is corrupt, or of a version that is not known here.

    Attributes:
        id: The message's id.
        position: Its place in its conversation.
        reason: What is wrong; never what the message holds.
    """

    def __init__(self, id: UUID, position: int, reason: str) -> None:  # noqa: A002
        super().__init__(f"message {id} at position {position}: {reason}")
        self.id = id
        self.position = position
        self.reason = reason


class SchemaOutdatedError(ConfigurationError):
    """The database's schema is not at the revision this version of the library needs.

    Attributes:
        found: The database's revision; None if it has none, or was not asked for it.
        needed: The one that this version needs.
    """

    def __init__(self, found: str | None, needed: str) -> None:
        lacks = f"is at revision {found}" if found else "is not the one needed"
        super().__init__(
            f"the database's schema {lacks}, this version needs revision {needed}:"
            " run `alembic upgrade head` or `database upgrade`, or database.init_db() in"
            " development; a newer database needs a newer version of this library"
        )
        self.found = found
        self.needed = needed
