"""States of streams that the coordinator keeps: some of each part, over its own death, and in checkpoints."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zml.coordinator import streams as module
from zml.coordinator.streams import FILE, Streams
from zml.messages import MOST_STATE, FindStream, StreamAt, StreamFound
from zml.thinning import thinned
from zml.transport import Refusal


def tell(streams: Streams, part: int, position: int, state: bytes) -> None:
    streams.told(StreamAt("job", "w0", 1, part, position), state)


def find(streams: Streams, part: int, position: int) -> tuple[int, bytes | None]:
    found, state = streams.find(FindStream("job", "w0", 1, part, position))
    assert isinstance(found, StreamFound)
    return found.position, state


def test_the_nearest_state_at_or_before_a_position_is_found() -> None:
    streams = Streams()
    for position in (8, 24, 40, 40):
        tell(streams, 1, position, b"%d" % position)
    assert [find(streams, 1, position) for position in (7, 8, 23, 24, 99)] == [
        (0, None), (8, b"8"), (8, b"8"), (24, b"24"), (40, b"40"),
    ]  # fmt: skip
    assert find(streams, 0, 50) == (0, None), "each part has its own"
    with pytest.raises(Refusal, match="no part -1"):
        find(streams, -1, 0)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=200))
def test_what_is_kept_is_few_and_close_where_things_happen(gaps: list[int]) -> None:
    kept: list[int] = []
    told: list[int] = []
    for gap in gaps:
        told.append((told[-1] if told else 0) + gap)
        kept = thinned([*kept, told[-1]], told[-1])
        assert kept[-1] == told[-1] and thinned(kept, told[-1]) == kept
        assert len(kept) <= 2 + 2 * told[-1].bit_length()
    for position in told:
        back = max((each for each in kept if each <= position), default=None)
        assert back is not None, "nobody has to read from the front"
        assert position - back <= 3 * (told[-1] - position) + 2 * max(gaps)


def test_what_a_run_has_told_beyond_where_another_goes_on_does_not_crowd_out_what_that_one_tells() -> None:
    streams = Streams()
    for position in range(1000, 3000, 50):
        tell(streams, 0, position, b"old")
    for position in range(16, 320, 16):
        tell(streams, 0, position, b"new")
        assert find(streams, 0, position) == (position, b"new")
        assert find(streams, 0, position + 15) == (position, b"new")
    assert find(streams, 0, 290)[0] >= 240


def test_what_does_not_fit_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams()
    for part, position, state in (
        (0, 0, b"x"), (0, 200, b""), (0, 300, bytes(MOST_STATE + 1)), (5000, 1, b"x"), (0, 1, b"\xff"),
    ):  # fmt: skip
        tell(streams, part, position, state)
    assert streams.files() == {}
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    for position in range(1, 200):
        for part in range(4):
            tell(streams, part, position, b"x" * 60)
            assert find(streams, part, position) == (position, b"x" * 60)
    kept = [state for part in streams.kept.values() for state in part.values()]
    assert streams.bytes == sum(map(len, kept)) <= 1000
    tell(streams, 9, 1, b"x" * 900)
    assert find(streams, 9, 1) == (0, None), "there is no room for it"


def test_another_coordinator_finds_them_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITE_S", 0.0)
    monkeypatch.setattr(module, "REST", 0)
    before = Streams(tmp_path)
    for part in range(3):
        for position in range(16, 200, 16):
            tell(before, part, position, b'{"at":%d}' % position)
    after = Streams(tmp_path)
    assert after.kept == before.kept and after.bytes == before.bytes
    assert find(after, 2, 195) == (192, b'{"at":192}')


def test_the_file_is_written_seldom_and_a_disk_without_room_costs_nothing(tmp_path: Path) -> None:
    streams = Streams(tmp_path)
    tell(streams, 0, 1, b"one")
    written = (tmp_path / FILE).read_bytes()
    for position in range(2, 100):
        tell(streams, 0, position, b"more")
    assert (tmp_path / FILE).read_bytes() == written
    nowhere = Streams(tmp_path / "gone")
    tell(nowhere, 0, 1, b"one")
    assert find(nowhere, 0, 1) == (1, b"one")


def checkpoint(folder: Path, files: dict[str, bytes]) -> Any:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return cast(Any, SimpleNamespace(path=folder, manifest=SimpleNamespace(files=dict.fromkeys(files))))


def test_a_checkpoint_brings_them_to_the_next_run(tmp_path: Path) -> None:
    first, second = Streams(), Streams()
    assert first.files() == {}
    tell(first, 0, 16, '{"text":"\N{SNOWMAN}"}'.encode())
    tell(first, 3, 32, b'{"at":5}')
    second.begin_with(checkpoint(tmp_path, first.files()))
    assert second.kept == first.kept


@pytest.mark.parametrize("data", [b"", b"{}", b"[[1]]", b"\xff", b"[[0,16,7]]", b"[" * 9999, b'[[-1,5,"x"]]'])
def test_a_file_that_cannot_be_read_costs_time_and_nothing_else(tmp_path: Path, data: bytes) -> None:
    streams = Streams()
    streams.begin_with(checkpoint(tmp_path, {FILE: data}))
    streams.begin_with(checkpoint(tmp_path, {}))
    assert streams.kept == {} and Streams(tmp_path).kept == {}
