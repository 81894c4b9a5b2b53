"""`zml top` on a real terminal, and where its looks come from when coordinators come and go."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console
from rich.text import Text

from tests.zml.watched import job
from zml import observe
from zml.cluster.jobs import AttemptView, JobView, NodeView
from zml.config import resolve
from zml.errors import UNREACHABLE, USAGE, ZmlError
from zml.runs import history, rundir
from zml.status import JobStatus, encode
from zml.top.known import Seen
from zml.top.source import AWAY, Cluster, Lookout, Run
from zml.top.terminal import WATCHED, Terminal

PATIENCE_S = 30.0
SETTINGS = resolve({}, {}, "/dev/null").settings
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that is going on, and whose coordinator is nowhere."""
    folder = tmp_path / "2026-run"
    folder.mkdir()
    (folder / rundir.CONFIG).write_text("{}")
    members = history.Rows(folder / history.MEMBERS, history.MemberRow, 100)
    for second in (50.0, 60.0):
        members.add(history.member_row(job(second, 30)))
    (folder / rundir.NOW).write_bytes(encode(job(60.0, 30)))
    return folder


# -- a terminal ----------------------------------------------------------------------------------------------


class Tty:
    """The other end of a terminal: what was written to it, and keys for it."""

    def __init__(self) -> None:
        self.ours, self.theirs = pty.openpty()
        self.said = ""
        self.resize(80, 24)
        self.before = termios.tcgetattr(self.theirs)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def until(self, there: Callable[[str], bool]) -> str:
        """What was said since the last time."""
        end = time.monotonic() + PATIENCE_S
        while not there(self.said):
            ready, _, _ = select.select([self.ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"it did not come: {self.said[-3000:]!r}"
            with contextlib.suppress(OSError):
                self.said += os.read(self.ours, 65536).decode("utf-8", "replace")
        said, self.said = self.said, ""
        return said

    def press(self, keys: str) -> None:
        os.write(self.ours, keys.encode())


@pytest.fixture
def tty() -> Iterator[Tty]:
    made = Tty()
    yield made
    os.close(made.ours)
    os.close(made.theirs)


@pytest.fixture
def top(tty: Tty, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"}
    for name in ("COLUMNS", "LINES", "LC_ALL", "NO_COLOR"):
        environment.pop(name, None)
    ours = subprocess.Popen(
        [sys.executable, "-m", "zml", "top", str(folder), "--interval", "0.1"],
        stdin=tty.theirs,
        stdout=tty.theirs,
        stderr=tty.theirs,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    yield ours
    ours.kill()
    ours.wait()


def as_it_was(tty: Tty, said: str) -> None:
    end = time.monotonic() + 10.0  # the screen is left first, a moment before the terminal is as it was
    while termios.tcgetattr(tty.theirs) != tty.before and time.monotonic() < end:
        time.sleep(0.01)
    assert termios.tcgetattr(tty.theirs) == tty.before
    assert "\x1b[?25h" in said, "the cursor"
    assert "\x1b[?1049l" in said, "the screen that was there before"


def test_a_person_looks_around_and_leaves(tty: Tty, top: subprocess.Popen[bytes]) -> None:
    assert "coordinator away" in tty.until(lambda said: "1 Overview" in said and " pause" in said)
    tty.press("2")
    tty.until(lambda said: "where it goes" in said)
    tty.press("G")
    tty.until(lambda said: "w29" in said)
    tty.resize(200, 60)
    tty.until(lambda said: "device" in said and "memory" in said)
    tty.press("?")
    tty.until(lambda said: "watching a job" in said)
    tty.press("q")
    as_it_was(tty, tty.until(lambda said: "\x1b[?1049l" in said))
    assert top.wait(PATIENCE_S) == 0


def test_a_signal_leaves_the_terminal_as_it_was(tty: Tty, top: subprocess.Popen[bytes]) -> None:
    tty.until(lambda said: "1 Overview" in said)
    top.send_signal(signal.SIGTERM)
    as_it_was(tty, tty.until(lambda said: "\x1b[?1049l" in said))
    assert top.wait(PATIENCE_S) == 128 + signal.SIGTERM


@pytest.fixture
def at_terminal(tty: Tty, monkeypatch: pytest.MonkeyPatch) -> Iterator[Console]:
    """This process on the terminal."""
    with (
        open(tty.theirs, closefd=False) as keys,
        open(tty.theirs, "w", closefd=False) as screen,
        monkeypatch.context() as patch,
    ):
        patch.setattr(sys, "stdin", keys)
        patch.setattr(sys, "stdout", screen)
        yield Console(file=screen, force_terminal=True, _environ={})


def test_whatever_is_raised_the_terminal_is_given_back(tty: Tty, at_terminal: Console) -> None:
    handlers = [signal.getsignal(number) for number in WATCHED]
    with pytest.raises(ZeroDivisionError), Terminal(at_terminal) as terminal:
        terminal.draw([Text("here")], 80, 24)
        assert termios.tcgetattr(tty.theirs)[3] & (termios.ICANON | termios.ECHO) == 0
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in WATCHED] == handlers
    as_it_was(tty, tty.until(lambda said: "\x1b[?1049l" in said))


def test_keys_signals_and_news_wake_it(tty: Tty, at_terminal: Console) -> None:
    with Terminal(at_terminal) as terminal:
        assert terminal.wait(0.0) == ([], 0)
        tty.press("j\x1b[B\x1b")
        assert terminal.wait(PATIENCE_S) == (["j", "down", "esc"], 0)
        terminal.wake()
        assert terminal.wait(PATIENCE_S) == ([], 0)
        os.kill(os.getpid(), signal.SIGWINCH)
        assert terminal.wait(PATIENCE_S) == ([], 0)
        os.kill(os.getpid(), signal.SIGCONT)  # somebody had stopped us
        assert terminal.wait(PATIENCE_S) == ([], 0)
        assert termios.tcgetattr(tty.theirs)[3] & termios.ICANON == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert terminal.wait(PATIENCE_S) == ([], signal.SIGINT)


# -- where looks come from -----------------------------------------------------------------------------------


class Coordinators:
    """What answers at which address; addresses that are missing do not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: dict[str, JobStatus] = {}
        self.open: list[str] = []
        monkeypatch.setattr(observe, "connect", self.connect)
        monkeypatch.setattr(observe, "status", self.status)

    async def connect(self, settings: Any, timeout_s: float) -> Any:
        (address,) = settings.coordinator
        if address not in self.at:
            raise ZmlError(UNREACHABLE, f"no coordinator answers at {address}")
        self.open.append(address)
        hall = self

        class Connection:
            where = address

            async def close(self) -> None:
                hall.open.remove(address)

        return Connection()

    async def status(self, endpoint: Any, name: str = "") -> JobStatus:
        if endpoint.where not in self.at:
            raise ZmlError(UNREACHABLE, "the coordinator does not answer")
        return self.at[endpoint.where]


@pytest.fixture
def coordinators(monkeypatch: pytest.MonkeyPatch) -> Coordinators:
    return Coordinators(monkeypatch)


def listens(folder: Path, address: str) -> None:
    here = rundir.Listening([address], 1, "job")
    rundir.write(folder / rundir.COORDINATOR, msgspec.json.encode(here))


def test_it_asks_falls_back_to_files_and_goes_on_by_itself(folder: Path, coordinators: Coordinators) -> None:
    async def looks() -> list[Seen]:
        run, seen = Run(SETTINGS, folder), []
        seen.append(await run.look())  # nobody listens yet
        listens(folder, "tcp://one:1")
        coordinators.at = {"tcp://one:1": job(70.0)}
        seen.append(await run.look())
        coordinators.at = {}
        seen.append(await run.look())
        listens(folder, "tcp://two:2")  # it was started again, elsewhere
        coordinators.at = {"tcp://two:2": job(80.0)}
        seen.append(await run.look())
        (folder / rundir.STATUS).write_bytes(encode(job(90.0, state="SUCCEEDED")))
        seen.append(await run.look())
        assert coordinators.open == []
        await run.close()
        return seen

    seen = asyncio.run(looks())
    assert [each.trouble for each in seen] == [AWAY, "", AWAY, "", ""]
    assert [each.status.steps for each in seen if each.status] == [300, 350, 300, 400, 450]
    assert seen[1].place == "coordinator at tcp://one:1" and seen[3].place == "coordinator at tcp://two:2"
    assert seen[0].past is not None and len(seen[0].past.members) == 2 and seen[1].past is None


def test_without_files_it_says_who_does_not_answer(coordinators: Coordinators) -> None:
    settings = resolve({"coordinator": ("tcp://gone:1",)}, {}, "/dev/null").settings
    seen = asyncio.run(Run(settings, None).look())
    assert (seen.status, seen.trouble) == (None, "no coordinator answers at tcp://gone:1")


class Fake:
    """A cluster's API with one job, whose run directory is here."""

    server = "http://cluster"

    def __init__(self, folder: Path) -> None:
        begun = [AttemptView(number=1, run_dir=str(folder), began_at=0.0)]
        self.view = JobView(
            id="j1", name="j", user="u", state="RUNNING", why="", because="", submitted_at=0.0, attempts=begun
        )

    def jobs(self) -> list[JobView]:
        over = msgspec.structs.replace(self.view, id="j0", state="FAILED")
        return [over, self.view]

    def nodes(self) -> list[NodeView]:
        return []

    def job(self, name: str) -> JobView:
        if name != "j1":
            raise ZmlError(USAGE, f"there is no job {name}")
        return self.view

    def close(self) -> None:
        return


def next_look(lookout: Lookout, wanted: Callable[[Seen], bool]) -> Seen:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        seen = lookout.take(1.0)
        if seen is not None and wanted(seen):
            return seen
    raise AssertionError("it did not come")


def test_of_a_cluster_one_job_can_be_entered_and_left(folder: Path, coordinators: Coordinators) -> None:
    client: Any = Fake(folder)
    lookout = Lookout(Cluster(client, SETTINGS), 0.05, lambda: None)
    lookout.start()
    try:
        first = next_look(lookout, lambda seen: True)
        assert [each.id for each in first.jobs or ()] == ["j1"], "what is over is not shown"
        lookout.watch("j1")
        seen = next_look(lookout, lambda seen: seen.inside == "j1")
        assert seen.status is not None and seen.status.steps == 300 and seen.trouble == AWAY
        lookout.watch("j7")
        assert next_look(lookout, lambda seen: seen.inside == "j7").trouble == "there is no job j7"
        lookout.watch("")
        assert next_look(lookout, lambda seen: seen.jobs is not None).inside == ""
    finally:
        lookout.stop()
    assert not lookout.thread.is_alive()


def test_a_look_that_nobody_took_gives_way_to_the_next() -> None:
    class Counting:
        count = 0

        async def look(self) -> Seen:
            self.count += 1
            return Seen(at=float(self.count))

        async def close(self) -> None:
            return

    source, woken = Counting(), []
    lookout = Lookout(source, 0.01, lambda: woken.append(source.count))
    lookout.start()
    end = time.monotonic() + PATIENCE_S
    while len(woken) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    lookout.stop()
    seen = lookout.take()
    assert seen is not None and seen.at == source.count >= 5 and lookout.take() is None
