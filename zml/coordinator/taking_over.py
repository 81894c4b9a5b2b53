"""What a coordinator does first that takes another's place: the journal has told it what was decided, and it says
all of it again. An order twice is the same as once.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from ..scheduler import actions
from ..scheduler.ids import Seat as Place
from ..scheduler.ids import WorkerId
from ..scheduler.state import Draining, Finishing, Forming, Running

if TYPE_CHECKING:
    from .coordinator import Coordinator

log = structlog.get_logger()


def take_over(hall: Coordinator) -> None:
    """Another process was the coordinator. Everybody is given time to be heard again, and told what it may have
    missed: an order twice is the same as once."""
    hall.board.recall(hall.facts, asyncio.get_running_loop().time())
    over = hall.machine.over.get(hall.job)
    if over is not None and hall.finished is not None:
        log.info("job was over", job=hall.job, state=over.state.name, because=over.because)
        hall.finished.set_result(over.exit_code)
    job = hall.docket.running
    if job is None:
        return
    because = "the coordinator was started again"
    hall.events.note("the coordinator goes on", because)
    hall.spreading.resume()
    match job.phase:
        case Forming():
            for seat in job.members.seats():
                hall.perform(actions.Launch(hall.job, seat.worker, seat.incarnation, because))
        case Running() | Draining():
            seats = job.members.seats()
            gone = [(m, record.incarnation) for m, record in job.members.gone("worker")]
            known = {*gone, *hall.ledger.incarnations.items()}
            hall.rosters.recall([Place(WorkerId(m), n, False) for m, n in sorted(known)])
            hall.perform(actions.Announce(hall.job, job.generation, seats, because))
            for seat in seats:
                hall.perform(actions.Launch(hall.job, seat.worker, seat.incarnation, because))
            if hall.facts.placement:
                hall.perform(actions.Place(hall.job, hall.facts.placement, because))
            hall.homes.again(because)
            if isinstance(job.phase, Draining):
                hall.perform(actions.Drain(hall.job, job.phase.because))
        case Finishing():
            for member in job.members.everybody():
                hall.perform(actions.Stop(hall.job, member, job.phase.because))
    hall.look_again()
