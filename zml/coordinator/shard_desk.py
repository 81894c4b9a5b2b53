"""The coordinator's desk for shards: what they are given, where they are, and that all of them can be asked.

It decides nothing: which shards there are and which are waited for is the machine's. Rule: an order twice is the same
as once, so whoever comes back is given everything again.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from ..messages import Assign, Assignment, Homes, Message, Moved, Register, Registered
from ..plan import Plan
from ..scheduler import events
from ..scheduler.ids import ShardId
from ..scheduler.state import Finishing
from ..transport import Answer, Refusal
from .checkpoints import resumed_course, why_not_this_model
from .facts import Shown, Took
from .holds import Answered
from .orders import ORDER_S

if TYPE_CHECKING:
    from .coordinator import Coordinator

ASSIGN_S = (
    300.0  # for a shard to make room, and on its machine's first sparse job to compile the codec's kernels
)
READ_S = 3600.0  # and to read what its chunks begin with; one that dies meanwhile is noticed before
AGAIN_S = 0.25  # one whose connection is lost is given it again after this, as long as it is a member
FETCH_S = 600.0  # or to ask for the next piece of it, where it does not see the folder


class ShardDesk:
    """One job's shards. `begin_with` is the checkpoint that their chunks begin with, if there is one, and `manifest`
    the hash by which they know it."""

    def __init__(self, hall: Coordinator, begin_with: str = "", manifest: str = "") -> None:
        self.hall = hall
        self.begin_with = begin_with
        self.manifest = manifest
        self.assigned: set[str] = set()  # those that have taken the layout from this process
        self.editions: dict[str, int] = {}  # of the placement, that they have taken from it
        self.waits = 0  # answers to scripts that are here before the job begins

    @property
    def all(self) -> list[ShardId]:
        return self.hall.machine.shards(self.hall.job)

    def serves(self, shard: str) -> bool:
        """Is this shard alive, with its chunks?"""
        return self.hall.homes.serves(shard)

    def holding(self) -> list[str]:
        """The shards with chunks; none where one of them cannot be asked, or has no parameters yet."""
        facts = self.hall.docket.facts
        held = facts.holding
        shards = [str(shard) for number, shard in enumerate(self.all) if number in held]
        # Of a job that ends it is not known any more; the shards themselves say so then.
        ready = self.hall.docket.loaded or (self._ending() and set(shards) <= set(facts.took))
        return shards if ready and all(map(self.serves, shards)) else []

    def had_nothing(self, shard: str) -> bool:
        """There is nothing that it could lack: it never had a layout, or has joined and got no chunks so far."""
        facts = self.hall.docket.facts
        return shard not in facts.took or int(shard[1:]) not in facts.holding

    def asked(self) -> list[ShardId]:
        """Those that have something to say of workers: not one that has joined and got nothing so far."""
        facts = self.hall.docket.facts
        held, first = facts.holding, self.hall.spec.shards
        if facts.deciding or len(self.all) == first:
            return self.all
        return [shard for number, shard in enumerate(self.all) if number < first or number in held]

    async def register(
        self, peer: str, message: Register, registration: bytes
    ) -> Message | tuple[Message, bytes]:
        """A script shows its layout, and learns where its chunks live once every shard has taken it."""
        hall = self.hall
        hall.admit(message.worker, message.incarnation)
        if not await hall.until(lambda: not hall.machine.missing(hall.job)):
            self.waits += 1  # a job may form for as long as it likes: nobody's patience is used up
            members = hall.machine.missing(hall.job)
            return hall.dealer.wait(members, "the job begins when all have joined", moved=self.waits)
        hall.admit(message.worker, message.incarnation)
        hall.docket.spoke(message.worker, peer)
        if digest_of(registration) != message.digest:
            raise Refusal("layout", "the layout's digest does not match its bytes")
        if not hall.facts.registration:
            if hall.resumed is not None and (because := why_not_this_model(hall.resumed, registration)):
                raise Refusal("layout", f"the checkpoint {hall.resumed.path} does not fit: {because}")
            hall.docket.fact(Shown(registration))
        hall.dispatch(
            events.Registered(hall.job, message.worker, message.incarnation, message.digest, message.chunks)
        )
        if message.digest != digest_of(hall.facts.registration):
            raise Refusal("layout", f"{message.worker} registered another layout than the workers before it")
        hall.settle()
        shards = self.asked()
        if not await hall.until(lambda: self.assigned.issuperset(shards)):
            # The first sparse job of a machine compiles half a minute and more.
            late = [shard for shard in shards if shard not in self.assigned]
            offer = hall.checkpoint_desk.offer
            moved = sum(offer.given[hall.homes.host(shard)] for shard in late)
            because = "they fetch what they begin with" if moved else "they take the layout"
            return hall.dealer.wait(late, because, moved=moved)
        if not await hall.until(lambda: hall.docket.loaded or hall.facts.initialiser == message.worker):
            whom = hall.facts.initialiser
            return hall.dealer.wait([whom], f"{whom} brings the first parameters")
        await hall.until(hall.notes.complete)  # one that is on its way; its sender may also be gone
        reply = Registered(
            job=hall.job,
            generation=hall.machine.generation(hall.job),
            initialiser="" if hall.docket.loaded else hall.facts.initialiser,
            staleness=hall.spec.staleness,
            compress=hall.spec.compress,
            workers=hall.spec.workers,
            epoch=hall.ledger.epoch,
            steps=hall.begun.steps_before,
        )
        return reply, msgspec.msgpack.encode(replace(self.homes(), note=hall.notes.newest))

    def homes(self) -> Homes:
        """Who holds what, and where that is."""
        hall, facts = self.hall, self.hall.facts
        where = [hall.homes.addresses(shard) for shard in self.all]
        shards = [str(shard) for shard in self.all]
        return Homes(shards, where, list(facts.placement), holders=facts.holders, edition=facts.edition)

    def where(self, shard: str, edition: int) -> tuple[Moved, bytes | None] | None:
        """For a worker that has lost a shard, and knows this edition; None while nobody serves it."""
        moved = self.hall.homes.where(shard)
        if moved is None or edition >= self.hall.facts.edition:
            return None if moved is None else (moved, None)
        return moved, msgspec.msgpack.encode(self.homes())

    def assign_all(self) -> None:
        for shard in self.all:
            if self.hall.homes.host(shard) in self.hall.orders.peers:
                self.assign(shard)

    def assign(self, shard: str) -> asyncio.Task[bool]:
        """Give this shard the layout and the placement; when all have them, workers may go on."""
        hall, facts = self.hall, self.hall.docket.facts
        edition = facts.edition
        assignment = Assignment(facts.registration, list(facts.placement), facts.holders, edition)
        payload = msgspec.msgpack.encode(assignment)
        spec = hall.spec
        joined_later = int(shard[1:]) >= spec.shards
        begin_with = "" if joined_later else self.begin_with  # it begins with nothing
        message = Assign(
            hall.job,
            shard,
            spec.staleness,
            spec.compress,
            begin_with,
            self.manifest,
            spec.rates,
            resumed_course(hall.resumed),
            Plan.of(spec).shows_noise,
        )
        host = hall.homes.host(shard)
        peer = hall.orders.peers[host]

        def ended(order: asyncio.Task[bool]) -> None:
            if order.cancelled() or hall.orders.peers[hall.homes.host(shard)] != peer:
                return  # the process that has come in its place was given the same order
            if order.result():
                self.assigned.add(shard)
                self.editions[shard] = max(edition, self.editions.get(shard, 0))
                if shard not in facts.took:
                    hall.docket.fact(Took(shard))
                hall.wake()
            elif self.serves(shard) and not self._ending():
                # Its lease shows whether it is gone, or will be heard again; or its disk is full for now.
                if edition or joined_later or peer not in hall.endpoint.peers():
                    asyncio.get_running_loop().call_later(AGAIN_S, again)
                    return
                because = f"{shard} did not take the layout; its log says why"
                hall.dispatch(events.Cancelled(hall.job, because))

        def again() -> None:
            in_place = hall.orders.peers[hall.homes.host(shard)] == peer
            if in_place and self.serves(shard) and not self._ending() and not hall.abandoned:
                self.assign(shard)

        def quiet_s() -> float:
            return FETCH_S if hall.checkpoint_desk.offer.given[host] else READ_S

        if begin_with:
            given = hall.checkpoint_desk.offer.given
            order = hall.orders.send_long(host, message, payload, lambda: given[host], quiet_s)
        else:
            order = hall.orders.send(host, message, payload, ASSIGN_S)
        order.add_done_callback(ended)
        return order

    def _ending(self) -> bool:
        job = self.hall.docket.running
        return job is None or isinstance(job.phase, Finishing)

    def grow(self, shard: str) -> None:
        """A shard has joined. It takes on the layout, with nothing of it so far, and the workers."""
        if self.hall.docket.facts.placement:
            self.assign(shard)
        self.hall.rosters.again(shard)

    def rehome(self, shard: str, incarnation: int) -> None:
        """A shard serves its chunks again: it gets what it has missed, and the scripts its address."""
        if self.hall.docket.facts.placement:
            self.assign(shard)
        self.hall.homes.rehome(shard, incarnation)
        self.hall.rosters.again(shard)
        where = self.hall.homes.addresses(shard)
        for peer in self.hall.docket.facts.scripts.values():
            self.hall.endpoint.notify(peer, Moved(self.hall.job, shard, incarnation, where))

    async def ask(
        self, shard: str, message: Message, payload: bytes | None = None, within_s: float = ORDER_S
    ) -> Answer | None:
        """Ask the process in which this shard lives."""
        return await self.hall.orders.ask(
            self.hall.homes.host(shard), replace(message, shard=shard), payload, within_s
        )

    async def answered(
        self, shard: str, message: Message, payload: bytes | None, within_s: float
    ) -> Answered | None:
        """The same, as `holds` wants it."""
        answer = await self.ask(shard, message, payload, within_s)
        return None if answer is None else Answered(answer.message, bytes(answer.payload or b""))


def digest_of(registration: bytes) -> str:
    """What two workers' layouts are compared by; `layout.Registration.digest` is the same."""
    return hashlib.blake2b(registration, digest_size=16).hexdigest()
