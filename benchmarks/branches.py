"""Histories that have branched, beside the same messages in a linear one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import UUID

from benchmarks.harness import Contender, repeat
from benchmarks.site import Site, messages
from database import ConversationRepository, MessageRepository, TenantSession

__all__ = ["branched"]

_MESSAGES = 1_000
_EDITS = 20


@contextmanager
def branched(site: Site) -> Iterator[list[Contender]]:
    with site.session() as db:
        linear = ConversationRepository.create(db).id
        rows = messages(site.scaled(_MESSAGES))
        MessageRepository.append_many(db, linear, rows)
        edited = _with_edits(db, rows)
        fork = ConversationRepository.fork(db, linear).id
        shown = {len(MessageRepository.history(db, way)) for way in (linear, edited, fork)}
        assert shown == {len(rows)}
        yield [
            Contender(
                f"{name}{part}",
                repeat(partial(MessageRepository.history, db, way, limit=limit)),
            )
            for name, way in (("linear", linear), ("branched", edited), ("fork", fork))
            for part, limit in (("", None), (", last 50", 50))
        ]


def _with_edits(db: TenantSession, rows: list[dict[str, Any]]) -> UUID:
    """Make a conversation of as many messages, in as many branches as there are edits."""
    conversation = ConversationRepository.create(db).id
    step = len(rows) // _EDITS
    for start in range(0, len(rows), step):
        *_, last = MessageRepository.append_many(db, conversation, rows[start : start + step])
        MessageRepository.edit(db, last.id, content=last.content)
    return conversation
