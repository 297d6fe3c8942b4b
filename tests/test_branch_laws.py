"""Branches and forks against a model: a tree of messages, and the head of each conversation."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from uuid import UUID

from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from database import ConversationRepository, Message, MessageRepository, TenantSession

STEPS = 30


@dataclass
class Model:
    """What must be true: each message's parent and text, each conversation's head."""

    parents: dict[UUID, UUID | None] = field(default_factory=dict)
    texts: dict[UUID, str] = field(default_factory=dict)
    heads: dict[UUID, UUID | None] = field(default_factory=dict)
    hidden: set[UUID] = field(default_factory=set)
    seen: dict[UUID, set[UUID]] = field(default_factory=dict)
    """By conversation, the messages that can be named in it."""

    def way(self, head: UUID | None) -> list[UUID]:
        found = []
        while head is not None:
            found.append(head)
            head = self.parents[head]
        return found[::-1]

    def history(self, conversation: UUID) -> list[UUID]:
        return [m for m in self.way(self.heads[conversation]) if m not in self.hidden]

    def add(self, conversation: UUID, message: Message, parent: UUID | None) -> None:
        self.parents[message.id] = parent
        self.texts[message.id] = message.content
        self.heads[conversation] = message.id
        self.seen[conversation].add(message.id)

    def remove(self, message: UUID) -> None:
        parent = self.parents.pop(message)
        del self.texts[message]
        for links in (self.parents, self.heads):
            for key in [key for key, linked in links.items() if linked == message]:
                links[key] = parent
        for seen in self.seen.values():
            seen.discard(message)


class Play:
    """Does the same in the database and in the model, and compares."""

    def __init__(self, db: TenantSession, random: Random) -> None:
        self.db, self.random, self.model, self.count = db, random, Model(), 0
        self.begin()

    def begin(self) -> None:
        conversation = ConversationRepository.create(self.db).id
        self.model.heads[conversation], self.model.seen[conversation] = None, set()

    def text(self) -> str:
        self.count += 1
        return f"m{self.count}"

    def conversation(self) -> UUID:
        return self.random.choice(sorted(self.model.heads))

    def message(self, conversation: UUID) -> UUID | None:
        seen = sorted(self.model.seen[conversation])
        return self.random.choice(seen) if seen else None

    def append(self) -> None:
        conversation = self.conversation()
        for _ in range(self.random.choice([1, 1, 3])):
            head = self.model.heads[conversation]
            made = MessageRepository.append(self.db, conversation, role="user", content=self.text())
            self.model.add(conversation, made, head)

    def append_many(self) -> None:
        conversation = self.conversation()
        rows = [{"role": "user", "content": self.text()} for _ in range(3)]
        for made in MessageRepository.append_many(self.db, conversation, rows):
            self.model.add(conversation, made, self.model.heads[conversation])

    def edit(self) -> None:
        conversation = self.conversation()
        if message := self.message(conversation):
            made = MessageRepository.edit(
                self.db, message, content=self.text(), conversation_id=conversation
            )
            self.model.add(conversation, made, self.model.parents[message])

    def branch(self) -> None:
        conversation = self.conversation()
        at = self.message(conversation) if self.random.random() < 0.8 else None
        ConversationRepository.branch(self.db, conversation, at=at)
        self.model.heads[conversation] = at

    def switch(self) -> None:
        conversation = self.conversation()
        if message := self.message(conversation):
            ConversationRepository.switch(self.db, conversation, message)
            came_of_it = [
                other
                for other in self.model.seen[conversation] - self.model.hidden
                if message in self.model.way(other)
            ]
            newest = max(came_of_it, default=message, key=lambda m: int(self.model.texts[m][1:]))
            self.model.heads[conversation] = newest

    def fork(self) -> None:
        conversation = self.conversation()
        at = self.message(conversation) if self.random.random() < 0.5 else None
        made = ConversationRepository.fork(self.db, conversation, at=at).id
        head = at or next(iter(self.model.history(conversation)[::-1]), None)
        self.model.heads[made] = head
        self.model.seen[made] = set(self.model.way(head))

    def delete_message(self) -> None:
        if message := self.message(self.conversation()):
            assert MessageRepository.delete(self.db, message)
            self.model.remove(message)

    def hide(self) -> None:
        conversation = self.conversation()
        if message := self.message(conversation):
            if MessageRepository.deactivate(self.db, conversation, [message]):
                self.model.hidden.add(message)
            elif MessageRepository.restore(self.db, conversation, [message]):
                self.model.hidden.discard(message)

    def purge(self) -> None:
        conversation = self.conversation()
        before = {m for m in self.model.hidden if MessageRepository.exists(self.db, m)}
        purged = MessageRepository.purge(self.db, conversation)
        gone = {m for m in before if not MessageRepository.exists(self.db, m)}
        assert purged == len(gone)
        for message in gone:
            self.model.remove(message)
            self.model.hidden.discard(message)

    def pop(self) -> None:
        conversation = self.conversation()
        history = self.model.history(conversation)
        popped = MessageRepository.pop_last(self.db, conversation)
        assert (popped and popped.id) == next(iter(history[::-1]), None)
        if popped is None:
            return
        if MessageRepository.exists(self.db, popped.id):
            self.model.heads[conversation] = self.model.parents[popped.id]
        else:
            self.model.remove(popped.id)

    def prune(self) -> None:
        conversation = self.conversation()
        head = self.message(conversation)
        if head is None:
            return
        kept = set(self.model.way(self.model.heads[conversation]))
        for other, seen in self.model.seen.items():
            kept |= seen if other != conversation else set()
        left = {m for m in self.model.parents if MessageRepository.exists(self.db, m)}
        gone = []
        for message in self.model.way(head)[::-1]:
            followed = any(self.model.parents[m] == message for m in left)
            elsewhere = MessageRepository.require(self.db, message).conversation_id != conversation
            if message in kept or followed or elsewhere:
                break
            left.remove(message)
            gone.append(message)
        assert ConversationRepository.prune(self.db, conversation, head) == len(gone)
        for message in gone:
            assert not MessageRepository.exists(self.db, message)
            self.model.remove(message)

    def delete_conversation(self) -> None:
        conversation = self.conversation()
        assert ConversationRepository.delete(self.db, conversation)
        del self.model.heads[conversation], self.model.seen[conversation]
        kept = {m for head in self.model.heads.values() for m in self.model.way(head)}
        for messages in self.model.seen.values():
            kept |= messages
        for message in set(self.model.texts) - kept:
            assert not MessageRepository.exists(self.db, message)
        if not self.model.heads:
            self.begin()

    def compare(self) -> None:
        for conversation in self.model.heads:
            history = MessageRepository.history(self.db, conversation)
            wanted = self.model.history(conversation)
            assert [m.id for m in history] == wanted
            assert all(a.position < b.position for a, b in pairwise(history))
            row = ConversationRepository.require(self.db, conversation)
            newest = self.model.texts[wanted[-1]] if wanted else None
            assert (row.message_count, row.last_message) == (len(wanted), newest)
            assert list(MessageRepository.iterate(self.db, conversation)) == history
            assert MessageRepository.history(self.db, conversation, limit=2) == history[-2:]
            assert history[-1:] == [
                m for m in [MessageRepository.get_last(self.db, conversation)] if m
            ]
            assert MessageRepository.history(self.db, conversation, turns=3) == history[-3:]
            if history:
                assert MessageRepository.history_to(self.db, history[-1].id) == history
                middle = history[len(history) // 2].position
                window = MessageRepository.window(self.db, conversation, middle, middle + 2)
                assert window == [m for m in history if middle <= m.position <= middle + 2]
            branches = ConversationRepository.branches(self.db, conversation)
            newest_first = [branch.head.position for branch in branches]
            assert newest_first == sorted(newest_first, reverse=True)
            ends = self.ends(conversation)
            assert {branch.head.id for branch in branches} == ends
            active = [branch.head.id for branch in branches if branch.is_active]
            assert active == [m for m in wanted[-1:] if m in ends]

    def ends(self, conversation: UUID) -> set[UUID]:
        """The shown messages that nothing shown came of."""
        shown = self.model.seen[conversation] - self.model.hidden
        return shown - {m for message in shown for m in self.model.way(message)[:-1]}


STEP = {
    "append": 6,
    "append_many": 2,
    "edit": 4,
    "branch": 3,
    "switch": 2,
    "fork": 3,
    "delete_message": 2,
    "hide": 2,
    "purge": 2,
    "pop": 2,
    "prune": 2,
    "delete_conversation": 1,
}


@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to shrink takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.randoms(use_true_random=False))
def test_histories_are_ways_through_a_tree(db: TenantSession, random: Random) -> None:
    play = Play(db, random)
    for step in random.choices(list(STEP), weights=list(STEP.values()), k=STEPS):
        note(step)
        getattr(play, step)()
        play.compare()
