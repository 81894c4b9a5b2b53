"""Pulls at one shard: who may have parameters gets them, who asks too early waits here, and is told by name for whom.

Rule: what a pull brings is published before, and that is in the log, for what is chosen depends on when it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ..messages import Delta, Message, Published, Pull, Wait
from ..scheduler.ids import WorkerId
from ..transport import Refusal

if TYPE_CHECKING:
    from .shard import Shard

NAMED = 32  # of those who are waited for, in one answer
HOLD_S = 1.0  # a pull that must wait is answered after this long, with the names of who is waited for

Reply: TypeAlias = Message | tuple[Message, bytes | memoryview | None]


@dataclass(slots=True, eq=False)
class Parked:
    """A pull that came too early; `answer` is resolved when the gate opens or after HOLD_S."""

    pull: Pull
    answer: asyncio.Future[Reply]


class Pulls:
    """One shard's. In its thread."""

    def __init__(self, core: Shard) -> None:
        self.core = core
        self.parked: list[Parked] = []

    def __len__(self) -> int:
        """How many wait."""
        return len(self.parked)

    def pull(self, worker: WorkerId, message: Pull) -> Reply | Awaitable[Reply]:
        _, bucket = self.core.bucket(message.bucket)
        if len(message.have) != len(bucket.chunks):
            raise Refusal(
                "frame", f"bucket {bucket.index} has {len(bucket.chunks)} chunks, not {len(message.have)}"
            )
        parks = not self._may_answer(worker, message.clock)
        self.core.trace.pulling(worker, message.trace, bucket.index, parked=parks)
        if not parks:
            return self._delta(message)
        loop = asyncio.get_running_loop()
        parked = Parked(message, loop.create_future())
        self.parked.append(parked)
        loop.call_later(HOLD_S, self._hold_over, parked)
        return parked.answer

    def go_on(self) -> None:
        """The gate may have opened: answer those that may go."""
        for parked in self.parked:
            may = self._may_answer(WorkerId(parked.pull.worker), parked.pull.clock)
            if may and not parked.answer.done() and self.core.ceded(parked.pull.bucket) is None:
                try:
                    parked.answer.set_result(self._delta(parked.pull))
                except Refusal as refusal:
                    # There is no room: told to who pulls, not to whose step has just counted.
                    parked.answer.set_exception(refusal)
        self.parked = [parked for parked in self.parked if not parked.answer.done()]

    def refuse(self, because: Refusal) -> None:
        """All that wait."""
        parked, self.parked = self.parked, []
        for each in parked:
            if not each.answer.done():
                each.answer.set_exception(because)

    def _may_answer(self, worker: WorkerId, clock: int) -> bool:
        core = self.core
        ready = core.store is not None and core.store.ready
        return ready and worker in core.incarnations and core.gate.may_start(worker, clock)

    def _hold_over(self, parked: Parked) -> None:
        if parked.answer.done() or parked not in self.parked:
            return
        self.parked.remove(parked)
        core, pull = self.core, parked.pull
        if core.no_room:  # and who is waited for is refused
            parked.answer.set_exception(Refusal("full", core.no_room))
            return
        if core.store is not None and core.store.ready:
            names = [str(worker) for worker in core.gate.waiting_for(pull.clock)[:NAMED]]
            because = f"clock {pull.clock} needs them to be at most {core.gate.bound} behind"
        else:
            names, because = [], "nobody has brought the first parameters yet"
        core.trace.waiting(pull.worker, pull.trace, names)
        parked.answer.set_result(Wait(core.job, names, because))

    def _delta(self, pull: Pull) -> Reply:
        core = self.core
        store, bucket = core.bucket(pull.bucket)
        if store.to_publish(bucket.chunks):
            core.note(Published(bucket.index))
        versions, frames, payload = store.pull_bucket(bucket.chunks, pull.have)
        core.counts.pulled(bucket.index, payload)
        core.trace.pulled(pull.worker, pull.trace, bucket.index, len(payload or b""))
        low = core.gate.low
        staleness = max(0, pull.clock - low) if low is not None else 0
        delta = Delta(bucket.index, versions, frames, staleness, len(core.gate.active), core.setting)
        return delta, payload or None
