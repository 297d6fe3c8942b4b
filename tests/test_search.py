"""Search: words and substrings in any script, scopes, pages, snippets."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from database import ContextRepository as Contexts
from database import (
    ConversationRepository,
    Message,
    SearchPage,
    SessionLocal,
    TenantSession,
    UserRepository,
    transaction,
)
from database import MessageRepository as Messages
from tests.counting import counted_round_trips, counted_statements
from tests.test_conformance import idle, tenant_of

Found = list[Any]


class Notes:
    """Texts, stored as contexts and as messages, and searched in both."""

    def __init__(self, db: TenantSession) -> None:
        self.db = db
        self.user: UUID = UserRepository.create(db).id
        self.chat: UUID = ConversationRepository.create(db, user_id=self.user).id

    def add(self, *texts: str) -> None:
        for text in texts:
            Contexts.store(self.db, self.user, "note", {"text": [text]})
            Messages.append(self.db, self.chat, role="user", content=text)

    def find(self, query: str | None, **options: Any) -> set[str]:
        """The texts found, by both alike, and in all scopes."""
        scopes: list[SearchPage[Any]] = [
            Contexts.search(self.db, self.user, query, **options),
            Contexts.search(self.db, None, query, **options),
            Messages.search(self.db, query, **options),
            Messages.search(self.db, query, user_id=self.user, **options),
            Messages.search(self.db, query, conversation_id=self.chat, **options),
        ]
        found = [sorted(map(text_of, page)) for page in scopes]
        assert found == found[:1] * len(scopes)
        return set(found[0])


def text_of(row: Any) -> str:
    return str(row.content if isinstance(row, Message) else row.content["text"][0])


@pytest.fixture
def notes(db: TenantSession) -> Notes:
    return Notes(db)


TEXTS = [
    *("The quick brown fox", "a lazy dog", "the fox and the dog", "quick dog, brown cat"),
    *('first\nsecond\tthird "quoted"word', "price 42 and 3.14", "Grüße aus KÖLN", "foo_bar-baz.py"),
    *("저는 한국어를 공부합니다", "我喜欢学习中文", "東京タワーに行きました", "ฉันรักภาษาไทย"),
    *("مرحبا بالعالم العربي", "سنة ٢٠٢٤", "Привет, МИР", "שלום עולם", "नमस्ते दुनिया"),
    *(
        "🎉",
        "party 🎉 time",
        "sad 😢 party",
        "👩‍💻 codes",
        "Python은 좋다 très bien 🐍",
        "x² + ½ ①",
    ),
]

WORDS: dict[str, str | set[str]] = {
    "fox": {"The quick brown fox", "the fox and the dog"},
    "FOX": {"The quick brown fox", "the fox and the dog"},
    "quick dog": "quick dog, brown cat",
    "brown quick": {"The quick brown fox", "quick dog, brown cat"},
    '"quick brown"': "The quick brown fox",
    '"brown quick"': set(),
    "lazy OR cat": {"a lazy dog", "quick dog, brown cat"},
    "lazy or cat": {"a lazy dog", "quick dog, brown cat"},
    "dog -fox": {"a lazy dog", "quick dog, brown cat"},
    'quick -"brown fox"': "quick dog, brown cat",
    "second": 'first\nsecond\tthird "quoted"word',
    "nsecond": set(),
    "third": 'first\nsecond\tthird "quoted"word',
    "quoted": 'first\nsecond\tthird "quoted"word',
    "word": 'first\nsecond\tthird "quoted"word',
    '"first second third"': 'first\nsecond\tthird "quoted"word',
    "42": "price 42 and 3.14",
    "3.14": "price 42 and 3.14",
    "4": set(),
    "köln": "Grüße aus KÖLN",
    "GRÜSSE": set(),
    "foo_bar-baz.py": "foo_bar-baz.py",
    "text": set(),
    "한국어": "저는 한국어를 공부합니다",
    "국어를": "저는 한국어를 공부합니다",
    "공부 한국어": "저는 한국어를 공부합니다",
    "어국한": set(),
    "中文": "我喜欢学习中文",
    "喜欢 中文": "我喜欢学习中文",
    "文中": set(),
    "東京": "東京タワーに行きました",
    "タワー": "東京タワーに行きました",
    "ภาษา": "ฉันรักภาษาไทย",
    "العالم": set(),
    "بالعالم": "مرحبا بالعالم العربي",
    "مرحبا العربي": "مرحبا بالعالم العربي",
    "٢٠٢٤": "سنة ٢٠٢٤",
    "سنة ٢٠٢٤": "سنة ٢٠٢٤",
    "мир": "Привет, МИР",
    "ПРИВЕТ": "Привет, МИР",
    "עולם": "שלום עולם",
    "नमस्ते": "नमस्ते दुनिया",
    "🎉": {"🎉", "party 🎉 time"},
    "party 🎉": "party 🎉 time",
    "party🎉": "party 🎉 time",
    "🎉 OR 😢": {"🎉", "party 🎉 time", "sad 😢 party"},
    "lazy OR 😢": {"a lazy dog", "sad 😢 party"},
    "party -🎉": "sad 😢 party",
    "🎉 -party": "🎉",
    '😢 OR ""': "sad 😢 party",
    "😢 OR - OR .": "sad 😢 party",
    "👩‍💻": "👩‍💻 codes",
    "좋다 python 🐍": "Python은 좋다 très bien 🐍",
    "Python은": "Python은 좋다 très bien 🐍",
    "très -한국어": "Python은 좋다 très bien 🐍",
    "x²": "x² + ½ ①",
    "①": "x² + ½ ①",
    "lazy -한국어": "a lazy dog",
    "공부 -한국어": set(),
    "": set(),
    '"" - OR -- !&|()<->:*\'\\': set(),
    "unknown": set(),
}


def as_set(found: str | set[str]) -> set[str]:
    return {found} if isinstance(found, str) else found


def test_words(notes: Notes) -> None:
    notes.add(*TEXTS)
    assert {query: notes.find(query) for query in WORDS} == {
        query: as_set(found) for query, found in WORDS.items()
    }
    assert notes.find("-fox") == set(TEXTS) - as_set(WORDS["fox"])
    assert notes.find("-🎉") == set(TEXTS) - as_set(WORDS["🎉"])
    assert notes.find(None) == set(TEXTS)


SUBSTRINGS = [
    *("100% sure", "100 sure", "a_b", "aXb", "C:\\new\\table", 'say "hi" now', "one\ntwo\tthree"),
    *("ПРИВЕТ мир", "GRÖSSE ist", "한국어를", "我喜欢学习中文", "ฉันรักไทย", "مرحبا", "🎉🎊", "🎊🎉"),
    *(
        "a.b*c",
        "[x](y){1}",
        "^start$",
        "***=raw",
        "(?i)x",
        "back\\\\slash",
        "\x7f\x1f end",
        "tab\\t",
    ),
]
HITS = {
    "%": {"100% sure"},
    "0% S": {"100% sure"},
    "_": {"a_b"},
    "A_B": {"a_b"},
    "\\": {"C:\\new\\table", "back\\\\slash", "tab\\t"},
    "\\\\": {"back\\\\slash"},
    "c:\\NEW": {"C:\\new\\table"},
    "\\t": {"C:\\new\\table", "tab\\t"},
    '"': {'say "hi" now'},
    '"HI" n': {'say "hi" now'},
    "\n": set(),  # nothing but space is an empty query
    "e\nt": {"one\ntwo\tthree"},
    "o\tt": {"one\ntwo\tthree"},
    "привет": {"ПРИВЕТ мир"},
    "ВЕТ М": {"ПРИВЕТ мир"},  # noqa: RUF001
    "größe": set(),
    "grösse": {"GRÖSSE ist"},
    "국어": {"한국어를"},
    "学习": {"我喜欢学习中文"},
    "รัก": {"ฉันรักไทย"},
    "رحب": {"مرحبا"},
    "🎉": {"🎉🎊", "🎊🎉"},
    "🎉🎊": {"🎉🎊"},
    "b*": {"a.b*c"},
    ".b": {"a.b*c"},
    "a.b": {"a.b*c"},
    "](": {"[x](y){1}"},
    "{1}": {"[x](y){1}"},
    "^s": {"^start$"},
    "***=": {"***=raw"},
    "(?i)": {"(?i)x"},
    "\x7f\x1f e": {"\x7f\x1f end"},
    "  ": set(),
    "sure ": set(),
    "unknown": set(),
}


def test_substrings(notes: Notes) -> None:
    notes.add(*SUBSTRINGS)
    assert {query: notes.find(query, mode="substring") for query in HITS} == HITS


def test_substrings_know_an_escape_from_its_letter(notes: Notes) -> None:
    """JSON writes a line feed as backslash and n."""
    texts = ("for\never", "\tomato", "\x01", "a\\never", "say\\tomato", "x\\\never", "\\\\never")
    notes.add(*texts)
    expected = {
        "never": {"a\\never", "\\\\never"},
        "\\never": {"a\\never", "\\\\never"},
        "\never": {"for\never", "x\\\never"},
        "ever": {"for\never", "a\\never", "x\\\never", "\\\\never"},
        "TOMATO": {"say\\tomato"},
        "0001": set(),
        "1": set(),
        "u0": set(),
        '"': set(),
        "\x01": {"\x01"},
    }
    assert {query: notes.find(query, mode="substring") for query in expected} == expected


def test_member_names_are_no_words(db: TenantSession, notes: Notes) -> None:
    contents: list[Any] = [
        {"secret": {'na"me: x': "value", "n": [7, True, None, 8.5]}, "": "empty"},
        ["list", {"k\\": "back"}, 'member": tail', "colon: x"],
        "scalar text",
        5150,
    ]
    made = [Contexts.store(db, notes.user, "note", content) for content in contents]
    values = ["value", "7", "8.5", "empty", "list", "back", "tail", "colon", "scalar", "5150"]
    found = {q: [made.index(row) for row in Contexts.search(db, notes.user, q)] for q in values}
    assert found == dict(zip(values, [[0]] * 4 + [[1]] * 4 + [[2], [3]], strict=True))
    for name in ("secret", "na", "me", "n", "k"):
        assert Contexts.search(db, notes.user, name).items == [], name


def test_best_first_then_newest(db: TenantSession, notes: Notes) -> None:
    notes.add("fox", "dog fox", "fox fox fox", "fox", "cat")
    for page in (Contexts.search(db, None, "fox"), Messages.search(db, "fox")):
        assert text_of(page.items[0]) == "fox fox fox"
        assert page.ranks == sorted(page.ranks, reverse=True)
        assert len(page.ranks) == len(page) == 4
        assert page.ranks[0] > page.ranks[1] > 0
        ties = [row.id for row in page.items[1:]]
        assert ties == sorted(ties, reverse=True)
        assert page.snippets == []
    substring = Contexts.search(db, None, "fox", mode="substring")
    assert set(substring.ranks) == {0.0}
    assert [row.id for row in substring] == sorted((row.id for row in substring), reverse=True)


def test_scopes_and_filters(db: TenantSession) -> None:
    first, second = Notes(db), Notes(db)
    first.add("fox one")
    second.add("fox two")
    lone = ConversationRepository.create(db, thread_id="lone").id
    Messages.append(db, lone, role="tool", content="fox of nobody")
    Contexts.store(db, first.user, "task", {"text": ["fox task"]})

    def contexts(user: object, **options: Any) -> set[str]:
        return {text_of(row) for row in Contexts.search(db, user, "fox", **options)}  # type: ignore[arg-type]

    def messages(**options: Any) -> set[str]:
        return {text_of(row) for row in Messages.search(db, "fox", **options)}

    assert contexts(first.user) == {"fox one", "fox task"}
    assert contexts(str(second.user)) == {"fox two"}
    assert contexts(None) == {"fox one", "fox two", "fox task"}
    assert contexts(uuid4()) == set()
    assert contexts(None, context_type="task") == {"fox task"}
    assert contexts(second.user, context_type="task", mode="substring") == set()
    assert messages() == {"fox one", "fox two", "fox of nobody"}
    assert messages(user_id=str(first.user)) == {"fox one"}
    assert messages(conversation_id="lone") == messages(role="tool") == {"fox of nobody"}
    assert messages(conversation_id=str(second.chat)) == {"fox two"}
    assert messages(conversation_id=second.chat, user_id=first.user) == set()
    assert messages(conversation_id="unknown") == messages(user_id=uuid4()) == set()
    assert messages(role="user", mode="substring") == {"fox one", "fox two"}


@pytest.mark.parametrize("mode", ["text", "substring"])
def test_since_and_until(db: TenantSession, notes: Notes, mode: Any) -> None:
    notes.add("fox 1", "fox 2", "fox 3")
    message, context = Messages.history(db, notes.chat)[1], Contexts.list(db).items[1]
    for search, at in (
        (lambda **o: Contexts.search(db, notes.user, "fox", mode=mode, **o), context.updated_at),
        (lambda **o: Messages.search(db, "fox", mode=mode, **o), message.created_at),
    ):
        later = at + timedelta(microseconds=1)
        assert sorted(map(text_of, search(since=at))) == ["fox 2", "fox 3"]
        assert sorted(map(text_of, search(until=at))) == ["fox 1"]
        assert sorted(map(text_of, search(since=at, until=later))) == ["fox 2"]
        assert search(since=later, until=at).items == []


def test_what_is_hidden_and_what_has_expired(db: TenantSession, notes: Notes) -> None:
    notes.add("fox 1", "fox 2")
    message = Messages.history(db, notes.chat)[0]
    Messages.deactivate(db, notes.chat, [message.id])
    context = Contexts.list(db).items[0]
    Contexts.update(db, context.id, expires_at=context.created_at - timedelta(days=1))
    for query, mode in (("fox", "text"), ("fox", "substring"), (None, "text")):
        options: dict[str, Any] = {"mode": mode}
        assert [text_of(row) for row in Messages.search(db, query, **options)] == ["fox 2"]
        assert len(Contexts.search(db, notes.user, query, **options)) == 2


@pytest.mark.parametrize("in_unit", [False, True])
def test_a_search_is_one_round_trip(db: TenantSession, notes: Notes, in_unit: bool) -> None:  # noqa: FBT001
    notes.add("fox")
    calls: list[Callable[[], SearchPage[Any]]] = [
        lambda: Contexts.search(db, notes.user, "fox 🎉 OR fox", where={"text": {"exists": True}}),
        lambda: Contexts.search(db, None, "fox", mode="substring", highlight=("<", ">")),
        lambda: Messages.search(db, "fox", user_id=notes.user, conversation_id=notes.chat),
    ]
    if in_unit:
        with transaction(db):
            notes.add("fox uncommitted")
            assert [len(call()) for call in calls] == [2, 2, 2]
            with SessionLocal(tenant_id=tenant_of(db)) as fresh:
                assert len(Contexts.search(fresh, None, "fox")) == 1
        return
    for call in calls:
        with counted_statements() as statements, counted_round_trips() as trips:
            assert len(call()) == 1
        assert (len(statements), trips.count, idle(db)) == (1, 1, True)
    with counted_statements() as statements:
        assert Contexts.search(db, None, "").items == []
        assert Messages.search(db, "-").items == []
    assert statements == []
