"""The coordinator's desk for shards: what they are given, where they are, and that all of them can be asked.

It decides nothing: which shards there are and which are waited for is the machine's. Rule: an order twice is the same
as once, so whoever comes back is given everything again.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import msgspec

from .docket import Docket
from .facts import Took
from .messages import Assign, Assignment, JobSpec, Message, Moved, Settle, Stands, Where
from .orders import Orders
from .rosters import Account, Rosters
from .scheduler import events
from .scheduler.ids import JobId, ShardId
from .scheduler.machine import Machine
from .scheduler.state import Finishing
from .transport import Endpoint, Refusal

ASSIGN_S = (
    300.0  # for a shard to make room, and on its machine's first sparse job to compile the codec's kernels
)


class Hall(Protocol):
    """The coordinator, as this desk sees it."""

    job: JobId
    spec: JobSpec
    docket: Docket
    machine: Machine
    endpoint: Endpoint
    orders: Orders
    rosters: Rosters

    def dispatch(self, event: events.Event) -> None: ...

    def wake(self) -> None: ...


class ShardDesk:
    """One job's shards. `begin_with` is the checkpoint that their chunks begin with, if there is one."""

    def __init__(self, hall: Hall, begin_with: str = "") -> None:
        self.hall = hall
        self.begin_with = begin_with
        self.assigned: set[str] = set()  # those that have taken the layout from this process

    @property
    def all(self) -> list[ShardId]:
        return self.hall.machine.shards(self.hall.job)

    def serves(self, shard: str) -> bool:
        """Is this shard alive, with its chunks?"""
        job = self.hall.docket.running
        return job is not None and shard in job.members.alive("shard") and shard not in job.away

    def holding(self) -> list[str]:
        """The shards with chunks; none where one of them cannot be asked, or has no parameters yet."""
        facts = self.hall.docket.facts
        shards = [str(shard) for number, shard in enumerate(self.all) if number in set(facts.placement)]
        # Of a job that ends it is not known any more; the shards themselves say so then.
        ready = self.hall.docket.loaded or (self._ending() and set(shards) <= set(facts.took))
        return shards if ready and all(map(self.serves, shards)) else []

    def had_nothing(self, shard: str) -> bool:
        """Nobody has brought it any parameters: it never had a layout."""
        return shard not in self.hall.docket.facts.took

    def assign_all(self) -> None:
        for shard in self.all:
            if shard in self.hall.orders.peers:
                self.assign(shard)

    def assign(self, shard: str) -> None:
        """Give this shard the layout and the placement; when all have them, workers may go on."""
        hall, facts = self.hall, self.hall.docket.facts
        payload = msgspec.msgpack.encode(Assignment(facts.registration, list(facts.placement)))
        message = Assign(hall.job, shard, hall.spec.staleness, hall.spec.compress, self.begin_with)
        peer = hall.orders.peers[shard]

        def ended(order: asyncio.Task[bool]) -> None:
            if order.cancelled() or hall.orders.peers[shard] != peer:
                return  # the process that has come in its place was given the same order
            if order.result():
                self.assigned.add(shard)
                if self.had_nothing(shard):
                    hall.docket.fact(Took(shard))
                hall.wake()
            elif self.serves(shard) and not self._ending():
                because = f"{shard} did not take the layout; its log says why"
                hall.dispatch(events.Cancelled(hall.job, because))

        hall.orders.send(shard, message, payload, ASSIGN_S).add_done_callback(ended)

    def _ending(self) -> bool:
        job = self.hall.docket.running
        return job is None or isinstance(job.phase, Finishing)

    def rehome(self, shard: str, incarnation: int) -> None:
        """A shard serves its chunks again: it gets what it has missed, and the scripts its address."""
        facts = self.hall.docket.facts
        if facts.placement:
            self.assign(shard)
        self.hall.rosters.again(shard)
        for peer in facts.scripts.values():
            self.hall.endpoint.notify(
                peer, Moved(self.hall.job, shard, incarnation, facts.entered[shard].addresses)
            )

    def where(self, message: Where) -> Message | None:
        """Where a shard is, for a worker that has lost it; None while it is away."""
        if message.shard not in self.all:
            raise Refusal("placement", f"there is no shard {message.shard}")
        if not self.serves(message.shard):
            return None
        incarnation = self.hall.machine.jobs[self.hall.job].members.alive("shard")[ShardId(message.shard)]
        addresses = self.hall.docket.facts.entered[message.shard].addresses
        return Moved(self.hall.job, message.shard, incarnation.incarnation, addresses)

    async def ask_settled(self, shard: str, message: Settle) -> Account | None:
        """Where a lost worker stands on this shard; None where the shard does not say."""
        if not self.serves(shard):
            return None
        answer = await self.hall.orders.ask(shard, message)
        if answer is None or not isinstance(answer.message, Stands):
            return None
        return Account(answer.message, bytes(answer.payload or b""))
