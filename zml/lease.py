"""A member keeps its lease: heartbeats to the coordinator, and the end when that stays silent for too long.

A coordinator of thousands asks for fewer of them. Rule: each heartbeat says when the next will come, and that is never
much later than the one before said, so that the lease which is known there covers some that are lost.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING, Literal

import msgspec
import structlog

from .errors import LOST, UNREACHABLE, ZmlError
from .logs import outlets as logs
from .messages import Fenced, Heartbeat, JobSpec, Join, Joined, Leave, Message, Pulse
from .transport import CONTROL, Answer, DeadlineExceeded, Endpoint, PeerLost, Refused, TransportError

if TYPE_CHECKING:
    from .config import Settings

COORDINATOR = "coordinator"
GOODBYE_S = 3.0  # a coordinator that was started again mostly answers within this time
ASK_S = 5.0
RETRY_S = 0.1
SAY_S = 5.0  # of silence, before it is said; and so many heartbeats
SAY_BEATS = 3
PING_BEATS = 1.5
SLOWEST = 30.0  # times as long as usual; what is asked beyond it is not done
SLOWER = 1.5  # times as long from one heartbeat to the next, at most: a lease lasts for three and more
AWAY_FIX = "Start it again with the same --run-dir: it goes on where it was, and the members find it."
NO_ROOM = "no-room"  # the coordinator refuses so what it cannot write down: to be asked again

log = structlog.get_logger()


def ping_s(heartbeat_s: float) -> float:
    """How often a connection is pinged on which heartbeats go: no ping is needed while they are answered."""
    return max(CONTROL.ping_s, PING_BEATS * heartbeat_s)


class Lease:
    """One member's place in the job. `heard` is to be called at every sign of life of the coordinator."""

    def __init__(self, endpoint: Endpoint, joined: Joined, spec: JobSpec, away_s: float) -> None:
        self.endpoint = endpoint
        self.joined = joined
        self.spec = spec
        self.away_s = away_s
        self.heard_at = asyncio.get_running_loop().time()
        self.waiting = False  # and it was said
        # Between two heartbeats, as the coordinator wants it now, and at first.
        self.asked_s = self.first_s = min(
            max(joined.heartbeat_s, joined.every_s), SLOWEST * joined.heartbeat_s
        )

    def heard(self, pulse: Pulse) -> None:
        usual_s = self.joined.heartbeat_s
        if usual_s <= pulse.every_s <= SLOWEST * usual_s:  # and no NaN
            self.asked_s = pulse.every_s
        now = asyncio.get_running_loop().time()
        if self.waiting:
            log.info("the coordinator is back", member=self.joined.member, away_s=round(now - self.heard_at))
            self.waiting = False
        self.heard_at = now

    def is_mine(self, fenced: Fenced) -> bool:
        """Does this order mean this very process, and not a former self of the same name?"""
        return (fenced.member, fenced.incarnation) == (self.joined.member, self.joined.incarnation)

    async def keep(self) -> ZmlError:
        """Send heartbeats; returns, with the reason, only when the coordinator has been silent for too long.

        It may have died, and be started again: meanwhile training goes on, and the transport dials by itself.
        """
        loop = asyncio.get_running_loop()
        every_s = self.first_s
        if every_s != self.joined.heartbeat_s:
            self.endpoint.pace(COORDINATOR, ping_s(every_s))
        while (silent_s := loop.time() - self.heard_at) < max(self.away_s, SAY_BEATS * every_s):
            if silent_s > max(SAY_S, SAY_BEATS * every_s) and not self.waiting:
                self.waiting = True
                log.warning("waiting for the coordinator", member=self.joined.member, at_most_s=self.away_s)
            if self.asked_s != every_s:
                every_s = min(self.asked_s, SLOWER * every_s)
                self.endpoint.pace(COORDINATOR, ping_s(every_s))
            beat = Heartbeat(self.joined.job, self.joined.member, self.joined.incarnation, every_s)
            self.endpoint.notify(COORDINATOR, beat)
            due = loop.time() + every_s
            # A coordinator that was started again does not know for how long it would have to wait.
            await self.endpoint.found(COORDINATOR, timeout_s=every_s, anew=True)
            if (late_s := loop.time() - due) > every_s:
                self.heard_at += late_s  # while this process was held up nobody could be heard
        return ZmlError(
            LOST, f"{self.joined.member}: the coordinator has been silent for {self.away_s:g} s", AWAY_FIX
        )

    async def leave(self, because: str) -> None:
        """Say goodbye: nothing of this member is in flight. A coordinator that is gone is not waited for long."""
        goodbye = Leave(self.joined.job, self.joined.member, self.joined.incarnation, because)
        try:
            await ask(self.endpoint, goodbye, within_s=GOODBYE_S)
        except TransportError as error:
            log.warning("left without a goodbye", because=str(error))


async def ask(endpoint: Endpoint, message: Message, *, within_s: float, each_s: float = ASK_S) -> Answer:
    """Ask the coordinator, which may die meanwhile and be started again: once more, as long as there is time.

    The request may then be handled twice, which is to be the same as once. Raises as `Endpoint.request`.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + within_s
    while True:
        left_s = max(until - loop.time(), RETRY_S)
        try:
            return await endpoint.request(COORDINATOR, message, timeout_s=min(each_s, left_s))
        except (Refused, PeerLost, DeadlineExceeded) as error:
            if not worth_asking_again(error) or loop.time() + RETRY_S >= until:
                raise
        await asyncio.sleep(RETRY_S)


def worth_asking_again(error: TransportError) -> bool:
    """May the coordinator give another answer later?"""
    match error:
        case Refused():
            return error.code == NO_ROOM
        case PeerLost():
            return error.peer == COORDINATOR  # or it is our own endpoint that has ended
    return isinstance(error, DeadlineExceeded)


async def join(
    endpoint: Endpoint,
    settings: Settings,
    role: Literal["worker", "shard"],
    member: str,
    *,
    device: str = "cpu",
    former: int = 0,
    addresses: list[str] | None = None,
    metrics: str = "",
) -> Lease:
    """Reach the coordinator and become a member. Raises ZmlError that says who did not answer, or why it said no."""
    where = ", ".join(settings.coordinator)
    wish = Join(
        job=settings.attempt,  # or whichever job this coordinator serves
        role=role,
        member=member,
        node=socket.gethostname(),
        pid=os.getpid(),
        device=device,
        former=former,
        addresses=addresses or [],
        metrics=metrics,
    )
    within_s = settings.join_timeout_s
    try:
        await endpoint.connect(COORDINATOR, settings.coordinator, timeout_s=within_s)
        answer = await ask(endpoint, wish, within_s=within_s, each_s=within_s)
    except Refused as refused:
        raise ZmlError(
            UNREACHABLE, f"the coordinator at {where} refused {member or 'this worker'}: {refused.because}"
        ) from None
    except TransportError as error:
        raise ZmlError(
            UNREACHABLE,
            f"the coordinator at {where} did not answer within {settings.join_timeout_s:g} s ({error})",
            "Start `zml coordinator`, or give its address with --coordinator.",
        ) from None
    joined = answer.message
    assert isinstance(joined, Joined), joined
    logs.move(joined.member, joined.run_dir, joined.job)
    log.info("joined", member=joined.member, incarnation=joined.incarnation, job=joined.job)
    spec = msgspec.msgpack.decode(answer.payload or b"", type=JobSpec)
    return Lease(endpoint, joined, spec, settings.coordinator_away_s)
