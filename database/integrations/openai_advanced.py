"""What sessions of the OpenAI Agents SDK tell and do beside their items: turns, usage, branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from database.errors import InvalidValueError, NotFoundError
from database.integrations import openai_branches, openai_turns
from database.integrations.known_threads import KnownThread
from database.integrations.worker_threads import in_worker_thread
from database.repositories.message import MessageRepository
from database.rules import check_number
from database.units import transaction

if TYPE_CHECKING:
    from agents import RunResultBase

    from database.integrations.openai_branches import Branches
    from database.integrations.openai_turns import Turn
    from database.integrations.worker_threads import Sessions
    from database.models.message import Message
    from database.session import TenantSession

__all__ = ["AdvancedSession"]

T = TypeVar("T")


class AdvancedSession:
    """What the SDK's `AdvancedSQLiteSession` has, on a conversation of this library.

    The current branch is the conversation's, not the object's: all sessions that have it go on
    there. The first one is "main". Calls that name a branch, make one or list them lock the
    conversation, as an append does.
    """

    session_id: str

    def __init__(
        self,
        session_id: str,
        tenant_id: str | None,
        user_id: UUID | str | None,
        sessions: Sessions,
    ) -> None:
        self._thread = KnownThread(session_id, user_id, "session_id")
        self.session_id = self._thread.thread_id
        self.user_id = self._thread.user_id
        self.tenant_id = tenant_id
        self._sessions = sessions

    async def store_run_usage(self, result: RunResultBase, *, model: str | None = None) -> None:
        """Keep what a run has used, on the newest turn; again for the same turn, in its place.

        Args:
            result: What the run returned.
            model: Its name; None is that of the last agent's model, if it has one.

        Raises:
            NotFoundError: The session holds nothing of a run.
        """
        counts = openai_turns.counts_of(result.context_wrapper.usage)
        name = model or openai_turns.model_of(result.last_agent)
        if not await self._read(
            lambda db, known: openai_turns.store_usage(db, known, counts, name), False
        ):
            msg = "the session holds nothing of a run"
            raise NotFoundError(msg)

    async def get_session_usage(self, branch_id: str | None = None) -> dict[str, int] | None:
        """Return requests, tokens and turns of all stored runs; None if there are none.

        Args:
            branch_id: Only of the runs that this branch shows; None is all.
        """
        if branch_id is not None:
            return openai_turns.usage_of(await self._turns(branch_id)) or None
        return await self._read(openai_turns.session_usage, {}) or None

    async def get_turn_usage(
        self, user_turn_number: int | None = None, branch_id: str | None = None
    ) -> list[dict[str, Any]] | dict[str, Any]:
        """Return what each turn has used; of one turn its dict, empty if nothing is known."""
        found = openai_turns.turn_usage(await self._turns(branch_id))
        if user_turn_number is None:
            return found
        by_number = {one.pop("user_turn_number"): one for one in found}
        return by_number.get(user_turn_number, {})

    async def get_conversation_turns(self, branch_id: str | None = None) -> list[dict[str, Any]]:
        """Return the turns: number in the branch, the user's content, when, the message's id."""
        return [turn.described() for turn in await self._turns(branch_id) if turn.number]

    async def find_turns_by_content(
        self, search_term: str, branch_id: str | None = None
    ) -> list[dict[str, Any]]:
        """Return the turns whose user's text has a part like this, in any case."""
        found = openai_turns.matching(await self._turns(branch_id), search_term)
        return [turn.described() for turn in found]

    async def create_branch_from_turn(
        self, turn_number: int, branch_name: str | None = None
    ) -> str:
        """Begin a branch that has what comes before a turn, and go on there; return its name.

        Args:
            turn_number: As `get_conversation_turns` tells it of the current branch.
            branch_name: At most 255 printable characters; None makes one.

        Raises:
            InvalidValueError: There is no such turn, or the name is empty or taken.
        """
        check_number("turn_number", turn_number, 1, 2**62)
        return await self._create(lambda _: turn_number, branch_name)

    async def create_branch_from_content(
        self, search_term: str, branch_name: str | None = None
    ) -> str:
        """Begin a branch at the first turn that `find_turns_by_content` returns.

        Raises:
            InvalidValueError: There is none, or the name is empty or taken.
        """

        def first(turns: list[Turn]) -> int:
            found = openai_turns.matching(turns, search_term)
            if not found:
                raise InvalidValueError("search_term", "must be part of what a user said")
            return found[0].number

        return await self._create(first, branch_name)

    async def switch_to_branch(self, branch_id: str) -> None:
        """Go on with another branch, where it was left.

        Raises:
            InvalidValueError: There is none of this name.
            NotFoundError: The application has deleted its newest message.
        """
        if not await self._with_branches(lambda branches: branches.switch(branch_id), ""):
            raise openai_branches.unknown_branch()

    async def list_branches(self) -> list[dict[str, Any]]:
        """Return name, counts of messages and turns, and time of the branches, the oldest first."""
        return await self._with_branches(lambda branches: branches.described(), [])

    async def delete_branch(self, branch_id: str, force: bool = False) -> None:  # noqa: FBT001, FBT002
        """Delete a branch, with the messages that no other one has.

        They stay, in no branch, where a fork shows them.

        Args:
            branch_id: Its name, not "main".
            force: Also if it is the current one; "main" is that then.

        Raises:
            InvalidValueError: There is none of this name, or it must not be deleted.
        """
        if not await self._with_branches(
            lambda branches: branches.delete(branch_id, force=force), ""
        ):
            raise openai_branches.unknown_branch()

    async def _run(self, work: Callable[[TenantSession], T]) -> T:
        return await in_worker_thread(work, tenant_id=self.tenant_id, sessions=self._sessions)

    async def _read(self, call: Callable[[TenantSession, UUID], T], nothing: T) -> T:
        return await self._run(
            lambda db: self._thread.read(db, lambda known: call(db, known), nothing)
        )

    async def _write(self, call: Callable[[TenantSession, UUID], object]) -> None:
        await self._run(lambda db: self._thread.write(db, lambda known: call(db, known)))

    async def _with_branches(self, call: Callable[[Branches], T], nothing: T) -> T:
        """Return what a call does with the branches, in a transaction and behind a lock."""

        def work(db: TenantSession, known: UUID) -> T:
            with transaction(db):
                branches = openai_branches.locked_branches(db, known)
                return nothing if branches is None else call(branches)

        return await self._read(work, nothing)

    async def _create(self, turn_of: Callable[[list[Turn]], int], name: str | None) -> str:
        made = await self._with_branches(lambda branches: branches.create(turn_of, name), "")
        if not made:
            raise InvalidValueError("session_id", "must be that of a session with turns")
        return made

    async def _turns(self, branch_id: str | None) -> list[Turn]:
        def read(db: TenantSession, known: UUID) -> list[Message]:
            if branch_id is None:
                return MessageRepository.history(db, known)
            with transaction(db):
                tip = openai_branches.tip_of(db, known, branch_id)
                return [] if tip is None else MessageRepository.history_to(db, tip)

        return [*openai_turns.turns_of(await self._read(read, []))]
