"""States of streams that the coordinator keeps: the newest few of each part, over its own death, and in checkpoints."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from zml.coordinator.docket import Docket
from zml.coordinator.facts import STATES
from zml.coordinator.streams import FILE, MOST_STATE, Streams
from zml.journal import Journal
from zml.messages import FindStream, StreamAt, StreamFound
from zml.scheduler.ids import JobId
from zml.scheduler.machine import Machine
from zml.scheduler.rules import Rules
from zml.transport import Refusal


def docket(folder: Path | None = None, **options: Any) -> Docket:
    journal = Journal(folder, **options) if folder is not None else None
    return Docket(JobId("job"), Machine(Rules()), journal, lambda: 0.0)


def tell(streams: Streams, part: int, position: int, state: bytes) -> None:
    streams.told(StreamAt("job", "w0", 1, part, position), state)


def find(streams: Streams, part: int, position: int) -> tuple[int, bytes | None]:
    found, state = streams.find(FindStream("job", "w0", 1, part, position))
    assert isinstance(found, StreamFound)
    return found.position, state


def test_the_nearest_state_at_or_before_a_position_is_found() -> None:
    streams = Streams(docket())
    for position in (40, 8, 24, 8):
        tell(streams, 1, position, b"%d" % position)
    assert [find(streams, 1, position) for position in (7, 8, 23, 24, 99)] == [
        (0, None), (8, b"8"), (8, b"8"), (24, b"24"), (40, b"40"),
    ]  # fmt: skip
    assert find(streams, 0, 50) == (0, None), "each part has its own"
    with pytest.raises(Refusal, match="part -1"):
        find(streams, -1, 0)


def test_few_are_kept_and_what_does_not_fit_is_passed_over() -> None:
    streams = Streams(docket())
    for position in range(1, 100):
        tell(streams, 0, position, b"%d" % position)
    for part, position, state in (
        (0, 0, b"x"),
        (0, 200, b""),
        (0, 300, bytes(MOST_STATE + 1)),
        (5000, 1, b"x"),
    ):
        tell(streams, part, position, state)
    assert [each.position for each in streams.docket.facts.passed[0]] == list(range(100 - STATES, 100))
    assert [*streams.docket.facts.passed] == [0]


@pytest.mark.parametrize("snapshot_bytes", [200, 1 << 20])
def test_another_coordinator_finds_them_again(tmp_path: Path, snapshot_bytes: int) -> None:
    before = docket(tmp_path, snapshot_bytes=snapshot_bytes)
    for part in range(3):
        for position in range(16, 200, 16):
            tell(Streams(before), part, position, b'{"at":%d}' % position)
    assert before.journal is not None
    before.journal.close()
    after = docket(tmp_path, snapshot_bytes=snapshot_bytes)
    assert after.facts.passed == before.facts.passed and len(after.facts.passed) == 3
    assert find(Streams(after), 2, 185) == (176, b'{"at":176}')
    assert after.journal is not None
    after.journal.close()


def checkpoint(folder: Path, files: dict[str, bytes]) -> Any:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return cast(Any, SimpleNamespace(path=folder, manifest=SimpleNamespace(files=dict.fromkeys(files))))


def test_a_checkpoint_brings_them_to_the_next_run(tmp_path: Path) -> None:
    first, second = Streams(docket()), Streams(docket())
    assert first.files() == {}
    tell(first, 0, 16, '{"text":"\N{SNOWMAN}"}'.encode())
    tell(first, 3, 32, b'{"at":5}')
    second.begin_with(checkpoint(tmp_path, first.files()))
    assert second.docket.facts.passed == first.docket.facts.passed


@pytest.mark.parametrize("data", [b"", b"{}", b"[[1]]", b"\xff", b"[[0,16,7]]"])
def test_a_file_that_cannot_be_read_costs_time_and_nothing_else(tmp_path: Path, data: bytes) -> None:
    streams = Streams(docket())
    streams.begin_with(checkpoint(tmp_path, {FILE: data}))
    streams.begin_with(checkpoint(tmp_path, {}))
    assert streams.docket.facts.passed == {}
