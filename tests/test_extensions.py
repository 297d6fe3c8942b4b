"""Extensions that the schema needs: looked at before a migration changes anything."""

from __future__ import annotations

import subprocess

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection

import database
from database import ConfigurationError, extensions, get_engine
from database.extensions import NEEDED, check_extensions, installed_extensions, lacking
from database.schema import alembic_config, current_revision, downgrade, upgrade
from tests.cli import invoke
from tests.conftest import settings_for
from tests.running import ROOT, execute
from tests.test_migrations import REVISIONS, alembic, revision_of

OLD = "UPDATE pg_extension SET extversion = '0.7.4' WHERE extname = 'vector'"


@pytest.fixture
def old_url(empty_url: str) -> str:
    """A database with a pgvector that is too old."""
    execute(empty_url, "CREATE EXTENSION vector")
    execute(empty_url, OLD)
    return empty_url


def connected(url: str) -> Connection:
    database.configure(url=url)
    return get_engine().connect().execution_options(isolation_level="AUTOCOMMIT")


def offered(connection: Connection) -> str:
    found = connection.exec_driver_sql(
        "SELECT default_version FROM pg_available_extensions WHERE name = 'vector'"
    )
    return str(found.scalar_one())


def test_a_sound_database(fresh_url: str) -> None:
    with connected(fresh_url) as connection:
        assert list(lacking(connection)) == []
        assert set(installed_extensions(connection)) >= set(NEEDED)
        check_extensions(connection)


def test_what_migrations_will_create(empty_url: str) -> None:
    with connected(empty_url) as connection:
        check_extensions(connection)
        (wrong,) = lacking(connection, {"vector": (0, 8)})
        assert wrong == (
            "the extension vector 0.8 or newer is needed, this database has none and the server"
            f" offers {offered(connection)}: run CREATE EXTENSION vector"
        )


def test_an_old_one(old_url: str) -> None:
    with connected(old_url) as connection:
        assert list(lacking(connection, {"vector": (0, 7)})) == []
        with pytest.raises(ConfigurationError) as caught:
            check_extensions(connection)
        assert str(caught.value) == (
            "the extension vector 0.8 or newer is needed, this database has 0.7.4 and the server"
            f" offers {offered(connection)}: run ALTER EXTENSION vector UPDATE"
        )


@pytest.mark.parametrize("may_create", [True, False])
def test_one_that_the_server_cannot_give(fresh_url: str, *, may_create: bool) -> None:
    with connected(fresh_url) as connection:
        newest = offered(connection)
        needed = {"vector": (99,), "nothing": (1, 2), "btree_gin": ()}
        assert list(lacking(connection, needed, may_create=may_create)) == [
            (
                f"the extension vector 99 or newer is needed, this database has {newest} and"
                f" the server offers {newest}: install it on the server, then run"
                " ALTER EXTENSION vector UPDATE"
            ),
            (
                "the extension nothing 1.2 or newer is needed, this database has none and the"
                " server offers none: install it on the server, then run CREATE EXTENSION nothing"
            ),
        ]


def test_one_that_is_too_old_to_be_created(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extensions.NEEDED, "vector", (99,))
    with pytest.raises(ConfigurationError, match=r"vector 99 or newer.*install it on the server"):
        upgrade(settings=settings_for(empty_url))
    assert revision_of(empty_url) is None


def test_an_upgrade_changes_nothing(old_url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"vector 0\.8 or newer is needed"):
        upgrade(settings=settings_for(old_url))
    with connected(old_url) as connection:
        assert current_revision(connection) is None
    with pytest.raises(subprocess.CalledProcessError) as caught:
        alembic(old_url, "upgrade", "head")
    assert "ConfigurationError: the extension vector 0.8 or newer" in caught.value.stderr
    with pytest.raises(ConfigurationError, match=r"vector 0\.8 or newer is needed"):
        command.upgrade(Config(ROOT / "alembic.ini"), "head")
    result = invoke("upgrade", status=1)
    assert "run ALTER EXTENSION vector UPDATE" in result.stderr
    assert revision_of(old_url) is None
    execute(old_url, "DROP EXTENSION vector")
    upgrade(settings=settings_for(old_url))
    assert revision_of(old_url) == REVISIONS[-1]


def test_the_way_back_is_open(empty_url: str) -> None:
    upgrade(REVISIONS[0], settings=settings_for(empty_url))
    execute(empty_url, OLD)
    command.current(alembic_config(settings_for(empty_url)))
    alembic(empty_url, "current")
    downgrade("base", settings=settings_for(empty_url))
    assert revision_of(empty_url) is None


def test_the_doctor_says_so(old_url: str) -> None:
    database.configure(url=old_url)
    result = invoke("doctor", status=1)
    assert "this database has 0.7.4" in result.stdout
