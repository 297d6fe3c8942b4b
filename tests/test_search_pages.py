"""Search: pages and snippets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from database import ContextRepository as Contexts
from database import (
    ConversationRepository,
    InvalidValueError,
    TenantSession,
    User,
    UserRepository,
)
from database import MessageRepository as Messages
from tests.test_contexts import item


@pytest.fixture
def user(db: TenantSession) -> User:
    return UserRepository.create(db)


def pages(search: Any, **options: Any) -> Iterator[Any]:
    cursor = None
    while True:
        page = search(cursor=cursor, **options)
        yield page
        cursor = page.next_cursor
        if cursor is None:
            return
        assert len(page) == options["limit"]


@pytest.mark.parametrize("limit", [1, 7, 100, 1000])
@pytest.mark.parametrize("query", ["fox", "fox -bear", "fox OR cat", None])
def test_pages_are_the_whole(db: TenantSession, user: User, query: str | None, limit: int) -> None:
    rows = 300
    texts = [("fox " * (n % 5 + 1)) + ("cat" if n % 3 else "") for n in range(rows)]
    Contexts.store_many(db, user.id, (item(n, text) for n, text in enumerate([*texts, "bear"])))
    chat = ConversationRepository.create(db).id
    Messages.append_many(db, chat, ({"role": "user", "content": text} for text in texts))
    for search in (
        lambda **o: Contexts.search(db, user.id, query, context_type="note", **o),
        lambda **o: Messages.search(db, query, conversation_id=chat, **o),
    ):
        found = list(pages(search, limit=limit))
        ids = [row.id for page in found for row in page]
        ranks = [rank for page in found for rank in page.ranks]
        extra = query is None and search(limit=1).items[0].__tablename__ == "contexts"
        assert len(ids) == len(set(ids)) == rows + extra
        keys = list(zip(ranks, ids, strict=True))
        assert keys == sorted(keys, reverse=True)
        assert (len(set(ranks)) > 3) is (query is not None)


@pytest.mark.parametrize("mode", ["text", "substring"])
def test_more_hits_than_are_ranked(db: TenantSession, user: User, mode: Any) -> None:
    rows = 1300
    Contexts.store_many(db, user.id, (item(None, "fox " * (n % 4 + 1)) for n in range(rows)))
    found = list(pages(lambda **o: Contexts.search(db, user.id, "fox", mode=mode, **o), limit=400))
    ids = [row.id for page in found for row in page]
    ranks = [rank for page in found for rank in page.ranks]
    assert len(ids) == len(set(ids)) == rows
    assert ranks == sorted(ranks, reverse=True)
    assert sum(rank > 0 for rank in ranks) == (1000 if mode == "text" else 0)
    assert ids[1000:] == sorted(ids[1000:], reverse=True)
    if mode == "text":
        assert max(ids[1000:]) < min(ids[:1000]), "the newest are ranked"


def test_pages_while_rows_come_and_go(db: TenantSession, user: User) -> None:
    made = [Contexts.store(db, user.id, "note", "fox") for _ in range(9)][::-1]
    first = Contexts.search(db, user.id, "fox", limit=3)
    Contexts.store(db, user.id, "note", "fox")
    Contexts.delete(db, made[2].id)
    Contexts.delete(db, made[4].id)
    second = Contexts.search(db, user.id, "fox", limit=10, cursor=first.next_cursor)
    assert [*first, *second] == [*made[:4], *made[5:]]


def test_cursors_belong_to_their_search(db: TenantSession, user: User) -> None:
    for n in range(2):
        Contexts.store(db, user.id, "note", f"fox {n}")
    cursor = Contexts.search(db, user.id, "fox", limit=1).next_cursor
    listed = Contexts.list(db, limit=1).next_cursor
    assert cursor
    assert listed
    for call in (
        lambda: Messages.search(db, "fox", cursor=cursor),
        lambda: Contexts.list(db, cursor=cursor),
        lambda: Contexts.search(db, user.id, "fox", cursor=listed),
        lambda: Contexts.search(db, user.id, None, cursor=cursor[:-3]),
    ):
        with pytest.raises(InvalidValueError, match=r"^cursor: "):
            call()


LONG = "word " * 100 + "the Needle and needles, " + "tail " * 100
SNIPPETS: dict[tuple[str, str, str], str] = {
    ("fox", "text", "The fox. Foxes; a FOX"): "The [fox]. Foxes; a [FOX]",
    ("fox", "substring", "The fox. Foxes; a FOX"): "The [fox]. [Fox]es; a [FOX]",
    ('"brown fox" -bear', "text", "a brown,\nfox, brown"): "a [brown,\nfox], brown",
    ("cat OR dog", "text", "dog, cat"): "[dog], [cat]",
    ("국어", "text", "한국어를 국어"): "한[국어]를 [국어]",
    ("中文 学习", "text", "我喜欢学习中文"): "我喜欢[学习][中文]",
    ("🎉", "text", "a 🎉 party"): "a [🎉] party",
    ("a.b", "substring", "axb A.B"): "axb [A.B]",
    ("привет", "text", "ПРИВЕТ!"): "[ПРИВЕТ]!",
    ("b", "text", "<b>b</b> & <i>"): "<[b]>[b]</[b]> & <i>",
}


@pytest.mark.parametrize(("query", "mode", "content"), SNIPPETS)
def test_snippets(db: TenantSession, user: User, query: str, mode: Any, content: str) -> None:
    Contexts.store(db, user.id, "note", {"text": content})
    chat = ConversationRepository.create(db).id
    Messages.append(db, chat, role="user", content=content)
    options: dict[str, Any] = {"mode": mode, "highlight": ("[", "]")}
    snippets = Contexts.search(db, user.id, query, **options).snippets
    assert snippets == Messages.search(db, query, **options).snippets
    assert snippets == [SNIPPETS[query, mode, content]]


def test_snippets_are_short(db: TenantSession, user: User) -> None:
    for content in (
        LONG,
        {"b": LONG, "n": [5, None, True, 2.5]},
        "short needle",
        "x" * 999 + " needle",
    ):
        Contexts.store(db, user.id, "note", content)
    page = Contexts.search(db, user.id, "needle", highlight=("<em>", "</em>"))
    assert len(page.snippets) == 4
    for row, snippet in zip(page, page.snippets, strict=True):
        plain = snippet.replace("<em>", "").replace("</em>", "").strip("…")
        assert plain in str(row.content)
        assert len(plain) <= 200
        assert "<em>needle</em>" in snippet.lower()
    assert Contexts.search(db, user.id, "none such", highlight=("", "")).snippets == []


def test_snippets_without_a_hit_show_the_beginning(db: TenantSession, user: User) -> None:
    Contexts.store(db, user.id, "note", [LONG, 5])
    for query in (None, "-absent"):
        (snippet,) = Contexts.search(db, user.id, query, highlight=("[", "]")).snippets
        assert snippet == LONG[:200] + "…"


@pytest.mark.parametrize(
    "marks", ["ab", (), [], ("a",), ("a", "b", "c"), ("a", 5), 5, 0, "", False]
)
@pytest.mark.parametrize("query", ["x", "", None])
def test_marks_are_two_texts(db: TenantSession, marks: Any, query: str | None) -> None:
    for call in (
        lambda: Contexts.search(db, None, query, highlight=marks),
        lambda: Messages.search(db, query, highlight=marks),
    ):
        with pytest.raises(InvalidValueError, match=r"^highlight: "):
            call()
