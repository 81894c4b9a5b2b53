"""The coordinator's orders under way: each a task with a deadline, sent until it is taken or nobody is there for it.

An order twice is the same as once, so one that may not have arrived is sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from ..messages import Message
from ..transport import Answer, Endpoint, PeerLost, Refused, TransportError

ORDER_S = 30.0  # a member that takes no order for this long is left to its lease
STRANGER_S = 3.0
EARLY_S = 0.02
EARLY_MOST_S = 0.16  # between two tries, where a member is not ready
AWAY_S = 1.0  # and where it is not there: then it is seen whether it is still to come
MOST_S = 24 * 3600.0  # of what takes as long as it goes on

log = structlog.get_logger()


class Orders:
    """`peers` says where each member is, `patient` whether it is worth waiting for one that is not connected."""

    def __init__(
        self, endpoint: Endpoint, peers: dict[str, str], patient: Callable[[str, str], bool]
    ) -> None:
        self.endpoint = endpoint
        self.peers = peers
        self.patient = patient
        self.tasks: set[asyncio.Task[bool]] = set()

    def send(
        self, member: str, message: Message, payload: bytes | None = None, within_s: float = ORDER_S
    ) -> asyncio.Task[bool]:
        """Send an order until it is taken, which the result tells; who does not take it is left to its lease."""
        return self._start(self._send(member, self.peers[member], message, payload, within_s))

    def send_long(
        self,
        member: str,
        message: Message,
        payload: bytes | None,
        moved: Callable[[], object],
        quiet_s: Callable[[], float],
    ) -> asyncio.Task[bool]:
        """The same, with as much time as it takes while what `moved` tells is another each `quiet_s`."""
        return self._start(self._send_long(member, self.peers[member], message, payload, moved, quiet_s))

    async def ask(
        self, member: str, message: Message, payload: bytes | None = None, within_s: float = ORDER_S
    ) -> Answer | None:
        """The same, and its answer; None where it was not taken."""
        return await self._ask(member, self.peers[member], message, payload, within_s)

    def stranger(self, peer: str, message: Message) -> None:
        """To a process that is no member any more; it will be heard again if it did not take this."""
        self._start(self._send("", peer, message, None, STRANGER_S))

    async def finish(self, within_s: float) -> None:
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=within_s)

    def cancel(self) -> None:
        for task in self.tasks:
            task.cancel()

    def _start(self, sending: Coroutine[Any, Any, bool]) -> asyncio.Task[bool]:
        task = asyncio.ensure_future(sending)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _send(
        self, member: str, peer: str, message: Message, payload: bytes | None, within_s: float
    ) -> bool:
        return await self._ask(member, peer, message, payload, within_s) is not None

    async def _send_long(
        self,
        member: str,
        peer: str,
        message: Message,
        payload: bytes | None,
        moved: Callable[[], object],
        quiet_s: Callable[[], float],
    ) -> bool:
        sending = asyncio.ensure_future(self._send(member, peer, message, payload, MOST_S))
        try:
            if await while_moving(sending, moved, quiet_s):
                return sending.result()
        finally:
            sending.cancel()
        because = f"nothing has moved for {quiet_s():g} s"
        log.warning("order not taken", member=member, order=type(message).__name__, because=because)
        return False

    async def _ask(
        self, member: str, peer: str, message: Message, payload: bytes | None, within_s: float
    ) -> Answer | None:
        loop = asyncio.get_running_loop()
        until = loop.time() + within_s
        pause_s = EARLY_S
        while True:
            away = False
            try:
                return await self.endpoint.request(
                    peer, message, payload, timeout_s=max(until - loop.time(), EARLY_S)
                )
            except Refused as refused:
                # An order may overtake the answer to the member's own join.
                again, because = refused.code in ("early", "full"), refused.because
                if refused.code == "full":  # it is well, and takes the order as soon as its disk has room
                    until = loop.time() + within_s
            except PeerLost as lost:
                away, again, because = True, self.patient(member, peer), str(lost)
            except TransportError as error:
                again, because = False, str(error)
            if not again or loop.time() >= until:
                log.warning("order not taken", member=member, order=type(message).__name__, because=because)
                return None
            if away:  # of many jobs, thousands are waited for at once when a coordinator was started again
                await self.endpoint.found(peer, timeout_s=min(AWAY_S, max(until - loop.time(), EARLY_S)))
            else:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, EARLY_MOST_S)


async def while_moving(
    work: asyncio.Future[Any], moved: Callable[[], object], quiet_s: Callable[[], float]
) -> bool:
    """Wait as long as what `moved` tells is another each `quiet_s`; whether the work is done."""
    before = None
    while not work.done() and (now := moved()) != before:
        before = now
        await asyncio.wait({work}, timeout=quiet_s())
    return work.done()
