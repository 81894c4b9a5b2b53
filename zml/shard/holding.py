"""How shards that do not stop are held: nothing counts for a moment, and all come to stand alike. So a checkpoint is
cut through them, where it is not cut without (`marking`), and so a bucket goes from one to another (`ceding`).

    Hold    what would count from now on waits
    Align   what counts on some shard counts here too; repeated until all stand alike
    Snap    parameters and optimizer state are marked (`snapshot`), and everything goes on; they are written beside it

A worker commits when all shards have staged its step, so to stand alike takes no more than the time in which a message
is on its way. In BSP a step may count and wait for the others' of its clock: it is not in the parameters, and
`applied` leaves it out on all shards alike.

Rule: whoever holds lets go by itself after HOLD_MOST_S, whatever became of the one who asked; only a shard in doubt
(`doubt`) holds until it knows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import msgspec
import structlog

from ..messages import Advance, Commit, Enter, Front
from ..transport import Refusal

if TYPE_CHECKING:
    from .pulling import Reply
    from .shard import Shard

HOLD_MOST_S = 5.0

log = structlog.get_logger()
Applied: TypeAlias = tuple[int, int, int, int]  # clock, epoch, done, incarnation
Waits: TypeAlias = Commit | Enter | Advance


@dataclass(slots=True)
class Waiting:
    """A message that would count."""

    peer: str
    message: Waits
    payload: memoryview | None
    answer: asyncio.Future[Reply]


class Holding:
    """What one shard does not let count. In the shard's thread."""

    def __init__(self, shard: Shard, checkpoint: int, handle: Callable[[Waiting], Reply]) -> None:
        self.shard = shard
        self.checkpoint = checkpoint
        self.queue: list[Waiting] = []
        self.began = time.perf_counter()
        self._handle = handle
        self._timer = asyncio.get_running_loop().call_later(HOLD_MOST_S, self._too_long)
        self.over = False

    def wait(self, peer: str, message: Waits, payload: memoryview | None) -> Awaitable[Reply]:
        """Answered when it counts."""
        waiting = Waiting(peer, message, payload, asyncio.get_running_loop().create_future())
        self.queue.append(waiting)
        return waiting.answer

    def align(self, counted: dict[str, int], stands: dict[str, int]) -> None:
        """Let go what does not lead beyond: steps up to `counted`, rests up to `stands`."""
        queue, self.queue = self.queue, []
        for waiting in queue:
            message = waiting.message
            match message:
                case Commit():
                    go = message.clock <= counted.get(message.worker, -1)
                case Advance():
                    go = message.clock <= stands.get(message.worker, 0)
                case Enter():
                    go = True
            if go:
                self._go(waiting)
            else:
                self.queue.append(waiting)

    def release(self) -> None:
        """Let everything go on. Twice is the same as once."""
        self.over = True
        self._timer.cancel()
        queue, self.queue = self.queue, []
        for waiting in queue:
            self._go(waiting)

    def stay(self) -> None:
        """From now on it is for others to let go, whatever that takes."""
        self._timer.cancel()

    def _go(self, waiting: Waiting) -> None:
        if waiting.answer.done():  # nobody waits for it any more
            return
        try:
            waiting.answer.set_result(self._handle(waiting))
        except Refusal as refusal:
            waiting.answer.set_exception(refusal)

    def _too_long(self) -> None:
        log.warning("held for too long: it goes on", shard=self.shard.name)
        self.release()


def front_of(shard: Shard) -> Front:
    """Where a shard stands: two that say the same hold the same steps in their parameters."""
    gate = shard.gate
    return Front(
        generation=shard.generation,
        stands={str(worker): stand.clock for worker, stand in gate.active.items()},
        counted={str(worker): last.clock for worker, last in shard.last.items()},
        applied={
            str(worker): (last.clock, last.epoch, last.done, last.incarnation)
            for worker, last in shard.applied.items()
        },
        updates=shard.steps,
        course=shard.pace.course,
        orphans=any(
            step.last.incarnation != shard.incarnations.get(worker)
            for steps in shard.committed.values()
            for worker, step in steps.items()
        ),
    )


def must_stand(shard: Shard, agreed: bytes | memoryview) -> None:
    """Raises Refusal where it does not stand at this `Front`: a roster that came since may have let a step count."""
    if msgspec.msgpack.decode(agreed, type=Front) != front_of(shard):
        raise Refusal("checkpoint", f"{shard.name} stands elsewhere than all had agreed")


def alike(fronts: list[Front]) -> bool:
    """May the cut be made now? A step of a worker that is gone must be in the parameters, for its batches are
    counted as done."""
    return all(front == fronts[0] for front in fronts) and not fronts[0].orphans


def cut_alike(one: Front, other: Front) -> bool:
    """Do two cuts hold the same steps, of the same workers? Where these stand, and what of theirs has come since, is of
    no account."""
    return not (one.orphans or other.orphans) and (
        (one.generation, one.applied, one.updates, one.course)
        == (other.generation, other.applied, other.updates, other.course)
    )


def furthest(fronts: list[Front]) -> tuple[dict[str, int], dict[str, int]]:
    """What all are to come up to: the newest step that counts of each worker, and where each stands."""
    counted: dict[str, int] = {}
    stands: dict[str, int] = {}
    for front in fronts:
        for worker, clock in front.counted.items():
            counted[worker] = max(counted.get(worker, -1), clock)
        for worker, clock in front.stands.items():
            stands[worker] = max(stands.get(worker, 0), clock)
    return counted, stands
