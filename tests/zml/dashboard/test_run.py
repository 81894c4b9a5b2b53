"""A run directory as views: live, over, of any size, torn, foreign and hostile."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.zml.dashboard.synthetic import HOSTILE, Shape, write
from zml.dashboard import views
from zml.dashboard.growing import Growing, ends
from zml.dashboard.overview import headline, series
from zml.dashboard.rates import Trim
from zml.dashboard.run import Run
from zml.dashboard.sources import OneRun, RunsOf, source_of
from zml.dashboard.steps import LONGEST_LINE, StepFile, waterfall
from zml.dashboard.telling import event, read
from zml.logs.reading import Wanted
from zml.runs import history, rundir
from zml.runs.events import EventLog
from zml.runs.history import Row
from zml.runs.timeline import Step
from zml.scheduler.actions import Admit, Finish, Grow, Launch, Stop
from zml.scheduler.ids import JobId, ShardId, WorkerId
from zml.scheduler.state import State
from zml.status import JobStatus

SMALL = Shape(workers=4, shards=2, steps=400, rows=60, member_rows=20, timeline_steps=50, log_lines=20)


def pages(run: Run) -> dict[str, Any]:
    return {
        "overview": run.overview(),
        "series": run.series(),
        "workers": run.workers(),
        "shards": run.shards(),
        "steps": run.waterfall(None),
        "data": run.data(),
        "checkpoints": run.checkpoints(),
        "events": run.events(),
        "logs": run.logs(Wanted(), 100),
        "config": run.config(),
    }


def test_every_page_of_a_live_run(tmp_path: Path) -> None:
    made = write(tmp_path / "run", SMALL)
    found = pages(Run(tmp_path / "run"))
    assert found["overview"].head.headline.startswith("Training epoch 7 of 10, step 400, done in about ")
    assert [member.member for member in found["overview"].members] == [*made.workers, *made.shards]
    assert [curve.name for curve in found["series"].values] == ["loss", "accuracy"]
    assert [line.member for line in found["workers"].workers] == made.workers
    assert abs(sum(found["workers"].workers[0].phases.values()) - made.step_s) < 1e-6
    assert [line.chunks for line in found["shards"].shards] == [32, 33] and found["shards"].imbalance == 1.02
    assert {bar.worker for bar in found["steps"].bars} == set(made.workers)
    assert found["data"].state == "unknown" and found["data"].now.committed == 800
    assert found["logs"].members == ["w0", "w1", "w2", "w3", "coordinator"]
    assert {each.name: each.origin for each in found["config"].settings}["workers"] == "flag"
    for name, view in found.items():
        assert len(msgspec.json.encode(view)) < 300_000, name


def test_a_run_that_is_over_is_shown_as_it_ended(tmp_path: Path) -> None:
    write(tmp_path / "run", replace(SMALL, over=True))
    view = Run(tmp_path / "run").overview()
    assert (view.head.over, view.head.tone, view.head.silent_s) == (True, "good", 0.0)
    assert view.head.headline.startswith("Finished after ") and "400 steps" in view.head.headline
    assert view.numbers.progress == 1.0 and view.numbers.eta_s is None


def test_an_empty_folder_and_one_with_nothing_but_settings_have_pages(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    pages(Run(tmp_path / "run"))
    (tmp_path / "run" / rundir.CONFIG).write_text('{"script": "train.py", "started_at": 1e9}')
    assert Run(tmp_path / "run").overview().head.headline == "Waiting for everybody to join"


@pytest.mark.parametrize(
    "junk", [b"", b"null", b"[1]", b"\xff\xfe\x00", b"{" * 5000, b'{"settings": 3, "origins": []}']
)
def test_foreign_files_are_as_none(tmp_path: Path, junk: bytes) -> None:
    folder = tmp_path / "run"
    (folder / rundir.TIMELINE).mkdir(parents=True)
    (folder / rundir.LOGS).mkdir()
    (folder / rundir.COORDINATOR_STATE).mkdir(parents=True)
    for name in (
        rundir.CONFIG,
        rundir.NOW,
        rundir.STATUS,
        rundir.EVENTS,
        rundir.COORDINATOR,
        history.JOB,
        history.MEMBERS,
        f"{rundir.TIMELINE}/w0.jsonl",
        f"{rundir.LOGS}/w0.jsonl",
        f"{rundir.COORDINATOR_STATE}/00000000000000000000.records",
    ):
        (folder / name).write_bytes(junk)
    pages(Run(folder))


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


READ_FILES = (
    rundir.CONFIG,
    rundir.COORDINATOR,
    rundir.NOW,
    rundir.STATUS,
    rundir.EVENTS,
    history.JOB,
    history.MEMBERS,
)


@pytest.mark.parametrize("make", [pipe, link])
@pytest.mark.timeout(20)
def test_what_is_no_plain_file_is_as_none_and_nothing_waits(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    write(tmp_path / "run", SMALL)
    for name in READ_FILES:
        (tmp_path / "run" / name).unlink(missing_ok=True)
        make(tmp_path / "run" / name)
    found = pages(Run(tmp_path / "run"))
    assert found["overview"].head.state == "STARTING" and found["series"].values == []
    assert ends(tmp_path / "run" / history.MEMBERS, Trim) == []


@pytest.mark.timeout(20)
def test_a_file_without_an_end_costs_little(tmp_path: Path) -> None:
    for name in (rundir.CONFIG, rundir.COORDINATOR, rundir.NOW, rundir.STATUS, history.MEMBERS):
        sparse(tmp_path / name)
    run = Run(tmp_path)
    assert (run.status().state, run.config_json(), rundir.listening(tmp_path)) == ("STARTING", {}, None)
    assert ends(tmp_path / history.MEMBERS, Trim) == []
    with (tmp_path / history.MEMBERS).open("ab") as file:
        file.write(b'\n{"at": 1.0}\n')
    growing = Growing(tmp_path / history.MEMBERS, Trim, 64)
    assert [row.at for row in growing.look()] == [1.0]


def test_hostile_texts_come_as_texts(tmp_path: Path) -> None:
    write(tmp_path / "run", replace(SMALL, troubles=frozenset({"hostile"})))
    run = Run(tmp_path / "run")
    messages = {line.message for line in run.logs(Wanted(), 500).lines}
    assert HOSTILE[0] in messages and any(
        "1,000,000 bytes" in text or "1,000,001" in text for text in messages
    )
    assert any("\x00" in text for text in HOSTILE) and not any("\x00" in text for text in messages)


def test_a_link_in_the_logs_or_the_timeline_leads_nowhere(tmp_path: Path) -> None:
    write(tmp_path / "run", SMALL)
    secret = tmp_path / "secret"
    secret.write_text('{"clock": 7, "message": "secret"}\n')
    for name in (rundir.LOGS, rundir.TIMELINE):
        os.symlink(secret, tmp_path / "run" / name / "w9.jsonl")
    (tmp_path / "run" / rundir.EVENTS).unlink()
    os.symlink(secret, tmp_path / "run" / rundir.EVENTS)
    found = pages(Run(tmp_path / "run"))
    assert "secret" not in "".join(
        msgspec.json.encode(view).decode() for name, view in found.items() if name != "config"
    )
    assert 7 not in [bar.worker for bar in found["steps"].bars] and "w9" not in found["steps"].lacking


def test_the_live_status_is_asked_and_not_the_files(tmp_path: Path) -> None:
    write(tmp_path / "run", SMALL)
    run = Run(tmp_path / "run", live=lambda: JobStatus(job="j", state="DRAINING", steps=7))
    run.ask()
    view = run.overview()
    assert (view.head.state, view.numbers.steps) == ("DRAINING", 7)
    assert not [finding for finding in view.findings if finding.kind == "silent"]


def test_a_coordinator_whose_process_is_gone_is_told(tmp_path: Path) -> None:
    write(tmp_path / "run", SMALL)
    here = rundir.Listening(["tcp://127.0.0.1:1"], 2**22 + 12345, "job")
    (tmp_path / "run" / rundir.COORDINATOR).write_bytes(msgspec.json.encode(here))
    view = Run(tmp_path / "run").overview()
    assert ("silent", "bad") in [(finding.kind, finding.level) for finding in view.findings]
    assert view.head.tone == "bad"


# -- which runs ---------------------------------------------------------------------------------------------------


def test_names_are_looked_up_and_never_become_paths(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "good", SMALL)
    write(tmp_path / "outside", SMALL)
    source = RunsOf(tmp_path / "runs")
    assert [line.name for line in source.runs().runs] == ["good"]
    assert source.run("good") is source.run("good") is not None
    for name in ("../outside", "/etc", "..", ".", "", "good/../../outside", "good\0", "x" * 5000, ".hidden"):
        source.seek(name)
        assert source.run(name) is None, name
    write(tmp_path / "runs" / "later", SMALL)
    assert source.run("later") is None, "the loop reads no folder"
    source.seek("later")
    assert source.run("later") is not None


def test_a_folder_is_a_run_or_holds_some_or_is_neither(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "a", SMALL)
    assert isinstance(source_of(tmp_path / "runs" / "a"), OneRun)
    assert isinstance(source_of(tmp_path / "runs"), RunsOf)
    assert source_of(tmp_path / "nothing") is None


# -- words, curves, steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (JobStatus(job="j", state="FORMING"), "Waiting for everybody to join"),
        (JobStatus(job="j", state="RUNNING"), "Running, before the first step"),
        (
            JobStatus(job="j", state="RUNNING", steps=12_345, epoch=2, epochs=10, eta_s=840.0),
            "Training epoch 3 of 10, step 12,345, done in about 14 min",
        ),
        (JobStatus(job="j", state="RUNNING", steps=5, steps_before=2_000), "Training epoch 1, step 2,005"),
        (JobStatus(job="j", state="FAILED", at=65.0, steps=2), "Failed after 1:05: 2 steps"),
        (JobStatus(job="j", state="SUCCEEDED", at=5.0, epochs=1), "Finished after 0:05: 1 epoch"),
    ],
)
def test_the_headline_is_a_sentence(status: JobStatus, words: str) -> None:
    assert headline(status) == words


def test_a_hundred_thousand_rows_make_a_thousand_points_with_every_peak() -> None:
    rows = [Row(at=float(n), steps=n, values={"loss": 99.0 if n == 77_777 else 1.0}) for n in range(100_000)]
    curve = series(rows, []).values[0]
    assert len(curve.y) <= 1000 and 99.0 in curve.y and curve.step[curve.y.index(99.0)] == 77_777
    assert series(rows, [], before=1000).values[0].step == [step + 1000 for step in curve.step]


def test_what_is_not_finite_is_a_gap_in_the_curve(tmp_path: Path) -> None:
    rows = [Row(at=float(n), steps=n, values={"loss": None if n > 90 else 1.0}) for n in range(100)]
    assert series(rows, []).values[0].y[-3:] == [None, None, None]


def steps_file(path: Path, clocks: list[int], junk: bytes = b"") -> None:
    lines = [
        msgspec.json.encode(
            Step(
                clock=clock,
                at=0.1 * clock,
                compute=0.05,
                encode=0.01,
                wait=0.03,
                apply=0.01,
                send=0,
                pull=0,
                bytes_up=1,
                bytes_down=2,
            )
        )
        for clock in clocks
    ]
    path.write_bytes(junk + b"\n".join(lines) + (b"\n" if lines else b""))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 100_000), min_size=1, max_size=300, unique=True).map(sorted),
    st.integers(0, 100_001),
    st.sampled_from([b"", b"junk\n", b"x" * 9000 + b"\n", b"\n\n"]),
)
def test_a_step_is_found_by_halving(
    tmp_path_factory: pytest.TempPathFactory, clocks: list[int], wanted: int, junk: bytes
) -> None:
    path = tmp_path_factory.mktemp("steps") / "w0.jsonl"
    steps_file(path, clocks, junk)
    file = StepFile(path)
    try:
        found = file.find(wanted)
        expected = next((clock for clock in clocks if clock >= wanted), None)
        assert (None if found is None else found.clock) == expected
        assert file.ends() == (clocks[0], clocks[-1])
        sample = [line.clock for line in file.sample(20)]
        assert sample == sorted(set(sample)) and set(sample) <= set(clocks)
    finally:
        file.close()


def test_a_waterfall_shows_one_step_of_all_and_who_lacks_it(tmp_path: Path) -> None:
    steps_file(tmp_path / "w0.jsonl", list(range(1, 101)))
    steps_file(tmp_path / "w1.jsonl", list(range(1, 91)))
    steps_file(tmp_path / "w2.jsonl", [])
    newest = waterfall(tmp_path, None)
    assert (newest.clock, [bar.worker for bar in newest.bars], newest.lacking) == (90, ["w0", "w1"], ["w2"])
    assert newest.bars[0].whole_s == 0.1
    late = waterfall(tmp_path, 95)
    assert (late.clock, [bar.worker for bar in late.bars]) == (95, ["w0"])
    assert waterfall(tmp_path, 10**9).clock == 100
    assert "do not say" in newest.apart, "these are of an older run"
    assert waterfall(tmp_path / "nothing", None).clock == -1


def test_a_worker_that_has_left_does_not_hold_the_newest_step_back(tmp_path: Path) -> None:
    for worker, last in (("w0", 5000), ("w1", 4990), ("w2", 40)):
        steps_file(tmp_path / f"{worker}.jsonl", list(range(1, last + 1)))
    newest = waterfall(tmp_path, None)
    assert (newest.clock, [bar.worker for bar in newest.bars], newest.lacking) == (4990, ["w0", "w1"], ["w2"])


def test_lately_is_near_however_far_apart_the_rows_are(tmp_path: Path) -> None:
    made = write(tmp_path / "run", SMALL)
    told = made.status()
    run = Run(tmp_path / "run", live=lambda: told)
    whole = run.lately(told).window_s
    for second in range(0, 61, 2):
        later = msgspec.structs.replace(told, at=told.at + second)
        found = run.lately(later)
    assert (found.window_s, len(run.points)) == (30.0, 30) and whole > 0


def test_the_proof_of_the_data_holds_up_no_other_page(tmp_path: Path) -> None:
    write(tmp_path / "run", SMALL)
    run = Run(tmp_path / "run")
    with run.proving:
        assert (run.data().says, run.data().now.committed) == ("It is being checked.", 800)
        assert run.overview().head.state
    proved = run.data()
    with run.proving:
        assert run.data() == proved


def test_bars_stand_where_their_steps_began(tmp_path: Path) -> None:
    for worker, began in (("w0", 100.25), ("w1", 100.0)):
        line = {"clock": 7, "at": 0.0, "compute": 0.5, "wait": 0.1, "began": began}
        (tmp_path / f"{worker}.jsonl").write_text(json.dumps(line) + "\n")
    shown = waterfall(tmp_path, 7)
    assert ([(bar.worker, bar.start_s) for bar in shown.bars], shown.apart) == (
        [("w0", 0.25), ("w1", 0.0)],
        "",
    )


def test_of_a_thinned_file_the_next_step_that_is_there_is_shown(tmp_path: Path) -> None:
    steps_file(tmp_path / "w0.jsonl", list(range(0, 1000, 8)))
    steps_file(tmp_path / "w1.jsonl", list(range(0, 1000, 8)))
    assert waterfall(tmp_path, 33).clock == 40


def test_a_step_file_of_one_endless_line_costs_little(tmp_path: Path) -> None:
    (tmp_path / "w0.jsonl").write_bytes(b"x" * 100 * LONGEST_LINE)
    assert waterfall(tmp_path, 5).clock == -1


# -- files that grow ----------------------------------------------------------------------------------------------


def test_a_growing_file_is_read_on_and_read_anew_when_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    growing = Growing(path, Trim, 100)
    assert growing.look() == []
    path.write_bytes(b'{"at": 1.0}\nnonsense\n{"at": 2')
    assert [row.at for row in growing.look()] == [1.0]
    with path.open("ab") as file:
        file.write(b'.5}\n{"at": 3.0}\n')
    assert [row.at for row in growing.look()] == [1.0, 2.5, 3.0]
    rundir.write(path, b'{"at": 9.0}\n')
    assert [row.at for row in growing.look()] == [9.0]
    path.unlink()
    assert growing.look() == []


def test_rows_beyond_the_most_push_out_every_other_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(b'{"at": %d}\n' % n for n in range(1000)))
    growing = Growing(path, Trim, 64)
    rows = growing.look()
    assert 32 <= len(rows) <= 64 and (rows[0].at, rows[-1].at) == (0.0, 999.0)
    assert growing.stride == 1, "and then each that comes is kept"
    with path.open("ab") as file:
        file.write(b'{"at": 1000}\n{"at": 1001}\n')
    assert [row.at for row in growing.look()][-3:] == [999.0, 1000.0, 1001.0]


def test_events_have_the_words_that_were_written_and_a_tone(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    job, w0 = JobId("job"), WorkerId("w0")
    for action in (
        Admit(job, "peer", w0, 2, 1, "job job has a place for a worker"),
        Launch(job, w0, 2, "everybody is here"),
        Grow(job, ShardId("p2"), 2, "it came"),
        Stop(job, w0, "its script finished"),
        Stop(job, w0, "all 2 workers finished"),
        Finish(job, State.SUCCEEDED, 0, "all 2 workers finished"),
    ):
        log.write(action)
    log.note("checkpoint of step 10", "every 10 steps")
    assert [(each.member, each.what, each.because, each.tone) for each in read(path).events] == [
        ("w0", "joined again, as incarnation 2", "", "warn"),
        ("p2", "is one more shard", "it came", "good"),
        ("w0", "is told to stop", "all 2 workers finished", "quiet"),
        ("", "succeeded", "all 2 workers finished", "good"),
        ("", "checkpoint of step 10", "every 10 steps", "quiet"),
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=12),
        st.none() | st.integers() | st.text() | st.lists(st.text(), max_size=3),
    )
)
def test_every_line_of_events_has_words(said: dict[str, Any]) -> None:
    found = event(json.loads(json.dumps(said)))
    assert isinstance(found, views.Event) and len(found.what) <= 200
