"""A language tutor on Telegram: `python examples/telegram_tutor.py`.

Users are known by their Telegram id; each has a conversation, from which a Pydantic AI agent goes
on. A bot can copy `Tutor`; in place of the model here, which knows a few words, it names a real
one. It runs on the database that DATABASE_URL names, or else on an embedded PostgreSQL that it
starts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TypedDict

from pydantic_ai import Agent
from pydantic_ai.messages import (
    ModelMessage,
    ModelResponse,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models.function import AgentInfo, FunctionModel
from rich.console import Console

from database import (
    ConversationRepository,
    DatabaseError,
    MessageRepository,
    MessageStats,
    StatsRepository,
    TenantSession,
    User,
    UserRepository,
    get_db_session,
    init_db,
)
from database.integrations.pydantic_ai import History, append_history, clear, load_history

WORDS = {"Haus": "house", "Schmetterling": "butterfly", "Feierabend": "the end of a day's work"}


class Sender(TypedDict, total=False):
    """What Telegram tells of who wrote; an id has up to 52 bits."""

    id: int
    chat_id: int
    first_name: str
    last_name: str
    username: str


def speak(history: list[ModelMessage], _: AgentInfo) -> ModelResponse:
    """Stand in for a model: look the last word up, and then say what was found."""
    last = history[-1].parts[-1]
    if isinstance(last, ToolReturnPart):
        asked = sum(isinstance(p, UserPromptPart) for m in history for p in m.parts)
        return ModelResponse([TextPart(f"It means: {last.content}. ({asked} asked so far)")])
    word = str(getattr(last, "content", "")).rstrip("?").split()[-1]
    return ModelResponse([ToolCallPart("look_up", {"word": word})])


agent = Agent(FunctionModel(speak, model_name="tutor-1"), instructions="You teach German.")


@agent.tool_plain
def look_up(word: str) -> str:
    """Return what a German word means."""
    return WORDS.get(word, "I do not know that word")


@dataclass(frozen=True)
class Tutor:
    """What the bot does with updates from Telegram."""

    db: TenantSession

    def add_user(self, sender: Sender) -> User:
        """Return the user of a Telegram id, made or brought up to date."""
        return UserRepository.get_or_create_by_identity(
            self.db,
            "telegram",
            str(sender["id"]),
            username=sender.get("username"),
            first_name=sender.get("first_name"),
            last_name=sender.get("last_name"),
            data={"chat_id": sender["chat_id"]},
        )

    def answer(self, sender: Sender, text: str) -> str:
        """Answer a message; no connection is held while the model thinks."""
        user = self.add_user(sender)
        chat = ConversationRepository.get_or_create(self.db, thread(sender), user_id=user.id)
        # Turns, not messages: a tool's result never comes without its call.
        history = load_history(self.db, chat.id, turns=20)
        result = agent.run_sync(text, message_history=history)
        append_history(self.db, chat.id, result.new_messages())
        return result.output

    def history(self, sender: Sender) -> History:
        """Return what was said; empty for who has never written."""
        return load_history(self.db, thread(sender))

    def clear(self, sender: Sender) -> int:
        """Hide what was said, until restored or purged; return how many messages."""
        return clear(self.db, thread(sender))

    def stats(self) -> MessageStats:
        """Return what all messages amount to."""
        return StatsRepository.summary(self.db)

    def telegram_ids(self) -> list[int]:
        """Return the Telegram ids of the newest 100 users."""
        page = UserRepository.list_identities(self.db, "telegram", limit=100)
        return [int(identity.subject) for identity in page]


def thread(sender: Sender) -> str:
    """Return the name of a user's conversation."""
    return f"telegram {sender['id']}"


ADA: Sender = {"id": 5_000_000_000, "chat_id": 5_000_000_000, "first_name": "Ada"}
BOB: Sender = {"id": 4_503_599_627_370_495, "chat_id": -100_123, "first_name": "Bob"}
console = Console()


def main() -> None:
    """Two people learn words; one of them wants it forgotten."""
    init_db()
    with get_db_session(tenant_id="tutor") as db:
        tutor = Tutor(db)
        for sender in (ADA, BOB):
            tutor.clear(sender)
            MessageRepository.purge(db, thread(sender))
        for sender, text in ((ADA, "What is Haus?"), (BOB, "Feierabend?"), (ADA, "And Tisch?")):
            console.print(f"{sender['first_name']}: {text}\n  {tutor.answer(sender, text)}")
        console.print(f"Telegram ids: {sorted(tutor.telegram_ids())}")
        total = tutor.stats()
        console.print(f"{total.messages} messages in {total.conversations} conversations")
        console.print(f"Ada's history: {len(tutor.history(ADA))} messages")
        console.print(f"Cleared: {tutor.clear(ADA)}, left: {len(tutor.history(ADA))}")
        restored = MessageRepository.restore(db, thread(ADA))
        console.print(f"Restored: {restored}, there: {len(tutor.history(ADA))}")
        tutor.clear(ADA)
        console.print(f"Purged: {MessageRepository.purge(db, thread(ADA))}")


if __name__ == "__main__":
    try:
        main()
    except DatabaseError as error:
        sys.exit(f"The demo stopped: {error}")
