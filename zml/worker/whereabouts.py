"""Where the shards are, and which of them holds what, as one worker knows it.

A shard that was lost, lives elsewhere, or refuses whoever has not looked since buckets have moved, is looked for at the
coordinator, by one search however many wait for it; it is found when it answers and knows this worker. Each time that
happens it begins another life, and what waited in the one before is said again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from ..agent.seat import Seat
from ..errors import FENCED, ZmlError
from ..layout import Bucket
from ..messages import Enter, Homes, Message, Moved, Wait, Where
from ..transport import Answer, DeadlineExceeded, Endpoint, PeerLost, Refused

if TYPE_CHECKING:
    Ask = Callable[[Message], Awaitable[Answer]]

CONNECT_S = 5.0  # to a shard at an address that the coordinator has just given
LOOK_S = 2.0  # while an answer is waited for: is its shard still there?
RETRY_S = 0.1
FULL = "full"  # a shard refuses so what it cannot write down: until there is room
UNMET = -1

log = structlog.get_logger()


class Whereabouts:
    """One worker's. `ask` is answered by the coordinator, `waiting` says who is waited for and raises after a while,
    which begins anew with `spare`."""

    def __init__(
        self,
        seat: Seat,
        bulk: Endpoint,
        ask: Ask,
        waiting: Callable[[Wait, float], None],
        spare: Callable[[], None],
    ) -> None:
        self.seat = seat
        self.bulk = bulk
        self.ask = ask
        self.waiting = waiting
        self.spare = spare
        self.shards: list[str] = []  # those that hold something
        self.edition = 0  # of the placement
        self.holders: list[int] = []  # by bucket, a shard's number; empty: as they were cut
        self.lives: dict[
            str, int
        ] = {}  # by shard: how often it was found again; UNMET before it was found at all
        self.homes: dict[str, int] = {}  # by shard: the incarnation that was found, 0 before the first loss
        self.searches: dict[str, asyncio.Task[None]] = {}  # for shards that are lost
        self.asking = 0  # requests to shards that wait for an answer
        self.looking: asyncio.TimerHandle | None = None  # None: nobody waits

    @property
    def me(self) -> dict[str, Any]:
        return {"job": self.seat.job, "worker": self.seat.worker, "incarnation": self.seat.incarnation}

    def holder(self, bucket: Bucket) -> str:
        """The shard that holds it."""
        return f"p{self.holders[bucket.index] if self.holders else bucket.shard}"

    def know(self, homes: Homes) -> None:
        """Who holds what from now on."""
        self.edition, self.holders = homes.edition, homes.holders
        # A shard that holds nothing of this model has nothing to say to its workers.
        holding = {homes.shards[index] for index in homes.holders or homes.placement}
        self.shards = [shard for shard in homes.shards if shard in holding]
        for shard in self.shards:
            self.lives.setdefault(shard, UNMET)
            self.homes.setdefault(shard, 0)

    def met(self, shards: Iterable[str]) -> None:
        """These hold something, and answer."""
        self.shards = list(shards)
        self.lives = dict.fromkeys(self.shards, 0)
        self.homes = dict.fromkeys(self.shards, 0)

    async def meet_all(self, homes: Homes) -> None:
        """Reach every shard that holds something, for the first time."""
        self.know(homes)
        for shard, addresses in zip(homes.shards, homes.addresses, strict=True):
            if shard not in self.shards:
                continue
            self.lives[shard] = 0
            try:
                await self.bulk.connect(shard, addresses, timeout_s=CONNECT_S)
            except PeerLost:
                await self.find_again(shard, 0)

    # -- what is lost --------------------------------------------------------------------------------------

    async def request(self, shard: str, message: Message, payload: Any, within_s: float) -> Answer:
        """Ask a shard, and see to it that one that is silent is looked for."""
        self.asking += 1
        if self.looking is None:
            self.looking = asyncio.get_running_loop().call_later(LOOK_S, self._look)
        try:
            return await self.bulk.request(shard, message, payload, timeout_s=within_s)
        finally:
            self.asking -= 1

    def _look(self) -> None:
        """A notice that a shard has moved may be lost, or overtake the loss: who does not answer is looked for."""
        self.looking = None
        if not self.asking:
            return
        peers = self.bulk.peers()
        for shard in self.shards:
            if shard in peers and not peers[shard].connected:
                self._search(shard)
        self.looking = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def moved(self, message: Moved) -> None:
        """The coordinator says that a shard has come back: what waits for its former self waits in vain."""
        if message.shard in self.homes and self.homes[message.shard] < message.incarnation > 1:
            self._search(message.shard)

    async def find_again(self, shard: str, life: int) -> None:
        """Returns when the shard answers again in a later life than this one."""
        if self.lives[shard] == life:
            await asyncio.shield(self._search(shard))

    def _search(self, shard: str) -> asyncio.Task[None]:
        """One search for each shard, whoever needs it."""
        search = self.searches.get(shard)
        if search is None or search.done():
            search = self.searches[shard] = asyncio.ensure_future(self._find(shard))
            search.add_done_callback(lambda task: task.cancelled() or task.exception())
        return search

    async def _find(self, shard: str) -> None:
        """Ask the coordinator where the shard is until it answers there, and make this worker known to it."""
        until = asyncio.get_running_loop().time() + self.seat.patience_s
        while True:
            told = await self.ask(Where(shard=shard, edition=self.edition, **self.me))
            answer = told.message
            if isinstance(answer, Wait):
                self.waiting(answer, until)
                await asyncio.sleep(RETRY_S)
                continue
            assert isinstance(answer, Moved), answer
            if told.payload is not None:
                homes = msgspec.msgpack.decode(bytes(told.payload), type=Homes)
                if homes.edition > self.edition:  # another search may have heard more
                    self.know(homes)
            try:
                self.bulk.disconnect(shard)  # a former process' connections say nothing of this one
                await self.bulk.connect(shard, answer.addresses, timeout_s=CONNECT_S)
                enter = Enter(known=True, edition=self.edition, **self.me)
                await self.bulk.request(shard, enter, timeout_s=CONNECT_S)
            except (DeadlineExceeded, PeerLost, Refused) as error:
                if isinstance(error, Refused) and error.code == "fenced":
                    raise ZmlError(FENCED, f"{self.seat.worker}: {error.because}") from error
                if isinstance(error, Refused) and error.code == FULL:
                    self.spare()
                self.waiting(Wait(self.seat.job, [shard], str(error)), until)
                await asyncio.sleep(RETRY_S)
                continue
            self.homes[shard] = answer.incarnation
            self.lives[shard] += 1
            log.info(
                "shard found again", worker=self.seat.worker, shard=shard, incarnation=answer.incarnation
            )
            return
