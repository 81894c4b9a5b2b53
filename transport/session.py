"""One peer, without I/O and without a clock: requests and replies, duplicates, credit, liveness.

Driven by three things: the user (`request`, `reply`, `notify`), the network (`receive`) and the clock (`tick`, to be
called at `next_deadline()`). What is to be sent collects in `outbox`; what has happened comes back as events.

The rules. Every request ends exactly once: answered, refused, expired or aborted. The receiver hands it to its
handler at most once (idempotent ones perhaps again), because it remembers every id from the sender's `floor` on:
the sender says with each envelope below which id all its requests have ended. The payload bytes of unanswered
requests never exceed the credit that the receiver granted last. Requests leave in the order in which they were made.

A session is named by a number that the side that dialled has chosen: its life (random, once per process) and a count.
When the other side does not know the number (it restarted, or gave the peer up), nothing may be resent, as it might
be handled twice: requests under way are aborted and a new number is taken.
"""

from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Final

from msgspec import Struct

from .errors import Congested, RemoteProtocolError
from .events import (
    Answered,
    Event,
    FreedSlots,
    Gone,
    Handle,
    Left,
    Mapped,
    Opened,
    RefusedBy,
    Renewed,
    Returned,
    Silent,
)
from .frames import NO_PAYLOAD, Bye, Envelope, Freed, Hello, Kind, No, RingOffer, Stranger, Welcome
from .incoming import WINDOW, Incoming, Verdict
from .liveness import Liveness
from .outgoing import NEVER, Outgoing, Pending
from .peers import Limits
from .pings import Pings

NOTICES: Final = 1024  # ids of notices in which a duplicate is recognised
LINKS: Final = 1 << 24  # sessions of one life
LIVES: Final = 1 << 39
HELLO_S: Final = 0.25
HELLO_MOST_S: Final = 2.0
HELLO_CARRIED_S: Final = 16.0  # where hellos arrive: more of them would make a busy peer busier


class State(Enum):
    DIALLING = auto()  # hello sent, or sent again; requests wait
    OPEN = auto()
    SUSPENDED = auto()  # dialled by the peer, which is silent: what it asked stays known, should it come back
    CLOSED = auto()


class Session:
    """See the module. `granted` says how many bytes the peer may have unanswered here; it may change."""

    def __init__(
        self,
        peer: str,
        number: int,
        *,
        limits: Limits,
        now: float,
        dialled: bool,
        name: str,
        idempotent: Callable[[Struct], bool],
        granted: Callable[[], int],
        next_number: Callable[[], int] | None = None,
        peer_requests: int = 1,
        peer_credit: int = 0,
        peer_ping_s: float | None = None,
    ) -> None:
        self.peer = peer
        self.number = number
        self.dialled = dialled
        self.state = State.DIALLING if dialled else State.OPEN
        self.outbox: deque[Envelope] = deque()
        self.ring: RingOffer | None = None  # goes out with the next hello or welcome
        self.outgoing = Outgoing(limits, peer_requests, peer_credit)
        self.duplicates = 0  # requests and notices that came again

        self._name = name
        self._limits = limits
        self._idempotent = idempotent
        self._granted = granted
        self._next_number = next_number
        self._liveness = Liveness(
            now,
            interval_s=peer_ping_s or limits.ping_s,
            floor_s=limits.silence_s,
            most_s=limits.silence_most_s,
        )
        self._incoming = Incoming(limits)
        # Notices.
        self._next_notice = 1
        self._notice_high = 0
        self._notices_seen = 0  # bit k: notice `_notice_high - k` has come
        # Hello and ping.
        self._opened_once = not dialled
        self._hello_at = now if dialled else NEVER
        self._hello_s = HELLO_S
        self.carried = False  # what is said now has a connection to go along
        self._hello_id = 0  # of the last one that was said, or heard
        self._pings = Pings(limits.ping_s)
        self._forget_at = NEVER

    # -- what the user does ----------------------------------------------------------------------------------

    def request(self, message: Struct, payload: memoryview | None, *, deadline: float, now: float) -> int:
        """Take a request; it leaves at once if it may. The id comes back in the event that ends it."""
        if self.outgoing.waiting >= self._limits.waiting:
            raise Congested(self.peer, self.outgoing.waiting)
        number = self.outgoing.take(message, payload, deadline)
        self._send_waiting(now)
        return number

    def give_up(self, number: int, now: float) -> None:
        """Nobody waits for this request any more. It may still be applied."""
        if number in self.outgoing:
            self.outgoing.settle(number)
            self._send_waiting(now)

    def notify(self, message: Struct, payload: memoryview | None) -> bool:
        """Send a notice; False if the peer is not connected."""
        if self.state is not State.OPEN:
            return False
        self._put(Kind.NOTICE, self._next_notice, message, payload)
        self._next_notice += 1
        return True

    def reply(self, number: int, request: int, message: Struct, payload: memoryview | None) -> None:
        """Answer a request of the peer; too late for another session it is forgotten."""
        self._finish(number, request, self._envelope(Kind.REPLY, request, message, payload))

    def refuse(self, number: int, request: int, code: str, because: str) -> None:
        self._finish(number, request, self._envelope(Kind.REFUSAL, request, _no(code, because), None))

    def replace_reply(self, request: int, code: str, because: str) -> None:
        """The reply that was just made cannot be sent: send a refusal in its place."""
        refusal = self._envelope(Kind.REFUSAL, request, _no(code, because), None)
        self._incoming.end(request, refusal)
        self.outbox.append(refusal)

    def mapped(self) -> None:
        """Tell the peer that its ring is mapped."""
        self._put(Kind.MAPPED)

    def free(self, slots: list[int]) -> None:
        """Tell the peer that these slots of its ring can be used again."""
        if self.state is State.OPEN:
            self._put(Kind.FREED, body=Freed(slots))

    def pace(self, ping_s: float, now: float) -> None:
        """One side pings so often from now on, and the other expects it."""
        self._pings.pace(ping_s, now)
        self._liveness.pace(ping_s)

    def forgive(self, seconds: float, now: float) -> None:
        """We were held up for so long ourselves."""
        self._liveness.forgive(seconds, now)

    def is_silent(self, now: float) -> bool:
        """Is it to be called silent, unless what has come says otherwise?"""
        return self.state is State.OPEN and now >= self._liveness.deadline

    def is_unanswered(self, now: float) -> bool:
        """May a request be to be given up, or to be sent again, unless what has come answers it?"""
        return now >= self.outgoing.alarm

    @property
    def rtt_s(self) -> float:
        """Smoothed; 0 before the first pong."""
        return self._pings.rtt_s

    @property
    def last_heard(self) -> float:
        return self._liveness.last_heard

    @property
    def running(self) -> int:
        """Requests of the peer that its handlers have not answered."""
        return self._incoming.running

    def close(self, because: str) -> list[Event]:
        """An orderly end: a goodbye goes out, every request ends."""
        if self.state is State.OPEN:
            self._put(Kind.BYE, body=Bye(because[:200]))
        self.state = State.CLOSED
        return self.outgoing.abort(because)

    def lose(self, because: str) -> list[Event]:
        """The end without a word: every request ends."""
        self.state = State.CLOSED
        self.outbox.clear()
        return self.outgoing.abort(because)

    # -- what the clock does ---------------------------------------------------------------------------------

    def next_deadline(self) -> float:
        """Call `tick` at this time, in seconds by the clock that `now` is read from; earlier does no harm."""
        if self.state is State.OPEN:
            return min(self.outgoing.alarm, self._pings.due, self._liveness.deadline)
        if self.state is State.DIALLING:
            return min(self.outgoing.alarm, self._hello_at)
        return min(self.outgoing.alarm, self._forget_at) if self.state is State.SUSPENDED else NEVER

    def tick(self, now: float, unread_s: float = 0.0) -> list[Event]:
        """Time has come to be `now`. `unread_s`: for so long answers may have come that nobody has read yet."""
        events: list[Event] = []
        if self.state is State.OPEN and now >= self._liveness.deadline:
            silence = f"silent for {now - self._liveness.last_heard:.1f} s"
            events.append(Silent(silence))
            if self.dialled:
                self.redial(now)
            else:
                self.state = State.SUSPENDED
                self._forget_at = now + self._limits.forget_s
        elif self.state is State.SUSPENDED and now >= self._forget_at:
            events.append(Gone(f"silent for {now - self._liveness.last_heard:.1f} s"))
        if self.state is State.OPEN and now >= self._pings.due:
            if (number := self._pings.next(now, needed=self.outgoing.waiting > 0)) is not None:
                self._put(Kind.PING, number)
        if self.state is State.DIALLING and now >= self._hello_at:
            self._hello(now)
        if now >= self.outgoing.alarm:
            events += self._look_after(now, unread_s)
        return events

    def redial(self, now: float) -> None:
        """Begin with a hello again. What is under way stays so: it is resent if the other side resumes."""
        assert self.dialled and self.state is not State.CLOSED
        self.state = State.DIALLING
        self.outbox.clear()
        self._pings.end()
        self._hello_s = HELLO_S
        self._hello_at = now

    # -- what the network does -------------------------------------------------------------------------------

    def receive(self, envelope: Envelope, now: float) -> list[Event]:
        """An envelope of this session has come. Raises RemoteProtocolError, and then nothing has changed."""
        assert envelope.session == self.number, "the caller tells sessions apart"
        kind = envelope.kind
        if self.state is State.DIALLING:
            if kind is Kind.WELCOME:
                return self._welcomed(envelope, now)
            if kind is Kind.STRANGER:
                return self._unknown(envelope, now)
            return []  # from before the break; the peer will send again what matters
        if self.state is State.CLOSED:
            return []
        take = _TAKE.get(kind)
        if take is None:
            raise RemoteProtocolError("kind", f"a {kind.name} within a session")
        incoming = self._incoming  # a STRANGER puts a new one in its place, where ids begin at 1 again
        floor = max(envelope.floor, incoming.floor)  # a later envelope may have overtaken this one
        events = take(self, envelope, floor, now)
        incoming.forget_below(floor)
        if self.state is State.SUSPENDED:
            self.state = State.OPEN
            self._liveness.resume(now)
            self._resend_all(now)
            return [Returned(), *events]
        self._liveness.heard(now)
        self._pings.listened = True
        return events

    def is_newest_hello(self, envelope: Envelope) -> bool:
        """False: a hello of this session that was said before another one that has come already."""
        newest = envelope.id >= self._hello_id
        self._hello_id = max(self._hello_id, envelope.id)
        return newest

    def welcome(self, *, resumed: bool, requests: int, credit: int, mapped: bool, now: float) -> None:
        """Answer a hello of this session, the first or a later one. For the side that was dialled."""
        assert not self.dialled
        self.state = State.OPEN
        self.outgoing.requests = requests
        self.outgoing.credit = credit
        self._liveness.resume(now)
        body = Welcome(
            name=self._name,
            resumed=resumed,
            requests=self._limits.requests,
            mapped=mapped,
            ring=self.ring,
        )
        self._put(Kind.WELCOME, body=body)
        if resumed:
            self._resend_all(now)

    # -- requests of ours ------------------------------------------------------------------------------------

    def _send_waiting(self, now: float) -> None:
        if self.state is State.OPEN:
            for number, pending in self.outgoing.ready():
                self._send(number, pending, now)

    def _send(self, number: int, pending: Pending, now: float) -> None:
        again = self.outgoing.leaves(pending, now, self.rtt_s)
        self._put(Kind.REQUEST, number, pending.message, pending.payload, again=again)

    def _resend_all(self, now: float) -> None:
        for number, pending in self.outgoing.left():
            self._send(number, pending, now)
        self._send_waiting(now)

    def _look_after(self, now: float, unread_s: float) -> list[Event]:
        """What was not answered in time."""
        expired, again = self.outgoing.look(now, unread_s, resends=self.state is State.OPEN)
        for number, pending in again:
            self._send(number, pending, now)
        self._send_waiting(now)
        return expired

    # -- requests of the peer ---------------------------------------------------------------------------------

    def _on_request(self, envelope: Envelope, floor: int, now: float) -> list[Event]:
        number = envelope.id
        if number < max(envelope.floor, 1) or number >= floor + WINDOW:
            raise RemoteProtocolError("window", f"request {number} with floor {envelope.floor}")
        message = envelope.body
        assert message is not None
        if number < floor:
            self.duplicates += 1
            return []  # its sender has given it up
        verdict = self._incoming.judge(number, max(envelope.size, 0), self._idempotent(message))
        if verdict is Verdict.NEW:
            return [Handle(self.number, number, message, envelope.payload)]
        if isinstance(verdict, str):
            refusal = self._envelope(Kind.REFUSAL, number, _no("overload", verdict), None)
            self._incoming.end(number, refusal)
            self.outbox.append(refusal)
            return []
        self.duplicates += 1
        if isinstance(verdict, Envelope):
            self.outbox.append(verdict)
        elif verdict is Verdict.FORGOTTEN:
            self._put(Kind.REFUSAL, number, _no("forgotten", "it was handled; the reply is not kept"))
        return []

    def _finish(self, session: int, number: int, answer: Envelope) -> None:
        if session == self.number and self._incoming.finish(number, answer) and self.state is State.OPEN:
            self.outbox.append(answer)

    # -- everything else that comes --------------------------------------------------------------------------

    def _on_reply(self, envelope: Envelope, floor: int, now: float) -> list[Event]:
        number = envelope.id
        has_left = self.outgoing.has_left(number)
        if number >= self.outgoing.next or (number in self.outgoing and not has_left):
            raise RemoteProtocolError("unasked", f"a reply to request {number}, which was not made")
        self.outgoing.credit = envelope.credit
        if has_left:
            self.outgoing.settle(number)
        self._send_waiting(now)
        if not has_left:
            return []  # a duplicate, or too late
        body = envelope.body
        if envelope.kind is Kind.REFUSAL:
            assert isinstance(body, No)
            return [RefusedBy(number, body.code, body.because)]
        assert body is not None
        return [Answered(number, body, envelope.payload)]

    def _on_notice(self, envelope: Envelope, floor: int, now: float) -> list[Event]:
        # A sliding window over the ids, as IPsec keeps it against replays (RFC 4303, 3.4.3).
        ahead = envelope.id - self._notice_high
        if envelope.id < 1:
            raise RemoteProtocolError("window", "a notice without an id")
        if ahead > 0:
            self._notices_seen = (self._notices_seen << min(ahead, NOTICES) | 1) & ((1 << NOTICES) - 1)
            self._notice_high = envelope.id
        elif -ahead >= NOTICES or self._notices_seen >> -ahead & 1:
            self.duplicates += 1
            return []
        else:
            self._notices_seen |= 1 << -ahead
        assert envelope.body is not None
        return [Handle(self.number, 0, envelope.body, envelope.payload)]

    def _on_ping(self, envelope: Envelope, floor: int, now: float) -> list[Event]:
        self._put(Kind.PONG, envelope.id)
        return []

    def _on_pong(self, envelope: Envelope, floor: int, now: float) -> list[Event]:
        self.outgoing.credit = envelope.credit
        self._pings.answered(envelope.id, now)
        self._send_waiting(now)
        return []

    def _on_mapped(self, envelope: Envelope, floor: int, now: float) -> list[Event]:
        return [Mapped()]

    def _on_freed(self, envelope: Envelope, floor: int, now: float) -> list[Event]:
        assert isinstance(envelope.body, Freed)
        return [FreedSlots(envelope.body.slots)]

    def _on_bye(self, envelope: Envelope, floor: int, now: float) -> list[Event]:
        assert isinstance(envelope.body, Bye)
        because = f"it said goodbye: {envelope.body.because}"
        if self.dialled:
            self.redial(now)
        return [Left(because)]

    def _on_stranger(self, envelope: Envelope, floor: int, now: float) -> list[Event]:
        return self._unknown(envelope, now)

    def _on_welcome(self, envelope: Envelope, floor: int, now: float) -> list[Event]:
        if not self.dialled:
            raise RemoteProtocolError("kind", "a WELCOME to a side that did not say hello")
        return []  # a second one, to a hello that was sent twice

    # -- hello and ping --------------------------------------------------------------------------------------

    def _hello(self, now: float) -> None:
        body = Hello(
            name=self._name,
            to=self.peer,
            resume=self._opened_once,
            requests=self._limits.requests,
            ping_s=self._pings.every_s,
            ring=self.ring,
        )
        self._hello_id += 1
        self._put(Kind.HELLO, self._hello_id, body)
        self._hello_at = now + self._hello_s
        self._hello_s = min(self._hello_s * 2, HELLO_CARRIED_S if self.carried else HELLO_MOST_S)

    def _welcomed(self, envelope: Envelope, now: float) -> list[Event]:
        body = envelope.body
        assert isinstance(body, Welcome)
        if body.name != self.peer:
            raise RemoteProtocolError("identity", f"{body.name!r} answered the hello to {self.peer}")
        self.state = State.OPEN
        self._opened_once = True
        self.outgoing.credit = envelope.credit
        self.outgoing.requests = max(body.requests, 1)
        self._liveness.resume(now)
        self._hello_at = NEVER
        self._pings.begin(now)
        self._resend_all(now)
        return [Opened(body.resumed, body.mapped, body.ring)]

    def _unknown(self, envelope: Envelope, now: float) -> list[Event]:
        """The other side does not know this session."""
        assert isinstance(envelope.body, Stranger)
        if not self.dialled:
            raise RemoteProtocolError("kind", "a STRANGER to a side that did not say hello")
        because = envelope.body.because
        events: list[Event] = [Renewed(because), *self.outgoing.abort(because, only_left=True)]
        # A number is never offered twice: what is still on its way belongs to the old one.
        assert self._next_number is not None, "a side that dials can take new numbers"
        self.number = self._next_number()
        # The peer numbers its requests and notices from 1 again.
        self._incoming = Incoming(self._limits)
        self._notice_high = self._notices_seen = 0
        if self._opened_once:
            self._opened_once = False
            self.redial(now)
        # Otherwise the hello itself was refused: it is said again when its time comes, not at once.
        return events

    def _put(
        self,
        kind: Kind,
        number: int = 0,
        body: Struct | None = None,
        payload: memoryview | None = None,
        *,
        again: bool = False,
    ) -> None:
        self._pings.spoke = True
        self.outbox.append(self._envelope(kind, number, body, payload, again=again))

    def _envelope(
        self,
        kind: Kind,
        number: int,
        body: Struct | None,
        payload: memoryview | None,
        *,
        again: bool = False,
    ) -> Envelope:
        return Envelope(
            kind=kind,
            session=self.number,
            id=number,
            floor=self.outgoing.floor,
            credit=self._granted(),
            body=body,
            payload=payload,
            size=NO_PAYLOAD if payload is None else payload.nbytes,
            again=again,
        )


def _no(code: str, because: str) -> No:
    return No(code[:64], because[:1000])


_TAKE: Final[dict[Kind, Callable[[Session, Envelope, int, float], list[Event]]]] = {
    Kind.REQUEST: Session._on_request,
    Kind.REPLY: Session._on_reply,
    Kind.REFUSAL: Session._on_reply,
    Kind.NOTICE: Session._on_notice,
    Kind.PING: Session._on_ping,
    Kind.PONG: Session._on_pong,
    Kind.MAPPED: Session._on_mapped,
    Kind.FREED: Session._on_freed,
    Kind.BYE: Session._on_bye,
    Kind.STRANGER: Session._on_stranger,
    Kind.WELCOME: Session._on_welcome,
}
