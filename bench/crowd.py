"""Nodes, workers and shards that only talk: what a coordinator of many jobs hears of a real cluster, and no training.

Each node and each member has a ZeroMQ connection of its own to the coordinator, and does on it what `zml node`, an
agent and a shard do: offers, joins, heartbeats at the interval that it was told, answers to orders, hellos again when
it is not known any more, goodbyes. It has neither the endpoint's code nor processes behind it, so that thousands of
them do not starve what is measured. `jobs.py` starts two processes of this, and asks them line by line:

    stats           how many are here and what they have heard, as one line of JSON
    again           forget who was heard
    end             every script comes to its end, some at a time
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import checkout  # noqa: F401
import uvloop
import zmq
from msgspec import Struct
from peer import quiet

import zml.cluster.wire as wire
from zml import messages
from zml.lease import SLOWER
from zml.transport.endpoint import REDIAL_MOST_MS, REDIAL_MS
from zml.transport.frames import Bye, Envelope, Hello, Kind, No, Vocabulary, pack, unpack
from zml.transport.session import HELLO_CARRIED_S

TICK_S = 0.01
PING_S = 1.5  # as of connections with a heartbeat each second, which then need no pings
LOOK_S = 0.25  # who still waits for an answer looks so often
AGAIN_S = 2.0  # and asks again after this
RETRY_S = 0.1
ENDING = 32  # scripts that come to their end at the same time, in each process
MOST_BYTES = 8 << 20
VOCABULARY = Vocabulary(wire.Vocabulary)
NOTICE = int(Kind.NOTICE)
Answered = Callable[[Struct], None]


class Request:
    """What was asked, until it is answered."""

    __slots__ = ("answered", "asked_at", "message", "number", "payload")

    def __init__(self, message: Struct, payload: bytes | None, answered: Answered) -> None:
        self.message, self.payload, self.answered = message, payload, answered
        self.number, self.asked_at = 0, 0.0


class Peer:
    """One connection, as little of it as the coordinator cannot tell from a whole one."""

    def __init__(self, crowd: Crowd, name: str) -> None:
        self.crowd = crowd
        self.name = name
        self.session = random.getrandbits(39) << 24
        self.welcome = False
        self.floor = self.next_request = self.next_notice = 1
        self.asked: dict[int, Request] = {}
        self.waiting: list[Request] = []  # to be asked when it is welcome, or once more
        self.hellos = 0  # said in this session
        self.hello_at = self.hello_s = 0.0  # when the next is due, and the one after it
        self.beat_at = 0.0
        self.heard_at = time.monotonic()
        self.socket = crowd.context.socket(zmq.DEALER)
        options = {
            zmq.LINGER: 0,
            zmq.IMMEDIATE: 1,
            zmq.RECONNECT_IVL: REDIAL_MS,
            zmq.RECONNECT_IVL_MAX: REDIAL_MOST_MS,  # as from other machines
            zmq.ROUTING_ID: f"{name}/{random.getrandbits(128):032x}".encode(),
        }
        for option, value in options.items():
            self.socket.setsockopt(option, value)
        self.descriptor = int(self.socket.getsockopt(zmq.FD))
        crowd.loop.add_reader(self.descriptor, self.drain)
        self.socket.connect(crowd.address)
        crowd.restless.add(self)

    def close(self) -> None:
        self.crowd.loop.remove_reader(self.descriptor)
        self.crowd.restless.discard(self)
        self.crowd.leave(self)
        self.send(Envelope(kind=Kind.BYE, session=self.session, body=Bye("it ends")))
        self.socket.close(linger=1000)

    # -- saying something ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A session that the coordinator does not know, with what is unanswered to be asked again in it."""
        self.session += 1
        self.welcome = False
        self.waiting += self.asked.values()
        self.asked.clear()
        self.floor = self.next_request = self.next_notice = 1
        self.hellos, self.hello_s = 0, LOOK_S
        self.crowd.restless.add(self)
        self.hello()

    def hello(self) -> None:
        self.hellos += 1
        body = Hello(name=self.name, to="coordinator", resume=False, requests=64, ping_s=PING_S)
        hello = Envelope(kind=Kind.HELLO, session=self.session, id=self.hellos, credit=MOST_BYTES, body=body)
        if self.send(hello):
            self.hello_at = time.monotonic() + self.hello_s
            self.hello_s = min(2 * self.hello_s, HELLO_CARRIED_S)
        else:  # as one that waits for the connection
            self.hello_at = time.monotonic() + LOOK_S

    def ask(self, message: Struct, payload: bytes | None, answered: Answered) -> None:
        self.waiting.append(Request(message, payload, answered))
        self.ask_waiting()

    def ask_waiting(self) -> None:
        self.crowd.restless.add(self)
        if not self.welcome:
            return
        waiting, self.waiting = self.waiting, []
        for request in waiting:
            request.number, self.next_request = self.next_request, self.next_request + 1
            self.asked[request.number] = request
            self.put(request)

    def put(self, request: Request) -> None:
        request.asked_at = time.monotonic()
        self.floor = min(self.asked)
        payload = request.payload
        size = -1 if payload is None else len(payload)
        envelope = Envelope(
            kind=Kind.REQUEST,
            session=self.session,
            id=request.number,
            floor=self.floor,
            credit=MOST_BYTES,
            body=request.message,
            size=size,
        )
        self.send(envelope, payload)

    def notify(self, message: Struct) -> None:
        number, self.next_notice = self.next_notice, self.next_notice + 1
        self.send(Envelope(kind=Kind.NOTICE, session=self.session, id=number, floor=self.floor, body=message))

    def send(self, envelope: Envelope, payload: bytes | None = None) -> bool:
        """False: nobody is there for now."""
        sent = True
        try:
            self.socket.send(pack(envelope), zmq.NOBLOCK | (zmq.SNDMORE if payload is not None else 0))
            if payload is not None:
                self.socket.send(payload, zmq.NOBLOCK)
        except zmq.Again:
            sent = False
        self.drain_later()
        return sent

    def look(self, now: float) -> bool:
        """Say again what was not answered; whether there is anything."""
        if not self.welcome:
            if now >= self.hello_at:
                self.hello()
            return True
        if self.waiting:
            self.ask_waiting()
        for request in list(self.asked.values()):
            if now - request.asked_at >= AGAIN_S:
                self.put(request)
        return bool(self.asked or self.waiting)

    # -- hearing something -----------------------------------------------------------------------------------

    def drain_later(self) -> None:
        """To send may swallow the signal of what has come."""
        if self.socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            self.crowd.loop.call_soon(self.drain)

    def drain(self) -> None:
        while not self.socket.closed:
            try:
                header = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            if header[5] == NOTICE and b"Pulse" in header:
                self.heard_at = time.monotonic()
                self.crowd.heard(self)
                self.paced(header)
                continue
            payload = None
            while self.socket.getsockopt(zmq.RCVMORE):
                payload = memoryview(self.socket.recv(zmq.NOBLOCK))
            self.take(unpack(header, payload, VOCABULARY, payload_bytes=MOST_BYTES))

    def take(self, envelope: Envelope) -> None:
        body = envelope.body
        if envelope.session != self.session:
            return
        match envelope.kind:
            case Kind.WELCOME:
                self.welcome = True
                self.ask_waiting()
                self.opened()
            case Kind.STRANGER:
                self.begin()
            case Kind.REQUEST:
                assert body is not None
                reply = self.order(body, envelope.payload)
                kind = Kind.REFUSAL if isinstance(reply, No) else Kind.REPLY
                self.send(
                    Envelope(kind=kind, session=self.session, id=envelope.id, credit=MOST_BYTES, body=reply)
                )
            case Kind.REPLY | Kind.REFUSAL:
                self.answer(envelope.id, body)
            case Kind.NOTICE:
                assert body is not None
                self.told(body)
            case Kind.PING:
                self.send(Envelope(kind=Kind.PONG, session=self.session, id=envelope.id))

    def answer(self, number: int, body: Struct | None) -> None:
        request = self.asked.pop(number, None)
        assert body is not None
        if request is None:
            return
        if isinstance(body, No) and body.code in ("no-room", "strange"):
            self.crowd.counts[body.code] += 1
            self.waiting.append(request)  # it may be taken later: `look`
        else:
            request.answered(body)
        self.floor = min(self.asked, default=self.next_request)

    def opened(self) -> None:
        """The coordinator knows this session."""

    def paced(self, pulse: bytes) -> None:
        """A pulse may ask for fewer heartbeats."""

    def order(self, message: Struct, payload: memoryview | None) -> Struct:
        raise NotImplementedError

    def told(self, message: Struct) -> None:
        """A notice that is no pulse."""

    def beat(self) -> None:
        raise NotImplementedError


class Node(Peer):
    """What `zml node` says."""

    def __init__(self, crowd: Crowd, name: str, cpus: int) -> None:
        super().__init__(crowd, f"node-{name}")
        self.id = name
        self.cpus = cpus
        self.boot = f"{random.getrandbits(64):016x}"
        self.members: dict[tuple[str, str], Member] = {}
        self.offering = False
        self.offered = False
        self.begin()
        self.offer()

    def begin(self) -> None:
        self.offered = False
        super().begin()

    def offer(self) -> None:
        if self.offering:
            return
        self.offering = True
        offer = wire.Offer(node=self.id, boot=self.boot, cpus=self.cpus, gpus=0, memory_mb=64_000)
        runs = json.dumps({"slots": list(self.members)}).encode()
        self.ask(offer, runs, self.taken)

    def taken(self, answer: Struct) -> None:
        self.offering = False
        if isinstance(answer, wire.Offered):
            self.offered = True
            self.crowd.beats(self, answer.heartbeat_s)
        else:
            self.crowd.wrong(f"{self.name} was not taken: {answer}")

    def order(self, message: Struct, payload: memoryview | None) -> Struct:
        match message:
            case wire.Run():
                if (message.job, message.slot) not in self.members:
                    self.members[message.job, message.slot] = Member(self, message.job, message.slot)
            case wire.Quit():
                member = self.members.get((message.job, message.slot))
                if member is not None:
                    self.crowd.wrong(f"{member.name} was told to quit: {message.because}")
                    member.cease("it was told to")
            case _:
                return No("unexpected", f"a node does not take {type(message).__name__}")
        return messages.Ok()

    def told(self, message: Struct) -> None:
        if isinstance(message, wire.Strange):
            self.offer()

    def beat(self) -> None:
        self.notify(wire.NodeBeat(self.id, self.boot))

    def ceased(self, member: Member, because: str) -> None:
        del self.members[member.job, member.slot]
        ceased = wire.Ceased(self.id, member.job, member.slot, because, because == "done")
        self.ask(ceased, None, lambda answer: self.crowd.count("ceased"))


class Member(Peer):
    """What an agent or a shard says."""

    def __init__(self, node: Node, job: str, slot: str) -> None:
        super().__init__(node.crowd, f"{slot}-of-{job}")
        self.node, self.job, self.slot = node, job, slot
        self.incarnation = 0  # until it has joined
        self.launched = slot[0] == "p"
        self.leaving = self.exited = False
        self.every_s, self.pulse = 0.0, b""  # between heartbeats; the end of the latest pulse
        self.begin()
        join = messages.Join(
            job=job,
            role="shard" if slot[0] == "p" else "worker",
            member=slot,
            node=node.id,
            pid=1,
            addresses=["tcp://127.0.0.1:1"] if slot[0] == "p" else [],
        )
        self.ask(join, None, self.joined)

    def joined(self, answer: Struct) -> None:
        if not isinstance(answer, messages.Joined):
            self.crowd.wrong(f"{self.name} did not join: {answer}")
            return
        self.incarnation = answer.incarnation
        self.every_s = max(answer.heartbeat_s, answer.every_s)
        self.crowd.beats(self, self.every_s)
        self.crowd.count("joined")

    def order(self, message: Struct, payload: memoryview | None) -> Struct:
        if not self.incarnation:
            return No("early", f"{self.name} has not joined yet")
        match message:
            case messages.Launch():
                if not self.launched:
                    self.launched = True
                    self.crowd.scripts[self] = None
            case messages.Settle():
                return messages.Stands(-1)
            case messages.Stop():
                if not self.leaving:
                    self.leaving = True
                    leave = messages.Leave(self.job, self.slot, self.incarnation, message.because)
                    self.ask(leave, None, lambda answer: self.cease("done"))
        return messages.Ok()

    def end(self) -> None:
        """The script has come to its end."""
        self.exited = True
        exited = messages.Exited(job=self.job, member=self.slot, incarnation=self.incarnation)
        self.ask(exited, None, lambda answer: self.crowd.count("exited"))

    def cease(self, because: str) -> None:
        if not self.socket.closed:
            self.crowd.scripts.pop(self, None)
            self.close()
            self.node.ceased(self, because)

    def told(self, message: Struct) -> None:
        if isinstance(message, messages.Fenced) and not self.exited:  # who has said that it ends is told so
            self.crowd.wrong(f"{self.name} was fenced: {message.because}")

    def beat(self) -> None:
        self.beat_at = time.monotonic()
        self.notify(messages.Heartbeat(self.job, self.slot, self.incarnation, self.every_s))

    def opened(self) -> None:
        if self.incarnation:  # as a lease is kept: a coordinator that was started again is to hear of it soon
            self.beat()

    def paced(self, pulse: bytes) -> None:
        if pulse[-9:] == self.pulse:
            return
        self.pulse = pulse[-9:]  # the pace is its last field
        body = unpack(pulse, None, VOCABULARY, payload_bytes=MOST_BYTES).body
        assert isinstance(body, messages.Pulse)
        if 0.0 < self.every_s != body.every_s:
            self.every_s = min(body.every_s, SLOWER * self.every_s)  # as a lease is kept
            self.pulse = b"" if self.every_s < body.every_s else self.pulse
            self.crowd.beats(self, self.every_s)


class Crowd:
    """All of them in this process."""

    def __init__(self, address: str, first: int, nodes: int, cpus: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.address = address
        self.context: zmq.Context[zmq.SyncSocket] = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, 60_000)
        self.restless: set[Peer] = set()  # those that wait for an answer
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self.scripts: dict[Member, None] = {}  # that were launched and have not ended
        self.late_s = 0.0  # how much later than it should a heartbeat was said, at most
        self.ending = False
        self.ended = 0
        self.pulsed: set[Peer] = set()  # members heard since they were last told to forget it
        self.last_pulse = 0.0  # of a member that had not been heard before
        self.replies: deque[float] = deque(maxlen=20_000)  # seconds from heartbeat to pulse
        # Who beats in which tick of the interval, in turn; all have the same one, but for nodes.
        self.wheels: dict[float, list[set[Peer]]] = {}
        self.spoke: dict[Peer, set[Peer]] = {}
        self.paces: dict[Peer, float] = {}
        self.nodes = [Node(self, f"n{number}", cpus) for number in range(first, first + nodes)]

    def count(self, what: str) -> None:
        self.counts[what] += 1

    def wrong(self, what: str) -> None:
        self.counts["wrong"] += 1
        if len(self.errors) < 20:
            self.errors.append(what)

    def beats(self, peer: Peer, every_s: float) -> None:
        """From now on it says a heartbeat so often, all of them evenly spread."""
        every_s = round(every_s, 1)
        if self.paces.get(peer) != every_s:
            if (turn := self.spoke.pop(peer, None)) is not None:
                turn.discard(peer)
            self.paces[peer] = every_s
            wheel = self.wheels.setdefault(every_s, [set() for _ in range(max(1, round(every_s / TICK_S)))])
            self.spoke[peer] = min(random.sample(wheel, k=min(4, len(wheel))), key=len)
            self.spoke[peer].add(peer)

    def leave(self, peer: Peer) -> None:
        if (turn := self.spoke.pop(peer, None)) is not None:
            turn.discard(peer)
        self.paces.pop(peer, None)
        self.pulsed.discard(peer)

    def heard(self, peer: Peer) -> None:
        self.counts["pulses"] += 1
        if isinstance(peer, Member):
            self.replies.append(peer.heard_at - peer.beat_at)
            if peer not in self.pulsed:
                self.pulsed.add(peer)
                self.last_pulse = peer.heard_at

    async def live(self) -> None:
        start = time.monotonic()
        tick, looked_at = 0, start
        while True:
            now = time.monotonic()
            self.late_s = max(self.late_s, now - start - tick * TICK_S)
            while tick < (now - start) / TICK_S:
                for wheel in self.wheels.values():
                    for peer in list(wheel[tick % len(wheel)]):
                        if peer.welcome:
                            peer.beat()
                            self.counts["beats"] += 1
                tick += 1
            if now - looked_at >= LOOK_S:
                looked_at = now
                for peer in list(self.restless):
                    if not peer.look(now):
                        self.restless.discard(peer)
            while self.ending and self.scripts and self.ended - self.counts["exited"] < ENDING:
                member = next(iter(self.scripts))
                del self.scripts[member]
                self.ended += 1
                member.end()
            await asyncio.sleep(TICK_S)

    def stats(self) -> dict[str, Any]:
        replies = sorted(self.replies)
        self.replies.clear()
        return {
            **self.counts,
            "nodes": sum(node.offered for node in self.nodes),
            "members": sum(len(node.members) for node in self.nodes),
            "heard": len(self.pulsed),
            "last_pulse": self.last_pulse,
            "launched": len(self.scripts),
            "unanswered": sum(len(peer.asked) + len(peer.waiting) for peer in self.restless),
            "replies_ms": [1e3 * reply for reply in replies[:: max(1, len(replies) // 2000)]],
            "late_s": round(self.late_s, 3),
            "errors": self.errors,
            "cpu_s": time.process_time(),
        }

    def command(self, line: str) -> None:
        match line:
            case "again":
                self.pulsed.clear()
            case "end":
                self.ending = True
        print(json.dumps(self.stats()), flush=True)


async def main(address: str, first: int, nodes: int, cpus: int) -> None:
    loop = asyncio.get_running_loop()
    crowd = Crowd(address, first, nodes, cpus)
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    living = asyncio.ensure_future(crowd.live())
    while line := await lines.readline():
        crowd.command(line.decode().strip())
        if living.done():
            living.result()
    living.cancel()
    crowd.context.destroy(linger=0)


if __name__ == "__main__":
    import resource

    quiet()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
