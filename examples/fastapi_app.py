"""A chat service: `uvicorn examples.fastapi_app:app`, then open /docs.

A sync endpoint is FastAPI's simplest home for this synchronous library: it runs in a threadpool. An
async endpoint hands each database call to that threadpool, for in the event loop it would stop all
other requests. A session may move between threads, as long as one at a time uses it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from database import (
    AlreadyExistsError,
    Conversation,
    ConversationRepository,
    DatabaseError,
    InvalidValueError,
    Message,
    MessageRepository,
    NotFoundError,
    Role,
    TenantSession,
    TransientError,
    UserRepository,
    bind_tenant,
    check_schema,
    close_db,
    get_db,
    get_settings,
    init_db,
    transaction,
)

Model = Callable[[list[Message]], Awaitable[str]]
STATUS: dict[type[DatabaseError], int] = {
    InvalidValueError: 422,
    NotFoundError: 404,
    AlreadyExistsError: 409,
    TransientError: 503,
}


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Make sure of the schema before the first request; close the pool after the last."""
    # In production the deployment migrates; a service only makes sure that it has done so.
    prepare = check_schema if get_settings().environment == "production" else init_db
    await run_in_threadpool(prepare)
    yield
    close_db()


app = FastAPI(title="Chat", lifespan=lifespan)


def on_error(_: Request, error: Exception) -> JSONResponse:
    """Answer with the error's text, which never holds a row's contents."""
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    return JSONResponse({"detail": str(error)}, status)


for kind in STATUS:
    app.add_exception_handler(kind, on_error)


def get_tenant_db(
    db: Annotated[TenantSession, Depends(get_db)],
    x_tenant_id: Annotated[str | None, Header()] = None,
) -> TenantSession:
    """Return the request's session, bound to its tenant.

    A real service takes the tenant from the verified login, never from what a client just claims.
    """
    if x_tenant_id is not None:
        bind_tenant(db, x_tenant_id)
    return db


async def echo(history: list[Message], *, delay: float = 1) -> str:
    """Stand in for a model that thinks for `delay` seconds."""
    await asyncio.sleep(delay)
    return f"You said: {history[-1].content}"


def get_model() -> Model:
    """Return what answers; `app.dependency_overrides[get_model]` puts another in its place."""
    return echo


Db = Annotated[TenantSession, Depends(get_tenant_db)]


class NewConversation(BaseModel):
    """The body of POST /conversations."""

    user_email: str
    thread_id: str | None = None
    title: str | None = None


class NewMessage(BaseModel):
    """The body of POST .../messages and .../answers."""

    content: str
    role: Role = Role.USER


@app.post("/conversations", status_code=201)
def create_conversation(body: NewConversation, db: Db) -> dict[str, Any]:
    """Begin a conversation; the user is made if need be, in the same transaction."""
    with transaction(db):
        user = UserRepository.get_or_create(db, body.user_email)
        return ConversationRepository.create(
            db, body.thread_id, title=body.title, user_id=user.id
        ).to_dict()


@app.get("/conversations")
def list_conversations(
    db: Db, user_email: str, limit: int = 20, cursor: str | None = None
) -> dict[str, Any]:
    """List a user's conversations, newest activity first."""
    user = UserRepository.get_by_email(db, user_email)
    if user is None:
        raise NotFoundError("user_email: no such user")
    page = ConversationRepository.list_by_user(db, user.id, limit=limit, cursor=cursor)
    return {"items": [item.to_dict() for item in page], "next_cursor": page.next_cursor}


@app.get("/conversations/{thread_id}")
def get_conversation(thread_id: str, db: Db) -> dict[str, Any]:
    """Return a conversation."""
    return require(db, thread_id).to_dict()


@app.post("/conversations/{thread_id}/messages", status_code=201)
def add_message(thread_id: str, body: NewMessage, db: Db) -> dict[str, Any]:
    """Append a message."""
    conversation = require(db, thread_id)
    return MessageRepository.append(
        db, conversation.id, role=body.role, content=body.content
    ).to_dict()


@app.get("/conversations/{thread_id}/messages")
async def list_messages(
    thread_id: str, db: Db, limit: int = 50, before: int | None = None
) -> list[dict[str, Any]]:
    """Return the newest messages before a position, oldest first: async, for comparison."""

    def read() -> list[Message]:
        conversation = require(db, thread_id)
        return MessageRepository.history(db, conversation.id, limit=limit, before=before)

    return [message.to_dict() for message in await run_in_threadpool(read)]


@app.post("/conversations/{thread_id}/answers", status_code=201)
async def answer(
    thread_id: str, body: NewMessage, db: Db, model: Annotated[Model, Depends(get_model)]
) -> dict[str, Any]:
    """Append a message, and what the model answers; no connection is held while it thinks."""

    def ask() -> tuple[Conversation, list[Message]]:
        conversation = require(db, thread_id)
        MessageRepository.append(db, conversation.id, role=body.role, content=body.content)
        return conversation, MessageRepository.history(db, conversation.id, limit=50)

    conversation, history = await run_in_threadpool(ask)
    content = await model(history)
    message = await run_in_threadpool(
        MessageRepository.append, db, conversation.id, role=Role.ASSISTANT, content=content
    )
    return message.to_dict()


def require(db: TenantSession, thread_id: str) -> Conversation:
    """Return the conversation of a thread; the error becomes a 404."""
    conversation = ConversationRepository.get_by_thread_id(db, thread_id)
    if conversation is None:
        raise NotFoundError("thread_id: no such conversation")
    return conversation
