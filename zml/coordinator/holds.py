"""All shards are held: nothing counts for a moment, and they come to stand alike (`shard.holding`).

    Hold    what would count from now on waits
    Align   what counts on some shard counts here too; repeated until all stand alike

One at a time holds: for a checkpoint (`cutting`), or for buckets that move (`spreading`). Rule: whoever holds lets go
afterwards, whatever became of it; who cannot be told lets go by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import msgspec
from msgspec import Struct

from ..messages import Align, Front, Held, Hold, Message, Release
from ..shard.holding import HOLD_MOST_S, alike, furthest

ALIGN_S = HOLD_MOST_S - 1.0
AGAIN_S = 0.003


class Answered(NamedTuple):
    message: Struct
    payload: bytes


Ask = Callable[[str, Message, bytes | None, float], Awaitable[Answered | None]]  # None: no answer


class NotTaken(Exception):
    """Why there is no cut this time, as a sentence."""


class Holds:
    """One job's. `number` is the newest cut's; `lock` is held by whoever makes one."""

    def __init__(self, job: str, ask: Ask, before: int = 0) -> None:
        """`before`: how many coordinators there were. No number is given twice."""
        self.job = job
        self.ask = ask
        self.lock = asyncio.Lock()
        self.number = before << 32
        self.releases: set[asyncio.Future[Answered | None]] = set()

    def next(self) -> int:
        self.number += 1
        return self.number

    async def stand_alike(self, number: int, shards: Sequence[str]) -> Front:
        """Where all of them stand from now on. Raises NotTaken."""
        loop = asyncio.get_running_loop()
        until = loop.time() + ALIGN_S
        fronts = await self._fronts(shards, Hold(self.job, number), None)
        pause_s = 0.0  # what is on its way is mostly there by the time the first order is
        while not alike(fronts):
            if loop.time() > until:
                apart = [shard for shard, front in zip(shards, fronts, strict=True) if front != fronts[0]]
                raise NotTaken(f"{', '.join(apart) or shards[0]} did not come to where the others stand")
            await asyncio.sleep(pause_s)
            pause_s = AGAIN_S
            target = msgspec.msgpack.encode(furthest(fronts))
            fronts = await self._fronts(shards, Align(self.job, number), target)
        return fronts[0]

    def release(self, number: int, shards: Sequence[str]) -> None:
        """Also those that have let go already."""
        for shard in shards:
            task = asyncio.ensure_future(self.ask(shard, Release(self.job, number), None, ALIGN_S))
            self.releases.add(task)
            task.add_done_callback(self.releases.discard)

    async def _fronts(self, shards: Sequence[str], message: Message, payload: bytes | None) -> list[Front]:
        answers = await asyncio.gather(*(self.ask(shard, message, payload, ALIGN_S) for shard in shards))
        found = []
        for shard, answer in zip(shards, answers, strict=True):
            if answer is None or not isinstance(answer.message, Held):
                raise NotTaken(f"{shard} did not answer {type(message).__name__}")
            found.append(msgspec.msgpack.decode(answer.payload, type=Front))
        return found
