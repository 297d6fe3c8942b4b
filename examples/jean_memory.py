"""A memory service: `python examples/jean_memory.py`.

People log in with Google; what an assistant should remember of them is stored as contexts, and
found again by words. An application can copy `login`, `authenticated` and `Memory`; `main` shows
them with two tenants. It runs on the database that DATABASE_URL names, or else on an embedded
PostgreSQL that it starts.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from database import (
    ApiKeyRepository,
    AuthenticationError,
    Context,
    ContextRepository,
    DatabaseError,
    SearchPage,
    Stored,
    TenantSession,
    User,
    UserRepository,
    get_db_session,
    init_db,
    transaction,
)

KEYS_LAST = timedelta(days=90)


def login(tenant_id: str, google_id: str, email: str, *, device: str = "browser") -> str:
    """Return an API key for whom Google has just vouched for; the user is made if need be.

    Only a key's hash is stored, so a device gets a new key in place of the one it had.
    """
    with get_db_session(tenant_id=tenant_id) as db, transaction(db):
        user = UserRepository.get_or_create_by_identity(db, "google", google_id, email=email)
        for old in ApiKeyRepository.list(db, user_id=user.id, name=device):
            ApiKeyRepository.delete(db, old.id)
        expiry = datetime.now(UTC) + KEYS_LAST
        return ApiKeyRepository.create(db, user.id, name=device, expires_at=expiry).secret


@contextmanager
def authenticated(api_key: str) -> Iterator[Memory]:
    """Give a request the memory of the key's holder, or raise AuthenticationError."""
    with get_db_session() as db:
        user = ApiKeyRepository.authenticate(db, api_key)  # binds the session to the key's tenant
        yield Memory(db, user)


@dataclass(frozen=True)
class Memory:
    """What is remembered of one user, for the length of a request."""

    db: TenantSession
    user: User

    def store_context(
        self,
        context_type: str,
        content: Any,
        source_identifier: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Context:
        """Store a context, in the place of an older one of the same source."""
        return ContextRepository.store(
            self.db,
            self.user.id,
            context_type,
            content,
            source_identifier=source_identifier,
            metadata=metadata,
        )

    def store_github_context(self, repository: str, commits: Iterable[Mapping[str, Any]]) -> Stored:
        """Store a repository's commits, all or none; those known by their sha are replaced."""
        contexts = (
            {
                "context_type": "github",
                "content": commit,
                "source_identifier": commit["sha"],
                "metadata": {"repository": repository},
            }
            for commit in commits
        )
        return ContextRepository.store_many(self.db, self.user.id, contexts)

    def get_context(self, context_type: str, source_identifier: str | None = None) -> Any:
        """Return the content of a source, or what was stored last of a type, or None."""
        found = ContextRepository.get(self.db, self.user.id, context_type, source_identifier)
        return None if found is None else found.content

    def get_context_by_id(self, context_id: str) -> Context | None:
        """Return a context of the user's; None for everybody else's."""
        return ContextRepository.get_by_id(self.db, context_id, user_id=self.user.id)

    def get_all_context_by_type(self, context_type: str) -> Iterator[Context]:
        """Yield the contexts of a type, last stored first, page by page."""
        cursor = None
        while True:
            page = ContextRepository.list(
                self.db, user_id=self.user.id, context_type=context_type, cursor=cursor
            )
            yield from page
            cursor = page.next_cursor
            if cursor is None:
                return

    def search_context(self, query: str | None, **options: Any) -> SearchPage[Context]:
        """Search the user's contexts; the options are those of `ContextRepository.search`."""
        return ContextRepository.search(self.db, self.user.id, query, **options)

    def delete_context_by_id(self, context_id: str) -> bool:
        """Delete a context of the user's; tell whether there was one."""
        return ContextRepository.delete(self.db, context_id, user_id=self.user.id)

    def delete_context_by_type(self, context_type: str) -> int:
        """Delete the user's contexts of a type; return how many."""
        return ContextRepository.delete_by_type(self.db, self.user.id, context_type)

    def get_user_settings(self) -> dict[str, Any]:
        """Return the user's settings."""
        return UserRepository.get_settings(self.db, self.user.id)

    def update_user_settings(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Merge changes into the settings; None deletes a key."""
        return UserRepository.update_settings(self.db, self.user.id, changes)

    def export_user_data(self) -> Iterator[str]:
        """Yield all of the user's data as JSON lines: a file, or a streamed response."""
        return UserRepository.export(self.db, self.user.id)

    def delete_user_data(self) -> dict[str, int]:
        """Delete the user with all data, the key of this request too; return how many rows."""
        return UserRepository.erase(self.db, self.user.id)


NOTES = {
    "engine": "The analytical engine weaves algebraic patterns, as the loom weaves flowers.",
    "numbers": "Bernoulli numbers: do the eighth by hand, to have something to compare.",
    "seoul": "서울에서 7월 3일에 분석 엔진 강연이 있다.",
}
COMMITS = [
    {"sha": "9fceb02", "message": "Add a loop over the Bernoulli numbers", "additions": 212},
    {"sha": "1b2e1d6", "message": "Fix the sign of the eighth number", "additions": 1},
    {"sha": "c5b97d5", "message": "Explain how the engine repeats operations", "additions": 88},
]
TENANTS = ("jean-london", "jean-turin")
EMAIL = "ada@example.com"

console = Console()


def show(memory: Memory, title: str, query: str | None, **options: Any) -> None:
    """Print what a search finds."""
    page = memory.search_context(query, highlight=("»", "«"), **options)
    table = Table("Type", "Source", "Found", title=title, title_justify="left")
    for context, snippet in zip(page, page.snippets, strict=True):
        table.add_row(context.context_type, context.source_identifier, Text(snippet))
    console.print(table)


def main() -> None:
    """Two tenants know the same person: what the one remembers, the other never sees."""
    init_db()
    london, turin = (login(tenant, "115292150460684697600", EMAIL) for tenant in TENANTS)

    console.rule("London")
    with authenticated(london) as memory:
        for source, note in NOTES.items():
            stored = memory.store_context("note", {"text": note}, source)
        console.print(f"The note seoul is new: {stored.inserted}")
        again = memory.store_context("note", {"text": NOTES["seoul"], "read": True}, "seoul")
        console.print(f"Stored again it is new: {again.inserted}; same id: {again.id == stored.id}")
        console.print(f"Commits: {memory.store_github_context('ada/engine', COMMITS)}")

        show(memory, "Words", 'bernoulli OR "analytical engine"')
        show(memory, "A part of words", "분석 엔", mode="substring")
        lines = {"additions": {"gt": 50}, "metadata.repository": "ada/engine"}
        show(memory, "More than 50 lines", None, context_type="github", where=lines)

        memory.update_user_settings({"mail": {"weekly": True, "daily": True}, "theme": "dark"})
        settings = memory.update_user_settings({"mail": {"daily": None}})
        console.print(f"Settings: {settings}")

    console.rule("Turin")
    with authenticated(turin) as memory:
        memory.store_context("note", {"text": "Menabrea prints the lecture."}, "lecture")
        notes = [note.content for note in memory.get_all_context_by_type("note")]
        console.print(f"Notes: {notes}")
        console.print(f"London's note, by its id: {memory.get_context_by_id(str(stored.id))}")
        console.print(f"London's, by its words: {list(memory.search_context('bernoulli'))}")

    console.rule("London forgets")
    with authenticated(london) as memory:
        lines_of = Counter(json.loads(line).get("table") for line in memory.export_user_data())
        exported = {table: count for table, count in lines_of.items() if table}
        receipt = memory.delete_user_data()
        deleted = {table: count for table, count in receipt.items() if count}
        console.print(f"Exported: {exported}\nDeleted: {deleted}")
    try:
        with authenticated(london):
            pass
    except AuthenticationError as error:
        console.print(f"The next request: {error}")
    with authenticated(turin) as memory:
        console.print(f"Turin remembers: {memory.get_context('note', 'lecture')}")


if __name__ == "__main__":
    try:
        main()
    except DatabaseError as error:
        sys.exit(f"The demo stopped: {error}")
