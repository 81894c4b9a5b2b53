"""Records on disk: what was appended is there, what is torn never was, and what is damaged is noticed."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zml.records import HEAD_BYTES, Damaged, NoRoom, Records, read


def filled(folder: Path, bodies: list[bytes], segment_bytes: int = 1 << 20) -> None:
    log = Records(folder, segment_bytes)
    for body in bodies:
        log.append(body)
    log.close()


def held(folder: Path, start: int = 0) -> list[tuple[int, bytes]]:
    log = Records(folder)
    try:
        return [(number, bytes(body)) for number, body in log.replay(start)]
    finally:
        log.close()


def read_whole(folder: Path) -> list[tuple[int, bytes]]:
    """As one who looks on."""
    return [(number, bytes(body)) for number, body in read(folder)]


@given(st.lists(st.binary(max_size=80), max_size=20), st.integers(1, 200))
def test_what_was_appended_is_read_again_over_any_cut_into_segments(
    tmp_path_factory: pytest.TempPathFactory, bodies: list[bytes], segment_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("log")
    for body in bodies:  # opened anew for each
        log = Records(folder, segment_bytes)
        log.append(body[:3], body[3:])
        log.close()
    assert held(folder) == list(enumerate(bodies))
    assert held(folder, start=2) == list(enumerate(bodies))[2:]


def test_a_tail_torn_at_any_byte_is_cut_off_and_said(tmp_path: Path) -> None:
    filled(tmp_path / "whole", [b"one", b"two", b"three"])
    (path,) = (tmp_path / "whole").glob("*.records")
    data = path.read_bytes()
    before = len(data) - HEAD_BYTES - len(b"three")
    for size in range(before, len(data)):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / path.name).write_bytes(data[:size])
        log = Records(folder)
        assert log.torn_bytes == size - before
        assert log.next == 2
        log.append(b"after")
        log.close()
        assert held(folder) == [(0, b"one"), (1, b"two"), (2, b"after")]


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    filled(tmp_path, [b"one", b"", b"three"])
    (path,) = tmp_path.glob("*.records")
    data = path.read_bytes()
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            changed = bytearray(data)
            changed[at] ^= flip
            path.write_bytes(changed)
            with pytest.raises(Damaged, match=str(path)):
                held(tmp_path)


def test_a_missing_segment_and_one_cut_short_in_the_middle_are_noticed(tmp_path: Path) -> None:
    filled(tmp_path, [b"a" * 40, b"b" * 40, b"c" * 40], segment_bytes=1)
    _, second, _ = sorted(tmp_path.glob("*.records"))
    data = second.read_bytes()
    second.unlink()
    with pytest.raises(Damaged, match="record is 2, and 1 was to follow"):
        held(tmp_path)
    for size in (0, 5, HEAD_BYTES, len(data) - 1):
        second.write_bytes(data[:size])
        with pytest.raises(Damaged):
            held(tmp_path)
    second.write_bytes(data)
    assert len(held(tmp_path)) == 3


def test_zeros_behind_the_end_are_what_a_dead_machine_leaves(tmp_path: Path) -> None:
    filled(tmp_path, [b"one"])
    (path,) = tmp_path.glob("*.records")
    path.write_bytes(path.read_bytes() + bytes(100))
    assert held(tmp_path) == [(0, b"one")]


def test_what_is_dropped_is_gone_and_numbers_go_on(tmp_path: Path) -> None:
    log = Records(tmp_path)
    for body in (b"0", b"1"):
        log.append(body)
    assert log.begin_segment() == 2
    assert log.begin_segment() == 2  # twice is the same as once
    log.append(b"2")
    log.drop_before(2)
    assert log.first == 2
    assert [number for number, _ in log.replay()] == [2]
    log.sync()
    log.close()
    filled(tmp_path, [b"3"])
    assert held(tmp_path) == [(2, b"2"), (3, b"3")]


def test_a_full_disk_leaves_nothing_of_the_record_and_the_next_one_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Records(tmp_path)
    log.append(b"before")
    real, calls = os.pwritev, 0

    def full(file: int, parts: list[memoryview], at: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            return real(file, [parts[0][:7]], at)  # some of it still fits
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(NoRoom, match="no room for 5 bytes"):
        log.append(b"large")
    monkeypatch.setattr(os, "pwritev", real)
    assert log.append(b"small") == 1
    log.close()
    assert held(tmp_path) == [(0, b"before"), (1, b"small")]


def test_parts_beyond_what_one_call_takes_are_all_written(tmp_path: Path) -> None:
    log = Records(tmp_path)
    parts = [bytes([n % 251]) * (n % 5) for n in range(2_000)]
    log.append(*parts)
    log.close()
    assert held(tmp_path) == [(0, b"".join(parts))]


def test_a_log_that_is_closed_refuses_and_touches_no_other_file(tmp_path: Path) -> None:
    closed = Records(tmp_path / "closed")
    closed.append(b"before")
    closed.close()
    closed.close()
    other = Records(tmp_path / "other")
    for use in (lambda: closed.append(b"after"), closed.begin_segment, closed.sync):
        with pytest.raises(OSError, match=r"closed|Bad file descriptor"):
            use()
    assert other.append(b"as ever") == 0
    other.close()
    assert held(tmp_path / "closed") == [(0, b"before")]


@pytest.mark.parametrize("failing", ["open", "fsync"])
def test_a_segment_that_cannot_be_begun_leaves_the_former_one_going_on(
    tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Records(tmp_path)
    log.append(b"before")
    files = os.listdir("/proc/self/fd")

    def fails(*_: object) -> int:
        raise OSError(errno.EMFILE if failing == "open" else errno.EIO, "it cannot be done")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fails)
        for _ in range(2):
            with pytest.raises(OSError, match="it cannot be done"):
                log.begin_segment()
    assert len(os.listdir("/proc/self/fd")) == len(files)
    assert log.append(b"after") == 1
    assert log.begin_segment() == 2
    log.append(b"at last")
    log.close()
    assert held(tmp_path) == [(0, b"before"), (1, b"after"), (2, b"at last")]
    assert read_whole(tmp_path) == list(enumerate([b"before", b"after", b"at last"]))


def test_a_segment_that_was_begun_and_never_written_to_is_in_nobodys_way(tmp_path: Path) -> None:
    filled(tmp_path, [b"one", b"two"])
    for number in (1, 2):  # the first where the former one went on behind it
        (tmp_path / f"{number:020d}.records").touch()
        assert read_whole(tmp_path) == [(0, b"one"), (1, b"two")]
        assert held(tmp_path) == [(0, b"one"), (1, b"two")]
        assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / f"{3:020d}.records").touch()
    with pytest.raises(Damaged, match="record is 3, and 2 was to follow"):
        held(tmp_path)
