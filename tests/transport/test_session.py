"""One peer: whatever the network does, a request is handled at most once and always ends."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from zml.transport import Congested, Limits, RemoteProtocolError
from zml.transport.events import (
    Aborted,
    Answered,
    Event,
    Expired,
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
from zml.transport.frames import (
    Bye,
    Envelope,
    Freed,
    Hello,
    Kind,
    No,
    Stranger,
    Vocabulary,
    Welcome,
    pack,
    unpack,
)
from zml.transport.incoming import WINDOW, Incoming
from zml.transport.peers import idempotent_by_class
from zml.transport.session import HELLO_CARRIED_S, HELLO_MOST_S, HELLO_S, LINKS, Session, State


class Do(msgspec.Struct, frozen=True, tag=True):
    number: int


class Look(msgspec.Struct, frozen=True, tag=True):
    idempotent: ClassVar[bool] = True
    number: int


class Done(msgspec.Struct, frozen=True, tag=True):
    number: int


VOCABULARY = Vocabulary(Do | Look | Done)
LIMITS = Limits(
    payload_bytes=50,
    credit_bytes=100,
    budget_bytes=1000,
    requests=3,
    waiting=8,
    kept_replies=4,
    kept_bytes=60,
    ping_s=0.5,
    silence_s=3.0,
    resend_s=1.0,
    resend_most_s=4.0,
    forget_s=10.0,
)


def through_the_wire(envelope: Envelope) -> Envelope:
    return unpack(pack(envelope), envelope.payload, VOCABULARY, payload_bytes=LIMITS.payload_bytes)


class Side:
    """One process with one peer: it does for a session what the exchange does."""

    def __init__(self, name: str, peer: str, *, dialled: bool, limits: Limits = LIMITS) -> None:
        self.name = name
        self.peer = peer
        self.limits = limits
        self.numbers = itertools.count(5 * LINKS + 1)
        self.session: Session | None = None
        self.newest = -1
        self.sent: list[Envelope] = []  # what the wire has not taken yet
        self.calls: list[Handle] = []  # handlers that run
        self.ends: dict[int, list[Event]] = {}  # how our requests ended, by the number in their message
        self.numbers_of: dict[int, int] = {}  # request id -> the number in its message
        self.happened: list[Event] = []
        self.grant = limits.credit_bytes
        if dialled:
            self.session = self.make(next(self.numbers), 0.0, dialled=True)

    def make(self, number: int, now: float, *, dialled: bool) -> Session:
        return Session(
            self.peer,
            number,
            limits=self.limits,
            now=now,
            dialled=dialled,
            name=self.name,
            idempotent=idempotent_by_class,
            granted=lambda: self.grant,
            next_number=lambda: next(self.numbers),
        )

    def ask(self, message: Do | Look, size: int, now: float, timeout_s: float) -> None:
        assert self.session is not None
        payload = memoryview(bytes(size)) if size else None
        number = self.session.request(message, payload, deadline=now + timeout_s, now=now)
        self.numbers_of[number] = message.number
        self.ends.setdefault(message.number, [])
        self.flush()

    def take(self, envelope: Envelope, now: float) -> None:
        session = self.session
        if envelope.kind is Kind.HELLO:
            self.take_hello(envelope, now)
        elif session is None or session.number != envelope.session:
            if session is None or not session.dialled:
                self.answer_stranger(envelope)
        else:
            self.note(session.receive(envelope, now))
        self.flush()

    def take_hello(self, envelope: Envelope, now: float) -> None:
        hello = envelope.body
        assert isinstance(hello, Hello)
        known = self.session is not None and self.session.number == envelope.session
        if known:
            assert self.session is not None
            if not self.session.is_newest_hello(envelope):
                return
        elif hello.resume or envelope.session <= self.newest:
            self.answer_stranger(envelope)
            return
        else:
            self.lose_session()
            self.session = self.make(envelope.session, now, dialled=False)
            self.session.is_newest_hello(envelope)
            self.newest = envelope.session
        assert self.session is not None
        self.session.welcome(
            resumed=known, requests=hello.requests, credit=envelope.credit, mapped=False, now=now
        )

    def lose_session(self) -> None:
        if self.session is not None:
            self.note(self.session.lose("restarted"))
            self.session = None

    def answer_stranger(self, envelope: Envelope) -> None:
        if envelope.kind is not Kind.STRANGER:
            body = Stranger("not known")
            self.sent.append(Envelope(kind=Kind.STRANGER, session=envelope.session, body=body))

    def note(self, happened: list[Event]) -> None:
        for event in happened:
            self.happened.append(event)
            if isinstance(event, Handle):
                self.calls.append(event)
            elif isinstance(event, Answered | RefusedBy | Expired | Aborted):
                self.ends[self.numbers_of.pop(event.id)].append(event)
            elif isinstance(event, Gone | Left):
                assert self.session is not None
                if not self.session.dialled:
                    self.lose_session()

    def tick(self, now: float) -> None:
        if self.session is not None:
            self.note(self.session.tick(now))
        self.flush()

    def next_deadline(self) -> float:
        return self.session.next_deadline() if self.session is not None else float("inf")

    def flush(self) -> None:
        if self.session is not None:
            self.sent.extend(self.session.outbox)
            self.session.outbox.clear()


STEPS = (
    ["ask"] * 10 + ["arrive"] * 14 + ["answer"] * 8 + ["lose"] * 3 + ["double"] * 3 + ["wait"] * 5
    + ["give_up", "wait_long", "forget"]
)  # fmt: skip


class LossyPipe(RuleBasedStateMachine):
    """A worker that has dialled a shard, over a pipe that loses, doubles and reorders; the shard may restart."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.worker = Side("w0", "p0", dialled=True)
        self.shard = Side("p0", "w0", dialled=False)
        self.under_way: list[tuple[Side, Envelope]] = []  # receiver, envelope
        self.handled: Counter[int] = Counter()
        self.looks: set[int] = set()
        self.next_number = 0
        self.restarted = False

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.worker.tick(0.0)
        self.pump()
        while self.under_way:
            self.deliver(0)

    def sides(self) -> Iterator[tuple[Side, Side]]:
        yield self.worker, self.shard
        yield self.shard, self.worker

    def pump(self) -> None:
        for side, other in self.sides():
            self.under_way.extend((other, through_the_wire(envelope)) for envelope in side.sent)
            side.sent.clear()

    def deliver(self, index: int) -> None:
        receiver, envelope = self.under_way.pop(index)
        before = len(receiver.calls)
        receiver.take(envelope, self.now)
        for call in receiver.calls[before:]:
            assert isinstance(call.message, Do | Look)
            self.handled[call.message.number] += 1
        self.pump()

    def advance(self, to: float) -> None:
        while True:
            at = min(self.worker.next_deadline(), self.shard.next_deadline())
            if at > to:
                break
            self.now = max(self.now, at)
            self.worker.tick(self.now)
            self.shard.tick(self.now)
            self.pump()
        self.now = to

    # -- what may happen ------------------------------------------------------------------------------------

    @rule(what=st.sampled_from(STEPS), seed=st.integers(0, 2**32))
    def step(self, what: str, seed: int) -> None:
        """One rule for all, so that their proportions are ours: most of the time messages travel."""
        self.chance.seed(seed)
        getattr(self, what)()
        self.pump()

    def ask(self) -> None:
        side = self.chance.choice([self.worker, self.worker, self.shard])
        if side.session is None:
            return
        number = self.next_number
        self.next_number += 1
        look = self.chance.random() < 0.3
        message = Look(number) if look else Do(number)
        try:
            side.ask(
                message, self.chance.choice([0, 1, 30, 50]), self.now, self.chance.choice([0.5, 3.0, 60.0])
            )
        except Congested:
            assert side.session.outgoing.waiting == LIMITS.waiting
        else:
            if look:
                self.looks.add(number)

    def answer(self) -> None:
        side = self.chance.choice([self.worker, self.shard])
        calls = [call for call in side.calls if call.id]
        if not calls or side.session is None:
            return
        call = self.chance.choice(calls)
        side.calls.remove(call)
        assert isinstance(call.message, Do | Look)
        if self.chance.random() < 0.2:
            side.session.refuse(call.number, call.id, "no", f"{call.message.number}")
        else:
            body = self.chance.choice([None, memoryview(b"x" * 20)])
            side.session.reply(call.number, call.id, Done(call.message.number), body)
        side.flush()

    def arrive(self) -> None:
        for _ in range(min(self.chance.randrange(1, 6), len(self.under_way))):
            self.deliver(self.chance.choice([0, self.chance.randrange(len(self.under_way))]))

    def lose(self) -> None:
        if self.under_way:
            self.under_way.pop(self.chance.randrange(len(self.under_way)))

    def double(self) -> None:
        if self.under_way:
            self.under_way.append(self.chance.choice(self.under_way))

    def wait(self) -> None:
        self.advance(self.now + self.chance.choice([0.01, 0.1, 0.4, 1.2]))

    def wait_long(self) -> None:
        self.advance(self.now + self.chance.choice([4.0, 20.0]))

    def give_up(self) -> None:
        side = self.chance.choice([self.worker, self.shard])
        if side.numbers_of and side.session is not None:
            number = self.chance.choice(list(side.numbers_of))
            side.session.give_up(number, self.now)
            side.ends[side.numbers_of.pop(number)].append(Aborted(number, "given up"))
            side.flush()

    def forget(self) -> None:
        """The shard restarts, or has given the worker up."""
        self.shard.lose_session()

    # -- what always holds ----------------------------------------------------------------------------------

    @invariant()
    def handled_at_most_once(self) -> None:
        for number, times in self.handled.items():
            assert times == 1 or number in self.looks, f"{number} was handled {times} times"

    @invariant()
    def each_request_ends_at_most_once_and_truly(self) -> None:
        for side, _ in self.sides():
            for number, ends in side.ends.items():
                assert len(ends) <= 1, (number, ends)
                match ends:
                    case [Answered(_, message, _)]:
                        assert message == Done(number) and self.handled[number] >= 1
                    case [RefusedBy(_, "no", because)]:
                        assert because == str(number) and self.handled[number] >= 1
                    case [RefusedBy(_, "overload", _)]:
                        assert self.handled[number] == 0
                    case [RefusedBy(_, code, _)]:
                        assert code == "forgotten" and self.handled[number] >= 1
                    case [Expired(_, sent)]:
                        assert sent or self.handled[number] == 0

    @invariant()
    def everything_is_bounded(self) -> None:
        for side, _ in self.sides():
            session = side.session
            if session is None:
                continue
            assert (
                session.outgoing.outstanding_bytes <= max(session.outgoing.credit, 0) <= LIMITS.credit_bytes
            )
            assert 0 <= session.outgoing.outstanding <= LIMITS.requests
            assert 0 <= session.outgoing.waiting <= LIMITS.waiting
            assert session.running <= 2 * LIMITS.requests

    def teardown(self) -> None:
        """The network is whole again: everything ends."""
        for _ in range(400):
            while self.under_way:
                self.deliver(0)
                self.answer()
                self.pump()
            if not self.worker.numbers_of and not self.shard.numbers_of:
                break
            self.advance(self.now + 0.25)
        assert not self.worker.numbers_of and not self.shard.numbers_of
        assert all(len(ends) == 1 for side, _ in self.sides() for ends in side.ends.values())
        assert self.worker.session is not None and self.worker.session.outgoing.outstanding_bytes == 0


def test_over_a_lossy_pipe_every_request_is_handled_at_most_once_and_ends() -> None:
    run_state_machine_as_test(
        LossyPipe, settings=settings(max_examples=80, stateful_step_count=80, deadline=None)
    )


# -- one rule at a time ---------------------------------------------------------------------------------------


class Pair:
    """A worker and a shard that are connected by a perfect wire, moved by hand."""

    def __init__(self, *, limits: Limits = LIMITS) -> None:
        self.now = 0.0
        self.worker = Side("w0", "p0", dialled=True, limits=limits)
        self.shard = Side("p0", "w0", dialled=False, limits=limits)
        self.worker.tick(0.0)
        self.carry()
        assert self.w.state is State.OPEN

    @property
    def w(self) -> Session:
        assert self.worker.session is not None
        return self.worker.session

    @property
    def p(self) -> Session:
        assert self.shard.session is not None
        return self.shard.session

    def carry(self) -> None:
        """Deliver everything, until nobody has anything to say."""
        while self.worker.sent or self.shard.sent:
            for side, other in ((self.worker, self.shard), (self.shard, self.worker)):
                sent, side.sent = side.sent, []
                for envelope in sent:
                    other.take(through_the_wire(envelope), self.now)

    def advance(self, to: float, *, carry: bool = True) -> None:
        while (at := min(self.worker.next_deadline(), self.shard.next_deadline())) <= to:
            self.now = max(self.now, at)
            for side in (self.worker, self.shard):
                side.tick(self.now)
                if not carry:
                    side.sent.clear()
            self.carry()
        self.now = to

    def answer(self, call: Handle, size: int | None = None) -> None:
        assert isinstance(call.message, Do | Look)
        payload = None if size is None else memoryview(bytes(size))
        self.p.reply(call.number, call.id, Done(call.message.number), payload)
        self.shard.calls.remove(call)
        self.shard.flush()


def sent(side: Side) -> list[tuple[Kind, int]]:
    return [(envelope.kind, envelope.id) for envelope in side.sent]


def test_hello_and_welcome_open_a_session_and_grant_credit() -> None:
    pair = Pair()
    assert pair.worker.happened == [Opened(False, False, None)]
    assert (pair.w.outgoing.credit, pair.p.outgoing.credit) == (100, 100)
    assert pair.w.number == pair.p.number == 5 * LINKS + 1


def test_requests_leave_in_the_order_in_which_they_were_made_and_wait_for_credit() -> None:
    pair = Pair()
    for number, size in enumerate([50, 40, 50, 0, 10]):
        pair.worker.ask(Do(number), size, 0.0, 60.0)
    # 50 + 40 of 100 bytes are out; the third would be too much, and nothing overtakes it.
    assert sent(pair.worker) == [(Kind.REQUEST, 1), (Kind.REQUEST, 2)]
    assert (pair.w.outgoing.outstanding, pair.w.outgoing.outstanding_bytes, pair.w.outgoing.waiting) == (
        2,
        90,
        3,
    )
    pair.carry()
    pair.answer(pair.shard.calls[1])
    pair.carry()
    assert [call.id for call in pair.shard.calls] == [1, 3, 4]  # three at once, as the shard allows
    pair.answer(pair.shard.calls[0])
    pair.carry()
    assert [call.id for call in pair.shard.calls] == [3, 4, 5]
    assert (pair.w.outgoing.outstanding, pair.w.outgoing.outstanding_bytes, pair.w.outgoing.waiting) == (
        3,
        60,
        0,
    )


def test_less_credit_slows_the_sender_down_and_more_lets_it_go_on() -> None:
    pair = Pair()
    pair.shard.grant = 50
    pair.worker.ask(Do(1), 50, 0.0, 60.0)
    pair.worker.ask(Do(2), 50, 0.0, 60.0)
    pair.worker.ask(Do(3), 50, 0.0, 60.0)
    pair.carry()
    assert [call.id for call in pair.shard.calls] == [1, 2]
    pair.answer(pair.shard.calls[0])
    pair.carry()
    assert [call.id for call in pair.shard.calls] == [2]  # 50 bytes are out, and 50 are granted now
    pair.shard.grant = 100
    pair.advance(1.0)  # a pong brings the news
    assert [call.id for call in pair.shard.calls] == [2, 3]


def test_too_many_waiting_requests_are_refused_on_the_spot() -> None:
    pair = Pair()
    for number in range(3 + LIMITS.waiting):
        pair.worker.ask(Do(number), 0, 0.0, 60.0)
    with pytest.raises(Congested, match="8 requests wait for p0"):
        pair.worker.ask(Do(99), 0, 0.0, 60.0)


def test_an_unanswered_request_is_resent_ever_more_rarely() -> None:
    pair = Pair()
    pair.worker.ask(Do(0), 10, 0.0, 60.0)
    pair.worker.sent.clear()
    times = []
    while pair.now < 20:
        pair.now = pair.w.next_deadline()
        pair.worker.tick(pair.now)
        if (Kind.REQUEST, 1) in sent(pair.worker):
            times.append(pair.now)
            assert [e.again for e in pair.worker.sent if e.kind is Kind.REQUEST] == [True]
        pair.worker.sent = [e for e in pair.worker.sent if e.kind is not Kind.REQUEST]
        pair.carry()
    assert times == [1.0, 3.0, 7.0, 11.0, 15.0, 19.0]
    assert pair.w.outgoing.outstanding_bytes == 10


def test_a_duplicate_of_a_running_request_is_ignored_and_of_a_finished_one_answered_again() -> None:
    pair = Pair()
    pair.worker.ask(Do(0), 0, 0.0, 60.0)
    copy = through_the_wire(pair.worker.sent[0])
    pair.carry()
    pair.shard.take(copy, 0.0)
    assert len(pair.shard.calls) == 1
    assert pair.shard.sent == []
    pair.answer(pair.shard.calls[0])
    pair.shard.sent.clear()  # the reply is lost
    pair.shard.take(copy, 0.0)
    assert sent(pair.shard) == [(Kind.REPLY, 1)]
    assert pair.shard.calls == []
    assert pair.p.duplicates == 2
    pair.carry()
    assert pair.worker.ends == {0: [Answered(1, Done(0), None)]}


def test_only_an_idempotent_request_is_handled_again_for_a_reply_that_is_not_kept() -> None:
    pair = Pair()
    pair.worker.ask(Look(0), 0, 0.0, 60.0)
    pair.worker.ask(Do(1), 0, 0.0, 60.0)
    look, do = map(through_the_wire, pair.worker.sent)
    pair.carry()
    pair.answer(pair.shard.calls[0], size=40)
    pair.answer(pair.shard.calls[0], size=61)  # longer than what is kept
    pair.shard.sent.clear()
    pair.shard.take(look, 0.0)
    assert [call.message for call in pair.shard.calls] == [Look(0)]
    pair.shard.take(do, 0.0)
    assert [call.message for call in pair.shard.calls] == [Look(0)]
    pair.carry()
    assert pair.worker.ends == {
        0: [],
        1: [RefusedBy(2, "forgotten", "it was handled; the reply is not kept")],
    }


def test_a_reply_with_a_small_payload_is_kept_for_a_request_that_may_not_be_handled_again() -> None:
    pair = Pair()
    pair.worker.ask(Do(0), 0, 0.0, 60.0)
    copy = through_the_wire(pair.worker.sent[0])
    pair.carry()
    pair.answer(pair.shard.calls[0], size=40)
    pair.shard.sent.clear()
    pair.shard.take(copy, 0.0)
    assert [envelope.size for envelope in pair.shard.sent] == [40]


def test_a_duplicate_that_comes_after_its_sender_has_moved_on_is_dropped() -> None:
    pair = Pair()
    pair.worker.ask(Do(0), 0, 0.0, 60.0)
    copy = through_the_wire(pair.worker.sent[0])
    pair.carry()
    pair.answer(pair.shard.calls[0])
    pair.carry()
    pair.advance(1.0)  # a ping tells the floor
    pair.shard.take(copy, 1.0)
    assert (pair.shard.calls, pair.shard.sent) == ([], [])


def test_at_its_deadline_a_request_ends_and_says_whether_it_was_sent() -> None:
    pair = Pair()
    pair.worker.ask(Do(0), 50, 0.0, 5.0)
    pair.worker.ask(Do(1), 50, 0.0, 5.0)
    pair.worker.ask(Do(2), 50, 0.0, 0.4)
    pair.advance(0.4)
    assert pair.worker.ends == {0: [], 1: [], 2: [Expired(3, False)]}
    pair.advance(5.0)
    assert pair.worker.ends[0] == [Expired(1, True)]
    assert (pair.w.outgoing.outstanding, pair.w.outgoing.outstanding_bytes, pair.w.outgoing.waiting) == (
        0,
        0,
        0,
    )
    pair.answer(pair.shard.calls[0])
    pair.carry()  # too late: nothing happens
    assert pair.worker.ends[0] == [Expired(1, True)]


def test_more_than_twice_the_credit_is_refused_unhandled() -> None:
    """A peer that gave up what still runs, or one that does not keep to its credit."""
    pair = Pair()
    for number in range(1, 6):
        request = Envelope(
            kind=Kind.REQUEST,
            session=pair.p.number,
            id=number,
            floor=1,
            body=Do(number),
            payload=memoryview(bytes(50)),
            size=50,
        )
        pair.shard.take(request, 0.0)
    assert [call.id for call in pair.shard.calls] == [1, 2, 3, 4]
    assert isinstance(pair.shard.sent[0].body, No) and pair.shard.sent[0].body.code == "overload"
    pair.answer(pair.shard.calls[0])
    pair.shard.take(replace_id(request, 6), 0.0)
    assert [call.id for call in pair.shard.calls] == [2, 3, 4, 6]


def replace_id(envelope: Envelope, number: int, floor: int = 1) -> Envelope:
    return msgspec.structs.replace(envelope, id=number, floor=floor)


@pytest.mark.parametrize("number, floor", [(0, 0), (5, 6), (1 + WINDOW, 1), (2**63 - 1, 1)])
def test_an_id_outside_the_window_is_a_violation_that_changes_nothing(number: int, floor: int) -> None:
    pair = Pair()
    request = Envelope(kind=Kind.REQUEST, session=pair.p.number, id=number, floor=floor, body=Do(0))
    with pytest.raises(RemoteProtocolError, match="window"):
        pair.p.receive(request, 0.0)
    pair.worker.ask(Do(7), 0, 0.0, 60.0)
    pair.carry()
    assert [call.message for call in pair.shard.calls] == [Do(7)]


def test_a_floor_that_jumps_to_the_end_of_numbers_costs_nothing() -> None:
    incoming = Incoming(LIMITS)
    incoming.judge(1, 0, False)
    incoming.finish(1, Envelope(kind=Kind.REPLY, session=1, id=1, body=Done(1)))
    incoming.forget_below(2**63 - 1)
    assert incoming.floor == 2**63 - 1
    assert incoming.judge(2**63 - 1, 0, False).name == "NEW"  # type: ignore[union-attr]


def test_what_is_kept_of_finished_requests_is_bounded() -> None:
    incoming = Incoming(LIMITS)
    for number in range(1, 100):
        incoming.judge(number, 0, False)
        payload = memoryview(bytes(25))
        incoming.finish(
            number, Envelope(kind=Kind.REPLY, session=1, id=number, body=Done(1), payload=payload, size=25)
        )
    verdicts = [incoming.judge(number, 0, False) for number in range(1, 100)]
    assert sum(isinstance(verdict, Envelope) for verdict in verdicts) == 2  # 60 bytes hold two
    assert isinstance(verdicts[-1], Envelope)


def test_a_reply_to_a_request_that_was_never_made_is_a_violation() -> None:
    pair = Pair()
    for kind, body in ((Kind.REPLY, Done(0)), (Kind.REFUSAL, No("x", "y"))):
        with pytest.raises(RemoteProtocolError, match="unasked"):
            pair.w.receive(Envelope(kind=kind, session=pair.w.number, id=1, body=body), 0.0)
    for number in range(4):
        pair.worker.ask(Do(number), 0, 0.0, 60.0)
    with pytest.raises(RemoteProtocolError, match="unasked"):  # the fourth waits: it has not left
        pair.w.receive(Envelope(kind=Kind.REPLY, session=pair.w.number, id=4, body=Done(0)), 0.0)


def test_kinds_that_have_no_place_are_violations() -> None:
    pair = Pair()
    with pytest.raises(RemoteProtocolError, match="HELLO within a session"):
        hello = Hello(name="w0", to="p0", resume=False, requests=1, ping_s=1.0)
        pair.p.receive(Envelope(kind=Kind.HELLO, session=pair.p.number, body=hello), 0.0)
    with pytest.raises(RemoteProtocolError, match="WELCOME to a side"):
        body = Welcome(name="w0", resumed=False, requests=1)
        pair.p.receive(Envelope(kind=Kind.WELCOME, session=pair.p.number, body=body), 0.0)
    with pytest.raises(RemoteProtocolError, match="STRANGER to a side"):
        pair.p.receive(Envelope(kind=Kind.STRANGER, session=pair.p.number, body=Stranger("x")), 0.0)
    assert pair.p.state is State.OPEN


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(0, 2000))
@settings(deadline=None)
def test_a_notice_is_delivered_at_most_once(numbers: list[int], ahead: int) -> None:
    pair = Pair()
    seen = []
    for number in [*numbers, 40 + ahead, *numbers]:
        envelope = Envelope(kind=Kind.NOTICE, session=pair.p.number, id=number, body=Do(number))
        seen += [event.message for event in pair.p.receive(envelope, 0.0) if isinstance(event, Handle)]
    assert Counter(seen) == Counter({Do(number) for number in [*numbers, 40 + ahead]})


def test_notices_go_only_to_who_is_connected() -> None:
    pair = Pair()
    assert pair.w.notify(Do(1), None)
    pair.w.redial(0.0)
    assert not pair.w.notify(Do(2), None)


def test_a_silent_peer_is_lost_on_both_sides_and_resumes_where_it_was() -> None:
    pair = Pair()
    pair.worker.ask(Do(0), 10, 0.0, 60.0)
    pair.carry()
    pair.advance(8.0, carry=False)  # nothing gets through
    assert [type(event) for event in pair.worker.happened] == [Opened, Silent]
    assert [type(event) for event in pair.shard.happened] == [Handle, Silent]
    assert (pair.w.state, pair.p.state) == (State.DIALLING, State.SUSPENDED)
    pair.answer(pair.shard.calls[0])
    assert pair.shard.sent == []
    pair.advance(11.0)
    assert (pair.w.state, pair.p.state) == (State.OPEN, State.OPEN)
    assert pair.worker.ends == {0: [Answered(1, Done(0), None)]}
    assert pair.worker.happened[2] == Opened(True, False, None)
    assert pair.shard.calls == []  # it was not handled again


def test_a_silent_peer_that_is_heard_again_without_a_hello_goes_on() -> None:
    pair = Pair()
    pair.p.tick(3.5)
    assert pair.p.state is State.SUSPENDED
    ping = Envelope(kind=Kind.PING, session=pair.p.number, id=1)
    assert pair.p.receive(ping, 4.0) == [Returned()]
    assert pair.p.notify(Do(0), None)


def test_a_silent_peer_is_forgotten_in_the_end_and_its_session_is_not_known_any_more() -> None:
    pair = Pair()
    pair.worker.ask(Do(0), 0, 0.0, 60.0)
    pair.shard.ask(Do(9), 0, 0.0, 60.0)
    pair.carry()
    pair.advance(15.0, carry=False)
    assert isinstance(pair.shard.happened[-1], Aborted)
    assert pair.shard.session is None
    assert [type(end) for end in pair.shard.ends[9]] == [Aborted]
    pair.advance(20.0)
    # It may have been handled, and nobody remembers: it must not be sent again.
    assert pair.worker.ends == {0: [Aborted(1, "not known")]}
    assert [type(event) for event in pair.worker.happened[-3:]] == [Renewed, Aborted, Opened]
    assert pair.w.number == pair.p.number == 5 * LINKS + 2


def test_what_has_not_left_survives_a_new_session() -> None:
    pair = Pair()
    for number in range(5):
        pair.worker.ask(Do(number), 0, 0.0, 60.0)
    pair.carry()
    pair.shard.lose_session()
    pair.advance(4.0)
    assert [[type(end) for end in ends] for ends in pair.worker.ends.values()] == [[Aborted]] * 3 + [[], []]
    assert [call.message for call in pair.shard.calls[-2:]] == [Do(3), Do(4)]


def test_requests_of_a_peer_that_was_started_anew_are_handled_although_their_ids_were_used_before() -> None:
    pair = Pair()
    for number in range(3):
        pair.shard.ask(Do(number), 0, 0.0, 60.0)
        pair.carry()
        call = pair.worker.calls.pop()
        pair.w.reply(call.number, call.id, Done(number), None)
        pair.worker.flush()
        pair.carry()
    pair.shard.lose_session()
    pair.advance(10.0)
    pair.shard.ask(Do(9), 0, pair.now, 60.0)
    pair.carry()
    assert [call.message for call in pair.worker.calls] == [Do(9)]


def test_the_reply_of_a_handler_from_a_former_session_is_dropped() -> None:
    pair = Pair()
    pair.worker.ask(Do(0), 0, 0.0, 60.0)
    pair.carry()
    old = pair.shard.calls[0]
    pair.shard.lose_session()
    pair.advance(4.0)
    pair.worker.ask(Do(1), 0, pair.now, 60.0)
    pair.carry()
    pair.p.reply(old.number, 2, Done(0), None)
    pair.shard.flush()
    pair.carry()
    assert pair.worker.ends[1] == []


def test_a_goodbye_ends_the_session_at_once() -> None:
    pair = Pair()
    pair.shard.ask(Do(0), 0, 0.0, 60.0)
    pair.carry()
    assert pair.w.close("the script has ended") == []
    pair.worker.flush()
    pair.carry()
    assert pair.shard.happened[-2:] == [
        Left("it said goodbye: the script has ended"),
        Aborted(1, "restarted"),
    ]
    assert pair.w.state is State.CLOSED


def test_a_hello_that_was_overtaken_is_told_from_the_newest() -> None:
    pair = Pair()
    hello = Envelope(
        kind=Kind.HELLO,
        session=pair.p.number,
        id=1,
        body=Hello(name="w0", to="p0", resume=True, requests=3, ping_s=0.5),
    )
    assert pair.p.is_newest_hello(msgspec.structs.replace(hello, id=3))
    assert pair.p.is_newest_hello(msgspec.structs.replace(hello, id=3))
    assert not pair.p.is_newest_hello(msgspec.structs.replace(hello, id=2))


def test_whoever_answers_under_another_name_is_not_welcome() -> None:
    worker = Side("w0", "p0", dialled=True)
    worker.tick(0.0)
    assert worker.session is not None
    welcome = Envelope(
        kind=Kind.WELCOME,
        session=worker.session.number,
        body=Welcome(name="p1", resumed=False, requests=3),
    )
    with pytest.raises(RemoteProtocolError, match="'p1' answered the hello to p0"):
        worker.session.receive(welcome, 0.1)
    assert worker.session.state is State.DIALLING


def test_rings_and_slots_are_told_of() -> None:
    pair = Pair()
    pair.w.mapped()
    pair.w.free([1, 2])
    pair.worker.flush()
    pair.carry()
    assert pair.shard.happened == [Mapped(), FreedSlots([1, 2])]


def test_the_round_trip_is_measured_and_slows_resending() -> None:
    limits = replace(LIMITS, silence_s=30.0)
    pair = Pair(limits=limits)
    pair.worker.tick(0.5)
    pong = Envelope(kind=Kind.PONG, session=pair.w.number, id=1, credit=100)
    pair.w.receive(pong, 2.5)
    assert pair.w.rtt_s == 2.0
    pair.worker.sent.clear()
    pair.worker.ask(Do(0), 0, 3.0, 60.0)
    pair.worker.sent.clear()
    for now in (4.5, 10.9):
        pair.worker.tick(now)
        assert (Kind.REQUEST, 1) not in sent(pair.worker)
    pair.worker.tick(11.0)
    assert (Kind.REQUEST, 1) in sent(pair.worker)


def test_an_answer_that_may_lie_unread_is_not_missing_yet() -> None:
    """It is asked again after 1 s, and given up after 5 s."""
    pair = Pair(limits=replace(LIMITS, silence_s=30.0))
    pair.worker.ask(Do(0), 0, 0.0, 5.0)
    pair.worker.sent.clear()
    for now in (2.0, 4.9, 5.5, 7.9):
        assert pair.w.is_unanswered(now)
        assert pair.w.tick(now, now - 0.5) == [], "neither given up"
        assert pair.w.next_deadline() > now
        pair.worker.flush()
        assert (Kind.REQUEST, 1) not in sent(pair.worker), "nor asked again"
    assert pair.w.tick(8.5, 4.0) == [], "what came by 4.5 s is read: it may be answered in time"
    pair.worker.flush()
    assert (Kind.REQUEST, 1) in sent(pair.worker), "but not at once"
    assert pair.w.tick(9.0, 4.0) == [Expired(1, True)]


@pytest.mark.parametrize(("carried", "most_s"), [(False, HELLO_MOST_S), (True, HELLO_CARRIED_S)])
def test_who_is_heard_and_not_answered_says_hello_more_and_more_seldom(carried: bool, most_s: float) -> None:
    """Thousands who say it all the time to one who is started again would keep him from answering any."""
    side = Side("w0", "p0", dialled=True)
    session = side.session
    said: list[float] = []
    assert session is not None
    session.carried = carried
    while len(said) < 10:
        said.append(session.next_deadline())
        side.tick(said[-1])
    pauses = [after - before for before, after in pairwise(said)]
    assert pauses == sorted(pauses) and (pauses[0], pauses[-1]) == (HELLO_S, most_s)


@pytest.mark.parametrize("before_s", [1.0, 0.01, 0.0001, 0.0])
def test_while_what_came_lies_unread_answers_are_looked_for_now_and_then(before_s: float) -> None:
    """All was read until so long before the answer was due."""
    pair = Pair(limits=replace(LIMITS, silence_s=30.0, resend_s=60.0, resend_most_s=60.0))
    pair.worker.ask(Do(0), 0, 0.0, 5.0)
    now, looks = 5.0, 0
    while now < 15.0:
        assert [event for event in pair.w.tick(now, now - 5.0 + before_s) if isinstance(event, Expired)] == (
            [] if before_s or now > 5.0 else [Expired(1, True)]
        )
        looks += 1
        now = pair.w.next_deadline()
    assert looks < 50, "with the pings"


def test_who_waits_for_no_answer_misses_none() -> None:
    pair = Pair()
    pair.worker.ask(Do(0), 0, 0.0, 5.0)
    assert pair.w.is_unanswered(5.0)
    pair.carry()
    pair.answer(pair.shard.calls[0])
    pair.carry()
    assert pair.worker.ends[0] and not pair.w.is_unanswered(1e9)


FUZZ_KINDS = [kind for kind in Kind if kind is not Kind.HELLO]


def some_envelope(chance: random.Random, number: int) -> Envelope:
    kind = chance.choice(FUZZ_KINDS)
    bodies = {
        Kind.WELCOME: Welcome(
            name=chance.choice(["p0", "w0", "x"]), resumed=chance.random() < 0.5, requests=3
        ),
        Kind.STRANGER: Stranger("x"),
        Kind.REFUSAL: No("x", "y"),
        Kind.BYE: Bye("x"),
        Kind.FREED: Freed([chance.randrange(99)]),
    }
    body = bodies.get(kind)
    size, payload = -1, None
    if kind in (Kind.REQUEST, Kind.REPLY, Kind.NOTICE):
        body = chance.choice([Do(1), Look(1), Done(1)])
        if chance.random() < 0.5:
            size = chance.choice([0, 1, 50])
            payload = memoryview(bytes(size))
    numbers = [0, 1, 2, 3, 4, 10, WINDOW, 2**63 - 1]
    return Envelope(
        kind=kind,
        session=number,
        id=chance.choice(numbers),
        floor=chance.choice(numbers),
        credit=chance.choice([0, 100, 2**63 - 1]),
        body=body,
        payload=payload,
        size=size,
    )


@settings(max_examples=2500, deadline=None)
@given(st.integers(0, 2**64), st.booleans())
def test_whatever_envelopes_come_a_session_stays_within_its_bounds(seed: int, dialled: bool) -> None:
    """Well formed and hostile: any kind, any numbers, in any order."""
    chance = random.Random(seed)
    pair = Pair()
    side = pair.worker if dialled else pair.shard
    session = side.session
    assert session is not None
    now = 0.0
    for _ in range(12):
        if session.state is State.CLOSED:
            break
        if chance.random() < 0.2:
            now += chance.choice([0.1, 1.0, 5.0])
            session.tick(now)
        try:
            happened = session.receive(some_envelope(chance, session.number), now)
        except RemoteProtocolError:
            continue
        for event in happened:
            if isinstance(event, Handle) and event.id and chance.random() < 0.5:
                session.reply(event.number, event.id, Done(1), None)
        for envelope in session.outbox:
            through_the_wire(envelope)
        assert session.running <= 2 * LIMITS.requests
        session.outbox.clear()
