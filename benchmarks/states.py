"""States: set and read, ours beside psycopg by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import cycle

from psycopg.types.json import Jsonb
from uuid_utils.compat import uuid7

from benchmarks.harness import Contender, repeat
from benchmarks.site import TENANT, Site
from database import ConversationRepository, ModuleRepository, PersonaRepository, StateRepository

__all__ = ["get_all", "set_one"]

_STATES = 200
_VALUE = {"mood": "curious", "energy": 0.8, "topics": ["tea", "trains"]}
_SET = """
INSERT INTO conversation_states (tenant_id, id, conversation_id, persona_id, module_id,
    execution_stage, state_key, state_value, executed_at, updated_at)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (tenant_id, conversation_id, persona_id, module_id, execution_stage, state_key)
DO UPDATE SET state_value = excluded.state_value, executed_at = excluded.executed_at,
    updated_at = excluded.updated_at, version = conversation_states.version + 1
RETURNING id, created_at, updated_at, version"""
_GET_ALL = """
SELECT s.*, m.name, p.name FROM conversation_states s
LEFT JOIN modules m ON m.tenant_id = s.tenant_id AND m.id = s.module_id
LEFT JOIN personas p ON p.tenant_id = s.tenant_id AND p.id = s.persona_id
WHERE s.tenant_id = %s AND s.conversation_id = %s ORDER BY s.executed_at DESC, s.id DESC"""


@contextmanager
def set_one(site: Site) -> Iterator[list[Contender]]:
    mine = site.raw()
    keys, others = (cycle([f"{name} {n}" for n in range(50)]) for name in ("ours", "raw"))
    with site.session() as db:
        chat = ConversationRepository.create(db).id

        def raw() -> None:
            now = datetime.now(UTC)
            values = (None, None, None, next(others), Jsonb(_VALUE), now, now)
            mine.fetch(_SET, (TENANT, uuid7(), chat, *values))

        yield [
            Contender("ours", repeat(lambda: StateRepository.set(db, chat, next(keys), _VALUE))),
            Contender("raw", repeat(raw)),
        ]


@contextmanager
def get_all(site: Site) -> Iterator[list[Contender]]:
    mine = site.raw()
    with site.session() as db:
        name = f"bench_{uuid7().hex[-12:]}"
        persona = PersonaRepository.create(db, name=name, template="You are kind.").id
        module = ModuleRepository.create(db, name=name).id
        chat = ConversationRepository.create(db, persona_id=persona).id
        StateRepository.set_many(
            db,
            chat,
            [
                {"key": f"key {n}", "value": _VALUE, "persona_id": persona, "module_id": module}
                for n in range(_STATES)
            ],
        )
        yield [
            Contender("ours", repeat(lambda: StateRepository.get_all(db, chat))),
            Contender("raw", repeat(lambda: mine.fetch(_GET_ALL, (TENANT, chat)))),
        ]
