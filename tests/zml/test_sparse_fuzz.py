"""Frames of a hostile peer: every check of the sparse codec is hit, and what it lets pass can be used.

ZML_FUZZ_SEED=N repeats the cases of a printed seed.
"""

import ctypes
import mmap
import os
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from zml.codec import BadFrame, Kind, by_name
from zml.codec.frame import HEADER
from zml.codec.kernels import reasons
from zml.codec.sparse import TopK
from zml.compression import INDICES, VALUES
from zml.layout import Chunk, Layout

from .test_codec import publish

CASES = 20_000
SHAPES = [(5,), (40, 25), (11,), (1,), (60, 60), (3, 7, 2), (2,)]  # vectors before, between and after
GUARD = 64  # elements on either side of where a decoder may write
WORDS = {number: name for name, number in vars(reasons).items() if isinstance(number, int)}
HEADER_CHECKS = ("has no header", "reserved bytes", "says that its body has", "a frame of codec")


class Cliff:
    """Memory that ends where nobody may read on: who does ends the process."""

    def __init__(self, size: int) -> None:
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.map = mmap.mmap(-1, size + mmap.PAGESIZE)
        self.end = size
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0  # PROT_NONE

    def hold(self, frame: bytes) -> memoryview:
        begin = self.end - len(frame)
        self.map[begin : self.end] = frame
        return memoryview(self.map)[begin : self.end].toreadonly()


def chunks() -> list[Chunk]:
    mixed = Layout.build([(f"p{i}", shape, 0) for i, shape in enumerate(SHAPES)], 1).chunks
    alone = Layout.build([("w", (9, 11), 0)], 1).chunks
    vectors = Layout.build([("b", (7,), 0)], 1).chunks
    whole = Layout.build([("w", (256, 256), 0)], 1).chunks
    return [*mixed, *alone, *vectors, *whole]


def sound_frames(rng: np.random.Generator) -> list[tuple[TopK, Chunk, bytes]]:
    """One of each coding, for each kind of chunk; with LZ4 where positions repeat."""
    found = []
    for values in VALUES:
        for indices in ("", *INDICES):
            codec = by_name(f"topk:4%:{values}:{indices}".rstrip(":"))
            assert isinstance(codec, TopK)
            for chunk in chunks():
                packer = codec.packer([chunk])
                packer.values[chunk.index].copy_(torch.from_numpy(rng.standard_t(3, chunk.size)))
                found.append((codec, chunk, bytes(packer.pack())))
                packer.values[chunk.index].zero_()[5::9] = 1e6
                found.append((codec, chunk, bytes(packer.pack(density=0.2))))
    return found


def damaged(rng: random.Random, frame: bytes, count_at: int) -> bytes:
    """A frame that somebody has changed: bytes, lengths, counts, codings; mostly with a header that fits."""
    data = bytearray(frame)
    body = HEADER.size
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.randrange(12)
        if kind == 0 and len(data) > 1:
            del data[rng.randrange(len(data)) :]
        elif kind == 1:
            data += rng.randbytes(rng.randrange(1, 9))
        elif kind == 2 and len(data) > body:
            at = rng.randrange(body, len(data))
            del data[at : at + rng.randrange(1, 5)]
        elif kind == 3:
            at = rng.randrange(min(body, len(data)), len(data) + 1)
            data[at:at] = rng.randbytes(rng.randrange(1, 5))
        elif kind == 4 and len(data) > count_at + 3:
            n = int.from_bytes(data[count_at : count_at + 3], "little") + rng.choice(
                (-1, 1, 2, 1_000, 1 << 20)
            )
            data[count_at : count_at + 3] = (n & 0xFFFFFF).to_bytes(3, "little")
        elif kind in (5, 6) and len(data) > count_at:
            data[count_at - 1] = (
                rng.randrange(256) if kind == 5 else data[count_at - 1] ^ (1 << rng.randrange(8))
            )
        elif kind == 7 and len(data) > body:  # where vectors, codings, scales and first positions are
            data[rng.randrange(body, min(len(data), body + 64))] = rng.choice(
                (0, 255, 127, 128, rng.randrange(256))
            )
        elif kind == 8 and len(data) > body:
            at = rng.randrange(body, len(data))
            data[at : at + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\x80\x7f\x80\x7f", b"\x7f\x7f\x7f\x7f"))
        elif kind == 9 and len(data) > count_at + 5:  # a size before an LZ4 block
            data[count_at + 3 : count_at + 6] = rng.choice(
                (bytes(3), b"\xff\xff\xff", rng.randbytes(2) + b"\0")
            )
        elif kind == 10 and data:
            data[-1] = rng.choice((255, 0xF0, 0xC0, rng.randrange(256)))
        elif data:
            at = rng.randrange(len(data))
            data[at] ^= 1 << rng.randrange(8)
    if len(data) >= body and rng.random() < 0.97:
        data[12:16] = (len(data) - body).to_bytes(4, "little")
    return bytes(data)


def what_for(refusal: BadFrame) -> str:
    text = str(refusal)
    for number, sentence in reasons.SENTENCES.items():
        if text.endswith(": " + sentence):
            return WORDS[number]
    for words in HEADER_CHECKS:
        if words in text:
            return words
    raise AssertionError(f"a refusal for no known reason: {text}")


def handmade() -> list[bytes]:
    """For a chunk of one 9 x 11 matrix: what chance hits too rarely."""

    def of(*body: bytes) -> bytes:
        joined = b"".join(body)
        return HEADER.pack(2, 0, 0, 0, 0, len(joined)) + joined

    scale = b"\x80\x3f\x00\x3c"  # lo 1, step 2**-7
    huge = b"\x7f\x7f\x7f\x7f"
    return [
        of(b"\x20\x01\0\0", b"\x05", scale, b"\x11"),  # a nibble after the last value
        of(b"\x20\x01\0\0", b"\x05", huge, b"\x01"),  # lo + 255 * step is infinite
        of(b"\x21\x02\0\0", b"\x02\x05\x10\x00", scale, b"\x11"),  # offsets 5 and 1
        of(b"\x21\x01\0\0", b"\x01\x05\x10", scale, b"\x01"),  # bits after an odd offset
        of(b"\x21\x01\0\0", b"\x02\x05\x00", scale, b"\x01"),  # a block with more entries than there are
        of(b"\x23\x01\0\0", bytes(12) + b"\x08", scale, b"\x01"),  # a bit for element 99 of 99
        of(b"\x24\x63\0\0", b"\0", scale, bytes(50)),  # all elements, and a byte of positions
        of(b"\x24\x62\0\0", scale, bytes(49)),  # all elements but one
        of(b"\xa0\x01\0\0", b"\x05", scale, b"\x01"),  # the reserved bit
    ]


@pytest.mark.timeout(300)  # 20,000 cases
def test_every_check_is_hit_and_what_passes_can_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("ZML_FUZZ_SEED") or random.SystemRandom().randrange(2**32))
    rng = random.Random(seed)
    with capsys.disabled():
        print(f"\nseed {seed}", end=" ")
    frames = sound_frames(np.random.default_rng(seed))
    refused: Counter[str] = Counter()
    accepted = 0
    alone = chunks()[1]
    cliff = Cliff(1 << 19)
    # By size: most frames are refused, and to fill it takes longer than that.
    untouched: dict[int, torch.Tensor] = {}

    def guarded_for(chunk: Chunk) -> torch.Tensor:
        if chunk.size not in untouched:
            untouched[chunk.size] = torch.full((chunk.size + 2 * GUARD,), 7.0)
        return untouched[chunk.size]

    def advance(codec: TopK, chunk: Chunk, data: bytes, sound: bool) -> None:
        """The same as a delta of version 0."""
        guarded = guarded_for(chunk)
        try:
            codec.advance(
                chunk, cliff.hold(data[:1] + bytes([Kind.DELTA]) + data[2:]), guarded[GUARD:-GUARD], 0
            )
        except BadFrame as refusal:
            assert not sound or what_for(refusal) == "OVERFLOW"
            assert (guarded == 7).all()
            return
        del untouched[chunk.size]
        assert sound and torch.isfinite(guarded).all()
        assert (guarded[:GUARD] == 7).all() and (guarded[-GUARD:] == 7).all()

    def attempt(codec: TopK, chunk: Chunk, data: bytes) -> bool:
        twin = data if len(data) > 1 and data[1] == Kind.GRADIENT else b""
        frame = cliff.hold(data)
        guarded = guarded_for(chunk)
        out = guarded[GUARD:-GUARD]
        calls: list[Callable[[], object]] = [
            lambda: codec.decode(chunk, frame, out, add=False),
            lambda: codec.decode(chunk, frame, out, add=True),
            lambda: codec.total(chunk, [frame, frame], out),
            lambda: codec.view(chunk, frame),
        ]
        try:
            codec.check(chunk, frame)
        except BadFrame as refusal:
            refused[what_for(refusal)] += 1
            with pytest.raises(BadFrame) as again:
                rng.choice(calls)()
            assert str(again.value) == str(refusal)
            assert (guarded == 7).all()
            if twin:
                advance(codec, chunk, twin, False)
            return False
        del untouched[chunk.size]
        rng.choice(calls)()  # what check accepts decode does not refuse
        assert (guarded[:GUARD] == 7).all() and (guarded[-GUARD:] == 7).all()
        assert 0 <= codec.entries(chunk, frame) <= chunk.size
        n = codec.read(chunk, np.frombuffer(frame, np.uint8))
        positions = codec.scratch.pos[:n].astype(np.int64)
        assert (np.diff(positions) > 0).all() and (positions < chunk.size).all()
        assert np.isfinite(codec.scratch.val[:n]).all()
        table = codec.table(chunk).segments
        for start, size, part, _ in table[table[:, 2] < 0]:
            assert part == -1 and not ((positions >= start) & (positions < start + size)).any()
        advance(codec, chunk, twin, True)
        return True

    for codec, chunk, frame in frames:
        assert attempt(codec, chunk, frame)
    for frame in handmade():
        assert not attempt(frames[0][0], alone, frame)
    for _ in range(CASES):
        codec, chunk, frame = rng.choice(frames)
        accepted += attempt(codec, chunk, damaged(rng, frame, codec.table(chunk).count_at))
    # A delta is refused where it would lead beyond what is finite: there is no such gradient.
    codec = frames[0][0]
    delta = publish(codec, alone, torch.full((99,), 3e38), torch.zeros(99), 0, 1, 99)
    with pytest.raises(BadFrame) as caught:
        codec.advance(alone, delta, torch.full((99,), 3e38), 0)
    refused[what_for(caught.value)] += 1
    with capsys.disabled():
        print(
            f"{CASES} damaged frames, {accepted} still sound; refused: {dict(refused.most_common())}", end=" "
        )
    assert set(refused) == {WORDS[number] for number in reasons.SENTENCES} | set(HEADER_CHECKS)
    assert accepted > 100


def test_a_truncated_frame_is_never_sound() -> None:
    for codec, chunk, frame in sound_frames(np.random.default_rng(1))[::7]:
        for size in range(HEADER.size, len(frame)):
            short = HEADER.pack(2, int(Kind.GRADIENT), 0, chunk.index, 0, size - HEADER.size)
            with pytest.raises(BadFrame):
                codec.check(chunk, short + frame[HEADER.size : size])
