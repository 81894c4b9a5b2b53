"""What comes of a member's heartbeat: its lease begins anew, and it is answered; a stranger is told why it is one.

Rule: the lease is as long as the member's own word asks for, or what is asked of it now, whichever is longer, and never
longer than what has been asked for. So a coordinator of thousands may ask all of them for fewer heartbeats: whoever has
not heard it yet, or hears it late, is not given up. Of what a former process has asked for only the limit is known. A
lease that is longer stays so until its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..lease import SLOWEST, ping_s
from ..messages import Fenced, Heartbeat, Pulse, Stop
from ..scheduler import events
from ..stragglers import seldom

if TYPE_CHECKING:
    from .coordinator import Coordinator


class Heartbeats:
    """One job's. `slower`: so many times seldomer than was asked for members are to be heard, now."""

    def __init__(self, hall: Coordinator, slower: Callable[[], float]) -> None:
        self.hall = hall
        self.slower = slower
        self.most = SLOWEST if hall.docket.resumed else 1.0  # that may have been asked for
        self.paces: dict[str, float] = {}  # of members: how much seldomer they speak than usual
        self.seen_off: set[str] = set()  # peers that were told of the end when they were heard after it

    def _slower(self) -> float:
        """As is asked for now."""
        slower = min(self.slower(), SLOWEST)
        self.most = max(self.most, slower)
        return slower

    def begin(self, peer: str, member: str, incarnation: int) -> float:
        """It has just become a member. Returns what its heartbeats begin with: among thousands they are seldom from the
        first one on, which may be late, too."""
        hall, slower = self.hall, self._slower()
        every_s = hall.begun.heartbeat_s * slower
        self.paces[member] = slower
        if slower > 1.0:
            hall.dispatch(events.Renewed(hall.job, member, incarnation, slower))
            hall.endpoint.pace(peer, ping_s(every_s))
        return every_s

    def take(self, peer: str, message: Heartbeat) -> None:
        hall = self.hall
        current = hall.is_current(message.member, message.incarnation)
        if current and hall.is_member_at(message.member, peer):
            usual_s = hall.begun.heartbeat_s
            slower = self._slower()
            speaks = min(max(1.0, message.every_s / usual_s), self.most)
            if speaks != self.paces.get(message.member, 1.0):
                self.paces[message.member] = speaks
                hall.endpoint.pace(peer, ping_s(speaks * usual_s))
            times = max(speaks, slower)
            hall.dispatch(events.Renewed(hall.job, message.member, message.incarnation, times))
            hall.board.heard(message.member, asyncio.get_running_loop().time(), seldom(speaks * usual_s))
            hall.endpoint.notify(peer, Pulse(hall.job, hall.machine.generation(hall.job), usual_s * slower))
            return
        job = hall.docket.running
        if job is None:  # it did not hear of the end
            if peer not in self.seen_off:
                self.seen_off.add(peer)
                hall.orders.stranger(peer, Stop(hall.job, "the job is over"))
            return
        # It was told when it was fenced, if it could be reached then.
        because = "another process took its place"
        if not current:
            because = job.members.why_not(message.member, message.incarnation)
            if message.member not in job.members.records:
                because += " of this job, as far as the coordinator's journal says"
        hall.endpoint.notify(peer, Fenced(hall.job, message.member, message.incarnation, because))
