"""How a checkpoint is cut in BSP, where nothing has to be held up: at a clock to come.

There every shard makes the same updates in the order of their clocks, each of the same steps. So the coordinator names
a clock, and a shard marks what it has (`snapshot`) when it has made the updates of all clocks up to that one and none
of a later one. A shard that is further already says where it stands, and a later clock is named. Whether all were cut
alike the coordinator sees by what they say (`checkpointer`); where that does not come about, it holds them (`holding`).

Rule: a mark holds up nothing, and is forgotten with the next one, with a hold or a release.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING

import msgspec

from ..messages import Mark, Marked
from ..transport import Refusal
from .holding import front_of

if TYPE_CHECKING:
    from .pulling import Reply
    from .shard import Shard
    from .snapshot import Snapshot


class Marking:
    """One shard's newest. In its thread."""

    def __init__(self, shard: Shard, order: Mark) -> None:
        self.shard = shard
        self.order = order
        self.answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.over = False  # cut or forgotten

    def reply(self) -> Awaitable[Reply]:
        """Once it is cut, or cannot be."""
        return asyncio.shield(self.answer)

    def begin(self) -> None:
        """The order has come."""
        if newest(self.shard) > self.order.clock:
            self.over = True
            self.answer.set_result((Marked(cut=False), msgspec.msgpack.encode(front_of(self.shard))))
        else:
            self.look()

    def before(self, clock: int) -> None:
        """The updates of this clock are made next."""
        if not self.over and clock > self.order.clock:
            self._cut()

    def look(self) -> None:
        """Updates were made, or no others can come: nobody stands at such a clock any more."""
        if not self.over:
            clock, low = self.order.clock, self.shard.gate.low
            if newest(self.shard) >= clock or (low is not None and low > clock):
                self._cut()

    def forget(self) -> None:
        """It is not wanted any more."""
        if not self.over:
            self.over = True
            self.answer.set_exception(Refusal("checkpoint", "another cut is made"))
            self.answer.exception()  # perhaps nobody waits any more

    def _cut(self) -> None:
        self.over, began = True, time.perf_counter()
        store = self.shard.store
        assert store is not None
        snapshot, front = store.snapshot(published=False), front_of(self.shard)
        self.shard.copy = (self.order.checkpoint, snapshot)
        held_s = time.perf_counter() - began
        # Workers wait for the parameters: to count bytes has time.
        asyncio.get_running_loop().call_soon(self._say, snapshot, msgspec.msgpack.encode(front), held_s)

    def _say(self, snapshot: Snapshot, front: bytes, held_s: float) -> None:
        self.answer.set_result((Marked(cut=True, bytes=snapshot.bytes, held_s=held_s), front))


def newest(shard: Shard) -> int:
    """The last clock of which updates were made; -1 before the first."""
    return max((last.clock for last in shard.applied.values()), default=-1)


def mark(shard: Shard, order: Mark) -> Awaitable[Reply]:
    """Carry out an order. Twice is the same as once. Raises Refusal."""
    if shard.store is None or not shard.store.ready:
        raise Refusal("checkpoint", f"{shard.name} has no parameters yet")
    if shard.doubt is not None:
        raise shard.doubt.undecided(shard.name)
    if shard.gate.bound != 0:
        raise Refusal("checkpoint", f"{shard.name} is not in sync: its clocks are not those of others")
    if shard.marking is None or shard.marking.order != order:
        forget(shard)
        shard.copy = None  # of a cut that the others did not make
        shard.marking = Marking(shard, order)
        shard.marking.begin()
    return shard.marking.reply()


def forget(shard: Shard) -> None:
    marking, shard.marking = shard.marking, None
    if marking is not None:
        marking.forget()
