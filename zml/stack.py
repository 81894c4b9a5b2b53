"""Where a process stands: which line each of its threads is in, without stopping or disturbing it.

Two ways. py-spy reads the memory of the process from outside and does not pause it; it needs the right to trace, which
containers and ptrace_scope often withhold. Else a signal: scripts, shards and coordinators of zml have faulthandler
answer SIGNAL with all stacks, into `logs/MEMBER.stack` of the run directory. The handler is C and takes no lock, so a
script that hangs in native code or holds Python's lock for ever answers, too.

Rules: the signal goes to nobody who has not said in that file that it is waited for, for it would kill them; and local
variables are never shown: they may be rows of somebody's data.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from . import own, proc

SIGNAL = signal.SIGRTMAX - 4  # not among those that glibc, debuggers and schedulers use
SPY_S = 8.0  # for py-spy to look at a process, however often
CHILDREN_S = 3.0  # and at all that it has started
ANSWER_S = 3.0  # for faulthandler to write
LOOK_S = 0.02
QUIET_S = 0.1  # that its file has not grown: it has written everything
CHILDREN = 32
THREADS, FRAMES = 256, 100  # shown at most, the outermost frames first to go
INSTALL = "pip install 'zml-train[debug]'"
_kept: list[Any] = []  # files that faulthandler writes to, which must stay open
_own: list[tuple[Path, Record]] = []  # what this process has said, the newest last


class Frame(msgspec.Struct, frozen=True):
    """`own`: in a file that is neither Python's, nor an installed package's, nor zml's."""

    function: str
    file: str
    line: int
    own: bool = False


class Thread(msgspec.Struct, frozen=True):
    """The innermost call comes first. `main`: it is the thread that the process began with."""

    name: str
    frames: list[Frame]
    main: bool = False
    busy: bool | None = None  # it computes now; None: not known


class Stack(msgspec.Struct, frozen=True, kw_only=True):
    """Of one member's process. `trouble`: why there are no threads; `how`: py-spy or signal."""

    member: str
    node: str
    pid: int = 0
    state: str = ""
    how: str = ""
    threads: list[Thread] = []
    note: str = ""  # why the better way was not taken
    trouble: str = ""

    @property
    def own(self) -> tuple[Thread, Frame] | None:
        """The innermost frame of the user's own code, in the main thread if it is in any there."""
        for thread in sorted(self.threads, key=lambda each: not each.main):
            for frame in thread.frames:
                if frame.own:
                    return thread, frame
        return None


class Record(msgspec.Struct, frozen=True):
    """The first line of MEMBER.stack: this process answers the signal. `began` tells it from a later one of its pid."""

    member: str
    pid: int
    node: str
    began: int


# -- in the process itself -----------------------------------------------------------------------------------


def answer_signal(folder: Path, member: str) -> None:
    """From now on the signal makes this process write where it is. Without a file to write to, it does not."""
    pid = os.getpid()
    record = Record(member, pid, socket.gethostname(), proc.began(pid))
    try:
        file = (folder / f"{member}.stack").open("wb", buffering=0)
        file.write(msgspec.json.encode(record) + b"\n")
        faulthandler.register(SIGNAL, file=file, all_threads=True)
    except (OSError, ValueError, AttributeError):  # a full disk, a thread that is not the main one
        return
    _kept.append(file)
    _own.append((Path(file.name), record))


def own_record() -> tuple[Path, Record] | None:
    """What this process has said of itself."""
    return _own[-1] if _own else None


# -- from outside ----------------------------------------------------------------------------------------------


def recorded(run_dir: Path, member: str) -> tuple[Path, Record] | None:
    """Which process said that it is this member, and where it writes."""
    path = run_dir / "logs" / f"{member}.stack"
    try:
        with path.open("rb") as file:
            return path, msgspec.json.decode(file.readline(4096), type=Record)
    except (OSError, msgspec.MsgspecError):
        return None


def lives(record: Record) -> bool:
    """Is that very process still there, on this machine?"""
    return record.node == socket.gethostname() and proc.began(record.pid) == record.began != 0


def of(
    member: str,
    pid: int,
    there: tuple[Path, Record] | None,
    spy: Callable[[], str | None] = lambda: find_spy(),
) -> Stack:
    """Look at a process of this machine. Takes up to a few seconds."""
    node = socket.gethostname()
    letter = proc.status_of(pid).get("State", "?")[:1]
    state = proc.STATES.get(letter, letter)
    if letter in "?ZX":
        return Stack(member=member, node=node, pid=pid, state=state, trouble=f"process {pid} has ended")
    program = spy()
    note = f"py-spy shows names of threads, too: {INSTALL}"
    if program is not None:
        threads, note = by_spy(program, pid)
        if threads:
            threads += of_children(program, pid)
            return Stack(member=member, node=node, pid=pid, state=state, how="py-spy", threads=threads)
    threads, trouble = by_signal(pid, there)
    if threads:
        return Stack(member=member, node=node, pid=pid, state=state, how="signal", threads=threads, note=note)
    return Stack(member=member, node=node, pid=pid, state=state, note=note, trouble=trouble)


def find_spy() -> str | None:
    """Beside our own Python first, else on the PATH."""
    beside = Path(sysconfig.get_path("scripts"), "py-spy")
    return str(beside) if beside.exists() else shutil.which("py-spy")


def by_spy(program: str, pid: int, within_s: float = SPY_S) -> tuple[list[Thread], str]:
    """The threads, or why not."""
    end = time.monotonic() + within_s
    # It may look just while the interpreter changes what it reads: once more, then.
    because = ""
    for _ in range(3):
        if (left_s := end - time.monotonic()) <= 0:
            break
        command = [program, "dump", "--pid", str(pid), "--json", "--nonblocking", "--full-filenames"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=left_s)
        except (OSError, subprocess.SubprocessError) as error:
            return [], f"py-spy: {error}"
        if answer.returncode == 0:
            try:
                if threads := read_spy(answer.stdout, pid):
                    return threads, ""
                because = "py-spy finds no threads"
            except (ValueError, KeyError, TypeError):
                because = "py-spy says what cannot be read"
            continue
        because = why_not(answer.stderr)
        if "right to trace" in because:
            break
    return [], because


def of_children(program: str, pid: int) -> list[Thread]:
    """Threads of the processes that it has started, as a DataLoader's workers: what they wait for it waits for, too."""
    found = []
    end = time.monotonic() + CHILDREN_S
    for child in proc.children(pid)[:CHILDREN]:
        if (left_s := end - time.monotonic()) <= 0:
            break  # whoever asks has a deadline, too, and has the main thing
        letter = proc.status_of(child).get("State", "?")[:1]
        for each in by_spy(program, child, left_s)[0]:  # none where it is not python
            name = f"process {child}, {proc.STATES.get(letter, letter)}: {each.name}"
            found.append(msgspec.structs.replace(each, name=name, main=False))
    return in_order(found)


def why_not(said: str) -> str:
    """py-spy's error in one line."""
    text = said.lower()
    if "permission denied" in text or "operation not permitted" in text or "eperm" in text:
        return (
            "py-spy has not the right to trace: run it as root, in containers with --cap-add SYS_PTRACE, or "
            "`sysctl kernel.yama.ptrace_scope=0`"
        )
    lines = [line for line in said.splitlines() if line.strip()]
    return f"py-spy: {lines[0].removeprefix('Error: ')}" if lines else "py-spy failed"


def read_spy(text: str, pid: int) -> list[Thread]:
    """py-spy's JSON. Raises ValueError, KeyError or TypeError for what is none."""
    found = []
    for each in json.loads(text)[:THREADS]:
        frames = [_frame(f["name"], f["filename"], f["line"]) for f in each["frames"]]
        main = each["os_thread_id"] == pid or each["thread_name"] == "MainThread"
        name = each["thread_name"] or f"thread {each['thread_id']:#x}"
        found.append(Thread(name, frames[:FRAMES], main, each["active"] or each["owns_gil"]))
    return in_order(found)


def by_signal(pid: int, there: tuple[Path, Record] | None) -> tuple[list[Thread], str]:
    """The threads, or why not."""
    if there is None or there[1].pid != pid or not lives(there[1]):
        return [], "it has not said that it answers the signal"
    if proc.status_of(pid).get("State", "?")[:1] in "Tt":
        return [], "it is stopped and can write nothing"  # a signal would only wait for it
    path = there[0]
    if not proc.catches(pid, SIGNAL):
        return [], "it does not answer the signal any more: the script has put its handler out"
    try:
        before = path.stat().st_size
        os.kill(pid, SIGNAL)
    except OSError as error:
        return [], f"it cannot be asked: {error.strerror}"
    try:
        text = _await_growth(path, before)
    except OSError as error:
        return [], f"{path} cannot be read: {error.strerror}"
    threads = read_faulthandler(text)
    return threads, "" if threads else f"it was asked and has written nothing for {ANSWER_S:g} s"


def _await_growth(path: Path, before: int) -> str:
    """What is written behind `before`, once nothing more comes."""
    end = time.monotonic() + ANSWER_S
    size, since = before, time.monotonic()
    while (now := time.monotonic()) < end:
        time.sleep(LOOK_S)
        grown = path.stat().st_size
        if grown != size:
            size, since = grown, now
        elif size > before and now - since > QUIET_S:
            break
    with path.open("rb") as file:
        file.seek(before)
        return file.read().decode(errors="replace")


THREAD_LINE = re.compile(
    r"^(Current thread|Thread) (0x[0-9a-f]+)(?: \[([^\]]*)\])? \(most recent call first\):"
)
FRAME_LINE = re.compile(r'^  File "(.*)", line (\d+|\?\?\?) in (.*)$')


def read_faulthandler(text: str) -> list[Thread]:
    """What faulthandler writes: the newest thread first, so that the main one is the last. Mostly it is that which the
    signal reaches, and is then called the current one."""
    found: list[tuple[str, bool, list[Frame]]] = []
    for line in text.splitlines():
        if head := THREAD_LINE.match(line):
            main = head[1] == "Current thread"
            if main and any(other for _, other, _ in found):
                break  # somebody else has asked, too
            found.append(("MainThread" if main else head[3] or f"thread {head[2]}", main, []))
        elif (frame := FRAME_LINE.match(line)) and found:
            number = int(frame[2]) if frame[2].isdecimal() else 0
            found[-1][2].append(_frame(frame[3], frame[1], number))
    if found and not any(main for _, main, _ in found):
        found[-1] = ("MainThread", True, found[-1][2])
    return in_order([Thread(name, frames[:FRAMES], main) for name, main, frames in found[:THREADS]])


def in_order(threads: Sequence[Thread]) -> list[Thread]:
    """The main thread first, then those in whose stacks the user's code is."""
    return sorted(threads, key=lambda each: (not each.main, not any(frame.own for frame in each.frames)))


def _frame(function: str, file: str, line: int) -> Frame:
    return Frame(function, file, line, own=not any(file.startswith(root) for root in FOREIGN))


def _foreign() -> Iterator[str]:
    yield "<"  # <frozen importlib._bootstrap>, <string>
    for kind in ("stdlib", "platstdlib", "purelib", "platlib"):
        yield sysconfig.get_path(kind) + os.sep
        yield os.path.realpath(sysconfig.get_path(kind)) + os.sep
    yield from own.FOLDERS


FOREIGN = tuple(dict.fromkeys(_foreign()))
