"""What a checkpoint is of: each shard has marked what it has, all of them the same steps.

In sync they mark it after one clock to come, and nothing stands still (`shard.marking`). Else, and where that does not
come about, they are held until they stand alike (`cutting`).

Rule: the data ledger is taken at the same cut, from what the shards say they have applied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from ..messages import Front, Mark, Marked, Snap, Snapped
from ..shard.holding import cut_alike
from ..tracing.trees import Tree
from .cutting import AGAIN_S, ALIGN_S, Cutting, NotTaken

MARK_S = 5.0  # for the clock that was named to come; a step that takes longer can as well be held up
MARKS = 7  # clocks that are named, the last 32 ahead


class Cut(NamedTuple):
    """What the coordinator adds, as it is when the shards stand alike."""

    registration: bytes
    epoch: int
    ledger: dict[str, Any]
    job: dict[str, Any]
    files: Mapping[str, bytes]  # further files, if there are any


# None: who belongs to the job is just changing, and the ledger with it. True: the shards have gone on since.
At = Callable[[Front, bool], Cut | None]


class Agreed(NamedTuple):
    """All shards have marked the same steps."""

    front: Front
    cut: Cut
    sizes: dict[str, int]  # bytes of each
    held_s: float


class Agreeing:
    """One job's. `at` takes the ledger; `in_sync`: is it BSP?"""

    def __init__(self, cutting: Cutting, at: At, *, in_sync: bool) -> None:
        self.cutting = cutting
        self.at = at
        self.in_sync = in_sync

    async def agree(self, number: int, shards: Sequence[str], tree: Tree, *, moves: bool) -> Agreed:
        """By who holds the lock of `cutting`. Raises NotTaken. `moves`: are steps made?"""
        try:
            if self.in_sync and moves:
                with tree.within("zml.checkpoint.mark"):
                    agreed = await self._marks(number, shards)
                if agreed is not None:
                    return agreed
            with tree.within("zml.checkpoint.hold"):
                return await self._holds(number, shards)
        finally:
            self.cutting.release(number, shards)

    async def _marks(self, number: int, shards: Sequence[str]) -> Agreed | None:
        """All shards have marked what they had after one clock. None where that does not come about."""
        loop = asyncio.get_running_loop()
        until = loop.time() + MARK_S
        clock, ahead = -1, 1  # before the first: mostly they say that they are further, and where
        for _ in range(MARKS):
            mark, left_s = Mark(self.cutting.job, number, clock), until - loop.time()
            if left_s <= 0:
                return None
            answers = await asyncio.gather(*(self.cutting.ask(shard, mark, None, left_s) for shard in shards))
            marked = [
                (answer.message, msgspec.msgpack.decode(answer.payload, type=Front))
                for answer in answers
                if answer is not None and isinstance(answer.message, Marked)
            ]
            if len(marked) < len(shards):
                return None
            front = marked[0][1]
            if all(one.cut and cut_alike(each, front) for one, each in marked):
                if (cut := self.at(front, True)) is not None:
                    sizes = {shard: one.bytes for shard, (one, _) in zip(shards, marked, strict=True)}
                    return Agreed(front, cut, sizes, max(one.held_s for one, _ in marked))
            clocks = (last[0] for _, each in marked for last in each.applied.values())
            clock = max(clocks, default=-1) + ahead
            ahead *= 2
        return None

    async def _holds(self, number: int, shards: Sequence[str]) -> Agreed:
        """The same, while nothing counts."""
        loop = asyncio.get_running_loop()
        until = loop.time() + ALIGN_S
        while True:
            front = await self.cutting.stand_alike(number, shards)
            if (cut := self.at(front, False)) is not None:
                agreed, snap = msgspec.msgpack.encode(front), Snap(self.cutting.job, number)
                answers = await asyncio.gather(
                    *(self.cutting.ask(shard, snap, agreed, ALIGN_S) for shard in shards)
                )
                copied = [
                    answer.message
                    for answer in answers
                    if answer is not None and isinstance(answer.message, Snapped)
                ]
                if len(copied) == len(shards):
                    sizes = {shard: one.bytes for shard, one in zip(shards, copied, strict=True)}
                    return Agreed(front, cut, sizes, max(one.held_s for one in copied))
            if loop.time() > until:
                raise NotTaken("workers came and went all the time")
            await asyncio.sleep(AGAIN_S)
