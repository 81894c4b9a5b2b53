"""What people ask about jobs, answered from the docket. The HTTP API stands before it.

Rule: whatever changes something is on disk before it is answered; what cannot be taken says why and what to do.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import structlog

from ..errors import ZmlError
from ..runs import rundir
from ..scheduler.cluster import actions, events, whys
from ..scheduler.cluster.plan import Quota
from ..scheduler.cluster.request import Request
from ..scheduler.cluster.resources import Resources
from ..scheduler.cluster.state import Job, Over, Standing
from ..scheduler.explain import counted
from ..scheduler.ids import JobId
from .attempts import resolve_for
from .docket import Accepted
from .hub import Hub
from .jobfile import sound
from .jobs import Explanation, JobView, NodeView, Problem, Submission, name_of
from .nodes import archive_file

MOST_JOBS = 100_000  # that are not over
MOST_ARCHIVE = 2 << 30
AT_ONCE = 1 << 20  # bytes of one that are written
AHEAD = 20  # jobs that are named

log = structlog.get_logger()


class JobDesk:
    """Implements `jobs.Desk`."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.docket = hub.docket

    # -- asking for something -------------------------------------------------------------------------------

    def submit(self, submission: Submission, user: str, *, key: str = "") -> JobView:
        self._must_write()
        known = self.docket.facts.keys.get(f"{user}\0{key}") if key else None
        if known is not None and known in self.docket.facts.records:
            return self.job(known)
        if len(self.hub.machine.cluster.jobs) >= MOST_JOBS:
            raise Problem(503, f"there are {MOST_JOBS:,} jobs that are not over", "Try again later.")
        job = self.docket.next_job()
        request = self._request(submission, job, user)
        if not self.docket.accept(Accepted(job=job, user=user, key=key, submission=submission)):
            raise self._no_room()
        self.hub.dispatch(events.Submitted(request))
        if not self.docket.settled():  # half of it is written, and the other half waits
            what = f"job {job} is not written down whole yet, and begins when it is: {self.docket.trouble}"
            raise Problem(
                507, what, f"Make room on its disk; `zml job show {job}` tells. Do not send it again."
            )
        return self.job(job)

    def _request(self, submission: Submission, job: JobId, user: str) -> Request:
        """Raises Problem where nobody could run it."""
        if submission.gpus > 1:
            raise Problem(400, "a worker takes one GPU at most", "Ask for more workers with --gpus 1.")
        if submission.archive is not None and not self.has_archive(submission.archive):
            raise Problem(409, f"there is no archive {submission.archive[:12]}", "Send it first.")
        for name in submission.after:
            if name not in self.docket.facts.records:
                raise Problem(400, f"there is no job {name} to come after", "`zml jobs --all` lists them.")
        try:
            sound(submission)
            least, most = submission.bounds
            resolve_for(submission, least)
            self._allow(submission, user, least)
            return Request(
                job=job,
                user=user,
                least=least,
                most=most,
                shards=submission.shards,
                replicas=submission.replicas,
                worker=Resources(cpus=submission.cpus, gpus=submission.gpus, memory_mb=submission.memory_mb),
                shard=Resources(memory_mb=submission.shard_memory_mb),
                priority=submission.priority,
                after=tuple(JobId(name) for name in submission.after),
                retries=submission.retries,
                time_limit_s=submission.time_limit_s,
                preemptible=submission.preemptible,
                submitted=self.docket.now,
            )
        except ZmlError as error:
            raise Problem(400, error.what, error.fix, error.code) from None
        except ValueError as bad:
            raise Problem(400, str(bad)) from None

    def _allow(self, submission: Submission, user: str, least: int) -> None:
        """Raises Problem where the user's quota is too small for this job alone: it would wait for ever."""
        quota = self.hub.quotas.get(user, Quota())
        limits = [("worker", 1, quota.workers), ("GPU", submission.gpus, quota.gpus)]
        for what, each, limit in [*limits, ("CPU", submission.cpus, quota.cpus)]:
            if limit is not None and (needed := least * each) > limit:
                because = f"{user} may hold {counted(limit, what)} at most, and this job needs {needed}"
                raise Problem(400, because, "Ask for fewer with --workers, or have the quota raised.")

    def cancel(self, job: str, because: str) -> JobView:
        return self._ask(job, events.CancelAsked(JobId(job), because))

    def pause(self, job: str, because: str) -> JobView:
        return self._ask(job, events.PauseAsked(JobId(job), because))

    def resume(self, job: str) -> JobView:
        return self._ask(job, events.ResumeAsked(JobId(job)))

    def scale(self, job: str, least: int, most: int) -> JobView:
        found = self.hub.machine.cluster.jobs.get(JobId(job))
        if found is not None:
            try:
                Request(job=JobId(job), least=least, most=most)
                accepted = self.docket.facts.records[job].accepted
                self._allow(accepted.submission, accepted.user, least)
            except ValueError as bad:
                raise Problem(400, str(bad)) from None
        return self._ask(job, events.ScaleAsked(JobId(job), least, most))

    def delete(self, job: str, because: str) -> JobView:
        self._must_write()
        view = self.job(job)
        if job in self.hub.machine.cluster.jobs:
            raise Problem(409, f"job {job} is not over: {view.state}", "Cancel it first.")
        if (other := self.hub.remains.needed().get(JobId(job))) is not None:
            raise Problem(409, f"job {other}, which is not over, needs job {job}", f"Wait for {other}.")
        self.hub.dispatch(events.Discarded(JobId(job), because))
        self._must_write()
        return view

    def _ask(self, job: str, event: events.Event) -> JobView:
        self._must_write()
        self._record(job)
        if isinstance(event, events.CancelAsked) and job in self.hub.machine.cluster.over:
            return self.job(job)  # twice is the same as once
        ordered = self.hub.dispatch(event)
        for action in ordered:
            if isinstance(action, actions.Ignored) and action.job == job:
                raise Problem(409, action.because)
        self._must_write()
        return self.job(job)

    def _must_write(self) -> None:
        if not self.docket.settled():
            raise self._no_room()

    def _no_room(self) -> Problem:
        return Problem(507, self.docket.trouble, "Make room on its disk, and ask again.")

    # -- looking -------------------------------------------------------------------------------------------

    def jobs(self, *, states: frozenset[str] = frozenset(), user: str = "", newest: int = 0) -> list[JobView]:
        found = []
        for job, record in self.docket.facts.records.items():
            if user and record.accepted.user != user:
                continue
            view = self._view(job, whole=False)
            if not states or view.state in states:
                found.append(view)
        return found[-newest:] if newest else found

    def job(self, job: str) -> JobView:
        self._record(job)
        return self._view(job, whole=True)

    def _record(self, job: str) -> None:
        if job not in self.docket.facts.records:
            raise Problem(404, f"there is no job {job[:40]}", "`zml jobs --all` lists them.")

    def _view(self, name: str, *, whole: bool) -> JobView:
        record = self.docket.facts.records[name]
        asked = record.accepted.submission
        cluster = self.hub.machine.cluster
        job, over = cluster.jobs.get(JobId(name)), cluster.over.get(JobId(name))
        known = job or over
        assert known is not None, f"{name} is recorded, and not known"
        request, attempt = known.request, job.attempt if job is not None else None
        why, because = self._why(job, over)
        return JobView(
            id=name,
            name=name_of(asked),
            user=record.accepted.user,
            state=known.standing.name,
            why=why,
            because=because,
            submitted_at=record.submitted_at,
            began_at=known.first_began,
            ended_at=over.at if over is not None else None,
            exit_code=over.exit_code if over is not None else None,
            priority=request.priority,
            workers=len(attempt.workers()) if attempt is not None else 0,
            workers_min=request.least,
            workers_max=request.most,
            shards=request.shards,
            nodes=sorted({slot.node for slot in attempt.slots.values()}) if attempt is not None else [],
            attained_s=job.attained(self.docket.now) if job is not None else known.attained_s,
            attempts=record.attempts if whole else [],
            submission=asked if whole else None,
        )

    def _why(self, job: Job | None, over: Over | None) -> tuple[str, str]:
        if over is not None:
            return "", over.because
        assert job is not None
        record = self.docket.facts.records[job.id]
        last = record.attempts[-1].because if record.attempts else ""
        machine = self.hub.machine
        why, because = whys.why(machine.cluster, job, machine.verdicts, self.docket.now, last, self.hub.fleet)
        return why.name, because

    def explain(self, job: str) -> Explanation:
        view = self.job(job)
        ahead: list[str] = []
        if view.state == Standing.QUEUED.name:
            # Verdicts are in the policy's order: whoever comes before has, or gets first, what this one waits for.
            for other, verdict in self.hub.machine.verdicts.items():
                if other == job:
                    break
                found = self.hub.machine.cluster.jobs.get(other)
                if found is not None and found.attempt is None and verdict.why in whys.OF_A_PLAN:
                    ahead.append(other)
        decisions = self.docket.facts.records[job].decisions
        return Explanation(job=view, ahead=ahead[:AHEAD], ahead_count=len(ahead), decisions=decisions)

    def nodes(self) -> list[NodeView]:
        cluster, now = self.hub.machine.cluster, asyncio.get_running_loop().time()
        taken = cluster.taken()
        jobs: dict[str, set[str]] = {}
        for job in cluster.jobs.values():
            for slot in job.attempt.slots.values() if job.attempt is not None else ():
                jobs.setdefault(slot.node, set()).add(job.id)
        found = []
        for name, present in cluster.nodes.items():
            offers, free = present.node.offers, present.node.offers - taken[name]
            found.append(
                NodeView(
                    id=name,
                    state="LEAVING" if present.node.leaving else "UP",
                    rack=present.node.rack,
                    gpus=offers.gpus,
                    cpus=offers.cpus,
                    memory_mb=offers.memory_mb,
                    gpus_free=free.gpus,
                    cpus_free=free.cpus,
                    memory_mb_free=free.memory_mb,
                    jobs=sorted(jobs.get(name, ())),
                    heard_s=now - self.hub.nodes.heard_at.get(name, self.hub.began),
                )
            )
        return found

    async def changed(self, job: str, within_s: float) -> JobView:
        before = news(self.job(job))
        until = asyncio.get_running_loop().time() + within_s
        while True:
            waiting = self.hub.changed
            view = self.job(job)
            if news(view) != before or view.ended_at is not None:
                return view
            try:
                async with asyncio.timeout_at(until):
                    await waiting.wait()
            except TimeoutError:
                return self.job(job)

    # -- files -----------------------------------------------------------------------------------------------

    def _archive(self, sha256: str) -> Path:
        return archive_file(self.hub.folder, sha256)

    def has_archive(self, sha256: str) -> bool:
        try:
            os.utime(self._archive(sha256))  # somebody may be about to submit a job with it
        except OSError:
            return False
        return True

    async def take_archive(self, sha256: str, data: AsyncIterator[bytes]) -> None:
        path = self._archive(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{sha256}.{os.getpid()}.{id(data)}")
        digest, size = hashlib.sha256(), 0

        def keep(file: BinaryIO, data: bytearray) -> None:
            digest.update(data)
            file.write(data)

        def sync(file: BinaryIO) -> None:
            file.flush()
            os.fsync(file.fileno())

        try:
            with scratch.open("wb") as file:
                held = bytearray()
                async for piece in data:
                    size += len(piece)
                    if size > MOST_ARCHIVE:
                        raise Problem(413, f"an archive has {MOST_ARCHIVE >> 30} GB at most")
                    held += piece
                    if len(held) >= AT_ONCE:  # in a thread: others are heard, however slow the disk is
                        await asyncio.to_thread(keep, file, held)
                        held = bytearray()
                await asyncio.to_thread(keep, file, held)
                await asyncio.to_thread(sync, file)
            if digest.hexdigest() != sha256:
                raise Problem(400, f"these {size:,} bytes are not {sha256[:12]}", "Send it again.")
            os.replace(scratch, path)
        except OSError as error:
            raise Problem(507, f"the archive cannot be kept: {error.strerror}") from None
        finally:
            scratch.unlink(missing_ok=True)

    def archive(self, sha256: str) -> str:
        if not self.has_archive(sha256):
            raise Problem(404, f"there is no archive {sha256[:12]}")
        return str(self._archive(sha256))

    def log_files(self, job: str, attempt: int | None = None) -> dict[str, str]:
        self._record(job)
        attempts = self.docket.facts.records[job].attempts
        found = [each for each in attempts if attempt is None or each.number == attempt]
        if not found:
            if attempt is not None:
                raise Problem(404, f"job {job} has no attempt {attempt}")
            return {}
        folder = Path(found[-1].run_dir) / rundir.LOGS
        return {path.name: str(path) for path in sorted(folder.glob("*")) if path.is_file()}


def news(view: JobView) -> JobView:
    """What of it is worth to be told: not what time alone changes."""
    return msgspec.structs.replace(view, attained_s=0.0)
