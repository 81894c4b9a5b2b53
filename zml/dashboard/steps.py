"""One step across all workers, out of the files in `timeline/`.

A file may hold 20,000 lines and there may be many: none is read whole. Lines are in the order of their clock, so that a
step is found by halving, a few kilobytes at a time; and the curve of all steps is made from a few lines of each file,
evenly spaced.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..figures import PHASES
from ..runs.timeline import starts
from .thinning import rounded
from .views import Bar, Waterfall

LONGEST_LINE = 4096
PIECE = 8192
POINTS = 200  # of the curve of all steps
SLOWEST = 8
BEHIND = 64  # steps, or a share of all, that a worker may be behind the first and still be with it
BEHIND_SHARE = 0.05
MOST_FILES = 512


class Line(msgspec.Struct, frozen=True):
    """Of a worker's file, as `runs.timeline.Step` writes it; what an older run does not have is 0. `at`: seconds
    since the worker's own first step."""

    clock: int
    at: float = 0.0
    data: float = 0.0
    compute: float = 0.0
    encode: float = 0.0
    wait: float = 0.0
    apply: float = 0.0
    send: float = 0.0
    pull: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    began: float = 0.0  # seconds since the Unix epoch

    @property
    def phases(self) -> dict[str, float]:
        return {phase: getattr(self, phase) for phase in PHASES}

    @property
    def whole(self) -> float:
        return self.data + self.compute + self.encode + self.wait + self.apply


DECODER = msgspec.json.Decoder(Line)


class StepFile:
    """One worker's, open for reading. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.worker = path.stem
        self.file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        self.size = os.fstat(self.file).st_size

    def close(self) -> None:
        os.close(self.file)

    def next_from(self, place: int) -> tuple[int, Line] | None:
        """The first whole line that begins at or behind this byte, and where it ends."""
        skip = place > 0
        begin = max(0, place - 1)  # a line that begins at `place` has its predecessor's end before it
        while begin < self.size:
            data = os.pread(self.file, PIECE, begin)
            at = 0
            if skip:
                cut = data.find(b"\n")
                if cut < 0:
                    begin += len(data) or self.size
                    continue
                at, skip = cut + 1, False
            while (end := data.find(b"\n", at)) >= 0:
                try:
                    return begin + end + 1, DECODER.decode(data[at:end])
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    at = end + 1
            if at == 0 and len(data) >= LONGEST_LINE:
                skip = True  # nothing that we wrote
                begin += len(data)
            elif len(data) < PIECE:
                return None
            else:
                begin += at
        return None

    def find(self, clock: int) -> Line | None:
        """The first step that is not before this clock."""
        low, high = 0, self.size
        while high - low > LONGEST_LINE:
            half = (low + high) // 2
            found = self.next_from(half)
            if found is not None and found[1].clock < clock:
                low = max(found[0] - 1, low + 1)
            else:
                high = half
        place = max(0, low - LONGEST_LINE)
        while (found := self.next_from(place)) is not None:
            place, line = found
            if line.clock >= clock:
                return line
        return None

    def ends(self) -> tuple[int, int] | None:
        """The first and the last clock."""
        first = self.next_from(0)
        if first is None:
            return None
        last = first[1]
        place = max(first[0], self.size - 2 * LONGEST_LINE)
        while (found := self.next_from(place)) is not None:
            place, last = found
        return first[1].clock, last.clock

    def sample(self, points: int) -> list[Line]:
        """So many lines, at most, evenly spaced, in order."""
        lines: list[Line] = []
        for point in range(points):
            found = self.next_from(self.size * point // points)
            if found is not None and (not lines or found[1].clock > lines[-1].clock):
                lines.append(found[1])
        return lines


def waterfall(folder: Path, clock: int | None) -> Waterfall:
    """A step; without a clock, the last that every worker has finished that is not far behind, or gone."""
    files: list[StepFile] = []
    try:
        for path in sorted(folder.glob("*.jsonl"), key=lambda path: (len(path.name), path.name))[:MOST_FILES]:
            try:
                files.append(StepFile(path))
            except OSError:
                continue
        return of(files, clock)
    finally:
        for each in files:
            each.close()


EMPTY = Waterfall(clock=-1, first=0, last=0, bars=[], lacking=[], slow=[], step=[], whole_s=[])


def of(files: Sequence[StepFile], clock: int | None) -> Waterfall:
    reach = {each.worker: ends for each in files if (ends := each.ends()) is not None}
    if not reach:
        return EMPTY
    first, last = min(each[0] for each in reach.values()), max(each[1] for each in reach.values())
    if clock is None:
        behind = max(BEHIND, BEHIND_SHARE * (last - first))
        wanted = min(each[1] for each in reach.values() if last - each[1] <= behind)
    else:
        wanted = max(first, min(clock, last))
    lines = {each.worker: each.find(wanted) for each in files}
    there = {worker: line for worker, line in lines.items() if line is not None and line.clock == wanted}
    if not there and (near := [line.clock for line in lines.values() if line is not None]):
        wanted = min(near)  # of a long run not every step is kept
        lines = {each.worker: each.find(wanted) for each in files}
        there = {worker: line for worker, line in lines.items() if line is not None and line.clock == wanted}
    step, whole = curve(files)
    longest = max((line.whole for line in there.values()), default=0.0)
    start, apart = starts({worker: line.began for worker, line in there.items()}, longest)
    slowest = sorted(range(len(step)), key=lambda place: -(whole[place] or 0.0))[:SLOWEST]
    return Waterfall(
        clock=wanted if there else -1,
        first=first,
        last=last,
        bars=[
            Bar(
                worker=worker,
                phases={phase: rounded(value) or 0.0 for phase, value in line.phases.items()},
                beside={"push": line.send, "pull": line.pull},
                whole_s=rounded(line.whole) or 0.0,
                start_s=rounded(start[worker]) or 0.0,
                bytes_up=line.bytes_up,
                bytes_down=line.bytes_down,
            )
            for worker, line in there.items()
        ],
        lacking=[each.worker for each in files if each.worker not in there],
        slow=[step[place] for place in slowest],
        step=step,
        whole_s=whole,
        apart=apart if there else "",
    )


def curve(files: Sequence[StepFile]) -> tuple[list[int], list[float | None]]:
    """The longest of the workers' steps, at some clocks over the whole run."""
    points = max(8, min(POINTS, 4 * POINTS // max(1, len(files))))
    slowest: dict[int, float] = {}
    for each in files:
        for line in each.sample(points):
            slowest[line.clock] = max(slowest.get(line.clock, 0.0), line.whole)
    clocks = sorted(slowest)
    if len(clocks) > 4 * POINTS:  # files of different lengths have different clocks
        size = len(clocks) / (2 * POINTS)
        groups = [clocks[int(at * size) : int((at + 1) * size)] for at in range(2 * POINTS)]
        clocks = [max(group, key=slowest.__getitem__) for group in groups if group]
    return clocks, [rounded(slowest[clock]) for clock in clocks]
