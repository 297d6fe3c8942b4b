"""Keys by which programs act for a user."""

from __future__ import annotations

import builtins
import hmac
import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, case, func, or_, select, update

from database.errors import AuthenticationError, ConflictError, InvalidValueError
from database.models.api_key import ApiKey
from database.models.base import TENANT_PATTERN
from database.models.user import User
from database.repositories.base import Repository
from database.repositories.statements import OPTIONS
from database.repositories.user import UserRepository
from database.session import moving_to_tenant, tenant_of
from database.types import utcnow
from database.units import one_read, one_write, transaction

if TYPE_CHECKING:
    from collections.abc import Iterable
    from uuid import UUID

    from sqlalchemy.orm import Session

__all__ = ["ApiKeyRepository", "NewApiKey"]

logger = logging.getLogger(__name__)

_MANAGED = ("key_hash", "prefix", "revoked_at")
_USE_IS_NOTED_EVERY = timedelta(minutes=1)

# What leak scanners look for. 32 bytes in URL-safe base64 are 43 characters, so a tenant of any
# characters ends where those begin.
_MARK = "dbk_"
_KEY = re.compile(rf"{_MARK}({TENANT_PATTERN.strip('^$')})_[A-Za-z0-9_-]{{43}}")
# Of its 256 bits a shown prefix gives away 36.
_SHOWN_CHARACTERS = 6
_PREFIX_LENGTH = 32

_IS_KEY = (ApiKey.tenant_id == bindparam("tenant"), ApiKey.id == bindparam("key"))
_BY_HASH = (
    select(User, ApiKey.id, ApiKey.key_hash, ApiKey.last_used_at)
    .join(ApiKey, (ApiKey.tenant_id == User.tenant_id) & (ApiKey.user_id == User.id))
    .where(
        ApiKey.tenant_id == bindparam("tenant"),
        ApiKey.key_hash == bindparam("hash"),
        or_(ApiKey.revoked_at.is_(None), ApiKey.revoked_at > bindparam("now")),
        or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > bindparam("now")),
        User.is_active,
    )
    .execution_options(**OPTIONS)
)
# Of concurrent calls one writes: the others wait for its row, and then find it fresh.
_NOTE_USE = (
    update(ApiKey)
    .where(*_IS_KEY, or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at <= bindparam("stale")))
    .values(last_used_at=bindparam("now"))
    .returning(ApiKey.id)
    .execution_options(synchronize_session=False, names_tenant=True)
)
# A rotated key has a time of revocation to come; one that has passed stays.
_REVOKE = (
    update(ApiKey)
    .where(*_IS_KEY)
    .values(
        revoked_at=func.least(ApiKey.revoked_at, bindparam("now")),
        updated_at=case(
            (ApiKey.revoked_at <= bindparam("now"), ApiKey.updated_at), else_=bindparam("now")
        ),
    )
    .returning(ApiKey)
    .execution_options(synchronize_session=False, **OPTIONS)
)
_LOCK = select(ApiKey).where(*_IS_KEY).with_for_update().execution_options(**OPTIONS)


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """A key that was just made.

    Attributes:
        api_key: What is stored of it.
        secret: The key itself, to be shown once: nobody can find it again.
    """

    api_key: ApiKey
    secret: str = field(repr=False)


class ApiKeyRepository(Repository[ApiKey]):
    """API keys of a tenant; `list(db, user_id=...)` has those of a user."""

    model = ApiKey

    @classmethod
    def create(  # type: ignore[override]  # the secret exists only now
        cls,
        db: Session,
        user_id: UUID | str | None = None,
        *,
        name: str | None = None,
        expires_at: datetime | None = None,
        **fields: Any,
    ) -> NewApiKey:
        """Make a key for a user; return it with its secret, which is not stored.

        Args:
            db: The session.
            user_id: Whom the key's holder acts for.
            name: What the user calls it, at most 255 characters.
            expires_at: From when on it is refused; None is never.
            fields: id, created_at, updated_at.

        Raises:
            InvalidReferenceError: There is no such user in the tenant.
            InvalidValueError: A field breaks its rule, or is not the caller's to set.
        """
        given = {"user_id": user_id, "name": name, "expires_at": expires_at, **fields}
        secret, values = cls._with_secret(db, given)
        return NewApiKey(cls._insert(db, values), secret)

    @classmethod
    def create_many(  # type: ignore[override]
        cls, db: Session, items: Iterable[Mapping[str, Any]]
    ) -> builtins.list[NewApiKey]:
        """Make keys, all or none; return them in order. Raises as `create` does."""
        made = [cls._with_secret(db, item) for item in items]
        keys = super().create_many(db, [values for _, values in made])
        return [NewApiKey(key, secret) for key, (secret, _) in zip(keys, made, strict=True)]

    @classmethod
    def authenticate(cls, db: Session, key: object) -> User:
        """Return the user whom a key's holder acts for, and bind the session to its tenant.

        One round trip, and a second one at most once a minute, which sets `last_used_at`. When it
        fails, the session keeps its tenant.

        Raises:
            AuthenticationError: The key is malformed, unknown, revoked or expired, or its user is
                not active; which of these is not told.
            ConfigurationError: The session is in a transaction of another tenant.
        """
        if _is_development_key(db, key):
            return _development_user(db)
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None:
            raise _refusal()
        with moving_to_tenant(db, match[1]):
            return cls._user_of(db, _hash(match[0]))

    @classmethod
    def revoke(cls, db: Session, id: UUID | str, /) -> bool:  # noqa: A002
        """Refuse a key from now on, for good; tell whether there is such a key."""
        with one_write(db):
            return db.scalar(_REVOKE, {**cls._key(db, id), "now": utcnow()}) is not None

    @classmethod
    def rotate(cls, db: Session, id: UUID | str, /, *, grace: timedelta) -> NewApiKey:  # noqa: A002
        """Make a key in place of another one, which is accepted for a while yet.

        The new key has the user, name and expiry of the old one. Locks the old key.

        Args:
            db: The session.
            id: The old key.
            grace: How long the old key is still accepted, unless it expires before.

        Raises:
            NotFoundError: There is no such key in the tenant.
            ConflictError: The old key is revoked, expired, or was rotated before.
            InvalidValueError: `grace` is negative, or no timedelta.
        """
        if not isinstance(grace, timedelta) or grace < timedelta():
            raise InvalidValueError("grace", "must be a timedelta that is not negative")
        with transaction(db):
            with one_read(db):
                old = cls._found(db.scalars(_LOCK, cls._key(db, id)).one_or_none())
            # Not before: it may have waited for another rotation.
            now = utcnow()
            if old.revoked_at is not None or (old.expires_at is not None and old.expires_at <= now):
                raise ConflictError("ApiKey: is revoked, expired or rotated already")
            new = cls.create(db, old.user_id, name=old.name, expires_at=old.expires_at)
            end = _earliest(old.expires_at, now, grace)
            cls._update(db, old.id, ApiKey.id, {"expires_at": end, "revoked_at": end})
            return new

    @classmethod
    def update(cls, db: Session, id: UUID | str, /, *args: Any, **fields: Any) -> ApiKey:  # noqa: A002
        """Change fields of a key and return it.

        Raises:
            NotFoundError: There is no such key in the tenant.
            InvalidValueError: A field breaks its rule, or is not the caller's to set: key_hash,
                prefix, revoked_at (`revoke`).
        """
        _refuse_managed(fields)
        return super().update(db, id, *args, **fields)

    @classmethod
    def _with_secret(cls, db: Session, fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        if not isinstance(fields, Mapping):
            raise InvalidValueError("values", "must be a mapping of fields")
        _refuse_managed(fields)
        head = f"{_MARK}{tenant_of(db)}_"
        random = secrets.token_urlsafe(32)
        prefix = _shown(head, random)
        return head + random, {**fields, "key_hash": _hash(head + random), "prefix": prefix}

    @classmethod
    def _user_of(cls, db: Session, key_hash: bytes) -> User:
        tenant, now = tenant_of(db), utcnow()
        with one_read(db):
            parameters = {"tenant": tenant, "hash": key_hash, "now": now}
            row = db.execute(_BY_HASH, parameters).one_or_none()
        if row is None or not hmac.compare_digest(row.key_hash, key_hash):
            raise _refusal()
        stale = now - _USE_IS_NOTED_EVERY
        if row.last_used_at is None or row.last_used_at <= stale:
            with one_write(db):
                db.scalar(_NOTE_USE, {"tenant": tenant, "key": row.id, "now": now, "stale": stale})
        user: User = row[0]
        return user

    @classmethod
    def _check(
        cls, db: Session, fields: Mapping[str, Any], *, partial: bool = False
    ) -> dict[str, Any]:
        values = super()._check(db, fields, partial=partial)
        expires_at = values.get("expires_at")
        if not partial and expires_at is not None and expires_at <= utcnow():
            raise InvalidValueError("expires_at", "must be in the future")
        return values


def _refuse_managed(fields: Mapping[str, Any]) -> None:
    for name in _MANAGED:
        if name in fields:
            raise InvalidValueError(name, "is set by the repository")


def _hash(key: str) -> bytes:
    # Whatever text a client sends has a hash, lone surrogates too.
    return sha256(key.encode("utf-8", "surrogatepass")).digest()


def _shown(head: str, random: str) -> str:
    """Return a key's first characters, with a long tenant cut short in the middle."""
    space = _PREFIX_LENGTH - _SHOWN_CHARACTERS
    if len(head) > space:
        head = head[: space - 3] + "..."
    return head + random[:_SHOWN_CHARACTERS]


def _earliest(expires_at: datetime | None, now: datetime, grace: timedelta) -> datetime:
    try:
        end = now + grace
    except OverflowError:
        raise InvalidValueError("grace", "is too long") from None
    return end if expires_at is None else min(end, expires_at)


def _refusal() -> AuthenticationError:
    return AuthenticationError("the API key is not valid")


def _is_development_key(db: Session, key: object) -> bool:
    expected = db.get_bind().get_execution_options().get("development_api_key")
    return (
        expected is not None
        and isinstance(key, str)
        and hmac.compare_digest(_hash(key), _hash(expected.get_secret_value()))
    )


def _development_user(db: Session) -> User:
    logger.warning("the development API key was used")
    with moving_to_tenant(db, db.get_bind().get_execution_options()["tenant_id"]):
        user = UserRepository.get_or_create_by_identity(db, "development", "development")
        if not user.is_active:
            raise _refusal()
        return user
