"""What a session's rows show when a unit was undone.

A rollback of SQLAlchemy's expires every row, so that the next look at any would begin a transaction
and hold a connection; one to a savepoint expires none that a statement has refreshed, which go on
showing what is undone. So a unit remembers the rows that it touches, and what they showed before.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy import event, inspect
from sqlalchemy.orm.attributes import set_committed_value

from database.models.base import Base
from database.session import TenantSession

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.orm import InstanceState, Session

__all__ = ["Touched", "keep_untouched", "putting_back", "touched_in"]

_TOUCHED = "database.touched"


class Touched:
    """The rows that a unit has read or written, with what they showed before as far as known."""

    def __init__(self) -> None:
        self._rows: WeakKeyDictionary[InstanceState[Any], dict[str, Any]] = WeakKeyDictionary()

    def note(self, state: InstanceState[Any]) -> None:
        """Remember a row that shows what the unit has read or written."""
        self._rows.setdefault(state, {})

    def keep(self, state: InstanceState[Any]) -> None:
        """Remember what a row shows, before it changes."""
        if state not in self._rows:
            shown = state.dict
            names = () if state.modified else state.mapper.column_attrs.keys()
            self._rows[state] = {name: shown[name] for name in names if name in shown}

    def hand_over(self, outer: Touched) -> None:
        """Let the unit around this one remember these rows too."""
        for state, values in self._rows.items():
            outer._rows.setdefault(state, values)

    def put_back(self, db: Session) -> None:
        """Let the rows show what they did; what is not known is read when looked at."""
        for state, values in self._rows.items():
            row = state.object
            # Another row may have got its id, and its place in the session.
            if row is None or not db.identity_map.contains_state(state):
                continue
            db.expire(row)
            for name, value in {**_key_of(state), **values}.items():
                set_committed_value(row, name, value)


def _key_of(state: InstanceState[Any]) -> dict[str, Any]:
    """Return what a row is found by, which no unit changes."""
    columns = state.mapper.primary_key
    names = (state.mapper.get_property_by_column(column).key for column in columns)
    return dict(zip(names, state.identity or (), strict=True))


def touched_in(db: Session) -> Touched | None:
    """Return what the session's unit has touched; None if it is in none."""
    found: Touched | None = db.info.get(_TOUCHED)
    return found


@contextmanager
def putting_back(db: Session) -> Iterator[None]:
    """Put rows back when the unit in the block fails and was undone."""
    outer = touched_in(db)
    inner = db.info[_TOUCHED] = Touched()
    try:
        yield
        if outer is not None:
            inner.hand_over(outer)
    except BaseException:
        inner.put_back(db)
        raise
    finally:
        if outer is None:
            del db.info[_TOUCHED]
        else:
            db.info[_TOUCHED] = outer


def keep_untouched(db: Session) -> None:
    """Remember what all other rows show: a rollback of the whole transaction is about to begin."""
    touched = touched_in(db)
    if touched is not None:
        for row in db.identity_map.values():
            if isinstance(row, Base):
                touched.keep(inspect(row))


@event.listens_for(TenantSession, "loaded_as_persistent")
def _note_new(session: Session, row: object) -> None:
    touched = touched_in(session)
    if touched is not None:
        touched.note(inspect(row))


@event.listens_for(Base, "refresh", propagate=True)
def _note_refreshed(row: Base, _context: object, _names: object) -> None:
    """Also of a statement that changes the session's rows along with the database's."""
    state = inspect(row)
    touched = None if state.session is None else touched_in(state.session)
    if touched is not None:
        touched.note(state)


@event.listens_for(TenantSession, "before_flush")
def _note_flushed(session: Session, _context: object, _rows: object) -> None:
    touched = touched_in(session)
    if touched is not None:
        for row in (*session.new, *session.dirty, *session.deleted):
            touched.note(inspect(row))
