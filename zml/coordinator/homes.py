"""Where each shard lives, as members are told: addresses, promotions, and what a shard may acknowledge.

`scheduler.homes` has the rule and the machine decides; this carries it out. A shard that asks whether it may go on
without its backup is told yes only when the machine, after all that has happened, still has it living there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog
from msgspec.structs import replace

from ..messages import (
    Adopt,
    Message,
    Moved,
    Pair,
    Promote,
    Retire,
    Returned,
    Roster,
    Settle,
    Standing,
    Stands,
    Vacate,
    Vacated,
    Wait,
)
from ..scheduler import actions, events
from ..scheduler.ids import JobId
from ..scheduler.machine import Machine
from ..scheduler.state import Draining, Finishing
from ..transport import Answer, Refusal
from .docket import Docket
from .facts import Serving
from .orders import ORDER_S
from .rosters import Account

log = structlog.get_logger()
ADOPT_S = 300.0  # for a process to read the log of another
SETTLE_S = 2.0  # a shard that does not say where a worker stands may live elsewhere by then
Ask = Callable[..., Awaitable[Answer | None]]  # (member, order, payload, within_s); None: it was not taken


class ShardHomes:
    """One job's."""

    def __init__(
        self,
        job: JobId,
        docket: Docket,
        machine: Machine,
        ask: Ask,
        dispatch: Callable[[events.Event], None],
        until: Callable[[Callable[[], bool]], Awaitable[bool]],
        is_empty: Callable[[str], bool],
    ) -> None:
        """`until` waits for a condition, as long as a request may be held. `is_empty`: does a shard hold nothing?"""
        self.job = job
        self.docket = docket
        self.machine = machine
        self.ask = ask
        self.dispatch = dispatch
        self.until = until
        self.is_empty = is_empty
        self.tasks: set[asyncio.Task[bool]] = set()  # orders under way

    # -- looking -------------------------------------------------------------------------------------

    def addresses(self, shard: str) -> list[str]:
        """Where this shard takes pushes; nowhere before one that has joined has said so."""
        return self.docket.facts.serving.get(shard, [])

    def listeners(self, member: str) -> list[str]:
        """Where a shard's process takes those of its own, and copies."""
        return self.docket.facts.entered[member].addresses

    def host(self, shard: str) -> str:
        """The member in whose process this shard lives."""
        home = self.machine.home(self.job, shard)
        return home.host if home is not None else shard

    def serves(self, shard: str) -> bool:
        """Is this shard alive, with its chunks?"""
        job = self.machine.jobs.get(self.job)
        return job is not None and self.host(shard) in job.members.alive("shard") and shard not in job.away

    def served_by(self, member: str) -> list[tuple[str, int, str]]:
        """What this process is to serve when it has read the logs."""
        if not member.startswith("p"):
            return []
        served = self.machine.served_by(self.job, member)
        return [(shard, home.incarnation, home.log) for shard, home in served]

    def where(self, shard: str) -> Moved | None:
        """For a worker that has lost it; None while nobody serves it."""
        if shard not in self.machine.shards(self.job):
            raise Refusal("placement", f"there is no shard {shard}")
        home = self.machine.home(self.job, shard)
        if home is None or not self.serves(shard):
            return None
        return Moved(self.job, shard, home.incarnation, self.addresses(shard))

    # -- orders --------------------------------------------------------------------------------------

    def perform(self, action: actions.Promote | actions.Adopt | actions.Pair | actions.Unpair) -> None:
        match action:
            case actions.Promote():
                self._start(self.promote(action))
            case actions.Adopt():
                self._start(self.adopt(action))
            case actions.Pair():
                self._start(self.pair(action))
            case actions.Unpair():
                self._start(self.unpair(action))

    def _start(self, order: Coroutine[Any, Any, bool]) -> None:
        task = asyncio.ensure_future(order)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def pair(self, action: actions.Pair) -> bool:
        home = self.machine.home(self.job, action.shard)
        if home is None:
            return False
        to, addresses = (action.host, action.host_incarnation), self.listeners(action.host)
        order = Pair(self.job, action.shard, home.incarnation, action.number, *to, addresses)
        return await self.ask(home.host, order) is not None

    async def unpair(self, action: actions.Unpair) -> bool:
        home = self.machine.home(self.job, action.shard)
        if home is None:
            return False
        order = Pair(self.job, action.shard, home.incarnation, action.number, "", 0, [])
        return await self.ask(home.host, order) is not None

    async def promote(self, action: actions.Promote) -> bool:
        order = Promote(self.job, action.shard, action.incarnation, action.log)
        why_not = f"{action.host} does not serve its backup of {action.shard}; its log says why"
        return await self._take_over(action, order, ORDER_S, why_not)

    async def adopt(self, action: actions.Adopt) -> bool:
        empty = self.is_empty(action.shard)
        order = Adopt(self.job, action.shard, action.incarnation, action.log, empty)
        why_not = f"{action.host} cannot read the log of {action.shard}; its own log says why"
        return await self._take_over(action, order, ADOPT_S, why_not)

    async def _take_over(
        self, action: actions.Promote | actions.Adopt, order: Promote | Adopt, within_s: float, why_not: str
    ) -> bool:
        taken = await self.ask(action.host, order, None, within_s) is not None
        if not taken:
            self.dispatch(events.NotPromoted(self.job, action.shard, action.incarnation, why_not))
        return taken

    async def retire(self, member: str, order: Retire) -> bool:
        return await self.ask(member, order) is not None

    def rehome(self, shard: str, incarnation: int, copy: int = 0, backup: str = "") -> None:
        """It serves, or has a copy in step: whoever else has something of it has it no longer."""
        job = self.machine.jobs.get(self.job)
        for member in job.members.alive("shard") if job is not None else ():
            if member not in (self.host(shard), backup):
                self._start(self.retire(member, Retire(self.job, shard, incarnation, copy)))

    def again(self, because: str) -> None:
        """Another process was the coordinator: what it may not have ordered yet."""
        for order in self.machine.moves(self.job, because):
            self.perform(order)
        for shard in self.machine.shards(self.job):
            home = self.machine.home(self.job, shard)
            if home is not None and self.serves(shard):
                self.rehome(shard, home.incarnation)

    async def settle(self, shard: str, message: Settle) -> Account | None:
        """Where a lost worker stands on this shard; None where the shard does not say."""
        if not self.serves(shard):
            return None
        answer = await self.ask(self.host(shard), replace(message, shard=shard), None, SETTLE_S)
        if answer is None or not isinstance(answer.message, Stands):
            return None
        return Account(answer.message, bytes(answer.payload or b""))

    async def bring(self, shard: str, message: Roster, payload: bytes) -> bool:
        return await self.ask(self.host(shard), replace(message, shard=shard), payload) is not None

    # -- what members say ----------------------------------------------------------------------------

    def joined(self, member: str) -> None:
        if self.host(member) == member:
            self.docket.fact(Serving(member, self.listeners(member)))

    def returned(self, message: Returned, holds: str) -> None:
        """A shard is ready to serve, from its log or as a promoted backup."""
        if self.machine.is_to_live_at(self.job, message.shard, message.member):
            where = message.addresses or self.listeners(message.member)
            self.docket.fact(Serving(message.shard, where))
        who = (message.member, message.incarnation)
        self.dispatch(events.Returned(self.job, *who, holds, message.shard))

    async def vacate(self, message: Vacate) -> Message:
        """A process is to leave. What it has goes to others, if there are any."""
        member = message.member
        if not self.machine.is_leaving(self.job, member):
            self.dispatch(events.Vacating(self.job, member, message.incarnation, message.because))
        if await self.until(lambda: not self.machine.needed_in(self.job, member)):
            return Vacated(self.job, handed_over=True)
        if not self.machine.is_last(self.job, member):
            waiting_for = [str(shard) for shard in self.machine.needed_in(self.job, member)]
            return Wait(self.job, waiting_for, f"they are on the way from {member} to other processes")
        job = self.machine.jobs.get(self.job)
        if job is not None and isinstance(job.phase, Draining | Finishing):
            # It was told to leave with everybody else.
            because = "they finish their step and need their parameters"
            return Wait(self.job, [*job.members.workers()], because)
        return Vacated(self.job, handed_over=False)

    def standing(self, message: Standing) -> None:
        """How a shard and its backup stand. Raises Refusal where the shard lives elsewhere by now."""
        who = (message.member, message.incarnation)
        shard, home_number, copy = message.shard, message.home, message.copy
        if message.ready:
            host = (message.host, message.host_incarnation)
            self.dispatch(events.BackupReady(self.job, *who, shard, home_number, copy, *host))
        else:
            self.dispatch(events.BackupLost(self.job, *who, shard, home_number, copy))
        # Asked when all is done: the same moment may have shown that the member is lost.
        lives_there = self.machine.serves_at(self.job, shard, message.member, home_number)
        if not lives_there or not self.machine.is_current(self.job, *who):
            raise Refusal(
                "fenced", f"{message.shard} does not live in {message.member}#{message.incarnation}"
            )
        told = {"shard": message.shard, "host": message.host, "copy": message.copy}
        if message.ready:
            log.info("backup in step", **told)
            self.rehome(shard, home_number, copy, message.host)
        else:
            log.warning("without a backup", **told, because=message.because)
