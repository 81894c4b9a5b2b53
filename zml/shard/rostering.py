"""Workers come and go, as one shard is told: rosters, and what counts of whoever was lost.

The shard's side of `coordinator.rosters`: a two-phase commit whose second phase survives the one who began it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import structlog

from ..hyper import read_hyper
from ..messages import Finished, Message, Seat, Settle, Stands
from ..scheduler.ids import WorkerId
from .counted import NOTHING, Last, Step

if TYPE_CHECKING:
    from .shard import Shard

log = structlog.get_logger()


def muster(core: Shard, seats: Sequence[Seat]) -> None:
    """These are the workers from now on; whoever is not among them, or is one anew, is forgotten."""
    named = {WorkerId(seat.worker): seat.incarnation for seat in seats}
    for worker in list(core.incarnations):
        if named.get(worker) != core.incarnations[worker]:
            _forget(core, worker)
    core.seats, core.incarnations = seats, named
    core.gate.roster(seats)


def _forget(core: Shard, worker: WorkerId) -> None:
    # A committed step stays: it was acknowledged. A step without its commit never counted.
    dropped = core.staged.pop(worker, {})
    core.peers.pop(worker, None)
    core.fenced.pop(worker, None)
    core.last.pop(worker, None)
    core.trace.forget(worker)
    log.info("worker left the gate", shard=core.name, worker=worker, dropped_steps=len(dropped))


def settle(core: Shard, message: Settle) -> tuple[Message, bytes]:
    """The first phase of a loss: from now on nothing of this worker counts but what is said here."""
    worker = WorkerId(message.worker)
    if core.incarnations.get(worker) != message.incarnation:
        return Stands(-1), b""  # it never came so far
    if core.fenced.get(worker) != message.incarnation:
        core.note(message)
        core.fenced[worker] = message.incarnation
    last = core.last.get(worker, NOTHING)
    return Stands(last.clock, last.epoch, last.done), last.hyper


def finish(core: Shard, step: Finished) -> None:
    """The second phase: a step that counts elsewhere counts here, too."""
    worker = WorkerId(step.worker)
    if core.incarnations.get(worker) != step.incarnation or core.store is None:
        return
    if core.last.get(worker, NOTHING).clock >= step.clock:
        return
    # A shard on which nothing is trained is sent nothing.
    staged = core.staged.get(worker, {}).get(step.clock, Step())
    if staged.pushes.keys() != core.pushed:
        # Every push was acknowledged before the first commit left: only a log that lost its end gets here.
        log.error("a counted step is not here", shard=core.name, worker=worker, clock=step.clock)
        return
    if worker not in core.gate.active:
        return  # it never entered here, and nobody waits for it
    last = Last(step.clock, step.epoch, step.done, step.hyper, step.incarnation)
    core.count(worker, staged, read_hyper(step.hyper, core.store.spec), last)
