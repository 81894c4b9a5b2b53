"""Rings of shared memory: what is written is what is read, slots come back once, strangers get nothing."""

import gc
import os
import random
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zml.transport.shm import BadSlot, NoRing, Ring

SLOTS, SLOT_BYTES = 4, 10_000


class Pair:
    """Both ends of one ring; freed slots go straight back, as the endpoint's notices do."""

    def __init__(self, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES) -> None:
        self.writer = Ring.create(slots, slot_bytes)
        self.freed: list[int] = []
        self.reader = Ring.open(self.writer.path, self.writer.nonce, self.freed.append)

    def lend(self, payload: bytes | bytearray | memoryview) -> memoryview:
        slot = self.writer.put(payload)
        assert slot is not None
        return self.reader.view(slot, len(payload))

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_payload_arrives_as_it_was_put_and_its_slot_comes_back(pair: Pair) -> None:
    payload = random.Random(1).randbytes(SLOT_BYTES)
    view = pair.lend(payload)
    assert view == payload
    assert (view.format, view.itemsize, view.ndim, view.readonly) == ("B", 1, 1, False)
    assert (pair.writer.free, pair.freed) == (SLOTS - 1, [])
    del view
    assert pair.freed == [0]
    pair.writer.release(0)
    assert pair.writer.free == SLOTS


@pytest.mark.parametrize(
    "make",
    [bytes, bytearray, lambda b: memoryview(b)[5:], lambda b: memoryview(np.frombuffer(b, np.uint8).data)],
)
def test_any_contiguous_buffer_can_be_put(pair: Pair, make: type[bytes]) -> None:
    payload = make(bytes(range(200)))
    assert pair.lend(payload) == payload


def test_what_is_not_contiguous_is_refused_and_takes_no_slot(pair: Pair) -> None:
    with pytest.raises(BufferError):
        pair.writer.put(memoryview(bytes(100))[::2])
    assert pair.writer.free == SLOTS


def test_a_writer_may_change_its_buffer_after_the_put(pair: Pair) -> None:
    payload = bytearray(b"a" * 1000)
    view = pair.lend(payload)
    payload[:] = b"b" * 1000
    payload.clear()  # the ring holds no reference either, else this were a BufferError
    assert view == b"a" * 1000


def test_a_slot_is_kept_by_whatever_is_made_from_its_view(pair: Pair) -> None:
    view = pair.lend(np.arange(100, dtype=np.float32).tobytes())
    tensor = torch.frombuffer(view[40:], dtype=torch.float32)[3:].view(29, 3)
    array = np.frombuffer(view, dtype=np.float32)[50:]
    part = view[396:].toreadonly()
    del view
    assert (tensor[0, 0].item(), array[0], part.cast("f")[0]) == (13.0, 50.0, 99.0)
    del array
    assert pair.freed == []
    del tensor
    assert pair.freed == []
    del part
    assert pair.freed == [0]


def test_a_slot_in_a_reference_cycle_comes_back_when_the_cycle_is_collected(pair: Pair) -> None:
    cycle: list[object] = [pair.lend(b"x" * 100)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert pair.freed == [0]


def test_the_slot_freed_last_is_taken_first(pair: Pair) -> None:
    assert [pair.writer.put(b"x") for _ in range(3)] == [0, 1, 2]
    pair.writer.release(0)
    pair.writer.release(2)
    assert [pair.writer.put(b"x") for _ in range(3)] == [2, 0, 3]


def test_a_full_ring_and_an_unfit_payload_are_left_to_the_socket(pair: Pair) -> None:
    assert pair.writer.put(b"") is None
    assert pair.writer.put(bytes(SLOT_BYTES + 1)) is None
    assert pair.writer.free == SLOTS
    assert [pair.writer.put(b"x") for _ in range(SLOTS + 1)] == [0, 1, 2, 3, None]


@pytest.mark.parametrize(
    ("slot", "length"),
    [(-1, 10), (SLOTS, 10), (1 << 40, 10), (0, 0), (0, -1), (0, SLOT_BYTES + 1), (SLOTS - 1, 1 << 62)],
)
def test_a_slot_or_length_that_cannot_be_changes_nothing(pair: Pair, slot: int, length: int) -> None:
    pair.writer.put(b"payload")
    with pytest.raises(BadSlot):
        pair.reader.view(slot, length)
    assert bytes(pair.reader.view(0, 7)) == b"payload"


def test_a_slot_announced_twice_is_refused_while_it_is_held(pair: Pair) -> None:
    view = pair.lend(b"payload")
    with pytest.raises(BadSlot, match="again"):
        pair.reader.view(0, 7)
    assert (bytes(view), pair.freed) == (b"payload", [])


@pytest.mark.parametrize("slot", [-1, 0, SLOTS, 1 << 70])
def test_a_slot_that_was_not_taken_is_not_given_back(pair: Pair, slot: int) -> None:
    with pytest.raises(BadSlot):
        pair.writer.release(slot)
    assert pair.writer.free == SLOTS


def test_views_outlive_both_ends_of_the_ring() -> None:
    pair = Pair()
    view = pair.lend(b"payload")
    before = descriptors()
    pair.close()
    pair.close()
    assert bytes(view) == b"payload"
    assert descriptors() == before - 2  # the reader's mapping goes with its last view
    del view
    assert descriptors() == before - 3
    assert pair.freed == []
    assert pair.writer.put(b"x") is None
    with pytest.raises(BadSlot, match="closed"):
        pair.reader.view(0, 1)


def test_a_closed_ring_leaves_no_descriptor() -> None:
    before = descriptors()
    Pair().close()
    assert descriptors() == before


def test_unused_slots_cost_no_memory() -> None:
    ring = Ring.create(32, 4 << 20)

    def kib_used() -> int:
        return os.stat(ring.path).st_blocks // 2

    assert kib_used() <= 64
    ring.put(bytes(100_000))
    assert kib_used() <= 64 + 128
    ring.close()


def test_a_ring_has_no_name_in_the_file_system() -> None:
    ring = Ring.create(2, 1000)
    assert os.readlink(ring.path) == "/memfd:zml-ring (deleted)"
    assert os.stat(ring.path).st_mode & 0o777 == 0o600
    ring.close()


def test_a_machine_without_memory_leaves_payloads_to_the_socket(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    view = pair.lend(bytes(4096))
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert pair.writer.put(b"x") is None  # a slot that has no pages yet
    assert pair.writer.free == SLOTS - 1
    with pytest.raises(NoRing):
        Ring.create(2, 1000)
    del view
    pair.writer.release(0)
    assert pair.writer.put(b"y" * 4096) == 0  # this one has
    assert pair.reader.view(0, 4096) == b"y" * 4096


def refused(path: str, nonce: bytes, max_bytes: int = 1 << 30) -> str:
    before = descriptors()
    with pytest.raises(NoRing) as caught:
        Ring.open(path, nonce, lambda slot: None, max_bytes=max_bytes)
    assert descriptors() == before
    return str(caught.value)


def test_only_the_ring_that_was_offered_is_opened(tmp_path: Path) -> None:
    ring = Ring.create(2, 1000)
    assert "not the ring" in refused(ring.path, bytes(16))
    assert "not the ring" in refused(ring.path, ring.nonce[:8])
    assert "too many" in refused(ring.path, ring.nonce, max_bytes=4096)
    assert "cannot be mapped" in refused(f"/proc/{os.getpid()}/fd/999999", ring.nonce)
    assert "cannot be mapped" in refused("/proc/4194399/fd/3", ring.nonce)
    for path in (
        "",
        "/etc/passwd",
        "ring",
        f"{ring.path}/../../maps",
        f"/proc/self{ring.path}",
        "/proc/1/fd/\n",
        "é" * 500,
    ):
        assert "does not name" in refused(path, ring.nonce)
    ring.close()
    assert "cannot be mapped" in refused(ring.path, ring.nonce)


def test_what_is_not_a_ring_is_not_opened(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(100_000))

    def offer(descriptor: int) -> str:
        because = refused(f"/proc/{os.getpid()}/fd/{descriptor}", bytes(16))
        os.close(descriptor)
        return because

    file.chmod(0o600)
    assert "cannot be mapped" in offer(os.open(file, os.O_RDWR))  # its file system knows no seals
    file.chmod(0o644)
    assert "open to others" in offer(os.open(file, os.O_RDWR))
    assert "not a file" in offer(os.open("/dev/null", os.O_RDWR))
    reading, writing = os.pipe()
    assert "not a file" in offer(reading)
    assert "not a file" in offer(writing)
    memory = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    os.fchmod(memory, 0o600)
    assert "too few" in refused(f"/proc/{os.getpid()}/fd/{memory}", bytes(16))
    os.ftruncate(memory, 100_000)
    assert "not sealed" in offer(memory)


@pytest.mark.parametrize("slots", [0, -1, 1 << 20])
def test_a_ring_of_impossible_size_is_not_made(slots: int) -> None:
    with pytest.raises(ValueError, match="slots"):
        Ring.create(slots, 1 << 20)


def test_a_header_that_lies_about_its_size_is_refused() -> None:
    ring = Ring.create(2, 1000)
    ring._memory[8:12] = (3).to_bytes(4, "little")
    assert "do not make" in refused(ring.path, ring.nonce)
    ring.close()


class RingMachine(RuleBasedStateMachine):
    """Any order of puts, views, slices, drops and releases: no byte changes under a holder."""

    @initialize(slots=st.integers(1, 4), slot_bytes=st.sampled_from([1, 100, 4096, 5000]))
    def start(self, slots: int, slot_bytes: int) -> None:
        self.pair = Pair(slots, slot_bytes)
        self.slots = slots
        self.announced: list[tuple[int, bytes]] = []
        self.held: list[tuple[memoryview, bytes]] = []

    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        payload = data.draw(st.binary(min_size=1, max_size=self.pair.writer.slot_bytes))
        slot = self.pair.writer.put(payload)
        assert (slot is None) == (
            len(self.announced) + len(self.in_use()) + len(self.pair.freed) == self.slots
        )
        if slot is not None:
            self.announced.append((slot, payload))

    def in_use(self) -> set[int]:
        return set(self.pair.reader._lent)

    @precondition(lambda self: self.announced)
    @rule()
    def view(self) -> None:
        slot, payload = self.announced.pop(0)
        self.held.append((self.pair.reader.view(slot, len(payload)), payload))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def slice_it(self, data: st.DataObject) -> None:
        view, payload = self.held[data.draw(st.integers(0, len(self.held) - 1))]
        start = data.draw(st.integers(0, len(payload) - 1))
        self.held.append((view[start:], payload[start:]))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        del self.held[data.draw(st.integers(0, len(self.held) - 1))]

    @precondition(lambda self: self.pair.freed)
    @rule()
    def release(self) -> None:
        self.pair.writer.release(self.pair.freed.pop(0))

    @invariant()
    def what_is_held_is_unchanged(self) -> None:
        for view, payload in getattr(self, "held", []):
            assert view == payload

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.close()


TestRingMachine = RingMachine.TestCase
TestRingMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# -- two processes --------------------------------------------------------------------------------

READER = """
    import sys, zlib
    from zml.transport.shm import Ring
    freed = []
    ring = Ring.open(sys.argv[1], bytes.fromhex(sys.argv[2]), freed.append)
    print("mapped", flush=True)
    for line in sys.stdin:
        slot, length = map(int, line.split())
        view = ring.view(slot, length)
        crc = zlib.crc32(view)
        del view
        print(crc, freed.pop(), flush=True)
"""


def start_reader(ring: Ring, program: str = READER) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), ring.path, ring.nonce.hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "mapped\n"
    return process


def test_two_processes_share_what_neither_copies() -> None:
    ring = Ring.create(3, 300_000)
    process = start_reader(ring)
    assert process.stdin is not None and process.stdout is not None
    generator = random.Random(7)
    for _ in range(20):
        payload = generator.randbytes(generator.randrange(1, 300_000))
        slot = ring.put(payload)
        assert slot is not None
        process.stdin.write(f"{slot} {len(payload)}\n")
        process.stdin.flush()
        assert process.stdout.readline().split() == [str(zlib.crc32(payload)), str(slot)]
        ring.release(slot)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0
    ring.close()


def test_a_killed_writer_leaves_the_reader_its_views_and_the_machine_nothing() -> None:
    program = """
        import sys
        from zml.transport.shm import Ring
        ring = Ring.create(2, 1000)
        slot = ring.put(b"last words")
        print(ring.path, ring.nonce.hex(), slot, flush=True)
        sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    path, nonce, slot = process.stdout.readline().split()
    reader = Ring.open(path, bytes.fromhex(nonce), lambda slot: None)
    process.kill()
    process.communicate(timeout=30)
    assert bytes(reader.view(int(slot), 10)) == b"last words"
    assert not os.path.exists(path)
    reader.close()


def test_a_process_that_ends_with_views_in_use_ends_quietly() -> None:
    program = """
        import sys, torch
        from zml.transport.shm import Ring
        ring = Ring.open(sys.argv[1], bytes.fromhex(sys.argv[2]), lambda slot: sys.stdout.flush())
        print("mapped", flush=True)
        view = ring.view(0, 4)
        tensor = torch.frombuffer(view, dtype=torch.float32)
        class Keep: pass
        keep = Keep()
        keep.me, keep.view = keep, view[1:]
        sys.stdin.read()
    """
    ring = Ring.create(2, 1000)
    ring.put(b"left")
    process = start_reader(ring, program)
    output, errors = process.communicate(timeout=60)
    assert (output, errors, process.returncode) == ("", "", 0)
    ring.close()
