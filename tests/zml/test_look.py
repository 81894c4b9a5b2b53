"""`zml logs`, `events`, `runs`, `compare`, and how a run is found: on run directories that are made by hand."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from zml.commands import aim, cli
from zml.commands import look as look_cli
from zml.errors import ZmlError
from zml.figures import PHASES
from zml.logs.outlets import stamp
from zml.logs.reading.lines import parse
from zml.runs import comparing, finding, rundir
from zml.runs.events import EventLog
from zml.runs.timeline import Step
from zml.scheduler.actions import Admit, Announce, Launch
from zml.scheduler.ids import JobId, Seat, WorkerId
from zml.status import CheckpointStatus, JobStatus, MemberStatus, encode

ROOT = Path(__file__).resolve().parents[2]
NOW = 1_768_464_000.0  # 2026-01-15T08:00:00Z
JOB = JobId("job")
ADMITTED = Admit(JOB, "peer", WorkerId("w0"), 1, 0, "there is a place")


class Called(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Called]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("ZML_")]:
        monkeypatch.delenv(name)

    def called(*args: str) -> Called:
        code = cli.run(args)
        return Called(code, *capsys.readouterr())

    return called


def make(path: Path, *, script: str = "train.py", began: float = NOW, **settings: Any) -> Path:
    (path / "logs").mkdir(parents=True)
    about = {"script": script, "args": [], "started_at": began, "settings": settings}
    (path / "config.json").write_text(json.dumps(about))
    os.utime(path / "config.json", (began, began))
    return path


def end(run: Path, **more: Any) -> None:
    about: dict[str, Any] = {
        "state": "SUCCEEDED",
        "started_at": NOW,
        "at": NOW + 65,
        "exit_code": 0,
        "steps": 40,
    }
    rundir.write(run / "status.json", encode(JobStatus(job="job", **{**about, **more})))


def log(run: Path, member: str, *messages: str, at: float = NOW, file: str = "", **more: Any) -> None:
    with (run / "logs" / f"{file or member}.jsonl").open("a") as out:
        for number, message in enumerate(messages):
            line = {
                "time": stamp(at + number),
                "level": "info",
                "message": message,
                "role": "worker",
                "id": member,
            }
            out.write(json.dumps({**line, **more}) + "\n")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """One that is over."""
    run = make(tmp_path / "runs" / "2026-01-15T08-00-00-train-ab12", workers=2)
    log(run, "coordinator", "listening", role="coordinator")
    log(run, "w0", "joined", "in the job", at=NOW + 1, step=3)
    log(run, "w3", "peer lost", at=NOW + 2.5, level="warning", because="silent for 1.5 s", peer="p0")
    log(run, "w3", "epoch 1", "\tloss 2.5\x1b[2J", at=NOW + 3, file="w3.out", stream="stdout", step=12)
    log(run, "p0", "full", at=NOW + 5, level="error", exception=[
        {"exc_type": "OSError", "exc_value": "no room", "frames": [{"filename": "a.py", "lineno": 3, "name": "f"}]}
    ])  # fmt: skip
    end(run)
    return run


@pytest.fixture(autouse=True)
def in_one_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


# -- zml logs ---------------------------------------------------------------------------------------------


def test_logs_of_all_come_in_order_of_time(call: Call, run: Path) -> None:
    assert (
        call("logs").out
        == """\
2026-01-15 08:00:00.000 coordinator info     listening
2026-01-15 08:00:01.000 w0          info     joined step=3
2026-01-15 08:00:02.000 w0          info     in the job step=3
2026-01-15 08:00:02.500 w3          warning  peer lost because="silent for 1.5 s" peer=p0
2026-01-15 08:00:03.000 w3          out      epoch 1
2026-01-15 08:00:04.000 w3          out          loss 2.5
2026-01-15 08:00:05.000 p0          error    full
    a.py:3 in f
    OSError: no room
"""
    )


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--worker", "0"], ["joined", "in the job"]),
        (["--worker", "0", "--shard", "0"], ["joined", "in the job", "full"]),
        (["--coordinator"], ["listening"]),
        (["--member", "w3", "--printed"], ["epoch 1", "\tloss 2.5"]),
        (["--level", "warning"], ["peer lost", "full"]),
        (["--grep", "SILENT"], ["peer lost"]),
        (["--grep", "oserror"], ["full"]),
        (["--regex", "^w0 (joined|in)"], ["joined", "in the job"]),
        (["--steps", "3-11"], ["joined", "in the job"]),
        (["--steps", "12-"], ["epoch 1", "\tloss 2.5"]),
        (["--since", "2026-01-15T08:00:04"], ["\tloss 2.5", "full"]),
        (["-n", "2"], ["\tloss 2.5", "full"]),
        (["-n", "all", "--worker", "3"], ["peer lost", "epoch 1", "\tloss 2.5"]),
        (["-n", "0"], []),
    ],
)
def test_logs_are_filtered(call: Call, run: Path, args: list[str], expected: list[str]) -> None:
    ended = call("logs", "--json", *args, "ab12")
    assert [json.loads(line)["message"] for line in ended.out.splitlines()] == expected
    assert ended.code == 0


def test_in_json_a_line_is_what_it_was(call: Call, run: Path) -> None:
    (line,) = call("logs", "--json", "--grep", "peer lost").out.splitlines()
    assert json.loads(line) == {
        "time": stamp(NOW + 2.5),
        "level": "warning",
        "message": "peer lost",
        "role": "worker",
        "id": "w3",
        "because": "silent for 1.5 s",
        "peer": "p0",
    }


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--since", "soon"], "soon is no time"),
        (["-n", "few"], "few is neither a number nor 'all'"),
        (["--regex", "("], "--regex ( is no regular expression"),
        (["--steps", "x"], "--steps x is no range of steps"),
        (["--level", "bad"], "Invalid value for '--level'"),
        (["nowhere"], "there is no run nowhere"),
    ],
)
def test_what_makes_no_sense_is_told_in_two_lines(call: Call, run: Path, args: list[str], error: str) -> None:
    ended = call("logs", *args)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 2)
    assert error in ended.err


def test_where_nothing_fits_it_is_said_what_there_is(call: Call, run: Path) -> None:
    assert call("logs", "--worker", "7").err == (
        f"zml: no logs of w7 in {finding_name(run)}; it has coordinator, p0, w0, w3\n"
    )
    assert call("logs", "--grep", "nothing").err == f"zml: no line in {finding_name(run)} fits\n"
    empty = make(run.parent / "empty")
    assert call("logs", "empty").err == f"zml: no logs in {finding_name(empty)}\n"


def finding_name(run: Path) -> str:
    return f"runs/{run.name}"


def test_colours_are_for_terminals(call: Call, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    coloured = call("logs", "--level", "warning").out
    assert "\x1b[33mpeer lost\x1b[0m" in coloured and "\x1b[31mfull\x1b[0m" in coloured
    assert "\x1b[2J" not in call("logs").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in call("logs").out


def test_following_shows_what_comes_and_ends_with_the_run(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look_cli, "LOOK_S", 0.01)
    monkeypatch.setattr(look_cli, "LAST_S", 0.1)
    run = make(tmp_path / "runs" / "live", began=time.time())
    (run / "coordinator.json").write_text(json.dumps({"addresses": [], "pid": os.getpid()}))
    log(run, "w0", "before")
    events = EventLog(run / "events.jsonl")
    events.write(ADMITTED)
    seen = threading.Event()
    real = finding.look

    def look(folder: Path, now: float) -> finding.Found:
        seen.set()
        return real(folder, now)

    monkeypatch.setattr(finding, "look", look)

    def go_on() -> None:
        for number in range(3):
            seen.clear()
            seen.wait()
            log(run, f"w{number}", f"later {number}", at=NOW + number)
            events.note(f"happened {number}", "")
        end(run)
        seen.clear()
        seen.wait()
        log(run, "w9", "last words", at=NOW + 9)

    for args, expected in (
        (["logs", "-f", "--json"], ["before", "later 0", "later 1", "later 2", "last words"]),
        (["events", "-f", "--json"], ["joined", *["happened 0", "happened 1", "happened 2"] * 2]),
    ):
        (run / "status.json").unlink(missing_ok=True)
        writer = threading.Thread(target=go_on)
        writer.start()
        ended = call(*args)
        writer.join()
        key = "message" if args[0] == "logs" else "what"
        assert [json.loads(line)[key] for line in ended.out.splitlines()] == expected
        assert ended.code == 0


def test_a_reader_that_goes_ends_it_quietly(run: Path, tmp_path: Path) -> None:
    log(run, "w9", *("x" * 100 for _ in range(5000)))
    program = [sys.executable, "-P", "-m", "zml", "logs", "-n", "all"]
    with subprocess.Popen(
        program,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait(30)) == (b"", 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5m", NOW - 300),
        ("2h30m", NOW - 9000),
        ("1.5s", NOW - 1.5),
        ("07:30", NOW - 1800),
        ("09:00", NOW + 3600 - 86_400),
        ("2026-01-15T08:00:00", NOW),
        ("2026-01-15T09:00:00+01:00", NOW),
        ("5", None),
        ("", None),
        ("25:00", None),
        ("99999999999d", None),
        ("-5m", None),
    ],
)
def test_moments(text: str, expected: float | None) -> None:
    assert look_cli.moment(text, NOW) == expected


# -- zml events -------------------------------------------------------------------------------------------


def test_events_are_what_was_told_with_why(call: Call, run: Path) -> None:
    events = EventLog(run / "events.jsonl")
    events.write(ADMITTED)
    events.write(Announce(JOB, 1, (Seat(WorkerId("w0"), 1, True),), "1 worker is here"))
    events.write(Launch(JOB, WorkerId("w0"), 1, "1 worker is here"))
    events.note("the coordinator goes on", "it was started again")
    told = [line[24:] if line[4] == "-" else line[13:] for line in call("events").out.splitlines()]
    assert told == [
        "w0   joined",
        "     generation 1: 1 worker: 1 worker is here",
        "     the coordinator goes on: it was started again",
    ]
    (newest,) = [json.loads(line) for line in call("events", "--json", "-n", "1").out.splitlines()]
    assert (newest["what"], newest["because"], newest["member"]) == (
        "the coordinator goes on",
        "it was started again",
        "",
    )


def test_events_that_cannot_be_read_are_passed_over_and_hostile_ones_are_harmless(
    call: Call, run: Path
) -> None:
    older = {"at": NOW, "event": "Fence", "member": "w1\x1b[2J", "because": "a\nb"}
    lines = [
        b"junk",
        b"[]",
        b'{"at": "x"}',
        json.dumps(older).encode(),
        b"",
        b'{"at": 1e99, "event": "x"}',
        b"torn",
    ]
    (run / "events.jsonl").write_bytes(b"\n".join(lines))
    assert call("events").out == "2026-01-15 08:00:00.000 w1   Fence: a b\n"
    (run / "events.jsonl").unlink()
    assert call("events").err == f"zml: no events in {finding_name(run)}\n"


# -- which run --------------------------------------------------------------------------------------------


def test_a_run_is_found_by_its_path_its_name_or_a_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = Path("runs")
    one = make(runs / "2026-01-15T08-00-00-train-ab12")
    two = make(runs / "2026-01-16T08-00-00-train-cd34", began=NOW + 9)
    attempt = make(runs / "slurm-7" / "attempt-0")
    newer = make(runs / "slurm-7" / "attempt-1", began=NOW + 5)
    for typed, folder in (
        (str(one), one),
        (str(one.absolute()), one.absolute()),
        (one.name, one),
        ("ab12", one),
        ("2026-01-16", two),
        ("train-cd34", two),
        ("runs/slurm-7/attempt-0", attempt),
        ("slurm-7/attempt-0", attempt),
        ("slurm-7/attempt-1", newer),
        (str(one / "config.json"), one),
        (None, two),
    ):
        assert finding.find(typed, runs) == folder, typed
    (runs / "slurm-7" / "now").symlink_to("attempt-0")
    assert finding.find("runs/slurm-7", runs) == attempt.absolute()
    (runs / "slurm-7" / "now").unlink()
    assert finding.find("runs/slurm-7", runs) == newer


def told(typed: str | None, runs: Path) -> tuple[str, str]:
    with pytest.raises(ZmlError) as caught:
        finding.find(typed, runs)
    return caught.value.what, caught.value.fix or ""


def test_a_run_that_is_not_found_is_answered_with_the_nearest(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert told(None, runs)[0] == f"there is no run below {runs}"
    assert told("x", runs) == ("there is no run x", "`zml runs` lists the runs.")
    for day, script, end in ((15, "train", "ab12"), (16, "train", "cd34"), (17, "evaluate", "ef56")):
        make(runs / f"2026-01-{day}T08-00-00-{script}-{end}")
    assert told("train", runs)[0] == "train may be 2 runs: " + ", ".join(
        f"2026-01-{day}T08-00-00-train-{end}" for day, end in ((15, "ab12"), (16, "cd34"))
    )
    assert told("trian-cd34", runs)[1] == "Did you mean 2026-01-16T08-00-00-train-cd34?"
    assert told("ef65", runs)[1] == "Did you mean 2026-01-17T08-00-00-evaluate-ef56?"
    assert told("2026-01-17T08-00-00-evalute-ef56", runs)[1].startswith("Did you mean 2026-01-17")
    assert told(str(runs), runs)[0] == f"{runs} is no run directory; it holds 3 of them"
    assert told("x" * 300, runs)[1] == "`zml runs` lists the runs."
    assert told("a\0b", runs)[1] == "`zml runs` lists the runs."


def test_what_has_become_of_a_run(tmp_path: Path) -> None:
    run = make(tmp_path / "runs" / "r")
    assert finding.look(run, NOW + 1)[:2] == (True, "starting")
    assert finding.look(run, NOW + 99)[:2] == (False, "cut off")
    (run / "coordinator.json").write_text(json.dumps({"addresses": [], "pid": os.getpid()}))
    assert finding.look(run, NOW + 9999)[:2] == (True, "running")
    (run / "now.json").write_bytes(encode(JobStatus(job="job", state="DRAINING", steps=5)))
    found = finding.look(run, NOW + 9999)
    assert found[:2] == (True, "draining") and found.status is not None and found.status.steps == 5
    (run / "now.json").write_bytes(b"half a st")
    assert finding.look(run, NOW) == (True, "running", None)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (run / "coordinator.json").write_text(json.dumps({"addresses": [], "pid": gone.pid}))
    assert finding.look(run, NOW)[:2] == (False, "cut off")
    log(run, "coordinator", "listening", host="another machine")
    written = (run / "logs" / "coordinator.jsonl").stat().st_mtime
    assert finding.look(run, written + 5)[:2] == (True, "running")
    assert finding.look(run, written + 500)[:2] == (False, "cut off")
    end(run, state="FAILED")
    assert finding.look(run, written + 5)[:2] == (False, "failed")


# -- zml runs and zml compare -----------------------------------------------------------------------------


def test_runs_are_a_table_those_that_go_on_first(call: Call, run: Path, tmp_path: Path) -> None:
    end(run, values={"loss": 2.5, "accuracy": None, "more": 1.0}, members=[worker("w0", 40)])
    make(run.parent / "other", script="/x/evaluate.py", began=NOW - 86_400)
    live = make(run.parent / "2026-01-14T08-00-00-train-cd34", began=time.time() - 65)
    (live / "coordinator.json").write_text(json.dumps({"addresses": [], "pid": os.getpid()}))
    (live / "now.json").write_bytes(
        encode(JobStatus(job="job", state="RUNNING", steps=234, steps_before=1000, values={"loss": 3.25}))
    )
    out = call("runs").out
    assert [line.split()[:3] for line in out.splitlines()] == [
        ["run", "script", "state"],
        ["train-cd34", "train.py", "running"],
        ["train-ab12", "train.py", "succeeded"],
        ["other", "evaluate.py", "cut"],
    ]
    assert "1:05  1,234  loss 3.25" in out.splitlines()[1]
    assert "loss 2.5, accuracy not finite     0" in out.splitlines()[2]
    assert max(map(len, out.splitlines())) <= 110
    first, second, third = json.loads(call("runs", "--json").out)
    assert (first["live"], first["state"], first["steps"], first["exit_code"]) == (
        True,
        "running",
        1234,
        None,
    )
    assert (second["took_s"], second["values"]["loss"], second["exit_code"]) == (65.0, 2.5, 0)
    assert (third["state"], third["script"], third["values"]) == ("cut off", "/x/evaluate.py", {})
    assert call("logs", "train-ab12").code == 0  # a name of the table is enough


def test_without_runs_it_is_said(call: Call) -> None:
    assert call("runs").out == "no runs below runs; `zml run train.py` makes one\n"
    assert call("runs", "--json").out == "[]\n"
    assert call("runs", "--runs", "nowhere").code == 2


def worker(name: str, steps: int) -> MemberStatus:
    return MemberStatus(member=name, role="worker", state="done", steps=steps)


def timeline(run: Path, name: str, compute: float, up: int) -> None:
    (run / "timeline").mkdir(exist_ok=True)
    step = Step(1, 0.0, compute=compute, encode=0.01, wait=0.02, apply=0.03, send=0.1, pull=0.2, bytes_up=up,
                bytes_down=10, began=NOW)  # fmt: skip
    (run / "timeline" / f"{name}.jsonl").write_bytes((msgspec.json.encode(step) + b"\n") * 4)


def test_without_a_run_the_newest_is_shown_where_nobody_listens(
    call: Call, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aim, "_is_closed", lambda address: True)
    end(run, run_dir=str(run))
    assert call("status").out.splitlines()[-1] == "run directory: runs/2026-01-15T08-00-00-train-ab12"
    kept = CheckpointStatus(path=str(run / "checkpoints/step-000000040"), step=40, at=NOW)
    cut = make(run.parent / "2026-01-15T09-00-00-train-cd34")
    (cut / "coordinator.json").write_text(json.dumps({"addresses": [], "pid": 2**22}))
    (cut / "now.json").write_bytes(
        encode(JobStatus(job="job", state="RUNNING", steps=41, checkpoint=kept, run_dir=str(cut)))
    )
    lines = call("status").out.splitlines()
    assert "cut off" in lines[0]
    assert "its coordinator is gone, and nobody has written down how it ended" in lines
    assert "to go on from it: zml resume" in lines[-2] and "cd34" in lines[-2]


def test_two_runs_are_compared(call: Call, run: Path) -> None:
    other = make(run.parent / "other", workers=2, compress="topk:1%")
    for each, compute, up, loss, took in ((run, 0.1, 4000, 2.0, 40), (other, 0.2, 40, 2.5, 80)):
        members = [worker("w0", 100), worker("w1", 100)]
        end(each, values={"loss": loss}, samples=6400, steps=100, at=NOW + took, members=members)
        timeline(each, "w0", compute, up)
        timeline(each, "w1", compute, up)
    assert (
        call("compare", "ab12", "other").out
        == """\
settings  train-ab12  other
compress  -           topk:1%

results    train-ab12     other
took           40.0 s      1:20     2x
samples/s         160        80   0.5x
loss                2       2.5  1.25x
step         160.0 ms  260.0 ms  1.62x
compute      100.0 ms  200.0 ms     2x
up a step        4 kB      40 B  0.01x
up             800 kB      8 kB  0.01x
"""
    )
    found = json.loads(call("compare", "--json", "ab12", "other").out)
    assert found["settings"] == {"compress": [None, "topk:1%"]}
    assert found["results"]["samples/s"] == [160.0, 80.0]
    assert found["results"]["state"] == ["succeeded", "succeeded"]
    assert "workers" in call("compare", "--all", "ab12", "other").out
    assert call("compare", "ab12", "ab12").out == "settings: the same\n\nresults: the same\n"
    timed = {row for row in found["results"] if row.endswith("_s")}
    assert timed == {"took_s", "step_s"} | {f"{phase}_s" for phase in (*PHASES, "send", "pull")}
    third = call("compare", "ab12", "other", "ab12").out.splitlines()
    assert third[0].split() == ["settings", "train-ab12", "other", "train-ab12"]


def test_comparing_takes_two_runs_and_whatever_of_them_can_be_read(call: Call, run: Path) -> None:
    assert call("compare", "ab12").code == 2
    broken = make(run.parent / "broken")
    (broken / "config.json").write_text('{"args": 3, "started_at": NaN, "settings": []}')
    os.utime(broken / "config.json", (NOW, NOW))
    assert call("compare", "ab12", "broken").code == call("runs").code == 0
    (broken / "config.json").write_bytes(b"\xff{")
    os.utime(broken / "config.json", (NOW, NOW))
    (broken / "status.json").write_text('{"job": 3}')
    ended = call("compare", "ab12", "broken")
    assert ended.code == 0
    assert "state       succeeded  cut off" in ended.out


def test_steps_are_those_of_the_worker_that_made_the_most() -> None:
    status = JobStatus(job="job", state="SUCCEEDED", members=[worker("w0", 7), worker("w1", 9)])
    assert comparing.results(status, {})["steps"] == 9


def test_what_a_script_logs_may_have_any_name() -> None:
    status = JobStatus(job="job", state="SUCCEEDED", steps=3, values={"steps": 1.5, "loss": 2.0})
    found = comparing.results(status, {})
    assert (found["steps"], found["logged steps"], found["loss"]) == (3, 1.5, 2.0)


@pytest.mark.parametrize("name", [rundir.STATUS, rundir.NOW, rundir.COORDINATOR])
@pytest.mark.parametrize("data", [b'{"job": "\xff"}', b"[" * 100_000, b'{"job": 1}'])
def test_a_damaged_file_of_one_run_is_no_harm(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert (rundir.last_status(tmp_path), rundir.newest_status(tmp_path)) == (None, None)
    assert rundir.listening(tmp_path) is None


def test_a_name_in_a_log_is_one_line() -> None:
    line = parse(
        b'{"id": "w0\\n02:25 coordinator critical FORGED", "role": "x\\ny", "message": "m"}', "w0", 0.0
    )
    assert line is not None and (line.member, line.role) == ("w0 02:25 coordinator critical FORGED", "x y")
