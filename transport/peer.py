"""What the event loop holds for one peer beside its session: futures, shared memory, the way out."""

import asyncio
from collections.abc import Callable, Hashable
from math import inf
from typing import Final

import structlog
from msgspec import Struct
from msgspec.structs import replace

from .door import Link
from .errors import DeadlineExceeded, LocalProtocolError, RemoteProtocolError
from .frames import NO_SLOT, Envelope, Kind, RingOffer, pack
from .lane import Lane
from .peers import Answer, Limits, PeerInfo
from .session import Session, State

PATIENCE_S: Final = 1.0  # for the first address before the next is tried; longer each time
PATIENCE_MOST_S: Final = 5.0
PATIENCE_CARRIED_S: Final = 60.0  # for the only one, where somebody is there who has no time to answer yet

log = structlog.get_logger("zml.transport")

Transmit = Callable[[Hashable, bytes, memoryview | None], bool]


class Peer:
    """One of the peers of an exchange, which decides; this carries out."""

    def __init__(
        self,
        session: Session,
        link: Link,
        *,
        loop: asyncio.AbstractEventLoop,
        limits: Limits,
        transmit: Transmit,
    ) -> None:
        self.name = session.peer
        self.session = session
        self.link = link
        self.futures: dict[
            int, tuple[asyncio.Future[Answer], str, float]
        ] = {}  # the pending requests, all of them
        self.lane: Lane | None = None  # where payloads may go through shared memory
        self.timer: asyncio.TimerHandle | None = None
        self.armed_at = 0.0  # when the timer is due
        self.notices_running = 0
        self.found = False  # on_found was called, and on_lost not since
        self.met = False  # on_found was called at some time
        # Of a peer that we dial:
        self.addresses: tuple[str, ...] = ()
        self.attempt = 0
        self.dialled_at = 0.0
        self.redial_at = inf
        self.because = "it has not answered yet"  # why it is not connected
        self.opened: list[asyncio.Future[None]] = []
        self._loop = loop
        self._limits = limits
        self._transmit = transmit

    # -- dialling ----------------------------------------------------------------------------------------------

    def dialled(self, now: float) -> None:
        """A connection to it was begun."""
        self.dialled_at = now
        self.redial_at = now + min(PATIENCE_S * 1.5 ** min(self.attempt, 10), PATIENCE_MOST_S)

    def is_worth_waiting_for(self, now: float) -> bool:
        """Nobody has answered in time. But somebody is there, and another connection would begin at the end of the
        queue."""
        alone = len(self.addresses) == 1
        if not (alone and self.session.carried and now < self.dialled_at + PATIENCE_CARRIED_S):
            return False
        self.redial_at = now + PATIENCE_MOST_S
        return True

    # -- requests ----------------------------------------------------------------------------------------------

    def ask(
        self, message: Struct, payload: memoryview | None, timeout_s: float
    ) -> tuple[int, asyncio.Future[Answer]]:
        """Make a request; it leaves at once if it may. Raises LocalProtocolError or Congested."""
        now = self._loop.time()
        future: asyncio.Future[Answer] = self._loop.create_future()
        number = self.session.request(message, payload, deadline=now + timeout_s, now=now)
        self.futures[number] = (future, type(message).__name__, timeout_s)
        self.flush()
        return number, future

    def give_up(self, number: int) -> None:
        if self.futures.pop(number, None):
            self.session.give_up(number, self._loop.time())
            self.flush()

    def resolve(self, number: int, answer: Answer) -> None:
        future, _, _ = self.futures.pop(number)
        if not future.done():
            future.set_result(answer)

    def fail(self, number: int, error: Exception) -> None:
        found = self.futures.pop(number, None)
        if found is not None and not found[0].done():
            found[0].set_exception(error)

    def expire(self, number: int, sent: bool) -> None:
        _, message, timeout_s = self.futures[number]
        because = ""
        if self.session.state is not State.OPEN:
            because = f"not connected: {self.because}"
        elif not sent:
            because = "it waited for credit"
        self.fail(number, DeadlineExceeded(self.name, message, timeout_s, because, sent=sent))

    # -- the way out -------------------------------------------------------------------------------------------

    def flush(self) -> bool:
        """Hand what the session wants to say to the wire; False if the last of it was dropped."""
        outbox = self.session.outbox
        sent = True
        while outbox:
            envelope = outbox.popleft()
            if envelope.payload is not None and self.lane is not None:
                envelope = self._through_memory(self.lane, envelope)
            try:
                header = pack(envelope)
            except LocalProtocolError as error:
                self._unsendable(envelope, error)
                continue
            sent = self._transmit(self.link.route, header, envelope.payload)
            if not sent and envelope.slot != NO_SLOT and self.lane is not None:
                self.lane.release([envelope.slot])
        return sent

    def _unsendable(self, envelope: Envelope, error: LocalProtocolError) -> None:
        """A message of ours does not fit: whoever made it must hear of it."""
        if envelope.slot != NO_SLOT and self.lane is not None:
            self.lane.release([envelope.slot])
        if envelope.kind is Kind.REQUEST:
            self.session.give_up(envelope.id, self._loop.time())
            self.fail(envelope.id, error)
        elif envelope.kind is Kind.REPLY:
            log.error("a reply cannot be sent", peer=self.name, because=str(error))
            self.session.replace_reply(
                envelope.id, "internal", "the reply is too long; the log there says more"
            )
        else:
            raise error

    # -- shared memory -----------------------------------------------------------------------------------------

    def offer_memory(self) -> None:
        """Of a side that dials: the next hello offers a new ring."""
        self.close_lane()
        if self._limits.slots:
            self.lane = self._lane()
            self.session.ring = self.lane.offer()

    def share_memory(self, offer: RingOffer | None) -> bool:
        """Of a side that was dialled: map the ring that a hello offers, and offer one. False: the socket has to do."""
        if offer is None or not self._limits.slots:
            return False
        lane = self.lane or self._lane()
        if not lane.accept(offer):
            return False
        self.lane = lane
        self.session.ring = lane.offer()
        return True

    def map_memory(self, offer: RingOffer | None) -> None:
        """Of a side that dials: the welcome has come, perhaps with a ring."""
        if self.lane is not None and self.lane.accept(offer):
            self.session.mapped()

    def memory_mapped(self) -> None:
        if self.lane is not None:
            self.lane.mapped()

    def memory_freed(self, slots: list[int]) -> None:
        """Raises RemoteProtocolError for slots that were not taken."""
        if self.lane is not None:
            self.lane.release(slots)

    def from_memory(self, envelope: Envelope) -> Envelope:
        """The same envelope with the payload that lies in its slot. Raises RemoteProtocolError."""
        if self.lane is None:
            raise RemoteProtocolError("slot", "a payload in shared memory that was never shared")
        return replace(envelope, payload=self.lane.view(envelope.slot, envelope.size))

    def close_lane(self) -> None:
        if self.lane is not None:
            self.lane.close()
            self.lane = None
            self.session.ring = None

    def _through_memory(self, lane: Lane, envelope: Envelope) -> Envelope:
        """The same envelope with its payload in a slot, if there is one for it. What is sent again goes over the
        socket: the slot of the first time may have been read already, or never will be."""
        assert envelope.payload is not None
        slot = None if envelope.again else lane.put(envelope.payload)
        return envelope if slot is None else replace(envelope, payload=None, slot=slot)

    def _lane(self) -> Lane:
        def tell_free(slots: list[int]) -> None:
            self.session.free(slots)
            self.flush()

        limits = self._limits
        return Lane(self._loop, slots=limits.slots, slot_bytes=limits.payload_bytes, tell_free=tell_free)

    # -- looking -----------------------------------------------------------------------------------------------

    def info(self) -> PeerInfo:
        session = self.session
        return PeerInfo(
            name=self.name,
            session=session.number,
            key=self.link.key,
            last_heard=session.last_heard,
            connected=session.state is State.OPEN,
            outstanding=session.outgoing.outstanding,
            outstanding_bytes=session.outgoing.outstanding_bytes,
            shared_memory=self.lane is not None and self.lane.open,
        )
