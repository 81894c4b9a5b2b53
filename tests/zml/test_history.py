"""The history of a run: bounded however long it is, and exact between any two of its rows."""

import asyncio
import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest

from zml.figures import STALENESS_BOUNDS, ShardFigures, WorkerFigures, count, none_yet
from zml.runs import history, rundir
from zml.runs.history import MemberRow, Row, Rows, read
from zml.runs.recorder import Recorder
from zml.status import JobStatus, MemberStatus


def test_a_file_of_rows_stays_bounded_and_spread_over_the_whole_run(tmp_path: Path) -> None:
    rows = Rows(tmp_path / history.JOB, Row, 8)
    for step in range(1000):
        rows.add(Row(at=float(step), steps=step))
        assert len(list(read(rows.path, Row))) < 16
    found = [row.steps for row in read(rows.path, Row)]
    gaps = {after - before for before, after in itertools.pairwise(found)}
    assert found[0] == 0 and found[-1] > 1000 - 2 * max(gaps)
    assert max(gaps) <= 2 * min(gaps), "evenly, but for what came since the last time"


def test_rows_go_on_with_the_file_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / history.JOB
    Rows(path, Row, 8).add(Row(at=1.0, steps=1))
    with path.open("ab") as file:
        file.write(b'{"at": 2.0, "ste')  # the process died here
    with path.open("ab") as file:
        file.write(b"\n")
    again = Rows(path, Row, 8)
    again.add(Row(at=3.0, steps=3))
    assert [row.steps for row in read(path, Row)] == [1, 3]
    assert again.kept == 3, "with the line that is none"


@pytest.mark.parametrize("line", [b"", b"null", b"[]", b'{"at": "soon"}', b"\xff\xfe", b"{" * 100])
def test_foreign_lines_are_passed_over(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / history.MEMBERS
    path.write_bytes(line + b"\n" + msgspec.json.encode(MemberRow(at=1.0)) + b"\n")
    assert list(read(path, MemberRow)) == [MemberRow(at=1.0)]


def look(recorder: Recorder) -> None:
    if (status := recorder.look()) is not None:
        recorder.write(status)


def job(steps: int) -> JobStatus:
    worker = WorkerFigures(steps=steps, learning_rate=0.1, phases={"compute": 2.0})
    members = [
        MemberStatus(member="w0", role="worker", state="active", figures=worker),
        MemberStatus(member="w1", role="worker", state="lost"),
        MemberStatus(member="p0", role="shard", state="joined", shard=ShardFigures(updates=steps)),
    ]
    return JobStatus(
        job="j", state="RUNNING", steps=steps, at=100.0 + steps, values={"loss": None}, members=members
    )


@pytest.mark.parametrize("lives", [2, 5, 40])
def test_the_past_is_not_thinned_out_faster_by_coordinators_that_come_and_go(
    tmp_path: Path, lives: int
) -> None:
    path, at = tmp_path / history.JOB, 0.0
    for _ in range(lives):
        rows = Rows(path, Row, 10, 2.0)
        for _ in range(400 // lives):
            at += 2.0
            rows.add(Row(at=at))
    found = [row.at for row in read(path, Row)]
    gaps = sorted(after - before for before, after in itertools.pairwise(found))
    assert len(found) < 20 and found[0] == 2.0
    assert gaps[-1] <= 4 * gaps[0], "spread over the whole run"


def test_a_row_for_which_there_is_no_room_is_not_half_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows(tmp_path / history.JOB, Row, 8)
    rows.add(Row(at=1.0, steps=1))
    real = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            return int(self.file.write(data[:10]))

        def truncate(self, size: int) -> None:
            self.file.truncate(size)

    monkeypatch.setattr(Path, "open", lambda path, *args, **more: Full(real(path, *args, **more)))
    with pytest.raises(OSError, match="No space left"):
        rows.add(Row(at=2.0, steps=2))
    monkeypatch.undo()
    rows.add(Row(at=3.0, steps=3))
    assert [row.steps for row in read(rows.path, Row)] == [1, 3]


def test_a_file_is_bounded_in_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST_BYTES", 10_000)
    rows = Rows(tmp_path / history.MEMBERS, MemberRow, 1000)
    workers = {f"w{number}": WorkerFigures(steps=number) for number in range(5)}
    for at in range(100):
        rows.add(MemberRow(at=float(at), workers=workers))
        assert rows.path.stat().st_size == rows.bytes < 10_000
    assert next(row.at for row in read(rows.path, MemberRow)) == 0.0


def test_a_recorder_writes_what_is_new_and_nothing_else(tmp_path: Path) -> None:
    told: list[int] = []
    steps = 0
    recorder = Recorder(
        tmp_path, lambda: job(steps), lambda: steps, [lambda status: told.append(status.steps)]
    )
    look(recorder)
    assert not (tmp_path / history.JOB).exists(), "no step, no row"
    assert rundir.newest_status(tmp_path) == job(0)
    steps = 5
    look(recorder)
    look(recorder)
    assert told == [0, 5]
    assert list(read(tmp_path / history.JOB, Row)) == [
        Row(at=105.0, state="RUNNING", steps=5, values={"loss": None}, learning_rate=0.1, workers=1, shards=1)
    ]
    assert list(read(tmp_path / history.MEMBERS, MemberRow)) == [
        MemberRow(
            at=105.0,
            workers={"w0": WorkerFigures(steps=5, learning_rate=0.1, phases={"compute": 2.0})},
            shards={"p0": ShardFigures(updates=5)},
        )
    ]
    assert rundir.newest_status(tmp_path) == job(5)
    rundir.write(tmp_path / rundir.STATUS, msgspec.json.encode(job(6)))
    assert rundir.newest_status(tmp_path) == job(6), "the end counts more than what was before it"


def test_a_recorder_without_room_keeps_still_and_goes_on_later(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    steps = 1
    recorder = Recorder(folder, lambda: job(steps), lambda: steps)
    look(recorder)  # there is no such folder
    assert recorder.full
    folder.mkdir()
    (folder / history.JOB).mkdir()
    steps = 2
    look(recorder)
    assert recorder.full, "whatever stands in its place"
    (folder / history.JOB).rmdir()
    steps = 3
    look(recorder)
    assert not recorder.full and [row.steps for row in read(folder / history.JOB, Row)] == [3]


def test_a_follower_that_raises_is_told_nothing_more_and_costs_nobody_else(tmp_path: Path) -> None:
    told: list[int] = []
    steps = 1

    def raises(status: JobStatus) -> None:
        raise ValueError("not today")

    recorder = Recorder(
        tmp_path, lambda: job(steps), lambda: steps, [raises, lambda status: told.append(status.steps)]
    )
    look(recorder)
    steps = 2
    look(recorder)
    assert told == [1, 2] and len(recorder.followers) == 1
    assert [row.steps for row in read(tmp_path / history.JOB, Row)] == [1, 2]


def test_a_recorder_says_at_its_stop_how_the_job_stands(tmp_path: Path) -> None:
    steps = 3

    async def life() -> None:
        recorder = Recorder(tmp_path, lambda: job(steps), lambda: steps, every_s=60.0)
        recorder.start()
        await recorder.stop()
        await recorder.stop()

    asyncio.run(life())
    assert [row.steps for row in read(tmp_path / history.JOB, Row)] == [3]


def test_values_are_counted_in_the_class_whose_bound_they_reach() -> None:
    classes = none_yet(STALENESS_BOUNDS)
    for staleness in (0, 1, 2, 3, 33):
        count(classes, STALENESS_BOUNDS, staleness)
    assert classes == [1, 1, 1, 1, 0, 0, 0, 1]
