"""From an allocation's environment to an attempt, and from its end to what the batch script ends with.

Rule: everything is decided from what Slurm says and from the job's folder, so that a job that was requeued needs
nobody who remembers: it finds its folder, sees what is done, and goes on from the newest checkpoint.
"""

import asyncio
import signal
import sys
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from .. import observe
from ..compression import parse
from ..config import Resolved, Settings
from ..errors import EX_TEMPFAIL, USAGE, ZmlError
from ..launch.local import COMPILE_S
from ..launch.local import environment as told
from ..logs import outlets as logs
from ..runs import rundir
from ..runs.resume import in_words
from ..text import console, report
from ..text.console import counted
from . import address, commands
from .folder import JobFolder, job_name, running_job
from .head import Head, Job
from .hostlist import names
from .joining import Joining, Reinforcement
from .shape import Shape
from .step import environment
from .verdict import End, Exit, Requeue, verdict

AWAY_S = 180.0  # for members without their coordinator: the batch script starts it again at once, while its node lives


@dataclass(frozen=True, slots=True)
class Asked:
    """The command line of `zml slurm head`."""

    resolved: Resolved
    shape: Shape
    script: str = ""
    args: Sequence[str] = ()
    join: str = ""
    python: str = sys.executable  # of the steps
    interface: str = ""
    requeue: bool = True
    srun: Sequence[str] = ()

    @property
    def program(self) -> list[str]:
        return [self.python, "-P", "-m", "zml.slurm.role"]


def lead(asked: Asked, environ: Mapping[str, str]) -> int:
    """Run this allocation; the exit code of the batch script. Raises ZmlError."""
    job = job_name(environ)
    nodes = names(environ.get("SLURM_JOB_NODELIST", ""))
    if not nodes:
        raise ZmlError(USAGE, "SLURM_JOB_NODELIST names no nodes", "Start it as the batch script of a job.")
    viewer = console.viewer(sys.stdout, sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EX_TEMPFAIL))  # until there is something to drain
    try:
        if asked.join:
            return _reinforce(asked, job, nodes, environ, viewer)
        return _attempt(asked, job, nodes, environ, viewer)
    finally:
        viewer.close()


def _attempt(
    asked: Asked, job: str, nodes: Sequence[str], environ: Mapping[str, str], viewer: console.Viewer
) -> int:
    folder = JobFolder.of(Path(asked.resolved.settings.runs), environ)
    before = folder.ended()
    if before is not None and before.exit_code == 0:
        viewer.say(f"{job} is done already: {before.run_dir}")
        return 0
    folder.make()
    run = folder.next_attempt()
    resolved = _settled(asked, folder, run, len(nodes), viewer)
    here = nodes[0]
    try:
        node_address = commands.node_address(here)
    except ZmlError:  # no scontrol, in a container say: names may do
        node_address = ""
    at = address.own(node_address, here, len(nodes), asked.interface)
    rundir.create(resolved, asked.script, asked.args, cpu=not asked.shape.worker.gpus)
    folder.point_at(run)
    settings = resolved.settings
    logs.configure(
        "launcher",
        "head",
        folder=run / rundir.LOGS,
        job=settings.job,
        level=settings.log_level,
        terminal=False,
    )
    members = f"{counted(settings.workers, 'worker')} and {counted(settings.shards, 'shard')}"
    viewer.say(f"{job} on {counted(len(nodes), 'node')}, {here} first: {members}, in {run}")
    plan = Job(
        settings=settings,
        run=run,
        script=asked.script,
        args=asked.args,
        shape=asked.shape,
        nodes=nodes,
        address=at,
        program=asked.program,
        interface=asked.interface,
        srun=asked.srun,
    )
    told_to_each = environment(told(environ, settings, None))
    lost = False

    async def main() -> int:
        nonlocal lost
        head = Head(plan, told_to_each, viewer, observe, lambda: commands.nodes_of(job))
        try:
            return await head.run()
        finally:
            lost = head.nodes_lost

    failure: ZmlError | None = None
    try:
        code = _run(main())
    except ZmlError as error:
        code, failure = error.exit_code, error
    over = rundir.last_status(run)
    if over is not None:
        out = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        report.print_report(msgspec.structs.replace(over, run_dir=str(run)), out, resumable=False)
    if failure is not None:
        viewer.say(f"error: {failure.what} [{failure.code}]")
        viewer.say(f"  {failure.fix}")
    return _end(End(code, lost, folder.fruitless(), _state(job)), asked.requeue, job, viewer)


def _settled(asked: Asked, folder: JobFolder, run: Path, nodes: int, viewer: console.Viewer) -> Resolved:
    """The settings of this attempt: what was asked for, and what follows from the allocation and from those before."""
    given = asked.resolved
    settings = replace(
        given.settings, run_dir=str(run), keys=str(folder.keys), workers=asked.shape.workers_on(nodes)
    )
    if given.origins.get("coordinator_away_s") == "default":
        settings = replace(settings, coordinator_away_s=AWAY_S)
    if parse(settings.compress).sparse:  # the first one on a machine compiles before its shards join
        settings = replace(settings, join_timeout_s=max(settings.join_timeout_s, COMPILE_S))
    if (found := folder.resume_from(lambda skipped: viewer.say(str(skipped)))) is not None:
        attempt, manifest = found
        settings = replace(settings, resume=str(attempt))
        viewer.say(f"resuming {attempt.name}, {in_words(manifest)}")
    return Resolved(settings, given.origins)


def _reinforce(
    asked: Asked, job: str, nodes: Sequence[str], environ: Mapping[str, str], viewer: console.Viewer
) -> int:
    run, keys = running_job(Path(asked.join).absolute())
    if rundir.last_status(run) is not None:
        viewer.say(f"the job in {run} is over: there is nothing to join")
        return 0
    listening = rundir.listening(run)
    if listening is None:
        raise ZmlError(
            USAGE, f"{run} holds no run that has begun", "Join it when it has: `zml status` says so."
        )
    settings: Settings = replace(
        asked.resolved.settings,
        coordinator=tuple(each for each in listening.addresses if each.startswith("tcp:")),
        keys=asked.resolved.settings.keys or (str(keys) if keys != Path() else ""),
    )
    if asked.resolved.origins.get("coordinator_away_s") == "default":
        settings = replace(settings, coordinator_away_s=AWAY_S)
    of_this = run / rundir.LOGS / f"join-{job}"
    of_this.mkdir(parents=True, exist_ok=True)
    workers = asked.shape.workers_on(len(nodes))
    viewer.say(f"{job} on {counted(len(nodes), 'node')} brings {counted(workers, 'worker')} to {run}")
    plan = Reinforcement(settings, run, of_this, asked.shape, nodes, asked.program, asked.srun)
    told_to_each = environment(told(environ, settings, None))

    async def main() -> int:
        return await Joining(plan, told_to_each, viewer).run()

    code = _run(main())
    return _end(End(code, False, 0, _state(job)), asked.requeue, job, viewer)


def _state(job: str) -> str:
    try:
        return commands.state(job)
    except ZmlError:
        return ""


def _run(main: Coroutine[Any, Any, int]) -> int:
    """What follows a signal is under way afterwards: a further one changes nothing."""
    try:
        return asyncio.run(main)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end(end: End, may_requeue: bool, job: str, viewer: console.Viewer) -> int:
    follows = verdict(end, may_requeue=may_requeue)
    match follows:
        case Exit():
            if follows.because:
                viewer.say(f"{job} ends with {follows.code}: {follows.because}")
        case Requeue():
            viewer.say(f"requeueing {job}: {follows.because}")  # before Slurm ends this process
            try:
                commands.requeue(job)
            except ZmlError as error:
                viewer.say(
                    f"{job} ends with {follows.code}, safe to run again, and is not requeued: {error.what}"
                )
    return follows.code
