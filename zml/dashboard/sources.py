"""Which runs there are to show: one, those of a folder, or those of a hub's jobs.

Names come from whoever asks, so a name is only ever looked up among those that are there; none becomes a path. `run`
and what concerns jobs is asked in the server's loop and is quick; `runs` and `seek` read files, and block.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import msgspec

from .. import __version__
from ..cluster.jobs import Desk, JobView, NodeView, Problem
from ..runs import finding, rundir
from .run import Live, Run, version_of
from .views import About, Event, JobLine, Jobs, JobWhy, NodeLine, RunLine, Runs, tone_of

MOST_RUNS = 200  # in a list
MOST_JOBS = 500
OPEN_RUNS = 24  # whose rows are kept


class Source(Protocol):
    def about(self) -> About: ...

    def run(self, name: str) -> Run | None:
        """None where there is no such run, it has begun nothing yet, or is not known before `seek`."""
        ...

    def seek(self, name: str) -> None:
        """Look for a run that `run` does not know."""
        ...

    def runs(self) -> Runs: ...

    def jobs(self) -> Jobs | None:
        """None where there is no hub."""
        ...

    def why(self, job: str) -> JobWhy | None: ...


class OneRun:
    """The run of this folder. `live` asks its coordinator, which is in this process."""

    def __init__(self, folder: Path, live: Live | None = None) -> None:
        self.only = Run(folder, live=live)

    def about(self) -> About:
        return About(kind="run", version=__version__, run=self.only.name, title=self.only.name)

    def run(self, name: str) -> Run | None:
        return self.only if name == self.only.name else None

    def seek(self, name: str) -> None:
        pass

    def runs(self) -> Runs:
        return Runs(runs=[self.only.line()], left_out=0)

    def jobs(self) -> Jobs | None:
        return None

    def why(self, job: str) -> JobWhy | None:
        return None


class RunsOf:
    """The runs below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.known: dict[str, Path] = {}
        self.open: OrderedDict[str, Run] = OrderedDict()
        self.lines: dict[str, tuple[str, RunLine]] = {}  # of those that are over

    def about(self) -> About:
        return About(kind="runs", version=__version__, title=str(self.folder))

    def run(self, name: str) -> Run | None:
        if name in self.open:
            self.open.move_to_end(name)
            return self.open[name]
        folder = self.known.get(name)
        if folder is None:
            return None
        self.open[name] = run = Run(folder, name=name)
        while len(self.open) > OPEN_RUNS:
            self.open.popitem(last=False)
        return run

    def seek(self, name: str) -> None:
        if name not in self.known:
            self._list()

    def runs(self) -> Runs:
        known = self._list()
        newest = sorted(known, reverse=True)
        lines = [self._line(name, known[name]) for name in newest[:MOST_RUNS]]
        return Runs(runs=lines, left_out=max(0, len(newest) - MOST_RUNS))

    def _list(self) -> dict[str, Path]:
        """What is there now, by the names that people use. Several threads may ask: each keeps what it found."""
        known = {finding.name(each, self.folder): each for each in finding.all_runs(self.folder)}
        self.known = known
        return known

    def _line(self, name: str, folder: Path) -> RunLine:
        ended = version_of(folder / rundir.STATUS)
        if not ended:
            return Run(folder, name=name).line()
        if name not in self.lines or self.lines[name][0] != ended:
            self.lines[name] = (ended, Run(folder, name=name).line())
        return self.lines[name][1]

    def jobs(self) -> Jobs | None:
        return None

    def why(self, job: str) -> JobWhy | None:
        return None


class HubRuns:
    """The jobs of a hub; a job opens the run directory of its newest attempt."""

    def __init__(self, desk: Desk, name: str = "") -> None:
        self.desk = desk
        self.name = name
        self.open: OrderedDict[str, Run] = OrderedDict()  # by run directory

    def about(self) -> About:
        return About(kind="hub", version=__version__, title=self.name)

    def run(self, name: str) -> Run | None:
        try:
            job = self.desk.job(name)
        except Problem:
            return None
        if not opens(job):
            return None
        folder = job.attempts[-1].run_dir
        if folder not in self.open:
            attempt = f", attempt {len(job.attempts)}" if len(job.attempts) > 1 else ""
            self.open[folder] = Run(Path(folder), name=f"{job.id}{attempt}")
            while len(self.open) > OPEN_RUNS:
                self.open.popitem(last=False)
        self.open.move_to_end(folder)
        return self.open[folder]

    def seek(self, name: str) -> None:
        pass

    def runs(self) -> Runs:
        return Runs(runs=[], left_out=0)

    def jobs(self) -> Jobs | None:
        found = self.desk.jobs()
        counts: dict[str, int] = {}
        for job in found:
            counts[job.state] = counts.get(job.state, 0) + 1
        live = [job for job in found if job.ended_at is None]
        over = [job for job in found if job.ended_at is not None]
        shown = [*live[:MOST_JOBS], *over[::-1][: max(0, MOST_JOBS - len(live))]]
        return Jobs(
            jobs=[job_line(job) for job in shown],
            nodes=[node_line(node) for node in self.desk.nodes()],
            counts=counts,
            left_out=len(found) - len(shown),
        )

    def why(self, job: str) -> JobWhy | None:
        try:
            found = self.desk.explain(job)
        except Problem:
            return None
        return JobWhy(
            id=job,
            ahead=found.ahead,
            ahead_count=found.ahead_count,
            decisions=[
                Event(at=each.at, what=each.what, member="", because=each.because, tone="quiet")
                for each in found.decisions
            ],
        )


def job_line(job: JobView) -> JobLine:
    return JobLine(
        id=job.id,
        name=job.name,
        user=job.user,
        state=job.state,
        tone=tone_of(job.state),
        why=job.why,
        because=job.because,
        submitted_at=job.submitted_at,
        began_at=job.began_at,
        ended_at=job.ended_at,
        priority=job.priority,
        workers=job.workers,
        workers_min=job.workers_min,
        workers_max=job.workers_max,
        shards=job.shards,
        nodes=job.nodes,
        attempts=len(job.attempts),
        opens=opens(job),
    )


def opens(job: JobView) -> bool:
    return bool(job.attempts) and job.attempts[-1].run_dir != ""


def node_line(node: NodeView) -> NodeLine:
    found: dict[str, object] = {field: getattr(node, field) for field in node.__struct_fields__}
    return msgspec.convert({**found, "tone": tone_of(node.state)}, NodeLine)


def source_of(path: Path) -> OneRun | RunsOf | None:
    """A run directory, or a folder of them; None for what is neither."""
    if (run := finding.at(path)) is not None:
        return OneRun(run)
    return RunsOf(path) if finding.is_folder(path) else None
