"""A member keeps its lease: heartbeats to the coordinator, and the end when the coordinator stays silent."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING, Literal

import msgspec
import structlog

from .errors import LOST, UNREACHABLE, ZmlError
from .messages import Fenced, Heartbeat, JobSpec, Join, Joined, Leave
from .transport import Endpoint, Refused, TransportError

if TYPE_CHECKING:
    from .config import Settings

COORDINATOR = "coordinator"
GOODBYE_S = 2.0

log = structlog.get_logger()


class Lease:
    """One member's place in the job. `heard()` is to be called at every sign of life of the coordinator."""

    def __init__(self, endpoint: Endpoint, joined: Joined, spec: JobSpec) -> None:
        self.endpoint = endpoint
        self.joined = joined
        self.spec = spec
        self.silence_s = max(20 * joined.lease_s, 30.0)
        self.heard_at = asyncio.get_running_loop().time()

    def heard(self) -> None:
        self.heard_at = asyncio.get_running_loop().time()

    def is_mine(self, fenced: Fenced) -> bool:
        """Does this order mean this very process, and not a former self of the same name?"""
        return (fenced.member, fenced.incarnation) == (self.joined.member, self.joined.incarnation)

    async def keep(self) -> ZmlError:
        """Send heartbeats; returns, with the reason, only when the coordinator has been silent for too long."""
        loop = asyncio.get_running_loop()
        heartbeat_s = self.joined.heartbeat_s
        beat = Heartbeat(self.joined.job, self.joined.member, self.joined.incarnation)
        while loop.time() - self.heard_at < self.silence_s:
            self.endpoint.notify(COORDINATOR, beat)
            due = loop.time() + heartbeat_s
            await asyncio.sleep(heartbeat_s)
            if (late_s := loop.time() - due) > heartbeat_s:
                self.heard_at += late_s  # while this process was held up nobody could be heard
        return ZmlError(
            LOST, f"{self.joined.member}: the coordinator has been silent for {self.silence_s:g} s"
        )

    async def leave(self, because: str) -> None:
        """Say goodbye: nothing of this member is in flight. A coordinator that is gone is not waited for."""
        goodbye = Leave(self.joined.job, self.joined.member, self.joined.incarnation, because)
        try:
            await self.endpoint.request(COORDINATOR, goodbye, timeout_s=GOODBYE_S)
        except TransportError as error:
            log.warning("left without a goodbye", because=str(error))


async def join(
    endpoint: Endpoint,
    settings: Settings,
    role: Literal["worker", "shard"],
    member: str,
    *,
    device: str = "cpu",
    former: int = 0,
    addresses: list[str] | None = None,
) -> Lease:
    """Reach the coordinator and become a member. Raises ZmlError that says who did not answer, or why it said no."""
    where = ", ".join(settings.coordinator)
    wish = Join(
        job="",  # whichever job this coordinator serves
        role=role,
        member=member,
        node=socket.gethostname(),
        pid=os.getpid(),
        device=device,
        former=former,
        addresses=addresses or [],
    )
    try:
        await endpoint.connect(COORDINATOR, settings.coordinator, timeout_s=settings.join_timeout_s)
        answer = await endpoint.request(COORDINATOR, wish, timeout_s=settings.join_timeout_s)
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
    log.info("joined", member=joined.member, incarnation=joined.incarnation, job=joined.job)
    return Lease(endpoint, joined, msgspec.msgpack.decode(answer.payload or b"", type=JobSpec))
