"""A persona that remembers: `python examples/persona_chat.py`.

A template with modules becomes the prompt, a model answers, modules look at the answer and keep
states, and messages that leave the model's sight become memories that later prompts recall. `Chat`
is what an application would copy; the model here is a plain function, and so are embedding and
summary. It runs on the database that DATABASE_URL names, or else on an embedded PostgreSQL that it
starts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import sqrt
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from database import (
    Conversation,
    ConversationRepository,
    DatabaseError,
    Memory,
    MemoryRepository,
    Message,
    MessageRepository,
    ModuleRepository,
    Persona,
    PersonaRepository,
    Recalled,
    StateRepository,
    TenantSession,
    get_db_session,
    get_settings,
    init_db,
    transaction,
)

TENANT = "persona-chat"
SEEN = 5  # The newest messages, which the model sees as they are.
COMPRESSED = 10  # So many that it no longer sees become a memory.

TEMPLATE = r"""You are Clara, who keeps house at the lighthouse. @style
@mood @topic
You remember:
${memories}
"""
# The library stores scripts and runs none: SCRIPTS below has what stands in for these.
MODULES: list[dict[str, Any]] = [
    {"name": "style", "content": r"Be brief. Never write \@style or \${memories}."},
    {
        "name": "mood",
        "content": "The guest is ${mood}.",
        "execution_context": "POST_RESPONSE",
        "script": "ctx.set('mood', ...)",
    },
    {
        "name": "topic",
        "content": "The talk is of ${topic}.",
        "execution_context": "POST_RESPONSE",
        "requires_ai_inference": True,
        "script": "ctx.set('topic', ctx.infer(...))",
    },
]
AT_FIRST = {
    "variables": {"mood": "a stranger", "topic": "nothing yet"},
    "memories": "- nothing yet",
}

Model = Callable[[str, Sequence[Message]], str]


def words(text: str) -> list[str]:
    """Return the words of a text that carry its meaning."""
    common = {"a", "am", "and", "at", "does", "i", "is", "my", "the", "to", "what", "when", "with"}
    return [word for word in re.findall(r"\w+", text.lower()) if word not in common]


def embed(text: str) -> list[float]:
    """Stand in for a model of embeddings: count the words by their hash, and normalise."""
    numbers = [0.0] * get_settings().embedding_dimensions
    for word in words(text) or [text]:
        hashed = blake2b(word.encode(), digest_size=8).digest()
        numbers[int.from_bytes(hashed, "big") % len(numbers)] += 1
    length = sqrt(sum(number * number for number in numbers))
    return [number / length for number in numbers]


def scripted(prompt: str, history: Sequence[Message]) -> str:
    """Stand in for a language model: it knows the prompt and the messages given, nothing else."""
    said = history[-1]
    if not said.content.endswith("?"):
        return ("I see.", "Go on.", "How nice!")[said.position // 2 % 3]
    told = [line for text in re.findall("(?m)^- (.*)$", prompt) for line in text.split(" / ")]
    told += [message.content for message in history[:-1] if message.role == "user"]
    asked = set(words(said.content))
    best = max(told, key=lambda line: len(asked.intersection(words(line))))
    return f"You told me: {best}" if asked.intersection(words(best)) else "You never told me."


def summary(messages: Sequence[Message]) -> str:
    """Stand in for a model that sums up."""
    return " / ".join(message.content for message in messages if message.role == "user")


# By the module's name: from what was said to the module's variables.
SCRIPTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "mood": lambda said: {"mood": next((w for w in ("happy", "sad") if w in said), "calm")},
    "topic": lambda said: {"topic": max(words(said), key=len, default="silence")},
}


@dataclass(frozen=True)
class Chat:
    """A conversation with a persona."""

    db: TenantSession
    persona: Persona
    conversation: Conversation
    model: Model = scripted

    @classmethod
    def open(cls, db: TenantSession, model: Model = scripted) -> Chat:
        """Begin a conversation; persona and modules are made for the first one."""
        with transaction(db):
            known = {module.name for module in ModuleRepository.list(db, limit=1000)}
            ModuleRepository.create_many(db, [m for m in MODULES if m["name"] not in known])
            persona = PersonaRepository.get_by_name(db, "Clara") or PersonaRepository.create(
                db, name="Clara", template=TEMPLATE, first_message="Come in, the kettle is on."
            )
            conversation = ConversationRepository.create(db, persona_id=persona.id)
            states = [{"key": key, "value": value} for key, value in AT_FIRST.items()]
            StateRepository.set_many(db, conversation.id, states)
        return cls(db, persona, conversation, model)

    def say(self, text: str) -> str:
        """Return the answer to a message; no connection is held while the model thinks."""
        db, chat = self.db, self.conversation.id
        MessageRepository.append(db, chat, role="user", content=text)
        found = self.recall(text)
        if found:
            lines = "\n".join(f"- {recalled.memory.content}" for recalled in found)
            StateRepository.set(db, chat, "memories", lines)
        history = MessageRepository.history(db, chat, limit=SEEN)
        answer = self.model(self.prompt(), history)
        MessageRepository.append(db, chat, role="assistant", content=answer)
        self.run_modules(text)
        self.compress()
        return answer

    def prompt(self) -> str:
        """Return the template with what the modules and states say now."""
        return PersonaRepository.render(
            self.db, self.persona.id, conversation_id=self.conversation.id
        )

    def recall(self, text: str, *, touch: bool = True) -> list[Recalled]:
        """Return the two memories that matter most, by meaning or any of the words."""
        return MemoryRepository.recall(
            self.db,
            embedding=embed(text),
            text=" OR ".join(words(text)),
            conversation_id=self.conversation.id,
            limit=2,
            touch=touch,
        )

    def run_modules(self, said: str) -> None:
        """Run the modules that follow an answer, first those without AI; store their variables."""
        StateRepository.set_many(
            self.db,
            self.conversation.id,
            [
                {
                    "key": "variables",
                    "value": SCRIPTS[module.name](said),
                    "persona_id": self.persona.id,
                    "module_id": module.id,
                    "execution_stage": f"stage{stage}",
                }
                for stage in (4, 5)
                for module in ModuleRepository.for_stage(self.db, stage, persona_id=self.persona.id)
            ],
        )

    def compress(self) -> Memory | None:
        """Make a memory of the oldest messages that are in none, if enough are out of sight."""
        db, chat = self.db, self.conversation.id
        status = MemoryRepository.status(db, chat)
        fresh = status.messages - status.covered
        if fresh < SEEN + COMPRESSED:
            return None
        messages = MemoryRepository.window(db, chat, fresh - COMPRESSED + 1, fresh)
        if MemoryRepository.covers(db, chat, [message.id for message in messages]):
            return None  # Another process was quicker.
        content = summary(messages)
        return MemoryRepository.add(
            db,
            chat,
            content=content,
            embedding=embed(content),
            importance=min(1, content.count("My ") / 4),
            memory_type="dialogue",
            persona_id=self.persona.id,
            first_message_id=messages[0].id,
            first_position=messages[0].position,
            last_position=messages[-1].position,
            message_count=len(messages),
        )


TALK = (
    "My dog is called Rufus.",
    "We walk along the beach each morning.",
    "My sister paints ships.",
    "I am happy here!",
    "The harbour was full of gulls.",
    "I write letters with a fountain pen.",
    "My tea is cold.",
    "Rain spoils the roses.",
    "I am sad about the roses.",
    "The train to Turin leaves at noon.",
    "A small green suitcase will do.",
    "One more cup, please.",
)
QUESTIONS = ("When does the train leave for Turin?", "What is my dog called?", "Who is Babbage?")


def memories(found: Sequence[Recalled], title: str) -> Table:
    """Return what was recalled, with the score and what it is made of."""
    made_of = "= relevance + recency + importance"
    table = Table("Memory", "Messages", "Score", made_of, title=title, title_justify="left")
    for recalled in found:
        memory, parts = recalled.memory, recalled.parts
        numbers = (parts.relevance, parts.recency, parts.importance)
        summed = " + ".join(f"{number:.2f}" for number in numbers)
        span = f"{memory.first_position}-{memory.last_position}"
        table.add_row(Text(memory.content), span, f"{recalled.score:.2f}", summed)
    return table


def short(console: Console, db: TenantSession) -> None:
    """Show that a persona knows what it no longer sees."""
    chat = Chat.open(db)
    for text in TALK:
        chat.say(text)
    console.rule(f"{chat.persona.name} remembers")
    question = QUESTIONS[1]
    console.print(f"{question} [bold]{chat.say(question)}[/]")
    console.print(memories(chat.recall(question, touch=False), "From memories, the best first"))


def main() -> None:
    """Talk, ask for what was said, and look at all that was stored."""
    console = Console()
    init_db()
    with get_db_session(tenant_id=TENANT) as db:
        chat = Chat.open(db)
        console.rule(chat.persona.name)
        for text in (*TALK, *QUESTIONS):
            console.print(f"[dim]{text}[/] {chat.say(text)}")

        console.print(Panel(Text(chat.prompt().strip()), title="The next prompt"))
        table = Table("Module", "Stage", "State", "Value", "Version", title="States")
        for state in StateRepository.get_all(db, chat.conversation.id):
            where = (state.module_name, state.execution_stage, state.state_key)
            table.add_row(*where, Text(str(state.state_value)), str(state.version))
        console.print(table)
        found = chat.recall(QUESTIONS[1], touch=False)
        console.print(memories(found, f"Memories for: {QUESTIONS[1]}"))
        console.print(MemoryRepository.status(db, chat.conversation.id))


if __name__ == "__main__":
    try:
        main()
    except DatabaseError as error:
        sys.exit(f"The demo stopped: {error}")
