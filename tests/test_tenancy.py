"""The three walls between tenants, each alone: keys, criteria, row-level security."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from os import urandom
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from psycopg import sql
from psycopg.pq import TransactionStatus
from psycopg.types.json import Jsonb
from sqlalchemy import (
    Connection,
    Engine,
    ForeignKeyConstraint,
    create_engine,
    delete,
    exists,
    func,
    insert,
    literal,
    make_url,
    select,
    text,
    true,
    tuple_,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.orm import Session, aliased

from database import (
    ALL_TENANTS,
    AlreadyExistsError,
    ApiKey,
    Base,
    ConfigurationError,
    Conversation,
    ConversationRepository,
    DatabaseError,
    Identity,
    InvalidValueError,
    Memory,
    Message,
    MessageRepository,
    SessionLocal,
    TenantModel,
    TenantSession,
    TransientError,
    User,
    UserRepository,
    bind_tenant,
    configure,
    get_db_session,
    get_engine,
    run_in_transaction,
    transaction,
)
from database.driver import Connection as Driver
from database.driver import driver_of
from database.models.base import TENANT_PATTERN
from database.pool import create_database_engine
from database.settings import Settings
from tests import factories
from tests.conftest import admin, database_of

if TYPE_CHECKING:
    from database.session import Tenant

ROLE = "database_app"
WHERE_AM_I = "SELECT current_user::text, current_setting('app.tenant_id', true)"

MODELS = sorted(
    (mapper.class_ for mapper in TenantModel.registry.mappers), key=lambda model: model.__name__
)
TABLES = {model.__tablename__: model for model in MODELS}
FOREIGN_KEYS = sorted(
    (key for table in TABLES for key in Base.metadata.tables[table].foreign_key_constraints),
    key=lambda key: str(key.name),
)
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__tablename__)


@pytest.fixture(scope="module")
def worker_url(server: str, template: str) -> Iterator[str]:
    """A database to ourselves: what reads across tenants here must not read other tests' rows."""
    with database_of(server, template) as url:
        yield url


def factory_of(model: type[TenantModel]) -> Any:
    return getattr(factories, f"{model.__name__}Factory")


def make(model: type[TenantModel], db: TenantSession) -> Any:
    return factory_of(model)(db=db)


def unsaved(model: type[TenantModel], db: TenantSession) -> Any:
    """An object as an application would give it to `db.add`."""
    needed: dict[type[TenantModel], dict[str, Any]] = {
        ApiKey: {"key_hash": urandom(32), "prefix": "dbk_"},
        Memory: {"sequence": 99},
        Message: {"position": 99},
    }
    fields = needed.get(model, {})
    return model(**fields, **factories.fields_of(factory_of(model), db))


def tenant_of(db: Session) -> str:
    return str(db.info["database.tenant"])


@pytest.fixture
def login(worker_url: str) -> Iterator[psycopg.Connection]:
    """A plain connection, to which only the keys are a wall."""
    with admin(worker_url) as connection:
        yield connection


@contextmanager
def engine_of(url: str, **options: Any) -> Iterator[Engine]:
    engine = create_database_engine(url, Settings(url=url, _env_file=None, **options))
    try:
        yield engine
    finally:
        engine.dispose()


@pytest.fixture(scope="module")
def unguarded(worker_url: str) -> Iterator[Engine]:
    """An engine that stays in the login role, to which row-level security does not apply."""
    with engine_of(worker_url, app_role="") as engine:
        yield engine


@pytest.fixture
def mine(unguarded: Engine, db: TenantSession) -> Iterator[TenantSession]:
    """A session of the test's tenant without row-level security."""
    with TenantSession(unguarded, tenant_id=tenant_of(db)) as session:
        yield session


def stored(login: psycopg.Connection, row: TenantModel) -> dict[str, Any] | None:
    query = sql.SQL("SELECT to_jsonb(t) FROM {} t WHERE tenant_id = %s AND id = %s").format(
        sql.Identifier(row.__tablename__)
    )
    found = login.execute(query, [row.tenant_id, row.id]).fetchone()
    return None if found is None else dict(found[0])


def where_is(db: Session) -> tuple[str, str]:
    user, tenant = db.execute(text(WHERE_AM_I)).one()
    return user, tenant


# The first wall: keys


def test_every_foreign_key_holds_the_tenant(login: psycopg.Connection) -> None:
    found = login.execute(
        """
        SELECT conname, conkey, confkey FROM pg_constraint c
        JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attname = 'tenant_id'
        JOIN pg_attribute f ON f.attrelid = c.confrelid AND f.attname = 'tenant_id'
        WHERE contype = 'f' AND a.attnum = conkey[1] AND f.attnum = confkey[1]
        """
    ).fetchall()
    assert {name for name, *_ in found} == {str(key.name) for key in FOREIGN_KEYS}
    assert all(len(columns) == len(referred) == 2 for _, columns, referred in found)


@pytest.mark.parametrize("key", FOREIGN_KEYS, ids=lambda key: str(key.name))
def test_a_row_of_another_tenant_cannot_be_referred_to(
    key: ForeignKeyConstraint, db: TenantSession, other: TenantSession, login: psycopg.Connection
) -> None:
    table = str(key.table.name)
    column = next(name for name in key.column_keys if name != "tenant_id")
    target = TABLES[key.referred_table.name]
    row = make(TABLES[table], db)
    change = sql.SQL("UPDATE {} SET {} = %s WHERE tenant_id = %s AND id = %s").format(
        sql.Identifier(table), sql.Identifier(column)
    )
    own, foreign = make(target, db), make(target, other)

    def refer_to(target: TenantModel) -> None:
        with login.transaction(force_rollback=True):
            login.execute(change, [target.id, row.tenant_id, row.id])

    refer_to(own)
    with pytest.raises(psycopg.errors.ForeignKeyViolation) as raised:
        refer_to(foreign)
    assert raised.value.diag.constraint_name == key.name


@pytest.mark.parametrize("key", FOREIGN_KEYS, ids=lambda key: str(key.name))
def test_a_row_that_refers_to_another_cannot_leave_its_tenant(
    key: ForeignKeyConstraint, db: TenantSession, login: psycopg.Connection
) -> None:
    table = str(key.table.name)
    column = next(name for name in key.column_keys if name != "tenant_id")
    row, target = make(TABLES[table], db), make(TABLES[key.referred_table.name], db)
    change = sql.SQL("UPDATE {} SET {} = %s WHERE id = %s").format(
        sql.Identifier(table), sql.Identifier(column)
    )
    leave = sql.SQL("UPDATE {} SET tenant_id = 'elsewhere' WHERE id = %s").format(
        sql.Identifier(table)
    )
    with login.transaction(force_rollback=True):
        login.execute(change, [target.id, row.id])
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            login.execute(leave, [row.id])


@each_model
def test_an_id_may_be_used_by_every_tenant_and_is_unique_in_each(
    model: type[TenantModel], db: TenantSession, other: TenantSession
) -> None:
    row = make(model, db)
    assert factory_of(model)(db=other, id=row.id).id == row.id
    with pytest.raises(AlreadyExistsError, match=r"^id: "):
        factory_of(model)(db=db, id=row.id)


# The second wall: what a session adds to statements


def of_count(model: type[TenantModel], _: UUID) -> Any:
    return select(func.count()).select_from(model)


NIL = UUID(int=0)
READS: dict[str, Callable[[type[TenantModel], UUID], Any]] = {
    "entity": lambda m, _: select(m.id, m),
    "column": lambda m, _: select(m.id),
    "where": lambda m, foreign: select(m.id).where((m.id == foreign) | true()),
    "tuples": lambda m, _: select(m.id).where(tuple_(m.id, m.id) >= (NIL, NIL)),
    "alias": lambda m, _: select(aliased(m).id),
    "subquery": lambda m, _: select(select(m.id).subquery().c.id),
    "subquery of a subquery": lambda m, _: select(
        select(select(m.id).subquery().c.id).subquery().c.id
    ),
    "alias of a subquery": lambda m, _: select(aliased(m, select(m).subquery()).id),
    "cte": lambda m, _: select(select(m.id).cte().c.id),
    "recursive cte": lambda m, _: select(
        (base := select(m.id).cte(recursive=True)).union(select(base.c.id)).c.id
    ),
    "in": lambda m, _: select(m.id).where(m.id.in_(select(aliased(m).id))),
    "in a subquery alone": lambda m, foreign: select(literal(str(foreign))).where(
        exists(select(m.id).where(m.id == foreign))
    ),
    "scalar subquery": lambda m, foreign: select(
        func.coalesce(select(m.id).where(m.id == foreign).scalar_subquery(), None)
    ),
    "union": lambda m, _: select(m.id).union_all(select(aliased(m).id)),
    "join of aliases": lambda m, _: select((a := aliased(m)).id).join(
        b := aliased(m), a.id == b.id
    ),
    "cross join": lambda m, _: select((a := aliased(m)).id).join(m, (a.id != m.id) | true()),
    "outer join": lambda m, _: select((a := aliased(m)).id).select_from(User).outerjoin(a, true()),
    "lateral": lambda m, _: (
        select((inner := select(m.id).lateral()).c.id).select_from(User).join(inner, true())
    ),
    "aggregate": lambda m, _: select(func.unnest(func.array_agg(m.id))),
}


@each_model
def test_a_statement_sees_only_its_tenant(
    model: type[TenantModel], unguarded: Engine, db: TenantSession, other: TenantSession
) -> None:
    own, foreign = make(model, db), make(model, other)
    make(User, db)
    with (
        TenantSession(unguarded, tenant_id=own.tenant_id) as mine,
        TenantSession(unguarded, tenant_id=ALL_TENANTS) as across,
    ):
        for shape, build in READS.items():
            statement = build(model, foreign.id)
            found = {str(row[0]) for row in mine.execute(statement)}
            assert str(foreign.id) not in found, shape
            asks_for_the_foreign_row = shape in ("in a subquery alone", "scalar subquery")
            assert (str(own.id) in found) != asks_for_the_foreign_row, shape
            # Without the criterion it would be found.
            assert str(foreign.id) in {str(row[0]) for row in across.execute(statement)}, shape


@each_model
def test_old_queries_counts_and_lookups(
    model: type[TenantModel], mine: TenantSession, db: TenantSession, other: TenantSession
) -> None:
    own, foreign = make(model, db), make(model, other)
    assert mine.query(model).filter(model.id.in_([own.id, foreign.id])).count() == 1
    assert own.id in [row.id for row in mine.query(model).all()]
    assert foreign.id not in [row.id for row in mine.query(model).all()]
    before = mine.scalar(of_count(model, own.id))
    make(model, other)
    assert mine.scalar(of_count(model, own.id)) == before
    assert mine.get(model, (own.tenant_id, own.id)) is not None
    assert mine.get(model, (foreign.tenant_id, foreign.id)) is None
    assert mine.get(model, (own.tenant_id, foreign.id)) is None


@each_model
def test_statements_change_only_their_tenant(
    model: type[TenantModel],
    mine: TenantSession,
    db: TenantSession,
    other: TenantSession,
    login: psycopg.Connection,
) -> None:
    own, foreign = make(model, db), make(model, other)
    before = stored(login, foreign)
    again = aliased(model)
    ids = select(again.id)
    for evaluate in (False, "fetch", "auto"):
        options = {"synchronize_session": evaluate}
        for change in (
            update(model).values(created_at=func.now()),
            update(model).values(created_at=func.now()).where(model.id == foreign.id),
            update(model).values(created_at=func.now()).where(model.id.in_(ids)),
        ):
            with suppress(NotImplementedError):
                mine.execute(change, execution_options=options)
                mine.commit()
        assert stored(login, foreign) == before
        mine.execute(delete(model).where(model.id == foreign.id), execution_options=options)
        mine.commit()
        assert stored(login, foreign) == before
    assert (stored(login, own) or {})["created_at"] != own.created_at.isoformat()
    mine.execute(delete(model))
    mine.commit()
    assert stored(login, own) is None
    assert stored(login, foreign) == before


def test_a_copy_reads_only_its_tenant(
    mine: TenantSession, db: TenantSession, other: TenantSession, login: psycopg.Connection
) -> None:
    make(User, other)
    own = make(User, db)
    rows = select(User.id, User.id, literal("copy"), func.cast(User.id, User.email.type))
    mine.execute(insert(Identity).from_select(["id", "user_id", "provider", "subject"], rows))
    mine.commit()
    found = login.execute("SELECT tenant_id, id FROM identities WHERE provider = 'copy'").fetchall()
    assert [row for row in found if row[0] == own.tenant_id] == [(own.tenant_id, own.id)]


def test_the_criterion_follows_the_session_not_the_statement(
    unguarded: Engine, tenant: str, other: TenantSession, db: TenantSession
) -> None:
    """Statements are compiled once, for whatever tenant came first."""
    statement, names = select(User.tenant_id), [tenant, tenant_of(other)]
    make(User, db)
    make(User, other)
    for name in names * 5:
        with TenantSession(unguarded, tenant_id=name) as session:
            assert set(session.scalars(statement)) == {name}
            assert set(session.scalars(select(aliased(User).tenant_id))) == {name}


@each_model
def test_new_objects_get_the_sessions_tenant(
    model: type[TenantModel], mine: TenantSession, db: TenantSession, login: psycopg.Connection
) -> None:
    row = unsaved(model, db)
    mine.add(row)
    mine.flush()
    assert row.tenant_id == tenant_of(mine)
    mine.commit()
    assert (stored(login, row) or {})["tenant_id"] == tenant_of(mine)


def test_inserted_rows_get_the_sessions_tenant(
    mine: TenantSession, login: psycopg.Connection
) -> None:
    ids = [uuid4() for _ in range(4)]
    mine.execute(insert(User), [{"id": ids[0]}, {"id": ids[1]}])
    mine.execute(insert(User).values(id=ids[2]))
    mine.execute(insert(User.__table__).values(id=ids[3]))  # type: ignore[arg-type]
    mine.commit()
    found = login.execute("SELECT tenant_id FROM users WHERE id = ANY(%s)", [ids]).fetchall()
    assert found == [(tenant_of(mine),)] * 4


@each_model
@pytest.mark.parametrize("act", ["add", "move", "change", "delete"])
def test_objects_of_another_tenant_are_not_written(  # noqa: PLR0917
    model: type[TenantModel],
    act: str,
    mine: TenantSession,
    db: TenantSession,
    other: TenantSession,
    login: psycopg.Connection,
) -> None:
    foreign = make(model, other)
    before = stored(login, foreign)
    other.expunge_all()
    if act == "add":
        row = unsaved(model, db)
        row.tenant_id = foreign.tenant_id
        mine.add(row)
    elif act == "move":
        moved = make(model, db)
        row = mine.get_one(model, (moved.tenant_id, moved.id))
        row.tenant_id = foreign.tenant_id
    else:
        mine.add(foreign)
        if act == "delete":
            mine.delete(foreign)
        else:
            foreign.created_at = foreign.updated_at
    count = login.execute(
        sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(model.__tablename__))
    ).fetchone()
    with pytest.raises(InvalidValueError, match=r"^tenant_id: "):
        mine.flush()
    mine.rollback()
    assert stored(login, foreign) == before
    assert (
        count
        == login.execute(
            sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(model.__tablename__))
        ).fetchone()
        or act == "move"
    )


# The third wall: row-level security


@each_model
def test_the_server_shows_only_the_tenants_rows(
    model: type[TenantModel], db: TenantSession, other: TenantSession
) -> None:
    own, foreign = make(model, db), make(model, other)
    table = model.__tablename__
    by_text = db.scalars(text(f"SELECT id FROM {table}")).all()
    by_name = db.scalars(select(model.id).execution_options(names_tenant=True)).all()
    by_core = db.connection().scalars(select(model.__table__.c.id)).all()
    assert own.id in by_text
    assert foreign.id not in by_text
    assert sorted(by_text) == sorted(by_name) == sorted(by_core)
    hidden = text(f"SELECT count(*) FROM {table} WHERE tenant_id = :tenant")
    assert db.scalar(hidden, {"tenant": foreign.tenant_id}) == 0
    assert db.scalar(text(f"SELECT row_security_active('{table}')"))


@each_model
def test_the_server_changes_only_the_tenants_rows(
    model: type[TenantModel], db: TenantSession, other: TenantSession, login: psycopg.Connection
) -> None:
    own, foreign = make(model, db), make(model, other)
    before = stored(login, foreign)
    unnamed = {"names_tenant": True, "synchronize_session": False}
    changes: list[Any] = [
        text(f"UPDATE {model.__tablename__} SET created_at = now()"),
        text(f"UPDATE {model.__tablename__} SET created_at = now() WHERE id = '{foreign.id}'"),
        update(model).values(created_at=func.now()).execution_options(**unnamed),
        text(f"DELETE FROM {model.__tablename__} WHERE id = '{foreign.id}'"),
        delete(model).execution_options(**unnamed),
        text(f"DELETE FROM {model.__tablename__}"),
    ]
    for change in changes:
        db.execute(change)
        db.commit()
        assert stored(login, foreign) == before
    assert stored(login, own) is None


@each_model
def test_the_server_takes_no_rows_for_another_tenant(
    model: type[TenantModel], db: TenantSession, other: TenantSession
) -> None:
    make(model, db)
    table, foreign = model.__tablename__, tenant_of(other)
    columns = [c.name for c in model.__table__.columns if c.name not in ("tenant_id", "id")]
    names = ", ".join(f'"{name}"' for name in columns)
    copied = f"INSERT INTO {table} (tenant_id, id, {names}) SELECT '{foreign}', gen_random_uuid()"
    refused: list[Any] = [
        text(f"{copied}, {names} FROM {table}"),
        text(f"UPDATE {table} SET tenant_id = '{foreign}'"),
        update(model)
        .values(tenant_id=foreign)
        .execution_options(names_tenant=True, synchronize_session=False),
        insert(model).from_select(
            ["tenant_id", "id", *columns],
            select(literal(foreign), func.gen_random_uuid(), *map(model.__table__.c.get, columns)),
        ),
    ]
    for statement in refused:
        with pytest.raises(ProgrammingError) as raised:
            db.execute(statement)
        assert isinstance(raised.value.orig, psycopg.errors.InsufficientPrivilege)
        db.rollback()
        with pytest.raises(InvalidValueError, match=r"^tenant_id: "), transaction(db):
            db.execute(statement)


@each_model
def test_without_a_tenant_nothing_is_seen_or_taken(
    model: type[TenantModel], db: TenantSession, login: psycopg.Connection
) -> None:
    row = make(model, db)
    table = sql.Identifier(model.__tablename__)
    columns = [c.name for c in model.__table__.columns if c.name not in ("tenant_id", "id")]
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    values = login.execute(
        sql.SQL("SELECT {} FROM {} WHERE tenant_id = %s AND id = %s").format(names, table),
        [row.tenant_id, row.id],
    ).fetchone()
    assert values is not None
    parameters = [Jsonb(v) if isinstance(v, dict | list) else v for v in values]
    holders = sql.SQL(", ").join([sql.Placeholder()] * len(columns))
    named = sql.SQL("INSERT INTO {} (tenant_id, id, {}) VALUES (%s, gen_random_uuid(), {})").format(
        table, names, holders
    )
    unnamed = sql.SQL("INSERT INTO {} (id, {}) VALUES (gen_random_uuid(), {})").format(
        table, names, holders
    )
    select_all, delete_all, update_all = (
        sql.SQL(query).format(table)
        for query in ("SELECT FROM {}", "DELETE FROM {}", "UPDATE {} SET created_at = now()")
    )

    @contextmanager
    def inside(setting: str | None) -> Iterator[None]:
        with login.transaction(force_rollback=True):
            login.execute("SET LOCAL ROLE database_app")
            if setting is not None:
                login.execute(f"SET LOCAL app.tenant_id = {setting}".encode())
            yield

    for setting in (None, "''", "DEFAULT", "' '", "'%'"):
        with inside(setting):
            for statement in (select_all, delete_all, update_all):
                assert login.execute(statement).rowcount == 0
        with pytest.raises(psycopg.errors.InsufficientPrivilege), inside(setting):
            login.execute(named, [row.tenant_id, *parameters])
        with pytest.raises(REFUSALS), inside(setting):
            login.execute(unnamed, parameters)


REFUSALS = (
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.CheckViolation,
    psycopg.errors.NotNullViolation,
)


@pytest.mark.parametrize("setting", ["SET LOCAL app.tenant_id = ''", "RESET app.tenant_id"])
def test_a_tenant_lost_within_a_session_fails_closed(db: TenantSession, setting: str) -> None:
    make(User, db)
    db.execute(text(setting))
    assert UserRepository.list(db).items == []
    with pytest.raises(InvalidValueError, match=r"^tenant_id: "):
        UserRepository.create(db)
    db.rollback()
    assert UserRepository.count(db) == 1


def test_a_login_that_owns_nothing(
    worker_url: str, db: TenantSession, login: psycopg.Connection
) -> None:
    """As services should log in: a member of the role, and no more."""
    row = make(User, db)
    name = sql.Identifier(f"service_{uuid4().hex}")
    login.execute(
        sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'secret' IN ROLE {}").format(
            name, sql.Identifier(ROLE)
        )
    )
    url = make_url(worker_url).set(username=name._obj[0], password="secret")
    try:
        with engine_of(url.render_as_string(hide_password=False)) as engine:
            with TenantSession(engine, tenant_id=row.tenant_id) as session:
                assert where_is(session) == (ROLE, row.tenant_id)
                session.rollback()
                assert UserRepository.require(session, row.id).email == row.email
            with TenantSession(engine, tenant_id=ALL_TENANTS) as session:
                assert session.scalars(select(User)).all() == []
                with pytest.raises(IntegrityError):
                    session.execute(text("INSERT INTO users (id) VALUES (gen_random_uuid())"))
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                assert connection.scalar(text("SELECT count(*) FROM users")) == 0
    finally:
        login.execute(sql.SQL("DROP ROLE {}").format(name))


# Which tenant a session is of

GOOD_NAMES = ["a", "A0_.:@-", "a" * 64, "user@example.com", "0", "acme:eu-1"]
BAD_NAMES: list[Any] = [
    "", " ", "a b", "a'b", "a;b", "-a", ".a", "@a", "ü", "a" * 65, "a\n", "\na", "a\0", "租户",
    "a/b", "%", "\ud800", 5, b"a", ["a"], True, {}, float("nan"),
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_good_names(name: str) -> None:
    with SessionLocal(tenant_id=name) as db:
        assert where_is(db) == (ROLE, name)


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_bad_names_are_refused(name: Any, db: TenantSession) -> None:
    before = tenant_of(db)
    ways: list[Callable[[], object]] = [
        lambda: SessionLocal(tenant_id=name),
        lambda: TenantSession(tenant_id=name),
        lambda: bind_tenant(db, name),
        lambda: get_db_session(tenant_id=name).__enter__(),
        lambda: run_in_transaction(lambda _: None, tenant_id=name),
    ]
    for way in ways:
        with pytest.raises(InvalidValueError) as raised:
            way()
        assert raised.value.field == "tenant_id"
    assert where_is(db) == (ROLE, before)


@hypothesis_settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(name=st.text(max_size=70) | st.from_regex(TENANT_PATTERN) | st.text("aZ0-.: \n", max_size=6))
def test_sessions_take_the_names_that_tables_take(login: psycopg.Connection, name: str) -> None:
    session = Session()
    with suppress(InvalidValueError):
        bind_tenant(session, name)
    taken = bool(session.info)
    if "\0" in name or re.search("[\ud800-\udfff]", name):
        assert not taken
    else:
        query = f"SELECT %s::text ~ '{TENANT_PATTERN}'"
        assert login.execute(query.encode(), [name]).fetchone() == (taken,)


def test_the_default_is_a_setting(worker_url: str) -> None:
    with SessionLocal() as db:
        assert where_is(db) == (ROLE, "default")
    configure(url=worker_url, tenant_id="other-default")
    with SessionLocal() as db, get_db_session() as other:
        assert where_is(db) == where_is(other) == (ROLE, "other-default")
    with get_db_session(tenant_id="given") as db:
        assert where_is(db) == (ROLE, "given")


def test_binding_before_the_first_use(db: TenantSession, other: TenantSession) -> None:
    row = make(User, other)
    with SessionLocal() as session:
        bind_tenant(session, row.tenant_id)
        assert UserRepository.require(session, row.id).tenant_id == row.tenant_id
        made = make(User, session)
        assert made.tenant_id == row.tenant_id


def test_binding_between_transactions_forgets_the_rows(
    db: TenantSession, other: TenantSession
) -> None:
    row = make(User, db)
    assert row in db
    bind_tenant(db, tenant_of(other))
    assert row not in db
    assert UserRepository.get(db, row.id) is None
    assert where_is(db) == (ROLE, tenant_of(other))


def test_binding_within_a_transaction_is_refused(db: TenantSession) -> None:
    before = tenant_of(db)

    def refused() -> None:
        for tenant in ("elsewhere", ALL_TENANTS, before):
            with pytest.raises(ConfigurationError, match="within a transaction"):
                bind_tenant(db, tenant)
        assert where_is(db) == (ROLE, before)

    db.execute(text("SELECT 1"))
    refused()
    db.rollback()
    with db.begin():
        refused()
    with transaction(db):
        UserRepository.count(db)
        refused()
    db.add(User())
    refused()


def test_an_engine_of_somebody_else(worker_url: str) -> None:
    """Its transactions would not enter the tenant."""
    engine = create_engine(make_url(worker_url).set(drivername="postgresql+psycopg"))
    for options in ({}, {"tenant_id": "acme"}, {"tenant_id": ALL_TENANTS}):
        with pytest.raises(ConfigurationError, match="create_database_engine"):
            TenantSession(engine, **options)
    engine.dispose()


def test_a_session_of_somebody_else(tenant: str, db: TenantSession) -> None:
    make(User, db)
    with Session(get_engine()) as session:
        with pytest.raises(ConfigurationError, match="session of one tenant"):
            UserRepository.count(session)
        assert session.scalars(select(User)).all() == [], "it is in the default tenant"


# Across tenants


@each_model
def test_all_tenants_are_seen_and_changed(
    model: type[TenantModel], db: TenantSession, other: TenantSession, login: psycopg.Connection
) -> None:
    rows = [make(model, db), make(model, other)]
    ids = {row.id for row in rows}
    with get_db_session(tenant_id=ALL_TENANTS) as across:
        assert {row.id for row in across.scalars(select(model).where(model.id.in_(ids)))} == ids
        by_text = text(f"SELECT id FROM {model.__tablename__}")
        assert ids <= set(across.scalars(by_text))
        assert across.get(model, (rows[1].tenant_id, rows[1].id)) is not None
        assert where_is(across)[0] != ROLE
        for row in across.scalars(select(model).where(model.id.in_(ids))):
            row.created_at = row.updated_at
        across.execute(delete(model).where(model.id == rows[0].id))
    assert stored(login, rows[0]) is None
    assert stored(login, rows[1]) is not None


CALLS: dict[str, Callable[[TenantSession], object]] = {
    "get": lambda db: UserRepository.get(db, uuid4()),
    "require": lambda db: UserRepository.require(db, uuid4()),
    "list": UserRepository.list,
    "list by a filter": lambda db: UserRepository.list(db, username="x"),
    "count": UserRepository.count,
    "exists": lambda db: UserRepository.exists(db, uuid4()),
    "create": UserRepository.create,
    "create_many": lambda db: UserRepository.create_many(db, [{}]),
    "update": lambda db: UserRepository.update(db, uuid4(), username="x"),
    "delete": lambda db: UserRepository.delete(db, uuid4()),
    "touch": lambda db: UserRepository.touch(db, uuid4()),
    "get_by_email": lambda db: UserRepository.get_by_email(db, "a@b.c"),
    "get_or_create": lambda db: UserRepository.get_or_create(db, "a@b.c"),
    "get_by_identity": lambda db: UserRepository.get_by_identity(db, "x", "y"),
    "get_or_create_by_identity": lambda db: UserRepository.get_or_create_by_identity(db, "x", "y"),
    "conversation": lambda db: ConversationRepository.create(db, "thread"),
    "get_by_thread_id": lambda db: ConversationRepository.get_by_thread_id(db, "x"),
    "conversation update": lambda db: ConversationRepository.update(db, "x", title="x"),
    "conversation delete": lambda db: ConversationRepository.delete(db, "x"),
    "conversation get_or_create": lambda db: ConversationRepository.get_or_create(db, "x"),
    "get_by_user_email": lambda db: ConversationRepository.get_by_user_email(db, "a@b.c"),
    "list_by_user": lambda db: ConversationRepository.list_by_user(db, uuid4()),
    "count_by_user": lambda db: ConversationRepository.count_by_user(db, "a@b.c"),
    "append": lambda db: MessageRepository.append(db, uuid4(), role="user", content=""),
    "append by thread": lambda db: MessageRepository.append(db, "x", role="user", content=""),
    "append_many": lambda db: MessageRepository.append_many(
        db, uuid4(), [{"role": "user", "content": ""}]
    ),
    "append_tree": lambda db: MessageRepository.append_tree(
        db, uuid4(), [{"role": "user", "content": ""}] * 2, follows=[None, None]
    ),
    "extend": lambda db: MessageRepository.extend(
        db, uuid4(), [{"role": "user", "content": ""}] * 2
    ),
    "roles_to": lambda db: MessageRepository.roles_to(db, uuid4()),
    "history": lambda db: MessageRepository.history(db, uuid4()),
    "window": lambda db: MessageRepository.window(db, uuid4(), 1, 2),
    "iterate": lambda db: list(MessageRepository.iterate(db, uuid4())),
    "deactivate": lambda db: MessageRepository.deactivate(db, uuid4()),
    "purge": lambda db: MessageRepository.purge(db, uuid4()),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_of_one_tenant_say_so(call: str) -> None:
    with SessionLocal(tenant_id=ALL_TENANTS) as across:
        with pytest.raises(ConfigurationError, match="session of one tenant"):
            CALLS[call](across)
        assert not across.in_transaction()
        with pytest.raises(ConfigurationError), transaction(across):
            CALLS[call](across)


# What a pooled connection carries over: nothing


@pytest.fixture
def only(configured: None, worker_url: str) -> Driver:
    """The only connection that the pool has."""
    configure(url=worker_url, pool_size=1, max_overflow=0, pool_timeout=1)
    with get_engine().connect() as connection:
        return driver_of(connection)


class OopsError(Exception):
    pass


def kill(driver: psycopg.Connection[Any]) -> None:
    with admin(get_engine().url.render_as_string(hide_password=False)) as connection:
        connection.execute("SELECT pg_terminate_backend(%s, 5000)", [driver.info.backend_pid])


def use_and_raise(db: TenantSession) -> None:
    with transaction(db):
        make(User, db)
        raise OopsError


def begin_and_raise(db: TenantSession) -> None:
    with transaction(db):
        db.connection()
        raise OopsError


def begin_explicitly_and_raise(db: TenantSession) -> None:
    with db.begin():
        db.connection()
        raise OopsError


def duplicate(db: TenantSession) -> None:
    UserRepository.create(db, email=make(User, db).email)


def duplicate_in_a_unit(db: TenantSession) -> None:
    with transaction(db):
        duplicate(db)


def bad_value_before_the_statement(db: TenantSession) -> None:
    with transaction(db):
        db.scalars(select(User).where(User.email == object())).all()


def lost(db: TenantSession) -> None:
    make(User, db)
    with transaction(db):
        kill(driver_of(db.connection()))
        make(User, db)


def lost_while_idle(db: TenantSession) -> None:
    connection = db.connection()
    driver = driver_of(connection)
    db.rollback()
    kill(driver)


def left_open(db: TenantSession) -> None:
    db.execute(text("SELECT 1"))
    db.add(User())
    db.flush()


def serializable(db: TenantSession) -> None:
    db.connection(execution_options={"isolation_level": "SERIALIZABLE"})
    make(User, db)
    assert where_is(db) == (ROLE, tenant_of(db))


def serializable_and_raise(db: TenantSession) -> None:
    db.connection(execution_options={"isolation_level": "SERIALIZABLE"})
    db.execute(text("SELECT 1 / 0"))


def autocommit(_: TenantSession) -> None:
    with get_engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("SELECT 1"))


def half_read(db: TenantSession) -> None:
    numbers = text("SELECT generate_series(1, 1000)")
    with db.execute(numbers, execution_options={"yield_per": 10}) as found:
        next(found)


def half_iterated(db: TenantSession) -> None:
    made = make(Message, db)
    with closing(MessageRepository.iterate(db, made.conversation_id, batch_size=1)) as messages:
        next(messages)


def failing_copy(db: TenantSession) -> None:
    cursor = driver_of(db.connection()).cursor()
    with cursor.copy("COPY (SELECT 1 / (n - 500) FROM generate_series(1, 1000) n) TO STDOUT") as c:
        list(c)


def joined(db: TenantSession) -> None:
    with get_engine().connect() as connection, connection.begin():
        with TenantSession(connection, tenant_id=tenant_of(db)) as session:
            make(User, session)
        raise OopsError


def begun_only(db: TenantSession) -> None:
    db.begin()
    db.connection()


USES: list[Callable[[TenantSession], object]] = [
    lambda db: make(User, db), use_and_raise, begin_and_raise, begin_explicitly_and_raise,
    duplicate, duplicate_in_a_unit, bad_value_before_the_statement, lost, lost_while_idle,
    left_open, serializable, serializable_and_raise, autocommit, half_read, half_iterated,
    failing_copy, joined, begun_only, where_is, lambda db: db.execute(text("SELECT 1 / 0")),
    lambda db: db.execute(text("SELEC")), lambda db: UserRepository.get(db, uuid4()),
]  # fmt: skip


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_a_connection_carries_nothing_over(
    only: Driver, use: Callable[[TenantSession], object], db: TenantSession, tenant: str
) -> None:
    with (
        SessionLocal(tenant_id=tenant) as session,
        suppress(OopsError, DatabaseError, DBAPIError, psycopg.Error),
    ):
        use(session)
    raw = get_engine().raw_connection()
    driver = raw.driver_connection
    assert isinstance(driver, Driver)
    assert "lost" in use.__name__ or driver is only
    try:
        assert driver.tenant_id is None
        assert driver.take() == ((), None)
        assert driver.autocommit
        assert driver.info.transaction_status is TransactionStatus.IDLE
        found = driver.execute(f"{WHERE_AM_I}, current_setting('transaction_isolation')").fetchone()
        assert found is not None
        assert (found[0], found[1] or "", found[2]) == (driver.info.user, "", "read committed")
    finally:
        raw.close()
    with SessionLocal(tenant_id=f"{tenant}-next") as session:
        assert where_is(session) == (ROLE, f"{tenant}-next")
        session.rollback()
        assert UserRepository.count(session) == 0
        assert make(User, session).tenant_id == f"{tenant}-next"


def test_a_connection_killed_while_idle_costs_nothing_but_a_new_one(
    only: Driver, tenant: str
) -> None:
    with SessionLocal(tenant_id=tenant) as session:
        make(User, session)
        kill(only)
        assert UserRepository.count(session) == 1
        with pytest.raises(TransientError):
            lost(session)
        assert UserRepository.count(session) == 2


# What goes around the usual ways


def copied(db: TenantSession) -> Any:
    with driver_of(db.connection()).cursor().copy(f"COPY ({WHERE_AM_I}) TO STDOUT") as copy:
        (found,) = copy.rows()
        return found


def core_cursor(db: TenantSession) -> Any:
    raw = db.connection().connection.cursor()
    with closing(raw):
        raw.execute(WHERE_AM_I)
        return raw.fetchone()


PIECES: dict[str, Callable[[TenantSession], Any]] = {
    "text": where_is,
    "exec_driver_sql": lambda db: db.connection().exec_driver_sql(WHERE_AM_I).one(),
    "cursor": core_cursor,
    "driver": lambda db: driver_of(db.connection()).execute(WHERE_AM_I).fetchone(),
    "driver cursor": lambda db: driver_of(db.connection()).cursor().execute(WHERE_AM_I).fetchone(),
    "driver stream": lambda db: next(iter(driver_of(db.connection()).cursor().stream(WHERE_AM_I))),
    "copy": copied,
    "stream_results": lambda db: db.execute(
        text(WHERE_AM_I), execution_options={"stream_results": True}
    ).one(),
    "yield_per": lambda db: (
        db.execute(text(WHERE_AM_I), execution_options={"yield_per": 1}).partitions().__next__()[0]
    ),
    "begin_nested": lambda db: db.begin_nested() and where_is(db),
    "core": lambda db: db.connection().execute(text(WHERE_AM_I)).one(),
}


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("level", [None, "SERIALIZABLE", "REPEATABLE READ", "READ COMMITTED"])
def test_every_way_to_a_statement_is_in_the_tenant(
    db: TenantSession, piece: str, level: str | None
) -> None:
    options = {"isolation_level": level} if level else {}
    for _ in range(2):
        db.connection(execution_options=options)
        assert tuple(PIECES[piece](db)) == (ROLE, tenant_of(db))
        assert driver_of(db.connection()).info.transaction_status is TransactionStatus.INTRANS
        assert tuple(PIECES[piece](db)) == (ROLE, tenant_of(db))
        found = db.scalar(text("SHOW transaction_isolation"))
        assert found == (level or "READ COMMITTED").lower()
        db.commit()


INSERT = "INSERT INTO users (id) VALUES (gen_random_uuid())"
WRITES: dict[str, Callable[[TenantSession], object]] = {
    "text": lambda db: db.execute(text(INSERT)),
    "executemany": lambda db: db.connection().execute(
        insert(User.__table__),  # type: ignore[arg-type]
        [{"id": uuid4()}],
    ),
    "orm bulk": lambda db: db.execute(insert(User), [{"id": uuid4()}]),
    "exec_driver_sql": lambda db: db.connection().exec_driver_sql(INSERT),
    "exec_driver_sql many": lambda db: db.connection().exec_driver_sql(
        "INSERT INTO users (id) VALUES (%s)", [(uuid4(),), (uuid4(),)]
    ),
    "driver": lambda db: driver_of(db.connection()).execute(INSERT),
    "driver executemany": lambda db: (
        driver_of(db.connection())
        .cursor()
        .executemany("INSERT INTO users (id) VALUES (%s)", [[uuid4()]])
    ),
    "unit of work": lambda db: db.add(User()) or db.flush(),  # type: ignore[func-returns-value]
    "repository": UserRepository.create,
}


@pytest.mark.parametrize("write", WRITES)
def test_every_way_to_write_is_in_the_transaction(
    db: TenantSession, write: str, login: psycopg.Connection
) -> None:
    def count() -> int:
        query = "SELECT count(*) FROM users WHERE tenant_id = %s"
        return int((login.execute(query, [tenant_of(db)]).fetchone() or [0])[0])

    with suppress(OopsError), transaction(db):
        WRITES[write](db)
        raise OopsError
    assert count() == 0
    with transaction(db):
        WRITES[write](db)
        assert count() == 0
    assert count() > 0
    assert UserRepository.count(db) == count(), "and in the tenant"


def test_connections_in_autocommit_stay_in_the_login_role() -> None:
    with get_engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for _ in range(2):
            user, found = connection.execute(text(WHERE_AM_I)).one()
            assert (user == ROLE, found or "") == (False, "")
            driver = driver_of(connection)
            assert driver.info.transaction_status is TransactionStatus.IDLE


def test_sessions_of_a_tenant_refuse_autocommit(db: TenantSession) -> None:
    """From the second statement on they would work in the login role."""
    engine = get_engine().execution_options(isolation_level="AUTOCOMMIT")
    with TenantSession(engine, tenant_id=tenant_of(db)) as session:
        for call in (where_is, UserRepository.count, UserRepository.create):
            with pytest.raises(ConfigurationError, match="autocommit"):
                call(session)
            session.rollback()
    with pytest.raises(ConfigurationError, match="autocommit"):
        db.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
    db.rollback()
    assert where_is(db) == (ROLE, tenant_of(db))
    with TenantSession(engine, tenant_id=ALL_TENANTS) as across:
        assert where_is(across)[0] != ROLE


def test_a_connection_of_the_engine_is_in_the_default_tenant() -> None:
    with get_engine().connect() as connection:
        assert tuple(connection.execute(text(WHERE_AM_I)).one()) == (ROLE, "default")
    engine = get_engine().execution_options(tenant_id="another")
    with engine.connect() as connection:
        assert tuple(connection.execute(text(WHERE_AM_I)).one()) == (ROLE, "another")


# Sessions that join a transaction


@pytest.fixture
def outer(configured: None) -> Iterator[Connection]:
    with get_engine().connect() as connection, connection.begin() as begun:
        yield connection
        if begun.is_active:
            begun.rollback()


MODES = ["create_savepoint", "conditional_savepoint", "rollback_only"]


def join(outer: Connection, tenant: Tenant, mode: str = "create_savepoint") -> TenantSession:
    return TenantSession(outer, tenant_id=tenant, join_transaction_mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_joined_session_commits_nothing(
    outer: Connection, tenant: str, mode: str, login: psycopg.Connection, db: TenantSession
) -> None:
    with join(outer, tenant, mode) as session:
        assert where_is(session) == (ROLE, tenant)
        session.rollback() if mode == "create_savepoint" else session.commit()
        user = make(User, session)
        conversation = make(Conversation, session)
        MessageRepository.append(session, conversation.id, role="user", content="x")
        MessageRepository.append_many(
            session, conversation.id, [{"role": "user", "content": "y"}] * 2
        )
        UserRepository.update(session, user.id, username="x")
        assert UserRepository.get_or_create(session, user.email) is user
        with transaction(session):
            make(User, session)
        session.commit()
        assert UserRepository.count(session) == 2
        assert len(MessageRepository.history(session, conversation.id)) == 3
    assert outer.in_transaction()
    assert stored(login, user) is None
    assert outer.scalar(text("SELECT count(*) FROM users")) == 2, "the outer one sees it"
    outer.rollback()
    assert UserRepository.count(db) == 0


def test_what_joined_sessions_did_is_committed_by_the_outer_transaction(
    outer: Connection, tenant: str, login: psycopg.Connection
) -> None:
    with join(outer, tenant) as session:
        user = make(User, session)
    assert stored(login, user) is None
    outer.commit()
    assert stored(login, user) is not None


@pytest.mark.parametrize("mode", MODES)
def test_an_error_in_a_joined_session_leaves_the_outer_transaction_usable(
    outer: Connection, tenant: str, mode: str
) -> None:
    with join(outer, tenant, mode) as session:
        email = make(User, session).email
        for _ in range(2):
            with pytest.raises(AlreadyExistsError):
                UserRepository.create(session, email=email)
            assert not session.in_transaction()
            if mode == "create_savepoint":
                with pytest.raises(AlreadyExistsError):
                    duplicate_in_a_unit(session)
        assert UserRepository.count(session) == 1
    assert outer.scalar(text("SELECT count(*) FROM users")) == 1


def test_sessions_of_several_tenants_join_one_after_another(
    outer: Connection, tenant: str, login: psycopg.Connection
) -> None:
    names = [f"{tenant}-{n}" for n in range(3)]
    for number, name in enumerate(names * 3):
        with join(outer, name) as session:
            assert UserRepository.count(session) == number // 3
            made = make(User, session)
            assert made.tenant_id == name
            assert where_is(session) == (ROLE, name)
            session.add(User())
            session.flush()
            session.rollback()
            assert where_is(session) == (ROLE, name)
            with suppress(OopsError):
                use_and_raise(session)
            session.connection()
            session.rollback()
            assert UserRepository.count(session) == number // 3 + 1
    outer.commit()
    found = login.execute(
        "SELECT tenant_id, count(*) FROM users WHERE tenant_id = ANY(%s) GROUP BY 1", [names]
    ).fetchall()
    assert dict(found) == dict.fromkeys(names, 3)


def test_sessions_of_several_tenants_take_turns(outer: Connection, tenant: str) -> None:
    """As the sessions of an application under test do, all joined to the test's transaction."""
    with (
        join(outer, f"{tenant}-a") as a,
        join(outer, f"{tenant}-b") as b,
        join(outer, ALL_TENANTS) as across,
    ):
        for number in range(1, 4):
            for session in (a, b):
                made = make(User, session)
                assert made.tenant_id == tenant_of(session)
                with transaction(session):
                    make(Message, session)
                assert UserRepository.count(session) == number
        query = select(func.count()).where(User.tenant_id.like(f"{tenant}-%"))
        assert across.scalar(query) == 6
        assert where_is(across)[0] != ROLE
        across.rollback()
        assert UserRepository.count(a) == 3


def test_sessions_of_several_tenants_take_turns_within_their_transactions(
    outer: Connection, tenant: str
) -> None:
    with join(outer, f"{tenant}-a") as a, join(outer, f"{tenant}-b") as b:
        for number in range(1, 4):
            for session in (a, b):
                name = tenant_of(session)
                session.add(User(username="added"))
                session.flush()
                session.execute(insert(User), [{"username": "inserted"}])
                session.connection().execute(text(INSERT))
                with session.begin_nested():
                    session.add(User())
                assert where_is(session) == (ROLE, name)
                every = text("SELECT tenant_id FROM users")
                assert list(session.scalars(every)) == [name] * 4 * number
                assert UserRepository.count(session) == 4 * number
        b.commit()
        a.commit()
        assert UserRepository.count(a) == UserRepository.count(b) == 12


def test_a_joined_session_in_a_transaction_of_its_own(tenant: str, db: TenantSession) -> None:
    """Bound to a connection on which nothing has begun, it begins and commits."""
    with get_engine().connect() as connection:
        with TenantSession(connection, tenant_id=tenant) as session:
            user = make(User, session)
            assert UserRepository.get(session, user.id) is user
            with transaction(session):
                make(User, session)
            with pytest.raises(AlreadyExistsError):
                duplicate_in_a_unit(session)
        assert not connection.in_transaction()
    assert UserRepository.count(db) == 2


def test_a_joined_session_on_a_serializable_connection(tenant: str, db: TenantSession) -> None:
    engine = get_engine().execution_options(isolation_level="SERIALIZABLE")
    with engine.connect() as connection, connection.begin() as begun:
        with join(connection, tenant) as session:
            user = make(User, session)
            assert where_is(session) == (ROLE, tenant)
            assert session.scalar(text("SHOW transaction_isolation")) == "serializable"
            with pytest.raises(AlreadyExistsError):
                UserRepository.create(session, email=user.email)
        with join(connection, f"{tenant}-b") as session:
            assert UserRepository.count(session) == 0
        begun.rollback()
    assert UserRepository.count(db) == 0


def test_serializable_engines_keep_tenant_and_role(db: TenantSession, other: TenantSession) -> None:
    make(User, other)
    engine = get_engine().execution_options(isolation_level="SERIALIZABLE")
    with TenantSession(engine, tenant_id=tenant_of(db)) as session:
        user = make(User, session)
        assert UserRepository.list(session).items == [user]
        assert where_is(session) == (ROLE, tenant_of(db))
        session.rollback()
        with pytest.raises(AlreadyExistsError):
            UserRepository.create(session, email=user.email)
        with transaction(session):
            make(User, session)
            with pytest.raises(AlreadyExistsError):
                UserRepository.create(session, email=user.email)
            make(User, session)
            assert session.scalar(text("SHOW transaction_isolation")) == "serializable"
    assert UserRepository.count(db) == 3
    with get_engine().connect() as connection:
        assert connection.scalar(text("SHOW transaction_isolation")) == "read committed"
