"""The schema's rules: lints over the metadata, and what the server itself does with rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import count, permutations
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb
from sqlalchemy import (
    CheckConstraint,
    Column,
    DateTime,
    Enum,
    ForeignKeyConstraint,
    Index,
    PrimaryKeyConstraint,
    String,
    Table,
    UniqueConstraint,
)
from sqlalchemy.dialects import postgresql

from database.models import Base
from tests.conftest import admin

DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]
TABLES = sorted(Base.metadata.tables.values(), key=lambda table: table.name)
FOREIGN_KEYS = sorted(
    (key for table in TABLES for key in table.foreign_key_constraints),
    key=lambda key: str(key.name),
)

# References that a row can lose and stay; whatever else a row refers to owns it.
OPTIONAL = {
    ("conversations", "persona_id"),
    ("conversations", "head_id"),
    ("conversations", "forked_at_id"),
    ("messages", "parent_id"),
    ("conversation_memory", "persona_id"),
    ("conversation_memory", "first_message_id"),
}

# The only defaults that are no constants; none of them is volatile.
COMPUTED_DEFAULTS = {
    "now()": {"created_at", "updated_at", "executed_at", "last_accessed_at"},
    "current_setting('app.tenant_id'::text, true)": {"tenant_id"},
}

# The only keys that do not begin with the tenant: pgvector's index takes one column.
WITHOUT_TENANT = {"ix_conversation_memory_embedding"}

each_table = pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
each_foreign_key = pytest.mark.parametrize("key", FOREIGN_KEYS, ids=lambda key: key.name)


class Key(NamedTuple):
    """An index, whether of a constraint or of its own."""

    name: str
    columns: tuple[str, ...]
    unique: bool = True
    method: str = "btree"
    where: str | None = None

    def begins_with(self, columns: tuple[str, ...]) -> bool:
        return self.columns[: len(columns)] == columns


def keys(table: Table) -> list[Key]:
    found = [
        Key(str(constraint.name), tuple(column.name for column in constraint.columns))
        for constraint in table.constraints
        if isinstance(constraint, PrimaryKeyConstraint | UniqueConstraint)
    ]
    return [*found, *map(key_of, table.indexes)]


def key_of(index: Index) -> Key:
    options = index.dialect_kwargs
    condition = options["postgresql_where"]
    return Key(
        str(index.name),
        tuple(
            element.name if isinstance(element, Column) else str(element.compile(dialect=DIALECT))  # type: ignore[union-attr]
            for element in index.expressions
        ),
        index.unique,
        options["postgresql_using"] or "btree",
        None if condition is None else str(condition.compile(dialect=DIALECT)),
    )


def checks(table: Table) -> list[CheckConstraint]:
    of_columns = [constraint for column in table.columns for constraint in column.constraints]
    return [c for c in (*table.constraints, *of_columns) if isinstance(c, CheckConstraint)]


def column_of(key: ForeignKeyConstraint) -> Column[Any]:
    """The column of a foreign key besides the tenant."""
    (column,) = [column for column in key.columns if column.name != "tenant_id"]
    return column


# --- lints over the metadata ----------------------------------------------------------------------


@each_foreign_key
def test_foreign_key_is_indexed(key: ForeignKeyConstraint) -> None:
    columns = ("tenant_id", column_of(key).name)
    found = [
        index
        for index in keys(key.table)
        if index.method == "btree"
        and index.begins_with(columns)
        and index.where in (None, f"{columns[1]} IS NOT NULL")
    ]
    assert found


@each_table
def test_no_index_is_a_prefix_of_another(table: Table) -> None:
    needless = [
        (one.name, other.name)
        for one, other in permutations(keys(table), 2)
        if one.where is None
        and other.where is None
        and one.method == other.method
        and other.begins_with(one.columns)
        and not (one.unique and not other.unique)
    ]
    assert needless == []


@each_table
def test_names(table: Table) -> None:
    expected = {str(table.primary_key.name): f"pk_{table.name}"}
    for key in table.foreign_key_constraints:
        expected[str(key.name)] = f"fk_{table.name}_{column_of(key).name}"
    for check in checks(table):
        expected[str(check.name)] = rf"ck_{table.name}_[a-z_]+"
    for index in keys(table):
        kind = "uq" if index.unique else "ix"
        expected.setdefault(index.name, rf"{kind}_{table.name}_[a-z_]+")
    assert {str(constraint.name) for constraint in table.constraints} <= expected.keys()
    for name, pattern in expected.items():
        assert re.fullmatch(pattern, name)
        assert len(name) <= 48


def test_names_of_constraints_and_indexes_are_unique_in_the_schema() -> None:
    names = [key.name for table in TABLES for key in keys(table)]
    assert sorted(names) == sorted(set(names))


@each_table
def test_tenant_is_first_in_every_key(table: Table) -> None:
    for key in keys(table):
        assert key.columns[0] == "tenant_id" or key.name in WITHOUT_TENANT, key.name
    assert tuple(table.primary_key.columns.keys()) == ("tenant_id", "id")


@each_foreign_key
def test_foreign_key_stays_in_the_tenant(key: ForeignKeyConstraint) -> None:
    assert [column.name for column in key.columns] == ["tenant_id", column_of(key).name]
    assert [element.column.name for element in key.elements] == ["tenant_id", "id"]
    assert not key.deferrable  # Citus


@each_foreign_key
def test_on_delete(key: ForeignKeyConstraint) -> None:
    column = column_of(key)
    if (key.table.name, column.name) in OPTIONAL:
        assert column.nullable
        assert key.ondelete == f"SET NULL ({column.name})"
    else:
        assert key.ondelete == "CASCADE"
    assert key.onupdate is None


def test_optional_references_exist() -> None:
    assert {(key.table.name, column_of(key).name) for key in FOREIGN_KEYS} >= OPTIONAL


@each_table
def test_every_id_of_another_table_is_a_foreign_key(table: Table) -> None:
    ids = {column.name for column in table.columns if column.name.endswith("_id")}
    # Names that others have given.
    ids -= {"tenant_id", "thread_id", "run_id", "tool_call_id"}
    assert ids == {column_of(key).name for key in table.foreign_key_constraints}


@each_table
def test_tables_begin_alike(table: Table) -> None:
    assert table.columns.keys()[:4] == ["tenant_id", "id", "created_at", "updated_at"]
    assert f"ck_{table.name}_tenant_id" in {str(check.name) for check in checks(table)}


@each_table
def test_timestamps_have_a_time_zone(table: Table) -> None:
    for column in table.columns:
        kind = column.type.dialect_impl(DIALECT)
        compiled = column.type.compile(dialect=DIALECT)
        assert "WITHOUT TIME ZONE" not in compiled
        assert compiled not in ("DATE", "TIME")
        if column.name.endswith("_at"):
            assert isinstance(getattr(kind, "impl_instance", kind), DateTime)
            assert compiled == "TIMESTAMP WITH TIME ZONE"


ENUMS = [
    (table, column) for table in TABLES for column in table.columns if isinstance(column.type, Enum)
]


def test_enums_are_known() -> None:
    assert {(table.name, column.name) for table, column in ENUMS} >= {
        ("messages", "role"),
        ("modules", "type"),
        ("modules", "execution_context"),
        ("personas", "mode"),
    }


@pytest.mark.parametrize(("table", "column"), ENUMS, ids=str)
def test_enum_is_text_by_value_with_a_check(
    table: Table, column: Column[Any], connection: psycopg.Connection
) -> None:
    kind = column.type
    assert isinstance(kind, Enum)
    assert kind.enum_class is not None
    values = [item.value for item in kind.enum_class]
    assert not kind.native_enum
    assert kind.enums == values
    assert isinstance(kind.dialect_impl(DIALECT), String)
    row = connection.execute(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = %s",
        [f"ck_{table.name}_{column.name}"],
    ).fetchone()
    assert row
    assert re.findall(r"'([^']*)'", row[0]) == values


# --- lints over the migrated database -------------------------------------------------------------


@pytest.fixture
def connection(worker_url: str) -> Iterator[psycopg.Connection]:
    """A connection of the tables' owner, whose work is undone."""
    with admin(worker_url) as owner:
        owner.autocommit = False
        yield owner
        owner.rollback()


@each_table
def test_row_level_security(table: Table, connection: psycopg.Connection) -> None:
    assert connection.execute(
        "SELECT relrowsecurity, relforcerowsecurity FROM pg_class WHERE oid = %s::regclass",
        [table.name],
    ).fetchall() == [(True, False)]
    same_tenant = (
        "(tenant_id = ( SELECT current_setting('app.tenant_id'::text, true) AS current_setting))"
    )
    assert connection.execute(
        "SELECT permissive, roles, cmd, qual, with_check FROM pg_policies WHERE tablename = %s"
        " AND schemaname = current_schema()",
        [table.name],
    ).fetchall() == [("PERMISSIVE", ["public"], "ALL", same_tenant, same_tenant)]


@each_table
def test_defaults(table: Table, connection: psycopg.Connection) -> None:
    rows = connection.execute(
        "SELECT column_name, column_default FROM information_schema.columns"
        " WHERE table_schema = current_schema() AND table_name = %s AND column_default IS NOT NULL",
        [table.name],
    ).fetchall()
    assert len(rows) >= 3
    constant = r"true|false|\d+(\.\d+)?|'[^']*'::[a-z ]+"
    for column, default in rows:
        allowed = COMPUTED_DEFAULTS.get(default, set())
        assert column in allowed or re.fullmatch(constant, default), (column, default)


def test_no_triggers_or_sequences_of_ours(connection: psycopg.Connection) -> None:
    """Citus would not distribute tables with triggers; ids are made in Python."""
    triggers = "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal"
    sequences = "SELECT sequencename FROM pg_sequences"
    for query in (triggers, sequences):
        assert connection.execute(query.encode()).fetchall() == []


def test_functions(connection: psycopg.Connection) -> None:
    """Each has a fixed search_path, and only the application's role may run it."""
    rows = connection.execute("""
        SELECT proname, prosecdef, array(SELECT unnest(proconfig) ORDER BY 1 DESC LIMIT 1),
               current_user::regrole = proowner,
               array(SELECT grantee::regrole::text FROM aclexplode(proacl)
                     WHERE grantee <> proowner)
        FROM pg_proc p WHERE pronamespace = current_schema()::regnamespace
        AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
        ORDER BY proname
    """).fetchall()
    path = ["search_path=pg_catalog, public, pg_temp"]
    assert rows == [
        ("merge_patch", False, path, True, ["database_app"]),
        ("recall_memories", True, path, True, ["database_app"]),
        ("search_contexts", True, path, True, ["database_app"]),
        ("search_messages", True, path, True, ["database_app"]),
    ]


# --- what the server does with rows ---------------------------------------------------------------

# Besides keys to other tables, what a row cannot do without; the number makes it unique.
MINIMAL: dict[str, Callable[[int], dict[str, Any]]] = {
    "users": lambda _: {},
    "identities": lambda n: {"provider": "google", "subject": str(n)},
    "api_keys": lambda n: {"key_hash": n.to_bytes(32), "prefix": "sk"},
    "contexts": lambda _: {"context_type": "note", "content": Jsonb({})},
    "personas": lambda n: {"name": f"persona {n}", "template": "Hi"},
    "modules": lambda n: {"name": f"module_{n}"},
    "conversations": lambda n: {"thread_id": str(n)},
    "messages": lambda n: {"position": n, "role": "user", "content": "Hi"},
    "conversation_states": lambda n: {"state_key": str(n), "state_value": Jsonb(1)},
    "conversation_memory": lambda n: {"sequence": n, "content": "Hi"},
}
OWNERS = {
    "identities": ("user_id", "users"),
    "api_keys": ("user_id", "users"),
    "contexts": ("user_id", "users"),
    "messages": ("conversation_id", "conversations"),
    "conversation_states": ("conversation_id", "conversations"),
    "conversation_memory": ("conversation_id", "conversations"),
}


class Rows:
    """Writes rows in raw SQL, in a tenant of its own unless told otherwise."""

    def __init__(self, connection: psycopg.Connection, tenant: str) -> None:
        self.connection = connection
        self.tenant = tenant
        self.numbers = count(1)

    def add(self, table: str, **values: Any) -> UUID:
        row = {
            "tenant_id": self.tenant,
            "id": uuid4(),
            **MINIMAL[table](next(self.numbers)),
            **values,
        }
        if table in OWNERS and OWNERS[table][0] not in row:
            column, owner = OWNERS[table]
            row[column] = self.add(owner)
        statement = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
            sql.Identifier(table),
            sql.SQL(", ").join(map(sql.Identifier, row)),
            sql.SQL(", ").join(map(sql.Placeholder, row)),
        )
        self.connection.execute(statement, row)
        added: UUID = row["id"]
        return added

    def get(self, table: str, row_id: UUID) -> dict[str, Any] | None:
        row = self.connection.execute(
            sql.SQL("SELECT to_jsonb(t) FROM {} t WHERE tenant_id = %s AND id = %s").format(
                sql.Identifier(table)
            ),
            [self.tenant, row_id],
        ).fetchone()
        return None if row is None else row[0]

    def update(self, table: str, row_id: UUID, **values: Any) -> None:
        for column, value in values.items():
            self.connection.execute(
                sql.SQL("UPDATE {} SET {} = %s WHERE tenant_id = %s AND id = %s").format(
                    sql.Identifier(table), sql.Identifier(column)
                ),
                [value, self.tenant, row_id],
            )

    def delete(self, table: str, row_id: UUID) -> None:
        self.connection.execute(
            sql.SQL("DELETE FROM {} WHERE tenant_id = %s AND id = %s").format(
                sql.Identifier(table)
            ),
            [self.tenant, row_id],
        )

    def counts(self) -> dict[str, int]:
        """How many rows each table has in the tenant; only tables that have some."""
        found = {}
        for table in MINIMAL:
            row = self.connection.execute(
                sql.SQL("SELECT count(*) FROM {} WHERE tenant_id = %s").format(
                    sql.Identifier(table)
                ),
                [self.tenant],
            ).fetchone()
            if row and row[0]:
                found[table] = row[0]
        return found


@pytest.fixture
def rows(connection: psycopg.Connection, tenant: str) -> Rows:
    return Rows(connection, tenant)


@pytest.fixture
def other_rows(connection: psycopg.Connection, tenant: str) -> Rows:
    return Rows(connection, f"{tenant}-other")


def test_every_table_is_covered() -> None:
    assert MINIMAL.keys() == Base.metadata.tables.keys()


def everything_of_a_user(rows: Rows) -> dict[str, UUID]:
    """One row in every table that a user can own rows in."""
    user = rows.add("users")
    conversation = rows.add("conversations", user_id=user)
    return {
        "users": user,
        "conversations": conversation,
        **{
            table: rows.add(table, user_id=user) for table in ("identities", "api_keys", "contexts")
        },
        **{
            table: rows.add(table, conversation_id=conversation)
            for table in ("messages", "conversation_states", "conversation_memory")
        },
    }


def test_deleting_a_user(rows: Rows) -> None:
    kept = everything_of_a_user(rows)
    before = {table: rows.get(table, row) for table, row in kept.items()}
    anonymous = rows.add("conversations")
    of_another = rows.add("conversation_memory", conversation_id=anonymous, user_id=kept["users"])

    gone = everything_of_a_user(rows)
    rows.add("conversation_memory", conversation_id=anonymous, user_id=gone["users"])
    rows.delete("users", gone["users"])

    assert {table: rows.get(table, row) for table, row in gone.items()} == dict.fromkeys(gone)
    assert {table: rows.get(table, row) for table, row in kept.items()} == before
    assert rows.get("conversation_memory", of_another)
    assert rows.counts() == {**dict.fromkeys(kept, 1), "conversations": 2, "conversation_memory": 2}


def test_deleting_a_conversation(rows: Rows) -> None:
    kept, gone = everything_of_a_user(rows), everything_of_a_user(rows)
    message = rows.add(
        "messages", conversation_id=gone["conversations"], parent_id=gone["messages"]
    )
    rows.update("conversations", gone["conversations"], head_id=message)
    rows.delete("conversations", gone["conversations"])
    assert rows.counts() == {
        **dict.fromkeys(kept, 1),
        **dict.fromkeys(("users", "identities", "api_keys", "contexts"), 2),
    }
    assert rows.get("conversations", kept["conversations"])


def test_deleting_a_persona(rows: Rows) -> None:
    persona, other = rows.add("personas"), rows.add("personas")
    conversation = rows.add("conversations", persona_id=persona, user_id=rows.add("users"))
    memory = rows.add("conversation_memory", conversation_id=conversation, persona_id=persona)
    before = {
        "conversations": rows.get("conversations", conversation),
        "conversation_memory": rows.get("conversation_memory", memory),
    }
    states = {
        of: rows.add("conversation_states", conversation_id=conversation, persona_id=of)
        for of in (persona, other, None)
    }
    rows.delete("personas", persona)
    for table, row in (("conversations", conversation), ("conversation_memory", memory)):
        old = before[table]
        assert old
        assert rows.get(table, row) == {**old, "persona_id": None}
    assert rows.get("conversation_states", states[persona]) is None
    assert rows.get("conversation_states", states[other])
    assert rows.get("conversation_states", states[None])


def test_deleting_a_module(rows: Rows) -> None:
    module, other = rows.add("modules"), rows.add("modules")
    states = {of: rows.add("conversation_states", module_id=of) for of in (module, other, None)}
    rows.delete("modules", module)
    assert rows.get("conversation_states", states[module]) is None
    assert rows.get("conversation_states", states[other])
    assert rows.get("conversation_states", states[None])
    assert rows.counts()["conversations"] == 3


def test_deleting_a_message(rows: Rows) -> None:
    conversation = rows.add("conversations", user_id=rows.add("users"))
    message = rows.add("messages", conversation_id=conversation)
    rows.update("conversations", conversation, head_id=message)
    referring = {
        ("conversations", "head_id"): conversation,
        ("messages", "parent_id"): rows.add(
            "messages", conversation_id=conversation, parent_id=message
        ),
        ("conversation_memory", "first_message_id"): rows.add(
            "conversation_memory", conversation_id=conversation, first_message_id=message
        ),
    }
    before = {key: rows.get(key[0], row) for key, row in referring.items()}
    rows.delete("messages", message)
    for (table, column), row in referring.items():
        old = before[table, column]
        assert old
        assert old[column] == str(message)
        assert rows.get(table, row) == {**old, column: None}


@each_foreign_key
def test_no_row_refers_to_another_tenants(
    key: ForeignKeyConstraint, rows: Rows, other_rows: Rows
) -> None:
    theirs = other_rows.add(key.referred_table.name)
    ours = rows.add(key.referred_table.name)
    rows.add(key.table.name, **{column_of(key).name: ours})
    with pytest.raises(psycopg.errors.ForeignKeyViolation) as caught:
        rows.add(key.table.name, **{column_of(key).name: theirs})
    assert caught.value.diag.constraint_name == key.name


def test_row_level_security_at_work(
    connection: psycopg.Connection, rows: Rows, other_rows: Rows
) -> None:
    for table in MINIMAL:
        rows.add(table)
        other_rows.add(table)
    theirs = other_rows.counts()
    ours = rows.counts()
    user = rows.add("users")
    connection.execute("SET LOCAL ROLE database_app")
    assert rows.counts() == other_rows.counts() == {}
    with pytest.raises(psycopg.errors.InsufficientPrivilege), connection.transaction():
        rows.add("users")

    connection.execute(f"SET LOCAL app.tenant_id = '{rows.tenant}'".encode())
    assert rows.counts() == {**ours, "users": ours["users"] + 1}
    assert other_rows.counts() == {}
    for table in MINIMAL:
        with pytest.raises(psycopg.errors.InsufficientPrivilege), connection.transaction():
            other_rows.add(table)
        statement = sql.SQL("DELETE FROM {} WHERE tenant_id = %s").format(sql.Identifier(table))
        assert connection.execute(statement, [other_rows.tenant]).rowcount == 0
    with pytest.raises(psycopg.errors.InsufficientPrivilege), connection.transaction():
        rows.update("users", user, tenant_id=other_rows.tenant)

    connection.execute(f"SET LOCAL app.tenant_id = '{other_rows.tenant}'".encode())
    assert other_rows.counts() == theirs


# --- keys -----------------------------------------------------------------------------------------


def refused(rows: Rows, key: str, table: str, **values: Any) -> None:
    with pytest.raises(psycopg.errors.UniqueViolation) as caught, rows.connection.transaction():
        rows.add(table, **values)
    assert caught.value.diag.constraint_name == key


def test_states_are_unique_also_without_persona_module_and_stage(rows: Rows) -> None:
    places: dict[str, Any] = {
        "persona_id": rows.add("personas"),
        "module_id": rows.add("modules"),
        "execution_stage": "stage1",
    }
    conversation = rows.add("conversations")
    for given in ({}, *({name: value} for name, value in places.items()), places):
        state = {"conversation_id": conversation, "state_key": "mood", **given}
        rows.add("conversation_states", **state)
        refused(rows, "uq_conversation_states_key", "conversation_states", **state)
        rows.add("conversation_states", **{**state, "state_key": "other"})
    rows.add("conversation_states", state_key="mood")  # of another conversation


def test_contexts_are_unique_only_with_a_source(rows: Rows, other_rows: Rows) -> None:
    note = {"user_id": rows.add("users"), "context_type": "note"}
    rows.add("contexts", **note)
    rows.add("contexts", **note)
    rows.add("contexts", **note, source_identifier="mail 1")
    refused(rows, "uq_contexts_source", "contexts", **note, source_identifier="mail 1")
    rows.add("contexts", **note, source_identifier="mail 2")
    rows.add("contexts", **{**note, "context_type": "fact"}, source_identifier="mail 1")
    rows.add("contexts", context_type="note", source_identifier="mail 1")
    other_rows.add("contexts", context_type="note", source_identifier="mail 1")


def test_messages_are_unique_only_with_an_idempotency_key(rows: Rows) -> None:
    conversation = rows.add("conversations")
    rows.add("messages", conversation_id=conversation)
    rows.add("messages", conversation_id=conversation)
    keyed = {"conversation_id": conversation, "idempotency_key": "request 1"}
    rows.add("messages", **keyed)
    refused(rows, "uq_messages_idempotency_key", "messages", **keyed)
    rows.add("messages", idempotency_key="request 1")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("uq_users_email", {"email": "a@example.com"}),
        ("uq_identities_provider_subject", {"provider": "google", "subject": "sub"}),
        ("uq_api_keys_key_hash", {"key_hash": b"k" * 32}),
        ("uq_personas_name", {"name": "Ada"}),
        ("uq_modules_name", {"name": "weather"}),
        ("uq_conversations_thread_id", {"thread_id": "thread"}),
    ],
)
def test_unique_in_the_tenant(
    key: str, values: dict[str, Any], rows: Rows, other_rows: Rows
) -> None:
    table = table_of(key)
    rows.add(table, **values)
    refused(rows, key, table, **values)
    other_rows.add(table, **values)


@pytest.mark.parametrize(
    ("key", "column"),
    [
        ("uq_messages_conversation_id_position", "position"),
        ("uq_conversation_memory_conversation_id_sequence", "sequence"),
    ],
)
def test_unique_in_the_conversation(key: str, column: str, rows: Rows) -> None:
    table = table_of(key)
    conversation = rows.add("conversations")
    rows.add(table, conversation_id=conversation, **{column: 7})
    refused(rows, key, table, conversation_id=conversation, **{column: 7})
    rows.add(table, **{column: 7})


# --- checks ---------------------------------------------------------------------------------------


def table_of(constraint: str) -> str:
    return next(name for name in MINIMAL if constraint[3:].startswith(f"{name}_"))


FREQUENCIES = ("", "0", "0.0", "00", "-1", "1.", ".5", "1e3", "fast", "1 ", "1\n", "\u0661", "NaN")
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("ck_users_email", {"email": "Ada@example.com"}),
    ("ck_users_email", {"email": "example.com"}),
    ("ck_users_email", {"email": "@example.com"}),
    ("ck_users_email", {"email": ""}),
    ("ck_identities_provider", {"provider": ""}),
    ("ck_identities_subject", {"subject": ""}),
    ("ck_api_keys_key_hash", {"key_hash": b""}),
    ("ck_api_keys_key_hash", {"key_hash": bytes(31)}),
    ("ck_api_keys_key_hash", {"key_hash": bytes(33)}),
    ("ck_contexts_context_type", {"context_type": ""}),
    ("ck_personas_name", {"name": ""}),
    ("ck_personas_mode", {"mode": "REACTIVE"}),
    ("ck_personas_mode", {"mode": ""}),
    ("ck_personas_loop_frequency", {"loop_frequency": "5"}),
    ("ck_personas_loop_frequency", {"loop_frequency": "5", "mode": "reactive"}),
    *(
        ("ck_personas_loop_frequency", {"loop_frequency": value, "mode": "autonomous"})
        for value in FREQUENCIES
    ),
    ("ck_modules_name", {"name": ""}),
    ("ck_modules_name", {"name": "1st"}),
    ("ck_modules_name", {"name": "_a"}),
    ("ck_modules_name", {"name": "Name"}),
    ("ck_modules_name", {"name": "a-b"}),
    ("ck_modules_name", {"name": "\u00e9t\u00e9"}),
    ("ck_modules_name", {"name": "a\n"}),
    ("ck_modules_name", {"name": "a" * 51}),
    ("ck_modules_type", {"type": "SIMPLE"}),
    ("ck_modules_execution_context", {"execution_context": "immediate"}),
    ("ck_conversations_thread_id", {"thread_id": ""}),
    ("ck_conversations_message_count", {"message_count": -1}),
    ("ck_conversations_last_position", {"last_position": -1}),
    ("ck_messages_position", {"position": 0}),
    ("ck_messages_role", {"role": "USER"}),
    ("ck_messages_role", {"role": "bot"}),
    ("ck_messages_input_tokens", {"input_tokens": -1}),
    ("ck_messages_output_tokens", {"output_tokens": -1}),
    ("ck_conversation_states_state_key", {"state_key": ""}),
    ("ck_conversation_states_version", {"version": 0}),
    ("ck_conversation_memory_importance", {"importance": -0.01}),
    ("ck_conversation_memory_importance", {"importance": 1.01}),
    ("ck_conversation_memory_importance", {"importance": float("nan")}),
    ("ck_conversation_memory_importance", {"importance": float("inf")}),
    ("ck_conversation_memory_sequence", {"sequence": 0}),
    ("ck_conversation_memory_access_count", {"access_count": -1}),
    ("ck_conversation_memory_message_count", {"message_count": -1}),
    ("ck_conversation_memory_range", {"first_position": 0, "last_position": 1}),
    ("ck_conversation_memory_range", {"first_position": 5, "last_position": 4}),
    *(
        (f"ck_{table}_tenant_id", {"tenant_id": tenant})
        for table in MINIMAL
        for tenant in ("", " a", "a b", "-a", "a/b", "a'b", "a\n", "\u00e9", "a" * 65)
    ),
]
ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("users", {"email": None}),
    ("users", {"email": "\u00e9@example.com"}),
    ("personas", {"loop_frequency": "0.5", "mode": "autonomous"}),
    ("personas", {"loop_frequency": "10", "mode": "autonomous"}),
    ("personas", {"loop_frequency": None, "mode": "autonomous"}),
    ("modules", {"name": "a" * 50}),
    ("messages", {"input_tokens": 0, "output_tokens": None}),
    ("messages", {"content": ""}),
    ("conversation_memory", {"importance": 0, "first_position": 3, "last_position": 3}),
    ("conversation_memory", {"importance": 1, "message_count": 0}),
    *((table, {"tenant_id": "A" + "_.:@-" * 12 + "123"}) for table in ("users", "personas")),
]


def test_every_check_has_a_case() -> None:
    assert {name for name, _ in REFUSED} == {
        str(check.name) for table in TABLES for check in checks(table)
    }


@pytest.mark.parametrize(("constraint", "values"), REFUSED)
def test_check_refuses(constraint: str, values: dict[str, Any], rows: Rows) -> None:
    table = table_of(constraint)
    rows.add(table)
    with pytest.raises(psycopg.errors.CheckViolation) as caught:
        rows.add(table, **values)
    assert caught.value.diag.constraint_name == constraint


@pytest.mark.parametrize(("table", "values"), ACCEPTED)
def test_check_accepts(table: str, values: dict[str, Any], rows: Rows) -> None:
    rows.add(table, **values)


def test_no_tenant_no_row(rows: Rows) -> None:
    """The default leaves the tenant NULL where none is set."""
    with pytest.raises(psycopg.errors.NotNullViolation):
        rows.connection.execute("INSERT INTO users (id) VALUES (gen_random_uuid())")
