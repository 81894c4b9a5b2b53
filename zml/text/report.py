"""What a run says at its end: how it went, or, of a failure, the one box that a person needs.

Rules: the first failure by time is the cause, the others "stopped because of" it; the frame is the user's own
with its source; no launcher frame, no local variable.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text

from ..errors import NEVER_JOINED
from ..messages import Failure
from ..status import JobStatus, MemberFailure, since_the_first
from .ansi import printable
from .console import HERE, WIDEST, counted, duration, names, near, number

VERBS = {
    "SUCCEEDED": "finished",
    "FAILED": "failed",
    "CANCELLED": "was stopped",
    "CUT OFF": "was cut off",
}
STOPPED = HERE | {"stopped"}  # the status may have been taken just before the others were told


def cause(failures: Sequence[MemberFailure]) -> MemberFailure | None:
    """The first failure by time. A killed worker costs only itself: it is the cause where nothing else is."""
    raised = [each for each in failures if not each.failure.kind.startswith("SIG")]
    return min(raised or failures, key=lambda each: each.failure.at, default=None)


def title(member: str, failure: Failure) -> str:
    step = f" at step {failure.step}" if failure.step >= 0 else ""
    if failure.kind.startswith("SIG"):
        return f"{member} was killed by {failure.kind}{step}"
    if failure.kind.startswith("exit code"):
        return f"{member} ended with {failure.kind}{step}"
    return f"{member} failed{step or ' before its first step'}"


def what_happened(failure: Failure) -> Text:
    """The exception as python words it, or the last line printed by a script that could not say why."""
    lines = [printable(line) for line in failure.text.strip().splitlines()] or [""]
    if failure.kind.startswith(("SIG", "exit code")):
        # After a crash in native code the stack is in the log; what python says last about it helps nobody.
        said = " / ".join(
            line for line in lines if line.strip() and not line.startswith("Extension modules:")
        )
        return Text(f"it last printed: {said}" if said else "it said nothing")
    if failure.kind == "ZmlError" or failure.kind.startswith("ZML-"):
        return Text("\n".join(lines), style="bold")
    first = f"{failure.kind}: {lines[0]}" if lines[0] else failure.kind
    return Text("\n".join([first, *lines[1:]]), style="bold")


def source(failure: Failure) -> Text:
    """The user's frame: file, line and the lines around it, the one that failed marked."""
    text = Text()
    text.append(f"{printable(near(failure.file))}, line {failure.line}", style="cyan")
    for number_, line in enumerate(failure.source, start=failure.first_source_line):
        mark, style = (">", "bold") if number_ == failure.line else (" ", "dim")
        text.append(f"\n{mark} {number_:>4}  {printable(line.expandtabs(4))}", style=style)
    return text


def failure_box(status: JobStatus, width: int) -> Panel | None:
    """The box about the cause, None where no script failed."""
    first = cause(status.failures)
    if first is None:
        return None
    text = Text.assemble(what_happened(first.failure))
    if first.failure.file and first.failure.line:
        text.append("\n\n")
        text.append(source(first.failure))
    if first.failure.batch:
        text.append(f"\n\nin hand: {printable(first.failure.batch)}")
    others = [m.member for m in status.of("worker") if m.member != first.member and m.state in STOPPED]
    if others:
        text.append(f"\n\n{names(others)} stopped because of {first.member}")
    if first.failure.log:
        text.append(f"\n\nlog: {printable(near(first.failure.log))}", style="dim")
    return Panel(
        Padding(text, (0, 1)),
        title=title(first.member, first.failure),
        title_align="left",
        border_style="red",
        width=width,
    )


def apart_box(status: JobStatus, width: int) -> Panel | None:
    """The warning that workers did the same, each for itself; None where they trained together, or did not end."""
    if not status.apart:
        return None
    did = (
        "it ran as it does without zml"
        if status.workers == 1
        else f"all {status.workers} workers did the same"
    )
    text = f"Nothing was trained together: {did}.\n`zml explain {NEVER_JOINED}` says what to do."
    return Panel(
        Padding(Text(text), (0, 1)),
        title=f"no script called zml.join [{NEVER_JOINED}]",
        title_align="left",
        border_style="yellow",
        width=width,
    )


def place(status: JobStatus) -> str:
    """How far a job had come that did not get to its end: "at step 120, in epoch 3 of 200"; empty where nowhere."""
    parts = [f"at step {status.steps:,}"] if status.steps else []
    if status.epochs:
        parts.append(f"in epoch {min(status.epoch + 1, status.epochs)} of {status.epochs}")
    return ", ".join(parts)


def summary(status: JobStatus) -> list[str]:
    """How the job went, in lines."""
    name = status.script.rpartition("/")[2] or status.job
    took = duration(status.at - status.started_at)
    verb = VERBS.get(status.state, "ended")
    if status.state == "CANCELLED" and status.because.startswith("SIGINT"):
        verb += " by Ctrl-C"
    done = [counted(status.samples, "sample")] if status.samples else []
    if status.epochs and status.state == "SUCCEEDED":
        done.insert(0, counted(status.epochs, "epoch"))
    elif status.state != "SUCCEEDED" and (where := place(status)):
        done.insert(0, where)
    done += [f"{key} {number(value)}" for key, value in status.values.items()]
    lines = [f"{name} {verb} after {took}" + (f": {', '.join(done)}" if done else "")]
    if status.because:
        lines.append(status.because)
    for member in status.members:
        if member.state in ("lost", "fenced"):
            at = f" at step {member.steps}" if member.steps >= 0 else ""
            if f"{member.member} was lost: {member.because}" not in status.because:
                lines.append(
                    f"{member.member} was lost{at}" + (f": {member.because}" if member.because else "")
                )
    return [printable(line) for line in lines]


def saved(status: JobStatus) -> list[str]:
    """Of a run that did not get to its end: what there is to go on from, and how; nothing where there is nothing."""
    if status.state == "SUCCEEDED" or not status.checkpoint.path or not status.run_dir:
        return []
    newest = status.checkpoint
    return [
        printable(f"newest checkpoint: step {newest.step:,}, {near(newest.path)}"),
        printable(f"to go on from it: zml resume {name_of(status.run_dir)}"),
    ]


def name_of(run_dir: str) -> str:
    """What commands find a run by from here: the end of its name, where it lies in ./runs; elsewhere its path."""
    folder = Path(near(run_dir))
    if str(folder.parent) == "runs" and (named := re.fullmatch(r"[\dT-]{20}(.*-[0-9a-f]{4})", folder.name)):
        return named[1]
    return str(folder)


def print_report(status: JobStatus, console: Console, *, resumable: bool = True) -> None:
    """The end of a run, to people. Without `resumable` somebody else lets it go on, or nobody can."""
    status = since_the_first(status)
    width = min(console.width, WIDEST)
    box = failure_box(status, width) if status.state == "FAILED" else apart_box(status, width)
    if box is not None:
        console.print(box)
    for line in summary(status):
        console.print(Text(line), soft_wrap=not console.is_terminal)  # a file has no width
    whole = saved(status) if resumable else []
    if status.run_dir:
        whole.append(f"run directory: {status.run_dir}")
    for line in whole:  # to be copied
        console.print(Text(line), soft_wrap=True)
