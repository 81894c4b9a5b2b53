"""Which run a person means, and what has become of it.

RUN is a path; or the name of a run below the folder of the runs; or the beginning or the end of one name only, as one
types or pastes it. Of a job of Slurm, whose folder holds a run per attempt, the newest attempt is meant. Without RUN it
is the run that is going on, else the newest. A name that fits none is answered with the nearest.
"""

from __future__ import annotations

import difflib
import re
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from ..errors import USAGE, ZmlError
from ..status import JobStatus
from . import rundir

NOW = "now"  # of a job of Slurm: a link to its newest attempt
PARTS = (  # any of which makes a folder a run's
    rundir.CONFIG,
    rundir.STATUS,
    rundir.COORDINATOR,
    rundir.EVENTS,
    rundir.LOGS,
    rundir.TIMELINE,
    rundir.STATE,
)
CUT_OFF = "CUT OFF"  # as a state of a job
QUIET_S = 60.0  # a run that another machine leads is over when nothing in it has been written for so long
NAMED = 4  # runs that an error names
LIST = "`zml runs` lists the runs."


# -- which one --------------------------------------------------------------------------------------------


def find(run: str | None, runs: Path) -> Path:
    """The run directory. Raises ZmlError."""
    if run is None:
        return default(runs)
    if (found := at(Path(run)) or at(runs / run)) is not None:
        return found
    known = {name(folder, runs): folder for folder in all_runs(runs)}
    fitting = fits(run, known)
    if len(fitting) == 1:
        return known[fitting[0]]
    if fitting:
        more = f" and {len(fitting) - NAMED} more" if len(fitting) > NAMED else ""
        what = f"{run} may be {len(fitting)} runs: {', '.join(fitting[-NAMED:])}{more}"
        raise ZmlError(USAGE, what, "Give more of its name; the end is often enough.")
    if is_folder(Path(run)):
        inside = sum(1 for _ in all_runs(Path(run)))
        held = f"; it holds {inside} of them" if inside else ""
        raise ZmlError(USAGE, f"{run} is no run directory{held}", "Name one run. " + LIST)
    near = nearest(run, known)
    raise ZmlError(USAGE, f"there is no run {run}", f"Did you mean {near}?" if near else LIST)


def default(runs: Path) -> Path:
    """The run that is going on on this machine, else the newest. Raises ZmlError."""
    going_on = running(runs)
    found = going_on[0] if going_on else newest(runs)
    if found is None:
        raise ZmlError(USAGE, f"there is no run below {runs}", "Start one with `zml run`, or name a folder.")
    return found


def running(runs: Path) -> list[Path]:
    """Those below `runs` whose coordinator is alive on this machine, the newest first."""
    found = []
    for folder in all_runs(runs, rundir.COORDINATOR):
        here = rundir.listening(folder)
        if here is None or rundir.last_status(folder) is not None or not rundir.alive(here.pid):
            continue
        if leader(folder) in ("", socket.gethostname()):  # else the pid is another machine's
            found.append(folder)
    return sorted(found, key=age, reverse=True)


def newest(runs: Path) -> Path | None:
    """The one below `runs` that began last."""
    return max(all_runs(runs), default=None, key=age)


def age(folder: Path) -> tuple[float, str]:
    """What runs are sorted by: when one began; of those of one moment, by the name, which has the time too."""
    return began(folder), folder.name


def at(path: Path) -> Path | None:
    """The run directory that a path leads to; None where it leads to none."""
    with suppress(OSError):  # a name that is too long, say
        for folder in (path, path / NOW):
            if any((folder / part).exists() for part in PARTS):
                return folder.resolve() if folder.name == NOW else folder
        if path.is_file() and (path.parent / rundir.CONFIG).is_file():
            return path.parent
        attempts = [inside.parent for inside in path.glob(f"attempt-*/{rundir.CONFIG}")]
        return max(attempts, key=began, default=None)
    return None


def is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long
        return False


def all_runs(runs: Path, having: str = rundir.CONFIG) -> Iterable[Path]:
    """Below a folder, those of Slurm's jobs too: each has this file."""
    for pattern in (f"*/{having}", f"slurm-*/attempt-*/{having}"):
        with suppress(OSError):
            yield from (file.parent for file in runs.glob(pattern) if file.parent.name != NOW)


def name(folder: Path, runs: Path) -> str:
    """What a run is called below the folder of the runs; elsewhere its path."""
    with suppress(ValueError):
        return str(folder.absolute().relative_to(runs.absolute()))
    return str(folder)


def fits(typed: str, known: Iterable[str]) -> list[str]:
    """Names of which it is the beginning or the end; else those in which it stands. The oldest first."""
    names = sorted(known)
    edges = [each for each in names if each.startswith(typed) or each.endswith(typed)]
    return edges or ([each for each in names if typed in each] if len(typed) > 2 else [])


def nearest(typed: str, known: Iterable[str]) -> str:
    """The name that looks most like it, in whole, without its date, or in its end; empty where none does."""
    names = sorted(known)
    short = {re.sub(r"^[\dT-]{20}", "", each): each for each in names}  # of one script the newest
    ends = {each.rpartition("-")[2]: each for each in names}
    for table in ({each: each for each in names}, short, ends):
        if close := difflib.get_close_matches(typed, table, 1, 0.6):
            return table[close[0]]
    return ""


def began(folder: Path) -> float:
    """When it was made: its name says so, which a copy of it keeps; else how old its settings are."""
    with suppress(ValueError, OverflowError):
        return datetime.strptime(folder.name[:19], "%Y-%m-%dT%H-%M-%S").timestamp()
    with suppress(OSError):
        return (folder / rundir.CONFIG).stat().st_mtime
    return 0.0


# -- what has become of it --------------------------------------------------------------------------------


class Found(NamedTuple):
    """`live`: it is going on. `status` is the last that is known, if any; of a run that is over it is how it ended."""

    live: bool
    state: str  # of the job, in small letters; "cut off" where nobody has written down how it ended
    status: JobStatus | None


def look(folder: Path, now: float) -> Found:
    """From what lies in the folder; nobody is asked. `now` is in seconds since the Unix epoch."""
    ended = rundir.last_status(folder)
    if ended is not None:
        return Found(False, ended.state.lower(), ended)
    current = rundir.current_status(folder)
    listening = rundir.listening(folder)
    if listening is None:
        quiet = now - max(began(folder), touched(folder)) > QUIET_S
        return Found(not quiet, "cut off" if quiet else "starting", current)
    if listening.pid and leader(folder) in ("", socket.gethostname()):
        live = rundir.alive(listening.pid)
    else:
        live = now - touched(folder) <= QUIET_S
    state = (current.state.lower() if current is not None else "running") if live else "cut off"
    return Found(live, state, current)


def left(folder: Path) -> JobStatus | None:
    """How a run ended, or, of one that nobody leads any more, the last that it said; None of one that may answer."""
    found = look(folder, time.time())
    if found.live:
        return None
    if found.status is None or found.status.over:
        return found.status
    because = "its coordinator is gone, and nobody has written down how it ended"
    return msgspec.structs.replace(found.status, state=CUT_OFF, because=because)


def leader(folder: Path) -> str:
    """The machine of the coordinator, as its log has it; empty where that does not say."""
    from ..logs.reading.lines import read_object

    with suppress(OSError), (folder / rundir.LOGS / "coordinator.jsonl").open("rb") as file:
        return str((read_object(file.readline(1 << 16)) or {}).get("host", ""))
    return ""


def touched(folder: Path) -> float:
    """When something in it was last written."""
    files: Sequence[Path] = [folder / rundir.NOW, folder / rundir.EVENTS]
    newest = 0.0
    for file in (*files, *(folder / rundir.LOGS).glob("*.jsonl"), *(folder / rundir.TIMELINE).glob("*")):
        with suppress(OSError):
            newest = max(newest, file.stat().st_mtime)
    return newest
