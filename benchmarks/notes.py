"""Contexts and keys: stored, searched and looked up, ours beside psycopg by hand."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import accumulate, count
from random import Random
from typing import Any
from uuid import UUID

import orjson
import psycopg
from psycopg.types.json import Jsonb
from uuid_utils.compat import uuid7

from benchmarks.harness import Contender, repeat
from benchmarks.site import TENANT, Site, plain
from database import ApiKeyRepository, ContextRepository, SessionLocal, UserRepository
from database.models.searchable import words_of_json

__all__ = [
    "CONTEXTS",
    "RARE",
    "authenticate",
    "fill",
    "search_tenant",
    "search_user",
    "store",
    "store_many",
]

CONTEXTS = 100_000
USERS = 1_000
RARE = "rareword"
"""A word that one context in 25,000 has; "common" one in five."""

_PAGE = 50
_WORDS = words_of_json("c.content").replace("%", "%%")
_RANKED = f"""
WITH hits AS MATERIALIZED (
    SELECT c.*, {_WORDS} AS words FROM contexts c
    WHERE c.tenant_id = %(tenant)s {{scope}}
    AND {_WORDS} @@ websearch_to_tsquery('simple', %(query)s)
)
SELECT *, ts_rank(words, websearch_to_tsquery('simple', %(query)s)) AS rank FROM hits
ORDER BY rank DESC, id DESC LIMIT {_PAGE}"""
_LIKE = f"""
SELECT * FROM contexts WHERE tenant_id = %s AND content::text ILIKE %s
ORDER BY updated_at DESC LIMIT {_PAGE}"""
_STORE = """
INSERT INTO contexts (tenant_id, id, user_id, context_type, source_identifier, content, metadata)
VALUES (%s, %s, %s, 'note', %s, %s, %s)
ON CONFLICT (tenant_id, user_id, context_type, source_identifier) DO UPDATE
SET content = excluded.content, metadata = excluded.metadata, updated_at = excluded.updated_at"""
_KEY = """
SELECT u.*, k.id, k.last_used_at FROM api_keys k
JOIN users u ON u.tenant_id = k.tenant_id AND u.id = k.user_id
WHERE k.tenant_id = %s AND k.key_hash = %s AND k.revoked_at IS NULL AND u.is_active"""

_VOCABULARY = [
    "".join(Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=3 + n % 8)) for n in range(20_000)
]
_LIKELY = list(accumulate(1 / (n + 1) for n in range(len(_VOCABULARY))))


def note(number: int, chosen: Random) -> dict[str, Any]:
    """Return a note's content, about 350 characters."""
    words = chosen.choices(_VOCABULARY, cum_weights=_LIKELY, k=40)
    if number % 5 == 0:
        words.append("common")
    if number % 25_000 == 0:
        words.append(RARE)
    return {"title": f"Note {number}", "text": " ".join(words), "tags": ["a", f"b{number % 10}"]}


def fill(url: str, tenant: str, contexts: int) -> UUID:
    """Give a tenant 1,000 users and their contexts; return a user who has the rare word.

    By COPY as the owner, and the search indexes built afterwards: it is not what is measured.
    """
    users = [uuid7() for _ in range(USERS)]
    chosen = Random(1)
    with psycopg.connect(plain(url), autocommit=True) as connection:
        indexes = connection.execute(
            "SELECT indexname, indexdef FROM pg_indexes"
            " WHERE tablename = 'contexts' AND indexdef LIKE '%USING gin%'"
        ).fetchall()
        for name, _ in indexes:
            connection.execute(f"DROP INDEX {name}".encode())
        with connection.cursor().copy("COPY users (tenant_id, id) FROM STDIN") as copy:
            for user in users:
                copy.write_row((tenant, user))
        columns = "tenant_id, id, user_id, context_type, source_identifier, content"
        with connection.cursor().copy(f"COPY contexts ({columns}) FROM STDIN".encode()) as copy:
            for number in range(contexts):
                content = orjson.dumps(note(number, chosen)).decode()
                user = users[number % USERS]
                copy.write_row((tenant, uuid7(), user, "note", str(number), content))
        for _, definition in indexes:
            connection.execute(definition.encode())
        connection.execute("VACUUM ANALYZE users, contexts")
    return users[0]


@contextmanager
def store(site: Site) -> Iterator[list[Contender]]:
    mine, chosen = site.raw(), Random(2)
    content = note(1, chosen)
    ours, theirs = count(), count()
    with site.session() as db:
        user = UserRepository.create(db).id

        def raw() -> None:
            source = f"raw {next(theirs)}"
            values = (TENANT, uuid7(), user, source, Jsonb(content), Jsonb({}))
            mine.fetch(_STORE + " RETURNING id, created_at, updated_at", values)

        yield [
            Contender(
                "ours",
                repeat(
                    lambda: ContextRepository.store(
                        db, user, "note", content, source_identifier=f"ours {next(ours)}"
                    )
                ),
            ),
            Contender("raw", repeat(raw)),
        ]


@contextmanager
def store_many(site: Site) -> Iterator[list[Contender]]:
    mine, chosen = site.raw(), Random(3)
    contents = [note(number, chosen) for number in range(site.scaled(1_000))]
    with site.session() as db:
        user = UserRepository.create(db).id

        def items(prefix: str) -> list[dict[str, Any]]:
            return [
                {"context_type": "note", "source_identifier": f"{prefix}{n}", "content": content}
                for n, content in enumerate(contents)
            ]

        def raw() -> None:
            mine.execute_many(
                _STORE,
                [
                    (TENANT, uuid7(), user, f"raw {n}", Jsonb(content), Jsonb({}))
                    for n, content in enumerate(contents)
                ],
            )

        # From the second round on both replace what they stored in the first one.
        yield [
            Contender("ours", repeat(lambda: ContextRepository.store_many(db, user, items("o")))),
            Contender("raw", repeat(raw)),
        ]


@contextmanager
def search_user(site: Site) -> Iterator[list[Contender]]:
    yield from _search(site, "AND c.user_id = %(user)s")


@contextmanager
def search_tenant(site: Site) -> Iterator[list[Contender]]:
    yield from _search(site, "")


def _search(site: Site, scope: str) -> Iterator[list[Contender]]:
    user = site.filled("notes", lambda: fill(site.url, "notes", site.scaled(CONTEXTS)))
    owner, app = site.raw("notes", role=""), site.raw("notes")
    statement = _RANKED.format(scope=scope)
    parameters = {"tenant": "notes", "user": user, "query": RARE}
    with SessionLocal(tenant_id="notes") as db:
        found = user if scope else None

        def ours(query: str, mode: Any = "text") -> Callable[[int], None]:
            return repeat(lambda: ContextRepository.search(db, found, query, mode=mode))

        yield [
            Contender("ours", ours(RARE)),
            Contender("raw", repeat(lambda: owner.fetch(statement, parameters))),
            Contender("ours, substring", ours("arewor", "substring")),
            Contender("ours, a common word", ours("common")),
            Contender("raw, ILIKE", repeat(lambda: app.fetch(_LIKE, ("notes", f"%{RARE}%")))),
        ]


@contextmanager
def authenticate(site: Site) -> Iterator[list[Contender]]:
    mine = site.raw()
    with site.session() as db:
        user = UserRepository.create(db).id
        secret = ApiKeyRepository.create(db, user).secret
        for _ in range(site.scaled(1_000)):
            ApiKeyRepository.create(db, user, name=secrets.token_hex(4))
        wanted = (TENANT, sha256(secret.encode()).digest())
        yield [
            Contender("ours", repeat(lambda: ApiKeyRepository.authenticate(db, secret))),
            Contender("raw", repeat(lambda: mine.fetch(_KEY, wanted))),
        ]
