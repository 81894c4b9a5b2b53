"""Hostile peers. In every case: refused, counted, logged; nothing has changed, and the others are served.

The attackers speak ZeroMQ, or raw ZMTP (RFC 23), or nothing at all. What is not here: a peer with an authorized key
can still make a receiver hold one endless multipart message until it disconnects; ZeroMQ has no limit for that.
"""

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
import zmq
from structlog.testing import capture_logs

from tests.transport.wiring import PATIENCE_S, QUICK, Add, Done, Echo, Party, run, running
from zml.transport import Keys, PeerLost, make_keys
from zml.transport.auth import new_pair
from zml.transport.endpoint import HALF_OPEN
from zml.transport.frames import (
    MAGIC,
    VERSION,
    Envelope,
    Freed,
    Hello,
    Kind,
    RingOffer,
    Stranger,
    Vocabulary,
    Welcome,
    pack,
    unpack,
)

LOCAL = "tcp://127.0.0.1:0"
WORDS = Vocabulary(Echo | Add | Done)
SESSION = 7 << 40
ROUTE = b"mallory/" + b"0" * 32
LIMITS = replace(
    QUICK, payload_bytes=1 << 20, credit_bytes=4 << 20, silence_s=20.0, silence_most_s=20.0, forget_s=20.0
)

Socket = zmq.SyncSocket
Logs = list[Any]


class Attacker:
    """A DEALER that sends whatever it likes."""

    def __init__(self, address: str, route: bytes | None = ROUTE, **options: Any) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if route is not None:
            self.socket.setsockopt(zmq.ROUTING_ID, route)
        for option, value in options.items():
            self.socket.setsockopt(getattr(zmq, option), value)
        self.socket.connect(address)

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def say(self, kind: Kind, body: msgspec.Struct | None = None, **fields: Any) -> None:
        payload = fields.pop("payload", None)
        if payload is not None:
            fields.setdefault("size", len(payload))
        header = pack(Envelope(kind=kind, session=fields.pop("session", SESSION), body=body, **fields))
        self.send(header, *([] if payload is None else [payload]))

    def hello(self, name: str = "mallory", *, ring: RingOffer | None = None, **fields: Any) -> None:
        self.say(
            Kind.HELLO, Hello(name=name, to="p0", resume=False, requests=9, ping_s=1.0, ring=ring), **fields
        )

    async def hear(self) -> Envelope:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    header, *rest = self.socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    await asyncio.sleep(0.005)
                    continue
                payload = memoryview(rest[0]) if rest else None
                return unpack(header, payload, WORDS, payload_bytes=1 << 30)

    async def come_in(self, name: str = "mallory") -> Welcome:
        self.hello(name)
        while True:
            body = (await self.hear()).body
            if isinstance(body, Welcome):
                return body
            assert isinstance(body, Stranger)  # the answer to what was said before

    def close(self) -> None:
        self.socket.close(linger=0)
        self.context.term()


@contextmanager
def attacker(shard: Party, route: bytes | None = ROUTE, **options: Any) -> Iterator[Attacker]:
    mallory = Attacker(shard.endpoint.addresses[0], route, **options)
    try:
        yield mallory
    finally:
        mallory.close()


@asynccontextmanager
async def attacked(
    *, limits: Any = LIMITS, keys: tuple[Keys, Keys] | None = None
) -> AsyncIterator[tuple[Party, Logs]]:
    """A shard that is served, and what it logs. Afterwards: nothing has been handled but the good worker's."""
    theirs, ours = keys or (None, None)
    shard = Party("p0", [LOCAL], limits=limits, keys=theirs)
    good = Party("good", limits=limits, keys=ours)
    with capture_logs() as logs:
        async with running(shard, good):
            await good.endpoint.connect("p0", shard.endpoint.addresses)
            await good.endpoint.request("p0", Add(1), timeout_s=30)
            yield shard, logs
            answer = await good.endpoint.request("p0", Echo(2), b"still served", timeout_s=30)
            assert answer.message == Done(2) and bytes(answer.payload or b"") == b"still served"
            assert shard.endpoint.peers()["good"].connected
            assert shard.handled == [1]


async def refused(shard: Party, logs: Logs, rule: str, times: int = 1) -> None:
    counts = shard.endpoint.violations.counts
    await shard.until(lambda: counts[rule] >= times)
    assert set(counts) <= {rule, "handshake"}  # a connection that ends while it shakes hands is counted too
    assert any(entry.get("rule") == rule and entry["log_level"] == "warning" for entry in logs)


def raw_header(*fields: object) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return MAGIC + bytes([VERSION]) + packed


def request(size: int) -> bytes:
    return raw_header(int(Kind.REQUEST), SESSION, 1, 1, 0, size, -1, {"type": "Add", "number": 66})


GOOD = pack(Envelope(kind=Kind.REQUEST, session=SESSION, id=1, floor=1, body=Add(66)))
MALFORMED: dict[str, tuple[str, list[bytes]]] = {
    "an empty message": ("magic", [b""]),
    "the magic of something else": ("magic", [b"PICKLE" + GOOD]),
    "random bytes": ("magic", [bytes(range(200, 256)) * 20]),
    "a version that is not ours": ("version", [GOOD[:3] + b"\xff" + GOOD[4:]]),
    "a truncated header": ("msgpack", [GOOD[:-3]]),
    "a header with a tail": ("msgpack", [GOOD + b"\0\0"]),
    "a header of 5,000 bytes": ("header-size", [GOOD + bytes(5000 - len(GOOD))]),
    "a header of a megabyte": ("header-size", [bytes(1 << 20)]),
    "a bomb of maps": ("msgpack", [MAGIC + bytes([VERSION]) + b"\xdd\x00\x98\x96\x80" + b"\x80" * 4000]),
    "a bomb of arrays": ("msgpack", [MAGIC + bytes([VERSION]) + b"\xdd\xff\xff\xff\xff" + b"\x90" * 4000]),
    "deep nesting": ("msgpack", [MAGIC + bytes([VERSION]) + b"\x91" * 4090]),
    "an extension type": ("msgpack", [MAGIC + bytes([VERSION]) + b"\xc7\x08\x01" + bytes(8)]),
    "a payload shorter than announced": ("payload-size", [request(10), b"123456789"]),
    "a payload longer than announced": ("payload-size", [request(10), b"12345678901"]),
    "a payload that is not there": ("payload-size", [request(10)]),
    "a payload that was not announced": ("payload-size", [request(-1), b"1"]),
    "a payload of four exabytes": ("payload-size", [request(2**62), b"1"]),
    "a payload above the limit": ("payload-size", [request((1 << 20) + 1), b"1"]),
    "three frames": ("frames", [GOOD, b"", b""]),
    "fifty-one frames": ("frames", [GOOD, *([b""] * 50)]),
    "two thousand large frames": ("frames", [GOOD, *([bytes(5000)] * 2000)]),
    "a message of another vocabulary": (
        "body",
        [raw_header(int(Kind.REQUEST), SESSION, 1, 1, 0, -1, -1, {"type": "Shutdown"})],
    ),
    "a field of the wrong type": (
        "body",
        [raw_header(int(Kind.REQUEST), SESSION, 1, 1, 0, -1, -1, {"type": "Add", "number": "66"})],
    ),
    "a kind that does not exist": ("kind", [raw_header(77, SESSION, 1, 1, 0, -1, -1, None)]),
    "a name that begins with a zero byte": (
        "identity",
        [
            raw_header(
                int(Kind.HELLO), SESSION, 1, 1, 0, -1, -1,
                {"name": "\0good", "to": "p0", "resume": False, "requests": 9, "ping_s": 1.0},
            )
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_no_message_is_refused(what: str) -> None:
    """From a stranger, and again from one that has come in."""
    rule, frames = MALFORMED[what]

    async def main() -> None:
        async with attacked() as (shard, logs):
            with attacker(shard) as mallory:
                mallory.send(*frames)
                await refused(shard, logs, rule)
                await mallory.come_in()
                mallory.send(*frames)
                await refused(shard, logs, rule, 2)

    run(main())


@pytest.mark.parametrize(
    "route", [None, b"\0good", b"good", b"mallory/", b"mal lory/" + b"0" * 32, b"x" * 200]
)
def test_a_routing_id_that_is_not_ours_is_refused(route: bytes | None) -> None:
    """None: ZeroMQ makes one up, which begins with a zero byte, and so could anybody."""

    async def main() -> None:
        async with attacked() as (shard, logs):
            with attacker(shard, route) as mallory:
                mallory.hello()
                await refused(shard, logs, "identity")
                assert list(shard.endpoint.peers()) == ["good"]

    run(main())


def test_a_stranger_without_a_hello_is_told_so_and_nothing_is_handled() -> None:
    async def main() -> None:
        async with attacked() as (shard, _):
            with attacker(shard) as mallory:
                mallory.say(Kind.REQUEST, Add(66), id=1, floor=1)
                answer = await mallory.hear()
                assert (answer.kind, answer.session) == (Kind.STRANGER, SESSION)
                mallory.say(Kind.NOTICE, Add(66), id=1)
                assert (await mallory.hear()).kind is Kind.STRANGER
                mallory.say(Kind.STRANGER, Stranger("you are one"))
                mallory.say(Kind.PING, id=1)
                assert (await mallory.hear()).kind is Kind.STRANGER

    run(main())


def test_a_stale_session_changes_nothing() -> None:
    """Messages and hellos of a session that a newer one has replaced."""

    async def main() -> None:
        async with attacked() as (shard, logs):
            with attacker(shard) as mallory:
                await mallory.come_in()
                mallory.hello(session=SESSION + 1)
                assert isinstance((await mallory.hear()).body, Welcome)
                mallory.say(Kind.REQUEST, Add(66), id=1, floor=1)
                assert (await mallory.hear()).kind is Kind.STRANGER
                mallory.hello(session=SESSION)
                answer = await mallory.hear()
                assert (answer.kind, answer.body) == (Kind.STRANGER, Stranger("this session is over"))
                await refused(shard, logs, "hello")
                assert shard.endpoint.peers()["mallory"].session == SESSION + 1

    run(main())


def test_somebody_elses_session_number_is_of_no_use() -> None:
    async def main() -> None:
        async with attacked() as (shard, _):
            session = shard.endpoint.peers()["good"].session
            with attacker(shard) as mallory:
                mallory.say(Kind.REQUEST, Add(66), id=900, floor=900, session=session)
                assert (await mallory.hear()).kind is Kind.STRANGER
                await mallory.come_in()
                mallory.say(Kind.REQUEST, Add(66), id=901, floor=901, session=session)
                assert (await mallory.hear()).kind is Kind.STRANGER

    run(main())


def test_who_has_come_in_cannot_speak_as_somebody_else() -> None:
    async def main() -> None:
        async with attacked() as (shard, logs):
            with attacker(shard) as mallory:
                await mallory.come_in()
                mallory.hello("good", session=SESSION + 1)
                await refused(shard, logs, "identity")
                assert sorted(shard.endpoint.peers()) == ["good", "mallory"]

    run(main())


def test_a_peer_that_goes_on_breaking_the_rules_is_dropped_and_not_read_any_more() -> None:
    async def main() -> None:
        async with attacked() as (shard, logs):
            with attacker(shard) as mallory:
                await mallory.come_in()
                for _ in range(500):
                    mallory.send(b"nonsense")
                await shard.until(shard.lost)
                assert "it broke the rules 16 times" in shard.lost()[0]
                mallory.hello(session=SESSION + 1)
                with attacker(shard, b"other/" + b"1" * 32) as other:  # its message comes after all of those
                    await other.come_in("other")
                assert shard.endpoint.violations.counts["magic"] == LIMITS.violations
                assert "mallory" not in shard.endpoint.peers()
                assert (
                    sum(entry.get("rule") == "magic" for entry in logs) == 1
                )  # and fifteen are only counted

    run(main())


def test_violations_in_a_session_are_counted_and_change_nothing() -> None:
    async def main() -> None:
        async with attacked() as (shard, _):
            counts = shard.endpoint.violations.counts
            with attacker(shard) as mallory:
                await mallory.come_in()
                mallory.say(Kind.REQUEST, Add(66), id=0)
                mallory.say(Kind.REQUEST, Add(66), id=2**62, floor=1)
                mallory.say(Kind.REQUEST, Add(66), id=5, floor=6)
                await shard.until(lambda: counts["window"] == 3)
                mallory.say(Kind.REPLY, Done(1), id=1)
                mallory.say(Kind.REPLY, Done(1), id=2**62)
                await shard.until(lambda: counts["unasked"] == 2)
                mallory.say(Kind.WELCOME, Welcome(name="mallory", resumed=True, requests=1))
                mallory.say(Kind.STRANGER, Stranger("you are one"))
                await shard.until(lambda: counts["kind"] == 2)
                mallory.say(Kind.REQUEST, Add(66), id=1, floor=1, size=70_000, slot=3)
                mallory.say(Kind.NOTICE, Add(66), id=1, size=70_000, slot=3)
                await shard.until(lambda: counts["slot"] == 2)
                mallory.say(Kind.FREED, Freed([1, 2, 3]))
                mallory.say(Kind.MAPPED)
                mallory.say(Kind.REQUEST, Echo(5), id=1, floor=1)
                assert (await mallory.hear()).body == Done(5)

    run(main())


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/dev/zero", "/proc/1/fd/0", "/proc/self/mem", "../../x", "", "\0"]
)
def test_a_ring_that_is_something_else_is_not_mapped(path: str) -> None:
    async def main() -> None:
        async with attacked() as (shard, _):
            with attacker(shard) as mallory:
                mallory.hello(ring=RingOffer(path, b"n" * 16))
                welcome = (await mallory.hear()).body
                assert isinstance(welcome, Welcome) and not welcome.mapped and welcome.ring is None
                assert not shard.endpoint.peers()["mallory"].shared_memory

    run(main())


def test_slots_that_were_never_announced_are_refused() -> None:
    """A ring of its own, honestly mapped, and then lies about it."""

    async def main() -> None:
        from zml.transport.shm import Ring

        ring = Ring.create(4, 100_000)
        async with attacked() as (shard, _):
            counts = shard.endpoint.violations.counts
            with attacker(shard) as mallory:
                mallory.hello(ring=RingOffer(ring.path, ring.nonce))
                welcome = (await mallory.hear()).body
                assert isinstance(welcome, Welcome) and welcome.mapped
                for slot, size in [(4, 70_000), (2**40, 70_000), (0, 100_001), (0, 0)]:
                    mallory.say(Kind.NOTICE, Add(66), id=1, size=size, slot=slot)
                await shard.until(lambda: counts["slot"] == 4)
                mallory.say(Kind.FREED, Freed([0]))  # of the shard's ring, which has lent it to nobody
                mallory.say(Kind.FREED, Freed([-1, 2**40]))
                await shard.until(lambda: counts["slot"] == 6)
        ring.close()

    run(main())


def test_a_peer_that_ignores_its_credit_is_refused_beyond_twice_of_it() -> None:
    async def main() -> None:
        limits = replace(LIMITS, payload_bytes=100_000, credit_bytes=200_000)
        async with attacked(limits=limits) as (shard, _):
            shard.gate = asyncio.Event()
            with attacker(shard) as mallory:
                await mallory.come_in()
                for number in range(1, 21):
                    mallory.say(Kind.REQUEST, Add(number), id=number, floor=1, payload=bytes(100_000))
                refusals = [(await mallory.hear()).kind for _ in range(16)]
                assert refusals == [Kind.REFUSAL] * 16
                assert shard.handled == [1, 1, 2, 3, 4]
                del shard.handled[1:]
            shard.gate.set()

    run(main())


def test_a_peer_that_does_not_read_is_not_waited_for_and_fills_only_its_own_queue() -> None:
    async def main() -> None:
        limits = replace(LIMITS, queue_bytes=3 << 20, send_hwm=2, slots=0)
        async with attacked(limits=limits) as (shard, _):
            with attacker(shard, RCVHWM=1, RCVBUF=4096) as mallory:
                await mallory.come_in()
                for number in range(1, 101):
                    mallory.say(Kind.REQUEST, Echo(number), id=number, floor=number, payload=bytes(1 << 20))
                    await asyncio.sleep(0)
                channel = shard.endpoint._listener
                assert channel is not None
                await shard.until(lambda: channel.queued)
                assert max(channel._queued_bytes.values()) <= limits.queue_bytes
                other = Party("other", limits=limits)
                async with running(other):
                    await other.endpoint.connect("p0", shard.endpoint.addresses)
                    for number in range(20):
                        await other.endpoint.request("p0", Echo(number), timeout_s=30)
                assert max(channel._queued_bytes.values(), default=0) <= limits.queue_bytes

    run(main())


# -- below ZeroMQ ---------------------------------------------------------------------------------------------


def greeting(mechanism: bytes = b"NULL") -> bytes:
    return b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32)


def ready(route: bytes) -> bytes:
    body = b"\x05READY"
    for name, value in ((b"Socket-Type", b"DEALER"), (b"Identity", route)):
        body += bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
    return bytes([4, len(body)]) + body


def frame(body: bytes, *, more: bool) -> bytes:
    return bytes([2 | more]) + struct.pack(">Q", len(body)) + body


async def raw(shard: Party) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    port = int(shard.endpoint.addresses[0].rpartition(":")[2])
    return await asyncio.open_connection("127.0.0.1", port)


async def shaken(shard: Party, route: bytes = ROUTE) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A raw connection after the handshake: from here on frames of messages are taken."""
    reader, writer = await raw(shard)
    writer.write(greeting() + ready(route))
    await reader.readuntil(b"READY")
    await reader.readuntil(b"Identity" + bytes(4))
    return reader, writer


async def until_closed(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(PATIENCE_S):
        try:
            while await reader.read(65_536):
                pass
        except ConnectionError:
            pass


@pytest.mark.parametrize(
    "what",
    [
        b"\x80\x04\x95" + bytes(200),
        greeting()[:20],
        greeting(b"PLAIN") + bytes(20),
        greeting() + b"\xff" * 100,
        greeting() + ready(ROUTE) + frame(GOOD, more=False),  # before the other side is ready
    ],
    ids=["pickle", "half a greeting", "plain", "bad command", "in haste"],
)
def test_what_does_not_shake_hands_is_disconnected(what: bytes) -> None:
    async def main() -> None:
        async with attacked() as (shard, _):
            reader, writer = await raw(shard)
            writer.write(what)
            await until_closed(reader)
            writer.transport.abort()
            assert list(shard.endpoint.peers()) == ["good"]

    run(main())


@pytest.mark.parametrize("size", [2**63 - 1, 2**62, 2**40, 2**33, (1 << 20) + 1])
def test_a_frame_that_declares_more_than_the_limit_is_disconnected(size: int) -> None:
    async def main() -> None:
        async with attacked() as (shard, _):
            reader, writer = await shaken(shard)
            writer.write(b"\x02" + struct.pack(">Q", size) + bytes(100))
            await until_closed(reader)
            writer.transport.abort()

    run(main())


def test_http_is_not_understood() -> None:
    """ZeroMQ takes it for the protocol of its first version, and waits for more."""

    async def main() -> None:
        async with attacked() as (shard, _):
            _, writer = await raw(shard)
            writer.write(b"POST /submit HTTP/1.1\r\nHost: p0\r\n\r\n" + bytes(1000))
            await writer.drain()
            other = Party("other", limits=LIMITS)
            async with running(other):
                await other.endpoint.connect("p0", shard.endpoint.addresses)
                assert sorted(shard.endpoint.peers()) == ["good", "other"]
            writer.transport.abort()

    run(main())


def test_an_endless_message_is_never_handed_over_and_ends_with_its_connection() -> None:
    async def main() -> None:
        async with attacked() as (shard, logs):
            _, writer = await shaken(shard)
            for _ in range(200):
                writer.write(frame(bytes(100_000), more=True))
                await writer.drain()
            writer.transport.abort()
            assert shard.endpoint.violations.counts == {}  # nothing of it was seen
            _, writer = await shaken(shard, b"again/" + b"0" * 32)
            writer.write(frame(GOOD, more=True))
            for number in range(20_000):
                writer.write(frame(b"", more=number < 19_999))
            await writer.drain()
            await refused(shard, logs, "frames")
            writer.transport.abort()

    run(main())


def test_with_keys_an_endless_message_of_a_stranger_does_not_begin(tmp_path: Path) -> None:
    async def main() -> None:
        async with attacked(keys=two_keys(tmp_path)) as (shard, _):
            reader, writer = await raw(shard)
            writer.write(greeting() + ready(ROUTE))
            with pytest.raises(OSError):
                for _ in range(1000):
                    writer.write(frame(bytes(100_000), more=True))
                    await writer.drain()
            await until_closed(reader)

    run(main())


def test_silent_connections_are_cleared_away_and_others_get_in() -> None:
    async def main() -> None:
        async with attacked() as (shard, _):
            silent = [await raw(shard) for _ in range(50)]
            other = Party("other", limits=LIMITS)
            async with running(other):
                await other.endpoint.connect("p0", shard.endpoint.addresses)
            for reader, writer in silent:
                await until_closed(reader)
                writer.transport.abort()

    run(main())


def test_connections_on_which_nothing_more_is_said_are_cleared_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs who shook hands and hang since: the kernel sees nothing odd in them. Here sooner than elsewhere."""
    quick = {**HALF_OPEN, zmq.HEARTBEAT_IVL: 200, zmq.HEARTBEAT_TIMEOUT: 300}
    monkeypatch.setattr("zml.transport.endpoint.HALF_OPEN", quick)

    async def main() -> None:
        async with attacked() as (shard, _):
            silent = [await raw(shard) for _ in range(50)]
            for _, writer in silent:
                writer.write(greeting() + ready(ROUTE))
            for reader, writer in silent:
                await until_closed(reader)
                writer.transport.abort()

    run(main())


# -- keys -----------------------------------------------------------------------------------------------------


def two_keys(folder: Path) -> tuple[Keys, Keys]:
    """A listener's and a worker's."""
    make_keys(folder, ["cluster", "worker", "mallory"])
    return Keys.load(folder, "cluster"), Keys.load(folder, "worker")


def curve(keys: Keys, *, server: str | None = None) -> dict[str, bytes]:
    return {
        "CURVE_PUBLICKEY": keys.public.encode(),
        "CURVE_SECRETKEY": keys.secret.encode(),
        "CURVE_SERVERKEY": (server or keys.key_of("p0")).encode(),
    }


def test_with_keys_everything_works_and_the_peers_key_is_known(tmp_path: Path) -> None:
    async def main() -> None:
        theirs, ours = two_keys(tmp_path)
        shard = Party("p0", [LOCAL, f"ipc://{tmp_path}/s"], keys=theirs)
        worker, other = Party("w0", keys=ours), Party("w1", keys=ours)
        async with running(shard, worker, other):
            await worker.endpoint.connect("p0", shard.endpoint.addresses[:1])
            await other.endpoint.connect("p0", shard.endpoint.addresses[1:])
            for number in range(20):
                payload = os.urandom(number * 10_000)
                _, back = await worker.endpoint.request("p0", Echo(number), payload, timeout_s=30)
                assert back is not None and bytes(back) == payload
            assert {name: info.key for name, info in shard.endpoint.peers().items()} == {
                "w0": "worker",
                "w1": "worker",
            }

    run(main())


@pytest.mark.parametrize("who", ["an unknown key", "no key", "an unknown key that knows the listener's"])
def test_whoever_has_no_authorized_key_gets_nowhere(who: str, tmp_path: Path) -> None:
    async def main() -> None:
        theirs, ours = two_keys(tmp_path)
        async with attacked(keys=(theirs, ours)) as (shard, logs):
            if who == "no key":
                keys = None
            else:
                make_keys(tmp_path / "other", ["worker"])
                keys = Keys.load(tmp_path / "other", "worker")
                if "listener" in who:
                    names = {"worker": keys.public, "cluster": theirs.public}
                    keys.authorized._by_name, keys.authorized.listener = names, "cluster"
            stranger = Party("w7", limits=LIMITS, keys=keys)
            async with running(stranger):
                with pytest.raises(PeerLost, match="no answer from"):
                    await stranger.endpoint.connect("p0", shard.endpoint.addresses, timeout_s=1.5)
            assert list(shard.endpoint.peers()) == ["good"]
            if "listener" not in who:
                await refused(shard, logs, "handshake")
            else:
                assert keys is not None
                await refused(shard, logs, "key")
                entry = next(entry for entry in logs if entry.get("rule") == "key")
                assert entry["peer"] == "127.0.0.1" and keys.public in entry["what"]
                assert theirs.secret not in str(logs) and keys.secret not in str(logs)

    run(main())


def test_a_worker_does_not_talk_to_a_listener_with_another_key(tmp_path: Path) -> None:
    """Whoever sits at the address of the shard must hold the listener's key."""

    async def main() -> None:
        _, ours = two_keys(tmp_path)
        make_keys(tmp_path / "other", ["cluster", "worker"])
        false = Party("p0", [LOCAL], keys=Keys.load(tmp_path / "other", "cluster"))
        worker = Party("w0", keys=ours)
        async with running(false, worker):
            with pytest.raises(PeerLost, match="no answer"):
                await worker.endpoint.connect("p0", false.endpoint.addresses, timeout_s=1.5)
            assert false.told == []

    run(main())


def test_a_name_belongs_to_the_key_that_said_hello_under_it(tmp_path: Path) -> None:
    async def main() -> None:
        theirs, ours = two_keys(tmp_path)
        async with attacked(keys=(theirs, ours)) as (shard, logs):
            thief = Party("good", limits=LIMITS, keys=Keys.load(tmp_path, "mallory"))
            async with running(thief):
                with pytest.raises(
                    PeerLost, match="key mallory says hello as good, which belongs to key worker"
                ):
                    await thief.endpoint.connect("p0", shard.endpoint.addresses, timeout_s=1)
                assert thief.handled == []
            await refused(shard, logs, "identity")
            assert shard.endpoint.peers()["good"].key == "worker"

    run(main())


def test_a_stolen_routing_id_does_not_carry_a_stolen_voice(tmp_path: Path) -> None:
    """The worst case: the thief has an authorized key, and knows routing id and session of another."""

    async def main() -> None:
        theirs, ours = two_keys(tmp_path)
        async with attacked(keys=(theirs, ours)) as (shard, logs):
            victim = Attacker(shard.endpoint.addresses[0], b"w0/" + b"0" * 32, **curve(ours))
            await victim.come_in("w0")
            thief = Attacker(
                shard.endpoint.addresses[0], b"w0/" + b"0" * 32, **curve(Keys.load(tmp_path, "mallory"))
            )
            thief.say(Kind.REQUEST, Add(66), id=1, floor=1)
            await refused(shard, logs, "identity")
            thief.say(Kind.NOTICE, Add(66), id=1)
            await refused(shard, logs, "identity", 2)
            victim.close()
            thief.close()

    run(main())


def test_a_key_that_is_taken_off_the_list_is_shut_out(tmp_path: Path) -> None:
    async def main() -> None:
        theirs, ours = two_keys(tmp_path)
        async with attacked(keys=(theirs, ours)) as (shard, logs):
            mallory = Party("m0", limits=LIMITS, keys=Keys.load(tmp_path, "mallory"))
            async with running(mallory):
                await mallory.endpoint.connect("p0", shard.endpoint.addresses)
                path = tmp_path / "authorized.toml"
                kept = [line for line in path.read_text().splitlines() if "mallory" not in line]
                path.write_text("\n".join(kept))
                await shard.until(shard.lost)
                assert shard.lost() == ["lost m0: the key mallory is not authorized any more"]
                again = Party(
                    "m1", limits=LIMITS, keys=Keys("mallory", *pair_of(tmp_path), theirs.authorized)
                )
                async with running(again):
                    with pytest.raises(PeerLost):
                        await again.endpoint.connect("p0", shard.endpoint.addresses, timeout_s=1)
                await refused(shard, logs, "key")

    run(main())


def pair_of(folder: Path) -> tuple[str, str]:
    lines = dict(line.split(" = ") for line in (folder / "mallory.key").read_text().splitlines())
    return lines["public"].strip('"'), lines["secret"].strip('"')


def test_a_key_that_is_put_on_the_list_comes_in_without_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        theirs, ours = two_keys(tmp_path)
        async with attacked(keys=(theirs, ours)) as (shard, _):
            make_keys(tmp_path, ["late"])
            late = Party("w9", limits=LIMITS, keys=Keys.load(tmp_path, "late"))
            async with running(late):
                await late.endpoint.connect("p0", shard.endpoint.addresses)
                assert shard.endpoint.peers()["w9"].key == "late"

    run(main())


@pytest.mark.parametrize("limit", [64])
def test_connections_with_half_a_handshake_do_not_keep_others_out(limit: int, tmp_path: Path) -> None:
    """With CURVE on: greetings that stop there (GHSA-fc3w-qxf5-7hp6 was of this kind)."""

    async def main() -> None:
        async with attacked(keys=two_keys(tmp_path)) as (shard, _):
            port = int(shard.endpoint.addresses[0].rpartition(":")[2])
            half = [socket.create_connection(("127.0.0.1", port)) for _ in range(limit)]
            public, _ = new_pair()
            for number, connection in enumerate(half):
                connection.sendall(
                    (greeting(b"CURVE") + b"\x04\xc8\x05HELLO" + public.encode() * 9)[: 60 + 3 * number]
                )
            other = Party("other", limits=LIMITS, keys=Keys.load(tmp_path, "worker"))
            async with running(other):
                await other.endpoint.connect("p0", shard.endpoint.addresses)
            for connection in half:
                connection.close()

    run(main())


def test_an_endpoint_that_cannot_keep_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zml.transport.endpoint.BATCH", 1)
    monkeypatch.setattr("zml.transport.endpoint.READ_MOST_S", 0.0)

    async def main() -> None:
        shard = Party("p0", [LOCAL], limits=LIMITS)
        async with running(shard):
            assert shard.endpoint.catch_up() == 0.0
            with attacker(shard) as mallory:
                await mallory.come_in()
                for number in range(200):
                    mallory.say(Kind.PING, id=number + 1)
                pongs, behind = 0, [0.0]
                while pongs < 200:
                    behind.append(shard.endpoint.catch_up())  # it reads one message, where there is one
                    await asyncio.sleep(0)
                    try:
                        mallory.socket.recv_multipart(zmq.NOBLOCK)
                        pongs += 1
                    except zmq.Again:
                        pass
                assert shard.endpoint.catch_up() == 0.0
                assert max(behind) > 0, "two messages were never there at the same time"

    run(main())
