"""`zml run`'s launcher with real processes that stand in for the roles: order, output, signals, and nothing left."""

import asyncio
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zml import config
from zml.errors import NOT_FORMED, UNREACHABLE, ZmlError
from zml.launch import child, local
from zml.runs import resume, rundir
from zml.status import JobStatus, MemberStatus
from zml.text import console

pytestmark = pytest.mark.cluster

FAKE = Path(__file__).parent / "fake_roles.py"
PROGRAM = (sys.executable, "-P", str(FAKE))


class Observer:
    """Reads what the stand-ins left in the run directory."""

    def __init__(self, folder: Path, deaf: bool = False) -> None:
        self.folder = folder
        self.deaf = deaf
        self.drains: list[str] = []
        self.told: list[tuple[str, int, str]] = []
        self.away: Callable[[], bool] = lambda: False  # for those who tell of an end
        self.open = 0
        self.dead: list[bool] = []  # for each time that somebody hung up: was the coordinator?

    async def connect(self, settings: config.Settings) -> "Observer":
        self.open += 1
        return self

    async def status(self, endpoint: Any) -> JobStatus:
        over = rundir.last_status(self.folder)
        if over is not None:
            return over
        here = sorted(path.name for path in self.folder.glob("joined/*"))
        asked = json.loads((self.folder / "config.json").read_text())["settings"]
        formed = len(here) == asked["workers"] + asked["shards"]
        members = [
            MemberStatus(member=name, role="worker" if name[0] == "w" else "shard", state="active")
            for name in here
        ]
        return JobStatus(
            job="job",
            state="RUNNING" if formed else "FORMING",
            workers=asked["workers"],
            shards=asked["shards"],
            members=members,
        )

    async def drain(self, endpoint: Any, because: str) -> None:
        self.drains.append(because)
        if self.deaf:
            await asyncio.get_running_loop().create_future()
        if "stubborn" not in (self.folder / "config.json").read_text():
            (self.folder / "drain").touch()

    async def ended(self, endpoint: Any, job: str, member: str, pid: int, because: str) -> None:
        if self.away():
            raise ZmlError(UNREACHABLE, "the coordinator does not answer")
        if rundir.last_status(self.folder) is None:  # after that, who ends first is left to chance
            self.told.append((member, pid, because))
            (self.folder / "told").touch()

    async def hang_up(self, endpoint: Any, *, dead: bool) -> None:
        self.dead.append(dead)
        self.open -= 1


class Screen(console.PlainViewer):
    """Keeps what it is given; `react` is called with each line and may act on it."""

    def __init__(self) -> None:
        self.shown, self.said = io.StringIO(), io.StringIO()
        super().__init__(self.shown, self.said)
        self.on: dict[str, Any] = {}

    def script_line(self, line: str) -> None:
        super().script_line(line)
        self._react(line)

    def say(self, line: str) -> None:
        super().say(line)
        self._react(line)

    def _react(self, line: str) -> None:
        for part in list(self.on):
            if part in line:
                self.on.pop(part)()


class Run:
    """One run of the launcher over the stand-ins."""

    def __init__(self, folder: Path, script: str, *args: str, **settings: Any) -> None:
        flags = {"runs": str(folder / "runs"), "workers": 2, "shards": 1, **settings}
        self.resolved = config.resolve(flags, {})
        self.folder = rundir.create(self.resolved, script, args)
        self.screen = Screen()
        self.observer = Observer(self.folder)
        self.script = script
        self.args = args
        self.local: local.LocalRun | None = None

    def run(self) -> JobStatus | None:
        async def main() -> JobStatus | None:
            self.local = local.LocalRun(
                self.resolved,
                self.folder,
                self.script,
                self.args,
                ["cpu"] * self.resolved.settings.workers,
                self.screen,
                self.observer,
                PROGRAM,
            )
            return await self.local.run()

        return asyncio.run(main())

    @property
    def lines(self) -> list[str]:
        return self.screen.shown.getvalue().splitlines()

    @property
    def said(self) -> str:
        return self.screen.said.getvalue()

    def environment(self, member: str) -> dict[str, str]:
        found: dict[str, str] = json.loads((self.folder / "environment" / member).read_text())
        return found


def end_of(pid: int, timeout_s: float = 20.0) -> bool:
    """Whether a process that is not our child is gone, or goes in time."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], timeout_s)[0])
    finally:
        os.close(handle)


def nothing_is_left(folder: Path) -> bool:
    pids = {path.name: int(path.read_text()) for path in folder.glob("pids/[!.]*")}
    assert "coordinator" in pids
    return all(end_of(pid) for pid in pids.values())


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(local, "LOOK_EVERY_S", 0.02)
    yield


def test_a_run_ends_with_its_jobs_status_and_leaves_no_process(tmp_path: Path) -> None:
    run = Run(tmp_path, "fine.py", "--lr", "0.1")
    status = run.run()
    assert status is not None and (status.state, status.exit_code) == ("SUCCEEDED", 0)
    assert nothing_is_left(run.folder)
    assert run.observer.open == 0
    assert run.local is not None and run.local.killed == ""
    told = json.loads((run.folder / "args.json").read_text())
    assert told[-4:] == ["--", "fine.py", "--lr", "0.1"]
    about = json.loads((run.folder / "config.json").read_text())
    assert (about["script"], about["args"], about["folder"]) == ("fine.py", ["--lr", "0.1"], os.getcwd())
    assert about["origins"]["workers"] == "flag" and about["settings"]["workers"] == 2


def test_the_coordinator_listens_on_a_port_of_the_system_and_on_a_private_socket(tmp_path: Path) -> None:
    run = Run(tmp_path, "fine.py")
    run.run()
    tcp, ipc = json.loads((run.folder / "coordinator.json").read_text())["addresses"]
    assert tcp == "tcp://127.0.0.1:0"
    assert ipc.startswith("ipc:///") and ipc.endswith("/coordinator")
    assert not Path(ipc.removeprefix("ipc://")).parent.exists()  # removed with the run


def test_the_first_workers_lines_are_shown_as_they_are_and_all_are_kept_out_of_the_logs(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path, "fine.py")
    run.run()
    assert run.lines == ["w0 line 1", "w0 line \x1b[1m2\x1b[0m é"]
    assert (run.folder / "logs" / "w1.log").read_text() == "w1 has something to say of itself\n"
    assert not (run.folder / "logs" / "p0.log").exists()  # it had nothing to say


def test_all_lines_can_be_shown_with_names_or_none(tmp_path: Path) -> None:
    run = Run(tmp_path, "fine.py", keep_output="all")
    run.run()
    assert len(run.lines) == 4 and {"w0 | w0 line 1", "w1 | w1 line 1"} <= set(run.lines)
    run = Run(tmp_path, "fine.py", keep_output="none")
    run.run()
    assert run.lines == []


def test_a_failed_job_keeps_its_exit_code(tmp_path: Path) -> None:
    run = Run(tmp_path, "fails.py")
    status = run.run()
    assert status is not None and (status.state, status.exit_code) == ("FAILED", 3)
    assert nothing_is_left(run.folder)


def test_one_worker_computes_with_the_threads_of_plain_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run = Run(tmp_path, "fine.py", workers=1)
    run.run()
    assert "OMP_NUM_THREADS" not in run.environment("w0")
    assert run.environment("p0")["OMP_NUM_THREADS"] == "1"


def test_several_workers_share_the_cores_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run = Run(tmp_path, "fine.py")
    run.run()
    assert run.environment("w1")["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run = Run(tmp_path, "fine.py")
    run.run()
    assert run.environment("w1")["OMP_NUM_THREADS"] == "7"


def test_every_process_gets_the_settings_as_they_were_settled(tmp_path: Path) -> None:
    run = Run(tmp_path, "fine.py", staleness="async", lease_s=2.5)
    run.run()
    for member in ("p0", "w0", "w1"):
        told = {key: text for key, text in run.environment(member).items() if key.startswith("ZML_")}
        settings = config.resolve({}, told).settings
        assert (settings.staleness, settings.lease_s, settings.workers) == (None, 2.5, 2)
        assert settings.coordinator[0].startswith("ipc://")  # the nearest first


def test_a_coordinator_that_cannot_start_is_named_with_its_reason(tmp_path: Path) -> None:
    run = Run(tmp_path, "no_coordinator.py")
    with pytest.raises(ZmlError) as caught:
        run.run()
    assert caught.value.code == NOT_FORMED
    assert caught.value.what == "the coordinator ended with exit code 4: the address is in use [ZML-E201]"
    assert nothing_is_left(run.folder)


def test_a_coordinator_that_does_not_listen_in_time_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "START_S", 1.0)
    run = Run(tmp_path, "deaf_coordinator.py")
    with pytest.raises(ZmlError, match="the coordinator does not listen after 1 s"):
        run.run()
    assert nothing_is_left(run.folder)


def test_a_shard_that_cannot_start_is_named_with_its_reason(tmp_path: Path) -> None:
    run = Run(tmp_path, "bad_shard.py")
    with pytest.raises(ZmlError) as caught:
        run.run()
    assert (caught.value.code, caught.value.exit_code) == (NOT_FORMED, 4)
    assert caught.value.what == "p0 ended with exit code 5: no room for chunks [ZML-E999]"
    assert caught.value.fix == f"Its log is {run.folder}/logs/p0.jsonl."
    assert nothing_is_left(run.folder)


def test_a_worker_that_does_not_join_in_time_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, "late.py", join_timeout_s=1.5)
    with pytest.raises(ZmlError) as caught:
        run.run()
    assert (caught.value.code, caught.value.what) == (NOT_FORMED, "w1 did not join within 1.5 s")
    assert nothing_is_left(run.folder)


def test_who_has_not_joined_when_the_job_is_over_is_not_waited_for(tmp_path: Path) -> None:
    run = Run(tmp_path, "ends_early.py")
    status = run.run()
    assert status is not None and status.state == "SUCCEEDED"
    assert "killing" not in run.said
    assert nothing_is_left(run.folder)


def test_a_coordinator_that_is_killed_is_started_again_with_the_same_flags(tmp_path: Path) -> None:
    run = Run(tmp_path, "dies_once.py", "--lr", "0.1")
    first: list[str] = []
    run.screen.on["starting it again"] = lambda: first.append((run.folder / "args.json").read_text())
    status = run.run()
    assert status is not None and status.state == "SUCCEEDED"
    assert "coordinator ended by SIGKILL; starting it again (1 of 5)" in run.said
    assert first == [(run.folder / "args.json").read_text()]
    assert nothing_is_left(run.folder)


def test_nobody_waits_for_a_goodbye_to_a_coordinator_that_was_killed(tmp_path: Path) -> None:
    """Its connection is given up after a second; here, only once the job is over."""
    run = Run(tmp_path, "dies_once.py")
    hang_up = run.observer.hang_up

    async def patient(endpoint: Any, *, dead: bool) -> None:
        while rundir.last_status(run.folder) is None:
            await asyncio.sleep(0.01)
        await hang_up(endpoint, dead=dead)

    run.observer.hang_up = patient  # type: ignore[method-assign]
    status = run.run()
    assert status is not None and status.state == "SUCCEEDED"
    assert run.observer.open == 0 and run.observer.dead == [True, True]


def test_a_coordinator_that_is_killed_too_often_ends_the_run_and_everything_in_it(tmp_path: Path) -> None:
    run = Run(tmp_path, "dies.py", coordinator_restarts=2)
    assert run.run() is None
    assert "(1 of 2)" in run.said and "(2 of 2)" in run.said and "(3 of 2)" not in run.said
    assert run.local is not None
    assert run.local.children["coordinator"].how() == "ended by SIGKILL"
    assert nothing_is_left(run.folder)


@pytest.mark.parametrize(
    ("script", "how"),
    [
        ("loses_one.py", "w1 ended by SIGKILL"),
        ("fences_one.py", "w1 ended with exit code 1: w1#1 was fenced: silent for 1.5 s [ZML-E204]"),
    ],
)
def test_a_worker_that_died_is_started_again(tmp_path: Path, script: str, how: str) -> None:
    run = Run(tmp_path, script)
    status = run.run()
    assert status is not None and status.state == "SUCCEEDED"
    assert f"{how}; starting it again (1 of 3)" in run.said
    assert nothing_is_left(run.folder)


def test_the_coordinator_is_told_once_that_a_process_has_ended_and_how(tmp_path: Path) -> None:
    run = Run(tmp_path, "loses_one.py")
    first: list[int] = []
    run.screen.on["starting it again"] = lambda: first.append(int((run.folder / "pids/w1").read_text()))
    run.run()
    assert run.observer.told == [("w1", first[0], "its process ended by SIGKILL")]


def test_nobody_waits_for_those_who_hold_the_output_of_a_process_that_was_killed(tmp_path: Path) -> None:
    """They hold it until the coordinator has been told."""
    run = Run(tmp_path, "holds_its_output.py")
    status = run.run()
    assert status is not None and status.state == "SUCCEEDED"
    assert [member for member, _, _ in run.observer.told] == ["w1"]


def test_a_coordinator_that_is_away_is_told_later_and_the_process_started_again_before(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path, "waits_to_be_told.py")
    pids: set[int] = set()

    def away() -> bool:
        pids.add(int((run.folder / "pids/w1").read_text()))
        return len(pids) < 2

    run.observer.away = away
    status = run.run()
    assert status is not None and status.state == "SUCCEEDED"
    assert [member for member, _, _ in run.observer.told] == ["w1"]


def test_a_script_that_fails_is_not_started_again(tmp_path: Path) -> None:
    run = Run(tmp_path, "fails.py")
    run.run()
    assert "again" not in run.said


def test_ctrl_c_while_a_coordinator_is_started_again_ends_everything(tmp_path: Path) -> None:
    run = Run(tmp_path, "dies.py", coordinator_restarts=9)

    def interrupt_twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    run.screen.on["(3 of 9)"] = interrupt_twice
    assert run.run() is None
    assert run.local is not None and run.local.killed
    assert nothing_is_left(run.folder)


def test_the_first_ctrl_c_drains(tmp_path: Path) -> None:
    run = Run(tmp_path, "long.py")
    run.screen.on["running"] = lambda: os.kill(os.getpid(), signal.SIGINT)
    status = run.run()
    assert run.observer.drains == ["SIGINT at zml run"]
    assert status is not None and status.state == "SUCCEEDED"
    assert "press Ctrl-C again to stop now" in run.said
    assert run.lines[-1] == "w0 saved"
    assert run.local is not None and run.local.interrupted_by == signal.SIGINT
    assert nothing_is_left(run.folder)


def test_the_second_ctrl_c_kills(tmp_path: Path) -> None:
    run = Run(tmp_path, "stubborn.py")
    run.screen.on["running"] = lambda: os.kill(os.getpid(), signal.SIGINT)
    run.screen.on["press Ctrl-C again"] = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert run.run() is None
    assert run.local is not None and run.local.killed == "SIGINT, again"
    assert run.observer.dead == [False], "it is killed only after that"
    assert nothing_is_left(run.folder)


def test_sigterm_drains_too_and_a_drain_has_an_end(tmp_path: Path) -> None:
    run = Run(tmp_path, "stubborn.py", drain_s=0.3)
    run.screen.on["running"] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert run.run() is None
    assert run.observer.drains == ["SIGTERM at zml run"]
    assert run.local is not None and run.local.interrupted_by == signal.SIGTERM
    assert "the drain is not over after 0.3 s" in run.said
    assert nothing_is_left(run.folder)


def test_ctrl_c_before_the_job_has_begun_stops_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path, "late.py")
    run.screen.on["1 of 2 workers and 1 of 1 shard here"] = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert run.run() is None
    assert run.observer.drains == []
    assert run.local is not None and run.local.killed == "SIGINT, before the job had begun"
    assert nothing_is_left(run.folder)


def test_a_member_that_does_not_end_after_the_job_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "GOODBYE_S", 0.3)
    run = Run(tmp_path, "lingers.py")
    status = run.run()
    assert status is not None and status.state == "SUCCEEDED"
    assert "killing w0: still there 0.3 s after the job" in run.said
    assert nothing_is_left(run.folder)


LAUNCH = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_local
run = test_local.Run(Path({folder!r}), "forever.py")
print(run.folder, flush=True)
run.screen.on["running"] = lambda: print("running", flush=True)
run.run()
"""


def test_a_launcher_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    """Not even scripts, which are children of children: the kernel ends each with its parent."""
    program = LAUNCH.format(tests=str(FAKE.parent), folder=str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(Path(local.__file__).resolve().parents[2])}
    launcher = subprocess.Popen(
        [sys.executable, "-P", "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        process_group=0,
    )
    assert launcher.stdout is not None
    folder = Path(launcher.stdout.readline().strip())
    assert launcher.stdout.readline() == "running\n"
    pids = {path.name for path in folder.glob("pids/*")}
    assert {"coordinator", "p0", "w0", "w1"} <= pids
    launcher.kill()
    launcher.wait(timeout=20)
    launcher.stdout.close()
    assert nothing_is_left(folder)


def test_long_lines_come_in_pieces_and_nothing_is_lost() -> None:
    async def main() -> list[str]:
        stream = asyncio.StreamReader()
        for piece in (b"one\ntw", b"o\r\n", b"x" * 200_000, b"\n", b"\xff\xfe\n", b"end"):
            stream.feed_data(piece)
        stream.feed_eof()
        return [line async for line in child.lines_of(stream)]

    lines = asyncio.run(main())
    assert lines[:2] == ["one", "two"]
    assert "".join(lines[2:-2]) == "x" * 200_000
    assert max(map(len, lines)) <= 2 * child.LINE_BYTES
    assert lines[-2:] == ["\ufffd\ufffd", "end"]


def test_a_run_directory_is_not_used_twice(tmp_path: Path) -> None:
    resolved = config.resolve({"run_dir": str(tmp_path / "here")}, {})
    rundir.create(resolved, "train.py", [])
    with pytest.raises(ZmlError, match="already holds a run"):
        rundir.create(resolved, "train.py", [])


@pytest.mark.parametrize("cpu", [True, False])
def test_a_run_that_is_resumed_uses_no_gpu_if_the_first_one_was_to_use_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: bool
) -> None:
    folder = rundir.create(
        config.resolve({"run_dir": str(tmp_path / "first")}, {}), "train.py", ["--lr", "1"], cpu=cpu
    )
    (folder / rundir.CHECKPOINTS).mkdir()
    manifest = SimpleNamespace(step=9, epoch=1, because="every minute")
    found = SimpleNamespace(path=folder / rundir.CHECKPOINTS / "step-00000001", manifest=manifest)
    monkeypatch.setattr(resume, "load_from", lambda place, skip: found)
    again = resume.again(folder, {}, {}, print)
    assert again.words == "at step 9, in epoch 2 (checkpoint taken every minute)"
    assert (again.script, again.args, again.cpu) == ("train.py", ["--lr", "1"], cpu)


def test_run_directories_are_named_by_time_and_script() -> None:
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d-my-train-[0-9a-f]{4}", rundir.new_name("a/my train.py", 1.7e9)
    )
    assert rundir.new_name("train.py", 1.7e9) != rundir.new_name("train.py", 1.7e9)


def test_sockets_lie_where_only_this_user_comes_and_where_a_path_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = tmp_path / ("x" * 100)
    far.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(far))
    folder = local.private_folder()
    try:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(os.fsencode(folder / "coordinator")) < 107
    finally:
        folder.rmdir()
