"""A stack for people: first the line of the user's own code, then the calls of each thread, the innermost first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ..stack import Frame, Stack, Thread
from .ansi import printable


def shown(
    stack: Stack, width: int, *, everything: bool = False, bold: Callable[[str], str] = lambda text: text
) -> Iterator[str]:
    """The main thread, and those that run the user's code; all with `everything`."""
    state = f", {stack.state}" if stack.state else ""
    yield printable(f"{stack.member} on {stack.node}: process {stack.pid}{state}")
    own = stack.own
    if own is not None:
        thread, frame = own
        where = "" if thread.main else f", in {thread.name}"
        told = f"In your code: {near(frame.file)}:{frame.line}, in {frame.function}{where}"
        yield bold(printable(told))
        if line := source_line(frame):
            yield f"    {line}"
    everything = everything or own is None  # a shard, say: there all is zml's
    chosen = [each for each in stack.threads if everything or each.main or runs_own(each)]
    for thread in chosen:
        yield ""
        yield from thread_lines(thread, width, bold, everything=everything)
    yield ""
    if hidden := len(stack.threads) - len(chosen):
        yield f"{hidden} more thread{'s run' if hidden > 1 else ' runs'} none of your code: --all shows them."
    how = "py-spy, from outside" if stack.how == "py-spy" else "the process itself, as asked by a signal"
    yield f"Seen by {how}. The innermost call is on top."
    if stack.note:
        yield printable(stack.note)


def runs_own(thread: Thread) -> bool:
    return any(frame.own for frame in thread.frames)


def thread_lines(
    thread: Thread, width: int, bold: Callable[[str], str], *, everything: bool
) -> Iterator[str]:
    """But for what has started the user's code, with which nobody can help."""
    frames = thread.frames
    if not everything and runs_own(thread):
        frames = frames[: max(at for at, frame in enumerate(frames, 1) if frame.own)]
    state = {True: ", busy", False: "", None: ""}[thread.busy]
    yield printable(f"{thread.name}{state}")
    most = max((len(frame.function) for frame in frames), default=0)
    column = min(most, max(width // 3, 12))
    for frame in frames:
        mark = ">" if frame.own else " "
        head = f"{mark} {frame.function[:width]:<{column}}  "
        text = printable(head + ending(f"{near(frame.file)}:{frame.line}", max(12, width - len(head))))
        yield bold(text) if frame.own else text


def ending(path: str, room: int) -> str:
    """The end of a path says more than its beginning."""
    return path if len(path) <= room else f"…{path[len(path) - room + 1 :]}"


def near(path: str) -> str:
    """Files of packages by their place in them, others as a person in the working folder would write them."""
    for mark in ("/site-packages/", "/dist-packages/"):
        if mark in path:
            return path.partition(mark)[2]
    here = Path.cwd()
    return os.path.relpath(path, here) if Path(path).is_relative_to(here) else path


def source_line(frame: Frame) -> str:
    """The line itself, where the file is on this machine; it may have been changed since."""
    import linecache

    text = linecache.getline(frame.file, frame.line).strip()
    return printable(text)
