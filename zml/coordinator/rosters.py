"""Every generation's roster comes to every shard, and what a lost worker has left behind is settled before.

A worker may be lost between its commits to two shards. Then the shards are asked where it stands, which also makes
them take nothing more from it; the furthest answer counts, on all of them, because a worker commits only what every
shard has staged (`shard.shard`). The same answer says which of its batches are in the parameters: those are
committed in the ledger, and the others dealt again. Only then does the new roster go out.

Rule: a shard that is away is waited for, where all have to answer; its absence keeps no roster from the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import msgspec
import structlog

from ..messages import Finished, Muster, Roster, Seat, Settle, Stands
from ..scheduler.ids import JobId, WorkerId
from ..scheduler.ids import Seat as Place

AGAIN_S = 0.25  # a shard that did not answer is asked again after this, or when it is back

log = structlog.get_logger()


class Account(NamedTuple):
    """What one shard says of a lost worker."""

    stands: Stands
    hyper: bytes


class Desk(Protocol):
    """Where the data ledger is kept (`dealer`)."""

    def members(self, seats: Iterable[Place]) -> None:
        """These are the workers now."""
        ...

    def settle(self, worker: WorkerId, incarnation: int, clock: int, epoch: int, done: int) -> None:
        """This worker is lost, and got so far."""
        ...


class Debts(Protocol):
    """Steps that a shard is still to count. They outlive this process (`docket`)."""

    def owe(self, shard: str, step: Finished) -> None: ...

    def to(self, shard: str) -> Sequence[Finished]: ...

    def paid(self, shard: str, step: Finished) -> None: ...


Ask = Callable[[str, Settle], Awaitable[Account | None]]  # None: no answer
Bring = Callable[[str, Roster, bytes], Awaitable[bool]]  # is it taken?


def last_step(worker: str, incarnation: int, accounts: Iterable[Account]) -> Finished | None:
    """The newest step that counts on any shard, and so is to count on all; None where no step does."""
    stands, hyper = max(accounts, key=lambda account: account.stands.clock)
    if stands.clock < 0:
        return None
    return Finished(worker, incarnation, stands.clock, stands.epoch, stands.done, hyper)


class Rosters:
    """One job's. `announce` and `again` may be called at any time; what they begin is done in tasks."""

    def __init__(
        self,
        job: JobId,
        desk: Desk,
        shards: Callable[[], Sequence[str]],
        ask: Ask,
        bring: Bring,
        debts: Debts,
        asked: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        """`shards` are told of rosters; those that are `asked` where a worker stands, if not all of them are."""
        self.job = job
        self.desk = desk
        self.shards = shards
        self.asked = asked or shards
        self.ask = ask
        self.bring = bring
        self.changed: Callable[[], None] = lambda: None  # told when the ledger has changed
        self.written: Callable[[], bool] = lambda: True  # is what was decided safe, so that it may be told?
        self.wanted: tuple[int, tuple[Place, ...]] = (0, ())  # the newest generation
        self.settled: tuple[int, tuple[Place, ...]] = (0, ())  # the newest that may go out
        self.debts = debts
        self.couriers: dict[str, asyncio.Task[None]] = {}  # shard -> who brings it the newest roster
        self.settling: asyncio.Task[None] | None = None
        self.woken = asyncio.Event()

    def announce(self, generation: int, seats: Sequence[Place]) -> None:
        """These are the workers now."""
        self.wanted = (generation, tuple(seats))
        if self.settling is None or self.settling.done():
            self.settling = asyncio.ensure_future(self._settle_all())
            self.settling.add_done_callback(_tell_of_failure)

    def recall(self, places: Iterable[Place]) -> None:
        """Another process was the coordinator, and these workers were or are in the job: whoever is no more in it is
        settled once again, for the shards may not have heard to the end what became of it."""
        self.settled = (0, tuple(places))

    def known_at(self, generation: int) -> bool:
        """Does a shard of this generation know whatever is settled?"""
        return generation == self.settled[0] == self.wanted[0]

    @property
    def at_rest(self) -> bool:
        """Have all shards that are there taken the newest?"""
        return self.settled[0] == self.wanted[0] and all(task.done() for task in self.couriers.values())

    def again(self, shard: str) -> None:
        """This shard has come back: it may have missed the newest roster."""
        self.woken.set()
        if self.settled[0]:
            self._send(shard)

    async def settle_now(self, worker: str, incarnation: int) -> None:
        """Before this worker is taken out: what it did is to be known. Twice is the same as once."""
        for place in self.settled[1]:
            if (place.worker, place.incarnation) == (worker, incarnation):
                await self._settle(place)

    def tasks(self) -> list[asyncio.Task[None]]:
        """What is under way."""
        return [*self.couriers.values(), *([self.settling] if self.settling is not None else [])]

    async def _settle_all(self) -> None:
        while self.settled[0] < self.wanted[0]:
            generation, seats = self.wanted
            here = {(seat.worker, seat.incarnation) for seat in seats}
            gone = [place for place in self.settled[1] if (place.worker, place.incarnation) not in here]
            for place in gone:
                await self._settle(place)
            self.desk.members(seats)
            while not self.written():
                await asyncio.sleep(AGAIN_S)
            self.settled = (generation, seats)
            self.changed()
            for shard in self.shards():
                self._send(shard)

    async def _settle(self, place: Place) -> None:
        message = Settle(self.job, place.worker, place.incarnation)
        shards = self.asked()
        if not shards:
            return  # the job is over
        accounts = await asyncio.gather(*(self._account(shard, message) for shard in shards))
        if place not in self.settled[1]:
            return  # it was settled meanwhile: a shard that has heard of that since has forgotten this worker
        last = last_step(place.worker, place.incarnation, accounts)
        if last is None:
            return
        for shard, account in zip(shards, accounts, strict=True):
            if account.stands.clock < last.clock:
                self.debts.owe(shard, last)
        self.desk.settle(place.worker, place.incarnation, last.clock, last.epoch, last.done)
        log.info(
            "settled",
            worker=place.worker,
            incarnation=place.incarnation,
            clock=last.clock,
            behind=[shard for shard, a in zip(shards, accounts, strict=True) if a.stands.clock < last.clock],
        )

    async def _account(self, shard: str, message: Settle) -> Account:
        while (account := await self.ask(shard, message)) is None:
            self.woken.clear()
            try:
                async with asyncio.timeout(AGAIN_S):
                    await self.woken.wait()
            except TimeoutError:
                pass
        return account

    def _send(self, shard: str) -> None:
        """Only the newest roster matters: one that is still under way to this shard is dropped."""
        if (former := self.couriers.get(shard)) is not None:
            former.cancel()
        self.couriers[shard] = asyncio.ensure_future(self._carry(shard))

    async def _carry(self, shard: str) -> None:
        """Until it is taken: a shard may be away, or have no room on its disk."""
        generation, places = self.settled
        seats = [Seat(place.worker, place.incarnation, place.founder) for place in places]
        while True:
            owed = list(self.debts.to(shard))
            payload = msgspec.msgpack.encode(Muster(seats, owed))
            if await self.bring(shard, Roster(self.job, generation), payload):
                for step in owed:
                    self.debts.paid(shard, step)
                if owed:
                    self.changed()
                return
            await asyncio.sleep(AGAIN_S)


def _tell_of_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a generation was not brought to the shards", because=repr(error))
