"""How members end, where others tell it: an agent of its script, a launcher of a process that it started.

Rule: who is not a member any more, or in another process by now, is not touched. A death that nobody tells of is known
when the lease has ended.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ..messages import Ended, Exited, Message, Ok
from ..scheduler import events
from ..status import MemberFailure
from ..transport import Refusal
from .board import why
from .facts import Failed

if TYPE_CHECKING:
    from .coordinator import Coordinator

SETTLE_S = 2.0  # for the shards to say what a crashed script has done


class Endings:
    """One job's."""

    def __init__(self, hall: Coordinator) -> None:
        self.hall = hall

    async def script(self, message: Exited) -> Message:
        """A script has ended. Where it crashed, what it did is settled first: only the rest can be to blame."""
        if self.hall.docket.has_finished(message.member, message.incarnation):
            return Ok()  # it has said so before
        if not self.hall.is_current(message.member, message.incarnation):  # its agent may come again
            raise Refusal("fenced", f"{message.member}#{message.incarnation} was over before")
        crashed = bool(message.code or message.signal)
        if crashed:
            try:
                async with asyncio.timeout(SETTLE_S):
                    await self.hall.rosters.settle_now(message.member, message.incarnation)
            except TimeoutError:
                pass  # a shard is away: more than one batch is suspected, and none condemned
        if not self.hall.is_current(message.member, message.incarnation):
            return Ok()
        if message.failure is not None:
            self.hall.docket.fact(Failed(MemberFailure(member=message.member, failure=message.failure)))
        event = events.Exited(
            self.hall.job,
            message.member,
            message.incarnation,
            message.code,
            message.signal,
            why(message),
            returns=message.returns,
        )
        if crashed:
            event = self.hall.dealer.crashed(event, message.begun)
            if self.hall.dealer.stopped_by is not None:
                self.hall.docket.fact(Failed(self.hall.board.meant(message, self.hall.dealer.stopped_by)))
        self.hall.dispatch(event)
        return Ok()

    def process(self, message: Ended) -> Message:
        """The kernel has told whoever started it: nothing more comes from there."""
        entered = self.hall.facts.entered.get(message.member)
        if (
            entered is not None
            and (entered.node, entered.pid) == (message.node, message.pid)
            and self.hall.is_current(entered.member, entered.incarnation)
        ):
            self.hall.dispatch(
                events.Died(self.hall.job, entered.member, entered.incarnation, message.because)
            )
        return Ok()
