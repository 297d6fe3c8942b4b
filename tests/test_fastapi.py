"""The example service, behind a real server and over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated

import httpx
import pytest
import uvicorn
from fastapi import Depends, FastAPI, HTTPException
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import QueuePool, text

import database
from database import (
    ConversationRepository,
    MessageRepository,
    NotFoundError,
    SchemaOutdatedError,
    TenantSession,
    UserRepository,
    get_db,
    get_db_session,
    transaction,
)
from examples import fastapi_app

REQUESTS = 50
Db = Annotated[TenantSession, Depends(get_db)]


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an application on a free port; gives its address."""
    config = uvicorn.Config(app, port=0, ws="none", log_config=None, lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(5)
        server.force_exit = True  # when a failed test has left requests behind
        thread.join()


@pytest.fixture
def model() -> Iterator[Callable[[float], None]]:
    """Set how long the model thinks; at first not at all."""

    def think(seconds: float) -> None:
        echo = partial(fastapi_app.echo, delay=seconds)
        fastapi_app.app.dependency_overrides[fastapi_app.get_model] = lambda: echo

    think(0)
    yield think
    fastapi_app.app.dependency_overrides.clear()


@pytest.fixture(scope="module")
def example(worker_url: str) -> Iterator[str]:
    """The example, served to all tests; each request asks for the engine anew."""
    database.configure(url=worker_url)
    with served(fastapi_app.app) as address:
        yield address


@pytest.fixture
def client(example: str, model: object, tenant: str) -> Iterator[httpx.Client]:
    """A client of the example, in the test's tenant."""
    headers = {"X-Tenant-Id": tenant}
    with httpx.Client(base_url=example, headers=headers, trust_env=False, timeout=30) as client:
        yield client


@pytest.fixture
def thread_id(client: httpx.Client) -> str:
    """A conversation without messages."""
    made = client.post("/conversations", json={"user_email": "a@example.com"})
    return str(made.json()["thread_id"])


def checked_out() -> int:
    pool = database.get_engine().pool
    assert isinstance(pool, QueuePool)
    return pool.checkedout()


def wait_until_returned() -> None:
    """FastAPI ends a request's dependencies only after it has sent the response."""
    deadline = time.monotonic() + 5
    while checked_out():
        assert time.monotonic() < deadline, "a connection was never returned"
        time.sleep(0.005)


def test_create_and_get_a_conversation(client: httpx.Client, db: TenantSession) -> None:
    body = {"user_email": "Ada@Example.com", "thread_id": "t-1", "title": "Engines"}
    made = client.post("/conversations", json=body)
    assert made.status_code == 201
    assert made.json()["thread_id"] == "t-1"
    assert made.json()["title"] == "Engines"
    assert made.json()["user_email"] == "ada@example.com"

    assert client.get("/conversations/t-1").json() == made.json()
    stored = ConversationRepository.get_by_thread_id(db, "t-1")
    assert stored is not None
    assert str(stored.id) == made.json()["id"]


def test_a_thread_id_is_made_if_none_is_given(client: httpx.Client, thread_id: str) -> None:
    found = client.get(f"/conversations/{thread_id}")
    assert found.status_code == 200
    assert found.json()["id"] == thread_id


def test_list_conversations_page_by_page(client: httpx.Client) -> None:
    for n in range(5):
        body = {"user_email": "a@example.com", "thread_id": f"t-{n}"}
        client.post("/conversations", json=body)
    client.post("/conversations", json={"user_email": "b@example.com", "thread_id": "other"})

    pages = []
    cursor: dict[str, str] = {}
    while True:
        parameters = {"user_email": "a@example.com", "limit": "2", **cursor}
        answer = client.get("/conversations", params=parameters)
        assert answer.status_code == 200
        pages.append([item["thread_id"] for item in answer.json()["items"]])
        if answer.json()["next_cursor"] is None:
            break
        cursor = {"cursor": answer.json()["next_cursor"]}
    assert pages == [["t-4", "t-3"], ["t-2", "t-1"], ["t-0"]]


def test_messages_are_appended_and_read_back(client: httpx.Client, thread_id: str) -> None:
    path = f"/conversations/{thread_id}/messages"
    for n in range(1, 6):
        role = "user" if n % 2 else "assistant"
        made = client.post(path, json={"role": role, "content": f"message {n}"})
        assert (made.status_code, made.json()["position"]) == (201, n)

    def contents(**parameters: int) -> list[str]:
        answer = client.get(path, params=parameters)
        assert answer.status_code == 200
        return [message["content"] for message in answer.json()]

    assert contents() == [f"message {n}" for n in range(1, 6)]
    assert contents(limit=2) == ["message 4", "message 5"]
    assert contents(limit=2, before=4) == ["message 2", "message 3"]
    assert client.get(f"/conversations/{thread_id}").json()["last_message"] == "message 5"


def test_an_answer_is_written_behind_its_question(client: httpx.Client, thread_id: str) -> None:
    path = f"/conversations/{thread_id}"
    answer = client.post(f"{path}/answers", json={"content": "hello"})
    assert answer.status_code == 201
    assert (answer.json()["role"], answer.json()["content"]) == ("assistant", "You said: hello")
    history = client.get(f"{path}/messages").json()
    assert [(m["role"], m["content"]) for m in history] == [
        ("user", "hello"),
        ("assistant", "You said: hello"),
    ]


@pytest.mark.parametrize(
    ("request_line", "body", "answer"),
    [
        ("POST /conversations", {"user_email": "no address"}, "422 email: "),
        ("POST /conversations", {"user_email": "a@b.c", "thread_id": ""}, "422 thread_id: "),
        ("POST /conversations", {"user_email": "a@b.c", "title": "x" * 501}, "422 title: "),
        ("POST /conversations", {"user_email": "a@b.c", "thread_id": "{}"}, "409 thread_id: "),
        ("POST /conversations", {}, "422"),
        ("GET /conversations", None, "422"),
        ("GET /conversations?user_email=nobody@b.c", None, "404 user_email: no such user"),
        ("GET /conversations?user_email=a@example.com&limit=0", None, "422 limit: must be"),
        ("GET /conversations?user_email=a@example.com&limit=x", None, "422"),
        ("GET /conversations?user_email=a@example.com&cursor=x", None, "422 cursor: must be"),
        ("GET /conversations/none", None, "404 thread_id: no such conversation"),
        ("GET /conversations/none/messages", None, "404 thread_id: no such conversation"),
        ("POST /conversations/none/messages", {"content": "x"}, "404 thread_id: "),
        ("POST /conversations/none/answers", {"content": "x"}, "404 thread_id: "),
        ("GET /conversations/{}/messages?limit=0", None, "422 limit: must be"),
        ("GET /conversations/{}/messages?before=-1", None, "422 before: must be"),
        ("POST /conversations/{}/messages", {"content": "x", "role": "king"}, "422"),
        ("POST /conversations/{}/messages", {"role": "user"}, "422"),
    ],
)
def test_a_bad_request_gets_a_status_and_a_reason(
    client: httpx.Client,
    thread_id: str,
    request_line: str,
    body: dict[str, str] | None,
    answer: str,
) -> None:
    method, path = request_line.format(thread_id).split(" ")
    sent = body and {name: value.format(thread_id) for name, value in body.items()}
    status, _, detail = answer.partition(" ")
    got = client.request(method, path, json=sent)
    assert got.status_code == int(status)
    if detail:
        assert got.json()["detail"].startswith(detail)
    else:  # FastAPI's own check
        assert isinstance(got.json()["detail"], list)
    wait_until_returned()


def test_a_refused_conversation_leaves_no_user(
    client: httpx.Client, thread_id: str, db: TenantSession
) -> None:
    body = {"user_email": "new@example.com", "thread_id": thread_id}
    assert client.post("/conversations", json=body).status_code == 409
    assert UserRepository.get_by_email(db, "new@example.com") is None


def test_each_request_works_in_its_tenant(client: httpx.Client, thread_id: str) -> None:
    path = f"/conversations/{thread_id}"
    assert client.get(path).status_code == 200
    assert client.get(path, headers={"X-Tenant-Id": "another"}).status_code == 404
    assert client.get(path, headers={"X-Tenant-Id": ""}).status_code == 422
    assert client.get(path, headers={"X-Tenant-Id": "a'; --"}).status_code == 422
    assert client.get(path).status_code == 200


def test_a_busy_database_is_503(worker_url: str, client: httpx.Client, thread_id: str) -> None:
    database.configure(url=worker_url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    with get_db_session() as db:
        UserRepository.count(db)
        with transaction(db):
            UserRepository.count(db)
            answer = client.get(f"/conversations/{thread_id}")
    assert answer.status_code == 503
    assert "pool_timeout" in answer.json()["detail"]
    assert client.get(f"/conversations/{thread_id}").status_code == 200


def test_every_error_of_the_table_becomes_its_status(client: httpx.Client) -> None:
    assert {kind.__name__: status for kind, status in fastapi_app.STATUS.items()} == {
        "InvalidValueError": 422,
        "NotFoundError": 404,
        "AlreadyExistsError": 409,
        "TransientError": 503,
    }


def test_a_service_brings_an_empty_database_up_to_date(empty_url: str) -> None:
    database.configure(url=empty_url)
    assert database.check_connection()["status"] == "unhealthy"
    with served(fastapi_app.app) as address:
        answer = httpx.get(f"{address}/conversations/none", trust_env=False)
        assert answer.status_code == 404
    assert database.check_connection()["status"] == "healthy"


def test_in_production_a_service_refuses_an_outdated_schema(empty_url: str) -> None:
    database.configure(url=empty_url, environment="production")

    async def start() -> None:
        async with fastapi_app.lifespan(fastapi_app.app):
            pass

    with pytest.raises(SchemaOutdatedError):
        asyncio.run(start())
    assert database.check_connection()["revision"] is None


# The failure that users of pooled sessions report: connections held while a model thinks.


async def post_at_once(address: str, paths: list[str], body: dict[str, str]) -> list[int]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=address, limits=limits, timeout=10, trust_env=False
    ) as client:
        answers = await asyncio.gather(*(client.post(path, json=body) for path in paths))
    return [answer.status_code for answer in answers]


def conversations(tenant: str) -> list[str]:
    with get_db_session(tenant_id=tenant) as db:
        items = [{"thread_id": f"{tenant}-{n}"} for n in range(REQUESTS)]
        return [str(made.thread_id) for made in ConversationRepository.create_many(db, items)]


def assert_answered(tenant: str, threads: list[str]) -> None:
    with get_db_session(tenant_id=tenant) as db:
        for thread in threads:
            roles = [message.role for message in MessageRepository.history(db, thread)]
            assert roles == ["user", "assistant"]


def test_fifty_models_think_on_one_connection(
    worker_url: str, model: Callable[[float], None], tenant: str
) -> None:
    model(1)
    database.configure(
        url=worker_url, pool_size=1, max_overflow=0, pool_timeout=3, tenant_id=tenant
    )
    with served(fastapi_app.app) as address:
        # The pool is closed when the service ends, and opened anew by whoever comes next.
        threads = conversations(tenant)
        paths = [f"/conversations/{thread}/answers" for thread in threads]
        begin = time.monotonic()
        statuses = asyncio.run(post_at_once(address, paths, {"content": "hi"}))
        took = time.monotonic() - begin
        assert statuses == [201] * REQUESTS
        assert 1 <= took < 5
        assert checked_out() == 0
    assert_answered(tenant, threads)


# Endpoints that users write in their own way.


def make_app() -> FastAPI:
    app = FastAPI()
    app.post("/sync/{thread_id}")(answer_in_thread)
    app.post("/async/{thread_id}")(answer_in_loop)
    app.post("/fail/{how}")(fail)
    app.post("/async-fail/{how}")(fail_in_loop)
    return app


def answer_in_thread(thread_id: str, db: Db) -> int:
    MessageRepository.append(db, thread_id, role="user", content="hi")
    history = MessageRepository.history(db, thread_id)
    time.sleep(1)
    MessageRepository.append(db, thread_id, role="assistant", content="hello")
    return len(history)


async def answer_in_loop(thread_id: str, db: Db) -> int:
    await run_in_threadpool(MessageRepository.append, db, thread_id, role="user", content="hi")
    history = await run_in_threadpool(MessageRepository.history, db, thread_id)
    await asyncio.sleep(1)
    await run_in_threadpool(
        MessageRepository.append, db, thread_id, role="assistant", content="hello"
    )
    return len(history)


def break_off(db: TenantSession, how: str) -> None:
    """Fail in the middle of things."""
    UserRepository.create(db, email=f"{how}@example.com")
    if how == "in-a-read":
        db.execute(text("SELECT 1"))
        assert checked_out() == 1
        raise RuntimeError(how)
    if how == "in-sql":
        db.execute(text("SELECT 1 / 0"))
    if how == "with-a-status":
        db.execute(text("SELECT 1"))
        raise HTTPException(418)
    with transaction(db):
        UserRepository.create(db, email=f"{how}-2@example.com")
        assert checked_out() == 1
        raise NotFoundError(how)


def fail(how: str, db: Db) -> None:
    break_off(db, how)


async def fail_in_loop(how: str, db: Db) -> None:
    await run_in_threadpool(break_off, db, how)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_fifty_endpoints_wait_on_one_connection(worker_url: str, tenant: str, kind: str) -> None:
    database.configure(
        url=worker_url, pool_size=1, max_overflow=0, pool_timeout=3, tenant_id=tenant
    )
    threads = conversations(tenant)
    with served(make_app()) as address:
        begin = time.monotonic()
        paths = [f"/{kind}/{thread}" for thread in threads]
        statuses = asyncio.run(post_at_once(address, paths, {}))
        took = time.monotonic() - begin
        assert statuses == [200] * REQUESTS
        assert 1 <= took < 5
        wait_until_returned()
    assert_answered(tenant, threads)


@pytest.mark.parametrize("kind", ["fail", "async-fail"])
@pytest.mark.parametrize(
    ("how", "status"),
    [("in-a-read", 500), ("in-sql", 500), ("with-a-status", 418), ("in-a-unit", 500)],
)
def test_a_failed_endpoint_returns_its_connection(
    worker_url: str, tenant: str, kind: str, how: str, status: int
) -> None:
    database.configure(url=worker_url, pool_size=1, max_overflow=0, tenant_id=tenant)
    with served(make_app()) as address:
        for _ in range(2):  # a lost connection would let the second one wait
            answer = httpx.post(f"{address}/{kind}/{how}", trust_env=False)
            assert answer.status_code == status
            wait_until_returned()
            with get_db_session() as db:
                users = UserRepository.list(db)
                assert [user.email for user in users] == [f"{how}@example.com"]
                assert UserRepository.delete(db, users.items[0].id)


def test_get_db_yields_one_session_and_closes_it() -> None:
    steps = get_db()
    db = next(steps)
    assert isinstance(db, TenantSession)
    db.execute(text("SELECT 1"))
    assert checked_out() == 1
    assert next(steps, None) is None
    assert checked_out() == 0


def test_get_db_closes_when_the_endpoint_raises() -> None:
    def endpoint() -> None:
        with contextlib.contextmanager(get_db)() as db:
            db.execute(text("SELECT 1"))
            assert checked_out() == 1
            raise RuntimeError("endpoint")

    with pytest.raises(RuntimeError, match="endpoint"):
        endpoint()
    assert checked_out() == 0
