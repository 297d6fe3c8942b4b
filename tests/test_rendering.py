"""Templates: what they refer to, and what they become."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from database import (
    InvalidValueError,
    ModuleRepository,
    NotFoundError,
    PersonaRepository,
    SessionLocal,
    StateRepository,
    TenantSession,
    get_engine,
)
from database.repositories.rendering import MAX_RENDERED, Plan
from tests.counting import counted_round_trips, counted_statements
from tests.factories import ConversationFactory, ModuleFactory, PersonaFactory

references = ModuleRepository.references


def render_with(db: TenantSession, template: str, **states: Any) -> str:
    persona = PersonaFactory(db=db, template=template)
    chat = ConversationFactory(db=db)
    for key, value in states.items():
        StateRepository.set(db, chat.id, key, value)
    return PersonaRepository.render(db, persona.id, conversation_id=chat.id)


def filled(template: str, values: dict[str, str] | None = None, /, **modules: str) -> str:
    contents: list[tuple[str | None, str]] = [(None, template), *modules.items()]
    return Plan(dict(contents)).fill(values or {})


def escaped(words: str) -> str:
    return words.replace("@", r"\@").replace("$", r"\$")


# references


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("", []),
        ("no names", []),
        ("@a", ["a"]),
        ("@b @a @b", ["b", "a"]),
        ("(@a), @b. @c: @d_1!\n@e", ["a", "b", "c", "d_1", "e"]),
        (r"\@a @b \\@c", ["b"]),
        ("a@b 1@b _@b ada@example.com", []),
        ("é@b 请用@c回答", ["b", "c"]),
        ("@@a", ["a"]),
        ("@a@b", ["a"]),
        ("@A @1 @_a @é @ a @", []),
        ("@aB @a-b @a.b @aé", ["a"]),
        ("@" + "a" * 50, ["a" * 50]),
        ("@" + "a" * 51, []),
        ("${@a}", []),
        ("$@a ${x} @b", ["a", "b"]),
    ],
)
def test_references(words: str, found: list[str]) -> None:
    assert references(words) == found
    assert PersonaRepository.references(words) == found


@pytest.mark.parametrize("value", [None, 5, b"@a", ["@a"]])
def test_references_of_what_is_no_text(value: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"^template: must be text"):
        references(value)


names = st.from_regex(r"[a-z][a-z0-9_]{0,49}", fullmatch=True)
loaded_text = st.text("@$\\{} aZ_0é") | st.text()


@given(st.lists(names))
def test_references_in_order_of_first_appearance(wanted: list[str]) -> None:
    template = " and ".join(f"@{name}" for name in wanted)
    assert references(template) == list(dict.fromkeys(wanted))


@given(loaded_text)
def test_escaped_text_refers_to_nothing(words: str) -> None:
    assert references(escaped(words)) == []


# Laws of rendering


@given(st.text().filter(lambda words: not set(words) & {"@", "$"}))
def test_text_without_marks_stays(words: str) -> None:
    assert filled(words) == words


@given(loaded_text)
def test_escaping_comes_back(words: str) -> None:
    assert filled(escaped(words), dict.fromkeys("aZ_0é", "!"), a="!") == words


@given(loaded_text.filter(lambda words: "\\" not in words))
def test_unknown_marks_stay(words: str) -> None:
    assert filled(words) == words


@given(loaded_text)
def test_values_are_not_looked_through(value: str) -> None:
    assert filled("<${x}>", {"x": value, "a": "!"}, a="!") == f"<{value}>"


@given(st.lists(names, min_size=1, max_size=20, unique=True), loaded_text)
def test_a_chain_of_modules_is_its_end(chain: list[str], end: str) -> None:
    modules = {name: f"@{following}" for name, following in pairwise(chain)}
    assert filled(f"@{chain[0]}", **modules, **{chain[-1]: escaped(end)}) == end


@given(st.dictionaries(names, st.lists(names, max_size=3), max_size=6))
def test_what_is_no_cycle_renders(graph: dict[str, list[str]]) -> None:
    modules = {name: " ".join(f"@{to}" for to in used) for name, used in graph.items()}

    def expected(name: str, path: tuple[str, ...] = ()) -> str:
        if name not in graph:
            return f"@{name}"
        if name in path:
            raise RecursionError
        return " ".join(expected(to, (*path, name)) for to in graph[name])

    template = " ".join(f"@{name}" for name in graph)
    try:
        text = " ".join(expected(name) for name in graph)
    except RecursionError:
        with pytest.raises(InvalidValueError, match=r"(\w+) -> (?:.* -> )?\1$"):
            filled(template, **modules)
    else:
        assert filled(template, **modules) == text


# render


def test_render(db: TenantSession) -> None:
    ModuleFactory(db=db, name="rules", content="Be @tone, ${name}.")
    ModuleFactory(db=db, name="tone", content="kind")
    ModuleFactory(db=db, name="empty", content=None)
    template = r"@rules Mail a@tone or \@tone for \$5 and ${no} @empty|@rules"
    persona = PersonaFactory(db=db, template=template)
    chat = ConversationFactory(db=db, thread_id="thread")
    StateRepository.set(db, chat.id, "name", "Ada")
    expected = "Be kind, Ada. Mail a@tone or @tone for $5 and ${no} |Be kind, Ada."
    for conversation, count in ((chat.id, 2), ("thread", 3)):
        with counted_round_trips() as trips, counted_statements() as statements:
            rendered = PersonaRepository.render(db, persona.id, conversation_id=conversation)
        assert rendered == expected
        assert (trips.count, len(statements)) == (count, count)
        assert not db.in_transaction()
        assert get_engine().pool.checkedout() == 0  # type: ignore[attr-defined]
    with counted_statements() as statements:
        without = PersonaRepository.render(db, str(persona.id))
    assert without == expected.replace("Ada", "${name}")
    assert len(statements) == 1
    assert PersonaRepository.render(db, persona.id, conversation_id=uuid4()) == without
    assert PersonaRepository.render(db, persona.id, conversation_id="nowhere") == without


def test_render_without_variables_asks_for_no_states(db: TenantSession) -> None:
    ModuleFactory(db=db, name="a", content=r"\${x}")
    persona = PersonaFactory(db=db, template="@a")
    with counted_statements() as statements:
        assert PersonaRepository.render(db, persona.id, conversation_id=uuid4()) == "${x}"
    assert len(statements) == 1


def test_render_of_an_unknown_persona(db: TenantSession, other: TenantSession) -> None:
    for id_ in (uuid4(), PersonaFactory(db=other).id):
        with pytest.raises(NotFoundError):
            PersonaRepository.render(db, id_)
    with pytest.raises(InvalidValueError, match=r"^persona_id: "):
        PersonaRepository.render(db, "Ada")


def test_only_active_simple_modules_of_the_tenant(db: TenantSession, other: TenantSession) -> None:
    ModuleFactory(db=other, name="foreign", content="!")
    ModuleFactory(db=db, name="off", content="!", is_active=False)
    ModuleFactory(db=db, name="script", content="!", type="advanced", script="raise SystemExit")
    template = "@foreign @off @script @missing"
    assert render_with(db, template) == template
    # What is not put in is not followed either.
    ModuleFactory(db=db, name="loop", content="@loop", is_active=False)
    assert render_with(db, "@loop") == "@loop"


def test_variables_of_a_conversation(db: TenantSession, other: TenantSession) -> None:
    persona = PersonaFactory(db=db, template="${x}")
    stranger = PersonaFactory(db=db).id
    chat = ConversationFactory(db=db).id
    module = ModuleFactory(db=db).id

    def rendered() -> str:
        return PersonaRepository.render(db, persona.id, conversation_id=chat)

    StateRepository.set(db, ConversationFactory(db=db).id, "x", "another conversation's")
    StateRepository.set(db, chat, "x", "another persona's", persona_id=stranger)
    theirs = ConversationFactory(db=other, id=chat).id
    StateRepository.set(other, theirs, "x", "another tenant's")
    assert rendered() == "${x}"
    stage = {"module_id": module, "execution_stage": "stage4"}
    StateRepository.set(db, chat, "variables", {"x": "a stage's", "y": 2}, **stage)
    assert rendered() == "a stage's"
    StateRepository.set(db, chat, "variables", {"x": "own stage's"}, **stage, persona_id=persona.id)
    StateRepository.set(db, chat, "variables", {"x": "newer"}, module_id=module)
    StateRepository.set(db, chat, "variables", ["x"])
    assert rendered() == "own stage's"
    StateRepository.set(db, chat, "x", "state")
    assert rendered() == "state"
    StateRepository.set(db, chat, "x", "newer state", module_id=module)
    assert rendered() == "newer state"
    StateRepository.set(db, chat, "x", "own", persona_id=persona.id)
    StateRepository.set(db, chat, "x", "newest", execution_stage="stage5")
    assert rendered() == "own"


def test_values_as_text(db: TenantSession) -> None:
    values = {"t": "a b", "n": 1.5, "none": None, "yes": True, "o": {"a": [1, "é"]}, "e": ""}
    template = "|".join(f"${{{name}}}" for name in values)
    assert render_with(db, template, **values) == 'a b|1.5|null|true|{"a":[1,"é"]}|'
    assert render_with(db, "${variables} ${a}", variables={"a": 1}) == '{"a":1} 1'


def test_states_cannot_bring_in_references(db: TenantSession) -> None:
    ModuleFactory(db=db, name="secret", content="!")
    ModuleFactory(db=db, name="half", content="@")
    states = {"x": r"@secret ${y} \@", "y": "!", "at": "@"}
    assert render_with(db, "${x}", **states) == r"@secret ${y} \@"
    # Nor do pieces make one together.
    assert render_with(db, "${at}secret @half", **states) == "@secret @"


@pytest.mark.parametrize(
    ("modules", "cycle"),
    [
        ({"a": "@a"}, "a -> a"),
        ({"a": "@b", "b": "x @c", "c": "@a"}, "a -> b -> c -> a"),
        ({"a": "@b @c", "b": "", "c": "@d", "d": "@b @c"}, "c -> d -> c"),
    ],
)
def test_cycle(db: TenantSession, modules: dict[str, str], cycle: str) -> None:
    for name, content in modules.items():
        ModuleFactory(db=db, name=name, content=content)
    with pytest.raises(InvalidValueError, match=f": {cycle}$") as caught:
        render_with(db, "@a")
    assert caught.value.field == "content"
    # An escaped one is none.
    last = ModuleRepository.get_by_name(db, next(reversed(modules)))
    assert last is not None
    ModuleRepository.update(db, last.id, content=r"\@a \@c")
    assert "@a" in render_with(db, "@a")


def make_modules(db: TenantSession, contents: dict[str, str]) -> None:
    ModuleRepository.create_many(
        db, [{"name": name, "content": content} for name, content in contents.items()]
    )


def test_deep_nesting(db: TenantSession) -> None:
    contents = {f"m{n}": f"{n % 10}.@m{n + 1}" for n in range(3000)}
    make_modules(db, {**contents, "m3000": "end"})
    with counted_statements() as statements:
        rendered = render_with(db, "@m0")
    assert rendered == "0.1.2.3.4.5.6.7.8.9." * 300 + "end"
    assert len([one for one in statements if "RECURSIVE" in one]) == 1
    ModuleRepository.update(db, ModuleRepository.get_by_name(db, "m3000").id, content="@m2999")  # type: ignore[union-attr]
    with pytest.raises(InvalidValueError, match=r"m2999 -> m3000 -> m2999"):
        render_with(db, "@m0")


def test_a_text_too_long(db: TenantSession) -> None:
    # Ten to the twentieth: nobody waits for it.
    make_modules(db, {**{f"m{n}": f"@m{n + 1} " * 10 for n in range(20)}, "m20": ""})
    with pytest.raises(InvalidValueError, match=r"^template: must become at most 10,000,000"):
        render_with(db, "@m0")
    with pytest.raises(InvalidValueError, match=r"^template: "):
        render_with(db, "${x}" * 20, x="x" * (MAX_RENDERED // 20))
    with pytest.raises(InvalidValueError, match=r"^template: "):
        filled("@a" + " @a" * 10_000, {"x": ""}, a="${x}" * 10_000)


MEGABYTES = {
    "text": "a" * 2**20,
    "at": "@" * 2**20,
    "dollar": "$" * 2**20,
    "braces": "${" * 2**19,
    "open": "${" + "a" * 2**20,
    "dollars": "${" + "a$" * 2**19,
    "backslashes": "\\" * 2**20,
    "names": "@aB" * (2**20 // 3),
    "long names": ("@" + "a" * 60) * (2**20 // 61),
    "addresses": "a@b " * 2**18,
    "missing": "@missing " * (2**20 // 9),
}


@pytest.mark.parametrize("kind", MEGABYTES)
def test_templates_of_a_megabyte(db: TenantSession, kind: str) -> None:
    template = MEGABYTES[kind]
    assert references(template) == (["missing"] if kind == "missing" else [])
    assert render_with(db, template) == template


def test_many_references(db: TenantSession) -> None:
    names = [f"m{n}" for n in range(2000)]
    make_modules(db, {name: name.upper() for name in names})
    template = " ".join(f"@{name}" for name in names * 50)
    assert render_with(db, template) == " ".join(name.upper() for name in names * 50)


def test_the_states_of_a_deleted_conversation_leave_variables(
    db: TenantSession, tenant: str
) -> None:
    persona: UUID = PersonaFactory(db=db, template="${x}").id
    chat = ConversationFactory(db=db).id
    StateRepository.set(db, chat, "x", 1)
    StateRepository.clear(db, chat)
    with SessionLocal(tenant_id=tenant) as session:
        assert PersonaRepository.render(session, persona, conversation_id=chat) == "${x}"
