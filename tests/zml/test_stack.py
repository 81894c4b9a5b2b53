"""Where a process stands: seen from outside or told by itself, and never at its cost."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.zml.test_examine import SEED
from zml import proc, stack
from zml.stack import Frame, Stack, Thread
from zml.text.stack_view import ending, shown

ROOT = Path(__file__).parent.parent.parent
HANGS = """
import sys, threading
from pathlib import Path

def waits(depth, event):
    if depth:
        return waits(depth - 1, event)
    event.wait(600)

event = threading.Event()
threading.Thread(target=waits, args=(1, event), name="loader", daemon=True).start()
if len(sys.argv) > 1:
    from zml.stack import answer_signal
    answer_signal(Path(sys.argv[1]), "w0")
print("here", flush=True)
waits(2, event)
"""


class Hanging:
    """A process that hangs; `logs`: it answers the signal there."""

    def __init__(self, folder: Path, answers: bool) -> None:
        self.folder = folder
        script = folder / "hangs.py"
        script.write_text(HANGS)
        logs = folder / "logs"
        logs.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, str(script), *([str(logs)] if answers else [])],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "here\n"

    def wait_for_waiting(self) -> None:
        """It says that it is there a moment before it hangs."""
        for _ in range(500):
            if proc.status_of(self.process.pid).get("State", "").startswith("S"):
                return
            time.sleep(0.01)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hanging]:
    process = Hanging(tmp_path_factory.mktemp("hangs"), True)
    process.wait_for_waiting()
    yield process
    process.end()


CHILD = """
import multiprocessing, time

def fetch():
    print("here", flush=True)
    time.sleep(600)

multiprocessing.get_context("fork").Process(target=fetch, daemon=True).start()
time.sleep(600)
"""


def test_what_it_has_started_is_looked_at_too(tmp_path: Path) -> None:
    program = stack.find_spy()
    if program is None:
        pytest.skip("py-spy is not installed")
    script = tmp_path / "loader.py"
    script.write_text(CHILD)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "here\n"
    found = stack.of("w0", parent.pid, None, lambda: program)
    (child,) = proc.children(parent.pid)
    parent.kill()  # the child's parent is gone, and it is killed below
    os.kill(child, signal.SIGKILL)
    parent.communicate()
    if found.how != "py-spy":
        pytest.skip(found.note)
    below = [each for each in found.threads if each.name.startswith(f"process {child}, ")]
    assert [frame.function for frame in below[0].frames if frame.own] == ["fetch", "<module>"]
    assert not any(each.main for each in below)


def look(process: Hanging, spy: str | None) -> Stack:
    there = stack.recorded(process.folder, "w0")
    return stack.of("w0", process.process.pid, there, lambda: spy)


@pytest.mark.parametrize("spy", [None, "py-spy"])
def test_a_process_that_hangs_is_seen_in_its_own_line_and_goes_on(hanging: Hanging, spy: str | None) -> None:
    program = stack.find_spy() if spy else None
    if spy and program is None:
        pytest.skip("py-spy is not installed")
    found = look(hanging, program)
    if spy and found.how != "py-spy":
        pytest.skip(found.note)
    assert (found.how, found.state, found.trouble) == (spy or "signal", "waiting", "")
    assert found.own is not None
    thread, frame = found.own
    assert (thread.main, frame.function, Path(frame.file).name, frame.line) == (True, "waits", "hangs.py", 8)
    assert [each.function for each in thread.frames if each.own] == ["waits", "waits", "waits", "<module>"]
    others = [each for each in found.threads if not each.main]
    assert len(others) == 1 and [f.function for f in others[0].frames if f.own] == ["waits", "waits"]
    assert hanging.process.poll() is None


def test_twice_is_as_good_as_once(hanging: Hanging) -> None:
    one, two = look(hanging, None), look(hanging, None)
    assert one.threads == two.threads and hanging.process.poll() is None


def test_who_does_not_answer_the_signal_is_never_sent_it(tmp_path: Path, hanging: Hanging) -> None:
    process = Hanging(tmp_path, False)
    try:
        assert not proc.catches(process.process.pid, stack.SIGNAL)
        without = stack.of("w0", process.process.pid, None, lambda: None)
        # Nor with the record of another process, of which it has taken the place.
        other = stack.recorded(hanging.folder, "w0")
        assert other is not None
        with_another = stack.of("w0", process.process.pid, other, lambda: None)
        forged = (other[0], stack.Record("w0", process.process.pid, other[1].node, other[1].began))
        with_forged = stack.of("w0", process.process.pid, forged, lambda: None)
        begun = stack.Record("w0", process.process.pid, socket.gethostname(), proc.began(process.process.pid))
        deaf = stack.of("w0", process.process.pid, (tmp_path / "w0.stack", begun), lambda: None)
        assert [found.trouble for found in (without, with_another, with_forged)] == [
            "it has not said that it answers the signal"
        ] * 3
        assert deaf.trouble.startswith("it does not answer the signal any more")
        assert "zml-train[debug]" in without.note
        assert process.process.poll() is None
    finally:
        process.end()


def test_a_process_that_is_stopped_says_so_and_one_that_has_ended_too(tmp_path: Path) -> None:
    process = Hanging(tmp_path, True)
    os.kill(process.process.pid, signal.SIGSTOP)
    for _ in range(500):
        if proc.status_of(process.process.pid)["State"].startswith("T"):
            break
        time.sleep(0.01)
    found = look(process, None)
    assert found.state.startswith("stopped by a signal")
    assert found.trouble == "it is stopped and can write nothing"
    os.kill(process.process.pid, signal.SIGCONT)
    process.end()
    gone = look(process, None)
    assert gone.trouble == f"process {process.process.pid} has ended"
    there = stack.recorded(tmp_path, "w0")
    assert there is not None and not stack.lives(there[1])


def test_a_py_spy_that_may_not_trace_is_told_with_what_to_do(tmp_path: Path, hanging: Hanging) -> None:
    fake = tmp_path / "py-spy"
    for said, note in (
        ("Error: Permission Denied: Try running again with elevated permissions", "--cap-add SYS_PTRACE"),
        ("Error: Failed to find python version from target process", "py-spy: Failed to find python version"),
    ):
        fake.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
        fake.chmod(0o755)
        found = look(hanging, str(fake))
        assert found.how == "signal" and note in found.note and found.threads
    fake.write_text("#!/bin/sh\necho '[{]'\n")
    assert look(hanging, str(fake)).note == "py-spy says what cannot be read"


DUMP = """Thread 0x00007f0001 [loader] (most recent call first):
  File "/data/fetch.py", line 3 in get
Current thread 0x00007f0002 (most recent call first):
  File "/usr/x.py", line ??? in odd
  File "/home/a b/train "x".py", line 7 in <module>
Current thread 0x00007f0002 (most recent call first):
  File "/again.py", line 1 in <module>
"""


def test_faulthandlers_words_are_read() -> None:
    threads = stack.read_faulthandler(DUMP)
    assert [(each.name, each.main) for each in threads] == [("MainThread", True), ("loader", False)]
    assert [(f.function, f.file, f.line) for f in threads[0].frames] == [
        ("odd", "/usr/x.py", 0),
        ("<module>", '/home/a b/train "x".py', 7),
    ]
    assert stack.read_faulthandler("") == [] == stack.read_faulthandler("Segmentation fault\n  File")
    unknown = stack.read_faulthandler('Thread 0x1 (most recent call first):\n  File "a.py", line 1 in f\n')
    assert unknown == [Thread("MainThread", [Frame("f", "a.py", 1, True)], True)]


@given(st.text(alphabet='ThreadCun 0x1f(mosclt):\n  File"a.py",li?in', max_size=200) | st.text(max_size=200))
def test_words_that_mean_nothing_are_read_as_no_thread_and_never_break(text: str) -> None:
    threads = stack.read_faulthandler(text)
    assert len([each for each in threads if each.main]) == (1 if threads else 0)
    with suppress(ValueError, KeyError, TypeError):
        stack.read_spy(text, 1)


@pytest.mark.parametrize("said", ["[]", "[1]", '[{"frames": 3}]', '{"a": 1}', "[null]", "7", ""])
def test_a_py_spy_that_says_something_else_is_told_of(said: str, tmp_path: Path) -> None:
    fake = tmp_path / "py-spy"
    fake.write_text(f"#!/bin/sh\necho '{said}'\n")
    fake.chmod(0o755)
    threads, because = stack.by_spy(str(fake), 1)
    assert threads == [] and because in ("py-spy finds no threads", "py-spy says what cannot be read")


def test_a_stack_is_told_with_the_users_line_first() -> None:
    zml = str(Path(stack.__file__).parent / "hooks.py")
    main = Thread(
        "MainThread",
        [
            Frame("wait", "/usr/lib/python3/site-packages/torch/a.py", 5),
            Frame("step", "/nowhere/train.py", 41, True),
            Frame("main", zml, 1),
        ],
        True,
        False,
    )
    ours = Thread("zml-w0", [Frame("run", zml, 9)])
    found = Stack(member="w0", node="gpu1", pid=7, state="waiting", how="py-spy", threads=[main, ours])
    assert list(shown(found, 80)) == [
        "w0 on gpu1: process 7, waiting",
        "In your code: /nowhere/train.py:41, in step",
        "",
        "MainThread",
        "  wait  torch/a.py:5",
        "> step  /nowhere/train.py:41",
        "",
        "1 more thread runs none of your code: --all shows them.",
        "Seen by py-spy, from outside. The innermost call is on top.",
    ]
    assert sum("hooks.py" in line for line in shown(found, 80, everything=True)) == 2
    no_own = Stack(member="p0", node="gpu1", pid=8, how="signal", threads=[ours], note="Install it.")
    assert list(shown(no_own, 80))[-1] == "Install it."
    assert any("hooks.py:9" in line for line in shown(no_own, 80))


def test_what_comes_from_another_machine_moves_no_cursor() -> None:
    odd = Frame("f\x1b[2J", "/a\n/b\x07.py", 3, True)
    threads = [Thread("t\r\x1b]0;", [odd], True)]
    found = Stack(member="w0", node="n\x1b[A", pid=1, how="py-spy", threads=threads, note="\x9b2J")
    assert all(line.isprintable() for line in shown(found, 80, everything=True))


def test_a_full_disk_costs_a_process_nothing_but_this(tmp_path: Path) -> None:
    before = stack.own_record()
    stack.answer_signal(tmp_path / "nowhere", f"w{SEED}")
    assert stack.own_record() == before


def test_a_long_path_is_shown_by_its_end() -> None:
    assert ending("/a/b.py:3", 80) == "/a/b.py:3"
    assert ending("/very/long/way/to/train.py:37", 16) == "…/to/train.py:37"
