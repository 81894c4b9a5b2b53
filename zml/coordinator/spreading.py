"""A shard that has joined gets its share, bucket by bucket, while the job trains.

`scheduler.spread` says what moves next, `shard.ceding` how it does; here is the coordinator's side:

    Deciding n              in the journal: from now on shards may be in doubt about edition n
    cut, Cede to the source it gives the buckets to the newcomer, and answers when that one has them
    Spread n                in the journal: n is as it is to be, or, where anything has failed, as it was
    Assign to the newcomer, to the source, to the others; training goes on

Rules: one portion at a time, and the next when all have taken the edition; nothing moves while a shard is away. Where
another process was the coordinator, what it was deciding about stays as it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import structlog

from ..layout import Bucket, Registration, buckets
from ..messages import Cede, Ok
from ..scheduler.ids import shard_id
from ..scheduler.spread import Portion, next_portion
from ..scheduler.state import Running
from .facts import Deciding, Spread
from .holds import NotTaken

if TYPE_CHECKING:
    from .coordinator import Coordinator

PORTION = 1 << 20  # elements: 4 MiB of parameters, and their optimizer state with them
CEDE_S = 10.0  # for a portion to be packed and to arrive
GIVEN_S = 2.0  # for an edition to be taken; then others get it too
LOOK_S = 0.5  # between two looks at whether something may move
AGAIN_S, AGAIN_MOST_S = 1.0, 256.0  # after a move that did not come about; each time twice as long
REST = 4  # times as long as it stood still, training goes on before the next portion

log = structlog.get_logger()


class Spreading:
    """One job's."""

    def __init__(self, hall: Coordinator) -> None:
        self.hall = hall
        self.task: asyncio.Task[None] | None = None
        self._cut: tuple[Bucket, ...] = ()
        self._weights: list[int] = []
        self.most = PORTION  # of one portion
        self.moved = 0  # buckets
        self.at_rest: tuple[int, list[int]] | None = (
            None  # edition and newcomers for which nothing is to move
        )

    def tasks(self) -> list[asyncio.Task[None]]:
        return [self.task] if self.task is not None else []

    def start(self) -> None:
        """There is a newcomer. Twice is the same as once."""
        if self.task is None or self.task.done():
            self.task = asyncio.ensure_future(self._spread())
            self.task.add_done_callback(_tell_of_failure)

    def resume(self) -> None:
        """Another process was the coordinator."""
        facts = self.hall.facts
        if facts.deciding:
            self.hall.docket.fact(Spread(facts.deciding, self._holders()))
        if len(self.hall.shard_desk.all) > self.hall.spec.shards:
            self.start()

    # -- what, and when ----------------------------------------------------------------------------------

    async def _spread(self) -> None:
        """Until the job is over: who has joined may have gone for a while, and others join."""
        hall, pause_s = self.hall, AGAIN_S
        while hall.docket.running is not None:
            portion = self._next() if self._may_move() else None
            if portion is None:
                await hall.pause(asyncio.get_running_loop().time() + LOOK_S)
                continue
            began = asyncio.get_running_loop().time()
            try:
                alike_s, given_s = await self._move(portion)
            except Exception as error:  # each try has training stand still: the next is later, and smaller
                log.warning("not moved", buckets=portion.buckets, because=str(error) or repr(error))
                self.most = max(1, self.most // 2)
                hall.events.note(f"nothing moved to p{portion.target}", str(error) or repr(error))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, AGAIN_MOST_S)
                continue
            pause_s, self.most = AGAIN_S, min(2 * self.most, PORTION)
            held_s = asyncio.get_running_loop().time() - began
            source, target = shard_id(portion.source), shard_id(portion.target)
            self.moved += len(portion.buckets)
            took = {
                "alike_s": round(alike_s, 4),
                "given_s": round(given_s, 4),
                "held_s": round(held_s, 4),
            }
            log.info("moved", source=source, target=target, buckets=portion.buckets, **took)
            await asyncio.sleep(REST * held_s)
            if self._may_move() and self._next() is None:
                hall.events.note(
                    f"{self.moved} buckets moved", f"shards have joined: {', '.join(self._newcomers())}"
                )
                self.moved = 0

    def _may_move(self) -> bool:
        """Is everybody there, and is nothing else under way?"""
        job, desk, facts = self.hall.docket.running, self.hall.shard_desk, self.hall.facts
        return (
            job is not None
            and isinstance(job.phase, Running)
            and self.hall.docket.loaded
            and not job.promoting
            and bool(job.members.workers())
            and self.hall.rosters.at_rest
            and all(desk.serves(shard) and shard in desk.assigned for shard in desk.all)
            and all(desk.editions.get(shard, 0) == facts.edition for shard in desk.all)
        )

    def _newcomers(self) -> list[str]:
        """Those that live in their own process: what others have taken over is not made larger."""
        hall = self.hall
        joined = hall.shard_desk.all[hall.spec.shards :]
        return [shard for shard in joined if hall.homes.host(shard) == shard]

    def _next(self) -> Portion | None:
        newcomers = [int(shard[1:]) for shard in self._newcomers()]
        seen = (self.hall.facts.edition, newcomers)
        if seen == self.at_rest:  # asked again with every change of anything
            return None
        portion = next_portion(self._holders(), self._weights, newcomers, self.most)
        self.at_rest = seen if portion is None else None
        return portion

    def _holders(self) -> list[int]:
        facts = self.hall.facts
        if not self._cut and facts.placement:
            registration = Registration.from_bytes(facts.registration)
            chunks = registration.layout.chunks
            self._cut = buckets(registration.layout, facts.placement, registration.bucket_chunks)
            self._weights = [sum(chunks[chunk].size for chunk in each.chunks) for each in self._cut]
        return facts.holders or [bucket.shard for bucket in self._cut]

    # -- a move --------------------------------------------------------------------------------------------

    async def _move(self, portion: Portion) -> tuple[float, float]:
        """How long it took until all stood alike, and then until the newcomer had it, in seconds.

        Raises NotTaken: then all is as it was, by an edition that says so.
        """
        hall, holders = self.hall, self._holders()
        edition = hall.facts.edition + 1
        hall.docket.fact(Deciding(edition))
        await self._written()
        async with hall.holds.lock:
            number, shards = hall.holds.next(), hall.shard_desk.holding()
            try:
                took = await self._cede(portion, edition, number, shards)
            except Exception:  # whatever it was, what is being decided is decided
                await self._decide(Spread(edition, holders), portion, number, shards)
                raise
            await self._decide(Spread(edition, portion.applied_to(holders)), portion, number, shards)
        return took

    async def _cede(
        self, portion: Portion, edition: int, number: int, shards: Sequence[str]
    ) -> tuple[float, float]:
        hall, source, target = self.hall, shard_id(portion.source), shard_id(portion.target)
        if not shards:
            raise NotTaken("a shard is away")
        began = asyncio.get_running_loop().time()
        front = await hall.holds.stand_alike(number, shards)
        if not hall.rosters.known_at(front.generation):
            raise NotTaken("workers come or go")
        alike_s = asyncio.get_running_loop().time() - began
        lives = [self._life(source), self._life(target)]
        where = hall.homes.addresses(target)
        order = Cede(hall.job, number, edition, list(portion.buckets), target, where)
        answer = await hall.holds.ask(source, order, msgspec.msgpack.encode(front), CEDE_S)
        if answer is None or not isinstance(answer.message, Ok):
            raise NotTaken(f"{source} could not give them to {target}; their logs say why")
        if lives != [self._life(source), self._life(target)]:
            raise NotTaken(f"{source} or {target} has begun another life meanwhile")
        return alike_s, asyncio.get_running_loop().time() - began - alike_s

    def _life(self, shard: str) -> object:
        """Another one after each death and each move."""
        home = self.hall.machine.home(self.hall.job, shard)
        job = self.hall.docket.running
        return home, job and job.members.alive("shard").get(home.host) if home is not None else None

    async def _decide(self, edition: Spread, portion: Portion, number: int, shards: Sequence[str]) -> None:
        """It holds as soon as it is written, and then all go on but those in doubt. Workers look who has what when the
        source refuses them, so the newcomer is told first."""
        desk = self.hall.shard_desk
        self.hall.docket.fact(edition)
        await self._written()
        self.hall.holds.release(number, shards)
        first = [shard_id(portion.target), shard_id(portion.source)]
        for group in ([first[0]], [first[1]], [shard for shard in desk.all if shard not in first]):
            given = [desk.assign(shard) for shard in group if desk.serves(shard)]
            if given:  # who is away gets it when it is back
                await asyncio.wait(given, timeout=GIVEN_S)

    async def _written(self) -> None:
        """Also where the machine dies: shards let go of buckets because of it."""
        while not self.hall.docket.settled():
            await self.hall.pause(asyncio.get_running_loop().time() + LOOK_S)
        if (journal := self.hall.docket.journal) is not None:
            await asyncio.to_thread(journal.sync)


def _tell_of_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("shards that join get nothing more", because=repr(error))
