"""Frames: what is packed comes back, and what is malformed is refused before anything is allocated for it."""

import random
import struct
import tracemalloc
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zml.transport import LocalProtocolError, RemoteProtocolError
from zml.transport.frames import (
    MAGIC,
    VERSION,
    Bye,
    Envelope,
    Freed,
    Hello,
    Kind,
    No,
    RingOffer,
    Stranger,
    Vocabulary,
    Welcome,
    as_bytes,
    check_name,
    pack,
    unpack,
)
from zml.transport.peers import HEADER_BYTES


class Push(msgspec.Struct, frozen=True, tag=True):
    worker: str
    clock: int
    have: list[int] = []
    raw: bytes = b""
    rate: float = 0.0


class Ok(msgspec.Struct, frozen=True, tag=True):
    pass


VOCABULARY = Vocabulary(Push | Ok)
PAYLOAD_BYTES = 1 << 20

small_text = st.text(max_size=20)
names = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/"), min_size=1, max_size=64
)
whole = st.integers(0, 2**63 - 1)
rings = st.none() | st.builds(RingOffer, path=small_text, nonce=st.binary(max_size=16))
messages = st.just(Ok()) | st.builds(
    Push,
    worker=small_text,
    clock=st.integers(-(2**63), 2**63 - 1),
    have=st.lists(st.integers(0, 2**32), max_size=50),
    raw=st.binary(max_size=50),
    rate=st.floats(allow_nan=False),
)
bodies: dict[Kind, st.SearchStrategy[Any]] = {
    Kind.HELLO: st.builds(
        Hello,
        name=names,
        to=names,
        resume=st.booleans(),
        requests=whole,
        ping_s=st.floats(0, 1e6),
        ring=rings,
    ),
    Kind.WELCOME: st.builds(
        Welcome, name=names, resumed=st.booleans(), requests=whole, mapped=st.booleans(), ring=rings
    ),
    Kind.STRANGER: st.builds(Stranger, because=small_text),
    Kind.REFUSAL: st.builds(No, code=small_text, because=small_text),
    Kind.FREED: st.builds(Freed, slots=st.lists(st.integers(0, 100), max_size=20)),
    Kind.BYE: st.builds(Bye, because=small_text),
    Kind.PING: st.none(),
    Kind.PONG: st.none(),
    Kind.MAPPED: st.none(),
    Kind.REQUEST: messages,
    Kind.REPLY: messages,
    Kind.NOTICE: messages,
}


@st.composite
def envelopes(draw: st.DrawFn) -> Envelope:
    kind = draw(st.sampled_from(list(Kind)))
    payload = None
    size = slot = -1
    if kind in (Kind.REQUEST, Kind.REPLY, Kind.NOTICE):
        raw = draw(st.none() | st.binary(max_size=100))
        if raw is not None:
            payload, size = memoryview(raw), len(raw)
        elif draw(st.booleans()):
            size, slot = draw(st.integers(0, PAYLOAD_BYTES)), draw(st.integers(0, 100))
    return Envelope(
        kind=kind,
        session=draw(whole),
        id=draw(whole),
        floor=draw(whole),
        credit=draw(whole),
        body=draw(bodies[kind]),
        payload=payload,
        size=size,
        slot=slot,
    )


def read(header: bytes, payload: bytes | None = None) -> Envelope:
    view = None if payload is None else memoryview(payload)
    return unpack(header, view, VOCABULARY, payload_bytes=PAYLOAD_BYTES)


def rule(header: bytes, payload: bytes | None = None) -> str:
    """The rule under which this is refused."""
    with pytest.raises(RemoteProtocolError) as caught:
        read(header, payload)
    return caught.value.rule


def head(*fields: object) -> bytes:
    """A header with these eight fields, whatever they are."""
    packed: bytes = msgpack.packb(fields)
    return MAGIC + bytes([VERSION]) + packed


OK = {"type": "Ok"}


@given(envelopes())
def test_what_is_packed_comes_back(envelope: Envelope) -> None:
    header = pack(envelope)
    assert len(header) <= HEADER_BYTES
    back = unpack(header, envelope.payload, VOCABULARY, payload_bytes=PAYLOAD_BYTES)
    assert back == envelope
    assert back.payload is envelope.payload  # by reference


def test_bytes_that_are_no_message_are_refused_by_the_first_rule_they_break() -> None:
    good = pack(Envelope(kind=Kind.NOTICE, session=1, id=1, body=Ok()))
    assert read(good).body == Ok()
    assert rule(b"") == "magic"
    assert rule(b"ZM") == "magic"
    assert rule(b"GET / HTTP/1.1\r\n") == "magic"
    assert rule(MAGIC) == "version"
    assert rule(MAGIC + bytes([VERSION + 1]) + good[4:]) == "version"
    assert rule(good[:-1]) == "msgpack"
    assert rule(good + b"\0") == "msgpack"
    assert rule(good + bytes(HEADER_BYTES)) == "header-size"
    assert rule(head(1, 2, 3)) == "fields"
    assert rule(MAGIC + bytes([VERSION]) + msgpack.packb({"kind": 1})) == "fields"
    assert rule(head(99, 1, 1, 1, 1, -1, -1, OK)) == "kind"
    assert rule(head(int(Kind.NOTICE), 1, 1, 1, 1, -1, -1, {"type": "Unheard"})) == "body"
    assert rule(head(int(Kind.NOTICE), 1, 1, 1, 1, -1, -1, None)) == "body"
    assert rule(head(int(Kind.PING), 1, 1, 1, 1, -1, -1, OK)) == "body"


@pytest.mark.parametrize("value", [-1, 2**63, 2**64 - 1, 1.0, True, "1", b"1", None, [1], {}])
@pytest.mark.parametrize("field", range(5))
def test_a_number_that_is_none_is_refused(field: int, value: object) -> None:
    fields: list[object] = [int(Kind.NOTICE), 1, 1, 1, 1, -1, -1, OK]
    fields[field] = value
    assert rule(head(*fields)) == "fields"


@pytest.mark.parametrize("value", [-2, 2**63, 0.5, True, "1", None])
@pytest.mark.parametrize("field", [5, 6])
def test_a_size_or_slot_that_is_none_is_refused(field: int, value: object) -> None:
    fields: list[object] = [int(Kind.NOTICE), 1, 1, 1, 1, -1, -1, OK]
    fields[field] = value
    assert rule(head(*fields)) == "fields"


def test_a_payload_that_is_not_what_the_header_says_is_refused() -> None:
    def notice(size: int, slot: int = -1, kind: Kind = Kind.NOTICE) -> bytes:
        return head(int(kind), 1, 1, 1, 1, size, slot, None if kind is Kind.PING else OK)

    assert bytes(read(notice(3), b"abc").payload or b"") == b"abc"
    assert read(notice(0), b"").payload is not None
    assert rule(notice(4), b"abc") == "payload-size"
    assert rule(notice(2), b"abc") == "payload-size"
    assert rule(notice(3), None) == "payload-size"
    assert rule(notice(-1), b"") == "payload-size"
    assert rule(notice(2**62), b"abc") == "payload-size"
    assert rule(notice(PAYLOAD_BYTES + 1), bytes(PAYLOAD_BYTES + 1)) == "payload-size"
    assert rule(notice(3, slot=0), b"abc") == "payload"
    assert rule(notice(-1, slot=0)) == "payload"
    assert rule(notice(3, kind=Kind.PING), b"abc") == "payload"
    assert rule(notice(-1, slot=2, kind=Kind.PING)) == "payload"


def test_a_body_with_the_wrong_types_or_fields_is_refused() -> None:
    def request(body: object) -> bytes:
        return head(int(Kind.REQUEST), 1, 1, 1, 1, -1, -1, body)

    good = {"type": "Push", "worker": "w0", "clock": 1}
    assert read(request(good)).body == Push("w0", 1)
    assert rule(request(good | {"clock": "1"})) == "body"
    assert rule(request(good | {"have": [1, None]})) == "body"
    assert rule(request(good | {"have": {"1": 2}})) == "body"
    assert rule(request({"type": "Push"})) == "body"
    assert rule(request("Push")) == "body"
    assert rule(request([good])) == "body"
    hello: dict[str, object] = {"name": "w0", "to": "p0", "resume": False, "requests": 1, "ping_s": 1.0}
    assert read(head(int(Kind.HELLO), 1, 1, 1, 1, -1, -1, hello)).kind is Kind.HELLO
    assert rule(head(int(Kind.HELLO), 1, 1, 1, 1, -1, -1, hello | {"admin": True})) == "body"
    assert rule(head(int(Kind.HELLO), 1, 1, 1, 1, -1, -1, hello | {"resume": 1})) == "body"


BOMBS = {
    "an array that declares four thousand million elements": b"\xdd\xff\xff\xff\xff",
    "a map that declares as many": b"\xdf\xff\xff\xff\xff",
    "a string that declares four gigabytes": b"\xdb\xff\xff\xff\xff",
    "binary that declares as much": b"\xc6\xff\xff\xff\xff",
    "arrays nested four thousand deep": b"\x91" * 4090 + b"\xc0",
    "maps nested as deep": b"\x81\xa0" * 2040 + b"\xc0",
    "four thousand empty maps": b"\xdc\x0f\xf0" + b"\x80" * 4080,
    "a map with a thousand keys": b"\xde\x03\xe8"
    + b"".join(b"\xa2" + struct.pack("<H", i) for i in range(1000)),
    "a map with keys that are no strings": b"\x82\x01\x02\x03\x04",
    "an extension": b"\xc7\x04\x05abcd",
    "a timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "a string that is not UTF-8": b"\xa2\xff\xfe",
    "nothing": b"",
    "a reserved byte": b"\xc1",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_refused_and_takes_no_memory(bomb: bytes) -> None:
    """Alone, as a field, and as the body."""
    opening = msgpack.packb([int(Kind.NOTICE), 1, 1, 1, 1, -1, -1])[1:]
    headers = [MAGIC + bytes([VERSION]) + tail for tail in (bomb, b"\x98" + opening + bomb, b"\x98" + bomb)]
    tracemalloc.start()
    try:
        for header in headers:
            assert rule(header[:HEADER_BYTES]) in {"msgpack", "fields", "body"}
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20


@settings(max_examples=2500, deadline=None)
@given(st.integers(0, 2**64))
def test_random_bytes_after_the_magic_are_a_message_or_a_refusal(seed: int) -> None:
    chance = random.Random(seed)
    tail = chance.randbytes(chance.randrange(200))
    try:
        read(MAGIC + bytes([VERSION]) + tail, chance.choice([None, b"", b"abc"]))
    except RemoteProtocolError:
        pass


SAMPLES = [
    Envelope(
        kind=Kind.HELLO,
        session=2**60,
        id=1,
        body=Hello(name="w0", to="p0", resume=False, requests=9, ping_s=0.5),
    ),
    Envelope(kind=Kind.WELCOME, session=2**60, credit=9, body=Welcome(name="p0", resumed=False, requests=9)),
    Envelope(kind=Kind.REQUEST, session=2**60, id=7, floor=5, body=Push("w0", 3, [1, 2, 300], b"raw", 0.1)),
    Envelope(kind=Kind.REPLY, session=2**60, id=7, body=Ok(), payload=memoryview(b"abc"), size=3),
    Envelope(kind=Kind.NOTICE, session=2**60, id=2, body=Ok(), size=70_000, slot=3),
    Envelope(kind=Kind.FREED, session=2**60, body=Freed([1, 2, 3])),
    Envelope(kind=Kind.PING, session=2**60, id=4),
]


@settings(max_examples=2500, deadline=None)
@given(st.integers(0, 2**64))
def test_a_damaged_header_is_a_message_or_a_refusal(seed: int) -> None:
    """Bits flipped, bytes taken out, put in or doubled: whatever comes, nothing else is raised."""
    chance = random.Random(seed)
    envelope = chance.choice(SAMPLES)
    header = bytearray(pack(envelope))
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(header)) if header else 0
        match chance.randrange(4):
            case 0 if header:
                header[at] ^= 1 << chance.randrange(8)
            case 1:
                del header[at : at + chance.randrange(1, 9)]
            case 2:
                header[at:at] = chance.randbytes(chance.randrange(1, 9))
            case _:
                header[at:at] = header[at : at + 16]
    try:
        unpack(bytes(header), envelope.payload, VOCABULARY, payload_bytes=PAYLOAD_BYTES)
    except RemoteProtocolError:
        pass


def nonsense(chance: random.Random, depth: int = 4) -> object:
    """Anything that msgpack can say, nested."""
    kinds = 9 if depth else 7
    match chance.randrange(kinds):
        case 0:
            return None
        case 1:
            return chance.random() < 0.5
        case 2:
            return chance.choice([-(2**63), -2, -1, 0, 1, 7, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
        case 3:
            return chance.choice([0.0, -1.5, float("nan"), float("inf")])
        case 4:
            return chance.choice(["", "type", "Push", "Ok", "worker", "\0", "x" * 300])
        case 5:
            return chance.randbytes(chance.randrange(20))
        case 6:
            return {
                "type": chance.choice(["Push", "Ok", 1, None]),
                "worker": "w0",
                "clock": nonsense(chance, 0),
            }
        case 7:
            return [nonsense(chance, depth - 1) for _ in range(chance.randrange(6))]
        case _:
            keys = ["type", "name", "to", "resume", "requests", "ping_s", "ring", "slots", "because", "x"]
            return {chance.choice(keys): nonsense(chance, depth - 1) for _ in range(chance.randrange(7))}


@settings(max_examples=2500, deadline=None)
@given(st.integers(0, 2**64))
def test_well_formed_nonsense_is_a_message_or_a_refusal(seed: int) -> None:
    chance = random.Random(seed)
    fields = [nonsense(chance) if chance.random() < 0.2 else 1 for _ in range(6)]
    fields[4:] = [nonsense(chance), nonsense(chance)] if chance.random() < 0.3 else [-1, -1]
    try:
        read(head(chance.choice([*map(int, Kind), nonsense(chance)]), *fields, nonsense(chance)))
    except RemoteProtocolError:
        pass


def test_a_message_that_does_not_fit_into_a_header_is_our_own_mistake() -> None:
    with pytest.raises(LocalProtocolError, match=r"Push takes \d+ bytes as a header; 4096 are allowed"):
        pack(Envelope(kind=Kind.REQUEST, session=1, id=1, body=Push("w0", 1, raw=bytes(5000))))
    with pytest.raises(LocalProtocolError, match="cannot be packed"):
        pack(Envelope(kind=Kind.REQUEST, session=1, id=1, body=Push("w0", 2**70)))


def test_any_contiguous_buffer_is_seen_as_bytes_without_a_copy() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    view = as_bytes(array.data)
    assert (view.nbytes, view.format, view.ndim) == (24, "B", 1)
    array[0, 0] = 7.0
    assert view[:4] == struct.pack("<f", 7.0)
    tensor = torch.ones(3, dtype=torch.bfloat16)
    assert as_bytes(tensor.view(torch.uint8).numpy().data).nbytes == 6
    assert as_bytes(np.empty((0, 3)).data).nbytes == 0
    assert bytes(as_bytes(bytearray(b"abc"))) == b"abc"


def test_what_is_no_contiguous_buffer_is_our_own_mistake() -> None:
    with pytest.raises(LocalProtocolError, match="contiguous"):
        as_bytes(np.zeros((4, 4))[:, 1].data)
    with pytest.raises(LocalProtocolError, match=r"not a Tensor.*view\(torch.uint8\)"):
        as_bytes(torch.zeros(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "a" * 65, "a b", "a/b", "\0abcd", "a\n", "ä", "a\x7f"])
def test_a_name_that_cannot_travel_is_told_apart(name: str) -> None:
    assert check_name(name)


@pytest.mark.parametrize("name", ["w0", "w1#1", "coordinator", "agent-node17.example:4000"])
def test_a_name_of_ours_can_travel(name: str) -> None:
    assert check_name(name) is None
